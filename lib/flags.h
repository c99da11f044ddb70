// flags.h - command lines that explain themselves. All that is to be said of a flag is said where it is
// added:
//
//     Flags f("sample_gpt2", "writes poems from a checkpoint");
//     f.section("Sampling");
//     f.add("temperature", "", &o.temperature, "X", "below 1 is safer, above 1 is wilder").range(0, 1e6);
//     f.add("dtype", "", &o.dtype, "NAME", "how weights are kept").choices({"fp32", "bf16"});
//     f.parse(argc, argv);
//
// That is its name, a short alias, the variable (whose value is the default), the name of its argument, the
// help text; then, where there are any, the limits, a value that means "not given", the choices, and what
// becomes of it when a run is resumed.
//
// Accepts --name value, --name=value, --dashes-or_underscores, and the alias (-b 4). A bool takes no value or
// 0/1.
// --help prints the table with defaults, limits and choices; --version one line. A mistake is a UsageError of
// one line that names the flag, what was found and what was wanted.
#pragma once

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>

#include "lib/io.h"
#include "lib/version.h"

class Flags {
  public:
    // What --resume does with a flag.
    //     KEPT      the run's value, unless the command line gives another
    //     FIXED     the run's value; the command line may only repeat it
    //     NOT_KEPT  belongs to one command: the run's value is ignored
    enum OnResume { KEPT, FIXED, NOT_KEPT };

    class Flag {
      public:
        // The smallest and the largest value; INFINITY: no more than the type holds.
        Flag& range(double lo, double hi) { return lo_ = lo, hi_ = hi, has_range_ = true, *this; }
        // A value outside the range that means "not given": the program then decides, as the help text says.
        Flag& unset(double v) { return unset_ = v, has_unset_ = true, *this; }
        Flag& choices(std::vector<std::string> names) { return choices_ = std::move(names), *this; }
        Flag& on_resume(OnResume r) { return on_resume_ = r, *this; }

      private:
        friend class Flags;
        std::string name_, alias_, arg_, help_, fallback_;
        std::function<std::string()> get_;
        std::function<double(const std::string&, const char*)> set_;  // returns the number, for the range
        bool is_section_ = false, is_bool_ = false, is_float_ = false, given_ = false, typed_ = false,
             has_range_ = false, has_unset_ = false;
        double lo_ = 0, hi_ = 0, unset_ = 0;
        std::vector<std::string> choices_;
        OnResume on_resume_ = KEPT;

        // Takes a value from the command line or a file; `flag` is how it was written there.
        void take(const std::string& value, const char* flag) {
            if (!choices_.empty() && !(value.empty() && fallback_.empty()) &&
                std::find(choices_.begin(), choices_.end(), value) == choices_.end())
                throw UsageError(
                    strf("%s: '%s' is unknown; known are %s", flag, value.c_str(), list().c_str()));
            double v = set_(value, flag);
            if (has_range_ && !(has_unset_ && v == unset_) && !in_range(v))
                throw UsageError(strf("%s is %s, wanted %s", flag, value.c_str(), limits().c_str()));
        }
        // Does this value mean "not given"?
        bool is_unset(const std::string& value) const {
            return value.empty() || (has_unset_ && strtod(value.c_str(), nullptr) == unset_);
        }
        // A float is compared with the limits as floats: 0.99f is more than the double 0.99.
        bool in_range(double v) const {
            return is_float_ ? (float)v >= (float)lo_ && (float)v <= (float)hi_ : v >= lo_ && v <= hi_;
        }
        std::string limits() const {
            return hi_ == INFINITY ? strf("at least %.10g", lo_) : strf("%.10g to %.10g", lo_, hi_);
        }
        std::string list() const {
            std::string s;
            for (const std::string& c : choices_) s += (s.empty() ? "" : ", ") + c;
            return s;
        }
        // "[0.8; 0 to 1000000]", "[cosine; constant, cosine, linear, wsd]" or "".
        std::string bracket() const {
            std::string s = fallback_;
            std::string more = has_range_ ? limits() : list();
            if (!more.empty()) s += (s.empty() ? "" : "; ") + more;
            return s.empty() ? "" : "[" + s + "]";
        }
    };

    Flags(const char* program, const char* about)
        : program_(program), about_(about), version_(version_text(program)) {}
    Flags(const Flags&) = delete;  // the lambdas below point to the caller's variables
    Flags& operator=(const Flags&) = delete;

    void section(const char* title) {
        flags_.emplace_back();
        flags_.back().name_ = title, flags_.back().is_section_ = true;
    }
    Flag& add(const char* name, const char* alias, std::string* v, const char* arg, const char* help) {
        return flag(
            name, alias, arg, help, [v] { return *v; },
            [v](const std::string& s, const char*) { return *v = s, 0.0; });
    }
    Flag& add(const char* name, const char* alias, int* v, const char* arg, const char* help) {
        return flag(
            name, alias, arg, help, [v] { return std::to_string(*v); },
            [v](const std::string& s, const char* flag) {
                return (double)(*v = (int)integer(s, flag, INT32_MIN, INT32_MAX));
            });
    }
    Flag& add(const char* name, const char* alias, uint64_t* v, const char* arg, const char* help) {
        return flag(
            name, alias, arg, help, [v] { return std::to_string(*v); },
            [v](const std::string& s, const char* flag) {
                return (double)(*v = (uint64_t)integer(s, flag, 0, INT64_MAX));
            });
    }
    Flag& add(const char* name, const char* alias, float* v, const char* arg, const char* help) {
        Flag& f = flag(
            name, alias, arg, help, [v] { return shortest(*v); },
            [v](const std::string& s, const char* flag) {
                char* end;
                *v = strtof(s.c_str(), &end);
                if (s.empty() || *end || !(*v - *v == 0))
                    throw UsageError(strf("%s: '%s' is not a number", flag, s.c_str()));
                return (double)*v;
            });
        f.is_float_ = true;
        return f;
    }
    Flag& add(const char* name, const char* alias, bool* v, const char* help) {
        Flag& f = flag(
            name, alias, "", help, [v] { return std::string(*v ? "1" : ""); },
            [v](const std::string& s, const char* flag) {
                if (s != "0" && s != "1")
                    throw UsageError(strf("%s: '%s' is neither 0 nor 1", flag, s.c_str()));
                return (double)(*v = s == "1");
            });
        f.is_bool_ = true;
        return f;
    }
    // Words that carry no flag (file names); without this they are an error.
    void positional(std::vector<std::string>* v, const char* usage) { pos_ = v, pos_usage_ = usage; }
    void epilogue(const std::string& text) { epilogue_ = text; }
    // What --version prints, in place of version_text(program).
    void version(const std::string& text) { version_ = text; }

    // Throws UsageError. Prints the help or the version and exits 0 on --help or --version.
    void parse(int argc, char** argv) {
        for (int i = 1; i < argc; i++) {
            std::string a = argv[i], value;
            const bool help_asked = asks_help(a);
            if (help_asked) help(stdout);
            if (a == "--version") printf("%s\n", version_.c_str());
            if (help_asked || a == "--version") {
                if (fflush(stdout) && errno != EPIPE)
                    fail("standard output: cannot write: %s", strerror(errno));
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
            Flag* f = find(a);
            if (!f)
                throw UsageError(strf("%s is not a flag of this program%s; --help lists them", a.c_str(),
                                      nearest(a).c_str()));
            if (!has_value) {
                bool next_is_01 = i + 1 < argc && (!strcmp(argv[i + 1], "0") || !strcmp(argv[i + 1], "1"));
                if (f->is_bool_ && !next_is_01) value = "1";
                else if (i + 1 < argc && is_flag(argv[i + 1]))
                    throw UsageError(strf("%s needs a value, and %s is a flag; if it is meant: --%s=%s",
                                          a.c_str(), argv[i + 1], f->name_.c_str(), argv[i + 1]));
                else if (i + 1 < argc) value = argv[++i];
                else throw UsageError(strf("%s needs a value: %s %s", a.c_str(), a.c_str(), f->arg_.c_str()));
            }
            f->take(value, a.c_str());
            f->given_ = f->typed_ = true;
        }
    }
    // Was the flag on the command line, or in restore()?
    bool given(const char* name) const {
        for (const Flag& f : flags_)
            if (!f.is_section_ && f.name_ == name) return f.given_;
        return false;
    }
    // Was it on this command line?
    bool on_command_line(const char* name) const {
        for (const Flag& f : flags_)
            if (!f.is_section_ && f.name_ == name) return f.typed_;
        return false;
    }
    // Makes a flag one that was not given.
    void forget(const char* name) {
        for (Flag& f : flags_)
            if (!f.is_section_ && f.name_ == name) f.given_ = f.typed_ = false;
    }
    // The values of a run, for a file: lines name=value. A line break within a value is kept as character 31,
    // "unit separator".
    std::string values() const {
        std::string s;
        for (const Flag& f : flags_) {
            if (f.is_section_) continue;
            std::string v = f.is_bool_ && f.get_().empty() ? "0" : f.get_();
            std::replace(v.begin(), v.end(), '\n', '\x1f');
            s += f.name_ + "=" + v + "\n";
        }
        return s;
    }
    // Sets the flags that this command line did not give to a resumed run's values(). Returns those that it
    // did give and that differ: "--max_steps 20 (the run had 10)". Throws UsageError where that may not be,
    // and Error where a value of the run is impossible.
    std::vector<std::string> restore(const std::string& values) {
        std::vector<std::string> changed;
        for (size_t i = 0, end; i < values.size() && (end = values.find('\n', i)) != std::string::npos;
             i = end + 1) {
            std::string line = values.substr(i, end - i);
            size_t eq = line.find('=');
            Flag* f = eq == std::string::npos ? nullptr : find("--" + line.substr(0, eq));
            if (!f || f->on_resume_ == NOT_KEPT) continue;
            std::string v = line.substr(eq + 1);
            if (f->is_bool_ && v.empty()) v = "0";  // as earlier versions wrote it
            std::replace(v.begin(), v.end(), '\x1f', '\n');
            if (!f->typed_) {
                try {
                    f->take(v, ("--" + f->name_).c_str());
                } catch (const UsageError& e) {  // it is not this command line's
                    fail("settings: %s", e.what());
                }
                f->given_ = true;
                continue;
            }
            std::string now = f->is_bool_ && f->get_().empty() ? "0" : f->get_();
            if (now == v || (f->on_resume_ == FIXED && f->is_unset(v))) continue;
            if (f->on_resume_ == FIXED)
                throw UsageError(strf("--%s is %s, the run has %s; it cannot change when a run is resumed",
                                      f->name_.c_str(), now.c_str(), v.c_str()));
            changed.push_back(strf("--%s %s (the run had %s)", f->name_.c_str(), now.c_str(),
                                   v.empty() ? "none" : v.c_str()));
        }
        return changed;
    }

    void help(FILE* to) const {
        fprintf(to, "%s - %s\n\nusage: ./%s [flags]%s%s\n", program_, about_, program_, pos_ ? " " : "",
                pos_ ? pos_usage_ : "");
        for (const Flag& f : flags_) {
            if (f.is_section_) {
                fprintf(to, "\n%s\n", f.name_.c_str());
                continue;
            }
            std::string left = "  --" + f.name_ + (f.arg_.empty() ? "" : " " + f.arg_), more = f.bracket();
            if (!f.alias_.empty()) left += ", -" + f.alias_;
            fprintf(to, "%-36s %s%s%s\n", left.c_str(), f.help_.c_str(), more.empty() ? "" : " ",
                    more.c_str());
        }
        fprintf(to, "\n--version prints the version, the commit, and what the program was built for.\n");
        if (!epilogue_.empty()) fprintf(to, "\n%s", epilogue_.c_str());
    }

  private:
    Flag& flag(const char* name, const char* alias, const char* arg, const char* help,
               std::function<std::string()> get, std::function<double(const std::string&, const char*)> set) {
        flags_.emplace_back();
        Flag& f = flags_.back();
        f.name_ = name, f.alias_ = alias, f.arg_ = arg, f.help_ = help, f.fallback_ = get();
        f.get_ = std::move(get), f.set_ = std::move(set);
        return f;
    }
    static int64_t integer(const std::string& s, const char* flag, int64_t lo, int64_t hi) {
        char* end;
        errno = 0;
        long long n = strtoll(s.c_str(), &end, 10);
        if (s.empty() || *end) throw UsageError(strf("%s: '%s' is not a whole number", flag, s.c_str()));
        if (errno || n < lo || n > hi)
            throw UsageError(strf("%s: %s is out of range, wanted %lld to %lld", flag, s.c_str(),
                                  (long long)lo, (long long)hi));
        return n;
    }
    static std::string plain(std::string a) {
        for (char& c : a)
            if (c == '-') c = '_';
        return a;
    }
    Flag* find(const std::string& a) {
        bool is_long = a.compare(0, 2, "--") == 0;
        for (Flag& f : flags_) {
            if (f.is_section_) continue;
            if (is_long ? plain(f.name_) == plain(a.substr(2)) : !f.alias_.empty() && f.alias_ == a.substr(1))
                return &f;
        }
        return nullptr;
    }
    bool is_flag(const std::string& a) {
        const bool is_long = a.compare(0, 2, "--") == 0;
        return a.size() > 1 && a[0] == '-' &&
               (asks_help(a) || a == "--version" || find(is_long ? a.substr(0, a.find('=')) : a));
    }
    static bool asks_help(const std::string& a) { return a == "--help" || a == "-h" || a == "-?"; }
    // How many letters must be changed, added or removed to turn a into b (Levenshtein 1966).
    static size_t edit_distance(const std::string& a, const std::string& b) {
        std::vector<size_t> d(b.size() + 1);
        for (size_t j = 0; j < d.size(); j++) d[j] = j;
        for (size_t i = 1; i <= a.size(); i++) {
            size_t diagonal = d[0];
            d[0] = i;
            for (size_t j = 1; j < d.size(); j++) {
                size_t changed = diagonal + (a[i - 1] != b[j - 1]);
                diagonal = d[j];
                d[j] = std::min(changed, std::min(d[j], d[j - 1]) + 1);
            }
        }
        return d.back();
    }
    // " (did you mean --steps?)", or "" where no flag is within two letters.
    std::string nearest(const std::string& written) const {
        std::string want = plain(written.substr(written.compare(0, 2, "--") == 0 ? 2 : 1)), best;
        std::vector<std::string> names = {"help", "version"};
        for (const Flag& f : flags_)
            if (!f.is_section_) names.push_back(f.name_);
        size_t best_distance = 3;
        for (const std::string& name : names)
            if (size_t d = edit_distance(want, plain(name)); d < best_distance)
                best_distance = d, best = name;
        return best.empty() ? "" : " (did you mean --" + best + "?)";
    }

    const char *program_, *about_, *pos_usage_ = "";
    std::string version_, epilogue_;
    std::vector<std::string>* pos_ = nullptr;
    std::deque<Flag> flags_;  // a deque: references to its elements stay valid
};
