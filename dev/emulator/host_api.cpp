// host_api.cpp - the CUDA runtime's host functions: errors, devices, memory, streams, events, graphs.
//
// A stream counts its operations; an operation may have to wait for operations of other streams, which always were
// submitted earlier, so completing one is a plain recursion. Eager streams run each operation where it is submitted,
// lazy ones where something waits for it: then only what the dependencies demand has run.
#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <thread>

#include "runtime.h"

namespace emu {

std::recursive_mutex api_lock;
static thread_local cudaError_t last_error = cudaSuccess;

cudaError_t set_last_error(cudaError_t e) { return last_error = e; }

// Opens each API function: one at a time, and none after a fault.
#define API                                                 \
    std::lock_guard<std::recursive_mutex> api_guard(api_lock); \
    if (fault_code() != cudaSuccess) return failed(fault_code())
// Those that a graph capture in progress does not allow.
#define API_OUTSIDE_CAPTURE \
    API;                    \
    if (capture_forbids()) return failed(cudaErrorStreamCaptureUnsupported)

static cudaError_t failed(cudaError_t e) {
    if (e != cudaSuccess) last_error = e;
    return e;
}

// ---------------------------------------------------------------------------------------------
// Streams, events, graphs

struct Stream;
struct Dependency {
    Stream* stream;
    uint64_t index;  // its operations before this one must be complete
};
struct Operation {
    std::function<cudaError_t()> work;
    std::vector<Dependency> after;
};

// A graph: nodes in the order of their capture, which is one that respects the edges.
struct Node {
    std::function<cudaError_t()> work;
    std::vector<size_t> after;
};
struct Graph {
    std::vector<Node> nodes;
};

struct Capture {
    cudaStreamCaptureMode mode;
    Stream* origin;
    std::thread::id thread;
    std::unique_ptr<Graph> graph;
    bool invalid = false;
};

struct Stream {
    bool blocking = true;  // ordered against the legacy default stream
    int priority = 0;
    std::deque<Operation> queue;
    uint64_t submitted = 0, completed = 0;
    std::shared_ptr<Capture> capture;
    std::set<size_t> tail;  // under capture: the nodes that the next one comes after
};

struct Event {
    bool timed = true, recorded = false;
    Dependency point = {nullptr, 0};
    std::shared_ptr<std::chrono::steady_clock::time_point> time;
    std::shared_ptr<Capture> capture;  // recorded in a stream under capture
    std::set<size_t> nodes;
};

// None of these is ever destroyed: work may end after main.
static Stream& legacy = *new Stream;
static std::vector<Stream*>& streams = *new std::vector<Stream*>{&legacy};
static std::set<Stream*>& dead_streams = *new std::set<Stream*>;
static std::set<Event*>& events = *new std::set<Event*>;
static std::set<Graph*>&graphs = *new std::set<Graph*>, &executables = *new std::set<Graph*>;
static std::set<std::shared_ptr<Capture>>& captures = *new std::set<std::shared_ptr<Capture>>;  // in progress

// The stream of a handle; null for a handle that is none.
static Stream* stream_of(cudaStream_t handle) {
    if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) return &legacy;
    auto it = std::find(streams.begin(), streams.end(), (Stream*)handle);
    return it == streams.end() ? nullptr : *it;
}

static cudaError_t complete(Stream* s, uint64_t index) {
    while (s->completed < index) {
        Operation op = std::move(s->queue.front());
        s->queue.pop_front();
        for (const Dependency& d : op.after) complete(d.stream, d.index);
        if (op.work && fault_code() == cudaSuccess) op.work();
        s->completed++;
    }
    return fault_code();
}
static cudaError_t complete_all() {
    for (size_t i = streams.size(); i-- > 0;) complete(streams[i], streams[i]->submitted);
    return fault_code();
}

// --- capture

static cudaError_t invalidate(const std::shared_ptr<Capture>& c, cudaError_t e) {
    c->invalid = true;
    return e;
}

// Is there a capture that calls such as cudaMalloc would break? Then it is broken.
static bool capture_forbids() {
    bool forbidden = false;
    for (auto& c : captures)
        if (c->mode == cudaStreamCaptureModeGlobal || (c->mode == cudaStreamCaptureModeThreadLocal && c->thread == std::this_thread::get_id()))
            c->invalid = forbidden = true;
    return forbidden;
}

static cudaError_t add_node(Stream* s, std::function<cudaError_t()> work) {
    Capture* c = s->capture.get();
    if (c->invalid) return cudaErrorStreamCaptureInvalidated;
    c->graph->nodes.push_back({std::move(work), {s->tail.begin(), s->tail.end()}});
    s->tail = {c->graph->nodes.size() - 1};
    return cudaSuccess;
}

// The legacy stream waits for all blocking streams, so it cannot be used while one of them is under capture.
static std::shared_ptr<Capture> capture_of_blocking_stream() {
    for (Stream* s : streams)
        if (s->capture && s->blocking) return s->capture;
    return nullptr;
}

static cudaError_t submit_after(Stream* s, std::function<cudaError_t()> work, std::vector<Dependency> after) {
    if (s == &legacy) {
        if (auto c = capture_of_blocking_stream()) return invalidate(c, cudaErrorStreamCaptureImplicit);
        for (Stream* other : streams)
            if (other != s && other->blocking) after.push_back({other, other->submitted});
    } else if (s->blocking) {
        after.push_back({&legacy, legacy.submitted});
    }
    s->queue.push_back({std::move(work), std::move(after)});
    s->submitted++;
    return options().lazy_streams ? cudaSuccess : complete(s, s->submitted);
}

cudaError_t submit(cudaStream_t handle, std::function<cudaError_t()> work) {
    Stream* s = stream_of(handle);
    if (!s) return cudaErrorInvalidResourceHandle;
    return s->capture ? add_node(s, std::move(work)) : submit_after(s, std::move(work), {});
}

// Runs a graph's nodes; among those whose predecessors are done, the schedule chooses.
static cudaError_t run_graph(const Graph& g) {
    std::vector<size_t> waits_for(g.nodes.size());
    std::vector<std::vector<size_t>> before(g.nodes.size());
    std::set<size_t> ready;
    for (size_t i = 0; i < g.nodes.size(); i++) {
        waits_for[i] = g.nodes[i].after.size();
        for (size_t p : g.nodes[i].after) before[p].push_back(i);
        if (!waits_for[i]) ready.insert(i);
    }
    std::mt19937 random(options().seed);
    while (!ready.empty() && fault_code() == cudaSuccess) {
        auto it = ready.begin();
        if (options().schedule == DESCENDING) it = std::prev(ready.end());
        if (options().schedule == RANDOM) std::advance(it, random() % ready.size());
        size_t i = *it;
        ready.erase(it);
        g.nodes[i].work();
        for (size_t next : before[i])
            if (--waits_for[next] == 0) ready.insert(next);
    }
    return fault_code();
}

// ---------------------------------------------------------------------------------------------
// Kernels

static std::map<const void*, int>& dynamic_limits = *new std::map<const void*, int>;  // set by cudaFuncSetAttribute
constexpr int SHARED_DEFAULT = 48 << 10, SHARED_MOST = 227 << 10, SHARED_PER_SM = 228 << 10;
constexpr int SMS = 4, THREADS_PER_SM = 2048, BLOCKS_PER_SM = 32;

void check_pointer(const void* p, int index, const void* kernel, cudaError_t& status) {
    std::lock_guard<std::recursive_mutex> lock(api_lock);
    if (!p || find_allocation(p) || fault_code() != cudaSuccess) return;
    status = failed(report(cudaErrorIllegalAddress, format("argument %d of kernel %s, %p, is neither device memory nor null", index,
                                                           symbol(kernel).c_str(), p)));
}

cudaError_t launch(const cudaLaunchConfig_t& c, const void* kernel, std::function<void()> body) {
    API;
    const dim3 g = c.gridDim, b = c.blockDim;
    auto limit = dynamic_limits.find(kernel);
    if (!b.x || !b.y || !b.z || b.z > 64 || (size_t)b.x * b.y * b.z > 1024) return failed(cudaErrorInvalidConfiguration);
    if (!g.x || !g.y || !g.z || g.x > 0x7fffffff || g.y > 65535 || g.z > 65535) return failed(cudaErrorInvalidConfiguration);
    if (c.dynamicSmemBytes > (size_t)(limit == dynamic_limits.end() ? SHARED_DEFAULT : limit->second)) return failed(cudaErrorInvalidValue);
    for (unsigned i = 0; i < c.numAttrs; i++)
        if (c.attrs[i].id == cudaLaunchAttributeClusterDimension || c.attrs[i].id == cudaLaunchAttributeCooperative)
            return failed(cudaErrorNotSupported);
    return failed(submit(c.stream, [c, kernel, body] { return run_kernel(c, kernel, body); }));
}

}  // namespace emu
using namespace emu;

extern "C" {

// ---------------------------------------------------------------------------------------------
// Errors

cudaError_t cudaPeekAtLastError() { return fault_code() != cudaSuccess ? fault_code() : last_error; }
cudaError_t cudaGetLastError() {
    cudaError_t e = cudaPeekAtLastError();
    last_error = cudaSuccess;
    return e;
}

struct ErrorText {
    cudaError_t code;
    const char *name, *text;
};
static const ErrorText error_texts[] = {
#define E(name, text) {name, #name, text}
    E(cudaSuccess, "no error"),
    E(cudaErrorInvalidValue, "invalid argument"),
    E(cudaErrorMemoryAllocation, "out of memory"),
    E(cudaErrorInvalidConfiguration, "invalid configuration argument"),
    E(cudaErrorInvalidDevice, "invalid device ordinal"),
    E(cudaErrorInvalidResourceHandle, "invalid resource handle"),
    E(cudaErrorIllegalState, "the operation cannot be performed in the present state"),
    E(cudaErrorNotReady, "device not ready"),
    E(cudaErrorIllegalAddress, "an illegal memory access was encountered"),
    E(cudaErrorMisalignedAddress, "misaligned address"),
    E(cudaErrorLaunchFailure, "unspecified launch failure"),
    E(cudaErrorNotSupported, "operation not supported"),
    E(cudaErrorHostMemoryAlreadyRegistered, "part or all of the requested memory range is already mapped"),
    E(cudaErrorHostMemoryNotRegistered, "pointer does not correspond to a registered memory region"),
    E(cudaErrorStreamCaptureUnsupported, "operation not permitted when stream is capturing"),
    E(cudaErrorStreamCaptureInvalidated, "operation failed due to a previous error during capture"),
    E(cudaErrorStreamCaptureMerge, "operation would result in a merge of separate capture sequences"),
    E(cudaErrorStreamCaptureUnmatched, "capture was not ended in the same stream as it began"),
    E(cudaErrorStreamCaptureUnjoined, "capturing stream has unjoined work"),
    E(cudaErrorStreamCaptureIsolation, "dependency created on uncaptured work in another stream"),
    E(cudaErrorStreamCaptureImplicit, "operation would make the legacy stream depend on a capturing blocking stream"),
    E(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    E(cudaErrorStreamCaptureWrongThread, "attempt to terminate a thread-local capture sequence from another thread"),
#undef E
};
const char* cudaGetErrorName(cudaError_t e) {
    for (const ErrorText& t : error_texts)
        if (t.code == e) return t.name;
    return "unrecognized error code";
}
// Of the code of a fault, the text is followed by the report.
const char* cudaGetErrorString(cudaError_t e) {
    const char* text = "unrecognized error code";
    for (const ErrorText& t : error_texts)
        if (t.code == e) text = t.text;
    if (e == cudaSuccess || e != fault_code()) return text;
    static thread_local std::string with_report;
    with_report = std::string(text) + ": " + last_report();
    return with_report.c_str();
}

// ---------------------------------------------------------------------------------------------
// The device: small, so that grids made from its properties are small

cudaError_t cudaGetDeviceCount(int* n) {
    API;
    *n = options().devices;
    return cudaSuccess;
}
static thread_local int current_device = 0;
cudaError_t cudaSetDevice(int d) {
    API;
    if (d < 0 || d >= options().devices) return failed(cudaErrorInvalidDevice);
    current_device = d;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int* d) {
    API;
    *d = current_device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    API;
    if (device < 0 || device >= options().devices) return failed(cudaErrorInvalidDevice);
    *p = cudaDeviceProp();
    strcpy(p->name, "CUDA on CPU (emulated)");
    p->major = 9, p->minor = 0;
    p->totalGlobalMem = options().memory_limit;
    p->multiProcessorCount = SMS, p->maxThreadsPerMultiProcessor = THREADS_PER_SM, p->maxBlocksPerMultiProcessor = BLOCKS_PER_SM;
    p->warpSize = 32, p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = SHARED_DEFAULT, p->sharedMemPerBlockOptin = SHARED_MOST;
    p->sharedMemPerMultiprocessor = SHARED_PER_SM, p->reservedSharedMemPerBlock = 1024;
    p->l2CacheSize = 50 << 20;
    p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = p->streamPrioritiesSupported = 1;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr a, int device) {
    API;
    cudaDeviceProp p;
    if (cudaError_t e = cudaGetDeviceProperties(&p, device)) return e;
    switch (a) {
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
        case cudaDevAttrWarpSize: *value = p.warpSize; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
        case cudaDevAttrMaxRegistersPerBlock: *value = p.regsPerBlock; break;
        case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerMultiprocessor; break;
        case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
        case cudaDevAttrMemoryClockRate: *value = 2619000; break;  // kHz
        case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
        case cudaDevAttrClockRate: *value = 1980000; break;
        case cudaDevAttrCooperativeLaunch: *value = 0; break;
        case cudaDevAttrMemoryPoolsSupported: *value = 0; break;
        default: return failed(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* v) {
    API;
    *v = CUDART_VERSION;
    return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* v) { return cudaRuntimeGetVersion(v); }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    API;
    *least = 0, *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute a, int value) {
    API;
    if (a != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > SHARED_MOST) return failed(cudaErrorInvalidValue);
    dynamic_limits[kernel] = value;
    return cudaSuccess;
}
// Registers and static shared memory are the compiler's: not known here, and given as 32 and 0.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* kernel) {
    API;
    *a = cudaFuncAttributes();
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->binaryVersion = a->ptxVersion = 90;
    a->maxDynamicSharedSizeBytes = dynamic_limits.count(kernel) ? dynamic_limits[kernel] : SHARED_DEFAULT;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads, size_t smem) {
    API;
    *blocks = 0;
    if (threads < 1 || threads > 1024) return failed(cudaErrorInvalidValue);
    if (smem > (size_t)(dynamic_limits.count(kernel) ? dynamic_limits[kernel] : SHARED_DEFAULT)) return cudaSuccess;
    int by_threads = THREADS_PER_SM / ((threads + 31) / 32 * 32), by_memory = (int)(SHARED_PER_SM / (smem + 1024));
    *blocks = std::min({by_threads, by_memory, BLOCKS_PER_SM});
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------
// Memory

cudaError_t cudaMalloc(void** p, size_t bytes) {
    API_OUTSIDE_CAPTURE;
    return failed(allocate(p, bytes, false));
}
cudaError_t cudaFree(void* p) {
    API_OUTSIDE_CAPTURE;
    if (complete_all()) return failed(fault_code());
    return p ? failed(release_memory(p, false)) : cudaSuccess;
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
    API_OUTSIDE_CAPTURE;
    return failed(allocate(p, bytes, true));
}
cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
cudaError_t cudaFreeHost(void* p) {
    API_OUTSIDE_CAPTURE;
    if (complete_all()) return failed(fault_code());
    return p ? failed(release_memory(p, true)) : cudaSuccess;
}
static std::map<const void*, size_t>& registered = *new std::map<const void*, size_t>;
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
    API_OUTSIDE_CAPTURE;
    if (!p || !bytes) return failed(cudaErrorInvalidValue);
    return registered.emplace(p, bytes).second ? cudaSuccess : failed(cudaErrorHostMemoryAlreadyRegistered);
}
cudaError_t cudaHostUnregister(void* p) {
    API_OUTSIDE_CAPTURE;
    if (complete_all()) return failed(fault_code());
    return registered.erase(p) ? cudaSuccess : failed(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
    API;
    size_t now, peak;
    memory_usage(now, peak);
    *total = options().memory_limit;
    *unused = *total > now ? *total - now : 0;
    return cudaSuccess;
}
static bool is_registered(const void* p) {
    auto it = registered.upper_bound(p);
    return it != registered.begin() && (--it, (const char*)p < (const char*)it->first + it->second);
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    API;
    *a = cudaPointerAttributes();
    const Allocation* m = find_allocation(p);
    a->type = m ? (m->pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice) : is_registered(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
    a->devicePointer = m ? (void*)p : nullptr;
    a->hostPointer = m && !m->pinned ? nullptr : (void*)p;
    return cudaSuccess;
}

// What a copy's two ends are. Pageable host memory is not the emulator's, and cannot be checked.
enum Place { PAGEABLE, PINNED, DEVICE };
static Place place_of(const void* p) {
    const Allocation* a = find_allocation(p);
    return a ? (a->pinned ? PINNED : DEVICE) : is_registered(p) ? PINNED : PAGEABLE;
}
static cudaError_t check_copy(const void* target, const void* source, size_t row, size_t rows, size_t target_pitch, size_t source_pitch,
                              cudaMemcpyKind kind) {
    const bool to = place_of(target) == DEVICE, from = place_of(source) == DEVICE;
    const bool want_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool want_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && (to != want_to || from != want_from)) {
        static const char* const words[] = {"host memory", "device memory"};
        return refuse(cudaErrorInvalidValue, format("cudaMemcpy: the kind says %s to %s, the pointers say %s to %s", words[want_from],
                                                    words[want_to], words[from], words[to]));
    }
    for (size_t i = 0; i < rows; i++) {
        std::string wrong = find_allocation(target) ? check_range((char*)target + i * target_pitch, row, "cudaMemcpy's target") : "";
        if (wrong.empty() && find_allocation(source)) wrong = check_range((char*)source + i * source_pitch, row, "cudaMemcpy's source");
        if (!wrong.empty()) return refuse(cudaErrorInvalidValue, wrong);
    }
    return cudaSuccess;
}

// All copies: rows of bytes. As on a device, a pageable source is read at the call and a pageable target is written
// before the call returns.
static cudaError_t copy(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t row, size_t rows,
                        cudaMemcpyKind kind, cudaStream_t stream, bool wait) {
    if (!row || !rows) return cudaSuccess;
    if (rows > 1 && (target_pitch < row || source_pitch < row)) return cudaErrorInvalidValue;
    Stream* s = stream_of(stream);
    if (!s) return cudaErrorInvalidResourceHandle;
    if (wait && (capture_of_blocking_stream() == nullptr) && capture_forbids()) return cudaErrorStreamCaptureUnsupported;
    if (cudaError_t e = check_copy(target, source, row, rows, target_pitch, source_pitch, kind)) return e;
    const Place from = place_of(source), to = place_of(target);
    std::shared_ptr<std::vector<char>> staged;
    if (from == PAGEABLE && !s->capture && options().lazy_streams) {
        staged = std::make_shared<std::vector<char>>(row * rows);
        for (size_t i = 0; i < rows; i++) memcpy(&(*staged)[i * row], (const char*)source + i * source_pitch, row);
    }
    cudaError_t e = submit(stream, [=] {
        DeviceAccess open;
        for (size_t i = 0; i < rows; i++)
            memmove((char*)target + i * target_pitch, staged ? &(*staged)[i * row] : (const char*)source + i * source_pitch, row);
        return cudaSuccess;
    });
    if (e == cudaSuccess && !s->capture && (wait || to == PAGEABLE)) e = complete(s, s->submitted);
    return e;
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
    API;
    return failed(copy(target, bytes, source, bytes, bytes, 1, kind, nullptr, true));
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    API;
    return failed(copy(target, bytes, source, bytes, bytes, 1, kind, stream, false));
}
cudaError_t cudaMemcpy2D(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width, size_t height,
                         cudaMemcpyKind kind) {
    API;
    return failed(copy(target, target_pitch, source, source_pitch, width, height, kind, nullptr, true));
}
cudaError_t cudaMemcpy2DAsync(void* target, size_t target_pitch, const void* source, size_t source_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
    API;
    return failed(copy(target, target_pitch, source, source_pitch, width, height, kind, stream, false));
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
    API;
    const std::string wrong = check_range(p, bytes, "cudaMemset");
    if (!wrong.empty()) return failed(refuse(cudaErrorInvalidValue, wrong));
    return failed(submit(stream, [=] {
        DeviceAccess open;
        memset(p, value, bytes);
        return cudaSuccess;
    }));
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

// ---------------------------------------------------------------------------------------------
// Streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
    API;
    Stream* s = new Stream;
    s->blocking = !(flags & cudaStreamNonBlocking);
    s->priority = priority;
    streams.push_back(s);
    *handle = (cudaStream_t)s;
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) { return cudaStreamCreateWithPriority(handle, flags, 0); }
cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithPriority(handle, cudaStreamDefault, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
    API;
    Stream* s = stream_of(handle);
    if (!s) return failed(cudaErrorInvalidResourceHandle);
    *priority = s->priority;
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    API;
    Stream* s = stream_of(handle);
    if (!s || s == &legacy) return failed(cudaErrorInvalidResourceHandle);
    if (s->capture) s->capture->invalid = true;
    complete(s, s->submitted);
    streams.erase(std::find(streams.begin(), streams.end(), s));
    dead_streams.insert(s);  // events may still name it
    return failed(fault_code());
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    API;
    Stream* s = stream_of(handle);
    if (!s) return failed(cudaErrorInvalidResourceHandle);
    if (s->capture) return failed(invalidate(s->capture, cudaErrorStreamCaptureUnsupported));
    if (s == &legacy)
        if (auto c = capture_of_blocking_stream()) return failed(invalidate(c, cudaErrorStreamCaptureImplicit));
    if (s == &legacy) {
        for (size_t i = streams.size(); i-- > 0;)
            if (streams[i]->blocking) complete(streams[i], streams[i]->submitted);
        return failed(fault_code());
    }
    return failed(complete(s, s->submitted));
}
cudaError_t cudaDeviceSynchronize() {
    API;
    if (!captures.empty()) {
        for (auto& c : captures) c->invalid = true;
        return failed(cudaErrorStreamCaptureUnsupported);
    }
    return failed(complete_all());
}
// Under lazy streams each query runs one operation, so that a loop of queries ends.
static cudaError_t query(Stream* s, uint64_t index) {
    if (s->completed >= index) return cudaSuccess;
    complete(s, s->completed + 1);
    return fault_code() != cudaSuccess ? fault_code() : cudaErrorNotReady;
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
    API;
    Stream* s = stream_of(handle);
    if (!s) return failed(cudaErrorInvalidResourceHandle);
    if (s->capture) return failed(invalidate(s->capture, cudaErrorStreamCaptureUnsupported));
    return query(s, s->submitted);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t f, void* data) {
    API;
    return failed(submit(stream, [=] {
        f(data);
        return cudaSuccess;
    }));
}

// ---------------------------------------------------------------------------------------------
// Events

static Event* event_of(cudaEvent_t handle) { return events.count((Event*)handle) ? (Event*)handle : nullptr; }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
    API;
    Event* e = new Event;
    e->timed = !(flags & cudaEventDisableTiming);
    events.insert(e);
    *handle = (cudaEvent_t)e;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, cudaEventDefault); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    API;
    Event* e = event_of(handle);
    if (!e) return failed(cudaErrorInvalidResourceHandle);
    events.erase(e);
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
    API;
    Event* e = event_of(handle);
    Stream* s = stream_of(stream);
    if (!e || !s) return failed(cudaErrorInvalidResourceHandle);
    if (s->capture) {
        if (s->capture->invalid) return failed(cudaErrorStreamCaptureInvalidated);
        e->capture = s->capture, e->nodes = s->tail;
        return cudaSuccess;
    }
    auto time = std::make_shared<std::chrono::steady_clock::time_point>();
    e->capture = nullptr, e->recorded = true, e->time = time;
    e->point = {s, s->submitted + 1};
    return failed(submit_after(s, [time] {
        *time = std::chrono::steady_clock::now();
        return cudaSuccess;
    }, {}));
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream, unsigned) { return cudaEventRecord(handle, stream); }
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
    API;
    Event* e = event_of(handle);
    Stream* s = stream_of(stream);
    if (!e || !s) return failed(cudaErrorInvalidResourceHandle);
    if (e->capture && captures.count(e->capture)) {  // the stream joins the capture, or its branches meet
        if (s->capture && s->capture != e->capture) return failed(invalidate(s->capture, cudaErrorStreamCaptureMerge));
        if (s == &legacy) return failed(invalidate(e->capture, cudaErrorStreamCaptureImplicit));
        if (!s->capture) s->tail.clear();
        s->capture = e->capture;
        s->tail.insert(e->nodes.begin(), e->nodes.end());
        return cudaSuccess;
    }
    if (s->capture) return failed(invalidate(s->capture, cudaErrorStreamCaptureIsolation));
    if (!e->recorded) return cudaSuccess;
    return failed(submit_after(s, nullptr, {e->point}));
}
// An event last recorded under capture marks a place in a graph: it cannot be waited for or asked.
static cudaError_t usable_event(Event* e) {
    if (!e) return cudaErrorInvalidResourceHandle;
    if (!e->capture) return cudaSuccess;
    if (captures.count(e->capture)) e->capture->invalid = true;
    return cudaErrorCapturedEvent;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    API;
    Event* e = event_of(handle);
    if (cudaError_t error = usable_event(e)) return failed(error);
    return e->recorded ? failed(complete(e->point.stream, e->point.index)) : cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
    API;
    Event* e = event_of(handle);
    if (cudaError_t error = usable_event(e)) return failed(error);
    return e->recorded ? query(e->point.stream, e->point.index) : cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    API;
    Event *a = event_of(start), *b = event_of(end);
    for (Event* e : {a, b})
        if (cudaError_t error = usable_event(e)) return failed(error);
    if (!a->timed || !b->timed || !a->recorded || !b->recorded) return failed(cudaErrorInvalidResourceHandle);
    for (Event* e : {a, b})
        if (e->point.stream->completed < e->point.index) return cudaErrorNotReady;
    *ms = std::chrono::duration<float, std::milli>(*b->time - *a->time).count();
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------
// Graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    API;
    Stream* s = stream_of(stream);
    if (!s) return failed(cudaErrorInvalidResourceHandle);
    if (s == &legacy) return failed(cudaErrorStreamCaptureUnsupported);
    if (s->capture) return failed(cudaErrorIllegalState);
    s->capture.reset(new Capture{mode, s, std::this_thread::get_id(), std::make_unique<Graph>()});
    s->tail.clear();
    captures.insert(s->capture);
    return cudaSuccess;
}

// Do the graph's paths from all its nodes lead to the origin's last ones?
static bool all_joined(const Capture& c) {
    std::vector<bool> reached(c.graph->nodes.size());
    std::vector<size_t> stack(c.origin->tail.begin(), c.origin->tail.end());
    while (!stack.empty()) {
        size_t i = stack.back();
        stack.pop_back();
        if (reached[i]) continue;
        reached[i] = true;
        stack.insert(stack.end(), c.graph->nodes[i].after.begin(), c.graph->nodes[i].after.end());
    }
    return std::find(reached.begin(), reached.end(), false) == reached.end();
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    API;
    *graph = nullptr;
    Stream* s = stream_of(stream);
    if (!s) return failed(cudaErrorInvalidResourceHandle);
    std::shared_ptr<Capture> c = s->capture;
    if (!c) return failed(cudaErrorIllegalState);
    if (c->origin != s) return failed(invalidate(c, cudaErrorStreamCaptureUnmatched));
    if (c->mode != cudaStreamCaptureModeRelaxed && c->thread != std::this_thread::get_id())
        return failed(invalidate(c, cudaErrorStreamCaptureWrongThread));
    cudaError_t e = c->invalid ? cudaErrorStreamCaptureInvalidated : all_joined(*c) ? cudaSuccess : cudaErrorStreamCaptureUnjoined;
    for (Stream* other : streams)
        if (other->capture == c) other->capture = nullptr, other->tail.clear();
    if (e == cudaSuccess) *graph = (cudaGraph_t)*graphs.insert(c->graph.release()).first;
    captures.erase(c);
    return failed(e);
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    API;
    Stream* s = stream_of(stream);
    if (!s) return failed(cudaErrorInvalidResourceHandle);
    *status = !s->capture ? cudaStreamCaptureStatusNone
            : s->capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* n) {
    API;
    if (!graphs.count((Graph*)graph) || nodes) return failed(cudaErrorInvalidValue);  // only the count
    *n = ((Graph*)graph)->nodes.size();
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    API;
    if (!graphs.count((Graph*)graph)) return failed(cudaErrorInvalidValue);
    Graph* g = new Graph(*(Graph*)graph);
    executables.insert(g);
    *executable = (cudaGraphExec_t)g;
    return cudaSuccess;
}
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t) {
    API;
    return executables.count((Graph*)executable) ? cudaSuccess : failed(cudaErrorInvalidValue);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    API;
    if (!executables.count((Graph*)executable)) return failed(cudaErrorInvalidValue);
    auto g = std::make_shared<Graph>(*(Graph*)executable);
    return failed(submit(stream, [g] { return run_graph(*g); }));
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    API;
    if (!graphs.erase((Graph*)graph)) return failed(cudaErrorInvalidValue);
    delete (Graph*)graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    API;
    if (!executables.erase((Graph*)executable)) return failed(cudaErrorInvalidValue);
    delete (Graph*)executable;
    return cudaSuccess;
}
}  // extern "C"

// NCCL's functions go into a file of their own beside this one, on submit() and DeviceAccess as cublaslt.cpp does.
