// vec.h - vectors of floats, as wide as the processor's registers, and the functions of them in layers.
//
// A vec holds VL floats: 16 with AVX-512, 8 with AVX, else 4. Loads and stores take a number n and handle
// only the first n values, so that the end of a row needs no code of its own. Arrays may hold floats or bf16
// numbers; vectors always hold floats. Compile with the Makefile's -ffp-contract=fast, and with g++ also
// --param=avoid-fma-max-bits=0. Otherwise the compiler may fuse a product and a sum in some loops and not in
// others, and results would depend on an element's position in the vector.
#pragma once

#if defined(__SSE__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "lib/gpt2.h"

// g++ and clang++ name this differently: UNROLL(n) unrolls the loop that follows, at most n times.
#define UNROLL_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL(n) UNROLL_PRAGMA(clang loop unroll_count(n))
#else
#define UNROLL(n) UNROLL_PRAGMA(GCC unroll n)
#endif

namespace simd {

#if defined(__AVX512F__)
constexpr size_t VL = 16;
#elif defined(__AVX__)
constexpr size_t VL = 8;
#else
constexpr size_t VL = 4;
#endif

typedef float vec __attribute__((vector_size(VL * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(VL * sizeof(float))));
typedef uint16_t bf16;

// ---------------------------------------------------------------------------------------------
// Loads, stores, bounds, sums

// The first n of VL values; the other lanes become `beyond`.
inline vec load(const float* p, size_t n = VL, float beyond = 0) {
    vec v = vec{} + beyond;
    if (n >= VL) memcpy(&v, p, sizeof v);
#if defined(__AVX512F__)
    else v = (vec)_mm512_mask_loadu_ps((__m512)v, (__mmask16)((1u << n) - 1), p);
#else
    else memcpy(&v, p, n * sizeof(float));
#endif
    return v;
}
inline void store(float* p, vec v, size_t n = VL) {
    if (n >= VL) memcpy(p, &v, sizeof v);
#if defined(__AVX512F__)
    else _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
#else
    else memcpy(p, &v, n * sizeof(float));
#endif
}
// Keeps v in a register. Without it g++ makes v a memory operand of each instruction, and so loads it each
// time.
#if defined(__SSE__)
inline void in_register(vec& v) { __asm__("" : "+v"(v)); }
#elif defined(__aarch64__)
inline void in_register(vec& v) { __asm__("" : "+w"(v)); }
#else
inline void in_register(vec&) {}
#endif
// A store past the caches, for values that are not read again soon. p must be aligned to a vector. Other
// threads see the values after finish_streams().
#if defined(__AVX512F__)
inline void stream(float* p, vec v) { _mm512_stream_ps(p, (__m512)v); }
#elif defined(__AVX__)
inline void stream(float* p, vec v) { _mm256_stream_ps(p, (__m256)v); }
#elif defined(__SSE__)
inline void stream(float* p, vec v) { _mm_stream_ps(p, (__m128)v); }
#else
inline void stream(float* p, vec v) { store(p, v); }
#endif
inline void finish_streams() {
#if defined(__SSE__)
    _mm_sfence();
#endif
}
// The larger, or the smaller, of x and a bound. NaN in x stays NaN, which is why the operands' order matters.
inline vec at_least(vec x, vec low) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_max_ps(0xffff, (__m512)low, (__m512)x);
#elif defined(__AVX__)
    return (vec)_mm256_max_ps((__m256)low, (__m256)x);
#elif defined(__SSE__)
    return (vec)_mm_max_ps((__m128)low, (__m128)x);
#else
    return x < low ? low : x;
#endif
}
inline vec at_most(vec x, vec high) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_min_ps(0xffff, (__m512)high, (__m512)x);
#elif defined(__AVX__)
    return (vec)_mm256_min_ps((__m256)high, (__m256)x);
#elif defined(__SSE__)
    return (vec)_mm_min_ps((__m128)high, (__m128)x);
#else
    return x > high ? high : x;
#endif
}
inline vec sqrt(vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
#elif defined(__AVX__)
    return (vec)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE__)
    return (vec)_mm_sqrt_ps((__m128)x);
#else
    for (size_t i = 0; i < VL; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}
// The sum across the lanes: the upper half is added to the lower half, until one lane is left.
inline float sum(vec v) {
    for (size_t h = VL / 2; h; h /= 2)
        for (size_t i = 0; i < h; i++) v[i] += v[i + h];
    return v[0];
}
// Lane j of the result is lane Index::at(j) of a and b, counted through: b's first lane is number VL. Index
// is a type with a constexpr function `at`, since the compiler must know the lanes.
template <class Index, size_t... J>
inline __attribute__((always_inline)) vec shuffle_lanes(vec a, vec b, std::index_sequence<J...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, Index::at(J)...);
#else
    return __builtin_shuffle(a, b, ivec{Index::at(J)...});
#endif
}
template <class Index>
inline __attribute__((always_inline)) vec shuffle(vec a, vec b) {
    return shuffle_lanes<Index>(a, b, std::make_index_sequence<VL>());
}

// The lanes that sum_each() adds: of each 2H lanes the lower H (UPPER = 0) or the upper H (UPPER = 1), from
// the first vector and then from the second.
template <size_t H, size_t UPPER>
struct HalvesOf {
    static constexpr int at(size_t j) {
        return (int)(j / (2 * H) * 2 * H + j % H + j / H % 2 * VL + UPPER * H);
    }
};
// Sums VL vectors at once: lane i of v[0] becomes the sum across v[i], in the same order as sum() adds it.
template <size_t H = VL / 2>
inline __attribute__((always_inline)) void sum_each(vec* v) {
    UNROLL(16)
    for (size_t i = 0; i < H; i++)
        v[i] = shuffle<HalvesOf<H, 0>>(v[i], v[i + H]) + shuffle<HalvesOf<H, 1>>(v[i], v[i + H]);
    if constexpr (H > 1) sum_each<H / 2>(v);
}
inline float max(vec v) {
    for (size_t h = VL / 2; h; h /= 2)
        for (size_t i = 0; i < h; i++) v[i] = std::max(v[i], v[i + h]);
    return v[0];
}
// The largest of n values, n at least 1.
inline float max(const float* x, size_t n) {
    vec most = load(x, n, -INFINITY);
    for (size_t i = VL; i < n; i += VL) most = at_least(load(x + i, n - i, -INFINITY), most);
    return max(most);
}
// bf16 numbers as floats: their bits become the upper half of a float's, exactly.
inline vec load(const bf16* p, size_t n = VL) {
    ivec v;
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    __m256i h = n >= VL ? _mm256_loadu_si256((const __m256i*)p)
                        : _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    v = (ivec)_mm512_maskz_cvtepu16_epi32(0xffff, h);
#else
    for (size_t i = 0; i < VL; i++) v[i] = i < n ? p[i] : 0;
#endif
    return (vec)(v << 16);
}
// Each value rounded to the nearest bf16, ties to even; NaN stays NaN. The lower half of the result is 0.
inline vec round_to_bf16(vec x) {
    typedef uint32_t uvec __attribute__((vector_size(sizeof(vec))));
    uvec u = (uvec)x, rounded = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
    uvec nan = (uvec)((ivec)(u & 0x7fffffffu) > 0x7f800000);
    return (vec)((rounded & ~nan) | (((u & 0xffff0000u) | 0x400000u) & nan));
}
// The first n of VL values, each rounded to bf16.
inline void store(bf16* p, vec v, size_t n = VL) {
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    __m256i h = (__m256i)_mm512_cvtneps_pbh((__m512)v);
    if (n >= VL) _mm256_storeu_si256((__m256i*)p, h);
    else _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), h);
#else
    ivec bits = (ivec)round_to_bf16(v) >> 16;
    for (size_t i = 0; i < std::min(n, VL); i++) p[i] = (bf16)bits[i];
#endif
}

// The n values x as matrix products read them: x itself as floats, or buf, to which they are rounded as bf16.
inline const float* rounded(float*, const float* x, size_t) { return x; }
inline const bf16* rounded(bf16* buf, const float* x, size_t n) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i += VL) store(buf + i, load(x + i, n - i), n - i);
    return buf;
}

// The lanes that one round of transpose() takes for a row (SECOND = 0), and for the row H after it (SECOND =
// 1). Rounds H = 2 and 1 transpose within blocks of 4 x 4 values; rounds H = 4 and 8 exchange these blocks.
template <size_t H, size_t SECOND>
struct Interleaved {
    static constexpr int at(size_t j) {
        constexpr size_t FOURS = VL / 4;
        size_t f = j / 4, i = j % 4;
        size_t lane = H < 4 ? i % 2 * VL + 4 * f + i / 2 : 2 * f / FOURS * VL + 2 * f % FOURS * 4 + i;
        return (int)(lane + SECOND * (H < 4 ? 2 : 4));
    }
};
// Transposes a VL x VL block: value j of v[i] changes places with value i of v[j].
template <size_t H = 2>
inline __attribute__((always_inline)) void transpose(vec* v) {
    UNROLL(16)
    for (size_t i = 0; i < VL; i++)
        if (!(i & H)) {
            vec a = v[i], b = v[i + H];
            v[i] = shuffle<Interleaved<H, 0>>(a, b), v[i + H] = shuffle<Interleaved<H, 1>>(a, b);
        }
    constexpr size_t NEXT = H == 2 ? 1 : H == 1 ? 4 : 2 * H;
    if constexpr (NEXT < VL) transpose<NEXT>(v);
}

// ---------------------------------------------------------------------------------------------
// Functions of a vector

// e^x with an error of about 1 ulp for x in [-87, 88]; x is clamped to that range. With x = n ln2 + r, n a
// whole number and |r| <= ln2/2, it is 2^n, written directly to the exponent's bits, times the Taylor series
// of e^r. ln2 is split in two parts, so that n ln2 is subtracted with more digits than a float holds.
inline vec exp_approx(vec x) {
    x = at_most(at_least(x, vec{} - 87.0f), vec{} + 88.0f);
    const float magic =
        12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, in the sum's lowest bits
    vec shifted = x * 1.44269504f + magic, n = shifted - magic;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120, p = p * r + 1.0f / 24, p = p * r + 1.0f / 6;
    p = p * r + 0.5f, p = p * r + 1.0f, p = p * r + 1.0f;
    return p * (vec)(((ivec)shifted + 127) << 23);
}
inline float exp_approx(float x) { return exp_approx(vec{} + x)[0]; }

// The normal distribution function, 0.5 erfc(-x/sqrt2), with an error of at most 3e-7 (Abramowitz and
// Stegun 7.1.26, computed in floats), and its density.
inline vec normal_cdf(vec x, vec* density) {
    vec a = (vec)((ivec)x & 0x7fffffff) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * a),
        e = exp_approx(-a * a);
    vec tail =
        0.5f * e * t *
        (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    *density = 0.39894228f * e;
    return x < 0 ? tail : 1.0f - tail;
}

// GELU (Hendrycks and Gimpel 2016), x times the normal distribution function of x, and its derivative. GPT-2
// uses the approximation 0.5 x (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x^3). It is computed as x
// sigmoid(2u), which is the same but does not lose digits for negative x, where tanh u is near -1.
inline vec gelu_tanh(vec x, vec* derivative) {
    vec u2 = 1.59576912f * (x + 0.044715f * x * x * x), s = 1.0f / (1.0f + exp_approx(-u2));
    *derivative = s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * x * x);
    return x * s;
}
inline vec gelu_erf(vec x, vec* derivative) {
    vec density, cdf = normal_cdf(x, &density);
    *derivative = cdf + x * density;
    return x * cdf;
}
inline vec gelu(vec x, vec* derivative, int activation) {
    return activation == GELU_TANH ? gelu_tanh(x, derivative) : gelu_erf(x, derivative);
}

// ---------------------------------------------------------------------------------------------
// Functions of a row

// y = (x - mean) rstd w + b, the LayerNorm of one row of C values, with rstd = 1 / sqrt(variance + eps); in
// floats or rounded to bf16. If copy is not null, y is also written there, in floats. y or copy may be x.
template <class A>
inline void layernorm(A* y, float* mean, float* rstd, const float* x, const float* w, const float* b,
                      size_t C, float eps, float* copy) {
    float sum = 0, var = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t c = 0; c < C; c++) sum += x[c];
    float mu = sum / (float)C;
#pragma omp simd reduction(+ : var)
    for (size_t c = 0; c < C; c++) var += (x[c] - mu) * (x[c] - mu);
    float rs = 1.0f / std::sqrt(var / (float)C + eps);
    for (size_t c = 0; c < C; c += VL) {
        auto at = [=](const float* p) { return load(p + c, C - c); };
        vec v = (at(x) - mu) * rs * at(w) + at(b);
        store(y + c, v, C - c);
        if (copy) store(copy + c, v, C - c);
    }
    *mean = mu, *rstd = rs;
}

// y = gelu(x), n values, in floats or rounded to bf16.
template <class A>
inline void gelu_forward(A* y, const float* x, size_t n, int activation) {
    vec unused;
    for (size_t i = 0; i < n; i += VL) store(y + i, gelu(load(x + i, n - i), &unused, activation), n - i);
}
// dx = dy gelu'(x), n values, in floats or rounded to bf16; dx may be dy.
template <class A>
inline void gelu_backward(A* dx, const float* dy, const float* x, size_t n, int activation) {
    vec g;
    for (size_t i = 0; i < n; i += VL) {
        gelu(load(x + i, n - i), &g, activation);
        store(dx + i, load(dy + i, n - i) * g, n - i);
    }
}

}  // namespace simd
