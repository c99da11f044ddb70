// ladder.cpp - from a bigram table to GPT-2's block in eight steps, the rungs of a ladder. "The post" is the
// blog post whose experiments this repeats (README.md).
//
// Each row of RUNGS adds one idea to the row before. forward() computes from the embedding to the logits;
// backward() has the same steps in reverse order. The layers are train_gpt2.cpp's. Added here are the bigram
// table and ReLU, which GPT-2 does not have, and code to leave out what a rung does not have yet. Rung 8 is
// the trainer itself (rung8.sh), rung 9 is fine-tuning (rung9.sh).
//
//     ./ladder --data out/data --rung 0-7 --seeds 3
//
// Sizes as in train_gpt2.cpp: B sequences of T tokens, M = B*T rows, C channels, vocabulary V; H = hidden * C
// is the width of the feed-forward layer.
#include <sys/wait.h>

#include <chrono>
#include <iterator>
#include <memory>

#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#define LADDER_MAIN
#endif
#include "train_gpt2.cpp"

#include "data/dataloader.h"
#include "lib/flags.h"
#include "lib/run_folder.h"
#include "lib/sampler.h"
#include "tokenizer/tokenizer.h"

namespace ladder {

// ---------------------------------------------------------------------------------------------
// The rungs

struct Rung {
    const char* name;             // what this rung adds
    int heads;                    // attention heads; 0: only the bigram table
    int blocks;                   // blocks of attention and feed-forward, one after the other
    int hidden;                   // width of the feed-forward layer in multiples of C; 0: none
    bool residual;                // each part's result is added to its input instead of replacing it
    bool projection;              // each part ends in a linear layer
    bool layernorm;               // before each part and at the end
    float dropout;                // of the attention weights and of each part's result
    double post_train, post_val;  // the post's losses, on another corpus; 0: not given
};

constexpr Rung RUNGS[] = {
    //                                             heads blocks hidden residual projection layernorm dropout
    {"bigram table", 0, 0, 0, false, false, false, 0, 0, 0},
    {"one self-attention head, with positions", 1, 1, 0, false, false, false, 0, 2.5016, 2.5338},
    {"four smaller heads", 4, 1, 0, false, false, false, 0, 2.4182, 2.4449},
    {"feed-forward: linear and ReLU", 4, 1, 1, false, false, false, 0, 2.3751, 2.3793},
    {"three blocks of both", 4, 3, 1, false, false, false, 0, 2.3979, 2.4063},
    {"residual connections, with projections", 4, 3, 4, true, true, false, 0, 2.2219, 2.1991},
    {"LayerNorm before each part and at the end", 4, 3, 4, true, true, true, 0, 2.2129, 2.2015},
    {"dropout 0.2", 4, 3, 4, true, true, true, 0.2f, 2.3565, 2.3654},
};
constexpr int NUM_RUNGS = (int)std::size(RUNGS);

// ---------------------------------------------------------------------------------------------
// What GPT-2 does not have

// logits (M,V) = the table's row of each token: a prediction of the next token from this one alone.
inline void bigram_forward(float* logits, const int* tokens, const float* table, size_t M, size_t V) {
    for (size_t m = 0; m < M; m++) memcpy(logits + m * V, table + (size_t)tokens[m] * V, V * sizeof(float));
}
// Adds to each row of dtable (V,V) the gradients dlogits (M,V) of the tokens that read it.
inline void bigram_backward(float* dtable, const float* dlogits, const int* tokens, size_t M, size_t V) {
    for (size_t m = 0; m < M; m++)
        for (size_t v = 0; v < V; v++) dtable[(size_t)tokens[m] * V + v] += dlogits[m * V + v];
}

// y = max(y, 0), n values.
inline void relu_forward(float* y, size_t n) {
    for (size_t i = 0; i < n; i++) y[i] = y[i] > 0 ? y[i] : 0;
}
// Sets the gradient d to 0 wherever ReLU's output y is 0, n values.
inline void relu_backward(float* d, const float* y, size_t n) {
    for (size_t i = 0; i < n; i++) d[i] = y[i] > 0 ? d[i] : 0;
}

// ---------------------------------------------------------------------------------------------
// The model

struct Weights {
    float *table, *wte, *wpe, *ln1w, *ln1b, *qkvw, *qkvb, *projw, *projb, *ln2w, *ln2b, *fcw, *fcb, *fcprojw,
        *fcprojb, *lnfw, *lnfb, *headw, *headb;
};

// A parameter tensor: the matrices (out, in) of all blocks, one after the other. The initialisation is
// PyTorch's default, as in the post: embeddings are standard normal, a linear layer's weight and bias are
// uniform in -1/sqrt(in) to 1/sqrt(in).
struct Tensor {
    enum Init { NORMAL, UNIFORM, ONES, ZEROS };
    const char* name;
    float* Weights::*at;
    size_t blocks, rows, cols;
    Init init;
    size_t in = 0;  // inputs of the linear layer; 0 for other tensors
    size_t size() const { return blocks * rows * cols; }
};

// The tensors that a rung has, in order.
inline std::vector<Tensor> tensors(const Rung& r, size_t V, size_t C, size_t T) {
    if (!r.heads) return {{"table", &Weights::table, 1, V, V, Tensor::NORMAL}};
    size_t L = (size_t)r.blocks, H = (size_t)r.hidden * C;
    std::vector<Tensor> list = {{"wte", &Weights::wte, 1, V, C, Tensor::NORMAL},
                                {"wpe", &Weights::wpe, 1, T, C, Tensor::NORMAL}};
    auto linear = [&](const char* w, float* Weights::*weight, const char* b, float* Weights::*bias,
                      size_t blocks, size_t out, size_t in) {
        list.push_back({w, weight, blocks, out, in, Tensor::UNIFORM, in}),
            list.push_back({b, bias, blocks, 1, out, Tensor::UNIFORM, in});
    };
    auto norm = [&](const char* w, float* Weights::*weight, const char* b, float* Weights::*bias,
                    size_t blocks) {
        list.push_back({w, weight, blocks, 1, C, Tensor::ONES}),
            list.push_back({b, bias, blocks, 1, C, Tensor::ZEROS});
    };
    if (r.layernorm) norm("ln1w", &Weights::ln1w, "ln1b", &Weights::ln1b, L);
    linear("qkvw", &Weights::qkvw, "qkvb", &Weights::qkvb, L, 3 * C, C);
    if (r.projection) linear("projw", &Weights::projw, "projb", &Weights::projb, L, C, C);
    if (r.hidden && r.layernorm) norm("ln2w", &Weights::ln2w, "ln2b", &Weights::ln2b, L);
    if (r.hidden) linear("fcw", &Weights::fcw, "fcb", &Weights::fcb, L, H, C);
    if (r.hidden && r.projection) linear("fcprojw", &Weights::fcprojw, "fcprojb", &Weights::fcprojb, L, C, H);
    if (r.layernorm) norm("lnfw", &Weights::lnfw, "lnfb", &Weights::lnfb, 1);
    linear("headw", &Weights::headw, "headb", &Weights::headb, 1, V, C);
    return list;
}

// The gradients of a linear layer Y (M,N) = X (M,K) W^T + b. Writes dX (M,K); adds to dW (N,K) and db (N).
inline void linear_backward(float* dX, float* dW, float* db, const float* dY, const float* X, const float* W,
                            size_t M, size_t K, size_t N) {
    gemm::weight_gradient(dW, db, dY, X, M, K, N, true);
    gemm::input_gradient(dX, dY, W, M, K, N);
}

class Model {
  public:
    const Rung r;
    const size_t V, C, T, rows;  // T: the context; rows: the largest B*T
    const std::vector<Tensor> list;
    uint64_t seed = 1337;  // for weights and dropout

    Model(const Rung& rung, size_t V_, size_t C_, size_t T_, size_t B)
        : r(rung), V(V_), C(C_), T(T_), rows(B * T_), list(tensors(rung, V_, C_, T_)) {
        Arena counted, placed;
        place(counted);
        bytes_ = counted.used;
        placed.base = mem_ = (char*)machine::allocate(bytes_, "model");
        place(placed);
    }
    ~Model() { machine::release(mem_, bytes_); }
    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;

    size_t num_params() const {
        size_t n = 0;
        for (const Tensor& t : list) n += t.size();
        return n;
    }
    float* param(const Tensor& t) { return p_.*t.at; }
    float* grad(const Tensor& t) { return g_.*t.at; }

    void init_weights() {
        for (size_t k = 0; k < list.size(); k++) {
            const Tensor& t = list[k];
            rng::Key key(seed, 0, rng::INIT, (uint32_t)k);
            double bound = t.in ? 1 / std::sqrt((double)t.in) : 0;
            for (size_t i = 0; i < t.size(); i++)
                param(t)[i] = t.init == Tensor::NORMAL    ? (float)key.normal(i)
                              : t.init == Tensor::UNIFORM ? (float)((2 * key.uniform(i) - 1) * bound)
                                                          : (float)(t.init == Tensor::ONES);
        }
    }

    // Logits (B*T,V) of tokens (B,T); T_ may be shorter than the context.
    const float* logits(const int* tokens, size_t B, size_t T_, const Pass& pass = {}) {
        size_t M = B * T_, H = hidden();
        B_ = B, t_ = T_, tokens_ = tokens, pass_ = pass;
        if (!r.heads) return bigram_forward(logits_, tokens, p_.table, M, V), logits_;

        cpu::embedding_forward(x_, tokens, p_.wte, p_.wpe, B, T_, C, {}, 0);
        for (size_t l = 0; l < (size_t)r.blocks; l++) {
            Block a = block(l);
            const float* in = normed(a.ln1, a.mean1, a.rstd1, a.x, p_.ln1w, p_.ln1b, l);
            gemm::forward(a.qkv, in, p_.qkvw + l * 3 * C * C, p_.qkvb + l * 3 * C, M, C, 3 * C);
            attention().forward(a.att, a.lse, a.qkv, drop(rng::ATT_DROPOUT, l), 0, scratch_);
            const float* result = a.att;
            if (r.projection)
                gemm::forward(result_, a.att, p_.projw + l * C * C, p_.projb + l * C, M, C, C),
                    result = result_;
            join_forward(a.mid, a.x, result, drop(rng::ATTPROJ_DROPOUT, l));
            if (!r.hidden) continue;

            in = normed(a.ln2, a.mean2, a.rstd2, a.mid, p_.ln2w, p_.ln2b, l);
            gemm::forward(a.fc, in, p_.fcw + l * H * C, p_.fcb + l * H, M, C, H);
            relu_forward(a.fc, M * H);
            result = a.fc;
            if (r.projection)
                gemm::forward(result_, a.fc, p_.fcprojw + l * C * H, p_.fcprojb + l * C, M, H, C),
                    result = result_;
            join_forward(a.out, a.mid, result, drop(rng::FCPROJ_DROPOUT, l));
        }
        const float* in = normed(lnf_, meanf_, rstdf_, last(), p_.lnfw, p_.lnfb, 0);
        gemm::forward(logits_, in, p_.headw, p_.headb, M, C, V);
        return logits_;
    }

    // The mean loss in nats. In a training pass it replaces the logits by the loss's gradient, with
    // which backward() starts.
    double forward(const int* tokens, const int* targets, size_t B, size_t T_, const Pass& pass) {
        logits(tokens, B, T_, pass);
        cpu::cross_entropy(losses_, logits_, V, targets, B * T_, V,
                           pass.train ? 1.0f / (float)(B * T_) : 0.0f);
        double sum = 0;
        for (size_t m = 0; m < B * T_; m++) sum += losses_[m];
        return sum / (double)(B * T_);
    }

    // Adds the gradients of the last forward() to grad(). A part is an attention or feed-forward layer. d_ is
    // the gradient of a part's output and then of its input, from the last part back to the embedding; dread_
    // is the gradient of what the part reads, which from rung 6 on is its LayerNorm's output.
    void backward() {
        size_t M = B_ * t_, H = hidden();
        if (!r.heads) return bigram_backward(g_.table, logits_, tokens_, M, V);

        linear_backward(r.layernorm ? dread_ : d_, g_.headw, g_.headb, logits_, r.layernorm ? lnf_ : last(),
                        p_.headw, M, C, V);
        if (r.layernorm)
            cpu::layernorm_backward(d_, nullptr, g_.lnfw, g_.lnfb, dread_, last(), meanf_, rstdf_, p_.lnfw, M,
                                    C, false);
        for (size_t l = (size_t)r.blocks; l-- > 0;) {
            Block a = block(l);
            if (r.hidden) {
                const float* dresult = masked(d_, drop(rng::FCPROJ_DROPOUT, l));
                if (r.projection)
                    linear_backward(dfc_, g_.fcprojw + l * C * H, g_.fcprojb + l * C, dresult, a.fc,
                                    p_.fcprojw + l * C * H, M, H, C);
                else memcpy(dfc_, dresult, M * H * sizeof(float));
                relu_backward(dfc_, a.fc, M * H);
                linear_backward(dread_, g_.fcw + l * H * C, g_.fcb + l * H, dfc_, r.layernorm ? a.ln2 : a.mid,
                                p_.fcw + l * H * C, M, C, H);
                join_backward(g_.ln2w, g_.ln2b, a.mid, a.mean2, a.rstd2, p_.ln2w, l);
            }
            const float* dresult = masked(d_, drop(rng::ATTPROJ_DROPOUT, l));
            if (r.projection)
                linear_backward(datt_, g_.projw + l * C * C, g_.projb + l * C, dresult, a.att,
                                p_.projw + l * C * C, M, C, C),
                    dresult = datt_;
            attention().backward(dqkv_, dresult, a.att, a.qkv, a.lse, drop(rng::ATT_DROPOUT, l), 0, scratch_);
            linear_backward(dread_, g_.qkvw + l * 3 * C * C, g_.qkvb + l * 3 * C, dqkv_,
                            r.layernorm ? a.ln1 : a.x, p_.qkvw + l * 3 * C * C, M, C, 3 * C);
            join_backward(g_.ln1w, g_.ln1b, a.x, a.mean1, a.rstd1, p_.ln1w, l);
        }
        cpu::embedding_backward(g_.wte, g_.wpe, d_, tokens_, B_, t_, C, {}, 0);
    }

    // Step t = 1, 2, ... of AdamW. All tensors decay, as by PyTorch's default, which the post used. Sets the
    // gradients to zero.
    void update(const StepSettings& a, uint32_t t) {
        float c1 = (float)(1 / (1 - std::pow((double)a.beta1, t))),
              c2 = (float)(1 / (1 - std::pow((double)a.beta2, t)));
        float b1 = a.beta1, b2 = a.beta2, lr = a.lr, eps = a.eps, shrink = 1 - a.lr * a.weight_decay;
        float *w = params_, *d = grads_, *m = moments_, *v = moments_ + params_size_;
#pragma omp simd
        for (size_t i = 0; i < params_size_; i++) {
            m[i] = b1 * m[i] + (1 - b1) * d[i];
            v[i] = b2 * v[i] + (1 - b2) * d[i] * d[i];
            w[i] = w[i] * shrink - lr * (m[i] * c1) / (std::sqrt(v[i] * c2) + eps);
            d[i] = 0;
        }
    }

  private:
    // A block's activations, which forward() keeps for backward().
    struct Block {
        float *x, *ln1, *mean1, *rstd1, *qkv, *lse, *att, *mid, *ln2, *mean2, *rstd2, *fc, *out;
    };

    // Takes all memory from the arena, which the constructor first uses to count the bytes.
    void place(Arena& a) {
        size_t L = (size_t)r.blocks, H = hidden(), M = rows;
        auto weights = [&](Weights& w) {
            size_t start = a.used;
            w = {};
            for (const Tensor& t : list) w.*t.at = a.take<float>(t.size());
            params_size_ = (a.used - start) / sizeof(float);
            return a.base ? (float*)(a.base + start) : nullptr;
        };
        params_ = weights(p_), grads_ = weights(g_), moments_ = a.take<float>(2, params_size_);
        logits_ = a.take<float>(M, V), losses_ = a.take<float>(M);
        if (!r.heads) return;
        x_ = a.take<float>(M, C), blocks_.resize(L);
        for (Block& b : blocks_) {
            b.x = &b == &blocks_[0] ? x_ : r.hidden ? (&b)[-1].out : (&b)[-1].mid;
            b.ln1 = a.take<float>(M, C), b.mean1 = a.take<float>(M), b.rstd1 = a.take<float>(M);
            b.qkv = a.take<float>(M, 3 * C), b.lse = a.take<float>(M, (size_t)r.heads),
            b.att = a.take<float>(M, C), b.mid = a.take<float>(M, C);
            b.ln2 = a.take<float>(M, C), b.mean2 = a.take<float>(M), b.rstd2 = a.take<float>(M),
            b.fc = a.take<float>(M, H), b.out = a.take<float>(M, C);
        }
        lnf_ = a.take<float>(M, C), meanf_ = a.take<float>(M), rstdf_ = a.take<float>(M),
        result_ = a.take<float>(M, C);
        d_ = a.take<float>(M, C), dread_ = a.take<float>(M, C), dmasked_ = a.take<float>(M, C),
        datt_ = a.take<float>(M, C), dqkv_ = a.take<float>(M, 3 * C), dfc_ = a.take<float>(M, H);
        scratch_ =
            a.take<float>((size_t)omp_get_max_threads(), cpu::Attention::scratch(T, C / (size_t)r.heads));
    }

    size_t hidden() const { return (size_t)r.hidden * C; }
    Block block(size_t l) const { return blocks_[l]; }
    const float* last() const { return r.hidden ? blocks_.back().out : blocks_.back().mid; }
    cpu::Attention attention() const { return {B_, t_, C, (size_t)r.heads}; }
    cpu::Dropout drop(rng::Stream site, size_t layer) const {
        return {pass_.train ? r.dropout : 0.0f, rng::Key(seed, pass_.step, site, (uint32_t)layer)};
    }

    // What a part reads: x, or from rung 6 on LayerNorm of x.
    const float* normed(float* y, float* mean, float* rstd, const float* x, const float* w, const float* b,
                        size_t l) {
        if (!r.layernorm) return x;
        cpu::layernorm_forward(y, mean, rstd, x, w + l * C, b + l * C, B_ * t_, C);
        return y;
    }
    // A part's output y: its result, with dropout from rung 7 on, plus its input x from rung 5 on.
    void join_forward(float* y, const float* x, const float* result, const cpu::Dropout& drop) {
        size_t n = B_ * t_ * C;
        if (drop.p > 0) drop.apply(y, result, 0, n);
        else memcpy(y, result, n * sizeof(float));
        if (r.residual)
            for (size_t i = 0; i < n; i++) y[i] += x[i];
    }
    // The gradient of a part's result before dropout: d under the dropout mask.
    const float* masked(const float* d, const cpu::Dropout& drop) {
        if (drop.p == 0) return d;
        drop.apply(dmasked_, d, 0, B_ * t_ * C);
        return dmasked_;
    }
    // Turns d_ from the gradient of a part's output into that of its input x: dread_, passed back through the
    // part's LayerNorm if it has one, replaces d_, or is added to it if there is a residual connection.
    void join_backward(float* dw, float* db, const float* x, const float* mean, const float* rstd,
                       const float* w, size_t l) {
        size_t M = B_ * t_;
        if (r.layernorm)
            return cpu::layernorm_backward(d_, nullptr, dw + l * C, db + l * C, dread_, x, mean, rstd,
                                           w + l * C, M, C, r.residual);
        for (size_t i = 0; i < M * C; i++) d_[i] = dread_[i] + (r.residual ? d_[i] : 0);
    }

    char* mem_ = nullptr;
    size_t bytes_ = 0, params_size_ = 0, B_ = 0, t_ = 0;
    Weights p_{}, g_{};
    float *params_ = nullptr, *grads_ = nullptr, *moments_ = nullptr, *logits_ = nullptr, *losses_ = nullptr;
    float *x_ = nullptr, *lnf_ = nullptr, *meanf_ = nullptr, *rstdf_ = nullptr, *result_ = nullptr;
    float *d_ = nullptr, *dread_ = nullptr, *dmasked_ = nullptr, *datt_ = nullptr, *dqkv_ = nullptr,
          *dfc_ = nullptr, *scratch_ = nullptr;
    std::vector<Block> blocks_;
    const int* tokens_ = nullptr;
    Pass pass_;
};

// Generates text with a model that sees the last T tokens. The window slides, so nothing can be cached: each
// token computes the whole window.
class Decoder final : public ::Decoder {
  public:
    explicit Decoder(Model& m) : m_(m) {}
    size_t sequences() const override { return 1; }
    size_t capacity() const override { return SIZE_MAX; }
    size_t length(size_t = 0) const override { return window_.size(); }
    void truncate(size_t, size_t length) override { window_.resize(length); }
    const float* append(const std::vector<size_t>&, const int* tokens, size_t n) override {
        window_.insert(window_.end(), tokens, tokens + n);
        if (window_.size() > m_.T) window_.erase(window_.begin(), window_.end() - (ptrdiff_t)m_.T);
        return m_.logits(window_.data(), 1, window_.size()) + (window_.size() - 1) * m_.V;
    }

  private:
    Model& m_;
    std::vector<int> window_;
};

// ---------------------------------------------------------------------------------------------
// Training, as in the post

struct Options {
    std::string data = "out/data", out = "out/ladder", rungs = "0-7";
    int steps = 5000, batch_size = 32, context = 8, channels = 32;
    float learning_rate = 1e-3f;
    uint64_t seed = 1337;
    int seeds = 1, jobs = 0, eval_every = 500, eval_batches = 200, poems = 5, poem_tokens = 300;
    float temperature = 0.8f;
    // Changes to the rungs; -1: as in RUNGS
    int heads = -1, blocks = -1, hidden = -1, residual = -1, projection = -1, layernorm = -1;
    float dropout = -1;
};

struct Data {
    TokenFile train, val;
    Tokenizer tokenizer;
    explicit Data(const std::string& dir)
        : train(dir + "/train.bin"),
          val(dir + "/val.bin"),
          tokenizer(Tokenizer::load(dir + "/tokenizer.bin")) {
        train.check_vocab(tokenizer.vocab_size()), val.check_vocab(tokenizer.vocab_size());
    }
};

// The rungs to run, from a list such as "5", "0-7" or "0,4-6".
inline std::vector<int> parse_rungs(const std::string& text) {
    auto bad = [&] {
        return UsageError(strf("--rung: '%s' is not valid, wanted rungs from 0 to %d, as in 5 or 0-7 or 4,5",
                               text.c_str(), NUM_RUNGS - 1));
    };
    std::vector<int> rungs;
    const char* s = text.c_str();
    do {
        int from, to, used = 0;
        if (sscanf(s, "%d%n", &from, &used) != 1) throw bad();
        s += used, to = from;
        if (*s == '-') {
            if (sscanf(++s, "%d%n", &to, &used) != 1) throw bad();
            s += used;
        }
        if (from == 8 || to == 8)
            throw UsageError("--rung: rung 8 is the trainer itself; dev/ladder/rung8.sh runs it");
        if (from == 9 || to == 9)
            throw UsageError("--rung: rung 9 is fine-tuning; dev/ladder/rung9.sh runs it");
        if (from < 0 || to >= NUM_RUNGS || from > to) throw bad();
        for (int k = from; k <= to; k++) rungs.push_back(k);
    } while (*s++ == ',');
    if (s[-1]) throw bad();
    return rungs;
}

// Rung k with the command line's changes, and these changes as text: "projection 0, hidden 1".
inline Rung rung_of(const Options& o, int k, std::string* changes = nullptr) {
    Rung r = RUNGS[k];
    std::string text;
    auto change = [&](const char* name, auto& field, double value) {
        if (value < 0 || !r.heads || (double)field == value) return;
        field = (std::decay_t<decltype(field)>)value;
        text += strf("%s%s %g", text.empty() ? "" : ", ", name, value);
    };
    change("heads", r.heads, o.heads), change("blocks", r.blocks, o.blocks),
        change("hidden", r.hidden, o.hidden);
    change("residual", r.residual, o.residual), change("projection", r.projection, o.projection);
    change("layernorm", r.layernorm, o.layernorm), change("dropout", r.dropout, o.dropout);
    if (changes) *changes = text;
    if (r.heads && o.channels % r.heads)
        throw UsageError(
            strf("--channels is %d, wanted a multiple of rung %d's %d heads", o.channels, k, r.heads));
    if (r.hidden > 1 && !r.projection)
        throw UsageError(
            strf("rung %d: a feed-forward layer %d times as wide needs --projection 1 to return to the "
                 "model's width, or --hidden 1",
                 k, r.hidden));
    return r;
}

// What a batch is used for. It selects the stream of random numbers, so that each use has its own batches.
enum Purpose : uint32_t { TRAINING = 1, TRAIN_LOSS, VAL_LOSS };

// B windows from random places of the file: inputs x (B,T), and targets y (B,T), the tokens after them.
inline void random_batch(const TokenFile& file, const rng::Key& key, size_t B, size_t T, int* x, int* y) {
    for (size_t b = 0; b < B; b++) {
        size_t at = (size_t)(key.uniform(b) * (double)(file.size() - T));
        for (size_t t = 0; t < T; t++) *x++ = file[at + t], *y++ = file[at + t + 1];
    }
}

// The post's estimate of a split's loss: the mean over random batches. With the same seed, all rungs see
// the same batches.
inline double estimate_loss(Model& m, const TokenFile& file, Purpose purpose, int step, const Options& o,
                            uint64_t seed, std::vector<int>& x, std::vector<int>& y) {
    double sum = 0;
    size_t B = (size_t)o.batch_size, T = (size_t)o.context;
    for (int i = 0; i < o.eval_batches; i++) {
        random_batch(file, rng::Key(seed + ((uint64_t)i << 32), (uint32_t)step, rng::SHUFFLE, purpose), B, T,
                     x.data(), y.data());
        sum += m.forward(x.data(), y.data(), B, T, {});
    }
    return sum / o.eval_batches;
}

// Trains for o.steps steps. Calls report(step, train loss, val loss) every o.eval_every steps and at the end.
template <class Report>
void train(Model& m, const Data& data, const Options& o, Report report) {
    size_t B = (size_t)o.batch_size, T = (size_t)o.context;
    std::vector<int> x(B * T), y(B * T);
    StepSettings adam;
    adam.lr = o.learning_rate, adam.beta2 = 0.999f, adam.weight_decay = 0.01f;  // PyTorch's defaults
    for (int step = 0;; step++) {
        if (step % o.eval_every == 0 || step == o.steps) {
            double on_train = estimate_loss(m, data.train, TRAIN_LOSS, step, o, m.seed, x, y);
            report(step, on_train, estimate_loss(m, data.val, VAL_LOSS, step, o, m.seed, x, y));
        }
        if (step == o.steps) return;
        random_batch(data.train, rng::Key(m.seed, (uint32_t)step, rng::SHUFFLE, TRAINING), B, T, x.data(),
                     y.data());
        Pass pass;
        pass.train = true, pass.step = (uint32_t)step;
        m.forward(x.data(), y.data(), B, T, pass);
        m.backward();
        m.update(adam, (uint32_t)step + 1);
    }
}

// Generates a poem of at most o.poem_tokens characters. It has no empty lines, because these separate the
// poems in a file.
inline std::string write_poem(Model& m, const Tokenizer& tokenizer, const Options& o, uint64_t seed) {
    Decoder decoder(m);
    SampleOptions so;
    so.temperature = o.temperature;
    std::string text;
    generate(decoder, 1, {tokenizer.eot()}, (int)m.V, tokenizer.eot(), o.poem_tokens, seed, so,
             [&](size_t, int token) {
                 if (tokenizer.bytes(token) != "\n" || (!text.empty() && text.back() != '\n'))
                     text += tokenizer.bytes(token);
             });
    if (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
}

// ---------------------------------------------------------------------------------------------
// Running many jobs. These networks are too small to be trained faster by several threads, so each run is a
// process with one thread, and as many run at the same time as there are cores.

struct Point {
    int step;
    double train, val;
};
struct Job {
    int rung;
    uint64_t seed;
};
// A run's result, in memory that the parent and the child process share.
struct Result {
    char error[512];  // empty if the run succeeded
    size_t params;
    double seconds;
    int points;
    Point curve[];  // has room for o.steps / o.eval_every + 2 points
    const Point& end() const { return curve[points - 1]; }
};

class Results {
  public:
    Results(size_t jobs, const Options& o)
        : stride_(round_up(sizeof(Result) + sizeof(Point) * ((size_t)(o.steps / o.eval_every) + 2), 64)),
          bytes_(checked_mul(jobs, stride_, "results")) {
        mem_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (mem_ == MAP_FAILED)
            fail("out of memory: %zu results need %s; a larger --eval_every needs less", jobs,
                 human_bytes((double)bytes_).c_str());
    }
    ~Results() { munmap(mem_, bytes_); }
    Results(const Results&) = delete;
    Results& operator=(const Results&) = delete;
    Result& operator[](size_t i) const { return *(Result*)((char*)mem_ + i * stride_); }

  private:
    size_t stride_, bytes_;
    void* mem_;
};

inline std::string poems_name(int rung) { return strf("rung%d_poems.txt", rung); }
inline std::string poems_path(const Options& o, int rung) { return o.out + "/" + poems_name(rung); }

// Trains one job in the current process. The first seed's job also writes poems, separated by blank lines.
inline void run_job(const Job& job, const Data& data, const Options& o, Result& result) {
    auto t0 = std::chrono::steady_clock::now();
    Model m(rung_of(o, job.rung), (size_t)data.tokenizer.vocab_size(), (size_t)o.channels, (size_t)o.context,
            (size_t)o.batch_size);
    m.seed = job.seed;
    m.init_weights();
    result.params = m.num_params();
    train(m, data, o, [&](int step, double on_train, double on_val) {
        result.curve[result.points++] = {step, on_train, on_val};
    });
    if (!std::isfinite(result.end().train))
        fail("rung %d: the loss is not a number; try a lower --learning_rate", job.rung);
    if (o.poems && job.seed == o.seed) {
        AtomicFile out(poems_path(o, job.rung));
        for (int i = 0; i < o.poems; i++)
            out.write((i ? "\n" : "") + write_poem(m, data.tokenizer, o, job.seed + (uint64_t)i) + "\n");
        out.commit();
    }
    result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - t0).count();
}

// Runs each job in a separate process and calls done(i) when job i has ended. Must be called before this
// process starts an OpenMP region, because the threads of one do not survive fork().
template <class Done>
void run_jobs(const std::vector<Job>& jobs, const Data& data, const Options& o, Results& results, Done done) {
    size_t most = o.jobs ? (size_t)o.jobs : (size_t)omp_get_num_procs(), next = 0, ended = 0;
    std::vector<pid_t> pids(jobs.size());
    fflush(stdout);
    while (ended < jobs.size()) {
        while (next < jobs.size() && next - ended < most) {
            pids[next] = fork();
            if (pids[next] < 0) fail("cannot start a process: %s", strerror(errno));
            if (pids[next] == 0) {
                omp_set_num_threads(1);
                try {
                    run_job(jobs[next], data, o, results[next]);
                } catch (const std::exception& e) {
                    snprintf(results[next].error, sizeof results[next].error, "%s", e.what());
                }
                _exit(0);
            }
            next++;
        }
        int status;
        pid_t pid = wait(&status);
        size_t i = (size_t)(std::find(pids.begin(), pids.end(), pid) - pids.begin());
        if (pid < 0 || i == pids.size()) continue;
        ended++;
        if (!WIFEXITED(status))
            snprintf(results[i].error, sizeof results[i].error, "rung %d, seed %llu: ended by signal %d",
                     jobs[i].rung, (unsigned long long)jobs[i].seed, WTERMSIG(status));
        done(i);
    }
    for (size_t i = 0; i < jobs.size(); i++)
        if (results[i].error[0]) fail("%s", results[i].error);
}

// ---------------------------------------------------------------------------------------------
// The table

// The mean and the standard deviation over the seeds (0 for a single one).
struct Spread {
    double mean = 0, sd = 0;
    explicit Spread(const std::vector<double>& x) {
        for (double v : x) mean += v / (double)x.size();
        for (double v : x) sd += (v - mean) * (v - mean);
        sd = x.size() > 1 ? std::sqrt(sd / (double)(x.size() - 1)) : 0;
    }
    std::string text() const { return sd > 0 ? strf("%.4f ± %.4f", mean, sd) : strf("%.4f", mean); }
};

// Returns the table of all rungs in Markdown. Writes it to ladder.md, and losses.csv and curves.csv for the
// plots. The jobs are in the order of the rungs, o.seeds for each.
inline std::string tabulate(const std::vector<Job>& jobs, const Results& results, const Options& o) {
    std::string table = strf(
        "%d steps of %d x %d tokens, %d channels, learning rate %g, seed%s %llu%s; losses in nats per "
        "character, the mean over %d random batches\n\n",
        o.steps, o.batch_size, o.context, o.channels, o.learning_rate, o.seeds > 1 ? "s" : "",
        (unsigned long long)o.seed,
        o.seeds > 1 ? strf(" to %llu (mean ± standard deviation)",
                           (unsigned long long)o.seed + (unsigned long long)o.seeds - 1)
                          .c_str()
                    : "",
        o.eval_batches);
    table +=
        "| rung | what is added | parameters | train | val | val, bits per character | the post: train | val "
        "| s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n";
    std::string losses = "rung,train,train_sd,val,val_sd,post_train,post_val\n",
                curves = "rung,seed,step,train,val\n";
    for (size_t i = 0; i < jobs.size(); i += (size_t)o.seeds) {
        int k = jobs[i].rung;
        std::string changes;
        rung_of(o, k, &changes);
        std::vector<double> on_train, on_val, bits, seconds;
        for (size_t j = i; j < i + (size_t)o.seeds; j++) {
            const Result& r = results[j];
            on_train.push_back(r.end().train), on_val.push_back(r.end().val),
                bits.push_back(r.end().val / M_LN2), seconds.push_back(r.seconds);
            for (int p = 0; p < r.points; p++)
                curves += strf("%d,%llu,%d,%.6f,%.6f\n", k, (unsigned long long)jobs[j].seed, r.curve[p].step,
                               r.curve[p].train, r.curve[p].val);
        }
        Spread t(on_train), v(on_val);
        bool given = RUNGS[k].post_val > 0 && changes.empty();
        auto post = [&](double x) { return given ? strf("%.4f", x) : std::string("-"); };
        table +=
            strf("| %d | %s%s%s | %s | %s | %s | %s | %s | %s | %.1f |\n", k, RUNGS[k].name,
                 changes.empty() ? "" : "; ", changes.c_str(), commas(results[i].params).c_str(),
                 t.text().c_str(), v.text().c_str(), Spread(bits).text().c_str(),
                 post(RUNGS[k].post_train).c_str(), post(RUNGS[k].post_val).c_str(), Spread(seconds).mean);
        losses += strf("%d,%.6f,%.6f,%.6f,%.6f,%s,%s\n", k, t.mean, t.sd, v.mean, v.sd,
                       post(RUNGS[k].post_train).c_str(), post(RUNGS[k].post_val).c_str());
    }
    for (auto [name, text] : {std::pair<const char*, std::string*>{"ladder.md", &table},
                              {"losses.csv", &losses},
                              {"curves.csv", &curves}}) {
        AtomicFile out(o.out + "/" + name);
        out.write(*text);
        out.commit();
    }
    return table;
}

constexpr const char* EPILOGUE =
    "The rungs\n"
    "  0  a table of how likely each character is after the current one\n"
    "  1  attention: the model sees the last T characters and their positions, and weighs which of them "
    "matter\n"
    "  2  several heads: each can attend to something else, such as the word's first letter or the last "
    "space\n"
    "  3  feed-forward: each position processes what attention has gathered\n"
    "  4  blocks: attention and feed-forward three times. Deeper, but not better: each block replaces what "
    "it\n"
    "     reads, so later blocks see only what earlier ones pass on\n"
    "  5  residual connections: each part adds to its input, so that gradients reach every layer directly; "
    "a\n"
    "     projection lets the part choose what to add\n"
    "  6  LayerNorm: each part reads numbers of the same scale, however large the sums become\n"
    "  7  dropout: parts learn not to rely on each other, which costs a network this small some of its "
    "capacity\n"
    "  8  the same, larger: ./train_gpt2 --preset char (dev/ladder/rung8.sh)\n"
    "  9  fine-tuning a model that was trained on other verse (dev/ladder/rung9.sh)\n"
    "\nExamples\n"
    "  ./ladder --rung 5 --steps 5000\n"
    "  ./ladder --rung 0-7 --seeds 3\n"
    "  ./ladder --rung 5 --projection 0 --hidden 1     is the projection worth its parameters?\n"
    "  ./ladder --rung 4 --blocks 6                    does more depth help without residual connections?\n";

inline void add_flags(Flags& f, Options& o) {
    f.add("rung", "", &o.rungs, "K", "which rungs: 5, 0-7, or 4,5");
    f.add("data", "", &o.data, "DIR", "folder made by ./prepare_data");
    f.add("out", "o", &o.out, "DIR", "folder for the table, the losses and the poems");
    f.section("Training (the defaults are the post's)");
    f.add("steps", "", &o.steps, "N", "updates").range(0, 1e8);
    f.add("batch_size", "b", &o.batch_size, "B", "windows of text per update").range(1, 1 << 16);
    f.add("context", "t", &o.context, "T", "characters that the model sees").range(1, 4096);
    f.add("channels", "", &o.channels, "C", "numbers that represent a character").range(1, 4096);
    f.add("learning_rate", "l", &o.learning_rate, "LR", "constant learning rate of AdamW").range(0, 1e3);
    f.add("seed", "", &o.seed, "N", "determines weights, batches and poems");
    f.add("seeds", "", &o.seeds, "N",
          "runs per rung, with seeds --seed, --seed + 1, ..., to see whether a gain is more than luck")
        .range(1, 1000);
    f.add("jobs", "", &o.jobs, "N",
          "runs at the same time, one thread each; 0: one per core. It does not change the results")
        .range(0, 4096);
    f.add("eval_every", "", &o.eval_every, "N", "steps between estimates of the losses").range(1, 1e8);
    f.add("eval_batches", "", &o.eval_batches, "N", "random batches of each split per estimate")
        .range(1, 1 << 20);
    f.section("Poems");
    f.add("poems", "", &o.poems, "N",
          "poems that each rung writes to OUT/rung*_poems.txt; the longest is printed")
        .range(0, 1 << 20);
    f.add("poem_tokens", "", &o.poem_tokens, "N", "maximum length of a poem in characters").range(1, 1 << 20);
    f.add("temperature", "", &o.temperature, "X", "below 1 is safer, above 1 is wilder").range(0, 1e6);
    f.section("Experiments: change a rung; -1 keeps the rung's value");
    f.add("heads", "", &o.heads, "N", "attention heads").range(1, 4096).unset(-1);
    f.add("blocks", "", &o.blocks, "N", "blocks, one after the other").range(1, 256).unset(-1);
    f.add("hidden", "", &o.hidden, "N", "width of the feed-forward layer in multiples of C; 0: no such layer")
        .range(0, 64)
        .unset(-1);
    f.add("residual", "", &o.residual, "0|1", "whether a part's result is added to its input")
        .range(0, 1)
        .unset(-1);
    f.add("projection", "", &o.projection, "0|1", "whether each part ends in a linear layer")
        .range(0, 1)
        .unset(-1);
    f.add("layernorm", "", &o.layernorm, "0|1", "LayerNorm before each part").range(0, 1).unset(-1);
    f.add("dropout", "", &o.dropout, "P", "share of activations dropped in training")
        .range(0, 0.99)
        .unset(-1);
    f.epilogue(EPILOGUE);
}

// Prints the longest poem of each rung.
inline void print_poems(const std::vector<Job>& jobs, const Options& o) {
    for (size_t i = 0; i < jobs.size(); i += (size_t)o.seeds) {
        std::string text = Reader(poems_path(o, jobs[i].rung)).rest(), longest;
        for (size_t at = 0, end; at < text.size(); at = end + 2) {
            end = std::min(text.find("\n\n", at), text.size());
            if (end - at > longest.size()) longest = text.substr(at, end - at);
        }
        printf("\n--- rung %d: %s ---\n%s\n", jobs[i].rung, RUNGS[jobs[i].rung].name, longest.c_str());
    }
}

// Earlier results, which this run would replace, move to DIR/previous/N. Returns what to tell the user, or
// "".
inline std::string set_aside_results(const std::vector<Job>& jobs, const Options& o) {
    std::vector<std::string> names = {"ladder.md", "losses.csv", "curves.csv", "bars.png", "curves.png"};
    for (const Job& job : jobs)
        if (o.poems && job.seed == o.seed) names.push_back(poems_name(job.rung));
    return trainer::set_aside(o.out, names);
}

inline int ladder_main(int argc, char** argv) {
    Options o;
    Flags f("ladder", "trains models from a bigram table to GPT-2's block, adding one idea at a time");
    add_flags(f, o);
    f.parse(argc, argv);
    std::vector<Job> jobs;
    for (int k : parse_rungs(o.rungs)) {
        rung_of(o, k);
        for (int s = 0; s < o.seeds; s++) jobs.push_back({k, o.seed + (uint64_t)s});
    }
    finish_data_set(o.data);
    for (const char* name : {"train.bin", "val.bin", "tokenizer.bin"})
        if (!file_exists(o.data + "/" + name)) fail_without_data(o.data, name, "ladder");
    Data data(o.data);
    for (const TokenFile* t : {&data.train, &data.val})
        if (t->size() <= (size_t)o.context)
            fail("%s: has %zu tokens, but a window needs --context + 1 = %d", t->path.c_str(), t->size(),
                 o.context + 1);
    make_dirs(o.out);
    if (std::string what = set_aside_results(jobs, o); !what.empty()) printf("%s\n", what.c_str());
    printf("%s: %s training and %s validation characters, %d different\n\n", o.data.c_str(),
           commas(data.train.size()).c_str(), commas(data.val.size()).c_str(), data.tokenizer.vocab_size());
    Results results(jobs.size(), o);
    run_jobs(jobs, data, o, results, [&](size_t i) {
        const Result& r = results[i];
        if (!r.error[0])
            printf("rung %d, seed %llu: train %.4f, val %.4f after %d steps, %.1f s\n", jobs[i].rung,
                   (unsigned long long)jobs[i].seed, r.end().train, r.end().val, o.steps, r.seconds);
        fflush(stdout);
    });
    printf("\n%s", tabulate(jobs, results, o).c_str());
    if (o.poems) print_poems(jobs, o);
    printf("\nwrote %s/{ladder.md, losses.csv, curves.csv%s}\n", o.out.c_str(),
           o.poems ? ", rung*_poems.txt" : "");
    return 0;
}

}  // namespace ladder

#ifdef LADDER_MAIN
int main(int argc, char** argv) {
    return run_main("ladder", [&] { return ladder::ladder_main(argc, argv); });
}
#endif
