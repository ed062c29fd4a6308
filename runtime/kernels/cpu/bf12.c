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
    Chunk half[2];
} Group;

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
INLINE __m256i table_of(const Planes *p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p->palette));
}

#if LANES == 16
INLINE Chunk decode(__m256i palette, __m256i low, __m256i names) {
    const __m256i four = _mm256_and_si256(names, _mm256_set1_epi8(15));
    const __m512i h = _mm512_cvtepu8_epi16(_mm256_shuffle_epi8(palette, four));
    return (Chunk){{(pairs)_mm512_or_si512(_mm512_cvtepu8_epi16(low), _mm512_slli_epi16(h, 8))}};
}
#else
/* unpack works in halves: the middle quarters of names and bytes change places first. */
INLINE __m256i apart(__m256i bytes) { return _mm256_permute4x64_epi64(bytes, 0xd8); }

INLINE Chunk decode(__m256i palette, __m256i low, __m256i names) {
    const __m256i four = _mm256_and_si256(apart(names), _mm256_set1_epi8(15)), l = apart(low);
    const __m256i h = _mm256_shuffle_epi8(palette, four);
    return (Chunk){{(pairs)_mm256_unpacklo_epi8(l, h), (pairs)_mm256_unpackhi_epi8(l, h)}};
}
#endif

/* GROUP weights. */
INLINE Group group(const Planes *p, const uint8_t *low, const uint8_t *high) {
    const __m256i *l = (const __m256i *)low, palette = table_of(p);
    const __m256i names = _mm256_loadu_si256((const __m256i *)high);
    return (Group){{decode(palette, _mm256_loadu_si256(l), names),
                    decode(palette, _mm256_loadu_si256(l + 1), _mm256_srli_epi16(names, 4))}};
}
#else
INLINE Group group(const Planes *p, const uint8_t *low, const uint8_t *high) {
    uint16_t all[GROUP];
    Group made;
    tail(p, low, high, GROUP, all);
    memcpy(&made, all, sizeof all);
    return made;
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
        const Group all = group(p, low + k, high + k / 2);
        memcpy(out + k, &all, sizeof all);
    }
    tail(p, low + k, high + k / 2, p->cols - k, out + k);
    patch(p, &e, p->escapes[row + 1], first, first + p->cols, out);
}

void optim_bf12_rows(const Planes *p, int64_t from, int64_t end, uint16_t *out) {
    for (int64_t row = from; row < end; row++) expand(p, row, out + (row - from) * p->cols);
}

typedef struct {
    const Dense *of;
    const float *x; /* [tokens][inputs], arranged */
    float *y;       /* [tokens][outputs], of which this matrix fills its rows */
    int64_t outputs, tokens;
} Job;

/* Row `row` times `count` tokens from `first` on: decoded once for all of them. */
INLINE void tile(const Job *j, int64_t row, int64_t first, const int count) {
    const Planes *p = j->of->planes;
    const int64_t cols = p->cols, begin = row * cols;
    const uint8_t *low = p->low + begin, *high = p->high + row * optim_bf12_width(cols);
    const float *x = j->x + first * cols, bias = j->of->bias ? j->of->bias[row] : 0;
    const int32_t last = p->escapes[row + 1];
    int32_t e = p->escapes[row];
    uint16_t some[GROUP];
    Sums s[TOKENS] = {0};
    int64_t k = 0;
    for (; k + GROUP <= cols; k += GROUP) {
        fetch_ahead(low + k, high + k / 2);
        Group w = group(p, low + k, high + k / 2);
        if (__builtin_expect(e < last && p->at[e] < begin + k + GROUP, 0)) {
            memcpy(some, &w, sizeof some);
            patch(p, &e, last, begin + k, begin + k + GROUP, some);
            memcpy(&w, some, sizeof some);
        }
#pragma GCC unroll 8
        for (int m = 0; m < count; m++)
            for (int i = 0; i < 2; i++) add_chunk(s + m, w.half[i], x + m * cols + k + i * CHUNK);
    }
    tail(p, low + k, high + k / 2, cols - k, some);
    patch(p, &e, last, begin + k, begin + cols, some);
    const int more = cols - k >= CHUNK;
    Chunk w = {0};
    if (more) memcpy(&w, some, sizeof w);
#pragma GCC unroll 8
    for (int m = 0; m < count; m++) {
        const float *rest = x + m * cols + k;
        if (more) add_chunk(s + m, w, rest);
        j->y[(first + m) * j->outputs + row] =
            bias + end_of_row(s[m], some + more * CHUNK, rest + more * CHUNK, (cols - k) % CHUNK);
    }
}

static void products(const Job *j, int64_t from, int64_t end) {
    for (int64_t row = from; row < end; row++) EACH_TILE(j->tokens, tile, j, row)
}

void optim_bf12_products(const Dense *d, const float *x, float *y, int64_t tokens, int64_t from,
                         int64_t end) {
    products(&(Job){d, x, y, d->outputs, tokens}, from, end);
}

static void some_rows(void *job, int64_t from, int64_t end) { products(job, from, end); }

/* x [tokens][cols] times the rows of `count` matrices, one after the other: y [tokens][outputs].
 * Returns nonzero if there is no memory. */
int optim_bf12(const Planes *planes, int64_t count, const float *x, float *y, int64_t outputs,
               int64_t tokens, int threads, Team *team) {
    const float *given = arranged(x, tokens, planes->cols);
    if (!given) return 1;
    for (const Planes *p = planes; p < planes + count; y += p->rows, p++) {
        const Dense dense = {.inputs = p->cols, .outputs = p->rows, .planes = p};
        Job job = {&dense, given, y, outputs, tokens};
        share(some_rows, &job, p->rows, EACH, threads, team);
    }
    return 0;
}
