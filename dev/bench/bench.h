// bench.h - shared by the benchmarks: a clock, medians, and measurements of the machine's peak rates.
#pragma once

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "lib/machine.h"
#include "lib/vec.h"

namespace bench {

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Measured values, in ascending order.
struct Samples {
    std::vector<double> v;
    void add(double x) { v.insert(std::upper_bound(v.begin(), v.end(), x), x); }
    bool empty() const { return v.empty(); }
    double median() const {
        return v.empty() ? NAN : v.size() % 2 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
    }
    double min() const { return v.empty() ? NAN : v.front(); }
    double max() const { return v.empty() ? NAN : v.back(); }
};

#ifdef __AVX512BF16__
constexpr bool BF16_DOT = true;
#else
constexpr bool BF16_DOT = false;
#endif

// Hides a value from the optimiser, which otherwise sees that all chains below compute the same.
template <class T>
void hide(T& x) {
    __asm__ volatile("" : "+m"(x));
}

// Runs f(thread) on n threads, which start together after a barrier; returns the seconds of the slowest.
template <class F>
double seconds_on(int n, F f) {
    double t = 0;
#pragma omp parallel num_threads(n) reduction(max : t)
    {
#pragma omp barrier
        double t0 = now();
        f((size_t)omp_get_thread_num());
        t = now() - t0;
    }
    return t;
}

// The number of independent chains of operations in registers. To keep all ports busy there must be at least
// as many as the latency times the number of ports, which is less than 16 on the known cores.
constexpr int CHAINS = 16;
constexpr size_t CHAIN_STEPS = 1 << 20;

// FLOP/s of fp32 multiply-adds on n threads; one sample, which takes about 10 ms.
inline double fma_flops(int n) {
    double t = seconds_on(n, [](size_t) {
        simd::vec x{}, y{}, acc[CHAINS] = {};
        hide(x), hide(y), hide(acc);
        for (size_t k = 0; k < CHAIN_STEPS; k++) {
            UNROLL(16)
            for (int i = 0; i < CHAINS; i++) acc[i] = acc[i] * x + y;
        }
        hide(acc);
    });
    return n * 2.0 * simd::VL * CHAINS * CHAIN_STEPS / t;
}

// FLOP/s of bf16 dot products that are accumulated in fp32 (vdpbf16ps); 0 if the machine has none.
inline double bf16_flops([[maybe_unused]] int n) {
#ifdef __AVX512BF16__
    double t = seconds_on(n, [](size_t) {
        __m512bh x = (__m512bh)_mm512_setzero_si512(), y = x;
        __m512 acc[CHAINS] = {};
        hide(x), hide(y), hide(acc);
        for (size_t k = 0; k < CHAIN_STEPS; k++) {
            UNROLL(16)
            for (int i = 0; i < CHAINS; i++) acc[i] = _mm512_dpbf16_ps(acc[i], x, y);
        }
        hide(acc);
    });
    return n * 2.0 * 32 * CHAINS * CHAIN_STEPS / t;
#else
    return 0;
#endif
}

// Memory bandwidth in bytes/s, on arrays of 256 MiB: read() reads one array; update() has AdamW's pattern,
// which reads four arrays and writes three of them.
struct Memory {
    static constexpr size_t N = 64 << 20;
    float* a[4];
    Memory() {
        for (float*& p : a) p = (float*)machine::allocate(N * 4, "benchmark");
        for (float* p : a)
#pragma omp parallel for schedule(static)
            for (size_t i = 0; i < N; i++) p[i] = 1.0f;
    }
    ~Memory() {
        for (float* p : a) machine::release(p, N * 4);
    }
    double read(int n) const {
        const float* p = a[0];
        return 4.0 * N / seconds_on(n, [=](size_t t) {
                   simd::vec sum[4] = {}, x[4];
                   for (size_t i = N / n * t; i < N / n * (t + 1); i += 4 * simd::VL) {
                       memcpy(x, p + i, sizeof x);
                       for (int j = 0; j < 4; j++) sum[j] += x[j];
                   }
                   hide(sum);
               });
    }
    double update(int n) const {
        float* __restrict w = a[0], * __restrict m = a[1], * __restrict v = a[2];
        const float* __restrict g = a[3];
        return 7 * 4.0 * N / seconds_on(n, [=](size_t t) {
#pragma omp simd
                   for (size_t i = N / n * t; i < N / n * (t + 1); i++)
                       m[i] = 0.9f * m[i] + 0.1f * g[i], v[i] = 0.9f * v[i] + 0.1f * g[i],
                       w[i] -= 1e-9f * m[i] * v[i];
               });
    }
};

}  // namespace bench
