/* Vectors of ROWS lanes, the same few operations under one name for every instruction set.
 *
 * `ints` are bytes or 32-bit words, `floats` are floats; dot4 and dot8 multiply bytes and add into
 * words (dot4 weights of 4 bits, on AVX2 into 16-bit sums that `widen` turns into words). `product` is
 * that of words of 16 bits. MANY tokens at a time are what the registers hold.
 */
#ifndef OPTIM_CPU_VECTORS_H
#define OPTIM_CPU_VECTORS_H
#include <stdint.h>
#include <string.h>

#include "optim.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#define ROWS 16
#define FLIP 0 /* 8-bit weights stay unsigned */
#define NAME "AVX512-VNNI"
#define MANY 12
#define SUMS_16 0
typedef __m512i ints;
typedef __m512 floats;
INLINE ints load(const void *p) { return _mm512_loadu_si512(p); }
INLINE void save(void *p, ints v) { _mm512_storeu_si512(p, v); }
INLINE ints zeros(void) { return _mm512_setzero_si512(); }
INLINE ints splat(int32_t word) { return _mm512_set1_epi32(word); }
INLINE ints low(ints w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
INLINE ints high(ints w) { return low(_mm512_srli_epi16(w, 4)); }
INLINE ints add(ints a, ints b) { return _mm512_add_epi32(a, b); }
INLINE ints dot4(ints sum, ints w, ints a) { return _mm512_dpbusd_epi32(sum, w, a); }
INLINE ints widen(ints sum) { return sum; }
INLINE ints dot8(ints sum, ints w, ints a) { return _mm512_dpbusd_epi32(sum, w, a); }
#if !defined(__SANITIZE_ADDRESS__) /* which does not look into it */
#define DOT_AT 1
/* dot4 and dot8 with the word at p in all lanes: one instruction, of which gcc makes two. */
INLINE ints dot_at(ints sum, ints w, const int8_t *p) {
    struct four { int8_t of[4]; };
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*(const struct four *)p));
    return sum;
}
#endif
INLINE ints product(ints a, ints b) { /* where the upper halves of a are zero, b's may be anything */
    return _mm512_madd_epi16(_mm512_and_si512(a, _mm512_set1_epi32(0xffff)), b);
}
INLINE floats real(ints v) { return _mm512_cvtepi32_ps(v); }
INLINE floats constant(float v) { return _mm512_set1_ps(v); }
INLINE floats fused(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
INLINE floats sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
INLINE floats load_floats(const float *p) { return _mm512_loadu_ps(p); }
INLINE floats load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
#define HALF_SCALES 1
INLINE floats load_half(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE ints load_bytes(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
INLINE void store(float *p, floats v) { _mm512_storeu_ps(p, v); }

#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define ROWS 8
#define FLIP 0x80 /* 8-bit weights are stored signed: q - 128 */
#define NAME "AVX2"
#define MANY 4
#define SUMS_16 1 /* dot4 adds into 16 bits */
typedef __m256i ints;
typedef __m256 floats;
INLINE ints load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE void save(void *p, ints v) { _mm256_storeu_si256((__m256i *)p, v); }
INLINE ints zeros(void) { return _mm256_setzero_si256(); }
INLINE ints splat(int32_t word) { return _mm256_set1_epi32(word); }
INLINE ints low(ints w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
INLINE ints high(ints w) { return low(_mm256_srli_epi16(w, 4)); }
INLINE ints add(ints a, ints b) { return _mm256_add_epi32(a, b); }
INLINE ints dot4(ints sum, ints w, ints a) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, a));
}
INLINE ints widen(ints sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
INLINE ints dot8(ints sum, ints w, ints a) { /* |w| <= 128 and |a| <= 127: a pair fits */
    return add(sum, widen(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w))));
}
INLINE ints product(ints a, ints b) {
    return _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi32(0xffff)), b);
}
INLINE floats real(ints v) { return _mm256_cvtepi32_ps(v); }
INLINE floats constant(float v) { return _mm256_set1_ps(v); }
INLINE floats fused(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
INLINE floats sub(floats a, floats b) { return _mm256_sub_ps(a, b); }
INLINE floats load_floats(const float *p) { return _mm256_loadu_ps(p); }
INLINE floats load_bf16(const uint16_t *p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
#if defined(__F16C__)
#define HALF_SCALES 1
INLINE floats load_half(const uint16_t *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}
#endif
INLINE ints load_bytes(const uint8_t *p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
}
INLINE void store(float *p, floats v) { _mm256_storeu_ps(p, v); }

#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#define ROWS 4
#define FLIP 0x80
#define NAME "NEON dot product"
#define MANY 8
#define SUMS_16 0
typedef int8x16_t ints;
typedef float32x4_t floats;
INLINE ints load(const void *p) { return vld1q_s8((const int8_t *)p); }
INLINE void save(void *p, ints v) { vst1q_s8((int8_t *)p, v); }
INLINE ints zeros(void) { return vdupq_n_s8(0); }
INLINE ints splat(int32_t word) { return vreinterpretq_s8_s32(vdupq_n_s32(word)); }
INLINE ints low(ints w) { return vandq_s8(w, vdupq_n_s8(15)); }
INLINE ints high(ints w) {
    return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(w), 4));
}
INLINE ints add(ints a, ints b) {
    return vreinterpretq_s8_s32(vaddq_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
INLINE ints dot4(ints sum, ints w, ints a) {
    return vreinterpretq_s8_s32(vdotq_s32(vreinterpretq_s32_s8(sum), w, a));
}
INLINE ints widen(ints sum) { return sum; }
INLINE ints dot8(ints sum, ints w, ints a) { return dot4(sum, w, a); }
INLINE ints product(ints a, ints b) {
    return vreinterpretq_s8_s32(vmulq_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
INLINE floats real(ints v) { return vcvtq_f32_s32(vreinterpretq_s32_s8(v)); }
INLINE floats constant(float v) { return vdupq_n_f32(v); }
INLINE floats fused(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
INLINE floats mul(floats a, floats b) { return vmulq_f32(a, b); }
INLINE floats sub(floats a, floats b) { return vsubq_f32(a, b); }
INLINE floats load_floats(const float *p) { return vld1q_f32(p); }
INLINE floats load_bf16(const uint16_t *p) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}
#define HALF_SCALES 1
INLINE floats load_half(const uint16_t *p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
INLINE ints load_bytes(const uint8_t *p) {
    uint32_t word;
    memcpy(&word, p, 4);
    uint16x8_t wide = vmovl_u8(vcreate_u8(word));
    return vreinterpretq_s8_u32(vmovl_u16(vget_low_u16(wide)));
}
INLINE void store(float *p, floats v) { vst1q_f32(p, v); }

#else
#error "no AVX512-VNNI, AVX2 or NEON dot product"
#endif

INLINE ints splat_at(const int8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return splat(word);
}

#if defined(DOT_AT)
INLINE ints dot4_at(ints sum, ints w, const int8_t *p) { return dot_at(sum, w, p); }
INLINE ints dot8_at(ints sum, ints w, const int8_t *p) { return dot_at(sum, w, p); }
#else
INLINE ints dot4_at(ints sum, ints w, const int8_t *p) { return dot4(sum, w, splat_at(p)); }
INLINE ints dot8_at(ints sum, ints w, const int8_t *p) { return dot8(sum, w, splat_at(p)); }
#endif

#ifndef HALF_SCALES
#define HALF_SCALES 0 /* the CPU cannot convert fp16 itself */
INLINE floats load_half(const uint16_t *p) { return (void)p, constant(0); }
#endif

#endif
