/* y = W x for one token where many x are zero: only the columns of W that matter are read.
 *
 * Weights lie input by input, `[inputs][outputs]`, so a column that is left out is a run of memory
 * that is never touched. What is active is listed once; then a strip of outputs adds up the listed
 * rows, some at a time, in an order that depends on nothing but the list.
 *
 * Weights are float or bf16, x is float; 4-bit weights: skip_int4.c.
 */
#include <math.h>
#include <string.h>

#include "simd_half.h"
#include "parallel.h"

enum { BF16 = 0, FLOAT = 1 };
enum { TILE = 64, STRIP = 2048 };  /* outputs that weights are padded to; outputs at a time */
enum { EACH = 4 };                 /* rows at a time */

typedef struct {
    int64_t kind, inputs, outputs, stride; /* stride: bytes of a row */
    const char *weight;                    /* [inputs][stride] */
    const float *bias;     /* [outputs] or NULL */
} Sparse;

SIZE_OF(Sparse)

typedef struct {
    const Sparse *s;
    const int32_t *rows; /* [count], ascending */
    const float *x;      /* [count] */
    int64_t count;
    float *y;
} Job;

INLINE const char *row_of(const Job *j, const char *base, int64_t i) {
    return base + j->rows[i < j->count ? i : j->count - 1] * j->s->stride;
}

/* EACH rows from i on; past the end the last one times zero. */
INLINE void rows_at(const Job *j, const char *base, int64_t i, const char **row, float *x) {
    for (int r = 0; r < EACH; r++) {
        row[r] = row_of(j, base, i + r);
        x[r] = i + r < j->count ? j->x[i + r] : 0;
    }
}

/* ---- bf16 and float: a strip of outputs stays in the cache, EACH rows are added at a time ---- */

static void bf16_rows(const Job *j, int64_t at, int64_t n, float *out) {
    wide acc[STRIP / 8]; /* even outputs of 16, then odd */
    memset(acc, 0, n * sizeof(float));
    const char *base = j->s->weight + 2 * at;
    for (int64_t i = 0; i < j->count; i += EACH) {
        const char *row[EACH], *later[EACH];
        float x[EACH];
        rows_at(j, base, i, row, x);
        for (int r = 0; r < EACH; r++) later[r] = row_of(j, base, i + EACH + r);
        for (int64_t k = 0; k < n / 16; k++) {
            wide a = acc[2 * k], b = acc[2 * k + 1];
            for (int r = 0; r < EACH; r++) {
                words w;
                __builtin_prefetch(later[r] + 32 * k);
                memcpy(&w, row[r] + 32 * k, sizeof w);
                a += x[r] * (wide)(w << 16);
                b += x[r] * (wide)(w & 0xffff0000u);
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
        rows_at(j, base, i, row, x);
        for (int64_t k = 0; k < n; k += 8) {
            wide a = load_wide(out + k);
            for (int r = 0; r < EACH; r++) a += x[r] * load_wide(row[r] + 4 * k);
            memcpy(out + k, &a, sizeof a);
        }
    }
}

/* The outputs from..end, at most STRIP; weights are padded to whole tiles. */
static void strip(const Job *j, int64_t from, int64_t end) {
    const Sparse *s = j->s;
    const int64_t n = (end - from + TILE - 1) / TILE * TILE;
    float out[STRIP] __attribute__((aligned(32)));
    (s->kind == BF16 ? bf16_rows : float_rows)(j, from, n, out);
    if (s->bias)
        for (int64_t k = from; k < end; k++) out[k - from] += s->bias[k];
    memcpy(j->y + from, out, (end - from) * sizeof(float));
}

static void strips(void *data, int64_t from, int64_t end) {
    for (int64_t at = from; at < end; at += STRIP)
        strip(data, at, at + STRIP < end ? at + STRIP : end);
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
                     Team *team) {
    const int64_t n = s->inputs + 1, each = s->outputs / (2 * threads) / TILE * TILE;
    int32_t *rows = scratch(OF_THE_CALL, n * (sizeof(int32_t) + sizeof(float)));
    if (!rows) return -1;
    float *values = (float *)(rows + n);
    Job job = {s, rows, values, list(x, s->inputs, threshold, rows, values), y};
    share(strips, &job, s->outputs, each < 2 * TILE ? 2 * TILE : each, threads, team);
    return job.count;
}

/* ---- rows that a gate leaves over: y[i] = W[rows[i]] . x, weights [outputs][stride] ---- */

typedef struct {
    const Sparse *s;
    const int32_t *rows;
    const float *x; /* [inputs]; BF16: even ones, then odd */
    float *y;
    int64_t count;
} Dots;

enum { SHARE = 16 }; /* rows a thread takes */

static float dot_float(const float *w, const float *x, int64_t n) {
    wide a = {0}, b = {0};
    int64_t k = 0;
    for (; k + 16 <= n; k += 16) {
        a += load_wide(w + k) * load_wide(x + k);
        b += load_wide(w + k + 8) * load_wide(x + k + 8);
    }
    float y = lane_sum(a + b);
    for (; k < n; k++) y += w[k] * x[k];
    return y;
}

static float dot_bf16(const uint16_t *w, const float *even, const float *odd, int64_t n) {
    wide a = {0}, b = {0};
    int64_t k = 0;
    for (; k + 16 <= n; k += 16) {
        words v;
        memcpy(&v, w + k, sizeof v);
        a += load_wide(even + k / 2) * (wide)(v << 16);
        b += load_wide(odd + k / 2) * (wide)(v & 0xffff0000u);
    }
    float y = lane_sum(a + b);
    for (; k < n; k++) y += from_bf16(w[k]) * (k % 2 ? odd : even)[k / 2];
    return y;
}

static void some_dots(void *data, int64_t from, int64_t end) {
    Dots *j = data;
    const Sparse *s = j->s;
    const float *odd = j->x + (s->inputs + 1) / 2;
    for (int64_t i = from; i < end; i++) {
        const char *row = s->weight + j->rows[i] * s->stride;
        const char *later = s->weight + j->rows[i + 1 < j->count ? i + 1 : i] * s->stride;
        for (int64_t b = 0; b < s->stride; b += 64) __builtin_prefetch(later + b);
        j->y[i] = s->kind == FLOAT ? dot_float((const float *)row, j->x, s->inputs)
                                   : dot_bf16((const uint16_t *)row, j->x, odd, s->inputs);
    }
}

/* h[i] *= W[rows[i]] . x for the listed rows of `up`, held row by row: float or bf16. `room` has
 * inputs + 1 + count numbers. */
static void times_up(const Sparse *up, const float *x, const int32_t *rows, float *h, int64_t count,
                     float *room, int threads, Team *team) {
    const int64_t half = (up->inputs + 1) / 2;
    float *y = room + 2 * half;
    for (int64_t k = 0; k < up->inputs; k++)
        room[up->kind == BF16 ? k / 2 + k % 2 * half : k] = x[k];
    Dots job = {up, rows, room, y, count};
    share(some_dots, &job, count, SHARE, threads, team);
    for (int64_t i = 0; i < count; i++) h[i] *= y[i] + (up->bias ? up->bias[rows[i]] : 0);
}

/* y = down (gate * (up x)), where gate [neurons] is act(gate(x)): neurons whose gate is up to
 * `threshold` in size are not looked at. `up` row by row (float, bf16), `down` input by input.
 * Returns how many were used, -1 if there is no memory. */
int64_t optim_gated(const Sparse *up, const Sparse *down, const float *x, const float *gate,
                    float *y, float threshold, int threads, Team *team) {
    const int64_t n = down->inputs + 1, numbers = 3 * n + up->inputs + 1;
    int32_t *rows = scratch(OF_ITS_CALLER, n * sizeof(int32_t) + numbers * sizeof(float));
    if (!rows) return -1;
    float *h = (float *)(rows + n), *whole = h + n, *room = whole + n;
    const int64_t count = list(gate, down->inputs, threshold, rows, h);
    times_up(up, x, rows, h, count, room, threads, team);
    memset(whole, 0, down->inputs * sizeof(float));
    for (int64_t i = 0; i < count; i++) whole[rows[i]] = h[i];
    return optim_sparse(down, whole, y, 0, threads, team) < 0 ? -1 : count;
}
