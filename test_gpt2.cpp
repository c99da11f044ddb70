// test_gpt2.cpp - the CPU model, its files, optimizer and sampler, held against plain double-precision mathematics.
//
// `namespace ref` is a second model, written from the definitions: each operation knows its value and how a gradient
// passes through it, in plain loops over doubles, and a tape runs them backwards. Finite differences verify it, and
// train_gpt2.cpp is compared with it layer by layer and as a whole. Tensors are compared by relative L2 error; the
// largest one of each kind is printed at the end.
//
// The other test files are linked into this program. Its last line is "N passed, N failed[, N skipped]".
#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <sys/resource.h>

#include <map>
#include <numeric>
#include <random>

#include "dev/test_util.h"
#include "train_gpt2.cpp"
#include "trainer.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Tokens = std::vector<int>;

// ---------------------------------------------------------------------------------------------
// Helpers: random data, comparing, threads

struct Random {
    std::mt19937_64 engine;
    explicit Random(uint64_t seed) : engine(seed) {}
    double uniform() { return (double)(engine() >> 11) * 0x1p-53; }
    double normal() { return std::normal_distribution<double>()(engine); }
    size_t below(size_t n) { return engine() % n; }
    size_t among(std::initializer_list<size_t> list) { return list.begin()[below(list.size())]; }
    Floats floats(size_t n, double scale = 1, double mean = 0) {
        Floats x(n);
        for (float& f : x) f = (float)(mean + scale * normal());
        return x;
    }
    Tokens tokens(size_t n, int V) {
        Tokens x(n);
        for (int& t : x) t = (int)below((size_t)V);
        return x;
    }
    // As tokens(), but about one in seven is -1, which means "ignore".
    Tokens targets(size_t n, int V) {
        Tokens x = tokens(n, V);
        for (int& t : x)
            if (below(7) == 0) t = -1;
        x[0] = (int)below((size_t)V);
        return x;
    }
};

template <class A, class B>
double relative_l2(const A* got, const B* want, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)got[i] - (double)want[i];
        diff += d * d, norm += (double)want[i] * (double)want[i];
    }
    return std::sqrt(diff) / std::max(std::sqrt(norm), 1e-30);  // where all of `want` is 0, only 0 will do
}

// The largest error of each kind, for the table at the end.
struct Worst {
    double error = 0, tolerance = 0;
};
std::map<std::string, Worst> worst_errors;

void note(const std::string& kind, double error, double tolerance) {
    Worst& w = worst_errors[kind];
    if (error >= w.error || error != error) w = {error, tolerance};
}

// Fails unless the relative L2 error is within the tolerance. `what` is "kind: tensor".
template <class A, class B>
void check_close(const std::string& what, const A* got, const B* want, size_t n, double tolerance) {
    double error = relative_l2(got, want, n);
    note(what.substr(0, what.find(':')), error, tolerance);
    CHECK_MESSAGE(error <= tolerance, what, ": relative L2 error ", error, ", wanted at most ", tolerance);
}
void check_close(const std::string& what, const Floats& got, const Doubles& want, double tolerance) {
    REQUIRE(got.size() == want.size());
    check_close(what, got.data(), want.data(), got.size(), tolerance);
}
void check_close(const std::string& what, double got, double want, double tolerance) {
    check_close(what, &got, &want, 1, tolerance);
}

bool same_bits(const Floats& a, const Floats& b) {
    return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(float));
}

// Sets the number of threads and restores it at the end.
struct Threads {
    int before = omp_get_max_threads();
    explicit Threads(int n) { omp_set_num_threads(n); }
    ~Threads() { omp_set_num_threads(before); }
};

cpu::Dropout dropout_of(float p, rng::Stream site = rng::ATTPROJ_DROPOUT) {
    return {p, rng::Key(20261123, 5, site, 2)};
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// The reference: operations in double precision, and a tape that runs them backwards

namespace {
namespace ref {

// A value and the gradient of the loss with respect to it.
struct Tensor {
    Doubles v, d;
};
using Ref = std::shared_ptr<Tensor>;

Ref tensor(size_t n) {
    Ref t = std::make_shared<Tensor>();
    t->v.resize(n), t->d.resize(n);
    return t;
}
Ref tensor(const float* x, size_t n) {
    Ref t = tensor(n);
    std::copy(x, x + n, t->v.begin());
    return t;
}
Ref tensor(const Floats& x) { return tensor(x.data(), x.size()); }

// Dropout's factors of elements e0.. straight from the random numbers.
Doubles dropout_factors(const rng::Key& key, uint64_t e0, size_t n, float p) {
    Doubles f(n);
    for (size_t i = 0; i < n; i++) f[i] = (double)key.u32(e0 + i) < (double)p * 0x1p32 ? 0.0 : 1.0 / (1.0 - (double)p);
    return f;
}

double gelu(double x, int activation) {
    if (activation == GELU_ERF) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
double gelu_derivative(double x, int activation) {
    if (activation == GELU_ERF)
        return 0.5 * (1 + std::erf(x / std::sqrt(2.0))) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
    double t = std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}

class Tape {
  public:
    // Runs all operations backwards; the gradient of the last output has been set.
    void backward() {
        for (size_t i = steps_.size(); i-- > 0;) steps_[i]();
    }

    Ref add(Ref a, Ref b) {
        Ref y = tensor(a->v.size());
        for (size_t i = 0; i < y->v.size(); i++) y->v[i] = a->v[i] + b->v[i];
        steps_.push_back([=] {
            for (size_t i = 0; i < y->v.size(); i++) a->d[i] += y->d[i], b->d[i] += y->d[i];
        });
        return y;
    }

    // y = x * factor by element; no factors: y is x.
    Ref times(Ref x, const Doubles& factor) {
        if (factor.empty()) return x;
        Ref y = tensor(x->v.size());
        for (size_t i = 0; i < y->v.size(); i++) y->v[i] = x->v[i] * factor[i];
        steps_.push_back([=] {
            for (size_t i = 0; i < y->v.size(); i++) x->d[i] += y->d[i] * factor[i];
        });
        return y;
    }

    // y (M,C): row m is wte[tokens[m]] + wpe[m % T].
    Ref embedding(Ref wte, Ref wpe, const Tokens& tokens, size_t T, size_t C) {
        Ref y = tensor(tokens.size() * C);
        for (size_t i = 0; i < y->v.size(); i++)
            y->v[i] = wte->v[(size_t)tokens[i / C] * C + i % C] + wpe->v[i / C % T * C + i % C];
        steps_.push_back([=] {
            for (size_t i = 0; i < y->v.size(); i++) {
                wte->d[(size_t)tokens[i / C] * C + i % C] += y->d[i];
                wpe->d[i / C % T * C + i % C] += y->d[i];
            }
        });
        return y;
    }

    // y (M,N) = x (M,K) w^T + b, of w the first N rows; b may be null.
    Ref linear(Ref x, Ref w, Ref b, size_t K, size_t N) {
        size_t M = x->v.size() / K;
        Ref y = tensor(M * N);
        for (size_t m = 0; m < M; m++)
            for (size_t n = 0; n < N; n++) {
                double sum = b ? b->v[n] : 0;
                for (size_t k = 0; k < K; k++) sum += x->v[m * K + k] * w->v[n * K + k];
                y->v[m * N + n] = sum;
            }
        steps_.push_back([=] {
            for (size_t m = 0; m < M; m++)
                for (size_t n = 0; n < N; n++) {
                    double d = y->d[m * N + n];
                    if (b) b->d[n] += d;
                    for (size_t k = 0; k < K; k++) x->d[m * K + k] += d * w->v[n * K + k], w->d[n * K + k] += d * x->v[m * K + k];
                }
        });
        return y;
    }

    // y = (x - mean) / sqrt(variance + 1e-5) * w + b over rows of C; backward by the full Jacobian.
    Ref layernorm(Ref x, Ref w, Ref b, size_t C) {
        size_t M = x->v.size() / C;
        Ref y = tensor(M * C);
        Doubles centred(M * C), sigma(M);
        for (size_t m = 0; m < M; m++) {
            double mean = 0, variance = 0;
            for (size_t c = 0; c < C; c++) mean += x->v[m * C + c] / (double)C;
            for (size_t c = 0; c < C; c++) centred[m * C + c] = x->v[m * C + c] - mean;
            for (size_t c = 0; c < C; c++) variance += centred[m * C + c] * centred[m * C + c] / (double)C;
            sigma[m] = std::sqrt(variance + 1e-5);
            for (size_t c = 0; c < C; c++) y->v[m * C + c] = centred[m * C + c] / sigma[m] * w->v[c] + b->v[c];
        }
        steps_.push_back([=] {
            for (size_t m = 0; m < M; m++) {
                const double *u = &centred[m * C], s = sigma[m];
                for (size_t j = 0; j < C; j++) {
                    double d = y->d[m * C + j];
                    w->d[j] += d * u[j] / s, b->d[j] += d;
                    for (size_t i = 0; i < C; i++)
                        x->d[m * C + i] += d * w->v[j] * (((i == j) - 1 / (double)C) / s - u[i] * u[j] / ((double)C * s * s * s));
                }
            }
        });
        return y;
    }

    Ref gelu(Ref x, int activation) {
        Ref y = tensor(x->v.size());
        for (size_t i = 0; i < y->v.size(); i++) y->v[i] = ref::gelu(x->v[i], activation);
        steps_.push_back([=] {
            for (size_t i = 0; i < y->v.size(); i++) x->d[i] += y->d[i] * gelu_derivative(x->v[i], activation);
        });
        return y;
    }

    // y (B,T,C) from qkv (B,T,3C): softmax over the past of q k / sqrt(hs), times factor (B,NH,T,T) where there
    // is one, times v. The softmax is passed backwards by its full Jacobian. lse (B,NH,T), if wanted.
    Ref attention(Ref qkv, size_t T, size_t C, size_t NH, const Doubles& factor, Doubles* lse = nullptr) {
        size_t B = qkv->v.size() / (3 * T * C), hs = C / NH;
        Ref y = tensor(B * T * C);
        Doubles prob(B * NH * T * T);
        if (lse) lse->resize(B * NH * T);
        auto at = [=](size_t b, size_t t, size_t h, size_t which) { return ((b * T + t) * 3 + which) * C + h * hs; };
        for (size_t b = 0; b < B; b++)
            for (size_t h = 0; h < NH; h++)
                for (size_t t = 0; t < T; t++) {
                    size_t row = ((b * NH + h) * T + t) * T;
                    double max = -INFINITY, sum = 0;
                    for (size_t j = 0; j <= t; j++) {
                        double dot = 0;
                        for (size_t i = 0; i < hs; i++) dot += qkv->v[at(b, t, h, 0) + i] * qkv->v[at(b, j, h, 1) + i];
                        prob[row + j] = dot / std::sqrt((double)hs), max = std::max(max, prob[row + j]);
                    }
                    for (size_t j = 0; j <= t; j++) sum += prob[row + j] = std::exp(prob[row + j] - max);
                    for (size_t j = 0; j <= t; j++) {
                        prob[row + j] /= sum;
                        double weight = prob[row + j] * (factor.empty() ? 1 : factor[row + j]);
                        for (size_t i = 0; i < hs; i++) y->v[(b * T + t) * C + h * hs + i] += weight * qkv->v[at(b, j, h, 2) + i];
                    }
                    if (lse) (*lse)[row / T] = max + std::log(sum);
                }
        steps_.push_back([=] {
            Doubles dp(T);
            for (size_t b = 0; b < B; b++)
                for (size_t h = 0; h < NH; h++)
                    for (size_t t = 0; t < T; t++) {
                        const double *p = &prob[((b * NH + h) * T + t) * T], *d = &y->d[(b * T + t) * C + h * hs];
                        for (size_t j = 0; j <= t; j++) {
                            double f = factor.empty() ? 1 : factor[((b * NH + h) * T + t) * T + j];
                            dp[j] = 0;
                            for (size_t i = 0; i < hs; i++) {
                                dp[j] += d[i] * f * qkv->v[at(b, j, h, 2) + i];
                                qkv->d[at(b, j, h, 2) + i] += d[i] * f * p[j];
                            }
                        }
                        for (size_t j = 0; j <= t; j++) {
                            double ds = 0;
                            for (size_t i = 0; i <= t; i++) ds += dp[i] * p[i] * ((i == j) - p[j]);
                            ds /= std::sqrt((double)hs);
                            for (size_t i = 0; i < hs; i++) {
                                qkv->d[at(b, t, h, 0) + i] += ds * qkv->v[at(b, j, h, 1) + i];
                                qkv->d[at(b, j, h, 1) + i] += ds * qkv->v[at(b, t, h, 0) + i];
                            }
                        }
                    }
        });
        return y;
    }

    // losses (M) = -log softmax(logits)[target], 0 where the target is negative.
    Ref cross_entropy(Ref logits, const Tokens& targets, size_t V) {
        size_t M = targets.size();
        Ref y = tensor(M);
        Doubles prob(M * V);
        for (size_t m = 0; m < M; m++) {
            const double* x = &logits->v[m * V];
            double max = *std::max_element(x, x + V), sum = 0;
            for (size_t v = 0; v < V; v++) sum += std::exp(x[v] - max);
            for (size_t v = 0; v < V; v++) prob[m * V + v] = std::exp(x[v] - max) / sum;
            if (targets[m] >= 0) y->v[m] = max + std::log(sum) - x[targets[m]];
        }
        steps_.push_back([=] {
            for (size_t m = 0; m < M; m++)
                for (size_t v = 0; v < V && targets[m] >= 0; v++)
                    logits->d[m * V + v] += y->d[m] * (prob[m * V + v] - ((size_t)targets[m] == v));
        });
        return y;
    }

  private:
    std::vector<std::function<void()>> steps_;
};

// The whole model with the weights of a cpu::GPT2.
class Model {
  public:
    Config cfg;
    float dropout;
    uint64_t seed;
    std::vector<std::vector<Ref>> w;  // [ParamId][layer]

    explicit Model(cpu::GPT2& m) : cfg(m.cfg), dropout(m.dropout), seed(m.seed) {
        const float* p = m.params();
        for (const ParamInfo& info : param_table(cfg)) {
            w.emplace_back();
            for (size_t l = 0; l < info.layers; l++, p += info.per_layer()) w.back().push_back(tensor(p, info.per_layer()));
        }
    }

    // The mean loss; a training pass leaves the gradients in w[..]->d too (adding to what is there).
    double loss(const Tokens& tokens, const Tokens& targets, size_t B, size_t T, const Pass& pass, bool with_gradient) {
        size_t C = (size_t)cfg.C, NH = (size_t)cfg.NH, L = (size_t)cfg.L, M = B * T;
        Tape tape;
        auto drop = [&](Ref x, rng::Stream site, size_t l) {
            return tape.times(x, factors(pass, site, l, pass.seq0 * T * C, M * C));
        };
        auto norm = [&](Ref x, int weight, int bias, size_t l) { return tape.layernorm(x, w[weight][l], w[bias][l], C); };
        auto attention = [&](Ref x, size_t l) {
            Ref qkv = tape.linear(x, w[QKVW][l], w[QKVB][l], C, 3 * C);
            Ref y = tape.attention(qkv, T, C, NH, factors(pass, rng::ATT_DROPOUT, l, pass.seq0 * NH * T * T, B * NH * T * T));
            return drop(tape.linear(y, w[ATTPROJW][l], w[ATTPROJB][l], C, C), rng::ATTPROJ_DROPOUT, l);
        };
        auto mlp = [&](Ref x, size_t l) {
            Ref h = tape.gelu(tape.linear(x, w[FCW][l], w[FCB][l], C, 4 * C), cfg.activation);
            return drop(tape.linear(h, w[FCPROJW][l], w[FCPROJB][l], 4 * C, C), rng::FCPROJ_DROPOUT, l);
        };
        Ref x = drop(tape.embedding(w[WTE][0], w[WPE][0], tokens, T, C), rng::EMB_DROPOUT, 0), last;
        if (cfg.arch == GPT2_ARCH) {
            for (size_t l = 0; l < L; l++) {
                x = tape.add(x, attention(norm(x, LN1W, LN1B, l), l));
                x = tape.add(x, mlp(norm(x, LN2W, LN2B, l), l));
            }
            last = norm(x, LNFW, LNFB, 0);
        } else {  // GROVER: a LayerNorm after the embedding and after each block, none before the attention
            Ref h = norm(x, LN1W, LN1B, 0);
            for (size_t l = 0; l < L; l++) {
                Ref r = tape.add(h, attention(h, l));
                x = tape.add(r, mlp(norm(r, LN2W, LN2B, l), l));
                h = l + 1 < L ? norm(x, LN1W, LN1B, l + 1) : norm(x, LNFW, LNFB, 0);
            }
            last = h;
        }
        Ref out = tape.linear(last, w[WTE][0], nullptr, C, (size_t)cfg.V);
        Ref losses = tape.cross_entropy(out, targets, (size_t)cfg.V);
        logits = out->v;
        double sum = 0, counted = 0;
        for (size_t m = 0; m < M; m++) sum += losses->v[m], counted += targets[m] >= 0;
        if (with_gradient) {
            for (size_t m = 0; m < M; m++) losses->d[m] = (double)pass.grad_scale;
            tape.backward();
        }
        return sum / counted;
    }
    Doubles logits;  // (M,V) of the last loss()

    Doubles gradient(int id) const {
        Doubles g;
        for (const Ref& layer : w[id]) g.insert(g.end(), layer->d.begin(), layer->d.end());
        return g;
    }

  private:
    Doubles factors(const Pass& pass, rng::Stream site, size_t layer, uint64_t e0, size_t n) const {
        if (!pass.train || dropout == 0) return {};
        return dropout_factors(rng::Key(seed, pass.step, site, (uint32_t)layer), e0, n, dropout);
    }
};

}  // namespace ref

// ---------------------------------------------------------------------------------------------
// Helpers: models to test with

Config config(int L, int NH, int C, int V, int maxT, int arch = GPT2_ARCH, int activation = GELU_TANH) {
    Config c;
    c.L = L, c.NH = NH, c.C = C, c.V = V, c.Vp = pad_vocab(V), c.maxT = maxT, c.arch = arch, c.activation = activation;
    return c;
}

// Weights as if trained: nothing is zero or one, so that every gradient matters. Padded rows stay zero.
void randomise(cpu::GPT2& m, uint64_t seed) {
    Random r(seed);
    ParamTable table = param_table(m.cfg);
    auto off = param_offsets(m.cfg);
    for (int i = 0; i < NUM_PARAMS; i++) {
        bool weight = i == LN1W || i == LN2W || i == LNFW, embedding = i == WTE || i == WPE;
        double scale = !table[i].decay ? 0.3 : embedding ? 0.4 : 2 / std::sqrt((double)m.cfg.C) * (i == QKVW ? 1 : 0.5);
        Floats w = r.floats(i == WTE ? (size_t)m.cfg.V * table[i].cols : table[i].size(), scale, weight ? 1 : 0);
        std::copy(w.begin(), w.end(), m.params() + off[i]);
    }
}

Floats gradients(cpu::GPT2& m) { return Floats(m.grads(), m.grads() + num_params(m.cfg)); }
Floats parameters(cpu::GPT2& m) { return Floats(m.params(), m.params() + num_params(m.cfg)); }
Floats piece(cpu::GPT2& m, cpu::GPT2::State s) {
    Floats out;
    m.each_piece(s, [&](const float* x, size_t n) { out.insert(out.end(), x, x + n); });
    return out;
}

// A training pass over tokens of which `counted` are targets.
Pass training_pass(size_t counted, uint32_t step = 3, uint64_t seq0 = 0) {
    Pass pass;
    pass.train = true, pass.step = step, pass.seq0 = seq0, pass.grad_scale = 1.0f / (float)counted;
    return pass;
}
size_t count_targets(const Tokens& y) {
    return (size_t)std::count_if(y.begin(), y.end(), [](int t) { return t >= 0; });
}

}  // namespace

// ---------------------------------------------------------------------------------------------
// The program: runs the tests, counts them by case, and ends with one line

namespace {

struct Counter : doctest::IReporter {
    static inline unsigned run = 0, failed = 0, skipped = 0;
    const doctest::TestCaseData* current = nullptr;

    explicit Counter(const doctest::ContextOptions&) {}
    void test_case_start(const doctest::TestCaseData& test) override { current = &test, skip_reason.clear(); }
    void test_case_end(const doctest::CurrentTestCaseStats& stats) override {
        if (skip_reason.empty() || stats.failure_flags) return;
        skipped++;
        printf("skipped: %s: %s\n", current->m_name, skip_reason.c_str());
        fflush(stdout);
    }
    void test_run_end(const doctest::TestRunStats& stats) override {
        run = stats.numTestCasesPassingFilters, failed = stats.numTestCasesFailed;
    }
    void report_query(const doctest::QueryData&) override {}
    void test_run_start() override {}
    void test_case_reenter(const doctest::TestCaseData&) override {}
    void test_case_exception(const doctest::TestCaseException&) override {}
    void subcase_start(const doctest::SubcaseSignature&) override {}
    void subcase_end() override {}
    void log_assert(const doctest::AssertData&) override {}
    void log_message(const doctest::MessageData&) override {}
    void test_case_skipped(const doctest::TestCaseData&) override {}
};
DOCTEST_REGISTER_LISTENER("counter", 1, Counter);

}  // namespace

int main(int argc, char** argv) {
    doctest::Context context(argc, argv);
    int rc = context.run();
    if (context.shouldExit()) return rc;  // --help, --list-test-cases
    if (!worst_errors.empty()) printf("largest errors (relative L2 where nothing else is said), and what is allowed:\n");
    for (auto& [kind, w] : worst_errors) printf("  %-44s %.1e of %.0e\n", kind.c_str(), w.error, w.tolerance);
    printf("%u passed, %u failed", Counter::run - Counter::failed - Counter::skipped, Counter::failed);
    if (Counter::skipped) printf(", %u skipped", Counter::skipped);
    printf("\n");
    return rc;
}

// ---------------------------------------------------------------------------------------------
// Random numbers

TEST_CASE("philox gives the known answers of the Random123 distribution") {
    struct {
        uint32_t key[2], counter[4], want[4];
    } known[] = {{{0, 0}, {0, 0, 0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
                 {{~0u, ~0u}, {~0u, ~0u, ~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
                 {{0xa4093822, 0x299f31d0},
                  {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
                  {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}};
    for (auto& k : known) {
        rng::Block b = rng::philox(k.key[0], k.key[1], k.counter[0], k.counter[1], k.counter[2], k.counter[3]);
        for (int i = 0; i < 4; i++) CHECK(b.w[i] == k.want[i]);
    }
}

TEST_CASE("a key's numbers are philox blocks keyed by the seed and counted by (element / 4, step, stream and layer)") {
    uint64_t seed = 0x0123456789abcdef, e = ((uint64_t)7 << 34) + 5;
    rng::Key key(seed, 42, rng::ATTPROJ_DROPOUT, 3);
    for (uint64_t i = 0; i < 9; i++) {
        uint64_t block = (e + i) / 4;
        rng::Block b = rng::philox(0x89abcdef, 0x01234567, (uint32_t)block, (uint32_t)(block >> 32), 42,
                                   (uint32_t)rng::ATTPROJ_DROPOUT << 16 | 3);
        CHECK(key.u32(e + i) == b.w[(e + i) % 4]);
    }
    CHECK(rng::Key(1, 0, rng::INIT).u32(0) != rng::Key(2, 0, rng::INIT).u32(0));
    CHECK(rng::Key(1, 0, rng::INIT).u32(0) != rng::Key(1, 1, rng::INIT).u32(0));
    CHECK(rng::Key(1, 0, rng::INIT).u32(0) != rng::Key(1, 0, rng::SPLIT).u32(0));
    CHECK(rng::Key(1, 0, rng::INIT, 0).u32(0) != rng::Key(1, 0, rng::INIT, 1).u32(0));
}

TEST_CASE("uniform and normal numbers have the moments of their distributions") {
    rng::Key key(99, 0, rng::SAMPLE);
    const size_t n = 200000;
    double u1 = 0, u2 = 0, m[5] = {}, low = 1, high = 0;
    for (size_t i = 0; i < n; i++) {
        double u = key.uniform(i), z = key.normal(i + n), power = 1;
        u1 += u / n, u2 += u * u / n, low = std::min(low, u), high = std::max(high, u);
        for (double& sum : m) sum += power / n, power *= z;
    }
    // Bounds of about five standard errors.
    CHECK(low >= 0);
    CHECK(high < 1);
    CHECK(low < 1e-4);
    CHECK(high > 1 - 1e-4);
    CHECK(std::fabs(u1 - 0.5) < 0.0033);
    CHECK(std::fabs(u2 - 1.0 / 3) < 0.0034);
    CHECK(std::fabs(m[1]) < 0.012);
    CHECK(std::fabs(m[2] - 1) < 0.016);
    CHECK(std::fabs(m[3]) < 0.045);
    CHECK(std::fabs(m[4] - 3) < 0.11);
}

TEST_CASE("shuffle gives every permutation equally often, and the same one for the same key") {
    std::map<std::vector<int>, int> seen;
    const int trials = 24000;
    for (int seed = 0; seed < trials; seed++) {
        std::vector<int> a = {0, 1, 2, 3};
        rng::shuffle(a.data(), 4, rng::Key((uint64_t)seed, 1, rng::SHUFFLE));
        seen[a]++;
    }
    CHECK(seen.size() == 24);  // only permutations, and all of them
    for (auto& [order, times] : seen) {
        CHECK(std::is_permutation(order.begin(), order.end(), std::vector<int>{0, 1, 2, 3}.begin()));
        CHECK(std::abs(times - trials / 24) < 160);  // five standard errors
    }
    std::vector<int> a(1001), b(1001);
    std::iota(a.begin(), a.end(), 0), std::iota(b.begin(), b.end(), 0);
    rng::shuffle(a.data(), a.size(), rng::Key(7, 3, rng::SHUFFLE)), rng::shuffle(b.data(), b.size(), rng::Key(7, 3, rng::SHUFFLE));
    CHECK(a == b);
    std::sort(b.begin(), b.end());
    for (int i = 0; i < 1001; i++) CHECK(b[(size_t)i] == i);
    rng::shuffle(a.data(), 0, rng::Key(7, 3, rng::SHUFFLE));  // nothing to do is no error
}

// ---------------------------------------------------------------------------------------------
// Numbers

TEST_CASE("exp_approx is e^x within 2e-7, clamped outside [-87, 88], and keeps NaN") {
    double worst = 0;
    for (int i = 0; i <= 1750000; i++) {
        float x = -87.0f + (float)i * 1e-4f;
        if (x > 88.0f) break;
        double want = std::exp((double)x);
        worst = std::max(worst, std::fabs((double)cpu::exp_approx(x) - want) / want);
    }
    note("exp_approx (largest relative)", worst, 2e-7);
    CHECK(worst <= 2e-7);
    CHECK(cpu::exp_approx(0.0f) == 1.0f);
    CHECK(cpu::exp_approx(-0.0f) == 1.0f);
    CHECK(cpu::exp_approx(-1e30f) == cpu::exp_approx(-87.0f));
    CHECK(cpu::exp_approx(-INFINITY) == cpu::exp_approx(-87.0f));
    CHECK(cpu::exp_approx(INFINITY) == cpu::exp_approx(88.0f));
    CHECK(std::isfinite(cpu::exp_approx(INFINITY)));
    CHECK(std::isnan(cpu::exp_approx(NAN)));
    Floats x(37, NAN), y(37);  // the vector code too
    for (size_t i = 0; i < x.size(); i++) y[i] = cpu::exp_approx(x[i]);
    CHECK(std::all_of(y.begin(), y.end(), [](float f) { return std::isnan(f); }));
}

TEST_CASE("normal_cdf is the normal distribution function within 3e-7, and its density within 1e-7") {
    double worst = 0, worst_density = 0;
    for (int i = -120000; i <= 120000; i++) {
        float x = (float)i * 1e-4f, density;
        double cdf = cpu::normal_cdf(x, &density);
        worst = std::max(worst, std::fabs(cdf - 0.5 * std::erfc(-(double)x / std::sqrt(2.0))));
        worst_density = std::max(worst_density, std::fabs(density - std::exp(-(double)x * x / 2) / std::sqrt(2 * M_PI)));
    }
    note("normal_cdf (largest absolute)", worst, 3e-7);
    note("normal density (largest absolute)", worst_density, 1e-7);
    CHECK(worst <= 3e-7);
    CHECK(worst_density <= 1e-7);
}

TEST_CASE("gelu and its derivative, tanh and erf: relative L2 1e-6, any length, far out, and NaN stays NaN") {
    Random r(1);
    for (int activation : {GELU_TANH, GELU_ERF}) {
        std::string kind = activation == GELU_TANH ? "gelu tanh" : "gelu erf";
        for (size_t n : {1, 2, 7, 8, 9, 31, 1000, 4099}) {
            CAPTURE(n);
            Floats x = r.floats(n, 2), y(n), d = r.floats(n);
            Doubles want(n), want_d(n);
            for (size_t i = 0; i < n; i++) want[i] = ref::gelu(x[i], activation), want_d[i] = d[i] * ref::gelu_derivative(x[i], activation);
            cpu::gelu_forward(y.data(), x.data(), n, activation);
            cpu::gelu_backward(d.data(), x.data(), n, activation);
            check_close(kind + ": forward", y, want, n < 100 ? 1e-5 : 1e-6);  // a short row may be all small values
            check_close(kind + ": backward", d, want_d, n < 100 ? 1e-5 : 1e-6);
        }
        for (float x : {-1e4f, -100.0f, -20.0f, 20.0f, 100.0f, 1e4f}) {
            float y, d = 1;
            cpu::gelu_forward(&y, &x, 1, activation);
            cpu::gelu_backward(&d, &x, 1, activation);
            CHECK(std::fabs(y - std::max(x, 0.0f)) <= 1e-6);
            CHECK(std::fabs(d - (x > 0)) <= 1e-6);
        }
        Floats nan(19, NAN), y(19), d(19, 1.0f);
        cpu::gelu_forward(y.data(), nan.data(), 19, activation);
        cpu::gelu_backward(d.data(), nan.data(), 19, activation);
        for (size_t i = 0; i < 19; i++) CHECK((std::isnan(y[i]) && std::isnan(d[i])));
    }
}

// ---------------------------------------------------------------------------------------------
// The matrix product

namespace {

// A matrix of which element (r, c) stands at r*sr + c*sc.
struct Strided {
    size_t sr, sc;
    Floats data;
    Strided(Random& r, size_t rows, size_t cols, size_t form) {
        if (form == 0) sr = cols, sc = 1;
        else if (form == 1) sr = 1, sc = rows;
        else if (form == 2) sr = cols + 3, sc = 1;  // part of a wider matrix
        else sr = 2 * cols + 1, sc = 2;             // neither stride is 1
        data = r.floats((rows - 1) * sr + (cols - 1) * sc + 1);
    }
    double at(size_t r, size_t c) const { return data[r * sr + c * sc]; }
};

// Runs one product, checks it and what lies beside it, and that the epilogue saw every final value once.
void check_product(Random& r, size_t M, size_t N, size_t K, size_t a_form, size_t b_form, gemm::Start start, bool with_bias, size_t extra) {
    INFO("M ", M, " N ", N, " K ", K, ", forms of A and B ", a_form, " ", b_form, start ? ", accumulated" : "", with_bias ? ", bias" : "");
    Strided A(r, M, K, a_form), B(r, K, N, b_form);
    size_t ldc = N + extra;
    Floats C = r.floats(M * ldc), before = C, bias = r.floats(N), seen(M * N);
    std::vector<int> times(M * N);
    gemm::multiply(M, N, K, A.data.data(), A.sr, A.sc, B.data.data(), B.sr, B.sc, C.data(), ldc, start,
                   with_bias ? bias.data() : nullptr, [&](size_t row, size_t col, size_t n, float* c) {
                       for (size_t i = 0; i < n; i++) times[row * N + col + i]++, seen[row * N + col + i] = c[i], c[i] *= 2;
                   });
    Doubles want(M * N), row(N);
    for (size_t m = 0; m < M; m++) {
        for (size_t n = 0; n < N; n++) row[n] = start == gemm::ACCUMULATE ? (double)before[m * ldc + n] : with_bias ? (double)bias[n] : 0.0;
        for (size_t k = 0; k < K; k++)
            for (size_t n = 0; n < N; n++) row[n] += A.at(m, k) * B.at(k, n);
        std::copy(row.begin(), row.end(), want.begin() + (ptrdiff_t)(m * N));
    }
    size_t not_once = 0, not_kept = 0, beside = 0;
    for (size_t m = 0; m < M; m++)
        for (size_t n = 0; n < ldc; n++) {
            if (n >= N) beside += C[m * ldc + n] != before[m * ldc + n];
            else not_once += times[m * N + n] != 1, not_kept += C[m * ldc + n] != 2 * seen[m * N + n];
        }
    CHECK(not_once == 0);
    CHECK(not_kept == 0);
    CHECK(beside == 0);
    // A short sum can cancel to almost nothing; measure against the terms instead of the sum.
    double diff = 0, norm = 0;
    for (size_t i = 0; i < M * N; i++) diff += std::pow(seen[i] - want[i], 2), norm += want[i] * want[i];
    norm = std::max(norm, (double)(M * N * K));
    double error = std::sqrt(diff / norm);
    note("gemm", error, 2e-6);
    CHECK_MESSAGE(error <= 2e-6, "relative L2 error ", error);
}

}  // namespace

TEST_CASE("gemm: every form of strides, odd sizes, bias or accumulation; the epilogue sees each element once, finished") {
    Random r(2);
    for (size_t trial = 0; trial < 500; trial++) {
        size_t M = r.among({1, 2, 3, 5, 6, 7, 12, 13, 25}), N = r.among({1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, 130});
        size_t K = r.among({1, 2, 3, 4, 5, 7, 16, 48, 97, 255, 256, 257, 300});
        gemm::Start start = r.below(2) ? gemm::ACCUMULATE : gemm::OVERWRITE;
        check_product(r, M, N, K, trial % 4, trial / 4 % 4, start, start == gemm::OVERWRITE && r.below(2), r.below(4));
    }
}

TEST_CASE("gemm: past the borders of a row block, of KC, and of the shared memory in both directions") {
    Random r(3);
    check_product(r, gemm::MC + 1, 33, gemm::KC + 1, 0, 1, gemm::OVERWRITE, true, 0);
    check_product(r, 3 * gemm::MC + 5, 17, 2 * gemm::KC + 3, 1, 0, gemm::ACCUMULATE, false, 1);
    check_product(r, 7, gemm::SHARED_COLUMNS + 4, 2 * gemm::KC + 9, 0, 1, gemm::OVERWRITE, true, 0);  // 2 column and 2 row pieces
    check_product(r, 5, gemm::SHARED_COLUMNS + 4, 2 * gemm::KC + 9, 0, 0, gemm::ACCUMULATE, false, 3);
    check_product(r, 250, 1, 1, 0, 0, gemm::OVERWRITE, true, 0);
    check_product(r, 1, 250, 1, 0, 0, gemm::OVERWRITE, true, 0);
}

TEST_CASE("gemm: an element has the same bits wherever it stands and whatever the number of threads") {
    Random r(4);
    const size_t M = 203, N = 71, K = 300;
    Floats A = r.floats(M * K), B = r.floats(K * N), bias = r.floats(N), want(M * N);
    gemm::multiply(M, N, K, A.data(), K, 1, B.data(), N, 1, want.data(), N, gemm::OVERWRITE, bias.data());
    for (int threads : {1, 2, 3, 4}) {
        Threads guard(threads);
        Floats C(M * N);
        gemm::multiply(M, N, K, A.data(), K, 1, B.data(), N, 1, C.data(), N, gemm::OVERWRITE, bias.data());
        CHECK(same_bits(C, want));
    }
    for (size_t first : {0, 1, 5, 96, 202}) {  // some rows and columns alone
        size_t rows = std::min<size_t>(7, M - first), col = first % 5, cols = N - col - first % 3;
        Floats C(rows * cols);
        gemm::multiply(rows, cols, K, &A[first * K], K, 1, &B[col], N, 1, C.data(), cols, gemm::OVERWRITE, &bias[col]);
        for (size_t i = 0; i < rows; i++) CHECK(!memcmp(&C[i * cols], &want[(first + i) * N + col], cols * sizeof(float)));
    }
}

TEST_CASE("multiply_few: X W^T + b for few rows, any width; a row does not depend on the others") {
    Random r(5);
    for (size_t trial = 0; trial < 80; trial++) {
        size_t M = 1 + r.below(19), N = r.among({1, 2, 3, 17, 65}), K = r.among({1, 2, 31, 32, 33, 63, 64, 100, 257}), ldy = N + r.below(3);
        bool with_bias = r.below(2);
        INFO("M ", M, " N ", N, " K ", K);
        Floats X = r.floats(M * K), W = r.floats(N * K), b = r.floats(N), Y(M * ldy, 7.0f), alone(N);
        gemm::multiply_few(M, N, K, X.data(), W.data(), Y.data(), ldy, with_bias ? b.data() : nullptr);
        size_t row = r.below(M);
        gemm::multiply_few(1, N, K, &X[row * K], W.data(), alone.data(), N, with_bias ? b.data() : nullptr);
        CHECK(!memcmp(alone.data(), &Y[row * ldy], N * sizeof(float)));
        double diff = 0;
        for (size_t m = 0; m < M; m++) {
            for (size_t n = 0; n < N; n++) {
                double want = with_bias ? b[n] : 0;
                for (size_t k = 0; k < K; k++) want += (double)X[m * K + k] * W[n * K + k];
                diff += std::pow(Y[m * ldy + n] - want, 2);
            }
            for (size_t n = N; n < ldy; n++) CHECK(Y[m * ldy + n] == 7.0f);
        }
        double error = std::sqrt(diff / (double)(M * N * K));
        note("multiply_few", error, 1e-6);
        CHECK(error <= 1e-6);
    }
}

TEST_CASE("linear layer, forward and backward, at odd sizes") {
    Random r(6);
    for (size_t trial = 0; trial < 12; trial++) {
        size_t M = r.among({1, 5, 111}), K = r.among({1, 3, 48, 97}), N = r.among({1, 7, 48, 145});
        INFO("M ", M, " K ", K, " N ", N);
        Floats X = r.floats(M * K), W = r.floats(N * K), b = r.floats(N, 3), Y(M * N), dY = r.floats(M * N);
        Floats dX(M * K), dW = r.floats(N * K), db = r.floats(N, 3);
        ref::Tape tape;
        auto x = ref::tensor(X), w = ref::tensor(W), bias = ref::tensor(b), y = tape.linear(x, w, bias, K, N);
        y->d.assign(dY.begin(), dY.end()), w->d.assign(dW.begin(), dW.end()), bias->d.assign(db.begin(), db.end());
        tape.backward();
        cpu::matmul_forward(Y.data(), X.data(), W.data(), b.data(), M, K, N);
        cpu::matmul_backward(dX.data(), dW.data(), db.data(), dY.data(), X.data(), W.data(), M, K, N);
        double tolerance = M == 1 || K == 1 || N == 1 ? 1e-5 : 1e-6;  // a single sum may cancel
        check_close("linear: y", Y, y->v, tolerance);
        check_close("linear: dx", dX, x->d, tolerance);
        check_close("linear: dw", dW, w->d, tolerance);
        check_close("linear: db", db, bias->d, tolerance);
    }
}

// ---------------------------------------------------------------------------------------------
// Layers

TEST_CASE("dropout keeps exactly the elements that the random numbers keep, wherever a piece begins") {
    Random r(7);
    for (float p : {0.1f, 0.2f, 0.5f, 0.99f})
        for (uint64_t e : {(uint64_t)0, (uint64_t)1, (uint64_t)1023, (uint64_t)4099, ((uint64_t)1 << 34) - 7})
            for (size_t n : {1, 3, 4, 1024, 1025, 2500}) {
                cpu::Dropout drop = dropout_of(p);
                Floats x = r.floats(n), y(n), in_place = x;
                Doubles factor = ref::dropout_factors(drop.key, e, n, p);
                drop.apply(y.data(), x.data(), e, n);
                drop.apply(in_place.data(), in_place.data(), e, n);
                size_t wrong = 0;
                for (size_t i = 0; i < n; i++)
                    wrong += (factor[i] == 0) != (y[i] == 0) || std::fabs(y[i] - x[i] * factor[i]) > 2e-7 * std::fabs(y[i]);
                CHECK(wrong == 0);
                CHECK(same_bits(y, in_place));
            }
}

TEST_CASE("dropout keeps a share of 1-p, leaves the mean as it was, and differs by seed, step, site and layer") {
    const size_t n = 400000;
    for (float p : {0.1f, 0.5f, 0.9f}) {
        Floats x(n, 1.0f);
        dropout_of(p).apply(x.data(), x.data(), 0, n);
        double kept = (double)std::count_if(x.begin(), x.end(), [](float f) { return f != 0; }) / n;
        double mean = std::accumulate(x.begin(), x.end(), 0.0) / n, sigma = std::sqrt(p * (1 - p) / n);
        CHECK(std::fabs(kept - (1 - p)) < 5 * sigma);
        CHECK(std::fabs(mean - 1) < 5 * sigma / (1 - p));
    }
    auto mask = [](uint64_t seed, uint32_t step, rng::Stream site, uint32_t layer) {
        Floats x(1000, 1.0f);
        cpu::Dropout{0.5f, rng::Key(seed, step, site, layer)}.apply(x.data(), x.data(), 0, x.size());
        return x;
    };
    std::vector<Floats> masks = {mask(1, 1, rng::EMB_DROPOUT, 0), mask(2, 1, rng::EMB_DROPOUT, 0), mask(1, 2, rng::EMB_DROPOUT, 0),
                                 mask(1, 1, rng::ATTPROJ_DROPOUT, 0), mask(1, 1, rng::EMB_DROPOUT, 1)};
    for (size_t i = 0; i < masks.size(); i++)
        for (size_t j = 0; j < i; j++) {
            size_t equal = 0;
            for (size_t k = 0; k < 1000; k++) equal += masks[i][k] == masks[j][k];
            CHECK(std::abs((int)equal - 500) < 80);  // independent masks agree on half
        }
}

TEST_CASE("embedding, forward and backward: repeated tokens, dropout, an offset in the batch; relative L2 1e-6") {
    Random r(8);
    for (float p : {0.0f, 0.2f})
        for (size_t C : {1, 48, 67, 130}) {
            const size_t B = 3, T = 37, V = 20;
            INFO("p ", p, " C ", C);
            uint64_t e0 = 11 * T * C;
            Tokens tokens = r.tokens(B * T, V);
            Floats wte = r.floats(V * C), wpe = r.floats((T + 2) * C), y(B * T * C), dy = r.floats(B * T * C);
            Floats dwte = r.floats(V * C), dwpe = r.floats((T + 2) * C);
            cpu::Dropout drop = dropout_of(p, rng::EMB_DROPOUT);
            ref::Tape tape;
            auto e = ref::tensor(wte), pos = ref::tensor(wpe);
            auto out = tape.times(tape.embedding(e, pos, tokens, T, C), ref::dropout_factors(drop.key, e0, B * T * C, p));
            e->d.assign(dwte.begin(), dwte.end()), pos->d.assign(dwpe.begin(), dwpe.end()), out->d.assign(dy.begin(), dy.end());
            tape.backward();
            cpu::embedding_forward(y.data(), tokens.data(), wte.data(), wpe.data(), B, T, C, drop, e0);
            cpu::embedding_backward(dwte.data(), dwpe.data(), dy.data(), tokens.data(), B, T, C, drop, e0);
            check_close("embedding: y", y, out->v, 1e-6);
            check_close("embedding: dwte", dwte, e->d, 1e-6);
            check_close("embedding: dwpe", dwpe, pos->d, 1e-6);
        }
}

TEST_CASE("layernorm, forward and backward, dx overwritten or added to; relative L2 2e-6") {
    Random r(9);
    for (size_t C : {2, 3, 16, 17, 48, 97})
        for (size_t M : {1, 7, 111}) {
            INFO("M ", M, " C ", C);
            Floats x = r.floats(M * C, 2, 0.5), w = r.floats(C, 1, 0.3), b = r.floats(C), y(M * C), mean(M), rstd(M);
            Floats dy = r.floats(M * C), dw = r.floats(C), db = r.floats(C), dx = r.floats(M * C), dx_over = dx;
            ref::Tape tape;
            auto rx = ref::tensor(x), rw = ref::tensor(w), rb = ref::tensor(b), ry = tape.layernorm(rx, rw, rb, C);
            rw->d.assign(dw.begin(), dw.end()), rb->d.assign(db.begin(), db.end()), ry->d.assign(dy.begin(), dy.end());
            tape.backward();
            Doubles want_over = rx->d, want_added = rx->d;
            for (size_t i = 0; i < M * C; i++) want_added[i] += dx[i];
            cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), M, C);
            Floats dw2(C), db2(C);
            cpu::layernorm_backward(dx_over.data(), dw2.data(), db2.data(), dy.data(), x.data(), mean.data(), rstd.data(), w.data(), M, C, false);
            cpu::layernorm_backward(dx.data(), dw.data(), db.data(), dy.data(), x.data(), mean.data(), rstd.data(), w.data(), M, C, true);
            double tolerance = C < 16 ? 1e-5 : 2e-6;  // in a narrow row dx nearly cancels
            check_close("layernorm: y", y, ry->v, 2e-6);
            if (C > 2) check_close("layernorm: dx", dx_over, want_over, tolerance);  // exact dx is nearly 0 for C = 2
            check_close("layernorm: dx added", dx, want_added, tolerance);
            check_close("layernorm: dw", dw, rw->d, 2e-6);
            check_close("layernorm: db", db, rb->d, 2e-6);
        }
}

TEST_CASE("layernorm of a constant row is its bias; of small values its epsilon counts") {
    const size_t C = 48;
    Floats x(C, 3.0f), w(C, 2.0f), b(C, 0.5f), y(C), mean(1), rstd(1);
    cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), 1, C);
    for (float f : y) CHECK(f == 0.5f);
    CHECK(mean[0] == 3.0f);
    Random r(10);
    x = r.floats(C, 2e-3);  // variance 4e-6, less than epsilon
    ref::Tape tape;
    auto want = tape.layernorm(ref::tensor(x), ref::tensor(w), ref::tensor(b), C);
    cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), 1, C);
    check_close("layernorm: small values", y, want->v, 2e-6);
}

TEST_CASE("residual with layernorm: skip + dropout(branch), then the norm; relative L2 2e-6") {
    Random r(11);
    for (float p : {0.0f, 0.2f})
        for (size_t C : {3, 48, 1100}) {
            const size_t M = 37;
            INFO("p ", p, " C ", C);
            uint64_t e0 = 5 * M * C;
            Floats skip_in = r.floats(M * C), branch = r.floats(M * C), w = r.floats(C), b = r.floats(C), sum(M * C), y(M * C), mean(M), rstd(M);
            cpu::Dropout drop = dropout_of(p);
            ref::Tape tape;
            auto s = tape.add(ref::tensor(skip_in), tape.times(ref::tensor(branch), ref::dropout_factors(drop.key, e0, M * C, p)));
            auto want = tape.layernorm(s, ref::tensor(w), ref::tensor(b), C);
            cpu::residual_layernorm_forward(sum.data(), y.data(), mean.data(), rstd.data(), skip_in.data(), branch.data(), w.data(), b.data(), M, C, drop, e0);
            check_close("residual + layernorm: sum", sum, s->v, 1e-6);
            check_close("residual + layernorm: y", y, want->v, 2e-6);
        }
}

TEST_CASE("attention, forward and backward: T around its block of queries and around KC, with and without dropout; relative L2 5e-6") {
    Random r(12);
    struct {
        size_t B, T, NH, hs;
    } shapes[] = {{1, 1, 1, 1},   {2, 1, 3, 5},   {1, 2, 2, 3},   {3, 37, 3, 16}, {1, 96, 1, 7},  {1, 97, 2, 5}, {1, 193, 1, 8},
                  {1, 255, 1, 4}, {1, 256, 1, 3}, {1, 257, 1, 4}, {1, 300, 2, 6}, {2, 19, 1, 260}, {1, 21, 17, 1}};
    for (auto& s : shapes)
        for (float p : {0.0f, 0.2f}) {
            INFO("B ", s.B, " T ", s.T, " NH ", s.NH, " head ", s.hs, " p ", p);
            size_t B = s.B, T = s.T, NH = s.NH, C = NH * s.hs;
            const uint64_t seq0 = 3;
            cpu::Dropout drop = dropout_of(p, rng::ATT_DROPOUT);
            Floats qkv = r.floats(B * T * 3 * C), out(B * T * C), lse(B * NH * T), dout = r.floats(B * T * C), dqkv(B * T * 3 * C, 9.0f);
            for (size_t i = 0; i < qkv.size(); i++)
                if (i % (3 * C) < 2 * C) qkv[i] *= 1.5f;  // scores far enough apart that the softmax is not flat
            ref::Tape tape;
            auto x = ref::tensor(qkv);
            Doubles want_lse, factor;
            if (p > 0) factor = ref::dropout_factors(drop.key, seq0 * NH * T * T, B * NH * T * T, p);
            auto y = tape.attention(x, T, C, NH, factor, &want_lse);
            y->d.assign(dout.begin(), dout.end());
            tape.backward();
            Floats scratch((size_t)omp_get_max_threads() * cpu::Attention::scratch(T, s.hs), NAN);  // nothing may be assumed of it
            cpu::Attention attention{B, T, C, NH};
            attention.forward(out.data(), lse.data(), qkv.data(), drop, seq0, scratch.data());
            attention.backward(dqkv.data(), dout.data(), qkv.data(), lse.data(), drop, seq0, scratch.data());
            check_close("attention: out", out, y->v, 5e-6);
            if (T > 1) check_close("attention: lse", lse, want_lse, 5e-6);
            check_close("attention: dqkv", dqkv, x->d, 5e-6);
            // Queries, keys and values by themselves, so that a loud one hides no other.
            for (size_t which = 0; which < 3 && T > 1; which++) {
                Doubles got, want;
                for (size_t i = 0; i < dqkv.size(); i++)
                    if (i / C % 3 == which) got.push_back(dqkv[i]), want.push_back(x->d[i]);
                const char* name[] = {"attention: dq", "attention: dk", "attention: dv"};
                check_close(name[which], got.data(), want.data(), got.size(), 5e-6);
            }
        }
}

TEST_CASE("cross-entropy: loss and gradient with ignored targets, logits of any size, and nothing beside them touched; relative L2 1e-6") {
    Random r(13);
    for (size_t V : {1, 2, 3, 16, 97, 500}) {
        const size_t M = 23, ld = V + 5;
        INFO("V ", V);
        Floats logits = r.floats(M * ld, 3), losses(M), losses_only(M);
        for (size_t v = 0; v < V; v++) logits[1 * ld + v] += 1e4f, logits[2 * ld + v] -= 1e4f, logits[3 * ld + v] *= 200;
        Tokens targets = r.targets(M, (int)V);
        targets[5] = -1, targets[6] = -1;
        const float dscale = 0.037f;
        Floats dense(M * V);
        for (size_t m = 0; m < M; m++) std::copy(&logits[m * ld], &logits[m * ld] + V, &dense[m * V]);
        ref::Tape tape;
        auto x = ref::tensor(dense);
        auto want = tape.cross_entropy(x, targets, V);
        std::fill(want->d.begin(), want->d.end(), (double)dscale);
        tape.backward();
        Floats before = logits;
        cpu::cross_entropy(losses_only.data(), logits.data(), ld, targets.data(), M, V, 0.0f);
        CHECK(same_bits(logits, before));  // without a scale only the losses are made
        cpu::cross_entropy(losses.data(), logits.data(), ld, targets.data(), M, V, dscale);
        size_t beside = 0;
        for (size_t m = 0; m < M; m++) {
            for (size_t v = V; v < ld; v++) beside += logits[m * ld + v] != before[m * ld + v];
            std::copy(&logits[m * ld], &logits[m * ld] + V, &dense[m * V]);
        }
        CHECK(beside == 0);
        check_close("cross-entropy: losses", losses, want->v, 1e-6);
        check_close("cross-entropy: losses alone", losses_only, want->v, 1e-6);
        check_close("cross-entropy: dlogits", dense, x->d, V == 1 ? 1e-5 : 1e-6);
        CHECK(losses[5] == 0);
        CHECK(std::all_of(&dense[5 * V], &dense[7 * V], [](float d) { return d == 0; }));
    }
    float nan_logits[3] = {0, NAN, 1}, loss;
    int target = 0;
    cpu::cross_entropy(&loss, nan_logits, 3, &target, 1, 3, 0.0f);
    CHECK(std::isnan(loss));
}

// ---------------------------------------------------------------------------------------------
// The reference against finite differences, so that it can be trusted

namespace {

struct Batch {
    size_t B, T;
    Tokens tokens, targets;
    Batch(Random& r, size_t B_, size_t T_, int V) : B(B_), T(T_), tokens(r.tokens(B_ * T_, V)), targets(r.targets(B_ * T_, V)) {}
    size_t counted() const { return count_targets(targets); }
    double forward(cpu::GPT2& m, const Pass& pass = {}) const { return m.forward(tokens.data(), targets.data(), B, T, pass); }
};

std::string variant(const Config& c, float dropout) {
    return std::string(c.arch == GPT2_ARCH ? "GPT-2" : "GROVER") + (c.activation == GELU_TANH ? ", tanh" : ", erf") + strf(", dropout %g", dropout);
}

}  // namespace

TEST_CASE("the reference's gradients are its loss's central differences, 40 parameters of each tensor, relative L2 1e-6") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (int activation : {GELU_TANH, GELU_ERF})
            for (float dropout : {0.0f, 0.2f}) {
                Config c = config(2, 3, 12, 23, 9, arch, activation);
                INFO(variant(c, dropout));
                cpu::GPT2 m(c, 0, 0, false);
                randomise(m, 20);
                m.dropout = dropout;
                ref::Model want(m);
                Random r(21);
                Batch batch(r, 2, 7, c.V);
                Pass pass = training_pass(batch.counted());
                pass.grad_scale = 1.0f;  // the gradient of the sum of all losses: no rounding of the scale
                want.loss(batch.tokens, batch.targets, batch.B, batch.T, pass, true);
                ParamTable table = param_table(c);
                for (int i = 0; i < NUM_PARAMS; i++) {
                    Doubles difference, gradient;
                    for (int k = 0; k < 40; k++) {
                        ref::Tensor& w = *want.w[i][r.below(table[i].layers)];
                        size_t j = i == WTE ? (size_t)batch.tokens[r.below(14)] * 12 + r.below(12) : i == WPE ? r.below(7 * 12) : r.below(w.v.size());
                        double at = w.v[j], h = 1e-5, loss[2];
                        for (int side = 0; side < 2; side++) {
                            w.v[j] = at + (side ? h : -h);
                            loss[side] = (double)batch.counted() * want.loss(batch.tokens, batch.targets, batch.B, batch.T, pass, false);
                        }
                        w.v[j] = at;
                        difference.push_back((loss[1] - loss[0]) / (2 * h)), gradient.push_back(w.d[j]);
                    }
                    check_close(strf("finite differences, reference: %s", table[i].name), gradient.data(), difference.data(), 40, 1e-6);
                }
            }
}

// fp32 rounds the loss, so a single parameter's difference says little. Along a tensor's gradient the loss changes
// most; and along a random direction it must change as the gradient says.
TEST_CASE("the fp32 model's gradients are its own loss's central differences along two directions of each tensor, within 3e-3") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH}) {
        Config c = config(2, 3, 48, 97, 40, arch, arch == GPT2_ARCH ? GELU_TANH : GELU_ERF);
        cpu::GPT2 m(c, 3, 37, true);
        randomise(m, 22);
        m.dropout = 0.2f;
        Random r(23);
        Batch batch(r, 3, 37, c.V);
        Pass pass = training_pass(batch.counted());
        batch.forward(m, pass), m.backward();
        Floats g = gradients(m), w = parameters(m);
        ParamTable table = param_table(c);
        auto off = param_offsets(c);
        for (int i = 0; i < NUM_PARAMS; i++) {
            INFO(variant(c, 0.2f), ", ", table[i].name);
            double norm = 0;
            for (size_t j = off[i]; j < off[i + 1]; j++) norm += (double)g[j] * g[j];
            norm = std::sqrt(norm);
            for (bool random : {false, true}) {
                // The random direction has the gradient's size in each element, but half of them turned at random.
                Doubles direction(table[i].size());
                double slope = 0, length = 0;
                for (size_t j = 0; j < direction.size(); j++) {
                    double x = g[off[i] + j];
                    direction[j] = !random ? x / norm : (r.below(4) ? x : -x) / norm + 0.02 * r.normal() / std::sqrt((double)direction.size());
                    if (i == WTE && j >= (size_t)c.V * c.C) direction[j] = 0;
                    length += direction[j] * direction[j];
                }
                for (size_t j = 0; j < direction.size(); j++) direction[j] /= std::sqrt(length), slope += direction[j] * g[off[i] + j];
                auto difference = [&](double h) {
                    double loss[2];
                    for (int side = 0; side < 2; side++) {
                        for (size_t j = 0; j < direction.size(); j++) m.params()[off[i] + j] = (float)(w[off[i] + j] + (side ? h : -h) * direction[j]);
                        loss[side] = batch.forward(m, pass);
                    }
                    std::copy(w.begin(), w.end(), m.params());
                    return (loss[1] - loss[0]) / (2 * h);
                };
                double h = 0.01, measured = (4 * difference(h) - difference(2 * h)) / 3;  // Richardson: no h^2 term
                double error = std::fabs(measured - slope) / norm;
                note("finite differences, fp32 (of the norm)", error, 3e-3);
                CHECK_MESSAGE(error <= 3e-3, "slope ", measured, ", the gradient says ", slope, " of ", norm);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The whole model against the reference

namespace {

// Loss, logits and all gradients of one training pass, layer by layer.
void check_model(const Config& c, size_t B, size_t T, float dropout, uint64_t seed, uint64_t seq0) {
    INFO(variant(c, dropout), ", L ", c.L, " NH ", c.NH, " C ", c.C, " V ", c.V, " B ", B, " T ", T);
    cpu::GPT2 m(c, B, T, true);
    randomise(m, seed);
    m.dropout = dropout, m.seed = seed + ((uint64_t)1 << 40);
    Random r(seed);
    Batch batch(r, B, T, c.V);
    Pass pass = training_pass(batch.counted() + 5, 7, seq0);
    ref::Model want(m);
    double want_loss = want.loss(batch.tokens, batch.targets, B, T, pass, true);
    double loss = batch.forward(m, pass);
    m.backward();
    check_close("model, loss", loss, want_loss, 1e-6);
    CHECK(m.counted() == batch.counted());
    Floats logits(B * T * (size_t)c.V);
    m.logits(logits.data());
    check_close("model, logits", logits, want.logits, 1e-5);
    ParamTable table = param_table(c);
    auto off = param_offsets(c);
    for (int i = 0; i < NUM_PARAMS; i++) {
        Doubles g = want.gradient(i);
        REQUIRE(g.size() == table[i].size());
        check_close(strf("model, gradients: %s", table[i].name), m.grads() + off[i], g.data(), g.size(), 1e-5);
        for (size_t l = 0; l < table[i].layers; l++)
            check_close(strf("model, gradients: %s of layer %zu", table[i].name, l), m.grads() + off[i] + l * table[i].per_layer(),
                        &g[l * table[i].per_layer()], table[i].per_layer(), 1e-5);
    }
    size_t padded = 0;
    for (size_t j = (size_t)c.V * (size_t)c.C; j < off[WPE]; j++) padded += m.grads()[j] != 0;
    CHECK(padded == 0);
}

}  // namespace

TEST_CASE("the whole model: loss, logits and all 16 gradients, GPT-2 and GROVER, both GELUs, dropout on and off; relative L2 1e-5") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (int activation : {GELU_TANH, GELU_ERF})
            for (float dropout : {0.0f, 0.2f}) check_model(config(2, 3, 48, 97, 40, arch, activation), 3, 37, dropout, 30, 6);
}

TEST_CASE("the whole model at other odd sizes: one token, one head, a head of one channel, several blocks of queries; relative L2 1e-5") {
    check_model(config(1, 5, 20, 2, 1), 2, 1, 0.0f, 31, 0);
    check_model(config(3, 1, 36, 300, 101), 1, 101, 0.2f, 32, 0);
    check_model(config(1, 9, 9, 131, 20, GROVER_ARCH), 5, 13, 0.2f, 33, 1000);
    check_model(config(2, 7, 77, 33, 99, GROVER_ARCH, GELU_ERF), 2, 99, 0.0f, 34, 0);
}

TEST_CASE("gradients add up over backward passes") {
    Config c = config(2, 3, 48, 97, 40);
    cpu::GPT2 m(c, 3, 37, true);
    randomise(m, 40);
    m.dropout = 0.1f;
    Random r(40);
    Batch a(r, 3, 37, c.V), b(r, 2, 29, c.V);
    auto gradient_of = [&](const Batch& batch, bool fresh) {
        if (fresh) std::fill(m.grads(), m.grads() + num_params(c), 0.0f);
        batch.forward(m, training_pass(100)), m.backward();
        return gradients(m);
    };
    Floats ga = gradient_of(a, true), gb = gradient_of(b, true);
    gradient_of(a, true);
    Floats both = gradient_of(b, false);
    Doubles want(both.size());
    for (size_t i = 0; i < want.size(); i++) want[i] = (double)ga[i] + gb[i];
    check_close("model, gradients added up", both, want, 2e-6);
}

TEST_CASE("evaluation: no dropout, no gradient, and the same loss whether or not the model can train") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH}) {
        Config c = config(3, 3, 48, 97, 40, arch);
        cpu::GPT2 trainer_(c, 3, 37, true), evaluator(c, 3, 37, false), small(c, 2, 37, false);
        randomise(trainer_, 41), randomise(evaluator, 41), randomise(small, 41);
        trainer_.dropout = evaluator.dropout = 0.5f;
        Random r(41);
        Batch batch(r, 3, 37, c.V);
        Pass pass = training_pass(batch.counted());
        double first = batch.forward(trainer_, pass);
        trainer_.backward();
        Floats g = gradients(trainer_);
        double loss = batch.forward(trainer_), want = ref::Model(evaluator).loss(batch.tokens, batch.targets, 3, 37, Pass{}, false);
        check_close("model, loss", loss, want, 1e-6);
        CHECK(loss == batch.forward(evaluator));
        CHECK(same_bits(g, gradients(trainer_)));
        CHECK(batch.forward(trainer_, pass) == first);  // a validation in between changes nothing
        pass.step++;
        CHECK(batch.forward(trainer_, pass) != first);  // another step, other masks
        CHECK_THROWS_AS(batch.forward(small), std::logic_error);
        CHECK_THROWS_AS(batch.forward(evaluator, pass), std::logic_error);
        Tokens none(3 * 37, -1);
        CHECK(trainer_.forward(batch.tokens.data(), none.data(), 3, 37, Pass{}) == 0);
        CHECK(trainer_.counted() == 0);
    }
}

TEST_CASE("four micro-batches have the gradient of one big batch, dropout and all; relative L2 1e-5") {
    for (float dropout : {0.0f, 0.2f})
        for (size_t each : {1, 2}) {  // sequences in a micro-batch
            Config c = config(2, 3, 48, 97, 37);
            cpu::GPT2 big(c, 4 * each, 37, true), small(c, each, 37, true);
            randomise(big, 42), randomise(small, 42);
            big.dropout = small.dropout = dropout;
            Random r(42);
            Batch batch(r, 4 * each, 37, c.V);
            batch.targets = r.tokens(4 * each * 37, c.V);  // as in training: every token counts
            double loss = batch.forward(big, training_pass(4 * each * 37)), mean = 0;
            big.backward();
            for (size_t i = 0; i < 4; i++) {
                size_t at = i * each * 37;
                mean += small.forward(&batch.tokens[at], &batch.targets[at], each, 37, training_pass(4 * each * 37, 3, i * each)) / 4;
                small.backward();
            }
            check_close("micro-batches: loss", mean, loss, 1e-6);
            ParamTable table = param_table(c);
            auto off = param_offsets(c);
            for (int i = 0; i < NUM_PARAMS; i++)
                check_close(strf("micro-batches: %s", table[i].name), small.grads() + off[i], big.grads() + off[i], table[i].size(), 1e-5);
        }
}

TEST_CASE("the head in several chunks of rows equals the head in one; relative L2 1e-5") {
    Config c = config(1, 1, 4, 1 << 19, 35);
    c.Vp = c.V;
    REQUIRE(cpu::GPT2::head_rows(c, 70) == 64);  // 70 rows take two chunks, 35 rows one
    Random r(43);
    Batch batch(r, 2, 35, c.V);
    Floats want;
    double want_loss = 0;
    size_t counted[2] = {count_targets(Tokens(batch.targets.begin(), batch.targets.begin() + 35)), 0};
    counted[1] = batch.counted() - counted[0];
    {
        cpu::GPT2 m(c, 1, 35, true);
        randomise(m, 43);
        for (size_t b = 0; b < 2; b++) {
            want_loss += m.forward(&batch.tokens[b * 35], &batch.targets[b * 35], 1, 35, training_pass(70, 3, b)) * (double)counted[b];
            m.backward();
        }
        want = gradients(m);
    }
    cpu::GPT2 m(c, 2, 35, true);
    randomise(m, 43);
    double loss = batch.forward(m, training_pass(70));
    m.backward();
    check_close("chunked head: loss", loss, want_loss / (double)batch.counted(), 1e-6);
    ParamTable table = param_table(c);
    auto off = param_offsets(c);
    for (int i = 0; i < NUM_PARAMS; i++)
        check_close(strf("chunked head: %s", table[i].name), m.grads() + off[i], want.data() + off[i], table[i].size(), 1e-5);
}

TEST_CASE("losses, gradients' norms and weights have the same bits with 1, 2, 3 and 4 threads, over training steps with dropout") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH}) {
        struct {
            Floats params, moments;
            Doubles losses;
        } first, now;
        for (int threads : {1, 2, 3, 4}) {
            Threads guard(threads);
            Config c = config(2, 3, 69, 97, 101, arch);
            cpu::GPT2 m(c, 3, 101, true);  // 303 rows
            m.init_weights(5);
            m.dropout = 0.1f;
            now = {};
            Random r(44);
            for (uint32_t step = 0; step < 4; step++) {
                Batch batch(r, 3, step % 2 ? 37 : 101, c.V);
                now.losses.push_back(batch.forward(m, training_pass(batch.counted(), step)));
                m.backward();
                now.losses.push_back(m.grad_norm());
                AdamW a;
                a.lr = 1e-2f;
                m.update(a, step + 1, 0.5f);
                now.losses.push_back(batch.forward(m));
            }
            now.params = parameters(m), now.moments = piece(m, cpu::GPT2::ADAM_V);
            if (threads == 1) first = now;
            INFO("threads ", threads);
            CHECK(now.losses == first.losses);
            CHECK(same_bits(now.params, first.params));
            CHECK(same_bits(now.moments, first.moments));
        }
    }
}

TEST_CASE("what is too large to address is refused in one line, and what fits is counted") {
    Config c = config(2, 3, 48, 97, 40);
    std::string e = error_of([&] { cpu::GPT2::memory_need(c, SIZE_MAX / 2, 37, true); });
    CHECK(contains(e, "batch size x sequence length"));
    CHECK(contains(e, "too large to address"));
    CHECK(contains(error_of([&] { cpu::GPT2::memory_need(c, (size_t)1 << 40, 1 << 20, true); }), "too large to address"));
    CHECK(contains(error_of([&] { cpu::GPT2 m(config(2, 5, 48, 97, 40), 1, 1, true); }), "model: C is 48, wanted a multiple of NH = 5"));
    MemoryNeed trains = cpu::GPT2::memory_need(c, 3, 37, true), reads = cpu::GPT2::memory_need(c, 3, 37, false);
    CHECK(trains.params == num_params(c) * 4);
    CHECK(trains.grads == trains.params);
    CHECK(trains.optimizer == 2 * trains.params);
    CHECK(reads.grads + reads.optimizer == 0);
    CHECK(reads.activations < trains.activations);
}
