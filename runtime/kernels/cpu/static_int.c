/* Static integers on a CPU: nibbles times codes, exactly, in 32-bit sums.
 *
 * A row has H bytes; byte b holds column b in its low and column b + H in its high nibble, unsigned,
 * so that 32 bytes meet codes b.. and H + b.. with nothing rearranged. u * code pairs are at most
 * 2 * 15 * 128 = 3840: four bytes' worth of them, low and high, stay within 16 bits.
 *
 *     out[m][n] = sum_k u[n][k] codes[m][k] - 8 sums[m]
 */
#include "optim.h"
#include "parallel.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { MOST = 4 };  /* tokens at a time: the nibbles of a row are spread once for all of them */
enum { EACH = 64 }; /* rows a thread takes */

typedef struct {
    const uint8_t *packed;
    const int8_t *codes;
    const int32_t *sums;
    float *out;
    int64_t tokens, outputs, half;
} Job;

const char *optim_static_name(void) {
#if defined(__AVX2__)
    return "AVX2, 8-bit pairs";
#else
    return "plain C";
#endif
}

static int64_t tail(const uint8_t *w, const int8_t *low, const int8_t *high, int64_t from, int64_t end) {
    int64_t total = 0;
    for (int64_t b = from; b < end; b++) total += (w[b] & 15) * low[b] + (w[b] >> 4) * high[b];
    return total;
}

#if defined(__AVX2__)
static inline int32_t across(__m256i v) {
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
#endif

static inline void one_row(const Job *j, int64_t n, int64_t m, const int count) {
    const int64_t half = j->half;
    const uint8_t *w = j->packed + n * half;
    int64_t done = 0, totals[MOST] = {0};
#if defined(__AVX2__)
    const __m256i mask = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i acc[MOST];
    for (int t = 0; t < count; t++) acc[t] = _mm256_setzero_si256();
    for (; done + 32 <= half; done += 32) {
        __m256i both = _mm256_loadu_si256((const __m256i *)(w + done));
        __m256i low = _mm256_and_si256(both, mask);
        __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
        for (int t = 0; t < count; t++) {
            const int8_t *q = j->codes + (m + t) * 2 * half + done;
            __m256i a = _mm256_maddubs_epi16(low, _mm256_loadu_si256((const __m256i *)q));
            __m256i b = _mm256_maddubs_epi16(high, _mm256_loadu_si256((const __m256i *)(q + half)));
            acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(_mm256_add_epi16(a, b), ones));
        }
    }
    for (int t = 0; t < count; t++) totals[t] = across(acc[t]);
#endif
    for (int t = 0; t < count; t++) {
        const int8_t *q = j->codes + (m + t) * 2 * half;
        const int64_t sum = totals[t] + tail(w, q, q + half, done, half);
        j->out[(m + t) * j->outputs + n] = (float)(sum - 8 * (int64_t)j->sums[m + t]);
    }
}

static void some_rows(void *data, int64_t from, int64_t end) {
    Job *j = data;
    for (int64_t m = 0; m < j->tokens; m += MOST)
        for (int64_t n = from; n < end; n++) switch (j->tokens - m) {
            case 1: one_row(j, n, m, 1); break;
            case 2: one_row(j, n, m, 2); break;
            case 3: one_row(j, n, m, 3); break;
            default: one_row(j, n, m, MOST);
        }
}

void optim_static(const uint8_t *packed, const int8_t *codes, const int32_t *sums, float *out,
                  int64_t tokens, int64_t outputs, int64_t half, int threads, Team *team) {
    Job job = {packed, codes, sums, out, tokens, outputs, half};
    share(some_rows, &job, outputs, EACH, threads, team);
}
