// host_api.cpp - the CUDA runtime's host functions for errors, the device, kernels and memory. Those for
// streams, events and graphs are in streams.cpp.
#include <algorithm>
#include <map>
#include <memory>

#include "api.h"

namespace emu {

std::recursive_mutex api_lock;
static thread_local cudaError_t last_error = cudaSuccess;
cudaError_t set_last_error(cudaError_t e) { return last_error = e; }

static const Architecture& architecture() {
    for (const Architecture& a : ARCHITECTURES)
        if (a.number == options().architecture) return a;
    throw refuse(cudaErrorInvalidValue, unknown_architecture(options().architecture));
}
// The same for every architecture: bytes of shared memory that a block may have unasked, and that an SM takes
// for itself for each block. There are few SMs, so that grids that depend on their number are small.
constexpr int SHARED_DEFAULT = 48 << 10, SHARED_RESERVED = 1 << 10, SMS = 4;
static thread_local int current_device = 0;

// How much dynamic shared memory each kernel may use, where cudaFuncSetAttribute has set it.
static std::map<const void*, int>& dynamic_limits = *new std::map<const void*, int>;
static int dynamic_limit(const void* kernel) {
    const int limit = dynamic_limits.count(kernel) ? dynamic_limits[kernel] : SHARED_DEFAULT;
    return std::min(limit, architecture().shared_most << 10);  // the option may have changed since
}

cudaError_t launch(const cudaLaunchConfig_t& c, const void* kernel, const std::vector<Pointer>& pointers,
                   std::function<void()> body) {
    return api([&] {
        for (const Pointer& p : pointers) {
            // The end of an allocation is allowed: an empty array may begin there.
            if (!p.value || find_allocation(p.value) || find_allocation((const char*)p.value - 1)) continue;
            const std::string member = p.is_member ? format("the member at byte %zu of ", p.offset) : "";
            throw report(cudaErrorIllegalAddress,
                         member + format("argument %zu of kernel %s, %p, is neither device memory nor null",
                                         p.number, name_of(kernel).c_str(), p.value));
        }
        const dim3 g = c.gridDim, b = c.blockDim;
        want(b.x && b.y && b.z && b.z <= 64 && (size_t)b.x * b.y * b.z <= 1024,
             cudaErrorInvalidConfiguration);
        want(g.x && g.y && g.z && g.x <= 0x7fffffff && g.y <= 65535 && g.z <= 65535,
             cudaErrorInvalidConfiguration);
        want(c.dynamicSmemBytes <= (size_t)dynamic_limit(kernel), cudaErrorInvalidValue);
        for (unsigned i = 0; i < c.numAttrs; i++)
            want(c.attrs[i].id != cudaLaunchAttributeClusterDimension &&
                     c.attrs[i].id != cudaLaunchAttributeCooperative,
                 cudaErrorNotSupported);
        submit(c.stream, [c, kernel, body] { run_kernel(c, kernel, body); });
    });
}

// --- copies

static std::map<const void*, size_t>& registered = *new std::map<const void*, size_t>;  // by cudaHostRegister
static bool is_registered(const void* p) {
    auto it = registered.upper_bound(p);
    return it != registered.begin() && (--it, (const char*)p < (const char*)it->first + it->second);
}
static cudaMemoryType type_of(const void* p) {
    if (const Allocation* a = find_allocation(p))
        return a->pinned ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    return is_registered(p) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
}

struct Rows {
    char* p;
    size_t pitch;
};
static void check_copy(Rows target, Rows source, size_t row, size_t rows, cudaMemcpyKind kind) {
    const bool to = type_of(target.p) == cudaMemoryTypeDevice,
               from = type_of(source.p) == cudaMemoryTypeDevice;
    const bool want_to = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool want_from = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (kind != cudaMemcpyDefault && (to != want_to || from != want_from)) {
        auto memory = [](bool device) { return device ? "device memory" : "host memory"; };
        throw refuse(cudaErrorInvalidValue,
                     format("cudaMemcpy: the kind says %s to %s, the pointers say %s to %s",
                            memory(want_from), memory(want_to), memory(from), memory(to)));
    }
    for (size_t i = 0; i < rows; i++)
        for (const Rows* end : {&target, &source}) {
            if (!find_allocation(end->p)) continue;  // the size of pageable memory is unknown
            const char* what = end == &target ? "cudaMemcpy's target" : "cudaMemcpy's source";
            const std::string wrong = check_range(end->p + i * end->pitch, row, what);
            if (!wrong.empty()) throw refuse(cudaErrorInvalidValue, wrong);
        }
}
// Implements all copies. As on a device, a pageable source is read during the call, and a pageable target is
// written before the call returns.
static void copy(Rows target, Rows source, size_t row, size_t rows, cudaMemcpyKind kind, cudaStream_t stream,
                 bool wait) {
    if (wait) no_blocking_stream_under_capture(), not_while_capturing();
    if (!row || !rows) return;
    want(rows == 1 || (target.pitch >= row && source.pitch >= row), cudaErrorInvalidValue);
    check_copy(target, source, row, rows, kind);
    std::shared_ptr<std::vector<char>> staged;
    if (options().lazy_streams && type_of(source.p) == cudaMemoryTypeUnregistered && !under_capture(stream)) {
        staged = std::make_shared<std::vector<char>>(row * rows);
        for (size_t i = 0; i < rows; i++) memcpy(&(*staged)[i * row], source.p + i * source.pitch, row);
    }
    submit(stream, [=] {
        for (size_t i = 0; i < rows; i++)
            memmove(target.p + i * target.pitch, staged ? &(*staged)[i * row] : source.p + i * source.pitch,
                    row);
    });
    if (wait || (type_of(target.p) == cudaMemoryTypeUnregistered && !under_capture(stream)))
        wait_for_stream(stream);
}

}  // namespace emu
using namespace emu;

extern "C" {

// ---------------------------------------------------------------------------------------------
// Errors

cudaError_t cudaPeekAtLastError() { return fault_code() != cudaSuccess ? fault_code() : last_error; }
cudaError_t cudaGetLastError() {
    const cudaError_t e = cudaPeekAtLastError();
    last_error = cudaSuccess;
    return e;
}
struct ErrorText {
    cudaError_t code;
    const char *name, *text;
};
static const ErrorText error_texts[] = {
#define E(name, text) \
    { name, #name, text }
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
    E(cudaErrorStreamCaptureImplicit,
      "operation would make the legacy stream depend on a capturing blocking stream"),
    E(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
    E(cudaErrorStreamCaptureWrongThread,
      "attempt to terminate a thread-local capture sequence from another thread"),
#undef E
};
const char* cudaGetErrorName(cudaError_t e) {
    for (const ErrorText& t : error_texts)
        if (t.code == e) return t.name;
    return "unrecognized error code";
}
// For the code of a fault, the report follows the text.
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
// The device and its kernels

cudaError_t cudaGetDeviceCount(int* n) {
    return api([&] { *n = options().devices; });
}
cudaError_t cudaSetDevice(int d) {
    return api([&] {
        want(d >= 0 && d < options().devices, cudaErrorInvalidDevice);
        current_device = d;
    });
}
cudaError_t cudaGetDevice(int* d) {
    return api([&] { *d = current_device; });
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
    return api([&] {
        want(device >= 0 && device < options().devices, cudaErrorInvalidDevice);
        const std::string id = format("0000:%02X:00.0", device + 1);
        want(text && size > (int)id.size(), cudaErrorInvalidValue);
        strcpy(text, id.c_str());
    });
}
cudaError_t cudaRuntimeGetVersion(int* v) {
    return api([&] { *v = CUDART_VERSION; });
}
cudaError_t cudaDriverGetVersion(int* v) {
    return api([&] { *v = CUDART_VERSION; });
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    return api([&] { *least = 0, *greatest = -5; });
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    return api([&] {
        want(device >= 0 && device < options().devices, cudaErrorInvalidDevice);
        const Architecture& arch = architecture();
        *p = cudaDeviceProp();
        strcpy(p->name, "CUDA on CPU (emulated)");
        p->major = arch.number / 10, p->minor = arch.number % 10, p->warpSize = 32;
        p->totalGlobalMem = options().memory_limit;
        p->l2CacheSize = options().l2_bytes ? (int)options().l2_bytes : arch.l2 << 20;
        p->multiProcessorCount = SMS, p->maxThreadsPerMultiProcessor = arch.threads_of_sm,
        p->maxBlocksPerMultiProcessor = arch.blocks_of_sm;
        p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
        p->maxGridSize[0] = 0x7fffffff, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
        p->regsPerBlock = p->regsPerMultiprocessor = 65536;
        p->sharedMemPerBlock = SHARED_DEFAULT, p->sharedMemPerBlockOptin = (size_t)arch.shared_most << 10;
        p->sharedMemPerMultiprocessor = (size_t)arch.shared_of_sm << 10;
        p->reservedSharedMemPerBlock = SHARED_RESERVED;
        p->pciBusID = device + 1;
        p->unifiedAddressing = p->concurrentKernels = p->canMapHostMemory = p->streamPrioritiesSupported = 1;
    });
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr a, int device) {
    return api([&] {
        cudaDeviceProp p;
        if (cudaError_t e = cudaGetDeviceProperties(&p, device)) throw e;
        switch (a) {
            case cudaDevAttrComputeCapabilityMajor:
                *value = p.major;
                break;
            case cudaDevAttrComputeCapabilityMinor:
                *value = p.minor;
                break;
            case cudaDevAttrMultiProcessorCount:
                *value = p.multiProcessorCount;
                break;
            case cudaDevAttrMaxThreadsPerMultiProcessor:
                *value = p.maxThreadsPerMultiProcessor;
                break;
            case cudaDevAttrMaxThreadsPerBlock:
                *value = p.maxThreadsPerBlock;
                break;
            case cudaDevAttrMaxBlocksPerMultiprocessor:
                *value = p.maxBlocksPerMultiProcessor;
                break;
            case cudaDevAttrWarpSize:
                *value = p.warpSize;
                break;
            case cudaDevAttrMaxSharedMemoryPerBlock:
                *value = (int)p.sharedMemPerBlock;
                break;
            case cudaDevAttrMaxSharedMemoryPerBlockOptin:
                *value = (int)p.sharedMemPerBlockOptin;
                break;
            case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
                *value = (int)p.sharedMemPerMultiprocessor;
                break;
            case cudaDevAttrMaxRegistersPerBlock:
                *value = p.regsPerBlock;
                break;
            case cudaDevAttrL2CacheSize:
                *value = p.l2CacheSize;
                break;
            case cudaDevAttrMemoryClockRate:
                *value = 2619000;
                break;  // kHz, as an H100's
            case cudaDevAttrGlobalMemoryBusWidth:
                *value = 5120;
                break;
            case cudaDevAttrClockRate:
                *value = 1980000;
                break;
            case cudaDevAttrCooperativeLaunch:
            case cudaDevAttrMemoryPoolsSupported:
                *value = 0;
                break;
            default:
                throw cudaErrorInvalidValue;
        }
    });
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute a, int value) {
    return api([&] {
        if (a != cudaFuncAttributeMaxDynamicSharedMemorySize) return;
        want(value >= 0 && value <= architecture().shared_most << 10, cudaErrorInvalidValue);
        dynamic_limits[kernel] = value;
    });
}
// The registers and the static shared memory of a kernel are unknown; they are given as 32 and 0.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* kernel) {
    return api([&] {
        *a = cudaFuncAttributes();
        a->maxThreadsPerBlock = 1024, a->numRegs = 32;
        a->binaryVersion = a->ptxVersion = architecture().number;
        a->maxDynamicSharedSizeBytes = dynamic_limit(kernel);
    });
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel, int threads,
                                                          size_t smem) {
    return api([&] {
        want(threads >= 1 && threads <= 1024, cudaErrorInvalidValue);
        const Architecture& arch = architecture();
        const int by_threads = arch.threads_of_sm / ((threads + 31) / 32 * 32),
                  by_memory = (int)(((size_t)arch.shared_of_sm << 10) / (smem + SHARED_RESERVED)),
                  most = std::min({by_threads, by_memory, arch.blocks_of_sm});
        *blocks = smem > (size_t)dynamic_limit(kernel) ? 0 : most;
    });
}

// ---------------------------------------------------------------------------------------------
// Memory

cudaError_t cudaMalloc(void** p, size_t bytes) {
    return api([&] {
        not_while_capturing();
        *p = allocate(bytes, false);
    });
}
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) {
    return api([&] {
        not_while_capturing();
        *p = allocate(bytes, true);
    });
}
cudaError_t cudaMallocHost(void** p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
static cudaError_t free_memory(void* p, bool pinned) {
    return api([&] {
        not_while_capturing();
        wait_for_all();
        want(!p || release_memory(p, pinned), cudaErrorInvalidValue);
    });
}
cudaError_t cudaFree(void* p) { return free_memory(p, false); }
cudaError_t cudaFreeHost(void* p) { return free_memory(p, true); }
cudaError_t cudaHostRegister(void* p, size_t bytes, unsigned) {
    return api([&] {
        not_while_capturing();
        want(p && bytes, cudaErrorInvalidValue);
        want(registered.emplace(p, bytes).second, cudaErrorHostMemoryAlreadyRegistered);
    });
}
cudaError_t cudaHostUnregister(void* p) {
    return api([&] {
        not_while_capturing();
        wait_for_all();
        want(registered.erase(p), cudaErrorHostMemoryNotRegistered);
    });
}
cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
    return api([&] {
        size_t now, peak;
        memory_usage(now, peak);
        *total = options().memory_limit;
        *unused = *total > now ? *total - now : 0;
    });
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
    return api([&] {
        *a = cudaPointerAttributes();
        a->type = type_of(p);
        a->devicePointer = find_allocation(p) ? (void*)p : nullptr;
        a->hostPointer = a->type == cudaMemoryTypeDevice ? nullptr : (void*)p;
    });
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t n, cudaMemcpyKind kind) {
    return api([&] { copy({(char*)target, n}, {(char*)source, n}, n, 1, kind, nullptr, true); });
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t n, cudaMemcpyKind kind,
                            cudaStream_t stream) {
    return api([&] { copy({(char*)target, n}, {(char*)source, n}, n, 1, kind, stream, false); });
}
cudaError_t cudaMemcpy2D(void* target, size_t target_pitch, const void* source, size_t source_pitch,
                         size_t width, size_t height, cudaMemcpyKind kind) {
    return api([&] {
        copy({(char*)target, target_pitch}, {(char*)source, source_pitch}, width, height, kind, nullptr,
             true);
    });
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
    return api([&] {
        const std::string wrong = check_range(p, bytes, "cudaMemset");
        if (!wrong.empty()) throw refuse(cudaErrorInvalidValue, wrong);
        submit(stream, [=] { memset(p, value, bytes); });
    });
}
cudaError_t cudaMemset(void* p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, nullptr); }

}  // extern "C"
