/* y = x W^T for bf16 weights as they are stored and float activations: few tokens, all bandwidth.
 *
 * A bf16 is the upper half of a float. A 32-bit word has two of them: shifted up it is the first,
 * masked the second, so x is split into even and odd columns once. One row after the other: memory
 * answers one stream twice as fast as four. Sums are float.
 */
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

typedef struct {
    const uint16_t *weight; /* [rows][cols] */
    const float *x;         /* [tokens][cols] */
    float *y;               /* [tokens][rows] */
    int64_t rows, cols, tokens, next;
    float *split; /* [tokens][even columns, then odd], `half` each */
    int64_t half;
} Job;

enum { EACH = 64, LANES = 8, AHEAD = 1024 }; /* rows a thread takes; elements asked for early */
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

static float widen(uint16_t half) {
    const uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static float total(floats v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}

static inline __attribute__((always_inline)) floats times(const float *x, words w) {
    floats v;
    memcpy(&v, x, sizeof v);
    return v * (floats)w;
}

static float one_row(const uint16_t *w, const float *x, const float *even, const float *odd,
                     int64_t cols) {
    const int64_t step = 4 * LANES, whole = cols - cols % step;
    floats a = {0}, b = {0}, c = {0}, d = {0};
    for (int64_t k = 0; k < whole; k += step) {
        words p, q;
        memcpy(&p, w + k, sizeof p);
        memcpy(&q, w + k + 2 * LANES, sizeof q);
        __builtin_prefetch(w + k + AHEAD);
        a += times(even + k / 2, p << 16);
        b += times(odd + k / 2, p & 0xffff0000u);
        c += times(even + k / 2 + LANES, q << 16);
        d += times(odd + k / 2 + LANES, q & 0xffff0000u);
    }
    float y = total((a + b) + (c + d));
    for (int64_t k = whole; k < cols; k++) y += x[k] * widen(w[k]);
    return y;
}

static void rows_task(void *data) {
    Job *j = data;
    int64_t from;
    while ((from = __atomic_fetch_add(&j->next, EACH, __ATOMIC_RELAXED)) < j->rows) {
        const int64_t end = from + EACH < j->rows ? from + EACH : j->rows;
        for (int64_t row = from; row < end; row++)
            for (int64_t t = 0; t < j->tokens; t++) {
                const float *even = j->split + t * 2 * j->half;
                j->y[t * j->rows + row] = one_row(j->weight + row * j->cols, j->x + t * j->cols,
                                                  even, even + j->half, j->cols);
            }
    }
}

static void split(Job *j) {
    for (int64_t t = 0; t < j->tokens; t++) {
        const float *x = j->x + t * j->cols;
        float *even = j->split + t * 2 * j->half, *odd = even + j->half;
        for (int64_t k = 0; k < j->half; k++) even[k] = x[2 * k], odd[k] = x[2 * k + 1];
    }
}

/* Returns nonzero if there is no memory. */
int optim_bf16(const uint16_t *weight, const float *x, float *y, int64_t rows, int64_t cols,
               int64_t tokens, int threads, Parallel *parallel) {
    Job job = {weight, x, y, rows, cols, tokens, 0, NULL, cols / 2};
    job.split = malloc((tokens * 2 * job.half + 1) * sizeof(float));
    if (!job.split) return 1;
    split(&job);
    if (parallel && threads > 1 && rows > EACH)
        parallel(rows_task, &job, threads, 0);
    else
        rows_task(&job);
    free(job.split);
    return 0;
}
