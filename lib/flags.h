// flags.h - command lines that explain themselves.
//
//     Flags f("sample_gpt2", "writes poems from a checkpoint");
//     f.section("Sampling");
//     f.add("temperature", "", &opt.temperature, "X", "below 1 is safer, above 1 is wilder");
//     f.parse(argc, argv);
//
// Accepts --name value, --name=value, --dashes-or_underscores, and a short alias (-b 4). A bool takes
// no value or 0/1. --help prints the table with the defaults. Numbers are checked to their last character.
#pragma once

#include <algorithm>
#include <functional>

#include "lib/io.h"

class Flags {
  public:
    Flags(const char* program, const char* about) : program_(program), about_(about) {}

    void section(const char* title) { rows_.push_back({title, "", "", "", "", nullptr, nullptr, false, false}); }
    void add(const char* name, const char* alias, std::string* v, const char* arg, const char* help) {
        row(name, alias, arg, help, [v] { return *v; }, [v](const std::string& s, const char*) { *v = s; });
    }
    void add(const char* name, const char* alias, int* v, const char* arg, const char* help) {
        row(name, alias, arg, help, [v] { return std::to_string(*v); }, [v](const std::string& s, const char* flag) {
            *v = (int)integer(s, flag, INT32_MIN, INT32_MAX);
        });
    }
    void add(const char* name, const char* alias, uint64_t* v, const char* arg, const char* help) {
        row(name, alias, arg, help, [v] { return std::to_string(*v); }, [v](const std::string& s, const char* flag) {
            *v = (uint64_t)integer(s, flag, 0, INT64_MAX);
        });
    }
    void add(const char* name, const char* alias, float* v, const char* arg, const char* help) {
        row(name, alias, arg, help, [v] { return shortest(*v); }, [v](const std::string& s, const char* flag) {
            char* end;
            *v = strtof(s.c_str(), &end);
            if (s.empty() || *end || !(*v - *v == 0)) throw UsageError(strf("%s: '%s' is not a number", flag, s.c_str()));
        });
    }
    void add(const char* name, const char* alias, bool* v, const char* help) {
        row(name, alias, "", help, [v] { return std::string(*v ? "1" : ""); }, [v](const std::string& s, const char* flag) {
            if (s != "0" && s != "1") throw UsageError(strf("%s: '%s' is neither 0 nor 1", flag, s.c_str()));
            *v = s == "1";
        });
        rows_.back().is_bool = true;
    }
    // Words that carry no flag (file names); without this they are an error.
    void positional(std::vector<std::string>* v, const char* usage) { pos_ = v, pos_usage_ = usage; }
    void epilogue(const std::string& text) { epilogue_ = text; }

    // Throws UsageError. Prints the help and exits 0 on --help.
    void parse(int argc, char** argv) {
        for (int i = 1; i < argc; i++) {
            std::string a = argv[i], value;
            if (a == "--help" || a == "-h" || a == "-?") {
                help(stdout);
                exit(0);
            }
            if (a.size() < 2 || a[0] != '-') {
                if (!pos_) throw UsageError(strf("'%s' is not a flag; --help lists them", a.c_str()));
                pos_->push_back(a);
                continue;
            }
            size_t eq = a.compare(0, 2, "--") == 0 ? a.find('=') : std::string::npos;
            bool has_value = eq != std::string::npos;
            if (has_value) value = a.substr(eq + 1), a = a.substr(0, eq);
            Row* r = find(a);
            if (!r) throw UsageError(strf("%s is not a flag of this program%s; --help lists them", a.c_str(), nearest(a).c_str()));
            if (!has_value) {
                bool next_is_01 = i + 1 < argc && (!strcmp(argv[i + 1], "0") || !strcmp(argv[i + 1], "1"));
                if (r->is_bool && !next_is_01) value = "1";
                else if (i + 1 < argc) value = argv[++i];
                else throw UsageError(strf("%s needs a value: %s %s", a.c_str(), a.c_str(), r->arg.c_str()));
            }
            r->set(value, a.c_str());
            r->given = true;
        }
    }
    // Was the flag on the command line (or in restore())?
    bool given(const char* name) const {
        for (const Row& r : rows_)
            if (r.set && r.name == name) return r.given;
        return false;
    }
    // All values as lines name=value, for a file; restore() sets the flags that the command line did not give.
    std::string values() const {
        std::string s;
        for (const Row& r : rows_)
            if (r.set) s += r.name + "=" + r.get() + "\n";
        return s;
    }
    void restore(const std::string& values, const std::vector<std::string>& except) {
        for (size_t i = 0, end; i < values.size() && (end = values.find('\n', i)) != std::string::npos; i = end + 1) {
            std::string line = values.substr(i, end - i);
            size_t eq = line.find('=');
            Row* r = eq == std::string::npos ? nullptr : find("--" + line.substr(0, eq));
            if (!r || r->given || std::find(except.begin(), except.end(), r->name) != except.end()) continue;
            std::string v = line.substr(eq + 1);
            r->set(r->is_bool && v.empty() ? "0" : v, r->name.c_str());
            r->given = true;
        }
    }

    void help(FILE* f) const {
        fprintf(f, "%s - %s\n\nusage: ./%s [flags]%s%s\n", program_, about_, program_, pos_ ? " " : "", pos_ ? pos_usage_ : "");
        for (const Row& r : rows_) {
            if (!r.set) {
                fprintf(f, "\n%s\n", r.name.c_str());
                continue;
            }
            std::string left = "  --" + r.name + (r.arg.empty() ? "" : " " + r.arg);
            if (!r.alias.empty()) left += ", -" + r.alias;
            if (!r.fallback.empty()) fprintf(f, "%-36s %s [%s]\n", left.c_str(), r.help.c_str(), r.fallback.c_str());
            else fprintf(f, "%-36s %s\n", left.c_str(), r.help.c_str());
        }
        if (!epilogue_.empty()) fprintf(f, "\n%s", epilogue_.c_str());
    }

  private:
    struct Row {
        std::string name, alias, arg, help, fallback;
        std::function<std::string()> get;
        std::function<void(const std::string&, const char*)> set;
        bool is_bool, given;
    };
    void row(const char* name, const char* alias, const char* arg, const char* help, std::function<std::string()> get,
             std::function<void(const std::string&, const char*)> set) {
        rows_.push_back({name, alias, arg, help, get(), get, std::move(set), false, false});
    }
    static int64_t integer(const std::string& s, const char* flag, int64_t lo, int64_t hi) {
        char* end;
        errno = 0;
        long long n = strtoll(s.c_str(), &end, 10);
        if (s.empty() || *end) throw UsageError(strf("%s: '%s' is not a whole number", flag, s.c_str()));
        if (errno || n < lo || n > hi)
            throw UsageError(strf("%s: %s is out of range, wanted %lld to %lld", flag, s.c_str(), (long long)lo, (long long)hi));
        return n;
    }
    static std::string plain(std::string a) {
        for (char& c : a)
            if (c == '-') c = '_';
        return a;
    }
    Row* find(const std::string& a) {
        bool is_long = a.compare(0, 2, "--") == 0;
        for (Row& r : rows_)
            if (r.set && (is_long ? plain(r.name) == plain(a.substr(2)) : !r.alias.empty() && r.alias == a.substr(1))) return &r;
        return nullptr;
    }
    // The closest long flag by edit distance, as " (did you mean --x?)".
    std::string nearest(const std::string& a) const {
        std::string want = plain(a.substr(a.compare(0, 2, "--") == 0 ? 2 : 1)), best;
        size_t best_d = 3;
        for (const Row& r : rows_) {
            if (!r.set) continue;
            const std::string name = plain(r.name);
            std::vector<size_t> d(name.size() + 1);
            for (size_t j = 0; j < d.size(); j++) d[j] = j;
            for (size_t i = 1; i <= want.size(); i++) {
                size_t diag = d[0];
                d[0] = i;
                for (size_t j = 1; j < d.size(); j++) {
                    size_t sub = diag + (want[i - 1] != name[j - 1]);
                    diag = d[j];
                    d[j] = std::min(sub, std::min(d[j], d[j - 1]) + 1);
                }
            }
            if (d.back() < best_d) best_d = d.back(), best = r.name;
        }
        return best.empty() ? "" : " (did you mean --" + best + "?)";
    }

    const char *program_, *about_, *pos_usage_ = "";
    std::string epilogue_;
    std::vector<std::string>* pos_ = nullptr;
    std::vector<Row> rows_;
};
