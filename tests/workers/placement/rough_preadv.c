// preadv and preadv2 as they are on a bad day, for the one file whose inode ROUGH_INODE names.
//
// ROUGH says in which way. What is asked for in 4096 bytes or less is let through: it is how a file
// is tried out. Everything else goes to the libc below, so what is read is what lies there.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

typedef ssize_t Preadv2(int, const struct iovec*, int, off_t, int);

enum { kTried = 4096, kNumMeet = 3 };
static const off_t kBadFrom = 1 << 20;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t met = PTHREAD_COND_INITIALIZER;
static int num_inside;

static int refused(int error) {
  errno = error;
  return -1;
}

static int is(const char* way) {
  const char* wanted = getenv("ROUGH");
  return wanted && !strcmp(wanted, way);
}

static int is_rough(int descriptor, size_t num_bytes) {
  const char* inode = getenv("ROUGH_INODE");
  struct stat status;
  return inode && num_bytes > kTried && !fstat(descriptor, &status) &&
         status.st_ino == strtoull(inode, NULL, 10);
}

static ssize_t forward(int descriptor, const struct iovec* to, int count, off_t at, int flags) {
  static Preadv2* real;
  if (!real) real = (Preadv2*)dlsym(RTLD_NEXT, "preadv2");
  return real(descriptor, to, count, at, flags);
}

// Nothing to be had, an interruption, or less than was asked for: a third each, by turns.
static ssize_t halting(int descriptor, const struct iovec* to, off_t at, int flags) {
  static _Atomic unsigned num_calls;
  const unsigned turn = num_calls++ % 3;
  if (turn < 2) return refused(turn ? EINTR : EAGAIN);
  struct iovec part = *to;
  part.iov_len = part.iov_len / 3 / 512 * 512 + 512;  // direct reads come in whole sectors
  return forward(descriptor, &part, 1, at, flags);
}

// Nobody gets on before so many are here, which all then do.
static void meet(void) {
  pthread_mutex_lock(&mutex);
  if (++num_inside == kNumMeet) pthread_cond_broadcast(&met);
  while (num_inside < kNumMeet) pthread_cond_wait(&met, &mutex);
  pthread_mutex_unlock(&mutex);
}

// Says that it is here by a file, and waits for another to be removed.
static void stop_at_gate(void) {
  const char* gate = getenv("ROUGH_GATE");
  char arrived[4096] = "";
  strncat(arrived, gate, sizeof arrived - 16);
  strcat(arrived, ".arrived");
  close(open(arrived, O_CREAT | O_WRONLY, 0600));
  while (!access(gate, F_OK)) usleep(1000);
}

ssize_t preadv2(int descriptor, const struct iovec* to, int count, off_t at, int flags) {
  if (!is_rough(descriptor, to->iov_len)) return forward(descriptor, to, count, at, flags);
  if (is("halting")) return halting(descriptor, to, at, flags);
  if (is("refusing") && (flags || fcntl(descriptor, F_GETFL) & O_DIRECT))
    return refused(at % (1 << 17) ? EINVAL : EOPNOTSUPP);
  if (is("broken") && at >= kBadFrom) return refused(EIO);
  if (is("hung")) return refused(EAGAIN);
  if (is("meeting")) meet();
  if (is("gated")) stop_at_gate();
  return forward(descriptor, to, count, at, flags);
}

ssize_t preadv(int descriptor, const struct iovec* to, int count, off_t at) {
  return preadv2(descriptor, to, count, at, 0);
}

ssize_t preadv64(int descriptor, const struct iovec* to, int count, off_t at) {
  return preadv2(descriptor, to, count, at, 0);
}

ssize_t preadv64v2(int descriptor, const struct iovec* to, int count, off_t at, int flags) {
  return preadv2(descriptor, to, count, at, flags);
}
