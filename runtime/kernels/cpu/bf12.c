/* bf12: a bf16's low byte, and 4 bits that name its high byte. The layout: docs/lossless.md.
 *
 * A row's 4-bit names lie in groups of 64 weights: byte j has that of weight j in its low half, that
 * of weight 32 + j in its high half; the last r < 64 weights are halved likewise. So one shuffle
 * looks up 32 high bytes. A product adds up as cpu_bf16 does, the same sums bit for bit, with three
 * quarters of the bytes from memory.
 */
#include "bf16.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

enum { GROUP = 64, EACH = 64, PALETTE = 16 };

typedef struct {
    const uint8_t *low;         /* [rows][cols] */
    const uint8_t *high;        /* [rows][optim_bf12_width(cols)] */
    const uint8_t *palette;     /* [PALETTE] */
    const int32_t *escapes;     /* [rows + 1]: where each row's begin in the next two */
    const int32_t *at;          /* row * cols + column, rising */
    const uint8_t *escaped;     /* the high byte there */
    int64_t rows, cols;
} Planes;

SIZE_OF(Planes)

int64_t optim_bf12_width(int64_t cols) { return cols / GROUP * (GROUP / 2) + (cols % GROUP + 1) / 2; }

/* bytes[256] += how often each high byte comes. */
void optim_bf12_count(const uint16_t *w, int64_t n, int64_t *bytes) {
    static const int64_t PART = 1 << 24;
    for (int64_t from = 0; from < n; from += PART) {
        const int64_t end = from + PART < n ? from + PART : n;
        uint32_t c[8][256] = {{0}};
        int64_t i = from;
        for (; i + 8 <= end; i += 8)
            for (int k = 0; k < 8; k++) c[k][w[i + k] >> 8]++;
        for (; i < end; i++) c[0][w[i] >> 8]++;
        for (int v = 0; v < 256; v++)
            for (int k = 0; k < 8; k++) bytes[v] += c[k][v];
    }
}

/* Rows of weights into planes. name[256]: place in the palette, or PALETTE for an escape, of which
 * `at` (counted from `first`) and `escaped`, which have `room`, get their part. Returns the number of
 * escapes, -1 if there are more. */
int64_t optim_bf12_split(const uint16_t *w, int64_t rows, int64_t cols, const uint8_t *name,
                         uint8_t *low, uint8_t *high, int64_t first, int32_t *at,
                         uint8_t *escaped, int64_t room) {
    const int64_t width = optim_bf12_width(cols);
    int64_t count = 0;
    for (int64_t row = 0; row < rows; row++, w += cols, low += cols, high += width) {
        for (int64_t k = 0; k < cols; k++) low[k] = (uint8_t)w[k];
        int missing = 0;
        for (int64_t k = 0; k < cols; k += GROUP) {
            const int64_t left = cols - k < GROUP ? cols - k : GROUP, half = (left + 1) / 2;
            uint8_t *to = high + k / 2;
            for (int64_t j = 0; j < half; j++) {
                const uint8_t a = name[w[k + j] >> 8];
                const uint8_t b = half + j < left ? name[w[k + half + j] >> 8] : 0;
                missing |= a | b;
                to[j] = (uint8_t)((a & 15) | b << 4);
            }
        }
        for (int64_t k = 0; missing & PALETTE && k < cols; k++)
            if (name[w[k] >> 8] == PALETTE) {
                if (count == room) return -1;
                at[count] = (int32_t)(first + row * cols + k);
                escaped[count++] = (uint8_t)(w[k] >> 8);
            }
    }
    return count;
}

static void tail(const Planes *p, const uint8_t *low, const uint8_t *high, int64_t left,
                 uint16_t *out) {
    const int64_t half = (left + 1) / 2;
    for (int64_t j = 0; j < left; j++) {
        const int name = j < half ? high[j] & 15 : high[j - half] >> 4;
        out[j] = (uint16_t)(low[j] | p->palette[name] << 8);
    }
}

/* Puts the high bytes of the escapes *e.. below `end` (counted as `at` is) into out[0..] = `from`.. */
static inline void patch(const Planes *p, int32_t *e, int32_t last, int64_t from, int64_t end,
                         uint16_t *out) {
    for (; *e < last && p->at[*e] < end; ++*e) {
        uint16_t *w = out + (p->at[*e] - from);
        *w = (uint16_t)((*w & 0xff) | p->escaped[*e] << 8);
    }
}

#ifdef __AVX2__
typedef struct {
    __m256i p, q; /* 16 weights each */
} Pair;

/* unpack works in halves: the middle quarters of names and bytes change places first. */
static inline __m256i apart(const uint8_t *bytes) {
    return _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)bytes), 0xd8);
}

static inline Pair decode_32(__m256i palette, const uint8_t *low, __m256i names) {
    const __m256i l = apart(low), four = _mm256_and_si256(names, _mm256_set1_epi8(15));
    const __m256i h = _mm256_shuffle_epi8(palette, four);
    return (Pair){_mm256_unpacklo_epi8(l, h), _mm256_unpackhi_epi8(l, h)};
}

static inline __m256i table_of(const Planes *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p->palette));
}

static void group(const Planes *p, const uint8_t *low, const uint8_t *high, uint16_t *out) {
    const __m256i names = apart(high), palette = table_of(p);
    const Pair one = decode_32(palette, low, names);
    const Pair two = decode_32(palette, low + 32, _mm256_srli_epi16(names, 4));
    const __m256i all[4] = {one.p, one.q, two.p, two.q};
    memcpy(out, all, sizeof all);
}
#else
static void group(const Planes *p, const uint8_t *low, const uint8_t *high, uint16_t *out) {
    tail(p, low, high, GROUP, out);
}
#endif

static void fetch_ahead(const uint8_t *low, const uint8_t *high) {
    __builtin_prefetch(low + PREFETCH_WEIGHTS);
    __builtin_prefetch(high + PREFETCH_WEIGHTS / 2);
}

static void expand(const Planes *p, int64_t row, uint16_t *out) {
    const int64_t first = row * p->cols;
    const uint8_t *low = p->low + first, *high = p->high + row * optim_bf12_width(p->cols);
    int32_t e = p->escapes[row];
    int64_t k = 0;
    for (; k + GROUP <= p->cols; k += GROUP) {
        fetch_ahead(low + k, high + k / 2);
        group(p, low + k, high + k / 2, out + k);
    }
    tail(p, low + k, high + k / 2, p->cols - k, out + k);
    patch(p, &e, p->escapes[row + 1], first, first + p->cols, out);
}

/* Rows from..end as bf16: out [end - from][cols]. */
void optim_bf12_rows(const Planes *p, int64_t from, int64_t end, uint16_t *out) {
    for (int64_t row = from; row < end; row++) expand(p, row, out + (row - from) * p->cols);
}

typedef struct {
    const Planes *planes;
    const float *x, *split; /* [tokens][cols]; its even columns, then the odd */
    float *y;               /* [tokens][outputs], of which this matrix fills its rows */
    int64_t outputs, tokens, failed;
} Job;

enum { ONCE = 2 }; /* tokens for which a row is decoded once: their sums fit the registers */

/* One row times `n` tokens from `t` on; `room` is for the row, or what is patched of it. */
INLINE void product(const Job *j, int64_t row, int64_t t, const int n, uint16_t *room) {
    const Planes *p = j->planes;
    const int64_t cols = p->cols, half = cols / 2;
    const float *x = j->x + t * cols, *even = j->split + t * 2 * half, *odd = even + half;
    float *y = j->y + t * j->outputs + row;
    Sums s[ONCE] = {{{0}, {0}, {0}, {0}}, {{0}, {0}, {0}, {0}}};
    int64_t k = 0;
#ifdef __AVX2__
    const int64_t first = row * cols;
    const uint8_t *low = p->low + first, *high = p->high + row * optim_bf12_width(cols);
    const __m256i palette = table_of(p);
    const int32_t last = p->escapes[row + 1];
    int32_t e = p->escapes[row];
    for (; k + GROUP <= cols; k += GROUP) {
        const __m256i names = apart(high + k / 2);
        fetch_ahead(low + k, high + k / 2);
        Pair w[2] = {decode_32(palette, low + k, names),
                     decode_32(palette, low + k + 32, _mm256_srli_epi16(names, 4))};
        if (__builtin_expect(e < last && p->at[e] < first + k + GROUP, 0)) {
            memcpy(room, w, sizeof w);
            patch(p, &e, last, first + k, first + k + GROUP, room);
            memcpy(w, room, sizeof w);
        }
        for (int i = 0; i < n; i++)
            for (int part = 0; part < 2; part++) {
                const int64_t at = i * 2 * half + k / 2 + 16 * part;
                add_32(&s[i], (words)w[part].p, (words)w[part].q, even + at, odd + at);
            }
    }
    tail(p, low + k, high + k / 2, cols - k, room);
    patch(p, &e, last, first + k, first + cols, room);
#else
    expand(p, row, room);
#endif
    for (int i = 0; i < n; i++)
        y[i * j->outputs] = rest_of_row(s[i], room, x + i * cols + k, even + i * 2 * half + k / 2,
                                        odd + i * 2 * half + k / 2, cols - k);
}

static void one_output(const Job *j, int64_t row, uint16_t *room) {
    int64_t t = 0;
    for (; t + ONCE <= j->tokens; t += ONCE) product(j, row, t, ONCE, room);
    for (; t < j->tokens; t++) product(j, row, t, 1, room);
}

static void some_rows(void *data, int64_t from, int64_t end) {
    Job *j = data;
    uint16_t *row = scratch(OF_THE_THREAD, (j->planes->cols + GROUP) * sizeof(uint16_t));
    if (!row) __atomic_store_n(&j->failed, 1, __ATOMIC_RELAXED);
    for (int64_t i = from; row && i < end; i++) one_output(j, i, row);
}

/* x [tokens][cols] times the rows of `count` matrices, one after the other: y [tokens][outputs].
 * Returns nonzero if there is no memory. */
int optim_bf12(const Planes *planes, int64_t count, const float *x, float *y, int64_t outputs,
               int64_t tokens, int threads, Team *team) {
    float *split = split_columns(x, tokens, planes->cols);
    int64_t failed = split == NULL;
    for (const Planes *p = planes; !failed && p < planes + count; y += p->rows, p++) {
        Job job = {p, x, split, y, outputs, tokens, 0};
        share(some_rows, &job, p->rows, EACH, threads, team);
        failed = job.failed;
    }
    return (int)failed;
}
