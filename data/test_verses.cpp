// test_verses.cpp - rhymes, and poems that keep a wished one.
#include <doctest/doctest.h>

#include "data/verses.h"
#include "dev/test_util.h"

using namespace test;

namespace {

using Strings = std::vector<std::string>;

const char* const LETTERS = "\t\n ابتثجحدرسعفقكلمنهوي";

// A fake model whose logits are the same after every text.
struct Babbler : ::Decoder {
    const Tokenizer& tokenizer;
    std::vector<size_t> lengths;
    Floats logits, out;
    Babbler(const Tokenizer& t, size_t N) : tokenizer(t), lengths(N), logits((size_t)t.vocab_size()) {
        likely(" ", 1.5f), likely("\t", 0.5f), likely("\n", -0.5f);
        logits[(size_t)t.eot()] = -1;
    }
    void likely(const std::string& token, float logit) {
        for (int t = 0; t < tokenizer.vocab_size(); t++)
            if (tokenizer.bytes(t) == token) logits[(size_t)t] = logit;
    }
    size_t sequences() const override { return lengths.size(); }
    size_t capacity() const override { return 10000; }
    size_t length(size_t s = 0) const override { return lengths[s]; }
    void truncate(size_t s, size_t length) override { lengths[s] = std::min(lengths[s], length); }
    const float* append(const std::vector<size_t>& which, const int*, size_t n) override {
        out.clear();
        for (size_t s : which) lengths[s] += n, out.insert(out.end(), logits.begin(), logits.end());
        return out.data();
    }
};

// Poems that a babbler writes to a wish, and their keepers.
struct Written {
    std::vector<verses::Keeper> keepers;
    Strings poems;
    Written(const Tokenizer& t, Babbler& model, const verses::Wish& wish, const std::string& prompt = "",
            uint64_t seed = 1, int tokens = 3000) {
        std::vector<int> start = {t.eot()};
        for (int id : t.encode(prompt)) start.push_back(id);
        const size_t N = model.sequences();
        std::vector<Steering*> steering;
        keepers.reserve(N), poems.assign(N, prompt);
        for (size_t i = 0; i < N; i++)
            keepers.emplace_back(t, wish, start, 1), steering.push_back(&keepers[i]);
        SampleOptions o;
        o.temperature = 1;
        generate(
            model, N, start, t.vocab_size(), t.eot(), tokens, seed, o,
            [&](size_t i, int token) { poems[i] += t.bytes(token); }, steering);
    }
    Strings verses_of(size_t i) const {
        Strings all;
        verses::for_each_piece(poems[i], "\n", [&](std::string_view v) {
            if (verses::letters(v)) all.emplace_back(v);
        });
        return all;
    }
};

std::string letters_of(const std::u32string& rhyme) {
    std::string s;
    for (auto c = rhyme.rbegin(); c != rhyme.rend(); ++c) utf8::append(s, (uint32_t)*c);
    return s;
}
std::string rhyme_of(const std::string& verse) { return letters_of(verses::rhyme(verse, false)); }

}  // namespace

TEST_CASE("a rhyme begins at the last letter that is no long vowel or ending, without vowel signs") {
    CHECK(rhyme_of("تسرع") == "ع");
    CHECK(rhyme_of("كتابها") == "بها");
    CHECK(rhyme_of("مدينة") == rhyme_of("يمينه"));
    CHECK(rhyme_of("تُسْرِعُ!") == "ع");
    CHECK(verses::letters("قِفا نَبْكِ\t12 -") == 6);
}

TEST_CASE("all verses of a poem keep the wished rhyme, and the same vowels after it; a seed repeats them") {
    const Tokenizer t = Tokenizer::characters(LETTERS);
    Babbler model(t, 6);
    for (const char* wish : {"ب", "با", "ان", "ها", "auto"}) {
        CAPTURE(wish);
        const std::string asked = wish;
        Written w(t, model, {6, wish}), again(t, model, {6, wish}), other(t, model, {6, wish}, "", 2);
        CHECK(w.poems == again.poems);
        CHECK(w.poems != other.poems);
        size_t redraws = 0, failures = 0;
        for (size_t i = 0; i < 6; i++) {
            const Strings poem = w.verses_of(i);
            CHECK(poem.size() == 6);
            CHECK(w.keepers[i].count() == 6);
            redraws += w.keepers[i].redraws();
            const std::string first = rhyme_of(poem[0]);
            CHECK(w.keepers[i].rhyme() == (asked == "ان" ? asked : first));
            if (asked == "ب") CHECK(first.substr(0, 2) == "ب");
            std::vector<size_t> unrhymed;
            for (size_t k = 0; k < poem.size(); k++)
                if (rhyme_of(poem[k]) != first) unrhymed.push_back(k + 1);
            CHECK(w.keepers[i].unrhymed() == unrhymed);  // babble has rhymes that are next to impossible
            failures += unrhymed.size();
            if (asked == "با" || asked == "ان" || asked == "ها")
                for (size_t k = 0; k < poem.size(); k++) {
                    const std::u32string all = verses::rhyme_letters(poem[k]),
                                         end = verses::rhyme_letters(asked);
                    const bool named = std::count(unrhymed.begin(), unrhymed.end(), k + 1) > 0;
                    CHECK((named || (all.size() >= 2 && all.substr(all.size() - 2) == end)));
                }
        }
        CHECK(failures <= (asked == "auto" ? 6 : asked == "ها" ? 3 : 0));
        CHECK(redraws > 20);
    }
}

TEST_CASE("a rhyme that no try has is told: the verse stays, the poem goes on") {
    const Tokenizer t = Tokenizer::characters(std::string(LETTERS) + "ظ");
    Babbler model(t, 1);
    model.likely("ظ", -INFINITY);
    Written w(t, model, {3, "ظ"});
    CHECK(w.verses_of(0).size() == 3);
    CHECK(w.keepers[0].unrhymed() == std::vector<size_t>{1, 2, 3});
    CHECK(w.keepers[0].redraws() == 3 * verses::Keeper::MOST_TRIES);
}

TEST_CASE(
    "verses of the prompt that do not rhyme stay and are told; an unfinished one is completed to rhyme") {
    const Tokenizer t = Tokenizer::characters(LETTERS);
    Babbler model(t, 3);
    const std::string prompt = "قف باب\nسرنا دار\n\nنبك كتاب\n";
    Written w(t, model, {4, "auto"}, prompt + "لم"), other(t, model, {4, "ر"}, prompt),
        free(t, model, {4, ""}, prompt), whole(t, model, {2, "ر"}, "قف باب\nسرنا دار\n");
    for (size_t i = 0; i < 3; i++) {
        CHECK(w.keepers[i].unrhymed() == std::vector<size_t>{2});
        CHECK(w.keepers[i].given() == 3);
        CHECK(w.poems[i].rfind(prompt + "لم", 0) == 0);
        CHECK(rhyme_of(w.verses_of(i)[3]) == "ب");
        CHECK(other.keepers[i].unrhymed() == std::vector<size_t>{1, 3});
        CHECK(rhyme_of(other.verses_of(i)[3]) == "ر");
        CHECK(free.keepers[i].unrhymed().empty());
        CHECK(whole.keepers[i].unrhymed() == std::vector<size_t>{1});
    }
}

TEST_CASE("a poem ends after the wished number of verses, those of the prompt included, and not before") {
    const Tokenizer t = Tokenizer::characters(LETTERS);
    Babbler model(t, 3);
    model.likely("<|endoftext|>", 3);  // the model would end at once
    for (const char* rhyme : {"", "ب"}) {
        for (int verses : {1, 2, 5}) {
            Written w(t, model, {verses, rhyme}, "");
            for (size_t i = 0; i < 3; i++) CHECK((int)w.verses_of(i).size() == verses);
        }
        Written w(t, model, {4, rhyme}, "قف باب\tنبك كتاب\nسرنا\tباب\nلم");
        for (size_t i = 0; i < 3; i++) {
            CHECK(w.verses_of(i).size() == 4);
            CHECK(w.keepers[i].count() == 4);
        }
    }
    // Where the prompt has them all, nothing is written.
    CHECK(Written(t, model, {2, "ب"}, "قف باب\nنبك كتاب\n").poems[0] == "قف باب\nنبك كتاب\n");
    // Where the prompt's verses have a rhyme, that is the one that is kept.
    Written w(t, model, {4, "auto"}, "قف\tنبك كتابي\n");
    for (const std::string& v : w.verses_of(0)) CHECK(rhyme_of(v) == "بي");
}

TEST_CASE("guided verses keep two hemistichs, and lengths near those of the first tries") {
    const Tokenizer t = Tokenizer::characters(LETTERS);
    Babbler model(t, 20);
    model.likely("\n", -1), model.likely("ث", -3);  // so that most verses are guided
    Written plain(t, model, {5, ""}, "كم\tلم\n"), w(t, model, {5, "ث"}, "كم\tلم\n");
    size_t divided = 0, all = 0, letters = 0, plain_letters = 0, rhymed = 0;
    for (size_t i = 0; i < 20; i++) {
        Strings poem = w.verses_of(i), free = plain.verses_of(i);
        for (size_t k = 1; k < poem.size(); k++) {
            all++, divided += poem[k].find('\t') != std::string::npos, letters += verses::letters(poem[k]);
            rhymed += rhyme_of(poem[k]).substr(0, 2) == "ث", plain_letters += verses::letters(free[k]);
        }
    }
    CHECK(all == 80);
    CHECK(rhymed >= 76);
    CHECK(divided >= 64);
    CHECK((double)letters / (double)plain_letters > 0.8);
    CHECK((double)letters / (double)plain_letters < 1.25);
}

TEST_CASE("tokens of several letters and of parts of letters keep a rhyme, too") {
    Strings tokens = {"<|endoftext|>"};
    for (int b = 0; b < 256; b++) tokens.push_back(std::string(1, (char)b));
    for (const char* s : {"ب", "ت", "ا", "با"}) tokens.push_back(s);
    tokens.push_back(" ب"), tokens.push_back(" ت");
    const Tokenizer t = Tokenizer::byte_bpe(tokens, 0, false, "test");
    Babbler model(t, 4);
    std::fill(model.logits.begin(), model.logits.end(), -INFINITY);
    for (const char* s : {"ب", "ت", "ا", "با", " ب", " ت"}) model.likely(s, 0);
    model.likely("\n", 0.5f), model.likely("\t", -1);
    Written w(t, model, {5, "با"});
    for (size_t i = 0; i < 4; i++) {
        CHECK(w.verses_of(i).size() == 5);
        for (const std::string& v : w.verses_of(i)) CHECK(rhyme_of(v) == "با");
    }
    // Bytes that form no character are passed over.
    model.likely("\xD8", 0), model.likely("\xA8", 0);
    Written stray(t, model, {5, "با"});
    for (size_t i = 0; i < 4; i++) {
        CHECK(stray.keepers[i].count() == 5);
        CHECK(utf8::find_invalid(stray.poems[i]) != utf8::VALID);
    }
}

TEST_CASE("a wish that is no rhyme is an error that says what is wanted") {
    const Tokenizer t = Tokenizer::characters(LETTERS);
    CHECK(verses::Wish{0, "بِـ"}.error() == "");
    for (const char* wish : {"z", " ", "12", "é", "ا1", "ـ", "ابتابتابت"})
        CHECK(error_of([&] {
                  verses::Keeper(t, {0, wish}, {t.eot()}, 1);
              }) == strf("'%s' is not a rhyme, wanted auto or 1 to 8 Arabic letters", wish));
}

TEST_CASE("a wished rhyme is cleaned as a prompt is, and letters that the model does not know are named") {
    const Tokenizer t = Tokenizer::characters(" ابر"), parts = [] {
        Strings tokens = {"<|endoftext|>"};
        for (int b = 0; b < 256; b++) tokens.push_back(std::string(1, (char)b));
        return Tokenizer::byte_bpe(tokens, 0, false, "test");
    }();
    const std::optional<Recipe> recipe = Recipe();
    for (const char* wish : {"", "auto", "ر", "ابر"}) CHECK(verses::rhyme_for(wish, t, recipe) == wish);
    CHECK(verses::rhyme_for("رِ", t, recipe) == "ر");
    CHECK(verses::rhyme_for("\uFE8F", t, recipe) == "ب");  // a form of the letter
    CHECK(verses::rhyme_for("ظ", parts, {}) == "ظ");
    CHECK(error_of([&] { verses::rhyme_for("ظبع", t, recipe); }) ==
          "'ظبع' has letters that the model does not know: ظع; it knows ابر");
    CHECK(contains(error_of([&] { verses::rhyme_for("\uFE8F", t, {}); }), "does not know: \uFE8F"));
    CHECK(contains(error_of([&] { verses::rhyme_for("z", t, recipe); }), "'z' is not a rhyme"));
    CHECK(error_of([&] { verses::rhyme_for("گ", parts, recipe); }) ==  // the cleaning removes it
          "'گ' has letters that the model does not know: گ");
    const std::string ligature = "\uFDF3";  // of four letters
    CHECK(verses::rhyme_for(ligature, Tokenizer::characters(" اكبر"), recipe) == "اكبر");
    CHECK(contains(error_of([&] {
                       verses::rhyme_for(ligature + ligature + ligature, Tokenizer::characters(" اكبر"),
                                         recipe);
                   }),
                   "'اكبراكبراكبر' is not a rhyme"));
}
