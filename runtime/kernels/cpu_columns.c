/* y = W x for one token with 4-bit weights, where many x are left out and their weights not read.
 *
 * A tile of outputs has its weights input by input, `lines` lines of 64 bytes each: what is left out
 * is a run of memory that is never touched. 128 outputs of an input are a line, 64 outputs half of
 * one, laid out so that the sums below come out in order (cpu_columns.py).
 *
 * Activations: each run of inputs that share a scale, at most 64, becomes int8, x = a * worth. What
 * is active is listed once, in pairs. 16 bits hold the sum of a piece of a run,
 *
 *     y[o] += scale * worth * (sum over the piece of q a - zero * sum a)
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

enum { HALF = 64, LINE = 2 * HALF, RUN = 64, MOST = 64 }; /* outputs; inputs; lines of a tile */

#define INLINE static inline __attribute__((always_inline))

/* ---- what is active ---- */

typedef struct {
    int32_t rows[RUN + 1];
    int8_t values[RUN + 1] __attribute__((aligned(32)));
    int64_t count;
    float worth;
} Active;

/* The inputs from..end above the threshold, rounded as cpu_w4a8.c rounds a chunk. */
static void activate(const float *x, int64_t from, int64_t end, float threshold, Active *a) {
    int32_t top = 0; /* the order of |x| is that of its bits: NaN ends up on top */
    for (int64_t k = from; k < end; k++) {
        int32_t word;
        memcpy(&word, x + k, 4);
        word &= 0x7fffffff;
        top = word > top ? word : top;
    }
    float peak;
    memcpy(&peak, &top, 4);
    const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
    int64_t n = 0;
    for (int64_t k = from; k < end; k++) {
        const float v = x[k] * inverse;
        a->rows[n] = (int32_t)k;
        a->values[n] = (int8_t)(int32_t)(v + (v >= 0 ? 0.5f : -0.5f));
        n += !(fabsf(x[k]) <= threshold); /* what is not a number is kept */
    }
    a->count = n, a->worth = peak / 127.0f;
    memset(a->values + n, 0, sizeof a->values - n);
    a->rows[n] = n ? a->rows[n - 1] : 0; /* an odd one is paired with itself, times zero */
}

static void begin(Listed *l, float worth, int32_t group) {
    const int64_t p = l->pieces++;
    l->from[p] = (int32_t)l->pairs, l->worth[p] = worth, l->group[p] = group;
    l->total[p] = 0;
}

/* Adds a run in pairs; a sum of q a lies between -15 times what is negative and 15 times the rest. */
static void add_run(Listed *l, const Active *a, int32_t group) {
    int positive = 0, negative = 0;
    for (int64_t i = 0; i < a->count; i += 2) {
        const int u = a->values[i], v = a->values[i + 1];
        const int up = (u > 0 ? u : 0) + (v > 0 ? v : 0), down = up - u - v;
        positive += up, negative += down;
        if (!i || 15 * positive > INT16_MAX || 15 * negative > INT16_MAX) {
            begin(l, a->worth, group);
            positive = up, negative = down;
        }
        l->total[l->pieces - 1] += (float)(u + v);
        l->rows[2 * l->pairs] = a->rows[i];
        l->rows[2 * l->pairs + 1] = a->rows[i + 1];
        l->values[l->pairs++] = (int16_t)((u & 255) | v << 8);
    }
}

int64_t optim_listed_bytes(int64_t inputs) { return (inputs + 64) * 32; }

/* What of `x` [inputs] is above `threshold`, in `memory` of optim_listed_bytes. */
void optim_list(Columns *c, const float *x, float threshold, char *memory, Listed *l) {
    const int64_t n = c->inputs + 64;
    *l = (Listed){.rows = (int32_t *)memory};
    l->from = l->rows + 2 * n, l->group = l->from + n;
    l->worth = (float *)(l->group + n), l->total = l->worth + n;
    l->values = (int16_t *)(l->total + n);
    int64_t used = 0;
    for (int64_t r = 0; r < c->runs; r++) {
        Active a;
        activate(x, c->starts[r], c->starts[r + 1], threshold, &a);
        add_run(l, &a, c->group_of[r]);
        used += a.count;
    }
    l->from[l->pieces] = (int32_t)l->pairs;
    c->used += used, c->calls++;
}

/* ---- the weights of what is active ---- */

/* Where the next piece lies, to be fetched line by line in the order of memory. */
typedef struct {
    const char *base;
    const int32_t *row, *end;
    int64_t stride, width, at;
} Ahead;

INLINE void fetch(Ahead *a) {
    if (a->row >= a->end) return;
    __builtin_prefetch(a->base + *a->row * a->stride + a->at);
    a->at += 64;
    const int over = a->at >= a->width;
    a->row += over;
    a->at = over ? 0 : a->at;
}

typedef struct {
    const char *weight;
    const uint16_t *scale;
    const uint8_t *zero;
    int64_t stride; /* bytes between inputs */
} Part;

#if defined(__AVX2__) && defined(__FMA__)
INLINE void add_piece(const Listed *l, int64_t p, Part part, Ahead *ahead, float *out, const int W) {
    const __m256i low = _mm256_set1_epi8(15), none = _mm256_setzero_si256();
    __m256i sum[4 * W];
    for (int i = 0; i < 4 * W; i++) sum[i] = none;
    for (int64_t i = l->from[p]; i < l->from[p + 1]; i++) {
        const char *a = part.weight + l->rows[2 * i] * part.stride;
        const char *b = part.weight + l->rows[2 * i + 1] * part.stride;
        const __m256i x = _mm256_set1_epi16(l->values[i]);
        fetch(ahead);
        if (W == 2) fetch(ahead);
        for (int w = 0; w < W; w++) {
            const __m256i u = _mm256_loadu_si256((const __m256i *)(a + 32 * w));
            const __m256i v = _mm256_loadu_si256((const __m256i *)(b + 32 * w));
            const __m256i m = _mm256_unpacklo_epi8(u, v), n = _mm256_unpackhi_epi8(u, v);
            const __m256i part[4] = {
                _mm256_and_si256(m, low),
                _mm256_and_si256(n, low),
                _mm256_and_si256(_mm256_srli_epi16(m, 4), low),
                _mm256_and_si256(_mm256_srli_epi16(n, 4), low),
            };
            for (int k = 0; k < 4; k++)
                sum[4 * w + k] =
                    _mm256_add_epi16(sum[4 * w + k], _mm256_maddubs_epi16(part[k], x));
        }
    }
    /* a sum in the upper half of 32 bits is 65536 times itself */
    const __m256 worth = _mm256_set1_ps(l->worth[p] / 65536);
    const __m256 total = _mm256_set1_ps(l->total[p] * 65536);
    for (int i = 0; i < 8 * W; i++) {
        const __m256i wide = i % 2 ? _mm256_unpackhi_epi16(none, sum[i / 2])
                                   : _mm256_unpacklo_epi16(none, sum[i / 2]);
        __m256 zero = _mm256_set1_ps(8);
        if (part.zero)
            zero = _mm256_cvtepi32_ps(
                _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(part.zero + 8 * i))));
        const __m256i raw =
            _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(part.scale + 8 * i)));
        const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
        const __m256 sums = _mm256_fnmadd_ps(zero, total, _mm256_cvtepi32_ps(wide));
        const __m256 y = _mm256_loadu_ps(out + 8 * i);
        _mm256_storeu_ps(out + 8 * i, _mm256_fmadd_ps(_mm256_mul_ps(scale, worth), sums, y));
    }
}
#else
/* Which of the 64 outputs of 32 bytes the low or high half of byte b is: see cpu_columns.py. */
INLINE int place(int b, int high) {
    return 32 * high + (b & 8) * 2 + (b & 4) * 2 + (b & 16) / 4 + (b & 3);
}

INLINE void add_piece(const Listed *l, int64_t p, Part part, Ahead *ahead, float *out, const int W) {
    int32_t sum[HALF * 2] = {0};
    for (int64_t i = 2 * (int64_t)l->from[p]; i < 2 * (int64_t)l->from[p + 1]; i++) {
        const uint8_t *row = (const uint8_t *)part.weight + l->rows[i] * part.stride;
        const int16_t both = l->values[i / 2];
        const int x = i % 2 ? both >> 8 : (int8_t)both;
        fetch(ahead);
        for (int w = 0; w < W; w++)
            for (int b = 0; b < 32; b++) {
                sum[HALF * w + place(b, 0)] += x * (row[32 * w + b] & 15);
                sum[HALF * w + place(b, 1)] += x * (row[32 * w + b] >> 4);
            }
    }
    for (int i = 0; i < HALF * W; i++) {
        const uint32_t raw = (uint32_t)part.scale[i] << 16;
        float scale;
        memcpy(&scale, &raw, 4);
        const float zero = part.zero ? part.zero[i] : 8;
        out[i] += scale * l->worth[p] * ((float)sum[i] - zero * l->total[p]);
    }
}
#endif

static void whole_line(const Listed *l, int64_t p, Part part, Ahead *a, float *out) {
    add_piece(l, p, part, a, out, 2);
}

static void half_line(const Listed *l, int64_t p, Part part, Ahead *a, float *out) {
    add_piece(l, p, part, a, out, 1);
}

/* The lines from..end of tile `t`. */
static void some_lines(const Columns *c, const Listed *l, int64_t t, int64_t from, int64_t end,
                       float *y) {
    const int64_t first = t * c->lines * LINE, left = c->padded - first;
    const int64_t width = left < c->lines * LINE ? left : c->lines * LINE;
    const int64_t stop = end * LINE < width ? end * LINE : width;
    const char *weight = c->weight + first / 2 * c->inputs;
    float out[MOST * LINE];
    memset(out, 0, (stop - from * LINE) * sizeof(float));
    for (int64_t p = 0; p < l->pieces; p++) {
        const int64_t next = p + 1 < l->pieces ? l->from[p + 1] : l->pairs;
        const int64_t after = p + 1 < l->pieces ? l->from[p + 2] : l->pairs;
        Ahead ahead = {weight + from * 64, l->rows + 2 * next, l->rows + 2 * after, width / 2,
                       (stop - from * LINE) / 2, 0};
        for (int64_t o = from * LINE; o < stop; o += LINE) {
            const int64_t at = first * c->groups + l->group[p] * width + o;
            const Part part = {weight + o / 2, c->scale + at, c->zero ? c->zero + at : NULL,
                               width / 2};
            (stop - o > HALF ? whole_line : half_line)(l, p, part, &ahead, out + o - from * LINE);
        }
    }
    const int64_t count = c->outputs - first - from * LINE, wanted = stop - from * LINE;
    const int64_t n = count < wanted ? count : wanted;
    y += first + from * LINE;
    if (c->bias)
        for (int64_t i = 0; i < n; i++) out[i] += c->bias[first + from * LINE + i];
    memcpy(y, out, n * sizeof(float));
}

int64_t optim_lines(const Columns *c) { return (c->outputs + LINE - 1) / LINE; }

void optim_columns(const Columns *c, const Listed *l, float *y, int64_t from, int64_t end) {
    for (int64_t at = from; at < end;) {
        const int64_t t = at / c->lines, last = (t + 1) * c->lines < end ? (t + 1) * c->lines : end;
        some_lines(c, l, t, at - t * c->lines, last - t * c->lines, y);
        at = last;
    }
}

typedef struct {
    const Columns *c;
    const Listed *l;
    float *y;
    int64_t each, next;
} Job;

static void lines_task(void *data) {
    Job *j = data;
    const int64_t lines = optim_lines(j->c);
    int64_t from;
    while ((from = __atomic_fetch_add(&j->next, j->each, __ATOMIC_RELAXED)) < lines)
        optim_columns(j->c, j->l, j->y, from, from + j->each < lines ? from + j->each : lines);
}

/* x [inputs] -> y [outputs]; inputs up to `threshold` in size are left out. Returns nonzero if there
 * is no memory. */
int optim_columns_run(Columns *c, const float *x, float *y, float threshold, int threads,
                      Parallel *parallel) {
    static _Thread_local char *scratch;
    static _Thread_local int64_t held;
    if (held < c->inputs) {
        free(scratch);
        scratch = malloc(optim_listed_bytes(c->inputs));
        held = scratch ? c->inputs : 0;
        if (!scratch) return 1;
    }
    Listed listed;
    optim_list(c, x, threshold, scratch, &listed);
    const int64_t lines = optim_lines(c);
    Job job = {c, &listed, y, lines, 0};
    if (parallel && threads > 1 && lines > 1) {
        job.each = (lines + 2 * threads - 1) / (2 * threads);
        parallel(lines_task, &job, threads, 0);
    } else {
        lines_task(&job);
    }
    return 0;
}
