/* Attention of one new token over a packed cache (cache_packed.py), codes read as they are stored.
 *
 * Queries, and the new key and value, are rotated by blockwise Hadamard butterflies; the new ones
 * are rounded to 8 bits and stored. A head's size is a multiple of 16.
 */
#include <string.h>

#include "cpu.h"
#include "cpu_group.h"

typedef struct {
    int64_t bits, capacity;
    uint8_t *codes; /* [rows, capacity, dim * bits / 8] */
    uint16_t *grid; /* bf16 [rows, capacity, 2]: step, low */
} Side;

typedef struct {
    int64_t batch, heads, kv_heads, dim, block, rotary, angle_stride;
    int64_t base, position, window; /* positions below base are in the old sides */
    float scale, cap;
    float *qkv; /* [batch, heads + 2 kv, dim], turned in place */
    const float *cos, *sin;
    const int64_t *padding;
    float *out; /* [batch, heads, dim] */
    Side old_keys, old_values, keys, values;
    float *scratch; /* a query head: position + 1 */
    int64_t next;
} Packed;

static inline float from_bf16(uint16_t x) {
    union { uint32_t i; float f; } two = {(uint32_t)x << 16};
    return two.f;
}

static inline uint16_t to_bf16(float x) { /* to nearest, ties to even */
    union { float f; uint32_t i; } two = {x};
    return (two.i + 0x7FFF + ((two.i >> 16) & 1)) >> 16;
}

static void hadamard(float *x, int64_t dim, int64_t block) {
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
static void put(const Side *s, int64_t u, int64_t at, const float *x, int64_t dim) {
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

/* One row of the batch, one key head, the group of query heads that share it. */
static void unit(const Packed *p, int64_t u) {
    const int64_t row = u / p->kv_heads, kv = u % p->kv_heads, d = p->dim, base = p->base;
    const int64_t group = p->heads / p->kv_heads, end = p->position + 1;
    float *start = p->qkv + row * (p->heads + 2 * p->kv_heads) * d;
    float *q = start + kv * group * d, *k = start + (p->heads + kv) * d, *v = k + p->kv_heads * d;
    const int64_t at = row * p->angle_stride;
    turn_group(q, group, k, d, p->cos + at, p->sin + at, p->rotary);
    for (int64_t g = 0; g < group; g++) hadamard(q + g * d, d, p->block);
    hadamard(k, d, p->block);
    hadamard(v, d, p->block);
    put(&p->keys, u, end - 1 - base, k, d);
    put(&p->values, u, end - 1 - base, v, d);

    const int64_t first = first_seen(end, p->window, p->padding ? p->padding[row] : 0);
    const int64_t old = base > first ? base - first : 0, recent = first > base ? first - base : 0;
    const int64_t n = end - first;
    float *scores = p->scratch + u * group * end, *out = p->out + (row * p->heads + kv * group) * d;
    score(&p->old_keys, u, first, old, d, q, group, scores, end);
    score(&p->keys, u, recent, n - old, d, q, group, scores + old, end);
    float shares[group];
    for (int64_t g = 0; g < group; g++) shares[g] = soften(scores + g * end, n, p->scale, p->cap);
    memset(out, 0, group * d * sizeof(float));
    mix(&p->old_values, u, first, old, d, out, group, scores, end);
    mix(&p->values, u, recent, n - old, d, out, group, scores + old, end);
    for (int64_t i = 0; i < group * d; i++) out[i] *= shares[i / d];
    for (int64_t g = 0; g < group; g++) hadamard(out + g * d, d, p->block);
}

static void units(void *data) {
    Packed *p = data;
    int64_t u;
    while ((u = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->batch * p->kv_heads)
        unit(p, u);
}

/* Returns nonzero if there is no memory. */
int optim_attend_packed(Packed *p, int threads, Parallel *parallel) {
    const int64_t work = p->batch * p->heads * (p->position + 1);
    p->scratch = room_for(work);
    if (!p->scratch) return 1;
    p->next = 0;
    if (parallel && threads > 1 && work > 2048)
        parallel(units, p, threads, 0);
    else
        units(p);
    return 0;
}
