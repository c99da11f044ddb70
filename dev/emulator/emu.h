// emu.h - CUDA's device language for g++ and clang++: kernels run on the CPU, one fiber per CUDA thread.
//
// Must be included before a .cu file that is compiled as C++:
//     g++ -x c++ -std=c++17 -include dev/emulator/emu.h -I/usr/local/cuda/include train_gpt2.cu ... -lemu
// CUDA's headers are used unchanged. This file adds what is built into nvcc: built-in variables, barriers,
// warp collectives, atomics, intrinsics and launches. __CUDACC__ and __CUDA_ARCH__ stay undefined; EMULATOR
// is defined. The runtime library, libemu.so, replaces cudart, cuBLASLt and NCCL. README.md says what the
// emulator checks and what it cannot check.
#pragma once
#define EMULATOR 1

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

// Shared memory is thread-local storage of the worker (the operating system thread) that runs the block,
// since all fibers of a block run on one worker. dynamic_smem.cpp defines the dynamic part.
#undef __shared__
#define __shared__ thread_local
#undef __constant__
#define __constant__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emu {

// A place in the source where a thread waits. It is passed through default arguments, which the compiler
// evaluates at the call, so it is the caller's line.
struct Site {
    const char* file;
    int line;
};
#define EMU_SITE_ARGS const char *site_file = __builtin_FILE(), int site_line = __builtin_LINE()
#define EMU_SITE \
    emu::Site { site_file, site_line }

// ---------------------------------------------------------------------------------------------
// For tests: options and reports

enum Schedule { ASCENDING, DESCENDING, RANDOM };

// What GPUs of different architectures differ in. Source: NVIDIA's CUDA C++ Programming Guide, technical
// specifications per compute capability; the L2 caches are about those of the GPUs named.
struct Architecture {
    int number;                     // 86: compute capability 8.6
    int shared_most, shared_of_sm;  // KiB of shared memory that a block may have, and that an SM has
    int threads_of_sm, blocks_of_sm;
    int l2;  // MiB
};
constexpr Architecture ARCHITECTURES[] = {
    {80, 163, 164, 2048, 32, 40},    // A100
    {86, 99, 100, 1536, 16, 6},      // GeForce RTX 3090
    {89, 99, 100, 1536, 24, 72},     // GeForce RTX 4090
    {90, 227, 228, 2048, 32, 50},    // H100
    {100, 227, 228, 2048, 32, 126},  // B200
    {120, 99, 100, 1536, 24, 96},    // GeForce RTX 5090
};
// "" if `number` is in the table; else what is wrong, with the numbers that are.
std::string unknown_architecture(int number);

// Initialised from the environment (the names in brackets). A test may change the options between launches.
struct Options {
    // The order in which a block's threads, blocks and graph branches run [EMU_SCHEDULE]
    Schedule schedule = ASCENDING;
    unsigned seed = 1;          // of the random schedule [EMU_SEED]
    bool lazy_streams = false;  // work runs only when something waits for it [EMU_LAZY]
    bool host_guard = true;     // host code that touches device memory after a wait crashes [EMU_HOST_GUARD]
    bool same_site = true;      // threads that meet at a barrier must meet at the same line [EMU_SAME_SITE]
    bool quiet = false;         // reports are kept but not printed [EMU_QUIET]
    // Operating system threads; 0: one per processor. Read at the first launch only. [EMU_WORKERS]
    int workers = 0;
    size_t memory_limit = (size_t)16 << 30;  // bytes of device memory [EMU_MEMORY_MB]
    size_t l2_bytes = 0;                     // what the device says of its L2 cache; 0: the architecture's
    // Bit mask of the cublasLtEpilogue_t that are refused as unsupported [EMU_REFUSE_EPILOGUES]
    uint32_t refused_epilogues = 0;
    // Products by algorithms with a workspace of this many bytes fail; the heuristic proposes them all the
    // same
    size_t failing_workspace = SIZE_MAX;
    int devices = 1;        // what cudaGetDeviceCount returns [EMU_DEVICES]
    int architecture = 90;  // which of ARCHITECTURES the device has [EMU_ARCH]
    // The call of cudaStreamWaitEvent, counted from 1, that does nothing; 0: none. [EMU_DROP_WAIT]
    int drop_wait = 0;
    int waits_made = 0;          // the calls of cudaStreamWaitEvent so far
    double nccl_timeout_s = 60;  // a rank that waits longer for another one reports it [EMU_NCCL_TIMEOUT]
    std::string nccl_log;        // a file that gets a line for each collective [EMU_NCCL_LOG]
    // What cudaEventElapsedTime counts for a kernel, by its name, or for a product, "matmul epilogue E
    // workspace W"; null: 1 ms each. The time that emulation takes says nothing about a GPU.
    double (*milliseconds)(const std::string& work) = nullptr;
};
Options& options();

// What the last faulty kernel or call did wrong, in one line; "" if there was none. The same line is printed
// to stderr and is part of cudaGetErrorString() for the fault's code. As on a device, all calls after a fault
// return its error, until clear_error().
std::string last_report();
void clear_error();

// Counts since the start of the program.
struct Statistics {
    uint64_t launches, threads, switches;  // kernels, CUDA threads run, fiber switches
    size_t memory_now, memory_peak;        // bytes of device memory
};
Statistics statistics();

// ---------------------------------------------------------------------------------------------
// For allocators that divide one cudaMalloc into tensors: leave a gap behind each tensor and register it. A
// gap has at least one whole page, in which every access is reported. In the rest of the gap, writes are
// reported after the kernel, and reads return NaN.
//     size_t next = emu::arena_gap(end);   // end: offset of the tensor's end in the arena
//     emu::poison(arena + end, next - end);

constexpr size_t PAGE = 4096;
constexpr size_t arena_gap(size_t end) { return (end + 255) / 256 * 256 + 2 * PAGE; }
// Registers p..p+bytes, which must be inside one device allocation, until this is freed. Copies and memsets
// must not touch it either.
cudaError_t poison(void* p, size_t bytes);

// ---------------------------------------------------------------------------------------------
// Inside kernels: the functions that implement the built-ins below

// Ends the kernel with the report "<text> at file:line [kernel ..., block ..., thread ...]".
[[noreturn]] void fault(const std::string& text, Site s, cudaError_t code = cudaErrorLaunchFailure);
[[noreturn]] void fault_misaligned(const void* p, size_t bytes, Site s);

// A warp collective: each lane of the mask passes a pointer to its data and waits. The last lane to arrive
// runs f(pointers of all lanes, mask, site), which exchanges the data; then all continue.
typedef void (*WarpFunction)(void* const* lanes, uint32_t mask, Site s);
void warp_collective(uint32_t mask, void* data, WarpFunction f, const char* name, Site s);

enum BarrierKind { BARRIER_SYNC, BARRIER_COUNT, BARRIER_AND, BARRIER_OR };
int block_barrier(BarrierKind kind, bool predicate, Site s);

uint32_t active_mask();
int lane();
bool is_shared(const void* p, size_t bytes);
bool is_device(const void* p, size_t bytes);

enum ShuffleKind { SHUFFLE_INDEX, SHUFFLE_XOR, SHUFFLE_DOWN, SHUFFLE_UP };
uint64_t shuffle(uint32_t mask, ShuffleKind kind, uint64_t bits, int argument, int width, Site s);
enum Reduction { REDUCE_ADD, REDUCE_MIN, REDUCE_MAX, REDUCE_AND, REDUCE_OR, REDUCE_XOR };
long long reduce(uint32_t mask, Reduction op, long long value, const char* name, Site s);

template <class T>
T shuffled(uint32_t mask, ShuffleKind kind, T value, int argument, int width, Site s) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8,
                  "shuffles move 4- and 8-byte values");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    bits = shuffle(mask, kind, bits, argument, width, s);
    memcpy(&value, &bits, sizeof(T));
    return value;
}

template <class T>
inline void check_aligned(const T* p, Site s) {
    if ((uintptr_t)p % sizeof(T)) fault_misaligned(p, sizeof(T), s);
}

// ---------------------------------------------------------------------------------------------
// What the wrappers of PTX instructions call under the emulator: tensor cores and asynchronous copies. The
// registers are those of the PTX instructions.

// ldmatrix.sync.aligned.m8n8.x4/.x2[.trans].shared.b16 loads 8x8 matrices of 16-bit elements. Lane 8*m + i
// gives the address of row i of matrix m; r[m] of each lane gets two elements of matrix m, row lane/4,
// columns 2*(lane%4) and the next, or the same of the transposed matrix.
void ldmatrix(uint32_t* r, const uint32_t* row, int matrices, bool trans, Site s);
template <int N>
inline void ldmatrix_rows(uint32_t (&r)[N], const void* row_address, bool trans, Site s) {
    uint32_t row[4] = {};
    if (lane() <
        8 * N) {  // the lane that gives the address reads it, so that sanitizers see whose access it is
        if (!is_shared(row_address, 16)) fault("ldmatrix: the row is not in shared memory", s);
        if ((uintptr_t)row_address % 16) fault_misaligned(row_address, 16, s);
        for (int i = 0; i < 4; i++) row[i] = ((const uint32_t*)row_address)[i];
    }
    ldmatrix(r, row, N, trans, s);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* smem_row_address, bool trans, EMU_SITE_ARGS) {
    ldmatrix_rows(r, smem_row_address, trans, EMU_SITE);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* smem_row_address, bool trans, EMU_SITE_ARGS) {
    ldmatrix_rows(r, smem_row_address, trans, EMU_SITE);
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d = a b + c, summed in fp32 in the order of k. d and c
// may be the same registers.
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
                       EMU_SITE_ARGS);

// cp.async.cg.shared.global copies 16 bytes, or zeros if the predicate is false. The target is NaN until the
// wait that covers the copy, so that a wait that is too weak, or a target that is still in use, shows in the
// results. A copy that is never waited for is reported.
struct AsyncCopy {
    void* target;
    const void* source;  // null: zeros
};
void cp_async_issue(void* smem, const void* global, bool predicate, Site s);
bool cp_async_due(int at_most_pending, AsyncCopy& copy);  // takes the next copy that must be carried out
void cp_async_commit();
inline void cp_async16(void* smem, const void* global, bool predicate, EMU_SITE_ARGS) {
    cp_async_issue(smem, global, predicate, EMU_SITE);
    for (int i = 0; i < 4; i++) ((uint32_t*)smem)[i] = 0xffffffff;
}
inline void cp_async_wait(int at_most_pending) {
    AsyncCopy c;
    while (cp_async_due(at_most_pending, c))
        for (int i = 0; i < 4; i++) ((uint32_t*)c.target)[i] = c.source ? ((const uint32_t*)c.source)[i] : 0;
}

// ---------------------------------------------------------------------------------------------
// Launches: arguments are converted to the types of the kernel's parameters, and pointers in them must be
// device memory

// A pointer in a kernel's arguments: argument `number` itself, or its member at byte `offset`.
struct Pointer {
    size_t number, offset;
    bool is_member;
    const void* value;
};
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::vector<Pointer>& pointers,
                   std::function<void()> body);

// C++17 cannot list the members of a struct. But in T{AnyMember, AnyMember, ...} the compiler converts each
// AnyMember to the type of the member that it initialises. So example<T>() makes a T whose pointers have the
// value MARK and whose numbers are zero. Every T has its pointers where this one has MARK, so numbers and
// padding that look like addresses are never taken for pointers. Not searched: unions, because only the
// program knows which member is in use, and classes with constructors or private members.
constexpr uintptr_t MARK = 0x9d8f3b6ac5e27141;
constexpr size_t MOST_MEMBERS = 64;  // the rest are not searched; each element of an array counts

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-braces"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
template <class T, class... M>
auto made_from(int) -> decltype(void(T{std::declval<M>()...}), std::true_type());
template <class T, class... M>
std::false_type made_from(...);
template <class T, class... M>
constexpr bool is_made_from = decltype(made_from<T, M...>(0))::value;
template <class T>
constexpr bool is_struct =
    std::conjunction_v<std::is_class<T>, std::is_aggregate<T>, decltype(made_from<T>(0))>;

template <class T, class... M>
T example(size_t& pointers, M... members);
struct AnyMember {
    size_t& pointers;
    template <class T, class = std::enable_if_t<is_made_from<T>>>
    operator T() const {
        return example<T>(pointers);
    }
};
// Adds the number of pointers in T to `pointers`. Appends an AnyMember and calls itself while T has room.
template <class T, class... M>
T example(size_t& pointers, M... members) {
    if constexpr (std::is_pointer<T>::value) return pointers++, (T)MARK;
    else if constexpr (is_struct<T> && sizeof...(M) < MOST_MEMBERS && is_made_from<T, M..., AnyMember>)
        return example<T>(pointers, members..., AnyMember{pointers});
    else return T{members...};
}
#pragma GCC diagnostic pop

template <class T>
std::vector<size_t> pointer_offsets() {
    size_t pointers = 0, at = 0;
    const T x = example<T>(pointers);
    const std::string_view bytes((const char*)&x, sizeof x), mark((const char*)&MARK, sizeof MARK);
    std::vector<size_t> offsets;
    for (; (at = bytes.find(mark, at)) < sizeof x; at++) offsets.push_back(at);
    if (offsets.size() != pointers) offsets.clear();  // an old MARK in x's padding: do not guess
    return offsets;
}
template <class T>
void find_pointers(std::vector<Pointer>& found, size_t number, const T& argument) {
    if constexpr (std::is_pointer<T>::value || is_struct<T>) {
        static const std::vector<size_t> offsets = pointer_offsets<T>();
        for (size_t at : offsets) {
            const void* value;
            memcpy(&value, (const char*)&argument + at, sizeof value);
            found.push_back({number, at, is_struct<T>, value});
        }
    }
}

template <class T>
T implicitly(T value) {
    return value;
}
template <class... P, class... A>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... args) {
    std::tuple<std::decay_t<P>...> values(implicitly<P>(std::forward<A>(args))...);
    std::vector<Pointer> pointers;
    size_t number = 0;
    std::apply([&](const auto&... value) { (find_pointers(pointers, number++, value), ...); }, values);
    return launch(*config, (const void*)kernel, pointers, [kernel, values] { std::apply(kernel, values); });
}

}  // namespace emu

#define cudaLaunchKernelEx(...) emu::launch_kernel(__VA_ARGS__)

// Templates that cuda_runtime.h defines for nvcc only
template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute((const void*)kernel, attribute, value);
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, void (*kernel)(P...)) {
    return cudaFuncGetAttributes(a, (const void*)kernel);
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...), int threads,
                                                          size_t smem) {
    return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, (const void*)kernel, threads, smem);
}

// ---------------------------------------------------------------------------------------------
// Barriers and fences

inline void __syncthreads(EMU_SITE_ARGS) { emu::block_barrier(emu::BARRIER_SYNC, false, EMU_SITE); }
inline int __syncthreads_count(int p, EMU_SITE_ARGS) {
    return emu::block_barrier(emu::BARRIER_COUNT, p != 0, EMU_SITE);
}
inline int __syncthreads_and(int p, EMU_SITE_ARGS) {
    return emu::block_barrier(emu::BARRIER_AND, p != 0, EMU_SITE);
}
inline int __syncthreads_or(int p, EMU_SITE_ARGS) {
    return emu::block_barrier(emu::BARRIER_OR, p != 0, EMU_SITE);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_SITE_ARGS) {
    emu::warp_collective(mask, nullptr, nullptr, "__syncwarp", EMU_SITE);
}
// A fence only stops the compiler from reordering, because the atomics below are sequentially consistent.
inline void __threadfence() { __asm__ volatile("" ::: "memory"); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }
inline unsigned __activemask() { return emu::active_mask(); }
[[noreturn]] inline void __trap(EMU_SITE_ARGS) { emu::fault("__trap()", EMU_SITE); }

// ---------------------------------------------------------------------------------------------
// Warp collectives

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, EMU_SITE_ARGS) {
    return emu::shuffled(mask, emu::SHUFFLE_INDEX, v, source, width, EMU_SITE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, EMU_SITE_ARGS) {
    return emu::shuffled(mask, emu::SHUFFLE_XOR, v, bits, width, EMU_SITE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_SITE_ARGS) {
    return emu::shuffled(mask, emu::SHUFFLE_DOWN, v, (int)delta, width, EMU_SITE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, EMU_SITE_ARGS) {
    return emu::shuffled(mask, emu::SHUFFLE_UP, v, (int)delta, width, EMU_SITE);
}
#define EMU_REDUCE(name, op)                                             \
    template <class T>                                                   \
    T name(unsigned mask, T v, EMU_SITE_ARGS) {                          \
        static_assert(std::is_integral<T>::value && sizeof(T) == 4, ""); \
        return (T)emu::reduce(mask, op, (long long)v, #name, EMU_SITE);  \
    }
EMU_REDUCE(__reduce_add_sync, emu::REDUCE_ADD)
EMU_REDUCE(__reduce_min_sync, emu::REDUCE_MIN)
EMU_REDUCE(__reduce_max_sync, emu::REDUCE_MAX)
EMU_REDUCE(__reduce_and_sync, emu::REDUCE_AND)
EMU_REDUCE(__reduce_or_sync, emu::REDUCE_OR)
EMU_REDUCE(__reduce_xor_sync, emu::REDUCE_XOR)
#undef EMU_REDUCE
inline unsigned __ballot_sync(unsigned mask, int p, EMU_SITE_ARGS) {
    return (unsigned)emu::reduce(mask, emu::REDUCE_OR, p ? 1ll << emu::lane() : 0, "__ballot_sync", EMU_SITE);
}
inline int __any_sync(unsigned mask, int p, EMU_SITE_ARGS) {
    return (int)emu::reduce(mask, emu::REDUCE_OR, p != 0, "__any_sync", EMU_SITE);
}
inline int __all_sync(unsigned mask, int p, EMU_SITE_ARGS) {
    return (int)emu::reduce(mask, emu::REDUCE_AND, p != 0, "__all_sync", EMU_SITE);
}

// ---------------------------------------------------------------------------------------------
// Loads and stores with cache hints. They check the alignment; plain accesses are checked only by UBSan.

#define EMU_LOAD(name)                   \
    template <class T>                   \
    T name(const T* p, EMU_SITE_ARGS) {  \
        emu::check_aligned(p, EMU_SITE); \
        return *p;                       \
    }
#define EMU_STORE(name)                                       \
    template <class T>                                        \
    void name(T* p, std::common_type_t<T> v, EMU_SITE_ARGS) { \
        emu::check_aligned(p, EMU_SITE);                      \
        *p = v;                                               \
    }
EMU_LOAD(__ldg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldca)
EMU_STORE(__stcs)
EMU_STORE(__stcg)
EMU_STORE(__stwt)
#undef EMU_LOAD
#undef EMU_STORE

// ---------------------------------------------------------------------------------------------
// Atomics on any type of 2, 4 or 8 bytes; they return the old value

namespace emu {
template <size_t N>
using Bits = std::conditional_t<N == 2, uint16_t, std::conditional_t<N == 4, uint32_t, uint64_t>>;
template <class T, class F>
T atomic_update(T* p, F f) {
    using U = Bits<sizeof(T)>;
    U before = __atomic_load_n((U*)p, __ATOMIC_RELAXED), after;
    T old, fresh;
    do {
        memcpy(&old, &before, sizeof(T));
        fresh = f(old);
        memcpy(&after, &fresh, sizeof(T));
    } while (!__atomic_compare_exchange_n((U*)p, &before, after, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return old;
}
}  // namespace emu
#define EMU_ATOMIC(name, expression)                                          \
    template <class T>                                                        \
    T name(T* p, std::common_type_t<T> v) {                                   \
        return emu::atomic_update(p, [=](T old) -> T { return expression; }); \
    }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicExch, (void(old), v))
EMU_ATOMIC(atomicAnd, old& v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
#undef EMU_ATOMIC
template <class T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
    return emu::atomic_update(p, [=](T old) { return old == expected ? v : old; });
}

// ---------------------------------------------------------------------------------------------
// Mathematical and bit functions that host headers lack. Approximate intrinsics are computed accurately.

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return 1.0f / sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// nvcc never contracts these two to an FMA; noinline keeps this compiler from doing so.
__attribute__((noinline)) inline float __fadd_rn(float a, float b) { return a + b; }
__attribute__((noinline)) inline float __fmul_rn(float a, float b) { return a * b; }
inline int __float2int_rn(float x) { return (int)lrintf(x); }
inline int __float2int_rz(float x) { return (int)x; }

namespace emu {
template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
}  // namespace emu
inline unsigned __float_as_uint(float x) { return emu::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return emu::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emu::bit_cast<float>(x); }
inline float __int_as_float(int x) { return emu::bit_cast<float>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    uint64_t bytes = (uint64_t)y << 32 | x;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) r |= (unsigned)(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return r;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
    return (unsigned)((((uint64_t)high << 32 | low) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
    return (unsigned)(((uint64_t)high << 32 | low) >> (n & 31));
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
    using C = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point<C>::value)
        return std::fmin((C)a, (C)b);  // the number, if the other is NaN
    return (C)b < (C)a ? (C)b : (C)a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
    using C = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point<C>::value)
        return std::fmax((C)a, (C)b);  // the number, if the other is NaN
    return (C)a < (C)b ? (C)b : (C)a;
}
inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }
inline long long clock64() {
#if defined(__x86_64__)
    return (long long)__builtin_ia32_rdtsc();
#else
    return 0;
#endif
}
