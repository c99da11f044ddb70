// runtime.h - what the parts of libemu.so know of one another.
#pragma once

#include <cstdarg>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "emu.h"

namespace emu {

// --- reports (threads.cpp)
// A fault: keeps and prints the text unless there is a fault already; all later calls return the code. Returns the code.
cudaError_t report(cudaError_t code, const std::string& text);
// The caller's mistake, found before anything was done: keeps and prints the text, and returns the code once.
cudaError_t refuse(cudaError_t code, const std::string& text);
cudaError_t fault_code();            // cudaSuccess, or the code of the report
__attribute__((format(printf, 1, 2))) std::string format(const char* fmt, ...);
std::string symbol(const void* code);  // "block_sum", from the program's symbol table
bool in_kernel();                    // is the calling thread running a CUDA thread?

// --- threads (threads.cpp)
// Runs job(0) .. job(n - 1) on the workers.
void parallel(size_t n, const std::function<void(size_t)>& job);
cudaError_t run_kernel(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& body);
// Where this thread's memory faults go (memory.cpp): never returns; ends the kernel with a report.
[[noreturn]] void fault_at_address(const std::string& what, const void* instruction);
char* emergency_stack_top();
bool on_fiber_guard(const void* p);

// --- memory (memory.cpp)
struct Allocation {
    char* begin;  // aligned to 256 bytes, as late on its pages as that allows
    size_t bytes;
    bool pinned;   // host memory: cudaMallocHost
    char* map;     // its pages, between two that are never accessible
    size_t map_bytes;
    int number;    // counts allocations
    std::vector<std::pair<char*, size_t>> gaps;  // registered by poison(), ascending
};
cudaError_t allocate(void** p, size_t bytes, bool pinned);
cudaError_t release_memory(void* p, bool pinned);
const Allocation* find_allocation(const void* p);
// "" where p..p+bytes lies in one allocation and in no gap; else what is wrong, "<what>: ...".
std::string check_range(const void* p, size_t bytes, const char* what);
cudaError_t check_patterns(const char* who, const void* kernel = nullptr);
void memory_usage(size_t& now, size_t& peak);
void catch_faults();                 // for each worker, before it runs kernels

// While one lives, device memory is accessible.
struct DeviceAccess {
    DeviceAccess();
    ~DeviceAccess();
};

// --- streams (host_api.cpp)
extern std::recursive_mutex api_lock;
// Appends work to a stream: runs it at once, later (lazy streams), or makes it a node of the graph under capture.
cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work);
cudaError_t set_last_error(cudaError_t e);

}  // namespace emu
