// faults.cpp - makes the n-th call that changes files fail, in an unchanged program (LD_PRELOAD;
// dev/soak/soak.py).
//
// Counted are write, pwrite, fsync, rename, mkdir, unlink, and open for writing, of paths below FAULT_DIR.
// Call number FAULT_AT fails as FAULT_KIND says: ENOSPC, EIO, EINTR (writing and syncing only); SHORT: a
// write takes half of its bytes; KILL: the process ends as by kill -9 just before the call. Then the file
// FAULT_MARK is made.
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <string>

namespace {

std::atomic<long> calls{0};

const char* setting(const char* name) {
    const char* value = getenv(name);
    return value ? value : "";
}
bool below(const std::string& path) {
    std::string dir = setting("FAULT_DIR");
    return !dir.empty() && path.compare(0, dir.size(), dir) == 0;
}
std::string path_of(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path);
    return n > 0 ? std::string(path, (size_t)n) : "";
}
template <class F>
F real(F, const char* name) {
    return (F)dlsym(RTLD_NEXT, name);
}
// Is this call the one? Then it is killed here, or `kind` is what it does.
bool strikes(const std::string& path, std::string* kind) {
    if (!below(path) || ++calls != atol(setting("FAULT_AT"))) return false;
    *kind = setting("FAULT_KIND");
    int mark = real(&::open, "open")(setting("FAULT_MARK"), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
    if (mark >= 0) close(mark);
    if (*kind == "KILL") kill(getpid(), SIGKILL);
    return true;
}
// Sets errno and returns true where the call fails. EINTR is for calls that can be interrupted.
bool fails(const std::string& path, bool interruptible) {
    std::string kind;
    if (!strikes(path, &kind) || kind == "SHORT" || (kind == "EINTR" && !interruptible)) return false;
    errno = kind == "ENOSPC" ? ENOSPC : kind == "EINTR" ? EINTR : EIO;
    return true;
}
// The same for a write, which may be short.
bool fails_to_write(int fd, size_t* n) {
    std::string kind;
    if (!strikes(path_of(fd), &kind)) return false;
    if (kind == "SHORT") return *n = (*n + 1) / 2, false;
    errno = kind == "ENOSPC" ? ENOSPC : kind == "EINTR" ? EINTR : EIO;
    return true;
}

}  // namespace

extern "C" {

ssize_t write(int fd, const void* data, size_t n) {
    if (fails_to_write(fd, &n)) return -1;
    return real(&::write, "write")(fd, data, n);
}
ssize_t pwrite(int fd, const void* data, size_t n, off_t at) {
    if (fails_to_write(fd, &n)) return -1;
    return real(&::pwrite, "pwrite")(fd, data, n, at);
}
ssize_t pwrite64(int fd, const void* data, size_t n, off64_t at) {
    if (fails_to_write(fd, &n)) return -1;
    return real(&::pwrite64, "pwrite64")(fd, data, n, at);
}
int fsync(int fd) { return fails(path_of(fd), true) ? -1 : real(&::fsync, "fsync")(fd); }
int rename(const char* from, const char* to) {
    return fails(to, false) ? -1 : real(&::rename, "rename")(from, to);
}
int mkdir(const char* path, mode_t mode) {
    return fails(path, false) ? -1 : real(&::mkdir, "mkdir")(path, mode);
}
int unlink(const char* path) { return fails(path, false) ? -1 : real(&::unlink, "unlink")(path); }
int open(const char* path, int flags, ...) {
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    if ((flags & O_ACCMODE) != O_RDONLY && fails(path, false)) return -1;
    return real(&::open, "open")(path, flags, mode);
}
}
