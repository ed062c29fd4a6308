/* y = x W^T with 4- or 8-bit weights and activations rounded to 8 bits, in integer dot products.
 *
 * Activations: each `chunk` (16, 32 or 64 inputs of a token) becomes int8 with one scale,
 * a = round(x / s), s = max|x| / 127, and its sum is kept. Then with w = (q - zero) * scale
 *
 *     y[row] = sum over chunks of scale * s * (sum q*a - zero * sum a)
 *
 * or with w = q * scale + offset, where a format adds a float (GGUF's Q4_1, MLX),
 *
 *     y[row] = sum over chunks of scale * s * sum q*a + offset * s * sum a
 *
 * Weights: blocks of ROWS rows, so that one vector lane is one output and nothing is summed
 * across lanes. A lane's 32-bit word has 4 inputs (8-bit) or 8 (4-bit: inputs 0-3 in the low
 * nibbles of its bytes, 4-7 in the high ones). A 4-bit product pair is at most 2*15*127, so
 * 32 inputs (8 pairs a lane) stay below 2^15 where the sums are 16 bits wide (AVX2).
 */
#include "optim.h"
#include "simd_int.h"
#include "parallel.h"

typedef struct {
    const Linear *layer;
    const float *x;
    float *y;
    Activations act;
} Job;

SIZE_OF(Linear)

enum {
    PREFETCH_BYTES = 2048, /* what is asked for so far ahead has come when it is read */
    PANEL = 1 << 17,       /* bytes of rows that stay in the cache for all tokens */
    FEW = 4,               /* tokens at a time of those that are in no tile */
    BATCH = 40 * MANY      /* tokens at a time of a linear: their activations stay in the cache */
};

int optim_rows(void) { return ROWS; }
int optim_flip(void) { return FLIP; }
int optim_half_scales(void) { return HALF_SCALES; }
const char *optim_name(void) { return NAME; }

int64_t optim_activations(Activations *a, int64_t tokens, int64_t columns, char *memory) {
    const int64_t rest = tokens % MANY, rows = tokens + MANY, chunks = rows * (columns / 16);
    a->tokens = tokens;
    a->tiled = tokens - rest + (rest > 2 * FEW ? MANY : 0);
    a->values = (int8_t *)memory;
    a->scales = (float *)(memory + rows * columns);
    a->shares = a->scales + chunks;
    a->minus = (int32_t *)(a->shares + chunks);
    return rows * columns + 3 * chunks * (int64_t)sizeof(float);
}

/* `count` inputs from `x` on, the c-th chunk of `token`. */
INLINE void round_chunk(const Linear *l, const float *x, const int64_t count, Activations *a,
                        int64_t token, int64_t c) {
    const int tiled = token < a->tiled;
    const int64_t beside = tiled ? MANY : 1, first = tiled ? token / MANY * MANY : token;
    const int64_t at = first * l->chunks + c * beside;
    int8_t apart[64], *to = a->values + at * l->chunk + (token - first) * 4;
    int8_t *values = tiled ? apart : to;
    int32_t total;
    const float peak = round_int8(x, count, values, &total);
    if (count < l->chunk) memset(values + count, 0, l->chunk - count);
    for (int64_t i = 0; tiled && i < l->chunk; i += 4) memcpy(to + i * MANY, apart + i, 4);
    a->scales[at + token - first] = peak / 127.0f;
    a->shares[at + token - first] = (float)total * (peak / 127.0f);
    a->minus[at + token - first] = -total;
}

void optim_round(const Linear *l, const float *x, Activations *a, int64_t token) {
    const float *from = x + token * l->inputs;
    for (int64_t c = 0; c < l->chunks; c++, from += l->chunk) {
        const int64_t left = l->inputs - c * l->chunk;
        if (left < l->chunk)
            round_chunk(l, from, left, a, token, c);
        else if (l->chunk == 64) /* constant counts, so that the compiler can unroll */
            round_chunk(l, from, 64, a, token, c);
        else if (l->chunk == 32)
            round_chunk(l, from, 32, a, token, c);
        else
            round_chunk(l, from, 16, a, token, c);
    }
}

/* ROWS scales, or offsets, of a block from `at` on. */
INLINE floats load_scales(const Linear *l, const void *p, int64_t at) {
    if (l->scale_type == 1) return load_bf16((const uint16_t *)p + at);
    if (l->scale_type == 2) return load_half((const uint16_t *)p + at);
    return load_floats((const float *)p + at);
}

#define EACH_TOKEN /* unrolled, or gcc keeps arrays of vectors in memory */ \
    _Pragma("GCC unroll 16") for (int m = 0; m < COUNT; m++)

/* ROWS outputs of COUNT tokens from `first` on: the only loop that costs time. `w` are the rows of
 * the block. SPREAD: a tile of MANY tokens, and weights with a byte for each input. */
INLINE void tile(const Linear *l, const Activations *a, const char *w, int64_t block, int64_t first,
                 float *y, const int BITS, const int CHUNK, const int COUNT, const int SPREAD) {
    const int64_t vector = ROWS * 4, chunks = l->chunks, per_scale = chunks / l->scales;
    const int64_t beside = SPREAD ? MANY : 1, apart = SPREAD ? 4 : chunks * CHUNK;
    const int64_t next = SPREAD ? 1 : chunks; /* from token to token */
    const int SHORT = BITS == 4 && SUMS_16, PART = SHORT && CHUNK > 32 ? 32 : CHUNK;
    const int STORED = SPREAD ? 8 : BITS;
    floats sum[MANY];
    EACH_TOKEN sum[m] = constant(0);
    const int8_t *from = a->values + first * chunks * CHUNK;
    const float *scales = a->scales + first * chunks, *shares = a->shares + first * chunks;
    const int32_t *minus = a->minus + first * chunks;
    for (int64_t s = 0; s < l->scales; s++) {
        const int64_t at = (block * l->scales + s) * ROWS;
        const floats scale = load_scales(l, l->scale, at);
        const int flip = BITS == 8 ? FLIP : 0;
        floats offset = constant(0);
        ints zero = zeros();
        if (l->offset)
            offset = fused(constant(flip), scale, load_scales(l, l->offset, at));
        else
            zero = add(l->zero ? load_bytes(l->zero + at) : splat(l->middle), splat(-flip));
        for (int64_t c = 0; c < per_scale; c++, from += CHUNK * beside) {
            ints dot[MANY];
            EACH_TOKEN dot[m] = product(zero, splat(minus[m * next]));
#pragma GCC unroll 2
            for (int part = 0; part < CHUNK; part += PART) {
                ints narrow[MANY], other[MANY];
                EACH_TOKEN narrow[m] = SHORT ? zeros() : dot[m], other[m] = zeros();
#pragma GCC unroll 16
                for (int k = part; k < part + PART; k += 32 / STORED, w += vector) {
                    const ints word = load(w);
                    if (!SPREAD) __builtin_prefetch(w + PREFETCH_BYTES);
                    EACH_TOKEN {
                        const int8_t *x = from + m * apart + k * beside;
                        if (BITS == 8) {
                            narrow[m] = dot8_at(narrow[m], word, x);
                        } else if (SPREAD) {
                            narrow[m] = dot4_at(narrow[m], word, x);
                        } else {
                            narrow[m] = dot4_at(narrow[m], low(word), x);
                            if (SHORT)
                                narrow[m] = dot4_at(narrow[m], high(word), x + 4);
                            else /* a sum of its own: a product waits for the one before it */
                                other[m] = dot4_at(other[m], high(word), x + 4);
                        }
                    }
                }
                EACH_TOKEN dot[m] = SHORT ? add(dot[m], widen(narrow[m])) : add(narrow[m], other[m]);
            }
            EACH_TOKEN {
                const floats factor = mul(scale, constant(scales[m * next]));
                sum[m] = fused(real(dot[m]), factor, sum[m]);
            }
            if (l->offset) EACH_TOKEN sum[m] = fused(offset, constant(shares[m * next]), sum[m]);
            scales += beside, shares += beside, minus += beside;
        }
    }
    const int64_t row = block * ROWS, left = l->outputs - row;
    EACH_TOKEN {
        float *to = y + (first + m) * l->outputs + row, out[ROWS];
        if (l->bias) sum[m] = fused(constant(1), load_floats(l->bias + row), sum[m]);
        if (first + m >= a->tokens) continue;
        store(left < ROWS ? out : to, sum[m]);
        if (left < ROWS) memcpy(to, out, left * sizeof(float));
    }
}

/* Rows of 4 bits with a byte for each input, in memory of the thread, or NULL. */
static const char *widened(const char *w, int64_t words) {
    const int64_t vector = ROWS * 4;
    char *made = scratch(OF_THE_THREAD, 2 * words * vector);
    for (int64_t k = 0; made && k < words; k++) {
        const ints word = load(w + k * vector);
        save(made + 2 * k * vector, low(word));
        save(made + (2 * k + 1) * vector, high(word));
    }
    return made;
}

/* All tokens over the blocks from..end, some at a time: their rows, with a byte for each input, stay
 * in the cache while tile after tile of tokens goes over them. */
#define TILES(BITS, CHUNK)                                                                     \
    static void blocks_##BITS##_##CHUNK(const Linear *l, const Activations *a, float *y,       \
                                        int64_t from, int64_t end) {                           \
        const int64_t size = l->chunks * CHUNK * ROWS, packed = size * BITS / 8;               \
        const int64_t most = size > PANEL ? 1 : PANEL / size;                                  \
        for (int64_t b = from, n; b < end; b += n) {                                           \
            const char *w = l->weight + b * packed, *wide = w;                                 \
            n = end - b < most ? end - b : most;                                               \
            if (a->tiled && BITS == 4) wide = widened(w, n * packed / (ROWS * 4));             \
            for (int64_t t = 0; t < a->tiled; t += MANY)                                       \
                for (int64_t i = 0; i < n; i++)                                                \
                    tile(l, a, wide + i * size, b + i, t, y, BITS, CHUNK, MANY, 1);            \
            for (int64_t i = 0; i < n; i++, w += packed) {                                     \
                int64_t t = a->tiled;                                                          \
                for (; t + FEW <= a->tokens; t += FEW)                                         \
                    tile(l, a, w, b + i, t, y, BITS, CHUNK, FEW, 0);                           \
                for (; t < a->tokens; t++) tile(l, a, w, b + i, t, y, BITS, CHUNK, 1, 0);      \
            }                                                                                  \
        }                                                                                      \
    }
TILES(4, 16)
TILES(4, 32)
TILES(4, 64)
TILES(8, 16)
TILES(8, 32)
TILES(8, 64)

void optim_blocks(const Linear *l, const Activations *a, float *y, int64_t from, int64_t end) {
    switch (l->bits * 100 + l->chunk) {
    case 416: blocks_4_16(l, a, y, from, end); break;
    case 432: blocks_4_32(l, a, y, from, end); break;
    case 464: blocks_4_64(l, a, y, from, end); break;
    case 816: blocks_8_16(l, a, y, from, end); break;
    case 832: blocks_8_32(l, a, y, from, end); break;
    case 864: blocks_8_64(l, a, y, from, end); break;
    }
}

static void round_tokens(void *data, int64_t from, int64_t end) {
    Job *j = data;
    for (int64_t token = from; token < end; token++)
        optim_round(j->layer, j->x, &j->act, token);
}

static void some_blocks(void *data, int64_t from, int64_t end) {
    Job *j = data;
    optim_blocks(j->layer, &j->act, j->y, from, end);
}

/* x [tokens, inputs] -> y [tokens, outputs], float. Returns nonzero if there is no memory. */
int optim_linear(const Linear *l, const float *x, float *y, int64_t tokens, int threads,
                 Team *team) {
    const int64_t batch = tokens < BATCH ? tokens : BATCH, columns = l->chunks * l->chunk;
    const int64_t blocks = (l->outputs + ROWS - 1) / ROWS, each = blocks / (threads * 4);
    Job job = {.layer = l};
    char *memory = scratch(OF_THE_CALL, optim_activations(&job.act, batch, columns, NULL));
    if (!memory) return 1;
    for (int64_t at = 0; at < tokens; at += batch) {
        const int64_t count = tokens - at < batch ? tokens - at : batch;
        optim_activations(&job.act, count, columns, memory);
        job.x = x + at * l->inputs;
        job.y = y + at * l->outputs;
        share(round_tokens, &job, count, 1, count < 8 ? 1 : threads, team);
        share(some_blocks, &job, blocks, each > 0 ? each : 1, threads, team);
    }
    return 0;
}

/* A weight on its way to the blocks above. A row is `stored` bytes: an input each, or two of 4 bits. */
typedef struct {
    const uint8_t *from;
    uint32_t *to;
    int64_t outputs, stored, words; /* words of a row, padded */
    int bits, packed;
    uint8_t flip; /* of 8-bit inputs */
} Repack;

/* 4 half-bytes of a word, a byte each. */
INLINE uint32_t apart(uint32_t word) {
    const uint32_t pairs = (word & 0xff) | (word & 0xff00) << 8;
    return (pairs | pairs << 4) & 0x0f0f0f0f;
}

/* The word of 4 or 8 inputs that `piece`, 4 or 8 bytes of a row, holds. */
INLINE uint32_t repacked(const Repack *r, uint64_t piece) {
    const uint32_t first = (uint32_t)piece, second = (uint32_t)(piece >> 32);
    if (r->packed) return apart(first) | apart(first >> 16) << 4;
    return r->bits == 4 ? first | second << 4 : first;
}

static void repack_blocks(void *job, int64_t from, int64_t end) {
    const Repack *r = job;
    const int64_t each = r->packed || r->bits == 8 ? 4 : 8, whole = r->stored / each;
    const uint64_t flips = r->flip * 0x0101010101010101u;
    for (int64_t block = from; block < end; block++) {
        uint32_t *to = r->to + block * r->words * ROWS;
        memset(to, 0, (size_t)(r->words * ROWS) * sizeof *to);
        for (int64_t i = 0; i < ROWS && block * ROWS + i < r->outputs; i++) {
            const uint8_t *row = r->from + (block * ROWS + i) * r->stored;
            uint64_t piece = 0;
            for (int64_t k = 0; k < whole; k++) {
                memcpy(&piece, row + k * each, each == 8 ? 8 : 4);
                to[k * ROWS + i] = repacked(r, piece ^ flips);
            }
            const int64_t left = r->stored - whole * each;
            if (!left) continue;
            piece = 0;
            for (int64_t b = 0; b < left; b++)
                piece |= (uint64_t)(row[whole * each + b] ^ r->flip) << 8 * b;
            to[whole * ROWS + i] = repacked(r, piece);
        }
    }
}

/* Inputs of `bits`, a byte each or `packed` as 4 bits, -> [blocks][words][ROWS]; the rest is 0. */
void optim_repack(const uint8_t *from, uint32_t *to, int64_t outputs, int64_t stored, int64_t words,
                  int bits, int packed, int flip, int threads, Team *team) {
    Repack job = {from, to, outputs, stored, words, bits, packed, (uint8_t)flip};
    share(repack_blocks, &job, (outputs + ROWS - 1) / ROWS, 8, threads, team);
}
