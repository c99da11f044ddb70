// gemm_internal.h - the parts of lib/gemm.cpp that its tests and its benchmark use too, but no program.
//
//     C (M,N) = A (M,K) B (K,N) (+ bias, or + C), then an epilogue while C is in the cache
//
// A and B are each described by two strides, so that one routine computes the three products of a linear
// layer: Y = X W^T + b, dX = dY W, dW += dY^T X. The words are explained in lib/gemm.h.
#pragma once

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
constexpr bool WIDE_TILES = VL == 16;      // there are also tiles of up to MR / 2 rows by 2 NR columns
constexpr size_t KC = 512;                 // units of k that are packed at a time
// The most rows or columns of a task. Times KC units this takes at most a quarter of an L2 cache of 1 MiB.
constexpr size_t MB = 8 * MR, NB = 128;
constexpr size_t SHARED_UNITS = 2 << 20;  // the operand shared by all threads: 8 MiB of the last-level cache
constexpr size_t SHARED_WIDTH = 1344;     // its most rows or columns; a multiple of every panel's width
constexpr size_t OWN_UNITS = 1 << 19;     // the same operand of a product that one thread computes: 2 MiB
constexpr size_t WORTH_WAKING = 1 << 17;  // multiplications from which all threads compute a product
constexpr size_t LINE = 64 / sizeof(float);  // floats in a cache line
// Addresses this many bytes apart share a set of the L1 cache, and at least L1_WAYS lines fit in a set.
constexpr size_t L1_WAY = 4096;
#if defined(__aarch64__)
constexpr size_t L1_WAYS = 4;
#else
constexpr size_t L1_WAYS = 8;
#endif
constexpr size_t STREAMED = 1 << 20;  // values of C from which FOR_LATER writes past the caches

// ---------------------------------------------------------------------------------------------
// A product

// What happens to the old C: it is overwritten, or the product is added to it. FOR_LATER overwrites a C that
// is not read again soon; a large one is written to memory past the caches, where it would evict useful data.
enum Start { OVERWRITE, ACCUMULATE, FOR_LATER };

// A matrix whose element (r, c) is data[r * row + c * col].
struct Operand {
    const void* data;
    Dtype type;
    size_t row, col;
    Operand(const float* p, size_t row_, size_t col_) : data(p), type(FP32), row(row_), col(col_) {}
    Operand(const bf16* p, size_t row_, size_t col_) : data(p), type(BF16), row(row_), col(col_) {}
};

// What is done with each finished tile of C, element by element, while it is in the cache.
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
    bool lower = false;  // leaves out tiles that lie wholly above the diagonal
};

// Computes the product of floats, or of numbers rounded to bf16, with all threads, or with the calling thread
// inside a parallel region (reserve_own() in gemm.h). With FP32 both operands must be floats.
void multiply(Dtype dtype, const Product& product);

// ---------------------------------------------------------------------------------------------
// Scratch memory and the division of work

// The sums of squares of gradients that weight_gradient() has left for the next product to compute.
struct Squares {
    const float* g = nullptr;
    double* sums = nullptr;
    size_t n = 0;

    // Computes the sums for values [i, i + count), i a multiple of SQUARES.
    void compute(size_t i, size_t count) const {
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

// The memory that products use, allocated for the largest number of threads so far, and the counters by which
// threads divide a product's work without locks.
//
// The shared memory holds the packed panels of one operand, or of part of it if it is large. Each content is
// a "fill". Fills are numbered through all products, so that the counters need no reset between products: a
// value that belongs to an earlier fill counts as "not begun".
struct Workspace {
    static constexpr size_t PRIVATE_UNITS = std::max(round_up(MB, MR), NB) * KC, MOST_PANELS = 2048,
                            TASK_BITS = 24;
    const size_t shared_units;
    float *shared = nullptr, *private_ = nullptr;
    int threads = 0;
    Squares squares;     // not yet computed
    uint64_t fills = 0;  // so far
    // For each panel of the shared memory: 2f + 1 while a thread packs it for fill f, then 2f + 2.
    std::atomic<uint64_t> state[MOST_PANELS] = {};
    // For each thread: f << TASK_BITS plus the first of its tasks for fill f that no thread has begun.
    std::unique_ptr<std::atomic<uint64_t>[]> next;

    explicit Workspace(size_t units) : shared_units(units) {}
    static size_t bytes(size_t shared_units, int threads) {
        return (shared_units + (size_t)threads * PRIVATE_UNITS) * sizeof(float);
    }
    void reserve(int n) {
        if (n <= threads) return;
        machine::release(shared, bytes(shared_units, threads));
        shared = private_ = nullptr, threads = 0;
        shared = (float*)machine::allocate(bytes(shared_units, n), "scratch memory of the matrix product");
        private_ = shared + shared_units, threads = n;
        next.reset(new std::atomic<uint64_t>[n]());
    }
    // The next task for a thread of the team, of fill f's tasks [0, tasks), or `tasks` if all are begun. A
    // thread first takes its share, which is contiguous and the same in each product of these sizes: what its
    // tasks read is likely still in its processor's caches. Then it helps the other threads.
    size_t take_task(size_t thread, size_t team, uint64_t f, size_t tasks) {
        for (size_t i = 0; i < team; i++) {
            size_t owner = (thread + i) % team;
            uint64_t all = f << TASK_BITS, first = all + tasks * owner / team,
                     end = all + tasks * (owner + 1) / team;
            uint64_t s = next[owner].load();
            for (uint64_t t; (t = std::max(s, first)) < end;)
                if (next[owner].compare_exchange_weak(s, t + 1)) return t - all;
        }
        return tasks;
    }
    // Whether no thread has begun to pack the panel for fill f.
    bool not_begun(size_t panel, uint64_t f) const {
        return state[panel].load(std::memory_order_relaxed) < 2 * f + 1;
    }
    // Packs the panel for fill f, or waits for the thread that does.
    template <class Pack>
    void pack_once(size_t panel, uint64_t f, Pack pack) {
        uint64_t s = state[panel].load(std::memory_order_acquire);
        if (s < 2 * f + 1 && state[panel].compare_exchange_strong(s, 2 * f + 1)) {
            pack();
            state[panel].store(2 * f + 2, std::memory_order_release);
        } else {
            while (state[panel].load(std::memory_order_acquire) != 2 * f + 2) std::this_thread::yield();
        }
    }
};
// The workspace of products that all threads compute, or, inside a parallel region, the calling thread's own.
Workspace& workspace();

}  // namespace gemm
