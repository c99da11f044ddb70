// test_gpu_kernels.cu - each kernel of train_gpt2.cu except attention, alone, against its function in
// train_gpt2.cpp.
//
// Sizes are awkward on purpose: channels below and above what a warp or a block holds, and numbers of rows
// that are no multiple of anything. There are enough rows that every loop that contains a barrier runs at
// least twice (grids are sized by the device's multiprocessors).
#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#include "dev/test_gpu_util.h"

namespace {

using namespace gpu_test;

const cudaStream_t STREAM = nullptr;

std::string sizes(std::initializer_list<size_t> list) {
    std::string text;
    for (size_t n : list) text += (text.empty() ? " " : " x ") + std::to_string(n);
    return text;
}

// Checks that the same elements are 0 on both sides, and with dropout about a share p of them.
void check_same_mask(const Values& got, const Values& want, float p) {
    size_t differ = 0, dropped = 0;
    for (size_t i = 0; i < got.size(); i++)
        differ += (got[i] == 0) != (want[i] == 0), dropped += want[i] == 0;
    CHECK(differ == 0);
    CHECK((double)dropped >= 0.6 * p * (double)got.size());
}

// ---------------------------------------------------------------------------------------------
// Reductions

// Reductions one right after another; from one to the next the largest value is in another thread.
__global__ void reductions_kernel(float* out) {
    float x = (float)threadIdx.x, n = (float)blockDim.x;
    out[0 * blockDim.x + threadIdx.x] = gpu::block_max(x);
    out[1 * blockDim.x + threadIdx.x] = gpu::block_max(n - x);
    out[2 * blockDim.x + threadIdx.x] = gpu::block_max(-1 - x);
    out[3 * blockDim.x + threadIdx.x] = gpu::block_sum(x);
    out[4 * blockDim.x + threadIdx.x] = gpu::block_sum(2 * x);
    out[5 * blockDim.x + threadIdx.x] = gpu::block_sum(1);
}
TEST_CASE("a block's maxima and sums reach every thread in consecutive calls") {
    for (unsigned n : {32u, 96u, 512u, 1024u}) {
        Values got = repeatable([&] {
            Device<float> out(6 * n);
            gpu::launch(reductions_kernel, 1, n, 0, STREAM, out);
            return std::vector<Values>{out.values()};
        })[0];
        const float want[] = {n - 1.0f, (float)n, -1, n * (n - 1) / 2.0f, n * (n - 1.0f), (float)n};
        size_t wrong = 0;
        for (size_t i = 0; i < 6 * n; i++) wrong += got[i] != want[i / n];
        CHECK(wrong == 0);
    }
}

// ---------------------------------------------------------------------------------------------
// Embedding

// Tokens of which one is very frequent, one less so, and the others rare.
std::vector<int> skewed_tokens(size_t n, int V, uint64_t seed) {
    std::vector<int> t(n);
    rng::Key key(seed, 1, rng::SAMPLE);
    for (size_t i = 0; i < n; i++) {
        double u = key.uniform(i);
        t[i] = u < 0.6 ? V / 2 : u < 0.8 ? V / 3 : (int)(u * 1e6) % V;
    }
    return t;
}

TEST_CASE("embedding forward is token plus position, under the CPU's dropout mask") {
    struct {
        size_t B, T, C;
    } shapes[] = {{3, 5, 8}, {2, 33, 40}, {2, 7, 768}, {1, 3, 1608}, {2, 2, 4104}};
    for (auto [B, T, C] : shapes)
        for (float p : {0.0f, 0.3f}) {
            int V = 41;
            size_t M = B * T;
            std::vector<int> tokens = skewed_tokens(M, V, C);
            Values wte = normals_x(V * C, 1), wpe = normals_x((T + 2) * C, 2), want(M * C);
            Masks masks(p, rng::EMB_DROPOUT);
            cpu::embedding_forward(want.data(), tokens.data(), wte.data(), wpe.data(), B, T, C, masks.cpu(),
                                   Masks::SEQ0 * T * C);
            Values got = repeatable([&, B = B, T = T, C = C] {
                Device<floatX> out(M * C), e(wte), w(wpe);
                Device<int> tok(tokens);
                gpu::embedding_forward(out, tok, e, w, B, T, C, masks.gpu(), STREAM);
                return std::vector<Values>{out.values()};
            })[0];
            check_x("embedding forward:" + sizes({B, T, C}), got, want);
            check_same_mask(got, want, p);
        }
}

TEST_CASE("buckets list each position once, under its token, ascending; frequent tokens are marked") {
    for (size_t M : {(size_t)1, (size_t)64, (size_t)65, (size_t)582, (size_t)3000})
        for (int V : {1, 5, 300, 50257, 1000000}) {  // none to three digits of the radix sort
            std::vector<int> tokens = skewed_tokens(M, V, M), memory(gpu::EmbeddingBuckets::ints(M) + 1, -7);
            auto b = gpu::EmbeddingBuckets::at(memory.data(), M);
            gpu::bucket_tokens(b, tokens.data(), M);
            CHECK(memory.back() == -7);
            int U = b.count[0], seen = 0, frequent = 0;
            bool right = b.starts[0] == 0 && b.starts[U] == (int)M;
            for (int u = 0; u < U; u++) {
                right = right && (u == 0 || b.token[u - 1] < b.token[u]) && b.starts[u] < b.starts[u + 1];
                for (int i = b.starts[u]; i < b.starts[u + 1]; i++, seen++)
                    right = right && tokens[b.order[i]] == b.token[u] &&
                            (i == b.starts[u] || b.order[i - 1] < b.order[i]);
                if (b.starts[u + 1] - b.starts[u] > gpu::EmbeddingBuckets::FREQUENT)
                    right = right && frequent < b.count[1] && b.frequent[frequent++] == u;
            }
            CHECK(right);
            CHECK(seen == (int)M);
            CHECK(frequent == b.count[1]);
        }
}

TEST_CASE("embedding backward is the CPU's, and repeatable, for rare and frequent tokens") {
    struct {
        size_t B, T, C;
    } shapes[] = {{1, 1, 8}, {6, 97, 40}, {9, 65, 264}, {2, 300, 136}, {3, 7, 1608}};
    for (auto [B, T, C] : shapes)
        for (float p : {0.0f, 0.4f}) {
            int V = 50;
            size_t M = B * T;
            std::vector<int> tokens = skewed_tokens(M, V - 2, C), memory(gpu::EmbeddingBuckets::ints(M));
            int most = gpu::EmbeddingBuckets::FREQUENT;
            if (M > 200)  // one token at the limit, and one just above
                std::fill_n(tokens.begin(), most, V - 2), std::fill_n(tokens.begin() + most, most + 1, V - 1);
            gpu::bucket_tokens(gpu::EmbeddingBuckets::at(memory.data(), M), tokens.data(), M);
            Values dout = normals_x(M * C, 3), dwte = normals(V * C, 4), dwpe = normals((T + 3) * C, 5);
            Values want_wte = dwte, want_wpe = dwpe, masked = dout;
            Masks masks(p, rng::EMB_DROPOUT);
            cpu::embedding_backward(want_wte.data(), want_wpe.data(), masked.data(), tokens.data(), B, T, C,
                                    masks.cpu(), Masks::SEQ0 * T * C);
            auto got = repeatable([&, B = B, T = T, C = C] {
                Device<float> e(dwte), w(dwpe);
                Device<floatX> d(dout);
                Device<int> m(memory);
                gpu::embedding_backward(e, w, d, gpu::EmbeddingBuckets::at(m, M), B, T, C, masks.gpu(),
                                        STREAM);
                return std::vector<Values>{e.values(), w.values(), d.values()};
            });
            check_float("embedding backward: wte" + sizes({B, T, C}), got[0], want_wte);
            check_float("embedding backward: wpe" + sizes({B, T, C}), got[1], want_wpe);
            CHECK(same_bits(got[2], dout));
            CHECK(std::equal(dwpe.begin() + T * C, dwpe.end(), got[1].begin() + T * C));
        }
}

// ---------------------------------------------------------------------------------------------
// LayerNorm

// Channels for every number of warps that can share a row. Some fill the warps exactly; the last is the
// maximum.
const size_t CHANNELS[] = {8, 40, 768, 776, 1600, 3080, 6152, 12288};
constexpr float EPS = 0.02f;  // large enough to matter

gpu::LayerNormForward forward_args(floatX* y, float* mean, float* rstd, const floatX* x, const floatX* w,
                                   const floatX* b) {
    gpu::LayerNormForward args;
    args.y = y, args.mean = mean, args.rstd = rstd;
    args.x = x, args.w = w, args.b = b;
    return args;
}

TEST_CASE("layernorm forward is the CPU's, at every number of warps that share a row") {
    for (size_t C : CHANNELS)
        for (size_t M : {(size_t)1, (size_t)7}) {
            Values x = normals_x(M * C, C, 1, 3), w = normals_x(C, 1, 0.3, 1), b = normals_x(C, 2), y(M * C),
                   mean(M), rstd(M);
            cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), b.data(), M, C,
                                   EPS);
            auto got = repeatable([&] {
                Device<floatX> out(M * C), in(x), weight(w), bias(b);
                Device<float> mu(M), rs(M);
                gpu::layernorm_forward(forward_args(out, mu, rs, in, weight, bias), M, C, EPS, STREAM);
                return std::vector<Values>{out.values(), mu.values(), rs.values()};
            });
            check_x("layernorm forward: y" + sizes({M, C}), got[0], y);
            check_float("layernorm forward: mean" + sizes({M, C}), got[1], mean);
            check_float("layernorm forward: rstd" + sizes({M, C}), got[2], rstd);
        }
}

TEST_CASE("layernorm refuses rows that do not fit registers, or are no multiple of a vector") {
    for (size_t C : {(size_t)12, gpu::MAX_CHANNELS + 8}) {
        Device<floatX> x(C), y(C), w(C), b(C);
        Device<float> mean(1), rstd(1);
        CHECK_THROWS_AS(gpu::layernorm_forward(forward_args(y, mean, rstd, x, w, b), 1, C, EPS, STREAM),
                        std::logic_error);
    }
}

TEST_CASE("residual layernorm: the sum, and the layernorm of the sum as it is stored") {
    for (size_t C : CHANNELS)
        for (float p : {0.0f, 0.2f}) {
            size_t T = 5, M = 2 * T;
            Values skip = normals_x(M * C, 3), branch = normals_x(M * C, 4), w = normals_x(C, 1, 0.3, 1),
                   b = normals_x(C, 2);
            Values sum(M * C), y(M * C), mean(M), rstd(M);
            std::fill(skip.begin() + T * C, skip.end(), 0.0f);  // the second sequence's sum shows its mask
            Masks masks(p, rng::ATTPROJ_DROPOUT);
            Values masked = branch;
            cpu::residual_layernorm_forward(sum.data(), y.data(), mean.data(), rstd.data(), skip.data(),
                                            masked.data(), w.data(), b.data(), M, C, masks.cpu(),
                                            Masks::SEQ0 * T * C, EPS);
            auto got = repeatable([&] {
                Device<floatX> s(M * C), out(M * C), a(skip), br(branch), weight(w), bias(b);
                Device<float> mu(M), rs(M);
                gpu::LayerNormForward args = forward_args(out, mu, rs, a, weight, bias);
                args.branch = br, args.sum = s;
                gpu::residual_layernorm_forward(args, M, T, C, masks.gpu(), EPS, STREAM);
                return std::vector<Values>{s.values(), out.values(), mu.values(), rs.values()};
            });
            check_x("residual layernorm: sum" + sizes({M, C}), got[0], sum);
            check_same_mask(Values(got[0].begin() + T * C, got[0].end()),
                            Values(sum.begin() + T * C, sum.end()), p);
            cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), got[0].data(), w.data(), b.data(), M,
                                   C, EPS);
            check_x("residual layernorm: y" + sizes({M, C}), got[1], y);
            check_float("residual layernorm: mean" + sizes({M, C}), got[2], mean);
            check_float("residual layernorm: rstd" + sizes({M, C}), got[3], rstd);
        }
}

TEST_CASE("layernorm backward: without a residual, from its input, from its output; a dropout mask") {
    struct {
        gpu::Residual residual;
        float p;
    } cases[] = {{gpu::NO_RESIDUAL, 0}, {gpu::FROM_INPUT, 0.25f}, {gpu::FROM_OUTPUT, 0.25f}};
    for (size_t C : CHANNELS)
        for (auto [residual, p] : cases) {
            if (C > 2000 && p == 0) continue;
            const bool bias = residual != gpu::FROM_INPUT || C > 6000;  // its sums in the same kernel
            size_t groups = gpu::row_layout(C, gpu::BACKWARD_WARPS).block, T = 3,
                   M = (2 * gpu::layernorm_backward_blocks() * groups / T + 1) * T;
            Values dy = normals_x(M * C, 3), x = normals_x(M * C, 4, 2, 1), w = normals_x(C, 1, 0.3, 1),
                   before = normals_x(M * C, 5);
            Values dw = normals(C, 6), db = normals(C, 7), dbias = normals(C, 8), y(M * C), mean(M), rstd(M),
                   zero(C);
            cpu::layernorm_forward(y.data(), mean.data(), rstd.data(), x.data(), w.data(), zero.data(), M, C,
                                   EPS);
            Masks masks(p, rng::FCPROJ_DROPOUT);

            Values want = before, want_dw = dw, want_db = db, d = dy, want_masked(M * C);
            for (size_t i = 0; i < M * C && residual == gpu::FROM_OUTPUT; i++) d[i] += before[i];
            cpu::layernorm_backward(want.data(), p > 0 ? want_masked.data() : nullptr, want_dw.data(),
                                    want_db.data(), d.data(), x.data(), mean.data(), rstd.data(), w.data(), M,
                                    C, residual == gpu::FROM_INPUT, masks.cpu(), Masks::SEQ0 * T * C);
            if (p == 0) want_masked = want;
            Values want_dbias = dbias;
            if (bias) gemm::bias_gradient(want_dbias.data(), want_masked.data(), M, C);

            gpu::layernorm_init(C);
            auto got = repeatable([&, residual = residual, p = p] {
                Device<floatX> dresid(before), out(M * C), dyd(dy), xd(x), wd(w);
                Device<float> dwd(dw), dbd(db), dbiasd(dbias), mu(mean), rs(rstd),
                    scratch(gpu::layernorm_backward_scratch(C, bias));
                gpu::LayerNormBackward args;
                args.dresid = dresid, args.masked = p > 0 ? (floatX*)out : nullptr;
                args.dw = dwd, args.db = dbd, args.scratch = scratch;
                args.dbias = bias ? (float*)dbiasd : nullptr;
                args.dy = dyd, args.residual = residual;
                args.x = xd, args.w = wd, args.mean = mu, args.rstd = rs;
                gpu::layernorm_backward(args, M, T, C, masks.gpu(), STREAM);
                return std::vector<Values>{dresid.values(), p > 0 ? out.values() : dresid.values(),
                                           dwd.values(), dbd.values(), dbiasd.values()};
            });
            std::string at = sizes({M, C}) + strf(" residual %d", (int)residual);
            check_x("layernorm backward: dresid" + at, got[0], want);
            check_x("layernorm backward: masked" + at, got[1], want_masked);
            if (p > 0) check_same_mask(got[1], want_masked, p);
            check_float("layernorm backward: dw" + at, got[2], want_dw);
            check_float("layernorm backward: db" + at, got[3], want_db);
            check_float("layernorm backward: dbias" + at, got[4], want_dbias);
        }
}

TEST_CASE("layernorm backward may write over the gradients it reads") {
    size_t M = 37, C = 1600;
    Values dy = normals_x(M * C, 3), x = normals_x(M * C, 4), w = normals_x(C, 1), mean(M, 0.1f),
           rstd(M, 0.9f);
    auto run = [&](bool in_place) {
        Device<floatX> dresid(M * C), out(M * C), dyd(dy), xd(x), wd(w);
        Device<float> dw(Values(C, 0)), db(Values(C, 0)), mu(mean), rs(rstd),
            scratch(gpu::layernorm_backward_scratch(C, false));
        Masks masks(0.5f, rng::FCPROJ_DROPOUT);
        gpu::LayerNormBackward args;
        args.dresid = dresid, args.masked = in_place ? (floatX*)dyd : (floatX*)out;
        args.dw = dw, args.db = db, args.scratch = scratch, args.dy = dyd;
        args.x = xd, args.w = wd, args.mean = mu, args.rstd = rs;
        gpu::layernorm_backward(args, M, M, C, masks.gpu(), STREAM);
        return std::vector<Values>{dresid.values(), in_place ? dyd.values() : out.values(), dw.values()};
    };
    auto a = run(false), b = repeatable([&] { return run(true); });
    for (size_t i = 0; i < a.size(); i++) CHECK(same_bits(a[i], b[i]));
}

TEST_CASE("layernorm: a NaN stays in its row, and shows in the sums over rows") {
    size_t M = 9, C = 776, bad = 4;
    Values x = normals_x(M * C, 3), dy = normals_x(M * C, 4), w(C, 1.0f), b(C, 0.0f), y(M * C), mean(M),
           rstd(M);
    x[bad * C + 5] = NAN;
    Device<floatX> out(M * C), in(x), weight(w), bias(b), d(dy), dresid(M * C);
    Device<float> mu(M), rs(M), dw(Values(C, 0)), db(Values(C, 0)),
        scratch(gpu::layernorm_backward_scratch(C, false));
    gpu::layernorm_forward(forward_args(out, mu, rs, in, weight, bias), M, C, EPS, STREAM);
    gpu::LayerNormBackward args;
    args.dresid = dresid, args.dw = dw, args.db = db, args.scratch = scratch, args.dy = d;
    args.x = in, args.w = weight, args.mean = mu, args.rstd = rs;
    gpu::layernorm_backward(args, M, M, C, {}, STREAM);
    Values got = out.values(), back = dresid.values(), sums = dw.values();
    size_t wrong = 0;
    for (size_t i = 0; i < M * C; i++)
        wrong += std::isnan(got[i]) != (i / C == bad), wrong += std::isnan(back[i]) != (i / C == bad);
    for (float f : sums) wrong += !std::isnan(f);
    CHECK(wrong == 0);
    CHECK(all_finite(db.values().data(), C));
}

// ---------------------------------------------------------------------------------------------
// GELU and bias

TEST_CASE("GELU and its derivative, tanh and erf form, also of large numbers, zero and NaN") {
    for (int activation : {GELU_TANH, GELU_ERF}) {
        size_t n = 8 * 777;
        Values x = normals_x(n, 1, 2.5), d = normals_x(n, 2), y(n), want_d = d;
        const float special[] = {0.0f, -0.0f, 20, -20, 88, -100, 1e4f, -1e4f};
        std::copy(std::begin(special), std::end(special), x.begin() + 1000);
        simd::gelu_forward(y.data(), x.data(), n, activation);
        simd::gelu_backward(want_d.data(), want_d.data(), x.data(), n, activation);
        auto got = repeatable([&] {
            Device<floatX> in(x), out(n), grad(d);
            gpu::gelu_forward(out, in, n, activation, STREAM);
            gpu::gelu_backward(grad, in, n, activation, STREAM);
            gpu::gelu_forward(in, in, n, activation, STREAM);
            return std::vector<Values>{out.values(), grad.values(), in.values()};
        });
        std::string form = activation == GELU_TANH ? "tanh" : "erf";
        for (Values* v : {&got[0], &y})  // the large ones would hide the others in a relative L2 error
            for (size_t i = 1000; i < 1008; i++) {
                CHECK((*v)[i] == doctest::Approx(std::max(0.0f, x[i])).epsilon(4e-3));
                (*v)[i] = 0;
            }
        check_x("GELU forward: " + form, got[0], y);
        check_x("GELU backward: " + form, got[1], want_d);
        for (size_t i = 0; i < 8; i++) got[2][1000 + i] = 0;
        CHECK(same_bits(got[0], got[2]));

        Device<floatX> nan(Values(8, NAN)), grad(Values(8, 1.0f));
        gpu::gelu_backward(grad, nan, 8, activation, STREAM);
        gpu::gelu_forward(nan, nan, 8, activation, STREAM);
        for (float f : nan.values()) CHECK(std::isnan(f));
        for (float f : grad.values()) CHECK(std::isnan(f));
    }
}

TEST_CASE("bias and GELU in one kernel, also with more rows than the grid has") {
    for (size_t N : {(size_t)8, (size_t)40, (size_t)2056})
        for (int activation : {GELU_TANH, GELU_ERF})
            for (bool gelu : {true, false}) {
                size_t M = 2 * 32 * gpu::multiprocessors() + 3;
                if (N > 1000) M = M / 3 + 1;  // two or three strips of columns share the rows
                Values x = normals_x(M * N, 1), bias = normals_x(N, 2), pre = x, y(M * N);
                for (size_t i = 0; i < M * N; i++) pre[i] += bias[i % N];
                auto got = repeatable([&] {
                    Device<floatX> p(x), out(M * N), b(bias);
                    gpu::bias_gelu_forward(p, gelu ? (floatX*)out : nullptr, b, M, N, activation, STREAM);
                    return std::vector<Values>{p.values(), gelu ? out.values() : Values()};
                });
                check_x("bias forward:" + sizes({M, N}), got[0], pre);
                simd::gelu_forward(y.data(), got[0].data(), M * N, activation);
                if (gelu) check_x("bias GELU forward:" + sizes({M, N}), got[1], y);
            }
}

TEST_CASE("bias backward adds column sums") {
    for (size_t N : {(size_t)8, (size_t)264, (size_t)2304})
        for (size_t M : {(size_t)1, (size_t)5, 2 * 8 * gpu::bias_backward_parts(N) + 3}) {
            Values dY = normals_x(M * N, 1), db = normals(N, 2), want = db;
            gemm::bias_gradient(want.data(), dY.data(), M, N);
            Values got = repeatable([&] {
                Device<floatX> d(dY);
                Device<float> b(db), scratch(gpu::bias_backward_scratch(N));
                gpu::bias_backward(b, scratch, d, M, N, STREAM);
                return std::vector<Values>{b.values()};
            })[0];
            check_float("bias backward:" + sizes({M, N}), got, want);
        }
}

TEST_CASE("GELU backward with the bias's gradient: of the values before they are rounded") {
    for (size_t N : {(size_t)8, (size_t)264})
        for (size_t M : {(size_t)1, (size_t)5, 5 * 8 * gpu::bias_backward_parts(N) + 3})
            for (int activation : {GELU_TANH, GELU_ERF}) {
                Values d = normals_x(M * N, 1), x = normals_x(M * N, 3), db = normals(N, 2), want = db,
                       want_d = d;
                simd::gelu_backward(want_d.data(), want_d.data(), x.data(), M * N, activation);
                gemm::bias_gradient(want.data(), want_d.data(), M, N);
                auto got = repeatable([&] {
                    Device<floatX> dd(d), xd(x);
                    Device<float> b(db), scratch(gpu::bias_backward_scratch(N));
                    gpu::gelu_bias_backward(b, scratch, dd, xd, M, N, activation, STREAM);
                    return std::vector<Values>{b.values(), dd.values(), xd.values()};
                });
                check_float("GELU backward: bias" + sizes({M, N}), got[0], want);
                check_x("GELU backward: gradient" + sizes({M, N}), got[1], want_d);
                CHECK(same_bits(got[2], x));
            }
}

TEST_CASE("add_to adds an array to another") {
    Values x = normals(1003, 1), y = normals(1003, 2);
    Device<float> xd(x), yd(y);
    gpu::add_to(yd, xd, x.size(), STREAM);
    for (size_t i = 0; i < x.size(); i++) y[i] += x[i];
    CHECK(same_bits(yd.values(), y));
}

// ---------------------------------------------------------------------------------------------
// Softmax cross-entropy

TEST_CASE("cross-entropy: a few blocks compute the same bits, row after row") {
    for (int V : {50, 9000})  // a thread has one vector of a row, or several
        for (bool train : {true, false}) {
            size_t Vp = pad_vocab(V), rows = 2 * (size_t)gpu::multiprocessors() + 1;
            Values logits = normals_x(rows * Vp, V, 3);
            std::vector<int> targets(rows);
            for (size_t r = 0; r < rows; r++) targets[r] = r % 4 == 1 ? -1 : (int)(r * 7919 % V);
            auto run = [&] {
                Device<floatX> x(logits);
                Device<float> loss(rows);
                Device<int> t(targets);
                Device<gpu::StepState> state(std::vector<gpu::StepState>{{0, 0, 1.0f / 37}});
                gpu::cross_entropy(loss, x, t, rows, V, Vp, train, train ? (gpu::StepState*)state : nullptr,
                                   STREAM);
                return std::vector<Values>{loss.values(), x.values()};
            };
            const auto want = run();
            Temporarily few(gpu::switches.rows_in_l2, true);
#ifdef EMULATOR
            Temporarily small(emu::options().l2_bytes, 1);  // then each multiprocessor has one row at a time
#endif
            const auto got = repeatable(run);
            for (size_t i = 0; i < want.size(); i++) CHECK(same_bits(got[i], want[i]));
#ifdef EMULATOR
            CHECK(gpu::cross_entropy_blocks(rows, Vp * sizeof(floatX)) == (size_t)gpu::multiprocessors());
            emu::options().l2_bytes = 2 * (rows - 1) * Vp * sizeof(floatX);
            CHECK(gpu::cross_entropy_blocks(rows, Vp * sizeof(floatX)) == rows - 1);
            CHECK(gpu::cross_entropy_blocks(rows - 2, Vp * sizeof(floatX)) == rows - 2);
#endif
        }
}

TEST_CASE("cross-entropy: losses, gradient in place, ignored targets, zeros past the vocabulary") {
    for (int V : {1, 40, 50, 1000, 50257})
        for (bool train : {true, false})
            for (double scale : {1.0, 30.0}) {
                size_t Vp = pad_vocab(V), rows = V > 50000 ? 3 : 7;
                Values logits = normals_x(rows * Vp, V, scale), want(rows * V), losses(rows);
                std::vector<int> targets(rows);
                for (size_t r = 0; r < rows; r++) {
                    targets[r] = r % 3 == 1 ? -1 : (int)(r * 7919 % V);
                    std::copy_n(logits.begin() + r * Vp, V, want.begin() + r * V);
                    std::fill_n(logits.begin() + r * Vp + V, Vp - V, NAN);  // no kernel may use these
                }
                targets[rows - 1] = V - 1;
                float grad_scale = 1.0f / 37;
                cpu::cross_entropy(losses.data(), want.data(), V, targets.data(), rows, V,
                                   train ? grad_scale : 0.0f);
                auto got = repeatable([&] {
                    Device<floatX> x(logits);
                    Device<float> loss(rows);
                    Device<int> t(targets);
                    Device<gpu::StepState> state(std::vector<gpu::StepState>{{0, 0, grad_scale}});
                    gpu::cross_entropy(loss, x, t, rows, V, Vp, train,
                                       train ? (gpu::StepState*)state : nullptr, STREAM);
                    return std::vector<Values>{loss.values(), x.values()};
                });
                check_float("cross-entropy: losses" + sizes({rows, (size_t)V}), got[0], losses);
                if (!train) {
                    CHECK(!memcmp(got[1].data(), logits.data(), logits.size() * sizeof(float)));
                    continue;
                }
                Values grad(rows * V);
                bool zeros = true;
                for (size_t r = 0; r < rows; r++) {
                    std::copy_n(got[1].begin() + r * Vp, V, grad.begin() + r * V);
                    for (size_t v = V; v < Vp; v++) zeros = zeros && got[1][r * Vp + v] == 0;
                }
                CHECK(zeros);
                check_x("cross-entropy: gradient" + sizes({rows, (size_t)V}), grad, want);
            }
}

TEST_CASE("cross-entropy of huge, infinite and NaN logits is the CPU's, row by row") {
    size_t V = 300, Vp = pad_vocab((int)V), rows = 5;
    Values logits = normals_x(rows * Vp, 1), want(rows * V), losses(rows);
    logits[0 * Vp + 7] = 1e30f;
    for (size_t v = 0; v < V; v++)
        if (v % 16 < 8) logits[1 * Vp + v] = -INFINITY;
    logits[2 * Vp + 299] = NAN;
    logits[3 * Vp + 3] = INFINITY;
    for (size_t r = 0; r < rows; r++) std::copy_n(logits.begin() + r * Vp, V, want.begin() + r * V);
    std::vector<int> targets = {7, 8, 5, 3, 2};
    cpu::cross_entropy(losses.data(), want.data(), V, targets.data(), rows, V, 1.0f);
    Device<floatX> x(logits);
    Device<float> loss(rows);
    Device<int> t(targets);
    Device<gpu::StepState> state(std::vector<gpu::StepState>{{0, 0, 1.0f}});
    gpu::cross_entropy(loss, x, t, rows, V, Vp, true, state, STREAM);
    Values got_loss = loss.values(), got = x.values();
    for (size_t r = 0; r < rows; r++) {
        bool nan = r == 2 || r == 3;
        CHECK(std::isnan(losses[r]) == nan);
        CHECK(std::isnan(got_loss[r]) == nan);
        if (!nan) CHECK(got_loss[r] == doctest::Approx(losses[r]).epsilon(1e-5));
        for (size_t v = 0; v < V; v++) {
            if (nan) REQUIRE(std::isnan(got[r * Vp + v]));
            else REQUIRE(got[r * Vp + v] == doctest::Approx(want[r * V + v]).epsilon(0.01));
        }
    }
}

TEST_CASE("sum_losses adds to the sum of losses and to the count of targets") {
    for (size_t M : {(size_t)1, (size_t)1023, (size_t)5001}) {
        Values losses = normals(M, 1, 1, 5);
        std::vector<int> targets(M);
        double sum = 0;
        unsigned long long counted = 0;
        for (size_t m = 0; m < M; m++) {
            targets[m] = m % 5 == 2 ? -1 : (int)m;
            if (targets[m] < 0) losses[m] = 0;
            sum += losses[m], counted += targets[m] >= 0;
        }
        float grad_scale = 1.0f / 11;
        Device<float> l(losses);
        Device<int> t(targets);
        Device<gpu::StepState> state(std::vector<gpu::StepState>{{0, 0, grad_scale}});
        Device<double> total(std::vector<double>{1.5, 2.5});
        Device<unsigned long long> count(std::vector<unsigned long long>{3});
        gpu::sum_losses(total, count, l, t, M, nullptr, STREAM);
        gpu::sum_losses(total + 1, nullptr, l, t, M, state, STREAM);
        CHECK(total.get()[0] == doctest::Approx(1.5 + sum).epsilon(1e-12));
        CHECK(total.get()[1] == doctest::Approx(2.5 + sum * grad_scale).epsilon(1e-12));
        CHECK(count.get()[0] == 3 + counted);
    }
}

// ---------------------------------------------------------------------------------------------
// AdamW

// A model's parameters and optimizer state on the device and in cpu::GPT2, large enough that the kernels'
// loops run at least twice. get() and set() use the file's order. On the device the arrays are laid out as
// ParamLayout says where `layered` is true, otherwise as in the file.
struct Optimizer {
    Config config = [] {
        Config c;
        c.maxT = 8, c.V = 40, c.Vp = 128, c.NH = 2, c.C = 64, c.L = 1;
        // 8 multiprocessors' worth of blocks of 256 threads with 4 numbers each, twice
        while (num_params(c) < (size_t)2 * 8 * 256 * 4 * gpu::multiprocessors()) c.L++;
        return c;
    }();
    size_t n = num_params(config);
    cpu::GPT2 model{config, 1, 1, true};
    bool with_master, layered;
    Device<floatX> params{n};
    Device<float> master{n}, grads{n}, m{n}, v{n};
    Device<double> scratch{gpu::adamw_scratch()}, loss{std::vector<double>{1.25}};
    Device<StepResult> report{std::vector<StepResult>(1)};
    std::vector<gpu::Segment> host_segments = gpu::param_segments(owned_pieces(config, {}, true), {});
    Device<gpu::Segment> segments{host_segments.size()};

    explicit Optimizer(bool with_master_, bool layered_ = true)
        : with_master(with_master_), layered(layered_) {
        for (gpu::Segment& s : host_segments)
            if (!layered) s.memory = s.state = s.second = s.grads = 0;
        segments.set(host_segments);
        model.init_weights(1);
        Values w = get_state(model, PARAMS);
        if (!with_master) w = rounded(w), set_state(model, PARAMS, w);
        set(params, w), set(master, w);
        set(m, Values(n, 0)), set(v, Values(n, 0));
    }
    gpu::ParamMap map() { return {segments, n}; }
    // One of the arrays, in the file's order.
    template <class T>
    Values get(const Device<T>& d) const {
        return layered ? to_file(config, d.values()) : d.values();
    }
    template <class T>
    void set(Device<T>& d, const Values& file) const {
        Values in_memory = layered ? to_memory(config, file) : file;
        std::vector<T> x(n);
        for (size_t i = 0; i < n; i++) {
            if constexpr (std::is_same<T, float>::value) x[i] = in_memory[i];
            else x[i] = as_floatX(in_memory[i]);
        }
        d.set(x);
    }
    void step(const StepSettings& a, uint32_t t, uint64_t seed) {
        gpu::AdamWArrays arrays;
        arrays.report = report, arrays.loss = loss, arrays.scratch = scratch;
        arrays.map = arrays.norm_map = map();
        arrays.params = params, arrays.master = with_master ? (float*)master : nullptr;
        arrays.grads = grads, arrays.m = m, arrays.v = v;
        gpu::update(arrays, gpu::grad_norm(arrays, STREAM), a, t, seed, STREAM);
    }
};

const StepSettings SETTINGS[] = {{1e-3f, 0.9f, 0.95f, 1e-8f, 0.1f, 0},
                                 {3e-3f, 0.9f, 0.95f, 1e-8f, 0.5f, 1.0f},
                                 {1e-2f, 0.8f, 0.99f, 1e-6f, 0, 1e6f}};

TEST_CASE("AdamW over several steps is the CPU's, clipped or not, and keeps the gradients") {
    for (const StepSettings& a : SETTINGS) {
        Optimizer o(gpu::BUILD_DTYPE == BF16);
        for (uint32_t t = 1; t <= 4; t++) {
            Values g = normals(o.n, t, 0.01 * t);
            o.set(o.grads, g);
            set_state(o.model, GRADS, g);
            o.step(a, t, 5);
            StepResult want = o.model.step(a, t), got = o.report.get()[0];
            CHECK(got.loss == 1.25);
            CHECK(got.norm == doctest::Approx(want.norm).epsilon(1e-12));
            CHECK(same_bits(o.get(o.grads), g));
        }
        Values got = gpu::BUILD_DTYPE == BF16 ? o.get(o.master) : o.get(o.params);
        check_float("AdamW: parameters", got, get_state(o.model, PARAMS));
        check_float("AdamW: first moment", o.get(o.m), get_state(o.model, ADAM_M));
        check_float("AdamW: second moment", o.get(o.v), get_state(o.model, ADAM_V));
        // The steps are small beside the parameters, so they are also compared alone.
        Optimizer fresh(true);
        Values before = fresh.get(fresh.master), want = get_state(o.model, PARAMS);
        for (size_t i = 0; i < o.n; i++) got[i] -= before[i], want[i] -= before[i];
        check_close("AdamW: change of parameters", got.data(), want.data(), o.n, 20 * FLOAT_TOLERANCE);
        CHECK(param_offsets(o.config)[NUM_PARAMS] == o.n);
        CHECK(all_finite(o.get(o.params).data(), o.n));
    }
}

TEST_CASE("AdamW gives the same bits under every schedule") {
    repeatable([&] {
        Optimizer o(gpu::BUILD_DTYPE == BF16);
        o.set(o.grads, normals(o.n, 9, 0.1));
        for (uint32_t t = 1; t <= 2; t++) o.step(SETTINGS[1], t, 5);
        return std::vector<Values>{o.params.values(), o.m.values(), o.v.values()};
    });
}

TEST_CASE("AdamW gives the same bits whatever the layout of the tensors in memory") {
    for (bool with_master : {true, false}) {
        Optimizer a(with_master, true), b(with_master, false);
        for (uint32_t t = 1; t <= 3; t++)
            for (Optimizer* o : {&a, &b}) {
                o->set(o->grads, normals(o->n, t, 0.1));
                o->step(SETTINGS[1], t, 5);
            }
        CHECK(a.report.get()[0].norm == b.report.get()[0].norm);
        CHECK(!same_bits(a.params.values(), b.params.values()));  // the layouts do differ
        CHECK(same_bits(a.get(a.params), b.get(b.params)));
        CHECK(same_bits(a.get(a.master), b.get(b.master)));
        CHECK(same_bits(a.get(a.m), b.get(b.m)));
        CHECK(same_bits(a.get(a.v), b.get(b.v)));
        for (Optimizer* o : {&a, &b}) gpu::round_parameters(o->params, o->master, o->map(), 6, 3, STREAM);
        CHECK(same_bits(a.get(a.params), b.get(b.params)));
    }
}

TEST_CASE("AdamW with a norm or loss that is not finite changes nothing but the report") {
    struct {
        float grad;
        double loss;
    } cases[] = {{NAN, 1}, {INFINITY, 1}, {-INFINITY, 1}, {0.5f, NAN}, {0.5f, INFINITY}};
    for (auto [grad, loss] : cases)
        for (bool with_master : {true, false}) {
            Optimizer o(with_master);
            Values g = normals(o.n, 9, 0.1);
            o.set(o.grads, g);
            o.step(SETTINGS[0], 1, 5);
            Values before[] = {o.params.values(), o.master.values(), o.m.values(), o.v.values()};
            g[o.n - 3] = grad;
            o.set(o.grads, g), o.loss.set({loss});
            o.step(SETTINGS[0], 2, 5);
            CHECK(same_bits(o.params.values(), before[0]));
            CHECK(same_bits(o.master.values(), before[1]));
            CHECK(same_bits(o.m.values(), before[2]));
            CHECK(same_bits(o.v.values(), before[3]));
            StepResult r = o.report.get()[0];
            CHECK(!r.finite());
            CHECK(std::isfinite(r.norm) == std::isfinite(grad));
            CHECK(std::isfinite(r.loss) == std::isfinite(loss));
        }
}

TEST_CASE("AdamW skips a step whose norm or loss is above its limit, and takes one that is not") {
    Optimizer o(true);
    o.set(o.grads, normals(o.n, 9, 0.1)), o.loss.set({2.5});
    StepSettings a = SETTINGS[0];
    Values before[] = {o.params.values(), o.master.values(), o.m.values(), o.v.values()};
    a.max_loss = 2.4;
    o.step(a, 1, 5);
    const double norm = o.report.get()[0].norm;
    a.max_loss = INFINITY, a.max_norm = norm * 0.999;
    o.step(a, 1, 5);
    CHECK(same_bits(o.params.values(), before[0]));
    CHECK(same_bits(o.master.values(), before[1]));
    CHECK(same_bits(o.m.values(), before[2]));
    CHECK(same_bits(o.v.values(), before[3]));
    a.max_loss = 2.5, a.max_norm = norm;
    o.step(a, 1, 5);
    CHECK(!same_bits(o.master.values(), before[1]));
}

// ---------------------------------------------------------------------------------------------
// Muon

// A round of matrices (n,m), every other one stored transposed unless n = m, on the device and in
// cpu::muon_*. Each array holds the matrices in another order, so that a kernel that takes one array's index
// for another's is noticed.
struct Muon {
    size_t n, m, count, size = n * m, total = count * size;
    std::vector<gpu::MuonTarget> targets;
    Values w, momentum, grads;  // matrix after matrix
    bool with_master = gpu::BUILD_DTYPE == BF16;
    Device<floatX> params{total};
    Device<float> master{total}, m_array{total}, g_array{total}, directions{total};
    Device<double> squares{count * gpu::MuonScratch::parts(size)};
    Device<floatX> x{total}, gram{count * n * n}, polynomial{count * n * n};
    Device<char> workspace{gpu::Matmul::WORKSPACE};
    Device<gpu::MuonTarget> on_device{count};
    Device<StepResult> report{std::vector<StepResult>{{2.5, 3.0, 0}}};
    gpu::MuonScratch scratch{};
    gpu::AdamWArrays arrays;
    gpu::Matmul products{workspace, nullptr, STREAM, true};

    Muon(size_t n_, size_t m_, size_t count_)
        : n(n_), m(m_), count(count_), w(normals_x(total, 31, 0.02)), momentum(normals(total, 32, 0.01)) {
        // Singular values of very different sizes, as gradients have
        for (size_t i = 0; i < count; i++) {
            const Values a = normals(n * 4, 33 + i), b = normals(m * 4, 43 + i),
                         noise = normals(size, 53 + i);
            for (size_t r = 0; r < n; r++)
                for (size_t c = 0; c < m; c++) {
                    float sum = 0.3f * noise[r * m + c];
                    for (size_t k = 0; k < 4; k++) sum += a[r * 4 + k] * b[c * 4 + k];
                    grads.push_back(0.01f * sum);
                }
        }
        if (count == 5)  // the last one of zeros, whose norm nothing can be divided by
            for (Values* x : {&momentum, &grads}) std::fill(x->begin() + 4 * (ptrdiff_t)size, x->end(), 0.0f);
        for (size_t i = 0; i < count; i++) {
            auto place = [&](size_t turn) { return (ptrdiff_t)((i + turn) % count * size); };
            targets.push_back({0, size, place(0) + 4000, place(1), place(2), place(3), n != m && i % 2 == 0});
        }
        put(params, &gpu::MuonTarget::memory, w), put(master, &gpu::MuonTarget::state, w);
        put(m_array, &gpu::MuonTarget::state, momentum), put(g_array, &gpu::MuonTarget::grads, grads);
        scratch.directions = directions, scratch.squares = squares, scratch.x = x, scratch.gram = gram;
        scratch.polynomial = polynomial;
        arrays.report = report, arrays.params = params, arrays.m = m_array, arrays.grads = g_array;
        arrays.master = with_master ? (float*)master : nullptr;
    }
    using Place = ptrdiff_t gpu::MuonTarget::*;
    template <class T>
    void put(Device<T>& to, Place place, const Values& x) {
        std::vector<T> in_memory(total);
        for (size_t e = 0; e < total; e++) {
            T& t = in_memory[(size_t)(targets[e / size].*place) + e % size];
            if constexpr (std::is_same<T, float>::value) t = x[e];
            else t = as_floatX(x[e]);
        }
        to.set(in_memory);
    }
    template <class T>
    Values get(const Device<T>& from, Place place) const {
        const Values in_memory = from.values();
        Values x(total);
        for (size_t e = 0; e < total; e++) x[e] = in_memory[(size_t)(targets[e / size].*place) + e % size];
        return x;
    }
    Values parameters() const {
        return with_master ? get(master, &gpu::MuonTarget::state) : get(params, &gpu::MuonTarget::memory);
    }
    Values everything() const {
        Values all;
        for (const Values& x : {params.values(), master.values(), m_array.values()})
            all.insert(all.end(), x.begin(), x.end());
        return all;
    }

    static gpu::MuonStep settings(double max_norm = INFINITY) {
        StepSettings a;
        a.grad_clip = 1.5f, a.max_norm = max_norm;
        return {0.9f, 0.02f, 0.1f, gpu::Limits(a), 7, 5};
    }
    void direction(const gpu::MuonStep& s, size_t first, size_t last) {
        on_device.set(targets);
        gpu::muon_direction(directions, first, last, arrays, on_device, count, size, s, STREAM);
    }
    void orthogonalise() {
        gpu::muon_orthogonalise(scratch.results(), directions, scratch, products, on_device, n, m, count,
                                STREAM);
    }
    void apply(const gpu::MuonStep& s) {
        gpu::muon_apply(arrays, scratch.results(), on_device, n, m, count, s, STREAM);
    }
    void step(const gpu::MuonStep& s) { direction(s, 0, count), orthogonalise(), apply(s); }
    // The first numbers in the memory of the directions, as what the results are.
    Values results() const {
        const std::vector<float> memory = directions.get();
        std::vector<floatX> typed(total);
        memcpy((void*)typed.data(), memory.data(), total * sizeof(floatX));
        Values x(total);
        for (size_t e = 0; e < total; e++) x[e] = as_float(typed[e]);
        return x;
    }
};

const std::array<size_t, 3> MUON_SHAPES[] = {
    {48, 48, 5}, {96, 384, 3}, {80, 320, 2}, {16, 64, 1}, {128, 128, 3}};

TEST_CASE("Muon: direction, orthogonalised matrices and parameters are the CPU's, in every shape") {
    using Operand = std::conditional_t<gpu::BUILD_DTYPE == BF16, cpu::bf16, float>;
    for (auto [n, m, count] : MUON_SHAPES) {
        const std::string what = "Muon" + sizes({n, m, count}) + ": ";
        CAPTURE(what);
        Muon o(n, m, count);
        Config c;
        c.C = (int)n;
        std::vector<char> memory;
        cpu::MuonScratch<Operand> scratch;
        Arena counts, arena;
        scratch.place(counts, c, 1), memory.resize(counts.used + 64);
        arena.base = (char*)round_up((size_t)memory.data(), 64), scratch.place(arena, c, 1);
        const gpu::MuonStep s = Muon::settings();
        const cpu::MuonStep cpu_step = {s.beta, s.lr, s.weight_decay, 0.5f};  // clips 3 to 1.5
        Values momentum = o.momentum, direction(o.total), X, w = o.w;
        o.direction(s, 0, count);
        const Values got = o.directions.values();
        for (size_t i = 0; i < count; i++) {
            const size_t at = i * o.size;
            const bool transposed = o.targets[i].transposed;
            cpu::muon_direction(&direction[at], &momentum[at], &o.grads[at], o.size, cpu_step);
            std::copy_n(&got[at], o.size, scratch.sums);  // the same input
            cpu::muon_orthogonalise(scratch, n, m, transposed);
            X.insert(X.end(), scratch.sums, scratch.sums + o.size);
        }
        check_float(what + "momentum", o.get(o.m_array, &gpu::MuonTarget::state), momentum);
        check_float(what + "direction", got, direction);
        o.orthogonalise();
        const Values results = o.results();
        check_close(what + "orthogonalised", results.data(), X.data(), o.total,
                    gpu::BUILD_DTYPE == BF16 ? 4e-2 : 3 * FLOAT_TOLERANCE);
        o.apply(s);
        Values change = o.parameters();
        for (size_t i = 0; i < count; i++)
            cpu::muon_apply(&w[i * o.size], &results[i * o.size], n, m, 0, n, o.targets[i].transposed,
                            cpu_step);
        for (size_t e = 0; e < o.total; e++) change[e] -= o.w[e], w[e] -= o.w[e];
        check_close(what + "change of parameters", change.data(), w.data(), o.total, FLOAT_TOLERANCE);
        CHECK(same_bits(o.get(o.g_array, &gpu::MuonTarget::grads), o.grads));
    }
}

TEST_CASE("Muon gives the same bits under every schedule") {
    repeatable([&] {
        Muon o(96, 384, 3);
        o.step(Muon::settings());
        return std::vector<Values>{o.everything(), o.results()};
    });
}

TEST_CASE("Muon touches only the elements of this rank, and writes only the directions it is asked for") {
    Muon o(80, 320, 3);
    for (size_t i = 0; i < 3; i++) o.targets[i].begin = 8 * (i + 1) * 331, o.targets[i].end = o.size - 8 * i;
    o.targets[2].begin = o.targets[2].end = 0;
    o.direction(Muon::settings(), 1, 2);
    const Values got = o.directions.values(), moved = o.get(o.m_array, &gpu::MuonTarget::state);
    o.directions.set(normals(o.total, 1));
    o.apply(Muon::settings());
    const Values w = o.parameters();
    size_t wrong = 0;
    for (size_t e = 0; e < o.total; e++) {
        const size_t i = e / o.size, at = e % o.size;
        const bool mine = o.targets[i].begin <= at && at < o.targets[i].end;
        wrong += std::isnan(got[e]) != !(mine && i == 1);
        wrong += (moved[e] != o.momentum[e]) != mine;
        wrong += (w[e] != o.w[e]) != mine;
    }
    CHECK(wrong == 0);
}

TEST_CASE("Muon with a loss or norm that is not finite or above its limit changes nothing") {
    for (StepResult r : {StepResult{NAN, 3, 0}, StepResult{2.5, INFINITY, 0}, StepResult{2.5, 3, 0}}) {
        Muon o(48, 48, 2);
        o.report.set({r});
        const Values before = o.everything();
        o.step(Muon::settings(2.99));
        CHECK(same_bits(o.everything(), before));
        o.report.set({{2.5, 2.99, 0}});
        o.step(Muon::settings(2.99));
        CHECK(!same_bits(o.everything(), before));
    }
}

#if !defined(PRECISION_FP32)
// Whether x is one of the two bf16 values around w, or w itself where w is a bf16 value.
bool is_neighbour(float x, float w) {
    uint32_t bits;
    memcpy(&bits, &w, 4);
    float low = bf16_to_float((uint16_t)(bits >> 16)), high = bf16_to_float((uint16_t)((bits >> 16) + 1));
    return x == low || (x == high && low != w);
}

TEST_CASE("without master weights a parameter is a bf16 neighbour of the CPU's result") {
    for (const StepSettings& a : SETTINGS) {
        Optimizer o(false);
        for (uint32_t t = 1; t <= 3; t++) {
            Values start = o.get(o.params), g = normals(o.n, t, 0.01);
            set_state(o.model, PARAMS, start);
            set_state(o.model, GRADS, g);
            o.set(o.grads, g);
            o.step(a, t, 5);
            o.model.step(a, t);
            Values got = o.get(o.params), want = get_state(o.model, PARAMS);
            size_t wrong = 0, changed = 0;
            for (size_t i = 0; i < o.n; i++) {  // the last bits of the two results may differ
                float w = want[i], less = w - std::fabs(w) * 2e-6f, more = w + std::fabs(w) * 2e-6f;
                wrong +=
                    !is_neighbour(got[i], w) && !is_neighbour(got[i], less) && !is_neighbour(got[i], more);
                changed += got[i] != start[i];
            }
            CHECK(wrong == 0);
            CHECK(changed > 0);
        }
    }
}

TEST_CASE("bf16 parameters are the masters, truncated after 16 bits of Philox block e / 8 are added") {
    Optimizer o(true);
    o.set(o.grads, normals(o.n, 9, 0.1));
    uint64_t seed = 0xfeedface12345678ull;
    for (uint32_t t = 1; t <= 2; t++) o.step(SETTINGS[0], t, seed);
    Values master = o.get(o.master), got = o.get(o.params), want(o.n);
    rng::Key key(seed, 2, rng::ROUNDING);
    for (size_t e = 0; e < o.n; e++) {
        uint32_t bits;
        memcpy(&bits, &master[e], 4);
        bits += key.block(e / 8).w[e % 8 / 2] >> (e % 2 * 16) & 0xffff;
        want[e] = bf16_to_float((uint16_t)(bits >> 16));
    }
    CHECK(same_bits(got, want));
    Device<floatX> again(o.n);
    gpu::round_parameters(again, o.master, o.map(), seed, 2, STREAM);
    CHECK(same_bits(o.get(again), got));  // so a resumed run has the same parameters
    gpu::round_parameters(again, o.master, o.map(), seed, 3, STREAM);
    CHECK(!same_bits(o.get(again), got));
}

TEST_CASE("stochastic rounding: to a neighbour, unbiased, independent from element to element") {
    constexpr size_t N = 4096, SEEDS = 256;
    Values w = normals(N, 1);
    w[0] = 0, w[1] = 1, w[2] = -0.5f, w[3] = 3.4e38f, w[4] = NAN, w[5] = INFINITY, w[6] = -INFINITY,
    w[7] = bf16_to_float(0x3f81);
    uint32_t all_ones = ~0u;
    memcpy(&w[8], &all_ones, 4);  // a NaN whose bits would overflow
    Device<float> master(w);
    Device<floatX> params(N);
    Device<gpu::Segment> segment(std::vector<gpu::Segment>{{N, 0, 0, 0, 0, 0, false}});
    double up[N] = {}, at[8] = {}, covariance[8][8] = {}, squares = 0;
    size_t wrong = 0;
    for (uint64_t seed = 0; seed < SEEDS; seed++) {
        gpu::round_parameters(params, master, {segment, N}, seed, 1, STREAM);
        Values got = params.values();
        double off[8];
        for (size_t e = 0; e < N; e++) {
            if (e == 4 || e == 8) {
                wrong += !std::isnan(got[e]);
                continue;
            }
            if (e < 16) {
                wrong += !is_neighbour(got[e], w[e]);
                continue;
            }
            wrong += !is_neighbour(got[e], w[e]);
            uint32_t bits;
            memcpy(&bits, &w[e], 4);
            float low = bf16_to_float((uint16_t)(bits >> 16));
            double p = (bits & 0xffff) / 65536.0;
            up[e] += off[e % 8] = (got[e] != low) - p;
            at[e % 8] += off[e % 8], squares += p * (1 - p);
            if (e % 8 != 7) continue;
            for (int i = 0; i < 8; i++)
                for (int j = 0; j < i; j++) covariance[i][j] += off[i] * off[j];
        }
    }
    CHECK(wrong == 0);
    double draws = (double)(N - 16) / 8 * SEEDS, variance = squares / (draws * 8), worst = 0;
    for (size_t e = 0; e < N; e++) worst = std::max(worst, std::fabs(up[e]) / SEEDS);
    CHECK(worst < 6 * std::sqrt(0.25 / SEEDS));
    for (int i = 0; i < 8; i++) {
        CHECK(std::fabs(at[i]) / draws < 5 * std::sqrt(variance / draws));
        for (int j = 0; j < i; j++)
            CHECK(std::fabs(covariance[i][j]) / draws < 5 * variance / std::sqrt(draws));
    }
}
#endif

}  // namespace
