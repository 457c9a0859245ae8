/* The clock of the world, wrong by as many seconds as the file CLOCK_FILE says; the clock that only runs on stays as it is. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long wrong_by(void) {
    static int file = -2;
    char text[32] = {0};
    if (file == -2) {
        const char *name = getenv("CLOCK_FILE");
        file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    }
    if (file < 0 || pread(file, text, sizeof text - 1, 0) <= 0) return 0;
    return atol(text);
}

int clock_gettime(clockid_t which, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int result = real(which, now);
    if (result == 0 && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += wrong_by();
    return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    static int (*real)(struct timeval *, void *);
    if (!real) real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
    int result = real(now, zone);
    if (result == 0) now->tv_sec += wrong_by();
    return result;
}
