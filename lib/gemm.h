// gemm.h - the CPU's matrix products: the five of a linear layer, products of few rows for generation, and
// the tiles of which attention is made. How they keep the processor busy is lib/gemm.cpp's business.
//
// Matrices are row-major. `ld...` is the distance from row to row in values; 0 means that rows follow each
// other without a gap. M rows (tokens), K inputs, N outputs of a layer: X (M,K), W (N,K), Y (M,N).
//
// Where all operands are floats, products are made of floats (fp32). Where any is bf16, all are rounded to
// bf16 (nearest, ties to even) and multiplied as such. Sums are always fp32: each element is summed over k in
// one fixed order, whatever the number of threads and its place in the matrix. All threads work.
// M, K and N are at least 1. All products share one workspace: call them from one thread at a time, outside
// parallel regions (few_rows excepted).
//
// What is not promised: the order of a sum on another processor, or speed for fewer than 8 rows (see
// few_rows).
#pragma once

#include "lib/gpt2.h"
#include "lib/vec.h"

namespace gemm {

using simd::bf16;

// ---------------------------------------------------------------------------------------------
// A linear layer

// Y = X W^T + b; b (N) or null.
void forward(float* Y, const float* X, const float* W, const float* b, size_t M, size_t K, size_t N,
             size_t ldy = 0);
void forward(float* Y, const bf16* X, const float* W, const float* b, size_t M, size_t K, size_t N,
             size_t ldy = 0);
void forward(float* Y, const float* X, const bf16* W, const float* b, size_t M, size_t K, size_t N,
             size_t ldy = 0);

// pre (M,N) = X W^T + b, which backward needs; Y (M,N) = gelu(pre). activation: see simd::gelu.
void forward_gelu(float* Y, float* pre, const float* X, const float* W, const float* b, size_t M, size_t K,
                  size_t N, int activation);
void forward_gelu(bf16* Y, float* pre, const bf16* X, const float* W, const float* b, size_t M, size_t K,
                  size_t N, int activation);

// dX (M,K) = dY W, plus `add` (M,K) unless null.
void input_gradient(float* dX, const float* dY, const float* W, size_t M, size_t K, size_t N,
                    const float* add = nullptr, size_t ldy = 0);
void input_gradient(float* dX, const bf16* dY, const float* W, size_t M, size_t K, size_t N,
                    const float* add = nullptr, size_t ldy = 0);

// dX (M,K) = (dY W) gelu'(pre), the gradient of what the GELU read, pre (M,K). sums (M,K) receives dY W; it
// may be dX. With dX in bf16 the product is one of bf16 numbers too.
void input_gradient_gelu(float* dX, float* sums, const float* dY, const float* W, const float* pre, size_t M,
                         size_t K, size_t N, int activation);
void input_gradient_gelu(bf16* dX, float* sums, const float* dY, const float* W, const float* pre, size_t M,
                         size_t K, size_t N, int activation);

// dW (N,K) = dY^T X, or += where accumulate; db (N) likewise the column sums of dY, unless null.
// squares, unless null, receives the sums of squares of dW, as sum_squares() makes them. They cost little
// because the next product makes them while it computes: they are there after it, or after finish_squares().
void weight_gradient(float* dW, float* db, const float* dY, const float* X, size_t M, size_t K, size_t N,
                     bool accumulate, double* squares = nullptr, size_t ldy = 0);
void weight_gradient(float* dW, float* db, const float* dY, const bf16* X, size_t M, size_t K, size_t N,
                     bool accumulate, double* squares = nullptr, size_t ldy = 0);
void weight_gradient(float* dW, float* db, const bf16* dY, const bf16* X, size_t M, size_t K, size_t N,
                     bool accumulate, double* squares = nullptr, size_t ldy = 0);

// db (N) = column sums of dY (M,N), or += where accumulate.
void bias_gradient(float* db, const float* dY, size_t M, size_t N, bool accumulate = true, size_t ldy = 0);
void bias_gradient(float* db, const bf16* dY, size_t M, size_t N, bool accumulate = true, size_t ldy = 0);

// sums[i] = the sum of squares of g[i * SQUARES] to g[(i + 1) * SQUARES - 1], for n values g in all; sums has
// ceil(n / SQUARES).
constexpr size_t SQUARES = 1024;
void sum_squares(double* sums, const float* g, size_t n);
// Makes the sums that the last weight_gradient() left to the next product. Until then dW and squares must
// stay.
void finish_squares();

// ---------------------------------------------------------------------------------------------
// Generation

// Y (M,N) = X (M,K) W^T + b for few rows, where the time goes into reading W: each row of W is read once. A
// row's result does not depend on M; its order of summation is not forward()'s. Inside a parallel region the
// fp32 form works on the calling thread, and all threads may call it at once; the bf16 form rounds X into the
// shared workspace and must be called by one thread, outside parallel regions.
void few_rows(float* Y, const float* X, const float* W, const float* b, size_t M, size_t K, size_t N,
              size_t ldy = 0);
void few_rows(float* Y, const float* X, const bf16* W, const float* b, size_t M, size_t K, size_t N,
              size_t ldy = 0);

// ---------------------------------------------------------------------------------------------
// Tiles, for attention: one thread multiplies small matrices that it has packed
//
// A packed operand is a sequence of panels: of A up to MR rows each, of B NR columns. A unit is 4 bytes: one
// float, or with the AVX-512 bf16 dot product two consecutive values of k in bf16. K values make
// units(dtype, K) units. A panel holds, unit after unit, that unit of all its rows (or columns).

#if defined(__AVX512F__)
constexpr size_t MR = 14;
#elif defined(__aarch64__)  // NEON: 32 registers
constexpr size_t MR = 12;
#else
constexpr size_t MR = 6;
#endif
constexpr size_t NR = 2 * simd::VL;
constexpr size_t SCORES = 64;  // columns of attention's tile of scores

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr bool BF16_DOT_PRODUCT = true;  // bf16 numbers are multiplied in pairs; else rounded ones as floats
#else
constexpr bool BF16_DOT_PRODUCT = false;
#endif
inline size_t per_unit(Dtype dtype) { return dtype == BF16 && BF16_DOT_PRODUCT ? 2 : 1; }
inline size_t units(Dtype dtype, size_t K) { return ceil_div(K, per_unit(dtype)); }

// Rows are dealt out evenly to panels of at most `most`; panel i begins at row panel_row(i).
inline size_t row_panels(size_t rows, size_t most = MR) { return ceil_div(rows, most); }
inline size_t panel_row(size_t rows, size_t i, size_t most = MR) { return rows * i / row_panels(rows, most); }

// Packs n rows of K values, value (r, k) at src[r * row + k * col]: dst[u * ld + r] = unit u of row r. ld is
// n, or a multiple of VL; then what lies beyond n in a row's last vector is set to 0.
void pack(Dtype dtype, float* dst, size_t ld, const float* src, size_t row, size_t col, size_t n, size_t K);
// dst = the units(dtype, n) units of n consecutive values.
void to_units(Dtype dtype, float* dst, const float* src, size_t n);

// Where a tile's A comes from. PANEL: packed by pack(). SCORE_COLUMNS: element (i, u) is a[u * SCORES + i],
// columns of a tile of scores. SCORE_ROWS: a[i * SCORES / per_unit(dtype) + u], rows of one.
enum TileOf { PANEL, SCORE_COLUMNS, SCORE_ROWS };
// c (rows, cols; row stride ldc) = A B, or += where accumulate; rows <= MR, cols <= NR. b: a packed panel.
void tile(Dtype dtype, TileOf of, size_t rows, size_t cols, size_t units, const float* a, const float* b,
          float* c, size_t ldc, bool accumulate);

// ---------------------------------------------------------------------------------------------
// The workspace that all products share

// Its bytes for that many threads. reserve() allocates it, and throws Error where memory is short; without it
// the first product does.
size_t workspace_bytes(int threads);
void reserve(int threads);

// FLOP/s of the micro-kernel on all threads with operands in the first cache: the practical peak, measured
// now (best of 5 trials).
double measure_peak_flops(Dtype dtype);

}  // namespace gemm
