// score_poems.cpp - measures how well generated poems imitate real ones, as far as letters without vowel
// signs show it.
//
//     ./score_poems poems.txt out/data/val.bin --data out/data
//
// Compares poems with the training text (--data: train.bin, decoded with tokenizer.bin) and prints a Markdown
// table with a column for each file. A file is text with blank lines between poems (what ./sample_gpt2 and
// ./ladder write), a CSV, or a token file with poems between end-of-text tokens; val.bin has real poems that
// the model has not seen. A line is a verse (bayt), and a TAB separates its two hemistichs.
//
// The measures:
//   words known       share of the words that occur in the training text. Even real poems have unknown words,
//                     because Arabic joins articles, prepositions and pronouns to the word. It is also given
//                     for words of at least 5 letters, because random short ones often exist by chance.
//   last letter       share of the verses that end in the most frequent last letter of their poem, in poems
//                     of at least two verses. ة counts as ه, which it sounds like in this place, and ى as ا.
//   rhyme             the same for the whole rhyme. An Arabic rhyme is built on one consonant, which a long
//                     vowel or a pronoun ending may follow. So the rhyme is taken to begin at the last letter
//                     other than ا و ي ه, and to have three letters at most: كتابها rhymes in بها, سيرا in
//                     را, تسرع in ع. This is stricter than the real rules, in which ه and the long vowels can
//                     be rhyme letters, too.
//   by chance         the same measure after the verse endings of all poems in the file have been shuffled
//   two hemistichs    share of the verses that have exactly two hemistichs
//   letters           letters in a verse and in a hemistich, without spaces: mean and standard deviation
//   usual length      share of the hemistichs, and of the verses, whose length is in the middle 95% of the
//                     training text's, or of those of its poems that have the tag of --tag
//   distance          earth mover's distance between the hemistichs' lengths and the training text's: how
//   many
//                     letters per hemistich would have to be added or removed, on average, to turn one
//                     distribution into the other
//   evenness          standard deviation of the hemistichs' lengths within a poem; metre keeps it small
//   repeated          share of the verses that also occur earlier in the file
//   copied            share of the verses that also occur in the training text
//   longest run       longest run of characters, including spaces and line ends, that also occurs in the
//                     training text: the longest of all, and the mean over the verses of the longest run that
//                     ends in the verse and begins in the same verse
#include <map>
#include <unordered_set>

#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#define SCORE_MAIN
#endif
#include "data/prepare_data.cpp"

namespace score {

using Poems = std::vector<std::string>;

// ---------------------------------------------------------------------------------------------
// Dividing text into verses, hemistichs, words and letters

// Splits the text at each character of `at` and calls f(piece) for each piece that is not empty.
template <class F>
void for_each_piece(std::string_view text, const char* at, F f) {
    for (size_t i = 0; (i = text.find_first_not_of(at, i)) != text.npos;) {
        size_t end = std::min(text.find_first_of(at, i), text.size());
        f(text.substr(i, end - i));
        i = end;
    }
}
inline bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n'; }
inline size_t letters(std::string_view text) {
    return utf8::count(text) - (size_t)std::count_if(text.begin(), text.end(), is_space);
}

// The letters of a verse's rhyme, the last one first, as the head of this file defines them. Empty for a
// verse without letters.
inline std::u32string rhyme(std::string_view verse, bool last_letter_only) {
    std::u32string all, found;
    utf8::for_each(verse, [&](uint32_t c, size_t) {
        if (c < 0x80) return;
        all += c == 0x0629 ? U'\u0647' : c == 0x0649 ? U'\u0627' : (char32_t)c;
    });
    while (!all.empty() && found.size() < 3) {
        char32_t c = all.back();
        all.pop_back(), found += c;
        bool ending =
            c == U'\u0627' || c == U'\u0648' || c == U'\u064A' || c == U'\u0647';  // alif, waw, ya, ha
        if (last_letter_only || !ending) break;
    }
    return found;
}

// ---------------------------------------------------------------------------------------------
// Runs of characters that two texts share

// The suffix automaton (Blumer et al. 1985) of a text over the bytes below `alphabet`. Every substring of the
// text, and nothing else, spells a path from state 0. A state stands for all substrings that end at the same
// places of the text; each of them is a suffix of the longest. A state's link leads to the state of the
// longest suffix that ends at other places, too. The automaton has at most two states per character and is
// built in one pass. Another text can then be read through it in one pass, so that the time is linear in the
// sum of both lengths and the memory in this text's length.
class SuffixAutomaton {
  public:
    SuffixAutomaton(const std::string& text, size_t alphabet) : A_(alphabet) {
        states_.reserve(2 * text.size() + 1), next_.reserve((2 * text.size() + 1) * A_);
        add({0, -1, 0});
        int last = 0;
        for (char ch : text) {
            size_t c = (unsigned char)ch;
            int cur = add({states_[last].length + 1, 0, 0}), p = last;
            for (; p >= 0 && next(p, c) < 0; p = states_[p].link) next(p, c) = cur;
            if (p >= 0) {
                int q = next(p, c);
                if (states_[q].length == states_[p].length + 1) {
                    states_[cur].link = q;
                } else {
                    // With this character, only the shorter strings of state q end at a new place. They
                    // become a separate state.
                    int clone = add({states_[p].length + 1, states_[q].link, 0});
                    std::copy_n(&next(q, 0), A_, &next(clone, 0));
                    for (; p >= 0 && next(p, c) == q; p = states_[p].link) next(p, c) = clone;
                    states_[q].link = states_[cur].link = clone;
                }
            }
            last = cur;
        }
    }
    // Reads another text and notes for each state the longest of its strings that occurs there.
    void read(const std::string& other) {
        int s = 0, length = 0;
        for (char ch : other) {
            size_t c = (unsigned char)ch;
            while (s > 0 && next(s, c) < 0) s = states_[s].link, length = states_[s].length;
            if (next(s, c) >= 0) s = next(s, c), length++;
            states_[s].seen = std::max(states_[s].seen, length);
        }
    }
    // For each place of the automaton's text, the length of the longest run that ends there and that
    // read() has seen.
    std::vector<int> longest_runs(const std::string& text) {
        // If a string of a state was seen, then all strings of its link, which are suffixes of it, were seen,
        // too. And the longest suffix that was seen of an unseen state's string is that of its link.
        std::vector<int> order(states_.size());
        std::iota(order.begin(), order.end(), 0);
        std::sort(order.begin(), order.end(),
                  [&](int a, int b) { return states_[a].length > states_[b].length; });
        for (int s : order)
            if (states_[s].seen && states_[s].link > 0)
                states_[states_[s].link].seen = states_[states_[s].link].length;
        std::reverse(order.begin(), order.end());
        for (int s : order)
            if (s && !states_[s].seen) states_[s].seen = states_[states_[s].link].seen;
        std::vector<int> runs;
        int s = 0;
        for (char ch : text) s = next(s, (unsigned char)ch), runs.push_back(states_[s].seen);
        return runs;
    }

  private:
    struct State {
        int length;  // of the state's longest string
        int link;    // the state of its longest suffix that belongs to another state
        int seen;    // length of the longest string that read() has seen; 0: none
    };
    int add(State s) {
        states_.push_back(s), next_.resize(next_.size() + A_, -1);
        return (int)states_.size() - 1;
    }
    int& next(int s, size_t c) { return next_[(size_t)s * A_ + c]; }

    size_t A_;
    std::vector<State> states_;
    std::vector<int> next_;
};

// For each character of each poem, the longest run that ends there, lies in the poem, and occurs in
// a training poem.
inline std::vector<std::vector<int>> shared_runs(const Poems& poems, const Poems& training) {
    constexpr char TRAINING_END = 0, POEM_END = 1;  // different, so that no shared run crosses a poem's end
    constexpr size_t BATCH =
        50000;  // bytes of poems per automaton, so that its memory does not grow with them
    std::map<uint32_t, unsigned char> byte_of;  // the characters, numbered from 2
    auto encode = [&](const std::string& poem, std::string& bytes) {
        utf8::for_each(poem, [&](uint32_t c, size_t) {
            auto [at, is_new] = byte_of.insert({c, (unsigned char)(byte_of.size() + 2)});
            if (is_new && byte_of.size() > 253)
                fail("the texts have more than 253 different characters, too many to compare");
            bytes += (char)at->second;
        });
    };
    std::string corpus;
    for (const std::string& p : training) encode(p, corpus), corpus += TRAINING_END;
    std::vector<std::vector<int>> all;
    for (size_t i = 0; i < poems.size();) {
        std::string text;
        std::vector<size_t> ends;
        for (; i < poems.size() && text.size() < BATCH; i++)
            encode(poems[i], text), text += POEM_END, ends.push_back(text.size());
        SuffixAutomaton automaton(text, byte_of.size() + 2);
        automaton.read(corpus);
        std::vector<int> runs = automaton.longest_runs(text);
        for (size_t k = 0; k < ends.size(); k++)
            all.emplace_back(runs.begin() + (ptrdiff_t)(k ? ends[k - 1] : 0),
                             runs.begin() + (ptrdiff_t)ends[k] - 1);
    }
    return all;
}

// ---------------------------------------------------------------------------------------------
// Measuring

// A distribution of lengths: how often each number of letters occurs.
struct Lengths {
    std::map<size_t, size_t> times;
    size_t n = 0;
    void add(size_t length) { times[length]++, n++; }
    double mean() const {
        double sum = 0;
        for (auto [l, k] : times) sum += (double)l * (double)k;
        return sum / (double)std::max<size_t>(n, 1);
    }
    double sd() const {
        double sum = 0, m = mean();
        for (auto [l, k] : times) sum += ((double)l - m) * ((double)l - m) * (double)k;
        return std::sqrt(sum / (double)std::max<size_t>(n, 1));
    }
    // The smallest length that a share of at least q does not exceed.
    size_t quantile(double q) const {
        size_t sum = 0;
        for (auto [l, k] : times)
            if ((double)(sum += k) >= q * (double)n) return l;
        return 0;
    }
    // Earth mover's distance in one dimension: the area between the two cumulative distributions.
    double distance(const Lengths& other) const {
        double a = 0, b = 0, area = 0;
        size_t most = std::max(times.empty() ? 0 : times.rbegin()->first,
                               other.times.empty() ? 0 : other.times.rbegin()->first);
        auto share = [](const Lengths& x, size_t l) {
            auto at = x.times.find(l);
            return at == x.times.end() ? 0 : (double)at->second / (double)x.n;
        };
        for (size_t l = 0; l < most; l++)
            a += share(*this, l), b += share(other, l), area += std::fabs(a - b);
        return area;
    }
};

// The training text and its words, verses and lengths, to compare with. The lengths are of the poems for
// which `measured` is true.
struct Reference {
    Poems poems;
    std::unordered_set<std::string> words, verses;
    Lengths verse, hemistich;
    explicit Reference(Poems p, const std::vector<bool>& measured = {}) : poems(std::move(p)) {
        for (size_t i = 0; i < poems.size(); i++) {
            const std::string& poem = poems[i];
            const bool lengths = measured.empty() || measured[i];
            for_each_piece(poem, " \t\n", [&](std::string_view w) { words.emplace(w); });
            for_each_piece(poem, "\n", [&](std::string_view v) {
                verses.emplace(v);
                if (lengths) verse.add(letters(v));
            });
            if (lengths) for_each_piece(poem, "\t\n", [&](std::string_view h) { hemistich.add(letters(h)); });
        }
    }
};

struct Scores {
    size_t poems = 0, verses = 0, words = 0, long_words = 0;
    // Shares from 0 to 1, or NaN if there is nothing to count
    double known = 0, long_known = 0, last_letter = 0, last_letter_chance = 0, rhyme = 0, rhyme_chance = 0;
    double two_hemistichs = 0, usual_length = 0, usual_verse = 0, repeated = 0, copied = 0;
    Lengths verse, hemistich;
    double distance = 0, evenness = 0, mean_run = 0;
    size_t longest_run = 0;
    std::string longest_text;
};

// Share of the verses that have their poem's most frequent rhyme, in poems of at least two verses.
inline double agreement(const std::vector<std::vector<std::u32string>>& poems) {
    size_t agree = 0, all = 0;
    for (const auto& rhymes : poems) {
        if (rhymes.size() < 2) continue;
        std::map<std::u32string, size_t> times;
        size_t most = 0;
        for (const auto& r : rhymes) most = std::max(most, ++times[r]);
        agree += most, all += rhymes.size();
    }
    return all ? (double)agree / (double)all : NAN;
}
// The same after the verses' rhymes have been shuffled among all poems; the mean of 20 times.
inline double agreement_by_chance(std::vector<std::vector<std::u32string>> poems) {
    std::vector<std::u32string> all;
    for (const auto& rhymes : poems)
        if (rhymes.size() > 1) all.insert(all.end(), rhymes.begin(), rhymes.end());
    double sum = 0;
    for (uint32_t k = 0; k < 20; k++) {
        rng::shuffle(all.data(), all.size(), rng::Key(1, k, rng::SHUFFLE));
        size_t i = 0;
        for (auto& rhymes : poems)
            if (rhymes.size() > 1)
                for (auto& r : rhymes) r = all[i++];
        sum += agreement(poems) / 20;
    }
    return sum;
}

// All measures of the poems, compared with the training text.
inline Scores measure(const Poems& poems, const Reference& ref) {
    Scores s;
    auto share = [](size_t part, size_t all) { return all ? (double)part / (double)all : NAN; };
    std::vector<std::vector<std::u32string>> last, rhymes;
    std::unordered_set<std::string> before;
    size_t known = 0, long_known = 0, two = 0, usual = 0, repeated = 0, copied = 0, runs = 0,
           lo = ref.hemistich.quantile(0.025), hi = ref.hemistich.quantile(0.975), usual_verses = 0,
           verse_lo = ref.verse.quantile(0.025), verse_hi = ref.verse.quantile(0.975);
    double within = 0;
    std::vector<std::vector<int>> shared = shared_runs(poems, ref.poems);
    for (size_t i = 0; i < poems.size(); i++) {
        const std::string& poem = poems[i];
        s.poems++;
        for_each_piece(poem, " \t\n", [&](std::string_view w) {
            bool found = ref.words.count(std::string(w)), is_long = utf8::count(w) >= 5;
            s.words++, known += found, s.long_words += is_long, long_known += is_long && found;
        });
        Lengths here;
        last.emplace_back(), rhymes.emplace_back();
        size_t at = 0;  // the position of the verse's first character in the poem
        for (size_t begin = 0, end; begin <= poem.size(); begin = end + 1) {
            end = std::min(poem.find('\n', begin), poem.size());
            std::string_view v(poem.data() + begin, end - begin);
            size_t chars = utf8::count(v), hemistichs = 0;
            if (letters(v)) {
                s.verses++, s.verse.add(letters(v));
                usual_verses += letters(v) >= verse_lo && letters(v) <= verse_hi;
                for_each_piece(v, "\t", [&](std::string_view h) {
                    size_t n = letters(h);
                    hemistichs++, here.add(n), s.hemistich.add(n), usual += n >= lo && n <= hi;
                });
                two += hemistichs == 2;
                last.back().push_back(rhyme(v, true)), rhymes.back().push_back(rhyme(v, false));
                repeated += !before.emplace(v).second, copied += ref.verses.count(std::string(v));
                size_t longest = 0;
                for (size_t k = 0; k < chars; k++)
                    longest = std::max(longest, std::min(k + 1, (size_t)shared[i][at + k]));
                runs += longest;
            }
            at += chars + 1;
        }
        within += here.sd() * here.sd() * (double)here.n;
        for (size_t k = 0; k < shared[i].size(); k++) {
            if ((size_t)shared[i][k] <= s.longest_run) continue;
            s.longest_run = (size_t)shared[i][k], s.longest_text.clear();
            size_t number = 0;
            utf8::for_each(poem, [&](uint32_t c, size_t) {
                if (number + s.longest_run > k && number <= k) utf8::append(s.longest_text, c);
                number++;
            });
        }
    }
    s.known = share(known, s.words), s.long_known = share(long_known, s.long_words);
    s.last_letter = agreement(last), s.last_letter_chance = agreement_by_chance(last);
    s.rhyme = agreement(rhymes), s.rhyme_chance = agreement_by_chance(rhymes);
    s.two_hemistichs = share(two, s.verses), s.usual_length = share(usual, s.hemistich.n);
    s.usual_verse = share(usual_verses, s.verses);
    s.repeated = share(repeated, s.verses), s.copied = share(copied, s.verses),
    s.mean_run = share(runs, s.verses);
    s.distance = s.hemistich.distance(ref.hemistich),
    s.evenness = std::sqrt(within / (double)std::max<size_t>(s.hemistich.n, 1));
    return s;
}

// ---------------------------------------------------------------------------------------------
// The program

inline bool is_token_file(const std::string& path) {
    Reader in(path);
    int32_t magic = 0;
    if (in.size >= 1024) in.read(&magic, 4, "magic number");
    return magic == TOKEN_FILE_MAGIC;
}
// The poems of a token file. has_tag, if given, becomes true for each that has the tag with this token.
inline Poems decode_tokens(const std::string& path, const Tokenizer& tokenizer, int tag = -1,
                           std::vector<bool>* has_tag = nullptr) {
    TokenFile file(path);
    file.check_vocab(tokenizer.vocab_size());
    Poems poems;
    std::string poem;
    bool tagged = false;
    for (size_t i = 0; i <= file.size(); i++) {
        if (i == file.size() || file[i] == tokenizer.eot()) {
            if (!poem.empty()) {
                poems.push_back(poem);
                if (has_tag) has_tag->push_back(tagged);
            }
            poem.clear(), tagged = false;
        } else if (file[i] >= tokenizer.first_tag()) {
            tagged = tagged || file[i] == tag;
        } else {
            poem += tokenizer.bytes(file[i]);
        }
    }
    return poems;
}
// Poems from a token file, or from any file that ./prepare_data reads, cleaned by the training text's recipe.
inline Poems read_poems(const std::string& path, const Tokenizer& tokenizer, const Recipe& recipe) {
    if (path != "-" && is_token_file(path)) return decode_tokens(path, tokenizer);
    prep::Options o;
    static_cast<Recipe&>(o) = recipe;
    o.hemistich_separator = "auto";
    o.layout = "blank", o.on_error = "skip";
    prep::Report report;
    prep::Collector collector(o, report);
    collector.read_file(path);
    if (report.duplicates)
        printf("%s: %zu poems are equal to an earlier one and are not counted\n", path.c_str(),
               report.duplicates);
    Poems poems;
    for (const prep::Poem& p : collector.poems) poems.push_back(p.text);
    return poems;
}

// One row for each measure, one column for each file.
inline std::string table(const std::vector<std::pair<std::string, Scores>>& columns) {
    std::string t = "| |", line = "| --- |";
    for (auto& [name, s] : columns) t += " " + name + " |", line += " --- |";
    t += "\n" + line + "\n";
    auto row = [&](const char* name, auto cell) {
        t += strf("| %s |", name);
        for (auto& column : columns) t += " " + cell(column.second) + " |";
        t += "\n";
    };
    auto percent = [](double x) { return x == x ? strf("%.1f%%", 100 * x) : std::string("-"); };
    row("poems, verses, words",
        [](const Scores& s) { return commas(s.poems) + ", " + commas(s.verses) + ", " + commas(s.words); });
    row("words known", [&](const Scores& s) { return percent(s.known); });
    row("words known, of 5 letters and more", [&](const Scores& s) { return percent(s.long_known); });
    row("last letter agrees (by chance)",
        [&](const Scores& s) { return percent(s.last_letter) + " (" + percent(s.last_letter_chance) + ")"; });
    row("rhyme agrees (by chance)",
        [&](const Scores& s) { return percent(s.rhyme) + " (" + percent(s.rhyme_chance) + ")"; });
    row("verses of two hemistichs", [&](const Scores& s) { return percent(s.two_hemistichs); });
    row("letters in a verse",
        [](const Scores& s) { return strf("%.1f ± %.1f", s.verse.mean(), s.verse.sd()); });
    row("letters in a hemistich",
        [](const Scores& s) { return strf("%.1f ± %.1f", s.hemistich.mean(), s.hemistich.sd()); });
    row("hemistichs of usual length", [&](const Scores& s) { return percent(s.usual_length); });
    row("verses of usual length", [&](const Scores& s) { return percent(s.usual_verse); });
    row("distance from the usual lengths", [](const Scores& s) { return strf("%.2f", s.distance); });
    row("evenness within a poem", [](const Scores& s) { return strf("%.2f", s.evenness); });
    row("repeated verses", [&](const Scores& s) { return percent(s.repeated); });
    row("copied verses", [&](const Scores& s) { return percent(s.copied); });
    row("longest run in a verse, mean", [](const Scores& s) { return strf("%.1f", s.mean_run); });
    row("longest run of all", [](const Scores& s) { return std::to_string(s.longest_run); });
    return t;
}

inline int score_main(int argc, char** argv) {
    std::vector<std::string> files;
    std::string data = "out/data", tag;
    int most = 0;
    bool skip_last = false;
    Flags f("score_poems", "compares poems with the text that their model was trained on");
    f.positional(&files, "poems.txt [more files]");
    f.add("data", "", &data, "DIR",
          "folder made by ./prepare_data, with the training text train.bin and with tokenizer.bin");
    f.add(
        "tag", "", &tag, "COL=VALUE",
        "compare lengths with those training poems that have this tag (./prepare_data --tags), e.g. a metre");
    f.add("poems", "", &most, "N", "only the first N poems of each file; 0: all").range(0, INFINITY);
    f.add("skip_last", "", &skip_last,
          "leave out each poem's last verse, which a limit on the length may have truncated");
    f.epilogue(
        "A file is text with blank lines between poems, a CSV, or a token file such as DIR/val.bin, which "
        "has the\n"
        "real poems that were held out. A line is a verse, and a TAB separates its hemistichs. The head of\n"
        "dev/ladder/score_poems.cpp explains the measures.\n\n"
        "Example\n"
        "  ./sample_gpt2 -e out/model.bin --num 50 > poems.txt\n"
        "  ./score_poems poems.txt out/data/val.bin --data out/data --skip_last\n");
    f.parse(argc, argv);
    if (files.empty()) throw UsageError("no poems are given: ./score_poems poems.txt --data DIR; see --help");
    for (const char* name : {"train.bin", "tokenizer.bin"})
        if (std::string path = data + "/" + name; !file_exists(path))
            fail("%s: not found; --data is the folder that ./prepare_data made", path.c_str());
    Tokenizer tokenizer = Tokenizer::load(data + "/tokenizer.bin");
    const std::string recipe_path = data + "/recipe.txt";
    const Recipe recipe = file_exists(recipe_path) ? Recipe::load(recipe_path) : Recipe();
    int tag_token = -1;
    if (!tag.empty()) {
        const size_t equals = std::min(tag.find('='), tag.size());
        tag_token = tokenizer.tag(tag.substr(0, equals), tag.substr(std::min(equals + 1, tag.size())));
        if (tag_token < 0) throw UsageError(strf("--tag: %s has no tag '%s'", data.c_str(), tag.c_str()));
    }
    std::vector<bool> has_tag;
    Poems training = decode_tokens(data + "/train.bin", tokenizer, tag_token, &has_tag);
    if (tag.empty()) has_tag.clear();
    Reference ref(std::move(training), has_tag);
    printf(
        "training text %s/train.bin: %s poems, %s verses, %s different words; letters in a verse %.1f ± "
        "%.1f, in a hemistich %.1f ± %.1f, usually %zu to %zu\n\n",
        data.c_str(), commas(ref.poems.size()).c_str(), commas(ref.verse.n).c_str(),
        commas(ref.words.size()).c_str(), ref.verse.mean(), ref.verse.sd(), ref.hemistich.mean(),
        ref.hemistich.sd(), ref.hemistich.quantile(0.025), ref.hemistich.quantile(0.975));
    std::vector<std::pair<std::string, Scores>> columns;
    std::string longest;
    for (const std::string& path : files) {
        Poems poems = read_poems(path, tokenizer, recipe);
        if (most && poems.size() > (size_t)most) poems.resize((size_t)most);
        if (skip_last)
            for (std::string& p : poems) p.resize(p.find('\n') == p.npos ? 0 : p.rfind('\n'));
        poems.erase(std::remove(poems.begin(), poems.end(), ""), poems.end());
        if (poems.empty())
            fail("%s: has no poem%s", path.c_str(),
                 skip_last ? " of two verses, and --skip_last leaves out the last verse" : "");
        columns.push_back({path, measure(poems, ref)});
        std::string text = columns.back().second.longest_text;
        for (char& c : text)
            if (c == '\n') c = '/';
        longest += strf("longest run of %s: %s\n", path.c_str(), text.c_str());
    }
    printf("%s\n%s", table(columns).c_str(), longest.c_str());
    return 0;
}

}  // namespace score

#ifdef SCORE_MAIN
int main(int argc, char** argv) {
    return run_main("score_poems", [&] { return score::score_main(argc, argv); });
}
#endif
