// train_gpt2.cpp - GPT-2 on the CPU, with forward and backward written out by hand. It is also the reference
// that the GPU kernels of train_gpt2.cu are tested against.
//
// Read it from top to bottom: the layers, each with its forward and its backward function; the optimizers
// AdamW and Muon; the model, which calls the layers in order; and a main that hands the model to the trainer
// in lib/trainer.h. Matrix products are in lib/gemm.h, vectors of floats in lib/vec.h, the tiles of attention
// in lib/attention_tiles.h. The forward pass that generates text, one token at a time, is in lib/decoder.h.
//
// Shapes: B sequences of T tokens, M = B*T rows (one for each token), C channels, NH heads of hs = C/NH
// channels, V tokens in the vocabulary. Matrices are row-major. For a value x, dx is the gradient of the loss
// with respect to x.
//
// Results are the same bits with any number of threads: a sum is computed by one thread in a fixed order, or
// in blocks of a fixed size. Tests include this file, with ARAPOET_NO_MAIN defined.
#ifndef TRAIN_GPT2_CPP
#define TRAIN_GPT2_CPP

#include "lib/attention_tiles.h"
#include "lib/decoder.h"
#include "lib/gemm.h"
#include "lib/gpt2.h"
#include "lib/machine.h"
#include "lib/memory.h"
#include "lib/model.h"
#include "lib/rng.h"
#include "lib/vec.h"

#include <tuple>

namespace cpu {

using simd::at_least;
using simd::bf16;
using simd::exp_approx;
using simd::load;
using simd::store;
using simd::vec;
using simd::VL;

// ---------------------------------------------------------------------------------------------
// Layers. Forward functions overwrite their outputs. Backward functions add to the gradients of parameters,
// since a step may consist of several micro-batches, or overwrite them where a flag says so. A template
// parameter A is the type of what matrix products read: float, or bf16 where they multiply bf16 numbers.

using rng::Dropout;  // a layer without parameters; see lib/rng.h

// The embedding: out (B,T,C) = wte[token] + wpe[t], what the token means plus where in the sequence it is;
// then dropout. e0: number of the first element within the whole batch.
inline void embedding_forward(float* out, const int* tokens, const float* wte, const float* wpe, size_t B,
                              size_t T, size_t C, const Dropout& drop, uint64_t e0) {
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < B * T; m++) {
        const float *e = wte + (size_t)tokens[m] * C, *p = wpe + m % T * C;
        float* o = out + m * C;
        for (size_t c = 0; c < C; c++) o[c] = e[c] + p[c];
        if (drop.p > 0) drop.apply(o, o, e0 + m * C, C);
    }
}

// dwte[token] += dout, dwpe[t] += dout, after dropout's mask was applied to dout (B,T,C) in place. A token
// that occurs twice receives two gradients. Each thread works on channels of its own, over all rows in order,
// so that no two threads add to one element and the order of each sum is fixed.
inline void embedding_backward(float* dwte, float* dwpe, float* dout, const int* tokens, size_t B, size_t T,
                               size_t C, const Dropout& drop, uint64_t e0) {
    constexpr size_t STRIP = 64;
#pragma omp parallel
    {
        if (drop.p > 0)
#pragma omp for schedule(static)
            for (size_t m = 0; m < B * T; m++) drop.apply(dout + m * C, dout + m * C, e0 + m * C, C);
#pragma omp for schedule(static)
        for (size_t c0 = 0; c0 < C; c0 += STRIP)
            for (size_t m = 0; m < B * T; m++) {
                float *e = dwte + (size_t)tokens[m] * C, *p = dwpe + m % T * C;
                const float* d = dout + m * C;
                for (size_t c = c0; c < std::min(C, c0 + STRIP); c++) e[c] += d[c], p[c] += d[c];
            }
    }
}

// LayerNorm (Ba et al. 2016) of each row of x (M,C), with learned weights w and b (C):
//     n = (x - mean) rstd,  rstd = 1 / sqrt(variance + eps),  y = n w + b
// y (M,C) is in floats or rounded to bf16. mean and rstd (M) are kept for backward. copy (M,C), or null, also
// receives y, in floats, and may be x.
template <class A>
inline void layernorm_forward(A* y, float* mean, float* rstd, const float* x, const float* w, const float* b,
                              size_t M, size_t C, float eps = LAYERNORM_EPS, float* copy = nullptr) {
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < M; m++)
        simd::layernorm(y + m * C, mean + m, rstd + m, x + m * C, w, b, C, eps,
                        copy ? copy + m * C : nullptr);
}

// The residual connection and the LayerNorm that follows it, in one pass over memory:
//     sum (M,C) = skip + dropout(branch),  y = LayerNorm(sum)
// y, mean, rstd and copy are as in layernorm_forward(). Dropout's mask is applied to branch in place. sum or
// copy may be skip.
template <class A>
inline void residual_layernorm_forward(float* sum, A* y, float* mean, float* rstd, const float* skip,
                                       float* branch, const float* w, const float* b, size_t M, size_t C,
                                       const Dropout& drop, uint64_t e0, float eps = LAYERNORM_EPS,
                                       float* copy = nullptr) {
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < M; m++) {
        float *s = sum + m * C, *x = branch + m * C;
        const float* a = skip + m * C;
        if (drop.p > 0) drop.apply(x, x, e0 + m * C, C);
        for (size_t c = 0; c < C; c++) s[c] = a[c] + x[c];
        simd::layernorm(y + m * C, mean + m, rstd + m, s, w, b, C, eps, copy ? copy + m * C : nullptr);
    }
}

// Backward through y = n w + b, n = (x - mean) rstd. Of the parameters (C), summed over rows:
//     db = sum of dy,  dw = sum of dy n
// Of the input, row by row, with g = dy w. mean and rstd depend on x too; that takes from g its mean, and its
// part along n:
//     dx = rstd (g - mean(g) - n mean(g n))
// dx (M,C) is overwritten, or added to where accumulate; it must not be dy. dw and db are added to, or
// overwritten unless accumulate_weights. masked (M,C), or null, receives dx times drop's factors: the
// gradient of the branch whose output was added to the residual stream just before this LayerNorm. e0: number
// of the first element within the whole batch.
inline void layernorm_backward(float* dx, float* masked, float* dw, float* db, const float* dy,
                               const float* x, const float* mean, const float* rstd, const float* w, size_t M,
                               size_t C, bool accumulate, const Dropout& drop = {}, uint64_t e0 = 0,
                               bool accumulate_weights = true) {
    constexpr size_t STRIP = 4 * VL;
#pragma omp parallel
    {
        // dw and db: a thread sums a strip of channels over all rows, in registers.
#pragma omp for schedule(static) nowait
        for (size_t c0 = 0; c0 < C; c0 += STRIP) {
            float sw[STRIP] = {}, sb[STRIP] = {};
            size_t n = std::min(STRIP, C - c0);
            for (size_t m = 0; m < M; m++) {
                const float *d = dy + m * C + c0, *xm = x + m * C + c0, mu = mean[m], rs = rstd[m];
                if (n == STRIP)  // a length that the compiler knows
                    for (size_t c = 0; c < STRIP; c++) sw[c] += d[c] * ((xm[c] - mu) * rs), sb[c] += d[c];
                else
                    for (size_t c = 0; c < n; c++) sw[c] += d[c] * ((xm[c] - mu) * rs), sb[c] += d[c];
            }
            for (size_t c = 0; c < n; c++) {
                dw[c0 + c] = (accumulate_weights ? dw[c0 + c] : 0.0f) + sw[c];
                db[c0 + c] = (accumulate_weights ? db[c0 + c] : 0.0f) + sb[c];
            }
        }
        // dx: a thread takes a row. sum becomes mean(g), dot becomes mean(g n).
#pragma omp for schedule(static)
        for (size_t m = 0; m < M; m++) {
            const float *d = dy + m * C, *xm = x + m * C, mu = mean[m], rs = rstd[m];
            float* o = dx + m * C;
            float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
            for (size_t c = 0; c < C; c++) {
                float g = d[c] * w[c];
                sum += g, dot += g * ((xm[c] - mu) * rs);
            }
            sum /= (float)C, dot /= (float)C;
            if (accumulate)
                for (size_t c = 0; c < C; c++) o[c] += rs * (d[c] * w[c] - sum - (xm[c] - mu) * rs * dot);
            else
                for (size_t c = 0; c < C; c++) o[c] = rs * (d[c] * w[c] - sum - (xm[c] - mu) * rs * dot);
            if (masked) drop.apply(masked + m * C, o, e0 + m * C, C);
        }
    }
}

// y = gelu(x), n values; see simd::gelu for the formulas.
template <class A>
inline void gelu_forward(A* y, const float* x, size_t n, int activation) {
    constexpr size_t BLOCK = 1024;
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i += BLOCK)
        simd::gelu_forward(y + i, x + i, std::min(BLOCK, n - i), activation);
}

// ---------------------------------------------------------------------------------------------
// Attention

// Causal self-attention (Vaswani et al. 2017). qkv (B,T,3C) holds in each row the token's query, key and
// value, C numbers each, hs for each head. For one head of one sequence, Q, K, V and out are (T,hs):
//     S = Q K^T                             the scores (T,T); query i sees only keys 0 to i
//     P_ij = e^(S_ij / sqrt(hs)) / Z_i      the softmax of each row; Z_i is the sum of row i's exponentials
//     out = (F P) V                         F: dropout's factors, one for each element of P
// Backward, from dout (F times a matrix is element by element):
//     dV = (F P)^T dout                     dP = F (dout V^T)
//     dS_ij = P_ij (dP_ij - D_i) / sqrt(hs) the softmax's gradient; D_i is the sum over j of P_ij dP_ij
//     dQ = dS K                             dK = dS^T Q
//
// S, P and their gradients are T x T. Written to memory they would take more time than the products, so they
// exist only tile by tile, in the L1 cache (FlashAttention-2, Dao 2023). Forward takes a block of queries and
// goes through the keys, with a running maximum and sum of each row's softmax. It keeps lse_i = log Z_i, from
// which backward computes P again, as e^(S_ij / sqrt(hs) - lse_i). Backward takes a block of keys and goes
// through the queries that see them.
//
// A thread works on one head of one sequence at a time. Tiles are transposed: see lib/attention_tiles.h.
struct Attention {
    size_t B, T, C, NH;

    size_t hs() const { return C / NH; }
    // Floats of scratch memory that one thread needs.
    static size_t scratch(size_t T, size_t hs) { return tiles::scratch_floats(T, hs); }

    // out (B,T,C) and lse (B,NH,T) from qkv. seq0: number of the first sequence within the whole batch.
    // out, and backward's dqkv, are of type A; the products are of such numbers.
    template <class A>
    void forward(A* out, float* lse, const float* qkv, const Dropout& drop, uint64_t seq0,
                 float* scratch_mem) const {
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t head = 0; head < B * NH; head++) {
            float* mem = scratch_mem + (size_t)omp_get_thread_num() * scratch(T, hs());
            head_forward(out + start(head, C), lse + head * T, qkv + start(head, 3 * C), drop,
                         (seq0 * NH + head) * T, tiles::scratch_in<ForwardScratch>(mem, T, hs()));
        }
    }

    // dqkv (B,T,3C) from dout (B,T,C), from what forward has read and written, and the same drop and seq0.
    template <class A>
    void backward(A* dqkv, const float* dout, const A* out, const float* qkv, const float* lse,
                  const Dropout& drop, uint64_t seq0, float* scratch_mem) const {
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t head = 0; head < B * NH; head++) {
            float* mem = scratch_mem + (size_t)omp_get_thread_num() * scratch(T, hs());
            auto s = tiles::scratch_in<BackwardScratch>(mem, T, hs());
            row_dots(s.D, dout + start(head, C), out + start(head, C));
            head_backward(dqkv + start(head, 3 * C), dout + start(head, C), qkv + start(head, 3 * C),
                          lse + head * T, drop, (seq0 * NH + head) * T, s);
        }
    }

  private:
    using Tile = tiles::Tile;
    using Lanes = tiles::Lanes;
    using ForwardScratch = tiles::ForwardScratch;
    using BackwardScratch = tiles::BackwardScratch;
    static constexpr size_t QUERIES = tiles::QUERIES, KEYS = tiles::KEYS;

    // Where head number `head`, of all sequences' heads, starts in rows of `width` values.
    size_t start(size_t head, size_t width) const { return head / NH * T * width + head % NH * hs(); }
    template <class A>
    tiles::Head tiles_of() const {
        return {T, hs(), std::is_same<A, float>::value ? FP32 : BF16};
    }
    float scale() const { return 1.0f / std::sqrt((float)hs()); }

    // The softmax of a block of queries over the keys so far: each row's largest score, and the sum of
    // e^((S - max) / sqrt(hs)). Subtracting max keeps e^x within a float's range.
    struct RunningSoftmax {
        alignas(64) float max[QUERIES], sum[QUERIES] = {};
        alignas(64) float shrink[QUERIES];  // factor for sums from before max has grown
        RunningSoftmax() { std::fill(max, max + QUERIES, -INFINITY); }
    };

    // One head. q is its first query; its keys and values are C and 2C values further on. row0: number of
    // its first row of probabilities among those of all heads of the whole batch.
    template <class A>
    void head_forward(A* out, float* lse, const float* q, const Dropout& drop, uint64_t row0,
                      const ForwardScratch& s) const {
        const tiles::Head head = tiles_of<A>();
        const size_t ld = 3 * C, left = head.summed_floats(), right = head.right_floats();
        const float *k = q + C, *v = k + C;
        for (size_t b = 0; b < head.key_blocks(); b++) {
            Tile t = head.whole_block(b);
            head.pack_left(s.k_left + t.k0 * left, k + t.k0 * ld, ld, t);
            head.pack_right(s.v_right + b * KEYS * right, v + t.k0 * ld, ld, t.keys);
        }
        for (size_t q0 = 0; q0 < T; q0 += QUERIES) {
            size_t queries = std::min(QUERIES, T - q0);
            RunningSoftmax softmax;
            std::fill(s.out, s.out + QUERIES * head.hs, 0.0f);
            head.pack_transposed(s.q_transposed, q + q0 * ld, ld, queries);
            for (size_t b = 0; b < head.key_blocks(); b++) {
                Tile t = head.tile(q0, b);
                if (!t.keys) break;
                head.scores(s.S, s.k_left + t.k0 * left, s.q_transposed, t);
                if (drop.p > 0) head.dropout_factors(s.F, drop, row0 + q0, t, s.spare);
                add_to_softmax(softmax, s.S, drop.p > 0 ? s.F : nullptr, t);
                for (size_t i = 0; i < queries && b; i++)  // in block 0 there is nothing to shrink yet
                    for (size_t c = 0; c < head.hs; c++) s.out[i * head.hs + c] *= softmax.shrink[i];
                head.add_over_keys(s.out, s.S, s.v_right + b * KEYS * right, t, s.spare);
            }
            finish_forward(out + q0 * C, lse + q0, s.out, softmax, queries);
        }
    }

    // Adds a tile of scores to the running softmax, and replaces them by F e^((S - max) / sqrt(hs)). These
    // are the probabilities before the division by the row's sum, which comes last, in finish_forward().
    void add_to_softmax(RunningSoftmax& softmax, float* S, const float* F, const Tile& t) const {
        const float scale = this->scale();
        for (size_t q = 0; q < QUERIES; q += VL) {
            Lanes lanes(t, q);
            vec before = load(softmax.max + q), max = before;
            for (size_t key = 0; key < lanes.keys; key++)
                max = at_least(lanes.where_seen(key, load(S + key * QUERIES + q), before), max);
            vec shrink = exp_approx((before - max) * scale), sum = load(softmax.sum + q) * shrink;
            for (size_t key = 0; key < lanes.keys; key++) {
                float* s = S + key * QUERIES + q;
                vec e = lanes.where_seen(key, exp_approx((load(s) - max) * scale));
                sum += e;
                store(s, F ? e * load(F + key * QUERIES + q) : e);
            }
            for (size_t key = lanes.keys; key < t.keys; key++) store(S + key * QUERIES + q, vec{});
            store(softmax.max + q, max), store(softmax.sum + q, sum), store(softmax.shrink + q, shrink);
        }
    }

    // out and lse of a block of queries: `sums` are those of exponentials times V, not yet divided by Z.
    template <class A>
    void finish_forward(A* out, float* lse, const float* sums, const RunningSoftmax& softmax,
                        size_t queries) const {
        const size_t hs = this->hs();
        const float scale = this->scale();
        for (size_t i = 0; i < queries; i++) {
            float inv = 1.0f / softmax.sum[i];
            for (size_t c = 0; c < hs; c += VL)
                store(out + i * C + c, load(sums + i * hs + c, hs - c) * inv, hs - c);
            lse[i] = softmax.max[i] * scale + std::log(softmax.sum[i]);
        }
    }

    // One head, as in head_forward(); s.D holds D.
    template <class A>
    void head_backward(A* dqkv, const float* dout, const float* q, const float* lse, const Dropout& drop,
                       uint64_t row0, const BackwardScratch& s) const {
        const tiles::Head head = tiles_of<A>();
        const size_t ld = 3 * C, right = head.right_floats();
        const float *k = q + C, *v = k + C;
        head.pack_transposed(s.q_transposed, q, ld, T), head.pack_transposed(s.dout_transposed, dout, C, T);
        for (size_t q0 = 0; q0 < T; q0 += QUERIES) {
            size_t queries = std::min(QUERIES, T - q0);
            head.pack_right(s.q_right + q0 * right, q + q0 * ld, ld, queries);
            head.pack_right(s.dout_right + q0 * right, dout + q0 * C, C, queries);
        }
        std::fill(s.dq, s.dq + T * head.hs, 0.0f);
        for (size_t b = 0; b < head.key_blocks(); b++) {
            Tile block = head.whole_block(b);
            head.pack_left(s.k_left, k + block.k0 * ld, ld, block);
            head.pack_left(s.v_left, v + block.k0 * ld, ld, block);
            head.pack_right(s.k_right, k + block.k0 * ld, ld, block.keys);
            for (float* sums : {s.dk, s.dv}) std::fill(sums, sums + block.keys * head.hs, 0.0f);
            for (size_t q0 = block.k0 / QUERIES * QUERIES; q0 < T; q0 += QUERIES) {
                Tile t = head.tile(q0, b);
                head.scores(s.S, s.k_left, s.q_transposed + q0 * head.units(), t);
                head.scores(s.dS, s.v_left, s.dout_transposed + q0 * head.units(), t);  // dout V^T
                if (drop.p > 0) head.dropout_factors(s.F, drop, row0 + q0, t, s.spare);
                softmax_backward(s.S, s.dS, drop.p > 0 ? s.F : nullptr, lse + q0, s.D + q0, t);
                head.add_over_queries(s.dv, s.S, s.dout_right + q0 * right, t, s.spare);
                head.add_over_queries(s.dk, s.dS, s.q_right + q0 * right, t, s.spare);
                head.add_over_keys(s.dq + q0 * head.hs, s.dS, s.k_right, t, s.spare);
            }
            A* dk = dqkv + block.k0 * ld + C;
            store_rows(dk, s.dk, block.keys), store_rows(dk + C, s.dv, block.keys);
        }
        store_rows(dqkv, s.dq, T);
    }

    // D (T): each query's sum over keys of P dP, which needs no tile (FlashAttention-2): the sum over j of
    // P_ij dP_ij = P_ij F_ij (dout_i . v_j) is dout_i . out_i, because out_i is the sum of P_ij F_ij v_j.
    template <class A>
    void row_dots(float* D, const float* dout, const A* out) const {
        const size_t hs = this->hs();
        for (size_t i = 0; i < T; i++) {
            vec sum = {};
            for (size_t c = 0; c < hs; c += VL)
                sum += load(dout + i * C + c, hs - c) * load(out + i * C + c, hs - c);
            D[i] = simd::sum(sum);
        }
    }

    // A tile's S becomes F P, and its dS, which holds dout V^T, becomes dS.
    void softmax_backward(float* S, float* dS, const float* F, const float* lse, const float* D,
                          const Tile& t) const {
        const float scale = this->scale();
        for (size_t q = 0; q < QUERIES; q += VL) {
            Lanes lanes(t, q);
            vec l = {}, d = {};
            if (lanes.keys) l = load(lse + q, t.queries - q), d = load(D + q, t.queries - q);
            for (size_t key = 0; key < lanes.keys; key++) {
                size_t at = key * QUERIES + q;
                vec p = exp_approx(load(S + at) * scale - l), dp = load(dS + at), kept = p;
                if (F) dp *= load(F + at), kept *= load(F + at);
                vec ds = p * (dp - d) * scale;
                store(S + at, lanes.where_seen(key, kept)), store(dS + at, lanes.where_seen(key, ds));
            }
            for (size_t key = lanes.keys; key < t.keys; key++)
                store(S + key * QUERIES + q, vec{}), store(dS + key * QUERIES + q, vec{});
        }
    }

    // Rows of hs values to rows of dqkv.
    template <class A>
    void store_rows(A* to, const float* from, size_t rows) const {
        const size_t hs = this->hs();
        for (size_t i = 0; i < rows; i++)
            for (size_t c = 0; c < hs; c += VL)
                store(to + i * 3 * C + c, load(from + i * hs + c, hs - c), hs - c);
    }
};

// ---------------------------------------------------------------------------------------------
// The loss

// Softmax and cross-entropy of logits z (M,V), whose rows are ld values apart:
//     p = e^z / sum of e^z,  losses (M) = -log p[target],  dz = (p - onehot(target)) dscale
// A row with target < 0 has loss and gradient 0. If dscale is not 0, each row of logits is replaced by its
// gradient, as floats, or as bf16 numbers from the start of the row on. The row's maximum is subtracted from
// z first, which changes nothing in p but keeps e^z within a float's range.
template <class G = float>
inline void cross_entropy(float* losses, float* logits, size_t ld, const int* targets, size_t M, size_t V,
                          float dscale) {
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < M; m++) {
        float* x = logits + m * ld;
        int target = targets[m];
        if (target < 0) {
            losses[m] = 0;
            if (dscale != 0) memset(x, 0, V * sizeof(float));
            continue;
        }
        vec total = {};
        float max = simd::max(x, V), at_target = x[target] - max;
        for (size_t v = 0; v < V; v += VL) {
            // Lanes past the row's end add e^-87, too little to change the sum.
            vec e = exp_approx(load(x + v, V - v, -INFINITY) - max);
            total += e;
            if (dscale != 0) store(x + v, e, V - v);
        }
        float sum = simd::sum(total);
        losses[m] = std::log(sum) - at_target;
        if (dscale == 0) continue;
        float scale = dscale / sum;
        for (size_t v = 0; v < V; v += VL) {
            vec d = load(x + v, V - v) * scale;
            if (size_t at = (size_t)target - v; at < VL)
                d[at] -= dscale;  // before v it wraps to a large number
            store((G*)x + v, d, V - v);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// AdamW

// One step of AdamW (Loshchilov and Hutter 2019) on n parameters w, with gradients g = scale times grad,
// their running mean m and that of their squares v:
//     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//     w = w (1 - lr decay) - lr m correct1 / (sqrt(v correct2) + eps)
// correct1 and correct2 are 1 / (1 - beta^t) in step t: m and v begin with 0 and would be too small at first.
struct AdamWStep {
    float beta1, beta2, lr, eps, correct1, correct2, scale;
};
inline void adamw(float* w, float* m, float* v, const float* grad, size_t n, const AdamWStep& s,
                  float decay) {
    constexpr size_t BLOCK = 1 << 14;
    float shrink = 1.0f - s.lr * decay;
#pragma omp parallel for schedule(static) if (n > BLOCK)
    for (size_t block = 0; block < n; block += BLOCK) {
        auto step = [=](size_t i, size_t count) {
            auto at = [=](const float* p) { return load(p + i, count); };
            vec gi = at(grad) * s.scale, mi = s.beta1 * at(m) + (1 - s.beta1) * gi,
                vi = s.beta2 * at(v) + (1 - s.beta2) * gi * gi;
            store(m + i, mi, count), store(v + i, vi, count);
            store(w + i, at(w) * shrink - s.lr * (mi * s.correct1) / (simd::sqrt(vi * s.correct2) + s.eps),
                  count);
        };
        size_t i = block, end = std::min(n, block + BLOCK);
        for (; i + VL <= end; i += VL) step(i, VL);
        if (i < end) step(i, end - i);
    }
}

// ---------------------------------------------------------------------------------------------
// Muon

// The scratch memory for Muon's work on one matrix, as (n,m) with n <= m. Threads that work on matrices of
// their own have one each. A is the type of the products' operands.
template <class A>
struct MuonScratch {
    float *sums, *gram, *square;  // (n,m), (n,n), (n,n): what products compute
    // Operands: (n,m), (n,n), (n,n). gram_operand is the memory that gram is rounded to; with floats the
    // products read gram itself.
    A *x, *gram_operand, *factor;
    float* gathered;  // with several ranks: some rows of each one's result
    double* squares;  // sums of blocks of squares, for the norm

    // Floats of each rank that are gathered at once; at least one row
    static constexpr size_t GATHERED = 1 << 18;
    // For the largest matrices of a model; see muon_groups().
    void place(Arena& a, const Config& c, size_t world) {
        const size_t C = (size_t)c.C, n = C * 4 * C;
        sums = a.take<float>(n), gram = a.take<float>(C, C), square = a.take<float>(C, C);
        x = a.take<A>(n), factor = a.take<A>(C, C);
        gram_operand = std::is_same<A, float>::value ? nullptr : a.take<A>(C, C);
        gathered = world > 1 ? a.take<float>(world, std::max(GATHERED, 4 * C)) : nullptr;
        squares = a.take<double>(ceil_div(n, gemm::SQUARES));
    }
};

// How many matrices Muon works on at once: one for each thread, since threads that share the products of a
// small matrix mostly wait for each other. Only one, shared by all threads, if there are several ranks, if
// there are fewer than two matrices (six in a block) for each thread, or if the threads' scratch memory would
// exceed 64 MiB.
inline size_t muon_at_once(const Config& c, size_t world) {
    constexpr size_t MOST_BYTES = 64 << 20;
    const size_t threads = (size_t)omp_get_max_threads();
    Arena scratch;
    MuonScratch<float>().place(scratch, c, world);
    return world == 1 && 6 * (size_t)c.L >= 2 * threads && scratch.used <= MOST_BYTES / threads ? threads : 1;
}

// One step of Muon on a matrix w (n,m), or stored as its transpose (m,n), is
//     g = scale grad,  momentum = beta momentum + (1 - beta) g
//     d = beta momentum + (1 - beta) g                                        Nesterov's step
//     w = w (1 - lr decay) - lr muon_scale(m) X,  X = d with its singular values moved to about 1
// muon_direction() is the first two lines, muon_orthogonalise() makes X of d, muon_apply() is the last line.
struct MuonStep {
    float beta, lr, decay, scale;
};
// momentum and direction have n values; direction may be null where only the momentum is wanted.
inline void muon_direction(float* direction, float* momentum, const float* grad, size_t n,
                           const MuonStep& s) {
    constexpr size_t BLOCK = 1 << 14;
#pragma omp parallel for schedule(static)
    for (size_t block = 0; block < n; block += BLOCK)
        for (size_t i = block; i < std::min(n, block + BLOCK); i += VL) {
            const size_t count = std::min(VL, n - i);
            const vec g = (1 - s.beta) * s.scale * load(grad + i, count),
                      m = s.beta * load(momentum + i, count) + g;
            store(momentum + i, m, count);
            if (direction) store(direction + i, s.beta * m + g, count);
        }
}
// to (n,m) = factor times `from`, which is (n,m), or transposed: (m,n).
template <class A>
inline void scaled(A* to, const float* from, size_t n, size_t m, bool transposed, float factor) {
    constexpr size_t BLOCK = 32;
#pragma omp parallel for schedule(static)
    for (size_t i0 = 0; i0 < n; i0 += BLOCK)
        for (size_t j0 = 0; j0 < m; j0 += BLOCK) {
            const size_t rows = std::min(BLOCK, n - i0), columns = std::min(BLOCK, m - j0);
            alignas(64) float line[BLOCK] = {};
            for (size_t i = i0; i < i0 + rows; i++) {
                for (size_t j = 0; j < columns; j++)
                    line[j] = factor * (transposed ? from[(j0 + j) * n + i] : from[i * m + j0 + j]);
                for (size_t j = 0; j < columns; j += VL)
                    store(to + i * m + j0 + j, load(line + j), columns - j);
            }
        }
}
// s.sums, the direction of a matrix as it is stored, becomes X (n,m), not transposed.
template <class A>
inline void muon_orthogonalise(const MuonScratch<A>& s, size_t n, size_t m, bool transposed) {
    using NS = NewtonSchulz;
    gemm::sum_squares(s.squares, s.sums, n * m);
    double sum = 0;
    for (size_t i = 0; i < ceil_div(n * m, gemm::SQUARES); i++) sum += s.squares[i];
    scaled(s.x, s.sums, n, m, transposed, 1.0f / std::max((float)std::sqrt(sum), NS::EPS));
    // x is an iteration's operand, out its result. A result of floats is the next operand as it is, and the
    // two take turns.
    const A* x = s.x;
    float *out = s.sums, *other = std::is_same<A, float>::value ? (float*)s.x : s.sums;
    static_assert(NS::ITERATIONS % 2, "so that the last result is in s.sums");
    for (int i = 0; i < NS::ITERATIONS; i++) {
        // X = (a I + b G + c G^2) X, with G = X X^T
        gemm::gram(s.gram, x, n, m);
        gemm::gram(s.square, simd::rounded(s.gram_operand, s.gram, n * n), n, n);
#pragma omp parallel for schedule(static)
        for (size_t r = 0; r < n; r++) {
            float* row = s.square + r * n;
            for (size_t c = 0; c < n; c++) row[c] = NS::B * s.gram[r * n + c] + NS::C * row[c];
            row[r] += NS::A;
            for (size_t c = 0; c < n; c += VL) store(s.factor + r * n + c, load(row + c, n - c), n - c);
        }
        gemm::product(out, s.factor, x, n, n, m);
        if (i + 1 < NS::ITERATIONS) x = simd::rounded(s.x, out, n * m), std::swap(out, other);
    }
}
// w = w (1 - lr decay) - lr muon_scale(m) X, for the rows [first, first + rows) of X, which X points to.
inline void muon_apply(float* w, const float* X, size_t n, size_t m, size_t first, size_t rows,
                       bool transposed, const MuonStep& s) {
    const float shrink = 1.0f - s.lr * s.decay, factor = s.lr * muon_scale(m);
    constexpr size_t BLOCK = 32;
#pragma omp parallel for schedule(static)
    for (size_t j0 = 0; j0 < m; j0 += BLOCK)
        for (size_t i0 = 0; i0 < rows; i0 += BLOCK) {
            const size_t j1 = std::min(m, j0 + BLOCK), i1 = std::min(rows, i0 + BLOCK);
            auto update = [&](float& x, size_t i, size_t j) { x = x * shrink - factor * X[i * m + j]; };
            if (transposed)
                for (size_t j = j0; j < j1; j++)
                    for (size_t i = i0; i < i1; i++) update(w[j * n + first + i], i, j);
            else
                for (size_t i = i0; i < i1; i++)
                    for (size_t j = j0; j < j1; j++) update(w[(first + i) * m + j], i, j);
        }
}

// ---------------------------------------------------------------------------------------------
// The model
//
// Of GPT-2's block, with x the residual stream and LN a LayerNorm (for GROVER see lib/gpt2.h):
//     qkv = LN1(x) qkvw^T + qkvb                 ln1, qkv
//     x = x + attention(qkv) attprojw^T + b      atty, resid2
//     h = gelu(LN2(x) fcw^T + fcb)               ln2, fch, fch_gelu
//     x = x + h fcprojw^T + b                    resid3
// On the right are the activations that forward keeps for backward; see Activations in lib/memory.h.

// One LayerNorm of the model.
template <class A>
struct Norm {
    const float *w, *b;
    float *dw, *db, *mean, *rstd;
    A* y;                   // its output (M,C)
    float* copy = nullptr;  // the same in floats, or null
};

// States (lib/memory.h) holds the sizes, parameters, gradients and the optimizer's arrays.
struct GPT2 : States {
    const size_t B, T;  // largest batch; both 0 for a model that only generates
    const bool trains;
    const int recompute;
    const Precision precision;
    float dropout = 0;
    uint64_t seed = 1337;
    const Ranks ranks;

    // What lib/model.h requires, in its order.
    static constexpr const char* PROGRAM = "train_gpt2";
    static constexpr Dtype DEFAULT_DTYPE = FP32;
    static void require_device() {}
    static void set_threads(int n) { machine::set_threads(n); }
    static std::string device() {
        return strf("CPU, %d threads, %zu-bit vectors, bf16 %s", omp_get_max_threads(), VL * 32,
                    gemm::BF16_DOT_PRODUCT ? "dot products" : "emulated");
    }
    // Some Intel processors with AVX-512 take longer for a product of bf16 pairs than for two in fp32.
    static Peak peak_flops(Precision p) {
        const double peak = gemm::measure_peak_flops(p.dtype);
        if (p.dtype == BF16)
            if (double fp32 = gemm::measure_peak_flops(FP32); fp32 > 1.25 * peak)
                return {peak, strf("measured (%.0f in fp32: --dtype fp32 is faster here)", fp32 / 1e9)};
        return {peak, "measured"};
    }
    static void check_precision(Precision p) {
        if (p.dtype == BF16 && !p.master_weights)
            throw UsageError("--master_weights: the CPU trainer keeps its weights in fp32, 0 is for the GPU");
    }
    static std::unique_ptr<Comm> open_ranks(const RankOptions& o) {
        if (o.device >= 0)
            throw UsageError(
                "--device: this trainer computes on the CPU; make train_gpt2cu builds the other");
        if (o.gpus > 1)
            throw UsageError("--gpus: this trainer computes on the CPU; make train_gpt2cu builds the other");
        if (o.zero_stage)
            throw UsageError(
                strf("--zero_stage %d: on the CPU each rank holds everything, wanted 0", o.zero_stage));
        return open_comm();
    }
    static size_t memory_available(int on_host = 1) { return machine::memory_available() / (size_t)on_host; }
    static MemoryNeed memory_need(const Config& c, size_t B, size_t T, bool trains, int recompute = 0,
                                  Precision precision = {}, const Ranks& ranks = {},
                                  Optimizer optimizer = ADAMW) {
        MemoryNeed n;
        n.params = checked_mul(num_params(c), in_bf16(B, precision) ? 2 : 4, "parameters");
        n.grads = trains ? n.params : 0;
        n.optimizer = trains ? optimizer_bytes(c, optimizer) : 0;
        Arena activations, scratch;
        with_operands(precision, [&](auto operand) {
            Tensors<decltype(operand)> tensors;
            tensors.place(activations, scratch, c, B, T, trains, recompute);
            if (trains && optimizer == MUON) tensors.place_muon(scratch, c, ranks);
        });
        n.activations = activations.used;
        n.scratch = scratch.used + workspace_bytes(c, ranks, trains, optimizer);
        return n;
    }

    // recompute: see Activations::place.
    GPT2(const Config& c, size_t B_, size_t T_, bool trains_, int recompute_ = 0, Precision precision_ = {},
         const Ranks& ranks_ = {}, Optimizer optimizer_ = ADAMW)
        : States(c, optimizer_),
          B(B_),
          T(T_),
          trains(trains_),
          recompute(recompute_),
          precision(precision_),
          ranks(ranks_) {
        check_precision(precision);
        MemoryNeed need = memory_need(c, B, T, trains, recompute, precision, ranks, optimizer);
        threads_ = omp_get_max_threads();
        States::allocate(need, in_bf16(B, precision));
        size_t sums = 0;
        for (const ParamPiece& t : pieces_) sums += ceil_div(t.size, gemm::SQUARES);
        if (trains) squares_.resize(sums);
        activations_mem_ = {need.activations, "activations"};
        scratch_mem_ = {need.scratch - workspace_bytes(c, ranks, trains, optimizer), "scratch memory"};
        Arena activations, scratch;
        activations.base = activations_mem_.as<char>(), scratch.base = scratch_mem_.as<char>();
        with_operands(precision, [&](auto operand) {
            auto& t = tensors<decltype(operand)>();
            t.place(activations, scratch, c, B, T, trains, recompute);
            if (trains && optimizer == MUON) t.place_muon(scratch, c, ranks);
        });
        gemm::reserve(threads_);
        gemm::reserve_own(muon_threads(c, ranks, trains, optimizer));
    }

    // The mean loss. For tests it may be a training pass, with dropout, which backward() may follow; until
    // then tokens and targets must stay valid.
    double forward(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass = {}) {
        begin_pass(tokens, targets, B_, T_, pass);
        return with_operands(precision, [&](auto operand) {
            forward_pass<decltype(operand)>();
            return head<decltype(operand), false>();
        });
    }
    size_t counted() const { return counted_; }

    void accumulate(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass) {
        begin_pass(tokens, targets, B_, T_, pass);
        double loss = with_operands(precision, [&](auto operand) {
            forward_pass<decltype(operand)>();
            return backward_pass<decltype(operand)>();
        });
        step_loss_ += loss * (double)counted_ * pass.grad_scale;
    }
    StepResult step(const StepSettings& a, uint32_t t) {
        if (ranks.several()) ranks.comm->finish(), ranks.comm->all_reduce(&step_loss_, 1);
        StepResult r = {step_loss_, grad_norm(), t};
        if (ranks.several())
            ranks.comm->broadcast(&r, sizeof r);  // so that all clip and skip alike, whatever their processor
        step_loss_ = 0;
        if (a.takes(r))
            update(a, t, a.grad_clip > 0 && r.norm > a.grad_clip ? (float)(a.grad_clip / r.norm) : 1.0f);
        grads_are_zero_ = true;
        return last_ = r;
    }
    StepResult last_result() const { return last_; }

    template <class F>
    void each_range(State s, F f) {
        if (s == GRADS) squared_ = false;  // f may write
        States::each_range(s, f);
    }
    template <class F>
    void each_piece(State s, F f) {
        each_range(s, [&](float* x, size_t n, size_t) { f(x, n); });
    }
    void resumed(uint32_t) {}

    // The parts of accumulate() and step(), which tests also call one by one.

    // Adds the gradients of the last training pass, of the sum of its losses times grad_scale, to those since
    // the last update. Returns the mean loss.
    double backward() {
        if (!pass_.train) throw std::logic_error("backward: the last forward pass was not a training pass");
        return with_operands(precision, [&](auto operand) { return backward_pass<decltype(operand)>(); });
    }

    // The gradients' global L2 norm. Sums of squares that the products have not made are made here. All are
    // added in the file's order, so that the norm has the same bits however they were made.
    double grad_norm() {
        if (grads_are_zero_) return 0;
        gemm::finish_squares();
        double* sums = squares_.data();
        for (const ParamPiece& t : pieces_) {
            if (!squared_ || !squared_by_products(t.id))
                gemm::sum_squares(sums, grads.tensor(t.id, t.layer), t.size);
            sums += ceil_div(t.size, gemm::SQUARES);
        }
        double sum = 0;
        for (double s : squares_) sum += s;
        return std::sqrt(sum);
    }

    // The optimizer, step number t from 1, with gradients times grad_scale; weight decay where param_table()
    // says so. Afterwards the gradients count as zero.
    void update(const StepSettings& a, uint32_t t, float grad_scale) {
        float *w = array(PARAMS), *g = array(GRADS), *m = array(ADAM_M), *v = array(ADAM_V);
        auto correct = [t](double beta) { return (float)(1 / (1 - std::pow(beta, t))); };
        AdamWStep s = {a.beta1, a.beta2, a.lr, a.eps, correct(a.beta1), correct(a.beta2), grad_scale};
        for (const OwnedPiece& p : owned_)
            if (state_has(ADAM_V, optimizer, p.block_matrix))
                adamw(w + p.memory, m + p.memory, v + p.second, g + p.memory, p.size, s,
                      p.decay ? a.weight_decay : 0.0f);
        if (optimizer == MUON)
            with_operands(precision, [&](auto operand) {
                update_by_muon<decltype(operand)>({a.muon_momentum, a.muon_lr, a.weight_decay, grad_scale});
            });
        grads_are_zero_ = true;
    }

    // For tests: the logits (M,V) of the last forward pass, all at once.
    void logits(float* out) {
        with_operands(precision, [&](auto operand) {
            gemm::forward(out, tensors<decltype(operand)>().act.lnf, params.wte, nullptr, rows(), cfg.C,
                          cfg.V);
        });
    }
    // How many rows of a batch of M the head computes at once, so that their logits fit in 128 MiB.
    static size_t head_rows(const Config& c, size_t M) {
        constexpr size_t HEAD_FLOATS = 32 << 20;
        return std::min(M, std::max<size_t>(64, HEAD_FLOATS / round_up(c.V, 16)));
    }

  private:
    // Whether parameters are kept in bf16: in a model that only generates.
    static bool in_bf16(size_t B, Precision p) { return !B && p.dtype == BF16; }
    // Calls f with a value of the type A of the products' operands, float or bf16.
    template <class F>
    static auto with_operands(Precision p, F f) -> decltype(f(float())) {
        return p.dtype == BF16 ? f(bf16()) : f(float());
    }
    template <class A>
    struct Tensors {
        Activations<float, A> act;
        Workspace<A> work;
        std::vector<MuonScratch<A>> muon;  // of each thread, or a single one
        void place(Arena& activations, Arena& scratch, const Config& c, size_t B, size_t T, bool trains,
                   int recompute) {
            size_t M = checked_mul(B, T, "batch size x sequence length");
            if (!M) return;
            act.place(activations, c, M, trains, recompute);
            size_t threads = (size_t)omp_get_max_threads();
            work.place(scratch, c, M, head_rows(c, M), threads * Attention::scratch(T, c.hs()), trains);
        }
        void place_muon(Arena& scratch, const Config& c, const Ranks& ranks) {
            muon.resize(muon_at_once(c, (size_t)ranks.world()));
            for (MuonScratch<A>& m : muon) m.place(scratch, c, (size_t)ranks.world());
        }
    };
    // Threads that each work on a matrix of their own in Muon; 0: all share each product.
    static int muon_threads(const Config& c, const Ranks& ranks, bool trains, Optimizer optimizer) {
        const size_t at_once = trains && optimizer == MUON ? muon_at_once(c, (size_t)ranks.world()) : 1;
        return at_once > 1 ? (int)at_once : 0;
    }
    // Bytes of all workspaces of products.
    static size_t workspace_bytes(const Config& c, const Ranks& ranks, bool trains, Optimizer optimizer) {
        return gemm::workspace_bytes(omp_get_max_threads()) +
               gemm::own_workspace_bytes(muon_threads(c, ranks, trains, optimizer));
    }
    template <class A>
    Tensors<A>& tensors() {
        return std::get<Tensors<A>>(tensors_);
    }

    // The gradient's norm needs the sum of squares of every gradient. For the blocks' matrices, most of the
    // model, the matrix products make these sums, while the gradients are still in the cache.
    static bool squared_by_products(int id) {
        return id == QKVW || id == ATTPROJW || id == FCW || id == FCPROJW;
    }
    // Where the sums of tensor id of block l are kept.
    double* squares(int id, size_t l) {
        double* at = squares_.data();
        for (const ParamPiece& t : pieces_) {
            if (t.id == id && t.layer == l) break;
            at += ceil_div(t.size, gemm::SQUARES);
        }
        return at;
    }

    // ---- one pass

    void begin_pass(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass) {
        if (B_ > B || T_ > T || (pass.train && !trains))
            throw std::logic_error("forward: batch larger than the model was built for");
        if (omp_get_max_threads() > threads_)
            throw std::logic_error("forward: more threads than the model was built for");
        pass_ = pass, tokens_ = tokens, targets_ = targets, b_ = B_, t_ = T_;
    }
    size_t rows() const { return b_ * t_; }
    Attention attention() const { return {b_, t_, (size_t)cfg.C, (size_t)cfg.NH}; }
    Dropout drop(rng::Stream site, size_t layer) const {
        return {pass_.train ? dropout : 0.0f, rng::Key(seed, pass_.step, site, (uint32_t)layer)};
    }
    // Number of the micro-batch's first element within the whole batch.
    uint64_t first_element() const { return pass_.seq0 * t_ * (size_t)cfg.C; }
    bool grover() const { return cfg.arch == GROVER_ARCH; }

    // All that a block's functions need: activations, weights, gradients, its two LayerNorms, and sizes. In
    // GROVER the output of the first LayerNorm is the new residual stream; the copy of it goes to resid2,
    // where attention's output is then added to it.
    template <class A>
    struct Block {
        typename Activations<float, A>::Block a;
        Layer<float> w, g;
        Norm<A> norm1, norm2;
        size_t C, M;
    };
    template <class A>
    Block<A> block(size_t l) {
        auto a = tensors<A>().act.block(l, cfg, rows());
        Layer<float> w = params.layer(l), g = grads.layer(l);
        Norm<A> norm1 = {w.ln1w, w.ln1b, g.ln1w, g.ln1b, a.ln1_mean, a.ln1_rstd, a.ln1};
        Norm<A> norm2 = {w.ln2w, w.ln2b, g.ln2w, g.ln2b, a.ln2_mean, a.ln2_rstd, a.ln2};
        if (grover()) norm1.copy = a.resid2;
        return {a, w, g, norm1, norm2, (size_t)cfg.C, rows()};
    }
    // The LayerNorm after block l: the next block's first, or the final one.
    template <class A>
    Norm<A> norm_after(size_t l) {
        if (l + 1 < (size_t)cfg.L) return block<A>(l + 1).norm1;
        const auto& act = tensors<A>().act;
        return {params.lnfw, params.lnfb, grads.lnfw, grads.lnfb, act.lnf_mean, act.lnf_rstd, act.lnf};
    }
    // n.y = LN(x)
    template <class A>
    void norm_forward(const Norm<A>& n, const float* x) {
        layernorm_forward(n.y, n.mean, n.rstd, x, n.w, n.b, rows(), cfg.C, cfg.eps, n.copy);
    }
    // sum = skip + dropout(branch), n.y = LN(sum)
    template <class A>
    void residual_norm_forward(float* sum, const Norm<A>& n, const float* skip, const Dropout& mask) {
        residual_layernorm_forward(sum, n.y, n.mean, n.rstd, skip, tensors<A>().work.branch, n.w, n.b, rows(),
                                   cfg.C, mask, first_element(), cfg.eps, n.copy);
    }
    // dresid = LN'(dln), or dresid += LN'(dln); x is what the LayerNorm has read. Returns the gradient of the
    // branch that was added to the residual stream just before: dresid under the branch's dropout mask.
    enum Result { OVERWRITE, ADD };
    template <class A>
    const float* norm_backward(const Norm<A>& n, const float* x, Result result, const Dropout& mask) {
        auto& work = tensors<A>().work;
        float* masked = mask.p > 0 ? work.dbranch : nullptr;
        layernorm_backward(work.dresid, masked, n.dw, n.db, work.dln, x, n.mean, n.rstd, n.w, rows(), cfg.C,
                           result == ADD, mask, first_element(), accumulates_);
        return masked ? masked : work.dresid;
    }

    // ---- forward

    // From the tokens to the final LayerNorm.
    template <class A>
    void forward_pass() {
        auto& act = tensors<A>().act;
        embedding_forward(act.embedded, tokens_, params.wte, params.wpe, b_, t_, cfg.C,
                          drop(rng::EMB_DROPOUT, 0), first_element());
        norm_forward(block<A>(0).norm1, act.embedded);
        for (size_t l = 0; l < (size_t)cfg.L; l++) {
            block_to_gelu<A>(l);
            auto [a, w, g, norm1, norm2, C, M] = block<A>(l);
            gemm::forward(tensors<A>().work.branch, a.fch_gelu, w.fcprojw, w.fcprojb, M, 4 * C, C);
            residual_norm_forward(a.resid3, norm_after<A>(l), a.resid2, drop(rng::FCPROJ_DROPOUT, l));
        }
    }
    // Block l from qkv to the GELU, which is also what backward computes again with recompute = 3. Its ln1 is
    // there already: a block's first LayerNorm is computed together with the residual sum before it.
    template <class A>
    void block_to_gelu(size_t l) {
        auto [a, w, g, norm1, norm2, C, M] = block<A>(l);
        auto& work = tensors<A>().work;
        gemm::forward(a.qkv, a.ln1, w.qkvw, w.qkvb, M, C, 3 * C);
        attention().forward(a.atty, a.lse, a.qkv, drop(rng::ATT_DROPOUT, l), pass_.seq0, work.attention);
        gemm::forward(work.branch, a.atty, w.attprojw, w.attprojb, M, C, C);
        const float* skip = grover() ? a.resid2 : a.resid;  // GROVER's norm1 has copied its output to resid2
        residual_norm_forward(a.resid2, norm2, skip, drop(rng::ATTPROJ_DROPOUT, l));
        gemm::forward_gelu(a.fch_gelu, a.fch, a.ln2, w.fcw, w.fcb, M, C, 4 * C, cfg.activation);
    }

    // The head: logits = lnf wte^T, and the mean of their losses. In a backward pass (BACKWARD) also
    //     dln = dlogits wte, the gradient of lnf,  dwte = (or +=) dlogits^T lnf
    // It works on a chunk of rows at a time, so that the logits of the whole batch, M x V numbers, never
    // exist at once. Their gradients, of type A, overwrite them from the start of each row on.
    template <class A, bool BACKWARD>
    double head() {
        auto& act = tensors<A>().act;
        auto& work = tensors<A>().work;
        size_t C = cfg.C, V = cfg.V, M = rows(), R = head_rows(cfg, M), ld = round_up(V, 16);
        for (size_t m = 0; m < M; m += R) {
            size_t n = std::min(R, M - m);
            const A *lnf = act.lnf + m * C, *dlogits = (const A*)work.logits;
            gemm::forward(work.logits, lnf, params.wte, nullptr, n, C, V, ld);
            cross_entropy<A>(act.losses + m, work.logits, ld, targets_ + m, n, V,
                             BACKWARD ? pass_.grad_scale : 0.0f);
            if (!BACKWARD) continue;
            const size_t ldd = ld * sizeof(float) / sizeof(A);
            gemm::weight_gradient(grads.wte, nullptr, dlogits, lnf, n, C, V, accumulates_ || m, nullptr, ldd);
            gemm::input_gradient(work.dln + m * C, dlogits, params.wte, n, C, V, nullptr, ldd);
        }
        double sum = 0;
        counted_ = 0;
        for (size_t m = 0; m < M; m++) sum += act.losses[m], counted_ += targets_[m] >= 0;
        return counted_ ? sum / (double)counted_ : 0;
    }

    // ---- backward

    // From the loss, which it returns, back to the embeddings.
    template <class A>
    double backward_pass() {
        auto& act = tensors<A>().act;
        auto& work = tensors<A>().work;
        accumulates_ = !std::exchange(grads_are_zero_, false);
        double loss = head<A, true>();
        for (size_t l = cfg.L; l-- > 0;) {
            block_backward<A>(
                l);  // first completes block l + 1: the LayerNorm between the two is that block's
            if (l + 1 < (size_t)cfg.L) add_up_ranks(BLOCK, l + 1);
            else add_up_ranks(FINAL_NORM);
        }
        norm_backward(block<A>(0).norm1, act.embedded, grover() ? OVERWRITE : ADD, {});
        add_up_ranks(BLOCK, 0);
        // wte is the output layer's matrix too: head() has already begun its gradient.
        if (!accumulates_) memset(grads.wpe, 0, (size_t)cfg.maxT * cfg.C * sizeof(float));
        embedding_backward(grads.wte, grads.wpe, work.dresid, tokens_, b_, t_, cfg.C,
                           drop(rng::EMB_DROPOUT, 0), first_element());
        add_up_ranks(EMBEDDINGS);
        squared_ = !ranks.several();  // the sum over ranks has changed the gradients, and so their squares
        return loss;
    }

    // In a step's last micro-batch, starts to add up the ranks' gradients of a part of the model that
    // backward has finished, while it goes on with the part before.
    void add_up_ranks(Part part, size_t l = 0) {
        if (!ranks.several() || !pass_.last) return;
        auto [at, n] = ParamLayout(cfg).range(part, l);
        ranks.comm->start_all_reduce(array(GRADS) + at, n);
    }

    // Backward through the LayerNorm after block l, then through the block. On entry dln holds the gradient
    // of that LayerNorm's output, and dresid the part of its input's gradient that does not come through the
    // LayerNorm but along the skip connection past it. On return the same holds for the LayerNorm at the
    // block's start. LN' is a LayerNorm's backward, mask a dropout mask:
    //     dresid += LN'(dln)                         of resid3
    //     dfcprojw = mask(dresid)^T fch_gelu         dfch = (mask(dresid) fcprojw) gelu'(fch)
    //     dfcw = dfch^T ln2                          dln = dfch fcw, of ln2
    //     dresid += LN'(dln)                         of resid2
    //     dattprojw = mask(dresid)^T atty            datty = mask(dresid) attprojw
    //     dqkv = attention'(datty)
    //     dqkvw = dqkv^T ln1                         dln = dqkv qkvw, of ln1
    // A weight's gradient is overwritten, or added to if accumulates_; squares() says where the product
    // leaves its part of the gradient's norm. After the last block nothing skips the final LayerNorm, and
    // dresid is overwritten. In GROVER nothing skips a block's first LayerNorm: attention's skip connection
    // begins at its output, and so adds to dln.
    template <class A>
    void block_backward(size_t l) {
        auto [a, w, g, norm1, norm2, C, M] = block<A>(l);
        auto& work = tensors<A>().work;
        const bool last = l + 1 == (size_t)cfg.L, add = accumulates_;
        const float* dbranch = norm_backward(norm_after<A>(l), a.resid3, last || grover() ? OVERWRITE : ADD,
                                             drop(rng::FCPROJ_DROPOUT, l));
        if (recompute && !last)
            recompute_block<A>(l);  // the last block's activations have just been computed

        gemm::weight_gradient(g.fcprojw, g.fcprojb, dbranch, a.fch_gelu, M, 4 * C, C, add,
                              squares(FCPROJW, l));
        gemm::input_gradient_gelu(work.dfch, work.dfch_gelu, dbranch, w.fcprojw, a.fch, M, 4 * C, C,
                                  cfg.activation);
        gemm::weight_gradient(g.fcw, g.fcb, work.dfch, a.ln2, M, C, 4 * C, add, squares(FCW, l));
        gemm::input_gradient(work.dln, work.dfch, w.fcw, M, C, 4 * C);
        dbranch = norm_backward(norm2, a.resid2, ADD, drop(rng::ATTPROJ_DROPOUT, l));

        gemm::weight_gradient(g.attprojw, g.attprojb, dbranch, a.atty, M, C, C, add, squares(ATTPROJW, l));
        float* datty = work.dln;  // dln has been read, and its memory is free until the last line
        // dfch, read for the last time above, takes dbranch in bf16; then dqkv overwrites it.
        gemm::input_gradient(datty, simd::rounded(work.dfch, dbranch, M * C), w.attprojw, M, C, C);
        attention().backward(work.dqkv, datty, a.atty, a.qkv, a.lse, drop(rng::ATT_DROPOUT, l), pass_.seq0,
                             work.attention);
        gemm::weight_gradient(g.qkvw, g.qkvb, work.dqkv, a.ln1, M, C, 3 * C, add, squares(QKVW, l));
        gemm::input_gradient(work.dln, work.dqkv, w.qkvw, M, C, 3 * C, grover() ? work.dresid : nullptr);
    }

    // Computes again what backward needs of block l and forward did not keep; see Activations::place.
    template <class A>
    void recompute_block(size_t l) {
        auto [a, w, g, norm1, norm2, C, M] = block<A>(l);
        if (recompute >= 2) {
            if (recompute == 2) norm1.copy = nullptr;  // resid2 was kept, attention's branch included
            norm_forward(norm1, a.resid);
        }
        if (recompute == 3) return block_to_gelu<A>(l);
        if (recompute == 2) norm_forward(norm2, a.resid2);
        gelu_forward(a.fch_gelu, a.fch, M * 4 * C, cfg.activation);
    }

    // Muon on the blocks' matrices.
    template <class A>
    void update_by_muon(const MuonStep& step) {
        if (ranks.several()) return update_by_muon_on_ranks(tensors<A>().muon[0], step);
        float *w = array(PARAMS), *g = array(GRADS), *momentum = array(MUON_M);
        const std::vector<MuonScratch<A>>& scratch = tensors<A>().muon;
        const MuonGroup &square = muon_groups_[0], &wide = muon_groups_[1];
        // The larger matrices first, so that threads end at about the same time
        const size_t wides = wide.matrices.size(), count = wides + square.matrices.size();
        auto update = [&](size_t i, const MuonScratch<A>& s) {
            const MuonGroup& group = i < wides ? wide : square;
            const MuonMatrix& matrix = group.matrices[i < wides ? i : i - wides];
            const size_t n = group.n, m = group.m, at = matrix.memory;
            muon_direction(s.sums, momentum + at, g + at, n * m, step);
            muon_orthogonalise(s, n, m, matrix.transposed);
            muon_apply(w + at, s.sums, n, m, 0, n, matrix.transposed, step);
        };
        if (scratch.size() == 1) {
            for (size_t i = 0; i < count; i++) update(i, scratch[0]);
        } else {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)scratch.size())
            for (size_t i = 0; i < count; i++) update(i, scratch[(size_t)omp_get_thread_num()]);
        }
    }
    // Ranks have the same momentum, and share out the orthogonalising: in each round every rank takes one
    // matrix, and all get all results, some rows at a time.
    template <class A>
    void update_by_muon_on_ranks(const MuonScratch<A>& s, const MuonStep& step) {
        float *w = array(PARAMS), *g = array(GRADS), *momentum = array(MUON_M);
        const size_t world = (size_t)ranks.world(), mine = (size_t)ranks.comm->rank;
        for (const MuonGroup& group : muon_groups_) {
            const size_t n = group.n, m = group.m, count = group.matrices.size();
            for (size_t first = 0; first < count; first += world) {
                const size_t end = std::min(count, first + world);
                for (size_t i = first; i < end; i++) {
                    const size_t at = group.matrices[i].memory;
                    muon_direction(i - first == mine ? s.sums : nullptr, momentum + at, g + at, n * m, step);
                }
                if (first + mine < end) muon_orthogonalise(s, n, m, group.matrices[first + mine].transposed);
                const size_t at_once = std::max<size_t>(1, MuonScratch<A>::GATHERED / m);
                for (size_t row = 0; row < n; row += at_once) {
                    const size_t rows = std::min(at_once, n - row), floats = rows * m;
                    ranks.comm->all_gather(s.gathered, s.sums + row * m, floats * sizeof(float));
                    for (size_t i = first; i < end; i++)
                        muon_apply(w + group.matrices[i].memory, s.gathered + (i - first) * floats, n, m, row,
                                   rows, group.matrices[i].transposed, step);
                }
            }
        }
    }

    const std::array<MuonGroup, 2> muon_groups_ = muon_groups(cfg);
    int threads_ = 0;
    machine::Memory activations_mem_, scratch_mem_;
    std::tuple<Tensors<float>, Tensors<bf16>> tensors_{};  // those of the model's precision are in use
    Pass pass_;
    double step_loss_ = 0;
    StepResult last_;
    const int *tokens_ = nullptr, *targets_ = nullptr;
    size_t b_ = 0, t_ = 0, counted_ = 0;
    bool accumulates_ = false;     // backward adds to the gradients, else it overwrites them
    std::vector<double> squares_;  // sums of squares of the gradients, in the file's order
    bool squared_ = false;         // whether the sums that products make are those of the current gradients
};

}  // namespace cpu

// Weak, so that several test files that include this one can be linked together.
__attribute__((weak)) std::unique_ptr<Decoder> open_decoder(ModelReader& file, size_t N, Dtype dtype) {
    auto model = std::make_unique<cpu::GPT2>(file.cfg, 0, 0, false, 0, Precision{dtype, true});
    model->each_piece(PARAMS, [&](float* p, size_t n) { file.read(p, n); });
    return std::make_unique<cpu::Decoder>(std::move(model), N, (size_t)file.cfg.maxT);
}

#ifndef ARAPOET_NO_MAIN
#include "lib/trainer.h"

// Weak, so that a program with a main of its own (sample_gpt2.cpp) can link this object for its model.
__attribute__((weak)) int main(int argc, char** argv) {
    machine::spin_less(argv);
    machine::flush_subnormals();
    return train<cpu::GPT2, cpu::Decoder>(argc, argv);
}
#endif
#endif  // TRAIN_GPT2_CPP
