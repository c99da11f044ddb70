// test_gpu_util.h - shared by the tests of train_gpt2.cu: arrays in device memory, tolerances, runs under
// every schedule.
//
// The tests are compiled twice, with floatX bf16 and (PRECISION_FP32) float; as C++ for dev/emulator, and by
// nvcc for a device. The CPU's function gets inputs rounded to floatX, so that the comparison is of the
// computation and not of the rounding of inputs.
#pragma once

#include <doctest/doctest.h>

#include <functional>

#include "dev/test_util.h"
#include "train_gpt2.cpp"
#include "train_gpt2.cu"

namespace gpu_test {

using gpu::floatX;
using Values = std::vector<float>;

// Allowed relative L2 errors: of results that are stored as floatX (bf16 has 8 bits, so rounding alone
// makes 1.7e-3), and of results that are floats in every build. The emulator's exponentials and divisions are
// exact to the last place. A device's are not, and in the bf16 build they are fast approximations. In a
// sanitizer's build the CPU's sums are less exact: it adds long rows one number after another.
#if defined(EMULATOR) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr double FLOAT_TOLERANCE = 2e-6, BF16_TOLERANCE = 2.5e-3;
#else
constexpr double FLOAT_TOLERANCE = 1e-5, BF16_TOLERANCE = 3e-3;
#endif
constexpr double X_TOLERANCE = gpu::BUILD_DTYPE == BF16 ? BF16_TOLERANCE : FLOAT_TOLERANCE;

inline float as_float(float x) { return x; }
inline float as_float(__nv_bfloat16 x) { return bf16_to_float(__nv_bfloat16_raw(x).x); }
inline floatX as_floatX(float x) {
#if defined(PRECISION_FP32)
    return x;
#else
    __nv_bfloat16_raw r;
    r.x = float_to_bf16(x);
    return r;
#endif
}
// The nearest values of type floatX.
inline Values rounded(Values x) {
    for (float& f : x) f = as_float(as_floatX(f));
    return x;
}

// n normal numbers that depend on nothing but `seed`.
inline Values normals(size_t n, uint64_t seed, double scale = 1, double mean = 0) {
    Values x(n);
    rng::Key key(seed, 0, rng::SAMPLE);
    for (size_t i = 0; i < n; i++) x[i] = (float)(mean + scale * key.normal(i));
    return x;
}
// The same, rounded to floatX.
inline Values normals_x(size_t n, uint64_t seed, double scale = 1, double mean = 0) {
    return rounded(normals(n, seed, scale, mean));
}

// An array in device memory. Constructed from a size it holds NaN, so that elements that a kernel fails to
// write are found.
template <class T>
class Device {
  public:
    explicit Device(size_t n) : n_(n) {
        CUDA_CHECK(cudaMalloc((void**)&p_, std::max<size_t>(n, 1) * sizeof(T)));
        CUDA_CHECK(cudaMemset(p_, 0xff, n * sizeof(T)));
    }
    explicit Device(const std::vector<T>& x) : Device(x.size()) { set(x); }
    // From floats, rounded to T.
    template <class U = T,
              std::enable_if_t<!std::is_same<U, float>::value && std::is_same<U, floatX>::value, int> = 0>
    explicit Device(const Values& x) : Device(x.size()) {
        std::vector<T> t(x.size());
        for (size_t i = 0; i < x.size(); i++) t[i] = as_floatX(x[i]);
        set(t);
    }
    ~Device() { cudaFree(p_); }
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    operator T*() { return p_; }
    void set(const std::vector<T>& x) {
        CUDA_CHECK(cudaMemcpy(p_, x.data(), n_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    std::vector<T> get() const {
        std::vector<T> x(n_);
        CUDA_CHECK(cudaMemcpy(x.data(), p_, n_ * sizeof(T), cudaMemcpyDeviceToHost));
        return x;
    }
    // Its elements as floats.
    Values values() const {
        std::vector<T> x = get();
        Values f(n_);
        for (size_t i = 0; i < n_; i++) f[i] = as_float(x[i]);
        return f;
    }

  private:
    T* p_ = nullptr;
    size_t n_;
};

// Gives a variable another value as long as it lives.
template <class T>
struct Temporarily {
    T& variable;
    const T before;
    template <class V>
    Temporarily(T& v, V value) : variable(v), before(v) {
        variable = value;
    }
    ~Temporarily() { variable = before; }
    Temporarily(const Temporarily&) = delete;
    Temporarily& operator=(const Temporarily&) = delete;
};

// Reads and writes a model's state, in the file's order.
template <class Model>
Values get_state(Model& m, State s) {
    Values to;
    m.each_piece(s, [&](const float* p, size_t n) { to.insert(to.end(), p, p + n); });
    return to;
}
template <class Model>
void set_state(Model& m, State s, const Values& from) {
    const float* at = from.data();
    m.each_piece(s, [&](float* p, size_t n) { memcpy(p, at, n * sizeof(float)), at += n; });
}
// Reorders an array of all parameters from the file's order to memory's, and back.
inline Values to_memory(const Config& c, const Values& file) {
    Values memory(file.size());
    for (const ParamPiece& p : param_pieces(c)) std::copy_n(&file[p.file], p.size, &memory[p.memory]);
    return memory;
}
inline Values to_file(const Config& c, const Values& memory) {
    Values file(memory.size());
    for (const ParamPiece& p : param_pieces(c)) std::copy_n(&memory[p.memory], p.size, &file[p.file]);
    return file;
}

inline bool same_bits(const Values& a, const Values& b) {
    return a.size() == b.size() && (a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

// Calls `run`, which creates its inputs and returns its outputs, under every schedule of the emulator, or
// twice on a device, and checks that the outputs are the same bits each time. Returns them. (One run under
// ThreadSanitizer, which is slow, and finds races under any schedule.)
inline std::vector<Values> repeatable(const std::function<std::vector<Values>()>& run) {
    std::vector<Values> first = run();
    auto again = [&](const char* how) {
        std::vector<Values> other = run();
        for (size_t i = 0; i < first.size(); i++)
            CHECK_MESSAGE(same_bits(first[i], other[i]), "output ", i, " differs between runs: ", how);
    };
#if defined(__SANITIZE_THREAD__)
    (void)again;
#elif defined(EMULATOR)
    emu::Options before = emu::options();
    emu::options().schedule = emu::DESCENDING;
    again("descending order");
    emu::options().schedule = emu::RANDOM, emu::options().lazy_streams = true;
    again("random order, lazy streams");
    emu::options() = before;
#else
    again("second run");
#endif
    return first;
}

inline void check_x(const std::string& what, const Values& got, const Values& want) {
    REQUIRE(got.size() == want.size());
    check_close(what, got.data(), want.data(), got.size(), X_TOLERANCE);
}
inline void check_float(const std::string& what, const Values& got, const Values& want) {
    REQUIRE(got.size() == want.size());
    check_close(what, got.data(), want.data(), got.size(), FLOAT_TOLERANCE);
}

// One site's dropout for both models: the same seed, step, layer and position of the batch within the step.
struct Masks {
    static constexpr uint64_t SEED = 0x123456789abcdefull, SEQ0 = 3;
    static constexpr uint32_t STEP = 7, LAYER = 2;
    float p;
    rng::Stream site;
    Device<gpu::StepState> state;
    Masks(float p_, rng::Stream site_, float grad_scale = 1)
        : p(p_), site(site_), state(std::vector<gpu::StepState>{gpu::StepState{SEQ0, STEP, grad_scale}}) {}
    gpu::Dropout gpu() { return {p, SEED, site, LAYER, p > 0 ? (gpu::StepState*)state : nullptr}; }
    cpu::Dropout cpu() const { return {p, rng::Key(SEED, STEP, site, LAYER)}; }
};

}  // namespace gpu_test
