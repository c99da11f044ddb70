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

// @@SECTION common: K

// ---------------------------------------------------------------------------------------------
// Tensor-core and copy instructions, each with its body for the emulator

// @@SECTION ptx: A

// ---------------------------------------------------------------------------------------------
// Embedding

// @@SECTION embedding: K

// ---------------------------------------------------------------------------------------------
// LayerNorm and residual

// @@SECTION layernorm: K

// ---------------------------------------------------------------------------------------------
// Attention

// @@SECTION attention: A

// ---------------------------------------------------------------------------------------------
// GELU and bias

// @@SECTION gelu: K

// ---------------------------------------------------------------------------------------------
// Softmax cross-entropy

// @@SECTION head: K

// ---------------------------------------------------------------------------------------------
// AdamW

// @@SECTION adamw: K

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
