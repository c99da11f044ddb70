// test_engine.cpp - texts that are written side by side: the engine of serve_gpt2, with a model that babbles.
#include <doctest/doctest.h>

#include "dev/demo/engine.h"
#include "dev/test_model.h"

using namespace test;

namespace {

const char* const LETTERS = "\t\n ابتثج";

// A decoder whose logits depend only on a sequence's own tokens, and that notes what it is asked.
struct Babbler : ::Decoder {
    struct Notes {
        std::atomic<bool> fails{false};
        std::atomic<size_t> calls{0}, most{0};  // of append(), and the most sequences of one call
        std::atomic<int> delay_us{0};
    };
    static Notes notes;
    std::vector<std::vector<int>> held;
    size_t V;
    Floats logits;
    Babbler(size_t N, size_t V_) : held(N), V(V_) {}
    size_t sequences() const override { return held.size(); }
    size_t capacity() const override { return 64; }
    size_t length(size_t s = 0) const override { return held[s].size(); }
    void truncate(size_t s, size_t length) override { held[s].resize(std::min(length, held[s].size())); }
    const float* append(const std::vector<size_t>& which, const int* tokens, size_t n) override {
        std::this_thread::sleep_for(std::chrono::microseconds(notes.delay_us));
        if (notes.fails.exchange(false)) fail("the babbler is out of breath");
        notes.calls++, notes.most = std::max<size_t>(notes.most, which.size());
        logits.clear();
        for (size_t k = 0; k < which.size(); k++) {
            auto& h = held[which[k]];
            h.insert(h.end(), tokens + k * n, tokens + (k + 1) * n);
            REQUIRE(h.size() <= capacity());
            Random r((uint64_t)h.back() * 100 + h.size());
            for (size_t v = 0; v < V; v++) logits.push_back((float)r.below(1000) / 300);
            logits.back() -= 3;  // end-of-text
        }
        return logits.data();
    }
};
Babbler::Notes Babbler::notes;

}  // namespace

std::unique_ptr<Decoder> open_decoder(ModelReader& file, size_t N, Dtype) {
    return std::make_unique<Babbler>(N, (size_t)file.cfg.V);
}

namespace {

// A model's folder, and an engine with it.
struct Served {
    TempDir dir;
    std::unique_ptr<demo::Engine> engine;
    explicit Served(size_t slots = 4, size_t queue = 8) {
        const Tokenizer t = Tokenizer::characters(LETTERS);
        t.save(dir / "tokenizer.bin");
        const Config c = config(1, 1, 8, t.vocab_size(), 64);
        ModelWriter w(dir / "model.bin", c);
        const Floats zeros(num_params(c));
        w.add(zeros.data(), zeros.size());
        w.finish();
        demo::EngineSettings s;
        s.slots = slots, s.queue = queue;
        Babbler::notes.calls = Babbler::notes.most = 0, Babbler::notes.delay_us = 0;
        engine = std::make_unique<demo::Engine>(dir / "model.bin", s);
    }
    demo::Request request(const std::string& prompt, uint64_t seed, int tokens = 40) const {
        demo::Request r;
        r.prompt = engine->prompt(prompt, {engine->tokenizer().eot()});
        r.max_tokens = tokens, r.seed = seed, r.sampling.temperature = 1;
        return r;
    }
    std::shared_ptr<demo::Text> begin(const demo::Request& r) { return engine->write({r})[0]; }
};
demo::Text::News whole(demo::Text& text) {
    demo::Text::News all;
    while (!all.ended) {
        demo::Text::News news = text.next();
        all.text += news.text, all.ended = news.ended, all.finish_reason = news.finish_reason,
                               all.error = news.error;
        all.tokens.insert(all.tokens.end(), news.tokens.begin(), news.tokens.end());
    }
    return all;
}

}  // namespace

TEST_CASE("a text is the same alone and beside others that come and go, for any number of slots") {
    std::vector<std::string> alone;
    Served one(1);
    for (uint64_t i = 0; i < 12; i++)
        alone.push_back(whole(*one.begin(one.request("ابت", i, 30 + 5 * (int)i))).text);
    CHECK(std::set<std::string>(alone.begin(), alone.end()).size() == 12);
    for (size_t slots : {2, 5}) {
        Served many(slots, 20);
        Babbler::notes.delay_us = 200;
        std::vector<std::shared_ptr<demo::Text>> texts;
        for (uint64_t i = 0; i < 12; i++)
            texts.push_back(many.begin(many.request("ابت", i, 30 + 5 * (int)i)));
        for (size_t i = 0; i < 12; i++) CHECK(whole(*texts[i]).text == alone[i]);
        CHECK(Babbler::notes.most == slots);
    }
}

TEST_CASE("a text ends after max_tokens, at end-of-text, or before a stop text, which is not told in part") {
    Served s;
    const std::string text = whole(*s.begin(s.request("", 3, 60))).text;
    demo::Request r = s.request("", 3, 10);
    auto cut = whole(*s.begin(r));
    CHECK(cut.finish_reason == "length");
    CHECK(utf8::count(cut.text) == 10);
    CHECK(text.substr(0, cut.text.size()) == cut.text);
    r.max_tokens = 10000;
    CHECK(whole(*s.begin(r)).finish_reason == "stop");
    for (size_t at : {1, 5, 9}) {  // a text of three characters in the middle
        r.stop = {"zz", text.substr(2 * at, 6)};
        if (utf8::find_invalid(r.stop[1]) != utf8::VALID) continue;
        auto told = whole(*s.begin(r));
        CHECK(told.finish_reason == "stop");
        CHECK(told.text == text.substr(0, text.find(r.stop[1])));
        r.logprobs = 0;
        told = whole(*s.begin(r));
        CHECK(told.tokens.size() == utf8::count(told.text));  // none of the stop text
        r.logprobs = -1;
    }
}

TEST_CASE("logprobs are those of softmax, the likeliest first, one entry for each token that is told") {
    Served s;
    demo::Request r = s.request("اب", 5, 25);
    r.logprobs = 3;
    auto told = whole(*s.begin(r));
    CHECK(told.tokens.size() == utf8::count(told.text));
    std::string joined;
    for (const demo::TokenInfo& t : told.tokens) {
        joined += s.engine->tokenizer().bytes(t.token);
        REQUIRE(t.likeliest.size() == 3);
        CHECK(t.likeliest[0].second >= t.likeliest[1].second);
        CHECK(t.logprob <= t.likeliest[0].second);
        CHECK(t.logprob < 0);
    }
    CHECK(joined == told.text);
    // With a rhyme, tokens that were taken back are not told.
    r.wish = {3, "ب"};
    r.max_tokens = 1000;
    auto rhymed = whole(*s.begin(r));
    joined.clear();
    for (const demo::TokenInfo& t : rhymed.tokens) joined += s.engine->tokenizer().bytes(t.token);
    CHECK(joined == rhymed.text);
    r.logprobs = s.engine->config().V;
    r.max_tokens = 1, r.wish = {};
    double sum = 0;
    auto first = whole(*s.begin(r));
    for (auto& [token, logprob] : first.tokens[0].likeliest) sum += std::exp(logprob);
    CHECK(sum == doctest::Approx(1).epsilon(1e-5));
}

TEST_CASE("more texts than may wait are refused, all of a request; a cancelled one makes room at once") {
    Served s(1, 2);
    Babbler::notes.delay_us = 1000;
    auto first = s.begin(s.request("", 1, 100000));
    first->next();  // it is being written
    auto second = s.begin(s.request("", 2, 5));
    CHECK_THROWS_AS(s.engine->write({s.request("", 3), s.request("", 4)}), demo::Busy);
    auto third = s.begin(s.request("", 3, 5));
    CHECK(contains(error_of([&] { s.begin(s.request("", 4)); }),
                   "texts: 1 are asked for, there is room for 0 more: 1 are being written, 2 wait"));
    first->cancel();
    CHECK(whole(*second).ended);
    CHECK(whole(*third).ended);
    CHECK(whole(*first).ended);
}

TEST_CASE("an engine that ends finishes its texts in the time it has, and cuts the others") {
    Served s(2, 8);
    Babbler::notes.delay_us = 500;
    demo::Request endless = s.request("", 1, 1000000);
    endless.wish.verses = 10000;
    auto quick = s.begin(s.request("", 2, 20)), slow = s.begin(endless),
         waiting = s.begin(s.request("", 5, 10));
    s.engine->end(demo::Clock::now() + std::chrono::milliseconds(700));
    CHECK_THROWS_AS(s.begin(s.request("", 3)), demo::Ending);
    auto told = whole(*quick);
    CHECK(utf8::count(told.text) <= 20);
    CHECK(whole(*waiting).ended);
    CHECK(whole(*slow).finish_reason == "length");
    s.engine.reset();
}

TEST_CASE("a text ends when its time is over") {
    Served s;
    Babbler::notes.delay_us = 1000;
    demo::Request r = s.request("", 1, 1000000);
    r.wish.verses = 10000, r.seconds = 1;
    const auto began = demo::Clock::now();
    CHECK(whole(*s.begin(r)).finish_reason == "length");
    const double took = std::chrono::duration<double>(demo::Clock::now() - began).count();
    CHECK(took >= 1);
    CHECK(took < 20);
}

TEST_CASE("a model without its tokenizer, or with another one, is named") {
    Served s;
    s.engine.reset();
    demo::EngineSettings settings;
    Tokenizer::characters("اب").save(s.dir / "tokenizer.bin");
    CHECK(contains(error_of([&] { demo::Engine e(s.dir / "model.bin", settings); }), "has 3 tokens"));
    unlink((s.dir / "tokenizer.bin").c_str());
    CHECK(contains(error_of([&] { demo::Engine e(s.dir / "model.bin", settings); }),
                   "tokenizer.bin: tokenizer not"));
}

TEST_CASE(
    "a model that fails ends the texts that are being written with its error, and goes on with others") {
    Served s;
    Babbler::notes.fails = true;
    auto failed = whole(*s.begin(s.request("", 1, 10)));
    CHECK(failed.finish_reason == "error");
    CHECK(failed.error == "the babbler is out of breath");
    CHECK(utf8::count(whole(*s.begin(s.request("", 1, 10))).text) == 10);
}

TEST_CASE("a prompt that has all the wished verses is answered with nothing") {
    Served s;
    demo::Request r = s.request("اب\tتب\nاج\tتب\n", 1);
    r.wish.verses = 2;
    auto told = whole(*s.begin(r));
    CHECK(told.text == "");
    CHECK(told.finish_reason == "stop");
}
