// decoder.h - generates text on the CPU. The keys and values of past tokens are kept in a cache, so that a
// new token passes through the model alone, instead of the whole text once more for each token.
//
// This is the model's forward pass as in train_gpt2.cpp, for a few rows at a time and without what training
// keeps for backward. With one sequence, nearly all the time is spent reading the weights from memory.
#pragma once

#include "lib/gemm.h"
#include "lib/memory.h"
#include "lib/sampler.h"
#include "lib/vec.h"

namespace cpu {

using simd::bf16;
using simd::exp_approx;
using simd::load;
using simd::store;
using simd::VL;

class Decoder final : public ::Decoder {
  public:
    // N sequences at once, contexts of up to `context` tokens (at most maxT).
    Decoder(const States& model, size_t N, size_t context)
        : m_(model), N_(N), T_(std::min<size_t>(context, model.cfg.maxT)), rows_(N * CHUNK), length_(N) {
        Arena count, placed;
        place(count);
        if (size_t have = machine::memory_available(); count.used > have)
            fail("%zu texts need %s of memory, %s are free; write fewer at once", N,
                 human_bytes((double)count.used).c_str(), human_bytes((double)have).c_str());
        memory_ = {count.used, "key/value cache"}, placed.base = memory_.as<char>();
        memset(placed.base, 0, count.used);  // taken now, so that the next decoder sees what is left
        place(placed);
    }
    // The same with a model that the decoder owns.
    Decoder(std::shared_ptr<const States> model, size_t N, size_t context) : Decoder(*model, N, context) {
        owned_ = std::move(model);
    }

    size_t sequences() const override { return N_; }
    size_t capacity() const override { return T_; }
    size_t length(size_t s = 0) const override { return length_[s]; }
    void truncate(size_t s, size_t length) override { length_[s] = std::min(length_[s], length); }

    // A long prompt is processed in chunks, which bounds the memory for activations. A sequence's logits have
    // the same bits whatever the other sequences are.
    const float* append(const std::vector<size_t>& which, const int* tokens, size_t n) override {
        for (size_t s : which)
            if (length_[s] + n > T_) throw std::logic_error("decoder: context is full");
        if (omp_get_max_threads() > threads_)
            throw std::logic_error("decoder: more threads than it was built for");
        for (size_t i = 0; i < n; i += CHUNK) {
            size_t count = std::min(CHUNK, n - i);
            bool last = i + CHUNK >= n;
            if (m_.params_bf16.wte) run(m_.params_bf16, which, tokens + i, n, count, last);
            else run(m_.params, which, tokens + i, n, count, last);
        }
        return logits_;
    }

  private:
    static constexpr size_t CHUNK = 64;  // tokens

    void place(Arena& a) {
        const Config& c = m_.cfg;
        size_t C = c.C;
        cache_ = a.take<float>(key_value_bytes(c, N_, T_) / sizeof(float));
        x_ = a.take<float>(rows_, C), ln_ = a.take<float>(rows_, C), qkv_ = a.take<float>(rows_, 3 * C),
        att_ = a.take<float>(rows_, C), br_ = a.take<float>(rows_, C);
        fc_ = a.take<float>(rows_, 4 * C), scores_ = a.take<float>((size_t)threads_, T_);
        logits_ = a.take<float>(N_, c.V), last_ = a.take<float>(N_, C);
        w_ = a.take<float>(C), b_ = a.take<float>(4 * C);
    }
    // Y = X w^T + b. few_rows reads w from memory only once. It sums in another order than forward, so the
    // choice must not depend on the number of sequences: each must get the same bits whatever the others are.
    template <class W>
    static void matmul(float* Y, const float* X, const W* w, const float* b, size_t M, size_t K, size_t N,
                       bool one_token) {
        if (one_token) gemm::few_rows(Y, X, w, b, M, K, N);
        else gemm::forward(Y, X, w, b, M, K, N);
    }
    // A vector of n weights in floats; bf16 weights are converted into buf.
    static const float* floats(const float* w, size_t, float*) { return w; }
    static const float* floats(const bf16* w, size_t n, float* buf) {
        for (size_t i = 0; i < n; i++) buf[i] = bf16_to_float(w[i]);
        return buf;
    }

    // ln_ = LayerNorm(x), M rows; copy, or null, also receives it, and may be x.
    template <class W>
    void norm(const float* x, const W* w, const W* b, size_t M, float* copy = nullptr) {
        const size_t C = m_.cfg.C;
        const float *wf = floats(w, C, w_), *bf = floats(b, C, b_);
#pragma omp parallel for schedule(static)
        for (size_t m = 0; m < M; m++) {
            float mean, rstd;
            simd::layernorm(ln_ + m * C, &mean, &rstd, x + m * C, wf, bf, C, m_.cfg.eps,
                            copy ? copy + m * C : nullptr);
        }
    }
    // x = gelu(x), n values
    void gelu(float* x, size_t n) const {
        constexpr size_t BLOCK = 1024;
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i += BLOCK)
            simd::gelu_forward(x + i, x + i, std::min(BLOCK, n - i), m_.cfg.activation);
    }
    // Attention of the n new tokens of each of the sequences `which` to all tokens so far, att_
    // (which.size()*n,C) from qkv_ (which.size()*n,3C). cache, of one layer, holds for each sequence and head
    // the keys (T_,hs), then the values (T_,hs), so that both are read from memory in order.
    void attend(float* cache, const std::vector<size_t>& which, size_t n) {
        size_t C = m_.cfg.C, NH = m_.cfg.NH, hs = m_.cfg.hs(), rows = which.size() * n * NH;
        float scale = 1.0f / std::sqrt((float)hs);
        auto keys = [&](size_t r, size_t h) { return cache + (which[r / n] * NH + h) * 2 * T_ * hs; };
        auto position = [&](size_t r) { return length_[which[r / n]] + r % n; };
#pragma omp parallel
        {
#pragma omp for schedule(static)
            for (size_t rh = 0; rh < rows; rh++) {
                size_t r = rh / NH, h = rh % NH;
                const float* k = qkv_ + r * 3 * C + C + h * hs;
                float* to = keys(r, h) + position(r) * hs;
                memcpy(to, k, hs * sizeof(float)), memcpy(to + T_ * hs, k + C, hs * sizeof(float));
            }
#pragma omp for schedule(static)
            for (size_t rh = 0; rh < rows; rh++) {
                size_t r = rh / NH, h = rh % NH, len = position(r) + 1;
                const float *q = qkv_ + r * 3 * C + h * hs, *k = keys(r, h), *v = k + T_ * hs;
                float *s = scores_ + (size_t)omp_get_thread_num() * T_, *o = att_ + r * C + h * hs, sum = 0;
                gemm::few_rows(s, q, k, nullptr, 1, hs, len);
                float max = simd::max(s, len);
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

    // One chunk: the first n of the `stride` tokens of each of the sequences `which`.
    template <class W>
    void run(const Params<W>& params, const std::vector<size_t>& which, const int* tokens, size_t stride,
             size_t n, bool want_logits) {
        const Config& c = m_.cfg;
        size_t C = c.C, N = which.size(), M = N * n;
        for (size_t r = 0; r < M; r++) {
            const W *e = params.wte + tokens[r / n * stride + r % n] * C,
                    *p = params.wpe + (length_[which[r / n]] + r % n) * C;
            for (size_t i = 0; i < C; i += VL)
                store(x_ + r * C + i, load(e + i, C - i) + load(p + i, C - i), C - i);
        }
        for (size_t l = 0; l < (size_t)c.L; l++) {
            Layer<W> p = params.layer(l);
            norm(x_, p.ln1w, p.ln1b, M, c.arch == GROVER_ARCH ? x_ : nullptr);
            matmul(qkv_, ln_, p.qkvw, floats(p.qkvb, 3 * C, b_), M, C, 3 * C, n == 1);
            attend(cache_ + l * N_ * T_ * 2 * C, which, n);
            matmul(br_, att_, p.attprojw, floats(p.attprojb, C, b_), M, C, C, n == 1);
            for (size_t i = 0; i < M * C; i++) x_[i] += br_[i];
            norm(x_, p.ln2w, p.ln2b, M);
            matmul(fc_, ln_, p.fcw, floats(p.fcb, 4 * C, b_), M, C, 4 * C, n == 1);
            gelu(fc_, M * 4 * C);
            matmul(br_, fc_, p.fcprojw, floats(p.fcprojb, C, b_), M, 4 * C, C, n == 1);
            for (size_t i = 0; i < M * C; i++) x_[i] += br_[i];
        }
        for (size_t s : which) length_[s] += n;
        if (!want_logits) return;
        for (size_t k = 0; k < N; k++) memcpy(last_ + k * C, x_ + (k * n + n - 1) * C, C * sizeof(float));
        norm(last_, params.lnfw, params.lnfb, N);
        matmul(logits_, ln_, params.wte, nullptr, N, C, c.V, true);
    }

    std::shared_ptr<const States> owned_;
    const States& m_;
    size_t N_, T_, rows_;
    std::vector<size_t> length_;  // of each sequence, in tokens
    int threads_ = omp_get_max_threads();
    machine::Memory memory_;
    float *cache_, *x_, *ln_, *qkv_, *att_, *br_, *fc_, *scores_, *logits_, *last_, *w_, *b_;
};

}  // namespace cpu
