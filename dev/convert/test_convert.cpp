// test_convert.cpp - tests of convert_gpt2.cpp on small checkpoints, which are converted both ways and
// damaged in many ways; and of what export_tokenizer reads of the folders that to-hf and transformers write.
#define ARAPOET_NO_MAIN
#include "convert_gpt2.cpp"

#include <cfloat>
#include <doctest/doctest.h>

#include "dev/test_util.h"
#include "tokenizer/export_tokenizer.cpp"

namespace {

using convert::Json;

// A published folder that is not written yet. A tensor's bytes are its numbers in its dtype.
struct Published {
    struct Entry {
        std::string dtype;
        std::vector<uint64_t> shape;
        std::string bytes;
    };
    Json config;
    std::vector<std::pair<std::string, Entry>> tensors;
    std::string prefix = "transformer.", wrapper;

    Entry& at(const std::string& name) {
        for (auto& t : tensors)
            if (t.first == name) return t.second;
        throw std::runtime_error("test: no tensor " + name);
    }
    void erase(const std::string& name) {
        tensors.erase(
            std::remove_if(tensors.begin(), tensors.end(), [&](auto& t) { return t.first == name; }),
            tensors.end());
    }
};

std::string with_length(const std::string& header, const std::string& data = "") {
    uint64_t n = header.size();
    return std::string((const char*)&n, 8) + header + data;
}

// A safetensors file with the tensors i for which take(i) is true, and `gap` unused bytes after each.
template <class Take>
std::string safetensors(const Published& p, Take take, size_t gap = 0) {
    Json header = {{"__metadata__", {{"format", "pt"}}}};
    std::string data;
    for (size_t i = 0; i < p.tensors.size(); i++) {
        const auto& [name, e] = p.tensors[i];
        if (!take(i)) continue;
        std::string full = name == "lm_head.weight" ? p.wrapper + name : p.wrapper + p.prefix + name;
        header[full] = {{"dtype", e.dtype},
                        {"shape", e.shape},
                        {"data_offsets", {data.size(), data.size() + e.bytes.size()}}};
        data += e.bytes + std::string(gap, 'x');
    }
    return with_length(header.dump(), data);
}
std::string safetensors(const Published& p) {
    return safetensors(p, [](size_t) { return true; });
}
void save(const std::string& dir, const Published& p) {
    make_dirs(dir);
    write_file(dir + "/config.json", p.config.dump());
    write_file(dir + "/model.safetensors", safetensors(p));
}

// n pseudorandom numbers, as bytes of the dtype.
std::string numbers(const std::string& dtype, size_t n) {
    static uint32_t state = 1;
    std::string bytes;
    for (size_t i = 0; i < n; i++) {
        state = state * 1664525u + 1013904223u;
        float f = (float)(int32_t)state * 0x1p-31f;
        uint16_t bf16 = float_to_bf16(f),
                 f16 = (uint16_t)((state >> 16 & 0x83ff) | 0x3000);  // |x| in [0.125, 0.25)
        if (dtype == "F32") bytes.append((const char*)&f, 4);
        else bytes.append((const char*)(dtype == "BF16" ? &bf16 : &f16), 2);
    }
    return bytes;
}

constexpr int V = 131, T = 9, C = 12, L = 3, NH = 4;

// A model of odd sizes. The names are repeated here, so that a mistake in the converter's table is found.
Published example(bool grover, const std::string& dtype = "F32") {
    Published p;
    p.config = {{"model_type", "gpt2"}, {"n_layer", L},    {"n_head", NH},
                {"n_embd", C},          {"vocab_size", V}, {"n_positions", T}};
    auto add = [&](const std::string& name, std::vector<uint64_t> shape) {
        size_t n = 1;
        for (uint64_t d : shape) n *= d;
        p.tensors.push_back({name, {dtype, shape, numbers(dtype, n)}});
    };
    add("wte.weight", {V, C}), add("wpe.weight", {T, C});
    if (grover) add("emb_norm.weight", {C}), add("emb_norm.bias", {C});
    for (int l = 0; l < L; l++) {
        std::string h = "h." + std::to_string(l) + ".";
        add(h + "ln_1.weight", {C}), add(h + "ln_1.bias", {C});
        add(h + "attn.c_attn.weight", {C, 3 * C}), add(h + "attn.c_attn.bias", {3 * C});
        add(h + "attn.c_proj.weight", {C, C}), add(h + "attn.c_proj.bias", {C});
        add(h + "ln_2.weight", {C}), add(h + "ln_2.bias", {C});
        add(h + "mlp.c_fc.weight", {C, 4 * C}), add(h + "mlp.c_fc.bias", {4 * C});
        add(h + "mlp.c_proj.weight", {4 * C, C}), add(h + "mlp.c_proj.bias", {C});
    }
    if (!grover) add("ln_f.weight", {C}), add("ln_f.bias", {C});
    return p;
}

float value(const Published::Entry& e, size_t i) {
    float f;
    uint16_t h;
    if (e.dtype == "F32") return memcpy(&f, &e.bytes[4 * i], 4), f;
    memcpy(&h, &e.bytes[2 * i], 2);
    if (e.dtype == "BF16") return bf16_to_float(h);
    double x =
        (h >> 10 & 31) ? std::ldexp(1024 + (h & 1023), (h >> 10 & 31) - 25) : std::ldexp(h & 1023, -24);
    return (float)(h & 0x8000 ? -x : x);
}

// The parameters that the model file must have: matrices transposed, wte padded to 256 rows, GROVER's
// LayerNorms renamed to GPT-2's order.
std::vector<float> expected(Published& p, bool grover) {
    std::vector<float> out;
    auto plain = [&](const std::string& name) {
        const auto& e = p.at(name);
        size_t n = e.shape[0] * (e.shape.size() == 2 ? e.shape[1] : 1);
        for (size_t i = 0; i < n; i++) out.push_back(value(e, i));
    };
    auto transposed = [&](const std::string& name) {
        const auto& e = p.at(name);
        for (size_t o = 0; o < e.shape[1]; o++)
            for (size_t i = 0; i < e.shape[0]; i++) out.push_back(value(e, i * e.shape[1] + o));
    };
    auto layers = [&](auto f) {
        for (int l = 0; l < L; l++)
            f("h." + std::to_string(l) + ".", l ? "h." + std::to_string(l - 1) + ".ln_2" : "emb_norm");
    };
    plain("wte.weight");
    out.resize(256 * C);
    plain("wpe.weight");
    for (std::string kind : {".weight", ".bias"})
        layers([&](std::string h, std::string before) { plain((grover ? before : h + "ln_1") + kind); });
    layers([&](std::string h, std::string) { transposed(h + "attn.c_attn.weight"); });
    layers([&](std::string h, std::string) { plain(h + "attn.c_attn.bias"); });
    layers([&](std::string h, std::string) { transposed(h + "attn.c_proj.weight"); });
    layers([&](std::string h, std::string) { plain(h + "attn.c_proj.bias"); });
    for (std::string kind : {".weight", ".bias"})
        layers([&](std::string h, std::string) { plain(h + (grover ? "ln_1" : "ln_2") + kind); });
    layers([&](std::string h, std::string) { transposed(h + "mlp.c_fc.weight"); });
    layers([&](std::string h, std::string) { plain(h + "mlp.c_fc.bias"); });
    layers([&](std::string h, std::string) { transposed(h + "mlp.c_proj.weight"); });
    layers([&](std::string h, std::string) { plain(h + "mlp.c_proj.bias"); });
    for (std::string kind : {".weight", ".bias"}) plain((grover ? "h.2.ln_2" : "ln_f") + kind);
    return out;
}

std::vector<float> parameters(const std::string& path, Config* c = nullptr, int* version = nullptr) {
    ModelReader r(path);
    std::vector<float> x(num_params(r.cfg));
    r.read(x.data(), x.size());
    if (c) *c = r.cfg;
    if (version) *version = r.version;
    return x;
}
bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * 4) == 0;
}

// Checks that the folder, which to_hf wrote, has exactly the tensors of p, bit for bit.
void check_published(const std::string& dir, Published& p) {
    std::string file = read_file(dir + "/model.safetensors");
    uint64_t n;
    memcpy(&n, file.data(), 8);
    CHECK((8 + n) % 8 == 0);
    Json header = Json::parse(file.substr(8, n));
    CHECK(header["__metadata__"]["format"] == "pt");
    CHECK(header.size() == p.tensors.size() + 1);
    for (auto& tensor : p.tensors) {
        const std::string& name = tensor.first;
        auto& e = tensor.second;
        INFO(name);
        const Json& j = header["transformer." + name];
        CHECK(j["dtype"] == e.dtype);
        CHECK(j["shape"] == Json(e.shape));
        uint64_t begin = j["data_offsets"][0], end = j["data_offsets"][1];
        CHECK(file.substr(8 + n + begin, end - begin) == e.bytes);
    }
}

// A header with one tensor, composed by hand.
std::string entry(const char* name, const char* dtype, const char* shape, const char* offsets) {
    return strf("{\"%s\": {\"dtype\": %s, \"shape\": %s, \"data_offsets\": %s}}", name, dtype, shape,
                offsets);
}

}  // namespace

TEST_CASE("convert: every F16 value becomes the same number as a float") {
    for (uint32_t h = 0; h < 65536; h++) {
        float found = convert::f16_to_float((uint16_t)h);
        if ((h & 0x7c00) == 0x7c00) {
            CHECK(std::isnan(found) == ((h & 0x3ff) != 0));
            CHECK(!std::isfinite(found));
            continue;
        }
        float want = value({"F16", {1}, std::string((const char*)&h, 2)}, 0);
        if (memcmp(&found, &want, 4) != 0) FAIL(h);
    }
}

TEST_CASE("convert: GPT-2 and GROVER of every dtype, prefixed or not, survive both conversions") {
    for (bool grover : {false, true})
        for (std::string dtype : {"F32", "F16", "BF16"})
            for (std::string prefix : {"transformer.", ""}) {
                INFO(grover, " ", dtype, " '", prefix, "'");
                TempDir dir;
                Published p = example(grover, dtype);
                p.prefix = prefix;
                if (grover && prefix.empty()) p.config["model_type"] = "aragpt2";
                if (prefix.empty()) p.config["activation_function"] = "gelu";
                save(dir / "hf", p);
                convert::from_hf(dir / "hf", dir / "a.bin");
                Config c;
                int version;
                CHECK(same_bits(parameters(dir / "a.bin", &c, &version), expected(p, grover)));
                CHECK(version == (dtype == "BF16" ? MODEL_BF16 : MODEL_FP32));
                CHECK(c.arch == (grover ? GROVER_ARCH : GPT2_ARCH));
                CHECK(c.activation == (prefix.empty() ? GELU_ERF : GELU_TANH));
                CHECK(c.maxT == T);
                CHECK(c.V == V);
                CHECK(c.Vp == 256);
                CHECK(c.L == L);
                CHECK(c.NH == NH);
                CHECK(c.C == C);

                convert::to_hf(dir / "a.bin", dir / "back/again");
                if (dtype != "F16") check_published(dir / "back/again", p);
                convert::from_hf(dir / "back/again", dir / "b.bin");
                CHECK(read_file(dir / "a.bin") == read_file(dir / "b.bin"));
                Json j = Json::parse(read_file(dir / "back/again/config.json"));
                CHECK(j["model_type"] == (grover ? "aragpt2" : "gpt2"));
                CHECK(j["architectures"][0] == (grover ? "AraGPT2LMHeadModel" : "GPT2LMHeadModel"));
                CHECK(j["activation_function"] == (prefix.empty() ? "gelu" : "gelu_new"));
                CHECK(j["torch_dtype"] == (dtype == "BF16" ? "bfloat16" : "float32"));
                CHECK(j["eos_token_id"].is_null());
            }
}

TEST_CASE("convert: layer_norm_epsilon survives both conversions and is written in few digits") {
    struct {
        Json given;
        const char* written;
    } cases[] = {{1e-5, "1e-05"},
                 {1e-6, "1e-06"},
                 {1e-12, "1e-12"},
                 {0.001, "0.001"},
                 {1.25e-7, "1.25e-07"},
                 {1, "1.0"},
                 {0.333333333333, "0.33333334"},
                 {1.2e-38, "1.2e-38"},
                 {9.999999747378752e-06, "1e-05"}};
    for (bool grover : {false, true})
        for (auto& k : cases) {
            INFO(k.given.dump());
            TempDir dir;
            Published p = example(grover);
            p.config["layer_norm_epsilon"] = k.given;
            save(dir / "hf", p);
            convert::from_hf(dir / "hf", dir / "a.bin");
            Config c;
            parameters(dir / "a.bin", &c);
            CHECK(c.eps == (float)k.given.get<double>());
            convert::to_hf(dir / "a.bin", dir / "back");
            CHECK(contains(read_file(dir / "back/config.json"),
                           strf("\"layer_norm_epsilon\": %s,", k.written)));
            convert::from_hf(dir / "back", dir / "b.bin");
            CHECK(read_file(dir / "a.bin") == read_file(dir / "b.bin"));
        }
}

TEST_CASE("convert: extreme numbers keep their bits, and are refused if bf16 cannot hold them") {
    TempDir dir;
    Published p = example(false);
    const float odd[] = {-0.0f, FLT_MIN / 8, -FLT_MIN / 1024, FLT_MAX, -FLT_MAX, 1.0f + FLT_EPSILON};
    memcpy(&p.at("h.1.mlp.c_fc.weight").bytes[40], odd, sizeof odd);
    memcpy(&p.at("wte.weight").bytes[40], odd, sizeof odd);
    save(dir / "hf", p);
    convert::from_hf(dir / "hf", dir / "a.bin");
    CHECK(same_bits(parameters(dir / "a.bin"), expected(p, false)));
    convert::to_hf(dir / "a.bin", dir / "back");
    check_published(dir / "back", p);
    std::string error = error_of([&] { convert::from_hf(dir / "hf", dir / "b.bin", "bf16"); });
    CHECK(contains(
        error,
        "tensor transformer.wte.weight: 3.40282e+38 is too large for bf16; convert with --dtype fp32"));
}

TEST_CASE("convert: --dtype sets the number format; without it only all-bf16 models become bf16") {
    TempDir dir;
    Published p = example(false);
    save(dir / "hf", p);
    convert::from_hf(dir / "hf", dir / "a.bin", "bf16");
    std::vector<float> want = expected(p, false);
    for (float& x : want) x = bf16_to_float(float_to_bf16(x));
    int version;
    CHECK(same_bits(parameters(dir / "a.bin", nullptr, &version), want));
    CHECK(version == MODEL_BF16);

    p = example(false, "BF16");
    save(dir / "bf", p);
    convert::from_hf(dir / "bf", dir / "b.bin", "fp32");
    CHECK(same_bits(parameters(dir / "b.bin", nullptr, &version), expected(p, false)));
    CHECK(version == MODEL_FP32);
    // with a single tensor of another dtype, the whole model becomes fp32
    p.at("ln_f.bias") = {"F32", {C}, numbers("F32", C)};
    save(dir / "bf", p);
    convert::from_hf(dir / "bf", dir / "b.bin");
    CHECK(same_bits(parameters(dir / "b.bin", nullptr, &version), expected(p, false)));
    CHECK(version == MODEL_FP32);
}

TEST_CASE("convert: mask buffers, a tied lm_head, gaps and aliases of sizes are accepted") {
    TempDir dir;
    Published p = example(false), plain = p;
    p.tensors.push_back({"h.0.attn.bias", {"BOOL", {1, 1, T, T}, std::string(T * T, '\1')}});
    p.tensors.push_back({"h.2.attn.bias", {"U8", {1, 1, T, T}, std::string(T * T, '\1')}});
    p.tensors.push_back({"h.1.attn.masked_bias", {"F32", {}, numbers("F32", 1)}});
    p.tensors.push_back({"lm_head.weight", p.at("wte.weight")});
    p.config["hidden_size"] = C;
    p.config.erase("n_positions");
    p.config["max_position_embeddings"] = T;
    p.config["n_inner"] = 4 * C;
    p.config["summary_type"] = "cls_index";
    p.config["reorder_and_upcast_attn"] = true;
    for (bool tied : {true, false}) {
        p.config["tie_word_embeddings"] = tied;
        save(dir / "hf", p);
        write_file(dir / "hf/model.safetensors", safetensors(
                                                     p, [](size_t) { return true; }, 5));
        convert::from_hf(dir / "hf", dir / "a.bin");
        CHECK(same_bits(parameters(dir / "a.bin"), expected(plain, false)));
    }
}

TEST_CASE("convert: shards are read, and an index that does not match them is refused") {
    TempDir dir;
    Published p = example(true, "BF16");
    make_dirs(dir / "hf");
    write_file(dir / "hf/config.json", p.config.dump());
    Json map;
    for (size_t k = 0; k < 3; k++) {
        std::string name = strf("model-%05zu-of-00003.safetensors", k + 1);
        write_file(dir / "hf/" + name, safetensors(p, [&](size_t i) { return i % 3 == k; }));
        for (size_t i = k; i < p.tensors.size(); i += 3) map[p.prefix + p.tensors[i].first] = name;
    }
    auto index = [&](const Json& j) { write_file(dir / "hf/model.safetensors.index.json", j.dump()); };
    auto error = [&] { return error_of([&] { convert::from_hf(dir / "hf", dir / "a.bin"); }); };
    index({{"metadata", {{"total_size", 1}}}, {"weight_map", map}});
    CHECK(error() == "");
    CHECK(same_bits(parameters(dir / "a.bin"), expected(p, true)));

    Json wrong = map;
    wrong["transformer.wte.weight"] = "model-00002-of-00003.safetensors";
    index({{"weight_map", wrong}});
    CHECK(contains(
        error(),
        "index.json: weight_map places transformer.wte.weight in model-00002-of-00003.safetensors, which "
        "lacks it"));
    wrong["transformer.wte.weight"] = "model-00009-of-00003.safetensors";
    index({{"weight_map", wrong}});
    CHECK(contains(error(), "/hf/model-00009-of-00003.safetensors: is missing, but " +
                                (dir / "hf/model.safetensors.index.json lists it")));
    for (Json bad : {Json("../model-00001-of-00003.safetensors"), Json(""), Json(3), Json()}) {
        wrong["transformer.wte.weight"] = bad;
        index({{"weight_map", wrong}});
        CHECK(contains(error(),
                       "weight_map of transformer.wte.weight is " + bad.dump() + ", wanted a file name"));
    }
    index({{"weight_map", Json::object()}});
    CHECK(contains(error(), "index.json: weight_map is missing or empty"));
    index(Json::array());
    CHECK(contains(error(), "index.json: is [], wanted an object"));
    index({{"weight_map", map}});
    p.tensors.resize(1);  // the second shard has only wte, which the first one also has
    write_file(dir / "hf/model-00002-of-00003.safetensors", safetensors(p));
    CHECK(contains(error(), "model-00002-of-00003.safetensors: tensor wte.weight occurs twice, also as "));
}

TEST_CASE("convert: a config.json with wrong or unimplemented values is refused by field") {
    TempDir dir;
    auto error = [&](Published p, const char* field, Json value) {
        if (value.is_discarded()) p.config.erase(field);
        else p.config[field] = value;
        save(dir / "hf", p);
        std::string e = error_of([&] { convert::from_hf(dir / "hf", dir / "a.bin"); });
        std::string file = dir / "hf/config.json: ";
        return e.compare(0, file.size(), file) == 0 ? e.substr(file.size()) : e;
    };
    Published p = example(false), g = example(true);
    const Json absent(Json::value_t::discarded);
    std::string st = dir / "hf/model.safetensors",
                wte = st + ": tensor transformer.wte.weight has shape (131, 12)";
    CHECK(error(p, "model_type", "gpt_neo") == "model_type is \"gpt_neo\", wanted gpt2 or aragpt2");
    CHECK(error(p, "model_type", 2) == "model_type is 2, wanted a string");
    CHECK(error(p, "model_type", "aragpt2") ==
          "model_type is \"aragpt2\" (GROVER), but " + st + " holds ln_f.weight (GPT-2)");
    CHECK(error(p, "n_layer", absent) == "n_layer is missing, wanted a whole number");
    CHECK(error(p, "n_layer", 2) == "n_layer is 2, but " + st + " holds 3 blocks");
    CHECK(error(g, "n_layer", 4) == "n_layer is 4, but " + st + " holds 3 blocks");
    CHECK(error(p, "num_hidden_layers", 4) == "n_layer is 3, but num_hidden_layers is 4");
    CHECK(error(p, "n_head", 5) == "n_head is 5, wanted a divisor of n_embd = 12");
    CHECK(error(p, "n_head", 0) == "n_head is 0, wanted a whole number from 1 to 4096");
    CHECK(error(p, "n_head", -4) == "n_head is -4, wanted a whole number from 1 to 4096");
    CHECK(error(p, "n_head", 4.5) == "n_head is 4.5, wanted a whole number from 1 to 4096");
    CHECK(error(p, "n_head", "4") == "n_head is \"4\", wanted a whole number from 1 to 4096");
    CHECK(error(p, "n_layer", 1ull << 40) ==
          "n_layer is 1099511627776, wanted a whole number from 1 to 4096");
    CHECK(error(p, "vocab_size", 130) == "vocab_size is 130, but " + wte +
                                             "; if its last rows are padding, set vocab_size to 131, and "
                                             "they stay as tokens that no text has");
    CHECK(error(p, "vocab_size", 132) == "vocab_size is 132, but " + wte);
    CHECK(error(p, "n_embd", 16) == "n_embd is 16, but " + wte);
    CHECK(error(p, "n_positions", 8) ==
          "n_positions is 8, but " + st + ": tensor transformer.wpe.weight has shape (9, 12)");
    CHECK(error(p, "n_inner", 24) == "n_inner is 24, wanted null or 4 n_embd = 48");
    CHECK(error(p, "scale_attn_weights", false) ==
          "scale_attn_weights is false, wanted true (false is not implemented)");
    CHECK(error(p, "scale_attn_by_inverse_layer_idx", true) ==
          "scale_attn_by_inverse_layer_idx is true, wanted false (true is not implemented)");
    CHECK(error(p, "add_cross_attention", true) ==
          "add_cross_attention is true, wanted false (true is not implemented)");
    CHECK(error(p, "add_cross_attention", 1) == "add_cross_attention is 1, wanted true or false");
    for (double eps : {0.0, -1e-5, 1e-60, 1.5, 1e300, -1e300})
        CHECK(error(p, "layer_norm_epsilon", eps) ==
              "layer_norm_epsilon is " + Json(eps).dump() + ", wanted a float above 0 and at most 1");
    CHECK(error(p, "layer_norm_epsilon", "x") == "layer_norm_epsilon is \"x\", wanted a number");
    CHECK(error(p, "activation_function", "relu") ==
          "activation_function is \"relu\", wanted one of gelu_new, gelu_pytorch_tanh, gelu_fast, gelu, "
          "gelu_python");
    CHECK(error(p, "tie_word_embeddings", false) ==
          "tie_word_embeddings is false, but " + st + " has no lm_head.weight");
    for (const char* tanh : {"gelu_new", "gelu_pytorch_tanh", "gelu_fast"}) {
        CHECK(error(p, "activation_function", tanh) == "");
        Config c;
        parameters(dir / "a.bin", &c);
        CHECK(c.activation == GELU_TANH);
    }
}

TEST_CASE("convert: a config.json that is missing, malformed, too deep or too large is refused") {
    TempDir dir;
    save(dir / "hf", example(false));
    auto raw = [&](const std::string& text) {
        write_file(dir / "hf/config.json", text);
        return error_of([&] { convert::from_hf(dir / "hf", dir / "a.bin"); });
    };
    CHECK(raw("{\"n_layer\": 3") == (dir / "hf/config.json: is not JSON (byte 14 of 13)"));
    CHECK(raw("{\"n_layer\": 1e999}") == (dir / "hf/config.json: is not JSON (a number is out of range)"));
    CHECK(raw("[3]") == (dir / "hf/config.json: is [3], wanted an object"));
    CHECK(raw("{\"a\nb\": 1}") == (dir / "hf/config.json: is not JSON (byte 4 of 10)"));
    CHECK(raw("{\"n_head\": 4, \"n_head\": 3}") == (dir / "hf/config.json: \"n_head\" occurs twice"));
    CHECK(raw(std::string(1000000, '[')) == (dir / "hf/config.json: JSON is nested deeper than 64"));
    CHECK(contains(raw("[" + std::string(9000000, '1').replace(1, 0, ",")), "hf/config.json: is not JSON"));
    std::string many = "[0";
    for (int i = 0; i < 4000000; i++) many += ",0";
    CHECK(raw(many + "]") == (dir / "hf/config.json: JSON has more than 4000000 values"));
    std::filesystem::remove(dir / "hf/config.json");
    CHECK(error_of([&] { convert::from_hf(dir / "hf", dir / "a.bin"); }) ==
          (dir / "hf/config.json: cannot open: No such file or directory"));
}

TEST_CASE("convert: a safetensors header that is truncated or corrupt is refused") {
    TempDir dir;
    save(dir / "hf", example(false));
    std::string file = dir / "hf/model.safetensors", good = read_file(file);
    auto error = [&](const std::string& content) {
        write_file(file, content);
        std::string e = error_of([&] { convert::from_hf(dir / "hf", dir / "a.bin"); });
        CHECK(!file_exists(dir / "a.bin"));
        return e.compare(0, file.size() + 2, file + ": ") == 0 ? e.substr(file.size() + 2) : e;
    };
    uint64_t length;
    memcpy(&length, good.data(), 8);
    CHECK(error("") == "has 0 bytes, wanted a header length of 8");
    CHECK(error("1234567") == "has 7 bytes, wanted a header length of 8");
    CHECK(error(good.substr(0, 8)) ==
          strf("truncated: header length is %llu, but 0 bytes follow", (unsigned long long)length));
    CHECK(contains(error(good.substr(0, 8 + length)), "data_offsets end at "));
    CHECK(contains(error(good.substr(0, good.size() - 1)), ", but the file has "));
    CHECK(error(std::string(8, '\xff') + good) ==
          "header length is 18446744073709551615, wanted at most 100000000");
    CHECK(error(with_length("")) == "header: is not JSON (byte 1 of 0)");
    CHECK(error(with_length("{")) == "header: is not JSON (byte 2 of 1)");
    CHECK(error(with_length("[]")) == "header is [], wanted an object");
    CHECK(error(with_length("{\"\xff\": 0}")) == "header: is not JSON (byte 3 of 8)");
    CHECK(error(with_length(std::string(1000000, '['))) == "header: JSON is nested deeper than 64");
    CHECK(error("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n") ==
          "is a Git LFS pointer, not the tensors; fetch them with: git lfs pull");

    CHECK(error(with_length("{\"a\": 3}")) == "tensor a: dtype is missing in the header");
    CHECK(error(with_length("{\"a\": {\"dtype\": \"F32\"}}")) == "tensor a: shape is missing in the header");
    CHECK(error(with_length(entry("a", "7", "[1]", "[0, 4]"), "0000")) ==
          "tensor a: dtype is 7, wanted a string");
    CHECK(error(with_length(entry("a", "\"F32\"", "[-1]", "[0, 4]"), "0000")) ==
          "tensor a: shape is [-1], wanted a list of whole numbers");
    CHECK(error(with_length(entry("a", "\"F32\"", "3", "[0, 4]"), "0000")) ==
          "tensor a: shape is 3, wanted a list of whole numbers");
    CHECK(error(with_length(entry("a", "\"F32\"", "[1]", "[0, 4, 8]"), "0000")) ==
          "tensor a: data_offsets is [0,4,8], wanted begin and end");
    CHECK(error(with_length(entry("a", "\"F32\"", "[1]", "[4, 0]"), "0000")) ==
          "tensor a: data_offsets is [4,0], wanted begin and end");
    CHECK(error(with_length(entry("a", "\"F32\"", "[1]", "[0, 8]"), "0000")) ==
          "tensor a: data_offsets end at 8, but the file has 4 bytes of data");
    CHECK(error(with_length(entry("a", "\"F32\"", "[1]", "[0, 18446744073709551615]"), "0000")) ==
          "tensor a: data_offsets end at 18446744073709551615, but the file has 4 bytes of data");
    CHECK(error(with_length(entry("a", "\"F32\"", "[2]", "[0, 4]"), "0000")) ==
          "tensor a: data_offsets span 4 bytes, wanted 8 for F32 (2)");
    CHECK(contains(error(with_length(entry("a", "\"F32\"", "[4294967296, 4294967296]", "[0, 0]"))),
                   "tensor a: shape: 17179869184 x 4294967296 is too large to address"));
    CHECK(error(with_length("{\"a\\n\": {\"dtype\": \"F32\"}}")) ==
          "tensor a?: shape is missing in the header");
    std::string two = entry("a", "\"F32\"", "[2]", "[0, 8]"), b = entry("b", "\"F32\"", "[2]", "[4, 12]");
    CHECK(error(with_length(two.substr(0, two.size() - 1) + "," + b.substr(1), std::string(12, '0'))) ==
          "tensors a and b overlap");
    CHECK(error(with_length(two.substr(0, two.size() - 1) + "," + two.substr(1), std::string(12, '0'))) ==
          "header: \"a\" occurs twice");
}

// The error of from_hf on p after change(p) and with these fields in its config.json. Checks that no output
// and no temporary file is left.
template <class Change>
std::string tensor_error(const TempDir& dir, Published p, Change change, Json config = Json::object()) {
    change(p);
    p.config.update(config);
    save(dir / "hf", p);
    std::string e = error_of([&] { convert::from_hf(dir / "hf", dir / "a.bin"); }),
                file = dir / "hf/model.safetensors: ";
    CHECK(!file_exists(dir / "a.bin"));
    CHECK(std::distance(std::filesystem::directory_iterator(dir.path), {}) == 1);
    return e.compare(0, file.size(), file) == 0 ? e.substr(file.size()) : e;
}

TEST_CASE("convert: tensors that are missing, unknown or of a wrong shape or dtype are refused") {
    TempDir dir;
    auto error = [&](Published p, auto change) { return tensor_error(dir, p, change); };
    Published p = example(false), g = example(true);
    CHECK(error(p, [](auto& p) { p.erase("wte.weight"); }) == "tensor wte.weight is missing");
    CHECK(error(p, [](auto& p) { p.erase("h.1.ln_2.bias"); }) == "tensor h.1.ln_2.bias is missing");
    CHECK(error(g, [](auto& p) { p.erase("emb_norm.bias"); }) == "tensor emb_norm.bias is missing");
    CHECK(error(p, [](auto& p) { p.erase("ln_f.weight"); }) ==
          "holds neither ln_f.weight (GPT-2) nor emb_norm.weight (GROVER), wanted one of the two");
    CHECK(error(p, [](auto& p) {
              p.tensors.push_back({"emb_norm.weight", p.at("ln_f.weight")});
          }) == "holds both ln_f.weight (GPT-2) and emb_norm.weight (GROVER), wanted one of the two");
    CHECK(error(p, [](auto& p) {
              p.tensors.push_back({"score.weight", p.at("ln_f.weight")});
          }) == "tensor transformer.score.weight: is not part of the model");
    CHECK(error(p, [](auto& p) {
              p.tensors.push_back({"h.0.attn.rotary", p.at("ln_f.weight")});
              p.tensors.push_back({"h.1.attn.rotary", p.at("ln_f.weight")});
          }) == "tensor transformer.h.0.attn.rotary: is not part of the model (nor are 1 more)");
    CHECK(error(p, [](auto& p) {
              p.at("h.0.attn.c_attn.weight").shape = {3 * C, C};
          }) == "tensor transformer.h.0.attn.c_attn.weight: shape is (36, 12), wanted (12, 36)");
    CHECK(error(p, [](auto& p) { p.at("h.0.attn.c_attn.weight").shape = {3 * C * C}; }) ==
          "tensor transformer.h.0.attn.c_attn.weight: shape is (432), wanted 2 dimensions");
    CHECK(error(p, [](auto& p) { p.at("wte.weight").shape = {V * C}; }) ==
          "tensor transformer.wte.weight: shape is (1572), wanted 2 dimensions");
    CHECK(error(p, [](auto& p) { p.at("h.0.ln_1.bias").dtype = "I32"; }) ==
          "tensor transformer.h.0.ln_1.bias: dtype is I32, wanted F32, F16 or BF16");
    CHECK(error(p, [](auto& p) { p.at("h.0.ln_1.bias").dtype = "F8_E4M3"; }) ==
          "tensor transformer.h.0.ln_1.bias: dtype is F8_E4M3, wanted F32, F16 or BF16");
    Published both = p;  // the same tensor with and without the prefix
    both.tensors.push_back({"transformer.wpe.weight", both.at("wpe.weight")});
    both.prefix = "";
    CHECK(contains(error(both, [](auto&) {}), "tensor wpe.weight occurs twice, also as "));
}

TEST_CASE("convert: a separate output matrix that differs from the embedding is refused") {
    TempDir dir;
    auto error = [&](Published p, auto change, Json config = Json::object()) {
        return tensor_error(dir, p, change, config);
    };
    Published p = example(false);
    CHECK(error(p, [](auto& p) {
              p.tensors.push_back({"lm_head.weight", p.at("wpe.weight")});
          }) == "tensor lm_head.weight: shape is (9, 12), wanted (131, 12) as wte.weight");
    CHECK(error(p, [](auto& p) {
              p.tensors.push_back({"lm_head.weight", {"F16", {V, C}, numbers("F16", V * C)}});
          }) == "tensor lm_head.weight: dtype is F16, wanted F32 as wte.weight");
    auto other_head = [](auto& p) {
        p.tensors.push_back({"lm_head.weight", {"F32", {V, C}, numbers("F32", V * C)}});
    };
    for (bool tied : {true, false})
        CHECK(error(p, other_head, {{"tie_word_embeddings", tied}}) ==
              strf("tensor lm_head.weight: differs from wte.weight (%s: tie_word_embeddings is %s); a model "
                   "with its own output "
                   "matrix is not implemented",
                   (dir / "hf/config.json").c_str(), tied ? "true" : "false"));
}

TEST_CASE("convert: NaN and infinity in a tensor are refused and named by their position") {
    TempDir dir;
    auto error = [&](Published p, auto change) { return tensor_error(dir, p, change); };
    Published p = example(false);
    for (float bad : {NAN, INFINITY, -INFINITY}) {
        std::string shown = strf("%f", bad);
        CHECK(error(p, [&](auto& p) { memcpy(&p.at("h.2.mlp.c_proj.weight").bytes[4 * 17], &bad, 4); }) ==
              "tensor transformer.h.2.mlp.c_proj.weight: element 17 is " + shown);
        CHECK(error(p, [&](auto& p) { memcpy(&p.at("wte.weight").bytes[4 * 1571], &bad, 4); }) ==
              "tensor transformer.wte.weight: element 1571 is " + shown);
    }
    for (std::string dtype : {"F16", "BF16"}) {
        uint16_t inf = dtype == "F16" ? 0x7c00 : 0x7f80;
        CHECK(error(example(false, dtype), [&](auto& p) {
                  memcpy(&p.at("ln_f.bias").bytes[2 * 3], &inf, 2);
              }) == "tensor transformer.ln_f.bias: element 3 is inf");
    }
}

TEST_CASE("convert: a missing file is an error that says how to make or find it") {
    TempDir dir;
    Published p = example(false);
    make_dirs(dir / "it's");
    write_file(dir / "it's/config.json", p.config.dump());
    auto error = [&] { return error_of([&] { convert::from_hf(dir / "it's", dir / "a.bin"); }); };
    CHECK(error() == (dir / "it's/model.safetensors: is missing, and so is model.safetensors.index.json"));
    write_file(dir / "it's/pytorch_model.bin", "");
    CHECK(contains(error(),
                   (dir / "it's/model.safetensors: is missing; make it from pytorch_model.bin with: cd '") +
                       dir.path + "/it'\\''s' && python3 -c \"import glob, torch;"));
    save(dir / "it's", p);
    CHECK(error() == "");
    CHECK(contains(error_of([&] { convert::from_hf(dir / "it's", dir / "no/a.bin"); }),
                   "no/a.bin: cannot write: No such file"));
    CHECK(
        contains(error_of([&] { convert::to_hf(dir / "none.bin", dir / "back"); }), "none.bin: cannot open"));
    CHECK(contains(error_of([&] { convert::to_hf(dir / "it's/config.json", dir / "back"); }),
                   "is not a model file"));
    CHECK(!file_exists(dir / "back"));
}

TEST_CASE("convert: to_hf drops the padding and copies the tokenizer after checking it") {
    TempDir dir;
    Published p = example(true);
    save(dir / "hf", p);
    convert::from_hf(dir / "hf", dir / "a.bin");
    std::string src = dir / "src";
    make_dirs(src);
    auto error = [&] { return error_of([&] { convert::to_hf(dir / "a.bin", dir / "back", src); }); };
    auto config = [&] { return Json::parse(read_file(dir / "back/config.json")); };
    CHECK(error() == src + ": holds no tokenizer: wanted tokenizer.json, or vocab.json and merges.txt");
    CHECK(!file_exists(dir / "back"));

    write_file(src + "/vocab.json", "{\"a\": 0, \"<|endoftext|>\": 130}");
    CHECK(contains(error(), "holds no tokenizer"));
    write_file(src + "/merges.txt", "#version: 0.2\na a\n");
    write_file(src + "/special_tokens_map.json", "{}");
    CHECK(error() == "");
    for (const char* name : {"vocab.json", "merges.txt", "special_tokens_map.json"})
        CHECK(read_file(dir / "back/" + name) == read_file(src + "/" + name));
    CHECK(!file_exists(dir / "back/tokenizer.json"));
    CHECK(config()["eos_token_id"] == 130);
    CHECK(config()["bos_token_id"] == 130);
    check_published(dir / "back", p);

    write_file(src + "/vocab.json", "{\"a\": 0, \"b\\n\": 131}");
    CHECK(error() == src + "/vocab.json: id of \"b\\n\" is 131, but the model's vocabulary has 131 tokens");
    write_file(src + "/vocab.json", "{\"a\": -1}");
    CHECK(error() == src + "/vocab.json: id of \"a\" is -1, wanted a whole number");
    write_file(src + "/vocab.json", "[1");
    CHECK(error() == src + "/vocab.json: is not JSON (byte 3 of 2)");
    std::filesystem::remove(src + "/vocab.json");
    std::filesystem::remove_all(dir / "back");
    write_file(src + "/tokenizer.json",
               "{\"model\": {\"vocab\": {\"a\": 5}}, \"added_tokens\": [{\"content\": \"<|endoftext|>\", "
               "\"id\": 7}]}");
    CHECK(error() == "");
    CHECK(config()["eos_token_id"] == 7);
    for (const char* odd : {"{}", "{\"model\": 1}", "{\"model\": {\"vocab\": [1]}, \"added_tokens\": 3}",
                            "{\"added_tokens\": [1]}"}) {
        write_file(src + "/tokenizer.json", odd);
        CHECK(error() == "");
        CHECK(config()["eos_token_id"].is_null());
    }
    write_file(src + "/tokenizer.json", "{\"added_tokens\": [{\"content\": \"x\", \"id\": 131}]}");
    CHECK(error() == src + "/tokenizer.json: id of \"x\" is 131, but the model's vocabulary has 131 tokens");
    write_file(src + "/tokenizer.json", "{}");
    write_file(src + "/added_tokens.json", "{\"<|endoftext|>\": 9}");
    CHECK(error() == "");
    CHECK(config()["eos_token_id"] == 9);
    CHECK(!config().contains("auto_map"));
}

TEST_CASE("convert: to_hf copies GROVER's modelling code, which config.json's auto_map names") {
    TempDir dir;
    save(dir / "hf", example(true));
    convert::from_hf(dir / "hf", dir / "a.bin");
    std::string src = dir / "src";
    make_dirs(src);
    write_file(src + "/tokenizer.json", "{}");
    auto error = [&] { return error_of([&] { convert::to_hf(dir / "a.bin", dir / "back", src); }); };
    auto config = [&] { return Json::parse(read_file(dir / "back/config.json")); };
    Json map = {{"AutoConfig", "configuration_aragpt2.C"},
                {"AutoModelForCausalLM", "modeling_aragpt2.M"},
                {"AutoX", "o/r--x.Y"}};
    write_file(src + "/config.json", Json({{"auto_map", map}}).dump());
    CHECK(contains(error(), "src/configuration_aragpt2.py: cannot open"));
    write_file(src + "/configuration_aragpt2.py", "C = 1\n");
    write_file(src + "/modeling_aragpt2.py", "M = 1\n");
    CHECK(error() == "");
    CHECK(config()["auto_map"] == map);
    CHECK(read_file(dir / "back/modeling_aragpt2.py") == "M = 1\n");
    CHECK(read_file(dir / "back/configuration_aragpt2.py") == "C = 1\n");
    CHECK(error_of([&] { convert::to_hf(dir / "a.bin", src, src); }) ==
          "");  // copies the files onto themselves
    CHECK(read_file(src + "/modeling_aragpt2.py") == "M = 1\n");
}

TEST_CASE("convert: to_hf refuses a model file with NaN and leaves the folder unchanged") {
    TempDir dir;
    save(dir / "hf", example(false));
    convert::from_hf(dir / "hf", dir / "a.bin");
    convert::to_hf(dir / "a.bin", dir / "back");
    std::string before = read_file(dir / "back/model.safetensors"), bin = read_file(dir / "a.bin");
    float nan = NAN;
    memcpy(&bin[bin.size() - 4], &nan, 4);
    write_file(dir / "a.bin", bin);
    CHECK(contains(error_of([&] { convert::to_hf(dir / "a.bin", dir / "back"); }),
                   "a.bin: the parameters hold NaN or infinity"));
    CHECK(read_file(dir / "back/model.safetensors") == before);
    CHECK(std::distance(std::filesystem::directory_iterator(dir / "back"), {}) == 2);
    bin.resize(bin.size() - 4);
    write_file(dir / "a.bin", bin);
    CHECK(contains(error_of([&] { convert::to_hf(dir / "a.bin", dir / "back"); }), "(truncated)"));
}

TEST_CASE("convert: a model with one channel, position, token and layer is converted") {
    TempDir dir;
    Published p;
    p.config = {{"n_layer", 1}, {"n_head", 1}, {"n_embd", 1}, {"vocab_size", 1}, {"n_positions", 1}};
    for (auto& [name, e] : example(false).tensors) {
        if (contains(name, "h.1.") || contains(name, "h.2.")) continue;
        auto shape = e.shape;
        bool embedding = name[0] == 'w';
        for (uint64_t& d : shape) d = embedding ? 1 : d / C;
        size_t n = 1;
        for (uint64_t d : shape) n *= d;
        p.tensors.push_back({name, {"F32", shape, numbers("F32", n)}});
    }
    save(dir / "hf", p);
    convert::from_hf(dir / "hf", dir / "a.bin");
    convert::to_hf(dir / "a.bin", dir / "back");
    check_published(dir / "back", p);
}

TEST_CASE("convert: a wrong command line is a usage error that says what is wanted") {
    auto error = [](std::vector<const char*> words) {
        words.insert(words.begin(), "convert_gpt2");
        try {
            convert::run((int)words.size(), const_cast<char**>(words.data()));
        } catch (const UsageError& e) {
            return std::string(e.what());
        } catch (const Error& e) {
            return "not a usage error: " + std::string(e.what());
        }
        return std::string();
    };
    CHECK(error({}) == "wanted from-hf DIR out.bin, or to-hf in.bin DIR; see --help");
    CHECK(error({"from_hf", "a", "b"}) == "'from_hf' is not a command; wanted from-hf or to-hf");
    CHECK(error({"from-hf", "a"}) == "from-hf takes two names, found 1: from-hf DIR out.bin");
    CHECK(error({"to-hf", "a", "b", "c"}) == "to-hf takes two names, found 3: to-hf in.bin DIR");
    CHECK(error({"from-hf", "a", "b", "--dtype", "fp16"}) ==
          "--dtype: 'fp16' is unknown; known are fp32, bf16");
    CHECK(error({"from-hf", "a", "b", "--tokenizer_dir", "c"}) == "--tokenizer_dir is only for to-hf");
    CHECK(error({"from-hf", "a", "b", "--tokenizer", "c"}) == "--tokenizer is only for to-hf");
    CHECK(error({"to-hf", "a", "b", "--tokenizer", "c", "--tokenizer_dir", "d"}) ==
          "--tokenizer_dir and --tokenizer do not go together; leave one out");
    CHECK(error({"to-hf", "a", "b", "--dtype", "bf16"}) ==
          "--dtype is only for from-hf; to-hf does not change the numbers");
    CHECK(contains(error({"from-hf", "a", "b", "--dtipe", "bf16"}), "did you mean --dtype?"));
    CHECK(contains(error({"from-hf", "/nonexistent", "b"}),
                   "not a usage error: /nonexistent/config.json: cannot open"));
}

// ---------------------------------------------------------------------------------------------
// What users of PyTorch save

TEST_CASE("convert: a folder of save_model(), which keeps one of two tied tensors, is read") {
    TempDir dir;
    Published p = example(false), tied = p;
    tied.tensors.push_back({"lm_head.weight", tied.at("wte.weight")});
    tied.erase("wte.weight");
    for (Json config : {Json::object(), Json({{"tie_word_embeddings", true}})}) {
        tied.config.update(config);
        save(dir / "hf", tied);
        convert::from_hf(dir / "hf", dir / "a.bin");
        CHECK(same_bits(parameters(dir / "a.bin"), expected(p, false)));
    }
    std::filesystem::remove(dir / "a.bin");
    // transformers would draw random embeddings
    CHECK(tensor_error(dir, tied, [](auto&) {}, {{"tie_word_embeddings", false}}) ==
          "tensor wte.weight is missing");
    CHECK(tensor_error(dir, tied, [](auto& p) { p.at("lm_head.weight").shape = {V * C}; }) ==
          "tensor lm_head.weight: shape is (1572), wanted 2 dimensions");
}

TEST_CASE("convert: tensors named by torch.compile's and DistributedDataParallel's wrappers are read") {
    TempDir dir;
    for (bool grover : {false, true})
        for (std::string wrapper : {"_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."})
            for (std::string prefix : {"transformer.", ""}) {
                INFO(grover, wrapper, prefix);
                Published p = example(grover), saved = p;
                saved.tensors.push_back({"lm_head.weight", saved.at("wte.weight")});
                saved.wrapper = wrapper, saved.prefix = prefix;
                save(dir / "hf", saved);
                convert::from_hf(dir / "hf", dir / "a.bin");
                CHECK(same_bits(parameters(dir / "a.bin"), expected(p, grover)));
            }
    Published p = example(false), blocks = p;  // each block compiled by itself
    for (auto& t : blocks.tensors)
        if (t.first.compare(0, 4, "h.1.") == 0) t.first = "h.1._orig_mod." + t.first.substr(4);
    save(dir / "hf", blocks);
    convert::from_hf(dir / "hf", dir / "a.bin");
    CHECK(same_bits(parameters(dir / "a.bin"), expected(p, false)));

    Published both = example(false);
    both.tensors.push_back({"_orig_mod.wpe.weight", both.at("wpe.weight")});
    std::filesystem::remove(dir / "a.bin");
    CHECK(contains(tensor_error(dir, both, [](auto&) {}), "tensor wpe.weight occurs twice, also as "));
    CHECK(convert::published_name("transformer.h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight");
    CHECK(convert::published_name("h.0.transformer.x") == "h.0.transformer.x");
    CHECK(convert::published_name("modules.x") == "modules.x");
    CHECK(convert::published_name("transformer.transformer.x") == "transformer.x");
    CHECK(convert::published_name(".wte.") == ".wte.");
    CHECK(convert::published_name("") == "");
}

TEST_CASE("convert: padded rows of the embedding are tokens if config.json counts them, else refused") {
    TempDir dir;
    Published p = example(false), padded = p;
    auto& wte = padded.at("wte.weight");
    wte.shape[0] = V + 5, wte.bytes += numbers("F32", 5 * C);
    padded.config["vocab_size"] = V + 5;
    save(dir / "hf", padded);
    convert::from_hf(dir / "hf", dir / "a.bin");
    Config c;
    std::vector<float> x = parameters(dir / "a.bin", &c);
    CHECK(c.V == V + 5);
    CHECK(x[(V + 4) * C + 3] == value(wte, (V + 4) * C + 3));
    convert::to_hf(dir / "a.bin", dir / "back");
    check_published(dir / "back", padded);

    padded.config["vocab_size"] = V;
    save(dir / "hf", padded);
    CHECK(
        error_of([&] { convert::from_hf(dir / "hf", dir / "b.bin"); }) ==
        strf("%s: vocab_size is 131, but %s: tensor transformer.wte.weight has shape (136, 12); if its last "
             "rows are padding, set vocab_size to 136, and they stay as tokens that no text has",
             (dir / "hf/config.json").c_str(), (dir / "hf/model.safetensors").c_str()));
}

TEST_CASE("convert: a LoRA adapter is refused in one line that says how to merge it") {
    TempDir dir;
    make_dirs(dir / "my lora");
    write_file(dir / "my lora/adapter_config.json",
               "{\"peft_type\": \"LORA\", \"base_model_name_or_path\": \"aubmindlab/aragpt2-base\"}");
    write_file(dir / "my lora/adapter_model.safetensors", with_length("{}"));
    auto error = [&](const std::string& hf) {
        return error_of([&] { convert::from_hf(hf, dir / "a.bin"); });
    };
    const std::string wanted =
        dir / "my lora/adapter_config.json" +
        ": is an adapter of aubmindlab/aragpt2-base (PEFT), not a model; merge the two and convert the "
        "result: python3 -c \"from peft import AutoPeftModelForCausalLM as M; import sys; "
        "M.from_pretrained(sys.argv[1]).merge_and_unload().save_pretrained(sys.argv[2])\" '" +
        dir.path + "/my lora' '" + dir.path + "/my lora-merged'";
    CHECK(error(dir / "my lora") == wanted);
    save(dir / "my lora", example(false));  // transformers ignores these weights too
    CHECK(error(dir / "my lora") == wanted);
    CHECK(contains(error(dir / "my lora/"), "/my lora-merged'"));
    write_file(dir / "my lora/adapter_config.json", "{}");
    CHECK(contains(error(dir / "my lora"), "is an adapter of another model (PEFT)"));
    CHECK(!file_exists(dir / "a.bin"));

    Published p = example(false);  // saved without merging
    TempDir other;
    CHECK(contains(tensor_error(other, p,
                                [](auto& p) {
                                    p.tensors.push_back({"h.0.attn.c_attn.lora_A.weight",
                                                         {"F32", {2, C}, numbers("F32", 2 * C)}});
                                }),
                   "is not part of the model; merge LoRA's matrices into the model with merge_and_unload()"));
}

// ---------------------------------------------------------------------------------------------
// Our tokenizers in Hugging Face's form

namespace {

// Saves a model of one channel, with a vocabulary as large as the tokenizer's, and the tokenizer.
void save_model_of(const std::string& dir, const Tokenizer& t) {
    make_dirs(dir);
    Config c;
    c.maxT = 7, c.V = t.vocab_size(), c.Vp = pad_vocab(c.V), c.L = 1, c.NH = 1, c.C = 1;
    ModelWriter w(dir + "/model.bin", c, MODEL_FP32);
    std::vector<float> x(num_params(c));
    for (size_t i = 0; i < x.size(); i++) x[i] = i >= (size_t)c.V && i < (size_t)c.Vp ? 0 : (float)i;
    w.add(x.data(), x.size()), w.finish();
    t.save(dir + "/tokenizer.bin");
}
Tokenizer read_published(const std::string& dir) {
    return exporter::make_tokenizer(exporter::Folder(dir).read());
}
std::string file_of(const Tokenizer& t, const TempDir& dir) {
    t.save(dir / "t.bin");
    return read_file(dir / "t.bin");
}
Json json_in(const std::string& path) { return Json::parse(read_file(path)); }

// Every byte, two merges, an end-of-text, and what else is given.
std::vector<std::string> small_bpe(std::vector<std::string> more = {}) {
    std::vector<std::string> tokens;
    for (int b = 0; b < 256; b++) tokens.push_back(std::string(1, (char)b));
    for (const char* t : {"ab", "\xD8\xA8", "<|endoftext|>"}) tokens.push_back(t);
    tokens.insert(tokens.end(), more.begin(), more.end());
    return tokens;
}

}  // namespace

TEST_CASE("convert: to_hf writes the character tokenizer beside the model, and it reads back the same") {
    using namespace std::string_literals;
    // Quotes, escapes, line breaks of every kind, marks that combine, the ends of the ranges of UTF-8
    const std::string odd =
        "\0\t\n\r "
        "\"\\/<|>\x7F\u0085\u00A0\u0301\u0621\u064E\u07FF\u0800\u200F\u2028\u2029\uFEFF\uFFFD\U00010000"
        "\U0010FFFF"s;
    for (const std::string& text : {odd, "ab\t\n "s, "x"s, ""s}) {
        TempDir dir;
        const Tokenizer t = Tokenizer::characters(text);
        INFO(t.vocab_size());
        save_model_of(dir / "my run", t);
        convert::to_hf(dir / "my run/model.bin", dir / "my run/hf");
        const std::string hf = dir / "my run/hf";
        CHECK(names_in(hf) == std::vector<std::string>{"config.json", "generation_config.json",
                                                       "model.safetensors", "special_tokens_map.json",
                                                       "tokenizer.json", "tokenizer_config.json"});
        const Json j = json_in(hf + "/tokenizer.json"), &model = j["model"];
        CHECK(model["type"] == "WordLevel");
        CHECK(model["vocab"].size() == (size_t)t.vocab_size());
        for (int id = 0; id < t.vocab_size(); id++) CHECK(model["vocab"][t.bytes(id)] == id);
        // An unknown character is an error there, because this token is not in the vocabulary.
        CHECK(!model["vocab"].contains(model["unk_token"].get<std::string>()));
        CHECK(j["pre_tokenizer"]["pattern"]["Regex"] == "[\\s\\S]");
        CHECK(j["normalizer"].is_null());
        CHECK(j["decoder"] == Json({{"type", "Fuse"}}));
        CHECK(j["added_tokens"].size() == 1);
        CHECK(j["added_tokens"][0]["id"] == t.eot());
        CHECK(j["added_tokens"][0]["special"] == true);
        CHECK(j["post_processor"]["single"][0]["SpecialToken"]["id"] == "<|endoftext|>");
        CHECK(j["post_processor"]["special_tokens"]["<|endoftext|>"]["ids"] == Json::array({t.eot()}));
        const Json config = json_in(hf + "/tokenizer_config.json");
        CHECK(config["model_input_names"] == Json({"input_ids", "attention_mask"}));
        CHECK(config["clean_up_tokenization_spaces"] == false);
        CHECK(config["model_max_length"] == 7);
        for (const char* file : {"/config.json", "/generation_config.json"})
            for (const char* field : {"bos_token_id", "eos_token_id"})
                CHECK(json_in(hf + file)[field] == t.eot());
        CHECK(json_in(hf + "/generation_config.json")["pad_token_id"] == t.eot());
        CHECK(json_in(hf + "/generation_config.json")["max_length"] == 7);

        CHECK(file_of(read_published(hf), dir) == read_file(dir / "my run/tokenizer.bin"));
        convert::from_hf(hf, dir / "a.bin");
        CHECK(read_file(dir / "a.bin") == read_file(dir / "my run/model.bin"));
        convert::to_hf(dir / "my run/model.bin", hf);  // once more, in place
        CHECK(count_files(hf) == 6);
    }
}

TEST_CASE("convert: tags are special tokens in Hugging Face's form, and are not generated") {
    TempDir dir;
    const Tokenizer t = Tokenizer::characters("ab", {"<|metre=other|>", "<|metre=\u0628|>"});
    save_model_of(dir / "run", t);
    convert::to_hf(dir / "run/model.bin", dir / "hf");
    const Json j = json_in(dir / "hf/tokenizer.json"), &single = j["post_processor"]["single"];
    CHECK(j["added_tokens"].size() == 3);
    for (const Json& a : j["added_tokens"]) CHECK(a["special"] == true);
    CHECK(single.size() == 3);
    CHECK(single[0]["SpecialToken"]["id"] == "<|endoftext|>");
    CHECK(single[1]["SpecialToken"]["id"] == "<|metre=other|>");
    CHECK(single[2]["Sequence"]["id"] == "A");
    CHECK(json_in(dir / "hf/generation_config.json")["suppress_tokens"] == Json({3, 4}));
    CHECK(json_in(dir / "hf/config.json")["eos_token_id"] == 2);
    CHECK(file_of(read_published(dir / "hf"), dir) == read_file(dir / "run/tokenizer.bin"));
}

TEST_CASE("convert: to_hf writes a byte-level BPE, and it reads back the same") {
    for (bool space : {false, true}) {
        TempDir dir;
        // A token that no merge makes, one with bytes that are no text, one that users added
        const Tokenizer t = Tokenizer::byte_bpe(small_bpe({"<pad>", "abab", "\xFF\xFE\xFD", "[\u0628]"}), 258,
                                                space, "test", {262});
        save_model_of(dir / "run", t);
        convert::to_hf(dir / "run/model.bin", dir / "hf");
        const Json j = json_in(dir / "hf/tokenizer.json");
        CHECK(j["model"]["merges"] == Json({"a b", "\u00D8 \u00A8", "ab ab"}));
        CHECK(j["model"]["vocab"]["\u0120"] == 32);
        CHECK(j["pre_tokenizer"]["add_prefix_space"] == space);
        CHECK(j["added_tokens"].size() == 2);
        CHECK(j["added_tokens"][1]["content"] == "[\u0628]");
        CHECK(j["added_tokens"][1]["special"] == false);
        CHECK(json_in(dir / "hf/config.json")["eos_token_id"] == 258);
        CHECK(file_of(read_published(dir / "hf"), dir) == read_file(dir / "run/tokenizer.bin"));
    }
    TempDir dir;  // its end-of-text is spelled like another token
    auto tokens = small_bpe();
    tokens[258] = "ab";
    save_model_of(dir / "run", Tokenizer::byte_bpe(tokens, 258, false, "test"));
    CHECK(error_of([&] { convert::to_hf(dir / "run/model.bin", dir / "hf"); }) ==
          (dir / "run/tokenizer.bin: token 258 'ab' cannot be written to tokenizer.json: its name is taken"));
    tokens[258] = "\xFF\xFF";
    Tokenizer::byte_bpe(tokens, 258, false, "test").save(dir / "run/tokenizer.bin");
    CHECK(contains(error_of([&] { convert::to_hf(dir / "run/model.bin", dir / "hf"); }),
                   "token 258 '\\xFF\\xFF' cannot be written to tokenizer.json: its name is not UTF-8"));
    CHECK(!file_exists(dir / "hf"));
}

TEST_CASE("convert: --tokenizer names another file; one that does not fit the model is refused") {
    TempDir dir;
    save_model_of(dir / "run", Tokenizer::characters("abc"));
    const std::string model = dir / "run/model.bin", beside = dir / "run/tokenizer.bin";
    auto error = [&](const std::string& tokenizer = "") {
        return error_of([&] { convert::to_hf(model, dir / "hf", "", tokenizer); });
    };
    Tokenizer::characters("xyz").save(dir / "other.bin");
    CHECK(error(dir / "other.bin") == "");
    CHECK(json_in(dir / "hf/tokenizer.json")["model"]["vocab"]["z"] == 2);
    std::filesystem::remove_all(dir / "hf");

    Tokenizer::characters("ab").save(beside);
    CHECK(error() == beside + ": has 3 tokens, " + model +
                         " has a vocabulary of 4; name its tokenizer with --tokenizer FILE or "
                         "--tokenizer_dir SRC");
    write_file(beside, read_file(beside).substr(0, 1025));
    CHECK(contains(error(), "tokenizer.bin: truncated in token 0 of 3"));
    CHECK(contains(error(dir / "none.bin"), "none.bin: cannot open"));
    CHECK(!file_exists(dir / "hf"));
    std::filesystem::remove(beside);  // only the model
    CHECK(error() == "");
    CHECK(names_in(dir / "hf") == std::vector<std::string>{"config.json", "model.safetensors"});
    CHECK(json_in(dir / "hf/config.json")["eos_token_id"].is_null());
}

TEST_CASE("convert: to_hf refuses a folder with files of another tokenizer, which would be mixed up") {
    TempDir dir;
    save_model_of(dir / "run", Tokenizer::characters("abc"));
    auto error = [&] { return error_of([&] { convert::to_hf(dir / "run/model.bin", dir / "hf"); }); };
    make_dirs(dir / "hf");
    for (const char* name : {"vocab.json", "merges.txt", "added_tokens.json"}) {
        write_file(dir / "hf/" + name, "{}");
        CHECK(error() == dir / "hf/" + name +
                             ": is there already, and would be loaded with the tokenizer of " + dir.path +
                             "/run/tokenizer.bin; remove it, or name another folder");
        CHECK(count_files(dir / "hf") == 1);
        std::filesystem::remove(dir / "hf/" + name);
    }
    write_file(dir / "hf/README.md", "mine");
    CHECK(error() == "");
    CHECK(read_file(dir / "hf/README.md") == "mine");
}

TEST_CASE("convert: a full disk leaves an exported folder as it was") {
    TempDir dir;
    save_model_of(dir / "run", Tokenizer::characters("abc"));
    convert::to_hf(dir / "run/model.bin", dir / "hf");
    auto files = [&] {
        std::map<std::string, std::string> content;
        for (const std::string& name : names_in(dir / "hf")) content[name] = read_file(dir / "hf/" + name);
        return content;
    };
    const auto before = files();
    std::string text;  // makes tokenizer.json the largest file
    for (uint32_t c = 0x621; c < 0x921; c++) utf8::append(text, c);
    save_model_of(dir / "run", Tokenizer::characters(text));
    size_t refused = 0;
    for (size_t bytes : {0, 100, 1000, 4000, 8000, 12000}) {
        std::string e;
        {
            FullDisk full(bytes);
            e = error_of([&] { convert::to_hf(dir / "run/model.bin", dir / "hf"); });
        }
        INFO(bytes, e);
        CHECK(contains(e, ": cannot write: "));
        CHECK(files() == before);
        refused += contains(e, "tokenizer.json");
    }
    CHECK(refused > 0);
    convert::to_hf(dir / "run/model.bin", dir / "hf");
    CHECK(files() != before);
}

TEST_CASE("convert: bos, eos and generation_config.json come from the tokenizer and its folder") {
    TempDir dir;
    save(dir / "hf", example(false));
    convert::from_hf(dir / "hf", dir / "a.bin");
    const std::string src = dir / "src", back = dir / "back";
    make_dirs(src);
    write_file(src + "/tokenizer.json",
               "{\"model\": {\"vocab\": {\"<s>\": 1, \"</s>\": 2, \"<|endoftext|>\": 130, \"<x>\": 5}}}");
    struct {
        const char *map, *config;
        Json bos, eos;
    } cases[] = {
        {"{}", "{}", 130, 130},
        {"{\"eos_token\": \"</s>\"}", "{}", 2, 2},
        {"{\"eos_token\": \"</s>\", \"bos_token\": {\"content\": \"<s>\"}}", "{}", 1, 2},
        {"{\"eos_token\": \"<s>\"}", "{\"eos_token\": {\"content\": \"</s>\"}}", 2, 2},
        {"{}", "{\"bos_token\": \"<s>\", \"eos_token\": null}", 1, 130},
        {"{}", "{\"eos_token\": \"none\", \"bos_token\": \"<x>\"}", 5, Json()},
        {"{}", "{\"eos_token\": \"</s>\", \"bos_token\": \"none\"}", 2, 2},
    };
    for (auto& k : cases) {
        INFO(k.map, " ", k.config);
        std::filesystem::remove_all(back);
        write_file(src + "/special_tokens_map.json", k.map);
        write_file(src + "/tokenizer_config.json", k.config);
        convert::to_hf(dir / "a.bin", back, src);
        CHECK(json_in(back + "/config.json")["bos_token_id"] == k.bos);
        CHECK(json_in(back + "/config.json")["eos_token_id"] == k.eos);
        CHECK(file_exists(back + "/generation_config.json") == !k.eos.is_null());
        if (k.eos.is_null()) continue;
        CHECK(json_in(back + "/generation_config.json") == Json({{"bos_token_id", k.bos},
                                                                 {"eos_token_id", k.eos},
                                                                 {"pad_token_id", k.eos},
                                                                 {"max_length", T}}));
    }
    // generation_config.json is kept, except bos and eos ids that are GPT-2's and not the tokenizer's.
    write_file(src + "/tokenizer_config.json", "{\"bos_token\": \"<s>\", \"eos_token\": \"</s>\"}");
    auto generation = [&](const char* given) {
        write_file(src + "/generation_config.json", given);
        convert::to_hf(dir / "a.bin", back, src);
        return json_in(back + "/generation_config.json");
    };
    CHECK(generation("{\"bos_token_id\": 50256, \"eos_token_id\": 50256, \"top_k\": 7, \"max_length\": 5}") ==
          Json({{"bos_token_id", 1},
                {"eos_token_id", 2},
                {"pad_token_id", 2},
                {"max_length", 5},
                {"top_k", 7}}));
    CHECK(generation("{\"eos_token_id\": [9, 2], \"pad_token_id\": 0}") ==
          Json({{"bos_token_id", 1}, {"eos_token_id", {9, 2}}, {"pad_token_id", 0}, {"max_length", T}}));
    CHECK(generation("{\"eos_token_id\": [9, 50256]}")["eos_token_id"] == 2);
    CHECK(generation("{\"pad_token_id\": 50256}")["pad_token_id"] == 2);
    CHECK(generation("{\"max_length\": 1024}")["max_length"] == T);  // more than the context
    CHECK(generation("{\"max_length\": null}")["max_length"] == T);
    CHECK(generation("{\"pad_token_id\": null}")["pad_token_id"].is_null());
    CHECK(contains(error_of([&] { generation("[]"); }), "generation_config.json: is [], wanted an object"));
}

TEST_CASE("export: a text is encoded as the added tokens that it spells, the longest first") {
    TempDir dir;
    Tokenizer t = Tokenizer::byte_bpe(small_bpe({"[v]", "[verse]", "[ve", "ab ", "\n"}), 258, false, "test",
                                      {259, 260, 261, 262, 263});
    using Ids = std::vector<int>;
    CHECK(t.encode("[verse]ab[v][vx[ve]") == Ids{260, 256, 259, '[', 'v', 'x', 261, ']'});
    CHECK(t.encode("xab ab") == Ids{'x', 262, 256});
    CHECK(t.encode("[verse") == Ids{261, 'r', 's', 'e'});
    CHECK(t.encode("\n\n<|endoftext|>")[1] == 263);
    CHECK(t.encode("<|endoftext|>").size() == 13);
    CHECK(t.encode("") == Ids{});
    CHECK(t.decode(t.encode("ab[verse]\n[v]")) == "ab[verse]\n[v]");
    const std::string file = file_of(t, dir);
    t = Tokenizer::load(dir / "t.bin");
    CHECK(file_of(t, dir) == file);
    CHECK(t.encode("[verse]ab") == Ids{260, 256});
    // A space is put before each part of the text that begins with none.
    t = Tokenizer::byte_bpe(small_bpe({"[v]"}), 258, true, "test", {259});
    CHECK(t.encode("[v]ab[v] ab") == Ids{259, ' ', 256, 259, ' ', 256});

    // Against a search at every place and for every token
    t = Tokenizer::byte_bpe(small_bpe({"x", "xy", "xyz", "yzx", "yy", "zyxzy", "z"}), 258, false, "test",
                            {259, 260, 261, 262, 263, 264, 265});
    test::Random random(1);
    for (int n = 0; n < 2000; n++) {
        std::string text;
        for (size_t k = random.below(12); k > 0; k--) text += "xyzw"[random.below(4)];
        Ids want;
        for (size_t i = 0; i < text.size();) {
            int best = (unsigned char)text[i];
            for (int id = 259; id <= 265; id++)
                if (text.compare(i, t.bytes(id).size(), t.bytes(id)) == 0 &&
                    (best < 256 || t.bytes(id).size() > t.bytes(best).size()))
                    best = id;
            want.push_back(best), i += t.bytes(best).size();
        }
        INFO(text);
        CHECK(t.encode(text) == want);
    }
    // They may have the bytes of another token, or of two.
    t = Tokenizer::byte_bpe(small_bpe({"ab", "ba"}), 258, false, "test", {259, 260});
    CHECK(t.encode("abba ab") == Ids{259, 260, ' ', 259});
    CHECK(t.parts(260).first == -1);
    CHECK(error_of([&] {
              Tokenizer::byte_bpe(small_bpe({"u", "u"}), 258, false, "F", {259, 260});
          }) == "F: added tokens 259 and 260 are both 'u'");
}

TEST_CASE("export: damaged lists of added tokens in a tokenizer file are refused") {
    TempDir dir;
    const std::string good =
        file_of(Tokenizer::byte_bpe(small_bpe({"[v]", "[w]"}), 258, false, "test", {259, 260}), dir);
    auto error = [&](const std::string& content) {
        write_file(dir / "t.bin", content);
        std::string e = error_of([&] { Tokenizer::load(dir / "t.bin"); }), file = dir / "t.bin: ";
        return e.compare(0, file.size(), file) == 0 ? e.substr(file.size()) : e;
    };
    CHECK(error(good) == "");
    CHECK(error(with_header(good, 7, 3)) ==
          strf("truncated in added token 2 of 3: 0 bytes at offset %zu, wanted 4", good.size()));
    CHECK(contains(error(with_header(good, 7, 1)), "(trailing data)"));
    CHECK(error(with_header(good, 7, -1)) == "number of added tokens is -1, wanted 0 to 261");
    CHECK(contains(error(good.substr(0, good.size() - 1)), "truncated in added token 1 of 2"));
    for (int32_t id : {259, 258, 261, -1}) {
        std::string bad = good;
        memcpy(&bad[good.size() - 4], &id, 4);
        CHECK(contains(error(bad), strf("added token 1 of 2 is %d, wanted one from 260 to 260", id)));
    }
    std::string bad = good;
    int32_t eot = 258;
    memcpy(&bad[good.size() - 8], &eot, 4);
    CHECK(
        contains(error(bad), "added token 0 of 2 is 258, wanted one from 0 to 260 that is not end-of-text"));
}

TEST_CASE("export: added tokens and padding of a published folder are those of transformers") {
    TempDir dir;
    const std::string hf = dir / "hf";
    make_dirs(hf);
    const Tokenizer plain = Tokenizer::byte_bpe(small_bpe(), 258, false, "test");
    exporter::Json j = exporter::Json::parse(huggingface::tokenizer_json(plain, "test").dump());
    auto added = [](int id, const char* content, bool special,
                    exporter::Json flags = exporter::Json::object()) {
        exporter::Json a = {{"id", id}, {"content", content}, {"special", special}, {"normalized", !special}};
        a.update(flags);
        return a;
    };
    auto error = [&] {
        write_file(hf + "/tokenizer.json", j.dump());
        return error_of([&] { read_published(hf); });
    };
    const exporter::Json before = j["added_tokens"];
    j["added_tokens"].push_back(added(259, "[v]", false));
    j["added_tokens"].push_back(added(260, "<s>", true));
    CHECK(error() == "");
    Tokenizer t = read_published(hf);
    CHECK(t.encode("[v]<s>") == std::vector<int>{259, '<', 's', '>'});
    j["added_tokens"] = before;
    j["added_tokens"].push_back(added(259, "\u0628", false));  // token 257 has the same bytes
    j["added_tokens"].push_back(added(260, "ba", false));
    CHECK(error() == "");
    CHECK(read_published(hf).encode("\u0628ba") == std::vector<int>{259, 260});
    for (const char* flag : {"lstrip", "rstrip", "single_word"}) {
        j["added_tokens"] = before;
        j["added_tokens"].push_back(added(259, "[v]", false, {{flag, true}}));
        CHECK(contains(error(), strf("tokenizer.json: %s of the added token '[v]' is true", flag)));
        j["added_tokens"][1]["special"] = true;  // text is never encoded as a special token
        CHECK(error() == "");
    }
    j["added_tokens"] = before;
    j["added_tokens"].push_back(added(259, "[v]", false));
    j["added_tokens"].push_back(added(260, "[w]", false, {{"normalized", false}}));
    CHECK(contains(error(), "some added tokens are normalized and some are not"));
    j["added_tokens"] = before;
    j["added_tokens"].push_back(added(256, "ab", false));
    CHECK(contains(error(), "merge 0 makes the added token 'ab'"));

    // added_tokens.json does not say which tokens are special.
    j["added_tokens"] = before;
    write_file(hf + "/added_tokens.json", "{\"[v]\": 259, \"<pad>\": 260, \"<c>\": 261, \"<d>\": 262}");
    write_file(hf + "/special_tokens_map.json",
               "{\"pad_token\": {\"content\": \"<pad>\"}, \"additional_special_tokens\": [\"<c>\"]}");
    write_file(hf + "/tokenizer_config.json",
               "{\"added_tokens_decoder\": {\"262\": {\"content\": \"<d>\", \"special\": true}}}");
    CHECK(error() == "");
    t = read_published(hf);
    for (int id = 259; id < 263; id++) CHECK(t.is_added(id) == (id == 259));

    // The files that say so are read once, not for each token.
    exporter::Json many, decoder;
    for (int id = 259; id < 5000; id++) {
        const std::string token = strf("<|%d|>", id);
        many[token] = id, decoder[std::to_string(id)] = {{"content", token}, {"special", id % 2 == 0}};
    }
    write_file(hf + "/added_tokens.json", many.dump());
    write_file(hf + "/tokenizer_config.json", exporter::Json({{"added_tokens_decoder", decoder}}).dump());
    const clock_t start = clock();
    t = read_published(hf);
    CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 5);
    for (int id = 259; id < 5000; id++) REQUIRE(t.is_added(id) == (id % 2 == 1));
    write_file(hf + "/added_tokens.json", "{\"[v]\": 259, \"<pad>\": 260, \"<c>\": 261, \"<d>\": 262}");

    // Padding
    write_file(hf + "/config.json", "{\"vocab_size\": 270}");
    t = read_published(hf);
    CHECK(t.vocab_size() == 270);
    CHECK(t.bytes(269) == "<|unused269|>");
    CHECK(t.encode("<|unused269|>").size() == 13);
    CHECK(t.encode("[v]") == std::vector<int>{259});
    for (const char* other : {"{\"vocab_size\": 263}", "{\"vocab_size\": 3}", "{\"vocab_size\": -1}", "{}",
                              "{\"vocab_size\": 9e9}"}) {
        write_file(hf + "/config.json", other);
        CHECK(read_published(hf).vocab_size() == 263);
    }
}

TEST_CASE("export: a WordLevel tokenizer that is not one of ours is refused") {
    TempDir dir;
    const std::string hf = dir / "hf";
    save_model_of(dir / "run", Tokenizer::characters("ab"));
    convert::to_hf(dir / "run/model.bin", hf);
    const Json good = json_in(hf + "/tokenizer.json");
    auto error = [&](const char* at, Json value) {
        Json j = good;
        j[Json::json_pointer(at)] = value;
        write_file(hf + "/tokenizer.json", j.dump());
        return error_of([&] { read_published(hf); });
    };
    CHECK(error("/version", "1.0") == "");
    CHECK(
        contains(error("/pre_tokenizer", Json()), "pre_tokenizer of a WordLevel model is 'null', wanted {"));
    CHECK(contains(error("/pre_tokenizer/pattern/Regex", "."), "pre_tokenizer of a WordLevel model is"));
    CHECK(contains(error("/normalizer", {{"type", "NFC"}}), "has a normalizer, wanted none"));
    CHECK(contains(error("/model/vocab", {{"b", 0}, {"a", 1}, {"<|endoftext|>", 2}}),
                   "token 0 is 'b', wanted characters in the order of their code points"));
    CHECK(contains(error("/model/vocab", {{"a", 0}, {"bc", 1}, {"<|endoftext|>", 2}}),
                   "token 1 is 'bc', wanted characters"));
    CHECK(contains(error("/model/vocab", Json::array()), "has no vocabulary"));
}
