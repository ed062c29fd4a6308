/* What is gained by not reading parts of memory: the time for some runs of it, not for the others.
 *
 *     cc -O2 -march=native benchmarks/memory_runs.c -o /tmp/memory_runs && /tmp/memory_runs
 *
 * 32 MB are cut into runs of so many bytes, of which a share is left out at random; the others are
 * added up in order, with and without a prefetch 1 KB ahead. The faster one, medians, against all.
 */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { ROUNDS = 11, WINDOWS = 6, AHEAD = 16 };
static const long SIZE = 32L << 20;

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int compare(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Lists the lines of `memory` whose run is not left out; returns how many. */
static long choose(int32_t *lines, long run, double share) {
    long n = 0;
    for (long at = 0; at < SIZE; at += run)
        if (rand() >= share * RAND_MAX)
            for (long line = at; line < at + run; line += 64) lines[n++] = (int32_t)line;
    for (int i = 0; i < AHEAD; i++) lines[n + i] = n ? lines[n - 1] : 0;
    return n;
}

static double read_lines(const char *memory, const int32_t *lines, long n, int ahead) {
    __m256i sum = _mm256_setzero_si256();
    const double start = seconds();
    for (long i = 0; i < n; i++) {
        const __m256i *line = (const __m256i *)(memory + lines[i]);
        if (ahead) __builtin_prefetch(memory + lines[i + ahead]);
        sum = _mm256_add_epi8(sum, _mm256_add_epi8(line[0], line[1]));
    }
    const double taken = seconds() - start;
    volatile int kept = _mm256_extract_epi32(sum, 0);
    (void)kept;
    return taken;
}

static double measure(const char *memory, int32_t *lines, long run, double share) {
    double taken[2][ROUNDS];
    for (int r = 0; r < 2 * ROUNDS; r++) {
        const long n = choose(lines, run, share);
        const char *window = memory + r % WINDOWS * SIZE;
        taken[r % 2][r / 2] = read_lines(window, lines, n, r % 2 ? AHEAD : 0);
    }
    for (int k = 0; k < 2; k++) qsort(taken[k], ROUNDS, sizeof(double), compare);
    const double a = taken[0][ROUNDS / 2], b = taken[1][ROUNDS / 2];
    return a < b ? a : b;
}

int main(void) {
    char *memory = aligned_alloc(2 << 20, WINDOWS * SIZE);
    int32_t *lines = malloc((SIZE / 64 + AHEAD) * sizeof *lines);
    madvise(memory, WINDOWS * SIZE, MADV_HUGEPAGE);
    memset(memory, 1, WINDOWS * SIZE);
    const double all = measure(memory, lines, 2048, 0);
    printf("all: %.1f GB/s\nbytes of a run, time at 40, 50, 60 %% left out\n", SIZE / all / 1e9);
    for (long run = 64; run <= 4096; run *= 2) {
        printf("%5ld", run);
        for (int share = 4; share <= 6; share++)
            printf("  %.2f", measure(memory, lines, run, share / 10.0) / all);
        printf("\n");
    }
}
