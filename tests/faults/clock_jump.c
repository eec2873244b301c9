/* A clock that jumps, for tests: loaded with LD_PRELOAD, it moves the wall clock of a process by an offset.
 *
 * All processes of a run map one file of eight bytes (CLOCK_JUMP names it): nanoseconds to add to the time of day, which
 * may change while they run. The monotonic clock and the times of files are left as they are, as on a machine whose
 * clock is set, beside a file server whose clock is not. Waits until a time of day are moved back, so that they last as
 * long as they would after a real jump.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000ll
#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static volatile int64_t *offset;

__attribute__((constructor)) static void start(void) {
    const char *path = getenv("CLOCK_JUMP");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *memory = mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (memory != MAP_FAILED) offset = memory;
}

static int64_t added(void) { return offset ? *offset : 0; }

static struct timespec moved(struct timespec at, int64_t by) {
    int64_t nanoseconds = at.tv_nsec + by % SECOND, seconds = at.tv_sec + by / SECOND;
    if (nanoseconds < 0) nanoseconds += SECOND, seconds--;
    if (nanoseconds >= SECOND) nanoseconds -= SECOND, seconds++;
    if (seconds < 0) seconds = 0;
    return (struct timespec){seconds, nanoseconds};
}

static int of_day(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

int clock_gettime(clockid_t clock, struct timespec *at) {
    REAL(clock_gettime);
    int failed = real(clock, at);
    if (!failed && of_day(clock)) *at = moved(*at, added());
    return failed;
}

int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    REAL(gettimeofday);
    int failed = real(at, zone);
    if (!failed) {
        struct timespec now = moved((struct timespec){at->tv_sec, at->tv_usec * 1000}, added());
        *at = (struct timeval){now.tv_sec, now.tv_nsec / 1000};
    }
    return failed;
}

time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}

#define WAITS(name, clock, declared, passed) \
    int name declared { \
        REAL(name); \
        if (!(clock)) return real passed; \
        struct timespec back = moved(*until, -added()); \
        until = &back; \
        return real passed; \
    }
#define MONOTONIC_CONDITION 2u /* glibc's flag of a condition whose waits are by the monotonic clock */
WAITS(pthread_cond_timedwait, !(c->__data.__wrefs & MONOTONIC_CONDITION),
      (pthread_cond_t *c, pthread_mutex_t *m, const struct timespec *until), (c, m, until))
WAITS(pthread_mutex_timedlock, 1, (pthread_mutex_t *m, const struct timespec *until), (m, until))
WAITS(sem_timedwait, 1, (sem_t *s, const struct timespec *until), (s, until))
WAITS(pthread_cond_clockwait, of_day(clock),
      (pthread_cond_t *c, pthread_mutex_t *m, clockid_t clock, const struct timespec *until), (c, m, clock, until))
WAITS(pthread_mutex_clocklock, of_day(clock), (pthread_mutex_t *m, clockid_t clock, const struct timespec *until),
      (m, clock, until))
WAITS(sem_clockwait, of_day(clock), (sem_t *s, clockid_t clock, const struct timespec *until), (s, clock, until))
WAITS(clock_nanosleep, of_day(clock) && (flags & TIMER_ABSTIME),
      (clockid_t clock, int flags, const struct timespec *until, struct timespec *left), (clock, flags, until, left))

long syscall(long number, ...) { /* what waits by futexes of its own, as Abseil does */
    REAL(syscall);
    long a[6];
    va_list more;
    va_start(more, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(more, long);
    va_end(more);
    if (number == SYS_clock_gettime) return clock_gettime((clockid_t)a[0], (struct timespec *)a[1]);
    struct timespec back;
    if (number == SYS_futex && (a[1] & FUTEX_CLOCK_REALTIME) && a[3]) {
        back = moved(*(struct timespec *)a[3], -added());
        a[3] = (long)&back;
    }
    return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
