// engine.h - a model that writes for many at once: requests share the sequences of one decoder.
//
//     Engine engine("out/model.bin", settings);
//     auto texts = engine.write({request});           // throws Busy where too many wait
//     while (!news.ended) news = texts[0]->next();    // waits for what is new
//
// One thread runs the model. Between two tokens a new text takes a free sequence, and one that has ended, or
// that nobody waits for any more, leaves its own. Texts that lack the same number of tokens, one each or
// prompts of one length, go through the model together. On the CPU the decoder computes each sequence
// independently of the others, so a text has the same bits whatever else is written.
#pragma once

#include <omp.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "data/prompt.h"
#include "data/verses.h"
#include "lib/sampler.h"

namespace demo {

using Clock = std::chrono::steady_clock;

// Too many texts wait already.
struct Busy : Error {
    using Error::Error;
};
// The program is ending.
struct Ending : Error {
    using Error::Error;
};

// A mutex that is granted in the order of the calls to lock().
class FairMutex {
  public:
    void lock() {
        std::unique_lock<std::mutex> lock(mutex_);
        const size_t ticket = next_++;
        changed_.wait(lock, [&] { return ticket == served_; });
    }
    void unlock() {
        std::lock_guard<std::mutex> lock(mutex_);
        served_++;
        changed_.notify_all();
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    size_t next_ = 0, served_ = 0;
};

// Ends the calling thread's team of OpenMP threads; its next parallel region starts a new one. Each thread
// that computes has a team of its own, and those of an idle team still count: with more of them than
// processors, libgomp puts waiting threads to sleep instead of letting them spin, and waking one often takes
// longer than the work of a parallel region. (Two models that write at the same time still have two teams.)
inline void end_team() { omp_pause_resource_all(omp_pause_soft); }

// A token that was written, and the likeliest in its place, with log probabilities: of the softmax of all
// tokens but tags, before temperature and penalties.
struct TokenInfo {
    int token = 0;
    float logprob = 0;
    std::vector<std::pair<int, float>> likeliest;
};

// What one text is to be like.
struct Request {
    Prompt prompt;
    int max_tokens = 256;
    int logprobs = -1;  // alternatives reported with each token; -1: nothing
    uint64_t seed = 0;
    uint32_t index = 0;  // of several texts with one seed
    SampleOptions sampling;
    verses::Wish wish;
    std::vector<std::string> stop;  // the text ends before any of these
    int seconds = 300;              // and after so long
};

// A text that is being written. The engine's thread adds to it, another one reads.
class Text {
  public:
    struct News {
        std::string text;  // whole characters
        std::vector<TokenInfo> tokens;
        bool ended = false;
        std::string finish_reason;  // once it has ended: "stop", "length", or "error"
        std::string error;
        bool has_something() const { return !text.empty() || !tokens.empty(); }
    };

    Text(const Tokenizer& tokenizer, Request r, int V) : request_(std::move(r)), tokenizer_(tokenizer) {
        const Prompt& p = request_.prompt;
        if (request_.wish.verses || !request_.wish.rhyme.empty())
            keeper_.emplace(tokenizer, request_.wish, p.tokens, 1 + p.tag_count);
        request_.sampling.below = tokenizer.first_tag(), request_.sampling.prefix = p.tags();
        continuation_.emplace(p.tokens, V, tokenizer.eot(), request_.max_tokens,
                              rng::Key(request_.seed, request_.index, rng::SAMPLE), request_.sampling,
                              keeper_ ? &*keeper_ : nullptr);
    }
    // Waits for something new, or only for the end, for at most a while, and returns what is new. Whoever
    // waits for the end is not woken at each token, which would take a core from the model.
    News next(std::chrono::milliseconds longest = std::chrono::hours(1), bool only_end = false) {
        std::unique_lock<std::mutex> lock(mutex_);
        only_end_ = only_end;
        changed_.wait_for(lock, longest, [&] { return news_.ended || (!only_end && news_.has_something()); });
        return std::exchange(news_, News());
    }
    // Nobody waits for it any more.
    void cancel() { cancelled_ = true; }

    const Request& request() const { return request_; }
    // How the wish for a rhyme was kept; null without one. Complete once the text has ended.
    const verses::Keeper* keeper() const { return keeper_ ? &*keeper_ : nullptr; }
    // How many tokens were reported, with logprobs or without. Valid only once the text has ended.
    size_t tokens_written() const { return written_; }

  private:
    friend class Engine;

    // Draws the next token from the logits (V), and reports what has settled.
    void go_on(const float* logits, int V, Sampler& sampler) {
        Continuation& c = *continuation_;
        const size_t before = c.text().size(), prompt = request_.prompt.tokens.size();
        c.draw(logits, sampler);
        if (request_.logprobs >= 0) {
            if (c.text().size() > before) infos_.push_back(info(logits, V, c.text().back()));
            else infos_.resize(c.text().size() - prompt);
        }
        std::string bytes;
        c.take_settled([&](int token) {
            held_tokens_.push_back({settled_bytes_, request_.logprobs >= 0 ? infos_[settled_] : TokenInfo()});
            bytes += tokenizer_.bytes(token);
            settled_++, settled_bytes_ += tokenizer_.bytes(token).size();
        });
        held_ += stream_.feed(bytes);
        report_settled();
    }
    // Reports the text that is held, but for what may be the beginning of a stop text, and its tokens.
    void report_settled() {
        size_t end = std::string::npos, longest = 1;
        for (const std::string& s : request_.stop)
            end = std::min(end, held_.find(s)), longest = std::max(longest, s.size());
        const bool stopped = end != std::string::npos, late = Clock::now() >= deadline_;
        News fresh;
        fresh.ended = stopped || late || continuation_->ended();
        fresh.finish_reason = stopped || continuation_->ended_by_itself() ? "stop" : "length";
        if (stopped) held_.resize(end);
        size_t n = fresh.ended ? held_.size() : held_.size() - std::min(held_.size(), longest - 1);
        while (n < held_.size() && n > 0 && utf8::is_continuation(held_[n])) n--;
        fresh.text = held_.substr(0, n), held_.erase(0, n), reported_bytes_ += n;
        while (!held_tokens_.empty() &&
               (held_tokens_[0].first < reported_bytes_ || (fresh.ended && !stopped)))
            report_token(fresh);
        report(std::move(fresh));
    }
    void report_token(News& news) {
        if (request_.logprobs >= 0) news.tokens.push_back(std::move(held_tokens_[0].second));
        held_tokens_.pop_front(), written_++;
    }
    void report(News fresh) {
        std::lock_guard<std::mutex> lock(mutex_);
        news_.text += fresh.text;
        for (TokenInfo& t : fresh.tokens) news_.tokens.push_back(std::move(t));
        if (fresh.ended)
            news_.ended = ended_ = true, news_.finish_reason = fresh.finish_reason, news_.error = fresh.error;
        if (fresh.ended || !only_end_) changed_.notify_all();
    }
    // Ends the text from outside.
    void finish(const char* reason, const std::string& error = "") {
        News last;
        last.ended = true, last.finish_reason = reason, last.text = std::move(held_), last.error = error;
        while (!held_tokens_.empty()) report_token(last);
        report(std::move(last));
    }
    TokenInfo info(const float* logits, int V, int token) const {
        TokenInfo t;
        V = std::min(V, request_.sampling.below);
        const float max = *std::max_element(logits, logits + V);
        double sum = 0;
        for (int v = 0; v < V; v++) sum += std::exp((double)logits[v] - max);
        auto logprob = [&](int v) { return (float)(logits[v] - max - std::log(sum)); };
        std::vector<int> order((size_t)V);
        std::iota(order.begin(), order.end(), 0);
        const size_t n = std::min((size_t)request_.logprobs, order.size());
        std::partial_sort(order.begin(), order.begin() + (ptrdiff_t)n, order.end(), [&](int a, int b) {
            return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
        });
        t.token = token, t.logprob = logprob(token);
        for (size_t i = 0; i < n; i++) t.likeliest.push_back({order[i], logprob(order[i])});
        return t;
    }

    Request request_;
    const Tokenizer& tokenizer_;
    std::optional<verses::Keeper> keeper_;
    std::optional<Continuation> continuation_;
    std::vector<TokenInfo> infos_;  // of all its new tokens, settled or not
    size_t settled_ = 0;            // how many of them have settled
    size_t settled_bytes_ = 0, reported_bytes_ = 0;
    std::deque<std::pair<size_t, TokenInfo>> held_tokens_;  // not yet reported; where each begins, in bytes
    size_t written_ = 0;                                    // tokens reported
    Utf8Stream stream_;
    std::string held_;
    Clock::time_point deadline_ = Clock::time_point::max();
    std::atomic<bool> cancelled_{false}, ended_{false};
    std::mutex mutex_;  // of news_ and only_end_
    std::condition_variable changed_;
    News news_;
    bool only_end_ = false;  // whether next() waits for the end only
};

struct EngineSettings {
    size_t slots = 8, queue = 32;  // texts written at once, texts that wait
    Dtype dtype = FP32;
    std::string tokenizer;  // its file; "": beside the model
};

class Engine {
  public:
    const std::string model_path, tokenizer_path;

    // Loads the model and its tokenizer, and starts the engine's thread. An Error names the file that is
    // wrong.
    Engine(const std::string& path, const EngineSettings& s)
        : model_path(path),
          tokenizer_path(s.tokenizer.empty() ? tokenizer_beside(path) : s.tokenizer),
          settings_(s),
          texts_(s.slots),
          samplers_(s.slots),
          missing_(s.slots) {
        ModelReader reader(path);
        config_ = reader.cfg;
        tokenizer_ = tokenizer_for(path, config_.V, tokenizer_path);
        recipe_ = recipe_for(tokenizer_path);
        decoder_ = open_decoder(reader, s.slots, s.dtype);
        end_team();
        thread_ = std::thread([this] { run(); });
    }
    ~Engine() {
        end(Clock::now());
        thread_.join();
    }

    const Config& config() const { return config_; }
    const Tokenizer& tokenizer() const { return tokenizer_; }
    // The most texts that can be in progress or waiting.
    size_t most() const { return settings_.slots + settings_.queue; }
    // The prompt for a text, after `beginning` (Tokenizer::beginning()); an Error as make_prompt()'s.
    Prompt prompt(const std::string& text, const std::vector<int>& beginning) const {
        std::lock_guard<std::mutex> lock(encoding_);
        return make_prompt(tokenizer_, recipe_, text, beginning);
    }

    // A wished rhyme in letters that the model knows; an Error as rhyme_for()'s.
    std::string rhyme(const std::string& wish) const { return verses::rhyme_for(wish, tokenizer_, recipe_); }

    // Begins one text for each request, all or none: otherwise throws Busy or Ending.
    std::vector<std::shared_ptr<Text>> write(const std::vector<Request>& requests) {
        std::vector<std::shared_ptr<Text>> texts;
        for (const Request& r : requests) texts.push_back(std::make_shared<Text>(tokenizer_, r, config_.V));
        std::lock_guard<std::mutex> lock(mutex_);
        if (ending_) throw Ending("the server is ending");
        size_t free = 0;
        // The sequence of a text that has ended is freed before the next token, but a client that has read
        // the end may ask again sooner.
        for (auto& t : texts_) free += !t || t->ended_;
        const size_t room = settings_.queue + free - std::min(settings_.queue + free, waiting_.size());
        if (texts.size() > room)
            throw Busy(
                strf("texts: %zu are asked for, there is room for %zu more: %zu are being written, %zu wait",
                     texts.size(), room, settings_.slots - free, waiting_.size()));
        for (auto& t : texts) waiting_.push_back(t);
        changed_.notify_all();
        return texts;
    }
    // Takes no more texts, and ends those that are not complete by then. Of several calls the earliest
    // counts.
    void end(Clock::time_point by) {
        std::lock_guard<std::mutex> lock(mutex_);
        ending_ = true, end_by_ = std::min(end_by_, by);
        changed_.notify_all();
    }

  private:
    void run() {
        omp_set_num_threads(threads_);  // the setting is a thread's own
        std::vector<size_t> at_work;
        while (take_texts(at_work)) {
            std::string error;
            try {
                step(at_work);
            } catch (const std::exception& e) {
                error = e.what();
            }
            for (size_t s : at_work)
                if (!error.empty() && !texts_[s]->ended_) texts_[s]->finish("error", error);
        }
    }
    // Frees the sequences of texts that have ended, gives free ones to those that wait, and sets at_work to
    // the sequences in use. Waits where there are none; false when the engine has ended.
    bool take_texts(std::vector<size_t>& at_work) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            const bool late = ending_ && Clock::now() >= end_by_;
            for (auto& t : waiting_)
                if (late || t->cancelled_) t->finish("length");
            waiting_.erase(
                std::remove_if(waiting_.begin(), waiting_.end(), [](auto& t) -> bool { return t->ended_; }),
                waiting_.end());
            at_work.clear();
            for (size_t s = 0; s < texts_.size(); s++) {
                std::shared_ptr<Text>& t = texts_[s];
                if (t && (late || t->cancelled_) && !t->ended_) t->finish("length");
                if (t && t->ended_) t.reset();
                while (!t && !waiting_.empty()) {
                    t = waiting_.front(), waiting_.pop_front();
                    t->deadline_ = Clock::now() + std::chrono::seconds(t->request_.seconds);
                    if (t->continuation_->ended()) t->finish("stop"), t.reset();  // the prompt is complete
                }
                if (t) at_work.push_back(s);
            }
            if (!at_work.empty()) return true;
            if (ending_) return false;
            end_team();
            changed_.wait(lock);
        }
    }
    // One token for each text.
    void step(const std::vector<size_t>& at_work) {
        // Only one engine works at a time, because each uses all cores; they take turns.
        static FairMutex processor;
        std::lock_guard<FairMutex> lock(processor);
        left_ = at_work;
        for (size_t s : at_work) texts_[s]->continuation_->prepare(*decoder_, s, missing_[s]);
        append_in_groups(
            *decoder_, left_, missing_, group_, tokens_, [&](const auto& group, const float* logits) {
                for_each_index(group.size(), group.size() > 1 && config_.V > 1000, [&](size_t k) {
                    const float* own = logits + k * (size_t)config_.V;
                    texts_[group[k]]->go_on(own, config_.V, samplers_[group[k]]);
                });
            });
    }

    const EngineSettings settings_;
    const int threads_ = omp_get_max_threads();
    Config config_;
    Tokenizer tokenizer_;
    mutable std::mutex encoding_;   // encode() writes the tokenizer's cache
    std::optional<Recipe> recipe_;  // how prompts are cleaned; read once
    std::unique_ptr<Decoder> decoder_;
    // The engine thread's:
    std::vector<std::shared_ptr<Text>> texts_;  // in each sequence of the decoder; written under mutex_
    std::vector<Sampler> samplers_;
    std::vector<std::vector<int>> missing_;  // what step() appends to each sequence, and its scratch:
    std::vector<size_t> left_, group_;
    std::vector<int> tokens_;

    std::mutex mutex_;  // of what follows
    std::condition_variable changed_;
    std::deque<std::shared_ptr<Text>> waiting_;
    bool ending_ = false;
    Clock::time_point end_by_ = Clock::time_point::max();
    std::thread thread_;
};

}  // namespace demo
