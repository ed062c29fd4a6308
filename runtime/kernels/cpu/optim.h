/* What the C kernels know of one another. */
#ifndef OPTIM_CPU_H
#define OPTIM_CPU_H
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define MASK_16(left) ((__mmask16)((left) < 16 ? (1 << (left)) - 1 : 0xffff))
#endif

#define INLINE static inline __attribute__((always_inline))
/* How Python knows that its picture of a structure is as large as C's. */
#define SIZE_OF(type) \
    int64_t optim_sizeof_##type(void) { return sizeof(type); }

/* Rounds `count` activations to 8 bits that share a scale, x = a * peak / 127, halves away from zero;
 * returns the peak, and in `total` the sum of a. Where the peak is no finite, normal number the a are
 * zero, and the scale carries what it is (zero, infinity, NaN) into the sum. A constant count lets
 * the compiler unroll. */
INLINE float round_int8(const float *x, const int64_t count, int8_t *a, int32_t *total) {
#if defined(__AVX512F__)
    __m512i top = _mm512_setzero_si512(), sum = top; /* the order of |x| is that of its bits: */
    for (int64_t i = 0; i < count; i += 16) {        /* NaN ends up on top */
        const __m512i word = _mm512_maskz_loadu_epi32(MASK_16(count - i), x + i);
        top = _mm512_max_epi32(top, _mm512_and_si512(word, _mm512_set1_epi32(INT32_MAX)));
    }
    const int32_t most = _mm512_reduce_max_epi32(top);
#else
    int32_t most = 0, sum = 0;
    for (int64_t i = 0; i < count; i++) {
        int32_t word;
        memcpy(&word, x + i, 4);
        word &= INT32_MAX;
        most = word > most ? word : most;
    }
#endif
    float peak;
    memcpy(&peak, &most, 4);
    const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
#if defined(__AVX512F__)
    for (int64_t i = 0; i < count; i += 16) {
        const __mmask16 mask = MASK_16(count - i), kept = inverse == 0.0f ? 0 : mask;
        const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(kept, x + i), _mm512_set1_ps(inverse));
        const __m512 sign = _mm512_and_ps(v, _mm512_set1_ps(-0.0f));
        const __m512 half = _mm512_or_ps(sign, _mm512_set1_ps(0.5f));
        const __m512i q = _mm512_cvttps_epi32(_mm512_add_ps(v, half));
        sum = _mm512_add_epi32(sum, q);
        if (count - i < 16) /* a store with a mask is slow, and slower to read */
            _mm512_mask_cvtepi32_storeu_epi8(a + i, mask, q);
        else
            _mm_storeu_si128((__m128i *)(a + i), _mm512_cvtepi32_epi8(q));
    }
    *total = _mm512_reduce_add_epi32(sum);
#else
    for (int64_t i = 0; i < count; i++) {
        const float v = inverse == 0.0f ? 0.0f : x[i] * inverse;
        a[i] = (int8_t)(int32_t)(v + (v >= 0 ? 0.5f : -0.5f));
        sum += a[i];
    }
    *total = sum;
#endif
    return peak;
}

/* One packed linear, w4a8.c. */
typedef struct {
    int64_t inputs, outputs;  /* of the layer; memory is padded to whole chunks and blocks */
    int64_t bits, chunk;      /* stored bits: 4 or 8 */
    int64_t chunks, scales;   /* chunks of a row; scales of a row (divides chunks) */
    int64_t scale_type;       /* of scale and offset: 0 float, 1 bf16, 2 fp16 */
    const char *weight;       /* [blocks][cols * bits / 32][ROWS] words */
    const void *scale;        /* [blocks][scales][ROWS] */
    const uint8_t *zero;      /* [blocks][scales][ROWS], NULL: `middle` everywhere */
    const void *offset;       /* in place of zero: w = q * scale + offset; or NULL */
    float middle;
    const float *bias;        /* [blocks][ROWS] or NULL */
} Linear;

/* Tokens rounded for a linear. The first `tiled` lie in tiles, whose tokens stand side by side, a
 * word of 4 inputs each, so that a tile is one stream; the others one after the other. */
typedef struct {
    int64_t tokens, tiled; /* tiled: with those that the last tile lacks, of which nothing is kept */
    int8_t *values;        /* [tokens][chunks * chunk] */
    float *scales;         /* [tokens][chunks] */
    float *shares;         /* sums * scales */
    int32_t *minus;        /* -sums of values */
} Activations;

/* Places `tokens` tokens of up to `columns` inputs, whole chunks, in `memory`, on cache lines;
 * returns how many bytes that takes, also where there is none. */
int64_t optim_activations(Activations *a, int64_t tokens, int64_t columns, char *memory);
/* Token `token` of `x` [tokens][inputs], rounded for `l`. */
void optim_round(const Linear *l, const float *x, Activations *a, int64_t token);
/* Outputs of the blocks from..end of `l`, for all tokens: y [tokens][outputs]. */
void optim_blocks(const Linear *l, const Activations *a, float *y, int64_t from, int64_t end);
int optim_rows(void); /* outputs of a block */
int optim_flip(void); /* what the bits of 8-bit weights are turned by in memory */

/* One linear in 4 bits held input by input, skip_int4.c. */
typedef struct {
    int64_t inputs, outputs, padded; /* outputs, and those padded to 64 */
    int64_t lines;                   /* 64-byte lines of an input in a tile: 128 outputs each */
    int64_t groups, runs;
    const char *weight;        /* [tiles][inputs][64 lines]; the last tile is as narrow as can be */
    const uint16_t *scale;     /* bf16 [tiles][groups][128 lines] */
    const uint8_t *zero;       /* the same, or NULL: 8 */
    const int32_t *starts;     /* [runs + 1]: inputs that are rounded together, at most 64 */
    const int32_t *group_of;   /* [runs] */
    const float *bias;         /* [outputs] or NULL */
    int64_t used, calls;       /* inputs that were read in so many calls */
} Columns;

/* The inputs of one token that are read, in pairs, and in pieces that share a scale. */
typedef struct {
    int32_t *rows;        /* [pairs][2] */
    int16_t *values;      /* [pairs]: two int8 */
    int32_t *from, *group; /* [pieces + 1]: their first pair; [pieces] */
    float *worth, *total; /* [pieces]: what 1 is worth, the sum of the values */
    int64_t pairs, pieces;
} Listed;

int64_t optim_listed_bytes(int64_t inputs);
/* What of `x` [inputs] is above `threshold`, in `memory` of optim_listed_bytes. */
void optim_list(Columns *c, const float *x, float threshold, char *memory, Listed *l);
int64_t optim_lines(const Columns *c); /* the pieces that the outputs come in */
/* Outputs of the lines from..end: y [outputs]. */
void optim_columns(const Columns *c, const Listed *l, float *y, int64_t from, int64_t end);

/* A bf16 matrix in planes, bf12.c. */
typedef struct {
    const uint8_t *low;         /* [rows][cols] */
    const uint8_t *high;        /* [rows][width of cols] */
    const uint8_t *palette;     /* [16] */
    const int32_t *escapes;     /* [rows + 1]: where each row's begin in the next two */
    const int32_t *at;          /* row * cols + column, rising */
    const uint8_t *escaped;     /* the high byte there */
    int64_t rows, cols;
} Planes;

/* One linear of bf16 weights, bf16.c or bf12.c. */
typedef struct {
    int64_t inputs, outputs;
    const uint16_t *weight; /* [outputs][inputs], or NULL */
    const Planes *planes;   /* in its place */
    const float *bias;      /* [outputs] or NULL */
} Dense;

/* Outputs from..end for all tokens: x [tokens][inputs], arranged (bf16.h); y [tokens][outputs]. */
void optim_bf16_products(const Dense *d, const float *x, float *y, int64_t tokens, int64_t from,
                         int64_t end);
void optim_bf12_products(const Dense *d, const float *x, float *y, int64_t tokens, int64_t from,
                         int64_t end);
/* Rows from..end as bf16: out [end - from][cols]. */
void optim_bf12_rows(const Planes *p, int64_t from, int64_t end, uint16_t *out);

/* Keys, or values, of a packed cache (cache/quantized.py). */
typedef struct {
    int64_t bits, capacity;
    uint8_t *codes; /* [rows, capacity, dim * bits / 8] */
    uint16_t *grid; /* bf16 [rows, capacity, 2]: step, low */
} Side;

typedef struct {
    int64_t base; /* positions below it are in the old sides */
    Side old_keys, old_values, keys, values;
} Packed;

/* Attention of one new token a row, step.c. */
typedef struct {
    int64_t batch, heads, kv_heads, dim, rotary; /* rotary: channels that turn, 0 for none */
    int64_t capacity, position, window;          /* window 0: everything is seen */
    int64_t angle_stride;                        /* 0: all rows share cos and sin */
    int64_t half;                                /* keys and values are fp16, not float */
    float scale, cap;                            /* cap 0: none */
    float *qkv;                                  /* [batch, heads + 2 kv, dim], turned in place */
    const float *cos, *sin;                      /* [rotary] a row; sin signed */
    void *keys, *values;                         /* [batch kv, capacity, dim] */
    const Packed *packed;                        /* NULL, or in place of keys and values */
    const int64_t *padding;                      /* [batch] or NULL */
    float *out;                                  /* [batch, heads, dim] */
    float *scratch;                              /* a query head: position + 1 */
} Step;

/* One row of the batch, one key head, the group of query heads that share it; `scores` has room for
 * position + 1 a query head. */
void optim_attend_head(const Step *p, int64_t unit, float *scores);
/* Its parts over a packed cache, attention_quantized.c: rotates q, k and v, and stores the last two; */
void optim_packed_store(const Step *p, int64_t unit, float *q, float *k, float *v);
/* scores [group, position + 1] over the n positions from `first` on; */
void optim_packed_scores(const Step *p, int64_t unit, const float *q, int64_t first, int64_t n,
                         float *scores);
/* out [group, dim], rotated back; uses up the scores. */
void optim_packed_mix(const Step *p, int64_t unit, float *scores, int64_t first, int64_t n,
                      float *out);
/* Attention of many new tokens, attention_prompt.c. */
typedef struct {
    int64_t batch, tokens, heads, kv_heads, dim, rotary; /* rotary: channels that turn, or 0 */
    int64_t capacity, start, window;                     /* window 0: everything is seen */
    int64_t angle_stride;                                /* 0: all rows share cos and sin */
    int64_t half;                                        /* keys and values are fp16, not float */
    float scale, cap;                                    /* cap 0: none */
    float *qkv;                                          /* [batch, tokens, heads + 2 kv, dim] */
    const float *cos, *sin;                              /* [tokens, rotary] a row; sin signed */
    void *keys, *values;                                 /* [batch kv, capacity, dim] */
    const int64_t *padding;                              /* [batch] or NULL */
    float *out;                                          /* [batch, tokens, heads, dim] */
    int *no_memory;                                      /* becomes 1 where there is none */
} Prompt;

/* Turns queries and keys of the tokens from..end of all rows, and puts keys and values in the cache. */
void optim_prompt_store(const Prompt *p, int64_t from, int64_t end);
int64_t optim_prompt_pieces(const Prompt *p); /* that attention comes in, once all are stored */
void optim_prompt_rows(const Prompt *p, int64_t from, int64_t end);

/* y = x / sqrt(mean(x^2) + eps) * weight, for each row of n; y may be x. */
void optim_rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t n,
                    float eps);
/* y = silu(gate) * up, where a row of h is gate and up, n each; tanh: gelu's approximation. */
void optim_swiglu(const float *h, float *y, int64_t rows, int64_t n);
void optim_geglu_tanh(const float *h, float *y, int64_t rows, int64_t n);

#endif
