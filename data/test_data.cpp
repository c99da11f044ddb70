// test_data.cpp - tests of utf8.h, the character tokenizer, dataloader.h and prepare_data.
#define ARAPOET_NO_MAIN
#include "data/prepare_data.cpp"

#include <doctest/doctest.h>
#include <signal.h>
#include <sys/resource.h>

#include <chrono>
#include <set>

#include "dev/test_util.h"

namespace {

using Strings = std::vector<std::string>;

// ---------------------------------------------------------------------------------------------
// UTF-8

TEST_CASE("utf-8: every code point except surrogates survives encoding and decoding") {
    size_t wrong = 0;
    std::string s;
    for (uint32_t c = 0; c <= utf8::MAX_CODE_POINT; c++) {
        s.clear();
        utf8::append(s, c);
        uint32_t back = ~0u;
        bool surrogate = c >= 0xD800 && c <= 0xDFFF;
        size_t n = utf8::decode(s, 0, &back);
        wrong += surrogate ? n != 0 : n != s.size() || back != c || utf8::count(s) != 1;
    }
    CHECK(wrong == 0);
}

TEST_CASE("utf-8: overlong forms, surrogates and stray bytes are refused") {
    // It is enough to count the accepted strings of each length, since the valid ones are accepted for sure.
    auto count_valid = [](size_t n, auto&& byte_range) {
        size_t valid = 0;
        std::string s(n, '\0');
        auto walk = [&](auto&& self, size_t i) -> void {
            if (i == n) {
                uint32_t c;
                valid += utf8::decode(s, 0, &c) == n;
                return;
            }
            for (int b : byte_range(i)) s[i] = (char)b, self(self, i + 1);
        };
        walk(walk, 0);
        return valid;
    };
    std::vector<int> all(256), edges = {0x00, 0x7F, 0x80, 0xBF, 0xC0, 0xFF};
    std::iota(all.begin(), all.end(), 0);
    auto full = [&](size_t) -> const std::vector<int>& { return all; };
    auto two_full = [&](size_t i) -> const std::vector<int>& { return i < 2 ? all : edges; };
    CHECK(count_valid(1, full) == 0x80);
    CHECK(count_valid(2, full) == 0x800 - 0x80);
    CHECK(count_valid(3, full) == 0x10000 - 0x800 - 0x800);
    // Of the six edge bytes, two (0x80 and 0xBF) are valid as third and fourth byte.
    CHECK(count_valid(4, two_full) == 0x100000 / 4096 * 2 * 2);
    CHECK(utf8::find_invalid("ab\xD8\xA8") == std::string_view::npos);
    CHECK(utf8::find_invalid("ab\xD8") == 2);
    CHECK(utf8::find_invalid("ab\xD8"
                             "c") == 2);
    CHECK(utf8::find_invalid("ab\xED\xA0\x80") == 2);
}

TEST_CASE("utf-8: printing the printable prefix loses nothing and never splits a character") {
    const std::string text = "a\u0628\u20AC\U0001F600\u0645z\U0001F600";
    for (size_t chunk = 1; chunk <= 5; chunk++) {
        std::string pending, printed;
        for (size_t i = 0; i < text.size(); i += chunk) {
            pending += text.substr(i, chunk);
            size_t n = utf8::printable_prefix(pending);
            CHECK(utf8::find_invalid(pending.substr(0, n)) == std::string_view::npos);
            printed += pending.substr(0, n);
            pending.erase(0, n);
            CHECK(pending.size() <= 3);
        }
        CHECK(printed == text);
    }
    CHECK(utf8::printable_prefix("\x80\x80\x80\x80") == 4);  // invalid bytes are printed, too
    CHECK(utf8::printable_prefix("\xFF") == 1);
    CHECK(utf8::printable_prefix("") == 0);
    for (const char* whole : {"z", "az", "\u0628", "a\u20AC", "\U0001F600"})
        CHECK(utf8::printable_prefix(whole) == strlen(whole));
}

// ---------------------------------------------------------------------------------------------
// The tokenizer

// The content of a character tokenizer's file, composed by hand.
std::string tokenizer_file(const Strings& tokens, int eot) {
    std::string s(1024, '\0');
    s = with_header(s, 0, 20240328), s = with_header(s, 1, 2), s = with_header(s, 2, (int)tokens.size());
    s = with_header(s, 3, eot), s = with_header(s, 4, 1);
    for (const std::string& t : tokens) s += (char)t.size(), s += t;
    return s;
}
const char* const EOT = "<|endoftext|>";

TEST_CASE("a character tokenizer has every code point of the text, sorted, then end-of-text") {
    Tokenizer t = Tokenizer::characters("ba\n\u0628a\U0001F600");
    REQUIRE(t.vocab_size() == 6);
    Strings tokens;
    for (int i = 0; i < 6; i++) tokens.push_back(t.bytes(i));
    CHECK(tokens == Strings{"\n", "a", "b", "\u0628", "\U0001F600", EOT});
    CHECK(t.eot() == 5);
}

TEST_CASE("text survives encoding and decoding, with one token per character") {
    const std::string text = "\u0642\u0641\u0627 \u0646\u0628\u0643\t\u0645\u0646\n";
    Tokenizer t = Tokenizer::characters(text);
    std::vector<int> ids = t.encode(text);
    CHECK(ids.size() == utf8::count(text));
    CHECK(t.decode(ids) == text);
    CHECK(t.encode("").empty());
    CHECK(t.decode({t.eot()}) == EOT);
}

TEST_CASE("text that spells end-of-text is never encoded as end-of-text") {
    Tokenizer t = Tokenizer::characters(EOT);
    for (int id : t.encode(EOT)) CHECK(id != t.eot());
}

TEST_CASE("chars() is one for every character token and for end-of-text") {
    Tokenizer t = Tokenizer::characters("a\u0628");
    CHECK(t.chars(0) == 1);
    CHECK(t.chars(1) == 1);
    CHECK(t.chars(t.eot()) == 1);
}

TEST_CASE("an unknown character is an error that names its code point and byte offset") {
    Tokenizer t = Tokenizer::characters("\u0628a");
    std::string e = error_of([&] { t.encode("a\u0628\u062A"); });
    CHECK(contains(e, "'\u062A' U+062A at byte 3"));
    CHECK(contains(error_of([&] { t.encode("a\n"); }), "character U+000A at byte 1"));
    CHECK(!contains(error_of([&] { t.encode("a\n"); }), "\n"));
    CHECK(contains(error_of([&] { t.encode("\U0001F600"); }), "U+1F600"));
}

TEST_CASE("encode() and characters() refuse invalid UTF-8 and name its byte offset") {
    Tokenizer t = Tokenizer::characters("a\u0628");
    CHECK(contains(error_of([&] { t.encode("aa\xD8"); }), "invalid UTF-8 at byte 2 (0xD8)"));
    CHECK(contains(error_of([&] { Tokenizer::characters("a\xFF"); }), "invalid UTF-8 at byte 1 (0xFF)"));
}

TEST_CASE("a token outside the vocabulary is an error") {
    Tokenizer t = Tokenizer::characters("ab");
    CHECK(contains(error_of([&] { t.bytes(3); }), "token 3 is out of range, the tokenizer has 3"));
    CHECK(contains(error_of([&] { t.decode({0, -1}); }), "token -1"));
}

TEST_CASE("a tokenizer file has llm.c's layout and loads as the tokenizer that was saved") {
    TempDir dir;
    Tokenizer t = Tokenizer::characters("b\u0628\n");
    t.save(dir / "t.bin");
    CHECK(read_file(dir / "t.bin") == tokenizer_file({"\n", "b", "\u0628", EOT}, 3));
    Tokenizer u = Tokenizer::load(dir / "t.bin");
    CHECK(u.vocab_size() == 4);
    CHECK(u.eot() == 3);
    CHECK(u.kind() == Tokenizer::CHARACTERS);
    CHECK(u.encode("\u0628b\n") == std::vector<int>{2, 1, 0});
}

TEST_CASE("a wrong header field in a tokenizer file is an error that names the field") {
    TempDir dir;
    const std::string good = tokenizer_file({"a", "b", EOT}, 2);
    struct {
        size_t index;
        std::vector<int32_t> values;
        const char* says;
    } fields[] = {{0, {0, 20240520, -1}, "magic number"},
                  {1, {0, 1, 3, -1}, "version is"},
                  {2, {0, -1, 1 << 20 | 1, INT32_MAX, INT32_MIN}, "vocabulary size is"},
                  {3, {-1, 3, INT32_MAX, INT32_MIN}, "end-of-text token is"},
                  {4, {-1, 2, INT32_MAX}, "kind is"},
                  {5, {-1, 1, 2}, "add_prefix_space is"}};
    for (auto& f : fields)
        for (int32_t v : f.values) {
            write_file(dir / "t.bin", with_header(good, f.index, v));
            std::string e = error_of([&] { Tokenizer::load(dir / "t.bin"); });
            INFO(f.index, " = ", v, ": ", e);
            CHECK(contains(e, dir / "t.bin: "));
            CHECK(contains(e, f.says));
            CHECK(contains(e, std::to_string(v)));
        }
    write_file(dir / "t.bin", with_header(good, 2, 2));
    CHECK(
        contains(error_of([&] { Tokenizer::load(dir / "t.bin"); }), "end-of-text token is 2, wanted 0 to 1"));
}

TEST_CASE("a tokenizer file that is truncated anywhere or too long is refused") {
    TempDir dir;
    const std::string good = tokenizer_file({"a", "\u0628", EOT}, 2);
    write_file(dir / "t.bin", good);
    CHECK(error_of([&] { Tokenizer::load(dir / "t.bin"); }) == "");
    for (size_t n = 0; n < good.size(); n += n < 1000 ? 100 : 1) {
        write_file(dir / "t.bin", good.substr(0, n));
        std::string e = error_of([&] { Tokenizer::load(dir / "t.bin"); });
        INFO(n, ": ", e);
        CHECK(contains(e, n < 1024 ? "is not a tokenizer file" : "truncated in token"));
    }
    write_file(dir / "t.bin", good + "x");
    CHECK(contains(error_of([&] { Tokenizer::load(dir / "t.bin"); }), "trailing data"));
    CHECK(contains(error_of([&] { Tokenizer::load(dir / "none.bin"); }), "cannot open"));
}

TEST_CASE("a character tokenizer's file must have distinct single characters and <|endoftext|>") {
    TempDir dir;
    auto load_error = [&](const Strings& tokens, int eot) {
        write_file(dir / "t.bin", tokenizer_file(tokens, eot));
        return error_of([&] { Tokenizer::load(dir / "t.bin"); });
    };
    CHECK(load_error({EOT, "a"}, 0) == "");  // end-of-text may have any id
    CHECK(contains(load_error({"a", "b", "a", EOT}, 3), "tokens 0 and 2 are both 'a' U+0061"));
    CHECK(contains(load_error({"ab", EOT}, 1), "token 0 of a character tokenizer has 2 bytes"));
    CHECK(contains(load_error({"a", "\xD8", EOT}, 2), "token 1 of a character tokenizer has 1 bytes"));
    CHECK(contains(load_error({"a", "\xED\xA0\x80", EOT}, 2), "not one UTF-8 character"));
    CHECK(contains(load_error({"a", "", EOT}, 2), "token 1 of 3 has length 0"));
    CHECK(contains(load_error({"a", "b"}, 1), "end-of-text token 1 is not written"));
    CHECK(contains(load_error({"a", EOT, "b"}, 2), "end-of-text token 2 is not written"));
}

// ---------------------------------------------------------------------------------------------
// Token files

std::vector<uint16_t> iota_tokens(size_t n) {
    std::vector<uint16_t> t(n);
    std::iota(t.begin(), t.end(), uint16_t(0));
    return t;
}
// A token file in which every token is its own position, so that a window shows where it was cut from.
struct IotaFile {
    TempDir dir;
    TokenFile file;
    explicit IotaFile(size_t n) : file((write_tokens(dir / "t.bin", iota_tokens(n)), dir / "t.bin")) {}
};

TEST_CASE("a token file has llm.c's layout and reads back the same tokens") {
    TempDir dir;
    write_tokens(dir / "t.bin", {7, 65535, 0});
    std::string want(1024, '\0');
    want = with_header(with_header(with_header(want, 0, 20240520), 1, 1), 2, 3) +
           std::string("\7\0\xFF\xFF\0\0", 6);
    CHECK(read_file(dir / "t.bin") == want);
    TokenFile f(dir / "t.bin");
    REQUIRE(f.size() == 3);
    CHECK(f[0] == 7);
    CHECK(f[1] == 65535);
    CHECK(f[2] == 0);
}

TEST_CASE("shards are one stream in name order, and the same windows as one file") {
    TempDir dir;
    std::vector<uint16_t> all;
    for (int i = 0; i < 1000; i++) all.push_back((uint16_t)(i * 37 % 500));
    write_tokens(dir / "all.bin", all);
    size_t at = 0;
    for (auto [name, n] : {std::pair<const char*, size_t>{"t_0.bin", 1},
                           {"t_1.bin", 600},
                           {"t_10.bin", 7},
                           {"t_2.bin", 392}}) {
        write_tokens(dir / name,
                     std::vector<uint16_t>(all.begin() + (ptrdiff_t)at, all.begin() + (ptrdiff_t)(at + n)));
        at += n;
    }
    TokenFile one(dir / "all.bin"), many(dir / "t_*.bin");
    REQUIRE(many.size() == 1000);
    size_t wrong = 0;
    for (size_t i = 0; i < 1000; i++) wrong += one[i] != many[i];
    CHECK(wrong == 0);
    for (bool shuffle : {true, false}) {
        TrainLoader a(one, 9, 5, shuffle), b(many, 9, 5, shuffle);
        std::vector<int> xa(27), ya(27), xb(27), yb(27);
        for (int i = 0; i < 100; i++) {
            a.next(3, xa.data(), ya.data()), b.next(3, xb.data(), yb.data());
            CHECK((xa == xb && ya == yb));
            if (!shuffle && i == 0)  // the file's order, as llm.c reads it
                for (int k = 0; k < 27; k++)
                    CHECK((xa[(size_t)k] == all[(size_t)k] && ya[(size_t)k] == all[(size_t)k + 1]));
        }
    }
    CHECK(contains(error_of([&] { many.check_vocab(499); }), "t_"));
    CHECK(error_of([&] { TokenFile none(dir / "x_*.bin"); }) == (dir / "x_*.bin") + ": no file matches");
    write_file(dir / "t_3.bin", "short");
    CHECK(contains(error_of([&] { TokenFile damaged(dir / "t_*.bin"); }), "t_3.bin: is not a token file"));
}

TEST_CASE("a token file with a wrong header field or a wrong size is refused") {
    TempDir dir;
    write_tokens(dir / "t.bin", {1, 2, 3});
    const std::string good = read_file(dir / "t.bin");
    auto error = [&](const std::string& content) {
        write_file(dir / "t.bin", content);
        return error_of([&] { TokenFile f(dir / "t.bin"); });
    };
    CHECK(error(good) == "");
    CHECK(contains(error(with_header(good, 0, 20240328)),
                   "is not a token file: magic number is 20240328, wanted 20240520"));
    for (int v : {0, 2, -1})
        CHECK(contains(error(with_header(good, 1, v)), strf("version is %d, wanted 1", v)));
    for (int v : {0, -1, INT32_MIN})
        CHECK(contains(error(with_header(good, 2, v)), strf("token count is %d, wanted at least 1", v)));
    for (int v : {4, INT32_MAX}) CHECK(contains(error(with_header(good, 2, v)), "truncated"));
    CHECK(contains(error(with_header(good, 2, 2)), "trailing data"));
    for (size_t n = 0; n < good.size(); n += n < 1000 ? 100 : 1)
        CHECK(contains(error(good.substr(0, n)), n < 1024 ? "is not a token file" : "truncated"));
    CHECK(contains(error(good + "x"), "trailing data"));
    CHECK(contains(error_of([&] { write_tokens(dir / "u.bin", {}); }), "not 0"));
    CHECK(!file_exists(dir / "u.bin"));
}

TEST_CASE("windows with tags need end-of-text tokens and room for a token beside the tags") {
    TempDir dir;
    write_tokens(dir / "t.bin", {1, 2, 3, 4, 5, 6, 7, 8, 9});
    TokenFile file(dir / "t.bin");
    TagTokens tags;
    tags.first = 8, tags.eot = 0, tags.count = 2;
    CHECK(contains(error_of([&] { TrainLoader(file, 4, 1, true, 0, 1, tags); }),
                   "t.bin: has no end-of-text token"));
    CHECK(contains(error_of([&] { TrainLoader(file, 2, 1, true, 0, 1, tags); }),
                   "--seq_len: 2 is too small: 2 tags are before each window"));
}

TEST_CASE("check_vocab() names the first token outside the vocabulary and its position") {
    IotaFile f(10);
    CHECK(error_of([&] { f.file.check_vocab(10); }) == "");
    CHECK(contains(error_of([&] { f.file.check_vocab(7); }), "token 7 at position 7"));
}

// ---------------------------------------------------------------------------------------------
// Loaders

using Window = std::pair<std::vector<int>, std::vector<int>>;  // inputs, targets

std::vector<Window> draw(TrainLoader& loader, int T, int B, int calls) {
    std::vector<Window> windows;
    std::vector<int> in((size_t)(B * T)), out(in.size());
    for (int c = 0; c < calls; c++) {
        loader.next(B, in.data(), out.data());
        for (int b = 0; b < B; b++)
            windows.push_back({{in.begin() + b * T, in.begin() + (b + 1) * T},
                               {out.begin() + b * T, out.begin() + (b + 1) * T}});
    }
    return windows;
}

TEST_CASE("every window of an epoch comes exactly once, in an order independent of batch size") {
    const int T = 7, n = 101, W = n / T, epochs = 3;
    IotaFile f(n);
    TrainLoader one(f.file, T, 5, true);
    CHECK(one.windows_per_epoch() == (uint64_t)W);
    const std::vector<Window> reference = draw(one, T, 1, W * epochs);
    for (int e = 0; e < epochs; e++) {
        std::set<int> inputs;
        for (int w = 0; w < W; w++) {
            const std::vector<int>& in = reference[(size_t)(e * W + w)].first;
            inputs.insert(in.begin(), in.end());
        }
        CHECK(inputs.size() == (size_t)(W * T));  // no position occurs twice
    }
    for (int B : {2, 3, 6, 14, 21, 42}) {
        TrainLoader loader(f.file, T, 5, true);
        CHECK(draw(loader, T, B, W * epochs / B) == reference);
    }
}

TEST_CASE("a target is the token after its input; the file's first token follows its last") {
    const int T = 4, n = 22;
    IotaFile f(n);
    TrainLoader loader(f.file, T, 1, true);
    bool wrapped = false;
    for (auto& [in, out] : draw(loader, T, 5, 40))
        for (int t = 0; t < T; t++) {
            CHECK(out[(size_t)t] == (in[(size_t)t] + 1) % n);
            if (t) CHECK(in[(size_t)t] == out[(size_t)t - 1]);
            wrapped = wrapped || in[(size_t)t] == n - 1;
        }
    CHECK(wrapped);
}

TEST_CASE("a seed fixes the order, each epoch has another, and windows can start at any token") {
    const int T = 3, n = 31, W = n / T;
    IotaFile f(n);
    auto sequence = [&](uint64_t seed) {
        TrainLoader l(f.file, T, seed, true);
        return draw(l, T, 1, 2 * W);
    };
    auto a = sequence(1), b = sequence(2);
    CHECK(a == sequence(1));
    CHECK(a != b);
    CHECK(std::vector<Window>(a.begin(), a.begin() + W) != std::vector<Window>(a.begin() + W, a.end()));
    TrainLoader loader(f.file, T, 1, true);
    std::set<int> starts;
    for (auto& [in, out] : draw(loader, T, W, 300)) starts.insert(in[0]);
    CHECK(starts.size() == (size_t)n);
}

TEST_CASE("without shuffle the windows come in file order") {
    const int T = 3;
    IotaFile f(10);
    TrainLoader loader(f.file, T, 1, false);
    auto w = draw(loader, T, 1, 4);
    CHECK(w[0].first == std::vector<int>{0, 1, 2});
    CHECK(w[2] == Window({6, 7, 8}, {7, 8, 9}));
    CHECK(w[3] == w[0]);
}

TEST_CASE("seek() continues the sequence of windows exactly, with any batch size") {
    const int T = 5;
    IotaFile f(73);
    TrainLoader straight(f.file, T, 9, true), resumed(f.file, T, 9, true);
    draw(straight, T, 4, 9);
    CHECK(straight.position() == 36);
    resumed.seek(straight.position());
    CHECK(draw(resumed, T, 3, 20) == draw(straight, T, 5, 12));
    CHECK(resumed.position() == straight.position());
    resumed.seek(0);
    TrainLoader fresh(f.file, T, 9, true);
    CHECK(draw(resumed, T, 2, 9) == draw(fresh, T, 2, 9));
    CHECK(contains(error_of([&] { resumed.seek(UINT64_MAX); }), "beyond the last epoch"));
}

TEST_CASE("several processes together draw the same windows as a single one") {
    const int T = 4, B = 3, world = 3;
    IotaFile f(90);
    TrainLoader alone(f.file, T, 2, true);
    std::deque<TrainLoader> ranks;
    for (int r = 0; r < world; r++) ranks.emplace_back(f.file, T, 2, true, r, world);
    for (int step = 0; step < 8; step++) {  // an epoch has 22 windows, so it also ends amid a rank's batch
        std::vector<Window> together;
        for (TrainLoader& r : ranks)
            for (Window& w : draw(r, T, B, 1)) together.push_back(w);
        CHECK(together == draw(alone, T, B * world, 1));
        for (TrainLoader& r : ranks) CHECK(r.position() == alone.position());
    }
    CHECK(error_of([&] { TrainLoader l(f.file, T, 2, true, 3, 3); }) != "");
}

TEST_CASE("a corpus shorter than one window is refused; T + 1 tokens are enough") {
    IotaFile f(9);
    CHECK(contains(error_of([&] { TrainLoader l(f.file, 9, 1, true); }),
                   "corpus shorter than one window: 9 tokens, wanted at least T + 1 = 10"));
    TrainLoader l(f.file, 8, 1, true);
    CHECK(l.windows_per_epoch() == 1);
    CHECK(draw(l, 8, 4, 2).size() == 8);
}

TEST_CASE("evaluation has each token but the first as target once, in order, padded with -1") {
    for (int n : {2, 3, 12, 13, 14, 25, 100})
        for (int B : {1, 2, 5})
            for (int T : {1, 3, 4}) {
                IotaFile f((size_t)n);
                EvalLoader loader(f.file, B, T);
                std::vector<int> in((size_t)(B * T)), out(in.size()), targets;
                size_t padding = 0;
                for (size_t i = 0; i < loader.batches(); i++) {
                    loader.get(i, in.data(), out.data());
                    for (size_t k = 0; k < in.size(); k++) {
                        if (out[k] == -1) {
                            padding++;
                            CHECK(in[k] == 0);
                            continue;
                        }
                        CHECK(padding == 0);
                        CHECK(out[k] == in[k] + 1);
                        targets.push_back(out[k]);
                    }
                }
                std::vector<int> want((size_t)n - 1);
                std::iota(want.begin(), want.end(), 1);
                CHECK(targets == want);
                CHECK(padding < in.size());
                CHECK(loader.all_targets() == want.size());
            }
    IotaFile single(1);
    CHECK(contains(error_of([&] { EvalLoader l(single.file, 1, 1); }), "at least 2"));
}

TEST_CASE("evaluation knows how many targets each batch has, with tags too") {
    IotaFile f(50);  // tokens 0 to 49; 3 begins a poem, tags are 40 and above
    for (size_t count : {0, 2})
        for (int B : {1, 3})
            for (int T : {3, 4, 7}) {
                EvalLoader loader(f.file, B, T, count ? TagTokens{40, 3, count} : TagTokens{});
                std::vector<int> in((size_t)(B * T)), out(in.size());
                size_t all = 0;
                for (size_t i = 0; i < loader.batches(); i++) {
                    loader.get(i, in.data(), out.data());
                    const size_t here =
                        (size_t)std::count_if(out.begin(), out.end(), [](int y) { return y >= 0; });
                    CHECK(loader.targets(i) == here);
                    all += here;
                }
                CHECK(loader.all_targets() == all);
                CHECK(all == (count ? 39u : 49u));
            }
}

// ---------------------------------------------------------------------------------------------
// prepare_data

// The decoded poems of a token file; checks that it begins with end-of-text.
Strings poems_in(const std::string& path, const Tokenizer& tok) {
    Strings poems;
    if (!file_exists(path)) return poems;
    TokenFile f(path);
    CHECK(f[0] == tok.eot());
    for (size_t i = 0; i < f.size(); i++) {
        if (f[i] == tok.eot()) poems.push_back("");
        else poems.back() += tok.bytes(f[i]);
    }
    return poems;
}

// One run of prepare_data on one input file, with its report and the poems of its output files.
struct Run {
    TempDir dir;
    prep::Options o;
    prep::Report r;
    Strings train, val;

    explicit Run(const std::string& content, const std::string& name = "poems.csv") {
        o.files = {dir / name}, o.out = dir / "out", o.val_fraction = 0;
        write_file(o.files[0], content);
    }
    Run& go() {
        r = prep::prepare(o);
        Tokenizer tok = Tokenizer::load(o.out + "/tokenizer.bin");
        train = poems_in(o.out + "/train.bin", tok), val = poems_in(o.out + "/val.bin", tok);
        return *this;
    }
    std::string error() {
        return error_of([&] { prep::prepare(o); });
    }
};

TEST_CASE("a quoted CSV field may contain newlines, quotes and commas") {
    Run run("id,poem_text,note\n1,\"a, b\nsaid \"\"c\"\"\",x\n2,plain,\"\"\n3,\"\"\"\",y\n");
    run.o.keep = "all";
    CHECK(run.go().train == Strings{"a, b\nsaid \"c\"", "plain", "\""});
    CHECK(run.r.poems_read == 3);
}

TEST_CASE("a CSV may have CRLF, a byte order mark, blank lines, a quoted header, no last newline") {
    Run run("\xEF\xBB\xBF\"poem_text\",id\r\n\"a\r\nb\",1\r\n\r\nc,2");
    run.o.keep = "all";
    CHECK(run.go().train == Strings{"a\nb", "c"});
    CHECK(run.r.ragged == 0);
}

TEST_CASE("--column chooses the column; a missing one is an error that lists the columns") {
    Run run("id,body,\"long\nname\"\n1,\u0628,\u062A\n");
    std::string e = run.error();
    CHECK(contains(e, "has no column 'poem_text'; its columns are 'id', 'body', 'long\\x0Aname'"));
    CHECK(!file_exists(run.o.out));
    run.o.column = "body";
    CHECK(run.go().train == Strings{"\u0628"});
    // Without --column, one other usual name will do, but not two.
    CHECK(Run("id,text\n1,\u0628\n").go().train == Strings{"\u0628"});
    CHECK(contains(Run("poem,text\n\u062A,\u0628\n").error(), "has no column 'poem_text'"));
}

TEST_CASE("--where and --except choose rows by a column's value; impossible ones are errors") {
    const std::string csv = "poet,poem_text\nX,a\nY,b\n\"X\",c\nZ,d\nX=1,e\n";
    auto read = [&](const char* where, const char* except) {
        Run run(csv);
        run.o.keep = "all", run.o.where = where, run.o.except = except;
        Strings train = run.go().train;
        CHECK(run.r.filtered + train.size() == 5);
        return train;
    };
    CHECK(read("poet=X", "") == Strings{"a", "c"});
    CHECK(read("", "poet=X") == Strings{"b", "d", "e"});
    CHECK(read("poet=X", "poem_text=c") == Strings{"a"});
    CHECK(read("poet=X=1", "") == Strings{"e"});
    CHECK(read("poet=X|Z", "") == Strings{"a", "c", "d"});
    CHECK(read("", "poet=X|Z|Y") == Strings{"e"});
    CHECK(read("poet=Y||", "poet=X") == Strings{"b"});
    CHECK(read("poet=Y", "poem_text=c") == Strings{"b"});  // none of Y's rows is c
    Run empty("poet,poem_text\n,a\nY,b\n");
    empty.o.keep = "all", empty.o.except = "poet=";
    CHECK(empty.go().train == Strings{"b"});
    auto error = [](const std::string& text, const char* name, const char* where) {
        Run run(text, name);
        run.o.where = where;
        return run.error();
    };
    CHECK(
        contains(error(csv, "poems.csv", "poet"), "--where: 'poet' is not a condition, wanted COLUMN=VALUE"));
    CHECK(contains(error(csv, "poems.csv", "age=3"),
                   "has no column 'age'; its columns are 'poet', 'poem_text' (--where chooses one)"));
    CHECK(contains(error(csv, "poems.csv", "poet=W"), "--where 'poet=W' leaves none of 5 rows"));
    CHECK(contains(error(csv, "poems.csv", "poet=X|W"), "--where: poet=W: no row has this value"));
    Run misspelt(csv);
    misspelt.o.except = "poet=V";
    CHECK(contains(misspelt.error(), "--except: poet=V: no row has this value"));
    // A value of any of several files will do.
    Run two(csv);
    two.o.files.push_back(two.o.out + ".csv");
    write_file(two.o.files[1], "poet,poem_text\nV,f\n");
    two.o.keep = "all", two.o.where = "poet=V|Z";
    CHECK(two.go().train == Strings{"d", "f"});
    CHECK(contains(error("a\nb\n", "poems.txt", "poet=X"),
                   "is plain text, but --where needs the columns of a CSV"));
}

TEST_CASE("rows of a verse count as rows where most must have as many fields as the header") {
    std::string csv = "id,sadr,ajuz\n";
    for (int i = 0; i < 100; i++) csv += strf("%d,\u0628,\u062A\n", i / 10);
    for (int i = 0; i < 60; i++) csv += "11,\u0628\n";
    Run run(csv);
    run.o.columns = "sadr,ajuz", run.o.group = "id";
    CHECK(run.go().r.ragged == 60);
    write_file(run.o.files[0], csv + "x\n");
    CHECK(run.error() == "");
    for (int i = 0; i < 60; i++) csv += "11,\u0628\n";
    write_file(run.o.files[0], csv);
    CHECK(contains(run.error(), "120 of 220 rows have more or fewer fields than the header"));
    run.o.group = "";
    CHECK(contains(run.error(), "--group: is empty"));
}

TEST_CASE("unbalanced quotes in a CSV are an error that names the line") {
    CHECK(contains(Run("poem_text,id\na,1\n\"b,2\nc,3\n").error(),
                   "line 3: a quoted field begins here but never ends"));
    CHECK(contains(Run("poem_text,id\n\"a\nb,1\nc,\"x\"\n").error(),
                   "line 2: text follows the closing quote of a field, on line 4"));
    CHECK(contains(Run("poem_text,id\n\"a\"b,1\n").error(), "line 2: text follows"));
}

TEST_CASE("rows with more or fewer fields than the header are dropped, counted and reported") {
    Run run("id,poem_text\n1,\u0628\n2\n3,\u062A,\u062B\n4,\u062C\n");
    CHECK(contains(Run("id,poem_text\n1,\u0628\n2\n3,\u062A,\u062B\n4\n").error(),
                   "3 of 4 rows have more or fewer fields than the header, e.g. "));
    CHECK(run.go().train == Strings{"\u0628", "\u062C"});
    CHECK(run.r.ragged == 2);
    REQUIRE(run.r.where_ragged.size() == 2);
    CHECK(contains(run.r.where_ragged[0], "line 3: 1 fields, the header has 2"));
}

TEST_CASE("the format is decided by --format, else by the file name, else by the header line") {
    const std::string csv = "id,poem_text\n1,a\n", text = "a,b\nc\n";
    auto read = [](const std::string& content, const char* name, const char* format) {
        Run run(content, name);
        run.o.keep = "all", run.o.format = format;
        return run.go().train;
    };
    CHECK(read(csv, "poems.CSV", "auto") == Strings{"a"});
    CHECK(read(csv, "poems", "auto") == Strings{"a"});
    CHECK(read(text, "poems.txt", "auto") == Strings{"a,b", "c"});
    CHECK(read(csv, "poems.csv", "text") == Strings{"id,poem_text", "1,a"});
    CHECK(contains(Run(text, "poems.csv").error(), "has no column"));
}

TEST_CASE("a text file has one poem per line, or poems between blank lines if it has any inside") {
    auto read = [](const std::string& content, const char* layout, std::string* how = nullptr) {
        Run run(content, "poems.txt");
        run.o.keep = "all", run.o.layout = layout;
        run.go();
        if (how) *how = run.r.sources[0];
        return run.train;
    };
    std::string how;
    CHECK(read("\na\nb\n\n", "auto", &how) == Strings{"a", "b"});  // blank lines at either end do not count
    CHECK(contains(how, "one poem per line"));
    CHECK(read("\na\nb\r\n \t\r\n\nc\td\n", "auto", &how) == Strings{"a\nb", "c\td"});
    CHECK(contains(how, "separated by blank lines"));
    CHECK(read("a\nb\n\nc\n", "lines") == Strings{"a", "b", "c"});
    CHECK(read("a\nb\n", "blank") == Strings{"a\nb"});
}

std::string cleaned(
    const std::string& text, const std::function<void(prep::Options&)>& set = [](prep::Options&) {}) {
    prep::Options o;
    set(o);
    return Cleaner(o)(text);
}
void keep_all(prep::Options& o) { o.keep = "all"; }

TEST_CASE("--keep letters keeps exactly U+0621..U+064A and white space") {
    for (uint32_t c = 1; c <= 0x3000; c++) {
        if (c == '\t' || is_newline(c) || is_other_space(c)) continue;
        std::string s;
        utf8::append(s, c);
        bool kept = cleaned(s) == s;
        INFO(c);
        CHECK(kept == (c >= 0x0621 && c <= 0x064A));
    }
    CHECK(cleaned("\U0001F600") == "");
}

TEST_CASE("--keep all keeps everything but control characters and direction marks") {
    CHECK(cleaned(std::string("a\0\x01\x7F\u0085\u009F\u200F\uFEFF!\u064B\U0001F600", 21), keep_all) ==
          "a !\u064B\U0001F600");
}

TEST_CASE("a run of white space becomes a newline, else a TAB, else a space; none at the ends") {
    CHECK(cleaned("  a  b\u00A0\u2003c ", keep_all) == "a b c");
    CHECK(cleaned("a \t b\t\tc", keep_all) == "a\tb\tc");
    CHECK(cleaned("\n a \r\n\t\n b\rc\u2028d\t\n", keep_all) == "a\nb\nc\nd");
    CHECK(cleaned("\u0628 \u060C \u062A") == "\u0628 \u062A");  // removed punctuation leaves no double space
    CHECK(cleaned("\u0628 \u060C\n: \u062A") == "\u0628\n\u062A");
    CHECK(cleaned("a\n\tb \n \t c", keep_all) == "a\nb\nc");
    CHECK(cleaned(" \u060C \n") == "");
}

TEST_CASE("each --normalize and --remove switch changes its letters and no others") {
    struct Switch {
        bool Recipe::*flag;
        std::map<uint32_t, uint32_t> becomes;  // 0 = removed
    };
    Switch tatweel{&Recipe::remove_tatweel, {{0x0640, 0}}}, tashkeel{&Recipe::remove_tashkeel, {{0x0670, 0}}};
    for (uint32_t c = 0x064B; c <= 0x065F; c++) tashkeel.becomes[c] = 0;
    Switch alef{&Recipe::normalize_alef,
                {{0x0622, 0x0627}, {0x0623, 0x0627}, {0x0625, 0x0627}, {0x0671, 0x0627}}};
    Switch hamza{&Recipe::normalize_hamza, {{0x0624, 0x0648}, {0x0626, 0x064A}}};
    Switch ya{&Recipe::normalize_ya, {{0x0649, 0x064A}}}, ta{&Recipe::normalize_ta, {{0x0629, 0x0647}}};
    for (const Switch& s : {alef, hamza, ya, ta, tatweel, tashkeel})
        for (uint32_t c = 0x061D; c <= 0x06FF; c++) {
            std::string in, want;
            utf8::append(in, c);
            auto change = s.becomes.find(c);
            uint32_t to = change == s.becomes.end() ? c : change->second;
            if (to) utf8::append(want, to);
            INFO(c);
            CHECK(cleaned(in, [&](prep::Options& o) { o.keep = "all", o.*s.flag = true; }) == want);
        }
    // With --map none, --keep letters removes U+0671, unless --normalize_alef first turns it into U+0627.
    CHECK(cleaned("\u0671\u0628", [](prep::Options& o) { o.map = "none"; }) == "\u0628");
    CHECK(cleaned("\u0671\u0628", [](prep::Options& o) { o.map = "none", o.normalize_alef = true; }) ==
          "\u0627\u0628");
}

TEST_CASE("the characters that cleaning removes and replaces are counted") {
    Run run("\u0628! \u0623?!\n", "poems.txt");
    run.o.normalize_alef = true;
    run.go();
    CHECK(run.r.removed == std::map<uint32_t, size_t>{{'!', 2}, {'?', 1}});
    CHECK(run.r.replaced == 1);
}

TEST_CASE("poems that are empty, too short or equal to an earlier one in any file are dropped") {
    Run run("\u0628 \u062A\n\u0628, \u062A!\n...\n\u062B\n", "a.txt");
    run.o.files.push_back(run.dir / "b.csv");
    write_file(run.dir / "b.csv", "poem_text\n\u0628  \u062A\n\u062C\u062C\u062C\n");
    run.o.min_chars = 2;
    CHECK(run.go().train == Strings{"\u0628 \u062A", "\u062C\u062C\u062C"});
    CHECK(run.r.poems_read == 6);
    CHECK(run.r.duplicates == 2);
    CHECK(run.r.empty == 1);
    CHECK(run.r.too_short == 1);
    CHECK(run.r.sources.size() == 2);
}

TEST_CASE("invalid UTF-8 is an error with file and byte offset, or is skipped and reported") {
    const std::string content = "\xEF\xBB\xBFpoem_text\n\u0628\n\u0628\xD8\n\xFF\n\u062A\n";
    Run run(content);
    std::string e = run.error();
    CHECK(contains(e, strf("poems.csv: invalid UTF-8 at byte %zu (0xD8), in the poem that begins on line 3",
                           content.find("\xD8\n"))));
    CHECK(!file_exists(run.o.out));
    run.o.on_error = "skip";
    CHECK(run.go().train == Strings{"\u0628", "\u062A"});
    CHECK(run.r.invalid == 2);
    REQUIRE(run.r.where_invalid.size() == 2);
    CHECK(contains(run.r.where_invalid[1], "at byte " + std::to_string(content.find('\xFF'))));
    CHECK(contains(Run("\xFF\xFE\x28\x06", "a.txt").error(), "is UTF-16, wanted UTF-8"));
}

// A corpus of n random poems in an alphabet of 20 letters, in which some poems borrow verses from others.
Strings random_poems(size_t n, uint64_t seed) {
    Strings poems;
    rng::Key key(seed, 0, rng::SAMPLE);
    uint64_t draws = 0;
    auto below = [&](size_t m) { return (size_t)(key.uniform(draws++) * (double)m); };
    for (size_t i = 0; i < n; i++) {
        std::string poem;
        for (size_t v = 0, verses = 1 + below(6); v < verses; v++) {
            std::string verse;
            for (size_t k = 0, letters = 10 + below(20); k < letters; k++)
                utf8::append(verse, (uint32_t)(0x0628 + below(20)));
            if (i && below(12) == 0) {  // one to three consecutive verses of an earlier poem
                std::string_view borrowed = poems[below(i)];
                size_t end = 0;
                for (size_t lines = 1 + below(3); lines && end != std::string::npos; lines--)
                    end = borrowed.find('\n', end + (end > 0));
                verse = borrowed.substr(0, end);
            }
            poem += (v ? "\n" : "") + verse;
        }
        poems.push_back(poem);
    }
    return poems;
}
std::string join(const Strings& poems) {
    std::string s;
    for (const std::string& p : poems) s += p + "\n\n";
    return s;
}
// All pairs of consecutive verses, and single verses: those of poems of one verse, or of all poems.
std::set<std::string> pairs_of(const Strings& poems, bool single_poems_only) {
    std::set<std::string> all;
    for (const std::string& p : poems) {
        Strings verses(1);
        for (char c : p) {
            if (c == '\n') verses.push_back("");
            else verses.back() += c;
        }
        for (size_t i = 0; i + 1 < verses.size(); i++) all.insert(verses[i] + "\n" + verses[i + 1]);
        if (!single_poems_only || verses.size() == 1) all.insert(verses.begin(), verses.end());
    }
    return all;
}
// How much of what must not be in both splits is: pairs of consecutive verses, and the verse of a poem of one
// verse as any verse on the other side.
size_t shared_pairs(const Strings& a, const Strings& b) {
    size_t shared = 0;
    for (int side = 0; side < 2; side++) {
        std::set<std::string> x = pairs_of(side ? a : b, true), y = pairs_of(side ? b : a, false);
        for (const std::string& s : x) shared += y.count(s);
    }
    return shared;
}

TEST_CASE("the splits share no pair of verses, lose no poem and have the wanted sizes") {
    for (uint64_t seed = 0; seed < 8; seed++) {
        const Strings poems = random_poems(400, seed);
        Run run(join(poems), "poems.txt");
        run.o.val_fraction = 0.2f, run.o.seed = seed;
        run.go();
        CHECK(shared_pairs(run.train, run.val) == 0);
        CHECK(run.r.families > 0);
        std::set<std::string> in(poems.begin(), poems.end()), out(run.train.begin(), run.train.end());
        out.insert(run.val.begin(), run.val.end());
        CHECK(in == out);
        CHECK(run.train.size() + run.val.size() == in.size());
        double share = (double)run.r.val.chars / (double)(run.r.val.chars + run.r.train.chars);
        CHECK(share == doctest::Approx(0.2).epsilon(0.03));
    }
}

TEST_CASE("the seed fixes the split, and another seed makes another split") {
    const std::string content = join(random_poems(200, 1));
    auto val = [&](uint64_t seed) {
        Run run(content, "poems.txt");
        run.o.val_fraction = 0.1f, run.o.seed = seed;
        return run.go().val;
    };
    CHECK(val(1) == val(1));
    CHECK(val(1) != val(2));
}

TEST_CASE("of two poems each side gets one, whatever the fraction; a single poem is for training") {
    for (float fraction : {0.001f, 0.1f, 0.5f, 0.999f}) {
        Run run("\u0628\u062A\u0628\u0628\n\u062A\u0628\n", "poems.txt");
        run.o.val_fraction = fraction;
        for (bool own_tokenizer : {false, true}) {
            if (own_tokenizer)
                Tokenizer::characters("\u0628\u062A").save(run.o.tokenizer = run.dir / "t.bin");
            run.go();
            CHECK(run.train.size() == 1);
            CHECK(run.val.size() == 1);
        }
    }
    Run run("\u0628\n", "poems.txt");
    run.o.val_fraction = 0.1f;
    run.go();
    CHECK(run.val.empty());
    CHECK(contains(run.r.no_val, "only one poem"));
}

TEST_CASE("a poem with the only occurrence of a character stays in training") {
    for (uint64_t seed = 0; seed < 10; seed++) {
        Strings poems;
        for (uint32_t c = 0x0628; c < 0x063A; c++) {
            std::string p = "\u0627\u0628\n";  // then a letter that this poem shares with one other at most
            utf8::append(p, 0x0628 + (c - 0x0628) / 2), utf8::append(p, c % 2 ? 0x0627 : 0x0628);
            poems.push_back(p);
        }
        poems.push_back("\u0627\u064A");
        Run run(join(poems), "poems.txt");
        run.o.val_fraction = 0.4f, run.o.seed = seed;
        run.go();  // fails to tokenize if val has a character that train lacks
        CHECK(!run.val.empty());
        CHECK(std::count(run.train.begin(), run.train.end(), "\u0627\u064A") == 1);
    }
    Run run("\u0628\n\u062A\n", "poems.txt");
    run.o.val_fraction = 0.5f;
    run.go();
    CHECK(run.train.size() == 2);
    CHECK(contains(run.r.no_val, "a character that no other poem has"));
}

TEST_CASE("without a validation split an older val.bin is removed") {
    Run run("\u0628\u0628\n\u0628\n", "poems.txt");
    run.o.val_fraction = 0.5f;
    run.go();
    CHECK(file_exists(run.o.out + "/val.bin"));
    run.o.val_fraction = 0;
    run.go();
    CHECK(!file_exists(run.o.out + "/val.bin"));
    CHECK(run.train.size() == 2);
}

TEST_CASE("--tokenizer is used unchanged; a character it lacks or a token over 16 bits is an error") {
    Run run("\u0628\u062A\n", "poems.txt");
    run.o.tokenizer = run.dir / "t.bin";
    Tokenizer::characters("xyz\u062A\u0628").save(run.o.tokenizer);
    run.go();
    CHECK(run.train == Strings{"\u0628\u062A"});
    CHECK(read_file(run.o.out + "/tokenizer.bin") == read_file(run.o.tokenizer));
    CHECK(run.r.vocab_size == 6);

    Tokenizer::characters("\u0628").save(run.o.tokenizer);
    std::string e = run.error();
    CHECK(contains(e, "t.bin: cannot tokenize poem 1"));
    CHECK(contains(e, "'\u062A' U+062A at byte 2"));

    std::string many;
    for (uint32_t c = 0x10000; c < 0x21000; c++) utf8::append(many, c);
    Tokenizer::characters(many + "\u0628\u062A").save(run.o.tokenizer);
    CHECK(contains(run.error(), "token 69634 ('<|endoftext|>') does not fit into a token file"));
}

TEST_CASE("poems that several threads tokenize are written in their order; the first error is told") {
    std::string text;
    Strings want;
    auto poem = [](int i) {  // 1 to 40 letters, all poems different
        std::string s;
        for (int k = 0; k < i % 40; k++) s += "\u062A";
        for (int bit = 0; bit < 12; bit++) s += i >> bit & 1 ? "\u0628" : "\u062C";
        return s;
    };
    for (int i = 0; i < 3000; i++) text += poem(i) + "\n", want.push_back(poem(i));
    Run run(text, "poems.txt");
    CHECK(run.go().train == want);
    CHECK(run.r.train.tokens == TokenFile(run.o.out + "/train.bin").size());
    run.o.val_fraction = 0.3f;
    run.go();
    CHECK(run.val.size() > 500);
    std::merge(run.train.begin(), run.train.end(), run.val.begin(), run.val.end(), want.begin(),
               [&](const std::string& a, const std::string& b) {
                   return text.find("\n" + a + "\n") + 1 < text.find("\n" + b + "\n") + 1;
               });
    for (int i = 0; i < 3000; i++) CHECK(want[(size_t)i] == poem(i));

    Run bad(text + "\u062E\n" + text + "\u062F\n", "poems.txt");
    bad.o.tokenizer = bad.dir / "t.bin";
    Tokenizer::characters("\u0628\u062A\u062C").save(bad.o.tokenizer);
    for (int i = 0; i < 5; i++) {
        CHECK(contains(bad.error(), "cannot tokenize poem 3001 of those kept"));
        CHECK(!file_exists(bad.o.out));
    }
}

TEST_CASE("two programs cannot write data into one folder at the same time") {
    TempDir dir;
    DataSetWriter first(dir / "out");
    write_tokens(first.path("train.bin"), {1, 2});
    CHECK(contains(error_of([&] { DataSetWriter second(dir / "out"); }), "is at work in it; wait for it"));
    first.commit();
    CHECK(TokenFile(dir / "out/train.bin").size() == 2);
}

// Saves a byte-level BPE whose tokens are end-of-text, the 256 bytes in order, and the given ones.
void save_bpe(const std::string& path, const Strings& more, bool add_prefix_space = false) {
    Strings tokens = {EOT};
    for (int b = 0; b < 256; b++) tokens.push_back(std::string(1, (char)b));
    tokens.insert(tokens.end(), more.begin(), more.end());
    Tokenizer::byte_bpe(tokens, 0, add_prefix_space, "test").save(path);
}

TEST_CASE("a byte-level BPE tokenizes any poem; only tokens over 16 bits are an error") {
    Run run("\u0628\u062A \u0628!\n\u064A\u064A\n", "poems.txt");
    run.o.tokenizer = run.dir / "t.bin";
    for (bool prefix : {false, true}) {
        save_bpe(run.o.tokenizer, {"\u0628", "\u062A", "\u0628\u062A"}, prefix);
        run.go();
        const std::string space = prefix ? " " : "";
        CHECK(run.train == Strings{space + "\u0628\u062A \u0628", space + "\u064A\u064A"});
        CHECK(run.r.vocab_size == 260);
        CHECK(run.r.train.tokens == (prefix ? 11 : 9));
        Tokenizer t = Tokenizer::load(run.o.out + "/tokenizer.bin");
        size_t chars = 0;
        TokenFile file(run.o.out + "/train.bin");
        for (size_t i = 0; i < file.size(); i++) chars += (size_t)t.chars(file[i]);
        CHECK(chars == run.r.train.chars + run.r.train.poems);
    }

    Strings many(70000);
    for (size_t i = 0; i < many.size(); i++) utf8::append(many[i], (uint32_t)(0x10000 + i));
    many.push_back("\u064A");
    save_bpe(run.o.tokenizer, many);
    CHECK(contains(run.error(), "t.bin: token 70257 ('\u064A') does not fit into a token file"));
}

TEST_CASE("missing or empty files and a corpus emptied by cleaning are errors; nothing is written") {
    Run run("");
    CHECK(contains(run.error(), "poems.csv: is empty"));
    write_file(run.o.files[0], "poem_text\nlatin\n...\n");
    CHECK(contains(run.error(), "nothing is left of 2 poems: 2 empty after cleaning"));
    write_file(run.o.files[0], "poem_text\n");
    CHECK(contains(run.error(), "nothing is left of 0 poems"));
    write_file(run.o.files[0], "\xEF\xBB\xBF");
    CHECK(contains(run.error(), "has no header line"));
    run.o.files = {run.dir / "none.csv"};
    CHECK(contains(run.error(), "none.csv: cannot open"));
    make_dirs(run.dir / "folder"), write_file(run.dir / "folder/empty.txt", "");
    run.o.files = {run.dir / "folder"};
    CHECK(contains(run.error(), "nothing is left of 0 poems"));
    CHECK(!file_exists(run.o.out));
}

TEST_CASE("an output folder that cannot be created is an error") {
    Run run("poem_text\n\u0628\n");
    run.o.out = run.o.files[0];
    CHECK(contains(run.error(), "is not a folder"));
    run.o.out = "/proc/none";
    CHECK(contains(run.error(), "/proc/none"));
}

TEST_CASE("a full disk leaves the old files unchanged and no temporary files") {
    Run run("poem_text\n\u0628\u0628\n\u0628\n");
    run.o.val_fraction = 0.5f;
    run.go();
    Strings before, names = {"train.bin", "val.bin", "tokenizer.bin", "recipe.txt"};
    for (const std::string& n : names) before.push_back(read_file(run.o.out + "/" + n));

    std::string more = "poem_text\n";
    for (int i = 0; i < 3000; i++) more += i % 2 ? "\u0628" : "\u062A";
    write_file(run.o.files[0], more + "\n\u0628\u062A\n");
    auto old_handler = signal(SIGXFSZ, SIG_IGN);
    rlimit old_limit, small;
    getrlimit(RLIMIT_FSIZE, &old_limit);
    small = old_limit, small.rlim_cur = 4000;
    setrlimit(RLIMIT_FSIZE, &small);
    std::string e = run.error();
    setrlimit(RLIMIT_FSIZE, &old_limit);
    signal(SIGXFSZ, old_handler);
    CHECK(contains(e, ".bin: cannot write: File too large"));
    for (size_t i = 0; i < names.size(); i++) CHECK(read_file(run.o.out + "/" + names[i]) == before[i]);
    size_t files = 0;
    for (auto& entry : std::filesystem::directory_iterator(run.o.out)) files += entry.is_regular_file();
    CHECK(files == 4);
}

// Runs the program with these arguments; returns its report, or the error after "usage: " or "error: ".
std::string command(Strings words) {
    std::vector<char*> argv = {(char*)"prepare_data"};
    for (std::string& w : words) argv.push_back(&w[0]);
    fflush(stdout);
    char* text = nullptr;
    size_t size = 0;
    FILE *memory = open_memstream(&text, &size), *old = stdout;
    stdout = memory;
    std::string error;
    try {
        prep::prepare_main((int)argv.size(), argv.data());
    } catch (const UsageError& e) {
        error = std::string("usage: ") + e.what();
    } catch (const Error& e) {
        error = std::string("error: ") + e.what();
    }
    stdout = old;
    fclose(memory);
    std::string said = error.empty() ? text : error;
    free(text);
    return said;
}

TEST_CASE("the program reports counts, files and the next command, and explains usage errors") {
    TempDir dir;
    const std::string poems = dir / "poems.txt", out = dir / "out";
    write_file(poems, "\u0628\u0628!\n\u0628\n\u0628!\n");
    std::string report = command({poems, "-o", out, "--val_fraction=0.2", "--seed", "3"});
    CHECK(contains(report, "read        " + poems + ": 13 B, text, one poem per line, 3 poems\n"));
    CHECK(contains(report, "dropped     1 equal to an earlier poem\n"));
    CHECK(contains(report, "cleaned     2 characters removed: '!' U+0021 2\n"));
    CHECK(contains(report, "train             1          1            2            3    66.7%\n"));
    CHECK(contains(report, "val               1          1            1            2    33.3%\n"));
    CHECK(contains(report, "vocabulary  2 tokens"));
    CHECK(contains(report, "next        ./train_gpt2 --data " + out + "\n"));

    CHECK(contains(command({"-o", out}), "usage: no poems are given"));
    CHECK(contains(command({poems}), "usage: -o DIR is missing"));
    for (const char* flag : {"--format", "--layout", "--keep", "--on_error"})
        CHECK(contains(command({poems, "-o", out, flag, "maybe"}),
                       strf("usage: %s: 'maybe' is unknown; known are ", flag)));
    for (const char* f : {"-0.1", "1", "7"})
        CHECK(contains(command({poems, "-o", out, "--val_fraction", f}), "usage: --val_fraction"));
    CHECK(contains(command({poems, "-o", out, "--min_chars", "0"}), "usage: --min_chars"));
    CHECK(contains(command({poems + "x", "-o", out}), "error: " + poems + "x: cannot open"));
}

TEST_CASE("the corpus of classical poems is prepared without losing a poem or a verse") {
    std::string path = getenv("ARAPOET_CORPUS") ? getenv("ARAPOET_CORPUS") : "../shared/corpus/poems.csv";
    if (!file_exists(path)) {
        skip("no corpus at " + path + "; set ARAPOET_CORPUS to its poems.csv");
        return;
    }
    TempDir dir;
    prep::Options o;
    o.files = {path}, o.out = dir / "out";
    auto start = std::chrono::steady_clock::now();
    prep::Report r = prep::prepare(o);
    printf("corpus: %.2f s\n",
           std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    // The expected counts are from the corpus's README.
    CHECK(r.poems_read == 16631);
    CHECK(r.train.poems + r.val.poems == 16631);
    CHECK(r.train.verses + r.val.verses == 191349);
    size_t removed = 0;
    for (auto& entry : r.removed) removed += entry.second;
    CHECK(removed == 9273286 - 9216865);
    CHECK(r.train.tokens == r.train.chars + r.train.poems);
    CHECK((double)r.val.chars / (double)(r.train.chars + r.val.chars) == doctest::Approx(0.1).epsilon(0.001));
    Tokenizer tok = Tokenizer::load(o.out + "/tokenizer.bin");
    CHECK(shared_pairs(poems_in(o.out + "/train.bin", tok), poems_in(o.out + "/val.bin", tok)) == 0);
}

}  // namespace
