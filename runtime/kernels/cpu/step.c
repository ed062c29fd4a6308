/* What a decode step does between its linears, in float: RMS norm, and attention of one new token.
 *
 * One call stands for some twenty small operators, whose dispatch costs more than their work.
 */
#include <math.h>
#include <string.h>

#include "optim.h"
#include "attention.h"
#include "attention_group.h"
#include "simd_half.h"
#include "parallel.h"

SIZE_OF(Step)

static const void *line_of(const Step *p, const void *from, int64_t u, int64_t at) {
    return (const char *)from + (u * p->capacity + at) * p->dim * (p->half ? 2 : 4);
}

static void store(const Step *p, void *to, int64_t at, const float *x) {
    for (int64_t i = 0; i < p->dim; i++)
        if (p->half)
            ((uint16_t *)to)[at + i] = narrow(x[i]);
        else
            ((float *)to)[at + i] = x[i];
}

static void store_all(const Step *p, int64_t u, const float *k, const float *v) {
    const int64_t last = (u * p->capacity + p->position) * p->dim;
    store(p, p->keys, last, k);
    store(p, p->values, last, v);
}

/* scores[g * end ..] of `group` queries over keys first..first + n. */
static void score(const Step *p, const float *q, int64_t u, int64_t first, int64_t n, int64_t group,
                  float *scores) {
    const void *keys = line_of(p, p->keys, u, first);
    if (p->half)
        group_scores(q, keys, HALFS, p->dim, n, group, scores, p->position + 1);
    else
        group_scores(q, keys, FLOATS, p->dim, n, group, scores, p->position + 1);
}

/* out[g] = the values of positions first..first + n, weighted by scores[g * end ..]. */
static void mix(const Step *p, const float *scores, int64_t u, int64_t first, int64_t n,
                int64_t group, float *out) {
    const void *values = line_of(p, p->values, u, first);
    memset(out, 0, group * p->dim * sizeof(float));
    if (p->half)
        group_values(scores, p->position + 1, values, HALFS, p->dim, n, group, out);
    else
        group_values(scores, p->position + 1, values, FLOATS, p->dim, n, group, out);
}

void optim_attend_head(const Step *p, int64_t u, float *scores) {
    const int64_t row = u / p->kv_heads, kv = u % p->kv_heads, d = p->dim;
    const int64_t group = p->heads / p->kv_heads, end = p->position + 1;
    float *base = p->qkv + row * (p->heads + 2 * p->kv_heads) * d;
    float *q = base + kv * group * d, *k = base + (p->heads + kv) * d, *v = k + p->kv_heads * d;
    const int64_t at = row * p->angle_stride;
    turn_group(q, group, k, d, p->cos + at, p->sin + at, p->rotary);
    if (p->packed)
        optim_packed_store(p, u, q, k, v);
    else
        store_all(p, u, k, v);

    const int64_t first = first_seen(end, p->window, p->padding ? p->padding[row] : 0);
    const int64_t n = end - first;
    float shares[group];
    float *out = p->out + (row * p->heads + kv * group) * d;
    if (p->packed)
        optim_packed_scores(p, u, q, first, n, scores);
    else
        score(p, q, u, first, n, group, scores);
    for (int64_t g = 0; g < group; g++) shares[g] = soften(scores + g * end, n, p->scale, p->cap);
    if (p->packed)
        optim_packed_mix(p, u, scores, first, n, out);
    else
        mix(p, scores, u, first, n, group, out);
    for (int64_t i = 0; i < group * d; i++) out[i] *= shares[i / d];
}

static void units(void *step, int64_t from, int64_t end) {
    const Step *p = step;
    const int64_t each = p->heads / p->kv_heads * (p->position + 1);
    for (int64_t u = from; u < end; u++) optim_attend_head(p, u, p->scratch + u * each);
}

int optim_reads_half(void) { return FAST_HALF; }

/* Returns nonzero if there is no memory. */
int optim_attend(Step *p, int threads, Team *team) {
    const int64_t work = p->batch * p->heads * (p->position + 1);
    p->scratch = scratch(OF_THE_CALL, work * sizeof(float));
    if (!p->scratch) return 1;
    share(units, p, p->batch * p->kv_heads, 1, work > 2048 ? threads : 1, team);
    return 0;
}

void optim_rms_norm(const float *x, const float *weight, float *y, int64_t rows, int64_t n,
                    float eps) {
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
        const float factor = 1 / sqrtf(sum / n + eps);
        for (int64_t i = 0; i < n; i++) y[i] = x[i] * factor * weight[i];
    }
}

static inline float sigmoid(float x) {
    const float e = expo(x > 0 ? -x : x); /* e^-|x| */
    return (x > 0 ? 1 : e) / (1 + e);
}

static inline wide sigmoid8(wide x) {
    const wide e = expo8((wide)((lanes)x | INT32_MIN));
    const lanes positive = x > 0.0f, one = (lanes)((wide){0} + 1.0f);
    return (wide)((one & positive) | ((lanes)e & ~positive)) / (1.0f + e);
}

/* Of tanh-gelu(x) = x * sigmoid(u), u. */
#define TANH_GELU(x) (1.5957691216f * ((x) + 0.044715f * (x) * (x) * (x)))
#define ITSELF(x) (x)

/* y = x * sigmoid(of(x)) * up, row by row, with x and up side by side in h. */
#define GATED(of)                                                                                  \
    for (int64_t r = 0; r < rows; r++, h += 2 * n, y += n) {                                       \
        int64_t i = 0;                                                                             \
        for (; i + WIDE <= n; i += WIDE) {                                                         \
            const wide x = *(const wide_at *)(h + i), up = *(const wide_at *)(h + n + i);          \
            *(wide_at *)(y + i) = x * sigmoid8(of(x)) * up;                                        \
        }                                                                                          \
        for (; i < n; i++) y[i] = h[i] * sigmoid(of(h[i])) * h[n + i];                             \
    }

void optim_swiglu(const float *h, float *y, int64_t rows, int64_t n) { GATED(ITSELF) }

void optim_geglu_tanh(const float *h, float *y, int64_t rows, int64_t n) { GATED(TANH_GELU) }
