// Feeds mutated bodies of POST /v1/completions to the server under libFuzzer, AddressSanitizer and UBSan:
//
//     make fuzz-request FUZZ_SECONDS=600
//
// A body is either refused by an HttpError of one line, or answered. A model with pseudo-random logits writes
// the texts, and the answer must be valid JSON in UTF-8. Anything else is a bug. The first byte of an input
// chooses the model's tokenizer, and whether the model fails: then the answer is an error.
#define SERVE_NO_MAIN
#include "dev/demo/serve_gpt2.cpp"

#include "dev/demo/babbler.h"
#include "dev/fuzz.h"

#include <cstring>

namespace {

using demo::Json;
using fuzz::require;

// A server's model, for characters or for bytes that are parts of characters.
struct Served : fuzz::Folder {
    demo::Model model;
    explicit Served(const Tokenizer& t) {
        Babbler::save(dir, t);
        demo::EngineSettings s;
        s.slots = 4, s.queue = 32;
        model.id = "babbler", model.engine = std::make_unique<demo::Engine>(dir + "/model.bin", s);
    }
};
demo::Model& served(bool bytes) {
    static Served characters([] {
        std::string letters = "\t\n ";
        for (uint32_t c = 0x621; c <= 0x64A; c++) utf8::append(letters, c);
        return Tokenizer::characters(letters,
                                     {"<|poem_meter=\u0637\u0648\u064A\u0644|>", "<|poem_meter=other|>"});
    }()),
        parts([] {
            std::vector<std::string> tokens;
            for (int b = 0; b < 256; b++) tokens.push_back(std::string(1, (char)b));
            tokens.push_back("\u0628\u0627"), tokens.push_back("<|endoftext|>");
            return Tokenizer::byte_bpe(tokens, 257, false, "fuzz");
        }());
    return (bytes ? parts : characters).model;
}

// Writes a completion, and reads the answer as a client does. fails: the model will.
void answer(const demo::Completion& c, bool fails) {
    const auto texts = c.model->engine->write(c.requests);
    std::string body;
    httplib::DataSink sink;
    sink.write = [&](const char* data, size_t n) { return body.append(data, n), true; };
    sink.is_writable = [] { return true; };
    if (c.stream) require(demo::send_stream(c, texts, sink));
    else body = demo::whole_answer(c, texts, [] { return false; });
    require(utf8::find_invalid(body) == utf8::VALID);
    size_t choices = 0, at = 0;
    bool done = !c.stream;
    while (at < body.size()) {
        const size_t end = c.stream ? body.find("\n\n", at) : body.size();
        require(end != body.npos);
        std::string event = body.substr(at, end - at);
        at = end + (c.stream ? 2 : 0);
        if (c.stream) require(event.compare(0, 6, "data: ") == 0), event.erase(0, 6);
        if (event == "[DONE]") {
            done = true;
            break;
        }
        const Json json = Json::parse(event);
        if (json.contains("error")) return require(fails && at == body.size());
        for (const Json& choice : json.at("choices")) {
            choices += !choice.at("finish_reason").is_null();
            require(choice.at("finish_reason") != "error");
        }
    }
    require(choices == texts.size() && done && at == body.size());
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    return fuzz::mutate(data, size, max_size, seed, 16, [](int mode) -> std::string {
        switch (mode / 2 % 4) {
            case 0:
                return R"({"prompt": "قفا نبك", "max_tokens": 30, "temperature": 0.5, "seed": 1})";
            case 1:
                return R"({"prompt": ["ا\tب"], "n": 3, "stream": true, "logprobs": 5, "stop": ["ب", "\n"],
                           "max_tokens": 20, "top_p": 0.9, "top_k": 9, "repetition_penalty": 1.2})";
            case 2:
                return R"({"verses": 3, "rhyme": "ب", "tags": {"poem_meter": "طويل"}, "max_tokens": 40})";
            default:
                return R"({"rhyme": "auto", "verses": 2, "echo": false, "best_of": 1, "logit_bias": {}})";
        }
    });
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 1) return 0;
    demo::Model& model = served(data[0] & 1);
    const bool fails = data[0] & 8;
    try {
        demo::Completion c =
            demo::read_completion(demo::Fields(std::string((const char*)data + 1, size - 1)), model, 5);
        for (demo::Request& r : c.requests) r.max_tokens = std::min(r.max_tokens, 60);
        Babbler::notes.fails = fails;
        answer(c, fails);
    } catch (const demo::HttpError& e) {
        require((e.status == 400 || (fails && e.status == 500)) && !strchr(e.what(), '\n'));
        require(Json::parse(demo::error_body(e.status, e.what(), e.field)).contains("error"));
    }
    Babbler::notes.fails = false;  // a prompt that has all the verses needs no model
    return 0;
}
