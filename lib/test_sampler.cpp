// test_sampler.cpp - choosing tokens, and writing texts with a decoder that only counts.
#include <doctest/doctest.h>

#include <numeric>

#include "dev/test_util.h"
#include "lib/sampler.h"

using namespace test;

namespace {

// Stands in for a model: the next token is always the last one plus one, modulo 100. Notes what it was asked,
// and what its sequences hold.
struct CountingDecoder : ::Decoder {
    size_t limit;
    std::vector<Tokens> held, asked;
    std::vector<size_t> appended, resets_at;  // of sequence 0
    size_t shortest = SIZE_MAX;               // context of sequence 0 from which a token was drawn
    Floats logits;
    CountingDecoder(size_t N, size_t limit_) : limit(limit_), held(N), logits(N * 100) {}
    size_t sequences() const override { return held.size(); }
    size_t capacity() const override { return limit; }
    size_t length(size_t s = 0) const override { return held[s].size(); }
    void truncate(size_t s, size_t length) override {
        REQUIRE(length <= held[s].size());
        held[s].resize(length);
        if (s == 0 && length == 0) resets_at.push_back(appended.size());
    }
    const float* append(const std::vector<size_t>& which, const int* tokens, size_t n) override {
        for (size_t k = 0; k < which.size(); k++) {
            Tokens& h = held[which[k]];
            asked.push_back(Tokens(tokens + k * n, tokens + (k + 1) * n));
            h.insert(h.end(), asked.back().begin(), asked.back().end());
            REQUIRE(h.size() <= limit);
            for (int v = 0; v < 100; v++)
                logits[k * 100 + (size_t)v] = v == (h.back() + 1) % 100 ? 50.0f : 0.0f;
            if (which[k] == 0) appended.push_back(n), shortest = std::min(shortest, h.size());
        }
        return logits.data();
    }
};

}  // namespace

TEST_CASE("generate goes on past the context with its second half, else computes each token once") {
    CountingDecoder decoder(2, 8);
    std::vector<Tokens> out(2);
    SampleOptions greedy;
    greedy.temperature = 0;
    generate(decoder, 2, {10, 11, 12}, 100, 99, 20, 1, greedy,
             [&](size_t s, int token) { out[s].push_back(token); });
    for (auto& text : out) {
        REQUIRE(text.size() == 20);
        for (int i = 0; i < 20; i++) CHECK(text[(size_t)i] == 13 + i);
    }
    // The prompt, five single tokens until 8 are held, then 4 of the last and four single ones, and so on.
    CHECK(decoder.appended ==
          std::vector<size_t>{3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4, 1, 1, 1});
    CHECK(decoder.resets_at == std::vector<size_t>{0, 6, 11, 16});

    CountingDecoder one(1, 1);  // even a context of one token works
    Tokens text;
    generate(one, 1, {5}, 100, 99, 4, 1, greedy, [&](size_t, int token) { text.push_back(token); });
    CHECK(text == Tokens{6, 7, 8, 9});
    std::string e =
        error_of([&] { generate(decoder, 2, Tokens(9, 1), 100, 99, 1, 1, greedy, [](size_t, int) {}); });
    CHECK(contains(e, "the prompt has 9 tokens, the context takes 1 to 8"));
    CHECK(contains(error_of([&] { generate(decoder, 2, {}, 100, 99, 1, 1, greedy, [](size_t, int) {}); }),
                   "the prompt has 0 tokens"));
}

TEST_CASE("generate ends a sequence at end-of-text, and stops when all have ended") {
    CountingDecoder decoder(3, 64);
    SampleOptions greedy;
    greedy.temperature = 0;
    Tokens text;
    generate(decoder, 3, {40}, 100, 43, 1000, 1, greedy, [&](size_t, int token) { text.push_back(token); });
    CHECK(text == Tokens{41, 41, 41, 42, 42, 42});
    CHECK(decoder.appended.size() == 3);
}

TEST_CASE("the sampler draws from softmax(logits / temperature) cut to top_k, then to top_p") {
    const int V = 9;
    const float logits[V] = {0.5f, 2.0f, -1.0f, 1.9f, 0.0f, -3.0f, 1.2f, 0.7f, -0.4f};
    struct {
        float temperature;
        int top_k;
        float top_p;
    } cases[] = {{1, 0, 1},    {0.5f, 0, 1}, {2, 0, 1},       {1, 3, 1}, {1, 1, 1},     {1, 100, 1},
                 {1, 0, 0.5f}, {1, 0, 0.9f}, {0.8f, 5, 0.7f}, {1, 0, 0}, {3, 4, 0.999f}};
    Sampler sampler;
    for (auto& o : cases) {
        INFO("temperature ", o.temperature, " top_k ", o.top_k, " top_p ", o.top_p);
        // What is allowed, from the definitions: sort, cut, normalise.
        std::vector<int> order(V);
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
        if (o.top_k && o.top_k < V) order.resize((size_t)o.top_k);
        Doubles want(V);
        double total = 0, reached = 0;
        for (int v : order) total += std::exp((double)logits[v] / o.temperature);
        for (int v : order) {
            if (reached >= o.top_p && reached > 0) break;
            want[(size_t)v] = std::exp((double)logits[v] / o.temperature) / total, reached += want[(size_t)v];
        }
        const int draws = 100000;
        std::vector<int> times(V);
        SampleOptions options;
        options.temperature = o.temperature, options.top_k = o.top_k, options.top_p = o.top_p;
        Random r(70);
        for (int i = 0; i < draws; i++) times[(size_t)sampler.pick(logits, V, options, r.uniform())]++;
        double chi_square = 0;
        for (size_t v = 0; v < V; v++) {
            double expected = draws * want[v] / reached;
            if (expected == 0) CHECK(times[v] == 0);
            else chi_square += std::pow(times[v] - expected, 2) / expected;
        }
        CHECK(chi_square < 35);  // at most 8 degrees of freedom: once in 30,000 by chance
    }
}

TEST_CASE("the sampler: temperature 0 takes the most likely token; each token owns its share of u") {
    Sampler sampler;
    SampleOptions o;
    const float logits[5] = {std::log(0.2f), std::log(0.4f), std::log(0.1f), std::log(0.3f), -50};
    o.temperature = 0;
    for (double u : {0.0, 0.5, 0.999999}) CHECK(sampler.pick(logits, 5, o, u) == 1);
    o.temperature = 1;
    int times[5] = {}, share[5] = {200, 400, 100, 300, 0};
    for (int i = 0; i < 1000; i++) times[sampler.pick(logits, 5, o, (i + 0.5) / 1000)]++;
    for (int v = 0; v < 5; v++) CHECK(times[v] == share[v]);
    o.top_k = 4;
    struct {
        double u;
        int token;
    } picks[] = {{0, 1},     {0.399, 1}, {0.401, 3}, {0.699, 3},
                 {0.701, 0}, {0.899, 0}, {0.901, 2}, {1 - 0x1p-53, 2}};
    for (auto& p : picks) CHECK(sampler.pick(logits, 5, o, p.u) == p.token);
    o.top_p = 0.65f;  // 0.4 + 0.3 reach it
    CHECK(sampler.pick(logits, 5, o, 0.57) == 1);
    CHECK(sampler.pick(logits, 5, o, 0.58) == 3);
    CHECK(sampler.pick(logits, 5, o, 1 - 0x1p-53) == 3);
    const float equal[3] = {1, 1, 1};  // ties fall to the lower token
    o = SampleOptions();
    o.top_k = 1;
    CHECK(sampler.pick(equal, 3, o, 0.9) == 0);
    const float far[3] = {-2000, 3000, -INFINITY};
    o = SampleOptions();
    o.temperature = 1e-3f;
    CHECK(sampler.pick(far, 3, o, 0.9999) == 1);
    CHECK(sampler.pick(far, 1, o, 0.5) == 0);  // a vocabulary of one
}

TEST_CASE("the sampler: top_p on a large vocabulary draws what it would from all tokens in order") {
    const int V = 5000;
    for (double sd : {0.0, 1.0, 3.0, 5.0}) {  // from flat to peaked
        Floats logits = Random(73).floats(V, sd);
        std::vector<int> order(V);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(),
                         [&](int a, int b) { return logits[(size_t)a] > logits[(size_t)b]; });
        double total = 0;
        for (float l : logits) total += std::exp((double)l);
        for (float top_p : {0.001f, 0.3f, 0.9f, 0.999f}) {
            INFO("standard deviation ", sd, " top_p ", top_p);
            Doubles reached;  // up to and with each token in order
            for (double sum = 0; reached.empty() || sum < top_p * total;)
                reached.push_back(sum += std::exp((double)logits[(size_t)order[reached.size()]]));
            SampleOptions o;
            o.temperature = 1, o.top_p = top_p;
            Sampler sampler;
            for (double u : {0.0, 0.1, 0.5, 0.77, 0.9, 0.99, 1 - 0x1p-40}) {
                size_t i = (size_t)(std::upper_bound(reached.begin(), reached.end(), u * reached.back()) -
                                    reached.begin());
                CHECK(sampler.pick(logits.data(), V, o, u) == order[std::min(i, reached.size() - 1)]);
            }
        }
    }
}

TEST_CASE(
    "the repetition penalty divides positive logits of tokens seen, multiplies negative ones, and no "
    "others") {
    const float logits[] = {2, 1.5f, -1, -1.5f, 0.5f};
    const int seen[] = {1, 0, 1, 0, 0};
    SampleOptions o;
    o.temperature = 0;
    CHECK(Sampler(5).pick(logits, 5, o, 0, seen) == 0);
    o.repetition_penalty = 1.5f;  // 2 becomes 1.33
    CHECK(Sampler(5).pick(logits, 5, o, 0, seen) == 1);
    const float negative[] = {-1, -1.2f};
    const int first[] = {1, 0};
    CHECK(Sampler(2).pick(negative, 2, o, 0, first) == 1);
    o.repetition_penalty = 1.1f;  // -1 becomes -1.1
    CHECK(Sampler(2).pick(negative, 2, o, 0, first) == 0);
    // The counting decoder's text can go on only to tokens that it has not had.
    CountingDecoder decoder(1, 50);
    o.repetition_penalty = 1000;
    Tokens text;
    generate(decoder, 1, {98}, 100, -1, 3, 1, o, [&](size_t, int token) { text.push_back(token); });
    CHECK(text == Tokens{99, 0, 1});
}

TEST_CASE("tokens from SampleOptions::below on are never drawn") {
    Floats logits(10, 0.0f);
    logits[9] = 100;
    SampleOptions o;
    o.below = 9;
    for (int k = 0; k < 100; k++) CHECK(Sampler(10).pick(logits.data(), 10, o, k / 100.0) < 9);
    o.temperature = 0;
    CHECK(Sampler(10).pick(logits.data(), 10, o, 0) == 0);
}

TEST_CASE("when the context is full, the tags stay before what remains of the text") {
    CountingDecoder noting(1, 8);
    SampleOptions o;
    o.temperature = 0, o.prefix = {90, 91};
    Tokens text;
    generate(noting, 1, {5, 90, 91, 10}, 100, 99, 8, 1, o, [&](size_t, int token) { text.push_back(token); });
    CHECK(text == Tokens{11, 12, 13, 14, 15, 16, 17, 18});
    CHECK(noting.asked ==
          std::vector<Tokens>{{5, 90, 91, 10}, {11}, {12}, {13}, {14}, {90, 91, 14, 15}, {16}, {17}});
}

namespace {

// Takes back the last `count` tokens, once, when the text has `at` tokens, and ends it at `end`. Forbids a
// token.
struct TakingBack : Steering {
    size_t at, count, end, calls = 0;
    int never = -1;
    TakingBack(size_t at_, size_t count_, size_t end_) : at(at_), count(count_), end(end_) {}
    void adjust(const Tokens&, float* l) override {
        if (never >= 0) l[never] = -INFINITY;
    }
    size_t judge(const Tokens& text, bool& ended) override {
        if (text.size() == at && !calls++) return ended = false, at - count;
        ended = text.size() >= end;
        return text.size();
    }
    size_t settled(size_t length) const override { return calls ? length : 0; }
};

}  // namespace

TEST_CASE("tokens that steering takes back are drawn again after the same text, also past a full context") {
    SampleOptions greedy;
    greedy.temperature = 0;
    for (size_t limit : {64, 8})  // with 8, the context begins anew before and after the cut
        for (bool tags : {false, true})
            for (size_t count : {1, 2, 3, 4, 6}) {
                greedy.prefix = tags ? Tokens{90, 91} : Tokens{};
                TakingBack steering(15, count, 25);
                CountingDecoder decoder(1, limit);
                Tokens text;
                generate(decoder, 1, {9, 10, 11, 12}, 100, -1, 100, 1, greedy,
                         [&](size_t, int t) { text.push_back(t); }, {&steering});
                Tokens want(21);
                std::iota(want.begin(), want.end(), 13);
                CHECK(text == want);           // nothing twice, nothing left out
                CHECK(decoder.shortest >= 4);  // the prompt, or half a full context
                const Tokens& held = decoder.held[0];
                const bool tagged = limit == 8 && tags;  // a full context was cut
                if (tagged) CHECK((held[0] == 90 && held[1] == 91));
                for (size_t i = tagged ? 3 : 1; i < held.size(); i++) CHECK(held[i] == held[i - 1] + 1);
            }
}

TEST_CASE(
    "a token that steering forbids is not drawn; a repeated token counts until all of it are taken back") {
    SampleOptions o;
    o.temperature = 0;
    TakingBack steering(100, 1, 8);
    steering.never = 13;
    CountingDecoder decoder(1, 50);
    Tokens text;
    generate(decoder, 1, {10, 11}, 100, 13, 100, 1, o, [&](size_t, int t) { text.push_back(t); },
             {&steering});
    CHECK(text == Tokens{12, 0, 1, 2, 3, 4});  // in place of 13 the first of the others

    // 12 is taken back, so that it is new and drawn again.
    o.repetition_penalty = 1000;
    TakingBack again(3, 1, 5);
    text.clear();
    generate(decoder, 1, {10, 11}, 100, -1, 100, 1, o, [&](size_t, int t) { text.push_back(t); }, {&again});
    CHECK(text == Tokens{12, 13, 14});
}

TEST_CASE("texts of different lengths go on side by side as they do alone") {
    SampleOptions greedy;
    greedy.temperature = 0;
    CountingDecoder decoder(3, 16);
    std::vector<Continuation> texts;
    texts.reserve(3);
    for (int i = 0; i < 3; i++)
        texts.emplace_back(Tokens((size_t)i + 1, 20 * i), 100, -1, 5 + 10 * i, rng::Key(1, 0, rng::SAMPLE),
                           greedy);
    std::vector<Tokens> out(3);
    continue_texts(decoder, texts, 100, [&](size_t i, int t) { out[i].push_back(t); });
    for (int i = 0; i < 3; i++) {
        Tokens want((size_t)(5 + 10 * i));
        std::iota(want.begin(), want.end(), 20 * i + 1);
        CHECK(out[(size_t)i] == want);
        CHECK(!texts[(size_t)i].ended_by_itself());
    }
}
