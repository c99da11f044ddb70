// babbler.h - a model for tests of the engine: a decoder whose logits depend only on a sequence's own tokens,
// and that notes what it is asked. It defines open_decoder().
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "lib/gpt2.h"
#include "lib/rng.h"
#include "lib/sampler.h"
#include "tokenizer/tokenizer.h"

struct Babbler : Decoder {
    struct Notes {
        std::atomic<bool> fails{false};         // the next append() does
        std::atomic<size_t> calls{0}, most{0};  // of append(), and the most sequences of one call
        std::atomic<int> delay_us{0};           // of each append()
    };
    static Notes notes;
    static constexpr int CONTEXT = 64;

    Babbler(size_t N, size_t V) : held_(N), V_(V) {}
    size_t sequences() const override { return held_.size(); }
    size_t capacity() const override { return CONTEXT; }
    size_t length(size_t s) const override { return held_[s].size(); }
    void truncate(size_t s, size_t n) override { held_[s].resize(std::min(n, held_[s].size())); }
    const float* append(const std::vector<size_t>& which, const int* tokens, size_t n) override {
        if (notes.delay_us) std::this_thread::sleep_for(std::chrono::microseconds(notes.delay_us));
        if (notes.fails.exchange(false)) fail("the babbler is out of breath");
        notes.calls++, notes.most = std::max<size_t>(notes.most, which.size());
        logits_.clear();
        for (size_t k = 0; k < which.size(); k++) {
            auto& h = held_[which[k]];
            h.insert(h.end(), tokens + k * n, tokens + (k + 1) * n);
            if (h.size() > capacity()) fail("%zu tokens, the context takes %zu", h.size(), capacity());
            const rng::Key key((uint64_t)h.back() * 100 + h.size(), 0, rng::SAMPLE);
            for (size_t v = 0; v < V_; v++) logits_.push_back((float)(key.u32(v) % 1000) / 300);
            logits_.back() -= 3;  // a tokenizer of characters has end-of-text there
        }
        return logits_.data();
    }

    // Writes a model and its tokenizer into a folder.
    static void save(const std::string& folder, const Tokenizer& tokenizer) {
        tokenizer.save(folder + "/tokenizer.bin");
        Config c;
        c.maxT = CONTEXT, c.V = c.Vp = tokenizer.vocab_size(), c.L = c.NH = 1, c.C = 8;
        ModelWriter w(folder + "/model.bin", c);
        const std::vector<float> zeros(num_params(c));
        w.add(zeros.data(), zeros.size());
        w.finish();
    }

  private:
    std::vector<std::vector<int>> held_;
    size_t V_;
    std::vector<float> logits_;
};

inline Babbler::Notes Babbler::notes;

std::unique_ptr<Decoder> open_decoder(ModelReader& file, size_t N, Dtype) {
    return std::make_unique<Babbler>(N, (size_t)file.cfg.V);
}
