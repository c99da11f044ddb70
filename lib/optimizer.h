// optimizer.h - the optimizer: its settings, the names of the arrays that it keeps, and which of their
// elements a rank holds.
#pragma once

#include <cmath>

#include "lib/gpt2.h"

// The result of step number `step` (0: no step yet): its mean loss, and the gradient's norm before clipping.
struct StepResult {
    double loss = 0, norm = 0;
    uint32_t step = 0;
    bool finite() const { return std::isfinite(loss) && std::isfinite(norm); }
};

// AdamW's settings for one step. If the gradient's global norm exceeds grad_clip, the gradient is scaled down
// to that norm; 0: no limit. A step whose loss or norm is not finite, or exceeds max_loss or max_norm,
// changes nothing. (Where it is not finite, the trainer ends the run.)
struct AdamW {
    float lr = 3e-4f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f, grad_clip = 0;
    double max_loss = INFINITY, max_norm = INFINITY;
    bool takes(const StepResult& r) const { return r.finite() && r.loss <= max_loss && r.norm <= max_norm; }
};

// The arrays that the optimizer keeps for each parameter, and the names of their sections in a state file.
struct OptimizerArray {
    State state;
    const char* section;
};
constexpr OptimizerArray OPTIMIZER_ARRAYS[] = {{ADAM_M, "adam_m"}, {ADAM_V, "adam_v"}};
// The fp32 weights, in the state files of ranks that hold a part of them each.
constexpr OptimizerArray MASTER_ARRAY = {MASTER, "master"};

// How the optimizer's arrays are spread over the ranks (ZeRO, Rajbhandari et al. 2020). Each part of the
// model (embeddings, block, final LayerNorm) is padded so that `world` ranks hold equal shards of it.
//     stage 0: every rank holds them whole     1: a rank holds its shards     2: and of the gradients, too
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

// A run of elements of one tensor of one layer that a rank's optimizer updates: where it is in the file, in
// arrays that hold the whole model, and in arrays that hold only this rank's shards.
struct OwnedPiece {
    size_t file, memory, shard, size;
    bool decay;
};
// All of them in the file's order. `whole`: the pieces of all ranks; `shard` then equals `memory`.
inline std::vector<OwnedPiece> owned_pieces(const Config& c, const Sharding& s, bool whole) {
    const ParamLayout layout(c, s.multiple());
    auto part_of = [&](const ParamPiece& p) {
        return layout.range(p.id == WTE || p.id == WPE     ? EMBEDDINGS
                            : p.id == LNFW || p.id == LNFB ? FINAL_NORM
                                                           : BLOCK,
                            p.layer);
    };
    std::vector<OwnedPiece> owned;
    for (const ParamPiece& p : param_pieces(c, s.multiple())) {
        const auto part = part_of(p), mine = whole ? part : s.shard(part);
        const size_t from = std::max(p.memory, mine.first),
                     to = std::min(p.memory + p.size, mine.first + mine.second);
        if (from >= to) continue;
        const size_t shard = whole ? from : part.first / (size_t)s.world + from - mine.first;
        owned.push_back({p.file + from - p.memory, from, shard, to - from, p.decay});
    }
    return owned;
}
