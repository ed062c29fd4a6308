/* y = x W^T with 4- or 8-bit weights and activations rounded to 8 bits, in integer dot products.
 *
 * Activations: each `chunk` (16, 32 or 64 inputs of a token) becomes int8 with one scale,
 * a = round(x / s), s = max|x| / 127, and its sum is kept. Then with w = (q - zero) * scale
 *
 *     y[row] = sum over chunks of scale * s * (sum q*a - zero * sum a)
 *
 * Weights: blocks of ROWS rows, so that one vector lane is one output and nothing is summed
 * across lanes. A lane's 32-bit word has 4 inputs (8-bit) or 8 (4-bit: inputs 0-3 in the low
 * nibbles of its bytes, 4-7 in the high ones). A 4-bit product pair is at most 2*15*127, so
 * 32 inputs (8 pairs a lane) stay below 2^15 where the sums are 16 bits wide (AVX2).
 */
#include <stdlib.h>

#include "optim.h"
#include "simd_int.h"

typedef struct {
    const Linear *layer;
    const float *x;
    float *y;
    Activations act;
    int64_t tokens, blocks_each, next;
} Job;

int optim_rows(void) { return ROWS; }
int optim_flip(void) { return FLIP; }
const char *optim_name(void) { return NAME; }

static void quantize_chunk(const float *x, int64_t count, int64_t chunk, int8_t *out, float *scale,
                           float *sum) {
    int32_t top = 0, total = 0; /* the order of |x| is that of its bits: NaN ends up on top */
    for (int64_t i = 0; i < count; i++) {
        int32_t word;
        memcpy(&word, x + i, 4);
        word &= 0x7fffffff;
        top = word > top ? word : top;
    }
    float peak;
    memcpy(&peak, &top, 4);
    float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;
    for (int64_t i = 0; i < count; i++) {
        float v = x[i] * inverse;
        int32_t r = (int32_t)(v + (v >= 0 ? 0.5f : -0.5f));
        out[i] = (int8_t)r;
        total += r;
    }
    memset(out + count, 0, chunk - count);
    *scale = peak / 127.0f;
    *sum = (float)total;
}

void optim_round(const Linear *l, const float *x, Activations *a, int64_t token) {
    for (int64_t c = 0; c < l->chunks; c++) {
        int64_t left = l->inputs - c * l->chunk, at = token * l->chunks + c;
        int8_t *out = a->values + at * l->chunk;
        const float *from = x + token * l->inputs + c * l->chunk;
        if (left < l->chunk)
            quantize_chunk(from, left, l->chunk, out, a->scales + at, a->sums + at);
        else if (l->chunk == 64) /* constant counts, so that the compiler can unroll */
            quantize_chunk(from, 64, 64, out, a->scales + at, a->sums + at);
        else if (l->chunk == 32)
            quantize_chunk(from, 32, 32, out, a->scales + at, a->sums + at);
        else
            quantize_chunk(from, 16, 16, out, a->scales + at, a->sums + at);
    }
}

INLINE ints splat_at(const int8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return splat(word);
}

#define AHEAD 2048 /* bytes: what memory takes to answer */
#define MOST 4 /* tokens at a time: what the registers hold */

/* ROWS outputs of COUNT tokens from `first` on: the only loop that costs time. */
INLINE void tile(const Linear *l, const Activations *a, int64_t block, int64_t first, float *y,
                 const int BITS, const int CHUNK, const int COUNT) {
    const int64_t vector = ROWS * 4, cols = l->chunks * CHUNK, per_scale = l->chunks / l->scales;
    const char *w = l->weight + block * (cols * BITS / 32) * vector;
    const int PART = CHUNK < 32 ? CHUNK : 32;
    floats sum[MOST];
    for (int m = 0; m < COUNT; m++) sum[m] = constant(0);
    const int8_t *from = a->values + first * cols;
    for (int64_t s = 0, c = 0; s < l->scales; s++) {
        const int64_t at = (block * l->scales + s) * ROWS;
        const floats scale = l->scale_is_bf16 ? load_bf16((const uint16_t *)l->scale + at)
                                              : load_floats((const float *)l->scale + at);
        const float flip = BITS == 8 ? FLIP : 0;
        const floats zero = l->zero ? sub(load_bytes(l->zero + at), constant(flip))
                                    : constant(l->middle - flip);
        for (int64_t end = c + per_scale; c < end; c++, from += CHUNK) {
            ints dot[MOST];
            for (int m = 0; m < COUNT; m++) dot[m] = zeros();
            for (int part = 0; part < CHUNK; part += PART) {
                ints narrow[MOST];
                for (int m = 0; m < COUNT; m++) narrow[m] = BITS == 4 ? zeros() : dot[m];
                for (int k = part; k < part + PART; k += 32 / BITS, w += vector) {
                    const ints word = load(w);
                    __builtin_prefetch(w + AHEAD);
                    for (int m = 0; m < COUNT; m++) {
                        const int8_t *x = from + m * cols + k;
                        if (BITS == 8) {
                            narrow[m] = dot8(narrow[m], word, splat_at(x));
                        } else {
                            narrow[m] = dot4(narrow[m], low(word), splat_at(x));
                            narrow[m] = dot4(narrow[m], high(word), splat_at(x + 4));
                        }
                    }
                }
                for (int m = 0; m < COUNT; m++)
                    dot[m] = BITS == 4 ? add(dot[m], widen(narrow[m])) : narrow[m];
            }
            for (int m = 0; m < COUNT; m++) {
                const int64_t token = (first + m) * l->chunks + c;
                const floats shift = mul(zero, constant(a->sums[token]));
                const floats factor = mul(scale, constant(a->scales[token]));
                sum[m] = fused(sub(real(dot[m]), shift), factor, sum[m]);
            }
        }
    }
    const int64_t row = block * ROWS, left = l->outputs - row;
    for (int m = 0; m < COUNT; m++) {
        float *to = y + (first + m) * l->outputs + row, out[ROWS];
        if (l->bias) sum[m] = fused(constant(1), load_floats(l->bias + row), sum[m]);
        store(left < ROWS ? out : to, sum[m]);
        if (left < ROWS) memcpy(to, out, left * sizeof(float));
    }
}

#define TILES(BITS, CHUNK)                                                                  \
    static void blocks_##BITS##_##CHUNK(const Linear *l, const Activations *a, float *y,     \
                                        int64_t tokens, int64_t from, int64_t end) {         \
        const int64_t fours = tokens & ~(int64_t)(MOST - 1);                                 \
        for (int64_t b = from; b < end; b++) {                                               \
            for (int64_t t = 0; t < fours; t += MOST) tile(l, a, b, t, y, BITS, CHUNK, MOST); \
            for (int64_t t = fours; t < tokens; t++) tile(l, a, b, t, y, BITS, CHUNK, 1);    \
        }                                                                                    \
    }
TILES(4, 16)
TILES(4, 32)
TILES(4, 64)
TILES(8, 16)
TILES(8, 32)
TILES(8, 64)

void optim_blocks(const Linear *l, const Activations *a, float *y, int64_t tokens, int64_t from,
                  int64_t end) {
    switch (l->bits * 100 + l->chunk) {
    case 416: blocks_4_16(l, a, y, tokens, from, end); break;
    case 432: blocks_4_32(l, a, y, tokens, from, end); break;
    case 464: blocks_4_64(l, a, y, tokens, from, end); break;
    case 816: blocks_8_16(l, a, y, tokens, from, end); break;
    case 832: blocks_8_32(l, a, y, tokens, from, end); break;
    case 864: blocks_8_64(l, a, y, tokens, from, end); break;
    }
}

/* Threads take the next piece of work when they are free: a busy machine slows no one down. */
static void quantize_task(void *data) {
    Job *j = data;
    int64_t token;
    while ((token = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED)) < j->tokens)
        optim_round(j->layer, j->x, &j->act, token);
}

static void blocks_task(void *data) {
    Job *j = data;
    const int64_t blocks = (j->layer->outputs + ROWS - 1) / ROWS, each = j->blocks_each;
    int64_t from;
    while ((from = __atomic_fetch_add(&j->next, each, __ATOMIC_RELAXED)) < blocks)
        optim_blocks(j->layer, &j->act, j->y, j->tokens, from,
                     from + each < blocks ? from + each : blocks);
}

static void run(Parallel *parallel, Task *task, Job *job, unsigned threads) {
    job->next = 0;
    if (parallel && threads > 1)
        parallel(task, job, threads, 0);
    else
        task(job);
}

/* x [tokens, inputs] -> y [tokens, outputs], float. Returns nonzero if there is no memory. */
int optim_linear(const Linear *l, const float *x, float *y, int64_t tokens, int threads,
                 Parallel *parallel) {
    static _Thread_local void *scratch;
    static _Thread_local size_t held;
    const int64_t batch = tokens < 128 ? tokens : 128; /* activations that stay in the cache */
    const size_t count = (size_t)(batch * l->chunks), need = count * (l->chunk + 8);
    if (held < need) {
        free(scratch);
        scratch = malloc(need);
        held = scratch ? need : 0;
        if (!scratch) return 1;
    }
    Job job = {.layer = l};
    job.act.scales = scratch;
    job.act.sums = job.act.scales + count;
    job.act.values = (int8_t *)(job.act.sums + count);
    const int64_t blocks = (l->outputs + ROWS - 1) / ROWS, share = blocks / (threads * 4);
    job.blocks_each = share > 0 ? share : 1;
    for (int64_t at = 0; at < tokens; at += batch) {
        job.tokens = tokens - at < batch ? tokens - at : batch;
        job.x = x + at * l->inputs;
        job.y = y + at * l->outputs;
        run(job.tokens < 8 ? NULL : parallel, quantize_task, &job, threads);
        run(parallel, blocks_task, &job, threads);
    }
    return 0;
}
