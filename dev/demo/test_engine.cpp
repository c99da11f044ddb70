// test_engine.cpp - texts that are written side by side: the engine of serve_gpt2, with a model that babbles.
#include <doctest/doctest.h>

#include "dev/demo/babbler.h"
#include "dev/demo/engine.h"
#include "dev/test_util.h"

using namespace test;

namespace {

Tokenizer characters() { return Tokenizer::characters("\t\n ابتثج"); }

// A model's folder, and an engine with it.
struct Served {
    TempDir dir;
    std::unique_ptr<demo::Engine> engine;
    explicit Served(size_t slots = 4, size_t queue = 8, const Tokenizer& tokenizer = characters()) {
        Babbler::save(dir.path, tokenizer);
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
    // A text that does not end by itself before max_tokens
    demo::Request long_request(uint64_t seed, int tokens = 1000000) const {
        demo::Request r = request("", seed, tokens);
        r.wish.verses = 10000;
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

TEST_CASE("texts of one request go through the model together, their prompt too") {
    Served s(4);
    std::vector<demo::Request> requests;
    for (uint64_t seed = 0; seed < 4; seed++) {
        requests.push_back(s.request("ابت", seed, 10));
        requests.back().wish.verses = 10000;  // it does not end before max_tokens
    }
    for (auto& text : s.engine->write(requests)) CHECK(utf8::count(whole(*text).text) == 10);
    CHECK(Babbler::notes.calls == 10);
    CHECK(Babbler::notes.most == 4);
}

TEST_CASE("whoever waits for a text's end gets all of it at once") {
    Served s;
    Babbler::notes.delay_us = 1000;
    const std::string text = whole(*s.begin(s.request("", 3, 60))).text;
    auto waited_for = s.begin(s.request("", 3, 60));
    CHECK(waited_for->next(std::chrono::milliseconds(20), true).ended ==
          false);  // only what there is by then
    auto again = s.begin(s.request("", 3, 60));
    const demo::Text::News all = again->next(std::chrono::hours(1), true);
    CHECK(all.ended);
    CHECK(all.text == text);
}

TEST_CASE("a text ends after max_tokens, at end-of-text, or before a stop text, no part of which is sent") {
    Served s;
    const std::string text = whole(*s.begin(s.request("", 3, 60))).text;
    demo::Request r = s.request("", 3, 10);
    auto cut = whole(*s.begin(r));
    CHECK(cut.finish_reason == "length");
    CHECK(utf8::count(cut.text) == 10);
    CHECK(text.substr(0, cut.text.size()) == cut.text);
    r.max_tokens = 10000;
    CHECK(whole(*s.begin(r)).finish_reason == "stop");
    std::vector<std::string> letters;
    utf8::for_each(text, [&](uint32_t c, size_t) { utf8::append(letters.emplace_back(), c); });
    REQUIRE(letters.size() > 12);
    for (size_t at : {1, 5, 9}) {  // a text of three characters in the middle
        r.stop = {"zz", letters[at] + letters[at + 1] + letters[at + 2]};
        for (int logprobs : {-1, 0}) {
            r.logprobs = logprobs;
            auto writing = s.begin(r);
            auto sent = whole(*writing);
            CHECK(sent.finish_reason == "stop");
            CHECK(sent.text == text.substr(0, text.find(r.stop[1])));
            // No token of the stop text is sent or counted.
            CHECK(sent.tokens.size() == (logprobs < 0 ? 0 : utf8::count(sent.text)));
            CHECK(writing->tokens_written() == utf8::count(sent.text));
        }
    }
}

TEST_CASE("only tokens of the text that is sent are counted, also where time or the engine's end cuts it") {
    Served s;
    demo::Request r = s.long_request(4);
    r.wish.rhyme = "ججججج", r.seconds = 1;  // a verse takes many tries, and is sent whole
    auto late = s.begin(r);
    const auto sent = whole(*late);
    CHECK(sent.finish_reason == "length");
    CHECK(!sent.text.empty());
    CHECK(late->tokens_written() == utf8::count(sent.text));
    r.seconds = 300;
    auto cut = s.begin(r);
    s.engine->end(demo::Clock::now() + std::chrono::milliseconds(300));
    const std::string rest = whole(*cut).text;
    CHECK(cut->tokens_written() == utf8::count(rest));
}

TEST_CASE("logprobs are those of softmax, the likeliest first, one entry for each token that is sent") {
    Served s;
    demo::Request r = s.request("اب", 5, 25);
    r.logprobs = 3;
    auto sent = whole(*s.begin(r));
    CHECK(sent.tokens.size() == utf8::count(sent.text));
    std::string joined;
    for (const demo::TokenInfo& t : sent.tokens) {
        joined += s.engine->tokenizer().bytes(t.token);
        REQUIRE(t.likeliest.size() == 3);
        CHECK(t.likeliest[0].second >= t.likeliest[1].second);
        CHECK(t.logprob <= t.likeliest[0].second);
        CHECK(t.logprob < 0);
    }
    CHECK(joined == sent.text);
    // With a rhyme, tokens that were taken back are not sent.
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
    auto first = s.begin(s.long_request(1));
    first->next();  // it is being written
    auto second = s.begin(s.long_request(2, 5));
    CHECK_THROWS_AS(s.engine->write({s.request("", 3), s.request("", 4)}), demo::Busy);
    auto third = s.begin(s.long_request(3, 5));
    CHECK(contains(error_of([&] { s.begin(s.request("", 4)); }),
                   "texts: 1 are asked for, there is room for 0 more: 1 are being written, 2 wait"));
    CHECK(second->next(std::chrono::milliseconds(20)).text == "");  // it waits
    first->cancel();
    CHECK(utf8::count(whole(*second).text) == 5);
    CHECK(utf8::count(whole(*third).text) == 5);
    CHECK(whole(*first).finish_reason == "length");
}

TEST_CASE("a client that has read a text's end may ask for the next one at once, without a queue") {
    Served s(1, 0);
    for (uint64_t i = 0; i < 300; i++) CHECK(whole(*s.begin(s.request("", i, 2))).error == "");
}

TEST_CASE("a FairMutex goes to those who wait, in their order, before one who has just had it") {
    demo::FairMutex mutex;
    std::vector<size_t> order;
    std::vector<std::thread> threads;
    mutex.lock();
    for (size_t i = 0; i < 5; i++) {
        std::atomic<int> id{0};
        threads.emplace_back([&mutex, &order, &id, i] {
            id = gettid();
            for (int k = 0; k < 2; k++) {
                mutex.lock();
                order.push_back(i);
                mutex.unlock();
            }
        });
        auto sleeps = [&] {
            return id && contains(read_file(strf("/proc/self/task/%d/stat", id.load())), ") S ");
        };
        while (!sleeps()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    mutex.unlock();
    for (auto& t : threads) t.join();
    CHECK(std::vector<size_t>(order.begin(), order.begin() + 5) == std::vector<size_t>{0, 1, 2, 3, 4});
}

TEST_CASE("engines take turns: a text of one does not keep another's waiting") {
    Served one(1), other(1);
    Babbler::notes.delay_us = 1000;
    auto endless = one.begin(one.long_request(1));
    endless->next();
    const size_t before = Babbler::notes.calls;
    CHECK(utf8::count(whole(*other.begin(other.long_request(2, 50))).text) == 50);
    CHECK(Babbler::notes.calls - before < 3 * 50);
    endless->cancel();
}

TEST_CASE("prompts that several threads encode at once have the tokens of each alone") {
    std::vector<std::string> tokens = {"<|endoftext|>"};
    for (int b = 0; b < 256; b++) tokens.push_back(std::string(1, (char)b));
    for (const char* letters : {"ا", "ب", "ت", "ث", "اب", "بت", "تث"}) tokens.push_back(letters);
    Served s(1, 1, Tokenizer::byte_bpe(tokens, 0, false, "test"));
    const std::vector<int> beginning = {s.engine->tokenizer().eot()};
    std::vector<std::string> texts;
    std::vector<std::vector<int>> alone;
    Random r(1);
    for (int i = 0; i < 200; i++) {
        std::string text;
        for (int k = 0; k < 200; k++) text += k % 7 ? tokens[257 + r.below(4)] : " ";
        texts.push_back(text), alone.push_back(s.engine->prompt(text, beginning).tokens);
    }
    std::atomic<size_t> wrong{0};
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 4; t++)
        threads.emplace_back([&, t] {
            for (size_t i = 0; i < 20 * texts.size(); i++) {
                const size_t k = (i * (2 * t + 1)) % texts.size();
                wrong += s.engine->prompt(texts[k], beginning).tokens != alone[k];
            }
        });
    for (auto& t : threads) t.join();
    CHECK(wrong == 0);
}

TEST_CASE("an engine that ends finishes its texts in the time it has, and cuts the others") {
    Served s(2, 8);
    const std::string alone = whole(*s.begin(s.request("", 2, 20))).text;
    Babbler::notes.delay_us = 500;
    auto quick = s.begin(s.request("", 2, 20)), slow = s.begin(s.long_request(1)),
         waiting = s.begin(s.long_request(5, 10));
    s.engine->end(demo::Clock::now() + std::chrono::milliseconds(700));
    CHECK_THROWS_AS(s.begin(s.request("", 3)), demo::Ending);
    CHECK(whole(*quick).text == alone);
    CHECK(utf8::count(whole(*waiting).text) == 10);  // it began once the first had ended
    CHECK(whole(*slow).finish_reason == "length");
    s.engine.reset();
}

TEST_CASE("a text ends when its time is over") {
    Served s;
    Babbler::notes.delay_us = 1000;
    demo::Request r = s.long_request(1);
    r.seconds = 1;
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
    auto sent = whole(*s.begin(r));
    CHECK(sent.text == "");
    CHECK(sent.finish_reason == "stop");
}
