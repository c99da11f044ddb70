// prepare_data.cpp - turns poems (CSV, JSON or plain text) into token files for the trainers.
//
//     ./prepare_data poems.csv -o poems      writes train.bin, val.bin, tokenizer.bin, recipe.txt to poems/
//
// The steps: read (poem_reader.h), clean (clean.h), drop duplicates, split by whole poems, tokenize, write. A
// poem is one string: each verse is a line, and a TAB separates the two hemistichs of a verse. In the token
// files an end-of-text token precedes each poem, so that a model that is given end-of-text begins a new poem;
// then come the poem's tags (--tags), if any.
#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <numeric>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "data/clean.h"
#include "data/dataloader.h"
#include "data/poem_reader.h"
#include "lib/flags.h"
#include "lib/io.h"
#include "lib/run_folder.h"
#include "lib/rng.h"
#include "tokenizer/tokenizer.h"

namespace prep {

struct Options : Recipe, ReadOptions {
    std::vector<std::string> files;
    std::string out, tokenizer, on_error = "fail";
    float val_fraction = 0.1f;
    int min_chars = 1, tag_min = 10;
    uint64_t seed = 1337;
};

struct Poem {
    std::string text;
    size_t chars, verses, tabs;  // the last: how many verses have a TAB
    std::vector<uint32_t> tags;  // for each column of --tags, the number of its value
};

// The size of one side of the split, train or val.
struct Side {
    size_t poems = 0, verses = 0, chars = 0, tokens = 0;
    size_t divided = 0;  // verses with a TAB between hemistichs
};

// What a run found and did, for the user and for the tests.
struct Report {
    std::vector<std::string> sources;  // one line per file
    size_t poems_read = 0;             // before anything was dropped
    size_t filtered = 0;               // rows that --where or --except left out
    // Dropped: rows with a wrong number of fields, rows that are damaged in another way, poems with invalid
    // UTF-8, with nothing left after cleaning, below --min_chars, equal to an earlier poem
    size_t ragged = 0, damaged = 0, invalid = 0, empty = 0, too_short = 0, duplicates = 0;
    std::vector<std::string> where_ragged, where_damaged, where_invalid;  // the first EXAMPLES places
    std::map<uint32_t, size_t> removed, mapped;  // code points that cleaning removed, mapped -> how often
    size_t replaced = 0;                         // characters changed by the --normalize switches
    std::string hemistich_separator;             // what all files have; "tab" where they differ
    std::vector<std::string> tags;               // one line for each tag
    size_t related_poems = 0, families = 0, largest_family = 0;  // families of at least two poems
    size_t kept_for_characters = 0;  // poems drawn for val but kept in train, which needs their characters
    Side train, val;
    std::string no_val;  // why there is no validation split; empty if there is one
    int vocab_size = 0;
    bool byte_bpe = false;  // the tokenizer's kind: byte-level BPE, else one token per character
};

constexpr size_t EXAMPLES = 3;  // how many places of each kind the report names; the others are only counted

// ---------------------------------------------------------------------------------------------
// Reading

// Reads files into cleaned poems without duplicates, and counts in the report what it reads and drops.
class Collector : PoemSink {
  public:
    std::deque<Poem> poems;                            // a deque, because seen_ points into the texts
    std::vector<std::string> tag_columns;              // of --tags
    std::vector<std::vector<std::string>> tag_values;  // for each, the values that occur

    Collector(const Options& o, Report& r) : o_(o), r_(r), cleaners_(PARTS, Cleaner(o)) {
        tag_columns = split_names(o.tags);
        tag_values.resize(tag_columns.size()), tag_numbers_.resize(tag_columns.size());
    }

    // Reads a file, standard input ("-"), or the files in a folder.
    void read_file(const std::string& path) {
        struct stat st;
        if (path != "-" && stat(path.c_str(), &st) == 0 && S_ISDIR(st.st_mode)) return read_folder(path);
        Input in(path);
        const size_t before = r_.poems_read;
        const std::string how = PoemReader(o_, o_, *this).read(in, false);
        add_source(in.path, in.bytes_read(), how, r_.poems_read - before);
    }
    void finish() {
        for (const Cleaner& c : cleaners_) {
            for (auto& [code, n] : c.removed()) r_.removed[code] += n;
            for (auto& [code, n] : c.mapped()) r_.mapped[code] += n;
            r_.replaced += c.replaced;
        }
        r_.hemistich_separator = separators_.size() == 1 ? *separators_.begin() : "tab";
    }
    // The first value that --where or --except names in vain; "" if there is none.
    std::string value_that_no_row_has() const {
        for (auto& [value, found] : named_)
            if (!found) return value;
        return "";
    }

  private:
    void add_source(const std::string& name, uint64_t bytes, const std::string& how, size_t poems) {
        r_.sources.push_back(strf("%s: %s, %s, %s %s", name.c_str(), human_bytes((double)bytes).c_str(),
                                  how.c_str(), commas(poems).c_str(), poems == 1 ? "poem" : "poems"));
    }
    void read_folder(const std::string& dir) {
        std::vector<std::string> paths;
        find_files(dir, paths);
        if (paths.empty()) fail("%s: is a folder without files", dir.c_str());
        const size_t before = r_.poems_read;
        uint64_t bytes = 0;
        std::set<std::string> hows;
        for (const std::string& path : paths) {
            struct stat st;
            if (stat(path.c_str(), &st) == 0 && st.st_size == 0) continue;
            Input in(path);
            hows.insert(PoemReader(o_, o_, *this).read(in, true)), bytes += in.bytes_read();
        }
        std::string how;
        for (const std::string& h : hows) how += (how.empty() ? "" : "; ") + h;
        add_source(strf("%s: %zu files", dir.c_str(), paths.size()), bytes, how, r_.poems_read - before);
    }
    // The files in a folder and its folders, in the order of their names, without hidden ones.
    static void find_files(const std::string& dir, std::vector<std::string>& paths) {
        for (const std::string& name : names_in(dir)) {
            const std::string path = dir + "/" + name;
            struct stat st;
            if (name[0] == '.' || lstat(path.c_str(), &st)) continue;
            if (S_ISDIR(st.st_mode)) find_files(path, paths);  // not through links, which may lead back here
            else if (stat(path.c_str(), &st) == 0 && S_ISREG(st.st_mode)) paths.push_back(path);
        }
    }

    void begin_file(const std::string& path, const VerseForm& form) override {
        path_ = path, form_ = &form, ragged_ = 0;
    }
    void end_file(size_t rows) override {
        add_batch(), form_ = nullptr;
        if (o_.on_error == "fail" && 2 * ragged_ > rows)
            fail(
                "%s: %zu of %zu rows have more or fewer fields than the header, e.g. %s (another "
                "delimiter, or quotes that are not doubled?); --on_error skip drops such rows",
                path_.c_str(), ragged_, rows, last_ragged_.c_str());
    }
    void left_out() override { r_.filtered++; }
    void named(const std::string& value, bool found) override { named_[value] |= found; }
    void bad_row(const Rows& row) override {
        const std::string where = strf("%s line %zu: %s", path_.c_str(), row.line, row.bad.c_str());
        r_.poems_read++;
        if (row.ragged) {
            if (r_.ragged++ < EXAMPLES) r_.where_ragged.push_back(where);
            ragged_++, last_ragged_ = where;
            return;
        }
        if (o_.on_error == "fail")
            fail("%s: line %zu: %s; --on_error skip drops such rows", path_.c_str(), row.line,
                 row.bad.c_str());
        if (r_.damaged++ < EXAMPLES) r_.where_damaged.push_back(where);
    }
    void poem(std::string_view raw, size_t line, uint64_t offset,
              const std::vector<std::string>& tags) override {
        constexpr size_t BATCH = 4 << 20;  // bytes
        batch_.push_back({std::string(raw), {}, utf8::VALID, line, offset, tags});
        batched_ += raw.size();
        if (batched_ >= BATCH) add_batch();
    }
    // Cleans the poems taken so far, on all cores, and keeps them or counts why they are dropped, in their
    // order.
    void add_batch() {
        const size_t parts = cleaners_.size(), n = batch_.size();
#pragma omp parallel for schedule(static)
        for (size_t part = 0; part < parts; part++)
            for (size_t i = n * part / parts; i < n * (part + 1) / parts; i++) {
                Taken& t = batch_[i];
                t.invalid = utf8::find_invalid(t.raw);
                if (t.invalid != utf8::VALID) continue;
                Poem& p = t.poem;
                p.text = cleaners_[part](form_->needs_arranging(t.raw) ? form_->arranged(t.raw) : t.raw);
                p.chars = utf8::count(p.text);
                for_each_line(p.text, [&](std::string_view verse) {
                    p.verses++, p.tabs += verse.find('\t') != verse.npos;
                });
            }
        for (Taken& t : batch_) keep(t);
        batch_.clear(), batched_ = 0;
    }
    struct Taken {
        std::string raw;  // as in the file
        Poem poem;        // cleaned
        size_t invalid;   // the first byte of raw that is not UTF-8, or VALID
        size_t line;
        uint64_t offset;
        std::vector<std::string> tags;
    };
    void keep(Taken& t) {
        r_.poems_read++;
        if (t.invalid != utf8::VALID) {
            const std::string at = t.offset == Rows::NONE
                                       ? ""
                                       : strf(" at byte %llu", (unsigned long long)(t.offset + t.invalid));
            const std::string where =
                strf("%s: invalid UTF-8%s (0x%02X), in the poem that begins on line %zu", path_.c_str(),
                     at.c_str(), (unsigned)(unsigned char)t.raw[t.invalid], t.line);
            if (o_.on_error == "fail") fail("%s; --on_error skip drops such poems", where.c_str());
            if (r_.invalid++ < EXAMPLES) r_.where_invalid.push_back(where);
            return;
        }
        if (t.poem.chars == 0) {
            r_.empty++;
        } else if (t.poem.chars < (size_t)o_.min_chars) {
            r_.too_short++;
        } else {
            poems.push_back(std::move(t.poem));
            if (!seen_.insert(poems.back().text).second) {
                poems.pop_back(), r_.duplicates++;
                return;
            }
            poems.back().tags = tag_ids(t.tags);
            separators_.insert(form_->separator.name());
        }
    }
    std::vector<uint32_t> tag_ids(const std::vector<std::string>& tags) {
        std::vector<uint32_t> ids;
        for (size_t k = 0; k < tags.size(); k++) {
            std::string value = Tokenizer::tag_value(tags[k]);
            auto [at, is_new] = tag_numbers_[k].insert({value, (uint32_t)tag_values[k].size()});
            if (is_new) tag_values[k].push_back(value);
            ids.push_back(at->second);
        }
        return ids;
    }

    const Options& o_;
    Report& r_;
    static constexpr size_t PARTS = 16;  // of a batch, each with a cleaner of its own
    std::vector<Cleaner> cleaners_;
    std::vector<Taken> batch_;
    size_t batched_ = 0;  // bytes of it
    std::unordered_set<std::string_view> seen_;
    std::set<std::string> separators_;   // of the files that poems were kept from
    std::map<std::string, bool> named_;  // the values of --where and --except, and whether a row has them
    std::vector<std::unordered_map<std::string, uint32_t>> tag_numbers_;
    std::string path_;  // of the file being read
    const VerseForm* form_ = nullptr;
    size_t ragged_ = 0;  // rows of that file
    std::string last_ragged_;
};

// ---------------------------------------------------------------------------------------------
// Splitting

// A verse's hash. with_marks: the verse may have vowel signs; they are ignored, so that verses are equal that
// differ only in them.
inline uint64_t verse_hash(std::string_view verse, bool with_marks) {
    if (!with_marks) return std::hash<std::string_view>()(verse);
    std::string bare;
    uint32_t last = 0;
    utf8::for_each(verse, [&](uint32_t c, size_t) {
        const uint32_t one = c >= 0x0653 && c <= 0x0655 ? composed(last, c) : 0;
        if (one) bare.resize(bare.size() - 2), utf8::append(bare, last = one);
        else if (c != TATWEEL && !is_mark(c)) utf8::append(bare, last = c);
    });
    return std::hash<std::string_view>()(bare);
}

// Poems that share a pair of consecutive verses are related, as is a poem of a single verse with every poem
// that contains this verse. Verses that differ only in vowel signs count as equal. A family is everything
// that such relations connect, directly or through other poems. Returns each poem's family, identified by the
// index of its first poem.
//
// with_marks: the poems may have vowel signs. Verses are compared by a 64-bit hash; a collision would put two
// unrelated poems into one family, which does no harm. The families are a union-find forest: parent[i] leads
// from poem i to an earlier poem of its family, and the first poem of a family is its own parent.
inline std::vector<size_t> find_families(const std::deque<Poem>& poems, bool with_marks) {
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

    std::vector<size_t> first(poems.size() + 1);  // where a poem's verses begin in `hashes`
    for (size_t i = 0; i < poems.size(); i++) first[i + 1] = first[i] + poems[i].verses;
    std::vector<uint64_t> hashes(first.back());
#pragma omp parallel for schedule(dynamic, 256)
    for (size_t i = 0; i < poems.size(); i++) {
        size_t k = first[i];
        for_each_line(poems[i].text,
                      [&](std::string_view verse) { hashes[k++] = verse_hash(verse, with_marks); });
    }
    std::unordered_map<uint64_t, size_t> single;  // the verse of a poem of one verse -> the first such poem
    for (size_t i = 0; i < poems.size(); i++)
        if (poems[i].verses == 1)
            if (auto [at, is_new] = single.insert({hashes[first[i]], i}); !is_new) unite(at->second, i);
    // The hash of two consecutive verses, and their poem; in parts that are sorted at the same time
    constexpr size_t PARTS = 16;
    std::vector<std::pair<uint64_t, size_t>> pairs[PARTS];
    for (size_t i = 0; i < poems.size(); i++)
        for (size_t k = first[i]; k < first[i + 1]; k++) {
            const uint64_t pair = k > first[i] ? hashes[k - 1] * 0x9E3779B97F4A7C15u + hashes[k] : 0;
            if (k > first[i]) pairs[pair % PARTS].push_back({pair, i});
            if (single.empty()) continue;
            auto lone = single.find(hashes[k]);
            if (lone != single.end()) unite(lone->second, i);
        }
#pragma omp parallel for schedule(dynamic, 1)
    for (auto& part : pairs) std::sort(part.begin(), part.end());
    for (const auto& part : pairs)
        for (size_t k = 1; k < part.size(); k++)
            if (part[k].first == part[k - 1].first) unite(part[k].second, part[k - 1].second);

    for (size_t i = 0; i < poems.size(); i++) parent[i] = root(i);
    return parent;
}

// How often each code point occurs in a set of poems.
class CharacterCount {
  public:
    // Adds all the poems.
    explicit CharacterCount(const std::deque<Poem>& poems = {}) {
#pragma omp parallel
        {
            std::vector<size_t> n(n_.size());
#pragma omp for schedule(dynamic, 256)
            for (size_t i = 0; i < poems.size(); i++)
                utf8::for_each(poems[i].text, [&](uint32_t c, size_t) { n[c]++; });
#pragma omp critical
            for (size_t c = 0; c < n.size(); c++) n_[c] += n[c];
        }
    }
    // Removes the poems from the set and returns true, unless one of their characters would then no longer
    // occur in the set; in that case nothing changes and the result is false.
    bool take_if_covered(const std::deque<Poem>& poems, const std::vector<size_t>& which) {
        for (size_t i : which) utf8::for_each(poems[i].text, [&](uint32_t c, size_t) { n_[c]--; });
        bool covered = true;
        for (size_t i : which)
            utf8::for_each(poems[i].text, [&](uint32_t c, size_t) { covered = covered && n_[c] > 0; });
        if (!covered)
            for (size_t i : which) utf8::for_each(poems[i].text, [&](uint32_t c, size_t) { n_[c]++; });
        return covered;
    }
    // Each character of the set once
    std::string characters() const {
        std::string s;
        for (uint32_t c = 0; c <= utf8::MAX_CODE_POINT; c++)
            if (n_[c]) utf8::append(s, c);
        return s;
    }

  private:
    std::vector<size_t> n_ = std::vector<size_t>(utf8::MAX_CODE_POINT + 1);
};

// Decides which poems are for validation; returns a flag for each poem. Families are drawn in random order
// and taken for validation as long as this brings their share of the characters closer to val_fraction. A
// family with the last occurrence of a character stays in training, because the new tokenizer is made from
// the training text; an existing tokenizer (--tokenizer) lifts this rule. Each side gets at least one family
// if that is possible; if not, r.no_val says why. in_train: the characters of the training part.
inline std::vector<bool> split(const std::deque<Poem>& poems, const Options& o, Report& r,
                               CharacterCount& in_train) {
    std::vector<bool> in_val(poems.size());
    if (o.tokenizer.empty()) in_train = CharacterCount(poems);
    std::vector<size_t> family = find_families(poems, o.keep == "all");
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
    for (const Poem& p : poems) total += (double)p.chars;
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

// How a poem of the data set becomes tokens: end-of-text, its tags, its text.
class PoemTokens {
  public:
    // tags[k][v] is the token of value v of the tag k. file: where the tokenizer comes from, for messages
    PoemTokens(const Tokenizer& tok, std::vector<std::vector<int>> tags, const std::string& file)
        : tok_(tok), tags_(std::move(tags)), file_(file.empty() ? "the new tokenizer" : file) {}
    // Appends the tokens of the poem that is number `index` of those kept.
    void append(const Poem& p, size_t index, std::vector<uint16_t>& stream) const {
        put(tok_.eot(), stream);
        for (size_t k = 0; k < tags_.size(); k++) put(tags_[k][k < p.tags.size() ? p.tags[k] : 0], stream);
        std::vector<int> ids;
        try {
            ids = tok_.encode(p.text);
        } catch (const Error& e) {
            fail("%s: cannot tokenize poem %zu of those kept: %s%s", file_.c_str(), index + 1, e.what(),
                 tok_.kind() == Tokenizer::CHARACTERS
                     ? "; use the cleaning switches that the tokenizer was made with"
                     : "");
        }
        for (int id : ids) put(id, stream);
    }

  private:
    void put(int id, std::vector<uint16_t>& stream) const {
        if (id > UINT16_MAX)
            fail("%s: token %d (%s) does not fit into a token file, whose tokens have 16 bits", file_.c_str(),
                 id, utf8::quote(tok_.bytes(id)).c_str());
        stream.push_back((uint16_t)id);
    }
    const Tokenizer tok_;  // copied with the object: encode() caches words, so each thread needs its own
    const std::vector<std::vector<int>> tags_;
    const std::string file_;
};

// Writes the poems' tokens to train and val (null without validation poems), in the order of the input, and
// counts each side. Threads tokenize a part of the poems each, and write in turn.
inline void write_poems(const PoemTokens& tokens, const std::deque<Poem>& poems,
                        const std::vector<bool>& in_val, TokenFileWriter& train, TokenFileWriter* val,
                        Report& r) {
    constexpr size_t PART = 256;  // poems
    const size_t parts = ceil_div(poems.size(), PART);
    PoemTokens mine = tokens;
    std::exception_ptr error;                 // the first in the order of the input
    std::atomic<size_t> first_bad{SIZE_MAX};  // the part that it is in, as far as is known
#pragma omp parallel for ordered schedule(static, 1) firstprivate(mine)
    for (size_t part = 0; part < parts; part++) {
        std::vector<uint16_t> to_train, to_val;
        std::exception_ptr failed;
        const size_t end = part > first_bad ? 0 : std::min(poems.size(), (part + 1) * PART);
        try {
            for (size_t i = part * PART; i < end; i++)
                mine.append(poems[i], i, in_val[i] ? to_val : to_train);
        } catch (...) {
            failed = std::current_exception(), first_bad = std::min<size_t>(first_bad, part);
        }
#pragma omp ordered
        if (!error) try {
                error = failed;
                if (!error) train.add(to_train);
                if (!error && val) val->add(to_val);
            } catch (...) {
                error = std::current_exception(), first_bad = 0;
            }
    }
    if (error) std::rethrow_exception(error);
    for (size_t i = 0; i < poems.size(); i++) {
        Side& side = in_val[i] ? r.val : r.train;
        side.poems++, side.verses += poems[i].verses, side.chars += poems[i].chars;
        side.divided += poems[i].tabs;
    }
    r.train.tokens = train.size(), r.val.tokens = val ? val->size() : 0;
}

// The tokens of the tags: for each tag, one for each of its values that at least --tag_min poems of the
// training part have, and one for all others. Returns their texts.
inline std::vector<std::string> tag_texts(const Collector& c, const std::vector<bool>& in_val,
                                          const Options& o, Report& r) {
    std::vector<std::string> texts;
    for (size_t k = 0; k < c.tag_columns.size(); k++) {
        std::vector<size_t> times(c.tag_values[k].size());
        for (size_t i = 0; i < c.poems.size(); i++) times[c.poems[i].tags[k]] += !in_val[i];
        std::vector<std::string> values;
        size_t others = 0, with_other = 0;
        for (size_t v = 0; v < times.size(); v++) {
            const std::string& value = c.tag_values[k][v];
            if (times[v] >= (size_t)o.tag_min && value != Tokenizer::OTHER) values.push_back(value);
            else others++, with_other += times[v];
        }
        std::sort(values.begin(), values.end());
        values.push_back(Tokenizer::OTHER);
        for (const std::string& value : values) texts.push_back(Tokenizer::tag_text(c.tag_columns[k], value));
        r.tags.push_back(strf("%s: %zu values; %zu rarer ones, of %s poems, are '%s'",
                              c.tag_columns[k].c_str(), values.size() - 1, others, commas(with_other).c_str(),
                              Tokenizer::OTHER));
    }
    return texts;
}
// The tags of PoemTokens. A tokenizer that has tags begins every poem with all of them: those that --tags
// does not name are "other".
inline std::vector<std::vector<int>> find_tag_tokens(const Tokenizer& tok, const Collector& c,
                                                     const Options& o) {
    for (const std::string& column : c.tag_columns)
        if (tok.tag(column, Tokenizer::OTHER) < 0)
            fail("%s: has no tags of '%s' (--tags); tags are tokens of the tokenizer that is made with them",
                 o.tokenizer.c_str(), column.c_str());
    std::vector<std::vector<int>> tokens;
    std::vector<std::string> columns = tok.tag_columns();
    if (!columns.empty() && !c.tag_columns.empty() && columns != c.tag_columns)
        fail("%s: its poems begin with the tags %s, wanted the same with --tags, in this order",
             o.tokenizer.c_str(), Tokenizer::joined(columns).c_str());
    for (size_t k = 0; k < columns.size(); k++) {
        tokens.emplace_back();
        const int other = tok.tag(columns[k], Tokenizer::OTHER);
        if (c.tag_columns.empty()) tokens.back().push_back(other);
        else
            for (const std::string& value : c.tag_values[k]) {
                const int t = tok.tag(columns[k], value);
                tokens.back().push_back(t < 0 ? other : t);
            }
    }
    return tokens;
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
    if (!o.column.empty() && !o.columns.empty())
        throw UsageError("--column and --columns: one is for a poem a row, the other for a verse a row");
    if (o.group != "auto" && o.columns.empty())
        throw UsageError("--group: needs --columns, which name the columns of a verse");
    if (o.group.empty()) throw UsageError("--group: is empty, wanted auto or names of columns");
    for (auto [flag, list] : {std::pair<const char*, const std::string*>{"--tags", &o.tags},
                              {"--columns", &o.columns},
                              {"--group", &o.group}})
        if (!list->empty() && split_names(*list).empty())
            throw UsageError(strf("%s: '%s' names no column", flag, list->c_str()));
    if (o.tags.find('=') != o.tags.npos)
        throw UsageError("--tags: wanted names of columns, without values and '='; --where chooses rows");
    for (char c : o.hemistich_separator)
        if ((unsigned char)c < 0x20)
            throw UsageError("--hemistich_separator: has a control character; tab is \"tab\"");
    if (o.poem_separator.empty()) throw UsageError("--poem_separator: is empty, wanted a text or auto");
    if (o.poem_separator != "auto" && o.layout != "auto")
        throw UsageError("--poem_separator and --layout: give only one of them");
    if (o.hemistich_separator.empty() || utf8::find_invalid(o.hemistich_separator) != std::string::npos)
        throw UsageError("--hemistich_separator: wanted auto, tab, spaces or a text");
}

inline void write_data_set(const Options& o, const Recipe& recipe, const Tokenizer& tok,
                           const PoemTokens& tokens, const std::deque<Poem>& poems,
                           const std::vector<bool>& in_val, Report& r) {
    DataSetWriter set(o.out);
    tok.save(set.path("tokenizer.bin"));
    const std::string old = o.out + "/tokenizer.bin";
    if (trainer::holds_run(o.out) && file_exists(old) &&
        Reader(old).rest() != Reader(set.path("tokenizer.bin")).rest())
        fail("%s: holds a run whose tokenizer would be replaced by another one; take another folder with -o",
             o.out.c_str());
    TokenFileWriter train(set.path("train.bin"));
    std::optional<TokenFileWriter> val;
    if (r.no_val.empty()) val.emplace(set.path("val.bin"));
    write_poems(tokens, poems, in_val, train, val ? &*val : nullptr, r);
    train.commit();
    if (val) val->commit();
    AtomicFile text(set.path("recipe.txt"));
    text.write(recipe.text());
    text.commit();
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
    const std::string missing = collector.value_that_no_row_has();
    const std::deque<Poem>& poems = collector.poems;
    if (r.filtered && !r.poems_read)
        fail("%s%s%s leave%s none of %zu rows", o.where.empty() ? "" : ("--where '" + o.where + "'").c_str(),
             o.where.empty() || o.except.empty() ? "" : " and ",
             o.except.empty() ? "" : ("--except '" + o.except + "'").c_str(),
             o.where.empty() || o.except.empty() ? "s" : "", r.filtered);
    if (!missing.empty()) fail("%s: no row has this value", missing.c_str());
    if (poems.empty())
        fail(
            "nothing is left of %zu poems: %zu empty after cleaning, %zu too short, %zu ragged "
            "and %zu damaged rows, %zu with invalid UTF-8%s",
            r.poems_read, r.empty, r.too_short, r.ragged, r.damaged, r.invalid,
            r.empty && o.keep == "letters" ? " (--keep all keeps more than Arabic letters)" : "");

    CharacterCount in_train;
    std::vector<bool> in_val = split(poems, o, r, in_train);
    Tokenizer tok;
    if (o.tokenizer.empty()) {
        tok = Tokenizer::characters(in_train.characters(), tag_texts(collector, in_val, o, r));
    } else {
        tok = Tokenizer::load(o.tokenizer);
    }
    r.vocab_size = tok.vocab_size(), r.byte_bpe = tok.kind() == Tokenizer::BYTE_BPE;
    const PoemTokens tokens(tok, find_tag_tokens(tok, collector, o), o.tokenizer);
    Recipe recipe = o;
    recipe.hemistich_separator = r.hemistich_separator;
    write_data_set(o, recipe, tok, tokens, poems, in_val, r);
    return r;
}

// ---------------------------------------------------------------------------------------------
// The report

// "1 poem", "2,000 poems"
inline std::string count_of(size_t n, const char* one, const char* many) {
    return commas(n) + " " + (n == 1 ? one : many);
}
inline void print_row(FILE* f, const char* what, const std::string& text) {
    fprintf(f, "%-11s %s\n", what, text.c_str());
}
// "12 characters removed: 'x' U+0078 9, ...": how many, and which were the most frequent
inline std::string characters(const std::map<uint32_t, size_t>& times, const char* what) {
    size_t all = 0;
    std::vector<std::pair<size_t, uint32_t>> most;
    for (auto& [c, n] : times) all += n, most.push_back({n, c});
    std::stable_sort(most.begin(), most.end(), [](auto& a, auto& b) { return a.first > b.first; });
    std::string s = count_of(all, "character", "characters") + " " + what;
    for (size_t i = 0; i < most.size() && i < 5; i++)
        s += (i ? ", " : ": ") + utf8::name(most[i].second) + " " + commas(most[i].first);
    return s + (most.size() > 5 ? ", ..." : "");
}

inline void print_read(const Report& r, FILE* f) {
    for (const std::string& s : r.sources) print_row(f, &s == &r.sources[0] ? "read" : "", s);
    if (r.filtered) print_row(f, "", commas(r.filtered) + " rows left out by --where and --except");
    std::string dropped;
    for (auto [n, why] : {std::pair<size_t, const char*>{r.duplicates, "equal to an earlier poem"},
                          {r.empty, "empty after cleaning"},
                          {r.too_short, "shorter than --min_chars"},
                          {r.ragged, "with more or fewer fields than the header"},
                          {r.damaged, "in damaged rows"},
                          {r.invalid, "with invalid UTF-8"}})
        if (n) dropped += (dropped.empty() ? "" : ", ") + commas(n) + " " + why;
    print_row(f, "dropped", dropped.empty() ? "no poem" : dropped);
    for (auto* places : {&r.where_ragged, &r.where_damaged, &r.where_invalid})
        for (const std::string& s : *places) print_row(f, "", s);
}

inline void print_cleaned(const Report& r, FILE* f) {
    print_row(
        f, "cleaned",
        characters(r.removed, "removed") + (r.replaced ? "; " + commas(r.replaced) + " normalized" : ""));
    if (!r.mapped.empty()) print_row(f, "", characters(r.mapped, "mapped to letters"));
    std::map<uint32_t, size_t> lost;
    for (auto& [c, n] : r.removed)
        if ((is_arabic_letter(c) || is_kept_letter(c)) && is_lost_letter(c)) lost[c] = n;
    if (!lost.empty())
        print_row(f, "warning",
                  characters(lost, "removed that are Arabic letters") + " (--keep all keeps them)");
    for (const std::string& s : r.tags) print_row(f, &s == &r.tags[0] ? "tags" : "", s);
    if (r.families)
        print_row(f, "related",
                  strf("%s poems share verse pairs, in %s families (largest %s); a family is never split",
                       commas(r.related_poems).c_str(), commas(r.families).c_str(),
                       commas(r.largest_family).c_str()));
    if (r.kept_for_characters)
        print_row(f, "",
                  strf("%s drawn for validation, but kept in training, which needs their rare characters",
                       count_of(r.kept_for_characters, "poem", "poems").c_str()));
}

inline void print_sizes(const Report& r, const Options& o, FILE* f) {
    const double chars = (double)(r.train.chars + r.val.chars);
    fprintf(f, "\n%-8s %10s %10s %12s %12s %8s\n", "", "poems", "verses", "characters", "tokens", "share");
    for (const Side* s : {&r.train, &r.val})
        fprintf(f, "%-8s %10s %10s %12s %12s %7.1f%%\n", s == &r.train ? "train" : "val",
                commas(s->poems).c_str(), commas(s->verses).c_str(), commas(s->chars).c_str(),
                commas(s->tokens).c_str(), 100.0 * (double)s->chars / chars);
    fprintf(f, "\n");

    const size_t verses = r.train.verses + r.val.verses;
    print_row(f, "hemistichs",
              strf("%.1f%% of the verses have two",
                   100.0 * (double)(r.train.divided + r.val.divided) / (double)verses));
    const double text_tokens = (double)(r.train.tokens - r.train.poems + r.val.tokens - r.val.poems);
    print_row(
        f, "vocabulary",
        strf("%d tokens", r.vocab_size) +
            (o.tokenizer.empty()
                 ? strf(": the characters of train, %send-of-text", r.tags.empty() ? "and " : "tags, and ")
                 : " of " + o.tokenizer) +
            (r.byte_bpe ? strf(": byte-level BPE, %.2f characters per token", chars / text_tokens) : ""));
}

inline void print_report(const Report& r, const Options& o, FILE* f) {
    print_read(r, f);
    print_cleaned(r, f);
    print_sizes(r, o, f);
    print_row(f, "wrote",
              strf("%s/{train.bin, %stokenizer.bin, recipe.txt}", o.out.c_str(),
                   r.no_val.empty() ? "val.bin, " : ""));
    if (!r.no_val.empty()) print_row(f, "", "no val.bin: " + r.no_val);
    print_row(f, "next", beside_program("train_gpt2") + " --data " + shell_quoted(o.out));
}

inline void add_file_flags(Flags& f, Options& o) {
    f.positional(&o.files, "poems.csv [more files, folders of text files, or - for standard input]");
    f.section("Files");
    f.add("out", "o", &o.out, "DIR", "folder for train.bin, val.bin, tokenizer.bin; created if missing");
    f.add("format", "", &o.format, "F", "auto decides by the content and the file's name")
        .choices({"auto", "csv", "json", "text"});
    f.add("column", "", &o.column, "NAME",
          "CSV column or JSON key with the poem: one verse per line, a TAB between hemistichs; or a list of "
          "verses or hemistichs; by default poem_text, or another usual name");
    f.add("columns", "", &o.columns, "A,B", "where each row is a verse: the columns of its hemistichs");
    f.add("group", "", &o.group, "NAME",
          "with --columns: rows that follow each other and have the same value in this column (or several: "
          "A,B) are a poem; auto: in all columns that at least every tenth row shares with the one before");
    f.add("list", "", &o.list, "L", "what the lists in cells contain; auto decides by their length")
        .choices({"auto", "verses", "hemistichs"});
    f.add("where", "", &o.where, "COL=VALUE",
          "only rows with this value, or with one of several: A|B; e.g. "
          "poet_name=\u0627\u0644\u0645\u062A\u0646\u0628\u064A");
    f.add("except", "", &o.except, "COL=VALUE",
          "leaves out the rows with this value, or with one of several: A|B");
    f.add("layout", "", &o.layout, "L",
          "text: lines = one poem per line, blank = blank lines between poems, file = one poem a file")
        .choices({"auto", "lines", "blank", "file"});
    f.add("poem_separator", "", &o.poem_separator, "TEXT",
          "text: poems end at lines of TEXT, e.g. $; auto finds lines of one repeated sign, or "
          "<|endoftext|>");
    f.add("hemistich_separator", "", &o.hemistich_separator, "TEXT",
          "what separates hemistichs, e.g. #; spaces: two or more; tab: only a TAB; auto: what most verses "
          "have once");
    f.add("on_error", "", &o.on_error, "E",
          "damaged rows and invalid UTF-8: stop at the first, or skip and count them; rows with too few or "
          "too many fields are counted, and stop only where they are the most")
        .choices({"fail", "skip"});
    f.add("tags", "", &o.tags, "A,B",
          "columns whose values, e.g. metre and poet, go before each poem as tokens, to be asked for later");
    f.add("tag_min", "", &o.tag_min, "N", "values that fewer poems have become the tag 'other'")
        .range(1, INFINITY);
    f.add("tokenizer", "", &o.tokenizer, "FILE",
          "use this tokenizer instead of making one (for fine-tuning)");
}
inline void add_other_flags(Flags& f, Options& o) {
    f.section("Cleaning (always: a run of white space becomes one newline, TAB or space)");
    f.add("keep", "", &o.keep, "WHAT",
          "letters = only U+0621..U+064A, no vowel signs; all = everything but control characters")
        .choices({"letters", "all"});
    f.add("map", "", &o.map, "WHAT",
          "with --keep letters: arabic = other forms of these letters (Farsi kaf and yeh, ligatures, "
          "decomposed hamzas) become them; none = they are removed")
        .choices({"arabic", "none"});
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
        "  ./prepare_data diwan.txt more.txt --layout blank --keep all --remove_tashkeel -o diwan\n"
        "  ./prepare_data verses.csv --columns sadr,ajuz --group poem_id -o verses\n"
        "  ./prepare_data poems.csv --tags poem_meter,poet_name -o tagged\n");
}

inline int prepare_main(int argc, char** argv) {
    Options o;
    Flags f("prepare_data", "turns poems into token files for the trainers");
    add_file_flags(f, o);
    add_other_flags(f, o);
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
