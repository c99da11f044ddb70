// test_score.cpp - tests the measures of score_poems on cases that are small enough to count by hand.
#include <doctest/doctest.h>

#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#endif
#include "dev/ladder/score_poems.cpp"

#include "dev/test_util.h"

namespace {

std::string rhyme(const char* verse, bool last_letter = false) {
    std::string text;
    for (char32_t c : score::rhyme(verse, last_letter)) utf8::append(text, (uint32_t)c);
    return text;
}

// The longest shared run that ends at each character, found by trying all substrings.
std::vector<int> runs_by_trying(const std::string& poem, const score::Poems& training) {
    std::vector<int> runs(poem.size());
    for (size_t end = 0; end < poem.size(); end++)
        for (size_t n = 1; n <= end + 1; n++)
            for (const std::string& t : training)
                if (contains(t, poem.substr(end + 1 - n, n))) runs[end] = (int)n;
    return runs;
}

std::string score_error(std::vector<const char*> words) {
    words.insert(words.begin(), "score_poems");
    return error_of([&] { score::score_main((int)words.size(), const_cast<char**>(words.data())); });
}

}  // namespace

TEST_CASE("a rhyme is the rhyme letter and the vowels or pronoun endings after it") {
    CHECK(rhyme("يا ليل طلت\tفهل تسرع") == "ع");
    CHECK(rhyme("سيرا") == "ار");  // the last letter first: a long vowel after the rhyme letter
    CHECK(rhyme("كتابها") == "اهب");
    CHECK(rhyme("كتابه ") == "هب");
    CHECK(rhyme("مدينة") == rhyme("يمينه"));  // sounds the same at the end of a verse
    CHECK(rhyme("الهوى") == "اوه");           // three letters at most
    CHECK(rhyme("الهوى", true) == "ا");
    CHECK(rhyme("تسرع", true) == "ع");
    CHECK(rhyme("و") == "و");
    CHECK(rhyme("\t ") == "");
}

TEST_CASE("vowel signs, digits and punctuation count neither as letters nor in a rhyme") {
    CHECK(score::letters("قِفَا، نَبْكِ\t(12)!") == 6);
    CHECK(rhyme("فَهَلْ تُسْرِعُ") == "ع");
    CHECK(rhyme("كِتَابُهَا؟ »") == "اهب");
    CHECK(rhyme("سيرًا!", true) == "ا");
    score::Scores s = score::measure({"قِفَا نَبْكِ\nأَبْكَانِي"}, score::Reference({"قفا"}));
    CHECK(s.verses == 2);
    CHECK(s.long_words == 1);  // of 6 letters; the others have 3
    CHECK(s.verse.mean() == 6);
}

TEST_CASE("agreement is the share of verses with their poem's main rhyme, without lone verses") {
    CHECK(score::agreement({{U"a", U"a", U"b", U"a"}, {U"c", U"d"}, {U"e"}}) == doctest::Approx(4.0 / 6));
    CHECK(std::isnan(score::agreement({{U"a"}, {}})));
    CHECK(score::agreement_by_chance({{U"a", U"a"}, {U"a", U"a"}}) == doctest::Approx(1));
    // With two equally frequent rhymes, shuffled, the two verses of a poem rhyme half of the time. Then both
    // agree with the poem's main rhyme, otherwise one of them does: (1 + 1/2) / 2 on average.
    std::vector<std::vector<std::u32string>> poems;
    for (int i = 0; i < 300; i++) poems.push_back({U"a", U"a"}), poems.push_back({U"b", U"b"});
    CHECK(score::agreement(poems) == 1);
    CHECK(score::agreement_by_chance(poems) == doctest::Approx(0.75).epsilon(0.02));
}

TEST_CASE("mean, deviation, quantiles and distance of lengths are those counted by hand") {
    score::Lengths a, b, c;
    for (size_t l : {3, 3, 5, 9}) a.add(l);
    for (size_t l : {4, 4, 6, 10}) b.add(l);
    c.add(9);
    CHECK(a.mean() == 5);
    CHECK(a.sd() == doctest::Approx(std::sqrt(6.0)));
    CHECK(a.quantile(0.5) == 3);
    CHECK(a.quantile(0.51) == 5);
    CHECK(a.quantile(1) == 9);
    CHECK(a.distance(a) == 0);
    CHECK(a.distance(b) == doctest::Approx(1));  // each length in b is one more than in a
    CHECK(a.distance(c) == doctest::Approx((6 + 6 + 4 + 0) / 4.0));
    CHECK(c.distance(a) == doctest::Approx(4));
}

TEST_CASE("the longest shared runs are those that trying all substrings finds, within one poem") {
    rng::Key key(5, 0, rng::SAMPLE);
    uint64_t draw = 0;
    auto text = [&](size_t n, size_t letters) {
        std::string s;
        while (s.size() < n) s += "ab\ncd"[(size_t)(key.uniform(draw++) * (double)letters)];
        return s;
    };
    for (size_t alphabet = 1; alphabet <= 5; alphabet++)
        for (int trial = 0; trial < 20; trial++) {
            score::Poems training = {text(40, alphabet), text(1, alphabet), text(25, alphabet)},
                         poems = {text(30, 5), text(9, alphabet), text(20, alphabet)};
            auto got = score::shared_runs(poems, training);
            REQUIRE(got.size() == poems.size());
            for (size_t i = 0; i < poems.size(); i++) {
                CAPTURE(poems[i]);
                CHECK(got[i] == runs_by_trying(poems[i], training));
            }
        }
    // "ab" ends one training poem and "cd" begins the next; "abcd" occurs in neither.
    CHECK(score::shared_runs({"abcd"}, {"xab", "cdx"})[0] == std::vector<int>{1, 2, 1, 2});
    CHECK(score::shared_runs({"ab", "cd"}, {"abcd"})[1] == std::vector<int>{1, 2});
}

TEST_CASE("texts of more different characters than bytes are compared; the rarest count as equal") {
    std::string rare, frequent;
    for (uint32_t c = 0x4E00; c < 0x4E00 + 300; c++) utf8::append(rare, c);
    for (int i = 0; i < 5; i++) frequent += "قفا نبك من ذكرى حبيب ومنزل\n";
    const std::string verse = "بسقط اللوى بين الدخول فحومل";
    auto runs = score::shared_runs({frequent + verse, rare}, {frequent + rare, verse});
    CHECK(runs[0].back() == 27);
    CHECK(runs[1].back() == 300);
    CHECK(*std::max_element(runs[1].begin(), runs[1].end()) == 300);
    // Of 300 rare characters most have a byte of their own.
    std::string other;
    utf8::append(other, 0x4E00 + 299), utf8::append(other, 0x4E00), utf8::append(other, 0x4E00 + 298);
    CHECK(score::shared_runs({other, frequent}, {frequent + rare})[0][2] < 3);
}

TEST_CASE("the longest shared runs of long and very repetitive texts are found") {
    std::string a(100000, 'a');
    auto runs = score::shared_runs({a, a + "b"}, {std::string(400000, 'a') + "b", a});
    CHECK(runs[0].back() == 100000);
    CHECK(runs[1].back() == 100001);
}

TEST_CASE("a file's scores are those counted by hand") {
    score::Reference ref({"قفا نبك\tمن ذكرى\nحبيب\tومنزل", "قفا"});
    score::Scores s = score::measure({"قفا نبك\tمن ذكرى\nحبيبان\tغريبان بلا\nقفا نبك\tمن ذكرى", "منزل"}, ref);
    CHECK(s.poems == 2);
    CHECK(s.verses == 4);
    CHECK(s.words == 12);
    // All words but حبيبان غريبان بلا منزل; the training text has only ومنزل.
    CHECK(s.known == doctest::Approx(8.0 / 12));
    CHECK(s.long_words == 2);  // حبيبان غريبان
    CHECK(s.long_known == 0);
    CHECK(s.last_letter == 1);                   // ى, ا, ى; the lone verse does not count
    CHECK(s.rhyme == doctest::Approx(2.0 / 3));  // رى, لا, رى
    CHECK(s.two_hemistichs == doctest::Approx(3.0 / 4));
    CHECK(s.repeated == doctest::Approx(1.0 / 4));
    CHECK(s.copied == doctest::Approx(2.0 / 4));
    CHECK(s.verse.mean() == doctest::Approx((12 + 15 + 12 + 4) / 4.0));
    CHECK(s.hemistich.mean() == doctest::Approx((6 + 6 + 6 + 9 + 6 + 6 + 4) / 7.0));
    CHECK(ref.hemistich.quantile(0.025) == 3);
    CHECK(ref.hemistich.quantile(0.975) == 6);
    CHECK(s.usual_length == doctest::Approx(6.0 / 7));  // all but غريبان بلا
    // Runs: the two copied verses, 15 characters with spaces and TAB; حبيب of the second; منزل of the last.
    CHECK(s.mean_run == doctest::Approx((15 + 4 + 15 + 4) / 4.0));
    CHECK(s.longest_run == 20);  // the first verse, the line end, and حبيب
    CHECK(s.longest_text == "قفا نبك\tمن ذكرى\nحبيب");
    // The first poem has hemistichs of 6 6 6 9 6 6 letters, mean 6.5; the second one of 4.
    CHECK(s.evenness == doctest::Approx(std::sqrt((5 * 0.25 + 6.25) / 7)));
}

TEST_CASE("poems are read from the output of sample_gpt2 and ladder, and from token files") {
    TempDir dir;
    Tokenizer t = Tokenizer::characters("قفا نبك\n\t");
    write_file(dir / "samples.txt", "--- 1 ---\nقفا نبك\tقفا\nنبك\n\n--- 2 ---\nنبك\n");
    write_file(dir / "ladder.txt", "قفا نبك\tقفا\nنبك\n\nنبك\n");
    std::vector<uint16_t> tokens;
    for (const char* poem : {"قفا نبك\tقفا\nنبك", "نبك"}) {
        tokens.push_back((uint16_t)t.eot());
        for (int id : t.encode(poem)) tokens.push_back((uint16_t)id);
    }
    write_tokens(dir / "poems.bin", tokens);
    const score::Poems want = {"قفا نبك\tقفا\nنبك", "نبك"};
    for (const char* name : {"samples.txt", "ladder.txt", "poems.bin"}) {
        CAPTURE(name);
        CHECK(score::read_poems(dir / name, t, Recipe()) == want);
    }
    make_dirs(dir / "folder");
    write_file(dir / "folder/1.txt", want[0]), write_file(dir / "folder/2.txt", want[1]);
    CHECK(score::read_poems(dir / "folder", t, Recipe()).size() == 2);
    // --keep all: the titles of sample_gpt2 are no verses, and poems that differ only in them are equal.
    Recipe all;
    all.keep = "all";
    write_file(dir / "all.txt",
               "--- 1 ---\nقفا نبك\nنبك\n\n\n--- 2 ---\nقفا نبك\nنبك\n\n\n--- 13 ---\n\n\n"
               "--- 4 ---\n--- x ---\n--- 5 ---\n");
    CHECK(score::read_poems(dir / "all.txt", t, all) == score::Poems{"قفا نبك\nنبك", "--- x ---\n--- 5 ---"});
    // Lines of a sign within a poem do not end it.
    write_file(dir / "signs.txt", "قفا\n***\nنبك\n\nنبك\n***\n***\nقفا\n");
    CHECK(score::read_poems(dir / "signs.txt", t, all) ==
          score::Poems{"قفا\n***\nنبك", "نبك\n***\n***\nقفا"});
}

TEST_CASE("a data set that did not finish arriving is completed, as by the trainers") {
    TempDir dir;
    make_dirs(dir / ".arriving");
    Tokenizer t = Tokenizer::characters("قفا\n");
    t.save(dir / ".arriving/tokenizer.bin");
    write_tokens(dir / ".arriving/train.bin", {(uint16_t)t.eot(), 0, 1});
    write_file(dir / "poems.txt", "قفا\n");
    const std::string poems = dir / "poems.txt";
    CHECK(score_error({poems.c_str(), "--data", dir.path.c_str()}) == "");
    CHECK(file_exists(dir / "train.bin"));
}

TEST_CASE("--tag names a tag of the data set") {
    TempDir dir;
    Tokenizer t = Tokenizer::characters("قفا\n", {"<|metre=kamil|>", "<|metre=other|>"});
    t.save(dir / "tokenizer.bin");
    write_tokens(dir / "train.bin", {(uint16_t)t.eot(), (uint16_t)t.tag("metre=kamil"), 0, 1});
    const std::string poems = dir / "poems.txt";
    write_file(poems, "قفا\n");
    CHECK(score_error({poems.c_str(), "--data", dir.path.c_str(), "--tag", "metre=kamil"}) == "");
    for (const char* tag : {"metre=x", "metre", "other"})
        CHECK(contains(score_error({poems.c_str(), "--data", dir.path.c_str(), "--tag", tag}),
                       strf("has no tag '%s'", tag)));
}

TEST_CASE("a wrong flag or file of score_poems is an error that names it") {
    TempDir dir;
    CHECK(contains(score_error({}), "no poems are given"));
    CHECK(contains(score_error({"x.txt", "--data", dir.path.c_str()}), dir / "train.bin: not found"));
    Tokenizer t = Tokenizer::characters("قفا\n");
    t.save(dir / "tokenizer.bin");
    write_tokens(dir / "train.bin", {(uint16_t)t.eot(), 0, 1});
    CHECK(
        contains(score_error({"/nowhere/x.txt", "--data", dir.path.c_str()}), "/nowhere/x.txt: cannot open"));
    CHECK(contains(score_error({"x", "--poems", "-1"}), "--poems is -1"));
    std::string poems = dir / "poems.txt", bad = dir / "bad.txt", tokens = dir / "tokens.bin";
    write_file(poems, "قفا نبك\n"), write_file(bad, "\xff\xfe\n"), write_tokens(tokens, {99});
    CHECK(contains(score_error({poems.c_str(), "--skip_last", "--data", dir.path.c_str()}),
                   poems + ": has no poem of two verses"));
    CHECK(contains(score_error({bad.c_str(), "--data", dir.path.c_str()}), bad + ": is UTF-16"));
    CHECK(contains(score_error({tokens.c_str(), "--data", dir.path.c_str()}), tokens + ": token 99"));
}
