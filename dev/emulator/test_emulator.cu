// test_emulator.cu - tests of the emulator: correct kernels give correct results under every schedule, and
// each kind of wrong code is reported or gives wrong numbers.
//
// Cases named "child: ..." end the process or cause a sanitizer's report. Each runs in a child process, which
// the case that expects its output starts.
#include <cooperative_groups.h>
#include <cublasLt.h>
#include <doctest/doctest.h>

#include <chrono>
#include <random>
#include <thread>

#include "dev/test_util.h"

#if defined(__SANITIZE_ADDRESS__)
constexpr bool ASAN = true, TSAN = false;
#elif defined(__SANITIZE_THREAD__)
constexpr bool ASAN = false, TSAN = true;
#else
constexpr bool ASAN = false, TSAN = false;
#endif

// These two are outside the unnamed namespace, in which dynamic_smem would be another, undefined variable.

// out[block * rounds + round] = the sum of blockDim.x inputs, computed with shuffles and with static and
// dynamic shared memory.
__global__ void block_sums(float* out, const float* in, int rounds) {
    __shared__ float partial[32];
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    float* copy = (float*)dynamic_smem;
    const unsigned t = threadIdx.x, warps = blockDim.x / 32;
    for (int round = 0; round < rounds; round++) {
        copy[t] = in[(blockIdx.x * (unsigned)rounds + (unsigned)round) * blockDim.x + t];
        __syncthreads();
        float v = copy[blockDim.x - 1 - t];
        for (int o = 16; o; o /= 2) v += __shfl_xor_sync(0xffffffffu, v, o);
        if (t % 32 == 0) partial[t / 32] = v;
        __syncthreads();
        v = 0;
        for (unsigned w = 0; w < warps; w++) v += partial[w];
        if (t == 0) out[blockIdx.x * (unsigned)rounds + (unsigned)round] = v;
        __syncthreads();
    }
}
__global__ void write_dynamic(float* out, int index) {
    extern __shared__ __align__(128) unsigned char dynamic_smem[];
    float* s = (float*)dynamic_smem;
    if (threadIdx.x == 0) s[index] = 1;
    __syncthreads();
    out[threadIdx.x] = s[index];
}

namespace {

using Floats = std::vector<float>;
using bf16 = __nv_bfloat16;

// Makes the emulator quiet and lets a test change its options. Restores the options and clears the error at
// the end of the scope.
struct Options {
    emu::Options before = emu::options();
    emu::Options* operator->() { return &emu::options(); }
    Options() { emu::options().quiet = true; }
    ~Options() {
        emu::clear_error();
        cudaDeviceSynchronize();
        emu::options() = before;
    }
};

// n values in device memory, uninitialised or copied from the host.
template <class T>
struct Device {
    T* p = nullptr;
    size_t n;
    explicit Device(size_t n) : n(n) { REQUIRE(cudaMalloc(&p, n * sizeof(T)) == cudaSuccess); }
    explicit Device(const std::vector<T>& x) : Device(x.size()) {
        REQUIRE(cudaMemcpy(p, x.data(), n * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
    }
    Device(const Device&) = delete;
    ~Device() { emu::clear_error(), cudaFree(p); }
    operator T*() const { return p; }
    std::vector<T> get() const {
        std::vector<T> x(n);
        CHECK(cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
        return x;
    }
};

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
                   A&&... args) {
    cudaLaunchConfig_t c = {};
    c.gridDim = grid, c.blockDim = block, c.dynamicSmemBytes = smem, c.stream = stream;
    return cudaLaunchKernelEx(&c, kernel, std::forward<A>(args)...);
}

// Runs f under each schedule.
template <class F>
void all_schedules(F f) {
    Options options;
    for (emu::Schedule s : {emu::ASCENDING, emu::DESCENDING, emu::RANDOM}) {
        options->schedule = s;
        CAPTURE(s);
        f();
    }
}

// Runs the test case `name` in a child process and returns what it prints.
std::string run_child(const std::string& name) {
    char self[4096] = {};
    REQUIRE(readlink("/proc/self/exe", self, sizeof self - 1) > 0);
    FILE* p = popen(strf("'%s' --no-skip --test-case='%s' 2>&1", self, name.c_str()).c_str(), "r");
    REQUIRE(p);
    std::string text;
    char line[4096];
    while (fgets(line, sizeof line, p)) text += line;
    pclose(p);
    return text;
}
#define CHECK_CONTAINS(text, part) CHECK_MESSAGE(contains(text, part), "looked for: ", part, "; got: ", text)
#define CHILD_CASE(name) TEST_CASE("child: " name* doctest::skip())

Floats random_floats(size_t n, unsigned seed) {
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    Floats x(n);
    for (float& v : x) v = normal(engine);
    return x;
}
std::vector<bf16> to_bf16(const Floats& x) {
    std::vector<bf16> y(x.size());
    for (size_t i = 0; i < x.size(); i++) y[i] = __float2bfloat16_rn(x[i]);
    return y;
}
float number(float x) { return x; }
float number(bf16 x) { return __bfloat162float(x); }

// ---------------------------------------------------------------------------------------------
// Threads, barriers, warps

TEST_CASE("sums through shuffles and shared memory have the same bits under every schedule") {
    const Floats x = random_floats(5 * 3 * 256, 1);
    Device<float> in(x), out(15);
    Floats first;
    all_schedules([&] {
        cudaMemset(out, 0xff, 60);
        REQUIRE(launch(block_sums, 5, 256, 1024, nullptr, out, in, 3) == cudaSuccess);
        Floats got = out.get();
        if (first.empty()) first = got;
        CHECK(got == first);
    });
    for (size_t b = 0; b < 15; b++) {
        double sum = 0;
        for (size_t i = 0; i < 256; i++) sum += x[b * 256 + i];
        CHECK(first[b] == doctest::Approx(sum).epsilon(1e-5));
    }
}

__global__ void where_am_i(unsigned* out) {
    unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    out[b * blockDim.x * blockDim.y * blockDim.z + t] = b * 1000 + t;
}
TEST_CASE("each thread of each block runs once, in three dimensions") {
    all_schedules([&] {
        Device<unsigned> out(2 * 3 * 4 * 5 * 3 * 2);
        REQUIRE(launch(where_am_i, dim3(2, 3, 4), dim3(5, 3, 2), 0, nullptr, out) == cudaSuccess);
        std::vector<unsigned> got = out.get();
        for (unsigned i = 0; i < got.size(); i++) CHECK(got[i] == i / 30 * 1000 + i % 30);
    });
}

struct Collectives {
    int index, up, down, segment, segment_up, segment_down, segment_index, add, lowest, highest, any, all;
    unsigned ballot;
    double wide;
    int count, all_of_block, any_of_block;
};
__global__ void collectives(Collectives* out) {
    const int lane = (int)threadIdx.x;
    const unsigned all = 0xffffffffu;
    Collectives c;
    c.index = __shfl_sync(all, lane, 5);
    c.up = __shfl_up_sync(all, lane, 3);
    c.down = __shfl_down_sync(all, lane, 3);
    c.segment = __shfl_xor_sync(all, lane, 3, 8);
    c.segment_up = __shfl_up_sync(all, lane, 3, 8);
    c.segment_down = __shfl_down_sync(all, lane, 3, 8);
    c.segment_index = __shfl_sync(all, lane, 10, 8);
    c.add = __reduce_add_sync(all, lane);
    c.lowest = __reduce_min_sync(all, lane - 7);
    c.highest = __reduce_max_sync(all, lane - 7);
    c.any = __any_sync(all, lane == 9);
    c.all = __all_sync(all, lane != 9);
    c.ballot = __ballot_sync(all, lane % 3 == 0);
    c.wide = __shfl_sync(all, lane * 1e300, lane ^ 1);
    if (lane < 8) c.segment += __shfl_sync(0xffu, lane, 7);  // some of the lanes
    c.count = __syncthreads_count(lane < 5);
    c.all_of_block = __syncthreads_and(lane < 5);
    c.any_of_block = __syncthreads_or(lane < 5);
    out[lane] = c;
}
TEST_CASE("warp collectives and block votes give the results that CUDA's guide defines") {
    all_schedules([&] {
        Device<Collectives> out(32);
        REQUIRE(launch(collectives, 1, 32, 0, nullptr, out) == cudaSuccess);
        std::vector<Collectives> got = out.get();
        for (int lane = 0; lane < 32; lane++) {
            const Collectives& c = got[(size_t)lane];
            CHECK(c.index == 5);
            CHECK(c.up == (lane < 3 ? lane : lane - 3));
            CHECK(c.down == (lane > 28 ? lane : lane + 3));
            CHECK(c.segment == (lane ^ 3) + (lane < 8 ? 7 : 0));
            CHECK(c.segment_up == (lane % 8 < 3 ? lane : lane - 3));
            CHECK(c.segment_down == (lane % 8 > 4 ? lane : lane + 3));
            CHECK(c.segment_index == lane / 8 * 8 + 2);
            CHECK(c.add == 496);
            CHECK(c.lowest == -7);
            CHECK(c.highest == 24);
            CHECK(c.any == 1);
            CHECK(c.all == 0);
            CHECK(c.ballot == 0x49249249u);
            CHECK(c.wide == (lane ^ 1) * 1e300);
            CHECK(c.count == 5);
            CHECK(c.all_of_block == 0);
            CHECK(c.any_of_block == 1);
        }
    });
}

// Records the order in which threads run: at the start, after a barrier, after a collective of one warp.
__global__ void order_of_threads(int* place, int* order) {
    const int n = (int)blockDim.x;
    order[atomicAdd(&place[0], 1)] = (int)threadIdx.x;
    __syncthreads();
    order[n + atomicAdd(&place[1], 1)] = (int)threadIdx.x;
    __syncwarp();
    if (threadIdx.x < 32) order[2 * n + atomicAdd(&place[2], 1)] = (int)threadIdx.x;
}
TEST_CASE("ascending, descending and random schedules order threads, also after barriers") {
    const int n = 100;
    auto order = [&](emu::Schedule schedule, unsigned seed) {
        emu::options().schedule = schedule, emu::options().seed = seed;
        Device<int> place(std::vector<int>(3, 0)), order(2 * n + 32);
        REQUIRE(launch(order_of_threads, 1, n, 0, nullptr, place, order) == cudaSuccess);
        return order.get();
    };
    Options options;
    const std::vector<int> ascending = order(emu::ASCENDING, 1), descending = order(emu::DESCENDING, 1);
    const std::vector<int> random = order(emu::RANDOM, 1);
    for (int i = 0; i < n; i++) {
        CHECK(ascending[(size_t)i] == i);
        CHECK(descending[(size_t)i] == n - 1 - i);
        CHECK(descending[(size_t)(n + i)] == n - 1 - i);
    }
    for (int i = 0; i < 32; i++) CHECK(descending[(size_t)(2 * n + i)] == 31 - i);
    CHECK(random == order(emu::RANDOM, 1));
    CHECK(random != order(emu::RANDOM, 2));
    CHECK(random != ascending);
    for (int part = 0; part < 2; part++) {
        std::vector<int> sorted(&random[(size_t)(part * n)], &random[(size_t)(part * n)] + n);
        std::sort(sorted.begin(), sorted.end());
        CHECK(sorted == std::vector<int>(ascending.begin(), ascending.begin() + n));
    }
}

// Threads from 20 on return early; barriers and collectives continue with the others.
__global__ void early_return(int* out) {
    if (threadIdx.x >= 20) return;
    __syncthreads();
    out[threadIdx.x] = __reduce_add_sync(0xffffffffu, 1);
}
TEST_CASE("barriers and collectives do not wait for threads that have returned") {
    all_schedules([&] {
        Device<int> out(20);
        REQUIRE(launch(early_return, 1, 64, 0, nullptr, out) == cudaSuccess);
        CHECK(out.get() == std::vector<int>(20, 20));
    });
}

// The last block to finish sums what all blocks have written.
__global__ void last_block_sums(float* partial, unsigned* finished, float* out) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = (float)blockIdx.x;
        __threadfence();
        last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x) return;
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += partial[i];
    *out = sum;
}
__global__ void many_atomics(int* add, int* highest, float* sum, unsigned long long* cas) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    atomicAdd(add, i), atomicMax(highest, i), atomicAdd(sum, 0.5);
    unsigned long long seen = atomicAdd(cas, 0), before;
    do before = seen, seen = atomicCAS(cas, before, before + 2);
    while (seen != before);
}
TEST_CASE("atomic operations are exact, and find the last block that finishes") {
    all_schedules([&] {
        Device<float> partial(50), out(1), sum(Floats{0});
        Device<unsigned> finished(std::vector<unsigned>{0});
        for (int i = 0; i < 2; i++) {  // twice, because atomicInc must wrap to 0
            REQUIRE(launch(last_block_sums, 50, 64, 0, nullptr, partial, finished, out) == cudaSuccess);
            CHECK(out.get()[0] == 1225);
        }
        Device<int> add(std::vector<int>{0}), highest(std::vector<int>{0});
        Device<unsigned long long> cas(std::vector<unsigned long long>{0});
        REQUIRE(launch(many_atomics, 20, 50, 0, nullptr, add, highest, sum, cas) == cudaSuccess);
        CHECK(add.get()[0] == 499500);
        CHECK(highest.get()[0] == 999);
        CHECK(sum.get()[0] == 500);
        CHECK(cas.get()[0] == 2000);
    });
}

__global__ void groups(float* out, const float* in) {
    namespace cg = cooperative_groups;
    cg::thread_block block = cg::this_thread_block();
    auto tile = cg::tiled_partition<16>(block);
    float v = cg::reduce(tile, in[block.thread_rank()], cg::greater<float>());
    block.sync();
    if (tile.thread_rank() == 0) out[tile.meta_group_rank()] = v;
}
TEST_CASE("cooperative groups: reductions over tiles of a warp are correct") {
    all_schedules([&] {
        Floats x(64);
        for (size_t i = 0; i < 64; i++) x[i] = (float)(i * 37 % 64);
        Device<float> in(x), out(4);
        REQUIRE(launch(groups, 1, 64, 0, nullptr, out, in) == cudaSuccess);
        for (size_t g = 0; g < 4; g++) CHECK(out.get()[g] == *std::max_element(&x[g * 16], &x[g * 16] + 16));
    });
}

__global__ void bits_and_maths(unsigned* u, float* f) {
    u[0] = __umulhi(0xffffffffu, 0xfffffffeu), u[1] = __brev(0x80000001u | 2u), u[2] = (unsigned)__clz(1),
    u[3] = (unsigned)__clz(0);
    u[4] = (unsigned)__popc(0xf0f0u), u[5] = (unsigned)__ffs(8),
    u[6] = __byte_perm(0x33221100u, 0x77665544u, 0x6240u);
    u[7] = __float_as_uint(1.0f), u[8] = __funnelshift_l(0x80000000u, 1, 1), u[9] = (unsigned)max(3, 4u);
    f[0] = rsqrtf(4), f[1] = __fdividef(1, 4), f[2] = min(2.5f, 7), f[3] = __uint_as_float(0x40490fdbu);
    f[4] = max(NAN, 1.0f), f[5] = __ldg(f), f[6] = __frcp_rn(8);
    __stcs(f + 7, 3.0f);
    float4* wide = (float4*)(f + 8);
    __stcs(wide, make_float4(1, 2, 3, 4));
    f[12] = __ldcs(wide).w;
}
TEST_CASE("intrinsics for bits, mathematics and cache hints give CUDA's results") {
    Device<unsigned> u(10);
    Device<float> f(13);
    REQUIRE(launch(bits_and_maths, 1, 1, 0, nullptr, u, f) == cudaSuccess);
    CHECK(u.get() ==
          std::vector<unsigned>{0xfffffffdu, 0xc0000001u, 31, 32, 8, 4, 0x66224400u, 0x3f800000u, 3, 4});
    CHECK(f.get() == Floats{0.5f, 0.25f, 2.5f, 3.14159274f, 1, 0.5f, 0.125f, 3, 1, 2, 3, 4, 4});
}

// ---------------------------------------------------------------------------------------------
// Tensor cores and asynchronous copies

// One warp computes C (16,16) = A (16,16) B (16,16) + C, row-major. B is loaded with ldmatrix.trans, or is
// transposed in shared memory and loaded with plain ldmatrix; both halves at once (x4) or in pairs (x2).
__global__ void tensor_product(float* C, const bf16* A, const bf16* B, bool transposed, bool pairs) {
    __shared__ __align__(16) bf16 a_tile[16][24], b_tile[16][24];
    const int lane = (int)threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
        a_tile[i / 16][i % 16] = A[i];
        if (transposed) b_tile[i % 16][i / 16] = B[i];
        else b_tile[i / 16][i % 16] = B[i];
    }
    __syncwarp();
    uint32_t a[4], b[2][2];
    emu::ldmatrix_x4(a, &a_tile[lane % 16][lane / 16 * 8], false);
    if (pairs) {
        for (int half = 0; half < 2; half++) {
            const bf16* row =
                transposed ? &b_tile[half * 8 + lane % 8][lane / 8 % 2 * 8] : &b_tile[lane % 16][half * 8];
            emu::ldmatrix_x2(b[half], row, !transposed);
        }
    } else {
        uint32_t r[4];
        emu::ldmatrix_x4(r,
                         transposed ? &b_tile[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]
                                    : &b_tile[lane % 16][lane / 16 * 8],
                         !transposed);
        b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
    }
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; half++) {
        float d[4];
        for (int i = 0; i < 4; i++) d[i] = C[(g + i / 2 * 8) * 16 + half * 8 + 2 * t + i % 2];
        emu::mma_m16n8k16_bf16(d, a, b[half], d);
        for (int i = 0; i < 4; i++) C[(g + i / 2 * 8) * 16 + half * 8 + 2 * t + i % 2] = d[i];
    }
}
TEST_CASE("ldmatrix and mma agree with a product in double precision") {
    const std::vector<bf16> a = to_bf16(random_floats(256, 2)), b = to_bf16(random_floats(256, 3));
    const Floats c = random_floats(256, 4);
    std::vector<double> want(256);
    for (size_t i = 0; i < 16; i++)
        for (size_t j = 0; j < 16; j++) {
            want[i * 16 + j] = c[i * 16 + j];
            for (size_t k = 0; k < 16; k++)
                want[i * 16 + j] += (double)number(a[i * 16 + k]) * (double)number(b[k * 16 + j]);
        }
    all_schedules([&] {
        for (int way = 0; way < 4; way++) {
            Device<bf16> A(a), B(b);
            Device<float> C(c);
            REQUIRE(launch(tensor_product, 1, 32, 0, nullptr, C, A, B, way / 2, way % 2) == cudaSuccess);
            check_close("emulated mma", C.get(), want, 1e-6);
        }
    });
}

// Copies rows with double buffering. `pending` = 1 is correct; 2 waits for one copy too few. Rows from n on
// are filled with zeros.
__global__ void pipeline(float* out, const float4* in, int n, int pending) {
    __shared__ float4 buffer[2][32];
    const int t = (int)threadIdx.x, rows = 5;
    auto fetch = [&](int row) {
        if (row < rows) emu::cp_async16(&buffer[row % 2][t], &in[row < n ? row * 32 + t : 0], row < n);
        emu::cp_async_commit();
    };
    float sum = 0;
    fetch(0);
    for (int row = 0; row < rows; row++) {
        fetch(row + 1);
        emu::cp_async_wait(pending);
        __syncthreads();
        sum += buffer[row % 2][31 - t].x;
        __syncthreads();
    }
    emu::cp_async_wait(0);
    out[t] = sum;
}
TEST_CASE("an asynchronous copy is visible after the wait that covers it, and NaN before") {
    std::vector<float4> x(4 * 32);
    for (size_t i = 0; i < x.size(); i++) x[i] = make_float4((float)i, 0, 0, 0);
    Device<float4> in(x);
    Device<float> out(32);
    all_schedules([&] {
        REQUIRE(launch(pipeline, 1, 32, 0, nullptr, out, in, 4, 1) == cudaSuccess);
        Floats got = out.get();
        for (int t = 0; t < 32; t++) CHECK(got[(size_t)t] == 4 * (31 - t) + 32 * 6);
        REQUIRE(launch(pipeline, 1, 32, 0, nullptr, out, in, 4, 2) == cudaSuccess);
        got = out.get();
        for (int t = 0; t < 32; t++) CHECK(std::isnan(got[(size_t)t]));
    });
}

// ---------------------------------------------------------------------------------------------
// Wrong kernels that are reported

// Runs a kernel and returns its report; "" if there is none.
template <class... P, class... A>
std::string report_of(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, A&&... args) {
    Options options;
    cudaError_t e = launch(kernel, grid, block, smem, nullptr, std::forward<A>(args)...);
    std::string report = emu::last_report();
    CHECK((e != cudaSuccess) == !report.empty());
    CHECK(cudaGetLastError() == e);
    return report;
}

__global__ void write_at(float* p, long index) {
    if (threadIdx.x == 3 && blockIdx.x == gridDim.x - 1) p[index] = 1;
}
__global__ void read_at(float* out, const float* p, long index) { out[threadIdx.x] = p[index]; }

TEST_CASE("an access out of bounds is reported with kernel, block, thread, line and distance") {
    Device<float> x(1024), out(32);
    std::string report = report_of(write_at, 2, 32, 0, x, 1024);
    CHECK_CONTAINS(report, "out of bounds: 0 bytes past the end of a 4096-byte device allocation");
    CHECK_CONTAINS(report, "test_emulator.cu:");
    CHECK_CONTAINS(report, "write_at, block (1,0,0), thread (3,0,0)]");
    CHECK_CONTAINS(report_of(write_at, 1, 32, 0, x, -1),
                   "out of bounds: 4 bytes before a 4096-byte device allocation");
    CHECK_CONTAINS(report_of(read_at, 1, 32, 0, out, x, 1030), "out of bounds: 24 bytes past the end");
    CHECK_CONTAINS(report_of(read_at, 1, 32, 0, out, nullptr, 2), "null pointer (address 0x8)");
}
TEST_CASE("after a report every call returns its error, until clear_error()") {
    Options options;
    Device<float> x(1024), out(1);
    CHECK(launch(write_at, 1, 32, 0, nullptr, x, 1024) == cudaErrorIllegalAddress);
    CHECK_CONTAINS(std::string(cudaGetErrorString(cudaErrorIllegalAddress)),
                   "illegal memory access was encountered: access out of bounds");
    CHECK(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
    CHECK(launch(write_at, 1, 32, 0, nullptr, x, 0) == cudaErrorIllegalAddress);
    void* p;
    CHECK(cudaMalloc(&p, 8) == cudaErrorIllegalAddress);
    emu::clear_error();
    CHECK(cudaGetLastError() == cudaSuccess);
    CHECK(emu::last_report() == "");
    const Floats ones(1024, 1);
    cudaMemcpy(x, ones.data(), 4096, cudaMemcpyHostToDevice);
    CHECK(launch(block_sums, 1, 1024, 4096, nullptr, out, x, 1) == cudaSuccess);
    CHECK(out.get()[0] == 1024);
}
TEST_CASE("a write a few bytes behind an allocation is reported after the kernel; a read is NaN") {
    if (ASAN) return skip("AddressSanitizer ends the process, which another case tests");
    Device<float> x(1001), out(32);
    std::string report = report_of(write_at, 1, 32, 0, x, 1001);
    CHECK_CONTAINS(report, "write_at has written 0 bytes past the end of a 4004-byte device allocation");
    CHECK(report_of(read_at, 1, 32, 0, out, x, 1001) == "");
    CHECK(std::isnan(out.get()[0]));
}
TEST_CASE("an access to freed memory is reported") {
    float* stale;
    {
        Device<float> x(1024);
        stale = x;
    }
    CHECK_CONTAINS(report_of(write_at, 1, 32, 0, stale, 0), "neither device memory nor null");
    union Hidden {  // in which the check of the arguments does not search
        float* p;
    };
    auto kernel = +[](Hidden h) { h.p[5] = 1; };
    CHECK_CONTAINS(report_of(kernel, 1, 1, 0, Hidden{stale}),
                   "access to freed memory: 20 bytes into a 4096-byte device allocation");
}
TEST_CASE("in an arena's gaps, writes and far reads are reported, and near reads are NaN") {
    if (ASAN) return skip("AddressSanitizer ends the process, which another case tests");
    const size_t bytes[3] = {1000, 8192, 40};
    size_t at[3], end = 0;
    for (int i = 0; i < 3; i++) at[i] = i ? emu::arena_gap(end) : 0, end = at[i] + bytes[i];
    Device<char> arena(end);
    for (int i = 0; i < 2; i++)
        CHECK(emu::poison(arena + at[i] + bytes[i], at[i + 1] - at[i] - bytes[i]) == cudaSuccess);
    Device<float> out(32);
    auto tensor = [&](int i) { return (float*)(arena + at[i]); };
    CHECK_CONTAINS(report_of(write_at, 1, 32, 0, tensor(0), 250),
                   "has written 0 bytes into the gap behind a tensor");
    CHECK_CONTAINS(report_of(write_at, 1, 32, 0, tensor(1), -1),
                   "has written 8212 bytes into the gap behind a tensor");
    CHECK_CONTAINS(report_of(write_at, 1, 32, 0, tensor(1), 2048 + 1024),
                   "out of bounds: 4096 bytes into the gap behind a tensor");
    CHECK_CONTAINS(report_of(read_at, 1, 32, 0, out, tensor(2), -1060),
                   "out of bounds: 3952 bytes into the gap behind a tensor");
    CHECK(report_of(read_at, 1, 32, 0, out, tensor(0), 255) == "");
    CHECK(std::isnan(out.get()[0]));
    Options options;
    CHECK(cudaMemset(arena, 0, end) == cudaErrorInvalidValue);
    CHECK_CONTAINS(emu::last_report(), "touch the gap");
    for (int i = 0; i < 3; i++) CHECK(cudaMemset(tensor(i), 0, bytes[i]) == cudaSuccess);
    for (int i = 0; i < 3; i++)
        CHECK(launch(write_at, 1, 32, 0, nullptr, tensor(i), (long)bytes[i] / 4 - 1) == cudaSuccess);
    CHECK(emu::poison(arena + end - 4, 5) == cudaErrorInvalidValue);
}

TEST_CASE("a write beyond a launch's dynamic shared memory is reported") {
    Device<float> out(32);
    CHECK(report_of(write_dynamic, 1, 32, 1024, out, 255) == "");
    if (ASAN) return skip("AddressSanitizer ends the process, which another case tests");
    CHECK_CONTAINS(report_of(write_dynamic, 1, 32, 1024, out, 256),
                   "has written 0 bytes past the end of its 1024 bytes of dynamic shared memory");
}
TEST_CASE("a launch with too much shared memory or impossible sizes is refused") {
    Device<float> out(1024);
    auto go = [&](dim3 grid, dim3 block, size_t smem) {
        cudaError_t e = launch(write_dynamic, grid, block, smem, nullptr, out, 0);
        CHECK(cudaGetLastError() == e);
        return e;
    };
    CHECK(go(1, 32, 48 << 10) == cudaSuccess);
    CHECK(go(1, 32, (48 << 10) + 1) == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(write_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 64 << 10) ==
          cudaSuccess);
    CHECK(go(1, 32, 64 << 10) == cudaSuccess);
    CHECK(go(1, 32, (64 << 10) + 1) == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(write_dynamic, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10) ==
          cudaErrorInvalidValue);
    cudaGetLastError();
    CHECK(go(1, 1025, 0) == cudaErrorInvalidConfiguration);
    CHECK(go(1, 0, 0) == cudaErrorInvalidConfiguration);
    CHECK(go(0, 32, 0) == cudaErrorInvalidConfiguration);
    CHECK(go(dim3(1, 65536), 32, 0) == cudaErrorInvalidConfiguration);
}

__global__ void uninitialised(float* out, const float* in, int* integer) {
    __shared__ float s[64];
    if (threadIdx.x) s[threadIdx.x] = 1;
    __syncthreads();
    out += blockIdx.x * 65;
    out[threadIdx.x] = s[(threadIdx.x + 1) % 64];
    if (threadIdx.x == 0) out[64] = in[5], integer[blockIdx.x] = ((const int*)in)[5];
}
TEST_CASE("uninitialised shared and device memory is NaN in every block, and -1 as an integer") {
    const unsigned blocks = 5;
    Device<float> in(16), out(blocks * 65);
    Device<int> integer(blocks);
    REQUIRE(launch(uninitialised, blocks, 64, 0, nullptr, out, in, integer) == cudaSuccess);
    const Floats got = out.get();
    for (size_t b = 0; b < blocks; b++) {
        for (size_t t = 0; t < 63; t++) CHECK(got[b * 65 + t] == 1);
        CHECK(std::isnan(got[b * 65 + 63]));
        CHECK(std::isnan(got[b * 65 + 64]));
        CHECK(integer.get()[b] == -1);
    }
}

__global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 100) {
        __syncthreads();
        out[threadIdx.x] = 1;
    } else {
        out[threadIdx.x] = 2;
        __syncthreads();
    }
}
__global__ void stuck(int* out) {
    if (threadIdx.x < 16) *out = __shfl_sync(0xffffffffu, 1, 0);
    else __syncthreads();
}
__global__ void mixed_collectives(int* out) {
    if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);
    else out[threadIdx.x] = __reduce_add_sync(0xffffffffu, 1);
}
__global__ void different_masks(int* out) {
    out[threadIdx.x] = __shfl_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff8000u, 1, 20);
}
TEST_CASE("barriers and collectives that threads do not reach together are reported with places") {
    Device<float> out(256);
    all_schedules([&] {
        std::string report = report_of(divergent_barrier, 1, 256, 0, out);
        CHECK_CONTAINS(report, "divergent barrier: thread ");
        CHECK_CONTAINS(report, " waits in __syncthreads at ");
        CHECK_CONTAINS(report, " in __syncthreads at ");
        report = report_of(stuck, 1, 64, 0, (int*)out.p);
        CHECK_CONTAINS(report, "deadlock: ");
        CHECK_CONTAINS(report, "48 threads (the first: 16) wait in __syncthreads at ");
        CHECK_CONTAINS(report, "16 threads (the first: 0) wait in __shfl_sync at ");
        report = report_of(mixed_collectives, 1, 32, 0, (int*)out.p);
        CHECK_CONTAINS(report, "lanes of one warp meet in different collectives: lane ");
        CHECK_CONTAINS(report, "__reduce_add_sync");
        CHECK_CONTAINS(report_of(different_masks, 1, 32, 0, (int*)out.p), "with mask ffff8000");
    });
}
__global__ void absent_lane(float* out, int lanes, unsigned mask, bool leave) {
    const int t = (int)threadIdx.x;
    if (leave && t >= lanes) return;
    float v = (float)t;
    if (t < lanes) v = __shfl_xor_sync(mask, v, 16);
    out[t] = v;
}
TEST_CASE("shuffles that read absent lanes, or whose mask lacks the caller, are reported") {
    Device<float> out(32);
    CHECK_CONTAINS(report_of(absent_lane, 1, 32, 0, out, 20, 0x000fffffu, false),
                   "reads lane 20, which has exited or is not in the mask");
    CHECK_CONTAINS(report_of(absent_lane, 1, 32, 0, out, 20, 0xffffffffu, true),
                   "reads lane 20, which has exited or is not in the mask");
    CHECK_CONTAINS(report_of(absent_lane, 1, 32, 0, out, 20, 0xffffffffu, false),
                   "reads lane 20, which has exited or is not in the mask");
    CHECK_CONTAINS(report_of(absent_lane, 1, 32, 0, out, 32, 0xfffffffeu, false),
                   "__shfl_xor_sync: the mask fffffffe lacks the calling lane 0");
}

__global__ void copies_left(const float4* in) {
    __shared__ float4 s[32];
    emu::cp_async16(&s[threadIdx.x], &in[threadIdx.x], true);
    emu::cp_async_commit();
}
__global__ void bad_copy(const char* in, int to, int from, bool swap) {
    __shared__ float4 s[32];
    char* target = (char*)s + to;
    if (swap) emu::cp_async16((void*)in, target, true);
    else emu::cp_async16(target, in + from, true);
}
__global__ void bad_ldmatrix(const float* in, int offset, bool global) {
    __shared__ float4 s[32];
    uint32_t r[4];
    emu::ldmatrix_x4(r, global ? (const char*)in : (const char*)&s[threadIdx.x] + offset, false);
}
__global__ void bad_vector(const float* in, float* out) { out[0] = __ldcs((const float4*)(in + 1)).x; }
TEST_CASE("wrong asynchronous copies, ldmatrix and misaligned vector loads are reported") {
    Device<float4> in(32);
    CHECK_CONTAINS(report_of(copies_left, 1, 32, 0, in),
                   "exits with 1 asynchronous copies it never waited for, the first at ");
    const char* bytes = (const char*)in.p;
    CHECK_CONTAINS(report_of(bad_copy, 1, 1, 0, bytes, 8, 0, false), "misaligned access of 16 bytes");
    CHECK_CONTAINS(report_of(bad_copy, 1, 1, 0, bytes, 0, 4, false), "misaligned access of 16 bytes");
    CHECK_CONTAINS(report_of(bad_copy, 1, 1, 0, bytes, 0, 0, true), "is not shared memory");
    CHECK_CONTAINS(report_of(bad_copy, 1, 1, 0, bytes, 0, 512, false), "is not device memory");
    CHECK_CONTAINS(report_of(bad_ldmatrix, 1, 32, 0, (float*)in.p, 8, false),
                   "misaligned access of 16 bytes");
    CHECK_CONTAINS(report_of(bad_ldmatrix, 1, 32, 0, (float*)in.p, 0, true),
                   "ldmatrix: the row is not in shared memory");
    CHECK_CONTAINS(report_of(bad_vector, 1, 1, 0, (float*)in.p, (float*)in.p),
                   "misaligned access of 16 bytes");
}
__global__ void endless_stack(int* out, int depth) {
    volatile char block[4096];
    int i = depth & 4095;  // not a constant, for which a compiler could shrink the block
    block[i] = (char)depth;
    void (*volatile again)(int*, int) = endless_stack;  // a compiler could turn a direct call into a loop
    if (depth) again(out, depth - 1);
    out[0] = block[i];
}
TEST_CASE("a CUDA thread's stack overflow is reported") {
    if (ASAN) return skip("AddressSanitizer has its own report");
    Device<int> out(1);
    CHECK(report_of(endless_stack, 1, 1, 0, out, 10) == "");
    CHECK_CONTAINS(report_of(endless_stack, 1, 1, 0, out, 1000), "stack overflow of a CUDA thread");
}
TEST_CASE("a host pointer as a kernel's argument is reported, but pinned memory is allowed") {
    float host[32];
    CHECK_CONTAINS(report_of(write_at, 1, 32, 0, host, 0), "argument 0 of kernel ");
    Device<float> out(32);
    std::string report = report_of(read_at, 1, 32, 0, out, host, 0);
    CHECK_CONTAINS(report, "argument 1 of kernel ");
    CHECK_CONTAINS(report, "read_at, 0x");
    float* pinned;
    REQUIRE(cudaMallocHost(&pinned, 128) == cudaSuccess);
    CHECK(report_of(write_at, 1, 32, 0, pinned, 7) == "");
    CHECK(pinned[7] == 1);
    CHECK(cudaFreeHost(pinned) == cudaSuccess);
}
struct View {
    float* p;
    long n;
};
struct Views {
    char kind;  // seven bytes of padding
    View in;
    union {
        const float* pointer;
        uint64_t number;
    } either;
    double factor;
    uint64_t number;
    const float* list[2];
};
__global__ void set_through(View v) { v.p[threadIdx.x] = (float)v.n; }
__global__ void set_through_views(Views v) { v.in.p[threadIdx.x] = (float)v.in.n; }
TEST_CASE("a host pointer in a struct is reported, also in a struct or an array in it") {
    float host[32];
    Device<float> out(32);
    CHECK(report_of(set_through, 1, 32, 0, View{out, 7}) == "");
    CHECK(out.get()[31] == 7);
    std::string report = report_of(set_through, 1, 32, 0, View{host, 7});
    CHECK_CONTAINS(report, "the member at byte 0 of argument 0 of kernel ");
    CHECK_CONTAINS(report, strf("set_through, %p, is neither device memory nor null", host));

    Views v = {};
    v.in = {out, 8}, v.list[0] = out;
    CHECK(report_of(set_through_views, 1, 32, 0, v) == "");
    v.in.p = host;
    CHECK_CONTAINS(report_of(set_through_views, 1, 32, 0, v), "the member at byte 8 of argument 0 ");
    v.in.p = out, v.list[1] = host;
    CHECK_CONTAINS(report_of(set_through_views, 1, 32, 0, v), "the member at byte 56 of argument 0 ");
}
TEST_CASE("in a struct, numbers and padding that look like host pointers are not reported") {
    float host[32], *address = host;
    Device<float> out(32);
    Views v;
    static_assert(sizeof v == 8 * sizeof address, "");
    for (int word = 0; word < 8; word++) memcpy((char*)&v + 8 * word, &address, 8);
    v.in.p = out, v.list[0] = nullptr, v.list[1] = out + 32;  // where an empty array may begin
    CHECK(v.in.n == (long)address);
    CHECK(report_of(set_through_views, 1, 32, 0, v) == "");
}

// ---------------------------------------------------------------------------------------------
// Wrong kernels that only another schedule or a sanitizer reveals

__global__ void no_barrier(float* out) {
    __shared__ float s[64];
    const unsigned t = threadIdx.x;
    s[t] = (float)t;
    out[t] = s[63 - t];
}
__global__ void no_second_barrier(float* out) {
    __shared__ float s;
    float sum = 0;
    for (int i = 0; i < 4; i++) {
        if (threadIdx.x == 0) s = (float)i;
        __syncthreads();
        sum += s;
    }
    out[threadIdx.x] = sum;
}
__global__ void no_syncwarp(float* out) {
    __shared__ float s[32];
    const unsigned t = threadIdx.x;
    s[t] = (float)t;
    out[t] = s[t ^ 1];
}
// Whether two schedules give different results, or one gives NaN.
bool shows_under_schedules(void (*kernel)(float*), unsigned threads) {
    Device<float> out(threads);
    bool shows = false;
    Floats first;
    all_schedules([&] {
        REQUIRE(launch(kernel, 1, threads, 0, nullptr, out) == cudaSuccess);
        Floats got = out.get();
        if (first.empty()) first = got;
        for (size_t i = 0; i < threads; i++) shows |= !(got[i] == first[i]);
    });
    return shows;
}
TEST_CASE("a missing barrier gives NaN or different results under different schedules") {
    if (TSAN) return skip("ThreadSanitizer reports these races, which another case tests");
    CHECK(shows_under_schedules(no_barrier, 64));
    CHECK(shows_under_schedules(no_second_barrier, 64));
    CHECK(shows_under_schedules(no_syncwarp, 32));
}

CHILD_CASE("no barrier") {
    Device<float> out(64);
    launch(no_barrier, 1, 64, 0, nullptr, out);
}
CHILD_CASE("no second barrier") {
    Device<float> out(64);
    launch(no_second_barrier, 1, 64, 0, nullptr, out);
}
CHILD_CASE("no syncwarp") {
    Device<float> out(32);
    launch(no_syncwarp, 1, 32, 0, nullptr, out);
}
// The barrier comes before the wait for the copy, so other threads' copies may not be complete.
__global__ void barrier_before_wait(float* out, const float4* in) {
    __shared__ float4 s[64];
    const unsigned t = threadIdx.x;
    emu::cp_async16(&s[t], &in[t], true);
    emu::cp_async_commit();
    __syncthreads();
    emu::cp_async_wait(0);
    out[t] = s[63 - t].x;
}
CHILD_CASE("barrier before the copy's wait") {
    Device<float4> in(64);
    Device<float> out(64);
    launch(barrier_before_wait, 1, 64, 0, nullptr, out, in);
}
__global__ void ldmatrix_without_barrier(uint32_t* out) {
    __shared__ __align__(16) uint32_t s[32][4];
    const unsigned t = threadIdx.x;
    for (int i = 0; i < 4; i++) s[t % 32 ^ 1][i] = t;
    uint32_t r[4];
    emu::ldmatrix_x4(r, &s[t % 32], false);
    out[t] = r[0];
}
CHILD_CASE("ldmatrix without a barrier") {
    Device<uint32_t> out(32);
    launch(ldmatrix_without_barrier, 1, 32, 0, nullptr, out);
}
TEST_CASE("ThreadSanitizer reports races between CUDA threads, with lines") {
    if (!TSAN) return skip("run make test-emulator-tsan");
    for (const char* name : {"no barrier", "no second barrier", "no syncwarp",
                             "barrier before the copy*s wait", "ldmatrix without a barrier"}) {
        const std::string text = run_child(std::string("child: ") + name);
        CHECK_CONTAINS(text, "WARNING: ThreadSanitizer: data race");
        CHECK_CONTAINS(text, "test_emulator.cu:");
    }
}

CHILD_CASE("slack") {
    Device<float> x(1001);
    launch(write_at, 1, 32, 0, nullptr, x, 1001);
}
CHILD_CASE("gap") {
    Device<char> arena(9000);
    emu::poison(arena + 1000, 3000);
    launch(write_at, 1, 32, 0, nullptr, (float*)arena.p, 250);
}
CHILD_CASE("dynamic") {
    Device<float> out(32);
    launch(write_dynamic, 1, 32, 1024, nullptr, out, 256);
}
__global__ void static_overrun(float* out, int n) {
    __shared__ float s[64];
    for (int i = 0; i < n; i++) s[i] = 1;
    out[0] = s[0];
}
CHILD_CASE("static") {
    Device<float> out(1);
    launch(static_overrun, 1, 1, 0, nullptr, out, 65);
}
CHILD_CASE("vector") {
    Device<float> x(16);
    auto kernel = +[](float* x) { *(float4*)(x + 1) = make_float4(1, 2, 3, 4); };
    launch(kernel, 1, 1, 0, nullptr, x);
}
TEST_CASE("AddressSanitizer finds every overrun byte, UBSan wrong indices and misaligned vectors") {
    if (!ASAN) return skip("run make test-emulator-asan");
    CHECK_CONTAINS(run_child("child: slack"), "AddressSanitizer: use-after-poison");
    CHECK_CONTAINS(run_child("child: gap"), "AddressSanitizer: use-after-poison");
    CHECK_CONTAINS(run_child("child: dynamic"), "AddressSanitizer: use-after-poison");
    CHECK_CONTAINS(run_child("child: static"), "runtime error: index 64 out of bounds");
    CHECK_CONTAINS(run_child("child: vector"), "runtime error: store to misaligned address");
}

CHILD_CASE("host reads") {
    Device<float> x(Floats(100, 1));
    printf("host sees %f\n", (double)x.p[3]);
}
CHILD_CASE("host reads unguarded") {
    emu::options().host_guard = false;
    Device<float> x(Floats(100, 1));
    printf("host sees %f\n", (double)x.p[3]);
}
TEST_CASE("host code that touches device memory is reported and ends the program") {
    std::string text = run_child("child: host reads");
    CHECK_CONTAINS(text,
                   "emulator: host code touches device memory: 12 bytes into a 400-byte device allocation");
    CHECK(!contains(text, "host sees"));
    CHECK_CONTAINS(run_child("child: host reads unguarded"), "host sees 1.0");
}

// ---------------------------------------------------------------------------------------------
// The host's side: memory, streams, events, graphs

__global__ void fill(float* p, float v) { p[blockIdx.x * blockDim.x + threadIdx.x] = v; }
__global__ void add_to(float* to, const float* from) { to[threadIdx.x] += from[threadIdx.x]; }

TEST_CASE("copies and memsets check kinds and bounds, and handle pitches and pinned memory") {
    Options options;
    Device<float> x(100), y(100);
    Floats host = random_floats(100, 5), back(100);
    CHECK(cudaMemcpy(x, host.data(), 400, cudaMemcpyDefault) == cudaSuccess);
    CHECK(cudaMemcpy(y, x, 400, cudaMemcpyDeviceToDevice) == cudaSuccess);
    CHECK(y.get() == host);
    CHECK(cudaMemcpy(x, host.data(), 404, cudaMemcpyHostToDevice) == cudaErrorInvalidValue);
    CHECK_CONTAINS(
        emu::last_report(),
        "cudaMemcpy's target: 404 bytes, which end 4 bytes past the end of a 400-byte device allocation");
    CHECK(cudaMemcpy(x, host.data(), 400, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK_CONTAINS(
        emu::last_report(),
        "the kind says device memory to host memory, the pointers say host memory to device memory");
    CHECK(cudaMemset(x + 50, 0, 201) == cudaErrorInvalidValue);
    CHECK(cudaMemset(host.data(), 0, 4) == cudaErrorInvalidValue);
    CHECK(cudaMemset(x + 50, 0, 200) == cudaSuccess);
    CHECK(x.get()[49] == host[49]);
    CHECK(x.get()[50] == 0);
    // Rows of 3 floats, 10 apart on the device
    CHECK(cudaMemcpy2D(back.data(), 12, y, 40, 12, 10, cudaMemcpyDeviceToHost) == cudaSuccess);
    for (size_t i = 0; i < 30; i++) CHECK(back[i] == host[i / 3 * 10 + i % 3]);
    CHECK(cudaMemcpy2D(back.data(), 12, y, 40, 12, 11, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue);
    CHECK(cudaFree(host.data()) == cudaErrorInvalidValue);
    CHECK(cudaFree(x + 1) == cudaErrorInvalidValue);
    CHECK(cudaFree(nullptr) == cudaSuccess);
    cudaPointerAttributes a;
    CHECK(cudaPointerGetAttributes(&a, y + 3) == cudaSuccess);
    CHECK(a.type == cudaMemoryTypeDevice);
    CHECK(cudaPointerGetAttributes(&a, back.data()) == cudaSuccess);
    CHECK(a.type == cudaMemoryTypeUnregistered);
    CHECK(cudaHostRegister(back.data(), 400, cudaHostRegisterDefault) == cudaSuccess);
    CHECK(cudaPointerGetAttributes(&a, back.data() + 99) == cudaSuccess);
    CHECK(a.type == cudaMemoryTypeHost);
    CHECK(cudaHostUnregister(back.data()) == cudaSuccess);
    CHECK(cudaHostUnregister(back.data()) == cudaErrorHostMemoryNotRegistered);
}
TEST_CASE("device memory is limited, and cudaMemGetInfo reports what is left") {
    Options options;
    const size_t before = emu::statistics().memory_now;
    options->memory_limit = before + (1 << 20);
    Device<char> most((1 << 20) - 100);
    size_t unused, total;
    CHECK(cudaMemGetInfo(&unused, &total) == cudaSuccess);
    CHECK(unused == 100);
    CHECK(total == before + (1 << 20));
    void* p = &p;
    CHECK(cudaMalloc(&p, 101) == cudaErrorMemoryAllocation);
    CHECK(cudaGetLastError() == cudaErrorMemoryAllocation);
    CHECK(std::string(cudaGetErrorString(cudaErrorMemoryAllocation)) == "out of memory");
    CHECK(cudaMalloc(&p, 100) == cudaSuccess);
    CHECK(cudaMemGetInfo(&unused, &total) == cudaSuccess);
    CHECK(unused == 0);
    CHECK(cudaFree(p) == cudaSuccess);
    CHECK(cudaMemGetInfo(&unused, &total) == cudaSuccess);
    CHECK(unused == 100);
}
TEST_CASE("the emulated device is small and has compute capability 9.0") {
    Options options;
    options->devices = 2;
    int n, value;
    CHECK(cudaGetDeviceCount(&n) == cudaSuccess);
    CHECK(n == 2);
    CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice);
    CHECK(cudaSetDevice(1) == cudaSuccess);
    CHECK(cudaGetDevice(&n) == cudaSuccess);
    CHECK(n == 1);
    CHECK(cudaSetDevice(0) == cudaSuccess);
    cudaDeviceProp p;
    CHECK(cudaGetDeviceProperties(&p, 0) == cudaSuccess);
    CHECK(p.multiProcessorCount == 4);
    CHECK(p.major == 9);
    CHECK(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess);
    CHECK(value == 227 << 10);
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, block_sums, 1000, 0) == cudaSuccess);
    CHECK(n == 2);
    CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&n, block_sums, 32, 47 << 10) == cudaSuccess);
    CHECK(n == 4);
    cudaFuncAttributes a;
    CHECK(cudaFuncGetAttributes(&a, block_sums) == cudaSuccess);
    CHECK(a.maxThreadsPerBlock == 1024);
}

struct Stream {
    cudaStream_t s = nullptr;
    explicit Stream(unsigned flags = cudaStreamDefault) {
        REQUIRE(cudaStreamCreateWithFlags(&s, flags) == cudaSuccess);
    }
    Stream(const Stream&) = delete;
    ~Stream() { cudaStreamDestroy(s); }
    operator cudaStream_t() const { return s; }
};
struct Event {
    cudaEvent_t e = nullptr;
    explicit Event(unsigned flags = cudaEventDefault) {
        REQUIRE(cudaEventCreateWithFlags(&e, flags) == cudaSuccess);
    }
    Event(const Event&) = delete;
    ~Event() { cudaEventDestroy(e); }
    operator cudaEvent_t() const { return e; }
};
struct Pinned {
    float* p = nullptr;
    explicit Pinned(size_t n) { REQUIRE(cudaMallocHost(&p, n * 4) == cudaSuccess); }
    Pinned(const Pinned&) = delete;
    ~Pinned() { cudaFreeHost(p); }
    float& operator[](size_t i) { return p[i]; }
};

TEST_CASE("lazy streams: work runs only when something waits for it") {
    Options options;
    options->lazy_streams = true;
    Stream s;
    Device<float> x(32);
    Pinned host(32);
    cudaMemset(x, 0, 128);
    CHECK(launch(fill, 1, 32, 0, s, x, 7.0f) == cudaSuccess);
    CHECK(cudaMemcpyAsync(host.p, x, 128, cudaMemcpyDeviceToHost, s) == cudaSuccess);
    CHECK(std::isnan(host[3]));
    int queries = 0;
    while (cudaStreamQuery(s) == cudaErrorNotReady) queries++;
    CHECK(queries == 2);
    CHECK(host[3] == 7);
    host[3] = 5;  // a pinned source is read when the copy runs, a pageable one during the call
    Floats pageable(32, 5);
    Device<float> y(32);
    CHECK(cudaMemcpyAsync(x, host.p, 128, cudaMemcpyHostToDevice, s) == cudaSuccess);
    CHECK(cudaMemcpyAsync(y, pageable.data(), 128, cudaMemcpyHostToDevice, s) == cudaSuccess);
    host[3] = pageable[3] = 6;
    CHECK(cudaStreamSynchronize(s) == cudaSuccess);
    CHECK(x.get()[3] == 6);
    CHECK(y.get()[3] == 5);
}
TEST_CASE("lazy streams: a missing wait for an event gives wrong results, and the wait right ones") {
    Options options;
    options->lazy_streams = true;
    Stream a, b;
    for (bool wait : {false, true}) {
        Device<float> x(Floats(32, 0)), y(32);
        Event e;
        launch(fill, 1, 32, 0, a, x, 7.0f);
        cudaEventRecord(e, a);
        if (wait) cudaStreamWaitEvent(b, e, 0);
        cudaMemcpyAsync(y, x, 128, cudaMemcpyDeviceToDevice, b);
        CHECK(cudaStreamSynchronize(b) == cudaSuccess);
        Pinned host(32);
        cudaMemcpyAsync(host.p, y, 128, cudaMemcpyDeviceToHost, b);
        cudaStreamSynchronize(b);
        CHECK(host[0] == (wait ? 7 : 0));
    }
}
TEST_CASE("lazy streams: the legacy stream and blocking streams wait for each other") {
    Options options;
    options->lazy_streams = true;
    Stream blocking, loose(cudaStreamNonBlocking);
    Device<float> x(Floats(32, 0)), y(Floats(32, 0)), z(Floats(32, 0));
    launch(fill, 1, 32, 0, blocking, x, 1.0f);
    launch(fill, 1, 32, 0, loose, y, 1.0f);
    launch(add_to, 1, 32, 0, nullptr, x, x);
    launch(add_to, 1, 32, 0, blocking, z, x);
    CHECK(cudaStreamSynchronize(blocking) == cudaSuccess);
    Pinned host(32);
    cudaMemcpyAsync(host.p, z, 128, cudaMemcpyDeviceToHost, blocking);
    cudaStreamSynchronize(blocking);
    CHECK(host[0] == 2);
    cudaMemcpy(host.p, y, 128, cudaMemcpyDeviceToHost);
    CHECK(host[0] == 0);
    cudaDeviceSynchronize();
    cudaMemcpy(host.p, y, 128, cudaMemcpyDeviceToHost);
    CHECK(host[0] == 1);
}
TEST_CASE("a fault is reported at the launch in an eager stream, and at the wait in a lazy one") {
    Device<float> x(1024);
    for (bool lazy : {false, true}) {
        Options options;
        options->lazy_streams = lazy;
        CHECK(launch(write_at, 1, 32, 0, nullptr, x, 1024) == (lazy ? cudaSuccess : cudaErrorIllegalAddress));
        CHECK(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
    }
}
TEST_CASE("events can be queried, waited for and timed, and wrong uses are refused") {
    Options options;
    options->lazy_streams = true;
    Stream s;
    Event start, end, untimed(cudaEventDisableTiming);
    Device<float> x(32);
    float ms = -1;
    CHECK(cudaEventQuery(start) == cudaSuccess);
    CHECK(cudaEventElapsedTime(&ms, start, end) == cudaErrorInvalidResourceHandle);
    cudaEventRecord(start, s);
    launch(fill, 1, 32, 0, s, x, 7.0f);
    cudaEventRecord(end, s), cudaEventRecord(untimed, s);
    CHECK(cudaEventElapsedTime(&ms, start, end) == cudaErrorNotReady);
    CHECK(cudaEventQuery(end) == cudaErrorNotReady);
    CHECK(cudaEventSynchronize(end) == cudaSuccess);
    CHECK(cudaEventQuery(end) == cudaSuccess);
    CHECK(cudaEventElapsedTime(&ms, start, end) == cudaSuccess);
    CHECK(ms == 1);  // one kernel
    CHECK(cudaEventElapsedTime(&ms, start, untimed) == cudaErrorInvalidResourceHandle);
    CHECK(cudaStreamWaitEvent(s, (cudaEvent_t)&ms, 0) == cudaErrorInvalidResourceHandle);
    CHECK(launch(fill, 1, 32, 0, (cudaStream_t)&ms, x, 7.0f) == cudaErrorInvalidResourceHandle);
    cudaGetLastError();
}

// x = 1; then y += x in one branch and z += x in the other; after the join x += y and x += z. Without `join`
// the branches join only at the end.
void two_branches(cudaStream_t s, cudaStream_t side, float* x, float* y, float* z, bool join) {
    Event fork, done;
    launch(fill, 1, 32, 0, s, x, 1.0f);
    cudaEventRecord(fork, s), cudaStreamWaitEvent(side, fork, 0);
    launch(add_to, 1, 32, 0, side, y, x);
    cudaEventRecord(done, side);
    launch(add_to, 1, 32, 0, s, z, x);
    if (join) cudaStreamWaitEvent(s, done, 0);
    launch(add_to, 1, 32, 0, s, x, y);
    launch(add_to, 1, 32, 0, s, x, z);
    if (!join) cudaStreamWaitEvent(s, done, 0);
}
TEST_CASE("graphs: captured work runs at each launch, in any order that its edges allow") {
    Stream s, side;
    for (bool lazy : {false, true}) {
        all_schedules([&] {
            emu::options().lazy_streams = lazy;
            Device<float> x(32), y(Floats(32, 0)), z(Floats(32, 0));
            cudaGraph_t graph;
            cudaGraphExec_t run;
            REQUIRE(cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal) == cudaSuccess);
            two_branches(s, side, x, y, z, true);
            REQUIRE(cudaStreamEndCapture(s, &graph) == cudaSuccess);
            size_t nodes;
            CHECK(cudaGraphGetNodes(graph, nullptr, &nodes) == cudaSuccess);
            CHECK(nodes == 5);
            REQUIRE(cudaGraphInstantiate(&run, graph, 0) == cudaSuccess);
            REQUIRE(cudaGraphDestroy(graph) == cudaSuccess);
            CHECK(y.get()[0] == 0);  // capturing runs nothing
            for (int i = 0; i < 3; i++) CHECK(cudaGraphLaunch(run, s) == cudaSuccess);
            CHECK(cudaStreamSynchronize(s) == cudaSuccess);
            CHECK(x.get()[0] == 1 + 3 + 3);
            CHECK(y.get()[0] == 3);
            CHECK(cudaGraphExecDestroy(run) == cudaSuccess);
            CHECK(cudaGraphLaunch(run, s) == cudaErrorInvalidValue);
            cudaGetLastError();
        });
    }
}
TEST_CASE("graphs: a join that comes too late gives wrong results under some schedule") {
    Stream s, side;
    bool right = true;
    all_schedules([&] {
        Device<float> x(32), y(Floats(32, 0)), z(Floats(32, 0));
        cudaGraph_t graph;
        cudaGraphExec_t run;
        cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal);
        two_branches(s, side, x, y, z, false);
        REQUIRE(cudaStreamEndCapture(s, &graph) == cudaSuccess);
        REQUIRE(cudaGraphInstantiate(&run, graph, 0) == cudaSuccess);
        cudaGraphLaunch(run, s);
        right &= x.get()[0] == 3;
        cudaGraphExecDestroy(run), cudaGraphDestroy(graph);
    });
    CHECK(!right);
}
constexpr auto GLOBAL = cudaStreamCaptureModeGlobal, RELAXED = cudaStreamCaptureModeRelaxed,
               LOCAL = cudaStreamCaptureModeThreadLocal;
constexpr cudaError_t BROKEN = cudaErrorStreamCaptureInvalidated,
                      UNSUPPORTED = cudaErrorStreamCaptureUnsupported;

// Streams to capture in, and what the tests of wrong captures have in common.
struct Captures {
    Options options;
    Stream s, side, loose;
    Device<float> x;
    Event before, e;  // `before` is recorded before any capture
    cudaGraph_t graph;
    float host[32];

    Captures() : loose(cudaStreamNonBlocking), x(32) { cudaEventRecord(before, loose); }
    // Captures what f does in `stream`. f's error must be `want`, and that of the capture's end `end`.
    template <class F>
    void capture(cudaStream_t stream, cudaStreamCaptureMode mode, cudaError_t want, cudaError_t end, F f) {
        cudaStreamCaptureStatus status;
        REQUIRE(cudaStreamBeginCapture(stream, mode) == cudaSuccess);
        CHECK(launch(fill, 1, 32, 0, stream, x, 1.0f) == cudaSuccess);
        CHECK(f() == want);
        CHECK(cudaStreamIsCapturing(stream, &status) == cudaSuccess);
        CHECK(status == (end == cudaErrorStreamCaptureInvalidated ? cudaStreamCaptureStatusInvalidated
                                                                  : cudaStreamCaptureStatusActive));
        graph = (cudaGraph_t)&host;
        CHECK(cudaStreamEndCapture(stream, &graph) == end);
        CHECK((graph == nullptr) == (end != cudaSuccess));
        if (graph) cudaGraphDestroy(graph);
        CHECK(cudaStreamIsCapturing(stream, &status) == cudaSuccess);
        CHECK(status == cudaStreamCaptureStatusNone);
        CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
    }
};
template <class F>
cudaError_t in_thread(F f) {
    cudaError_t e = cudaSuccess;
    std::thread([&] { e = f(); }).join();
    return e;
}

TEST_CASE("graphs: allocations and waits break a capture, as its mode and stream forbid them") {
    Captures c;
    auto allocate = [] {
        void* p;
        cudaError_t e = cudaMalloc(&p, 16);
        if (e == cudaSuccess) cudaFree(p);
        return e;
    };
    c.capture(c.loose, GLOBAL, UNSUPPORTED, BROKEN, allocate);
    c.capture(c.loose, LOCAL, UNSUPPORTED, BROKEN, allocate);
    c.capture(c.loose, LOCAL, cudaSuccess, cudaSuccess, [&] { return in_thread(allocate); });
    c.capture(c.loose, GLOBAL, UNSUPPORTED, BROKEN, [&] { return in_thread(allocate); });
    c.capture(c.loose, RELAXED, cudaSuccess, cudaSuccess, allocate);
    c.capture(c.loose, RELAXED, UNSUPPORTED, BROKEN, [&] { return cudaStreamSynchronize(c.loose); });
    c.capture(c.loose, RELAXED, UNSUPPORTED, BROKEN, [&] { return cudaStreamQuery(c.loose); });
    c.capture(c.loose, RELAXED, UNSUPPORTED, BROKEN, [&] { return cudaDeviceSynchronize(); });
    c.capture(c.loose, RELAXED, cudaSuccess, cudaSuccess, [&] { return cudaStreamSynchronize(c.side); });
    CHECK(std::string(cudaGetErrorName(BROKEN)) == "cudaErrorStreamCaptureInvalidated");
}
TEST_CASE("graphs: the legacy stream and events from outside break a capture") {
    Captures c;
    auto legacy_launch = [&] { return launch(fill, 1, 32, 0, nullptr, c.x, 1.0f); };
    auto legacy_copy = [&] { return cudaMemcpy(c.host, c.x, 128, cudaMemcpyDeviceToHost); };
    c.capture(c.s, RELAXED, cudaErrorStreamCaptureImplicit, BROKEN, legacy_launch);
    c.capture(c.s, RELAXED, cudaErrorStreamCaptureImplicit, BROKEN, legacy_copy);
    c.capture(c.loose, RELAXED, cudaSuccess, cudaSuccess, legacy_launch);
    c.capture(c.loose, GLOBAL, UNSUPPORTED, BROKEN, legacy_copy);
    c.capture(c.loose, GLOBAL, cudaErrorStreamCaptureIsolation, BROKEN,
              [&] { return cudaStreamWaitEvent(c.loose, c.before, 0); });
    c.capture(c.loose, GLOBAL, cudaErrorCapturedEvent, BROKEN, [&] {
        cudaEventRecord(c.e, c.loose);
        return cudaEventSynchronize(c.e);
    });
}
TEST_CASE("graphs: a capture must join its branches, and end in its own stream and thread") {
    Captures c;
    c.capture(c.loose, GLOBAL, cudaSuccess, cudaErrorStreamCaptureUnjoined, [&] {
        cudaEventRecord(c.e, c.loose), cudaStreamWaitEvent(c.side, c.e, 0);
        return launch(fill, 1, 32, 0, c.side, c.x, 1.0f);
    });
    c.capture(c.loose, GLOBAL, cudaErrorStreamCaptureUnmatched, BROKEN, [&] {
        cudaEventRecord(c.e, c.loose), cudaStreamWaitEvent(c.side, c.e, 0);
        return cudaStreamEndCapture(c.side, &c.graph);
    });
    c.capture(c.loose, GLOBAL, cudaErrorStreamCaptureWrongThread, BROKEN,
              [&] { return in_thread([&] { return cudaStreamEndCapture(c.loose, &c.graph); }); });
    CHECK(cudaStreamEndCapture(c.s, &c.graph) == cudaErrorIllegalState);
    CHECK(cudaStreamBeginCapture(nullptr, GLOBAL) == UNSUPPORTED);
    REQUIRE(cudaStreamBeginCapture(c.s, GLOBAL) == cudaSuccess);
    REQUIRE(cudaStreamBeginCapture(c.side, GLOBAL) == cudaSuccess);
    cudaEventRecord(c.e, c.side);
    CHECK(cudaStreamWaitEvent(c.s, c.e, 0) == cudaErrorStreamCaptureMerge);
    CHECK(cudaStreamEndCapture(c.s, &c.graph) == BROKEN);
    CHECK(cudaStreamEndCapture(c.side, &c.graph) == cudaSuccess);
    CHECK(cudaGraphDestroy(c.graph) == cudaSuccess);
}

// ---------------------------------------------------------------------------------------------
// cuBLASLt

// The parameters of a product: op(A) (m,k), op(B) (k,n), D (m,n), with `pad` values between
// columns and batches.
struct Matmul {
    size_t m, n, k;
    bool trans_a, trans_b;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    float alpha = 1, beta = 0;
    int batches = 1;
    size_t pad = 8;
};
// A column-ordered matrix for each batch, with random values on the host and on the device.
template <class T>
struct Columns {
    size_t rows, cols, ld, stride;
    std::vector<T> host;
    Device<T> device;
    Columns(size_t rows, size_t cols, int batches, size_t pad, unsigned seed)
        : rows(rows),
          cols(cols),
          ld(rows + pad),
          stride(ld * cols + pad),
          host(values(stride * (size_t)batches, seed)),
          device(host) {}
    static std::vector<T> values(size_t n, unsigned seed) {
        if constexpr (sizeof(T) == 2) return to_bf16(random_floats(n, seed));
        else return random_floats(n, seed);
    }
    double at(size_t batch, size_t row, size_t col) const {
        return (double)number(host[batch * stride + col * ld + row]);
    }
};
double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_derivative(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

// cuBLASLt's objects for a product: layout[0] is A's, [1] B's, [2] C's and D's.
struct Handles {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t desc;
    cublasLtMatmulPreference_t preference;
    cublasLtMatrixLayout_t layout[3];
    Handles() {
        REQUIRE(cublasLtCreate(&handle) == CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
        REQUIRE(cublasLtMatmulPreferenceCreate(&preference) == CUBLAS_STATUS_SUCCESS);
        for (auto& l : layout)
            REQUIRE(cublasLtMatrixLayoutCreate(&l, CUDA_R_32F, 1, 1, 1) == CUBLAS_STATUS_SUCCESS);
    }
    Handles(const Handles&) = delete;
    ~Handles() {
        for (auto& l : layout) cublasLtMatrixLayoutDestroy(l);
        cublasLtMatmulPreferenceDestroy(preference), cublasLtMatmulDescDestroy(desc), cublasLtDestroy(handle);
    }
    template <class T>
    void set(cublasLtMatmulDescAttributes_t a, T v) {
        REQUIRE(cublasLtMatmulDescSetAttribute(desc, a, &v, sizeof v) == CUBLAS_STATUS_SUCCESS);
    }
    template <class T>
    void set(int i, cublasLtMatrixLayoutAttribute_t a, T v) {
        REQUIRE(cublasLtMatrixLayoutSetAttribute(layout[i], a, &v, sizeof v) == CUBLAS_STATUS_SUCCESS);
    }
    void set_layout(int i, cudaDataType_t type, size_t rows, size_t cols, size_t ld, int batches = 1,
                    size_t stride = 0) {
        set(i, CUBLASLT_MATRIX_LAYOUT_TYPE, type), set(i, CUBLASLT_MATRIX_LAYOUT_ROWS, (uint64_t)rows);
        set(i, CUBLASLT_MATRIX_LAYOUT_COLS, (uint64_t)cols), set(i, CUBLASLT_MATRIX_LAYOUT_LD, (int64_t)ld);
        set(i, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (int32_t)batches),
            set(i, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (int64_t)stride);
    }
    int heuristic(cublasLtMatmulHeuristicResult_t* results, int n,
                  cublasStatus_t want = CUBLAS_STATUS_SUCCESS) {
        int found = -1;
        CHECK(cublasLtMatmulAlgoGetHeuristic(handle, desc, layout[0], layout[1], layout[2], layout[2],
                                             preference, n, results, &found) == want);
        return found;
    }
    cublasStatus_t multiply(float alpha, const void* A, const void* B, float beta, void* D,
                            const cublasLtMatmulAlgo_t* algo = nullptr, void* workspace = nullptr,
                            size_t bytes = 0) {
        return cublasLtMatmul(handle, desc, &alpha, A, layout[0], B, layout[1], &beta, D, layout[2], D,
                              layout[2], algo, workspace, bytes, nullptr);
    }
};

// A product's operands.
template <class In, class Out>
struct Operands {
    Columns<In> a, b;
    Columns<Out> d, aux, bias;
    explicit Operands(const Matmul& f)
        : a(f.trans_a ? f.k : f.m, f.trans_a ? f.m : f.k, f.batches, f.pad, 1),
          b(f.trans_b ? f.n : f.k, f.trans_b ? f.k : f.n, f.batches, f.pad, 2),
          d(f.m, f.n, f.batches, f.pad, 3),
          aux(f.m, f.n, f.batches, f.pad, 4),
          bias(std::max(f.m, f.n), 1, f.batches, 0, 5) {}
};

// Computes the product on the device.
template <class In, class Out>
void multiply(const Matmul& f, const Operands<In, Out>& o) {
    const cudaDataType_t in = sizeof(In) == 2 ? CUDA_R_16BF : CUDA_R_32F,
                         out = sizeof(Out) == 2 ? CUDA_R_16BF : CUDA_R_32F;
    const auto& [a, b, d, aux, bias] = o;
    Handles h;
    h.set(CUBLASLT_MATMUL_DESC_TRANSA, f.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    h.set(CUBLASLT_MATMUL_DESC_TRANSB, f.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    h.set(CUBLASLT_MATMUL_DESC_EPILOGUE, f.epilogue);
    h.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, (void*)bias.device.p),
        h.set(CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE, (int64_t)bias.stride);
    h.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, (void*)aux.device.p),
        h.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)aux.ld);
    h.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, (int64_t)aux.stride);
    h.set_layout(0, in, a.rows, a.cols, a.ld, f.batches, a.stride),
        h.set_layout(1, in, b.rows, b.cols, b.ld, f.batches, b.stride);
    h.set_layout(2, out, d.rows, d.cols, d.ld, f.batches, d.stride);
    cublasLtMatmulHeuristicResult_t result;
    REQUIRE(h.heuristic(&result, 1) == 1);
    REQUIRE(h.multiply(f.alpha, a.device, b.device, f.beta, d.device, &result.algo) == CUBLAS_STATUS_SUCCESS);
}

// What D, aux and bias must contain afterwards, including the values between the columns.
struct Expected {
    std::vector<double> d, aux, bias;
};
template <class In, class Out>
Expected expected(const Matmul& f, const Operands<In, Out>& o) {
    const auto& [a_, b_, d, aux, bias] = o;
    const Columns<In>&a = a_, &b = b_;  // names that lambdas can capture
    const cublasLtEpilogue_t e = f.epilogue;
    const bool dgelu = e == CUBLASLT_EPILOGUE_DGELU || e == CUBLASLT_EPILOGUE_DGELU_BGRAD;
    Expected want;
    for (Out v : d.host) want.d.push_back((double)number(v));
    for (Out v : aux.host) want.aux.push_back((double)number(v));
    for (Out v : bias.host) want.bias.push_back((double)number(v));
    for (size_t batch = 0; batch < (size_t)f.batches; batch++) {
        double* bias_gradient = &want.bias[batch * bias.stride];
        auto A = [&](size_t i, size_t k) { return f.trans_a ? a.at(batch, k, i) : a.at(batch, i, k); };
        auto B = [&](size_t k, size_t j) { return f.trans_b ? b.at(batch, j, k) : b.at(batch, k, j); };
        if (e == CUBLASLT_EPILOGUE_BGRADA || e == CUBLASLT_EPILOGUE_DGELU_BGRAD)
            std::fill_n(bias_gradient, f.m, 0.0);
        if (e == CUBLASLT_EPILOGUE_BGRADB) std::fill_n(bias_gradient, f.n, 0.0);
        for (size_t i = 0; i < f.m; i++)
            for (size_t k = 0; e == CUBLASLT_EPILOGUE_BGRADA && k < f.k; k++) bias_gradient[i] += A(i, k);
        for (size_t j = 0; j < f.n; j++)
            for (size_t k = 0; e == CUBLASLT_EPILOGUE_BGRADB && k < f.k; k++) bias_gradient[j] += B(k, j);
        for (size_t i = 0; i < f.m; i++)
            for (size_t j = 0; j < f.n; j++) {
                double v = 0;
                for (size_t k = 0; k < f.k; k++) v += A(i, k) * B(k, j);
                v = f.alpha * v + f.beta * d.at(batch, i, j);
                if (e & CUBLASLT_EPILOGUE_BIAS) v += bias.at(batch, i, 0);
                if (e == CUBLASLT_EPILOGUE_GELU_AUX || e == CUBLASLT_EPILOGUE_GELU_AUX_BIAS)
                    want.aux[batch * aux.stride + j * aux.ld + i] = v;
                if (e & CUBLASLT_EPILOGUE_GELU) v = gelu(v);
                if (dgelu) v *= gelu_derivative(aux.at(batch, i, j));
                if (e == CUBLASLT_EPILOGUE_DGELU_BGRAD) bias_gradient[i] += v;
                want.d[batch * d.stride + j * d.ld + i] = v;
            }
    }
    return want;
}

// Computes the product on the device and compares everything that it writes with `expected`.
template <class In, class Out>
void check_matmul(const Matmul& f) {
    const Operands<In, Out> o(f);
    multiply(f, o);
    const Expected want = expected(f, o);
    const cublasLtEpilogue_t e = f.epilogue;
    auto compare = [&](const char* what, const Device<Out>& got, const std::vector<double>& want) {
        Floats x;
        for (Out v : got.get()) x.push_back(number(v));
        check_close(std::string(sizeof(Out) == 2 ? "emulated cublasLt, bf16 out: "
                                                 : "emulated cublasLt, fp32 out: ") +
                        what,
                    x, want, sizeof(Out) == 2 ? 3e-3 : 2e-6);
    };
    CAPTURE(e);
    compare("D", o.d.device, want.d), compare("aux", o.aux.device, want.aux);
    compare("bias", o.bias.device, want.bias);
}

const cublasLtEpilogue_t epilogues[] = {CUBLASLT_EPILOGUE_DEFAULT,  CUBLASLT_EPILOGUE_BIAS,
                                        CUBLASLT_EPILOGUE_GELU,     CUBLASLT_EPILOGUE_GELU_BIAS,
                                        CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                                        CUBLASLT_EPILOGUE_DGELU,    CUBLASLT_EPILOGUE_DGELU_BGRAD,
                                        CUBLASLT_EPILOGUE_BGRADA,   CUBLASLT_EPILOGUE_BGRADB};
TEST_CASE("cublasLtMatmul agrees with plain loops for all transpositions, epilogues and types") {
    for (int trans = 0; trans < 4; trans++) {
        Matmul f = {40, 26, 33, trans / 2 == 1, trans % 2 == 1};
        check_matmul<float, float>(f);
        f.alpha = 0.5f, f.beta = 2, f.batches = 3;
        check_matmul<float, float>(f), check_matmul<bf16, float>(f), check_matmul<bf16, bf16>(f);
    }
    for (cublasLtEpilogue_t e : epilogues) {
        Matmul f = {72, 13, 50, true, false, e};
        check_matmul<bf16, bf16>(f), check_matmul<float, float>(f);
        f.beta = 0.5f, f.batches = 2;
        check_matmul<bf16, float>(f);
    }
    check_matmul<float, float>({1, 1, 1, false, false});
    check_matmul<float, float>({64, 12, 16, false, true, CUBLASLT_EPILOGUE_BIAS, 1, 1, 1, 0});
}
TEST_CASE("cublasLtMatmul refuses invalid calls and operands beyond their memory, with the reason") {
    Options options;
    Device<float> a(Floats(64, 1)), b(Floats(64, 1)), d(Floats(64, 0)), bias(8);
    Handles h;
    auto fresh = [&] {
        for (int i = 0; i < 3; i++) h.set_layout(i, CUDA_R_32F, 8, 8, 8);
        h.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_DEFAULT);
        emu::clear_error();
    };
    auto multiply = [&] { return h.multiply(1, a, b, 0, d); };
    auto refused = [&](cublasStatus_t want, const char* why) {
        CHECK(multiply() == want);
        CHECK_CONTAINS(emu::last_report(), why);
        CHECK_CONTAINS(std::string(cublasLtGetStatusString(want)), why);
        fresh();
    };
    fresh();
    CHECK(multiply() == CUBLAS_STATUS_SUCCESS);
    CHECK(d.get()[63] == 8);
    h.set_layout(1, CUDA_R_32F, 7, 8, 8);
    refused(CUBLAS_STATUS_INVALID_VALUE, "op(A) is (8,8), op(B) (7,8)");
    h.set_layout(0, CUDA_R_32F, 8, 8, 7);
    refused(CUBLAS_STATUS_INVALID_VALUE, "A has leading dimension 7, less than its 8 rows");
    h.set_layout(1, CUDA_R_32F, 8, 8, 9);
    refused(CUBLAS_STATUS_EXECUTION_FAILED,
            "B: 284 bytes, which end 28 bytes past the end of a 256-byte device allocation");
    h.set_layout(0, CUDA_R_32F, 8, 8, 8, 2, 64);
    refused(CUBLAS_STATUS_INVALID_VALUE, "A has 2 batches, D has 1");
    h.set_layout(0, CUDA_R_16BF, 8, 8, 8);
    refused(CUBLAS_STATUS_NOT_SUPPORTED, "the types of A, B, C, D");
    h.set(0, CUBLASLT_MATRIX_LAYOUT_ORDER, CUBLASLT_ORDER_ROW);
    refused(CUBLAS_STATUS_NOT_SUPPORTED, "A is not in column order");
    h.set(0, CUBLASLT_MATRIX_LAYOUT_ORDER, CUBLASLT_ORDER_COL);
    h.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    refused(CUBLAS_STATUS_INVALID_VALUE, "bias is null");
    h.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, (void*)(bias + 4)),
        h.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    refused(CUBLAS_STATUS_EXECUTION_FAILED, "bias: 32 bytes, which end 16 bytes past the end");
    h.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_GELU_AUX),
        h.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, (void*)b.p);
    h.set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, (int64_t)12);
    refused(CUBLAS_STATUS_INVALID_VALUE, "leading dimension 12; wanted a multiple of 8");
    h.set(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, CUBLAS_COMPUTE_16F);
    refused(CUBLAS_STATUS_NOT_SUPPORTED, "the compute type is not fp32");
    h.set(CUBLASLT_MATMUL_DESC_COMPUTE_TYPE, CUBLAS_COMPUTE_32F_FAST_TF32);
    for (int i = 0; i < 3; i++) h.set_layout(i, CUDA_R_16BF, 8, 8, 8);
    refused(CUBLAS_STATUS_NOT_SUPPORTED, "the FAST compute types are for fp32 matrices");
    CHECK(multiply() == CUBLAS_STATUS_SUCCESS);
    float host[64] = {};
    CHECK(h.multiply(1, host, b, 0, d) == CUBLAS_STATUS_EXECUTION_FAILED);
    CHECK_CONTAINS(emu::last_report(), "cublasLtMatmul: A: 0x");
    CHECK(cudaDeviceSynchronize() == cudaErrorIllegalAddress);
}
TEST_CASE("cublasLt's heuristic offers algorithms that need workspace and rely on alignments") {
    Options options;
    Device<float> a(Floats(64, 1)), b(Floats(64, 1)), d(Floats(64, 0));
    Handles h;
    for (int i = 0; i < 3; i++) h.set_layout(i, CUDA_R_32F, 8, 8, 8);
    cublasLtMatmulHeuristicResult_t results[4];
    CHECK(h.heuristic(results, 4) == 1);
    uint64_t workspace = 32 << 20;
    CHECK(cublasLtMatmulPreferenceSetAttribute(h.preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                               &workspace, 8) == CUBLAS_STATUS_SUCCESS);
    CHECK(h.heuristic(results, 2) == 2);
    uint32_t mask = 0;
    size_t written = 0;
    const auto schemes = CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
    CHECK(cublasLtMatmulPreferenceGetAttribute(h.preference, schemes, &mask, 4, &written) ==
          CUBLAS_STATUS_SUCCESS);
    CHECK(mask == CUBLASLT_REDUCTION_SCHEME_MASK);
    CHECK(written == 4);
    CHECK(cublasLtMatmulPreferenceSetAttribute(h.preference, schemes, &workspace, 8) ==
          CUBLAS_STATUS_INVALID_VALUE);
    REQUIRE(h.heuristic(results, 4) == 3);
    CHECK(results[2].workspaceSize == 4 << 20);
    cublasLtMatmulHeuristicResult_t checked = {};
    auto check = [&] {
        return cublasLtMatmulAlgoCheck(h.handle, h.desc, h.layout[0], h.layout[1], h.layout[2], h.layout[2],
                                       &results[1].algo, &checked);
    };
    CHECK(check() == CUBLAS_STATUS_SUCCESS);
    CHECK(checked.workspaceSize == 1 << 20);
    cublasLtMatmulAlgo_t kept = results[1].algo;
    results[1].algo.data[0] ^= 1;
    CHECK(check() == CUBLAS_STATUS_INVALID_VALUE);
    results[1].algo = kept;
    Device<char> space(4 << 20);
    cudaMemset(space, 0, 4 << 20);
    CHECK(h.multiply(1, a, b, 0, d, &results[2].algo, space, (4 << 20) - 1) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK(h.multiply(1, a, b, 0, d, &results[2].algo, space, 4 << 20) == CUBLAS_STATUS_SUCCESS);
    CHECK(space.get()[77] == -1);  // overwritten
    h.set_layout(2, CUDA_R_32F, 8, 1, 8), h.set_layout(1, CUDA_R_32F, 8, 1, 8);
    CHECK(h.multiply(1, a, b + 1, 0, d, &results[0].algo) == CUBLAS_STATUS_INVALID_VALUE);
    CHECK_CONTAINS(emu::last_report(), "not aligned to 16 bytes as the preference promised");
    uint32_t alignment = 4;
    const auto alignment_of_b = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES;
    CHECK(cublasLtMatmulPreferenceSetAttribute(h.preference, alignment_of_b, &alignment, 4) ==
          CUBLAS_STATUS_SUCCESS);
    CHECK(h.heuristic(results, 1) == 1);
    CHECK(h.multiply(1, a, b + 1, 0, d, &results[0].algo) == CUBLAS_STATUS_SUCCESS);
    options->refused_epilogues = CUBLASLT_EPILOGUE_GELU;
    h.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_GELU_BIAS);
    CHECK(h.heuristic(results, 1, CUBLAS_STATUS_NOT_SUPPORTED) == 0);
    h.set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    CHECK(h.heuristic(results, 1) == 1);
}
TEST_CASE("cublasLtMatmul runs in its stream: in order, lazily, or as a node of a graph") {
    Options options;
    options->lazy_streams = true;
    Stream s;
    Device<float> a(Floats(64, 1)), b(Floats(64, 1)), d(Floats(64, 0));
    Handles h;
    for (int i = 0; i < 3; i++) h.set_layout(i, CUDA_R_32F, 8, 8, 8);
    const float one = 1;
    auto add = [&] {
        CHECK(launch(fill, 2, 32, 0, s, a, 2.0f) == cudaSuccess);
        cublasLtMatrixLayout_t* l = h.layout;
        CHECK(cublasLtMatmul(h.handle, h.desc, &one, a, l[0], b, l[1], &one, d, l[2], d, l[2], nullptr,
                             nullptr, 0, s) == CUBLAS_STATUS_SUCCESS);
        CHECK(launch(fill, 2, 32, 0, s, a, 9.0f) == cudaSuccess);
    };
    add();
    cudaStreamSynchronize(s);
    CHECK(d.get()[0] == 16);
    cudaGraph_t graph;
    cudaGraphExec_t run;
    cudaStreamBeginCapture(s, cudaStreamCaptureModeGlobal);
    add();
    REQUIRE(cudaStreamEndCapture(s, &graph) == cudaSuccess);
    REQUIRE(cudaGraphInstantiate(&run, graph, 0) == cudaSuccess);
    for (int i = 0; i < 2; i++) cudaGraphLaunch(run, s);
    cudaStreamSynchronize(s);
    CHECK(d.get()[0] == 48);
    cudaGraphExecDestroy(run), cudaGraphDestroy(graph);
}

// ---------------------------------------------------------------------------------------------
// Speed: build/test_emulator --no-skip --test-case='speed*'

__global__ void many_shuffles(float* out, int n) {
    float v = (float)threadIdx.x;
    for (int i = 0; i < n; i++) v = __shfl_xor_sync(0xffffffffu, v, 1);
    out[blockIdx.x * blockDim.x + threadIdx.x] = v;
}
__global__ void many_barriers(float* out, int n) {
    for (int i = 0; i < n; i++) __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = 0;
}
__global__ void many_mma(float* out, int n) {
    uint32_t a[4] = {}, b[2] = {};
    float d[4] = {};
    for (int i = 0; i < n; i++) emu::mma_m16n8k16_bf16(d, a, b, d);
    out[blockIdx.x * blockDim.x + threadIdx.x] = d[0];
}
TEST_CASE("speed: prints how fast launches, threads, switches and products are" * doctest::skip()) {
    const size_t n = 1 << 22;
    Device<float> x(n), y(n);
    auto time = [](const char* what, double count, const char* unit, auto f) {
        f();
        double best = 1e9;
        for (int i = 0; i < 3; i++) {
            auto start = std::chrono::steady_clock::now();
            f();
            best = std::min(best,
                            std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
        }
        printf("%-44s %8.1f %s\n", what, count / best, unit);
    };
    time("launches of one small block", 1e-3, "thousand/s",
         [&] { launch(fill, 1, 32, 0, nullptr, x, 1.0f); });
    time("CUDA threads without barriers", (double)n * 1e-6, "million/s",
         [&] { launch(fill, n / 256, 256, 0, nullptr, x, 1.0f); });
    time("lanes through shuffles", 64 * 256 * 100 * 1e-6, "million/s",
         [&] { launch(many_shuffles, 64, 256, 0, nullptr, x, 100); });
    time("threads through __syncthreads", 64 * 256 * 100 * 1e-6, "million/s",
         [&] { launch(many_barriers, 64, 256, 0, nullptr, x, 100); });
    time("mma.m16n8k16", 64 * 4 * 100 * 4096e-9, "GFLOP/s",
         [&] { launch(many_mma, 64, 128, 0, nullptr, x, 100); });
    Handles h;
    h.set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    h.set_layout(0, CUDA_R_32F, 768, 3072, 768), h.set_layout(1, CUDA_R_32F, 768, 256, 768),
        h.set_layout(2, CUDA_R_32F, 3072, 256, 3072);
    time("cublasLtMatmul, fp32, 3072 x 256 x 768", 2e-9 * 3072 * 256 * 768, "GFLOP/s",
         [&] { h.multiply(1, x, x, 0, y); });
    h.set_layout(0, CUDA_R_16BF, 768, 3072, 768), h.set_layout(1, CUDA_R_16BF, 768, 256, 768),
        h.set_layout(2, CUDA_R_16BF, 3072, 256, 3072);
    time("cublasLtMatmul, bf16, 3072 x 256 x 768", 2e-9 * 3072 * 256 * 768, "GFLOP/s",
         [&] { h.multiply(1, x, x, 0, y); });
}

}  // namespace
