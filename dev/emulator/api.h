// api.h - how functions of CUDA's interface are implemented: api() runs a body, which throws a cudaError_t
// if it fails.
#pragma once

#include <memory>
#include <mutex>

#include "runtime.h"

namespace emu {

extern std::recursive_mutex api_lock;  // held during each call, so that there is one at a time
cudaError_t set_last_error(cudaError_t e);

inline void want(bool condition, cudaError_t otherwise) {
    if (!condition) throw otherwise;
}

// Runs the body of a call and returns its error. After a fault, every call fails with the fault's code.
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
// Appends work to a stream. It runs at once, or later with lazy streams, or becomes a node of the graph that
// the stream captures.
void submit(cudaStream_t stream, std::function<void()> work);
// The same for a collective. Other work may run between its two parts: `end` runs when something needs it,
// or, in graphs under the descending schedule, when no other node can run. `start` runs after `last`, the end
// of the communicator's collective before it, which becomes this one's end.
struct Event;
void submit_collective(cudaStream_t stream, std::shared_ptr<Event>& last, std::function<void()> start,
                       std::function<void()> end);
void wait_for_stream(cudaStream_t stream);
void wait_for_all();
bool under_capture(cudaStream_t stream);
// For calls that are forbidden during a capture: breaks the capture in progress, if any, and throws.
void not_while_capturing();
// The same for calls that wait for the legacy stream, which only captures in blocking streams forbid.
void no_blocking_stream_under_capture();

}  // namespace emu
