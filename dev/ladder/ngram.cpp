// ngram.cpp - an n-gram model of a token file, and its loss on other token files: the baseline for trained
// models.
//
//     make ngram && ./ngram --data out/data                  a 5-gram of train.bin, on val.bin
//     ./ngram --data out/data --order 3 poet.bin             a 3-gram, on another file of the same tokens
//
// With Witten-Bell smoothing (Witten and Bell 1991, interpolated): after a context h of n - 1 tokens that was
// seen N times in the training file, followed by D different tokens,
//     P(t | h) = (count(h t) + D P(t | h without its first token)) / (N + D)
// Where no context is left, 1/V takes the place of the shorter context's probability. A context that was
// never seen has N = D = 0 and leaves the whole probability to the shorter one.
//
// Losses are in nats, of every token but the first, as the trainer's validation counts them: poems follow
// each other, with the end-of-text token between them. Tags (./prepare_data --tags) are not predicted, but
// count as contexts and as followers of other tokens.
#include <cmath>
#include <unordered_map>

#include "data/dataloader.h"
#include "lib/flags.h"
#include "tokenizer/tokenizer.h"

namespace ngram {

// Counts of all sequences of 1 to `order` tokens of a file. A sequence is a number: its tokens, each in as
// many bits as the largest token of the vocabulary needs.
class Model {
  public:
    // Throws UsageError where a sequence does not fit 64 bits.
    Model(const TokenFile& file, int V, int order) : V_(V), order_((size_t)order), nexts_((size_t)order) {
        while ((V - 1) >> bits_) bits_++;
        if (bits_ * order_ > 64)
            throw UsageError(
                strf("--order %d: %d tokens of a vocabulary of %d take %zu bits, wanted at most 64", order,
                     order, V, bits_ * order_));
        counts_.resize(order_ + 1);
        for (size_t n = 1; n <= order_; n++)
            for (size_t i = 0; i + n <= file.size(); i++) counts_[n][sequence(file, i, n)]++;
        // Of each context: how often it was followed by a token, and by how many different ones.
        for (size_t n = 1; n <= order_; n++)
            for (auto [tokens, count] : counts_[n]) {
                Next& next = nexts_[n - 1][tokens >> bits_];
                next.times += count, next.different++;
            }
    }
    // The probability of token i of a file, given up to order - 1 tokens before it.
    double probability(const TokenFile& file, size_t i) const {
        double p = 1.0 / V_;
        for (size_t context = 0; context < order_ && context <= i; context++) {
            const uint64_t tokens = sequence(file, i - context, context + 1);
            const auto next = nexts_[context].find(tokens >> bits_);
            if (next == nexts_[context].end()) break;  // longer contexts were not seen either
            const auto count = counts_[context + 1].find(tokens);
            const double seen = count == counts_[context + 1].end() ? 0 : (double)count->second,
                         different = (double)next->second.different;
            p = (seen + different * p) / ((double)next->second.times + different);
        }
        return p;
    }

  private:
    struct Next {
        uint64_t times = 0, different = 0;
    };
    // The n tokens from the i-th on.
    uint64_t sequence(const TokenFile& file, size_t i, size_t n) const {
        uint64_t tokens = 0;
        for (size_t k = 0; k < n; k++) tokens = tokens << bits_ | file[i + k];
        return tokens;
    }

    const int V_;
    const size_t order_;
    size_t bits_ = 1;
    std::vector<std::unordered_map<uint64_t, uint32_t>> counts_;  // by the number of tokens
    std::vector<std::unordered_map<uint64_t, Next>> nexts_;       // by the length of the context
};

struct Loss {
    double nats = 0;  // sum
    size_t tokens = 0, characters = 0;
};
inline Loss loss_on(const Model& model, const TokenFile& file, const Tokenizer* tokenizer) {
    Loss loss;
    for (size_t i = 1; i < file.size(); i++) {
        if (tokenizer && file[i] >= tokenizer->first_tag()) continue;
        loss.nats -= std::log(model.probability(file, i)), loss.tokens++;
        if (tokenizer) loss.characters += (size_t)tokenizer->chars(file[i]);
    }
    return loss;
}

struct Options {
    std::string data = "out/data";
    int order = 5;
    std::vector<std::string> files;
};

inline int ngram_main(int argc, char** argv) {
    Options o;
    Flags f("ngram", "measures how well an n-gram model of the training tokens predicts other tokens");
    f.add("data", "", &o.data, "DIR", "folder made by ./prepare_data: train.bin, val.bin, tokenizer.bin");
    f.add("order", "", &o.order, "N", "tokens of an n-gram, the predicted one among them").range(1, 16);
    f.positional(&o.files, "[token files; without: val.bin of --data]");
    f.parse(argc, argv);
    finish_data_set(o.data);
    if (!file_exists(o.data + "/train.bin")) fail_without_data(o.data, "train.bin", "ngram");
    if (o.files.empty()) o.files = {o.data + "/val.bin"};
    const Tokenizer tokenizer = Tokenizer::load(o.data + "/tokenizer.bin");
    const TokenFile train(o.data + "/train.bin");
    train.check_vocab(tokenizer.vocab_size());
    const Model model(train, tokenizer.vocab_size(), o.order);
    for (const std::string& path : o.files) {
        const TokenFile file(path);
        file.check_vocab(tokenizer.vocab_size());
        if (file.size() < 2) fail("%s: has 1 token, wanted at least 2", path.c_str());
        const Loss loss = loss_on(model, file, &tokenizer);
        printf("%s: %d-gram, loss %.4f nats per token", path.c_str(), o.order,
               loss.nats / (double)std::max<size_t>(loss.tokens, 1));
        if (loss.characters && loss.characters != loss.tokens)
            printf(", %.4f per character", loss.nats / (double)loss.characters);
        printf(" (%zu tokens)\n", loss.tokens);
    }
    return 0;
}

}  // namespace ngram

#ifndef ARAPOET_NO_MAIN
int main(int argc, char** argv) {
    return run_main("ngram", [&] { return ngram::ngram_main(argc, argv); });
}
#endif
