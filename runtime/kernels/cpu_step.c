/* What a decode step does between its linears, in float: RMS norm, and attention of one new token.
 *
 * One call stands for some twenty small operators, whose dispatch costs more than their work.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef void Task(void *);
typedef void Parallel(Task *, void *, unsigned threads, unsigned flags); /* GOMP_parallel */

typedef struct {
    int64_t batch, heads, kv_heads, dim, rotary; /* rotary: channels that turn, 0 for none */
    int64_t capacity, position, window;          /* window 0: everything is seen */
    int64_t angle_stride;                        /* 0: all rows share cos and sin */
    float scale, cap;                            /* cap 0: none */
    float *qkv;                                  /* [batch, heads + 2 kv, dim], turned in place */
    const float *cos, *sin;                      /* [rotary] a row; sin signed */
    float *keys, *values; /* [batch kv, dim, capacity], [batch kv, capacity, dim] */
    const int64_t *padding;                      /* [batch] or NULL */
    float *out;                                  /* [batch, heads, dim] */
    float *scratch;                              /* per unit: group * (position + 1) */
    int64_t next;
} Step;

/* exp for x <= 0: 2^n * e^r with |r| <= ln2 / 2; relative error below 1e-7. */
static inline float expo(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } two = {((int32_t)n + 127) << 23};
    return p * two.f;
}

static void turn(float *x, const float *cos, const float *sin, int64_t r) {
    const int64_t half = r / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] + b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

static void softmax(float *s, int64_t n, float scale, float cap) {
    float top = -INFINITY, sum = 0;
    for (int64_t j = 0; j < n; j++) s[j] *= scale;
    if (cap > 0)
        for (int64_t j = 0; j < n; j++) s[j] = cap * tanhf(s[j] / cap);
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; j++) top = s[j] > top ? s[j] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < n; j++) sum += s[j] = expo(s[j] - top);
    const float inverse = 1 / sum;
    for (int64_t j = 0; j < n; j++) s[j] *= inverse;
}

/* y[0..n] += sum over i of factors[i] * lines[i * stride ..]; eight lines at a time save passes. */
static void add_lines(float *restrict y, int64_t n, const float *lines, int64_t stride,
                      const float *factors, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const float *l = lines + i * stride, *f = factors + i;
        for (int64_t j = 0; j < n; j++)
            y[j] += ((f[0] * l[j] + f[1] * l[j + stride]) +
                     (f[2] * l[j + 2 * stride] + f[3] * l[j + 3 * stride])) +
                    ((f[4] * l[j + 4 * stride] + f[5] * l[j + 5 * stride]) +
                     (f[6] * l[j + 6 * stride] + f[7] * l[j + 7 * stride]));
    }
    for (; i < count; i++)
        for (int64_t j = 0; j < n; j++) y[j] += factors[i] * lines[i * stride + j];
}

/* One row of the batch, one key head, the group of query heads that share it. */
static void unit(Step *p, int64_t u) {
    const int64_t row = u / p->kv_heads, kv = u % p->kv_heads, d = p->dim;
    const int64_t group = p->heads / p->kv_heads, end = p->position + 1;
    float *base = p->qkv + row * (p->heads + 2 * p->kv_heads) * d;
    float *q = base + kv * group * d, *k = base + (p->heads + kv) * d, *v = k + p->kv_heads * d;
    const float *cos = p->cos + row * p->angle_stride, *sin = p->sin + row * p->angle_stride;
    if (p->rotary) {
        for (int64_t g = 0; g < group; g++) turn(q + g * d, cos, sin, p->rotary);
        turn(k, cos, sin, p->rotary);
    }
    float *keys = p->keys + u * d * p->capacity, *values = p->values + u * p->capacity * d;
    for (int64_t i = 0; i < d; i++) keys[i * p->capacity + p->position] = k[i];
    for (int64_t i = 0; i < d; i++) values[p->position * d + i] = v[i];

    int64_t first = p->window && end > p->window ? end - p->window : 0;
    if (p->padding && p->padding[row] > first) first = p->padding[row];
    const int64_t n = end - first;
    for (int64_t g = 0; g < group; g++) {
        float *s = p->scratch + (u * group + g) * end;
        float *o = p->out + (row * p->heads + kv * group + g) * d;
        for (int64_t j = 0; j < n; j++) s[j] = 0;
        add_lines(s, n, keys + first, p->capacity, q + g * d, d);
        softmax(s, n, p->scale, p->cap);
        for (int64_t i = 0; i < d; i++) o[i] = 0;
        add_lines(o, d, values + first * d, d, s, n);
    }
}

static void units(void *data) {
    Step *p = data;
    int64_t u;
    while ((u = __atomic_fetch_add(&p->next, 1, __ATOMIC_RELAXED)) < p->batch * p->kv_heads)
        unit(p, u);
}

/* Returns nonzero if there is no memory. */
int optim_attend(Step *p, int threads, Parallel *parallel) {
    const int64_t work = p->batch * p->heads * (p->position + 1);
    static _Thread_local float *scratch;
    static _Thread_local int64_t held;
    if (held < work) {
        free(scratch);
        scratch = malloc((work + 4096) * sizeof(float));
        held = scratch ? work + 4096 : 0;
        if (!scratch) return 1;
    }
    p->scratch = scratch;
    p->next = 0;
    if (parallel && threads > 1 && work > 2048)
        parallel(units, p, threads, 0);
    else
        units(p);
    return 0;
}

/* y = x / sqrt(mean(x^2) + eps) * weight, for each row of n. */
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

/* y = silu(gate) * up, where a row of h is gate and up, n each. */
void optim_swiglu(const float *h, float *y, int64_t rows, int64_t n) {
    for (int64_t r = 0; r < rows; r++, h += 2 * n, y += n)
        for (int64_t i = 0; i < n; i++) {
            const float x = h[i], e = expo(x > 0 ? -x : x); /* e^-|x| */
            y[i] = x * (x > 0 ? 1 : e) / (1 + e) * h[n + i];
        }
}
