// test_tokenizer.cpp - tests of byte-level BPE, export_tokenizer and tokenize. The character tokenizer's
// tests are in data/test_data.cpp; check_tokenizer.py compares with tiktoken and Hugging Face.
#define ARAPOET_NO_MAIN
#include "tokenizer/export_tokenizer.cpp"
#include "tokenizer/tokenize.cpp"

#include <doctest/doctest.h>

#include <functional>

#include "dev/test_util.h"

namespace {

using Strings = std::vector<std::string>;
using Ids = std::vector<int>;
using namespace std::string_literals;
const std::string EOT = "<|endoftext|>";

// A linear congruential generator, which yields the same numbers on every machine.
struct Random {
    uint64_t state;
    size_t below(size_t n) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return (size_t)(state >> 33) % n;
    }
    std::string bytes(size_t n) {
        std::string s;
        while (n--) s += (char)below(256);
        return s;
    }
    template <size_t N>
    std::string mix(const char* const (&parts)[N], size_t n) {
        std::string s;
        while (n--) s += parts[below(N)];
        return s;
    }
};

Strings pieces_of(const std::string& text) {
    Strings pieces;
    bpe::Splitter splitter(text);
    for (std::string_view p; splitter.next(&p);) pieces.push_back(std::string(p));
    return pieces;
}

Strings byte_tokens() {
    Strings t;
    for (int b = 0; b < 256; b++) t.push_back(std::string(1, (char)b));
    return t;
}
// A BPE whose token 256 + i is merged[i] and whose last one is end-of-text.
Tokenizer bpe_of(const Strings& merged, bool add_prefix_space = false) {
    Strings t = byte_tokens();
    t.insert(t.end(), merged.begin(), merged.end());
    t.push_back(EOT);
    return Tokenizer::byte_bpe(t, (int)t.size() - 1, add_prefix_space, "test");
}
// The tokens of a BPE made much as in training: each new one is a pair of neighbours in a piece
// of random text.
Strings trained_tokens(Random& random, size_t n, const Strings& alphabet) {
    Strings merged;
    while (merged.size() < n) {
        Tokenizer t = bpe_of(merged);
        std::string word;
        for (size_t i = 0; i < 12; i++) word += alphabet[random.below(alphabet.size())];
        Strings pieces = pieces_of(word);
        Ids ids = t.encode(pieces[random.below(pieces.size())]);
        if (ids.size() < 2) continue;
        size_t i = random.below(ids.size() - 1);
        merged.push_back(t.bytes(ids[i]) + t.bytes(ids[i + 1]));
    }
    return merged;
}

// BPE by its definition, as slow as that is: of all neighbours that together are a token, merge those that
// make the lowest token, at the leftmost place.
Ids merge_by_definition(const Strings& merged, const std::string& piece) {
    Strings parts;
    for (char c : piece) parts.push_back(std::string(1, c));
    auto rank = [&](const std::string& s) {
        return (size_t)(std::find(merged.begin(), merged.end(), s) - merged.begin());
    };
    for (;;) {
        size_t best = merged.size(), at = 0;
        for (size_t i = 0; i + 1 < parts.size(); i++)
            if (size_t r = rank(parts[i] + parts[i + 1]); r < best) best = r, at = i;
        if (best == merged.size()) break;
        parts[at] += parts[at + 1];
        parts.erase(parts.begin() + (ptrdiff_t)at + 1);
    }
    Ids ids;
    for (const std::string& p : parts)
        ids.push_back(p.size() == 1 ? (unsigned char)p[0] : 256 + (int)rank(p));
    return ids;
}

std::string joined(const Strings& pieces) {
    std::string s;
    for (const std::string& p : pieces) s += "[" + p + "]";
    return s;
}

// ---------------------------------------------------------------------------------------------
// Cutting text into pieces

TEST_CASE("gpt-2's pattern: words, numbers, signs, contractions and white space are cut as in GPT-2") {
    struct {
        const char *text, *pieces;
    } cases[] = {
        {"", ""},
        {"Hello world", "[Hello][ world]"},
        {"a1b2", "[a][1][b][2]"},
        {"x = 12.50!", "[x][ =][ 12][.][50][!]"},
        {"it's they're we've I'm you'll I'd don't",
         "[it]['s][ they]['re][ we]['ve][ I]['m][ you]['ll][ I]['d][ don]['t]"},
        {"IT'S l'homme 'tis 'lx '", "[IT]['][S][ l]['][homme][ '][tis][ '][lx][ ']"},
        {"'s't'", "['s]['t][']"},
        {"!'s ''s", "[!'][s][ ''][s]"},
        {"'\u0641", "['][\u0641]"},
        {"a  b", "[a][ ][ b]"},
        {"a   b", "[a][  ][ b]"},
        {"a \n b", "[a][ \n][ b]"},
        {"a\nb", "[a][\n][b]"},
        {"a\n\nb", "[a][\n][\n][b]"},
        {"a \tb", "[a][ ][\t][b]"},
        {"a ", "[a][ ]"},
        {"  \n ", "[  \n ]"},
        {"a\u00A0b", "[a][\u00A0][b]"},
        {"a \u3000\u2003b", "[a][ \u3000][\u2003][b]"},
        {"a\u200Bb", "[a][\u200B][b]"},  // no longer white space since Unicode 4
        {"a\x1C"
         "b",
         "[a][\x1C][b]"},  // white space only in Python
        {"\u0642\u0641\u0627 \u0646\u0628\u0643", "[\u0642\u0641\u0627][ \u0646\u0628\u0643]"},
        {"\u0642\u0650\u0641\u0627", "[\u0642][\u0650][\u0641\u0627]"},  // a vowel sign is not a letter
        {"\u0642\u0640\u0627\u060C \u061F", "[\u0642\u0640\u0627][\u060C][ \u061F]"},
        {" \u0661\u0662\u00B2\u2163x", "[ \u0661\u0662\u00B2\u2163][x]"},
        {"\U0001F600\U0001F1F8 \U00010900\U00010CFA", "[\U0001F600\U0001F1F8][ \U00010900][\U00010CFA]"},
        {"<|endoftext|>", "[<|][endoftext][|>]"},
    };
    for (auto& c : cases) {
        INFO(c.text);
        CHECK(joined(pieces_of(c.text)) == c.pieces);
    }
}

TEST_CASE("gpt-2's pattern: an invalid UTF-8 byte counts as a sign, not as a letter or space") {
    CHECK(joined(pieces_of("a\xFF"
                           "b")) == "[a][\xFF][b]");
    CHECK(joined(pieces_of("\u0628\xD8")) == "[\u0628][\xD8]");
    CHECK(joined(pieces_of("a \xD8\xD8! \x80\x80 ")) == "[a][ \xD8\xD8!][ \x80\x80][ ]");
    CHECK(joined(pieces_of("\xED\xA0\x80"
                           "a")) == "[\xED\xA0\x80][a]");
}

TEST_CASE("gpt-2's pattern: the tables have all letters, numbers and white space of Unicode 16") {
    std::map<bpe::Class, size_t> count;
    for (bpe::Class c : bpe::classes()) count[c]++;
    CHECK(count[bpe::LETTER] == 141028);
    CHECK(count[bpe::NUMBER] == 1911);
    CHECK(count[bpe::SPACE] == 25);
}

// The pattern as a regular expression engine matches it: alternatives in order, each as greedy as possible.
size_t match_by_definition(const std::vector<bpe::Class>& k, const std::u32string& s, size_t i) {
    for (const char32_t* e : {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"})
        if (s.compare(i, std::u32string(e).size(), e) == 0) return i + std::u32string(e).size();
    for (bpe::Class c : {bpe::LETTER, bpe::NUMBER, bpe::OTHER})
        for (size_t skip : {s[i] == ' ' ? 1 : 0, 0}) {
            size_t j = i + skip;
            while (j < s.size() && k[j] == c) j++;
            if (j > i + skip) return j;
        }
    size_t run = i;
    while (run < s.size() && k[run] == bpe::SPACE) run++;
    for (size_t j = run; j > i; j--)
        if (j == s.size() || k[j] == bpe::SPACE) return j;
    return run;
}

TEST_CASE("gpt-2's pattern: random mixes are cut as a regular expression engine cuts them") {
    const char* const parts[] = {" ",      " ", "\n",     "\t",         "\u00A0", "'",      "'s",
                                 "'re",    "v", "e",      "S",          "\u0628", "\u064E", "7",
                                 "\u0663", "!", "\u060C", "\U0001F600", "\u2009", "ll"};
    Random random{1};
    for (int round = 0; round < 5000; round++) {
        std::string text = random.mix(parts, 1 + random.below(14));
        std::u32string s;
        std::vector<bpe::Class> k;
        utf8::for_each(text, [&](uint32_t c, size_t) { s += (char32_t)c, k.push_back(bpe::classes()[c]); });
        Strings want;
        for (size_t i = 0, end; i < s.size(); i = end) {
            end = match_by_definition(k, s, i);
            want.push_back("");
            for (size_t j = i; j < end; j++) utf8::append(want.back(), s[j]);
        }
        REQUIRE(joined(pieces_of(text)) == joined(want));
    }
}

// ---------------------------------------------------------------------------------------------
// Merging

TEST_CASE("bpe: the pair that makes the lowest token merges first, the leftmost among equals") {
    Tokenizer t = bpe_of({"bc", "ab", "aa"});
    CHECK(t.encode("abc") == Ids{'a', 256});
    CHECK(bpe_of({"ab", "bc"}).encode("abc") == Ids{256, 'c'});
    CHECK(t.encode("abab") == Ids{257, 257});
    CHECK(t.encode("aaa") == Ids{258, 'a'});
    CHECK(t.encode("aaab") == Ids{258, 257});
    CHECK(t.encode("aab") == Ids{'a', 257});
    CHECK(t.encode("").empty());
    CHECK(t.encode("ab ab") == Ids{257, ' ', 257});
    CHECK(t.decode(t.encode("abcaabab")) == "abcaabab");
}

TEST_CASE("bpe: merges are found from the order of the tokens; special tokens are never merges") {
    Strings tokens = {EOT, "<s>", "  "};
    for (const std::string& b : byte_tokens()) tokens.push_back(b);
    for (const char* m : {"ab", "abc", "<s", "<pad>", "xyz"}) tokens.push_back(m);
    Tokenizer t = Tokenizer::byte_bpe(tokens, 0, false, "test");
    const int ab = 259;
    CHECK(t.parts(ab) == std::pair<int, int>(3 + 'a', 3 + 'b'));
    CHECK(t.parts(ab + 1) == std::pair<int, int>(ab, 3 + 'c'));
    for (int special : {0, 1, 2, 3 + 'a', ab + 3, ab + 4})
        CHECK(t.parts(special) == std::pair<int, int>(-1, -1));
    CHECK(t.encode("abc<s>  ") == Ids{ab + 1, 3 + '<', 3 + 's', 3 + '>', 3 + ' ', 3 + ' '});
    CHECK(t.encode("<s") == Ids{3 + '<', 3 + 's'});  // two pieces, which never merge
    CHECK(t.encode("xyz") == Ids{3 + 'x', 3 + 'y', 3 + 'z'});
    CHECK(t.decode({0, 1, 2}) == EOT + "<s>  ");
    CHECK(contains(error_of([&] { t.parts(-1); }), "token -1 is out of range"));

    Strings amid = byte_tokens();
    amid.insert(amid.begin() + 'b', "ab"), amid.push_back(EOT);
    CHECK(Tokenizer::byte_bpe(amid, 257, false, "test").encode("ab") == Ids{'a', 'b' + 1});
}

TEST_CASE("bpe: text that spells end-of-text is never encoded as it, even if merges could make it") {
    Strings merged;
    for (size_t n = 2; n < EOT.size(); n++) merged.push_back(EOT.substr(0, n));
    Tokenizer t = bpe_of(merged);
    for (int id : t.encode(EOT)) CHECK(id != t.eot());
    CHECK(t.parts(t.eot()).first == -1);
    CHECK(t.bytes(t.eot()) == EOT);
    // With an end-of-text spelled "end", which is a single piece, a merge could make it.
    Strings letters = byte_tokens();
    letters.push_back("en"), letters.push_back("end");
    Tokenizer u = Tokenizer::byte_bpe(letters, 257, false, "test");
    CHECK(u.encode("end") == Ids{256, 'd'});
}

TEST_CASE("bpe: short and long pieces merge exactly as the definition says") {
    for (uint64_t seed = 0; seed < 6; seed++) {
        Random random{seed};
        Strings alphabet =
            seed % 2 ? Strings{"a", "b", "c"} : Strings{"\u0628", "\u062A", "\u0627", "\u0646"};
        Strings merged = trained_tokens(random, 40, alphabet);
        Tokenizer t = bpe_of(merged);
        for (int round = 0; round < 60; round++) {
            std::string word;
            for (size_t n = 1 + random.below(round % 4 ? 20 : 150); n; n--)
                word += alphabet[random.below(alphabet.size())];
            const Ids want = merge_by_definition(merged, word);
            REQUIRE(t.encode(word) == want);
            REQUIRE(t.encode(word) == want);  // this time from the cache
        }
    }
}

TEST_CASE("bpe: any bytes survive encoding and decoding") {
    Random random{7};
    Strings merged = trained_tokens(random, 30, {"\u0628", "\xFF", "\xD8", "a", "!"});
    Tokenizer t = bpe_of(merged), prefixed = bpe_of(merged, true);
    auto check = [&](const std::string& s) {
        if (t.decode(t.encode(s)) != s) return false;
        return prefixed.decode(prefixed.encode(s)) == (s.empty() || s[0] == ' ' ? s : " " + s);
    };
    size_t wrong = 0;
    for (int a = 0; a < 256; a++) {
        wrong += !check(std::string(1, (char)a));
        for (int b = 0; b < 256; b++) wrong += !check({(char)a, (char)b});
    }
    for (int round = 0; round < 3000; round++) wrong += !check(random.bytes(random.below(300)));
    const char* const parts[] = {"\u0628", "\xD8", "\xFF",     "a",          "!",
                                 " ",      "\n",   "\xE2\x80", "\U0001F600", "\xF0\x9F"};
    for (int round = 0; round < 3000; round++) wrong += !check(random.mix(parts, random.below(200)));
    CHECK(wrong == 0);
}

TEST_CASE("bpe: more words than the cache can hold are all encoded correctly") {
    Random random{3};
    Tokenizer t = bpe_of(trained_tokens(random, 20, {"a", "b"}));
    for (size_t length : {1, 7, 8, 9, 20, 21, 45, 46, 47, 48, 63, 64, 65, 66, 200})
        for (int round = 0; round < 400; round++) {
            std::string word;
            for (size_t i = 0; i < length; i++) word += "abcdefghij"[random.below(10)];
            const Ids ids = t.encode(word);
            REQUIRE(t.decode(ids) == word);
            REQUIRE(t.encode(word) == ids);
        }
}

TEST_CASE("bpe: add_prefix_space puts a space before a text that begins with none") {
    Tokenizer t = bpe_of({" a", "ab"}, true), plain = bpe_of({" a", "ab"});
    CHECK(t.add_prefix_space());
    CHECK(t.encode("a") == Ids{256});
    CHECK(t.encode(" a") == Ids{256});
    CHECK(t.encode("  a") == Ids{' ', 256});
    CHECK(t.encode("\na") == Ids{' ', '\n', 'a'});
    CHECK(t.encode("").empty());
    CHECK(plain.encode("a") == Ids{'a'});
}

TEST_CASE("bpe: the cost is linear in the length, even for a single long piece") {
    Random random{5};
    const Strings merged = trained_tokens(random, 60, {"a", "b", "\u0628"});
    Strings runs;
    for (size_t n = 2; n <= 128; n *= 2) runs.push_back(std::string(n, 'a'));
    struct {
        const char* what;
        Strings merged;
        std::function<std::string(size_t)> text;
    } cases[] = {
        {"random letters", merged,
         [&](size_t n) {
             std::string s;
             while (s.size() < n) s += "aab\u0628"[random.below(3)];
             return s;
         }},
        {"one letter", runs, [](size_t n) { return std::string(n, 'a'); }},
        {"spaces", {"  ", "    "}, [](size_t n) { return std::string(n, ' '); }},
        {"bytes that are no text", merged, [](size_t n) { return std::string(n, '\xFF'); }},
        {"newlines", merged, [](size_t n) { return std::string(n, '\n') + "a"; }},
    };
    for (auto& c : cases) {
        Tokenizer t = bpe_of(c.merged);
        for (size_t n : {1000, 30000, 300000}) {
            uint64_t before = t.work();
            const std::string text = c.text(n);
            Ids ids = t.encode(text);
            INFO(c.what, ": ", n, " bytes, work ", t.work() - before);
            CHECK(t.decode(ids) == text);
            CHECK(t.work() - before >= n - 1);
            CHECK(t.work() - before < 4 * n);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Characters, names, files

TEST_CASE("bpe: chars() of a stream adds up to its texts' characters plus one per end-of-text") {
    Random random{11};
    const Strings texts = {"\u0642\u0641\u0627 \u0646\u0628\u0643", "a\u20AC\U0001F600!", "\u0628",
                           "\n\u0628 "};
    // Some of the tokens are parts of characters, some overlap several characters.
    const Strings merged = trained_tokens(random, 50, {"\u0642", "\u0641", "\u20AC", "\U0001F600", "a"});
    for (bool prefix : {false, true}) {
        Tokenizer t = bpe_of(merged, prefix);
        size_t want = 0, found = 0;
        for (const std::string& text : texts) {
            want += utf8::count(text) + 1;
            found += (size_t)t.chars(t.eot());
            for (int id : t.encode(text)) found += (size_t)t.chars(id);
        }
        CHECK(found == want);
    }
}

TEST_CASE("utf8::quote() escapes invisible bytes, shortens, and stays on one line") {
    CHECK(utf8::quote("ab \u0628") == "'ab \u0628'");
    CHECK(utf8::quote("a\n\xD8\u200Fz\0"s) == "'a\\x0A\\xD8\\xE2\\x80\\x8Fz\\x00'");
    CHECK(utf8::quote("abcdef", 3) == "'abc...'");
    CHECK(utf8::quote("abc", 3) == "'abc'");
    CHECK(utf8::quote("") == "''");
}

std::string file_of(const Strings& tokens, int eot, int kind = 0, int prefix = 0) {
    std::string s(1024, '\0');
    const int32_t fields[] = {20240328, 2, (int)tokens.size(), eot, kind, prefix};
    for (size_t i = 0; i < std::size(fields); i++) s = with_header(s, i, fields[i]);
    for (const std::string& t : tokens) s += (char)t.size(), s += t;
    return s;
}

TEST_CASE("bpe: the file has llm.c's layout, and nothing else is needed to encode") {
    TempDir dir;
    Strings tokens = byte_tokens();
    for (const char* m : {"ab", "abc", EOT.c_str()}) tokens.push_back(m);
    for (int prefix : {0, 1}) {
        Tokenizer::byte_bpe(tokens, 258, prefix, "test").save(dir / "t.bin");
        CHECK(read_file(dir / "t.bin") == file_of(tokens, 258, 0, prefix));
        Tokenizer t = Tokenizer::load(dir / "t.bin");
        CHECK(t.kind() == Tokenizer::BYTE_BPE);
        CHECK(t.vocab_size() == 259);
        CHECK(t.eot() == 258);
        CHECK(t.encode(" abcab") == Ids{' ', 257, 256});
        CHECK(t.encode("abcab").size() == (prefix ? 3 : 2));
        Tokenizer copy = t;
        CHECK(copy.encode("abcab") == t.encode("abcab"));
    }
}

TEST_CASE("bpe: a file that is truncated, lacks a byte or has a token twice is refused") {
    TempDir dir;
    auto load_error = [&](const std::string& content) {
        write_file(dir / "t.bin", content);
        return error_of([&] { Tokenizer::load(dir / "t.bin"); });
    };
    auto with = [](const Strings& more) {
        Strings t = byte_tokens();
        t.insert(t.end(), more.begin(), more.end());
        return t;
    };
    const std::string good = file_of(with({"ab", EOT}), 257);
    CHECK(load_error(good) == "");
    for (size_t n = 0; n < good.size(); n += 11) {
        INFO(n);
        CHECK(contains(load_error(good.substr(0, n)),
                       n < 1024 ? "is not a tokenizer file" : "truncated in token"));
    }
    CHECK(contains(load_error(good + "x"), "trailing data"));
    CHECK(contains(load_error(with_header(good, 5, 2)), "add_prefix_space is 2, wanted 0 to 1"));
    CHECK(contains(load_error(with_header(good, 3, 258)), "end-of-text token is 258"));
    CHECK(contains(load_error(with_header(good, 4, 1)), "of a character tokenizer"));
    CHECK(contains(load_error(file_of(with({"ab", "bc", "ab", EOT}), 259)),
                   "t.bin: tokens 256 and 258 are both 'ab'"));
    CHECK(contains(load_error(file_of(with({"a", EOT}), 257)), "tokens 97 and 256 are both 'a'"));
    CHECK(contains(load_error(file_of(with({"ab", ""}), 256)), "token 257 of 258 has length 0"));
    // If end-of-text is a single byte, text has no token for this byte.
    CHECK(contains(load_error(file_of(with({}), 0xD8)), "no token is the single byte 0xD8"));
    Strings lacking = with({EOT});
    lacking[7] = "xy";
    CHECK(contains(load_error(file_of(lacking, 256)), "no token is the single byte 0x07"));
    CHECK(load_error(file_of(with({EOT, EOT}), 257)) == "");  // token 256 only has the same bytes
}

// ---------------------------------------------------------------------------------------------
// export_tokenizer

// Bytes as GPT-2's files spell them: printable Latin-1 as itself, the k-th of the other bytes as U+0100 + k.
std::string spelled(const std::string& bytes) {
    std::string s;
    for (char c : bytes) {
        static const std::string visible = [] {
            std::string v;
            for (int b = 0; b < 256; b++)
                if ((b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF))
                    v += (char)b;
            return v;
        }();
        unsigned char b = (unsigned char)c;
        uint32_t hidden = 0;
        for (int k = 0; k < b; k++) hidden += visible.find((char)k) == std::string::npos;
        utf8::append(s, visible.find(c) != std::string::npos ? b : 256 + hidden);
    }
    return s;
}

// A small tokenizer as Hugging Face publishes it, with special tokens first, as in AraGPT2.
struct Hf {
    TempDir dir;
    exporter::Json vocab, merges = exporter::Json::array(), config, added = exporter::Json::array();
    int next = 0;

    explicit Hf(const Strings& specials = {EOT, "<pad>"}) {
        for (const std::string& s : specials) vocab[s] = next++;
        for (const std::string& b : byte_tokens()) vocab[spelled(b)] = next++;
        merge(" ", "a"), merge("a", "b"), merge("\xD8", "\xA8"), merge(" a", "b");
    }
    void merge(const std::string& left, const std::string& right) {
        merges.push_back({spelled(left), spelled(right)});
        vocab[spelled(left + right)] = next++;
    }
    std::string merges_txt() const {
        std::string s = "#version: 0.2\n";
        for (auto& m : merges) s += m[0].get<std::string>() + " " + m[1].get<std::string>() + "\n";
        return s;
    }
    exporter::Json tokenizer_json() const {
        return {{"normalizer", nullptr},
                {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"use_regex", true}}},
                {"added_tokens", added},
                {"model",
                 {{"type", "BPE"},
                  {"dropout", nullptr},
                  {"continuing_subword_prefix", ""},
                  {"byte_fallback", false},
                  {"vocab", vocab},
                  {"merges", merges}}}};
    }
    void save_pair() const {
        write_file(dir / "vocab.json", vocab.dump());
        write_file(dir / "merges.txt", merges_txt());
        if (!config.is_null()) write_file(dir / "tokenizer_config.json", config.dump());
    }
    Tokenizer make() const { return exporter::make_tokenizer(exporter::Folder(dir.path).read()); }
    std::string error() const {
        return error_of([&] { make(); });
    }
    std::string error_of_pair() const { return save_pair(), error(); }
};

TEST_CASE("export: reads vocab.json and merges.txt, with special tokens before the bytes") {
    Hf hf;
    hf.config = {{"eos_token", EOT}, {"add_prefix_space", true}};
    hf.save_pair();
    Tokenizer t = hf.make();
    CHECK(t.vocab_size() == 262);
    CHECK(t.eot() == 0);
    CHECK(t.add_prefix_space());
    CHECK(t.encode("ab \u0628") == Ids{261, t.encode("  ")[0], 260});
    for (int b = 0; b < 256; b++) CHECK(t.bytes(2 + b) == std::string(1, (char)b));
    CHECK(t.bytes(1) == "<pad>");
    for (int id : t.encode("<pad>")) CHECK(id > 1);

    std::string windows;  // with CR LF, and an empty line at the end
    for (char c : hf.merges_txt()) windows += c == '\n' ? "\r\n" : std::string(1, c);
    write_file(hf.dir / "merges.txt", windows + "\r\n");
    CHECK(hf.error() == "");
}

TEST_CASE("export: reads tokenizer.json with either form of merges; tokenizer_config.json wins") {
    Hf hf(Strings{});
    hf.added = {{{"id", 260}, {"content", EOT}, {"special", true}},
                {{"id", 261}, {"content", "[\u0628]"}, {"special", true}}};
    write_file(hf.dir / "tokenizer.json", hf.tokenizer_json().dump());
    Tokenizer pairs = hf.make();
    CHECK(pairs.eot() == 260);
    CHECK(pairs.bytes(261) == "[\u0628]");  // plain text
    CHECK(pairs.add_prefix_space());
    for (auto& m : hf.merges) m = m[0].get<std::string>() + " " + m[1].get<std::string>();
    exporter::Json j = hf.tokenizer_json();
    j["pre_tokenizer"] = {{"type", "Sequence"},
                          {"pretokenizers", exporter::Json::array({j["pre_tokenizer"]})}};
    write_file(hf.dir / "tokenizer.json", j.dump());
    Tokenizer texts = hf.make();
    CHECK(pairs.encode("ab ab\u0628") == texts.encode("ab ab\u0628"));
    CHECK(texts.add_prefix_space());
    write_file(hf.dir / "tokenizer_config.json", R"({"add_prefix_space": false, "eos_token": {"content": "[)"
                                                 "\u0628"
                                                 R"(]"}})");
    CHECK(!hf.make().add_prefix_space());
    CHECK(hf.make().eot() == 261);
}

TEST_CASE("export: the program writes the file and reports what is in it") {
    Hf hf;
    hf.save_pair();
    std::string out = hf.dir / "t.bin", folder = hf.dir.path;
    auto run = [](Strings words) {  // returns what the program prints
        words.insert(words.begin(), "export_tokenizer");
        std::vector<char*> argv;
        for (std::string& w : words) argv.push_back(&w[0]);
        char* text = nullptr;
        size_t size = 0;
        FILE *memory = open_memstream(&text, &size), *old = stdout;
        stdout = memory;
        std::string error = error_of([&] { exporter::export_main((int)argv.size(), argv.data()); });
        stdout = old;
        fclose(memory);
        std::string said = text;
        free(text);
        return error + said;
    };
    CHECK(run({folder, out}) == out + ": 262 tokens, 4 merges, end-of-text 0 '<|endoftext|>'\n");
    CHECK(Tokenizer::load(out).encode(" ab") == Ids{261});
    CHECK(contains(run({folder}), "wanted two names"));
    CHECK(contains(run({folder + "/none", out}), "has neither tokenizer.json nor vocab.json"));
}

TEST_CASE("export: ids with a gap, used twice or not in merge order are refused") {
    Hf gap;
    gap.vocab["zz"] = 263;
    CHECK(contains(gap.error_of_pair(), "vocab.json: no token has id 262, but 'zz' has 263"));
    Hf twice;
    twice.vocab["zz"] = 3;
    CHECK(contains(twice.error_of_pair(), "both have id 3"));
    for (const char* bad : {"-1", "1.5", "\"5\"", "1048576", "18446744073709551615", "null"}) {
        Hf hf;
        hf.vocab["zz"] = exporter::Json::parse(bad);
        CHECK(contains(hf.error_of_pair(), "the id of 'zz' is "));
    }
    Hf swapped;
    std::swap(swapped.vocab["ab"], swapped.vocab[spelled(" a")]);
    CHECK(contains(swapped.error_of_pair(),
                   "merges.txt: line 3 makes token 258 'ab', an earlier one token 259"));
    Hf high;  // a special token between the merges is allowed
    high.vocab["<sep>"] = high.next++;
    high.merge("b", "b");
    CHECK(high.error_of_pair() == "");
}

TEST_CASE("export: merges that are foreign, incomplete, malformed or impossible are refused") {
    Hf other;
    other.merges.push_back({"x", "y"});
    CHECK(contains(other.error_of_pair(),
                   "merges.txt: line 6: 'xy' is not in the vocabulary: are these the merges of another"));
    Hf unknown;
    unknown.merges.push_back({"\u4E00", "y"});
    CHECK(contains(unknown.error_of_pair(), "line 6: '\u4E00' is not in the vocabulary"));
    Hf incomplete;
    incomplete.merges.erase(3);
    CHECK(contains(incomplete.error_of_pair(),
                   "no merge makes token 261 '\u0120ab', but '\u0120a' and 'b' would"));
    Hf impossible;  // " " and "a" merge before "ab" exists
    impossible.merges[3] = {spelled(" "), "ab"};
    CHECK(contains(impossible.error_of_pair(), "line 5 never makes token 261 '\u0120ab'"));
    Hf special;
    special.config = {{"eos_token", "ab"}};
    CHECK(contains(special.error_of_pair(), "line 3 makes the special token 'ab'"));
    Hf again;
    again.merges.push_back({"a", "b"});
    CHECK(contains(again.error_of_pair(), "line 6 makes token 259 'ab', an earlier one token 261"));
    for (const char* line : {"ab", " ab", "ab ", "a b c", "a  b"}) {
        Hf hf;
        hf.save_pair();
        write_file(hf.dir / "merges.txt", hf.merges_txt() + line + "\n");
        CHECK(contains(hf.error(), strf("line 6: '%s' is not two tokens with a space between them", line)));
    }
}

TEST_CASE("export: a missing byte or end-of-text, an empty or too long token is refused") {
    Hf byte;
    std::string nul = spelled(std::string(1, '\0'));
    byte.vocab["zz"] = byte.vocab[nul], byte.vocab.erase(nul);
    CHECK(contains(byte.error_of_pair(), "vocab.json: no token is the single byte 0x00"));
    Hf longest;
    longest.vocab[std::string(255, 'x')] = longest.next++;
    CHECK(longest.error_of_pair() == "");
    longest.vocab[std::string(256, 'y')] = longest.next++;
    CHECK(contains(longest.error_of_pair(), "has 256 bytes, a tokenizer file holds 1 to 255"));
    Hf empty;
    empty.vocab[""] = empty.next++;
    CHECK(contains(empty.error_of_pair(), "token 262 '' has 0 bytes"));
    Hf none({"<pad>"});
    CHECK(contains(none.error_of_pair(), "end-of-text '<|endoftext|>' is not in"));
    none.config = {{"eos_token", "<pad>"}};
    CHECK(none.error_of_pair() == "");
    none.config = {{"eos_token", "</s>"}};
    CHECK(contains(none.error_of_pair(), "tokenizer_config.json: end-of-text '</s>' is not in"));
    none.config = {{"eos_token", 5}};
    CHECK(contains(none.error_of_pair(), "eos_token is '5', wanted a string"));
    none.config = {{"eos_token", "<pad>"}, {"add_prefix_space", "yes"}};
    CHECK(contains(none.error_of_pair(), "add_prefix_space is '\"yes\"', wanted true or false"));
}

TEST_CASE("export: added_tokens.json adds to the vocabulary and must not contradict it") {
    Hf hf;
    hf.save_pair();
    write_file(hf.dir / "added_tokens.json", "{\"<x>\": 262, \"<pad>\": 1}");
    CHECK(hf.make().bytes(262) == "<x>");
    write_file(hf.dir / "added_tokens.json", "{\"<pad>\": 7}");
    CHECK(contains(hf.error(), "added_tokens.json: '<pad>' has id 7, but in the vocabulary it has 1"));
}

TEST_CASE("export: tokenizers other than GPT-2's kind and files other than JSON are refused") {
    struct {
        const char *path, *value, *says;
    } cases[] = {
        {"/model/type", "\"WordPiece\"", "model.type is '\"WordPiece\"', wanted \"BPE\""},
        {"/normalizer", "{\"type\": \"NFC\"}", "normalizer is"},
        {"/pre_tokenizer", "{\"type\": \"Whitespace\"}", "pre_tokenizer is"},
        {"/pre_tokenizer", "null", "pre_tokenizer is 'null', wanted ByteLevel"},
        {"/pre_tokenizer/use_regex", "false", "use_regex is 'false'"},
        {"/model/dropout", "0.1", "dropout is '0.1'"},
        {"/model/ignore_merges", "true", "ignore_merges is 'true'"},
        {"/model/byte_fallback", "true", "byte_fallback is 'true'"},
        {"/model/end_of_word_suffix", "\"</w>\"", "end_of_word_suffix is"},
        {"/model/vocab", "[]", "has no vocabulary"},
        {"/model/merges", "{}", "model.merges is missing"},
        {"/model/merges/0", "[1, 2]", "merge 0 is '[1,2]', wanted two tokens"},
        {"/model", "7", "has no vocabulary"},
        {"/added_tokens", "{\"a\": 1}", "added_tokens is"},
        {"/added_tokens/0", "{\"id\": 1}", "an added token is"},
        {"/added_tokens/0", "{\"id\": 262, \"content\": \"x y\", \"special\": false, \"lstrip\": true}",
         "lstrip of the added token 'x y' is true, wanted false"},
    };
    for (auto& c : cases) {
        Hf hf;
        exporter::Json j = hf.tokenizer_json();
        j[exporter::Json::json_pointer(c.path)] = exporter::Json::parse(c.value);
        write_file(hf.dir / "tokenizer.json", j.dump());
        std::string e = hf.error();
        INFO(c.path, " = ", c.value, ": ", e);
        CHECK(contains(e, "tokenizer.json: "));
        CHECK(contains(e, c.says));
        CHECK(!contains(e, "\n"));
    }
    Hf hf;
    for (const char* text : {"", "{", "nonsense", "{\"a\": 1}}", "{\"\xFF\": 1}"}) {
        write_file(hf.dir / "tokenizer.json", text);
        CHECK(contains(hf.error(), "tokenizer.json: is not JSON: "));
        CHECK(!contains(hf.error(), "\n"));
    }
    write_file(hf.dir / "tokenizer.json", "[1]");
    CHECK(contains(hf.error(), "is a JSON array, wanted an object"));
}

// ---------------------------------------------------------------------------------------------
// tokenize

TEST_CASE("tokenize: ids and framed texts are read exactly; malformed input is refused") {
    CHECK(tokenize::read_ids(" 1 22\n-3\t") == Ids{1, 22, -3});
    CHECK(tokenize::read_ids("").empty());
    for (const char* bad : {"x", "1x", "1,2", "99999999999", "1 2 three"}) {
        INFO(bad);
        CHECK(contains(error_of([&] { tokenize::read_ids(bad); }), "is not a token"));
    }
    CHECK(contains(error_of([&] { tokenize::read_ids("1 \0 2"s); }), "is not a token"));
    const std::string frames = "\2\0\0\0ab\0\0\0\0\1\0\0\0\n"s;
    CHECK(tokenize::read_frames(frames) == std::vector<std::string_view>{"ab", "", "\n"});
    for (size_t n = 1; n < frames.size(); n++)
        if (n != 6 && n != 10)
            CHECK(contains(error_of([&] { tokenize::read_frames(frames.substr(0, n)); }), "is truncated"));
}

// ---------------------------------------------------------------------------------------------
// GPT-2's own vocabulary

TEST_CASE("GPT-2's vocabulary encodes known texts to the known tokens") {
    const std::string folder =
        getenv("ARAPOET_GPT2_VOCAB") ? getenv("ARAPOET_GPT2_VOCAB") : "../shared/gpt2_vocab";
    if (!file_exists(folder + "/vocab.json"))
        return skip("no vocab.json in " + folder +
                    "; set ARAPOET_GPT2_VOCAB to a folder with GPT-2's vocabulary");
    Tokenizer t = exporter::make_tokenizer(exporter::Folder(folder).read());
    CHECK(t.vocab_size() == 50257);
    CHECK(t.eot() == 50256);
    CHECK(!t.add_prefix_space());
    for (int id = 0; id < 256; id++) CHECK(t.bytes(id).size() == 1);
    size_t merges = 0;
    for (int id = 256; id < 50256; id++) merges += t.parts(id).first >= 0;
    CHECK(merges == 50000);
    struct {
        const char* text;
        Ids ids;
    } cases[] = {
        {"Hello world", {15496, 995}},
        {" Hello", {18435}},
        {"Hello  world", {15496, 220, 995}},
        {"it's they're I'll we've I'm you'd don't IT'S",
         {270, 338, 484, 821, 314, 1183, 356, 1053, 314, 1101, 345, 1549, 836, 470, 7283, 6, 50}},
        {"1234567890 2024", {10163, 2231, 30924, 3829, 48609}},
        {"a   b\n\n  c\t\td ", {64, 220, 220, 275, 628, 220, 269, 197, 197, 67, 220}},
        {"\u0642\u0641\u0627 \u0646\u0628\u0643 \u0645\u0646 \u0630\u0643\u0631\u0649 "
         "\u062D\u0628\u064A\u0628 \u0648\u0645\u0646\u0632\u0644",
         {149, 224,   149, 223, 12919, 18923, 228,   39848, 149,   225,   47048, 23338, 17550, 108, 149,
          225, 26897, 149, 231, 17550, 255,   39848, 22654, 39848, 42092, 25405, 23338, 148,   110, 13862}},
        {"\u0642\u0650\u0641\u0627", {149, 224, 44208, 149, 223, 12919}},
        {"\U0001F600!?", {47249, 222, 22857}},
        {"<|endoftext|>", {27, 91, 437, 1659, 5239, 91, 29}},
        {"\u00A0x\u3000y", {1849, 87, 5099, 222, 88}},
        {"\u0661\u0662\u0663 x\u00B2", {149, 94, 149, 95, 149, 96, 2124, 31185}},
        {"   ", {220, 220, 220}},
    };
    for (auto& c : cases) {
        INFO(c.text);
        CHECK(t.encode(c.text) == c.ids);
        CHECK(t.decode(c.ids) == c.text);
    }
}

}  // namespace
