// test_gpu_ranks.cu - several ranks of the GPU trainer: that they come to what one rank computes, wait for
// each other where they must, and end together. The ranks are processes; the emulator's NCCL connects them.
#define ARAPOET_NO_MAIN
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <random>

#include "dev/test_gpu_util.h"
#include "lib/trainer.h"

namespace {

using namespace gpu_test;
constexpr bool BUILT_BF16 = gpu::BUILD_DTYPE == BF16;

// Each rank writes the file of timed algorithms to a temporary folder.
struct CacheFolder {
    TempDir dir;
    CacheFolder() { setenv("XDG_CACHE_HOME", dir.path.c_str(), 1); }
} cache_folder;

// Five blocks, more than the gradients of stage 2 have slots. No part of the model divides by 3 x 8.
Config config(int arch = GPT2_ARCH) {
    Config c;
    c.L = 5, c.NH = 1, c.C = 32, c.V = 61, c.Vp = pad_vocab(c.V), c.maxT = 16, c.arch = arch;
    return c;
}

struct Settings {
    int world = 1, stage = 0, batch = 12;  // sequences that a rank computes at once
    int arch = GPT2_ARCH, recompute = 0;
    float dropout = 0.1f;
    bool master_weights = true, graphs = true, bias_in_kernels = false, deterministic = false;
    Optimizer optimizer = ADAMW;
    uint32_t steps = 2;
    int dropped_wait = 0;  // the number of a wait for an event that the last rank leaves out; 0: none
};

constexpr size_t SEQUENCES = 12, T = 16;  // of each step's whole batch
// What a run leaves: state by state in the file's order, and the steps' results. All ranks write into one.
struct Result {
    size_t n;  // elements of a state; those that it does not have stay 0
    float* state[NUM_STATES];
    StepResult* steps;
    int* waits;  // for events, that a rank made in these steps
    int code = 0;

    explicit Result(size_t n_) : n(n_) {
        const size_t bytes = NUM_STATES * n * sizeof(float) + 64 * sizeof(StepResult) + sizeof(int);
        memory_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (memory_ == MAP_FAILED) fail("mmap");
        bytes_ = bytes;
        for (int s = 0; s < NUM_STATES; s++) state[s] = (float*)memory_ + (size_t)s * n;
        steps = (StepResult*)(state[NUM_STATES - 1] + n), waits = (int*)(steps + 64);
    }
    ~Result() { munmap(memory_, bytes_); }
    Result(const Result&) = delete;
    Values values(State s) const { return {state[s], state[s] + n}; }

  private:
    void* memory_;
    size_t bytes_;
};

// Runs body(comm) as `world` processes. Returns the exit code of all.
template <class F>
int run_ranks(int world, F body) {
    fflush(nullptr);
    const pid_t pid = fork();
    if (!pid) {
        alarm(100);
        emu::options().devices = world;
        const int code = run_main("test", [&] {
            RankOptions o;
            o.gpus = world;
            std::unique_ptr<Comm> comm = gpu::open_ranks(o);
            comm->connect();
            try {
                body(*comm);
            } catch (const Error&) {
                comm->abort(1, "");  // without waiting for the others
                throw;
            }
            return 0;
        });
        fflush(nullptr);
        _exit(end_children(code));
    }
    int status;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// One rank's part of a run. Micro-batch i of rank r has the sequences from (i * world + r) * batch on.
void train(const Settings& s, Comm& comm, Result& result) {
    const Config c = config(s.arch);
    gpu::switches.bias_in_kernels = s.bias_in_kernels;
    // Of Muon's 20 square and 10 wide matrices, three ranks take 7, 7 and 6; and 2, 2 and 2, then 2, 2 and 0.
    if (s.world > 1) gpu::GPT2::muon_elements = 8 * 4 * (size_t)(c.C * c.C);
    gpu::GPT2 model(c, (size_t)s.batch, T, true, s.recompute,
                    {gpu::BUILD_DTYPE, s.master_weights, s.deterministic}, {&comm, s.stage}, s.optimizer);
    const std::string choices = model.matmul().choices.text();
    const uint64_t checksum = checksum_of(choices.data(), choices.size());
    for (uint64_t other : comm.gather(checksum))
        if (other != checksum) fail("the ranks chose different products");
    model.use_graphs = s.graphs, model.dropout = s.dropout;
    model.init_weights(5);
    const size_t at_once = (size_t)(s.batch * s.world), micro_steps = SEQUENCES / at_once;
    std::mt19937_64 engine(3);
    auto hand_out = [&](State state) {
        model.each_range(state, [&](const float* x, size_t n, size_t first) {
            std::copy(x, x + n, result.state[state] + first);
        });
    };
    emu::options().waits_made = 0;
    if (comm.rank == s.world - 1) emu::options().drop_wait = s.dropped_wait;
    for (uint32_t step = 1; step <= s.steps; step++) {
        std::vector<int> x(SEQUENCES * T), y(x.size());
        for (int& t : x) t = (int)(engine() % (size_t)c.V);
        for (int& t : y) t = (int)(engine() % (size_t)c.V);
        for (size_t i = 0; i < micro_steps; i++) {
            Pass pass;
            pass.train = true, pass.step = step, pass.last = i + 1 == micro_steps;
            pass.seq0 = (i * (size_t)s.world + (size_t)comm.rank) * (size_t)s.batch;
            pass.grad_scale = 1.0f / (float)(SEQUENCES * T);
            model.accumulate(&x[pass.seq0 * T], &y[pass.seq0 * T], (size_t)s.batch, T, pass);
        }
        hand_out(GRADS);
        StepSettings a;
        a.lr = 1e-3f, a.grad_clip = 0.5f, a.eps = 1e-4f;
        result.steps[(size_t)comm.rank * s.steps + step - 1] = model.step(a, step);
    }
    *result.waits = emu::options().waits_made;
    for (auto& array : optimizer_arrays(s.optimizer)) hand_out(array.state);
    if (model.has(MASTER)) hand_out(MASTER);
    if (comm.leads()) hand_out(PARAMS);
}

std::unique_ptr<Result> run(const Settings& s) {
    auto result = std::make_unique<Result>(num_params(config(s.arch)));
    result->code = run_ranks(s.world, [&](Comm& comm) { train(s, comm, *result); });
    return result;
}

double error_of(const Values& got, const Values& want) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < want.size(); i++)
        difference += std::pow((double)got[i] - want[i], 2), size += std::pow((double)want[i], 2);
    return std::sqrt(difference / size);
}

void check_equal(const Settings& s, const Result& one) {
    CAPTURE(s.world);
    CAPTURE(s.stage);
    CAPTURE(s.batch);
    CAPTURE(s.recompute);
    auto got = run(s);
    REQUIRE(got->code == 0);
    // The first step's gradients differ by the order of sums. In bf16, later ones are those of parameters
    // whose rounding may differ by a bit.
    const double most = BUILT_BF16 ? 2e-3 : 1e-6;
    for (uint32_t step = 0; step < s.steps; step++)
        for (int r = 0; r < s.world; r++) {
            const StepResult &a = got->steps[(size_t)r * s.steps + step], &b = one.steps[step];
            CHECK(a.loss == doctest::Approx(b.loss).epsilon(step ? most : 1e-6));
            CHECK(a.norm == doctest::Approx(b.norm).epsilon(step ? most : 1e-6));
            CHECK(a.loss == got->steps[step].loss);  // as on rank 0, to the last bit
            CHECK(a.norm == got->steps[step].norm);
        }
    CHECK(error_of(got->values(GRADS), one.values(GRADS)) < (s.steps > 1 ? 10 * most : 1e-6));
    for (auto& array : optimizer_arrays(s.optimizer))
        CHECK(error_of(got->values(array.state), one.values(array.state)) < 10 * most);
    const bool masters = BUILT_BF16 && s.master_weights && s.stage;
    CHECK(error_of(got->values(masters ? MASTER : PARAMS), one.values(PARAMS)) < most);
    if (masters) CHECK(error_of(got->values(PARAMS), one.values(PARAMS)) < 5e-3);
}

}  // namespace

TEST_CASE("ranks: losses, norms, gradients and weights are those of one rank, in every stage") {
    auto want = run(Settings());
    REQUIRE(want->code == 0);
    for (int stage : {0, 1, 2})
        for (auto [world, batch] : {std::pair<int, int>{2, 6}, {3, 4}, {4, 1}, {2, 2}}) {
            if (BUILT_BF16 && batch < 4) continue;
            Settings s;
            s.world = world, s.stage = stage, s.batch = batch;
            check_equal(s, *want);
        }
}

TEST_CASE(
    "ranks: the same for GROVER, recomputation, biases in kernels; without dropout, masters or graphs") {
    std::vector<Settings> all(5);
    all[0].arch = GROVER_ARCH, all[1].recompute = 3, all[2].dropout = 0, all[3].master_weights = false;
    all[4].graphs = false;
    all[0].bias_in_kernels = all[1].bias_in_kernels = all[3].bias_in_kernels = true;
    if (BUILT_BF16) all = {all[3]};
    for (Settings& s : all) {
        auto want = run(s);
        REQUIRE(want->code == 0);
        for (int stage : {0, 1, 2}) {
            s.world = 2, s.stage = stage, s.batch = 3;
            check_equal(s, *want);
        }
        s = Settings();
    }
}

TEST_CASE("ranks: Muon comes to one rank's weights, in every stage") {
    Settings s;
    s.optimizer = MUON, s.deterministic = true;  // without timing, which takes long
    auto want = run(s);
    REQUIRE(want->code == 0);
    for (int stage : {0, 1, 2})
        for (auto [world, batch] : {std::pair<int, int>{2, 6}, {3, 4}}) {
            if (BUILT_BF16 && world == 2) continue;
            s.world = world, s.stage = stage, s.batch = batch;
            check_equal(s, *want);
        }
}

TEST_CASE("ranks: all multiply by the same choices, also where Muon gives them other numbers of matrices") {
    Settings s;
    s.optimizer = MUON, s.world = 3, s.batch = 4, s.steps = 1;
    CHECK(run(s)->code == 0);
}

// The results of a run, whose codes must be 0, as one array of bits to compare.
Values everything(const Result& r, int world, uint32_t steps) {
    Values all;
    for (State s : {PARAMS, GRADS, ADAM_M, ADAM_V, MUON_M}) {
        Values v = r.values(s);
        all.insert(all.end(), v.begin(), v.end());
    }
    for (uint32_t i = 0; i < (uint32_t)world * steps; i++)
        all.push_back((float)r.steps[i].loss), all.push_back((float)r.steps[i].norm);
    return all;
}

// make test-ranks runs it
TEST_CASE("ranks: the same for all combinations of settings" * doctest::skip()) {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (int recompute : {0, 1, 2, 3})
            for (float dropout : {0.0f, 0.2f}) {
                Settings s;
                s.arch = arch, s.recompute = recompute, s.dropout = dropout, s.steps = 3;
                auto want = run(s);
                REQUIRE(want->code == 0);
                for (s.stage = 0; s.stage <= 2; s.stage++)
                    for (auto [world, batch] : {std::pair<int, int>{2, 6},
                                                {2, 3},
                                                {2, 1},
                                                {3, 4},
                                                {3, 2},
                                                {3, 1},
                                                {4, 3},
                                                {4, 1}}) {
                        s.world = world, s.batch = batch;
                        check_equal(s, *want);
                    }
            }
}

TEST_CASE("ranks: the same bits under every schedule" * doctest::skip(BUILT_BF16)) {
    for (int stage : {0, 1, 2})
        repeatable([&] {
            Settings s;
            s.world = 3, s.stage = stage, s.batch = 2;
            if (stage != 1) s.optimizer = MUON;
            auto result = run(s);
            REQUIRE(result->code == 0);
            return std::vector<Values>{everything(*result, s.world, s.steps)};
        });
}

TEST_CASE("ranks: without any one of the waits between streams a run goes wrong" *
          doctest::skip(BUILT_BF16)) {
    const emu::Options before = emu::options();
    emu::options().lazy_streams = true, emu::options().quiet = true;
    for (int stage : {0, 2}) {  // stage 1 waits where stage 0 does
        Settings s;
        s.world = 2, s.stage = stage, s.batch = 3, s.steps = 1;
        auto whole = run(s);
        REQUIRE(whole->code == 0);
        const Values want = everything(*whole, s.world, s.steps);
        // One for each part of the model, one at the end. In stage 2 the first of the two micro-steps adds up
        // only the five blocks, and in both micro-steps two blocks wait for their memory.
        const int waits = *whole->waits;
        CHECK(waits == (stage == 2 ? (5 + 2 + 1) + (7 + 2 + 1) : 7 + 1));
        for (s.dropped_wait = 1; s.dropped_wait <= waits; s.dropped_wait++) {
            bool wrong = false;
            // In descending order the stream that adds up falls behind; in random order it may also lead.
            for (uint64_t seed = 0; seed <= 12 && !wrong; seed++) {
                emu::options().schedule = seed ? emu::RANDOM : emu::DESCENDING, emu::options().seed = seed;
                auto result = run(s);
                wrong = result->code != 0 || !same_bits(everything(*result, s.world, s.steps), want);
            }
            CAPTURE(stage);
            CAPTURE(s.dropped_wait);
            CHECK(wrong);
        }
    }
    emu::options() = before;
}

// ---------------------------------------------------------------------------------------------
// The trainer

namespace {

// One rank gets a signal in step SIGNAL_STEP, or with BREAK_NCCL calls what the others do not, or with FAIL
// throws an Error.
constexpr int BREAK_NCCL = -1, FAIL = -2;
struct RankModel : gpu::GPT2 {
    using gpu::GPT2::GPT2;
    static constexpr uint32_t SIGNAL_STEP = 4;
    static inline int told = -1, signal = 0;
    static inline int wanted_device = -1;  // -1: any
    StepResult step(const StepSettings& a, uint32_t t) {
        if (wanted_device >= 0 && gpu::device_number() != wanted_device) fail("another device");
        if (ranks.comm->rank == told && t == SIGNAL_STEP) {
            if (signal == BREAK_NCCL)
                static_cast<gpu::NcclComm*>(ranks.comm)->all_reduce((float*)params.wte, 2, stream.stream);
            else if (signal == FAIL) fail("cannot go on");
            else raise(signal);
        }
        return gpu::GPT2::step(a, t);
    }
};

struct Outcome {
    int code;
    std::string out, err;
    double seconds;
};

// Data of 700 random tokens, and the flags of a small model of it.
struct Trainer {
    TempDir dir;
    int told = -1, signal = 0;  // see RankModel
    int devices = 8, wanted_device = -1;

    Trainer() {
        Tokenizer tokenizer = Tokenizer::characters("abcdefghij");
        tokenizer.save(dir / "tokenizer.bin");
        std::vector<uint16_t> text;
        std::mt19937_64 engine(3);
        for (int i = 0; i < 700; i++) text.push_back((uint16_t)(engine() % (size_t)tokenizer.vocab_size()));
        write_tokens(dir / "train.bin", text), write_tokens(dir / "val.bin", text);
    }
    std::vector<std::string> flags(const std::string& out, const std::vector<std::string>& more) const {
        std::vector<std::string> f = {"--data",
                                      dir.path,
                                      "-o",
                                      dir / out,
                                      "--depth",
                                      "2",
                                      "--heads",
                                      "1",
                                      "--channels",
                                      "32",
                                      "-t",
                                      "16",
                                      "--optimizer",
                                      "adamw",
                                      "-d",
                                      "192",
                                      "--max_steps",
                                      "6",
                                      "-b",
                                      "3",
                                      "--val_every",
                                      "3",
                                      "--sample_every",
                                      "0",
                                      "--keep",
                                      "9",
                                      "--save_every",
                                      "3",
                                      "--dropout",
                                      "0.1"};
        f.insert(f.end(), more.begin(), more.end());
        return f;
    }
    // Runs the trainer in a process of its own, with what `environment` sets.
    pid_t start(std::vector<std::string> words, const std::string& said,
                const std::vector<std::pair<const char*, std::string>>& environment = {},
                bool on_cpu = false) const {
        fflush(nullptr);
        const pid_t pid = fork();
        if (pid) return pid;
        alarm(100);
        for (auto& [name, value] : environment) setenv(name, value.c_str(), 1);
        for (auto [name, fd] : {std::pair<const char*, int>{".out", 1}, {".err", 2}})
            dup2(open((said + name).c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600), fd);
        words.insert(words.begin(), "train_gpt2cu");
        std::vector<char*> argv;
        for (std::string& w : words) argv.push_back(&w[0]);
        emu::options().devices = devices, emu::options().quiet = true;
        RankModel::told = told, RankModel::signal = signal;
        RankModel::wanted_device = wanted_device;
        const int n = (int)argv.size(), code = on_cpu ? ::train<cpu::GPT2, cpu::Decoder>(n, argv.data())
                                                      : ::train<RankModel, gpu::Decoder>(n, argv.data());
        fflush(nullptr);
        _exit(end_children(code));
    }
    static int finish(pid_t pid) {
        int status;
        waitpid(pid, &status, 0);
        return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    Outcome train(const std::vector<std::string>& words, bool on_cpu = false) {
        const double start_time = trainer::now();
        const std::string said = dir / strf("said_%d", runs_++);
        const int code = finish(start(words, said, {}, on_cpu));
        return {code, read_file(said + ".out"), read_file(said + ".err"), trainer::now() - start_time};
    }
    Outcome train(const std::string& out, const std::vector<std::string>& more) {
        return train(flags(out, more));
    }
    Values weights(const std::string& out, int step = 6) const {
        ModelReader r(trainer::numbered(dir / out, "model", step));
        Values w(num_params(r.cfg));
        r.read(w.data(), w.size());
        return w;
    }

  private:
    int runs_ = 0;
};

bool is_one_line(const std::string& text) { return std::count(text.begin(), text.end(), '\n') == 1; }

}  // namespace

TEST_CASE("ranks: the trainer on N GPUs comes to one GPU's weights, and rank 0 alone speaks") {
    Trainer t;
    Outcome one = t.train("one", {"-b", "12"});
    INFO(one.err);
    REQUIRE(one.code == 0);
    const Values want = t.weights("one");
    for (auto [gpus, stage] : {std::pair<int, int>{2, 0}, {2, 1}, {4, 2}}) {
        const std::string out = strf("ranks_%d_%d", gpus, stage);
        Outcome o = t.train(out, {"--gpus", std::to_string(gpus), "--zero_stage", std::to_string(stage)});
        INFO(o.err << o.out);
        REQUIRE(o.code == 0);
        CHECK(o.err == "");
        CHECK(error_of(t.weights(out), want) < (BUILT_BF16 ? 5e-3 : 1e-6));
        CHECK(contains(o.out, strf("\nranks            %d GPUs", gpus)));
        const size_t at = o.out.find("step 6/6");
        CHECK((at != std::string::npos && o.out.find("step 6/6", at + 1) == std::string::npos));
    }
}

TEST_CASE("ranks: a signal to one stops all after the same step; the run goes on as if unbroken") {
    for (int stage : {0, 1, 2}) {
        CAPTURE(stage);
        Trainer t;
        const std::vector<std::string> ranks = {"--gpus", "3", "-z",          std::to_string(stage),
                                                "-b",     "2", "--optimizer", stage ? "muon" : "adamw"};
        REQUIRE(t.train("whole", ranks).code == 0);
        t.told = 1, t.signal = SIGUSR1;
        Outcome o = t.train("broken", ranks);
        INFO(o.err << o.out);
        CHECK(o.code == 0);
        CHECK(contains(o.out, "stopped by SIGUSR1 after step 4; go on with: "));
        CHECK(contains(o.out, "/broken --resume --gpus 3\n"));
        CHECK(file_exists(trainer::numbered(t.dir / "broken", "state", 4)));
        for (int gpus : {3, 2, 1, 0}) {  // 0: on the CPU
            CAPTURE(gpus);
            const std::string out = strf("resumed_%d", gpus);
            std::filesystem::copy(t.dir / "broken", t.dir / out);
            t.told = -1;
            std::vector<std::string> words = {"--resume", "-o", t.dir / out};
            if (gpus) words.insert(words.end(), {"--gpus", std::to_string(gpus)});
            else words.insert(words.end(), {"--dtype", "fp32", "-z", "0", "--threads", "1"});
            o = t.train(words, gpus == 0);
            INFO(o.err << o.out);
            REQUIRE(o.code == 0);
            if (gpus == 3) CHECK(same_bits(t.weights(out), t.weights("whole")));
            else
                CHECK(error_of(t.weights(out), t.weights("whole")) < (BUILT_BF16 ? 5e-3
                                                                      : gpus     ? 1e-6
                                                                                 : 1e-5));
        }
    }
}

TEST_CASE("ranks: where one is killed or freezes the others end, one line names it, and the run resumes" *
          doctest::skip(BUILT_BF16)) {
    struct {
        int told, signal;
        const char* timeout;
    } cases[] = {{2, SIGKILL, "60"}, {1, SIGSTOP, "2"}};
    for (const auto& c : cases) {
        Trainer t;
        t.told = c.told, t.signal = c.signal;
        Outcome o = t.train("dead", {"--gpus", "3", "-z", "1", "-b", "2", "--rank_timeout", c.timeout});
        INFO(o.err);
        CHECK(o.code == 1);
        CHECK(is_one_line(o.err.substr(0, o.err.find("rank 1 (process"))));  // that was frozen is killed
        CHECK(contains(o.err, strf("train_gpt2cu: rank 0: rank %d on ", c.told)));
        CHECK(contains(o.err, "go on with: "));
        CHECK(contains(o.err, "/dead --resume --rank_timeout "));
        CHECK(contains(o.err, " --gpus 3"));
        CHECK(o.seconds < 20);
        t.told = -1;
        o = t.train({"--resume", "-o", t.dir / "dead", "--gpus", "3"});
        INFO(o.err);
        CHECK(o.code == 0);
    }
}

TEST_CASE("ranks: an error of NCCL in the middle ends all, with one line that names the rank") {
    Trainer t;
    t.told = 1, t.signal = BREAK_NCCL;
    Outcome o = t.train("broken", {"--gpus", "2"});
    INFO(o.err);
    CHECK(o.code == 1);
    CHECK(is_one_line(o.err));
    CHECK(contains(o.err, "train_gpt2cu: rank "));
    CHECK(contains(o.err, "rank 1 ncclAllReduce of 2 float32"));
    CHECK(o.seconds < 20);
}

TEST_CASE("ranks: an error after some steps ends all, with one line, as soon as the graphs are destroyed") {
    Trainer t;
    const double whole_run = t.train("whole", {"--gpus", "2"}).seconds;
    for (int rank : {0, 1}) {
        t.told = rank, t.signal = FAIL;
        Outcome o = t.train(strf("failed_%d", rank), {"--gpus", "2"});
        CHECK(o.code == 1);
        CHECK(o.err == strf("train_gpt2cu: rank %d: cannot go on\n", rank));
        CHECK(o.seconds < whole_run + 4);  // the time limit is five seconds
    }
}

TEST_CASE("ranks: all compute their products as rank 0 has chosen") {
    Result result(1024);
    const int code = run_ranks(3, [&](Comm& comm) {
        TempDir own;  // no rank finds another's file
        setenv("XDG_CACHE_HOME", own.path.c_str(), 1);
        gpu::GPT2 model(config(), 2, T, true, 0, {gpu::BUILD_DTYPE}, {&comm, 0});
        const std::string choices = model.matmul().choices.text();
        result.state[0][comm.rank] = (float)(checksum_of(choices.data(), choices.size()) % 1000003);
        result.state[1][comm.rank] = (float)choices.size();
        result.state[2][comm.rank] = file_exists(own.path + "/arapoet");
    });
    CHECK(code == 0);
    CHECK(result.state[1][0] > 0);
    for (int r : {1, 2}) {
        CHECK(result.state[0][r] == result.state[0][0]);
        CHECK(result.state[2][r] == 0);  // and only rank 0 has timed them
    }
    CHECK(result.state[2][0] == 1);
}

TEST_CASE("ranks: all choose the same head, by the memory of the rank that has the least") {
    Result result(16);
    const int code = run_ranks(2, [&](Comm& comm) {
        Temporarily switched(gpu::switches.large_head, true);
        Temporarily usual(gpu::GPT2::head_logits, 8 * config().Vp);
        auto need = [&] {
            return (float)gpu::GPT2::memory_need(config(), 4, T, true, 0, {gpu::BUILD_DTYPE}, {&comm, 0})
                .total();
        };
        result.state[0][comm.rank] = need();
        if (comm.rank == 1) emu::options().memory_limit = emu::statistics().memory_now + (1 << 12);
        result.state[1][comm.rank] = need();
    });
    CHECK(code == 0);
    for (int i : {0, 1}) CHECK(result.state[i][0] == result.state[i][1]);
    CHECK(result.state[0][0] > result.state[1][0]);
}

TEST_CASE("ranks: what cannot go on together ends all, with one line that says what to do") {
    Trainer t;
    auto refused = [&](const std::vector<std::string>& more, int code) {
        Outcome o = t.train("refused", more);
        CHECK(o.code == code);
        CHECK(is_one_line(o.err));
        CHECK(!file_exists(t.dir / "refused/model.bin"));
        return o.err;
    };
    std::string e = refused({"--gpus", "3", "-b", "3"}, 2);
    CHECK(contains(e, "wanted a multiple of ranks x batch_size x seq_len = 3 x 3 x 16 = 144"));
    e = refused({"--gpus", "2", "--data", t.dir / "nowhere"}, 1);
    CHECK(contains(e, "rank 0: " + (t.dir / "nowhere") + "/train.bin: not found"));
    e = refused({"--zero_stage", "3"}, 2);
    CHECK(contains(e, "--zero_stage"));
    t.devices = 2;
    e = refused({"--device", "2", "-b", "12"}, 1);
    CHECK(contains(e, "--device 2: there are 2 GPUs, numbered from 0"));
    e = refused({"--device", "1", "--gpus", "2"}, 2);
    CHECK(contains(e, "--device: each of several ranks takes its own GPU"));
    e = refused({"--gpus", "4"}, 1);
    CHECK(contains(e, "rank 2: is number 3 on "));
    CHECK(contains(e, ", which has 2 GPUs; start as many ranks as there are GPUs"));
    t.devices = 1;
    e = refused({"--gpus", "2", "-b", "6"}, 1);
    CHECK(contains(e, "ranks 0 and 1 on "));
    CHECK(contains(e, " share one GPU, wanted one for each"));
}

TEST_CASE("ranks: --device chooses the GPU of a run on one") {
    Trainer t;
    t.devices = 3;
    for (int device : {-1, 2}) {
        t.wanted_device = device < 0 ? 0 : device;
        std::vector<std::string> more = {"-b", "12", "--max_steps", "1"};
        if (device >= 0) more.insert(more.end(), {"--device", std::to_string(device)});
        Outcome o = t.train(strf("device_%d", device + 1), more);
        INFO(o.err);
        CHECK(o.code == 0);
    }
}

TEST_CASE("ranks: torchrun's variables start them; ranks with other flags end with one line") {
    Trainer t;
    auto run = [&](int port, const std::string& out, const std::vector<std::string>& more_of_1) {
        std::vector<pid_t> pids;
        for (int r = 0; r < 2; r++) {
            std::vector<std::string> words = t.flags(out, {"-z", "1"});
            if (r) words.insert(words.end(), more_of_1.begin(), more_of_1.end());
            const std::string rank = std::to_string(r);
            pids.push_back(t.start(words, t.dir / out,
                                   {{"RANK", rank},
                                    {"LOCAL_RANK", rank},
                                    {"WORLD_SIZE", "2"},
                                    {"LOCAL_WORLD_SIZE", "2"},
                                    {"MASTER_ADDR", "127.0.0.1"},
                                    {"MASTER_PORT", std::to_string(port)}}));
        }
        std::vector<int> codes;
        for (pid_t pid : pids) codes.push_back(t.finish(pid));
        return codes;
    };
    // A free port: one that the system gave to a socket that is closed again
    auto free_port = [] {
        const int fd = socket(AF_INET, SOCK_STREAM, 0);
        sockaddr_in at = {};
        socklen_t bytes = sizeof at;
        at.sin_family = AF_INET, at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        REQUIRE((!bind(fd, (sockaddr*)&at, bytes) && !getsockname(fd, (sockaddr*)&at, &bytes)));
        close(fd);
        return (int)ntohs(at.sin_port);
    };
    CHECK(run(free_port(), "two", {}) == std::vector<int>{0, 0});
    CHECK(file_exists(t.dir / "two/model.bin"));
    CHECK(contains(read_file(t.dir / "two.out"), "\nranks            2 GPUs"));
    CHECK(run(free_port(), "other", {"-l", "0.5"}) == std::vector<int>{1, 1});
    const std::string e = read_file(t.dir / "other.err");
    CHECK(is_one_line(e));
    CHECK(contains(e, " has other flags than rank 0 on "));
}
