// test_gpu_attention.cu - attention in train_gpt2.cu against cpu::Attention, and the tensor-core wrappers
// against a plain product.
//
// Lengths are below, at and above the size of tiles, and multiples of 4 or not, which decides how dropout is
// drawn. The longest ones run every loop that contains a barrier at least twice. Each test of the backward
// pass is of both ways, 7 and 5 products; in one of the two, the kernels also sum the bias's gradient.
#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#include <array>

#include "dev/test_gpu_util.h"

namespace {

using namespace gpu_test;

const cudaStream_t STREAM = nullptr;

// A tensor in device memory between two margins of NaN. Values read from the margins show in the results, and
// values written there are found.
template <class T>
struct Fenced {
    static constexpr size_t MARGIN = 4096;
    size_t n;
    Device<T> all;
    explicit Fenced(size_t n_) : n(n_), all(n_ + 2 * MARGIN) {}
    explicit Fenced(const Values& x) : Fenced(x.size()) {
        Device<T> content(x);
        CUDA_CHECK(cudaMemcpy(all + MARGIN, content, n * sizeof(T), cudaMemcpyDeviceToDevice));
    }
    operator T*() { return all + MARGIN; }
    // The tensor's values; checks that its margins are untouched.
    Values values() {
        Values v = all.values();
        bool clean = true;
        for (size_t i = 0; i < MARGIN; i++)
            clean = clean && std::isnan(v[i]) && std::isnan(v[MARGIN + n + i]);
        CHECK_MESSAGE(clean, "written outside the tensor");
        return Values(v.begin() + MARGIN, v.begin() + (long)(MARGIN + n));
    }
};

struct Shape {
    size_t B, T, NH, hs;
    size_t M() const { return B * T; }
    size_t C() const { return NH * hs; }
    std::string text() const { return strf("B %zu, T %zu, %zu heads of %zu", B, T, NH, hs); }
};
struct Results {
    Values out, lse, dqkv, dbias;  // dbias: empty where it is not computed
};
struct Inputs {
    Values qkv, dout;
    explicit Inputs(const Shape& s)
        : qkv(normals_x(s.M() * 3 * s.C(), s.T)), dout(normals_x(s.M() * s.C(), s.hs + 1000)) {}
};

const char* way_name() { return gpu::switches.five_products ? "attention by 5 products, " : "attention, "; }

// bias: computes dbias too, which begins at 0.5.
Results on_gpu(const Shape& s, const Inputs& in, Masks& masks, bool bias = false) {
    std::vector<Values> r = repeatable([&] {
        Fenced<floatX> qkv(in.qkv), dout(in.dout), out(s.M() * s.C()), dqkv(in.qkv.size());
        Fenced<float> lse(s.B * s.NH * s.T), dbias(Values(3 * s.C(), 0.5f)),
            scratch(gpu::attention_backward_scratch(s.B, s.T, s.C(), s.NH, bias));
        gpu::attention_init(s.hs);
        gpu::attention_forward(out, lse, qkv, s.B, s.T, s.C(), s.NH, masks.gpu(), STREAM);
        gpu::AttentionBackward args;
        args.dqkv = dqkv, args.scratch = scratch, args.dout = dout;
        args.qkv = qkv, args.out = out, args.lse = lse;
        if (bias) args.dbias = dbias;
        gpu::attention_backward(args, s.B, s.T, s.C(), s.NH, masks.gpu(), STREAM);
        return std::vector<Values>{out.values(), lse.values(), dqkv.values(), scratch.values(),
                                   dbias.values()};
    });
    // The 7 products leave some padding of the statistics unwritten.
    const auto first =
        r[3].begin() + (gpu::switches.five_products ? 0 : (long)gpu::row_stats_floats(s.B, s.T, s.NH));
    CHECK_MESSAGE(std::none_of(first, r[3].end(), [](float x) { return std::isnan(x); }),
                  "scratch that is not used: ", s.text());
    return {r[0], r[1], r[2], bias ? r[4] : Values()};
}

Results on_cpu(const Shape& s, const Inputs& in, const Masks& masks) {
    Results r{Values(s.M() * s.C()), Values(s.B * s.NH * s.T), Values(in.qkv.size()), {}};
    Values scratch((size_t)omp_get_max_threads() * cpu::Attention::scratch(s.T, s.hs));
    cpu::Attention attention{s.B, s.T, s.C(), s.NH};
    attention.forward(r.out.data(), r.lse.data(), in.qkv.data(), masks.cpu(), Masks::SEQ0, scratch.data());
    attention.backward(r.dqkv.data(), in.dout.data(), r.out.data(), in.qkv.data(), r.lse.data(), masks.cpu(),
                       Masks::SEQ0, scratch.data());
    return r;
}

// dQ, dK or dV out of (M,3C).
Values third(const Values& x, size_t C, size_t which) {
    Values part;
    for (size_t row = 0; row < x.size() / C / 3; row++)
        for (size_t c = 0; c < C; c++) part.push_back(x[(3 * row + which) * C + c]);
    return part;
}

// In bf16 not only the gradients are rounded but also P, dS and the output that D is computed from. A test
// below shows that no other error is added.
constexpr double GRADIENT_TOLERANCE = (gpu::BUILD_DTYPE == BF16 ? 2 : 1) * X_TOLERANCE;

// Part `which` (dQ, dK, dV) of dbias, to which the kernel added the column sums of d (M,C). The error is
// relative to d's size, not to the sums': those of dK cancel out, since a number added to all scores of a
// query changes nothing. The sum of a few errors may be larger than the root of their squares; hence half as
// much again.
void check_dbias(const std::string& kind, const Shape& s, size_t which, const Results& got, const Values& d) {
    std::vector<double> difference(s.C() + 1, 0.5), nothing(s.C() + 1);
    double squares = 0;
    for (size_t i = 0; i < d.size(); i++) difference[i % s.C()] += d[i], squares += (double)d[i] * d[i];
    for (size_t c = 0; c < s.C(); c++) difference[c] -= got.dbias[which * s.C() + c];
    difference[s.C()] = nothing[s.C()] = std::sqrt(squares);
    check_close(kind + ": " + s.text(), difference.data(), nothing.data(), s.C() + 1,
                1.5 * GRADIENT_TOLERANCE);
}

void check(const std::string& kind, const Shape& s, const Results& got, const Results& want,
           double out_tolerance, double gradient_tolerance) {
    check_close(kind + "output: " + s.text(), got.out.data(), want.out.data(), got.out.size(), out_tolerance);
    check_float(kind + "log-sum-exp: " + s.text(), got.lse, want.lse);
    const char* names[] = {"dQ", "dK", "dV"};
    for (size_t which = s.T == 1 ? 2 : 0; which < 3; which++) {  // a query that sees one key has no gradient
        Values a = third(got.dqkv, s.C(), which), b = third(want.dqkv, s.C(), which);
        check_close(kind + names[which] + ": " + s.text(), a.data(), b.data(), a.size(), gradient_tolerance);
        if (!got.dbias.empty()) check_dbias(kind + "bias of " + names[which], s, which, got, b);
    }
}

// Checks both ways, with dbias and without. Long sequences take long: there the head size decides which of
// the ways computes dbias.
void check_both_ways(const Shape& s, const Inputs& in, Masks& masks) {
    Results want = on_cpu(s, in, masks);
    for (bool five_products : {false, true})
        for (bool bias : {false, true}) {
            if (s.T > 65 && bias != (five_products == (s.hs / 16 % 2 == 0))) continue;
            Temporarily way(gpu::switches.five_products, five_products);
            check(way_name(), s, on_gpu(s, in, masks, bias), want, X_TOLERANCE, GRADIENT_TOLERANCE);
        }
}

TEST_CASE("attention: output, log-sum-exp and gradients are the CPU's, with its dropout mask") {
    std::vector<size_t> lengths = {1, 5, 16, 37, 64, 65, 130, 200};
#if defined(__SANITIZE_THREAD__)
    lengths = {132};  // ThreadSanitizer is slow: one length that is long enough to show races
#endif
    size_t number = 0;
    for (size_t hs : gpu::HEAD_SIZES)
        for (size_t T : lengths) {
            Shape s{number % 3 + 1, T, number % 2 + 1, hs};
            for (float p : {0.0f, 0.25f}) {
                if (hs != 64 && (p > 0) != ((number + hs / 16) % 2 == 0)) continue;
                Inputs in(s);
                Masks masks(p, rng::ATT_DROPOUT);
                check_both_ways(s, in, masks);
            }
            number++;
        }
}

#if !defined(__SANITIZE_THREAD__)
// With 5 products the last queries have three parts of dQ.
TEST_CASE("attention: output, log-sum-exp and gradients of three blocks of keys are the CPU's") {
    for (size_t hs : gpu::HEAD_SIZES) {
        Shape s{1, 258 + hs / 16, 2, hs};
        Masks masks(hs % 32 == 0 ? 0.25f : 0, rng::ATT_DROPOUT);
        check_both_ways(s, Inputs(s), masks);
    }
}
#endif

#ifdef EMULATOR
// Bytes of shared memory that a block of the backward pass takes on this device.
size_t backward_smem(size_t hs) {
    size_t bytes = 0;
    gpu::with_backward_shape(hs, [&](auto shape) { bytes = decltype(shape)::SMEM; });
    return bytes;
}

// Only head size 128 in bf16 has two sizes of tiles: the larger one takes more than some GPUs have.
TEST_CASE("attention: head size 128 is the CPU's with 99 and with 227 KiB of shared memory in a block") {
    struct Restore {
        emu::Options before = emu::options();
        ~Restore() { emu::options() = before; }
    } restore;
    std::map<int, std::array<size_t, 2>> smem;
    for (int architecture : {86, 90}) {
        emu::options().architecture = architecture;
        CAPTURE(architecture);
        for (size_t T : {37, 132}) {
            Shape s{1, T, 2, 128};
            Inputs in(s);
            Masks masks(T == 37 ? 0 : 0.25f, rng::ATT_DROPOUT);
            check_both_ways(s, in, masks);
        }
        for (bool five_products : {false, true}) {
            Temporarily way(gpu::switches.five_products, five_products);
            smem[architecture][five_products] = backward_smem(128);
        }
    }
    for (bool five_products : {false, true})
        if (gpu::BUILD_DTYPE == BF16) CHECK(smem[90][five_products] > smem[86][five_products]);
}
#endif

TEST_CASE("attention by 5 products: scratch has a row of dQ for each query and block of keys it sees") {
    for (size_t T : {1, 127, 128, 129, 1000, 1024}) {
        Shape s{3, T, 2, 64};
        size_t keys = gpu::BUILD_DTYPE == BF16 ? 128 : 64, rows = 0, floats[2];
        for (size_t query = 0; query < T; query++) rows += query / keys + 1;
        for (bool five_products : {false, true}) {
            Temporarily way(gpu::switches.five_products, five_products);
            floats[five_products] = gpu::attention_backward_scratch(s.B, s.T, s.C(), s.NH, false);
        }
        CHECK(floats[1] - floats[0] == s.B * s.NH * rows * s.hs);
        if (gpu::BUILD_DTYPE == BF16 && T == 1024) CHECK(rows == 4608);  // as a comment says
    }
}

TEST_CASE("attention: head sizes that no kernel supports are refused") {
    for (size_t hs : gpu::HEAD_SIZES) CHECK(gpu::attention_head_size_ok((int)hs));
    for (size_t hs : {0, 16, 40, 63, 65, 112, 256}) {
        CHECK(!gpu::attention_head_size_ok((int)hs));
        CHECK_THROWS_AS(gpu::attention_init(hs), std::logic_error);
    }
}

#if !defined(PRECISION_FP32)

// Attention in double, rounded to bf16 where the kernels round: P before it multiplies V (relative to the
// running maximum at its tile) and dO, dS, and the results.
Results with_bf16_roundings(const Shape& s, const Inputs& in, const Masks& masks, size_t tile) {
    auto bf16 = [](double x) { return (double)as_float(as_floatX((float)x)); };
    Results r{Values(s.M() * s.C()), Values(s.B * s.NH * s.T), Values(in.qkv.size()), {}};
    size_t T = s.T, hs = s.hs, C = s.C();
    double scale = 1 / std::sqrt((double)hs), keep_scale = 1 / (1 - (double)masks.p);
    for (size_t bh = 0; bh < s.B * s.NH; bh++) {
        const float* q = &in.qkv[bh / s.NH * T * 3 * C + bh % s.NH * hs];
        size_t o_first = bh / s.NH * T * C + bh % s.NH * hs;
        auto dot = [&](const float* a, const float* b) {
            double sum = 0;
            for (size_t c = 0; c < hs; c++) sum += (double)a[c] * b[c];
            return sum;
        };
        std::vector<double> dqkv(T * 3 * hs);
        for (size_t i = 0; i < T; i++) {
            const float *qi = q + i * 3 * C, *d_o = &in.dout[o_first + i * C];
            float* out = &r.out[o_first + i * C];
            std::vector<double> score(i + 1), top(i + 1, -INFINITY), kept(i + 1);
            for (size_t j = 0; j <= i; j++) {
                score[j] = dot(qi, q + j * 3 * C + C) * scale;
                kept[j] = masks.cpu().key.u32(((Masks::SEQ0 * s.NH + bh) * T + i) * T + j) >=
                                  rng::drop_threshold(masks.p)
                              ? keep_scale
                              : 0;
                for (size_t k = j / tile * tile; k <= i; k++) top[k] = std::max(top[k], score[j]);
            }
            double sum = 0, d = 0;
            for (size_t j = 0; j <= i; j++) sum += std::exp(score[j] - top[i]);
            double lse = r.lse[bh * T + i] = (float)(top[i] + std::log(sum));
            for (size_t c = 0; c < hs; c++) {
                double o = 0;
                for (size_t j = 0; j <= i; j++)
                    o += kept[j] * bf16(std::exp(score[j] - top[j])) * std::exp(top[j] - top[i]) *
                         q[j * 3 * C + 2 * C + c];
                d += d_o[c] * bf16(o / sum), out[c] = (float)bf16(o / sum);
            }
            for (size_t j = 0; j <= i; j++) {
                double p = std::exp(score[j] - lse),
                       ds = bf16(p * (kept[j] * dot(d_o, q + j * 3 * C + 2 * C) - d));
                for (size_t c = 0; c < hs; c++) {
                    dqkv[3 * i * hs + c] += ds * scale * q[j * 3 * C + C + c];
                    dqkv[(3 * j + 1) * hs + c] += ds * scale * qi[c];
                    dqkv[(3 * j + 2) * hs + c] += kept[j] * bf16(p) * d_o[c];
                }
            }
        }
        for (size_t i = 0; i < 3 * T; i++)
            for (size_t c = 0; c < hs; c++)
                r.dqkv[(size_t)(q - in.qkv.data()) + i * C + c] = (float)bf16(dqkv[i * hs + c]);
    }
    return r;
}

TEST_CASE("attention in bf16: rounding P, dS and the results explains the error") {
    Shape s{2, 150, 2, 64};
    Inputs in(s);
    Masks masks(0.25f, rng::ATT_DROPOUT);
    // The remaining error: numbers halfway between two bf16 values, which float and double may round
    // differently.
    double tolerance = BF16_TOLERANCE / 20;
    Results want = with_bf16_roundings(s, in, masks, gpu::ForwardShape<64>::KEYS);
    for (bool five_products : {false, true}) {
        Temporarily way(gpu::switches.five_products, five_products);
        check(way_name() + std::string("rounded alike, "), s, on_gpu(s, in, masks), want, tolerance,
              tolerance);
    }
}

// out (2,16,16): a b and a b^T. In both factors (16,16) the rows from `valid` on count as zeros.
__global__ void products_kernel(float* out, const floatX* a, const floatX* b, int valid) {
    using Tile = gpu::Tile<16>;
    __shared__ __align__(128) floatX memory[32 * Tile::LD];
    Tile a_tile{memory}, b_tile = a_tile.from_row(16);
    a_tile.copy_async<16, gpu::WARP>(a, 16, valid), b_tile.copy_async<16, gpu::WARP>(b, 16, valid);
    gpu::cp_async_commit();
    gpu::cp_async_wait<0>();
    __syncwarp();
    uint32_t a_frag[4], b_frags[2][4];
    a_tile.load_a(a_frag, 0, 0);
    b_tile.load_b(b_frags[0], 0, 0), b_tile.load_b_transposed(b_frags[1], 0, 0);
    for (int which = 0; which < 2; which++)
        for (int n = 0; n < 2; n++) {
            float c[4] = {};
            gpu::mma(c, a_frag, b_frags[which][2 * n], b_frags[which][2 * n + 1]);
            for (int i = 0; i < 4; i++)
                out[which * 256 + gpu::element_row(i) * 16 + 8 * n + gpu::element_col(i)] = c[i];
        }
}

TEST_CASE("mma, ldmatrix and cp.async compute the product with a matrix and with its transpose") {
    for (int valid : {16, 13, 0}) {
        Values a = normals_x(256, 1), b = normals_x(256, 2), want(512);
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++)
                for (int k = 0; k < 16; k++) {
                    if (i < valid && k < valid) want[i * 16 + j] += a[i * 16 + k] * b[k * 16 + j];
                    if (i < valid && j < valid) want[256 + i * 16 + j] += a[i * 16 + k] * b[j * 16 + k];
                }
        Values got = repeatable([&] {
            Fenced<floatX> x(a), y(b);
            Fenced<float> out(512);
            gpu::launch(products_kernel, 1, gpu::WARP, 0, STREAM, out, x, y, valid);
            return std::vector<Values>{out.values()};
        })[0];
        check_float(strf("tensor-core product: %d rows", valid), got, want);
    }
}

#endif

}  // namespace
