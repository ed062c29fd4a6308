/* DFloat11's exponent stream: count, encode, decode. The format: docs/lossless.md.
 *
 * Codes are written from the highest bit of each byte. A window is 64 bits, a block 512 windows. The
 * encoder gives up whole windows and goes on in the next call, so a tensor of any size passes
 * through a small buffer. The decoder looks up 11 bits at a time, which hold nearly four symbols,
 * and works on six blocks at once: each waits for its own last lookup.
 */
#include <string.h>

#include "optim.h"
#include "parallel.h"

enum { WINDOW = 64, BLOCK = 512 * WINDOW, INDEX = 11, EACH = 5, SYMBOLS = 6, STREAMS = 6 };
enum { CHILD = 0x8000, ROOM = (EACH + 1) * SYMBOLS };
enum { MARK = 0x80 }; /* below the bits that are looked up: tells how far they were shifted */

/* exponents[256] += how often each comes; rest[256] (sign and mantissa) the same of each eighth. */
void optim_df11_count(const uint16_t *w, int64_t n, int64_t *exponents, int64_t *rest) {
    static const int64_t PART = 1 << 24;
    for (int64_t from = 0; from < n; from += PART) {
        const int64_t end = from + PART < n ? from + PART : n;
        uint32_t e[8][256] = {{0}}; /* eight: an increment waits for the one before it */
        int64_t i = from;
        for (; i + 8 <= end; i += 8) {
            for (int k = 0; k < 8; k++) e[k][w[i + k] >> 7 & 0xff]++;
            rest[(w[i] >> 8 & 0x80) | (w[i] & 0x7f)]++;
        }
        for (; i < end; i++) e[0][w[i] >> 7 & 0xff]++;
        for (int v = 0; v < 256; v++)
            for (int k = 0; k < 8; k++) exponents[v] += e[k][v];
    }
}

typedef struct {
    uint64_t word;   /* the unfinished window, right-aligned */
    int64_t bits;    /* in `word` */
    int64_t window;  /* finished windows */
    int64_t element; /* weights so far */
} Writer;

SIZE_OF(Writer)

typedef struct {
    const uint64_t *packed; /* [256]: code << 8 | its length */
    uint64_t word;
    int64_t bits, window, first, room; /* windows from `room` on have no place */
    uint64_t *stream;
    uint8_t *gaps;
    uint32_t *positions;
} Pen;

/* One code that may fill the window; `element` is the index of the next. */
static inline void put(Pen *p, uint64_t entry, int64_t element) {
    const uint64_t value = entry >> 8;
    const int64_t length = entry & 0xff, over = p->bits + length - WINDOW;
    if (over < 0) {
        p->word = p->word << length | value;
        p->bits += length;
        return;
    }
    if (p->window + 1 >= p->room) { /* more than was counted: nothing is written beyond the end */
        p->room = 0;
        return;
    }
    const uint64_t full = p->word << (length - over) | value >> over;
    p->stream[p->window++ - p->first] = __builtin_bswap64(full);
    p->word = value & ((1ull << over) - 1);
    p->bits = over;
    p->gaps[p->window] = (uint8_t)over;
    if (p->window % (BLOCK / WINDOW) == 0)
        p->positions[p->window / (BLOCK / WINDOW)] = (uint32_t)element;
}

static inline uint64_t entry_of(const Pen *p, uint16_t w) { return p->packed[w >> 7 & 0xff]; }

/* Four codes at once where they fit into the window. */
static void put_all(Pen *p, const uint16_t *w, int64_t n, int64_t element) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        const uint64_t a = entry_of(p, w[i]), b = entry_of(p, w[i + 1]);
        const uint64_t c = entry_of(p, w[i + 2]), d = entry_of(p, w[i + 3]);
        const int64_t lb = b & 0xff, ld = d & 0xff, right = (c & 0xff) + ld;
        const int64_t all = (a & 0xff) + lb + right;
        if (__builtin_expect(p->bits + all < WINDOW, 1)) {
            const uint64_t ab = a >> 8 << lb | b >> 8, cd = c >> 8 << ld | d >> 8;
            p->word = p->word << all | ab << right | cd;
            p->bits += all;
            continue;
        }
        put(p, a, element + i + 1), put(p, b, element + i + 2);
        put(p, c, element + i + 3), put(p, d, element + i + 4);
    }
    for (; i < n; i++) put(p, entry_of(p, w[i]), element + i + 1);
}

/* Appends `n` weights. code[256] right-aligned, length[256] in bits. Gets whole windows into
 * `stream`, a byte each into sm, the first code's bit of window k into gaps[k] and the first element
 * of block k into positions[k]. `room`: windows, counted from the first of all, that they hold.
 * Returns the windows written, -1 if there are more. */
int64_t optim_df11_encode(const uint16_t *w, int64_t n, const uint32_t *code,
                          const uint8_t *length, Writer *s, uint64_t *stream, uint8_t *sm,
                          uint8_t *gaps, uint32_t *positions, int64_t room) {
    uint64_t packed[256];
    for (int v = 0; v < 256; v++) packed[v] = (uint64_t)code[v] << 8 | length[v];
    for (int64_t i = 0; i < n; i++) sm[i] = (uint8_t)((w[i] >> 8 & 0x80) | (w[i] & 0x7f));
    Pen pen = {packed, s->word, s->bits, s->window, s->window, room, stream, gaps, positions};
    put_all(&pen, w, n, s->element);
    s->word = pen.word, s->bits = pen.bits, s->window = pen.window, s->element += n;
    return pen.room ? pen.window - pen.first : -1;
}

typedef struct {
    uint8_t symbols[SYMBOLS], bits, count; /* of them all; 0 where the code is longer */
} Entry;

typedef struct {
    const uint8_t *stream;
    int64_t bytes;
    const int64_t *start, *low, *high; /* of each block: first bit, and where its last code ends */
    const int64_t *element;            /* of each block: index in sm and out; one more at the end */
    const uint8_t *sm;
    uint16_t *out;
    const uint16_t *walk; /* [nodes][256]: length << 8 | symbol, CHILD | node, or 0 */
    const Entry *table;
    int64_t bad; /* a block that did not hold, else -1 */
} Job;

typedef struct {
    int64_t at, end; /* bits; 8 bytes can be read before `end` */
    uint8_t *to, *stop;
} Stream;

static uint64_t bits_at(const Job *j, int64_t at) {
    uint64_t word;
    memcpy(&word, j->stream + (at >> 3), 8);
    return __builtin_bswap64(word) << (at & 7);
}

/* The same where fewer than 8 bytes may be left; zeros follow the last. */
static uint64_t last_bits_at(const Job *j, int64_t at) {
    uint8_t bytes[8] = {0};
    const int64_t left = j->bytes - (at >> 3);
    uint64_t word;
    memcpy(bytes, j->stream + (at >> 3), left < 8 ? left : 8);
    memcpy(&word, bytes, 8);
    return __builtin_bswap64(word) << (at & 7);
}

/* One code by the tables of the file; 0 if there is none. */
static int one(const uint16_t *walk, uint64_t bits, uint8_t *symbol) {
    uint16_t entry = CHILD;
    for (int depth = 0; depth < 4 && entry & CHILD; depth++, bits <<= 8)
        entry = walk[(entry & ~CHILD) * 256 + (bits >> 56)];
    if (entry & CHILD) return 0;
    *symbol = (uint8_t)entry;
    return entry >> 8;
}

static void fill(const uint16_t *walk, Entry *table) {
    for (uint64_t index = 0; index < 1 << INDEX; index++) {
        Entry e = {{0}, 0, 0};
        while (e.count < SYMBOLS && e.bits < INDEX) {
            const int length = one(walk, index << (64 - INDEX + e.bits), e.symbols + e.count);
            if (length == 0 || e.bits + length > INDEX) break;
            e.bits += length, e.count++;
        }
        table[index] = e;
    }
}

static int slow(const Job *j, Stream *s) {
    if (s->at >= 8 * j->bytes) return 0;
    const int length = one(j->walk, last_bits_at(j, s->at), s->to);
    s->at += length, s->to++;
    return length;
}

static int fast(const Stream *s) { return s->stop - s->to >= ROOM && s->at < s->end; }

/* EACH lookups in each of `n` streams; 0 if there is no code where one of them is. */
INLINE int lookups(const Job *j, Stream *s, const int n) {
    const Entry *const table = j->table; /* in a register: the bytes written may alias `j` */
    uint64_t bits[STREAMS];
    uint8_t *to[STREAMS];
#pragma GCC unroll 6
    for (int k = 0; k < n; k++) bits[k] = (bits_at(j, s[k].at) & ~255) | MARK, to[k] = s[k].to;
#pragma GCC unroll 5
    for (int i = 0; i < EACH; i++) /* 7 bits are lost to alignment: 5 * 11 + 7 < 64 */
#pragma GCC unroll 6
        for (int k = 0; k < n; k++) {
            const Entry *e = table + (bits[k] >> (64 - INDEX));
            const uint8_t used = e->bits, count = e->count;
            memcpy(to[k], e, sizeof *e);
            bits[k] <<= used & 63, to[k] += count;
        }
#pragma GCC unroll 6
    for (int k = 0; k < n; k++) {
        const int64_t used = __builtin_ctzll(bits[k] / MARK);
        s[k].at += used, s[k].to = to[k];
        if (__builtin_expect(used == 0, 0) && !slow(j, s + k)) return 0;
    }
    return 1;
}

static int alone(const Job *j, Stream *s) {
    while (s->to < s->stop)
        if (fast(s) ? !lookups(j, s, 1) : !slow(j, s)) return 0;
    return 1;
}

static int together(const Job *j, Stream *s) {
    for (;;) {
        int64_t rounds = 1 << 20; /* each takes ROOM symbols and 96 bits at most */
        for (int k = 0; k < STREAMS; k++) {
            const int64_t by_symbols = (s[k].stop - s[k].to) / ROOM, by_bits = (s[k].end - s[k].at) / 96;
            rounds = rounds < by_symbols ? rounds : by_symbols;
            rounds = rounds < by_bits ? rounds : by_bits;
        }
        if (rounds <= 0) return 1;
        for (; rounds > 0; rounds--)
            if (!lookups(j, s, STREAMS)) return 0;
    }
}

static void merge(const uint8_t *restrict sm, const uint8_t *restrict e, uint16_t *restrict out,
                  int64_t n) {
    for (int64_t i = 0; i < n; i++)
        out[i] = (uint16_t)((sm[i] & 0x80) << 8 | e[i] << 7 | (sm[i] & 0x7f));
}

static void together_or_alone(Job *j, int64_t from, int64_t count, uint8_t *room) {
    Stream s[STREAMS];
    for (int64_t k = 0; k < STREAMS; k++) { /* where blocks are lacking, one is done again */
        const int64_t b = from + (k < count ? k : 0);
        uint8_t *to = room + k * (BLOCK + ROOM);
        s[k] = (Stream){j->start[b], 8 * (j->bytes - 7), to,
                        to + j->element[b + 1] - j->element[b]};
    }
    const int begun = count == 1 || together(j, s);
    for (int64_t k = 0; k < count; k++) {
        const int64_t b = from + k, at = j->element[b];
        if (!begun || !alone(j, s + k) || s[k].at < j->low[b] || s[k].at > j->high[b]) {
            __atomic_store_n(&j->bad, b, __ATOMIC_RELAXED);
            return;
        }
        merge(j->sm + at, room + k * (BLOCK + ROOM), j->out + at, j->element[b + 1] - at);
    }
}

static void some_blocks(void *data, int64_t from, int64_t end) {
    Job *j = data;
    uint8_t *room = scratch(OF_THE_THREAD, STREAMS * (BLOCK + ROOM));
    if (!room) __atomic_store_n(&j->bad, from, __ATOMIC_RELAXED);
    for (; from < end && __atomic_load_n(&j->bad, __ATOMIC_RELAXED) < 0; from += STREAMS)
        together_or_alone(j, from, end - from < STREAMS ? end - from : STREAMS, room);
}

/* Returns -1, or a block that does not decode as it should. */
int64_t optim_df11_decode(const uint8_t *stream, int64_t bytes, const int64_t *start,
                          const int64_t *low, const int64_t *high, const int64_t *element,
                          int64_t blocks, const uint8_t *sm, uint16_t *out, const uint16_t *walk,
                          int threads, Team *team) {
    Entry *table = scratch(OF_THE_CALL, sizeof(Entry) << INDEX);
    if (!table) return 0;
    fill(walk, table);
    Job job = {stream, bytes, start, low, high, element, sm, out, walk, table, -1};
    share(some_blocks, &job, blocks, STREAMS, blocks > 4 * STREAMS ? threads : 1, team);
    return job.bad;
}
