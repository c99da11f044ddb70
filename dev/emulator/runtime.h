// runtime.h - the internal interfaces between the parts of libemu.so.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "emu.h"

namespace emu {

// --- reports.cpp
// Reports a fault: keeps and prints the text, and makes all later calls return the code. Does nothing if
// there is a fault already. Returns the code of the first fault.
cudaError_t report(cudaError_t code, const std::string& text);
// Refuses a wrong call before anything is done: keeps and prints the text, and returns the code. Later calls
// are not affected.
cudaError_t refuse(cudaError_t code, const std::string& text);
cudaError_t fault_code();  // cudaSuccess, or the code of the fault
__attribute__((format(printf, 1, 2))) std::string format(const char* fmt, ...);
// "block_sum(float*, int) at file:line" from addr2line (binutils), or as much of it as is known
std::string source_of(const void* code);
std::string name_of(const void* kernel);  // "block_sum"

// --- threads.cpp
bool in_kernel();  // whether the caller is inside a kernel
void run_kernel(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
void parallel(size_t n, const std::function<void(size_t)>& job);  // job(0) .. job(n - 1) on the workers
// Ends a kernel with the report of a memory fault. The signal handler continues here, on the emergency stack.
[[noreturn]] void fault_at_address(const std::string& what, const void* instruction);
char* emergency_stack_top();
bool on_fiber_guard(const void* p);

// --- streams.cpp
// Advances the device's clock by what options().milliseconds says; work() names what has run.
void pass_time(const std::function<std::string()>& work);

// --- memory.cpp
struct Allocation {
    char* begin;  // aligned to 256 bytes, as close to the end of the pages as that allows
    size_t bytes;
    bool pinned;  // host memory from cudaMallocHost
    char* map;    // the allocation's pages, between two that are never accessible
    size_t map_bytes;
    int number;                                  // allocations are numbered from 1
    std::vector<std::pair<char*, size_t>> gaps;  // registered by poison(), ascending
};
void* allocate(size_t bytes, bool pinned);  // throws cudaErrorMemoryAllocation; null for 0 bytes
bool release_memory(void* p, bool pinned);  // false if p is not such an allocation
const Allocation* find_allocation(const void* p);
// "" if p..p+bytes is inside one allocation and touches no gap; else what is wrong, as "<what>: ...".
std::string check_range(const void* p, size_t bytes, const char* what);
// Called after a kernel: reports if it wrote to bytes around an allocation or in a gap.
void check_patterns(const void* kernel);
void memory_usage(size_t& now, size_t& peak);
void catch_faults();  // each worker calls this before it runs kernels

// Each call that waits closes device memory to host code (if options().host_guard); the next work that runs
// opens it. Opening and closing it for every launch would take longer than most kernels.
void open_device_memory();
void close_device_memory();

}  // namespace emu
