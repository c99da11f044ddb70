// train_gpt2.cu - GPT-2 on one NVIDIA GPU: the model, flags and files of train_gpt2.cpp, with fused kernels and cuBLASLt.
//
// Read it from top to bottom: the build's number type, errors and launches, tensor-core instructions, the kernels of each
// layer (a comment says which function of train_gpt2.cpp each one is held against), matrix products by cuBLASLt, the model,
// the decoder with its key/value cache, and a main that hands the model to the trainer in trainer.h.
//
// Shapes: B sequences of T tokens, M = B*T rows, C channels, NH heads of hs = C/NH, V vocabulary padded to Vp.
// floatX is bf16, or float when built with -DPRECISION_FP32; statistics, gradients of parameters, AdamW's moments and master
// weights are always float. There are no atomics on floats: a run repeats bit for bit.
//
// Everything here also compiles as C++ and runs on a CPU through dev/emulator (macro EMULATOR); so kernels are launched
// by launch() alone, the dynamic shared memory of every kernel is `dynamic_smem`, and each PTX instruction stands in a
// wrapper with a second body.
#ifndef TRAIN_GPT2_CU
#define TRAIN_GPT2_CU

#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <utility>

#include "gpt2.h"
#include "rng.h"

namespace gpu {

#if defined(PRECISION_FP32)
typedef float floatX;
constexpr Dtype BUILD_DTYPE = FP32;
#else
typedef __nv_bfloat16 floatX;
constexpr Dtype BUILD_DTYPE = BF16;
#endif

// ---------------------------------------------------------------------------------------------
// Errors and launches

// Throws with file, line, call, the runtime's words and what to try.
inline void cuda_check(cudaError_t status, const char* call, const char* file, int line) {
    if (status == cudaSuccess) return;
    const char* hint = status == cudaErrorMemoryAllocation ? "; try a smaller --batch_size, or --recompute 1, 2 or 3" : "";
    fail("%s:%d: %s: %s (%s)%s", file, line, call, cudaGetErrorString(status), cudaGetErrorName(status), hint);
}
inline void cublas_check(cublasStatus_t status, const char* call, const char* file, int line) {
    if (status != CUBLAS_STATUS_SUCCESS)
        fail("%s:%d: %s: %s", file, line, call, cublasLtGetStatusString(status));
}
#define CUDA_CHECK(call) gpu::cuda_check((call), #call, __FILE__, __LINE__)
#define CUBLAS_CHECK(call) gpu::cublas_check((call), #call, __FILE__, __LINE__)

// Launches kernel<<<grid, block, smem, stream>>>(args...), the arguments converted to the kernel's own parameter types.
template <class... P, class... A>
inline void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, A&&... args) {
    cudaLaunchConfig_t c = {};
    c.gridDim = grid, c.blockDim = block, c.dynamicSmemBytes = smem, c.stream = stream;
    CUDA_CHECK(cudaLaunchKernelEx(&c, kernel, std::forward<A>(args)...));
}

inline size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------------------------------------
// Numbers, 16-byte accesses, reductions, dropout

constexpr int WARP = 32;

// What changes from one micro-step to the next. It stands in device memory, so that one captured graph serves all steps.
struct StepState {
    uint64_t seq0 = 0;     // number of the batch's first sequence within the step's whole batch
    uint32_t step = 0;     // keys the dropout masks
    float grad_scale = 1;  // 1 / (tokens of the whole batch)
};

// Dropout of one site as train_gpt2.cpp draws it: element e is kept where word e % 4 of Philox block e / 4 is at least the
// threshold, and then scaled by 1/(1-p). p = 0 draws nothing. In rows: e = (seq0 * T + m) * C + c; in attention:
// e = (((seq0 + b) * NH + h) * T + query) * T + key.
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

// The _once forms ask the caches not to keep what will not be read again soon. Addresses are multiples of 16.
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
template <class T>
__device__ inline Vec<T> load(const T* p) { return from_bits<T>(*reinterpret_cast<const int4*>(p)); }
template <class T>
__device__ inline Vec<T> load_once(const T* p) { return from_bits<T>(__ldcs(reinterpret_cast<const int4*>(p))); }
template <class T>
__device__ inline void store(T* p, const Vec<T>& x) { *reinterpret_cast<int4*>(p) = to_bits(x); }
template <class T>
__device__ inline void store_once(T* p, const Vec<T>& x) { __stcs(reinterpret_cast<int4*>(p), to_bits(x)); }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ inline T from_float(float x) {
    if constexpr (sizeof(T) == 2) return __float2bfloat16_rn(x);
    else return x;
}

// As many floats as a Vec<floatX> holds numbers, for the arithmetic in between.
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
__device__ inline Vec<floatX> narrow(const Floats& f) {
    Vec<floatX> x;
    for (int k = 0; k < VEC; k++) x[k] = from_float<floatX>(f[k]);
    return x;
}
// The same count of numbers from and to memory that holds floats in every build.
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
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
    return x;
}

// Each x[i] becomes its sum over the `warps` neighbouring warps that the caller belongs to, in a fixed order. All threads
// of the block call it; blockDim is one-dimensional, a multiple of 32 * warps.
template <class T, int N>
__device__ inline void group_sum(T (&x)[N], int warps) {
    for (int i = 0; i < N; i++) x[i] = warp_sum(x[i]);
    if (warps == 1) return;
    __shared__ T part[N][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, first = warp / warps * warps;
    __syncthreads();  // until the previous call's parts have been read
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
__device__ inline rng::Key dropout_key(const Dropout& d) { return rng::Key(d.seed, d.p > 0 ? d.state->step : 0, d.site, d.layer); }
// Row 0's number within the step's whole batch.
__device__ inline uint64_t dropout_row(const Dropout& d, size_t T) { return d.p > 0 ? d.state->seq0 * T : 0; }
// The factors, 0 or 1/(1-p), of elements 4 * block to 4 * block + 3.
__device__ inline float4 dropout_factors(const rng::Key& key, uint64_t block, float p) {
    rng::Block b = key.block(block);
    uint32_t threshold = rng::drop_threshold(p);
    float scale = 1.0f / (1.0f - p);
    return make_float4(b.w[0] >= threshold ? scale : 0.0f, b.w[1] >= threshold ? scale : 0.0f, b.w[2] >= threshold ? scale : 0.0f,
                       b.w[3] >= threshold ? scale : 0.0f);
}
// x *= the factors of the elements from e on, a multiple of 4; where p = 0 nothing happens.
__device__ inline void apply_dropout(Floats& x, const rng::Key& key, uint64_t e, float p) {
    if (p == 0) return;
    for (int i = 0; i < VEC; i += 4) {
        float4 f = dropout_factors(key, (e + i) / 4, p);
        x[i] *= f.x, x[i + 1] *= f.y, x[i + 2] *= f.z, x[i + 3] *= f.w;
    }
}

// Streaming multiprocessors of the device. Kernels whose blocks each leave one partial sum are sized by it.
inline int multiprocessors() {
    static const int count = [] {
        int device, n;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device));
        return n;
    }();
    return count;
}

// a[i] += sum over p of partials[p][i] for i < na, and likewise b[i - na] for the other columns; partials (parts, n).
// A block owns 32 columns; its warps share the parts and are added in order.
constexpr int ADD_WARPS = 16;
__global__ void __launch_bounds__(ADD_WARPS* WARP) add_partials_kernel(float* a, float* b, const float* partials, int parts, size_t na, size_t n) {
    __shared__ float sums[ADD_WARPS][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    size_t i = (size_t)blockIdx.x * WARP + lane;
    float sum = 0;
    if (i < n)
#pragma unroll 4
        for (int p = warp; p < parts; p += ADD_WARPS) sum += partials[p * n + i];
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp != 0 || i >= n) return;
    for (int w = 1; w < ADD_WARPS; w++) sum += sums[w][lane];
    (i < na ? a[i] : b[i - na]) += sum;
}
inline void add_partials(float* a, float* b, const float* partials, int parts, size_t na, size_t n, cudaStream_t s) {
    launch(add_partials_kernel, dim3((unsigned)ceil_div(n, WARP)), ADD_WARPS * WARP, 0, s, a, b, partials, parts, na, n);
}

// ---------------------------------------------------------------------------------------------
// Tensor-core and copy instructions, each with its body for the emulator

// d (16 x 8 floats) += a (16 x 16) b (16 x 8), a and b of bf16 in pairs. With g = lane / 4 and t = lane % 4 a lane holds
//     of a: columns 2t, 2t+1 of row g, and of row g+8; then columns 2t+8, 2t+9 of both
//     of b: rows 2t, 2t+1 of column g; then rows 2t+8, 2t+9
//     of d: columns 2t, 2t+1 of row g; then of row g+8.
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(EMULATOR)
    emu::mma_m16n8k16_bf16(d, a, {b0, b1}, d);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four 8 x 8 matrices of bf16 from shared memory, row r of matrix m at lane 8m+r's address (16-byte aligned). Register m of a
// lane: elements (lane / 4, lane % 4 * 2 and the next) of matrix m, or of its transpose.
template <bool TRANSPOSED>
__device__ inline void ldmatrix(uint32_t (&r)[4], const void* row) {
#if defined(EMULATOR)
    emu::ldmatrix_x4(r, row, TRANSPOSED);
#else
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
#endif
}

// Starts a copy of 16 bytes from global to shared memory; without `valid` nothing is read and zeros are written.
__device__ inline void cp_async16(void* shared, const void* global, bool valid) {
#if defined(EMULATOR)
    emu::cp_async16(shared, global, valid);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global), "r"(valid ? 16 : 0) : "memory");
#endif
}
// Closes a group of this thread's copies; cp_async_wait returns when at most PENDING younger groups are under way. What other
// threads copied is there after a barrier.
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
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
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

// cpu::embedding_forward. out (B,T,C) = wte[token] + wpe[t], then dropout. A block works on one row.
__global__ void __launch_bounds__(256) embedding_forward_kernel(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, size_t T,
                                                                size_t C, Dropout drop) {
    size_t m = blockIdx.x;
    const floatX *e = wte + (size_t)tokens[m] * C, *p = wpe + m % T * C;
    rng::Key key = dropout_key(drop);
    uint64_t row = dropout_row(drop, T) + m;
    for (size_t c = threadIdx.x * VEC; c < C; c += blockDim.x * VEC) {
        Floats x = widen(load(e + c)), y = widen(load(p + c));
        for (int k = 0; k < VEC; k++) x[k] += y[k];
        apply_dropout(x, key, row * C + c, drop.p);
        store(out + m * C + c, narrow(x));
    }
}

// As many threads as n items fill, in whole warps and at most `most`.
inline unsigned threads_for(size_t n, size_t most) { return (unsigned)std::min(most, ceil_div(n, WARP) * WARP); }

inline void embedding_forward(floatX* out, const int* tokens, const floatX* wte, const floatX* wpe, size_t B, size_t T, size_t C, Dropout drop,
                              cudaStream_t s) {
    launch(embedding_forward_kernel, dim3((unsigned)(B * T)), threads_for(C / VEC, 256), 0, s, out, tokens, wte, wpe, T, C, drop);
}

// The positions of a batch sorted by token, so that all gradients of one wte row are summed by one block or warp in one
// order. Bucket u holds token[u] at the positions order[starts[u]..starts[u+1]). A token that stands at more than FREQUENT
// positions (in a model of characters: the space) is also listed in frequent, and gets a whole block.
struct EmbeddingBuckets {
    static constexpr int FREQUENT = 64;
    int *count;  // [0] buckets, [1] frequent ones
    int *order, *starts, *token, *frequent;

    static size_t ints(size_t M) { return 2 + M + (M + 1) + M + M / FREQUENT; }
    // The arrays for M positions inside one block of ints(M) ints, in host or device memory.
    static EmbeddingBuckets at(int* memory, size_t M) {
        int* order = memory + 2;
        return {memory, order, order + M, order + M + M + 1, order + M + M + 1 + M};
    }
};

// On the host: fills the buckets of tokens (M). Allocates nothing.
inline void bucket_tokens(const EmbeddingBuckets& b, const int* tokens, size_t M) {
    for (size_t m = 0; m < M; m++) b.order[m] = (int)m;
    std::sort(b.order, b.order + M, [=](int i, int j) { return tokens[i] != tokens[j] ? tokens[i] < tokens[j] : i < j; });
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
__device__ inline void add_masked(Floats& sum, const floatX* dout, size_t m, size_t c, size_t C, const Dropout& drop, const rng::Key& key, uint64_t row0) {
    Floats x = widen(load(dout + m * C + c));
    apply_dropout(x, key, (row0 + m) * C + c, drop.p);
    for (int k = 0; k < VEC; k++) sum[k] += x[k];
}
__device__ inline void add_to_memory(float* p, const Floats& sum) {
    Floats x = load_floats(p);
    for (int k = 0; k < VEC; k++) x[k] += sum[k];
    store_floats(p, x);
}

// dwpe[t] += sum over b of dout[b,t]: one thread per position and vector of channels.
__global__ void __launch_bounds__(128) wpe_backward_kernel(float* dwpe, const floatX* dout, size_t B, size_t T, size_t C, Dropout drop) {
    size_t t = blockIdx.x, c = ((size_t)blockIdx.y * blockDim.x + threadIdx.x) * VEC;
    if (c >= C) return;
    rng::Key key = dropout_key(drop);
    uint64_t row0 = dropout_row(drop, T);
    Floats sum = {};
#pragma unroll 4
    for (size_t b = 0; b < B; b++) add_masked(sum, dout, b * T + t, c, C, drop, key, row0);
    add_to_memory(dwpe + t * C + c, sum);
}

// dwte[token] += the gradients at the token's few positions: one warp per bucket and 32 vectors of channels.
constexpr int BUCKET_WARPS = 4;
__global__ void __launch_bounds__(BUCKET_WARPS* WARP) wte_backward_kernel(float* dwte, const floatX* dout, EmbeddingBuckets buckets, size_t T, size_t C,
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

// The same for a frequent token: a block of 32 warps per bucket and 8 vectors of channels; each warp reads 4 positions at
// a time.
constexpr int STRIP_LANES = 8;
__global__ void __launch_bounds__(1024) wte_backward_frequent_kernel(float* dwte, const floatX* dout, EmbeddingBuckets buckets, size_t T, size_t C,
                                                                     Dropout drop) {
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
        for (int i = begin + threadIdx.x / STRIP_LANES; i < end; i += READERS) add_masked(sum, dout, buckets.order[i], c, C, drop, key, row0);
    for (int k = 0; k < VEC; k++) {
        for (int offset = STRIP_LANES; offset < WARP; offset *= 2) sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], offset);
        if (threadIdx.x % WARP < STRIP_LANES) sums[warp][strip_lane * VEC + k] = sum[k];
    }
    __syncthreads();
    size_t column = (size_t)blockIdx.y * STRIP_LANES * VEC + threadIdx.x;
    if (threadIdx.x >= STRIP_LANES * VEC || column >= C) return;
    float total = 0;
    for (int w = 0; w < WARP; w++) total += sums[w][threadIdx.x];
    dwte[(size_t)buckets.token[u] * C + column] += total;
}

// cpu::embedding_backward. dwte[token] += dout and dwpe[t] += dout under the mask; dout (B,T,C) stays as it is. The grids
// are made for the most buckets that B*T tokens can have, so that one captured graph serves every batch.
inline void embedding_backward(float* dwte, float* dwpe, const floatX* dout, const EmbeddingBuckets& buckets, size_t B, size_t T, size_t C,
                               Dropout drop, cudaStream_t s) {
    size_t M = B * T, vecs = C / VEC;
    unsigned threads = threads_for(vecs, 128);
    launch(wpe_backward_kernel, dim3((unsigned)T, (unsigned)ceil_div(vecs, threads)), threads, 0, s, dwpe, dout, B, T, C, drop);
    launch(wte_backward_kernel, dim3((unsigned)ceil_div(M, BUCKET_WARPS), (unsigned)ceil_div(vecs, WARP)), BUCKET_WARPS * WARP, 0, s, dwte, dout,
           buckets, T, C, drop);
    if (M > EmbeddingBuckets::FREQUENT)
        launch(wte_backward_frequent_kernel, dim3((unsigned)(M / EmbeddingBuckets::FREQUENT), (unsigned)ceil_div(vecs, STRIP_LANES)), 1024, 0, s, dwte,
               dout, buckets, T, C, drop);
}

// ---------------------------------------------------------------------------------------------
// LayerNorm and residual

// A row of C channels, a multiple of 8, is held in the registers of `warps` warps that share it: thread t of them holds the
// vectors t, t + 32 warps, ... of the row.
constexpr int ROW_VECS = 24 / VEC;                      // vectors of one row that a thread holds
constexpr int ROW_WARPS = 16;                           // most warps that share a row
constexpr size_t WARP_CHANNELS = ROW_VECS * VEC * WARP;  // 768: GPT-2's rows fit one warp exactly
constexpr size_t MAX_CHANNELS = ROW_WARPS * WARP_CHANNELS;

struct Rows {
    int warps;  // that share a row
    int block;  // rows of a block
    unsigned threads() const { return (unsigned)(warps * block * WARP); }
};
// For blocks of at least `fewest` warps.
inline Rows row_layout(size_t C, int fewest) {
    int warps = 1;
    while (warps * WARP_CHANNELS < C) warps *= 2;
    if (C % 8 || C > MAX_CHANNELS) throw std::logic_error("LayerNorm kernels: C is no multiple of 8, or above 12288");
    return {warps, std::max(1, fewest / warps)};
}

// LayerNorm of x, or with RESIDUAL of sum = x + dropout(branch), which is written too. The statistics are those of the row
// as rounded to floatX: backward sees no other.
template <bool RESIDUAL>
__global__ void __launch_bounds__(ROW_WARPS* WARP) layernorm_forward_kernel(floatX* sum, floatX* y, float* mean, float* rstd, const floatX* x,
                                                                           const floatX* branch, const floatX* w, const floatX* b, size_t M, size_t T,
                                                                           int C, Dropout drop, float eps, int warps) {
    int threads = warps * WARP, t = threadIdx.x % threads;
    size_t m = (size_t)blockIdx.x * (blockDim.x / threads) + threadIdx.x / threads;
    bool inside = m < M;  // rows past the end still meet at the barriers
    Floats row[ROW_VECS];
    rng::Key key = dropout_key(drop);
    uint64_t row0 = dropout_row(drop, T);
    float total[1] = {0};
#pragma unroll
    for (int i = 0; i < ROW_VECS; i++) {
        int c = (i * threads + t) * VEC;
        if (!inside || c >= C) continue;
        row[i] = widen(load_once(x + m * C + c));
        if constexpr (RESIDUAL) {
            Floats add = widen(load_once(branch + m * C + c));
            apply_dropout(add, key, (row0 + m) * C + c, drop.p);
            for (int k = 0; k < VEC; k++) row[i][k] += add[k];
            Vec<floatX> rounded = narrow(row[i]);
            store(sum + m * C + c, rounded);
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
    group_sum(total, warps);
    float rs = rsqrtf(total[0] / (float)C + eps);
#pragma unroll
    for (int i = 0; i < ROW_VECS; i++) {
        int c = (i * threads + t) * VEC;
        if (!inside || c >= C) continue;
        Floats weight = widen(load(w + c)), bias = widen(load(b + c));
        for (int k = 0; k < VEC; k++) row[i][k] = (row[i][k] - mu) * rs * weight[k] + bias[k];
        store(y + m * C + c, narrow(row[i]));
    }
    if (inside && t == 0) mean[m] = mu, rstd[m] = rs;
}

// cpu::layernorm_forward. y (M,C) = LayerNorm(x); mean, rstd (M) are kept for backward.
inline void layernorm_forward(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* w, const floatX* b, size_t M, size_t C, float eps,
                              cudaStream_t s) {
    Rows rows = row_layout(C, 4);
    launch(layernorm_forward_kernel<false>, dim3((unsigned)ceil_div(M, rows.block)), rows.threads(), 0, s, nullptr, y, mean, rstd, x, nullptr, w, b, M,
           M, (int)C, Dropout{}, eps, rows.warps);
}

// cpu::residual_layernorm_forward. sum (M,C) = skip + dropout(branch); y = LayerNorm(sum). sum may be skip or branch.
inline void residual_layernorm_forward(floatX* sum, floatX* y, float* mean, float* rstd, const floatX* skip, const floatX* branch, const floatX* w,
                                       const floatX* b, size_t M, size_t T, size_t C, Dropout drop, float eps, cudaStream_t s) {
    Rows rows = row_layout(C, 4);
    launch(layernorm_forward_kernel<true>, dim3((unsigned)ceil_div(M, rows.block)), rows.threads(), 0, s, sum, y, mean, rstd, skip, branch, w, b, M, T,
           (int)C, drop, eps, rows.warps);
}

// Each group of warps takes every so many-th row, and keeps the sums of dw and db for its channels in registers; at the end
// the block's groups are added up, in order, into partials (blocks, 2, C).
__global__ void __launch_bounds__(ROW_WARPS* WARP) layernorm_backward_kernel(floatX* dresid, floatX* masked, float* partials, const floatX* dy,
                                                                            const floatX* dskip, const floatX* x, const float* mean,
                                                                            const float* rstd, const floatX* w, size_t M, size_t T, int C,
                                                                            bool accumulate, Dropout drop, int warps) {
    int threads = warps * WARP, t = threadIdx.x % threads, group = threadIdx.x / threads, groups = blockDim.x / threads;
    rng::Key key = dropout_key(drop);
    uint64_t row0 = dropout_row(drop, T);
    Floats dw[ROW_VECS] = {}, db[ROW_VECS] = {};
    for (size_t first = (size_t)blockIdx.x * groups; first < M; first += (size_t)gridDim.x * groups) {
        size_t m = first + group;
        bool inside = m < M;
        float mu = inside ? mean[m] : 0, rs = inside ? rstd[m] : 0, sums[2] = {0, 0};
        Floats d[ROW_VECS];
#pragma unroll
        for (int i = 0; i < ROW_VECS; i++) {
            int c = (i * threads + t) * VEC;
            if (!inside || c >= C) continue;
            d[i] = widen(load_once(dy + m * C + c));
            if (dskip) {
                Floats add = widen(load(dskip + m * C + c));
                for (int k = 0; k < VEC; k++) d[i][k] += add[k];
            }
            Vec<floatX> row = load(x + m * C + c), weight = load(w + c);
            for (int k = 0; k < VEC; k++) {
                float normalised = (to_float(row[k]) - mu) * rs, dn = d[i][k] * to_float(weight[k]);
                sums[0] += dn, sums[1] += dn * normalised;
                dw[i][k] += d[i][k] * normalised, db[i][k] += d[i][k];
            }
        }
        group_sum(sums, warps);
        float mean_dn = sums[0] / (float)C, mean_dot = sums[1] / (float)C;
#pragma unroll
        for (int i = 0; i < ROW_VECS; i++) {
            int c = (i * threads + t) * VEC;
            if (!inside || c >= C) continue;
            Vec<floatX> row = load(x + m * C + c), weight = load(w + c);  // from the cache; registers are short
            Floats dx;
            for (int k = 0; k < VEC; k++)
                dx[k] = rs * (d[i][k] * to_float(weight[k]) - mean_dn - (to_float(row[k]) - mu) * rs * mean_dot);
            if (accumulate) {
                Floats before = widen(load(dresid + m * C + c));
                for (int k = 0; k < VEC; k++) dx[k] += before[k];
            }
            store(dresid + m * C + c, narrow(dx));
            if (masked) {
                apply_dropout(dx, key, (row0 + m) * C + c, drop.p);
                store(masked + m * C + c, narrow(dx));
            }
        }
    }
    __shared__ __align__(16) float part[ROW_WARPS * WARP * VEC];
#pragma unroll
    for (int i = 0; i < ROW_VECS; i++)
        for (int which = 0; which < 2; which++) {
            int c = (i * threads + t) * VEC;
            __syncthreads();
            for (int k = 0; k < VEC; k++) part[threadIdx.x * VEC + k] = which ? db[i][k] : dw[i][k];
            __syncthreads();
            if (group > 0 || c >= C) continue;
            Floats total = {};
            for (int g = 0; g < groups; g++)
                for (int k = 0; k < VEC; k++) total[k] += part[(g * threads + t) * VEC + k];
            store_floats(partials + ((size_t)blockIdx.x * 2 + which) * C + c, total);
        }
}

inline int layernorm_backward_blocks() { return 2 * multiprocessors(); }
// Floats of scratch that layernorm_backward needs.
inline size_t layernorm_backward_scratch(size_t C) { return 2 * C * layernorm_backward_blocks(); }

// cpu::layernorm_backward. dresid (M,C) = (+= where accumulate) the gradient of dy + dskip through LayerNorm; dw, db (C) +=.
// dskip may be null; GROVER's residual starts from the normalised row, so its gradient passes through too. masked, which may
// be null, receives dresid under drop's mask: the gradient of the branch whose output was dropped. dy and dskip may be the
// same memory as dresid and masked.
inline void layernorm_backward(floatX* dresid, floatX* masked, float* dw, float* db, float* scratch, const floatX* dy, const floatX* dskip,
                               const floatX* x, const float* mean, const float* rstd, const floatX* w, size_t M, size_t T, size_t C, bool accumulate,
                               Dropout drop, cudaStream_t s) {
    Rows rows = row_layout(C, 8);
    size_t blocks = std::min<size_t>(layernorm_backward_blocks(), ceil_div(M, rows.block));
    launch(layernorm_backward_kernel, dim3((unsigned)blocks), rows.threads(), 0, s, dresid, masked, scratch, dy, dskip, x, mean, rstd, w, M, T, (int)C,
           accumulate, drop, rows.warps);
    add_partials(dw, db, scratch, (int)blocks, C, 2 * C, s);
}

// ---------------------------------------------------------------------------------------------
// Attention

// Causal attention by tiles (FlashAttention-2, Dao 2023), per head: S = Q K^T / sqrt(hs), P = softmax of each row of S over the
// keys up to the query, O = dropout(P) V. Only tiles of S exist, in registers; softmax runs along with them: a row's maximum
// and sum so far are kept, and O is rescaled when the maximum grows. Kept for backward is lse, the logarithm of each row's sum
// of e^S. Held against cpu::Attention.
//
// Backward: with D = rowsum(dO * O),  dP = dropout(dO V^T),  dS = P * (dP - D),
//     dV = dropout(P)^T dO,  dQ = dS K / sqrt(hs),  dK = dS^T Q / sqrt(hs).
// dQ sums over keys and dK, dV sum over queries, so one kernel cannot own both results. Two kernels compute S and dP twice, 7
// products instead of 5. The alternatives: atomic additions to dQ, which change from run to run; or partial dQ per tile of 128
// keys, which at T = 1024 and hs = 64 write and read 2.4 MB a head, 1.6 us of an A100's memory, where the two more products
// take 0.13 GFLOP, 0.9 us of its tensor cores at half their peak. The dQ kernel goes first and leaves D to the other.

constexpr int HEAD_SIZES[] = {32, 48, 64, 80, 96, 128};
inline bool attention_head_size_ok(int hs) {
    for (int known : HEAD_SIZES)
        if (hs == known) return true;
    return false;
}

// f(integral_constant of the head size), which must be one of those above.
template <class F, size_t... I>
inline void with_head_size(size_t hs, F f, std::index_sequence<I...>) {
    bool known = ((hs == (size_t)HEAD_SIZES[I] && (f(std::integral_constant<int, HEAD_SIZES[I]>()), true)) || ...);
    if (!known) throw std::logic_error("attention: no kernel for this head size");
}
template <class F>
inline void with_head_size(size_t hs, F f) {
    with_head_size(hs, f, std::make_index_sequence<std::size(HEAD_SIZES)>());
}

// What one block works on: head h of sequence b, blockIdx.x = b NH + h, and a tile of its rows, blockIdx.y. Rows of Q, K, V
// stand where the QKV product left them, 3C apart.
template <int HS>
struct Head {
    size_t C, stride, index, qkv, out;  // channels, 3C, the head's number, and where it starts in (B,T,3C) and (B,T,C)
    __device__ Head(int T, int NH) : C((size_t)NH * HS), stride(3 * C), index(blockIdx.x) {
        size_t row = (size_t)(blockIdx.x / (unsigned)NH) * T, column = blockIdx.x % (unsigned)NH * HS;  // a 64-bit division is slow
        qkv = row * stride + column, out = row * C + column;
    }
};

constexpr float LOG2E = 1.44269504f;  // softmax in powers of 2

// What backward's second kernel needs of a query: lse / ln 2, and D. Rows beyond T have lse = infinity, so that P = 0.
struct alignas(8) RowStats {
    float lse2, d;
};
constexpr size_t STATS_ROWS = 64;  // per head they are padded to a multiple of this
inline __host__ __device__ size_t stats_rows(size_t T) { return (T + STATS_ROWS - 1) / STATS_ROWS * STATS_ROWS; }

// The dropout of one head's probabilities.
struct HeadDropout {
    rng::Key key;
    uint32_t threshold;
    float scale;  // 1/(1-p)
    uint64_t first, T;  // number of this head's first element, elements a query
    bool on;
    __device__ HeadDropout(const Dropout& d, int T_, int NH)
        : key(dropout_key(d)), threshold(rng::drop_threshold(d.p)), scale(1.0f / (1.0f - d.p)),
          first(d.p > 0 ? (d.state->seq0 * NH + blockIdx.x) * T_ * T_ : 0), T(T_), on(d.p > 0) {}
    // Bit i: element 4 * block + i is kept.
    __device__ unsigned keep4(uint64_t block) const {
        rng::Block draw = key.block(block);
        unsigned bits = 0;
        for (int i = 0; i < 4; i++) bits |= (unsigned)(draw.w[i] >= threshold) << i;
        return bits;
    }
    __device__ uint64_t element(int query, int k) const { return first + query * T + k; }
    __device__ unsigned keep(int query, int k) const { return keep4(element(query, k) / 4) >> element(query, k) % 4 & 1; }
};

#if !defined(PRECISION_FP32)

// --- bf16: products on tensor cores

// Rows of HS bf16 in shared memory, with 16 bytes between rows: eight rows then start in eight different groups of four banks,
// for every HS that is a multiple of 16, and ldmatrix meets no bank conflict.
template <int HS>
struct Tile {
    static constexpr int LD = HS + 8, CHUNKS = HS / 8;
    static constexpr size_t BYTES = LD * sizeof(floatX);  // of a row
    floatX* x;

    __device__ Tile from_row(int r) const { return {x + r * LD}; }
    // Starts copying ROWS rows, `stride` apart; from row `valid` on they become zero.
    template <int ROWS, int THREADS>
    __device__ void load(const floatX* from, int stride, int valid) const {
#pragma unroll
        for (int i = 0; i < ROWS * CHUNKS; i += THREADS) {
            int chunk = i + threadIdx.x, r = chunk / CHUNKS, c = chunk % CHUNKS * 8;
            if (r < ROWS) cp_async16(x + r * LD + c, from + r * stride + c, r < valid);
        }
    }
    // The 16 x 16 at (row, col) as the left factor of mma.
    __device__ void left(uint32_t (&a)[4], int row, int col) const {
        int lane = threadIdx.x % WARP;
        ldmatrix<false>(a, x + (row + lane % 16) * LD + col + lane / 16 * 8);
    }
    // The 16 x 16 at (row, col) as the right factor, b[0..1] its first eight columns and b[2..3] the others; and its transpose.
    __device__ void right(uint32_t (&b)[4], int row, int col) const {
        int lane = threadIdx.x % WARP;
        ldmatrix<true>(b, x + (row + lane % 16) * LD + col + lane / 16 * 8);
    }
    __device__ void right_transposed(uint32_t (&b)[4], int row, int col) const {
        int lane = threadIdx.x % WARP;
        ldmatrix<false>(b, x + (row + lane / 16 * 8 + lane % 8) * LD + col + lane / 8 % 2 * 8);
    }
};

// A warp's accumulators: MT x NT blocks of 16 x 8. Element i of a lane stands in a block at (element_row(i), element_col(i)).
template <int MT, int NT>
using Accumulators = float[MT][NT][4];
__device__ inline int element_row(int i) { return threadIdx.x % WARP / 4 + i / 2 * 8; }
__device__ inline int element_col(int i) { return threadIdx.x % 4 * 2 + i % 2; }

// f(element, m, n, i) for all of a lane's accumulators.
template <int MT, int NT, class F>
__device__ inline void for_elements(Accumulators<MT, NT>& acc, F f) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) f(acc[m][n][i], m, n, i);
}

// acc += A B^T over all HS columns: A the first 16 MT rows of `a`, B the first 8 NT of `b`.
template <int HS, int MT, int NT>
__device__ inline void multiply_transposed(Accumulators<MT, NT>& acc, Tile<HS> a, Tile<HS> b) {
#pragma unroll
    for (int k = 0; k < HS; k += 16) {
        uint32_t left[MT][4];
        for (int m = 0; m < MT; m++) a.left(left[m], 16 * m, k);
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
            uint32_t right[4];
            b.right_transposed(right, 8 * n, k);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(acc[m][n], left[m], right[0], right[1]);
                mma(acc[m][n + 1], left[m], right[2], right[3]);
            }
        }
    }
}

// acc += P B: P (16 MT x 8 NT) rounded to bf16 where it stands in registers, B the first 8 NT rows of `b`.
template <int HS, int MT, int NT>
__device__ inline void multiply(Accumulators<MT, HS / 8>& acc, const uint32_t (&p)[MT][NT / 2][4], Tile<HS> b) {
#pragma unroll
    for (int k = 0; k < NT / 2; k++)
#pragma unroll
        for (int n = 0; n < HS / 8; n += 2) {
            uint32_t right[4];
            b.right(right, 16 * k, 8 * n);
#pragma unroll
            for (int m = 0; m < MT; m++) {
                mma(acc[m][n], p[m][k], right[0], right[1]);
                mma(acc[m][n + 1], p[m][k], right[2], right[3]);
            }
        }
}

__device__ inline uint32_t pack_bf16(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &pair, 4);
    return bits;
}
// Accumulators as left factors of the next product: an accumulator's two columns are one register of mma's a.
template <int MT, int NT>
__device__ inline void round_to_left(uint32_t (&p)[MT][NT / 2][4], const Accumulators<MT, NT>& acc) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i += 2) p[m][n / 2][n % 2 * 2 + i / 2] = pack_bf16(acc[m][n][i], acc[m][n][i + 1]);
}

// Writes a warp's rows, `stride` apart and only the first `valid`, 16 bytes at a time; `stage` is shared memory for 16 MT rows
// that no other warp reads.
template <int HS, int MT>
__device__ inline void store_rows(floatX* to, int stride, int valid, const Accumulators<MT, HS / 8>& acc, Tile<HS> stage) {
    __syncwarp();
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int n = 0; n < HS / 8; n++)
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
                uint32_t pair = pack_bf16(acc[m][n][i], acc[m][n][i + 1]);
                *(uint32_t*)(stage.from_row(16 * m + element_row(i)).x + 8 * n + element_col(i)) = pair;
            }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * MT * Tile<HS>::CHUNKS; i += WARP) {
        int chunk = i + threadIdx.x % WARP, r = chunk / Tile<HS>::CHUNKS, c = chunk % Tile<HS>::CHUNKS * 8;
        if (r < valid) store(to + r * stride + c, load(stage.from_row(r).x + c));
    }
}

// Sum and maximum over the four lanes that share a row of accumulators.
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// The functions below know a warp's score tile by its first query and key; its rows are queries, or, with KEY_ROWS, keys.

// A query sees no later key.
template <bool KEY_ROWS, int MT, int NT>
__device__ inline void hide_later_keys(Accumulators<MT, NT>& s, int query, int key) {
    for_elements<MT, NT>(s, [=](float& x, int m, int n, int i) {
        int row = 16 * m + element_row(i), col = 8 * n + element_col(i);
        if (KEY_ROWS ? key + row > query + col : key + col > query + row) x = -INFINITY;
    });
}

// Dropout's draws for a tile: bit 4 (m NT + n) + i stands for element i of block (m, n). Where a draw gives four keys of one query,
// the lanes that hold those share it: each lane draws for one query and four keys, and asks the others. (By whole warps.)
template <int MT, int NT>
using KeepBits = uint32_t[(MT * NT + 7) / 8];
template <bool KEY_ROWS, int MT, int NT>
__device__ inline void draw(KeepBits<MT, NT>& kept, const HeadDropout& drop, int query, int key) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int first = 0; first < MT * NT; first += 8) {
        uint32_t word = 0;
#pragma unroll 2
        for (int block = first; block < MT * NT && block < first + 8; block++) {
            int row = block / NT * 16, col = block % NT * 8;
            int q = query + (KEY_ROWS ? col : row), k = key + (KEY_ROWS ? row : col);
            uint32_t bits = 0;
            if (drop.T % 4) {
                for (int i = 0; i < 4; i++) {
                    int r = element_row(i), c = element_col(i);
                    bits |= drop.keep(q + (KEY_ROWS ? c : r), k + (KEY_ROWS ? r : c)) << i;
                }
            } else if (KEY_ROWS) {  // lanes that differ in g % 4 hold four keys of two queries, and four keys eight further on
                uint32_t all = drop.keep4(drop.element(q + 2 * t + g % 2, k + g / 4 * 4 + g % 4 / 2 * 8) / 4) << g % 4 * 4;
                all |= __shfl_xor_sync(~0u, all, 4);
                all |= __shfl_xor_sync(~0u, all, 8);
                for (int i = 0; i < 4; i++) bits |= (all >> (4 * i + g % 4) & 1) << i;
            } else {  // lanes that differ in t % 2 hold four keys of two queries
                uint32_t mine = drop.keep4(drop.element(q + g + t % 2 * 8, k + t / 2 * 4) / 4), other = __shfl_xor_sync(~0u, mine, 1);
                bits = t % 2 ? other >> 2 | (mine >> 2) << 2 : (mine & 3) | (other & 3) << 2;
            }
            word |= bits << block % 8 * 4;
        }
        kept[first / 8] = word;
    }
}
template <int MT, int NT>
__device__ inline void zero_dropped(Accumulators<MT, NT>& x, const KeepBits<MT, NT>& kept) {
    for_elements<MT, NT>(x, [&](float& e, int m, int n, int i) {
        int bit = 4 * (m * NT + n) + i;
        if (!(kept[bit / 32] >> bit % 32 & 1)) e = 0;
    });
}

// Forward: a block takes 128 queries, each of four warps 32 of them. Tiles of 64 keys and of 64 values take turns in two places,
// one being copied while the other is multiplied.
template <int HS>
struct ForwardShape {
    static constexpr int MT = 2, WARPS = 4, THREADS = WARPS * WARP, QUERIES = 16 * MT * WARPS, KEYS = HS <= 64 ? 64 : 32;
    static constexpr size_t SMEM = (QUERIES + 2 * KEYS) * Tile<HS>::BYTES;
};

template <int HS>
__global__ void __launch_bounds__(ForwardShape<HS>::THREADS)
attention_forward_kernel(floatX* out, float* lse, const floatX* qkv, int T, int NH, Dropout dropout) {
    using Shape = ForwardShape<HS>;
    constexpr int MT = Shape::MT, QUERIES = Shape::QUERIES, KEYS = Shape::KEYS, NT = KEYS / 8;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const floatX *q = qkv + head.qkv, *k = q + head.C, *v = k + head.C;
    size_t stride = head.stride;
    Tile<HS> q_tile{(floatX*)dynamic_smem}, k_tile = q_tile.from_row(QUERIES), v_tile = k_tile.from_row(KEYS);

    int q0 = (gridDim.y - 1 - blockIdx.y) * QUERIES;  // the longest rows first
    int warp_row = threadIdx.x / WARP * 16 * MT, warp_q = q0 + warp_row;
    int end = min(q0 + QUERIES, T);
    float scale = rsqrtf((float)HS), scale2 = scale * LOG2E;
    Accumulators<MT, HS / 8> o = {};
    float max[MT][2], sum[MT][2];  // of a lane's rows; its own part of the sum
    for (int m = 0; m < MT; m++)
        for (int r = 0; r < 2; r++) max[m][r] = -INFINITY, sum[m][r] = 0;

    q_tile.template load<QUERIES, Shape::THREADS>(q + q0 * stride, stride, T - q0);
    k_tile.template load<KEYS, Shape::THREADS>(k, stride, T);
    cp_async_commit();
    for (int k0 = 0; k0 < end; k0 += KEYS) {
        bool active = k0 < warp_q + 16 * MT;  // some query of the warp sees some of the keys
        uint32_t p[MT][NT / 2][4];
        cp_async_wait<0>();
        __syncthreads();
        v_tile.template load<KEYS, Shape::THREADS>(v + k0 * stride, stride, T - k0);
        cp_async_commit();
        if (active) {
            KeepBits<MT, NT> kept;
            if (drop.on) draw<false, MT, NT>(kept, drop, warp_q, k0);
            Accumulators<MT, NT> s = {};
            multiply_transposed(s, q_tile.from_row(warp_row), k_tile);
            if (k0 + KEYS > warp_q) hide_later_keys<false, MT, NT>(s, warp_q, k0);
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float top = max[m][r];
                    for (int n = 0; n < NT; n++) top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
                    top = row_max(top);  // finite: the first tile has a key for every query
                    float shrink = exp2_approx((max[m][r] - top) * scale2);
                    max[m][r] = top, sum[m][r] *= shrink;
                    for (int n = 0; n < HS / 8; n++) o[m][n][2 * r] *= shrink, o[m][n][2 * r + 1] *= shrink;
                    for (int n = 0; n < NT; n++)
                        for (int i = 2 * r; i < 2 * r + 2; i++) {
                            s[m][n][i] = exp2_approx(s[m][n][i] * scale2 - top * scale2);
                            sum[m][r] += s[m][n][i];
                        }
                }
            if (drop.on) zero_dropped<MT, NT>(s, kept);
            round_to_left(p, s);
        }
        cp_async_wait<0>();
        __syncthreads();
        if (k0 + KEYS < end) k_tile.template load<KEYS, Shape::THREADS>(k + (k0 + KEYS) * stride, stride, T - k0 - KEYS);
        cp_async_commit();
        if (active) multiply<HS, MT, NT>(o, p, v_tile);
    }
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float total = row_sum(sum[m][r]), factor = drop.scale / total;
            int query = warp_q + 16 * m + element_row(2 * r);
            if (threadIdx.x % 4 == 0 && query < T) lse[head.index * T + query] = max[m][r] * scale + logf(total);
            for (int n = 0; n < HS / 8; n++) o[m][n][2 * r] *= factor, o[m][n][2 * r + 1] *= factor;
        }
    store_rows<HS, MT>(out + head.out + warp_q * head.C, head.C, T - warp_q, o, q_tile.from_row(warp_row));
}

// Backward: a block owns 128 rows of the result, of queries or of keys, and goes through the others 32 at a time, in two places
// that are filled in turn. A warp owns 32 rows; 16 where two results of 32 x HS and two score tiles do not fit its registers.
template <int HS>
struct BackwardShape {
    static constexpr int MT = HS <= 64 ? 2 : 1, WARPS = 8 / MT, THREADS = WARPS * WARP, ROWS = 128, STEP = 32;
    static constexpr size_t SMEM = (2 * ROWS + 4 * STEP) * Tile<HS>::BYTES + 2 * STEP * sizeof(RowStats);
};

// dQ, and the row statistics (B*NH, stats_rows(T)) that the second kernel reads.
template <int HS>
__global__ void __launch_bounds__(BackwardShape<HS>::THREADS)
attention_backward_query_kernel(floatX* dqkv, RowStats* stats, const floatX* dout, const floatX* out, const floatX* qkv,
                                const float* lse, int T, int NH, Dropout dropout) {
    using Shape = BackwardShape<HS>;
    constexpr int MT = Shape::MT, QUERIES = Shape::ROWS, KEYS = Shape::STEP, NT = KEYS / 8;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const floatX *q = qkv + head.qkv, *k = q + head.C, *v = k + head.C, *d_o = dout + head.out;
    size_t stride = head.stride;
    Tile<HS> q_tile{(floatX*)dynamic_smem}, do_tile = q_tile.from_row(QUERIES), ring = do_tile.from_row(QUERIES);
    auto k_tile = [&](int turn) { return ring.from_row(turn % 2 * 2 * KEYS); };
    auto v_tile = [&](int turn) { return ring.from_row(turn % 2 * 2 * KEYS + KEYS); };
    auto fetch = [&](int turn) {
        int k0 = turn * KEYS;
        k_tile(turn).template load<KEYS, Shape::THREADS>(k + k0 * stride, stride, T - k0);
        v_tile(turn).template load<KEYS, Shape::THREADS>(v + k0 * stride, stride, T - k0);
        cp_async_commit();
    };

    int q0 = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    int warp_row = threadIdx.x / WARP * 16 * MT, warp_q = q0 + warp_row;
    int turns = (min(q0 + QUERIES, T) + KEYS - 1) / KEYS;
    float scale = rsqrtf((float)HS), scale2 = scale * LOG2E;
    Accumulators<MT, HS / 8> dq = {};
    RowStats row[MT][2];

    q_tile.template load<QUERIES, Shape::THREADS>(q + q0 * stride, stride, T - q0);
    do_tile.template load<QUERIES, Shape::THREADS>(d_o + q0 * head.C, head.C, T - q0);
    fetch(0);
    for (int turn = 0; turn < turns; turn++) {
        int k0 = turn * KEYS;
        cp_async_wait<0>();
        __syncthreads();
        if (turn + 1 < turns) fetch(turn + 1);
        if (turn == 0)
#pragma unroll
            for (int m = 0; m < MT; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {  // D: four lanes share a row, 16 bytes at a time
                    int i = 16 * m + element_row(2 * r), query = warp_q + i;
                    float d = 0;
                    if (query < T)
                        for (int c = threadIdx.x % 4 * VEC; c < HS; c += 4 * VEC) {
                            Floats x = widen(load(out + head.out + query * head.C + c));
                            Floats y = widen(load(do_tile.from_row(warp_row + i).x + c));
                            for (int e = 0; e < VEC; e++) d += x[e] * y[e];
                        }
                    row[m][r] = {query < T ? lse[head.index * T + query] * LOG2E : INFINITY, row_sum(d)};
                    if (threadIdx.x % 4 == 0 && query < (int)stats_rows(T)) stats[head.index * stats_rows(T) + query] = row[m][r];
                }
        if (k0 >= warp_q + 16 * MT) continue;  // all keys come after the warp's queries
        KeepBits<MT, NT> kept;
        if (drop.on) draw<false, MT, NT>(kept, drop, warp_q, k0);
        Accumulators<MT, NT> s = {}, dp = {};
        multiply_transposed(s, q_tile.from_row(warp_row), k_tile(turn));
        multiply_transposed(dp, do_tile.from_row(warp_row), v_tile(turn));
        if (k0 + KEYS > warp_q) hide_later_keys<false, MT, NT>(s, warp_q, k0);
        if (drop.on) zero_dropped<MT, NT>(dp, kept);
        for_elements<MT, NT>(s, [&](float& x, int m, int n, int i) {
            x = exp2_approx(x * scale2 - row[m][i / 2].lse2) * (dp[m][n][i] * drop.scale - row[m][i / 2].d);
        });
        uint32_t ds[MT][NT / 2][4];
        round_to_left(ds, s);
        multiply<HS, MT, NT>(dq, ds, k_tile(turn));
    }
    for_elements<MT, HS / 8>(dq, [=](float& x, int, int, int) { x *= scale; });
    store_rows<HS, MT>(dqkv + head.qkv + warp_q * stride, stride, T - warp_q, dq, q_tile.from_row(warp_row));
}

// dK and dV. Scores are transposed, a key a row, so that P^T and dS^T are left factors where they stand.
template <int HS>
__global__ void __launch_bounds__(BackwardShape<HS>::THREADS)
attention_backward_key_kernel(floatX* dqkv, const RowStats* stats, const floatX* dout, const floatX* qkv, int T, int NH,
                              Dropout dropout) {
    using Shape = BackwardShape<HS>;
    constexpr int MT = Shape::MT, KEYS = Shape::ROWS, QUERIES = Shape::STEP, NT = QUERIES / 8;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const floatX *q = qkv + head.qkv, *k = q + head.C, *v = k + head.C, *d_o = dout + head.out;
    size_t stride = head.stride;
    stats += head.index * stats_rows(T);
    Tile<HS> k_tile{(floatX*)dynamic_smem}, v_tile = k_tile.from_row(KEYS), ring = v_tile.from_row(KEYS);
    auto q_tile = [&](int turn) { return ring.from_row(turn % 2 * 2 * QUERIES); };
    auto do_tile = [&](int turn) { return ring.from_row(turn % 2 * 2 * QUERIES + QUERIES); };
    auto stats_tile = [&](int turn) { return (RowStats*)ring.from_row(4 * QUERIES).x + turn % 2 * QUERIES; };
    auto fetch = [&](int turn) {
        int q0 = turn * QUERIES;
        q_tile(turn).template load<QUERIES, Shape::THREADS>(q + q0 * stride, stride, T - q0);
        do_tile(turn).template load<QUERIES, Shape::THREADS>(d_o + q0 * head.C, head.C, T - q0);
        if (threadIdx.x < QUERIES / 2) cp_async16(stats_tile(turn) + 2 * threadIdx.x, stats + q0 + 2 * threadIdx.x, true);
        cp_async_commit();
    };

    int k0 = blockIdx.y * KEYS;  // the keys that most queries see first
    int warp_row = threadIdx.x / WARP * 16 * MT, warp_k = k0 + warp_row;
    int turns = (T + QUERIES - 1) / QUERIES;
    float scale = rsqrtf((float)HS), scale2 = scale * LOG2E;
    Accumulators<MT, HS / 8> dk = {}, dv = {};

    k_tile.template load<KEYS, Shape::THREADS>(k + k0 * stride, stride, T - k0);
    v_tile.template load<KEYS, Shape::THREADS>(v + k0 * stride, stride, T - k0);
    fetch(k0 / QUERIES);
    for (int turn = k0 / QUERIES; turn < turns; turn++) {
        int q0 = turn * QUERIES;
        cp_async_wait<0>();
        __syncthreads();
        if (turn + 1 < turns) fetch(turn + 1);
        if (q0 + QUERIES <= warp_k) continue;  // all queries come before the warp's keys
        KeepBits<MT, NT> kept;
        if (drop.on) draw<true, MT, NT>(kept, drop, q0, warp_k);
        Accumulators<MT, NT> s = {}, dp = {};
        multiply_transposed(s, k_tile.from_row(warp_row), q_tile(turn));
        multiply_transposed(dp, v_tile.from_row(warp_row), do_tile(turn));
        if (q0 < warp_k + 16 * MT) hide_later_keys<true, MT, NT>(s, q0, warp_k);
        if (drop.on) zero_dropped<MT, NT>(dp, kept);
        const RowStats* column = stats_tile(turn) + element_col(0);
        for_elements<MT, NT>(s, [&](float& x, int m, int n, int i) {
            RowStats query = column[8 * n + i % 2];
            x = exp2_approx(x * scale2 - query.lse2);
            dp[m][n][i] = x * (dp[m][n][i] * drop.scale - query.d);
        });
        if (drop.on) zero_dropped<MT, NT>(s, kept);
        uint32_t left[MT][NT / 2][4];
        round_to_left(left, s);
        multiply<HS, MT, NT>(dv, left, do_tile(turn));
        round_to_left(left, dp);
        multiply<HS, MT, NT>(dk, left, q_tile(turn));
    }
    for_elements<MT, HS / 8>(dk, [=](float& x, int, int, int) { x *= scale; });
    for_elements<MT, HS / 8>(dv, [&](float& x, int, int, int) { x *= drop.scale; });
    floatX* to = dqkv + head.qkv + warp_k * stride;
    store_rows<HS, MT>(to + head.C, stride, T - warp_k, dk, k_tile.from_row(warp_row));
    store_rows<HS, MT>(to + 2 * head.C, stride, T - warp_k, dv, v_tile.from_row(warp_row));
}

#else

// --- fp32: the same mathematics, plain. 256 threads stand 16 x 16 before every product: thread (ty, tx) owns rows ty + 16i and
// columns tx + 16j. Tiles are square, rows in shared memory one float longer than they need be, against bank conflicts. One block per
// multiprocessor is asked for: left to itself, ptxas spills registers to fit more blocks than shared memory admits.

template <int HS>
struct ForwardShape {
    static constexpr int THREADS = 256, R = HS <= 64 ? 4 : 2, QUERIES = 16 * R, LD = HS + 1, P_LD = QUERIES + 1;
    static constexpr size_t SMEM = (size_t)(3 * LD + P_LD) * QUERIES * sizeof(float);
};
template <int HS>
struct BackwardShape : ForwardShape<HS> {
    static constexpr int ROWS = ForwardShape<HS>::QUERIES;
    static constexpr size_t SMEM = (size_t)(4 * ForwardShape<HS>::LD + 2 * ForwardShape<HS>::P_LD) * ROWS * sizeof(float);
};

// acc += A B over k < K, A (row, k) = a[row * a_row + k], B (k, col) = b[k * b_k + col * b_col].
template <int R, int N>
__device__ inline void multiply(float (&acc)[R][N], int K, const float* a, int a_row, const float* b, int b_k, int b_col) {
    a += threadIdx.x / 16 * a_row, b += threadIdx.x % 16 * b_col;
    for (int k = 0; k < K; k++) {
        float left[R], right[N];
        for (int i = 0; i < R; i++) left[i] = a[16 * i * a_row + k];
        for (int j = 0; j < N; j++) right[j] = b[k * b_k + 16 * j * b_col];
        for (int i = 0; i < R; i++)
            for (int j = 0; j < N; j++) acc[i][j] += left[i] * right[j];
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
__device__ inline void store_rows(float* to, size_t stride, int valid, const float (&acc)[R][HS / 16], float factor) {
    for (int i = 0; i < R; i++)
        for (int j = 0; j < HS / 16; j++) {
            int row = threadIdx.x / 16 + 16 * i;
            if (row < valid) to[row * stride + threadIdx.x % 16 + 16 * j] = acc[i][j] * factor;
        }
}

// Sum and maximum over the 16 threads that share their rows.
__device__ inline float row_sum(float x) {
    for (int d = 8; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
}
__device__ inline float row_max(float x) {
    for (int d = 8; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
    return x;
}

// Bit i R + j: the element of a tile of scores in this thread's row i and column j is kept; rows are queries or, with KEY_ROWS, keys.
template <bool KEY_ROWS, int R>
__device__ inline uint32_t draw(const HeadDropout& drop, int query, int key) {
    if (!drop.on) return ~0u;
    uint32_t kept = 0;
#pragma unroll 2
    for (int e = 0; e < R * R; e++) {
        int row = threadIdx.x / 16 + e / R * 16, col = threadIdx.x % 16 + e % R * 16;
        kept |= drop.keep(query + (KEY_ROWS ? col : row), key + (KEY_ROWS ? row : col)) << e;
    }
    return kept;
}

template <int HS>
__global__ void __launch_bounds__(ForwardShape<HS>::THREADS, 1)
attention_forward_kernel(float* out, float* lse, const float* qkv, int T, int NH, Dropout dropout) {
    using Shape = ForwardShape<HS>;
    constexpr int R = Shape::R, ROWS = Shape::QUERIES, LD = Shape::LD, P_LD = Shape::P_LD;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    float *q_tile = (float*)dynamic_smem, *k_tile = q_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD, *p_tile = v_tile + ROWS * LD;
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const float *q = qkv + head.qkv, *k = q + head.C, *v = k + head.C;
    size_t stride = head.stride;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16, q0 = (gridDim.y - 1 - blockIdx.y) * ROWS;  // the longest rows first
    float scale = rsqrtf((float)HS), scale2 = scale * LOG2E;
    float o[R][HS / 16] = {}, max[R], sum[R] = {};
    for (int i = 0; i < R; i++) max[i] = -INFINITY;
    load_rows<HS>(q_tile, q + q0 * stride, stride, T - q0);
    for (int k0 = 0; k0 <= q0; k0 += ROWS) {
        __syncthreads();
        load_rows<HS>(k_tile, k + k0 * stride, stride, T - k0);
        load_rows<HS>(v_tile, v + k0 * stride, stride, T - k0);
        __syncthreads();
        uint32_t kept = draw<false, R>(drop, q0, k0);
        float s[R][R] = {};
        multiply(s, HS, q_tile, LD, k_tile, 1, LD);
        for (int i = 0; i < R; i++) {
            int row = ty + 16 * i;
            float top = max[i];
            for (int j = 0; j < R; j++) {
                if (k0 + tx + 16 * j > q0 + row) s[i][j] = -INFINITY;
                top = fmaxf(top, s[i][j]);
            }
            top = row_max(top);  // finite: the first tile has a key for every query
            float shrink = exp2_approx((max[i] - top) * scale2);
            max[i] = top, sum[i] *= shrink;
            for (int j = 0; j < HS / 16; j++) o[i][j] *= shrink;
            for (int j = 0; j < R; j++) {
                float p = exp2_approx((s[i][j] - top) * scale2);
                sum[i] += p;
                p_tile[row * P_LD + tx + 16 * j] = kept >> (i * R + j) & 1 ? p : 0;
            }
        }
        __syncwarp();  // a row of P is written and read by the same half of a warp
        multiply(o, ROWS, p_tile, P_LD, v_tile, LD, 1);
    }
    for (int i = 0; i < R; i++) {
        float total = row_sum(sum[i]);
        int query = q0 + ty + 16 * i;
        if (tx == 0 && query < T) lse[head.index * T + query] = max[i] * scale + logf(total);
        for (int j = 0; j < HS / 16; j++) o[i][j] /= total;
    }
    store_rows<HS>(out + head.out + q0 * head.C, head.C, T - q0, o, drop.scale);
}

// dQ, and the row statistics (B*NH, stats_rows(T)) that the second kernel reads.
template <int HS>
__global__ void __launch_bounds__(ForwardShape<HS>::THREADS, 1)
attention_backward_query_kernel(float* dqkv, RowStats* stats, const float* dout, const float* out, const float* qkv, const float* lse,
                                int T, int NH, Dropout dropout) {
    using Shape = ForwardShape<HS>;
    constexpr int R = Shape::R, ROWS = Shape::QUERIES, LD = Shape::LD, P_LD = Shape::P_LD;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    float *q_tile = (float*)dynamic_smem, *k_tile = q_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD, *do_tile = v_tile + ROWS * LD;
    float* ds_tile = do_tile + ROWS * LD;
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const float *q = qkv + head.qkv, *k = q + head.C, *v = k + head.C, *d_o = dout + head.out;
    size_t stride = head.stride;
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16, q0 = (gridDim.y - 1 - blockIdx.y) * ROWS;
    float scale = rsqrtf((float)HS), scale2 = scale * LOG2E;
    float dq[R][HS / 16] = {};
    RowStats of_row[R];
    for (int i = 0; i < R; i++) {
        int query = q0 + ty + 16 * i;
        float d = 0;
        if (query < T)
            for (int c = tx; c < HS; c += 16) d += out[head.out + query * head.C + c] * d_o[query * head.C + c];
        of_row[i] = {query < T ? lse[head.index * T + query] * LOG2E : INFINITY, row_sum(d)};
        if (tx == 0) stats[head.index * stats_rows(T) + query] = of_row[i];
    }
    load_rows<HS>(q_tile, q + q0 * stride, stride, T - q0);
    load_rows<HS>(do_tile, d_o + q0 * head.C, head.C, T - q0);
    for (int k0 = 0; k0 <= q0; k0 += ROWS) {
        __syncthreads();
        load_rows<HS>(k_tile, k + k0 * stride, stride, T - k0);
        load_rows<HS>(v_tile, v + k0 * stride, stride, T - k0);
        __syncthreads();
        uint32_t kept = draw<false, R>(drop, q0, k0);
        float s[R][R] = {}, dp[R][R] = {};
        multiply(s, HS, q_tile, LD, k_tile, 1, LD);
        multiply(dp, HS, do_tile, LD, v_tile, 1, LD);
        for (int i = 0; i < R; i++)
            for (int j = 0; j < R; j++) {
                int query = q0 + ty + 16 * i, key = k0 + tx + 16 * j;
                float p = key <= query ? exp2_approx(s[i][j] * scale2 - of_row[i].lse2) : 0;
                float d = kept >> (i * R + j) & 1 ? dp[i][j] * drop.scale : 0;
                ds_tile[(ty + 16 * i) * P_LD + tx + 16 * j] = p * (d - of_row[i].d);
            }
        __syncwarp();
        multiply(dq, ROWS, ds_tile, P_LD, k_tile, LD, 1);
    }
    store_rows<HS>(dqkv + head.qkv + q0 * stride, stride, T - q0, dq, scale);
}

// dK and dV: a row of S is a key here.
template <int HS>
__global__ void __launch_bounds__(ForwardShape<HS>::THREADS, 1)
attention_backward_key_kernel(float* dqkv, const RowStats* stats, const float* dout, const float* qkv, int T, int NH, Dropout dropout) {
    using Shape = ForwardShape<HS>;
    constexpr int R = Shape::R, ROWS = Shape::QUERIES, LD = Shape::LD, P_LD = Shape::P_LD;
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    float *q_tile = (float*)dynamic_smem, *k_tile = q_tile + ROWS * LD, *v_tile = k_tile + ROWS * LD, *do_tile = v_tile + ROWS * LD;
    float *p_tile = do_tile + ROWS * LD, *ds_tile = p_tile + ROWS * P_LD;
    Head<HS> head(T, NH);
    HeadDropout drop(dropout, T, NH);
    const float *q = qkv + head.qkv, *k = q + head.C, *v = k + head.C, *d_o = dout + head.out;
    size_t stride = head.stride;
    stats += head.index * stats_rows(T);
    int ty = threadIdx.x / 16, tx = threadIdx.x % 16, k0 = blockIdx.y * ROWS;  // the keys that most queries see first
    float scale = rsqrtf((float)HS), scale2 = scale * LOG2E;
    float dk[R][HS / 16] = {}, dv[R][HS / 16] = {};
    load_rows<HS>(k_tile, k + k0 * stride, stride, T - k0);
    load_rows<HS>(v_tile, v + k0 * stride, stride, T - k0);
    for (int q0 = k0; q0 < T; q0 += ROWS) {
        __syncthreads();
        load_rows<HS>(q_tile, q + q0 * stride, stride, T - q0);
        load_rows<HS>(do_tile, d_o + q0 * head.C, head.C, T - q0);
        __syncthreads();
        uint32_t kept = draw<true, R>(drop, q0, k0);
        float s[R][R] = {}, dp[R][R] = {};
        multiply(s, HS, k_tile, LD, q_tile, 1, LD);
        multiply(dp, HS, v_tile, LD, do_tile, 1, LD);
        for (int i = 0; i < R; i++)
            for (int j = 0; j < R; j++) {
                int query = q0 + tx + 16 * j, key = k0 + ty + 16 * i, at = (ty + 16 * i) * P_LD + tx + 16 * j;
                bool keep = kept >> (i * R + j) & 1;
                float p = key <= query ? exp2_approx(s[i][j] * scale2 - stats[query].lse2) : 0;
                p_tile[at] = keep ? p : 0;
                ds_tile[at] = p * ((keep ? dp[i][j] * drop.scale : 0) - stats[query].d);
            }
        __syncwarp();
        multiply(dv, ROWS, p_tile, P_LD, do_tile, LD, 1);
        multiply(dk, ROWS, ds_tile, P_LD, q_tile, LD, 1);
    }
    float* to = dqkv + head.qkv + k0 * stride;
    store_rows<HS>(to + head.C, stride, T - k0, dk, scale);
    store_rows<HS>(to + 2 * head.C, stride, T - k0, dv, drop.scale);
}

#endif

template <class... P>
inline void allow_smem(void (*kernel)(P...), size_t bytes) {
    CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
}
// To be called once per device before the functions below, and not while a graph is captured: lets the kernels of this head size
// have the shared memory they need.
inline void attention_init(size_t hs) {
    with_head_size(hs, [](auto n) {
        constexpr int HS = decltype(n)::value;
        allow_smem(attention_forward_kernel<HS>, ForwardShape<HS>::SMEM);
        allow_smem(attention_backward_query_kernel<HS>, BackwardShape<HS>::SMEM);
        allow_smem(attention_backward_key_kernel<HS>, BackwardShape<HS>::SMEM);
    });
}

// out (B,T,C) and lse (B,NH,T) from qkv (B,T,3C).
inline void attention_forward(floatX* out, float* lse, const floatX* qkv, size_t B, size_t T, size_t C, size_t NH, const Dropout& drop,
                              cudaStream_t stream) {
    with_head_size(C / NH, [&](auto n) {
        constexpr int HS = decltype(n)::value;
        using Shape = ForwardShape<HS>;
        dim3 grid(B * NH, ceil_div(T, Shape::QUERIES));
        launch(attention_forward_kernel<HS>, grid, Shape::THREADS, Shape::SMEM, stream, out, lse, qkv, T, NH, drop);
    });
}

// Floats of scratch that attention_backward needs, 16-byte aligned.
inline size_t attention_backward_scratch(size_t B, size_t T, size_t, size_t NH) { return B * NH * stats_rows(T) * 2; }

// dqkv (B,T,3C) is written from dout (B,T,C) and what forward read and wrote.
inline void attention_backward(floatX* dqkv, float* scratch, const floatX* dout, const floatX* out, const floatX* qkv, const float* lse,
                               size_t B, size_t T, size_t C, size_t NH, const Dropout& drop, cudaStream_t stream) {
    with_head_size(C / NH, [&](auto n) {
        constexpr int HS = decltype(n)::value;
        using Shape = BackwardShape<HS>;
        dim3 grid(B * NH, ceil_div(T, Shape::ROWS));
        RowStats* stats = (RowStats*)scratch;
        launch(attention_backward_query_kernel<HS>, grid, Shape::THREADS, Shape::SMEM, stream, dqkv, stats, dout, out, qkv, lse, T, NH,
               drop);
        launch(attention_backward_key_kernel<HS>, grid, Shape::THREADS, Shape::SMEM, stream, dqkv, stats, dout, qkv, T, NH, drop);
    });
}

// ---------------------------------------------------------------------------------------------
// GELU and bias

// cpu::gelu_tanh and cpu::gelu_erf: GELU and its derivative. The sigmoid form of the one has no cancellation; the normal
// distribution function of the other is Abramowitz and Stegun 7.1.26, to 3e-7.
__device__ inline float gelu(float x, float* derivative, int activation) {
    if (activation == GELU_TANH) {
        float u2 = 1.59576912f * (x + 0.044715f * x * x * x), s = __fdividef(1.0f, 1.0f + exponential(-u2));
        *derivative = s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * x * x);
        return x * s;
    }
    float a = fabsf(x) * 0.70710678f, t = __fdividef(1.0f, 1.0f + 0.3275911f * a), e = exponential(-a * a);
    float tail = 0.5f * e * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    float cdf = x < 0 ? tail : 1.0f - tail;
    *derivative = cdf + x * 0.39894228f * e;
    return x * cdf;
}

__global__ void __launch_bounds__(256) gelu_forward_kernel(floatX* y, const floatX* x, size_t n, int activation) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Floats f = widen(load_once(x + i));
    float unused;
    for (int k = 0; k < VEC; k++) f[k] = gelu(f[k], &unused, activation);
    store(y + i, narrow(f));
}
// cpu::gelu_forward. y = gelu(x), n values, a multiple of 8; y may be x.
inline void gelu_forward(floatX* y, const floatX* x, size_t n, int activation, cudaStream_t s) {
    launch(gelu_forward_kernel, dim3((unsigned)ceil_div(n, 256 * VEC)), 256, 0, s, y, x, n, activation);
}

__global__ void __launch_bounds__(256) gelu_backward_kernel(floatX* d, const floatX* x, size_t n, int activation) {
    size_t i = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (i >= n) return;
    Floats f = widen(load_once(x + i)), g = widen(load_once(d + i));
    for (int k = 0; k < VEC; k++) {
        float derivative;
        gelu(f[k], &derivative, activation);
        g[k] *= derivative;
    }
    store(d + i, narrow(g));
}
// cpu::gelu_backward. d *= gelu'(x), n values, a multiple of 8.
inline void gelu_backward(floatX* d, const floatX* x, size_t n, int activation, cudaStream_t s) {
    launch(gelu_backward_kernel, dim3((unsigned)ceil_div(n, 256 * VEC)), 256, 0, s, d, x, n, activation);
}

// Rows blockIdx.y, blockIdx.y + gridDim.y, ...; each thread stays in its columns, and keeps their bias.
__global__ void __launch_bounds__(256) bias_gelu_forward_kernel(floatX* pre, floatX* out, const floatX* bias, size_t M, size_t N, int activation) {
    size_t c = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (c >= N) return;
    Floats b = widen(load(bias + c));
    for (size_t m = blockIdx.y; m < M; m += gridDim.y) {
        Floats f = widen(load_once(pre + m * N + c));
        for (int k = 0; k < VEC; k++) f[k] += b[k];
        Vec<floatX> rounded = narrow(f);
        store(pre + m * N + c, rounded);
        if (!out) continue;
        f = widen(rounded);  // what backward will differentiate at
        float unused;
        for (int k = 0; k < VEC; k++) f[k] = gelu(f[k], &unused, activation);
        store(out + m * N + c, narrow(f));
    }
}
// pre (M,N) += bias, N a multiple of 8; then out = gelu(pre), unless out is null.
inline void bias_gelu_forward(floatX* pre, floatX* out, const floatX* bias, size_t M, size_t N, int activation, cudaStream_t s) {
    unsigned threads = threads_for(N / VEC, 256);
    size_t strips = ceil_div(N / VEC, threads), rows = std::min(M, ceil_div((size_t)multiprocessors() * 32, strips));
    launch(bias_gelu_forward_kernel, dim3((unsigned)strips, (unsigned)rows), threads, 0, s, pre, out, bias, M, N, activation);
}

// Partial column sums: a block owns 32 vectors of columns and every gridDim.y-th group of rows; partials (gridDim.y, N).
constexpr int BIAS_WARPS = 8;
__global__ void __launch_bounds__(BIAS_WARPS* WARP) bias_backward_kernel(float* partials, const floatX* dY, size_t M, size_t N) {
    __shared__ __align__(16) float part[BIAS_WARPS * WARP * VEC];
    int warp = threadIdx.x / WARP;
    size_t c = ((size_t)blockIdx.x * WARP + threadIdx.x % WARP) * VEC;
    Floats sum = {};
    if (c < N)
#pragma unroll 4
        for (size_t m = (size_t)blockIdx.y * BIAS_WARPS + warp; m < M; m += (size_t)gridDim.y * BIAS_WARPS) {
            Floats d = widen(load(dY + m * N + c));
            for (int k = 0; k < VEC; k++) sum[k] += d[k];
        }
    for (int k = 0; k < VEC; k++) part[threadIdx.x * VEC + k] = sum[k];
    __syncthreads();
    if (warp != 0 || c >= N) return;
    for (int w = 1; w < BIAS_WARPS; w++)
        for (int k = 0; k < VEC; k++) sum[k] += part[(w * WARP + threadIdx.x) * VEC + k];
    store_floats(partials + blockIdx.y * N + c, sum);
}
inline size_t bias_backward_parts(size_t N) { return ceil_div((size_t)multiprocessors() * 4, ceil_div(N / VEC, WARP)); }
// Floats of scratch that bias_backward needs.
inline size_t bias_backward_scratch(size_t N) { return bias_backward_parts(N) * N; }

// cpu::bias_backward. db (N) += column sums of dY (M,N), N a multiple of 8.
inline void bias_backward(float* db, float* scratch, const floatX* dY, size_t M, size_t N, cudaStream_t s) {
    size_t parts = std::min(bias_backward_parts(N), ceil_div(M, BIAS_WARPS));
    launch(bias_backward_kernel, dim3((unsigned)ceil_div(N / VEC, WARP), (unsigned)parts), BIAS_WARPS * WARP, 0, s, scratch, dY, M, N);
    add_partials(db, nullptr, scratch, (int)parts, N, N, s);
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

// VEC logits from column v on; -infinity past the vocabulary.
__device__ inline Floats load_logits(const floatX* row, size_t v, size_t V) {
    Floats f = widen(load(row + v));
    if (v + VEC > V)
        for (int k = 0; k < VEC; k++)
            if (v + k >= V) f[k] = -INFINITY;
    return f;
}

// One block works on one row and reads it twice: for the maximum and the sum of exponentials together (Milakov and
// Gimelshein 2018), then backwards, from what the caches still hold, for the gradient.
__global__ void __launch_bounds__(512) cross_entropy_kernel(float* losses, floatX* logits, const int* targets, size_t V, size_t Vp, bool train,
                                                            const StepState* state) {
    floatX* row = logits + blockIdx.x * Vp;
    int target = targets[blockIdx.x];
    size_t stride = blockDim.x * VEC, rounds = (Vp + stride - 1) / stride;
    if (target < 0) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0;
        if (train)
            for (size_t v = threadIdx.x * VEC; v < Vp; v += stride) store(row + v, narrow(Floats{}));
        return;
    }
    float at_target = to_float(row[target]), max = -FLT_MAX, sum = 0;
    for (size_t v = threadIdx.x * VEC; v < V; v += stride) {
        Floats f = load_logits(row, v, V);
        float before = max;
        for (int k = 0; k < VEC; k++) max = fmaxf(max, f[k]);
        sum *= exponential(before - max);
        for (int k = 0; k < VEC; k++) sum += exponential(f[k] - max);
    }
    float row_max = block_max(max);
    sum = block_sum(sum * exponential(max - row_max));
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) - (at_target - row_max);
    if (!train) return;
    float scale = state->grad_scale, factor = scale / sum;
    for (size_t r = rounds; r-- > 0;) {
        size_t v = r * stride + threadIdx.x * VEC;
        if (v >= Vp) continue;
        Floats f = load_logits(row, v, V);
        for (int k = 0; k < VEC; k++) f[k] = exponential(f[k] - row_max) * factor - (v + k == (size_t)target ? scale : 0.0f);
        store(row + v, narrow(f));
    }
}
// cpu::cross_entropy. logits (rows, Vp), Vp a multiple of 8: losses = -log p[target], 0 where target < 0. With train the
// logits become their gradient, (p - onehot) * state->grad_scale, and columns V..Vp become 0; without, state may be null.
inline void cross_entropy(float* losses, floatX* logits, const int* targets, size_t rows, size_t V, size_t Vp, bool train, const StepState* state,
                          cudaStream_t s) {
    launch(cross_entropy_kernel, dim3((unsigned)rows), threads_for(Vp / VEC, 512), 0, s, losses, logits, targets, V, Vp, train, state);
}

// One block: the sum has one order.
__global__ void __launch_bounds__(1024) sum_losses_kernel(double* loss_sum, unsigned long long* counted, const float* losses, const int* targets,
                                                          size_t M, const StepState* state) {
    double sums[2] = {0, 0};
#pragma unroll 4
    for (size_t m = threadIdx.x; m < M; m += blockDim.x) sums[0] += losses[m], sums[1] += targets[m] >= 0;
    group_sum(sums, blockDim.x / WARP);
    if (threadIdx.x != 0) return;
    *loss_sum += state ? sums[0] * state->grad_scale : sums[0];
    if (counted) *counted += (unsigned long long)sums[1];
}
// *loss_sum += the sum of losses (M), in training (state not null) times grad_scale; *counted, which may be null, += the
// number of targets >= 0.
inline void sum_losses(double* loss_sum, unsigned long long* counted, const float* losses, const int* targets, size_t M, const StepState* state,
                       cudaStream_t s) {
    launch(sum_losses_kernel, 1, 1024, 0, s, loss_sum, counted, losses, targets, M, state);
}

// ---------------------------------------------------------------------------------------------
// AdamW

// Rounds to bf16, up or down at random so that the mean is x: 16 random bits are added below the last place that is kept,
// and what is below is cut off. bits: the draw of this element.
__device__ inline __nv_bfloat16 round_stochastic(float x, uint32_t bits) {
    if (x != x) return __float2bfloat16_rn(x);
    __nv_bfloat16_raw r;
    r.x = (unsigned short)((__float_as_uint(x) + (bits & 0xffff)) >> 16);
    return r;
}
// Writes VEC parameters, from element e of all on. bf16: element e takes 16 bits of Philox block e / 8.
__device__ inline void store_parameters(floatX* params, size_t e, const Floats& w, const rng::Key& key) {
    if constexpr (BUILD_DTYPE == BF16) {
        rng::Block r = key.block(e / 8);
        Vec<floatX> x;
        for (int k = 0; k < VEC; k++) x[k] = round_stochastic(w[k], r.w[k / 2] >> (k % 2 * 16));
        store_once(params + e, x);
    } else {
        store_once(params + e, narrow(w));
    }
}

// Pass 1: the sum of squares of this block's share of the gradients, in doubles as in cpu::GPT2::grad_norm.
constexpr int ADAMW_THREADS = 256;
__global__ void __launch_bounds__(ADAMW_THREADS) grad_norm_kernel(double* partials, const float* grads, size_t n) {
    double sum[1] = {0};
#pragma unroll 4
    for (size_t e = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * 4; e < n; e += (size_t)gridDim.x * blockDim.x * 4) {
        Vec<float> g = load_once(grads + e);
        for (int k = 0; k < 4; k++) sum[0] += (double)g[k] * g[k];
    }
    group_sum(sum, blockDim.x / WARP);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum[0];
}

// One step's settings, and which tensors decay: tensor i ends before element end[i], bit i of decays.
struct AdamWStep {
    AdamW a;
    float c1, c2;  // bias corrections 1 / (1 - beta^t)
    uint32_t t;
    uint64_t seed;
    uint32_t decays;
    size_t end[NUM_PARAMS];
};

// Pass 2. Each block sums pass 1's parts by itself, in the same order.
__global__ void __launch_bounds__(ADAMW_THREADS) adamw_kernel(StepResult* report, floatX* params, float* master, const float* grads, float* moment1,
                                                              float* moment2, const double* partials, int parts, const double* loss, AdamWStep step) {
    double sum[1] = {0};
    for (int i = threadIdx.x; i < parts; i += blockDim.x) sum[0] += partials[i];
    group_sum(sum, blockDim.x / WARP);
    double norm = sqrt(sum[0]);
    if (blockIdx.x == 0 && threadIdx.x == 0) report->loss = *loss, report->norm = norm;
    if (!(norm <= DBL_MAX && fabs(*loss) <= DBL_MAX)) return;  // NaN is not <= anything

    const AdamW& a = step.a;
    float scale = a.grad_clip > 0 && norm > a.grad_clip ? (float)(a.grad_clip / norm) : 1.0f;
    rng::Key key(step.seed, step.t, rng::ROUNDING);
    int tensor = 0;
    for (size_t e = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC; e < step.end[NUM_PARAMS - 1]; e += (size_t)gridDim.x * blockDim.x * VEC) {
        while (e >= step.end[tensor]) tensor++;
        float shrink = 1.0f - (step.decays >> tensor & 1 ? a.lr * a.weight_decay : 0.0f);
        Floats g = load_floats(grads + e), m = load_floats(moment1 + e), v = load_floats(moment2 + e);
        Floats w = master ? load_floats(master + e) : widen(load_once(params + e));
        for (int k = 0; k < VEC; k++) {
            float gk = g[k] * scale;
            m[k] = a.beta1 * m[k] + (1 - a.beta1) * gk;
            v[k] = a.beta2 * v[k] + (1 - a.beta2) * gk * gk;
            w[k] = w[k] * shrink - a.lr * (m[k] * step.c1) / (sqrtf(v[k] * step.c2) + a.eps);
        }
        store_floats(moment1 + e, m), store_floats(moment2 + e, v);
        if (master) store_floats(master + e, w);
        store_parameters(params, e, w, key);
    }
}

inline int grad_norm_blocks() { return 8 * multiprocessors(); }
// Doubles of scratch that adamw_step needs.
inline size_t adamw_scratch() { return grad_norm_blocks(); }

// cpu::GPT2::step. One step of AdamW (Loshchilov and Hutter 2019), number t from 1, on all parameters of a model with this
// config: gradients longer than grad_clip count as that long; weight decay where param_table says so. params, master, grads,
// moment1 and moment2 are arrays of all parameters; master is null without master weights, and in fp32. bf16 parameters are
// rounded stochastically, keyed by seed and t. The gradients stay as they are. *report receives *loss and the gradient's norm
// before clipping; where either is not finite, nothing else changes.
inline void adamw_step(StepResult* report, floatX* params, float* master, const float* grads, float* moment1, float* moment2, double* scratch,
                       const double* loss, const Config& c, const AdamW& a, uint32_t t, uint64_t seed, cudaStream_t s) {
    ParamTable table = param_table(c);
    auto off = param_offsets(c);
    AdamWStep step = {a, (float)(1 / (1 - std::pow((double)a.beta1, t))), (float)(1 / (1 - std::pow((double)a.beta2, t))), t, seed, 0, {}};
    for (int i = 0; i < NUM_PARAMS; i++) step.end[i] = off[i + 1], step.decays |= (uint32_t)table[i].decay << i;
    size_t n = off[NUM_PARAMS];
    int parts = (int)std::min<size_t>(grad_norm_blocks(), ceil_div(n, ADAMW_THREADS * 4));
    launch(grad_norm_kernel, dim3((unsigned)parts), ADAMW_THREADS, 0, s, scratch, grads, n);
    size_t blocks = std::min<size_t>(4 * multiprocessors(), ceil_div(n, ADAMW_THREADS * VEC));
    launch(adamw_kernel, dim3((unsigned)blocks), ADAMW_THREADS, 0, s, report, params, master, grads, moment1, moment2, scratch, parts, loss, step);
}

__global__ void __launch_bounds__(ADAMW_THREADS) round_parameters_kernel(floatX* params, const float* master, size_t n, rng::Key key) {
    for (size_t e = ((size_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC; e < n; e += (size_t)gridDim.x * blockDim.x * VEC)
        store_parameters(params, e, load_floats(master + e), key);
}
// params = what step number t wrote from the master weights, n in all: a resumed run continues bit for bit.
inline void round_parameters(floatX* params, const float* master, size_t n, uint64_t seed, uint32_t t, cudaStream_t s) {
    size_t blocks = std::min<size_t>(8 * multiprocessors(), ceil_div(n, ADAMW_THREADS * VEC));
    launch(round_parameters_kernel, dim3((unsigned)blocks), ADAMW_THREADS, 0, s, params, master, n, rng::Key(seed, t, rng::ROUNDING));
}

// ---------------------------------------------------------------------------------------------
// Matrix products by cuBLASLt

// @@SECTION matmul: M

// ---------------------------------------------------------------------------------------------
// The model

// @@SECTION model: M

// ---------------------------------------------------------------------------------------------
// Generation: keys and values of past tokens are kept, so that a new token costs the same each time

// @@SECTION decoder: M

}  // namespace gpu

#ifndef ARAPOET_NO_MAIN
#include "trainer.h"
int main(int argc, char** argv) { return train<gpu::GPT2, gpu::Decoder>(argc, argv); }
#endif
#endif  // TRAIN_GPT2_CU
