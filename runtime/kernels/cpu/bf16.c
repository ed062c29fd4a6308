/* y = x W^T for bf16 weights as they are stored and float activations: few tokens, all bandwidth.
 *
 * One row after the other: memory answers one stream twice as fast as four. A row is widened once for
 * a tile of tokens, each of which gets the sums of `one_row` in the same order.
 */
#include "bf16.h"

enum { EACH = 64 }; /* rows a thread takes */
#if defined(__AVX512VL__)
enum { MOST = 4 }; /* tokens at a time: what the registers hold */
#else
enum { MOST = 2 };
#endif

typedef struct {
    const uint16_t *weight; /* [rows][cols] */
    const float *x;         /* [tokens][cols] */
    float *y;               /* [tokens][rows] */
    int64_t rows, cols, tokens;
    float *split; /* [tokens][even columns, then odd], `half` each */
    int64_t half;
} Job;

/* Row `row` times COUNT tokens from `first` on. */
INLINE void tile(const Job *j, int64_t row, int64_t first, const int COUNT) {
    const uint16_t *w = j->weight + row * j->cols;
    const int64_t step = 4 * WIDE, whole = j->cols - j->cols % step, each = 2 * j->half;
    const float *split = j->split + first * each;
    Sums s[MOST] = {{{0}, {0}, {0}, {0}}};
    for (int64_t k = 0; k < whole; k += step) {
        words p, q;
        memcpy(&p, w + k, sizeof p);
        memcpy(&q, w + k + 2 * WIDE, sizeof q);
        __builtin_prefetch(w + k + PREFETCH_WEIGHTS);
#pragma GCC unroll 4
        for (int m = 0; m < COUNT; m++)
            add_32(s + m, p, q, split + m * each + k / 2, split + m * each + j->half + k / 2);
    }
#pragma GCC unroll 4
    for (int m = 0; m < COUNT; m++) {
        const float *x = j->x + (first + m) * j->cols;
        j->y[(first + m) * j->rows + row] = end_of_row(s[m], w, x, whole, j->cols);
    }
}

static void some_rows(void *data, int64_t from, int64_t end) {
    const Job *j = data;
    const int64_t tiles = j->tokens - j->tokens % MOST;
    for (int64_t row = from; row < end; row++) {
        for (int64_t t = 0; t < tiles; t += MOST) tile(j, row, t, MOST);
        for (int64_t t = tiles; t < j->tokens; t++) tile(j, row, t, 1);
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
