// poem_files.h - the files that poems come in, read piece by piece: CSV, JSON, plain text.
//
//     Input in("poems.csv");                 // or "-", standard input
//     CsvRows rows(in, ',');
//     size_t poem = rows.column("poem_text");
//     while (rows.next()) use(rows.cell(poem));
//
// Only a few MiB of a file are in memory at a time.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "data/clean.h"
#include "lib/io.h"
#include "lib/utf8.h"

// The longest record of a table. A quote that never closes would take the rest of the file.
constexpr size_t MOST_OF_A_RECORD = (size_t)64 << 20;

// The bytes of a file from front to back, a window of which is in memory.
class Input {
  public:
    // The beginning of the file, from which its format is recognised
    static constexpr size_t SAMPLE = (size_t)1 << 20;
    const std::string path;  // for messages
    size_t first_line = 1;   // the number of the line with which view() begins before anything is read

    explicit Input(const std::string& p) : path(p == "-" ? "standard input" : p) {
        if (p == "-") fd_ = dup(0);
        else fd_ = open(p.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd_ < 0) fail("%s: cannot open: %s", path.c_str(), strerror(errno));
        more();
        if (buffer_.empty()) fail("%s: is empty", path.c_str());
        if (view().substr(0, 3) == "\xEF\xBB\xBF") drop(3);
    }
    // A text that is in memory, under the name of the file that it comes from
    Input(const std::string& name, std::string_view text) : path(name), buffer_(text), ended_(true) {}
    ~Input() {
        if (fd_ >= 0) close(fd_);
    }
    Input(const Input&) = delete;
    Input& operator=(const Input&) = delete;

    // What is in memory and not yet dropped; valid until the next call of more().
    std::string_view view() const { return std::string_view(buffer_).substr(at_); }
    // Makes view() longer by half, and by SAMPLE at least, or as far as the file goes; false at its end. A
    // reader that begins its record anew with each longer view takes linear time.
    bool more() {
        if (ended_) return false;
        buffer_.erase(0, at_), before_ += at_, at_ = 0;
        const size_t had = buffer_.size(), want = had + std::max(SAMPLE, had / 2);
        size_t have = had;
        buffer_.resize(want);
        while (have < want && !ended_) {  // a pipe gives less at a time
            const ssize_t n = ::read(fd_, &buffer_[have], want - have);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) fail("%s: cannot read: %s", path.c_str(), strerror(errno));
            have += (size_t)n, ended_ = n == 0;
        }
        buffer_.resize(have);
        return have > had;
    }
    void drop(size_t n) { at_ += n; }
    // How many bytes of the file come before view()
    uint64_t offset() const { return before_ + at_; }
    uint64_t bytes_read() const { return before_ + buffer_.size(); }
    // Passes over the first line, which has n bytes with its end.
    void drop_line(size_t n) { drop(n), first_line++; }
    // Is the rest of the file in view()?
    bool ended() const { return ended_; }
    // The complete lines at the beginning of view(); all of it if the file ends there, or if the lines would
    // be less than half of it, because the next one is very long.
    std::string_view sample() const {
        const std::string_view v = view();
        const size_t end = ended_ ? v.npos : v.rfind('\n');
        return end == v.npos || end < v.size() / 2 ? v : v.substr(0, end + 1);
    }

  private:
    int fd_ = -1;
    std::string buffer_;
    size_t at_ = 0;
    uint64_t before_ = 0;
    bool ended_ = false;  // the end of the file has been read
};

// Cuts an input into lines, which end at LF, CR LF or CR.
class LineReader {
  public:
    std::string_view line;  // without its end; valid until the next call
    std::string_view raw;   // with its end
    size_t number;          // the file's first line is 1
    uint64_t offset = 0;    // in the file

    explicit LineReader(Input& in) : number(in.first_line - 1), in_(in) {}
    bool next() {
        in_.drop(raw.size());
        for (size_t from = 0;;) {
            std::string_view v = in_.view();
            size_t end = v.find_first_of("\r\n", from);
            // A CR at the end of what is in memory may be followed by LF.
            if (end == v.npos || (v[end] == '\r' && end + 1 == v.size())) {
                from = end == v.npos ? v.size() : end;
                if (in_.more()) continue;
                v = in_.view();
                if (v.empty()) return raw = {}, false;
                if (end == v.npos) end = v.size();
            }
            line = v.substr(0, end);
            raw = v.substr(0, end + (v.substr(end, 2) == "\r\n" ? 2 : end < v.size()));
            offset = in_.offset(), number++;
            return true;
        }
    }

  private:
    Input& in_;
};

// A list of verses or hemistichs in one cell of a table. It is kept as a text: LIST, then the items with ITEM
// between them. Cleaning removes control characters, so no poem has them.
constexpr char LIST = '\x1D', ITEM = '\x1E';
inline bool is_list(std::string_view cell) { return !cell.empty() && cell[0] == LIST; }
// What a JSON value begins with that is neither a text nor a list of verses.
constexpr char NOT_A_POEM = '\x1C';

// A table read row by row. A row that is damaged is passed over: bad() tells why.
class Rows {
  public:
    struct Cell {
        std::string_view raw;  // as written in the file, without outer quotes
        bool doubled;          // raw writes a quote as ""
        std::string text() const {
            std::string s;
            s.reserve(raw.size());
            for (size_t i = 0; i < raw.size(); i++) {
                s += raw[i];
                if (doubled && raw[i] == '"') i++;
            }
            return s;
        }
    };
    static constexpr size_t NONE = SIZE_MAX;

    size_t line = 0;                 // on which the row begins; the first is 1
    std::string bad;                 // why the row is damaged; empty if it is not
    bool ragged = false;             // a damaged row that only has too many or too few cells
    std::vector<std::string> names;  // of the columns

    virtual ~Rows() = default;
    // Reads the next row; false at the end. A damaged row is one row, too, without cells.
    virtual bool next() = 0;
    virtual Cell cell(size_t column) const = 0;
    // The number of the column called `name`, or NONE.
    size_t column(const std::string& name) const {
        auto at = std::find(names.begin(), names.end(), name);
        return at == names.end() ? NONE : (size_t)(at - names.begin());
    }
    // Where the cell lies in the file, in bytes; NONE where it is not in the file as it is.
    virtual uint64_t offset(const Cell& cell) const = 0;
};

// A table with a separator between the cells of a row (RFC 4180, also with ; TAB or | for the comma). The
// first record names the columns. A damaged record ends before the next line that begins a good one, so that
// a quote too many costs one row and not the rest of the file.
class CsvRows : public Rows {
  public:
    CsvRows(Input& in, char delimiter) : in_(in), delimiter_(delimiter), line_(in.first_line) {
        std::string_view v = in.view();
        const size_t end = v.find_first_of("\r\n");
        if (end != v.npos && v[end] == '\r' && v.substr(end, 2) != "\r\n") newline_ = '\r';
        if (!next()) fail("%s: has no header line", in.path.c_str());
        if (!bad.empty()) fail("%s: line %zu: %s", in.path.c_str(), line, bad.c_str());
        for (const Cell& c : cells_) {
            const std::string name = c.text();
            const size_t from = std::min(name.find_first_not_of(' '), name.size());
            names.push_back(name.substr(from, name.find_last_not_of(' ') + 1 - from));
        }
    }

    bool next() override {
        ragged = false;
        do {
            in_.drop(length_), line_ += lines_;
            length_ = lines_ = 0;
            if (!read(0)) return false;
        } while (cells_.size() == 1 && cells_[0].raw.empty() && bad.empty());
        line = line_;
        if (names.empty()) return true;  // the header
        if (bad.empty() && cells_.size() != names.size()) {
            bad = strf("%zu fields, the header has %zu", cells_.size(), names.size());
            // An unquoted field with a quote in it: the row before probably has a quote too many and took the
            // beginning of this one. That is damage, not a wrong number of fields.
            ragged = std::all_of(cells_.begin(), cells_.end(), [](const Cell& c) {
                return c.doubled || c.raw.find('"') == std::string_view::npos;
            });
            if (!ragged) bad += ", and a quote without its pair";
        }
        if (bad.empty()) note_kinds();
        else pass_over();
        return true;
    }
    Cell cell(size_t column) const override { return cells_[column]; }
    uint64_t offset(const Cell& cell) const override {
        if (cell.doubled) return NONE;
        return in_.offset() + (uint64_t)(cell.raw.data() - in_.view().data());
    }

  private:
    // Parses the record that begins `from` bytes after the window's start, and reads more of the file until
    // it is complete. Sets length_, lines_, cells_ and bad; false at the end of the file.
    bool read(size_t from) {
        for (;;) {
            const std::string_view v = in_.view();
            const bool complete = parse(v, from);
            if (complete && (length_ < v.size() || v.size() - from > MOST_OF_A_RECORD)) return true;
            if (v.size() - from <= MOST_OF_A_RECORD && in_.more()) continue;
            if (from >= in_.view().size()) return false;
            parse(in_.view(), from);
            return true;
        }
    }
    char at(size_t i) const { return i < text_.size() ? text_[i] : '\0'; }
    bool ends_line(size_t i) const {
        return i >= text_.size() || text_[i] == '\n' ||
               (text_[i] == '\r' && (newline_ == '\r' || at(i + 1) == '\n'));
    }
    bool ends_cell(size_t i) const { return ends_line(i) || text_[i] == delimiter_; }

    // False if the text ends within a quoted cell.
    bool parse(std::string_view text, size_t from) {
        text_ = text;
        cells_.clear(), bad.clear(), lines_ = 0;
        size_t i = from;
        for (;;) {
            if (at(i) == '"') {
                const size_t begin = ++i;
                bool doubled = false;
                // A single quote ends the cell, a doubled one is part of it.
                while ((i = text.find('"', i)) != text.npos && at(i + 1) == '"') i += 2, doubled = true;
                if (i == text.npos) {
                    bad = "a quoted field begins here but never ends";
                    length_ = text.size();
                    return false;
                }
                const std::string_view raw = text.substr(begin, i - begin);
                lines_ += (size_t)std::count(raw.begin(), raw.end(), newline_);
                cells_.push_back({raw, doubled});
                if (!ends_cell(++i)) {
                    bad = strf("text follows the closing quote of a field, on line %zu (unbalanced quotes?)",
                               line_ + lines_);
                    length_ = i;
                    return true;
                }
            } else {
                const size_t begin = i;
                while (!ends_cell(i)) i++;
                cells_.push_back({text.substr(begin, i - begin), false});
            }
            if (at(i) != delimiter_ || ends_line(i)) break;
            i++;
        }
        if (i < text.size()) i += text.substr(i, 2) == "\r\n" ? 2 : 1, lines_++;
        length_ = i;
        return true;
    }

    // What a cell looks like, as far as it tells the lines of a poem from rows: nothing, digits, ASCII,
    // anything. Each kind allows all that those before it allow.
    enum CellKind : char { EMPTY, DIGITS, ASCII, ANY };
    static CellKind kind_of(const Cell& c) {
        if (c.raw.empty()) return EMPTY;
        auto all = [&](auto is) { return std::all_of(c.raw.begin(), c.raw.end(), is); };
        if (all([](char x) { return x >= '0' && x <= '9'; })) return DIGITS;
        return all([](char x) { return (unsigned char)x < 0x80; }) ? ASCII : ANY;
    }
    void note_kinds() {
        kinds_.resize(cells_.size(), EMPTY);
        for (size_t c = 0; c < cells_.size(); c++) kinds_[c] = std::max(kinds_[c], kind_of(cells_[c]));
    }
    // Is the record like the good ones so far: the same number of cells, and only digits, or only ASCII, in
    // the columns that had nothing else? An empty cell is like any other.
    bool like_the_good() const {
        if (cells_.size() != names.size()) return false;
        for (size_t c = 0; c < kinds_.size(); c++)
            if (kinds_[c] != EMPTY && kind_of(cells_[c]) > kinds_[c]) return false;
        return true;
    }
    // After a damaged record: makes it end before the first line after its own first that begins a good one.
    void pass_over() {
        const std::string why = bad;
        const bool was_quoted = at(0) == '"';
        const size_t own_lines = ragged ? lines_ : SIZE_MAX;
        size_t i = 0, lines = 0;
        for (;;) {
            std::string_view v = in_.view();
            size_t end = v.find(newline_, i);
            if (end == v.npos) {
                if (v.size() <= MOST_OF_A_RECORD && in_.more()) continue;
                i = in_.view().size();
                break;
            }
            i = end + 1, lines++;
            // A ragged record is well formed, so the next one may begin after it in any case.
            if (lines == own_lines || !read(i)) break;
            const bool starts_alike = names.size() > 1 || !was_quoted || in_.view()[i] == '"';
            if (bad.empty() && like_the_good() && starts_alike) break;
        }
        length_ = i, lines_ = lines, cells_.clear(), bad = why;
    }

    Input& in_;
    const char delimiter_;
    char newline_ = '\n';
    std::string_view text_;  // what parse() looks at
    std::vector<Cell> cells_;
    std::vector<CellKind> kinds_;    // of each column, the loosest in all good records
    size_t length_ = 0, lines_ = 0;  // of the current record
    size_t line_;                    // on which it begins
};

// ---------------------------------------------------------------------------------------------
// JSON

// data/json.cpp, which needs nlohmann-json's header when it is compiled.
namespace json {
bool available();
// The members of an object as texts, in their order; of a text or a list, one member without a name. Numbers
// and truth values as they are written, null as an empty text, a list of texts in the form of LIST. Returns
// why the value cannot be read, or "".
std::string members(std::string_view value, std::vector<std::pair<std::string, std::string>>* found);
}  // namespace json

// JSON lines (a value a line), or an array of values, or values one after the other.
class JsonRows : public Rows {
  public:
    explicit JsonRows(Input& in) : in_(in), line_(in.first_line) {
        const std::string_view v = in.view();
        const size_t begin = skip(v, 0), inner = skip(v, begin + 1),
                     newline = std::min(v.find('\n'), v.size()), end = value_end(v, begin);
        // A first line with a whole value, and more lines: each line has a value. Exceptions: an array of
        // objects always holds many poems, and so does an array that is the whole file.
        const bool objects = begin < v.size() && v[begin] == '[' && inner < v.size() && v[inner] == '{';
        lines_only_ = !objects && end != v.npos && end <= newline && is_blank(v.substr(end, newline - end)) &&
                      !is_blank(v.substr(newline));
        if (!lines_only_ && begin < v.size() && v[begin] == '[') {
            count_lines(v.substr(0, begin + 1));
            in_.drop(begin + 1), in_array_ = is_array_ = true;
        }
    }
    bool is_array() const { return is_array_; }
    bool next() override {
        bad.clear(), members_.clear();
        if (!(lines_only_ ? next_line() : next_value())) return false;
        if (!bad.empty()) {
            pass_over();
            return true;
        }
        size_t wrong = utf8::find_invalid(value_);
        if (wrong != value_.npos)
            bad = strf("invalid UTF-8 at byte %llu (0x%02X)", (unsigned long long)(value_offset_ + wrong),
                       (unsigned)(unsigned char)value_[wrong]);
        else bad = json::members(value_, &members_);
        if (!bad.empty()) {
            pass_over();
            return true;
        }
        constexpr size_t MOST = 1000;  // names, so that values with names of their own do not fill the memory
        for (auto& m : members_)
            if (names.size() < MOST && column(m.first) == NONE) names.push_back(m.first);
        return true;
    }
    // A member that this value lacks is empty.
    Cell cell(size_t column) const override {
        for (auto& m : members_)
            if (m.first == names[column]) return {m.second, false};
        return {{}, false};
    }
    uint64_t offset(const Cell&) const override { return NONE; }

  private:
    static size_t skip(std::string_view v, size_t i) {
        return i < v.size() ? std::min(v.find_first_not_of(" \t\r\n,", i), v.size()) : v.size();
    }
    // The end of the value that begins at i, or npos if the text ends before it.
    static size_t value_end(std::string_view v, size_t i) {
        size_t depth = 0;
        bool quoted = false;
        for (; i < v.size(); i++) {
            const char c = v[i];
            if (quoted) {
                if (c == '\\') i++;
                else if (c == '"') quoted = false;
            } else if (c == '"') {
                quoted = true;
            } else if (c == '{' || c == '[') {
                depth++;
                continue;
            } else if (c == '}' || c == ']') {
                if (depth) depth--;
            } else if (depth || !is_one_of(c, " \t\r\n,")) {
                continue;
            }
            if (!depth && !quoted) return i + (c == '"' || c == '}' || c == ']');
        }
        return v.npos;
    }
    void count_lines(std::string_view passed) {
        line_ += (size_t)std::count(passed.begin(), passed.end(), '\n');
    }
    bool next_line() {
        for (;;) {
            in_.drop(length_), line_ += length_ > 0;
            std::string_view v = in_.view();
            size_t end = v.find('\n');
            while (end == v.npos) {
                const size_t had = v.size();
                const bool more = in_.more();
                v = in_.view(), end = v.find('\n', had);
                if (!more) break;
            }
            length_ = end == v.npos ? v.size() : end + 1;
            if (!length_) return false;
            value_ = v.substr(0, end == v.npos ? v.size() : end), value_offset_ = in_.offset(), line = line_;
            if (!is_blank(value_)) return true;
        }
    }
    bool next_value() {
        count_lines(in_.view().substr(0, length_)), in_.drop(length_), length_ = 0;
        for (;;) {
            std::string_view v = in_.view();
            const size_t begin = skip(v, 0);
            if (begin < v.size() && in_array_ && v[begin] == ']') {  // another array may follow
                const size_t next = skip(v, begin + 1);
                if (next == v.size() && in_.more()) continue;
                in_array_ = next < in_.view().size() && in_.view()[next] == '[';
                length_ = next + in_array_;
                count_lines(in_.view().substr(0, length_)), in_.drop(length_), length_ = 0;
                continue;
            }
            size_t end = begin < v.size() ? value_end(v, begin) : v.npos;
            if (end == v.npos && v.size() <= MOST_OF_A_RECORD && in_.more()) continue;
            v = in_.view();
            if (begin >= v.size()) return false;
            line = line_ + (size_t)std::count(v.begin(), v.begin() + (ptrdiff_t)begin, '\n');
            if (end == v.npos) bad = "a value begins here but does not end", end = v.size();
            if (end == begin) bad = strf("'%c' where a value is wanted", v[begin]), end = begin + 1;
            value_ = v.substr(begin, end - begin), value_offset_ = in_.offset() + begin, length_ = end;
            return true;
        }
    }
    // After a damaged value in an array: makes it end before the next line that begins as it does, since a
    // quote too many may have joined it with those after it.
    void pass_over() {
        if (lines_only_) return;
        const std::string_view v = in_.view();
        const size_t begin = skip(v, 0);
        for (size_t i = begin; (i = v.find('\n', i)) < length_; i++) {
            const size_t next = std::min(v.find_first_not_of(" \t\r\n", i), v.size());
            if (next >= v.size() || v[next] != v[begin]) continue;
            length_ = next;
            return;
        }
    }

    Input& in_;
    bool lines_only_ = false, in_array_ = false, is_array_ = false;
    std::vector<std::pair<std::string, std::string>> members_;
    std::string_view value_;
    uint64_t value_offset_ = 0;
    size_t length_ = 0, line_;
};

// A list that pandas or numpy print, such as ['a', 'b'], ['a' 'b'], [('a', 'b'), ('c', None)], in the form of
// LIST. parse() returns false if the text is no such list. In a list of lists the inner ones are verses.
// `cut`: numpy left out items, for which it prints three dots.
class PrintedList {
  public:
    std::string list;
    bool cut = false;

    bool parse(std::string_view text) {
        list.assign(1, LIST), cut = false, text_ = text, i_ = 0, items_ = 0;
        skip_space();
        if (i_ >= text.size() || !is_one_of(text[i_], "[({") || !items(1)) return false;
        skip_space();
        return i_ == text.size() && items_ > 0;
    }

  private:
    static bool is_space(char c) { return is_one_of(c, " \t\r\n,"); }
    void skip_space() {
        while (i_ < text_.size() && is_space(text_[i_])) i_++;
    }
    bool word(std::string_view w) {
        if (text_.substr(i_, w.size()) != w) return false;
        i_ += w.size();
        return true;
    }
    void begin_item(size_t depth, bool first) {
        if (items_++) list += depth == 2 && !first ? '\t' : ITEM;
    }
    // From an opening bracket to the closing one
    bool items(size_t depth) {
        const char open = text_[i_++], close = open == '[' ? ']' : open == '(' ? ')' : '}';
        for (bool first = true;;) {
            skip_space();
            if (i_ >= text_.size()) return false;
            if (text_[i_] == close) return i_++, true;
            if (word("...")) cut = true;
            else if (is_one_of(text_[i_], "[({")) {
                if (depth == 2 || !items(depth + 1)) return false;
            } else if (word("None") || word("nan") || word("NaN") || word("<NA>")) {
            } else if (word("np.str_(")) {
                if (!quoted(depth, first) || !word(")")) return false;
                first = false;
            } else if (quoted(depth, first)) {
                first = false;
                // a dictionary's key is not an item
                const size_t here = i_;
                skip_space();
                if (i_ < text_.size() && text_[i_] == ':')
                    i_++, list.resize(before_), items_--, first = first_;
                else i_ = here;
            } else {
                return false;
            }
        }
    }
    // A text in quotes, with Python's escapes
    bool quoted(size_t depth, bool first) {
        if (i_ >= text_.size() || (text_[i_] != '\'' && text_[i_] != '"')) return false;
        const char quote = text_[i_++];
        before_ = list.size(), first_ = first;
        begin_item(depth, first);
        for (; i_ < text_.size() && text_[i_] != quote; i_++) {
            if (text_[i_] != '\\' || i_ + 1 >= text_.size()) {
                list += text_[i_];
                continue;
            }
            const char e = text_[++i_];
            if (e == 'x' || e == 'u') {
                uint32_t code = 0;
                for (size_t k = 0; k < (e == 'x' ? 2 : 4) && i_ + 1 < text_.size() &&
                                   isxdigit((unsigned char)text_[i_ + 1]);
                     k++) {
                    const char digit = text_[++i_];
                    code = code * 16 + (uint32_t)(digit <= '9' ? digit - '0' : (digit | 32) - 'a' + 10);
                }
                if (code < 0xD800 || code > 0xDFFF) utf8::append(list, code);
            } else {
                list += e == 'n' ? '\n' : e == 't' ? '\t' : e == 'r' ? '\r' : e;
            }
        }
        return i_ < text_.size() && i_++ < text_.size();
    }

    std::string_view text_;
    size_t i_ = 0, items_ = 0, before_ = 0;  // before_: the list's length before the last item
    bool first_ = true;
};

// ---------------------------------------------------------------------------------------------
// What is in a file

// Fails if the file is an archive, a table in a binary format, a picture or the like. The message has the
// command that converts it, if there is one.
inline void refuse_containers(std::string_view v, const char* path, const char* name) {
    auto begins = [&](std::string_view s) { return v.substr(0, s.size()) == s; };
    if (begins("\x1F\x8B")) fail("%s: is compressed with gzip, wanted text: gunzip -k %s", path, name);
    if (begins("BZh") && v.size() > 9 && v.substr(4, 6) == "1AY&SY")
        fail("%s: is compressed with bzip2, wanted text: bunzip2 -k %s", path, name);
    if (begins("\xFD"
               "7zXZ"))
        fail("%s: is compressed with xz, wanted text: unxz -k %s", path, name);
    if (begins("\x28\xB5\x2F\xFD")) fail("%s: is compressed with zstd, wanted text: unzstd %s", path, name);
    if (begins("PAR1"))
        fail(
            "%s: is a Parquet file, wanted text: python3 -c 'import sys, pandas; "
            "pandas.read_parquet(sys.argv[1]).to_json(\"poems.jsonl\", orient=\"records\", lines=True)' %s",
            path, name);
    if (begins("PK\x03\x04") && v.find("xl/") != v.npos)
        fail(
            "%s: is an Excel file, wanted text: python3 -c 'import sys, pandas; "
            "pandas.read_excel(sys.argv[1]).to_csv(\"poems.csv\", index=False)' %s",
            path, name);
    if (begins("PK\x03\x04")) fail("%s: is a ZIP archive, wanted text: unzip %s", path, name);
    for (auto [magic, kind] : {std::pair<std::string_view, const char*>{"%PDF", "a PDF file"},
                               {"\x89PNG", "a picture"},
                               {"\xFF\xD8\xFF", "a picture"},
                               {"GIF8", "a picture"},
                               {"\xD0\xCF\x11\xE0", "an old Word or Excel file"},
                               {"\x7F"
                                "ELF",
                                "a program"}})
        if (begins(magic)) fail("%s: is %s, wanted text: CSV, JSON or plain", path, kind);
}

// UTF-16 or UTF-32, by their byte order mark or, without one, by zero bytes; null if the text is neither.
// Arabic letters, spaces and line ends are U+0600 to U+06FF and U+0000 to U+00FF, so that their high bytes,
// at every second or fourth place, are 06 or 00.
inline const char* encoding_by_zero_bytes(std::string_view v) {
    auto begins = [&](std::string_view s) { return v.substr(0, s.size()) == s; };
    if (begins(std::string_view("\xFF\xFE\0\0", 4)) || begins(std::string_view("\0\0\xFE\xFF", 4)))
        return "UTF-32";
    if (begins("\xFF\xFE") || begins("\xFE\xFF")) return "UTF-16";
    const size_t units = v.size() / 4;
    if (!units) return nullptr;
    size_t high[4] = {};
    for (size_t i = 0; i < 4 * units; i++) high[i % 4] += v[i] == 0 || v[i] == 6;
    auto most = [&](size_t k) { return high[k] * 10 > units * 9; };
    if (most(0) && most(1) && most(2) && !most(3)) return "UTF-32BE";
    if (most(1) && most(2) && most(3) && !most(0)) return "UTF-32LE";
    if (most(0) && most(2) && !most(1) && !most(3)) return "UTF-16BE";
    if (most(1) && most(3) && !most(0) && !most(2)) return "UTF-16LE";
    return nullptr;
}

// The two Arabic encodings of 8 bits a letter, where most letters are not UTF-8: alef and lam, with which
// words begin, tell them apart. Null for UTF-8. Fails if the file is no text.
inline const char* encoding_by_letters(std::string_view v, const char* path) {
    size_t high = 0, valid = 0, windows = 0, iso = 0, control = 0;
    uint32_t c;
    for (size_t i = 0; i < v.size();) {
        const size_t k = utf8::decode(v, i, &c);
        if (k > 1) valid++;
        if (!k) high++;
        control += (unsigned char)v[i] < 0x20 && !is_one_of(v[i], "\t\n\v\f\r");
        const bool starts = i == 0 || !((unsigned char)v[i - 1] & 0x80);
        if (starts && v.substr(i, 2) == "\xC7\xE1") windows++;
        if (starts && v.substr(i, 2) == "\xC7\xE4") iso++;
        i += std::max<size_t>(k, 1);
    }
    if (control && high > valid) fail("%s: is not text, wanted CSV, JSON or plain text in UTF-8", path);
    if (high <= 4 * valid || high * 20 <= v.size()) return nullptr;
    return iso > windows ? "ISO-8859-6" : "CP1256";
}

// Fails if the file is of a kind that must be converted first; the message has the command that does it.
inline void refuse_other_kinds(const Input& in) {
    const std::string_view v = in.view().substr(0, 65536);
    const std::string name = in.path == "standard input" ? "FILE" : shell_quoted(in.path);
    const char *path = in.path.c_str(), *n = name.c_str();
    refuse_containers(v, path, n);
    const char* encoding = encoding_by_zero_bytes(v);
    if (!encoding) encoding = encoding_by_letters(v, path);
    if (encoding)
        fail("%s: is %s, wanted UTF-8: iconv -f %s -t UTF-8 %s > utf8.txt", path, encoding, encoding, n);
}
