// bench.cpp - times training steps and sampling of this trainer and of the peers that are
// installed: make bench
//
// Each measurement runs in a separate process, so that its peak memory can be measured, too. The contestants
// alternate, A B C A B C, so that slow phases of the machine affect all of them. Each process prints lines
// "key value"; the first steps are dropped, because they touch memory for the first time. If other programs,
// or the host of a virtual machine, took more than BUSY of the processors, the run counts only if its
// contestant has no quieter run, and the table marks it.
#define ARAPOET_NO_MAIN
#include "train_gpt2.cpp"

#include <glob.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <iterator>
#include <map>
#include <sstream>

#include "bench.h"
#include "lib/flags.h"
#include "lib/sampler.h"

namespace {

using bench::Samples;
typedef std::vector<std::string> Words;

struct Row {
    const char *name, *title;
    int L, NH, C, V, maxT, B, T;
    Config config() const {
        Config c;
        c.L = L, c.NH = NH, c.C = C, c.V = V, c.Vp = (V + 63) / 64 * 64, c.maxT = maxT;
        return c;
    }
    size_t tokens() const { return (size_t)B * T; }
    double flops() const { return step_flops(config(), B, T); }
};
const Row ROWS[] = {{"124m-4x64", "GPT-2 124M, B=4 T=64", 12, 12, 768, 50257, 1024, 4, 64},
                    {"124m-4x256", "GPT-2 124M, B=4 T=256", 12, 12, 768, 50257, 1024, 4, 256},
                    {"124m-1x1024", "GPT-2 124M, B=1 T=1024", 12, 12, 768, 50257, 1024, 1, 1024},
                    {"char", "characters, L6 H6 C384 V64, B=16 T=256", 6, 6, 384, 64, 256, 16, 256}};
const Row& find_row(const std::string& name) {
    for (const Row& r : ROWS)
        if (name == r.name) return r;
    throw UsageError(
        strf("row '%s' is unknown; known are 124m-4x64, 124m-4x256, 124m-1x1024, char", name.c_str()));
}

// ---------------------------------------------------------------------------------------------
// What a process of this program measures

Precision precision_of(const std::string& dtype) {
    Precision p;
    p.dtype = dtype == "bf16" ? BF16 : FP32;
    return p;
}

// A step of `micro_steps` batches: its time, and that of the optimizer, the gradient's norm included.
int work_step(const Row& r, const std::string& dtype, int steps, Optimizer optimizer = ADAMW,
              size_t micro_steps = 1) {
    Config c = r.config();
    size_t B = r.B, T = r.T;
    cpu::GPT2 model(c, B, T, true, 0, precision_of(dtype), {}, optimizer);
    model.init_weights(1);
    std::vector<int> x(B * T), y(B * T);
    rng::Key key(1, 0, rng::SAMPLE);
    for (size_t i = 0; i < B * T; i++)
        x[i] = (int)(key.u32(i) % (uint32_t)c.V), y[i] = (int)(key.u32(B * T + i) % (uint32_t)c.V);
    StepSettings adam;
    adam.grad_clip = 1;
    for (uint32_t s = 0; s < (uint32_t)steps; s++) {
        Pass pass;
        pass.train = true, pass.step = s, pass.grad_scale = 1.0f / (float)(B * T * micro_steps);
        double t0 = bench::now();
        for (size_t i = 0; i < micro_steps; i++) model.accumulate(x.data(), y.data(), B, T, pass);
        double t1 = bench::now();
        StepResult result = model.step(adam, s + 1);
        printf("ms %.2f\nupdate_ms %.2f\n", 1e3 * (bench::now() - t0), 1e3 * (bench::now() - t1));
        if (!s && !(std::fabs(result.loss - std::log(c.V)) < 1))
            fail("the first loss is %g, wanted about %g", result.loss, std::log(c.V));
    }
    return 0;
}

// Prints the speed of Muon's iteration on matrices (C,C) and (C,4C) as a share of the processor's peak, which
// is measured just before. Symmetric products count half. The model's 12 layers only decide whether threads
// take matrices of their own.
template <class A>
int work_muon(int C) {
    Config c;
    c.C = C, c.L = 12;
    Arena count, arena;
    std::vector<cpu::MuonScratch<A>> scratch(cpu::muon_at_once(c, 1));
    for (auto& s : scratch) s.place(count, c, 1);
    machine::Memory memory(count.used, "scratch memory");
    arena.base = memory.as<char>();
    for (auto& s : scratch) s.place(arena, c, 1);
    gemm::reserve_own((int)scratch.size());
    const double n = C;
    for (const size_t m : {(size_t)C, 4 * (size_t)C})
        for (int run = 0; run < 12; run++) {
            rng::Key key(1, 0, rng::SAMPLE);
            for (auto& s : scratch)
                for (size_t i = 0; i < (size_t)C * m; i++) s.sums[i] = (float)(int32_t)key.u32(i) * 0x1p-31f;
            const double flops = (double)scratch.size() * NewtonSchulz::ITERATIONS *
                                 (n * n * (double)m + n * n * n + 2 * n * n * (double)m),
                         peak = gemm::measure_peak_flops(std::is_same<A, float>::value ? FP32 : BF16),
                         t0 = bench::now();
            if (scratch.size() == 1) {
                cpu::muon_orthogonalise(scratch[0], (size_t)C, m, false);
            } else {
#pragma omp parallel num_threads((int)scratch.size())
                cpu::muon_orthogonalise(scratch[(size_t)omp_get_thread_num()], (size_t)C, m, false);
            }
            const double share = flops / (bench::now() - t0) / peak;
            printf("%s %.3f\n", m == (size_t)C ? "square" : "wide", share);
        }
    return 0;
}

int work_sample(const std::string& dtype, int N, int tokens) {
    cpu::GPT2 model(ROWS[0].config(), 0, 0, false, 0, precision_of(dtype));
    rng::Key key(1, 0, rng::INIT);
    model.each_piece(PARAMS, [&](float* p, size_t n) {
#pragma omp parallel for schedule(static)
        for (size_t i = 0; i < n; i++) p[i] = (float)(int32_t)key.u32(i) * 0x1p-36f;
    });
    cpu::Decoder decoder(model, (size_t)N, (size_t)tokens);
    SampleOptions greedy;
    greedy.temperature = 0;
    for (int run = 0; run < 4; run++) {
        double t0 = bench::now();
        size_t n = 0;
        generate(decoder, (size_t)N, {model.cfg.V - 1}, model.cfg.V, -1, tokens, 1, greedy,
                 [&](size_t, int) { n++; });
        printf("tokens/s %.2f\n", (double)n / (bench::now() - t0));
    }
    return 0;
}

int work_peak(int threads) {
    bench::Memory memory;
    for (int i = 0; i < 15; i++) {
        printf("fp32 %g\nbf16 %g\n", bench::fma_flops(threads), bench::bf16_flops(threads));
        if (i % 3 == 0) printf("read %g\nupdate %g\n", memory.read(threads), memory.update(threads));
    }
    return 0;
}

// Writes a random checkpoint and random token files to dir, with the names that llm.c's train_gpt2 opens.
int write_llmc_files(const Row& r, const std::string& dir) {
    cpu::GPT2 model(r.config(), 0, 0, false);
    model.init_weights(1);
    ModelWriter w(dir + "/gpt2_124M.bin", model.cfg);
    model.each_piece(PARAMS, [&](const float* p, size_t n) { w.add(p, n); });
    w.finish();
    std::string data = dir + "/dev/data/tinyshakespeare";
    make_dirs(data);
    for (const char* name : {"train", "val"}) {
        std::vector<int32_t> h(256);
        std::vector<uint16_t> t(100001);
        h[0] = 20240520, h[1] = 1, h[2] = (int32_t)t.size();
        for (size_t i = 0; i < t.size(); i++)
            t[i] = (uint16_t)(rng::Key(2, 0, rng::SAMPLE).u32(i) % (uint32_t)r.V);
        AtomicFile f(data + "/tiny_shakespeare_" + name + ".bin");
        f.write(h.data(), 1024), f.write(t.data(), t.size() * 2);
        f.commit();
    }
    return 0;
}

// ---------------------------------------------------------------------------------------------
// Processes

// The processor seconds that all programs together have used since the machine started.
double machine_seconds() {
    double t[8] = {};
    if (FILE* f = fopen("/proc/stat", "r")) {
        if (fscanf(f, "cpu %lf %lf %lf %lf %lf %lf %lf %lf", t, t + 1, t + 2, t + 3, t + 4, t + 5, t + 6,
                   t + 7) != 8)
            t[0] = 0;
        fclose(f);
    }
    return (t[0] + t[1] + t[2] + t[5] + t[6] + t[7]) / (double)sysconf(_SC_CLK_TCK);
}

struct Outcome {
    int status = 0;                                     // exit status, or 128 + signal
    std::map<std::string, std::vector<double>> values;  // key -> its values, in the order printed
    double rss = 0, others = 0;  // peak memory in bytes; share of the processors that others took
    std::string text;
};

struct Command {
    Words argv, env;  // env: NAME=value sets a variable, NAME removes it
    std::string dir;
};

// Runs a command and collects what it prints and uses.
Outcome run(const Command& c) {
    int out[2];
    if (pipe(out)) fail("pipe: %s", strerror(errno));
    double t0 = bench::now(), busy = machine_seconds();
    pid_t pid = fork();
    if (pid < 0) fail("%s: cannot start: %s", c.argv[0].c_str(), strerror(errno));
    if (!pid) {
        dup2(out[1], 1), close(out[0]), close(out[1]);
        for (const std::string& e : c.env)
            if (size_t eq = e.find('='); eq == std::string::npos) unsetenv(e.c_str());
            else setenv(e.substr(0, eq).c_str(), e.c_str() + eq + 1, 1);
        std::vector<char*> argv;
        for (const std::string& a : c.argv) argv.push_back(const_cast<char*>(a.c_str()));
        argv.push_back(nullptr);
        if (c.dir.empty() || !chdir(c.dir.c_str())) execvp(argv[0], argv.data());
        _exit(127);
    }
    close(out[1]);
    Outcome r;
    FILE* f = fdopen(out[0], "r");
    char line[1024];
    while (fgets(line, sizeof line, f)) {
        char key[64];
        double x;
        const char* took = strstr(line, "(took ");  // how llm.c prints it
        if (took && sscanf(took, "(took %lf ms)", &x) == 1) r.values["ms"].push_back(x);
        else if (sscanf(line, "%63s %lf", key, &x) == 2) r.values[key].push_back(x);
        r.text += line;
    }
    fclose(f);
    int status;
    rusage use;
    wait4(pid, &status, 0, &use);
    r.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    r.rss = (double)use.ru_maxrss * 1024;
    auto seconds = [](const timeval& t) { return (double)t.tv_sec + 1e-6 * (double)t.tv_usec; };
    double mine = seconds(use.ru_utime) + seconds(use.ru_stime), wall = bench::now() - t0;
    r.others =
        std::max(0.0, (machine_seconds() - busy - mine) / (wall * (double)sysconf(_SC_NPROCESSORS_ONLN)));
    return r;
}

// ---------------------------------------------------------------------------------------------
// The race

constexpr double BUSY = 0.05;

// Measures the rate of multiply-adds of n threads, the best of ten samples; returns by which share it is
// below the highest rate seen so far. The host of a virtual machine can take processors away, or put two of
// them on one core, and /proc/stat does not show it.
double rate_lost(int n) {
    static double most = 0;
    double rate = 0;
    for (int i = 0; i < 10; i++) rate = std::max(rate, bench::fma_flops(n));
    most = std::max(most, rate);
    return 1 - rate / most;
}

struct Contestant {
    std::string name, dtype;
    Command command;
    std::string key = "ms";
    size_t warm_up = 1;        // how many values of each run to drop
    std::string missing = {};  // why it does not take part; empty if it does
    std::vector<Outcome> runs = {};

    // The values of the quiet runs, or of all runs if none was quiet.
    Samples samples(bool* busy = nullptr) const {
        bool any_quiet = false;
        for (const Outcome& r : runs) any_quiet |= r.others <= BUSY;
        Samples s;
        for (const Outcome& r : runs) {
            auto v = r.values.find(key);
            if ((any_quiet && r.others > BUSY) || v == r.values.end()) continue;
            for (size_t i = warm_up; i < v->second.size(); i++) s.add(v->second[i]);
        }
        if (busy) *busy = !any_quiet;
        return s;
    }
    double rss() const {
        double most = 0;
        for (const Outcome& r : runs) most = std::max(most, r.rss);
        return most;
    }
    double others() const {
        double least = 1;
        for (const Outcome& r : runs) least = std::min(least, r.others);
        return least;
    }
};

// The words of a text, separated by white space.
Words words_of(const std::string& s) {
    std::istringstream in(s);
    return {std::istream_iterator<std::string>(in), {}};
}

// The Markdown report, which is also printed as it grows.
struct Report {
    std::string text;
    void add(const std::string& s) { text += s, fputs(s.c_str(), stdout), fflush(stdout); }
};

// A Python and its version of PyTorch.
struct Python {
    std::string file, name = "PyTorch", missing = "not installed";
    bool is_old = false;  // before PyTorch 2
};

struct Options {
    int runs = 3, steps = 3, threads = 0, patience = 0;
    std::string rows, parts = "steps optimizers sampling scaling", python = "python3", llmc,
                      out = "out/bench.md";
    std::string self, build;  // this program's file, and its folder
    std::vector<Python> pythons;
    Words common_env() const {
        return {strf("OMP_NUM_THREADS=%d", threads), "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE",
                "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"};
    }
};

// Runs all contestants alternately, o.runs times each. One that fails is excluded, with the reason.
void race(std::vector<Contestant>& all, const Options& o) {
    double t0 = bench::now();
    for (int round = 0, rounds = o.runs; round < rounds; round++) {
        for (Contestant& c : all) {
            if (!c.missing.empty()) continue;
            fprintf(
                stderr, "\r\033[Kround %d of %d%s: %s %s", round + 1, rounds,
                round ? strf(", %.0f s left", (bench::now() - t0) / round * (rounds - round)).c_str() : "",
                c.name.c_str(), c.dtype.c_str());
            double begin = bench::now(), lost = rate_lost(o.threads);
            while (lost > BUSY && bench::now() - begin < o.patience) sleep(1), lost = rate_lost(o.threads);
            Outcome r = run(c.command);
            r.others = std::max({r.others, lost, rate_lost(o.threads)});
            if (r.status) c.missing = strf("failed with status %d", r.status);
            else c.runs.push_back(r);
        }
    }
    fprintf(stderr, "\r\033[K");
}

Contestant ours(const Options& o, const std::string& dtype, Words args, const char* key = "ms") {
    Words argv = {o.self};
    argv.insert(argv.end(), args.begin(), args.end());
    return {"Arapoet", dtype, {argv, o.common_env(), ""}, key};
}

// A training step of this trainer. Two steps are dropped: the second one is the first to touch the moments,
// because a step completes the update of the step before.
Contestant our_step(const Options& o, const Row& r, const char* dtype) {
    Contestant c = ours(o, dtype, {"step", r.name, dtype, std::to_string(o.steps + 2)});
    c.warm_up = 2;
    return c;
}

// PyTorch with the settings that make it fastest: it keeps freed pages and uses huge pages, and if it
// multiplies with the system's BLAS, it gets the OpenBLAS build that shares PyTorch's OpenMP threads.
Contestant torch(const Options& o, const Python& python, const std::string& how, const std::string& dtype,
                 Words args, Words more_env = {}, const char* key = "ms") {
    Words argv = {python.file, "dev/bench/peer_torch.py"}, env = o.common_env();
    argv.insert(argv.end(), args.begin(), args.end());
    env.insert(env.end(), {"MALLOC_MMAP_MAX_=0", "MALLOC_TRIM_THRESHOLD_=100000000000",
                           "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"});
    env.insert(env.end(), more_env.begin(), more_env.end());
    glob_t found = {};
    if (!glob("/usr/lib/*/openblas-openmp", 0, nullptr, &found))
        env.push_back(strf("LD_LIBRARY_PATH=%s", found.gl_pathv[0]));
    globfree(&found);
    return {python.name + how, dtype, {argv, env, ""}, key, 3, python.missing};
}

// llm.c's train_gpt2, built for this shape from the user's checkout with llm.c's Makefile.
Contestant llmc(const Options& o, const Row& r, int steps) {
    Contestant c = {"llm.c", "fp32", {}, "ms", 1};
    if (o.llmc.empty()) return c.missing = "not installed (LLMC=path/to/llm.c)", c;
    std::string dir = o.build + "/llmc_" + (r.V == 64 ? "char" : "124m");
    make_dirs(dir);
    Outcome built = run({{"sh", "dev/bench/peer_llmc.sh", o.llmc, dir, std::to_string(r.B),
                          std::to_string(r.T), std::to_string(steps)},
                         {},
                         ""});
    if (built.status) fail("%s: llm.c's train_gpt2 could not be built there", o.llmc.c_str());
    if (!file_exists(dir + "/gpt2_124M.bin") && run({{o.self, "llmc_files", r.name, dir}, {}, ""}).status)
        fail("%s: cannot write llm.c's files", dir.c_str());
    c.command = {{strf("./train_gpt2_%dx%d", r.B, r.T)}, o.common_env(), dir};
    return c;
}

std::string spread(const Samples& s, const char* unit, double scale, int digits) {
    return strf("%.*f%s (%.*f to %.*f)", digits, s.median() * scale, unit, digits, s.min() * scale, digits,
                s.max() * scale);
}

struct Peak {
    double fp32 = 0, bf16 = 0;
    double of(const std::string& dtype) const { return dtype == "bf16" && bf16 > 0 ? bf16 : fp32; }
};

Peak measure_peak(const Options& o, int threads, Report& report) {
    Command c = {{o.self, "peak", std::to_string(threads)}, o.common_env(), ""};
    c.env[0] = strf("OMP_NUM_THREADS=%d", threads);
    Outcome r = run(c);
    if (r.status) fail("bench peak: status %d", r.status);
    std::map<std::string, Samples> s;
    for (auto& [key, values] : r.values)
        for (double x : values) s[key].add(x);
    report.add(strf("| %d | %s | %s | %s | %s | %.0f%% |\n", threads,
                    spread(s["fp32"], " GFLOP/s", 1e-9, 0).c_str(),
                    s["bf16"].max() > 0 ? spread(s["bf16"], " GFLOP/s", 1e-9, 0).c_str() : "none",
                    spread(s["read"], " GB/s", 1e-9, 1).c_str(),
                    spread(s["update"], " GB/s", 1e-9, 1).c_str(), 100 * r.others));
    return {s["fp32"].median(), s["bf16"].median()};
}

// The median step time or tokens/s of this trainer in this precision; NAN if there is none.
double our_median(const std::vector<Contestant>& all, const std::string& dtype) {
    for (const Contestant& c : all)
        if (c.name == "Arapoet" && c.dtype == dtype && c.missing.empty()) return c.samples().median();
    return NAN;
}

std::string others_text(const Contestant& c, bool busy) {
    return strf("%.0f%%%s", 100 * c.others(), busy ? " busy" : "");
}

void bench_steps(const Options& o, const Row& r, const Peak& peak, Report& report) {
    std::string shape = strf("%d,%d,%d,%d,%d,%d", r.L, r.NH, r.C, r.V, r.B, r.T),
                n = std::to_string(o.steps + 3);
    std::vector<Contestant> all;
    for (const char* dtype : {"fp32", "bf16"}) {
        all.push_back(our_step(o, r, dtype));
        bool is_fp32 = dtype == std::string("fp32");
        for (const Python& python : o.pythons) {
            all.push_back(torch(o, python, "", dtype, {"step", shape, dtype, n}));
            if (python.is_old) continue;
            all.push_back(
                torch(o, python, ", torch.compile", dtype, {"step", shape, dtype, n}, {"TORCH_COMPILE=1"}));
            if (is_fp32)
                all.push_back(torch(o, python, ", linear layers by oneDNN", dtype, {"step", shape, dtype, n},
                                    {"TORCH_LINEAR=onednn"}));
        }
        if (is_fp32) all.push_back(llmc(o, r, o.steps + 1));
    }
    report.add(
        strf("\n### %s\n\n| | | a step, ms | tokens/s | GFLOP/s | share of peak | peak memory | its time / "
             "ours | others |\n",
             r.title));
    report.add("| --- | --- | --- | --- | --- | --- | --- | --- | --- |\n");
    race(all, o);
    for (const Contestant& c : all) {
        bool busy;
        Samples s = c.samples(&busy);
        if (!c.missing.empty()) {
            report.add(
                strf("| %s | %s | %s | | | | | | |\n", c.name.c_str(), c.dtype.c_str(), c.missing.c_str()));
            continue;
        }
        double flops = r.flops() / (s.median() * 1e-3), ratio = s.median() / our_median(all, c.dtype),
               to_bf16 = s.median() / our_median(all, "bf16");
        report.add(strf("| %s | %s | %s | %.0f | %.0f | %.0f%% | %s | %.2f%s | %s |\n", c.name.c_str(),
                        c.dtype.c_str(), spread(s, "", 1, 0).c_str(), (double)r.tokens() / s.median() * 1e3,
                        flops / 1e9, 100 * flops / peak.of(c.dtype), human_bytes(c.rss()).c_str(), ratio,
                        c.name == "llm.c" ? strf(", bf16 %.2f", to_bf16).c_str() : "",
                        others_text(c, busy).c_str()));
    }
}

void bench_sampling(const Options& o, Report& report) {
    report.add(
        "\n### Sampling, GPT-2 124M, 64 tokens with a key/value cache\n\n| | | N | tokens/s of all N | ms a "
        "token of each | peak memory | ours / its | others |\n");
    report.add("| --- | --- | --- | --- | --- | --- | --- | --- |\n");
    for (int N : {1, 8}) {
        std::vector<Contestant> all;
        for (const char* dtype : {"fp32", "bf16"}) {
            Words args = {"sample", dtype, std::to_string(N), "64"};
            all.push_back(ours(o, dtype, args, "tokens/s"));
            for (const Python& python : o.pythons) {
                all.push_back(torch(o, python, "", dtype, args, {}, "tokens/s"));
                all.back().warm_up = 1;
            }
        }
        race(all, o);
        for (const Contestant& c : all) {
            bool busy;
            Samples s = c.samples(&busy);
            if (!c.missing.empty())
                report.add(strf("| %s | %s | %d | %s | | | | |\n", c.name.c_str(), c.dtype.c_str(), N,
                                c.missing.c_str()));
            else
                report.add(strf("| %s | %s | %d | %s | %.1f | %s | %.2f | %s |\n", c.name.c_str(),
                                c.dtype.c_str(), N, spread(s, "", 1, 1).c_str(), 1e3 * N / s.median(),
                                human_bytes(c.rss()).c_str(), our_median(all, c.dtype) / s.median(),
                                others_text(c, busy).c_str()));
        }
    }
}

// The optimizer's share of the time of a step that accumulates 16,384 tokens over several batches; and the
// speed of Muon's iteration as a share of the processor's peak.
void bench_optimizers(const Options& o, const std::vector<const Row*>& rows, Report& report) {
    constexpr size_t TOKENS = 16384;
    report.add(
        "\n### Optimizers, 16,384 tokens a step\n\n| | | optimizer | a step, ms | the optimizer, ms | its "
        "share "
        "| peak memory | others |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n");
    for (const Row* row : rows) {
        const Row& r = *row;
        if (TOKENS % r.tokens() || r.tokens() < 1024) continue;
        std::vector<Contestant> all;
        for (const char* dtype : {"fp32", "bf16"})
            for (const char* optimizer : {"adamw", "muon"}) {
                all.push_back(ours(o, dtype,
                                   {"step", r.name, dtype, std::to_string(o.steps + 1), optimizer,
                                    std::to_string(TOKENS / r.tokens())}));
                all.back().name = optimizer;
            }
        race(all, o);
        for (Contestant& c : all) {
            bool busy;
            const Samples step = c.samples(&busy);
            c.key = "update_ms";
            const Samples update = c.samples();
            if (!c.missing.empty())
                report.add(strf("| %s | %s | %s | %s | | | | |\n", r.title, c.dtype.c_str(), c.name.c_str(),
                                c.missing.c_str()));
            else
                report.add(strf("| %s | %s | %s | %s | %s | %.1f%% | %s | %s |\n", r.title, c.dtype.c_str(),
                                c.name.c_str(), spread(step, "", 1, 0).c_str(),
                                spread(update, "", 1, 1).c_str(), 100 * update.median() / step.median(),
                                human_bytes(c.rss()).c_str(), others_text(c, busy).c_str()));
        }
    }
    report.add(
        "\n| Muon's iteration | | share of peak, (C,C) | (C,4C) | others |\n| --- | --- | --- | --- | --- "
        "|\n");
    for (int C : {384, 768})
        for (const char* dtype : {"fp32", "bf16"}) {
            std::vector<Contestant> all = {ours(o, dtype, {"muon", dtype, std::to_string(C)}, "square")};
            race(all, o);
            bool busy;
            const Samples square = all[0].samples(&busy);
            all[0].key = "wide";
            report.add(strf("| C = %d | %s | %s | %s | %s |\n", C, dtype, spread(square, "%", 100, 0).c_str(),
                            spread(all[0].samples(), "%", 100, 0).c_str(),
                            others_text(all[0], busy).c_str()));
        }
}

// The gain from several threads, and the serial share that explains it. By Amdahl's law (1967), a program
// whose share s is serial gains g = 1 / (s + (1-s)/n) from n threads, so s = (n/g - 1) / (n - 1).
void bench_scaling(const Options& o, const std::vector<const Row*>& rows, Report& report) {
    report.add(
        "\n### Threads\n\n| | | threads | a step, ms | faster than 1 thread | serial share (Amdahl) | others "
        "|\n| --- | --- | --- | --- | --- | --- | --- |\n");
    for (const Row* r : rows)
        for (const char* dtype : {"fp32", "bf16"}) {
            std::vector<Contestant> all;
            std::vector<int> threads;
            for (int n : {1, 2, 4, 8}) {
                if (n > (int)sysconf(_SC_NPROCESSORS_ONLN)) continue;
                all.push_back(our_step(o, *r, dtype));
                all.back().command.env[0] = strf("OMP_NUM_THREADS=%d", n);
                threads.push_back(n);
            }
            race(all, o);
            for (size_t i = 0; i < all.size(); i++) {
                bool busy;
                Samples s = all[i].samples(&busy);
                if (!all[i].missing.empty()) {
                    report.add(strf("| %s | %s | %d | %s | | | |\n", r->title, dtype, threads[i],
                                    all[i].missing.c_str()));
                    continue;
                }
                double n = threads[i], gain = all[0].samples().median() / s.median();
                report.add(strf("| %s | %s | %.0f | %s | %.2f | %s | %s |\n", r->title, dtype, n,
                                spread(s, "", 1, 0).c_str(), gain,
                                i ? strf("%.1f%%", 100 * (n / gain - 1) / (n - 1)).c_str() : "",
                                others_text(all[i], busy).c_str()));
            }
        }
}

Options parse_options(int argc, char** argv) {
    Options o;
    Flags f("bench", "times training steps and sampling, in comparison with PyTorch and llm.c");
    f.add("rows", "", &o.rows, "NAMES",
          "124m-4x64, 124m-4x256, 124m-1x1024, char, or parts of these names; \"\": all");
    f.add("parts", "", &o.parts, "NAMES", "which tables: steps, optimizers, sampling, scaling");
    f.add("runs", "", &o.runs, "N", "processes of each contestant, which alternate").range(1, 1000);
    f.add("steps", "", &o.steps, "N", "timed steps of each process").range(1, 1e6);
    f.add("threads", "", &o.threads, "N", "threads; 0: all cores").range(0, 4096);
    f.add("patience", "", &o.patience, "SECONDS",
          "how long to wait before each process while the machine is slower than at its best")
        .range(0, 1e6);
    f.add("python", "", &o.python, "FILES", "the Python that has PyTorch, or several");
    f.add("llmc", "", &o.llmc, "DIR", "a checkout of llm.c");
    f.add("out", "", &o.out, "FILE", "file for the tables, which are also printed");
    f.parse(argc, argv);
    if (!o.threads) o.threads = (int)sysconf(_SC_NPROCESSORS_ONLN);
    char self[4096];
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0) fail("/proc/self/exe: %s", strerror(errno));
    self[n] = 0, o.self = self, o.build = dirname_of(self);
    return o;
}

// The rows whose names contain one of the words of --rows.
std::vector<const Row*> chosen_rows(const Options& o) {
    std::vector<const Row*> rows;
    for (const Row& r : ROWS) {
        bool wanted = o.rows.empty();
        for (const std::string& part : words_of(o.rows))
            wanted |= std::string(r.name).find(part) != std::string::npos;
        if (wanted) rows.push_back(&r);
    }
    if (rows.empty())
        throw UsageError(
            strf("--rows: '%s' matches none of 124m-4x64, 124m-4x256, 124m-1x1024, char", o.rows.c_str()));
    return rows;
}

// Finds out which peers are installed, and reports it.
void find_peers(Options& o, Report& report) {
    for (const std::string& file : words_of(o.python)) {
        Outcome version = run({{file, "dev/bench/peer_torch.py", "check"}, {}, ""});
        Python python = {file};
        if (!version.status) {
            size_t dot = version.text.find('.');
            python.name +=
                " " + version.text.substr(0, version.text.find_first_not_of("0123456789", dot + 1));
            python.missing = "", python.is_old = atoi(version.text.c_str()) < 2;
        }
        report.add(version.status ? strf("PyTorch: not installed for %s (python3 -m pip install torch, or "
                                         "PYTHON=a Python that has it)\n",
                                         file.c_str())
                                  : "PyTorch " + version.text);
        o.pythons.push_back(python);
    }
    report.add(o.llmc.empty() ? "llm.c: not installed (git clone https://github.com/karpathy/llm.c, then "
                                "LLMC=path/to/llm.c)\n\n"
                              : "llm.c: " + o.llmc + "\n\n");
}

int bench_all(int argc, char** argv) {
    Options o = parse_options(argc, argv);
    std::vector<const Row*> rows = chosen_rows(o);
    auto wants = [&](const char* part) { return o.parts.find(part) != std::string::npos; };

    Report report;
    report.add(strf("%s\n\n", cpu::GPT2::device().c_str()));
    find_peers(o, report);
    report.add(
        "| threads | fp32 multiply-add | bf16 dot product | memory read | memory, AdamW's pattern | others "
        "|\n| --- | --- | --- | --- | --- | --- |\n");
    if (o.threads > 1) measure_peak(o, 1, report);
    Peak peak = measure_peak(o, o.threads, report);
    if (wants("steps"))
        for (const Row* r : rows) bench_steps(o, *r, peak, report);
    if (wants("optimizers")) bench_optimizers(o, rows, report);
    if (wants("sampling")) bench_sampling(o, report);
    if (wants("scaling")) bench_scaling(o, rows, report);
    report.add(strf(
        "\nMedians (minimum to maximum) of %d alternating processes x %d steps. 'others' is the share of "
        "the processors that other programs took, or the host of a virtual machine, as the rate of "
        "multiply-adds before and after the run shows. Runs above %.0f%% count only if the contestant "
        "has no quieter run ('busy').\n",
        o.runs, o.steps, 100 * BUSY));
    make_dirs(dirname_of(o.out));
    AtomicFile file(o.out);
    file.write(report.text);
    file.commit();
    printf("wrote %s\n", o.out.c_str());
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    std::string what = argc > 1 ? argv[1] : "";
    if (what == "step" || what == "sample" || what == "muon")
        machine::spin_less(argv);  // as train_gpt2 and sample_gpt2 do
    machine::flush_subnormals();
    return run_main("bench", [&] {
        if (what == "step" && argc == 5) return work_step(find_row(argv[2]), argv[3], atoi(argv[4]));
        if (what == "step" && argc == 7)
            return work_step(find_row(argv[2]), argv[3], atoi(argv[4]),
                             argv[5] == std::string("muon") ? MUON : ADAMW, (size_t)atoi(argv[6]));
        if (what == "muon" && argc == 4)
            return argv[2] == std::string("bf16") ? work_muon<gemm::bf16>(atoi(argv[3]))
                                                  : work_muon<float>(atoi(argv[3]));
        if (what == "sample" && argc == 5) return work_sample(argv[2], atoi(argv[3]), atoi(argv[4]));
        if (what == "peak" && argc == 3) return work_peak(atoi(argv[2]));
        if (what == "llmc_files" && argc == 4) return write_llmc_files(find_row(argv[2]), argv[3]);
        return bench_all(argc, argv);
    });
}
