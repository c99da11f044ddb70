// gemm_internal.h - what lib/gemm.cpp is made of, for itself, its tests and its benchmark; no program
// includes it.
//
//     C (M,N) = A (M,K) B (K,N) (+ bias, or + C), then an epilogue while C is in cache
//
// A and B are read through two strides each, so that one routine serves the three products of a linear layer:
// Y = X W^T + b, dX = dY W, dW += dY^T X.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <thread>

#include "lib/gemm.h"
#include "lib/machine.h"

namespace gemm {

using simd::VL;

// ---------------------------------------------------------------------------------------------
// Sizes

constexpr size_t NV = 2;                   // vectors in a row of a tile: NR = NV * VL columns
constexpr bool MANY_REGISTERS = MR >= 12;  // 32 vector registers, else 16
constexpr bool WIDE_TILES = VL == 16;      // there are also tiles of up to MR / 2 rows and 2 NR columns
constexpr size_t KC = 512;                 // units of k in one packed block
constexpr size_t MB = 8 * MR,
                 NB = 128;  // largest task: rows or columns; with KC at most a quarter of a 1 MiB L2
constexpr size_t SHARED_UNITS = 2 << 20;     // the packed operand of all threads: 8 MiB of last-level cache
constexpr size_t SHARED_WIDTH = 1344;        // its most rows or columns; a multiple of every panel's width
constexpr size_t WORTH_WAKING = 1 << 17;     // multiplications from which all threads make a product
constexpr size_t LINE = 64 / sizeof(float);  // floats in a cache line
constexpr size_t L1_WAY = 4096;  // addresses this far apart share a set of the L1 cache, which holds
#if defined(__aarch64__)
constexpr size_t L1_WAYS = 4;  // this many lines, or more
#else
constexpr size_t L1_WAYS = 8;  // this many lines, or more
#endif
constexpr size_t STREAMED = 1 << 20;  // values of C from which FOR_LATER writes past the caches

// ---------------------------------------------------------------------------------------------
// A product

// How C begins: overwritten (or from the bias), or added to. FOR_LATER is OVERWRITE where C is not read again
// soon: if it is large it need not enter the caches.
enum Start { OVERWRITE, ACCUMULATE, FOR_LATER };

// Element (r, c) of an operand is data[r * row + c * col].
struct Operand {
    const void* data;
    Dtype type;
    size_t row, col;
    Operand(const float* p, size_t row_, size_t col_) : data(p), type(FP32), row(row_), col(col_) {}
    Operand(const bf16* p, size_t row_, size_t col_) : data(p), type(BF16), row(row_), col(col_) {}
};

// What is done with each finished piece of C, by element, while it is in cache.
struct Epilogue {
    enum Kind { NONE, GELU, GELU_GRADIENT, ADD } kind = NONE;
    // GELU:           out = gelu(C)
    // GELU_GRADIENT:  out = C gelu'(in)
    // ADD:            C += in
    const float* in = nullptr;
    float* out = nullptr;
    bf16* out_bf16 = nullptr;  // instead of out
    size_t ld = 0;             // row stride of in and out
    int activation = GELU_TANH;
};

struct Product {
    size_t M, N, K;
    Operand A, B;
    float* C;
    size_t ldc;
    Start start = OVERWRITE;
    const float* bias = nullptr;  // (N), added where C is overwritten
    Epilogue epilogue{};
};

// Makes the product, of floats or of numbers rounded to bf16. With FP32 both operands are floats. By all
// threads.
void multiply(Dtype dtype, const Product& product);

// ---------------------------------------------------------------------------------------------
// Scratch memory and the division of work

// The sums of squares of gradients that weight_gradient() left to the next product.
struct Squares {
    const float* g = nullptr;
    double* sums = nullptr;
    size_t n = 0;

    // Makes those of values [i, i + count), i a multiple of SQUARES.
    void make(size_t i, size_t count) const {
        for (size_t end = i + count; i < end; i += SQUARES) {
            const float* x = g + i;
            size_t k = std::min(SQUARES, end - i);
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t j = 0; j < k; j++) sum += (double)x[j] * x[j];
            sums[i / SQUARES] = sum;
        }
    }
};

// Made once for the largest number of threads seen. It also holds how far the panels of the shared operand
// are packed: operands are counted from 0, and for operand e a panel's state is 2e + 1 during and 2e + 2
// after packing.
struct Workspace {
    static constexpr size_t PRIVATE_UNITS = std::max(round_up(MB, MR), NB) * KC, MOST_PANELS = 2048,
                            TASK_BITS = 24;
    float *shared = nullptr, *private_ = nullptr;
    int threads = 0;
    Squares squares;  // left over
    uint64_t operands = 0;
    std::atomic<uint64_t> state[MOST_PANELS] = {};
    // Of each thread's tasks for operand e: e << TASK_BITS plus the first that nobody has begun.
    std::unique_ptr<std::atomic<uint64_t>[]> next;

    static size_t bytes(int threads) {
        return (SHARED_UNITS + (size_t)threads * PRIVATE_UNITS) * sizeof(float);
    }
    void reserve(int n) {
        if (n <= threads) return;
        machine::release(shared, bytes(threads));
        shared = private_ = nullptr, threads = 0;
        shared = (float*)machine::allocate(bytes(n), "scratch memory of the matrix product");
        private_ = shared + SHARED_UNITS, threads = n;
        next.reset(new std::atomic<uint64_t>[n]());
    }
    // Which of operand e's tasks, of [0, tasks), a thread of the team begins next: first its own, which are
    // neighbours, so that what they read stays in its processor's caches from product to product; then
    // another thread's. Returns `tasks` when all are begun.
    size_t take_task(size_t thread, size_t team, uint64_t e, size_t tasks) {
        for (size_t i = 0; i < team; i++) {
            size_t of = (thread + i) % team;
            uint64_t all = e << TASK_BITS, first = all + tasks * of / team,
                     end = all + tasks * (of + 1) / team;
            uint64_t s = next[of].load();
            for (uint64_t t; (t = std::max(s, first)) < end;)
                if (next[of].compare_exchange_weak(s, t + 1)) return t - all;
        }
        return tasks;
    }
    bool untouched(size_t panel, uint64_t e) const {
        return state[panel].load(std::memory_order_relaxed) < 2 * e + 1;
    }
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
// The one of this program.
Workspace& workspace();

}  // namespace gemm
