/* Attention of many new tokens over a cache of floats or halfs: blocked softmax in fp32.
 *
 *     turn and store every new key and value; then, for STRIP rows (a token and a query head) at a
 *     time and tile after tile of TILE positions: scores, their exponentials, the values they weigh
 *
 * Tiles begin at multiples of TILE, and a row's sums run through them in order: what a token sees
 * is the same in every bit however the prompt was cut into calls.
 */
#include <math.h>
#include <string.h>

#include "attention.h"
#include "optim.h"
#include "parallel.h"
#include "simd_half.h"

#if defined(__AVX512F__)
enum { LANES = 16, COLUMNS = 4 };
#else
enum { LANES = 8, COLUMNS = 2 };
#endif
enum { STRIP = 6, TILE = 64, TOKENS = 64 }; /* TOKENS: of a piece of work */
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float vector_at __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

SIZE_OF(Prompt)

/* Of one block of rows. Rows are padded to whole strips, values to whole vectors. */
typedef struct {
    const Prompt *p;
    int64_t unit, from, count, group, wide; /* tokens from.. of this call; padded dim */
    float *q;                               /* [rows, dim], scaled */
    float *out;                             /* [rows, wide] */
    float *top, *sum;                       /* [rows] */
    float *keys, *values;                   /* [dim, TILE], [TILE, wide] */
} Rows;

/* c [STRIP, columns * LANES] (+)= a [STRIP, depth] * b [depth, ..]. */
INLINE void product_of(const float *a, int64_t lda, const float *b, int64_t ldb, float *c,
                       int64_t ldc, int64_t depth, const int add, const int columns) {
    vector sum[STRIP][COLUMNS];
#pragma GCC unroll 8
    for (int r = 0; r < STRIP; r++)
#pragma GCC unroll 8
        for (int v = 0; v < columns; v++)
            sum[r][v] = add ? (vector) * (vector_at *)(c + r * ldc + v * LANES) : (vector){0};
    for (int64_t k = 0; k < depth; k++, b += ldb) {
        vector line[COLUMNS];
#pragma GCC unroll 8
        for (int v = 0; v < columns; v++) line[v] = *(const vector_at *)(b + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < STRIP; r++)
#pragma GCC unroll 8
            for (int v = 0; v < columns; v++) sum[r][v] += a[r * lda + k] * line[v];
    }
#pragma GCC unroll 8
    for (int r = 0; r < STRIP; r++)
#pragma GCC unroll 8
        for (int v = 0; v < columns; v++) *(vector_at *)(c + r * ldc + v * LANES) = sum[r][v];
}

/* The same for any multiple of LANES columns. */
INLINE void product(const float *a, int64_t lda, const float *b, int64_t ldb, float *c, int64_t ldc,
                    int64_t depth, int64_t width, const int add) {
    int64_t n = 0;
    for (; n + COLUMNS * LANES <= width; n += COLUMNS * LANES)
        product_of(a, lda, b + n, ldb, c + n, ldc, depth, add, COLUMNS);
    for (; n < width; n += LANES) product_of(a, lda, b + n, ldb, c + n, ldc, depth, add, 1);
}

static void store_line(const Prompt *p, void *to, int64_t line, const float *x) {
    for (int64_t i = 0; i < p->dim; i++)
        if (p->half)
            ((uint16_t *)to)[line * p->dim + i] = narrow(x[i]);
        else
            ((float *)to)[line * p->dim + i] = x[i];
}

void optim_prompt_store(const Prompt *p, int64_t from, int64_t end) {
    for (int64_t n = from; n < end; n++) {
        const int64_t row = n / p->tokens, token = n % p->tokens, d = p->dim;
        const int64_t at = row * p->angle_stride + token * p->rotary;
        float *heads = p->qkv + n * (p->heads + 2 * p->kv_heads) * d, *keys = heads + p->heads * d;
        for (int64_t h = 0; p->rotary && h < p->heads + p->kv_heads; h++)
            turn(heads + h * d, p->cos + at, p->sin + at, p->rotary);
        for (int64_t kv = 0; kv < p->kv_heads; kv++) {
            const int64_t line = (row * p->kv_heads + kv) * p->capacity + p->start + token;
            store_line(p, p->keys, line, keys + kv * d);
            store_line(p, p->values, line, keys + (p->kv_heads + kv) * d);
        }
    }
}

static void widen_line(const Prompt *p, const void *from, int64_t line, float *to) {
    if (!p->half) {
        memcpy(to, (const float *)from + line * p->dim, p->dim * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < p->dim; i += WIDE)
        *(wide_at *)(to + i) = widen8((const uint16_t *)from + line * p->dim + i);
}

/* Positions from..from + count of the cache: keys a column each, values a line each. */
static void load_tile(const Rows *r, int64_t from, int64_t count) {
    const Prompt *p = r->p;
    const int64_t first = r->unit * p->capacity + from;
    float key[p->dim];
    for (int64_t j = 0; j < count; j++) {
        widen_line(p, p->keys, first + j, key);
        for (int64_t i = 0; i < p->dim; i++) r->keys[i * TILE + j] = key[i];
        widen_line(p, p->values, first + j, r->values + j * r->wide);
    }
}

static int64_t position_of(const Rows *r, int64_t row) {
    const int64_t token = row / r->group;
    return r->p->start + r->from + (token < r->count ? token : r->count - 1);
}

/* The first position that the one at `position` sees; a pad token sees itself. */
static int64_t first_of(const Rows *r, int64_t position) {
    const int64_t *padding = r->p->padding;
    const int64_t pads = padding ? padding[r->unit / r->p->kv_heads] : 0;
    const int64_t first = first_seen(position + 1, r->p->window, pads);
    return first < position ? first : position;
}

static wide tanh8(wide x) {
    const lanes sign = (lanes)x & INT32_MIN;
    const wide e = expo8(((wide)((lanes)x | INT32_MIN)) * 2.0f); /* e^-2|x| */
    return (wide)((lanes)((1.0f - e) / (1.0f + e)) | sign);
}

/* A row's scores of a tile become e^(score - the largest so far); those outside from..end zero.
 * What was summed before is made smaller where a larger one has come. */
static void exponentials(const Rows *r, int64_t row, float *s, int64_t from, int64_t end) {
    float *top = r->top + row, *out = r->out + row * r->wide, largest = *top;
    const float cap = r->p->cap;
    for (int64_t j = 0; cap > 0 && j < TILE; j += WIDE) {
        wide_at *at = (wide_at *)(s + j);
        *at = tanh8(*at / cap) * cap;
    }
#pragma omp simd reduction(max : largest)
    for (int64_t j = from; j < end; j++) largest = s[j] > largest ? s[j] : largest;
    if (largest > *top) {
        const float factor = *top > -INFINITY ? expo(*top - largest) : 0;
        *top = largest, r->sum[row] *= factor;
        for (int64_t i = 0; i < r->wide; i += WIDE) *(wide_at *)(out + i) *= factor;
    }
    for (int64_t j = 0; j < TILE; j += WIDE) {
        wide_at *at = (wide_at *)(s + j);
        *at = expo8(*at - largest);
    }
    memset(s, 0, from * sizeof(float));
    memset(s + end, 0, (TILE - end) * sizeof(float));
    wide total = {0};
    for (int64_t j = 0; j < TILE; j += WIDE) total += *(wide_at *)(s + j);
    r->sum[row] += lane_sum(total);
}

/* STRIP rows from `row` on, over the `count` positions from `from` on that are loaded. */
static void strip(const Rows *r, int64_t row, int64_t from, int64_t count) {
    const int64_t d = r->p->dim, last = position_of(r, row + STRIP - 1);
    if (last < from || first_of(r, position_of(r, row)) >= from + count) return;
    float s[STRIP * TILE];
    product(r->q + row * d, d, r->keys, TILE, s, TILE, d, TILE, 0);
    for (int64_t i = 0; i < STRIP; i++) {
        const int64_t position = position_of(r, row + i), first = first_of(r, position) - from;
        const int64_t begin = first < 0 ? 0 : first, end = position + 1 - from;
        if (begin < count && end > 0)
            exponentials(r, row + i, s + i * TILE, begin, end < count ? end : count);
        else
            memset(s + i * TILE, 0, TILE * sizeof(float));
    }
    const int64_t seen = last + 1 - from;
    product(s, TILE, r->values, r->wide, r->out + row * r->wide, r->wide,
            seen < count ? seen : count, r->wide, 1);
}

static void begin_rows(const Rows *r, int64_t rows) {
    const Prompt *p = r->p;
    const int64_t d = p->dim, row = r->unit / p->kv_heads, kv = r->unit % p->kv_heads;
    const int64_t each = (p->heads + 2 * p->kv_heads) * d, used = r->count * r->group;
    for (int64_t i = 0; i < used; i++) {
        const int64_t token = row * p->tokens + r->from + i / r->group;
        const float *q = p->qkv + token * each + (kv * r->group + i % r->group) * d;
        for (int64_t c = 0; c < d; c++) r->q[i * d + c] = q[c] * p->scale;
    }
    memset(r->q + used * d, 0, (rows - used) * d * sizeof(float));
    memset(r->out, 0, rows * r->wide * sizeof(float));
    memset(r->keys, 0, d * TILE * sizeof(float));
    memset(r->values, 0, TILE * r->wide * sizeof(float));
    for (int64_t i = 0; i < rows; i++) r->top[i] = -INFINITY, r->sum[i] = 0;
}

static void end_rows(const Rows *r) {
    const Prompt *p = r->p;
    const int64_t row = r->unit / p->kv_heads, kv = r->unit % p->kv_heads;
    for (int64_t i = 0; i < r->count * r->group; i++) {
        const int64_t token = row * p->tokens + r->from + i / r->group;
        float *to = p->out + (token * p->heads + kv * r->group + i % r->group) * p->dim;
        const float share = 1 / r->sum[i];
        for (int64_t c = 0; c < p->dim; c++) to[c] = r->out[i * r->wide + c] * share;
    }
}

static void attend_rows(Rows *r) {
    const int64_t d = r->p->dim, rows = (TOKENS * r->group + STRIP - 1) / STRIP * STRIP;
    const int64_t used = (r->count * r->group + STRIP - 1) / STRIP * STRIP;
    r->wide = (d + LANES - 1) / LANES * LANES;
    const int64_t floats = rows * (d + r->wide + 2) + TILE * (d + r->wide);
    r->keys = scratch(OF_THE_THREAD, floats * sizeof(float));
    if (!r->keys) {
        __atomic_store_n(r->p->no_memory, 1, __ATOMIC_RELAXED);
        return;
    }
    r->values = r->keys + d * TILE, r->q = r->values + TILE * r->wide, r->out = r->q + rows * d;
    r->top = r->out + rows * r->wide, r->sum = r->top + rows;
    begin_rows(r, used);
    const int64_t end = r->p->start + r->from + r->count;
    for (int64_t at = first_of(r, end - r->count) / TILE * TILE; at < end; at += TILE) {
        const int64_t count = end - at < TILE ? end - at : TILE;
        load_tile(r, at, count);
        for (int64_t row = 0; row < used; row += STRIP) strip(r, row, at, count);
    }
    end_rows(r);
}

static int64_t blocks_of(const Prompt *p) { return (p->tokens + TOKENS - 1) / TOKENS; }

int64_t optim_prompt_pieces(const Prompt *p) { return p->batch * p->kv_heads * blocks_of(p); }

void optim_prompt_rows(const Prompt *p, int64_t from, int64_t end) {
    for (int64_t n = from; n < end; n++) { /* the last of a head first, as they see most */
        const int64_t blocks = blocks_of(p), first = (blocks - 1 - n % blocks) * TOKENS;
        const int64_t left = p->tokens - first;
        Rows r = {p, n / blocks, first, left < TOKENS ? left : TOKENS, p->heads / p->kv_heads};
        attend_rows(&r);
    }
}

static void store_tokens(void *p, int64_t from, int64_t end) { optim_prompt_store(p, from, end); }

static void some_rows(void *p, int64_t from, int64_t end) { optim_prompt_rows(p, from, end); }

/* Returns nonzero if there is no memory. */
int optim_attend_prompt(Prompt *p, int threads, Team *team) {
    int no_memory = 0;
    p->no_memory = &no_memory;
    share(store_tokens, p, p->batch * p->tokens, 16, threads, team);
    share(some_rows, p, optim_prompt_pieces(p), 1, threads, team);
    return no_memory;
}
