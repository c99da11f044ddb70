// reference.h - GPT-2 in plain loops over doubles. Read this first.
//
// The whole model as its papers define it, forward and backward, with no thought for speed: no matrix
// library, no vectors, no threads, every intermediate value kept. The trainers compute the same and answer to
// it: test_gpt2.cpp compares train_gpt2.cpp with this file, layer by layer and as a whole, and checks this
// file itself against finite differences.
//
// A layer is two functions. Forward computes its output y from its inputs, such as x and w; the values of a
// tensor are x.v. Backward receives the derivative of the loss with respect to the output, y.d, and adds to
// x.d, w.d and b.d what the chain rule says: for each input i, the sum over all outputs j of y.d[j] times the
// derivative of output j by input i. It adds because a value that is used in two places (a residual
// connection, the tied embedding) has a term from each.
//
// Shapes: B sequences of T tokens, M = B*T rows (one a token), C channels, NH heads of hs = C/NH channels,
// V vocabulary. Row m of a tensor (M,C) begins at element m*C; matrices are (out, in).
#pragma once

#include <cmath>
#include <vector>

#include "lib/gpt2.h"
#include "lib/model.h"
#include "lib/rng.h"

namespace ref {

using Doubles = std::vector<double>;
using Tokens = std::vector<int>;

// Values, and the derivative of the loss with respect to each.
struct Tensor {
    Doubles v, d;
    Tensor() = default;
    explicit Tensor(size_t n) : v(n), d(n) {}
    template <class Number>
    Tensor(const Number* x, size_t n) : v(x, x + n), d(n) {}
    explicit Tensor(const std::vector<float>& x) : Tensor(x.data(), x.size()) {}
    size_t size() const { return v.size(); }
};

// ---------------------------------------------------------------------------------------------
// Layers

// y (M,C): the vector of the token plus the vector of its position in the sequence.
inline void embedding_forward(Tensor& y, const Tensor& wte, const Tensor& wpe, const Tokens& tokens, size_t T,
                              size_t C) {
    for (size_t m = 0; m < tokens.size(); m++)
        for (size_t c = 0; c < C; c++)
            y.v[m * C + c] = wte.v[(size_t)tokens[m] * C + c] + wpe.v[m % T * C + c];
}
inline void embedding_backward(const Tensor& y, Tensor& wte, Tensor& wpe, const Tokens& tokens, size_t T,
                               size_t C) {
    for (size_t m = 0; m < tokens.size(); m++)
        for (size_t c = 0; c < C; c++) {
            wte.d[(size_t)tokens[m] * C + c] += y.d[m * C + c];
            wpe.d[m % T * C + c] += y.d[m * C + c];
        }
}

// y (M,N) = x (M,K) w^T + b. w (N,K), or its first N rows: the output layer uses V of wte's Vp. b (N) or
// null.
//     y[m,n] = b[n] + sum over k of x[m,k] w[n,k],  so
//     x.d[m,k] gets the sum over n of y.d[m,n] w[n,k],  w.d[n,k] the sum over m of y.d[m,n] x[m,k]
inline void linear_forward(Tensor& y, const Tensor& x, const Tensor& w, const Tensor* b, size_t K, size_t N) {
    for (size_t m = 0; m < x.size() / K; m++)
        for (size_t n = 0; n < N; n++) {
            double sum = b ? b->v[n] : 0;
            for (size_t k = 0; k < K; k++) sum += x.v[m * K + k] * w.v[n * K + k];
            y.v[m * N + n] = sum;
        }
}
inline void linear_backward(const Tensor& y, Tensor& x, Tensor& w, Tensor* b, size_t K, size_t N) {
    for (size_t m = 0; m < x.size() / K; m++)
        for (size_t n = 0; n < N; n++) {
            double d = y.d[m * N + n];
            if (b) b->d[n] += d;
            for (size_t k = 0; k < K; k++) {
                x.d[m * K + k] += d * w.v[n * K + k];
                w.d[n * K + k] += d * x.v[m * K + k];
            }
        }
}

// The mean and the standard deviation (with eps under the root) of a row of C values.
struct RowStatistics {
    double mean = 0, sigma = 0;
    RowStatistics(const double* x, size_t C, double eps) {
        double variance = 0;
        for (size_t c = 0; c < C; c++) mean += x[c] / (double)C;
        for (size_t c = 0; c < C; c++) variance += (x[c] - mean) * (x[c] - mean) / (double)C;
        sigma = std::sqrt(variance + eps);
    }
};
// y = (x - mean) / sigma * w + b for each row of C values (Ba et al. 2016).
inline void layernorm_forward(Tensor& y, const Tensor& x, const Tensor& w, const Tensor& b, size_t C,
                              double eps) {
    for (size_t m = 0; m < x.size() / C; m++) {
        RowStatistics row(&x.v[m * C], C, eps);
        for (size_t c = 0; c < C; c++)
            y.v[m * C + c] = (x.v[m * C + c] - row.mean) / row.sigma * w.v[c] + b.v[c];
    }
}
// Every x[i] moves the mean and sigma, and so every output j of its row. With u = x - mean, the derivative of
// u[j] / sigma by x[i] is ((i == j) - 1/C) / sigma - u[i] u[j] / (C sigma^3).
inline void layernorm_backward(const Tensor& y, Tensor& x, Tensor& w, Tensor& b, size_t C, double eps) {
    for (size_t m = 0; m < x.size() / C; m++) {
        RowStatistics row(&x.v[m * C], C, eps);
        const double s = row.sigma;
        auto u = [&](size_t c) { return x.v[m * C + c] - row.mean; };
        for (size_t j = 0; j < C; j++) {
            double d = y.d[m * C + j];
            w.d[j] += d * u(j) / s;
            b.d[j] += d;
            for (size_t i = 0; i < C; i++)
                x.d[m * C + i] +=
                    d * w.v[j] * (((i == j) - 1 / (double)C) / s - u(i) * u(j) / ((double)C * s * s * s));
        }
    }
}

// GELU (Hendrycks and Gimpel 2016): x times the probability that a standard normal number is below x. GPT-2
// uses its approximation by tanh, GROVER the exact form.
inline double gelu(double x, int activation) {
    if (activation == GELU_ERF) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
inline double gelu_derivative(double x, int activation) {
    if (activation == GELU_ERF)
        return 0.5 * (1 + std::erf(x / std::sqrt(2.0))) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
    double t = std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x));
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
}
inline void gelu_forward(Tensor& y, const Tensor& x, int activation) {
    for (size_t i = 0; i < x.size(); i++) y.v[i] = gelu(x.v[i], activation);
}
inline void gelu_backward(const Tensor& y, Tensor& x, int activation) {
    for (size_t i = 0; i < x.size(); i++) x.d[i] += y.d[i] * gelu_derivative(x.v[i], activation);
}

// Dropout (Srivastava et al. 2014): each element is 0 with probability p, and otherwise scaled by 1/(1-p) so
// that its expectation stays. These are the n factors from element e0 of the whole batch on.
inline Doubles dropout_factors(const rng::Key& key, uint64_t e0, size_t n, double p) {
    Doubles f(n);
    for (size_t i = 0; i < n; i++) f[i] = (double)key.u32(e0 + i) < p * 0x1p32 ? 0.0 : 1.0 / (1.0 - p);
    return f;
}
// y = x times factors, element by element; no factors: y = x.
inline void dropout_forward(Tensor& y, const Tensor& x, const Doubles& factors) {
    for (size_t i = 0; i < x.size(); i++) y.v[i] = x.v[i] * (factors.empty() ? 1 : factors[i]);
}
inline void dropout_backward(const Tensor& y, Tensor& x, const Doubles& factors) {
    for (size_t i = 0; i < x.size(); i++) x.d[i] += y.d[i] * (factors.empty() ? 1 : factors[i]);
}

// y = a + b.
inline void add_forward(Tensor& y, const Tensor& a, const Tensor& b) {
    for (size_t i = 0; i < y.size(); i++) y.v[i] = a.v[i] + b.v[i];
}
inline void add_backward(const Tensor& y, Tensor& a, Tensor& b) {
    for (size_t i = 0; i < y.size(); i++) {
        a.d[i] += y.d[i];
        b.d[i] += y.d[i];
    }
}

// Causal self-attention (Vaswani et al. 2017). Each token has a query, a key and a value in each head. Row m
// of qkv (M,3C) holds C numbers of queries, head after head, then C of keys, then C of values. Within a head,
//     score[t,j] = q[t] k[j] / sqrt(hs)  for j <= t        p[t,.] = softmax over j of score[t,.]
//     y[t]       = sum over j of p[t,j] factor[t,j] v[j]    factor: dropout of the probabilities
// factors, prob (B,NH,T,T); lse (B,NH,T): the logarithm of the sum of a row's exponentials.
struct Attention {
    size_t B, T, C, NH;
    Doubles factors = {};  // empty: no dropout
    Doubles prob = Doubles(B * NH * T * T), lse = Doubles(B * NH * T);

    size_t hs() const { return C / NH; }
    // Where the query (0), key (1) or value (2) of token t in head h begins in qkv.
    size_t at(size_t b, size_t t, size_t h, size_t which) const {
        return ((b * T + t) * 3 + which) * C + h * hs();
    }
    size_t out_at(size_t b, size_t t, size_t h) const { return (b * T + t) * C + h * hs(); }
    size_t row(size_t b, size_t h, size_t t) const { return ((b * NH + h) * T + t) * T; }
    double factor(size_t i) const { return factors.empty() ? 1 : factors[i]; }
    template <class F>
    void each_query(F f) const {
        for (size_t b = 0; b < B; b++)
            for (size_t h = 0; h < NH; h++)
                for (size_t t = 0; t < T; t++) f(b, h, t);
    }

    void forward(Tensor& y, const Tensor& qkv) {
        each_query([&](size_t b, size_t h, size_t t) {
            double* p = &prob[row(b, h, t)];
            double max = -INFINITY, sum = 0;  // the maximum is subtracted so that exp() cannot overflow
            for (size_t j = 0; j <= t; j++) {
                double score = 0;
                for (size_t i = 0; i < hs(); i++)
                    score += qkv.v[at(b, t, h, 0) + i] * qkv.v[at(b, j, h, 1) + i];
                p[j] = score / std::sqrt((double)hs());
                max = std::max(max, p[j]);
            }
            for (size_t j = 0; j <= t; j++) sum += p[j] = std::exp(p[j] - max);
            for (size_t j = 0; j <= t; j++) p[j] /= sum;
            lse[row(b, h, t) / T] = max + std::log(sum);
            for (size_t i = 0; i < hs(); i++) {
                double o = 0;
                for (size_t j = 0; j <= t; j++)
                    o += p[j] * factor(row(b, h, t) + j) * qkv.v[at(b, j, h, 2) + i];
                y.v[out_at(b, t, h) + i] = o;
            }
        });
    }

    // The derivative of p[key] by score[j] is p[key] ((key == j) - p[j]).
    void backward(const Tensor& y, Tensor& qkv) const {
        each_query([&](size_t b, size_t h, size_t t) {
            const double *p = &prob[row(b, h, t)], *dy = &y.d[out_at(b, t, h)];
            Doubles dp(t + 1);
            for (size_t j = 0; j <= t; j++) {
                double f = factor(row(b, h, t) + j);
                for (size_t i = 0; i < hs(); i++) {
                    dp[j] += dy[i] * f * qkv.v[at(b, j, h, 2) + i];
                    qkv.d[at(b, j, h, 2) + i] += dy[i] * f * p[j];
                }
            }
            for (size_t j = 0; j <= t; j++) {
                double dscore = 0;
                for (size_t key = 0; key <= t; key++) dscore += dp[key] * p[key] * ((key == j) - p[j]);
                for (size_t i = 0; i < hs(); i++) {
                    double scaled = dscore / std::sqrt((double)hs());
                    qkv.d[at(b, t, h, 0) + i] += scaled * qkv.v[at(b, j, h, 1) + i];
                    qkv.d[at(b, j, h, 1) + i] += scaled * qkv.v[at(b, t, h, 0) + i];
                }
            }
        });
    }
};

// log of the sum of exp(logit) over the V logits of row m. The model's probability of token v is
// softmax = exp(logit[v] - log_sum_exp).
inline double log_sum_exp(const Tensor& logits, size_t m, size_t V) {
    const double* x = &logits.v[m * V];
    double max = *std::max_element(x, x + V), sum = 0;
    for (size_t v = 0; v < V; v++) sum += std::exp(x[v] - max);
    return max + std::log(sum);
}
// losses (M) = -log of the probability of each target; a negative target is left out, its loss is 0.
inline void cross_entropy_forward(Tensor& losses, const Tensor& logits, const Tokens& targets, size_t V) {
    for (size_t m = 0; m < targets.size(); m++)
        losses.v[m] = targets[m] < 0 ? 0 : log_sum_exp(logits, m, V) - logits.v[m * V + (size_t)targets[m]];
}
// The derivative of -log p[target] by logit v is p[v] - (v == target).
inline void cross_entropy_backward(const Tensor& losses, Tensor& logits, const Tokens& targets, size_t V) {
    for (size_t m = 0; m < targets.size(); m++) {
        if (targets[m] < 0) continue;
        double lse = log_sum_exp(logits, m, V);
        for (size_t v = 0; v < V; v++) {
            double p = std::exp(logits.v[m * V + v] - lse);
            logits.d[m * V + v] += losses.d[m] * (p - (v == (size_t)targets[m]));
        }
    }
}

// ---------------------------------------------------------------------------------------------
// The model. Config, ParamId and param_table are in lib/gpt2.h, Pass in lib/model.h. The trainers have other
// names for x (resid), r (resid2) and y (resid3); branch for dropped1 and dropped2; rstd for 1/sigma.

// One block, from x to y. GPT-2's residual connections skip the LayerNorms,
//     r = x + dropout(attention(LN1(x)))        y = r + dropout(MLP(LN2(r)))
// GROVER's first one begins after the LayerNorm: with h = LN1(x), r = h + dropout(attention(h)).
struct Block {
    size_t M, C;
    Attention attention;
    Doubles attproj_factors, fcproj_factors;
    bool grover;
    Tensor ln1 = Tensor(M * C), qkv = Tensor(M * 3 * C), atty = Tensor(M * C), attproj = Tensor(M * C),
           dropped1 = Tensor(M * C), r = Tensor(M * C), ln2 = Tensor(M * C), fch = Tensor(M * 4 * C),
           fch_gelu = Tensor(M * 4 * C), fcproj = Tensor(M * C), dropped2 = Tensor(M * C);
};

// The whole model, with the weights, the dropout and the seed of a trainer's.
class GPT2 {
  public:
    const Config cfg;
    double dropout;
    uint64_t seed;
    std::vector<Tensor> w[NUM_PARAMS];  // w[ParamId][layer]
    Tensor logits;                      // (M,V), of the last loss()

    template <class Model>
    explicit GPT2(Model& m) : cfg(m.cfg), dropout((double)m.dropout), seed(m.seed) {
        int id = 0;
        m.each_piece(PARAMS, [&](const float* x, size_t n) {
            while (w[id].size() == param_table(cfg)[id].layers) id++;
            w[id].emplace_back(x, n);
        });
    }

    // The mean loss of B sequences of T tokens over the targets >= 0. A training pass applies dropout.
    // backward: also adds to each w[id][l].d the gradient of the sum of the losses times pass.grad_scale,
    // which is 1 / (the targets of the whole step): together, the gradient of the step's mean loss.
    double loss(const Tokens& tokens, const Tokens& targets, size_t B, size_t T, const Pass& pass,
                bool backward) {
        const size_t C = (size_t)cfg.C, L = (size_t)cfg.L, V = (size_t)cfg.V, M = B * T;
        auto factors = [&](rng::Stream site, size_t l, size_t per_sequence) {
            if (!pass.train || dropout == 0) return Doubles();
            rng::Key key(seed, pass.step, site, (uint32_t)l);
            return dropout_factors(key, pass.seq0 * per_sequence, B * per_sequence, dropout);
        };
        Doubles embedding_factors = factors(rng::EMB_DROPOUT, 0, T * C);
        Tensor embedded(M * C), lnf(M * C), losses(M);
        std::vector<Tensor> x(L + 1,
                              Tensor(M * C));  // x[l] is what block l reads, x[L] what the last one gives
        std::vector<Block> blocks;

        embedding_forward(embedded, w[WTE][0], w[WPE][0], tokens, T, C);
        dropout_forward(x[0], embedded, embedding_factors);
        for (size_t l = 0; l < L; l++) {
            Attention attention{B, T, C, (size_t)cfg.NH,
                                factors(rng::ATT_DROPOUT, l, (size_t)cfg.NH * T * T)};
            blocks.push_back({M, C, attention, factors(rng::ATTPROJ_DROPOUT, l, T * C),
                              factors(rng::FCPROJ_DROPOUT, l, T * C), cfg.arch == GROVER_ARCH});
            block_forward(blocks[l], x[l], x[l + 1], l);
        }
        layernorm_forward(lnf, x[L], w[LNFW][0], w[LNFB][0], C, cfg.eps);
        logits = Tensor(M * V);
        linear_forward(logits, lnf, w[WTE][0], nullptr, C, V);  // the embedding again: it is tied
        cross_entropy_forward(losses, logits, targets, V);

        double sum = 0, counted = 0;
        for (size_t m = 0; m < M; m++) {
            sum += losses.v[m];
            counted += targets[m] >= 0;
            losses.d[m] = (double)pass.grad_scale;
        }
        if (!backward) return sum / counted;

        cross_entropy_backward(losses, logits, targets, V);
        linear_backward(logits, lnf, w[WTE][0], nullptr, C, V);
        layernorm_backward(lnf, x[L], w[LNFW][0], w[LNFB][0], C, cfg.eps);
        for (size_t l = L; l-- > 0;) block_backward(blocks[l], x[l], x[l + 1], l);
        dropout_backward(x[0], embedded, embedding_factors);
        embedding_backward(embedded, w[WTE][0], w[WPE][0], tokens, T, C);
        return sum / counted;
    }

    // The gradient of one tensor, all layers, as the model file orders it.
    Doubles gradient(int id) const {
        Doubles g;
        for (const Tensor& layer : w[id]) g.insert(g.end(), layer.d.begin(), layer.d.end());
        return g;
    }

  private:
    void block_forward(Block& k, const Tensor& x, Tensor& y, size_t l) {
        const size_t C = k.C;
        layernorm_forward(k.ln1, x, w[LN1W][l], w[LN1B][l], C, cfg.eps);
        linear_forward(k.qkv, k.ln1, w[QKVW][l], &w[QKVB][l], C, 3 * C);
        k.attention.forward(k.atty, k.qkv);
        linear_forward(k.attproj, k.atty, w[ATTPROJW][l], &w[ATTPROJB][l], C, C);
        dropout_forward(k.dropped1, k.attproj, k.attproj_factors);
        add_forward(k.r, k.grover ? k.ln1 : x, k.dropped1);

        layernorm_forward(k.ln2, k.r, w[LN2W][l], w[LN2B][l], C, cfg.eps);
        linear_forward(k.fch, k.ln2, w[FCW][l], &w[FCB][l], C, 4 * C);
        gelu_forward(k.fch_gelu, k.fch, cfg.activation);
        linear_forward(k.fcproj, k.fch_gelu, w[FCPROJW][l], &w[FCPROJB][l], 4 * C, C);
        dropout_forward(k.dropped2, k.fcproj, k.fcproj_factors);
        add_forward(y, k.r, k.dropped2);
    }
    // The same lines in reverse order.
    void block_backward(Block& k, Tensor& x, const Tensor& y, size_t l) {
        const size_t C = k.C;
        add_backward(y, k.r, k.dropped2);
        dropout_backward(k.dropped2, k.fcproj, k.fcproj_factors);
        linear_backward(k.fcproj, k.fch_gelu, w[FCPROJW][l], &w[FCPROJB][l], 4 * C, C);
        gelu_backward(k.fch_gelu, k.fch, cfg.activation);
        linear_backward(k.fch, k.ln2, w[FCW][l], &w[FCB][l], C, 4 * C);
        layernorm_backward(k.ln2, k.r, w[LN2W][l], w[LN2B][l], C, cfg.eps);

        add_backward(k.r, k.grover ? k.ln1 : x, k.dropped1);
        dropout_backward(k.dropped1, k.attproj, k.attproj_factors);
        linear_backward(k.attproj, k.atty, w[ATTPROJW][l], &w[ATTPROJB][l], C, C);
        k.attention.backward(k.atty, k.qkv);
        linear_backward(k.qkv, k.ln1, w[QKVW][l], &w[QKVB][l], C, 3 * C);
        layernorm_backward(k.ln1, x, w[LN1W][l], w[LN1B][l], C, cfg.eps);
    }
};

}  // namespace ref
