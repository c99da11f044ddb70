// memory.h - an arena that divides one block of memory into tensors, the activations of a model (on the CPU
// and the GPU), and the CPU's buffers and parameters.
#pragma once

#include <type_traits>
#include <utility>
#include <vector>

#include "lib/gpt2.h"
#include "lib/machine.h"
#include "lib/model.h"

// Hands out pieces of one block of memory, one after the other. Without a block (base null) it only counts:
// the same function that places tensors then tells beforehand how much memory they need.
struct Arena {
    static constexpr size_t MOST = (size_t)1 << 60;  // bytes
    char* base = nullptr;
    size_t used = 0;  // bytes so far
    // Where the next piece may begin (bytes from base), given the last one's end: at a cache line.
    size_t (*next)(char* base, size_t end) = [](char*, size_t end) { return round_up(end, 64); };

    // Room for a x b x c elements. Fails if that is too large to address.
    template <class E>
    E* take(size_t a, size_t b = 1, size_t c = 1) {
        E* p = base ? (E*)(base + used) : nullptr;
        size_t n, end;
        if (__builtin_mul_overflow(a, b, &n) || __builtin_mul_overflow(n, c, &n) || n > MOST / sizeof(E) ||
            (end = used + n * sizeof(E)) > MOST)
            fail("this model and batch are too large to address: they need more than %s of memory",
                 human_bytes((double)MOST).c_str());
        used = next(base, end);
        return p;
    }
};

// The activations that forward keeps for backward; M = B*T rows. F is the type of the residual stream and of
// qkv and fch, which one layer reads (float on the CPU), A the type of what matrix products multiply (float
// or bf16). A tensor has one slot for each layer, or a single slot that all layers use: in a model that does
// not train, and in training for what backward computes again.
template <class F, class A>
struct Activations {
    F *embedded, *qkv, *resid2, *fch, *resid3;
    A *ln1, *atty, *ln2, *fch_gelu, *lnf;
    float *ln1_mean, *ln1_rstd, *lse, *ln2_mean, *ln2_rstd, *lnf_mean, *lnf_rstd, *losses;
    size_t gelu_slots, ln_slots, block_slots, resid_slots;

    // recompute: what backward computes again, to save memory. Of 16C values per token and layer, 0 keeps
    // all; 1 drops the GELU's output (4C); 2 also drops the LayerNorms' outputs (6C in all); 3 drops whole
    // blocks, all but C.
    void place(Arena& a, const Config& c, size_t M, bool trains, int recompute) {
        size_t C = c.C, L = c.L;
        auto kept_below = [&](int level) { return trains && recompute < level ? L : 1; };
        gelu_slots = kept_below(1), ln_slots = kept_below(2), block_slots = kept_below(3),
        resid_slots = trains ? L : 1;
        embedded = a.take<F>(M, C), resid3 = a.take<F>(resid_slots, M, C);
        qkv = a.take<F>(block_slots, M, 3 * C), lse = a.take<float>(block_slots, M, c.NH);
        atty = a.take<A>(block_slots, M, C), resid2 = a.take<F>(block_slots, M, C);
        fch = a.take<F>(block_slots, M, 4 * C), fch_gelu = a.take<A>(gelu_slots, M, 4 * C);
        ln1 = a.take<A>(ln_slots, M, C), ln2 = a.take<A>(ln_slots, M, C), lnf = a.take<A>(M, C);
        ln1_mean = a.take<float>(block_slots, M), ln1_rstd = a.take<float>(block_slots, M);
        ln2_mean = a.take<float>(block_slots, M), ln2_rstd = a.take<float>(block_slots, M);
        lnf_mean = a.take<float>(M), lnf_rstd = a.take<float>(M), losses = a.take<float>(M);
    }

    // The activations of one block.
    struct Block {
        const F* resid;  // (M,C), what the block reads: the embedding, or the previous block's resid3
        F* qkv;          // (M,3C)
        F* resid2;       // (M,C), after attention
        F* fch;          // (M,4C), before GELU
        F* resid3;       // (M,C), the block's output
        A *ln1, *atty, *ln2, *fch_gelu;                          // (M,C), (M,C), (M,C), (M,4C)
        float *ln1_mean, *ln1_rstd, *lse, *ln2_mean, *ln2_rstd;  // (M) each; lse (B,NH,T)
    };
    // Block l's, for a batch of M rows.
    Block block(size_t l, const Config& c, size_t M) const {
        size_t C = c.C, gelu = l % gelu_slots * M, ln = l % ln_slots * M, blk = l % block_slots * M;
        const F* resid = l ? resid3 + (l - 1) % resid_slots * M * C : embedded;
        return {resid,
                qkv + blk * 3 * C,
                resid2 + blk * C,
                fch + blk * 4 * C,
                resid3 + l % resid_slots * M * C,
                ln1 + ln * C,
                atty + blk * C,
                ln2 + ln * C,
                fch_gelu + gelu * 4 * C,
                ln1_mean + blk,
                ln1_rstd + blk,
                lse + blk * c.NH,
                ln2_mean + blk,
                ln2_rstd + blk};
    }
};

// ---------------------------------------------------------------------------------------------
// What only the CPU uses

namespace cpu {

// Buffers that all layers share: gradients of activations, the logits of some rows, scratch
// memory. A is the type of the products' operands.
template <class A>
struct Workspace {
    float* branch;     // (M,C), what attention or the MLP adds to the residual stream
    float* logits;     // (head_rows, V padded to 16)
    float* attention;  // each thread's scratch memory
    float* dresid;     // (M,C), gradient of the residual stream
    float* dbranch;    // (M,C), the same under the dropout mask of the branch
    float* dln;        // (M,C), gradient of a LayerNorm's output
    float* dfch_gelu;  // (M,4C), gradient of the GELU's output
    A *dqkv, *dfch;    // (M,3C), gradient of qkv; (M,4C), gradient of the GELU's input

    void place(Arena& a, const Config& c, size_t M, size_t head_rows, size_t attention_floats, bool trains) {
        size_t C = c.C;
        // branch and dln share memory: branch is added to the residual stream as soon as it is computed, and
        // dln is in use only from the head's backward pass on. When backward computes a block again, and so
        // writes branch, it has already read dln. dqkv and dfch share memory too: the last read of dfch comes
        // before the first write of dqkv.
        branch = dln = a.take<float>(M, C);
        logits = a.take<float>(head_rows, round_up(c.V, 16));
        attention = a.take<float>(attention_floats);
        if (!trains) return;
        dresid = a.take<float>(M, C), dbranch = a.take<float>(M, C);
        dqkv = dfch = a.take<A>(M, 4 * C);
        dfch_gelu = std::is_same<A, float>::value ? (float*)dfch : a.take<float>(M, 4 * C);
    }
};

// A model's states: its parameters and, if it trains, their gradients and what the optimizer keeps.
struct States {
    const Config cfg;
    const Optimizer optimizer;
    Params<float> params, grads;
    Params<uint16_t> params_bf16;  // instead of params where parameters are kept in bf16

    void init_weights(uint64_t seed) {
        for (const ParamPiece& t : pieces_)
            initial_weights(params.tensor(t.id, t.layer), cfg, t.id, t.layer * t.size, t.size, seed);
    }
    bool has(State s) const { return s == MUON_M ? optimizer == MUON : s != MASTER; }
    bool sharded() const { return false; }
    // Passes a whole state to f, in the file's order, piece by piece: f(pointer, number of floats, number in
    // the file of the first one). f may write. A model that does not train has only PARAMS.
    template <class F>
    void each_range(State s, F f) {
        if (s == PARAMS && params_bf16.wte) return each_piece_of_bf16(f);
        float* p = array(s);
        for (const OwnedPiece& t : owned_)
            if (state_has(s, optimizer, t.block_matrix))
                f(p + (s == ADAM_V ? t.second : t.memory), t.size, t.file);
    }

  protected:
    States(const Config& c, Optimizer o) : cfg(checked(c)), optimizer(o) {}
    void allocate(const MemoryNeed& need, bool in_bf16) {
        params_mem_ = {need.params, "parameters"};
        if (in_bf16) params_bf16 = {params_mem_.as<uint16_t>(), cfg};
        else params = {params_mem_.as<float>(), cfg};
        if (!need.grads) return;
        grads_mem_ = {need.grads, "gradients"}, optimizer_mem_ = {need.optimizer, "optimizer state"};
        grads = {grads_mem_.as<float>(), cfg};
    }
    static const Config& checked(const Config& c) {
        check_config(c, "model");
        return c;
    }
    // Bytes that the optimizer keeps.
    static size_t optimizer_bytes(const Config& c, Optimizer o) {
        return checked_mul(first_moments(c, {}) + second_moments(c, {}, o), sizeof(float), "optimizer state");
    }
    // A state's array, laid out as ParamLayout says; ADAM_V as OwnedPiece::second says. ADAM_M and MUON_M are
    // parts of one array. Gradients that only count as zero are set to zero first.
    float* array(State s) {
        size_t n = num_params(cfg);
        if (s == GRADS && std::exchange(grads_are_zero_, false)) memset(grads.wte, 0, n * sizeof(float));
        return s == PARAMS  ? params.wte
               : s == GRADS ? grads.wte
                            : optimizer_mem_.as<float>() + (s == ADAM_V ? first_moments(cfg, {}) : 0);
    }

    const std::vector<ParamPiece> pieces_ = param_pieces(cfg);
    const std::vector<OwnedPiece> owned_ =
        owned_pieces(cfg, {}, true, optimizer);  // the same, for the optimizer
    // After a step the gradients only count as zero, whatever memory holds: the next backward pass overwrites
    // them, which is cheaper than setting them to zero and adding to them.
    bool grads_are_zero_ = false;

  private:
    // The parameters are converted to floats for f, and back.
    template <class F>
    void each_piece_of_bf16(F f) {
        constexpr size_t PIECE = 1 << 20;
        std::vector<float> buf(PIECE);
        for (const ParamPiece& t : pieces_)
            for (size_t i = 0; i < t.size; i += PIECE) {
                size_t n = std::min(PIECE, t.size - i);
                uint16_t* p = params_bf16.tensor(t.id, t.layer) + i;
                for (size_t j = 0; j < n; j++) buf[j] = bf16_to_float(p[j]);
                f(buf.data(), n, t.file + i);
                for (size_t j = 0; j < n; j++) p[j] = float_to_bf16(buf[j]);
            }
    }

    machine::Memory params_mem_, grads_mem_, optimizer_mem_;
};

}  // namespace cpu
