// tokenizer.h - turns text into tokens and tokens into text.
//
//     Tokenizer tok = Tokenizer::characters(training_text);   // or Tokenizer::load("poems/tokenizer.bin")
//     std::vector<int> ids = tok.encode("قفا نبك");
//     std::string text = tok.decode(ids);
//
// A character tokenizer has one token for every code point of its training text, in code point order. Then
// comes end-of-text, which separates the poems of a corpus and begins a new one. The last tokens may be tags,
// such as <|poem_meter=kamil|>: facts about a poem, which follow end-of-text. Text is never encoded as a tag,
// and a model learns from tags, but not to write them.
//
// Byte-level BPE (byte pair encoding) is the tokenizer of GPT-2 and AraGPT2; ./export_tokenizer makes its
// file from a published folder. Its basic tokens are the 256 bytes, so it can encode any input. Each further
// token is the merge of two earlier ones: training added them one by one, always for the pair of neighbours
// that was most frequent in the corpus. To encode a text, cut it into pieces, mostly words, and start with
// each piece's bytes. While any two neighbours can merge, apply the merge that was learned first, which is
// the one that makes the lowest token, at its leftmost place. The results are those of tiktoken's
// encode_ordinary and of Hugging Face's ByteLevel BPE.
//
// The file format is llm.c's: a header of 256 int32, then one length byte and the bytes of each token.
//     [0] magic number 20240328  [1] version 2  [2] V  [3] end-of-text
//     [4] kind, [5] add_prefix_space, [6] how many of the last tokens are tags: added here; 0 in llm.c's
//         files, which hold GPT-2's byte-level BPE
// There is no list of merges, because the order of the tokens is the order of the merges: encode the bytes of
// token t with the merges that make tokens below t, and the two tokens that merge into t remain. If not
// exactly two remain, t is special: text is never encoded as it. export_tokenizer checks that the merges
// found in this way are the published ones.
//
// Added tokens, which users of Hugging Face's tokenizers add to a byte-level BPE, are no merges, but text is
// encoded as them: they are cut out of it before the rest is cut into pieces. Header word [7] is how many
// there are; their numbers, ascending int32, follow the tokens.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <queue>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "lib/io.h"
#include "lib/utf8.h"
#include "tokenizer/unicode_tables.h"

// ---------------------------------------------------------------------------------------------
// Byte-level BPE

namespace bpe {

enum Class : unsigned char { OTHER, LETTER, NUMBER, SPACE };

// The class of every code point.
inline const std::vector<Class>& classes() {
    static const std::vector<Class> table = [] {
        std::vector<Class> t(utf8::MAX_CODE_POINT + 1, OTHER);
        auto fill = [&](const auto& ranges, Class c) {
            for (const unicode::Range& r : ranges) std::fill(t.begin() + r.first, t.begin() + r.last + 1, c);
        };
        fill(unicode::LETTERS, LETTER), fill(unicode::NUMBERS, NUMBER), fill(unicode::WHITE_SPACE, SPACE);
        return t;
    }();
    return table;
}

// Cuts a text into pieces, which are the consecutive matches of GPT-2's regular expression:
//     's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// That is: an English contraction's ending; a run of letters, of numbers or of other characters, each with
// the space before it; white space. Together the pieces are the whole text. A byte that is not valid UTF-8
// counts as one of the other characters.
class Splitter {
  public:
    explicit Splitter(std::string_view text) : text_(text), class_of_(classes().data()) {}

    bool next(std::string_view* piece) {
        if (pos_ == text_.size()) return false;
        size_t end = piece_end(pos_);
        *piece = text_.substr(pos_, end - pos_);
        pos_ = end;
        return true;
    }

  private:
    // The class of the character at i; *next is where the following one begins.
    Class class_at(size_t i, size_t* next) const {
        uint32_t c = (unsigned char)text_[i];
        size_t n = c < 0x80 ? 1 : utf8::decode(text_, i, &c);
        *next = i + std::max<size_t>(n, 1);
        return n == 0 ? OTHER : class_of_[c];
    }
    size_t piece_end(size_t begin) const {
        if (text_[begin] == '\'')
            for (std::string_view ending : {"s", "t", "re", "ve", "m", "ll", "d"})
                if (text_.compare(begin + 1, ending.size(), ending) == 0) return begin + 1 + ending.size();

        size_t end, next;
        Class c = class_at(begin, &end);
        if (c == SPACE) {
            size_t last = begin;  // where the last character of the white space begins
            for (; end < text_.size() && class_at(end, &next) == SPACE; end = next) last = end;
            if (end == text_.size()) return end;
            if (last > begin) return last;  // \s+(?!\S): leave the last one, which may begin the next piece
            if (text_[begin] != ' ') return end;
            c = class_at(end, &end);
        }
        while (end < text_.size() && class_at(end, &next) == c) end = next;
        return end;
    }

    std::string_view text_;
    const Class* class_of_;
    size_t pos_ = 0;
};

// The merges: a hash table from a pair of tokens to the token that they merge into.
class Merges {
  public:
    static constexpr int ID_BITS = 20;

    // Room for `most` merges; the table is at most half full.
    explicit Merges(size_t most = 0) {
        while (((size_t)1 << bits_) < 2 * most) bits_++;
        table_.assign((size_t)1 << bits_, EMPTY);
    }
    void add(int left, int right, int result) {
        *slot(left, right) = key(left, right) << ID_BITS | (uint64_t)result;
    }

    // Merges neighbours among the n tokens at ids until none can merge: first the pair that makes the lowest
    // token, the leftmost among equals. Returns how many tokens remain at ids.
    size_t apply(int* ids, size_t n) const {
        return n <= SHORT ? apply_to_few(ids, n) : apply_to_many(ids, n);
    }

    // How many tokens apply() has examined so far; tests check that this cost stays low.
    uint64_t work() const { return work_; }

  private:
    static constexpr uint64_t EMPTY = ~(uint64_t)0;
    static constexpr int NONE = 1 << ID_BITS;
    static constexpr size_t SHORT = 64;

    static uint64_t key(int left, int right) { return (uint64_t)left << ID_BITS | (uint64_t)right; }
    // The pair's place in the table, or the free place where it belongs.
    const uint64_t* slot(int left, int right) const {
        const uint64_t k = key(left, right), mask = table_.size() - 1;
        uint64_t i = k * 0x9E3779B97F4A7C15u >> (64 - bits_);
        while (table_[i] != EMPTY && table_[i] >> ID_BITS != k) i = (i + 1) & mask;
        return &table_[i];
    }
    uint64_t* slot(int left, int right) {
        return const_cast<uint64_t*>(std::as_const(*this).slot(left, right));
    }
    int find(int left, int right) const {
        uint64_t s = *slot(left, right);
        return s == EMPTY ? NONE : (int)(s & (NONE - 1));
    }

    // Searches all pairs before each merge. This takes time O(n^2), but is the fastest for a short piece.
    // left[] and right[] link the tokens that remain. pairs[i] is (what token i and its right neighbour merge
    // into) * SHORT + i, so that the minimum is the next merge to apply, at its leftmost place.
    size_t apply_to_few(int* ids, size_t n) const {
        uint32_t pairs[SHORT];
        unsigned char left[SHORT + 1], right[SHORT];
        for (size_t i = 0; i < n; i++) left[i] = (unsigned char)(i - 1), right[i] = (unsigned char)(i + 1);
        auto update = [&](size_t i) {
            pairs[i] = (uint32_t)(right[i] == n ? NONE : find(ids[i], ids[right[i]])) * SHORT + (uint32_t)i;
        };
        for (size_t i = 0; i < n; i++) update(i);
        for (;;) {
            work_ += n;
            const uint32_t least = *std::min_element(pairs, pairs + n);
            if (least / SHORT == NONE) break;
            const size_t i = least % SHORT, gone = right[i];
            ids[i] = (int)(least / SHORT);
            right[i] = right[gone], left[right[i]] = (unsigned char)i;
            pairs[gone] = NONE * SHORT;
            update(i);
            if (i > 0) update(left[i]);
        }
        size_t count = 0;
        for (size_t i = 0; i < n; i = right[i]) ids[count++] = ids[i];
        return count;
    }

    // The same in time O(n log n): a heap holds all pairs that can merge, the next one first. A merge makes
    // its neighbours' pairs invalid; these stay in the heap and are skipped when they come up.
    size_t apply_to_many(int* ids, size_t n) const {
        struct Node {
            int id;  // NONE after the token has merged into its left neighbour
            size_t left, right;
        };
        using Pair = std::pair<int, size_t>;  // what the pair merges into, its left node
        std::vector<Node> nodes(n);
        std::vector<Pair> pairs;
        for (size_t i = 0; i < n; i++) nodes[i] = {ids[i], i - 1, i + 1};
        auto result_at = [&](size_t i) {
            return nodes[i].id == NONE || nodes[i].right == n ? NONE
                                                              : find(nodes[i].id, nodes[nodes[i].right].id);
        };
        for (size_t i = 0; i < n; i++)
            if (int r = result_at(i); r != NONE) pairs.push_back({r, i});
        std::priority_queue<Pair, std::vector<Pair>, std::greater<>> heap(std::greater<>(), std::move(pairs));
        work_ += n;
        while (!heap.empty()) {
            auto [result, i] = heap.top();
            heap.pop();
            work_++;
            if (result_at(i) != result) continue;  // one of the two has merged with another token
            Node &a = nodes[i], &b = nodes[a.right];
            a.id = result, a.right = b.right, b.id = NONE;
            if (a.right < n) nodes[a.right].left = i;
            if (int r = result_at(i); r != NONE) heap.push({r, i});
            if (i == 0) continue;
            if (int r = result_at(a.left); r != NONE) heap.push({r, a.left});
        }
        size_t count = 0;
        for (size_t i = 0; i < n; i = nodes[i].right) ids[count++] = nodes[i].id;
        return count;
    }

    std::vector<uint64_t> table_;  // left, right and result in one number; linear probing
    int bits_ = 1;
    mutable uint64_t work_ = 0;
};

// Remembers the tokens of short pieces, because most words occur many times in a text. Each piece has one
// possible place, chosen by its hash; a new piece replaces the one there.
class PieceCache {
  public:
    struct Entry {
        unsigned char length, count;  // length 0: the entry is empty
        char piece[46];
        int ids[20];

        bool holds(std::string_view p) const {
            return length == p.size() && !memcmp(piece, p.data(), p.size());
        }
        void store(std::string_view p, const int* tokens, size_t n) {
            if (n > std::size(ids)) return;
            length = (unsigned char)p.size(), count = (unsigned char)n;
            std::copy(p.begin(), p.end(), piece);
            std::copy(tokens, tokens + n, ids);
        }
    };

    // The entry that may hold the piece, which it starts to prefetch; null if the piece is too long to store.
    Entry* find(std::string_view piece) {
        if (piece.size() > sizeof Entry::piece) return nullptr;
        Entry* e = &entries_[hash(piece) >> (64 - bits_)];
        __builtin_prefetch(e), __builtin_prefetch(e->ids + std::size(e->ids) - 1);
        return e;
    }
    // Empties the cache and sizes it: at least 8 entries per token of the vocabulary, at most 2^16 entries,
    // which take 8 MiB.
    void clear(size_t vocabulary) {
        for (bits_ = 8; bits_ < 16 && ((size_t)1 << bits_) < 8 * vocabulary;) bits_++;
        entries_.assign((size_t)1 << bits_, {});
    }

  private:
    static uint64_t hash(std::string_view s) {
        const size_t n = s.size();
        uint64_t h = n, word;
        auto mix = [&] { h = (h ^ word) * 0x9E3779B97F4A7C15u, h ^= h >> 32; };
        for (size_t i = 0; i + 8 < n; i += 8) memcpy(&word, &s[i], 8), mix();
        // The last 8 bytes, some of them for the second time: a memcpy of variable length would cost more
        // than everything else here.
        if (n >= 8) {
            memcpy(&word, &s[n - 8], 8);
        } else if (n >= 4) {
            uint32_t first, last;
            memcpy(&first, &s[0], 4), memcpy(&last, &s[n - 4], 4);
            word = first | (uint64_t)last << 32;
        } else {
            word = (unsigned char)s[0] | (unsigned)(unsigned char)s[n / 2] << 8 |
                   (unsigned)(unsigned char)s[n - 1] << 16;
        }
        mix();
        return h * 0x9E3779B97F4A7C15u;
    }

    int bits_ = 8;
    std::vector<Entry> entries_;
};

}  // namespace bpe

// ---------------------------------------------------------------------------------------------
// The tokenizer

class Tokenizer {
  public:
    enum Kind { BYTE_BPE = 0, CHARACTERS = 1 };

    // A token for every code point that occurs in the text, sorted, then end-of-text, then the tags (each as
    // tag_text() writes it). Invalid UTF-8 is an Error.
    static Tokenizer characters(const std::string& training_text, const std::vector<std::string>& tags = {}) {
        std::vector<bool> seen(utf8::MAX_CODE_POINT + 1);
        utf8::for_each(training_text, [&](uint32_t c, size_t) { seen[c] = true; });
        Tokenizer t;
        t.kind_ = CHARACTERS;
        for (uint32_t c = 0; c < seen.size(); c++) {
            if (!seen[c]) continue;
            std::string bytes;
            utf8::append(bytes, c);
            t.tokens_.push_back(bytes);
        }
        if (t.tokens_.size() + tags.size() >= MAX_VOCAB)
            fail("the text has %zu different characters and %zu tags, at most %d fit", t.tokens_.size(),
                 tags.size(), MAX_VOCAB - 1);
        t.eot_ = (int)t.tokens_.size();
        t.tokens_.push_back(EOT_TEXT);
        t.tokens_.insert(t.tokens_.end(), tags.begin(), tags.end());
        t.tags_ = (int)tags.size();
        t.index_characters("training text");
        return t;
    }

    // Byte-level BPE from its tokens in merge order, and which of them are added tokens; `where` names their
    // origin in error messages.
    static Tokenizer byte_bpe(std::vector<std::string> tokens, int eot, bool add_prefix_space,
                              const std::string& where, const std::vector<int>& added = {}) {
        Tokenizer t;
        t.kind_ = BYTE_BPE, t.eot_ = eot, t.add_prefix_space_ = add_prefix_space,
        t.tokens_ = std::move(tokens);
        for (int id : added) t.add_token(id, where);
        t.index_bpe(where);
        return t;
    }

    // Reads a tokenizer file. Anything wrong in it is an Error that names the file, the field, and what was
    // found and wanted.
    static Tokenizer load(const std::string& path) {
        Reader in(path);
        const char* p = path.c_str();
        std::vector<int32_t> h = in.header(MAGIC, "tokenizer");
        auto check = [&](int field, const char* what, int lo, int hi) {
            if (h[field] >= lo && h[field] <= hi) return;
            std::string wanted = lo == hi ? std::to_string(lo) : strf("%d to %d", lo, hi);
            fail("%s: %s is %d, wanted %s", p, what, h[field], wanted.c_str());
        };
        check(1, "version", VERSION, VERSION);
        check(2, "vocabulary size", 1, MAX_VOCAB);
        check(3, "end-of-text token", 0, h[2] - 1);
        check(4, "kind", BYTE_BPE, CHARACTERS);
        check(5, "add_prefix_space", 0, h[4] == BYTE_BPE ? 1 : 0);
        check(6, "number of tags", 0, h[4] == BYTE_BPE ? 0 : h[2] - h[3] - 1);
        check(7, "number of added tokens", 0, h[4] == BYTE_BPE ? h[2] : 0);

        Tokenizer t;
        t.kind_ = (Kind)h[4], t.eot_ = h[3], t.add_prefix_space_ = h[5] != 0, t.tags_ = h[6];
        for (int i = 0; i < h[2]; i++) {
            std::string what = strf("token %d of %d", i, h[2]);
            unsigned char length;
            in.read(&length, 1, what.c_str());
            if (length == 0) fail("%s: %s has length 0, wanted 1 to 255", p, what.c_str());
            t.tokens_.emplace_back(length, '\0');
            in.read(&t.tokens_.back()[0], length, what.c_str());
        }
        for (int i = 0, id, last = -1; i < h[7]; i++, last = id) {
            in.read(&id, 4, strf("added token %d of %d", i, h[7]).c_str());
            if (id <= last || id >= h[2] || id == h[3])
                fail("%s: added token %d of %d is %d, wanted one from %d to %d that is not end-of-text", p, i,
                     h[7], id, last + 1, h[2] - 1);
            t.add_token(id, path);
        }
        in.expect_size(in.pos);
        if (t.kind_ == CHARACTERS) t.index_characters(path);
        else t.index_bpe(path);
        return t;
    }

    void save(const std::string& path) const {
        std::vector<int32_t> h(256);
        h[0] = MAGIC, h[1] = VERSION, h[2] = vocab_size(), h[3] = eot_, h[4] = kind_,
        h[5] = add_prefix_space_, h[6] = tags_, h[7] = (int)added_.size();
        std::string body((const char*)h.data(), 1024);
        for (size_t i = 0; i < tokens_.size(); i++) {
            if (tokens_[i].size() > 255)
                fail("%s: token %zu %s has %zu bytes, a tokenizer file holds at most 255", path.c_str(), i,
                     utf8::quote(tokens_[i]).c_str(), tokens_[i].size());
            body += (char)tokens_[i].size();
            body += tokens_[i];
        }
        for (int id = 0; id < vocab_size(); id++)
            if (is_added(id)) body.append((const char*)&id, 4);
        AtomicFile out(path);
        out.write(body);
        out.commit();
    }

    Kind kind() const { return kind_; }
    int vocab_size() const { return (int)tokens_.size(); }
    // End-of-text, the token that separates poems. encode() never returns it, even if the text spells it;
    // programs insert it.
    int eot() const { return eot_; }
    // Whether encode() puts a space before a text that begins with none.
    bool add_prefix_space() const { return add_prefix_space_; }
    // Whether it is an added token of a byte-level BPE.
    bool is_added(int token) const {
        auto it = added_.find(bytes(token));
        return it != added_.end() && it->second == token;
    }

    // The text's tokens. In a character tokenizer, invalid UTF-8 and a character without a token are Errors
    // that give the byte offset. Byte-level BPE encodes any bytes, and decode() returns the same bytes. It
    // caches words, so two threads must not encode with the same Tokenizer at the same time.
    std::vector<int> encode(std::string_view text) const {
        std::vector<int> ids;
        ids.reserve(text.size() / 2 + 1);
        if (kind_ == BYTE_BPE) {
            size_t begin = 0;  // of what follows the last added token
            for (size_t i = 0; i < text.size() && !added_.empty();) {
                const int added = added_at(text.substr(i));
                if (added < 0) {
                    i++;
                    continue;
                }
                encode_between(text.substr(begin, i - begin), ids);
                ids.push_back(added);
                begin = i += bytes(added).size();
            }
            encode_between(text.substr(begin), ids);
            return ids;
        }
        utf8::for_each(text, [&](uint32_t c, size_t offset) {
            int id = c < token_of_.size() ? token_of_[c] : -1;
            if (id < 0)
                fail("character %s at byte %zu is not among the tokenizer's %d", utf8::name(c).c_str(),
                     offset, first_tag() - 1);
            ids.push_back(id);
        });
        return ids;
    }

    // A token's bytes; in byte-level BPE they may be incomplete characters. The bytes of end-of-text are
    // "<|endoftext|>", or whatever a published BPE calls it.
    const std::string& bytes(int token) const {
        if (token < 0 || token >= vocab_size())
            fail("token %d is out of range, the tokenizer has %d", token, vocab_size());
        return tokens_[(size_t)token];
    }
    std::string decode(const std::vector<int>& ids) const {
        std::string text;
        for (int id : ids) text += bytes(id);
        return text;
    }
    // The tags. They are the tokens from first_tag() on.
    static constexpr const char* OTHER = "other";  // the value of a tag whose own value has no token
    int first_tag() const { return vocab_size() - tags_; }
    int tags() const { return tags_; }
    // The text of a tag, <|COLUMN=VALUE|>.
    static std::string tag_text(const std::string& column, const std::string& value) {
        return "<|" + column + "=" + value + "|>";
    }
    // A cell as a tag's value: control characters and white space become single spaces, at most MOST bytes;
    // "other" where it is empty, a sign for "missing", or not UTF-8.
    static std::string tag_value(std::string_view text) {
        constexpr size_t MOST = 120;  // a token has at most 255
        std::string value;
        for (char c : text)
            if ((unsigned char)c > ' ') value += c;
            else if (!value.empty() && value.back() != ' ') value += ' ';
        if (value.size() > MOST)
            value.resize(utf8::printable_prefix(std::string_view(value).substr(0, MOST)));
        while (!value.empty() && value.back() == ' ') value.pop_back();
        for (const char* missing : {"", "NaN", "nan", "None", "null", "-"})
            if (value == missing) return OTHER;
        return utf8::find_invalid(value) != utf8::VALID ? OTHER : value;
    }
    // The token of a tag, COLUMN=VALUE; -1 if there is none.
    int tag(const std::string& column_and_value) const {
        const auto at = tag_of_.find("<|" + column_and_value + "|>");
        return at == tag_of_.end() ? -1 : at->second;
    }
    int tag(const std::string& column, const std::string& value) const { return tag(column + "=" + value); }
    // The columns that tags are of, in the order in which they follow end-of-text, and the values of one.
    std::vector<std::string> tag_columns() const {
        std::vector<std::string> columns;
        for (int t = first_tag(); t < vocab_size(); t++)
            if (std::string c = column_of(t); columns.empty() || columns.back() != c) columns.push_back(c);
        return columns;
    }
    std::vector<std::string> tag_values(const std::string& column) const {
        std::vector<std::string> values;
        for (int t = first_tag(); t < vocab_size(); t++) {
            const std::string& s = tokens_[(size_t)t];
            if (column_of(t) == column)
                values.push_back(s.substr(column.size() + 3, s.size() - column.size() - 5));
        }
        return values;
    }
    // What begins a poem: end-of-text, then a tag of each column. `wanted` is "COLUMN=VALUE,COLUMN=VALUE"; a
    // column that is not named there is "other". An Error says which tag does not exist, and which do.
    std::vector<int> beginning(const std::string& wanted) const {
        std::vector<int> ids = {eot_};
        const std::vector<std::string> columns = tag_columns();
        std::vector<std::string> values(columns.size(), OTHER);
        for (size_t at = 0; at < wanted.size();) {
            size_t end = std::min(wanted.find(',', at), wanted.size());
            // A comma that no column follows is part of the value.
            auto begins_tag = [&](size_t i) {
                return std::any_of(columns.begin(), columns.end(), [&](const std::string& c) {
                    return wanted.compare(i, c.size() + 1, c + "=") == 0;
                });
            };
            while (end < wanted.size() && wanted.find('=', at) < end && !begins_tag(end + 1))
                end = std::min(wanted.find(',', end + 1), wanted.size());
            const std::string one = wanted.substr(at, end - at);
            const size_t equals = one.find('=');
            const auto column = std::find(columns.begin(), columns.end(), one.substr(0, equals));
            if (columns.empty())
                fail("the model knows no tags; ./prepare_data --tags makes a data set that has them");
            if (equals == one.npos || column == columns.end())
                fail("'%s' is not a tag, wanted COLUMN=VALUE with a column among %s", one.c_str(),
                     joined(columns).c_str());
            const std::string value = one.substr(equals + 1);
            if (tag(*column, value) < 0)
                fail("%s has no value '%s'; it has %s", column->c_str(), value.c_str(),
                     joined(tag_values(*column)).c_str());
            values[(size_t)(column - columns.begin())] = value;
            at = end + 1;
        }
        for (size_t k = 0; k < columns.size(); k++) ids.push_back(tag(columns[k], values[k]));
        return ids;
    }
    static std::string joined(const std::vector<std::string>& words) {
        std::string s;
        for (const std::string& w : words) s += (s.empty() ? "" : ", ") + w;
        return s;
    }

    // How many characters begin in the token. A tag has none. End-of-text counts as one, or as none if
    // add_prefix_space puts a space after it, which then counts. So the sum over a stream of texts, each
    // after end-of-text, is the same for all tokenizers, and their losses in bits per character can be
    // compared.
    int chars(int token) const {
        return token >= first_tag() ? 0 : token == eot_ ? !add_prefix_space_ : (int)utf8::count(bytes(token));
    }

    // In byte-level BPE, the two tokens that merge into this one; -1 and -1 for single bytes
    // and special tokens.
    std::pair<int, int> parts(int token) const {
        if (kind_ != BYTE_BPE) fail("a character tokenizer merges no tokens");
        return bytes(token), parts_[(size_t)token];  // bytes() checks the range
    }
    // How many tokens merging has examined so far; tests check that this cost stays low.
    uint64_t work() const { return merges_.work(); }

  private:
    static constexpr int32_t MAGIC = 20240328, VERSION = 2;
    static constexpr int MAX_VOCAB = 1 << bpe::Merges::ID_BITS;
    static constexpr const char* EOT_TEXT = "<|endoftext|>";

    // The column of a tag: <|COLUMN=VALUE|>.
    std::string column_of(int tag) const {
        const std::string& s = tokens_[(size_t)tag];
        return s.substr(2, s.find('=') - 2);
    }

    // Fills tag_of_. Checks that tags are spelled as such and differ, that those of a column follow each
    // other, and that each column has OTHER.
    void index_tags(const char* where) {
        std::set<std::string> columns;
        std::string last;
        for (int i = first_tag(); i < vocab_size(); i++) {
            const std::string& s = tokens_[(size_t)i];
            if (s.size() < 6 || s.compare(0, 2, "<|") || s.compare(s.size() - 2, 2, "|>") ||
                s.find('=') == s.npos || utf8::find_invalid(s) != s.npos)
                fail("%s: token %d is %s, wanted a tag <|COLUMN=VALUE|>", where, i, utf8::quote(s).c_str());
            if (!tag_of_.insert({s, i}).second)
                fail("%s: token %d is %s, as an earlier one is", where, i, utf8::quote(s).c_str());
            const std::string column = column_of(i);
            if ((i == first_tag() || column != last) && !columns.insert(column).second)
                fail("%s: token %d is %s, wanted it next to the other tags of its column", where, i,
                     utf8::quote(s).c_str());
            last = column;
        }
        for (const std::string& column : columns)
            if (tag(column, OTHER) < 0)
                fail("%s: has tags of %s, but not %s", where, utf8::quote(column).c_str(),
                     utf8::quote(tag_text(column, OTHER)).c_str());
    }

    // Fills token_of_ and the tags. Checks that end-of-text is spelled EOT_TEXT, and that the tokens before
    // the tags are distinct single characters.
    void index_characters(const std::string& where) {
        const char* w = where.c_str();
        if (tokens_[(size_t)eot_] != EOT_TEXT)
            fail("%s: end-of-text token %d is not written %s", w, eot_, EOT_TEXT);
        index_tags(w);
        for (int i = 0; i < first_tag(); i++) {
            if (i == eot_) continue;
            const std::string& s = tokens_[(size_t)i];
            uint32_t c = 0;
            if (utf8::decode(s, 0, &c) != s.size())
                fail("%s: token %d of a character tokenizer has %zu bytes that are not one UTF-8 character",
                     w, i, s.size());
            if (c >= token_of_.size()) token_of_.resize(c + 1, -1);
            if (token_of_[c] >= 0)
                fail("%s: tokens %d and %d are both %s", w, token_of_[c], i, utf8::name(c).c_str());
            token_of_[c] = i;
        }
    }

    void add_token(int token, const std::string& where) {
        auto [other, is_new] = added_.insert({bytes(token), token});
        if (!is_new)
            fail("%s: added tokens %d and %d are both %s", where.c_str(), other->second, token,
                 utf8::quote(bytes(token)).c_str());
        longest_added_ = std::max(longest_added_, bytes(token).size());
    }
    // The longest added token that the text begins with; -1 if there is none.
    int added_at(std::string_view text) const {
        for (size_t n = longest_added_; n > 0;) {  // of at most n bytes
            auto it = added_.upper_bound(text.substr(0, n));
            if (it == added_.begin()) return -1;
            // The last one in the alphabet that is not after the text. It begins with every shorter one that
            // the text begins with.
            const std::string& s = (--it)->first;
            size_t same = 0;
            while (same < std::min(s.size(), text.size()) && s[same] == text[same]) same++;
            if (same == s.size()) return it->second;
            n = same;
        }
        return -1;
    }

    // Fills token_of_ for the bytes, and finds the merges as the head of this file explains.
    void index_bpe(const std::string& where) {
        const char* w = where.c_str();
        token_of_.assign(256, -1);
        for (int i = 0; i < vocab_size(); i++) {
            if (i == eot_ || tokens_[(size_t)i].size() != 1 || is_added(i)) continue;
            int& token = token_of_[(unsigned char)tokens_[(size_t)i][0]];
            if (token >= 0)
                fail("%s: tokens %d and %d are both %s", w, token, i, utf8::quote(bytes(i)).c_str());
            token = i;
        }
        for (size_t b = 0; b < 256; b++)
            if (token_of_[b] < 0) fail("%s: no token is the single byte 0x%02X", w, (unsigned)b);

        merges_ = bpe::Merges(tokens_.size()), cache_.clear(tokens_.size());
        parts_.assign(tokens_.size(), {-1, -1});
        std::vector<int> ids;
        for (int i = 0; i < vocab_size(); i++) {
            if (i == eot_ || tokens_[(size_t)i].size() == 1 || is_added(i)) continue;
            ids.clear();
            merge_bytes(tokens_[(size_t)i], ids);
            if (ids.size() == 1)
                fail("%s: tokens %d and %d are both %s", w, ids[0], i, utf8::quote(bytes(i)).c_str());
            // A special token below the single bytes may be two of them, but a merge has earlier parts.
            if (ids.size() != 2 || ids[0] > i || ids[1] > i) continue;
            parts_[(size_t)i] = {ids[0], ids[1]};
            merges_.add(ids[0], ids[1], i);
        }
    }
    // Appends the tokens of a piece.
    void merge_bytes(std::string_view piece, std::vector<int>& ids) const {
        size_t begin = ids.size();
        for (char c : piece) ids.push_back(token_of_[(unsigned char)c]);
        ids.resize(begin + merges_.apply(ids.data() + begin, piece.size()));
    }
    // Appends the tokens of a text without added tokens.
    void encode_between(std::string_view text, std::vector<int>& ids) const {
        if (!text.empty() && text[0] != ' ' && add_prefix_space_) encode_bpe(" " + std::string(text), ids);
        else encode_bpe(text, ids);
    }
    void encode_bpe(std::string_view text, std::vector<int>& ids) const {
        bpe::Splitter pieces(text);
        std::string_view next;
        bool more = pieces.next(&next);
        bpe::PieceCache::Entry* next_entry = more ? cache_.find(next) : nullptr;
        while (more) {  // the next piece's cache entry is prefetched while this piece is encoded
            const std::string_view piece = next;
            bpe::PieceCache::Entry* const entry = next_entry;
            if ((more = pieces.next(&next))) next_entry = cache_.find(next);
            if (entry && entry->holds(piece)) {
                ids.insert(ids.end(), entry->ids, entry->ids + entry->count);
                continue;
            }
            size_t begin = ids.size();
            merge_bytes(piece, ids);
            if (entry) entry->store(piece, ids.data() + begin, ids.size() - begin);
        }
    }

    Kind kind_ = CHARACTERS;
    bool add_prefix_space_ = false;
    int eot_ = 0, tags_ = 0;
    std::vector<std::string> tokens_;
    std::vector<int> token_of_;  // code point, or byte in a BPE -> its token; -1 if there is none
    std::unordered_map<std::string, int> tag_of_;    // text of a tag -> the token
    std::map<std::string, int, std::less<>> added_;  // bytes of an added token -> the token
    size_t longest_added_ = 0;                       // bytes
    bpe::Merges merges_;
    std::vector<std::pair<int, int>> parts_;
    mutable bpe::PieceCache cache_;
};
