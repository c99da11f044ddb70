// runtime.h - what the parts of libemu.so know of one another.
#pragma once

#include <cstdarg>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "emu.h"

namespace emu {

// --- reports.cpp
// A fault: keeps and prints the text unless there is a fault already; all later calls return the code.
// Returns the code.
cudaError_t report(cudaError_t code, const std::string& text);
// The caller's mistake, found before anything was done: keeps and prints the text, and returns the code once.
cudaError_t refuse(cudaError_t code, const std::string& text);
cudaError_t fault_code();  // cudaSuccess, or the code of the fault
__attribute__((format(printf, 1, 2))) std::string format(const char* fmt, ...);
std::string source_of(const void* code);  // "block_sum(float*, int) at file:line" (addr2line, of binutils),
                                          // or as much as is known
std::string name_of(const void* kernel);  // "block_sum"

// --- threads.cpp
bool in_kernel();  // is the calling thread running a CUDA thread?
void run_kernel(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
void parallel(size_t n, const std::function<void(size_t)>& job);  // job(0) .. job(n - 1) on the workers
// A memory fault in a kernel: the handler continues there, on another stack; the kernel ends with a report.
[[noreturn]] void fault_at_address(const std::string& what, const void* instruction);
char* emergency_stack_top();
bool on_fiber_guard(const void* p);

// --- memory.cpp
struct Allocation {
    char* begin;  // aligned to 256 bytes, as late on its pages as that allows
    size_t bytes;
    bool pinned;  // host memory: cudaMallocHost
    char* map;    // its pages, between two that are never accessible
    size_t map_bytes;
    int number;                                  // counts allocations
    std::vector<std::pair<char*, size_t>> gaps;  // registered by poison(), ascending
};
void* allocate(size_t bytes, bool pinned);  // throws cudaErrorMemoryAllocation; null for no bytes
bool release_memory(void* p, bool pinned);  // false where p is no such allocation
const Allocation* find_allocation(const void* p);
// "" where p..p+bytes lies in one allocation and in no gap; else what is wrong, "<what>: ...".
std::string check_range(const void* p, size_t bytes, const char* what);
// After the kernel has run: a report if it wrote where nothing belongs.
void check_patterns(const void* kernel);
void memory_usage(size_t& now, size_t& peak);
void catch_faults();  // for each worker, before it runs kernels

// Device memory is closed to host code (options().host_guard) by each call that waits, and opened by the next
// work that runs: opening and closing at every launch would cost more than most kernels.
void open_device_memory();
void close_device_memory();

}  // namespace emu
