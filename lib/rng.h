// rng.h - random numbers that can be computed anywhere, in any order, and dropout, which is made of them.
//
// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): four 32-bit words
// are a pure function of a 64-bit key and a 128-bit counter. The key is the run's seed; the counter says what
// the number is for: (element, step, stream). So the CPU, a GPU and a resumed run draw the same dropout
// masks, initial weights and shuffles, in any order and with any number of threads, and backward computes a
// mask again instead of reading it from memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define RNG_FN __host__ __device__ inline
#else
#define RNG_FN inline
#endif

namespace rng {

// What a number is for: the counter's last word is stream << 16 | layer.
enum Stream : uint32_t {
    EMB_DROPOUT,
    ATT_DROPOUT,
    ATTPROJ_DROPOUT,
    FCPROJ_DROPOUT,
    INIT,
    SHUFFLE,
    SPLIT,
    SAMPLE,
    ROUNDING
};

struct Block {
    uint32_t w[4];
};

// Philox4x32-10 as published: key (k0, k1), counter (c0, c1, c2, c3).
RNG_FN Block philox(uint32_t k0, uint32_t k1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c0 = n0, c1 = (uint32_t)p1, c2 = n2, c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// A sequence of numbers, for one seed, step, stream and layer. Element e takes word e % 4 of block e / 4.
struct Key {
    uint64_t seed;
    uint32_t step, site;
    RNG_FN Key(uint64_t seed_, uint32_t step_, Stream stream, uint32_t layer = 0)
        : seed(seed_), step(step_), site((uint32_t)stream << 16 | layer) {}
    RNG_FN Block block(uint64_t b) const {
        return philox((uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)b, (uint32_t)(b >> 32), step, site);
    }
    RNG_FN uint32_t u32(uint64_t e) const { return block(e / 4).w[e % 4]; }
    // Number i of uniform ones in [0, 1), with 53 random bits.
    double uniform(uint64_t i) const {
        Block b = block(i);
        return (double)(((uint64_t)b.w[0] << 32 | b.w[1]) >> 11) * 0x1p-53;
    }
    // Number i of standard normal ones (Box and Muller 1958).
    double normal(uint64_t i) const {
        Block b = block(i);
        double u = ((double)b.w[0] + 1.0) * 0x1p-32, v = (double)b.w[1] * 0x1p-32;
        return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
    }
};

// Permutes a[0..n) as the key says (Fisher and Yates).
template <class T>
void shuffle(T* a, size_t n, const Key& key) {
    for (size_t i = n; i > 1; i--) {
        size_t j = (size_t)(key.uniform(i) * (double)i);
        T t = a[i - 1];
        a[i - 1] = a[j], a[j] = t;
    }
}

// Dropout keeps an element if its 32-bit number is >= this threshold (p in [0, 1)).
RNG_FN uint32_t drop_threshold(float p) { return (uint32_t)((double)p * 4294967296.0); }

// Dropout (Srivastava et al. 2014): each element is kept with probability 1-p and then scaled by 1/(1-p), or
// set to 0. The factor depends only on (seed, step, site, layer, element), elements counted over the whole
// batch. So backward computes the mask again instead of storing it, and the batch may be split in any way.
struct Dropout {
    float p = 0;
    Key key{0, 0, EMB_DROPOUT, 0};
    static constexpr size_t CHUNK = 1024;

    // The factors, 0 or 1/(1-p), of elements [e, e + n), n <= CHUNK, in buf, which has room for CHUNK + 8.
    const float* factors(float* buf, uint64_t e, size_t n) const {
        uint32_t threshold = drop_threshold(p);
        float scale = 1.0f / (1.0f - p);
        uint64_t first = e / 4;  // a block of random numbers is four elements'
        size_t blocks = (size_t)((e + n + 3) / 4 - first);
#pragma omp simd
        for (size_t i = 0; i < blocks; i++) {
            Block b = key.block(first + i);
            for (int w = 0; w < 4; w++) buf[4 * i + w] = b.w[w] >= threshold ? scale : 0.0f;
        }
        return buf + e % 4;
    }
    // y = x times the factors of elements [e, e + n); y may be x.
    void apply(float* y, const float* x, uint64_t e, size_t n) const {
        float buf[CHUNK + 8];
        for (size_t i = 0; i < n; i += CHUNK) {
            size_t k = std::min(CHUNK, n - i);
            const float* f = factors(buf, e + i, k);
            for (size_t j = 0; j < k; j++) y[i + j] = x[i + j] * f[j];
        }
    }
};

}  // namespace rng
