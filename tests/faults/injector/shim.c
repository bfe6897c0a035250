/* Faults of a machine, for any process that is started with LD_PRELOAD=shim.so.
 *
 * It stands between a program and its C library, counts calls of some kind that touch paths below a folder, and lets
 * the n-th of them fail or misbehave. What is armed can be changed while the process runs (shim_arm, by way of ctypes).
 * Threads and memory have no path: every call of theirs counts.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

/* in the order of KINDS in _shim.py */
enum { OPEN, READ, WRITE, SYNC, CLOSE, RENAME, STAT, MKDIR, UNLINK, ALLOCATE, LOCK, LIST, MAP, THREAD, MEMORY, KINDS };
/* nothing; fail and do nothing; do it and fail; do half; do nothing and return 0. In the order of WAYS in _shim.py. */
enum { NO, BEFORE, AFTER, SHORT, ZERO };

static char root[PATH_MAX], struck[PATH_MAX + 64];
static int armed, kind_armed, way_armed, error_armed;
static long first, last, counts[KINDS];

/* Let the calls nth to nth + times - 1 of a kind go wrong below a folder; a kind of -1 only counts. */
void shim_arm(const char *folder, int kind, long nth, long times, int way, int error) {
    __atomic_store_n(&armed, 0, __ATOMIC_SEQ_CST);
    snprintf(root, sizeof root, "%s", folder);
    memset(counts, 0, sizeof counts);
    struck[0] = 0;
    kind_armed = kind, first = nth, last = nth + times - 1, way_armed = way, error_armed = error;
    __atomic_store_n(&armed, 1, __ATOMIC_SEQ_CST);
}
void shim_disarm(void) { __atomic_store_n(&armed, 0, __ATOMIC_SEQ_CST); }
/* Calls of a kind since arming. */
long shim_count(int kind) { return __atomic_load_n(&counts[kind], __ATOMIC_SEQ_CST); }
/* The first call that went wrong, as "function path"; empty if none has. */
const char *shim_struck(void) { return struck; }

/* The path that a call is about: of a descriptor, of a path, or of a path below a descriptor. */
static void find(char *where, int fd, const char *path) {
    char link[64];
    const char *own = "/proc/self/fd/";
    size_t length = 0;
    if (path && !strncmp(path, own, strlen(own))) fd = atoi(path + strlen(own)), path = NULL;
    if (!path || path[0] != '/') {
        snprintf(link, sizeof link, fd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", fd);
        ssize_t found = readlink(link, where, PATH_MAX - 1);
        if (found > 0) length = found;
    }
    where[length] = 0;
    if (path) snprintf(where + length, PATH_MAX - length, "%s%s", length ? "/" : "", path);
}

/* How this call is to go. */
static int way_of(int kind, const char *name, int fd, const char *path) {
    char where[PATH_MAX] = "";
    int before = errno;
    if (!__atomic_load_n(&armed, __ATOMIC_SEQ_CST)) return NO;
    if (kind != THREAD && kind != MEMORY) {
        find(where, fd, path);
        errno = before;
        if (strncmp(where, root, strlen(root))) return NO;
    }
    long count = __atomic_add_fetch(&counts[kind], 1, __ATOMIC_SEQ_CST);
    if (kind != kind_armed || count < first || count > last) return NO;
    if (count == first) snprintf(struck, sizeof struck, "%s %s", name, where);
    return way_armed;
}

#define REAL(name) ({ static __typeof__(&name) real; if (!real) real = dlsym(RTLD_NEXT, #name); real; })
/* A function that returns a negative number (or a null pointer) and an errno. */
#define WRAP(type, failed, name, kind, fd, path, params, ...) \
    type name params { \
        int way = way_of(kind, #name, fd, path); \
        type result = way == BEFORE ? failed : way == ZERO ? (type)0 : REAL(name)(__VA_ARGS__); \
        if (way == AFTER) result = failed; \
        if (way == BEFORE || way == AFTER) errno = error_armed; \
        return result; \
    }
#define CALL(name, kind, fd, path, params, ...) WRAP(int, -1, name, kind, fd, path, params, __VA_ARGS__)
/* A function that reads or writes: half of it where it is to fall short. */
#define MOVE(name, kind, params, ...) \
    ssize_t name params { \
        int way = way_of(kind, #name, fd, NULL); \
        if (way == SHORT) count = (count + 1) / 2; \
        if (way == BEFORE) return errno = error_armed, -1; \
        return way == ZERO ? 0 : REAL(name)(__VA_ARGS__); \
    }
#define MOVE_MANY(name, kind, params, ...) \
    ssize_t name params { \
        int way = way_of(kind, #name, fd, NULL); \
        struct iovec half = {vector->iov_base, (vector->iov_len + 1) / 2}; \
        if (way == SHORT) vector = &half, count = 1; \
        if (way == BEFORE) return errno = error_armed, -1; \
        return way == ZERO ? 0 : REAL(name)(__VA_ARGS__); \
    }
/* A function that returns the errno. */
#define TELL(name, kind, fd, params, ...) \
    int name params { return way_of(kind, #name, fd, NULL) ? error_armed : REAL(name)(__VA_ARGS__); }

#define MODE \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define OPEN_BY(name, at, params, ...) \
    int name params { \
        MODE int way = way_of(OPEN, #name, at, path); \
        if (way == BEFORE) return errno = error_armed, -1; \
        return REAL(name)(__VA_ARGS__, mode); \
    }
OPEN_BY(open, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN_BY(open64, AT_FDCWD, (const char *path, int flags, ...), path, flags)
OPEN_BY(openat, at, (int at, const char *path, int flags, ...), at, path, flags)
OPEN_BY(openat64, at, (int at, const char *path, int flags, ...), at, path, flags)

MOVE(read, READ, (int fd, void *data, size_t count), fd, data, count)
MOVE(pread, READ, (int fd, void *data, size_t count, off_t at), fd, data, count, at)
MOVE(pread64, READ, (int fd, void *data, size_t count, off64_t at), fd, data, count, at)
MOVE(write, WRITE, (int fd, const void *data, size_t count), fd, data, count)
MOVE(pwrite, WRITE, (int fd, const void *data, size_t count, off_t at), fd, data, count, at)
MOVE(pwrite64, WRITE, (int fd, const void *data, size_t count, off64_t at), fd, data, count, at)
MOVE_MANY(readv, READ, (int fd, const struct iovec *vector, int count), fd, vector, count)
MOVE_MANY(preadv, READ, (int fd, const struct iovec *vector, int count, off_t at), fd, vector, count, at)
MOVE_MANY(preadv64, READ, (int fd, const struct iovec *vector, int count, off64_t at), fd, vector, count, at)
MOVE_MANY(preadv2, READ, (int fd, const struct iovec *vector, int count, off_t at, int f), fd, vector, count, at, f)
MOVE_MANY(preadv64v2, READ, (int fd, const struct iovec *vector, int count, off64_t at, int f), fd, vector, count, at, f)
MOVE_MANY(writev, WRITE, (int fd, const struct iovec *vector, int count), fd, vector, count)
MOVE_MANY(pwritev, WRITE, (int fd, const struct iovec *vector, int count, off_t at), fd, vector, count, at)
MOVE_MANY(pwritev64, WRITE, (int fd, const struct iovec *vector, int count, off64_t at), fd, vector, count, at)
MOVE_MANY(pwritev2, WRITE, (int fd, const struct iovec *vector, int count, off_t at, int f), fd, vector, count, at, f)
MOVE_MANY(pwritev64v2, WRITE, (int fd, const struct iovec *vector, int count, off64_t at, int f), fd, vector, count, at, f)

CALL(fsync, SYNC, fd, NULL, (int fd), fd)
CALL(fdatasync, SYNC, fd, NULL, (int fd), fd)
CALL(close, CLOSE, fd, NULL, (int fd), fd)
CALL(rename, RENAME, AT_FDCWD, old, (const char *old, const char *new), old, new)
CALL(renameat, RENAME, at, old, (int at, const char *old, int to, const char *new), at, old, to, new)
CALL(renameat2, RENAME, at, old, (int at, const char *old, int to, const char *new, unsigned f), at, old, to, new, f)
CALL(link, RENAME, AT_FDCWD, old, (const char *old, const char *new), old, new)
CALL(linkat, RENAME, at, old, (int at, const char *old, int to, const char *new, int f), at, old, to, new, f)
CALL(stat, STAT, AT_FDCWD, path, (const char *path, struct stat *found), path, found)
CALL(stat64, STAT, AT_FDCWD, path, (const char *path, struct stat64 *found), path, found)
CALL(lstat, STAT, AT_FDCWD, path, (const char *path, struct stat *found), path, found)
CALL(lstat64, STAT, AT_FDCWD, path, (const char *path, struct stat64 *found), path, found)
CALL(fstat, STAT, fd, NULL, (int fd, struct stat *found), fd, found)
CALL(fstat64, STAT, fd, NULL, (int fd, struct stat64 *found), fd, found)
CALL(fstatat, STAT, at, path, (int at, const char *path, struct stat *found, int f), at, path, found, f)
CALL(fstatat64, STAT, at, path, (int at, const char *path, struct stat64 *found, int f), at, path, found, f)
CALL(statx, STAT, at, path, (int at, const char *path, int f, unsigned mask, struct statx *found), at, path, f, mask, found)
CALL(statvfs64, STAT, AT_FDCWD, path, (const char *path, struct statvfs64 *found), path, found)
CALL(fstatvfs64, STAT, fd, NULL, (int fd, struct statvfs64 *found), fd, found)
CALL(mkdir, MKDIR, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
CALL(mkdirat, MKDIR, at, path, (int at, const char *path, mode_t mode), at, path, mode)
CALL(unlink, UNLINK, AT_FDCWD, path, (const char *path), path)
CALL(unlinkat, UNLINK, at, path, (int at, const char *path, int f), at, path, f)
CALL(rmdir, UNLINK, AT_FDCWD, path, (const char *path), path)
CALL(ftruncate, ALLOCATE, fd, NULL, (int fd, off_t size), fd, size)
CALL(ftruncate64, ALLOCATE, fd, NULL, (int fd, off64_t size), fd, size)
TELL(posix_fallocate, ALLOCATE, fd, (int fd, off_t at, off_t size), fd, at, size)
TELL(posix_fallocate64, ALLOCATE, fd, (int fd, off64_t at, off64_t size), fd, at, size)
CALL(flock, LOCK, fd, NULL, (int fd, int how), fd, how)
WRAP(DIR *, NULL, opendir, LIST, AT_FDCWD, path, (const char *path), path)
WRAP(DIR *, NULL, fdopendir, LIST, fd, NULL, (int fd), fd)
WRAP(struct dirent64 *, NULL, readdir64, LIST, dirfd(folder), NULL, (DIR *folder), folder)
WRAP(void *, MAP_FAILED, mmap, MAP, fd, NULL, (void *at, size_t size, int prot, int flags, int fd, off_t from), at, size,
     prot, flags, fd, from)
WRAP(void *, MAP_FAILED, mmap64, MAP, fd, NULL, (void *at, size_t size, int prot, int flags, int fd, off64_t from), at,
     size, prot, flags, fd, from)
TELL(pthread_create, THREAD, -1,
     (pthread_t *made, const pthread_attr_t *with, void *(*run)(void *), void *given), made, with, run, given)
TELL(posix_memalign, MEMORY, -1, (void **made, size_t alignment, size_t size), made, alignment, size)
