// test_golden.cpp - compares the CPU trainer with PyTorch: logits, loss, gradients, ten AdamW steps, and the
// decoder. Must be run in the root of the repository; golden.py writes golden.bin. Prints the measured
// errors, to show how close they are to the bounds.
#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#include "train_gpt2.cpp"

#include <doctest/doctest.h>

#include "dev/golden/golden.h"
#include "dev/test_util.h"

namespace {

const char* const PATH = "dev/golden/golden.bin";
const char* const CASES[] = {"gpt2", "grover_erf", "grover_tanh"};

// The largest absolute difference; NaN if there is one.
double max_abs(const float* a, const float* b, size_t n) {
    double worst = 0;
    for (size_t i = 0; i < n; i++) {
        double d = std::fabs((double)a[i] - b[i]);
        if (d > worst || d != d) worst = d;
    }
    return worst;
}

double relative_l2(const float* a, const float* want, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)a[i] - want[i];
        diff += d * d, norm += (double)want[i] * want[i];
    }
    return std::sqrt(diff / norm);
}

void load(cpu::GPT2& model, const Golden& g) { test::set_piece(model, PARAMS, g.params); }

Pass training_pass(const Golden& g) {
    Pass pass;
    pass.train = true;
    pass.grad_scale = 1.0f / (float)g.counted();
    return pass;
}

double forward(cpu::GPT2& model, const Golden& g, const Pass& pass) {
    return model.forward(g.tokens.data(), g.targets.data(), g.B, g.T, pass);
}

}  // namespace

TEST_CASE("logits agree with PyTorch's to 1e-4 and the loss to 1e-5, in training and evaluation") {
    for (const std::string name : CASES)
        for (bool train : {true, false}) {
            CAPTURE(name);
            CAPTURE(train);
            Golden g = read_golden(PATH, name);
            cpu::GPT2 model(g.cfg, g.B, g.T, train);
            load(model, g);
            double loss_error = std::fabs(forward(model, g, train ? training_pass(g) : Pass{}) - g.loss);
            std::vector<float> logits(g.logits.size());
            model.logits(logits.data());
            double error = max_abs(logits.data(), g.logits.data(), logits.size());
            printf("%-12s %-11s logits %.1e  loss %.1e\n", name.c_str(), train ? "training" : "evaluating",
                   error, loss_error);
            CHECK(error <= 1e-4);
            CHECK(loss_error <= 1e-5);
            CHECK(model.counted() == g.counted());
        }
}

TEST_CASE("gradients agree with PyTorch's to 1e-4, with micro-batches and recomputation, too") {
    for (const std::string name : CASES) {
        CAPTURE(name);
        Golden g = read_golden(PATH, name);
        ParamTable table = param_table(g.cfg);
        auto off = param_offsets(g.cfg);
        double worst = 0;
        std::string worst_name;
        for (int recompute : {0, 1, 2, 3})
            for (size_t sequences : {g.B, (size_t)1}) {
                CAPTURE(recompute);
                CAPTURE(sequences);
                cpu::GPT2 model(g.cfg, g.B, g.T, true, recompute);
                load(model, g);
                Pass pass = training_pass(g);
                for (size_t b = 0; b < g.B; b += sequences) {
                    pass.seq0 = b;
                    model.forward(&g.tokens[b * g.T], &g.targets[b * g.T], sequences, g.T, pass);
                    model.backward();
                }
                std::vector<float> grads = test::piece(model, GRADS);
                for (int i = 0; i < NUM_PARAMS; i++)
                    // Layer by layer, so that a layer with large gradients does not hide another's error.
                    for (size_t layer = 0; layer < table[i].layers; layer++) {
                        std::string tensor = table[i].name;
                        size_t n = table[i].per_layer(), at = off[i] + layer * n;
                        double error = relative_l2(&grads[at], &g.grads[at], n);
                        CAPTURE(tensor);
                        CAPTURE(layer);
                        CHECK(error <= 1e-4);
                        if (!(error <= worst)) worst = error, worst_name = tensor;
                    }
                size_t used = (size_t)g.cfg.V * g.cfg.C;
                CHECK(max_abs(&grads[used], &g.grads[used], off[WPE] - used) == 0);
            }
        printf("%-12s gradients   %.1e at worst (%s)\n", name.c_str(), worst, worst_name.c_str());
    }
}

TEST_CASE("the losses of ten AdamW steps with decay and clipping agree with PyTorch's to 1e-4") {
    for (const std::string name : CASES) {
        CAPTURE(name);
        Golden g = read_golden(PATH, name);
        cpu::GPT2 model(g.cfg, g.B, g.T, true);
        load(model, g);
        StepSettings adam;
        adam.lr = 1e-3f, adam.beta1 = 0.9f, adam.beta2 = 0.95f, adam.eps = 1e-8f, adam.weight_decay = 0.1f;
        double worst = 0, worst_norm = 0;
        for (size_t step = 0; step < g.losses.size(); step++) {
            CAPTURE(step);
            double error = std::fabs(forward(model, g, training_pass(g)) - g.losses[step]);
            CHECK(error <= 1e-4);
            worst = std::max(worst, error);
            if (step == g.norms.size()) break;
            model.backward();
            double norm = model.grad_norm(), norm_error = std::fabs(norm / g.norms[step] - 1);
            CHECK(norm_error <= 1e-3);
            worst_norm = std::max(worst_norm, norm_error);
            model.update(adam, (uint32_t)step + 1, norm > 1 ? (float)(1 / norm) : 1.0f);
        }
        printf("%-12s ten steps   losses %.1e  gradient norms %.1e (relative)\n", name.c_str(), worst,
               worst_norm);
        size_t used = (size_t)g.cfg.V * g.cfg.C, end = param_offsets(g.cfg)[WPE];
        CHECK(max_abs(&test::piece(model, PARAMS)[used], &g.params[used], end - used) == 0);
    }
}

TEST_CASE("ten steps of Muon change the matrices as PyTorch's do, whose iteration is in bf16: to 5%") {
    for (Dtype dtype : {FP32, BF16}) {
        CAPTURE(dtype);
        Golden g = read_golden(PATH, "gpt2");
        GoldenFile file(PATH);
        cpu::GPT2 model(g.cfg, g.B, g.T, true, 0, Precision{dtype, true}, {}, MUON);
        load(model, g);
        StepSettings settings;
        settings.lr = 1e-3f, settings.muon_lr = 5e-3f;
        const std::vector<float>&losses = file.floats("muon/losses", {11}),
              &norms = file.floats("muon/norms", {10});
        double worst = 0;
        for (size_t step = 0; step < losses.size(); step++) {
            CAPTURE(step);
            const double error = std::fabs(forward(model, g, training_pass(g)) - losses[step]);
            CHECK(error <= (dtype == FP32 ? 1e-3 : 6e-3));
            worst = std::max(worst, error);
            if (step == norms.size()) break;
            model.backward();
            const double norm = model.grad_norm();
            CHECK(std::fabs(norm / norms[step] - 1) <= (dtype == FP32 ? 5e-3 : 2e-2));
            model.update(settings, (uint32_t)step + 1, norm > 1 ? (float)(1 / norm) : 1.0f);
        }
        printf("muon, %s   ten steps   losses %.1e  changes", dtype == FP32 ? "fp32" : "bf16", worst);
        const std::vector<float> after = test::piece(model, PARAMS);
        const auto off = param_offsets(g.cfg);
        const size_t L = g.cfg.L, C = g.cfg.C;
        for (auto [id, rows, cols] : {std::tuple<int, size_t, size_t>{QKVW, 3 * C, C},
                                      {ATTPROJW, C, C},
                                      {FCW, 4 * C, C},
                                      {FCPROJW, C, 4 * C}}) {
            const char* name = param_table(g.cfg)[id].name;
            CAPTURE(name);
            std::vector<float> want = file.floats(strf("muon/%s", name), {L, rows, cols}), got(want.size());
            for (size_t i = 0; i < want.size(); i++)
                got[i] = after[off[id] + i] - g.params[off[id] + i], want[i] -= g.params[off[id] + i];
            const double error = relative_l2(got.data(), want.data(), want.size());
            CHECK(error <= 5e-2);
            printf(" %s %.1e", name, error);
        }
        printf(" (relative)\n");
    }
}

TEST_CASE("the decoder's logits agree with PyTorch's to 1e-4, token by token and in pieces") {
    for (const std::string name : CASES) {
        CAPTURE(name);
        Golden g = read_golden(PATH, name);
        cpu::GPT2 model(g.cfg, 0, 0, false);
        load(model, g);
        cpu::Decoder decoder(model, g.B, g.T);
        double worst = 0;
        for (size_t piece : {(size_t)1, (size_t)5, g.T}) {
            CAPTURE(piece);
            decoder.reset();
            for (size_t t = 0, n; t < g.T; t += n) {
                n = std::min(piece, g.T - t);
                std::vector<int> tokens;
                for (size_t b = 0; b < g.B; b++)
                    tokens.insert(tokens.end(), &g.tokens[b * g.T + t], &g.tokens[b * g.T + t] + n);
                const float* logits = decoder.append_to_all(tokens.data(), n);
                for (size_t b = 0; b < g.B; b++) {
                    double error =
                        max_abs(logits + b * g.cfg.V, &g.logits[(b * g.T + t + n - 1) * g.cfg.V], g.cfg.V);
                    CHECK(error <= 1e-4);
                    worst = std::max(worst, error);
                }
            }
        }
        printf("%-12s decoder     logits %.1e\n", name.c_str(), worst);
    }
}

TEST_CASE("a damaged golden file is refused with an error that names it") {
    TempDir dir;
    std::string whole = read_file(PATH), path = dir / "golden.bin";
    auto refused = [&](const std::string& bytes) {
        write_file(path, bytes);
        return error_of([&] { read_golden(path, "gpt2"); }).compare(0, path.size(), path) == 0;
    };
    auto with = [&](size_t at, char byte) {
        std::string s = whole;
        s[at] = byte;
        return s;
    };
    CHECK(!refused(whole));
    for (size_t n : {(size_t)0, (size_t)15, (size_t)40, (size_t)200, whole.size() / 2, whole.size() - 1})
        CHECK(refused(whole.substr(0, n)));
    CHECK(refused(whole + '\0'));
    CHECK(refused(with(0, 'g')));
    CHECK(refused(with(4, 2)));
    size_t config = 16 + (unsigned char)whole[12], data = config + 48;
    CHECK(refused(with(config, 'k')));            // no tensor 'config'
    CHECK(refused(with(config + 24, 0)));         // config as floats
    CHECK(refused(with(config + 32, 7)));         // config with 7 numbers
    CHECK(refused(with(data + 12, 5)));           // C not a multiple of NH
    CHECK(refused(with(data + 32 + 48 + 3, 1)));  // the first token out of range
    CHECK_THROWS_AS(read_golden(PATH, "gpt3"), Error);
}
