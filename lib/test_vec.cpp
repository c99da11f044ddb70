// test_vec.cpp - exp, the normal distribution and GELU on vectors, held against the C library in doubles.
#include <doctest/doctest.h>

#include "dev/reference.h"
#include "dev/test_util.h"
#include "lib/vec.h"

using namespace test;

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

TEST_CASE("gelu and its derivative, tanh and erf: relative L2 1e-6, far out too; NaN stays NaN") {
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
