/* fp16 in memory, float in registers, by the CPU's own conversion; FAST_HALF 0 where it has none. */
#ifndef OPTIM_CPU_HALF_H
#define OPTIM_CPU_HALF_H
#include <stdint.h>

typedef float float8 __attribute__((vector_size(32)));

#if defined(__F16C__)
#include <immintrin.h>
#define FAST_HALF 1
static inline float8 widen8(const uint16_t *x) {
    return (float8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)x));
}
static inline void widen(const uint16_t *x, float *y, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        __builtin_prefetch(x + i + 64);
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    }
    for (; i < n; i++) y[i] = _cvtsh_ss(x[i]);
}
static inline uint16_t narrow(float x) {
    x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
}

#elif defined(__aarch64__)
#include <string.h>
#define FAST_HALF 1
static inline float8 widen8(const uint16_t *x) {
    typedef __fp16 half8 __attribute__((vector_size(16)));
    half8 v;
    memcpy(&v, x, sizeof v);
    return __builtin_convertvector(v, float8);
}
static inline void widen(const uint16_t *x, float *y, int64_t n) {
    const __fp16 *half = (const __fp16 *)x;
    for (int64_t i = 0; i < n; i++) y[i] = half[i];
}
static inline uint16_t narrow(float x) {
    const __fp16 half = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    uint16_t bits;
    memcpy(&bits, &half, 2);
    return bits;
}

#else
#define FAST_HALF 0
static inline float8 widen8(const uint16_t *x) { return (void)x, (float8){0}; }
static inline void widen(const uint16_t *x, float *y, int64_t n) { (void)x, (void)y, (void)n; }
static inline uint16_t narrow(float x) { return (void)x, 0; }
#endif

#endif
