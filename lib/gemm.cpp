// gemm.cpp - the matrix products of lib/gemm.h, which also explains the words used here.
//
// A processor multiplies far faster than it loads from memory, so each value that is loaded must be used many
// times. The scheme is GotoBLAS's (Goto and van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008), with one level for each kind of memory:
//
// Registers: the micro-kernel keeps a tile of C, up to MR x NR, in registers. For each k it loads MR + NR
// values and does MR x NR multiplications. Packed panels make these loads contiguous.
//
// L2 cache: a task is a range of C's rows, or of its columns. Its "own" operand, packed for KC units of k at
// a time, stays in the L2 cache of the thread that computes the task.
//
// Last-level cache: the other operand is "shared". Each of its panels is packed once, by the first thread
// that needs it, and then read by all tasks of all threads.
//
// Threads take tasks until none is left, so that a slow thread does not hold up the others. Three refinements
// save time. First, while the micro-kernel computes, it prefetches what is read next, and often also packs:
// the first tile that reads a panel of its own operand packs that panel for the tiles after it. Second, if
// A's rows already have the layout of a panel, A is used unpacked ("direct"); with AVX-512, where columns are
// divided, tiles then have half the rows and twice the columns, which takes fewer loads. Third, the epilogue
// and sums of squares left over from the product before are computed between tiles.
//
// Each element of C is summed over k in a fixed order that depends on K alone.
//
// This file is compiled twice: without GEMM_BF16 for products of floats and the public functions; with
// GEMM_BF16 for products of bf16 numbers. The width of vectors follows the compiler's target (-march):
// AVX-512, AVX2, NEON, or other 128-bit vectors.
#include "lib/gemm_internal.h"

#include <chrono>
#include <deque>
#include <type_traits>

namespace gemm {

// The functions that the two objects of this file provide.
struct Kernels {
    void (*multiply)(const Product&);
    void (*few_rows)(float* Y, const float* X, const void* W, const float* b, size_t M, size_t K, size_t N,
                     size_t ldy);
    void (*pack)(float* dst, size_t ld, const float* src, size_t row, size_t col, size_t n, size_t K);
    void (*to_units)(float* dst, const float* src, size_t n);
    void (*tile)(LayoutOfA layout, size_t rows, size_t cols, size_t units, const float* a, const float* b,
                 float* c, size_t ldc, bool accumulate);
    double (*measure_peak_flops)();
};
extern const Kernels fp32_kernels, bf16_kernels;

namespace {

using simd::ivec;
using simd::load;
using simd::store;
using simd::vec;

// ---------------------------------------------------------------------------------------------
// The numbers that are multiplied
//
// Numbers::PER_UNIT consecutive values of k make a unit, which fills one lane of a vector. READY<T> tells
// whether consecutive values of type T in memory are units already.

#ifndef GEMM_BF16
struct Numbers {
    static constexpr size_t PER_UNIT = 1;
    template <class T>
    static constexpr bool READY = std::is_same<T, float>::value;
    static vec add_product(vec c, float a, vec b) { return c + a * b; }
    static vec add_products(vec c, vec a, vec b) { return c + a * b; }  // lane by lane
    // VL units of one row, n consecutive values along k, zeros beyond.
    template <class T>
    static vec along(const T* s, size_t n) {
        return load(s, n);
    }
    // One unit of n contiguous rows, from their values for one k. next: their values for k + 1, or null.
    template <class T>
    static vec across(const T* s, const T*, size_t n) {
        return load(s, n);
    }
};
using Weight = float;  // of few_rows
#elif defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
// bf16 in pairs: one instruction adds to each float of a vector the two products of a pair with a pair.
struct Numbers {
    static constexpr size_t PER_UNIT = 2;
    template <class T>
    static constexpr bool READY = std::is_same<T, bf16>::value;
    static vec add_product(vec c, float a, vec b) { return add_products(c, (vec)_mm512_set1_ps(a), b); }
    static vec add_products(vec c, vec a, vec b) {
        return (vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
    }
    static vec along(const float* s, size_t n) {
        return (vec)_mm512_cvtne2ps_pbh((__m512)load(s + std::min(n, VL), n > VL ? n - VL : 0),
                                        (__m512)load(s, n));
    }
    static vec along(const bf16* s, size_t n) {
        if (n >= 2 * VL) {
            vec pairs;
            memcpy(&pairs, s, sizeof pairs);  // s is aligned to 2 bytes only
            return pairs;
        }
        return (vec)_mm512_maskz_loadu_epi16((__mmask32)((1ull << n) - 1), s);
    }
    static vec across(const float* s, const float* next, size_t n) {
        __m512i both =
            (__m512i)_mm512_cvtne2ps_pbh((__m512)(next ? load(next, n) : vec{}), (__m512)load(s, n));
        return (vec)_mm512_permutexvar_epi16(in_pairs(VL), both);
    }
    static vec across(const bf16* s, const bf16* next, size_t n) {
        __mmask32 m = (__mmask32)(n >= VL ? 0xffff : (1u << n) - 1);
        __m512i odd = next ? _mm512_maskz_loadu_epi16(m, next) : _mm512_setzero_si512();
        return (vec)_mm512_permutex2var_epi16(_mm512_maskz_loadu_epi16(m, s), in_pairs(2 * VL), odd);
    }

  private:
    // The indices that interleave two groups of 16-bit lanes: 0, distance, 1, distance + 1, ...
    static __m512i in_pairs(int distance) {
        ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        return (__m512i)(lane * 0x10001 + (distance << 16));
    }
};
using Weight = bf16;
#else
// Without such an instruction, values are rounded to bf16 and multiplied as floats. Results differ from the
// instruction's only in the order of sums, and for subnormal numbers, which the instruction takes as 0.
struct Numbers {
    static constexpr size_t PER_UNIT = 1;
    template <class T>
    static constexpr bool READY = false;
    static vec add_product(vec c, float a, vec b) { return c + a * b; }
    static vec add_products(vec c, vec a, vec b) { return c + a * b; }
    static vec along(const float* s, size_t n) { return simd::round_to_bf16(load(s, n)); }
    static vec along(const bf16* s, size_t n) { return load(s, n); }
    template <class T>
    static vec across(const T* s, const T*, size_t n) {
        return along(s, n);
    }
};
using Weight = bf16;
#endif

constexpr size_t U = Numbers::PER_UNIT;
alignas(64) const float ZEROS[2 * NR] = {};

// ---------------------------------------------------------------------------------------------
// Packing

// Packs w <= VL rows, `row` apart, of K consecutive values each: dst[u * ld + r] = unit u of row r. It packs
// whole blocks of VL units only, which it transposes in registers, and returns how many values of each row
// these were. w is VL if FULL; ld is LD if that is not 0.
template <bool FULL, size_t LD, class T>
__attribute__((noinline)) size_t pack_blocks(float* dst, size_t ld, const T* src, size_t row, size_t w,
                                             size_t K) {
    constexpr size_t STEP = U * VL;
    if (LD) ld = LD;
    const T* start[VL];
    for (size_t i = 0; i < VL; i++)
        start[i] = src + std::min(i, w - 1) * row;  // the last row takes the place of missing ones
    size_t k = 0, rows = std::min(w, VL - 1);
    for (; k + STEP <= K; k += STEP, dst += VL * ld) {
        vec v[VL];
        UNROLL(16)
        for (size_t i = 0; i < VL; i++) v[i] = Numbers::along((FULL ? src + i * row : start[i]) + k, STEP);
        simd::transpose(v);
        UNROLL(16)
        for (size_t u = 0; u < VL; u++) store(dst + u * ld, v[u], FULL ? VL : rows);
    }
    return k;
}

// See gemm.h. Contiguous rows are packed vector by vector; other rows are transposed.
template <class T>
void pack(float* dst, size_t ld, const T* src, size_t row, size_t col, size_t n, size_t K) {
    constexpr size_t STEP = U * VL;
    if (row == 1) {
        if (n == NR && ld == NR)  // the usual panel of B, with sizes that the compiler knows
            for (; K >= U; K -= U, src += U * col, dst += NR)
                for (size_t r = 0; r < NR; r += VL)
                    store(dst + r, Numbers::across(src + r, src + (U - 1) * col + r, VL));
        for (size_t k = 0; k < K; k += U, src += U * col, dst += ld)
            for (size_t r = 0; r < n; r += VL) {
                const T* next = k + U <= K ? src + (U - 1) * col + r : nullptr;
                store(dst + r, Numbers::across(src + r, next, std::min(VL, n - r)), std::min(VL, ld - r));
            }
        return;
    }
    for (size_t r = 0; r < n; r += VL) {
        size_t w = std::min(VL, n - r), out = std::min(VL, ld - r), k = 0;
        const T* s = src + r * row;
        if (col == 1 && w == out) {
            if (w < VL) k = pack_blocks<false, 0>(dst + r, ld, s, row, w, K);
            else if (ld == NR) k = pack_blocks<true, NR>(dst + r, ld, s, row, w, K);
            else k = pack_blocks<true, 0>(dst + r, ld, s, row, w, K);
        }
        for (float* d = dst + r + k / U * ld; k < K; k += STEP) {  // the rest, with any strides
            size_t values = std::min(STEP, K - k);
            vec v[VL] = {};
            for (size_t i = 0; i < w; i++) {
                T line[STEP];
                const T* at = s + i * row + k * col;
                if (col != 1) {
                    for (size_t j = 0; j < values; j++) line[j] = at[j * col];
                    at = line;
                }
                v[i] = Numbers::along(at, values);
            }
            simd::transpose(v);
            for (size_t u = 0; u < ceil_div(values, U); u++, d += ld) store(d, v[u], out);
        }
    }
}

// See gemm.h.
void to_units(float* dst, const float* src, size_t n) {
    for (size_t k = 0; k < n; k += U * VL)
        store(dst + k / U, Numbers::along(src + k, n - k), ceil_div(n - k, U));
}

// ---------------------------------------------------------------------------------------------
// Prefetching

// The matrix beside C that the epilogue reads, or else writes, at the same elements as C.
struct EpilogueMatrix {
    const char* first = nullptr;
    size_t row = 0, value = 0;  // bytes from row to row, and of a value
    EpilogueMatrix() = default;
    explicit EpilogueMatrix(const Epilogue& e) {
        if (e.kind == Epilogue::NONE) return;
        value = e.kind == Epilogue::GELU && e.out_bf16 ? sizeof(bf16) : sizeof(float), row = e.ld * value;
        first = e.kind != Epilogue::GELU ? (const char*)e.in
                : e.out_bf16             ? (const char*)e.out_bf16
                                         : (const char*)e.out;
    }
};

// What a micro-kernel prefetches while it computes. Memory serves only some requests at a time, so the
// prefetches are spread over the units of k instead of being issued together. Every `every` units the
// micro-kernel prefetches one row: first the rows that the epilogue will use, then those of C (see
// micro_kernel). At every `rarely`-th of these points it also prefetches one line of the panel that is packed
// next, one of the memory that this panel is packed to, and one of the gradients to be squared.
struct Prefetch {
    static constexpr size_t BYTES = LINE * sizeof(float);
    // The panel that is packed next, line by line:
    const char* at = nullptr;
    size_t lines = 0, left = 1, row = 1;  // lines in all, to the end of the current row, and in a row
    size_t jump = 0;                      // bytes from the end of a row to the next row
    const char* to = nullptr;             // where the next line is packed to, or null if that is in the cache
    size_t to_bytes = 0;                  // bytes there for each line
    // The epilogue's next row:
    const char* epilogue = nullptr;
    size_t epilogue_lines = 0, epilogue_row = 0;  // lines in a row, and bytes from row to row
    const char* squares = nullptr;                // gradients, or null
    size_t every = SIZE_MAX, rarely = 1, points = 0;

    // For a panel: values (i, k), i < width, k < depth, at p[i * si + k * sk]. None unless si or sk is 1.
    template <class T>
    static Prefetch of(const T* p, size_t width, size_t depth, size_t si, size_t sk) {
        size_t inner = sk == 1 ? depth : width, outer = sk == 1 ? width : depth;
        size_t stride = (sk == 1 ? si : sk) * sizeof(T);
        Prefetch f;
        if (!inner || !outer || (sk != 1 && si != 1)) return f;
        f.at = (const char*)p, f.left = f.row = ceil_div(inner * sizeof(T), BYTES);
        f.lines = f.row * outer, f.jump = stride - f.row * BYTES;
        return f;
    }
    // The panel will be packed to `values` values from p on.
    void packed_to(const float* p, size_t values) {
        if (lines) to = (const char*)p, to_bytes = values * sizeof(float) / lines;
    }
    // Lines are prefetched about `line_units` units apart, rows at most `row_units` apart.
    void set_pace(size_t line_units, size_t row_units) {
        rarely = line_units / row_units + 1, every = std::max<size_t>(1, line_units / rarely);
    }
    // The epilogue will use n columns of m from (i, j) on.
    void before_epilogue(const EpilogueMatrix& m, size_t i, size_t j, size_t n) {
        epilogue = m.first + i * m.row + j * m.value, epilogue_lines = ceil_div(n * m.value, BYTES),
        epilogue_row = m.row;
    }
    // Both are always inlined: around a call, the micro-kernel would have to save its registers.
    __attribute__((always_inline)) void next_epilogue_row() {
        for (size_t i = 0; i < epilogue_lines; i++) __builtin_prefetch(epilogue + i * BYTES);
        epilogue += epilogue_row;
    }
    __attribute__((always_inline)) void next_line() {
        if (++points < rarely) return;
        points = 0;
        if (lines) {
            __builtin_prefetch(at);
            if (to) __builtin_prefetch(to, 1), to += to_bytes;
            lines--, at += BYTES;
            if (!--left) at += jump, left = row;
        }
        if (squares) __builtin_prefetch(squares), squares += BYTES;
    }
};

// ---------------------------------------------------------------------------------------------
// The micro-kernel

// A micro-kernel can pack one of the panels that it reads, for the tiles after it, if the panel's values for
// one k are contiguous in memory. The packing costs almost no time, since the multiplications are what the
// micro-kernel waits for. A vector of B is stored as it is used. A's are stored AHEAD units before they are
// used, because A is loaded value by value, and a load from a vector that was only just stored has to wait
// for that store.
enum Packs { PACKS_NOTHING, PACKS_A, PACKS_B };
constexpr size_t AHEAD = 8;

// A policy says how a micro-kernel reads its operands. Strides are constants, so that computing addresses
// takes no instructions. Packed is the basic one: both operands are packed, and a unit of A's panel has as
// many rows as the tile.
struct Packed {
    static constexpr size_t A_ROW = 1;   // from row to row of a; 0: lda, not known to the compiler
    static constexpr size_t A_UNIT = 0;  // from unit to unit of a; 0: the number of rows
    static constexpr size_t B_UNIT = NR;
    static constexpr Packs PACKS = PACKS_NOTHING;
    using Source = float;  // the type of what it packs
};
// A is used unpacked.
struct Direct : Packed {
    [[maybe_unused]] static constexpr size_t A_ROW = 0, A_UNIT = 1;  // clang: unused for bf16
};
template <class T>
struct PackingA : Packed {
    static constexpr Packs PACKS = PACKS_A;
    using Source = T;
};
template <class T>
struct PackingB : Packed {
    static constexpr Packs PACKS = PACKS_B;
    using Source = T;
};
template <class T>
struct DirectPackingB : Direct {
    static constexpr Packs PACKS = PACKS_B;
    using Source = T;
};
// For attention: A is columns, or rows, of a tile of scores (see LayoutOfA in lib/gemm.h).
struct ScoreColumns : Packed {
    static constexpr size_t A_UNIT = SCORES;
};
struct ScoreRows : Packed {
    static constexpr size_t A_ROW = SCORES / U, A_UNIT = 1;
};

// Computes a tile: c (ROWS, VECS * VL; row stride ldc) = init (row stride ldi) plus the sum over units u of
// a's unit (row, u) times b's unit (u, column). If VECS > NV, columns from NR on are in b's next panel, NR *
// units values after the first one. With PACKS_A or PACKS_B it packs that operand from `source`, in which
// values of neighbouring k are `stride` apart; a's first AHEAD units must be packed already. With STREAM,
// init counts as 0, and c, which must be aligned to a vector, is written past the caches. It is one long
// function and not inlined: divided, or among a caller's variables, the compiler would run out of registers
// and keep sums in memory.
template <class Policy, size_t ROWS, size_t VECS, bool STREAM>
__attribute__((noinline)) void micro_kernel(size_t units, const float* __restrict a, size_t lda,
                                            const float* __restrict b, float* c, size_t ldc,
                                            const float* init, size_t ldi, Prefetch& prefetch,
                                            const void* source, size_t stride) {
    using T = typename Policy::Source;
    constexpr size_t R = ROWS, V = VECS, AR = Policy::A_ROW, AU = Policy::A_UNIT ? Policy::A_UNIT : ROWS;
    constexpr Packs PACKS = Policy::PACKS;
    const size_t panel = NR * units;
    vec acc[R][V] = {};
    // Pointers to rows 0, 3, 6, ...: an instruction's address can add one or two strides to each.
    const float* third[(R + 2) / 3];
    for (size_t i = 0; i < (R + 2) / 3; i++) third[i] = a + 3 * i * lda;
    auto value = [&](size_t i) {
        float unit;  // copied as bytes, since it may be two bf16 numbers
        memcpy(&unit, AR ? a + i * AR : third[i / 3] + i % 3 * lda, sizeof unit);
        return unit;
    };
    const T* from = (const T*)source + (PACKS == PACKS_A ? AHEAD * U * stride : 0);
    auto across = [&](size_t i, size_t n) {
        return Numbers::across(from + i, from + (U - 1) * stride + i, n);
    };
    const float* c_row = c;
    for (size_t u = 0, point = 0; u < units; point++) {
        prefetch.next_line();
        if (point < R) prefetch.next_epilogue_row();
        else if (point < 2 * R && !STREAM) {
            for (size_t j = 0; j < V; j++) __builtin_prefetch(c_row + j * VL, 1);
            c_row += ldc;
        }
        for (size_t n = std::min(prefetch.every, units - u); n; n--, u++, a += AU, b += Policy::B_UNIT) {
            if (PACKS == PACKS_A && u + AHEAD < units) {
                float* to = const_cast<float*>(a) + AHEAD * AU;
                UNROLL(8)
                for (size_t i = 0; i < R; i += VL)
                    store(to + i, across(i, std::min(VL, R - i)), std::min(VL, R - i));
            }
            vec bv[V];
            UNROLL(8)
            for (size_t j = 0; j < V; j++) {
                const float* at = b + j / NV * panel + j % NV * VL;
                bv[j] = PACKS == PACKS_B ? across(j * VL, VL) : load(at);
                if (PACKS == PACKS_B) store(const_cast<float*>(at), bv[j]);
            }
            if (PACKS != PACKS_NOTHING) from += U * stride;
            UNROLL(16)
            for (size_t i = 0; i < R; i++) UNROLL(8)
            for (size_t j = 0; j < V; j++) acc[i][j] = Numbers::add_product(acc[i][j], value(i), bv[j]);
            if (!AR) UNROLL(8)
            for (size_t i = 0; i < (R + 2) / 3; i++) third[i] += AU;
        }
    }
    UNROLL(16)
    for (size_t i = 0; i < R; i++) UNROLL(8)
    for (size_t j = 0; j < V; j++) {
        float* to = c + i * ldc + j * VL;
        if (STREAM) simd::stream(to, acc[i][j]);
        else store(to, load(init + i * ldi + j * VL) + acc[i][j]);
    }
}

using Kernel = void (*)(size_t, const float*, size_t, const float*, float*, size_t, const float*, size_t,
                        Prefetch&, const void*, size_t);
template <class Policy, size_t VECS, bool STREAM, size_t... I>
Kernel kernel_of(size_t rows, std::index_sequence<I...>) {
    static constexpr Kernel kernels[sizeof...(I)] = {micro_kernel<Policy, I + 1, VECS, STREAM>...};
    return kernels[rows - 1];
}
// The micro-kernel for a tile of rows x cols: up to MR x NR, or, with an unpacked A, up to MR / 2 rows by
// exactly 2 NR columns. One that packs B computes NR or 2 NR columns. Only tiles of NR columns, of a packed
// A, can be streamed.
template <class Policy>
Kernel kernel(size_t rows, size_t cols, bool streams = false) {
    auto any_rows = std::make_index_sequence<MR>();
    if constexpr (WIDE_TILES && !Policy::A_ROW)
        if (cols == 2 * NR) return kernel_of<Policy, 2 * NV, false>(rows, std::make_index_sequence<MR / 2>());
    if constexpr (Policy::A_ROW && !Policy::A_UNIT)
        if (streams && cols == NR) return kernel_of<Policy, NV, true>(rows, any_rows);
    if constexpr (Policy::PACKS == PACKS_NOTHING)
        if (cols <= VL) return kernel_of<Policy, 1, false>(rows, any_rows);
    return kernel_of<Policy, NV, false>(rows, any_rows);
}

// Computes a tile c (rows, cols) with this micro-kernel, which itself writes whole vectors; `whole` takes
// those of a tile that ends within a vector. The other arguments are the micro-kernel's.
void run(Kernel kernel, size_t rows, size_t cols, size_t units, const float* a, size_t lda, const float* b,
         float* c, size_t ldc, const float* init, size_t ldi, Prefetch& prefetch,
         const void* source = nullptr, size_t stride = 0) {
    if (cols % VL == 0) return kernel(units, a, lda, b, c, ldc, init, ldi, prefetch, source, stride);
    alignas(64) float whole[MR * NR];
    kernel(units, a, lda, b, whole, NR, ZEROS, 0, prefetch, nullptr, 0);
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) c[i * ldc + j] = init[i * ldi + j] + whole[i * NR + j];
}

// See gemm.h.
void tile(LayoutOfA layout, size_t rows, size_t cols, size_t units, const float* a, const float* b, float* c,
          size_t ldc, bool accumulate) {
    Kernel k = layout == PANEL        ? kernel<Packed>(rows, cols)
               : layout == SCORE_ROWS ? kernel<ScoreRows>(rows, cols)
                                      : kernel<ScoreColumns>(rows, cols);
    Prefetch nothing;
    run(k, rows, cols, units, a, 0, b, c, ldc, accumulate ? c : ZEROS, accumulate ? ldc : 0, nothing);
}

// ---------------------------------------------------------------------------------------------
// The product by all threads

// Applies the epilogue to a finished tile of C, rows x cols values from (row, col) on.
void apply(const Epilogue& e, size_t row, size_t col, size_t rows, size_t cols, float* c, size_t ldc) {
    auto each_row = [&](auto f) {
        for (size_t i = 0; i < rows; i++) f((row + i) * e.ld + col, c + i * ldc);
    };
    auto with_out = [&](auto f) { e.out_bf16 ? f(e.out_bf16) : f(e.out); };
    switch (e.kind) {
        case Epilogue::NONE:
            break;
        case Epilogue::GELU:
            with_out([&](auto* out) {
                each_row(
                    [&](size_t at, const float* x) { simd::gelu_forward(out + at, x, cols, e.activation); });
            });
            break;
        case Epilogue::GELU_GRADIENT:
            with_out([&](auto* out) {
                each_row([&](size_t at, const float* d) {
                    simd::gelu_backward(out + at, d, e.in + at, cols, e.activation);
                });
            });
            break;
        case Epilogue::ADD:
            each_row([&](size_t at, float* x) {
                for (size_t j = 0; j < cols; j++) x[j] += e.in[at + j];
            });
    }
}

// A thread's share of the sums of squares that the product before has left: one slice after each tile. The
// slice was prefetched while the tile was computed.
class SquaresShare {
  public:
    SquaresShare(const Squares& s, size_t thread, size_t team, size_t tiles)
        : squares_(s), slice_(round_up(ceil_div(s.n, tiles), SQUARES)) {
        size_t share = round_up(ceil_div(s.n, team), SQUARES);
        at_ = std::min(s.n, thread * share), end_ = std::min(s.n, at_ + share);
    }
    size_t lines_per_tile() const { return at_ < end_ ? slice_ / LINE : 0; }
    // Lets p prefetch the slice after the one that is computed next.
    void prefetch_with(Prefetch& p) const {
        p.squares = at_ + slice_ < end_ ? (const char*)(squares_.g + at_ + slice_) : nullptr;
    }
    void compute_slice() { compute(std::min(slice_, end_ - at_)); }
    void compute_rest() { compute(end_ - at_); }

  private:
    void compute(size_t n) {
        if (n) squares_.compute(at_, n), at_ += n;
    }
    const Squares& squares_;
    size_t slice_, at_, end_;
};

// One product. Either C's columns are divided among tasks (by_columns_), then B is the tasks' own operand and
// A the shared one; or C's rows are, then A is their own and B is shared. Both are cut into panels: A's of at
// most mr_ rows, B's of NR columns. "The strip" is the part of the shared operand's rows or columns that the
// shared memory holds at a time, a "chunk" the part of k.
template <class TA, class TB>
class Multiplication {
  public:
    explicit Multiplication(const Product& p)
        : p_(p),
          A_((const TA*)p.A.data),
          B_((const TB*)p.B.data),
          squares_(std::exchange(ws_.squares, {})),
          epilogue_matrix_(p.epilogue) {}

    void run() {
        if (!p_.M || !p_.N || !p_.K) return squares_.compute(0, squares_.n);
        const bool alone = omp_in_parallel() || p_.M * p_.N * p_.K < WORTH_WAKING;
        threads_ = alone ? 1 : (size_t)omp_get_max_threads();
        ws_.reserve((int)threads_);
        plan();
        first_fill_ = ws_.fills;
        ws_.fills += ceil_div(shared_side_, strip_) * ceil_div(chunks_, at_once_);
        if (threads_ == 1) return work(0, 1);
#pragma omp parallel num_threads((int)threads_)
        work((size_t)omp_get_thread_num(), (size_t)omp_get_num_threads());
    }

  private:
    // ---- the plan, made once for all threads

    void plan() {
        const size_t M = p_.M, N = p_.N, K = p_.K, am = p_.A.row;
        // A can be used unpacked if its rows consist of units. But then rows a multiple of L1_WAY apart share
        // sets of the L1 cache, and all rows of a tile must fit in a set.
        bool rows_are_units = Numbers::READY<TA> && p_.A.col == 1 && K % U == 0 && am % U == 0;
        wide_ = WIDE_TILES && rows_are_units && 2 * N >= M;
        mr_ = wide_ ? MR / 2 : MR, nr_ = wide_ ? 2 * NR : NR;
        direct_ = rows_are_units && (am * sizeof(TA) % L1_WAY || mr_ <= L1_WAYS);
        // Chunks fix the order of the sums, and so must depend on K alone.
        kc_ = round_up(ceil_div(K, ceil_div(K, KC * U)), U);
        chunks_ = ceil_div(K, kc_);
        by_columns_ = direct_ ? 2 * N >= M : N > M;
        if (by_columns_) divide_by_columns();
        else divide_by_rows();
        // A tile that is left out cannot pack a panel for others; and since tasks are of different length,
        // there are more of them, so that no thread ends long before another.
        if (p_.lower)
            tile_packs_ = PACKS_NOTHING, before_tile_ = kc_,
            tasks_ = std::min(steps_, std::max(tasks_, 4 * threads_));
        // C can be streamed if it is finished in one chunk, and written in whole, aligned vectors.
        streams_ = p_.start == FOR_LATER && chunks_ == 1 && M * N >= STREAMED && p_.ldc % VL == 0 &&
                   !direct_ && (uintptr_t)p_.C % sizeof(vec) == 0 && !p_.bias &&
                   p_.epilogue.kind == Epilogue::NONE;
        all_tiles_ = row_panels(M, mr_) * ceil_div(N, nr_) * chunks_;  // or a few more
        plan_shared();
    }
    // A task ends where a panel of B ends: with wide tiles at every other panel, unless there are few panels.
    void divide_by_columns() {
        divided_side_ = p_.N, shared_side_ = p_.M, packs_own_ = true, packs_shared_ = !direct_;
        step_ = p_.N >= 2 * threads_ * nr_ ? nr_ : NR, steps_ = ceil_div(p_.N, step_);
        tasks_ = std::min(steps_, round_up(ceil_div(p_.N, NB), threads_));
        // The first tile packs B if B's values for one k are contiguous, and no larger than when packed:
        // floats that are rounded to bf16 are twice as many lines, and waiting for them would cost the tile
        // more time than the packing.
        if (p_.K % U == 0 && p_.B.col == 1) tile_packs_ = PACKS_B;
        before_tile_ = tile_packs_ == PACKS_B ? 0 : kc_;
    }
    // A task can end after any row.
    void divide_by_rows() {
        divided_side_ = p_.M, shared_side_ = p_.N, packs_own_ = !direct_, packs_shared_ = true;
        step_ = 1, steps_ = p_.M, tasks_ = std::min(steps_, round_up(ceil_div(p_.M, MB), threads_));
        if (p_.K % U == 0 && p_.A.row == 1 && TILES_PACK_A) tile_packs_ = PACKS_A;
        before_tile_ = tile_packs_ == PACKS_A ? AHEAD * U : kc_;
    }
    // Chooses how many rows or columns (strip_) and chunks of k (at_once_) the shared memory holds.
    void plan_shared() {
        strip_ = std::min({shared_side_, SHARED_WIDTH, ws_.shared_units / (kc_ / U) / NR * NR});
        size_t room = ws_.shared_units / (round_up(strip_, NR) * (kc_ / U)),
               most = Workspace::MOST_PANELS / panels(strip_, by_columns_);
        at_once_ = packs_shared_ ? std::max<size_t>(1, std::min(room, most)) : chunks_;
        // An unpacked A is read again by each task. If it is too large to stay in the cache meanwhile, all
        // tasks compute one chunk of k before any computes the next. Several threads would have to wait for
        // each other after each chunk, so only a single thread does this.
        if (!packs_shared_ && threads_ == 1 && strip_ * p_.K * sizeof(TA) > ws_.shared_units * sizeof(float))
            at_once_ = 1;
    }

    size_t task_begin(size_t b) const {
        return std::min(divided_side_, steps_ * std::min(b, tasks_) / tasks_ * step_);
    }
    // How many panels n rows of A or columns of B are, and which row or column panel i starts with.
    size_t panels(size_t n, bool of_a) const { return of_a ? row_panels(n, mr_) : ceil_div(n, NR); }
    size_t begin(size_t n, size_t i, bool of_a) const {
        return of_a ? panel_row(n, i, mr_) : std::min(n, i * NR);
    }

    Prefetch prefetch_of(size_t at, size_t width, size_t k, size_t n, bool of_a) const {
        const Operand &a = p_.A, &b = p_.B;
        return of_a ? Prefetch::of(A_ + at * a.row + k * a.col, width, n, a.row, a.col)
                    : Prefetch::of(B_ + k * b.row + at * b.col, width, n, b.col, b.row);
    }
    // Packs a panel: `width` rows or columns from `at` on, n values from k on.
    void pack_panel(float* dst, size_t at, size_t width, size_t k, size_t n, bool of_a) const {
        const Operand &a = p_.A, &b = p_.B;
        if (of_a) pack(dst, width, A_ + at * a.row + k * a.col, a.row, a.col, width, n);
        else pack(dst, NR, B_ + k * b.row + at * b.col, b.col, b.row, width, n);
    }
    Kernel kernel_for(Packs packs, size_t rows, size_t cols) const {
        if constexpr (TILES_PACK_A)
            if (packs == PACKS_A) return kernel<PackingA<TA>>(rows, cols, streams_);
        if constexpr (Numbers::READY<TA>)  // otherwise direct_ is false
            if (direct_)
                return packs == PACKS_B ? kernel<DirectPackingB<TB>>(rows, cols) : kernel<Direct>(rows, cols);
        if (packs == PACKS_B) return kernel<PackingB<TB>>(rows, cols, streams_);
        return kernel<Packed>(rows, cols, streams_);
    }

    // ---- the work of one thread

    struct Thread {
        size_t id, team;
        float* own;  // its packed operand
        SquaresShare squares;
        uint64_t fill;  // the current content of the shared memory, see Workspace
    };
    // What a thread multiplies at a time: its task's rows or columns [d0, d0 + d) and those of the strip,
    // [s0, s0 + s), over n values of k from k on.
    struct Chunk {
        size_t d0, d, s0, s, k, n, units;
        size_t own_panels, own_tiles, shared_panels;
        size_t first_panel;  // the shared panel that this thread starts with
        size_t state;        // number of the chunk's first shared panel in Workspace::state
        float* shared;       // the packed shared operand
        Prefetch next_own;
    };

    void work(size_t id, size_t team) {
        Thread t = {id, team, ws_.private_ + id * Workspace::PRIVATE_UNITS,
                    SquaresShare(squares_, id, team, all_tiles_), first_fill_};
        for (size_t s0 = 0; s0 < shared_side_; s0 += strip_)
            for (size_t c0 = 0; c0 < chunks_; c0 += at_once_, t.fill++) {
                size_t s = std::min(strip_, shared_side_ - s0), count = std::min(at_once_, chunks_ - c0);
                if (t.fill != first_fill_ && team > 1) {
#pragma omp barrier
                }
                for (size_t b; (b = ws_.take_task(id, team, t.fill, tasks_)) < tasks_;) {
                    for (size_t q = 0; q < count; q++) {
                        Chunk c = chunk_of(t, b, s0, s, c0, q, count);
                        if (packs_own_) pack_own(t, c);
                        multiply_chunk(t, c);
                    }
                    if (streams_) simd::finish_streams();
                }
            }
        t.squares.compute_rest();
    }

    // Chunk q of the `count` from chunk c0 on, in task b.
    Chunk chunk_of(const Thread& t, size_t b, size_t s0, size_t s, size_t c0, size_t q, size_t count) const {
        Chunk c;
        c.d0 = task_begin(b), c.d = task_begin(b + 1) - c.d0, c.s0 = s0, c.s = s;
        c.k = (c0 + q) * kc_, c.n = std::min(kc_, p_.K - c.k), c.units = ceil_div(c.n, U);
        c.own_panels = panels(c.d, !by_columns_),
        c.own_tiles = wide_ ? ceil_div(c.own_panels, 2) : c.own_panels;
        c.shared_panels = panels(s, by_columns_), c.first_panel = t.id * c.shared_panels / t.team;
        c.state = q * c.shared_panels, c.shared = ws_.shared + q * round_up(s, NR) * (kc_ / U);
        // What this thread will most likely pack next is its own operand: the next chunk of k, or else the
        // first chunk of the next task.
        bool more = q + 1 < count;
        size_t next_b = more ? b : b + 1, next_k = more ? c.k + kc_ : c0 * kc_, next_d = task_begin(next_b);
        c.next_own = prefetch_of(next_d, task_begin(next_b + 1) - next_d, next_k,
                                 std::min(kc_, p_.K - next_k), !by_columns_);
        return c;
    }

    // Packs the task's own operand; of panels that the first tile packs, only their beginning.
    void pack_own(const Thread& t, const Chunk& c) const {
        for (size_t y = 0; y < c.own_panels; y++) {
            size_t r = begin(c.d, y, !by_columns_), width = begin(c.d, y + 1, !by_columns_) - r;
            size_t cols =
                by_columns_ ? width : begin(c.s, c.first_panel + 1, false) - begin(c.s, c.first_panel, false);
            size_t n = cols == NR ? std::min(c.n, before_tile_) : c.n;
            pack_panel(t.own + r * c.units, c.d0 + r, width, c.k, n, !by_columns_);
        }
    }
    // Packs shared panel x, unless it is packed already. If no thread has begun the panel after it, `next`
    // becomes the prefetching of that panel, and the result is true.
    bool pack_shared(const Thread& t, const Chunk& c, size_t x, Prefetch* next) const {
        size_t r = begin(c.s, x, by_columns_), width = begin(c.s, x + 1, by_columns_) - r;
        ws_.pack_once(c.state + x, t.fill,
                      [&] { pack_panel(c.shared + r * c.units, c.s0 + r, width, c.k, c.n, by_columns_); });
        size_t after = x + 1 < c.shared_panels ? x + 1 : 0, at = begin(c.s, after, by_columns_);
        if (!ws_.not_begun(c.state + after, t.fill)) return false;
        size_t after_width = begin(c.s, after + 1, by_columns_) - at;
        *next = prefetch_of(c.s0 + at, after_width, c.k, c.n, by_columns_);
        next->packed_to(c.shared + at * c.units, after_width * c.units);
        return true;
    }

    // Computes all tiles of a chunk: each shared panel with all own panels. Each thread starts with another
    // shared panel, so that at first they all pack different ones.
    void multiply_chunk(Thread& t, Chunk& c) const {
        for (size_t turn = 0, x = c.first_panel; turn < c.shared_panels;
             turn++, x = x + 1 < c.shared_panels ? x + 1 : 0) {
            Prefetch next_shared, *prefetch = &c.next_own;
            size_t tiles = (c.shared_panels - turn) * c.own_tiles;
            if (packs_shared_ && pack_shared(t, c, x, &next_shared))
                prefetch = &next_shared, tiles = c.own_tiles;
            size_t most = std::max(prefetch->lines, t.squares.lines_per_tile() * tiles);
            prefetch->set_pace(c.units * tiles / std::max<size_t>(1, most),
                               std::max<size_t>(1, c.units / (2 * mr_ + 1)));
            for (size_t y = 0; y < c.own_panels;) y = run_tile(t, c, x, y, !turn, *prefetch);
        }
    }
    // Computes the tile of shared panel x and own panel y, or with wide tiles own panels y and y + 1. Returns
    // the next own panel.
    size_t run_tile(Thread& t, const Chunk& c, size_t x, size_t y, bool first, Prefetch& prefetch) const {
        const Operand &A = p_.A, &B = p_.B;
        size_t shared_r = begin(c.s, x, by_columns_),
               shared_width = begin(c.s, x + 1, by_columns_) - shared_r;
        size_t own_r = begin(c.d, y, !by_columns_), end = wide_ && own_r + nr_ <= c.d ? y + 2 : y + 1;
        size_t own_width = begin(c.d, end, !by_columns_) - own_r;
        size_t row = by_columns_ ? c.s0 + shared_r : c.d0 + own_r,
               rows = by_columns_ ? shared_width : own_width;
        size_t col = by_columns_ ? c.d0 + own_r : c.s0 + shared_r,
               cols = by_columns_ ? own_width : shared_width;
        if (p_.lower && row + rows <= col) return end;
        const float *shared = c.shared + shared_r * c.units, *own = t.own + own_r * c.units;
        const float *a = by_columns_ ? shared : own, *b = by_columns_ ? own : shared;
        if (direct_) a = (const float*)(A_ + row * A.row + c.k);
        float* to = p_.C + row * p_.ldc + col;
        bool adds = c.k || p_.start == ACCUMULATE, finished = c.k + c.n == p_.K;
        const float* init = adds ? to : p_.bias ? p_.bias + col : ZEROS;
        t.squares.prefetch_with(prefetch);
        prefetch.before_epilogue(finished ? epilogue_matrix_ : EpilogueMatrix(), row, col, cols);
        Packs packs = packs_own_ && first && cols >= NR ? tile_packs_ : PACKS_NOTHING;
        const void* source = by_columns_ ? (const void*)(B_ + c.k * B.row + col) : A_ + row + c.k * A.col;
        gemm::run(kernel_for(packs, rows, cols), rows, cols, c.units, a, direct_ ? A.row / U : 0, b, to,
                  p_.ldc, init, adds ? p_.ldc : 0, prefetch, source, by_columns_ ? B.row : A.col);
        if (finished) apply(p_.epilogue, row, col, rows, cols, to, p_.ldc);
        t.squares.compute_slice();
        return end;
    }

    static constexpr bool TILES_PACK_A = sizeof(TA) * U <= sizeof(float);
    static_assert(!WIDE_TILES || MR / 2 <= L1_WAYS, "wide tiles always use A unpacked");
    Workspace& ws_ = workspace();
    const Product& p_;
    const TA* A_;
    const TB* B_;
    const Squares squares_;
    const EpilogueMatrix epilogue_matrix_;
    size_t threads_ = 1;
    // the plan
    bool wide_, direct_, by_columns_, packs_own_, packs_shared_, streams_;
    size_t mr_, nr_;                     // largest tile
    size_t kc_, chunks_;                 // values of k in a chunk, and the number of chunks
    size_t divided_side_, shared_side_;  // M and N, or N and M
    size_t step_, steps_, tasks_;        // tasks_ tasks, which end at multiples of step_; steps_ steps in all
    Packs tile_packs_ = PACKS_NOTHING;
    size_t before_tile_;  // values of k that are packed before the first tile, which packs the rest
    size_t strip_, at_once_, all_tiles_;
    uint64_t first_fill_;  // number of this product's first content of the shared memory
};

void run_product(const Product& p) {
#ifdef GEMM_BF16
    bool a = p.A.type == BF16, b = p.B.type == BF16;
    if (a && b) Multiplication<bf16, bf16>(p).run();
    else if (a) Multiplication<bf16, float>(p).run();
    else if (b) Multiplication<float, bf16>(p).run();
    else Multiplication<float, float>(p).run();
#else
    if (p.A.type != FP32 || p.B.type != FP32)
        throw std::logic_error("gemm: bf16 operands in a product of floats");
    Multiplication<float, float>(p).run();
#endif
}

// ---------------------------------------------------------------------------------------------
// Few rows: generation

// The part of X that stays in the L1 cache while rows of W pass.
constexpr size_t X_IN_L1_BYTES = 24576;

// Y = X W^T + b for M rows of X, in units, and R rows of W, AT_ONCE rows of W at a time. Each dot product is
// summed lane by lane and then across the lanes, in an order that depends on K alone. IN_BLOCKS: k is divided
// into blocks, and all R rows of W use a block of X, which stays in the L1 cache, before the next one.
//
// With one row of X the processor prefetches W itself, as fast as memory delivers it. With more rows it has
// too many instructions in between to look far enough, so the loop prefetches what it will read a while
// later, into the L2 cache, which can wait for more lines at a time than L1.
template <size_t M, size_t R, size_t AT_ONCE, bool IN_BLOCKS = false>
void few_dots(float* Y, const float* X, const Weight* W, const float* b, size_t K, size_t ldy) {
    constexpr size_t STEP = U * VL, AHEAD_BYTES = 8192, AHEAD_ROWS = 4;
    const size_t ldx = ceil_div(K, U),
                 k_block = IN_BLOCKS ? X_IN_L1_BYTES / (M * sizeof(float)) / VL * STEP : K;  // whole steps
    vec sums[round_up(M * R, VL)] = {};
    for (size_t k0 = 0; k0 < K; k0 += k_block) {
        const size_t end = std::min(K, k0 + k_block);
        UNROLL(16)
        for (size_t r0 = 0; r0 < R; r0 += AT_ONCE) {
            vec acc[AT_ONCE][M];
            for (size_t r = 0; r < AT_ONCE; r++)
                for (size_t m = 0; m < M; m++) acc[r][m] = sums[(r0 + r) * M + m];
            const Weight* next = W + (r0 + AHEAD_ROWS) * K;
            if (IN_BLOCKS && r0 + AHEAD_ROWS >= R) next = end < K ? next - R * K + k_block : next - k0;
            auto step = [&](size_t k, size_t n) __attribute__((always_inline)) {
                vec w[AT_ONCE];
                for (size_t r = 0; r < AT_ONCE; r++) {
                    const Weight* from = W + (r0 + r) * K + k;
                    w[r] = Numbers::along(from, n);
                    const char* later =
                        IN_BLOCKS ? (const char*)(next + r * K + k) : (const char*)from + AHEAD_BYTES;
                    if (M > 1) __builtin_prefetch(later, 0, 2);
                }
                for (size_t m = 0; m < M; m++) {
                    vec x = load(X + m * ldx + k / U, ceil_div(n, U));
                    if constexpr (AT_ONCE > 1) simd::in_register(x);
                    for (size_t r = 0; r < AT_ONCE; r++)
                        acc[r][m] = Numbers::add_products(acc[r][m], x, w[r]);
                }
            };
            size_t k = k0;
            for (; k + STEP <= end; k += STEP) step(k, STEP);
            if (k < end) step(k, end - k);
            for (size_t r = 0; r < AT_ONCE; r++)
                for (size_t m = 0; m < M; m++) sums[(r0 + r) * M + m] = acc[r][m];
        }
    }
    UNROLL(16)
    for (size_t first = 0; first < M * R; first += VL) {
        simd::sum_each(sums + first);
        for (size_t i = first; i < std::min(first + VL, M * R); i++)
            Y[i % M * ldy + i / M] = sums[first][i - first] + (b ? b[i / M] : 0.0f);
    }
}

// N outputs of all rows, on the calling thread.
void few_columns(float* Y, const float* X, const Weight* W, const float* b, size_t M, size_t K, size_t N,
                 size_t ldy) {
    const size_t ldx = ceil_div(K, U);
    size_t m = 0;
    auto rows = [&](auto count) {
        constexpr size_t ROWS = decltype(count)::value, AT_ONCE = ROWS >= 4 && MANY_REGISTERS ? 2 : 1;
        constexpr size_t R = std::max(VL / ROWS, AT_ONCE);
        for (; m + ROWS <= M; m += ROWS, X += ROWS * ldx, Y += ROWS * ldy) {
            size_t n = 0;
            // A call loads X from L2 into L1 once; the more rows of W it computes, the less that costs.
            if (ROWS >= 4 && ROWS * ldx * sizeof(float) > X_IN_L1_BYTES)
                for (; n + VL <= N; n += VL)
                    few_dots<ROWS, VL, AT_ONCE, true>(Y + n, X, W + n * K, b ? b + n : nullptr, K, ldy);
            for (; n + R <= N; n += R)
                few_dots<ROWS, R, AT_ONCE>(Y + n, X, W + n * K, b ? b + n : nullptr, K, ldy);
            for (; n < N; n++) few_dots<ROWS, 1, 1>(Y + n, X, W + n * K, b ? b + n : nullptr, K, ldy);
        }
    };
    rows(std::integral_constant<size_t, 8>());
    rows(std::integral_constant<size_t, 4>());
    rows(std::integral_constant<size_t, 2>());
    rows(std::integral_constant<size_t, 1>());
}

void few_rows(float* Y, const float* X, const void* weights, const float* b, size_t M, size_t K, size_t N,
              size_t ldy) {
    // bf16: X is rounded into the workspace, as many rows at a time as it holds.
    constexpr bool ROUNDS_X = !std::is_same<Weight, float>::value;
    constexpr size_t COLUMNS = 16;
    const Weight* W = (const Weight*)weights;
    const size_t ldx = ceil_div(K, U);
    if (!K) throw std::logic_error("few_rows: K is 0");
    if (omp_in_parallel() && !ROUNDS_X) return few_columns(Y, X, W, b, M, K, N, ldy);
    size_t most = M;
    if (ROUNDS_X) {
        workspace().reserve(1);
        most = std::max<size_t>(1, workspace().shared_units / ldx);
    }
    for (size_t m = 0; m < M; m += most) {
        size_t rows = std::min(most, M - m);
        const float* x = X + m * K;
        if (ROUNDS_X) {
            float* units = workspace().shared;
            for (size_t i = 0; i < rows; i++) to_units(units + i * ldx, x + i * K, K);
            x = units;
        }
#pragma omp parallel for schedule(static)
        for (size_t n = 0; n < N; n += COLUMNS)
            few_columns(Y + m * ldy + n, x, W + n * K, b ? b + n : nullptr, rows, K, std::min(COLUMNS, N - n),
                        ldy);
    }
}

// ---------------------------------------------------------------------------------------------

// See gemm.h.
double measure_peak_flops() {
    double best = 0;
    size_t threads = (size_t)omp_get_max_threads();
    constexpr size_t units = 64, reps = 4000;
    for (int trial = 0; trial < 5; trial++) {
        double t = 0;
#pragma omp parallel reduction(max : t)
        {
            alignas(64) float a[MR * units] = {}, b[NR * units] = {}, c[MR * NR];
            Prefetch nothing;
#pragma omp barrier
            auto t0 = std::chrono::steady_clock::now();
            for (size_t r = 0; r < reps; r++) {
                kernel<Packed>(MR, NR)(units, a, 0, b, c, NR, ZEROS, 0, nothing, nullptr, 0);
                __asm__ volatile("" : : "r"(c) : "memory");
            }
            t = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
        }
        best = std::max(best, 2.0 * MR * NR * units * U * reps * (double)threads / t);
    }
    return best;
}

}  // namespace

#ifdef GEMM_BF16

const Kernels bf16_kernels = {run_product, few_rows, pack<float>, to_units, tile, measure_peak_flops};

#else

const Kernels fp32_kernels = {run_product, few_rows, pack<float>, to_units, tile, measure_peak_flops};

// ---------------------------------------------------------------------------------------------
// The public functions

// By the thread's number. Made at the first call, not when the program starts: a portable program has this
// code for processors that it may not be running on.
static std::deque<Workspace>& own_workspaces() {
    static std::deque<Workspace> all;
    return all;
}

Workspace& workspace() {
    static Workspace shared_by_all(SHARED_UNITS);
    if (!omp_in_parallel()) return shared_by_all;
    const size_t thread = (size_t)omp_get_ancestor_thread_num(1);
    if (thread >= own_workspaces().size())
        throw std::logic_error("gemm: a product in a parallel region, without reserve_own()");
    return own_workspaces()[thread];
}
size_t workspace_bytes(int threads) { return Workspace::bytes(SHARED_UNITS, threads); }
void reserve(int threads) { workspace().reserve(threads); }
size_t own_workspace_bytes(int threads) { return (size_t)threads * Workspace::bytes(OWN_UNITS, 1); }
void reserve_own(int threads) {
    while (own_workspaces().size() < (size_t)threads) own_workspaces().emplace_back(OWN_UNITS);
    for (Workspace& w : own_workspaces()) w.reserve(1);
}

static const Kernels& kernels(Dtype dtype) { return dtype == BF16 ? bf16_kernels : fp32_kernels; }

void multiply(Dtype dtype, const Product& product) { kernels(dtype).multiply(product); }

static size_t or_dense(size_t ld, size_t dense) { return ld ? ld : dense; }
// bf16 numbers are multiplied as soon as one operand is bf16.
static void multiply(const Product& p) { multiply(p.A.type == BF16 || p.B.type == BF16 ? BF16 : FP32, p); }

template <class TX, class TW>
static Product forward_product(float* Y, const TX* X, const TW* W, const float* b, size_t M, size_t K,
                               size_t N, size_t ldy) {
    return {M, N, K, Operand(X, K, 1), Operand(W, 1, K), Y, or_dense(ldy, N), OVERWRITE, b};
}
void forward(float* Y, const float* X, const float* W, const float* b, size_t M, size_t K, size_t N,
             size_t ldy) {
    multiply(forward_product(Y, X, W, b, M, K, N, ldy));
}
void forward(float* Y, const bf16* X, const float* W, const float* b, size_t M, size_t K, size_t N,
             size_t ldy) {
    multiply(forward_product(Y, X, W, b, M, K, N, ldy));
}
void forward(float* Y, const float* X, const bf16* W, const float* b, size_t M, size_t K, size_t N,
             size_t ldy) {
    multiply(forward_product(Y, X, W, b, M, K, N, ldy));
}

void forward_gelu(float* Y, float* pre, const float* X, const float* W, const float* b, size_t M, size_t K,
                  size_t N, int activation) {
    Product p = forward_product(pre, X, W, b, M, K, N, 0);
    p.epilogue = {Epilogue::GELU, nullptr, Y, nullptr, N, activation};
    multiply(p);
}
void forward_gelu(bf16* Y, float* pre, const bf16* X, const float* W, const float* b, size_t M, size_t K,
                  size_t N, int activation) {
    Product p = forward_product(pre, X, W, b, M, K, N, 0);
    p.epilogue = {Epilogue::GELU, nullptr, nullptr, Y, N, activation};
    multiply(p);
}

template <class TY>
static Product input_product(float* dX, const TY* dY, const float* W, size_t M, size_t K, size_t N,
                             size_t ldy) {
    return {M, K, N, Operand(dY, or_dense(ldy, N), 1), Operand(W, K, 1), dX, K};
}
template <class TY>
static void input_gradient_of(float* dX, const TY* dY, const float* W, size_t M, size_t K, size_t N,
                              const float* add, size_t ldy) {
    Product p = input_product(dX, dY, W, M, K, N, ldy);
    if (add) p.epilogue = {Epilogue::ADD, add, nullptr, nullptr, K};
    multiply(p);
}
void input_gradient(float* dX, const float* dY, const float* W, size_t M, size_t K, size_t N,
                    const float* add, size_t ldy) {
    input_gradient_of(dX, dY, W, M, K, N, add, ldy);
}
void input_gradient(float* dX, const bf16* dY, const float* W, size_t M, size_t K, size_t N, const float* add,
                    size_t ldy) {
    input_gradient_of(dX, dY, W, M, K, N, add, ldy);
}
void input_gradient_gelu(float* dX, float* sums, const float* dY, const float* W, const float* pre, size_t M,
                         size_t K, size_t N, int activation) {
    Product p = input_product(sums, dY, W, M, K, N, 0);
    p.epilogue = {Epilogue::GELU_GRADIENT, pre, dX, nullptr, K, activation};
    multiply(FP32, p);
}
void input_gradient_gelu(bf16* dX, float* sums, const float* dY, const float* W, const float* pre, size_t M,
                         size_t K, size_t N, int activation) {
    Product p = input_product(sums, dY, W, M, K, N, 0);
    p.epilogue = {Epilogue::GELU_GRADIENT, pre, nullptr, dX, K, activation};
    multiply(BF16, p);
}

template <class TY, class TX>
static void weight_gradient_of(float* dW, float* db, const TY* dY, const TX* X, size_t M, size_t K, size_t N,
                               bool accumulate, double* squares, size_t ldy) {
    finish_squares();
    multiply({N, K, M, Operand(dY, 1, or_dense(ldy, N)), Operand(X, K, 1), dW, K,
              accumulate ? ACCUMULATE : FOR_LATER});
    if (db) bias_gradient(db, dY, M, N, accumulate, ldy);
    if (squares) workspace().squares = {dW, squares, N * K};
}
void weight_gradient(float* dW, float* db, const float* dY, const float* X, size_t M, size_t K, size_t N,
                     bool accumulate, double* squares, size_t ldy) {
    weight_gradient_of(dW, db, dY, X, M, K, N, accumulate, squares, ldy);
}
void weight_gradient(float* dW, float* db, const float* dY, const bf16* X, size_t M, size_t K, size_t N,
                     bool accumulate, double* squares, size_t ldy) {
    weight_gradient_of(dW, db, dY, X, M, K, N, accumulate, squares, ldy);
}
void weight_gradient(float* dW, float* db, const bf16* dY, const bf16* X, size_t M, size_t K, size_t N,
                     bool accumulate, double* squares, size_t ldy) {
    weight_gradient_of(dW, db, dY, X, M, K, N, accumulate, squares, ldy);
}

void product(float* Y, const float* A, const float* B, size_t M, size_t K, size_t N) {
    multiply({M, N, K, Operand(A, K, 1), Operand(B, N, 1), Y, N});
}
void product(float* Y, const bf16* A, const bf16* B, size_t M, size_t K, size_t N) {
    multiply({M, N, K, Operand(A, K, 1), Operand(B, N, 1), Y, N});
}

template <class T>
static void gram_of(float* Y, const T* X, size_t N, size_t K) {
    constexpr size_t BLOCK = 32;
    Product p = {N, N, K, Operand(X, K, 1), Operand(X, 1, K), Y, N};
    p.lower = true;
    multiply(p);
#pragma omp parallel for schedule(dynamic, 1)
    for (size_t i0 = 0; i0 < N; i0 += BLOCK)
        for (size_t j0 = i0; j0 < N; j0 += BLOCK)
            for (size_t i = i0; i < std::min(N, i0 + BLOCK); i++)
                for (size_t j = std::max(j0, i + 1); j < std::min(N, j0 + BLOCK); j++)
                    Y[i * N + j] = Y[j * N + i];
}
void gram(float* Y, const float* X, size_t N, size_t K) { gram_of(Y, X, N, K); }
void gram(float* Y, const bf16* X, size_t N, size_t K) { gram_of(Y, X, N, K); }

template <class TY>
static void bias_gradient_of(float* db, const TY* dY, size_t M, size_t N, bool accumulate, size_t ldy) {
    constexpr size_t VECS = 4, STRIP = VECS * VL;
#pragma omp parallel for schedule(static)
    for (size_t n0 = 0; n0 < N; n0 += STRIP) {
        vec sum[VECS] = {};
        const TY* d = dY + n0;
        if (N - n0 >= STRIP)  // a length that the compiler knows
            for (size_t m = 0; m < M; m++, d += ldy)
                for (size_t i = 0; i < VECS; i++) sum[i] += load(d + i * VL);
        else
            for (size_t m = 0; m < M; m++, d += ldy)
                for (size_t i = 0; i * VL < N - n0; i++) sum[i] += load(d + i * VL, N - n0 - i * VL);
        for (size_t n = n0, i = 0; n < N && i < VECS; n += VL, i++)
            store(db + n, accumulate ? load(db + n, N - n) + sum[i] : sum[i], N - n);
    }
}
void bias_gradient(float* db, const float* dY, size_t M, size_t N, bool accumulate, size_t ldy) {
    bias_gradient_of(db, dY, M, N, accumulate, or_dense(ldy, N));
}
void bias_gradient(float* db, const bf16* dY, size_t M, size_t N, bool accumulate, size_t ldy) {
    bias_gradient_of(db, dY, M, N, accumulate, or_dense(ldy, N));
}

void sum_squares(double* sums, const float* g, size_t n) {
    const Squares squares = {g, sums, n};
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i += SQUARES) squares.compute(i, std::min(SQUARES, n - i));
}
void finish_squares() {
    const Squares left = std::exchange(workspace().squares, {});
    if (left.n) sum_squares(left.sums, left.g, left.n);
}

void few_rows(float* Y, const float* X, const float* W, const float* b, size_t M, size_t K, size_t N,
              size_t ldy) {
    fp32_kernels.few_rows(Y, X, W, b, M, K, N, or_dense(ldy, N));
}
void few_rows(float* Y, const float* X, const bf16* W, const float* b, size_t M, size_t K, size_t N,
              size_t ldy) {
    bf16_kernels.few_rows(Y, X, W, b, M, K, N, or_dense(ldy, N));
}

void pack(Dtype dtype, float* dst, size_t ld, const float* src, size_t row, size_t col, size_t n, size_t K) {
    kernels(dtype).pack(dst, ld, src, row, col, n, K);
}
void to_units(Dtype dtype, float* dst, const float* src, size_t n) { kernels(dtype).to_units(dst, src, n); }
void tile(Dtype dtype, LayoutOfA layout, size_t rows, size_t cols, size_t units, const float* a,
          const float* b, float* c, size_t ldc, bool accumulate) {
    kernels(dtype).tile(layout, rows, cols, units, a, b, c, ldc, accumulate);
}
double measure_peak_flops(Dtype dtype) { return kernels(dtype).measure_peak_flops(); }

#endif  // GEMM_BF16

}  // namespace gemm
