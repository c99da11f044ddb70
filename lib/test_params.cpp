// test_params.cpp - the table of the parameter tensors, where each lies in file and memory, and the presets.
#include <doctest/doctest.h>

#include <set>

#include "dev/test_model.h"

using namespace test;

TEST_CASE("the parameter table has GPT-2's tensors, and presets the published sizes") {
    struct {
        const char* name;
        size_t params;  // published, vocabulary of 50257
    } published[] = {{"gpt2", 124439808},
                     {"gpt2-medium", 354823168},
                     {"gpt2-large", 774030080},
                     {"gpt2-xl", 1557611200}};
    for (auto& p : published) {
        Config c = preset_config(p.name);
        CHECK(num_params(c) - (size_t)(c.Vp - c.V) * c.C == p.params);
    }
    std::string e = error_of([] { preset_config("gpt3"); });
    CHECK(contains(e, "'gpt3' is unknown; known are tiny, char, gpt2"));
    Config c = config(2, 3, 48, 97, 40);
    CHECK(c.Vp == 128);
    CHECK(pad_vocab(128) == 128);
    CHECK(pad_vocab(129) == 256);
    auto off = param_offsets(c);
    CHECK(off[WPE] - off[WTE] == 128 * 48);
    CHECK(off[QKVB] - off[QKVW] == 2 * 3 * 48 * 48);
    CHECK(off[NUM_PARAMS] == num_params(c));
    // 6 per parameter and token, and the attention: 12 L C T per token.
    double per_token = 6.0 * (double)(num_params(c) - 40 * 48 - (128 - 97) * 48) + 12.0 * 2 * 48 * 37;
    check_close("step_flops", step_flops(c, 3, 37), per_token * 3 * 37, 1e-12);
}

TEST_CASE("every row of the parameter table is there, and no two have one name") {
    std::set<std::string> names;
    for (const ParamInfo& p : param_table(config(2, 3, 48, 97, 40))) {
        REQUIRE(p.name);  // a forgotten row would compile
        names.insert(p.name);
    }
    CHECK(names.size() == NUM_PARAMS);
}

TEST_CASE("the pieces cover every element of file and memory exactly once, in the file's order") {
    const Config configs[] = {config(1, 1, 1, 1, 1), config(2, 3, 12, 23, 9), config(5, 2, 10, 200, 7)};
    for (const Config& c : configs) {
        INFO(c.text());
        const size_t n = num_params(c);
        std::vector<int> in_file(n), in_memory(n);
        std::vector<ParamPiece> pieces = param_pieces(c);
        ParamTable table = param_table(c);
        auto off = param_offsets(c);
        size_t i = 0;
        for (int id = 0; id < NUM_PARAMS; id++)
            for (size_t l = 0; l < table[id].layers; l++) {
                REQUIRE(i < pieces.size());
                const ParamPiece& t = pieces[i++];
                CHECK((t.id == id && t.layer == l && t.decay == table[id].decay));
                CHECK((t.size == table[id].per_layer() && t.file == off[id] + l * t.size));
                REQUIRE((t.file + t.size <= n && t.memory + t.size <= n));
                for (size_t j = 0; j < t.size; j++) in_file[t.file + j]++, in_memory[t.memory + j]++;
            }
        CHECK(i == pieces.size());
        CHECK((size_t)std::count(in_file.begin(), in_file.end(), 1) == n);
        CHECK((size_t)std::count(in_memory.begin(), in_memory.end(), 1) == n);
    }
}

TEST_CASE("memory holds wte, wpe, each block's matrices and its vectors, lnfw, lnfb, without a gap") {
    Config c = config(3, 2, 10, 20, 7);
    std::vector<std::pair<int, size_t>> want = {{WTE, 0}, {WPE, 0}}, got;
    for (size_t l = 0; l < 3; l++)
        for (int id : {QKVW, ATTPROJW, FCW, FCPROJW, LN1W, LN1B, QKVB, ATTPROJB, LN2W, LN2B, FCB, FCPROJB})
            want.push_back({id, l});
    want.push_back({LNFW, 0}), want.push_back({LNFB, 0});
    std::vector<ParamPiece> pieces = param_pieces(c);
    std::sort(pieces.begin(), pieces.end(),
              [](const ParamPiece& a, const ParamPiece& b) { return a.memory < b.memory; });
    size_t next = 0;
    for (const ParamPiece& t : pieces) {
        CHECK(t.memory == next);
        next = t.memory + t.size;
        got.push_back({t.id, t.layer});
    }
    CHECK(next == num_params(c));
    CHECK((got == want));
}

TEST_CASE("a model's tensors, by name, by number and layer, and as pieces, are the same memory") {
    Config c = config(3, 2, 10, 20, 7);
    Floats memory(num_params(c));
    Params<float> p(memory.data(), c);
    for (const ParamPiece& t : param_pieces(c)) {
        INFO(param_table(c)[t.id].name, " of layer ", t.layer);
        Layer<float> b = p.layer(t.layer);
        const float* named[] = {p.wte,  p.wpe,  b.ln1w, b.ln1b, b.qkvw,    b.qkvb,    b.attprojw, b.attprojb,
                                b.ln2w, b.ln2b, b.fcw,  b.fcb,  b.fcprojw, b.fcprojb, p.lnfw,     p.lnfb};
        CHECK(p.tensor(t.id, t.layer) == &memory[t.memory]);
        REQUIRE((size_t)t.id < std::size(named));
        CHECK(named[t.id] == &memory[t.memory]);
    }
}
