// test_model_file.cpp - model files: written, read back, damaged.
#include <doctest/doctest.h>

#include "dev/test_model.h"
#include "lib/checkpoint.h"

using namespace test;

namespace {

// What reading a whole model file says; "" where all is well.
std::string reading_error(const std::string& path) {
    return error_of([&] {
        ModelReader reader(path);
        PlainModel m(reader.cfg);
        trainer::load_model(m, reader);
    });
}

}  // namespace

TEST_CASE("bf16 keeps every bf16 number, rounds others to nearest even, and NaN stays NaN") {
    for (uint32_t h = 0; h < 65536; h++) {
        float f = bf16_to_float((uint16_t)h);
        if (std::isnan(f)) CHECK(std::isnan(bf16_to_float(float_to_bf16(f))));
        else if (float_to_bf16(f) != h) FAIL("bf16 ", h, " came back as ", float_to_bf16(f));
    }
    Random r(80);
    size_t wrong = 0;
    for (int i = 0; i < 20000; i++) {
        float f = (float)(r.normal() * std::pow(10.0, r.uniform() * 20 - 10));
        uint16_t h = float_to_bf16(f);
        double error = std::fabs((double)bf16_to_float(h) - f);
        for (int step : {-1, 1}) wrong += std::fabs((double)bf16_to_float((uint16_t)(h + step)) - f) < error;
    }
    CHECK(wrong == 0);
    CHECK(float_to_bf16(1.0f + 0x1p-8f) == 0x3F80);            // half way: to the even one below
    CHECK(float_to_bf16(1.0f + 0x1p-7f + 0x1p-8f) == 0x3F82);  // and above
    CHECK(float_to_bf16(-3.4e38f) == 0xFF80);                  // overflows to infinity
    uint32_t bits = 0x7F800001;  // a NaN whose upper half alone would be infinity
    float nan;
    memcpy(&nan, &bits, 4);
    CHECK(std::isnan(bf16_to_float(float_to_bf16(nan))));
}

TEST_CASE("model files come back bit for bit, fp32 and bf16, with llm.c's header") {
    TempDir dir;
    Config c = small_config();
    PlainModel m(c), back(c);
    randomise(m, 81);
    std::string path = dir / "model.bin";
    trainer::save_model(m, path);
    CHECK(count_files(dir.path) == 1);  // no temporary file is left
    {
        ModelReader reader(path);
        CHECK(reader.cfg.same_shape(c));
        CHECK(reader.version == MODEL_FP32);
        trainer::load_model(back, reader);
    }
    CHECK(same_bits(parameters(m), parameters(back)));
    std::string bytes = read_file(path);
    REQUIRE(bytes.size() == 1024 + 4 * num_params(c));
    const int32_t want[12] = {20240326, 3, c.maxT, c.V, c.L, c.NH, c.C, c.Vp, 1, 1, 0, 0};
    CHECK(!memcmp(bytes.data(), want, sizeof want));
    Floats p = parameters(m);
    CHECK(!memcmp(bytes.data() + 1024, p.data(), 4 * num_params(c)));

    auto write_bf16 = [&](PlainModel& model, const std::string& to) {
        ModelWriter w(to, c, MODEL_BF16);
        Floats all = parameters(model);
        w.add(all.data(), 100), w.add(&all[100], num_params(c) - 100);  // in pieces
        w.finish();
        return read_file(to);
    };
    std::string half = write_bf16(m, dir / "half.bin");
    REQUIRE(half.size() == 1024 + 2 * num_params(c));
    {
        ModelReader reader(dir / "half.bin");
        CHECK(reader.version == MODEL_BF16);
        trainer::load_model(back, reader);
    }
    Floats read_back = parameters(back);
    for (size_t i = 0; i < num_params(c); i++) CHECK(read_back[i] == rounded(p[i]));
    CHECK((write_bf16(back, dir / "half2.bin") == half));

    CHECK(contains(error_of([&] { ModelWriter(dir / "x", c).finish(); }), "parameters missing"));
    CHECK(contains(error_of([&] {
                       ModelWriter w(dir / "x", c);
                       w.add(p.data(), num_params(c)), w.add(p.data(), 3);
                   }),
                   "3 parameters too many"));
    CHECK(!file_exists(dir / "x"));
    for (float bad : {NAN, INFINITY}) {  // a model that is no model does not replace one
        p.back() = bad;
        set_piece(m, PARAMS, p);
        CHECK(contains(error_of([&] { trainer::save_model(m, path); }),
                       path + ": not written, the parameters hold NaN or infinity"));
    }
    CHECK((read_file(path) == bytes));
    CHECK(count_files(dir.path) == 3);
}

TEST_CASE("a model file is a header and the tensors in order, and the same when read and saved again") {
    TempDir dir;
    for (Config c : {small_config(), config(3, 3, 9, 20, 7)}) {
        INFO(c.text());
        PlainModel m(c), back(c);
        randomise(m, 88);
        trainer::save_model(m, dir / "model.bin");
        std::vector<int32_t> header = model_header(c, MODEL_FP32);
        std::string want((const char*)header.data(), 1024);
        ParamTable table = param_table(c);
        for (int id = 0; id < NUM_PARAMS; id++)
            for (size_t l = 0; l < table[id].layers; l++)
                want.append((const char*)m.params.tensor(id, l), table[id].per_layer() * sizeof(float));
        CHECK((read_file(dir / "model.bin") == want));
        ModelReader reader(dir / "model.bin");
        trainer::load_model(back, reader);
        trainer::save_model(back, dir / "again.bin");
        CHECK((read_file(dir / "again.bin") == want));
    }
}

TEST_CASE("model files as llm.c writes them, fp32 and bf16, load") {
    TempDir dir;
    const size_t T = 5, V = 11, Vp = 128, L = 3, C = 8;
    const size_t sizes[16] = {Vp * C,    T * C, L * C,         L * C,     L * 3 * C * C, L * 3 * C,
                              L * C * C, L * C,  // wte wpe ln1 qkv attproj
                              L * C,     L * C, L * 4 * C * C, L * 4 * C, L * C * 4 * C, L * C,
                              C,         C};  // ln2 fc fcproj lnf
    for (int version : {3, 5}) {
        std::string bytes(1024, '\0');
        const int32_t header[8] = {20240326, version, (int)T, (int)V, (int)L, 2, (int)C, (int)Vp};
        memcpy(&bytes[0], header, sizeof header);
        auto value = [](size_t tensor, size_t i) {
            return (float)(tensor + 1) + (float)(i % 8) / 8;
        };  // a bf16 number
        for (size_t k = 0; k < 16; k++)
            for (size_t i = 0; i < sizes[k]; i++) {
                float x = k == 0 && i >= V * C ? 0 : value(k, i);
                if (version == 3) bytes.append((const char*)&x, 4);
                else bytes.append((const char*)&x + 2, 2);
            }
        write_file(dir / "llmc.bin", bytes);
        ModelReader reader(dir / "llmc.bin");
        CHECK(
            (reader.cfg.arch == GPT2_ARCH && reader.cfg.activation == GELU_TANH && reader.cfg.eps == 1e-5f));
        PlainModel m(reader.cfg);
        trainer::load_model(m, reader);
        for (size_t l = 0; l < L; l++) {
            const Params<float>& p = m.params;
            Layer<float> b = p.layer(l);
            const float* tensors[] = {p.wte,      p.wpe,      b.ln1w, b.ln1b, b.qkvw, b.qkvb,
                                      b.attprojw, b.attprojb, b.ln2w, b.ln2b, b.fcw,  b.fcb,
                                      b.fcprojw,  b.fcprojb,  p.lnfw, p.lnfb};
            for (size_t k = 0; k < 16; k++) {
                size_t n = k < 2 || k > 13 ? sizes[k] : sizes[k] / L, first = k < 2 || k > 13 ? 0 : l * n;
                for (size_t i = 0; i < n; i++)
                    if (tensors[k][i] != (k == 0 && i >= V * C ? 0 : value(k, first + i)))
                        FAIL("version ", version, ", tensor ", k, ", layer ", l, ", element ", i);
            }
        }
        ModelWriter writer(dir / "ours.bin", reader.cfg, version);  // and what we write is that file
        Floats all = parameters(m);
        writer.add(all.data(), all.size()), writer.finish();
        CHECK((read_file(dir / "ours.bin") == bytes));
    }
}

TEST_CASE("model files with any header field impossible are refused, by the names of file and field") {
    TempDir dir;
    PlainModel m(small_config());
    randomise(m, 82);
    trainer::save_model(m, dir / "good");
    const std::string good = read_file(dir / "good"), path = dir / "bad";
    struct {
        size_t index;
        const char* says;
        std::vector<int32_t> values;
    } fields[] = {{0, "magic number is %d, wanted 20240326", {0, 1, 20240520, -1}},
                  {1, "version is %d, wanted 3 (fp32) or 5 (bf16)", {0, 1, 2, 4, 6, -3}},
                  {2, "maxT is %d, wanted 1 to", {0, -1, INT32_MIN, INT32_MAX}},
                  {3, "V is %d, wanted 1 to", {0, -1, INT32_MIN, INT32_MAX}},
                  {3, "Vp is 16, wanted at least V = %d", {17, 50257}},
                  {4, "L is %d, wanted 1 to", {0, -1, INT32_MIN, INT32_MAX}},
                  {5, "NH is %d, wanted 1 to", {0, -1, INT32_MIN, INT32_MAX}},
                  {5, "C is 8, wanted a multiple of NH = %d", {3, 16}},
                  {6, "C is %d, wanted 1 to", {0, -1, INT32_MIN, INT32_MAX}},
                  {6, "C is %d, wanted a multiple of NH = 2", {7, 9}},
                  {7, "Vp is %d, wanted 1 to", {0, -1, INT32_MIN, INT32_MAX}},
                  {7, "Vp is %d, wanted at least V = 11", {1, 10}},
                  {8, "arch is %d, wanted 0 to 1", {2, -1, INT32_MAX}},
                  {9, "activation is %d, wanted 0 to 1", {2, -1, INT32_MAX}}};
    for (auto& f : fields)
        for (int32_t value : f.values) {
            write_file(path, with_header(good, f.index, value));
            std::string e = reading_error(path), want = f.says;
            size_t at = want.find("%d");
            if (at != std::string::npos) want.replace(at, 2, std::to_string(value));
            CHECK_MESSAGE((contains(e, path) && contains(e, want)), "field ", f.index, " = ", value, ": ", e);
        }
    // Possible values that do not fit the file's length.
    for (size_t index : {2, 4, 6, 7}) {
        int32_t value;
        memcpy(&value, &good[index * 4], 4);
        write_file(path, with_header(good, index, index == 6 ? value + 2 : value + 1));
        std::string e = reading_error(path);
        CHECK_MESSAGE((contains(e, path) && contains(e, "its header asks for") && contains(e, "truncated")),
                      e);
    }
    write_file(path, with_header(good, 1, 5));  // half as long as it says
    CHECK(contains(reading_error(path), "trailing data"));
}

TEST_CASE("a model file's header has LayerNorm's epsilon as a float's bits; bad ones are refused") {
    TempDir dir;
    Config c = small_config();
    const std::string path = dir / "model.bin";
    for (float eps : {1e-12f, 1e-6f, 1e-5f, 1e-3f, 1.0f}) {
        c.eps = eps;
        PlainModel m(c);
        randomise(m, 84);
        trainer::save_model(m, path);
        int32_t word, bits;
        memcpy(&word, &read_file(path)[40], 4), memcpy(&bits, &eps, 4);
        CHECK(word == (eps == 1e-5f ? 0 : bits));
        CHECK(ModelReader(path).cfg.eps == eps);
        CHECK(ModelReader(path).cfg.same_shape(c));
    }
    const std::string good = read_file(path);
    struct {
        uint32_t bits;
        const char* shown;
    } impossible[] = {{0x7fc00000, "nan"}, {0xffffffff, "-nan"},   {0x7f800000, "inf"}, {0xff800000, "-inf"},
                      {0x80000000, "-0"},  {0xb727c5ac, "-1e-05"}, {0x40000000, "2"}};
    for (auto& k : impossible) {
        write_file(path, with_header(good, 10, (int32_t)k.bits));
        CHECK(reading_error(path) ==
              path + ": LayerNorm's epsilon is " + k.shown + ", wanted above 0 and at most 1");
    }
}

TEST_CASE("model files that are truncated, too long, missing, or hold NaN are refused by name") {
    TempDir dir;
    Config c = small_config();
    PlainModel m(c);
    randomise(m, 83);
    trainer::save_model(m, dir / "good");
    const std::string good = read_file(dir / "good"), path = dir / "bad";
    CHECK(reading_error(dir / "good").empty());
    std::vector<size_t> lengths = {0, 1, 3, 4, 1020, 1023, 1024, good.size() - 4, good.size() - 1};
    for (size_t o : param_offsets(c))
        if (o && o < num_params(c)) lengths.push_back(1024 + 4 * o), lengths.push_back(1024 + 4 * o + 1);
    for (size_t n : lengths) {
        write_file(path, good.substr(0, n));
        std::string e = reading_error(path);
        CHECK_MESSAGE((contains(e, path) && contains(e, n < 1024 ? "is not a model file" : "truncated")), n,
                      " bytes: ", e);
    }
    for (size_t extra : {1, 4, 1024}) {
        write_file(path, good + std::string(extra, '\0'));
        std::string e = reading_error(path);
        CHECK((contains(e, path) && contains(e, "trailing data")));
    }
    for (float bad : {NAN, INFINITY, -INFINITY})
        for (size_t at : {(size_t)0, num_params(c) / 2, num_params(c) - 1}) {
            std::string damaged = good;
            memcpy(&damaged[1024 + 4 * at], &bad, 4);
            write_file(path, damaged);
            std::string e = reading_error(path);
            CHECK((contains(e, path) && contains(e, "NaN or infinity")));
        }
    CHECK(contains(reading_error(dir / "missing"), "missing: cannot open"));
    CHECK(contains(reading_error(dir.path), dir.path));
}
