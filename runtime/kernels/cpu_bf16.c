/* y = x W^T for bf16 weights as they are stored and float activations: few tokens, all bandwidth.
 *
 * A bf16 is the upper half of a float, so widening is a shift; sums are float. Four rows at a time
 * share the loads of x and keep four streams of memory open. The compiler makes the vectors.
 */
#include <stdint.h>
#include <string.h>

typedef struct {
    const uint16_t *weight; /* [rows][cols] */
    const float *x;         /* [tokens][cols] */
    float *y;               /* [tokens][rows] */
    int64_t rows, cols, tokens, next;
} Job;

typedef void Task(void *);
typedef void Parallel(Task *, void *, unsigned threads, unsigned flags); /* GOMP_parallel */

enum { EACH = 64 }; /* rows a thread takes at a time */

static inline float widen(uint16_t half) {
    uint32_t word = (uint32_t)half << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static void four_rows(const uint16_t *w, const float *x, int64_t cols, float *out) {
    const uint16_t *u = w + cols, *v = u + cols, *z = v + cols;
    float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int64_t k = 0; k < cols; k++) {
        a += x[k] * widen(w[k]);
        b += x[k] * widen(u[k]);
        c += x[k] * widen(v[k]);
        d += x[k] * widen(z[k]);
    }
    out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

static float one_row(const uint16_t *w, const float *x, int64_t cols) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < cols; k++) sum += x[k] * widen(w[k]);
    return sum;
}

static void rows_task(void *data) {
    Job *j = data;
    int64_t from;
    while ((from = __atomic_fetch_add(&j->next, EACH, __ATOMIC_RELAXED)) < j->rows) {
        int64_t end = from + EACH < j->rows ? from + EACH : j->rows, row = from;
        for (; row + 4 <= end; row += 4)
            for (int64_t t = 0; t < j->tokens; t++)
                four_rows(j->weight + row * j->cols, j->x + t * j->cols, j->cols,
                          j->y + t * j->rows + row);
        for (; row < end; row++)
            for (int64_t t = 0; t < j->tokens; t++)
                j->y[t * j->rows + row] =
                    one_row(j->weight + row * j->cols, j->x + t * j->cols, j->cols);
    }
}

void optim_bf16(const uint16_t *weight, const float *x, float *y, int64_t rows, int64_t cols,
                int64_t tokens, int threads, Parallel *parallel) {
    Job job = {weight, x, y, rows, cols, tokens, 0};
    if (parallel && threads > 1 && rows > EACH)
        parallel(rows_task, &job, threads, 0);
    else
        rows_task(&job);
}
