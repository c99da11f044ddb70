// test_ladder.cpp - compares every rung with PyTorch and with finite differences, and tests the ladder's
// runs. Must be run in the root of the repository; ladder_golden.py writes golden.bin.
#include <doctest/doctest.h>

#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#include "dev/ladder/ladder.cpp"

#include "dev/golden/golden.h"
#include "dev/test_util.h"

namespace {

const char* const GOLDEN = "dev/ladder/golden.bin";

// A case of golden.bin: the rung, the batch, PyTorch's values, and a model with the case's parameters.
struct Case {
    std::string name;
    ladder::Rung rung;
    size_t V, C, T, B;
    std::vector<int32_t> tokens, targets;
    std::vector<float> logits, losses;
    std::unique_ptr<ladder::Model> model;
    std::vector<std::vector<float>> grads;  // in the order of model->list
};

const char* const CASES[] = {"rung0", "rung1", "rung2", "rung3",         "rung4",
                             "rung5", "rung6", "rung7", "no_projection", "no_residual"};

Case read_case(const std::string& name) {
    GoldenFile file(GOLDEN);
    const std::vector<int32_t>& s = file.ints("sizes", {6});
    Case c;
    c.name = name;
    c.V = (size_t)s[0], c.C = (size_t)s[1], c.T = (size_t)s[2], c.B = (size_t)s[3];
    c.tokens = file.ints("tokens", {c.B, c.T}), c.targets = file.ints("targets", {c.B, c.T});
    bool rung = name.compare(0, 4, "rung") == 0;
    c.rung = ladder::RUNGS[rung ? name[4] - '0' : name == "no_projection" ? 5 : 7];
    if (c.rung.heads > 1) c.rung.heads = s[5];
    if (c.rung.blocks > 1) c.rung.blocks = s[4];
    if (name == "no_projection") c.rung.projection = false, c.rung.hidden = 1;
    if (name == "no_residual") c.rung.residual = false, c.rung.hidden = 2;
    if (c.rung.dropout > 0) c.rung.dropout = 0.25f;
    c.logits = file.floats(name + "/logits", {c.B, c.T, c.V}), c.losses = file.floats(name + "/losses", {6});
    c.model = std::make_unique<ladder::Model>(c.rung, c.V, c.C, c.T, c.B);
    for (const ladder::Tensor& t : c.model->list) {
        std::vector<size_t> shape = file.shape(name + "/p/" + t.name);
        const std::vector<float>& p = file.floats(name + "/p/" + t.name, shape);
        REQUIRE(p.size() == t.size());
        std::copy(p.begin(), p.end(), c.model->param(t));
        c.grads.push_back(file.floats(name + "/g/" + t.name, shape));
    }
    return c;
}

Pass training(uint32_t step) {
    Pass pass;
    pass.train = true, pass.step = step;
    return pass;
}
double loss(Case& c, uint32_t step) {
    return c.model->forward(c.tokens.data(), c.targets.data(), c.B, c.T, training(step));
}

double relative_error(const float* a, const float* want, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++)
        diff += std::pow((double)a[i] - want[i], 2), norm += (double)want[i] * want[i];
    return std::sqrt(diff) / std::max(std::sqrt(norm), 1e-30);
}

// Writes the files of a small made-up data set.
void write_data(const std::string& dir) {
    std::string text;
    for (int i = 0; i < 300; i++) text += "abcd"[i * i % 7 % 4], text += "xy z"[i % 4];
    Tokenizer t = Tokenizer::characters(text);
    t.save(dir + "/tokenizer.bin");
    std::vector<uint16_t> tokens = {(uint16_t)t.eot()};
    for (int id : t.encode(text)) tokens.push_back((uint16_t)id);
    write_tokens(dir + "/train.bin", tokens);
    tokens.resize(200);
    write_tokens(dir + "/val.bin", tokens);
}

std::string usage_error(std::vector<const char*> words) {
    words.insert(words.begin(), "ladder");
    return error_of([&] { ladder::ladder_main((int)words.size(), const_cast<char**>(words.data())); });
}

}  // namespace

TEST_CASE("each rung's logits agree with PyTorch's to 1e-4 and its loss to 1e-5") {
    for (const std::string name : CASES) {
        CAPTURE(name);
        Case c = read_case(name);
        double worst = 0;
        const float* got = c.model->logits(c.tokens.data(), c.B, c.T, training(0));
        for (size_t i = 0; i < c.logits.size(); i++)
            worst = std::max(worst, (double)std::fabs(got[i] - c.logits[i]));
        CHECK(worst <= 1e-4);
        CHECK(std::fabs(loss(c, 0) - c.losses[0]) <= 1e-5);
    }
}

TEST_CASE("each tensor's gradient agrees with PyTorch's to a relative L2 error of 1e-4") {
    for (const std::string name : CASES) {
        CAPTURE(name);
        Case c = read_case(name);
        loss(c, 0);
        c.model->backward();
        double worst = 0;
        for (size_t k = 0; k < c.grads.size(); k++) {
            const ladder::Tensor& t = c.model->list[k];
            std::string tensor = t.name;
            size_t n = t.size();
            if (tensor == "qkvb") {
                // A constant added to all keys does not change the softmax, so the gradient of the keys' bias
                // is 0 except for rounding.
                std::vector<float>& want = c.grads[k];
                float* got = c.model->grad(t);
                for (size_t i = 0; i < n; i++)
                    if (i / c.C % 3 == 1) {
                        CHECK(std::fabs(got[i]) <= 1e-6);
                        got[i] = want[i];
                    }
            }
            double error = relative_error(c.model->grad(t), c.grads[k].data(), n);
            CAPTURE(tensor);
            CHECK(error <= 1e-4);
            worst = std::max(worst, error);
        }
        printf("%-13s gradients %.1e at worst\n", name.c_str(), worst);
    }
}

TEST_CASE("each rung's gradients agree with finite differences") {
    for (const std::string name : CASES) {
        CAPTURE(name);
        Case c = read_case(name);
        loss(c, 0);
        c.model->backward();
        for (const ladder::Tensor& t : c.model->list) {
            std::string tensor = t.name;
            CAPTURE(tensor);
            // Along the gradient, where the slope is the gradient's norm, and along a random direction.
            std::vector<float> grad(c.model->grad(t), c.model->grad(t) + t.size()),
                start(c.model->param(t), c.model->param(t) + t.size());
            double norm = 0;
            for (float g : grad) norm += (double)g * g;
            norm = std::sqrt(norm);
            for (bool along : {true, false}) {
                double slope = 0;
                std::vector<double> direction(t.size());
                rng::Key key(7, 0, rng::INIT);
                double length = 0;
                for (size_t i = 0; i < t.size(); i++)
                    direction[i] = along ? grad[i] : key.normal(i), length += direction[i] * direction[i];
                length = std::sqrt(length);
                for (size_t i = 0; i < t.size(); i++) direction[i] /= length, slope += direction[i] * grad[i];
                const double h = 5e-4;  // so small that no ReLU switches between the two sides
                double sides[2];
                for (int side : {0, 1}) {
                    for (size_t i = 0; i < t.size(); i++)
                        c.model->param(t)[i] = (float)(start[i] + (side ? h : -h) * direction[i]);
                    sides[side] = loss(c, 0);
                }
                std::copy(start.begin(), start.end(), c.model->param(t));
                CHECK((sides[1] - sides[0]) / (2 * h) ==
                      doctest::Approx(slope).epsilon(0.01).scale(norm + 1e-2));
            }
        }
    }
}

TEST_CASE("the losses of five AdamW steps of each rung agree with PyTorch's to 1e-4") {
    for (const std::string name : CASES) {
        CAPTURE(name);
        Case c = read_case(name);
        StepSettings adam;
        adam.lr = 1e-2f, adam.beta2 = 0.999f, adam.weight_decay = 0.01f;
        for (uint32_t step = 0; step < c.losses.size(); step++) {
            CAPTURE(step);
            CHECK(std::fabs(loss(c, step) - c.losses[step]) <= 1e-4);
            c.model->backward();
            c.model->update(adam, step + 1);
        }
    }
}

TEST_CASE("each rung adds exactly one idea to the rung before") {
    // How many differ of: heads, blocks, feed-forward, residual connections with
    // projections, LayerNorm, dropout
    auto ideas = [](const ladder::Rung& a, const ladder::Rung& b) {
        return (a.heads != b.heads) + (a.blocks != b.blocks && a.blocks) + (!a.hidden != !b.hidden) +
               (a.residual != b.residual || a.projection != b.projection) + (a.layernorm != b.layernorm) +
               (a.dropout != b.dropout);
    };
    for (int k = 1; k < ladder::NUM_RUNGS; k++) {
        CAPTURE(k);
        CHECK(ideas(ladder::RUNGS[k - 1], ladder::RUNGS[k]) == 1);
    }
}

TEST_CASE("a rung's losses do not depend on the number of threads or of simultaneous runs") {
    TempDir dir;
    write_data(dir.path);
    ladder::Options o;
    o.data = o.out = dir.path, o.steps = 12, o.batch_size = 5, o.eval_every = 6, o.eval_batches = 3,
    o.poems = 0;
    ladder::Data data(o.data);
    auto run = [&](int threads) {
        int before = omp_get_max_threads();
        omp_set_num_threads(threads);
        std::vector<double> losses;
        ladder::Model m(ladder::RUNGS[7], (size_t)data.tokenizer.vocab_size(), 32, 8, 5);
        m.seed = o.seed;
        m.init_weights();
        ladder::train(m, data, o, [&](int, double on_train, double on_val) {
            losses.push_back(on_train), losses.push_back(on_val);
        });
        omp_set_num_threads(before);
        return losses;
    };
    std::vector<double> one = run(1), three = run(3), processes;
    CHECK(one.size() == 6);
    CHECK(one == three);
    std::vector<ladder::Job> jobs = {{7, o.seed}, {6, o.seed}, {7, o.seed + 1}};
    ladder::Results results(jobs.size(), o);
    o.jobs = 3;
    ladder::run_jobs(jobs, data, o, results, [](size_t) {});
    for (int i = 0; i < results[0].points; i++)
        processes.push_back(results[0].curve[i].train), processes.push_back(results[0].curve[i].val);
    CHECK(processes == one);
    CHECK(results[2].end().val != one.back());  // another seed
}

TEST_CASE("batches are windows from all places of the file, with the tokens after as targets") {
    TempDir dir;
    std::vector<uint16_t> tokens(20);
    for (size_t i = 0; i < tokens.size(); i++) tokens[i] = (uint16_t)(i * i % 97);
    write_tokens(dir / "t.bin", tokens);
    TokenFile file(dir / "t.bin");
    int x[64 * 6], y[64 * 6];
    std::vector<int> starts;
    for (uint32_t step = 0; step < 10; step++) {
        ladder::random_batch(file, rng::Key(3, step, rng::SHUFFLE, ladder::TRAINING), 64, 6, x, y);
        for (int b = 0; b < 64; b++) {
            size_t at =
                (size_t)(std::find(tokens.begin(), tokens.end(), (uint16_t)x[b * 6]) - tokens.begin());
            starts.push_back((int)at);
            for (size_t t = 0; t < 6; t++) {
                REQUIRE(x[b * 6 + (int)t] == tokens[at + t]);
                REQUIRE(y[b * 6 + (int)t] == tokens[at + t + 1]);
            }
        }
    }
    for (int at = 0; at < 14; at++)
        CHECK(std::count(starts.begin(), starts.end(), at) > 20);  // 640 draws over 14 places
    CHECK(std::count(starts.begin(), starts.end(), 14) == 0);
}

TEST_CASE("the bigram table's loss converges to the text's conditional entropy") {
    TempDir dir;
    // Any letter may follow a and b, only a follows c. The entropy is computed from the counts below.
    std::string text;
    rng::Key key(11, 0, rng::SAMPLE);
    while (text.size() < 4000) text += "abc"[(size_t)(key.uniform(text.size()) * 3)];
    for (size_t i = 1; i < text.size(); i++)
        if (text[i - 1] == 'c') text[i] = 'a';
    Tokenizer t = Tokenizer::characters(text);
    t.save(dir / "tokenizer.bin");
    std::vector<uint16_t> tokens;
    for (int id : t.encode(text)) tokens.push_back((uint16_t)id);
    write_tokens(dir / "train.bin", tokens), write_tokens(dir / "val.bin", tokens);
    double pairs[4][4] = {}, entropy = 0;
    for (size_t i = 1; i < tokens.size(); i++) pairs[tokens[i - 1]][tokens[i]]++;
    for (auto& row : pairs)
        for (double n : row)
            if (n > 0)
                entropy -=
                    n / (double)(tokens.size() - 1) * std::log(n / (row[0] + row[1] + row[2] + row[3]));
    ladder::Options o;
    o.steps = 600, o.learning_rate = 0.02f, o.eval_every = 600, o.batch_size = 64;
    ladder::Data data(dir.path);
    ladder::Model m(ladder::RUNGS[0], 4, 32, 8, 64);
    m.init_weights();
    double last = 0;
    ladder::train(m, data, o, [&](int, double, double on_val) { last = on_val; });
    CHECK(last == doctest::Approx(entropy).epsilon(0.02));
}

TEST_CASE("a decoder's logits depend on exactly the last T tokens") {
    ladder::Model m(ladder::RUNGS[6], 9, 16, 4, 1);
    m.init_weights();
    ladder::Decoder decoder(m);
    std::vector<int> text = {3, 1, 4, 1, 5, 8, 2, 6};
    const float* got = nullptr;
    for (int token : text) got = decoder.append_to_all(&token, 1);
    std::vector<float> stepwise(got, got + 9);
    std::vector<int> end(text.end() - 4, text.end());
    const float* whole = m.logits(end.data(), 1, 4) + 3 * 9;
    CHECK(std::equal(stepwise.begin(), stepwise.end(), whole));
}

TEST_CASE("weights are initialised with PyTorch's default distributions") {
    ladder::Model m(ladder::RUNGS[7], 40, 32, 8, 1);
    m.init_weights();
    for (const ladder::Tensor& t : m.list) {
        std::string name = t.name;
        CAPTURE(name);
        double sum = 0, square = 0, most = 0;
        for (size_t i = 0; i < t.size(); i++) {
            double w = m.param(t)[i];
            sum += w, square += w * w, most = std::max(most, std::fabs(w));
        }
        double n = (double)t.size(), sd = std::sqrt(square / n);
        if (name.compare(0, 2, "ln") == 0) {
            CHECK(sum == (name.back() == 'w' ? n : 0));
            CHECK(square == (name.back() == 'w' ? n : 0));
            continue;
        }
        double in = name.compare(0, 6, "fcproj") == 0 ? 128 : 32,
               want = name[0] == 'w' ? 1 : 1 / std::sqrt(3 * in);
        CHECK(std::fabs(sum / n) < 5 * want / std::sqrt(n));
        CHECK(std::fabs(sd / want - 1) < 5 / std::sqrt(n));
        if (name[0] != 'w') CHECK(most <= 1 / std::sqrt(in));
    }
    CHECK(m.num_params() == 41032);
}

TEST_CASE("ladder writes its table, losses, curves and poems, with mean and spread over the seeds") {
    TempDir dir;
    write_data(dir.path);
    std::string out = dir / "out";
    std::vector<const char*> words = {"ladder",
                                      "--data",
                                      dir.path.c_str(),
                                      "-o",
                                      out.c_str(),
                                      "--rung",
                                      "0,5-6",
                                      "--steps",
                                      "4",
                                      "--eval_every",
                                      "2",
                                      "--eval_batches",
                                      "2",
                                      "--seeds",
                                      "2",
                                      "--poems",
                                      "3",
                                      "--hidden",
                                      "2"};
    CHECK(ladder::ladder_main((int)words.size(), const_cast<char**>(words.data())) == 0);
    std::string table = read_file(out + "/ladder.md"), losses = read_file(out + "/losses.csv"),
                curves = read_file(out + "/curves.csv");
    CHECK(contains(table, "| 0 | bigram table |"));
    CHECK(contains(table, "| 6 | LayerNorm before each part and at the end; hidden 2 |"));
    CHECK(contains(table, " ± "));
    CHECK(std::count(losses.begin(), losses.end(), '\n') == 1 + 3);
    CHECK(std::count(curves.begin(), curves.end(), '\n') == 1 + 3 * 2 * 3);  // rungs, seeds, steps 0 2 4
    for (const char* rung : {"0", "5", "6"}) CHECK(file_exists(out + "/rung" + rung + "_poems.txt"));
    // A second run replaces nothing.
    write_file(out + "/notes.txt", "mine");
    words[6] = "5";
    CHECK(ladder::ladder_main((int)words.size(), const_cast<char**>(words.data())) == 0);
    CHECK(read_file(out + "/previous/1/ladder.md") == table);
    CHECK(read_file(out + "/previous/1/losses.csv") == losses);
    CHECK(file_exists(out + "/previous/1/rung5_poems.txt"));
    for (const char* kept : {"/rung6_poems.txt", "/notes.txt", "/ladder.md"}) CHECK(file_exists(out + kept));
    CHECK(!contains(read_file(out + "/ladder.md"), "| 6 |"));
    ladder::Spread s({1.0, 2.0, 6.0});
    CHECK(s.mean == 3);
    CHECK(s.sd == doctest::Approx(std::sqrt(7.0)));
}

TEST_CASE("a wrong flag or file of ladder is an error that names it") {
    CHECK(usage_error({"--rung", "8"}) ==
          "--rung: rung 8 is the trainer itself; dev/ladder/rung8.sh runs it");
    CHECK(contains(usage_error({"--rung", "0-9"}), "rung 9 is fine-tuning"));
    for (const char* bad : {"x", "", "-1", "3-", "3-1", "5,", "1 2", "10"}) {
        CAPTURE(bad);
        CHECK(contains(usage_error({"--rung", bad}), "--rung: "));
    }
    CHECK(contains(usage_error({"--channels", "30"}), "--channels is 30, wanted a multiple of"));
    CHECK(contains(usage_error({"--rung", "5", "--projection", "0"}), "--projection 1"));
    CHECK(contains(usage_error({"--seeds", "0"}), "--seeds is 0, wanted 1 to"));
    CHECK(contains(usage_error({"--dropout", "1"}), "--dropout is 1, wanted 0 to 0.99"));
    CHECK(contains(usage_error({"--blocks", "0"}), "--blocks is 0"));
    TempDir dir;
    CHECK(contains(usage_error({"--data", dir.path.c_str()}), dir / "train.bin: not found"));
    write_data(dir.path);
    CHECK(contains(usage_error({"--data", dir.path.c_str(), "--context", "300"}),
                   dir / "val.bin: has 200 tokens"));
}
