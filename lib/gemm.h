// gemm.h - matrix products on the CPU: those of a linear layer, plain ones for the optimizer, products of few
// rows for text generation, and small products of packed matrices for attention.
//
// The words used here and in lib/gemm.cpp, for a product C (M,N) = A (M,K) B (K,N):
//     tile          a rectangle of C, up to MR rows by NR columns, that is computed in registers
//     micro-kernel  the innermost loop: computes one tile, going along k
//     panel         what a tile needs of an operand: up to MR rows of A, or NR columns of B
//     packing       copying a panel to contiguous memory, in the order in which the micro-kernel reads it
//     unit          4 bytes of a packed panel: a float, or in bf16 two consecutive values of k, where the
//                   processor multiplies bf16 numbers in pairs
//     epilogue      work on a finished tile of C while it is in the cache, such as the GELU
//
// Matrices are row-major. ld, ldy etc. are distances from row to row in values; 0 means that rows follow each
// other without a gap. In a linear layer M counts rows (tokens), K inputs, N outputs: X (M,K), W (N,K), Y
// (M,N). M, K and N are at least 1.
//
// If all operands are floats, floats are multiplied. If any is bf16, all are rounded to bf16 (to nearest,
// ties to even) and then multiplied. Sums are always fp32. Each element of a result is summed over k in an
// order that depends on K alone, not on the number of threads, on M and N, or on the element's place. Another
// processor may sum in another order.
//
// All products use all threads and share one workspace: call them from one thread at a time, outside parallel
// regions. Exceptions: inside a parallel region that is not nested in another, each thread may call
// product(), gram() and sum_squares() for matrices of its own, if reserve_own() was called before; and
// few_rows() of floats, pack(), to_units() and tile() work on the calling thread. A product of fewer than 8
// rows is slow; few_rows() is made for it.
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

// The same through a GELU before the layer, whose input was pre (M,K): dX (M,K) = (dY W) gelu'(pre). sums
// (M,K) receives dY W; it may be dX. If dX is bf16, the product is one of bf16 numbers too.
void input_gradient_gelu(float* dX, float* sums, const float* dY, const float* W, const float* pre, size_t M,
                         size_t K, size_t N, int activation);
void input_gradient_gelu(bf16* dX, float* sums, const float* dY, const float* W, const float* pre, size_t M,
                         size_t K, size_t N, int activation);

// dW (N,K) = dY^T X, or += if accumulate; db (N) likewise the column sums of dY, unless null.
// squares, unless null, receives the sums of squares of dW, as from sum_squares(). They are not computed at
// once: the next product computes them in between its tiles, while it waits for memory anyway. They are
// complete after that product, or after finish_squares(); until then dW must not change.
void weight_gradient(float* dW, float* db, const float* dY, const float* X, size_t M, size_t K, size_t N,
                     bool accumulate, double* squares = nullptr, size_t ldy = 0);
void weight_gradient(float* dW, float* db, const float* dY, const bf16* X, size_t M, size_t K, size_t N,
                     bool accumulate, double* squares = nullptr, size_t ldy = 0);
void weight_gradient(float* dW, float* db, const bf16* dY, const bf16* X, size_t M, size_t K, size_t N,
                     bool accumulate, double* squares = nullptr, size_t ldy = 0);

// db (N) = column sums of dY (M,N), or += if accumulate.
void bias_gradient(float* db, const float* dY, size_t M, size_t N, bool accumulate = true, size_t ldy = 0);
void bias_gradient(float* db, const bf16* dY, size_t M, size_t N, bool accumulate = true, size_t ldy = 0);

// sums[i] = the sum of squares of g[i * SQUARES] to g[(i + 1) * SQUARES - 1], for n values g in all; sums has
// ceil(n / SQUARES) elements.
constexpr size_t SQUARES = 1024;
void sum_squares(double* sums, const float* g, size_t n);
// Computes the sums that the last weight_gradient() has left for the next product, if none has followed.
void finish_squares();

// ---------------------------------------------------------------------------------------------
// Plain products, for the optimizer Muon

// Y (M,N) = A (M,K) B (K,N).
void product(float* Y, const float* A, const float* B, size_t M, size_t K, size_t N);
void product(float* Y, const bf16* A, const bf16* B, size_t M, size_t K, size_t N);

// Y (N,N) = X X^T, of X (N,K). It computes half of this symmetric matrix and copies it to the other half.
void gram(float* Y, const float* X, size_t N, size_t K);
void gram(float* Y, const bf16* X, size_t N, size_t K);

// ---------------------------------------------------------------------------------------------
// Generation

// Y (M,N) = X (M,K) W^T + b for few rows. With one row, reading W takes nearly all the time. So 16 rows of W
// at a time are multiplied with all rows of X, 8 of these at a time, and W comes from memory once (bf16: once
// for as many rows of X as the workspace holds). A row's result does not depend on M; it is summed in another
// order than forward()'s. Inside a parallel region the fp32 form works on the calling thread, with all of W
// for every 8 rows of X, and all threads may call it at once. The bf16 form rounds X into the shared
// workspace and must be called outside parallel regions.
void few_rows(float* Y, const float* X, const float* W, const float* b, size_t M, size_t K, size_t N,
              size_t ldy = 0);
void few_rows(float* Y, const float* X, const bf16* W, const float* b, size_t M, size_t K, size_t N,
              size_t ldy = 0);

// ---------------------------------------------------------------------------------------------
// Packing and tiles, for attention: one thread multiplies small matrices that it has packed itself

// Rows of a panel of A. A tile's sums take MR x 2 vector registers; two or three more hold operands.
#if defined(__AVX512F__)
constexpr size_t MR = 14;  // 32 registers of 16 floats
#elif defined(__aarch64__)
constexpr size_t MR = 12;                 // 32 registers of 4 floats
#else
constexpr size_t MR = 6;  // 16 registers
#endif
constexpr size_t NR = 2 * simd::VL;  // columns of a panel of B
constexpr size_t SCORES = 64;        // columns of attention's tiles of scores

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr bool BF16_DOT_PRODUCT = true;  // the processor multiplies bf16 numbers in pairs
#else
constexpr bool BF16_DOT_PRODUCT = false;  // numbers rounded to bf16 are multiplied as floats
#endif
// Values of k in a unit, and the units of K values.
inline size_t per_unit(Dtype dtype) { return dtype == BF16 && BF16_DOT_PRODUCT ? 2 : 1; }
inline size_t units(Dtype dtype, size_t K) { return ceil_div(K, per_unit(dtype)); }

// Rows are divided evenly among panels of at most `most` rows, as even as whole rows allow. This is how many
// panels there are, and the row that panel i starts with.
inline size_t row_panels(size_t rows, size_t most = MR) { return ceil_div(rows, most); }
inline size_t panel_row(size_t rows, size_t i, size_t most = MR) { return rows * i / row_panels(rows, most); }

// Packs a panel of n rows of K values, value (r, k) at src[r * row + k * col]: dst[u * ld + r] = unit u of
// row r. For a panel of B, the "rows" are its columns. ld is n, or a multiple of VL; in the latter case, what
// lies beyond n in a row's last vector is set to 0.
void pack(Dtype dtype, float* dst, size_t ld, const float* src, size_t row, size_t col, size_t n, size_t K);
// dst = n consecutive values converted to units(dtype, n) units.
void to_units(Dtype dtype, float* dst, const float* src, size_t n);

// The layout of a tile's A. PANEL: packed by pack(). SCORE_COLUMNS: unit (i, u) is a[u * SCORES + i], columns
// of a tile of scores. SCORE_ROWS: unit (i, u) is a[i * SCORES / per_unit(dtype) + u], rows of one.
enum LayoutOfA { PANEL, SCORE_COLUMNS, SCORE_ROWS };
// One tile: c (rows, cols; row stride ldc) = A B, or += if accumulate, summed over `units` units; rows <= MR,
// cols <= NR. b is a packed panel.
void tile(Dtype dtype, LayoutOfA layout, size_t rows, size_t cols, size_t units, const float* a,
          const float* b, float* c, size_t ldc, bool accumulate);

// ---------------------------------------------------------------------------------------------
// Workspaces

// The bytes, for that many threads, of the workspace that products on all threads share. reserve() allocates
// it, and throws Error if memory is short; if it was not called, the first product allocates it.
size_t workspace_bytes(int threads);
void reserve(int threads);
// The same for threads that compute products of their own. Call reserve_own() first, and outside of parallel
// regions; without it such a product ends the program.
size_t own_workspace_bytes(int threads);
void reserve_own(int threads);

// FLOP/s of the micro-kernel on all threads with operands in the L1 cache (best of 5 trials): the most that a
// product can reach on this machine.
double measure_peak_flops(Dtype dtype);

}  // namespace gemm
