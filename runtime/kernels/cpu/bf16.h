/* Rows of bf16 weights times float vectors, the same sums in the same order for every kernel.
 *
 * A 32-bit word has two bf16: shifted up it is the first as a float, masked the second. So each chunk
 * of 32 inputs is arranged once as its 16 even ones, then its 16 odd ones. Sums are float.
 */
#ifndef OPTIM_CPU_BF16_H
#define OPTIM_CPU_BF16_H
#include "simd_half.h"
#include "parallel.h"

enum { CHUNK = 32, PREFETCH_WEIGHTS = 1024 }; /* what is asked for so far ahead has come when read */
#if defined(__AVX512BW__)
#define LANES 16
enum { TOKENS = 8 }; /* whose sums the registers hold */
#else
#define LANES 8
enum { TOKENS = 2 };
#endif
enum { PARTS = 16 / LANES };
typedef float strip __attribute__((vector_size(4 * LANES)));
typedef uint32_t pairs __attribute__((vector_size(4 * LANES)));

typedef struct {
    pairs part[PARTS];
} Chunk; /* 32 weights */

typedef struct {
    strip even[PARTS], odd[PARTS];
} Sums;

INLINE strip load_strip(const float *x) {
    strip v;
    memcpy(&v, x, sizeof v);
    return v;
}

/* `x`: the chunk's inputs, arranged. */
INLINE void add_chunk(Sums *s, Chunk w, const float *x) {
    for (int i = 0; i < PARTS; i++) {
        s->even[i] += load_strip(x + i * LANES) * (strip)(w.part[i] << 16);
        s->odd[i] += load_strip(x + 16 + i * LANES) * (strip)(w.part[i] & 0xffff0000u);
    }
}

/* The sum of a row whose last `count` weights, less than a chunk, are `w`. */
INLINE float end_of_row(Sums s, const uint16_t *w, const float *x, int64_t count) {
    strip sum[PARTS];
    wide half[2];
    for (int i = 0; i < PARTS; i++) sum[i] = s.even[i] + s.odd[i];
    memcpy(half, sum, sizeof half);
    float y = lane_sum(half[0] + half[1]);
    for (int64_t k = 0; k < count; k++) y += x[k] * from_bf16(w[k]);
    return y;
}

/* `x` [cols] arranged, in `to`, which may be `x`. */
static inline void arrange(const float *x, float *to, int64_t cols) {
    const int64_t whole = cols - cols % CHUNK;
    for (int64_t k = 0; k < whole; k += CHUNK) {
        float chunk[CHUNK];
        memcpy(chunk, x + k, sizeof chunk);
        for (int i = 0; i < CHUNK / 2; i++) {
            to[k + i] = chunk[2 * i];
            to[k + CHUNK / 2 + i] = chunk[2 * i + 1];
        }
    }
    memmove(to + whole, x + whole, (cols - whole) * sizeof(float));
}

/* x [tokens][cols], arranged, in the scratch of the call; NULL if there is no memory. */
static inline float *arranged(const float *x, int64_t tokens, int64_t cols) {
    float *made = scratch(OF_THE_CALL, tokens * cols * sizeof(float));
    for (int64_t t = 0; made && t < tokens; t++) arrange(x + t * cols, made + t * cols, cols);
    return made;
}

/* Calls of `tile` for all `tokens`, TOKENS at a time: `count` is a constant in each. */
#define EACH_TILE(tokens, tile, ...)                                    \
    for (int64_t t = 0; t < (tokens); t += TOKENS) switch ((tokens) - t) { \
        case 1: tile(__VA_ARGS__, t, 1); break;                         \
        case 2: tile(__VA_ARGS__, t, 2); break;                         \
        case 3: tile(__VA_ARGS__, t, TOKENS < 3 ? TOKENS : 3); break;   \
        case 4: tile(__VA_ARGS__, t, TOKENS < 4 ? TOKENS : 4); break;   \
        case 5: tile(__VA_ARGS__, t, TOKENS < 5 ? TOKENS : 5); break;   \
        case 6: tile(__VA_ARGS__, t, TOKENS < 6 ? TOKENS : 6); break;   \
        case 7: tile(__VA_ARGS__, t, TOKENS < 7 ? TOKENS : 7); break;   \
        default: tile(__VA_ARGS__, t, TOKENS);                          \
        }

#endif
