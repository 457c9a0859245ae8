/* A disk that errs: writes to a run's journal fail with the error number in the file DISK_FILE; 0, or no file: they succeed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fault(int handle) {
    static int file = -2;
    char link[64], path[4096], text[16] = {0};
    if (file == -2) {
        const char *name = getenv("DISK_FILE");
        file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    }
    if (file < 0 || pread(file, text, sizeof text - 1, 0) <= 0 || atoi(text) == 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 4) return 0;
    path[length] = 0;
    if (!strstr(path, "/journal/") || strcmp(path + length - 4, ".log")) return 0;
    errno = atoi(text);
    return 1;
}

ssize_t write(int handle, const void *bytes, size_t count) {
    static ssize_t (*real)(int, const void *, size_t);
    if (!real) real = (ssize_t (*)(int, const void *, size_t))dlsym(RTLD_NEXT, "write");
    return fault(handle) ? -1 : real(handle, bytes, count);
}

int fsync(int handle) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return fault(handle) ? -1 : real(handle);
}
