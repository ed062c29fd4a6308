/* y = W x for one token where many x are zero: only the columns of W that matter are read.
 *
 * Weights lie input by input, `[inputs][outputs]`, so a column that is left out is a run of memory
 * that is never touched. What is active is listed once; then a strip of outputs adds up the listed
 * rows, some at a time, in an order that depends on nothing but the list.
 *
 * Weights are float or bf16, x is float; 4-bit weights: skip_int4.c.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "optim.h"

enum { BF16 = 0, FLOAT = 1 };
enum { TILE = 64, STRIP = 2048 };  /* outputs that weights are padded to; outputs at a time */
enum { EACH = 4 };                 /* rows at a time */

typedef float floats __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));

typedef struct {
    int64_t kind, inputs, outputs, stride; /* stride: bytes of a row */
    const char *weight;                    /* [inputs][stride] */
    const float *bias;     /* [outputs] or NULL */
} Sparse;

typedef struct {
    const Sparse *s;
    const int32_t *rows; /* [count], ascending */
    const float *x;      /* [count] */
    int64_t count, strip, next;
    float *y;
} Job;

#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const void *p) {
    floats v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE const char *row_of(const Job *j, const char *base, int64_t i) {
    return base + j->rows[i < j->count ? i : j->count - 1] * j->s->stride;
}

/* EACH rows from i on; past the end the last one times zero. */
INLINE void take(const Job *j, const char *base, int64_t i, const char **row, float *x) {
    for (int r = 0; r < EACH; r++) {
        row[r] = row_of(j, base, i + r);
        x[r] = i + r < j->count ? j->x[i + r] : 0;
    }
}

/* ---- bf16 and float: a strip of outputs stays in the cache, EACH rows are added at a time ---- */

static void bf16_rows(const Job *j, int64_t at, int64_t n, float *out) {
    floats acc[STRIP / 8]; /* even outputs of 16, then odd */
    memset(acc, 0, n * sizeof(float));
    const char *base = j->s->weight + 2 * at;
    for (int64_t i = 0; i < j->count; i += EACH) {
        const char *row[EACH], *later[EACH];
        float x[EACH];
        take(j, base, i, row, x);
        for (int r = 0; r < EACH; r++) later[r] = row_of(j, base, i + EACH + r);
        for (int64_t k = 0; k < n / 16; k++) {
            floats a = acc[2 * k], b = acc[2 * k + 1];
            for (int r = 0; r < EACH; r++) {
                words w;
                __builtin_prefetch(later[r] + 32 * k);
                memcpy(&w, row[r] + 32 * k, sizeof w);
                a += x[r] * (floats)(w << 16);
                b += x[r] * (floats)(w & 0xffff0000u);
            }
            acc[2 * k] = a, acc[2 * k + 1] = b;
        }
    }
    for (int64_t k = 0; k < n / 16; k++)
        for (int l = 0; l < 8; l++) {
            out[16 * k + 2 * l] = acc[2 * k][l];
            out[16 * k + 2 * l + 1] = acc[2 * k + 1][l];
        }
}

static void float_rows(const Job *j, int64_t at, int64_t n, float *out) {
    memset(out, 0, n * sizeof(float));
    const char *base = j->s->weight + 4 * at;
    for (int64_t i = 0; i < j->count; i += EACH) {
        const char *row[EACH];
        float x[EACH];
        take(j, base, i, row, x);
        for (int64_t k = 0; k < n; k += 8) {
            floats a = load(out + k);
            for (int r = 0; r < EACH; r++) a += x[r] * load(row[r] + 4 * k);
            memcpy(out + k, &a, sizeof a);
        }
    }
}

/* Outputs at .. at + strip, `strip` a multiple of TILE; weights are padded to whole tiles. */
static void strip(const Job *j, int64_t at) {
    const Sparse *s = j->s;
    const int64_t left = s->outputs - at, want = left < j->strip ? left : j->strip;
    const int64_t n = (want + TILE - 1) / TILE * TILE;
    float out[STRIP] __attribute__((aligned(32)));
    (s->kind == BF16 ? bf16_rows : float_rows)(j, at, n, out);
    if (s->bias)
        for (int64_t k = 0; k < want; k++) out[k] += s->bias[at + k];
    memcpy(j->y + at, out, want * sizeof(float));
}

static void strips_task(void *data) {
    Job *j = data;
    int64_t at;
    while ((at = __atomic_fetch_add(&j->next, j->strip, __ATOMIC_RELAXED)) < j->s->outputs)
        strip(j, at);
}

/* ---- what is active ---- */

static int64_t list(const float *x, int64_t n, float threshold, int32_t *rows, float *values) {
    int64_t count = 0;
    for (int64_t k = 0; k < n; k++) {
        rows[count] = (int32_t)k, values[count] = x[k];
        count += !(fabsf(x[k]) <= threshold); /* what is not a number is kept */
    }
    return count;
}

/* x [inputs] -> y [outputs]; inputs up to `threshold` in size are left out. Returns how many were
 * used, -1 if there is no memory. */
int64_t optim_sparse(const Sparse *s, const float *x, float *y, float threshold, int threads,
                     Parallel *parallel) {
    static _Thread_local char *scratch;
    static _Thread_local int64_t held;
    const int64_t n = s->inputs + 1;
    if (held < n) {
        free(scratch);
        scratch = malloc(n * 8);
        held = scratch ? n : 0;
        if (!scratch) return -1;
    }
    int32_t *rows = (int32_t *)scratch;
    float *values = (float *)(rows + n);
    Job job = {s, rows, values, 0, STRIP, 0, y};
    job.count = list(x, s->inputs, threshold, rows, values);
    if (parallel && threads > 1 && s->outputs >= 4 * TILE) {
        const int64_t share = s->outputs / (2 * threads) / TILE * TILE;
        job.strip = share < 2 * TILE ? 2 * TILE : share > STRIP ? STRIP : share;
        parallel(strips_task, &job, threads, 0);
    } else {
        strips_task(&job);
    }
    return job.count;
}

/* ---- rows that a gate leaves over: y[i] = W[rows[i]] . x, weights [outputs][stride] ---- */

typedef struct {
    const Sparse *s;
    const int32_t *rows;
    const float *x; /* [inputs]; BF16: even ones, then odd */
    float *y;
    int64_t count, next;
} Dots;

enum { SHARE = 16 }; /* rows a thread takes */

static float total(floats v) {
    float sum = 0;
    for (int i = 0; i < 8; i++) sum += v[i];
    return sum;
}

static float dot_float(const float *w, const float *x, int64_t n) {
    floats a = {0}, b = {0};
    int64_t k = 0;
    for (; k + 16 <= n; k += 16) {
        a += load(w + k) * load(x + k);
        b += load(w + k + 8) * load(x + k + 8);
    }
    float y = total(a + b);
    for (; k < n; k++) y += w[k] * x[k];
    return y;
}

static float dot_bf16(const uint16_t *w, const float *even, const float *odd, int64_t n) {
    floats a = {0}, b = {0};
    int64_t k = 0;
    for (; k + 16 <= n; k += 16) {
        words v;
        memcpy(&v, w + k, sizeof v);
        a += load(even + k / 2) * (floats)(v << 16);
        b += load(odd + k / 2) * (floats)(v & 0xffff0000u);
    }
    float y = total(a + b);
    for (; k < n; k++) {
        const uint32_t word = (uint32_t)w[k] << 16;
        float value;
        memcpy(&value, &word, 4);
        y += value * (k % 2 ? odd : even)[k / 2];
    }
    return y;
}

static void dots_task(void *data) {
    Dots *j = data;
    const Sparse *s = j->s;
    int64_t from;
    while ((from = __atomic_fetch_add(&j->next, SHARE, __ATOMIC_RELAXED)) < j->count) {
        const int64_t end = from + SHARE < j->count ? from + SHARE : j->count;
        for (int64_t i = from; i < end; i++) {
            const char *row = s->weight + j->rows[i] * s->stride;
            const char *later = s->weight + j->rows[i + 1 < j->count ? i + 1 : i] * s->stride;
            for (int64_t b = 0; b < s->stride; b += 64) __builtin_prefetch(later + b);
            const float *odd = j->x + (s->inputs + 1) / 2;
            j->y[i] = s->kind == FLOAT
                          ? dot_float((const float *)row, j->x, s->inputs)
                          : dot_bf16((const uint16_t *)row, j->x, odd, s->inputs);
        }
    }
}

/* h[i] *= W[rows[i]] . x for the listed rows of `up`, held row by row: float or bf16. */
static int times_up(const Sparse *up, const float *x, const int32_t *rows, float *h, int64_t count,
                    int threads, Parallel *parallel) {
    const int64_t half = (up->inputs + 1) / 2;
    float *scratch = malloc((2 * half + count) * sizeof(float));
    if (!scratch) return 1;
    float *y = scratch + 2 * half;
    for (int64_t k = 0; k < up->inputs; k++)
        scratch[up->kind == BF16 ? k / 2 + k % 2 * half : k] = x[k];
    Dots job = {up, rows, scratch, y, count, 0};
    if (parallel && threads > 1 && count > SHARE)
        parallel(dots_task, &job, threads, 0);
    else
        dots_task(&job);
    for (int64_t i = 0; i < count; i++) h[i] *= y[i] + (up->bias ? up->bias[rows[i]] : 0);
    free(scratch);
    return 0;
}

/* y = down (gate * (up x)), where gate [neurons] is act(gate(x)): neurons whose gate is up to
 * `threshold` in size are not looked at. `up` row by row (float, bf16), `down` input by input.
 * Returns how many were used, -1 if there is no memory. */
int64_t optim_gated(const Sparse *up, const Sparse *down, const float *x, const float *gate,
                    float *y, float threshold, int threads, Parallel *parallel) {
    const int64_t n = down->inputs;
    int32_t *rows = malloc((n + 1) * (sizeof(int32_t) + 2 * sizeof(float)));
    if (!rows) return -1;
    float *h = (float *)(rows + n + 1), *whole = h + n + 1;
    const int64_t count = list(gate, n, threshold, rows, h);
    int64_t used = times_up(up, x, rows, h, count, threads, parallel) ? -1 : count;
    if (used >= 0) {
        memset(whole, 0, n * sizeof(float));
        for (int64_t i = 0; i < count; i++) whole[rows[i]] = h[i];
        if (optim_sparse(down, whole, y, 0, threads, parallel) < 0) used = -1;
    }
    free(rows);
    return used;
}
