// test_architectures.cu - the emulated device's limits, by architecture. Part of test_emulator.
#include <doctest/doctest.h>

#include "dev/test_util.h"

namespace {

// Restores the emulator's options at the end, and prints no reports.
struct Options {
    emu::Options before = emu::options();
    emu::Options* operator->() { return &emu::options(); }
    Options() { emu::options().quiet = true; }
    ~Options() { emu::clear_error(), emu::options() = before; }
};

__global__ void empty_kernel() {}

cudaError_t launch_with(size_t smem) {
    cudaLaunchConfig_t c = {};
    c.gridDim = 1, c.blockDim = 32, c.dynamicSmemBytes = smem;
    return cudaLaunchKernelEx(&c, empty_kernel);
}
cudaError_t allow(size_t smem) {
    return cudaFuncSetAttribute((const void*)empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                (int)smem);
}
int attribute(cudaDeviceAttr a) {
    int value = 0;
    CHECK(cudaDeviceGetAttribute(&value, a, 0) == cudaSuccess);
    return value;
}
int blocks_of(int threads, size_t smem) {
    int n = 0;
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, (const void*)empty_kernel, threads, smem) ==
          cudaSuccess);
    return n;
}

TEST_CASE("architectures: each has its compute capability and CUDA's limits, also at launches") {
    // The limits of blocks are those of NVIDIA's CUDA C++ Programming Guide.
    struct {
        int number, major, minor, shared_kib, threads, blocks;
    } known[] = {{80, 8, 0, 163, 2048, 32}, {86, 8, 6, 99, 1536, 16},    {89, 8, 9, 99, 1536, 24},
                 {90, 9, 0, 227, 2048, 32}, {100, 10, 0, 227, 2048, 32}, {120, 12, 0, 99, 1536, 24}};
    for (auto& k : known) {
        Options options;
        options->architecture = k.number;
        CAPTURE(k.number);
        const size_t most = (size_t)k.shared_kib << 10;
        cudaDeviceProp p;
        REQUIRE(cudaGetDeviceProperties(&p, 0) == cudaSuccess);
        CHECK(p.major == k.major);
        CHECK(p.minor == k.minor);
        CHECK(p.sharedMemPerBlockOptin == most);
        CHECK(p.sharedMemPerMultiprocessor == most + 1024);
        CHECK(p.maxThreadsPerMultiProcessor == k.threads);
        CHECK(p.maxBlocksPerMultiProcessor == k.blocks);
        CHECK(attribute(cudaDevAttrComputeCapabilityMajor) == k.major);
        CHECK(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) == (int)most);
        CHECK(attribute(cudaDevAttrMaxThreadsPerMultiProcessor) == k.threads);
        CHECK(allow(most + 1) == cudaErrorInvalidValue);
        CHECK(allow(most) == cudaSuccess);
        CHECK(launch_with(most) == cudaSuccess);
        CHECK(launch_with(most + 1) == cudaErrorInvalidValue);
        CHECK(blocks_of(32, 0) == k.blocks);
        CHECK(blocks_of(512, 0) == k.threads / 512);
        CHECK(blocks_of(32, most) == 1);
        (void)cudaGetLastError();
    }
}

TEST_CASE("architectures: what one allowed is refused on one that has less") {
    Options options;
    CHECK(allow(200 << 10) == cudaSuccess);
    options->architecture = 86;
    CHECK(launch_with(200 << 10) == cudaErrorInvalidValue);
    CHECK(launch_with(99 << 10) == cudaSuccess);
    (void)cudaGetLastError();
}

TEST_CASE("architectures: an unknown one is an error that names those that are known") {
    Options options;
    options->architecture = 77;
    int value;
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 0) == cudaErrorInvalidValue);
    CHECK(emu::last_report() == "the architecture (EMU_ARCH) is 77, known are 80, 86, 89, 90, 100, 120");
    (void)cudaGetLastError();
    options->architecture = 90;
    FILE* p = popen(("EMU_ARCH=77 '" + std::filesystem::read_symlink("/proc/self/exe").string() +
                     "' --test-case='*what one allowed*' 2>&1")
                        .c_str(),
                    "r");
    REQUIRE(p);
    char text[1000] = {};
    CHECK(fread(text, 1, sizeof text - 1, p) > 0);
    CHECK(WEXITSTATUS(pclose(p)) == 2);
    CHECK_MESSAGE(contains(text, emu::unknown_architecture(77)), text);
}

}  // namespace
