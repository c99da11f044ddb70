// test_trainer.cpp - the training loop's parts: schedules, evaluation, fitting a run to the memory there is.
#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#include <doctest/doctest.h>
#include <sys/wait.h>

#include "dev/reference.h"
#include "dev/test_model.h"
#include "train_gpt2.cpp"
#include "lib/trainer.h"

using namespace test;

TEST_CASE("schedules: linear warm-up, then constant, cosine, linear or wsd; others are refused") {
    auto lr = [](const char* schedule, int step) {
        return trainer::learning_rate(schedule, 2.0, step, 10, 110, 0.1);
    };
    for (const char* schedule : {"constant", "cosine", "linear", "wsd"}) {
        INFO(schedule);
        CHECK(lr(schedule, 0) == doctest::Approx(0.2));
        CHECK(lr(schedule, 4) == doctest::Approx(1.0));
        CHECK(lr(schedule, 9) == doctest::Approx(2.0));
        CHECK(lr(schedule, 10) == doctest::Approx(2.0));
        double end = schedule == std::string("constant") ? 2.0 : 0.2;
        CHECK(lr(schedule, 110) == doctest::Approx(end));
        CHECK(lr(schedule, 1000) == doctest::Approx(end));  // and stays there
        for (int step = 10; step < 110; step++) CHECK(lr(schedule, step + 1) <= lr(schedule, step));
        CHECK(trainer::learning_rate(schedule, 2.0, 0, 0, 100, 0.1) == doctest::Approx(2.0));  // no warm-up
        CHECK(trainer::learning_rate(schedule, 2.0, 99, 200, 100, 0.1) ==
              doctest::Approx(1.0));  // nothing but warm-up
    }
    CHECK(lr("constant", 60) == 2.0);
    CHECK(lr("cosine", 60) == doctest::Approx(1.1));  // half way between 2 and 0.2
    CHECK(lr("cosine", 35) ==
          doctest::Approx(0.2 + 1.8 * 0.5 * (1 + std::sqrt(0.5))));  // a quarter of the way: cos 45 degrees
    CHECK(lr("linear", 60) == doctest::Approx(1.1));
    CHECK(lr("linear", 35) == doctest::Approx(1.55));
    CHECK(lr("wsd", 60) == 2.0);
    CHECK(lr("wsd", 88) == doctest::Approx(2.0));  // 80% of the run
    CHECK(lr("wsd", 99) == doctest::Approx(0.2 + 1.8 * (1 - std::sqrt(0.5))));
    for (const char* unknown : {"", "cosin", "Cosine"}) {
        std::string e = error_of([&] { trainer::learning_rate(unknown, 1, 0, 0, 1, 0); });
        CHECK(contains(e, "--lr_schedule: '" + std::string(unknown) +
                              "' is unknown; known are constant, cosine, linear, wsd"));
    }
}

TEST_CASE("defaults: the model's size and fine-tuning choose the optimizer, its rate and schedule") {
    auto defaults = [](int channels, bool fine_tune, const char* optimizer) {
        trainer::Options o;
        o.optimizer = optimizer;
        Config c;
        c.C = channels;
        trainer::apply_preset_defaults(o, c, fine_tune);
        return strf("%s %g %s, %d steps of %d", o.optimizer.c_str(), o.learning_rate, o.lr_schedule.c_str(),
                    o.max_steps, o.batch_size);
    };
    CHECK(defaults(128, false, "") == "muon 0.004 cosine, 300 steps of 16");
    CHECK(defaults(128, false, "adamw") == "adamw 0.002 cosine, 700 steps of 16");
    CHECK(defaults(128, true, "") == "muon 0.001 cosine, 300 steps of 16");
    CHECK(defaults(384, false, "") == "muon 0.001 cosine, 5000 steps of 32");
    CHECK(defaults(384, false, "adamw") == "adamw 0.001 cosine, 5000 steps of 32");
    CHECK(defaults(512, true, "") == "adamw 3e-05 constant, 1000 steps of 32");
    CHECK(defaults(768, false, "") == "adamw 0.0003 cosine, 5000 steps of 4");
    CHECK(defaults(768, true, "") == "adamw 3e-05 constant, 1000 steps of 4");
}

TEST_CASE("an outlier is a value whose z-score among the last 128 is too high, itself counted") {
    Random r(95);
    trainer::Outliers outliers, restored;
    Doubles all;
    for (int i = 0; i < 300; i++) {
        double limit = outliers.limit(3);
        if (i < 127) {
            CHECK(limit == INFINITY);  // too few to tell
        } else {
            for (double value : {limit - 1e-6, limit + 1e-6}) {  // the definition
                Doubles window(all.end() - 127, all.end());
                window.push_back(value);
                double mean = 0, variance = 0;
                for (double x : window) mean += x / 128;
                for (double x : window) variance += (x - mean) * (x - mean) / 128;
                CHECK(((value - mean) / std::sqrt(variance) > 3) == (value > limit));
            }
        }
        CHECK(outliers.limit(0) == INFINITY);
        all.push_back(2 + 0.1 * r.normal()), outliers.add(all.back());
        restored.restore(outliers.text());
        CHECK(restored.limit(2.5) == outliers.limit(2.5));
    }
}

TEST_CASE("a second Ctrl-C ends the program at once, but not within 2 seconds of the first") {
    for (int seconds : {0, 2}) {
        CAPTURE(seconds);
        pid_t pid = fork();
        if (pid == 0) {
            signal(SIGINT, SIG_DFL);
            trainer::Signals signals;
            raise(SIGINT);
            trainer::g_stop_time = trainer::g_stop_time - seconds;  // as if so much time had passed
            raise(SIGINT);
            _exit(trainer::g_stop == SIGINT ? 0 : 1);
        }
        int status;
        waitpid(pid, &status, 0);
        if (seconds < 2) CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
        else CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGINT));
    }
}

TEST_CASE("evaluation counts every token of a file once, and every character of its targets") {
    TempDir dir;
    Tokenizer tokenizer = Tokenizer::characters("abcdefg");
    const int V = tokenizer.vocab_size();
    Tokens text = Random(90).tokens(100, V);
    std::vector<int32_t> header(256);
    header[0] = 20240520, header[1] = 1, header[2] = 100;
    std::string bytes((const char*)header.data(), 1024);
    for (int t : text) bytes += (char)t, bytes += '\0';
    write_file(dir / "val.bin", bytes);
    TokenFile file(dir / "val.bin");
    const size_t B = 2, T = 7;
    EvalLoader loader(file, (int)B, (int)T);
    cpu::GPT2 m(config(1, 2, 8, V, (int)T), B, T, false);
    randomise(m, 90);
    Tokens x(B * T), y(B * T);
    trainer::Evaluation e = trainer::evaluate(m, loader, B, T, 0, &tokenizer, x, y);
    ref::GPT2 model(m);
    double sum = 0;
    size_t chars = 0;
    for (size_t at = 0; at + 1 < text.size(); at += T) {
        size_t n = std::min(T, text.size() - 1 - at);
        Tokens in(&text[at], &text[at] + n), out(&text[at + 1], &text[at + 1] + n);
        sum += model.loss(in, out, 1, n, Pass{}, false) * (double)n;
        for (int t : out) chars += (size_t)tokenizer.chars(t);
    }
    CHECK(e.tokens == 99);
    check_close("evaluation: nats per token", e.nats, sum / 99, 1e-6);
    check_close("evaluation: nats per character", e.nats_per_char, sum / (double)chars, 1e-6);
    CHECK(std::isnan(trainer::evaluate(m, loader, B, T, 1, nullptr, x, y).nats_per_char));
    for (size_t tokens : {1, 5, 14, 15, 28, 99, 1000}) {  // the file's first targets, whatever the batch size
        CAPTURE(tokens);
        e = trainer::evaluate(m, loader, B, T, tokens, &tokenizer, x, y);
        CHECK(e.tokens == std::min<size_t>(tokens, 99));
        EvalLoader one_by_one(file, 1, (int)T);
        trainer::Evaluation same = trainer::evaluate(m, one_by_one, 1, T, tokens, &tokenizer, x, y);
        CHECK(same.tokens == e.tokens);
        check_close("evaluation: other batch", same.nats, e.nats, 1e-12);
        check_close("evaluation: other batch", same.nats_per_char, e.nats_per_char, 1e-12);
    }
    // As many targets where the last two letters are tags, and each window has two of them before it.
    const TagTokens tags{V - 3, text[0], 2};
    EvalLoader tagged(file, (int)B, (int)T, tags), one_by_one(file, 1, (int)T, tags);
    const size_t all =
        (size_t)std::count_if(text.begin() + 1, text.end(), [&](int t) { return t < tags.first; });
    for (size_t tokens : {1, 5, 14, 15, 28, 1000}) {
        CAPTURE(tokens);
        e = trainer::evaluate(m, tagged, B, T, tokens, &tokenizer, x, y);
        CHECK(e.tokens == std::min(tokens, all));
        trainer::Evaluation same = trainer::evaluate(m, one_by_one, 1, T, tokens, &tokenizer, x, y);
        CHECK(same.tokens == e.tokens);
        check_close("evaluation: other batch", same.nats, e.nats, 1e-12);
    }
}

namespace {

// A machine of as much memory as the test says.
struct SmallMachine : cpu::GPT2 {
    using cpu::GPT2::GPT2;
    static inline size_t free_bytes = 0;
    static size_t memory_available(int) { return free_bytes; }
};

// What f writes to standard output.
template <class F>
std::string printed(F f) {
    TempDir dir;
    fflush(stdout);
    int kept = dup(1), to = open((dir / "out").c_str(), O_WRONLY | O_CREAT, 0600);
    dup2(to, 1);
    std::string error = error_of(f);
    fflush(stdout);
    dup2(kept, 1), close(kept), close(to);
    return read_file(dir / "out") + error;
}

// A folder of data: 700 random tokens, the same for validation. Returns the size of the vocabulary.
int small_data(const TempDir& dir) {
    Tokenizer tokenizer = Tokenizer::characters("abcdefghij");
    tokenizer.save(dir / "tokenizer.bin");
    std::vector<uint16_t> text;
    for (int t : Random(91).tokens(700, tokenizer.vocab_size())) text.push_back((uint16_t)t);
    write_tokens(dir / "train.bin", text), write_tokens(dir / "val.bin", text);
    return tokenizer.vocab_size();
}

// A whole run with these flags, of a model of any kind; what it prints, and its error.
template <class Model>
std::string run_trainer(std::vector<std::string> flags) {
    flags.insert(flags.begin(), "train_gpt2");
    std::vector<char*> argv;
    for (std::string& f : flags) argv.push_back(&f[0]);
    return printed([&] { trainer::Run<Model, cpu::Decoder>((int)argv.size(), argv.data()).main(); });
}

}  // namespace

TEST_CASE("short memory: recomputes more, then takes smaller batches, says so, and learns the same") {
    TempDir dir;
    Config c = config(4, 2, 32, small_data(dir), 64);
    const size_t poem = (size_t)4 * 64 * 2 * 32 * 4;  // keys and values
    auto need = [&](size_t B, int recompute) {
        return cpu::GPT2::memory_need(c, B, 64, true, recompute).total() + poem;
    };
    std::string file = dir / "model.bin", data = dir.path;
    {
        cpu::GPT2 m(c, 0, 0, false);
        randomise(m, 91);
        trainer::save_model(m, file);
    }
    auto run = [&](size_t free_bytes, std::vector<std::string> more = {}) {
        std::vector<std::string> flags = {
            "-e",        file,          "--data",      data, "-o",
            dir / "run", "--overwrite", "--max_steps", "2",  "--total_batch_size",
            "512",       "--optimizer", "adamw"};
        flags.insert(flags.end(), more.begin(), more.end());
        SmallMachine::free_bytes = free_bytes;
        return run_trainer<SmallMachine>(flags);
    };
    auto weights = [&] {
        cpu::GPT2 m(c, 0, 0, false);
        ModelReader r(dir / "run/model_00000002.bin");
        trainer::load_model(m, r);
        return parameters(m);
    };
    REQUIRE(need(8, 3) < need(8, 2));
    REQUIRE(need(4, 3) < need(8, 3));
    std::string plenty = run(need(8, 0), {"-b", "8"});
    CHECK(!contains(plenty, "memory is short"));
    CHECK(contains(plenty, "memory           " + human_bytes((double)need(8, 0)) + ": "));
    Floats want = weights();
    CHECK(contains(run(need(8, 0) - 1, {"-b", "8"}),
                   "so this run takes --recompute 1 --batch_size 8; the step stays 512 tokens\n"));
    CHECK(contains(run(need(8, 2), {"-b", "8"}), "--recompute 2 --batch_size 8;"));
    std::string tight = run(need(8, 3), {"-b", "8"});
    CHECK(contains(
        tight, "memory is short (" + human_bytes((double)need(8, 0)) + " needed, " +
                   human_bytes((double)need(8, 3)) +
                   " free), so this run takes --recompute 3 --batch_size 8; the step stays 512 tokens\n"));
    CHECK(contains(tight, "memory           " + human_bytes((double)need(8, 3)) + ": "));
    CHECK(contains(tight, "batch            8 x 64 tokens\n"));
    check_close("short memory: weights after two steps", weights(), Doubles(want.begin(), want.end()), 1e-5);
    // What a flag says stays; the batch is this size's default, 16.
    const std::vector<std::string> rest = {"--total_batch_size", "1024"};
    CHECK(contains(run(need(4, 3), rest), "--recompute 3 --batch_size 4; the step stays 1024 tokens"));
    CHECK(contains(run(need(4, 3), rest), "batch            4 x 64 tokens, 4 accumulated: 1024 a step\n"));
    CHECK(contains(run(need(2, 0), {"--recompute", "0", "--total_batch_size", "1024"}),
                   "takes --recompute 0 --batch_size 2;"));
    std::string refused = run(need(8, 3) - 1, {"-b", "8"});
    CHECK(contains(refused,
                   "this run needs " + human_bytes((double)need(8, 0)) + " of memory, " +
                       human_bytes((double)need(8, 3) - 1) +
                       " are free; --batch_size 4 --recompute 3 would fit"));  // 7 would not divide the step
    CHECK(contains(run(need(8, 3) - 1, {"-b", "4", "--recompute", "3"}), "2 accumulated: 512 a step"));
    CHECK(contains(run(need(1, 3) - 1, rest), "not even --batch_size 1 would fit"));
    CHECK(!contains(run(need(8, 0) - poem, {"-b", "8", "--sample_every", "0"}), "memory is short"));
}

namespace {

// A model that, as one on a device may, tells of a step only when the next one was started or it is asked.
struct LateModel : cpu::GPT2 {
    using cpu::GPT2::GPT2;
    StepResult known;
    StepResult step(const StepSettings& a, uint32_t t) {
        StepResult before = known;
        known = cpu::GPT2::step(a, t);
        return before;
    }
    StepResult last_result() const { return known; }
};

}  // namespace

TEST_CASE("a model that tells of a step one step late trains, logs, saves and resumes as any other") {
    TempDir dir;
    small_data(dir);
    auto run = [&](bool late, const std::string& out, std::vector<std::string> more) {
        std::vector<std::string> flags = {
            "--data",         dir.path, "-o",          out,  "--depth",      "1", "--channels", "16",
            "--heads",        "2",      "--seq_len",   "16", "-b",           "4", "--dropout",  "0.1",
            "--max_steps",    "7",      "--val_every", "3",  "--save_every", "2", "--keep",     "9",
            "--sample_every", "0"};
        flags.insert(flags.end(), more.begin(), more.end());
        return late ? run_trainer<LateModel>(flags) : run_trainer<cpu::GPT2>(flags);
    };
    // log.csv but for its times and the program.
    auto log = [&](const std::string& out) {
        std::string text = read_file(out + "/log.csv"), kept;
        for (size_t at = 0, comma = 0; at < text.size(); at++) {
            if (text[at] == '\n') comma = 0;
            if (comma < 7) kept += text[at];
            comma += text[at] == ',';
        }
        return kept;
    };
    std::string a = dir / "a", b = dir / "b";
    CHECK(contains(run(false, a, {}), "7 steps in"));
    CHECK(contains(run(true, b, {}), "7 steps in"));
    auto check_same = [&] {
        CHECK(log(b) == log(a));
        CHECK(read_file(b + "/main.log") == read_file(a + "/main.log"));
        for (int step : {2, 4, 6, 7})
            CHECK((read_file(trainer::numbered(b, "model", step)) ==
                   read_file(trainer::numbered(a, "model", step))));
    };
    check_same();
    for (int step : {6, 7})
        for (const char* kind : {"model", "state"}) unlink(trainer::numbered(b, kind, step).c_str());
    run_trainer<LateModel>({"-o", b, "--resume"});
    check_same();
    // Steps that are skipped, too
    for (bool late : {false, true}) {
        std::string said =
            run(late, dir / "skip",
                {"--overwrite", "--max_steps", "160", "--skip_norm_z", "1.5", "--val_every", "0"});
        size_t skipped = 0;
        for (size_t at = 0; (at = said.find("was skipped: its gradient norm is ", at)) != std::string::npos;
             at++)
            skipped++;
        CHECK(skipped > 0);
        CHECK(skipped < 20);
    }
    // The step that diverges is named, and no checkpoint after it is written.
    std::string diverged = run(true, dir / "c",
                               {"--learning_rate", "1000", "--grad_clip", "0", "--warmup_steps", "0",
                                "--max_steps", "60", "--save_every", "50"});
    std::string same = run(false, dir / "d",
                           {"--learning_rate", "1000", "--grad_clip", "0", "--warmup_steps", "0",
                            "--max_steps", "60", "--save_every", "50"});
    auto error = [](const std::string& s) { return s.substr(s.rfind("step ")); };
    CHECK(contains(error(diverged), "training stops before it spoils a checkpoint"));
    CHECK(error(diverged) == error(same));
}
