// test_gemm.cpp - the matrix products of lib/gemm.h and their parts, compared with sums in double precision.
#include <doctest/doctest.h>

#include "dev/test_util.h"
#include "lib/gemm_internal.h"

using namespace test;

namespace {

using simd::bf16;
using Halves = std::vector<bf16>;

template <class T>
std::vector<T> typed(const Floats& x) {
    std::vector<T> y;
    for (float f : x)
        if constexpr (sizeof(T) == 2) y.push_back(float_to_bf16(f));
        else y.push_back(f);
    return y;
}

// A matrix whose element (r, c) is at r*sr + c*sc; all values between its elements are NaN.
struct Strided {
    size_t sr, sc;
    Floats data;
    Strided(Random& r, size_t rows, size_t cols, size_t form) {
        if (form == 0) sr = cols, sc = 1;
        else if (form == 1) sr = 1, sc = rows;
        else if (form == 2) sr = cols + 3, sc = 1;  // part of a wider matrix
        else sr = 2 * cols + 1, sc = 2;             // neither stride is 1
        data.assign((rows - 1) * sr + (cols - 1) * sc + 1, NAN);
        Floats values = r.floats(rows * cols);
        for (size_t i = 0; i < rows * cols; i++) data[i / cols * sr + i % cols * sc] = values[i];
    }
    double at(size_t r, size_t c) const { return data[r * sr + c * sc]; }
};

// How many elements of two matrices with row stride ld differ: in the first N columns, and beside them.
struct Differences {
    size_t inside = 0, beside = 0;
};
template <class T>
Differences differences(const std::vector<T>& a, const std::vector<T>& b, size_t N, size_t ld) {
    Differences d;
    for (size_t i = 0; i < a.size(); i++)
        if (memcmp(&a[i], &b[i], sizeof(T))) (i % ld < N ? d.inside : d.beside)++;
    return d;
}

// Runs one product and checks it, the memory beside it, and that an epilogue gets each finished value once.
void check_product(Random& r, size_t M, size_t N, size_t K, size_t a_form, size_t b_form, gemm::Start start,
                   bool with_bias, size_t extra) {
    INFO("M ", M, " N ", N, " K ", K, ", forms of A and B ", a_form, " ", b_form);
    INFO("start ", (int)start, ", bias ", with_bias);
    Strided A(r, M, K, a_form), B(r, K, N, b_form);
    const size_t ldc = N + extra;
    const Floats before = r.floats(M * ldc), bias = r.floats(N);
    // C begins as `before`.
    auto run = [&](Floats& C, const gemm::Epilogue& epilogue) {
        const gemm::Operand a = {A.data.data(), A.sr, A.sc}, b = {B.data.data(), B.sr, B.sc};
        std::copy(before.begin(), before.end(), C.begin());
        gemm::multiply(FP32,
                       {M, N, K, a, b, C.data(), ldc, start, with_bias ? bias.data() : nullptr, epilogue});
    };
    Floats C(M * ldc), again(M * ldc);
    run(C, {});
    CHECK(differences(C, before, N, ldc).beside == 0);
    Doubles row(N);
    // A short sum can cancel to almost nothing; measure against the terms instead of the sum.
    double diff = 0, norm = 0;
    for (size_t m = 0; m < M; m++) {
        for (size_t n = 0; n < N; n++)
            row[n] = start == gemm::ACCUMULATE ? before[m * ldc + n] : with_bias ? bias[n] : 0.0f;
        for (size_t k = 0; k < K; k++)
            for (size_t n = 0; n < N; n++) row[n] += A.at(m, k) * B.at(k, n);
        for (size_t n = 0; n < N; n++) diff += std::pow(C[m * ldc + n] - row[n], 2), norm += row[n] * row[n];
    }
    norm = std::max(norm, (double)(M * N * K));
    double error = std::sqrt(diff / norm);
    note("gemm", error, 2e-6);
    CHECK_MESSAGE(error <= 2e-6, "relative L2 error ", error);

    // What each epilogue must compute from the finished C, bit for bit. ADD, and GELU_GRADIENT in place,
    // change what they read, so that applying them twice would be found.
    using gemm::Epilogue;
    const int activation = r.below(2) ? GELU_TANH : GELU_ERF;
    const size_t ld = N + r.below(3);
    auto check = [&](const char* what, auto& got, auto& want, size_t stride) {
        Differences d = differences(got, want, N, stride);
        CHECK_MESSAGE(d.inside == 0, what, ": ", d.inside, " elements differ");
        CHECK_MESSAGE(d.beside == 0, what, ": ", d.beside, " elements beside them changed");
    };
    {
        const Floats add = r.floats(M * ld);
        Floats want = C;
        for (size_t m = 0; m < M; m++)
            for (size_t n = 0; n < N; n++) want[m * ldc + n] += add[m * ld + n];
        run(again, {Epilogue::ADD, add.data(), nullptr, nullptr, ld, activation});
        check("ADD", again, want, ldc);
    }
    {
        Floats want(M * ld, 7.0f), got = want;
        Halves want_half(M * ld, 7), half = want_half;
        for (size_t m = 0; m < M; m++) {
            simd::gelu_forward(&want[m * ld], &C[m * ldc], N, activation);
            simd::gelu_forward(&want_half[m * ld], &C[m * ldc], N, activation);
        }
        run(again, {Epilogue::GELU, nullptr, got.data(), nullptr, ld, activation});
        check("GELU", got, want, ld);
        check("C of GELU", again, C, ldc);
        run(again, {Epilogue::GELU, nullptr, nullptr, half.data(), ld, activation});
        check("GELU in bf16", half, want_half, ld);
        check("C of GELU in bf16", again, C, ldc);
    }
    {
        const Floats pre = r.floats(M * ldc, 2);
        Floats want(M * ldc, 7.0f), got = want, want_in_place = before;
        Halves want_half(M * ldc, 7), half = want_half;
        for (size_t m = 0; m < M; m++) {
            size_t at = m * ldc;
            simd::gelu_backward(&want[at], &C[at], &pre[at], N, activation);
            simd::gelu_backward(&want_half[at], &C[at], &pre[at], N, activation);
            std::copy(&want[at], &want[at] + N, &want_in_place[at]);
        }
        run(again, {Epilogue::GELU_GRADIENT, pre.data(), again.data(), nullptr, ldc, activation});
        check("GELU_GRADIENT in place", again, want_in_place, ldc);
        run(again, {Epilogue::GELU_GRADIENT, pre.data(), got.data(), nullptr, ldc, activation});
        check("GELU_GRADIENT", got, want, ldc);
        check("C of GELU_GRADIENT", again, C, ldc);
        run(again, {Epilogue::GELU_GRADIENT, pre.data(), nullptr, half.data(), ldc, activation});
        check("GELU_GRADIENT in bf16", half, want_half, ldc);
        check("C of GELU_GRADIENT in bf16", again, C, ldc);
    }
}

}  // namespace

TEST_CASE("gemm multiplies any sizes and strides; an epilogue gets each finished element once") {
    Random r(2);
    for (size_t trial = 0; trial < 500; trial++) {
        size_t M = r.among({1, 2, 3, 5, 6, 7, 12, 13, 25});
        size_t N = r.among({1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 65, 130});
        size_t K = r.among({1, 2, 3, 4, 5, 7, 16, 48, 97, 255, 256, 257, 300});
        gemm::Start start = r.below(2) ? gemm::ACCUMULATE : gemm::OVERWRITE;
        bool with_bias = start == gemm::OVERWRITE && r.below(2);
        check_product(r, M, N, K, trial % 4, trial / 4 % 4, start, with_bias, r.below(4));
    }
}

TEST_CASE("gemm multiplies sizes just beyond a task, a chunk of k and the shared memory") {
    Random r(3);
    constexpr size_t MB = gemm::MB, NB = gemm::NB, NR = gemm::NR, KC = gemm::KC, WIDTH = gemm::SHARED_WIDTH;
    const gemm::Start overwrite = gemm::OVERWRITE, accumulate = gemm::ACCUMULATE;
    check_product(r, MB + 1, 33, KC + 1, 0, 1, overwrite, true, 0);
    check_product(r, 3 * MB + 5, 17, 2 * KC + 3, 1, 0, accumulate, false, 1);
    check_product(r, 7, 3 * NB + 4, 2 * KC + 9, 0, 1, overwrite, true, 0);
    check_product(r, 5, 3 * NB + 4, 2 * KC + 9, 0, 0, accumulate, false, 3);
    // The shared operand does not fit in one fill: two strips of rows or columns, and two parts of k.
    check_product(r, WIDTH + 9, WIDTH + 17, 3, 0, 1, overwrite, true, 0);
    check_product(r, WIDTH + 9, WIDTH + 5, 2, 1, 0, accumulate, false, 0);
    check_product(r, WIDTH + 7, WIDTH + 18, 2 * KC + 7, 1, 1, overwrite, true, 0);
    check_product(r, WIDTH, WIDTH + 1, 2 * KC + 7, 0, 1, overwrite, true, 0);
    // Rows of A that share sets of the L1 cache, in a high and in a wide product.
    check_product(r, 200, 50, 1024, 0, 0, accumulate, false, 0);
    check_product(r, 50, 200, 1024, 0, 1, overwrite, true, 0);
    // Columns for wide tiles, one of half the width, and six more; B packed by tiles or beforehand.
    check_product(r, 50, 10 * NR + NR + 6, KC + 9, 0, 0, overwrite, true, 0);
    check_product(r, 50, 10 * NR + NR + 6, KC + 9, 0, 1, accumulate, false, 0);
    check_product(r, 250, 1, 1, 0, 0, overwrite, true, 0);
    check_product(r, 1, 250, 1, 0, 0, overwrite, true, 0);
}

TEST_CASE("gemm: bits depend neither on an element's place, A's layout nor the threads") {
    Random r(4);
    const size_t sizes[][3] = {{203, 71, 300},  {71, 203, 1100}, {71, 203, 1024},
                               {450, 150, 600}, {77, 358, 130},  {77, 145, 32000}};
    for (auto& size : sizes) {
        const size_t M = size[0], N = size[1], K = size[2];
        INFO(M, " x ", N, " x ", K);
        Floats A = r.floats(M * K), turned(M * K), B = r.floats(K * N), bias = r.floats(N), want(M * N);
        for (size_t i = 0; i < M * K; i++) turned[i % K * M + i / K] = A[i];
        auto multiply = [&](gemm::Operand a, float* C) {
            gemm::multiply(FP32, {M, N, K, a, {B.data(), N, 1}, C, N, gemm::OVERWRITE, bias.data()});
        };
        multiply({A.data(), K, 1}, want.data());
        for (int threads : {1, 2, 3, 4, 7}) {
            Threads guard(threads);
            Floats C(M * N), D(M * N);
            multiply({A.data(), K, 1}, C.data());
            CHECK(same_bits(C, want));
            multiply({turned.data(), 1, M}, D.data());
            CHECK(same_bits(D, want));
        }
        for (size_t first : {0, 1, 5, 50, 70}) {  // some rows and columns alone
            size_t rows = std::min<size_t>(7, M - first), col = first % 5, cols = N - col - first % 3;
            Floats C(rows * cols);
            const gemm::Operand a = {&A[first * K], K, 1}, b = {&B[col], N, 1};
            gemm::multiply(FP32, {rows, cols, K, a, b, C.data(), cols, gemm::OVERWRITE, &bias[col]});
            for (size_t i = 0; i < rows; i++)
                CHECK(!memcmp(&C[i * cols], &want[(first + i) * N + col], cols * sizeof(float)));
        }
    }
}

TEST_CASE("gemm: a thread takes its own tasks, then those that others have not begun") {
    gemm::Workspace w(gemm::OWN_UNITS);
    w.reserve(3);
    for (uint64_t fill : {1, 2, 7}) {  // 10 tasks: 0 to 2, 3 to 5 and 6 to 9
        std::vector<size_t> taken;
        auto take = [&](size_t thread) { taken.push_back(w.take_task(thread, 3, fill, 10)); };
        take(2), take(0);
        for (int i = 0; i < 8; i++) take(1);
        CHECK(taken == std::vector<size_t>{6, 0, 3, 4, 5, 7, 8, 9, 1, 2});
        for (size_t thread : {0, 1, 2}) CHECK(w.take_task(thread, 3, fill, 10) == 10);
    }
    for (size_t want : {3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 10}) CHECK(w.take_task(1, 3, 8, 10) == want);  // alone
    machine::release(w.shared, gemm::Workspace::bytes(gemm::OWN_UNITS, 3));
}

TEST_CASE("gemm: FOR_LATER gives the same bits, aligned or not, and writes nothing else") {
    Random r(7);
    const size_t M = 1061, K = 21, LD = 1040;
    Floats A = r.floats(M * K), B = r.floats(K * LD), want(M * LD, 7.0f), memory(M * LD + 32);
    float* aligned = (float*)round_up((size_t)memory.data(), 64);
    for (size_t N : {1024, 1040, 1001}) {
        REQUIRE(M * N >= gemm::STREAMED);
        std::fill(want.begin(), want.end(), 7.0f);
        const gemm::Operand a = {A.data(), 1, M}, b = {B.data(), LD, 1};
        gemm::multiply(FP32, {M, N, K, a, b, want.data(), LD});
        for (float* C : {aligned, aligned + 1}) {
            std::fill(memory.begin(), memory.end(), 7.0f);
            gemm::multiply(FP32, {M, N, K, a, b, C, LD, gemm::FOR_LATER});
            CHECK(!memcmp(C, want.data(), M * LD * sizeof(float)));
            CHECK((C == memory.data() || C[-1] == 7.0f));
        }
    }
}

namespace {

// Runs one product of bf16 numbers, and checks it against that of the rounded operands in double precision.
template <class TA, class TB>
void check_bf16_product(Random& r, size_t M, size_t N, size_t K, size_t a_form, size_t b_form) {
    INFO("M ", M, " N ", N, " K ", K, ", forms of A and B ", a_form, " ", b_form);
    INFO("bytes ", sizeof(TA), " ", sizeof(TB));
    Strided A(r, M, K, a_form), B(r, K, N, b_form);
    auto a = typed<TA>(A.data);
    auto b = typed<TB>(B.data);
    Floats C(M * N, NAN);
    gemm::multiply(BF16, {M, N, K, {a.data(), A.sr, A.sc}, {b.data(), B.sr, B.sc}, C.data(), N});
    double diff = 0;
    for (size_t m = 0; m < M; m++)
        for (size_t n = 0; n < N; n++) {
            double want = 0;
            for (size_t k = 0; k < K; k++) want += (double)rounded(A.at(m, k)) * rounded(B.at(k, n));
            diff += std::pow(C[m * N + n] - want, 2);
        }
    double error = std::sqrt(diff / (double)(M * N * K));
    note("gemm, bf16 operands", error, 2e-6);
    CHECK_MESSAGE(error <= 2e-6, "relative L2 error ", error);
}

}  // namespace

TEST_CASE("gemm of bf16 numbers rounds its operands to nearest, at any sizes and strides") {
    Random r(6);
    for (size_t trial = 0; trial < 240; trial++) {
        size_t M = r.among({1, 2, 5, 13, 14, 15, 29}), N = r.among({1, 3, 15, 16, 17, 31, 33, 70});
        size_t K = r.among({1, 2, 3, 31, 32, 33, 64, 97, 257}), a = trial % 4, b = trial / 4 % 4;
        if (trial % 3 == 0) check_bf16_product<float, float>(r, M, N, K, a, b);
        else if (trial % 3 == 1) check_bf16_product<bf16, float>(r, M, N, K, a, b);
        else check_bf16_product<bf16, bf16>(r, M, N, K, a, b);
    }
    check_bf16_product<float, float>(r, gemm::MB + 3, gemm::NB + 37, 2 * gemm::KC + 5, 0, 1);
    check_bf16_product<bf16, float>(r, gemm::MB + 3, gemm::NB + 37, 4 * gemm::KC + 6, 0, 1);
    check_bf16_product<bf16, bf16>(r, 3 * gemm::MB + 3, 41, 4 * gemm::KC + 6, 0, 0);
    float C, x = 1;
    bf16 half = 0x3F80;
    const gemm::Product mixed = {1, 1, 1, {&half, 1, 1}, {&x, 1, 1}, &C, 1};
    CHECK_THROWS_AS(gemm::multiply(FP32, mixed), std::logic_error);
}

// ---------------------------------------------------------------------------------------------
// A linear layer

namespace {

// A matrix of T with row stride ld, and NaN beside it. `values` are the numbers that a product multiplies.
template <class T>
struct Matrix {
    size_t rows, cols, ld;
    std::vector<T> data;
    Doubles values;
    Matrix(Random& r, size_t rows_, size_t cols_, bool rounds, size_t extra = 0)
        : rows(rows_), cols(cols_), ld(cols_ + extra), values(rows_ * cols_) {
        Floats x(rows * ld, NAN), drawn = r.floats(rows * cols);
        for (size_t i = 0; i < rows * cols; i++) {
            x[i / cols * ld + i % cols] = drawn[i];
            values[i] = rounds || sizeof(T) == 2 ? rounded(drawn[i]) : drawn[i];
        }
        data = typed<T>(x);
    }
    double at(size_t r, size_t c) const { return values[r * cols + c]; }
};

// The largest sizes use all threads and several chunks of k.
struct LayerSize {
    size_t M, K, N;
};
const LayerSize LAYERS[] = {{1, 1, 1},    {5, 3, 7},      {1, 48, 145},   {111, 97, 1},
                            {111, 1, 48}, {111, 97, 145}, {37, 1100, 51}, {300, 51, 203}};

// (rows,cols): term(r, c, k) summed over k < K.
template <class Term>
Doubles sums(size_t rows, size_t cols, size_t K, Term term) {
    Doubles s(rows * cols);
    for (size_t r = 0; r < rows; r++)
        for (size_t c = 0; c < cols; c++)
            for (size_t k = 0; k < K; k++) s[r * cols + c] += term(r, c, k);
    return s;
}
// Measures as check_product does: relative to the terms where sums cancel.
void check_sums(const char* what, const Floats& got, const Doubles& want, size_t K) {
    REQUIRE(got.size() == want.size());
    double diff = 0, norm = 0;
    for (size_t i = 0; i < want.size(); i++) diff += std::pow(got[i] - want[i], 2), norm += want[i] * want[i];
    double error = std::sqrt(diff / std::max(norm, (double)(want.size() * K)));
    note("linear layer's products", error, 2e-6);
    CHECK_MESSAGE(error <= 2e-6, what, ": relative L2 error ", error);
}
std::string text(const LayerSize& s) { return strf("M %zu K %zu N %zu", s.M, s.K, s.N); }

}  // namespace

TEST_CASE("a linear layer's three products agree with sums in double precision") {
    Random r(6);
    for (size_t trial = 0; trial < 12; trial++) {
        size_t M = r.among({1, 5, 111}), K = r.among({1, 3, 48, 97}), N = r.among({1, 7, 48, 145});
        INFO("M ", M, " K ", K, " N ", N);
        Floats X = r.floats(M * K), W = r.floats(N * K), b = r.floats(N, 3), Y(M * N), dY = r.floats(M * N);
        Floats dX(M * K), dW = r.floats(N * K), db = r.floats(N, 3);
        Doubles y(M * N), dx(M * K), dw(dW.begin(), dW.end()), dbias(db.begin(), db.end());
        for (size_t m = 0; m < M; m++)
            for (size_t n = 0; n < N; n++) {
                double sum = b[n], d = dY[m * N + n];
                dbias[n] += d;
                for (size_t k = 0; k < K; k++) {
                    sum += (double)X[m * K + k] * W[n * K + k];
                    dx[m * K + k] += d * W[n * K + k], dw[n * K + k] += d * X[m * K + k];
                }
                y[m * N + n] = sum;
            }
        gemm::forward(Y.data(), X.data(), W.data(), b.data(), M, K, N);
        gemm::weight_gradient(dW.data(), db.data(), dY.data(), X.data(), M, K, N, true);
        gemm::input_gradient(dX.data(), dY.data(), W.data(), M, K, N);
        double tolerance = M == 1 || K == 1 || N == 1 ? 1e-5 : 1e-6;  // a single sum may cancel
        check_close("linear: y", Y, y, tolerance);
        check_close("linear: dx", dX, dx, tolerance);
        check_close("linear: dw", dW, dw, tolerance);
        check_close("linear: db", db, dbias, tolerance);
    }
}

namespace {

template <class TX, class TW>
void check_forward(Random& r, const LayerSize& s, size_t extra, bool with_bias) {
    auto [M, K, N] = s;
    const bool rounds = sizeof(TX) + sizeof(TW) < 8;
    INFO(text(s), ", bytes ", sizeof(TX), " ", sizeof(TW), ", ldy N + ", extra, ", bias ", with_bias);
    Matrix<TX> X(r, M, K, rounds);
    Matrix<TW> W(r, N, K, rounds);
    Floats b = r.floats(N), Y(M * (N + extra), 7.0f), dense;
    gemm::forward(Y.data(), X.data.data(), W.data.data(), with_bias ? b.data() : nullptr, M, K, N,
                  extra ? N + extra : 0);
    size_t beside = 0;
    for (size_t i = 0; i < Y.size(); i++)
        if (i % (N + extra) < N) dense.push_back(Y[i]);
        else beside += Y[i] != 7.0f;
    CHECK(beside == 0);
    Doubles want = sums(M, N, K, [&](size_t m, size_t n, size_t k) { return X.at(m, k) * W.at(n, k); });
    for (size_t i = 0; i < want.size() && with_bias; i++) want[i] += b[i % s.N];
    check_sums("forward", dense, want, K);
}

template <class A>
void check_forward_gelu(Random& r, const LayerSize& s, bool with_bias, int activation) {
    auto [M, K, N] = s;
    INFO(text(s), ", bytes ", sizeof(A), ", bias ", with_bias, ", activation ", activation);
    Matrix<A> X(r, M, K, false);
    Floats W = r.floats(N * K), bias = r.floats(N), pre(M * N, NAN), want_pre(M * N);
    const float* b = with_bias ? bias.data() : nullptr;
    std::vector<A> Y(M * N), want(M * N);
    gemm::forward_gelu(Y.data(), pre.data(), X.data.data(), W.data(), b, M, K, N, activation);
    gemm::forward(want_pre.data(), X.data.data(), W.data(), b, M, K, N);
    simd::gelu_forward(want.data(), want_pre.data(), M * N, activation);
    CHECK(same_bits(pre, want_pre));
    CHECK((Y == want));
}

template <class TY>
void check_input_gradient(Random& r, const LayerSize& s, size_t extra) {
    auto [M, K, N] = s;
    INFO(text(s), ", bytes ", sizeof(TY), ", ldy N + ", extra);
    const bool rounds = sizeof(TY) == 2;
    Matrix<TY> dY(r, M, N, rounds, extra);
    Matrix<float> W(r, N, K, rounds);
    Floats add = r.floats(M * K), dX(M * K, NAN), added(M * K, NAN), want_added;
    size_t ldy = extra ? N + extra : 0;
    gemm::input_gradient(dX.data(), dY.data.data(), W.data.data(), M, K, N, nullptr, ldy);
    Doubles want = sums(M, K, N, [&](size_t m, size_t k, size_t n) { return dY.at(m, n) * W.at(n, k); });
    check_sums("input_gradient", dX, want, N);
    gemm::input_gradient(added.data(), dY.data.data(), W.data.data(), M, K, N, add.data(), ldy);
    for (size_t i = 0; i < M * K; i++) want_added.push_back(dX[i] + add[i]);
    CHECK(same_bits(added, want_added));
}

// If dX holds floats, it may be the memory of the sums.
template <class A>
void check_input_gradient_gelu(Random& r, const LayerSize& s, int activation) {
    auto [M, K, N] = s;
    INFO(text(s), ", bytes ", sizeof(A), ", activation ", activation);
    const bool rounds = sizeof(A) == 2;
    Matrix<float> dY(r, M, N, rounds), W(r, N, K, rounds);
    const float *dy = dY.data.data(), *w = W.data.data();
    Floats pre = r.floats(M * K, 2), products(M * K, NAN), both(M * K, NAN);
    std::vector<A> dX(M * K), want(M * K);
    gemm::input_gradient_gelu(dX.data(), products.data(), dy, w, pre.data(), M, K, N, activation);
    Doubles dYW = sums(M, K, N, [&](size_t m, size_t k, size_t n) { return dY.at(m, n) * W.at(n, k); });
    check_sums("input_gradient_gelu, sums", products, dYW, N);
    simd::gelu_backward(want.data(), products.data(), pre.data(), M * K, activation);
    CHECK((dX == want));
    if constexpr (sizeof(A) == 4) {
        gemm::input_gradient_gelu(both.data(), both.data(), dy, w, pre.data(), M, K, N, activation);
        CHECK((both == want));
    }
}

template <class TY, class TX>
void check_weight_gradient(Random& r, const LayerSize& s, bool accumulate, bool with_db, size_t extra) {
    auto [M, K, N] = s;
    INFO(text(s), ", bytes ", sizeof(TY), " ", sizeof(TX), ", ldy N + ", extra);
    INFO("accumulate ", accumulate, ", db ", with_db);
    const bool rounds = sizeof(TY) + sizeof(TX) < 8;
    Matrix<TY> dY(r, M, N, rounds, extra);
    Matrix<TX> X(r, M, K, rounds);
    Floats dW = r.floats(N * K), before = dW, db = r.floats(N), db_before = db;
    if (!accumulate) std::fill(dW.begin(), dW.end(), NAN), std::fill(db.begin(), db.end(), NAN);
    gemm::weight_gradient(dW.data(), with_db ? db.data() : nullptr, dY.data.data(), X.data.data(), M, K, N,
                          accumulate, nullptr, extra ? N + extra : 0);
    Doubles want = sums(N, K, M, [&](size_t n, size_t k, size_t m) { return dY.at(m, n) * X.at(m, k); });
    for (size_t i = 0; i < want.size() && accumulate; i++) want[i] += before[i];
    check_sums("weight_gradient", dW, want, M);
    if (!with_db) return;
    // db sums dY's values as they are: only the product rounds floats to bf16.
    Doubles want_db(N);
    for (size_t n = 0; n < N; n++) {
        if (accumulate) want_db[n] = db_before[n];
        for (size_t m = 0; m < M; m++) {
            const TY& d = dY.data[m * dY.ld + n];
            if constexpr (sizeof(TY) == 2) want_db[n] += bf16_to_float(d);
            else want_db[n] += d;
        }
    }
    check_sums("weight_gradient, db", db, want_db, M);
}

}  // namespace

TEST_CASE("forward computes Y = X W^T + b for all types, with or without row stride and b") {
    Random r(10);
    for (const LayerSize& s : LAYERS)
        for (size_t extra : {0, 3})
            for (bool with_bias : {false, true}) {
                check_forward<float, float>(r, s, extra, with_bias);
                check_forward<bf16, float>(r, s, extra, with_bias);
                check_forward<float, bf16>(r, s, extra, with_bias);
            }
}

TEST_CASE("forward_gelu gives forward's sums and their gelu, bit for bit, fp32 and bf16") {
    Random r(11);
    for (const LayerSize& s : LAYERS)
        for (int activation : {GELU_TANH, GELU_ERF})
            for (bool with_bias : {false, true}) {
                check_forward_gelu<float>(r, s, with_bias, activation);
                check_forward_gelu<bf16>(r, s, with_bias, activation);
            }
}

TEST_CASE("input_gradient computes dX = dY W, or adds a matrix to it, fp32 and bf16") {
    Random r(12);
    for (const LayerSize& s : LAYERS)
        for (size_t extra : {0, 2, 5}) {
            check_input_gradient<float>(r, s, extra);
            check_input_gradient<bf16>(r, s, extra);
        }
}

TEST_CASE("input_gradient_gelu gives dY W and its gradient through gelu, also in place") {
    Random r(13);
    for (const LayerSize& s : LAYERS)
        for (int activation : {GELU_TANH, GELU_ERF}) {
            check_input_gradient_gelu<float>(r, s, activation);
            check_input_gradient_gelu<bf16>(r, s, activation);
        }
}

TEST_CASE("weight_gradient overwrites dW and db, or adds to them, from rows with a stride") {
    Random r(14);
    for (const LayerSize& s : LAYERS)
        for (bool accumulate : {false, true})
            for (bool with_db : {false, true})
                for (size_t extra : {0, 5}) {
                    check_weight_gradient<float, float>(r, s, accumulate, with_db, extra);
                    check_weight_gradient<float, bf16>(r, s, accumulate, with_db, extra);
                    check_weight_gradient<bf16, bf16>(r, s, accumulate, with_db, extra);
                }
}

namespace {

template <class T>
void check_plain_products(Random& r, const LayerSize& s) {
    auto [M, K, N] = s;
    INFO(text(s), ", bytes ", sizeof(T));
    Matrix<T> A(r, M, K, false), B(r, K, N, false);
    Floats Y(M * N, NAN), whole(M * M), half(M * M, NAN);
    gemm::product(Y.data(), A.data.data(), B.data.data(), M, K, N);
    check_sums("product", Y,
               sums(M, N, K, [&](size_t m, size_t n, size_t k) { return A.at(m, k) * B.at(k, n); }), K);
    gemm::multiply(sizeof(T) == 2 ? BF16 : FP32,
                   {M, M, K, {A.data.data(), K, 1}, {A.data.data(), 1, K}, whole.data(), M});
    gemm::gram(half.data(), A.data.data(), M, K);
    CHECK(same_bits(half, whole));
}

}  // namespace

TEST_CASE("product computes Y = A B, and gram X X^T, with the bits of the whole product, fp32 and bf16") {
    Random r(17);
    for (const LayerSize& s : LAYERS) check_plain_products<float>(r, s), check_plain_products<bf16>(r, s);
    check_plain_products<float>(r, {200, 100, 30}), check_plain_products<bf16>(r, {200, 100, 30});
    for (int threads : {1, 3}) {
        Threads guard(threads);
        check_plain_products<float>(r, {1400, 9, 1}), check_plain_products<bf16>(r, {1400, 9, 1});
    }
}

// Several threads compute a product and a gram each, of matrices of their own, with the bits of all threads.
template <class T>
static void check_own_products(Random& r, size_t M, size_t K, size_t N) {
    INFO("M ", M, " K ", K, " N ", N, ", bytes ", sizeof(T));
    constexpr int THREADS = 3;
    gemm::reserve_own(THREADS);
    std::vector<std::vector<T>> A, B;
    std::vector<Floats> Y(THREADS), G(THREADS), own_Y(THREADS), own_G(THREADS);
    for (size_t i = 0; i < THREADS; i++) {
        A.push_back(typed<T>(r.floats(M * K))), B.push_back(typed<T>(r.floats(K * N)));
        for (Floats* f : {&Y[i], &own_Y[i]}) f->assign(M * N, NAN);
        for (Floats* f : {&G[i], &own_G[i]}) f->assign(M * M, NAN);
        gemm::product(Y[i].data(), A[i].data(), B[i].data(), M, K, N);
        gemm::gram(G[i].data(), A[i].data(), M, K);
    }
    for (int round = 0; round < 3; round++) {
#pragma omp parallel for schedule(static, 1) num_threads(THREADS)
        for (size_t i = 0; i < THREADS; i++) {
            gemm::product(own_Y[i].data(), A[i].data(), B[i].data(), M, K, N);
            gemm::gram(own_G[i].data(), A[i].data(), M, K);
        }
        for (size_t i = 0; i < THREADS; i++) {
            CHECK(same_bits(Y[i], own_Y[i]));
            CHECK(same_bits(G[i], own_G[i]));
        }
    }
}

TEST_CASE("threads may compute products of their own at once, fp32 and bf16") {
    Random r(23);
    // Rows of the last are divided, and B, which they share, is larger than a thread's own workspace.
    const size_t sizes[][3] = {{1, 1, 1}, {37, 64, 95}, {128, 128, 512}, {40, 600, 1500}, {2100, 520, 1040}};
    for (auto [M, K, N] : sizes) check_own_products<float>(r, M, K, N), check_own_products<bf16>(r, M, K, N);
}

TEST_CASE("bias_gradient sums the columns of dY, overwriting or adding, fp32 and bf16") {
    Random r(15);
    for (size_t N : {1, 7, 8, 15, 16, 17, 63, 64, 65, 200})
        for (size_t M : {1, 2, 111})
            for (bool accumulate : {false, true})
                for (size_t extra : {0, 3}) {
                    INFO("M ", M, " N ", N, ", accumulate ", accumulate, ", ldy N + ", extra);
                    const size_t ld = N + extra, ldy = extra ? ld : 0;
                    Floats dY = r.floats(M * ld, 1, 2), db = r.floats(N + 1, 1, 2), half_db = db, before = db;
                    Doubles want(N), half_want(N);
                    for (size_t n = 0; n < N; n++) {
                        if (accumulate) want[n] = half_want[n] = before[n];
                        else db[n] = half_db[n] = NAN;
                        for (size_t m = 0; m < M; m++) {
                            want[n] += dY[m * ld + n];
                            half_want[n] += rounded(dY[m * ld + n]);
                        }
                    }
                    Halves half = typed<bf16>(dY);
                    gemm::bias_gradient(db.data(), dY.data(), M, N, accumulate, ldy);
                    gemm::bias_gradient(half_db.data(), half.data(), M, N, accumulate, ldy);
                    check_close("bias_gradient: fp32", db.data(), want.data(), N, 1e-6);
                    check_close("bias_gradient: bf16", half_db.data(), half_want.data(), N, 1e-6);
                    CHECK(db[N] == before[N]);
                    CHECK(half_db[N] == before[N]);
                }
}

// ---------------------------------------------------------------------------------------------
// Sums of squares

TEST_CASE("sum_squares sums blocks of 1024 squares, the same bits with any number of threads") {
    Random r(16);
    for (size_t n : {1, 7, 1023, 1024, 1025, 100003}) {
        INFO("n ", n);
        Floats g = r.floats(n);
        Doubles want(ceil_div(n, gemm::SQUARES)), first;
        for (size_t i = 0; i < n; i++) want[i / gemm::SQUARES] += (double)g[i] * g[i];
        for (int threads : {1, 2, 3}) {
            Threads guard(threads);
            Doubles got(want.size() + 1, 7.0);
            gemm::sum_squares(got.data(), g.data(), n);
            CHECK(got.back() == 7.0);
            check_close("sum_squares", got.data(), want.data(), want.size(), 1e-14);
            if (first.empty()) first = got;
            CHECK((got == first));
        }
    }
}

TEST_CASE("weight_gradient's squares are complete after the next product or finish_squares") {
    Random r(8);
    const size_t sizes[][3] = {{203, 71, 300}, {71, 203, 1100}, {3, 5, 2}, {40, 1500, 30}, {0, 5, 3}};
    for (auto& size : sizes) {
        const size_t M = size[0], N = size[1], K = size[2];
        Floats A = r.floats(M * K), B = r.floats(K * N), want(M * N), C(M * N);
        auto next_product = [&](Floats& to) {
            gemm::multiply(FP32, {M, N, K, {A.data(), K, 1}, {B.data(), N, 1}, to.data(), N});
        };
        next_product(want);
        for (size_t n : {1, 16, 17, 1000, 1024, 2049, 100003})
            for (int threads : {1, 2, 3}) {
                INFO(M, " x ", N, " x ", K, ", squares of ", n, ", threads ", threads);
                Threads guard(threads);
                Floats X = r.floats(2 * n), dY = r.floats(2), dW(n), other(n);
                const Doubles none(ceil_div(n, gemm::SQUARES) + 1, -1.0);
                Doubles want_sums = none, sums = none, later = none;
                auto gradient = [&](Floats& to, double* squares) {
                    gemm::weight_gradient(to.data(), nullptr, dY.data(), X.data(), 2, to.size(), 1, false,
                                          squares);
                };
                gradient(dW, nullptr);
                gemm::sum_squares(want_sums.data(), dW.data(), n);

                gradient(dW, sums.data());
                next_product(C);
                CHECK(same_bits(C, want));
                CHECK((sums == want_sums));
                sums = none;  // once complete, they are not computed again
                next_product(C), gemm::finish_squares();
                CHECK((sums == none));

                gradient(dW, sums.data());
                gemm::finish_squares();
                CHECK((sums == want_sums));
                sums = none;
                next_product(C), gemm::finish_squares();
                CHECK((sums == none));

                // The next product may be a weight gradient too; its squares then come after it.
                gradient(dW, sums.data()), gradient(other, later.data());
                CHECK((sums == want_sums));
                gemm::finish_squares();
                CHECK((later == want_sums));
            }
    }
}

// ---------------------------------------------------------------------------------------------
// Few rows

namespace {

// Checks one call of few_rows against sums in double precision, with operands rounded if T is bf16.
template <class T>
void check_few(Random& r, size_t K) {
    const Dtype dtype = sizeof(T) == 2 ? BF16 : FP32;
    size_t M = 1 + r.below(19), N = r.among({1, 2, 3, 15, 16, 17, 65}), ldy = N + r.below(3);
    bool with_bias = r.below(2);
    INFO("M ", M, " N ", N, " K ", K, " bytes ", sizeof(T));
    Floats X = r.floats(M * K), W = r.floats(N * K), b = r.floats(N), Y(M * ldy, 7.0f), alone(N);
    std::vector<T> w = typed<T>(W);
    auto few = [&](size_t rows, const float* x, float* y, size_t ld) {
        Floats units(gemm::units(dtype, K) + 1, 7.0f);
        gemm::to_units(dtype, units.data(), x, K);
        CHECK(units.back() == 7.0f);
        gemm::few_rows(y, x, w.data(), with_bias ? b.data() : nullptr, rows, K, N, ld == N ? 0 : ld);
    };
    few(M, X.data(), Y.data(), ldy);
    size_t row = r.below(M);
    few(1, &X[row * K], alone.data(), N);
    CHECK(!memcmp(alone.data(), &Y[row * ldy], N * sizeof(float)));
    auto operand = [](float x) { return (double)(sizeof(T) == 2 ? rounded(x) : x); };
    double diff = 0;
    for (size_t m = 0; m < M; m++) {
        for (size_t n = 0; n < N; n++) {
            double want = with_bias ? b[n] : 0;
            for (size_t k = 0; k < K; k++) want += operand(X[m * K + k]) * operand(W[n * K + k]);
            diff += std::pow(Y[m * ldy + n] - want, 2);
        }
        for (size_t n = N; n < ldy; n++) CHECK(Y[m * ldy + n] == 7.0f);
    }
    double error = std::sqrt(diff / (double)(M * N * K));
    note("few_rows", error, 1e-6);
    CHECK(error <= 1e-6);
}

}  // namespace

TEST_CASE("few_rows computes X W^T + b, fp32 and bf16; a row does not depend on others") {
    Random r(5);
    for (size_t trial = 0; trial < 80; trial++) {
        const size_t K = r.among({1, 2, 31, 32, 33, 63, 64, 100, 257});
        check_few<float>(r, K);
        check_few<bf16>(r, K);
    }
}

TEST_CASE("few_rows: the same with rows too long for the L1 cache, which are computed in blocks of k") {
    Random r(29);
    for (size_t K : {769, 1536, 1537, 1600, 3075, 6151})
        for (size_t trial = 0; trial < 12; trial++) {
            check_few<float>(r, K);
            check_few<bf16>(r, K);
        }
}

TEST_CASE("few_rows of floats gives the same bits when all threads call it at once") {
    Random r(17);
    const size_t M = 5, K = 300, N = 130, TIMES = 300;
    for (size_t threads : {1, 2, 3}) {
        INFO("threads ", threads);
        Threads guard((int)threads);
        Floats W = r.floats(N * K), X = r.floats(threads * M * K), b = r.floats(N), want(threads * M * N);
        gemm::few_rows(want.data(), X.data(), W.data(), b.data(), threads * M, K, N);
        size_t wrong = 0, team = 0;
#pragma omp parallel reduction(+ : wrong, team)
        {
            size_t t = (size_t)omp_get_thread_num();
            team++;
#pragma omp barrier
            for (size_t i = 0; i < TIMES; i++) {
                Floats Y(M * N);
                gemm::few_rows(Y.data(), &X[t * M * K], W.data(), b.data(), M, K, N);
                wrong += memcmp(Y.data(), &want[t * M * N], Y.size() * sizeof(float)) != 0;
            }
        }
        CHECK(team == threads);
        CHECK(wrong == 0);
    }
}

// ---------------------------------------------------------------------------------------------
// Tiles

namespace {

// Checks one tile, c (rows,cols) = A B, or +=, for a layout of A, against sums in double precision.
void check_tile(Random& r, Dtype dtype, gemm::LayoutOfA layout, bool accumulate) {
    constexpr size_t LD = gemm::SCORES;
    const size_t rows = 1 + r.below(gemm::MR), cols = 1 + r.below(gemm::NR), ldc = cols + r.below(3);
    const size_t K =
        layout == gemm::SCORE_ROWS ? 2 * (1 + r.below(LD / 2)) : 1 + r.below(100);  // whole units
    const size_t units = gemm::units(dtype, K);
    const size_t first = layout == gemm::SCORE_COLUMNS ? r.below(LD - rows + 1) : 0;
    INFO("dtype ", (int)dtype, ", A ", (int)layout, ", rows ", rows, " cols ", cols, " K ", K);
    // Element (i, k) of A, in memory and packed.
    size_t row = K, col = 1;
    if (layout == gemm::SCORE_ROWS) row = LD;
    if (layout == gemm::SCORE_COLUMNS) row = 1, col = LD;
    Floats A = r.floats(std::max(rows, K) * std::max(K, LD)), B = r.floats(K * cols);
    Floats c = r.floats(rows * ldc), a(A.size(), NAN), b(gemm::NR * units, NAN), before = c;
    if (layout == gemm::PANEL) gemm::pack(dtype, a.data(), rows, A.data(), row, col, rows, K);
    if (layout == gemm::SCORE_ROWS) gemm::to_units(dtype, a.data(), A.data(), rows * LD);
    if (layout == gemm::SCORE_COLUMNS) gemm::pack(dtype, a.data(), LD, A.data(), row, col, LD, K);
    gemm::pack(dtype, b.data(), gemm::NR, B.data(), 1, cols, cols, K);
    gemm::tile(dtype, layout, rows, cols, units, &a[first], b.data(), c.data(), ldc, accumulate);
    auto operand = [&](float x) { return (double)(dtype == BF16 ? rounded(x) : x); };
    double diff = 0;
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++) {
            double want = accumulate ? (double)before[i * ldc + j] : 0.0;
            for (size_t k = 0; k < K; k++)
                want += operand(A[(first + i) * row + k * col]) * operand(B[k * cols + j]);
            diff += std::pow(c[i * ldc + j] - want, 2);
        }
    CHECK(differences(c, before, cols, ldc).beside == 0);
    double error = std::sqrt(diff / (double)(rows * cols * K));
    note("tile", error, 2e-6);
    CHECK(error <= 2e-6);
}

}  // namespace

TEST_CASE("tile multiplies a packed panel, or rows or columns of scores, by a packed panel") {
    Random r(18);
    for (size_t trial = 0; trial < 60; trial++)
        for (Dtype dtype : {FP32, BF16})
            for (gemm::LayoutOfA layout : {gemm::PANEL, gemm::SCORE_COLUMNS, gemm::SCORE_ROWS})
                check_tile(r, dtype, layout, trial % 2);
}

TEST_CASE("pack writes each row's units, zeros beyond the rows, and nothing else") {
    Random r(19);
    for (size_t trial = 0; trial < 200; trial++) {
        const size_t VL = simd::VL, n = 1 + r.below(2 * VL + 3), K = 1 + r.below(6 * VL), form = trial % 4;
        const bool dense = r.below(2);  // else a multiple of a vector
        const size_t written = dense ? n : round_up(n, VL), ld = dense ? n : written + VL * r.below(2);
        INFO("rows ", n, " K ", K, " ld ", ld, " form ", form);
        Strided A(r, n, K, form);
        for (Dtype dtype : {FP32, BF16}) {
            // In a unit of two bf16 numbers the later one is the upper half, and so is a single one.
            const size_t per_unit = gemm::per_unit(dtype), units = gemm::units(dtype, K);
            Floats packed(units * ld, 7.0f);
            gemm::pack(dtype, packed.data(), ld, A.data.data(), A.sr, A.sc, n, K);
            size_t wrong = 0;
            for (size_t u = 0; u < units; u++)
                for (size_t i = 0; i < ld; i++) {
                    float want = i < written ? 0.0f : 7.0f;
                    for (size_t k = u * per_unit; k < std::min(K, (u + 1) * per_unit) && i < n; k++) {
                        float x = (float)A.at(i, k);
                        uint32_t bits, unit;
                        memcpy(&unit, &want, 4), memcpy(&bits, &x, 4);
                        if (dtype == BF16) bits = (uint32_t)float_to_bf16(x) << 16;
                        unit |= per_unit == 2 && k % 2 == 0 ? bits >> 16 : bits;
                        memcpy(&want, &unit, 4);
                    }
                    wrong += memcmp(&packed[u * ld + i], &want, 4) != 0;
                }
            CHECK(wrong == 0);
        }
    }
}
