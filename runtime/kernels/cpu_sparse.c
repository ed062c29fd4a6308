/* y = W x for one token where many x are zero: only the columns of W that matter are read.
 *
 * Weights lie input by input, `[inputs][outputs]`, so a column that is left out is a run of memory
 * that is never touched. What is active is listed once; then a strip of outputs adds up the listed
 * rows, some at a time, in an order that depends on nothing but the list.
 *
 *     float, bf16    x in float
 *     int4           two outputs a byte; x in int8, rounded by `chunk` inputs as cpu_w4a8.c does
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { BF16 = 0, FLOAT = 1, INT4 = 4 };
enum { TILE = 64, STRIP = 2048 };  /* outputs that weights are padded to; outputs at a time */
enum { EACH = 4, MANY = 8 };         /* rows at a time; rows of int4 */

typedef float floats __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef int16_t halves __attribute__((vector_size(16)));
typedef uint16_t uhalves __attribute__((vector_size(16)));
typedef uint8_t small __attribute__((vector_size(8)));

typedef struct {
    int64_t kind, inputs, outputs, stride; /* stride: bytes of a row */
    const char *weight;                    /* [inputs][stride] */
    int64_t group, chunk;  /* INT4: inputs that share a scale, and that share x's rounding */
    const uint16_t *scale; /* INT4: bf16 [groups][outputs padded to TILE] */
    const uint8_t *zero;   /* INT4: [groups][padded] or NULL: 8 */
    const int32_t *group_of; /* INT4: first row of each group, [groups + 1] */
    int64_t groups;
    const float *bias;     /* [outputs] or NULL */
} Sparse;

typedef struct {
    const Sparse *s;
    const int32_t *rows; /* [count], ascending */
    const float *x;      /* [count] */
    const int16_t *q;    /* INT4: [count], x rounded */
    const float *step;   /* INT4: [pieces], what one of q is worth */
    const int32_t *from; /* INT4: [pieces + 1]: pieces of one group */
    const int32_t *of;   /* INT4: [pieces]: their group */
    int64_t count, pieces, strip, next;
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

/* ---- int4: pieces of one group, so small that 16 bits hold every sum of theirs ---- */

#if defined(__AVX2__)
/* Where the eight outputs 8b of a tile are, in eighths: bytes are interleaved in halves. */
static const int PLACE[8] = {0, 2, 1, 3, 4, 6, 5, 7};

/* Two rows at once: each 16-bit lane of a sum gets q1 x1 + q2 x2. */
INLINE void two_rows(const char *p, const char *q, __m256i x, __m256i *sum) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i a = _mm256_loadu_si256((const __m256i *)p);
    const __m256i b = _mm256_loadu_si256((const __m256i *)q);
    const __m256i c = _mm256_and_si256(a, low), d = _mm256_and_si256(b, low);
    const __m256i e = _mm256_and_si256(_mm256_srli_epi16(a, 4), low);
    const __m256i f = _mm256_and_si256(_mm256_srli_epi16(b, 4), low);
    sum[0] = _mm256_add_epi16(sum[0], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(c, d), x));
    sum[1] = _mm256_add_epi16(sum[1], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(c, d), x));
    sum[2] = _mm256_add_epi16(sum[2], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(e, f), x));
    sum[3] = _mm256_add_epi16(sum[3], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(e, f), x));
}

static void many_rows(const char **row, const char **later, const int16_t *x, int64_t n,
                      int16_t *sum) {
    __m256i pair[MANY / 2];
    for (int r = 0; r < MANY; r += 2)
        pair[r / 2] = _mm256_set1_epi16((int16_t)((x[r] & 255) | x[r + 1] << 8));
    for (int64_t k = 0; k < n; k += TILE, sum += TILE) {
        __m256i s[4];
        for (int r = 0; r < MANY; r++) __builtin_prefetch(later[r] + k / 2);
        memcpy(s, sum, sizeof s);
        for (int r = 0; r < MANY; r += 2) two_rows(row[r] + k / 2, row[r + 1] + k / 2, pair[r / 2], s);
        memcpy(sum, s, sizeof s);
    }
}
#else
static const int PLACE[8] = {0, 1, 2, 3, 4, 5, 6, 7};

static void many_rows(const char **row, const char **later, const int16_t *x, int64_t n,
                      int16_t *sum) {
    (void)later;
    for (int64_t k = 0; k < n; k += TILE, sum += TILE)
        for (int r = 0; r < MANY; r++) {
            const uint8_t *p = (const uint8_t *)row[r] + k / 2;
            for (int i = 0; i < TILE / 2; i++) {
                sum[i] += (p[i] & 15) * x[r];
                sum[i + TILE / 2] += (p[i] >> 4) * x[r];
            }
        }
}
#endif

static void int4_sum(const Job *j, const char *base, int64_t from, int64_t end, int64_t n,
                     int16_t *sum) {
    memset(sum, 0, n * sizeof(int16_t));
    for (int64_t i = from; i < end; i += MANY) {
        const char *row[MANY], *later[MANY];
        int16_t x[MANY];
        for (int r = 0; r < MANY; r++) {
            row[r] = row_of(j, base, i + r < end ? i + r : i);
            x[r] = i + r < end ? j->q[i + r] : 0;
            later[r] = row_of(j, base, i + MANY + r);
        }
        many_rows(row, later, x, n, sum);
    }
}

/* out += scale * step * (sum - zero * total) */
static void int4_add(const Sparse *s, int64_t at, int64_t n, int64_t group, float step,
                     int16_t total, const int16_t *sum, float *out) {
    const uint16_t *scale = s->scale + group * s->stride * 2 + at;
    const uint8_t *zero = s->zero ? s->zero + group * s->stride * 2 + at : NULL;
    for (int64_t k = 0; k < n; k += 8) {
        halves part, z = {0};
        memcpy(&part, sum + k / TILE * TILE + 8 * PLACE[k % TILE / 8], sizeof part);
        if (zero) {
            small v;
            memcpy(&v, zero + k, sizeof v);
            z = __builtin_convertvector(v, halves);
        } else {
            z += 8;
        }
        uhalves raw;
        memcpy(&raw, scale + k, sizeof raw);
        const floats up = (floats)(__builtin_convertvector(raw, words) << 16) * step;
        const floats y = load(out + k) + __builtin_convertvector(part - z * total, floats) * up;
        memcpy(out + k, &y, sizeof y);
    }
}

static void int4_rows(const Job *j, int64_t at, int64_t n, float *out) {
    int16_t sum[STRIP] __attribute__((aligned(32)));
    const char *base = j->s->weight + at / 2;
    memset(out, 0, n * sizeof(float));
    for (int64_t p = 0; p < j->pieces; p++) {
        int16_t total = 0;
        for (int64_t i = j->from[p]; i < j->from[p + 1]; i++) total += j->q[i];
        int4_sum(j, base, j->from[p], j->from[p + 1], n, sum);
        int4_add(j->s, at, n, j->of[p], j->step[p], total, sum, out);
    }
}

/* Outputs at .. at + strip, `strip` a multiple of TILE; weights are padded to whole tiles. */
static void strip(const Job *j, int64_t at) {
    const Sparse *s = j->s;
    const int64_t left = s->outputs - at, want = left < j->strip ? left : j->strip;
    const int64_t n = (want + TILE - 1) / TILE * TILE;
    float out[STRIP] __attribute__((aligned(32)));
    (s->kind == BF16 ? bf16_rows : s->kind == FLOAT ? float_rows : int4_rows)(j, at, n, out);
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

static float peak_of(const float *x, int64_t n) {
    float peak = 0;
#pragma omp simd reduction(max : peak)
    for (int64_t k = 0; k < n; k++) peak = fabsf(x[k]) > peak ? fabsf(x[k]) : peak;
    return peak;
}

/* x by chunks on a grid of its own, as cpu_w4a8.c rounds it; active rows by pieces of a group. */
static void pieces(const Sparse *s, const float *x, Job *j, int16_t *q, float *step, int32_t *from,
                   int32_t *of) {
    int64_t group = -1, group_end = 0, chunk_end = 0, size = 0, p = -1;
    float inverse = 0, worth = 0;
    for (int64_t i = 0; i < j->count; i++) {
        const int64_t k = j->rows[i];
        int fresh = 0;
        if (k >= chunk_end) {
            const int64_t chunk = k / s->chunk * s->chunk, left = s->inputs - chunk;
            const float peak = peak_of(x + chunk, left < s->chunk ? left : s->chunk);
            chunk_end = chunk + s->chunk, fresh = 1;
            inverse = peak > 0 ? 127 / peak : 0, worth = peak / 127;
        }
        for (; k >= group_end; fresh = 1) group_end = s->group_of[++group + 1];
        const float scaled = j->x[i] * inverse;
        q[i] = (int16_t)(scaled + (scaled < 0 ? -0.5f : 0.5f));
        size += abs(q[i]);
        if (fresh || 15 * size > INT16_MAX) {
            p++, size = abs(q[i]);
            from[p] = (int32_t)i, of[p] = (int32_t)group, step[p] = worth;
        }
    }
    j->pieces = p + 1;
    from[j->pieces] = (int32_t)j->count;
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
        scratch = malloc(n * 24);
        held = scratch ? n : 0;
        if (!scratch) return -1;
    }
    int32_t *rows = (int32_t *)scratch, *from = rows + n, *of = from + n;
    float *values = (float *)(of + n), *step = values + n;
    int16_t *q = (int16_t *)(step + n);
    Job job = {s, rows, values, q, step, from, of, 0, 0, STRIP, 0, y};
    job.count = list(x, s->inputs, threshold, rows, values);
    if (s->kind == INT4) pieces(s, x, &job, q, step, from, of);
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
