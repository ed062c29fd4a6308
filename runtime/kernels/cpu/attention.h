/* What attention in C is made of: exp, the rotation of a head, softmax, sums. */
#ifndef OPTIM_CPU_ATTENTION_H
#define OPTIM_CPU_ATTENTION_H
#include <math.h>
#include <stdint.h>

#include "simd_half.h"

/* exp for x <= 0: 2^n * e^r with |r| <= ln2 / 2; relative error below 1e-7. */
static inline float expo(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { uint32_t i; float f; } two = {((uint32_t)(int32_t)n + 127) << 23};
    return p * two.f;
}

/* The same, eight at a time. The float 1.5 * 2^23 + n has n in its lowest bits. */
static inline wide expo8(wide x) {
    const wide least = (wide){0} - 87.0f;
    const lanes small = x < least;
    x = (wide)(((lanes)x & ~small) | ((lanes)least & small));
    const wide shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    const wide r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    wide p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (wide)(((lanes)shifted + (127 - 0x4B400000)) << 23);
}

static inline void turn(float *x, const float *cos, const float *sin, int64_t r) {
    const int64_t half = r / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cos[i] + b * sin[i];
        x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

/* The `group` query heads at `q` and the key they share, if the model has angles. */
static inline void turn_group(float *q, int64_t group, float *k, int64_t d, const float *cos,
                              const float *sin, int64_t r) {
    if (!r) return;
    for (int64_t g = 0; g < group; g++) turn(q + g * d, cos, sin, r);
    turn(k, cos, sin, r);
}

/* The first position that the last of `end` sees, `padding` positions being none. */
static inline int64_t first_seen(int64_t end, int64_t window, int64_t padding) {
    const int64_t first = window && end > window ? end - window : 0;
    return padding > first ? padding : first;
}

/* s[j] becomes e^(scale * s[j] - the largest of them), capped first; returns 1 / their sum. */
static inline float soften(float *s, int64_t n, float scale, float cap) {
    float top = -INFINITY, sum = 0;
    if (cap > 0) {
        for (int64_t j = 0; j < n; j++) s[j] = cap * tanhf(s[j] * scale / cap);
        scale = 1;
    }
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; j++) top = s[j] > top ? s[j] : top;
    wide total = {0};
    int64_t j = 0;
    for (; j + WIDE <= n; j += WIDE) {
        wide_at *to = (wide_at *)(s + j);
        *to = expo8((*to - top) * scale);
        total += *to;
    }
    for (int i = 0; i < WIDE; i++) sum += total[i];
    for (; j < n; j++) sum += s[j] = expo((s[j] - top) * scale);
    return 1 / sum;
}

#endif
