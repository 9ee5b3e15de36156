// Preloaded into a job (LD_PRELOAD): counts what its processes do to the files below a folder, writes it down, and
// lets a fault strike at one of these calls.
//
//   FAULTS_FOLDER  the folder, as an absolute path
//   FAULTS_LOG     file to which all processes append one record a call, bytes written included
//   FAULTS_RANK    the rank that is struck (PMIX_RANK, which mpirun and srun set; 0 without a launcher)
//   FAULTS_DELAY   milliseconds that every call takes longer: on a slow disk a save lasts for many steps
//   FAULTS_HOLD    "CALL FILE": before its call CALL (counted from 0) this rank makes FILE and stops itself (SIGSTOP):
//                  whoever waits for FILE may then kill and signal whom it likes
//   FAULTS_REFUSE  "CALL COUNT ERRNO": its calls CALL .. CALL + COUNT - 1 that take space or sync fail with ERRNO; the
//                  first, where it is a write, first takes half of its bytes
//
// A record is a line, "NAME BEGIN|END|DO RANK INODE OFFSET BYTES PATH[ -> PATH]", and then the bytes of a write.
// A sync is written down when it begins and when it ends: what another process writes in between is not covered by it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { kPath = 4096 };

// The next definition of a function: that of the C library.
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static long calls = 0;
static int log_file = -1;

static int number_of(const char* variable) {
  const char* text = getenv(variable);
  return text != NULL ? atoi(text) : 0;
}

static int my_rank(void) { return number_of("PMIX_RANK"); }

static int is_ours(const char* path) {
  const char* folder = getenv("FAULTS_FOLDER");
  return folder != NULL && strncmp(path, folder, strlen(folder)) == 0;
}

// Absolute, with the folder's symbolic links left as they are.
static void full_path(const char* path, char* to) {
  char here[kPath];
  if (path[0] == '/' || getcwd(here, sizeof here) == NULL) snprintf(to, kPath, "%s", path);
  else snprintf(to, 2 * kPath, "%s/%s", here, path[0] == '.' && path[1] == '\0' ? "" : path);
}

static int path_of(int descriptor, char* to) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, to, kPath - 1);
  if (length < 0) return 0;
  to[length] = '\0';
  return is_ours(to);
}

static void write_down(const char* name, const char* when, unsigned long inode, long offset, const void* data,
                       size_t bytes, const char* path, const char* other) {
  const char* log = getenv("FAULTS_LOG");
  if (log == NULL) return;
  if (log_file < 0) log_file = REAL(open)(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  char line[3 * kPath];
  const int length = snprintf(line, sizeof line, "%s %s %d %lu %ld %zu %s%s%s\n", name, when, my_rank(), inode, offset,
                              bytes, path, other ? " -> " : "", other ? other : "");
  const struct iovec parts[] = {{line, (size_t)length}, {(void*)data, data ? bytes : 0}};
  // One call, so that records of several processes do not mix.
  if (writev(log_file, parts, 2) < 0) abort();
}

// Counts a call. 0, or the error with which it shall fail; *first: whether it is the first to fail.
static int strike(int* first) {
  pthread_mutex_lock(&mutex);
  const long call = calls++;
  pthread_mutex_unlock(&mutex);
  usleep(1000 * (unsigned)number_of("FAULTS_DELAY"));
  *first = 0;
  if (my_rank() != number_of("FAULTS_RANK")) return 0;
  const char *hold = getenv("FAULTS_HOLD"), *refuse = getenv("FAULTS_REFUSE");
  long from = 0, count = 0;
  int error = 0, read = 0;
  if (hold != NULL && sscanf(hold, "%ld %n", &from, &read) == 1 && call == from) {
    REAL(close)(REAL(open)(hold + read, O_WRONLY | O_CREAT | O_CLOEXEC, 0666));
    kill(getpid(), SIGSTOP);
  }
  if (refuse == NULL || sscanf(refuse, "%ld %ld %d", &from, &count, &error) != 3) return 0;
  *first = call == from;
  return call >= from && call < from + count ? error : 0;
}

static unsigned long inode_of(int descriptor) {
  struct stat status;
  return fstat(descriptor, &status) == 0 ? (unsigned long)status.st_ino : 0;
}

static int refuse(int error) {
  errno = error;
  return -1;
}

static int on_open(const char* path, int flags, mode_t mode) {
  char full[2 * kPath];
  full_path(path, full);
  const int creates = (flags & O_CREAT) != 0 && is_ours(full) && access(full, F_OK) != 0;
  if (creates) {
    int first = 0;
    const int error = strike(&first);
    if (error) return refuse(error);
  }
  const int descriptor = REAL(open)(path, flags, mode);
  if (creates && descriptor >= 0) write_down("create", "DO", inode_of(descriptor), 0, NULL, 0, full, NULL);
  // Nobody here truncates on opening: it would be missing from the log.
  if (!creates && descriptor >= 0 && (flags & O_TRUNC) && is_ours(full)) {
    write_down("truncate", "DO", inode_of(descriptor), 0, NULL, 0, full, NULL);
  }
  return descriptor;
}

static mode_t mode_argument(int flags, va_list list) { return flags & O_CREAT ? va_arg(list, mode_t) : 0; }

int open(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = mode_argument(flags, list);
  va_end(list);
  return on_open(path, flags, mode);
}

int open64(const char* path, int flags, ...) {
  va_list list;
  va_start(list, flags);
  const mode_t mode = mode_argument(flags, list);
  va_end(list);
  return on_open(path, flags, mode);
}

ssize_t pwrite(int descriptor, const void* data, size_t bytes, off_t offset) {
  char path[kPath];
  if (!path_of(descriptor, path)) return REAL(pwrite)(descriptor, data, bytes, offset);
  int first = 0;
  const int error = strike(&first);
  if (error && !(first && bytes > 1)) return refuse(error);
  const ssize_t done = REAL(pwrite)(descriptor, data, error ? bytes / 2 : bytes, offset);
  if (done > 0) write_down("write", "DO", inode_of(descriptor), offset, data, (size_t)done, path, NULL);
  return done;
}

ssize_t pwrite64(int descriptor, const void* data, size_t bytes, off_t offset) {
  return pwrite(descriptor, data, bytes, offset);
}

static int on_truncate(int descriptor, off_t length) {
  char path[kPath];
  if (!path_of(descriptor, path)) return REAL(ftruncate)(descriptor, length);
  int first = 0;
  const int error = strike(&first);
  if (error) return refuse(error);
  const int result = REAL(ftruncate)(descriptor, length);
  if (result == 0) write_down("truncate", "DO", inode_of(descriptor), length, NULL, 0, path, NULL);
  return result;
}

int ftruncate(int descriptor, off_t length) { return on_truncate(descriptor, length); }
int ftruncate64(int descriptor, off_t length) { return on_truncate(descriptor, length); }

static int on_allocate(int descriptor, int mode, off_t offset, off_t length) {
  char path[kPath];
  if (!path_of(descriptor, path)) return REAL(fallocate)(descriptor, mode, offset, length);
  int first = 0;
  const int error = strike(&first);
  if (error) return refuse(error);
  const int result = REAL(fallocate)(descriptor, mode, offset, length);
  if (result == 0) write_down("allocate", "DO", inode_of(descriptor), offset + length, NULL, 0, path, NULL);
  return result;
}

int fallocate(int descriptor, int mode, off_t offset, off_t length) {
  return on_allocate(descriptor, mode, offset, length);
}
int fallocate64(int descriptor, int mode, off_t offset, off_t length) {
  return on_allocate(descriptor, mode, offset, length);
}

static int on_sync(int descriptor, int (*sync)(int)) {
  char path[kPath];
  if (!path_of(descriptor, path)) return sync(descriptor);
  int first = 0;
  const int error = strike(&first);
  if (error) return refuse(error);
  const unsigned long inode = inode_of(descriptor);
  write_down("sync", "BEGIN", inode, 0, NULL, 0, path, NULL);
  const int result = sync(descriptor);
  if (result == 0) write_down("sync", "END", inode, 0, NULL, 0, path, NULL);
  return result;
}

int fsync(int descriptor) { return on_sync(descriptor, REAL(fsync)); }
int fdatasync(int descriptor) { return on_sync(descriptor, REAL(fdatasync)); }

int rename(const char* from, const char* to) {
  char a[2 * kPath], b[2 * kPath];
  full_path(from, a);
  full_path(to, b);
  if (!is_ours(a) && !is_ours(b)) return REAL(rename)(from, to);
  int first = 0;
  strike(&first);
  struct stat status;
  const unsigned long inode = stat(from, &status) == 0 ? (unsigned long)status.st_ino : 0;
  const int result = REAL(rename)(from, to);
  if (result == 0) write_down("rename", "DO", inode, 0, NULL, 0, a, b);
  return result;
}

static int on_remove(const char* path, int (*removes)(const char*)) {
  char full[2 * kPath];
  full_path(path, full);
  if (!is_ours(full)) return removes(path);
  int first = 0;
  strike(&first);
  const int result = removes(path);
  if (result == 0) write_down("remove", "DO", 0, 0, NULL, 0, full, NULL);
  return result;
}

int unlink(const char* path) { return on_remove(path, REAL(unlink)); }
int remove(const char* path) { return on_remove(path, REAL(remove)); }
