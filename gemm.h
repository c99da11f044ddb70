// gemm.h - the CPU's matrix product, fp32:  C = A B (+ bias, or + C), then an epilogue while C is in cache.
//
// A and B are read through two strides each, so that one routine serves the three products of a
// linear layer: Y = X W^T + b, dX = dY W, dW += dY^T X. The scheme is GotoBLAS's (Goto and van de Geijn,
// "Anatomy of High-Performance Matrix Multiplication", 2008):
//   - B is packed once, by all threads, into panels of NR columns; it stays in the last-level cache;
//   - each thread takes a block of rows, packs MC x KC of A for its L2 cache,
//   - and walks it with a micro-kernel that holds an MR x NR tile of C in registers.
// Each element of C is summed over k in one fixed order whatever the number of threads or the place of
// the element in C. The widths follow the compiler's target (-march): AVX-512, AVX2, or 128-bit vectors.
//
// What it does not promise: the summation order of another machine, or speed for M < 4 (see multiply_few).
#pragma once

#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "io.h"

namespace gemm {

#if defined(__AVX512F__)
constexpr size_t VL = 16, MR = 6, NV = 4;
#elif defined(__AVX__)
constexpr size_t VL = 8, MR = 6, NV = 2;
#else
constexpr size_t VL = 4, MR = 6, NV = 2;
#endif
constexpr size_t NR = NV * VL;
constexpr size_t MC = 96, KC = 256;            // A block: 96 KiB, half of a small L2
constexpr size_t SHARED_FLOATS = 2 << 20;      // packed B: 8 MiB of last-level cache
constexpr size_t SHARED_COLUMNS = 4096;        // widest packed B

typedef float vec __attribute__((vector_size(VL * sizeof(float))));
typedef float vec4 __attribute__((vector_size(16)));

inline size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Zeroed memory on huge pages where the system grants them; aligned to 64 bytes at least. Never returns null.
inline void* allocate(size_t bytes, const char* what) {
    size_t n = round_up(std::max<size_t>(bytes, 1), 2 << 20);
    void* p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) fail("out of memory: %s needs %s", what, human_bytes((double)bytes).c_str());
#ifdef MADV_HUGEPAGE
    madvise(p, n, MADV_HUGEPAGE);
#endif
    return p;
}
inline void release(void* p, size_t bytes) {
    if (p) munmap(p, round_up(std::max<size_t>(bytes, 1), 2 << 20));
}

// Copies n vectors of kc floats, element (r, k) = src[r*sr + k*sk], into panels of R vectors, k by k; the
// last panel is filled up with zeros. Panel r/R starts at dst + r*kc.
template <size_t R>
inline void pack(float* dst, const float* src, size_t sr, size_t sk, size_t n, size_t kc) {
    for (size_t r0 = 0; r0 < n; r0 += R, dst += R * kc) {
        const float* s = src + r0 * sr;
        size_t w = std::min(R, n - r0);
        if (w < R) memset(dst, 0, R * kc * sizeof(float));
        if (sr == 1) {
            if (w == R)
                for (size_t k = 0; k < kc; k++) memcpy(dst + k * R, s + k * sk, R * sizeof(float));
            else
                for (size_t k = 0; k < kc; k++) memcpy(dst + k * R, s + k * sk, w * sizeof(float));
            continue;
        }
        size_t r = 0;
        for (; sk == 1 && r + 4 <= w; r += 4) {  // 4 x 4 blocks turned in registers
            const float *s0 = s + r * sr, *s1 = s0 + sr, *s2 = s1 + sr, *s3 = s2 + sr;
            float* d = dst + r;
            size_t k = 0;
            for (; k + 4 <= kc; k += 4, d += 4 * R) {
                typedef int idx __attribute__((vector_size(16)));
                vec4 a, b, c, e;
                memcpy(&a, s0 + k, 16), memcpy(&b, s1 + k, 16), memcpy(&c, s2 + k, 16), memcpy(&e, s3 + k, 16);
                vec4 ab0 = __builtin_shuffle(a, b, idx{0, 4, 1, 5}), ab1 = __builtin_shuffle(a, b, idx{2, 6, 3, 7});
                vec4 ce0 = __builtin_shuffle(c, e, idx{0, 4, 1, 5}), ce1 = __builtin_shuffle(c, e, idx{2, 6, 3, 7});
                vec4 o[4] = {__builtin_shuffle(ab0, ce0, idx{0, 1, 4, 5}), __builtin_shuffle(ab0, ce0, idx{2, 3, 6, 7}),
                             __builtin_shuffle(ab1, ce1, idx{0, 1, 4, 5}), __builtin_shuffle(ab1, ce1, idx{2, 3, 6, 7})};
                for (size_t q = 0; q < 4; q++) memcpy(d + q * R, &o[q], 16);
            }
            for (; k < kc; k++, d += R) d[0] = s0[k], d[1] = s1[k], d[2] = s2[k], d[3] = s3[k];
        }
        for (; r < w; r++)
            for (size_t k = 0; k < kc; k++) dst[k * R + r] = s[r * sr + k * sk];
    }
}

// tile (MR,NR) = sum over k of a[k*MR + i] * b[k*NR + j]. Not inlined: among the variables of a caller the compiler
// runs out of registers and spills the accumulators, which costs a third of the speed.
__attribute__((noinline)) inline void micro_kernel(size_t kc, const float* __restrict a, const float* __restrict b, float* __restrict tile) {
    vec acc[MR][NV] = {};
    for (size_t k = 0; k < kc; k++, a += MR, b += NR) {
        vec bv[NV];
#pragma GCC unroll 8
        for (size_t j = 0; j < NV; j++) memcpy(&bv[j], b + j * VL, sizeof(vec));
#pragma GCC unroll 8
        for (size_t i = 0; i < MR; i++)
#pragma GCC unroll 8
            for (size_t j = 0; j < NV; j++) acc[i][j] += a[i] * bv[j];
    }
#pragma GCC unroll 8
    for (size_t i = 0; i < MR; i++)
#pragma GCC unroll 8
        for (size_t j = 0; j < NV; j++) memcpy(tile + i * NR + j * VL, &acc[i][j], sizeof(vec));
}

// An epilogue sees each finished piece of a row once: n values c[0..n) of row `row`, from column `col` on.
struct NoEpilogue {
    void operator()(size_t, size_t, size_t, float*) const {}
};

// B (K,N) packed by pack_b: blocks of KC rows, each in panels of NR columns.
struct PackedB {
    const float* data;
    size_t K, N;
    const float* panel(size_t k0, size_t n0) const {
        return data + k0 * round_up(N, NR) + n0 * std::min(KC, K - k0);
    }
    static size_t floats(size_t K, size_t N) { return K * round_up(N, NR); }
};

// Packs element (k, n) = src[k*sk + n*sn]; dst holds PackedB::floats(K, N).
inline PackedB pack_b(float* dst, const float* src, size_t sk, size_t sn, size_t K, size_t N) {
    for (size_t k0 = 0; k0 < K; k0 += KC)
        pack<NR>(dst + k0 * round_up(N, NR), src + k0 * sk, sn, sk, N, std::min(KC, K - k0));
    return {dst, K, N};
}

// How the first sum enters C: over what stands there, onto it, or onto the bias.
enum Start { OVERWRITE, ACCUMULATE };

// One thread: C (M,N) = A (M,K) times the first K rows and N columns of B. apack holds MC*KC floats.
// epi runs where `last` says that these are the final K.
template <class Epilogue = NoEpilogue>
inline void multiply_rows(size_t M, size_t N, size_t K, const float* A, size_t sm, size_t sk, const PackedB& B, float* C,
                          size_t ldc, Start start, float* apack, const float* bias = nullptr, size_t row0 = 0,
                          size_t col0 = 0, bool last = true, Epilogue epi = {}) {
    alignas(64) float tile[MR * NR];
    for (size_t m0 = 0; m0 < M; m0 += MC) {
        size_t mc = std::min(MC, M - m0);
        for (size_t k0 = 0; k0 < K; k0 += KC) {
            size_t kc = std::min(KC, K - k0);
            bool first = k0 == 0 && start == OVERWRITE, final_k = last && k0 + kc == K;
            pack<MR>(apack, A + m0 * sm + k0 * sk, sm, sk, mc, kc);
            for (size_t n = 0; n < N; n += NR) {
                size_t nc = std::min(NR, N - n);
                const float* b = B.panel(k0, n);
                for (size_t i = 0; i < mc; i += MR) {
                    micro_kernel(kc, apack + i * kc, b, tile);
                    size_t rows = std::min(MR, mc - i);
                    for (size_t r = 0; r < rows; r++) {
                        float *c = C + (m0 + i + r) * ldc + n, *t = tile + r * NR;
                        if (nc == NR) {  // the common case, with a length the compiler knows
                            if (!first)
                                for (size_t j = 0; j < NR; j++) c[j] += t[j];
                            else if (bias)
                                for (size_t j = 0; j < NR; j++) c[j] = bias[n + j] + t[j];
                            else
                                for (size_t j = 0; j < NR; j++) c[j] = t[j];
                        } else {
                            for (size_t j = 0; j < nc; j++) c[j] = t[j] + (!first ? c[j] : bias ? bias[n + j] : 0.0f);
                        }
                        if (final_k) epi(row0 + m0 + i + r, col0 + n, nc, c);
                    }
                }
            }
        }
    }
}

// Starts the program again with threads that wait asleep after a short spin, unless the user chose otherwise. By
// default they spin for milliseconds, which on a busy machine takes the time from the thread they wait for. The
// OpenMP runtime reads the setting before main() begins, hence the second start. Call it first in main().
inline void spin_less(char** argv) {
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0 || getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;
    self[n] = 0;
    setenv("GOMP_SPINCOUNT", "2000", 1);
    execv(self, argv);  // should it fail, all goes on as it is
}

// Scratch memory of multiply(), made once for the largest number of threads seen.
struct Workspace {
    float *shared = nullptr, *private_ = nullptr;
    int threads = 0;
    static size_t bytes(int threads) { return (SHARED_FLOATS + (size_t)threads * MC * KC) * sizeof(float); }
    void reserve(int n) {
        if (n <= threads) return;
        release(shared, bytes(threads));
        shared = (float*)allocate(bytes(n), "scratch memory of the matrix product");
        private_ = shared + SHARED_FLOATS, threads = n;
    }
};
inline Workspace& workspace() {
    static Workspace w;
    return w;
}

// All threads: C (M,N) = A (M,K) B (K,N), with A(m,k) = A[m*am + k*ak], B(k,n) = B[k*bk + n*bn], C row-major
// with row stride ldc. start ACCUMULATE adds to C; bias (N) or null is added to an overwritten C.
template <class Epilogue = NoEpilogue>
inline void multiply(size_t M, size_t N, size_t K, const float* A, size_t am, size_t ak, const float* B, size_t bk, size_t bn,
                     float* C, size_t ldc, Start start = OVERWRITE, const float* bias = nullptr, Epilogue epi = {}) {
    if (!M || !N || !K) return;
    Workspace& ws = workspace();
    ws.reserve(omp_get_max_threads());
    size_t nt = omp_get_max_threads();
    size_t ns_max = std::min(round_up(N, NR), round_up(SHARED_COLUMNS, NR));
    size_t ks_max = std::max(KC, SHARED_FLOATS / ns_max / KC * KC);
    size_t blocks = round_up((M + MC - 1) / MC, nt);  // a whole number of blocks for each thread
    size_t rows = std::min(MC, round_up((M + blocks - 1) / blocks, MR));
    blocks = (M + rows - 1) / rows;
#pragma omp parallel
    for (size_t n0 = 0; n0 < N; n0 += ns_max)
        for (size_t k0 = 0; k0 < K; k0 += ks_max) {
            size_t ns = std::min(ns_max, N - n0), ks = std::min(ks_max, K - k0), np = round_up(ns, NR);
            size_t panels = np / NR, kblocks = (ks + KC - 1) / KC;
#pragma omp for schedule(static)
            for (size_t p = 0; p < panels * kblocks; p++) {
                size_t kb = p / panels * KC, n = p % panels * NR, kc = std::min(KC, ks - kb);
                pack<NR>(ws.shared + kb * np + n * kc, B + (k0 + kb) * bk + (n0 + n) * bn, bn, bk, std::min(NR, ns - n), kc);
            }
            PackedB packed = {ws.shared, ks, ns};
            float* apack = ws.private_ + (size_t)omp_get_thread_num() * MC * KC;
#pragma omp for schedule(dynamic, 1)
            for (size_t b = 0; b < blocks; b++) {
                size_t m = b * rows;
                multiply_rows(std::min(rows, M - m), ns, ks, A + m * am + k0 * ak, am, ak, packed, C + m * ldc + n0, ldc,
                              k0 ? ACCUMULATE : start, apack, bias ? bias + n0 : nullptr, m, n0, k0 + ks == K, epi);
            }
        }
}

// Y (M,N) = X (M,K) W^T (N,K) + bias for M of 1 to 8 rows (generation): each row of W is read once.
inline void multiply_few(size_t M, size_t N, size_t K, const float* X, const float* W, float* Y, size_t ldy, const float* bias) {
    constexpr size_t MAX = 8, W8 = 32;
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n++) {
        const float* w = W + n * K;
        for (size_t m0 = 0; m0 < M; m0 += MAX) {
            size_t mc = std::min(MAX, M - m0);
            for (size_t m = 0; m < mc; m++) {
                const float* x = X + (m0 + m) * K;
                float acc[W8] = {};
                size_t k = 0;
                for (; k + W8 <= K; k += W8)
                    for (size_t j = 0; j < W8; j++) acc[j] += w[k + j] * x[k + j];
                float sum = 0;
                for (; k < K; k++) sum += w[k] * x[k];
                for (size_t h = W8 / 2; h; h /= 2)
                    for (size_t j = 0; j < h; j++) acc[j] += acc[j + h];
                Y[(m0 + m) * ldy + n] = sum + acc[0] + (bias ? bias[n] : 0.0f);
            }
        }
    }
}

// The machine's fp32 peak in FLOP/s: the micro-kernel on operands in L1, all threads at once, best of 5.
inline double measure_peak_flops() {
    double best = 0;
    size_t nt = omp_get_max_threads();
    constexpr size_t kc = 64, reps = 4000;
    for (int trial = 0; trial < 5; trial++) {
        double t = 0;
#pragma omp parallel reduction(max : t)
        {
            alignas(64) float a[MR * kc] = {}, b[NR * kc] = {}, tile[MR * NR];
#pragma omp barrier
            auto t0 = std::chrono::steady_clock::now();
            for (size_t r = 0; r < reps; r++) {
                micro_kernel(kc, a, b, tile);
                __asm__ volatile("" : : "r"(tile) : "memory");
            }
            t = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
        }
        best = std::max(best, 2.0 * MR * NR * kc * reps * (double)nt / t);
    }
    return best;
}

}  // namespace gemm
