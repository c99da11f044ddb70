// verses.h - verses, their letters and their rhymes, and a steering that keeps a wished rhyme.
//
// In a text a verse (bayt) is a line, and a TAB separates its two hemistichs.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "data/clean.h"
#include "lib/sampler.h"
#include "tokenizer/tokenizer.h"

namespace verses {

// Splits the text at each character of `at` and calls f(piece) for each piece that is not empty.
template <class F>
void for_each_piece(std::string_view text, const char* at, F f) {
    for (size_t i = 0; (i = text.find_first_not_of(at, i)) != text.npos;) {
        size_t end = std::min(text.find_first_of(at, i), text.size());
        f(text.substr(i, end - i));
        i = end;
    }
}

// Whether a character counts as a letter: vowel signs, digits and punctuation do not.
inline bool is_counted(uint32_t c) { return is_letter(c) && !is_mark(c); }
inline size_t letters(std::string_view text) {
    size_t n = 0;
    utf8::for_each(text, [&](uint32_t c, size_t) { n += is_counted(c); });
    return n;
}
// The Arabic letters of a verse, as a rhyme takes them: ة is ه, which it sounds like at a verse's end, and ى
// is ا.
inline std::u32string rhyme_letters(std::string_view verse) {
    std::u32string all;
    utf8::for_each(verse, [&](uint32_t c, size_t) {
        if (!is_arabic_letter(c) || c == TATWEEL) return;
        all += c == 0x0629 ? U'\u0647' : c == 0x0649 ? U'\u0627' : (char32_t)c;
    });
    return all;
}
// The letters of a verse's rhyme, the last one first. It begins at the last letter other than ا و ي ه, which
// may follow the rhyme's consonant, and has three letters at most. Empty for a verse without letters.
inline std::u32string rhyme(std::string_view verse, bool last_letter_only) {
    std::u32string all = rhyme_letters(verse), found;
    while (!all.empty() && found.size() < 3) {
        const char32_t c = all.back();
        all.pop_back(), found += c;
        const bool ending =
            c == U'\u0627' || c == U'\u0648' || c == U'\u064A' || c == U'\u0647';  // alif, waw, ya, ha
        if (last_letter_only || !ending) break;
    }
    return found;
}

// What a poem is to be like.
struct Wish {
    int verses = 0;     // it ends after so many; 0: where the model ends it
    std::string rhyme;  // "": any; "auto": all verses rhyme as the first; else the letters that all end in

    // Why there can be no such rhyme; "" if there can. Vowel signs and tatweels may be written.
    std::string error() const {
        if (rhyme.empty() || rhyme == "auto") return "";
        bool valid = utf8::find_invalid(rhyme) == utf8::VALID;
        if (valid)
            utf8::for_each(rhyme, [&](uint32_t c, size_t) {
                valid = valid && (is_arabic_letter(c) || (c >= 0x600 && is_mark(c)));
            });
        const size_t letters = valid ? rhyme_letters(rhyme).size() : 0;
        if (letters >= 1 && letters <= MOST_RHYME) return "";
        return strf("%s is not a rhyme, wanted auto or 1 to %zu Arabic letters", utf8::quote(rhyme).c_str(),
                    MOST_RHYME);
    }
    static constexpr size_t MOST_RHYME = 8;
};

// The wished rhyme `wish`, cleaned as a prompt is: by the recipe, or not at all without one. An Error
// says that it is not a rhyme, or which of its letters the model does not know.
inline std::string rhyme_for(const std::string& wish, const Tokenizer& tokenizer,
                             const std::optional<Recipe>& recipe) {
    if (const std::string bad = Wish{0, wish}.error(); !bad.empty()) fail("%s", bad.c_str());
    if (wish.empty() || wish == "auto") return wish;
    const bool any_letter = tokenizer.kind() != Tokenizer::CHARACTERS;  // byte-level BPE can write all
    std::u32string known;
    for (int t = 0; t < tokenizer.first_tag() && !any_letter; t++)
        if (const std::string& bytes = tokenizer.bytes(t);
            t != tokenizer.eot() && utf8::find_invalid(bytes) == utf8::VALID && utf8::count(bytes) == 1)
            utf8::for_each(bytes, [&](uint32_t c, size_t) {
                if (is_arabic_letter(c) && c != TATWEEL) known += (char32_t)c;
            });
    std::string rhyme = wish, unknown;
    if (recipe) {
        Cleaner clean(*recipe);
        rhyme = clean(wish);
        for (auto [c, times] : clean.removed())
            if (is_lost_letter(c)) utf8::append(unknown, c);
    }
    if (!any_letter)
        utf8::for_each(rhyme, [&](uint32_t c, size_t) {
            if (is_lost_letter(c) && known.find((char32_t)c) == known.npos) utf8::append(unknown, c);
        });
    if (!unknown.empty()) {
        std::string all = any_letter ? "" : "; it knows ";
        for (char32_t c : known) utf8::append(all, (uint32_t)c);
        fail("%s has letters that the model does not know: %s%s", utf8::quote(wish).c_str(), unknown.c_str(),
             all.c_str());
    }
    // A ligature has become several letters.
    if (const std::string bad = Wish{0, rhyme}.error(); !bad.empty()) fail("%s", bad.c_str());
    return rhyme;
}

// Keeps a poem's verses to a wish. A verse that does not rhyme is taken back from its last word on and drawn
// again; every TRIES_A_WORD tries from one word earlier. After FREE_TRIES the drawing is guided: (1) the
// verse cannot end until its last word rhymes; (2) once it does, the line's end is made likelier than a space
// or TAB; (3) tokens that bring the ending closer to the rhyme gain logits, more with each try. After
// MOST_TRIES the next draw, which is not guided, stays; if it does not rhyme, its number goes to unrhymed().
// So do the numbers of the prompt's verses that do not rhyme: they stay as they are, but for an unfinished
// last one, which is completed so as to rhyme. A single wished consonant may be followed by long vowels or a
// pronoun's ending, as in rhyme(): the first verse decides which, and the others follow it.
class Keeper final : public Steering {
  public:
    static constexpr int FREE_TRIES = 24, MOST_TRIES = 96, TRIES_A_WORD = 8;

    // prompt: the tokens that the text begins with, of which the first `skip` (end-of-text and tags) are no
    // verse. Throws Error where wish.rhyme is no Arabic letters.
    Keeper(const Tokenizer& tokenizer, const Wish& wish, const std::vector<int>& prompt, size_t skip)
        : tokenizer_(tokenizer), wish_(wish), begin_(skip), prompt_(prompt.size()) {
        if (const std::string bad = wish.error(); !bad.empty()) fail("%s", bad.c_str());
        if (wish.rhyme != "auto") letters_ = rhyme_letters(wish.rhyme);
        for (int t = 0; t < tokenizer.first_tag(); t++) {
            if (ends_verse(t)) ends_.push_back(t);
            else if (begins_word(t)) after_words_.push_back(t);
            if (t != tokenizer.eot() && tokenizer.bytes(t) == "\n") newline_ = t;
        }
        for (size_t i = skip; i < prompt.size(); i++)
            if (ends_verse(prompt[i])) {
                const std::string verse = verse_of(prompt, i);
                if (rhymes() && verses::letters(verse) && !keeps(verse)) unrhymed_.push_back(count_ + 1);
                end_verse(verse, i + 1);
            }
        given_ = count_;
    }

    size_t redraws() const { return redraws_; }                        // tries taken back, of all verses
    const std::vector<size_t>& unrhymed() const { return unrhymed_; }  // numbers of verses, from 1
    size_t count() const { return count_; }                            // verses that are complete
    size_t given() const { return given_; }                            // of them, those of the prompt
    bool finished() const override { return wish_.verses && (int)count_ >= wish_.verses; }
    // The rhyme of the poem's verses, in reading order: the first verse's, or until one has it, the wished
    // one.
    std::string rhyme() const {
        std::string s;
        for (char32_t c : wanted_letters()) utf8::append(s, (uint32_t)c);
        return s;
    }

    void adjust(const std::vector<int>& text, float* logits) override {
        if (!may_end(text)) logits[tokenizer_.eot()] = -INFINITY;
        if (!guides()) return;
        const std::string verse = verse_of(text, text.size());
        if (may_end_here(verse)) {
            for (int t : after_words_) logits[newline_] = std::max(logits[newline_], logits[t] + 1);
            return;
        }
        for (int t : ends_) logits[t] = -INFINITY;
        if (verse.find('\t') != verse.npos)
            for (int t : after_words_)
                if (tokenizer_.bytes(t).find('\t') != std::string::npos) logits[t] = -INFINITY;
        lead_to_rhyme(verse, logits);
    }
    size_t settled(size_t length) const override { return rhymes() ? std::max(begin_, prompt_) : length; }
    size_t judge(const std::vector<int>& text, bool& ended) override {
        const bool complete = ended || (text.size() > prompt_ && ends_verse(text.back()));
        if (!complete && !guides()) return text.size();
        const std::string verse = verse_of(text, text.size());
        // A line without letters is not judged, unless a verse is being drawn again: an empty line must not
        // count as its success.
        const bool fails = rhymes() && (verses::letters(verse) ? !keeps(verse) : tries_ > 0);
        if (complete ? fails : is_too_long(verse)) {
            if (tries_ < MOST_TRIES) {
                if (!tries_) {
                    first_end_ = text.size(), first_letters_ = verses::letters(verse);
                    first_divided_ = verse.find('\t') != verse.npos;
                }
                tries_++, redraws_++, ended = false;
                return cut(text);
            }
            if (verses::letters(verse)) unrhymed_.push_back(count_ + 1);
        } else if (!complete) {
            return text.size();
        }
        end_verse(verse, text.size());
        if (finished()) ended = true;
        return text.size();
    }

  private:
    // Whether the poem may end after the text: the wished verses are complete, or the last one is begun.
    bool may_end(const std::vector<int>& text) const {
        const int missing = wish_.verses - (int)count_;
        return missing <= 0 || (missing == 1 && verses::letters(verse_of(text, text.size())) > 0);
    }
    bool rhymes() const { return !wish_.rhyme.empty(); }
    bool guides() const { return tries_ >= FREE_TRIES && tries_ < MOST_TRIES && newline_ >= 0; }
    bool ends_verse(int token) const {
        return token == tokenizer_.eot() || tokenizer_.bytes(token).find('\n') != std::string::npos;
    }
    // The verse that begins at begin_, up to the token number `end` of the text
    std::string verse_of(const std::vector<int>& text, size_t end) const {
        std::string verse;
        for (size_t i = begin_; i < end; i++)
            if (text[i] != tokenizer_.eot()) verse += tokenizer_.bytes(text[i]);
        return valid_part(verse);
    }
    // The text without the bytes that form no character: a byte-level model may end a line within a letter.
    static std::string valid_part(const std::string& text) {
        std::string valid;
        uint32_t c;
        for (size_t i = 0, n; i < text.size(); i += std::max<size_t>(n, 1))
            n = utf8::decode(text, i, &c), valid.append(text, i, n);
        return valid;
    }
    // Whether a verse has the first one's rhyme, and ends in the wished letters.
    bool keeps(const std::string& verse) const {
        const std::u32string own = verses::rhyme(verse, false), all = rhyme_letters(verse);
        if (!rhyme_.empty() && own != rhyme_) return false;
        if (letters_.empty() || (letters_.size() == 1 && !own.empty() && own.back() == letters_[0]))
            return true;
        return all.size() >= letters_.size() &&
               !all.compare(all.size() - letters_.size(), all.npos, letters_);
    }
    // Makes tokens likelier that bring the verse's ending closer to the rhyme.
    void lead_to_rhyme(const std::string& verse, float* logits) {
        if (letters_of_.empty())
            for (int t = 0; t < tokenizer_.first_tag(); t++) {
                const std::string& bytes = tokenizer_.bytes(t);
                const bool text = t != tokenizer_.eot() && utf8::find_invalid(bytes) == utf8::VALID;
                letters_of_.push_back(text ? rhyme_letters(bytes) : std::u32string());
            }
        const std::u32string wanted = wanted_letters();
        std::u32string have = rhyme_letters(verse);
        if (have.size() > wanted.size())
            have.erase(0, have.size() - wanted.size());  // the rest does not matter
        const size_t done = progress(have, wanted);
        const float more = 0.1f * (float)(tries_ - FREE_TRIES);
        for (size_t t = 0; t < letters_of_.size(); t++) {
            if (letters_of_[t].empty()) continue;
            const size_t now = progress(have + letters_of_[t], wanted);
            if (now > done || now == wanted.size()) logits[t] += done ? 2 * more : more;
        }
    }
    // The letters that the verse is to end in, in reading order
    std::u32string wanted_letters() const {
        return rhyme_.size() < letters_.size() ? letters_ : std::u32string(rhyme_.rbegin(), rhyme_.rend());
    }
    // How many of the wanted letters, from the first on, the text ends in.
    static size_t progress(const std::u32string& text, const std::u32string& wanted) {
        for (size_t n = std::min(text.size(), wanted.size()); n > 0; n--)
            if (!text.compare(text.size() - n, n, wanted, 0, n)) return n;
        return 0;
    }
    // Whether the verse, as long as it is now, may end: it has the rhyme, and, where the first try was
    // divided, a second hemistich that is not much shorter than the first.
    bool may_end_here(const std::string& verse) const {
        const size_t tab = verse.find('\t');
        const std::string_view all = verse, second = all.substr(std::min(tab, all.size()));
        const bool divided = tab == verse.npos
                                 ? !first_divided_
                                 : 5 * verses::letters(second) > 3 * verses::letters(all.substr(0, tab));
        return divided && verses::letters(verse) && keeps(verse);
    }
    // Whether the verse has become much longer than the model made it at first
    bool is_too_long(const std::string& verse) const { return verses::letters(verse) > first_letters_ + 5; }
    void end_verse(const std::string& verse, size_t end) {
        if (verses::letters(verse)) {
            if (rhyme_.empty() && keeps(verse)) rhyme_ = verses::rhyme(verse, false);
            count_++;
        }
        begin_ = end, tries_ = 0;
    }
    // Where to draw again from: words before the first try's end, every TRIES_A_WORD tries one more.
    size_t cut(const std::vector<int>& text) const {
        size_t at = std::min(text.size(), first_end_);
        for (int words = 1 + tries_ / TRIES_A_WORD; words > 0 && at > begin_; words--) {
            while (at > begin_ && !has_letter(text[at - 1])) at--;
            while (at > begin_ && has_letter(text[at - 1]) && !begins_word(text[at - 1])) at--;
            if (at > begin_ && begins_word(text[at - 1])) at--;
        }
        return std::max(at, prompt_);
    }
    // A token of a word: one with bytes other than white space. GPT-2's begin words with a space.
    bool has_letter(int token) const {
        return token != tokenizer_.eot() &&
               tokenizer_.bytes(token).find_first_not_of(" \t\n") != std::string::npos;
    }
    bool begins_word(int token) const { return tokenizer_.bytes(token).find_first_of(" \t\n") == 0; }

    const Tokenizer& tokenizer_;
    const Wish wish_;
    std::u32string letters_, rhyme_;  // wished, in reading order; the poem's, the last letter first
    size_t begin_, prompt_;           // tokens before the verse that is being written; of the prompt
    size_t count_ = 0, given_ = 0, redraws_ = 0;
    int tries_ = 0;
    // Of the verse's first try: tokens of the text, letters of the verse, whether it had two hemistichs
    size_t first_end_ = 0, first_letters_ = 0;
    bool first_divided_ = false;
    std::vector<size_t> unrhymed_;
    std::vector<int> ends_;                   // tokens with a line's end, and end-of-text
    std::vector<int> after_words_;            // other tokens that begin with white space
    int newline_ = -1;                        // the token that is a line's end alone; -1: none
    std::vector<std::u32string> letters_of_;  // of each token, as a rhyme takes them; made when first needed
};

}  // namespace verses
