// memory.h - an arena that divides one allocation into tensors, and the activations of a model, on the CPU
// and the GPU.
#pragma once

#include "lib/gpt2.h"

// Hands out pieces of one block of memory, one after the other. With no block (base null) it only counts, so
// that the function that places tensors also tells beforehand what memory they need.
struct Arena {
    static constexpr size_t MOST = (size_t)1 << 60;  // bytes
    char* base = nullptr;
    size_t used = 0;  // bytes so far
    // Where the next piece may begin, given the end of the last one (bytes from base): on a line of the
    // cache.
    size_t (*next)(char* base, size_t end) = [](char*, size_t end) { return round_up(end, 64); };

    // Room for a x b x c elements. Fails where that is too large to address.
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

// What forward keeps for backward; M = B*T rows. F is the type of the residual stream and of what only this
// layer reads (float on the CPU), A that of what products multiply (float or bf16). Each tensor has one slot
// a layer, or a single one that is used again: by every layer of a model that does not train, and in training
// by what is recomputed.
template <class F, class A>
struct Activations {
    F *embedded, *qkv, *resid2, *fch, *resid3;
    A *ln1, *atty, *ln2, *fch_gelu, *lnf;
    float *ln1_mean, *ln1_rstd, *lse, *ln2_mean, *ln2_rstd, *lnf_mean, *lnf_rstd, *losses;
    size_t gelu_slots, ln_slots, block_slots, resid_slots;

    // recompute: what backward computes again instead of keeping it. Of 16C values per token and layer 0
    // keeps all; 1 drops GELU's output, 4C; 2 that and the LayerNorms', 6C; 3 whole blocks, all but C.
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

    // Those of one block.
    struct Block {
        const F* resid;  // (M,C), what the block reads: the embedding, or the block before's resid3
        F* qkv;          // (M,3C)
        F* resid2;       // (M,C), after attention
        F* fch;          // (M,4C), before GELU
        F* resid3;       // (M,C), what the block leaves
        A *ln1, *atty, *ln2, *fch_gelu;                          // (M,C), (M,C), (M,C), (M,4C)
        float *ln1_mean, *ln1_rstd, *lse, *ln2_mean, *ln2_rstd;  // (M) each; lse (B,NH,T)
    };
    // Block l's, in a batch of M rows.
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
