// tokenizer.h - how text becomes tokens and back; and UTF-8, in one place for the whole project.
//
//     Tokenizer tok = Tokenizer::characters(training_text);   // or Tokenizer::load("poems/tokenizer.bin")
//     std::vector<int> ids = tok.encode("قفا نبك");
//     std::string text = tok.decode(ids);
//
// A character tokenizer gives every code point of the training text one token, sorted by code point,
// and ends with end-of-text, which separates the poems of a corpus and starts a new one.
//
// The file is llm.c's: 256 int32, then per token one length byte and its bytes.
//     [0] 20240328  [1] 2  [2] V  [3] end-of-text
//     [4] kind, [5] add_prefix_space: ours; 0 in llm.c's files, which hold GPT-2's byte-level BPE
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "io.h"

// ---------------------------------------------------------------------------------------------
// UTF-8

namespace utf8 {

constexpr uint32_t MAX_CODE_POINT = 0x10FFFF;

// A byte that goes on with a character instead of beginning one.
inline bool is_continuation(char c) { return ((unsigned char)c & 0xC0) == 0x80; }

// How many bytes a character has that begins with this byte; 0 where none does.
inline size_t length_from_lead(char c) {
    unsigned char b = (unsigned char)c;
    return b < 0x80 ? 1 : b < 0xC2 ? 0 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : b < 0xF5 ? 4 : 0;
}

// Reads the character that begins at s[i], i < s.size(). Returns its length in bytes, or 0 where the bytes
// are not valid: overlong forms, surrogates, values above U+10FFFF, stray or missing continuation bytes.
inline size_t decode(std::string_view s, size_t i, uint32_t* code_point) {
    size_t n = length_from_lead(s[i]);
    if (n == 1) return *code_point = (unsigned char)s[i], 1;
    if (n == 0 || n > s.size() - i) return 0;
    uint32_t c = (unsigned char)s[i] & (0x7Fu >> n);
    for (size_t k = 1; k < n; k++) {
        if (!is_continuation(s[i + k])) return 0;
        c = c << 6 | ((unsigned char)s[i + k] & 0x3Fu);
    }
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    if (c < least[n] || (c >= 0xD800 && c <= 0xDFFF) || c > MAX_CODE_POINT) return 0;
    *code_point = c;
    return n;
}

// Appends a code point, which must be a valid one.
inline void append(std::string& out, uint32_t c) {
    if (c < 0x80) {
        out += (char)c;
        return;
    }
    int n = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    static const unsigned char lead[] = {0, 0, 0xC0, 0xE0, 0xF0};
    out += (char)(lead[n] | c >> (6 * (n - 1)));
    for (int k = n - 2; k >= 0; k--) out += (char)(0x80 | (c >> (6 * k) & 0x3F));
}

// How many characters begin in s (bytes that are not continuation bytes).
inline size_t count(std::string_view s) {
    size_t n = 0;
    for (char c : s) n += !is_continuation(c);
    return n;
}

// Offset of the first byte that is not valid UTF-8; npos where all are.
inline size_t find_invalid(std::string_view s) {
    uint32_t c;
    for (size_t i = 0; i < s.size();) {
        size_t n = decode(s, i, &c);
        if (n == 0) return i;
        i += n;
    }
    return std::string_view::npos;
}

// How many bytes of s a stream may print now: all but a character at the end whose last bytes are still to come.
inline size_t printable_prefix(std::string_view s) {
    for (size_t back = 1; back <= 3 && back <= s.size(); back++) {
        char c = s[s.size() - back];
        if (is_continuation(c)) continue;
        return length_from_lead(c) > back ? s.size() - back : s.size();
    }
    return s.size();
}

// A code point for an error message: 'ب' U+0628, or U+000A alone where printing it would garble the line.
inline std::string name(uint32_t c) {
    bool invisible = c < 0x20 || (c >= 0x7F && c < 0xA0) || c == 0x061C || (c >= 0x200B && c <= 0x200F) ||
                     (c >= 0x2028 && c <= 0x202E) || (c >= 0x2060 && c <= 0x206F) || c == 0xFEFF;
    std::string quoted;
    if (!invisible) append(quoted = "'", c), quoted += "' ";
    return quoted + strf("U+%04X", c);
}

// Calls f(code_point, byte_offset) for every character of s; the first invalid byte is an Error.
template <class F>
void for_each(std::string_view s, F f) {
    uint32_t c;
    for (size_t i = 0; i < s.size();) {
        size_t n = decode(s, i, &c);
        if (n == 0) fail("invalid UTF-8 at byte %zu (0x%02X)", i, (unsigned)(unsigned char)s[i]);
        f(c, i);
        i += n;
    }
}

}  // namespace utf8

// ---------------------------------------------------------------------------------------------
// The tokenizer

class Tokenizer {
  public:
    enum Kind { BYTE_BPE = 0, CHARACTERS = 1 };

    // Every code point that occurs in the text, sorted, then end-of-text. Invalid UTF-8 is an Error.
    static Tokenizer characters(const std::string& training_text) {
        std::vector<bool> seen(utf8::MAX_CODE_POINT + 1);
        utf8::for_each(training_text, [&](uint32_t c, size_t) { seen[c] = true; });
        Tokenizer t;
        t.kind_ = CHARACTERS;
        for (uint32_t c = 0; c < seen.size(); c++) {
            if (!seen[c]) continue;
            std::string bytes;
            utf8::append(bytes, c);
            t.tokens_.push_back(bytes);
        }
        if (t.tokens_.size() >= MAX_VOCAB)
            fail("the text has %zu different characters, at most %d fit", t.tokens_.size(), MAX_VOCAB - 1);
        t.eot_ = (int)t.tokens_.size();
        t.tokens_.push_back(EOT_TEXT);
        t.index_characters("training text");
        return t;
    }

    // Reads a tokenizer file; every doubt about it is an Error that names file, field, found and wanted.
    static Tokenizer load(const std::string& path) {
        Reader in(path);
        const char* p = path.c_str();
        std::vector<int32_t> h = in.header(MAGIC, "tokenizer");
        auto check = [&](int field, const char* what, int lo, int hi) {
            if (h[field] >= lo && h[field] <= hi) return;
            std::string wanted = lo == hi ? std::to_string(lo) : strf("%d to %d", lo, hi);
            fail("%s: %s is %d, wanted %s", p, what, h[field], wanted.c_str());
        };
        check(1, "version", VERSION, VERSION);
        check(2, "vocabulary size", 1, MAX_VOCAB);
        check(3, "end-of-text token", 0, h[2] - 1);
        check(4, "kind", BYTE_BPE, CHARACTERS);
        check(5, "add_prefix_space", 0, h[4] == BYTE_BPE ? 1 : 0);
        if (h[4] == BYTE_BPE) fail("%s: byte-level BPE is not built in yet", p);

        Tokenizer t;
        t.kind_ = (Kind)h[4], t.eot_ = h[3], t.add_prefix_space_ = h[5] != 0;
        for (int i = 0; i < h[2]; i++) {
            std::string what = strf("token %d of %d", i, h[2]);
            unsigned char length;
            in.read(&length, 1, what.c_str());
            if (length == 0) fail("%s: %s has length 0, wanted 1 to 255", p, what.c_str());
            t.tokens_.emplace_back(length, '\0');
            in.read(&t.tokens_.back()[0], length, what.c_str());
        }
        in.expect_size(in.pos);
        if (t.kind_ == CHARACTERS) t.index_characters(path);
        return t;
    }

    void save(const std::string& path) const {
        AtomicFile out(path);
        write(out);
        out.commit();
    }
    // The file's content without the commit, so that a program can let several files appear together.
    void write(AtomicFile& out) const {
        std::vector<int32_t> h(256);
        h[0] = MAGIC, h[1] = VERSION, h[2] = vocab_size(), h[3] = eot_, h[4] = kind_, h[5] = add_prefix_space_;
        std::string body((const char*)h.data(), 1024);
        for (size_t i = 0; i < tokens_.size(); i++) {
            if (tokens_[i].size() > 255)
                fail("token %zu has %zu bytes, a tokenizer file holds at most 255", i, tokens_[i].size());
            body += (char)tokens_[i].size();
            body += tokens_[i];
        }
        out.write(body);
    }

    Kind kind() const { return kind_; }
    int vocab_size() const { return (int)tokens_.size(); }
    // The token that separates poems. encode() never yields it: a program places it.
    int eot() const { return eot_; }

    // The text's tokens. A character without a token, and invalid UTF-8, is an Error that names it and its byte offset.
    std::vector<int> encode(std::string_view text) const {
        std::vector<int> ids;
        ids.reserve(text.size() / 2 + 1);
        utf8::for_each(text, [&](uint32_t c, size_t offset) {
            int id = c < token_of_.size() ? token_of_[c] : -1;
            if (id < 0)
                fail("character %s at byte %zu is not among the tokenizer's %d", utf8::name(c).c_str(), offset, vocab_size() - 1);
            ids.push_back(id);
        });
        return ids;
    }

    // A token's bytes; with byte-level BPE they need not be whole characters. End-of-text is "<|endoftext|>".
    const std::string& bytes(int token) const {
        if (token < 0 || token >= vocab_size()) fail("token %d is out of range, the tokenizer has %d", token, vocab_size());
        return tokens_[(size_t)token];
    }
    std::string decode(const std::vector<int>& ids) const {
        std::string text;
        for (int id : ids) text += bytes(id);
        return text;
    }
    // How many characters begin in the token; end-of-text counts as one. Summed over a text it does not depend
    // on the tokenizer, so that loss in bits per character compares them.
    int chars(int token) const { return token == eot_ ? 1 : (int)utf8::count(bytes(token)); }

  private:
    static constexpr int32_t MAGIC = 20240328, VERSION = 2;
    static constexpr int MAX_VOCAB = 1 << 20;
    static constexpr const char* EOT_TEXT = "<|endoftext|>";

    // Fills token_of_; checks that end-of-text is spelled as ever and that each other token is one character, once.
    void index_characters(const std::string& where) {
        const char* w = where.c_str();
        if (tokens_[(size_t)eot_] != EOT_TEXT) fail("%s: end-of-text token %d is not written %s", w, eot_, EOT_TEXT);
        for (int i = 0; i < vocab_size(); i++) {
            if (i == eot_) continue;
            const std::string& s = tokens_[(size_t)i];
            uint32_t c = 0;
            if (utf8::decode(s, 0, &c) != s.size())
                fail("%s: token %d of a character tokenizer has %zu bytes that are not one UTF-8 character", w, i, s.size());
            if (c >= token_of_.size()) token_of_.resize(c + 1, -1);
            if (token_of_[c] >= 0) fail("%s: tokens %d and %d are both %s", w, token_of_[c], i, utf8::name(c).c_str());
            token_of_[c] = i;
        }
    }

    Kind kind_ = CHARACTERS;
    bool add_prefix_space_ = false;
    int eot_ = 0;
    std::vector<std::string> tokens_;
    std::vector<int> token_of_;  // CHARACTERS: by code point, -1 where there is none
};
