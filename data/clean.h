// clean.h - the recipe that turns poems as people write them into the text that a model learns.
//
//     Recipe recipe = Recipe::load("poems/recipe.txt");
//     Cleaner clean(recipe);
//     std::string text = clean(Separator(recipe.hemistich_separator).apply("قِفا # نبكِ"));   // "قفا\tنبك"
//
// In the cleaned text each verse is a line, and a TAB separates the two hemistichs of a verse. The recipe
// goes with the data and the model as recipe.txt, so that prompts and texts to be judged are cleaned alike.
#pragma once

#include <algorithm>
#include <iterator>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "lib/io.h"
#include "lib/utf8.h"
#include "tokenizer/unicode_tables.h"

// What becomes of characters and lines; the help of ./prepare_data explains each.
struct Recipe {
    std::string keep = "letters", map = "arabic", hemistich_separator = "auto";
    bool normalize_alef = false, normalize_hamza = false, normalize_ya = false, normalize_ta = false;
    bool remove_tatweel = false, remove_tashkeel = false;

    // One line NAME=VALUE for each field.
    std::string text() const {
        std::string s;
        auto& self = const_cast<Recipe&>(*this);
        for (auto& [name, v] : self.texts()) s += strf("%s=%s\n", name, v->c_str());
        for (auto& [name, v] : self.switches()) s += strf("%s=%d\n", name, *v ? 1 : 0);
        return s;
    }
    // An Error names the line that is wrong. A field that is not in the file keeps its default.
    static Recipe load(const std::string& path) {
        Recipe r;
        const std::string content = Reader(path).rest();
        size_t number = 0;
        for (size_t at = 0, end; at < content.size(); at = end + 1) {
            end = std::min(content.find('\n', at), content.size());
            const std::string line = content.substr(at, end - at);
            const size_t equals = line.find('=');
            const std::string name = line.substr(0, equals),
                              value = equals == line.npos ? "" : line.substr(equals + 1);
            bool known = false;
            number++;
            for (auto& [field, v] : r.texts())
                if (name == field && !value.empty()) *v = value, known = true;
            for (auto& [field, v] : r.switches())
                if (name == field && (value == "0" || value == "1")) *v = value == "1", known = true;
            if (!known)
                fail("%s: line %zu: '%s' is not a setting of the cleaning", path.c_str(), number,
                     line.c_str());
        }
        if (r.keep != "letters" && r.keep != "all")
            fail("%s: keep is '%s', wanted letters or all", path.c_str(), r.keep.c_str());
        if (r.map != "arabic" && r.map != "none")
            fail("%s: map is '%s', wanted arabic or none", path.c_str(), r.map.c_str());
        if (utf8::find_invalid(r.hemistich_separator) != utf8::VALID)
            fail("%s: hemistich_separator is %s, wanted UTF-8", path.c_str(),
                 utf8::quote(r.hemistich_separator).c_str());
        return r;
    }

  private:
    std::vector<std::pair<const char*, std::string*>> texts() {
        return {{"keep", &keep}, {"map", &map}, {"hemistich_separator", &hemistich_separator}};
    }
    std::vector<std::pair<const char*, bool*>> switches() {
        return {{"normalize_alef", &normalize_alef}, {"normalize_hamza", &normalize_hamza},
                {"normalize_ya", &normalize_ya},     {"normalize_ta", &normalize_ta},
                {"remove_tatweel", &remove_tatweel}, {"remove_tashkeel", &remove_tashkeel}};
    }
};

// ---------------------------------------------------------------------------------------------
// Kinds of characters

// Is c among the characters of `set`? (strchr would find NUL in any.)
inline bool is_one_of(char c, std::string_view set) { return set.find(c) != set.npos; }
// Characters that end a verse. CR LF counts as one line break, because empty lines are removed.
inline bool is_newline(uint32_t c) { return c == '\n' || c == '\r' || c == 0x2028 || c == 0x2029; }
inline bool is_other_space(uint32_t c) {
    return c == ' ' || c == 0x0B || c == 0x0C || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x202F || c == 0x205F || c == 0x3000;
}
// Control characters, and the invisible marks that only control a text's direction on screen.
inline bool is_control(uint32_t c) {
    return c < 0x20 || (c >= 0x7F && c < 0xA0) || c == 0x061C || c == 0x200E || c == 0x200F ||
           (c >= 0x202A && c <= 0x202E) || (c >= 0x2066 && c <= 0x2069) || c == 0xFEFF;
}
constexpr uint32_t TATWEEL = 0x0640;
inline bool is_kept_letter(uint32_t c) { return c >= 0x0621 && c <= 0x064A; }
template <size_t N>
bool in_ranges(const unicode::Range (&ranges)[N], uint32_t c) {
    const unicode::Range* r = std::upper_bound(
        ranges, ranges + N, c, [](uint32_t at, const unicode::Range& range) { return at < range.first; });
    return r != ranges && c <= r[-1].last;
}
// Vowel signs, accents and format controls: they belong to the letter before them. The zero width space
// divides words, and the ends of verses and years of the Quran (U+0600 to U+0605, U+06DD) stand between them.
inline bool is_mark(uint32_t c) {
    return c >= 0xAD && in_ranges(unicode::MARKS, c) && c != 0x200B && c != 0x06DD &&
           !(c >= 0x0600 && c <= 0x0605);
}
inline bool is_letter(uint32_t c) { return in_ranges(unicode::LETTERS, c); }
// A letter of any script whose removal changes the word. A tatweel does not count: it only stretches the
// word.
inline bool is_lost_letter(uint32_t c) { return is_letter(c) && !is_mark(c) && c != TATWEEL; }
// U+FEFF, the end of a block, is a byte order mark.
inline bool is_arabic_letter(uint32_t c) {
    bool block = (c >= 0x600 && c <= 0x6FF) || (c >= 0x750 && c <= 0x77F) || (c >= 0x870 && c <= 0x8FF) ||
                 (c >= 0xFB50 && c <= 0xFDFF) || (c >= 0xFE70 && c <= 0xFEFE) ||
                 (c >= 0x10EC0 && c <= 0x10EFF) || (c >= 0x1EE00 && c <= 0x1EEFF);
    return block && is_letter(c) && !is_mark(c);
}
// The letters U+0621 to U+064A that another Arabic letter or ligature is made of; null if none.
inline const char* arabic_form(uint32_t c) {
    const auto* end = std::end(unicode::ARABIC_FORMS);
    const auto* f = std::lower_bound(std::begin(unicode::ARABIC_FORMS), end, c,
                                     [](const unicode::Form& form, uint32_t at) { return form.from < at; });
    return f != end && f->from == c ? f->to : nullptr;
}
// Alef with madda, and alef, waw and ya with hamza: the letter and the mark as one letter; 0 if there is
// none.
inline uint32_t composed(uint32_t letter, uint32_t mark) {
    constexpr uint32_t MADDA = 0x0653, HAMZA_ABOVE = 0x0654;
    if (letter == 0x0627) return mark == MADDA ? 0x0622 : mark == HAMZA_ABOVE ? 0x0623 : 0x0625;
    if (mark != HAMZA_ABOVE) return 0;
    return letter == 0x0648 ? 0x0624 : letter == 0x064A || letter == 0x0649 ? 0x0626 : 0;
}

// ---------------------------------------------------------------------------------------------
// Cleaning

// Cleans texts as the recipe says, and counts what it maps, removes and replaces.
class Cleaner {
  public:
    size_t replaced = 0;  // by the normalize switches

    explicit Cleaner(const Recipe& r) : r_(r), letters_only_(r.keep == "letters") {
        maps_ = letters_only_ && r.map == "arabic";
        for (uint32_t c = 0; c < TABLE; c++) cleaned_[c] = cleaned(c);
    }

    // Returns the cleaned text, as the model will see it; the input must be valid UTF-8. A run of white space
    // becomes one character, the strongest in the run: newline, else TAB, else space. White space at the
    // beginning and the end is removed.
    std::string operator()(std::string_view text) {
        // What is written is never longer than what was read, but for the letters of a ligature.
        std::string out(text.size(), '\0');
        size_t n = 0;             // bytes of `out`
        char space = 0;           // the white space since the last character, as the character it becomes
        size_t letter = NOWHERE;  // where the last character begins in `out`, while marks may follow it
        auto put = [&](uint32_t c) {
            if (space && n) out[n++] = space;
            space = 0, letter = n;
            n += utf8::write(&out[n], c);
        };
        for (size_t i = 0; i < text.size();) {
            uint32_t c = 0;
            i += utf8::decode(text, i, &c);
            const uint32_t to = c < TABLE ? cleaned_[c] : cleaned(c);
            if (to <= utf8::MAX_CODE_POINT && to > ' ') {
                replaced += to != c;
                put(to);
                continue;
            }
            if (to == '\n' || to == '\t' || to == ' ') {
                if (!space || to == '\n' || (to == '\t' && space == ' ')) space = (char)to;
                letter = NOWHERE;
                continue;
            }
            if (to == COMPOSES && letter != NOWHERE) {
                uint32_t before = 0;
                utf8::decode(out, letter, &before);
                if (uint32_t one = composed(before, c)) {
                    const uint32_t normal = normalized(one);
                    n = letter + utf8::write(&out[letter], normal);
                    mapped_[c]++, replaced += normal != one;
                    continue;
                }
            }
            if (to == FORM) {
                mapped_[c]++;
                const std::string_view letters = arabic_form(c);
                out.resize(out.size() + letters.size());
                utf8::for_each(letters, [&](uint32_t one, size_t) {
                    if (one == ' ') space = space ? space : ' ';
                    else replaced += normalized(one) != one, put(normalized(one));
                });
                continue;
            }
            (c < TABLE ? removed_[c] : removed_beyond_[c])++;
            if (to == GAP) space = space ? space : ' ', letter = NOWHERE;
        }
        out.resize(n);
        return out;
    }

    // The code points that became other letters, and how often each did.
    const std::map<uint32_t, size_t>& mapped() const { return mapped_; }
    // The code points removed so far, and how often each was.
    std::map<uint32_t, size_t> removed() const {
        std::map<uint32_t, size_t> all = removed_beyond_;
        for (uint32_t c = 0; c < TABLE; c++)
            if (removed_[c]) all[c] = removed_[c];
        return all;
    }

  private:
    // What can become of a character besides being kept or replaced by another. REMOVED: nothing remains, and
    // the characters around it are joined. GAP: a space remains, so that words are not joined. COMPOSES: a
    // mark that may change the letter before it, else removed. FORM: see arabic_form().
    enum : uint32_t { REMOVED = utf8::MAX_CODE_POINT + 1, GAP, COMPOSES, FORM };
    static constexpr uint32_t TABLE = 0x800;  // characters of one or two UTF-8 bytes, which include Arabic
    static constexpr size_t NOWHERE = SIZE_MAX;

    uint32_t cleaned(uint32_t c) const {
        if (c == '\t') return '\t';
        if (is_newline(c)) return '\n';
        if (is_other_space(c)) return ' ';
        if (maps_ && c >= 0x0653 && c <= 0x0655) return COMPOSES;
        if (maps_ && !is_kept_letter(c) && arabic_form(c)) return FORM;
        if (r_.remove_tatweel && c == TATWEEL) return REMOVED;
        if (r_.remove_tashkeel && ((c >= 0x064B && c <= 0x065F) || c == 0x0670)) return REMOVED;
        if (is_control(c)) return REMOVED;
        c = normalized(c);
        if (!letters_only_ || is_kept_letter(c)) return c;
        return is_mark(c) || is_arabic_letter(c) ? (uint32_t)REMOVED : (uint32_t)GAP;
    }
    uint32_t normalized(uint32_t c) const {
        if (r_.normalize_alef && (c == 0x0622 || c == 0x0623 || c == 0x0625 || c == 0x0671)) return 0x0627;
        if (r_.normalize_hamza && c == 0x0624) return 0x0648;
        if (r_.normalize_hamza && c == 0x0626) return 0x064A;
        if (r_.normalize_ya && c == 0x0649) return 0x064A;
        if (r_.normalize_ta && c == 0x0629) return 0x0647;
        return c;
    }

    const Recipe r_;
    const bool letters_only_;
    bool maps_;
    uint32_t cleaned_[TABLE];
    size_t removed_[TABLE] = {};
    std::map<uint32_t, size_t> removed_beyond_, mapped_;
};

// ---------------------------------------------------------------------------------------------
// Lines, verses and hemistichs

// Reads the first character of s[i..] if it is valid, else a byte; returns its length.
inline size_t decode_or_byte(std::string_view s, size_t i, uint32_t* c) {
    if (size_t n = utf8::decode(s, i, c)) return n;
    return *c = (unsigned char)s[i], 1;
}
// A line that shows nothing: white space, direction marks and the like.
inline bool is_blank(std::string_view line) {
    uint32_t c;
    for (size_t i = 0; i < line.size();) {
        i += decode_or_byte(line, i, &c);
        if (!is_newline(c) && !is_other_space(c) && !is_control(c) && !is_mark(c)) return false;
    }
    return true;
}
// Where the line that goes on at s[i] ends: at LF or CR, or at the end of s.
inline size_t line_end(std::string_view s, size_t i) {
    while (i < s.size() && s[i] != '\n' && s[i] != '\r') i++;
    return i;
}
// Calls f(line) for each line of a text; a line ends at LF, CR LF or CR, which are not part of it.
template <class F>
void for_each_line(std::string_view text, F f) {
    for (size_t at = 0; at < text.size();) {
        const size_t end = line_end(text, at);
        f(text.substr(at, end - at));
        at = end + (text.substr(end, 2) == "\r\n" ? 2 : 1);
    }
}

// Characters that people put between hemistichs or poems; not those of sentences, such as , ; : ? ! and
// quotes.
inline bool may_separate(uint32_t c) {
    return (c < 0x80 && is_one_of((char)c, "*#=-|/\\~_+^@%&<>.")) || (c >= 0x2010 && c <= 0x2015) ||
           c == 0xB7 || c == 0x2022 || c == 0x2026 || c == TATWEEL || c == 0x066D || c == 0x06DE ||
           c == 0x00A7 || (c >= 0x25A0 && c <= 0x2606) || (c >= 0x2731 && c <= 0x274B);
}
// What separates the hemistichs of a verse. A TAB always does. There may be one more separator: a run of one
// sign, perhaps with spaces in it (##, * * *), or a run of spaces.
class Separator {
  public:
    // tab: only TABs separate; spaces: also two or more spaces in a row; another text: a run of its
    // character, at least as long, or, where it has several characters, the text itself.
    explicit Separator(const std::string& name) : name_(name) {
        if (name == "tab") return;
        if (name == "spaces") {
            least_ = 2, c_ = ' ';
            return;
        }
        size_t n = 0;
        bool same = true;
        utf8::for_each(name, [&](uint32_t c, size_t) {
            if (n++ == 0) c_ = c;
            same = same && c == c_;
        });
        if (same) least_ = n;
        else text_ = name;
    }
    const std::string& name() const { return name_; }
    bool is_tab() const { return !least_ && text_.empty(); }
    // For the report: '#', runs of spaces, a TAB.
    std::string shown() const {
        return is_tab() ? "a TAB" : name_ == "spaces" ? "runs of spaces" : utf8::quote(name_);
    }

    // Replaces each separator by a TAB, if its line has letters before it and after it.
    std::string apply(std::string_view text) const {
        if (is_tab()) return std::string(text);
        std::string out;
        size_t at = 0;
        for_each_line(text, [&](std::string_view line) {
            const size_t begin = (size_t)(line.data() - text.data());
            out += text.substr(at, begin - at);
            size_t done = 0;
            for_each_run(line, [&](size_t from, size_t to) {
                out.append(line.substr(done, from - done)), out += '\t', done = to;
            });
            out += line.substr(done);
            at = begin + line.size();
        });
        out += text.substr(at);
        return out;
    }
    // The name of the separator that most verses of at least two words have exactly once, if at least SHARE
    // of them do; "tab" otherwise. A TAB comes before all others: it is enough that half of SHARE of them
    // have one, or several. With fewer than FEW verses there is little evidence, so a sign counts only with
    // white space on both sides.
    static std::string detect(const std::vector<std::string_view>& verses) {
        constexpr double SHARE = 0.8;
        constexpr size_t FEW = 8;
        std::map<std::string, size_t> votes, spaced;
        size_t all = 0;
        for (std::string_view verse : verses) {
            if (!has_two_words(verse)) continue;
            all++;
            if (verse.find('\t') != verse.npos) votes["tab"]++;
            for (const std::string& name : names_in_line(verse)) {
                size_t n = 0, apart = 0;
                Separator(name).for_each_run(verse, [&](size_t from, size_t to) {
                    uint32_t first, last = 0;
                    decode_or_byte(verse, from, &first);
                    for (size_t i = from; i < to;) i += decode_or_byte(verse, i, &last);
                    n++, apart += name != "spaces" && is_other_space(first) && is_other_space(last);
                });
                votes[name] += n == 1, spaced[name] += n == 1 && apart == 1;
            }
        }
        if ((double)votes["tab"] >= SHARE / 2 * (double)all) return "tab";
        std::string best = "tab";
        size_t most = 0;
        for (auto& [name, n] : all < FEW ? spaced : votes)
            if (name != "tab" && (double)n >= SHARE * (double)all && n > most) best = name, most = n;
        return best;
    }

  private:
    static bool is_wordy(uint32_t c) {
        return c >= 0x80 ? c != TATWEEL && is_letter(c) : isalpha((int)c) != 0;
    }
    static bool has_two_words(std::string_view line) {
        bool word = false, gap = false;
        uint32_t c;
        for (size_t i = 0; i < line.size();) {
            i += decode_or_byte(line, i, &c);
            if (!is_wordy(c)) gap = gap || (word && !is_mark(c) && c != TATWEEL);
            else if (gap) return true;
            else word = true;
        }
        return false;
    }
    // The names of the separators that may be in the line, each once.
    static std::vector<std::string> names_in_line(std::string_view line) {
        std::vector<std::string> names;
        uint32_t c;
        size_t spaces = 0;
        for (size_t i = 0; i < line.size();) {
            i += decode_or_byte(line, i, &c);
            spaces = is_other_space(c) ? spaces + 1 : 0;
            std::string name;
            if (spaces == 2) name = "spaces";
            else if (c == '.') name = "..";  // one full stop ends a sentence
            else if (may_separate(c)) utf8::append(name, c);
            if (!name.empty() && std::find(names.begin(), names.end(), name) == names.end())
                names.push_back(name);
        }
        return names;
    }
    // Calls f(from, to) for each separator of the line with the white space around it, if there are letters
    // before it and after it.
    template <class F>
    void for_each_run(std::string_view line, F f) const {
        size_t last_letter = std::string_view::npos;
        uint32_t c;
        for (size_t i = 0; i < line.size();) {  // where the last letter begins
            const size_t n = decode_or_byte(line, i, &c);
            if (is_wordy(c)) last_letter = i;
            i += n;
        }
        if (last_letter == std::string_view::npos) return;
        bool letters = false;
        size_t space_from = 0;  // where the white space begins that ends at i
        for (size_t i = 0; i < last_letter;) {
            const size_t n = decode_or_byte(line, i, &c);
            // A tatweel within a word only stretches it: as a separator it has white space on both sides.
            const bool may_begin = letters && (c_ != TATWEEL || space_from < i);
            const size_t end = may_begin ? run_end(line, i, c) : 0;
            if (end > last_letter) return;
            if (end) {
                const size_t to = spaces_end(line, end);
                if (c_ != TATWEEL || to > end) f(space_from, to);
                i = space_from = to;
                continue;
            }
            letters = letters || is_wordy(c);
            i += n;
            if (!is_other_space(c)) space_from = i;
        }
    }
    // Where the white space ends that begins at i; i if none does.
    static size_t spaces_end(std::string_view line, size_t i) {
        for (uint32_t c; i < line.size();) {
            const size_t n = decode_or_byte(line, i, &c);
            if (!is_other_space(c)) break;
            i += n;
        }
        return i;
    }
    // Where the separator ends that begins at i with the character c; 0 if none begins there.
    size_t run_end(std::string_view line, size_t i, uint32_t c) const {
        if (!text_.empty()) return line.substr(i, text_.size()) == text_ ? i + text_.size() : 0;
        const bool spaces = c_ == ' ';
        if (spaces ? !is_other_space(c) : c != c_) return 0;
        size_t end = i, n = 0;
        for (size_t k = i; k < line.size();) {
            uint32_t d;
            const size_t length = decode_or_byte(line, k, &d);
            const bool member = spaces ? is_other_space(d) : d == c_;
            if (!member && (spaces || !is_other_space(d))) break;
            k += length;
            if (member) end = k, n++;
        }
        return n >= least_ ? end : 0;
    }

    std::string name_, text_;
    uint32_t c_ = 0;
    size_t least_ = 0;  // of c_
};

// The length of a verse number at the beginning of a line: digits, Latin or Arabic, with what is around them,
// as in "12. ", "(١٢) " or "12- ". 0 if there is none, or nothing after it.
inline size_t verse_number(std::string_view line) {
    bool digits = false;
    uint32_t c;
    for (size_t i = 0; i < line.size();) {
        const size_t n = decode_or_byte(line, i, &c);
        const bool digit =
            (c >= '0' && c <= '9') || (c >= 0x0660 && c <= 0x0669) || (c >= 0x06F0 && c <= 0x06F9);
        const bool around = is_other_space(c) || c == '\t' || is_control(c) ||
                            (c < 0x80 && is_one_of((char)c, "()[]{}.-:/")) || c == 0xFD3E || c == 0xFD3F ||
                            c == 0x2013;
        if (!digit && !around) return digits ? i : 0;
        digits = digits || digit;
        i += n;
    }
    return 0;
}
// What a line consists of that only separates poems: "<|endoftext|>", or the one character of which it has
// one or more, such as $ or *. "" for any other line, also one of dots, which stand for what is left out.
inline std::string mark_line(std::string_view line) {
    std::string bare, mark;
    uint32_t c, first = 0;
    bool same = true;
    for (size_t i = 0; i < line.size();) {
        i += decode_or_byte(line, i, &c);
        if (is_newline(c) || is_other_space(c) || is_control(c)) continue;
        if (bare.empty()) first = c;
        same = same && c == first;
        utf8::append(bare, c);
    }
    if (bare == "<|endoftext|>") return bare;
    if (same && first != '.' && first != 0x2026 && (first == '$' || may_separate(first)))
        utf8::append(mark, first);
    return mark;
}
