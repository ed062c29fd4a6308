/* One row of bf16 weights times a float vector, the same sums in the same order for every kernel.
 *
 * A 32-bit word has two bf16: shifted up it is the first as a float, masked the second, so x is split
 * into even and odd columns once. Sums are float.
 */
#ifndef OPTIM_CPU_BF16_H
#define OPTIM_CPU_BF16_H
#include "simd_half.h"
#include "parallel.h"

enum { PREFETCH_WEIGHTS = 1024 }; /* what is asked for so far ahead has come when it is read */

typedef struct {
    wide a, b, c, d; /* even and odd columns of the first 16 of 32 weights, and of the others */
} Sums;

/* 32 weights: p the first 16, q the others; `even`, `odd` their 16 columns each. */
INLINE void add_32(Sums *s, words p, words q, const float *even, const float *odd) {
    s->a += load_wide(even) * (wide)(p << 16);
    s->b += load_wide(odd) * (wide)(p & 0xffff0000u);
    s->c += load_wide(even + WIDE) * (wide)(q << 16);
    s->d += load_wide(odd + WIDE) * (wide)(q & 0xffff0000u);
}

/* The sums of a row whose weights before `from` are in `s`, and the others. */
static inline float end_of_row(Sums s, const uint16_t *w, const float *x, int64_t from, int64_t cols) {
    float y = lane_sum((s.a + s.b) + (s.c + s.d));
    for (int64_t k = from; k < cols; k++) y += x[k] * from_bf16(w[k]);
    return y;
}

/* The last `cols` weights of a row, after what is in `s`. */
static inline float rest_of_row(Sums s, const uint16_t *w, const float *x, const float *even,
                                const float *odd, int64_t cols) {
    const int64_t step = 4 * WIDE, whole = cols - cols % step;
    for (int64_t k = 0; k < whole; k += step) {
        words p, q;
        memcpy(&p, w + k, sizeof p);
        memcpy(&q, w + k + 2 * WIDE, sizeof q);
        __builtin_prefetch(w + k + PREFETCH_WEIGHTS);
        add_32(&s, p, q, even + k / 2, odd + k / 2);
    }
    return end_of_row(s, w, x, whole, cols);
}

static inline float one_row(const uint16_t *w, const float *x, const float *even,
                            const float *odd, int64_t cols) {
    return rest_of_row((Sums){{0}, {0}, {0}, {0}}, w, x, even, odd, cols);
}

/* x [tokens][cols] -> [tokens][even columns, then odd], cols / 2 each, in the scratch of the call;
 * NULL if there is no memory. */
static float *split_columns(const float *x, int64_t tokens, int64_t cols) {
    const int64_t half = cols / 2;
    float *made = scratch(OF_THE_CALL, (tokens * 2 * half + 1) * sizeof(float));
    for (int64_t t = 0; made && t < tokens; t++, x += cols)
        for (int64_t k = 0; k < half; k++) {
            made[t * 2 * half + k] = x[2 * k];
            made[t * 2 * half + half + k] = x[2 * k + 1];
        }
    return made;
}

#endif
