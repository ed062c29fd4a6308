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
    int64_t rows, cols, tokens;
    float *split; /* [tokens][even columns, then odd], `half` each */
    int64_t half;
} Job;

static void some_rows(void *data, int64_t from, int64_t end) {
    Job *j = data;
    for (int64_t row = from; row < end; row++)
        for (int64_t t = 0; t < j->tokens; t++) {
            const float *even = j->split + t * 2 * j->half;
            j->y[t * j->rows + row] = one_row(j->weight + row * j->cols, j->x + t * j->cols, even,
                                              even + j->half, j->cols);
        }
}

/* Returns nonzero if there is no memory. */
int optim_bf16(const uint16_t *weight, const float *x, float *y, int64_t rows, int64_t cols,
               int64_t tokens, int threads, Team *team) {
    Job job = {weight, x, y, rows, cols, tokens, split_columns(x, tokens, cols), cols / 2};
    if (!job.split) return 1;
    share(some_rows, &job, rows, EACH, threads, team);
    return 0;
}
