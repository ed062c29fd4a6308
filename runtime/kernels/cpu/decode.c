/* All blocks of a decoder for a few tokens of some texts, in one call.
 *
 *     h += attention(norm(h));  h += mlp(norm(h))      for each block
 *
 * A linear is read whole, small inputs as zeros, or input by input without those that are small.
 * Weights are read once for all tokens. Each token gets, in every bit, what it would get alone: no sum
 * depends on the tokens beside it. Those of one text go through a head in order, each writing its key
 * before it attends, so that many tokens of one text and one token of many are the same work.
 *
 * The work is a row of stages, a stage some pieces. A thread takes pieces as long as there are any,
 * then waits until all of that stage are done. No thread waits for one that has not come, so that a
 * busy machine, or a smaller team than was asked for, costs time only.
 */
#include <math.h>
#include <sched.h>
#include <string.h>

#include "bf16.h"
#include "optim.h"
#include "parallel.h"

/* One of three. */
typedef struct {
    const Linear *whole;
    Columns *columns;
    const Dense *dense;
    float threshold;
} Reader;

SIZE_OF(Reader)

/* Of a rotary kind, for the tokens of a step: cos and signed sin [tokens, rotary]. */
typedef struct {
    const float *cos, *sin;
    int64_t rotary;
} Angles;

SIZE_OF(Angles)

typedef struct {
    const float *before_attention, *after_attention; /* RMS weights [hidden]; after_*: or NULL */
    const float *before_mlp, *after_mlp;
    const float *query_norm, *key_norm; /* [dim], or both NULL */
    Reader qkv, out, up, down;
    int64_t middle;       /* width of the feed-forward */
    const Angles *angles; /* or NULL */
    int64_t window;       /* 0: everything is seen */
} Block;

SIZE_OF(Block)

/* Where a text has the keys and values of one block. */
typedef struct {
    void *keys, *values;  /* [kv, capacity, dim] */
    const Packed *packed; /* NULL, or in place of keys and values */
    int64_t capacity, half;
} Place;

SIZE_OF(Place)

/* A text, and its part of the step's tokens: `tokens` from `first` on. */
typedef struct {
    const Place *places; /* a block each */
    int64_t first, tokens;
    int64_t position; /* of the first of them */
    float *scores;    /* a query head: position + tokens */
} Text;

SIZE_OF(Text)

typedef struct {
    int64_t count, hidden, tokens, texts;
    int64_t tanh_gelu; /* else silu */
    int64_t prompt;    /* many tokens of one text, which attend as attention_prompt.c does it */
    float eps, residual;
    float *h; /* [tokens, hidden], in and out */
    Step step;
    const Block *blocks;
    Text *text; /* [texts] */
} Decoder;

SIZE_OF(Decoder)

typedef struct {
    int64_t next, done;
    char apart[48]; /* a cache line each */
} Stage;

typedef struct {
    const Decoder *d;
    Stage *stages;
    float *x, *y; /* [tokens, ..]: what a linear reads, what it gives */
    Activations act; /* of a linear that is read whole */
    Listed *listed;  /* [tokens], of one that is not */
    char *memory;    /* [tokens, memory_each] */
    int64_t memory_each, threads;
    int *no_memory; /* becomes 1 where there is none */
} Run;

typedef void Piece(const Run *, const Block *, int64_t from, int64_t end);

enum { STAGES = 11, SPINS = 4000, ROWS = 16 /* of a dense piece */ };

static void zero_below(float *restrict x, int64_t n, float threshold) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = fabsf(x[i]) <= threshold ? 0 : x[i];
}

static int64_t inputs_of(const Reader *l) {
    return l->whole ? l->whole->inputs : l->dense ? l->dense->inputs : l->columns->inputs;
}

static void read_input(const Run *r, const Reader *l, int64_t token) {
    const int64_t n = inputs_of(l);
    float *x = r->x + token * n;
    if (l->columns) {
        optim_list(l->columns, x, l->threshold, r->memory + token * r->memory_each,
                   r->listed + token);
        return;
    }
    if (l->threshold >= 0) zero_below(x, n, l->threshold);
    if (l->whole)
        optim_round(l->whole, r->x, (Activations *)&r->act, token);
    else
        arrange(x, x, n);
}

/* The end of the dense piece before `piece`. */
static int64_t row_end(const Dense *d, int64_t piece) {
    return piece * ROWS < d->outputs ? piece * ROWS : d->outputs;
}

static void multiply(const Run *r, const Reader *l, int64_t from, int64_t end) {
    if (l->whole)
        optim_blocks(l->whole, &r->act, r->y, from, end);
    else if (l->dense)
        (l->dense->planes ? optim_bf12_products : optim_bf16_products)(
            l->dense, r->x, r->y, r->d->tokens, from * ROWS, row_end(l->dense, end));
    else
        for (int64_t t = 0; t < r->d->tokens; t++)
            optim_columns(l->columns, r->listed + t, r->y + t * l->columns->outputs, from, end);
}

/* What a linear of the block reads: h of the tokens from..end, normalized. */
static void normalize(const Run *r, const float *norm, int64_t from, int64_t end) {
    const int64_t n = r->d->hidden;
    optim_rms_norm(r->d->h + from * n, norm, r->x + from * n, end - from, n, r->d->eps);
}

/* h += y, normalized where the family does that. */
static void add(const Run *r, const float *norm, int64_t from, int64_t end) {
    const Decoder *d = r->d;
    const int64_t n = d->hidden;
    float *y = r->y + from * n, *h = d->h + from * n;
    if (norm) optim_rms_norm(y, norm, y, end - from, n, d->eps);
    for (int64_t i = 0; i < (end - from) * n; i++) h[i] += d->residual * y[i];
}

static void read_inputs(const Run *r, const Reader *l, int64_t from, int64_t end) {
    for (int64_t t = from; t < end; t++) read_input(r, l, t);
}

static void begin_attention(const Run *r, const Block *b, int64_t from, int64_t end) {
    normalize(r, b->before_attention, from, end);
    read_inputs(r, &b->qkv, from, end);
}

static void qkv(const Run *r, const Block *b, int64_t from, int64_t end) {
    multiply(r, &b->qkv, from, end);
}

/* One key head over the tokens of one text. */
static void text_head(const Run *r, const Block *b, const Text *text, int64_t kv) {
    Step step = r->d->step;
    const Place *place = text->places + (b - r->d->blocks);
    const int64_t dim = step.dim, group = step.heads / step.kv_heads;
    const int64_t width = (step.heads + 2 * step.kv_heads) * dim;
    step.keys = place->keys, step.values = place->values, step.packed = place->packed;
    step.capacity = place->capacity, step.half = place->half, step.window = b->window;
    step.rotary = b->angles ? b->angles->rotary : 0;
    for (int64_t i = 0; i < text->tokens; i++) {
        const int64_t t = text->first + i;
        step.position = text->position + i;
        step.qkv = r->y + t * width, step.out = r->x + t * step.heads * dim;
        if (b->angles) {
            step.cos = b->angles->cos + t * step.rotary;
            step.sin = b->angles->sin + t * step.rotary;
        }
        float *q = step.qkv + kv * group * dim, *k = step.qkv + (step.heads + kv) * dim;
        if (b->query_norm) optim_rms_norm(q, b->query_norm, q, group, dim, r->d->eps);
        if (b->key_norm) optim_rms_norm(k, b->key_norm, k, 1, dim, r->d->eps);
        optim_attend_head(&step, kv,
                          text->scores + kv * group * (text->position + text->tokens));
    }
}

static void heads(const Run *r, const Block *b, int64_t from, int64_t end) {
    const int64_t each = r->d->step.kv_heads;
    for (int64_t i = from; i < end; i++) text_head(r, b, r->d->text + i / each, i % each);
}

static Prompt prompt_of(const Run *r, const Block *b) {
    const Step *step = &r->d->step;
    const Text *text = r->d->text;
    const Place *place = text->places + (b - r->d->blocks);
    const Angles angles = b->angles ? *b->angles : (Angles){0};
    return (Prompt){
        .batch = 1, .tokens = text->tokens, .start = text->position, .out = r->x, .qkv = r->y,
        .heads = step->heads, .kv_heads = step->kv_heads, .dim = step->dim,
        .rotary = angles.rotary, .cos = angles.cos, .sin = angles.sin, .window = b->window,
        .capacity = place->capacity, .half = place->half, .keys = place->keys,
        .values = place->values, .scale = step->scale, .cap = step->cap, .no_memory = r->no_memory,
    };
}

static void store_prompt(const Run *r, const Block *b, int64_t from, int64_t end) {
    const Prompt p = prompt_of(r, b);
    for (int64_t t = from; t < end; t++) {
        float *q = p.qkv + t * (p.heads + 2 * p.kv_heads) * p.dim, *k = q + p.heads * p.dim;
        if (b->query_norm) optim_rms_norm(q, b->query_norm, q, p.heads, p.dim, r->d->eps);
        if (b->key_norm) optim_rms_norm(k, b->key_norm, k, p.kv_heads, p.dim, r->d->eps);
    }
    optim_prompt_store(&p, from, end);
}

static void attend_prompt(const Run *r, const Block *b, int64_t from, int64_t end) {
    const Prompt p = prompt_of(r, b);
    optim_prompt_rows(&p, from, end);
}

static void begin_out(const Run *r, const Block *b, int64_t from, int64_t end) {
    read_inputs(r, &b->out, from, end);
}

static void out(const Run *r, const Block *b, int64_t from, int64_t end) {
    multiply(r, &b->out, from, end);
}

static void begin_mlp(const Run *r, const Block *b, int64_t from, int64_t end) {
    add(r, b->after_attention, from, end);
    normalize(r, b->before_mlp, from, end);
    read_inputs(r, &b->up, from, end);
}

static void up(const Run *r, const Block *b, int64_t from, int64_t end) {
    multiply(r, &b->up, from, end);
}

static void begin_down(const Run *r, const Block *b, int64_t from, int64_t end) {
    const int64_t n = b->middle;
    (r->d->tanh_gelu ? optim_geglu_tanh : optim_swiglu)(r->y + from * 2 * n, r->x + from * n,
                                                        end - from, n);
    read_inputs(r, &b->down, from, end);
}

static void down(const Run *r, const Block *b, int64_t from, int64_t end) {
    multiply(r, &b->down, from, end);
}

static void end_mlp(const Run *r, const Block *b, int64_t from, int64_t end) {
    add(r, b->after_mlp, from, end);
}

static void wait_a_little(int64_t *spins) {
    if (++*spins > SPINS)
        sched_yield();
#if defined(__x86_64__)
    else
        __builtin_ia32_pause();
#endif
}

static void run_stage(const Run *r, const Block *b, Stage *s, Piece *piece, int64_t pieces) {
    const int64_t share = pieces / (r->threads == 1 ? 1 : r->threads * 4);
    const int64_t each = share > 0 ? share : 1;
    int64_t from, spins = 0;
    while ((from = __atomic_fetch_add(&s->next, each, __ATOMIC_RELAXED)) < pieces) {
        const int64_t end = from + each < pieces ? from + each : pieces;
        piece(r, b, from, end);
        __atomic_fetch_add(&s->done, end - from, __ATOMIC_RELEASE);
    }
    while (__atomic_load_n(&s->done, __ATOMIC_ACQUIRE) < pieces) wait_a_little(&spins);
}

static int64_t pieces_of(const Reader *l) {
    if (l->columns) return optim_lines(l->columns);
    if (l->dense) return (l->dense->outputs + ROWS - 1) / ROWS;
    return (l->whole->outputs + optim_rows() - 1) / optim_rows();
}

static void walk(void *data) {
    const Run *r = data;
    const int64_t tokens = r->d->tokens;
    Stage *s = r->stages;
    for (const Block *b = r->d->blocks; b < r->d->blocks + r->d->count; b++) {
        run_stage(r, b, s++, begin_attention, tokens);
        run_stage(r, b, s++, qkv, pieces_of(&b->qkv));
        if (r->d->prompt) {
            const Prompt p = prompt_of(r, b);
            run_stage(r, b, s++, store_prompt, tokens);
            run_stage(r, b, s++, attend_prompt, optim_prompt_pieces(&p));
        } else {
            run_stage(r, b, s++, heads, r->d->texts * r->d->step.kv_heads);
        }
        run_stage(r, b, s++, begin_out, tokens);
        run_stage(r, b, s++, out, pieces_of(&b->out));
        run_stage(r, b, s++, begin_mlp, tokens);
        run_stage(r, b, s++, up, pieces_of(&b->up));
        run_stage(r, b, s++, begin_down, tokens);
        run_stage(r, b, s++, down, pieces_of(&b->down));
        run_stage(r, b, s++, end_mlp, tokens);
    }
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Memory that is divided up; a pass without any finds out how much it takes. */
typedef struct {
    char *begin;
    size_t used;
} Memory;

/* `bytes` on cache lines of their own. */
static void *take(Memory *m, size_t bytes) {
    void *taken = m->begin ? m->begin + m->used : NULL;
    m->used += (bytes + 63) / 64 * 64;
    return taken;
}

static void divide(Run *r, Memory *m) {
    const Decoder *d = r->d;
    const Step *p = &d->step;
    const int64_t attended = p->heads * p->dim;
    int64_t middle = 0;
    for (int64_t i = 0; i < d->count; i++) middle = larger(middle, d->blocks[i].middle);
    const int64_t widest = larger(larger(attended, d->hidden), middle);
    const int64_t given = larger(larger(attended + 2 * p->kv_heads * p->dim, d->hidden),
                                 2 * middle);
    const int64_t rounded = (widest + 63) / 64 * 64; /* whole chunks */
    r->stages = take(m, d->count * STAGES * sizeof(Stage));
    r->x = take(m, d->tokens * widest * sizeof(float));
    r->y = take(m, d->tokens * given * sizeof(float));
    optim_activations(&r->act, d->tokens, rounded,
                      take(m, optim_activations(&r->act, d->tokens, rounded, NULL)));
    if (d->prompt) return; /* with linears that are read whole */
    r->listed = take(m, d->tokens * sizeof(Listed));
    r->memory_each = (optim_listed_bytes(widest) + 63) / 64 * 64;
    r->memory = take(m, d->tokens * r->memory_each);
    for (Text *t = d->text; t < d->text + d->texts; t++)
        t->scores = take(m, p->heads * (t->position + t->tokens) * sizeof(float));
}

/* `d->tokens` tokens through all blocks: `d->h` in and out. Returns nonzero if there is no memory. */
int optim_decode(Decoder *d, int threads, Team *team) {
    int no_memory = 0;
    Run run = {.d = d, .threads = team ? threads : 1, .no_memory = &no_memory};
    Memory memory = {NULL, 0};
    divide(&run, &memory);
    char *held = scratch(OF_THE_CALL, memory.used + 64);
    if (!held) return 1;
    memory = (Memory){held + (64 - (uintptr_t)held % 64), 0};
    divide(&run, &memory);
    memset(run.stages, 0, d->count * STAGES * sizeof(Stage));
    if (run.threads > 1)
        team(walk, &run, (unsigned)threads, 0);
    else
        walk(&run);
    return no_memory;
}
