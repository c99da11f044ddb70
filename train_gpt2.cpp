// train_gpt2.cpp - GPT-2 on the CPU, forward and backward by hand, and the reference for every GPU kernel.
//
// Read it from top to bottom: layers (each a forward and a backward), AdamW, the model, the decoder with its
// key/value cache, and a main that hands the model to the trainer in lib/trainer.h. Matrix products are those
// of lib/gemm.h.
//
// Shapes: B sequences of T tokens, M = B*T rows, C channels, NH heads of hs = C/NH, V vocabulary.
// Every result is independent of the number of threads, bit for bit: a sum is made by one thread in one
// order, or in blocks whose size is fixed. Tests include this file, with ARAPOET_NO_MAIN defined.
#ifndef TRAIN_GPT2_CPP
#define TRAIN_GPT2_CPP

#include "lib/gemm.h"
#include "lib/gpt2.h"
#include "lib/machine.h"
#include "lib/memory.h"
#include "lib/model.h"
#include "lib/rng.h"
#include "lib/sampler.h"
#include "lib/vec.h"

#include <tuple>

namespace cpu {

using simd::at_least;
using simd::bf16;
using simd::exp_approx;
using simd::ivec;
using simd::load;
using simd::store;
using simd::vec;
using simd::VL;

// Dropout (Srivastava et al. 2014): an element is kept with probability 1-p and then scaled by 1/(1-p).
// The draw depends on (seed, step, site, layer, element); elements are counted over the whole batch.
struct Dropout {
    float p = 0;
    rng::Key key{0, 0, rng::EMB_DROPOUT, 0};
    static constexpr size_t CHUNK = 1024;

    // The factors, 0 or 1/(1-p), of elements [e, e + n), n <= CHUNK; buf holds CHUNK + 8.
    const float* factors(float* buf, uint64_t e, size_t n) const {
        uint32_t threshold = rng::drop_threshold(p);
        float scale = 1.0f / (1.0f - p);
        uint64_t first = e / 4;
        size_t blocks = (size_t)((e + n + 3) / 4 - first);
#pragma omp simd
        for (size_t i = 0; i < blocks; i++) {
            rng::Block b = key.block(first + i);
            for (int w = 0; w < 4; w++) buf[4 * i + w] = b.w[w] >= threshold ? scale : 0.0f;
        }
        return buf + e % 4;
    }
    // y = x * factors, elements [e, e + n); y may be x.
    void apply(float* y, const float* x, uint64_t e, size_t n) const {
        float buf[CHUNK + 8];
        for (size_t i = 0; i < n; i += CHUNK) {
            size_t k = std::min(CHUNK, n - i);
            const float* f = factors(buf, e + i, k);
            for (size_t j = 0; j < k; j++) y[i + j] = x[i + j] * f[j];
        }
    }
};

// ---------------------------------------------------------------------------------------------
// Layers. Forward functions overwrite their output. Backward functions add to parameter gradients, or
// overwrite them where a flag says so.

// out (B,T,C) = wte[token] + wpe[t], then dropout. e0: the batch's first element within the whole batch.
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

// dwte[token] += dout, dwpe[t] += dout; dout (B,T,C) is masked in place. Each thread owns some channels, so
// that a token that occurs twice is summed in one order.
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

// One row of C values: y = (x - mean) * rstd * w + b (Ba et al. 2016). If copy is not null it receives y in
// floats too.
template <class A>
inline void layernorm_row(A* y, float* mean, float* rstd, const float* x, const float* w, const float* b,
                          size_t C, float eps, float* copy) {
    float sum = 0, var = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t c = 0; c < C; c++) sum += x[c];
    float mu = sum / (float)C;
#pragma omp simd reduction(+ : var)
    for (size_t c = 0; c < C; c++) var += (x[c] - mu) * (x[c] - mu);
    float rs = 1.0f / std::sqrt(var / (float)C + eps);
    for (size_t c = 0; c < C; c += VL) {
        auto at = [=](const float* p) { return load(p + c, C - c); };
        vec v = (at(x) - mu) * rs * at(w) + at(b);
        store(y + c, v, C - c);
        if (copy) store(copy + c, v, C - c);
    }
    *mean = mu, *rstd = rs;
}

// y (M,C) = LayerNorm(x), in floats or rounded to bf16; mean, rstd (M) are kept for backward; copy (M,C) or
// null takes y in floats, and may be x.
template <class A>
inline void layernorm_forward(A* y, float* mean, float* rstd, const float* x, const float* w, const float* b,
                              size_t M, size_t C, float eps = LAYERNORM_EPS, float* copy = nullptr) {
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < M; m++)
        layernorm_row(y + m * C, mean + m, rstd + m, x + m * C, w, b, C, eps, copy ? copy + m * C : nullptr);
}

// The residual connection and the LayerNorm that follows it, in one pass over memory:
// sum (M,C) = skip + dropout(branch); y = LayerNorm(sum), and copy as above. branch is masked in place; sum
// or copy may be skip.
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
        layernorm_row(y + m * C, mean + m, rstd + m, s, w, b, C, eps, copy ? copy + m * C : nullptr);
    }
}

// dx (M,C) = the gradient of x, or += where accumulate; it must not be dy. dw, db (C): added to, or
// overwritten unless accumulate_weights. masked (M,C) or null: dx times drop's factors, the gradient of the
// branch that was added to the residual stream just before. e0: number of the first element within the whole
// batch.
inline void layernorm_backward(float* dx, float* masked, float* dw, float* db, const float* dy,
                               const float* x, const float* mean, const float* rstd, const float* w, size_t M,
                               size_t C, bool accumulate, const Dropout& drop = {}, uint64_t e0 = 0,
                               bool accumulate_weights = true) {
    constexpr size_t STRIP = 4 * VL;
#pragma omp parallel
    {
#pragma omp for schedule(static) nowait
        for (size_t c0 = 0; c0 < C; c0 += STRIP) {
            float sw[STRIP] = {}, sb[STRIP] = {};
            size_t n = std::min(STRIP, C - c0);
            for (size_t m = 0; m < M; m++) {
                const float *d = dy + m * C + c0, *xm = x + m * C + c0, mu = mean[m], rs = rstd[m];
                if (n == STRIP)
                    for (size_t c = 0; c < STRIP; c++) sw[c] += d[c] * ((xm[c] - mu) * rs), sb[c] += d[c];
                else
                    for (size_t c = 0; c < n; c++) sw[c] += d[c] * ((xm[c] - mu) * rs), sb[c] += d[c];
            }
            for (size_t c = 0; c < n; c++) {
                dw[c0 + c] = (accumulate_weights ? dw[c0 + c] : 0.0f) + sw[c];
                db[c0 + c] = (accumulate_weights ? db[c0 + c] : 0.0f) + sb[c];
            }
        }
#pragma omp for schedule(static)
        for (size_t m = 0; m < M; m++) {
            const float *d = dy + m * C, *xm = x + m * C, mu = mean[m], rs = rstd[m];
            float* o = dx + m * C;
            float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
            for (size_t c = 0; c < C; c++) {
                float dn = d[c] * w[c];
                sum += dn, dot += dn * ((xm[c] - mu) * rs);
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

// Causal self-attention, softmax(Q K^T / sqrt(hs)) V per head (Vaswani et al. 2017). qkv (B,T,3C) holds Q, K
// and V side by side. One thread works on one (sequence, head) at a time, and on tiles of TQ queries and TK
// keys whose scores stay in its first cache (Dao, "FlashAttention-2", 2023): forward takes for each block of
// queries all keys and corrects the sum where the maximum grows; backward takes for each block of keys all
// queries. Scores are held transposed, (keys, TQ): a lane of a vector is a query, so that the softmax needs
// no sum across lanes, and the probabilities are packed operands of the products that follow. The log-sum-exp
// of each row, lse (B,NH,T), lets backward rebuild them.
struct Attention {
    static constexpr size_t TQ = gemm::SCORES, PANELS = 112 / gemm::MR,
                            TK = PANELS * gemm::MR;  // keys: whole row panels of K
    static_assert(TQ % gemm::NR == 0 && TK % 2 == 0, "tiles begin with a panel and with a pair");
    size_t B, T, C, NH;

    size_t hs() const { return C / NH; }
    size_t key_blocks() const { return ceil_div(gemm::row_panels(T), PANELS); }
    // Floats of scratch that one thread needs, the larger case: backward.
    static size_t scratch(size_t T, size_t hs) {
        size_t wide = round_up(hs, gemm::NR), even = round_up(hs, 16), t = round_up(T, TQ);
        return 2 * t * (even + wide) + t * even + t + 4 * TK * even + TK * wide + 4 * TQ * TK;
    }

    // Queries [q0, q0 + n) and those of a block's keys that any of them sees: panels [first, last), keys
    // [k0, k0 + keys).
    struct Tile {
        size_t q0, n, first, last, k0, keys, block_keys;
        // The causal mask. blind(k): how many of the first queries may not see key k0 + k. seen(q): how many
        // of the first keys query q0 + q sees.
        size_t blind(size_t k) const { return k0 + k > q0 ? k0 + k - q0 : 0; }
        size_t seen(size_t q) const { return q0 + q < k0 ? 0 : std::min(keys, q0 + q - k0 + 1); }
    };
    Tile tile_at(size_t q0, size_t block) const {
        size_t first = block * PANELS, end = std::min(first + PANELS, gemm::row_panels(T)),
               k0 = gemm::panel_row(T, first);
        Tile t = {q0, std::min(TQ, T - q0), first, first, k0, 0, gemm::panel_row(T, end) - k0};
        while (t.last < end && k0 + t.keys < q0 + t.n) t.keys = gemm::panel_row(T, ++t.last) - k0;
        return t;
    }
    // Calls f(r, height) for the tile's panels of keys; r counts from k0.
    template <class F>
    void each_panel(const Tile& t, F f) const {
        for (size_t i = t.first; i < t.last; i++)
            f(gemm::panel_row(T, i) - t.k0, gemm::panel_row(T, i + 1) - gemm::panel_row(T, i));
    }

    // A tile's keys or values, (keys,hs) with row stride ld from the first on, packed as rows; or (K,N)
    // packed as the second factor of a product.
    void pack_rows(Dtype dtype, float* dst, const float* src, size_t ld, const Tile& t) const {
        size_t units = gemm::units(dtype, hs());
        each_panel(t, [&](size_t r, size_t height) {
            gemm::pack(dtype, dst + r * units, height, src + r * ld, ld, 1, height, hs());
        });
    }
    static void pack_second(Dtype dtype, float* dst, const float* src, size_t sk, size_t sn, size_t K,
                            size_t N) {
        for (size_t n = 0; n < N; n += gemm::NR)
            gemm::pack(dtype, dst + n * gemm::units(dtype, K), gemm::NR, src + n * sn, sn, sk,
                       std::min(gemm::NR, N - n), K);
    }

    // S (keys,TQ) = packed keys or values times packed queries; where no query sees a panel's key S stays as
    // it is.
    void scores(Dtype dtype, float* S, const float* rows, const float* queries, const Tile& t) const {
        size_t units = gemm::units(dtype, hs());
        each_panel(t, [&](size_t r, size_t height) {
            for (size_t j = t.blind(r) / gemm::NR * gemm::NR; j < t.n; j += gemm::NR)
                gemm::tile(dtype, gemm::PANEL, height, gemm::NR, units, rows + r * units, queries + j * units,
                           S + r * TQ + j, TQ, false);
        });
    }
    // out (n queries, hs; row stride ld) += S^T (keys,TQ) times packed (keys,hs); buf holds TQ*TK.
    void add_over_keys(Dtype dtype, float* out, size_t ld, const float* S, const float* second, const Tile& t,
                       float* buf) const {
        size_t all = gemm::units(dtype, t.block_keys);
        if (dtype == BF16) gemm::pack(dtype, buf, TQ, S, 1, TQ, TQ, t.keys), S = buf;
        for (size_t i = 0; i < gemm::row_panels(t.n); i++) {
            size_t r = gemm::panel_row(t.n, i), end = gemm::panel_row(t.n, i + 1),
                   units = gemm::units(dtype, t.seen(end - 1));
            for (size_t c = 0; c < hs() && units; c += gemm::NR)
                gemm::tile(dtype, gemm::SCORE_COLUMNS, end - r, std::min(gemm::NR, hs() - c), units, S + r,
                           second + c * all, out + r * ld + c, ld, true);
        }
    }
    // out (keys, hs; row stride ld) += S (keys,TQ) times n packed queries (n,hs); buf holds TQ*TK.
    void add_over_queries(Dtype dtype, float* out, size_t ld, const float* S, const float* second,
                          const Tile& t, float* buf) const {
        size_t per_unit = gemm::per_unit(dtype), units = gemm::units(dtype, t.n);
        if (dtype == BF16) gemm::to_units(dtype, buf, S, t.keys * TQ), S = buf;
        each_panel(t, [&](size_t r, size_t height) {
            size_t u = t.blind(r) / per_unit;
            for (size_t c = 0; c < hs(); c += gemm::NR)
                gemm::tile(dtype, gemm::SCORE_ROWS, height, std::min(gemm::NR, hs() - c), units - u,
                           S + r * TQ / per_unit + u, second + c * units + u * gemm::NR, out + r * ld + c, ld,
                           true);
        });
    }

    // F (keys,TQ) = dropout's factors of the tile; buf holds TQ*TK. e: the number of the first query's row
    // among all rows of probabilities, by sequence, head and query, of the whole batch.
    void dropout_factors(float* F, const Dropout& drop, uint64_t e, const Tile& t, float* buf) const {
        float ones[TK];
        std::fill(ones, ones + TK, 1.0f);
        for (size_t i = 0; i < TQ; i++) {
            size_t seen = i < t.n ? t.seen(i) : 0;
            drop.apply(buf + i * t.keys, ones, (e + i) * T + t.k0, seen);
            std::fill(buf + i * t.keys + seen, buf + (i + 1) * t.keys, 0.0f);
        }
        gemm::pack(FP32, F, TQ, buf, t.keys, 1, TQ, t.keys);
    }

    // Calls f(v, seen, last) for each vector of queries, [v, v + VL): key k0 + k is seen by the lanes with
    // last >= k, and by none of them from k = seen on.
    template <class F>
    static void each_vector(const Tile& t, F f) {
        ivec lane;
        for (size_t i = 0; i < VL; i++) lane[i] = (int)i;
        for (size_t v = 0; v < TQ; v += VL) {
            ivec last = lane + ((int)(t.q0 + v) - (int)t.k0);
            f(v, v < t.n ? t.seen(v + VL - 1) : 0, lane < (int)t.n - (int)v ? last : -1);
        }
    }

    // out (B,T,C), lse (B,NH,T) from qkv (B,T,3C); seq0: the first sequence's number within the whole batch.
    // out, and dqkv below, are floats or bf16 numbers, and the products are of such numbers.
    template <class A>
    void forward(A* out, float* lse, const float* qkv, const Dropout& drop, uint64_t seq0,
                 float* scratch_mem) const {
        size_t h_size = hs(), ld = 3 * C, even = round_up(h_size, 16), wide = round_up(h_size, gemm::NR);
        const Dtype dtype = std::is_same<A, float>::value ? FP32 : BF16;
        float scale = 1.0f / std::sqrt((float)h_size);
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t bh = 0; bh < B * NH; bh++) {
            const float *q = qkv + bh / NH * T * ld + bh % NH * h_size, *k = q + C, *v = k + C;
            A* o = out + bh / NH * T * C + bh % NH * h_size;
            float* mem = scratch_mem + (size_t)omp_get_thread_num() * scratch(T, h_size);
            auto take = [&](size_t n) { return mem += n, mem - n; };
            float *kp = take(T * even), *vp = take(key_blocks() * TK * wide), *qp = take(TQ * even),
                  *O = take(TQ * even);
            float *S = take(TQ * TK), *F = take(TQ * TK), *buf = take(TQ * TK);
            for (size_t b = 0; b < key_blocks(); b++) {
                Tile t = tile_at((T - 1) / TQ * TQ, b);
                pack_rows(dtype, kp + t.k0 * even, k + t.k0 * ld, ld, t);
                pack_second(dtype, vp + b * TK * wide, v + t.k0 * ld, ld, 1, t.keys, h_size);
            }
            for (size_t q0 = 0; q0 < T; q0 += TQ) {
                alignas(64) float max[TQ], sum[TQ] = {}, shrink[TQ];
                std::fill(max, max + TQ, -INFINITY), std::fill(O, O + TQ * h_size, 0.0f);
                size_t n = std::min(TQ, T - q0);
                pack_second(dtype, qp, q + q0 * ld, 1, ld, h_size, n);
                for (size_t b = 0; b < key_blocks(); b++) {
                    Tile t = tile_at(q0, b);
                    if (!t.keys) break;
                    scores(dtype, S, kp + t.k0 * even, qp, t);
                    if (drop.p > 0) dropout_factors(F, drop, (seq0 * NH + bh) * T + q0, t, buf);
                    each_vector(t, [&](size_t lane, size_t seen, ivec last) {
                        vec before = load(max + lane), m = before;
                        for (size_t key = 0; key < seen; key++)
                            m = at_least(last >= (int)key ? load(S + key * TQ + lane) : before, m);
                        vec factor = exp_approx((before - m) * scale), total = load(sum + lane) * factor;
                        for (size_t key = 0; key < seen; key++) {
                            float* s = S + key * TQ + lane;
                            vec e = exp_approx((load(s) - m) * scale);
                            e = last >= (int)key ? e : 0.0f;
                            total += e;
                            store(s, drop.p > 0 ? e * load(F + key * TQ + lane) : e);
                        }
                        for (size_t key = seen; key < t.keys; key++) store(S + key * TQ + lane, vec{});
                        store(max + lane, m), store(sum + lane, total), store(shrink + lane, factor);
                    });
                    for (size_t i = 0; i < n && b; i++)
                        for (size_t c = 0; c < h_size; c++) O[i * h_size + c] *= shrink[i];
                    add_over_keys(dtype, O, h_size, S, vp + b * TK * wide, t, buf);
                }
                for (size_t i = 0; i < n; i++) {
                    float inv = 1.0f / sum[i];
                    for (size_t c = 0; c < h_size; c += VL)
                        store(o + (q0 + i) * C + c, load(O + i * h_size + c, h_size - c) * inv, h_size - c);
                    lse[bh * T + q0 + i] = max[i] * scale + std::log(sum[i]);
                }
            }
        }
    }

    // dqkv (B,T,3C) from dout (B,T,C) and what forward left; probabilities and dropout masks are computed
    // again.
    template <class A>
    void backward(A* dqkv, const float* dout, const A* out, const float* qkv, const float* lse,
                  const Dropout& drop, uint64_t seq0, float* scratch_mem) const {
        size_t h_size = hs(), ld = 3 * C, even = round_up(h_size, 16), wide = round_up(h_size, gemm::NR),
               t64 = round_up(T, TQ);
        const Dtype dtype = std::is_same<A, float>::value ? FP32 : BF16;
        size_t units = gemm::units(dtype, h_size);
        float scale = 1.0f / std::sqrt((float)h_size);
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t bh = 0; bh < B * NH; bh++) {
            size_t first = bh / NH * T * ld + bh % NH * h_size,
                   first_out = bh / NH * T * C + bh % NH * h_size;
            const float *q = qkv + first, *k = q + C, *v = k + C, *d_o = dout + first_out;
            const A* o = out + first_out;
            float* mem = scratch_mem + (size_t)omp_get_thread_num() * scratch(T, h_size);
            auto take = [&](size_t n) { return mem += n, mem - n; };
            float *qp = take(t64 * even), *op = take(t64 * even), *q2 = take(t64 * wide),
                  *o2 = take(t64 * wide), *dq = take(t64 * even), *dot = take(t64);
            float *kp = take(TK * even), *vp = take(TK * even), *k2 = take(TK * wide), *dk = take(TK * even),
                  *dv = take(TK * even);
            float *S = take(TQ * TK), *D = take(TQ * TK), *F = take(TQ * TK), *buf = take(TQ * TK);
            auto put_rows = [&](A* to, const float* from, size_t rows) {
                for (size_t i = 0; i < rows; i++)
                    for (size_t c = 0; c < h_size; c += VL)
                        store(to + i * ld + c, load(from + i * h_size + c, h_size - c), h_size - c);
            };
            pack_second(dtype, qp, q, 1, ld, h_size, T), pack_second(dtype, op, d_o, 1, C, h_size, T);
            for (size_t q0 = 0; q0 < T; q0 += TQ) {
                size_t n = std::min(TQ, T - q0);
                pack_second(dtype, q2 + q0 * wide, q + q0 * ld, ld, 1, n, h_size),
                    pack_second(dtype, o2 + q0 * wide, d_o + q0 * C, C, 1, n, h_size);
            }
            // The softmax's gradient needs each query's sum over keys of P dP. It is the dot product of the
            // query's output and its gradient (FlashAttention-2's D).
            for (size_t i = 0; i < T; i++) {
                vec sum = {};
                for (size_t c = 0; c < h_size; c += VL)
                    sum += load(d_o + i * C + c, h_size - c) * load(o + i * C + c, h_size - c);
                dot[i] = simd::sum(sum);
            }
            std::fill(dq, dq + T * h_size, 0.0f);
            for (size_t b = 0; b < key_blocks(); b++) {
                Tile all = tile_at((T - 1) / TQ * TQ, b);
                pack_rows(dtype, kp, k + all.k0 * ld, ld, all),
                    pack_rows(dtype, vp, v + all.k0 * ld, ld, all);
                pack_second(dtype, k2, k + all.k0 * ld, ld, 1, all.keys, h_size);
                std::fill(dk, dk + all.keys * h_size, 0.0f), std::fill(dv, dv + all.keys * h_size, 0.0f);
                for (size_t q0 = all.k0 / TQ * TQ; q0 < T; q0 += TQ) {
                    Tile t = tile_at(q0, b);
                    scores(dtype, S, kp, qp + q0 * units, t), scores(dtype, D, vp, op + q0 * units, t);
                    if (drop.p > 0) dropout_factors(F, drop, (seq0 * NH + bh) * T + q0, t, buf);
                    each_vector(t, [&](size_t lane, size_t seen, ivec last) {
                        vec l = {}, p_dp = {};
                        if (seen)
                            l = load(lse + bh * T + q0 + lane, t.n - lane),
                            p_dp = load(dot + q0 + lane, t.n - lane);
                        for (size_t key = 0; key < seen;
                             key++) {  // dS = P (dP - sum over keys of P dP) / sqrt(hs)
                            float *s = S + key * TQ + lane, *d = D + key * TQ + lane;
                            vec p = exp_approx(load(s) * scale - l), dp = load(d), kept = p;
                            if (drop.p > 0)
                                dp *= load(F + key * TQ + lane), kept *= load(F + key * TQ + lane);
                            vec ds = p * (dp - p_dp) * scale;
                            store(s, last >= (int)key ? kept : 0.0f), store(d, last >= (int)key ? ds : 0.0f);
                        }
                        for (size_t key = seen; key < t.keys; key++)
                            store(S + key * TQ + lane, vec{}), store(D + key * TQ + lane, vec{});
                    });
                    add_over_queries(dtype, dv, h_size, S, o2 + q0 * wide, t, buf);
                    add_over_queries(dtype, dk, h_size, D, q2 + q0 * wide, t, buf);
                    add_over_keys(dtype, dq + q0 * h_size, h_size, D, k2, t, buf);
                }
                A* to = dqkv + first + all.k0 * ld + C;
                put_rows(to, dk, all.keys), put_rows(to + C, dv, all.keys);
            }
            put_rows(dqkv + first, dq, T);
        }
    }
};

// The largest of n values.
inline float row_max(const float* x, size_t n) {
    vec most = load(x, n, -INFINITY);
    for (size_t i = VL; i < n; i += VL) most = at_least(load(x + i, n - i, -INFINITY), most);
    return simd::max(most);
}

// Softmax cross-entropy of logits (M,V), row stride ld: losses (M) = -log p[target], 0 where target < 0.
// Where dscale is not 0, each row of logits is replaced by its gradient (p - onehot) * dscale: as floats, or
// as bf16 numbers in the first half of the row.
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
        float max = row_max(x, V), at_target = x[target] - max;
        for (size_t v = 0; v < V; v += VL) {
            vec e = exp_approx(load(x + v, V - v, -INFINITY) -
                               max);  // beyond the last: e^-87, which no sum feels
            total += e;
            if (dscale != 0) store(x + v, e, V - v);
        }
        float sum = simd::sum(total);
        losses[m] = std::log(sum) - at_target;
        if (dscale == 0) continue;
        float scale = dscale / sum;
        for (size_t v = 0; v < V; v += VL) {
            vec d = load(x + v, V - v) * scale;
            if (size_t at = (size_t)target - v; at < VL) d[at] -= dscale;
            store((G*)x + v, d, V - v);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// AdamW

// One step of AdamW (Loshchilov and Hutter 2019) on n parameters w, with gradients g times `scale` and
// moments m and v:
//     m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2
//     w = w (1 - lr decay) - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
// correct1 and correct2 are 1 / (1 - beta^t).
struct AdamWStep {
    float beta1, beta2, lr, eps, correct1, correct2, scale;
};
inline void adamw(float* w, float* m, float* v, const float* g, size_t n, const AdamWStep& s, float decay) {
    constexpr size_t BLOCK = 1 << 14;
    float shrink = 1.0f - s.lr * decay;
#pragma omp parallel for schedule(static) if (n > BLOCK)
    for (size_t block = 0; block < n; block += BLOCK) {
        auto step = [=](size_t i, size_t count) {
            auto at = [=](const float* p) { return load(p + i, count); };
            vec gi = at(g) * s.scale, mi = s.beta1 * at(m) + (1 - s.beta1) * gi,
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
// The model

// Buffers that every layer uses again: gradients of activations, the logits of some rows, scratch. A, float
// or bf16, is the type of the products' operands.
template <class A>
struct Workspace {
    float *dresid, *dbranch, *dln, *dfch_gelu, *branch, *logits, *attention;
    A *dqkv, *dfch;

    void place(Arena& a, const Config& c, size_t B, size_t T, size_t head_rows, bool trains) {
        size_t M = B * T, C = c.C;
        if (!M) return;
        // branch and dln share memory: a branch's output is added to the residual stream at once, and dln
        // lives from head_loss to the end of backward (recomputation writes branch after dln was read). dqkv
        // and dfch share too: dfch is last read before dqkv is written.
        branch = dln = a.take<float>(M, C);
        logits = a.take<float>(head_rows, round_up(c.V, 16));
        attention = a.take<float>((size_t)omp_get_max_threads(), Attention::scratch(T, c.hs()));
        if (!trains) return;
        dresid = a.take<float>(M, C), dbranch = a.take<float>(M, C);
        dqkv = dfch = a.take<A>(M, 4 * C);
        dfch_gelu = std::is_same<A, float>::value ? (float*)dfch : a.take<float>(M, 4 * C);
    }
};

// The LayerNorm after a block: the next block's first, or the final one.
template <class A>
struct Norm {
    const float *w, *b;
    float *dw, *db;
    A* y;         // its output (M,C)
    float* copy;  // the same in floats, where GROVER's residual connection begins; else null
    float *mean, *rstd;
    bool final;
};

struct GPT2 {
    const Config cfg;
    const size_t B, T;  // largest batch; both 0 for a model that only generates
    const bool trains;
    const int recompute;
    const Precision precision;
    float dropout = 0;
    uint64_t seed = 1337;
    Params<float> params, grads;
    Params<bf16> params_bf16;  // instead of params in a model that only generates, with bf16

    static constexpr const char* PROGRAM = "train_gpt2";
    static constexpr Dtype DEFAULT_DTYPE = FP32;
    static constexpr size_t HEAD_FLOATS = 32 << 20;  // logits held at once: 128 MiB

    static bool in_bf16(size_t B, Precision p) { return !B && p.dtype == BF16; }
    static size_t head_rows(const Config& c, size_t M) {
        return std::min(M, std::max<size_t>(64, HEAD_FLOATS / round_up(c.V, 16)));
    }
    static void require_device() {}
    static void set_threads(int n) { machine::set_threads(n); }
    static size_t memory_available() { return machine::memory_available(); }
    static Peak peak_flops(Precision p) { return {gemm::measure_peak_flops(p.dtype), "measured"}; }
    static std::string device() {
        return strf("CPU, %d threads, %zu-bit vectors, bf16 %s", omp_get_max_threads(), VL * 32,
                    gemm::BF16_DOT_PRODUCT ? "dot products" : "emulated");
    }
    static void check_precision(Precision p) {
        if (p.dtype == BF16 && !p.master_weights)
            throw UsageError("--master_weights: the CPU trainer keeps its weights in fp32, 0 is for the GPU");
    }
    static MemoryNeed memory_need(const Config& c, size_t B, size_t T, bool trains, int recompute = 0,
                                  Precision precision = {}) {
        MemoryNeed n;
        n.params = checked_mul(num_params(c), in_bf16(B, precision) ? 2 : 4, "parameters");
        n.grads = trains ? n.params : 0;
        n.optimizer = 2 * n.grads;
        Arena activations, scratch;
        if (precision.dtype == BF16) Tensors<bf16>().place(activations, scratch, c, B, T, trains, recompute);
        else Tensors<float>().place(activations, scratch, c, B, T, trains, recompute);
        n.activations = activations.used,
        n.scratch = scratch.used + gemm::workspace_bytes(omp_get_max_threads());
        return n;
    }

    // recompute: see Activations::place.
    GPT2(const Config& c, size_t B_, size_t T_, bool trains_, int recompute_ = 0, Precision precision_ = {})
        : cfg(c), B(B_), T(T_), trains(trains_), recompute(recompute_), precision(precision_) {
        check_config(c, "model"), check_precision(precision);
        need_ = memory_need(c, B, T, trains, recompute, precision);
        threads_ = omp_get_max_threads();
        scratch_bytes_ = need_.scratch - gemm::workspace_bytes(threads_);
        void* memory = machine::allocate(need_.params, "parameters");
        if (in_bf16(B, precision)) params_bf16 = {params_bf16_mem_ = (bf16*)memory, c};
        else params = {params_mem_ = (float*)memory, c};
        if (trains) {
            grads = {grads_mem_ = (float*)machine::allocate(need_.grads, "gradients"), c};
            moments_ = (float*)machine::allocate(need_.optimizer, "optimizer state");
            size_t sums = 0;
            for (const ParamPiece& t : pieces_) sums += ceil_div(t.size, gemm::SQUARES);
            squares_.resize(sums);
        }
        Arena activations, scratch;
        activations.base = activations_mem_ = (char*)machine::allocate(need_.activations, "activations");
        scratch.base = scratch_mem_ = (char*)machine::allocate(scratch_bytes_, "scratch memory");
        if (precision.dtype == BF16) tensors<bf16>().place(activations, scratch, c, B, T, trains, recompute);
        else tensors<float>().place(activations, scratch, c, B, T, trains, recompute);
        gemm::reserve(threads_);
    }
    ~GPT2() {
        machine::release(params_mem_ ? (void*)params_mem_ : params_bf16_mem_, need_.params);
        machine::release(grads_mem_, need_.grads), machine::release(moments_, need_.optimizer);
        machine::release(activations_mem_, need_.activations), machine::release(scratch_mem_, scratch_bytes_);
    }
    GPT2(const GPT2&) = delete;
    GPT2& operator=(const GPT2&) = delete;

    void init_weights(uint64_t from_seed) {
        for (const ParamPiece& t : pieces_)
            initial_weights(params_mem_ + t.memory, cfg, t.id, t.layer * t.size, t.size, from_seed);
    }

    // Mean loss in nats over the targets >= 0 of tokens and targets (B_,T_), B_ <= B, T_ <= T; counted()
    // tells how many. Tokens are in [0, V), targets in [0, V) or negative to be skipped; the caller has
    // checked them. Of a training pass it is the loss with dropout, and backward() may follow; until then
    // tokens and targets must stay valid.
    double forward(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass = {}) {
        begin_pass(tokens, targets, B_, T_, pass);
        return precision.dtype == BF16 ? evaluate<bf16>() : evaluate<float>();
    }
    size_t counted() const { return counted_; }

    // The logits (M,V) of the last forward pass, for tests and for small models.
    void logits(float* out) {
        size_t M = b_ * t_;
        if (precision.dtype == BF16)
            gemm::forward(out, tensors<bf16>().act.lnf, params.wte, nullptr, M, cfg.C, cfg.V);
        else gemm::forward(out, tensors<float>().act.lnf, params.wte, nullptr, M, cfg.C, cfg.V);
    }

    // Adds the gradients of the last training pass (of its mean loss times grad_scale times its token count),
    // or begins with them if nothing was added since the last update. Returns the mean loss.
    double backward() {
        if (!pass_.train) throw std::logic_error("backward: the last forward pass was not a training pass");
        return precision.dtype == BF16 ? backward_pass<bf16>() : backward_pass<float>();
    }

    // The gradients' global L2 norm. What the products have not summed is summed now, all in the file's
    // order.
    double grad_norm() {
        if (no_grads_) return 0;
        gemm::finish_squares();
        double* sums = squares_.data();
        for (const ParamPiece& t : pieces_) {
            if (!squared_ || !squared_by_products(t.id))
                gemm::sum_squares(sums, grads_mem_ + t.memory, t.size);
            sums += ceil_div(t.size, gemm::SQUARES);
        }
        double sum = 0;
        for (double s : squares_) sum += s;
        return std::sqrt(sum);
    }

    // AdamW on all parameters, step number t from 1, with gradients times grad_scale; weight decay where the
    // table says so. Afterwards the gradients count as zero.
    void update(const AdamW& a, uint32_t t, float grad_scale) {
        array(GRADS);  // zeroes gradients that only count as zero
        auto correct = [t](double beta) { return (float)(1 / (1 - std::pow(beta, t))); };
        AdamWStep s = {a.beta1, a.beta2, a.lr, a.eps, correct(a.beta1), correct(a.beta2), grad_scale};
        for (const ParamPiece& p : pieces_) {
            size_t at = p.memory;
            adamw(params_mem_ + at, array(ADAM_M) + at, array(ADAM_V) + at, grads_mem_ + at, p.size, s,
                  p.decay ? a.weight_decay : 0.0f);
        }
        no_grads_ = true;
    }

    // What a trainer calls: a micro-batch's gradients and loss are added to the step's; then the step is
    // taken.
    void accumulate(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass) {
        begin_pass(tokens, targets, B_, T_, pass);
        double loss = precision.dtype == BF16 ? (forward_pass<bf16>(), backward_pass<bf16>())
                                              : (forward_pass<float>(), backward_pass<float>());
        step_loss_ += loss * (double)counted_ * pass.grad_scale;
    }
    // One AdamW step, number t from 1, with the gradient clipped. Where loss or norm is not finite,
    // parameters and moments stay as they are and the gradients are discarded.
    StepResult step(const AdamW& a, uint32_t t) {
        StepResult r = {step_loss_, grad_norm()};
        step_loss_ = 0;
        if (r.finite())
            update(a, t, a.grad_clip > 0 && r.norm > a.grad_clip ? (float)(a.grad_clip / r.norm) : 1.0f);
        no_grads_ = true;
        return r;
    }

    // A whole state out or in, in the file's order, piece by piece: f(pointer, number of floats). f may
    // write. A model that does not train has only PARAMS.
    template <class F>
    void each_piece(State s, F f) {
        if (s == PARAMS && params_bf16_mem_) return each_piece_of_bf16(f);
        float* p = array(s);
        if (s == GRADS) squared_ = false;  // f may write
        for (const ParamPiece& t : pieces_) f(p + t.memory, t.size);
    }
    // Says that the state just loaded is that after update number t.
    void resumed(uint32_t) {}

  private:
    template <class A>
    struct Tensors {
        Activations<float, A> act;
        Workspace<A> work;
        void place(Arena& activations, Arena& scratch, const Config& c, size_t B, size_t T, bool trains,
                   int recompute) {
            size_t M = checked_mul(B, T, "batch size x sequence length");
            if (!M) return;
            act.place(activations, c, M, trains, recompute);
            work.place(scratch, c, B, T, head_rows(c, M), trains);
        }
    };
    template <class A>
    Tensors<A>& tensors() {
        return std::get<Tensors<A>>(tensors_);
    }

    // A state's array, laid out as ParamLayout says. Gradients that only count as zero are zeroed first.
    float* array(State s) {
        size_t n = num_params(cfg);
        if (s == GRADS && std::exchange(no_grads_, false)) memset(grads_mem_, 0, need_.grads);
        return s == PARAMS ? params_mem_ : s == GRADS ? grads_mem_ : s == ADAM_M ? moments_ : moments_ + n;
    }
    // Parameters that are kept in bf16, as floats and back.
    template <class F>
    void each_piece_of_bf16(F f) {
        constexpr size_t PIECE = 1 << 20;
        std::vector<float> buf(PIECE);
        for (const ParamPiece& t : pieces_)
            for (size_t i = 0; i < t.size; i += PIECE) {
                size_t n = std::min(PIECE, t.size - i);
                bf16* p = params_bf16_mem_ + t.memory + i;
                for (size_t j = 0; j < n; j++) buf[j] = bf16_to_float(p[j]);
                f(buf.data(), n);
                for (size_t j = 0; j < n; j++) p[j] = float_to_bf16(buf[j]);
            }
    }

    // Products sum the squares of the gradients of the blocks' matrices while they are at it.
    static bool squared_by_products(int id) {
        return id == QKVW || id == ATTPROJW || id == FCW || id == FCPROJW;
    }
    // Where those sums go for tensor id of block l.
    double* squares(int id, size_t l) {
        double* at = squares_.data();
        for (const ParamPiece& t : pieces_) {
            if (t.id == id && t.layer == l) break;
            at += ceil_div(t.size, gemm::SQUARES);
        }
        return at;
    }

    Attention attention() const { return {b_, t_, (size_t)cfg.C, (size_t)cfg.NH}; }
    Dropout drop(rng::Stream site, size_t layer) const {
        return {pass_.train ? dropout : 0.0f, rng::Key(seed, pass_.step, site, (uint32_t)layer)};
    }
    // Number of the batch's first element within the whole batch.
    uint64_t first_element() const { return pass_.seq0 * t_ * (size_t)cfg.C; }
    bool grover() const { return cfg.arch == GROVER_ARCH; }

    void begin_pass(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass) {
        if (B_ > B || T_ > T || (pass.train && !trains))
            throw std::logic_error("forward: batch larger than the model was built for");
        if (omp_get_max_threads() > threads_)
            throw std::logic_error("forward: more threads than the model was built for");
        pass_ = pass, tokens_ = tokens, targets_ = targets, b_ = B_, t_ = T_;
    }

    template <class A>
    Norm<A> norm_after(size_t l) {
        const Activations<float, A>& act = tensors<A>().act;
        if (l + 1 == (size_t)cfg.L)
            return {params.lnfw, params.lnfb,  grads.lnfw,   grads.lnfb, act.lnf,
                    nullptr,     act.lnf_mean, act.lnf_rstd, true};
        auto a = act.block(l + 1, cfg, b_ * t_);
        Layer<float> w = params.layer(l + 1), g = grads.layer(l + 1);
        return {w.ln1w,     w.ln1b,     g.ln1w, g.ln1b, a.ln1, grover() ? a.resid2 : nullptr,
                a.ln1_mean, a.ln1_rstd, false};
    }

    // From the tokens to the final LayerNorm.
    template <class A>
    void forward_pass() {
        auto& act = tensors<A>().act;
        auto first = act.block(0, cfg, b_ * t_);
        Layer<float> w = params.layer(0);
        size_t C = cfg.C, M = b_ * t_, L = cfg.L;
        embedding_forward(act.embedded, tokens_, params.wte, params.wpe, b_, t_, C, drop(rng::EMB_DROPOUT, 0),
                          first_element());
        layernorm_forward(first.ln1, first.ln1_mean, first.ln1_rstd, act.embedded, w.ln1w, w.ln1b, M, C,
                          cfg.eps, grover() ? first.resid2 : nullptr);
        for (size_t l = 0; l < L; l++) {
            Norm<A> after = norm_after<A>(l);
            block_forward<A>(l, &after);
        }
    }

    // Block l and the LayerNorm after it. Without that (null) it ends at the GELU: what backward computes
    // again.
    template <class A>
    void block_forward(size_t l, const Norm<A>* after) {
        auto& work = tensors<A>().work;
        auto a = tensors<A>().act.block(l, cfg, b_ * t_);
        Layer<float> w = params.layer(l);
        size_t C = cfg.C, M = b_ * t_;
        // In GROVER the LayerNorm's output is the residual stream; `copy` has left it in resid2.
        const float* skip = grover() ? a.resid2 : a.resid;
        gemm::forward(a.qkv, a.ln1, w.qkvw, w.qkvb, M, C, 3 * C);
        attention().forward(a.atty, a.lse, a.qkv, drop(rng::ATT_DROPOUT, l), pass_.seq0, work.attention);
        gemm::forward(work.branch, a.atty, w.attprojw, w.attprojb, M, C, C);
        residual_layernorm_forward(a.resid2, a.ln2, a.ln2_mean, a.ln2_rstd, skip, work.branch, w.ln2w, w.ln2b,
                                   M, C, drop(rng::ATTPROJ_DROPOUT, l), first_element(), cfg.eps);
        gemm::forward_gelu(a.fch_gelu, a.fch, a.ln2, w.fcw, w.fcb, M, C, 4 * C, cfg.activation);
        if (!after) return;
        gemm::forward(work.branch, a.fch_gelu, w.fcprojw, w.fcprojb, M, 4 * C, C);
        residual_layernorm_forward(a.resid3, after->y, after->mean, after->rstd, a.resid2, work.branch,
                                   after->w, after->b, M, C, drop(rng::FCPROJ_DROPOUT, l), first_element(),
                                   cfg.eps, after->copy);
    }

    // The head's forward half for rows [m, m + n): logits and losses. Where dscale is not 0 the logits become
    // their gradient, in A from the start of each row on.
    template <class A>
    void head_forward(size_t m, size_t n, float dscale) {
        auto& [act, work] = tensors<A>();
        size_t C = cfg.C, V = cfg.V, ld = round_up(V, 16);
        gemm::forward(work.logits, act.lnf + m * C, params.wte, nullptr, n, C, V, ld);
        cross_entropy<A>(act.losses + m, work.logits, ld, targets_ + m, n, V, dscale);
    }
    // The mean of the losses that head_forward left for all rows.
    double mean_loss(const float* losses) {
        double sum = 0;
        counted_ = 0;
        for (size_t m = 0; m < b_ * t_; m++) sum += losses[m], counted_ += targets_[m] >= 0;
        return counted_ ? sum / (double)counted_ : 0;
    }
    template <class A>
    double evaluate() {
        forward_pass<A>();
        for (size_t m = 0, M = b_ * t_, R = head_rows(cfg, M); m < M; m += R)
            head_forward<A>(m, std::min(R, M - m), 0);
        return mean_loss(tensors<A>().act.losses);
    }

    // The output layer: its loss, dln = dlogits wte and dwte = dlogits^T lnf (or +=), a chunk of rows at a
    // time, so that the logits of the whole batch never exist at once.
    template <class A>
    double head_loss(bool accumulate) {
        auto& [act, work] = tensors<A>();
        size_t C = cfg.C, V = cfg.V, M = b_ * t_, R = head_rows(cfg, M),
               ld = round_up(V, 16) * sizeof(float) / sizeof(A);
        const A* dlogits = (const A*)work.logits;
        for (size_t m = 0; m < M; m += R) {
            size_t n = std::min(R, M - m);
            head_forward<A>(m, n, pass_.grad_scale);
            gemm::weight_gradient(grads.wte, nullptr, dlogits, act.lnf + m * C, n, C, V, accumulate || m,
                                  nullptr, ld);
            gemm::input_gradient(work.dln + m * C, dlogits, params.wte, n, C, V, nullptr, ld);
        }
        return mean_loss(act.losses);
    }

    // From the loss, which it returns, back to the embeddings.
    template <class A>
    double backward_pass() {
        auto& [act, work] = tensors<A>();
        bool accumulate = !std::exchange(no_grads_, false);
        double loss = head_loss<A>(accumulate);
        for (size_t l = cfg.L; l-- > 0;) block_backward<A>(l, norm_after<A>(l), accumulate);
        size_t C = cfg.C, M = b_ * t_;
        auto first = act.block(0, cfg, M);
        Layer<float> w = params.layer(0), g = grads.layer(0);
        layernorm_backward(work.dresid, nullptr, g.ln1w, g.ln1b, work.dln, first.resid, first.ln1_mean,
                           first.ln1_rstd, w.ln1w, M, C, !grover(), {}, 0, accumulate);
        if (!accumulate)
            memset(grads.wpe, 0, (size_t)cfg.maxT * C * sizeof(float));  // head_loss has overwritten wte's
        embedding_backward(grads.wte, grads.wpe, work.dresid, tokens_, b_, t_, C, drop(rng::EMB_DROPOUT, 0),
                           first_element());
        squared_ = true;
        return loss;
    }

    // Backward through the LayerNorm after block l, then through the block. It begins with dln, the gradient
    // of that LayerNorm's output, and dresid, that of the residual stream after it (nothing after the final
    // one); it leaves both for the LayerNorm before the block. LN' is a LayerNorm's backward, masked() a
    // dropout mask:
    //     dresid += LN'(dln)                          the gradient of resid3
    //     dfch = (masked(dresid) fcprojw) gelu'(fch)  dln = dfch fcw, of ln2's output
    //     dresid += LN'(dln)                          of resid2
    //     datty = masked(dresid) attprojw             of attention's output
    //     dqkv = attention'(datty)                    dln = dqkv qkvw, of ln1's output
    template <class A>
    void block_backward(size_t l, const Norm<A>& after, bool accumulate) {
        auto& work = tensors<A>().work;
        auto a = tensors<A>().act.block(l, cfg, b_ * t_);
        Layer<float> w = params.layer(l), g = grads.layer(l);
        size_t C = cfg.C, M = b_ * t_;
        uint64_t e0 = first_element();
        float* datty = work.dln;  // in the same memory
        // LayerNorm's backward also writes the gradient of the branch before it: dresid under that branch's
        // dropout mask.
        float* masked = dropout > 0 ? work.dbranch : nullptr;
        const float* dbranch = masked ? masked : work.dresid;
        // In GROVER the LayerNorm's output is the residual stream: its whole gradient is in dln, so that
        // dresid is overwritten.
        layernorm_backward(work.dresid, masked, after.dw, after.db, work.dln, a.resid3, after.mean,
                           after.rstd, after.w, M, C, !after.final && !grover(), drop(rng::FCPROJ_DROPOUT, l),
                           e0, accumulate);
        if (recompute && l + 1 < (size_t)cfg.L)
            recompute_block<A>(l);  // the last block's activations are still there

        gemm::weight_gradient(g.fcprojw, g.fcprojb, dbranch, a.fch_gelu, M, 4 * C, C, accumulate,
                              squares(FCPROJW, l));
        gemm::input_gradient_gelu(work.dfch, work.dfch_gelu, dbranch, w.fcprojw, a.fch, M, 4 * C, C,
                                  cfg.activation);
        gemm::weight_gradient(g.fcw, g.fcb, work.dfch, a.ln2, M, C, 4 * C, accumulate, squares(FCW, l));
        gemm::input_gradient(work.dln, work.dfch, w.fcw, M, C, 4 * C);
        layernorm_backward(work.dresid, masked, g.ln2w, g.ln2b, work.dln, a.resid2, a.ln2_mean, a.ln2_rstd,
                           w.ln2w, M, C, true, drop(rng::ATTPROJ_DROPOUT, l), e0, accumulate);

        gemm::weight_gradient(g.attprojw, g.attprojb, dbranch, a.atty, M, C, C, accumulate,
                              squares(ATTPROJW, l));
        gemm::input_gradient(datty, as_operand(work.dfch, dbranch, M * C), w.attprojw, M, C, C);
        attention().backward(work.dqkv, datty, a.atty, a.qkv, a.lse, drop(rng::ATT_DROPOUT, l), pass_.seq0,
                             work.attention);
        gemm::weight_gradient(g.qkvw, g.qkvb, work.dqkv, a.ln1, M, C, 3 * C, accumulate, squares(QKVW, l));
        gemm::input_gradient(work.dln, work.dqkv, w.qkvw, M, C, 3 * C, grover() ? work.dresid : nullptr);
    }

    // What backward needs of block l and forward did not keep; see Activations::place.
    template <class A>
    void recompute_block(size_t l) {
        auto a = tensors<A>().act.block(l, cfg, b_ * t_);
        Layer<float> w = params.layer(l);
        size_t C = cfg.C, M = b_ * t_;
        if (recompute >= 2)
            layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.resid, w.ln1w, w.ln1b, M, C, cfg.eps,
                              recompute == 3 && grover() ? a.resid2 : nullptr);
        if (recompute == 3) return block_forward<A>(l, nullptr);
        if (recompute == 2)
            layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.resid2, w.ln2w, w.ln2b, M, C, cfg.eps);
#pragma omp parallel for schedule(static)
        for (size_t m = 0; m < M; m++)
            simd::gelu_forward(a.fch_gelu + m * 4 * C, a.fch + m * 4 * C, 4 * C, cfg.activation);
    }

    // n values as products take them: with bf16 rounded into buf.
    static const float* as_operand(float*, const float* x, size_t) { return x; }
    static const bf16* as_operand(bf16* buf, const float* x, size_t n) {
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i += VL) store(buf + i, load(x + i, n - i), n - i);
        return buf;
    }

    MemoryNeed need_;
    int threads_ = 0;
    size_t scratch_bytes_ = 0;
    const std::vector<ParamPiece> pieces_ = param_pieces(cfg);
    bf16* params_bf16_mem_ = nullptr;
    float *params_mem_ = nullptr, *grads_mem_ = nullptr, *moments_ = nullptr;
    char *activations_mem_ = nullptr, *scratch_mem_ = nullptr;
    std::tuple<Tensors<float>, Tensors<bf16>> tensors_{};  // those of the model's precision are in use
    Pass pass_;
    double step_loss_ = 0;
    const int *tokens_ = nullptr, *targets_ = nullptr;
    size_t b_ = 0, t_ = 0, counted_ = 0;
    std::vector<double> squares_;  // sums of squares of the gradients, in the file's order: see squares()
    bool squared_ = false;         // those that products make are up to date
    bool no_grads_ = false;  // all gradients count as zero, whatever memory holds: backward overwrites them
};

// ---------------------------------------------------------------------------------------------
// Generation: keys and values of past tokens are kept, so that a new token costs the same each time.

class Decoder final : public ::Decoder {
  public:
    // N sequences at once, contexts of up to `context` tokens (at most maxT).
    Decoder(GPT2& model, size_t N, size_t context)
        : m_(model), N_(N), T_(std::min<size_t>(context, model.cfg.maxT)), rows_(N * CHUNK) {
        Arena a;
        place(a);
        bytes_ = a.used;
        if (size_t have = GPT2::memory_available(); bytes_ > have)
            fail(
                "%zu texts side by side need %s of memory for keys and values, %s are free; write fewer at "
                "once",
                N, human_bytes((double)bytes_).c_str(), human_bytes((double)have).c_str());
        Arena placed;
        placed.base = mem_ = (char*)machine::allocate(bytes_, "key/value cache");
        place(placed);
    }
    // The same with a model of its own.
    Decoder(std::unique_ptr<GPT2> model, size_t N, size_t context) : Decoder(*model, N, context) {
        owned_ = std::move(model);
    }
    ~Decoder() override { machine::release(mem_, bytes_); }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    size_t length() const override { return pos_; }
    size_t capacity() const override { return T_; }
    void reset() override { pos_ = 0; }

    // Appends n tokens to each sequence, tokens (N,n); returns the logits (N,V) that follow the last one.
    const float* append(const int* tokens, size_t n) override {
        if (pos_ + n > T_) throw std::logic_error("decoder: context is full");
        if (omp_get_max_threads() > threads_)
            throw std::logic_error("decoder: more threads than it was built for");
        for (size_t i = 0; i < n; i += CHUNK) {
            size_t count = std::min(CHUNK, n - i);
            bool last = i + CHUNK >= n;
            if (m_.params_bf16.wte) run(m_.params_bf16, tokens + i, n, count, last);
            else run(m_.params, tokens + i, n, count, last);
        }
        return logits_;
    }

  private:
    static constexpr size_t CHUNK = 64;

    void place(Arena& a) {
        const Config& c = m_.cfg;
        size_t C = c.C;
        cache_ = a.take<float>(key_value_bytes(c, N_, T_) / sizeof(float));
        x_ = a.take<float>(rows_, C), ln_ = a.take<float>(rows_, C), qkv_ = a.take<float>(rows_, 3 * C),
        att_ = a.take<float>(rows_, C), br_ = a.take<float>(rows_, C);
        fc_ = a.take<float>(rows_, 4 * C), stat_ = a.take<float>(rows_, 2),
        scores_ = a.take<float>((size_t)threads_, T_);
        logits_ = a.take<float>(N_, c.V), last_ = a.take<float>(N_, C);
        w_ = a.take<float>(C), b_ = a.take<float>(4 * C);
    }
    // A single new token of each sequence is bound by reading W, so few_rows computes it; that also gives a
    // sequence the same bits whatever the number of sequences.
    template <class W>
    static void matmul(float* Y, const float* X, const W* w, const float* b, size_t M, size_t K, size_t N,
                       bool one_token) {
        if (one_token) gemm::few_rows(Y, X, w, b, M, K, N);
        else gemm::forward(Y, X, w, b, M, K, N);
    }
    static float value(float w) { return w; }
    static float value(bf16 w) { return bf16_to_float(w); }
    static const float* floats(const float* w, size_t, float*) { return w; }
    // A vector of n bf16 weights in floats, in buf.
    static const float* floats(const bf16* w, size_t n, float* buf) {
        for (size_t i = 0; i < n; i++) buf[i] = bf16_to_float(w[i]);
        return buf;
    }

    // Attention of each sequence's n new tokens to all so far, att_ (N_*n,C) from qkv_ (N_*n,3C). cache, of
    // one layer, holds keys (T_,hs), then values (T_,hs), of each sequence and head, so that both are read
    // one line after the other.
    void attend(float* cache, size_t n) {
        size_t C = m_.cfg.C, NH = m_.cfg.NH, hs = m_.cfg.hs(), rows = N_ * n * NH;
        float scale = 1.0f / std::sqrt((float)hs);
        auto keys = [&](size_t r, size_t h) { return cache + (r / n * NH + h) * 2 * T_ * hs; };
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (size_t rh = 0; rh < rows; rh++) {
                size_t r = rh / NH, h = rh % NH;
                const float* k = qkv_ + r * 3 * C + C + h * hs;
                float* to = keys(r, h) + (pos_ + r % n) * hs;
                memcpy(to, k, hs * sizeof(float)), memcpy(to + T_ * hs, k + C, hs * sizeof(float));
            }
#pragma omp for schedule(static)
            for (size_t rh = 0; rh < rows; rh++) {
                size_t r = rh / NH, h = rh % NH, len = pos_ + r % n + 1;
                const float *q = qkv_ + r * 3 * C + h * hs, *k = keys(r, h), *v = k + T_ * hs;
                float *s = scores_ + (size_t)omp_get_thread_num() * T_, *o = att_ + r * C + h * hs, sum = 0;
                gemm::few_rows(s, q, k, nullptr, 1, hs, len);
                float max = row_max(s, len);
                for (size_t j = 0; j < len; j += VL)
                    store(s + j, exp_approx((load(s + j, len - j) - max) * scale), len - j);
#pragma omp simd reduction(+ : sum)
                for (size_t j = 0; j < len; j++) sum += s[j];
                for (size_t i = 0; i < hs; i++) o[i] = 0;
                for (size_t j = 0; j < len; j++, v += hs) {
                    float share = s[j] / sum;
                    for (size_t i = 0; i < hs; i++) o[i] += share * v[i];
                }
            }
        }
    }

    // One chunk: the first n of `stride` tokens of each sequence.
    template <class W>
    void run(const Params<W>& params, const int* tokens, size_t stride, size_t n, bool want_logits) {
        const Config& c = m_.cfg;
        size_t C = c.C, M = N_ * n;
        float *mean = stat_, *rstd = stat_ + M;
        for (size_t r = 0; r < M; r++)
            for (size_t i = 0; i < C; i++)
                x_[r * C + i] = value(params.wte[(size_t)tokens[r / n * stride + r % n] * C + i]) +
                                value(params.wpe[(pos_ + r % n) * C + i]);
        for (size_t l = 0; l < (size_t)c.L; l++) {
            Layer<W> p = params.layer(l);
            layernorm_forward(ln_, mean, rstd, x_, floats(p.ln1w, C, w_), floats(p.ln1b, C, b_), M, C, c.eps,
                              c.arch == GROVER_ARCH ? x_ : nullptr);
            matmul(qkv_, ln_, p.qkvw, floats(p.qkvb, 3 * C, b_), M, C, 3 * C, n == 1);
            attend(cache_ + l * N_ * T_ * 2 * C, n);
            matmul(br_, att_, p.attprojw, floats(p.attprojb, C, b_), M, C, C, n == 1);
            residual_layernorm_forward(x_, ln_, mean, rstd, x_, br_, floats(p.ln2w, C, w_),
                                       floats(p.ln2b, C, b_), M, C, Dropout(), 0, c.eps);
            matmul(fc_, ln_, p.fcw, floats(p.fcb, 4 * C, b_), M, C, 4 * C, n == 1);
#pragma omp parallel for schedule(static)
            for (size_t r = 0; r < M; r++)
                simd::gelu_forward(fc_ + r * 4 * C, fc_ + r * 4 * C, 4 * C, c.activation);
            matmul(br_, fc_, p.fcprojw, floats(p.fcprojb, C, b_), M, 4 * C, C, n == 1);
            for (size_t i = 0; i < M * C; i++) x_[i] += br_[i];
        }
        pos_ += n;
        if (!want_logits) return;
        for (size_t s = 0; s < N_; s++) memcpy(last_ + s * C, x_ + (s * n + n - 1) * C, C * sizeof(float));
        layernorm_forward(ln_, mean, rstd, last_, floats(params.lnfw, C, w_), floats(params.lnfb, C, b_), N_,
                          C, c.eps);
        matmul(logits_, ln_, params.wte, nullptr, N_, C, c.V, true);
    }

    std::unique_ptr<GPT2> owned_;
    GPT2& m_;
    size_t N_, T_, rows_, pos_ = 0, bytes_ = 0;
    int threads_ = omp_get_max_threads();
    char* mem_;
    float *cache_, *x_, *ln_, *qkv_, *att_, *br_, *fc_, *stat_, *scores_, *logits_, *last_, *w_, *b_;
};

}  // namespace cpu

std::unique_ptr<Decoder> open_decoder(ModelReader& file, size_t N, Dtype dtype) {
    auto model = std::make_unique<cpu::GPT2>(file.cfg, 0, 0, false, 0, Precision{dtype, true});
    model->each_piece(PARAMS, [&](float* p, size_t n) { file.read(p, n); });
    return std::make_unique<cpu::Decoder>(std::move(model), N, (size_t)file.cfg.maxT);
}

#ifndef ARAPOET_NO_MAIN
#include "lib/trainer.h"

// Weak, so that a program with a main of its own (sample_gpt2.cpp) can link this object for its model.
__attribute__((weak)) int main(int argc, char** argv) {
    machine::spin_less(argv);
    return train<cpu::GPT2, cpu::Decoder>(argc, argv);
}
#endif
#endif  // TRAIN_GPT2_CPP
