/* One row of bf16 weights times a float vector, the same sums in the same order for every kernel.
 *
 * A bf16 is the upper half of a float. A 32-bit word has two of them: shifted up it is the first,
 * masked the second, so x is split into even and odd columns once. Sums are float.
 */
#ifndef OPTIM_CPU_BF16_H
#define OPTIM_CPU_BF16_H
#include <stdlib.h>
#include <string.h>

#include "optim.h"

enum { LANES = 8, AHEAD = 1024 }; /* of a vector; elements asked for early */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

static float widen(uint16_t half) {
    const uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static float total(floats v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

static inline __attribute__((always_inline)) floats times(const float *x, words w) {
    floats v;
    memcpy(&v, x, sizeof v);
    return v * (floats)w;
}

typedef struct {
    floats a, b, c, d; /* even and odd columns of the first 16 of 32 weights, and of the others */
} Sums;

/* 32 weights: p the first 16, q the others; `even`, `odd` their 16 columns each. */
static inline __attribute__((always_inline)) void add_32(Sums *s, words p, words q,
                                                         const float *even, const float *odd) {
    s->a += times(even, p << 16);
    s->b += times(odd, p & 0xffff0000u);
    s->c += times(even + LANES, q << 16);
    s->d += times(odd + LANES, q & 0xffff0000u);
}

/* The last `cols` weights of a row, after what is in `s`. */
static inline float rest_of_row(Sums s, const uint16_t *w, const float *x, const float *even,
                                const float *odd, int64_t cols) {
    const int64_t step = 4 * LANES, whole = cols - cols % step;
    for (int64_t k = 0; k < whole; k += step) {
        words p, q;
        memcpy(&p, w + k, sizeof p);
        memcpy(&q, w + k + 2 * LANES, sizeof q);
        __builtin_prefetch(w + k + AHEAD);
        add_32(&s, p, q, even + k / 2, odd + k / 2);
    }
    float y = total((s.a + s.b) + (s.c + s.d));
    for (int64_t k = whole; k < cols; k++) y += x[k] * widen(w[k]);
    return y;
}

static inline float one_row(const uint16_t *w, const float *x, const float *even,
                            const float *odd, int64_t cols) {
    return rest_of_row((Sums){{0}, {0}, {0}, {0}}, w, x, even, odd, cols);
}

/* x [tokens][cols] -> [tokens][even columns, then odd], cols / 2 each; NULL if there is no memory. */
static float *split_columns(const float *x, int64_t tokens, int64_t cols) {
    const int64_t half = cols / 2;
    float *made = malloc((tokens * 2 * half + 1) * sizeof(float));
    for (int64_t t = 0; made && t < tokens; t++, x += cols)
        for (int64_t k = 0; k < half; k++) {
            made[t * 2 * half + k] = x[2 * k];
            made[t * 2 * half + half + k] = x[2 * k + 1];
        }
    return made;
}

#endif
