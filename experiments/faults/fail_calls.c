/* Fails file-system calls that change something below $FAULT_ROOT, by LD_PRELOAD.

   Calls are counted from 1. Call number `at` fails with errno `code`, and with `sticky`
   every later one: nothing more reaches the disk, as after a kill or a power cut. With
   `code` 0 the process is killed before the call. With `only`, calls on other paths than
   those that hold it do not count.
   fault_arm() sets them in the process; FAULT_AT, FAULT_ERRNO, FAULT_STICKY, FAULT_ONLY
   before it starts. Calls by descriptor are looked up in /proc/self/fd. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls, at;
static atomic_int code = ENOSPC, sticky;
static char root[4096], only[256];

void fault_arm(long call, int number, int forever) {
  calls = 0;
  code = number;
  sticky = forever;
  at = call;
}

long fault_calls(void) { return calls; }

__attribute__((constructor)) static void begin(void) {
  const char *value = getenv("FAULT_ROOT");
  if (value) snprintf(root, sizeof root, "%s", value);
  if ((value = getenv("FAULT_ONLY"))) snprintf(only, sizeof only, "%s", value);
  if ((value = getenv("FAULT_ERRNO"))) code = atoi(value);
  if ((value = getenv("FAULT_STICKY"))) sticky = atoi(value);
  if ((value = getenv("FAULT_AT"))) at = atol(value);
}

static int below(const char *path) {
  size_t n = strlen(root);
  /* Not what lies beside it under a longer name: the run's stderr. */
  return path && n && strncmp(path, root, n) == 0 && (!path[n] || path[n] == '/') &&
         strstr(path, only);
}

static int below_fd(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return below(path);
}

static int below_at(int fd, const char *path) {
  return path && (path[0] == '/' || fd == AT_FDCWD ? below(path) : below_fd(fd));
}

static int fails(int counts) {
  if (!counts || at <= 0) return 0;
  long n = atomic_fetch_add(&calls, 1) + 1;
  if (n != at && !(sticky && n > at)) return 0;
  if (!code) kill(getpid(), SIGKILL);
  errno = code;
  return 1;
}

#define REAL(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define WRAP(type, name, counts, args, ...)                 \
  type name args {                                          \
    if (fails(counts)) return -1;                           \
    return REAL(name)(__VA_ARGS__);                         \
  }

WRAP(ssize_t, write, below_fd(fd), (int fd, const void *p, size_t n), fd, p, n)
WRAP(ssize_t, pwrite, below_fd(fd), (int fd, const void *p, size_t n, off_t o), fd, p, n, o)
WRAP(ssize_t, pwrite64, below_fd(fd), (int fd, const void *p, size_t n, off64_t o), fd, p, n, o)
WRAP(ssize_t, writev, below_fd(fd), (int fd, const struct iovec *v, int n), fd, v, n)
WRAP(ssize_t, pwritev, below_fd(fd), (int fd, const struct iovec *v, int n, off_t o), fd, v, n, o)
WRAP(ssize_t, sendfile, below_fd(out), (int out, int in, off_t *o, size_t n), out, in, o, n)
WRAP(int, fsync, below_fd(fd), (int fd), fd)
WRAP(int, fdatasync, below_fd(fd), (int fd), fd)
WRAP(int, ftruncate, below_fd(fd), (int fd, off_t n), fd, n)
WRAP(int, ftruncate64, below_fd(fd), (int fd, off64_t n), fd, n)
WRAP(int, rename, below(b), (const char *a, const char *b), a, b)
WRAP(int, renameat, below_at(d, b), (int c, const char *a, int d, const char *b), c, a, d, b)
WRAP(int, renameat2, below_at(d, b), (int c, const char *a, int d, const char *b, unsigned f), c, a, d, b, f)
WRAP(int, link, below(b), (const char *a, const char *b), a, b)
WRAP(int, mkdir, below(path), (const char *path, mode_t m), path, m)
WRAP(int, mkdirat, below_at(d, path), (int d, const char *path, mode_t m), d, path, m)
WRAP(int, unlink, below(path), (const char *path), path)
WRAP(int, unlinkat, below_at(d, path), (int d, const char *path, int f), d, path, f)
WRAP(int, rmdir, below(path), (const char *path), path)

#define OPEN(name)                                                     \
  int name(const char *path, int flags, ...) {                         \
    va_list more;                                                      \
    va_start(more, flags);                                             \
    mode_t mode = va_arg(more, mode_t);                                \
    va_end(more);                                                      \
    if (fails((flags & O_ACCMODE) != O_RDONLY && below(path))) return -1; \
    return REAL(name)(path, flags, mode);                              \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                   \
  int name(int fd, const char *path, int flags, ...) {                 \
    va_list more;                                                      \
    va_start(more, flags);                                             \
    mode_t mode = va_arg(more, mode_t);                                \
    va_end(more);                                                      \
    if (fails((flags & O_ACCMODE) != O_RDONLY && below_at(fd, path))) return -1; \
    return REAL(name)(fd, path, flags, mode);                          \
  }
OPENAT(openat)
OPENAT(openat64)
