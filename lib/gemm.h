// gemm.h - the CPU's matrix product:  C = A B (+ bias, or + C), then an epilogue while C is in cache.
//
// A and B are read through two strides each, so that one routine serves the three products of a linear layer:
// Y = X W^T + b, dX = dY W, dW += dY^T X. Operands are fp32 or bf16 in memory and fp32 or bf16 in the product; sums are
// fp32. The scheme is GotoBLAS's (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008):
//   - the longer side of C is cut into blocks, the threads' tasks; the operand of the other side is shared by them, in
//     panels that stay in the last-level cache, each packed by whoever needs it first;
//   - a task packs its own operand for its L2 cache, KC values of k at a time, where it can in the course of its first tiles,
//   - and walks both with a micro-kernel that holds a tile of C, up to MR x NR, in registers;
//   - rows of A that are what the micro-kernel reads, value by value, are not packed at all; where the columns of C are divided, tiles then
//     have half the rows and twice the columns on AVX-512, which asks for fewer loads.
// Each element of C is summed over k in one fixed order, whatever the number of threads or its place in C. The widths
// follow the compiler's target (-march): AVX-512, AVX2, NEON, or other 128-bit vectors.
//
// bf16 products use the dot product of pairs (AVX512_BF16) where the target has it. Elsewhere the operands are rounded
// to bf16 in the same way and multiplied as floats: the same numbers but for the order of a sum.
//
// What it does not promise: the summation order of another machine, or speed for M < 8 (see multiply_few).
#pragma once

#include <omp.h>
#include <sys/mman.h>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <type_traits>
#include <utility>

#include "io.h"

namespace gemm {

#if defined(__AVX512F__)
constexpr size_t VL = 16, MR = 14, L1_WAYS = 8;
#elif defined(__AVX__)
constexpr size_t VL = 8, MR = 6, L1_WAYS = 8;
#elif defined(__aarch64__)  // NEON: 32 registers
constexpr size_t VL = 4, MR = 12, L1_WAYS = 4;
#else
constexpr size_t VL = 4, MR = 6, L1_WAYS = 8;
#endif
constexpr bool MANY_REGISTERS = MR >= 12;  // 32, else 16
constexpr size_t NV = 2, NR = NV * VL;
constexpr bool WIDE_TILES = VL == 16;      // tiles of up to MR / 2 x 2 NR too
constexpr size_t KC = 512;                 // units of k in one packed block
constexpr size_t MB = 8 * MR, NB = 128;    // largest task: rows or columns; with KC a third of a 1 MiB L2
constexpr size_t SHARED_UNITS = 2 << 20;   // the packed operand of all threads: 8 MiB of last-level cache
constexpr size_t SHARED_WIDTH = 1344;      // its most rows or columns; a multiple of every panel's width
constexpr size_t WORTH_WAKING = 1 << 17;   // multiplications from which a product is made by all threads
constexpr size_t LINE = 64 / sizeof(float);  // floats in a line of the caches
constexpr size_t L1_WAY = 4096;            // bytes after which an address falls on the same set of the L1 cache, which holds L1_WAYS lines, or more
constexpr size_t STREAMED = 1 << 20;       // values of C from which FOR_LATER goes past the caches

typedef float vec __attribute__((vector_size(VL * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(VL * sizeof(float))));
typedef uint16_t bf16;

constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
constexpr size_t ceil_div(size_t n, size_t by) { return (n + by - 1) / by; }

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

// ---------------------------------------------------------------------------------------------
// Vectors

// The first n of VL values, the rest `beyond`.
inline vec load(const float* p, size_t n = VL, float beyond = 0) {
    vec v = vec{} + beyond;
    if (n >= VL) memcpy(&v, p, sizeof v);
#if defined(__AVX512F__)
    else v = (vec)_mm512_mask_loadu_ps((__m512)v, (__mmask16)((1u << n) - 1), p);
#else
    else memcpy(&v, p, n * sizeof(float));
#endif
    return v;
}
inline void store(float* p, vec v, size_t n = VL) {
    if (n >= VL) memcpy(p, &v, sizeof v);
#if defined(__AVX512F__)
    else _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    else memcpy(p, &v, n * sizeof(float));
#endif
}
// The same past the caches, for what is not read again soon; p aligned to a vector. finish_streams() makes it visible.
#if defined(__AVX512F__)
inline void stream(float* p, vec v) { _mm512_stream_ps(p, (__m512)v); }
#elif defined(__AVX__)
inline void stream(float* p, vec v) { _mm256_stream_ps(p, (__m256)v); }
#elif defined(__SSE__)
inline void stream(float* p, vec v) { _mm_stream_ps(p, (__m128)v); }
#else
inline void stream(float* p, vec v) { store(p, v); }
#endif
inline void finish_streams() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}
// The larger, or the smaller, of x and a bound; NaN in x stays NaN.
inline vec at_least(vec x, vec low) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)x);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)low, (__m256)x);
#elif defined(__SSE__)
    return (vec)_mm_max_ps((__m128)low, (__m128)x);
#else
    return x < low ? low : x;
#endif
}
inline vec at_most(vec x, vec high) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)x);
#elif defined(__AVX__)
    return (vec)_mm256_min_ps((__m256)high, (__m256)x);
#elif defined(__SSE__)
    return (vec)_mm_min_ps((__m128)high, (__m128)x);
#else
    return x > high ? high : x;
#endif
}
inline vec sqrt(vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX__)
    return (vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE__)
    return (vec)_mm_sqrt_ps((__m128)x);
#else
    for (size_t i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}
// Across the lanes, halves at a time.
inline float sum(vec v) {
    for (size_t h = VL / 2; h; h /= 2)
        for (size_t i = 0; i < h; i++) v[i] += v[i + h];
    return v[0];
}
// Of VL vectors at once: lane i of v[0] becomes the sum across v[i], summed in the same order.
template <size_t H = VL / 2>
inline __attribute__((always_inline)) void sum_each(vec* v) {
    ivec low, high;  // of each 2H lanes of a vector, the lower H of it and of the one H further on
    for (size_t j = 0; j < VL; j++) low[j] = (int)(j / (2 * H) * 2 * H + j % H + j / H % 2 * VL), high[j] = low[j] + (int)H;
#pragma GCC unroll 16
    for (size_t i = 0; i < H; i++) v[i] = __builtin_shuffle(v[i], v[i + H], low) + __builtin_shuffle(v[i], v[i + H], high);
    if constexpr (H > 1) sum_each<H / 2>(v);
}
inline float max(vec v) {
    for (size_t h = VL / 2; h; h /= 2)
        for (size_t i = 0; i < h; i++) v[i] = std::max(v[i], v[i + h]);
    return v[0];
}
// bf16 to float: the bits become the upper half.
inline vec load(const bf16* p, size_t n = VL) {
    ivec v;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    __m256i h = n >= VL ? _mm256_loadu_si256((const __m256i*)p) : _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    v = (ivec)_mm512_maskz_cvtepu16_epi32(0xffff, h);
#else
    for (size_t i = 0; i < VL; i++) v[i] = i < n ? p[i] : 0;
#endif
    return (vec)(v << 16);
}
// Each value rounded to the nearest bf16, ties to even; NaN stays NaN. The lower half of the result is 0.
inline vec round_to_bf16(vec x) {
    typedef uint32_t uvec __attribute__((vector_size(sizeof(vec))));
    uvec u = (uvec)x, rounded = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
    uvec nan = (uvec)((ivec)(u & 0x7fffffffu) > 0x7f800000);
    return (vec)((rounded & ~nan) | (((u & 0xffff0000u) | 0x400000u) & nan));
}
// The first n of VL values, each rounded to bf16.
inline void store(bf16* p, vec v, size_t n = VL) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    __m256i h = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    if (n >= VL) _mm256_storeu_si256((__m256i*)p, h);
    else _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), h);
#else
    ivec bits = (ivec)round_to_bf16(v) >> 16;
    for (size_t i = 0; i < std::min(n, VL); i++) p[i] = (bf16)bits[i];
#endif
}

// Turns a VL x VL block: value j of v[i] changes place with value i of v[j].
template <size_t H = 2>
inline __attribute__((always_inline)) void transpose(vec* v) {
    ivec low, high;  // rows H apart are interleaved: by value within four lanes, 4 x 4 blocks being turned so, then by fours
    constexpr size_t FOURS = VL / 4;
    for (size_t j = 0; j < VL; j++) {
        size_t f = j / 4, i = j % 4;
        low[j] = (int)(H < 4 ? i % 2 * VL + 4 * f + i / 2 : 2 * f / FOURS * VL + 2 * f % FOURS * 4 + i);
        high[j] = low[j] + (H < 4 ? 2 : 4);
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < VL; i++)
        if (!(i & H)) {
            vec a = v[i], b = v[i + H];
            v[i] = __builtin_shuffle(a, b, low), v[i + H] = __builtin_shuffle(a, b, high);
        }
    constexpr size_t NEXT = H == 2 ? 1 : H == 1 ? 4 : 2 * H;
    if constexpr (NEXT < VL) transpose<NEXT>(v);
}

// ---------------------------------------------------------------------------------------------
// What a product multiplies. A unit is what stands in one lane: PER_UNIT consecutive values of k. Where READY, values of T
// side by side in memory are units as they stand.

struct F32 {
    static constexpr size_t PER_UNIT = 1;
    template <class T>
    static constexpr bool READY = std::is_same<T, float>::value;
    static vec add_product(vec c, float a, vec b) { return c + a * b; }
    static vec add_products(vec c, vec a, vec b) { return c + a * b; }  // lane by lane
    // VL units of one row: n values along k.
    template <class T>
    static vec along(const T* s, size_t n) { return load(s, n); }
    // One unit of n rows side by side; next is the following k, or null after the last.
    template <class T>
    static vec across(const T* s, const T*, size_t n) { return load(s, n); }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr bool BF16_DOT_PRODUCT = true;
struct BF16 {
    static constexpr size_t PER_UNIT = 2;
    template <class T>
    static constexpr bool READY = std::is_same<T, bf16>::value;
    static vec add_product(vec c, float a, vec b) { return add_products(c, (vec)_mm512_set1_ps(a), b); }
    static vec add_products(vec c, vec a, vec b) { return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b); }
    static vec along(const float* s, size_t n) {
        return (vec)_mm512_cvtne2ps_pbh((__m512)load(s + std::min(n, VL), n > VL ? n - VL : 0), (__m512)load(s, n));
    }
    static vec along(const bf16* s, size_t n) {
        if (n >= 2 * VL) return load((const float*)s);
        return (vec)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), s);
    }
    static vec across(const float* s, const float* next, size_t n) {
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)(next ? load(next, n) : vec{}), (__m512)load(s, n));
        return (vec)_mm512_permutexvar_epi16(in_pairs(VL), both);
    }
    static vec across(const bf16* s, const bf16* next, size_t n) {
        __mmask32 m = (__mmask32)(n >= VL ? 0xffff : (1u << n) - 1);
        __m512i odd = next ? _mm512_maskz_loadu_epi16(m, next) : _mm512_setzero_si512();
        return (vec)_mm512_permutex2var_epi16(_mm512_maskz_loadu_epi16(m, s), in_pairs(2 * VL), odd);
    }

  private:
    static __m512i in_pairs(int distance) {  // lanes i and distance + i side by side
        return (__m512i)(((ivec){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}) * 0x10001 + (distance << 16));
    }
};
#else
constexpr bool BF16_DOT_PRODUCT = false;
struct BF16 {
    static constexpr size_t PER_UNIT = 1;
    template <class T>
    static constexpr bool READY = false;
    static vec add_product(vec c, float a, vec b) { return c + a * b; }
    static vec add_products(vec c, vec a, vec b) { return c + a * b; }
    static vec along(const float* s, size_t n) { return round_to_bf16(load(s, n)); }
    static vec along(const bf16* s, size_t n) { return load(s, n); }
    template <class T>
    static vec across(const T* s, const T*, size_t n) { return along(s, n); }
};
#endif

// dst[u*ld + r] = unit u of row r < w, for w <= VL rows sr apart, of K values side by side, as far as whole blocks of VL units go; how
// many values that were. The block is turned in registers. w is VL where FULL, ld is LD where that is not 0.
template <class P, bool FULL, size_t LD, class T>
__attribute__((noinline)) size_t turn_blocks(float* dst, size_t ld, const T* src, size_t sr, size_t w, size_t K) {
    constexpr size_t STEP = P::PER_UNIT * VL;
    if (LD) ld = LD;
    const T* row[VL];
    for (size_t i = 0; i < VL; i++) row[i] = src + std::min(i, w - 1) * sr;  // where there are fewer, the last one stands in for the others
    size_t k = 0, some = std::min(w, VL - 1);
    for (; k + STEP <= K; k += STEP, dst += VL * ld) {
        vec v[VL];
#pragma GCC unroll 16
        for (size_t i = 0; i < VL; i++) v[i] = P::along((FULL ? src + i * sr : row[i]) + k, STEP);
        transpose(v);
#pragma GCC unroll 16
        for (size_t u = 0; u < VL; u++) store(dst + u * ld, v[u], FULL ? VL : some);
    }
    return k;
}

// dst[u*ld + r] = unit u of row r, for n rows of K values; value (r, k) is src[r*sr + k*sk]. ld is n, or a multiple of
// VL; then what lies beyond n in a row's last vector is set to 0.
template <class P, class T>
inline void pack(float* dst, size_t ld, const T* src, size_t sr, size_t sk, size_t n, size_t K) {
    constexpr size_t U = P::PER_UNIT, STEP = U * VL;
    if (sr == 1) {  // a row of units after the other: lines of memory side by side
        if (n == NR && ld == NR)
            for (; K >= U; K -= U, src += U * sk, dst += NR)
                for (size_t r = 0; r < NR; r += VL) store(dst + r, P::across(src + r, src + (U - 1) * sk + r, VL));
        for (size_t k = 0; k < K; k += U, src += U * sk, dst += ld)
            for (size_t r = 0; r < n; r += VL)
                store(dst + r, P::across(src + r, k + U <= K ? src + (U - 1) * sk + r : nullptr, std::min(VL, n - r)), std::min(VL, ld - r));
        return;
    }
    for (size_t r = 0; r < n; r += VL) {
        size_t w = std::min(VL, n - r), out = std::min(VL, ld - r), k = 0;
        const T* s = src + r * sr;
        if (sk == 1 && w == out) {
            if (w < VL) k = turn_blocks<P, false, 0>(dst + r, ld, s, sr, w, K);
            else k = ld == NR ? turn_blocks<P, true, NR>(dst + r, ld, s, sr, w, K) : turn_blocks<P, true, 0>(dst + r, ld, s, sr, w, K);
        }
        for (float* d = dst + r + k / U * ld; k < K; k += STEP) {
            size_t values = std::min(STEP, K - k);
            vec v[VL] = {};
            for (size_t i = 0; i < w; i++) {
                T line[STEP];
                const T* at = s + i * sr + k * sk;
                if (sk != 1) {
                    for (size_t j = 0; j < values; j++) line[j] = at[j * sk];
                    at = line;
                }
                v[i] = P::along(at, values);
            }
            transpose(v);
            for (size_t u = 0; u < ceil_div(values, U); u++, d += ld) store(d, v[u], out);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The micro-kernel

// A matrix that an epilogue reads or writes where C has the same element; so that its lines can be asked for beforehand.
struct Touched {
    const char* first = nullptr;
    size_t row = 0, value = 0;  // bytes from row to row, and of a value
    Touched() {}
    template <class T>
    Touched(const T* p, size_t ld) : first((const char*)p), row(ld * sizeof(T)), value(sizeof(T)) {}
};

// Lines of memory that a micro-kernel asks for while it computes. Every `every` units it asks for those of a row: first of what the
// epilogue will read or write with the tile, then of C. At every `rarely`-th of these calls it asks for a line of what will be packed
// next, as long as it lasts, and where to, and of each of `arrays` arrays. Asked for all at once, they come late.
struct Fetch {
    static constexpr size_t BYTES = LINE * sizeof(float), MOST_ARRAYS = 4;
    const char* at = nullptr;
    size_t lines = 0, left = 1, row = 1;  // lines in all, to the end of this row, and in a row
    size_t jump = 0;                      // bytes from a row's end to the next row
    const char* into = nullptr;           // where the lines are packed to, or null for memory that is in the cache
    size_t packed = 0;                    // bytes there for each line
    const char* touched = nullptr;        // the next row that the epilogue touches
    size_t touched_lines = 0, touched_row = 0;  // in a row, and bytes from row to row
    size_t every = SIZE_MAX, rarely = 1, calls = 0;
    size_t arrays = 0;
    const char* beside[MOST_ARRAYS] = {};

    // Values (i, k) of i < width, k < depth at p[i*si + k*sk]; nothing where neither side is contiguous.
    template <class T>
    static Fetch of(const T* p, size_t width, size_t depth, size_t si, size_t sk) {
        size_t inner = sk == 1 ? depth : width, outer = sk == 1 ? width : depth, stride = (sk == 1 ? si : sk) * sizeof(T);
        Fetch f;
        if (!inner || !outer || (sk != 1 && si != 1)) return f;
        f.at = (const char*)p, f.left = f.row = ceil_div(inner * sizeof(T), BYTES), f.lines = f.row * outer, f.jump = stride - f.row * BYTES;
        return f;
    }
    // Packed, the lines become this many values from p on.
    void pack_into(const float* p, size_t values) {
        if (lines) into = (const char*)p, packed = values * sizeof(float) / lines;
    }
    // Units from one line to the next, and at most from row to row.
    void set_pace(size_t line, size_t row) { rarely = line / row + 1, every = std::max<size_t>(1, line / rarely); }
    // The epilogue will touch n columns of m from (row, col) on.
    void touch(const Touched& m, size_t row, size_t col, size_t n) {
        touched = m.first + row * m.row + col * m.value, touched_lines = ceil_div(n * m.value, BYTES), touched_row = m.row;
    }
    // Inlined, as one() is, since a call would spill the accumulators.
    __attribute__((always_inline)) void one_row() {
        for (size_t i = 0; i < touched_lines; i++) __builtin_prefetch(touched + i * BYTES);
        touched += touched_row;
    }
    __attribute__((always_inline)) void one() {
        if (++calls < rarely) return;
        calls = 0;
        if (lines) {
            __builtin_prefetch(at);
            if (into) __builtin_prefetch(into, 1), into += packed;
            lines--, at += BYTES;
            if (!--left) at += jump, left = row;
        }
        for (size_t i = 0; i < arrays; i++) __builtin_prefetch(beside[i]), beside[i] += BYTES;
    }
};

// A micro-kernel can pack the operand it reads while it computes, for those after it, where one unit's values lie side by side in
// memory: it waits for its multiplications, not for loads and stores. B's vectors are stored as they are used. A's are stored some units ahead,
// since a load of a part of what a masked store has just written waits until it is in the cache.
enum Packs { PACKS_NOTHING, PACKS_A, PACKS_B };
constexpr size_t AHEAD = 8;

// c (R, V*VL; row stride ldc) = init (row stride ldi) + sum over units u of a[u*AU + i*AR] times b[u*BU + j]; with AR = 0
// the row stride of a is lda. Where V > NV, columns from NR on stand in b's next panel, NR * units values further on.
// With PACKS_A or PACKS_B that operand is written first: unit u's value i, or the first of its two, is source[u * PER_UNIT * stride + i],
// a's from unit AHEAD on.
// With STREAM init counts as 0, and c, aligned to a vector, does not enter the caches.
// Not inlined: among the variables of a caller the compiler runs out of registers and spills the accumulators.
template <class P, size_t R, size_t V, size_t AR, size_t AU, size_t BU, Packs PACK, class T, bool STREAM>
__attribute__((noinline)) void micro_kernel(size_t units, const float* __restrict a, size_t lda, const float* __restrict b, float* c,
                                            size_t ldc, const float* init, size_t ldi, Fetch& fetch, const void* source, size_t stride) {
    const size_t panel = NR * units;
    vec acc[R][V] = {};
    const float* third[(R + 2) / 3];  // rows 0, 3, 6, ...: from each, an address reaches two more
    for (size_t i = 0; i < (R + 2) / 3; i++) third[i] = a + 3 * i * lda;
    auto value = [&](size_t i) {
        float unit;  // perhaps two bf16 numbers
        memcpy(&unit, AR ? a + i * AR : third[i / 3] + i % 3 * lda, sizeof unit);
        return unit;
    };
    const T* from = (const T*)source + (PACK == PACKS_A ? AHEAD * P::PER_UNIT * stride : 0);
    auto across = [&](size_t i, size_t n) { return P::across(from + i, from + (P::PER_UNIT - 1) * stride + i, n); };
    const float* c_row = c;
    for (size_t u = 0, call = 0; u < units; call++) {
        fetch.one();
        if (call < R) fetch.one_row();
        else if (call < 2 * R && !STREAM) {
            for (size_t j = 0; j < V; j++) __builtin_prefetch(c_row + j * VL, 1);
            c_row += ldc;
        }
        for (size_t n = std::min(fetch.every, units - u); n; n--, u++, a += AU, b += BU) {
            if (PACK == PACKS_A && u + AHEAD < units)
#pragma GCC unroll 8
                for (size_t i = 0; i < R; i += VL) store(const_cast<float*>(a) + AHEAD * AU + i, across(i, std::min(VL, R - i)), std::min(VL, R - i));
            vec bv[V];
#pragma GCC unroll 8
            for (size_t j = 0; j < V; j++) {
                const float* at = b + j / NV * panel + j % NV * VL;
                bv[j] = PACK == PACKS_B ? across(j * VL, VL) : load(at);
                if (PACK == PACKS_B) store(const_cast<float*>(at), bv[j]);
            }
            if (PACK != PACKS_NOTHING) from += P::PER_UNIT * stride;
#pragma GCC unroll 16
            for (size_t i = 0; i < R; i++)
#pragma GCC unroll 8
                for (size_t j = 0; j < V; j++) acc[i][j] = P::add_product(acc[i][j], value(i), bv[j]);
            if (!AR)
#pragma GCC unroll 8
                for (size_t i = 0; i < (R + 2) / 3; i++) third[i] += AU;
        }
    }
#pragma GCC unroll 16
    for (size_t i = 0; i < R; i++)
#pragma GCC unroll 8
        for (size_t j = 0; j < V; j++) {
            float* to = c + i * ldc + j * VL;
            if (STREAM) stream(to, acc[i][j]);
            else store(to, load(init + i * ldi + j * VL) + acc[i][j]);
        }
}

alignas(64) inline const float ZEROS[2 * NR] = {};

// The micro-kernel for tiles of rows x cols, up to MR x NR, or MR / 2 x 2 NR with AR = 0. With AU = 0 A is packed: its unit stride
// is the number of rows. What packs is NR or 2 NR wide, what may stream NR.
using Kernel = void (*)(size_t, const float*, size_t, const float*, float*, size_t, const float*, size_t, Fetch&, const void*, size_t);
template <class P, size_t AR, size_t AU, size_t BU, size_t V, Packs PACK, class T, bool STREAM, size_t... I>
inline Kernel kernel_of(size_t rows, std::index_sequence<I...>) {
    static constexpr Kernel kernels[sizeof...(I)] = {micro_kernel<P, I + 1, V, AR, AU ? AU : I + 1, BU, PACK, T, STREAM>...};
    return kernels[rows - 1];
}
template <class P, size_t AR = 1, size_t AU = 0, size_t BU = NR, Packs PACK = PACKS_NOTHING, class T = float>
inline Kernel kernel(size_t rows, size_t cols, bool may_stream = false) {
    auto any_rows = std::make_index_sequence<MR>();
    if constexpr (WIDE_TILES && !AR)
        if (cols == 2 * NR) return kernel_of<P, AR, AU, BU, 2 * NV, PACK, T, false>(rows, std::make_index_sequence<MR / 2>());
    if (may_stream && cols == NR) return kernel_of<P, AR, AU, BU, NV, PACK, T, true>(rows, any_rows);
    if (PACK == PACKS_NOTHING && cols <= VL) return kernel_of<P, AR, AU, BU, 1, PACKS_NOTHING, T, false>(rows, any_rows);
    return kernel_of<P, AR, AU, BU, NV, PACK, T, false>(rows, any_rows);
}
// c (rows, cols) of a tile by such a micro-kernel, which takes the rest as above.
inline void tile(Kernel kernel, size_t rows, size_t cols, size_t units, const float* a, size_t lda, const float* b, float* c, size_t ldc,
                 const float* init, size_t ldi, Fetch& fetch, const void* source = nullptr, size_t stride = 0) {
    if (cols % VL == 0) return kernel(units, a, lda, b, c, ldc, init, ldi, fetch, source, stride);
    alignas(64) float t[MR * NR];
    kernel(units, a, lda, b, t, NR, ZEROS, 0, fetch, nullptr, 0);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) c[i * ldc + j] = init[i * ldi + j] + t[i * NR + j];
}
// The same by the micro-kernel that fits, with nothing packed or asked for.
template <class P, size_t AR = 1, size_t AU = 0, size_t BU = NR>
inline void tile(size_t rows, size_t cols, size_t units, const float* a, const float* b, float* c, size_t ldc, const float* init, size_t ldi) {
    Fetch nothing;
    tile(kernel<P, AR, AU, BU>(rows, cols), rows, cols, units, a, 0, b, c, ldc, init, ldi, nothing);
}

// Rows are dealt out evenly to panels of at most `most`; panel i begins at row panel_row(i).
inline size_t row_panels(size_t rows, size_t most = MR) { return ceil_div(rows, most); }
inline size_t panel_row(size_t rows, size_t i, size_t most = MR) { return rows * i / row_panels(rows, most); }

// ---------------------------------------------------------------------------------------------
// The product by all threads

// An epilogue sees each finished piece of a row once: n values c[0..n) of row `row`, from column `col` on.
struct NoEpilogue {
    void operator()(size_t, size_t, size_t, float*) const {}
};

// Work that the threads do beside a product: floats [0, size()) of up to Fetch::MOST_ARRAYS arrays, any part at any time.
// Each thread does a slice of its share after each tile, and the micro-kernel has asked for the lines of it beforehand: a
// pass that would wait for memory costs little more than its arithmetic.
struct NoWork {
    static constexpr size_t ARRAYS = 0, UNIT = LINE;  // parts begin at whole units, which are whole lines
    size_t size() const { return 0; }
    void locate(size_t, const char**) const {}  // where float i of each array stands
    void operator()(size_t, size_t) const {}    // does n floats from i on
};
template <class Work>
struct Share {
    const Work& work;
    size_t slice, at, end;

    Share(const Work& w, size_t thread, size_t threads, size_t tiles) : work(w), slice(round_up(ceil_div(w.size(), tiles), Work::UNIT)) {
        size_t share = round_up(ceil_div(w.size(), threads), Work::UNIT);
        at = std::min(w.size(), thread * share), end = std::min(w.size(), at + share);
    }
    size_t lines() const { return at < end ? slice / LINE : 0; }  // of one array, in a slice
    // After the slice that comes now, whose lines have been asked for.
    void ask_for_next(Fetch& f) const {
        if (!Work::ARRAYS) return;
        f.arrays = at + slice < end ? Work::ARRAYS : 0;
        if (f.arrays) work.locate(at + slice, f.beside);
    }
    void next() {
        size_t n = std::min(slice, end - at);
        if (n) work(at, n), at += n;
    }
    void rest() {
        if (at < end) work(at, end - at), at = end;
    }
};

// How the first sum enters C: over what stands there (or onto the bias), or onto it. FOR_LATER is OVERWRITE where C is not
// read again soon: if it is large it need not enter the caches.
enum Start { OVERWRITE, ACCUMULATE, FOR_LATER };

// Scratch memory of multiply(), made once for the largest number of threads seen; and how far the panels of the shared
// operand are packed: operands are counted from 0, and for operand e a panel's state is 2e + 1 during and 2e + 2 after.
struct Workspace {
    static constexpr size_t PRIVATE_UNITS = std::max(round_up(MB, MR), NB) * KC, MOST_PANELS = 2048, TASK_BITS = 24;
    float *shared = nullptr, *private_ = nullptr;
    int threads = 0;
    uint64_t operands = 0;
    std::atomic<uint64_t> state[MOST_PANELS] = {};
    std::unique_ptr<std::atomic<uint64_t>[]> next;  // of each thread's tasks for operand e: e << TASK_BITS plus the first not begun
    static size_t bytes(int threads) { return (SHARED_UNITS + (size_t)threads * PRIVATE_UNITS) * sizeof(float); }
    void reserve(int n) {
        if (n <= threads) return;
        release(shared, bytes(threads));
        shared = (float*)allocate(bytes(n), "scratch memory of the matrix product");
        private_ = shared + SHARED_UNITS, threads = n;
        next.reset(new std::atomic<uint64_t>[n]());
    }
    // Which of operand e's tasks, of [0, tasks), a thread of the team begins next: one of its own, which stand side by side, so that
    // what they touch stays near its processor from product to product; then one of the others'. `tasks` when all are begun.
    size_t take_task(size_t thread, size_t team, uint64_t e, size_t tasks) {
        for (size_t i = 0; i < team; i++) {
            size_t of = (thread + i) % team;
            uint64_t all = e << TASK_BITS, first = all + tasks * of / team, end = all + tasks * (of + 1) / team, s = next[of].load();
            for (uint64_t t; (t = std::max(s, first)) < end;)
                if (next[of].compare_exchange_weak(s, t + 1)) return t - all;
        }
        return tasks;
    }
    bool untouched(size_t i, uint64_t e) const { return state[i].load(std::memory_order_relaxed) < 2 * e + 1; }
    // Packs panel i of operand e, or waits for the thread that does.
    template <class Pack>
    void once(size_t i, uint64_t e, Pack pack) {
        uint64_t s = state[i].load(std::memory_order_acquire);
        if (s < 2 * e + 1 && state[i].compare_exchange_strong(s, 2 * e + 1)) {
            pack();
            state[i].store(2 * e + 2, std::memory_order_release);
        } else {
            while (state[i].load(std::memory_order_acquire) != 2 * e + 2) std::this_thread::yield();
        }
    }
};
inline Workspace& workspace() {
    static Workspace w;
    return w;
}

// C (M,N) = A (M,K) B (K,N), with A(m,k) = A[m*am + k*ak], B(k,n) = B[k*bk + n*bn], C row-major with row stride ldc.
// start ACCUMULATE adds to C; bias (N) or null is added to an overwritten C. P is F32 or BF16; A and B are float or bf16.
// work does not touch A, B or C; touched is what epi touches beside C.
template <class P = F32, class TA, class TB, class Epilogue = NoEpilogue, class Work = NoWork>
inline void multiply(size_t M, size_t N, size_t K, const TA* A, size_t am, size_t ak, const TB* B, size_t bk, size_t bn, float* C,
                     size_t ldc, Start start = OVERWRITE, const float* bias = nullptr, Epilogue epi = {}, const Work& work = {}, Touched touched = {}) {
    if (!M || !N || !K) return work(0, work.size());
    constexpr size_t U = P::PER_UNIT;
    Workspace& ws = workspace();
    size_t nt = M * N * K < WORTH_WAKING ? 1 : omp_get_max_threads();
    ws.reserve((int)nt);
    // A needs no packing where its rows are units; but a tile's rows must fit the L1 cache where all fall on the same sets.
    bool units_stand = P::template READY<TA> && ak == 1 && K % U == 0 && am % U == 0, wide = WIDE_TILES && units_stand && 2 * N >= M;
    size_t mr = wide ? MR / 2 : MR, nr = wide ? 2 * NR : NR;
    bool direct = units_stand && (am * sizeof(TA) % L1_WAY || mr <= L1_WAYS);
    bool by_columns = direct ? 2 * N >= M : N > M, packs_own = by_columns || !direct, packs_shared = !by_columns || !direct;
    size_t D = by_columns ? N : M, S = by_columns ? M : N;  // D is divided among the tasks, S is shared by them
    size_t kc = round_up(ceil_div(K, ceil_div(K, KC * U)), U), chunks = ceil_div(K, kc);  // of K alone: it fixes the order of the sums
    // Tasks end where panels of columns do, with wide tiles every other panel unless they are few, or anywhere between rows.
    size_t step = !by_columns ? 1 : D >= 2 * nt * nr ? nr : NR, steps = ceil_div(D, step), blocks = std::min(steps, round_up(ceil_div(D, by_columns ? NB : MB), nt));
    auto block_begin = [&](size_t b) { return std::min(D, steps * std::min(b, blocks) / blocks * step); };
    bool streams = start == FOR_LATER && chunks == 1 && M * N >= STREAMED && ldc % VL == 0 && (uintptr_t)C % sizeof(vec) == 0 &&
                   !bias && std::is_same<Epilogue, NoEpilogue>::value;
    // Panels of n rows of A or columns of B, which one begins where, and its packing and what to ask for before it.
    auto panels = [=](size_t n, bool of_a) { return of_a ? row_panels(n, mr) : ceil_div(n, NR); };
    auto begin = [=](size_t n, size_t i, bool of_a) { return of_a ? panel_row(n, i, mr) : std::min(n, i * NR); };
    auto pack_panel = [&](float* dst, size_t at, size_t width, size_t k, size_t n, bool of_a) {
        if (of_a) pack<P>(dst, width, A + at * am + k * ak, am, ak, width, n);
        else pack<P>(dst, NR, B + k * bk + at * bn, bn, bk, width, n);
    };
    // A task's own panels are packed by the first tile of each, where their values lie side by side and whole units are no more
    // memory than when packed: twice as many lines, perhaps from memory, hold a tile up for longer than packing. Before that
    // comes what the tile reads first, or all of a panel where tiles do not pack or are narrow.
    Packs tile_packs = PACKS_NOTHING;
    if (K % U == 0 && by_columns && bn == 1) tile_packs = PACKS_B;
    if (K % U == 0 && !by_columns && am == 1 && sizeof(TA) * U <= sizeof(float)) tile_packs = PACKS_A;
    size_t before_tile = tile_packs == PACKS_B ? 0 : tile_packs == PACKS_A ? AHEAD * U : kc;  // values of k
    auto kernel_for = [&](Packs packs, size_t rows, size_t cols) {
        constexpr bool READY = P::template READY<TA>;  // without it direct is false
        if (packs == PACKS_A) return kernel<P, 1, 0, NR, PACKS_A, TA>(rows, cols, streams);
        if (packs == PACKS_B && direct) return kernel<P, !READY, READY, NR, PACKS_B, TB>(rows, cols, streams);
        if (packs == PACKS_B) return kernel<P, 1, 0, NR, PACKS_B, TB>(rows, cols, streams);
        return direct ? kernel<P, !READY, READY>(rows, cols, streams) : kernel<P>(rows, cols, streams);
    };
    auto source = [&](size_t at, size_t width, size_t k, size_t n, bool of_a) {
        return of_a ? Fetch::of(A + at * am + k * ak, width, n, am, ak) : Fetch::of(B + k * bk + at * bn, width, n, bn, bk);
    };
    size_t s_max = std::min(S, SHARED_WIDTH), room = SHARED_UNITS / (round_up(s_max, NR) * (kc / U));
    size_t at_once = packs_shared ? std::max<size_t>(1, std::min(room, Workspace::MOST_PANELS / panels(s_max, by_columns))) : chunks;
    // Where A's rows are units, each task reads all those at hand. What the cache does not keep that long one thread reads in chunks of k,
    // each for all tasks; several threads would have to wait for each other after each.
    if (!packs_shared && nt == 1 && s_max * K * sizeof(TA) > SHARED_UNITS * sizeof(float)) at_once = 1;
    size_t all_tiles = row_panels(M, mr) * ceil_div(N, nr) * chunks;  // or a few more
    uint64_t first_operand = ws.operands;
    ws.operands += ceil_div(S, s_max) * ceil_div(chunks, at_once);

    auto worker = [&](size_t thread, size_t team) {
        float* own = ws.private_ + thread * Workspace::PRIVATE_UNITS;
        Share<Work> beside(work, thread, team, all_tiles);
        uint64_t operand = first_operand;
        for (size_t s0 = 0; s0 < S; s0 += s_max)
            for (size_t c0 = 0; c0 < chunks; c0 += at_once, operand++) {
                size_t s = std::min(s_max, S - s0), count = std::min(at_once, chunks - c0), outer = panels(s, by_columns);
                if (operand != first_operand && team > 1) {
#pragma omp barrier
                }
                for (size_t b; (b = ws.take_task(thread, team, operand, blocks)) < blocks;) {
                    size_t d0 = block_begin(b), d = block_begin(b + 1) - d0, inner = panels(d, !by_columns), inner_tiles = wide ? ceil_div(inner, 2) : inner;
                    for (size_t q = 0; q < count; q++) {
                        size_t k = (c0 + q) * kc, n = std::min(kc, K - k), units = ceil_div(n, U);
                        float* shared = ws.shared + q * round_up(s, NR) * (kc / U);
                        // Most likely this thread's own operand is packed next: its next chunk of k, or the first of its next block.
                        size_t next_b = q + 1 < count ? b : b + 1, next_k = q + 1 < count ? k + kc : c0 * kc, next_d = block_begin(next_b);
                        Fetch next_own = source(next_d, block_begin(next_b + 1) - next_d, next_k, std::min(kc, K - next_k), !by_columns);
                        size_t x0 = thread * outer / team;  // each thread begins with shared panels of its own
                        if (packs_own)
                            for (size_t y = 0; y < inner; y++) {
                                size_t r = begin(d, y, !by_columns), width = begin(d, y + 1, !by_columns) - r;
                                size_t across = by_columns ? width : begin(s, x0 + 1, false) - begin(s, x0, false);
                                pack_panel(own + r * units, d0 + r, width, k, across == NR ? std::min(n, before_tile) : n, !by_columns);
                            }
                        for (size_t turn = 0, x = x0; turn < outer; turn++, x = x + 1 < outer ? x + 1 : 0) {
                            size_t r = begin(s, x, by_columns), width = begin(s, x + 1, by_columns) - r, tiles = (outer - turn) * inner_tiles;
                            Fetch next_shared, *fetch = &next_own;
                            if (packs_shared) {
                                size_t next = x + 1 < outer ? x + 1 : 0, at = begin(s, next, by_columns);
                                ws.once(q * outer + x, operand, [&] { pack_panel(shared + r * units, s0 + r, width, k, n, by_columns); });
                                if (ws.untouched(q * outer + next, operand)) {
                                    size_t next_width = begin(s, next + 1, by_columns) - at;
                                    next_shared = source(s0 + at, next_width, k, n, by_columns), fetch = &next_shared, tiles = inner_tiles;
                                    next_shared.pack_into(shared + at * units, next_width * units);
                                }
                            }
                            size_t most = std::max(fetch->lines, beside.lines() * tiles);
                            fetch->set_pace(units * tiles / std::max<size_t>(1, most), std::max<size_t>(1, units / (2 * mr + 1)));
                            for (size_t y = 0, end; y < inner; y = end) {
                                size_t own_r = begin(d, y, !by_columns);
                                end = wide && own_r + nr <= d ? y + 2 : y + 1;
                                size_t own_width = begin(d, end, !by_columns) - own_r;
                                size_t row = by_columns ? s0 + r : d0 + own_r, height = by_columns ? width : own_width;
                                size_t col = by_columns ? d0 + own_r : s0 + r, across = by_columns ? own_width : width;
                                const float *a = by_columns ? shared + r * units : own + own_r * units, *bp = by_columns ? own + own_r * units : shared + r * units;
                                float* c = C + row * ldc + col;
                                const float* init = k || start == ACCUMULATE ? c : bias ? bias + col : ZEROS;
                                size_t ldi = init == c ? ldc : 0;
                                beside.ask_for_next(*fetch);
                                bool finished = k + n == K;
                                fetch->touch(finished ? touched : Touched(), row, col, across);
                                Packs packs = packs_own && !turn && across >= NR ? tile_packs : PACKS_NOTHING;
                                tile(kernel_for(packs, height, across), height, across, units, direct ? (const float*)(A + row * am + k) : a, direct ? am / U : 0, bp,
                                     c, ldc, init, ldi, *fetch, by_columns ? (const void*)(B + k * bk + col) : A + row + k * ak, by_columns ? bk : ak);
                                if (finished)
                                    for (size_t i = 0; i < height; i++) epi(row + i, col, across, c + i * ldc);
                                beside.next();
                            }
                        }
                    }
                    if (streams) finish_streams();
                }
            }
        beside.rest();
    };
    if (nt == 1) return worker(0, 1);
#pragma omp parallel num_threads((int)nt)
    worker((size_t)omp_get_thread_num(), (size_t)omp_get_num_threads());
}

// ---------------------------------------------------------------------------------------------
// Few rows: generation

// dst (M, units of K values) = X (M,K) as P multiplies it; for F32 that is X as it stands.
template <class P>
inline void to_units(float* dst, const float* X, size_t M, size_t K) {
    constexpr size_t U = P::PER_UNIT;
    for (size_t m = 0; m < M; m++, X += K, dst += ceil_div(K, U))
        for (size_t k = 0; k < K; k += U * VL) store(dst + k / U, P::along(X + k, K - k), ceil_div(K - k, U));
}

// The dot products of M rows of units X with R rows of W, AT_ONCE at a time: each summed lane by lane and then across the lanes,
// whatever M and R. One row of X reads W as fast as memory gives it, one line after the other; more keep the processor too busy
// to look far enough ahead, and ask for what comes. They ask the second cache for it, which holds more requests than the first.
template <class P, size_t M, size_t R, size_t AT_ONCE, class T>
inline void few_dots(size_t K, const float* X, const T* W, float* Y, size_t ldy, const float* bias) {
    constexpr size_t U = P::PER_UNIT, STEP = U * VL, AHEAD_BYTES = 8192;
    const size_t ldx = ceil_div(K, U);
    vec sums[round_up(M * R, VL)] = {};
#pragma GCC unroll 16
    for (size_t r0 = 0; r0 < R; r0 += AT_ONCE, W += AT_ONCE * K) {
        vec acc[AT_ONCE][M] = {};
        auto step = [&](size_t k, size_t n) __attribute__((always_inline)) {
            vec w[AT_ONCE];
            for (size_t r = 0; r < AT_ONCE; r++) {
                w[r] = P::along(W + r * K + k, n);
                if (M > 1) __builtin_prefetch((const char*)(W + r * K + k) + AHEAD_BYTES, 0, 2);
            }
            for (size_t m = 0; m < M; m++) {
                vec x = load(X + m * ldx + k / U, ceil_div(n, U));
                for (size_t r = 0; r < AT_ONCE; r++) acc[r][m] = P::add_products(acc[r][m], x, w[r]);
            }
        };
        size_t k = 0;
        for (; k + STEP <= K; k += STEP) step(k, STEP);
        if (k < K) step(k, K - k);
        for (size_t r = 0; r < AT_ONCE; r++)
            for (size_t m = 0; m < M; m++) sums[(r0 + r) * M + m] = acc[r][m];
    }
#pragma GCC unroll 16
    for (size_t first = 0; first < M * R; first += VL) {
        sum_each(sums + first);
        for (size_t i = first; i < std::min(first + VL, M * R); i++) Y[i % M * ldy + i / M] = sums[first][i - first] + (bias ? bias[i / M] : 0.0f);
    }
}

// Y (M,N) = X W^T (N,K) + bias for a few rows X (generation), as to_units<P> leaves them; W float, or bf16 where P is BF16. A row's
// result does not depend on the others. By one thread.
template <class P, class T>
inline void few_rows(size_t M, size_t N, size_t K, const float* X, const T* W, float* Y, size_t ldy, const float* bias) {
    size_t m = 0;
    auto rows = [&](auto count) {
        constexpr size_t ROWS = decltype(count)::value, AT_ONCE = ROWS >= 4 && MANY_REGISTERS ? 2 : 1, R = std::max(VL / ROWS, AT_ONCE);
        for (; m + ROWS <= M; m += ROWS, X += ROWS * ceil_div(K, P::PER_UNIT), Y += ROWS * ldy) {
            size_t n = 0;
            for (; n + R <= N; n += R) few_dots<P, ROWS, R, AT_ONCE>(K, X, W + n * K, Y + n, ldy, bias ? bias + n : nullptr);
            for (; n < N; n++) few_dots<P, ROWS, 1, 1>(K, X, W + n * K, Y + n, ldy, bias ? bias + n : nullptr);
        }
    };
    rows(std::integral_constant<size_t, 8>());
    rows(std::integral_constant<size_t, 4>());
    rows(std::integral_constant<size_t, 2>());
    rows(std::integral_constant<size_t, 1>());
}

// The same by all threads: W is read from memory once.
template <class P, class T>
inline void multiply_few(size_t M, size_t N, size_t K, const float* X, const T* W, float* Y, size_t ldy, const float* bias) {
    constexpr size_t BLOCK = 16;
#pragma omp parallel for schedule(static)
    for (size_t n = 0; n < N; n += BLOCK) few_rows<P>(M, std::min(BLOCK, N - n), K, X, W + n * K, Y + n, ldy, bias ? bias + n : nullptr);
}

// ---------------------------------------------------------------------------------------------

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

// The machine's peak in FLOP/s with P's products: the micro-kernel on operands in L1, all threads at once, best of 5.
template <class P = F32>
inline double measure_peak_flops() {
    double best = 0;
    size_t nt = omp_get_max_threads();
    constexpr size_t units = 64, reps = 4000;
    for (int trial = 0; trial < 5; trial++) {
        double t = 0;
#pragma omp parallel reduction(max : t)
        {
            alignas(64) float a[MR * units] = {}, b[NR * units] = {}, c[MR * NR];
            Fetch nothing;
#pragma omp barrier
            auto t0 = std::chrono::steady_clock::now();
            for (size_t r = 0; r < reps; r++) {
                kernel<P>(MR, NR)(units, a, 0, b, c, NR, ZEROS, 0, nothing, nullptr, 0);
                __asm__ volatile("" : : "r"(c) : "memory");
            }
            t = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
        }
        best = std::max(best, 2.0 * MR * NR * units * P::PER_UNIT * reps * (double)nt / t);
    }
    return best;
}

}  // namespace gemm
