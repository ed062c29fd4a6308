/* Attention of one new token over a packed cache (cache/quantized.py), codes read as they are stored.
 *
 * Queries, and the new key and value, are rotated by blockwise Hadamard butterflies; the new ones
 * are rounded to 8 bits and stored. A head's size is a multiple of 16.
 */
#include <math.h>
#include <string.h>

#include "optim.h"
#include "attention_group.h"

SIZE_OF(Side)
SIZE_OF(Packed)

/* By blocks of the largest power of two that divides `dim`. */
static void hadamard(float *x, int64_t dim) {
    const int64_t block = dim & -dim;
    const float norm = 1 / sqrtf(block);
    for (int64_t h = 1; h < block; h *= 2)
        for (int64_t i = 0; i < dim; i += 2 * h)
            for (int64_t j = i; j < i + h; j++) {
                const float a = x[j], b = x[j + h];
                x[j] = a + b;
                x[j + h] = a - b;
            }
    for (int64_t i = 0; i < dim; i++) x[i] *= norm;
}

/* Rounds `x` on its own grid of 256 steps, as position `at` of row `u`. */
static void store_rounded(const Side *s, int64_t u, int64_t at, const float *x, int64_t dim) {
    float low = x[0], high = x[0];
    for (int64_t i = 1; i < dim; i++) low = x[i] < low ? x[i] : low;
    for (int64_t i = 1; i < dim; i++) high = x[i] > high ? x[i] : high;
    uint16_t *grid = s->grid + (u * s->capacity + at) * 2;
    grid[1] = to_bf16(low);
    low = from_bf16(grid[1]);
    grid[0] = to_bf16((high - low) / 255);
    if (!(from_bf16(grid[0]) > 0)) grid[0] = to_bf16(1);
    const float step = from_bf16(grid[0]);
    uint8_t *codes = s->codes + (u * s->capacity + at) * dim;
    for (int64_t i = 0; i < dim; i++) {
        const float code = rintf((x[i] - low) / step);
        codes[i] = code < 0 ? 0 : code > 255 ? 255 : (uint8_t)code;
    }
}

static const uint8_t *line_of(const Side *s, int64_t u, int64_t at, int64_t dim) {
    return s->codes + (u * s->capacity + at) * dim * s->bits / 8;
}

/* scores[g * stride + j] = q[g] . key(from + j), j up to n. */
static void score(const Side *s, int64_t u, int64_t from, int64_t n, int64_t dim, const float *q,
                  int64_t group, float *scores, int64_t stride) {
    const uint8_t *lines = line_of(s, u, from, dim);
    if (s->bits == 8)
        group_scores(q, lines, CODES8, dim, n, group, scores, stride);
    else
        group_scores(q, lines, CODES4, dim, n, group, scores, stride);
    const uint16_t *grid = s->grid + (u * s->capacity + from) * 2;
    for (int64_t g = 0; g < group; g++) {
        float total = 0, *to = scores + g * stride;
        for (int64_t i = 0; i < dim; i++) total += q[g * dim + i];
        for (int64_t j = 0; j < n; j++)
            to[j] = from_bf16(grid[2 * j]) * to[j] + from_bf16(grid[2 * j + 1]) * total;
    }
}

/* out[g] += sum over j of scores[g * stride + j] * value(from + j); uses up the scores. */
static void mix(const Side *s, int64_t u, int64_t from, int64_t n, int64_t dim, float *out,
                int64_t group, float *scores, int64_t stride) {
    const uint16_t *grid = s->grid + (u * s->capacity + from) * 2;
    for (int64_t g = 0; g < group; g++) {
        float lows = 0, *weights = scores + g * stride;
        for (int64_t j = 0; j < n; j++) {
            lows += weights[j] * from_bf16(grid[2 * j + 1]);
            weights[j] *= from_bf16(grid[2 * j]);
        }
        for (int64_t i = 0; i < dim; i++) out[g * dim + i] += lows;
    }
    const uint8_t *lines = line_of(s, u, from, dim);
    if (s->bits == 8)
        group_values(scores, stride, lines, CODES8, dim, n, group, out);
    else
        group_values(scores, stride, lines, CODES4, dim, n, group, out);
}

void optim_packed_store(const Step *p, int64_t u, float *q, float *k, float *v) {
    const int64_t d = p->dim, at = p->position - p->packed->base;
    for (int64_t g = 0; g < p->heads / p->kv_heads; g++) hadamard(q + g * d, d);
    hadamard(k, d);
    hadamard(v, d);
    store_rounded(&p->packed->keys, u, at, k, d);
    store_rounded(&p->packed->values, u, at, v, d);
}

void optim_packed_scores(const Step *p, int64_t u, const float *q, int64_t first, int64_t n,
                         float *scores) {
    const Packed *s = p->packed;
    const int64_t old = s->base > first ? s->base - first : 0, end = p->position + 1;
    const int64_t recent = first > s->base ? first - s->base : 0, group = p->heads / p->kv_heads;
    score(&s->old_keys, u, first, old, p->dim, q, group, scores, end);
    score(&s->keys, u, recent, n - old, p->dim, q, group, scores + old, end);
}

void optim_packed_mix(const Step *p, int64_t u, float *scores, int64_t first, int64_t n,
                      float *out) {
    const Packed *s = p->packed;
    const int64_t old = s->base > first ? s->base - first : 0, end = p->position + 1, d = p->dim;
    const int64_t recent = first > s->base ? first - s->base : 0, group = p->heads / p->kv_heads;
    memset(out, 0, group * d * sizeof(float));
    mix(&s->old_values, u, first, old, d, out, group, scores, end);
    mix(&s->values, u, recent, n - old, d, out, group, scores + old, end);
    for (int64_t g = 0; g < group; g++) hadamard(out + g * d, d);
}
