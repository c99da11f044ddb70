// convert_gpt2.cpp - converts GPT-2 and AraGPT2 checkpoints from Hugging Face's format to a model
// file and back.
//
//     ./convert_gpt2 from-hf DIR out.bin     config.json and model.safetensors in DIR -> model file
//     ./convert_gpt2 to-hf in.bin DIR        model file -> config.json and model.safetensors in DIR, and the
//                                            files of its tokenizer
//
// The parts, in reading order: JSON, safetensors files, the table of names, config.json, from_hf, to_hf.
// One tensor at a time is in memory, so 1.5 billion parameters are converted in 100 MB. Without --dtype no
// number changes: what was fp32 or bf16 comes back bit for bit, and fp16 becomes fp32 exactly.
#ifndef CONVERT_GPT2_CPP
#define CONVERT_GPT2_CPP

#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "lib/flags.h"
#include "lib/gpt2.h"
#include "lib/run_folder.h"
#include "tokenizer/huggingface.h"

namespace convert {

// ---------------------------------------------------------------------------------------------
// JSON from untrusted files

using Json = nlohmann::json;
using ull = unsigned long long;  // what %llu prints

constexpr int MAX_JSON_DEPTH = 64;
constexpr size_t MAX_JSON_VALUES = 4000000;  // a model's header has some thousands, a tokenizer 200,000
constexpr uint64_t MAX_TEXT = 100000000;     // bytes; the same limit as the safetensors library's for headers

// Text from a file for an error message: printable and short.
inline std::string shown(std::string s) {
    for (char& c : s)
        if ((unsigned char)c < 32 || c == 127) c = '?';
    return s.size() <= 80 ? s : s.substr(0, 77) + "...";
}
inline std::string shown(const Json& j) {
    return shown(j.dump(-1, ' ', true, Json::error_handler_t::replace));
}

// Parses `text`. Depth and number of values are limited, so that a hostile file cannot exhaust the memory. A
// key that occurs twice in an object is an error, because readers disagree about which of the two counts.
inline Json parse_json(const std::string& text, const std::string& where) {
    std::vector<std::set<std::string>> open_objects;
    size_t values = 0;
    auto check = [&](int depth, Json::parse_event_t event, Json& value) {
        if (depth > MAX_JSON_DEPTH) fail("%s: JSON is nested deeper than %d", where.c_str(), MAX_JSON_DEPTH);
        if (++values > MAX_JSON_VALUES)
            fail("%s: JSON has more than %zu values", where.c_str(), MAX_JSON_VALUES);
        if (event == Json::parse_event_t::object_start) open_objects.emplace_back();
        if (event == Json::parse_event_t::object_end) open_objects.pop_back();
        if (event == Json::parse_event_t::key && !open_objects.back().insert(value.get<std::string>()).second)
            fail("%s: %s occurs twice", where.c_str(), shown(value).c_str());
        return true;
    };
    try {
        return Json::parse(text, check);
    } catch (const Json::parse_error& e) {
        fail("%s: is not JSON (byte %zu of %zu)", where.c_str(), e.byte, text.size());
    } catch (const Json::exception&) {
        fail("%s: is not JSON (a number is out of range)", where.c_str());
    }
}

inline std::string read_text(const std::string& path) {
    Reader file(path);
    if (file.size > MAX_TEXT)
        fail("%s: has %llu bytes, wanted at most %llu", path.c_str(), (ull)file.size, (ull)MAX_TEXT);
    return file.rest();
}

// A file with a JSON object, and typed access to its fields. A field that is null counts as absent.
class JsonFile {
  public:
    const std::string path;
    Json json;

    explicit JsonFile(const std::string& p) : path(p), json(parse_json(read_text(p), p)) {
        if (!json.is_object()) fail("%s: is %s, wanted an object", path.c_str(), shown(json).c_str());
    }
    const Json* find(const char* name) const {
        auto it = json.find(name);
        return it == json.end() || it->is_null() ? nullptr : &*it;
    }
    // A required size from 1 to `most`, under its name or its alias.
    int size(const char* name, const char* alias, int most) const {
        const Json *a = find(name), *b = find(alias);
        if (a && b && *a != *b)
            fail("%s: %s is %s, but %s is %s", path.c_str(), name, shown(*a).c_str(), alias,
                 shown(*b).c_str());
        if (!a) a = b;
        if (!a) fail("%s: %s is missing, wanted a whole number", path.c_str(), name);
        if (!a->is_number_unsigned() || a->get<uint64_t>() < 1 || a->get<uint64_t>() > (uint64_t)most)
            wrong(name, *a, strf("a whole number from 1 to %d", most));
        return a->get<int>();
    }
    bool flag(const char* name, bool fallback) const {
        const Json* j = find(name);
        if (j && !j->is_boolean()) wrong(name, *j, "true or false");
        return j ? j->get<bool>() : fallback;
    }
    double number(const char* name, double fallback) const {
        const Json* j = find(name);
        if (j && !j->is_number()) wrong(name, *j, "a number");
        return j ? j->get<double>() : fallback;
    }
    std::string text(const char* name, const char* fallback) const {
        const Json* j = find(name);
        if (j && !j->is_string()) wrong(name, *j, "a string");
        return j ? j->get<std::string>() : fallback;
    }
    [[noreturn]] void wrong(const char* name, const Json& found, const std::string& wanted) const {
        fail("%s: %s is %s, wanted %s", path.c_str(), name, shown(found).c_str(), wanted.c_str());
    }
};

// ---------------------------------------------------------------------------------------------
// Safetensors files. Such a file is a 64-bit header length, the header, and the tensors' numbers. The header
// is a JSON object that maps each tensor's name to its dtype, shape and data_offsets: where its bytes begin
// and end, counted from the end of the header.

constexpr size_t CHUNK = 1 << 20;  // how many numbers are read or written at once

struct Tensor {
    std::string name, dtype;  // the name as written in the file
    std::vector<uint64_t> shape;
    uint64_t begin = 0, end = 0;  // bytes, counted from the end of the header
    size_t file = 0;              // which of Safetensors's files
};

inline std::string shape_text(const std::vector<uint64_t>& shape) {
    std::string s;
    for (uint64_t d : shape) s += (s.empty() ? "" : ", ") + std::to_string(d);
    return "(" + s + ")";
}

// Bytes per number; 0 for an unknown dtype, which no tensor of a supported model has.
inline uint64_t dtype_bytes(const std::string& dtype) {
    static const std::map<std::string, uint64_t> bytes = {
        {"F64", 8},  {"I64", 8}, {"U64", 8}, {"F32", 4}, {"I32", 4}, {"U32", 4}, {"F16", 2},
        {"BF16", 2}, {"I16", 2}, {"U16", 2}, {"I8", 1},  {"U8", 1},  {"BOOL", 1}};
    auto it = bytes.find(dtype);
    return it == bytes.end() ? 0 : it->second;
}

// Converts IEEE half precision, exactly: every half-precision number is also a float.
inline float f16_to_float(uint16_t h) {
    uint32_t sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, fraction = h & 1023u;
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)fraction * 0x1p-24f;  // zeros and subnormals
    uint32_t u = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

// Parses a header and checks it: each tensor's bytes are inside the file's `data_bytes`, are as many
// as its shape says, and overlap no other tensor's. Gaps are allowed. Returns the tensors in the order
// of their data.
inline std::vector<Tensor> parse_header(const std::string& text, uint64_t data_bytes,
                                        const std::string& where) {
    Json header = parse_json(text, where + ": header");
    if (!header.is_object()) fail("%s: header is %s, wanted an object", where.c_str(), shown(header).c_str());
    std::vector<Tensor> tensors;
    for (auto& entry : header.items()) {
        if (entry.key() == "__metadata__") continue;
        Tensor t;
        t.name = entry.key();
        std::string at = where + ": tensor " + shown(t.name);
        const Json& j = entry.value();
        auto part = [&](const char* name) -> const Json& {
            if (!j.is_object() || !j.contains(name))
                fail("%s: %s is missing in the header", at.c_str(), name);
            return j[name];
        };
        auto whole_numbers = [&](const char* name) {
            const Json& list = part(name);
            bool good = list.is_array();
            for (const Json& d : list) good = good && d.is_number_unsigned();
            if (!good)
                fail("%s: %s is %s, wanted a list of whole numbers", at.c_str(), name, shown(list).c_str());
            return list.get<std::vector<uint64_t>>();
        };
        if (!part("dtype").is_string())
            fail("%s: dtype is %s, wanted a string", at.c_str(), shown(part("dtype")).c_str());
        t.dtype = part("dtype").get<std::string>();
        t.shape = whole_numbers("shape");
        std::vector<uint64_t> offsets = whole_numbers("data_offsets");
        if (offsets.size() != 2 || offsets[0] > offsets[1])
            fail("%s: data_offsets is %s, wanted begin and end", at.c_str(),
                 shown(part("data_offsets")).c_str());
        t.begin = offsets[0], t.end = offsets[1];
        if (t.end > data_bytes)
            fail("%s: data_offsets end at %llu, but the file has %llu bytes of data", at.c_str(), (ull)t.end,
                 (ull)data_bytes);
        if (uint64_t bytes = dtype_bytes(t.dtype)) {
            for (uint64_t d : t.shape) bytes = checked_mul(bytes, d, (at + ": shape").c_str());
            if (bytes != t.end - t.begin)
                fail("%s: data_offsets span %llu bytes, wanted %llu for %s %s", at.c_str(),
                     (ull)(t.end - t.begin), (ull)bytes, t.dtype.c_str(), shape_text(t.shape).c_str());
        }
        tensors.push_back(std::move(t));
    }
    std::sort(tensors.begin(), tensors.end(), [](const Tensor& a, const Tensor& b) {
        return std::tie(a.begin, a.end) < std::tie(b.begin, b.end);
    });
    for (size_t i = 1; i < tensors.size(); i++)
        if (tensors[i].begin < tensors[i - 1].end)
            fail("%s: tensors %s and %s overlap", where.c_str(), shown(tensors[i - 1].name).c_str(),
                 shown(tensors[i].name).c_str());
    return tensors;
}

// Converts pytorch_model.bin, or its shards, to model.safetensors. clone() because save_file refuses tensors
// that share memory, as tied matrices do.
constexpr const char* FROM_PYTORCH =
    "python3 -c \"import glob, torch; from safetensors.torch import save_file; d = {}; "
    "[d.update(torch.load(f, map_location='cpu', weights_only=True)) for f in "
    "sorted(glob.glob('pytorch_model*.bin'))]; "
    "save_file({k: v.clone().contiguous() for k, v in d.items()}, 'model.safetensors', {'format': 'pt'})\"";

// The published name of a tensor, without the prefix "transformer.". A model that was saved within a wrapper
// has the wrapper's name before its tensors' (torch.compile: _orig_mod, DistributedDataParallel: module), or
// before those of the blocks that were wrapped.
inline std::string published_name(const std::string& saved) {
    std::string name;
    bool at_start = true, prefixed = false;
    for (size_t begin = 0, end; begin <= saved.size(); begin = end + 1) {
        end = std::min(saved.find('.', begin), saved.size());
        const std::string part = saved.substr(begin, end - begin);
        if (part == "_orig_mod" || part == "module") continue;
        if (at_start && !prefixed && part == "transformer") {
            prefixed = true;
            continue;
        }
        name += (at_start ? "" : ".") + part;
        at_start = false;
    }
    return name;
}

// All tensors of a folder: those of model.safetensors, or of the shards that model.safetensors.index.json
// lists.
class Safetensors {
  public:
    std::string path;                       // for error messages: the file or the index
    std::map<std::string, Tensor> tensors;  // by published name, without the prefix "transformer."

    explicit Safetensors(const std::string& dir) : path(dir + "/model.safetensors") {
        std::string index = path + ".index.json";
        if (file_exists(path)) add_file(path);
        else if (file_exists(index)) add_shards(dir, path = index);
        else if (file_exists(dir + "/pytorch_model.bin") ||
                 file_exists(dir + "/pytorch_model.bin.index.json"))
            fail("%s: is missing; make it from pytorch_model.bin with: cd %s && %s", path.c_str(),
                 shell_quoted(dir).c_str(), FROM_PYTORCH);
        else fail("%s: is missing, and so is model.safetensors.index.json", path.c_str());
    }
    size_t num_files() const { return files_.size(); }
    const Tensor* find(const std::string& name) const {
        auto it = tensors.find(name);
        return it == tensors.end() ? nullptr : &it->second;
    }
    // The tensor, which must have `rank` dimensions.
    const Tensor& need(const std::string& name, size_t rank) const {
        const Tensor* t = find(name);
        if (!t) fail("%s: tensor %s is missing", path.c_str(), name.c_str());
        if (t->shape.size() != rank)
            fail("%s: shape is %s, wanted %zu dimensions", at(*t).c_str(), shape_text(t->shape).c_str(),
                 rank);
        return *t;
    }
    // Gives a tensor another name; an Error will show the one in the file.
    void rename(const std::string& from, const std::string& to) {
        auto entry = tensors.extract(from);
        entry.key() = to;
        tensors.insert(std::move(entry));
    }
    std::string at(const Tensor& t) const { return files_[t.file]->path + ": tensor " + shown(t.name); }

    // Reads n numbers of the tensor, beginning with number `first`, as floats. NaN and infinity are Errors.
    void read(const Tensor& t, uint64_t first, size_t n, float* dst) {
        Reader& file = *files_[t.file];
        file.seek(data_start_[t.file] + t.begin + first * dtype_bytes(t.dtype));
        if (t.dtype == "F32") {
            file.read(dst, n * 4, t.name.c_str());
        } else {
            half_.resize(std::min(n, CHUNK));
            for (size_t i = 0; i < n; i += CHUNK) {
                size_t k = std::min(CHUNK, n - i);
                file.read(half_.data(), k * 2, t.name.c_str());
                if (t.dtype == "BF16")
                    for (size_t j = 0; j < k; j++) dst[i + j] = bf16_to_float(half_[j]);
                else
                    for (size_t j = 0; j < k; j++) dst[i + j] = f16_to_float(half_[j]);
            }
        }
        float zero = 0;  // stays 0 unless a number is NaN or infinite
        for (size_t i = 0; i < n; i++) zero += dst[i] * 0.0f;
        if (zero == 0) return;
        size_t i = 0;
        while (dst[i] - dst[i] == 0) i++;
        fail("%s: element %llu is %f", at(t).c_str(), (ull)(first + i), dst[i]);
    }

  private:
    void add_file(const std::string& file_path) {
        files_.push_back(std::make_unique<Reader>(file_path));
        Reader& file = *files_.back();
        uint64_t length = 0;
        if (file.size >= 8) file.read(&length, 8, "header length");
        const char lfs[] = "version https://git-lfs";  // a clone without git-lfs has only such a pointer file
        if (memcmp(&length, lfs, 8) == 0)
            fail("%s: is a Git LFS pointer, not the tensors; fetch them with: git lfs pull",
                 file_path.c_str());
        if (file.size < 8)
            fail("%s: has %llu bytes, wanted a header length of 8", file_path.c_str(), (ull)file.size);
        if (length > MAX_TEXT)
            fail("%s: header length is %llu, wanted at most %llu", file_path.c_str(), (ull)length,
                 (ull)MAX_TEXT);
        if (length > file.size - 8)
            fail("%s: truncated: header length is %llu, but %llu bytes follow", file_path.c_str(),
                 (ull)length, (ull)(file.size - 8));
        std::string text(length, '\0');
        file.read(&text[0], length, "header");
        data_start_.push_back(8 + length);
        for (Tensor& t : parse_header(text, file.size - 8 - length, file_path)) {
            t.file = files_.size() - 1;
            std::string name = published_name(t.name);
            auto added = tensors.emplace(name, std::move(t));
            if (!added.second)
                fail("%s: tensor %s occurs twice, also as %s", file_path.c_str(), shown(name).c_str(),
                     at(added.first->second).c_str());
        }
    }
    void add_shards(const std::string& dir, const std::string& index_path) {
        JsonFile index(index_path);
        const Json* map = index.find("weight_map");
        if (!map || !map->is_object() || map->empty())
            fail("%s: weight_map is missing or empty", index_path.c_str());
        std::map<std::string, std::string> shard_of;
        std::set<std::string> shards;
        for (auto& entry : map->items()) {
            std::string shard = entry.value().is_string() ? entry.value().get<std::string>() : "";
            if (shard.empty() || shard[0] == '.' || shard.find('/') != std::string::npos ||
                shard.find('\0') != std::string::npos)
                fail("%s: weight_map of %s is %s, wanted a file name", index_path.c_str(),
                     shown(entry.key()).c_str(), shown(entry.value()).c_str());
            shard_of[entry.key()] = shard;
            shards.insert(shard);
        }
        for (const std::string& shard : shards) {
            if (!file_exists(dir + "/" + shard))
                fail("%s/%s: is missing, but %s lists it", dir.c_str(), shown(shard).c_str(),
                     index_path.c_str());
            add_file(dir + "/" + shard);
        }
        std::set<std::pair<std::string, std::string>> held;  // shard, tensor
        for (auto& entry : tensors) held.insert({files_[entry.second.file]->path, entry.second.name});
        for (auto& entry : shard_of)
            if (!held.count({dir + "/" + entry.second, entry.first}))
                fail("%s: weight_map places %s in %s, which lacks it", index_path.c_str(),
                     shown(entry.first).c_str(), shown(entry.second).c_str());
    }

    std::vector<std::unique_ptr<Reader>> files_;
    std::vector<uint64_t> data_start_;
    std::vector<uint16_t> half_;
};

// ---------------------------------------------------------------------------------------------
// Names: which published tensors belong to which of the model file's sixteen parameters

// '#' stands for the block's number. GPT-2's blocks begin with a LayerNorm, GROVER's end with one. So what
// the model file has as the first LayerNorm of layer l is the last one of GROVER's block l - 1, and for l = 0
// the one after the embedding, emb_norm.
enum Kind { TABLE, VECTOR, CONV1D };  // CONV1D is published as (in, out), in the model file (out, in)
struct Name {
    ParamId param;
    Kind kind;
    const char *gpt2, *grover;
    int grover_shift;
};
constexpr Name NAMES[] = {
    {WTE, TABLE, "wte.weight", "wte.weight", 0},
    {WPE, TABLE, "wpe.weight", "wpe.weight", 0},
    {LN1W, VECTOR, "h.#.ln_1.weight", "h.#.ln_2.weight", -1},
    {LN1B, VECTOR, "h.#.ln_1.bias", "h.#.ln_2.bias", -1},
    {QKVW, CONV1D, "h.#.attn.c_attn.weight", "h.#.attn.c_attn.weight", 0},
    {QKVB, VECTOR, "h.#.attn.c_attn.bias", "h.#.attn.c_attn.bias", 0},
    {ATTPROJW, CONV1D, "h.#.attn.c_proj.weight", "h.#.attn.c_proj.weight", 0},
    {ATTPROJB, VECTOR, "h.#.attn.c_proj.bias", "h.#.attn.c_proj.bias", 0},
    {LN2W, VECTOR, "h.#.ln_2.weight", "h.#.ln_1.weight", 0},
    {LN2B, VECTOR, "h.#.ln_2.bias", "h.#.ln_1.bias", 0},
    {FCW, CONV1D, "h.#.mlp.c_fc.weight", "h.#.mlp.c_fc.weight", 0},
    {FCB, VECTOR, "h.#.mlp.c_fc.bias", "h.#.mlp.c_fc.bias", 0},
    {FCPROJW, CONV1D, "h.#.mlp.c_proj.weight", "h.#.mlp.c_proj.weight", 0},
    {FCPROJB, VECTOR, "h.#.mlp.c_proj.bias", "h.#.mlp.c_proj.bias", 0},
    {LNFW, VECTOR, "ln_f.weight", "h.#.ln_2.weight", -1},
    {LNFB, VECTOR, "ln_f.bias", "h.#.ln_2.bias", -1},
};
static_assert(std::size(NAMES) == NUM_PARAMS, "a name for each tensor");

// One published tensor. (rows, cols) is its shape in the model file.
struct Slot {
    std::string name;
    Kind kind;
    size_t rows, cols, pad_rows;  // in the model file, pad_rows of zeros follow: the padded vocabulary

    size_t size() const { return rows * cols; }
    std::vector<uint64_t> published_shape() const {
        if (kind == VECTOR) return {cols};
        return kind == CONV1D ? std::vector<uint64_t>{cols, rows} : std::vector<uint64_t>{rows, cols};
    }
};

// All tensors, in the order of the model file.
inline std::vector<Slot> slots_of(const Config& c) {
    std::vector<Slot> slots;
    ParamTable table = param_table(c);
    for (const Name& n : NAMES) {
        const ParamInfo& p = table[n.param];
        for (size_t l = 0; l < p.layers; l++) {
            bool grover = c.arch == GROVER_ARCH, after_last = n.param == LNFW || n.param == LNFB;
            int block = (after_last ? c.L : (int)l) + (grover ? n.grover_shift : 0);
            std::string name = grover ? n.grover : n.gpt2;
            size_t mark = name.find('#');
            if (mark != std::string::npos && block < 0) name = "emb_norm" + name.substr(name.rfind('.'));
            else if (mark != std::string::npos) name.replace(mark, 1, std::to_string(block));
            size_t pad = n.param == WTE ? c.Vp - c.V : 0;
            slots.push_back({name, n.kind, p.rows - pad, p.cols, pad});
        }
    }
    return slots;
}

// The N of a name h.N.rest, and its rest; -1 for other names.
inline int block_number(const std::string& name, std::string* rest) {
    size_t i = 2;
    int n = 0;
    if (name.compare(0, 2, "h.") != 0) return -1;
    while (i < name.size() && i < 8 && name[i] >= '0' && name[i] <= '9') n = n * 10 + (name[i++] - '0');
    if (i == 2 || i >= name.size() || name[i] != '.') return -1;
    *rest = name.substr(i + 1);
    return n;
}
// Whether the tensor is a causal mask, which old versions of transformers saved with the weights.
inline bool is_mask_buffer(const std::string& name) {
    std::string rest;
    return block_number(name, &rest) >= 0 && (rest == "attn.bias" || rest == "attn.masked_bias");
}

// dst (cols, rows) = src (rows, cols) transposed, in tiles that fit into the cache.
inline void transpose(float* dst, const float* src, size_t rows, size_t cols) {
    constexpr size_t TILE = 32;
    for (size_t r0 = 0; r0 < rows; r0 += TILE)
        for (size_t c0 = 0; c0 < cols; c0 += TILE)
            for (size_t r = r0; r < std::min(rows, r0 + TILE); r++)
                for (size_t c = c0; c < std::min(cols, c0 + TILE); c++) dst[c * rows + r] = src[r * cols + c];
}

// Copies one tensor from read(first, n, dst) to write(src, n). A Conv1D matrix is read as a whole and
// transposed; (rows, cols) is its shape as read. Everything else is copied in chunks.
template <class Read, class Write>
void pass_tensor(const Slot& s, size_t rows, size_t cols, Read read, Write write) {
    std::vector<float> in(s.kind == CONV1D ? s.size() : std::min(CHUNK, s.size()));
    if (s.kind == CONV1D) {
        std::vector<float> turned(s.size());
        read(0, s.size(), in.data());
        transpose(turned.data(), in.data(), rows, cols);
        return write(turned.data(), s.size());
    }
    for (size_t i = 0; i < s.size(); i += CHUNK) {
        size_t n = std::min(CHUNK, s.size() - i);
        read(i, n, in.data());
        write(in.data(), n);
    }
}

// ---------------------------------------------------------------------------------------------
// config.json

struct ActivationName {
    const char* name;
    Activation kind;
};
// to_hf writes the first name of each kind.
constexpr ActivationName ACTIVATIONS[] = {{"gelu_new", GELU_TANH},
                                          {"gelu_pytorch_tanh", GELU_TANH},
                                          {"gelu_fast", GELU_TANH},
                                          {"gelu", GELU_ERF},
                                          {"gelu_python", GELU_ERF}};

// The configuration as far as config.json gives it. Whatever the trainer does not compute is an Error.
inline Config config_from_json(const JsonFile& f) {
    std::string type = f.text("model_type", "gpt2");
    if (type != "gpt2" && type != "aragpt2") f.wrong("model_type", type, "gpt2 or aragpt2");
    Config c;
    c.L = f.size("n_layer", "num_hidden_layers", 4096);
    c.C = f.size("n_embd", "hidden_size", 1 << 17);
    c.NH = f.size("n_head", "num_attention_heads", 4096);
    c.V = f.size("vocab_size", "vocab_size", 1 << 20);
    c.maxT = f.size("n_positions", "max_position_embeddings", 1 << 20);
    c.Vp = pad_vocab(c.V);
    if (c.C % c.NH) fail("%s: n_head is %d, wanted a divisor of n_embd = %d", f.path.c_str(), c.NH, c.C);
    if (const Json* inner = f.find("n_inner"))
        if (*inner != 4 * c.C) f.wrong("n_inner", *inner, strf("null or 4 n_embd = %d", 4 * c.C));

    struct {
        const char* name;
        bool implemented;  // and the value where the field is absent
    } flags[] = {{"scale_attn_weights", true},
                 {"scale_attn_by_inverse_layer_idx", false},
                 {"add_cross_attention", false}};
    for (auto& flag : flags)
        if (f.flag(flag.name, flag.implemented) != flag.implemented)
            f.wrong(flag.name, !flag.implemented,
                    flag.implemented ? "true (false is not implemented)" : "false (true is not implemented)");
    double eps = f.number("layer_norm_epsilon", LAYERNORM_EPS);
    c.eps = eps > 0 && eps <= 1 ? (float)eps : 0;
    if (c.eps == 0) f.wrong("layer_norm_epsilon", eps, "a float above 0 and at most 1");

    std::string activation = f.text("activation_function", "gelu_new"), known;
    c.activation = -1;
    for (const ActivationName& a : ACTIVATIONS) {
        if (activation == a.name) c.activation = a.kind;
        known += std::string(known.empty() ? "" : ", ") + a.name;
    }
    if (c.activation < 0) f.wrong("activation_function", activation, "one of " + known);
    return c;
}

// The whole configuration: the tensors' names decide the architecture. A config.json that contradicts the
// tensors is an Error.
inline Config config_of(const JsonFile& f, const Safetensors& st) {
    Config c = config_from_json(f);
    auto agree = [&](const char* field, int value, const char* tensor, size_t dimension) {
        const Tensor& t = st.need(tensor, 2);
        if (t.shape[dimension] == (uint64_t)value) return;
        // transformers does not load such a model either: it would have to guess which rows are padding.
        bool rows = dimension == 0 && tensor == std::string("wte.weight") && t.shape[0] > (uint64_t)value;
        std::string hint = rows ? strf(
                                      "; if its last rows are padding, set vocab_size to %llu, and they stay "
                                      "as tokens that no text has",
                                      (ull)t.shape[0])
                                : "";
        fail("%s: %s is %d, but %s has shape %s%s", f.path.c_str(), field, value, st.at(t).c_str(),
             shape_text(t.shape).c_str(), hint.c_str());
    };
    agree("vocab_size", c.V, "wte.weight", 0);
    agree("n_embd", c.C, "wte.weight", 1);
    agree("n_positions", c.maxT, "wpe.weight", 0);
    int blocks = 0;
    for (auto& entry : st.tensors) {
        std::string rest;
        blocks = std::max(blocks, block_number(entry.first, &rest) + 1);
    }
    if (blocks != c.L)
        fail("%s: n_layer is %d, but %s holds %d blocks", f.path.c_str(), c.L, st.path.c_str(), blocks);

    bool emb_norm = st.find("emb_norm.weight"), ln_f = st.find("ln_f.weight");
    if (emb_norm == ln_f)
        fail("%s: holds %s ln_f.weight (GPT-2) %s emb_norm.weight (GROVER), wanted one of the two",
             st.path.c_str(), ln_f ? "both" : "neither", ln_f ? "and" : "nor");
    c.arch = emb_norm ? GROVER_ARCH : GPT2_ARCH;
    if (c.arch == GPT2_ARCH && f.text("model_type", "gpt2") == "aragpt2")
        fail("%s: model_type is \"aragpt2\" (GROVER), but %s holds ln_f.weight (GPT-2)", f.path.c_str(),
             st.path.c_str());
    check_config(c, f.path.c_str());
    return c;
}

// A config.json that transformers loads without a warning. Fields that a model file does not have (dropout,
// the initialiser) get GPT-2's published values. bos and eos, the tokens that begin and end a text, are -1 if
// they are unknown.
inline nlohmann::ordered_json json_of_config(const Config& c, bool bf16, int bos, int eos) {
    bool grover = c.arch == GROVER_ARCH;
    auto token = [](int id) { return id < 0 ? nlohmann::ordered_json() : nlohmann::ordered_json(id); };
    const char* activation = nullptr;
    for (const ActivationName& a : ACTIVATIONS)
        if (!activation && a.kind == c.activation) activation = a.name;
    nlohmann::ordered_json j;
    j["activation_function"] = activation;
    j["architectures"] = {grover ? "AraGPT2LMHeadModel" : "GPT2LMHeadModel"};
    j["attn_pdrop"] = 0.1;
    j["bos_token_id"] = token(bos);
    j["embd_pdrop"] = 0.1;
    j["eos_token_id"] = token(eos);
    j["initializer_range"] = 0.02;
    j["layer_norm_epsilon"] = strtod(shortest(c.eps).c_str(), nullptr);
    j["model_type"] = grover ? "aragpt2" : "gpt2";
    j["n_ctx"] = c.maxT;
    j["n_embd"] = c.C;
    j["n_head"] = c.NH;
    j["n_inner"] = nullptr;
    j["n_layer"] = c.L;
    j["n_positions"] = c.maxT;
    j["reorder_and_upcast_attn"] = false;
    j["resid_pdrop"] = 0.1;
    j["scale_attn_by_inverse_layer_idx"] = false;
    j["scale_attn_weights"] = true;
    j["summary_activation"] = nullptr;
    j["summary_first_dropout"] = 0.1;
    j["summary_proj_to_labels"] = true;
    j["summary_type"] = "cls_index";
    j["summary_use_proj"] = true;
    j["tie_word_embeddings"] = true;
    j["torch_dtype"] = bf16 ? "bfloat16" : "float32";
    j["use_cache"] = true;
    j["vocab_size"] = c.V;
    return j;
}

// ---------------------------------------------------------------------------------------------
// from_hf

// What a conversion read and wrote, and a command to continue with, for print().
struct Summary {
    Config cfg;
    std::string read, written, next;
};

// Checks that each tensor of the model is there with the right shape, and that there are no others, which the
// conversion would lose.
inline void check_tensors(const std::vector<Slot>& slots, const Safetensors& st) {
    std::set<std::string> known = {"lm_head.weight"};
    for (const Slot& s : slots) {
        std::vector<uint64_t> want = s.published_shape();
        const Tensor& t = st.need(s.name, want.size());
        if (t.shape != want)
            fail("%s: shape is %s, wanted %s", st.at(t).c_str(), shape_text(t.shape).c_str(),
                 shape_text(want).c_str());
        if (t.dtype != "F32" && t.dtype != "F16" && t.dtype != "BF16")
            fail("%s: dtype is %s, wanted F32, F16 or BF16", st.at(t).c_str(), shown(t.dtype).c_str());
        known.insert(s.name);
    }
    const Tensor* first = nullptr;
    size_t unknown = 0;
    for (auto& entry : st.tensors)
        if (!known.count(entry.first) && !is_mask_buffer(entry.first) && unknown++ == 0)
            first = &entry.second;
    if (first) {
        std::string more = unknown > 1 ? strf(" (nor are %zu more)", unknown - 1) : "";
        if (first->name.find(".lora_") != std::string::npos)
            more += "; merge LoRA's matrices into the model with merge_and_unload(), then save_pretrained()";
        fail("%s: is not part of the model%s", st.at(*first).c_str(), more.c_str());
    }
}

// The model file has one matrix for input and output, so a separate output matrix must be equal to it.
inline void check_head(const JsonFile& config, Safetensors& st, const Config& c) {
    const Tensor *head = st.find("lm_head.weight"), &wte = st.need("wte.weight", 2);
    bool tied = config.flag("tie_word_embeddings", true);
    if (!head && !tied)
        fail("%s: tie_word_embeddings is false, but %s has no lm_head.weight", config.path.c_str(),
             st.path.c_str());
    if (!head) return;
    if (head->shape != wte.shape)
        fail("%s: shape is %s, wanted %s as wte.weight", st.at(*head).c_str(),
             shape_text(head->shape).c_str(), shape_text(wte.shape).c_str());
    if (head->dtype != wte.dtype)
        fail("%s: dtype is %s, wanted %s as wte.weight", st.at(*head).c_str(), shown(head->dtype).c_str(),
             wte.dtype.c_str());
    std::vector<float> a(CHUNK), b(CHUNK);
    size_t size = (size_t)c.V * c.C;
    for (size_t i = 0; i < size; i += CHUNK) {
        size_t n = std::min(CHUNK, size - i);
        st.read(*head, i, n, a.data());
        st.read(wte, i, n, b.data());
        if (memcmp(a.data(), b.data(), n * 4) == 0) continue;
        fail(
            "%s: differs from wte.weight (%s: tie_word_embeddings is %s); a model with its own output matrix "
            "is not implemented",
            st.at(*head).c_str(), config.path.c_str(), tied ? "true" : "false");
    }
}

// A folder with adapter_config.json holds what PEFT (LoRA) adds to a model, and transformers loads that model
// from elsewhere even if the folder has weights of its own.
inline void refuse_adapter(const std::string& dir) {
    const std::string path = dir + "/adapter_config.json";
    if (!file_exists(path)) return;
    JsonFile adapter(path);
    const std::string merged = dir.substr(0, dir.find_last_not_of('/') + 1) + "-merged";
    fail(
        "%s: is an adapter of %s (PEFT), not a model; merge the two and convert the result: "
        "python3 -c \"from peft import AutoPeftModelForCausalLM as M; import sys; "
        "M.from_pretrained(sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[2])\" %s %s",
        path.c_str(), shown(adapter.text("base_model_name_or_path", "another model")).c_str(),
        shell_quoted(dir).c_str(), shell_quoted(merged).c_str());
}

// Converts the folder `dir` to the model file `out`. dtype is "fp32", "bf16", or "" for bf16 if all tensors
// are bf16 and fp32 otherwise.
inline Summary from_hf(const std::string& dir, const std::string& out, std::string dtype = "") {
    refuse_adapter(dir);
    JsonFile config(dir + "/config.json");
    Safetensors st(dir);
    // safetensors' save_model() saves tied tensors once, under the name that is the first in the alphabet.
    if (!st.find("wte.weight") && st.find("lm_head.weight") && config.flag("tie_word_embeddings", true))
        st.rename("lm_head.weight", "wte.weight");
    Config c = config_of(config, st);
    std::vector<Slot> slots = slots_of(c);
    check_tensors(slots, st);
    check_head(config, st, c);

    std::set<std::string> dtypes;
    for (const Slot& s : slots) dtypes.insert(st.find(s.name)->dtype);
    if (dtype.empty()) dtype = dtypes == std::set<std::string>{"BF16"} ? "bf16" : "fp32";
    bool bf16 = dtype == "bf16";

    trainer::BeforeTraining lock(out);
    ModelWriter writer(out, c, bf16 ? MODEL_BF16 : MODEL_FP32);
    for (const Slot& s : slots) {
        const Tensor& t = *st.find(s.name);
        auto read = [&](size_t first, size_t n, float* dst) { st.read(t, first, n, dst); };
        auto write = [&](const float* x, size_t n) {
            float most = 0;
            for (size_t i = 0; bf16 && i < n; i++) most = std::max(most, std::fabs(x[i]));
            if (!std::isfinite(bf16_to_float(float_to_bf16(most))))
                fail("%s: %g is too large for bf16; convert with --dtype fp32", st.at(t).c_str(), most);
            writer.add(x, n);
        };
        pass_tensor(s, s.cols, s.rows, read, write);
        std::vector<float> zeros(s.cols);
        for (size_t r = 0; r < s.pad_rows; r++) writer.add(zeros.data(), s.cols);
    }
    writer.finish();

    std::string kinds, shards = st.num_files() > 1 ? strf(" (%zu shards)", st.num_files()) : "";
    for (const std::string& d : dtypes) kinds += (kinds.empty() ? "" : " and ") + d;
    double bytes = 1024 + (double)num_params(c) * (bf16 ? 2 : 4);
    return {c, strf("%s%s, %zu tensors, %s", st.path.c_str(), shards.c_str(), slots.size(), kinds.c_str()),
            strf("%s, %s, %s", out.c_str(), dtype.c_str(), human_bytes(bytes).c_str()),
            beside_program("train_gpt2") + strf(" -e %s --data DIR", shell_quoted(out).c_str())};
}

// ---------------------------------------------------------------------------------------------
// to_hf

constexpr const char* TOKENIZER_FILES[] = {
    "vocab.json",       "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json"};

// What to_hf writes in addition to the weights, and what config.json takes from it.
struct Companions {
    std::vector<std::pair<std::string, std::string>> files;  // name, content
    std::string tokenizer = "none";                          // where it is from, for print()
    int bos = -1, eos = -1;                                  // the tokens that begin and end a text
    Json generation = Json::object();                        // generation_config.json as far as it is given
    Json auto_map;  // config.json's field that leads transformers to AraGPT2's modelling code

    bool has(const char* name) const {
        return std::any_of(files.begin(), files.end(), [&](auto& f) { return f.first == name; });
    }
};

// Tokens by name, as far as the files of a tokenizer give their numbers.
using TokenIds = std::map<std::string, int>;

// Checks a token id of a tokenizer file, which must be a row of wte, and notes it.
inline void note_token(TokenIds* ids, const std::string& where, const std::string& token, const Json& id,
                       const Config& c) {
    if (!id.is_number_unsigned())
        fail("%s: id of %s is %s, wanted a whole number", where.c_str(), shown(Json(token)).c_str(),
             shown(id).c_str());
    if (id.get<uint64_t>() >= (uint64_t)c.V)
        fail("%s: id of %s is %s, but the model's vocabulary has %d tokens", where.c_str(),
             shown(Json(token)).c_str(), shown(id).c_str(), c.V);
    (*ids)[token] = id.get<int>();
}

// bos and eos of a published tokenizer: the tokens that tokenizer_config.json names, or else
// special_tokens_map.json; <|endoftext|> where neither does. Without a bos a text begins with eos, as
// GPT-2's.
inline void find_special_tokens(const std::string& src, const TokenIds& ids, Companions* k) {
    std::string bos, eos = "<|endoftext|>";
    for (const char* name : {"/special_tokens_map.json", "/tokenizer_config.json"}) {
        if (!file_exists(src + name)) continue;
        JsonFile f(src + name);
        auto named = [&](const char* field, std::string* token) {
            const Json* j = f.find(field);
            if (j && j->is_object() && j->contains("content")) j = &(*j)["content"];
            if (j && j->is_string()) *token = j->get<std::string>();
        };
        named("bos_token", &bos), named("eos_token", &eos);
    }
    auto id = [&](const std::string& token) {
        auto it = ids.find(token);
        return it == ids.end() ? -1 : it->second;
    };
    k->eos = id(eos), k->bos = id(bos) < 0 ? k->eos : id(bos);
}

// GROVER is not part of transformers: its publisher keeps the modelling code in the model's folder. If the
// config.json in `src` names such code (auto_map), it is added to the files.
inline void read_modelling_code(const std::string& src, Companions* k) {
    if (!file_exists(src + "/config.json")) return;
    JsonFile config(src + "/config.json");
    const Json* map = config.find("auto_map");
    if (!map || !map->is_object()) return;
    k->auto_map = *map;
    std::set<std::string> modules;
    for (const Json& j : *map)
        if (j.is_string()) modules.insert(j.get<std::string>().substr(0, j.get<std::string>().find('.')));
    for (const std::string& m : modules) {
        if (m.find_first_of("/-") != std::string::npos)
            continue;  // "owner/repository--module": not a file here
        k->files.push_back({m + ".py", read_text(src + "/" + m + ".py")});
    }
}

// The tokenizer in the folder `src`, which must have one, and for GROVER the modelling code.
inline Companions read_companions(const std::string& src, const Config& c) {
    Companions k;
    TokenIds ids;
    for (const char* name : TOKENIZER_FILES) {
        std::string path = src + "/" + name, file = name;
        if (!file_exists(path)) continue;
        k.files.push_back({file, read_text(path)});
        if (file != "vocab.json" && file != "tokenizer.json" && file != "added_tokens.json") continue;
        Json j = parse_json(k.files.back().second, path);
        if (!j.is_object()) fail("%s: is %s, wanted an object", path.c_str(), shown(j).c_str());
        if (file != "tokenizer.json") {
            for (auto& entry : j.items()) note_token(&ids, path, entry.key(), entry.value(), c);
            continue;
        }
        Json::json_pointer vocab("/model/vocab"), added("/added_tokens");
        if (j.contains(vocab) && j[vocab].is_object())
            for (auto& entry : j[vocab].items()) note_token(&ids, path, entry.key(), entry.value(), c);
        if (j.contains(added) && j[added].is_array())
            for (const Json& t : j[added])
                if (t.is_object() && t.contains("content") && t["content"].is_string() && t.contains("id"))
                    note_token(&ids, path, t["content"].get<std::string>(), t["id"], c);
    }
    if (!k.has("tokenizer.json") && !(k.has("vocab.json") && k.has("merges.txt")))
        fail("%s: holds no tokenizer: wanted tokenizer.json, or vocab.json and merges.txt", src.c_str());
    find_special_tokens(src, ids, &k);
    const std::string generation = src + "/generation_config.json";
    if (file_exists(generation)) k.generation = JsonFile(generation).json;
    k.tokenizer = src;
    if (c.arch == GROVER_ARCH) read_modelling_code(src, &k);
    return k;
}

// The tokenizer of our file `path`, in Hugging Face's form.
inline Companions read_tokenizer(const std::string& path, const std::string& model, const Config& c) {
    const Tokenizer t = Tokenizer::load(path);
    if (t.vocab_size() != c.V)
        fail(
            "%s: has %d tokens, %s has a vocabulary of %d; name its tokenizer with --tokenizer FILE or "
            "--tokenizer_dir SRC",
            path.c_str(), t.vocab_size(), model.c_str(), c.V);
    Companions k;
    k.files = huggingface::files_of(t, c.maxT, path);
    k.tokenizer = path, k.bos = k.eos = t.eot();
    for (int tag = t.first_tag(); tag < c.V; tag++) k.generation["suppress_tokens"].push_back(tag);
    return k;
}

// generation_config.json: `given`, with the tokenizer's bos and eos, and values for what else generate()
// would have to guess. A text is at most as long as the context, beyond which transformers fails.
inline Json generation_config(Json given, const Companions& k, const Config& c) {
    given["bos_token_id"] = k.bos;
    Json& eos = given["eos_token_id"];  // may be a list, of which any ends a text
    if (!eos.is_array() || std::find(eos.begin(), eos.end(), Json(k.eos)) == eos.end()) eos = k.eos;
    given.emplace("pad_token_id", k.eos);
    if (Json& pad = given["pad_token_id"]; pad.is_number() && pad >= c.V) pad = k.eos;  // has no embedding
    if (Json& length = given["max_length"]; !length.is_number() || length > c.maxT) length = c.maxT;
    return given;
}

// Writes a safetensors file in chunks: construct it, add() the numbers of all slots in order, commit().
class SafetensorsWriter {
  public:
    SafetensorsWriter(const std::string& path, const std::vector<Slot>& slots, bool bf16)
        : bf16_(bf16), file_(path) {
        nlohmann::ordered_json header;
        header["__metadata__"]["format"] = "pt";
        uint64_t end = 0;
        for (const Slot& s : slots) {
            uint64_t begin = end;
            end += (uint64_t)s.size() * (bf16 ? 2 : 4);
            auto& j = header["transformer." + s.name];
            j["dtype"] = bf16 ? "BF16" : "F32";
            j["shape"] = s.published_shape();
            j["data_offsets"] = {begin, end};
        }
        std::string text = header.dump();
        text.resize((text.size() + 7) / 8 * 8, ' ');  // aligns the numbers in a file that is memory-mapped
        uint64_t length = text.size();
        file_.write(&length, 8);
        file_.write(text);
        bytes = 8 + length + end;
    }
    void add(const float* x, size_t n) {
        if (!bf16_) return file_.write(x, n * 4);
        half_.resize(std::min(n, CHUNK));
        for (size_t i = 0; i < n; i += CHUNK) {
            size_t k = std::min(CHUNK, n - i);
            for (size_t j = 0; j < k; j++) half_[j] = float_to_bf16(x[i + j]);
            file_.write(half_.data(), k * 2);
        }
    }
    void commit() { file_.commit(); }
    uint64_t bytes;  // of the whole file

  private:
    bool bf16_;
    AtomicFile file_;
    std::vector<uint16_t> half_;
};

// How a user can load the folder `dir` that to_hf wrote.
inline std::string how_to_load(const std::string& dir, const std::string& tokenizer_dir, bool grover,
                               bool has_tokenizer, bool has_code) {
    if (!grover && has_tokenizer)
        return strf(
            "python3 -c \"import sys; from transformers import pipeline; "
            "print(pipeline('text-generation', sys.argv[1])('')[0]['generated_text'])\" %s",
            shell_quoted(dir).c_str());
    if (!grover)
        return strf(
            "python3 -c \"import sys; from transformers import GPT2LMHeadModel as M; "
            "print(M.from_pretrained(sys.argv[1]))\" %s",
            shell_quoted(dir).c_str());
    if (has_code)
        return strf("AutoModelForCausalLM.from_pretrained('%s', trust_remote_code=True)", dir.c_str());
    if (tokenizer_dir.empty())
        return "transformers does not include GROVER; run this again with --tokenizer_dir SRC, the model's\n"
               "      original folder, to copy its modelling code (auto_map in its config.json) and "
               "tokenizer";
    return strf(
        "transformers does not include GROVER, and %s/config.json names no modelling code (auto_map);\n"
        "      load the model with the code that its publisher provides",
        tokenizer_dir.c_str());
}

// What goes along with the model of the file `in`; see to_hf.
inline Companions choose_companions(const std::string& in, const Config& c, const std::string& tokenizer_dir,
                                    std::string tokenizer) {
    const std::string beside = dirname_of(in) + "/tokenizer.bin";
    if (tokenizer.empty() && file_exists(beside)) tokenizer = beside;
    if (!tokenizer_dir.empty()) return read_companions(tokenizer_dir, c);
    if (!tokenizer.empty()) return read_tokenizer(tokenizer, in, c);
    Companions none;
    if (c.V == preset_config("gpt2").V) none.bos = none.eos = c.V - 1;  // only GPT-2's has this size
    return none;
}

inline void write_model(ModelReader& reader, const std::vector<Slot>& slots, SafetensorsWriter& model) {
    for (const Slot& s : slots) {
        auto read = [&](size_t, size_t n, float* dst) { reader.read(dst, n); };
        auto write = [&](const float* x, size_t n) { model.add(x, n); };
        pass_tensor(s, s.rows, s.cols, read, write);
        std::vector<float> unused(s.cols);
        for (size_t r = 0; r < s.pad_rows; r++) reader.read(unused.data(), s.cols);
    }
}

// The files of JSON and text, complete under temporary names
inline std::vector<std::unique_ptr<AtomicFile>> write_small_files(const std::string& dir,
                                                                  const Companions& along) {
    std::vector<std::unique_ptr<AtomicFile>> small;
    for (auto& f : along.files) {
        small.push_back(std::make_unique<AtomicFile>(dir + "/" + f.first));
        small.back()->write(f.second);
    }
    return small;
}

// Converts the model file `in` to the folder `dir` in the form in which Hugging Face publishes models. Its
// tokenizer is copied from the folder tokenizer_dir; or, if that is "", made from our file `tokenizer`, by
// default tokenizer.bin beside the model, if there is one.
inline Summary to_hf(const std::string& in, const std::string& dir, const std::string& tokenizer_dir = "",
                     const std::string& tokenizer = "") {
    ModelReader reader(in);
    const Config c = reader.cfg;
    const bool bf16 = reader.version == MODEL_BF16;
    Companions along = choose_companions(in, c, tokenizer_dir, tokenizer);
    const bool has_tokenizer = !along.files.empty();
    for (const char* name : TOKENIZER_FILES)
        if (has_tokenizer && !along.has(name) && file_exists(dir + "/" + name))
            fail(
                "%s/%s: is there already, and would be loaded with the tokenizer of %s; remove it, or name "
                "another folder",
                dir.c_str(), name, along.tokenizer.c_str());
    nlohmann::ordered_json config = json_of_config(c, bf16, along.bos, along.eos);
    if (!along.auto_map.is_null()) config["auto_map"] = along.auto_map;
    along.files.push_back({"config.json", config.dump(2) + "\n"});
    if (along.eos >= 0 || !along.generation.empty()) {
        Json generation = along.eos < 0 ? along.generation : generation_config(along.generation, along, c);
        along.files.push_back({"generation_config.json", generation.dump(2) + "\n"});
    }

    // All files are complete under temporary names before the first is renamed to its final name.
    make_dirs(dir);
    const std::vector<Slot> slots = slots_of(c);
    SafetensorsWriter model(dir + "/model.safetensors", slots, bf16);
    write_model(reader, slots, model);
    std::vector<std::unique_ptr<AtomicFile>> small = write_small_files(dir, along);
    model.commit();
    for (auto& f : small) f->commit();

    std::string names;
    for (auto& f : along.files) names += ", " + f.first;
    auto token = [](int id) { return id < 0 ? "unknown" : std::to_string(id); };
    return {c, strf("%s, %s; tokenizer: %s", in.c_str(), bf16 ? "bf16" : "fp32", along.tokenizer.c_str()),
            strf("%s/model.safetensors, %zu tensors, %s, %s%s; a text begins with token %s, ends with %s",
                 dir.c_str(), slots.size(), bf16 ? "BF16" : "F32", human_bytes((double)model.bytes).c_str(),
                 names.c_str(), token(along.bos).c_str(), token(along.eos).c_str()),
            how_to_load(dir, tokenizer_dir, c.arch == GROVER_ARCH, has_tokenizer, !along.auto_map.is_null())};
}

inline void print(const Summary& s) {
    const Config& c = s.cfg;
    printf("architecture  %s\n", c.arch == GPT2_ARCH ? "GPT-2" : "GROVER, as AraGPT2-large and -mega");
    printf("sizes         %d layers, %d heads, %d channels, context %d, vocabulary %d (padded to %d)\n", c.L,
           c.NH, c.C, c.maxT, c.V, c.Vp);
    printf("activation    GELU, %s form\n", c.activation == GELU_TANH ? "tanh" : "erf");
    printf("LayerNorm     epsilon %s\n", shortest(c.eps).c_str());
    printf("parameters    %s\n", commas(num_params(c) - (size_t)(c.Vp - c.V) * c.C).c_str());
    printf("read          %s\nwritten       %s\n\nnext: %s\n", s.read.c_str(), s.written.c_str(),
           s.next.c_str());
}

// ---------------------------------------------------------------------------------------------
// The program

constexpr const char* EPILOGUE =
    "from-hf reads DIR/config.json and DIR/model.safetensors (or the shards that\n"
    "model.safetensors.index.json lists) in the form in which Hugging Face publishes gpt2 ... gpt2-xl\n"
    "and aragpt2-base ... -mega. It detects whether the model is a GPT-2 or a GROVER (aragpt2-large,\n"
    "-mega), and refuses a model that the trainer would compute wrongly. to-hf writes a folder that\n"
    "transformers loads: config.json, model.safetensors, generation_config.json, and the tokenizer's\n"
    "files, made from tokenizer.bin or copied from SRC.\n"
    "\n"
    "To continue with a model trained here in transformers:\n"
    "  ./convert_gpt2 to-hf out/model.bin poet\n"
    "To fine-tune a published model and convert it back:\n"
    "  ./convert_gpt2 from-hf aragpt2-base aragpt2.bin\n"
    "  ./train_gpt2 -e aragpt2.bin --data DIR\n"
    "  ./convert_gpt2 to-hf out/model.bin poet --tokenizer_dir aragpt2-base\n";

inline int run(int argc, char** argv) {
    std::string dtype, tokenizer_dir, tokenizer;
    std::vector<std::string> words;
    Flags f("convert_gpt2", "converts GPT-2 and AraGPT2 from Hugging Face's format and back, bit for bit");
    f.positional(&words, "from-hf DIR out.bin | to-hf in.bin DIR");
    f.section("from-hf");
    f.add("dtype", "", &dtype, "NAME",
          "number format of out.bin; by default bf16 if all of DIR is, else fp32")
        .choices({"fp32", "bf16"});
    f.section("to-hf");
    f.add("tokenizer_dir", "", &tokenizer_dir, "SRC",
          "copy the tokenizer (vocab.json, merges.txt, ...) from this folder");
    f.add("tokenizer", "", &tokenizer, "FILE",
          "or make its files from this one; by default tokenizer.bin in the model's folder");
    f.epilogue(EPILOGUE);
    f.parse(argc, argv);
    if (words.empty()) throw UsageError("wanted from-hf DIR out.bin, or to-hf in.bin DIR; see --help");
    bool from = words[0] == "from-hf", to = words[0] == "to-hf";
    if (!from && !to)
        throw UsageError(strf("'%s' is not a command; wanted from-hf or to-hf", words[0].c_str()));
    if (words.size() != 3)
        throw UsageError(strf("%s takes two names, found %zu: %s", words[0].c_str(), words.size() - 1,
                              from ? "from-hf DIR out.bin" : "to-hf in.bin DIR"));
    for (const char* flag : {"tokenizer_dir", "tokenizer"})
        if (from && f.given(flag)) throw UsageError(strf("--%s is only for to-hf", flag));
    if (f.given("tokenizer_dir") && f.given("tokenizer"))
        throw UsageError("--tokenizer_dir and --tokenizer do not go together; leave one out");
    if (to && f.given("dtype"))
        throw UsageError("--dtype is only for from-hf; to-hf does not change the numbers");
    print(from ? from_hf(words[1], words[2], dtype) : to_hf(words[1], words[2], tokenizer_dir, tokenizer));
    return 0;
}

}  // namespace convert

#ifndef ARAPOET_NO_MAIN
int main(int argc, char** argv) {
    return run_main("convert_gpt2", [&] { return convert::run(argc, argv); });
}
#endif
#endif  // CONVERT_GPT2_CPP
