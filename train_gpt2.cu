// train_gpt2.cu - GPT-2 on NVIDIA GPUs: the model, flags and files of train_gpt2.cpp. Several GPUs train
// together as ranks, one process each (lib/comm.h).
//
// Read it from top to bottom: the build's number type, errors and launches, tensor-core instructions, the
// kernels of each layer, AdamW, matrix products by cuBLASLt, Muon, the model, the decoder with its key/value
// cache, and a main that passes the model to lib/trainer.h. Each kernel's comment names the function of
// train_gpt2.cpp, lib/vec.h or lib/gemm.h that it is tested against.
//
// Shapes: B sequences of T tokens, M = B*T rows, C channels, NH heads of hs = C/NH, V vocabulary padded to
// Vp. floatX is bf16, or float when built with -DPRECISION_FP32; statistics, gradients of parameters, the
// optimizer's moments and master weights are always float. There are no atomics on floats: with the same
// choices of products (ProductChoices) and without the switch large_head, a run repeats bit for bit.
//
// Everything here also compiles as C++ and runs on a CPU through dev/emulator (macro EMULATOR). Therefore all
// kernels are launched by launch(), the dynamic shared memory of every kernel is called `dynamic_smem`, and
// each PTX instruction has a wrapper function with a second body for the emulator.
#ifndef TRAIN_GPT2_CU
#define TRAIN_GPT2_CU

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#ifdef USE_NCCL  // where make finds its header
#include <nccl.h>
#endif

#include <algorithm>
#include <cfloat>
#include <map>
#include <memory>
#include <thread>
#include <utility>

#include "lib/comm_tcp.h"
#include "lib/memory.h"
#include "lib/model.h"
#include "lib/rng.h"
#include "lib/sampler.h"

namespace gpu {

// This program, the one for CPUs, and what errors advise. sample_gpt2.cu includes this file.
#if defined(SERVE_GPT2)
constexpr const char *PROGRAM = "serve_gpt2cu", *CPU_PROGRAM = "./serve_gpt2",
                     *WITHOUT_GPU = "./serve_gpt2 writes on the CPU", *LESS_MEMORY = "try fewer --slots";
#elif defined(SAMPLE_ON_GPU)
constexpr const char *PROGRAM = "sample_gpt2cu", *CPU_PROGRAM = "./sample_gpt2",
                     *WITHOUT_GPU = "./sample_gpt2 writes on the CPU", *LESS_MEMORY = "try a smaller --num";
#else
constexpr const char *PROGRAM = "train_gpt2cu", *CPU_PROGRAM = "./train_gpt2",
                     *WITHOUT_GPU = "./train_gpt2 trains on the CPU",
                     *LESS_MEMORY = "try a smaller --batch_size, or --recompute 1, 2 or 3";
#endif

#if defined(PRECISION_FP32)
typedef float floatX;
constexpr Dtype BUILD_DTYPE = FP32;
#else
typedef __nv_bfloat16 floatX;
constexpr Dtype BUILD_DTYPE = BF16;
#endif

// ---------------------------------------------------------------------------------------------
// Errors and launches

// Throws Error with file, line, call, the runtime's message and what to try.
inline void cuda_check(cudaError_t status, const char* call, const char* file, int line) {
    if (status == cudaSuccess) return;
    const char* hint = status == cudaErrorMemoryAllocation ? LESS_MEMORY
                       : status == cudaErrorNoKernelImageForDevice
                           ? "this program was built for another GPU: make it again on this machine"
                           : nullptr;
    fail("%s:%d: %s: %s (%s)%s%s", file, line, call, cudaGetErrorString(status), cudaGetErrorName(status),
         hint ? "; " : "", hint ? hint : "");
}
inline void cublas_check(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail("%s:%d: %s: %s", file, line, call, cublasLtGetStatusString(status));
}
#define CUDA_CHECK(call) gpu::cuda_check((call), #call, __FILE__, __LINE__)
#define CUBLAS_CHECK(call) gpu::cublas_check((call), #call, __FILE__, __LINE__)

// Other ways to compute a step, which no GPU has compared yet; `make gpu-check` turns them on one at a time.
struct Switches {
    bool late_results = false;  // step() returns the result of the step before, and so does not wait
    bool rows_in_l2 = false;    // the softmax has so few rows at once that L2 holds them
    // The next three change the last bits of gradients, because they round or add in another order.
    bool five_products = false;  // attention's backward pass computes 5 products, instead of 7
    // The gradients of a block's biases are summed by the kernels that compute the summed values, before
    // these are rounded to floatX, instead of by products or kernels that read them. One exception: if
    // cuBLASLt multiplies by gelu' (Matmul::input_gradient_gelu), a kernel reads its result again for fcb.
    bool bias_in_kernels = false;
    // More logits are held at once where memory is left (GPT2::plan). How many depends on the memory that is
    // free, so that a run need not repeat bit for bit.
    bool large_head = false;
};
inline Switches switches;

// Called before and after each launch with the kernel's address, or for a product with its name. Null except
// in dev/bench/bench_gpu.cu, which times each launch.
#define GPU_LAUNCH_HOOK
inline void (*launch_hook)(const void* kernel, const char* product, cudaStream_t, bool before) = nullptr;

// Launches kernel<<<grid, block, smem, stream>>>(args...), the arguments converted to the kernel's own
// parameter types.
template <class... P, class... A>
inline void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
                   A&&... args) {
    cudaLaunchConfig_t c = {};
    c.gridDim = grid, c.blockDim = block, c.dynamicSmemBytes = smem, c.stream = stream;
    if (launch_hook) launch_hook((const void*)kernel, nullptr, stream, true);
    CUDA_CHECK(cudaLaunchKernelEx(&c, kernel, std::forward<A>(args)...));
    if (launch_hook) launch_hook((const void*)kernel, nullptr, stream, false);
}

// Allows a kernel this much dynamic shared memory. By default static and dynamic shared memory together are
// limited to 48 KiB.
template <class... P>
inline void allow_smem(void (*kernel)(P...), size_t bytes) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}

// ---------------------------------------------------------------------------------------------
// Numbers, 16-byte accesses, reductions, dropout

constexpr int WARP = 32;

// What changes from one micro-step to the next. Kernels read it from device memory, so that one captured
// graph serves all steps.
struct StepState {
    uint64_t seq0 = 0;     // number of the batch's first sequence within the step's whole batch
    uint32_t step = 0;     // keys the dropout masks
    float grad_scale = 1;  // 1 / (tokens of the whole batch)
};

// Dropout at one site of the model, with the random numbers of train_gpt2.cpp: element e is kept, and scaled
// by 1/(1-p), where word e % 4 of Philox block e / 4 is at least the threshold. p = 0 draws nothing. In rows
// e = (seq0 * T + m) * C + c; in attention e = (((seq0 + b) * NH + h) * T + query) * T + key.
struct Dropout {
    float p = 0;
    uint64_t seed = 0;
    rng::Stream site = rng::EMB_DROPOUT;
    uint32_t layer = 0;
    const StepState* state = nullptr;
};

// 16 bytes of T in registers: what one load or store instruction moves.
template <class T>
struct alignas(16) Vec {
    static constexpr int SIZE = 16 / sizeof(T);
    T v[SIZE];
    __device__ T& operator[](int i) { return v[i]; }
    __device__ const T& operator[](int i) const { return v[i]; }
};
constexpr int VEC = Vec<floatX>::SIZE;

// Addresses are multiples of 16 bytes. The _once forms mark data that will not be read again soon, so that
// the caches evict it first.
template <class T>
__device__ inline Vec<T> from_bits(int4 bits) {
    Vec<T> x;
    memcpy(&x, &bits, 16);
    return x;
}
template <class T>
__device__ inline int4 to_bits(const Vec<T>& x) {
    int4 bits;
    memcpy(&bits, &x, 16);
    return bits;
}
// Values that are loaded early and used later are kept as int4: nvcc would keep each bf16 of a Vec in its own
// 32-bit register, twice as many. Some kernels load several vectors before their first store, because the
// compiler moves no load above a store that may be to the same memory: a thread would wait for one vector
// after the other.
template <class T>
__device__ inline int4 load_bits(const T* p) {
    return *reinterpret_cast<const int4*>(p);
}
template <class T>
__device__ inline int4 load_bits_once(const T* p) {
    return __ldcs(reinterpret_cast<const int4*>(p));
}
// Loads memory that nothing writes while the kernel runs, through the read-only path; the compiler may
// therefore move the load above stores.
template <class T>
__device__ inline Vec<T> load_constant(const T* p) {
    return from_bits<T>(__ldg(reinterpret_cast<const int4*>(p)));
}
template <class T>
__device__ inline Vec<T> load(const T* p) {
    return from_bits<T>(load_bits(p));
}
template <class T>
__device__ inline Vec<T> load_once(const T* p) {
    return from_bits<T>(load_bits_once(p));
}
template <class T>
__device__ inline void store(T* p, const Vec<T>& x) {
    *reinterpret_cast<int4*>(p) = to_bits(x);
}
template <class T>
__device__ inline void store_once(T* p, const Vec<T>& x) {
    __stcs(reinterpret_cast<int4*>(p), to_bits(x));
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ inline T from_float(float x) {
    if constexpr (sizeof(T) == 2) return __float2bfloat16_rn(x);
    else return x;
}

// The numbers of a Vec<floatX> as floats, for arithmetic.
struct Floats {
    float v[VEC];
    __device__ float& operator[](int i) { return v[i]; }
    __device__ const float& operator[](int i) const { return v[i]; }
};
__device__ inline Floats widen(const Vec<floatX>& x) {
    Floats f;
    for (int k = 0; k < VEC; k++) f[k] = to_float(x[k]);
    return f;
}
__device__ inline Floats widen(int4 bits) { return widen(from_bits<floatX>(bits)); }
__device__ inline Vec<floatX> narrow(const Floats& f) {
    Vec<floatX> x;
    for (int k = 0; k < VEC; k++) x[k] = from_float<floatX>(f[k]);
    return x;
}
// The same from and to memory that holds floats in every build.
__device__ inline Floats load_floats(const float* p) {
    Floats f;
    for (int i = 0; i < VEC; i += 4) {
        Vec<float> x = load_once(p + i);
        for (int k = 0; k < 4; k++) f[i + k] = x[k];
    }
    return f;
}
__device__ inline void store_floats(float* p, const Floats& f) {
    for (int i = 0; i < VEC; i += 4) store_once(p + i, Vec<float>{{f[i], f[i + 1], f[i + 2], f[i + 3]}});
}

// e^x: the hardware's approximation where results are rounded to bf16 anyway.
__device__ inline float exponential(float x) {
    if constexpr (BUILD_DTYPE == BF16) return __expf(x);
    else return expf(x);
}

template <class T>
__device__ inline T warp_sum(T x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2)
        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Each x[i] becomes its sum over the group of `warps` consecutive warps that the caller belongs to, in a
// fixed order. All threads of the block call it; blockDim is one-dimensional, a multiple of 32 * warps.
template <class T, int N>
__device__ inline void group_sum(T (&x)[N], int warps) {
    for (int i = 0; i < N; i++) x[i] = warp_sum(x[i]);
    if (warps == 1) return;
    __shared__ T part[N][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = warp / warps * warps;
    __syncthreads();  // the previous call's parts have been read
    if (lane == 0)
        for (int i = 0; i < N; i++) part[i][warp] = x[i];
    __syncthreads();
    for (int i = 0; i < N; i++) x[i] = warp_sum(lane < warps ? part[i][first + lane] : T(0));
}
__device__ inline float block_sum(float x) {
    float sum[1] = {x};
    group_sum(sum, blockDim.x / WARP);
    return sum[0];
}
__device__ inline float block_max(float x) {
    __shared__ float part[WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) part[warp] = x;
    __syncthreads();
    return warp_max(part[lane < (int)(blockDim.x / WARP) ? lane : 0]);
}

// Dropout inside a kernel. With p = 0 the state is not read, and may be null.
__device__ inline rng::Key dropout_key(const Dropout& d) {
    return rng::Key(d.seed, d.p > 0 ? d.state->step : 0, d.site, d.layer);
}
// Row 0's number within the step's whole batch.
__device__ inline uint64_t dropout_row(const Dropout& d, size_t T) { return d.p > 0 ? d.state->seq0 * T : 0; }
// The factors, 0 or 1/(1-p), of elements 4 * block to 4 * block + 3.
__device__ inline float4 dropout_factors(const rng::Key& key, uint64_t block, float p) {
    rng::Block b = key.block(block);
    uint32_t threshold = rng::drop_threshold(p);
    float scale = 1.0f / (1.0f - p);
    return make_float4(b.w[0] >= threshold ? scale : 0.0f, b.w[1] >= threshold ? scale : 0.0f,
                       b.w[2] >= threshold ? scale : 0.0f, b.w[3] >= threshold ? scale : 0.0f);
}
// x *= the factors of the elements from e on, a multiple of 4; where p = 0 nothing happens.
__device__ inline void apply_dropout(Floats& x, const rng::Key& key, uint64_t e, float p) {
    if (p == 0) return;
    for (int i = 0; i < VEC; i += 4) {
        float4 f = dropout_factors(key, (e + i) / 4, p);
        x[i] *= f.x, x[i + 1] *= f.y, x[i + 2] *= f.z, x[i + 3] *= f.w;
    }
}

// The properties of this process's GPU, and its number.
inline int device_number() {
    int device;
    CUDA_CHECK(cudaGetDevice(&device));
    return device;
}
inline cudaDeviceProp device_properties() {
    cudaDeviceProp p;
    CUDA_CHECK(cudaGetDeviceProperties(&p, device_number()));
    return p;
}
// Streaming multiprocessors of the device. It sizes the grids of kernels whose blocks each write one partial
// sum.
inline int multiprocessors() {
    static const int count = [] {
        int n;
        CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device_number()));
        return n;
    }();
    return count;
}

// a[i] += sum over p of partials[p][i], and likewise b and c, n elements each, for the columns after those;
// partials (parts, columns). A block owns 32 columns. Each of its warps sums every 16th part, and the warps'
// sums are added in order.
constexpr int ADD_WARPS = 16;
__global__ void __launch_bounds__(ADD_WARPS* WARP)
    add_partials_kernel(float* a, float* b, float* c, const float* partials, int parts, size_t n,
                        size_t columns) {
    __shared__ float sums[ADD_WARPS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    size_t i = (size_t)blockIdx.x * WARP + lane;
    float sum = 0;
    if (i < columns)
#pragma unroll 4
        for (int p = warp; p < parts; p += ADD_WARPS) sum += partials[p * columns + i];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || i >= columns) return;
    for (int w = 1; w < ADD_WARPS; w++) sum += sums[w][lane];
    (i < n ? a[i] : i < 2 * n ? b[i - n] : c[i - 2 * n]) += sum;
}
// partials has n columns for each array given. c, or b and c, may be null.
inline void add_partials(float* a, float* b, float* c, const float* partials, int parts, size_t n,
                         cudaStream_t s) {
    size_t columns = n * (c ? 3 : b ? 2 : 1);
    launch(add_partials_kernel, dim3((unsigned)ceil_div(columns, WARP)), ADD_WARPS * WARP, 0, s, a, b, c,
           partials, parts, n, columns);
}

// ---------------------------------------------------------------------------------------------
// Tensor-core and copy instructions, each with a body for the emulator

// The tensor cores' product, which a warp computes together: C (16 x 8 floats) += A (16 x 16 bf16) B (16 x 8
// bf16). Each matrix is spread over the registers of the 32 lanes; in that form it is called a fragment. A
// 32-bit register holds two bf16: two columns of A, or two rows of B. In the picture each number is the lane
// that holds these two elements, or two columns of C, and below it are the registers:
//
//     A                                           B                           C
//     columns 0,1 2,3 4,5 6,7  8,9 .. .. 14,15    columns  0  1  2 ..  7      columns 0,1 2,3 4,5 6,7
//     row 0    0   1   2   3    0   1   2   3     rows 0,1 0  4  8 .. 28      row 0    0   1   2   3
//     row 1    4   5   6   7    4   5   6   7          2,3 1  5  9 .. 29      row 1    4   5   6   7
//      ..         a[0]             a[2]                4,5 2  6 10 .. 30       ..      c[0], c[1]
//     row 7   28  29  30  31   28  29  30  31          6,7 3  7 11 .. 31      row 7   28  29  30  31
//                                                         b0
//     row 8    0   1   2   3    0   1   2   3          8,9 0  4  8 .. 28      row 8    0   1   2   3
//      ..         a[1]             a[3]                 ..    b1               ..      c[2], c[3]
//     row 15  28  29  30  31   28  29  30  31        14,15 3  7 11 .. 31      row 15  28  29  30  31
//
// With g = lane / 4 and t = lane % 4 a lane thus holds columns 2t, 2t+1 of rows g and g+8 of C.
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(EMULATOR)
    emu::mma_m16n8k16_bf16(c, a, {b0, b1}, c);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Loads four 8 x 8 matrices of bf16 from shared memory; lane 8m + r passes the address of row r of matrix m,
// a multiple of 16 bytes. Register m of a lane receives the elements of row g, columns 2t and 2t+1, of matrix
// m or of its transpose: the four matrices are the quarters of an A fragment, or two B fragments.
template <bool TRANSPOSED>
__device__ inline void ldmatrix(uint32_t (&r)[4], const void* row) {
#if defined(EMULATOR)
    emu::ldmatrix_x4(r, row, TRANSPOSED);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
#endif
}

// Starts an asynchronous copy of 16 bytes from global to shared memory. Where `valid` is false nothing is
// read and zeros are written.
__device__ inline void cp_async16(void* shared, const void* global, bool valid) {
#if defined(EMULATOR)
    emu::cp_async16(shared, global, valid);
#else
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)),
        "l"(global), "r"(valid ? 16 : 0)
        : "memory");
#endif
}
// cp_async_commit closes a group of this thread's copies. cp_async_wait returns when all groups but the
// PENDING youngest have arrived; what other threads copied can be read after a barrier.
__device__ inline void cp_async_commit() {
#if defined(EMULATOR)
    emu::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING>
__device__ inline void cp_async_wait() {
#if defined(EMULATOR)
    emu::cp_async_wait(PENDING);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// 2^x in one instruction, to 2 ulp; results below 2^-126 are 0.
__device__ inline float exp2_approx(float x) {
#if defined(EMULATOR)
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// ---------------------------------------------------------------------------------------------
// Embedding

// One block computes one row.
__global__ void __launch_bounds__(256)
    embedding_forward_kernel(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, size_t T,
                             size_t C, Dropout drop) {
    size_t m = blockIdx.x;
    const floatX *token_row = wte + (size_t)tokens[m] * C, *position_row = wpe + m % T * C;
    rng::Key key = dropout_key(drop);
    uint64_t row = dropout_row(drop, T) + m;
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
        Floats x = widen(load(token_row + c)), position = widen(load(position_row + c));
        for (int k = 0; k < VEC; k++) x[k] += position[k];
        apply_dropout(x, key, row * C + c, drop.p);
        store(out + m * C + c, narrow(x));
    }
}

// As many threads as n items fill, in whole warps and at most `most`.
inline unsigned threads_for(size_t n, size_t most) {
    return (unsigned)std::min(most, ceil_div(n, WARP) * WARP);
}

// cpu::embedding_forward. out (B,T,C) = wte[token] + wpe[t], then dropout.
inline void embedding_forward(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, size_t B,
                              size_t T, size_t C, Dropout drop, cudaStream_t s) {
    launch(embedding_forward_kernel, dim3((unsigned)(B * T)), threads_for(C / VEC, 256), 0, s, out, tokens,
           wte, wpe, T, C, drop);
}

// The positions of a batch sorted by token, so that all gradients of one wte row are summed by one block or
// warp, always in the same order. Bucket u: token[u] occurs at the positions order[starts[u]..starts[u+1]). A
// token at more than FREQUENT positions (in a model of characters: the space) is also listed in frequent, and
// a whole block sums its gradients.
struct EmbeddingBuckets {
    static constexpr int FREQUENT = 64;
    int* count;  // [0] number of buckets, [1] of frequent ones
    int *order, *starts, *token, *frequent;

    static size_t ints(size_t M) { return 2 + M + (M + 1) + M + M / FREQUENT; }
    // The arrays for M positions inside one block of ints(M) ints, in host or device memory.
    static EmbeddingBuckets at(int* memory, size_t M) {
        int* order = memory + 2;
        return {memory, order, order + M, order + M + M + 1, order + M + M + 1 + M};
    }
};

// On the host: fills the buckets of tokens (M), which are not negative. Allocates nothing. A radix sort,
// digit by digit from the lowest: positions with equal digits keep their order. b.starts serves as the sort's
// second buffer, until its own values are written. The sort replaces std::sort, which took eight times as
// long for 32,768 of 50,257 tokens, while the GPU waited.
inline void bucket_tokens(const EmbeddingBuckets& b, const int* tokens, size_t M) {
    constexpr int BITS = 9, DIGITS = 1 << BITS;
    const int largest = *std::max_element(tokens, tokens + M);
    int *from = b.starts, *to = b.order;
    for (size_t m = 0; m < M; m++) to[m] = (int)m;
    for (int shift = 0; shift < 31 && largest >> shift; shift += BITS) {
        std::swap(from, to);
        auto digit = [=](int m) { return tokens[m] >> shift & (DIGITS - 1); };
        int place[DIGITS] = {}, sum = 0;
        for (size_t m = 0; m < M; m++) place[digit((int)m)]++;
        for (int& p : place) {
            int n = p;
            p = sum, sum += n;  // counts become first places
        }
        for (size_t i = 0; i < M; i++) to[place[digit(from[i])]++] = from[i];
    }
    if (to != b.order) std::copy(to, to + M, b.order);
    int u = 0, f = 0;
    for (size_t begin = 0, end; begin < M; begin = end, u++) {
        int token = tokens[b.order[begin]];
        for (end = begin + 1; end < M && tokens[b.order[end]] == token;) end++;
        b.token[u] = token, b.starts[u] = (int)begin;
        if (end - begin > EmbeddingBuckets::FREQUENT) b.frequent[f++] = u;
    }
    b.starts[u] = (int)M;
    b.count[0] = u, b.count[1] = f;
}

// sum += dout[m], columns c..c+VEC, under the mask.
__device__ inline void add_masked(Floats& sum, const floatX* dout, size_t m, size_t c, size_t C,
                                  const Dropout& drop, const rng::Key& key, uint64_t row0) {
    Floats x = widen(load(dout + m * C + c));
    apply_dropout(x, key, (row0 + m) * C + c, drop.p);
    for (int k = 0; k < VEC; k++) sum[k] += x[k];
}
__device__ inline void add_to_memory(float* p, const Floats& sum) {
    Floats x = load_floats(p);
    for (int k = 0; k < VEC; k++) x[k] += sum[k];
    store_floats(p, x);
}

// dwpe[t] += sum over b of dout[b,t]. One thread per position and vector of channels.
__global__ void __launch_bounds__(128)
    wpe_backward_kernel(float* dwpe, const floatX* dout, size_t B, size_t T, size_t C, Dropout drop) {
    size_t t = blockIdx.x, c = ((size_t)blockIdx.y * blockDim.x + threadIdx.x) * VEC;
    if (c >= C) return;
    rng::Key key = dropout_key(drop);
    uint64_t row0 = dropout_row(drop, T);
    Floats sum = {};
#pragma unroll 4
    for (size_t b = 0; b < B; b++) add_masked(sum, dout, b * T + t, c, C, drop, key, row0);
    add_to_memory(dwpe + t * C + c, sum);
}

// dwte[token] += the gradients at the token's few positions. One warp per bucket and 32 vectors of channels.
constexpr int BUCKET_WARPS = 4;
__global__ void __launch_bounds__(BUCKET_WARPS* WARP)
    wte_backward_kernel(float* dwte, const floatX* dout, EmbeddingBuckets buckets, size_t T, size_t C,
                        Dropout drop) {
    int u = blockIdx.x * BUCKET_WARPS + threadIdx.x / WARP;
    size_t c = ((size_t)blockIdx.y * WARP + threadIdx.x % WARP) * VEC;
    if (u >= buckets.count[0] || c >= C) return;
    int begin = buckets.starts[u], end = buckets.starts[u + 1];
    if (end - begin > EmbeddingBuckets::FREQUENT) return;
    rng::Key key = dropout_key(drop);
    uint64_t row0 = dropout_row(drop, T);
    Floats sum = {};
#pragma unroll 4
    for (int i = begin; i < end; i++) add_masked(sum, dout, buckets.order[i], c, C, drop, key, row0);
    add_to_memory(dwte + (size_t)buckets.token[u] * C + c, sum);
}

// The same for frequent tokens. One block of 32 warps per bucket and 8 vectors of channels; each warp reads 4
// positions at a time.
constexpr int STRIP_LANES = 8;
__global__ void __launch_bounds__(1024)
    wte_backward_frequent_kernel(float* dwte, const floatX* dout, EmbeddingBuckets buckets, size_t T,
                                 size_t C, Dropout drop) {
    constexpr int READERS = 1024 / STRIP_LANES;
    __shared__ float sums[WARP][STRIP_LANES * VEC];
    if ((int)blockIdx.x >= buckets.count[1]) return;
    int u = buckets.frequent[blockIdx.x], begin = buckets.starts[u], end = buckets.starts[u + 1];
    int strip_lane = threadIdx.x % STRIP_LANES, warp = threadIdx.x / WARP;
    size_t c = ((size_t)blockIdx.y * STRIP_LANES + strip_lane) * VEC;
    rng::Key key = dropout_key(drop);
    uint64_t row0 = dropout_row(drop, T);
    Floats sum = {};
    if (c < C)
#pragma unroll 2
        for (int i = begin + threadIdx.x / STRIP_LANES; i < end; i += READERS)
            add_masked(sum, dout, buckets.order[i], c, C, drop, key, row0);
    for (int k = 0; k < VEC; k++) {
        for (int offset = STRIP_LANES; offset < WARP; offset *= 2)
            sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], offset);
        if (threadIdx.x % WARP < STRIP_LANES) sums[warp][strip_lane * VEC + k] = sum[k];
    }
    __syncthreads();
    size_t column = (size_t)blockIdx.y * STRIP_LANES * VEC + threadIdx.x;
    if (threadIdx.x >= STRIP_LANES * VEC || column >= C) return;
    float total = 0;
    for (int w = 0; w < WARP; w++) total += sums[w][threadIdx.x];
    dwte[(size_t)buckets.token[u] * C + column] += total;
}

// cpu::embedding_backward. dwte[token] += dout and dwpe[t] += dout under the mask; dout (B,T,C) is not
// changed. The grids are sized for the most buckets that B*T tokens can have, so that one captured graph
// serves every batch.
inline void embedding_backward(float* dwte, float* dwpe, const floatX* dout, const EmbeddingBuckets& buckets,
                               size_t B, size_t T, size_t C, Dropout drop, cudaStream_t s) {
    size_t M = B * T, vecs = C / VEC;
    unsigned threads = threads_for(vecs, 128);
    launch(wpe_backward_kernel, dim3((unsigned)T, (unsigned)ceil_div(vecs, threads)), threads, 0, s, dwpe,
           dout, B, T, C, drop);
    launch(wte_backward_kernel, dim3((unsigned)ceil_div(M, BUCKET_WARPS), (unsigned)ceil_div(vecs, WARP)),
           BUCKET_WARPS * WARP, 0, s, dwte, dout, buckets, T, C, drop);
    if (M > EmbeddingBuckets::FREQUENT)
        launch(wte_backward_frequent_kernel,
               dim3((unsigned)(M / EmbeddingBuckets::FREQUENT), (unsigned)ceil_div(vecs, STRIP_LANES)), 1024,
               0, s, dwte, dout, buckets, T, C, drop);
}

// ---------------------------------------------------------------------------------------------
// LayerNorm and residual

// A row of C channels, a multiple of 8, is held in the registers of a group of `warps` warps: thread t of the
// group holds the vectors t, t + 32 warps, ... of the row.
constexpr int ROW_VECS = 24 / VEC;                       // vectors of one row that a thread holds
constexpr int ROW_WARPS = 16;                            // most warps of a group
constexpr size_t WARP_CHANNELS = ROW_VECS * VEC * WARP;  // 768: GPT-2's rows fit one warp exactly
constexpr size_t MAX_CHANNELS = ROW_WARPS * WARP_CHANNELS;

struct Rows {
    int warps;  // of a group
    int block;  // rows that a block works on at a time, each by a group
    unsigned threads() const { return (unsigned)(warps * block * WARP); }
};
// For rows of C channels and blocks of at least `fewest` warps.
inline Rows row_layout(size_t C, int fewest) {
    int warps = 1;
    while (warps * WARP_CHANNELS < C) warps *= 2;
    if (C % 8 || C > MAX_CHANNELS)
        throw std::logic_error("LayerNorm kernels: C is no multiple of 8, or above 12288");
    return {warps, std::max(1, fewest / warps)};
}

// What layernorm_forward and residual_layernorm_forward read and write.
struct LayerNormForward {
    const floatX *x = nullptr,
                 *branch = nullptr;           // (M,C); branch and sum: of residual_layernorm_forward only
    const floatX *w = nullptr, *b = nullptr;  // (C)
    floatX* sum = nullptr;                    // (M,C), x + dropout(branch); may be x or branch
    floatX* y = nullptr;                      // (M,C), the LayerNorm's output
    float *mean = nullptr, *rstd = nullptr;   // (M), kept for backward
};

// LayerNorm of x, or with RESIDUAL of sum = x + dropout(branch), which is written too. The statistics are
// those of the row as rounded to floatX, because that is what backward reads.
template <bool RESIDUAL>
__global__ void __launch_bounds__(ROW_WARPS* WARP)
    layernorm_forward_kernel(LayerNormForward args, size_t M, size_t T, int C, Dropout drop, float eps,
                             int warps) {
    int threads = warps * WARP, t = threadIdx.x % threads;
    size_t m = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    bool inside = m < M;  // rows past the end still meet at the barriers
    // All loads of a row come before its first store (see load_bits): sum may be the memory of x.
    int4 x[ROW_VECS], branch[ROW_VECS];
#pragma unroll
    for (int i = 0; i < ROW_VECS; i++) {
        int c = (i * threads + t) * VEC;
        if (!inside || c >= C) continue;
        x[i] = load_bits_once(args.x + m * C + c);
        if constexpr (RESIDUAL) branch[i] = load_bits_once(args.branch + m * C + c);
    }
    Floats row[ROW_VECS];
    rng::Key key = dropout_key(drop);
    uint64_t row0 = dropout_row(drop, T);
    float total[1] = {0};
#pragma unroll
    for (int i = 0; i < ROW_VECS; i++) {
        int c = (i * threads + t) * VEC;
        if (!inside || c >= C) continue;
        row[i] = widen(x[i]);
        if constexpr (RESIDUAL) {
            Floats add = widen(branch[i]);
            apply_dropout(add, key, (row0 + m) * C + c, drop.p);
            for (int k = 0; k < VEC; k++) row[i][k] += add[k];
            Vec<floatX> rounded = narrow(row[i]);
            store(args.sum + m * C + c, rounded);
            row[i] = widen(rounded);
        }
        for (int k = 0; k < VEC; k++) total[0] += row[i][k];
    }
    group_sum(total, warps);
    float mu = total[0] / (float)C;
    total[0] = 0;
#pragma unroll
    for (int i = 0; i < ROW_VECS; i++)
        if (inside && (i * threads + t) * VEC < C)
            for (int k = 0; k < VEC; k++) total[0] += (row[i][k] - mu) * (row[i][k] - mu);
    int4 weight[ROW_VECS], bias[ROW_VECS];  // loaded here, to arrive while the barrier waits
#pragma unroll
    for (int i = 0; i < ROW_VECS; i++) {
        int c = (i * threads + t) * VEC;
        if (c < C) weight[i] = load_bits(args.w + c), bias[i] = load_bits(args.b + c);
    }
    group_sum(total, warps);
    float rs = rsqrtf(total[0] / (float)C + eps);
#pragma unroll
    for (int i = 0; i < ROW_VECS; i++) {
        int c = (i * threads + t) * VEC;
        if (!inside || c >= C) continue;
        Floats w = widen(weight[i]), b = widen(bias[i]);
        for (int k = 0; k < VEC; k++) row[i][k] = (row[i][k] - mu) * rs * w[k] + b[k];
        store(args.y + m * C + c, narrow(row[i]));
    }
    if (inside && t == 0) args.mean[m] = mu, args.rstd[m] = rs;
}

// cpu::layernorm_forward. y = LayerNorm(x).
inline void layernorm_forward(const LayerNormForward& args, size_t M, size_t C, float eps, cudaStream_t s) {
    Rows rows = row_layout(C, 4);
    launch(layernorm_forward_kernel<false>, dim3((unsigned)ceil_div(M, rows.block)), rows.threads(), 0, s,
           args, M, M, (int)C, Dropout{}, eps, rows.warps);
}

// cpu::residual_layernorm_forward. sum = x + dropout(branch), where x is the skip connection; y =
// LayerNorm(sum).
inline void residual_layernorm_forward(const LayerNormForward& args, size_t M, size_t T, size_t C,
                                       Dropout drop, float eps, cudaStream_t s) {
    Rows rows = row_layout(C, 4);
    launch(layernorm_forward_kernel<true>, dim3((unsigned)ceil_div(M, rows.block)), rows.threads(), 0, s,
           args, M, T, (int)C, drop, eps, rows.warps);
}

// On entry to layernorm_backward dresid holds the gradient of a residual connection that branches off at the
// LayerNorm's input (GPT-2), or at its output (GROVER); or there is none, and dresid is only written.
enum Residual { NO_RESIDUAL, FROM_INPUT, FROM_OUTPUT };

// What layernorm_backward reads and writes. (Its kernel takes the pointers one by one: given the struct, nvcc
// 13 spills registers in the fp32 build.)
struct LayerNormBackward {
    floatX* dresid = nullptr;            // (M,C); in: that gradient; out: the gradient of x
    floatX* masked = nullptr;            // (M,C) or null: dresid under a dropout mask
    float *dw = nullptr, *db = nullptr;  // (C), +=
    float* dbias = nullptr;              // (C) or null, += column sums of masked, or else dresid
    float* scratch = nullptr;            // layernorm_backward_scratch(C, dbias) floats
    const floatX* dy = nullptr;          // (M,C), the gradient of the LayerNorm's output
    Residual residual = NO_RESIDUAL;
    const floatX *x = nullptr, *w = nullptr;       // (M,C), (C): what forward read
    const float *mean = nullptr, *rstd = nullptr;  // (M), which forward wrote
};

// Adds the sums of a block's groups, in order, into the block's part of partials (blocks, SUMS, C). A group
// has `threads` threads; sum(which, i, k) is the caller's sum number `which` for number k of its vector i.
template <int SUMS, class F>
__device__ inline void store_group_sums(float* partials, int C, int threads, F sum) {
    __shared__ __align__(16) float part[ROW_WARPS * WARP * VEC];
    int t = threadIdx.x % threads, group = threadIdx.x / threads, groups = blockDim.x / threads;
#pragma unroll
    for (int i = 0; i < ROW_VECS; i++)
        for (int which = 0; which < SUMS; which++) {
            int c = (i * threads + t) * VEC;
            __syncthreads();
            for (int k = 0; k < VEC; k++) part[threadIdx.x * VEC + k] = sum(which, i, k);
            __syncthreads();
            if (group > 0 || c >= C) continue;
            Floats total = {};
            for (int g = 0; g < groups; g++)
                for (int k = 0; k < VEC; k++) total[k] += part[(g * threads + t) * VEC + k];
            store_floats(partials + ((size_t)blockIdx.x * SUMS + which) * C + c, total);
        }
}

// With normalised = (x - mean) rstd, d = dy [+ dresid FROM_OUTPUT], dn = d w, and means over the row,
//     dx = rstd (dn - mean(dn) - normalised mean(dn normalised)) [+ dresid FROM_INPUT],
//     dw = sum over rows of d normalised,  db = sum over rows of d,
// and with BIAS dbias = sum over rows of dx under the mask. Group k of the whole grid's G takes rows k, k + G
// and so on. It keeps the sums of dw and db for its channels in registers, those of dbias in shared memory.
// At the end each block adds its groups' sums into partials (blocks, 2, C), or (blocks, 3, C) with BIAS.
//
// All loads of a row come before its first store (see load_bits). In fp32 the row would take too many
// registers, so the second pass loads it again, from the cache.
template <bool BIAS>
__global__ void __launch_bounds__(ROW_WARPS* WARP)
    layernorm_backward_kernel(floatX* dresid, floatX* masked, float* partials, const floatX* dy,
                              Residual residual, const floatX* x, const float* mean, const float* rstd,
                              const floatX* w, size_t M, size_t T, int C, Dropout drop, int warps) {
    constexpr bool KEEP_ROW = BUILD_DTYPE == BF16;
    int threads = warps * WARP, t = threadIdx.x % threads, group = threadIdx.x / threads,
        groups = blockDim.x / threads;
    rng::Key key = dropout_key(drop);
    uint64_t row0 = dropout_row(drop, T);
    Floats dw[ROW_VECS] = {}, db[ROW_VECS] = {};
    // Four columns of the thread's sums; neighbours in a warp are neighbours in memory.
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    auto dbias = [&](int i, int k) -> Vec<float>& {
        return ((Vec<float>*)dynamic_smem)[(i * VEC + k) / 4 * blockDim.x + threadIdx.x];
    };
    if constexpr (BIAS)
        for (int i = 0; i < ROW_VECS; i++)
            for (int k = 0; k < VEC; k += 4) dbias(i, k) = {};
    for (size_t first = (size_t)blockIdx.x * groups; first < M; first += (size_t)gridDim.x * groups) {
        size_t m = first + group;
        bool inside = m < M;
        float mu = inside ? mean[m] : 0, rs = inside ? rstd[m] : 0, sums[2] = {0, 0};
        int4 dys[ROW_VECS], before[ROW_VECS], xs[ROW_VECS];
        auto load_row = [&](int i, int c) {
            dys[i] = KEEP_ROW ? load_bits_once(dy + m * C + c) : load_bits(dy + m * C + c);
            xs[i] = load_bits(x + m * C + c);
            if (residual != NO_RESIDUAL) before[i] = load_bits(dresid + m * C + c);
        };
        auto output_gradient = [&](int i) {
            Floats d = widen(dys[i]);
            if (residual == FROM_OUTPUT) {
                Floats add = widen(before[i]);
                for (int k = 0; k < VEC; k++) d[k] += add[k];
            }
            return d;
        };
#pragma unroll
        for (int i = 0; i < ROW_VECS; i++) {
            int c = (i * threads + t) * VEC;
            if (KEEP_ROW && inside && c < C) load_row(i, c);
        }
#pragma unroll
        for (int i = 0; i < ROW_VECS; i++) {
            int c = (i * threads + t) * VEC;
            if (!inside || c >= C) continue;
            if (!KEEP_ROW) load_row(i, c);
            Floats d = output_gradient(i), row = widen(xs[i]), weight = widen(load_constant(w + c));
            for (int k = 0; k < VEC; k++) {
                float normalised = (row[k] - mu) * rs, dn = d[k] * weight[k];
                sums[0] += dn, sums[1] += dn * normalised;
                dw[i][k] += d[k] * normalised, db[i][k] += d[k];
            }
        }
        group_sum(sums, warps);
        float mean_dn = sums[0] / (float)C, mean_dot = sums[1] / (float)C;
#pragma unroll
        for (int i = 0; i < ROW_VECS; i++) {
            int c = (i * threads + t) * VEC;
            if (!inside || c >= C) continue;
            if (!KEEP_ROW) load_row(i, c);
            Floats d = output_gradient(i), row = widen(xs[i]), weight = widen(load_constant(w + c)), dx;
            for (int k = 0; k < VEC; k++)
                dx[k] = rs * (d[k] * weight[k] - mean_dn - (row[k] - mu) * rs * mean_dot);
            if (residual == FROM_INPUT) {
                Floats add = widen(before[i]);
                for (int k = 0; k < VEC; k++) dx[k] += add[k];
            }
            store(dresid + m * C + c, narrow(dx));
            if (masked) {
                apply_dropout(dx, key, (row0 + m) * C + c, drop.p);
                store(masked + m * C + c, narrow(dx));
            }
            if constexpr (BIAS)
                for (int k = 0; k < VEC; k += 4) {
                    Vec<float> sum = dbias(i, k);
                    for (int j = 0; j < 4; j++) sum[j] += dx[k + j];
                    dbias(i, k) = sum;
                }
        }
    }
    store_group_sums<BIAS ? 3 : 2>(partials, C, threads, [&](int which, int i, int k) {
        return which == 0 ? dw[i][k] : which == 1 ? db[i][k] : dbias(i, k)[k % 4];
    });
}

constexpr int BACKWARD_WARPS = 8;  // fewest warps of a block
inline int layernorm_backward_blocks() { return 2 * multiprocessors(); }
// Floats of scratch that layernorm_backward needs; bias: with dbias.
inline size_t layernorm_backward_scratch(size_t C, bool bias) {
    return (bias ? 3 : 2) * C * layernorm_backward_blocks();
}
// Bytes of dynamic shared memory that its kernel needs for the sums of dbias.
inline size_t layernorm_bias_smem(const Rows& rows) {
    return rows.threads() * ROW_VECS * VEC * sizeof(float);
}
// Allows the kernel this memory. To be called once per device before layernorm_backward with dbias, and not
// while a graph is captured.
inline void layernorm_init(size_t C) {
    allow_smem(layernorm_backward_kernel<true>, layernorm_bias_smem(row_layout(C, BACKWARD_WARPS)));
}

// cpu::layernorm_backward. dresid becomes the gradient of dy through LayerNorm, with its own former values as
// `residual` says; dw, db +=. masked receives dresid under drop's mask: the gradient of the branch whose
// output was dropped. It may be the memory of dy. dbias is the gradient of the bias that was added to the
// branch, summed before it is rounded to floatX.
inline void layernorm_backward(const LayerNormBackward& args, size_t M, size_t T, size_t C, Dropout drop,
                               cudaStream_t s) {
    Rows rows = row_layout(C, BACKWARD_WARPS);
    size_t blocks = std::min<size_t>(layernorm_backward_blocks(), ceil_div(M, rows.block));
    size_t smem = args.dbias ? layernorm_bias_smem(rows) : 0;
    auto kernel = args.dbias ? layernorm_backward_kernel<true> : layernorm_backward_kernel<false>;
    launch(kernel, dim3((unsigned)blocks), rows.threads(), smem, s, args.dresid, args.masked, args.scratch,
           args.dy, args.residual, args.x, args.mean, args.rstd, args.w, M, T, (int)C, drop, rows.warps);
    add_partials(args.dw, args.db, args.dbias, args.scratch, (int)blocks, C, s);
}

// ---------------------------------------------------------------------------------------------
// Attention

// Causal attention by tiles (FlashAttention-2, Dao 2023). For each head
//     S = Q K^T / sqrt(hs),  P = softmax of each row of S over the keys up to the query,  O = dropout(P) V.
// Only tiles of S exist, in registers. Softmax is computed online: the kernel keeps a running maximum and a
// running sum of each row, and rescales O when the maximum grows. Forward stores lse, the logarithm of each
// row's sum of e^S, from which backward recomputes P = e^(S - lse). The reference is cpu::Attention.
//
// Backward: with D = rowsum(dO * O),  dP = dropout(dO V^T),  dS = P * (dP - D),
//     dV = dropout(P)^T dO,  dQ = dS K / sqrt(hs),  dK = dS^T Q / sqrt(hs).
// dQ is a sum over keys, dK and dV are sums over queries. Atomic additions to dQ would give other bits from
// run to run. There are two ways without them:
//
//     7 products (the default). A kernel whose blocks own queries computes dQ, and stores D for a second one,
//     whose blocks own keys and compute dK and dV. Both compute S and dP.
//
//     5 products (switches.five_products). A small kernel computes D. The kernel whose blocks own keys also
//     multiplies dS by K, and writes its part of dQ, a sum over its keys, to scratch memory. A third kernel
//     adds the parts of each query in the order of the keys.
//
// In bf16, at T = 1024 and hs = 64, the 8 blocks of 128 keys write 1024 + 896 + ... + 128 = 4608 rows of 64
// floats for each head. Writing and reading them once moves 2.4 MB, which takes an A100 1.2 us at 2.04 TB/s.
// The 7 products are 0.13 GFLOP more than the 5, 0.9 us at half the tensor cores' peak, and that way computes
// the exponentials and dropout's random numbers twice. Which one is faster has to be measured on each GPU.

constexpr int HEAD_SIZES[] = {32, 48, 64, 80, 96, 128};
inline bool attention_head_size_ok(int hs) {
    for (int known : HEAD_SIZES)
        if (hs == known) return true;
    return false;
}

// Calls f(integral_constant of hs), so that kernels can be compiled for each head size. Throws logic_error
// where hs is not one of HEAD_SIZES.
template <class F, size_t... I>
inline void with_head_size(size_t hs, F f, std::index_sequence<I...>) {
    bool known =
        ((hs == (size_t)HEAD_SIZES[I] && (f(std::integral_constant<int, HEAD_SIZES[I]>()), true)) || ...);
    if (!known) throw std::logic_error("attention: no kernel for this head size");
}
template <class F>
inline void with_head_size(size_t hs, F f) {
    with_head_size(hs, f, std::make_index_sequence<std::size(HEAD_SIZES)>());
}

// What attention_backward reads and writes. (Its kernels take the pointers one by one: given the struct, nvcc
// 13 uses 238 registers instead of 168 for the dQ kernel of head size 48.)
struct AttentionBackward {
    floatX* dqkv = nullptr;                       // (B,T,3C), written
    float* dbias = nullptr;                       // (3C) or null, += column sums of dqkv
    float* scratch = nullptr;                     // attention_backward_scratch floats, 16-byte aligned
    const floatX* dout = nullptr;                 // (B,T,C), the gradient of out
    const floatX *qkv = nullptr, *out = nullptr;  // (B,T,3C) and (B,T,C): what forward read and wrote
    const float* lse = nullptr;                   // (B,NH,T), which forward wrote
};

// The head that a block works on: head h of sequence b, where blockIdx.x = b NH + h. (blockIdx.y selects a
// tile of its rows.) Q, K and V are read in place in the QKV product's output (B,T,3C), so that their rows
// are 3C elements apart.
template <int HS>
struct Head {
    size_t C, qkv_stride, index;    // channels, 3C, and blockIdx.x
    size_t qkv_offset, out_offset;  // the head's first element in (B,T,3C) and in (B,T,C)
    __device__ Head(int T, int NH) : C((size_t)NH * HS), qkv_stride(3 * C), index(blockIdx.x) {
        size_t row = (size_t)(blockIdx.x / (unsigned)NH) * T,
               column = blockIdx.x % (unsigned)NH * HS;  // a 64-bit division is slow
        qkv_offset = row * qkv_stride + column, out_offset = row * C + column;
    }
};

// Where a block writes column sums of its tile of dQ, dK or dV (which = 0, 1, 2): HS floats of row
// b gridDim.y + blockIdx.y of partials (B gridDim.y, 3C), which add_partials adds up. Null without partials.
template <int HS>
__device__ inline float* bias_part(float* partials, const Head<HS>& head, int NH, int which) {
    if (!partials) return nullptr;
    size_t row = (size_t)(blockIdx.x / (unsigned)NH) * gridDim.y + blockIdx.y;
    return partials + row * head.qkv_stride + which * head.C + blockIdx.x % (unsigned)NH * HS;
}

constexpr float LOG2E = 1.44269504f;  // softmax is computed in powers of 2: e^x = 2^(x log2 e)

// What the dK and dV kernel needs of a query: lse times log2 e, and D. Rows past T have lse = infinity, so
// that P = 0.
struct alignas(8) RowStats {
    float lse_log2, d;
};
// What one of the four lanes 4i to 4i+3 computes of D of a row: they take turns in 16-byte pieces.
template <int HS>
__device__ inline float dot_quarter(const floatX* out, const floatX* dout) {
    float d = 0;
    for (int c = threadIdx.x % 4 * VEC; c < HS; c += 4 * VEC) {
        Floats x = widen(load(out + c)), y = widen(load(dout + c));
        for (int e = 0; e < VEC; e++) d += x[e] * y[e];
    }
    return d;
}
constexpr size_t STATS_ROWS = 64;  // each head's rows are padded to a multiple of this
inline __host__ __device__ size_t stats_rows(size_t T) {
    return (T + STATS_ROWS - 1) / STATS_ROWS * STATS_ROWS;
}

// Where the parts of dQ are, in rows of hs floats. The block of keys j KEYS to j KEYS + KEYS - 1 writes part
// j, which has a row for each query that sees one of these keys. With n = ceil(T / KEYS) parts, a head has
//
//     part 0               part 1                  part 2                    ..  part n-1
//     queries 0 .. T-1     queries KEYS .. T-1     queries 2 KEYS .. T-1     ..
//
// Part j's row of a query is dq_part(j, T, KEYS) + query.
inline __host__ __device__ size_t dq_part(size_t j, size_t T, size_t keys) {
    return j * T - keys * (j * (j + 1) / 2);
}
inline __host__ __device__ size_t dq_rows(size_t T, size_t keys) {  // of a head, in all its parts
    size_t n = (T + keys - 1) / keys;
    return n * T - keys * (n * (n - 1) / 2);
}

// The dropout of one head's probabilities.
struct HeadDropout {
    rng::Key key;
    uint32_t threshold;
    float scale;        // 1/(1-p)
    uint64_t first, T;  // number of this head's first element; elements of a query
    bool on;
    __device__ HeadDropout(const Dropout& d, int T_, int NH)
        : key(dropout_key(d)),
          threshold(rng::drop_threshold(d.p)),
          scale(1.0f / (1.0f - d.p)),
          first(d.p > 0 ? (d.state->seq0 * NH + blockIdx.x) * T_ * T_ : 0),
          T(T_),
          on(d.p > 0) {}
    // Bit i: element 4 * block + i is kept.
    __device__ unsigned keep4(uint64_t block) const {
        rng::Block draw = key.block(block);
        unsigned bits = 0;
        for (int i = 0; i < 4; i++) bits |= (unsigned)(draw.w[i] >= threshold) << i;
        return bits;
    }
    __device__ uint64_t element(int query, int k) const { return first + query * T + k; }
    __device__ unsigned keep(int query, int k) const {
        return keep4(element(query, k) / 4) >> element(query, k) % 4 & 1;
    }
};

#if !defined(PRECISION_FP32)

// --- bf16: products on tensor cores
//
// A larger matrix in registers is a grid of mma's fragments (see the picture above mma()): M_FRAGS times 16
// rows and, in units of C, N_FRAGS times 8 columns.

// Rows of HS bf16 in shared memory, each followed by 16 unused bytes. With them eight consecutive rows start
// in eight different groups of four banks, for every HS that is a multiple of 16, and ldmatrix has no bank
// conflicts.
template <int HS>
struct Tile {
    static constexpr int LD = HS + 8, CHUNKS = HS / 8;    // elements from row to row; 16-byte chunks of a row
    static constexpr size_t BYTES = LD * sizeof(floatX);  // of a row
    floatX* base;

    __device__ Tile from_row(int r) const { return {base + r * LD}; }
    // All THREADS of the block start copying ROWS rows, `stride` apart; from row `valid` on they become zero.
    template <int ROWS, int THREADS>
    __device__ void copy_async(const floatX* from, int stride, int valid) const {
#pragma unroll
        for (int i = 0; i < ROWS * CHUNKS; i += THREADS) {
            int chunk = i + threadIdx.x, r = chunk / CHUNKS, c = chunk % CHUNKS * 8;
            if (r < ROWS) cp_async16(base + r * LD + c, from + r * stride + c, r < valid);
        }
    }
    // The 16 x 16 elements at (row, col) as an A fragment.
    __device__ void load_a(uint32_t (&a_frag)[4], int row, int col) const {
        int lane = threadIdx.x % WARP;
        ldmatrix<false>(a_frag, base + (row + lane % 16) * LD + col + lane / 16 * 8);
    }
    // Their transpose as an A fragment.
    __device__ void load_a_transposed(uint32_t (&a_frag)[4], int row, int col) const {
        int lane = threadIdx.x % WARP;
        ldmatrix<true>(a_frag, base + (row + lane / 16 * 8 + lane % 8) * LD + col + lane / 8 % 2 * 8);
    }
    // The same 16 x 16 elements as two B fragments: b_frags[0..1] is the one of the first eight columns,
    // b_frags[2..3] that of the others. load_b_transposed gives those of the transpose.
    __device__ void load_b(uint32_t (&b_frags)[4], int row, int col) const {
        int lane = threadIdx.x % WARP;
        ldmatrix<true>(b_frags, base + (row + lane % 16) * LD + col + lane / 16 * 8);
    }
    __device__ void load_b_transposed(uint32_t (&b_frags)[4], int row, int col) const {
        int lane = threadIdx.x % WARP;
        ldmatrix<false>(b_frags, base + (row + lane / 16 * 8 + lane % 8) * LD + col + lane / 8 % 2 * 8);
    }
};

// A warp's accumulators: a grid of C fragments. Value i of a lane's fragment is its element
// (element_row(i), element_col(i)).
template <int M_FRAGS, int N_FRAGS>
using Accumulators = float[M_FRAGS][N_FRAGS][4];
__device__ inline int element_row(int i) { return threadIdx.x % WARP / 4 + i / 2 * 8; }
__device__ inline int element_col(int i) { return threadIdx.x % 4 * 2 + i % 2; }

// Calls f(value, m, n, i) for all of a lane's accumulators.
template <int M_FRAGS, int N_FRAGS, class F>
__device__ inline void for_elements(Accumulators<M_FRAGS, N_FRAGS>& acc, F f) {
#pragma unroll
    for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
        for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) f(acc[m][n][i], m, n, i);
}

// acc += A B^T over all HS columns: A the first 16 M_FRAGS rows of a_tile, B the first 8 N_FRAGS of b_tile.
template <int HS, int M_FRAGS, int N_FRAGS>
__device__ inline void multiply_transposed(Accumulators<M_FRAGS, N_FRAGS>& acc, Tile<HS> a_tile,
                                           Tile<HS> b_tile) {
#pragma unroll
    for (int k = 0; k < HS; k += 16) {
        uint32_t a_frag[M_FRAGS][4];
        for (int m = 0; m < M_FRAGS; m++) a_tile.load_a(a_frag[m], 16 * m, k);
#pragma unroll
        for (int n = 0; n < N_FRAGS; n += 2) {
            uint32_t b_frags[4];  // loaded once for all rows
            b_tile.load_b_transposed(b_frags, 8 * n, k);
#pragma unroll
            for (int m = 0; m < M_FRAGS; m++) {
                mma(acc[m][n], a_frag[m], b_frags[0], b_frags[1]);
                mma(acc[m][n + 1], a_frag[m], b_frags[2], b_frags[3]);
            }
        }
    }
}

// acc += P B: P (16 M_FRAGS x 8 N_FRAGS) as A fragments, B the first 8 N_FRAGS rows of b_tile.
template <int HS, int M_FRAGS, int N_FRAGS>
__device__ inline void multiply(Accumulators<M_FRAGS, HS / 8>& acc,
                                const uint32_t (&p_frag)[M_FRAGS][N_FRAGS / 2][4], Tile<HS> b_tile) {
#pragma unroll
    for (int k = 0; k < N_FRAGS / 2; k++)
#pragma unroll
        for (int n = 0; n < HS / 8; n += 2) {
            uint32_t b_frags[4];
            b_tile.load_b(b_frags, 16 * k, 8 * n);
#pragma unroll
            for (int m = 0; m < M_FRAGS; m++) {
                mma(acc[m][n], p_frag[m][k], b_frags[0], b_frags[1]);
                mma(acc[m][n + 1], p_frag[m][k], b_frags[2], b_frags[3]);
            }
        }
}

__device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
// C fragments, rounded to bf16, become the A fragments of the next product. No value changes its lane:
//
//     two C fragments, 16 x 8 each         the A fragment, 16 x 16
//     n even        n odd
//     c[0] c[1]     c[0] c[1]    row g     a[0] = n even's c[0..1]   a[2] = n odd's c[0..1]
//     c[2] c[3]     c[2] c[3]    row g+8   a[1] = n even's c[2..3]   a[3] = n odd's c[2..3]
template <int M_FRAGS, int N_FRAGS>
__device__ inline void accumulators_to_a(uint32_t (&a_frag)[M_FRAGS][N_FRAGS / 2][4],
                                         const Accumulators<M_FRAGS, N_FRAGS>& acc) {
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int n = 0; n < N_FRAGS; n++)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                a_frag[m][n / 2][n % 2 * 2 + i / 2] = pack_bf16(acc[m][n][i], acc[m][n][i + 1]);
}

// Writes a warp's rows to shared memory, rounded to bf16.
template <int COLS, int M_FRAGS>
__device__ inline void write_tile(Tile<COLS> to, const Accumulators<M_FRAGS, COLS / 8>& acc) {
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int n = 0; n < COLS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                uint32_t pair = pack_bf16(acc[m][n][i], acc[m][n][i + 1]);
                *(uint32_t*)(to.from_row(16 * m + element_row(i)).base + 8 * n + element_col(i)) = pair;
            }
}
// Writes a warp's rows, `stride` apart, of which only the first `valid` exist. They pass through `stage`,
// shared memory for 16 M_FRAGS rows that no other warp reads, because a lane's values are scattered and
// global memory is written best in runs of 16 bytes.
template <int HS, int M_FRAGS>
__device__ inline void store_rows(floatX* to, int stride, int valid, const Accumulators<M_FRAGS, HS / 8>& acc,
                                  Tile<HS> stage) {
    __syncwarp();  // until all lanes have read what was there
    write_tile<HS, M_FRAGS>(stage, acc);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * M_FRAGS * Tile<HS>::CHUNKS; i += WARP) {
        int chunk = i + threadIdx.x % WARP, r = chunk / Tile<HS>::CHUNKS, c = chunk % Tile<HS>::CHUNKS * 8;
        if (r < valid) store(to + r * stride + c, load(stage.from_row(r).base + c));
    }
}

// Column sums of the rows of all warps, each 16 M_FRAGS, to HS floats, in the order of the warps. All threads
// call it. stage: shared memory for HS floats per warp. It may still be in use when this is called; the first
// barrier waits for that. Rows past T are zero and do not count. Where `to` is null nothing happens.
template <int HS, int M_FRAGS>
__device__ inline void store_column_sums(float* to, const Accumulators<M_FRAGS, HS / 8>& acc, void* stage) {
    if (!to) return;
    float* sums = (float*)stage;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    __syncthreads();
#pragma unroll
    for (int n = 0; n < HS / 8; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float sum = 0;
            for (int m = 0; m < M_FRAGS; m++) sum += acc[m][n][i] + acc[m][n][i + 2];
            for (int offset = 4; offset < WARP; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
            if (lane < 4) sums[warp * HS + 8 * n + element_col(i)] = sum;
        }
    __syncthreads();
    if (threadIdx.x >= HS) return;
    float sum = 0;
    for (int w = 0; w < (int)(blockDim.x / WARP); w++) sum += sums[w * HS + threadIdx.x];
    to[threadIdx.x] = sum;
}

// Sum and maximum over the four lanes that hold a row of accumulators: lanes 4g to 4g+3 differ in the two
// low bits of their number.
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// The functions below work on a warp's tile of scores, whose first query and key they are given. Its rows are
// queries and its columns keys, or with KEY_ROWS the other way round.

// The causal mask: scores of keys later than the query become -infinity.
template <bool KEY_ROWS, int M_FRAGS, int N_FRAGS>
__device__ inline void hide_later_keys(Accumulators<M_FRAGS, N_FRAGS>& s, int query, int key) {
    for_elements<M_FRAGS, N_FRAGS>(s, [=](float& x, int m, int n, int i) {
        int row = 16 * m + element_row(i), col = 8 * n + element_col(i);
        if (KEY_ROWS ? key + row > query + col : key + col > query + row) x = -INFINITY;
    });
}

// Which elements dropout keeps, a bit each: bit 4 (m N_FRAGS + n) + i is for value i of fragment (m, n). All
// lanes of a warp call it together. One Philox block decides four elements. Where T is a multiple of 4 these
// are four keys of one query, and no lane holds them all. So each lane computes one block for a group of
// lanes, which exchange the bits by shuffles. With g = lane / 4 and t = lane % 4 the groups are:
//
//     Rows are queries: lanes t = 0 and 1 hold keys 0..3 of queries g and g+8 (t = 2 and 3: keys 4..7). The
//     even lane computes the block of query g, the odd lane that of query g+8.
//     KEY_ROWS: four lanes with the same t and g / 4 hold four consecutive keys, and those 8 further on, of
//     queries 2t and 2t+1. Each computes one of these four blocks, lane g % 4 = i that of every lane's value
//     i.
template <int M_FRAGS, int N_FRAGS>
using KeepBits = uint32_t[(M_FRAGS * N_FRAGS + 7) / 8];
template <bool KEY_ROWS, int M_FRAGS, int N_FRAGS>
__device__ inline void draw_dropout(KeepBits<M_FRAGS, N_FRAGS>& keep_bits, const HeadDropout& drop, int query,
                                    int key) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int first = 0; first < M_FRAGS * N_FRAGS; first += 8) {  // eight fragments fill a word
        uint32_t word = 0;
#pragma unroll 2
        for (int frag = first; frag < M_FRAGS * N_FRAGS && frag < first + 8; frag++) {
            int row = frag / N_FRAGS * 16, col = frag % N_FRAGS * 8;
            int q = query + (KEY_ROWS ? col : row), k = key + (KEY_ROWS ? row : col);
            uint32_t bits = 0;  // of this fragment's four values
            if (drop.T % 4) {   // a block may contain elements of two queries
                for (int i = 0; i < 4; i++) {
                    int r = element_row(i), c = element_col(i);
                    bits |= drop.keep(q + (KEY_ROWS ? c : r), k + (KEY_ROWS ? r : c)) << i;
                }
            } else if (KEY_ROWS) {
                // Value i's block is in bits 4i to 4i+3 of `all`.
                uint32_t all = drop.keep4(drop.element(q + 2 * t + g % 2, k + g / 4 * 4 + g % 4 / 2 * 8) / 4)
                               << g % 4 * 4;
                all |= __shfl_xor_sync(~0u, all, 4);
                all |= __shfl_xor_sync(~0u, all, 8);
                for (int i = 0; i < 4; i++) bits |= (all >> (4 * i + g % 4) & 1) << i;
            } else {
                // Of each block the even lane needs the first two keys, the odd lane the others.
                uint32_t mine = drop.keep4(drop.element(q + g + t % 2 * 8, k + t / 2 * 4) / 4),
                         other = __shfl_xor_sync(~0u, mine, 1);
                bits = t % 2 ? other >> 2 | (mine >> 2) << 2 : (mine & 3) | (other & 3) << 2;
            }
            word |= bits << frag % 8 * 4;
        }
        keep_bits[first / 8] = word;
    }
}
template <int M_FRAGS, int N_FRAGS>
__device__ inline void zero_dropped(Accumulators<M_FRAGS, N_FRAGS>& x,
                                    const KeepBits<M_FRAGS, N_FRAGS>& keep_bits) {
    for_elements<M_FRAGS, N_FRAGS>(x, [&](float& e, int m, int n, int i) {
        int bit = 4 * (m * N_FRAGS + n) + i;
        if (!(keep_bits[bit / 32] >> bit % 32 & 1)) e = 0;
    });
}

// Online softmax (Milakov and Gimelshein 2018) of a tile of scores. When a row's running maximum grows from a
// to b, its running sum and its row of O, which were computed with e^(S - a), are multiplied by e^(a - b).
// Then the scores become e^(S - b), and are added to the sum. A lane holds a quarter of two rows of each
// fragment: r = 0 is row g, r = 1 row g+8. All four lanes of a row need the same maximum now, hence the
// shuffles in row_max. Each lane keeps a sum of its quarter; they are added only once, after the last tile.
template <int M_FRAGS, int N_FRAGS, int O_FRAGS>
__device__ inline void online_softmax(Accumulators<M_FRAGS, N_FRAGS>& s, Accumulators<M_FRAGS, O_FRAGS>& o,
                                      float (&running_max)[M_FRAGS][2], float (&running_sum)[M_FRAGS][2],
                                      float scale_log2) {
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float max = running_max[m][r];
            for (int n = 0; n < N_FRAGS; n++) max = fmaxf(max, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
            max = row_max(max);  // finite: the first tile has a key for every query
            float rescale = exp2_approx((running_max[m][r] - max) * scale_log2);
            running_max[m][r] = max, running_sum[m][r] *= rescale;
            for (int n = 0; n < O_FRAGS; n++) o[m][n][2 * r] *= rescale, o[m][n][2 * r + 1] *= rescale;
            for (int n = 0; n < N_FRAGS; n++)
                for (int i = 2 * r; i < 2 * r + 2; i++) {
                    s[m][n][i] = exp2_approx(s[m][n][i] * scale_log2 - max * scale_log2);
                    running_sum[m][r] += s[m][n][i];
                }
        }
}

// A block of the forward kernel owns a tile of 128 queries, and visits the keys tile by tile:
//
//                  k_tile and v_tile
//                  keys 0..63   64..127   ...
//     q_tile      +------------+---------+--
//     rows 0..31  | warp 0     | warp 0  |      A box is a tile of S in the registers of that warp,
//          32..63 | warp 1     | warp 1  |      2 x KEYS/8 C fragments. The warp also holds its 32 rows
//          64..95 | warp 2     | warp 2  |      of O, 2 x HS/8 C fragments. All warps read the same
//         96..127 | warp 3     | warp 3  |      k_tile and v_tile, and each its 32 rows of q_tile.
//                 +------------+---------+--
template <int HS>
struct ForwardShape {
    static constexpr int M_FRAGS = 2, WARPS = 4, THREADS = WARPS * WARP, QUERIES = 16 * M_FRAGS * WARPS,
                         KEYS = HS <= 64 ? 64 : 32;
    static constexpr size_t SMEM = (QUERIES + 2 * KEYS) * Tile<HS>::BYTES;
};

template <int HS>
__global__ void __launch_bounds__(ForwardShape<HS>::THREADS)
    attention_forward_kernel(floatX* out, float* lse, const floatX* qkv, int T, int NH, Dropout dropout) {
    using Shape = ForwardShape<HS>;
    constexpr int M_FRAGS = Shape::M_FRAGS, QUERIES = Shape::QUERIES, KEYS = Shape::KEYS, N_FRAGS = KEYS / 8,
                  THREADS = Shape::THREADS;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const floatX *q = qkv + head.qkv_offset, *k = q + head.C, *v = k + head.C;
    size_t stride = head.qkv_stride;
    Tile<HS> q_tile{(floatX*)dynamic_smem}, k_tile = q_tile.from_row(QUERIES), v_tile = k_tile.from_row(KEYS);

    // Blocks start in the order of their numbers. The last queries see the most keys, so they come first:
    // otherwise the longest blocks would run alone at the end.
    int q0 = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    int warp_row = threadIdx.x / WARP * 16 * M_FRAGS;  // the warp's first row of q_tile
    int warp_query = q0 + warp_row;
    int end = min(q0 + QUERIES, T);  // the block's queries see no key from here on
    float scale = rsqrtf((float)HS), scale_log2 = scale * LOG2E;
    Accumulators<Shape::M_FRAGS, HS / 8> o = {};
    float running_max[M_FRAGS][2], running_sum[M_FRAGS][2];
    for (int m = 0; m < M_FRAGS; m++)
        for (int r = 0; r < 2; r++) running_max[m][r] = -INFINITY, running_sum[m][r] = 0;

    // Copies overlap with products: V is copied while S is computed, the next K while P V is computed.
    q_tile.template copy_async<QUERIES, THREADS>(q + q0 * stride, stride, T - q0);
    k_tile.template copy_async<KEYS, THREADS>(k, stride, T);
    cp_async_commit();
    for (int k0 = 0; k0 < end; k0 += KEYS) {
        // A warp whose queries all come before these keys only copies, and waits at the barriers.
        bool active = k0 < warp_query + 16 * M_FRAGS;
        uint32_t p_frag[M_FRAGS][N_FRAGS / 2][4];
        cp_async_wait<0>();
        __syncthreads();  // all threads' parts of K have arrived, and no warp reads the previous V any more
        v_tile.template copy_async<KEYS, THREADS>(v + k0 * stride, stride, T - k0);
        cp_async_commit();
        if (active) {
            KeepBits<Shape::M_FRAGS, Shape::KEYS / 8> keep_bits;
            if (drop.on) draw_dropout<false, M_FRAGS, N_FRAGS>(keep_bits, drop, warp_query, k0);
            Accumulators<Shape::M_FRAGS, Shape::KEYS / 8> s = {};
            multiply_transposed(s, q_tile.from_row(warp_row), k_tile);
            if (k0 + KEYS > warp_query) hide_later_keys<false, M_FRAGS, N_FRAGS>(s, warp_query, k0);
            online_softmax<M_FRAGS, N_FRAGS, HS / 8>(s, o, running_max, running_sum, scale_log2);
            if (drop.on) zero_dropped<M_FRAGS, N_FRAGS>(s, keep_bits);  // after the sum, which has all of P
            accumulators_to_a(p_frag, s);
        }
        cp_async_wait<0>();
        __syncthreads();  // V has arrived, and no warp reads this K any more
        if (k0 + KEYS < end)
            k_tile.template copy_async<KEYS, THREADS>(k + (k0 + KEYS) * stride, stride, T - k0 - KEYS);
        cp_async_commit();
        if (active) multiply<HS, M_FRAGS, N_FRAGS>(o, p_frag, v_tile);
    }
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float sum = row_sum(running_sum[m][r]), factor = drop.scale / sum;
            int query = warp_query + 16 * m + element_row(2 * r);
            if (threadIdx.x % 4 == 0 && query < T)
                lse[head.index * T + query] = running_max[m][r] * scale + logf(sum);
            for (int n = 0; n < HS / 8; n++) o[m][n][2 * r] *= factor, o[m][n][2 * r + 1] *= factor;
        }
    store_rows<HS, M_FRAGS>(out + head.out_offset + warp_query * head.C, head.C, T - warp_query, o,
                            q_tile.from_row(warp_row));
}

// A block of a backward kernel owns 128 rows of its result. Rows are queries in the first kernel, which
// visits the keys STEP at a time, and keys in the second one, which visits the queries. The visited tiles are
// double-buffered: step i computes with stage i % 2 while the tiles of step i + 1 are copied to the other
// stage, so that a step needs only one barrier. A warp owns 32 rows, or 16 where two results of 32 x HS and
// two tiles of scores do not fit its registers. With FIVE_PRODUCTS there is only the second kernel, which
// also needs shared memory for two steps' dS^T.
template <int HS_, int STEP_, bool FIVE_PRODUCTS_>
struct BackwardShape {
    static constexpr int HS = HS_, STEP = STEP_, M_FRAGS = HS <= 64 ? 2 : 1, WARPS = 8 / M_FRAGS,
                         THREADS = WARPS * WARP, ROWS = 128;
    static constexpr bool FIVE_PRODUCTS = FIVE_PRODUCTS_;
    static constexpr size_t DS_SMEM = FIVE_PRODUCTS ? 2 * ROWS * Tile<STEP>::BYTES : 0;
    static constexpr size_t SMEM =
        (2 * ROWS + 4 * STEP) * Tile<HS>::BYTES + 2 * STEP * sizeof(RowStats) + DS_SMEM;
};

// D and lse of a warp's rows, of which a lane holds two in each fragment. They are also written to `stats`
// (of all the head's rows). The four lanes of a row each multiply a quarter of it, 16 bytes at a time.
template <int HS, int M_FRAGS>
__device__ inline void compute_row_stats(RowStats (&row_stats)[M_FRAGS][2], RowStats* stats,
                                         const Head<HS>& head, Tile<HS> dout_rows, const floatX* out,
                                         const float* lse, int warp_query, int T) {
#pragma unroll
    for (int m = 0; m < M_FRAGS; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = 16 * m + element_row(2 * r), query = warp_query + row;
            float d = 0;
            if (query < T)
                d = dot_quarter<HS>(out + head.out_offset + query * head.C, dout_rows.from_row(row).base);
            row_stats[m][r] = {query < T ? lse[head.index * T + query] * LOG2E : INFINITY, row_sum(d)};
            if (threadIdx.x % 4 == 0 && query < (int)stats_rows(T))
                stats[head.index * stats_rows(T) + query] = row_stats[m][r];
        }
}

// dQ, and the row statistics (B*NH, stats_rows(T)) that the second kernel reads.
template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS)
    attention_backward_query_kernel(floatX* dqkv, float* bias_partials, RowStats* stats, const floatX* dout,
                                    const floatX* out, const floatX* qkv, const float* lse, int T, int NH,
                                    Dropout dropout) {
    constexpr int HS = Shape::HS, M_FRAGS = Shape::M_FRAGS, QUERIES = Shape::ROWS, KEYS = Shape::STEP,
                  N_FRAGS = KEYS / 8, THREADS = Shape::THREADS;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const floatX *q = qkv + head.qkv_offset, *k = q + head.C, *v = k + head.C,
                 *head_dout = dout + head.out_offset;
    size_t stride = head.qkv_stride;
    Tile<HS> q_tile{(floatX*)dynamic_smem}, dout_tile = q_tile.from_row(QUERIES),
                                            stages = dout_tile.from_row(QUERIES);
    auto k_tile = [&](int step) { return stages.from_row(step % 2 * 2 * KEYS); };
    auto v_tile = [&](int step) { return stages.from_row(step % 2 * 2 * KEYS + KEYS); };
    auto prefetch = [&](int step) {
        int k0 = step * KEYS;
        k_tile(step).template copy_async<KEYS, THREADS>(k + k0 * stride, stride, T - k0);
        v_tile(step).template copy_async<KEYS, THREADS>(v + k0 * stride, stride, T - k0);
        cp_async_commit();
    };

    int q0 = (gridDim.y - 1 - blockIdx.y) * QUERIES;  // the longest rows first, as in forward
    int warp_row = threadIdx.x / WARP * 16 * M_FRAGS, warp_query = q0 + warp_row;
    int steps = (min(q0 + QUERIES, T) + KEYS - 1) / KEYS;
    float scale = rsqrtf((float)HS), scale_log2 = scale * LOG2E;
    Accumulators<Shape::M_FRAGS, Shape::HS / 8> dq = {};
    RowStats row_stats[M_FRAGS][2];

    q_tile.template copy_async<QUERIES, THREADS>(q + q0 * stride, stride, T - q0);
    dout_tile.template copy_async<QUERIES, THREADS>(head_dout + q0 * head.C, head.C, T - q0);
    prefetch(0);
    for (int step = 0; step < steps; step++) {
        int k0 = step * KEYS;
        cp_async_wait<0>();
        __syncthreads();  // this step's tiles have arrived, and no warp reads the other stage any more
        if (step + 1 < steps) prefetch(step + 1);
        if (step == 0)
            compute_row_stats<HS, M_FRAGS>(row_stats, stats, head, dout_tile.from_row(warp_row), out, lse,
                                           warp_query, T);
        if (k0 >= warp_query + 16 * M_FRAGS) continue;  // all keys come after the warp's queries
        KeepBits<Shape::M_FRAGS, Shape::STEP / 8> keep_bits;
        if (drop.on) draw_dropout<false, M_FRAGS, N_FRAGS>(keep_bits, drop, warp_query, k0);
        Accumulators<Shape::M_FRAGS, Shape::STEP / 8> s = {}, dp = {};
        multiply_transposed(s, q_tile.from_row(warp_row), k_tile(step));
        multiply_transposed(dp, dout_tile.from_row(warp_row), v_tile(step));
        if (k0 + KEYS > warp_query) hide_later_keys<false, M_FRAGS, N_FRAGS>(s, warp_query, k0);
        if (drop.on) zero_dropped<M_FRAGS, N_FRAGS>(dp, keep_bits);
        for_elements<M_FRAGS, N_FRAGS>(s, [&](float& x, int m, int n, int i) {  // S becomes dS
            RowStats row = row_stats[m][i / 2];
            x = exp2_approx(x * scale_log2 - row.lse_log2) * (dp[m][n][i] * drop.scale - row.d);
        });
        uint32_t ds_frag[M_FRAGS][N_FRAGS / 2][4];
        accumulators_to_a(ds_frag, s);
        multiply<HS, M_FRAGS, N_FRAGS>(dq, ds_frag, k_tile(step));
    }
    for_elements<M_FRAGS, HS / 8>(dq, [=](float& x, int, int, int) { x *= scale; });
    store_rows<HS, M_FRAGS>(dqkv + head.qkv_offset + warp_query * stride, stride, T - warp_query, dq,
                            q_tile.from_row(warp_row));
    store_column_sums<HS, M_FRAGS>(bias_part(bias_partials, head, NH, 0), dq, stages.base);
}

// The shared memory of the key kernel: the block's rows of K and V; two stages of a step's queries, which are
// rows of Q and dO and their statistics; and with FIVE_PRODUCTS two steps' dS^T, with keys as rows.
template <int HS>
struct QueryTiles {
    Tile<HS> q, dout;
    RowStats* stats;
};
template <class Shape>
struct KeyMemory {
    static constexpr int HS = Shape::HS, KEYS = Shape::ROWS, QUERIES = Shape::STEP;
    Tile<HS> k, v, stages;
    Tile<QUERIES> ds_tiles;
    RowStats* stats_tiles;
    __device__ explicit KeyMemory(void* smem)
        : k{(floatX*)smem},
          v(k.from_row(KEYS)),
          stages(v.from_row(KEYS)),
          ds_tiles{stages.from_row(4 * QUERIES).base},
          stats_tiles((RowStats*)((char*)ds_tiles.base + Shape::DS_SMEM)) {}
    __device__ QueryTiles<HS> queries(int step) const {
        Tile<HS> q = stages.from_row(step % 2 * 2 * QUERIES);
        return {q, q.from_row(QUERIES), stats_tiles + step % 2 * QUERIES};
    }
    __device__ Tile<QUERIES> ds(int step) const { return ds_tiles.from_row(step % 2 * KEYS); }
};

// One step of a warp of the key kernel: adds what the queries of the step contribute to dK and dV of the
// warp's keys, and computes dS^T in ds, which is zero before. Scores are computed transposed, a key a row:
// P^T and dS^T are then accumulators, and become A fragments without moving between lanes. Rows of Q and dO
// are loaded twice, as B fragments of two different forms: of Q^T and dO^T for the scores, and of Q and dO
// for dK and dV. Each load serves all the warp's keys.
template <class Shape, int M_FRAGS = Shape::M_FRAGS, int HS = Shape::HS, int N_FRAGS = Shape::STEP / 8>
__device__ inline void key_step(Accumulators<M_FRAGS, HS / 8>& dk, Accumulators<M_FRAGS, HS / 8>& dv,
                                Accumulators<M_FRAGS, N_FRAGS>& ds, Tile<HS> k_rows, Tile<HS> v_rows,
                                const QueryTiles<HS>& tiles, const HeadDropout& drop, int query, int key) {
    float scale_log2 = rsqrtf((float)HS) * LOG2E;
    KeepBits<M_FRAGS, N_FRAGS> keep_bits;
    if (drop.on) draw_dropout<true, M_FRAGS, N_FRAGS>(keep_bits, drop, query, key);
    Accumulators<M_FRAGS, N_FRAGS> s = {};
    multiply_transposed(s, k_rows, tiles.q);
    multiply_transposed(ds, v_rows, tiles.dout);  // dP
    if (query < key + 16 * M_FRAGS) hide_later_keys<true, M_FRAGS, N_FRAGS>(s, query, key);
    if (drop.on) zero_dropped<M_FRAGS, N_FRAGS>(ds, keep_bits);
    const RowStats* column_stats = tiles.stats + element_col(0);
    for_elements<M_FRAGS, N_FRAGS>(s, [&](float& x, int m, int n, int i) {  // S becomes P, dP becomes dS
        RowStats column = column_stats[8 * n + i % 2];
        x = exp2_approx(x * scale_log2 - column.lse_log2);
        ds[m][n][i] = x * (ds[m][n][i] * drop.scale - column.d);
    });
    if (drop.on) zero_dropped<M_FRAGS, N_FRAGS>(s, keep_bits);  // dS needed all of P, dV needs dropout(P)
    uint32_t a_frag[M_FRAGS][N_FRAGS / 2][4];
    accumulators_to_a(a_frag, s);
    multiply<HS, M_FRAGS, N_FRAGS>(dv, a_frag, tiles.dout);
    accumulators_to_a(a_frag, ds);
    multiply<HS, M_FRAGS, N_FRAGS>(dk, a_frag, tiles.q);
}

// dS K of one step, not yet scaled: the block's part of dQ of the step's queries, of which the first `valid`
// exist. `to` is the first one's row. Only the block's first `keys` keys, a multiple of 16, are seen by these
// queries. All warps call it after a barrier, because each needs all rows of dS^T. They share the result, 16
// queries and 8 N columns each, e.g. with 4 warps, 32 queries and hs = 64:
//
//                       columns 0..31   32..63
//     queries  0..15   +---------------+--------+
//                      | warp 0        | warp 2 |
//             16..31   | warp 1        | warp 3 |
//                      +---------------+--------+
//
// dS^T passes through shared memory. Without that, as dQ^T = K^T dS^T with dS^T in registers, each warp would
// have a sum over its own keys only, and then these sums, which are fp32 and of all queries and columns,
// would have to pass through shared memory. A row of a fragment is written by four lanes, 8 bytes each: whole
// sectors of 32 bytes.
template <class Shape, int HS = Shape::HS, int QUERIES = Shape::STEP>
__device__ inline void store_dq_part(float* to, int valid, Tile<QUERIES> ds_tile, Tile<HS> k_tile, int keys) {
    constexpr int ROW_GROUPS = QUERIES / 16, COL_GROUPS = Shape::WARPS / ROW_GROUPS,
                  N = (HS / 8 + COL_GROUPS - 1) / COL_GROUPS;
    constexpr bool EVEN = 8 * N * COL_GROUPS == HS;  // otherwise the last warps have fewer columns
    int warp = threadIdx.x / WARP, row = warp % ROW_GROUPS * 16, col = warp / ROW_GROUPS * 8 * N;
    float dq[N][4] = {};
#pragma unroll 4
    for (int k = 0; k < keys; k += 16) {
        uint32_t ds_frag[4];
        ds_tile.load_a_transposed(ds_frag, k, row);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            if (!EVEN && col + 8 * n >= HS) break;
            uint32_t k_frags[4];
            k_tile.load_b(k_frags, k, col + 8 * n);
            mma(dq[n], ds_frag, k_frags[0], k_frags[1]);
            if (n + 1 < N) mma(dq[n + 1], ds_frag, k_frags[2], k_frags[3]);
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            int query = row + element_row(i), c = col + 8 * n + element_col(i);
            if (query < valid && (EVEN || c < HS))
                *(float2*)(to + query * HS + c) = make_float2(dq[n][i], dq[n][i + 1]);
        }
}

// dK and dV; with FIVE_PRODUCTS also the parts of dQ, for which warps exchange dS^T. It is double-buffered
// too: a step's part of dQ is computed in the next step, after the barrier that is there anyway. Products and
// copies are in key_step, store_dq_part and prefetch: what would change with wgmma and TMA.
template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS)
    attention_backward_key_kernel(floatX* dqkv, float* bias_partials, float* dq_parts, const RowStats* stats,
                                  const floatX* dout, const floatX* qkv, int T, int NH, Dropout dropout) {
    constexpr int HS = Shape::HS, M_FRAGS = Shape::M_FRAGS, KEYS = Shape::ROWS, QUERIES = Shape::STEP,
                  THREADS = Shape::THREADS;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    Head<HS> head(T, NH);
    const floatX *q = qkv + head.qkv_offset, *k = q + head.C, *v = k + head.C,
                 *head_dout = dout + head.out_offset;
    size_t stride = head.qkv_stride;
    stats += head.index * stats_rows(T);
    if constexpr (Shape::FIVE_PRODUCTS)
        dq_parts += (head.index * dq_rows(T, KEYS) + dq_part(blockIdx.y, T, KEYS)) * HS;
    KeyMemory<Shape> smem(dynamic_smem);
    auto prefetch = [&](int step) {
        int q0 = step * QUERIES;
        QueryTiles<HS> to = smem.queries(step);
        to.q.template copy_async<QUERIES, THREADS>(q + q0 * stride, stride, T - q0);
        to.dout.template copy_async<QUERIES, THREADS>(head_dout + q0 * head.C, head.C, T - q0);
        if (threadIdx.x < QUERIES / 2)  // two rows' statistics are 16 bytes
            cp_async16(to.stats + 2 * threadIdx.x, stats + q0 + 2 * threadIdx.x, true);
        cp_async_commit();
    };

    int k0 = blockIdx.y * KEYS;  // the first keys are seen by the most queries, and begin first
    int warp_row = threadIdx.x / WARP * 16 * M_FRAGS, warp_key = k0 + warp_row;
    int first = k0 / QUERIES, steps = (T + QUERIES - 1) / QUERIES;  // earlier queries see none of the keys
    float scale = rsqrtf((float)HS);
    Accumulators<Shape::M_FRAGS, Shape::HS / 8> dk = {}, dv = {};
    auto store_dq = [&](int step) {
        int q0 = step * QUERIES;
        store_dq_part<Shape>(dq_parts + (size_t)q0 * HS, T - q0, smem.ds(step), smem.k,
                             min(KEYS, q0 + QUERIES - k0));
    };

    smem.k.template copy_async<KEYS, THREADS>(k + k0 * stride, stride, T - k0);
    smem.v.template copy_async<KEYS, THREADS>(v + k0 * stride, stride, T - k0);
    prefetch(first);
    for (int step = first; step < steps; step++) {
        int q0 = step * QUERIES;
        cp_async_wait<0>();
        __syncthreads();  // this step's tiles have arrived, and no warp reads the other stage any more
        if (step + 1 < steps) prefetch(step + 1);
        if (q0 + QUERIES > warp_key) {  // otherwise all queries come before the warp's keys
            // Made in each step: kept through all of them, its registers spill on sm_100 and sm_120.
            HeadDropout drop(dropout, T, NH);
            Accumulators<Shape::M_FRAGS, Shape::STEP / 8> ds = {};
            key_step<Shape>(dk, dv, ds, smem.k.from_row(warp_row), smem.v.from_row(warp_row),
                            smem.queries(step), drop, q0, warp_key);
            if constexpr (Shape::FIVE_PRODUCTS)
                write_tile<QUERIES, M_FRAGS>(smem.ds(step).from_row(warp_row), ds);
        }
        if constexpr (Shape::FIVE_PRODUCTS)
            if (step > first) store_dq(step - 1);
    }
    if constexpr (Shape::FIVE_PRODUCTS) {
        __syncthreads();  // all warps have written the last dS^T
        store_dq(steps - 1);
    }
    // dK is finished before dV is begun: a shorter life of dK's registers.
    floatX* to = dqkv + head.qkv_offset + warp_key * stride;
    Tile<HS> stage = smem.v.from_row(warp_row);  // not K, which other warps may still read for dQ
    for_elements<M_FRAGS, HS / 8>(dk, [=](float& x, int, int, int) { x *= scale; });
    store_column_sums<HS, M_FRAGS>(bias_part(bias_partials, head, NH, 1), dk, smem.stages.base);
    store_rows<HS, M_FRAGS>(to + head.C, stride, T - warp_key, dk, stage);
    float dropout_scale = HeadDropout(dropout, T, NH).scale;
    for_elements<M_FRAGS, HS / 8>(dv, [=](float& x, int, int, int) { x *= dropout_scale; });
    store_column_sums<HS, M_FRAGS>(bias_part(bias_partials, head, NH, 2), dv, smem.stages.base);
    store_rows<HS, M_FRAGS>(to + 2 * head.C, stride, T - warp_key, dv, stage);
}

#else

// --- fp32: the same computation without tensor cores. A block's 256 threads form a square of 16 x 16, and
// so do the elements of a result that they compute at a time: thread (ty, tx) owns rows ty + 16i and columns
// tx + 16j, R of each in a tile of scores. Sixteen threads of equal ty, which are half a warp, thus hold
// whole rows:
//
//     columns   0 ........ 15   16 ....... 31  ...
//     row 0     tx = 0 ... 15   tx = 0 ... 15        ty = 0, lanes 0 to 15 of warp 0
//     row 1     tx = 0 ... 15   tx = 0 ... 15        ty = 1, lanes 16 to 31 of warp 0
//     ...
//     row 16    tx = 0 ... 15   tx = 0 ... 15        ty = 0 again
//
// Tiles are square, and their rows in shared memory are padded by one float against bank conflicts. The
// launch bounds request one block per multiprocessor: otherwise ptxas spills registers, to fit more blocks
// than shared memory admits.

template <int HS>
struct ForwardShape {
    static constexpr int THREADS = 256, R = HS <= 64 ? 4 : 2, QUERIES = 16 * R, LD = HS + 1,
                         P_LD = QUERIES + 1;
    static constexpr size_t SMEM = (size_t)(3 * LD + P_LD) * QUERIES * sizeof(float);
};
template <int HS_, int STEP_, bool FIVE_PRODUCTS_>
struct BackwardShape : ForwardShape<HS_> {
    static constexpr int HS = HS_, ROWS = ForwardShape<HS>::QUERIES;
    static constexpr bool FIVE_PRODUCTS = FIVE_PRODUCTS_;
    static constexpr size_t SMEM =
        (size_t)(4 * ForwardShape<HS>::LD + 2 * ForwardShape<HS>::P_LD) * ROWS * sizeof(float);
};

// acc += A B over k < K. A (row, k) = a[row * a_row + k * a_k], B (k, col) = b[k * b_k + col * b_col].
template <int R, int N>
__device__ inline void multiply(float (&acc)[R][N], int K, const float* a, int a_row, const float* b, int b_k,
                                int b_col, int a_k = 1) {
    a += threadIdx.x / 16 * a_row, b += threadIdx.x % 16 * b_col;
    for (int k = 0; k < K; k++) {
        float a_values[R], b_values[N];
        for (int i = 0; i < R; i++) a_values[i] = a[16 * i * a_row + k * a_k];
        for (int j = 0; j < N; j++) b_values[j] = b[k * b_k + 16 * j * b_col];
        for (int i = 0; i < R; i++)
            for (int j = 0; j < N; j++) acc[i][j] += a_values[i] * b_values[j];
    }
}

// Copies a tile's rows, `stride` apart; from row `valid` on they become zero.
template <int HS>
__device__ inline void load_rows(float* tile, const float* from, size_t stride, int valid) {
    using Shape = ForwardShape<HS>;
    for (int i = threadIdx.x; i < Shape::QUERIES * HS; i += Shape::THREADS)
        tile[i / HS * Shape::LD + i % HS] = i / HS < valid ? from[i / HS * stride + i % HS] : 0;
}
template <int HS, int R>
__device__ inline void store_rows(float* to, size_t stride, int valid, const float (&acc)[R][HS / 16],
                                  float factor) {
    for (int i = 0; i < R; i++)
        for (int j = 0; j < HS / 16; j++) {
            int row = threadIdx.x / 16 + 16 * i;
            if (row < valid) to[row * stride + threadIdx.x % 16 + 16 * j] = acc[i][j] * factor;
        }
}

// Column sums of a tile of rows, times a factor, to HS floats. As in bf16: all threads call it, stage is
// shared memory for HS floats of each warp, rows past T are zero, and `to` may be null.
template <int HS, int R>
__device__ inline void store_column_sums(float* to, const float (&acc)[R][HS / 16], float factor,
                                         float* stage) {
    if (!to) return;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    __syncthreads();
    for (int j = 0; j < HS / 16; j++) {
        float sum = 0;
        for (int i = 0; i < R; i++) sum += acc[i][j];
        sum += __shfl_xor_sync(~0u, sum, 16);
        if (lane < 16) stage[warp * HS + lane + 16 * j] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= HS) return;
    float sum = 0;
    for (int w = 0; w < (int)(blockDim.x / WARP); w++) sum += stage[w * HS + threadIdx.x];
    to[threadIdx.x] = sum * factor;
}

// Sum and maximum over the 16 threads that share their rows.
__device__ inline float row_sum(float x) {
    for (int offset = 8; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
    return x;
}
__device__ inline float row_max(float x) {
    for (int offset = 8; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
    return x;
}

// Which elements dropout keeps of the tile of scores at (query, key): bit i R + j is for this thread's row i
// and column j. Rows are queries or, with KEY_ROWS, keys.
template <bool KEY_ROWS, int R>
__device__ inline uint32_t draw_dropout(const HeadDropout& drop, int query, int key) {
    if (!drop.on) return ~0u;
    uint32_t keep_bits = 0;
#pragma unroll 2
    for (int e = 0; e < R * R; e++) {
        int row = threadIdx.x / 16 + e / R * 16, col = threadIdx.x % 16 + e % R * 16;
        keep_bits |= drop.keep(query + (KEY_ROWS ? col : row), key + (KEY_ROWS ? row : col)) << e;
    }
    return keep_bits;
}

template <int HS>
__global__ void __launch_bounds__(ForwardShape<HS>::THREADS, 1)
    attention_forward_kernel(float* out, float* lse, const float* qkv, int T, int NH, Dropout dropout) {
    using Shape = ForwardShape<HS>;
    constexpr int R = Shape::R, ROWS = Shape::QUERIES, LD = Shape::LD, P_LD = Shape::P_LD;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    float *q_tile = (float*)dynamic_smem, *k_tile = q_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD,
          *p_tile = v_tile + ROWS * LD;
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const float *q = qkv + head.qkv_offset, *k = q + head.C, *v = k + head.C;
    size_t stride = head.qkv_stride;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16,
        q0 = (gridDim.y - 1 - blockIdx.y) * ROWS;  // the queries that see the most keys begin first
    float scale = rsqrtf((float)HS), scale_log2 = scale * LOG2E;
    float o[R][HS / 16] = {}, running_max[R], running_sum[R] = {};  // the sum: of this thread's columns
    for (int i = 0; i < R; i++) running_max[i] = -INFINITY;
    load_rows<HS>(q_tile, q + q0 * stride, stride, T - q0);
    for (int k0 = 0; k0 <= q0; k0 += ROWS) {
        __syncthreads();  // until all threads have read the previous tiles
        load_rows<HS>(k_tile, k + k0 * stride, stride, T - k0);
        load_rows<HS>(v_tile, v + k0 * stride, stride, T - k0);
        __syncthreads();
        uint32_t keep_bits = draw_dropout<false, R>(drop, q0, k0);
        float s[R][R] = {};
        multiply(s, HS, q_tile, LD, k_tile, 1, LD);
        for (int i = 0; i < R; i++) {  // online softmax, row by row
            int row = ty + 16 * i;
            float max = running_max[i];
            for (int j = 0; j < R; j++) {
                if (k0 + tx + 16 * j > q0 + row) s[i][j] = -INFINITY;
                max = fmaxf(max, s[i][j]);
            }
            max = row_max(max);  // finite: the first tile has a key for every query
            float rescale = exp2_approx((running_max[i] - max) * scale_log2);
            running_max[i] = max, running_sum[i] *= rescale;
            for (int j = 0; j < HS / 16; j++) o[i][j] *= rescale;
            for (int j = 0; j < R; j++) {
                float p = exp2_approx((s[i][j] - max) * scale_log2);
                running_sum[i] += p;
                p_tile[row * P_LD + tx + 16 * j] = keep_bits >> (i * R + j) & 1 ? p : 0;
            }
        }
        __syncwarp();  // enough: a row of P is written and read by the same half of a warp
        multiply(o, ROWS, p_tile, P_LD, v_tile, LD, 1);
    }
    for (int i = 0; i < R; i++) {
        float sum = row_sum(running_sum[i]);
        int query = q0 + ty + 16 * i;
        if (tx == 0 && query < T) lse[head.index * T + query] = running_max[i] * scale + logf(sum);
        for (int j = 0; j < HS / 16; j++) o[i][j] /= sum;
    }
    store_rows<HS>(out + head.out_offset + q0 * head.C, head.C, T - q0, o, drop.scale);
}

// dQ, and the row statistics (B*NH, stats_rows(T)) that the second kernel reads.
template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1)
    attention_backward_query_kernel(float* dqkv, float* bias_partials, RowStats* stats, const float* dout,
                                    const float* out, const float* qkv, const float* lse, int T, int NH,
                                    Dropout dropout) {
    constexpr int HS = Shape::HS, R = Shape::R, ROWS = Shape::ROWS, LD = Shape::LD, P_LD = Shape::P_LD;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    float *q_tile = (float*)dynamic_smem, *k_tile = q_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD,
          *dout_tile = v_tile + ROWS * LD, *ds_tile = dout_tile + ROWS * LD;
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const float *q = qkv + head.qkv_offset, *k = q + head.C, *v = k + head.C,
                *head_dout = dout + head.out_offset;
    size_t stride = head.qkv_stride;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16, q0 = (gridDim.y - 1 - blockIdx.y) * ROWS;
    float scale = rsqrtf((float)HS), scale_log2 = scale * LOG2E;
    float dq[R][HS / 16] = {};
    RowStats row_stats[R];
    for (int i = 0; i < R; i++) {
        int query = q0 + ty + 16 * i;
        float d = 0;
        if (query < T)
            for (int c = tx; c < HS; c += 16)
                d += out[head.out_offset + query * head.C + c] * head_dout[query * head.C + c];
        row_stats[i] = {query < T ? lse[head.index * T + query] * LOG2E : INFINITY, row_sum(d)};
        if (tx == 0) stats[head.index * stats_rows(T) + query] = row_stats[i];
    }
    load_rows<HS>(q_tile, q + q0 * stride, stride, T - q0);
    load_rows<HS>(dout_tile, head_dout + q0 * head.C, head.C, T - q0);
    for (int k0 = 0; k0 <= q0; k0 += ROWS) {
        __syncthreads();
        load_rows<HS>(k_tile, k + k0 * stride, stride, T - k0);
        load_rows<HS>(v_tile, v + k0 * stride, stride, T - k0);
        __syncthreads();
        uint32_t keep_bits = draw_dropout<false, R>(drop, q0, k0);
        float s[R][R] = {}, dp[R][R] = {};
        multiply(s, HS, q_tile, LD, k_tile, 1, LD);
        multiply(dp, HS, dout_tile, LD, v_tile, 1, LD);
        for (int i = 0; i < R; i++)
            for (int j = 0; j < R; j++) {
                int query = q0 + ty + 16 * i, key = k0 + tx + 16 * j;
                float p = key <= query ? exp2_approx(s[i][j] * scale_log2 - row_stats[i].lse_log2) : 0;
                float dropped_dp = keep_bits >> (i * R + j) & 1 ? dp[i][j] * drop.scale : 0;
                ds_tile[(ty + 16 * i) * P_LD + tx + 16 * j] = p * (dropped_dp - row_stats[i].d);
            }
        __syncwarp();
        multiply(dq, ROWS, ds_tile, P_LD, k_tile, LD, 1);
    }
    store_rows<HS>(dqkv + head.qkv_offset + q0 * stride, stride, T - q0, dq, scale);
    store_column_sums<HS>(bias_part(bias_partials, head, NH, 0), dq, scale, k_tile);
}

// dK and dV, and with FIVE_PRODUCTS the parts of dQ: a row of S is a key here. A block owns fewer keys than
// in bf16, so there are more parts.
template <class Shape>
__global__ void __launch_bounds__(Shape::THREADS, 1)
    attention_backward_key_kernel(float* dqkv, float* bias_partials, float* dq_parts, const RowStats* stats,
                                  const float* dout, const float* qkv, int T, int NH, Dropout dropout) {
    constexpr int HS = Shape::HS, R = Shape::R, ROWS = Shape::ROWS, LD = Shape::LD, P_LD = Shape::P_LD;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    float *q_tile = (float*)dynamic_smem, *k_tile = q_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD,
          *dout_tile = v_tile + ROWS * LD, *p_tile = dout_tile + ROWS * LD, *ds_tile = p_tile + ROWS * P_LD;
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const float *q = qkv + head.qkv_offset, *k = q + head.C, *v = k + head.C,
                *head_dout = dout + head.out_offset;
    size_t stride = head.qkv_stride;
    stats += head.index * stats_rows(T);
    if constexpr (Shape::FIVE_PRODUCTS)
        dq_parts += (head.index * dq_rows(T, ROWS) + dq_part(blockIdx.y, T, ROWS)) * HS;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16,
        k0 = blockIdx.y * ROWS;  // the keys that the most queries see begin first
    float scale = rsqrtf((float)HS), scale_log2 = scale * LOG2E;
    float dk[R][HS / 16] = {}, dv[R][HS / 16] = {};
    load_rows<HS>(k_tile, k + k0 * stride, stride, T - k0);
    load_rows<HS>(v_tile, v + k0 * stride, stride, T - k0);
    for (int q0 = k0; q0 < T; q0 += ROWS) {
        __syncthreads();
        load_rows<HS>(q_tile, q + q0 * stride, stride, T - q0);
        load_rows<HS>(dout_tile, head_dout + q0 * head.C, head.C, T - q0);
        __syncthreads();
        uint32_t keep_bits = draw_dropout<true, R>(drop, q0, k0);
        float s[R][R] = {}, dp[R][R] = {};
        multiply(s, HS, k_tile, LD, q_tile, 1, LD);
        multiply(dp, HS, v_tile, LD, dout_tile, 1, LD);
        for (int i = 0; i < R; i++)
            for (int j = 0; j < R; j++) {
                int query = q0 + tx + 16 * j, key = k0 + ty + 16 * i, at = (ty + 16 * i) * P_LD + tx + 16 * j;
                bool keep = keep_bits >> (i * R + j) & 1;
                float p = key <= query ? exp2_approx(s[i][j] * scale_log2 - stats[query].lse_log2) : 0;
                p_tile[at] = keep ? p : 0;
                ds_tile[at] = p * ((keep ? dp[i][j] * drop.scale : 0) - stats[query].d);
            }
        __syncwarp();
        multiply(dv, ROWS, p_tile, P_LD, dout_tile, LD, 1);
        multiply(dk, ROWS, ds_tile, P_LD, q_tile, LD, 1);
        if constexpr (Shape::FIVE_PRODUCTS) {
            __syncthreads();  // a row of dQ needs the whole tile of dS
            float dq[R][HS / 16] = {};
            multiply(dq, ROWS, ds_tile, 1, k_tile, LD, 1, P_LD);
            store_rows<HS>(dq_parts + (size_t)q0 * HS, HS, T - q0, dq, 1);
        }
    }
    float* to = dqkv + head.qkv_offset + k0 * stride;
    store_rows<HS>(to + head.C, stride, T - k0, dk, scale);
    store_rows<HS>(to + 2 * head.C, stride, T - k0, dv, drop.scale);
    store_column_sums<HS>(bias_part(bias_partials, head, NH, 1), dk, scale, q_tile);
    store_column_sums<HS>(bias_part(bias_partials, head, NH, 2), dv, drop.scale, q_tile);
}

#endif

// --- the two small kernels of the way with five products

// The row statistics (B*NH, stats_rows(T)): four lanes compute a row.
template <int HS>
__global__ void __launch_bounds__(4 * STATS_ROWS)
    attention_row_stats_kernel(RowStats* stats, const floatX* dout, const floatX* out, const float* lse,
                               int T, int NH) {
    Head<HS> head(T, NH);
    int query = blockIdx.y * STATS_ROWS + threadIdx.x / 4;
    size_t row = head.out_offset + query * head.C;
    float d = query < T ? dot_quarter<HS>(out + row, dout + row) : 0;
    for (int offset = 1; offset < 4; offset *= 2) d += __shfl_xor_sync(~0u, d, offset);
    if (threadIdx.x % 4 == 0)
        stats[head.index * stats_rows(T) + query] = {
            query < T ? lse[head.index * T + query] * LOG2E : INFINITY, d};
}

// dQ: the sum of each query's parts in the order of their keys, times 1/sqrt(hs), rounded once. A block owns
// KEYS queries, which have equally many parts, ROWS at a time; a thread adds VEC columns of a query.
constexpr int ADD_DQ_THREADS = 256;
template <int HS, int KEYS>
__global__ void __launch_bounds__(ADD_DQ_THREADS)
    attention_add_dq_kernel(floatX* dqkv, float* bias_partials, const float* dq_parts, int T, int NH) {
    constexpr int CHUNKS = HS / VEC, ROWS = ADD_DQ_THREADS / CHUNKS;  // a few threads may be left over
    Head<HS> head(T, NH);
    int row = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS * VEC, parts = blockIdx.y + 1;
    float scale = rsqrtf((float)HS);
    dq_parts += head.index * dq_rows(T, KEYS) * HS + c;
    Floats column_sums = {};
    for (int i = row; i < KEYS && row < ROWS; i += ROWS) {
        int query = blockIdx.y * KEYS + i;
        if (query >= T) break;
        Floats sum = {};
#pragma unroll 4
        for (int j = 0; j < parts; j++) {
            Floats part = load_floats(dq_parts + (dq_part(j, T, KEYS) + query) * HS);
            for (int e = 0; e < VEC; e++) sum[e] += part[e];
        }
        for (int e = 0; e < VEC; e++) sum[e] *= scale, column_sums[e] += sum[e];
        store(dqkv + head.qkv_offset + query * head.qkv_stride + c, narrow(sum));
    }
    float* to = bias_part(bias_partials, head, NH, 0);
    if (!to) return;
    __shared__ float sums[ROWS][HS];
    if (row < ROWS)
        for (int e = 0; e < VEC; e++) sums[row][c + e] = column_sums[e];
    __syncthreads();
    if (threadIdx.x >= HS) return;
    float sum = 0;
    for (int r = 0; r < ROWS; r++) sum += sums[r][threadIdx.x];
    to[threadIdx.x] = sum;
}

// Shared memory that a block may have: 163 KiB on A100, 227 on Hopper and datacenter Blackwell, 99 on others.
inline size_t shared_memory_limit() {
    int bytes;
    CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_number()));
    return (size_t)bytes;
}
// Calls f(BackwardShape) with the largest tiles that this GPU's shared memory takes.
template <int HS, bool FIVE_PRODUCTS, class F>
inline void with_largest_tiles(F f) {
    constexpr size_t EVERYWHERE = 99 << 10;  // bytes that all GPUs from Ampere on have
    using Large = BackwardShape<HS, 32, FIVE_PRODUCTS>;
    using Small = BackwardShape<HS, 16, FIVE_PRODUCTS>;
    static_assert(Small::SMEM <= EVERYWHERE && ForwardShape<HS>::SMEM <= EVERYWHERE, "shared memory");
    if constexpr (Large::SMEM > EVERYWHERE)
        if (Large::SMEM > shared_memory_limit()) return f(Small());
    f(Large());
}
// The same for a head size and the switch.
template <class F>
inline void with_backward_shape(size_t hs, F f) {
    with_head_size(hs, [&](auto n) {
        constexpr int HS = decltype(n)::value;
        if (switches.five_products) with_largest_tiles<HS, true>(f);
        else with_largest_tiles<HS, false>(f);
    });
}
// Allows the kernels of this head size the shared memory that they need. To be called once per device before
// the functions below, and again when the switch has changed, and not while a graph is captured.
inline void attention_init(size_t hs) {
    with_backward_shape(hs, [](auto shape) {
        using Shape = decltype(shape);
        allow_smem(attention_forward_kernel<Shape::HS>, ForwardShape<Shape::HS>::SMEM);
        if constexpr (!Shape::FIVE_PRODUCTS) allow_smem(attention_backward_query_kernel<Shape>, Shape::SMEM);
        allow_smem(attention_backward_key_kernel<Shape>, Shape::SMEM);
    });
}

// cpu::Attention::forward. out (B,T,C) and lse (B,NH,T) from qkv (B,T,3C).
inline void attention_forward(floatX* out, float* lse, const floatX* qkv, size_t B, size_t T, size_t C,
                              size_t NH, const Dropout& drop, cudaStream_t s) {
    with_head_size(C / NH, [&](auto n) {
        constexpr int HS = decltype(n)::value;
        using Shape = ForwardShape<HS>;
        dim3 grid(B * NH, ceil_div(T, Shape::QUERIES));
        launch(attention_forward_kernel<HS>, grid, Shape::THREADS, Shape::SMEM, s, out, lse, qkv, T, NH,
               drop);
    });
}

// Floats of the row statistics of all heads; and floats of scratch that attention_backward needs: these, with
// five products the parts of dQ, and with dbias (`bias`) a row of column sums for each tile of dQKV. None of
// these numbers depends on the device.
inline size_t row_stats_floats(size_t B, size_t T, size_t NH) {
    return B * NH * stats_rows(T) * (sizeof(RowStats) / sizeof(float));
}
inline size_t attention_backward_scratch(size_t B, size_t T, size_t C, size_t NH, bool bias) {
    size_t n = row_stats_floats(B, T, NH);
    with_head_size(C / NH, [&](auto hs) {
        constexpr size_t ROWS = BackwardShape<decltype(hs)::value, 16, true>::ROWS;
        if (switches.five_products) n += B * C * dq_rows(T, ROWS);
        if (bias) n += B * ceil_div(T, ROWS) * 3 * C;
    });
    return n;
}

// cpu::Attention::backward. With dbias also dbias += column sums of dqkv, taken before dqkv is rounded to
// floatX.
inline void attention_backward(const AttentionBackward& args, size_t B, size_t T, size_t C, size_t NH,
                               const Dropout& drop, cudaStream_t s) {
    with_backward_shape(C / NH, [&](auto shape) {
        using Shape = decltype(shape);
        constexpr int HS = Shape::HS;
        dim3 grid(B * NH, ceil_div(T, Shape::ROWS));
        RowStats* stats = (RowStats*)args.scratch;
        float* dq_parts = args.scratch + row_stats_floats(B, T, NH);
        const size_t dq_floats = Shape::FIVE_PRODUCTS ? B * C * dq_rows(T, Shape::ROWS) : 0;
        float* partials = args.dbias ? dq_parts + dq_floats : nullptr;
        if constexpr (Shape::FIVE_PRODUCTS)
            launch(attention_row_stats_kernel<HS>, dim3(B * NH, stats_rows(T) / STATS_ROWS), 4 * STATS_ROWS,
                   0, s, stats, args.dout, args.out, args.lse, T, NH);
        else
            launch(attention_backward_query_kernel<Shape>, grid, Shape::THREADS, Shape::SMEM, s, args.dqkv,
                   partials, stats, args.dout, args.out, args.qkv, args.lse, T, NH, drop);
        launch(attention_backward_key_kernel<Shape>, grid, Shape::THREADS, Shape::SMEM, s, args.dqkv,
               partials, dq_parts, stats, args.dout, args.qkv, T, NH, drop);
        if constexpr (Shape::FIVE_PRODUCTS)
            launch(attention_add_dq_kernel<HS, Shape::ROWS>, grid, ADD_DQ_THREADS, 0, s, args.dqkv, partials,
                   dq_parts, T, NH);
        if (partials)
            add_partials(args.dbias, nullptr, nullptr, partials, (int)(grid.x / NH * grid.y), 3 * C, s);
    });
}

// ---------------------------------------------------------------------------------------------
// GELU and bias

// simd::gelu_tanh and simd::gelu_erf: GELU (Hendrycks and Gimpel 2016) and its derivative. The tanh form is
// computed as x sigmoid(2u), which has no cancellation. The erf form's normal distribution function is
// Abramowitz and Stegun 7.1.26, to 3e-7.
__device__ inline float gelu(float x, float* derivative, int activation) {
    if (activation == GELU_TANH) {
        float u2 = 1.59576912f * (x + 0.044715f * x * x * x), s = __fdividef(1.0f, 1.0f + exponential(-u2));
        *derivative = s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * x * x);
        return x * s;
    }
    float a = fabsf(x) * 0.70710678f, t = __fdividef(1.0f, 1.0f + 0.3275911f * a), e = exponential(-a * a);
    float tail =
        0.5f * e * t *
        (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float cdf = x < 0 ? tail : 1.0f - tail;
    *derivative = cdf + x * 0.39894228f * e;
    return x * cdf;
}

__global__ void __launch_bounds__(256)
    gelu_forward_kernel(floatX* y, const floatX* x, size_t n, int activation) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Floats f = widen(load_once(x + i));
    float unused;
    for (int k = 0; k < VEC; k++) f[k] = gelu(f[k], &unused, activation);
    store(y + i, narrow(f));
}
// simd::gelu_forward. y = gelu(x), n values, a multiple of 8; y may be x.
inline void gelu_forward(floatX* y, const floatX* x, size_t n, int activation, cudaStream_t s) {
    launch(gelu_forward_kernel, dim3((unsigned)ceil_div(n, 256 * VEC)), 256, 0, s, y, x, n, activation);
}

// d *= gelu'(x).
__device__ inline void multiply_by_gelu_derivative(Floats& d, const Floats& x, int activation) {
    for (int k = 0; k < VEC; k++) {
        float derivative;
        gelu(x[k], &derivative, activation);
        d[k] *= derivative;
    }
}
__global__ void __launch_bounds__(256)
    gelu_backward_kernel(floatX* d, const floatX* x, size_t n, int activation) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Floats f = widen(load_once(x + i)), g = widen(load_once(d + i));
    multiply_by_gelu_derivative(g, f, activation);
    store(d + i, narrow(g));
}
// simd::gelu_backward. d *= gelu'(x), n values, a multiple of 8.
inline void gelu_backward(floatX* d, const floatX* x, size_t n, int activation, cudaStream_t s) {
    launch(gelu_backward_kernel, dim3((unsigned)ceil_div(n, 256 * VEC)), 256, 0, s, d, x, n, activation);
}

// A thread keeps the bias of its columns, and takes rows blockIdx.y, blockIdx.y + gridDim.y, ...
__global__ void __launch_bounds__(256) bias_gelu_forward_kernel(floatX* pre, floatX* out, const floatX* bias,
                                                                size_t M, size_t N, int activation) {
    size_t c = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (c >= N) return;
    Floats b = widen(load(bias + c));
    for (size_t m = blockIdx.y; m < M; m += gridDim.y) {
        Floats f = widen(load_once(pre + m * N + c));
        for (int k = 0; k < VEC; k++) f[k] += b[k];
        Vec<floatX> rounded = narrow(f);
        store(pre + m * N + c, rounded);
        if (!out) continue;
        f = widen(rounded);  // backward reads the rounded value
        float unused;
        for (int k = 0; k < VEC; k++) f[k] = gelu(f[k], &unused, activation);
        store(out + m * N + c, narrow(f));
    }
}
// pre (M,N) += bias, N a multiple of 8; then out = gelu(pre), unless out is null.
inline void bias_gelu_forward(floatX* pre, floatX* out, const floatX* bias, size_t M, size_t N,
                              int activation, cudaStream_t s) {
    unsigned threads = threads_for(N / VEC, 256);
    size_t strips = ceil_div(N / VEC, threads),
           rows = std::min(M, ceil_div((size_t)multiprocessors() * 32, strips));
    launch(bias_gelu_forward_kernel, dim3((unsigned)strips, (unsigned)rows), threads, 0, s, pre, out, bias, M,
           N, activation);
}

// Partial column sums, partials (gridDim.y, N). Block (x, y) sums 32 vectors of columns over every
// gridDim.y-th group of BIAS_WARPS rows, beginning with group y. With GELU each dY is first multiplied by
// gelu'(x). A thread loads BIAS_LOADS rows before it stores the first (see load_bits).
constexpr int BIAS_WARPS = 8, BIAS_LOADS = 4;
template <bool GELU>
__global__ void __launch_bounds__(BIAS_WARPS* WARP)
    bias_backward_kernel(float* partials, std::conditional_t<GELU, floatX, const floatX>* dY, const floatX* x,
                         size_t M, size_t N, int activation) {
    __shared__ __align__(16) float part[BIAS_WARPS * WARP * VEC];
    int warp = threadIdx.x / WARP;
    size_t c = ((size_t)blockIdx.x * WARP + threadIdx.x % WARP) * VEC, step = (size_t)gridDim.y * BIAS_WARPS;
    Floats sum = {};
    if (c < N)
        for (size_t m = (size_t)blockIdx.y * BIAS_WARPS + warp; m < M; m += BIAS_LOADS * step) {
            int4 d_bits[BIAS_LOADS], x_bits[BIAS_LOADS];
#pragma unroll
            for (int i = 0; i < BIAS_LOADS; i++) {
                size_t at = (m + i * step) * N + c;
                if (m + i * step >= M) continue;
                d_bits[i] = load_bits(dY + at);
                if constexpr (GELU) x_bits[i] = load_bits_once(x + at);
            }
#pragma unroll
            for (int i = 0; i < BIAS_LOADS; i++) {
                if (m + i * step >= M) continue;
                Floats d = widen(d_bits[i]);
                if constexpr (GELU) {
                    multiply_by_gelu_derivative(d, widen(x_bits[i]), activation);
                    store(dY + (m + i * step) * N + c, narrow(d));
                }
                for (int k = 0; k < VEC; k++) sum[k] += d[k];
            }
        }
    for (int k = 0; k < VEC; k++) part[threadIdx.x * VEC + k] = sum[k];
    __syncthreads();
    if (warp != 0 || c >= N) return;
    for (int w = 1; w < BIAS_WARPS; w++)
        for (int k = 0; k < VEC; k++) sum[k] += part[(w * WARP + threadIdx.x) * VEC + k];
    store_floats(partials + blockIdx.y * N + c, sum);
}
inline size_t bias_backward_parts(size_t N) {
    return ceil_div((size_t)multiprocessors() * 4, ceil_div(N / VEC, WARP));
}
// Floats of scratch that bias_backward needs.
inline size_t bias_backward_scratch(size_t N) { return bias_backward_parts(N) * N; }

template <bool GELU, class D>
inline void bias_backward(float* db, float* scratch, D* dY, const floatX* x, size_t M, size_t N,
                          int activation, cudaStream_t s) {
    size_t parts = std::min(bias_backward_parts(N), ceil_div(M, BIAS_WARPS));
    launch(bias_backward_kernel<GELU>, dim3((unsigned)ceil_div(N / VEC, WARP), (unsigned)parts),
           BIAS_WARPS * WARP, 0, s, scratch, dY, x, M, N, activation);
    add_partials(db, nullptr, nullptr, scratch, (int)parts, N, s);
}
// gemm::bias_gradient. db (N) += column sums of dY (M,N), N a multiple of 8.
inline void bias_backward(float* db, float* scratch, const floatX* dY, size_t M, size_t N, cudaStream_t s) {
    bias_backward<false>(db, scratch, dY, nullptr, M, N, 0, s);
}
// simd::gelu_backward and gemm::bias_gradient in one. d (M,N) *= gelu'(x); db (N) += column sums of d, which
// are taken before d is rounded to floatX. N a multiple of 8.
inline void gelu_bias_backward(float* db, float* scratch, floatX* d, const floatX* x, size_t M, size_t N,
                               int activation, cudaStream_t s) {
    bias_backward<true>(db, scratch, d, x, M, N, activation, s);
}

__global__ void __launch_bounds__(256) add_to_kernel(float* y, const float* x, size_t n) {
    size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += x[i];
}
// y += x, n values.
inline void add_to(float* y, const float* x, size_t n, cudaStream_t s) {
    launch(add_to_kernel, dim3((unsigned)ceil_div(n, 256)), 256, 0, s, y, x, n);
}

// ---------------------------------------------------------------------------------------------
// Softmax cross-entropy

// VEC logits, from column v on. Those past the vocabulary become -infinity, a probability of 0.
__device__ inline Floats logits_at(int4 bits, size_t v, size_t V) {
    Floats f = widen(bits);
    if (v + VEC > V)
        for (int k = 0; k < VEC; k++)
            if (v + k >= V) f[k] = -INFINITY;
    return f;
}

// A block computes rows blockIdx.x, blockIdx.x + gridDim.x, ... It reads a row twice: first for the maximum
// and the sum of exponentials together (online softmax, Milakov and Gimelshein 2018), then from its end back
// to its start, which finds more of it in the caches, for the gradient. A thread loads LOGIT_LOADS vectors
// before it uses or stores the first (see load_bits).
constexpr int LOGIT_LOADS = 4;
__global__ void __launch_bounds__(512)
    cross_entropy_kernel(float* losses, floatX* logits, const int* targets, size_t rows, size_t V, size_t Vp,
                         bool train, const StepState* state) {
    const size_t stride = blockDim.x * VEC, rounds = (Vp + stride - 1) / stride;
    for (size_t m = blockIdx.x; m < rows; m += gridDim.x) {
        floatX* row = logits + m * Vp;
        int target = targets[m];
        if (target < 0) {
            if (threadIdx.x == 0) losses[m] = 0;
            if (train)
                for (size_t v = threadIdx.x * VEC; v < Vp; v += stride) store(row + v, narrow(Floats{}));
            continue;
        }
        float target_logit = to_float(row[target]), max = -FLT_MAX, sum = 0;
        int4 bits[LOGIT_LOADS];
        for (size_t first = 0; first < rounds; first += LOGIT_LOADS) {
            const size_t at = first * stride + threadIdx.x * VEC;
#pragma unroll
            for (int i = 0; i < LOGIT_LOADS; i++)
                if (at + i * stride < V) bits[i] = load_bits(row + at + i * stride);
#pragma unroll
            for (int i = 0; i < LOGIT_LOADS; i++) {
                if (at + i * stride >= V) continue;
                Floats f = logits_at(bits[i], at + i * stride, V);
                float old_max = max;
                for (int k = 0; k < VEC; k++) max = fmaxf(max, f[k]);
                sum *= exponential(old_max - max);
                for (int k = 0; k < VEC; k++) sum += exponential(f[k] - max);
            }
        }
        float row_max = block_max(max);
        sum = block_sum(sum * exponential(max - row_max));
        if (threadIdx.x == 0) losses[m] = logf(sum) - (target_logit - row_max);
        if (!train) continue;
        float scale = state->grad_scale, factor = scale / sum;
        for (size_t end = (rounds + LOGIT_LOADS - 1) / LOGIT_LOADS * LOGIT_LOADS; end > 0;
             end -= LOGIT_LOADS) {
            const size_t at = (end - LOGIT_LOADS) * stride + threadIdx.x * VEC;
#pragma unroll
            for (int i = LOGIT_LOADS; i-- > 0;)
                if (at + i * stride < Vp) bits[i] = load_bits(row + at + i * stride);
#pragma unroll
            for (int i = LOGIT_LOADS; i-- > 0;) {
                const size_t v = at + i * stride;
                if (v >= Vp) continue;
                Floats f = logits_at(bits[i], v, V);
                for (int k = 0; k < VEC; k++)
                    f[k] = exponential(f[k] - row_max) * factor - (v + k == (size_t)target ? scale : 0.0f);
                store(row + v, narrow(f));
            }
        }
    }
}
// Number of blocks: one per row. With the switch rows_in_l2, as many as keep their rows within half of the L2
// cache, so that the second read finds them there, but at least one per multiprocessor. Half, because between
// the two reads of a value other blocks finish their row and begin the next.
inline size_t cross_entropy_blocks(size_t rows, size_t row_bytes) {
    if (!switches.rows_in_l2) return rows;
    int l2_bytes;
    CUDA_CHECK(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device_number()));
    return std::min(rows, std::max((size_t)multiprocessors(), (size_t)l2_bytes / 2 / row_bytes));
}
// cpu::cross_entropy. logits (rows, Vp), Vp a multiple of 8: losses = -log p[target], 0 where target < 0.
// With `train` the logits become their gradient, (p - onehot) * state->grad_scale, and columns V..Vp become
// 0; without it state may be null.
inline void cross_entropy(float* losses, floatX* logits, const int* targets, size_t rows, size_t V, size_t Vp,
                          bool train, const StepState* state, cudaStream_t s) {
    const size_t blocks = cross_entropy_blocks(rows, Vp * sizeof(floatX));
    launch(cross_entropy_kernel, dim3((unsigned)blocks), threads_for(Vp / VEC, 512), 0, s, losses, logits,
           targets, rows, V, Vp, train, state);
}

// A single block, so that the sum is always in the same order.
__global__ void __launch_bounds__(1024)
    sum_losses_kernel(double* loss_sum, unsigned long long* counted, const float* losses, const int* targets,
                      size_t M, const StepState* state) {
    double sums[2] = {0, 0};
#pragma unroll 4
    for (size_t m = threadIdx.x; m < M; m += blockDim.x) sums[0] += losses[m], sums[1] += targets[m] >= 0;
    group_sum(sums, blockDim.x / WARP);
    if (threadIdx.x != 0) return;
    *loss_sum += state ? sums[0] * state->grad_scale : sums[0];
    if (counted) *counted += (unsigned long long)sums[1];
}
// *loss_sum += the sum of losses (M), in training (state not null) times grad_scale. *counted += the number
// of targets >= 0; counted may be null.
inline void sum_losses(double* loss_sum, unsigned long long* counted, const float* losses, const int* targets,
                       size_t M, const StepState* state, cudaStream_t s) {
    launch(sum_losses_kernel, 1, 1024, 0, s, loss_sum, counted, losses, targets, M, state);
}

// ---------------------------------------------------------------------------------------------
// AdamW

// Rounds to bf16, up or down at random so that the mean is x: the low 16 of `bits`, which are random, are
// added to the 16 bits that bf16 lacks, and the result is truncated.
__device__ inline __nv_bfloat16 round_stochastic(float x, uint32_t bits) {
    if (x != x) return __float2bfloat16_rn(x);
    __nv_bfloat16_raw r;
    r.x = (unsigned short)((__float_as_uint(x) + (bits & 0xffff)) >> 16);
    return r;
}

// Parameters, gradients and moments are stored layer by layer in memory and tensor by tensor in the model
// file. The kernels below visit elements in the file's order, which decides the order of sums, and number
// them as in the file, which decides random bits; so no result depends on the layout in memory. With several
// ranks they visit only the elements that this rank updates. A table in device memory maps a visit to memory.
// It has one segment for each tensor of each layer.
struct Segment {
    size_t end;  // number of the visit after its last one
    // Visit e is of the element with these indices: e + file in the model file, e + memory in arrays of the
    // whole model, e + state in the first moments and the masters, e + second in the second moments, e +
    // grads in the gradients.
    ptrdiff_t file, memory, state, second, grads;
    bool decays;  // weight decay applies
};
struct ParamMap {
    const Segment* segments = nullptr;
    size_t n = 0;  // visits
};
// The segments of these pieces, some of a model's owned_pieces().
inline std::vector<Segment> param_segments(const std::vector<OwnedPiece>& pieces, const Sharding& sharding) {
    std::vector<Segment> segments;
    size_t visits = 0;
    for (const OwnedPiece& p : pieces) {
        auto shift = [&](size_t index) { return (ptrdiff_t)index - (ptrdiff_t)visits; };
        segments.push_back({visits + p.size, shift(p.file), shift(p.memory), shift(p.shard), shift(p.second),
                            shift(sharding.shards_gradients() ? p.shard : p.memory), p.decay});
        visits += p.size;
    }
    return segments;
}
// Those of them that AdamW updates.
inline std::vector<OwnedPiece> adamw_pieces(std::vector<OwnedPiece> pieces, Optimizer optimizer) {
    auto by_muon = [&](const OwnedPiece& p) { return state_has(MUON_M, optimizer, p.block_matrix); };
    pieces.erase(std::remove_if(pieces.begin(), pieces.end(), by_muon), pieces.end());
    return pieces;
}
// Advances `segment` to the one that contains visit e, and returns it. A thread's visits ascend. Segments
// begin at multiples of 8 elements, so that no vector spans two of them.
__device__ inline Segment find_segment(const Segment*& segment, size_t e) {
    while (e >= segment->end) segment++;
    return *segment;
}

// Writes VEC parameters, from the file's element e on. In bf16 they are rounded stochastically: a Philox
// block has 16 bits for each of eight elements.
__device__ inline void store_parameters(floatX* to, size_t e, const Floats& w, const rng::Key& key) {
    if constexpr (BUILD_DTYPE == BF16) {
        rng::Block r = key.block(e / 8);
        Vec<floatX> x;
        for (int k = 0; k < VEC; k++) x[k] = round_stochastic(w[k], r.w[k / 2] >> (k % 2 * 16));
        store_once(to, x);
    } else {
        store_once(to, narrow(w));
    }
}

// Pass 1: partial sums of the gradients' squares, one a block, in double as in cpu::GPT2::grad_norm.
constexpr int ADAMW_THREADS = 256;
__global__ void __launch_bounds__(ADAMW_THREADS)
    grad_norm_kernel(double* partials, const float* grads, ParamMap map) {
    double sum[1] = {0};
    const Segment* segment = map.segments;
    size_t stride = (size_t)gridDim.x * blockDim.x * 4;
#pragma unroll 4
    for (size_t e = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; e < map.n; e += stride) {
        Vec<float> g = load_once(grads + e + find_segment(segment, e).grads);
        for (int k = 0; k < 4; k++) sum[0] += (double)g[k] * g[k];
    }
    group_sum(sum, blockDim.x / WARP);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum[0];
}

// Whether a step is taken, as StepSettings::takes() says, and the factor that clips its gradients.
// cpu::GPT2::step knows both before it calls update(). Here the host would have to wait for the loss and the
// norm; so each of the optimizer's kernels computes the two.
struct Verdict {
    bool takes;
    float scale;
};
struct Limits {
    float grad_clip;
    double max_loss, max_norm;
    explicit Limits(const StepSettings& a)
        : grad_clip(a.grad_clip), max_loss(a.max_loss), max_norm(a.max_norm) {}
    __device__ Verdict judge(double loss, double norm) const {
        const bool takes = isfinite(loss) && isfinite(norm) && loss <= max_loss && norm <= max_norm;
        return {takes, grad_clip > 0 && norm > grad_clip ? (float)(grad_clip / norm) : 1.0f};
    }
};

// The settings of one step. correct1 and correct2 are 1 / (1 - beta^t) and correct the moments, which begin
// at 0. `limits` decide whether the step is taken, and how far its gradients are scaled down.
struct AdamWStep {
    float beta1, beta2, lr, eps, correct1, correct2;
    Limits limits;
    float weight_decay;
    uint32_t t;     // the step's number
    uint64_t seed;  // with t the key of the rounding to bf16
};

// What grad_norm(), update() and Muon read and write. The arrays are laid out as `map` says, for AdamW, and
// as MuonTarget says, for Muon.
struct AdamWArrays {
    // update() writes *loss and the gradients' norm before clipping to it; Muon's kernels, which follow, read
    // them there.
    StepResult* report = nullptr;
    floatX* params = nullptr;
    float* master = nullptr;           // null without master weights, and in fp32
    float *m = nullptr, *v = nullptr;  // the moments; m is also Muon's momentum
    const float* grads = nullptr;      // not changed
    const double* loss = nullptr;
    double* scratch = nullptr;  // adamw_scratch() doubles
    ParamMap map;               // the parameters that AdamW updates
    ParamMap norm_map;          // those whose gradients grad_norm() counts
};

// Pass 2. Each block sums pass 1's partial sums itself, all in the same order.
__global__ void __launch_bounds__(ADAMW_THREADS) adamw_kernel(AdamWArrays arrays, int parts, AdamWStep s) {
    double sum[1] = {0};
    for (int i = threadIdx.x; i < parts; i += blockDim.x) sum[0] += arrays.scratch[i];
    group_sum(sum, blockDim.x / WARP);
    double norm = sqrt(sum[0]), loss = *arrays.loss;
    if (blockIdx.x == 0 && threadIdx.x == 0) arrays.report->loss = loss, arrays.report->norm = norm;
    const Verdict verdict = s.limits.judge(loss, norm);
    if (!verdict.takes) return;

    rng::Key key(s.seed, s.t, rng::ROUNDING);
    const Segment* segment = arrays.map.segments;
    size_t stride = (size_t)gridDim.x * blockDim.x * VEC;
    for (size_t e = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC; e < arrays.map.n; e += stride) {
        Segment at = find_segment(segment, e);
        size_t i = e + at.state, i2 = e + at.second;
        floatX* param = arrays.params + e + at.memory;
        float shrink = 1.0f - (at.decays ? s.lr * s.weight_decay : 0.0f);
        Floats g = load_floats(arrays.grads + e + at.grads), m = load_floats(arrays.m + i),
               v = load_floats(arrays.v + i2);
        Floats w = arrays.master ? load_floats(arrays.master + i) : widen(load_once(param));
        for (int k = 0; k < VEC; k++) {
            float gk = g[k] * verdict.scale;
            m[k] = s.beta1 * m[k] + (1 - s.beta1) * gk;
            v[k] = s.beta2 * v[k] + (1 - s.beta2) * gk * gk;
            w[k] = w[k] * shrink - s.lr * (m[k] * s.correct1) / (sqrtf(v[k] * s.correct2) + s.eps);
        }
        store_floats(arrays.m + i, m), store_floats(arrays.v + i2, v);
        if (arrays.master) store_floats(arrays.master + i, w);
        store_parameters(param, e + at.file, w, key);
    }
}

inline int grad_norm_blocks() { return 8 * multiprocessors(); }
// Doubles of scratch that grad_norm() and update() need.
inline size_t adamw_scratch() { return grad_norm_blocks(); }

// Pass 1: writes partial sums of the gradients' squares to arrays.scratch, and returns their number.
inline int grad_norm(const AdamWArrays& arrays, cudaStream_t s) {
    const ParamMap& map = arrays.norm_map;
    int parts = (int)std::min<size_t>(grad_norm_blocks(), ceil_div(map.n, ADAMW_THREADS * 4));
    launch(grad_norm_kernel, dim3((unsigned)parts), ADAMW_THREADS, 0, s, arrays.scratch, arrays.grads, map);
    return parts;
}

// The gradients' norm is the root of the sum of arrays.scratch's first `parts` numbers. If
// StepSettings::takes() loss and norm, takes one step of AdamW (Loshchilov and Hutter 2019), number t from 1.
// Gradients whose norm exceeds grad_clip are scaled down to it; weight decay applies where param_table says
// so. bf16 parameters are rounded stochastically, keyed by seed and t.
inline void update(const AdamWArrays& arrays, int parts, const StepSettings& a, uint32_t t, uint64_t seed,
                   cudaStream_t s) {
    auto correct = [t](float beta) { return (float)(1 / (1 - std::pow((double)beta, t))); };
    const AdamWStep step = {a.beta1,          a.beta2,   a.lr,           a.eps, correct(a.beta1),
                            correct(a.beta2), Limits(a), a.weight_decay, t,     seed};
    size_t blocks = std::min<size_t>(4 * multiprocessors(), ceil_div(arrays.map.n, ADAMW_THREADS * VEC));
    launch(adamw_kernel, dim3((unsigned)blocks), ADAMW_THREADS, 0, s, arrays, parts, step);
}

// What ranks add up between the two: totals[0] is this rank's loss, totals[1] its sum of squares. A block of
// one warp.
__global__ void rank_totals_kernel(double* totals, const double* loss, const double* partials, int parts) {
    double sum = 0;
    for (int i = threadIdx.x; i < parts; i += WARP) sum += partials[i];
    sum = warp_sum(sum);
    if (threadIdx.x == 0) totals[0] = *loss, totals[1] = sum;
}

__global__ void __launch_bounds__(ADAMW_THREADS)
    round_parameters_kernel(floatX* params, const float* master, ParamMap map, rng::Key key) {
    const Segment* segment = map.segments;
    size_t stride = (size_t)gridDim.x * blockDim.x * VEC;
    for (size_t e = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC; e < map.n; e += stride) {
        Segment at = find_segment(segment, e);
        store_parameters(params + e + at.memory, e + at.file, load_floats(master + e + at.state), key);
    }
}
// Rounds params from the master weights as step number t did, so that a resumed run continues bit for bit.
inline void round_parameters(floatX* params, const float* master, const ParamMap& map, uint64_t seed,
                             uint32_t t, cudaStream_t s) {
    size_t blocks = std::min<size_t>(8 * multiprocessors(), ceil_div(map.n, ADAMW_THREADS * VEC));
    launch(round_parameters_kernel, dim3((unsigned)blocks), ADAMW_THREADS, 0, s, params, master, map,
           rng::Key(seed, t, rng::ROUNDING));
}

// Writes n numbers between -1 and 1.
__global__ void fill_kernel(floatX* x, size_t n) {
    const rng::Key key(1, 0, rng::INIT);
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += stride)
        x[i] = from_float<floatX>((float)key.block(i / 4).w[i % 4] * 0x1p-31f - 1.0f);
}

// ---------------------------------------------------------------------------------------------
// Matrix products by cuBLASLt

// A stream, an event, device memory, and pinned host memory (which copies between host and device need to be
// asynchronous), each released by its destructor.
struct Stream {
    cudaStream_t stream = nullptr;
    explicit Stream(bool first = false) {  // `first`: its kernels are scheduled before those of others
        int least, greatest;
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
        CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, first ? greatest : least));
    }
    ~Stream() { cudaStreamDestroy(stream); }
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    void wait() const { CUDA_CHECK(cudaStreamSynchronize(stream)); }
};
struct Event {
    cudaEvent_t event = nullptr;
    Event() { CUDA_CHECK(cudaEventCreate(&event)); }
    ~Event() { cudaEventDestroy(event); }
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    void record(cudaStream_t s) { CUDA_CHECK(cudaEventRecord(event, s)); }
    void wait() const { CUDA_CHECK(cudaEventSynchronize(event)); }
    // Work that is submitted to `s` from now on begins when the event has come.
    void hold(cudaStream_t s) const { CUDA_CHECK(cudaStreamWaitEvent(s, event, 0)); }
};
struct DeviceMemory {
    char* p = nullptr;
    DeviceMemory() = default;
    ~DeviceMemory() { cudaFree(p); }
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;
    void allocate(size_t bytes) { CUDA_CHECK(cudaMalloc(&p, bytes)); }
};
struct PinnedMemory {
    char* p = nullptr;
    PinnedMemory() = default;
    ~PinnedMemory() { cudaFreeHost(p); }
    PinnedMemory(const PinnedMemory&) = delete;
    PinnedMemory& operator=(const PinnedMemory&) = delete;
    void allocate(size_t bytes) { CUDA_CHECK(cudaMallocHost(&p, bytes)); }
};

// Y (M,N) = X (M,K) W^T + b, W (N,K), and its gradients. All matrices are row-major. To cuBLASLt, whose
// matrices are column-major, each is its transpose; so it computes the transposed products D = A B:
//     FORWARD          Y^T (N,M)  = W X^T           A = W transposed, B = X
//     INPUT_GRADIENT   dX^T (K,M) = W^T dY^T        A = W, B = dY
//     WEIGHT_GRADIENT  dW^T (K,N) = X^T dY [+ dW^T] A = X, B = dY transposed; D is float
// Products are summed in fp32. The fp32 build computes in true fp32: TF32 would be faster and would not agree
// with the CPU.
enum Product { FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT };

// Remembers in a file, named by the GPU and cuBLASLt's version, which algorithm and which way (see Matmul)
// was the fastest for each product, so that a later run need not time them again, and computes the same bits.
// A line is "choice in hex, space, product". Damaged lines are ignored, and their products are timed again.
class ProductChoices {
  public:
    ProductChoices() {
        const char *xdg = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
        if (xdg && *xdg) dir_ = xdg;
        else if (home && *home) dir_ = std::string(home) + "/.cache";
        else return;
        dir_ += "/arapoet";
        std::string name = device_properties().name;
        for (char& c : name)
            if (!isalnum((unsigned char)c)) c = '_';
        path_ = dir_ + strf("/gemm-%s-%zu.txt", name.c_str(), cublasLtGetVersion());
        if (!file_exists(path_)) return;
        try {
            take(Reader(path_).rest());
        } catch (const Error& e) {
            fprintf(stderr, "%s; the products are timed again\n", e.what());
        }
    }
    // The choices as lines of the file.
    std::string text() const {
        std::string lines;
        for (auto& [product, hex] : hex_) lines += hex + " " + product + "\n";
        return lines;
    }
    void take(const std::string& text) {
        for (size_t i = 0, end; i < text.size(); i = end + 1) {
            end = std::min(text.find('\n', i), text.size());
            size_t space = text.find(' ', i);
            if (space < end) hex_[text.substr(space + 1, end - space - 1)] = text.substr(i, space - i);
        }
    }
    // C is an algorithm or a number.
    template <class C>
    bool find(const std::string& product, C* choice) const {
        auto at = hex_.find(product);
        if (at == hex_.end() || at->second.size() != 2 * sizeof *choice) return false;
        for (size_t i = 0; i < sizeof *choice; i++) {
            int used = 0;
            unsigned byte;
            if (sscanf(at->second.c_str() + 2 * i, "%2x%n", &byte, &used) != 1 || used != 2) return false;
            ((unsigned char*)choice)[i] = (unsigned char)byte;
        }
        return true;
    }
    template <class C>
    void put(const std::string& product, const C& choice) {
        std::string hex;
        for (size_t i = 0; i < sizeof choice; i++) hex += strf("%02x", ((const unsigned char*)&choice)[i]);
        hex_[product] = hex, changed_ = true;
    }
    // Where the file cannot be written this run goes on with a warning, and the next one times again.
    void save() {
        if (!changed_ || path_.empty()) return;
        try {
            make_dirs(dir_);
            if (file_exists(path_)) {  // what another run has added meanwhile stays
                const std::map<std::string, std::string> mine = hex_;
                take(Reader(path_).rest());
                for (auto& [product, hex] : mine) hex_[product] = hex;
            }
            AtomicFile file(path_);
            file.write(text());
            file.commit();
        } catch (const Error& e) {
            fprintf(stderr, "%s; the next run times the products again, and may differ in the last bits\n",
                    e.what());
        }
        changed_ = false;
    }

  private:
    std::string dir_, path_;
    std::map<std::string, std::string> hex_;
    bool changed_ = false;
};

// The products of linear layers on one stream. A plan (descriptors and algorithms) is made once for each
// product, shape and epilogue. A way is a sequence of calls that computes a product and what follows it, a
// bias or a GELU: one call of cuBLASLt with an epilogue, or a plain product and then a kernel. An epilogue
// exists for some shapes only, and is not always faster. With `timing`, ways and algorithms are timed, and
// `choices` keeps the fastest. For a shape that was not timed, or with `deterministic`, a rule decides: the
// first of the ways and of cuBLASLt's proposals that works.
class Matmul {
  public:
#ifdef EMULATOR
    static constexpr size_t WORKSPACE = 1 << 20;
#else
    static constexpr size_t WORKSPACE = 32 << 20;  // bytes; cuBLAS's own default on Hopper
#endif
    // Floats of scratch for the bias gradients of a model with C channels.
    static size_t scratch(size_t C) {
        return std::max(
            {4 * C, bias_backward_scratch(C), bias_backward_scratch(3 * C), bias_backward_scratch(4 * C)});
    }

    bool timing = false;

    Matmul(void* workspace, float* bias_scratch, cudaStream_t stream, bool deterministic)
        : workspace_(workspace), bias_scratch_(bias_scratch), stream_(stream), deterministic_(deterministic) {
        CUBLAS_CHECK(cublasLtCreate(&handle_));
    }
    ~Matmul() {
        for (auto& [key, p] : plans_) {
            for (cublasLtMatrixLayout_t layout : {p.a, p.b, p.d})
                if (layout) cublasLtMatrixLayoutDestroy(layout);
            if (p.operation) cublasLtMatmulDescDestroy(p.operation);
        }
        cublasLtDestroy(handle_);
    }
    Matmul(const Matmul&) = delete;
    Matmul& operator=(const Matmul&) = delete;

    // Y (M,N) = X (M,K) W^T + b, W (N,K), b (N) or null.
    void forward(floatX* Y, const floatX* X, const floatX* W, const floatX* b, size_t M, size_t K, size_t N) {
        if (!b) return run_plain(FORWARD, M, K, N, {W, X, Y, false});
        take(
            "forward", M, K, N,
            [&] {
                return run(FORWARD, CUBLASLT_EPILOGUE_BIAS, M, K, N, {W, X, Y, false, b});
            },
            [&] {
                run_plain(FORWARD, M, K, N, {W, X, Y, false});
                bias_gelu_forward(Y, nullptr, b, M, N, GELU_TANH, stream_);
                return true;
            });
    }
    // pre (M,N) = X (M,K) W^T + b; Y = gelu(pre).
    void forward_gelu(floatX* Y, floatX* pre, const floatX* X, const floatX* W, const floatX* b, size_t M,
                      size_t K, size_t N, int activation) {
        take(
            activation == GELU_TANH ? "forward_gelu" : "forward_gelu_erf", M, K, N,
            [&] {
                if (!run(FORWARD, CUBLASLT_EPILOGUE_BIAS, M, K, N, {W, X, pre, false, b})) return false;
                gelu_forward(Y, pre, M * N, activation, stream_);
                return true;
            },
            [&] {
                return activation == GELU_TANH &&
                       run(FORWARD, CUBLASLT_EPILOGUE_GELU_AUX_BIAS, M, K, N, {W, X, Y, false, b, pre});
            },
            [&] {
                run_plain(FORWARD, M, K, N, {W, X, pre, false});
                bias_gelu_forward(pre, Y, b, M, N, activation, stream_);
                return true;
            });
    }
    // dX (M,K) = dY (M,N) W.
    void input_gradient(floatX* dX, const floatX* dY, const floatX* W, size_t M, size_t K, size_t N) {
        run_plain(INPUT_GRADIENT, M, K, N, {W, dY, dX, false});
    }
    // dX (M,K) = (dY W) gelu'(pre): the gradient of the GELU's input, pre. db (K) += column sums of dX,
    // unless null. The first way takes these sums before dX is rounded to floatX, the second after that.
    void input_gradient_gelu(floatX* dX, float* db, const floatX* dY, const floatX* W, const floatX* pre,
                             size_t M, size_t K, size_t N, int activation) {
        const std::string what =
            strf("input_gradient_gelu%s%s", activation == GELU_TANH ? "" : "_erf", db ? "_bias" : "");
        take(
            what.c_str(), M, K, N,
            [&] {
                input_gradient(dX, dY, W, M, K, N);
                if (db) gelu_bias_backward(db, bias_scratch_, dX, pre, M, K, activation, stream_);
                else gelu_backward(dX, pre, M * K, activation, stream_);
                return true;
            },
            [&] {
                if (activation != GELU_TANH ||
                    !run(INPUT_GRADIENT, CUBLASLT_EPILOGUE_DGELU, M, K, N, {W, dY, dX, false, nullptr, pre}))
                    return false;
                if (db) bias_backward(db, bias_scratch_, dX, M, K, stream_);
                return true;
            });
    }
    // dW (N,K) = dY^T X, or += where accumulate; db (N) += column sums of dY, unless null.
    void weight_gradient(float* dW, float* db, const floatX* dY, const floatX* X, size_t M, size_t K,
                         size_t N, bool accumulate) {
        if (!db) return run_plain(WEIGHT_GRADIENT, M, K, N, {X, dY, dW, accumulate});
        take(
            "weight_gradient", M, K, N,
            [&] {
                run_plain(WEIGHT_GRADIENT, M, K, N, {X, dY, dW, accumulate});
                bias_backward(db, bias_scratch_, dY, M, N, stream_);
                return true;
            },
            [&] {
                if (!run(WEIGHT_GRADIENT, CUBLASLT_EPILOGUE_BGRADB, M, K, N,
                         {X, dY, dW, accumulate, bias_scratch_}))  // which BGRADB overwrites
                    return false;
                add_to(db, bias_scratch_, N, stream_);
                return true;
            });
    }
    // The next two are of `batch` matrices, which follow one another in memory: G (n,n) = X X^T, X (n,m).
    void gram(floatX* G, const floatX* X, size_t n, size_t m, size_t batch) {
        Operands o = {X, X, G, false};
        o.batch = batch;
        run_plain(FORWARD, n, m, n, o);
    }
    // Y (n,m) = alpha F X + beta Z; F (n,n), X and Z (n,m). Y is none of the others.
    void combine(floatX* Y, float alpha, const floatX* F, const floatX* X, float beta, const floatX* Z,
                 size_t n, size_t m, size_t batch) {
        Operands o = {X, F, Y, false};
        o.alpha = alpha, o.beta = beta, o.c = Z, o.batch = batch;
        run_plain(INPUT_GRADIENT, n, m, n, o);
    }
    ProductChoices choices;

  private:
    struct Plan {
        cublasLtMatmulDesc_t operation = nullptr;
        cublasLtMatrixLayout_t a = nullptr, b = nullptr, d = nullptr;
        std::vector<cublasLtMatmulAlgo_t> algos;  // the best first; those that fail are removed
    };
    // What one call reads and writes: D = A B, or D += A B with accumulate, or D = alpha A B + beta C.
    struct Operands {
        const floatX *a, *b;
        void* d;
        bool accumulate;
        const void* bias = nullptr;  // BIAS and GELU_AUX_BIAS read it, BGRADB writes it
        const void* aux = nullptr;   // GELU_AUX_BIAS writes the GELU's input there, DGELU reads it
        const void* c = nullptr;
        float alpha = 1, beta = 0;
        size_t batch = 1;  // so many products, whose operands follow one another
    };
    static constexpr int CANDIDATES = 8;
    // The emulator's clock is exact, and its products are slow.
#ifdef EMULATOR
    static constexpr int ROUNDS = 1, TIMED_RUNS = 1;
    static constexpr float WARM_UP = 0;
#else
    static constexpr int ROUNDS = 5, TIMED_RUNS = 2;
    static constexpr float WARM_UP = 100;  // milliseconds until clocks and power have settled
#endif

    // Computes one product in one of several ways, functions that return false where they cannot.
    template <class... Ways>
    void take(const char* what, size_t M, size_t K, size_t N, Ways... ways) {
        const std::string key =
            strf("way of %s %s M %zu K %zu N %zu", what, BUILD_DTYPE == BF16 ? "bf16" : "fp32", M, K, N);
        uint8_t chosen = UINT8_MAX;
        auto try_way = [&](uint8_t wanted) {
            uint8_t i = 0;
            bool done = false;
            ((done = done || (i++ == wanted && ways())), ...);
            return done;
        };
        const bool known = !deterministic_ && choices.find(key, &chosen) && chosen < sizeof...(ways);
        if (!deterministic_ && !known && timing) {
            const std::vector<float> ms =
                time(sizeof...(ways), [&](size_t i) { return try_way((uint8_t)i); });
            chosen = (uint8_t)(std::min_element(ms.begin(), ms.end()) - ms.begin());
            choices.put(key, chosen);
        }
        if (chosen < sizeof...(ways) && try_way(chosen)) return;
        for (uint8_t i = 0; i < sizeof...(ways); i++)
            if (try_way(i)) return;
        fail("cuBLASLt computes %s in no way", key.c_str());
    }

    void run_plain(Product product, size_t M, size_t K, size_t N, const Operands& o) {
        if (!run(product, CUBLASLT_EPILOGUE_DEFAULT, M, K, N, o))
            fail("cuBLASLt has no algorithm for %s (%s)",
                 name(product, CUBLASLT_EPILOGUE_DEFAULT, M, K, N, o.batch).c_str(),
                 cublasLtGetStatusString(failure_));
    }
    // Computes one product. Returns false, and computes nothing, where cuBLASLt has no algorithm with this
    // epilogue.
    bool run(Product product, cublasLtEpilogue_t epilogue, size_t M, size_t K, size_t N, const Operands& o) {
        auto [at, fresh] = plans_.try_emplace(name(product, epilogue, M, K, N, o.batch));
        Plan& p = at->second;
        if (fresh) describe(p, product, epilogue, M, K, N, o.batch);
        if (o.bias) set(p, CUBLASLT_MATMUL_DESC_BIAS_POINTER, o.bias);
        if (o.aux) set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, o.aux);
        if (fresh) choose(p, at->first, o, (K | N) * sizeof(floatX));
        while (!p.algos.empty()) {
            if (launch_hook) launch_hook(nullptr, at->first.c_str(), stream_, true);
            failure_ = multiply(p, p.algos.front(), o);
            if (launch_hook) launch_hook(nullptr, at->first.c_str(), stream_, false);
            if (failure_ == CUBLAS_STATUS_SUCCESS) return true;
            p.algos.erase(p.algos.begin());
        }
        return false;
    }
    static std::string name(Product product, cublasLtEpilogue_t epilogue, size_t M, size_t K, size_t N,
                            size_t batch) {
        const char* names[] = {"forward", "input_gradient", "weight_gradient"};
        return strf("%s %s M %zu K %zu N %zu epilogue %d", names[product],
                    BUILD_DTYPE == BF16 ? "bf16" : "fp32", M, K, N, (int)epilogue) +
               (batch > 1 ? strf(" batch %zu", batch) : "");
    }
    template <class V>
    static void set(Plan& p, cublasLtMatmulDescAttributes_t attribute, const V& value) {
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(p.operation, attribute, &value, sizeof value));
    }

    static void describe(Plan& p, Product product, cublasLtEpilogue_t epilogue, size_t M, size_t K, size_t N,
                         size_t batch) {
        const cudaDataType_t type = BUILD_DTYPE == BF16 ? CUDA_R_16BF : CUDA_R_32F;
        CUBLAS_CHECK(cublasLtMatmulDescCreate(&p.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        set(p, CUBLASLT_MATMUL_DESC_TRANSA, product == FORWARD ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(p, CUBLASLT_MATMUL_DESC_TRANSB, product == WEIGHT_GRADIENT ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(p, CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
        size_t out = product == FORWARD ? N : K;  // length of D's rows
        if (epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS || epilogue == CUBLASLT_EPILOGUE_DGELU)
            set(p, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)out);
        if (epilogue == CUBLASLT_EPILOGUE_BGRADB) set(p, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, CUDA_R_32F);
        // A row-major (rows, cols) matrix is a column-major (cols, rows) one.
        auto layout = [&](cublasLtMatrixLayout_t* l, cudaDataType_t t, size_t rows, size_t cols) {
            CUBLAS_CHECK(cublasLtMatrixLayoutCreate(l, t, cols, rows, (int64_t)cols));
            if (batch == 1) return;
            auto set = [&](cublasLtMatrixLayoutAttribute_t attribute, auto value) {
                CUBLAS_CHECK(cublasLtMatrixLayoutSetAttribute(*l, attribute, &value, sizeof value));
            };
            set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (int32_t)batch);
            set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (int64_t)(rows * cols));
        };
        layout(&p.a, type, product == WEIGHT_GRADIENT ? M : N, K);
        layout(&p.b, type, M, product == FORWARD ? K : N);
        layout(&p.d, product == WEIGHT_GRADIENT ? CUDA_R_32F : type, product == WEIGHT_GRADIENT ? N : M, out);
    }
    cublasStatus_t multiply(const Plan& p, const cublasLtMatmulAlgo_t& algo, const Operands& o) {
        const float beta = o.accumulate ? 1 : o.beta;
        return cublasLtMatmul(handle_, p.operation, &o.alpha, o.a, p.a, o.b, p.b, &beta, o.c ? o.c : o.d, p.d,
                              o.d, p.d, &algo, workspace_, WORKSPACE, stream_);
    }

    // Finds the plan's algorithms: that of `choices` first, or with `timing` the fastest one (which
    // overwrites o.d); then the others that cuBLASLt proposes. All operands are aligned to the largest power
    // of two, up to 16, that divides row_bytes.
    void choose(Plan& p, const std::string& product, const Operands& o, size_t row_bytes) {
        cublasLtMatmulAlgo_t known;
        cublasLtMatmulHeuristicResult_t check{};
        const bool found = !deterministic_ && choices.find(product, &known) &&
                           cublasLtMatmulAlgoCheck(handle_, p.operation, p.a, p.b, p.d, p.d, &known,
                                                   &check) == CUBLAS_STATUS_SUCCESS &&
                           check.workspaceSize <= WORKSPACE;
        if (found) p.algos.push_back(known);
        propose(p, row_bytes);
        if (found || !timing || p.algos.empty()) return;
        const std::vector<float> ms = time(
            p.algos.size(), [&](size_t i) { return multiply(p, p.algos[i], o) == CUBLAS_STATUS_SUCCESS; });
        std::swap(p.algos[0], p.algos[(size_t)(std::min_element(ms.begin(), ms.end()) - ms.begin())]);
        choices.put(product, p.algos[0]);
    }
    // Appends cuBLASLt's proposals. For an epilogue without support it returns an error or no proposals,
    // depending on its version.
    void propose(Plan& p, size_t row_bytes) {
        cublasLtMatmulHeuristicResult_t result[CANDIDATES]{};
        cublasLtMatmulPreference_t preference;
        CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
        auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
            CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof value));
        };
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (uint64_t)WORKSPACE);
        // Where several blocks compute parts of one sum (split K), the parts are added in fp32.
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (uint32_t)CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
        // At most 16 bytes are promised: with some numbers of ranks a block's parameters are not aligned
        // to 32.
        uint32_t alignment = (uint32_t)std::min<size_t>(16, row_bytes & (~row_bytes + 1));
        for (auto a :
             {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
              CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            prefer(a, alignment);
        int found = 0;
        failure_ = cublasLtMatmulAlgoGetHeuristic(handle_, p.operation, p.a, p.b, p.d, p.d, preference,
                                                  CANDIDATES, result, &found);
        cublasLtMatmulPreferenceDestroy(preference);
        if (failure_ != CUBLAS_STATUS_SUCCESS) return;
        for (int i = 0; i < found; i++)
            if (result[i].state == CUBLAS_STATUS_SUCCESS) p.algos.push_back(result[i].algo);
    }
    // The least milliseconds that each of n ways takes; run(i) computes, and returns false where it cannot
    // (infinity). They are timed in turns, so that a change of the clocks meets all of them.
    template <class F>
    std::vector<float> time(size_t n, F run) {
        std::vector<float> least(n, INFINITY);
        std::vector<size_t> possible;
        for (size_t i = 0; i < n; i++)
            if (run(i)) possible.push_back(i);  // not counted: the first run of a way times its algorithms
        Event start, stop;
        auto measure = [&](size_t i) {
            start.record(stream_);
            for (int k = 0; k < TIMED_RUNS; k++) run(i);
            stop.record(stream_);
            stop.wait();
            float ms;
            CUDA_CHECK(cudaEventElapsedTime(&ms, start.event, stop.event));
            return ms;
        };
        while (!possible.empty() && warmed_up_ < WARM_UP) warmed_up_ += std::max(measure(possible[0]), 1e-3f);
        for (int round = 0; round < ROUNDS; round++)
            for (size_t i : possible) least[i] = std::min(least[i], measure(i));
        return least;
    }

    void* workspace_;
    float* bias_scratch_;
    cudaStream_t stream_;
    const bool deterministic_;
    float warmed_up_ = 0;                             // milliseconds
    cublasStatus_t failure_ = CUBLAS_STATUS_SUCCESS;  // of the last call
    cublasLtHandle_t handle_ = nullptr;
    std::map<std::string, Plan> plans_;
};

// ---------------------------------------------------------------------------------------------
// Muon (see lib/optimizer.h), on the matrices of the blocks. cpu::MuonStep says what a step computes. A GPU
// computes it for several matrices of one shape at once, a round: direction, norm, scaling into X (n,m), n <=
// m, the Newton-Schulz products, and the update of the parameters.

// A matrix of a round. Its element e, counted row after row as it is stored, has these indices, like those of
// a Segment: e + file in the model file, and so on.
struct MuonTarget {
    size_t begin, end;  // the elements that this rank updates
    ptrdiff_t file, memory, state, grads;
    bool transposed;  // stored as (m,n)
};
// A group's, in its order. `pieces` are the owned_pieces() that a rank updates.
inline std::vector<MuonTarget> muon_targets(const MuonGroup& group, const std::vector<OwnedPiece>& pieces,
                                            const Sharding& sharding) {
    std::vector<MuonTarget> targets;
    for (const MuonMatrix& x : group.matrices) {
        MuonTarget t = {0, 0, (ptrdiff_t)x.file, (ptrdiff_t)x.memory, 0, 0, x.transposed};
        for (const OwnedPiece& p : pieces) {  // at most one of which has some of the matrix
            const size_t from = std::max(x.memory, p.memory),
                         to = std::min(x.memory + group.n * group.m, p.memory + p.size);
            if (from >= to) continue;
            t.begin = from - x.memory, t.end = to - x.memory;
            t.state = t.memory + (ptrdiff_t)p.shard - (ptrdiff_t)p.memory;
            t.grads = sharding.shards_gradients() ? t.state : t.memory;
        }
        targets.push_back(t);
    }
    return targets;
}

// One step's settings, as in cpu::MuonStep and AdamWStep.
struct MuonStep {
    float beta, lr, weight_decay;
    Limits limits;
    uint32_t t;
    uint64_t seed;
};
// What one kernel writes for the next is stored past the caches (store_once): a round is often larger than
// L2.
constexpr int MUON_THREADS = 256;
constexpr size_t MUON_PART = 1 << 15;  // elements whose squares a block adds up
// The kernels that may transpose work on a tile of a matrix in a block. Columns and rows are multiples of 16,
// so that no vector extends beyond a matrix.
constexpr unsigned MUON_TILE = 64;

// cpu::muon_direction. The momentum of this rank's elements in all matrices of the round, of `size` elements
// each, and their direction in matrices [first, last). One row of blocks for each matrix.
__global__ void __launch_bounds__(MUON_THREADS)
    muon_direction_kernel(float* directions, size_t first, size_t last, AdamWArrays arrays,
                          const MuonTarget* targets, size_t size, MuonStep s) {
    const Verdict verdict = s.limits.judge(arrays.report->loss, arrays.report->norm);
    if (!verdict.takes) return;
    const MuonTarget at = targets[blockIdx.y];
    const bool wanted = first <= blockIdx.y && blockIdx.y < last;
    const float factor = (1 - s.beta) * verdict.scale;
    const size_t stride = (size_t)gridDim.x * blockDim.x * 4;
    for (size_t e = at.begin + ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; e < at.end; e += stride) {
        float* momentum = arrays.m + e + at.state;
        const Vec<float> g = load_once(arrays.grads + e + at.grads);
        Vec<float> m = load_once(momentum), d;
        for (int k = 0; k < 4; k++) {
            const float gk = factor * g[k];
            m[k] = s.beta * m[k] + gk, d[k] = s.beta * m[k] + gk;
        }
        store_once(momentum, m);
        if (wanted) store_once(directions + blockIdx.y * size + e, d);
    }
}

// squares (matrices, parts): sums of squares of directions (matrices, size). A block computes one.
__global__ void __launch_bounds__(MUON_THREADS)
    muon_squares_kernel(double* squares, const float* directions, size_t size) {
    const float* d = directions + blockIdx.y * size;
    const size_t begin = blockIdx.x * MUON_PART, end = begin + MUON_PART < size ? begin + MUON_PART : size;
    double sum[1] = {0};
#pragma unroll 4
    for (size_t e = begin + threadIdx.x * 4; e < end; e += blockDim.x * 4) {
        const Vec<float> x = load(d + e);
        for (int k = 0; k < 4; k++) sum[0] += (double)x[k] * x[k];
    }
    group_sum(sum, blockDim.x / WARP);
    if (threadIdx.x == 0) squares[blockIdx.y * gridDim.x + blockIdx.x] = sum[0];
}

// The tile of a block in a matrix of these sizes: its first row and column.
struct MuonTile {
    unsigned row, column;
    __device__ MuonTile(unsigned columns) {
        const unsigned across = (columns + MUON_TILE - 1) / MUON_TILE;
        row = blockIdx.x / across * MUON_TILE, column = blockIdx.x % across * MUON_TILE;
    }
};
// Calls f(row, column) for the first element of each vector of a tile; rows and columns are those of the
// matrix from the tile's first element on.
template <class F>
__device__ inline void each_vector(unsigned rows, unsigned columns, F f) {
    constexpr unsigned ACROSS = MUON_TILE / VEC;
    for (unsigned v = threadIdx.x; v < MUON_TILE * ACROSS; v += blockDim.x) {
        const unsigned r = v / ACROSS, c = v % ACROSS * VEC;
        if (r < rows && c < columns) f(r, c);
    }
}

// Each matrix's X (n,m) = its direction divided by its norm, and transposed if it is stored as (m,n).
__global__ void __launch_bounds__(MUON_THREADS)
    muon_scale_kernel(floatX* X, const float* directions, const double* squares, int parts,
                      const MuonTarget* targets, unsigned n, unsigned m) {
    __shared__ float tile[MUON_TILE][MUON_TILE + 1];  // its columns are rows of the stored matrix
    double sum[1] = {0};
    for (int i = threadIdx.x; i < parts; i += blockDim.x) sum[0] += squares[blockIdx.y * parts + i];
    group_sum(sum, blockDim.x / WARP);
    const float factor = 1.0f / fmaxf((float)sqrt(sum[0]), NewtonSchulz::EPS);

    const bool transposed = targets[blockIdx.y].transposed;
    const unsigned rows = transposed ? m : n, columns = transposed ? n : m;
    const MuonTile at(columns);
    directions += (size_t)blockIdx.y * n * m, X += (size_t)blockIdx.y * n * m;
    each_vector(rows - at.row, columns - at.column, [&](unsigned r, unsigned c) {
        const size_t e = (size_t)(at.row + r) * columns + at.column + c;
        Floats x = load_floats(directions + e);
        for (int k = 0; k < VEC; k++) x[k] *= factor;
        if (!transposed) store_once(X + e, narrow(x));
        else
            for (int k = 0; k < VEC; k++) tile[c + k][r] = x[k];
    });
    if (!transposed) return;
    __syncthreads();
    each_vector(columns - at.column, rows - at.row, [&](unsigned r, unsigned c) {
        Floats x;
        for (int k = 0; k < VEC; k++) x[k] = tile[r][c + k];
        store_once(X + (size_t)(at.column + r) * m + at.row + c, narrow(x));
    });
}

// cpu::muon_apply, on this rank's elements: w = w (1 - lr decay) - factor X; X (matrices, n, m).
__global__ void __launch_bounds__(MUON_THREADS)
    muon_apply_kernel(AdamWArrays arrays, const floatX* X, const MuonTarget* targets, unsigned n, unsigned m,
                      float factor, MuonStep s) {
    __shared__ float tile[MUON_TILE][MUON_TILE + 1];
    if (!s.limits.judge(arrays.report->loss, arrays.report->norm).takes) return;
    const MuonTarget target = targets[blockIdx.y];
    const unsigned rows = target.transposed ? m : n, columns = target.transposed ? n : m;
    const MuonTile at(columns);
    const size_t first = (size_t)at.row * columns, end = (size_t)(at.row + MUON_TILE) * columns;
    if (first >= target.end || end <= target.begin) return;
    X += (size_t)blockIdx.y * n * m;
    if (target.transposed) {
        each_vector(columns - at.column, rows - at.row, [&](unsigned r, unsigned c) {
            const Floats x = widen(load_once(X + (size_t)(at.column + r) * m + at.row + c));
            for (int k = 0; k < VEC; k++) tile[r][c + k] = x[k];
        });
        __syncthreads();
    }
    const float shrink = 1.0f - s.lr * s.weight_decay;
    const rng::Key key(s.seed, s.t, rng::ROUNDING);
    each_vector(rows - at.row, columns - at.column, [&](unsigned r, unsigned c) {
        const size_t e = (size_t)(at.row + r) * columns + at.column + c;
        if (e < target.begin || e >= target.end) return;
        Floats x;
        if (!target.transposed) x = widen(load_once(X + e));
        else
            for (int k = 0; k < VEC; k++) x[k] = tile[c + k][r];
        floatX* param = arrays.params + e + target.memory;
        float* master = arrays.master ? arrays.master + e + target.state : nullptr;
        Floats w = master ? load_floats(master) : widen(load_once(param));
        for (int k = 0; k < VEC; k++) w[k] = w[k] * shrink - factor * x[k];
        if (master) store_floats(master, w);
        store_parameters(param, e + target.file, w, key);
    });
}

// Muon's buffers: each rank works on up to `most` matrices of a group at a time.
struct MuonScratch {
    float* directions;              // (ranks, most, n*m)
    double* squares;                // (most, parts(n*m))
    floatX *x, *gram, *polynomial;  // (most, n, m), (most, n, n), (most, n, n)
    // X of all ranks (ranks, most, n, m); the directions are read before it is written
    floatX* results() const { return (floatX*)directions; }

    static size_t parts(size_t size) { return ceil_div(size, MUON_PART); }
    // The matrices of a group that each of `world` ranks takes in one round, so that all of them together
    // have about `elements` elements at most.
    static size_t most(const MuonGroup& group, size_t world, size_t elements) {
        const size_t all = ceil_div(group.matrices.size(), world),
                     fit = std::max<size_t>(elements / (world * group.n * group.m), 1);
        return ceil_div(all, ceil_div(all, fit));
    }
    void place(Arena& a, const Config& c, size_t world, size_t elements) {
        size_t numbers = 0, sums = 0, grams = 0;
        for (const MuonGroup& g : muon_groups(c)) {
            const size_t k = most(g, world, elements), size = g.n * g.m;
            numbers = std::max(numbers, k * size), grams = std::max(grams, k * g.n * g.n);
            sums = std::max(sums, k * parts(size));
        }
        directions = a.take<float>(world, numbers), squares = a.take<double>(sums);
        x = a.take<floatX>(numbers), gram = a.take<floatX>(grams), polynomial = a.take<floatX>(grams);
    }
};

inline dim3 muon_tiles(size_t n, size_t m, size_t count) {
    return dim3((unsigned)(ceil_div(n, MUON_TILE) * ceil_div(m, MUON_TILE)), (unsigned)count);
}
// Matrices [0, count), of `size` elements each: their momentum, and the direction of those in [first, last).
inline void muon_direction(float* directions, size_t first, size_t last, const AdamWArrays& arrays,
                           const MuonTarget* targets, size_t count, size_t size, const MuonStep& step,
                           cudaStream_t s) {
    const size_t blocks = std::min<size_t>(8 * multiprocessors(), ceil_div(size, MUON_THREADS * 4));
    launch(muon_direction_kernel, dim3((unsigned)blocks, (unsigned)count), MUON_THREADS, 0, s, directions,
           first, last, arrays, targets, size, step);
}
// cpu::muon_orthogonalise of `count` matrices: results (count, n, m). They may be where directions are.
inline void muon_orthogonalise(floatX* results, const float* directions, const MuonScratch& scratch,
                               Matmul& products, const MuonTarget* targets, size_t n, size_t m, size_t count,
                               cudaStream_t s) {
    using NS = NewtonSchulz;
    static_assert(NS::ITERATIONS % 2, "the last iteration writes to results");
    if (!count) return;
    const size_t parts = MuonScratch::parts(n * m);
    launch(muon_squares_kernel, dim3((unsigned)parts, (unsigned)count), MUON_THREADS, 0, s, scratch.squares,
           directions, n * m);
    launch(muon_scale_kernel, muon_tiles(n, m, count), MUON_THREADS, 0, s, scratch.x, directions,
           scratch.squares, (int)parts, targets, n, m);
    floatX *from = scratch.x, *to = results, *G = scratch.gram, *P = scratch.polynomial;
    for (int i = 0; i < NS::ITERATIONS; i++, std::swap(from, to)) {
        // P = b G + c G^2, X = a X + P X
        products.gram(G, from, n, m, count);
        products.combine(P, NS::C, G, G, NS::B, G, n, n, count);
        products.combine(to, 1, P, from, NS::A, from, n, m, count);
    }
}
// Updates the parameters of matrices [0, count) by X.
inline void muon_apply(const AdamWArrays& arrays, const floatX* X, const MuonTarget* targets, size_t n,
                       size_t m, size_t count, const MuonStep& step, cudaStream_t s) {
    launch(muon_apply_kernel, muon_tiles(n, m, count), MUON_THREADS, 0, s, arrays, X, targets, n, m,
           step.lr * muon_scale(m), step);
}

// ---------------------------------------------------------------------------------------------
// The model

// Conversions between floatX and float on the host; to bf16 by rounding to nearest.
inline void to_floats(float* out, const floatX* in, size_t n) {
    if constexpr (BUILD_DTYPE == FP32) memcpy(out, in, n * sizeof(float));
    else
        for (size_t i = 0; i < n; i++) out[i] = bf16_to_float(((const uint16_t*)in)[i]);
}
inline void from_floats(floatX* out, const float* in, size_t n) {
    if constexpr (BUILD_DTYPE == FP32) memcpy((void*)out, in, n * sizeof(float));
    else
        for (size_t i = 0; i < n; i++) ((uint16_t*)out)[i] = float_to_bf16(in[i]);
}

// An arena of device memory, or without a base one that only counts. Each piece begins at a multiple of 256
// bytes. In the emulator each piece is followed by a gap, where any access is an error.
inline size_t next_piece(char* base, size_t end) {
#ifdef EMULATOR
    size_t next = emu::arena_gap(end);
    if (base) CUDA_CHECK(emu::poison(base + end, next - end));
    return next;
#else
    (void)base;
    return round_up(end, 256);
#endif
}
inline Arena device_arena(char* base = nullptr) { return {base, 0, next_piece}; }

using Block = Activations<floatX, floatX>::Block;

// Buffers that every layer uses again: gradients of activations, the logits of some rows, scratch.
struct Workspace {
    floatX *dresid, *dbranch, *dln, *dqkv, *dfch, *branch, *logits;
    float *layernorm, *attention, *bias;
    void* products;

    void place(Arena& a, const Config& c, size_t B, size_t T, size_t head_rows, bool trains) {
        size_t M = B * T, C = c.C;
        // branch and dln share memory: a branch's output is added to the residual stream at once, and dln is
        // in use only from head_loss to the end of backward (recomputation writes branch after dln was read).
        // dqkv and dfch share too: dfch is last read before dqkv is written.
        branch = dln = a.take<floatX>(M, C);
        logits = a.take<floatX>(head_rows, c.Vp);
        products = a.take<char>(Matmul::WORKSPACE);
        if (!trains) return;
        dresid = a.take<floatX>(M, C), dbranch = a.take<floatX>(M, C);
        dqkv = dfch = a.take<floatX>(M, 4 * C);
        const bool in_kernels = switches.bias_in_kernels;
        layernorm = a.take<float>(layernorm_backward_scratch(C, in_kernels));
        attention = a.take<float>(attention_backward_scratch(B, T, C, c.NH, in_kernels));
        bias = a.take<float>(Matmul::scratch(C));
    }
};

// The LayerNorm after a block: the next block's first, or the final one.
struct Norm {
    const floatX *w, *b;
    float *dw, *db;
    floatX* y;  // its output (M,C)
    float *mean, *rstd;
    bool final;
};

// The inputs of one micro-step, contiguous so that a single copy brings them to the GPU.
struct Batch {
    StepState* state;
    int *tokens, *targets;
    EmbeddingBuckets buckets;

    static constexpr size_t STATE_INTS = 16;  // room for the state, and for the alignment of what follows
    static size_t bytes(size_t M) { return (STATE_INTS + 2 * M + EmbeddingBuckets::ints(M)) * sizeof(int); }
    Batch(char* memory, size_t M) {
        static_assert(sizeof(StepState) <= STATE_INTS * sizeof(int), "STATE_INTS");
        int* ints = (int*)memory + STATE_INTS;
        state = (StepState*)memory, tokens = ints, targets = ints + M,
        buckets = EmbeddingBuckets::at(ints + 2 * M, M);
    }
    Batch() = default;
};

// What a pass and a step report.
struct Report {
    double loss;                 // sum over targets; in training that of the step so far, times grad_scale
    unsigned long long counted;  // targets >= 0
    StepResult step;
};

// Throws Error, with one line for people, where this machine has no GPU that this program can use.
inline void require_gpu() {
    int count = 0;
    cudaError_t status = cudaGetDeviceCount(&count);
    if (status == cudaErrorInsufficientDriver) {
        int driver = 0, runtime = 0;
        cudaDriverGetVersion(&driver), cudaRuntimeGetVersion(&runtime);
        if (!driver) fail("no NVIDIA driver on this machine; %s", WITHOUT_GPU);
        fail(
            "the NVIDIA driver supports CUDA up to %d.%d, this program was built with %d.%d: update the "
            "driver; %s",
            driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10, WITHOUT_GPU);
    }
    if (status == cudaErrorNoDevice || (status == cudaSuccess && !count))
        fail("no NVIDIA GPU on this machine; %s", WITHOUT_GPU);
    if (status != cudaSuccess)
        fail("no usable GPU: %s (%s); %s", cudaGetErrorString(status), cudaGetErrorName(status), WITHOUT_GPU);
    const cudaDeviceProp p = device_properties();
    if (p.major < 8)
        fail("%s has compute capability %d.%d, wanted 8.0 (Ampere) or later; %s", p.name, p.major, p.minor,
             WITHOUT_GPU);
}

// Makes the GPU with this number the process's own: nvidia-smi's number, unless CUDA_VISIBLE_DEVICES leaves
// some out, which renumbers the others. To be called before CUDA is used.
inline void use_device(int device) {
    setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 0);  // by itself, CUDA numbers the fastest first
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || !count) return;  // require_gpu() says why
    if (device >= count) {
        const char* visible = getenv("CUDA_VISIBLE_DEVICES");
        fail("--device %d: there are %d GPUs, numbered from 0%s%s", device, count,
             visible ? "; CUDA_VISIBLE_DEVICES is " : "", visible ? visible : "");
    }
    CUDA_CHECK(cudaSetDevice(device));
}

// ---------------------------------------------------------------------------------------------
// Ranks: one process for each GPU

#ifdef USE_NCCL
inline void nccl_check(ncclResult_t status, const char* call, const char* file, int line) {
    if (status != ncclSuccess)
        fail("%s:%d: %s: %s (%s); NCCL_DEBUG=INFO tells more", file, line, call, ncclGetErrorString(status),
             ncclGetLastError(nullptr));
}
#define NCCL_CHECK(call) gpu::nccl_check((call), #call, __FILE__, __LINE__)

template <class T>
constexpr ncclDataType_t NCCL_TYPE = std::is_same<T, double>::value  ? ncclDouble
                                     : std::is_same<T, float>::value ? ncclFloat
                                                                     : ncclBfloat16;

// The ranks of the GPU trainer. NCCL combines arrays on the devices, in the order of a stream; what the host
// has goes over TCP, which also notices ranks that have died.
class NcclComm final : public TcpComm {
  public:
    NcclComm(const Launch& launch, const RankOptions& o)
        : TcpComm(launch, o.timeout, PROGRAM), started_by_(launch.by) {}
    void connect() override {
        choose_device();
        ncclUniqueId id = {};
        if (leads()) NCCL_CHECK(ncclGetUniqueId(&id));
        broadcast(&id, sizeof id);
        NCCL_CHECK(ncclCommInitRank(&nccl_, world, id, rank));
        add_up_ones();
        set_check([this]() -> std::string {
            ncclResult_t state;
            ncclCommGetAsyncError(nccl_, &state);
            if (state == ncclSuccess || state == ncclInProgress) return "";
            return strf("NCCL: %s (%s); NCCL_DEBUG=INFO tells more", ncclGetErrorString(state),
                        ncclGetLastError(nccl_));
        });
    }
    ~NcclComm() override {
        set_check(nullptr);
        if (nccl_) ncclCommDestroy(nccl_);
        if (aborting_.joinable()) aborting_.join();
    }
    // Soon afterwards no stream of this rank waits for the others, so that the model can be destroyed.
    void abort(int code, const std::string& line) override {
        TcpComm::abort(code, line);
        if (!nccl_) return;
        // ncclCommAbort first ends the collectives on this GPU. Then it waits until all graphs that captured
        // collectives have been destroyed, which the model's destructor does; so it has a thread of its own.
        // After an error of the GPU it may never return; so the process ends after a while in any case.
        end_process_later(code);
        aborting_ = std::thread([nccl = std::exchange(nccl_, nullptr)] { ncclCommAbort(nccl); });
    }
    bool can_shard() const override { return true; }

    const char* what() const override { return "GPUs"; }
    std::string start_again(const std::string& command) const override {
        const char* c = command.c_str();
        if (started_by_ == "fork") return strf("%s --gpus %d", c, world);
        if (started_by_ == "srun") return strf("srun %s", c);
        if (started_by_ == "mpirun") return strf("mpirun -n %d %s", world, c);
        if (started_by_ == "torchrun" && on_host == world)
            return strf("torchrun --nproc-per-node %d --no-python %s", world, c);
        return command + " on all ranks, started as before";
    }

    // x (n) becomes the sum of all ranks' x.
    template <class T>
    void all_reduce(T* x, size_t n, cudaStream_t s) {
        NCCL_CHECK(ncclAllReduce(x, x, n, NCCL_TYPE<T>, ncclSum, nccl_, s));
    }
    // shard (n) becomes rank r's n elements, from r n on, of the sum of all ranks' x (world n). It may be
    // those of x; the rest of x is then undefined.
    void reduce_scatter(float* shard, const float* x, size_t n, cudaStream_t s) {
        NCCL_CHECK(ncclReduceScatter(x, shard, n, NCCL_TYPE<float>, ncclSum, nccl_, s));
    }
    // x (world n) becomes the ranks' shards (n), rank after rank. A shard may be that part of x.
    template <class T>
    void all_gather(T* x, const T* shard, size_t n, cudaStream_t s) {
        NCCL_CHECK(ncclAllGather(shard, x, n, NCCL_TYPE<T>, nccl_, s));
    }
    using TcpComm::all_gather;
    using TcpComm::all_reduce;

  private:
    struct Device {
        char host[64], bus[20], problem[300];
    };
    // The first sum, which makes NCCL connect the GPUs before a graph is captured.
    void add_up_ones() {
        Stream stream;
        DeviceMemory memory;
        memory.allocate(sizeof(double));
        double sum = 1;
        CUDA_CHECK(cudaMemcpyAsync(memory.p, &sum, sizeof sum, cudaMemcpyHostToDevice, stream.stream));
        all_reduce((double*)memory.p, 1, stream.stream);
        CUDA_CHECK(cudaMemcpyAsync(&sum, memory.p, sizeof sum, cudaMemcpyDeviceToHost, stream.stream));
        stream.wait();
        if (sum != world) fail("NCCL: the sum of a one from each of %d ranks is %g", world, sum);
    }
    // The local_rank-th GPU that CUDA shows, or the only one. Throws Error, on all ranks, where one has none
    // of its own.
    void choose_device() {
        Device mine = {};
        gethostname(mine.host, sizeof mine.host - 1);
        try {
            int count = 0;
            if (cudaGetDeviceCount(&count) == cudaSuccess && count > 1 && local_rank >= count)
                fail("is number %d on %s, which has %d GPUs; start as many ranks as there are GPUs",
                     local_rank + 1, mine.host, count);
            if (count > 1) CUDA_CHECK(cudaSetDevice(local_rank));
            require_gpu();
            CUDA_CHECK(cudaDeviceGetPCIBusId(mine.bus, sizeof mine.bus, device_number()));
        } catch (const Error& e) {
            snprintf(mine.problem, sizeof mine.problem, "%s", e.what());
        }
        const std::vector<Device> all = gather(mine);
        std::string problem;
        for (size_t r = 0; r < all.size() && problem.empty(); r++) {
            if (all[r].problem[0]) problem = strf("rank %zu: %s", r, all[r].problem);
            for (size_t q = 0; q < r && problem.empty(); q++)
                if (!strcmp(all[q].host, all[r].host) && !strcmp(all[q].bus, all[r].bus))
                    problem = strf(
                        "ranks %zu and %zu on %s share one GPU, wanted one for each; start as many ranks as "
                        "there are GPUs",
                        q, r, all[r].host);
        }
        if (problem.empty()) return;
        fail("%s", problem.c_str());
    }
    const std::string started_by_;
    ncclComm_t nccl_ = nullptr;
    std::thread aborting_;
};

inline std::unique_ptr<Comm> open_ranks(const RankOptions& o) {
    Launch launch = find_launch();
    if (o.device >= 0 && (launch.world > 1 || o.gpus > 1))
        throw UsageError(
            "--device: each of several ranks takes its own GPU; CUDA_VISIBLE_DEVICES names them");
    if (o.device >= 0) use_device(o.device);
    if (launch.world == 1 && o.gpus == 1) return std::make_unique<Comm>();
    if (o.gpus > 1 && launch.world > 1)
        throw UsageError(strf("--gpus %d: %s has started %d ranks; leave it out", o.gpus, launch.by.c_str(),
                              launch.world));
    if (o.gpus > 1) launch = fork_ranks(o.gpus);  // before the first call to CUDA
    return std::make_unique<NcclComm>(launch, o);
}
#else
// Built without NCCL: there is one rank.
struct NcclComm : Comm {
    using Comm::all_gather;
    using Comm::all_reduce;
    template <class T>
    void all_reduce(T*, size_t, cudaStream_t) {}
    template <class T>
    void all_gather(T*, const T*, size_t, cudaStream_t) {}
    void reduce_scatter(float*, const float*, size_t, cudaStream_t) {}
};
inline std::unique_ptr<Comm> open_ranks(const RankOptions& o) {
    const int world = std::max(o.gpus, find_launch().world);
    if (world > 1)
        fail(
            "%d ranks need NCCL, which was not there when this program was made: sudo apt-get install "
            "libnccl-dev (NVIDIA's repository), then make train_gpt2cu",
            world);
    if (o.device >= 0) use_device(o.device);
    return std::make_unique<Comm>();
}
#endif

// ---------------------------------------------------------------------------------------------
// The model and its optimizer

struct GPT2 {
    const Config cfg;
    const size_t B, T;  // largest batch; both 0 for a model that only generates
    const bool trains;
    const int recompute;
    float dropout = 0;
    uint64_t seed = 1337;
    const Ranks ranks;
    const Optimizer optimizer;
    bool use_graphs = true;  // false launches each kernel separately
    Params<floatX> params;
    Params<float> grads;  // empty in a model that does not train
    Stream stream;

    static constexpr const char* PROGRAM = gpu::PROGRAM;
    static constexpr Dtype DEFAULT_DTYPE = BUILD_DTYPE;
    static constexpr size_t PIECE = 4 << 20;  // floats that are copied at once through pinned memory
    // Most logits held at once: 256 MiB in bf16, and with the switch large_head up to 2 GiB.
    static inline size_t head_logits = (size_t)1 << 27, large_head_logits = (size_t)1 << 30;
    // About the most elements of matrices that Muon updates at once, but each rank takes at least one matrix.
    // On one GPU that is 320 MiB of buffers in bf16, and 512 MiB in fp32.
    static inline size_t muon_elements = (size_t)1 << 25;

    static void require_device() { require_gpu(); }
    static void set_threads(int) {}
    static std::string device() {
        const cudaDeviceProp d = device_properties();
        return strf("%s, %s, %s", d.name, human_bytes((double)d.totalGlobalMem).c_str(),
                    BUILD_DTYPE == BF16 ? "bf16" : "fp32");
    }
    // Of dense matrices: from NVIDIA's data sheets, or for other GPUs computed from the highest clock.
    static Peak peak_flops(Precision = {}) {
        struct {
            const char* name;   // what the device's name contains; the first match counts
            double bf16, fp32;  // TFLOP/s
        } known[] = {{"A100", 312, 19.5},
                     {"H100 PCIe", 756, 51},
                     {"H100 NVL", 835, 60},
                     {"H100", 989, 67},
                     {"H200", 989, 67}};
        const cudaDeviceProp d = device_properties();
        for (auto& k : known)
            if (strstr(d.name, k.name))
                return {(BUILD_DTYPE == BF16 ? k.bf16 : k.fp32) * 1e12, "by its data sheet"};
        int khz = 0;
        CUDA_CHECK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, device_number()));
        // Floating-point operations of one multiprocessor in one cycle, on tensor cores and without.
        bool a100 = d.major == 8 && d.minor == 0, b200 = d.major == 10;
        double tensor = b200                        ? 8192
                        : d.major == 9              ? 4096
                        : a100                      ? 2048
                        : strstr(d.name, "GeForce") ? 512
                                                    : 1024,
               plain = a100 ? 128 : 256;
        return {(BUILD_DTYPE == BF16 ? tensor : plain) * d.multiProcessorCount * khz * 1e3,
                "at its highest clock"};
    }
    static void check_precision(Precision precision) {
        if (precision.dtype == BUILD_DTYPE) return;
        throw UsageError(
            strf("--dtype: this program computes in %s; the other is built by: make %s PRECISION=%s",
                 BUILD_DTYPE == BF16 ? "bf16" : "fp32", PROGRAM, BUILD_DTYPE == BF16 ? "FP32" : "BF16"));
    }
    static std::unique_ptr<Comm> open_ranks(const RankOptions& o) { return gpu::open_ranks(o); }
    // Free bytes of this rank's GPU, less what CUDA itself will allocate for kernels and graphs.
    static size_t memory_available(int = 1) {
        size_t free_bytes, total;
        CUDA_CHECK(cudaMemGetInfo(&free_bytes, &total));
        return free_bytes - free_bytes / 32;
    }
    // With the switch large_head it depends on free memory, and all ranks must call it. The next constructor
    // then plans with the same free memory, and so takes what this said.
    static MemoryNeed memory_need(const Config& c, size_t B, size_t T, bool trains, int recompute = 0,
                                  Precision precision = {BUILD_DTYPE}, const Ranks& ranks = {},
                                  Optimizer optimizer = ADAMW) {
        large_head_memory_ = large_head_memory(trains, precision, ranks);
        return plan(c, B, T, trains, recompute, precision, ranks, optimizer, large_head_memory_).need;
    }

    // recompute: see Activations::place.
    GPT2(const Config& c, size_t B_, size_t T_, bool trains_, int recompute_ = 0,
         Precision precision = {BUILD_DTYPE}, const Ranks& ranks_ = {}, Optimizer optimizer_ = ADAMW)
        : cfg(c), B(B_), T(T_), trains(trains_), recompute(recompute_), ranks(ranks_), optimizer(optimizer_) {
        check_precision(precision);
        const size_t for_head =
            large_head_memory(trains, precision, ranks, std::exchange(large_head_memory_, 0));
        const auto [need, rows] = plan(c, B, T, trains, recompute, precision, ranks, optimizer, for_head);
        size_t M = B * T;
        head_rows_ = rows;
        weights_.allocate(need.params + need.grads);
        Arena a = device_arena(weights_.p);
        mem_.place_params(a, c, sharding_), mem_.place_gradients(a, c, trains, sharding_);
        params = Params<floatX>(mem_.params, c, sharding_.multiple());
        if (trains) {
            grads = Params<float>(mem_.grads, c, sharding_.multiple(), grad_slots(c, sharding_));
            optimizer_state_.allocate(need.optimizer);
            a = device_arena(optimizer_state_.p);
            mem_.place_optimizer(a, c, trains, precision, sharding_, optimizer);
            begin_optimizer();
        }
        weight_bytes_ = need.params + need.grads, activation_bytes_ = need.activations + need.scratch;
        activations_.allocate(activation_bytes_);
        a = device_arena(activations_.p);
        mem_.place_activations(a, c, M, trains, recompute);
        mem_.place_scratch(a, c, B, T, trains, rows, sharding_, optimizer);
        staging_.allocate(PIECE * (sizeof(float) + sizeof(floatX)));
        report_.allocate(sizeof(Report));
        for (Slot& slot : slots_) {
            slot.memory.allocate(Batch::bytes(M));
            slot.batch = Batch(slot.memory.p, M);
        }
        layernorm_init((size_t)c.C), attention_init((size_t)c.hs());
        matmul_ = std::make_unique<Matmul>(mem_.work.products, mem_.work.bias, stream.stream,
                                           precision.deterministic);
        if (M) choose_products(M, precision.deterministic);
        stream.wait();
    }
    ~GPT2() {
        cudaStreamSynchronize(stream.stream);
        for (Graph& graph : graphs_) cudaGraphExecDestroy(graph.exec);
    }
    GPT2(const GPT2&) = delete;
    GPT2& operator=(const GPT2&) = delete;

    // The CPU's initial weights, bit for bit.
    void init_weights(uint64_t from_seed) {
        auto off = param_offsets(cfg);
        size_t at = 0;  // counted as in the file
        int id = 0;
        each_piece(PARAMS, [&](float* w, size_t n) {
            while (at >= off[id + 1]) id++;
            initial_weights(w, cfg, id, at - off[id], n, from_seed), at += n;
        });
    }

    // Mean loss in nats over the targets >= 0 of tokens and targets (B_,T_), B_ <= B, T_ <= T, without
    // dropout; counted() tells how many.
    double forward(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass = {}) {
        if (pass.train || micro_steps_)
            throw std::logic_error("forward: evaluates between steps; a training pass is accumulate()");
        last_result();  // its report's memory is used again
        run(tokens, targets, B_, T_, pass);
        Report r = read_report();
        counted_ = r.counted;
        return counted_ ? r.loss / (double)counted_ : 0;
    }
    size_t counted() const { return counted_; }

    // Adds a micro-batch's gradients and loss to the step's; returns before they are computed.
    void accumulate(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass) {
        if (!trains || !pass.train)
            throw std::logic_error("accumulate: not a training pass of a model that trains");
        run(tokens, targets, B_, T_, pass);
        micro_steps_++;
    }
    // One step of the optimizer, number t from 1, with the gradient clipped. Where loss or norm is not
    // finite, or above its limit, parameters and moments stay as they are, and the gradients are discarded:
    // the kernels decide that.
    StepResult step(const StepSettings& a, uint32_t t) {
        if (!micro_steps_) throw std::logic_error("step: no gradients were accumulated");
        AdamWArrays arrays;
        arrays.report = &mem_.report->step, arrays.loss = &mem_.report->loss;
        arrays.params = mem_.params, arrays.master = mem_.master;
        arrays.grads = sharding_.shards_gradients() ? mem_.grad_shards : mem_.grads;
        arrays.m = mem_.m, arrays.v = mem_.v, arrays.scratch = mem_.norm_parts;
        arrays.map = adamw_map(), arrays.norm_map = norm_map();
        int parts = grad_norm(arrays, stream.stream);
        if (ranks.several()) {
            launch(rank_totals_kernel, 1, WARP, 0, stream.stream, mem_.totals, arrays.loss, arrays.scratch,
                   parts);
            nccl().all_reduce(mem_.totals, 2, stream.stream);
            arrays.loss = mem_.totals, arrays.scratch = mem_.totals + 1, parts = 1;
        }
        update(arrays, parts, a, t, seed, stream.stream);
        if (optimizer == MUON)
            update_by_muon(arrays, {a.muon_momentum, a.muon_lr, a.weight_decay, Limits(a), t, seed});
        gather_parameters();
        micro_steps_ = 0;
        // The step before is over by now, or nearly: the GPU has its next work.
        const StepResult before = switches.late_results ? last_result() : StepResult();
        CUDA_CHECK(
            cudaMemcpyAsync(report_.p, mem_.report, sizeof(Report), cudaMemcpyDeviceToHost, stream.stream));
        reported_.record(stream.stream);
        pending_ = t;
        return switches.late_results ? before : last_result();
    }
    // Waits for the step that was started last.
    StepResult last_result() {
        if (pending_) {
            reported_.wait();
            last_ = ((Report*)report_.p)->step, last_.step = std::exchange(pending_, 0);
        }
        return last_;
    }

    bool sharded() const { return sharding_.shards_state(); }
    bool has(State s) const {
        return s == MASTER   ? mem_.master && sharded()
               : s == MUON_M ? trains && optimizer == MUON
                             : s == PARAMS || trains;
    }
    // State out and in through pinned memory, piece by piece in the model file's order: f(pointer, number of
    // floats). An f that takes a pointer to const reads, any other writes. A piece lies within one tensor of
    // one layer. PARAMS are the master weights where this rank has all of them; GRADS those of the step so
    // far.
    template <class F>
    void each_piece(State s, F f) {
        if (s != PARAMS && sharded())
            throw std::logic_error("each_piece: this rank holds only a part of that state");
        each_range(s, IgnoreNumber<F>{f});
    }
    // The same for what this rank holds of a state: f(pointer, number of floats, number in the file of the
    // first one). GRADS are the sum over the ranks after a step's last micro-batch.
    template <class F>
    void each_range(State s, F f) {
        if (!has(s)) throw std::logic_error("each_range: this model does not have that state");
        constexpr bool writes = !std::is_invocable<F, const float*, size_t, size_t>::value;
        const bool in_shards = s == GRADS ? sharding_.shards_gradients() : s != PARAMS && sharded();
        float* device = array(s);
        float* host = (float*)staging_.p;
        for (const OwnedPiece& piece : s == PARAMS || !sharded() ? all_ : owned_)
            for (size_t done = 0; done < piece.size && state_has(s, optimizer, piece.block_matrix);
                 done += PIECE) {
                size_t i = (s == ADAM_V ? piece.second : in_shards ? piece.shard : piece.memory) + done;
                size_t n = std::min(PIECE, piece.size - done), number = piece.file + done;
                if (!writes && device) download(host, device + i, n);
                else if (!writes) download_params(host, i, n);
                f(host, n, number);
                if (writes && device) upload(device + i, host, n);
                if (writes && s == PARAMS) {
                    if (has(MASTER)) upload_masters(host, number, n);
                    upload_params(host, i, n);
                }
            }
    }
    // Says that the state just loaded is that after step number t. The bf16 parameters are rounded from their
    // masters as that step rounded them, so that the run continues bit for bit.
    void resumed(uint32_t t) {
        if (!t || !mem_.master) return;
        round_parameters(mem_.params, mem_.master, held_map(), seed, t, stream.stream);
        gather_parameters();
    }
    Matmul& matmul() { return *matmul_; }

  private:
    // Rows that the head computes at a time, of M: parts of equal length, at most `most` rows rounded up to a
    // multiple of 8.
    static size_t equal_parts(size_t M, size_t most) {
        size_t parts = std::max<size_t>(ceil_div(M, std::max<size_t>(most, 1)), 1);
        return std::min(M, round_up(ceil_div(M, parts), 8));
    }
    // The same in a pass over M rows. It is at most head_rows_: that is a multiple of 8, or the largest M.
    size_t head_rows(size_t M) const { return equal_parts(M, head_rows_); }

    // What each arena needs, and the rows of logits in memory.
    struct Plan {
        MemoryNeed need;
        size_t head_rows;
    };
    // The memory that a large head counts on: `measured` bytes or, where that is 0, those that are free now
    // on the rank that has the least, so that ranks decide alike. 0 where there is no large head: without the
    // switch, in a model that does not train, and with `deterministic`, because the number of the head's
    // parts decides the order in which dwte is summed, and so its last bits.
    static size_t large_head_memory(bool trains, Precision precision, const Ranks& ranks,
                                    size_t measured = 0) {
        if (!switches.large_head || !trains || precision.deterministic) return 0;
        if (measured) return measured;
        size_t have = memory_available();
        if (ranks.several())
            for (size_t other : ranks.comm->gather(have)) have = std::min(have, other);
        return have;
    }
    // The head holds head_logits at once. With `for_head` bytes of memory for a large head (not 0) it holds
    // more, up to large_head_logits, if these take at most half of what is left of them; the keys and values
    // of a poem, which the trainer writes, have their place first.
    static Plan plan(const Config& c, size_t B, size_t T, bool trains, int recompute, Precision precision,
                     const Ranks& ranks, Optimizer optimizer, size_t for_head) {
        check_sizes(c, T);
        const size_t M = checked_mul(B, T, "batch size x sequence length");
        auto with = [&](size_t logits) {
            const size_t rows = equal_parts(M, logits / (size_t)c.Vp);
            return Plan{need_with(rows, c, B, T, trains, recompute, precision, ranks, optimizer), rows};
        };
        const Plan usual = with(head_logits);
        const size_t taken = usual.need.total() + key_value_bytes(c, 1, T);
        if (for_head <= taken) return usual;
        const size_t most = usual.need.total() + (for_head - taken) / 2;
        for (size_t logits = large_head_logits; logits > head_logits; logits /= 2)
            if (const Plan larger = with(logits); larger.need.total() <= most) return larger;
        return usual;
    }
    // Parameters and gradients share one arena, activations and scratch another.
    static MemoryNeed need_with(size_t rows, const Config& c, size_t B, size_t T, bool trains, int recompute,
                                Precision precision, const Ranks& ranks, Optimizer optimizer) {
        const Sharding sharding = ranks.sharding();
        MemoryNeed n;
        Memory m;
        const Arena none = device_arena();
        Arena params = none, all = none, state = none, activations = none, scratch = none;
        m.place_params(params, c, sharding), m.place_params(all, c, sharding);
        m.place_gradients(all, c, trains, sharding);
        m.place_optimizer(state, c, trains, precision, sharding, optimizer);
        m.place_activations(activations, c, B * T, trains, recompute);
        m.place_scratch(scratch, c, B, T, trains, rows, sharding, optimizer);
        n.params = params.used, n.grads = all.used - params.used, n.optimizer = state.used;
        n.activations = activations.used, n.scratch = scratch.used;
        return n;
    }

    // Throws Error where the kernels do not support the model.
    static void check_sizes(const Config& c, size_t T) {
        check_config(c, "model");
        if (!attention_head_size_ok(c.hs())) {
            std::string sizes;
            for (int hs : HEAD_SIZES) sizes += strf("%s%d", sizes.empty() ? "" : ", ", hs);
            fail("model: the head size, channels / heads, is %d, %s supports %s; %s supports any", c.hs(),
                 PROGRAM, sizes.c_str(), CPU_PROGRAM);
        }
        if ((size_t)c.C > MAX_CHANNELS)
            fail("model: C is %d, %s supports at most %zu; %s supports any", c.C, PROGRAM, MAX_CHANNELS,
                 CPU_PROGRAM);
        if (c.Vp % 8)
            fail("model: Vp is %d, %s needs a multiple of 8; %s supports any", c.Vp, PROGRAM, CPU_PROGRAM);
        if (T > (size_t)c.maxT) fail("model: supports at most %d tokens of context, not %zu", c.maxT, T);
    }

    // Blocks whose gradients exist at once. Where a rank keeps only its shards, backward writes those of one
    // block while those of the two blocks after it are added up.
    static constexpr size_t GRAD_SLOTS = 1 + 2;
    static size_t grad_slots(const Config& c, const Sharding& s) {
        return s.shards_gradients() ? std::min<size_t>(GRAD_SLOTS, (size_t)c.L) : (size_t)c.L;
    }

    // The tensors in the three arenas.
    struct Memory {
        floatX* params = nullptr;
        float *grads = nullptr, *m = nullptr, *v = nullptr, *master = nullptr;
        float *grad_shards = nullptr, *grad_sum = nullptr;  // stage 2: this rank's shards; a shard of a sum
        double *norm_parts = nullptr, *totals = nullptr;
        Segment *segments = nullptr, *norm_segments = nullptr, *adamw_segments = nullptr;
        MuonTarget* muon_targets = nullptr;  // of muon_groups_, one group after the other
        Activations<floatX, floatX> act{};
        Workspace work{};
        MuonScratch muon{};
        Batch batch;
        Report* report = nullptr;

        void place_params(Arena& a, const Config& c, const Sharding& s) {
            params = a.take<floatX>(layout(c, s).size());
        }
        void place_gradients(Arena& a, const Config& c, bool trains, const Sharding& s) {
            if (!trains) return;
            grads = a.take<float>(ParamLayout(c, s.multiple(), grad_slots(c, s)).size());
            if (!s.shards_gradients()) return;
            const ParamLayout all = layout(c, s);
            grad_shards = a.take<float>(all.size() / (size_t)s.world);
            grad_sum = a.take<float>(all.range(BLOCK).second / (size_t)s.world);
        }
        void place_optimizer(Arena& a, const Config& c, bool trains, Precision precision, const Sharding& s,
                             Optimizer optimizer) {
            if (!trains) return;
            const size_t n = first_moments(c, s);
            m = a.take<float>(n), v = a.take<float>(second_moments(c, s, optimizer));
            if (precision.dtype == BF16 && precision.master_weights) master = a.take<float>(n);
            norm_parts = a.take<double>(adamw_scratch());
            segments = a.take<Segment>(param_pieces(c).size());
            adamw_segments = optimizer == MUON ? a.take<Segment>(param_pieces(c).size()) : segments;
            if (optimizer == MUON) {
                size_t matrices = 0;
                for (const MuonGroup& group : muon_groups(c)) matrices += group.matrices.size();
                muon_targets = a.take<MuonTarget>(matrices);
            }
            if (s.world == 1) return;
            norm_segments = a.take<Segment>(param_pieces(c).size());
            totals = a.take<double>(2);
        }
        static ParamLayout layout(const Config& c, const Sharding& s) { return ParamLayout(c, s.multiple()); }
        void place_activations(Arena& a, const Config& c, size_t M, bool trains, int recompute) {
            act.place(a, c, M, trains, recompute);
        }
        void place_scratch(Arena& a, const Config& c, size_t B, size_t T, bool trains, size_t head_rows,
                           const Sharding& s, Optimizer optimizer) {
            work.place(a, c, B, T, head_rows, trains);
            if (trains && optimizer == MUON) muon.place(a, c, (size_t)s.world, muon_elements);
            char* memory = a.take<char>(Batch::bytes(B * T));
            if (memory) batch = Batch(memory, B * T);
            report = a.take<Report>(1);
        }
    };
    // Pinned memory for one micro-step's inputs. The host fills one slot while the GPU may still copy from
    // the other.
    struct Slot {
        PinnedMemory memory;
        Batch batch;
        Event copied;
    };
    // A recorded pass, and the settings that it was recorded with.
    struct Graph {
        size_t B, T;
        bool train, first, last;
        float dropout;
        uint64_t seed;
        cudaGraphExec_t exec;
    };
    Norm norm_after(size_t l) {
        const Activations<floatX, floatX>& act = mem_.act;
        if (l + 1 == (size_t)cfg.L)
            return {params.lnfw, params.lnfb,  grads.lnfw,   grads.lnfb,
                    act.lnf,     act.lnf_mean, act.lnf_rstd, true};
        Layer<floatX> w = params.layer(l + 1);
        Layer<float> g = grads.layer(l + 1);
        Block a = block(l + 1);
        return {w.ln1w, w.ln1b, g.ln1w, g.ln1b, a.ln1, a.ln1_mean, a.ln1_rstd, false};
    }
    // The LayerNorm before block l's attention.
    LayerNormForward ln1(size_t l) const {
        Block a = block(l);
        LayerNormForward n;
        n.x = a.resid, n.w = params.layer(l).ln1w, n.b = params.layer(l).ln1b;
        n.y = a.ln1, n.mean = a.ln1_mean, n.rstd = a.ln1_rstd;
        return n;
    }
    // The activations of block l in the pass that is being launched.
    Block block(size_t l) const { return mem_.act.block(l, cfg, b_ * t_); }
    // The parameters that this rank updates; those of them that AdamW does; and those whose gradients this
    // rank counts for the norm.
    const std::vector<OwnedPiece>& held() const { return sharded() ? owned_ : all_; }
    ParamMap held_map() const { return {mem_.segments, elements(held())}; }
    ParamMap adamw_map() const { return {mem_.adamw_segments, elements(adamw_)}; }
    ParamMap norm_map() const {
        return ranks.several() ? ParamMap{mem_.norm_segments, elements(owned_)} : held_map();
    }
    static size_t elements(const std::vector<OwnedPiece>& pieces) {
        size_t n = 0;
        for (const OwnedPiece& p : pieces) n += p.size;
        return n;
    }
    NcclComm& nccl() const { return *static_cast<NcclComm*>(ranks.comm); }
    bool grover() const { return cfg.arch == GROVER_ARCH; }
    // A bias's gradient goes either to the product of the weight's gradient or, with bias_in_kernels, to the
    // kernel that computes the summed values. The other one gets null.
    static float* by_product(float* db) { return switches.bias_in_kernels ? nullptr : db; }
    static float* by_kernel(float* db) { return switches.bias_in_kernels ? db : nullptr; }
    Dropout drop(rng::Stream site, size_t layer) const {
        return {train_ ? dropout : 0.0f, seed, site, (uint32_t)layer, mem_.batch.state};
    }

    // One pass over a batch: copies its inputs to the GPU, then launches its kernels, recorded in a graph.
    void run(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass) {
        if (B_ > B || T_ > T) throw std::logic_error("run: batch larger than the model was built for");
        size_t M = B_ * T_;
        Slot& slot = slots_[next_slot_++ % SLOTS];
        slot.copied.wait();
        *slot.batch.state = {pass.seq0, pass.step, pass.grad_scale};
        memcpy(slot.batch.tokens, tokens, M * sizeof(int));
        memcpy(slot.batch.targets, targets, M * sizeof(int));
        if (pass.train) bucket_tokens(slot.batch.buckets, tokens, M);
        CUDA_CHECK(cudaMemcpyAsync(mem_.batch.state, slot.memory.p, Batch::bytes(B * T),
                                   cudaMemcpyHostToDevice, stream.stream));
        slot.copied.record(stream.stream);

        b_ = B_, t_ = T_, train_ = pass.train;
        first_ = pass.train && !micro_steps_;
        last_micro_step_ = pass.train && pass.last;
        if (!use_graphs) return launch_pass();
        for (Graph& graph : graphs_)
            if (graph.B == B_ && graph.T == T_ && graph.train == train_ && graph.first == first_ &&
                graph.last == last_micro_step_ &&
                (!train_ || (graph.dropout == dropout && graph.seed == seed)))
                return CUDA_CHECK(cudaGraphLaunch(graph.exec, stream.stream));
        graphs_.push_back({B_, T_, train_, first_, last_micro_step_, dropout, seed, record_pass()});
        CUDA_CHECK(cudaGraphLaunch(graphs_.back().exec, stream.stream));
    }
    cudaGraphExec_t record_pass() {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        // Relaxed, because kernels may be loaded during the capture.
        CUDA_CHECK(cudaStreamBeginCapture(stream.stream, cudaStreamCaptureModeRelaxed));
        try {
            launch_pass();
        } catch (...) {
            cudaStreamEndCapture(stream.stream, &graph);
            throw;
        }
        CUDA_CHECK(cudaStreamEndCapture(stream.stream, &graph));
        // With the streams' priorities, so that sums over the ranks do not queue behind the products
        cudaError_t status = cudaGraphInstantiate(&exec, graph, cudaGraphInstantiateFlagUseNodePriority);
        cudaGraphDestroy(graph);
        CUDA_CHECK(status);
        return exec;
    }
    // Launches all kernels of a pass. The first training pass of a step overwrites its gradients and loss,
    // the others add to them. (Blocks whose gradients share memory are overwritten in every pass, and
    // add_up_ranks() adds to this rank's shards.)
    void launch_pass() {
        if (first_) clear_gradients();
        if (first_ || !train_) CUDA_CHECK(cudaMemsetAsync(mem_.report, 0, sizeof(Report), stream.stream));
        if (train_) forward_pass(), backward_pass(!first_);
        else evaluate();
    }
    // Zeroes the gradients that kernels only add to: all but those of the matrices, which the step's first
    // products overwrite.
    void clear_gradients() {
        const auto [first, n] = grad_layout_.range(EMBEDDINGS);
        clear(grad_layout_.at(WPE), first + n);
        const auto [final_first, final_n] = grad_layout_.range(FINAL_NORM);
        clear(final_first, final_first + final_n);
        if (!sharding_.shards_gradients())
            for (size_t l = 0; l < (size_t)cfg.L; l++) clear_block(l);
    }
    // Of a block: its vectors, which follow its matrices.
    void clear_block(size_t l) {
        const auto [first, n] = grad_layout_.range(BLOCK, l);
        clear(grad_layout_.at(LN1W, l), first + n);
    }
    void clear(size_t begin, size_t end) {
        CUDA_CHECK(cudaMemsetAsync(mem_.grads + begin, 0, (end - begin) * sizeof(float), stream.stream));
    }

    // Starts to add up the ranks' gradients of a part of the model that backward has finished, on a stream of
    // its own, while backward goes on. On stage 0 all ranks get the sum, on the others their shard of it.
    // That is done in a step's last micro-step, except for blocks whose gradients share memory.
    void add_up_ranks(Part part, size_t l = 0) {
        const bool shares_memory = sharding_.shards_gradients() && part == BLOCK;
        if (!ranks.several() || !(last_micro_step_ || (train_ && shares_memory))) return;
        cudaStream_t s = adding_->stream;
        handover_->record(stream.stream), handover_->hold(s);
        const auto range = grad_layout_.range(part, l), shard = sharding_.shard(range);
        float* sum = mem_.grads + range.first;
        if (!sharded()) return nccl().all_reduce(sum, range.second, s);
        if (!sharding_.shards_gradients())
            return nccl().reduce_scatter(mem_.grads + shard.first, sum, shard.second, s);
        // grad_shards holds the shards of the whole model's layout, one after the other.
        float* mine =
            mem_.grad_shards + Memory::layout(cfg, sharding_).range(part, l).first / (size_t)sharding_.world;
        const bool overwrites = first_ || !shares_memory;
        nccl().reduce_scatter(overwrites ? mine : mem_.grad_sum, sum, shard.second, s);
        if (!overwrites) add_to(mine, mem_.grad_sum, shard.second, s);
        if (shares_memory) slot_free_[l % GRAD_SLOTS]->record(s);
    }
    // Before backward writes the gradients of block l, where blocks share memory: waits until those of the
    // block that had it before have been added up.
    void begin_block_gradients(size_t l) {
        if (!sharding_.shards_gradients()) return;
        if (l + GRAD_SLOTS < (size_t)cfg.L) slot_free_[l % GRAD_SLOTS]->hold(stream.stream);
        clear_block(l);
    }
    // After backward: the kernels that follow wait for the sums.
    void finish_adding_up() {
        if (!ranks.several() || !(last_micro_step_ || sharding_.shards_gradients())) return;
        handover_->record(adding_->stream), handover_->hold(stream.stream);
    }
    // cpu::GPT2::update_by_muon. Ranks share out the orthogonalising: in each round every rank takes up to k
    // matrices, and all get all results. A rank that has only shards of the optimizer's arrays writes the
    // directions of its own elements, beside zeros; adding up the ranks' gives each rank its k matrices
    // whole.
    void update_by_muon(const AdamWArrays& arrays, const MuonStep& step) {
        const MuonScratch& scratch = mem_.muon;
        cudaStream_t s = stream.stream;
        each_muon_round([&](const MuonRound& r) {
            const size_t size = r.group.n * r.group.m, own = r.own * size, shares = r.k * size;
            float* directions = scratch.directions;
            if (sharded())
                CUDA_CHECK(cudaMemsetAsync(directions, 0, ranks.world() * shares * sizeof(float), s));
            muon_direction(directions, sharded() ? 0 : r.own, sharded() ? r.count : r.own + r.mine, arrays,
                           r.targets, r.count, size, step, s);
            if (sharded()) nccl().reduce_scatter(directions + own, directions, shares, s);
            orthogonalise(r);
            if (ranks.several()) nccl().all_gather(scratch.results(), scratch.results() + own, shares, s);
            muon_apply(arrays, scratch.results(), r.targets, r.group.n, r.group.m, r.count, step, s);
        });
    }
    // Of a group: `count` matrices. Those of this rank, `mine` of at most k, begin with number `own`.
    struct MuonRound {
        const MuonGroup& group;
        const MuonTarget* targets;
        size_t count, k, own, mine;
    };
    template <class F>
    void each_muon_round(F f) {
        const size_t world = (size_t)sharding_.world, rank = (size_t)sharding_.rank;
        const MuonTarget* targets = mem_.muon_targets;
        for (const MuonGroup& group : muon_groups_) {
            const size_t all = group.matrices.size(), k = MuonScratch::most(group, world, muon_elements_);
            for (size_t first = 0; first < all; first += k * world) {
                const size_t count = std::min(k * world, all - first), own = rank * k;
                f(MuonRound{group, targets + first, count, k, own, share(count, k, rank)});
            }
            targets += all;
        }
    }
    // How many of a round's matrices a rank has.
    static size_t share(size_t count, size_t k, size_t rank) {
        return std::min(k, count - std::min(rank * k, count));
    }
    // This rank's directions of a round become its results.
    void orthogonalise(const MuonRound& r) {
        if (!r.mine) return;
        const MuonScratch& scratch = mem_.muon;
        const size_t own = r.own * r.group.n * r.group.m;
        muon_orthogonalise(scratch.results() + own, scratch.directions + own, scratch, *matmul_,
                           r.targets + r.own, r.group.n, r.group.m, r.mine, stream.stream);
    }
    // Where ranks have updated only their shards: all ranks get all parameters.
    void gather_parameters() {
        if (!sharded()) return;
        const ParamLayout layout = Memory::layout(cfg, sharding_);
        auto gather = [&](std::pair<size_t, size_t> part) {
            const auto shard = sharding_.shard(part);
            nccl().all_gather(mem_.params + part.first, mem_.params + shard.first, shard.second,
                              stream.stream);
        };
        gather(layout.range(EMBEDDINGS));
        for (size_t l = 0; l < (size_t)cfg.L; l++) gather(layout.range(BLOCK, l));
        gather(layout.range(FINAL_NORM));
    }

    // From the tokens to the final LayerNorm.
    void forward_pass() {
        size_t C = cfg.C, M = b_ * t_, L = cfg.L;
        cudaStream_t s = stream.stream;
        embedding_forward(mem_.act.embedded, mem_.batch.tokens, params.wte, params.wpe, b_, t_, C,
                          drop(rng::EMB_DROPOUT, 0), s);
        layernorm_forward(ln1(0), M, C, cfg.eps, s);
        for (size_t l = 0; l < L; l++) {
            Norm after = norm_after(l);
            block_forward(l, &after);
        }
    }
    // Block l and the LayerNorm after it. Where `after` is null it ends at the GELU: backward needs no more.
    void block_forward(size_t l, const Norm* after) {
        Layer<floatX> w = params.layer(l);
        Block a = block(l);
        size_t C = cfg.C, M = b_ * t_;
        floatX* branch = mem_.work.branch;
        cudaStream_t s = stream.stream;
        matmul_->forward(a.qkv, a.ln1, w.qkvw, w.qkvb, M, C, 3 * C);
        attention_forward(a.atty, a.lse, a.qkv, b_, t_, C, cfg.NH, drop(rng::ATT_DROPOUT, l), s);
        matmul_->forward(branch, a.atty, w.attprojw, w.attprojb, M, C, C);
        LayerNormForward ln2;
        ln2.x = grover() ? a.ln1 : a.resid, ln2.branch = branch, ln2.sum = a.resid2;
        ln2.w = w.ln2w, ln2.b = w.ln2b, ln2.y = a.ln2, ln2.mean = a.ln2_mean, ln2.rstd = a.ln2_rstd;
        residual_layernorm_forward(ln2, M, t_, C, drop(rng::ATTPROJ_DROPOUT, l), cfg.eps, s);
        matmul_->forward_gelu(a.fch_gelu, a.fch, a.ln2, w.fcw, w.fcb, M, C, 4 * C, cfg.activation);
        if (!after) return;
        matmul_->forward(branch, a.fch_gelu, w.fcprojw, w.fcprojb, M, 4 * C, C);
        LayerNormForward norm;
        norm.x = a.resid2, norm.branch = branch, norm.sum = a.resid3;
        norm.w = after->w, norm.b = after->b, norm.y = after->y, norm.mean = after->mean,
        norm.rstd = after->rstd;
        residual_layernorm_forward(norm, M, t_, C, drop(rng::FCPROJ_DROPOUT, l), cfg.eps, s);
    }

    // The head's forward half for rows [m, m + n): logits and losses. In training the logits become their
    // gradient.
    void head_forward(size_t m, size_t n) {
        matmul_->forward(mem_.work.logits, mem_.act.lnf + m * cfg.C, params.wte, nullptr, n, cfg.C, cfg.Vp);
        cross_entropy(mem_.act.losses + m, mem_.work.logits, mem_.batch.targets + m, n, cfg.V, cfg.Vp, train_,
                      mem_.batch.state, stream.stream);
    }
    // Adds the batch's losses to the report's, in training times grad_scale.
    void report_losses() {
        sum_losses(&mem_.report->loss, &mem_.report->counted, mem_.act.losses, mem_.batch.targets, b_ * t_,
                   train_ ? mem_.batch.state : nullptr, stream.stream);
    }
    // A whole pass without gradients.
    void evaluate() {
        forward_pass();
        size_t M = b_ * t_, R = head_rows(M);
        for (size_t m = 0; m < M; m += R) head_forward(m, std::min(R, M - m));
        report_losses();
    }

    // The output layer: its loss, dln = dlogits wte and dwte = dlogits^T lnf (or +=), a chunk of rows at a
    // time, so that the logits of the whole batch never exist at once.
    void head_loss(bool accumulate) {
        const Workspace& work = mem_.work;
        size_t C = cfg.C, Vp = cfg.Vp, M = b_ * t_, R = head_rows(M);
        for (size_t m = 0; m < M; m += R) {
            size_t n = std::min(R, M - m);
            head_forward(m, n);
            const floatX* x = mem_.act.lnf + m * C;
            matmul_->weight_gradient(grads.wte, nullptr, work.logits, x, n, C, Vp, accumulate || m);
            matmul_->input_gradient(work.dln + m * C, work.logits, params.wte, n, C, Vp);
        }
        report_losses();
    }

    // From the loss back to the embeddings. accumulate: the matrices' gradients are added to those of earlier
    // micro-steps, except in blocks that share memory.
    void backward_pass(bool accumulate) {
        head_loss(accumulate);
        for (size_t l = cfg.L; l-- > 0;) {
            begin_block_gradients(l);
            block_backward(l, norm_after(l), accumulate && !sharding_.shards_gradients());
        }
        const Workspace& work = mem_.work;
        cudaStream_t s = stream.stream;
        size_t C = cfg.C, M = b_ * t_;
        Layer<float> g = grads.layer(0);
        Block a = block(0);
        LayerNormBackward ln1;
        ln1.dresid = work.dresid, ln1.dw = g.ln1w, ln1.db = g.ln1b, ln1.scratch = work.layernorm;
        ln1.dy = work.dln, ln1.residual = grover() ? FROM_OUTPUT : FROM_INPUT;
        ln1.x = a.resid, ln1.w = params.layer(0).ln1w, ln1.mean = a.ln1_mean, ln1.rstd = a.ln1_rstd;
        layernorm_backward(ln1, M, t_, C, Dropout{}, s);
        add_up_ranks(BLOCK, 0);
        embedding_backward(grads.wte, grads.wpe, work.dresid, mem_.batch.buckets, b_, t_, C,
                           drop(rng::EMB_DROPOUT, 0), s);
        add_up_ranks(EMBEDDINGS);
        finish_adding_up();
    }
    // Backward through the LayerNorm after block l, then through the block. On entry dln is the gradient of
    // that LayerNorm's output, and dresid that of the residual stream after it (none after the final one). On
    // return they are the same for the LayerNorm before the block. LN' is a LayerNorm's backward, masked() a
    // dropout mask:
    //     dresid += LN'(dln)                          the gradient of resid3 (1)
    //     dfch = (masked(dresid) fcprojw) gelu'(fch)  dln = dfch fcw, of ln2's output
    //     dresid += LN'(dln)                          of resid2
    //     datty = masked(dresid) attprojw             of attention's output
    //     dqkv = attention'(datty)                    dln = dqkv qkvw, of ln1's output
    // (1) In GROVER the LayerNorm's output is the residual stream: dresid = LN'(dln + dresid).
    void block_backward(size_t l, const Norm& after, bool accumulate) {
        const Workspace& work = mem_.work;
        Layer<floatX> w = params.layer(l);
        Layer<float> g = grads.layer(l);
        Block a = block(l);
        cudaStream_t s = stream.stream;
        size_t C = cfg.C, M = b_ * t_;
        int activation = cfg.activation;
        floatX* datty = work.dln;  // dln has been read by then
        // LayerNorm's backward also writes the gradient of the branch before it: dresid under that branch's
        // dropout mask.
        floatX* masked = dropout > 0 ? work.dbranch : nullptr;
        const floatX* dbranch = masked ? masked : work.dresid;
        LayerNormBackward norm;
        norm.dresid = work.dresid, norm.masked = masked, norm.scratch = work.layernorm;
        norm.dw = after.dw, norm.db = after.db, norm.dbias = by_kernel(g.fcprojb);
        norm.dy = work.dln;
        norm.residual = after.final ? NO_RESIDUAL : grover() ? FROM_OUTPUT : FROM_INPUT;
        norm.x = a.resid3, norm.w = after.w, norm.mean = after.mean, norm.rstd = after.rstd;
        layernorm_backward(norm, M, t_, C, drop(rng::FCPROJ_DROPOUT, l), s);
        if (after.final) add_up_ranks(FINAL_NORM);
        else add_up_ranks(BLOCK, l + 1);
        // The last block's activations are still there. Recomputing may overwrite the mean and rstd just
        // read.
        if (recompute && l + 1 < (size_t)cfg.L) recompute_block(l);

        matmul_->weight_gradient(g.fcprojw, by_product(g.fcprojb), dbranch, a.fch_gelu, M, 4 * C, C,
                                 accumulate);
        matmul_->input_gradient_gelu(work.dfch, by_kernel(g.fcb), dbranch, w.fcprojw, a.fch, M, 4 * C, C,
                                     activation);
        matmul_->weight_gradient(g.fcw, by_product(g.fcb), work.dfch, a.ln2, M, C, 4 * C, accumulate);
        matmul_->input_gradient(work.dln, work.dfch, w.fcw, M, C, 4 * C);
        LayerNormBackward ln2;
        ln2.dresid = work.dresid, ln2.masked = masked, ln2.scratch = work.layernorm;
        ln2.dw = g.ln2w, ln2.db = g.ln2b, ln2.dbias = by_kernel(g.attprojb), ln2.dy = work.dln;
        ln2.residual = FROM_INPUT;
        ln2.x = a.resid2, ln2.w = w.ln2w, ln2.mean = a.ln2_mean, ln2.rstd = a.ln2_rstd;
        layernorm_backward(ln2, M, t_, C, drop(rng::ATTPROJ_DROPOUT, l), s);

        matmul_->weight_gradient(g.attprojw, by_product(g.attprojb), dbranch, a.atty, M, C, C, accumulate);
        matmul_->input_gradient(datty, dbranch, w.attprojw, M, C, C);
        AttentionBackward attention;
        attention.dqkv = work.dqkv, attention.dbias = by_kernel(g.qkvb), attention.scratch = work.attention;
        attention.dout = datty, attention.out = a.atty, attention.qkv = a.qkv, attention.lse = a.lse;
        attention_backward(attention, b_, t_, C, cfg.NH, drop(rng::ATT_DROPOUT, l), s);
        matmul_->weight_gradient(g.qkvw, by_product(g.qkvb), work.dqkv, a.ln1, M, C, 3 * C, accumulate);
        matmul_->input_gradient(work.dln, work.dqkv, w.qkvw, M, C, 3 * C);
    }
    // What backward needs of block l and forward did not keep; see Activations::place.
    void recompute_block(size_t l) {
        Layer<floatX> w = params.layer(l);
        Block a = block(l);
        cudaStream_t s = stream.stream;
        size_t C = cfg.C, M = b_ * t_;
        if (recompute >= 2) layernorm_forward(ln1(l), M, C, cfg.eps, s);
        if (recompute == 3) return block_forward(l, nullptr);
        if (recompute == 2) {
            LayerNormForward ln2;
            ln2.x = a.resid2, ln2.w = w.ln2w, ln2.b = w.ln2b;
            ln2.y = a.ln2, ln2.mean = a.ln2_mean, ln2.rstd = a.ln2_rstd;
            layernorm_forward(ln2, M, C, cfg.eps, s);
        }
        gelu_forward(a.fch_gelu, a.fch, M * 4 * C, cfg.activation, s);
    }

    // Computes every product of the largest batch once with `timing`, which overwrites parameters' gradients
    // and activations: the constructor calls it before they hold anything.
    void time_products(size_t M) {
        b_ = B, t_ = T, train_ = trains;
        const Workspace& work = mem_.work;
        Layer<floatX> w = params.layer(0);
        Layer<float> g = grads.layer(0);
        Block a = block(0);
        const floatX* lnf = mem_.act.lnf;
        size_t C = cfg.C, Vp = cfg.Vp, R = head_rows(M), rest = M % R;
        int activation = cfg.activation;
        matmul_->timing = true;
        matmul_->forward(a.qkv, a.ln1, w.qkvw, w.qkvb, M, C, 3 * C);
        matmul_->forward(work.branch, a.atty, w.attprojw, w.attprojb, M, C, C);
        matmul_->forward_gelu(a.fch_gelu, a.fch, a.ln2, w.fcw, w.fcb, M, C, 4 * C, activation);
        matmul_->forward(work.branch, a.fch_gelu, w.fcprojw, w.fcprojb, M, 4 * C, C);
        if (trains) {
            matmul_->weight_gradient(g.fcprojw, by_product(g.fcprojb), work.dresid, a.fch_gelu, M, 4 * C, C,
                                     true);
            matmul_->input_gradient_gelu(work.dfch, by_kernel(g.fcb), work.dresid, w.fcprojw, a.fch, M, 4 * C,
                                         C, activation);
            matmul_->weight_gradient(g.fcw, by_product(g.fcb), work.dfch, a.ln2, M, C, 4 * C, true);
            matmul_->input_gradient(work.dln, work.dfch, w.fcw, M, C, 4 * C);
            matmul_->weight_gradient(g.attprojw, by_product(g.attprojb), work.dresid, a.atty, M, C, C, true);
            matmul_->input_gradient(work.dln, work.dresid, w.attprojw, M, C, C);
            matmul_->weight_gradient(g.qkvw, by_product(g.qkvb), work.dqkv, a.ln1, M, C, 3 * C, true);
            matmul_->input_gradient(work.dln, work.dqkv, w.qkvw, M, C, 3 * C);
        }
        for (size_t n : {R, rest}) {
            if (!n) continue;
            matmul_->forward(work.logits, lnf, params.wte, nullptr, n, C, Vp);
            if (!trains) continue;
            matmul_->weight_gradient(grads.wte, nullptr, work.logits, lnf, n, C, Vp, true);
            matmul_->input_gradient(work.dln, work.logits, params.wte, n, C, Vp);
        }
        // Those of all ranks: the choices must be the same on every rank, which may have fewer matrices.
        if (trains && optimizer == MUON)
            each_muon_round([&](MuonRound r) {
                r.own = 0;
                for (size_t rank = 0; rank < (size_t)sharding_.world; rank++)
                    r.mine = share(r.count, r.k, rank), orthogonalise(r);
            });
        matmul_->timing = false;
    }
    // A product's speed depends on its numbers: with zeros a GPU takes less power, and its clocks rise. (The
    // emulator's memory stays as it is, full of NaN, so that whatever is read too early is found.)
    void fill_with_numbers() {
#ifndef EMULATOR
        for (auto [p, bytes] : {std::pair<char*, size_t>{(char*)mem_.params, weight_bytes_},
                                {activations_.p, activation_bytes_}})
            launch(fill_kernel, dim3(4 * (unsigned)multiprocessors()), 256, 0, stream.stream, (floatX*)p,
                   bytes / sizeof(floatX));
#endif
    }
    // Rank 0 times the products, and all ranks take its choices, so that they compute alike.
    void choose_products(size_t M, bool deterministic) {
        if (deterministic) return;
        fill_with_numbers();
        if (!ranks.several() || ranks.comm->leads()) time_products(M), matmul_->choices.save();
        if (!ranks.several()) return;
        std::string text = matmul_->choices.text();
        ranks.comm->broadcast(text);
        if (!ranks.comm->leads()) matmul_->choices.take(text), time_products(M);
    }
    // The moments begin as zeros; the maps of the parameters are copied to the GPU. With several ranks, makes
    // the stream on which gradients are added up, and its events.
    void begin_optimizer() {
        cudaStream_t s = stream.stream;
        const size_t firsts = first_moments(cfg, sharding_),
                     seconds = second_moments(cfg, sharding_, optimizer);
        CUDA_CHECK(cudaMemsetAsync(mem_.m, 0, firsts * sizeof(float), s));
        CUDA_CHECK(cudaMemsetAsync(mem_.v, 0, seconds * sizeof(float), s));
        auto copy = [&](auto* to, const auto& table) {
            CUDA_CHECK(
                cudaMemcpyAsync(to, table.data(), table.size() * sizeof table[0], cudaMemcpyHostToDevice, s));
            stream.wait();  // until `table` has been read
        };
        copy(mem_.segments, param_segments(held(), sharding_));
        if (optimizer == MUON) {
            copy(mem_.adamw_segments, param_segments(adamw_, sharding_));
            std::vector<MuonTarget> all;
            for (const MuonGroup& group : muon_groups_)
                for (const MuonTarget& t : muon_targets(group, held(), sharding_)) all.push_back(t);
            copy(mem_.muon_targets, all);
        }
        if (!ranks.several()) return;
        copy(mem_.norm_segments, param_segments(owned_, sharding_));
        adding_ = std::make_unique<Stream>(true), handover_ = std::make_unique<Event>();
        for (auto& event : slot_free_) event = std::make_unique<Event>();
    }
    float* array(State s) const {
        if (s == PARAMS) return sharded() ? nullptr : mem_.master;
        if (s == GRADS) return sharding_.shards_gradients() ? mem_.grad_shards : mem_.grads;
        return s == ADAM_V ? mem_.v : s == MASTER ? mem_.master : mem_.m;
    }
    // Of n parameters, from number `first` of the file on: those whose masters this rank holds.
    void upload_masters(const float* host, size_t first, size_t n) {
        for (const OwnedPiece& p : owned_) {
            const size_t from = std::max(first, p.file), to = std::min(first + n, p.file + p.size);
            if (from < to) upload(mem_.master + p.shard + (from - p.file), host + (from - first), to - from);
        }
    }
    // f(pointer, n, number) as f(pointer, n), for the same types of pointers.
    template <class F>
    struct IgnoreNumber {
        F& f;
        template <class P>
        auto operator()(P* x, size_t n, size_t) -> decltype(f(x, n)) {
            return f(x, n);
        }
    };

    Report read_report() {
        CUDA_CHECK(
            cudaMemcpyAsync(report_.p, mem_.report, sizeof(Report), cudaMemcpyDeviceToHost, stream.stream));
        stream.wait();
        return *(Report*)report_.p;
    }
    void download(void* host, const float* device, size_t n) {
        CUDA_CHECK(cudaMemcpyAsync(host, device, n * sizeof(float), cudaMemcpyDeviceToHost, stream.stream));
        stream.wait();
    }
    void upload(float* device, const float* host, size_t n) {
        CUDA_CHECK(cudaMemcpyAsync(device, host, n * sizeof(float), cudaMemcpyHostToDevice, stream.stream));
        stream.wait();
    }
    // n parameters, from the i-th in memory on, to and from floats in pinned memory. `host` is its first
    // part, and the second holds them as floatX.
    void download_params(float* host, size_t i, size_t n) {
        floatX* narrow = (floatX*)(host + PIECE);
        CUDA_CHECK(cudaMemcpyAsync(narrow, mem_.params + i, n * sizeof(floatX), cudaMemcpyDeviceToHost,
                                   stream.stream));
        stream.wait();
        to_floats(host, narrow, n);
    }
    void upload_params(const float* host, size_t i, size_t n) {
        floatX* narrow = (floatX*)(host + PIECE);
        from_floats(narrow, host, n);
        CUDA_CHECK(cudaMemcpyAsync(mem_.params + i, narrow, n * sizeof(floatX), cudaMemcpyHostToDevice,
                                   stream.stream));
        stream.wait();
    }

    static constexpr size_t SLOTS = 2;
    DeviceMemory weights_, optimizer_state_, activations_;
    size_t weight_bytes_ = 0, activation_bytes_ = 0;
    size_t head_rows_ = 0;                        // rows of the logits in memory
    static inline size_t large_head_memory_ = 0;  // measured by memory_need() for the next constructor, or 0
    PinnedMemory staging_, report_;
    Memory mem_;
    const Sharding sharding_ = ranks.sharding();
    // The parameters in the file's order: all, and those that this rank updates if ranks share that out.
    const std::vector<OwnedPiece> all_ = owned_pieces(cfg, sharding_, true, optimizer),
                                  owned_ = owned_pieces(cfg, sharding_, false, optimizer);
    const std::vector<OwnedPiece> adamw_ = adamw_pieces(held(), optimizer);
    const std::array<MuonGroup, 2> muon_groups_ = muon_groups(cfg, sharding_.multiple());
    const size_t muon_elements_ = muon_elements;
    const ParamLayout grad_layout_{cfg, sharding_.multiple(), grad_slots(cfg, sharding_)};
    std::unique_ptr<Stream> adding_;  // with several ranks: where gradients are added up
    std::unique_ptr<Event> handover_, slot_free_[GRAD_SLOTS];  // from one stream to the other
    Slot slots_[SLOTS];
    size_t next_slot_ = 0, micro_steps_ = 0, counted_ = 0;
    StepResult last_;
    Event reported_;        // step pending_ has been computed
    uint32_t pending_ = 0;  // the step whose result has not been read; 0: none
    std::unique_ptr<Matmul> matmul_;
    std::vector<Graph> graphs_;
    size_t b_ = 0, t_ = 0;                                          // of the pass that is being launched
    bool train_ = false, first_ = false, last_micro_step_ = false;  // first_: of the step
};

// ---------------------------------------------------------------------------------------------
// Generation. The keys and values of past tokens are kept, so that a new token needs only its own row.

constexpr int DECODE_WARPS = 4;

// Where the new tokens of one sequence belong: the sequence's number in the cache, and how many tokens it
// has.
struct DecodePlace {
    int sequence, before;
};

// x (rows,C) = wte[token] + wpe[position], n rows for each place. Grid: the rows.
__global__ void decode_embedding_kernel(floatX* x, const int* tokens, const DecodePlace* places,
                                        const floatX* wte, const floatX* wpe, size_t n, size_t C) {
    size_t row = blockIdx.x, position = places[row / n].before + row % n;
    const floatX *token = wte + tokens[row] * C, *place = wpe + position * C;
    for (size_t c = threadIdx.x; c < C; c += blockDim.x)
        x[row * C + c] = from_float<floatX>(to_float(token[c]) + to_float(place[c]));
}

// Attention of the newest n tokens of each of some sequences, whose places are given, to all so far. out
// (places*n,C), qkv (places*n,3C); cache (N,T,2C) holds keys and values of the tokens before, and the kernel
// appends the new ones. A block computes one token and head: each warp takes every fourth key, its lanes
// share the channels, and softmax is online (Milakov and Gimelshein 2018). At the end the warps' maxima, sums
// and outputs are combined. Grid (places*n, NH), block DECODE_WARPS * WARP.
__global__ void __launch_bounds__(DECODE_WARPS* WARP)
    decode_attention_kernel(floatX* out, floatX* cache, const floatX* qkv, const DecodePlace* places,
                            size_t n, size_t T, size_t C, int hs) {
    constexpr int MOST = 128, PER_LANE = MOST / WARP;
    __shared__ float warp_max[DECODE_WARPS], warp_sum_of[DECODE_WARPS], warp_out[DECODE_WARPS][MOST];
    size_t row = blockIdx.x, i = row % n, head = blockIdx.y * (size_t)hs;
    size_t before = places[row / n].before, len = before + i + 1;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    floatX* kept =
        cache + places[row / n].sequence * T * 2 * C + head;  // key j at j * 2C, its value C further on
    const floatX* fresh =
        qkv + (row - i) * 3 * C + C + head;  // the new tokens' keys, 3C apart; values as above
    const floatX* query = qkv + row * 3 * C + head;
    float scale = 1.0f / sqrtf((float)hs), q[PER_LANE], o[PER_LANE] = {}, max = -INFINITY, sum = 0;
    for (int k = 0; k < PER_LANE; k++) {
        int c = lane + k * WARP;
        q[k] = c < hs ? to_float(query[c]) * scale : 0.0f;
    }
    for (size_t j = warp; j < len; j += DECODE_WARPS) {
        const floatX* key = j < before ? kept + j * 2 * C : fresh + (j - before) * 3 * C;
        float lane_score = 0;  // the part of this lane's channels
        for (int k = 0; k < PER_LANE; k++) {
            int c = lane + k * WARP;
            if (c < hs) lane_score += q[k] * to_float(key[c]);
        }
        float score = warp_sum(lane_score), new_max = fmaxf(max, score), rescale = expf(max - new_max),
              p = expf(score - new_max);
        sum = sum * rescale + p, max = new_max;
        for (int k = 0; k < PER_LANE; k++) {
            int c = lane + k * WARP;
            if (c < hs) o[k] = o[k] * rescale + p * to_float(key[C + c]);
        }
    }
    if (lane == 0) warp_max[warp] = max, warp_sum_of[warp] = sum;
    for (int k = 0; k < PER_LANE; k++) warp_out[warp][lane + k * WARP] = o[k];
    __syncthreads();
    for (int w = 0; w < DECODE_WARPS; w++) max = w ? fmaxf(max, warp_max[w]) : warp_max[0];
    sum = 0;
    for (int w = 0; w < DECODE_WARPS; w++) sum += warp_sum_of[w] * expf(warp_max[w] - max);
    for (int c = threadIdx.x; c < hs; c += DECODE_WARPS * WARP) {
        float v = 0;
        for (int w = 0; w < DECODE_WARPS; w++) v += warp_out[w][c] * expf(warp_max[w] - max);
        out[row * C + head + c] = from_float<floatX>(v / sum);
        kept[(len - 1) * 2 * C + c] = fresh[i * 3 * C + c];
        kept[(len - 1) * 2 * C + C + c] = fresh[i * 3 * C + C + c];
    }
}

class Decoder final : public ::Decoder {
  public:
    // N sequences at once, contexts of up to `context` tokens (at most maxT).
    Decoder(GPT2& model, size_t N, size_t context)
        : m_(model), N_(N), T_(std::min<size_t>(context, model.cfg.maxT)), rows_(N * CHUNK), length_(N) {
        Arena a = device_arena();
        place(a);
        if (size_t have = GPT2::memory_available(); a.used > have)
            fail(
                "%zu texts side by side need %s of GPU memory for keys and values, %s are free; write fewer "
                "at once",
                N, human_bytes((double)a.used).c_str(), human_bytes((double)have).c_str());
        memory_.allocate(a.used);
        // Rows that no sequence uses are computed, too.
        CUDA_CHECK(cudaMemsetAsync(memory_.p, 0, a.used, m_.stream.stream));
        a = device_arena(memory_.p);
        place(a);
        host_tokens_.allocate(rows_ * sizeof(int)), host_places_.allocate(N * sizeof(DecodePlace));
        host_logits_.allocate(N * (size_t)m_.cfg.Vp * sizeof(floatX));
        out_.resize(N * (size_t)m_.cfg.V);
    }

    size_t sequences() const override { return N_; }
    size_t capacity() const override { return T_; }
    size_t length(size_t s = 0) const override { return length_[s]; }
    void truncate(size_t s, size_t length) override { length_[s] = std::min(length_[s], length); }

    const float* append(const std::vector<size_t>& which, const int* tokens, size_t n) override {
        for (size_t s : which)
            if (length_[s] + n > T_) throw std::logic_error("decoder: context is full");
        for (size_t i = 0; i + 1 < n; i += CHUNK) run(which, tokens + i, n, std::min(CHUNK, n - 1 - i));
        run(which, tokens + n - 1, n, 1);  // the last tokens alone: ln_ then holds the output layer's input
        const Config& c = m_.cfg;
        m_.matmul().forward(logits_, ln_, m_.params.wte, nullptr, N_, c.C, c.Vp);
        CUDA_CHECK(cudaMemcpyAsync(host_logits_.p, logits_, which.size() * (size_t)c.Vp * sizeof(floatX),
                                   cudaMemcpyDeviceToHost, m_.stream.stream));
        m_.stream.wait();
        for (size_t k = 0; k < which.size(); k++)
            to_floats(&out_[k * c.V], (const floatX*)host_logits_.p + k * c.Vp, (size_t)c.V);
        return out_.data();
    }

  private:
    static constexpr size_t CHUNK = 64;

    void place(Arena& a) {
        const Config& c = m_.cfg;
        size_t C = c.C;
        cache_ = a.take<floatX>(checked_mul(c.L, N_, "sequences"), T_, 2 * C);
        tokens_ = a.take<int>(rows_), places_ = a.take<DecodePlace>(N_);
        x_ = a.take<floatX>(rows_, C), ln_ = a.take<floatX>(rows_, C), qkv_ = a.take<floatX>(rows_, 3 * C);
        att_ = a.take<floatX>(rows_, C), branch_ = a.take<floatX>(rows_, C),
        fc_ = a.take<floatX>(rows_, 4 * C);
        fc_gelu_ = a.take<floatX>(rows_, 4 * C), mean_ = a.take<float>(rows_), rstd_ = a.take<float>(rows_);
        logits_ = a.take<floatX>(N_, c.Vp);
    }
    // One chunk through all layers: the first n of the `stride` tokens of each of the sequences `which`. The
    // final LayerNorm's output is then in ln_. Single tokens have N_ rows, however many sequences there are,
    // so that products have one shape; the surplus rows hold old values, whose results nobody reads.
    void run(const std::vector<size_t>& which, const int* tokens, size_t stride, size_t n) {
        const Config& c = m_.cfg;
        const Params<floatX>& params = m_.params;
        Matmul& matmul = m_.matmul();
        cudaStream_t s = m_.stream.stream;
        size_t C = c.C, rows = which.size() * n, M = n == 1 ? N_ : rows;
        m_.stream.wait();  // until the previous chunk's tokens have been copied
        for (size_t r = 0; r < rows; r++) ((int*)host_tokens_.p)[r] = tokens[r / n * stride + r % n];
        for (size_t k = 0; k < which.size(); k++)
            ((DecodePlace*)host_places_.p)[k] = {(int)which[k], (int)length_[which[k]]};
        CUDA_CHECK(cudaMemcpyAsync(tokens_, host_tokens_.p, rows * sizeof(int), cudaMemcpyHostToDevice, s));
        CUDA_CHECK(cudaMemcpyAsync(places_, host_places_.p, which.size() * sizeof(DecodePlace),
                                   cudaMemcpyHostToDevice, s));
        launch(decode_embedding_kernel, dim3((unsigned)rows), 256, 0, s, x_, tokens_, places_, params.wte,
               params.wpe, n, C);
        LayerNormForward norm;  // used again for each LayerNorm
        norm.x = norm.sum = x_, norm.y = ln_, norm.mean = mean_, norm.rstd = rstd_, norm.branch = branch_;
        norm.w = params.layer(0).ln1w, norm.b = params.layer(0).ln1b;
        layernorm_forward(norm, M, C, c.eps, s);
        for (size_t l = 0; l < (size_t)c.L; l++) {
            Layer<floatX> w = params.layer(l);
            matmul.forward(qkv_, ln_, w.qkvw, w.qkvb, M, C, 3 * C);
            dim3 grid((unsigned)rows, (unsigned)c.NH);
            floatX* cache = cache_ + l * N_ * T_ * 2 * C;
            launch(decode_attention_kernel, grid, DECODE_WARPS * WARP, 0, s, att_, cache, qkv_, places_, n,
                   T_, C, c.hs());
            matmul.forward(branch_, att_, w.attprojw, w.attprojb, M, C, C);
            norm.x = c.arch == GROVER_ARCH ? ln_ : x_, norm.w = w.ln2w, norm.b = w.ln2b;
            residual_layernorm_forward(norm, M, n, C, Dropout{}, c.eps, s);
            matmul.forward_gelu(fc_gelu_, fc_, ln_, w.fcw, w.fcb, M, C, 4 * C, c.activation);
            matmul.forward(branch_, fc_gelu_, w.fcprojw, w.fcprojb, M, 4 * C, C);
            bool last = l + 1 == (size_t)c.L;
            norm.x = x_, norm.w = last ? params.lnfw : params.layer(l + 1).ln1w;
            norm.b = last ? params.lnfb : params.layer(l + 1).ln1b;
            residual_layernorm_forward(norm, M, n, C, Dropout{}, c.eps, s);
        }
        for (size_t k : which) length_[k] += n;
    }

    GPT2& m_;
    size_t N_, T_, rows_;
    std::vector<size_t> length_;  // of each sequence, in tokens
    DeviceMemory memory_;
    PinnedMemory host_tokens_, host_places_, host_logits_;
    int* tokens_;
    DecodePlace* places_;
    floatX *cache_, *x_, *ln_, *qkv_, *att_, *branch_, *fc_, *fc_gelu_, *logits_;
    float *mean_, *rstd_;
    std::vector<float> out_;
};

}  // namespace gpu

#ifndef ARAPOET_NO_MAIN
#include "lib/trainer.h"
int main(int argc, char** argv) { return end_children(train<gpu::GPT2, gpu::Decoder>(argc, argv)); }
#endif
#endif  // TRAIN_GPT2_CU
