// test_model.h - models for tests: small sizes, weights as if trained, batches of random tokens, and models
// that only hold parameters and moments, one of them a rank's share.
#pragma once

#include "dev/test_util.h"
#include "lib/model.h"

namespace test {

inline Config config(int L, int NH, int C, int V, int maxT, int arch = GPT2_ARCH,
                     int activation = GELU_TANH) {
    Config c;
    c.L = L, c.NH = NH, c.C = C, c.V = V, c.Vp = pad_vocab(V), c.maxT = maxT, c.arch = arch,
    c.activation = activation;
    return c;
}
// Small, and different from the defaults in everything that a header holds.
inline Config small_config() {
    Config c = config(2, 2, 8, 11, 5, GROVER_ARCH, GELU_ERF);
    c.Vp = 16;
    return c;
}
inline std::string variant(const Config& c, float dropout) {
    return strf("%s, %s, dropout %g", c.arch == GPT2_ARCH ? "GPT-2" : "GROVER",
                c.activation == GELU_TANH ? "tanh" : "erf", dropout);
}

// Weights as if trained: none is zero or one, so that every gradient matters. Padded rows stay zero. Each
// tensor has random numbers of its own, so that another tensor does not change it.
template <class Model>
void randomise(Model& m, uint64_t seed) {
    ParamTable table = param_table(m.cfg);
    auto off = param_offsets(m.cfg);
    Floats all = piece(m, PARAMS);
    for (int i = 0; i < NUM_PARAMS; i++) {
        Random r(seed * NUM_PARAMS + (uint64_t)i);
        bool weight = table[i].init == ONES, embedding = i == WTE || i == WPE;
        double scale = !table[i].decay ? 0.3
                       : embedding     ? 0.4
                                       : (i == QKVW ? 1.5 : 1) / std::sqrt((double)m.cfg.C);
        Floats w =
            r.floats(i == WTE ? (size_t)m.cfg.V * table[i].cols : table[i].size(), scale, weight ? 1 : 0);
        std::copy(w.begin(), w.end(), &all[off[i]]);
    }
    set_piece(m, PARAMS, all);
}

// In the model file's order.
template <class Model>
Floats gradients(Model& m) {
    return piece(m, GRADS);
}
template <class Model>
Floats parameters(Model& m) {
    return piece(m, PARAMS);
}

// A training pass over tokens of which `counted` are targets.
inline Pass training_pass(size_t counted, uint32_t step = 3, uint64_t seq0 = 0) {
    Pass pass;
    pass.train = true, pass.step = step, pass.seq0 = seq0, pass.grad_scale = 1.0f / (float)counted;
    return pass;
}
inline size_t count_targets(const Tokens& y) {
    return (size_t)std::count_if(y.begin(), y.end(), [](int t) { return t >= 0; });
}

// B sequences of T random tokens, with targets of which about one in seven is left out of the loss.
struct Batch {
    size_t B, T;
    Tokens tokens, targets;
    Batch(Random& r, size_t B_, size_t T_, int V)
        : B(B_), T(T_), tokens(r.tokens(B_ * T_, V)), targets(r.targets(B_ * T_, V)) {}
    size_t counted() const { return count_targets(targets); }
    template <class Model>
    double forward(Model& m, const Pass& pass = {}) const {
        return m.forward(tokens.data(), targets.data(), B, T, pass);
    }
};

// Parameters and the optimizer's arrays in memory as a trainer lays them out, and nothing that computes: for
// tests of files.
class PlainModel {
  public:
    const Config cfg;
    const Optimizer optimizer;
    Params<float> params;

    explicit PlainModel(const Config& c, Optimizer o = ADAMW) : cfg(c), optimizer(o) {
        for (Floats& array : arrays_) array.resize(num_params(c));
        params = {arrays_[PARAMS].data(), c};
    }
    PlainModel(PlainModel&&) = default;  // `params` stays valid: the arrays keep their memory
    bool has(State s) const { return s == MUON_M ? optimizer == MUON : s != MASTER; }
    bool sharded() const { return false; }
    template <class F>
    void each_range(State s, F f) {
        for (const ParamPiece& t : param_pieces(cfg))
            if (state_has(s, optimizer, t.block_matrix)) f(&arrays_[s][t.memory], t.size, t.file);
    }
    template <class F>
    void each_piece(State s, F f) {
        each_range(s, [&](float* x, size_t n, size_t) { f(x, n); });
    }

  private:
    Floats arrays_[NUM_STATES];  // by State
};

// The same for one rank of a sharded model. With master weights, parameters are rounded to bf16 when they are
// set, and the masters are set to what was rounded.
class ShardedModel {
  public:
    const Config cfg;
    const Optimizer optimizer;

    ShardedModel(const Config& c, int world, int rank, bool masters, Optimizer o = ADAMW)
        : cfg(c),
          optimizer(o),
          masters_(masters),
          params_(num_params(c)),
          owned_(owned_pieces(c, {world, rank, 1}, false, o)) {
        size_t n = 0;
        for (const OwnedPiece& p : owned_) n = std::max(n, p.shard + p.size);
        for (State s : {ADAM_M, ADAM_V, MASTER, MUON_M}) arrays_[s].resize(n);
    }
    bool has(State s) const { return s == MASTER ? masters_ : s == MUON_M ? optimizer == MUON : true; }
    bool sharded() const { return true; }
    template <class F>
    void each_piece(State s, F f) {
        if (s != PARAMS) throw std::logic_error("a rank holds only a part of that state");
        for (const ParamPiece& t : param_pieces(cfg)) f(&params_[t.file], t.size);
        if (!masters_ || std::is_invocable<F, const float*, size_t>::value) return;
        for (const OwnedPiece& p : owned_)
            std::copy(&params_[p.file], &params_[p.file] + p.size, &arrays_[MASTER][p.shard]);
        params_ = rounded(params_);
    }
    template <class F>
    void each_range(State s, F f) {
        for (const OwnedPiece& p : owned_)
            if (state_has(s, optimizer, p.block_matrix)) f(&arrays_[s][p.shard], p.size, p.file);
    }

  private:
    const bool masters_;
    Floats params_, arrays_[NUM_STATES];  // params_ in the file's order; arrays_ by State
    std::vector<OwnedPiece> owned_;
};

}  // namespace test
