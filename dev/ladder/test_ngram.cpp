// test_ngram.cpp - compares the n-gram model with its formulas, counted anew for each token.
#include <doctest/doctest.h>

#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#include "dev/ladder/ngram.cpp"

#include "dev/test_util.h"

using namespace test;

namespace {

using Text = std::vector<uint16_t>;

// P(next | context) by Witten-Bell's formulas, recursively.
double by_definition(const Text& text, Text context, uint16_t next, int V) {
    size_t times = 0, hits = 0;
    std::vector<bool> followed((size_t)V);
    for (size_t i = context.size(); i < text.size(); i++)
        if (std::equal(context.begin(), context.end(), text.begin() + (long)(i - context.size())))
            times++, hits += text[i] == next, followed[text[i]] = true;
    const auto different = (double)std::count(followed.begin(), followed.end(), true);
    const double shorter =
        context.empty() ? 1.0 / V : by_definition(text, Text(context.begin() + 1, context.end()), next, V);
    return times ? ((double)hits + different * shorter) / ((double)times + different) : shorter;
}

std::string ngram_error(std::vector<std::string> words) {
    words.insert(words.begin(), "ngram");
    std::vector<char*> argv;
    for (std::string& w : words) argv.push_back(&w[0]);
    return error_of([&] { ngram::ngram_main((int)argv.size(), argv.data()); });
}

}  // namespace

TEST_CASE("n-gram probabilities are Witten-Bell's, for contexts that were seen or not, and add up to 1") {
    TempDir d;
    constexpr int V = 5;
    Random r(1);
    Text train, other;
    for (int t : r.tokens(60, V - 1)) train.push_back((uint16_t)t);  // one token never occurs
    for (int t : r.tokens(40, V)) other.push_back((uint16_t)t);
    write_tokens(d / "train.bin", train), write_tokens(d / "other.bin", other);
    const TokenFile file(d / "train.bin"), test_file(d / "other.bin");
    for (int order : {1, 2, 3, 5}) {
        CAPTURE(order);
        const ngram::Model model(file, V, order);
        double nats = 0;
        for (size_t i = 0; i < other.size(); i++) {
            const size_t n = std::min(i, (size_t)order - 1);
            const Text context(other.begin() + (long)(i - n), other.begin() + (long)i);
            const double want = by_definition(train, context, other[i], V);
            CHECK(model.probability(test_file, i) == doctest::Approx(want).epsilon(1e-12));
            if (i) nats -= std::log(want);
            double sum = 0;
            for (uint16_t t = 0; t < V; t++) {
                Text with = other;
                with[i] = t;
                write_tokens(d / "with.bin", with);
                sum += model.probability(TokenFile(d / "with.bin"), i);
            }
            CHECK(sum == doctest::Approx(1).epsilon(1e-12));
        }
        const ngram::Loss loss = ngram::loss_on(model, test_file, nullptr);
        CHECK(loss.tokens == other.size() - 1);
        CHECK(loss.nats == doctest::Approx(nats).epsilon(1e-12));
    }
}

TEST_CASE("ngram: tags are contexts and not predicted; errors are one line") {
    TempDir d;
    const Tokenizer tokenizer = Tokenizer::characters("abc", {"<|poet=x|>", "<|poet=other|>"});
    tokenizer.save(d / "tokenizer.bin");
    const auto tag = (uint16_t)tokenizer.first_tag(), eot = (uint16_t)tokenizer.eot();
    const Text text = {eot, tag, 0, 1, 2, eot, (uint16_t)(tag + 1), 2, 2};
    write_tokens(d / "train.bin", text), write_tokens(d / "val.bin", text);
    const TokenFile file(d / "train.bin");
    const ngram::Model model(file, tokenizer.vocab_size(), 2);
    CHECK(ngram::loss_on(model, file, &tokenizer).tokens == 6);
    CHECK(ngram_error({"--data", d.path}) == "");
    CHECK(contains(ngram_error({"--data", d / "none"}), (d / "none") + "/train.bin: not found"));
    CHECK(contains(ngram_error({"--data", d.path, d / "x.bin"}), (d / "x.bin")));
    write_tokens(d / "bad.bin", {0, 999});
    CHECK(contains(ngram_error({"--data", d.path, d / "bad.bin"}), "token 999 at position 1"));
    write_tokens(d / "one.bin", {0});
    CHECK(contains(ngram_error({"--data", d.path, d / "one.bin"}), "has 1 token, wanted at least 2"));
    CHECK(contains(error_of([&] { ngram::Model(file, 50257, 5); }), "--order 5: 5 tokens of a vocabulary"));
    CHECK(error_of([&] { ngram::Model(file, 256, 8); }) == "");
    CHECK(contains(error_of([&] { ngram::Model(file, 257, 8); }), "take 72 bits, wanted at most 64"));
    CHECK(contains(ngram_error({"--order", "0", "--data", d.path}), "--order"));
}
