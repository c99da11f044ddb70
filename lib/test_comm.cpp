// test_comm.cpp - several ranks train as one does. The ranks are processes of this machine, which add up
// through shared memory, in the order of ranks; dev/test_mpi.sh does the same over MPI.
#include <doctest/doctest.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define ARAPOET_NO_MAIN
#include "train_gpt2.cpp"

#include "dev/test_util.h"
#include "lib/trainer.h"

namespace {

using namespace test;

// What the ranks share.
struct Shared {
    static constexpr size_t BYTES = 1 << 16;
    pthread_barrier_t barrier;
    int world;
    alignas(64) char slots[8][BYTES];  // each rank's numbers
};

class SharedComm final : public Comm {
  public:
    SharedComm(Shared* shared, int rank_) : s_(shared) { rank = rank_, world = on_host = shared->world; }
    bool can_shard() const override { return true; }
    void barrier() override { pthread_barrier_wait(&s_->barrier); }
    void all_reduce(double* x, size_t n) override { sum_up(x, n); }
    // Computed only in finish(), so that a model that reads or writes too early is found: until then, NaN.
    void start_all_reduce(float* x, size_t n) override {
        started_.push_back({x, {x, x + n}});
        std::fill(x, x + n, NAN);
    }
    void finish() override {
        for (auto& [x, values] : started_) {
            for (size_t i = 0; i < values.size(); i++)
                if (!std::isnan(x[i])) fail("gradients were written while they were added up");
            sum_up(values.data(), values.size());
            std::copy(values.begin(), values.end(), x);
        }
        started_.clear();
    }
    void all_gather(void* all, const void* mine, size_t bytes) override {
        if (bytes > Shared::BYTES) fail("all_gather: %zu bytes, a slot has %zu", bytes, Shared::BYTES);
        memcpy(s_->slots[rank], mine, bytes);
        barrier();
        for (int r = 0; r < world; r++) memcpy((char*)all + (size_t)r * bytes, s_->slots[r], bytes);
        barrier();
    }
    using Comm::broadcast;
    void broadcast(void* data, size_t bytes) override {
        if (leads()) memcpy(s_->slots[0], data, bytes);
        barrier();
        memcpy(data, s_->slots[0], bytes);
        barrier();
    }
    void abort(int code, const std::string& line) override {
        fprintf(stderr, "%s", line.c_str());
        fflush(stderr);
        for (int r = 0; r < world; r++)
            if (r != rank && pids[r] > 0) kill(pids[r], SIGKILL);
        _exit(code);
    }
    static inline pid_t* pids;  // shared, too

  private:
    template <class N>
    void sum_up(N* x, size_t n) {
        constexpr size_t PART = Shared::BYTES / sizeof(N);
        for (size_t i = 0; i < n; i += PART) {
            size_t count = std::min(PART, n - i);
            memcpy(s_->slots[rank], x + i, count * sizeof(N));
            barrier();
            for (size_t k = 0; k < count; k++) {
                N sum = 0;
                for (int r = 0; r < world; r++) sum += ((N*)s_->slots[r])[k];
                x[i + k] = sum;
            }
            barrier();
        }
    }
    Shared* s_;
    std::vector<std::pair<float*, Floats>> started_;
};

// A model of one of the ranks of this process's group. Where asked to, one rank is told to stop in a step.
// With --zero_stage 1 the rank saves and loads only its share of the moments, though it computes with all.
struct RankModel : cpu::GPT2 {
    using cpu::GPT2::GPT2;
    static inline Shared* shared = nullptr;
    static inline int rank = 0, told_to_stop = -1;
    static inline std::function<void(uint32_t)> before_step;  // what else happens in the ranks
    static constexpr uint32_t STOP_STEP = 4;
    static std::unique_ptr<Comm> open_ranks(const RankOptions&) {
        return std::make_unique<SharedComm>(shared, rank);
    }
    StepResult step(const StepSettings& a, uint32_t t) {
        if (rank == told_to_stop && t == STOP_STEP) raise(SIGTERM);
        if (before_step) before_step(t);
        return cpu::GPT2::step(a, t);
    }
    bool sharded() const { return ranks.sharding().shards_state(); }
    template <class F>
    void each_piece(State s, F f) {
        if (sharded() && s != PARAMS) throw std::logic_error("a rank holds only a part of that state");
        cpu::GPT2::each_piece(s, f);
    }
    template <class F>
    void each_range(State s, F f) {
        const std::vector<OwnedPiece> owned = owned_pieces(cfg, ranks.sharding(), !sharded());
        cpu::GPT2::each_range(s, [&](float* x, size_t n, size_t at) {
            for (const OwnedPiece& p : owned)
                if (p.file >= at && p.file < at + n) f(x + p.file - at, p.size, p.file);
        });
    }
    // Fetches the other ranks' shares: the sum of each number's bits, which only one rank has.
    void resumed(uint32_t t) {
        cpu::GPT2::resumed(t);
        for (auto& a : optimizer_arrays(optimizer)) {
            if (!sharded()) continue;
            Doubles bits(num_params(cfg));
            each_range(a.state, [&](const float* x, size_t n, size_t first) {
                for (size_t i = 0; i < n; i++) bits[first + i] = bits_of(x[i]);
            });
            ranks.comm->all_reduce(bits.data(), bits.size());
            cpu::GPT2::each_range(a.state, [&](float* x, size_t n, size_t first) {
                for (size_t i = 0; i < n; i++) {
                    const uint32_t b = (uint32_t)bits[first + i];
                    memcpy(&x[i], &b, 4);
                }
            });
        }
    }
    static uint32_t bits_of(float x) {
        uint32_t b;
        memcpy(&b, &x, 4);
        return b;
    }
};

struct Outcome {
    std::vector<int> codes;
    std::string out, err;  // of all ranks
};

// Runs the trainer in `world` processes; rank r gets flags(r).
template <class F>
Outcome run_ranks(int world, F flags, int told_to_stop = -1) {
    TempDir dir;
    void* memory =
        mmap(nullptr, sizeof(Shared) + 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    Shared* s = (Shared*)memory;
    SharedComm::pids = (pid_t*)((char*)memory + sizeof(Shared));
    s->world = world;
    pthread_barrierattr_t attr;
    pthread_barrierattr_init(&attr), pthread_barrierattr_setpshared(&attr, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&s->barrier, &attr, (unsigned)world);
    fflush(stdout), fflush(stderr);
    for (int r = 0; r < world; r++) {
        pid_t pid = fork();
        if (pid) {
            SharedComm::pids[r] = pid;
            continue;
        }
        alarm(60);                                          // ranks that wait for each other for ever
        while (!SharedComm::pids[world - 1]) usleep(1000);  // until all have been started
        for (auto [name, fd] : {std::pair<const char*, int>{"out", 1}, {"err", 2}})
            dup2(open((dir / name).c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600), fd);
        std::vector<std::string> words = flags(r);
        words.insert(words.begin(), "train_gpt2");
        words.insert(words.end(), {"--threads", "1"});  // a parent's threads do not survive fork()
        std::vector<char*> argv;
        for (std::string& w : words) argv.push_back(&w[0]);
        RankModel::shared = s, RankModel::rank = r, RankModel::told_to_stop = told_to_stop;
        int code = run_main("train_gpt2", [&] {
            return trainer::Run<RankModel, cpu::Decoder>((int)argv.size(), argv.data()).main();
        });
        fflush(stdout), fflush(stderr);
        _exit(code);
    }
    Outcome o;
    for (int r = 0; r < world; r++) {
        int status;
        waitpid(SharedComm::pids[r], &status, 0);
        o.codes.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    }
    o.out = read_file(dir / "out"), o.err = read_file(dir / "err");
    munmap(memory, sizeof(Shared) + 4096);
    return o;
}
void check_all_succeed(const Outcome& o) {
    INFO(o.err << o.out);
    for (int code : o.codes) CHECK(code == 0);
    CHECK(o.err == "");
}

// Data of 700 random tokens, and the flags of a small model of it.
struct Fixture {
    TempDir dir;
    Fixture() {
        Tokenizer tokenizer = Tokenizer::characters("abcdefghij");
        tokenizer.save(dir / "tokenizer.bin");
        std::vector<uint16_t> text;
        for (int t : Random(91).tokens(700, tokenizer.vocab_size())) text.push_back((uint16_t)t);
        write_tokens(dir / "train.bin", text), write_tokens(dir / "val.bin", text);
    }
    std::vector<std::string> flags(const std::string& out, std::vector<std::string> more) const {
        std::vector<std::string> f = {"--data",
                                      dir.path,
                                      "-o",
                                      dir / out,
                                      "--depth",
                                      "2",
                                      "--heads",
                                      "2",
                                      "--channels",
                                      "16",
                                      "-t",
                                      "16",
                                      "--total_batch_size",
                                      "192",
                                      "--dropout",
                                      "0.1",
                                      "--max_steps",
                                      "6",
                                      "--val_every",
                                      "2",
                                      "--sample_every",
                                      "0",
                                      "--save_every",
                                      "3",
                                      "--keep",
                                      "9"};
        f.insert(f.end(), more.begin(), more.end());
        return f;
    }
    Outcome run(int world, const std::string& out, std::vector<std::string> more,
                int told_to_stop = -1) const {
        return run_ranks(
            world, [&](int) { return flags(out, more); }, told_to_stop);
    }
    // A copy of a run as it was when its last checkpoint was that of step 3.
    void copy_at_3(const std::string& from, const std::string& to) const {
        std::filesystem::copy(dir / from, dir / to);
        for (const char* kind : {"model", "state"}) unlink(trainer::numbered(dir / to, kind, 6).c_str());
        trainer::remove_stray_shards(dir / to);
    }
    Outcome resume(int world, const std::string& out, std::vector<std::string> more = {}) const {
        more.insert(more.begin(), {"--resume", "-o", dir / out});
        return run_ranks(world, [&](int) { return more; });
    }
    size_t shards(const std::string& out, int step) const {
        size_t n = 0;
        for (const std::string& name : names_in(dir / out)) n += trainer::shard_step(name) == step;
        return n;
    }
    Floats weights(const std::string& out, int step = 6) const {
        ModelReader r(trainer::numbered(dir / out, "model", step));
        Floats w(num_params(r.cfg));
        r.read(w.data(), w.size());
        return w;
    }
    // The losses, validation losses and norms in log.csv.
    Floats logged(const std::string& out) const {
        Floats numbers;
        std::istringstream rows(read_file(dir / out + "/log.csv"));
        std::string row, field;
        std::getline(rows, row);
        while (std::getline(rows, row)) {
            std::istringstream fields(row);
            for (int i = 0; std::getline(fields, field, ',') && i < 6; i++)
                numbers.push_back(field.empty() ? 0 : std::stof(field));
        }
        return numbers;
    }
};

}  // namespace

TEST_CASE("ranks: N ranks with the same total batch come to one rank's losses and weights") {
    Fixture f;
    struct {
        const char *dtype, *optimizer;
    } kinds[] = {{"fp32", "adamw"}, {"bf16", "adamw"}, {"fp32", "muon"}};
    for (const auto& k : kinds) {
        const char *dtype = k.dtype, *optimizer = k.optimizer;
        const double most = *dtype == 'f' ? 1e-6 : 1e-3;
        const std::string kind = strf("%s, %s", dtype, optimizer);
        auto train = [&](int world, const char* batch) {
            const std::string out = strf("%s_%s_%d_%s", dtype, optimizer, world, batch);
            Outcome o = f.run(world, out, {"-b", batch, "--dtype", dtype, "--optimizer", optimizer});
            check_all_succeed(o);
            if (world > 1)
                CHECK(contains(o.out, strf("ranks            %d processes, %d of them", world, world)));
            return out;
        };
        const std::string one = train(1, "12");
        const Floats weights = f.weights(one), losses = f.logged(one);
        const Doubles want(weights.begin(), weights.end()), want_losses(losses.begin(), losses.end());
        REQUIRE(losses.size() == 7 * 6);
        struct {
            int world;
            const char* batch;
        } cases[] = {{2, "6"}, {3, "4"}, {4, "3"}, {2, "3"}, {2, "1"}, {3, "2"}};  // some accumulate
        for (auto& c : cases) {
            CAPTURE(c.world);
            const std::string out = train(c.world, c.batch);
            check_close("ranks, weights, " + kind, f.weights(out), want, most);
            check_close("ranks, losses and norms, " + kind, f.logged(out), want_losses, most);
        }
    }
}

TEST_CASE("ranks: a sharded run by Muon resumes bit for bit on as many ranks, and to 1e-6 on others") {
    Fixture f;
    const std::vector<std::string> muon = {"-b", "6", "--optimizer", "muon", "-z", "1"};
    check_all_succeed(f.run(2, "whole", muon));
    const Floats whole = f.weights("whole");
    for (int world : {2, 1, 3}) {
        CAPTURE(world);
        const std::string out = strf("resumed_%d", world);
        f.copy_at_3("whole", out);
        check_all_succeed(f.resume(
            world, out, world == 3 ? std::vector<std::string>{"-b", "4"} : std::vector<std::string>()));
        if (world == 2) CHECK(f.weights(out) == whole);
        check_close("ranks, resumed, muon", f.weights(out), Doubles(whole.begin(), whole.end()), 1e-6);
    }
}

TEST_CASE("ranks: Muon on more ranks than there are matrices of a shape comes to one rank's weights") {
    Fixture f;
    const std::vector<std::string> muon = {"--optimizer", "muon", "--depth", "1"};
    auto train = [&](int world, const char* batch, const char* dtype) {
        const std::string out = strf("%s_%d", dtype, world);
        std::vector<std::string> flags = muon;
        flags.insert(flags.end(), {"-b", batch, "--dtype", dtype});
        check_all_succeed(f.run(world, out, flags));
        return f.weights(out);
    };
    const Floats one = train(1, "12", "fp32"), one_bf16 = train(1, "12", "bf16");
    check_close("ranks, Muon on three, fp32", train(3, "4", "fp32"), Doubles(one.begin(), one.end()), 1e-6);
    // In bf16 a gradient that differs in its last bit may round to another bf16 number, and Newton-Schulz
    // multiplies such differences where singular values are small. Three ranks must still be closer to one
    // rank's weights than half of what rounding to bf16 moves those.
    check_close("ranks, Muon on three, bf16", train(3, "4", "bf16"),
                Doubles(one_bf16.begin(), one_bf16.end()),
                relative_l2(one_bf16.data(), one.data(), one.size()) / 2);
}

TEST_CASE("ranks: a run resumes bit for bit on as many ranks, and to 1e-6 on others") {
    Fixture f;
    check_all_succeed(f.run(2, "whole", {"-b", "6"}));
    const Floats whole = f.weights("whole");
    for (int world : {2, 1, 3}) {
        CAPTURE(world);
        const std::string out = strf("resumed_%d", world);
        std::filesystem::copy(f.dir / "whole", f.dir / out);
        for (const char* kind : {"model", "state"}) unlink(trainer::numbered(f.dir / out, kind, 6).c_str());
        Outcome o = run_ranks(world, [&](int) {
            std::vector<std::string> words = {"--resume", "-o", f.dir / out};
            if (world == 3) words.insert(words.end(), {"-b", "4"});
            return words;
        });
        check_all_succeed(o);
        if (world == 2) CHECK(f.weights(out) == whole);
        check_close("ranks, resumed", f.weights(out), Doubles(whole.begin(), whole.end()), 1e-6);
        CHECK(f.logged(out).size() == 7 * 6);
    }
}

TEST_CASE("ranks: a signal to one of them stops all after the same step, with a checkpoint") {
    Fixture f;
    check_all_succeed(f.run(1, "whole", {"-b", "12"}));
    for (int told : {0, 2}) {
        const std::string out = strf("stopped_%d", told);
        Outcome o = f.run(3, out, {"-b", "4"}, told);
        check_all_succeed(o);
        CHECK(contains(o.out, "stopped by SIGTERM after step 4; go on with: "));
        CHECK(file_exists(trainer::numbered(f.dir / out, "state", 4)));
        check_all_succeed(run_ranks(3, [&](int) {
            return std::vector<std::string>{"--resume", "-o", f.dir / out};
        }));
        const Floats whole = f.weights("whole");
        check_close("ranks, stopped and resumed", f.weights(out), Doubles(whole.begin(), whole.end()), 1e-6);
    }
}

TEST_CASE("ranks: what cannot go on together ends all of them, with one line that names the rank") {
    Fixture f;
    auto refused = [&](std::vector<std::string> all, int other, std::vector<std::string> more, int code = 1) {
        Outcome o = run_ranks(2, [&](int r) {
            std::vector<std::string> words = f.flags("refused", all);
            if (r == other) words.insert(words.end(), more.begin(), more.end());
            return words;
        });
        for (int c : o.codes) CHECK((c == code || c == 128 + SIGKILL));
        CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
        CHECK(!file_exists(f.dir / "refused/model.bin"));
        std::filesystem::remove_all(f.dir / "refused");
        return o.err;
    };
    std::string e = refused({"-b", "6"}, 1, {"--learning_rate", "0.5"});
    CHECK(contains(e, "train_gpt2: rank 0: rank 1 on "));
    CHECK(contains(e, " has other flags than rank 0 on "));
    // The same paths, but on each rank's machine other files
    auto files_of = [&](int r) { return f.dir / strf("machine%d", r); };
    auto refused_files = [&](const std::string& flag, const std::string& file) {
        Outcome o = run_ranks(2, [&](int r) {
            if (chdir(files_of(r).c_str())) fail("chdir");
            std::vector<std::string> words = f.flags("refused", {"-b", "6", flag, file});
            return words;
        });
        for (int c : o.codes) CHECK((c == 1 || c == 128 + SIGKILL));
        std::filesystem::remove_all(f.dir / "refused");
        return o.err;
    };
    std::string tokens = read_file(f.dir / "train.bin"), others = tokens;
    std::swap(others[1024], others[1026]), std::swap(others[1028], others[1034]);
    REQUIRE(others != tokens);
    for (int r : {0, 1}) {
        make_dirs(files_of(r));
        write_file(files_of(r) + "/t.bin", r ? others : tokens);
    }
    // weakly_canonical() makes paths absolute, so the flags differ, too: the data are compared first.
    CHECK(contains(refused_files("-i", "t.bin"), " has other training data than rank 0 on "));
    CHECK(contains(refused_files("-j", "t.bin"), " has other validation data than rank 0 on "));
    e = refused({"-b", "5"}, -1, {}, 2);
    CHECK(contains(e,
                   "rank 0: --total_batch_size is 192, wanted a multiple of ranks x batch_size x seq_len = "
                   "2 x 5 x 16 = 160"));
    e = refused({"-b", "6", "--data", f.dir / "nowhere"}, -1, {});
    CHECK(contains(e, "rank 0: " + (f.dir / "nowhere") + "/train.bin: not found"));
    e = refused({"-b", "6"}, 1, {"--data", f.dir / "nowhere"});
    CHECK(contains(e, "rank 1: " + (f.dir / "nowhere") + "/train.bin: not found"));
}

TEST_CASE("ranks: a sharded run saves a shard for each rank, and resumes bit for bit on as many ranks") {
    Fixture f;
    check_all_succeed(f.run(2, "whole", {"-b", "6"}));
    check_all_succeed(f.run(2, "sharded", {"-b", "6", "-z", "1"}));
    const Floats whole = f.weights("whole");
    CHECK(f.weights("sharded") == whole);
    for (int step : {3, 6}) CHECK((f.shards("sharded", step) == 2 && f.shards("whole", step) == 0));
    struct {
        const char* from;
        int world;
        std::vector<std::string> flags;
    } cases[] = {{"sharded", 2, {}},
                 {"sharded", 2, {"-z", "0"}},
                 {"whole", 2, {"-z", "1"}},
                 {"sharded", 1, {}},
                 {"sharded", 3, {"-b", "4"}},
                 {"sharded", 4, {"-b", "3"}},
                 {"whole", 3, {"-b", "4", "-z", "1"}}};
    for (auto& c : cases) {
        CAPTURE(c.from);
        CAPTURE(c.world);
        const std::string out = strf("resumed_%d", (int)(&c - cases));
        f.copy_at_3(c.from, out);
        check_all_succeed(f.resume(c.world, out, c.flags));
        if (c.world == 2) CHECK(f.weights(out) == whole);
        check_close("ranks, sharded and resumed", f.weights(out), Doubles(whole.begin(), whole.end()), 1e-6);
        CHECK(f.logged(out).size() == 7 * 6);
    }
}

TEST_CASE("ranks: shards are written where rank 0 writes: a new run in place of another, a moved folder") {
    Fixture f;
    const std::vector<std::string> flags = {"-b", "6", "-z", "1", "--save_every", "2", "--keep", "1"};
    std::vector<std::string> again = flags;
    again.push_back("--overwrite");
    check_all_succeed(f.run(2, "run", flags));
    CHECK((f.shards("run", 6) == 2 && f.shards("run", 4) == 0));  // --keep 1
    const Floats whole = f.weights("run");
    const std::string from = f.dir / "run", to = f.dir / "moved";
    RankModel::before_step = [&](uint32_t step) {
        if (step == 6 && RankModel::rank == 0) rename_file(from, to);
    };
    Outcome o = f.run(2, "run", again);
    RankModel::before_step = nullptr;
    check_all_succeed(o);
    CHECK(contains(o.out, "the earlier run is now in"));
    CHECK(!file_exists(from));
    CHECK((f.shards("moved", 6) == 2 && f.shards("moved", 4) == 0));
    CHECK(f.shards("moved/previous/1", 6) == 2);
    CHECK(!file_exists(to + "/.new"));
    CHECK(f.weights("moved") == whole);
    check_all_succeed(f.resume(2, "moved", {"--max_steps", "8"}));
    CHECK((f.shards("moved", 8) == 2 && f.shards("moved", 6) == 0));
}

TEST_CASE("ranks: stopped before a validation and resumed on other ranks, the step keeps its shards") {
    Fixture f;
    check_all_succeed(f.run(2, "whole", {"-b", "6"}));
    const Floats whole = f.weights("whole");
    for (int told : {0, 1}) {
        const std::string out = strf("stopped_%d", told);
        check_all_succeed(f.run(2, out, {"-b", "6", "-z", "1", "--save_every", "0"}, told));
        const std::string state = trainer::numbered(f.dir / out, "state", 4);
        CHECK(trainer::StateReader(state).progress.pending);
        for (int world : {1, 2}) {
            const std::string resumed = out + strf("_%d", world);
            std::filesystem::copy(f.dir / out, f.dir / resumed);
            check_all_succeed(f.resume(world, resumed, {"--save_every", "4"}));  // saves step 4 once more
            trainer::StateReader again(trainer::numbered(f.dir / resumed, "state", 4));
            CHECK(!again.progress.pending);
            CHECK((again.shards() == 2 && f.shards(resumed, 4) == 2));
            if (world == 2) CHECK(f.weights(resumed) == whole);
            check_close("ranks, stopped", f.weights(resumed), Doubles(whole.begin(), whole.end()), 1e-6);
        }
    }
}

TEST_CASE("ranks: a shard that a rank cannot write ends all with one line, and leaves no half checkpoint") {
    Fixture f;
    check_all_succeed(f.run(3, "run", {"-b", "4", "-z", "1"}));
    for (int r : {0, 2}) {
        const std::string in_the_way = (f.dir / "run/") + trainer::shard_file(9, r, 3);
        make_dirs(in_the_way + "/folder");
        Outcome o = f.resume(3, "run", {"--max_steps", "9"});
        for (int code : o.codes) CHECK((code == 1 || code == 128 + SIGKILL));
        CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
        CHECK(contains(o.err, strf("rank 0: %s/", r ? "rank 2: " : "")));
        CHECK(contains(o.err, trainer::shard_file(9, r, 3) + ": cannot rename into place: "));
        for (const char* kind : {"model", "state"})
            CHECK(!file_exists(trainer::numbered(f.dir / "run", kind, 9)));
        CHECK(f.shards("run", 9) == 1);  // the folder in the way
        std::filesystem::remove_all(in_the_way);
        CHECK(trainer::checkpoints_in(f.dir / "run") == std::vector<int>{3, 6});
        CHECK(f.shards("run", 6) == 3);
    }
    check_all_succeed(f.resume(3, "run", {"--max_steps", "9"}));
    CHECK(f.shards("run", 9) == 3);
    // A shard that is lost is named, and what to do.
    unlink(((f.dir / "run/") + trainer::shard_file(9, 1, 3)).c_str());
    Outcome o = f.resume(3, "run", {"--max_steps", "12"});
    CHECK(contains(o.err, "rank 1: " + (f.dir / "run/") + trainer::shard_file(9, 1, 3) + ": not found; "));
    CHECK(contains(o.err, "; to resume from the checkpoint before, move " +
                              trainer::numbered(f.dir / "run", "model", 9) + ", " +
                              (f.dir / "run/state_00000009_rank*.bin") + " and " +
                              trainer::numbered(f.dir / "run", "state", 9) + " elsewhere"));
}

TEST_CASE("ranks: a log that a full disk cuts off ends a sharded run after the step, with a checkpoint") {
    if (!file_exists("/dev/full")) return skip("/dev/full: not found");
    Fixture f;
    check_all_succeed(f.run(2, "whole", {"-b", "6"}));
    for (const char* log : {"log.csv", "main.log"}) {
        CAPTURE(log);
        RankModel::before_step = [&](uint32_t step) {
            for (int fd = 3; step == 4 && RankModel::rank == 0 && fd < 64; fd++) {
                std::error_code none;
                const std::string link = strf("/proc/self/fd/%d", fd);
                if (std::filesystem::read_symlink(link, none).filename() == log)
                    dup2(open("/dev/full", O_WRONLY), fd);
            }
        };
        const std::string out = strf("full_%s", log);
        Outcome o = f.run(2, out, {"-b", "6", "-z", "1"});
        RankModel::before_step = nullptr;
        CHECK(o.codes[0] == 1);
        CHECK(std::count(o.err.begin(), o.err.end(), '\n') == 1);
        CHECK(contains(o.err, out + "/" + log + ": cannot write: No space left on device"));
        CHECK(trainer::checkpoints_in(f.dir / out) == std::vector<int>{3, 4});
        check_all_succeed(f.resume(2, out));
        CHECK(f.weights(out) == f.weights("whole"));
        CHECK(f.logged(out).size() == 7 * 6);
    }
}
