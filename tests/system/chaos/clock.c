/* The clock of the world, wrong by as many seconds as the file CLOCK_FILE says; the clock that only runs on stays as it is.

   A kernel whose clock is set moves its time of boot with it ("btime" in /proc/stat), and with that the time of creation that ps and
   psutil compute for every process. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int real_open(const char *path, int flags, mode_t mode) {
    static int (*real)(const char *, int, ...);
    if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    return real(path, flags, mode);
}

static long wrong_by(void) {
    static int file = -2;
    char text[32] = {0};
    if (file == -2) {
        const char *name = getenv("CLOCK_FILE");
        file = name ? real_open(name, O_RDONLY | O_CLOEXEC, 0) : -1;
    }
    if (file < 0 || pread(file, text, sizeof text - 1, 0) <= 0) return 0;
    return atol(text);
}

/* What /proc/stat says, with the time of boot moved, in a file of its own. */
static int with_boot_moved(int real) {
    static char text[1 << 20];
    size_t size = 0;
    ssize_t count;
    while (size < sizeof text - 1 && (count = read(real, text + size, sizeof text - 1 - size)) > 0) size += (size_t)count;
    text[size] = 0;
    char *line = strstr(text, "\nbtime ");
    int moved = memfd_create("stat", MFD_CLOEXEC);
    if (moved < 0 || !line) return real;
    char *end = strchr(line + 1, '\n');
    dprintf(moved, "%.*s\nbtime %ld%s", (int)(line - text), text, atol(line + 7) + wrong_by(), end ? end : "");
    lseek(moved, 0, SEEK_SET);
    close(real);
    return moved;
}

static int opened(const char *path, int flags, mode_t mode) {
    int file = real_open(path, flags, mode);
    return file >= 0 && strcmp(path, "/proc/stat") == 0 ? with_boot_moved(file) : file;
}

int open(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    return opened(path, flags, mode);
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
