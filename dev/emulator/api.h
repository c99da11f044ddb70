// api.h - how the functions of CUDA's interface are written here: a body that throws the cudaError_t it fails
// with.
#pragma once

#include "runtime.h"

namespace emu {

extern std::recursive_mutex api_lock;  // one call at a time
cudaError_t set_last_error(cudaError_t e);

inline void want(bool condition, cudaError_t otherwise) {
    if (!condition) throw otherwise;
}

// After a fault every call fails with the fault's code.
template <class F>
cudaError_t api(F body) {
    std::lock_guard<std::recursive_mutex> lock(api_lock);
    try {
        if (fault_code() == cudaSuccess) body();
        if (fault_code() != cudaSuccess) throw fault_code();
        return cudaSuccess;
    } catch (cudaError_t e) {
        return set_last_error(e);
    }
}

// --- streams.cpp: all throw cudaError_t
// Appends work to a stream: it runs at once, or later (lazy streams), or becomes a node of the graph under
// capture.
void submit(cudaStream_t stream, std::function<void()> work);
void wait_for_stream(cudaStream_t stream);
void wait_for_all();
bool under_capture(cudaStream_t stream);
// For calls that would disturb a capture in progress: throws, and the capture is broken.
void not_while_capturing();
// The same for calls that wait for the legacy stream.
void no_blocking_stream_under_capture();

}  // namespace emu
