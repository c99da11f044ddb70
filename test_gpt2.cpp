// test_gpt2.cpp - the CPU model, its files, optimizer and sampler, held against plain double-precision
// mathematics.
//
// `namespace ref` is a second model, written from the definitions: each operation knows its value and how a
// gradient passes through it, in plain loops over doubles, and a tape runs them backwards. Finite differences
// verify it, and train_gpt2.cpp is compared with it layer by layer and as a whole. Tensors are compared by
// relative L2 error; the largest one of each kind is printed at the end.
//
// lib/test_gemm.cpp, the matrix product's tests, and dev/test_main.cpp are linked into this program.
#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#include <doctest/doctest.h>

#include <sys/resource.h>

#include <map>
#include <numeric>

#include "dev/test_util.h"
#include "train_gpt2.cpp"
#include "lib/trainer.h"

using namespace test;

namespace {

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
    for (size_t i = 0; i < n; i++)
        f[i] = (double)key.u32(e0 + i) < (double)p * 0x1p32 ? 0.0 : 1.0 / (1.0 - (double)p);
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
                    for (size_t k = 0; k < K; k++)
                        x->d[m * K + k] += d * w->v[n * K + k], w->d[n * K + k] += d * x->v[m * K + k];
                }
        });
        return y;
    }

    // y = (x - mean) / sqrt(variance + eps) * w + b over rows of C; backward by the full Jacobian.
    Ref layernorm(Ref x, Ref w, Ref b, size_t C, double eps = 1e-5) {
        size_t M = x->v.size() / C;
        Ref y = tensor(M * C);
        Doubles centred(M * C), sigma(M);
        for (size_t m = 0; m < M; m++) {
            double mean = 0, variance = 0;
            for (size_t c = 0; c < C; c++) mean += x->v[m * C + c] / (double)C;
            for (size_t c = 0; c < C; c++) centred[m * C + c] = x->v[m * C + c] - mean;
            for (size_t c = 0; c < C; c++) variance += centred[m * C + c] * centred[m * C + c] / (double)C;
            sigma[m] = std::sqrt(variance + eps);
            for (size_t c = 0; c < C; c++)
                y->v[m * C + c] = centred[m * C + c] / sigma[m] * w->v[c] + b->v[c];
        }
        steps_.push_back([=] {
            for (size_t m = 0; m < M; m++) {
                const double *u = &centred[m * C], s = sigma[m];
                for (size_t j = 0; j < C; j++) {
                    double d = y->d[m * C + j];
                    w->d[j] += d * u[j] / s, b->d[j] += d;
                    for (size_t i = 0; i < C; i++)
                        x->d[m * C + i] +=
                            d * w->v[j] *
                            (((i == j) - 1 / (double)C) / s - u[i] * u[j] / ((double)C * s * s * s));
                }
            }
        });
        return y;
    }

    Ref gelu(Ref x, int activation) {
        Ref y = tensor(x->v.size());
        for (size_t i = 0; i < y->v.size(); i++) y->v[i] = ref::gelu(x->v[i], activation);
        steps_.push_back([=] {
            for (size_t i = 0; i < y->v.size(); i++)
                x->d[i] += y->d[i] * gelu_derivative(x->v[i], activation);
        });
        return y;
    }

    // y (B,T,C) from qkv (B,T,3C): softmax over the past of q k / sqrt(hs), times factor (B,NH,T,T) where
    // there is one, times v. The softmax is passed backwards by its full Jacobian. lse (B,NH,T), if wanted.
    Ref attention(Ref qkv, size_t T, size_t C, size_t NH, const Doubles& factor, Doubles* lse = nullptr) {
        size_t B = qkv->v.size() / (3 * T * C), hs = C / NH;
        Ref y = tensor(B * T * C);
        Doubles prob(B * NH * T * T);
        if (lse) lse->resize(B * NH * T);
        auto at = [=](size_t b, size_t t, size_t h, size_t which) {
            return ((b * T + t) * 3 + which) * C + h * hs;
        };
        for (size_t b = 0; b < B; b++)
            for (size_t h = 0; h < NH; h++)
                for (size_t t = 0; t < T; t++) {
                    size_t row = ((b * NH + h) * T + t) * T;
                    double max = -INFINITY, sum = 0;
                    for (size_t j = 0; j <= t; j++) {
                        double dot = 0;
                        for (size_t i = 0; i < hs; i++)
                            dot += qkv->v[at(b, t, h, 0) + i] * qkv->v[at(b, j, h, 1) + i];
                        prob[row + j] = dot / std::sqrt((double)hs), max = std::max(max, prob[row + j]);
                    }
                    for (size_t j = 0; j <= t; j++) sum += prob[row + j] = std::exp(prob[row + j] - max);
                    for (size_t j = 0; j <= t; j++) {
                        prob[row + j] /= sum;
                        double weight = prob[row + j] * (factor.empty() ? 1 : factor[row + j]);
                        for (size_t i = 0; i < hs; i++)
                            y->v[(b * T + t) * C + h * hs + i] += weight * qkv->v[at(b, j, h, 2) + i];
                    }
                    if (lse) (*lse)[row / T] = max + std::log(sum);
                }
        steps_.push_back([=] {
            Doubles dp(T);
            for (size_t b = 0; b < B; b++)
                for (size_t h = 0; h < NH; h++)
                    for (size_t t = 0; t < T; t++) {
                        const double *p = &prob[((b * NH + h) * T + t) * T],
                                     *d = &y->d[(b * T + t) * C + h * hs];
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
        Floats all = piece(m, PARAMS);
        const float* p = all.data();
        for (const ParamInfo& info : param_table(cfg)) {
            w.emplace_back();
            for (size_t l = 0; l < info.layers; l++, p += info.per_layer())
                w.back().push_back(tensor(p, info.per_layer()));
        }
    }

    // The mean loss; a training pass leaves the gradients in w[..]->d too (adding to what is there).
    double loss(const Tokens& tokens, const Tokens& targets, size_t B, size_t T, const Pass& pass,
                bool with_gradient) {
        size_t C = (size_t)cfg.C, NH = (size_t)cfg.NH, L = (size_t)cfg.L, M = B * T;
        Tape tape;
        auto drop = [&](Ref x, rng::Stream site, size_t l) {
            return tape.times(x, factors(pass, site, l, pass.seq0 * T * C, M * C));
        };
        auto norm = [&](Ref x, int weight, int bias, size_t l) {
            return tape.layernorm(x, w[weight][l], w[bias][l], C, (double)cfg.eps);
        };
        auto attention = [&](Ref x, size_t l) {
            Ref qkv = tape.linear(x, w[QKVW][l], w[QKVB][l], C, 3 * C);
            Ref y = tape.attention(
                qkv, T, C, NH, factors(pass, rng::ATT_DROPOUT, l, pass.seq0 * NH * T * T, B * NH * T * T));
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
    c.L = L, c.NH = NH, c.C = C, c.V = V, c.Vp = pad_vocab(V), c.maxT = maxT, c.arch = arch,
    c.activation = activation;
    return c;
}

// Weights as if trained: nothing is zero or one, so that every gradient matters. Padded rows stay zero.
void randomise(cpu::GPT2& m, uint64_t seed) {
    Random r(seed);
    ParamTable table = param_table(m.cfg);
    auto off = param_offsets(m.cfg);
    Floats all = piece(m, PARAMS);
    for (int i = 0; i < NUM_PARAMS; i++) {
        bool weight = i == LN1W || i == LN2W || i == LNFW, embedding = i == WTE || i == WPE;
        double scale = !table[i].decay ? 0.3
                       : embedding     ? 0.4
                                       : (i == QKVW ? 1.5 : 1) / std::sqrt((double)m.cfg.C);
        Floats w =
            r.floats(i == WTE ? (size_t)m.cfg.V * table[i].cols : table[i].size(), scale, weight ? 1 : 0);
        std::copy(w.begin(), w.end(), &all[off[i]]);
    }
    set_piece(m, PARAMS, all);
}

// In the file's order.
Floats gradients(cpu::GPT2& m) { return piece(m, GRADS); }
Floats parameters(cpu::GPT2& m) { return piece(m, PARAMS); }

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
        rng::Block b =
            rng::philox(k.key[0], k.key[1], k.counter[0], k.counter[1], k.counter[2], k.counter[3]);
        for (int i = 0; i < 4; i++) CHECK(b.w[i] == k.want[i]);
    }
}

TEST_CASE(
    "a key's numbers are philox blocks keyed by the seed and counted by (element / 4, step, stream and "
    "layer)") {
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
    rng::shuffle(a.data(), a.size(), rng::Key(7, 3, rng::SHUFFLE)),
        rng::shuffle(b.data(), b.size(), rng::Key(7, 3, rng::SHUFFLE));
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
        worst = std::max(worst, std::fabs((double)simd::exp_approx(x) - want) / want);
    }
    note("exp_approx (largest relative)", worst, 2e-7);
    CHECK(worst <= 2e-7);
    CHECK(simd::exp_approx(0.0f) == 1.0f);
    CHECK(simd::exp_approx(-0.0f) == 1.0f);
    CHECK(simd::exp_approx(-1e30f) == simd::exp_approx(-87.0f));
    CHECK(simd::exp_approx(-INFINITY) == simd::exp_approx(-87.0f));
    CHECK(simd::exp_approx(INFINITY) == simd::exp_approx(88.0f));
    CHECK(std::isfinite(simd::exp_approx(INFINITY)));
    CHECK(std::isnan(simd::exp_approx(NAN)));
    Floats x(37, NAN), y(37);  // the vector code too
    for (size_t i = 0; i < x.size(); i++) y[i] = simd::exp_approx(x[i]);
    CHECK(std::all_of(y.begin(), y.end(), [](float f) { return std::isnan(f); }));
}

TEST_CASE("normal_cdf is the normal distribution function within 4e-7, and its density within 1e-7") {
    double worst = 0, worst_density = 0;
    for (int i = -120000; i <= 120000; i++) {
        float x = (float)i * 1e-4f, density;
        simd::vec densities;
        double cdf = simd::normal_cdf(simd::vec{} + x, &densities)[0];
        density = densities[0];
        worst = std::max(worst, std::fabs(cdf - 0.5 * std::erfc(-(double)x / std::sqrt(2.0))));
        worst_density =
            std::max(worst_density, std::fabs(density - std::exp(-(double)x * x / 2) / std::sqrt(2 * M_PI)));
    }
    note("normal_cdf (largest absolute)", worst, 4e-7);
    note("normal density (largest absolute)", worst_density, 1e-7);
    CHECK(worst <= 4e-7);
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
            for (size_t i = 0; i < n; i++)
                want[i] = ref::gelu(x[i], activation),
                want_d[i] = d[i] * ref::gelu_derivative(x[i], activation);
            simd::gelu_forward(y.data(), x.data(), n, activation);
            simd::gelu_backward(d.data(), d.data(), x.data(), n, activation);
            check_close(kind + ": forward", y, want,
                        n < 100 ? 1e-5 : 1e-6);  // a short row may be all small values
            check_close(kind + ": backward", d, want_d, n < 100 ? 1e-5 : 1e-6);
        }
        for (float x : {-1e4f, -100.0f, -20.0f, 20.0f, 100.0f, 1e4f}) {
            float y, d = 1;
            simd::gelu_forward(&y, &x, 1, activation);
            simd::gelu_backward(&d, &d, &x, 1, activation);
            CHECK(std::fabs(y - std::max(x, 0.0f)) <= 1e-6);
            CHECK(std::fabs(d - (x > 0)) <= 1e-6);
        }
        Floats nan(19, NAN), y(19), d(19, 1.0f);
        simd::gelu_forward(y.data(), nan.data(), 19, activation);
        simd::gelu_backward(d.data(), d.data(), nan.data(), 19, activation);
        for (size_t i = 0; i < 19; i++) CHECK((std::isnan(y[i]) && std::isnan(d[i])));
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
                    wrong += (factor[i] == 0) != (y[i] == 0) ||
                             std::fabs(y[i] - x[i] * factor[i]) > 2e-7 * std::fabs(y[i]);
                CHECK(wrong == 0);
                CHECK(same_bits(y, in_place));
            }
}

TEST_CASE(
    "dropout keeps a share of 1-p, leaves the mean as it was, and differs by seed, step, site and layer") {
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
    std::vector<Floats> masks = {mask(1, 1, rng::EMB_DROPOUT, 0), mask(2, 1, rng::EMB_DROPOUT, 0),
                                 mask(1, 2, rng::EMB_DROPOUT, 0), mask(1, 1, rng::ATTPROJ_DROPOUT, 0),
                                 mask(1, 1, rng::EMB_DROPOUT, 1)};
    for (size_t i = 0; i < masks.size(); i++)
        for (size_t j = 0; j < i; j++) {
            size_t equal = 0;
            for (size_t k = 0; k < 1000; k++) equal += masks[i][k] == masks[j][k];
            CHECK(std::abs((int)equal - 500) < 80);  // independent masks agree on half
        }
}

TEST_CASE(
    "embedding, forward and backward: repeated tokens, dropout, an offset in the batch; relative L2 1e-6") {
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
            auto out = tape.times(tape.embedding(e, pos, tokens, T, C),
                                  ref::dropout_factors(drop.key, e0, B * T * C, p));
            e->d.assign(dwte.begin(), dwte.end()), pos->d.assign(dwpe.begin(), dwpe.end()),
                out->d.assign(dy.begin(), dy.end());
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
            Floats x = r.floats(M * C, 2, 0.5), w = r.floats(C, 1, 0.3), b = r.floats(C), y(M * C), mean(M),
                   rstd(M);
            Floats dy = r.floats(M * C), dw = r.floats(C), db = r.floats(C), dx = r.floats(M * C),
                   dx_over = dx;
            ref::Tape tape;
            auto rx = ref::tensor(x), rw = ref::tensor(w), rb = ref::tensor(b),
                 ry = tape.layernorm(rx, rw, rb, C);
            rw->d.assign(dw.begin(), dw.end()), rb->d.assign(db.begin(), db.end()),
                ry->d.assign(dy.begin(), dy.end());
            tape.backward();
            Doubles want_over = rx->d, want_added = rx->d;
            for (size_t i = 0; i < M * C; i++) want_added[i] += dx[i];
            cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), M, C);
            Floats dw2(C), db2(C);
            auto backward = [&](Floats& to_x, Floats& to_w, Floats& to_b, bool accumulate) {
                cpu::layernorm_backward(to_x.data(), nullptr, to_w.data(), to_b.data(), dy.data(), x.data(),
                                        mean.data(), rstd.data(), w.data(), M, C, accumulate);
            };
            backward(dx_over, dw2, db2, false), backward(dx, dw, db, true);
            double tolerance = C < 16 ? 1e-5 : 2e-6;  // in a narrow row dx nearly cancels
            check_close("layernorm: y", y, ry->v, 2e-6);
            if (C > 2)
                check_close("layernorm: dx", dx_over, want_over,
                            tolerance);  // exact dx is nearly 0 for C = 2
            check_close("layernorm: dx added", dx, want_added, tolerance);
            check_close("layernorm: dw", dw, rw->d, 2e-6);
            check_close("layernorm: db", db, rb->d, 2e-6);
        }
}

TEST_CASE("layernorm's backward also leaves dx under a dropout mask; dw and db may be overwritten") {
    Random r(17);
    const size_t M = 37, C = 1100;
    const uint64_t e0 = 5 * M * C + 3;
    Floats x = r.floats(M * C, 2, 0.5), w = r.floats(C, 1, 0.3), b = r.floats(C), y(M * C), mean(M), rstd(M);
    Floats dy = r.floats(M * C), start = r.floats(M * C);
    cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), M, C);
    for (float p : {0.0f, 0.2f})
        for (bool accumulate : {false, true}) {
            INFO("p ", p, ", accumulate ", accumulate);
            cpu::Dropout drop = dropout_of(p);
            Floats dx = start, want = start, masked(M * C, NAN);
            Floats dw(C), db(C), dw_over(C, 9.0f), db_over(C, 9.0f);
            cpu::layernorm_backward(want.data(), nullptr, dw.data(), db.data(), dy.data(), x.data(),
                                    mean.data(), rstd.data(), w.data(), M, C, accumulate);
            cpu::layernorm_backward(dx.data(), masked.data(), dw_over.data(), db_over.data(), dy.data(),
                                    x.data(), mean.data(), rstd.data(), w.data(), M, C, accumulate, drop, e0,
                                    false);
            CHECK(same_bits(dx, want));
            CHECK(same_bits(dw_over, dw));
            CHECK(same_bits(db_over, db));
            Doubles want_masked = ref::dropout_factors(drop.key, e0, M * C, p);
            for (size_t i = 0; i < M * C; i++) want_masked[i] *= dx[i];
            check_close("layernorm: dx under a mask", masked, want_masked, 2e-7);
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
            Floats skip_in = r.floats(M * C), branch = r.floats(M * C), w = r.floats(C), b = r.floats(C);
            Floats sum(M * C), y(M * C), mean(M), rstd(M);
            cpu::Dropout drop = dropout_of(p);
            ref::Tape tape;
            auto s = tape.add(ref::tensor(skip_in),
                              tape.times(ref::tensor(branch), ref::dropout_factors(drop.key, e0, M * C, p)));
            auto want = tape.layernorm(s, ref::tensor(w), ref::tensor(b), C);
            cpu::residual_layernorm_forward(sum.data(), y.data(), mean.data(), rstd.data(), skip_in.data(),
                                            branch.data(), w.data(), b.data(), M, C, drop, e0);
            check_close("residual + layernorm: sum", sum, s->v, 1e-6);
            check_close("residual + layernorm: y", y, want->v, 2e-6);
        }
}

TEST_CASE(
    "attention, forward and backward: T around its block of queries and around KC, with and without dropout; "
    "relative L2 5e-6") {
    Random r(12);
    struct {
        size_t B, T, NH, hs;
    } shapes[] = {{1, 1, 1, 1},   {2, 1, 3, 5},    {1, 2, 2, 3},   {3, 37, 3, 16}, {1, 96, 1, 7},
                  {1, 97, 2, 5},  {1, 193, 1, 8},  {1, 255, 1, 4}, {1, 256, 1, 3}, {1, 257, 1, 4},
                  {1, 300, 2, 6}, {2, 19, 1, 260}, {1, 21, 17, 1}};
    for (auto& s : shapes)
        for (float p : {0.0f, 0.2f}) {
            INFO("B ", s.B, " T ", s.T, " NH ", s.NH, " head ", s.hs, " p ", p);
            size_t B = s.B, T = s.T, NH = s.NH, C = NH * s.hs;
            const uint64_t seq0 = 3;
            cpu::Dropout drop = dropout_of(p, rng::ATT_DROPOUT);
            Floats qkv = r.floats(B * T * 3 * C), out(B * T * C), lse(B * NH * T), dout = r.floats(B * T * C),
                   dqkv(B * T * 3 * C, 9.0f);
            for (size_t i = 0; i < qkv.size(); i++)
                if (i % (3 * C) < 2 * C)
                    qkv[i] *= 1.5f;  // scores far enough apart that the softmax is not flat
            ref::Tape tape;
            auto x = ref::tensor(qkv);
            Doubles want_lse, factor;
            if (p > 0) factor = ref::dropout_factors(drop.key, seq0 * NH * T * T, B * NH * T * T, p);
            auto y = tape.attention(x, T, C, NH, factor, &want_lse);
            y->d.assign(dout.begin(), dout.end());
            tape.backward();
            Floats scratch((size_t)omp_get_max_threads() * cpu::Attention::scratch(T, s.hs),
                           NAN);  // nothing may be assumed of it
            cpu::Attention attention{B, T, C, NH};
            attention.forward(out.data(), lse.data(), qkv.data(), drop, seq0, scratch.data());
            attention.backward(dqkv.data(), dout.data(), out.data(), qkv.data(), lse.data(), drop, seq0,
                               scratch.data());
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

TEST_CASE(
    "attention in bf16: from rounded queries, keys and values, over all tiles, with and without dropout; "
    "relative L2 6e-3") {
    Random r(15);
    struct {
        size_t B, T, NH, hs;
    } shapes[] = {{1, 1, 1, 1},   {2, 3, 3, 5},   {1, 63, 2, 16},
                  {2, 65, 1, 33}, {1, 113, 2, 7}, {1, 300, 1, 64}};
    for (auto& s : shapes)
        for (float p : {0.0f, 0.2f}) {
            INFO("B ", s.B, " T ", s.T, " NH ", s.NH, " head ", s.hs, " p ", p);
            size_t B = s.B, T = s.T, NH = s.NH, C = NH * s.hs;
            cpu::Dropout drop = dropout_of(p, rng::ATT_DROPOUT);
            auto floats = [](const std::vector<simd::bf16>& from) {
                Floats values(from.size());
                std::transform(from.begin(), from.end(), values.begin(), bf16_to_float);
                return values;
            };
            Floats qkv = rounded(r.floats(B * T * 3 * C)), dout = rounded(r.floats(B * T * C)),
                   lse(B * NH * T);
            Floats scratch((size_t)omp_get_max_threads() * cpu::Attention::scratch(T, s.hs), NAN);
            std::vector<simd::bf16> out(B * T * C), dqkv(B * T * 3 * C);
            ref::Tape tape;
            auto x = ref::tensor(qkv);
            Doubles want_lse, factor;
            if (p > 0) factor = ref::dropout_factors(drop.key, 0, B * NH * T * T, p);
            auto y = tape.attention(x, T, C, NH, factor, &want_lse);
            y->d.assign(dout.begin(), dout.end());
            tape.backward();
            cpu::Attention attention{B, T, C, NH};
            attention.forward(out.data(), lse.data(), qkv.data(), drop, 0, scratch.data());
            attention.backward(dqkv.data(), dout.data(), out.data(), qkv.data(), lse.data(), drop, 0,
                               scratch.data());
            check_close("attention, bf16: out", floats(out), y->v, 6e-3);
            if (T > 1) check_close("attention, bf16: lse", lse, want_lse, 6e-3);
            check_close("attention, bf16: dqkv", floats(dqkv), x->d, 6e-3);
        }
}

TEST_CASE("cross-entropy can leave the same gradient rounded to bf16, from the start of each row on") {
    Random r(16);
    for (size_t V : {1, 16, 97, 500}) {
        const size_t M = 5, ld = V + 5;
        INFO("V ", V);
        Floats logits = r.floats(M * ld, 3), half = logits, losses(M), losses_half(M);
        Tokens targets = r.targets(M, (int)V);
        targets[0] = (int)V - 1, targets[2] = -1;
        cpu::cross_entropy(losses.data(), logits.data(), ld, targets.data(), M, V, 0.037f);
        cpu::cross_entropy<simd::bf16>(losses_half.data(), half.data(), ld, targets.data(), M, V, 0.037f);
        CHECK(same_bits(losses, losses_half));
        size_t wrong = 0;
        for (size_t m = 0; m < M; m++)
            for (size_t v = 0; v < V; v++) {
                simd::bf16 got;
                memcpy(&got, (const char*)&half[m * ld] + v * sizeof got, sizeof got);
                wrong += got != float_to_bf16(logits[m * ld + v]) &&
                         std::fabs(logits[m * ld + v]) > 1e-37f;  // denormals may become 0
            }
        CHECK(wrong == 0);
    }
}

TEST_CASE(
    "cross-entropy: loss and gradient with ignored targets, logits of any size, and nothing beside them "
    "touched; relative L2 1e-6") {
    Random r(13);
    for (size_t V : {1, 2, 3, 16, 97, 500}) {
        const size_t M = 23, ld = V + 5;
        INFO("V ", V);
        Floats logits = r.floats(M * ld, 3), losses(M), losses_only(M);
        for (size_t v = 0; v < V; v++)
            logits[1 * ld + v] += 1e4f, logits[2 * ld + v] -= 1e4f, logits[3 * ld + v] *= 200;
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
    Batch(Random& r, size_t B_, size_t T_, int V)
        : B(B_), T(T_), tokens(r.tokens(B_ * T_, V)), targets(r.targets(B_ * T_, V)) {}
    size_t counted() const { return count_targets(targets); }
    double forward(cpu::GPT2& m, const Pass& pass = {}) const {
        return m.forward(tokens.data(), targets.data(), B, T, pass);
    }
};

std::string variant(const Config& c, float dropout) {
    return strf("%s, %s, dropout %g", c.arch == GPT2_ARCH ? "GPT-2" : "GROVER",
                c.activation == GELU_TANH ? "tanh" : "erf", dropout);
}

}  // namespace

TEST_CASE(
    "the reference's gradients are its loss's central differences, 40 parameters of each tensor, relative L2 "
    "1e-6") {
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
                        size_t j =
                            r.below(i == WPE ? 7 * 12 : w.v.size());  // of wpe and wte, what the batch uses
                        if (i == WTE) j = (size_t)batch.tokens[r.below(14)] * 12 + j % 12;
                        double at = w.v[j], h = 1e-5, loss[2];
                        for (int side = 0; side < 2; side++) {
                            w.v[j] = at + (side ? h : -h);
                            loss[side] = (double)batch.counted() * want.loss(batch.tokens, batch.targets,
                                                                             batch.B, batch.T, pass, false);
                        }
                        w.v[j] = at;
                        difference.push_back((loss[1] - loss[0]) / (2 * h)), gradient.push_back(w.d[j]);
                    }
                    check_close(strf("finite differences, reference: %s", table[i].name), gradient.data(),
                                difference.data(), 40, 1e-6);
                }
            }
}

// fp32 rounds the loss, so a single parameter's difference says little. Along a tensor's gradient the loss
// changes most; and along a random direction it must change as the gradient says.
TEST_CASE(
    "the fp32 model's gradients are its own loss's central differences along two directions of each tensor, "
    "within 1e-3") {
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
                // The random direction has the gradient's elements, one in four turned around, and some
                // noise.
                Doubles direction(table[i].size());
                double slope = 0, length = 0, root = std::sqrt((double)direction.size());
                for (size_t j = 0; j < direction.size(); j++) {
                    direction[j] = g[off[i] + j] / norm;
                    if (random)
                        direction[j] = (r.below(4) ? direction[j] : -direction[j]) + 0.02 * r.normal() / root;
                    if (i == WTE && j >= (size_t)c.V * c.C) direction[j] = 0;
                    length += direction[j] * direction[j];
                }
                for (size_t j = 0; j < direction.size(); j++)
                    direction[j] /= std::sqrt(length), slope += direction[j] * g[off[i] + j];
                auto difference = [&](double h) {
                    double loss[2];
                    for (int side = 0; side < 2; side++) {
                        Floats moved = w;
                        for (size_t j = 0; j < direction.size(); j++)
                            moved[off[i] + j] = (float)(w[off[i] + j] + (side ? h : -h) * direction[j]);
                        set_piece(m, PARAMS, moved);
                        loss[side] = batch.forward(m, pass);
                    }
                    set_piece(m, PARAMS, w);
                    return (loss[1] - loss[0]) / (2 * h);
                };
                double h = 0.005,
                       measured = (4 * difference(h) - difference(2 * h)) / 3;  // Richardson: no h^2 term
                double error = std::fabs(measured - slope) / norm;
                note("finite differences, fp32 (of the norm)", error, 1e-3);
                CHECK_MESSAGE(error <= 1e-3, "slope ", measured, ", the gradient says ", slope, " of ", norm);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The whole model against the reference

namespace {

// Loss, logits and all gradients of one training pass, layer by layer.
void check_model(const Config& c, size_t B, size_t T, float dropout, uint64_t seed, uint64_t seq0,
                 int recompute = 0) {
    INFO(variant(c, dropout), ", L ", c.L, " NH ", c.NH, " C ", c.C, " V ", c.V, " B ", B, " T ", T, " eps ",
         c.eps, " recompute ", recompute);
    cpu::GPT2 m(c, B, T, true, recompute);
    randomise(m, seed);
    m.dropout = dropout, m.seed = seed + ((uint64_t)1 << 40);
    Random r(seed);
    Batch batch(r, B, T, c.V);
    Pass pass = training_pass(batch.counted() + 5, 7, seq0);
    ref::Model want(m);
    double want_loss = want.loss(batch.tokens, batch.targets, B, T, pass, true);
    double loss = batch.forward(m, pass);
    CHECK(m.backward() == loss);
    check_close("model, loss", loss, want_loss, 1e-6);
    CHECK(m.counted() == batch.counted());
    Floats logits(B * T * (size_t)c.V);
    m.logits(logits.data());
    check_close("model, logits", logits, want.logits, 1e-5);
    ParamTable table = param_table(c);
    auto off = param_offsets(c);
    Floats got = gradients(m);
    for (int i = 0; i < NUM_PARAMS; i++) {
        Doubles g = want.gradient(i);
        REQUIRE(g.size() == table[i].size());
        check_close(strf("model, gradients: %s", table[i].name), &got[off[i]], g.data(), g.size(), 1e-5);
        for (size_t l = 0, n = table[i].per_layer(); l < table[i].layers; l++)
            check_close(strf("model, gradients: %s of layer %zu", table[i].name, l), &got[off[i] + l * n],
                        &g[l * n], n, 1e-5);
    }
    size_t padded = 0;
    for (size_t j = (size_t)c.V * (size_t)c.C; j < off[WPE]; j++) padded += got[j] != 0;
    CHECK(padded == 0);
}

}  // namespace

TEST_CASE(
    "the whole model: loss, logits and all 16 gradients, GPT-2 and GROVER, both GELUs, dropout on and off; "
    "relative L2 1e-5") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (int activation : {GELU_TANH, GELU_ERF})
            for (float dropout : {0.0f, 0.2f})
                check_model(config(2, 3, 48, 97, 40, arch, activation), 3, 37, dropout, 30, 6);
}

TEST_CASE(
    "the whole model at other odd sizes: one token, one head, a head of one channel, several blocks of "
    "queries; relative L2 1e-5") {
    check_model(config(1, 5, 20, 2, 1), 2, 1, 0.0f, 31, 0);
    check_model(config(3, 1, 36, 300, 101), 1, 101, 0.2f, 32, 0);
    check_model(config(1, 9, 9, 131, 20, GROVER_ARCH), 5, 13, 0.2f, 33, 1000);
    check_model(config(2, 7, 77, 33, 99, GROVER_ARCH, GELU_ERF), 2, 99, 0.0f, 34, 0);
}

TEST_CASE(
    "the whole model with LayerNorm's epsilon at 1e-12, 1e-3 and 0.1, whatever backward computes again; "
    "relative L2 1e-5") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (float eps : {1e-12f, 1e-3f, 0.1f})
            for (int recompute : {0, 1, 2, 3}) {
                Config c = config(2, 3, 24, 97, 20, arch);
                c.eps = eps;
                check_model(c, 2, 17, 0.0f, 35, 0, recompute);
            }
}

TEST_CASE("gradients add up over backward passes") {
    Config c = config(2, 3, 48, 97, 40);
    cpu::GPT2 m(c, 3, 37, true);
    randomise(m, 40);
    m.dropout = 0.1f;
    Random r(40);
    Batch a(r, 3, 37, c.V), b(r, 2, 29, c.V);
    auto gradient_of = [&](const Batch& batch, bool fresh) {
        if (fresh) set_piece(m, GRADS, Floats(num_params(c)));
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
        double loss = batch.forward(trainer_),
               want = ref::Model(evaluator).loss(batch.tokens, batch.targets, 3, 37, Pass{}, false);
        check_close("model, loss", loss, want, 1e-6);
        CHECK(loss == batch.forward(evaluator));
        CHECK(same_bits(g, gradients(trainer_)));
        CHECK_THROWS_AS(trainer_.backward(), std::logic_error);
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
                mean += small.forward(&batch.tokens[at], &batch.targets[at], each, 37,
                                      training_pass(4 * each * 37, 3, i * each)) /
                        4;
                small.backward();
            }
            check_close("micro-batches: loss", mean, loss, 1e-6);
            ParamTable table = param_table(c);
            auto off = param_offsets(c);
            Floats got = gradients(small), want = gradients(big);
            for (int i = 0; i < NUM_PARAMS; i++)
                check_close(strf("micro-batches: %s", table[i].name), &got[off[i]], &want[off[i]],
                            table[i].size(), 1e-5);
        }
}

TEST_CASE(
    "what backward computes again instead of keeping it changes no loss and no gradient; relative L2 1e-6") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (int activation : {GELU_TANH, GELU_ERF}) {
            Config c = config(3, 3, 51, 97, 40, arch, activation);
            INFO(variant(c, 0.2f));
            Random r(48);
            Batch batch(r, 3, 37, c.V), next(r, 2, 29, c.V);
            Floats want;
            Doubles losses;
            for (int recompute : {0, 1, 2, 3}) {
                cpu::GPT2 m(c, 3, 37, true, recompute);
                randomise(m, 48);
                m.dropout = 0.2f;
                Doubles now = {batch.forward(m, training_pass(batch.counted()))};
                m.backward();
                now.push_back(batch.forward(m)),
                    now.push_back(next.forward(m, training_pass(batch.counted(), 4, 3)));
                m.backward();
                if (!recompute) want = gradients(m), losses = now;
                CHECK(now == losses);
                auto off = param_offsets(c);
                Floats got = gradients(m);
                for (int i = 0; i < NUM_PARAMS; i++)
                    check_close(strf("recomputation: %s", param_table(c)[i].name), &got[off[i]],
                                &want[off[i]], off[i + 1] - off[i], 1e-6);
            }
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
            want_loss +=
                m.forward(&batch.tokens[b * 35], &batch.targets[b * 35], 1, 35, training_pass(70, 3, b)) *
                (double)counted[b];
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
    Floats got = gradients(m);
    for (int i = 0; i < NUM_PARAMS; i++)
        check_close(strf("chunked head: %s", table[i].name), &got[off[i]], &want[off[i]], table[i].size(),
                    1e-5);
}

TEST_CASE(
    "losses, gradients' norms and weights have the same bits with 1, 2, 3 and 4 threads, over training steps "
    "with dropout") {
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
            now.params = parameters(m), now.moments = piece(m, ADAM_V);
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
    const size_t absurd[][2] = {{SIZE_MAX / 2, 37},
                                {(size_t)1 << 40, 1 << 20},
                                {SIZE_MAX / 48, 1},
                                {1, SIZE_MAX / 1000}};
    for (auto& batch : absurd) {
        const size_t B = batch[0], T = batch[1];
        std::string e = error_of([&] { cpu::GPT2::memory_need(c, B, T, true); });
        CHECK_MESSAGE((contains(e, "address") && !contains(e, "\n")), B, " x ", T, ": ", e);
    }
    CHECK(contains(error_of([&] { cpu::GPT2 m(config(2, 5, 48, 97, 40), 1, 1, true); }),
                   "model: C is 48, wanted a multiple of NH = 5"));
    MemoryNeed trains = cpu::GPT2::memory_need(c, 3, 37, true),
               reads = cpu::GPT2::memory_need(c, 3, 37, false);
    CHECK(trains.params == num_params(c) * 4);
    CHECK(trains.grads == trains.params);
    CHECK(trains.optimizer == 2 * trains.params);
    CHECK(reads.grads + reads.optimizer == 0);
    CHECK(reads.activations < trains.activations);
    CHECK(cpu::GPT2::memory_need(c, 3, 37, true, 1).activations < trains.activations);
    CHECK(cpu::GPT2::memory_need(c, 3, 37, true, 2).activations <
          cpu::GPT2::memory_need(c, 3, 37, true, 1).activations);
}

// ---------------------------------------------------------------------------------------------
// Sizes, initialisation, learning

TEST_CASE("the parameter table has GPT-2's tensors, and presets have the published numbers of parameters") {
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
        CHECK(named[t.id] == &memory[t.memory]);
    }
    cpu::GPT2 m(c, 1, 1, true);
    for (const ParamPiece& t : param_pieces(c)) {
        for (size_t j = 0; j < t.size; j++) m.params.tensor(t.id, t.layer)[j] = (float)(t.file + j);
        for (size_t j = 0; j < t.size; j++) m.grads.tensor(t.id, t.layer)[j] = -(float)(t.file + j);
    }
    Floats params = parameters(m), grads = gradients(m);
    size_t wrong = 0;
    for (size_t j = 0; j < params.size(); j++) wrong += params[j] != (float)j, wrong += grads[j] != -(float)j;
    CHECK(wrong == 0);
}

TEST_CASE(
    "initial weights: N(0, 0.02), residual projections N(0, 0.02/sqrt(2L)), biases 0, LayerNorm 1, padding "
    "0") {
    Config c = config(3, 4, 96, 200, 64);
    cpu::GPT2 m(c, 0, 0, false), same(c, 0, 0, false), other(c, 0, 0, false);
    {
        Threads guard(1);
        same.init_weights(7);
    }
    m.init_weights(7), other.init_weights(8);
    CHECK(same_bits(parameters(m), parameters(same)));
    CHECK(!same_bits(parameters(m), parameters(other)));
    ParamTable table = param_table(c);
    auto off = param_offsets(c);
    Floats all = parameters(m);
    for (int i = 0; i < NUM_PARAMS; i++) {
        INFO(table[i].name);
        bool matrix = i == WTE || i == WPE || i == QKVW || i == ATTPROJW || i == FCW || i == FCPROJW;
        bool residual = i == ATTPROJW || i == FCPROJW, weight = i == LN1W || i == LN2W || i == LNFW;
        const float* w = &all[off[i]];
        if (!matrix) {
            CHECK(std::all_of(w, w + table[i].size(), [=](float f) { return f == (weight ? 1.0f : 0.0f); }));
            continue;
        }
        size_t n = i == WTE ? 200 * 96 : table[i].size();
        double sum = 0, squares = 0, fourth = 0, want = residual ? 0.02 / std::sqrt(6.0) : 0.02;
        for (size_t j = 0; j < n; j++)
            sum += w[j], squares += (double)w[j] * w[j], fourth += std::pow(w[j] / want, 4);
        double mean = sum / (double)n, deviation = std::sqrt(squares / (double)n),
               error = 5 / std::sqrt((double)n);
        CHECK(std::fabs(mean) < want * error);
        CHECK(std::fabs(deviation / want - 1) < error);
        CHECK(std::fabs(fourth / (double)n - 3) < 10 * error);  // of a normal distribution
        CHECK(std::all_of(w + n, w + table[i].size(), [](float f) { return f == 0; }));
        for (size_t l = 1; l < table[i].layers; l++)
            CHECK(memcmp(w, w + l * table[i].per_layer(), 64));  // no two layers alike
    }
}

// bf16 keeps 8 bits: operands are off by up to 1/256, 1/600 in the mean, and errors of many terms average
// out.
TEST_CASE(
    "bf16: loss, logits and gradients are fp32's within rounding: 1e-3, and relative L2 1e-2 of each "
    "tensor") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (float dropout : {0.0f, 0.2f}) {
            Config c = config(2, 3, 51, 97, 70, arch, arch == GPT2_ARCH ? GELU_TANH : GELU_ERF);
            INFO(variant(c, dropout));
            cpu::GPT2 full(c, 3, 67, true), half(c, 3, 67, true, 0, Precision{BF16, true});
            full.init_weights(60), half.init_weights(60);
            full.dropout = half.dropout = dropout;
            Random r(60);
            Batch batch(r, 3, 67, c.V);
            Pass pass = training_pass(batch.counted());
            double want = batch.forward(full, pass), got = batch.forward(half, pass);
            check_close("bf16, loss", got, want, 1e-3);
            CHECK(got != want);
            full.backward(), half.backward();
            ParamTable table = param_table(c);
            auto off = param_offsets(c);
            Floats got_g = gradients(half), want_g = gradients(full);
            for (int i = 0; i < NUM_PARAMS; i++)
                check_close(strf("bf16, gradients: %s", table[i].name), &got_g[off[i]], &want_g[off[i]],
                            table[i].size(), 1e-2);
            Floats a(3 * 67 * 97), b(3 * 67 * 97);
            half.logits(a.data()), full.logits(b.data());
            check_close("bf16, logits", a.data(), b.data(), a.size(), 1e-2);
        }
}

TEST_CASE(
    "bf16: losses, gradients' norms and weights have the same bits with 1, 2, 3 and 4 threads, and after "
    "recomputation") {
    Floats first;
    for (int threads : {1, 2, 3, 4}) {
        Threads guard(threads);
        Config c = config(2, 3, 69, 97, 101);
        cpu::GPT2 m(c, 3, 101, true, threads - 1, Precision{BF16, true});
        m.init_weights(5);
        m.dropout = 0.1f;
        Random r(44);
        Floats seen;
        for (uint32_t step = 0; step < 3; step++) {
            Batch batch(r, 3, step % 2 ? 37 : 101, c.V);
            m.accumulate(batch.tokens.data(), batch.targets.data(), 3, batch.T,
                         training_pass(batch.counted(), step));
            StepResult s = m.step(AdamW(), step + 1);
            seen.push_back((float)s.loss), seen.push_back((float)s.norm);
        }
        Floats p = parameters(m);
        seen.insert(seen.end(), p.begin(), p.end());
        if (threads == 1) first = seen;
        INFO("threads ", threads);
        CHECK(same_bits(seen, first));
    }
}

TEST_CASE("bf16 without fp32 master weights is refused by the flag's name") {
    CHECK(contains(error_of([] { cpu::GPT2::check_precision(Precision{BF16, false}); }), "--master_weights"));
    cpu::GPT2::check_precision(Precision{BF16, true}), cpu::GPT2::check_precision(Precision{FP32, false});
}

TEST_CASE(
    "training on a small repetitive text: from ln V to a loss below 0.5 in 60 steps, GPT-2 and GROVER, fp32 "
    "and bf16") {
    const int V = 12, T = 16, B = 4;
    const char* text = "abcabdabcabeffgahiabcjkl";
    Tokens ids;
    for (int i = 0; i < 200; i++) ids.push_back(text[i % 24] - 'a');
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (Dtype dtype : {FP32, BF16}) {
            cpu::GPT2 m(config(2, 2, 32, V, T, arch), B, T, true, 0, Precision{dtype, true});
            m.init_weights(1);
            Random r(1);
            double first = 0, loss = 0;
            for (uint32_t step = 0; step < 60; step++) {
                Tokens x, y;
                for (int b = 0; b < B; b++) {
                    size_t at = r.below(ids.size() - T - 1);
                    x.insert(x.end(), &ids[at], &ids[at] + T),
                        y.insert(y.end(), &ids[at + 1], &ids[at + 1] + T);
                }
                loss = m.forward(x.data(), y.data(), B, T, training_pass(B * T, step));
                m.backward();
                if (!step) first = loss;
                double norm = m.grad_norm();
                AdamW a;
                a.lr = (float)trainer::learning_rate("cosine", 1e-2, (int)step, 5, 60, 0.1);
                m.update(a, step + 1, norm > 1 ? (float)(1 / norm) : 1.0f);
            }
            INFO("first loss ", first, ", last ", loss);
            CHECK(std::fabs(first - std::log((double)V)) < 0.1);
            CHECK(loss < 0.5);  // "ab" leaves something open only at a window's beginning
        }
}

// ---------------------------------------------------------------------------------------------
// The optimizer

TEST_CASE(
    "AdamW follows its formulas over six steps; decays only matrices and embeddings; leaves gradients and "
    "padding zero") {
    Config c = config(2, 3, 12, 23, 9);
    auto decays = [](int i) {
        return i == WTE || i == WPE || i == QKVW || i == ATTPROJW || i == FCW || i == FCPROJW;
    };
    cpu::GPT2 m(c, 1, 1, true);
    randomise(m, 50);
    auto off = param_offsets(c);
    const size_t n = num_params(c), used = (size_t)c.V * c.C, pad_end = off[WPE];
    Floats start = parameters(m);
    Doubles w(start.begin(), start.end()), m1(n), m2(n);
    AdamW a;
    a.beta1 = 0.85f, a.beta2 = 0.96f, a.eps = 1e-6f, a.weight_decay = 0.3f;
    Random r(51);
    for (uint32_t t = 1; t <= 6; t++) {
        a.lr = 0.01f * (float)t;
        const float scale = t % 2 ? 1.0f : 0.25f;
        Floats g = r.floats(n, t == 3 ? 1e-5 : 0.1);
        std::fill(&g[used], &g[pad_end], 0.0f);
        set_piece(m, GRADS, g);
        m.update(a, t, scale);
        int id = 0;
        for (size_t j = 0; j < n; j++) {
            while (j >= off[id + 1]) id++;
            double gj = (double)g[j] * scale, b1 = a.beta1, b2 = a.beta2;
            m1[j] = b1 * m1[j] + (1 - b1) * gj, m2[j] = b2 * m2[j] + (1 - b2) * gj * gj;
            double m_hat = m1[j] / (1 - std::pow(b1, t)), v_hat = m2[j] / (1 - std::pow(b2, t));
            w[j] -= a.lr *
                    (m_hat / (std::sqrt(v_hat) + a.eps) + (decays(id) ? (double)a.weight_decay * w[j] : 0));
        }
        Floats got = parameters(m), left = gradients(m);
        for (int i = 0; i < NUM_PARAMS; i++)
            check_close(strf("AdamW: %s after step %u", param_table(c)[i].name, t), &got[off[i]], &w[off[i]],
                        off[i + 1] - off[i], 1e-6);
        check_close("AdamW: first moment", piece(m, ADAM_M), m1, 1e-6);
        check_close("AdamW: second moment", piece(m, ADAM_V), m2, 1e-6);
        CHECK(std::all_of(left.begin(), left.end(), [](float f) { return f == 0; }));
        CHECK(std::all_of(&got[used], &got[pad_end], [](float f) { return f == 0; }));
    }
}

TEST_CASE(
    "AdamW's first step is the learning rate in the gradient's direction, whatever its size: the bias is "
    "corrected") {
    cpu::GPT2 m(config(1, 1, 4, 3, 2), 1, 1, true);
    size_t n = num_params(m.cfg);
    Floats g(n);
    for (size_t j = 0; j < n; j++) g[j] = j % 2 ? 1e-3f * (float)(1 + j) : -2.0f;
    set_piece(m, GRADS, g);
    AdamW a;
    a.lr = 0.1f;
    m.update(a, 1, 1);
    Floats w = parameters(m);
    for (size_t j = 0; j < n; j++) CHECK(std::fabs(w[j] - (j % 2 ? -0.1 : 0.1)) < 1e-5);
}

TEST_CASE("after a step all views of a model are updated: tensors, pieces, logits, an older decoder") {
    Config c = config(3, 3, 69, 97, 40);
    Tokens prompt = {5, 7, 11};
    for (Dtype dtype : {FP32, BF16}) {
        INFO("dtype ", (int)dtype);
        cpu::GPT2 m(c, 2, 40, true, 0, {dtype, true}), fresh(c, 2, 40, false, 0, {dtype, true});
        randomise(m, 55);
        cpu::Decoder decoder(m, 1, 40), fresh_decoder(fresh, 1, 40);
        Random r(55);
        Batch batch(r, 2, 40, c.V);
        m.accumulate(batch.tokens.data(), batch.targets.data(), 2, 40, training_pass(batch.counted()));
        Floats before = parameters(m), g = gradients(m);
        AdamW a;
        a.lr = 0.1f;
        CHECK(m.step(a, 1).finite());
        // From moments of zero, and corrected, the first is g and the second g^2.
        Doubles want(before.begin(), before.end()), m1(g.size()), m2(g.size());
        for (const ParamPiece& t : param_pieces(c))
            for (size_t j = t.file; j < t.file + t.size; j++) {
                double decay = t.decay ? (double)a.weight_decay * before[j] : 0;
                want[j] -= (double)a.lr * (g[j] / (std::fabs((double)g[j]) + a.eps) + decay);
                m1[j] = (1 - (double)a.beta1) * g[j], m2[j] = (1 - (double)a.beta2) * g[j] * g[j];
            }
        Floats after = parameters(m), left = gradients(m);
        check_close("AdamW: parameters after a step", after, want, 1e-6);
        check_close("AdamW: first moment", piece(m, ADAM_M), m1, 1e-6);
        check_close("AdamW: second moment", piece(m, ADAM_V), m2, 1e-6);
        CHECK(std::all_of(left.begin(), left.end(), [](float f) { return f == 0; }));
        for (const ParamPiece& t : param_pieces(c))
            CHECK(!memcmp(m.params.tensor(t.id, t.layer), &after[t.file], t.size * sizeof(float)));

        set_piece(fresh, PARAMS, after);
        Floats logits(2 * 40 * (size_t)c.V), fresh_logits(logits.size());
        CHECK(batch.forward(m) == batch.forward(fresh));
        m.logits(logits.data()), fresh.logits(fresh_logits.data());
        CHECK(same_bits(logits, fresh_logits));
        const float* next = decoder.append(prompt.data(), prompt.size());
        const float* want_next = fresh_decoder.append(prompt.data(), prompt.size());
        CHECK(!memcmp(next, want_next, (size_t)c.V * sizeof(float)));
    }
}

TEST_CASE("the gradients' norm is that of all parameters, past the borders of its blocks; relative 1e-12") {
    Config c = config(2, 3, 96, 300, 40);
    cpu::GPT2 m(c, 1, 1, true);
    REQUIRE(num_params(c) > 3 << 16);
    Floats g = Random(52).floats(num_params(c), 0.01);
    set_piece(m, GRADS, g);
    double sum = 0;
    for (float x : g) sum += (double)x * x;
    check_close("gradients' norm", m.grad_norm(), std::sqrt(sum), 1e-12);
    CHECK(same_bits(g, gradients(m)));
    g[12345] = NAN;
    set_piece(m, GRADS, g);
    CHECK(std::isnan(m.grad_norm()));
}

TEST_CASE(
    "the norm that backward sums on its way is that of the gradients, after one batch, two, and a change by "
    "hand; relative 1e-12") {
    for (int L : {1, 3})
        for (Dtype dtype : {FP32, BF16}) {
            cpu::GPT2 m(config(L, 3, 69, 97, 40), 2, 40, true, 0, Precision{dtype, true});
            randomise(m, 56);
            Random r(56);
            auto true_norm = [&] {
                double sum = 0;
                for (float x : gradients(m)) sum += (double)x * x;
                return std::sqrt(sum);
            };
            for (int batches = 1; batches <= 2; batches++) {
                Batch batch(r, 2, 40, m.cfg.V);
                batch.forward(m, training_pass(batch.counted()));
                m.backward();
                double norm = m.grad_norm();
                check_close("gradients' norm", norm, true_norm(), 1e-12);
                check_close("gradients' norm", m.grad_norm(), norm, 1e-12);
            }
            m.each_piece(GRADS, [](float* g, size_t n) {
                for (size_t j = 0; j < n; j++) g[j] *= 3;
            });
            check_close("gradients' norm", m.grad_norm(), true_norm(), 1e-12);
        }
}

TEST_CASE(
    "clipping: a gradient longer than the limit counts as one of the limit's length, a shorter one as it "
    "is") {
    for (double length : {5.0, 0.5}) {
        cpu::GPT2 m(config(1, 1, 4, 3, 2), 1, 1, true);
        size_t n = num_params(m.cfg);
        Floats g = Random(53).floats(n);
        double norm = 0;
        for (float x : g) norm += (double)x * x;
        for (float& x : g) x *= (float)(length / std::sqrt(norm));
        set_piece(m, GRADS, g);
        double measured = m.grad_norm(), limit = 1;
        AdamW a;
        m.update(a, 1, measured > limit ? (float)(limit / measured) : 1.0f);  // as trainer.h does
        Doubles want(n);
        for (size_t j = 0; j < n; j++) want[j] = 0.1 * g[j] * std::min(1.0, limit / length);
        check_close("clipping", piece(m, ADAM_M), want, 1e-6);
    }
}

TEST_CASE(
    "learning-rate schedules: linear warm-up, then constant, cosine, linear or wsd to the end; unknown names "
    "are refused") {
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

// ---------------------------------------------------------------------------------------------
// Generation

TEST_CASE(
    "the decoder's logits are the full forward pass's after every prefix, in chunks of any size; relative L2 "
    "1e-5") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (int activation : {GELU_TANH, GELU_ERF}) {
            const size_t N = 3, T = 140;
            Config c = config(2, 3, 48, 97, 150, arch, activation);
            if (activation == GELU_ERF) c.eps = 1e-2f;
            INFO(variant(c, 0));
            cpu::GPT2 m(c, N, T, false);
            randomise(m, 60);
            Random r(60);
            Batch batch(r, N, T, c.V);
            batch.forward(m);
            const size_t V = (size_t)c.V;
            Floats want(N * T * V);
            m.logits(want.data());
            cpu::Decoder decoder(m, N, T);
            CHECK(decoder.capacity() == T);
            for (size_t chunk : {1, 2, 5, 63, 64, 65, 128, 129, 140, 0}) {  // 0: chunks of changing size
                INFO("chunk ", chunk);
                decoder.reset();
                for (size_t t = 0, n; t < T; t += n) {
                    n = std::min(T - t, chunk ? chunk : 1 + r.below(70));
                    Tokens next;
                    for (size_t s = 0; s < N; s++)
                        next.insert(next.end(), &batch.tokens[s * T + t], &batch.tokens[s * T + t] + n);
                    const float* logits = decoder.append(next.data(), n);
                    CHECK(decoder.length() == t + n);
                    for (size_t s = 0; s < N; s++)
                        check_close("decoder, logits", logits + s * V, &want[(s * T + t + n - 1) * V], V,
                                    1e-5);
                }
                CHECK_THROWS_AS(decoder.append(batch.tokens.data(), 1), std::logic_error);
            }
            CHECK(cpu::Decoder(m, 1, 1000).capacity() ==
                  150);  // never more than the positions the model knows
        }
}

// As for training in bf16: operands are off by up to 1/256, and the errors of many terms average out.
TEST_CASE(
    "a decoder in bf16 is the fp32 decoder with rounded weights, within the rounding of what they multiply; "
    "relative L2 1e-2") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH}) {
        Config c = config(2, 3, 51, 97, 40, arch);
        cpu::GPT2 full(c, 0, 0, false), half(c, 0, 0, false, 0, Precision{BF16, true});
        randomise(full, 71);
        set_piece(half, PARAMS, parameters(full));
        set_piece(full, PARAMS, rounded(parameters(full)));
        CHECK(same_bits(piece(half, PARAMS), parameters(full)));
        CHECK(cpu::GPT2::memory_need(c, 0, 0, false, 0, half.precision).params == num_params(c) * 2);
        const size_t N = 3, T = 9;
        cpu::Decoder a(full, N, T), b(half, N, T);
        Random r(71);
        Tokens tokens = r.tokens(N * T, c.V);
        for (size_t at = 0, n = 5; at < T; at += n, n = 1) {  // a prompt, then token by token
            Tokens next;
            for (size_t s = 0; s < N; s++)
                next.insert(next.end(), &tokens[s * T + at], &tokens[s * T + at] + n);
            check_close("bf16 decoder, logits", b.append(next.data(), n), a.append(next.data(), n),
                        N * (size_t)c.V, 1e-2);
        }
    }
}

TEST_CASE("a decoder opened from a file is one of a model with the file's parameters, fp32 and bf16") {
    TempDir dir;
    Config c = config(2, 3, 51, 97, 40, GROVER_ARCH);
    cpu::GPT2 full(c, 0, 0, false);
    randomise(full, 72);
    trainer::save_model(full, dir / "model.bin");
    Tokens tokens = Random(72).tokens(2 * 9, c.V);
    for (Dtype dtype : {FP32, BF16}) {
        cpu::GPT2 m(c, 0, 0, false, 0, Precision{dtype, true});
        set_piece(m, PARAMS, parameters(full));
        cpu::Decoder want(m, 2, 40);
        ModelReader reader(dir / "model.bin");
        std::unique_ptr<Decoder> decoder = open_decoder(reader, 2, dtype);
        CHECK(decoder->capacity() == 40);
        const float *got = decoder->append(tokens.data(), 9), *logits = want.append(tokens.data(), 9);
        CHECK(decoder->length() == 9);
        CHECK(!memcmp(got, logits, 2 * (size_t)c.V * sizeof(float)));
    }
}

TEST_CASE(
    "a sequence's logits have the same bits however many are written beside it, and with any number of "
    "threads, fp32 and bf16") {
    Config c = config(2, 3, 51, 97, 80);  // an odd width, so that no vector divides a row
    cpu::GPT2 full(c, 0, 0, false);
    randomise(full, 61);
    for (Dtype dtype : {FP32, BF16}) {
        cpu::GPT2 m(c, 0, 0, false, 0, Precision{dtype, true});
        set_piece(m, PARAMS, parameters(full));
        Tokens prompt = Random(61).tokens(70, c.V);
        std::vector<Floats> first;
        for (int threads : {1, 2, 3})
            for (size_t N : {1, 2, 5, 9}) {
                Threads guard(threads);
                cpu::Decoder decoder(m, N, 80);
                std::vector<Floats> logits;
                size_t t = 0;
                for (size_t n : {1, 66, 1, 2}) {
                    Tokens next;
                    for (size_t s = 0; s < N; s++)
                        for (size_t i = 0; i < n; i++) next.push_back((prompt[t + i] + (int)s) % c.V);
                    const float* l = decoder.append(next.data(), n);
                    logits.push_back(Floats(l, l + c.V));
                    t += n;
                }
                if (first.empty()) first = logits;
                for (size_t i = 0; i < logits.size(); i++) CHECK(same_bits(logits[i], first[i]));
            }
    }
}

namespace {

// Stands in for a model: the next token is always the last one plus one, modulo 100. Notes what it was asked.
struct CountingDecoder : ::Decoder {
    size_t N, limit, held = 0;
    std::vector<size_t> appended, resets_at;
    Floats logits;
    CountingDecoder(size_t N_, size_t limit_) : N(N_), limit(limit_), logits(N_ * 100) {}
    size_t length() const override { return held; }
    size_t capacity() const override { return limit; }
    void reset() override { resets_at.push_back(appended.size()), held = 0; }
    const float* append(const int* tokens, size_t n) override {
        held += n, appended.push_back(n);
        REQUIRE(held <= limit);
        for (size_t s = 0; s < N; s++)
            for (int v = 0; v < 100; v++)
                logits[s * 100 + (size_t)v] = v == (tokens[s * n + n - 1] + 1) % 100 ? 50.0f : 0.0f;
        return logits.data();
    }
};

}  // namespace

TEST_CASE("generate goes on past the context with its second half, and computes each token once otherwise") {
    CountingDecoder decoder(2, 8);
    std::vector<Tokens> out(2);
    SampleOptions greedy;
    greedy.temperature = 0;
    generate(decoder, 2, {10, 11, 12}, 100, 99, 20, 1, greedy,
             [&](size_t s, int token) { out[s].push_back(token); });
    for (auto& text : out) {
        REQUIRE(text.size() == 20);
        for (int i = 0; i < 20; i++) CHECK(text[(size_t)i] == 13 + i);
    }
    // The prompt, five single tokens until 8 are held, then 4 of the last and four single ones, and so on.
    CHECK(decoder.appended ==
          std::vector<size_t>{3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1});
    CHECK(decoder.resets_at == std::vector<size_t>{0, 6, 11, 16});

    CountingDecoder one(1, 1);  // even a context of one token works
    Tokens text;
    generate(one, 1, {5}, 100, 99, 4, 1, greedy, [&](size_t, int token) { text.push_back(token); });
    CHECK(text == Tokens{6, 7, 8, 9});
    std::string e =
        error_of([&] { generate(decoder, 2, Tokens(9, 1), 100, 99, 1, 1, greedy, [](size_t, int) {}); });
    CHECK(contains(e, "the prompt has 9 tokens, the context takes 1 to 8"));
    CHECK(contains(error_of([&] { generate(decoder, 2, {}, 100, 99, 1, 1, greedy, [](size_t, int) {}); }),
                   "the prompt has 0 tokens"));
}

TEST_CASE("generate ends a sequence at end-of-text, shows nothing of it, and stops when all have ended") {
    CountingDecoder decoder(3, 64);
    SampleOptions greedy;
    greedy.temperature = 0;
    Tokens text;
    generate(decoder, 3, {40}, 100, 43, 1000, 1, greedy, [&](size_t, int token) { text.push_back(token); });
    CHECK(text == Tokens{41, 41, 41, 42, 42, 42});
    CHECK(decoder.appended.size() == 3);

    // Real draws: sequences end at different times, and none of them says anything afterwards.
    Config c = config(1, 2, 16, 5, 12);
    cpu::GPT2 m(c, 0, 0, false);
    m.init_weights(3);
    cpu::Decoder real(m, 6, 12);
    SampleOptions plain;
    plain.temperature = 1;
    std::vector<Tokens> out(6);
    generate(real, 6, {4}, 5, 4, 300, 11, plain, [&](size_t s, int token) { out[s].push_back(token); });
    size_t shortest = 1000, longest = 0;
    for (auto& t : out) {
        CHECK(std::count(t.begin(), t.end(), 4) == 0);
        shortest = std::min(shortest, t.size()), longest = std::max(longest, t.size());
    }
    CHECK(shortest < longest);
    CHECK(longest < 100);  // one in five tokens ends it
}

TEST_CASE(
    "generated text is what the full forward pass would choose, past the context too, and depends neither on "
    "its neighbours nor on the number of threads") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH}) {
        const size_t capacity = 16;
        Config c = config(2, 3, 48, 40, (int)capacity, arch);
        cpu::GPT2 m(c, 1, capacity, false);
        randomise(m, 62);
        auto write = [&](size_t N, uint64_t seed, float temperature) {
            cpu::Decoder decoder(m, N, capacity);
            SampleOptions o;
            o.temperature = temperature, o.top_k = 20, o.top_p = 0.95f;
            std::vector<Tokens> out(N);
            generate(decoder, N, {1, 2, 3}, c.V, -1, 50, seed, o,
                     [&](size_t s, int token) { out[s].push_back(token); });
            return out;
        };
        auto one = write(1, 5, 1), five = write(5, 5, 1), again = write(5, 5, 1), other = write(5, 6, 1);
        CHECK(one[0] == five[0]);
        CHECK(five == again);
        CHECK(five[0] != five[1]);
        CHECK(five != other);
        auto many = write(37, 5, 1);  // more than draw side by side
        for (int threads : {1, 2, 3}) {
            Threads guard(threads);
            CHECK((write(37, 5, 1) == many));
            CHECK((write(5, 5, 1) == std::vector<Tokens>(many.begin(), many.begin() + 5)));
        }

        Tokens window = {1, 2, 3}, want, unused(capacity, 0);
        Floats logits(capacity * (size_t)c.V);
        for (int i = 0; i < 50; i++) {
            if (window.size() > capacity)
                window.erase(window.begin(), window.end() - (ptrdiff_t)capacity / 2);
            m.forward(window.data(), unused.data(), 1, window.size());
            m.logits(logits.data());
            const float* last = &logits[(window.size() - 1) * (size_t)c.V];
            want.push_back((int)(std::max_element(last, last + c.V) - last));
            window.push_back(want.back());
        }
        CHECK(write(1, 5, 0)[0] == want);
    }
}

TEST_CASE("the sampler draws from softmax(logits / temperature) cut to top_k, then to top_p") {
    const int V = 9;
    const float logits[V] = {0.5f, 2.0f, -1.0f, 1.9f, 0.0f, -3.0f, 1.2f, 0.7f, -0.4f};
    struct {
        float temperature;
        int top_k;
        float top_p;
    } cases[] = {{1, 0, 1},    {0.5f, 0, 1}, {2, 0, 1},       {1, 3, 1}, {1, 1, 1},     {1, 100, 1},
                 {1, 0, 0.5f}, {1, 0, 0.9f}, {0.8f, 5, 0.7f}, {1, 0, 0}, {3, 4, 0.999f}};
    Sampler sampler;
    for (auto& o : cases) {
        INFO("temperature ", o.temperature, " top_k ", o.top_k, " top_p ", o.top_p);
        // What is allowed, from the definitions: sort, cut, normalise.
        std::vector<int> order(V);
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
        if (o.top_k && o.top_k < V) order.resize((size_t)o.top_k);
        Doubles want(V);
        double total = 0, reached = 0;
        for (int v : order) total += std::exp((double)logits[v] / o.temperature);
        for (int v : order) {
            if (reached >= o.top_p && reached > 0) break;
            want[(size_t)v] = std::exp((double)logits[v] / o.temperature) / total, reached += want[(size_t)v];
        }
        const int draws = 100000;
        std::vector<int> times(V);
        SampleOptions options;
        options.temperature = o.temperature, options.top_k = o.top_k, options.top_p = o.top_p;
        Random r(70);
        for (int i = 0; i < draws; i++) times[(size_t)sampler.pick(logits, V, options, r.uniform())]++;
        double chi_square = 0;
        for (size_t v = 0; v < V; v++) {
            double expected = draws * want[v] / reached;
            if (expected == 0) CHECK(times[v] == 0);
            else chi_square += std::pow(times[v] - expected, 2) / expected;
        }
        CHECK(chi_square < 35);  // at most 8 degrees of freedom: once in 30,000 by chance
    }
}

TEST_CASE(
    "the sampler: temperature 0 takes the most likely token; each token owns its share of u, after a cut by "
    "likelihood") {
    Sampler sampler;
    SampleOptions o;
    const float logits[5] = {std::log(0.2f), std::log(0.4f), std::log(0.1f), std::log(0.3f), -50};
    o.temperature = 0;
    for (double u : {0.0, 0.5, 0.999999}) CHECK(sampler.pick(logits, 5, o, u) == 1);
    o.temperature = 1;
    int times[5] = {}, share[5] = {200, 400, 100, 300, 0};
    for (int i = 0; i < 1000; i++) times[sampler.pick(logits, 5, o, (i + 0.5) / 1000)]++;
    for (int v = 0; v < 5; v++) CHECK(times[v] == share[v]);
    o.top_k = 4;
    struct {
        double u;
        int token;
    } picks[] = {{0, 1},     {0.399, 1}, {0.401, 3}, {0.699, 3},
                 {0.701, 0}, {0.899, 0}, {0.901, 2}, {1 - 0x1p-53, 2}};
    for (auto& p : picks) CHECK(sampler.pick(logits, 5, o, p.u) == p.token);
    o.top_p = 0.65f;  // 0.4 + 0.3 reach it
    CHECK(sampler.pick(logits, 5, o, 0.57) == 1);
    CHECK(sampler.pick(logits, 5, o, 0.58) == 3);
    CHECK(sampler.pick(logits, 5, o, 1 - 0x1p-53) == 3);
    const float equal[3] = {1, 1, 1};  // ties fall to the lower token
    o = SampleOptions();
    o.top_k = 1;
    CHECK(sampler.pick(equal, 3, o, 0.9) == 0);
    const float far[3] = {-2000, 3000, -INFINITY};
    o = SampleOptions();
    o.temperature = 1e-3f;
    CHECK(sampler.pick(far, 3, o, 0.9999) == 1);
    CHECK(sampler.pick(far, 1, o, 0.5) == 0);  // a vocabulary of one
}

TEST_CASE(
    "the sampler: of a large vocabulary top_p draws what it would from all tokens in order of likelihood") {
    const int V = 5000;
    for (double sd : {0.0, 1.0, 3.0, 5.0}) {  // from flat to peaked
        Floats logits = Random(73).floats(V, sd);
        std::vector<int> order(V);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](int a, int b) { return logits[(size_t)a] > logits[(size_t)b]; });
        double total = 0;
        for (float l : logits) total += std::exp((double)l);
        for (float top_p : {0.001f, 0.3f, 0.9f, 0.999f}) {
            INFO("standard deviation ", sd, " top_p ", top_p);
            Doubles reached;  // up to and with each token in order
            for (double sum = 0; reached.empty() || sum < top_p * total;)
                reached.push_back(sum += std::exp((double)logits[(size_t)order[reached.size()]]));
            SampleOptions o;
            o.temperature = 1, o.top_p = top_p;
            Sampler sampler;
            for (double u : {0.0, 0.1, 0.5, 0.77, 0.9, 0.99, 1 - 0x1p-40}) {
                size_t i = (size_t)(std::upper_bound(reached.begin(), reached.end(), u * reached.back()) -
                                    reached.begin());
                CHECK(sampler.pick(logits.data(), V, o, u) == order[std::min(i, reached.size() - 1)]);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Files

namespace {

Config small_config() {
    Config c = config(2, 2, 8, 11, 5, GROVER_ARCH, GELU_ERF);
    c.Vp = 16;
    return c;
}

// Every way to read a model file that a program has.
std::string reading_error(const std::string& path) {
    return error_of([&] {
        ModelReader reader(path);
        cpu::GPT2 m(reader.cfg, 0, 0, false);
        trainer::load_model(m, reader);
    });
}

size_t files_in(const std::string& dir) {
    return (size_t)std::distance(std::filesystem::directory_iterator(dir),
                                 std::filesystem::directory_iterator());
}

// No file may grow beyond so many bytes, as on a full disk.
struct FullDisk {
    rlimit before;
    void (*handler)(int);
    explicit FullDisk(rlim_t bytes) {
        handler = signal(SIGXFSZ, SIG_IGN);
        getrlimit(RLIMIT_FSIZE, &before);
        rlimit now = {bytes, before.rlim_max};
        setrlimit(RLIMIT_FSIZE, &now);
    }
    ~FullDisk() { setrlimit(RLIMIT_FSIZE, &before), signal(SIGXFSZ, handler); }
};

}  // namespace

TEST_CASE("bf16 keeps every bf16 number, rounds others to the nearest, ties to even, and NaN stays NaN") {
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
    cpu::GPT2 m(c, 0, 0, false), back(c, 0, 0, false);
    randomise(m, 81);
    std::string path = dir / "model.bin";
    trainer::save_model(m, path);
    CHECK(files_in(dir.path) == 1);  // no temporary file is left
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

    auto write_bf16 = [&](cpu::GPT2& model, const std::string& to) {
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
    CHECK(files_in(dir.path) == 3);
}

TEST_CASE("a model file is a header and the tensors in order, and the same when read and saved again") {
    TempDir dir;
    for (Config c : {small_config(), config(3, 3, 9, 20, 7)}) {
        INFO(c.text());
        cpu::GPT2 m(c, 0, 0, false), back(c, 1, 1, true), half(c, 0, 0, false, 0, Precision{BF16, true});
        randomise(m, 88);
        trainer::save_model(m, dir / "model.bin");
        std::vector<int32_t> header = model_header(c, MODEL_FP32);
        std::string want((const char*)header.data(), 1024);
        ParamTable table = param_table(c);
        for (int id = 0; id < NUM_PARAMS; id++)
            for (size_t l = 0; l < table[id].layers; l++)
                want.append((const char*)m.params.tensor(id, l), table[id].per_layer() * sizeof(float));
        CHECK((read_file(dir / "model.bin") == want));

        ModelReader reader(dir / "model.bin"), once_more(dir / "model.bin");
        trainer::load_model(back, reader), trainer::load_model(half, once_more);
        trainer::save_model(back, dir / "again.bin");
        CHECK((read_file(dir / "again.bin") == want));
        size_t wrong = 0;
        for (const ParamPiece& t : param_pieces(c)) {
            const float* x = m.params.tensor(t.id, t.layer);
            const simd::bf16* h = half.params_bf16.tensor(t.id, t.layer);
            for (size_t j = 0; j < t.size; j++) wrong += h[j] != float_to_bf16(x[j]);
        }
        CHECK(wrong == 0);
    }
}

TEST_CASE(
    "files as llm.c writes them, fp32 and bf16, load: seven header words, then its sixteen tensors in its "
    "order") {
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
        cpu::GPT2 m(reader.cfg, 0, 0, false);
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
    cpu::GPT2 m(small_config(), 0, 0, false);
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

TEST_CASE(
    "LayerNorm's epsilon stands in the model file's header as a float's bits, 0 for 1e-5; impossible bits "
    "are refused") {
    TempDir dir;
    Config c = small_config();
    const std::string path = dir / "model.bin";
    for (float eps : {1e-12f, 1e-6f, 1e-5f, 1e-3f, 1.0f}) {
        c.eps = eps;
        cpu::GPT2 m(c, 0, 0, false);
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

TEST_CASE("model files truncated anywhere, with trailing bytes, with NaN, or missing are refused by name") {
    TempDir dir;
    Config c = small_config();
    cpu::GPT2 m(c, 0, 0, false);
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

TEST_CASE("a full disk leaves the old model and state whole, and no temporary file") {
    TempDir dir;
    cpu::GPT2 m(config(2, 2, 16, 11, 5), 1, 1, true), next(m.cfg, 1, 1, true);
    randomise(m, 84), randomise(next, 85);
    std::string path = dir / "model.bin", state = dir / "state.bin";
    trainer::save_model(m, path), trainer::save_state(m, {}, "a=1\n", state);
    const std::string old = read_file(path), old_state = read_file(state);
    for (rlim_t room : {(rlim_t)0, (rlim_t)100, (rlim_t)1024, (rlim_t)5000, (rlim_t)(old.size() - 1)}) {
        std::string e, e_state;
        {
            FullDisk disk(room);
            e = error_of([&] { trainer::save_model(next, path); });
            e_state = error_of([&] { trainer::save_state(next, {}, "a=1\n", state); });
        }
        CHECK((contains(e, path + ": cannot write") && contains(e, "untouched")));
        CHECK((contains(e_state, state + ": cannot write") && contains(e_state, "untouched")));
        CHECK((read_file(path) == old));
        CHECK((read_file(state) == old_state));
        CHECK(files_in(dir.path) == 2);
    }
    CHECK(contains(error_of([&] { trainer::save_model(m, dir / "no/such/folder.bin"); }),
                   "no/such/folder.bin: cannot write"));
}

TEST_CASE("the training state comes back as it was: progress, settings, moments") {
    TempDir dir;
    cpu::GPT2 m(small_config(), 1, 1, true), back(m.cfg, 1, 1, true);
    randomise(m, 86), randomise(back, 86);
    Floats moments = Random(86).floats(2 * num_params(m.cfg));
    set_piece(m, GRADS, Floats(moments.begin(), moments.begin() + (ptrdiff_t)num_params(m.cfg)));
    AdamW a;
    m.update(a, 1, 1);
    set_piece(back, PARAMS, parameters(m));
    trainer::Progress p;
    p.step = 1234, p.position = ((uint64_t)1 << 40) + 17, p.best_val = 2.25, p.best_step = 1200;
    p.smoothed = 0.1, p.smoothed_weight = 0.7, p.seconds = 99.5, p.pending = true;
    p.last = {1.5, 1.25, 0.5, 3e-4, 0.125};
    trainer::save_state(m, p, "batch_size=4\nprompt=قفا نبك\n", dir / "state.bin");
    trainer::StateReader reader(dir / "state.bin");
    CHECK(reader.settings == "batch_size=4\nprompt=قفا نبك\n");
    CHECK(reader.progress.step == p.step);
    CHECK(reader.progress.position == p.position);
    CHECK(reader.progress.best_val == p.best_val);
    CHECK(reader.progress.best_step == p.best_step);
    CHECK(reader.progress.smoothed == p.smoothed);
    CHECK(reader.progress.smoothed_weight == p.smoothed_weight);
    CHECK(reader.progress.seconds == p.seconds);
    CHECK(reader.progress.pending);
    CHECK(!memcmp(&reader.progress.last, &p.last, sizeof p.last));
    reader.load_moments(back);
    CHECK(same_bits(piece(m, ADAM_M), piece(back, ADAM_M)));
    CHECK(same_bits(piece(m, ADAM_V), piece(back, ADAM_V)));
}

namespace {

// The state file's checksum as it was made first: of whole sections, word by word, the last one filled up
// with zeros.
uint64_t first_checksum(const std::vector<std::string>& sections) {
    uint64_t h = 0x243F6A8885A308D3u;
    for (const std::string& section : sections)
        for (size_t i = 0; i < section.size(); i += 8) {
            uint64_t word = 0;
            memcpy(&word, &section[i], std::min<size_t>(8, section.size() - i));
            h = (h ^ word) * 0x9E3779B97F4A7C15u, h ^= h >> 29;
        }
    return h;
}
std::string bytes_of(const Floats& x) { return {(const char*)x.data(), x.size() * sizeof(float)}; }

}  // namespace

TEST_CASE("a training state loads, and is the same, as when the checksum took sections whole") {
    TempDir dir;
    Config c = config(3, 1, 3, 3, 1);
    c.Vp = 3;
    size_t odd = 0;  // pieces that end within a word
    for (const ParamPiece& t : param_pieces(c)) odd += t.size % 2;
    REQUIRE((odd > 20 && num_params(c) % 2 == 1));
    cpu::GPT2 m(c, 1, 1, true), back(c, 1, 1, true);
    randomise(m, 89);
    set_piece(m, GRADS, Random(89).floats(num_params(c)));
    m.update(AdamW(), 1, 1);
    trainer::Progress p;
    p.step = 7, p.best_val = 1.5;
    const std::string settings = "a=1\nb=2\nc";  // ends within a word, too
    trainer::save_state(m, p, settings, dir / "state.bin");
    const std::string saved = read_file(dir / "state.bin");
    const std::vector<std::string> sections = {saved.substr(0, 1024), settings, bytes_of(piece(m, ADAM_M)),
                                               bytes_of(piece(m, ADAM_V)), bytes_of(parameters(m))};
    uint64_t check = first_checksum(sections);
    std::string first = sections[0] + sections[1] + sections[2] + sections[3];
    first.append((const char*)&check, 8);
    CHECK((saved == first));
    write_file(dir / "first.bin", first);
    set_piece(back, PARAMS, parameters(m));
    CHECK(error_of([&] { trainer::StateReader(dir / "first.bin").load_moments(back); }).empty());
    CHECK(same_bits(piece(m, ADAM_M), piece(back, ADAM_M)));
    CHECK(same_bits(piece(m, ADAM_V), piece(back, ADAM_V)));
}

TEST_CASE("the state's checksum is the same however its sections are cut into pieces") {
    Random r(92);
    for (int trial = 0; trial < 200; trial++) {
        std::vector<std::string> sections(3);
        trainer::Checksum sum;
        for (std::string& section : sections) {
            for (size_t n = r.below(70); n; n--) section += (char)r.below(256);
            for (size_t i = 0, n; i < section.size(); i += n) {
                n = std::min(section.size() - i, r.below(4) ? r.below(20) : 0);
                sum.add(section.data() + i, n);
            }
            sum.end_section();
        }
        CHECK(sum.value() == first_checksum(sections));
    }
}

TEST_CASE(
    "a training state with any byte changed, cut short, prolonged, or beside another model is refused by "
    "name") {
    TempDir dir;
    Config c = config(1, 1, 2, 3, 2);
    c.Vp = 3;
    cpu::GPT2 m(c, 1, 1, true);
    randomise(m, 87);
    Floats g(num_params(c));
    std::iota(g.begin(), g.end(), 1.0f);
    set_piece(m, GRADS, g);
    m.update(AdamW(), 1, 1);
    trainer::Progress p;
    p.step = 5;
    trainer::save_state(m, p, "a=1\n", dir / "state.bin");
    const std::string good = read_file(dir / "state.bin"), path = dir / "bad.bin";
    auto error_at = [&](const std::string& file) {
        return error_of([&] {
            trainer::StateReader reader(file);
            reader.load_moments(m);
        });
    };
    CHECK(error_at(dir / "state.bin").empty());
    size_t accepted = 0, unnamed = 0;
    for (size_t i = 0; i < good.size(); i++) {
        std::string damaged = good;
        damaged[i] = (char)(damaged[i] ^ (1 << i * 5 % 8));
        write_file(path, damaged);
        std::string e = error_at(path);
        accepted += e.empty(), unnamed += !contains(e, path);
    }
    CHECK(accepted == 0);
    CHECK(unnamed == 0);
    for (size_t n : {(size_t)0, (size_t)1023, (size_t)1024, (size_t)1028, good.size() - 8, good.size() - 1}) {
        write_file(path, good.substr(0, n));
        CHECK((contains(error_at(path), path)));
    }
    write_file(path, good + "x");
    CHECK(contains(error_at(path), "trailing data"));
    for (size_t at : {(size_t)0, num_params(c) - 1}) {  // the checksum covers the model beside it
        Floats before = parameters(m), changed = before;
        changed[at] = std::nextafter(before[at], 10.0f);
        set_piece(m, PARAMS, changed);
        CHECK(contains(error_at(dir / "state.bin"), "checksum does not match"));
        set_piece(m, PARAMS, before);
    }
    trainer::StateReader reader(dir / "state.bin");
    cpu::GPT2 other(config(1, 1, 4, 3, 2), 1, 1, true);
    CHECK(
        contains(error_of([&] { reader.load_moments(other); }), strf("holds %zu parameters", num_params(c))));
}

TEST_CASE("training goes on from model and state files with the same bits as without a stop") {
    TempDir dir;
    Config c = config(2, 3, 24, 31, 19);
    auto train = [&](cpu::GPT2& m, uint32_t from, uint32_t to) {
        Doubles losses;
        m.dropout = 0.2f;
        for (uint32_t step = from; step < to; step++) {
            Random r(step);
            Batch batch(r, 3, 19, c.V);
            losses.push_back(batch.forward(m, training_pass(batch.counted(), step)));
            m.backward();
            m.update(AdamW(), step + 1, 1);
        }
        return losses;
    };
    cpu::GPT2 unbroken(c, 3, 19, true), stopped(c, 3, 19, true), resumed(c, 3, 19, true);
    unbroken.init_weights(1), stopped.init_weights(1);
    Doubles want = train(unbroken, 0, 6);
    train(stopped, 0, 3);
    trainer::save_model(stopped, dir / "model.bin"), trainer::save_state(stopped, {}, "", dir / "state.bin");
    ModelReader reader(dir / "model.bin");
    trainer::load_model(resumed, reader);
    trainer::StateReader state(dir / "state.bin");
    state.load_moments(resumed);
    Doubles got = train(resumed, 3, 6);
    CHECK(got == Doubles(want.begin() + 3, want.end()));
    CHECK(same_bits(parameters(unbroken), parameters(resumed)));
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
    ref::Model model(m);
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
    CHECK(trainer::evaluate(m, loader, B, T, 2, nullptr, x, y).tokens == 2 * B * T);
}

namespace {

// A machine of as much memory as the test says.
struct SmallMachine : cpu::GPT2 {
    using cpu::GPT2::GPT2;
    static inline size_t free_bytes = 0;
    static size_t memory_available() { return free_bytes; }
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

}  // namespace

TEST_CASE(
    "where memory is short, training recomputes more, then takes smaller batches, says so, and learns the "
    "same") {
    TempDir dir;
    Tokenizer tokenizer = Tokenizer::characters("abcdefghij");
    tokenizer.save(dir / "tokenizer.bin");
    std::vector<uint16_t> text;
    for (int t : Random(91).tokens(700, tokenizer.vocab_size())) text.push_back((uint16_t)t);
    write_tokens(dir / "train.bin", text), write_tokens(dir / "val.bin", text);
    Config c = config(4, 2, 32, tokenizer.vocab_size(), 64);
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
        std::vector<std::string> words = {"train_gpt2",
                                          "-e",
                                          file,
                                          "--data",
                                          data,
                                          "-o",
                                          dir / "run",
                                          "--overwrite",
                                          "--max_steps",
                                          "2",
                                          "--total_batch_size",
                                          "512"};
        words.insert(words.end(), more.begin(), more.end());
        std::vector<char*> argv;
        for (std::string& w : words) argv.push_back(&w[0]);
        SmallMachine::free_bytes = free_bytes;
        return printed(
            [&] { trainer::Run<SmallMachine, cpu::Decoder>((int)argv.size(), argv.data()).main(); });
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
    CHECK(contains(refused, "this run needs " + human_bytes((double)need(8, 0)) + " of memory, " +
                                human_bytes((double)need(8, 3) - 1) +
                                " are free; --batch_size 7 --recompute 3 would fit"));
    CHECK(contains(run(need(1, 3) - 1, rest), "not even --batch_size 1 would fit"));
    CHECK(!contains(run(need(8, 0) - poem, {"-b", "8", "--sample_every", "0"}), "memory is short"));
}
