/* Products of a group of query heads with the keys and values that they share.
 *
 * A line (a key, a value) is read and widened once for up to HEADS of them, in vectors that never
 * leave their registers: HEADS x POSITIONS sums of scores, HEADS x COLUMNS vectors of values.
 */
#ifndef OPTIM_CPU_GROUP_H
#define OPTIM_CPU_GROUP_H
#include <stdint.h>
#include <string.h>

#include "optim.h"
#include "simd_half.h"

enum { HEADS = 3, POSITIONS = 4, COLUMNS = 4 };
typedef float quad __attribute__((vector_size(16)));

/* How a line of d numbers lies: as they are, or codes of 8 or 4 bits. A byte of codes of 4 bits has
 * number i low and number i + d / 2 high. */
enum { FLOATS, HALFS, CODES8, CODES4 };

/* Numbers i .. i + WIDE of a line. */
INLINE wide eight(const void *lines, int64_t line, int64_t i, int64_t d, const int kind) {
    const uint8_t *codes = (const uint8_t *)lines + line * d / (kind == CODES4 ? 2 : 1);
    if (kind == FLOATS) return *(const wide_at *)((const float *)lines + line * d + i);
    if (kind == HALFS) return widen8((const uint16_t *)lines + line * d + i);
    if (kind == CODES8) return bytes8(codes + i);
    return i < d / 2 ? lows8(codes + i) : highs8(codes + i - d / 2);
}

/* Lanes 0 and 1, 2 and 3, .. added, of a and b by turns of two. */
INLINE wide pairs(wide a, wide b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
    const lanes even = {0, 2, 8, 10, 4, 6, 12, 14}, odd = {1, 3, 9, 11, 5, 7, 13, 15};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

/* to[0..4] = the sums of the lanes of four vectors. */
INLINE void sums(const wide *v, float *to) {
    const wide c = pairs(pairs(v[0], v[1]), pairs(v[2], v[3]));
    quad low, high;
    memcpy(&low, &c, sizeof low);
    memcpy(&high, (const float *)&c + 4, sizeof high);
    low += high;
    memcpy(to, &low, sizeof low);
}

/* y[h * stride + j] = q[h] . line j, of `heads` heads and `count` lines of d, a multiple of WIDE. */
INLINE void scores_of(const float *q, const void *lines, const int kind, int64_t d, int64_t count,
                      const int heads, float *y, int64_t stride) {
    for (int64_t j = 0; j < count; j += POSITIONS) {
        const int64_t left = count - j < POSITIONS ? count - j : POSITIONS;
        int64_t at[POSITIONS]; /* the last few: one line again */
        for (int p = 0; p < POSITIONS; p++) at[p] = j + (p < left ? p : left - 1);
        wide sum[HEADS][POSITIONS] = {{{0}}};
        for (int64_t i = 0; i < d; i += WIDE) {
#pragma GCC unroll 4
            for (int p = 0; p < POSITIONS; p++) {
                const wide k = eight(lines, at[p], i, d, kind);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++) sum[h][p] += *(const wide_at *)(q + h * d + i) * k;
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            float four[POSITIONS];
            sums(sum[h], four);
            memcpy(y + h * stride + j, four, left * sizeof(float));
        }
    }
}

/* y[h * d ..] += the sum over j of w[h * stride + j] * line j, of columns i .. i + columns * WIDE. */
INLINE void values_of(const float *w, int64_t stride, const void *lines, const int kind, int64_t d,
                      int64_t count, const int heads, const int columns, int64_t i, float *y) {
    wide sum[HEADS][COLUMNS];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) sum[h][c] = *(wide_at *)(y + h * d + i + c * WIDE);
    for (int64_t j = 0; j < count; j++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) {
            const wide v = eight(lines, j, i + c * WIDE, d, kind);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) sum[h][c] += w[h * stride + j] * v;
        }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int c = 0; c < columns; c++) *(wide_at *)(y + h * d + i + c * WIDE) = sum[h][c];
}

/* Both over a group of any size. d is a multiple of WIDE, of 2 * WIDE where codes have 4 bits. */
INLINE void group_scores(const float *q, const void *lines, const int kind, int64_t d,
                         int64_t count, int64_t group, float *y, int64_t stride) {
    for (; group > 0; group -= HEADS, q += HEADS * d, y += HEADS * stride)
        if (group == 1)
            scores_of(q, lines, kind, d, count, 1, y, stride);
        else if (group == 2)
            scores_of(q, lines, kind, d, count, 2, y, stride);
        else
            scores_of(q, lines, kind, d, count, HEADS, y, stride);
}

INLINE void values_in(const float *w, int64_t stride, const void *lines, const int kind, int64_t d,
                      int64_t count, const int heads, float *y) {
    int64_t i = 0;
    for (; i + COLUMNS * WIDE <= d; i += COLUMNS * WIDE)
        values_of(w, stride, lines, kind, d, count, heads, COLUMNS, i, y);
    for (; i < d; i += WIDE) values_of(w, stride, lines, kind, d, count, heads, 1, i, y);
}

INLINE void group_values(const float *w, int64_t stride, const void *lines, const int kind,
                         int64_t d, int64_t count, int64_t group, float *y) {
    for (; group > 0; group -= HEADS, w += HEADS * stride, y += HEADS * d)
        if (group == 1)
            values_in(w, stride, lines, kind, d, count, 1, y);
        else if (group == 2)
            values_in(w, stride, lines, kind, d, count, 2, y);
        else
            values_in(w, stride, lines, kind, d, count, HEADS, y);
}

#endif
