// machine.h - what a program needs of the machine: large blocks of memory, how much memory is free, threads,
// open files.
//
// What only Linux has (huge pages, /proc, control groups) has a fallback here, so that on macOS the trainer
// and the sampler need nothing but a compiler with OpenMP (there: libomp). This has not been tried.
#pragma once

#include <omp.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <utility>

#include "lib/io.h"

namespace machine {

constexpr size_t HUGE_PAGE = 2 << 20;

// Allocates `bytes` of zeroed memory, aligned to a page, on huge pages if the system grants them. `what`
// names the purpose in the error message. Never returns null.
inline void* allocate(size_t bytes, const char* what) {
    size_t n = round_up(std::max<size_t>(bytes, 1), HUGE_PAGE);
#ifdef MAP_NORESERVE
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
#else
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#endif
    void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) fail("out of memory: %s needs %s", what, human_bytes((double)bytes).c_str());
#ifdef MADV_HUGEPAGE
    madvise(p, n, MADV_HUGEPAGE);
#endif
    return p;
}
// Releases memory that allocate() returned for the same number of bytes; null is allowed.
inline void release(void* p, size_t bytes) {
    if (p) munmap(p, round_up(std::max<size_t>(bytes, 1), HUGE_PAGE));
}

// Memory from allocate() that is released together with its owner. as<T>() is null before it is allocated.
class Memory {
  public:
    Memory() = default;
    Memory(size_t bytes, const char* what) : at_(allocate(bytes, what)), bytes_(bytes) {}
    Memory(Memory&& other) noexcept { *this = std::move(other); }
    Memory& operator=(Memory&& other) noexcept {
        std::swap(at_, other.at_), std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Memory() { release(at_, bytes_); }
    template <class T>
    T* as() const {
        return (T*)at_;
    }

  private:
    void* at_ = nullptr;
    size_t bytes_ = 0;
};

// The number in a file, or after `name` at the start of one of its lines; false where there is none.
inline bool read_number(const std::string& file, const char* name, size_t* number) {
    FILE* f = fopen(file.c_str(), "r");
    if (!f) return false;
    char line[256];
    bool found = false;
    const size_t n = strlen(name);
    while (!found && fgets(line, sizeof line, f))
        found = !strncmp(line, name, n) && sscanf(line + n, "%zu", number) == 1;
    fclose(f);
    return found;
}
// What a container may still take, given the folder of its control group (version 2, else 1); SIZE_MAX
// without a limit. Files that the system can drop from its cache (inactive_file) count as used there, but are
// free.
inline size_t control_group_available(const std::string& root) {
    struct {
        const char *limit, *used, *stat, *cache;
    } versions[] = {{"/memory.max", "/memory.current", "/memory.stat", "inactive_file"},
                    {"/memory/memory.limit_in_bytes", "/memory/memory.usage_in_bytes", "/memory/memory.stat",
                     "total_inactive_file"}};
    for (auto& v : versions) {
        size_t limit, used, cache = 0;
        if (!read_number(root + v.limit, "", &limit) || !read_number(root + v.used, "", &used)) continue;
        read_number(root + v.stat, v.cache, &cache);
        used -= std::min(used, cache);
        return limit > used ? limit - used : 0;
    }
    return SIZE_MAX;
}

// Bytes that this process may still take: the machine's free memory, or its container's if that is less.
// If the system does not tell, all of the machine's memory counts as free.
inline size_t memory_available() {
    size_t best = SIZE_MAX;
#ifdef _SC_PHYS_PAGES
    if (long pages = sysconf(_SC_PHYS_PAGES); pages > 0) best = (size_t)pages * (size_t)sysconf(_SC_PAGESIZE);
#endif
    if (size_t kib; read_number("/proc/meminfo", "MemAvailable:", &kib)) best = kib * 1024;
    return std::min(best, control_group_available("/sys/fs/cgroup"));
}

// Threads for each of `processes` on this machine that compute at the same time. 0: OpenMP's default number,
// for a single process, or because the user or mpirun has already said which processors this one may use.
inline int fair_threads(int processes) {
    const int all = (int)sysconf(_SC_NPROCESSORS_ONLN), ours = omp_get_num_procs();
    return processes > 1 && ours * processes > all && !getenv("OMP_NUM_THREADS")
               ? std::max(1, all / processes)
               : 0;
}

// Sets the number of threads of parallel regions from now on.
inline void set_threads(int n) { omp_set_num_threads(n); }

// Makes this thread, and the threads that it starts from now on, take subnormal numbers (below 1.2e-38) as 0.
// Intel processors take much longer for an operation with one: on a Xeon, a step of a model whose units had
// died took 18 s instead of 1.6 s. Call it in main() before there are other threads.
inline void flush_subnormals() {
#if defined(__x86_64__)
    constexpr unsigned FLUSH_TO_ZERO = 0x8000, DENORMALS_ARE_ZERO = 0x40;
    _mm_setcsr(_mm_getcsr() | FLUSH_TO_ZERO | DENORMALS_ARE_ZERO);
#elif defined(__aarch64__)
    uint64_t fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
    __asm__ volatile("msr fpcr, %0" : : "r"(fpcr | 1 << 24));
#endif
}

// Raises this process's limit of open files, usually 1,024, to n, or as far as the system lets it.
inline void allow_open_files(size_t n) {
    rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return;
    limit.rlim_cur = std::max(limit.rlim_cur, std::min(limit.rlim_max, (rlim_t)n));
    setrlimit(RLIMIT_NOFILE, &limit);
}

// Starts the program again with a setting that lets waiting threads sleep after a short spin, unless the user
// chose otherwise. By default they spin for milliseconds, which on a busy machine takes time from the thread
// that they wait for. GNU's OpenMP library reads the setting before main() begins; hence the second start.
// Call it first in main(). It does nothing where there is no /proc/self/exe.
inline void spin_less(char** argv) {
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0 || getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    self[n] = 0;
    setenv("GOMP_SPINCOUNT", "2000", 1);
    execv(self, argv);  // if it fails, the program continues with the default
}

}  // namespace machine
