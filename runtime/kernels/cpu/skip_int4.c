/* y = W x for one token with 4-bit weights, where many x are left out and their weights not read.
 *
 * A tile of outputs has its weights input by input, `lines` lines of 64 bytes each: what is left
 * out is a run of memory that is never touched. 128 outputs of an input are a line, 64 outputs half of
 * one, laid out so that the sums below come out in order (skip_int4.py).
 *
 * Activations: each run of inputs that share a scale, at most 64, becomes int8, x = a * worth. What
 * is active is listed once, in pairs. 16 bits hold the sum of a piece of a run,
 *
 *     y[o] += scale * worth * (sum over the piece of q a - zero * sum a)
 */
#include <math.h>
#include <string.h>

#include "optim.h"
#include "parallel.h"
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#endif

enum { HALF = 64, LINE = 2 * HALF, MOST = 64 }; /* outputs; lines of a tile */
enum { RUN = 64, PAIRS = 2 };                  /* inputs of a run; pairs that are added at a time */
enum { PREFETCH_BYTES = 16 << 10 }; /* what is asked for so far ahead has come when it is read */

SIZE_OF(Columns)

/* ---- what is active ---- */

typedef struct {
    int32_t rows[RUN + 1];
    int8_t values[RUN + 1];
    int64_t count;
    float worth;
} Active;

/* `count` inputs as w4a8.c rounds a chunk, and whether they are kept. Returns the largest. */
INLINE float rounded(const float *x, const int64_t count, float threshold, int8_t *values,
                     int8_t *kept) {
    for (int64_t k = 0; k < count; k++)
        kept[k] = !(fabsf(x[k]) <= threshold); /* what is not a number is kept */
    int32_t total;
    return round_int8(x, count, values, &total);
}

/* The inputs from..end above the threshold. */
static void activate(const float *x, int64_t from, int64_t end, float threshold, Active *a) {
    int8_t values[RUN], kept[RUN];
    const int64_t count = end - from; /* a constant one lets the compiler unroll */
    const float peak = count == RUN ? rounded(x + from, RUN, threshold, values, kept)
                                    : rounded(x + from, count, threshold, values, kept);
    int64_t n = 0;
    for (int64_t k = 0; k < count; k++) {
        a->rows[n] = (int32_t)(from + k), a->values[n] = values[k];
        n += kept[k];
    }
    a->count = n, a->worth = peak / 127.0f;
    a->rows[n] = n ? a->rows[n - 1] : 0, a->values[n] = 0; /* an odd one's partner: times zero */
}

static void begin(Listed *l, float worth, int32_t group) {
    const int64_t p = l->pieces++;
    l->from[p] = (int32_t)l->pairs, l->worth[p] = worth, l->group[p] = group;
    l->total[p] = 0;
}

/* Adds a run in pairs; a sum of q a lies between -15 times the negative a and 15 times the rest. */
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
        l->values[l->pairs++] = (int16_t)((u & 255) | v * 256);
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
    if (threshold < 0) return; /* everything is read */
    __atomic_fetch_add(&c->used, used, __ATOMIC_RELAXED); /* tokens may be listed side by side */
    __atomic_fetch_add(&c->calls, 1, __ATOMIC_RELAXED);
}

/* ---- the weights of what is active ---- */

/* Some lines of one tile. */
typedef struct {
    const Listed *l;
    const char *weight; /* of the first input */
    int64_t stride;     /* bytes between inputs */
    int64_t halves;     /* half lines to go through */
    int64_t ahead;      /* rows that are fetched ahead */
    const uint16_t *scale;
    const uint8_t *zero;
} Part;

INLINE const char *row(const Part *p, int64_t i) {
    const int64_t last = 2 * p->l->pairs - 1;
    return p->weight + p->l->rows[i < last ? i : last] * p->stride;
}

#if defined(__AVX2__) && defined(__FMA__)
/* Each 16-bit lane of a sum gets x1 q1 + x2 q2: 64 outputs of two inputs. */
INLINE void two_rows(const char *a, const char *b, __m256i x, __m256i *sum) {
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i u = _mm256_loadu_si256((const __m256i *)a);
    const __m256i v = _mm256_loadu_si256((const __m256i *)b);
    const __m256i m = _mm256_unpacklo_epi8(u, v), n = _mm256_unpackhi_epi8(u, v);
    const __m256i q[4] = {
        _mm256_and_si256(m, low),
        _mm256_and_si256(n, low),
        _mm256_and_si256(_mm256_srli_epi16(m, 4), low),
        _mm256_and_si256(_mm256_srli_epi16(n, 4), low),
    };
    for (int k = 0; k < 4; k++) sum[k] = _mm256_add_epi16(sum[k], _mm256_maddubs_epi16(q[k], x));
}

/* COUNT pairs from `i` on; the FIRST of a piece begin its sums and fetch its scales. */
INLINE void add_pairs(const Part *p, int64_t i, int16_t *sums, const int COUNT, const int FIRST) {
    const char *a[PAIRS], *b[PAIRS], *far[2 * PAIRS];
    __m256i x[PAIRS];
    for (int k = 0; k < COUNT; k++) {
        a[k] = row(p, 2 * (i + k)), b[k] = row(p, 2 * (i + k) + 1);
        far[2 * k] = row(p, 2 * (i + k) + p->ahead);
        far[2 * k + 1] = row(p, 2 * (i + k) + 1 + p->ahead);
        x[k] = _mm256_set1_epi16(p->l->values[i + k]);
    }
    for (int64_t h = 0; h < p->halves; h++, sums += HALF) {
        __m256i sum[4];
        for (int k = 0; k < 4; k++)
            sum[k] = FIRST ? _mm256_setzero_si256() : _mm256_load_si256((__m256i *)sums + k);
        if (FIRST) {
            __builtin_prefetch(p->scale + HALF * h);
            __builtin_prefetch(p->scale + HALF * h + 32);
            if (p->zero) __builtin_prefetch(p->zero + HALF * h);
        }
        for (int k = 0; k < 2 * COUNT; k++) __builtin_prefetch(far[k] + 32 * h);
        for (int k = 0; k < COUNT; k++) two_rows(a[k] + 32 * h, b[k] + 32 * h, x[k], sum);
        for (int k = 0; k < 4; k++) _mm256_store_si256((__m256i *)sums + k, sum[k]);
    }
}

static void begin_one(const Part *p, int64_t i, int16_t *sums) { add_pairs(p, i, sums, 1, 1); }
static void begin_two(const Part *p, int64_t i, int16_t *sums) { add_pairs(p, i, sums, 2, 1); }
static void add_one(const Part *p, int64_t i, int16_t *sums) { add_pairs(p, i, sums, 1, 0); }
static void add_two(const Part *p, int64_t i, int16_t *sums) { add_pairs(p, i, sums, 2, 0); }

static void sum_piece(const Part *p, int64_t from, int64_t end, int16_t *sums) {
    (end - from > 1 ? begin_two : begin_one)(p, from, sums);
    for (int64_t i = from + PAIRS; i < end; i += PAIRS)
        (end - i > 1 ? add_two : add_one)(p, i, sums);
}

/* out += scale * worth * (sum - zero * total). A sum in the upper half of 32 bits is 65536 fold. */
static void add_sums(const Part *p, float worth, float total, const int16_t *sums, float *out) {
    const __m256 factor = _mm256_set1_ps(worth / 65536), all = _mm256_set1_ps(total * 65536);
    const __m256i none = _mm256_setzero_si256();
    for (int64_t o = 0; o < HALF * p->halves; o += 8) {
        const __m256i both = _mm256_load_si256((const __m256i *)(sums + o / 16 * 16));
        const __m256i wide =
            o % 16 ? _mm256_unpackhi_epi16(none, both) : _mm256_unpacklo_epi16(none, both);
        __m256 zero = _mm256_set1_ps(8);
        if (p->zero)
            zero = _mm256_cvtepi32_ps(
                _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p->zero + o))));
        const __m256i raw = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p->scale + o)));
        const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(raw, 16));
        const __m256 sum = _mm256_fnmadd_ps(zero, all, _mm256_cvtepi32_ps(wide));
        const __m256 y = _mm256_load_ps(out + o);
        _mm256_store_ps(out + o, _mm256_fmadd_ps(_mm256_mul_ps(scale, factor), sum, y));
    }
}
#else
/* Which of the 64 outputs of 32 bytes the low or high half of byte b is: see skip_int4.py. */
INLINE int place(int b, int high) {
    return 32 * high + (b & 8) * 2 + (b & 4) * 2 + (b & 16) / 4 + (b & 3);
}

static void sum_piece(const Part *p, int64_t from, int64_t end, int16_t *sums) {
    memset(sums, 0, HALF * p->halves * sizeof(int16_t));
    for (int64_t i = 2 * from; i < 2 * end; i++) {
        const uint8_t *w = (const uint8_t *)row(p, i);
        const int16_t both = p->l->values[i / 2];
        const int x = i % 2 ? both >> 8 : (int8_t)both;
        for (int64_t b = 0; b < 32 * p->halves; b++) {
            int16_t *sum = sums + b / 32 * HALF;
            sum[place(b % 32, 0)] += x * (w[b] & 15);
            sum[place(b % 32, 1)] += x * (w[b] >> 4);
        }
    }
}

static void add_sums(const Part *p, float worth, float total, const int16_t *sums, float *out) {
    for (int64_t o = 0; o < HALF * p->halves; o++) {
        const uint32_t raw = (uint32_t)p->scale[o] << 16;
        float scale;
        memcpy(&scale, &raw, 4);
        out[o] += scale * worth * (sums[o] - (p->zero ? p->zero[o] : 8) * total);
    }
}
#endif

/* The lines from..end of tile `t`. */
static void some_lines(const Columns *c, const Listed *l, int64_t t, int64_t from, int64_t end,
                       float *y) {
    float out[MOST * LINE] __attribute__((aligned(32)));
    int16_t sums[MOST * LINE] __attribute__((aligned(32)));
    const int64_t tile = t * c->lines * LINE, left = c->padded - tile;
    const int64_t width = left < c->lines * LINE ? left : c->lines * LINE;
    const int64_t first = from * LINE, stop = end * LINE < width ? end * LINE : width;
    Part part = {.l = l, .stride = width / 2, .halves = (stop - first) / HALF};
    part.weight = c->weight + tile / 2 * c->inputs + first / 2;
    part.ahead = PREFETCH_BYTES / ((stop - first) / 2) + 1;
    memset(out, 0, (stop - first) * sizeof(float));
    for (int64_t p = 0; p < l->pieces; p++) {
        const int64_t at = tile * c->groups + l->group[p] * width + first;
        part.scale = c->scale + at, part.zero = c->zero ? c->zero + at : NULL;
        sum_piece(&part, l->from[p], l->from[p + 1], sums);
        add_sums(&part, l->worth[p], l->total[p], sums, out);
    }
    const int64_t start = tile + first, some = c->outputs - start;
    const int64_t n = some < stop - first ? some : stop - first;
    if (c->bias)
        for (int64_t i = 0; i < n; i++) out[i] += c->bias[start + i];
    memcpy(y + start, out, n * sizeof(float));
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
} Job;

static void lines_of(void *data, int64_t from, int64_t end) {
    Job *j = data;
    optim_columns(j->c, j->l, j->y, from, end);
}

/* x [tokens, inputs] -> y [tokens, outputs]; inputs up to `threshold` in size are left out. Returns
 * nonzero if there is no memory. */
int optim_columns_run(Columns *c, const float *x, float *y, int64_t tokens, float threshold,
                      int threads, Team *team) {
    char *memory = scratch(OF_THE_CALL, optim_listed_bytes(c->inputs));
    if (!memory) return 1;
    const int64_t lines = optim_lines(c);
    for (int64_t t = 0; t < tokens; t++) {
        Listed listed;
        optim_list(c, x + t * c->inputs, threshold, memory, &listed);
        Job job = {c, &listed, y + t * c->outputs};
        share(lines_of, &job, lines, (lines + 2 * threads - 1) / (2 * threads), threads, team);
    }
    return 0;
}
