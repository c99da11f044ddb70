// test_rng.cpp - Philox's numbers against known answers, and their distributions.
#include <doctest/doctest.h>

#include <map>
#include <numeric>

#include "dev/test_util.h"
#include "lib/rng.h"

using namespace test;

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

TEST_CASE("a key's numbers are philox blocks, counted by element / 4, step, stream and layer") {
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
