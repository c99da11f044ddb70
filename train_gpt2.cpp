// train_gpt2.cpp - GPT-2 on the CPU, forward and backward by hand, and the reference for every GPU kernel.
//
// Read it from top to bottom: numbers, layers (each a forward and a backward), the model, AdamW, the
// decoder with its key/value cache, and a main that hands the model to the trainer in trainer.h.
//
// Shapes: B sequences of T tokens, M = B*T rows, C channels, NH heads of hs = C/NH, V vocabulary.
// Every result is independent of the number of threads, bit for bit: a sum is made by one thread in one
// order, or in blocks whose size is fixed. Other programs include this file with ARAPOET_NO_MAIN defined.
#ifndef TRAIN_GPT2_CPP
#define TRAIN_GPT2_CPP

#include "gemm.h"
#include "gpt2.h"
#include "rng.h"

#include <tuple>

namespace cpu {

// ---------------------------------------------------------------------------------------------
// Numbers: functions of a vector, gemm::VL values at a time

using gemm::ivec;
using gemm::vec;

// e^x to 1 ulp or so for x in [-87, 88], clamped outside: x = n ln2 + r, Taylor series of e^r, |r| <= ln2/2.
inline vec exp_approx(vec x) {
    x = gemm::at_most(gemm::at_least(x, vec{} - 87.0f), vec{} + 88.0f);
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6;
    p = p * r + 0.5f, p = p * r + 1.0f, p = p * r + 1.0f;
    return p * (vec)(((ivec)shifted + 127) << 23);
}
inline float exp_approx(float x) { return exp_approx(vec{} + x)[0]; }

// The normal distribution function, 0.5 erfc(-x/sqrt2), to 3e-7 (Abramowitz and Stegun 7.1.26, in floats), and its
// density.
inline vec normal_cdf(vec x, vec* density) {
    vec a = (vec)((ivec)x & 0x7fffffff) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * a), e = exp_approx(-a * a);
    vec tail = 0.5f * e * t *
               (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    *density = 0.39894228f * e;
    return x < 0 ? tail : 1.0f - tail;
}

// GELU (Hendrycks and Gimpel 2016) and its derivative. The tanh form is x sigmoid(2u),
// u = sqrt(2/pi) (x + 0.044715 x^3), which is the published 0.5 x (1 + tanh u) without cancellation.
inline vec gelu_tanh(vec x, vec* derivative) {
    vec u2 = 1.59576912f * (x + 0.044715f * x * x * x), s = 1.0f / (1.0f + exp_approx(-u2));
    *derivative = s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * x * x);
    return x * s;
}
inline vec gelu_erf(vec x, vec* derivative) {
    vec density, cdf = normal_cdf(x, &density);
    *derivative = cdf + x * density;
    return x * cdf;
}
inline vec gelu(vec x, vec* derivative, int activation) {
    return activation == GELU_TANH ? gelu_tanh(x, derivative) : gelu_erf(x, derivative);
}

// y = gelu(x), n values, in floats or rounded to bf16.
template <class A>
inline void gelu_forward(A* y, const float* x, size_t n, int activation) {
    vec unused;
    for (size_t i = 0; i < n; i += gemm::VL) gemm::store(y + i, gelu(gemm::load(x + i, n - i), &unused, activation), n - i);
}
// dx = dy gelu'(x), n values, in floats or rounded to bf16; dx may be dy.
template <class A>
inline void gelu_backward(A* dx, const float* dy, const float* x, size_t n, int activation) {
    vec g;
    for (size_t i = 0; i < n; i += gemm::VL) {
        gelu(gemm::load(x + i, n - i), &g, activation);
        gemm::store(dx + i, gemm::load(dy + i, n - i) * g, n - i);
    }
}

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
// Layers. Forward functions overwrite their output; backward functions add to parameter gradients.

// out (B,T,C) = wte[token] + wpe[t], then dropout; without tokens, wte (B,T,C) holds each token's row. e0: the batch's first
// element within the whole batch.
inline void embedding_forward(float* out, const int* tokens, const float* wte, const float* wpe, size_t B, size_t T, size_t C,
                              const Dropout& drop, uint64_t e0) {
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < B * T; m++) {
        const float *e = wte + (tokens ? (size_t)tokens[m] : m) * C, *p = wpe + m % T * C;
        float* o = out + m * C;
        for (size_t c = 0; c < C; c++) o[c] = e[c] + p[c];
        if (drop.p > 0) drop.apply(o, o, e0 + m * C, C);
    }
}

// dwte[token] += dout, dwpe[t] += dout; dout (B,T,C) is masked in place. Each thread owns some channels, so
// that a token that occurs twice is summed in one order.
inline void embedding_backward(float* dwte, float* dwpe, float* dout, const int* tokens, size_t B, size_t T, size_t C,
                               const Dropout& drop, uint64_t e0) {
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

// One row: y = (x - mean) rstd w + b (Ba et al. 2016), C values; and once more in floats, unless copy is null.
template <class A>
inline void layernorm_row(A* y, float* mean, float* rstd, const float* x, const float* w, const float* b, size_t C, float eps,
                          float* copy) {
    float sum = 0, var = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t c = 0; c < C; c++) sum += x[c];
    float mu = sum / (float)C;
#pragma omp simd reduction(+ : var)
    for (size_t c = 0; c < C; c++) var += (x[c] - mu) * (x[c] - mu);
    float rs = 1.0f / std::sqrt(var / (float)C + eps);
    for (size_t c = 0; c < C; c += gemm::VL) {
        auto at = [=](const float* p) { return gemm::load(p + c, C - c); };
        vec v = (at(x) - mu) * rs * at(w) + at(b);
        gemm::store(y + c, v, C - c);
        if (copy) gemm::store(copy + c, v, C - c);
    }
    *mean = mu, *rstd = rs;
}

// y (M,C) = LayerNorm(x), in floats or rounded to bf16; mean, rstd (M) are kept for backward; copy (M,C) or null takes y in
// floats, and may be x.
template <class A>
inline void layernorm_forward(A* y, float* mean, float* rstd, const float* x, const float* w, const float* b, size_t M,
                              size_t C, float eps = LAYERNORM_EPS, float* copy = nullptr) {
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < M; m++) layernorm_row(y + m * C, mean + m, rstd + m, x + m * C, w, b, C, eps, copy ? copy + m * C : nullptr);
}

// The residual connection and the LayerNorm that follows it, in one pass over memory:
// sum (M,C) = skip + dropout(branch); y = LayerNorm(sum), and copy as above. branch is masked in place; sum or copy may be skip.
template <class A>
inline void residual_layernorm_forward(float* sum, A* y, float* mean, float* rstd, const float* skip, float* branch,
                                       const float* w, const float* b, size_t M, size_t C, const Dropout& drop, uint64_t e0,
                                       float eps = LAYERNORM_EPS, float* copy = nullptr) {
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < M; m++) {
        float *s = sum + m * C, *x = branch + m * C;
        const float* a = skip + m * C;
        if (drop.p > 0) drop.apply(x, x, e0 + m * C, C);
        for (size_t c = 0; c < C; c++) s[c] = a[c] + x[c];
        layernorm_row(y + m * C, mean + m, rstd + m, s, w, b, C, eps, copy ? copy + m * C : nullptr);
    }
}

// dx (M,C) += (or = where !accumulate) the gradient through LayerNorm; dw, db (C) += (or =, as start says).
inline void layernorm_backward(float* dx, float* dw, float* db, const float* dy, const float* x, const float* mean,
                               const float* rstd, const float* w, size_t M, size_t C, bool accumulate,
                               gemm::Start start = gemm::ACCUMULATE) {
    constexpr size_t STRIP = 4 * gemm::VL;
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
            bool add = start == gemm::ACCUMULATE;
            for (size_t c = 0; c < n; c++) dw[c0 + c] = (add ? dw[c0 + c] : 0.0f) + sw[c], db[c0 + c] = (add ? db[c0 + c] : 0.0f) + sb[c];
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
        }
    }
}

// Y (M,N) = X (M,K) W^T + b, W (N,K), b (N) or null; then the epilogue, which touches `touched` too; beside it, work. P: what
// is multiplied, floats or bf16 numbers.
template <class P = gemm::F32, class TX, class TW, class Epilogue = gemm::NoEpilogue, class Work = gemm::NoWork>
inline void matmul_forward(float* Y, const TX* X, const TW* W, const float* b, size_t M, size_t K, size_t N, Epilogue epi = {}, const Work& work = {},
                           gemm::Touched touched = {}) {
    gemm::multiply<P>(M, N, K, X, K, 1, W, 1, K, Y, N, gemm::OVERWRITE, b, epi, work, touched);
}

// db (N) += (or =, as start says) column sums of dY (M,N).
template <class TY>
inline void bias_backward(float* db, const TY* dY, size_t M, size_t N, gemm::Start start = gemm::ACCUMULATE) {
    constexpr size_t VECS = 4, STRIP = VECS * gemm::VL;
#pragma omp parallel for schedule(static)
    for (size_t n0 = 0; n0 < N; n0 += STRIP) {
        vec sum[VECS] = {};
        const TY* d = dY + n0;
        if (N - n0 >= STRIP)  // with a length the compiler knows
            for (size_t m = 0; m < M; m++, d += N)
                for (size_t i = 0; i < VECS; i++) sum[i] += gemm::load(d + i * gemm::VL);
        else
            for (size_t m = 0; m < M; m++, d += N)
                for (size_t i = 0; i * gemm::VL < N - n0; i++) sum[i] += gemm::load(d + i * gemm::VL, N - n0 - i * gemm::VL);
        for (size_t n = n0, i = 0; n < N && i < VECS; n += gemm::VL, i++)
            gemm::store(db + n, start == gemm::ACCUMULATE ? gemm::load(db + n, N - n) + sum[i] : sum[i], N - n);
    }
}

// dX (M,K) = dY (M,N) W, then the epilogue on dX; dW (N,K) += dY^T X; db (N) += column sums of dY (or =, as start says);
// beside dX, work.
template <class P = gemm::F32, class TY, class TX, class Epilogue = gemm::NoEpilogue, class Work = gemm::NoWork>
inline void matmul_backward(float* dX, float* dW, float* db, const TY* dY, const TX* X, const float* W, size_t M, size_t K,
                            size_t N, Epilogue epi = {}, gemm::Start start = gemm::ACCUMULATE, const Work& work = {}, gemm::Touched touched = {}) {
    gemm::multiply<P>(N, K, M, dY, 1, N, X, K, 1, dW, K, start);
    bias_backward(db, dY, M, N, start);
    gemm::multiply<P>(M, K, N, dY, N, 1, W, K, 1, dX, K, gemm::OVERWRITE, nullptr, epi, work, touched);
}

// Causal self-attention, softmax(Q K^T / sqrt(hs)) V per head (Vaswani et al. 2017). qkv (B,T,3C) holds Q, K and V side
// by side. One thread works on one (sequence, head) at a time, and on tiles of TQ queries and TK keys whose scores stay in
// its first cache (Dao, "FlashAttention-2", 2023): forward takes for each block of queries all keys and corrects the sum
// where the maximum grows; backward takes for each block of keys all queries. Scores are held transposed, (keys, TQ): a lane
// of a vector is a query, so that the softmax needs no sum across lanes, and the probabilities are packed operands of the
// products that follow. The log-sum-exp of each row, lse (B,NH,T), lets backward rebuild them.
struct Attention {
    static constexpr size_t TQ = 64, PANELS = 112 / gemm::MR, TK = PANELS * gemm::MR;  // keys: whole row panels of K
    static_assert(TQ % gemm::NR == 0 && TK % 2 == 0, "tiles begin with a panel and with a pair");
    size_t B, T, C, NH;

    size_t hs() const { return C / NH; }
    size_t key_blocks() const { return gemm::ceil_div(gemm::row_panels(T), PANELS); }
    // Floats of scratch that one thread needs, the larger case: backward.
    static size_t scratch(size_t T, size_t hs) {
        size_t wide = gemm::round_up(hs, gemm::NR), even = gemm::round_up(hs, 16), t = gemm::round_up(T, TQ);
        return 2 * t * (even + wide) + t * even + t + 4 * TK * even + TK * wide + 4 * TQ * TK;
    }

    // Queries [q0, q0 + n) and those of a block's keys that any of them sees: panels [first, last), keys [k0, k0 + keys).
    struct Tile {
        size_t q0, n, first, last, k0, keys, block_keys;
        // Of the queries, those before the first that sees key k0 + k; of the keys, those that query q0 + q sees.
        size_t blind(size_t k) const { return k0 + k > q0 ? k0 + k - q0 : 0; }
        size_t seen(size_t q) const { return q0 + q < k0 ? 0 : std::min(keys, q0 + q - k0 + 1); }
    };
    Tile tile_at(size_t q0, size_t block) const {
        size_t first = block * PANELS, end = std::min(first + PANELS, gemm::row_panels(T)), k0 = gemm::panel_row(T, first);
        Tile t = {q0, std::min(TQ, T - q0), first, first, k0, 0, gemm::panel_row(T, end) - k0};
        while (t.last < end && k0 + t.keys < q0 + t.n) t.keys = gemm::panel_row(T, ++t.last) - k0;
        return t;
    }
    // Calls f(r, height) for the tile's panels of keys; r counts from k0.
    template <class F>
    void each_panel(const Tile& t, F f) const {
        for (size_t i = t.first; i < t.last; i++) f(gemm::panel_row(T, i) - t.k0, gemm::panel_row(T, i + 1) - gemm::panel_row(T, i));
    }

    // A tile's keys or values, (keys,hs) with row stride ld from the first on, packed as rows; or (K,N) packed as the second
    // factor of a product.
    template <class P>
    void pack_rows(float* dst, const float* src, size_t ld, const Tile& t) const {
        size_t units = gemm::ceil_div(hs(), P::PER_UNIT);
        each_panel(t, [&](size_t r, size_t height) { gemm::pack<P>(dst + r * units, height, src + r * ld, ld, 1, height, hs()); });
    }
    template <class P>
    static void pack_second(float* dst, const float* src, size_t sk, size_t sn, size_t K, size_t N) {
        for (size_t n = 0; n < N; n += gemm::NR)
            gemm::pack<P>(dst + n * gemm::ceil_div(K, P::PER_UNIT), gemm::NR, src + n * sn, sn, sk, std::min(gemm::NR, N - n), K);
    }

    // S (keys,TQ) = packed keys or values times packed queries; where no query sees a panel's key S stays as it is.
    template <class P>
    void scores(float* S, const float* rows, const float* queries, const Tile& t) const {
        size_t units = gemm::ceil_div(hs(), P::PER_UNIT);
        each_panel(t, [&](size_t r, size_t height) {
            for (size_t j = t.blind(r) / gemm::NR * gemm::NR; j < t.n; j += gemm::NR)
                gemm::tile<P>(height, gemm::NR, units, rows + r * units, queries + j * units, S + r * TQ + j, TQ, gemm::ZEROS, 0);
        });
    }
    // out (n queries, hs; row stride ld) += S^T (keys,TQ) times packed (keys,hs); buf holds TQ*TK.
    template <class P>
    void add_over_keys(float* out, size_t ld, const float* S, const float* second, const Tile& t, float* buf) const {
        size_t all = gemm::ceil_div(t.block_keys, P::PER_UNIT);
        if (!std::is_same<P, gemm::F32>::value) gemm::pack<P>(buf, TQ, S, 1, TQ, TQ, t.keys), S = buf;
        for (size_t i = 0; i < gemm::row_panels(t.n); i++) {
            size_t r = gemm::panel_row(t.n, i), end = gemm::panel_row(t.n, i + 1), units = gemm::ceil_div(t.seen(end - 1), P::PER_UNIT);
            for (size_t c = 0; c < hs() && units; c += gemm::NR) {
                float* o = out + r * ld + c;
                gemm::tile<P, 1, TQ>(end - r, std::min(gemm::NR, hs() - c), units, S + r, second + c * all, o, ld, o, ld);
            }
        }
    }
    // out (keys, hs; row stride ld) += S (keys,TQ) times n packed queries (n,hs); buf holds TQ*TK.
    template <class P>
    void add_over_queries(float* out, size_t ld, const float* S, const float* second, const Tile& t, float* buf) const {
        constexpr size_t U = P::PER_UNIT, LINE = TQ / U;
        size_t units = gemm::ceil_div(t.n, U);
        if (!std::is_same<P, gemm::F32>::value) {
            for (size_t j = 0; j < t.keys * TQ; j += gemm::VL * U) gemm::store(buf + j / U, P::along(S + j, gemm::VL * U));
            S = buf;
        }
        each_panel(t, [&](size_t r, size_t height) {
            size_t u = t.blind(r) / U;
            for (size_t c = 0; c < hs(); c += gemm::NR) {
                float* o = out + r * ld + c;
                gemm::tile<P, LINE, 1>(height, std::min(gemm::NR, hs() - c), units - u, S + r * LINE + u, second + c * units + u * gemm::NR, o, ld, o, ld);
            }
        });
    }

    // F (keys,TQ) = dropout's factors; buf holds TQ*TK. Row e of the whole batch's probabilities is the first query's.
    void dropout_factors(float* F, const Dropout& drop, uint64_t e, const Tile& t, float* buf) const {
        float ones[TK];
        std::fill(ones, ones + TK, 1.0f);
        for (size_t i = 0; i < TQ; i++) {
            size_t seen = i < t.n ? t.seen(i) : 0;
            drop.apply(buf + i * t.keys, ones, (e + i) * T + t.k0, seen);
            std::fill(buf + i * t.keys + seen, buf + (i + 1) * t.keys, 0.0f);
        }
        gemm::pack<gemm::F32>(F, TQ, buf, t.keys, 1, TQ, t.keys);
    }

    // Calls f(v, seen, last) for each vector of queries, [v, v + VL): key k0 + k is seen by the lanes with last >= k, and by
    // none of them from k = seen on.
    template <class F>
    static void each_vector(const Tile& t, F f) {
        ivec lane;
        for (size_t i = 0; i < gemm::VL; i++) lane[i] = (int)i;
        for (size_t v = 0; v < TQ; v += gemm::VL) {
            ivec last = lane + ((int)(t.q0 + v) - (int)t.k0);
            f(v, v < t.n ? t.seen(v + gemm::VL - 1) : 0, lane < (int)t.n - (int)v ? last : -1);
        }
    }

    // out (B,T,C), lse (B,NH,T) from qkv (B,T,3C); seq0: the first sequence's number within the whole batch. out, and
    // dqkv below, are floats or rounded to bf16.
    template <class P = gemm::F32, class A>
    void forward(A* out, float* lse, const float* qkv, const Dropout& drop, uint64_t seq0, float* scratch_mem) const {
        size_t h_size = hs(), ld = 3 * C, even = gemm::round_up(h_size, 16), wide = gemm::round_up(h_size, gemm::NR);
        float scale = 1.0f / std::sqrt((float)h_size);
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t bh = 0; bh < B * NH; bh++) {
            const float *q = qkv + bh / NH * T * ld + bh % NH * h_size, *k = q + C, *v = k + C;
            A* o = out + bh / NH * T * C + bh % NH * h_size;
            float* mem = scratch_mem + (size_t)omp_get_thread_num() * scratch(T, h_size);
            auto take = [&](size_t n) { return mem += n, mem - n; };
            float *kp = take(T * even), *vp = take(key_blocks() * TK * wide), *qp = take(TQ * even), *O = take(TQ * even);
            float *S = take(TQ * TK), *F = take(TQ * TK), *buf = take(TQ * TK);
            for (size_t b = 0; b < key_blocks(); b++) {
                Tile t = tile_at((T - 1) / TQ * TQ, b);
                pack_rows<P>(kp + t.k0 * even, k + t.k0 * ld, ld, t);
                pack_second<P>(vp + b * TK * wide, v + t.k0 * ld, ld, 1, t.keys, h_size);
            }
            for (size_t q0 = 0; q0 < T; q0 += TQ) {
                alignas(64) float max[TQ], sum[TQ] = {}, shrink[TQ];
                std::fill(max, max + TQ, -INFINITY), std::fill(O, O + TQ * h_size, 0.0f);
                size_t n = std::min(TQ, T - q0);
                pack_second<P>(qp, q + q0 * ld, 1, ld, h_size, n);
                for (size_t b = 0; b < key_blocks(); b++) {
                    Tile t = tile_at(q0, b);
                    if (!t.keys) break;
                    scores<P>(S, kp + t.k0 * even, qp, t);
                    if (drop.p > 0) dropout_factors(F, drop, (seq0 * NH + bh) * T + q0, t, buf);
                    each_vector(t, [&](size_t lane, size_t seen, ivec last) {
                        vec before = gemm::load(max + lane), m = before;
                        for (size_t key = 0; key < seen; key++) m = gemm::at_least(last >= (int)key ? gemm::load(S + key * TQ + lane) : before, m);
                        vec factor = exp_approx((before - m) * scale), total = gemm::load(sum + lane) * factor;
                        for (size_t key = 0; key < seen; key++) {
                            float* s = S + key * TQ + lane;
                            vec e = exp_approx((gemm::load(s) - m) * scale);
                            e = last >= (int)key ? e : 0.0f;
                            total += e;
                            gemm::store(s, drop.p > 0 ? e * gemm::load(F + key * TQ + lane) : e);
                        }
                        for (size_t key = seen; key < t.keys; key++) gemm::store(S + key * TQ + lane, vec{});
                        gemm::store(max + lane, m), gemm::store(sum + lane, total), gemm::store(shrink + lane, factor);
                    });
                    for (size_t i = 0; i < n && b; i++)
                        for (size_t c = 0; c < h_size; c++) O[i * h_size + c] *= shrink[i];
                    add_over_keys<P>(O, h_size, S, vp + b * TK * wide, t, buf);
                }
                for (size_t i = 0; i < n; i++) {
                    float inv = 1.0f / sum[i];
                    for (size_t c = 0; c < h_size; c += gemm::VL)
                        gemm::store(o + (q0 + i) * C + c, gemm::load(O + i * h_size + c, h_size - c) * inv, h_size - c);
                    lse[bh * T + q0 + i] = max[i] * scale + std::log(sum[i]);
                }
            }
        }
    }

    // dqkv (B,T,3C) from dout (B,T,C) and what forward left; probabilities and dropout masks are computed again.
    template <class P = gemm::F32, class A>
    void backward(A* dqkv, const float* dout, const A* out, const float* qkv, const float* lse, const Dropout& drop, uint64_t seq0,
                  float* scratch_mem) const {
        size_t h_size = hs(), ld = 3 * C, even = gemm::round_up(h_size, 16), wide = gemm::round_up(h_size, gemm::NR), t64 = gemm::round_up(T, TQ);
        size_t units = gemm::ceil_div(h_size, P::PER_UNIT);
        float scale = 1.0f / std::sqrt((float)h_size);
#pragma omp parallel for schedule(dynamic, 1)
        for (size_t bh = 0; bh < B * NH; bh++) {
            size_t first = bh / NH * T * ld + bh % NH * h_size, first_out = bh / NH * T * C + bh % NH * h_size;
            const float *q = qkv + first, *k = q + C, *v = k + C, *d_o = dout + first_out;
            const A* o = out + first_out;
            float* mem = scratch_mem + (size_t)omp_get_thread_num() * scratch(T, h_size);
            auto take = [&](size_t n) { return mem += n, mem - n; };
            float *qp = take(t64 * even), *op = take(t64 * even), *q2 = take(t64 * wide), *o2 = take(t64 * wide), *dq = take(t64 * even), *dot = take(t64);
            float *kp = take(TK * even), *vp = take(TK * even), *k2 = take(TK * wide), *dk = take(TK * even), *dv = take(TK * even);
            float *S = take(TQ * TK), *D = take(TQ * TK), *F = take(TQ * TK), *buf = take(TQ * TK);
            auto put_rows = [&](A* to, const float* from, size_t rows) {
                for (size_t i = 0; i < rows; i++)
                    for (size_t c = 0; c < h_size; c += gemm::VL) gemm::store(to + i * ld + c, gemm::load(from + i * h_size + c, h_size - c), h_size - c);
            };
            pack_second<P>(qp, q, 1, ld, h_size, T), pack_second<P>(op, d_o, 1, C, h_size, T);
            for (size_t q0 = 0; q0 < T; q0 += TQ) {
                size_t n = std::min(TQ, T - q0);
                pack_second<P>(q2 + q0 * wide, q + q0 * ld, ld, 1, n, h_size), pack_second<P>(o2 + q0 * wide, d_o + q0 * C, C, 1, n, h_size);
            }
            // The sum over keys of P dP, which the softmax's gradient needs, is the output times its gradient.
            for (size_t i = 0; i < T; i++) {
                vec sum = {};
                for (size_t c = 0; c < h_size; c += gemm::VL) sum += gemm::load(d_o + i * C + c, h_size - c) * gemm::load(o + i * C + c, h_size - c);
                dot[i] = gemm::sum(sum);
            }
            std::fill(dq, dq + T * h_size, 0.0f);
            for (size_t b = 0; b < key_blocks(); b++) {
                Tile all = tile_at((T - 1) / TQ * TQ, b);
                pack_rows<P>(kp, k + all.k0 * ld, ld, all), pack_rows<P>(vp, v + all.k0 * ld, ld, all);
                pack_second<P>(k2, k + all.k0 * ld, ld, 1, all.keys, h_size);
                std::fill(dk, dk + all.keys * h_size, 0.0f), std::fill(dv, dv + all.keys * h_size, 0.0f);
                for (size_t q0 = all.k0 / TQ * TQ; q0 < T; q0 += TQ) {
                    Tile t = tile_at(q0, b);
                    scores<P>(S, kp, qp + q0 * units, t), scores<P>(D, vp, op + q0 * units, t);
                    if (drop.p > 0) dropout_factors(F, drop, (seq0 * NH + bh) * T + q0, t, buf);
                    each_vector(t, [&](size_t lane, size_t seen, ivec last) {
                        vec l = {}, p_dp = {};
                        if (seen) l = gemm::load(lse + bh * T + q0 + lane, t.n - lane), p_dp = gemm::load(dot + q0 + lane, t.n - lane);
                        for (size_t key = 0; key < seen; key++) {  // dS = P (dP - sum over keys of P dP) / sqrt(hs)
                            float *s = S + key * TQ + lane, *d = D + key * TQ + lane;
                            vec p = exp_approx(gemm::load(s) * scale - l), dp = gemm::load(d), kept = p;
                            if (drop.p > 0) dp *= gemm::load(F + key * TQ + lane), kept *= gemm::load(F + key * TQ + lane);
                            vec ds = p * (dp - p_dp) * scale;
                            gemm::store(s, last >= (int)key ? kept : 0.0f), gemm::store(d, last >= (int)key ? ds : 0.0f);
                        }
                        for (size_t key = seen; key < t.keys; key++) gemm::store(S + key * TQ + lane, vec{}), gemm::store(D + key * TQ + lane, vec{});
                    });
                    add_over_queries<P>(dv, h_size, S, o2 + q0 * wide, t, buf);
                    add_over_queries<P>(dk, h_size, D, q2 + q0 * wide, t, buf);
                    add_over_keys<P>(dq + q0 * h_size, h_size, D, k2, t, buf);
                }
                A* to = dqkv + first + all.k0 * ld + C;
                put_rows(to, dk, all.keys), put_rows(to + C, dv, all.keys);
            }
            put_rows(dqkv + first, dq, T);
        }
    }
};

// Softmax cross-entropy of logits (M,V), row stride ld: losses (M) = -log p[target], 0 where target < 0. Where
// dscale is not 0 a row's gradient, (p - onehot) * dscale, takes its place, in floats or from its start on in bf16.
template <class G = float>
inline void cross_entropy(float* losses, float* logits, size_t ld, const int* targets, size_t M, size_t V, float dscale) {
    constexpr size_t VL = gemm::VL;
#pragma omp parallel for schedule(static)
    for (size_t m = 0; m < M; m++) {
        float* x = logits + m * ld;
        int target = targets[m];
        if (target < 0) {
            losses[m] = 0;
            if (dscale != 0) memset(x, 0, V * sizeof(float));
            continue;
        }
        vec most = gemm::load(x, V, -INFINITY), total = {};
        for (size_t v = VL; v < V; v += VL) most = gemm::at_least(gemm::load(x + v, V - v, -INFINITY), most);
        float max = gemm::max(most), at_target = x[target] - max;
        for (size_t v = 0; v < V; v += VL) {
            vec e = exp_approx(gemm::load(x + v, V - v, -INFINITY) - max);  // beyond the last: e^-87, which no sum feels
            total += e;
            if (dscale != 0) gemm::store(x + v, e, V - v);
        }
        float sum = gemm::sum(total);
        losses[m] = std::log(sum) - at_target;
        if (dscale == 0) continue;
        float scale = dscale / sum;
        for (size_t v = 0; v < V; v += VL) {
            vec d = gemm::load(x + v, V - v) * scale;
            if (size_t at = (size_t)target - v; at < VL) d[at] -= dscale;
            gemm::store((G*)x + v, d, V - v);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The model

// Hands out pieces of one block of memory; with no block it only counts. Sizes in floats, overflow checked.
struct Arena {
    static constexpr size_t MOST = (size_t)1 << 60;
    float* base = nullptr;
    size_t used = 0;
    template <class A = float>
    A* take(size_t a, size_t b = 1, size_t c = 1) {
        float* p = base ? base + used : nullptr;
        size_t n;
        if (__builtin_mul_overflow(a, b, &n) || __builtin_mul_overflow(n, c, &n) || n > MOST ||
            (used += gemm::round_up(gemm::ceil_div(n * sizeof(A), sizeof(float)), 16)) > MOST)
            fail("this model and batch are too large to address: they need more than %s of memory", human_bytes((double)MOST * 4).c_str());
        return (A*)p;
    }
};

template <class W>
struct ParamsOf {
    W *wte, *wpe, *ln1w, *ln1b, *qkvw, *qkvb, *attprojw, *attprojb, *ln2w, *ln2b, *fcw, *fcb, *fcprojw, *fcprojb, *lnfw, *lnfb;
    void point_into(W* base, const Config& c) {
        W** p[NUM_PARAMS] = {&wte,  &wpe,  &ln1w, &ln1b, &qkvw,    &qkvb,    &attprojw, &attprojb,
                             &ln2w, &ln2b, &fcw,  &fcb,  &fcprojw, &fcprojb, &lnfw,     &lnfb};
        auto off = param_offsets(c);
        for (int i = 0; i < NUM_PARAMS; i++) *p[i] = base + off[i];
    }
};
using Params = ParamsOf<float>;

// One step of AdamW (Loshchilov and Hutter 2019) on n parameters w with gradients g, times `scale`, and moments m and v.
// A function of its own, so that the result does not depend on who calls it.
struct AdamWStep {
    float beta1, beta2, lr, eps, correct1, correct2, scale;  // correct: 1 / (1 - beta^t)
    __attribute__((noinline)) void operator()(float* w, float* m, float* v, const float* g, size_t n, float decay) const {
        float shrink = 1.0f - lr * decay;
        auto some = [=](size_t i, size_t count) {
            auto at = [=](const float* p) { return gemm::load(p + i, count); };
            vec gi = at(g) * scale, mi = beta1 * at(m) + (1 - beta1) * gi, vi = beta2 * at(v) + (1 - beta2) * gi * gi;
            gemm::store(m + i, mi, count), gemm::store(v + i, vi, count);
            gemm::store(w + i, at(w) * shrink - lr * (mi * correct1) / (gemm::sqrt(vi * correct2) + eps), count);
        };
        size_t i = 0;
        for (; i + gemm::VL <= n; i += gemm::VL) some(i, gemm::VL);
        if (i < n) some(i, n - i);
    }
};
// The same as work beside a product, on two stretches of parameters.
struct UpdateBeside {
    static constexpr size_t ARRAYS = 4, UNIT = gemm::LINE;
    AdamWStep step{};
    float decay = 0;
    float *w[2] = {}, *m[2] = {}, *v[2] = {};
    const float* g[2] = {};
    size_t n[2] = {};

    size_t size() const { return n[0] + n[1]; }
    void locate(size_t i, const char** to) const {
        size_t s = i >= n[0], at = i - s * n[0];
        to[0] = (const char*)(w[s] + at), to[1] = (const char*)(m[s] + at), to[2] = (const char*)(v[s] + at), to[3] = (const char*)(g[s] + at);
    }
    void operator()(size_t i, size_t count) const {
        for (size_t s = i >= n[0]; count; s++, i = n[0]) {
            size_t at = i - s * n[0], k = std::min(count, n[s] - at);
            step(w[s] + at, m[s] + at, v[s] + at, g[s] + at, k, decay);
            count -= k;
        }
    }
};

// Sums of the squares of n gradients, a sum for each UNIT of them, as work beside a product.
struct SquaresBeside {
    static constexpr size_t ARRAYS = 1, UNIT = 1024;
    const float* g = nullptr;
    double* sums = nullptr;
    size_t n = 0;

    size_t size() const { return n; }
    void locate(size_t i, const char** to) const { to[0] = (const char*)(g + i); }
    void operator()(size_t i, size_t count) const {
        for (size_t end = i + count; i < end; i += UNIT) {
            const float* x = g + i;
            size_t k = std::min(UNIT, end - i);
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (size_t j = 0; j < k; j++) sum += (double)x[j] * x[j];
            sums[i / UNIT] = sum;
        }
    }
};

// What forward keeps for backward; M = B*T rows. Each tensor has one slot a layer, or a single one that is
// used again: by every layer of a model that does not train, and in training by what is recomputed. A, float or bf16, is the
// type of what products multiply.
template <class A>
struct Activations {
    float *embedded, *ln1_mean, *ln1_rstd, *qkv, *lse, *resid2, *ln2_mean, *ln2_rstd, *fch, *resid3, *lnf_mean, *lnf_rstd, *branch, *losses;
    A *ln1, *atty, *ln2, *fch_gelu, *lnf;
    size_t gelu_slots, ln_slots, block_slots, resid_slots;

    void place(Arena& a, const Config& c, size_t M, bool trains, int recompute) {
        size_t C = c.C, L = c.L;
        auto kept_below = [&](int level) { return trains && recompute < level ? L : 1; };
        gelu_slots = kept_below(1), ln_slots = kept_below(2), block_slots = kept_below(3), resid_slots = trains ? L : 1;
        embedded = a.take(M, C), resid3 = a.take(resid_slots, M, C);
        qkv = a.take(block_slots, M, 3 * C), lse = a.take(block_slots, M, c.NH), atty = a.take<A>(block_slots, M, C);
        resid2 = a.take(block_slots, M, C), fch = a.take(block_slots, M, 4 * C);
        ln1_mean = a.take(block_slots, M), ln1_rstd = a.take(block_slots, M);
        ln2_mean = a.take(block_slots, M), ln2_rstd = a.take(block_slots, M);
        ln1 = a.take<A>(ln_slots, M, C), ln2 = a.take<A>(ln_slots, M, C), fch_gelu = a.take<A>(gelu_slots, M, 4 * C);
        lnf = a.take<A>(M, C), lnf_mean = a.take(M), lnf_rstd = a.take(M), branch = a.take(M, C), losses = a.take(M);
    }
};

// What backward needs beside: gradients of activations, one layer at a time. dfch_gelu is dfch where that is in floats.
template <class A>
struct Gradients {
    float *dresid, *dbranch, *dln, *dfch_gelu;
    A *dqkv, *dfch;
    void place(Arena& a, const Config& c, size_t M) {
        size_t C = c.C;
        dresid = a.take(M, C), dbranch = a.take(M, C), dln = a.take(M, C), dqkv = a.take<A>(M, 3 * C), dfch = a.take<A>(M, 4 * C);
        dfch_gelu = std::is_same<A, float>::value ? (float*)dfch : a.take(M, 4 * C);
    }
};

// Both, in one block of memory.
template <class A>
struct Tensors {
    Activations<A> act;
    Gradients<A> grad;
    void place(Arena& a, const Config& c, size_t M, bool trains, int recompute) {
        if (!M) return;
        act.place(a, c, M, trains, recompute);
        if (trains) grad.place(a, c, M);
    }
};
// How the operands of products with P are stored.
template <class P>
using Stored = std::conditional_t<std::is_same<P, gemm::BF16>::value, gemm::bf16, float>;

struct GPT2 {
    const Config cfg;
    const size_t B, T;  // largest batch; both 0 for a model that only generates
    const bool trains;
    const int recompute;
    const Precision precision;
    float dropout = 0;
    uint64_t seed = 1337;
    Params p{}, g{};
    ParamsOf<gemm::bf16> half{};  // in place of p in a model that only generates, with bf16
    static bool in_bf16(size_t B, Precision p) { return !B && p.dtype == BF16; }

    static constexpr size_t HEAD_FLOATS = 32 << 20;  // logits held at once: 128 MiB

    static size_t head_rows(const Config& c, size_t M) {
        return std::min(M, std::max<size_t>(64, HEAD_FLOATS / gemm::round_up(c.V, 16)));
    }
    static void require_device() {}
    static void set_threads(int n) { omp_set_num_threads(n); }
    static Peak peak_flops(Precision p) {
        return {p.dtype == BF16 ? gemm::measure_peak_flops<gemm::BF16>() : gemm::measure_peak_flops(), "measured"};
    }
    static std::string device() {
        return strf("CPU, %d threads, %zu-bit vectors, bf16 %s", omp_get_max_threads(), gemm::VL * 32,
                    gemm::BF16_DOT_PRODUCT ? "dot products" : "emulated");
    }
    // Bytes that this process may still take: the machine's, or its control group's if that is less.
    static size_t memory_available() {
        size_t best = SIZE_MAX;
        if (FILE* f = fopen("/proc/meminfo", "r")) {
            char line[128];
            size_t kib;
            while (fgets(line, sizeof line, f))
                if (sscanf(line, "MemAvailable: %zu", &kib) == 1) best = kib * 1024;
            fclose(f);
        }
        size_t limit, used;
        FILE *m = fopen("/sys/fs/cgroup/memory.max", "r"), *c = fopen("/sys/fs/cgroup/memory.current", "r");
        if (m && c && fscanf(m, "%zu", &limit) == 1 && fscanf(c, "%zu", &used) == 1) best = std::min(best, limit > used ? limit - used : 0);
        if (m) fclose(m);
        if (c) fclose(c);
        return best;
    }
    static constexpr const char* PROGRAM = "train_gpt2";
    static constexpr Dtype DEFAULT_DTYPE = FP32;
    static void check_precision(Precision p) {
        if (p.dtype == BF16 && !p.master_weights) throw UsageError("--master_weights: the CPU trainer keeps its weights in fp32, 0 is for the GPU");
    }
    static MemoryNeed memory_need(const Config& c, size_t B, size_t T, bool trains, int recompute = 0, Precision precision = {}) {
        MemoryNeed n;
        n.params = checked_mul(num_params(c), in_bf16(B, precision) ? 2 : 4, "parameters");
        n.grads = trains ? n.params : 0;
        n.optimizer = 2 * n.grads;
        Arena a;
        size_t M = checked_mul(B, T, "batch size x sequence length");
        if (precision.dtype == BF16) Tensors<gemm::bf16>().place(a, c, M, trains, recompute);
        else Tensors<float>().place(a, c, M, trains, recompute);
        n.activations = a.used * 4;
        if (M) n.scratch = (head_rows(c, M) * gemm::round_up(c.V, 16) + omp_get_max_threads() * Attention::scratch(T, c.hs())) * 4;
        n.scratch += gemm::Workspace::bytes(omp_get_max_threads());
        return n;
    }

    // recompute: what backward computes again instead of keeping it. Of 16C values per token and layer 0 keeps all;
    // 1 drops GELU's output, 4C; 2 that and LayerNorm's, 6C; 3 whole blocks, all but C.
    GPT2(const Config& c, size_t B_, size_t T_, bool trains_, int recompute_ = 0, Precision precision_ = {})
        : cfg(c), B(B_), T(T_), trains(trains_), recompute(recompute_), precision(precision_) {
        check_config(c, "model"), check_precision(precision);
        need_ = memory_need(c, B, T, trains, recompute, precision);
        void* mem = gemm::allocate(need_.params, "parameters");
        if (in_bf16(B, precision)) half.point_into(half_mem_ = (gemm::bf16*)mem, c);
        else p.point_into(params_mem_ = (float*)mem, c);
        if (trains) {
            grads_mem_ = (float*)gemm::allocate(need_.grads, "gradients");
            moments_ = (float*)gemm::allocate(need_.optimizer, "optimizer state");
            size_t sums = 0;
            for (const ParamInfo& t : param_table(c)) sums += t.layers * gemm::ceil_div(t.per_layer(), SquaresBeside::UNIT);
            squares_.resize(sums);
            g.point_into(grads_mem_, c);
        }
        size_t M = B * T;
        if (M) {
            Arena a;
            a.base = acts_mem_ = (float*)gemm::allocate(need_.activations, "activations");
            if (precision.dtype == BF16) tensors<gemm::bf16>().place(a, c, M, trains, recompute);
            else tensors<float>().place(a, c, M, trains, recompute);
            size_t head = head_rows(c, M) * gemm::round_up(c.V, 16);
            scratch_ = (float*)gemm::allocate((head + omp_get_max_threads() * Attention::scratch(T, c.hs())) * 4, "scratch memory");
            logits_ = scratch_, att_scratch_ = scratch_ + head;
            scratch_threads_ = omp_get_max_threads();
        }
        gemm::workspace().reserve(omp_get_max_threads());
    }
    ~GPT2() {
        gemm::release(params_mem_ ? (void*)params_mem_ : half_mem_, need_.params), gemm::release(grads_mem_, need_.grads);
        gemm::release(moments_, need_.optimizer), gemm::release(acts_mem_, need_.activations);
        gemm::release(scratch_, need_.scratch - gemm::Workspace::bytes(scratch_threads_));
    }
    GPT2(const GPT2&) = delete;
    GPT2& operator=(const GPT2&) = delete;

    void init_weights(uint64_t from_seed) {
        finish_update();
        auto off = param_offsets(cfg);
        for (int i = 0; i < NUM_PARAMS; i++) initial_weights(params_mem_ + off[i], cfg, i, 0, off[i + 1] - off[i], from_seed);
    }

    // Mean loss in nats over the targets >= 0 of tokens and targets (B_,T_), B_ <= B, T_ <= T; counted() tells how
    // many. A training pass also leaves what backward() needs.
    double forward(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass = {}) {
        return precision.dtype == BF16 ? forward_as<gemm::BF16>(tokens, targets, B_, T_, pass) : forward_as<gemm::F32>(tokens, targets, B_, T_, pass);
    }
    size_t counted() const { return counted_; }

    // The logits (M,V) of the last forward pass, for tests and for small models.
    void logits(float* out) {
        finish_update();
        if (precision.dtype == BF16) matmul_forward<gemm::BF16>(out, tensors<gemm::bf16>().act.lnf, p.wte, nullptr, b_ * t_, cfg.C, cfg.V);
        else matmul_forward(out, tensors<float>().act.lnf, p.wte, nullptr, b_ * t_, cfg.C, cfg.V);
    }

    // Adds the gradients of the last training pass (its mean loss times grad_scale times its token count).
    void backward() {
        if (precision.dtype == BF16) backward_as<gemm::BF16>();
        else backward_as<gemm::F32>();
    }

    // The gradients' global L2 norm. What backward() has not summed beside its products is summed now.
    double grad_norm() {
        if (fresh_) return 0;
        ParamTable table = param_table(cfg);
        for (int i = 0; i < NUM_PARAMS; i++) {
            size_t layers = squared_ && in_blocks(i) ? 0 : table[i].layers, units = gemm::ceil_div(table[i].per_layer(), SquaresBeside::UNIT);
#pragma omp parallel for schedule(static)
            for (size_t u = 0; u < layers * units; u++) {
                size_t first = u % units * SquaresBeside::UNIT;
                const SquaresBeside s = squares(i, u / units);
                s(first, std::min(SquaresBeside::UNIT, s.n - first));
            }
        }
        double sum = 0;
        for (double s : squares_) sum += s;
        return std::sqrt(sum);
    }

    // One step of AdamW, number t from 1, on gradients times grad_scale; decay on matrices and embeddings only. Leaves the
    // gradients zero. What is not needed at once, wte and the matrices of all blocks but the first, is put off: the next
    // forward pass does it beside its products, and whoever looks at the state before that has it done first.
    void update(const AdamW& a, uint32_t t, float grad_scale) {
        grads();
        auto correct = [t](double beta) { return (float)(1 / (1 - std::pow(beta, t))); };
        step_ = {a.beta1, a.beta2, a.lr, a.eps, correct(a.beta1), correct(a.beta2), grad_scale};
        decay_ = a.weight_decay;
        for (int i = 0; i < NUM_PARAMS; i++) advance(i, 0, not_put_off(i));
        put_off_ = fresh_ = true;
    }
    // Does what update() put off.
    void finish_update() {
        if (!std::exchange(put_off_, false)) return;
        for (int i = 0; i < NUM_PARAMS; i++) advance(i, not_put_off(i), param_table(cfg)[i].size());
    }

    // What a trainer calls: a micro-batch's gradients and loss are added to the step's; then the step is taken.
    void accumulate(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass) {
        double loss = forward(tokens, targets, B_, T_, pass);
        step_loss_ += loss * (double)counted_ * pass.grad_scale;
        backward();
    }
    // One AdamW step, number t from 1, with the gradient clipped; where it is not finite, nothing changes.
    StepResult step(const AdamW& a, uint32_t t) {
        StepResult r = {step_loss_, grad_norm()};
        step_loss_ = 0;
        if (r.finite()) update(a, t, a.grad_clip > 0 && r.norm > a.grad_clip ? (float)(a.grad_clip / r.norm) : 1.0f);
        return r;
    }

    // State out and in, piece by piece in order, so that a GPU can stream it: f(pointer, number of floats).
    enum State { PARAMS, ADAM_M, ADAM_V };
    template <class F>
    void each_piece(State s, F f) {
        finish_update();
        size_t n = num_params(cfg);
        if (s != PARAMS || params_mem_) return f(s == PARAMS ? params_mem_ : s == ADAM_M ? moments_ : moments_ + n, n);
        std::vector<float> buf(std::min<size_t>(n, 1 << 20));
        for (size_t i = 0; i < n; i += buf.size()) {
            size_t k = std::min(buf.size(), n - i);
            for (size_t j = 0; j < k; j++) buf[j] = bf16_to_float(half_mem_[i + j]);
            f(buf.data(), k);
            for (size_t j = 0; j < k; j++) half_mem_[i + j] = float_to_bf16(buf[j]);
        }
    }
    // Says that the state just loaded is that after update number t.
    void resumed(uint32_t) {}
    // All gradients, in the order of param_table.
    float* grads() {
        finish_update();
        squared_ = false;
        if (std::exchange(fresh_, false)) memset(grads_mem_, 0, need_.grads);
        return grads_mem_;
    }
    // All parameters; null where they are kept in bf16. With `p` in place of this call finish_update() first.
    float* params() {
        finish_update();
        return params_mem_;
    }

  private:
    // The matrices of the blocks: passes over them are made beside products.
    static bool in_blocks(int i) { return i == QKVW || i == ATTPROJW || i == FCW || i == FCPROJW; }
    // Of tensor i, the parameters that update() itself takes.
    size_t not_put_off(int i) const {
        const ParamInfo t = param_table(cfg)[i];
        return i == WTE ? 0 : in_blocks(i) ? t.per_layer() : t.size();
    }
    // The sums of squares of tensor i's gradients in block l.
    SquaresBeside squares(int i, size_t l) {
        ParamTable table = param_table(cfg);
        auto sums = [&](int id) { return gemm::ceil_div(table[id].per_layer(), SquaresBeside::UNIT); };
        size_t at = l * sums(i), n = table[i].per_layer();
        for (int id = 0; id < i; id++) at += table[id].layers * sums(id);
        return {grads_mem_ + param_offsets(cfg)[i] + l * n, squares_.data() + at, n};
    }
    // AdamW on parameters [first, end) of tensor i.
    void advance(int i, size_t first, size_t end) {
        constexpr size_t BLOCK = 1 << 14;
#pragma omp parallel for schedule(static)
        for (size_t j = first; j < end; j += BLOCK) {
            const UpdateBeside part = stretches(i, j, std::min(BLOCK, end - j));
            part(0, part.size());
        }
    }
    // AdamW on n parameters of tensor i from `first` on, and of wte as many as given.
    UpdateBeside stretches(int i, size_t first, size_t n, size_t wte = 0, size_t wte_n = 0) const {
        auto off = param_offsets(cfg);
        UpdateBeside u;
        u.step = step_, u.decay = param_table(cfg)[i].decay ? decay_ : 0.0f;
        const size_t from[2] = {off[i] + first, off[WTE] + wte}, count[2] = {n, wte_n};
        for (int s = 0; s < 2; s++) {
            u.w[s] = params_mem_ + from[s], u.m[s] = moments_ + from[s], u.v[s] = u.m[s] + off[NUM_PARAMS];
            u.g[s] = grads_mem_ + from[s], u.n[s] = count[s];
        }
        return u;
    }
    // What is done beside the product with matrix i of block l: the same matrix of the next block, and of wte the share that
    // the product has of all blocks' multiplications. After the last product nothing is left.
    UpdateBeside beside(int i, size_t l) const {
        if (!put_off_) return {};
        ParamTable table = param_table(cfg);
        size_t before = 0, block = 0, L = cfg.L, wte = table[WTE].size();
        for (int id : {QKVW, ATTPROJW, FCW, FCPROJW}) before += id < i ? table[id].per_layer() : 0, block += table[id].per_layer();
        auto share = [&](size_t done) { return (size_t)((double)(l * block + done) / (double)(L * block) * (double)wte); };
        size_t n = table[i].per_layer(), begin = share(before), end = i == FCPROJW && l + 1 == L ? wte : share(before + n);
        return stretches(i, (l + 1) * n, l + 1 < L ? n : 0, begin, end - begin);
    }

    Attention attention() const { return {b_, t_, (size_t)cfg.C, (size_t)cfg.NH}; }
    Dropout drop(rng::Stream site, size_t layer) const {
        return {pass_.train ? dropout : 0.0f, rng::Key(seed, pass_.step, site, (uint32_t)layer)};
    }
    template <class A>
    Tensors<A>& tensors() {
        return std::get<Tensors<A>>(tensors_);
    }
    // Where the activations of one layer stand.
    template <class A>
    struct Block {
        const float* resid;  // what the block reads
        float *ln1_mean, *ln1_rstd, *qkv, *lse, *resid2, *ln2_mean, *ln2_rstd, *fch, *resid3;
        A *ln1, *atty, *ln2, *fch_gelu;
        float* skip;  // GROVER's residual connection begins at ln1: where that goes in floats, else null
    };
    template <class A>
    Block<A> block(size_t l) {
        const Activations<A>& a = tensors<A>().act;
        size_t C = cfg.C, M = b_ * t_, gelu = l % a.gelu_slots * M, ln = l % a.ln_slots * M, blk = l % a.block_slots * M, res = l % a.resid_slots * M;
        size_t before = (l + a.resid_slots - 1) % a.resid_slots * M;
        float* resid2 = a.resid2 + blk * C;
        return {l ? a.resid3 + before * C : a.embedded, a.ln1_mean + blk, a.ln1_rstd + blk, a.qkv + blk * 3 * C, a.lse + blk * cfg.NH, resid2,
                a.ln2_mean + blk, a.ln2_rstd + blk, a.fch + blk * 4 * C, a.resid3 + res * C, a.ln1 + ln * C, a.atty + blk * C, a.ln2 + ln * C,
                a.fch_gelu + gelu * 4 * C, cfg.arch == GROVER_ARCH ? resid2 : nullptr};
    }

    template <class P>
    double forward_as(const int* tokens, const int* targets, size_t B_, size_t T_, const Pass& pass) {
        size_t C = cfg.C, M = B_ * T_, L = cfg.L;
        if (B_ > B || T_ > T || (pass.train && !trains)) throw std::logic_error("forward: batch larger than the model was built for");
        if (omp_get_max_threads() > scratch_threads_) throw std::logic_error("forward: more threads than the model was built for");
        pass_ = pass, tokens_ = tokens, b_ = B_, t_ = T_;
        using A = Stored<P>;
        const Activations<A>& act = tensors<A>().act;
        embed(act.embedded, act.branch, M);
        Block<A> first = block<A>(0);
        layernorm_forward(first.ln1, first.ln1_mean, first.ln1_rstd, act.embedded, p.ln1w, p.ln1b, M, C, cfg.eps, first.skip);
        for (size_t l = 0; l < L; l++) {
            block_forward<P>(l);
            Block<A> a = block<A>(l), next = l + 1 < L ? block<A>(l + 1) : Block<A>{};
            matmul_forward<P>(act.branch, a.fch_gelu, p.fcprojw + l * 4 * C * C, p.fcprojb + l * C, M, 4 * C, C, gemm::NoEpilogue(), beside(FCPROJW, l));
            bool last = l + 1 == L;  // the next LayerNorm is the following block's first, or the final one
            residual_layernorm_forward(a.resid3, last ? act.lnf : next.ln1, last ? act.lnf_mean : next.ln1_mean,
                                       last ? act.lnf_rstd : next.ln1_rstd, a.resid2, act.branch, last ? p.lnfw : p.ln1w + (l + 1) * C,
                                       last ? p.lnfb : p.ln1b + (l + 1) * C, M, C, drop(rng::FCPROJ_DROPOUT, l), pass.seq0 * T_ * C, cfg.eps, next.skip);
        }
        put_off_ = false;
        return head<P>(targets, M);
    }
    template <class P>
    void backward_as() {
        size_t C = cfg.C, M = b_ * t_;
        bool grover = cfg.arch == GROVER_ARCH;
        int activation = cfg.activation;
        gemm::Start start = std::exchange(fresh_, false) ? gemm::FOR_LATER : gemm::ACCUMULATE;
        using A = Stored<P>;
        const auto& [act, grad] = tensors<A>();
        float* dresid = grad.dresid;
        layernorm_backward(dresid, g.lnfw, g.lnfb, grad.dln, block<A>(cfg.L - 1).resid3, act.lnf_mean, act.lnf_rstd, p.lnfw, M, C, false, start);
        for (size_t l = cfg.L; l-- > 0;) {
            Block<A> a = block<A>(l);
            if (recompute >= 2) layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, a.resid, p.ln1w + l * C, p.ln1b + l * C, M, C, cfg.eps, recompute == 3 ? a.skip : nullptr);
            if (recompute == 2) layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.resid2, p.ln2w + l * C, p.ln2b + l * C, M, C, cfg.eps);
            if (recompute == 1 || recompute == 2)
#pragma omp parallel for schedule(static)
                for (size_t m = 0; m < M; m++) gelu_forward(a.fch_gelu + m * 4 * C, a.fch + m * 4 * C, 4 * C, activation);
            if (recompute == 3) block_forward<P>(l);

            const float* dbranch = masked(grad.dbranch, dresid, rng::FCPROJ_DROPOUT, l);
            matmul_backward<P>(grad.dfch_gelu, g.fcprojw + l * 4 * C * C, g.fcprojb + l * C, dbranch, a.fch_gelu, p.fcprojw + l * 4 * C * C, M, 4 * C, C,
                            [=, dfch = grad.dfch](size_t m, size_t n, size_t count, float* d) {
                                size_t at = m * 4 * C + n;
                                gelu_backward(dfch + at, d, a.fch + at, count, activation);
                            }, start, squares(FCPROJW, l), gemm::Touched(a.fch, 4 * C));
            matmul_backward<P>(grad.dln, g.fcw + l * 4 * C * C, g.fcb + l * 4 * C, grad.dfch, a.ln2, p.fcw + l * 4 * C * C, M, C, 4 * C, gemm::NoEpilogue(), start, squares(FCW, l));
            layernorm_backward(dresid, g.ln2w + l * C, g.ln2b + l * C, grad.dln, a.resid2, a.ln2_mean, a.ln2_rstd,
                               p.ln2w + l * C, M, C, true, start);

            dbranch = masked(grad.dbranch, dresid, rng::ATTPROJ_DROPOUT, l);
            matmul_backward<P>(grad.dln, g.attprojw + l * C * C, g.attprojb + l * C, dbranch, a.atty, p.attprojw + l * C * C, M, C, C, gemm::NoEpilogue(), start, squares(ATTPROJW, l));
            attention().template backward<P>(grad.dqkv, grad.dln, a.atty, a.qkv, a.lse, drop(rng::ATT_DROPOUT, l), pass_.seq0, att_scratch_);
            // GROVER's residual starts from the normalised input, so its gradient goes through the LayerNorm too.
            matmul_backward<P>(grad.dln, g.qkvw + l * 3 * C * C, g.qkvb + l * 3 * C, grad.dqkv, a.ln1, p.qkvw + l * 3 * C * C, M, C, 3 * C,
                            [=](size_t m, size_t n, size_t count, float* d) {
                                if (grover)
                                    for (size_t i = 0; i < count; i++) d[i] += dresid[m * C + n + i];
                            }, start, squares(QKVW, l), grover ? gemm::Touched(dresid, C) : gemm::Touched());
            layernorm_backward(dresid, g.ln1w + l * C, g.ln1b + l * C, grad.dln, a.resid, a.ln1_mean, a.ln1_rstd,
                               p.ln1w + l * C, M, C, !grover, start);
        }
        squared_ = true;
        if (start != gemm::ACCUMULATE) memset(g.wpe, 0, (size_t)cfg.maxT * C * sizeof(float));  // wte's begin in the head
        embedding_backward(g.wte, g.wpe, dresid, tokens_, b_, t_, C, drop(rng::EMB_DROPOUT, 0), pass_.seq0 * t_ * C);
    }

    // The batch's embeddings. While the update of wte is put off its rows are copied to `rows` (M,C), and updated there.
    void embed(float* out, float* rows, size_t M) {
        constexpr size_t PIECE = 256;
        size_t C = cfg.C;
        if (put_off_) {
#pragma omp parallel for schedule(static)
            for (size_t m = 0; m < M; m++)
                for (size_t c = 0; c < C; c += PIECE) {
                    float m1[PIECE], m2[PIECE];
                    UpdateBeside u = stretches(WTE, (size_t)tokens_[m] * C + c, std::min(PIECE, C - c));
                    auto copy = [&](float*& from, float* to) { memcpy(to, from, u.n[0] * sizeof(float)), from = to; };
                    copy(u.w[0], rows + m * C + c), copy(u.m[0], m1), copy(u.v[0], m2);
                    u(0, u.n[0]);
                }
        }
        embedding_forward(out, put_off_ ? nullptr : tokens_, put_off_ ? rows : p.wte, p.wpe, b_, t_, C, drop(rng::EMB_DROPOUT, 0), pass_.seq0 * t_ * C);
    }

    // Block l from its ln1 up to the GELU.
    template <class P>
    void block_forward(size_t l) {
        using A = Stored<P>;
        Block<A> a = block<A>(l);
        size_t C = cfg.C, M = b_ * t_;
        int activation = cfg.activation;
        float* branch = tensors<A>().act.branch;
        matmul_forward<P>(a.qkv, a.ln1, p.qkvw + l * 3 * C * C, p.qkvb + l * 3 * C, M, C, 3 * C, gemm::NoEpilogue(), beside(QKVW, l));
        attention().template forward<P>(a.atty, a.lse, a.qkv, drop(rng::ATT_DROPOUT, l), pass_.seq0, att_scratch_);
        matmul_forward<P>(branch, a.atty, p.attprojw + l * C * C, p.attprojb + l * C, M, C, C, gemm::NoEpilogue(), beside(ATTPROJW, l));
        residual_layernorm_forward(a.resid2, a.ln2, a.ln2_mean, a.ln2_rstd, a.skip ? a.skip : a.resid, branch,
                                   p.ln2w + l * C, p.ln2b + l * C, M, C, drop(rng::ATTPROJ_DROPOUT, l), pass_.seq0 * t_ * C, cfg.eps);
        matmul_forward<P>(a.fch, a.ln2, p.fcw + l * 4 * C * C, p.fcb + l * 4 * C, M, C, 4 * C,
                       [=](size_t m, size_t n, size_t count, float* c) { gelu_forward(a.fch_gelu + m * 4 * C + n, c, count, activation); },
                       beside(FCW, l), gemm::Touched(a.fch_gelu, 4 * C));
    }

    // The gradient of a residual branch's output: dresid under its dropout mask, made in dbranch.
    const float* masked(float* dbranch, const float* dresid, rng::Stream site, size_t layer) {
        Dropout d = drop(site, layer);
        if (d.p == 0) return dresid;
        size_t C = cfg.C, M = b_ * t_;
#pragma omp parallel for schedule(static)
        for (size_t m = 0; m < M; m++) d.apply(dbranch + m * C, dresid + m * C, (pass_.seq0 * t_ + m) * C, C);
        return dbranch;
    }

    // Output layer and loss, a chunk of rows at a time so that the logits of the whole batch never exist at once.
    // In training also dln = dlogits wte and dwte += dlogits^T lnf.
    template <class P>
    double head(const int* targets, size_t M) {
        using A = Stored<P>;
        const auto& [act, grad] = tensors<A>();
        size_t C = cfg.C, V = cfg.V, ld = gemm::round_up(V, 16), ldg = ld * sizeof(float) / sizeof(A), R = head_rows(cfg, M);
        const A* dlogits = (const A*)logits_;
        for (size_t m = 0; m < M; m += R) {
            size_t n = std::min(R, M - m);
            const A* x = act.lnf + m * C;
            gemm::multiply<P>(n, V, C, x, C, 1, p.wte, 1, C, logits_, ld);
            cross_entropy<A>(act.losses + m, logits_, ld, targets + m, n, V, pass_.train ? pass_.grad_scale : 0.0f);
            if (!pass_.train) continue;
            gemm::multiply<P>(V, C, n, dlogits, 1, ldg, x, C, 1, g.wte, C, fresh_ && !m ? gemm::FOR_LATER : gemm::ACCUMULATE);
            gemm::multiply<P>(n, C, V, dlogits, ldg, 1, p.wte, C, 1, grad.dln + m * C, C);
        }
        double sum = 0;
        counted_ = 0;
        for (size_t m = 0; m < M; m++) sum += act.losses[m], counted_ += targets[m] >= 0;
        return counted_ ? sum / (double)counted_ : 0;
    }

    MemoryNeed need_;
    gemm::bf16* half_mem_ = nullptr;
    float *params_mem_ = nullptr, *grads_mem_ = nullptr, *moments_ = nullptr, *acts_mem_ = nullptr, *scratch_ = nullptr;
    float *logits_ = nullptr, *att_scratch_ = nullptr;
    int scratch_threads_ = 0;
    std::tuple<Tensors<float>, Tensors<gemm::bf16>> tensors_{};  // those of the model's precision are in use
    Pass pass_;
    double step_loss_ = 0;
    const int* tokens_ = nullptr;
    size_t b_ = 0, t_ = 0, counted_ = 0;
    std::vector<double> squares_;  // of the gradients, summed: see squares()
    bool squared_ = false;         // those of the blocks' matrices are up to date
    // All gradients count as zero, whatever stands in memory: the next backward pass overwrites them.
    bool fresh_ = false;
    // Part of the last update is still to be done: with this step and this decay.
    bool put_off_ = false;
    AdamWStep step_{};
    float decay_ = 0;
};

// ---------------------------------------------------------------------------------------------
// Generation: keys and values of past tokens are kept, so that a new token costs the same each time.

class Decoder {
  public:
    // N sequences side by side, contexts of up to `context` tokens (at most maxT).
    Decoder(GPT2& model, size_t N, size_t context)
        : m_(model), N_(N), T_(std::min<size_t>(context, model.cfg.maxT)), rows_(N * CHUNK) {
        Arena a;
        place(a);
        bytes_ = a.used * 4;
        if (size_t have = GPT2::memory_available(); bytes_ > have)
            fail("%zu texts side by side need %s of memory for keys and values, %s are free; write fewer at once", N,
                 human_bytes((double)bytes_).c_str(), human_bytes((double)have).c_str());
        mem_ = (float*)gemm::allocate(bytes_, "key/value cache");
        a = Arena{mem_, 0};
        place(a);
    }
    ~Decoder() { gemm::release(mem_, bytes_); }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    size_t length() const { return pos_; }
    size_t capacity() const { return T_; }
    void reset() { pos_ = 0; }

    // Appends n tokens to each sequence, tokens (N,n); returns the logits (N,V) that follow the last one.
    const float* append(const int* tokens, size_t n) {
        if (pos_ + n > T_) throw std::logic_error("decoder: context is full");
        if (omp_get_max_threads() > threads_) throw std::logic_error("decoder: more threads than it was built for");
        m_.finish_update();
        for (size_t i = 0; i < n; i += CHUNK) {
            size_t count = std::min(CHUNK, n - i);
            bool last = i + CHUNK >= n;
            if (m_.half.wte) run(m_.half, tokens + i, n, count, last);
            else run(m_.p, tokens + i, n, count, last);
        }
        return logits_;
    }

  private:
    static constexpr size_t CHUNK = 64;

    void place(Arena& a) {
        const Config& c = m_.cfg;
        size_t C = c.C;
        cache_ = a.take(key_value_bytes(c, N_, T_) / sizeof(float));
        x_ = a.take(rows_, C), ln_ = a.take(rows_, C), qkv_ = a.take(rows_, 3 * C), att_ = a.take(rows_, C), br_ = a.take(rows_, C);
        fc_ = a.take(rows_, 4 * C), stat_ = a.take(rows_, 2), scores_ = a.take((size_t)threads_, T_);
        logits_ = a.take(N_, c.V), last_ = a.take(N_, C);
        w_ = a.take(C), b_ = a.take(4 * C), units_ = a.take(m_.half.wte ? N_ : 0, 4 * C);
    }
    // One token a sequence is bound by reading W; and the number of sequences must not change a sequence's sums. With weights
    // in bf16 X is rounded too, as in training.
    template <class W>
    void matmul(float* Y, const float* X, const W* w, const float* b, size_t M, size_t K, size_t N, bool one_token) {
        using P = std::conditional_t<std::is_same<W, float>::value, gemm::F32, gemm::BF16>;
        if (!one_token) return matmul_forward<P>(Y, X, w, b, M, K, N);
        if (m_.half.wte) gemm::to_units<P>(units_, X, M, K), X = units_;
        gemm::multiply_few<P>(M, N, K, X, w, Y, N, b);
    }
    static float value(float w) { return w; }
    static float value(gemm::bf16 w) { return bf16_to_float(w); }
    static const float* floats(const float* w, size_t, float*) { return w; }
    // A vector of n bf16 weights in floats, in buf.
    static const float* floats(const gemm::bf16* w, size_t n, float* buf) {
        for (size_t i = 0; i < n; i++) buf[i] = bf16_to_float(w[i]);
        return buf;
    }

    // Attention of each sequence's n new tokens to all so far, att_ (N_*n,C) from qkv_ (N_*n,3C). cache, of one layer, holds
    // keys (T_,hs), then values (T_,hs), of each sequence and head, so that both are read one line after the other.
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
                float *s = scores_ + (size_t)omp_get_thread_num() * T_, *o = att_ + r * C + h * hs, max = -INFINITY, sum = 0;
                gemm::few_rows<gemm::F32>(1, len, hs, q, k, s, 0, nullptr);
#pragma omp simd reduction(max : max)
                for (size_t j = 0; j < len; j++) max = s[j] > max ? s[j] : max;
                for (size_t j = 0; j < len; j += gemm::VL) gemm::store(s + j, exp_approx((gemm::load(s + j, len - j) - max) * scale), len - j);
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
    void run(const ParamsOf<W>& p, const int* tokens, size_t stride, size_t n, bool want_logits) {
        const Config& c = m_.cfg;
        size_t C = c.C, M = N_ * n;
        float *mean = stat_, *rstd = stat_ + M;
        for (size_t r = 0; r < M; r++)
            for (size_t i = 0; i < C; i++)
                x_[r * C + i] = value(p.wte[(size_t)tokens[r / n * stride + r % n] * C + i]) + value(p.wpe[(pos_ + r % n) * C + i]);
        for (size_t l = 0; l < (size_t)c.L; l++) {
            layernorm_forward(ln_, mean, rstd, x_, floats(p.ln1w + l * C, C, w_), floats(p.ln1b + l * C, C, b_), M, C, c.eps,
                              c.arch == GROVER_ARCH ? x_ : nullptr);
            matmul(qkv_, ln_, p.qkvw + l * 3 * C * C, floats(p.qkvb + l * 3 * C, 3 * C, b_), M, C, 3 * C, n == 1);
            attend(cache_ + l * N_ * T_ * 2 * C, n);
            matmul(br_, att_, p.attprojw + l * C * C, floats(p.attprojb + l * C, C, b_), M, C, C, n == 1);
            residual_layernorm_forward(x_, ln_, mean, rstd, x_, br_, floats(p.ln2w + l * C, C, w_), floats(p.ln2b + l * C, C, b_), M, C, Dropout(), 0, c.eps);
            matmul(fc_, ln_, p.fcw + l * 4 * C * C, floats(p.fcb + l * 4 * C, 4 * C, b_), M, C, 4 * C, n == 1);
#pragma omp parallel for schedule(static)
            for (size_t r = 0; r < M; r++) gelu_forward(fc_ + r * 4 * C, fc_ + r * 4 * C, 4 * C, c.activation);
            matmul(br_, fc_, p.fcprojw + l * 4 * C * C, floats(p.fcprojb + l * C, C, b_), M, 4 * C, C, n == 1);
            for (size_t i = 0; i < M * C; i++) x_[i] += br_[i];
        }
        pos_ += n;
        if (!want_logits) return;
        for (size_t s = 0; s < N_; s++) memcpy(last_ + s * C, x_ + (s * n + n - 1) * C, C * sizeof(float));
        layernorm_forward(ln_, mean, rstd, last_, floats(p.lnfw, C, w_), floats(p.lnfb, C, b_), N_, C, c.eps);
        matmul(logits_, ln_, p.wte, nullptr, N_, C, c.V, true);
    }

    GPT2& m_;
    size_t N_, T_, rows_, pos_ = 0, bytes_ = 0;
    int threads_ = omp_get_max_threads();
    float *mem_, *cache_, *x_, *ln_, *qkv_, *att_, *br_, *fc_, *stat_, *scores_, *logits_, *last_, *w_, *b_, *units_;
};

}  // namespace cpu

#ifndef ARAPOET_NO_MAIN
#include "trainer.h"
int main(int argc, char** argv) {
    gemm::spin_less(argv);
    return train<cpu::GPT2, cpu::Decoder>(argc, argv);
}
#endif
#endif  // TRAIN_GPT2_CPP
