// test_gpt2.cpp - the CPU model's parity: layers, whole model, optimizer and decoder, held against
// dev/reference.h, which computes the same in plain loops over doubles; and that one against finite
// differences. Tensors are compared by relative L2 error; the largest of each kind is printed at the end.
//
// The tests of the matrix product, vectors and random numbers (lib/test_*.cpp) and dev/test_main.cpp are
// linked into this program.
#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#include <doctest/doctest.h>

#include <numeric>

#include "dev/reference.h"
#include "dev/test_model.h"
#include "train_gpt2.cpp"
#include "lib/trainer.h"

using namespace test;

namespace {

cpu::Dropout dropout_of(float p, rng::Stream site = rng::ATTPROJ_DROPOUT) {
    return {p, rng::Key(20261123, 5, site, 2)};
}
void set(Doubles& to, const Floats& from) { to.assign(from.begin(), from.end()); }

}  // namespace

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

TEST_CASE("dropout keeps a share of 1-p, keeps the mean, and differs by seed, step, site, layer") {
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

TEST_CASE("embedding, forward and backward: repeated tokens, dropout, offsets: relative L2 1e-6") {
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
            ref::Tensor e(wte), pos(wpe), sum(B * T * C), out(B * T * C);
            Doubles factors = ref::dropout_factors(drop.key, e0, B * T * C, p);
            set(e.d, dwte), set(pos.d, dwpe), set(out.d, dy);
            ref::embedding_forward(sum, e, pos, tokens, T, C);
            ref::dropout_forward(out, sum, factors);
            ref::dropout_backward(out, sum, factors);
            ref::embedding_backward(sum, e, pos, tokens, T, C);
            cpu::embedding_forward(y.data(), tokens.data(), wte.data(), wpe.data(), B, T, C, drop, e0);
            cpu::embedding_backward(dwte.data(), dwpe.data(), dy.data(), tokens.data(), B, T, C, drop, e0);
            check_close("embedding: y", y, out.v, 1e-6);
            check_close("embedding: dwte", dwte, e.d, 1e-6);
            check_close("embedding: dwpe", dwpe, pos.d, 1e-6);
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
            ref::Tensor rx(x), rw(w), rb(b), ry(M * C);
            set(rw.d, dw), set(rb.d, db), set(ry.d, dy);
            ref::layernorm_forward(ry, rx, rw, rb, C, 1e-5);
            ref::layernorm_backward(ry, rx, rw, rb, C, 1e-5);
            Doubles want_over = rx.d, want_added = rx.d;
            for (size_t i = 0; i < M * C; i++) want_added[i] += dx[i];
            cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), M, C);
            Floats dw2(C), db2(C);
            auto backward = [&](Floats& to_x, Floats& to_w, Floats& to_b, bool accumulate) {
                cpu::layernorm_backward(to_x.data(), nullptr, to_w.data(), to_b.data(), dy.data(), x.data(),
                                        mean.data(), rstd.data(), w.data(), M, C, accumulate);
            };
            backward(dx_over, dw2, db2, false), backward(dx, dw, db, true);
            double tolerance = C < 16 ? 1e-5 : 2e-6;  // in a narrow row dx nearly cancels
            check_close("layernorm: y", y, ry.v, 2e-6);
            if (C > 2)
                check_close("layernorm: dx", dx_over, want_over,
                            tolerance);  // exact dx is nearly 0 for C = 2
            check_close("layernorm: dx added", dx, want_added, tolerance);
            check_close("layernorm: dw", dw, rw.d, 2e-6);
            check_close("layernorm: db", db, rb.d, 2e-6);
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
    ref::Tensor want(C);
    ref::layernorm_forward(want, ref::Tensor(x), ref::Tensor(w), ref::Tensor(b), C, 1e-5);
    cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), 1, C);
    check_close("layernorm: small values", y, want.v, 2e-6);
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
            ref::Tensor dropped(M * C), s(M * C), want(M * C);
            ref::dropout_forward(dropped, ref::Tensor(branch), ref::dropout_factors(drop.key, e0, M * C, p));
            ref::add_forward(s, ref::Tensor(skip_in), dropped);
            ref::layernorm_forward(want, s, ref::Tensor(w), ref::Tensor(b), C, 1e-5);
            cpu::residual_layernorm_forward(sum.data(), y.data(), mean.data(), rstd.data(), skip_in.data(),
                                            branch.data(), w.data(), b.data(), M, C, drop, e0);
            check_close("residual + layernorm: sum", sum, s.v, 1e-6);
            check_close("residual + layernorm: y", y, want.v, 2e-6);
        }
}

TEST_CASE("attention, forward and backward, for T around its blocks, with dropout: relative L2 5e-6") {
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
            ref::Tensor x(qkv), y(B * T * C);
            ref::Attention want{B, T, C, NH};
            if (p > 0) want.factors = ref::dropout_factors(drop.key, seq0 * NH * T * T, B * NH * T * T, p);
            set(y.d, dout);
            want.forward(y, x), want.backward(y, x);
            Floats scratch((size_t)omp_get_max_threads() * cpu::Attention::scratch(T, s.hs),
                           NAN);  // nothing may be assumed of it
            cpu::Attention attention{B, T, C, NH};
            attention.forward(out.data(), lse.data(), qkv.data(), drop, seq0, scratch.data());
            attention.backward(dqkv.data(), dout.data(), out.data(), qkv.data(), lse.data(), drop, seq0,
                               scratch.data());
            check_close("attention: out", out, y.v, 5e-6);
            if (T > 1) check_close("attention: lse", lse, want.lse, 5e-6);
            check_close("attention: dqkv", dqkv, x.d, 5e-6);
            // Queries, keys and values by themselves, so that a loud one hides no other.
            for (size_t which = 0; which < 3 && T > 1; which++) {
                Doubles got, part;
                for (size_t i = 0; i < dqkv.size(); i++)
                    if (i / C % 3 == which) got.push_back(dqkv[i]), part.push_back(x.d[i]);
                const char* name[] = {"attention: dq", "attention: dk", "attention: dv"};
                check_close(name[which], got.data(), part.data(), got.size(), 5e-6);
            }
        }
}

TEST_CASE("attention in bf16, over all tiles, with and without dropout: relative L2 6e-3") {
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
            ref::Tensor x(qkv), y(B * T * C);
            ref::Attention want{B, T, C, NH};
            if (p > 0) want.factors = ref::dropout_factors(drop.key, 0, B * NH * T * T, p);
            set(y.d, dout);
            want.forward(y, x), want.backward(y, x);
            cpu::Attention attention{B, T, C, NH};
            attention.forward(out.data(), lse.data(), qkv.data(), drop, 0, scratch.data());
            attention.backward(dqkv.data(), dout.data(), out.data(), qkv.data(), lse.data(), drop, 0,
                               scratch.data());
            check_close("attention, bf16: out", floats(out), y.v, 6e-3);
            if (T > 1) check_close("attention, bf16: lse", lse, want.lse, 6e-3);
            check_close("attention, bf16: dqkv", floats(dqkv), x.d, 6e-3);
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

TEST_CASE("cross-entropy: loss and gradient, ignored targets, logits of any size: relative L2 1e-6") {
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
        ref::Tensor x(dense), want(M);
        std::fill(want.d.begin(), want.d.end(), (double)dscale);
        ref::cross_entropy_forward(want, x, targets, V);
        ref::cross_entropy_backward(want, x, targets, V);
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
        check_close("cross-entropy: losses", losses, want.v, 1e-6);
        check_close("cross-entropy: losses alone", losses_only, want.v, 1e-6);
        check_close("cross-entropy: dlogits", dense, x.d, V == 1 ? 1e-5 : 1e-6);
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

TEST_CASE("the reference's gradients are its loss's central differences: relative L2 1e-6") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (int activation : {GELU_TANH, GELU_ERF})
            for (float dropout : {0.0f, 0.2f}) {
                Config c = config(2, 3, 12, 23, 9, arch, activation);
                INFO(variant(c, dropout));
                cpu::GPT2 m(c, 0, 0, false);
                randomise(m, 20);
                m.dropout = dropout;
                ref::GPT2 want(m);
                Random r(21);
                Batch batch(r, 2, 7, c.V);
                Pass pass = training_pass(batch.counted());
                pass.grad_scale = 1.0f;  // the gradient of the sum of all losses: no rounding of the scale
                want.loss(batch.tokens, batch.targets, batch.B, batch.T, pass, true);
                ParamTable table = param_table(c);
                for (int i = 0; i < NUM_PARAMS; i++) {
                    Doubles difference, gradient;
                    for (int k = 0; k < 40; k++) {
                        ref::Tensor& w = want.w[i][r.below(table[i].layers)];
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
TEST_CASE("the fp32 model's gradients are its loss's central differences, within 1e-3") {
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
void compare_model(const Config& c, size_t B, size_t T, float dropout, uint64_t seed, uint64_t seq0,
                   int recompute = 0) {
    INFO(variant(c, dropout), ", L ", c.L, " NH ", c.NH, " C ", c.C, " V ", c.V, " B ", B, " T ", T, " eps ",
         c.eps, " recompute ", recompute);
    cpu::GPT2 m(c, B, T, true, recompute);
    randomise(m, seed);
    m.dropout = dropout, m.seed = seed + ((uint64_t)1 << 40);
    Random r(seed);
    Batch batch(r, B, T, c.V);
    Pass pass = training_pass(batch.counted() + 5, 7, seq0);
    ref::GPT2 want(m);
    double want_loss = want.loss(batch.tokens, batch.targets, B, T, pass, true);
    double loss = batch.forward(m, pass);
    CHECK(m.backward() == loss);
    check_close("model, loss", loss, want_loss, 1e-6);
    CHECK(m.counted() == batch.counted());
    Floats logits(B * T * (size_t)c.V);
    m.logits(logits.data());
    check_close("model, logits", logits, want.logits.v, 1e-5);
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

TEST_CASE("the whole model: loss, logits, all gradients, GPT-2 and GROVER: relative L2 1e-5") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (int activation : {GELU_TANH, GELU_ERF})
            for (float dropout : {0.0f, 0.2f})
                compare_model(config(2, 3, 48, 97, 40, arch, activation), 3, 37, dropout, 30, 6);
}

TEST_CASE("the whole model at odd sizes, one token, one head, one channel: relative L2 1e-5") {
    compare_model(config(1, 5, 20, 2, 1), 2, 1, 0.0f, 31, 0);
    compare_model(config(3, 1, 36, 300, 101), 1, 101, 0.2f, 32, 0);
    compare_model(config(1, 9, 9, 131, 20, GROVER_ARCH), 5, 13, 0.2f, 33, 1000);
    compare_model(config(2, 7, 77, 33, 99, GROVER_ARCH, GELU_ERF), 2, 99, 0.0f, 34, 0);
}

TEST_CASE("the whole model at other LayerNorm epsilons, and recomputed: relative L2 1e-5") {
    for (int arch : {GPT2_ARCH, GROVER_ARCH})
        for (float eps : {1e-12f, 1e-3f, 0.1f})
            for (int recompute : {0, 1, 2, 3}) {
                Config c = config(2, 3, 24, 97, 20, arch);
                c.eps = eps;
                compare_model(c, 2, 17, 0.0f, 35, 0, recompute);
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
               want = ref::GPT2(evaluator).loss(batch.tokens, batch.targets, 3, 37, Pass{}, false);
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

TEST_CASE("what backward computes again changes no loss and no gradient: relative L2 1e-6") {
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

TEST_CASE("losses, norms and weights have the same bits with 1, 2, 3 and 4 threads") {
    struct {
        int arch, layers;
        Optimizer optimizer;
    } cases[] = {{GPT2_ARCH, 2, ADAMW},
                 {GROVER_ARCH, 2, ADAMW},
                 {GROVER_ARCH, 2, MUON},  // each thread takes matrices of its own
                 {GPT2_ARCH, 1, MUON}};   // and with 4 threads all share each matrix
    for (auto& [arch, layers, optimizer] : cases) {
        struct {
            Floats params, moments;
            Doubles losses;
        } first, now;
        for (int threads : {1, 2, 3, 4}) {
            Threads guard(threads);
            Config c = config(layers, 3, 69, 97, 101, arch);
            if (optimizer == MUON)
                CHECK(cpu::muon_at_once(c, 1) == (size_t)(threads <= 3 * layers ? threads : 1));
            cpu::GPT2 m(c, 3, 101, true, 0, {}, {}, optimizer);  // 303 rows
            m.init_weights(5);
            m.dropout = 0.1f;
            now = {};
            Random r(44);
            for (uint32_t step = 0; step < 4; step++) {
                Batch batch(r, 3, step % 2 ? 37 : 101, c.V);
                now.losses.push_back(batch.forward(m, training_pass(batch.counted(), step)));
                m.backward();
                now.losses.push_back(m.grad_norm());
                StepSettings a;
                a.lr = 1e-2f;
                m.update(a, step + 1, 0.5f);
                now.losses.push_back(batch.forward(m));
            }
            now.params = parameters(m), now.moments = piece(m, optimizer == MUON ? MUON_M : ADAM_V);
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
// Initialisation, bf16, learning

TEST_CASE("a model's parameters and gradients are reached by name, by number and as pieces") {
    Config c = config(3, 2, 10, 20, 7);
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

TEST_CASE("initial weights have GPT-2's distributions; biases 0, LayerNorm 1, padding 0") {
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
        bool residual = i == ATTPROJW || i == FCPROJW, weight = table[i].init == ONES;
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
TEST_CASE("bf16: loss, logits and gradients are fp32's within rounding: relative L2 1e-2") {
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

TEST_CASE("bf16: losses, norms and weights have the same bits on any threads, recomputed or not") {
    Floats first;
    for (int run = 0; run < 8; run++) {
        const int threads = run % 4 + 1;
        const Optimizer optimizer = run < 4 ? ADAMW : MUON;
        Threads guard(threads);
        Config c = config(2, 3, 69, 97, 101);
        cpu::GPT2 m(c, 3, 101, true, threads - 1, Precision{BF16, true}, {}, optimizer);
        m.init_weights(5);
        m.dropout = 0.1f;
        Random r(44);
        Floats seen;
        for (uint32_t step = 0; step < 3; step++) {
            Batch batch(r, 3, step % 2 ? 37 : 101, c.V);
            m.accumulate(batch.tokens.data(), batch.targets.data(), 3, batch.T,
                         training_pass(batch.counted(), step));
            StepResult s = m.step(StepSettings(), step + 1);
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

TEST_CASE("training on a repetitive text goes from ln V to a loss below 0.5 in 60 steps") {
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
                StepSettings a;
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

TEST_CASE("AdamW follows its formulas over six steps, and decays only matrices and embeddings") {
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
    StepSettings a;
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

namespace {

// An (n,m) matrix in double precision.
struct Wide {
    size_t n, m;
    Doubles x;
    double& at(size_t i, size_t j) { return x[i * m + j]; }
    double at(size_t i, size_t j) const { return x[i * m + j]; }
};
Wide transpose(const Wide& a) {
    Wide t = {a.m, a.n, Doubles(a.x.size())};
    for (size_t i = 0; i < a.n; i++)
        for (size_t j = 0; j < a.m; j++) t.at(j, i) = a.at(i, j);
    return t;
}
Wide times(const Wide& a, const Wide& b) {
    Wide c = {a.n, b.m, Doubles(a.n * b.m)};
    for (size_t i = 0; i < a.n; i++)
        for (size_t k = 0; k < a.m; k++)
            for (size_t j = 0; j < b.m; j++) c.at(i, j) += a.at(i, k) * b.at(k, j);
    return c;
}
// The Newton-Schulz iteration as Jordan et al. write it: X = a X + (b G + c G^2) X.
Wide orthogonalised(Wide x) {
    if (x.n > x.m) return transpose(orthogonalised(transpose(x)));
    double sum = 0;
    for (double v : x.x) sum += v * v;
    for (double& v : x.x) v /= std::sqrt(sum);
    for (int i = 0; i < 5; i++) {
        const Wide g = times(x, transpose(x)), gx = times(g, x), ggx = times(g, gx);
        for (size_t j = 0; j < x.x.size(); j++)
            x.x[j] = 3.4445 * x.x[j] - 4.7750 * gx.x[j] + 2.0315 * ggx.x[j];
    }
    return x;
}
// What the five iterations make of one singular value.
double five_times(double s) {
    for (int i = 0; i < 5; i++) s = 3.4445 * s - 4.7750 * std::pow(s, 3) + 2.0315 * std::pow(s, 5);
    return s;
}
// muon_orthogonalise() of a matrix stored as (rows,cols); the result is so, too.
template <class A>
Floats orthogonalised_by(const Floats& x, size_t rows, size_t cols) {
    const size_t n = std::min(rows, cols), m = std::max(rows, cols);
    Config c = config(1, 1, 1, 3, 2);
    c.C = (int)std::max(n, ceil_div(m, 4));  // the scratch memory is that of matrices (C,4C)
    cpu::MuonScratch<A> s;
    Arena count, arena;
    s.place(count, c, 1);
    std::vector<float> memory(count.used / 4 + 16);
    arena.base = (char*)round_up((size_t)memory.data(), 64);
    s.place(arena, c, 1);
    std::copy(x.begin(), x.end(), s.sums);
    cpu::muon_orthogonalise(s, n, m, rows > cols);
    Floats y(s.sums, s.sums + n * m), t(n * m);
    if (rows <= cols) return y;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < m; j++) t[j * n + i] = y[i * m + j];
    return t;
}

}  // namespace

TEST_CASE(
    "Muon follows its formulas over ten steps, on square, tall and wide matrices; the rest by AdamW: 1e-4") {
    for (int C : {12, 40}) {
        const Config c = config(2, 2, C, 23, 9);
        cpu::GPT2 m(c, 1, 1, true, 0, {}, {}, MUON), adam(c, 1, 1, true);
        randomise(m, 50), randomise(adam, 50);
        const Floats start = parameters(m);
        struct Matrix {
            size_t file, rows, cols;
            Doubles w, momentum;
        };
        std::vector<Matrix> matrices;
        for (const ParamPiece& p : param_pieces(c)) {
            const size_t n = (size_t)C, rows = p.id == FCW ? 4 * n : n, cols = p.id == FCPROJW ? 4 * n : n;
            for (size_t at = 0; p.block_matrix && at < p.size; at += rows * cols) {
                const float* w = &start[p.file + at];
                matrices.push_back(
                    {p.file + at, rows, cols, Doubles(w, w + rows * cols), Doubles(rows * cols)});
            }
        }
        CHECK(matrices.size() == 2 * 6);
        StepSettings a;
        a.weight_decay = 0.3f;
        Random r(51);
        for (uint32_t t = 1; t <= 10; t++) {
            a.lr = 0.002f, a.muon_lr = 0.01f * (float)t;
            const float scale = t % 2 ? 1.0f : 0.25f;
            const Floats g = r.floats(num_params(c), t == 3 ? 1e-5 : 0.1);
            set_piece(m, GRADS, g), set_piece(adam, GRADS, g);
            m.update(a, t, scale), adam.update(a, t, scale);
            for (Matrix& x : matrices) {
                Wide d = {x.rows, x.cols, Doubles(x.rows * x.cols)};
                for (size_t i = 0; i < d.x.size(); i++) {
                    const double gi = (double)scale * g[x.file + i];
                    x.momentum[i] = 0.95 * x.momentum[i] + 0.05 * gi;
                    d.x[i] = 0.95 * x.momentum[i] + 0.05 * gi;
                }
                d = orthogonalised(d);
                const double rms = 0.2 * std::sqrt((double)std::max(x.rows, x.cols));
                for (size_t i = 0; i < d.x.size(); i++)
                    x.w[i] -= (double)a.muon_lr * ((double)a.weight_decay * x.w[i] + rms * d.x[i]);
            }
        }
        const Floats got = parameters(m), others = parameters(adam);
        Floats momentum;
        Doubles want_momentum;
        const Floats all_momentum = piece(m, MUON_M);
        size_t at = 0;
        for (const Matrix& x : matrices) {
            const size_t n = x.rows * x.cols;
            const char* what = x.rows > x.cols   ? "Muon: tall"
                               : x.rows < x.cols ? "Muon: wide"
                                                 : "Muon: square";
            check_close(what, &got[x.file], x.w.data(), n, 1e-4);
            check_close("Muon: momentum", &all_momentum[at], x.momentum.data(), n, 1e-6), at += n;
        }
        CHECK(at == all_momentum.size());
        // Everything else has the bits of a model that AdamW updates.
        for (const ParamPiece& p : param_pieces(c))
            if (!p.block_matrix) CHECK(!memcmp(&got[p.file], &others[p.file], p.size * sizeof(float)));
        CHECK(piece(m, ADAM_V).size() + at == num_params(c));
    }
}

TEST_CASE("Muon moves each singular value as the iteration does, and those above 0.002 to 0.68 to 1.21") {
    double least = 9, most = 0;
    for (double s = 0.002; s <= 1; s *= 1.0001)
        least = std::min(least, five_times(s)), most = std::max(most, five_times(s));
    CHECK((least > 0.68 && least < 0.69 && most > 1.19 && most < 1.21));
    Random r(60);
    for (std::pair<size_t, size_t> shape :
         {std::pair<size_t, size_t>{31, 31}, {16, 64}, {64, 16}, {1, 4}, {48, 192}}) {
        const size_t rows = shape.first, cols = shape.second;
        // x = U diag(s) V^T, with U = I - 2 u u^T and V likewise: reflections.
        const size_t n = std::min(rows, cols);
        Doubles u, v, s(n);
        for (float x : r.floats(rows)) u.push_back(x);
        for (float x : r.floats(cols)) v.push_back(x);
        for (Doubles* w : {&u, &v}) {
            double sum = 0;
            for (double x : *w) sum += x * x;
            for (double& x : *w) x /= std::sqrt(sum);
        }
        double sum = 0;
        for (size_t k = 0; k < n; k++) s[k] = std::pow(0.8, (double)k), sum += s[k] * s[k];
        auto compose = [&](const Doubles& values) {
            Doubles x(rows * cols);
            for (size_t i = 0; i < rows; i++)
                for (size_t j = 0; j < cols; j++)
                    for (size_t k = 0; k < n; k++)
                        x[i * cols + j] +=
                            ((i == k) - 2 * u[i] * u[k]) * values[k] * ((j == k) - 2 * v[j] * v[k]);
            return x;
        };
        const Doubles x = compose(s);
        Doubles moved(n);
        for (size_t k = 0; k < n; k++) {
            moved[k] = five_times(s[k] / std::sqrt(sum));
        }
        const Floats in(x.begin(), x.end());
        check_close("Muon: singular values", orthogonalised_by<float>(in, rows, cols), compose(moved), 2e-5);
        // In bf16, numbers near 3, the iteration's coefficients, are rounded to multiples of 2^-6.
        check_close("Muon, bf16: singular values", orthogonalised_by<simd::bf16>(in, rows, cols),
                    compose(moved), 5e-2);
    }
}

TEST_CASE("Muon of a gradient of zeros changes only what weight decay does") {
    const Config c = config(1, 1, 8, 11, 4);
    cpu::GPT2 m(c, 1, 1, true, 0, {}, {}, MUON);
    randomise(m, 3);
    const Floats before = piece(m, PARAMS);
    StepSettings a;
    a.weight_decay = 0.5f, a.muon_lr = 0.1f;
    set_piece(m, GRADS, Floats(num_params(c)));
    m.update(a, 1, 1);
    const Floats after = piece(m, PARAMS);
    for (const ParamPiece& p : param_pieces(c))
        for (size_t i = p.file; i < p.file + p.size && p.block_matrix; i++)
            CHECK(after[i] == before[i] * (1.0f - 0.1f * 0.5f));
}

TEST_CASE("AdamW's first step is the learning rate against the gradient, whatever its size") {
    cpu::GPT2 m(config(1, 1, 4, 3, 2), 1, 1, true);
    size_t n = num_params(m.cfg);
    Floats g(n);
    for (size_t j = 0; j < n; j++) g[j] = j % 2 ? 1e-3f * (float)(1 + j) : -2.0f;
    set_piece(m, GRADS, g);
    StepSettings a;
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
        StepSettings a;
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
        const float* next = decoder.append_to_all(prompt.data(), prompt.size());
        const float* want_next = fresh_decoder.append_to_all(prompt.data(), prompt.size());
        CHECK(!memcmp(next, want_next, (size_t)c.V * sizeof(float)));
    }
}

TEST_CASE("a step whose loss or norm is above its limit, or not finite, changes nothing") {
    Config c = config(1, 2, 8, 11, 5);
    cpu::GPT2 m(c, 1, 5, true);
    randomise(m, 57);
    Random r(57);
    Batch batch(r, 1, 5, c.V);
    auto take = [&](double max_loss, double max_norm) {
        StepSettings a;
        a.max_loss = max_loss, a.max_norm = max_norm;
        m.accumulate(batch.tokens.data(), batch.targets.data(), 1, 5, training_pass(batch.counted()));
        return m.step(a, 1);
    };
    const Floats before = parameters(m);
    StepResult found = take(0, INFINITY);
    CHECK(same_bits(parameters(m), before));
    take(INFINITY, found.norm * 0.999), take(found.loss * 0.999, INFINITY);
    CHECK(same_bits(parameters(m), before));
    CHECK(same_bits(piece(m, ADAM_M), Floats(num_params(c))));
    CHECK(take(found.loss, found.norm).loss == found.loss);  // and the next one is not affected
    CHECK(!same_bits(parameters(m), before));
}

TEST_CASE("the gradients' norm is that of all parameters, past its blocks' borders: 1e-12") {
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

TEST_CASE("the norm that backward's products sum is that of the gradients: relative 1e-12") {
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

TEST_CASE("clipping: a gradient longer than the limit counts as one of the limit's length") {
    for (double length : {5.0, 0.5}) {
        cpu::GPT2 m(config(1, 1, 4, 3, 2), 1, 1, true);
        size_t n = num_params(m.cfg);
        Floats g = Random(53).floats(n);
        double norm = 0;
        for (float x : g) norm += (double)x * x;
        for (float& x : g) x *= (float)(length / std::sqrt(norm));
        set_piece(m, GRADS, g);
        double measured = m.grad_norm(), limit = 1;
        StepSettings a;
        m.update(a, 1, measured > limit ? (float)(limit / measured) : 1.0f);  // as trainer.h does
        Doubles want(n);
        for (size_t j = 0; j < n; j++) want[j] = 0.1 * g[j] * std::min(1.0, limit / length);
        check_close("clipping", piece(m, ADAM_M), want, 1e-6);
    }
}

// ---------------------------------------------------------------------------------------------
// Generation

TEST_CASE("the decoder's logits are forward's after every prefix, chunks of any size: L2 1e-5") {
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
                    const float* logits = decoder.append_to_all(next.data(), n);
                    CHECK(decoder.length() == t + n);
                    for (size_t s = 0; s < N; s++)
                        check_close("decoder, logits", logits + s * V, &want[(s * T + t + n - 1) * V], V,
                                    1e-5);
                }
                CHECK_THROWS_AS(decoder.append_to_all(batch.tokens.data(), 1), std::logic_error);
            }
            CHECK(cpu::Decoder(m, 1, 1000).capacity() ==
                  150);  // never more than the positions the model knows
        }
}

// As for training in bf16: operands are off by up to 1/256, and the errors of many terms average out.
TEST_CASE("a bf16 decoder is the fp32 decoder with rounded weights: relative L2 1e-2") {
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
            check_close("bf16 decoder, logits", b.append_to_all(next.data(), n),
                        a.append_to_all(next.data(), n), N * (size_t)c.V, 1e-2);
        }
    }
}

TEST_CASE("a model that writes in bf16 holds the file's parameters, each rounded to the nearest") {
    TempDir dir;
    for (Config c : {config(2, 2, 8, 11, 5, GROVER_ARCH, GELU_ERF), config(3, 3, 9, 20, 7)}) {
        cpu::GPT2 m(c, 1, 1, true), half(c, 0, 0, false, 0, Precision{BF16, true});
        randomise(m, 88);
        trainer::save_model(m, dir / "model.bin");
        ModelReader reader(dir / "model.bin");
        trainer::load_model(half, reader);
        size_t wrong = 0;
        for (const ParamPiece& t : param_pieces(c)) {
            const float* x = m.params.tensor(t.id, t.layer);
            const simd::bf16* h = half.params_bf16.tensor(t.id, t.layer);
            for (size_t j = 0; j < t.size; j++) wrong += h[j] != float_to_bf16(x[j]);
        }
        CHECK(wrong == 0);
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
        const float *got = decoder->append_to_all(tokens.data(), 9),
                    *logits = want.append_to_all(tokens.data(), 9);
        CHECK(decoder->length() == 9);
        CHECK(!memcmp(got, logits, 2 * (size_t)c.V * sizeof(float)));
    }
}

TEST_CASE("a sequence's logits have the same bits however many are written, on any threads") {
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
                    const float* l = decoder.append_to_all(next.data(), n);
                    logits.push_back(Floats(l, l + c.V));
                    t += n;
                }
                if (first.empty()) first = logits;
                for (size_t i = 0; i < logits.size(); i++) CHECK(same_bits(logits[i], first[i]));
            }
    }
}

TEST_CASE("a sequence's logits have the same bits alone and beside others of any length, also after a cut") {
    Config c = config(2, 3, 51, 97, 80);
    cpu::GPT2 full(c, 0, 0, false);
    randomise(full, 63);
    for (Dtype dtype : {FP32, BF16}) {
        cpu::GPT2 m(c, 0, 0, false, 0, Precision{dtype, true});
        set_piece(m, PARAMS, parameters(full));
        const size_t N = 4, V = (size_t)c.V;
        cpu::Decoder together(m, N, 80);
        std::vector<std::unique_ptr<cpu::Decoder>> alone;
        for (size_t s = 0; s < N; s++) alone.push_back(std::make_unique<cpu::Decoder>(m, 1, 80));
        Random r(63);
        for (int round = 0; round < 60; round++) {
            const size_t n = round % 5 ? 1 : 1 + r.below(20);
            std::vector<size_t> which;
            for (size_t s = 0; s < N; s++) {
                if (together.length(s) + n > 80 || r.below(8) == 0) {
                    const size_t cut = r.below(together.length(s) + 1);
                    together.truncate(s, cut), alone[s]->truncate(0, cut);
                }
                if (r.below(3) && together.length(s) + n <= 80) which.insert(which.begin(), s);
            }
            if (which.empty()) continue;
            const Tokens tokens = r.tokens(which.size() * n, c.V);
            const float* logits = together.append(which, tokens.data(), n);
            for (size_t k = 0; k < which.size(); k++) {
                cpu::Decoder& one = *alone[which[k]];
                const float* want = one.append_to_all(&tokens[k * n], n);
                CHECK(one.length() == together.length(which[k]));
                CHECK(!memcmp(logits + k * V, want, V * sizeof(float)));
            }
        }
    }
}

TEST_CASE("texts of real draws end at different times, and say nothing after their end") {
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

TEST_CASE("generated text is what forward would choose, whatever its neighbours and the threads") {
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

TEST_CASE("training goes on from model and state files with the same bits as without a stop") {
    TempDir dir;
    Config c = config(2, 3, 24, 31, 19);
    for (const Optimizer optimizer : {ADAMW, MUON}) {
        auto train = [&](cpu::GPT2& m, uint32_t from, uint32_t to) {
            Doubles losses;
            m.dropout = 0.2f;
            for (uint32_t step = from; step < to; step++) {
                Random r(step);
                Batch batch(r, 3, 19, c.V);
                losses.push_back(batch.forward(m, training_pass(batch.counted(), step)));
                m.backward();
                m.update(StepSettings(), step + 1, 1);
            }
            return losses;
        };
        auto model = [&] {
            return std::make_unique<cpu::GPT2>(c, 3, 19, true, 0, Precision(), Ranks(), optimizer);
        };
        auto first = model(), second = model(), third = model();
        cpu::GPT2 &unbroken = *first, &stopped = *second, &resumed = *third;
        unbroken.init_weights(1), stopped.init_weights(1);
        Doubles want = train(unbroken, 0, 6);
        train(stopped, 0, 3);
        trainer::save_model(stopped, dir / "model.bin"),
            trainer::save_state(stopped, {}, "", dir / "state.bin");
        ModelReader reader(dir / "model.bin");
        trainer::load_model(resumed, reader);
        trainer::StateReader state(dir / "state.bin");
        state.load_moments(resumed);
        Doubles got = train(resumed, 3, 6);
        CHECK(got == Doubles(want.begin() + 3, want.end()));
        CHECK(same_bits(parameters(unbroken), parameters(resumed)));
    }
}
