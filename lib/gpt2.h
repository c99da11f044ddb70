// gpt2.h - the model on paper: its sizes, its 16 parameter tensors and where they stand, and its checkpoint
// file.
//
// GPT-2 (Radford et al. 2019) as published, and GROVER (Zellers et al. 2019), the block that
// AraGPT2-large and -mega use: its skip connection starts from the LayerNorm's output,
//     GPT-2:   r = x + attention(LN1(x))             y = r + MLP(LN2(r))
//     GROVER:  h = LN1(x), r = h + attention(h)      y = r + MLP(LN2(r))
// Sixteen tensors in this order, each holding all layers:
//     wte (Vp,C)  wpe (maxT,C)  ln1w ln1b (L,C)  qkvw (L,3C,C)  qkvb (L,3C)  attprojw (L,C,C)
//     attprojb (L,C)  ln2w ln2b (L,C)  fcw (L,4C,C)  fcb (L,4C)  fcprojw (L,C,4C)  fcprojb (L,C)
//     lnfw lnfb (C)
// Matrices are (out, in). Vp is V padded up to a multiple of 128; padded rows are zero and stay zero.
//
// Files hold them in this order, tensor by tensor. Memory holds them layer by layer (ParamLayout), and so do
// gradients and the optimizer's moments. Code reaches them through Params: w.wte, w.layer(l).fcw.
//
// The model file is llm.c's, so that its published files load as they are: 256 int32, then the tensors.
//     [0] 20240326  [1] 3 = fp32, 5 = bf16  [2] maxT [3] V [4] L [5] NH [6] C [7] Vp
//     ours, 0 in llm.c's files: [8] arch, [9] activation, [10] LayerNorm's epsilon as a float's bits (0:
//     1e-5)
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "lib/io.h"
#include "lib/rng.h"

enum Arch { GPT2_ARCH = 0, GROVER_ARCH = 1 };
enum Activation { GELU_TANH = 0, GELU_ERF = 1 };
constexpr float LAYERNORM_EPS = 1e-5f;

struct Config {
    int maxT = 1024, V = 50257, Vp = 50304, L = 12, NH = 12, C = 768;
    int arch = GPT2_ARCH, activation = GELU_TANH;
    float eps = LAYERNORM_EPS;  // of every LayerNorm

    int hs() const { return C / NH; }
    bool same_shape(const Config& o) const {
        return maxT == o.maxT && V == o.V && Vp == o.Vp && L == o.L && NH == o.NH && C == o.C &&
               arch == o.arch && activation == o.activation && eps == o.eps;
    }
    std::string text() const {
        return strf("%s, %d layers, %d heads, %d channels, context %d, vocabulary %d",
                    arch == GPT2_ARCH ? "GPT-2" : "GROVER", L, NH, C, maxT, V);
    }
};

inline int pad_vocab(int V) { return (V + 127) / 128 * 128; }

// Throws with the field's name where a size is impossible. `where` starts the message (file or flag).
inline void check_config(const Config& c, const char* where) {
    struct {
        const char* name;
        int value, lo, hi;
    } range[] = {{"maxT", c.maxT, 1, 1 << 20}, {"V", c.V, 1, 1 << 20},
                 {"Vp", c.Vp, 1, 1 << 21},     {"L", c.L, 1, 4096},
                 {"NH", c.NH, 1, 4096},        {"C", c.C, 1, 1 << 17},
                 {"arch", c.arch, 0, 1},       {"activation", c.activation, 0, 1}};
    for (auto& r : range)
        if (r.value < r.lo || r.value > r.hi)
            fail("%s: %s is %d, wanted %d to %d", where, r.name, r.value, r.lo, r.hi);
    if (!(c.eps > 0 && c.eps <= 1))
        fail("%s: LayerNorm's epsilon is %g, wanted above 0 and at most 1", where, c.eps);
    if (c.C % c.NH) fail("%s: C is %d, wanted a multiple of NH = %d", where, c.C, c.NH);
    if (c.Vp < c.V) fail("%s: Vp is %d, wanted at least V = %d", where, c.Vp, c.V);
}

// ---------------------------------------------------------------------------------------------
// The parameters

constexpr int NUM_PARAMS = 16;
enum ParamId {
    WTE,
    WPE,
    LN1W,
    LN1B,
    QKVW,
    QKVB,
    ATTPROJW,
    ATTPROJB,
    LN2W,
    LN2B,
    FCW,
    FCB,
    FCPROJW,
    FCPROJB,
    LNFW,
    LNFB
};

// How a tensor begins: normal with standard deviation 0.02; normal with 0.02/sqrt(2L), for projections into
// the residual stream; all ones; all zeros.
enum Init { NORMAL, RESIDUAL, ONES, ZEROS };

struct ParamInfo {
    const char* name;
    size_t rows, cols;  // of one layer; a vector has rows 1
    bool in_block;      // one in each of the L blocks; else one in the model
    bool decay;         // weight decay applies: matrices and embeddings, as in nanoGPT
    Init init;
    size_t layers;                                           // L or 1
    bool block_matrix() const { return in_block && decay; }  // what the optimizer Muon updates
    size_t per_layer() const { return rows * cols; }
    size_t size() const { return rows * cols * layers; }
};

using ParamTable = std::array<ParamInfo, NUM_PARAMS>;

// All that the programs know of a parameter tensor, in the order of ParamId and of the model file.
inline ParamTable param_table(const Config& c) {
    size_t C = c.C, L = c.L, Vp = c.Vp, T = c.maxT;
    return {{{"wte", Vp, C, false, true, NORMAL, 1},
             {"wpe", T, C, false, true, NORMAL, 1},
             {"ln1w", 1, C, true, false, ONES, L},
             {"ln1b", 1, C, true, false, ZEROS, L},
             {"qkvw", 3 * C, C, true, true, NORMAL, L},
             {"qkvb", 1, 3 * C, true, false, ZEROS, L},
             {"attprojw", C, C, true, true, RESIDUAL, L},
             {"attprojb", 1, C, true, false, ZEROS, L},
             {"ln2w", 1, C, true, false, ONES, L},
             {"ln2b", 1, C, true, false, ZEROS, L},
             {"fcw", 4 * C, C, true, true, NORMAL, L},
             {"fcb", 1, 4 * C, true, false, ZEROS, L},
             {"fcprojw", C, 4 * C, true, true, RESIDUAL, L},
             {"fcprojb", 1, C, true, false, ZEROS, L},
             {"lnfw", 1, C, false, false, ONES, 1},
             {"lnfb", 1, C, false, false, ZEROS, 1}}};
}

inline size_t num_params(const Config& c) {
    size_t n = 0;
    for (const ParamInfo& p : param_table(c)) n += p.size();
    return n;
}

// Where each tensor starts in the file (elements, the header left out); [NUM_PARAMS] is the total.
inline std::array<size_t, NUM_PARAMS + 1> param_offsets(const Config& c) {
    std::array<size_t, NUM_PARAMS + 1> off{};
    ParamTable t = param_table(c);
    for (int i = 0; i < NUM_PARAMS; i++) off[i + 1] = off[i] + t[i].size();
    return off;
}

enum Part { EMBEDDINGS, BLOCK, FINAL_NORM };

// Where tensor `id` of a layer starts in memory (elements): the embeddings; block after block, in each first
// the tensors that decay, then the others; the final LayerNorm. Nothing lies between them, except that each
// of these parts is padded to a multiple of `multiple` elements. With fewer `slots` than blocks, blocks share
// memory: block l has slot l % slots.
class ParamLayout {
  public:
    ParamLayout() = default;
    explicit ParamLayout(const Config& c, size_t multiple = 1, size_t slots = SIZE_MAX)
        : slots_(std::min(slots, (size_t)c.L)) {
        ParamTable table = param_table(c);
        for (int id : {WTE, WPE}) start_[id] = first_block_, first_block_ += table[id].size();
        first_block_ = round_up(first_block_, multiple);
        for (bool decay : {true, false})
            for (int id = 0; id < NUM_PARAMS; id++)
                if (table[id].in_block && table[id].decay == decay)
                    start_[id] = block_, block_ += table[id].per_layer();
        block_ = round_up(block_, multiple);
        for (int id = 0; id < NUM_PARAMS; id++)
            if (table[id].in_block) start_[id] += first_block_, stride_[id] = block_;
        size_t end = first_block_ + slots_ * block_;
        for (int id : {LNFW, LNFB}) start_[id] = end, end += table[id].size();
        end_ = start_[LNFW] + round_up(end - start_[LNFW], multiple);
    }
    size_t at(int id, size_t layer = 0) const { return start_[id] + layer % slots_ * stride_[id]; }
    // Where a part of the model lies, and its number of elements, padding included.
    std::pair<size_t, size_t> range(Part part, size_t layer = 0) const {
        if (part == EMBEDDINGS) return {0, first_block_};
        if (part == BLOCK) return {first_block_ + layer % slots_ * block_, block_};
        return {start_[LNFW], end_ - start_[LNFW]};
    }
    size_t size() const { return end_; }  // elements of all parts

  private:
    std::array<size_t, NUM_PARAMS> start_{}, stride_{};
    size_t slots_ = 1, first_block_ = 0, block_ = 0, end_ = 0;  // where block 0 starts, a block's size, all
};

// One tensor of one layer, or one outside the blocks: where its elements are in the file and in memory.
struct ParamPiece {
    int id;
    size_t layer, file, memory, size;
    bool decay, block_matrix;  // as ParamInfo says
};
// All pieces in the file's order, laid out in memory as ParamLayout(c, multiple) says.
inline std::vector<ParamPiece> param_pieces(const Config& c, size_t multiple = 1) {
    std::vector<ParamPiece> pieces;
    ParamTable table = param_table(c);
    ParamLayout layout(c, multiple);
    size_t file = 0;
    for (int id = 0; id < NUM_PARAMS; id++)
        for (size_t l = 0; l < table[id].layers; l++) {
            size_t n = table[id].per_layer();
            pieces.push_back({id, l, file, layout.at(id, l), n, table[id].decay, table[id].block_matrix()});
            file += n;
        }
    return pieces;
}

// The tensors of one block.
template <class W>
struct Layer {
    W *ln1w, *ln1b, *qkvw, *qkvb, *attprojw, *attprojb, *ln2w, *ln2b, *fcw, *fcb, *fcprojw, *fcprojb;
};
// The tensors inside one array, laid out as ParamLayout says: parameters, or gradients.
template <class W>
struct Params {
    W *wte = nullptr, *wpe = nullptr, *lnfw = nullptr, *lnfb = nullptr;

    Params() = default;
    Params(W* base, const Config& c, size_t multiple = 1, size_t slots = SIZE_MAX)
        : base_(base), layout_(c, multiple, slots) {
        wte = tensor(WTE), wpe = tensor(WPE), lnfw = tensor(LNFW), lnfb = tensor(LNFB);
    }
    W* tensor(int id, size_t l = 0) const { return base_ + layout_.at(id, l); }
    Layer<W> layer(size_t l) const {
        return {tensor(LN1W, l),     tensor(LN1B, l),     tensor(QKVW, l),    tensor(QKVB, l),
                tensor(ATTPROJW, l), tensor(ATTPROJB, l), tensor(LN2W, l),    tensor(LN2B, l),
                tensor(FCW, l),      tensor(FCB, l),      tensor(FCPROJW, l), tensor(FCPROJB, l)};
    }

  private:
    W* base_ = nullptr;
    ParamLayout layout_;
};

// What a model can hand out or take in, array by array. MASTER is this rank's share of the fp32 weights, and
// exists only where ranks share out the optimizer's arrays of a bf16 model. Everywhere else PARAMS reads and
// writes the fp32 weights, if there are any. ADAM_M and ADAM_V are AdamW's moments, of all parameters or of
// those that Muon leaves to AdamW. MUON_M is the momentum of those that Muon updates (lib/optimizer.h).
enum State { PARAMS, GRADS, ADAM_M, ADAM_V, MASTER, MUON_M };
constexpr int NUM_STATES = 6;

// Bytes of the keys and values that generation keeps for N sequences of T tokens, in fp32.
inline size_t key_value_bytes(const Config& c, size_t N, size_t T) {
    return checked_mul(checked_mul(c.L, N, "sequences"), T * 2 * c.C * sizeof(float), "keys and values");
}

// GPT-2's initialisation from the seed, as the table's Init says; padded rows of wte are 0. Writes elements
// [first, first + n) of tensor `id` to w, counted over all layers as the file holds them.
inline void initial_weights(float* w, const Config& c, int id, size_t first, size_t n, uint64_t seed) {
    const ParamInfo info = param_table(c)[id];
    bool random = info.init == NORMAL || info.init == RESIDUAL;
    size_t drawn = !random ? 0 : id == WTE ? (size_t)c.V * c.C : info.size();  // elements below are random
    double std_dev = info.init == RESIDUAL ? 0.02 / std::sqrt(2.0 * c.L) : 0.02;
    float rest = info.init == ONES ? 1.0f : 0.0f;
    rng::Key key(seed, 0, rng::INIT, (uint32_t)id);
#pragma omp parallel for schedule(static)
    for (size_t j = 0; j < n; j++) w[j] = first + j < drawn ? (float)(std_dev * key.normal(first + j)) : rest;
}

// Floating-point operations of one training step over B sequences of T tokens, counted as usual
// (Kaplan et al. 2020): 6 per parameter and token, wpe left out, plus attention counted in full.
inline double step_flops(const Config& c, double B, double T) {
    double N = (double)num_params(c) - (double)c.maxT * c.C - (double)(c.Vp - c.V) * c.C;
    return 6.0 * N * B * T + 12.0 * c.L * c.C * T * B * T;
}

// Published shapes and two small ones of our own.
struct Preset {
    const char* name;
    int L, NH, C, maxT;
};
constexpr Preset PRESETS[] = {{"tiny", 4, 4, 128, 64},
                              {"char", 6, 6, 384, 256},
                              {"gpt2", 12, 12, 768, 1024},
                              {"gpt2-medium", 24, 16, 1024, 1024},
                              {"gpt2-large", 36, 20, 1280, 1024},
                              {"gpt2-xl", 48, 25, 1600, 1024}};
inline std::vector<std::string> preset_names() {
    std::vector<std::string> names;
    for (const Preset& p : PRESETS) names.push_back(p.name);
    return names;
}
// The sizes of a preset, with GPT-2's vocabulary. Throws UsageError for an unknown name.
inline Config preset_config(const std::string& name) {
    std::string known;
    for (const Preset& p : PRESETS) {
        if (name == p.name) {
            Config c;
            c.L = p.L, c.NH = p.NH, c.C = p.C, c.maxT = p.maxT;
            return c;
        }
        known += std::string(known.empty() ? "" : ", ") + p.name;
    }
    throw UsageError(strf("--preset: '%s' is unknown; known are %s", name.c_str(), known.c_str()));
}

// ---------------------------------------------------------------------------------------------
// The numbers that are computed with: fp32, or bf16, the upper half of a float

enum Dtype { FP32, BF16 };

inline float bf16_to_float(uint16_t h) {
    uint32_t u = (uint32_t)h << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
// Rounds to nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

// ---------------------------------------------------------------------------------------------
// The model file

constexpr int32_t MODEL_MAGIC = 20240326, MODEL_FP32 = 3, MODEL_BF16 = 5;

inline std::vector<int32_t> model_header(const Config& c, int version) {
    std::vector<int32_t> h(256);
    const int32_t v[] = {MODEL_MAGIC, version, c.maxT, c.V, c.L, c.NH, c.C, c.Vp, c.arch, c.activation};
    std::copy(std::begin(v), std::end(v), h.begin());
    if (c.eps != LAYERNORM_EPS) memcpy(&h[10], &c.eps, 4);
    return h;
}

inline bool all_finite(const float* p, size_t n) {
    float zero = 0;  // stays 0 unless something is NaN or infinite
    for (size_t i = 0; i < n; i++) zero += p[i] * 0.0f;
    return zero == 0;
}

// Writes a model file piece by piece: construct, add() all parameters in order, finish(). NaN and infinity
// are refused, and what stood there before stays.
class ModelWriter {
  public:
    ModelWriter(const std::string& path, const Config& c, int version = MODEL_FP32)
        : path_(path), file_(path), bf16_(version == MODEL_BF16), left_(num_params(c)) {
        std::vector<int32_t> h = model_header(c, version);
        file_.write(h.data(), 1024);
    }
    void add(const float* p, size_t n) {
        if (n > left_) fail("model file: %zu parameters too many", n - left_);
        left_ -= n;
        if (!all_finite(p, n))
            fail("%s: not written, the parameters hold NaN or infinity; try a lower --learning_rate",
                 path_.c_str());
        if (!bf16_) return file_.write(p, n * 4);
        for (size_t i = 0; i < n; i += buf_.size()) {
            size_t k = std::min(n - i, buf_.size());
            for (size_t j = 0; j < k; j++) buf_[j] = float_to_bf16(p[i + j]);
            file_.write(buf_.data(), k * 2);
        }
    }
    void finish() {
        if (left_) fail("model file: %zu parameters missing", left_);
        file_.commit();
    }

  private:
    std::string path_;
    AtomicFile file_;
    bool bf16_;
    size_t left_;
    std::vector<uint16_t> buf_ = std::vector<uint16_t>(1 << 16);
};

// Reads a model file: the constructor checks header and length; read() hands out parameters in order as
// floats and refuses NaN and infinity.
class ModelReader {
  public:
    Config cfg;
    int version;

    explicit ModelReader(const std::string& path) : file_(path) {
        std::vector<int32_t> h = file_.header(MODEL_MAGIC, "model");
        version = h[1];
        if (version != MODEL_FP32 && version != MODEL_BF16)
            fail("%s: version is %d, wanted 3 (fp32) or 5 (bf16)", path.c_str(), version);
        cfg.maxT = h[2], cfg.V = h[3], cfg.L = h[4], cfg.NH = h[5], cfg.C = h[6], cfg.Vp = h[7];
        cfg.arch = h[8], cfg.activation = h[9];
        if (h[10]) memcpy(&cfg.eps, &h[10], 4);
        check_config(cfg, path.c_str());
        left_ = num_params(cfg);
        file_.expect_size(1024 + (uint64_t)left_ * (version == MODEL_FP32 ? 4 : 2));
    }
    void read(float* dst, size_t n) {
        if (n > left_) fail("%s: %zu parameters too many asked for", file_.path.c_str(), n - left_);
        left_ -= n;
        if (version == MODEL_FP32) {
            file_.read(dst, n * 4, "parameters");
        } else {
            for (size_t i = 0; i < n; i += buf_.size()) {
                size_t k = std::min(n - i, buf_.size());
                file_.read(buf_.data(), k * 2, "parameters");
                for (size_t j = 0; j < k; j++) dst[i + j] = bf16_to_float(buf_[j]);
            }
        }
        if (!all_finite(dst, n)) fail("%s: the parameters hold NaN or infinity", file_.path.c_str());
    }

  private:
    Reader file_;
    size_t left_;
    std::vector<uint16_t> buf_ = std::vector<uint16_t>(1 << 16);
};
