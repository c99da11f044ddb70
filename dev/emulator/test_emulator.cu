// test_emulator.cu - the emulator's own tests: right kernels give right results under every schedule, and each kind of
// wrong kernel is reported.
#include <doctest/doctest.h>

#include <vector>

#include "dev/test_util.h"

namespace {

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, A&&... args) {
    cudaLaunchConfig_t c = {};
    c.gridDim = grid, c.blockDim = block, c.dynamicSmemBytes = smem, c.stream = stream;
    return cudaLaunchKernelEx(&c, kernel, std::forward<A>(args)...);
}

__global__ void block_sum(float* out, const float* in) {
    __shared__ float partial[32];
    float v = in[blockIdx.x * blockDim.x + threadIdx.x];
    for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x < 32) {
        v = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
        for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
        if (threadIdx.x == 0) out[blockIdx.x] = v;
    }
}

__global__ void write_past(float* out, int n) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i <= n) out[i] = 1;
}

TEST_CASE("sums") {
    float *in, *out;
    cudaMalloc((void**)&in, 4096 * 4), cudaMalloc(&out, 16);
    std::vector<float> x(4096, 1.0f);
    cudaMemcpy(in, x.data(), 4096 * 4, cudaMemcpyHostToDevice);
    CHECK(launch(block_sum, 4, 1024, 0, nullptr, out, in) == cudaSuccess);
    cudaMemcpy(x.data(), out, 16, cudaMemcpyDeviceToHost);
    for (int i = 0; i < 4; i++) CHECK(x[i] == 1024);
    CHECK(launch(write_past, 17, 256, 0, nullptr, in, 4096) == cudaErrorIllegalAddress);
    printf("%s\n", cudaGetErrorString(cudaGetLastError()));
    emu::clear_error();
    cudaMemset(in, 0, 4096 * 4);
    CHECK(launch(block_sum, 4, 1024, 0, nullptr, out, in) == cudaSuccess);
    cudaMemcpy(x.data(), out, 16, cudaMemcpyDeviceToHost);
    for (int i = 0; i < 4; i++) CHECK(x[i] == 0);
}

}  // namespace
