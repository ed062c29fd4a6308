/* All blocks of a decoder for one token, over packed weights, in one call.
 *
 *     h += attention(norm(h));  h += mlp(norm(h))      for each block
 *
 * A linear is read whole, small inputs as zeros, or input by input without those that are small.
 *
 * The work is a row of stages, a stage some pieces. A thread takes pieces as long as there are any,
 * then waits until all of that stage are done. No thread waits for one that has not come, so that a
 * busy machine, or a smaller team than was asked for, costs time only.
 */
#include <math.h>
#include <sched.h>
#include <string.h>

#include "optim.h"
#include "parallel.h"

typedef struct {
    const Linear *whole;
    Columns *columns; /* where `whole` is NULL */
    float threshold;
} Reader;

SIZE_OF(Reader)

typedef struct {
    const float *before_attention, *after_attention; /* RMS weights [hidden]; after_*: or NULL */
    const float *before_mlp, *after_mlp;
    const float *query_norm, *key_norm; /* [dim], or both NULL */
    Reader qkv, out, up, down;
    int64_t middle;         /* width of the feed-forward */
    const float *cos, *sin; /* [rotary], or both NULL */
    void *keys, *values;    /* [kv, capacity, dim] */
    const Packed *packed;   /* NULL, or in place of keys and values */
    int64_t capacity;
    int64_t window; /* 0: everything is seen */
} Block;

SIZE_OF(Block)

typedef struct {
    int64_t count, hidden;
    int64_t tanh_gelu;             /* else silu */
    float eps, residual;
    float *h; /* [hidden], in and out */
    Step step;
    const Block *blocks;
} Decoder;

SIZE_OF(Decoder)

typedef struct {
    int64_t next, done;
    char apart[48]; /* a cache line each */
} Stage;

typedef struct {
    const Decoder *d;
    Stage *stages;
    float *x, *y; /* what is rounded, what a linear gives */
    Activations act; /* of a linear that is read whole */
    Listed *listed;  /* of one that is not */
    char *memory;
    int64_t threads;
} Run;

typedef void Piece(const Run *, const Block *, int64_t from, int64_t end);

enum { STAGES = 10, SPINS = 4000 };

static void zero_below(float *restrict x, int64_t n, float threshold) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = fabsf(x[i]) <= threshold ? 0 : x[i];
}

static void read_input(const Run *r, const Reader *l) {
    if (l->whole && l->threshold >= 0) zero_below(r->x, l->whole->inputs, l->threshold);
    if (l->whole)
        optim_round(l->whole, r->x, (Activations *)&r->act, 0);
    else
        optim_list(l->columns, r->x, l->threshold, r->memory, r->listed);
}

static void multiply(const Run *r, const Reader *l, int64_t from, int64_t end) {
    if (l->whole)
        optim_blocks(l->whole, &r->act, r->y, 1, from, end);
    else
        optim_columns(l->columns, r->listed, r->y, from, end);
}

static void begin_attention(const Run *r, const Block *b, int64_t from, int64_t end) {
    (void)from, (void)end;
    optim_rms_norm(r->d->h, b->before_attention, r->x, 1, r->d->hidden, r->d->eps);
    read_input(r, &b->qkv);
}

static void qkv(const Run *r, const Block *b, int64_t from, int64_t end) {
    multiply(r, &b->qkv, from, end);
}

static void heads(const Run *r, const Block *b, int64_t from, int64_t end) {
    Step step = r->d->step;
    const int64_t dim = step.dim, group = step.heads / step.kv_heads;
    step.qkv = r->y, step.out = r->x;
    step.keys = b->keys, step.values = b->values, step.packed = b->packed;
    step.capacity = b->capacity, step.window = b->window;
    step.cos = b->cos, step.sin = b->sin;
    if (!b->cos) step.rotary = 0;
    for (int64_t kv = from; kv < end; kv++) {
        float *q = r->y + kv * group * dim, *k = r->y + (step.heads + kv) * dim;
        if (b->query_norm) optim_rms_norm(q, b->query_norm, q, group, dim, r->d->eps);
        if (b->key_norm) optim_rms_norm(k, b->key_norm, k, 1, dim, r->d->eps);
        optim_attend_head(&step, kv);
    }
}

static void begin_out(const Run *r, const Block *b, int64_t from, int64_t end) {
    (void)from, (void)end;
    read_input(r, &b->out);
}

static void out(const Run *r, const Block *b, int64_t from, int64_t end) {
    multiply(r, &b->out, from, end);
}

/* h += y, normalized where the family does that. */
static void add(const Run *r, const float *norm) {
    const Decoder *d = r->d;
    if (norm) optim_rms_norm(r->y, norm, r->y, 1, d->hidden, d->eps);
    for (int64_t i = 0; i < d->hidden; i++) d->h[i] += d->residual * r->y[i];
}

static void begin_mlp(const Run *r, const Block *b, int64_t from, int64_t end) {
    (void)from, (void)end;
    add(r, b->after_attention);
    optim_rms_norm(r->d->h, b->before_mlp, r->x, 1, r->d->hidden, r->d->eps);
    read_input(r, &b->up);
}

static void up(const Run *r, const Block *b, int64_t from, int64_t end) {
    multiply(r, &b->up, from, end);
}

static void begin_down(const Run *r, const Block *b, int64_t from, int64_t end) {
    (void)from, (void)end;
    (r->d->tanh_gelu ? optim_geglu_tanh : optim_swiglu)(r->y, r->x, 1, b->middle);
    read_input(r, &b->down);
}

static void down(const Run *r, const Block *b, int64_t from, int64_t end) {
    multiply(r, &b->down, from, end);
}

static void end_mlp(const Run *r, const Block *b, int64_t from, int64_t end) {
    (void)from, (void)end;
    add(r, b->after_mlp);
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
    if (!l->whole) return optim_lines(l->columns);
    return (l->whole->outputs + optim_rows() - 1) / optim_rows();
}

static void walk(void *data) {
    const Run *r = data;
    Stage *s = r->stages;
    for (const Block *b = r->d->blocks; b < r->d->blocks + r->d->count; b++) {
        run_stage(r, b, s++, begin_attention, 1);
        run_stage(r, b, s++, qkv, pieces_of(&b->qkv));
        run_stage(r, b, s++, heads, r->d->step.kv_heads);
        run_stage(r, b, s++, begin_out, 1);
        run_stage(r, b, s++, out, pieces_of(&b->out));
        run_stage(r, b, s++, begin_mlp, 1);
        run_stage(r, b, s++, up, pieces_of(&b->up));
        run_stage(r, b, s++, begin_down, 1);
        run_stage(r, b, s++, down, pieces_of(&b->down));
        run_stage(r, b, s++, end_mlp, 1);
    }
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* One token through all blocks: `d->h` in and out. Returns nonzero if there is no memory. */
int optim_decode(Decoder *d, int threads, Team *team) {
    const Step *p = &d->step;
    const int64_t attended = p->heads * p->dim, scores = p->heads * (p->position + 1);
    int64_t middle = 0;
    for (int64_t i = 0; i < d->count; i++) middle = larger(middle, d->blocks[i].middle);
    const int64_t widest = larger(larger(attended, d->hidden), middle);
    const int64_t given = larger(larger(attended + 2 * p->kv_heads * p->dim, d->hidden),
                                 2 * middle);
    const int64_t rounded = widest + 64; /* whole chunks */
    const int64_t listed = optim_listed_bytes(widest);
    const size_t stages = d->count * STAGES * sizeof(Stage);
    const int64_t all = widest + given + scores + 2 * rounded;
    char *memory = scratch(OF_THE_CALL, stages + all * sizeof(float) + listed + rounded);
    if (!memory) return 1;
    Listed list;
    Run run = {.d = d, .stages = memset(memory, 0, stages), .listed = &list};
    run.threads = team ? threads : 1;
    run.x = (float *)(memory + stages);
    run.y = run.x + widest;
    d->step.scratch = run.y + given;
    run.act.scales = d->step.scratch + scores;
    run.act.sums = run.act.scales + rounded;
    run.memory = (char *)(run.act.sums + rounded);
    run.act.values = (int8_t *)(run.memory + listed);
    if (run.threads > 1)
        team(walk, &run, (unsigned)threads, 0);
    else
        walk(&run);
    return 0;
}
