// serve_gpt2.cpp - a page where people write with the poet, and OpenAI's interface for completions.
//
//     ./serve_gpt2 out/model.bin        then open http://127.0.0.1:8080
//
// engine.h writes the texts. No part of a request is ever used as a path: page.html, page.css and page.js are
// part of the program. dev/demo/README.md describes the interface. sample_gpt2.cu includes this file for a
// GPU.
#include <dirent.h>
#include <httplib.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <nlohmann/json.hpp>
#include <set>

#include "dev/demo/engine.h"
#include "lib/flags.h"
#include "lib/machine.h"

#define ARAPOET_NO_MAIN
#include "dev/ladder/score_poems.cpp"

#ifdef SAMPLE_ON_GPU
constexpr const char* SERVER_NAME = "serve_gpt2cu";
constexpr Dtype SERVER_DTYPE = gpu::BUILD_DTYPE;  // and the only one
constexpr bool SERVES_ON_GPU = true;
#else
constexpr const char* SERVER_NAME = "serve_gpt2";
constexpr Dtype SERVER_DTYPE = FP32;
constexpr bool SERVES_ON_GPU = false;
void take_gpu(int) {}
#endif

// The page's files, which the assembler puts into the program: it is one file that can be copied.
#define PAGE_FILE(NAME, PATH)                                                  \
    asm(".pushsection .rodata\n" #NAME "_begin:\n.incbin \"" PATH "\"\n" #NAME \
        "_end:\n.byte 0\n.popsection\n");                                      \
    extern "C" const char NAME##_begin[], NAME##_end[];
PAGE_FILE(page_html, "dev/demo/page.html")
PAGE_FILE(page_css, "dev/demo/page.css")
PAGE_FILE(page_js, "dev/demo/page.js")

namespace demo {

// Answers keep the order of their keys, of which there are few. Requests may have many: ordered_json would
// look at all of them for each new one.
using Json = nlohmann::ordered_json;
using RequestJson = nlohmann::json;

// ---------------------------------------------------------------------------------------------
// Errors, and fields of a request

// An answer other than 200, in OpenAI's form.
struct HttpError : std::runtime_error {
    int status;
    std::string field;  // of the request; "": none
    HttpError(int s, const std::string& message, const std::string& f = "")
        : std::runtime_error(message), status(s), field(f) {}
};
inline std::string error_body(int status, const std::string& message, const std::string& field) {
    Json e = {{"message", message},
              {"type", status >= 500   ? "server_error"
                       : status == 429 ? "rate_limit_error"
                                       : "invalid_request_error"},
              {"param", nullptr},
              {"code", nullptr}};
    if (!field.empty()) e["param"] = field;
    return Json{{"error", e}}.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// The fields of a request's object. A field that is missing or null keeps its default.
class Fields {
  public:
    explicit Fields(const std::string& body) {
        if (const size_t bad = utf8::find_invalid(body); bad != utf8::VALID)
            throw HttpError(
                400, strf("the body is not valid UTF-8: byte %zu is 0x%02X", bad, (unsigned char)body[bad]));
        try {
            json_ = RequestJson::parse(body);
        } catch (const RequestJson::parse_error& e) {
            throw HttpError(400, strf("the body is not valid JSON: at byte %zu", e.byte));
        } catch (const RequestJson::out_of_range&) {
            throw HttpError(400, "the body has a number beyond 1.8e308");
        }
        if (!json_.is_object())
            throw HttpError(400, "the body is not a JSON object, wanted {\"prompt\": ...}");
    }
    const RequestJson* find(const char* name) const {
        auto at = json_.find(name);
        return at == json_.end() || at->is_null() ? nullptr : &*at;
    }
    std::string text(const char* name, const std::string& otherwise) const {
        const RequestJson* v = find(name);
        if (v && !v->is_string()) refuse_kind(name, *v, "a string");
        return v ? v->get<std::string>() : otherwise;
    }
    // One that is out of range, not a number, or not whole where it must be, is an HttpError with the field.
    double number(const char* name, double lo, double hi, double otherwise) const {
        const RequestJson* v = find(name);
        if (!v) return otherwise;
        if (!v->is_number()) refuse_kind(name, *v, "a number from " + shown(lo) + " to " + shown(hi));
        const double x = v->get<double>();
        if (!(x >= lo && x <= hi))
            throw HttpError(400,
                            strf("%s: %s is out of range, wanted %s to %s", name, shown(x).c_str(),
                                 shown(lo).c_str(), shown(hi).c_str()),
                            name);
        return x;
    }
    int64_t integer(const char* name, double lo, double hi, int64_t otherwise) const {
        const double x = number(name, lo, hi, (double)otherwise);
        if (x != std::floor(x))
            throw HttpError(400, strf("%s: %s is not a whole number", name, shown(x).c_str()), name);
        return (int64_t)x;
    }
    bool flag(const char* name) const {
        const RequestJson* v = find(name);
        if (v && !v->is_boolean()) refuse_kind(name, *v, "true or false");
        return v && v->get<bool>();
    }
    // A text, or a list of at most `most` texts.
    std::vector<std::string> texts(const char* name, size_t most) const {
        const RequestJson* v = find(name);
        if (!v) return {};
        if (v->is_string()) return {v->get<std::string>()};
        std::vector<std::string> all;
        bool valid = v->is_array() && v->size() <= most;
        if (valid)
            for (const RequestJson& one : *v) valid = valid && one.is_string();
        if (!valid)
            throw HttpError(400, strf("%s: wanted a string or a list of at most %zu", name, most), name);
        for (const RequestJson& one : *v) all.push_back(one.get<std::string>());
        return all;
    }
    // A field of OpenAI's that changes nothing where it has one of these values.
    void refuse(const char* name, std::initializer_list<RequestJson> harmless) const {
        const RequestJson* v = find(name);
        if (v && std::find(harmless.begin(), harmless.end(), *v) == harmless.end())
            throw HttpError(400, strf("%s: is not supported", name), name);
    }

  private:
    // A number in full where it is whole
    static std::string shown(double x) {
        return strf(x == std::floor(x) && std::fabs(x) < 1e17 ? "%.0f" : "%g", x);
    }
    [[noreturn]] static void refuse_kind(const char* name, const RequestJson& found,
                                         const std::string& wanted) {
        throw HttpError(400, strf("%s: is of type %s, wanted %s", name, found.type_name(), wanted.c_str()),
                        name);
    }
    RequestJson json_;
};

// ---------------------------------------------------------------------------------------------
// Models

// The training text in a folder, which texts are compared with.
class Training {
  public:
    explicit Training(std::string folder) : folder_(std::move(folder)) {}
    static bool is_in(const std::string& folder) {
        return file_exists(folder + "/train.bin") && file_exists(folder + "/tokenizer.bin");
    }
    // Its words, read at the first call. Call it from one thread at a time.
    const score::Reference& reference() {
        if (!reference_) {
            const Tokenizer tokenizer = Tokenizer::load(folder_ + "/tokenizer.bin");
            reference_ =
                std::make_unique<score::Reference>(score::decode_tokens(folder_ + "/train.bin", tokenizer));
        }
        return *reference_;
    }

  private:
    const std::string folder_;
    std::unique_ptr<score::Reference> reference_;
};

// One model of the server: its name, the engine that writes with it, and its training text; null where that
// is not there. Models that were trained on the same text share it.
struct Model {
    std::string id;
    std::unique_ptr<Engine> engine;
    std::shared_ptr<Training> training;
};

// A model's name: its folder's, as out/mine/model.bin is "mine"; with a number where there are several.
inline std::string id_of(const std::string& path, const std::vector<std::unique_ptr<Model>>& others) {
    const std::filesystem::path absolute = std::filesystem::absolute(path).lexically_normal();
    std::string folder = absolute.parent_path().filename().string();
    if (folder.empty()) folder = "model";
    auto taken = [&](const std::string& id) {
        return std::any_of(others.begin(), others.end(), [&](auto& m) { return m->id == id; });
    };
    std::string id = folder;
    for (int n = 2; taken(id); n++) id = folder + "-" + std::to_string(n);
    return id;
}

// ---------------------------------------------------------------------------------------------
// Completions

constexpr int MOST_TEXTS = 8, MOST_LOGPROBS = 20, MOST_VERSES = 100, MOST_TOKENS = 16384;
constexpr size_t MOST_MEASURED = 32 << 10;  // bytes

struct Completion {
    Model* model;
    std::vector<Request> requests;  // one for each of `n`
    bool stream;
};

// What the text begins with: end-of-text, and the tags of the field "tags": {"COLUMN": "VALUE"}.
inline std::vector<int> beginning_of(const Fields& f, const Tokenizer& tokenizer) {
    std::vector<int> beginning = tokenizer.beginning("");
    const RequestJson* wanted = f.find("tags");
    if (!wanted) return beginning;
    if (!wanted->is_object()) throw HttpError(400, "tags: wanted an object {\"COLUMN\": \"VALUE\"}", "tags");
    const std::vector<std::string> columns = tokenizer.tag_columns();
    for (auto& [column, value] : wanted->items()) {
        if (!value.is_string()) throw HttpError(400, "tags: wanted strings as values", "tags");
        const size_t at = (size_t)(std::find(columns.begin(), columns.end(), column) - columns.begin());
        if (columns.empty()) throw HttpError(400, "tags: the model knows none", "tags");
        if (at == columns.size())
            throw HttpError(400,
                            strf("tags: %s is not one of the columns, which are %s",
                                 utf8::quote(column).c_str(), Tokenizer::joined(columns).c_str()),
                            "tags");
        const std::string text = value.get<std::string>();
        const int tag = tokenizer.tag(column, text);
        if (tag < 0)
            throw HttpError(
                400,
                strf("tags: %s has no value %s; it has %s", column.c_str(), utf8::quote(text).c_str(),
                     Tokenizer::joined(tokenizer.tag_values(column)).c_str()),
                "tags");
        beginning[1 + at] = tag;
    }
    return beginning;
}

inline Prompt prompt_of(const Fields& f, const Engine& engine) {
    const std::vector<int> beginning = beginning_of(f, engine.tokenizer());
    const std::vector<std::string> prompts = f.texts("prompt", 1);
    try {
        return engine.prompt(prompts.empty() ? "" : prompts[0], beginning);
    } catch (const Error& e) {
        throw HttpError(400, strf("prompt: %s", e.what()), "prompt");
    }
}

inline Completion read_completion(const Fields& f, Model& model, int seconds) {
    Completion c = {&model, {}, f.flag("stream")};
    Request r;
    r.prompt = prompt_of(f, *model.engine);
    r.max_tokens = (int)f.integer("max_tokens", 1, MOST_TOKENS, 256);
    r.sampling.temperature = (float)f.number("temperature", 0, 2, 0.8);
    r.sampling.top_p = (float)f.number("top_p", 1e-6, 1, 1);
    r.sampling.top_k = (int)f.integer("top_k", 0, 1e6, 0);
    r.sampling.repetition_penalty = (float)f.number("repetition_penalty", 0.1, 10, 1);
    r.logprobs = f.find("logprobs") ? (int)f.integer("logprobs", 0, MOST_LOGPROBS, 0) : -1;
    r.wish.verses = (int)f.integer("verses", 0, MOST_VERSES, 0);
    r.stop = f.texts("stop", 4);
    r.stop.erase(std::remove(r.stop.begin(), r.stop.end(), ""), r.stop.end());
    r.seconds = seconds;
    std::random_device random;
    r.seed = f.find("seed") ? (uint64_t)f.integer("seed", 0, 9007199254740992.0, 0) : random();
    f.refuse("best_of", {1}), f.refuse("echo", {false}), f.refuse("suffix", {""});
    f.refuse("presence_penalty", {0}), f.refuse("frequency_penalty", {0}),
        f.refuse("logit_bias", {RequestJson::object()});
    try {
        r.wish.rhyme = model.engine->rhyme(f.text("rhyme", ""));
    } catch (const Error& e) {
        throw HttpError(400, strf("rhyme: %s", e.what()), "rhyme");
    }
    const int64_t n = f.integer("n", 1, MOST_TEXTS, 1), most = (int64_t)model.engine->most();
    if (n > most)
        throw HttpError(
            400, strf("n: %d texts, this server takes at most %d (--slots, --queue)", (int)n, (int)most),
            "n");
    for (; r.index < n; r.index++) c.requests.push_back(r);
    return c;
}

// A token's text; "bytes:\xD9" for one that is a part of a character, as OpenAI writes it.
inline std::string token_text(const Tokenizer& tokenizer, int token) {
    const std::string& bytes = tokenizer.bytes(token);
    if (utf8::find_invalid(bytes) == utf8::VALID) return bytes;
    std::string text = "bytes:";
    for (char c : bytes) text += strf("\\x%02X", (unsigned char)c);
    return text;
}

// Alternatives as OpenAI gives them. `offset` is where the first token begins in the text, in characters; it
// becomes where the next one will.
inline Json logprobs_json(const std::vector<TokenInfo>& tokens, const Tokenizer& tokenizer, size_t& offset) {
    Json texts = Json::array(), own = Json::array(), top = Json::array(), offsets = Json::array();
    for (const TokenInfo& t : tokens) {
        texts.push_back(token_text(tokenizer, t.token)), own.push_back(t.logprob), offsets.push_back(offset);
        offset += utf8::count(tokenizer.bytes(t.token));
        Json likeliest = Json::object();
        for (auto& [token, logprob] : t.likeliest) likeliest[token_text(tokenizer, token)] = logprob;
        top.push_back(std::move(likeliest));
    }
    return {{"tokens", texts}, {"token_logprobs", own}, {"top_logprobs", top}, {"text_offset", offsets}};
}

// An answer, whole or one event of a stream.
class Answer {
  public:
    explicit Answer(const Completion& c) : c_(c) {
        static std::atomic<uint64_t> count{0};
        head_ = {{"id", strf("cmpl-%llu", (unsigned long long)++count)},
                 {"object", "text_completion"},
                 {"created", (int64_t)time(nullptr)},
                 {"model", c.model->id},
                 {"prompt", c.requests[0].prompt.text},
                 {"seed", c.requests[0].seed}};
        offsets_.resize(c.requests.size());
    }
    Json choice(size_t index, const Text& text, const Text::News& news) {
        Json choice = {{"index", index},
                       {"text", news.text},
                       {"logprobs", nullptr},
                       {"finish_reason", nullptr}};
        const Tokenizer& tokenizer = c_.model->engine->tokenizer();
        if (text.request().logprobs >= 0)
            choice["logprobs"] = logprobs_json(news.tokens, tokenizer, offsets_[index]);
        if (!news.ended) return choice;
        choice["finish_reason"] = news.finish_reason, choice["rhyme"] = nullptr;
        if (const verses::Keeper* k = text.keeper(); k && !text.request().wish.rhyme.empty())
            choice["rhyme"] = {{"letters", k->rhyme()},
                               {"redraws", k->redraws()},
                               {"unrhymed", k->unrhymed()}};
        return choice;
    }
    // Only the first of a stream's events has the prompt, which may be much longer than they are.
    std::string body(Json choices, const std::vector<std::shared_ptr<Text>>* ended = nullptr) {
        Json all = head_;
        if (c_.stream) head_.erase("prompt");
        all["choices"] = std::move(choices);
        if (ended) {
            size_t prompt = 0, written = 0;
            for (auto& t : *ended) prompt = t->request().prompt.tokens.size(), written += t->tokens_written();
            all["usage"] = {{"prompt_tokens", prompt},
                            {"completion_tokens", written},
                            {"total_tokens", prompt + written}};
        }
        return all.dump(-1, ' ', false, Json::error_handler_t::replace);
    }

  private:
    const Completion& c_;
    Json head_;
    std::vector<size_t> offsets_;  // of each text, in characters
};

inline void cancel(const std::vector<std::shared_ptr<Text>>& texts) {
    for (auto& t : texts) t->cancel();
}

// A client that hung up hardly reads this, but one that closed only its sending side does: the two cannot be
// told apart before something is sent.
inline HttpError client_gone() { return {400, "the connection was closed before the answer was ready"}; }

// The answer to a request that is no stream, once all texts have ended. An HttpError where the client has
// gone or a model fails.
inline std::string whole_answer(const Completion& c, const std::vector<std::shared_ptr<Text>>& texts,
                                const std::function<bool()>& has_gone) {
    Answer answer(c);
    Json choices = Json::array();
    for (size_t i = 0; i < texts.size(); i++) {
        Text::News all;
        while (!all.ended) {
            Text::News news = texts[i]->next(std::chrono::milliseconds(50), true);
            if (!news.error.empty()) {
                cancel(texts);
                throw HttpError(500, news.error);
            }
            if (!news.ended && has_gone()) {
                cancel(texts);
                throw client_gone();
            }
            all.text += news.text, all.ended = news.ended, all.finish_reason = news.finish_reason;
            all.tokens.insert(all.tokens.end(), news.tokens.begin(), news.tokens.end());
        }
        choices.push_back(answer.choice(i, *texts[i], all));
    }
    return answer.body(std::move(choices), &texts);
}

// Sends what the texts become, until all have ended or the client has gone. Returns whether it still listens.
inline bool send_stream(const Completion& c, const std::vector<std::shared_ptr<Text>>& texts,
                        httplib::DataSink& sink) {
    Answer answer(c);
    std::vector<bool> ended(texts.size());
    size_t left = texts.size();
    bool listens = true;
    auto send = [&](const std::string& s) {
        const std::string event = "data: " + s + "\n\n";
        listens = listens && sink.write(event.data(), event.size());
    };
    while (left && listens)
        for (size_t i = 0; i < texts.size() && listens; i++) {
            if (ended[i]) continue;
            const Text::News news = texts[i]->next(std::chrono::milliseconds(left > 1 ? 5 : 200));
            listens = sink.is_writable();
            left -= news.ended, ended[i] = news.ended;
            if (!news.error.empty()) {
                send(error_body(500, news.error, ""));
                return listens;
            }
            if (news.ended || news.has_something())
                send(answer.body(Json::array({answer.choice(i, *texts[i], news)}), left ? nullptr : &texts));
        }
    if (listens) send("[DONE]");
    return listens;
}

// ---------------------------------------------------------------------------------------------
// The server

// A client's connection. The library tells a handler the client's address and port, but not the socket. So we
// search the program's open files, which Linux lists in /proc/self/fd, for the socket with that peer.
struct Connection {
    int socket = -1;  // -1: not found
    ino_t inode = 0;  // a number that no other open socket has

    // Whether the client has hung up, or closed its sending side; false where that is not known.
    bool has_gone() const {
        pollfd p = {socket, POLLRDHUP, 0};
        return socket >= 0 && poll(&p, 1, 0) == 1;
    }
};
// The connections of all clients, by address and port, separated by a space. None where the files cannot be
// listed. The first call opens the list, which stays open: later, clients may have taken all the files that
// the program can open.
inline std::optional<std::map<std::string, Connection>> connections() {
    static DIR* const files = opendir("/proc/self/fd");
    static std::mutex mutex;
    if (!files) return {};
    std::lock_guard<std::mutex> lock(mutex);
    rewinddir(files);
    std::map<std::string, Connection> all;
    while (const dirent* file = readdir(files)) {
        const int socket = atoi(file->d_name);
        sockaddr_storage peer;
        socklen_t size = sizeof peer;
        struct stat s;
        char host[NI_MAXHOST], port[NI_MAXSERV];
        if (getpeername(socket, (sockaddr*)&peer, &size) == 0 &&
            (peer.ss_family == AF_INET || peer.ss_family == AF_INET6) && fstat(socket, &s) == 0 &&
            getnameinfo((sockaddr*)&peer, size, host, sizeof host, port, sizeof port,
                        NI_NUMERICHOST | NI_NUMERICSERV) == 0)
            all[std::string(host) + " " + port] = {socket, s.st_ino};
    }
    return all;
}
inline Connection connection_of(const httplib::Request& request) {
    const auto all = connections();
    if (!all) return {};
    const auto at = all->find(request.remote_addr + " " + std::to_string(request.remote_port));
    return at == all->end() ? Connection() : at->second;
}

// Closes a connection whose whole request has not arrived PATIENCE (ten seconds) after a thread took it. The
// library limits only the time of each read, so a client that sends a byte now and then, or never ends, could
// keep its thread for ever. Here a connection has only one request.
class Arrivals {
  public:
    static constexpr std::chrono::seconds PATIENCE{10};
    Arrivals() {
        connections();
        thread_ = std::thread([this] { watch(); });
    }
    ~Arrivals() {
        std::unique_lock<std::mutex> lock(mutex_);
        ending_ = true, changed_.notify_all();
        lock.unlock(), thread_.join();
    }
    // The request is whole; its answer may take longer.
    void arrived(const Connection& c) {
        std::lock_guard<std::mutex> lock(mutex_);
        arrived_.insert(c.inode);
    }

  private:
    void watch() {
        std::map<ino_t, Clock::time_point> seen;  // when each connection was first seen with a thread
        std::unique_lock<std::mutex> lock(mutex_);
        while (!changed_.wait_for(lock, std::chrono::seconds(1), [&] { return ending_; })) {
            const auto open = connections();
            if (!open) continue;
            std::map<ino_t, Clock::time_point> now_open;
            std::set<ino_t> now_arrived;
            for (auto& [client, c] : *open) {
                const auto at = seen.find(c.inode);
                now_open[c.inode] = at == seen.end() || waits(c) ? Clock::now() : at->second;
                if (arrived_.count(c.inode)) now_arrived.insert(c.inode);
                else if (Clock::now() - now_open[c.inode] > PATIENCE) cut(c);
            }
            seen = std::move(now_open), arrived_ = std::move(now_arrived);
        }
    }
    // Whether the connection waits for a thread: there are unread bytes, and none have been read.
    static bool waits(const Connection& c) {
        // Linux's tcp_info (linux/tcp.h) is longer than most C libraries': byte 128 begins
        // tcpi_bytes_received.
        uint64_t info[32] = {};
        constexpr size_t RECEIVED = 128 / sizeof(uint64_t);
        socklen_t size = sizeof info;
        int unread = 0;
        if (ioctl(c.socket, FIONREAD, &unread) || getsockopt(c.socket, IPPROTO_TCP, TCP_INFO, info, &size))
            return false;
        return unread > 0 && info[RECEIVED] <= (uint64_t)unread + 1;  // the end of what is sent counts as 1
    }
    // The socket's number may have become another connection's since it was listed.
    static void cut(const Connection& c) {
        struct stat s;
        if (fstat(c.socket, &s) == 0 && s.st_ino == c.inode) shutdown(c.socket, SHUT_RDWR);
    }
    std::mutex mutex_;
    std::condition_variable changed_;
    std::set<ino_t> arrived_;
    bool ending_ = false;
    std::thread thread_;
};

// The most texts that all models together write and let wait, and the most measures that wait
constexpr size_t MOST_AT_ONCE = 1000, MOST_WAITING_MEASURES = 8;

struct Settings {
    std::vector<std::string> models;
    std::string tokenizer, data, host = "127.0.0.1", origin, dtype = SERVER_DTYPE == BF16 ? "bf16" : "fp32";
    int port = 8080, slots = 8, queue = 32, seconds = 300, threads = 0;
};

class Server {
  public:
    explicit Server(const Settings& s) : s_(s) {
        EngineSettings engine;
        engine.slots = (size_t)s.slots, engine.queue = (size_t)s.queue, engine.tokenizer = s.tokenizer;
        engine.dtype = s.dtype == "bf16" ? BF16 : FP32;
        for (const std::string& path : s.models) {
            auto m = std::make_unique<Model>();
            m->id = id_of(path, models_);
            m->engine = std::make_unique<Engine>(path, engine);
            const std::string data = s.data.empty() ? dirname_of(path) + "/data" : s.data;
            if (Training::is_in(data)) m->training = training_in(data);
            else if (!s.data.empty()) fail("%s: has no train.bin and tokenizer.bin", s.data.c_str());
            models_.push_back(std::move(m));
        }
        set_limits();
        set_error_handlers();
        set_routes();
    }
    // Binds the port, says where the page is, and serves until stop_serving().
    void run() {
        // httplib's own choice of options lets a second server have the same port.
        socket_t listener = INVALID_SOCKET;
        http_.set_socket_options([&](socket_t socket) {
            const int yes = 1;
            setsockopt(listener = socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
        });
        if (!http_.bind_to_port(s_.host, s_.port))
            fail("port %d of %s is taken or cannot be had; another one: --port N", s_.port, s_.host.c_str());
        ::listen(listener, 128);  // httplib's choice, 5, makes clients that come together wait a second
        if (!is_loopback())
            fprintf(stderr, "warning: --host %s: everybody who can reach this machine can use the model\n",
                    s_.host.c_str());
        const bool ipv6 = s_.host.find(':') != std::string::npos;
        printf(ipv6 ? "http://[%s]:%d\n" : "http://%s:%d\n", s_.host.c_str(), s_.port);
        fflush(stdout);
        if (!http_.listen_after_bind()) fail("port %d of %s cannot be listened to", s_.port, s_.host.c_str());
    }
    // Takes no more texts; those that are being written have `grace` to end.
    void end_texts(std::chrono::seconds grace) {
        for (auto& m : models_) m->engine->end(Clock::now() + grace);
    }
    // Takes no more connections. False before run() listens: call it until it is true, and then no more.
    bool stop_serving() {
        if (!http_.is_running()) return false;
        http_.stop();
        return true;
    }

  private:
    bool is_loopback() const {
        return s_.host == "localhost" || s_.host == "::1" || s_.host.rfind("127.", 0) == 0;
    }

    std::shared_ptr<Training> training_in(const std::string& folder) {
        std::shared_ptr<Training>& t = trainings_[std::filesystem::canonical(folder)];
        if (!t) t = std::make_shared<Training>(folder);
        return t;
    }
    void set_limits() {
        // A connection has a thread while its request is answered: one for each text that may be written or
        // wait, and 64 for other requests.
        const size_t texts = models_.size() * (size_t)(s_.slots + s_.queue);
        http_.new_task_queue = [=] { return new httplib::ThreadPool(texts + 64); };
        http_.set_payload_max_length(256 << 10);
        http_.set_read_timeout(5), http_.set_write_timeout(5), http_.set_keep_alive_timeout(5);
        // One request per connection, so that idle connections hold no thread, and the unread rest of a
        // refused body is never parsed as a request.
        http_.set_keep_alive_max_count(1);
        http_.set_tcp_nodelay(true);
        httplib::Headers headers = {{"Content-Security-Policy", "default-src 'self'"},
                                    {"X-Content-Type-Options", "nosniff"},
                                    {"Cache-Control", "no-store"}};
        if (!s_.origin.empty()) {
            headers.insert({"Access-Control-Allow-Origin", s_.origin});
            headers.insert({"Access-Control-Allow-Headers", "Content-Type, Authorization"});
        }
        http_.set_default_headers(headers);
    }
    void set_error_handlers() {
        http_.set_pre_routing_handler([this](const httplib::Request& request, httplib::Response& response) {
            try {
                forget_ranges(request);
                check_headers(request);
                if (!has_body(request)) arrivals_.arrived(connection_of(request));
                return httplib::Server::HandlerResponse::Unhandled;
            } catch (const HttpError& error) {
                answer_error(response, error);
                return httplib::Server::HandlerResponse::Handled;
            }
        });
        http_.set_error_handler([](const httplib::Request& request, httplib::Response& response) {
            forget_ranges(request);
            if (!response.body.empty()) return;
            // The library reads forms itself, with limits of its own.
            const std::string type = request.get_header_value("Content-Type");
            const int status = response.status;
            if ((status == 400 || status == 413) &&
                (type.rfind("application/x-www-form-urlencoded", 0) == 0 || type.rfind("multipart/", 0) == 0))
                return answer_error(response, wrong_type(type));
            answer_error(
                response,
                HttpError(status, status == 413   ? "the body is longer than 256 KiB"
                                  : status == 404 ? strf("there is no %s %s", request.method.c_str(),
                                                         request.path.c_str())
                                                  : strf("the request cannot be understood (%d)", status)));
        });
        http_.set_exception_handler(
            [](const httplib::Request&, httplib::Response& response, std::exception_ptr e) {
                try {
                    std::rethrow_exception(e);
                } catch (const HttpError& error) {
                    answer_error(response, error);
                } catch (const Ending& ending) {
                    answer_error(response, HttpError(503, ending.what()));
                } catch (const Busy& busy) {
                    response.set_header("Retry-After", "2");
                    answer_error(response, HttpError(429, busy.what()));
                } catch (const std::exception& error) {
                    answer_error(response, HttpError(500, error.what()));
                }
            });
    }
    void set_routes() {
        page("/", page_html_begin, page_html_end, "text/html; charset=utf-8");
        page("/page.css", page_css_begin, page_css_end, "text/css; charset=utf-8");
        page("/page.js", page_js_begin, page_js_end, "text/javascript; charset=utf-8");
        http_.Get("/health", [](const httplib::Request&, httplib::Response& response) {
            response.set_content(R"({"status":"ok"})", "application/json");
        });
        http_.Get("/v1/models", [this](const httplib::Request&, httplib::Response& response) {
            answer(response, models());
        });
        http_.Get("/favicon.ico",
                  [](const httplib::Request&, httplib::Response& response) { response.status = 204; });
        http_.Options(".*",
                      [](const httplib::Request&, httplib::Response& response) { response.status = 204; });
        post_route("/v1/completions", [this](const Fields& f, const Connection& client,
                                             httplib::Response& response) { complete(f, client, response); });
        post_route("/v1/measures",
                   [this](const Fields& f, const Connection& client, httplib::Response& response) {
                       answer(response, measures(f, client));
                   });
    }
    // A server may ignore the header Range. The library would send as many parts as it asks for, and each may
    // be the whole page.
    static void forget_ranges(const httplib::Request& request) {
        const_cast<httplib::Request&>(request).ranges.clear();
    }
    static HttpError wrong_type(const std::string& type) {
        return {415, strf("Content-Type is '%s', wanted application/json", type.c_str())};
    }
    static bool has_body(const httplib::Request& request) {
        return request.method != "GET" && request.method != "HEAD" && request.method != "OPTIONS";
    }
    // Refuses a request before its body is read.
    void check_headers(const httplib::Request& request) const {
        // Against DNS rebinding: another site can let its own host name resolve to 127.0.0.1, and its page
        // would then count as ours.
        std::string host = request.get_header_value("Host");
        const size_t colon = host.rfind(':');
        if (colon != host.npos && host.find(']', colon) == host.npos) host.resize(colon);
        const bool here = host == "localhost" || host == "127.0.0.1" || host == "[::1]" || host == s_.host;
        if (is_loopback() && !here && !host.empty())
            throw HttpError(403, "wanted 127.0.0.1 or localhost as the Host");
        // The library limits only bodies that have a Content-Length and are not compressed.
        if (has_body(request) && !request.has_header("Content-Length"))
            throw HttpError(411, "wanted a Content-Length");
        if (request.has_header("Transfer-Encoding")) throw HttpError(411, "wanted a Content-Length");
        if (request.has_header("Content-Encoding"))
            throw HttpError(415, "wanted a body that is not compressed");
    }
    static void answer(httplib::Response& response, const Json& json) {
        response.set_content(json.dump(-1, ' ', false, Json::error_handler_t::replace), "application/json");
    }
    static void answer_error(httplib::Response& response, const HttpError& e) {
        response.status = e.status;
        response.set_content(error_body(e.status, e.what(), e.field), "application/json");
    }
    void page(const char* path, const char* begin, const char* end, const char* type) {
        http_.Get(path, [=](const httplib::Request&, httplib::Response& response) {
            response.set_content(begin, (size_t)(end - begin), type);
        });
    }
    template <class F>
    void post_route(const char* path, F handler) {
        http_.Post(path, [=](const httplib::Request& request, httplib::Response& response) {
            const std::string type = request.get_header_value("Content-Type");
            if (type.substr(0, type.find_first_of("; ")) != "application/json") throw wrong_type(type);
            const Connection client = connection_of(request);
            arrivals_.arrived(client);
            handler(Fields(request.body), client, response);
        });
        http_.Get(path,
                  [](const httplib::Request&, httplib::Response&) { throw HttpError(405, "wanted POST"); });
    }

    Json models() const {
        Json list = Json::array();
        for (auto& m : models_) {
            Json tags = Json::object();
            const Tokenizer& tokenizer = m->engine->tokenizer();
            for (const std::string& column : tokenizer.tag_columns())
                tags[column] = tokenizer.tag_values(column);
            list.push_back({{"id", m->id},
                            {"object", "model"},
                            {"created", started_},
                            {"owned_by", "arapoet"},
                            {"context", m->engine->config().maxT},
                            {"parameters", num_params(m->engine->config())},
                            {"tags", tags},
                            {"measures", m->training != nullptr}});
        }
        return {{"object", "list"}, {"data", list}};
    }
    Model& model_of(const Fields& f) {
        const std::string id = f.text("model", models_[0]->id);
        for (auto& m : models_)
            if (m->id == id) return *m;
        std::string known;
        for (auto& m : models_) known += (known.empty() ? "" : ", ") + m->id;
        throw HttpError(404, strf("model: '%s' is unknown; there are: %s", id.c_str(), known.c_str()),
                        "model");
    }
    void complete(const Fields& f, const Connection& client, httplib::Response& response) {
        auto c = std::make_shared<Completion>(read_completion(f, model_of(f), s_.seconds));
        auto texts = c->model->engine->write(c->requests);
        if (!c->stream)
            return response.set_content(whole_answer(*c, texts, [&] { return client.has_gone(); }),
                                        "application/json");
        response.set_chunked_content_provider(
            "text/event-stream",
            [c, texts](size_t, httplib::DataSink& sink) {
                const bool listens = send_stream(*c, texts, sink);
                if (listens) sink.done();
                return listens;
            },
            [texts](bool) { cancel(texts); });
    }
    Json measures(const Fields& f, const Connection& client) {
        Model& m = model_of(f);
        if (!m.training)
            throw HttpError(
                400,
                strf("model: '%s' has no training text to compare with, wanted data/ beside it or --data",
                     m.id.c_str()),
                "model");
        const std::string text = f.text("text", "");
        if (text.size() > MOST_MEASURED)
            throw HttpError(400, strf("text: is %zu bytes, wanted at most %zu", text.size(), MOST_MEASURED),
                            "text");
        // One at a time: a text is compared with all of the training text.
        struct Place {
            std::atomic<size_t>& taken;
            const size_t others = taken++;
            ~Place() { taken--; }
        } const place{measures_};
        if (place.others > MOST_WAITING_MEASURES)
            throw Busy(strf("measures: one is being made, and %zu wait", MOST_WAITING_MEASURES));
        std::unique_lock<std::timed_mutex> lock(measuring_, std::defer_lock);
        while (!lock.try_lock_for(std::chrono::milliseconds(200)))
            if (client.has_gone()) throw client_gone();
        const score::Scores s = score::measure({text}, m.training->reference());
        auto share = [](double x) { return x == x ? Json(x) : Json(nullptr); };
        return {{"verses", s.verses},
                {"rhyme_kept", share(s.rhyme)},
                {"words", s.words},
                {"words_known", share(s.known)},
                {"longest_run", s.longest_run},
                {"longest_run_text", s.longest_text}};
    }

    const Settings s_;
    const int64_t started_ = (int64_t)time(nullptr);
    std::map<std::string, std::shared_ptr<Training>> trainings_;  // by folder
    std::vector<std::unique_ptr<Model>> models_;
    std::atomic<size_t> measures_{0};  // that are made or wait
    std::timed_mutex measuring_;
    Arrivals arrivals_;
    httplib::Server http_;
};

// Blocks SIGTERM and SIGINT in all threads. The returned function waits for one of them.
inline std::function<void()> signals_to_wait_for() {
    auto set = std::make_shared<sigset_t>();
    sigemptyset(set.get()), sigaddset(set.get(), SIGTERM), sigaddset(set.get(), SIGINT);
    pthread_sigmask(SIG_BLOCK, set.get(), nullptr);
    return [set] {
        int which;
        sigwait(set.get(), &which);
    };
}

inline int serve_main(int argc, char** argv) {
    Settings s;
    Flags f(SERVER_NAME, "serves a page where people write with the poet, and OpenAI's completions");
    f.positional(&s.models, "model.bin [more models]");
    f.add("port", "", &s.port, "N", "where it listens").range(1, 65535);
    f.add("host", "", &s.host, "ADDRESS",
          "address to listen on; 127.0.0.1 is reached from this machine only");
    f.add("slots", "", &s.slots, "N", "texts that each model writes at once").range(1, (double)MOST_AT_ONCE);
    f.add("queue", "", &s.queue, "N", "texts that wait for a model; more are refused (429)")
        .range(0, (double)MOST_AT_ONCE);
    f.add("seconds", "", &s.seconds, "N", "the longest that a text may take").range(1, 86400);
    f.add("tokenizer", "", &s.tokenizer, "FILE", "the models' tokenizer; by default the one beside each");
    f.add("data", "", &s.data, "DIR",
          "the training text, for the measures under a poem; by default data/ beside each model");
    f.add("origin", "", &s.origin, "ORIGIN",
          "allow pages of this origin to use the server (CORS), e.g. http://example.org");
    if (!SERVES_ON_GPU)
        f.add("dtype", "", &s.dtype, "NAME", "how weights are kept and multiplied").choices({"fp32", "bf16"});
    f.add("threads", "", &s.threads, "N", "threads; 0: all cores").range(0, 4096);
    f.epilogue(strf("Example:\n  ./%s out/model.bin out/mine/model.bin --port 9000\n", SERVER_NAME));
    f.parse(argc, argv);
    if (s.models.empty())
        throw UsageError(strf("no model is given: ./%s out/model.bin; see --help", SERVER_NAME));
    if (const size_t texts = s.models.size() * (size_t)(s.slots + s.queue); texts > MOST_AT_ONCE)
        throw UsageError(
            strf("%zu models x (--slots %d + --queue %d) = %zu texts, each with a thread; wanted at most %zu",
                 s.models.size(), s.slots, s.queue, texts, MOST_AT_ONCE));
    if (s.threads) machine::set_threads(s.threads);
    machine::allow_open_files(MOST_AT_ONCE + 256);
    signal(SIGPIPE, SIG_IGN);
    const auto wait_for_signal = signals_to_wait_for();  // before there are other threads, which inherit it
    take_gpu(-1);
    std::atomic<Server*> serving{nullptr};
    std::atomic<bool> ended{false};
    std::thread stopper([&] {
        wait_for_signal();
        if (ended) return;
        if (!serving) _exit(0);  // models are being loaded
        serving.load()->end_texts(std::chrono::seconds(10));
        bool stopped = false;
        for (int tenths = 0; !ended; tenths++) {
            if (tenths == 120) _exit(0);  // a client may send its request without end, a byte at a time
            if (!stopped) stopped = serving.load()->stop_serving();
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
        }
    });
    std::exception_ptr error;
    std::unique_ptr<Server> server;
    try {
        server = std::make_unique<Server>(s);
        serving = server.get();
        server->run();
    } catch (...) {
        error = std::current_exception();
    }
    ended = true;
    kill(getpid(), SIGTERM);  // ends the stopper
    stopper.join();
    if (error) std::rethrow_exception(error);
    return 0;
}

}  // namespace demo

#ifndef SERVE_NO_MAIN
int main(int argc, char** argv) {
    machine::spin_less(argv);
    machine::flush_subnormals();
    return run_main(SERVER_NAME, [&] { return demo::serve_main(argc, argv); });
}
#endif
