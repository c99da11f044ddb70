// attention_tiles.h - the tiles of attention on the CPU: how a head's scores are divided, packed, multiplied.
//
// A head has T queries, keys and values of hs numbers each, and T x T scores. Attention computes the scores
// one tile at a time: up to QUERIES queries by KEYS keys, which stay in the L1 cache between the products
// that write and read them. What attention does with a tile is in train_gpt2.cpp.
//
// A tile of scores S is stored transposed, (keys, QUERIES): a row holds one key's scores for all queries.
//   - A vector then holds VL queries of one key, one in each lane, so that the softmax, which sums over keys,
//     adds whole vectors and never sums across lanes.
//   - S then already has the layout that the micro-kernel reads its left factor in. Both products that follow
//     use S unpacked: S^T times keys or values, and S times queries or output gradients.
//
// All other operands are packed once and used in many tiles (see lib/gemm.h for panels and units):
//   - left: keys or values (keys, hs), for the scores, in row panels of up to gemm::MR keys;
//   - transposed: the right factor (hs, queries) of the scores;
//   - right: the right factor (keys or queries, hs) of a product whose result is hs wide.
#pragma once

#include "lib/gemm.h"
#include "lib/memory.h"

namespace tiles {

using simd::ivec;
using simd::vec;
using simd::VL;

constexpr size_t QUERIES = gemm::SCORES;    // in a tile
constexpr size_t PANELS = 112 / gemm::MR;   // row panels of keys in a block of keys
constexpr size_t KEYS = PANELS * gemm::MR;  // keys in a block: 108 to 112
static_assert(QUERIES % gemm::NR == 0, "a block of queries begins with a panel");
static_assert(KEYS % 2 == 0, "KEYS numbers are whole units in bf16, which are pairs");

// Queries [q0, q0 + queries) and, of one block of keys, those that any of these queries sees: [k0, k0 +
// keys). Query i sees keys 0 to i (the causal mask).
struct Tile {
    size_t q0, queries, k0, keys;
    size_t first_panel, end_panel;  // row panels of these keys
    size_t block_keys;              // all keys of the block

    // The first of the tile's queries that sees key k0 + k.
    size_t first_query(size_t k) const { return k0 + k > q0 ? k0 + k - q0 : 0; }
    // How many of the tile's keys query q0 + q sees: the first ones.
    size_t keys_seen(size_t q) const { return q0 + q < k0 ? 0 : std::min(keys, q0 + q - k0 + 1); }
};

// VL queries of a tile, one in each lane, from column `first` of the tile on.
struct Lanes {
    size_t first;
    size_t keys;  // how many keys any of them sees
    ivec last;    // the last key that each sees, counted from k0; -1 where it sees none, or is no query

    Lanes(const Tile& t, size_t first_) : first(first_), keys(0) {
        ivec lane;
        for (size_t i = 0; i < VL; i++) lane[i] = (int)i;
        ivec seen = lane + ((int)(t.q0 + first) - (int)t.k0);
        last = lane < (int)t.queries - (int)first ? seen : -1;
        if (first < t.queries) keys = t.keys_seen(first + VL - 1);
    }
    // x in the lanes that see the key, `other` in those that do not.
    vec where_seen(size_t key, vec x, vec other = vec{}) const { return last >= (int)key ? x : other; }
};

// The tiles of one head, and their products, of floats or of numbers rounded to bf16. `ld` is the distance
// between rows in values.
struct Head {
    size_t T, hs;
    Dtype dtype;

    size_t key_blocks() const { return ceil_div(gemm::row_panels(T), PANELS); }
    // The tile of the block of queries that begins with q0, a multiple of QUERIES, and a block of keys.
    Tile tile(size_t q0, size_t block) const {
        size_t first = block * PANELS, end = std::min(first + PANELS, gemm::row_panels(T));
        size_t k0 = gemm::panel_row(T, first);
        Tile t = {q0, std::min(QUERIES, T - q0), k0, 0, first, first, gemm::panel_row(T, end) - k0};
        while (t.end_panel < end && k0 + t.keys < q0 + t.queries)
            t.keys = gemm::panel_row(T, ++t.end_panel) - k0;
        return t;
    }
    // All keys of a block: the tile of the last block of queries, which sees every key.
    Tile whole_block(size_t block) const { return tile((T - 1) / QUERIES * QUERIES, block); }

    // Units of a row of left, and of a query in transposed.
    size_t units() const { return gemm::units(dtype, hs); }
    // Floats of memory for each row of left and transposed; and of right, padded to whole panels.
    size_t summed_floats() const { return round_up(hs, 16); }
    size_t right_floats() const { return round_up(hs, gemm::NR); }

    // Packs the tile's rows of a left factor; src is its first row.
    void pack_left(float* dst, const float* src, size_t ld, const Tile& t) const {
        each_panel(t, [&](size_t r, size_t height) {
            gemm::pack(dtype, dst + r * units(), height, src + r * ld, ld, 1, height, hs);
        });
    }
    // Packs src (rows, hs) as the right factor (hs, rows).
    void pack_transposed(float* dst, const float* src, size_t ld, size_t rows) const {
        pack_columns(dst, src, 1, ld, hs, rows);
    }
    // Packs src (rows, hs) as the right factor (rows, hs).
    void pack_right(float* dst, const float* src, size_t ld, size_t rows) const {
        pack_columns(dst, src, ld, 1, rows, hs);
    }

    // S (keys, QUERIES) = left (keys, hs) times transposed (hs, queries). Panels are skipped where no query
    // of theirs sees any of their keys; S then keeps what it held.
    void scores(float* S, const float* left, const float* transposed, const Tile& t) const {
        each_panel(t, [&](size_t r, size_t height) {
            for (size_t q = t.first_query(r) / gemm::NR * gemm::NR; q < t.queries; q += gemm::NR)
                gemm::tile(dtype, gemm::PANEL, height, gemm::NR, units(), left + r * units(),
                           transposed + q * units(), S + r * QUERIES + q, QUERIES, false);
        });
    }
    // out (queries, hs) += S^T (queries, keys) times right (block's keys, hs). S is 0 where a query does not
    // see a key. converted: room for QUERIES x KEYS floats.
    void add_over_keys(float* out, const float* S, const float* right, const Tile& t,
                       float* converted) const {
        if (dtype == BF16)
            gemm::pack(dtype, converted, QUERIES, S, 1, QUERIES, QUERIES, t.keys), S = converted;
        size_t panel_units = gemm::units(dtype, t.block_keys);
        for (size_t i = 0; i < gemm::row_panels(t.queries); i++) {
            size_t r = gemm::panel_row(t.queries, i), end = gemm::panel_row(t.queries, i + 1);
            size_t seen_units = gemm::units(dtype, t.keys_seen(end - 1));
            for (size_t c = 0; c < hs && seen_units; c += gemm::NR)
                gemm::tile(dtype, gemm::SCORE_COLUMNS, end - r, std::min(gemm::NR, hs - c), seen_units, S + r,
                           right + c * panel_units, out + r * hs + c, hs, true);
        }
    }
    // out (keys, hs) += S (keys, queries) times right (queries, hs). S is 0 where a query does not see a key.
    // converted: room for QUERIES x KEYS floats.
    void add_over_queries(float* out, const float* S, const float* right, const Tile& t,
                          float* converted) const {
        size_t per_unit = gemm::per_unit(dtype), panel_units = gemm::units(dtype, t.queries);
        if (dtype == BF16) gemm::to_units(dtype, converted, S, t.keys * QUERIES), S = converted;
        each_panel(t, [&](size_t r, size_t height) {
            size_t u = t.first_query(r) / per_unit;  // earlier queries see none of the panel's keys
            for (size_t c = 0; c < hs; c += gemm::NR)
                gemm::tile(dtype, gemm::SCORE_ROWS, height, std::min(gemm::NR, hs - c), panel_units - u,
                           S + r * QUERIES / per_unit + u, right + c * panel_units + u * gemm::NR,
                           out + r * hs + c, hs, true);
        });
    }

    // F (keys, QUERIES) = dropout's factors for a tile of probabilities. row: number of the first query's row
    // of probabilities among the rows of all heads and sequences of the whole batch. A row's elements are
    // numbered in order, and drawn in order; F is the transpose. spare: room for QUERIES x KEYS floats.
    void dropout_factors(float* F, const rng::Dropout& drop, uint64_t row, const Tile& t,
                         float* spare) const {
        float ones[KEYS];
        std::fill(ones, ones + KEYS, 1.0f);
        for (size_t i = 0; i < QUERIES; i++) {
            size_t seen = i < t.queries ? t.keys_seen(i) : 0;
            drop.apply(spare + i * t.keys, ones, (row + i) * T + t.k0, seen);
            std::fill(spare + i * t.keys + seen, spare + (i + 1) * t.keys, 0.0f);
        }
        gemm::pack(FP32, F, QUERIES, spare, t.keys, 1, QUERIES, t.keys);
    }

  private:
    // Calls f(row, height) for the tile's row panels of keys; rows are counted from k0.
    template <class F>
    void each_panel(const Tile& t, F f) const {
        for (size_t i = t.first_panel; i < t.end_panel; i++)
            f(gemm::panel_row(T, i) - t.k0, gemm::panel_row(T, i + 1) - gemm::panel_row(T, i));
    }
    // Packs a right factor (K, N), whose element (k, n) is src[k * row + n * col], in panels of NR columns.
    void pack_columns(float* dst, const float* src, size_t row, size_t col, size_t K, size_t N) const {
        for (size_t n = 0; n < N; n += gemm::NR)
            gemm::pack(dtype, dst + n * gemm::units(dtype, K), gemm::NR, src + n * col, col, row,
                       std::min(gemm::NR, N - n), K);
    }
};

// ---------------------------------------------------------------------------------------------
// One thread's scratch memory

// Of attention's forward pass over one head.
struct ForwardScratch {
    float *k_left, *v_right;    // all keys and values
    float *q_transposed, *out;  // one block of queries; the sum of their outputs
    float *S, *F, *spare;       // tiles: scores, dropout's factors, working space

    void place(Arena& a, size_t T, size_t hs) {
        Head h = {T, hs, FP32};
        size_t summed = h.summed_floats();
        k_left = a.take<float>(T, summed), v_right = a.take<float>(h.key_blocks(), KEYS, h.right_floats());
        q_transposed = a.take<float>(QUERIES, summed), out = a.take<float>(QUERIES, summed);
        for (float** tile : {&S, &F, &spare}) *tile = a.take<float>(QUERIES, KEYS);
    }
};

// Of attention's backward pass over one head.
struct BackwardScratch {
    float *q_transposed, *dout_transposed, *q_right, *dout_right;  // all queries
    float *dq, *D;                                                 // of all queries
    float *k_left, *v_left, *k_right, *dk, *dv;                    // one block of keys
    float *S, *dS, *F, *spare;  // tiles: scores and their gradients, dropout's factors, working space

    void place(Arena& a, size_t T, size_t hs) {
        Head h = {T, hs, FP32};
        size_t summed = h.summed_floats(), right = h.right_floats(), t = round_up(T, QUERIES);
        q_transposed = a.take<float>(t, summed), dout_transposed = a.take<float>(t, summed);
        q_right = a.take<float>(t, right), dout_right = a.take<float>(t, right);
        dq = a.take<float>(t, summed), D = a.take<float>(t);
        k_left = a.take<float>(KEYS, summed), v_left = a.take<float>(KEYS, summed);
        k_right = a.take<float>(KEYS, right);
        dk = a.take<float>(KEYS, summed), dv = a.take<float>(KEYS, summed);
        for (float** tile : {&S, &dS, &F, &spare}) *tile = a.take<float>(QUERIES, KEYS);
    }
};

// A thread's scratch memory of either kind, in `memory`.
template <class Scratch>
Scratch scratch_in(float* memory, size_t T, size_t hs) {
    Arena a;
    a.base = (char*)memory;
    Scratch s;
    s.place(a, T, hs);
    return s;
}
// Floats of it that a thread needs for both passes.
inline size_t scratch_floats(size_t T, size_t hs) {
    Arena forward, backward;
    ForwardScratch().place(forward, T, hs), BackwardScratch().place(backward, T, hs);
    return std::max(forward.used, backward.used) / sizeof(float);
}

}  // namespace tiles
