// test_gpu_model.cu - the whole GPU model against the CPU's: forward and backward passes, training steps,
// state, generation. Built for bf16 and fp32. Without a GPU dev/emulator runs it; nvcc builds the same file
// for a GPU.
#define ARAPOET_NO_MAIN
#include <doctest/doctest.h>

#include <numeric>
#include <random>
#include <set>

#include "dev/test_gpu_util.h"
#include "lib/checkpoint.h"

namespace {

using namespace gpu_test;
using Tokens = std::vector<int>;
constexpr bool BUILT_BF16 = gpu::BUILD_DTYPE == BF16;

// Allowed errors, depending on the build's number type. The emulator sums in other orders than a GPU, and its
// approximate instructions are exact.
struct Tolerances {
    double gradient;   // of one tensor, relative L2
    double loss;       // relative
    double ten_steps;  // of each of ten losses
    double logits;
    double weights;  // after ten steps
    double muon;     // the change of a matrix that Muon updates: it magnifies the gradients' small directions
};
#ifdef EMULATOR
constexpr Tolerances ALLOWED = BUILT_BF16 ? Tolerances{1e-2, 1e-3, 2e-3, 1e-2, 2e-2, 1.2e-1}
                                          : Tolerances{1e-5, 1e-6, 1e-5, 1e-5, 2e-5, 3e-5};
#else
constexpr Tolerances ALLOWED = BUILT_BF16 ? Tolerances{1.5e-2, 2e-3, 4e-3, 1.5e-2, 4e-2, 2e-1}
                                          : Tolerances{3e-5, 3e-6, 3e-5, 3e-5, 6e-5, 1e-4};
#endif

// The file of timed algorithms is written to a temporary folder.
struct CacheFolder {
    TempDir dir;
    CacheFolder() { setenv("XDG_CACHE_HOME", dir.path.c_str(), 1); }
} cache_folder;

Config config(int arch = GPT2_ARCH, int activation = GELU_TANH, int L = 2, int NH = 3, int hs = 32,
              int V = 301, int maxT = 24) {
    Config c;
    c.L = L, c.NH = NH, c.C = NH * hs, c.V = V, c.Vp = pad_vocab(V), c.maxT = maxT, c.arch = arch,
    c.activation = activation;
    return c;
}

// Weights twice as large as the initial ones, and no tensor all zeros or ones. (bf16's rounding noise in the
// gradients grows with them.) Where the build computes in bf16 they are bf16 numbers, so that both models
// start from the same.
Values random_weights(const Config& c, uint64_t seed) {
    Values w;
    ParamTable table = param_table(c);
    for (int i = 0; i < NUM_PARAMS; i++) {
        bool scale = i == LN1W || i == LN2W || i == LNFW;
        Values x =
            normals_x(table[i].size(), seed + (uint64_t)i, table[i].decay ? 0.04 : 0.025, scale ? 1 : 0);
        if (i == WTE) std::fill(x.begin() + c.V * c.C, x.end(), 0.0f);
        w.insert(w.end(), x.begin(), x.end());
    }
    return w;
}

// The micro-batches of some steps, with one frequent token and some ignored targets.
struct Data {
    size_t B, T;
    std::vector<Tokens> x, y;
    Data(size_t batches, size_t B_, size_t T_, int V, uint64_t seed) : B(B_), T(T_), x(batches), y(batches) {
        std::mt19937_64 engine(seed);
        for (size_t i = 0; i < batches; i++)
            for (size_t m = 0; m < B * T; m++) {
                x[i].push_back(engine() % 4 ? (int)(engine() % (size_t)V) : 7);
                y[i].push_back(engine() % 7 ? (int)(engine() % (size_t)V) : -1);
            }
    }
};

// Accumulates micro-batches [first, first + count) as one step.
template <class Model>
void accumulate(Model& m, const Data& d, size_t first, size_t count, uint32_t step) {
    for (size_t i = 0; i < count; i++) {
        Pass pass;
        pass.train = true, pass.step = step, pass.seq0 = i * d.B,
        pass.grad_scale = 1.0f / (float)(count * d.B * d.T);
        m.accumulate(d.x[first + i].data(), d.y[first + i].data(), d.B, d.T, pass);
    }
}
// eps is larger than the gradients' rounding noise in fp32: otherwise AdamW would scale the noise up to full
// steps.
StepSettings settings() {
    StepSettings a;
    a.lr = 3e-3f, a.weight_decay = 0.1f, a.grad_clip = 1, a.eps = 1e-6f;
    return a;
}

void check_gradients(const std::string& what, const Config& c, const Values& got, const Values& want) {
    ParamTable table = param_table(c);
    auto off = param_offsets(c);
    for (int i = 0; i < NUM_PARAMS; i++)
        check_close("gradients: " + what + " " + table[i].name, &got[off[i]], &want[off[i]], table[i].size(),
                    ALLOWED.gradient);
}
std::string name_of(const Config& c) {
    return std::string(c.arch == GROVER_ARCH ? "GROVER" : "GPT-2") +
           (c.activation == GELU_ERF ? " erf" : " tanh");
}

// One step's gradients, loss and norm of two accumulated micro-batches.
struct Step {
    Values grads;
    StepResult result;
};
template <class Model>
Step one_step(const Config& c, const Data& d, float dropout, int recompute = 0, bool graphs = true) {
    Model m(c, d.B, d.T, true, recompute);
    if constexpr (std::is_same<Model, gpu::GPT2>::value) m.use_graphs = graphs;
    m.dropout = dropout;
    set_state(m, PARAMS, random_weights(c, 11));
    accumulate(m, d, 0, d.x.size(), 3);
    Step s;
    s.grads = get_state(m, GRADS);
    s.result = m.step(settings(), 4);
    return s;
}

TEST_CASE("GPU model: loss and every gradient agree with the CPU's, whatever is recomputed") {
    Temporarily head(gpu::GPT2::head_logits, 3 * 16 * 384);  // 60 rows in two parts, the second one shorter
    struct {
        int arch, activation, most_recompute;
        float dropout;
    } cases[] = {{GPT2_ARCH, GELU_TANH, 3, 0.1f},
                 {GROVER_ARCH, GELU_ERF, 3, 0.1f},
                 {GPT2_ARCH, GELU_ERF, 1, 0.0f},
                 {GROVER_ARCH, GELU_TANH, 1, 0.0f}};
    for (auto& t : cases) {
        Config c = config(t.arch, t.activation);
        Data d(2, 3, 20, c.V, 5);
        Step want = one_step<cpu::GPT2>(c, d, t.dropout), kept;
        for (int r = 0; r <= t.most_recompute; r++) {
            const bool switched = r == 1 || r == 2;
            Temporarily in_kernels(gpu::switches.bias_in_kernels, switched);
            std::string what = strf("%s recompute %d%s", name_of(c).c_str(), r, switched ? " switched" : "");
            CAPTURE(what);
            Step got = one_step<gpu::GPT2>(c, d, t.dropout, r);
            check_gradients(what, c, got.grads, want.grads);
            check_close("loss: " + what, &got.result.loss, &want.result.loss, 1, ALLOWED.loss);
            check_close("norm: " + what, &got.result.norm, &want.result.norm, 1, ALLOWED.gradient);
            if (r == 0) kept = got;
            if (r == 3) CHECK(same_bits(got.grads, kept.grads));  // the same kernels ran again
        }
    }
}

TEST_CASE("GPU model: gradients at edge sizes: one row, one layer, each head size, head in one part") {
    for (int hs : gpu::HEAD_SIZES) {
        Config c = config(hs % 3 ? GPT2_ARCH : GROVER_ARCH, GELU_TANH, 1, 2, hs, 130, 9);
        Data d(1, 1, hs == 48 ? 1 : 9, c.V, (uint64_t)hs);
        d.y[0][0] = 3;
        Step want = one_step<cpu::GPT2>(c, d, 0), got = one_step<gpu::GPT2>(c, d, 0);
        check_gradients("head size " + std::to_string(hs), c, got.grads, want.grads);
    }
}

TEST_CASE("GPU model: ten steps' losses are the CPU's, with and without master weights") {
    Config c = config(GPT2_ARCH, GELU_TANH, 2, 2);
    Data d(20, 2, 16, c.V, 6);
    for (size_t i = 2; i < d.x.size(); i++)
        d.x[i] = d.x[i % 2], d.y[i] = d.y[i % 2];  // the same batch, so that the loss falls
    auto losses = [&](auto& m) {
        m.dropout = 0.1f;
        set_state(m, PARAMS, random_weights(c, 12));
        std::vector<double> l;
        for (uint32_t t = 0; t < 10; t++) {
            accumulate(m, d, 2 * t, 2, t);
            StepResult r = m.step(settings(), t + 1);
            CHECK(r.finite());
            l.push_back(r.loss);
        }
        return l;
    };
    cpu::GPT2 reference(c, d.B, d.T, true);
    std::vector<double> want = losses(reference);
    CHECK(want.back() < want.front() - 1);
    for (bool master : {true, false}) {
        gpu::GPT2 m(c, d.B, d.T, true, 0, {gpu::BUILD_DTYPE, master});
        std::vector<double> got = losses(m);
        for (size_t i = 0; i < got.size(); i++)
            check_close(std::string("ten steps: ") + (master ? "with" : "without") + " masters, loss " +
                            std::to_string(i),
                        &got[i], &want[i], 1, ALLOWED.ten_steps * (BUILT_BF16 && !master ? 5 : 1));
        if (master) {
            // Except qkvb: the gradient of a key's bias is only rounding noise, which is large in bf16.
            Values weights = get_state(m, PARAMS), wanted = get_state(reference, PARAMS);
            ParamTable table = param_table(c);
            auto off = param_offsets(c);
            for (int i = 0; i < NUM_PARAMS; i++)
                if (i != QKVB)
                    check_close(std::string("weights after ten steps: ") + table[i].name, &weights[off[i]],
                                &wanted[off[i]], table[i].size(), ALLOWED.weights);
        }
    }
}

TEST_CASE("GPU model: Muon's steps are the CPU's, whatever the number of matrices at once") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH}) {
        const Config c = config(arch, GELU_TANH, 5, 1, 32);
        const Data d(3, 3, 24, c.V, 24);  // more rows than channels: gradients are of full rank
        const Values start = random_weights(c, 25);
        const ParamTable table = param_table(c);
        const auto off = param_offsets(c);
        auto losses = [&](auto& m) {
            set_state(m, PARAMS, start);
            std::vector<double> l;
            for (uint32_t t = 0; t < 3; t++) {
                accumulate(m, d, t, 1, t);
                StepSettings a = settings();
                a.grad_clip = t ? 0.5f : 0.0f;
                const StepResult r = m.step(a, t + 1);
                CHECK(r.norm > 0.5);
                l.push_back(r.loss);
            }
            return l;
        };
        cpu::GPT2 reference(c, d.B, d.T, true, 0, {gpu::BUILD_DTYPE}, {}, MUON);
        const std::vector<double> want = losses(reference);
        const size_t C = (size_t)c.C;
        // Of 20 square and 10 wide matrices all at once; or in two rounds of 10, and four of 3, 3, 3 and 1
        for (size_t elements : {(size_t)1 << 20, 12 * C * C}) {
            CAPTURE(elements);
            Temporarily at_once(gpu::GPT2::muon_elements, elements);
            gpu::GPT2 m(c, d.B, d.T, true, 0, {gpu::BUILD_DTYPE, true, true}, {}, MUON);
            const std::vector<double> got = losses(m);
            const std::string what = "Muon, " + name_of(c) + ": ";
            check_close(what + "losses", got.data(), want.data(), 3, ALLOWED.ten_steps);
            for (State s : {MUON_M, ADAM_M, ADAM_V}) {
                const Values x = get_state(m, s), y = get_state(reference, s);
                check_close(what + strf("state %d", (int)s), x.data(), y.data(), y.size(),
                            2 * ALLOWED.gradient);
            }
            Values x = get_state(m, PARAMS), y = get_state(reference, PARAMS);
            for (size_t i = 0; i < x.size(); i++) x[i] -= start[i], y[i] -= start[i];
            for (int i = 0; i < NUM_PARAMS; i++)
                if (table[i].block_matrix())
                    check_close(what + "change of " + table[i].name, &x[off[i]], &y[off[i]], table[i].size(),
                                ALLOWED.muon);
        }
    }
}

TEST_CASE("GPU model: evaluation has no dropout, counts its targets and does not disturb training") {
    Temporarily head(gpu::GPT2::head_logits, 8 * 384);
    Config c = config(GROVER_ARCH, GELU_ERF);
    Data d(3, 2, 13, c.V, 8);
    cpu::GPT2 want(c, d.B, d.T, true);
    gpu::GPT2 got(c, d.B, d.T, true), other(c, d.B, d.T, true), small(c, d.B, d.T, false);
    for (auto* m : {&got, &other, &small}) set_state(*m, PARAMS, random_weights(c, 13)), m->dropout = 0.2f;
    set_state(want, PARAMS, random_weights(c, 13));
    accumulate(got, d, 0, 1, 0), got.step(settings(), 1);
    accumulate(other, d, 0, 1, 0), other.step(settings(), 1);
    got.forward(d.x[2].data(), d.y[2].data(), d.B, d.T);
    accumulate(got, d, 1, 1, 1), accumulate(other, d, 1, 1, 1);
    CHECK(same_bits(get_state(got, GRADS), get_state(other, GRADS)));
    for (size_t B = 1; B <= d.B; B++) {
        double a = small.forward(d.x[2].data(), d.y[2].data(), B, d.T),
               b = want.forward(d.x[2].data(), d.y[2].data(), B, d.T);
        check_close("loss: evaluation", &a, &b, 1, ALLOWED.loss);
        CHECK(small.counted() == want.counted());
    }
    // Few enough rows for one part of the head; but in memory are the logits of half of d.B * d.T.
    Temporarily longer(gpu::GPT2::head_logits, 24 * 384);
    gpu::GPT2 halves(c, d.B, d.T, false);
    set_state(halves, PARAMS, random_weights(c, 13));
    double a = halves.forward(d.x[2].data(), d.y[2].data(), d.B, 12),
           b = want.forward(d.x[2].data(), d.y[2].data(), d.B, 12);
    check_close("loss: evaluation", &a, &b, 1, ALLOWED.loss);
    Tokens none(d.B * d.T, -1);
    CHECK(small.forward(d.x[2].data(), none.data(), d.B, d.T) == 0);
    CHECK(small.counted() == 0);
}

// Losses, masters and moments after two steps of three micro-batches.
Values trained_bits(bool graphs) {
    Config c = config(GPT2_ARCH, GELU_TANH, 2, 2);
    Data d(6, 2, 16, c.V, 9);
    gpu::GPT2 m(c, d.B, d.T, true);
    m.use_graphs = graphs, m.dropout = 0.1f;
    set_state(m, PARAMS, random_weights(c, 14));
    Values bits;
    for (uint32_t t = 0; t < 2; t++) {
        accumulate(m, d, 3 * t, 3, t);
        bits.push_back((float)m.step(settings(), t + 1).loss);
    }
    for (auto s : {PARAMS, ADAM_M, ADAM_V}) {
        Values f = get_state(m, s);
        bits.insert(bits.end(), f.begin(), f.end());
    }
    bits.push_back((float)m.forward(d.x[0].data(), d.y[0].data(), d.B, d.T));  // of the rounded parameters
    return bits;
}

TEST_CASE("GPU model: graphs and direct launches give the same bits, under every schedule") {
    std::vector<Values> recorded = repeatable([] { return std::vector<Values>{trained_bits(true)}; });
    CHECK(same_bits(recorded[0], trained_bits(false)));
}

#ifdef EMULATOR
// Restores the emulator's options at the end.
struct Options {
    emu::Options before = emu::options();
    ~Options() { emu::options() = before; }
};

TEST_CASE("GPU model: head size 128 trains and samples with 99 and with 227 KiB of shared memory") {
    Options restore;
    Config c = config(GPT2_ARCH, GELU_TANH, 1, 1, 128, 130, 72);
    Data d(2, 1, 72, c.V, 22);
    Step want = one_step<cpu::GPT2>(c, d, 0.1f);
    cpu::GPT2 reference(c, 0, 0, false);
    set_state(reference, PARAMS, random_weights(c, 23));
    cpu::Decoder decoder(reference, 1, 1000);
    const float* logits = decoder.append_to_all(d.x[0].data(), 70);
    for (int architecture : {86, 90}) {
        emu::options().architecture = architecture;
        std::string what = strf("sm_%d", architecture);
        CAPTURE(what);
        Step got = one_step<gpu::GPT2>(c, d, 0.1f);
        check_gradients(what, c, got.grads, want.grads);
        check_close("loss: " + what, &got.result.loss, &want.result.loss, 1, ALLOWED.loss);
        check_close("norm: " + what, &got.result.norm, &want.result.norm, 1, ALLOWED.gradient);
        gpu::GPT2 model(c, 0, 0, false);
        set_state(model, PARAMS, random_weights(c, 23));
        gpu::Decoder sampler(model, 1, 1000);
        check_close("decoder: logits", sampler.append_to_all(d.x[0].data(), 70), logits, (size_t)c.V,
                    ALLOWED.logits);
    }
}

TEST_CASE("GPU model: where cuBLASLt lacks an epilogue, kernels compute the same gradients") {
    Options restore;
    for (int activation : {GELU_TANH, GELU_ERF}) {
        Config c = config(GPT2_ARCH, activation, 1, 2);
        Data d(2, 2, 16, c.V, 10);
        Step want = one_step<cpu::GPT2>(c, d, 0.1f);
        const uint32_t bias = CUBLASLT_EPILOGUE_BIAS, gelu = CUBLASLT_EPILOGUE_GELU, dgelu = 64,
                       bgradb = CUBLASLT_EPILOGUE_BGRADB;
        for (uint32_t e : {bias, gelu, dgelu, bgradb, bias | gelu | dgelu | bgradb}) {
            TempDir cache;  // empty, without algorithms that were timed with the epilogue
            setenv("XDG_CACHE_HOME", cache.path.c_str(), 1);
            emu::options().refused_epilogues = e;
            std::string what = name_of(c) + " without epilogues " + std::to_string(e);
            check_gradients(what, c, one_step<gpu::GPT2>(c, d, 0.1f).grads, want.grads);
        }
        setenv("XDG_CACHE_HOME", cache_folder.dir.path.c_str(), 1);
        emu::options().refused_epilogues = 0;
    }
}

// What is slow by the emulator's clock: products with this epilogue, or kernels; and what has been run.
namespace slow {
int epilogue;  // 0: kernels
std::map<std::string, int> runs;
double milliseconds(const std::string& work) {
    runs[work.substr(0, work.find(" workspace"))]++;
    const bool product = work.compare(0, 7, "matmul ") == 0;
    if (!product) return epilogue ? 1 : 1000;
    return work.find(strf("matmul epilogue %d ", epilogue)) == 0 ? 1000 : 1;
}
int runs_with(int e) { return runs[strf("matmul epilogue %d", e)]; }
}  // namespace slow

TEST_CASE("GPU model: an epilogue is used where it is faster than a kernel, and only there") {
    Options restore;
    Config c = config(GPT2_ARCH, GELU_TANH, 1, 2);
    Data d(2, 2, 16, c.V, 10);
    Step want = one_step<cpu::GPT2>(c, d, 0.1f);
    emu::options().milliseconds = slow::milliseconds;
    const int epilogues[] = {CUBLASLT_EPILOGUE_BIAS, CUBLASLT_EPILOGUE_GELU_AUX_BIAS, CUBLASLT_EPILOGUE_DGELU,
                             CUBLASLT_EPILOGUE_BGRADB};
    for (int e : {0, epilogues[0], epilogues[1], epilogues[2], epilogues[3]}) {
        CAPTURE(e);
        TempDir cache;
        setenv("XDG_CACHE_HOME", cache.path.c_str(), 1);
        slow::epilogue = e;
        for (int run = 0; run < 2; run++) {  // the second one takes its choices from the file
            gpu::GPT2 m(c, d.B, d.T, true);
            set_state(m, PARAMS, random_weights(c, 11));
            m.dropout = 0.1f, slow::runs.clear();
            accumulate(m, d, 0, d.x.size(), 3);
            check_gradients(strf("with epilogue %d slow", e), c, get_state(m, GRADS), want.grads);
            for (int other : epilogues) CHECK((slow::runs_with(other) > 0) == (other != e));
        }
        setenv("XDG_CACHE_HOME", cache_folder.dir.path.c_str(), 1);
    }
}

TEST_CASE("GPU model: where kernels sum the biases' gradients, no product does, whatever is faster") {
    Options restore;
    Temporarily in_kernels(gpu::switches.bias_in_kernels, true);
    Config c = config(GPT2_ARCH, GELU_TANH, 1, 2);
    Data d(2, 2, 16, c.V, 10);
    Step want = one_step<cpu::GPT2>(c, d, 0.1f);
    emu::options().milliseconds = slow::milliseconds;
    for (int e : {0, (int)CUBLASLT_EPILOGUE_DEFAULT}) {
        CAPTURE(e);
        TempDir cache;
        setenv("XDG_CACHE_HOME", cache.path.c_str(), 1);
        slow::epilogue = e;
        gpu::GPT2 m(c, d.B, d.T, true);
        set_state(m, PARAMS, random_weights(c, 11));
        m.dropout = 0.1f, slow::runs.clear();
        accumulate(m, d, 0, d.x.size(), 3);
        check_gradients(strf("biases in kernels, epilogue %d slow", e), c, get_state(m, GRADS), want.grads);
        CHECK(slow::runs_with(CUBLASLT_EPILOGUE_BGRADB) == 0);
        CHECK((slow::runs_with(CUBLASLT_EPILOGUE_DGELU) > 0) == (e != 0));
        setenv("XDG_CACHE_HOME", cache_folder.dir.path.c_str(), 1);
    }
}

TEST_CASE("GPU model: --deterministic takes no choice from a file or a clock") {
    Options restore;
    Config c = config(GPT2_ARCH, GELU_TANH, 1, 2);
    Data d(1, 2, 16, c.V, 10);
    TempDir cache;
    setenv("XDG_CACHE_HOME", cache.path.c_str(), 1);
    Values first;
    for (int e : {0, (int)CUBLASLT_EPILOGUE_BIAS, (int)CUBLASLT_EPILOGUE_DEFAULT}) {
        slow::epilogue = e, emu::options().milliseconds = slow::milliseconds;
        { gpu::GPT2 other(c, d.B, d.T, true); }  // leaves its choices in the file
        Precision p = {gpu::BUILD_DTYPE};
        p.deterministic = true;
        gpu::GPT2 m(c, d.B, d.T, true, 0, p);
        set_state(m, PARAMS, random_weights(c, 11));
        slow::runs.clear();
        accumulate(m, d, 0, 1, 3);
        Values got = get_state(m, GRADS);
        if (first.empty()) first = got;
        CHECK(same_bits(got, first));
        CHECK(slow::runs_with(CUBLASLT_EPILOGUE_GELU_AUX_BIAS) == 0);
        CHECK(slow::runs_with(CUBLASLT_EPILOGUE_BIAS) > 0);
    }
    setenv("XDG_CACHE_HOME", cache_folder.dir.path.c_str(), 1);
}

TEST_CASE("GPU model: where an algorithm fails, the next one of cuBLASLt's proposals computes") {
    Options restore;
    Config c = config(GPT2_ARCH, GELU_TANH, 1, 2);
    Data d(2, 2, 16, c.V, 10);
    Step want = one_step<cpu::GPT2>(c, d, 0.1f);
    for (size_t workspace : {(size_t)0, (size_t)1 << 20}) {
        TempDir cache;
        setenv("XDG_CACHE_HOME", cache.path.c_str(), 1);
        emu::options().failing_workspace = workspace, emu::options().quiet = true;
        gpu::GPT2 m(c, d.B, d.T, true);
        set_state(m, PARAMS, random_weights(c, 11));
        m.dropout = 0.1f;
        accumulate(m, d, 0, d.x.size(), 3);
        check_gradients(strf("without workspace %zu", workspace), c, get_state(m, GRADS), want.grads);
        Tokens few(8, 1);  // a shape that was not timed
        m.step(settings(), 4);
        CHECK(std::isfinite(m.forward(few.data(), few.data(), 1, 8)));
        setenv("XDG_CACHE_HOME", cache_folder.dir.path.c_str(), 1);
    }
}

TEST_CASE("GPU model: late results are the same numbers, one step later") {
    Config c = config();
    Data d(6, 2, 16, c.V, 15);
    auto train = [&](bool late) {
        gpu::switches.late_results = late;
        gpu::GPT2 m(c, d.B, d.T, true);
        m.init_weights(1);
        std::vector<StepResult> results;
        for (uint32_t t = 1; t <= 3; t++) {
            accumulate(m, d, 2 * (t - 1), 2, t);
            StepResult r = m.step(settings(), t);
            CHECK(r.step == (late ? t - 1 : t));
            if (r.step) results.push_back(r);
        }
        if (late) results.push_back(m.last_result());
        CHECK(m.last_result().step == 3);
        gpu::switches.late_results = false;
        Values out = get_state(m, PARAMS);
        for (const StepResult& r : results) out.push_back((float)r.loss), out.push_back((float)r.norm);
        return out;
    };
    CHECK(same_bits(train(true), train(false)));
}

TEST_CASE("GPU model: it allocates what memory_need says, and a step allocates nothing") {
    Config c = config();
    Data d(4, 2, 16, c.V, 15);
    for (bool trains : {false, true})
        for (int r : {0, 3}) {
            const Optimizer optimizer = r == 3 ? MUON : ADAMW;
            Temporarily in_kernels(gpu::switches.bias_in_kernels, r == 3);
            size_t before = emu::statistics().memory_now;
            gpu::GPT2 m(c, d.B, d.T, trains, r, {gpu::BUILD_DTYPE}, {}, optimizer);
            MemoryNeed need =
                gpu::GPT2::memory_need(c, d.B, d.T, trains, r, {gpu::BUILD_DTYPE}, {}, optimizer);
            CHECK(emu::statistics().memory_now - before == need.total());
            m.init_weights(1);
            if (!trains) continue;
            accumulate(m, d, 0, 2, 0), m.step(settings(), 1);
            size_t now = emu::statistics().memory_now, peak = emu::statistics().memory_peak;
            accumulate(m, d, 2, 2, 1), m.step(settings(), 2);
            CHECK(emu::statistics().memory_now == now);
            CHECK(emu::statistics().memory_peak == peak);
        }
}

// For 60 rows: 8, 16 or 32 rows of logits.
TEST_CASE("GPU model: a large head takes at most half of what is left, and computes the same") {
    Options restore;
    Temporarily switched(gpu::switches.large_head, true);
    Temporarily usual(gpu::GPT2::head_logits, 8 * 384);
    Temporarily large(gpu::GPT2::large_head_logits, 32 * 384);
    Config c = config();
    Data d(2, 3, 20, c.V, 5);
    Step want = one_step<cpu::GPT2>(c, d, 0.1f);
    auto need = [&](bool deterministic = false, bool trains = true) {
        Precision p = {gpu::BUILD_DTYPE};
        p.deterministic = deterministic;
        return gpu::GPT2::memory_need(c, d.B, d.T, trains, 0, p).total();
    };
    const size_t least = need(true), row = 384 * sizeof(gpu::floatX), poem = key_value_bytes(c, 1, d.T);
    for (size_t rows : {8, 16, 32}) {
        CAPTURE(rows);
        // So much that these rows just fit, and a little less. memory_available() keeps a 32nd back.
        const size_t more = rows == 8 ? 0 : (rows - 8) * row, free = (least + poem + 2 * more) * 32 / 31 + 32;
        const size_t now = emu::statistics().memory_now, before = rows == 32 ? 8 * row : 0;
        emu::options().memory_limit = now + free - 4096;
        CHECK(need() == least + before);
        emu::options().memory_limit = now + free;
        CHECK(need() == least + more);
        CHECK(need(true) == least);
        check_gradients(strf("%zu rows of logits at once", rows), c, one_step<gpu::GPT2>(c, d, 0.1f).grads,
                        want.grads);
        gpu::GPT2 m(c, d.B, d.T, true);
        CHECK(emu::statistics().memory_now - now == least + more);
    }
    const size_t now = emu::statistics().memory_now;
    emu::options().memory_limit = now + (least + poem) * 32 / 31 + 32;
    CHECK(need() == least);
    emu::options().memory_limit = now + ((size_t)1 << 30);
    {
        gpu::GPT2 m(c, d.B, d.T, true);  // takes what memory_need() said, though more is free by now
        CHECK(emu::statistics().memory_now - now == least);
    }
    CHECK(need() == least + 24 * row);  // and no more than large_head_logits
    const size_t reads = need(false, false);
    gpu::switches.large_head = false;
    CHECK(need(false, false) == reads);
    CHECK(need() == least);
}

TEST_CASE("GPU model: out of memory is a one-line error that says what to try") {
    Options restore;
    Config c = config();
    size_t need = gpu::GPT2::memory_need(c, 2, 16, true).total();
    emu::options().memory_limit = emu::statistics().memory_now + need - 1;
    std::string e = error_of([&] { gpu::GPT2(c, 2, 16, true); });
    CAPTURE(e);
    for (const char* part : {"train_gpt2.cu:", "cudaMalloc", "out of memory", "--batch_size", "--recompute"})
        CHECK(contains(e, part));
    CHECK(!contains(e, "\n"));
    CHECK(gpu::GPT2::memory_available() < need);
    (void)cudaGetLastError();
}

TEST_CASE("GPU model: the file of timed algorithms is kept, used, and repaired if damaged") {
    TempDir cache;
    setenv("XDG_CACHE_HOME", cache.path.c_str(), 1);
    Config c = config(GPT2_ARCH, GELU_TANH, 1, 2);
    { gpu::GPT2 m(c, 2, 16, true); }
    std::string folder = cache / "arapoet", path;
    for (auto& entry : std::filesystem::directory_iterator(folder)) path = entry.path();
    std::string first = read_file(path);
    // 4 layers and the head, each with an algorithm for its forward product and for two gradients; 5 + 1 + 4
    // of these again with an epilogue; and the layers' 4 + 1 + 4 ways, with an epilogue or without
    CHECK(std::count(first.begin(), first.end(), '\n') == 15 + 10 + 9);
    CHECK(contains(path, std::to_string(cublasLtGetVersion())));
    { gpu::GPT2 m(c, 2, 16, true); }
    CHECK(read_file(path) == first);
    // Muon's products: two for the 4 square matrices, three for the 2 wide ones
    { gpu::GPT2 m(c, 2, 16, true, 0, {gpu::BUILD_DTYPE}, {}, MUON); }
    size_t batches = 0;
    const std::string with_muon = read_file(path);
    for (size_t i = 0; (i = with_muon.find(" batch ", i)) != std::string::npos; i++) batches++;
    CHECK(batches == 5);
    // Entries are used without timing: here the emulator's other algorithm, whose workspace is in bytes 8 to
    // 15.
    std::string other, algorithms;
    for (size_t i = 0, end; i < first.size(); i = end + 1) {
        end = first.find('\n', i);
        std::string line = first.substr(i, end - i + 1);
        if (contains(line, " way of ")) {
            other += line;
            continue;
        }
        algorithms += line;
        other += line.substr(0, 16) +
                 (line.substr(16, 16) == std::string(16, '0') ? "0000100000000000" : std::string(16, '0')) +
                 line.substr(32);
    }
    write_file(path, other);
    { gpu::GPT2 m(c, 2, 16, true); }
    CHECK(read_file(path) == other);
    // Damaged entries are timed again, and the file is complete afterwards. (Where the way is known, only
    // what it needs is timed; so these files lack the ways.)
    first = algorithms;
    const std::string first_bytes = first.substr(0, 4);
    auto products = [&](const std::string& text) {
        std::set<std::string> names;
        for (size_t i = 0, end; i < text.size(); i = end + 1) {
            end = text.find('\n', i);
            std::string hex = text.substr(i, text.find(' ', i) - i);
            if (hex.size() == 2 * sizeof(cublasLtMatmulAlgo_t) && hex.compare(0, 4, first_bytes) == 0)
                names.insert(text.substr(i + hex.size(), end - i - hex.size()));
        }
        return names;
    };
    for (std::string damaged :
         {"zz" + first.substr(2), first.substr(0, 40), "\n \n" + first.substr(first.find('\n') + 1),
          std::string(128, 'f') + first.substr(128)}) {
        write_file(path, damaged);
        { gpu::GPT2 m(c, 2, 16, true); }
        CHECK(products(read_file(path)) == products(first));
    }
    setenv("XDG_CACHE_HOME", cache_folder.dir.path.c_str(), 1);
}
#endif

TEST_CASE("GPU model: state is read and written unchanged, and initial weights are the CPU's") {
    Config c = config();
    cpu::GPT2 want(c, 1, 8, true);
    want.init_weights(77);
    Values weights = get_state(want, PARAMS), m(num_params(c)), v(num_params(c));
    std::iota(m.begin(), m.end(), -5.0f), std::iota(v.begin(), v.end(), 3.0f);
    for (bool master : {true, false}) {
        gpu::GPT2 got(c, 1, 8, true, 0, {gpu::BUILD_DTYPE, master});
        got.init_weights(77);
        CHECK(same_bits(get_state(got, PARAMS), master ? weights : rounded(weights)));
        set_state(got, ADAM_M, m), set_state(got, ADAM_V, v);
        CHECK(same_bits(get_state(got, ADAM_M), m));
        CHECK(same_bits(get_state(got, ADAM_V), v));
        set_state(got, PARAMS, v);
        CHECK(same_bits(get_state(got, PARAMS), master ? v : rounded(v)));
    }
    gpu::GPT2 sampler(c, 0, 0, false);
    sampler.init_weights(77);
    CHECK(same_bits(get_state(sampler, PARAMS), rounded(weights)));
}

TEST_CASE("GPU model: a tensor larger than the pinned memory is read and written in pieces") {
    Config c = config(GPT2_ARCH, GELU_TANH, 1, 3, 32, 50257, 8);
    REQUIRE((size_t)c.Vp * c.C > gpu::GPT2::PIECE);
    gpu::GPT2 got(c, 0, 0, false);
    cpu::GPT2 want(c, 0, 0, false);
    got.init_weights(78), want.init_weights(78);
    Values weights = rounded(get_state(want, PARAMS));
    CHECK(same_bits(get_state(got, PARAMS), weights));
    std::reverse(weights.begin(), weights.end());
    set_state(got, PARAMS, weights);
    CHECK(same_bits(get_state(got, PARAMS), weights));
}

TEST_CASE("GPU model: a run that was stopped and resumed continues bit for bit") {
    Config c = config(GPT2_ARCH, GELU_TANH, 1, 2);
    Data d(4, 2, 16, c.V, 16);
    for (auto [master, optimizer] :
         {std::pair<bool, Optimizer>{true, ADAMW}, {false, ADAMW}, {true, MUON}, {false, MUON}}) {
        if (!BUILT_BF16 && !master) continue;  // the same
        gpu::GPT2 through(c, d.B, d.T, true, 0, {gpu::BUILD_DTYPE, master}, {}, optimizer),
            before(c, d.B, d.T, true, 0, {gpu::BUILD_DTYPE, master}, {}, optimizer),
            after(c, d.B, d.T, true, 0, {gpu::BUILD_DTYPE, master}, {}, optimizer);
        for (auto* m : {&through, &before}) {
            m->seed = 5;
            set_state(*m, PARAMS, random_weights(c, 17));
            for (uint32_t t = 0; t < (m == &through ? 4 : 2); t++)
                accumulate(*m, d, t, 1, t), m->step(settings(), t + 1);
        }
        after.seed = 5;
        set_state(after, PARAMS, get_state(before, PARAMS));
        for (auto& array : optimizer_arrays(optimizer))
            set_state(after, array.state, get_state(before, array.state));
        after.resumed(2);
        for (uint32_t t = 2; t < 4; t++) accumulate(after, d, t, 1, t), after.step(settings(), t + 1);
        CHECK(same_bits(get_state(after, PARAMS), get_state(through, PARAMS)));
        for (auto& array : optimizer_arrays(optimizer))
            CHECK(same_bits(get_state(after, array.state), get_state(through, array.state)));
    }
}

TEST_CASE("GPU model: the CPU and the GPU take over each other's checkpoints of a run with Muon") {
    const Config c = config(GPT2_ARCH, GELU_TANH, 2, 2);
    const Data d(1, 2, 16, c.V, 26);
    gpu::GPT2 first(c, d.B, d.T, true, 0, {gpu::BUILD_DTYPE}, {}, MUON),
        third(c, d.B, d.T, true, 0, {gpu::BUILD_DTYPE}, {}, MUON);
    cpu::GPT2 second(c, d.B, d.T, true, 0, {}, {}, MUON);
    set_state(first, PARAMS, random_weights(c, 27));
    accumulate(first, d, 0, 1, 0), first.step(settings(), 1);
    TempDir dir;
    auto hand_over = [&](auto& from, auto& to) {
        trainer::save_model(from, dir / "model.bin");
        trainer::save_state(from, {}, "", dir / "state.bin");
        ModelReader model(dir / "model.bin");
        trainer::StateReader state(dir / "state.bin");
        const uint64_t checksum = trainer::load_model(to, model);
        state.load_moments(to, checksum);
    };
    hand_over(first, second), hand_over(second, third);
    for (State s : {PARAMS, MUON_M, ADAM_M, ADAM_V}) {
        const Values want = get_state(first, s);
        CHECK(!same_bits(want, Values(want.size())));
        CHECK(same_bits(get_state(second, s), want));
        CHECK(same_bits(get_state(third, s), want));
    }
    const size_t matrices = get_state(first, MUON_M).size();
    CHECK(matrices == 2 * 12 * (size_t)c.C * c.C);
    CHECK(get_state(first, ADAM_M).size() + matrices == num_params(c));
}

TEST_CASE("GPU model: a step whose gradient or loss is not finite does not change the model") {
    Config c = config(GPT2_ARCH, GELU_TANH, 1, 2);
    Data d(1, 2, 16, c.V, 18);
    for (Optimizer optimizer : {ADAMW, MUON}) {
        gpu::GPT2 m(c, d.B, d.T, true, 0, {gpu::BUILD_DTYPE}, {}, optimizer);
        Values weights = random_weights(c, 19);
        weights[param_offsets(c)[LNFB]] = INFINITY;
        set_state(m, PARAMS, weights);
        accumulate(m, d, 0, 1, 0);
        CHECK(!m.step(settings(), 1).finite());
        CHECK(same_bits(get_state(m, PARAMS), weights));
        for (auto& array : optimizer_arrays(optimizer)) {
            const Values x = get_state(m, array.state);
            CHECK(same_bits(x, Values(x.size())));
        }
        set_state(m, PARAMS, random_weights(c, 19));  // the next step is not affected
        accumulate(m, d, 0, 1, 0);
        CHECK(m.step(settings(), 1).finite());
    }
}

TEST_CASE("GPU decoder: logits are the CPU's for prompts of any length, and agree with forward") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH}) {
        Config c = config(arch, arch == GROVER_ARCH ? GELU_ERF : GELU_TANH, 2, 2,
                          arch == GROVER_ARCH ? 48 : 32, 130, 80);
        size_t N = 2, T = 72;
        gpu::GPT2 model(c, 0, 0, false), whole(c, N, T, false);
        cpu::GPT2 reference(c, 0, 0, false);
        Values weights = random_weights(c, 20);
        set_state(model, PARAMS, weights), set_state(whole, PARAMS, weights);
        set_state(reference, PARAMS, weights);
        gpu::Decoder got(model, N, 1000);
        cpu::Decoder want(reference, N, 1000);
        CHECK(got.capacity() == 80);
        Data d(1, N, T, c.V, 21);
        double loss = 0;
        size_t at = 0, counted = 0;
        for (size_t n : {(size_t)68, (size_t)1, (size_t)1, (size_t)2}) {
            Tokens tokens;
            for (size_t s = 0; s < N; s++)
                tokens.insert(tokens.end(), &d.x[0][s * T + at], &d.x[0][s * T + at] + n);
            const float *a = got.append_to_all(tokens.data(), n), *b = want.append_to_all(tokens.data(), n);
            check_close("decoder: logits", a, b, N * (size_t)c.V, ALLOWED.logits);
            at += n;
            CHECK(got.length() == at);
            for (size_t s = 0; s < N; s++) {  // the loss at this position
                double sum = 0;
                const float* l = a + s * (size_t)c.V;
                for (int v = 0; v < c.V; v++) sum += std::exp((double)l[v]);
                int& target = d.y[0][s * T + at - 1];
                target = std::max(target, 0);
                loss += std::log(sum) - l[target], counted++;
            }
        }
        // The forward pass counts the same positions only.
        std::vector<size_t> positions = {67, 68, 69, 71};
        for (size_t m = 0; m < N * T; m++)
            if (std::find(positions.begin(), positions.end(), m % T) == positions.end()) d.y[0][m] = -1;
        double mean = loss / (double)counted, forward = whole.forward(d.x[0].data(), d.y[0].data(), N, T);
        CHECK(whole.counted() == counted);
        check_close("decoder: loss against the forward pass", &mean, &forward, 1, BUILT_BF16 ? 5e-3 : 1e-5);
        // Sequences of different lengths, side by side and alone
        got.truncate(0, 60), want.truncate(0, 60), got.truncate(1, 33), want.truncate(1, 33);
        for (std::vector<size_t> which : {std::vector<size_t>{1}, {1, 0}, {0, 1}, {0}})
            for (size_t n : {(size_t)1, (size_t)2}) {
                Tokens tokens(which.size() * n, (int)(at + n) % c.V);
                check_close("decoder: logits", got.append(which, tokens.data(), n),
                            want.append(which, tokens.data(), n), which.size() * (size_t)c.V, ALLOWED.logits);
            }
        got.reset(), want.reset();
        Tokens two = {5, 9};
        check_close("decoder: logits", got.append_to_all(two.data(), 1), want.append_to_all(two.data(), 1),
                    N * (size_t)c.V, ALLOWED.logits);
    }
}

TEST_CASE("GPU model: sizes without a kernel are refused by name before any allocation") {
    auto refused = [](Config c, size_t T, std::initializer_list<const char*> parts) {
        for (int which : {0, 1}) {
            std::string e = error_of([&] {
                if (which) gpu::GPT2(c, 1, T, true);
                else gpu::GPT2::memory_need(c, 1, T, true);
            });
            CAPTURE(e);
            for (const char* part : parts) CHECK(contains(e, part));
        }
    };
#ifdef EMULATOR
    size_t before = emu::statistics().memory_peak;
#endif
    refused(config(GPT2_ARCH, GELU_TANH, 1, 2, 40), 8,
            {"head size", "40", "32, 48, 64, 80, 96, 128", "./train_gpt2"});
    refused(config(GPT2_ARCH, GELU_TANH, 1, 100, 128), 8, {"C is 12800", "12288"});
    refused(config(), 25, {"24 tokens", "25"});
    Config c = config();
    c.Vp = c.V + 1;
    refused(c, 8, {"Vp is 302", "multiple of 8"});
    std::string e = error_of([] { gpu::GPT2::check_precision({BUILT_BF16 ? FP32 : BF16}); });
    CHECK(contains(e, BUILT_BF16 ? "PRECISION=FP32" : "PRECISION=BF16"));
    CHECK(contains(e, "make train_gpt2cu"));
#ifdef EMULATOR
    CHECK(emu::statistics().memory_peak == before);
#endif
}

}  // namespace
