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
    int64_t tokens;
} Job;

SIZE_OF(Linear)

int optim_rows(void) { return ROWS; }
int optim_flip(void) { return FLIP; }
int optim_half_scales(void) { return HALF_SCALES; }
const char *optim_name(void) { return NAME; }

INLINE void round_chunk(const float *x, const int64_t count, int64_t chunk, int8_t *out, float *scale,
                        float *sum) {
    const float peak = round_int8(x, count, out);
    int32_t total = 0;
    for (int64_t i = 0; i < count; i++) total += out[i];
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
            round_chunk(from, left, l->chunk, out, a->scales + at, a->sums + at);
        else if (l->chunk == 64) /* constant counts, so that the compiler can unroll */
            round_chunk(from, 64, 64, out, a->scales + at, a->sums + at);
        else if (l->chunk == 32)
            round_chunk(from, 32, 32, out, a->scales + at, a->sums + at);
        else
            round_chunk(from, 16, 16, out, a->scales + at, a->sums + at);
    }
}

INLINE ints splat_at(const int8_t *p) {
    int32_t word;
    memcpy(&word, p, 4);
    return splat(word);
}

/* ROWS scales, or offsets, of a block from `at` on. */
INLINE floats load_scales(const Linear *l, const void *p, int64_t at) {
    if (l->scale_type == 1) return load_bf16((const uint16_t *)p + at);
    if (l->scale_type == 2) return load_half((const uint16_t *)p + at);
    return load_floats((const float *)p + at);
}

#define PREFETCH_BYTES 2048 /* what is asked for so far ahead has come when it is read */
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
        const floats scale = load_scales(l, l->scale, at);
        const float flip = BITS == 8 ? FLIP : 0;
        floats zero = constant(l->middle - flip), offset = constant(0);
        if (l->offset) {
            zero = constant(0);
            offset = fused(constant(flip), scale, load_scales(l, l->offset, at));
        } else if (l->zero) {
            zero = sub(load_bytes(l->zero + at), constant(flip));
        }
        for (int64_t end = c + per_scale; c < end; c++, from += CHUNK) {
            ints dot[MOST];
            for (int m = 0; m < COUNT; m++) dot[m] = zeros();
            for (int part = 0; part < CHUNK; part += PART) {
                ints narrow[MOST];
                for (int m = 0; m < COUNT; m++) narrow[m] = BITS == 4 ? zeros() : dot[m];
                for (int k = part; k < part + PART; k += 32 / BITS, w += vector) {
                    const ints word = load(w);
                    __builtin_prefetch(w + PREFETCH_BYTES);
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
                if (l->offset)
                    sum[m] = fused(offset, constant(a->sums[token] * a->scales[token]), sum[m]);
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

static void round_tokens(void *data, int64_t from, int64_t end) {
    Job *j = data;
    for (int64_t token = from; token < end; token++)
        optim_round(j->layer, j->x, &j->act, token);
}

static void some_blocks(void *data, int64_t from, int64_t end) {
    Job *j = data;
    optim_blocks(j->layer, &j->act, j->y, j->tokens, from, end);
}

/* x [tokens, inputs] -> y [tokens, outputs], float. Returns nonzero if there is no memory. */
int optim_linear(const Linear *l, const float *x, float *y, int64_t tokens, int threads,
                 Team *team) {
    const int64_t batch = tokens < 128 ? tokens : 128; /* activations that stay in the cache */
    const size_t count = (size_t)(batch * l->chunks);
    float *memory = scratch(OF_THE_CALL, count * (l->chunk + 2 * sizeof(float)));
    if (!memory) return 1;
    Job job = {.layer = l};
    job.act.scales = memory;
    job.act.sums = job.act.scales + count;
    job.act.values = (int8_t *)(job.act.sums + count);
    const int64_t blocks = (l->outputs + ROWS - 1) / ROWS, each = blocks / (threads * 4);
    for (int64_t at = 0; at < tokens; at += batch) {
        job.tokens = tokens - at < batch ? tokens - at : batch;
        job.x = x + at * l->inputs;
        job.y = y + at * l->outputs;
        share(round_tokens, &job, job.tokens, 1, job.tokens < 8 ? 1 : threads, team);
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
