/* Work that threads share, and the memory they keep.
 *
 * A thread takes the next pieces whenever it is free: a busy machine slows no one down.
 */
#ifndef OPTIM_PARALLEL_H
#define OPTIM_PARALLEL_H
#include <stdint.h>
#include <stdlib.h>

typedef void Task(void *);
typedef void Team(Task *, void *, unsigned threads, unsigned flags); /* GOMP_parallel */

/* Does the pieces from..end of a job. */
typedef void Pieces(void *job, int64_t from, int64_t end);

typedef struct {
    Pieces *pieces;
    void *job;
    int64_t count, each, next;
} Work;

static void take_pieces(void *work) {
    Work *w = work;
    int64_t from;
    while ((from = __atomic_fetch_add(&w->next, w->each, __ATOMIC_RELAXED)) < w->count)
        w->pieces(w->job, from, from + w->each < w->count ? from + w->each : w->count);
}

/* The pieces 0..count of `job`, `each` at a time; without a team, or where that is all, at once. */
static inline void share(Pieces *pieces, void *job, int64_t count, int64_t each, int threads,
                         Team *team) {
    Work work = {pieces, job, count, each, 0};
    if (team && threads > 1 && count > each)
        team(take_pieces, &work, (unsigned)threads, 0);
    else if (count > 0)
        pieces(job, 0, count);
}

/* What a call shares with its threads, the same of a call that makes such a call, and what each of
 * the threads has for itself. */
enum { OF_THE_CALL, OF_ITS_CALLER, OF_THE_THREAD, SCRATCHES };

/* At least so many bytes, on cache lines, that a thread keeps from call to call; NULL if there is no
 * memory. */
static inline void *scratch(int which, size_t bytes) {
    static _Thread_local void *held[SCRATCHES];
    static _Thread_local size_t size[SCRATCHES];
    if (size[which] < bytes || !held[which]) {
        free(held[which]);
        size[which] = (bytes + bytes / 4 + 127) / 64 * 64; /* what grows a little is not moved each time */
        held[which] = aligned_alloc(64, size[which]);
        if (!held[which]) size[which] = 0;
    }
    return held[which];
}

#endif
