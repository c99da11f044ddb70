// score_poems.cpp - measures how well generated poems imitate real ones, as far as letters without vowel
// signs show it.
//
//     ./score_poems poems.txt out/data/val.bin --data out/data
//
// Compares poems with the training text (--data: train.bin, decoded with tokenizer.bin) and prints a Markdown
// table with a column for each file. A file is text with blank lines between poems (what ./sample_gpt2 and
// ./ladder write), anything else that ./prepare_data reads, "-" for standard input, or a token file with
// poems between end-of-text tokens; val.bin has real poems that the model has not seen. A line is a verse
// (bayt), and a TAB separates its two hemistichs.
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
//   letters           letters in a verse and in a hemistich, without spaces, vowel signs and punctuation:
//                     mean and standard deviation
//   usual length      share of the hemistichs, and of the verses, whose length is in the middle 95% of the
//                     training text's, or of those of its poems that have the tag of --tag
//   distance          earth mover's distance between the hemistichs' lengths and the training text's: how
//                     many letters per hemistich would have to be added or removed, on average, to turn one
//                     distribution into the other
//   evenness          standard deviation of the hemistichs' lengths within a poem; metre keeps it small
//   repeated          share of the verses that also occur earlier in the file
//   copied            share of the verses that also occur in the training text
//   longest run       longest run of characters, including spaces and line ends, that also occurs in the
//                     training text: the longest of all, and the mean over the verses of the longest run that
//                     ends in the verse and begins in the same verse. The rarest characters count as equal,
//                     if there are more than 253 different ones.
#include <filesystem>
#include <map>
#include <unordered_set>

#ifndef ARAPOET_NO_MAIN
#define ARAPOET_NO_MAIN
#define SCORE_MAIN
#endif
#include "data/prepare_data.cpp"
#include "data/verses.h"

namespace score {

using Poems = std::vector<std::string>;
using verses::for_each_piece;
using verses::letters;
using verses::rhyme;

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

// A byte for each character of the texts, numbered from `first`, the most frequent one. The characters beyond
// the 255 - `first` most frequent ones share the byte 255.
inline std::map<uint32_t, unsigned char> bytes_for(const std::vector<const Poems*>& texts, size_t first) {
    std::map<uint32_t, size_t> times;
    for (const Poems* poems : texts)
        for (const std::string& poem : *poems) utf8::for_each(poem, [&](uint32_t c, size_t) { times[c]++; });
    std::vector<std::pair<size_t, uint32_t>> order;
    for (auto [c, n] : times) order.push_back({n, c});
    std::sort(order.rbegin(), order.rend());
    std::map<uint32_t, unsigned char> byte_of;
    for (size_t i = 0; i < order.size(); i++)
        byte_of[order[i].second] = (unsigned char)std::min<size_t>(first + i, 255);
    return byte_of;
}

// For each character of each poem, the longest run that ends there, lies in the poem, and occurs in
// a training poem.
inline std::vector<std::vector<int>> shared_runs(const Poems& poems, const Poems& training) {
    constexpr char TRAINING_END = 0, POEM_END = 1;  // different, so that no shared run crosses a poem's end
    constexpr size_t BATCH =
        50000;  // bytes of poems per automaton, so that its memory does not grow with them
    const std::map<uint32_t, unsigned char> byte_of = bytes_for({&poems, &training}, 2);
    auto encode = [&](const std::string& poem, std::string& bytes) {
        utf8::for_each(poem, [&](uint32_t c, size_t) { bytes += (char)byte_of.at(c); });
    };
    std::string corpus;
    for (const std::string& p : training) encode(p, corpus), corpus += TRAINING_END;
    std::vector<std::vector<int>> all;
    for (size_t i = 0; i < poems.size();) {
        std::string text;
        std::vector<size_t> ends;
        for (; i < poems.size() && text.size() < BATCH; i++)
            encode(poems[i], text), text += POEM_END, ends.push_back(text.size());
        SuffixAutomaton automaton(text, std::min<size_t>(byte_of.size() + 2, 256));
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

// Adds up what the measures are the means of, poem by poem.
class Measurement {
  public:
    explicit Measurement(const Reference& ref)
        : ref_(ref), hemistich_(usual(ref.hemistich)), verse_(usual(ref.verse)) {}

    // runs: for each character of the poem, as shared_runs() returns them
    void add(const std::string& poem, const std::vector<int>& runs) {
        s_.poems++;
        for_each_piece(poem, " \t\n", [&](std::string_view w) { add_word(w); });
        Lengths hemistichs;
        last_.emplace_back(), rhymes_.emplace_back();
        size_t at = 0;  // the position of the verse's first character in the poem
        for (size_t begin = 0, end; begin <= poem.size(); begin = end + 1) {
            end = std::min(poem.find('\n', begin), poem.size());
            const std::string_view v(poem.data() + begin, end - begin);
            const size_t chars = utf8::count(v);
            if (letters(v)) add_verse(v, &runs[at], chars, hemistichs);
            at += chars + 1;
        }
        within_ += hemistichs.sd() * hemistichs.sd() * (double)hemistichs.n;
        note_longest_run(poem, runs);
    }
    Scores scores() const {
        Scores s = s_;
        auto share = [](size_t part, size_t all) { return all ? (double)part / (double)all : NAN; };
        s.known = share(known_, s.words), s.long_known = share(long_known_, s.long_words);
        s.last_letter = agreement(last_), s.last_letter_chance = agreement_by_chance(last_);
        s.rhyme = agreement(rhymes_), s.rhyme_chance = agreement_by_chance(rhymes_);
        s.two_hemistichs = share(two_, s.verses);
        s.usual_length = share(usual_, s.hemistich.n), s.usual_verse = share(usual_verses_, s.verses);
        s.repeated = share(repeated_, s.verses), s.copied = share(copied_, s.verses);
        s.mean_run = share(runs_, s.verses);
        s.distance = s.hemistich.distance(ref_.hemistich);
        s.evenness = std::sqrt(within_ / (double)std::max<size_t>(s.hemistich.n, 1));
        return s;
    }

  private:
    struct Range {
        size_t lo, hi;
        bool has(size_t n) const { return n >= lo && n <= hi; }
    };
    static Range usual(const Lengths& l) { return {l.quantile(0.025), l.quantile(0.975)}; }

    void add_word(std::string_view w) {
        const bool found = ref_.words.count(std::string(w)), is_long = letters(w) >= 5;
        s_.words++, known_ += found, s_.long_words += is_long, long_known_ += is_long && found;
    }
    // runs: of the verse's characters. Adds the lengths of its hemistichs to those of its poem.
    void add_verse(std::string_view v, const int* runs, size_t chars, Lengths& of_poem) {
        s_.verses++, s_.verse.add(letters(v)), usual_verses_ += verse_.has(letters(v));
        size_t hemistichs = 0, longest = 0;
        for_each_piece(v, "\t", [&](std::string_view h) {
            const size_t n = letters(h);
            hemistichs++, of_poem.add(n), s_.hemistich.add(n), usual_ += hemistich_.has(n);
        });
        two_ += hemistichs == 2;
        last_.back().push_back(rhyme(v, true)), rhymes_.back().push_back(rhyme(v, false));
        repeated_ += !before_.emplace(v).second, copied_ += ref_.verses.count(std::string(v));
        for (size_t k = 0; k < chars; k++) longest = std::max(longest, std::min(k + 1, (size_t)runs[k]));
        runs_ += longest;
    }
    void note_longest_run(const std::string& poem, const std::vector<int>& runs) {
        const size_t k =
            (size_t)(std::max_element(runs.begin(), runs.end()) - runs.begin());  // where it ends
        if (k == runs.size() || (size_t)runs[k] <= s_.longest_run) return;
        s_.longest_run = (size_t)runs[k], s_.longest_text.clear();
        size_t number = 0;
        utf8::for_each(poem, [&](uint32_t c, size_t) {
            if (number + s_.longest_run > k && number <= k) utf8::append(s_.longest_text, c);
            number++;
        });
    }

    const Reference& ref_;
    const Range hemistich_, verse_;  // lengths
    Scores s_;
    std::vector<std::vector<std::u32string>> last_, rhymes_;  // of each poem's verses
    std::unordered_set<std::string> before_;                  // verses
    size_t known_ = 0, long_known_ = 0, two_ = 0, usual_ = 0, usual_verses_ = 0, repeated_ = 0, copied_ = 0,
           runs_ = 0;
    double within_ = 0;  // squared deviations from the mean length in the hemistich's poem
};

// All measures of the poems, compared with the training text.
inline Scores measure(const Poems& poems, const Reference& ref) {
    Measurement m(ref);
    const std::vector<std::vector<int>> shared = shared_runs(poems, ref.poems);
    for (size_t i = 0; i < poems.size(); i++) m.add(poems[i], shared[i]);
    return m.scores();
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
// The poem without the line "--- 1 ---" that ./sample_gpt2 writes before it.
inline std::string without_title(const std::string& poem) {
    const std::string line = poem.substr(0, poem.find('\n'));
    const bool title = line.size() > 8 && line.compare(0, 4, "--- ") == 0 &&
                       line.find_first_not_of("0123456789", 4) == line.size() - 4 &&
                       line.compare(line.size() - 4, 4, " ---") == 0;
    return title ? poem.substr(std::min(line.size() + 1, poem.size())) : poem;
}
// Poems from a token file, or from any file that ./prepare_data reads, cleaned by the training text's recipe.
inline Poems read_poems(const std::string& path, const Tokenizer& tokenizer, const Recipe& recipe) {
    if (std::filesystem::is_regular_file(path) && is_token_file(path)) return decode_tokens(path, tokenizer);
    prep::Options o;
    static_cast<Recipe&>(o) = recipe;
    o.hemistich_separator = "auto";
    o.layout = "blank", o.on_error = "skip";
    prep::Report report;
    prep::Collector collector(o, report);
    collector.read_file(path);
    Poems poems;
    size_t equal = report.duplicates;
    std::unordered_set<std::string> seen;
    for (const prep::Poem& p : collector.poems) {
        const std::string text = without_title(p.text);
        if (text.empty()) continue;
        if (seen.insert(text).second) poems.push_back(text);
        else equal++;
    }
    if (equal) printf("%s: %zu poems are equal to an earlier one and are not counted\n", path.c_str(), equal);
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

struct Settings {
    std::vector<std::string> files;
    std::string data = "out/data", tag;
    int most = 0;
    bool skip_last = false;
};

inline void add_flags(Flags& f, Settings& s) {
    f.positional(&s.files, "poems.txt [more files, or - for standard input]");
    f.add("data", "", &s.data, "DIR",
          "folder made by ./prepare_data, with the training text train.bin and with tokenizer.bin");
    f.add(
        "tag", "", &s.tag, "COL=VALUE",
        "compare lengths with those training poems that have this tag (./prepare_data --tags), e.g. a metre");
    f.add("poems", "", &s.most, "N", "only the first N poems of each file; 0: all").range(0, INFINITY);
    f.add("skip_last", "", &s.skip_last,
          "leave out each poem's last verse, which a limit on the length may have truncated");
    f.epilogue(
        "A file is text with blank lines between poems, anything else that ./prepare_data reads, or a\n"
        "token file such as DIR/val.bin, which has the real poems that were held out. A line is a verse,\n"
        "and a TAB separates its hemistichs. The head of dev/ladder/score_poems.cpp explains the measures.\n"
        "\n"
        "Example\n"
        "  ./sample_gpt2 -e out/model.bin --num 50 > poems.txt\n"
        "  ./score_poems poems.txt out/data/val.bin --data out/data --skip_last\n");
}

// The training text of the data folder. With --tag its lengths are those of the poems that have the tag.
inline Reference load_reference(const Settings& s, const Tokenizer& tokenizer) {
    const int tag = s.tag.empty() ? -1 : tokenizer.tag(s.tag);
    if (!s.tag.empty() && tag < 0)
        throw UsageError(strf("--tag: %s has no tag '%s'", s.data.c_str(), s.tag.c_str()));
    std::vector<bool> has_tag;
    Poems training = decode_tokens(s.data + "/train.bin", tokenizer, tag, &has_tag);
    if (s.tag.empty()) has_tag.clear();
    return Reference(std::move(training), has_tag);
}

// The poems of a file as far as the flags choose them.
inline Poems chosen_poems(const std::string& path, const Settings& s, const Tokenizer& tokenizer,
                          const Recipe& recipe) {
    Poems poems = read_poems(path, tokenizer, recipe);
    if (s.most && poems.size() > (size_t)s.most) poems.resize((size_t)s.most);
    if (s.skip_last)
        for (std::string& p : poems) p.resize(p.find('\n') == p.npos ? 0 : p.rfind('\n'));
    poems.erase(std::remove(poems.begin(), poems.end(), ""), poems.end());
    if (poems.empty())
        fail("%s: has no poem%s", path.c_str(),
             s.skip_last ? " of two verses, and --skip_last leaves out the last verse" : "");
    return poems;
}

inline int score_main(int argc, char** argv) {
    Settings s;
    Flags f("score_poems", "compares poems with the text that their model was trained on");
    add_flags(f, s);
    f.parse(argc, argv);
    if (s.files.empty())
        throw UsageError("no poems are given: ./score_poems poems.txt --data DIR; see --help");
    finish_data_set(s.data);
    for (const char* name : {"train.bin", "tokenizer.bin"})
        if (std::string path = s.data + "/" + name; !file_exists(path))
            fail("%s: not found; --data is the folder that ./prepare_data made", path.c_str());
    const Tokenizer tokenizer = Tokenizer::load(s.data + "/tokenizer.bin");
    const std::string recipe_path = s.data + "/recipe.txt";
    const Recipe recipe = file_exists(recipe_path) ? Recipe::load(recipe_path) : Recipe();
    const Reference ref = load_reference(s, tokenizer);
    printf(
        "training text %s/train.bin: %s poems, %s verses, %s different words; letters in a verse %.1f ± "
        "%.1f, in a hemistich %.1f ± %.1f, usually %zu to %zu\n\n",
        s.data.c_str(), commas(ref.poems.size()).c_str(), commas(ref.verse.n).c_str(),
        commas(ref.words.size()).c_str(), ref.verse.mean(), ref.verse.sd(), ref.hemistich.mean(),
        ref.hemistich.sd(), ref.hemistich.quantile(0.025), ref.hemistich.quantile(0.975));
    std::vector<std::pair<std::string, Scores>> columns;
    std::string longest;
    for (const std::string& path : s.files) {
        columns.push_back({path, measure(chosen_poems(path, s, tokenizer, recipe), ref)});
        std::string text = columns.back().second.longest_text;
        std::replace(text.begin(), text.end(), '\n', '/');
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
