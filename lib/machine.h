// machine.h - what a program asks of the machine: large blocks of memory, how much memory is free, threads.
//
// What only Linux has (huge pages, /proc, control groups) stands here alone, each with a fallback, so that
// macOS needs nothing but a compiler with OpenMP (there: libomp). The fallbacks have not been run on macOS.
#pragma once

#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "lib/io.h"

namespace machine {

constexpr size_t HUGE_PAGE = 2 << 20;

// `bytes` of zeroed memory, on huge pages where the system grants them, aligned to a page. `what` names its
// purpose in the error. Never returns null.
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
// Gives back what allocate() returned for the same number of bytes; null is allowed.
inline void release(void* p, size_t bytes) {
    if (p) munmap(p, round_up(std::max<size_t>(bytes, 1), HUGE_PAGE));
}

// Bytes that this process may still take: the machine's, or its control group's if that is less. Where the
// system does not say, all of its memory counts as free.
inline size_t memory_available() {
    size_t best = SIZE_MAX, limit, used;
#ifdef _SC_PHYS_PAGES
    if (long pages = sysconf(_SC_PHYS_PAGES); pages > 0) best = (size_t)pages * (size_t)sysconf(_SC_PAGESIZE);
#endif
    if (FILE* f = fopen("/proc/meminfo", "r")) {
        char line[128];
        size_t kib;
        while (fgets(line, sizeof line, f))
            if (sscanf(line, "MemAvailable: %zu", &kib) == 1) best = kib * 1024;
        fclose(f);
    }
    FILE *m = fopen("/sys/fs/cgroup/memory.max", "r"), *c = fopen("/sys/fs/cgroup/memory.current", "r");
    if (m && c && fscanf(m, "%zu", &limit) == 1 && fscanf(c, "%zu", &used) == 1)
        best = std::min(best, limit > used ? limit - used : 0);
    if (m) fclose(m);
    if (c) fclose(c);
    return best;
}

// The most threads that a parallel region has from now on.
inline void set_threads(int n) { omp_set_num_threads(n); }

// Starts the program again with threads that wait asleep after a short spin, unless the user chose otherwise.
// By default they spin for milliseconds, which on a busy machine takes the time from the thread they wait
// for. GNU's OpenMP library reads the setting before main() begins, hence the second start. Call it first in
// main(). Does nothing where there is no /proc/self/exe.
inline void spin_less(char** argv) {
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0 || getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    self[n] = 0;
    setenv("GOMP_SPINCOUNT", "2000", 1);
    execv(self, argv);  // should it fail, all goes on as it is
}

}  // namespace machine
