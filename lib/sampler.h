// sampler.h - from logits to text: choosing tokens, and continuing texts with the decoder of any model.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
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
    std::vector<int>
        keep;  // put before what remains of a text that has become longer than the context: its tags
};

class Sampler {
  public:
    // Allocates memory for a vocabulary of V, so that pick() need not.
    explicit Sampler(int V = 0) : candidates_((size_t)V) {}

    // Draws a token from softmax(logits / temperature), logits (V), restricted to the top_k, then to the
    // top_p most likely tokens: the one whose part of the cumulative distribution contains u, in [0,1).
    // seen (V): whether the text has the token, for the repetition penalty; may be null without one.
    int pick(const float* logits, int V, const SampleOptions& o, double u, const char* seen = nullptr) {
        if (o.below > 0) V = std::min(V, o.below);
        if (o.repetition_penalty != 1 && seen) {
            penalized_.assign(logits, logits + V);
            for (int v = 0; v < V; v++)
                if (float& x = penalized_[(size_t)v]; seen[v])
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

// A model that continues N sequences at once, and keeps what it needs to remember of their tokens.
struct Decoder {
    virtual ~Decoder() = default;
    virtual size_t length() const = 0;    // tokens of each sequence seen so far
    virtual size_t capacity() const = 0;  // the most it can hold
    virtual void reset() = 0;             // forgets all tokens
    // Appends n tokens to each sequence, tokens (N,n); returns the logits (N,V) that follow the last one,
    // valid until the next call. length() + n is at most capacity().
    virtual const float* append(const int* tokens, size_t n) = 0;
};

// A decoder for N sequences, as long as the model's context, with the parameters of `file`, which it reads to
// the end. dtype is the type that weights are kept in and multiplied as. Fails if memory is short.
// train_gpt2.cpp defines it.
std::unique_ptr<Decoder> open_decoder(ModelReader& file, size_t N, Dtype dtype);

// Continues the prompt in all N sequences of the decoder by up to max_tokens tokens each. Sequence s draws
// its i-th token with rng::Key(seed, s, SAMPLE).uniform(i), and ends when it draws end-of-text (eot; -1:
// never). emit(s, token) is called with every other new token. When the context is full, the text continues
// with the second half of it as its context. V: vocabulary.
template <class Emit>
void generate(Decoder& decoder, size_t N, const std::vector<int>& prompt, int V, int eot, int max_tokens,
              uint64_t seed, const SampleOptions& o, Emit emit) {
    if (prompt.empty() || prompt.size() > decoder.capacity())
        fail("the prompt has %zu tokens, the context takes 1 to %zu", prompt.size(), decoder.capacity());
    std::vector<std::vector<int>> text(N, prompt);
    std::vector<bool> ended(N, false);
    std::vector<int> next;
    size_t alive = N,
           shown = 0;  // shown: tokens of each text that the decoder has seen, forgotten ones included
    // Samplers work in parallel, each on a part of the texts.
    std::vector<Sampler> samplers(std::min<size_t>(N, 16), Sampler(V));
    std::vector<int> picked(N, eot);
    std::vector<std::vector<char>> seen(N);
    if (o.repetition_penalty != 1)
        for (auto& s : seen) {
            s.resize((size_t)V);
            for (int t : prompt) s[(size_t)t] = 1;
        }
    decoder.reset();
    for (int i = 0; i < max_tokens && alive; i++) {
        size_t length = text[0].size(), n = length - shown, kept = 0;  // kept: of o.keep
        if (decoder.length() + n > decoder.capacity()) {
            decoder.reset();
            n = std::max<size_t>(decoder.capacity() / 2, 1);
            kept = o.keep.size() < n ? o.keep.size() : 0;
        }
        next.clear();
        for (auto& t : text) {
            next.insert(next.end(), o.keep.begin(), o.keep.begin() + (ptrdiff_t)kept);
            next.insert(next.end(), t.end() - (ptrdiff_t)(n - kept), t.end());
        }
        const float* logits = decoder.append(next.data(), n);
        shown = length;
#pragma omp parallel for schedule(static)
        for (size_t part = 0; part < samplers.size(); part++)
            for (size_t s = N * part / samplers.size(); s < N * (part + 1) / samplers.size(); s++)
                if (!ended[s])
                    picked[s] =
                        samplers[part].pick(logits + s * (size_t)V, V, o,
                                            rng::Key(seed, (uint32_t)s, rng::SAMPLE).uniform((uint64_t)i),
                                            seen[s].empty() ? nullptr : seen[s].data());
        for (size_t s = 0; s < N; s++) {
            text[s].push_back(picked[s]);
            if (!seen[s].empty()) seen[s][(size_t)picked[s]] = 1;
            if (ended[s]) continue;
            if (picked[s] == eot) ended[s] = true, alive--;
            else emit(s, picked[s]);
        }
    }
}
