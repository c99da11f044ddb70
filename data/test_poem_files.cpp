// test_poem_files.cpp - tests of what ./prepare_data makes of poems in the forms that people have them in:
// each form of the built-in poems must give the token files that their CSV gives.
#define ARAPOET_NO_MAIN
#include "data/prepare_data.cpp"

#include <doctest/doctest.h>

#include <ctime>
#include <thread>

#include "data/prompt.h"
#include "dev/test_util.h"

namespace {

using Strings = std::vector<std::string>;
using Set = std::function<void(prep::Options&)>;

struct BuiltIn {
    Strings header;
    std::vector<Strings> rows;  // id, poet, title, metre, text
    BuiltIn() {
        Input in("data/sample_poems.csv");
        CsvRows r(in, ',');
        header = r.names;
        while (r.next()) {
            rows.emplace_back();
            for (size_t c = 0; c < 5; c++) rows.back().push_back(r.cell(c).text());
        }
    }
};
const BuiltIn& built_in() {
    static const BuiltIn poems;
    return poems;
}
const std::string& text_of(size_t i) { return built_in().rows[i][4]; }
size_t count() { return built_in().rows.size(); }

std::string replaced(std::string s, const std::string& from, const std::string& to) {
    for (size_t at = 0; (at = s.find(from, at)) != s.npos; at += to.size()) s.replace(at, from.size(), to);
    return s;
}
// Each poem by f, with `between` between them
std::string joined(const std::string& between, const std::function<std::string(size_t)>& f) {
    std::string s;
    for (size_t i = 0; i < count(); i++) s += (i ? between : "") + f(i);
    return s;
}

// What ./prepare_data writes for a file, and reports.
struct Prepared {
    TempDir dir;
    prep::Report report;
    std::string train, val, tokenizer, recipe;
    std::string source() const { return report.sources[0]; }
};
std::unique_ptr<Prepared> prepare(const std::string& content, const std::string& name, const Set& set = {}) {
    auto p = std::make_unique<Prepared>();
    prep::Options o;
    o.files = {p->dir / name}, o.out = p->dir / "out";
    write_file(o.files[0], content);
    if (set) set(o);
    p->report = prep::prepare(o);
    p->train = read_file(o.out + "/train.bin"), p->tokenizer = read_file(o.out + "/tokenizer.bin");
    p->recipe = read_file(o.out + "/recipe.txt");
    if (file_exists(o.out + "/val.bin")) p->val = read_file(o.out + "/val.bin");
    return p;
}
std::string error(const std::string& content, const std::string& name, const Set& set = {}) {
    return error_of([&] { prepare(content, name, set); });
}
const Prepared& wanted() {
    static const auto p = prepare(read_file("data/sample_poems.csv"), "poems.csv");
    return *p;
}
void same(const std::string& what, const std::string& content, const std::string& name, const Set& set = {},
          const std::string& says = "") {
    INFO(what);
    std::unique_ptr<Prepared> got;
    const std::string e = error_of([&] { got = prepare(content, name, set); });
    REQUIRE_MESSAGE(e == "", e);
    CHECK_MESSAGE(got->tokenizer == wanted().tokenizer, got->source());
    CHECK(got->train == wanted().train);
    CHECK(got->val == wanted().val);
    CHECK_MESSAGE(contains(got->source(), says), got->source());
}

// ---------------------------------------------------------------------------------------------
// Tables

std::string csv_field(const std::string& s, char delimiter, bool always) {
    if (!always && s.find_first_of(std::string("\"\n\r") + delimiter) == s.npos) return s;
    return "\"" + replaced(s, "\"", "\"\"") + "\"";
}
std::string csv(char delimiter, size_t text_at, bool always, const std::string& line_end) {
    std::string s;
    auto row = [&](Strings cells) {
        std::rotate(cells.begin() + (ptrdiff_t)text_at, cells.end() - 1, cells.end());
        for (size_t c = 0; c < cells.size(); c++)
            s += (c ? std::string(1, delimiter) : "") +
                 csv_field(replaced(cells[c], "\n", line_end), delimiter, always);
        s += line_end;
    };
    row(built_in().header);
    for (const Strings& r : built_in().rows) row(r);
    return s;
}

TEST_CASE(
    "a CSV may have , ; TAB or | between fields, LF, CR LF or CR, a byte order mark, the text in any "
    "column") {
    for (char delimiter : {',', ';', '\t', '|'})
        for (size_t at : {0, 2, 4})
            for (const char* line_end : {"\n", "\r\n", "\r"})
                for (bool always : {false, true}) {
                    const std::string what = strf("delimiter '%c', column %zu, line end %s, quotes %d",
                                                  delimiter, at, utf8::quote(line_end).c_str(), always);
                    const std::string bom = at ? "" : "\xEF\xBB\xBF";
                    same(what, bom + csv(delimiter, at, always, line_end), always ? "poems" : "poems.csv");
                }
    CHECK(contains(prepare(csv(';', 4, false, "\n"), "x")->source(), "CSV (;)"));
}

TEST_CASE("a CSV cell may be a list as Python, pandas or numpy print it") {
    auto rows = [&](const std::string& open, const std::string& between, bool hemistichs,
                    const std::string& close) {
        return "id,poem\n" + joined("", [&](size_t i) {
                   std::string list = replaced(text_of(i), "\n", "'" + between + "'");
                   if (hemistichs) list = replaced(list, "\t", "'" + between + "'");
                   return strf("%zu,", i) + csv_field(open + "'" + list + "'" + close, ',', true) + "\n";
               });
    };
    same("Python", rows("[", ", ", true, "]"), "poems.csv", {}, "lists of hemistichs");
    same("numpy", rows("[", "\n ", true, "]"), "poems.csv", {}, "lists of hemistichs");
    same("verses", replaced(rows("[", ", ", false, "]"), "\t", "\\t"), "poems.csv", {}, "lists of verses");
    same("numpy, two levels",
         replaced(replaced(rows("[[", "]\n [", false, "]]"), "]\n [", "]\n ["), "\t", "' '"), "poems.csv", {},
         "lists of verses");
    std::string cut = rows("[", " ", true, "]") + "99,\"['\u0628' '\u062A' ... '\u062B']\"\n";
    CHECK(contains(error(cut, "poems.csv"), "numpy left out items"));
    auto got = prepare(cut, "poems.csv", [](prep::Options& o) { o.on_error = "skip"; });
    CHECK(got->report.damaged == 1);
    CHECK(got->train == wanted().train);
}

std::string json_text(const std::string& s, bool ascii) {
    std::string out = "\"";
    utf8::for_each(s, [&](uint32_t c, size_t) {
        if (c == '\n') out += "\\n";
        else if (c == '\t') out += "\\t";
        else if (c == '"' || c == '\\') out += std::string("\\") + (char)c;
        else if (c > 0x7F && ascii) out += strf("\\u%04x", c);
        else utf8::append(out, c);
    });
    return out + "\"";
}
std::string json_list(size_t i, const char* at, bool nested) {
    std::string s = "[";
    for_each_line(text_of(i), [&](std::string_view verse) {
        std::string v = s.size() > 1 ? "," : "";
        if (nested) {
            const size_t tab = verse.find('\t');
            v += "[" + json_text(std::string(verse.substr(0, tab)), false) + ", " +
                 json_text(std::string(verse.substr(tab + 1)), false) + "]";
        } else {
            for (size_t a = 0; a <= verse.size();) {
                const size_t end = std::min(verse.find_first_of(at, a), verse.size());
                v += (a ? "," : "") + json_text(std::string(verse.substr(a, end - a)), true);
                a = end + 1;
            }
        }
        s += v;
    });
    return s + "]";
}

TEST_CASE("JSON may be lines, an array or pretty, with texts, lists of verses, of hemistichs, or of pairs") {
    if (!json::available()) return skip("built without nlohmann-json");
    for (bool ascii : {false, true}) {
        auto object = [&](size_t i) {
            return strf("{\"id\": %zu, \"tags\": [\"a\", \"b\"], \"poem_text\": ", i) +
                   json_text(text_of(i), ascii) + ", \"none\": null}";
        };
        same("lines", joined("\n", object) + "\n", "poems.jsonl", {}, "JSON lines key poem_text");
        same("lines, CR LF, byte order mark", "\xEF\xBB\xBF" + joined("\r\n", object), "poems", {},
             "JSON lines");
        same("array", "[" + joined(",", object) + "]", "poems.json", {}, "JSON array");
        same("pretty", " [\n  " + replaced(joined(",\n  ", object), "{", "{\n   ") + "\n]\n", "p", {},
             "JSON array");
        same(
            "two arrays",
            "[" + object(0) + "]\n[" +
                [&] {
                    std::string s;
                    for (size_t i = 1; i < count(); i++) s += (i > 1 ? "," : "") + object(i);
                    return s;
                }() +
                "]",
            "p");
    }
    auto lists = [&](const char* key, const char* at, bool nested) {
        return joined("\n", [&](size_t i) {
            return "{\"poem title\": \"x\", \"" + std::string(key) + "\": " + json_list(i, at, nested) + "}";
        });
    };
    same("hemistichs", lists("poem verses", "\t", false), "p", {}, "lists of hemistichs");
    same("an unusual key, the only list", lists("abyat", "\t", false), "p", {}, "key abyat");
    same("verses", lists("verses", "\n", false), "p", {}, "lists of verses");
    same("pairs", lists("verses", "", true), "p", {}, "lists of verses");
    same("--list", lists("verses", "\t", false), "p", [](prep::Options& o) { o.list = "hemistichs"; });
    same("texts only", "[" + joined(",\n", [&](size_t i) { return json_text(text_of(i), true); }) + "]",
         "p.json");
    same("lists only", joined("\n", [&](size_t i) { return json_list(i, "\t", false); }), "p", {},
         "JSON lines, lists");
}

TEST_CASE("a JSON value that cannot be read costs itself, and only with --on_error skip") {
    if (!json::available()) return skip("built without nlohmann-json");
    Set skips = [](prep::Options& o) { o.on_error = "skip", o.val_fraction = 0; };
    const std::string lines =
        "{\"poem_text\": \"\u0628\"}\n{\"poem_text\": \"\u062A\n\n{\"poem_text\": \"\u062B\"}\n7\n";
    CHECK(contains(error(lines, "p.jsonl"), "p.jsonl: line 2: is not JSON"));
    auto got = prepare(lines, "p.jsonl", skips);
    CHECK(got->report.damaged == 2);
    CHECK(got->report.train.poems == 2);
    CHECK(contains(got->report.where_damaged[1], "line 5: is neither an object nor a text nor a list"));
    const std::string array =
        "[{\"poem_text\": \"\u0628\"}, {\"poem_text\" \"\u062A\"},\n {\"poem_text\": \"\u062B\"}, "
        "{\"poem_text\": ";
    CHECK(contains(error(array, "p.json"), "line 1: is not JSON"));
    got = prepare(array, "p.json", skips);
    CHECK(got->report.damaged == 2);
    CHECK(contains(got->report.where_damaged[1], "line 2: a value begins here but does not end"));
    CHECK(got->report.train.poems == 2);
    CHECK(contains(error("{\"id\": 1, \"body\": \"\u0628\"}", "p.jsonl"),
                   "has no key 'poem_text'; its keys are 'id', 'body' (--column chooses one)"));
    CHECK(contains(error("{\"poem_text\": \"\u062A\"}\n{\"poem_text\": \"\u0628\xFF\"}\n", "p.jsonl"),
                   "line 2: invalid UTF-8 at byte 37 (0xFF)"));
    CHECK(
        contains(error("{nothing}\n", "p.jsonl"), "has no JSON value that can be read: line 1: is not JSON"));
    std::string deep = "{\"poem_text\": " + std::string(100000, '[') + std::string(100000, ']') + "}";
    CHECK(contains(error(deep + "\n{\"poem_text\": \"\u0628\"}", "p.jsonl"),
                   "nested more than 1,000 levels deep"));
    // Brackets in texts are no levels, in either direction.
    const std::string many(2000, '[');
    CHECK(prepare("{\"poem_text\": \"\\\"" + many + "\u0628\"}", "p.jsonl")->report.train.chars == 1);
    std::string closing = "{\"poem_text\": ";
    for (int i = 0; i < 100000; i++) closing += "[\"]\",";
    closing += "1" + std::string(100000, ']') + "}";
    CHECK(contains(error(closing + "\n{\"poem_text\": \"\u0628\"}", "p.jsonl"),
                   "nested more than 1,000 levels deep"));
}

TEST_CASE("a verse in a row of its own may be a list of its hemistichs") {
    if (!json::available()) return skip("built without nlohmann-json");
    std::string pairs, nested;
    for (size_t i = 0; i < count(); i++)
        for_each_line(text_of(i), [&](std::string_view v) {
            const std::string sadr = json_text(std::string(v.substr(0, v.find('\t'))), false),
                              ajuz = json_text(std::string(v.substr(v.find('\t') + 1)), false);
            pairs += strf("{\"poem\": %zu, \"verse\": [%s, %s]}\n", i, sadr.c_str(), ajuz.c_str());
            nested += strf("{\"poem\": %zu, \"verse\": [[%s, %s]]}\n", i, sadr.c_str(), ajuz.c_str());
        });
    const Set verses = [](prep::Options& o) { o.columns = "verse", o.group = "poem"; };
    same("a list", pairs, "p.jsonl", verses, "keys verse, poems by poem");
    same("a list in a list", nested, "p.jsonl", verses);
    const std::string bad = "{\"poem\": 1, \"verse\": {\"a\": \"\u0628\"}}\n";
    CHECK(contains(error(bad + pairs, "p.jsonl", verses),
                   "line 1: 'verse' is neither a text nor a list of verses"));
    // A row that --except leaves out is not looked at.
    same("--except", replaced(bad, "1", "99") + pairs, "p.jsonl", [&](prep::Options& o) {
        verses(o);
        o.except = "poem=99";
    });
}

TEST_CASE("--columns and --group make poems of rows that are verses") {
    // The verse's number restarts in each poem; its text is in two columns and whole; the poet repeats.
    auto table = [&](bool with_id) {
        std::string s = "n,poet,metre,ajuz,sadr,verse,id\n";
        for (size_t i = 0; i < count(); i++) {
            size_t n = 0;
            for_each_line(text_of(i), [&](std::string_view v) {
                const std::string sadr(v.substr(0, v.find('\t'))), ajuz(v.substr(v.find('\t') + 1));
                s += strf("%zu,x,%zu,%s,%s,%s %s,%s\n", ++n, with_id ? 1 : i, ajuz.c_str(), sadr.c_str(),
                          sadr.c_str(), ajuz.c_str(), with_id ? std::to_string(i + 1).c_str() : "");
            });
        }
        return s;
    };
    auto columns = [](const char* group) {
        return [group](prep::Options& o) { o.columns = "sadr,ajuz", o.group = group; };
    };
    same("auto", table(false), "p.csv", columns("auto"), "columns sadr, ajuz, poems by poet, metre, id");
    same("id", table(true), "p.csv", columns("id"), "poems by id");
    same("several", table(true), "p.csv", columns("poet,id"));
    if (json::available())
        same(
            "JSON",
            replaced(joined("\n",
                            [&](size_t i) {
                                std::string s;
                                for_each_line(text_of(i), [&](std::string_view v) {
                                    s += (s.empty() ? "" : "\n") + strf("{\"poem\": %zu, \"a\": ", i) +
                                         json_text(std::string(v.substr(0, v.find('\t'))), false) +
                                         ", \"b\": " +
                                         json_text(std::string(v.substr(v.find('\t') + 1)), false) + "}";
                                });
                                return s;
                            }),
                     "\r", ""),
            "p.jsonl", [](prep::Options& o) { o.columns = "a,b"; }, "poems by poem");
    CHECK(contains(error(table(true), "p.csv", [](prep::Options& o) { o.columns = "sadr,none"; }),
                   "has no column 'none'"));
    CHECK(contains(
        error(table(true), "p.csv", [](prep::Options& o) { o.columns = "sadr,ajuz", o.group = "none"; }),
        "has no column 'none'"));
    CHECK(contains(
        error("a,b\n\u0628,\u062A\n\u062B,\u062C\n", "p.csv", [](prep::Options& o) { o.columns = "a,b"; }),
        "no column tells one poem's verses from another's"));
    CHECK(contains(error("\u0628\n", "p.txt", [](prep::Options& o) { o.columns = "a,b"; }),
                   "is plain text, but --columns"));
    // A column that keeps its value in one of ten steps tells poems apart; so does any in a file of one
    // verse.
    std::string ten = "n,poem,a,b\n";
    for (int i = 0; i < 11; i++) ten += strf("%d,%d,\u0628,\u062A\n", i, std::min(i, 9));
    auto halves = [](prep::Options& o) { o.columns = "a,b"; };
    CHECK(contains(prepare(ten, "p.csv", halves)->source(), "columns a, b, poems by poem"));
    CHECK(contains(prepare(ten.substr(0, ten.find("1,1")), "p.csv", halves)->source(), "poems by n, poem"));
}

// ---------------------------------------------------------------------------------------------
// Text

std::string text_file(const std::string& hemistichs, const std::string& poems,
                      const std::function<std::string(size_t, const std::string&)>& verse = {}) {
    return joined(poems, [&](size_t i) {
        std::string s;
        size_t n = 0;
        for_each_line(text_of(i), [&](std::string_view v) {
            std::string line = replaced(std::string(v), "\t", hemistichs);
            s += (verse ? verse(++n, line) : line) + "\n";
        });
        return s;
    });
}

TEST_CASE(
    "hemistichs may be separated by a sign or by spaces, which is found where most verses have it once") {
    for (const char* sign : {" *** ", " # ", " = ", " - ", " ... ", "...", " | ", "|", "#", " * * * ", "   ",
                             "  ", " \u2026 ", " \u2013 ", "=", "***", " / ", "\u00A0\u00A0\u00A0"})
        same(strf("hemistichs separated by '%s'", sign), text_file(sign, "\n"), "p.txt", {},
             "hemistichs separated by");
    CHECK(contains(prepare(text_file(" # ", "\n"), "p.txt")->source(), "hemistichs separated by '#'"));
    CHECK(contains(prepare(text_file("    ", "\n"), "p.txt")->source(), "separated by runs of spaces"));
    // in a CSV as well
    std::string s = "poem_text\n" +
                    joined("", [](size_t i) { return "\"" + replaced(text_of(i), "\t", " = ") + "\"\n"; });
    same("CSV", s, "p.csv", {}, "hemistichs separated by '='");
    // A title without a separator, and a verse with two, change nothing for the others.
    auto got =
        prepare(text_file(" # ", "\n") + "\u0628 \u062A\n\u0628 # \u062A # \u062B\n# \u062C \u062D #\n",
                "p.txt", [](prep::Options& o) { o.val_fraction = 0; });
    Tokenizer t = Tokenizer::load(got->dir / "out/tokenizer.bin");
    TokenFile f(got->dir / "out/train.bin");
    std::string all;
    for (size_t i = 0; i < f.size(); i++) all += t.bytes(f[i]);
    CHECK(contains(all, "\u0628 \u062A\n\u0628\t\u062A\t\u062B\n\u062C \u062D"));
    // Signs within words, and signs in a few verses only, separate nothing.
    for (const char* text : {"\u0628-\u062A \u062B\n", "\u0628 \u062A \u062B. \u062C\n",
                             "\u0628 \u062A: \u062B\n", "\u0628  \u062A \u062B\n"})
        CHECK(contains(prepare(text, "p.txt", [](prep::Options& o) { o.keep = "all"; })->source(),
                       "line, 1 poem"));
}

TEST_CASE("--hemistich_separator says what separates hemistichs, and nothing else does") {
    auto text = [](const char* name, const std::string& line) { return Separator(name).apply(line); };
    CHECK(text("#", "a b # c\nd ## e") == "a b\tc\nd\te");
    CHECK(text("##", "a # b ## c") == "a # b\tc");
    CHECK(text("spaces", "a b  c   d") == "a b\tc\td");
    CHECK(text("<>", "a <> b < c") == "a\tb < c");
    CHECK(text("tab", "a # b\tc") == "a # b\tc");
    CHECK(text("..", "a .. b. c \u2026 d") == "a\tb. c \u2026 d");
    CHECK(text("#", "# a # \n#\nb #") == "# a # \n#\nb #");  // letters on both sides are wanted
    CHECK(text("*", "a * * * b") == "a\tb");
    CHECK(text("b", "a bbb") == "a bbb");
    CHECK(text("\u0640", "a\u0640 \u0640 b\u0640\u0640c \u0640\u0640d") ==
          "a\u0640\tb\u0640\u0640c \u0640\u0640d");
    auto got =
        prepare("\u0628 # \u062A | \u062B\n", "p.txt", [](prep::Options& o) { o.hemistich_separator = "|"; });
    CHECK(contains(got->source(), "separated by '|'"));
    CHECK(contains(error("\u0628\n", "p.txt", [](prep::Options& o) { o.hemistich_separator = ""; }),
                   "--hemistich_separator: wanted auto, tab, spaces or a text"));
}

TEST_CASE("long runs of a sign or of spaces that separate nothing take linear time") {
    const clock_t start = clock();
    for (const char* sign : {" ", "=", "-", "\u0640"}) {
        std::string run;
        for (int i = 0; i < 300000; i++) run += sign;
        const std::string name = *sign == ' ' ? "spaces" : sign;
        CHECK(Separator(name).apply(run + "\u0628") == run + "\u0628");
        CHECK(Separator(name).apply("\u0628" + run) == "\u0628" + run);
        const std::string within = "\u0628" + run + "\u062A \u062B";
        if (name == "\u0640") CHECK(Separator(name).apply(within) == within);
    }
    CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 5);
}

TEST_CASE("poems may end at lines of a sign, at <|endoftext|>, and at lines that only look blank") {
    for (const char* line : {"$", "***", "* * *", "<|endoftext|>", "---", "\u00A0", "\u200E", "\u200F \u200F",
                             "\u3000", "=====", "#", "\u2014\u2014"}) {
        same(strf("a line of '%s'", line), text_file("\t", std::string(line) + "\n"), "p.txt");
        same(strf("blank lines around '%s'", line), text_file("\t", "\n" + std::string(line) + "\n\n"),
             "p.txt");
    }
    CHECK(contains(prepare(text_file("\t", "***\n"), "p.txt")->source(), "poems separated by lines of '*'"));
    // Blank lines between stanzas do not end a poem where signs do; one ornament does not where blank lines
    // do.
    same("stanzas", replaced(text_file("\t", "$\n"), "\n", "\n\n"), "p.txt", {}, "lines of '$'");
    same("an ornament", "***\n" + text_file("\t", "\n") + "***\n", "p.txt", {}, "blank lines");
    same("CR", replaced(text_file("\t", "\n"), "\n", "\r"), "p.txt");
    same("CR LF", replaced(text_file("\t", "\n"), "\n", "\r\n"), "p.txt");
    same(
        "--poem_separator", text_file("\t", "END OF POEM\n"), "p.txt",
        [](prep::Options& o) { o.poem_separator = "END OF POEM"; }, "lines of 'END OF POEM'");
    // --layout blank: such lines do not end a poem.
    auto blank = prepare("\u0628\n***\n\u062A\n***\n\u062B\n\n\u062C\n", "p.txt",
                         [](prep::Options& o) { o.layout = "blank", o.val_fraction = 0; });
    CHECK(contains(blank->source(), "poems separated by blank lines"));
    CHECK(blank->report.train.poems == 2);
    // An ellipsis is not a separator.
    CHECK(contains(prepare("\u0628\n...\n\u062A\n", "p.txt")->source(), "one poem per line"));
}

TEST_CASE("verse numbers are removed where most verses have them") {
    auto numbered = [](const char* form) {
        return text_file("\t", "\n",
                         [form](size_t n, const std::string& line) { return strf(form, n) + line; });
    };
    for (const char* form : {"%zu- ", "%zu. ", "(%zu) ", "%zu ", "[%zu]\t", "%zu:\u00A0"}) {
        same(form, numbered(form), "p.txt", {}, "verse numbers removed");
        auto kept = prepare(numbered(form), "p.txt", [](prep::Options& o) { o.keep = "all"; });
        CHECK(kept->train == wanted().train);
    }
    CHECK(verse_number("(\u0661\u0662) \u0628") == 7);
    CHECK(verse_number("12") == 0);
    CHECK(verse_number("\u0628 12") == 0);
    // A number that few verses begin with belongs to the text.
    auto got = prepare("12 \u0628\n\u062A\n\u062B\n", "p.txt", [](prep::Options& o) { o.keep = "all"; });
    CHECK(!contains(got->source(), "numbers"));
}

TEST_CASE("a folder is read file by file, a poem a file, in the order of the names; - is standard input") {
    TempDir dir;
    make_dirs(dir / "poems/b"), make_dirs(dir / "poems/a");
    for (size_t i = 0; i < count(); i++)
        write_file(dir / strf("poems/%s/%02zu.txt", i < 10 ? "a" : "b", i),
                   replaced(text_of(i), "\n", "\n\n"));
    write_file(dir / "poems/.hidden", "\u0628");
    prep::Options o;
    o.files = {dir / "poems"}, o.out = dir / "out";
    prep::Report r = prep::prepare(o);
    CHECK(read_file(dir / "out/train.bin") == wanted().train);
    CHECK(contains(r.sources[0], "24 files"));
    CHECK(contains(r.sources[0], "a poem a file, 24 poems"));

    write_file(dir / "in", text_file(" # ", "\n"));
    const int saved = dup(0), in = open((dir / "in").c_str(), O_RDONLY);
    dup2(in, 0), close(in);
    o.files = {"-"};
    r = prep::prepare(o);
    dup2(saved, 0), close(saved);
    CHECK(read_file(dir / "out/train.bin") == wanted().train);
    CHECK(contains(r.sources[0], "standard input: "));
    make_dirs(dir / "none");
    o.files = {dir / "none"};
    CHECK(contains(error_of([&] { prep::prepare(o); }), "none: is a folder without files"));
}

TEST_CASE("what must be converted first is refused by name, with the command that does it") {
    auto says = [](const std::string& content, const char* what, const char* command) {
        const std::string e = error(content, "my poems", [](prep::Options& o) { o.on_error = "skip"; });
        INFO(e);
        CHECK(contains(e, std::string("my poems: is ") + what));
        CHECK(contains(e, command));
        CHECK(contains(e, "my poems'"));
        CHECK(!contains(e, "\n"));
    };
    says("\x1F\x8B\x08 ...", "compressed with gzip", "gunzip -k '");
    says("PAR1....", "a Parquet file", "read_parquet");
    says("PK\x03\x04.....xl/workbook.xml", "an Excel file", "read_excel");
    says("PK\x03\x04.....a.txt", "a ZIP archive", "unzip '");
    auto encoded = [](int bytes, bool big, const std::string& text) {
        std::string s;
        utf8::for_each(text, [&](uint32_t c, size_t) {
            for (int k = 0; k < bytes; k++) s += (char)(c >> 8 * (big ? bytes - 1 - k : k));
        });
        return s;
    };
    const std::string poem = text_of(0);
    says(encoded(2, false, "\uFEFF" + poem), "UTF-16,", "iconv -f UTF-16 -t UTF-8 '");
    says(encoded(4, false, "\uFEFF" + poem), "UTF-32,", "iconv -f UTF-32 -t UTF-8 '");
    says(encoded(2, false, poem), "UTF-16LE", "iconv -f UTF-16LE");
    says(encoded(2, true, poem), "UTF-16BE", "iconv -f UTF-16BE");
    says(encoded(4, false, poem), "UTF-32LE", "iconv -f UTF-32LE");
    says(encoded(4, true, poem), "UTF-32BE", "iconv -f UTF-32BE");
    says(encoded(2, false, "id,poem_text\n1," + poem), "UTF-16LE", "iconv -f UTF-16LE");
    // "The night and the dawn", in the two 8-bit encodings
    says("\xC7\xE1\xE1\xED\xE1 \xE6\xC7\xE1\xDD\xCC\xD1\n", "CP1256", "iconv -f CP1256");
    says("\xC7\xE4\xE4\xEA\xE4 \xE8\xC7\xE4\xE1\xCC\xD1\n", "ISO-8859-6", "iconv -f ISO-8859-6");
    // A UTF-8 text with a few wrong bytes is one.
    CHECK(contains(error("\u0628\u062A\u062B\xFF\n", "p.txt"), "invalid UTF-8 at byte 6"));
}

// ---------------------------------------------------------------------------------------------
// Damaged rows

TEST_CASE("a damaged row costs itself with --on_error skip, wherever it stands, and not the rows after it") {
    const Set skips = [](prep::Options& o) { o.on_error = "skip"; };
    const std::string good = read_file("data/sample_poems.csv");
    const size_t third = good.find("\n3,") + 1;
    for (const char* bad : {"99,x,y,z,\"\u0628 \u062A\n\u062B \u062C\n",               // never closed
                            "99,x,y,z,\"\u0628 \"\u062A\" \u062B\n\u062C \u062D\"\n",  // quotes not doubled
                            "99,x,y,z,\"\u0628 \\\"\u062A\\\" \u062B\n\u062C\"\n",  // quotes with a backslash
                            "99,\"x\"y,z,\u0628,\u062A\n"}) {
        for (size_t at : {third, good.size(), good.find("\n1,") + 1}) {
            std::string s = good;
            s.insert(at, bad);
            INFO(bad, " at ", at);
            CHECK(contains(error(s, "p.csv"), "--on_error skip drops such rows"));
            auto got = prepare(s, "p.csv", skips);
            CHECK(got->report.damaged == 1);
            CHECK(got->report.ragged == 0);
            CHECK(got->train == wanted().train);
            CHECK(got->val == wanted().val);
        }
    }
    // Between rows with another kind of value than a column usually has, or with none
    for (auto [before, after] : {std::pair<const char*, const char*>{"98,Unknown,-,7,\"\u062B\"\n", ""},
                                 {"98,,,,\"\u062B\"\n", ""},
                                 {"", ",x,y,z,\"\u062B\"\n"}}) {
        std::string s = good;
        s.insert(third, std::string(before) + "99,x,y,z,\"\u0628 \u062A\n" + after);
        INFO(s.substr(third, 40));
        auto got = prepare(s, "p.csv", [](prep::Options& o) { o.on_error = "skip", o.val_fraction = 0; });
        CHECK(got->report.damaged == 1);
        CHECK(got->report.train.poems == count() + 1);
    }
    // A column that was empty so far may have anything.
    CHECK(prepare("id,note,poem_text\n1,,\u0628\n2,,\"\u062A\n3,\u062C,\u062B\n", "p.csv", skips)
              ->report.train.poems == 2);
    // A row with too many fields whose text has lines that look like rows
    std::string s = good;
    s.insert(third, "99,x,y,z,\"\u0628\n\u062A\",more\n");
    auto got = prepare(s, "p.csv");
    CHECK(got->report.ragged == 1);
    CHECK(got->train == wanted().train);
    // One column: a line that continues a damaged poem is not a poem.
    got = prepare("poem_text\n\"\u0628\n\u062A\"\n\"\u062B \"\u062C\" \u062D\n\u062E\"\n\"\u062F\"\n",
                  "p.csv", [](prep::Options& o) { o.on_error = "skip", o.val_fraction = 0; });
    CHECK(got->report.damaged == 1);
    CHECK(got->report.train.poems == 2);
}

TEST_CASE("lines of a damaged poem that look like rows are not read as rows") {
    const Set skips = [](prep::Options& o) { o.on_error = "skip", o.val_fraction = 0; };
    // Two columns, and as many TABs in a verse as in a row
    const std::string
        rows = "id\tpoem_text\n1\t\"\u0627 \u0628\t\u062A\n\u062B \u062C\t\u062D\"\n",
        bad = "2\t\"\u062E \"\u062F\" \u0630\t\u0631\n\u0632 \u0633\t\u0634\n\u0635 \u0636\t\u0637\"\n",
        next = "3\t\"\u0638 \u0639\t\u063A\n\u0641 \u0642\t\u0643\"\n";
    auto got = prepare(rows + bad + next, "p.tsv", skips);
    CHECK(got->report.damaged == 1);
    CHECK(got->report.train.poems == 2);
    CHECK(got->report.train.verses == 4);
    // A quote at a line's end closes the cell early; what is left has a quote without its pair, which is an
    // error.
    const std::string cut = "id,poem_text\n1,\"\u0627 \u0628\"\n\u062A \u062B\"\n2,\"\u062C\"\n3,\u062D\n";
    CHECK(contains(error(cut, "p.csv"), "line 3: 1 fields, the header has 2, and a quote without its pair"));
    CHECK(prepare(cut, "p.csv", skips)->report.damaged == 1);
}

TEST_CASE("a message names the byte where a file is not UTF-8, unless its quotes are doubled, and the line") {
    CHECK(contains(error("id,poem_text\n1,\"\u0628\xFF\"\n", "p.csv"), "invalid UTF-8 at byte 18 (0xFF)"));
    CHECK(contains(error("id,poem_text\n1,\"\"\"\u0628\"\"\xFF\"\n", "p.csv"),
                   "invalid UTF-8 (0xFF), in the poem that begins on line 2"));
    const Set skips = [](prep::Options& o) { o.on_error = "skip"; };
    for (const char* line_end : {"\n", "\r\n"}) {
        const std::string text = "sep=;\nid;poem_text\n1;\u0628\n2;\u062A;x\n3;\u062B\xFF\n";
        auto got = prepare(replaced(text, "\n", line_end), "p.csv", skips);
        CHECK(contains(got->report.where_ragged.at(0), "line 4: 3 fields, the header has 2"));
        CHECK(contains(got->report.where_invalid.at(0), "in the poem that begins on line 5"));
    }
}

TEST_CASE("cells that are neither texts nor lists of verses are damaged rows, not poems") {
    if (!json::available()) return skip("built without nlohmann-json");
    for (const char* value : {"{\"title\": \"\u0628\", \"text\": \"\u062A\"}", "[[[\"\u0628\"]]]"}) {
        const std::string line = std::string("{\"poem_text\": ") + value + "}\n";
        CHECK(contains(error(line, "p.jsonl"), "line 1: 'poem_text' is neither a text nor a list of verses"));
    }
    // Objects in a list are verses.
    auto got = prepare("{\"verses\": [{\"sadr\": \"\u0628 \u062A\", \"ajuz\": \"\u062B\"}]}\n", "p.jsonl");
    CHECK(got->report.train.divided == 1);
    // Python's NaN, which is not JSON
    CHECK(prepare("{\"m\": NaN, \"poem_text\": \"\u0628 NaN\"}\n", "p.jsonl")->report.train.chars == 1);
    // A key that only later values have; a list's blank items, which are nothing
    CHECK(prepare("{\"id\": 1}\n{\"poem_text\": \"\u0628\"}\n", "p.jsonl")->report.train.poems == 1);
    got = prepare("{\"verses\": [\"\u0628\", \"\u062A\", \"\", \"\u062B\", \"\u062C\", null]}\n", "p.jsonl");
    CHECK(got->report.train.verses == 2);
    CHECK(got->report.train.divided == 2);
    // A text that never closes costs its value, not the rest of the array.
    const std::string open =
        "[{\"poem_text\": \"\u0628\"},\n{\"poem_text\": \"\u062A},\n{\"poem_text\": \"\u062B\"},\n"
        "{\"poem_text\": \"\u062C\"}]\n";
    CHECK(contains(error(open, "p.json"), "line 2: "));
    got = prepare(open, "p.json", [](prep::Options& o) { o.on_error = "skip", o.val_fraction = 0; });
    CHECK(got->report.damaged == 1);
    CHECK(got->report.train.poems == 3);
    CHECK(contains(error("[]", "p.json"), "has no JSON value that can be read: it has none"));
    CHECK(contains(error("{\"data\": \"" + std::string(2 * Input::SAMPLE, 'x') + "\"}", "p.json"),
                   "longer than 1 MiB"));
}

TEST_CASE("lists of Python's other kinds are read as lists") {
    for (const char* list : {"['\u0628', '\u062A', None]", "('\u0628', '\u062A')", "[('\u0628', '\u062A')]",
                             "[np.str_('\u0628'), np.str_('\u062A')]", "[{'a': '\u0628', 'b': '\u062A'}]",
                             "[\"\u0628\", nan, '\\u062a']", " ['\u0628' '\u062A'] "}) {
        INFO(list);
        auto got = prepare("id,poem\n1," + csv_field(list, ',', true) + "\n", "p.csv",
                           [](prep::Options& o) { o.list = "hemistichs"; });
        CHECK(got->report.train.chars == 3);
        CHECK(got->report.train.divided == 1);
    }
    for (const char* text : {"[\u0628]", "['\u0628'", "['\u0628'] \u062A", "[]", "[[['\u0628']]]"}) {
        PrintedList list;
        CHECK(!list.parse(text));
    }
}

TEST_CASE("a zero byte is no bracket, space or sign of a name, but a control character") {
    const std::string zero(1, '\0');
    PrintedList list;
    CHECK(!list.parse(zero + "'\u0628'}"));
    CHECK(!list.parse("[" + zero + "'\u0628'}]"));
    CHECK(contains(error("\xC7\xE1" + zero + "\xE1\xED\xE1 \xC7\xE1\n", "p"), "is not text"));
    CHECK(contains(prepare("[" + zero + "\u0628\n", "p")->source(), "text, one poem per line"));
    CHECK(contains(prepare("a,b" + zero + "\n\u0628,\u062A\n", "p")->source(), "text, one poem per line"));
    CHECK(verse_number(zero + "1 \u0628") == 3);
    if (!json::available()) return;
    // It begins a value, which is no JSON.
    const std::string e = error("{\"poem_text\": \"\u0628\"} " + zero + "x\n", "p.json");
    CHECK_MESSAGE(contains(e, "line 1: is not JSON"), e);
}

TEST_CASE(
    "forms that people also use: sep=, written line ends, tatweels between hemistichs, couplets, ornaments") {
    same("Excel's first line", "sep=;\n" + csv(';', 4, true, "\n"), "p.csv");
    auto written = [&](const char* end) {
        return "poem_text\n" +
               joined("", [&](size_t i) { return "\"" + replaced(text_of(i), "\n", end) + "\"\n"; });
    };
    for (const char* end : {"\\n", "\\r\\n", "<br>", "<br />"})
        same(end, written(end), "p.csv", {}, "line ends written");
    same("tatweels", text_file(" \u0640\u0640\u0640 ", "\u0640\u0640\u0640\u0640\n"), "p.txt");
    CHECK(Separator("\u0640").apply("\u0628\u0640\u0640\u062A \u062B") == "\u0628\u0640\u0640\u062A \u062B");
    // Couplets and single verses, by a poem's number
    std::string couplets = "poem_id,a,b\n";
    for (int i = 0; i < 40; i++)
        couplets += strf("%d,\u0628%s,\u062A\n", i / 2 + i % 3 / 2, i % 2 ? "\u062B" : "\u062C");
    auto got = prepare(couplets, "p.csv", [](prep::Options& o) { o.columns = "a,b"; });
    CHECK(contains(got->source(), "poems by poem_id"));
    // Three ornaments among many blank lines
    std::string book;
    for (int i = 0; i < 24; i++)
        book += strf("\u0628 %s\n\u062A\n", i % 2 ? "\u062B" : "\u062C") +
                std::string(i % 8 == 7 ? "***\n" : "\n");
    CHECK(contains(prepare(book, "p.txt")->source(), "separated by blank lines"));
    CHECK(contains(
        prepare("\u0628\n\n\u062A\n", "p.txt", [](prep::Options& o) { o.layout = "file"; })->source(),
        "a poem a file, 1 poem"));
    // A table without a usual column is named as one.
    CHECK(contains(error("id;qasida\n1;\u0628\n2;\u062A\n", "p.txt"),
                   "has no column 'poem_text'; its columns are 'id', 'qasida'"));
    CHECK(contains(error("%PDF-1.4 ...", "p"), "is a PDF file"));
    CHECK(contains(error(std::string("\x01\x02\xC7\xE1\0\xFF", 6), "p"), "is not text"));
    CHECK(Cleaner(Recipe())("\u0628\u200B\u062A\u06DD\u062B") == "\u0628 \u062A \u062B");
}

TEST_CASE("a folder is read as --poem_separator or --layout say, and links do not lead in circles") {
    TempDir dir;
    make_dirs(dir / "poems");
    write_file(dir / "poems/a.txt", "\u0628\n$\n\u062A\n");
    REQUIRE(symlink(".", (dir / "poems/x").c_str()) == 0);
    REQUIRE(symlink(".", (dir / "poems/y").c_str()) == 0);
    prep::Options o;
    o.files = {dir / "poems"}, o.out = dir / "out", o.val_fraction = 0;
    CHECK(prep::prepare(o).train.poems == 1);
    o.poem_separator = "$";
    CHECK(prep::prepare(o).train.poems == 2);
    o.poem_separator = "auto", o.layout = "lines";
    CHECK(prep::prepare(o).train.poems == 2);
}

TEST_CASE("a file whose lines are longer than its sample is read whole; a pipe gives whole pieces, too") {
    // The last row of the first MiB is incomplete, also where a byte order mark takes three bytes of it.
    std::string rows = "\xEF\xBB\xBFid,poem_text\n", poem;
    for (int i = 0; i < 3000; i++) poem += "\u0628\u062A ";
    for (int i = 0; i < 200; i++) rows += strf("%d,%s%d\n", i, poem.c_str(), i);
    TempDir dir;
    write_file(dir / "p.csv", rows);
    Input in(dir / "p.csv");
    CHECK(!in.ended());
    CHECK(in.sample().back() == '\n');
    CHECK(in.sample().size() > Input::SAMPLE / 2);

    int ends[2];
    REQUIRE(pipe(ends) == 0);
    std::thread writer([&] {
        FILE* to = fdopen(ends[1], "w");
        fwrite(rows.data(), 1, rows.size(), to), fclose(to);
    });
    {
        Input from(strf("/dev/fd/%d", ends[0]));
        close(ends[0]);
        const size_t had = from.view().size();
        CHECK(had == Input::SAMPLE - 3);
        CHECK(from.more());
        CHECK(from.view().size() == had + Input::SAMPLE);
        while (from.more()) {}
        CHECK(from.view().size() == rows.size() - 3);
    }
    writer.join();

    if (!json::available()) return;
    std::string array = "[\n";
    for (int i = 0; i < 100; i++)
        array += strf("%s{\"poem_text\": \"%s%c\"}", i ? ", " : "", poem.c_str(), 'a' + i % 26);
    auto got = prepare(array + "]\n", "p.json");
    CHECK(contains(got->source(), "JSON array key poem_text"));
    CHECK(got->report.poems_read == 100);
}

TEST_CASE("a file is read in pieces: rows and lines are the same wherever a piece ends") {
    // Poems of many lengths, so that pieces of 1 MiB end within quotes, line ends and characters
    std::string table = "poem_text,id\r\n", text;
    size_t poems = 0;
    test::Random random(1);
    while (table.size() < 3 * Input::SAMPLE + 500000) {
        std::string poem;
        const size_t verses = 1 + random.below(40);
        for (size_t v = 0; v < verses; v++) {
            poem += v ? "\r\n" : "";
            for (size_t k = 0; k < 20 + random.below(30); k++)
                utf8::append(poem, 0x0628 + (uint32_t)random.below(10));
        }
        table += strf("\"%s\",%zu\r\n", poem.c_str(), poems++), text += poem + "\r\n\r\n";
    }
    auto whole = prepare(table, "p.csv"), lines = prepare(text, "p.txt");
    CHECK(whole->report.train.poems + whole->report.val.poems == poems);
    CHECK(whole->train == lines->train);
    CHECK(whole->val == lines->val);
    if (!json::available()) return;
    std::string json_lines;
    {
        Input in("p", table);
        CsvRows rows(in, ',');
        while (rows.next())
            json_lines +=
                "{\"poem_text\": " + json_text(replaced(rows.cell(0).text(), "\r", ""), true) + "}\n";
    }
    CHECK(prepare(json_lines, "p.jsonl")->train == whole->train);
    CHECK(prepare("[" + replaced(json_lines, "}\n{", "},\n{") + "]", "p.json")->train == whole->train);
}

// ---------------------------------------------------------------------------------------------
// Letters

std::string clean(const std::string& text, const std::function<void(Recipe&)>& set = {}) {
    Recipe r;
    if (set) set(r);
    return Cleaner(r)(text);
}

TEST_CASE("Arabic letters in other forms become the letters that they stand for, and are counted") {
    CHECK(clean("\uFEFB \uFEF7 \uFEF5 \uFEF9") ==
          "\u0644\u0627 \u0644\u0623 \u0644\u0622 \u0644\u0625");                      // lam-alef
    CHECK(clean("\u06CC\u06A9") == "\u064A\u0643");                                    // Farsi
    CHECK(clean("\u0671\u0644") == "\u0627\u0644");                                    // alef wasla
    CHECK(clean("\u0627\u0653 \u0627\u0654 \u0627\u0655") == "\u0622 \u0623 \u0625");  // decomposed
    CHECK(clean("\u0648\u0654 \u064A\u0654 \u0649\u0654 \u06CC\u0654") == "\u0624 \u0626 \u0626 \u0626");
    CHECK(clean("\u0627\u064E\u0654") == "\u0623");                // after a vowel sign
    CHECK(clean("\u0627 \u0654\u0628\u0654") == "\u0627 \u0628");  // not to a space, not to another letter
    CHECK(clean("\uFE8E\uFEDF\uFEE0\uFEF4\uFEDE") == "\u0627\u0644\u0644\u064A\u0644");  // presentation forms
    CHECK(clean("\uFDF2") == "\u0627\u0644\u0644\u0647");
    CHECK(clean("\u0628\uFDFA\u062A") ==
          "\u0628\u0635\u0644\u0649 \u0627\u0644\u0644\u0647 \u0639\u0644\u064A\u0647 "
          "\u0648\u0633\u0644\u0645\u062A");
    CHECK(clean("\u06C1\u06BE\u06D5\u06C3\u06BA\u06A2\u06A7") ==
          "\u0647\u0647\u0647\u0629\u0646\u0641\u0642");
    CHECK(clean("\uFE77\u0628\uFC60\uFCF2") == "\u0628");  // vowel signs with a place of their own
    CHECK(clean("\u0671", [](Recipe& r) { r.map = "none"; }) == "");
    CHECK(clean("\uFEF7\u0627\u0654", [](Recipe& r) { r.normalize_alef = true; }) == "\u0644\u0627\u0627");
    CHECK(clean("\uFEFB\u0627\u0653", [](Recipe& r) { r.keep = "all"; }) == "\uFEFB\u0627\u0653");

    auto letters = [](std::string s, const std::map<std::string, std::string>& as) {
        for (auto& [from, to] : as) s = replaced(s, from, to);
        return s;
    };
    const std::string plain = text_file("\t", "\n");
    std::map<std::string, std::string> farsi = {{"\u064A", "\u06CC"}, {"\u0643", "\u06A9"}},
                                       apart = {{"\u0623", "\u0627\u0654"},
                                                {"\u0622", "\u0627\u0653"},
                                                {"\u0625", "\u0627\u0655"},
                                                {"\u0624", "\u0648\u0654"},
                                                {"\u0626", "\u064A\u0654"}},
                                       shown;
    for (const unicode::Form& f : unicode::ARABIC_FORMS) {
        std::string from;
        utf8::append(from, f.from);
        if (f.from >= 0xFE80 && f.from <= 0xFEF4) shown[f.to] = from;  // the last form of each letter
    }
    same("Farsi", letters(plain, farsi), "p.txt");
    same("decomposed", letters(plain, apart), "p.txt");
    same("presentation forms", letters(plain, shown), "p.txt");
    auto got = prepare(letters(plain, farsi), "p.txt");
    CHECK(got->report.mapped.size() == 2);
    CHECK(got->report.mapped[0x06A9] > 300);
    CHECK(got->report.removed.empty());
}

TEST_CASE(
    "every form in the table is letters U+0621 to U+064A, and no letter is lost without being counted") {
    for (const unicode::Form& f : unicode::ARABIC_FORMS) {
        INFO(utf8::name(f.from));
        CHECK(!is_kept_letter(f.from));
        size_t letters = 0;
        utf8::for_each(f.to, [&](uint32_t c, size_t) {
            CHECK((is_kept_letter(c) || c == ' '));
            letters += is_kept_letter(c);
        });
        CHECK(letters > 0);
        std::string from;
        utf8::append(from, f.from);
        CHECK(clean(from) == f.to);
    }
    // Letters of other sounds stay out, and the report warns of them.
    auto got = prepare("\u0628\u067E\u062A \u06AF\u0686\n", "p.txt");
    CHECK(got->report.removed == std::map<uint32_t, size_t>{{0x067E, 1}, {0x0686, 1}, {0x06AF, 1}});
}

TEST_CASE("a run of removed characters leaves one space between words; vowel signs leave none") {
    CHECK(clean("\u0642\u0641\u0627\u060C\u0646\u0628\u0643\u061B\u0645\u0646...\u0628-!\u062A") ==
          "\u0642\u0641\u0627 \u0646\u0628\u0643 \u0645\u0646 \u0628 \u062A");
    CHECK(clean("\u0642\u0650\u0641\u064E\u0627 \u0646\u064E\u0628\u0652\u0643\u0650") ==
          "\u0642\u0641\u0627 \u0646\u0628\u0643");
    CHECK(clean("\u0628\u200D\u062A\u200C\u062B\u200F\u062C") == "\u0628\u062A\u062B\u062C");
    CHECK(clean("\u0628(12)\n!\u062A") == "\u0628\n\u062A");
    CHECK(clean("\u0628abc\u062A") == "\u0628 \u062A");
    CHECK(clean(".\u0628.") == "\u0628");
}

TEST_CASE("poems that differ only in vowel signs are not divided between train and val") {
    // Each poem twice, with and without signs, as one verse and as several
    std::string s = "poem_text\n";
    test::Random random(3);
    for (int i = 0; i < 60; i++) {
        std::string bare, marked;
        for (int v = 0; v < (i % 2 ? 1 : 3); v++) {
            if (v) bare += '\n', marked += '\n';
            for (int k = 0; k < 12; k++) {
                const uint32_t c = 0x0628 + (uint32_t)random.below(10);
                utf8::append(bare, c), utf8::append(marked, c);
                utf8::append(marked, 0x064B + (uint32_t)random.below(8));
            }
        }
        s += "\"" + bare + "\"\n\"" + marked + "\"\n";
    }
    auto got = prepare(s, "p.csv", [](prep::Options& o) { o.keep = "all", o.val_fraction = 0.4f; });
    CHECK(got->report.families == 60);
    CHECK(got->report.largest_family == 2);
    CHECK(got->report.train.poems + got->report.val.poems == 120);
    CHECK(got->report.val.poems > 20);
    CHECK(got->report.val.poems % 2 == 0);
}

// ---------------------------------------------------------------------------------------------
// The recipe, and tags

TEST_CASE(
    "the recipe is written with the data, and reads back; a wrong one is an error that names the line") {
    auto got = prepare(text_file(" # ", "\n"), "p.txt",
                       [](prep::Options& o) { o.normalize_alef = o.remove_tatweel = true; });
    const std::string path = got->dir / "out/recipe.txt";
    Recipe r = Recipe::load(path);
    CHECK(r.text() == got->recipe);
    CHECK(r.normalize_alef);
    CHECK(r.remove_tatweel);
    CHECK(!r.normalize_ya);
    CHECK(r.hemistich_separator == "#");
    CHECK(r.keep == "letters");
    for (const char* line :
         {"keep=some", "map=x", "normalize_ya=2", "nothing=1", "keep", "keep=", "hemistich_separator=\xFF"}) {
        write_file(path, std::string("keep=all\n") + line + "\n");
        INFO(line);
        CHECK(contains(error_of([&] { Recipe::load(path); }), path + ": "));
    }
    write_file(path, "keep=all\nnothing=1\n");
    CHECK(contains(error_of([&] { Recipe::load(path); }),
                   "line 2: 'nothing=1' is not a setting of the cleaning"));
}

TEST_CASE("a prompt is cleaned as the training text was, and keeps the white space at its end") {
    auto got = prepare(text_file(" # ", "\n"), "p.txt", [](prep::Options& o) { o.normalize_alef = true; });
    const std::string path = got->dir / "out/tokenizer.bin";
    Tokenizer t = Tokenizer::load(path);
    auto text = [&](const char* prompt) {
        return make_prompt(t, recipe_for(path), prompt, t.beginning("")).text;
    };
    CHECK(text("\u0642\u0650\u0641\u0627 \u0646\u064E\u0628\u0643") ==
          "\u0642\u0641\u0627 \u0646\u0628\u0643");
    CHECK(text("\u0623\u06A9") == "\u0627\u0643");
    CHECK(text("\u0628 # \u062A") == "\u0628\t\u062A");
    CHECK(text("  \u0628 ") == "\u0628 ");
    CHECK(text("\u0628\u060C \t") == "\u0628\t");
    CHECK(text("\u0628 \n") == "\u0628\n");
    CHECK(text(" ") == "");
    CHECK(make_prompt(t, recipe_for(path), "\u0628", t.beginning("")).tokens ==
          std::vector<int>{t.eot(), t.encode("\u0628")[0]});
    CHECK(contains(error_of([&] { text("abc"); }),
                   "character 'a' U+0061 at byte 0 is not among those that the poems have"));
    CHECK(contains(error_of([&] { text("\xFF"); }), "invalid UTF-8 at byte 0"));
    unlink((got->dir / "out/recipe.txt").c_str());  // without a recipe, as it is
    CHECK(contains(error_of([&] { text("\u0628\u064E"); }), "U+064E"));
}

TEST_CASE("a prompt may have a tatweel that the poems lost, and end in a separator of hemistichs") {
    auto prompt = [](const char* hemistichs, const char* text, bool remove_tatweel) {
        auto got = prepare(text_file(hemistichs, "\n"), "p.txt",
                           [&](prep::Options& o) { o.remove_tatweel = remove_tatweel; });
        const std::string path = got->dir / "out/tokenizer.bin";
        const Tokenizer t = Tokenizer::load(path);
        return make_prompt(t, recipe_for(path), text, t.beginning("")).text;
    };
    CHECK(prompt("\t", "\u0642\u0641\u0640\u0627", true) == "\u0642\u0641\u0627");
    CHECK(prompt(" # ", "\u0642\u0641\u0627 #", false) == "\u0642\u0641\u0627\t");
    CHECK(prompt(" # ", "\u0642\u0641\u0627 ## ", false) == "\u0642\u0641\u0627\t");
    CHECK(prompt(" # ", "\u0642\u0641\u0627 # \n", false) == "\u0642\u0641\u0627\n");
    CHECK(prompt(" # ", "# ", false) == "");
    CHECK(prompt("   ", "\u0642\u0641\u0627  ", false) == "\u0642\u0641\u0627\t");
    CHECK(prompt("   ", "\u0642\u0641\u0627 ", false) == "\u0642\u0641\u0627 ");
}

TEST_CASE("a prompt or tag that a program cannot take is a usage error that names its flag") {
    TempDir dir;
    const Tokenizer t = Tokenizer::characters("\u0628\u062A", {"<|m=x|>", "<|m=other|>"});
    auto says = [&](const char* text, const char* tags, size_t T) {
        try {
            prompt_of_flags(t, {}, text, "--some_tags", tags, T);
        } catch (const UsageError& e) {
            return std::string(e.what());
        }
        return std::string();
    };
    CHECK(says("\u0628\u062A", "m=x", 4) == "");
    CHECK(
        contains(says("\u0628\u062A", "m=x", 3),
                 "--prompt has 4 tokens with end-of-text and tags, the context takes 3: wanted at most 1 of "
                 "text, found 2"));
    CHECK(contains(says("\u0628\u062A", "m=x", 1), "wanted at most 0 of text, found 2"));
    CHECK(contains(says("a", "", 9), "--prompt: character 'a'"));
    CHECK(contains(says("", "m=y", 9), "--some_tags: m has no value 'y'"));
}

TEST_CASE(
    "tags are tokens between end-of-text and the poem; rare values are 'other'; their loss is not counted") {
    std::string s = "poem_text,metre,poet\n";
    for (int i = 0; i < 12; i++) {
        std::string text;
        for (int k = 0; k <= i; k++) text += "\u0628 \u062A";
        s += text +
             (i < 6    ? ",kamil,"
              : i < 9  ? ",tawil,"
              : i == 9 ? ",,"
                       : ",rare,") +
             (i % 2 ? "a  b\n" : "c,d\n");
    }
    s = replaced(s, "c,d", "\"c,d\"");
    auto got = prepare(s, "p.csv",
                       [](prep::Options& o) { o.tags = "metre,poet", o.tag_min = 3, o.val_fraction = 0; });
    const std::string out = got->dir / "out";
    Tokenizer t = Tokenizer::load(out + "/tokenizer.bin");
    CHECK(t.tags() == 6);
    CHECK(t.tag_columns() == Strings{"metre", "poet"});
    CHECK(t.tag_values("metre") == Strings{"kamil", "tawil", "other"});
    CHECK(t.tag_values("poet") == Strings{"a b", "c,d", "other"});
    TokenFile f(out + "/train.bin");
    size_t poem = 0, tags = 0;
    for (size_t i = 0; i < f.size(); i++) {
        tags += f[i] >= t.first_tag();
        if (f[i] != t.eot()) continue;
        const char* metre = poem < 6 ? "kamil" : poem < 9 ? "tawil" : "other";
        CHECK(f[i + 1] == t.tag("metre", metre));
        CHECK(f[i + 2] == t.tag("poet", poem % 2 ? "a b" : "c,d"));
        poem++;
    }
    CHECK(poem == 12);
    CHECK(tags == 24);
    CHECK(t.chars(t.first_tag()) == 0);

    // Windows that begin within a poem have its tags before them; no tag is a target, each other token once.
    const size_t T = 9;
    const TagTokens tag_tokens{t.first_tag(), t.eot(), 2};
    TrainLoader loader(f, (int)T, 1, true, 0, 1, tag_tokens);
    auto check_window = [&](const int* x, const int* y) {
        size_t counted = 0;
        const bool within = x[0] != t.eot();
        if (within) CHECK((x[0] >= t.first_tag() && x[1] >= t.first_tag() && y[0] == -1 && y[1] == -1));
        for (size_t k = 0; k < T; k++) {
            counted += y[k] >= 0;
            CHECK(y[k] < t.first_tag());
            if (y[k] >= 0 && k + 1 < T) CHECK(y[k] == x[k + 1]);
            if (y[k] == -1 && k + 2 < T && k >= 2) CHECK(x[k + 1] >= t.first_tag());
        }
        return counted;
    };
    for (int step = 0; step < 40; step++) {
        const uint64_t n = loader.targets(3);
        std::vector<int> x(3 * T), y(3 * T);
        loader.next(3, x.data(), y.data());
        size_t counted = 0;
        for (size_t w = 0; w < 3; w++) counted += check_window(&x[w * T], &y[w * T]);
        CHECK(counted == n);
    }
    // The tags before a window are those of its poem: the text tells which poem it is from.
    EvalLoader eval(f, 2, (int)T, tag_tokens);
    std::vector<int> x(2 * T), y(2 * T), targets;
    size_t position = 0;
    for (size_t i = 0; i < eval.batches(); i++) {
        eval.get(i, x.data(), y.data());
        for (size_t w = 0; w < 2 && position + 1 < f.size(); w++, position += T - 2) {
            size_t start = position;
            while (f[start] != t.eot()) start--;
            if (start < position) CHECK((x[w * T] == f[start + 1] && x[w * T + 1] == f[start + 2]));
            CHECK(x[w * T + (start < position ? 2 : 0)] == f[position]);
        }
        for (int target : y)
            if (target >= 0) targets.push_back(target);
    }
    std::vector<int> all;
    for (size_t i = 1; i < f.size(); i++)
        if (f[i] < t.first_tag()) all.push_back(f[i]);
    CHECK(targets == all);
    CHECK(contains(error_of([&] { TrainLoader small(f, 2, 1, true, 0, 1, tag_tokens); }),
                   "2 tags are before each"));

    CHECK(t.beginning("") == std::vector<int>{t.eot(), t.tag("metre", "other"), t.tag("poet", "other")});
    CHECK(t.beginning("poet=a b,metre=tawil") ==
          std::vector<int>{t.eot(), t.tag("metre", "tawil"), t.tag("poet", "a b")});
    CHECK(contains(error_of([&] { t.beginning("metre=x"); }),
                   "metre has no value 'x'; it has kamil, tawil, other"));
    CHECK(contains(error_of([&] { t.beginning("era=x"); }),
                   "'era=x' is not a tag, wanted COLUMN=VALUE with a column among"));
    CHECK(contains(error_of([&] { Tokenizer::characters("a").beginning("metre=x"); }), "knows no tags"));

    // Other poems with the same tokenizer: values that it lacks, and poems without tags, are "other".
    auto again = [&](const char* tags) {
        return prepare("poem_text,metre,poet\n\u0628,kamil,x\n", "p.csv", [&](prep::Options& o) {
            o.tags = tags, o.tokenizer = out + "/tokenizer.bin", o.val_fraction = 0;
        });
    };
    auto begins = [&](const Prepared& p) {
        TokenFile tokens(p.dir / "out/train.bin");
        return std::vector<int>{tokens[1], tokens[2]};
    };
    CHECK(begins(*again("metre,poet")) == std::vector<int>{t.tag("metre", "kamil"), t.tag("poet", "other")});
    CHECK(begins(*again("")) == std::vector<int>{t.tag("metre", "other"), t.tag("poet", "other")});
    CHECK(contains(error_of([&] { again("poet"); }), "its poems begin with the tags metre, poet"));
    CHECK(contains(error(s, "p.csv", [](prep::Options& o) { o.tags = "era"; }), "has no column 'era'"));
    CHECK(contains(error("\u0628\n", "p.txt", [](prep::Options& o) { o.tags = "era"; }),
                   "is plain text, but --tags"));
    prep::Options plain;
    CHECK(contains(error_of([&] {
                       prepare("poem_text,metre\n\u0628,x\n", "p.csv", [&](prep::Options& o) {
                           o.tags = "metre", o.tokenizer = wanted().dir / "out/tokenizer.bin";
                       });
                   }),
                   "has no tags of 'metre' (--tags)"));
}

TEST_CASE("a tokenizer file with tags reads back; damaged tags are refused") {
    TempDir dir;
    Tokenizer t = Tokenizer::characters("\u0628a", {"<|m=x|>", "<|m=other|>"});
    t.save(dir / "t.bin");
    const std::string good = read_file(dir / "t.bin");
    Tokenizer u = Tokenizer::load(dir / "t.bin");
    CHECK(u.tags() == 2);
    CHECK(u.eot() == 2);
    CHECK(u.encode("a\u0628") == std::vector<int>{0, 1});
    auto says = [&](const std::string& content) {
        write_file(dir / "t.bin", content);
        return error_of([&] { Tokenizer::load(dir / "t.bin"); });
    };
    CHECK(contains(says(with_header(good, 6, 3)), "number of tags is 3, wanted 0 to 2"));
    CHECK(contains(says(with_header(good, 6, -1)), "number of tags is -1"));
    CHECK(contains(says(with_header(good, 6, 1)), "token 3 of a character tokenizer has 7 bytes"));
    CHECK(contains(says(replaced(good, "<|m=x|>", "<|mxx|>")),
                   "token 3 is '<|mxx|>', wanted a tag <|COLUMN=VALUE|>"));
    CHECK(contains(says(replaced(good, "<|m=x|>", "x|m=x|>")), "wanted a tag"));
    CHECK(contains(says(replaced(replaced(good, "\x0B<|m=other|>", "\x07<|m=x|>"), "<|m=y|>", "")),
                   "as an earlier one is"));
    // The tags of a column are together, and one is "other".
    auto of = [](const Strings& tags) { return error_of([&] { Tokenizer::characters("\u0628", tags); }); };
    CHECK(of({"<|m=other|>", "<|m=x|>", "<|p=other|>"}) == "");
    CHECK(contains(of({"<|m=x|>", "<|p=other|>", "<|m=other|>"}),
                   "token 4 is '<|m=other|>', wanted it next to the other tags of its column"));
    CHECK(contains(of({"<|m=other|>", "<|p=x|>"}), "has tags of 'p', but not '<|p=other|>'"));
    // A tag of more than 255 bytes is named, and the file.
    const std::string column(250, 'c');
    CHECK(
        contains(error_of([&] { Tokenizer::characters("a", {"<|" + column + "=other|>"}).save(dir / "t"); }),
                 dir / "t" + ": token 2 '<|cccc"));
}

TEST_CASE("a hundred thousand tags are read and looked up in linear time") {
    Strings tags;
    for (int i = 0; i < 100000; i++) tags.push_back(Tokenizer::tag_text("title", std::to_string(i)));
    tags.push_back("<|title=other|>");
    const clock_t start = clock();
    const Tokenizer t = Tokenizer::characters("\u0628", tags);
    size_t found = 0;
    for (int i = 0; i < 100000; i++) found += t.tag("title", std::to_string(i)) == 2 + i;
    CHECK(found == 100000);
    CHECK(t.tag("title=7") == 9);
    CHECK(t.tag("title", "none") == -1);
    CHECK((double)(clock() - start) / CLOCKS_PER_SEC < 5);
}

}  // namespace
