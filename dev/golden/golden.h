// golden.h - reads golden.bin, PyTorch's values for small models, which golden.py writes.
//
//     Golden g = read_golden("dev/golden/golden.bin", "grover_erf");   // or "gpt2", "grover_tanh"
//
// The file: four int32 (magic number, format, number of tensors, bytes of text), a line of text with the
// script and the versions that wrote it, then for each tensor a TensorHeader and its data. The head of
// golden.py lists the tensors.
#pragma once

#include <map>

#include "lib/gpt2.h"

// One case of the file.
struct Golden {
    std::string text;  // the script and the versions that wrote the file
    Config cfg;
    size_t B, T;
    std::vector<int32_t> tokens, targets;  // (B,T); the loss leaves out targets of -1
    std::vector<float> params, grads;      // all 16 tensors, in the order of lib/gpt2.h
    std::vector<float> logits;             // (B,T,V)
    float loss;                            // mean over the targets
    std::vector<float> losses;             // before each of ten AdamW steps, and after the last
    std::vector<float> norms;              // of the gradients, before each step's clipping

    // The number of targets in the loss.
    size_t counted() const {
        size_t n = 0;
        for (int32_t t : targets) n += t >= 0;
        return n;
    }
};

// A golden file in memory. Anything wrong with the file, or a tensor that it does not have, is an Error.
class GoldenFile {
  public:
    std::string text;  // the script and the versions that wrote the file

    explicit GoldenFile(const std::string& path) : path_(path) {
        Reader r(path);
        const char* name = path.c_str();
        int32_t head[4];
        r.read(head, sizeof head, "header");
        if (head[0] != MAGIC)
            fail("%s: is not a golden file: magic number is %d, wanted %d", name, head[0], MAGIC);
        if (head[1] != 1) fail("%s: format is %d, wanted 1", name, head[1]);
        if (head[2] < 1 || head[2] > 4096)
            fail("%s: number of tensors is %d, wanted 1 to 4096", name, head[2]);
        if (head[3] < 1 || head[3] > 4096)
            fail("%s: length of the text is %d, wanted 1 to 4096", name, head[3]);
        text.resize(head[3]);
        r.read(&text[0], text.size(), "text");
        for (int32_t i = 0; i < head[2]; i++) read_tensor(r);
        r.expect_size(r.pos);
    }
    // The data of the tensor, which must have this type and shape.
    const std::vector<float>& floats(const std::string& name, std::vector<size_t> shape) const {
        return get(name, shape, FLOAT32).f;
    }
    const std::vector<int32_t>& ints(const std::string& name, std::vector<size_t> shape) const {
        return get(name, shape, INT32).i;
    }
    // The tensor's shape.
    std::vector<size_t> shape(const std::string& name) const { return find(name).shape; }

  private:
    enum Type { FLOAT32 = 0, INT32 = 1 };
    static constexpr int32_t MAGIC = 0x444c4f47;  // "GOLD"
    struct TensorHeader {
        char name[24];
        int32_t type, ndim, dim[4];
    };
    static_assert(sizeof(TensorHeader) == 48, "the file's layout");
    struct Tensor {
        int32_t type;
        std::vector<size_t> shape;
        std::vector<float> f;
        std::vector<int32_t> i;
    };

    void read_tensor(Reader& r) {
        TensorHeader h;
        r.read(&h, sizeof h, "a tensor's header");
        if (!h.name[0] || h.name[23]) fail("%s: a tensor's name is empty or not terminated", path_.c_str());
        std::string where = strf("%s: tensor '%s'", path_.c_str(), h.name);
        if (tensors_.count(h.name)) fail("%s: occurs twice", where.c_str());
        if (h.type != FLOAT32 && h.type != INT32)
            fail("%s: type is %d, wanted 0 or 1", where.c_str(), h.type);
        if (h.ndim < 1 || h.ndim > 4) fail("%s: has %d dimensions, wanted 1 to 4", where.c_str(), h.ndim);
        Tensor& t = tensors_[h.name];
        t.type = h.type;
        size_t n = 1;
        for (int d = 0; d < 4; d++) {
            if (h.dim[d] < 1 || (d >= h.ndim && h.dim[d] != 1))
                fail("%s: dimension %d is %d", where.c_str(), d, h.dim[d]);
            n = checked_mul(n, h.dim[d], where.c_str());
            if (d < h.ndim) t.shape.push_back(h.dim[d]);
        }
        if (n > (r.size - r.pos) / 4) fail("%s: truncated: %zu numbers wanted", where.c_str(), n);
        if (t.type == INT32) {
            t.i.resize(n);
            return r.read(t.i.data(), n * 4, h.name);
        }
        t.f.resize(n);
        r.read(t.f.data(), n * 4, h.name);
        for (float x : t.f)
            if (!std::isfinite(x)) fail("%s: holds NaN or infinity", where.c_str());
    }
    const Tensor& find(const std::string& name) const {
        auto it = tensors_.find(name);
        if (it == tensors_.end()) fail("%s: has no tensor '%s'", path_.c_str(), name.c_str());
        return it->second;
    }
    const Tensor& get(const std::string& name, const std::vector<size_t>& shape, Type type) const {
        const Tensor& t = find(name);
        auto print = [](const std::vector<size_t>& s) {
            std::string out;
            for (size_t d : s) out += (out.empty() ? "" : " x ") + std::to_string(d);
            return out;
        };
        if (t.type != type || t.shape != shape)
            fail("%s: tensor '%s' is %s %s, wanted %s %s", path_.c_str(), name.c_str(),
                 t.type == INT32 ? "int32" : "float32", print(t.shape).c_str(),
                 type == INT32 ? "int32" : "float32", print(shape).c_str());
        return t;
    }

    std::string path_;
    std::map<std::string, Tensor> tensors_;
};

// Reads one case and checks all of it: shapes, ranges of tokens and targets, zeros in wte's rows from V on.
inline Golden read_golden(const std::string& path, const std::string& name) {
    GoldenFile file(path);
    Golden g;
    g.text = file.text;
    const std::vector<int32_t>&c = file.ints("config", {8}), &switches = file.ints(name + "/switches", {2});
    g.cfg.maxT = c[0], g.cfg.V = c[1], g.cfg.L = c[2], g.cfg.NH = c[3], g.cfg.C = c[4], g.cfg.Vp = c[5];
    g.cfg.arch = switches[0], g.cfg.activation = switches[1];
    check_config(g.cfg, path.c_str());

    std::vector<size_t> batch = file.shape("tokens");
    if (batch.size() != 2) fail("%s: tokens has %zu dimensions, wanted 2", path.c_str(), batch.size());
    g.B = batch[0], g.T = batch[1];
    if (g.T > (size_t)g.cfg.maxT)
        fail("%s: T is %zu, wanted at most maxT = %d", path.c_str(), g.T, g.cfg.maxT);
    g.tokens = file.ints("tokens", batch), g.targets = file.ints("targets", batch);
    for (int32_t t : g.tokens)
        if (t < 0 || t >= g.cfg.V) fail("%s: token is %d, wanted 0 to %d", path.c_str(), t, g.cfg.V - 1);
    for (int32_t t : g.targets)
        if (t < -1 || t >= g.cfg.V) fail("%s: target is %d, wanted -1 to %d", path.c_str(), t, g.cfg.V - 1);
    if (!g.counted()) fail("%s: every target is -1", path.c_str());

    ParamTable table = param_table(g.cfg);
    for (int i = 0; i < NUM_PARAMS; i++) {
        const ParamInfo& info = table[i];
        std::vector<size_t> shape{info.cols};
        if (info.decay) shape.insert(shape.begin(), info.rows);
        if (i != WTE && i != WPE && i != LNFW && i != LNFB) shape.insert(shape.begin(), (size_t)g.cfg.L);
        for (bool grad : {false, true}) {
            std::string full = (grad ? name + "/" : "") + info.name;
            const std::vector<float>& x = file.floats(full, shape);
            if (i == WTE)
                for (size_t j = (size_t)g.cfg.V * g.cfg.C; j < x.size(); j++)
                    if (x[j] != 0)
                        fail("%s: tensor '%s' is not zero in row %zu", path.c_str(), full.c_str(),
                             j / g.cfg.C);
            std::vector<float>& all = grad ? g.grads : g.params;
            all.insert(all.end(), x.begin(), x.end());
        }
    }
    g.logits = file.floats(name + "/logits", {g.B, g.T, (size_t)g.cfg.V});
    g.loss = file.floats(name + "/loss", {1})[0];
    g.losses = file.floats(name + "/losses", {11});
    g.norms = file.floats(name + "/norms", {10});
    return g;
}
