// Feeds mutated files and texts to the tokenizer under libFuzzer, AddressSanitizer and UBSan:
//
//     clang++ -std=c++17 -g -O1 -I. -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all
//         -o fuzz_tokenizer tokenizer/fuzz_tokenizer.cpp
//     ./fuzz_tokenizer -max_total_time=60 -max_len=8192
//
// The first byte of an input chooses what the rest is: a tokenizer file; tokens and a text; vocab.json,
// merges.txt or tokenizer.json. A file must be accepted, or refused with an Error, and decoding must restore
// an encoded text; anything else is a finding.
#define ARAPOET_NO_MAIN
#include "dev/fuzz.h"
#include "tokenizer/export_tokenizer.cpp"

namespace {

using namespace std::string_literals;
using fuzz::require, fuzz::write;

enum Mode { BPE_FILE, CHARACTER_FILE, TEXT, VOCAB, MERGES, JSON, NUM_MODES };

std::vector<std::string> byte_tokens() {
    std::vector<std::string> t;
    for (int b = 0; b < 256; b++) t.push_back(std::string(1, (char)b));
    return t;
}

// A temporary folder with valid files, and a valid input of each kind.
struct Valid : fuzz::Folder {
    std::string content[NUM_MODES];
    Valid() {
        std::vector<std::string> tokens = byte_tokens();
        for (const char* t : {"ab", "\xD8\xA8", "abc", "<|endoftext|>"}) tokens.push_back(t);
        Tokenizer::byte_bpe(tokens, 259, true, "fuzz").save(dir + "/t.bin");
        content[BPE_FILE] = Reader(dir + "/t.bin").rest();
        Tokenizer::characters("ab\u0628 \n").save(dir + "/t.bin");
        content[CHARACTER_FILE] = Reader(dir + "/t.bin").rest();
        content[TEXT] = "\2ab\3abc\2\xD8\xA8\0abc 12's \xD8\xA8\xFF  x"s;

        exporter::Json vocab, merges = {"a b", "ab c"};
        for (uint32_t c = 0, next = 0; next < 256; c++) {
            std::string s, bytes;
            utf8::append(s, c);
            if (huggingface::bytes_of(s, &bytes)) vocab[s] = next++;
        }
        vocab["ab"] = 256, vocab["abc"] = 257, vocab["<|endoftext|>"] = 258;
        content[VOCAB] = vocab.dump();
        content[MERGES] = "#version: 0.2\na b\nab c\n";
        content[JSON] =
            exporter::Json(
                {{"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", true}}},
                 {"added_tokens", {{{"id", 258}, {"content", "<|endoftext|>"}, {"special", true}}}},
                 {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}})
                .dump();
        write(dir + "/tokenizer_config.json", "{\"eos_token\": \"<|endoftext|>\"}");
    }
};
const Valid& valid() {
    static const Valid v;
    return v;
}

void round_trip(const Tokenizer& t, const std::string& text) {
    std::vector<int> ids = t.encode(text);
    bool prefixed = t.add_prefix_space() && !text.empty() && text[0] != ' ';
    const bool added = std::any_of(ids.begin(), ids.end(), [&](int id) { return t.is_added(id); });
    // With add_prefix_space the text after an added token gets a space too.
    if (!added || !t.add_prefix_space()) require(t.decode(ids) == (prefixed ? " " : "") + text);
    require(t.encode(text) == ids);  // this time from the cache
    for (int id : ids) require(id != t.eot() && t.chars(id) >= 0);
}

// Encodes a text with a BPE. The data are the BPE's tokens, each after its length, a length 0, and the text.
void encode_text(const std::string& data) {
    std::vector<std::string> tokens = byte_tokens();
    size_t i = 0;
    while (i < data.size() && data[i] != '\0') {
        size_t n = (unsigned char)data[i];
        tokens.push_back(data.substr(i + 1, n));
        i += 1 + n;
        if (tokens.back().empty()) return;
    }
    tokens.push_back("<|endoftext|>");
    Tokenizer t = Tokenizer::byte_bpe(tokens, (int)tokens.size() - 1, false, "fuzz");
    std::string text = i < data.size() ? data.substr(i + 1) : "";
    round_trip(t, text);
    round_trip(t, text + text + text);
    std::string unbroken;  // long enough for the heap
    while (unbroken.size() < 200 && !text.empty()) unbroken += text;
    round_trip(t, unbroken);
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    return fuzz::mutate(data, size, max_size, seed, NUM_MODES,
                        [](int mode) { return valid().content[mode]; });
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const Valid& v = valid();
    if (size < 1) return 0;
    const int mode = data[0] % NUM_MODES;
    const std::string content((const char*)data + 1, size - 1);
    try {
        if (mode == TEXT) {
            encode_text(content);
        } else if (mode == BPE_FILE || mode == CHARACTER_FILE) {
            write(v.dir + "/t.bin", content);
            Tokenizer t = Tokenizer::load(v.dir + "/t.bin");
            if (t.kind() == Tokenizer::BYTE_BPE) round_trip(t, content.substr(0, 3000));
            for (int id = 0; id < t.vocab_size(); id++) require(t.chars(id) >= 0);
        } else {
            const std::string json = v.dir + "/tokenizer.json";
            unlink(json.c_str());
            if (mode == JSON) write(json, content);
            write(v.dir + "/vocab.json", mode == VOCAB ? content : v.content[VOCAB]);
            write(v.dir + "/merges.txt", mode == MERGES ? content : v.content[MERGES]);
            Tokenizer t = exporter::make_tokenizer(exporter::Folder(v.dir).read());
            round_trip(t, content);
        }
    } catch (const Error&) {}
    return 0;
}
