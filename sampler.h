// sampler.h - from logits to text: choosing a token, and writing poems with any model's decoder.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "rng.h"
#include "tokenizer/tokenizer.h"

struct SampleOptions {
    float temperature = 0.8f;  // logits are divided by it; 0 takes the most likely token
    int top_k = 0;             // only the k most likely tokens; 0: all
    float top_p = 1.0f;        // only the most likely tokens that together reach this probability (Holtzman et al. 2020)
};

class Sampler {
  public:
    // Draws from softmax(logits / temperature) cut to top_k, then to top_p, by u, uniform in [0,1). logits (V).
    int pick(const float* logits, int V, const SampleOptions& o, double u) {
        if (o.temperature <= 0) return (int)(std::max_element(logits, logits + V) - logits);
        candidates_.resize((size_t)V);
        for (int v = 0; v < V; v++) candidates_[(size_t)v] = {logits[v], v};
        size_t n = o.top_k > 0 ? std::min((size_t)o.top_k, (size_t)V) : (size_t)V;
        auto more_likely = [](const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.token < b.token; };
        if (n < (size_t)V || o.top_p < 1)  // without a cut the order does not matter
            std::partial_sort(candidates_.begin(), candidates_.begin() + (ptrdiff_t)n, candidates_.end(), more_likely);
        double sum = 0, max = *std::max_element(logits, logits + V);
        weights_.resize(n);
        for (size_t i = 0; i < n; i++) sum += weights_[i] = std::exp((candidates_[i].logit - max) / o.temperature);
        if (o.top_p < 1) {
            double reached = 0, wanted = o.top_p * sum;
            size_t k = 0;
            while (k < n && reached < wanted) reached += weights_[k++];
            n = std::max<size_t>(k, 1), sum = std::max(reached, weights_[0]);
        }
        double at = u * sum;
        for (size_t i = 0; i + 1 < n; i++)
            if ((at -= weights_[i]) < 0) return candidates_[i].token;
        return candidates_[n - 1].token;
    }

  private:
    struct Candidate {
        float logit;
        int token;
    };
    std::vector<Candidate> candidates_;
    std::vector<double> weights_;
};

// Holds back the bytes of a character that is not yet whole.
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

// Continues the prompt in all N sequences of the decoder by up to max_tokens tokens each. Sequence s draws its
// i-th token by rng::Key(seed, s, SAMPLE).uniform(i) and ends at end-of-text; emit(s, token) sees every new
// token but that one. A full context goes on with its second half.
template <class Decoder, class Emit>
void generate(Decoder& decoder, size_t N, const std::vector<int>& prompt, int V, int eot, int max_tokens, uint64_t seed,
              const SampleOptions& o, Emit emit) {
    if (prompt.empty() || prompt.size() > decoder.capacity())
        fail("the prompt has %zu tokens, the context takes 1 to %zu", prompt.size(), decoder.capacity());
    std::vector<std::vector<int>> text(N, prompt);
    std::vector<bool> ended(N, false);
    std::vector<int> next;
    size_t alive = N, shown = 0;  // `shown`: tokens of each text that the decoder holds or has forgotten
    Sampler sampler;
    decoder.reset();
    for (int i = 0; i < max_tokens && alive; i++) {
        size_t length = text[0].size(), n = length - shown;
        if (decoder.length() + n > decoder.capacity()) {
            decoder.reset();
            n = std::max<size_t>(decoder.capacity() / 2, 1);
        }
        next.clear();
        for (auto& t : text) next.insert(next.end(), t.end() - (ptrdiff_t)n, t.end());
        const float* logits = decoder.append(next.data(), n);
        shown = length;
        for (size_t s = 0; s < N; s++) {
            int token = ended[s] ? eot : sampler.pick(logits + s * (size_t)V, V, o, rng::Key(seed, (uint32_t)s, rng::SAMPLE).uniform((uint64_t)i));
            text[s].push_back(token);
            if (ended[s]) continue;
            if (token == eot) ended[s] = true, alive--;
            else emit(s, token);
        }
    }
}
