// optimizer.h - the optimizers' settings, what each of them updates, the names of the arrays that they keep,
// and which of their elements a rank holds. train_gpt2.cpp and train_gpt2.cu compute the updates.
//
//     AdamW (Loshchilov and Hutter 2019)   all parameters; two moments for each
//     Muon (Jordan et al. 2024)            the blocks' matrices; one momentum for each parameter. Embeddings,
//                                          biases and LayerNorms are left to AdamW.
#pragma once

#include <cmath>

#include "lib/gpt2.h"

// The result of step number `step` (0: no step yet): its mean loss, and the gradient's norm before clipping.
struct StepResult {
    double loss = 0, norm = 0;
    uint32_t step = 0;
    bool finite() const { return std::isfinite(loss) && std::isfinite(norm); }
};

enum Optimizer { ADAMW, MUON };
inline const char* name_of(Optimizer o) { return o == MUON ? "muon" : "adamw"; }

// Muon's learning rate, as a multiple of AdamW's, where no other is given. The same rate moves weights
// equally far (see muon_scale), but an update whose singular values are all alike can be larger before
// training becomes unstable: on characters of 16,631 poems (6 layers, 384 channels, 16 x 128 tokens, 400
// steps) 1e-3 is the best rate of AdamW, and 5e-3 of Muon.
constexpr float MUON_MULTIPLE = 5;

// The optimizer's settings for one step. If the gradient's global norm exceeds grad_clip, the gradient is
// scaled down to that norm; 0: no limit. A step whose loss or norm is not finite, or exceeds max_loss or
// max_norm, changes nothing. (Where it is not finite, the trainer ends the run.)
struct StepSettings {
    float weight_decay = 0.1f, grad_clip = 0;                      // of both optimizers
    float lr = 3e-4f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;    // AdamW's
    float muon_lr = MUON_MULTIPLE * 3e-4f, muon_momentum = 0.95f;  // Muon's
    double max_loss = INFINITY, max_norm = INFINITY;
    bool takes(const StepResult& r) const { return r.finite() && r.loss <= max_loss && r.norm <= max_norm; }
};

// Muon replaces an update by the nearest matrix whose singular values are all about 1. The elements of such a
// matrix have a root mean square of 1 / sqrt(larger), where it has `larger` rows or columns; those of AdamW's
// updates have about 0.2. With this factor Muon's have 0.2, too (Liu et al. 2025, "Muon is scalable for LLM
// training"), so that a learning rate means the same for both optimizers: a step moves a weight by about 0.2
// times the rate.
inline float muon_scale(size_t larger) { return 0.2f * std::sqrt((float)larger); }

// The Newton-Schulz iteration X = a X + (b G + c G^2) X, G = X X^T, moves the singular values of X from
// (0, 1] towards 1. With these coefficients (Jordan et al. 2024) five iterations bring all that are above
// 0.002 to between 0.68 and 1.21, which is near enough.
struct NewtonSchulz {
    static constexpr int ITERATIONS = 5;
    static constexpr float A = 3.4445f, B = -4.7750f, C = 2.0315f;
    static constexpr float EPS = 1e-7f;  // X is first divided by its norm, but by no less than this
};

// The matrices that Muon updates, each by itself; qkvw is three of them. Those of one shape form a group.
// They are orthogonalised as (n,m) with n <= m: one with more rows than columns is transposed.
struct MuonMatrix {
    size_t memory, file;  // its first element, in arrays laid out as ParamLayout says, and in the file
    bool transposed;      // stored as (m,n)
};
struct MuonGroup {
    size_t n, m;
    std::vector<MuonMatrix> matrices;
};
// Of shape (C,C), then of shape (C,4C). `multiple`: see ParamLayout.
inline std::array<MuonGroup, 2> muon_groups(const Config& c, size_t multiple = 1) {
    const size_t C = (size_t)c.C;
    const ParamTable table = param_table(c);
    std::array<MuonGroup, 2> groups = {{{C, C, {}}, {C, 4 * C, {}}}};
    for (const ParamPiece& p : param_pieces(c, multiple)) {
        if (!p.block_matrix) continue;
        const size_t parts = p.id == QKVW ? 3 : 1, rows = table[p.id].rows / parts, cols = table[p.id].cols;
        MuonGroup& group = groups[rows != cols];
        if (std::min(rows, cols) != group.n || std::max(rows, cols) != group.m)
            throw std::logic_error(strf("muon_groups: no group for %s", table[p.id].name));
        for (size_t at = 0; at < p.size; at += rows * cols)
            group.matrices.push_back({p.memory + at, p.file + at, rows > cols});
    }
    return groups;
}

// An array that the optimizer keeps; the section of a state file that holds it; and the section of a rank's
// shard that lists its elements (lib/checkpoint.h).
struct OptimizerArray {
    State state;
    const char *section, *ranges;
};
inline std::vector<OptimizerArray> optimizer_arrays(Optimizer optimizer) {
    if (optimizer == ADAMW) return {{ADAM_M, "adam_m", "ranges"}, {ADAM_V, "adam_v", "ranges"}};
    return {{MUON_M, "muon_m", "muon_ranges"},
            {ADAM_M, "adam_m", "adam_ranges"},
            {ADAM_V, "adam_v", "adam_ranges"}};
}
// The fp32 weights, in the state files of ranks that hold a part of them each.
constexpr OptimizerArray MASTER_ARRAY = {MASTER, "master", "ranges"};
// Whether a state has elements for a tensor.
inline bool state_has(State s, Optimizer optimizer, bool block_matrix) {
    const bool muon = optimizer == MUON && block_matrix;
    return s == MUON_M ? muon : s == ADAM_M || s == ADAM_V ? !muon : true;
}

// How the optimizer's arrays are spread over the ranks (ZeRO, Rajbhandari et al. 2020). Each part of the
// model (embeddings, block, final LayerNorm) is padded so that `world` ranks hold equal shards of it.
//     stage 0: every rank holds them whole     1: a rank holds its shards     2: the same of the gradients
struct Sharding {
    int world = 1, rank = 0, stage = 0;
    bool shards_state() const { return world > 1 && stage >= 1; }
    bool shards_gradients() const { return world > 1 && stage >= 2; }
    // Each part is padded to a multiple of this, so that every shard begins and ends at a multiple of 8
    // elements.
    size_t multiple() const { return world > 1 ? (size_t)world * 8 : 1; }
    // First element in memory, and length, of a rank's shard of a part.
    std::pair<size_t, size_t> shard(std::pair<size_t, size_t> part) const {
        const size_t n = part.second / (size_t)world;
        return {part.first + (size_t)rank * n, n};
    }
};

// A run of `size` elements of one tensor of one layer that a rank's optimizer updates, and where the first
// one is
//     file     in the model file
//     memory   in an array of the whole model
//     shard    in this rank's array of first moments, which also holds Muon's momentum: no parameter has both
//     second   in its array of second moments; unused for block matrices that Muon updates, which have none
struct OwnedPiece {
    size_t file, memory, shard, second, size;
    bool decay, block_matrix;
};
// All of them in the file's order. `whole`: the pieces of all ranks; `shard` then equals `memory`.
inline std::vector<OwnedPiece> owned_pieces(const Config& c, const Sharding& s, bool whole,
                                            Optimizer optimizer = ADAMW) {
    const ParamLayout layout(c, s.multiple());
    auto part_of = [&](const ParamPiece& p) {
        return layout.range(p.id == WTE || p.id == WPE     ? EMBEDDINGS
                            : p.id == LNFW || p.id == LNFB ? FINAL_NORM
                                                           : BLOCK,
                            p.layer);
    };
    std::vector<OwnedPiece> owned;
    size_t seconds = 0;
    for (const ParamPiece& p : param_pieces(c, s.multiple())) {
        const auto part = part_of(p), mine = whole ? part : s.shard(part);
        const size_t from = std::max(p.memory, mine.first),
                     to = std::min(p.memory + p.size, mine.first + mine.second);
        if (from >= to) continue;
        const size_t shard = whole ? from : part.first / (size_t)s.world + from - mine.first;
        const size_t second = optimizer == ADAMW ? shard : seconds;
        owned.push_back({p.file + from - p.memory, from, shard, second, to - from, p.decay, p.block_matrix});
        if (state_has(ADAM_V, optimizer, p.block_matrix)) seconds += to - from;
    }
    return owned;
}
// Elements of this rank's array of first moments and momentum, and of that of second moments.
inline size_t first_moments(const Config& c, const Sharding& s) {
    return ParamLayout(c, s.multiple()).size() / (s.shards_state() ? (size_t)s.world : 1);
}
inline size_t second_moments(const Config& c, const Sharding& s, Optimizer optimizer) {
    if (optimizer == ADAMW) return first_moments(c, s);
    size_t n = 0;
    for (const OwnedPiece& p : owned_pieces(c, s, !s.shards_state(), optimizer))
        if (state_has(ADAM_V, optimizer, p.block_matrix)) n += p.size;
    return n;
}
