// sampler.h - from logits to text: choosing tokens, and continuing texts with the decoder of any model.
#pragma once

#include <algorithm>
#include <cmath>
#include <exception>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "lib/gpt2.h"
#include "lib/rng.h"
#include "lib/utf8.h"

struct SampleOptions {
    float temperature = 0.8f;  // logits are divided by it; 0: always the most likely token
    int top_k = 0;             // only the k most likely tokens; 0: all
    // Only the most likely tokens that together reach this probability (Holtzman et al. 2020).
    float top_p = 1.0f;
    // Above 1, tokens that the text already has become less likely: their logits are divided by it where they
    // are positive, else multiplied (Keskar et al. 2019).
    float repetition_penalty = 1.0f;
    int below = 0;  // only tokens below this one; 0: all. Tags are the last tokens, and are not written.
    std::vector<int> prefix;  // put before the rest of a text that no longer fits into the context: its tags
};

class Sampler {
  public:
    // Allocates memory for a vocabulary of V, so that pick() need not, unless it applies a repetition
    // penalty.
    explicit Sampler(int V = 0) : candidates_((size_t)V) {}

    // Draws a token from softmax(logits / temperature), logits (V), restricted to the top_k, then to the
    // top_p most likely tokens: the one whose part of the cumulative distribution contains u, in [0,1).
    // times (V): how often the text has each token, for the repetition penalty; may be null without one.
    int pick(const float* logits, int V, const SampleOptions& o, double u, const int* times = nullptr) {
        if (o.below > 0) V = std::min(V, o.below);
        if (o.repetition_penalty != 1 && times) {
            penalized_.assign(logits, logits + V);
            for (int v = 0; v < V; v++)
                if (float& x = penalized_[(size_t)v]; times[v])
                    x = x > 0 ? x / o.repetition_penalty : x * o.repetition_penalty;
            logits = penalized_.data();
        }
        if (o.temperature <= 0) return (int)(std::max_element(logits, logits + V) - logits);
        size_t n = (size_t)V;
        double max = *std::max_element(logits, logits + V);
        candidates_.resize(n);
        for (size_t v = 0; v < n; v++) candidates_[v] = {logits[v], (int)v, 0};
        auto at = [&](size_t i) { return candidates_.begin() + (ptrdiff_t)i; };
        // Partial sort: candidates [from, to) become the most likely of those from `from` on, in order.
        auto sort = [&](size_t from, size_t to) {
            auto more_likely = [](const Candidate& a, const Candidate& b) {
                return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
            };
            if (to < candidates_.size()) std::partial_sort(at(from), at(to), candidates_.end(), more_likely);
            else std::sort(at(from), at(to), more_likely);
        };
        size_t sorted = 0;
        if (o.top_k > 0 && (size_t)o.top_k < n) sort(0, n = sorted = (size_t)o.top_k);
        double sum = 0;
        for (size_t i = 0; i < n; i++)
            sum += candidates_[i].weight = std::exp((candidates_[i].logit - max) / o.temperature);
        if (o.top_p < 1) {  // a few tokens usually reach it, so only as many are sorted as are needed
            double reached = 0, wanted = o.top_p * sum;
            size_t k = 0;
            for (; k < n && (!k || reached < wanted); reached += candidates_[k++].weight)
                if (k == sorted) sort(k, sorted = k < n / 64 ? 8 * k + 64 : n);
            n = k, sum = reached;
        }
        double left = u * sum;
        for (size_t i = 0; i + 1 < n; i++)
            if ((left -= candidates_[i].weight) < 0) return candidates_[i].token;
        return candidates_[n - 1].token;
    }

  private:
    struct Candidate {
        float logit;
        int token;
        double weight;
    };
    std::vector<Candidate> candidates_;
    std::vector<float> penalized_;
};

// A character may be divided among tokens: feed() returns bytes only once their characters are complete.
class Utf8Stream {
  public:
    std::string feed(const std::string& bytes) {
        pending_ += bytes;
        size_t n = utf8::printable_prefix(pending_);
        std::string out = pending_.substr(0, n);
        pending_.erase(0, n);
        return out;
    }

  private:
    std::string pending_;
};

// A model that continues several sequences, and keeps what it needs to remember of their tokens.
struct Decoder {
    virtual ~Decoder() = default;
    virtual size_t sequences() const = 0;                // how many it holds
    virtual size_t capacity() const = 0;                 // the most tokens of one
    virtual size_t length(size_t s = 0) const = 0;       // tokens that sequence s has
    virtual void truncate(size_t s, size_t length) = 0;  // forgets its tokens from number `length` on
    // Appends n tokens to each of the sequences `which`, tokens (which.size(), n); returns the logits
    // (which.size(), V) that follow their last ones, valid until the next call. `which` names no sequence
    // twice; length() + n is at most capacity() for each.
    virtual const float* append(const std::vector<size_t>& which, const int* tokens, size_t n) = 0;

    void reset() {
        for (size_t s = 0; s < sequences(); s++) truncate(s, 0);
    }
    // The same for all sequences.
    const float* append_to_all(const int* tokens, size_t n) {
        std::vector<size_t> all(sequences());
        std::iota(all.begin(), all.end(), size_t(0));
        return append(all, tokens, n);
    }
};

// A decoder for N sequences, as long as the model's context, with the parameters of `file`, which it reads to
// the end. dtype is the type that weights are kept in and multiplied as. Fails if memory is short.
// train_gpt2.cpp defines it.
std::unique_ptr<Decoder> open_decoder(ModelReader& file, size_t N, Dtype dtype);

// Watches over a text while it is written.
struct Steering {
    virtual ~Steering() = default;
    // Whether the text is complete, so that nothing is drawn.
    virtual bool finished() const { return false; }
    // Called before each draw. Changes the logits (V) from which the token after the text is drawn, e.g. to
    // -INFINITY for a token that must not be.
    virtual void adjust(const std::vector<int>& text, float* logits) = 0;
    // Called after each draw. `ended`: end-of-text was drawn, which is not in the text. Returns the length to
    // cut the text to; what is cut off is drawn again. May also end the text, or take its end back.
    virtual size_t judge(const std::vector<int>& text, bool& ended) = 0;
    // How many of the text's `length` tokens can no longer be taken back. Only these are given to the reader.
    virtual size_t settled(size_t length) const = 0;
};

// A text that a decoder's sequence continues, one token after the other:
//
//     while (!text.ended()) {
//         text.prepare(decoder, s, tokens);                       // what the decoder has not seen yet
//         text.draw(decoder.append({s}, tokens.data(), tokens.size()), sampler);
//         text.take_settled([](int token) { ... });
//     }
//
// Its i-th draw uses key.uniform(i). It ends when it draws end-of-text (eot; -1: never), after max_tokens new
// tokens, or when its steering ends it. When the context is full, it goes on with the second half of it as
// its context, after o.prefix.
class Continuation {
  public:
    Continuation(std::vector<int> prompt, int V, int eot, int max_tokens, rng::Key key,
                 const SampleOptions& o, Steering* steering = nullptr)
        : text_(std::move(prompt)),
          V_(V),
          eot_(eot),
          most_(text_.size() + (size_t)max_tokens),
          taken_(text_.size()),
          key_(key),
          o_(o),
          steering_(steering) {
        by_itself_ = steering && steering->finished();
        ended_ = by_itself_ || max_tokens <= 0;
        if (o.repetition_penalty == 1) return;
        times_.resize((size_t)V);
        for (int t : text_) times_[(size_t)t]++;
    }
    bool ended() const { return ended_; }
    bool ended_by_itself() const { return by_itself_; }  // not by max_tokens
    const std::vector<int>& text() const { return text_; }

    // Sets `tokens` to those that sequence s of the decoder must be given before the next draw. Makes room
    // for them in the sequence, and makes it forget what has been taken back.
    void prepare(Decoder& decoder, size_t s, std::vector<int>& tokens) {
        tokens.clear();
        if (seen_ == 0) decoder.truncate(s, 0);
        if (seen_ >= text_.size()) {  // tokens, or an end, were taken back: the last token is given once more
            const size_t back = seen_ - (text_.size() - 1), held = decoder.length(s);
            const bool whole = held == seen_;  // nothing of the text has been left out
            if (!whole && held + 1 < back + half(decoder)) return start_anew(decoder, s, tokens);
            decoder.truncate(s, held - back);
            seen_ = text_.size() - 1;
        }
        if (decoder.length(s) + text_.size() - seen_ > decoder.capacity())
            return start_anew(decoder, s, tokens);
        tokens.assign(text_.begin() + (ptrdiff_t)seen_, text_.end());
        seen_ = text_.size();
    }
    // Draws the next token from the logits (V) that follow the text.
    void draw(const float* logits, Sampler& sampler) {
        if (steering_) {
            adjusted_.assign(logits, logits + V_);
            steering_->adjust(text_, adjusted_.data());
            logits = adjusted_.data();
        }
        const int token =
            sampler.pick(logits, V_, o_, key_.uniform(draws_++), times_.empty() ? nullptr : times_.data());
        if (token == eot_) ended_ = by_itself_ = true;
        else text_.push_back(token);
        if (token != eot_ && !times_.empty()) times_[(size_t)token]++;
        if (steering_) {
            const size_t stays = steering_->judge(text_, ended_);
            by_itself_ = ended_;
            if (stays < text_.size()) take_back(stays);
        }
        if (text_.size() >= most_) ended_ = true;
    }
    // Calls f(token) for each new token that has settled since the last call.
    template <class F>
    void take_settled(F f) {
        const size_t settled = steering_ && !ended_ ? steering_->settled(text_.size()) : text_.size();
        for (; taken_ < settled; taken_++) f(text_[taken_]);
    }

  private:
    void take_back(size_t stays) {
        if (!times_.empty())
            for (size_t i = stays; i < text_.size(); i++) times_[(size_t)text_[i]]--;
        text_.resize(stays);
    }
    // How many tokens a full context is cut to. The model sees at least so many, prefix included, or the
    // whole text.
    static size_t half(const Decoder& decoder) { return std::max<size_t>(decoder.capacity() / 2, 1); }
    // Gives the decoder the prefix and the text's end, half its capacity in all.
    void start_anew(Decoder& decoder, size_t s, std::vector<int>& tokens) {
        decoder.truncate(s, 0);
        const size_t most = half(decoder);
        // Where all of the text fits, it begins with the prefix itself.
        const size_t prefix = o_.prefix.size() < most && text_.size() > most ? o_.prefix.size() : 0;
        const size_t of_text = std::min(most - prefix, text_.size());
        tokens.assign(o_.prefix.begin(), o_.prefix.begin() + (ptrdiff_t)prefix);
        tokens.insert(tokens.end(), text_.end() - (ptrdiff_t)of_text, text_.end());
        seen_ = text_.size();
    }

    std::vector<int> text_;  // with the prompt
    const int V_, eot_;
    const size_t most_;  // tokens of the text
    size_t taken_;       // tokens given to take_settled()'s f, and the prompt's
    size_t seen_ = 0;    // how many tokens of the text the decoder has been given, forgotten ones included
    uint64_t draws_ = 0;
    const rng::Key key_;
    const SampleOptions o_;
    Steering* const steering_;
    std::vector<int> times_;       // how often the text has each token, if that matters
    std::vector<float> adjusted_;  // logits
    bool ended_ = false, by_itself_ = false;
};

// Appends missing[s], at least one token, to each of the sequences `left`. Those that lack the same number of
// tokens go through the model together. Then calls f(group, logits) for each such group, with the logits
// (group.size(), V) as append() returns them. `left` is emptied; `group` and `tokens` are scratch memory, the
// caller's so that it is allocated once.
template <class F>
void append_in_groups(Decoder& decoder, std::vector<size_t>& left,
                      const std::vector<std::vector<int>>& missing, std::vector<size_t>& group,
                      std::vector<int>& tokens, F f) {
    while (!left.empty()) {
        const size_t n = missing[left[0]].size();
        group.clear(), tokens.clear();
        for (size_t s : left)
            if (missing[s].size() == n)
                group.push_back(s), tokens.insert(tokens.end(), missing[s].begin(), missing[s].end());
        left.erase(std::remove_if(left.begin(), left.end(), [&](size_t s) { return missing[s].size() == n; }),
                   left.end());
        f(group, decoder.append(group, tokens.data(), n));
    }
}

// Calls f(k) for each k below n, in parallel or one after the other. If calls throw, one of these exceptions
// is thrown when all have returned.
template <class F>
void for_each_index(size_t n, bool parallel, F f) {
    std::exception_ptr failed;  // none may leave the parallel loop
#pragma omp parallel for schedule(dynamic, 1) if (parallel)
    for (size_t k = 0; k < n; k++) try {
            f(k);
        } catch (...) {
#pragma omp critical
            failed = std::current_exception();
        }
    if (failed) std::rethrow_exception(failed);
}

// Continues all texts, text i in sequence i of the decoder, to their ends. emit(i, token) is called with
// every new token that has settled.
template <class Emit>
void continue_texts(Decoder& decoder, std::vector<Continuation>& texts, int V, Emit emit) {
    const size_t N = texts.size();
    // Samplers work in parallel, each on a part of the texts.
    std::vector<Sampler> samplers(std::min<size_t>(N, 16), Sampler(V));
    std::vector<std::vector<int>> missing(N);
    std::vector<size_t> left, group;
    std::vector<int> tokens;
    for (;;) {
        left.clear();
        for (size_t i = 0; i < N; i++)
            if (!texts[i].ended()) left.push_back(i), texts[i].prepare(decoder, i, missing[i]);
        if (left.empty()) return;
        append_in_groups(decoder, left, missing, group, tokens, [&](const auto& which, const float* logits) {
            const size_t parts = samplers.size(), m = which.size();
            for_each_index(parts, true, [&](size_t part) {
                for (size_t k = m * part / parts; k < m * (part + 1) / parts; k++)
                    texts[which[k]].draw(logits + k * (size_t)V, samplers[part]);
            });
            for (size_t i : which) texts[i].take_settled([&](int token) { emit(i, token); });
        });
    }
}

// Continues the prompt in the first N sequences of the decoder by up to max_tokens tokens each; text s draws
// with rng::Key(seed, s, SAMPLE). V: vocabulary. steering: null, or one for each text.
template <class Emit>
void generate(Decoder& decoder, size_t N, const std::vector<int>& prompt, int V, int eot, int max_tokens,
              uint64_t seed, const SampleOptions& o, Emit emit, const std::vector<Steering*>& steering = {}) {
    if (prompt.empty() || prompt.size() > decoder.capacity())
        fail("the prompt has %zu tokens, the context takes 1 to %zu", prompt.size(), decoder.capacity());
    std::vector<Continuation> texts;
    texts.reserve(N);
    for (size_t s = 0; s < N; s++)
        texts.emplace_back(prompt, V, eot, max_tokens, rng::Key(seed, (uint32_t)s, rng::SAMPLE), o,
                           steering.empty() ? nullptr : steering[s]);
    continue_texts(decoder, texts, V, emit);
}
