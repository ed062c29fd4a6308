/* y = x W^T for bf16 weights as they are stored and float activations: few tokens, all bandwidth.
 *
 * One row after the other: memory answers one stream twice as fast as four.
 */
#include "bf16.h"

enum { EACH = 64 }; /* rows a thread takes */

typedef struct {
    const uint16_t *weight; /* [rows][cols] */
    const float *x;         /* [tokens][cols] */
    float *y;               /* [tokens][rows] */
    int64_t rows, cols, tokens, next;
    float *split; /* [tokens][even columns, then odd], `half` each */
    int64_t half;
} Job;

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

/* Returns nonzero if there is no memory. */
int optim_bf16(const uint16_t *weight, const float *x, float *y, int64_t rows, int64_t cols,
               int64_t tokens, int threads, Parallel *parallel) {
    Job job = {weight, x, y, rows, cols, tokens, 0, split_columns(x, tokens, cols), cols / 2};
    if (!job.split) return 1;
    if (parallel && threads > 1 && rows > EACH)
        parallel(rows_task, &job, threads, 0);
    else
        rows_task(&job);
    free(job.split);
    return 0;
}
