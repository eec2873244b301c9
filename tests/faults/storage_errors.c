/* Storage that fails, for tests: loaded with LD_PRELOAD, it makes calls on files below given folders fail.
 *
 * All processes of a run map one control file (STORAGE_ERRORS names it; tests/faults/injection.py writes it), so what
 * fails can be changed while they run, and what has failed can be counted. Three faults, each by itself:
 *
 *   rate       calls of the chosen kinds answer `error` (EIO, ...), at random by a seed
 *   capacity   writes answer ENOSPC once that many bytes have been written by all processes together
 *   read_only  whatever would change a file or a folder answers EROFS
 *
 * Not seen: files that are mapped into memory, and calls that the C library makes to itself (inside fflush and fclose).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READ = 1, WRITE = 2, SYNC = 4, OPEN = 8, RENAME = 16 };

struct control { /* FIELDS of injection.py, little-endian, without padding */
    uint64_t seed;
    double rate; /* of calls that fail, 0 to 1 */
    int64_t capacity; /* bytes that may still be written; negative: no limit */
    uint32_t error, kinds, read_only, unused; /* unused: keeps what follows at a multiple of 8 */
    uint64_t calls; /* that might have failed at random: draw `calls` decides, the same for the same order of calls */
    uint64_t failed, full, refused; /* calls that failed, by each of the faults */
    char folders[4096]; /* absolute, each with ':' after it */
};

static struct control *control;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("STORAGE_ERRORS");
    int file = path ? (int)open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *memory = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory != MAP_FAILED) control = memory;
}

static int inside(const char *path) {
    for (const char *folder = control->folders; *folder;) {
        const char *end = strchr(folder, ':');
        if (!end) return 0;
        size_t length = (size_t)(end - folder);
        if (length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length])) return 1;
        folder = end + 1;
    }
    return 0;
}

static int inside_at(int folder, const char *path) {
    char joined[8192], link[64];
    if (!path) return 0;
    if (*path == '/') return inside(path);
    if (folder == AT_FDCWD) {
        if (!getcwd(joined, 4096)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, joined, 4095);
        if (length <= 0) return 0;
        joined[length] = 0;
    }
    strcat(joined, "/");
    strncat(joined, path, 4000);
    return inside(joined);
}

static int file_inside(int file) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0 || *path != '/') return 0; /* a socket, a pipe */
    path[length] = 0;
    return inside(path);
}

static uint64_t mixed(uint64_t x) { /* splitmix64 */
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static int drawn(int kind) { /* before any path is looked up, so that a call that does not fail costs nothing */
    if (!control || !(control->kinds & (uint32_t)kind) || control->rate <= 0) return 0;
    uint64_t draw = mixed(mixed(control->seed) + __atomic_add_fetch(&control->calls, 1, __ATOMIC_RELAXED));
    return (double)(draw >> 11) * 0x1p-53 < control->rate;
}

static int count(uint64_t *counter, int error) {
    __atomic_add_fetch(counter, 1, __ATOMIC_RELAXED);
    errno = error;
    return 1;
}

static int fails(int kind, int file) {
    return drawn(kind) && file_inside(file) && count(&control->failed, (int)control->error);
}

static int fails_path(int kind, int folder, const char *path) {
    return drawn(kind) && inside_at(folder, path) && count(&control->failed, (int)control->error);
}

/* How many of `size` bytes may be written: fewer, as on a disk that fills up, or -1 and errno. */
static ssize_t allowed(int file, size_t size) {
    if (!control || !size) return (ssize_t)size;
    if (fails(WRITE, file)) return -1;
    int limited = __atomic_load_n(&control->capacity, __ATOMIC_RELAXED) >= 0;
    if ((!limited && !control->read_only) || !file_inside(file)) return (ssize_t)size;
    if (control->read_only) return count(&control->refused, EROFS) ? -1 : 0;
    int64_t left = __atomic_load_n(&control->capacity, __ATOMIC_RELAXED), taken;
    do {
        taken = left < (int64_t)size ? left : (int64_t)size;
        if (taken <= 0) return count(&control->full, ENOSPC) ? -1 : 0;
    } while (!__atomic_compare_exchange_n(&control->capacity, &left, left - taken, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return (ssize_t)taken;
}

static int no_change(int folder, const char *path) {
    return control && control->read_only && inside_at(folder, path) && count(&control->refused, EROFS);
}

static int full_for_new(int folder, const char *path) { /* a new file needs a block of its folder */
    return control && __atomic_load_n(&control->capacity, __ATOMIC_RELAXED) == 0 && inside_at(folder, path) &&
           count(&control->full, ENOSPC);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define READS(result, name, file, declared, passed) \
    result name declared { \
        REAL(name); \
        if (fails(READ, file)) return -1; \
        return real passed; \
    }
READS(ssize_t, read, file, (int file, void *to, size_t size), (file, to, size))
READS(ssize_t, pread, file, (int file, void *to, size_t size, off_t at), (file, to, size, at))
READS(ssize_t, pread64, file, (int file, void *to, size_t size, off64_t at), (file, to, size, at))
READS(ssize_t, readv, file, (int file, const struct iovec *to, int n), (file, to, n))
READS(ssize_t, preadv, file, (int file, const struct iovec *to, int n, off_t at), (file, to, n, at))

size_t fread(void *to, size_t size, size_t n, FILE *stream) {
    REAL(fread);
    return fails(READ, fileno(stream)) ? 0 : real(to, size, n, stream);
}

ssize_t write(int file, const void *from, size_t size) {
    REAL(write);
    ssize_t n = allowed(file, size);
    return n < 0 ? -1 : real(file, from, (size_t)n);
}

ssize_t pwrite(int file, const void *from, size_t size, off_t at) {
    REAL(pwrite);
    ssize_t n = allowed(file, size);
    return n < 0 ? -1 : real(file, from, (size_t)n, at);
}

ssize_t pwrite64(int file, const void *from, size_t size, off64_t at) {
    REAL(pwrite64);
    ssize_t n = allowed(file, size);
    return n < 0 ? -1 : real(file, from, (size_t)n, at);
}

ssize_t writev(int file, const struct iovec *from, int n) {
    REAL(writev);
    size_t size = 0;
    for (int i = 0; i < n; i++) size += from[i].iov_len;
    ssize_t granted = allowed(file, size);
    if (granted < 0) return -1;
    if ((size_t)granted == size) return real(file, from, n);
    for (int i = 0; i < n; i++) /* a short write: the first buffer that has bytes, or as much of it as fits */
        if (from[i].iov_len) {
            size_t one = from[i].iov_len < (size_t)granted ? from[i].iov_len : (size_t)granted;
            REAL(write);
            return real(file, from[i].iov_base, one);
        }
    return 0;
}

size_t fwrite(const void *from, size_t size, size_t n, FILE *stream) {
    REAL(fwrite);
    if (!size || !n) return 0;
    ssize_t granted = allowed(fileno(stream), size * n);
    return granted < 0 ? 0 : real(from, size, (size_t)granted / size, stream);
}

#define SENDS(name, offset) \
    ssize_t name(int to, int from, offset *at, size_t size) { \
        REAL(name); \
        if (fails(READ, from)) return -1; \
        ssize_t n = allowed(to, size); \
        return n < 0 ? -1 : real(to, from, at, (size_t)n); \
    }
SENDS(sendfile, off_t)
SENDS(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t size, unsigned flags) {
    REAL(copy_file_range);
    if (fails(READ, from)) return -1;
    ssize_t n = allowed(to, size);
    return n < 0 ? -1 : real(from, from_at, to, to_at, (size_t)n, flags);
}

#define SYNCS(name) \
    int name(int file) { \
        REAL(name); \
        if (fails(SYNC, file)) return -1; \
        return real(file); \
    }
SYNCS(fsync)
SYNCS(fdatasync)

static int cannot_open(int folder, const char *path, int flags) {
    int changes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    if (fails_path(OPEN, folder, path)) return 1;
    return changes && (no_change(folder, path) || ((flags & O_CREAT) && full_for_new(folder, path)));
}

#define MODE(last) \
    mode_t mode = 0; \
    if ((flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE) { \
        va_list more; \
        va_start(more, last); \
        mode = va_arg(more, mode_t); \
        va_end(more); \
    }
#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        MODE(flags) \
        return cannot_open(AT_FDCWD, path, flags) ? -1 : real(path, flags, mode); \
    }
#define OPENS_AT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        REAL(name); \
        MODE(flags) \
        return cannot_open(folder, path, flags) ? -1 : real(folder, path, flags, mode); \
    }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)

#define STREAMS(name) \
    FILE *name(const char *path, const char *how) { \
        REAL(name); \
        int flags = strpbrk(how, "wa") ? O_RDWR | O_CREAT : strchr(how, '+') ? O_RDWR : O_RDONLY; \
        return cannot_open(AT_FDCWD, path, flags) ? NULL : real(path, how); \
    }
STREAMS(fopen)
STREAMS(fopen64)

int rename(const char *from, const char *to) {
    REAL(rename);
    if (fails_path(RENAME, AT_FDCWD, to) || no_change(AT_FDCWD, to) || no_change(AT_FDCWD, from)) return -1;
    return real(from, to);
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    REAL(renameat);
    if (fails_path(RENAME, to_folder, to) || no_change(to_folder, to) || no_change(from_folder, from)) return -1;
    return real(from_folder, from, to_folder, to);
}

#define CHANGES(name, folder, path, grows, declared, passed) \
    int name declared { \
        REAL(name); \
        if (no_change(folder, path) || (grows && full_for_new(folder, path))) return -1; \
        return real passed; \
    }
CHANGES(mkdir, AT_FDCWD, path, 1, (const char *path, mode_t mode), (path, mode))
CHANGES(mkdirat, folder, path, 1, (int folder, const char *path, mode_t mode), (folder, path, mode))
CHANGES(rmdir, AT_FDCWD, path, 0, (const char *path), (path))
CHANGES(unlink, AT_FDCWD, path, 0, (const char *path), (path))
CHANGES(unlinkat, folder, path, 0, (int folder, const char *path, int flags), (folder, path, flags))
CHANGES(symlink, AT_FDCWD, path, 1, (const char *to, const char *path), (to, path))
CHANGES(link, AT_FDCWD, path, 1, (const char *from, const char *path), (from, path))
CHANGES(chmod, AT_FDCWD, path, 0, (const char *path, mode_t mode), (path, mode))
CHANGES(truncate, AT_FDCWD, path, 0, (const char *path, off_t size), (path, size))
