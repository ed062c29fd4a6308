/* y = x W^T for bf16 weights as they are stored and float activations: few tokens, all bandwidth.
 *
 * One row after the other: memory answers one stream twice as fast as four. A row is widened once for
 * a tile of tokens, each of which gets the sums that it would get alone.
 */
#include "bf16.h"

enum { EACH = 64 }; /* rows a thread takes */

SIZE_OF(Dense)

typedef struct {
    const Dense *of;
    const float *x; /* [tokens][inputs], arranged */
    float *y;       /* [tokens][outputs] */
    int64_t tokens;
} Job;

/* Row `row` times `count` tokens from `first` on. */
INLINE void tile(const Job *j, int64_t row, int64_t first, const int count) {
    const int64_t inputs = j->of->inputs, whole = inputs - inputs % CHUNK;
    const uint16_t *w = j->of->weight + row * inputs;
    const float *x = j->x + first * inputs, bias = j->of->bias ? j->of->bias[row] : 0;
    Sums s[TOKENS] = {0};
    for (int64_t k = 0; k < whole; k += CHUNK) {
        Chunk chunk;
        memcpy(&chunk, w + k, sizeof chunk);
        __builtin_prefetch(w + k + PREFETCH_WEIGHTS);
#pragma GCC unroll 8
        for (int m = 0; m < count; m++) add_chunk(s + m, chunk, x + m * inputs + k);
    }
#pragma GCC unroll 8
    for (int m = 0; m < count; m++)
        j->y[(first + m) * j->of->outputs + row] =
            bias + end_of_row(s[m], w + whole, x + m * inputs + whole, inputs - whole);
}

void optim_bf16_products(const Dense *d, const float *x, float *y, int64_t tokens, int64_t from,
                         int64_t end) {
    const Job job = {d, x, y, tokens};
    for (int64_t row = from; row < end; row++) EACH_TILE(tokens, tile, &job, row)
}

static void some_rows(void *data, int64_t from, int64_t end) {
    const Job *j = data;
    optim_bf16_products(j->of, j->x, j->y, j->tokens, from, end);
}

/* Returns nonzero if there is no memory. */
int optim_bf16(const uint16_t *weight, const float *x, float *y, int64_t rows, int64_t cols,
               int64_t tokens, int threads, Team *team) {
    const Dense dense = {.inputs = cols, .outputs = rows, .weight = weight};
    Job job = {&dense, arranged(x, tokens, cols), y, tokens};
    if (!job.x) return 1;
    share(some_rows, &job, rows, EACH, threads, team);
    return 0;
}
