/* Vectors of eight floats, from fp16, bf16 or codes in memory. FAST_HALF 0: the CPU cannot convert
 * fp16 itself. */
#ifndef OPTIM_CPU_HALF_H
#define OPTIM_CPU_HALF_H
#include <stdint.h>
#include <string.h>

#include "optim.h"

enum { WIDE = 8 };
typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef float wide_at __attribute__((vector_size(4 * WIDE), aligned(4), may_alias));
typedef int32_t lanes __attribute__((vector_size(4 * WIDE)));
typedef uint32_t words __attribute__((vector_size(4 * WIDE)));

INLINE wide load_wide(const void *p) {
    wide v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE float lane_sum(wide v) {
    float sum = 0;
    for (int i = 0; i < WIDE; i++) sum += v[i];
    return sum;
}

/* A bf16 is the upper half of a float. */
INLINE float from_bf16(uint16_t x) {
    union { uint32_t i; float f; } two = {(uint32_t)x << 16};
    return two.f;
}

INLINE uint16_t to_bf16(float x) { /* to nearest, ties to even */
    union { float f; uint32_t i; } two = {x};
    return (two.i + 0x7FFF + ((two.i >> 16) & 1)) >> 16;
}

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__F16C__)
#define FAST_HALF 1
static inline wide widen8(const uint16_t *x) {
    return (wide)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
}
static inline uint16_t narrow(float x) {
    x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}

#elif defined(__aarch64__)
#define FAST_HALF 1
static inline wide widen8(const uint16_t *x) {
    typedef __fp16 half8 __attribute__((vector_size(16)));
    half8 v;
    memcpy(&v, x, sizeof v);
    return __builtin_convertvector(v, wide);
}
static inline uint16_t narrow(float x) {
    const __fp16 half = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

#else
#define FAST_HALF 0
static inline wide widen8(const uint16_t *x) { return (void)x, (wide){0}; }
static inline uint16_t narrow(float x) { return (void)x, 0; }
#endif

#if defined(__AVX2__)
static inline __m256i words8(const uint8_t *x) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)x));
}
static inline wide bytes8(const uint8_t *x) { return (wide)_mm256_cvtepi32_ps(words8(x)); }
static inline wide lows8(const uint8_t *x) {
    return (wide)_mm256_cvtepi32_ps(_mm256_and_si256(words8(x), _mm256_set1_epi32(15)));
}
static inline wide highs8(const uint8_t *x) {
    return (wide)_mm256_cvtepi32_ps(_mm256_srli_epi32(words8(x), 4));
}
#else
#define EIGHT(of) (wide){of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7)}
#define BYTE(i) x[i]
#define LOW(i) (x[i] & 15)
#define HIGH(i) (x[i] >> 4)
static inline wide bytes8(const uint8_t *x) { return EIGHT(BYTE); }
static inline wide lows8(const uint8_t *x) { return EIGHT(LOW); }
static inline wide highs8(const uint8_t *x) { return EIGHT(HIGH); }
#endif

#endif
