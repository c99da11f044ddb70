// prepare_data.cpp - turns poems (CSV or plain text) into token files for the trainers.
//
//     ./prepare_data poems.csv -o poems      writes poems/train.bin, poems/val.bin, poems/tokenizer.bin
//
// The steps: read, clean, drop duplicates, split by whole poems, tokenize, write. A poem is one string: each
// verse is a line, and a TAB separates the two hemistichs of a verse. In the token files an end-of-text token
// precedes each poem, so that a model that is given end-of-text begins a new poem.
#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "data/dataloader.h"
#include "lib/flags.h"
#include "lib/io.h"
#include "lib/run_folder.h"
#include "lib/rng.h"
#include "tokenizer/tokenizer.h"

namespace prep {

struct Options {
    std::vector<std::string> files;
    std::string out, tokenizer;
    std::string format = "auto", column = "poem_text", where, except, layout = "auto", keep = "letters",
                on_error = "fail";
    bool normalize_alef = false, normalize_hamza = false, normalize_ya = false, normalize_ta = false;
    bool remove_tatweel = false, remove_tashkeel = false;
    float val_fraction = 0.1f;
    int min_chars = 1;
    uint64_t seed = 1337;
};

struct Poem {
    std::string text;
    size_t chars, verses;
};

// The size of one side of the split, train or val.
struct Side {
    size_t poems = 0, verses = 0, chars = 0, tokens = 0;
};

// What a run found and did, for the user and for the tests.
struct Report {
    std::vector<std::string> sources;  // one line per file
    size_t poems_read = 0;             // before anything was dropped
    size_t filtered = 0;               // CSV rows that --where or --except left out
    // Poems dropped: wrong number of fields, invalid UTF-8, nothing left after cleaning, below --min_chars,
    // equal to an earlier poem
    size_t ragged = 0, invalid = 0, empty = 0, too_short = 0, duplicates = 0;
    std::vector<std::string> where_ragged, where_invalid;  // the first EXAMPLES places
    std::map<uint32_t, size_t> removed;                    // code points removed by cleaning -> how often
    size_t replaced = 0;                                   // characters changed by the --normalize switches
    size_t related_poems = 0, families = 0, largest_family = 0;  // families of at least two poems
    size_t kept_for_characters = 0;  // poems drawn for val but kept in train, which needs their characters
    Side train, val;
    std::string no_val;  // why there is no validation split; empty if there is one
    int vocab_size = 0;
    bool byte_bpe = false;  // the tokenizer's kind: byte-level BPE, else one token per character
};

constexpr size_t EXAMPLES = 3;  // how many places of each kind the report names; the others are only counted

// ---------------------------------------------------------------------------------------------
// Cleaning

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

// Cleans poems as the options say, and counts what it removes and replaces.
class Cleaner {
  public:
    size_t replaced = 0;

    explicit Cleaner(const Options& o) : o_(o), letters_only_(o.keep == "letters") {
        for (uint32_t c = 0; c < TABLE; c++) cleaned_[c] = cleaned(c);
    }

    // Returns the cleaned text, as the model will see it; the input must be valid UTF-8. A run of white space
    // becomes one character, the strongest in the run: newline, else TAB, else space. White space at the
    // beginning and the end is removed.
    std::string operator()(std::string_view text) {
        std::string out;
        out.reserve(text.size());
        char space = 0;  // the white space seen since the last character, as the character it becomes
        for (size_t i = 0; i < text.size();) {
            uint32_t c = 0;
            i += utf8::decode(text, i, &c);
            uint32_t to = c < TABLE ? cleaned_[c] : cleaned(c);
            if (to == '\n' || to == '\t' || to == ' ') {
                if (!space || to == '\n' || (to == '\t' && space == ' ')) space = (char)to;
                continue;
            }
            if (to == REMOVED) {
                (c < TABLE ? removed_[c] : removed_beyond_[c])++;
                continue;
            }
            if (to != c) replaced++;
            if (space && !out.empty()) out += space;
            space = 0;
            utf8::append(out, to);
        }
        return out;
    }

    // The code points removed so far, and how often each was.
    std::map<uint32_t, size_t> removed() const {
        std::map<uint32_t, size_t> all = removed_beyond_;
        for (uint32_t c = 0; c < TABLE; c++)
            if (removed_[c]) all[c] = removed_[c];
        return all;
    }

  private:
    static constexpr uint32_t REMOVED = 0;
    static constexpr uint32_t TABLE = 0x800;  // characters of one or two UTF-8 bytes, which include Arabic

    // What a character becomes: itself, another letter, a kind of white space, or REMOVED.
    uint32_t cleaned(uint32_t c) const {
        if (c == '\t') return '\t';
        if (is_newline(c)) return '\n';
        if (is_other_space(c)) return ' ';
        if (o_.normalize_alef && (c == 0x0622 || c == 0x0623 || c == 0x0625 || c == 0x0671)) c = 0x0627;
        if (o_.normalize_hamza && c == 0x0624) c = 0x0648;
        if (o_.normalize_hamza && c == 0x0626) c = 0x064A;
        if (o_.normalize_ya && c == 0x0649) c = 0x064A;
        if (o_.normalize_ta && c == 0x0629) c = 0x0647;
        if (o_.remove_tatweel && c == 0x0640) return REMOVED;
        if (o_.remove_tashkeel && ((c >= 0x064B && c <= 0x065F) || c == 0x0670)) return REMOVED;
        if (letters_only_) return c >= 0x0621 && c <= 0x064A ? c : REMOVED;
        return is_control(c) ? REMOVED : c;
    }

    const Options& o_;
    const bool letters_only_;
    uint32_t cleaned_[TABLE];
    size_t removed_[TABLE] = {};
    std::map<uint32_t, size_t> removed_beyond_;  // the same for code points from TABLE on
};

// ---------------------------------------------------------------------------------------------
// Reading

// Reads a comma-separated file (RFC 4180) record by record. The text must outlive the reader.
class CsvReader {
  public:
    struct Field {
        std::string_view raw;  // as written in the file, without the outer quotes
        bool doubled;          // raw writes a quote as ""
        std::string text() const {
            std::string s;
            for (size_t i = 0; i < raw.size(); i++) {
                s += raw[i];
                if (doubled && raw[i] == '"') i++;
            }
            return s;
        }
    };
    std::vector<Field> fields;  // of the record that next() has read
    size_t line = 0;            // the line on which that record begins; the first is 1

    CsvReader(const std::string& path, std::string_view text) : path_(path), text_(text) {}

    // Reads the next record and skips empty lines; false at the end of the file.
    bool next() {
        do {
            if (pos_ >= text_.size()) return false;
            fields.clear();
            line = line_;
            do fields.push_back(at(pos_) == '"' ? quoted_field() : plain_field());
            while (at(pos_) == ',' && ++pos_);
            if (at(pos_) == '\r') pos_++;
            if (at(pos_) == '\n') pos_++, line_++;
        } while (fields.size() == 1 && fields[0].raw.empty());
        return true;
    }

  private:
    char at(size_t i) const { return i < text_.size() ? text_[i] : '\0'; }
    bool ends_field(size_t i) const {
        return i >= text_.size() || text_[i] == ',' || text_[i] == '\n' ||
               (text_[i] == '\r' && (i + 1 == text_.size() || text_[i + 1] == '\n'));
    }
    Field plain_field() {
        size_t begin = pos_;
        while (!ends_field(pos_)) pos_++;
        return {text_.substr(begin, pos_ - begin), false};
    }
    Field quoted_field() {
        size_t begin = ++pos_, opened = line_;
        bool doubled = false;
        for (;; pos_ += 2, doubled = true) {  // a single quote ends the field, a doubled one is part of it
            pos_ = text_.find('"', pos_);
            if (pos_ == std::string_view::npos)
                fail("%s: line %zu: a quoted field begins here but never ends", path_.c_str(), opened);
            if (at(pos_ + 1) != '"') break;
        }
        Field f{text_.substr(begin, pos_ - begin), doubled};
        line_ += (size_t)std::count(f.raw.begin(), f.raw.end(), '\n');
        if (!ends_field(++pos_))
            fail(
                "%s: line %zu: text follows the closing quote of a field that begins on line %zu "
                "(unbalanced quotes?)",
                path_.c_str(), line_, opened);
        return f;
    }

    const std::string& path_;
    std::string_view text_;
    size_t pos_ = 0, line_ = 1;
};

// Cuts a text into lines, without the newline characters.
class LineReader {
  public:
    explicit LineReader(std::string_view text) : text_(text) {}
    bool next(std::string_view* line) {
        if (pos_ >= text_.size()) return false;
        size_t end = std::min(text_.find('\n', pos_), text_.size());
        *line = text_.substr(pos_, end - pos_);
        pos_ = end + 1;
        return true;
    }

  private:
    std::string_view text_;
    size_t pos_ = 0;
};

// The beginning of the user's text for an error message: one line, at most MOST bytes and "...".
inline std::string excerpt(std::string_view text) {
    constexpr size_t MOST = 60;
    std::string s(
        text.substr(0, text.size() > MOST ? utf8::printable_prefix(text.substr(0, MOST)) : text.size()));
    for (char& c : s)
        if ((unsigned char)c < 0x20) c = ' ';
    return s.size() < text.size() ? s + "..." : s;
}
inline bool is_blank(std::string_view line) {
    return line.find_first_not_of(" \t\r\v\f") == std::string_view::npos;
}

// Reads files into cleaned poems without duplicates, and counts in the report what it reads and drops.
class Collector {
  public:
    std::deque<Poem> poems;  // a deque, because seen_ points into the texts

    Collector(const Options& o, Report& r) : o_(o), r_(r), clean_(o) {}

    void read_file(const std::string& path) {
        Reader in(path);
        const std::string content = in.rest();
        if (content.empty()) fail("%s: is empty", path.c_str());
        path_ = &path, file_begin_ = content.data();
        std::string_view text = content;
        if (text.substr(0, 3) == "\xEF\xBB\xBF") text.remove_prefix(3);
        if (text.substr(0, 2) == "\xFF\xFE" || text.substr(0, 2) == "\xFE\xFF")
            fail("%s: is UTF-16, wanted UTF-8 (iconv -f UTF-16 -t UTF-8 converts it)", path.c_str());
        size_t before = r_.poems_read;
        std::string how = is_csv(text) ? read_csv(text) : read_text(text);
        r_.sources.push_back(strf("%s: %s, %s, %s poems", path.c_str(),
                                  human_bytes((double)content.size()).c_str(), how.c_str(),
                                  commas(r_.poems_read - before).c_str()));
    }
    void finish() { r_.removed = clean_.removed(), r_.replaced = clean_.replaced; }

  private:
    bool is_csv(std::string_view text) const {
        if (o_.format != "auto") return o_.format == "csv";
        if (path_->size() >= 4 && !strcasecmp(path_->c_str() + path_->size() - 4, ".csv")) return true;
        // With any other name the file is a CSV if its first line is a header that names the column.
        std::string_view first_line = text.substr(0, text.find('\n'));
        if (std::count(first_line.begin(), first_line.end(), '"') % 2) return false;
        CsvReader csv(*path_, first_line);
        try {
            return csv.next() && column_of(csv) < csv.fields.size();
        } catch (const Error&) {
            return false;
        }
    }
    size_t column_of(const CsvReader& csv) const { return column_of(csv, o_.column); }
    static size_t column_of(const CsvReader& csv, const std::string& name) {
        size_t i = 0;
        while (i < csv.fields.size() && csv.fields[i].text() != name) i++;
        return i;
    }
    // The number of the column called `name`; an Error if there is none. `flag` is the switch that named it.
    size_t column_named(const CsvReader& csv, const std::string& name, const char* flag) const {
        size_t column = column_of(csv, name);
        if (column < csv.fields.size()) return column;
        std::string found;
        for (const auto& f : csv.fields) {
            if (utf8::find_invalid(f.raw) != std::string::npos)
                fail("%s: is not UTF-8 text: its header line has other bytes", path_->c_str());
            found += (&f == &csv.fields[0] ? "" : ", ") + excerpt(f.text());
        }
        fail("%s: has no column '%s'; its columns are %s (%s chooses one)", path_->c_str(), name.c_str(),
             found.c_str(), flag);
    }
    // COLUMN=VALUE, met by rows whose column has that value. No row meets an empty condition.
    struct Condition {
        size_t column = SIZE_MAX;
        std::string value;
        bool met(const CsvReader& csv) const {
            return column != SIZE_MAX && csv.fields[column].text() == value;
        }
    };
    Condition condition(const CsvReader& csv, const std::string& text, const char* flag) const {
        if (text.empty()) return {};
        size_t equals = text.find('=');
        return {column_named(csv, text.substr(0, equals), flag), text.substr(equals + 1)};
    }

    std::string read_csv(std::string_view text) {
        CsvReader csv(*path_, text);
        if (!csv.next()) fail("%s: has no header line", path_->c_str());
        const size_t columns = csv.fields.size(), column = column_named(csv, o_.column, "--column");
        const Condition where = condition(csv, o_.where, "--where"),
                        except = condition(csv, o_.except, "--except");
        while (csv.next()) {
            if (csv.fields.size() == columns) {
                if ((!o_.where.empty() && !where.met(csv)) || except.met(csv)) r_.filtered++;
                else add(csv.fields[column].raw, csv.line, csv.fields[column].doubled);
                continue;
            }
            r_.poems_read++;
            if (r_.ragged++ < EXAMPLES)
                r_.where_ragged.push_back(strf("%s line %zu: %zu fields, the header has %zu", path_->c_str(),
                                               csv.line, csv.fields.size(), columns));
        }
        return "CSV column " + o_.column;
    }

    std::string read_text(std::string_view text) {
        if (!o_.where.empty() || !o_.except.empty())
            fail("%s: is plain text, but --%s needs the columns of a CSV", path_->c_str(),
                 o_.where.empty() ? "except" : "where");
        bool blank_lines = o_.layout == "blank" || (o_.layout == "auto" && has_blank_line_inside(text));
        LineReader lines(text);
        std::string_view line;
        size_t number = 0, first_line = 0;
        const char *begin = nullptr, *end = nullptr;  // of the poem being read
        auto flush = [&] {
            if (begin) add(std::string_view(begin, (size_t)(end - begin)), first_line, false);
            begin = nullptr;
        };
        while (lines.next(&line)) {
            number++;
            if (is_blank(line)) {
                flush();
                continue;
            }
            if (!begin) begin = line.data(), first_line = number;
            end = line.data() + line.size();
            if (!blank_lines) flush();
        }
        flush();
        return blank_lines ? "text, poems separated by blank lines" : "text, one poem per line";
    }
    static bool has_blank_line_inside(std::string_view text) {
        LineReader lines(text);
        std::string_view line;
        for (bool text_seen = false, gap = false; lines.next(&line);) {
            if (is_blank(line)) gap = text_seen;
            else if (gap) return true;
            else text_seen = true;
        }
        return false;
    }

    // Cleans and keeps one poem, given as it is written in the file, or counts why it is dropped.
    void add(std::string_view raw, size_t line, bool doubled_quotes) {
        r_.poems_read++;
        size_t bad = utf8::find_invalid(raw);
        if (bad != std::string_view::npos) {
            size_t offset = (size_t)(raw.data() - file_begin_) + bad;
            std::string where =
                strf("%s: invalid UTF-8 at byte %zu (0x%02X), in the poem that begins on line %zu",
                     path_->c_str(), offset, (unsigned)(unsigned char)raw[bad], line);
            if (o_.on_error == "fail") fail("%s; --on_error skip drops such poems", where.c_str());
            if (r_.invalid++ < EXAMPLES) r_.where_invalid.push_back(where);
            return;
        }
        std::string text = doubled_quotes ? clean_(CsvReader::Field{raw, true}.text()) : clean_(raw);
        size_t chars = utf8::count(text);
        if (chars == 0) r_.empty++;
        else if (chars < (size_t)o_.min_chars) r_.too_short++;
        else if (seen_.count(text)) r_.duplicates++;
        else {
            size_t verses = 1 + (size_t)std::count(text.begin(), text.end(), '\n');
            poems.push_back({std::move(text), chars, verses});
            seen_.insert(poems.back().text);
        }
    }

    const Options& o_;
    Report& r_;
    Cleaner clean_;
    std::unordered_set<std::string_view> seen_;
    const std::string* path_ = nullptr;
    const char* file_begin_ = nullptr;
};

// ---------------------------------------------------------------------------------------------
// Splitting

// Poems that share a pair of consecutive verses are related, as is a poem of a single verse with every poem
// that contains this verse. A family is everything that such relations connect, directly or through other
// poems. Returns each poem's family, identified by the index of its first poem.
//
// The families are a union-find forest: parent[i] leads from poem i to an earlier poem of its family, and
// the first poem of a family is its own parent.
inline std::vector<size_t> find_families(const std::deque<Poem>& poems) {
    std::vector<size_t> parent(poems.size());
    std::iota(parent.begin(), parent.end(), size_t(0));
    auto root = [&](size_t i) {
        while (parent[i] != i) i = parent[i] = parent[parent[i]];
        return i;
    };
    auto unite = [&](size_t a, size_t b) {
        a = root(a), b = root(b);
        parent[std::max(a, b)] = std::min(a, b);
    };

    // Pairs are compared by a 64-bit hash. A collision would put two unrelated poems into one family, which
    // does no harm.
    std::vector<std::pair<size_t, size_t>> pairs;         // hash, poem
    std::unordered_map<std::string_view, size_t> single;  // the verse of a poem of one verse -> the poem
    std::hash<std::string_view> hash;
    auto for_each_verse = [&](size_t i, auto f) {
        LineReader lines(poems[i].text);
        for (std::string_view verse; lines.next(&verse);) f(verse);
    };
    for (size_t i = 0; i < poems.size(); i++)
        if (poems[i].verses == 1) single[poems[i].text] = i;
    for (size_t i = 0; i < poems.size(); i++) {
        std::string_view previous;
        for_each_verse(i, [&](std::string_view verse) {
            if (!previous.empty()) {
                std::string_view pair(previous.data(),
                                      (size_t)(verse.data() + verse.size() - previous.data()));
                pairs.push_back({hash(pair), i});
            }
            previous = verse;
            auto lone = single.find(verse);
            if (lone != single.end()) unite(lone->second, i);
        });
    }
    std::sort(pairs.begin(), pairs.end());
    for (size_t k = 1; k < pairs.size(); k++)
        if (pairs[k].first == pairs[k - 1].first) unite(pairs[k].second, pairs[k - 1].second);

    for (size_t i = 0; i < poems.size(); i++) parent[i] = root(i);
    return parent;
}

// How often each code point occurs in a set of poems.
class CharacterCount {
  public:
    void add(const Poem& p) {
        utf8::for_each(p.text, [&](uint32_t c, size_t) { n_[c]++; });
    }
    // Removes the poems from the set and returns true, unless one of their characters would then no longer
    // occur in the set; in that case nothing changes and the result is false.
    bool take_if_covered(const std::deque<Poem>& poems, const std::vector<size_t>& which) {
        for (size_t i : which) utf8::for_each(poems[i].text, [&](uint32_t c, size_t) { n_[c]--; });
        bool covered = true;
        for (size_t i : which)
            utf8::for_each(poems[i].text, [&](uint32_t c, size_t) { covered = covered && n_[c] > 0; });
        if (!covered)
            for (size_t i : which) add(poems[i]);
        return covered;
    }

  private:
    std::vector<size_t> n_ = std::vector<size_t>(utf8::MAX_CODE_POINT + 1);
};

// Decides which poems are for validation; returns a flag for each poem. Families are drawn in random order
// and taken for validation as long as this brings their share of the characters closer to val_fraction. A
// family with the last occurrence of a character stays in training, because the new tokenizer is made from
// the training text; an existing tokenizer (--tokenizer) lifts this rule. Each side gets at least one family
// if that is possible; if not, r.no_val says why.
inline std::vector<bool> split(const std::deque<Poem>& poems, const Options& o, Report& r) {
    std::vector<bool> in_val(poems.size());
    std::vector<size_t> family = find_families(poems);
    std::vector<std::vector<size_t>> members(poems.size());
    for (size_t i = 0; i < poems.size(); i++) members[family[i]].push_back(i);
    std::vector<size_t> order;
    for (size_t i = 0; i < poems.size(); i++) {
        if (members[i].empty()) continue;
        order.push_back(i);
        r.largest_family = std::max(r.largest_family, members[i].size());
        if (members[i].size() > 1) r.related_poems += members[i].size(), r.families++;
    }
    if (o.val_fraction == 0 || order.size() < 2) {
        r.no_val = o.val_fraction == 0 ? "--val_fraction is 0"
                   : poems.size() < 2  ? "there is only one poem"
                                       : "all poems are related by shared verses";
        return in_val;
    }
    rng::shuffle(order.data(), order.size(), rng::Key(o.seed, 0, rng::SPLIT));

    double total = 0, taken = 0;
    CharacterCount in_train;
    for (const Poem& p : poems) total += (double)p.chars, in_train.add(p);
    auto size = [&](size_t f) {
        double n = 0;
        for (size_t i : members[f]) n += (double)poems[i].chars;
        return n;
    };
    size_t families_left = order.size();  // in training
    auto take = [&](size_t f) {
        if (o.tokenizer.empty() && !in_train.take_if_covered(poems, members[f])) return false;
        for (size_t i : members[f]) in_val[i] = true;
        taken += size(f), families_left--;
        return true;
    };
    double target = (double)o.val_fraction * total;
    for (size_t f : order) {
        bool closer = taken + size(f) - target <= target - taken;
        if (closer && families_left > 1 && !take(f)) r.kept_for_characters += members[f].size();
    }
    if (taken == 0) {  // every family overshoots the target too far: take the smallest that may be taken
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return size(a) < size(b); });
        for (size_t k = 0; k < order.size() && taken == 0; k++) take(order[k]);
    }
    if (taken == 0) r.no_val = "each poem has a character that no other poem has";
    return in_val;
}

// ---------------------------------------------------------------------------------------------
// Writing

// The token stream of one side: each poem after an end-of-text token, in the order of the input. Counts the
// side's poems, verses, characters and tokens in `side`.
inline std::vector<uint16_t> tokenize(const Tokenizer& tok, const std::deque<Poem>& poems,
                                      const std::vector<bool>& in_val, bool val, const Options& o,
                                      Side& side) {
    std::vector<uint16_t> stream;
    auto put = [&](int id) {
        if (id > UINT16_MAX)
            fail("%s: token %d (%s) does not fit into a token file, whose tokens have 16 bits",
                 o.tokenizer.c_str(), id, utf8::quote(tok.bytes(id)).c_str());
        stream.push_back((uint16_t)id);
    };
    for (size_t i = 0; i < poems.size(); i++) {
        if (in_val[i] != val) continue;
        put(tok.eot());
        try {
            for (int id : tok.encode(poems[i].text)) put(id);
        } catch (const Error& e) {
            fail("%s: cannot tokenize poem %zu of those kept: %s%s", o.tokenizer.c_str(), i + 1, e.what(),
                 tok.kind() == Tokenizer::CHARACTERS
                     ? "; use the cleaning switches that the tokenizer was made with"
                     : "");
        }
        side.poems++, side.verses += poems[i].verses, side.chars += poems[i].chars;
    }
    side.tokens = stream.size();
    return stream;
}

inline void check_options(const Options& o) {
    if (o.files.empty()) throw UsageError("no poems are given: ./prepare_data poems.csv -o DIR; see --help");
    if (o.out.empty())
        throw UsageError("-o DIR is missing: the folder for train.bin, val.bin and tokenizer.bin");
    if (!(o.val_fraction >= 0 && o.val_fraction < 1))
        throw UsageError(
            strf("--val_fraction: %g is out of range, wanted at least 0 and below 1", o.val_fraction));
    for (auto [flag, text] :
         {std::pair<const char*, const std::string*>{"--where", &o.where}, {"--except", &o.except}})
        if (!text->empty() && text->find('=') == text->npos)
            throw UsageError(strf("%s: '%s' is not a condition, wanted COLUMN=VALUE", flag, text->c_str()));
}

inline void write_data_set(const std::string& dir, const Tokenizer& tok, const std::vector<uint16_t>& train,
                           const std::vector<uint16_t>& val) {
    DataSetWriter set(dir);
    tok.save(set.path("tokenizer.bin"));
    const std::string old = dir + "/tokenizer.bin";
    if (trainer::holds_run(dir) && file_exists(old) &&
        Reader(old).rest() != Reader(set.path("tokenizer.bin")).rest())
        fail("%s: holds a run whose tokenizer would be replaced by another one; take another folder with -o",
             dir.c_str());
    write_tokens(set.path("train.bin"), train);
    if (!val.empty()) write_tokens(set.path("val.bin"), val);
    set.commit();
}

// The whole program except for its command line. Writes nothing until everything has succeeded.
inline Report prepare(const Options& o) {
    check_options(o);
    trainer::BeforeTraining lock(o.out);
    Report r;
    Collector collector(o, r);
    for (const std::string& path : o.files) collector.read_file(path);
    collector.finish();
    const std::deque<Poem>& poems = collector.poems;
    if (r.filtered && !r.poems_read)
        fail("--where '%s' and --except '%s' leave none of %zu rows", o.where.c_str(), o.except.c_str(),
             r.filtered);
    if (poems.empty())
        fail(
            "nothing is left of %zu poems: %zu empty after cleaning, %zu too short, %zu ragged rows, %zu "
            "with invalid UTF-8%s",
            r.poems_read, r.empty, r.too_short, r.ragged, r.invalid,
            r.empty && o.keep == "letters" ? " (--keep all keeps more than Arabic letters)" : "");

    std::vector<bool> in_val = split(poems, o, r);
    Tokenizer tok;
    if (o.tokenizer.empty()) {
        std::string training_text;
        for (size_t i = 0; i < poems.size(); i++)
            if (!in_val[i]) training_text += poems[i].text;
        tok = Tokenizer::characters(training_text);
    } else {
        tok = Tokenizer::load(o.tokenizer);
    }
    r.vocab_size = tok.vocab_size(), r.byte_bpe = tok.kind() == Tokenizer::BYTE_BPE;
    std::vector<uint16_t> train = tokenize(tok, poems, in_val, false, o, r.train);
    std::vector<uint16_t> val = tokenize(tok, poems, in_val, true, o, r.val);
    write_data_set(o.out, tok, train, val);
    return r;
}

inline void print_report(const Report& r, const Options& o, FILE* f) {
    auto row = [&](const char* what, const std::string& text) {
        fprintf(f, "%-11s %s\n", what, text.c_str());
    };
    auto count = [](size_t n, const char* one, const char* many) {
        return commas(n) + " " + (n == 1 ? one : many);
    };
    for (const std::string& s : r.sources) row(&s == &r.sources[0] ? "read" : "", s);

    if (r.filtered) row("", commas(r.filtered) + " rows left out by --where and --except");
    std::string dropped;
    auto drop = [&](size_t n, const char* why) {
        if (n) dropped += (dropped.empty() ? "" : ", ") + commas(n) + " " + why;
    };
    drop(r.duplicates, "equal to an earlier poem");
    drop(r.empty, "empty after cleaning");
    drop(r.too_short, "shorter than --min_chars");
    drop(r.ragged, "with more or fewer fields than the header");
    drop(r.invalid, "with invalid UTF-8");
    row("dropped", dropped.empty() ? "no poem" : dropped);
    for (const std::string& s : r.where_ragged) row("", s);
    for (const std::string& s : r.where_invalid) row("", s);

    size_t removed = 0;
    std::vector<std::pair<size_t, uint32_t>> most;
    for (auto& [c, n] : r.removed) removed += n, most.push_back({n, c});
    std::stable_sort(most.begin(), most.end(), [](auto& a, auto& b) { return a.first > b.first; });
    std::string cleaned = count(removed, "character removed", "characters removed");
    for (size_t i = 0; i < most.size() && i < 5; i++)
        cleaned += (i ? ", " : ": ") + utf8::name(most[i].second) + " " + commas(most[i].first);
    if (most.size() > 5) cleaned += ", ...";
    if (r.replaced) cleaned += "; " + commas(r.replaced) + " normalized";
    row("cleaned", cleaned);

    if (r.families)
        row("related",
            strf("%s poems share verse pairs, in %s families (largest %s); a family is never split",
                 commas(r.related_poems).c_str(), commas(r.families).c_str(),
                 commas(r.largest_family).c_str()));
    if (r.kept_for_characters)
        row("", strf("%s drawn for validation, but kept in training, which needs their rare characters",
                     count(r.kept_for_characters, "poem", "poems").c_str()));

    double chars = (double)(r.train.chars + r.val.chars);
    fprintf(f, "\n%-8s %10s %10s %12s %12s %8s\n", "", "poems", "verses", "characters", "tokens", "share");
    for (const Side* s : {&r.train, &r.val})
        fprintf(f, "%-8s %10s %10s %12s %12s %7.1f%%\n", s == &r.train ? "train" : "val",
                commas(s->poems).c_str(), commas(s->verses).c_str(), commas(s->chars).c_str(),
                commas(s->tokens).c_str(), 100.0 * (double)s->chars / chars);
    fprintf(f, "\n");

    double text_tokens = (double)(r.train.tokens - r.train.poems + r.val.tokens - r.val.poems);
    row("vocabulary",
        strf("%d tokens", r.vocab_size) +
            (o.tokenizer.empty() ? ": the characters of train, and end-of-text" : " of " + o.tokenizer) +
            (r.byte_bpe ? strf(": byte-level BPE, %.2f characters per token", chars / text_tokens) : ""));
    row("wrote", strf("%s/{train.bin, %stokenizer.bin}", o.out.c_str(), r.no_val.empty() ? "val.bin, " : ""));
    if (!r.no_val.empty()) row("", "no val.bin: " + r.no_val);
    row("next", beside_program("train_gpt2") + " --data " + shell_quoted(o.out));
}

inline int prepare_main(int argc, char** argv) {
    Options o;
    Flags f("prepare_data", "turns poems into token files for the trainers");
    f.positional(&o.files, "poems.csv [more files]");
    f.section("Files");
    f.add("out", "o", &o.out, "DIR", "folder for train.bin, val.bin and tokenizer.bin; created if missing");
    f.add("format", "", &o.format, "F", "auto decides by the file name, then by the header line")
        .choices({"auto", "csv", "text"});
    f.add("column", "", &o.column, "NAME",
          "CSV column with the poem: one verse per line, a TAB between hemistichs");
    f.add("where", "", &o.where, "COL=VALUE",
          "CSV: only rows with this value, e.g. poet_name=\u0627\u0644\u0645\u062A\u0646\u0628\u064A");
    f.add("except", "", &o.except, "COL=VALUE", "CSV: only rows without this value");
    f.add("layout", "", &o.layout, "L", "text: lines = one poem per line, blank = blank lines between poems")
        .choices({"auto", "lines", "blank"});
    f.add("on_error", "", &o.on_error, "E", "invalid UTF-8: stop at the first, or skip and count such poems")
        .choices({"fail", "skip"});
    f.add("tokenizer", "", &o.tokenizer, "FILE",
          "use this tokenizer instead of making one (for fine-tuning)");
    f.section("Cleaning (always: a run of white space becomes one newline, TAB or space)");
    f.add("keep", "", &o.keep, "WHAT",
          "letters = only U+0621..U+064A, no vowel signs; all = everything but control characters")
        .choices({"letters", "all"});
    f.add("normalize_alef", "", &o.normalize_alef, "\u0623 \u0625 \u0622 \u0671 become \u0627");
    f.add("normalize_hamza", "", &o.normalize_hamza,
          "\u0624 becomes \u0648, \u0626 becomes \u064A; \u0621 is kept");
    f.add("normalize_ya", "", &o.normalize_ya, "\u0649 becomes \u064A");
    f.add("normalize_ta", "", &o.normalize_ta, "\u0629 becomes \u0647");
    f.add("remove_tatweel", "", &o.remove_tatweel, "remove the stretching sign U+0640");
    f.add("remove_tashkeel", "", &o.remove_tashkeel,
          "remove vowel signs U+064B..U+065F, U+0670 (--keep letters always does)");
    f.add("min_chars", "", &o.min_chars, "N", "drop poems shorter than this after cleaning")
        .range(1, INFINITY);
    f.section("Split (whole poems; poems that share two consecutive verses stay together)");
    f.add("val_fraction", "", &o.val_fraction, "X", "share of the characters for validation; 0 = no val.bin");
    f.add("seed", "", &o.seed, "N", "decides which poems are for validation");
    f.epilogue(
        "examples:\n"
        "  ./prepare_data poems.csv -o poems && ./train_gpt2 --data poems\n"
        "  ./prepare_data diwan.txt more.txt --layout blank --keep all --remove_tashkeel -o diwan\n");
    f.parse(argc, argv);
    Report r = prepare(o);
    print_report(r, o, stdout);
    return 0;
}

}  // namespace prep

#ifndef ARAPOET_NO_MAIN
int main(int argc, char** argv) {
    signal(SIGPIPE, SIG_IGN);  // the data are written also if nobody reads the report (| head)
    return run_main("prepare_data", [&] { return prep::prepare_main(argc, argv); });
}
#endif
