// io.h - errors and files.
//
// Every program of this project reports a mistake as one line, with exit code 1, or 2 for the command line:
// code calls fail("out/model.bin: version is 7, wanted 3 or 5"), which throws; main runs its body in
// run_main(), which prints the line. Files are little-endian. A Reader checks every length against the file's
// true size. An AtomicFile is written under a temporary name, synced, and renamed, so that a crash or a full
// disk leaves the old file whole.
#pragma once

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file formats are little-endian");

// A mistake in the user's input or machine; what() is the one line to print.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// A mistake on the command line (exit code 2 instead of 1).
struct UsageError : Error {
    using Error::Error;
};

// printf into a string.
__attribute__((format(printf, 1, 2))) inline std::string strf(const char* fmt, ...) {
    va_list a, b;
    va_start(a, fmt);
    va_copy(b, a);
    int n = vsnprintf(nullptr, 0, fmt, a);
    va_end(a);
    std::string s(n > 0 ? n : 0, '\0');
    if (n > 0) vsnprintf(&s[0], n + 1, fmt, b);
    va_end(b);
    return s;
}

template <class... A>
[[noreturn]] inline void fail(const char* fmt, A... a) {
    throw Error(strf(fmt, a...));
}
[[noreturn]] inline void fail(const char* text) { throw Error(text); }

// Runs a program's body; turns exceptions, and output that could not be written, into one line on stderr and
// an exit code: 0 done, 1 bad input or machine, 2 bad command line.
template <class F>
int run_main(const char* program, F body) {
    try {
        int code = body();
        errno = 0;
        if ((fflush(stdout) || ferror(stdout)) && errno != EPIPE)  // nobody reads it any more: no error
            fail("standard output: cannot write: %s", strerror(errno ? errno : EIO));
        return code;
    } catch (const UsageError& e) {
        fflush(stdout);
        fprintf(stderr, "%s: %s\n", program, e.what());
        return 2;
    } catch (const std::bad_alloc&) {
        fflush(stdout);
        fprintf(stderr, "%s: out of memory\n", program);
        return 1;
    } catch (const std::exception& e) {
        fflush(stdout);
        fprintf(stderr, "%s: %s\n", program, e.what());
        return 1;
    }
}

// The shortest decimal that reads back as the same float: "1e-05", where "%.9g" gives 9.99999975e-06.
inline std::string shortest(float v) {
    for (int digits = 1; digits < 9; digits++)
        if (std::string s = strf("%.*g", digits, v); strtof(s.c_str(), nullptr) == v) return s;
    return strf("%.9g", v);
}
// 1234567 -> "1,234,567", for people.
inline std::string commas(uint64_t n) {
    std::string s = std::to_string(n);
    for (int i = (int)s.size() - 3; i > 0; i -= 3) s.insert(i, ",");
    return s;
}
// Bytes as "3.2 GiB", for people.
inline std::string human_bytes(double b) {
    const char* unit[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    int u = 0;
    while (b >= 1024 && u < 6) b /= 1024, u++;
    return strf(u ? "%.1f %s" : "%.0f %s", b, unit[u]);
}

constexpr size_t ceil_div(size_t n, size_t by) { return (n + by - 1) / by; }
constexpr size_t round_up(size_t n, size_t to) { return ceil_div(n, to) * to; }
// a * b in size_t; an overflow is the user's absurd size, named by `what`.
inline size_t checked_mul(size_t a, size_t b, const char* what) {
    size_t r;
    if (__builtin_mul_overflow(a, b, &r)) fail("%s: %zu x %zu is too large to address", what, a, b);
    return r;
}

// A word as a shell reads it: in single quotes where it has characters that a shell takes for its own.
inline std::string shell_quoted(const std::string& word) {
    bool plain = !word.empty();
    for (unsigned char c : word) plain = plain && (isalnum(c) || c >= 0x80 || strchr("_./=:@%+-,", c));
    if (plain) return word;
    std::string quoted = "'";
    for (char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
    return quoted + "'";
}

inline bool file_exists(const std::string& path) {
    struct stat st;
    return stat(path.c_str(), &st) == 0;
}
// For hints that users paste: how the shell finds `name`, a program or a file of the project. The programs
// are in the project's folder, which need not be the current one.
inline std::string beside_program(const std::string& name) {
    std::string folder = ".";
#ifdef __GLIBC__
    const std::string self = program_invocation_name;
    if (size_t slash = self.rfind('/');
        slash != std::string::npos && file_exists(self.substr(0, slash + 1) + name))
        folder = self.substr(0, slash);
#endif
    return shell_quoted(folder + "/" + name);
}
inline std::string dirname_of(const std::string& path) {
    size_t s = path.find_last_of('/');
    return s == std::string::npos ? "." : s == 0 ? "/" : path.substr(0, s);
}
// Makes a folder and its parents.
inline void make_dirs(const std::string& path) {
    for (size_t i = 1; i <= path.size(); i++) {
        if (i < path.size() && path[i] != '/') continue;
        std::string p = path.substr(0, i);
        if (mkdir(p.c_str(), 0777) && errno != EEXIST)
            fail("%s: cannot make the folder: %s", p.c_str(), strerror(errno));
    }
    struct stat st;
    if (stat(path.c_str(), &st) || !S_ISDIR(st.st_mode)) fail("%s: is not a folder", path.c_str());
}

// Makes the renames in a folder durable.
inline void sync_folder(const std::string& path) {
    int dir = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (dir >= 0) fsync(dir), close(dir);
}
inline void rename_file(const std::string& from, const std::string& to) {
    if (rename(from.c_str(), to.c_str()))
        fail("%s: cannot move it to %s: %s", from.c_str(), to.c_str(), strerror(errno));
}

// A 64-bit checksum, word by word, that all but certainly changes with changed, missing or swapped bytes. How
// the data is cut into pieces does not matter. end_section() fills the last word up with zeros, so zeros that
// are missing at a section's end are not noticed: the reader checks lengths itself.
class Checksum {
  public:
    void add(const void* data, size_t bytes) {
        const char* d = (const char*)data;
        for (; bytes; d++, bytes--) {
            if (!filled_)
                for (; bytes >= 8; d += 8, bytes -= 8) {
                    uint64_t w;
                    memcpy(&w, d, 8);
                    mix(w);
                }
            if (!bytes) return;
            word_[filled_++] = *d;
            if (filled_ == 8) end_section();
        }
    }
    void end_section() {
        if (!filled_) return;
        uint64_t w = 0;
        memcpy(&w, word_, filled_);
        mix(w), filled_ = 0;
    }
    uint64_t value() const { return h_; }

  private:
    void mix(uint64_t w) { h_ = (h_ ^ w) * 0x9E3779B97F4A7C15u, h_ ^= h_ >> 29; }
    uint64_t h_ = 0x243F6A8885A308D3u;
    char word_[8];
    size_t filled_ = 0;
};
inline uint64_t checksum_of(const void* data, size_t bytes) {
    Checksum sum;
    sum.add(data, bytes), sum.end_section();
    return sum.value();
}
// A file read from front to back, with its length known.
class Reader {
  public:
    const std::string path;
    uint64_t size = 0, pos = 0;

    explicit Reader(const std::string& p) : path(p) {
        struct stat st;
        fd_ = open(p.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd_ < 0) fail("%s: cannot open: %s", p.c_str(), strerror(errno));
        if (fstat(fd_, &st) || !S_ISREG(st.st_mode)) {
            close(fd_);
            fail("%s: is not a regular file", p.c_str());
        }
        size = (uint64_t)st.st_size;
    }
    ~Reader() { close(fd_); }
    Reader(const Reader&) = delete;
    Reader& operator=(const Reader&) = delete;

    // Reads exactly n bytes of `what` into dst.
    void read(void* dst, size_t n, const char* what) {
        if (n > size - pos)
            fail("%s: truncated in %s: %llu bytes at offset %llu, wanted %zu", path.c_str(), what,
                 (unsigned long long)(size - pos), (unsigned long long)pos, n);
        char* d = (char*)dst;
        while (n) {
            ssize_t k = ::read(fd_, d, n);
            if (k < 0 && errno == EINTR) continue;
            if (k <= 0)
                fail("%s: cannot read %s: %s", path.c_str(), what, k ? strerror(errno) : "the file shrank");
            d += k, n -= k, pos += k;
        }
    }
    void seek(uint64_t to) {
        if (to > size || lseek(fd_, (off_t)to, SEEK_SET) < 0)
            fail("%s: offset %llu lies beyond its %llu bytes", path.c_str(), (unsigned long long)to,
                 (unsigned long long)size);
        pos = to;
    }
    // Reads the header of 256 int32 that starts every .bin file; `kind` names the file's kind.
    std::vector<int32_t> header(int32_t magic, const char* kind) {
        std::vector<int32_t> h(256);
        if (size < 1024)
            fail("%s: is not a %s file: %llu bytes, the header alone has 1024", path.c_str(), kind,
                 (unsigned long long)size);
        read(h.data(), 1024, "header");
        if (h[0] != magic)
            fail("%s: is not a %s file: magic number is %d, wanted %d", path.c_str(), kind, h[0], magic);
        return h;
    }
    void expect_size(uint64_t want) const {
        if (size != want)
            fail("%s: has %llu bytes, its header asks for %llu (%s)", path.c_str(), (unsigned long long)size,
                 (unsigned long long)want, size < want ? "truncated" : "trailing data");
    }
    // The whole file in memory, read only; the caller unmaps `size` bytes. Later changes of the file may
    // show.
    void* map() const {
        void* p = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd_, 0);
        if (p == MAP_FAILED) fail("%s: cannot map it into memory: %s", path.c_str(), strerror(errno));
        return p;
    }
    std::string rest() {
        std::string s(size - pos, '\0');
        read(&s[0], s.size(), "text");
        return s;
    }

  private:
    int fd_ = -1;
};

// The names in a folder but for "." and "..", sorted; none where there is no folder.
inline std::vector<std::string> names_in(const std::string& dir) {
    std::vector<std::string> names;
    DIR* d = opendir(dir.c_str());
    if (!d && errno != ENOENT && errno != ENOTDIR) fail("%s: cannot read: %s", dir.c_str(), strerror(errno));
    if (d) {
        while (dirent* e = readdir(d))
            if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) names.push_back(e->d_name);
        closedir(d);
    }
    std::sort(names.begin(), names.end());
    return names;
}
// An AtomicFile is written as NAME.tmpPID. Given such a name whose process is not alive on this machine,
// returns NAME; else "".
inline std::string abandoned(const std::string& name) {
    const size_t at = name.rfind(".tmp");
    if (at == std::string::npos || name.find_first_not_of("0123456789", at + 4) != std::string::npos)
        return "";
    const int pid = atoi(name.c_str() + at + 4);
    return pid > 0 && kill(pid, 0) && errno == ESRCH ? name.substr(0, at) : "";
}

// A file that appears whole or not at all. Call commit(); without it the destructor discards.
class AtomicFile {
  public:
    explicit AtomicFile(const std::string& path)
        : path_(path), tmp_(path + ".tmp" + std::to_string(getpid())) {
        const std::string dir = dirname_of(path), name = path.substr(path.rfind('/') + 1);
        if (name.empty()) fail("'%s': names no file", path.c_str());
        for (const std::string& other : names_in(dir))  // what a program that was killed has left
            if (abandoned(other) == name) unlink((dir + "/" + other).c_str());
        fd_ = open(tmp_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (fd_ < 0) fail("%s: cannot write: %s", path_.c_str(), strerror(errno));
    }
    ~AtomicFile() {
        if (fd_ >= 0) close(fd_), unlink(tmp_.c_str());
    }
    AtomicFile(const AtomicFile&) = delete;
    AtomicFile& operator=(const AtomicFile&) = delete;

    void write(const void* src, size_t n) {
        const char* s = (const char*)src;
        while (n) {
            ssize_t k = ::write(fd_, s, n);
            if (k < 0 && errno == EINTR) continue;
            if (k <= 0) cannot_write();
            s += k, n -= k;
        }
    }
    void write(const std::string& s) { write(s.data(), s.size()); }
    // Replaces n bytes that were written before, from byte `at` of the file on.
    void overwrite(uint64_t at, const void* src, size_t n) {
        for (size_t done = 0; done < n;) {
            ssize_t k = pwrite(fd_, (const char*)src + done, n - done, (off_t)(at + done));
            if (k < 0 && errno == EINTR) continue;
            if (k <= 0) cannot_write();
            done += (size_t)k;
        }
    }
    void commit() {
        while (fsync(fd_))
            if (errno == EINVAL || errno == EROFS) break;  // not a file that can be synced
            else if (errno != EINTR) cannot_write();
        if (rename(tmp_.c_str(), path_.c_str()))
            fail("%s: cannot rename into place: %s", path_.c_str(), strerror(errno));
        close(fd_), fd_ = -1;
        sync_folder(dirname_of(path_));
    }

  private:
    [[noreturn]] void cannot_write() const {
        fail("%s: cannot write: %s (an earlier file of this name is unchanged)", path_.c_str(),
             strerror(errno));
    }
    std::string path_, tmp_;
    int fd_ = -1;
};
