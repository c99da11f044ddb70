// poem_reader.h - finds out what a file of poems is, and takes the poems out of it as they are written there.
//
//     PoemReader reader(options, sink);
//     Input in("poems.csv");
//     std::string how = reader.read(in, false);     // calls sink.poem(); how: "CSV column poem_text"
//
// The first MiB of a file shows its format, the column of the poems, and what separates poems and hemistichs.
// The options of ./prepare_data overrule what is found there.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "data/clean.h"
#include "data/poem_files.h"

// What ./prepare_data is told about its files; its help explains each.
struct ReadOptions {
    std::string format = "auto", column, columns, group = "auto", where, except, layout = "auto",
                list = "auto", poem_separator = "auto", tags;
};

// How the verses of a file are written, and how to bring them into the form that cleaning expects.
struct VerseForm {
    bool hemistichs = false;  // lists in cells are of hemistichs, else of verses
    bool numbers = false;     // verses are numbered
    bool breaks = false;      // line ends are written as \n or <br>
    Separator separator = Separator("tab");

    bool needs_arranging(std::string_view raw) const {
        return numbers || breaks || !separator.is_tab() || is_list(raw);
    }
    // The text with a verse a line, a TAB between hemistichs, and without verse numbers.
    std::string arranged(std::string_view raw) const {
        std::string text = is_list(raw) ? unfolded(raw) : std::string(raw);
        if (breaks) text = with_breaks(text);
        if (numbers) {
            std::string bare;
            for_each_line(text,
                          [&](std::string_view v) { bare.append(v.substr(verse_number(v))), bare += '\n'; });
            text = std::move(bare);
        }
        return separator.apply(text);
    }

    // The length of a line end at s[i] that is written as \n, \r, \r\n, <br>, <BR>, <br/> or <br />; 0 if
    // there is none.
    static size_t written_break(std::string_view s, size_t i) {
        for (std::string_view b : {"\\r\\n", "\\n", "\\r", "<br>", "<br/>", "<br />", "<BR>"})
            if (s.substr(i, b.size()) == b) return b.size();
        return 0;
    }
    // Calls f for each item of a list that is not blank.
    template <class F>
    static void for_each_item(std::string_view list, F f) {
        for (size_t at = 1; at <= list.size();) {
            const size_t end = std::min(list.find(ITEM, at), list.size());
            if (!is_blank(list.substr(at, end - at))) f(list.substr(at, end - at));
            at = end + 1;
        }
    }

  private:
    static std::string with_breaks(std::string_view s) {
        std::string text;
        for (size_t i = 0; i < s.size();)
            if (const size_t n = s[i] == '\\' || s[i] == '<' ? written_break(s, i) : 0) text += '\n', i += n;
            else text += s[i++];
        return text;
    }
    // A list's items as verses, one a line, or as hemistichs, two a line.
    std::string unfolded(std::string_view list) const {
        std::string text;
        size_t n = 0;
        for_each_item(list, [&](std::string_view item) {
            if (n) text += hemistichs && n % 2 ? '\t' : '\n';
            text += item, n++;
        });
        return text;
    }
};

// Who takes the poems.
struct PoemSink {
    virtual ~PoemSink() = default;
    // Before and after the poems of a file; path and form stay valid in between.
    virtual void begin_file(const std::string& path, const VerseForm& form) = 0;
    // rows: of a table, damaged ones and those left out included
    virtual void end_file(size_t rows) = 0;
    // A poem, as it is written in the file, or a list of verses (LIST). It begins on `line` of the file, at
    // the byte `offset`, or Rows::NONE where it is not in the file as it is. tags: the values of the columns
    // of --tags.
    virtual void poem(std::string_view raw, size_t line, uint64_t offset,
                      const std::vector<std::string>& tags) = 0;
    virtual void bad_row(const Rows& row) = 0;
    virtual void left_out() = 0;  // a row, by --where or --except
    // A value that --where or --except names, e.g. "--where: poet=X", and whether a row of the file has it.
    virtual void named(const std::string& value, bool found) = 0;
};

// The names in a list, between separators; empty names are left out.
inline std::vector<std::string> split_names(const std::string& list, char separator = ',') {
    std::vector<std::string> names;
    for (size_t at = 0; at < list.size();) {
        const size_t end = std::min(list.find(separator, at), list.size());
        if (end > at) names.push_back(list.substr(at, end - at));
        at = end + 1;
    }
    return names;
}

class PoemReader {
  public:
    PoemReader(const Recipe& recipe, const ReadOptions& o, PoemSink& sink)
        : recipe_(recipe), o_(o), sink_(sink) {}

    // Reads the poems of an input. `of_folder`: a text is one poem. Returns what the input is, for the
    // report.
    std::string read(Input& in, bool of_folder) {
        refuse_other_kinds(in);
        path_ = in.path;
        // A first line 'sep=;' is for Excel; it is no row. The header shows the delimiter all the same.
        if (const std::string_view v = in.view(); v.substr(0, 4) == "sep=" && line_end(v, 0) == 5)
            in.drop_line(v.substr(5, 2) == "\r\n" ? 7 : 6);
        Layout l;
        choose_kind(in, l);
        const bool unsaid = o_.layout == "auto" && o_.poem_separator == "auto";
        l.whole = l.kind == TEXT && (o_.layout == "file" || (of_folder && unsaid));
        std::string how = l.kind == TEXT ? read_text(in, l) : read_rows(in, l);
        if (!l.form.separator.is_tab()) how += ", hemistichs separated by " + l.form.separator.shown();
        if (l.form.numbers) how += ", verse numbers removed";
        if (l.form.breaks) how += ", line ends written as \\n or <br>";
        return how;
    }

  private:
    enum Kind { CSV, JSON, TEXT };
    // What a file is, as far as its first MiB shows.
    struct Layout {
        Kind kind = TEXT;
        char delimiter = ',';
        std::vector<std::string> names;           // of the columns
        std::vector<size_t> parts;                // the column of the poem, or those of a verse's parts
        std::vector<size_t> group, tags;          // the columns of --group and --tags
        bool verse_rows = false;                  // a row is a verse
        bool lists = false;                       // cells are lists
        bool whole = false, blank_lines = false;  // text: one poem in all, poems between blank lines
        std::string mark;                         // text: poems end at lines of this
        VerseForm form;
    };
    // What the beginning of a file has in it
    struct Sample {
        static constexpr size_t ENOUGH = 4000;  // verses to judge a file by
        std::deque<std::string> texts;
        std::vector<std::string_view> verses;
        void add(std::string text) {
            if (verses.size() >= ENOUGH) return;
            texts.push_back(std::move(text));
            for_each_line(texts.back(), [&](std::string_view line) {
                if (!is_blank(line) && verses.size() < ENOUGH) verses.push_back(line);
            });
        }
    };

    // --- what a file is

    void choose_kind(const Input& in, Layout& l) const {
        const std::string_view v = in.view();
        const std::string& path = in.path;
        auto named = [&](const char* ending) {
            const size_t n = strlen(ending);
            return path.size() > n && !strcasecmp(path.c_str() + path.size() - n, ending);
        };
        const bool by_content = o_.format == "auto";
        // JSON begins with { " or [ and, after white space, the first text, list or object.
        size_t i = std::min(v.find_first_not_of(" \t\r\n"), v.size());
        const bool open = i < v.size() && (v[i] == '{' || v[i] == '[');
        const size_t inner = open ? std::min(v.find_first_not_of(" \t\r\n", i + 1), v.size()) : v.size();
        const bool like_json = inner < v.size() && is_one_of(v[inner], v[i] == '{' ? "\"}" : "{[\"");
        if (o_.format == "json" ||
            (by_content && (named(".json") || named(".jsonl") || named(".ndjson") || like_json))) {
            l.kind = JSON;
            if (!json::available())
                fail(
                    "%s: is JSON, for which ./prepare_data must be built with nlohmann-json: "
                    "sudo apt-get install nlohmann-json3-dev, then make prepare_data",
                    path.c_str());
            return;
        }
        if (o_.format == "text") return;
        // A CSV has a header line with the column that is wanted, or looks like one, or is named like one.
        const bool must = o_.format == "csv" || named(".csv") || named(".tsv") || like_table(in);
        size_t most = 0;
        bool found = false;
        for (char delimiter : {',', ';', '\t', '|'}) {
            const std::vector<std::string> names = header_names(in, delimiter);
            const bool has = has_wanted_column(names);
            if ((has && !found) || (has == found && names.size() > most))
                l.delimiter = delimiter, most = names.size(), found = found || has;
        }
        if (must || found) l.kind = CSV;
    }
    // Is the first line made of names in ASCII, and has each of the next rows as many cells? Text in Arabic
    // does not begin so; a table without a usual column does, and then an Error that lists its columns helps.
    static bool like_table(const Input& in) {
        for (char delimiter : {',', ';', '\t', '|'}) {
            const std::vector<std::string> names = header_names(in, delimiter);
            bool ascii = names.size() > 1;
            for (const std::string& n : names)
                for (char c : n) ascii = ascii && (isalnum((unsigned char)c) || is_one_of(c, "_ -"));
            if (!ascii) continue;
            Input start(in.path, in.sample());
            CsvRows rows(start, delimiter);
            size_t n = 0;
            bool more = true;
            while (n < 20 && (more = rows.next()) && rows.bad.empty()) n++;
            if (n >= 20 || (n && !more)) return true;
        }
        return false;
    }
    // The cells of the first line, or nothing if it is no header.
    static std::vector<std::string> header_names(const Input& in, char delimiter) {
        const std::string_view v = in.view(), line = v.substr(0, v.find_first_of("\r\n"));
        if (line.empty() || std::count(line.begin(), line.end(), '"') % 2) return {};
        try {
            Input header(in.path, line);
            return CsvRows(header, delimiter).names;
        } catch (const Error&) {
            return {};
        }
    }
    // Does the header have the columns that the flags name or, if they name none, one that poems often have?
    bool has_wanted_column(const std::vector<std::string>& names) const {
        std::vector<std::string> wanted = split_names(o_.columns);
        if (!o_.column.empty()) wanted = {o_.column};
        auto has = [&](const std::string& n) {
            return std::find(names.begin(), names.end(), n) != names.end();
        };
        if (!wanted.empty()) return std::all_of(wanted.begin(), wanted.end(), has);
        return usual_column(names) != Rows::NONE && (names.size() > 1 || has(USUAL[0]));
    }
    // Names that the column of the poem has in published collections. The first is taken before the others.
    static constexpr const char* USUAL[] = {
        "poem_text",   "text",        "poem",
        "poem verses", "poem_verses", "verses",
        "content",     "poetry",      "\u0627\u0644\u0642\u0635\u064A\u062F\u0629"};
    // The column that the poem is in: poem_text, or the only one with another usual name; or NONE.
    static size_t usual_column(const std::vector<std::string>& names) {
        size_t found = Rows::NONE, n = 0;
        for (size_t i = 0; i < names.size(); i++)
            for (const char* usual : USUAL) {
                if (names[i] != usual) continue;
                if (usual == USUAL[0]) return i;
                found = i, n++;
            }
        return n == 1 ? found : Rows::NONE;
    }

    // --- tables

    std::unique_ptr<Rows> open_rows(Input& in, const Layout& l) const {
        if (l.kind == CSV) return std::make_unique<CsvRows>(in, l.delimiter);
        auto rows = std::make_unique<JsonRows>(in);
        rows->names = l.names;
        return rows;
    }
    // The number of the column called `name`; an Error if there is none. `flag` is the switch that named it.
    size_t column_named(const Layout& l, const std::string& name, const char* flag) const {
        auto at = std::find(l.names.begin(), l.names.end(), name);
        if (at != l.names.end()) return (size_t)(at - l.names.begin());
        std::string found;
        for (const std::string& n : l.names) {
            if (utf8::find_invalid(n) != std::string::npos)
                fail("%s: is not UTF-8 text: its header line has other bytes", path_.c_str());
            found += (found.empty() ? "" : ", ") + utf8::quote(n);
        }
        fail("%s: has no %s '%s'; its %s are %s (%s chooses one)", path_.c_str(),
             l.kind == CSV ? "column" : "key", name.c_str(), l.kind == CSV ? "columns" : "keys",
             found.c_str(), flag);
    }
    // What --where and --except ask of a row: that a column has one of these values. Without a column no row
    // meets it.
    struct Condition {
        size_t column = SIZE_MAX;
        std::vector<std::string> values;
        std::vector<bool> found = std::vector<bool>(values.size());  // which of them a row has had
        bool met(const Rows& rows) {
            if (column == SIZE_MAX) return false;
            const auto at = std::find(values.begin(), values.end(), rows.cell(column).text());
            if (at == values.end()) return false;
            return found[(size_t)(at - values.begin())] = true;
        }
    };
    // Reads COLUMN=VALUE or COLUMN=A|B, which means A or B. (A value with "|" in it cannot be named.)
    Condition condition(const Layout& l, const std::string& text, const char* flag) const {
        if (text.empty()) return {};
        const size_t equals = text.find('=');
        std::vector<std::string> values = split_names(text.substr(equals + 1), '|');
        if (values.empty()) values = {""};
        return {column_named(l, text.substr(0, equals), flag), values};
    }
    void tell_found(const Condition& c, const Layout& l, const char* flag) {
        for (size_t i = 0; i < c.values.size(); i++)
            sink_.named(strf("%s: %s=%s", flag, l.names[c.column].c_str(), c.values[i].c_str()), c.found[i]);
    }

    // Looks at the first rows: the columns, the group, what the poems' verses are like.
    void survey(const Input& in, Layout& l) const {
        if (l.kind == JSON) l.names = json_names(in);
        Input start(in.path, in.sample());
        std::unique_ptr<Rows> rows = open_rows(start, l);
        bool row = rows->next();
        while (row && !rows->bad.empty()) row = rows->next();
        if (l.kind == CSV) l.names = rows->names;
        for (const std::string& name : split_names(o_.columns))
            l.parts.push_back(column_named(l, name, "--columns"));
        l.verse_rows = !l.parts.empty();
        if (!l.verse_rows) l.parts = {poem_column(l, row ? rows.get() : nullptr)};
        for (const std::string& name : split_names(o_.tags))
            l.tags.push_back(column_named(l, name, "--tags"));

        Sample sample;
        ListStatistics lists;
        std::vector<size_t> changes(l.names.size());
        std::vector<std::string> last(l.names.size());
        size_t n = 0;
        for (; row; row = rows->next()) {
            if (!rows->bad.empty()) continue;
            for (size_t c = 0; c < changes.size() && l.verse_rows; c++) {
                std::string value = rows->cell(c).text();
                changes[c] += n && value != last[c];
                last[c] = std::move(value);
            }
            n++;
            std::string text = l.verse_rows ? verse_of(*rows, l) : rows->cell(l.parts[0]).text();
            if (PrintedList printed; !l.verse_rows && l.kind == CSV && printed.parse(text))
                text = printed.list;
            if (is_list(text)) {
                lists.add(text);
                for (char& c : text)
                    if (c == LIST || c == ITEM) c = '\n';
            }
            sample.add(std::move(text));
        }
        l.lists = lists.lists > 0;
        l.form.hemistichs = o_.list == "hemistichs" || (o_.list == "auto" && lists.like_hemistichs());
        if (l.verse_rows) choose_group(l, changes, n);
        survey_verses(sample, l);
    }
    // A hemistich of the classical metres has up to about 25 letters (17 to 22 on average, by metre, in a
    // corpus of 190,000 verses), a verse twice as many.
    static constexpr size_t HEMISTICH = 28;
    static size_t count_letters(std::string_view text) {
        uint32_t c;
        size_t n = 0;
        for (size_t i = 0; i < text.size();) i += decode_or_byte(text, i, &c), n += is_letter(c);
        return n;
    }
    // What tells lists of hemistichs from lists of verses
    struct ListStatistics {
        size_t lists = 0, even = 0, items = 0, letters = 0;  // even: lists with an even number of items
        void add(std::string_view list) {
            const size_t before = items;
            VerseForm::for_each_item(list, [&](std::string_view item) {
                // An item with a TAB has both hemistichs, however short it is.
                letters += item.find('\t') == item.npos ? count_letters(item) : 2 * HEMISTICH;
                items++;
            });
            lists++, even += (items - before) % 2 == 0;
        }
        bool like_hemistichs() const {
            return lists && (double)even >= 0.8 * (double)lists && letters <= HEMISTICH * items;
        }
    };
    // The keys of the values at the beginning of the file; an Error if there is none.
    std::vector<std::string> json_names(const Input& in) const {
        const std::string_view sample = in.sample();
        Input start(in.path, sample);
        JsonRows rows(start);
        std::string why = "it has none";
        while (rows.next())
            if (!rows.bad.empty() && why == "it has none") why = strf("line %zu: ", rows.line) + rows.bad;
        if (rows.names.empty() && !in.ended() && sample.size() == in.view().size())
            why =
                "the first one is longer than 1 MiB; wanted JSON lines, or an array with a value for each "
                "poem";
        if (rows.names.empty())
            fail("%s: has no JSON value that can be read: %s", in.path.c_str(), why.c_str());
        return rows.names;
    }
    // The column of the poem: what --column names; else one with a usual name; else, in JSON, the only list.
    size_t poem_column(const Layout& l, const Rows* row) const {
        if (!o_.column.empty()) return column_named(l, o_.column, "--column");
        if (l.names.size() == 1 && l.names[0].empty()) return 0;
        size_t found = usual_column(l.names), lists = 0, list = 0;
        if (found != Rows::NONE) return found;
        for (size_t c = 0; row && l.kind == JSON && c < l.names.size(); c++)
            if (is_list(row->cell(c).raw)) list = c, lists++;
        return lists == 1 ? list : column_named(l, USUAL[0], "--column");
    }
    // The columns that tell poems apart. auto: every column that keeps its value in at least a tenth of the
    // steps from one row to the next. The verse's own text and number, which change nearly always, are none.
    void choose_group(Layout& l, const std::vector<size_t>& changes, size_t rows) const {
        if (o_.group != "auto") {
            for (const std::string& name : split_names(o_.group))
                l.group.push_back(column_named(l, name, "--group"));
            return;
        }
        for (size_t c = 0; c < l.names.size(); c++)
            if (std::find(l.parts.begin(), l.parts.end(), c) == l.parts.end() &&
                10 * changes[c] <= 9 * (rows - 1))
                l.group.push_back(c);
        if (l.group.empty())
            fail("%s: no column tells one poem's verses from another's; --group COLUMN names one",
                 path_.c_str());
    }
    void survey_verses(const Sample& sample, Layout& l) const {
        size_t numbered = 0;
        for (std::string_view v : sample.verses) numbered += verse_number(v) > 0;
        for (const std::string& text : sample.texts)
            for (size_t i = 0; i < text.size() && !l.form.breaks; i++)
                l.form.breaks = (text[i] == '\\' || text[i] == '<') && VerseForm::written_break(text, i);
        l.form.numbers = !sample.verses.empty() && (double)numbered >= 0.8 * (double)sample.verses.size();
        l.form.separator = Separator(recipe_.hemistich_separator == "auto" ? Separator::detect(sample.verses)
                                                                           : recipe_.hemistich_separator);
    }
    // The parts of a verse with a TAB between those that are not empty. A list has several parts.
    static std::string verse_of(const Rows& rows, const Layout& l) {
        std::string verse;
        auto add = [&](std::string_view part, std::string_view spaces) {
            if (is_blank(part)) return;
            if (!verse.empty()) verse += '\t';
            for (char c : part) verse += is_one_of(c, spaces) ? ' ' : c;
        };
        for (size_t c : l.parts) {
            const std::string part = rows.cell(c).text();
            if (is_list(part)) VerseForm::for_each_item(part, [&](std::string_view i) { add(i, "\n\r"); });
            else add(part, "\n\r\t");
        }
        return verse;
    }

    std::string read_rows(Input& in, Layout& l) {
        survey(in, l);
        Condition where = condition(l, o_.where, "--where"), except = condition(l, o_.except, "--except");
        std::unique_ptr<Rows> rows = open_rows(in, l);
        size_t count = 0;
        sink_.begin_file(path_, l.form);
        VerseRows verses{sink_, l};
        for (; rows->next(); count++) {
            // Both are asked of each row, so that they find their values.
            const bool good = rows->bad.empty(), wanted = good && (o_.where.empty() || where.met(*rows)),
                       excepted = good && except.met(*rows);
            if (!good) sink_.bad_row(*rows);
            else if (!wanted || excepted) sink_.left_out();
            else if (!(rows->bad = why_no_poem(*rows, l)).empty()) sink_.bad_row(*rows);
            else if (l.verse_rows) verses.add(*rows);
            else read_poem(*rows, l);
        }
        verses.end_poem();
        tell_found(where, l, "--where"), tell_found(except, l, "--except");
        sink_.end_file(count);
        return how_rows(l, rows.get());
    }
    // Why a row has no poem, or no verse; "" if it has.
    static std::string why_no_poem(const Rows& rows, const Layout& l) {
        for (size_t c : l.parts)
            if (const std::string_view raw = rows.cell(c).raw;
                l.kind == JSON && !raw.empty() && raw[0] == NOT_A_POEM)
                return strf("'%s' is neither a text nor a list of verses", l.names[c].c_str());
        return "";
    }
    // A row that is a poem
    void read_poem(Rows& rows, const Layout& l) {
        const Rows::Cell cell = rows.cell(l.parts[0]);
        const std::string text = cell.doubled ? cell.text() : "";
        const std::string_view raw = cell.doubled ? std::string_view(text) : cell.raw;
        PrintedList printed;
        if (l.kind == CSV && l.lists && printed.parse(raw)) {
            if (printed.cut) rows.bad = "numpy left out items of the list ('...')", sink_.bad_row(rows);
            else sink_.poem(printed.list, rows.line, Rows::NONE, tags_of(rows, l));
        } else {
            sink_.poem(raw, rows.line, rows.offset(cell), tags_of(rows, l));
        }
    }
    // Poems of rows that are verses: those that follow each other and have the same values in the columns of
    // the group
    struct VerseRows {
        PoemSink& sink;
        const Layout& l;
        std::vector<std::string> group = {}, tags = {};
        std::string poem = "";
        size_t first_line = 0;

        void add(const Rows& rows) {
            std::vector<std::string> values;
            for (size_t c : l.group) values.push_back(rows.cell(c).text());
            if (values != group) end_poem(), group = std::move(values);
            if (poem.empty()) first_line = rows.line, tags = tags_of(rows, l);
            const std::string verse = verse_of(rows, l);
            if (!verse.empty()) poem += verse + "\n";
        }
        void end_poem() {
            if (!poem.empty()) sink.poem(poem, first_line, Rows::NONE, tags);
            poem.clear();
        }
    };
    std::string how_rows(const Layout& l, const Rows* rows) const {
        std::string how;
        if (l.kind == CSV)
            how = l.delimiter == ','    ? "CSV"
                  : l.delimiter == '\t' ? "CSV (TAB)"
                                        : strf("CSV (%c)", l.delimiter);
        else how = static_cast<const JsonRows*>(rows)->is_array() ? "JSON array" : "JSON lines";
        auto list = [&](const std::vector<size_t>& columns) {
            std::string s;
            for (size_t c : columns) s += (s.empty() ? "" : ", ") + l.names[c];
            return s;
        };
        const char* one = l.kind == CSV ? "column" : "key";
        if (l.verse_rows) {
            how += strf(", a verse a row, %ss %s, poems by %s", one, list(l.parts).c_str(),
                        list(l.group).c_str());
        } else {
            if (!l.names[l.parts[0]].empty()) how += strf(" %s ", one) + list(l.parts);
            if (l.lists) how += l.form.hemistichs ? ", lists of hemistichs" : ", lists of verses";
        }
        return how;
    }
    static std::vector<std::string> tags_of(const Rows& rows, const Layout& l) {
        std::vector<std::string> tags;
        for (size_t c : l.tags) tags.push_back(rows.cell(c).text());
        return tags;
    }

    // --- text

    std::string read_text(Input& in, Layout& l) {
        for (auto [flag, text] : {std::pair<const char*, const std::string*>{"--where", &o_.where},
                                  {"--except", &o_.except},
                                  {"--columns", &o_.columns},
                                  {"--tags", &o_.tags}})
            if (!text->empty())
                fail("%s: is plain text, but %s needs the columns of a CSV", in.path.c_str(), flag);
        survey_text(in.sample(), l);
        sink_.begin_file(path_, l.form);
        LineReader lines(in);
        std::string poem;
        size_t first_line = 0;
        uint64_t first_offset = 0;
        auto flush = [&] {
            if (!poem.empty()) sink_.poem(poem, first_line, first_offset, {});
            poem.clear();
        };
        while (lines.next()) {
            const bool blank = is_blank(lines.line);
            if (!l.whole &&
                (blank ? l.blank_lines || !poem.size() : !l.mark.empty() && ends_poem(lines.line, l.mark))) {
                flush();
                continue;
            }
            if (poem.empty()) {
                if (blank) continue;
                first_line = lines.number, first_offset = lines.offset;
            }
            poem += lines.raw;
            if (!l.whole && !l.blank_lines && l.mark.empty()) flush();
        }
        flush();
        sink_.end_file(0);
        return l.whole           ? "text, a poem a file"
               : !l.mark.empty() ? "text, poems separated by lines of " + utf8::quote(l.mark)
               : l.blank_lines   ? "text, poems separated by blank lines"
                                 : "text, one poem per line";
    }
    static bool ends_poem(std::string_view line, const std::string& mark) {
        const size_t begin = std::min(line.find_first_not_of(" \t"), line.size()),
                     end = line.find_last_not_of(" \t") + 1;
        return (end > begin && line.substr(begin, end - begin) == mark) || mark_line(line) == mark;
    }
    // How a text divides into poems and verses.
    void survey_text(std::string_view text, Layout& l) const {
        size_t gaps = 0;  // blank lines within the text, but for those next to a line that only separates
        std::map<std::string, size_t> marks;
        bool seen = false, gap = false;
        std::string waiting;  // a line that separates, if text follows
        Sample sample;
        for_each_line(text, [&](std::string_view line) {
            if (is_blank(line)) {
                gap = seen;
                return;
            }
            if (std::string mark = mark_line(line); !mark.empty()) {
                if (seen) waiting = mark, gap = false;
                return;
            }
            if (!waiting.empty()) marks[waiting]++, gap = false, waiting.clear();
            gaps += gap, gap = false, seen = true;
            sample.add(std::string(line));
        });
        survey_verses(sample, l);
        if (l.whole) return;
        if (o_.poem_separator != "auto") {
            l.mark = o_.poem_separator;
            if (std::string one = mark_line(l.mark); !one.empty()) l.mark = one;
        } else if (o_.layout == "auto") {
            size_t most = 0;
            for (auto& [mark, n] : marks)
                if (n > most) l.mark = mark, most = n;
            // Marks that are much rarer than blank lines divide the book into parts; then the blank lines
            // divide the poems. If there is at least one mark for every STANZAS blank lines, the blank lines
            // divide stanzas. $ and <|endoftext|> always divide poems.
            constexpr size_t STANZAS = 4;
            const bool certain = l.mark == "$" || l.mark == "<|endoftext|>";
            if (!certain && gaps && (most < 2 || most * STANZAS < gaps)) l.mark.clear();
        }
        l.blank_lines = l.mark.empty() && (o_.layout == "blank" || (o_.layout == "auto" && gaps));
    }

    const Recipe& recipe_;
    const ReadOptions& o_;
    PoemSink& sink_;
    std::string path_;  // of the file being read
};
