/* Calls kernels by name, with what stands on the standard input, and writes back what they left there.
 *
 *     request   name; buffers; pointers (buffer, offset, target buffer); arguments; two floats
 *     answer    what the function returned, then every buffer
 *
 * All numbers are int64 but the floats. Whole numbers and floats travel in registers of their own on
 * ARM, so one type of function stands for all.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { MOST = 64 };
typedef int64_t Kernel(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                       int64_t, int64_t, int64_t, int64_t, float, float);

static void read_all(void *to, int64_t bytes) {
    if (bytes && fread(to, 1, bytes, stdin) != (size_t)bytes) exit(feof(stdin) ? 0 : 1);
}

static int64_t number(void) {
    int64_t value;
    read_all(&value, sizeof value);
    return value;
}

int main(void) {
    for (;;) {
        char name[MOST] = {0}, *buffer[MOST];
        int64_t size[MOST], a[12] = {0};
        float f[2];
        read_all(name, number());
        const int64_t count = number();
        for (int64_t i = 0; i < count; i++) {
            size[i] = number();
            buffer[i] = malloc(size[i] + 1);
            read_all(buffer[i], size[i]);
        }
        for (int64_t n = number(); n > 0; n--) {
            const int64_t from = number(), offset = number(), to = number();
            *(char **)(buffer[from] + offset) = buffer[to];
        }
        const int64_t arguments = number();
        for (int64_t i = 0; i < arguments; i++) {
            const int64_t is_buffer = number(), value = number();
            a[i] = is_buffer ? (int64_t)(intptr_t)buffer[value] : value;
        }
        read_all(f, sizeof f);
        Kernel *kernel = (Kernel *)dlsym(RTLD_DEFAULT, name);
        if (!kernel) return 2;
        const int64_t made = kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9],
                                    a[10], a[11], f[0], f[1]);
        fwrite(&made, sizeof made, 1, stdout);
        for (int64_t i = 0; i < count; i++) {
            fwrite(buffer[i], 1, size[i], stdout);
            free(buffer[i]);
        }
        fflush(stdout);
    }
}
