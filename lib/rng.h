// rng.h - random numbers that can be computed anywhere, in any order.
//
// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): four 32-bit
// words are a pure function of a 64-bit key and a 128-bit counter. The key is the run's seed; the
// counter says what the number is for: (element, step, stream). So the CPU, a GPU and a resumed run
// draw the same dropout masks, initial weights and shuffles, whatever the order or number of threads,
// and backward recomputes a mask instead of storing it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define RNG_FN __host__ __device__ inline
#else
#define RNG_FN inline
#endif

namespace rng {

// What a draw is for: the last counter word is stream << 16 | layer.
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

// One family of numbers: a seed, a step, a stream and a layer; element e takes word e % 4 of block e / 4.
struct Key {
    uint64_t seed;
    uint32_t step, site;
    RNG_FN Key(uint64_t seed_, uint32_t step_, Stream stream, uint32_t layer = 0)
        : seed(seed_), step(step_), site((uint32_t)stream << 16 | layer) {}
    RNG_FN Block block(uint64_t b) const {
        return philox((uint32_t)seed, (uint32_t)(seed >> 32), (uint32_t)b, (uint32_t)(b >> 32), step, site);
    }
    RNG_FN uint32_t u32(uint64_t e) const { return block(e / 4).w[e % 4]; }
    // Uniform in [0, 1), 53 bits; number i.
    double uniform(uint64_t i) const {
        Block b = block(i);
        return (double)(((uint64_t)b.w[0] << 32 | b.w[1]) >> 11) * 0x1p-53;
    }
    // Standard normal (Box and Muller 1958); number i.
    double normal(uint64_t i) const {
        Block b = block(i);
        double u = ((double)b.w[0] + 1.0) * 0x1p-32, v = (double)b.w[1] * 0x1p-32;
        return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v);
    }
};

// Fisher-Yates: a permutation of a[0..n) that depends on the key alone.
template <class T>
void shuffle(T* a, size_t n, const Key& key) {
    for (size_t i = n; i > 1; i--) {
        size_t j = (size_t)(key.uniform(i) * (double)i);
        T t = a[i - 1];
        a[i - 1] = a[j], a[j] = t;
    }
}

// Dropout keeps an element where its 32-bit draw is >= this threshold (p in [0, 1)).
RNG_FN uint32_t drop_threshold(float p) { return (uint32_t)((double)p * 4294967296.0); }

}  // namespace rng
