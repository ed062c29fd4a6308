/* The rows of a bf16 head that may give the largest outputs, found in 8 bits; these alone exactly.
 *
 * Of a row w there is a copy v in 8 bits, of an input x what it becomes in 8 bits, a. By the
 * Cauchy-Schwarz inequality
 *
 *     |w x - v a| <= |w - v| |x| + |v| |x - a|
 *
 * and what the sums round comes on top, so each output lies in an interval about v a. A row whose
 * interval ends below the `best`-th largest beginning is not among the `best`: it is not read, and
 * its output is -infinity. The others come out as bf16.c, or bf12.c, has them, in every bit.
 */
#include <math.h>

#include "bf16.h"
#include "optim.h"

enum { SHARED = 64 /* inputs with one scale */, BLOCK = 64 /* rows looked at together */ };

typedef struct {
    Linear codes;       /* v */
    const Dense *dense; /* w, without a bias */
    float *size;        /* [outputs]: |v| */
    float *apart;       /* [outputs]: |w - v| */
} Shortlist;

SIZE_OF(Shortlist)

int optim_linear(const Linear *l, const float *x, float *y, int64_t tokens, int threads, Team *team);

typedef struct {
    const Shortlist *of;
    uint8_t *words;  /* as w4a8.c reads them */
    uint16_t *scale; /* bf16 */
    int rows, flip;
} Making;

/* A length as a float, no less than it is. */
static float length(double square) { return (float)(sqrt(square) * (1 + 1e-6)); }

static const uint16_t *row_of(const Dense *d, int64_t row, uint16_t *room) {
    if (d->weight) return d->weight + row * d->inputs;
    optim_bf12_rows(d->planes, row, row + 1, room);
    return room;
}

/* `count` weights of row `row`, the c-th chunk; adds up the squares of v and w - v. */
static void make_chunk(const Making *m, const uint16_t *w, int64_t count, int64_t row, int64_t c,
                       double *size, double *apart) {
    const Linear *l = &m->of->codes;
    const int64_t at = (row / m->rows * l->chunks + c) * m->rows, lane = row % m->rows;
    float x[SHARED] = {0};
    int8_t q[SHARED];
    int32_t total;
    double kept = 0, lost = 0;
    for (int64_t k = 0; k < count; k++) x[k] = from_bf16(w[k]);
    const uint16_t scale = to_bf16(round_int8(x, SHARED, q, &total) / 127);
    const float worth = from_bf16(scale);
#pragma omp simd reduction(+ : kept, lost)
    for (int64_t k = 0; k < SHARED; k++) {
        const double v = (double)worth * q[k], rest = x[k] - v;
        kept += v * v, lost += rest * rest;
    }
    *size += kept, *apart += lost;
    m->scale[at + lane] = scale;
    for (int64_t k = 0; k < SHARED; k++) {
        const int64_t word = at * (SHARED / 4) + k / 4 * m->rows + lane;
        m->words[word * 4 + k % 4] = (uint8_t)(q[k] + 128) ^ m->flip;
    }
}

static void make_rows(void *job, int64_t from, int64_t end) {
    const Making *m = job;
    const Dense *d = m->of->dense;
    uint16_t room[d->inputs];
    for (int64_t row = from; row < end; row++) {
        const uint16_t *w = row_of(d, row, room);
        double size = 0, apart = 0;
        for (int64_t k = 0; k < d->inputs; k += SHARED)
            make_chunk(m, w + k, d->inputs - k < SHARED ? d->inputs - k : SHARED, row, k / SHARED,
                       &size, &apart);
        m->of->size[row] = length(size), m->of->apart[row] = length(apart);
    }
}

/* Fills the copy of all rows, whose memory is there, and is zero past the last row. */
void optim_shortlist_make(const Shortlist *s, int threads, Team *team) {
    Making job = {s, (uint8_t *)s->codes.weight, (uint16_t *)s->codes.scale, optim_rows(),
                  optim_flip()};
    share(make_rows, &job, s->dense->outputs, 256, threads, team);
}

/* Of an input, what makes half an interval of a row. */
typedef struct {
    float of_apart, of_size;
} Reach;

static Reach reach_of(const float *x, int64_t n) {
    double whole = 0, lost = 0;
    for (int64_t k = 0; k < n; k += SHARED) {
        const int64_t count = n - k < SHARED ? n - k : SHARED;
        int8_t a[SHARED];
        int32_t total;
        const float worth = round_int8(x + k, count, a, &total) / 127.0f;
        for (int64_t i = 0; i < count; i++) {
            const double rest = x[k + i] - (double)worth * a[i];
            whole += (double)x[k + i] * x[k + i], lost += rest * rest;
        }
    }
    /* A sum of n products is off by less than n 2^-24 |w| |x|, in whatever order: four times that
     * covers both sums, and the few steps from here to the comparison. */
    const double sums = (n + SHARED) * 0x1p-22 * (sqrt(whole) + sqrt(lost));
    return (Reach){(float)((sqrt(whole) + sums) * (1 + 1e-6)),
                   (float)((sqrt(lost) + sums) * (1 + 1e-6))};
}

/* The last term is more than what products too small to be normal numbers lose. */
INLINE float half_of(const Shortlist *s, Reach reach, int64_t row) {
    return s->apart[row] * reach.of_apart + s->size[row] * reach.of_size + 1e-30f;
}

/* Puts `value` in place of the smallest of a heap. */
static void push(float *heap, int64_t count, float value) {
    int64_t at = 0, child;
    for (; (child = 2 * at + 1) < count; at = child) {
        if (child + 1 < count && heap[child + 1] < heap[child]) child++;
        if (heap[child] >= value) break;
        heap[at] = heap[child];
    }
    heap[at] = value;
}

/* The `best`-th largest beginning of an interval about y; -infinity if there are not so many. */
static float least_of_best(const Shortlist *s, const float *y, Reach reach, int64_t best) {
    const int64_t rows = s->dense->outputs;
    float heap[best];
    for (int64_t i = 0; i < best; i++) heap[i] = -INFINITY;
    for (int64_t from = 0; from < rows; from += BLOCK) {
        const int64_t end = from + BLOCK < rows ? from + BLOCK : rows;
        float low[BLOCK], top = -INFINITY;
#pragma omp simd reduction(max : top)
        for (int64_t r = from; r < end; r++) {
            low[r - from] = y[r] - half_of(s, reach, r);
            top = low[r - from] > top ? low[r - from] : top;
        }
        for (int64_t i = 0; top > heap[0] && i < end - from; i++)
            if (low[i] > heap[0]) push(heap, best, low[i]);
    }
    return heap[0];
}

typedef struct {
    const Shortlist *of;
    const float *x; /* [inputs], arranged */
    float *y;       /* [outputs]: v a, then the outputs */
    Reach reach;
    float least;
    int64_t read; /* rows */
} Choice;

/* The blocks from..end of rows. */
static void choose(void *job, int64_t from, int64_t end) {
    Choice *c = job;
    const Dense *d = c->of->dense;
    int64_t read = 0;
    for (int64_t first = from * BLOCK; first < end * BLOCK; first += BLOCK) {
        const int64_t count = d->outputs - first < BLOCK ? d->outputs - first : BLOCK;
        int kept[BLOCK], some = 0;
        for (int64_t i = 0; i < count; i++) {
            float *y = c->y + first + i;
            kept[i] = !(*y + half_of(c->of, c->reach, first + i) < c->least); /* also if NaN */
            *y = -INFINITY;
            some |= kept[i];
        }
        for (int64_t i = 0; some && i < count; i++) {
            if (!kept[i]) continue;
            (d->planes ? optim_bf12_products : optim_bf16_products)(d, c->x, c->y, 1, first + i,
                                                                    first + i + 1);
            read++;
        }
    }
    __atomic_fetch_add(&c->read, read, __ATOMIC_RELAXED);
}

/* x [tokens][inputs] -> y [tokens][outputs]: of each token at least the `best` largest, the others
 * minus infinity. Returns how many rows were read, or -1 if there is no memory. */
int64_t optim_shortlist(const Shortlist *s, const float *x, float *y, int64_t tokens, int64_t best,
                        int threads, Team *team) {
    const int64_t inputs = s->dense->inputs, outputs = s->dense->outputs;
    float *given = arranged(x, tokens, inputs);
    if (!given || optim_linear(&s->codes, x, y, tokens, threads, team)) return -1;
    int64_t read = 0;
    for (int64_t t = 0; t < tokens; t++) {
        Choice c = {s, given + t * inputs, y + t * outputs, reach_of(x + t * inputs, inputs), 0, 0};
        c.least = least_of_best(s, c.y, c.reach, best);
        share(choose, &c, (outputs + BLOCK - 1) / BLOCK, 64, threads, team);
        read += c.read;
    }
    return read;
}
