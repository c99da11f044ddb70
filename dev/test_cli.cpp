// test_cli.cpp - what ./prepare_data, ./train_gpt2 and ./sample_gpt2 promise to a user: exit codes, output
// and files. Runs the built programs from the repository root, in folders of their own.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <set>

#include "data/dataloader.h"
#include "dev/test_util.h"
#include "lib/gpt2.h"
#include "tokenizer/tokenizer.h"

namespace {

using Strings = std::vector<std::string>;

// ---------------------------------------------------------------------------------------------
// Running a program

struct Result {
    int code = -1;  // the exit code, or 128 + the signal that ended it
    std::string out, err;
    long peak_kib = 0;  // above what it inherited from this process
    long max_rss_kib = 0;
};

// How a program is run, where the defaults will not do.
struct How {
    rlim_t file_limit = RLIM_INFINITY;  // bytes a file may have: a disk that is full, for the program
    std::string until;                  // when stdout says this,
    int signal = 0;                     // send this
    int columns = 0;                    // not 0: stdout is a terminal of this width
    unsigned seconds = 60;              // it may take; nearly nothing here takes one, unless it hangs
};

// A terminal's two ends; raw, so that what is read is what was written.
void open_terminal(int columns, int ends[2]) {
    ends[0] = posix_openpt(O_RDWR | O_NOCTTY);
    if (ends[0] < 0 || grantpt(ends[0]) || unlockpt(ends[0])) fail("no terminal: %s", strerror(errno));
    ends[1] = open(ptsname(ends[0]), O_RDWR | O_NOCTTY);
    winsize size{};
    size.ws_row = 24, size.ws_col = (unsigned short)columns;
    if (ends[1] < 0 || ioctl(ends[1], TIOCSWINSZ, &size)) fail("no terminal: %s", strerror(errno));
}

Result run(const Strings& words, const How& how = {}) {
    if (!file_exists(words[0]))
        fail("%s: not found; make builds it, and the tests run in the repository's root", words[0].c_str());
    int out[2], err[2];
    if (how.columns) open_terminal(how.columns, out);
    else if (pipe2(out, O_CLOEXEC)) fail("no pipe: %s", strerror(errno));
    if (pipe2(err, O_CLOEXEC)) fail("no pipe: %s", strerror(errno));
    // A short pipe keeps the program from running far ahead of us before it gets the signal.
    if (how.signal) fcntl(out[1], F_SETPIPE_SZ, 4096);
    std::vector<char*> argv;
    for (const std::string& w : words) argv.push_back(const_cast<char*>(w.c_str()));
    argv.push_back(nullptr);
    // Threads that wait without spinning long: the tests stay fast where the cores are busy with other work.
    setenv("GOMP_SPINCOUNT", "1000", 0);
    pid_t pid = fork();
    if (pid == 0) {
        dup2(out[1], 1), dup2(err[1], 2);
        rlimit limit = {how.file_limit, how.file_limit};
        if (how.file_limit != RLIM_INFINITY) signal(SIGXFSZ, SIG_IGN), setrlimit(RLIMIT_FSIZE, &limit);
        // As from a shell, also where the tests run under make or nohup.
        signal(SIGINT, SIG_DFL), signal(SIGTERM, SIG_DFL), signal(SIGHUP, SIG_DFL);
        unsetenv("MAKEFLAGS"), unsetenv("MFLAGS"), unsetenv("MAKELEVEL");
        alarm(how.seconds);
        execv(argv[0], argv.data());
        _exit(127);
    }
    close(out[1]), close(err[1]);
    Result r;
    pollfd ends[2] = {{out[0], POLLIN, 0}, {err[0], POLLIN, 0}};
    for (bool sent = false; ends[0].fd >= 0 || ends[1].fd >= 0;) {
        if (poll(ends, 2, -1) < 0) continue;
        for (pollfd& p : ends) {
            char part[512];
            if (p.fd < 0 || !p.revents) continue;
            ssize_t n = read(p.fd, part, sizeof part);
            if (n > 0) (&p == ends ? r.out : r.err).append(part, (size_t)n);
            else close(p.fd), p.fd = -1;
        }
        if (how.signal && !sent && contains(r.out, how.until)) sent = true, kill(pid, how.signal);
    }
    int status;
    rusage usage;
    wait4(pid, &status, 0, &usage);
    r.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    // The child began as a copy of this process, which under a sanitizer is large itself.
    rusage own;
    getrusage(RUSAGE_SELF, &own);
    r.max_rss_kib = usage.ru_maxrss, r.peak_kib = std::max(0L, usage.ru_maxrss - own.ru_maxrss);
    return r;
}

Strings split(const std::string& text, char at) {
    Strings parts(1);
    for (char c : text) {
        if (c == at) parts.emplace_back();
        else parts.back() += c;
    }
    return parts;
}
Strings words(const std::string& command) {
    Strings w = split(command, ' ');
    w.erase(std::remove(w.begin(), w.end(), ""), w.end());
    return w;
}
Strings lines(const std::string& text) {
    Strings l = split(text, '\n');
    if (l.back().empty()) l.pop_back();
    return l;
}
Result train(const std::string& flags, const How& how = {}) {
    return run(words("./train_gpt2 " + flags), how);
}
Result prepare(const std::string& flags, const How& how = {}) {
    return run(words("./prepare_data " + flags), how);
}
Result sample(const std::string& flags, const std::string& prompt = "") {
    Strings w = words("./sample_gpt2 " + flags);
    w.push_back("--prompt"), w.push_back(prompt);
    return run(w);
}

// ---------------------------------------------------------------------------------------------
// What came out

void check_success(const Result& r) {
    CHECK(r.code == 0);
    CHECK(r.err == "");
}
// The exit code, and one readable line on stderr that begins with the program's name and says all the parts.
void check_failure(const Result& r, const char* program, int code, const Strings& parts) {
    INFO("stderr: " << r.err);
    CHECK(r.code == code);
    CHECK(r.err.compare(0, strlen(program) + 2, std::string(program) + ": ") == 0);
    CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
    CHECK((!r.err.empty() && r.err.back() == '\n'));
    CHECK(utf8::find_invalid(r.err) == std::string::npos);
    for (const std::string& p : parts) {
        INFO("wanted in it: " << p);
        CHECK(contains(r.err, p));
    }
}

std::set<std::string> files_in(const std::string& folder) {
    std::set<std::string> names;
    for (auto& f : std::filesystem::directory_iterator(folder)) names.insert(f.path().filename().string());
    return names;
}
std::map<std::string, std::string> contents_of(const std::string& folder) {
    std::map<std::string, std::string> all;
    for (const std::string& name : files_in(folder)) all[name] = read_file(folder + "/" + name);
    return all;
}
// The same without the folders in it.
std::map<std::string, std::string> contents_of_files(const std::string& folder) {
    std::map<std::string, std::string> all;
    for (const std::string& name : files_in(folder))
        if (!std::filesystem::is_directory(folder + "/" + name)) all[name] = read_file(folder + "/" + name);
    return all;
}
Strings with_prefix(const std::string& folder, const std::string& prefix) {
    Strings found;
    for (const std::string& name : files_in(folder))
        if (name.compare(0, prefix.size(), prefix) == 0) found.push_back(name);
    return found;
}
// The lines of a text that contain `part`.
Strings with_line(const std::string& text, const std::string& part) {
    Strings found;
    for (const std::string& line : lines(text))
        if (contains(line, part)) found.push_back(line);
    return found;
}
bool holds_temporary_file(const std::string& folder) {
    for (const std::string& name : files_in(folder))
        if (contains(name, ".tmp")) return true;
    return false;
}

// log.csv by column.
struct Log {
    Strings header;
    std::vector<Strings> rows;
    explicit Log(const std::string& folder) {
        for (const std::string& line : lines(read_file(folder + "/log.csv")))
            rows.push_back(split(line, ','));
        header = rows.at(0), rows.erase(rows.begin());
        for (const Strings& row : rows)
            if (row.size() != header.size())
                fail("log.csv: a row has %zu fields, the header %zu", row.size(), header.size());
    }
    Strings column(const std::string& name) const {
        auto at = std::find(header.begin(), header.end(), name);
        if (at == header.end()) fail("log.csv: no column %s", name.c_str());
        Strings c;
        for (const Strings& row : rows) c.push_back(row[(size_t)(at - header.begin())]);
        return c;
    }
    // All that must not depend on the machine's speed.
    std::vector<Strings> losses() const {
        return {column("step"),     column("train_loss"),        column("smoothed_loss"),
                column("val_loss"), column("val_bits_per_char"), column("grad_norm"),
                column("lr")};
    }
};

// The number after `label`.
double number_after(const std::string& text, const std::string& label) {
    size_t at = text.find(label);
    if (at == std::string::npos) fail("'%s' is missing in: %s", label.c_str(), text.c_str());
    return strtod(text.c_str() + at + label.size(), nullptr);
}
double number_before(const std::string& text, const std::string& label) {
    size_t at = text.find(label);
    if (at == std::string::npos) fail("'%s' is missing in: %s", label.c_str(), text.c_str());
    size_t begin = text.find_last_not_of("0123456789.e+-", at - 1);
    return strtod(text.c_str() + begin + 1, nullptr);
}

// A section of a state file, its bytes; "" where there is none.
std::string section(const std::string& state, const std::string& name) {
    for (size_t row = 1024; row + 64 <= state.size() && state[row]; row += 64) {
        uint64_t number[3];  // count, bytes of an element, offset
        memcpy(number, &state[row + 32], sizeof number);
        if (name == state.c_str() + row) return state.substr(number[2], number[0] * number[1]);
    }
    return "";
}
// AdamW's moments. (A state also holds the time that training took, which differs from run to run.)
std::string moments_in(const std::string& state) {
    std::string m = section(state, "adam_m"), v = section(state, "adam_v");
    REQUIRE((!m.empty() && m.size() == v.size()));
    return m + v;
}

bool loads_and_is_finite(const std::string& model) {
    ModelReader r(model);
    std::vector<float> p(num_params(r.cfg));
    return error_of([&] { r.read(p.data(), p.size()); }).empty();
}

// ---------------------------------------------------------------------------------------------
// A small diwan, its tokens, and a small model of it, made once

constexpr const char* MODEL =
    " --depth 1 --heads 2 --channels 16 --seq_len 16 --batch_size 4 --sample_every 0 ";

// Poems of the given words, four verses each, as a CSV like the real corpus.
std::string diwan(const Strings& vocabulary, int poems) {
    std::string csv = "id,poet,poem_text\n";
    uint32_t state = 12345;
    auto word = [&] {
        return vocabulary[(state = state * 1664525u + 1013904223u) / 65536 % vocabulary.size()];
    };
    for (int i = 0; i < poems; i++) {
        csv += strf("%d,\"nobody, I say\",\"", i);
        for (int verse = 0; verse < 4; verse++) {
            if (verse) csv += "\n";
            for (int w = 0; w < 8; w++) csv += word() + (w == 7 ? "" : w == 3 ? "\t" : " ");
        }
        csv += "\"\n";
    }
    return csv;
}

struct Fixture {
    TempDir dir;
    std::string csv = dir / "poems.csv", data = dir / "data", out = dir / "run", model = out + "/model.bin";
    std::string other_csv = dir / "other.csv", other = dir / "other";  // of fewer characters
    Result prepared, trained;
    Fixture() {
        write_file(csv,
                   diwan({"قفا",   "نبك", "من",   "ذكرى", "حبيب", "ومنزل", "بسقط", "اللوى", "بين", "الدخول",
                          "فحومل", "ليل", "طويل", "سلام", "على",  "أرض",   "بعيد", "شوق",   "قمر", "غيث"},
                         40));
        write_file(other_csv, diwan({"باب", "بيت", "تاب", "بات"}, 40));
        prepared = prepare(csv + " -o " + data);
        prepare(other_csv + " -o " + other);
        trained = train("--data " + data + MODEL + "--max_steps 20 -o " + out);
    }
    // Flags of a small run on the small diwan.
    std::string flags() const { return "--data " + data + MODEL; }
};
const Fixture& tiny() {
    static Fixture f;
    return f;
}

// ---------------------------------------------------------------------------------------------
// The way through

TEST_CASE("cli: from a CSV to a poem by the commands that the programs themselves suggest") {
    const Fixture& f = tiny();
    check_success(f.prepared);
    CHECK(contains(f.prepared.out, "./train_gpt2 --data " + f.data));
    CHECK(files_in(f.data) == std::set<std::string>{"train.bin", "val.bin", "tokenizer.bin", "recipe.txt"});
    check_success(f.trained);
    for (const char* name : {"model.bin", "tokenizer.bin", "log.csv", "main.log"})
        CHECK(files_in(f.out).count(name) == 1);
    CHECK(read_file(f.out + "/tokenizer.bin") == read_file(f.data + "/tokenizer.bin"));
    CHECK(loads_and_is_finite(f.model));
    std::string command = "./sample_gpt2 -e " + f.model;
    CHECK(contains(f.trained.out, command + "\n"));
    Result poem = run(words(command));
    check_success(poem);
    CHECK(poem.out.size() > 1);
    CHECK(utf8::find_invalid(poem.out) == std::string::npos);
}

TEST_CASE("cli: prepare_data says what it read, kept and dropped") {
    const Fixture& f = tiny();
    for (const char* part : {"poem_text", "40 poems", "characters", "verses", "vocabulary", "train", "val"})
        CHECK(contains(f.prepared.out, part));
    int32_t h[3];
    memcpy(h, read_file(f.data + "/train.bin").data(), sizeof h);
    CHECK(contains(f.prepared.out, " " + commas((uint64_t)h[2]) + " "));  // the tokens of train
}

TEST_CASE("cli: train_gpt2 shows model, data, memory and settings, then a line a step") {
    const std::string& out = tiny().trained.out;
    for (const char* part : {"1 layer", "2 heads", "16 channels", "parameters", "memory", "learning rate",
                             "AdamW", "dropout", "GFLOP/s"})
        CHECK(contains(out, part));
    for (const char* part : {"step  1/20 | ", "step 20/20 | ", "loss ", "norm ", "lr ", " ms", "tokens/s",
                             "% of peak", "ETA ", "perplexity", "bits per character"})
        CHECK(contains(out, part));
}

TEST_CASE("cli: the loss falls") {
    TempDir d;
    check_success(train(tiny().flags() + "--max_steps 60 --learning_rate 1e-2 -o " + (d / "run")));
    Strings val = Log(d / "run").column("val_loss");
    CHECK(std::stod(val.front()) ==
          doctest::Approx(std::log(Tokenizer::load(tiny().data + "/tokenizer.bin").vocab_size()))
              .epsilon(0.02));
    CHECK(std::stod(val.back()) < std::stod(val.front()) - 0.3);
}

// What NAME --version says.
std::string version_of(const std::string& name) {
    Result r = run({"./" + name, "--version"});
    check_success(r);
    return lines(r.out).at(0);
}

TEST_CASE("cli: --version names version, commit, compiler and instructions; log and state keep it") {
    for (const char* name : {"train_gpt2", "sample_gpt2", "prepare_data"}) {
        std::string version = version_of(name);
        INFO(version);
        CHECK(version.compare(0, strlen(name) + 3, std::string(name) + " 0.") == 0);
        CHECK(contains(version, " (commit "));
        if (file_exists(".git")) CHECK(!contains(version, "commit unknown"));
        CHECK(!contains(version, "(commit )"));
        CHECK(contains(version, "++ "));
        CHECK(version.find(',') == std::string::npos);  // it is a field of log.csv
        CHECK(contains(version, "computes in fp32 and bf16") == (name == std::string("train_gpt2")));
    }
    const std::string version = version_of("train_gpt2");
    CHECK(contains(tiny().trained.out, "program          " + version + "\n"));
    Strings column = Log(tiny().out).column("program");
    CHECK(column.at(0) == version);
    CHECK(std::count(column.begin() + 1, column.end(), "") == (ptrdiff_t)column.size() - 1);
    std::string state = read_file(tiny().out + "/" + with_prefix(tiny().out, "state_").back());
    CHECK(section(state, "program") == version);
    check_failure(run({"./train_gpt2", "--versoin"}), "train_gpt2", 2, {"did you mean --version?"});
}

TEST_CASE("cli: log.csv has a row a step, all of it finite numbers") {
    Log log(tiny().out);
    REQUIRE(log.rows.size() == 21);
    for (size_t i = 0; i < log.rows.size(); i++) {
        CHECK(log.rows[i][0] == std::to_string(i));
        for (const std::string& name : log.header) {
            std::string cell = log.column(name)[i];
            char* end;
            if (name == "program") CHECK((cell.empty() || cell == version_of("train_gpt2")));
            else if (!cell.empty()) CHECK((std::isfinite(strtod(cell.c_str(), &end)) && *end == 0));
        }
    }
    for (const char* name : {"train_loss", "smoothed_loss", "grad_norm", "lr", "ms", "tokens_per_s"}) {
        Strings c = log.column(name);
        CHECK(c[0] == "");  // before the first step there is only a validation
        CHECK(std::count(c.begin() + 1, c.end(), "") == 0);
    }
    CHECK(log.column("val_loss")[0] != "");
    CHECK(log.column("val_loss")[20] != "");
}

TEST_CASE("cli: main.log is in llm.c's format and agrees with log.csv") {
    Log log(tiny().out);
    size_t train_lines = 0, val_lines = 0;
    for (const std::string& line : lines(read_file(tiny().out + "/main.log"))) {
        int step = -1;
        double loss, lr, norm;
        if (sscanf(line.c_str(), "s:%d trl:%lf lr:%lf norm:%lf", &step, &loss, &lr, &norm) == 4) {
            CHECK(line == strf("s:%d trl:%.4f lr:%.6f norm:%.2f", step, loss, lr, norm));
            CHECK(strf("%.4f", loss) ==
                  strf("%.4f", std::stod(log.column("train_loss").at((size_t)step + 1))));
            train_lines++;
        } else {
            REQUIRE(sscanf(line.c_str(), "s:%d tel:%lf", &step, &loss) == 2);
            CHECK(line == strf("s:%d tel:%.4f", step, loss));
            CHECK(strf("%.4f", loss) == strf("%.4f", std::stod(log.column("val_loss").at((size_t)step))));
            val_lines++;
        }
    }
    CHECK(train_lines == 20);
    CHECK(val_lines == 21);  // 20 times a run, and at the start
}

TEST_CASE("cli: neither ANSI codes nor carriage returns where the output is no terminal") {
    const Fixture& f = tiny();
    TempDir d;
    Result with_poems =
        train(f.flags() + "--sample_every 2 --sample_tokens 20 --max_steps 4 -o " + (d / "run"));
    check_success(with_poems);
    CHECK(contains(with_poems.out, "--- a poem after step 2 ---"));
    for (const Result& r :
         {f.prepared, f.trained, with_poems, sample("-e " + f.model), train("--help"), train("--nonsense")}) {
        CHECK(!contains(r.out + r.err, "\x1b"));
        CHECK(!contains(r.out + r.err, "\r"));
        CHECK(utf8::find_invalid(r.out) == std::string::npos);
    }
}

TEST_CASE("cli: on a terminal the step line is redrawn in place and never wraps") {
    TempDir d;
    How how;
    how.columns = 80;
    Result r = train(tiny().flags() + "--max_steps 4 --val_every 0 -o " + (d / "run"), how);
    CHECK(r.code == 0);
    size_t redrawn = 0;
    for (const std::string& piece : split(r.out, '\r')) {
        if (piece.compare(0, 4, "step") || !contains(piece, "loss")) continue;
        redrawn++;
        std::string shown = piece.substr(0, piece.find_first_of("\x1b\n"));
        INFO(shown);
        CHECK(shown.size() < 80);
    }
    CHECK(redrawn == 4);
}

TEST_CASE("cli: --help exits with 0 and explains every flag") {
    for (const char* ask : {"--help", "-h"}) {
        Result r = train(ask);
        check_success(r);
        for (const char* flag : {"data",
                                 "train_data",
                                 "val_data",
                                 "tokenizer",
                                 "init_from",
                                 "preset",
                                 "depth",
                                 "heads",
                                 "channels",
                                 "seq_len",
                                 "dropout",
                                 "batch_size",
                                 "total_batch_size",
                                 "max_steps",
                                 "learning_rate",
                                 "lr_schedule",
                                 "warmup_steps",
                                 "final_lr_fraction",
                                 "weight_decay",
                                 "beta1",
                                 "beta2",
                                 "eps",
                                 "grad_clip",
                                 "seed",
                                 "threads",
                                 "val_every",
                                 "val_batches",
                                 "sample_every",
                                 "sample_tokens",
                                 "temperature",
                                 "prompt",
                                 "out",
                                 "save_every",
                                 "keep",
                                 "resume",
                                 "overwrite"}) {
            INFO(std::string(flag));
            CHECK((contains(r.out, std::string("\n  --") + flag + " ") ||
                   contains(r.out, std::string("\n  --") + flag + ",")));
        }
        for (char alias : std::string("ijeobtdluqcvmsgnx")) {
            INFO(alias);
            CHECK(contains(r.out, std::string(", -") + alias + " "));
        }
    }
    Result s = run({"./sample_gpt2", "--help"}), p = prepare("--help");
    check_success(s), check_success(p);
    for (const char* flag : {"--init_from", "--tokenizer", "--prompt", "--tokens", "--num", "--temperature",
                             "--top_k", "--top_p", "--seed", ", -e "})
        CHECK(contains(s.out, flag));
    for (const char* flag : {"--out", "--column", "--layout", "--keep", "--on_error", "--normalize_alef",
                             "--normalize_hamza", "--normalize_ya", "--normalize_ta", "--remove_tatweel",
                             "--remove_tashkeel", "--val_fraction", "--seed", ", -o "})
        CHECK(contains(p.out, flag));
}

TEST_CASE("cli: llm.c's short flags, --name=value and dashes mean the same as the long flags") {
    const Fixture& f = tiny();
    TempDir d;
    std::string size = " --depth 1 --heads 2 --channels 16 --tokenizer " + f.data + "/tokenizer.bin ";
    check_success(train(size + "--train_data " + f.data + "/train.bin --val_data " + f.data +
                        "/val.bin --out " + (d / "a") +
                        " --batch_size 2 --seq_len 8 --total_batch_size 32 --learning_rate 0.01 "
                        "--warmup_steps 3 --final_lr_fraction 0.5"
                        " --weight_decay 0.2 --val_every 2 --val_batches 3 --sample_every 5 --sample_tokens "
                        "7 --save_every 3 --max_steps 6"));
    check_success(train(size + "-i " + f.data + "/train.bin -j " + f.data + "/val.bin -o " + (d / "b") +
                        " -b 2 -t 8 -d 32 -l 0.01 -u 3 -q 0.5 -c 0.2 -v 2 -m 3 -s 5 -g 7 -n 3 -x 6"));
    check_success(train(size + "--train-data=" + f.data + "/train.bin --val-data=" + f.data +
                        "/val.bin --out=" + (d / "c") +
                        " --batch-size=2 --seq-len=8 --total-batch-size=32 --learning-rate=0.01 "
                        "--warmup-steps=3 --final-lr-fraction=0.5"
                        " --weight-decay=0.2 --val-every=2 --val-batches=3 --sample-every=5 "
                        "--sample-tokens=7 --save-every=3 --max-steps=6"));
    for (const char* name : {"b", "c"}) {
        CHECK(Log(d / name).losses() == Log(d / "a").losses());
        CHECK(files_in(d / name) == files_in(d / "a"));
        CHECK(read_file((d / name) + "/model.bin") == read_file((d / "a") + "/model.bin"));
    }
    CHECK(Log(d / "a").rows.size() == 7);
    CHECK(with_prefix(d / "a", "state_") == Strings{"state_00000003.bin", "state_00000006.bin"});
}

// ---------------------------------------------------------------------------------------------
// The same again

TEST_CASE("cli: training is the same to the bit when repeated, and on 1, 2 or 3 threads") {
    TempDir d;
    std::string flags = tiny().flags() + "--max_steps 12 --dropout 0.2 --total_batch_size 128 -o ";
    check_success(train(flags + (d / "a")));
    for (const char* how : {"", " --threads 1", " --threads 2", " --threads 3"}) {
        INFO("threads: " << std::string(how));
        check_success(train(flags + (d / "b") + " --overwrite" + how));
        CHECK(Log(d / "b").losses() == Log(d / "a").losses());
        CHECK(read_file((d / "b") + "/main.log") == read_file((d / "a") + "/main.log"));
        std::set<std::string> files = files_in(d / "b");
        files.erase("previous");  // the run before
        CHECK(files == files_in(d / "a"));
        for (const std::string& name : with_prefix(d / "a", "model"))
            CHECK(read_file((d / "b") + "/" + name) == read_file((d / "a") + "/" + name));
        CHECK(moments_in(read_file((d / "b") + "/state_00000012.bin")) ==
              moments_in(read_file((d / "a") + "/state_00000012.bin")));
    }
    check_success(train(flags + (d / "c") + " --seed 4"));
    CHECK(Log(d / "c").losses() != Log(d / "a").losses());
}

// Equal in all that training computes: losses, logs, models, moments.
void check_same_run(const std::string& a, const std::string& b, int last) {
    CHECK(Log(a).losses() == Log(b).losses());
    CHECK(read_file(a + "/main.log") == read_file(b + "/main.log"));
    CHECK(read_file(a + "/model.bin") == read_file(b + "/model.bin"));
    std::string model = strf("/model_%08d.bin", last), state = strf("/state_%08d.bin", last);
    CHECK(read_file(a + model) == read_file(b + model));
    CHECK(moments_in(read_file(a + state)) == moments_in(read_file(b + state)));
}

TEST_CASE("cli: a run that Ctrl-C, SIGTERM or kill -9 ended goes on as if nothing had happened") {
    struct {
        int val_every, max_steps;
        bool twice;
    } cases[] = {
        {1, 70, false},
        {9, 150, true}};  // the signal meets a step that is to be validated; most often one that is not
    for (auto& c : cases) {
        TempDir d;
        std::string flags = tiny().flags() + strf(
                                                 "--max_steps %d --val_every %d --val_batches 2 --save_every "
                                                 "10 --dropout 0.2 --total_batch_size 128 -o ",
                                                 c.max_steps, c.val_every);
        check_success(train(flags + (d / "whole")));
        for (int signal : {SIGINT, SIGTERM, SIGKILL}) {
            CAPTURE(c.val_every);
            CAPTURE(signal);
            std::string out = d / strf("signal_%d", signal), again = "./train_gpt2 -o " + out + " --resume";
            auto until_step = [&](int step) {
                How how;
                how.until = strf("step %*d/%d |", (int)std::to_string(c.max_steps).size(), step, c.max_steps),
                how.signal = signal;
                return how;
            };
            Result r = train(flags + out, until_step(15));
            CHECK(r.code == (signal == SIGKILL ? 128 + SIGKILL : 0));
            if (signal != SIGKILL) {
                check_success(r);
                CHECK(contains(r.out, again + "\n"));  // which is what the test does below
                CHECK(!holds_temporary_file(out));
            }
            Strings steps = Log(out).column("step");
            CHECK(std::set<std::string>(steps.begin(), steps.end()).size() == steps.size());
            REQUIRE(std::stoi(steps.back()) < c.max_steps);
            if (c.twice) {
                int saved = std::stoi(with_prefix(out, "state_").back().substr(6));
                CHECK(run(words(again), until_step(saved + 12)).code ==
                      (signal == SIGKILL ? 128 + SIGKILL : 0));
            }
            check_success(run(words(again)));
            check_same_run(out, d / "whole", c.max_steps);
            CHECK(Log(out).rows.size() == (size_t)c.max_steps + 1);  // each step once
        }
    }
}

TEST_CASE("cli: a finished run goes on with a longer --max_steps") {
    TempDir d;
    std::string flags = tiny().flags() +
                        "--lr_schedule constant --learning_rate 0.01 --warmup_steps 0 --dropout 0.1 "
                        "--val_every 3 --save_every 4 -o ";
    check_success(train(flags + (d / "a") + " --max_steps 24"));
    check_success(train(flags + (d / "b") + " --max_steps 12"));
    check_success(train("--resume --max_steps 24 -o " + (d / "b")));
    check_same_run(d / "a", d / "b", 24);
    auto before = contents_of(d / "b");
    check_success(train("--resume -o " + (d / "b")));  // nothing is left to do, and nothing changes
    CHECK(contents_of(d / "b") == before);
}

TEST_CASE("cli: a resumed run skips the same outliers as one that was never stopped") {
    TempDir d;
    check_success(train(tiny().flags() +
                        "--val_every 0 --skip_norm_z 0.5 --max_steps 160 --save_every 140 -o " +
                        (d / "whole")));
    std::filesystem::copy(d / "whole", d / "run");
    for (const char* kind : {"model", "state"})
        std::filesystem::remove(d / strf("run/%s_00000160.bin", kind));
    Result r = train("--resume -o " + (d / "run"));
    check_success(r);
    CHECK(contains(r.out, " was skipped: its gradient norm is "));
    check_same_run(d / "run", d / "whole", 160);
}

TEST_CASE("cli: a run by Muon says so, resumes bit for bit, and goes on with AdamW only from its model") {
    TempDir d;
    const std::string flags = "--data " + tiny().data + MODEL + "--keep 9 --save_every 3 ";
    Result r = train(flags + "--optimizer muon --learning_rate 1e-3 --max_steps 6 -o " + (d / "whole"));
    check_success(r);
    CHECK(contains(r.out, "Muon             the blocks' matrices, learning rate 0.005, momentum 0.95; "));
    CHECK(contains(r.out, ", Muon and AdamW "));
    std::filesystem::copy(d / "whole", d / "run");
    for (const char* kind : {"model", "state"})
        std::filesystem::remove(d / strf("run/%s_00000006.bin", kind));
    check_success(train("--resume -o " + (d / "run")));
    check_same_run(d / "run", d / "whole", 6);
    check_failure(train("--resume --optimizer adamw --max_steps 8 -o " + (d / "run")), "train_gpt2", 2,
                  {"--optimizer adamw: " + (d / "run/state_00000006.bin was saved with muon"),
                   "start a new run from it: --init_from " + (d / "run/model_00000006.bin --out DIR")});
    check_success(train("--init_from " + (d / "run/model_00000006.bin") + " --data " + tiny().data +
                        " --optimizer adamw --max_steps 2 -o " + (d / "adamw")));
    check_failure(train("--resume --optimizer muon --max_steps 8 -o " + (d / "adamw")), "train_gpt2", 2,
                  {"--optimizer muon: ", "was saved with adamw"});
    check_failure(train(flags + "--optimizer sgd -o " + (d / "x")), "train_gpt2", 2,
                  {"--optimizer", "'sgd'", "adamw, muon"});
    for (const char* rate : {"nan", "-1", "1e9", "fast"})
        check_failure(train(flags + "--optimizer muon --muon_learning_rate " + rate + " -o " + (d / "x")),
                      "train_gpt2", 2, {"--muon_learning_rate"});
    check_failure(train(flags + "--optimizer adamw --muon_learning_rate 0.01 -o " + (d / "x")), "train_gpt2",
                  2, {"--muon_learning_rate 0.01: AdamW has no use for it, wanted --optimizer muon"});
}

TEST_CASE("cli: dev/ladder/optimizers.py tables both optimizers, and goes on where it was stopped") {
    if (run({"/bin/sh", "-c", "command -v python3"}).code) return skip("python3: not found");
    TempDir d;
    const std::vector<std::string> script = {
        "/bin/sh", "-c",
        "dev/ladder/optimizers.py data/sample_poems.csv --parts a --steps 2 "
        "--out " +
            (d / "runs")};
    Result r = run(script);
    check_success(r);
    const std::string report = read_file(d / "runs/report.md");
    for (const char* row :
         {"| adamw | 0.002 | ", "| muon | 0.004 | ", "In the time of AdamW's steps, Muon takes fewer and"})
        CHECK(contains(report, row));
    const auto first = std::filesystem::last_write_time(d / "runs/a/muon_0.004_seed1_cosine_2/log.csv");
    std::filesystem::remove_all(d / "runs/a/adamw_0.002_seed1_cosine_2");
    check_success(run(script));
    CHECK(std::filesystem::last_write_time(d / "runs/a/muon_0.004_seed1_cosine_2/log.csv") == first);
    CHECK(file_exists(d / "runs/a/adamw_0.002_seed1_cosine_2/model.bin"));
    r = run({"/bin/sh", "-c", script[2] + " --steps 3"});
    CHECK(r.code == 1);
    CHECK(r.err == "optimizers.py: " + (d / "runs") + " has runs with other arguments (" +
                       (d / "runs/arguments.json") + "); take another --out\n");
    // A run whose flags are not known may be another experiment's.
    std::filesystem::remove(d / "runs/a/muon_0.004_seed1_cosine_2.flags");
    r = run(script);
    CHECK(r.code == 1);
    CHECK(contains(r.err, "muon_0.004_seed1_cosine_2 was trained with other flags, or not by this script"));
}

TEST_CASE("cli: dev/ladder/rung8.sh trains, judges poets it left out, fine-tunes, and skips what is done") {
    TempDir d;
    // The built-in poems, as if three poets had written them in turn
    std::string poems = read_file("data/sample_poems.csv");
    const std::string poet = "\u0623\u0631\u0627\u0628\u0648\u064A\u062A";
    size_t n = 0;
    for (size_t at = 0; (at = poems.find("," + poet + ",", at)) != poems.npos; at += 2)
        poems.replace(at + 1, poet.size(), 1, "ABC"[n++ % 3]);
    REQUIRE(n == 24);
    write_file(d / "poems.csv", poems);
    auto rung8 = [&](const std::string& runs, const std::string& out = "out", const std::string& flags = "",
                     int steps = 20, const std::string& variables = "UNSEEN=B TUNED=B") {
        How how;
        how.seconds = 600;  // about forty programs, which a busy machine delays
        return run({"/bin/sh", "-c",
                    variables +
                        " POET=A ASK=poem_meter=other BATCH=2 WRITTEN=2 "
                        "TRAIN_FLAGS='--depth 1 --channels 16 --heads 2 --seq_len 32" +
                        flags + "' STEPS=" + std::to_string(steps) + " RUNS='" + runs +
                        "' dev/ladder/rung8.sh " + (d / "poems.csv") + " " + (d / out)},
                   how);
    };
    // Its programs tell on standard error which verses found no rhyme.
    Result r = rung8("muon one_none tuned");
    INFO(r.err);
    REQUIRE(r.code == 0);
    const std::string losses = read_file(d / "out/muon/losses.txt");
    CHECK(losses.find("\nvalidation loss ") != losses.rfind("\nvalidation loss "));
    for (const char* file : {"/poets/val.bin", "/unseen/train.bin"}) {
        CHECK(contains(losses, "on the whole of " + (d / "out") + file));
        CHECK(contains(losses, (d / "out") + file + ": 5-gram, loss "));
    }
    CHECK(!contains(read_file(d / "out/one_none/losses.txt"), "unseen"));
    for (const char* name : {"muon", "one_none", "tuned"}) {
        const std::string dir = d / "out/" + std::string(name) + "/";
        CHECK(contains(read_file(dir + "scores.md"), "| poems, verses, words |"));
        CHECK(contains(read_file(dir + "rhymed.txt"), "\n"));
    }
    CHECK(file_exists(d / "out/tuned/finetune.md"));
    // A run that stopped after its last checkpoint goes on from there; one that is done is left alone.
    const auto model = std::filesystem::last_write_time(d / "out/muon/model_00000020.bin");
    std::filesystem::remove(d / "out/muon/scores.md");
    r = rung8("muon one_none");
    CHECK(r.code == 0);
    CHECK(contains(r.out, "one_none is done\n"));
    CHECK(file_exists(d / "out/muon/scores.md"));
    CHECK(std::filesystem::last_write_time(d / "out/muon/model_00000020.bin") == model);
    r = rung8("muon moun");
    CHECK(r.code == 2);
    CHECK(r.err == "rung8.sh: 'moun' is no run; the first lines of this script list them\n");
    r = rung8("muon", "out", "", 5);
    CHECK(r.code == 2);
    CHECK(r.err == "rung8.sh: STEPS is '5', wanted at least 20\n");
    r = rung8("muon", "out", "", 25);
    CHECK(r.code == 2);
    CHECK(r.err == "rung8.sh: " + (d / "out/muon") + " began with other settings or poems (" +
                       (d / "out/muon.settings") + "); take another OUT\n");
    // A run that ends early is not taken for done, nor is its model fine-tuned.
    r = rung8("muon", "early", " --max_steps 10");
    CHECK(r.code == 1);
    CHECK(contains(r.err, "rung8.sh: " + (d / "early/muon") + " stopped before step 20; start this script"));
    CHECK(!file_exists(d / "early/muon/scores.md"));
    r = rung8("tuned", "early");
    CHECK(r.code == 2);
    CHECK(contains(r.err, "rung8.sh: tuned needs muon's model of these settings"));
    // Nor is one that has read the poet, or may have.
    std::filesystem::remove_all(d / "out/tuned");
    r = rung8("tuned", "out", "", 20, "UNSEEN='B|C' TUNED=C");
    CHECK(r.code == 2);
    CHECK(contains(r.err, "rung8.sh: tuned needs muon's model of these settings"));
    r = rung8("tuned", "out", "", 20, "UNSEEN=B TUNED=C");
    CHECK(r.code == 2);
    CHECK(r.err == "rung8.sh: TUNED is 'C', wanted one of UNSEEN\n");
}

TEST_CASE("cli: a resumed run's learning rate reaches Muon, too, unless Muon was given one of its own") {
    TempDir d;
    const std::string flags = "--data " + tiny().data + MODEL + "--optimizer muon --learning_rate 1e-3 ";
    check_success(train(flags + "--max_steps 2 -o " + (d / "a")));
    Result r = train("--resume --learning_rate 1e-4 --max_steps 3 -o " + (d / "a"));
    check_success(r);
    CHECK(contains(r.out, "Muon             the blocks' matrices, learning rate 0.0005,"));
    check_success(train(flags + "--muon_learning_rate 3e-3 --max_steps 2 -o " + (d / "b")));
    r = train("--resume --learning_rate 1e-4 --max_steps 3 -o " + (d / "b"));
    check_success(r);
    CHECK(contains(r.out, "Muon             the blocks' matrices, learning rate 0.003,"));
    // A rate so small that a quotient by it would overflow
    check_success(
        train(flags + "--learning_rate 1e-44 --muon_learning_rate 0.01 --max_steps 2 -o " + (d / "c")));
}

TEST_CASE("cli: dev/plot/compare.sh draws runs, and names what it cannot draw") {
    TempDir d;
    check_success(train("--data " + tiny().data + MODEL + "--max_steps 2 -o " + (d / "run's")));
    auto compare = [&](const std::string& axis, const std::string& image, const std::string& run_folder) {
        return run({"dev/plot/compare.sh", axis, image, run_folder});
    };
    Result r = compare("hours", d / "x.png", d / "run's");
    CHECK(r.code == 2);
    CHECK(r.err == "compare.sh: the axis is 'hours', wanted steps, tokens or seconds\n");
    r = compare("steps", d / "x.gif", d / "run's");
    CHECK(r.code == 2);
    CHECK(r.err == "compare.sh: " + (d / "x.gif") + ": wanted a name that ends in .png or .svg\n");
    r = compare("steps", d / "x.png", d / "none");
    CHECK(r.code == 1);
    CHECK(r.err == "compare.sh: " + (d / "none") + "/log.csv is missing or has no rows\n");
    if (run({"/bin/sh", "-c", "command -v gnuplot"}).code) {
        r = compare("steps", d / "x.png", d / "run's");
        CHECK(r.code == 1);
        CHECK(r.err == "compare.sh: gnuplot is missing; install it with: sudo apt-get install gnuplot-nox\n");
        return skip("gnuplot: not found");
    }
    r = compare("steps", d / "no/x.png", d / "run's");
    CHECK(r.code == 1);
    CHECK(r.err == "compare.sh: " + (d / "no/x.png") + ": cannot write\n");
    for (const char* axis : {"steps", "tokens", "seconds"}) {
        r = compare(axis, d / "x.png", d / "run's");
        check_success(r);
        CHECK(r.out + r.err == "");
        CHECK(contains(read_file(d / "x.png").substr(0, 8), "PNG"));
    }
    std::filesystem::copy(d / "run's", d / "other");
    check_success(run({"dev/plot/compare.sh", "steps", d / "x.svg", d / "run's", d / "other"}));
    const std::string svg = read_file(d / "x.svg");
    CHECK(contains(svg, "<svg"));
    CHECK(contains(svg, ">other<"));
    CHECK(contains(svg, ">run's<"));
    CHECK(!contains(svg, d.path));
}

TEST_CASE("cli: a run that was given relative paths is resumed from any folder") {
    TempDir d;
    std::filesystem::copy(tiny().data, d / "data");
    check_success(run(
        {"/bin/sh", "-c",
         "here=$PWD; cd " + d.path + " && $here/train_gpt2 --data data" + MODEL + "--max_steps 2 -o run"}));
    check_success(train("--resume --max_steps 3 -o " + (d / "run")));
}

TEST_CASE("cli: --resume fails where there is nothing to resume") {
    TempDir d;
    check_failure(train("--resume -o " + (d / "none")), "train_gpt2", 1, {d / "none", "no checkpoint"});
    CHECK(!file_exists(d / "none"));
}

std::string flipped(std::string s, size_t i) {
    s.at(i) = (char)(s.at(i) ^ 1);
    return s;
}

TEST_CASE("cli: the advice on a damaged checkpoint does not depend on the folder's name") {
    TempDir d;
    const std::string folder = d / "cannot fail";
    make_dirs(folder);
    for (int step : {4, 8})
        for (const char* kind : {"model", "state"})
            write_file(folder + strf("/%s_%08d.bin", kind, step), "damaged");
    check_failure(run({"./train_gpt2", "--resume", "-o", folder}), "train_gpt2", 1,
                  {folder + "/", "to resume from the checkpoint before"});
}

TEST_CASE("cli: a damaged checkpoint is refused by name, with advice, and the one before still works") {
    TempDir d;
    check_success(train(tiny().flags() + "--max_steps 8 --save_every 4 -o " + (d / "good")));
    struct {
        const char* file;
        std::function<std::string(std::string)> damage;
    } cases[] = {
        {"state_00000008.bin", [](std::string s) { return s.substr(0, s.size() - 4); }},
        {"state_00000008.bin", [](std::string s) { return s.substr(0, 100); }},
        {"state_00000008.bin", [](std::string) { return std::string(); }},
        {"state_00000008.bin", [](std::string s) { return with_header(s, 0, 1); }},
        {"state_00000008.bin", [](std::string s) { return with_header(s, 1, 77); }},
        {"state_00000008.bin", [](std::string s) { return with_header(s, 2, 9); }},
        {"state_00000008.bin", [](std::string s) { return flipped(s, 1030); }},
        {"state_00000008.bin", [](std::string s) { return flipped(s, 9000); }},
        {"state_00000008.bin", [](std::string s) { return s.replace(s.find("seed=1337"), 9, "seed=l337"); }},
        {"state_00000008.bin", [](std::string s) { return flipped(s, s.size() - 3); }},
        {"model_00000008.bin", [](std::string s) { return s.substr(0, s.size() - 4); }},
        {"model_00000008.bin", [](std::string s) { return with_header(s, 0, 1); }},
        {"model_00000008.bin", [](std::string s) { return with_header(s, 4, 2); }},
        {"model_00000008.bin",
         [](std::string s) { return with_header(s, 700, 0x7fc00000); }},  // a parameter becomes NaN
        {"model_00000008.bin", [](std::string s) { return flipped(s, 5000); }},
    };
    int number = 0;
    for (auto& c : cases) {
        CAPTURE(number++);
        std::string run = d / "run";
        std::filesystem::remove_all(run);
        std::filesystem::copy(d / "good", run);
        write_file(run + "/" + c.file, c.damage(read_file(run + "/" + c.file)));
        auto before = contents_of(run);
        // One of the pair is named; the checksum cannot tell which of them is damaged.
        Result r = train("--resume --max_steps 10 -o " + run);
        check_failure(r, "train_gpt2", 1,
                      {run + "/", "_00000008.bin elsewhere", "to resume from the checkpoint before"});
        CHECK(contents_of(run) == before);
        std::filesystem::remove(run + "/state_00000008.bin"),
            std::filesystem::remove(run + "/model_00000008.bin");
        check_success(train("--resume -o " + run));
        check_same_run(run, d / "good", 8);
    }
}

// ---------------------------------------------------------------------------------------------
// Evaluating and keeping

TEST_CASE("cli: --max_steps 0 prints the loss of the whole validation file, and writes nothing") {
    const Fixture& f = tiny();
    TempDir d;
    check_success(train(f.flags() + "--max_steps 10 --val_batches 0 -o " + (d / "run")));
    Log log(d / "run");
    double logged = std::stod(log.column("val_loss").back()),
           bits = std::stod(log.column("val_bits_per_char").back());
    uint64_t targets = TokenFile(f.data + "/val.bin").size() - 1;
    for (const char* batch : {"", " -b 1", " -b 7", " -b 64"}) {
        INFO(std::string(batch));
        Result r = train("--max_steps 0 --data " + f.data + " -o " + (d / "untouched") + " -e " +
                         (d / "run") + "/model_00000010.bin" + batch);
        check_success(r);
        double nats = number_before(r.out, " nats per token");
        CHECK(std::abs(nats - logged) < 2e-6 * (1 + logged));
        CHECK(std::abs(number_after(r.out, "perplexity ") - std::exp(logged)) < 1e-3);
        CHECK(std::abs(number_before(r.out, " bits per character") - bits) < 1e-5);
        CHECK(std::abs(number_before(r.out, " nats per character") - logged) <
              1e-5);  // each token is one character
        CHECK(contains(r.out, " " + commas(targets) + " tokens"));
        CHECK(lines(r.out).size() <= 4);
    }
    CHECK(!file_exists(d / "untouched"));
    check_failure(train("--max_steps 0 --data " + f.data), "train_gpt2", 2, {"-e FILE"});
}

TEST_CASE("cli: evaluating needs no training data") {
    const Fixture& f = tiny();
    Result r = train("--max_steps 0 -e " + f.model + " -j " + f.data + "/val.bin --data /nowhere");
    check_success(r);
    CHECK(contains(r.out, "nats per token"));
    CHECK(contains(r.out, "bits per character"));  // by the tokenizer beside the model
}

TEST_CASE("cli: --keep N keeps the last N checkpoints") {
    for (int keep : {1, 3}) {
        TempDir d;
        check_success(
            train(tiny().flags() + strf("--max_steps 12 --save_every 2 --keep %d -o ", keep) + (d / "run")));
        Strings models, states;
        for (int step = 14 - 2 * keep; step <= 12; step += 2)
            models.push_back(strf("model_%08d.bin", step)), states.push_back(strf("state_%08d.bin", step));
        CHECK(with_prefix(d / "run", "model_") == models);
        CHECK(with_prefix(d / "run", "state_") == states);
        CHECK(files_in(d / "run").count("model.bin") == 1);
    }
}

TEST_CASE("cli: model.bin is the best by validation loss, also when training gets worse afterwards") {
    const Fixture& f = tiny();
    TempDir d;
    check_success(
        train(f.flags() +
              "--max_steps 10 --lr_schedule constant --learning_rate 0.01 --val_every 1 --val_batches 0 -o " +
              (d / "run")));
    Result r = train("--resume --max_steps 14 --learning_rate 1 -o " + (d / "run"));  // unlearns
    check_success(r);
    std::vector<double> val;
    for (const std::string& v : Log(d / "run").column("val_loss")) val.push_back(std::stod(v));
    size_t best = (size_t)(std::min_element(val.begin() + 1, val.end()) - val.begin());
    CHECK(best <= 10);
    CHECK(contains(r.out, strf("Best validation loss %.4f at step %zu", val[best], best)));
    double of_model = number_before(
        train("--max_steps 0 --data " + f.data + " -e " + (d / "run") + "/model.bin").out, " nats per token");
    CHECK(std::abs(of_model - val[best]) < 2e-6 * (1 + val[best]));
    CHECK(val.back() > val[best] + 0.05);
}

TEST_CASE("cli: going back to an earlier checkpoint keeps a better model.bin of a later step") {
    TempDir d;
    std::string flags = "--lr_schedule constant --learning_rate 0.01 --val_every 1 --max_steps 6 -o ",
                out = d / "run";
    check_success(train(tiny().flags() + "--save_every 3 " + flags + out));
    std::filesystem::copy(out, d / "same");
    std::string best = read_file(out + "/model.bin");
    REQUIRE((best == read_file(out + "/model_00000006.bin")));  // the loss falls in each step
    for (const std::string& dir : {out, d / "same"})
        for (const char* name : {"/model_00000006.bin", "/state_00000006.bin"})
            std::filesystem::remove(dir + name);
    Result r = train("--resume --learning_rate 1 -o " + out);
    check_success(r);
    CHECK(contains(r.out, "at step 6, kept in"));
    CHECK((read_file(out + "/model.bin") == best));
    CHECK((read_file(out + "/model_00000006.bin") != best));
    // With the same flags the same step comes again.
    check_success(train("--resume -o " + (d / "same")));
    CHECK((read_file(d / "same/model.bin") == best));
    CHECK((read_file(d / "same/model_00000006.bin") == best));
}

TEST_CASE("cli: after going back, the best step is the best again when it is repeated") {
    for (int last : {3, 4, 5, 6}) {  // log.csv rounds the loss to nine digits, up or down
        TempDir d;
        check_success(train(tiny().flags() + "--lr_schedule constant --learning_rate 0.01 --val_every 1 " +
                            strf("--max_steps %d --save_every %d -o ", last, last - 1) + (d / "run")));
        for (const char* kind : {"model", "state"})
            std::filesystem::remove(d / strf("run/%s_%08d.bin", kind, last));
        CHECK(contains(train("--resume -o " + (d / "run")).out, "(best so far: "));
    }
}

TEST_CASE("cli: after going back, a later loss does not count if validation now uses other tokens") {
    TempDir d;
    check_success(train(tiny().flags() +
                        "--lr_schedule constant --learning_rate 0.01 --val_every 1 "
                        "--max_steps 6 --save_every 3 -o " +
                        (d / "run")));
    for (const char* kind : {"model", "state"})
        std::filesystem::remove(d / strf("run/%s_00000006.bin", kind));
    Result r = train("--resume --learning_rate 1 --val_tokens 20 -o " + (d / "run"));  // unlearns
    check_success(r);
    CHECK(contains(r.out, "model.bin was the best by the earlier validations"));
}

TEST_CASE("cli: the best model of the earlier validations is kept, too, after a kill before the next one") {
    TempDir d;
    check_success(train(tiny().flags() + "--val_every 2 --max_steps 6 --save_every 3 -o " + (d / "run")));
    const std::string best = read_file(d / "run/model.bin");
    How killed;
    killed.until = "step   12/1000 |", killed.signal = SIGKILL;
    const std::string flags = " --learning_rate 1 --max_steps 1000 --save_every 4 -o " + (d / "run");
    CHECK(train("--resume --val_tokens 20 --val_every 900" + flags, killed).code == 128 + SIGKILL);
    CHECK((read_file(d / "run/model.bin") == best));
    Result r = train("--resume --val_every 2 --max_steps 20 -o " + (d / "run"));
    check_success(r);
    CHECK(contains(r.out, "model.bin was the best by the earlier validations"));
    CHECK((read_file(d / "run/previous/1/model.bin") == best));
    CHECK(train("--resume --val_every 2 --max_steps 22 -o " + (d / "run")).code == 0);
    CHECK(!file_exists(d / "run/previous/2"));
}

TEST_CASE("cli: --resume on other tokens for validation changes no checkpoint before it has validated") {
    TempDir d;
    const std::string again = "--resume -o " + (d / "run");
    check_success(train(tiny().flags() + "--val_every 2 --max_steps 6 --save_every 3 -o " + (d / "run")));
    const std::string best = read_file(d / "run/model.bin"), state = read_file(d / "run/state_00000006.bin");
    Result r = train(again + " --val_tokens 20");  // nothing to do
    check_success(r);
    CHECK(contains(r.out, "no longer counts"));
    CHECK((read_file(d / "run/state_00000006.bin") == state));
    // Without validations the best model stays, and with the run's own tokens it counts again.
    check_success(train(again + " --val_tokens 20 --val_every 0 --learning_rate 1 --max_steps 8"));
    CHECK((read_file(d / "run/model.bin") == best));
    r = train(again + " --val_tokens 100000 --val_every 2 --max_steps 10");
    check_success(r);
    CHECK(!contains(r.out, "no longer counts"));
    CHECK(!contains(r.out, "best so far"));
    CHECK((read_file(d / "run/model.bin") == best));
    CHECK(!file_exists(d / "run/previous"));
}

TEST_CASE(
    "cli: other tokens for validation stay those of the run, even if it is killed before a checkpoint") {
    TempDir d;
    check_success(train(tiny().flags() + "--val_every 2 --max_steps 6 --save_every 3 -o " + (d / "run")));
    const std::string best = read_file(d / "run/model.bin");
    How killed;
    killed.until = "step   12/1000 |", killed.signal = SIGKILL;
    CHECK(
        train(
            "--resume --val_tokens 20 --val_every 2 --learning_rate 1 --max_steps 1000 --save_every 900 -o " +
                (d / "run"),
            killed)
            .code == 128 + SIGKILL);
    CHECK((read_file(d / "run/previous/1/model.bin") == best));
    Result r = train("--resume --max_steps 12 -o " + (d / "run"));
    check_success(r);
    CHECK(contains(r.out, "of which a validation predicts the first 20 ("));
    CHECK(!contains(r.out, "no longer counts"));
    CHECK(!file_exists(d / "run/previous/2"));
}

TEST_CASE("cli: a row of log.csv that was cut short tells nothing about the best loss") {
    TempDir d;
    const std::string again = "--resume --max_steps 9 -o " + (d / "run"), log = d / "run/log.csv";
    check_success(train(tiny().flags() + "--val_every 2 --max_steps 6 --save_every 3 -o " + (d / "run")));
    write_file(log, read_file(log) + "7,3.1,3.0,1");  // of 1.87, say
    Result r = train(again);
    check_success(r);
    CHECK(number_after(r.out, "Best validation loss ") > 1.5);
    CHECK(Log(d / "run").rows.size() == 10);
}

TEST_CASE("cli: without validations model.bin is the last model that was saved") {
    TempDir d;
    check_success(train(tiny().flags() + "--val_every 0 --max_steps 4 --save_every 2 -o " + (d / "run")));
    CHECK((read_file(d / "run/model.bin") == read_file(d / "run/model_00000004.bin")));
}

TEST_CASE("cli: a resumed run whose validation data are missing fails, but not with --val_every 0") {
    TempDir d;
    std::filesystem::copy(tiny().data, d / "data");
    check_success(train("--data " + (d / "data") + MODEL + "--max_steps 2 -o " + (d / "run")));
    std::filesystem::remove(d / "data/val.bin");
    std::string again = "--resume --max_steps 4 -o " + (d / "run");
    check_failure(train(again), "train_gpt2", 1, {(d / "data/val.bin: not found"), "--val_every 0 goes on"});
    check_success(train(again + " --val_every 0"));
}

TEST_CASE("cli: a folder that holds a run is not overwritten without --overwrite") {
    TempDir d;
    std::string flags = tiny().flags() + "-o " + (d / "run");
    check_success(train(flags + " --max_steps 8"));
    auto before = contents_of(d / "run");
    check_failure(train(flags + " --max_steps 4"), "train_gpt2", 1, {d / "run", "--resume", "--overwrite"});
    CHECK(contents_of(d / "run") == before);
    check_success(train(flags + " --max_steps 4 --overwrite"));
    CHECK(with_prefix(d / "run", "state_").back() == "state_00000004.bin");  // none of the old run's is left
    CHECK(Log(d / "run").rows.size() == 5);
}

TEST_CASE("cli: a new run that fails leaves the earlier one; with a model it moves it to previous") {
    TempDir d;
    std::string out = d / "run", flags = tiny().flags() + "--val_every 0 --save_every 0 -o " + out + " -e " +
                                         out + "/model.bin ";
    check_success(train(tiny().flags() + "--max_steps 6 --save_every 3 -o " + out));
    auto before = contents_of(out);
    // Its source is the model that it replaces; it diverges before its first model.
    Result r =
        train(flags +
              "--overwrite --max_steps 30 --learning_rate 1000 --warmup_steps 0 --grad_clip 0 --dtype fp32");
    check_failure(r, "train_gpt2", 1, {"training stops before it spoils a checkpoint"});
    auto after = contents_of_files(out);
    after.erase(".arapoet.lock");
    CHECK(after == before);
    // The data of a resumed run are still found.
    check_success(train("--resume --max_steps 8 -o " + out));
    before = contents_of_files(out);
    r = train(flags + "--overwrite --max_steps 2");
    check_success(r);
    CHECK(contains(r.out, "the run that is there moves to previous/ when this one has a model"));
    CHECK(contains(r.out, "the earlier run is now in " + out + "/previous/1/ ("));
    CHECK(contents_of_files(out + "/previous/1") == before);
    CHECK(Log(out).rows.size() == 2);
    CHECK(with_prefix(out, "state_") == Strings{"state_00000002.bin"});
    check_success(train("--resume --max_steps 3 -o " + out));
}

TEST_CASE("cli: a prompt that cannot be used is refused at the start; closed output ends nothing") {
    const Fixture& f = tiny();
    TempDir d;
    std::string flags =
        "--data " + f.data + " --depth 1 --heads 2 --channels 16 --seq_len 16 --batch_size 4 --max_steps 4";
    check_failure(train(flags + " --prompt xyz -o " + (d / "a")), "train_gpt2", 2,
                  {"--prompt: character 'x'", "is not among those that the poems have"});
    Strings w = words("./train_gpt2 " + flags + " -o " + (d / "a"));
    w.push_back("--prompt"), w.push_back("قفا نبك من ذكرى حبيب");
    check_failure(run(w), "train_gpt2", 2, {"--prompt has 21 tokens", "the context takes 16"});
    CHECK(!file_exists(d / "a"));
    for (const char* to : {" >/dev/full", " | head -n 1", " | true"}) {
        INFO(std::string(to));
        std::string out = d / "closed";
        std::filesystem::remove_all(out);
        Result r = run(
            {"/bin/bash", "-c", "set -o pipefail; ./train_gpt2 " + flags + " --log_every 1 -o " + out + to});
        CHECK(r.code == 0);
        CHECK(loads_and_is_finite(out + "/model_00000004.bin"));
        CHECK(contains(read_file(out + "/main.log"), "s:3 trl:"));
        if (contains(to, "full")) CHECK(contains(r.err, "training goes on, see " + out + "/main.log"));
    }
}

TEST_CASE("cli: SIGHUP saves and says how to go on, but not under nohup") {
    TempDir d;
    std::string flags = tiny().flags() + "--max_steps 400 --val_every 0 --save_every 0 -o ";
    How how;
    how.until = "step  15/400 |", how.signal = SIGHUP;
    Result r = train(flags + (d / "a"), how);
    check_success(r);
    CHECK(contains(r.out, "stopped by SIGHUP after step "));
    CHECK(with_prefix(d / "a", "state_").size() == 1);
    r = run({"/bin/sh", "-c", "trap '' HUP; exec ./train_gpt2 " + flags + (d / "b")}, how);
    check_success(r);
    CHECK(contains(r.out, "400 steps in "));
}

TEST_CASE("cli: a resumed run hears its flags: what may change does, the rest is a usage error") {
    const Fixture& f = tiny();
    TempDir d;
    std::string out = d / "run", again = "--resume -o " + out + " ";
    std::filesystem::copy(f.data, d / "data");
    check_success(train("--data " + (d / "data") + MODEL + "--max_steps 4 --lr_schedule cosine -o " + out));
    std::filesystem::copy(out, d / "copy");
    std::string changed = read_file(d / "data/val.bin");
    changed[changed.size() - 2] = (char)(changed[changed.size() - 2] ? 0 : 1);  // another last token
    std::filesystem::rename(d / "data/val.bin", d / "val.bin"), write_file(d / "data/val.bin", changed);
    CHECK(contains(train("--resume --max_steps 5 -o " + (d / "copy")).out,
                   "the validation data are not those"));
    std::filesystem::rename(d / "val.bin", d / "data/val.bin");
    check_failure(train(again + "-e " + f.model), "train_gpt2", 2, {"--init_from does not go with --resume"});
    check_failure(train(again + "--overwrite"), "train_gpt2", 2, {"--overwrite does not go with --resume"});
    check_failure(train(again + "--preset char"), "train_gpt2", 2, {"--preset is char, the run has tiny"});
    check_failure(train(again + "--depth 2"), "train_gpt2", 2, {"--depth is 2, the run has 1"});
    check_failure(train(again + "--seq_len 8"), "train_gpt2", 2, {"--seq_len is 8, the run has 16"});
    Result r = train(again + "--max_steps 8 --depth 1");
    check_success(r);
    CHECK(contains(r.out, "changed          --max_steps 8 (the run had 4)\n"));
    CHECK(contains(r.out, "the learning rate was 0.000"));  // cosine now ends later
    CHECK(!contains(r.out, "--depth"));
    // The data have moved, and the new place is named; other data are said.
    std::filesystem::rename(d / "data", d / "moved");
    check_failure(train(again + "--max_steps 9"), "train_gpt2", 1,
                  {(d / "data") + "/train.bin: not found", "--data DIR"});
    r = train(again + "--max_steps 9 --data " + (d / "moved"));
    check_success(r);
    CHECK(contains(r.out, "training data    " + (d / "moved") + "/train.bin"));
    CHECK(!contains(r.out, "are not those of the run"));
    check_failure(train(again + "--max_steps 10 --data " + f.other), "train_gpt2", 1,
                  {f.other + "/tokenizer.bin: is not the tokenizer of the run"});
    write_file((d / "moved") + "/val.bin", read_file((d / "moved") + "/train.bin"));
    r = train(again + "--max_steps 10");
    check_success(r);
    CHECK(contains(r.out,
                   "the validation data are not those of the run, so the best loss so far no longer counts"));
    // From another folder, with nothing but the run's folder.
    r = run({"/bin/sh", "-c", "here=$PWD; cd / && $here/train_gpt2 --resume --max_steps 11 -o " + out});
    check_success(r);
    CHECK(contains(r.out, "11 steps in "));
    const std::string root = std::filesystem::current_path();
    CHECK(contains(r.out, "more poems: " + root + "/sample_gpt2 -e " + out + "/model.bin\n"));
    r = run({"/bin/sh", "-c", "cd " + d.path + " && " + root + "/train_gpt2 --data none"});
    check_failure(r, "train_gpt2", 1, {root + "/prepare_data " + root + "/data/sample_poems.csv -o none"});
}

TEST_CASE("cli: a default tokenizer that does not fit is left out; a named one is refused") {
    const Fixture& f = tiny();
    TempDir d;
    make_dirs(d / "alone"), make_dirs(d / "out/data");
    for (const char* name : {"train.bin", "val.bin"})
        std::filesystem::copy(f.data + "/" + name, (d / "alone/") + name);
    std::filesystem::copy(f.model, d / "alone/model.bin");
    std::filesystem::copy(f.other + "/tokenizer.bin", d / "out/data/tokenizer.bin");
    auto evaluate = [&](const std::string& more) {
        return run({"/bin/sh", "-c",
                    "here=$PWD; cd " + d.path +
                        " && $here/train_gpt2 --max_steps 0 -e alone/model.bin "
                        "-j alone/val.bin " +
                        more});
    };
    Result r = evaluate("");
    check_success(r);
    CHECK(contains(r.out, "out/data/tokenizer.bin is left out: it has "));
    CHECK(contains(r.out, "validation loss "));
    r = evaluate("--tokenizer out/data/tokenizer.bin");
    check_failure(r, "train_gpt2", 1, {"out/data/tokenizer.bin: has ", "has a vocabulary of "});
    std::filesystem::copy(f.data + "/tokenizer.bin", d / "alone/tokenizer.bin");
    r = evaluate("");
    check_success(r);
    CHECK(contains(r.out, "bits per character"));
    CHECK(!contains(r.out, "left out"));
}

TEST_CASE("cli: the user's files, the best model and a run's tokenizer are never replaced") {
    const Fixture& f = tiny();
    TempDir d;
    for (const char* name : {"lock", "thesis.tmp2024.docx", "notes.tmp99999"}) write_file(d / name, "mine");
    check_failure(train("--resume -o " + d.path), "train_gpt2", 1, {"holds no checkpoint"});
    check_success(train(f.flags() + "--max_steps 8 -o " + d.path));
    for (const char* name : {"lock", "thesis.tmp2024.docx", "notes.tmp99999"})
        CHECK(read_file(d / name) == "mine");
    // Without validations, and with others, the model that was measured to be the best is kept.
    std::string best = read_file(d / "model.bin");
    check_success(train("--resume --max_steps 10 --val_every 0 --learning_rate 1 -o " + d.path));
    CHECK((read_file(d / "model.bin") == best));
    Result r = train("--resume --max_steps 12 --val_every 2 --val_tokens 20 -o " + d.path);
    check_success(r);
    CHECK(contains(r.out, "validation now uses other tokens"));
    CHECK(contains(r.out, "model.bin was the best by the earlier validations; it is now " +
                              (d / "previous/1/model.bin")));
    CHECK((read_file(d / "previous/1/model.bin") == best));
    check_failure(prepare(f.other_csv + " -o " + d.path), "prepare_data", 1, {"holds a run whose tokenizer"});

    // A run that knew of no tokenizer, in a folder that has one now
    make_dirs(d / "data");
    for (const char* name : {"train.bin", "val.bin"})
        std::filesystem::copy(f.data + "/" + name, (d / "data/") + name);
    std::filesystem::copy(f.model, d / "data/model.bin");
    check_success(train("-e " + (d / "data/model.bin") + " --data " + (d / "data") +
                        " -b 4 --max_steps 2 -o " + (d / "bare")));
    REQUIRE(!file_exists(d / "bare/tokenizer.bin"));
    write_file(d / "bare/tokenizer.bin", "mine");
    r = train("--resume --max_steps 3 --tokenizer " + f.data + "/tokenizer.bin -o " + (d / "bare"));
    check_success(r);
    CHECK(contains(r.out,
                   "tokenizer.bin was another one, which is now " + (d / "bare/previous/1/tokenizer.bin")));
    CHECK(read_file(d / "bare/previous/1/tokenizer.bin") == "mine");
}

TEST_CASE("cli: a run whose folder was moved finds its own data, and not another run's") {
    const Fixture& f = tiny();
    TempDir d;
    std::string a = d / "a", b = d / "b", flags = std::string(MODEL) + "--max_steps 2 --overwrite -o " + a;
    for (const std::string& csv : {f.csv, f.other_csv}) {  // as make train does, twice
        check_success(prepare(csv + " -o " + a + "/.new/data"));
        check_success(train("--data " + a + "/.new/data" + flags));
    }
    check_success(train("--resume --max_steps 3 -o " + a + "/previous/1"));
    std::filesystem::rename(a, b);
    Result r = train("--resume --max_steps 3 -o " + b);
    check_success(r);
    CHECK(contains(r.out, "training data    " + b + "/data/train.bin"));
}

TEST_CASE("cli: a run whose folder is renamed while it trains goes on in the renamed folder") {
    TempDir d;
    Result r =
        run({"/bin/sh", "-c",
             "./train_gpt2 " + tiny().flags() + "--max_steps 3000 --log_every 3000 --save_every 1500 -o " +
                 (d / "run") + " & until grep -qs 's:20 trl' " + (d / "run/main.log") +
                 "; do sleep 0.01; done; mv " + (d / "run") + " " + (d / "moved") + "; wait $!"});
    check_success(r);
    const std::string now = std::filesystem::canonical(d / "moved");
    CHECK(contains(r.out, (d / "run") + " was moved; the run goes on in " + now + "\n"));
    CHECK(files_in(d.path) == std::set<std::string>{"moved"});
    CHECK(Log(d / "moved").rows.size() == 3001);
    CHECK(with_prefix(d / "moved", "state_") == Strings{"state_00001500.bin", "state_00003000.bin"});
    CHECK(!file_exists(d / "moved/.arapoet.lock"));
    check_success(train("--resume --max_steps 3001 -o " + (d / "moved")));
}

TEST_CASE("cli: fine-tuning never leaves a model worse than the one it started from") {
    const Fixture& f = tiny();
    TempDir d;
    Result r =
        train("-e " + f.model + " --data " + f.data +
              " -b 4 -s 0 --max_steps 3 --learning_rate 1 --warmup_steps 0 --val_every 1 -o " + (d / "run"));
    check_success(r);
    CHECK(contains(r.out, "Best validation loss"));
    CHECK(contains(r.out, "at step 0, kept in"));
    CHECK((read_file(d / "run/model.bin") == read_file(f.model)));
}

TEST_CASE("cli: a validation predicts --val_tokens tokens, the same for any batch size") {
    const Fixture& f = tiny();
    TempDir d;
    auto first_loss = [&](const std::string& more) {
        Result r =
            train("--data " + f.data + " --depth 1 --heads 2 --channels 16 --seq_len 16 -s 0 --max_steps 1 " +
                  more + " --overwrite -o " + (d / "run"));
        check_success(r);
        return std::make_pair(Log(d / "run").column("val_loss").at(0), r.out);
    };
    auto [whole, said] = first_loss("-b 4");
    CHECK(!contains(said, "of which a validation predicts"));
    auto [part, said_part] = first_loss("-b 4 --val_tokens 50");
    CHECK(contains(said_part, "of which a validation predicts the first 50 ("));
    CHECK(part != whole);
    CHECK(std::stod(first_loss("-b 3 --val_tokens 50").first) ==
          doctest::Approx(std::stod(part)).epsilon(1e-8));
    CHECK(first_loss("-b 4 -m 1").first == first_loss("-b 4 --val_tokens 64").first);
}

TEST_CASE("cli: --epochs counts passes over the tokens; --patience ends without a better loss") {
    const Fixture& f = tiny();
    TempDir d;
    TokenFile tokens(f.data + "/train.bin");
    int steps = (int)std::ceil(0.5 * (double)tokens.size() / 64);
    Result r = train("--data " + f.data + MODEL + "--epochs 0.5 -o " + (d / "a"));
    check_success(r);
    CHECK(contains(r.out, strf("%d steps in ", steps)));
    CHECK(contains(r.out, "0.5 epochs in this run"));
    check_failure(train("--data " + f.data + MODEL + "--epochs 1 --max_steps 5 -o " + (d / "b")),
                  "train_gpt2", 2, {"--epochs and --max_steps", "leave one of them out"});
    check_failure(train("--data " + f.data + MODEL + "--epochs 1e8 -o " + (d / "b")), "train_gpt2", 2,
                  {"--epochs 1e+08 is ", " steps, wanted at most 99999999"});
    check_failure(train("--data " + f.data + MODEL + "--patience 3 --val_every 0 -o " + (d / "b")),
                  "train_gpt2", 2, {"--patience 3: there are no validations, --val_every is 0"});
    check_failure(train("-i " + f.data + "/train.bin -j " + (d / "none.bin") + " --tokenizer " + f.data +
                        "/tokenizer.bin" + MODEL + "--patience 3 -o " + (d / "b")),
                  "train_gpt2", 1, {"none.bin: validation tokens not found"});
    make_dirs(d / "alone");
    for (const char* name : {"train.bin", "tokenizer.bin"})
        std::filesystem::copy(f.data + "/" + name, (d / "alone/") + name);
    check_failure(train("--data " + (d / "alone") + MODEL + "--patience 3 -o " + (d / "b")), "train_gpt2", 2,
                  {"--patience 3: there are no validations, " + (d / "alone/val.bin is missing")});
    // A learning rate at which the loss only grows after a few steps
    std::string flags =
        "--data " + f.data + MODEL + "--max_steps 200 --learning_rate 0.5 --warmup_steps 0 --val_every 2 ";
    r = train(flags + "--patience 3 -o " + (d / "c"));
    check_success(r);
    CHECK(contains(r.out, "ended by --patience 3: no better validation since step "));
    Log log(d / "c");
    int last = std::stoi(log.column("step").back()),
        best = (int)number_after(r.out, "better validation since step ");
    CHECK(last == best + 6);
    CHECK(loads_and_is_finite((d / "c") + strf("/model_%08d.bin", last)));
    CHECK(contains(r.out, strf("Best validation loss")));
    auto before = contents_of(d / "c");
    check_success(train("--resume -o " + (d / "c")));  // it has ended, and nothing changes
    CHECK(contents_of(d / "c") == before);
}

TEST_CASE("cli: -e d6 is a new model of that depth; shards with --shuffle 0 are read in order") {
    const Fixture& f = tiny();
    TempDir d;
    Result r = train("-e d6 --data " + f.data + " -t 32 -b 2 -s 0 --max_steps 1 -o " + (d / "a"));
    check_success(r);
    CHECK(contains(r.out, "6 layers, 6 heads, 384 channels, context 32"));
    CHECK(contains(r.out, "(random, seed 1337)"));
    check_failure(train("-e d12 --preset char --data " + f.data + " -o " + (d / "b")), "train_gpt2", 2,
                  {"--init_from d12 and --preset char"});
    TokenFile all(f.data + "/train.bin");
    std::vector<uint16_t> half[2];
    for (size_t i = 0; i < all.size(); i++) half[i >= all.size() / 2].push_back(all[i]);
    write_tokens(d / "train_0.bin", half[0]), write_tokens(d / "train_1.bin", half[1]);
    std::string flags =
        " -j " + f.data + "/val.bin --tokenizer " + f.data + "/tokenizer.bin" + MODEL + "--max_steps 3 -o ";
    check_success(train("-i " + f.data + "/train.bin --shuffle 0" + flags + (d / "one")));
    check_success(train("-i " + (d / "train_*.bin") + " --shuffle 0" + flags + (d / "two")));
    check_same_run(d / "one", d / "two", 3);
    check_success(train("-i " + f.data + "/train.bin" + flags + (d / "shuffled")));
    CHECK(Log(d / "shuffled").losses() != Log(d / "one").losses());
}

TEST_CASE("cli: fine-tuning starts from the checkpoint's weights and shape") {
    const Fixture& f = tiny();
    TempDir d;
    check_success(train("--data " + f.data + " -e " + f.model +
                        " --batch_size 4 -s 0 --max_steps 3 --val_batches 0 -o " + (d / "tuned")));
    double start = std::stod(Log(d / "tuned").column("val_loss").front());
    double of_model =
        number_before(train("--max_steps 0 --data " + f.data + " -e " + f.model).out, " nats per token");
    CHECK(std::abs(start - of_model) < 2e-6 * (1 + of_model));
    CHECK(ModelReader((d / "tuned") + "/model.bin").cfg.same_shape(ModelReader(f.model).cfg));
}

TEST_CASE(
    "cli: a large model is fine-tuned at 3e-5, with 32 batches of 4 a step; a small one by Muon at 1e-3") {
    const Fixture& f = tiny();
    TempDir d;
    Result small = train("--data " + f.data + " -e " + f.model + " -s 0 --max_steps 3 -o " + (d / "small"));
    check_success(small);
    CHECK(contains(small.out, "learning rate    0.001, cosine to 0.0001, warm-up 0 steps\n"));
    CHECK(contains(small.out, "Muon             the blocks' matrices, learning rate 0.005,"));
    check_success(
        train("--data " + f.data +
              " --depth 1 --heads 1 --channels 516 --seq_len 4 --batch_size 1 -s 0 --max_steps 1 -o " +
              (d / "wide")));
    Result wide = train("--data " + f.data + " -e " + (d / "wide") + "/model.bin -s 0 --max_steps 1 -o " +
                        (d / "tuned"));
    check_success(wide);
    CHECK(contains(wide.out, "batch            4 x 4 tokens, 32 accumulated: 512 a step\n"));
    CHECK(contains(wide.out, "learning rate    3e-05, constant to 3e-05, warm-up 0 steps\n"));
    CHECK(!contains(wide.out, "Muon  "));
    for (const std::string& lr : Log(d / "tuned").column("lr")) CHECK((lr.empty() || std::stof(lr) == 3e-5f));
}

// ---------------------------------------------------------------------------------------------
// When training goes wrong

TEST_CASE("cli: a loss that is no number stops training before it spoils a checkpoint") {
    for (const char* absurd : {"--learning_rate 1e3 --grad_clip 0",
                               "--learning_rate 1e3 --grad_clip 0 --save_every 1 --val_every 0",
                               "--learning_rate 1e3 --weight_decay 1e3 --save_every 1 --val_every 0"}) {
        CAPTURE(std::string(absurd));
        TempDir d;
        Result r = train(tiny().flags() + "--max_steps 60 --keep 1 -o " + (d / "run") + " " + absurd);
        check_failure(r, "train_gpt2", 1, {"step ", "--learning_rate"});
        CHECK((contains(r.err, "NaN") || contains(r.err, "infinite") || contains(r.err, "not a number")));
        for (const std::string& name : with_prefix(d / "run", "model"))
            CHECK(loads_and_is_finite((d / "run") + "/" + name));
        CHECK(with_prefix(d / "run", "model_").size() == with_prefix(d / "run", "state_").size());
        CHECK(!holds_temporary_file(d / "run"));
    }
}

TEST_CASE("cli: no setting makes a run that claims success and leaves a model that cannot be loaded") {
    for (const char* odd :
         {"--eps 0", "--eps 0 --val_every 0", "--beta1 0 --beta2 0", "--learning_rate 1e-30",
          "--grad_clip 1e-30", "--dropout 0.99", "--learning_rate 1e3 --weight_decay 0",
          "--learning_rate 30 --grad_clip 0 --warmup_steps 0"}) {
        CAPTURE(std::string(odd));
        TempDir d;
        Result r = train(tiny().flags() + "--max_steps 3 --save_every 1 -o " + (d / "run") + " " + odd);
        CHECK((r.code == 0 || lines(r.err).size() == 1));
        if (!file_exists(d / "run")) continue;
        for (const std::string& name : with_prefix(d / "run", "model"))
            CHECK(loads_and_is_finite((d / "run") + "/" + name));
        if (r.code == 0) check_success(sample("-e " + (d / "run") + "/model.bin --tokens 5"));
    }
}

TEST_CASE("cli: a disk that is full while saving leaves the old checkpoint whole; the run goes on") {
    // 24 KB a model, 46 KB a state: the first limit stops model.bin, the second the state.
    for (rlim_t limit : {10000, 30000}) {
        CAPTURE(limit);
        TempDir d;
        std::string flags = tiny().flags() + "--max_steps 8 --val_every 2 --save_every 4 -o ";
        check_success(train(flags + (d / "whole")));
        check_success(train(flags + (d / "run") + " --lr_schedule cosine --max_steps 8"));
        for (const char* kind : {"model", "state"})
            std::filesystem::remove((d / "run") + "/" + kind + "_00000008.bin");
        auto before = contents_of(d / "run");
        How how;
        how.file_limit = limit;
        std::string again = "--resume -o " + (d / "run");
        Result r = train(again, how);
        check_failure(r, "train_gpt2", 1, {d / "run", "cannot write", strerror(EFBIG)});
        CHECK(!holds_temporary_file(d / "run"));
        for (const char* name : {"model_00000004.bin", "state_00000004.bin"})
            CHECK(read_file((d / "run") + "/" + name) == before[name]);
        CHECK(loads_and_is_finite((d / "run") + "/model.bin"));
        CHECK(with_prefix(d / "run", "model_") ==
              Strings{"model_00000004.bin"});                                // no half of a new checkpoint
        if (limit == 10000) CHECK(!contains(lines(r.out).back(), "saved"));  // nor the claim of one
        check_success(train(again));
        check_same_run(d / "run", d / "whole", 8);
    }
}

TEST_CASE("cli: a log cut off by a full disk costs no validation; a full disk later, no checkpoint") {
    TempDir d;
    auto check_each_step_is_logged_once = [](const std::string& folder) {
        Strings steps = Log(folder).column("step");
        CHECK(steps.back() == "240");
        for (size_t i = 1; i < steps.size(); i++) CHECK(std::stoi(steps[i]) == std::stoi(steps[i - 1]) + 1);
        Strings losses = with_line(read_file(folder + "/main.log"), " trl:");
        REQUIRE(losses.size() == 240);
        for (size_t i = 0; i < losses.size(); i++) CHECK(losses[i].find(strf("s:%zu trl:", i)) == 0);
    };
    const std::string out = d / "run", again = "--resume -o " + out;
    // The model and its state are so small that the log is what does not fit.
    std::string flags = "--data " + tiny().data +
                        " --depth 1 --heads 1 --channels 4 --seq_len 16 --batch_size 1 --sample_every 0 "
                        "--max_steps 240 --val_every 1 --val_batches 2 --save_every 0 -o ";
    check_success(train(flags + (d / "whole")));
    How how;
    how.file_limit = 15000;
    check_failure(train(flags + out, how), "train_gpt2", 1, {out + "/log.csv: cannot write"});
    REQUIRE(with_prefix(out, "state_").size() == 1);
    const std::string state = out + "/" + with_prefix(out, "state_")[0],
                      model = out + "/" + with_prefix(out, "model_")[0], before = read_file(state);
    REQUIRE(state != out + "/state_00000240.bin");
    std::filesystem::copy(out, d / "copy");
    check_success(train(again));
    check_same_run(out, d / "whole", 240);
    // Without the logs, the same step is validated and saved once more, and now the state does not fit.
    std::filesystem::remove_all(out), std::filesystem::rename(d / "copy", out);
    for (const char* log : {"/log.csv", "/main.log"}) std::filesystem::remove(out + log);
    how.file_limit = before.size() - 1;
    check_failure(train(again + " --save_every 1", how), "train_gpt2", 1, {state + ": cannot write"});
    CHECK((read_file(state) == before));
    CHECK(file_exists(model));
    write_file(out + "/main.log", read_file((d / "whole") + "/main.log"));
    check_success(train(again));
    check_each_step_is_logged_once(out);
    // The row that did not fit is written when the run is resumed, in both logs, validated or not.
    for (const char* every : {" --val_every 0", " --val_every 7"})
        for (rlim_t limit : {before.size() + 1500, before.size() + 3000}) {
            std::filesystem::remove_all(out);
            how.file_limit = limit;
            check_failure(train(flags + out + every, how), "train_gpt2", 1, {": cannot write"});
            check_success(train(again));
            check_each_step_is_logged_once(out);
        }
}

TEST_CASE("cli: prepare_data on a full disk leaves the old files as they were") {
    TempDir d;
    check_success(prepare(tiny().other_csv + " -o " + (d / "data")));
    auto before = contents_of(d / "data");
    How how;
    for (rlim_t limit : {500, 1100, 3000}) {
        how.file_limit = limit;
        check_failure(prepare(tiny().csv + " -o " + (d / "data"), how), "prepare_data", 1,
                      {d / "data", "cannot write"});
        CHECK(contents_of(d / "data") == before);
    }
}

TEST_CASE("cli: output that cannot be written is an error, not a success") {
    if (!file_exists("/dev/full")) return skip("/dev/full: not found");
    const Fixture& f = tiny();
    TempDir d;
    for (const std::string& command :
         {"./sample_gpt2 -e " + f.model, "./prepare_data " + f.csv + " -o " + (d / "data"),
          std::string("./train_gpt2 --help")}) {
        INFO(command);
        Result r = run({"/bin/sh", "-c", command + " > /dev/full"});
        CHECK(r.code == 1);
        CHECK(contains(r.err, strerror(ENOSPC)));
    }
}

// ---------------------------------------------------------------------------------------------
// Mistakes

TEST_CASE("cli: a mistake on the command line is named, with what was wanted, and exits with 2") {
    const Fixture& f = tiny();
    struct {
        const char* flags;
        Strings parts;
    } cases[] = {
        {"--nonsense 1", {"--nonsense", "--help"}},
        {"--batchsize 1", {"--batchsize", "did you mean --batch_size?"}},
        {"--learning-rates 1", {"did you mean --learning_rate?"}},
        {"-Z 1", {"-Z", "--help"}},
        {"-z 1", {"--zero_stage 1", "on the CPU"}},
        {"--gpus 2", {"--gpus", "train_gpt2cu"}},
        {"--device 1", {"--device", "train_gpt2cu"}},
        {"poems.csv", {"'poems.csv'", "--help"}},
        {"--max_steps", {"--max_steps needs a value"}},
        {"-x", {"-x needs a value"}},
        {"--max_steps ten", {"--max_steps", "'ten'", "whole number"}},
        {"--max_steps 1.5", {"--max_steps", "'1.5'", "whole number"}},
        {"--max_steps=", {"--max_steps", "''"}},
        {"--batch_size 4x", {"--batch_size", "'4x'"}},
        {"--learning_rate fast", {"--learning_rate", "'fast'", "not a number"}},
        {"--learning_rate nan", {"--learning_rate", "'nan'"}},
        {"--learning_rate 1e99", {"--learning_rate", "'1e99'"}},
        {"--batch_size 0x10", {"--batch_size", "'0x10'"}},
        {"--batch_size -3", {"--batch_size", "-3", "wanted 1 to 16777216"}},
        {"--batch_size 99999999999999999999", {"--batch_size", "99999999999999999999", "wanted"}},
        {"--seed -1", {"--seed", "-1", "wanted"}},
        {"--keep 0", {"--keep", "0", "wanted 1 to 1048576"}},
        {"--dropout 1.5", {"--dropout", "1.5", "wanted 0 to 0.99"}},
        {"--resume=maybe", {"--resume", "'maybe'", "0", "1"}},
        {"--preset huge", {"--preset", "'huge'", "tiny", "char", "gpt2-xl"}},
        {"--lr_schedule cosin", {"--lr_schedule", "'cosin'", "constant", "cosine", "linear", "wsd"}},
        {"--activation relu", {"--activation", "'relu'", "gelu"}},
        {"--depth -1", {"--depth", "-1", "wanted 1 to 4096"}},
        {"--seq_len -5", {"--seq_len", "-5", "wanted 1 to"}},
        {"--channels 17", {"--channels", "17", "multiple of", "--heads", "2"}},
        {"--total_batch_size 100", {"--total_batch_size", "100", "multiple of", "64"}},
        {"--val_batches 1 --val_tokens 9", {"--val_batches and --val_tokens", "leave one of them out"}},
        {"--batch_size 16777215 --seq_len 1000000", {"--batch_size", "--seq_len", "16777215", "1000000"}},
    };
    TempDir d;
    for (auto& c : cases) {
        CAPTURE(std::string(c.flags));
        Result r = train(f.flags() + " -o " + (d / "run") + " --max_steps 1 " + c.flags);
        check_failure(r, "train_gpt2", 2, c.parts);
        CHECK(r.out == "");
        CHECK(r.err.size() < 300);
    }
    CHECK(!contains(train(f.flags() + "--batch_size 16777215 --seq_len 1000000").err,
                    "total_batch_size"));  // which nobody gave
    check_failure(run({"./train_gpt2", "--data", f.data, "-o", ""}), "train_gpt2", 2, {"--out is empty"});
    check_failure(sample("--nonsense"), "sample_gpt2", 2, {"--nonsense"});
    check_failure(sample("--temprature 1"), "sample_gpt2", 2, {"did you mean --temperature?"});
    for (const char* bad : {"--tokens 0", "--num 0", "--temperature -1", "--top_k -1", "--top_p 0",
                            "--top_p 1.5", "--threads -1"})
        check_failure(sample("-e " + f.model + " " + bad), "sample_gpt2", 2,
                      {words(bad)[0], words(bad)[1], "wanted"});
    check_failure(prepare(""), "prepare_data", 2, {"--help"});
    check_failure(prepare(f.csv), "prepare_data", 2, {"-o DIR"});
    for (const char* bad : {"--format xml", "--layout prose", "--keep none", "--on_error panic"})
        check_failure(prepare(f.csv + " -o " + (d / "data") + " " + bad), "prepare_data", 2,
                      {words(bad)[0], "'" + words(bad)[1] + "'", "known are"});
    check_failure(prepare(f.csv + " -o " + (d / "data") + " --val_fraction 1"), "prepare_data", 2,
                  {"--val_fraction", "1", "wanted"});
    CHECK(files_in(d.path).empty());
}

TEST_CASE("cli: poems that cannot be read are named, with what is wrong") {
    TempDir d;
    write_file(d / "empty.csv", "");
    write_file(d / "bad.csv", "poem_text\nقف\xD9 نبك\n");
    write_file(d / "latin.csv", "poem_text\nabc\n");
    write_file(d / "binary.csv", std::string("\x1f\x8b\x08\xff\x00\x01\x1b[31m,\x80\n\x02", 16));
    write_file(d / "open.csv", "poem_text\n\"قفا\n");
    struct {
        std::string flags;
        Strings parts;
    } cases[] = {
        {d / "missing.csv", {d / "missing.csv", "No such file"}},
        {d / "empty.csv", {d / "empty.csv", "is empty"}},
        {d.path, {d.path + "/bad.csv", "invalid UTF-8"}},  // the first file of the folder
        {d / "bad.csv", {d / "bad.csv", "invalid UTF-8 at byte 14", "0xD9", "line 2", "--on_error skip"}},
        {d / "latin.csv", {"nothing is left", "1 empty", "--keep all"}},
        {d / "binary.csv", {d / "binary.csv", "compressed with gzip", "gunzip -k"}},
        {d / "open.csv", {d / "open.csv", "line 2", "quote"}},
        {tiny().csv + " --column verse", {tiny().csv, "no column 'verse'", "'id', 'poet', 'poem_text'"}},
        {tiny().csv + " --tokenizer " + (d / "none"), {d / "none", "No such file"}},
        {tiny().csv + " --tokenizer " + tiny().other + "/tokenizer.bin",
         {tiny().other + "/tokenizer.bin", "U+"}},
    };
    for (auto& c : cases) {
        CAPTURE(std::string(c.flags));
        Result r = prepare(c.flags + " -o " + (d / "data"));
        check_failure(r, "prepare_data", 1, c.parts);
        CHECK(!contains(r.err, "\x1b"));
        CHECK(!file_exists(d / "data"));
    }
    check_failure(prepare(tiny().csv + " -o " + (d / "empty.csv") + "/data"), "prepare_data", 1,
                  {d / "empty.csv", "folder"});
}

TEST_CASE("cli: data and checkpoints that do not fit are named, with found and wanted") {
    const Fixture& f = tiny();
    TempDir d;
    write_file(d / "file", "");
    write_file(d / "poem.csv", "poem_text\nقفا نبك\n");
    prepare((d / "poem.csv") + " -o " + (d / "short"));
    write_tokens(d / "alien.bin", std::vector<uint16_t>(200, 5000));
    std::string val = read_file(f.data + "/val.bin");
    write_file(d / "cut.bin", val.substr(0, val.size() - 1));
    int vocabulary = Tokenizer::load(f.data + "/tokenizer.bin").vocab_size(),
        fewer = Tokenizer::load(f.other + "/tokenizer.bin").vocab_size();
    std::string run = f.flags() + "--max_steps 2 -o " + (d / "run") + " ",
                tune = "--data " + f.data + " --max_steps 2 -o " + (d / "run") + " -e " + f.model + " ";
    struct {
        std::string flags;
        Strings parts;
    } cases[] = {
        {run + "--data /nowhere", {"/nowhere/train.bin", "not found", "./prepare_data"}},
        {run + "-i /nowhere/a.bin", {"/nowhere/a.bin"}},
        {run + "-j /nowhere/b.bin", {"/nowhere/b.bin"}},
        {run + "--tokenizer /nowhere/c.bin", {"/nowhere/c.bin"}},
        {run + "-i " + (d / "file"), {d / "file", "0 bytes"}},
        {run + "-i " + f.csv, {f.csv, "magic number", "wanted 20240520"}},
        {run + "-j " + (d / "cut.bin"), {d / "cut.bin", "truncated"}},
        {run + "--data " + (d / "short"),
         {(d / "short") + "/train.bin", "shorter than one window", "8 tokens", "17"}},
        {run + "-i " + (d / "alien.bin"),
         {d / "alien.bin", "token 5000", "position 0", std::to_string(vocabulary)}},
        {run + "-j " + (d / "alien.bin"),
         {d / "alien.bin", "token 5000", "position 0", std::to_string(vocabulary)}},
        {run + "--tokenizer " + f.other + "/tokenizer.bin",
         {f.data + "/train.bin", "token ", std::to_string(fewer)}},
        {run + "--tokenizer " + f.csv, {f.csv, "not a tokenizer file"}},
        {tune + "--depth 3", {f.model, "depth 1", "--depth", "3"}},
        {tune + "--heads 4", {f.model, "heads 2", "--heads", "4"}},
        {tune + "--channels 32", {f.model, "channels 16", "--channels", "32"}},
        {tune + "--seq_len 17", {f.model, "16", "--seq_len", "17"}},
        {tune + "--activation gelu", {f.model, "gelu_new", "--activation"}},
        {tune + "--preset char", {f.model, "--preset"}},
        {tune + "--data " + f.other,
         {f.other + "/tokenizer.bin", std::to_string(fewer), f.model, std::to_string(vocabulary)}},
        {tune + "-e " + f.csv, {f.csv, "not a model file", "magic number"}},
        {tune + "-e /nowhere/model.bin", {"/nowhere/model.bin", "No such file"}},
        {run + "-o " + (d / "file") + "/run", {d / "file", "folder"}},
        {run + "-o " + (d / "file"), {d / "file", "folder"}},
    };
    for (auto& c : cases) {
        CAPTURE(std::string(c.flags));
        Result r = train(c.flags);
        // A flag that the checkpoint contradicts is a mistake on the command line.
        const bool size =
            !c.parts.empty() && c.parts[0] == f.model && c.flags.find(" -e " + f.csv) == std::string::npos;
        check_failure(r, "train_gpt2", size ? 2 : 1, c.parts);
        CHECK(r.out == "");
        CHECK(!file_exists(d / "run"));
    }
}

TEST_CASE("cli: a model or batch that no machine holds is refused at once, without taking the memory") {
    TempDir d;
    std::string run = "--data " + tiny().data + " -s 0 --max_steps 1 -o " + (d / "run") + " ";
    for (const char* huge : {"--depth 4000 --heads 4 --channels 100000 --seq_len 16",
                             "--depth 4096 --heads 4096 --channels 131072 --seq_len 1048576 --batch_size 1",
                             "--depth 4096 --heads 1 --channels 131072 --seq_len 16 --batch_size 1048576",
                             "--seq_len 16 --batch_size 16777215 --depth 4096"}) {
        CAPTURE(std::string(huge));
        Result r = train(run + huge);
        check_failure(r, "train_gpt2", 1, {"memory", "iB"});
        CHECK(r.peak_kib < 300000);
        CHECK(!file_exists(d / "run"));
    }
    for (const char* impossible : {"--depth 2000000000", "--channels 2000000000", "--heads 2000000000",
                                   "--seq_len 2000000000", "--batch_size 16777216 --seq_len 1048576"}) {
        CAPTURE(std::string(impossible));
        Result r = train(run + impossible);
        check_failure(r, "train_gpt2", 2, {words(impossible)[0], words(impossible)[1]});
        CHECK(r.peak_kib < 300000);
    }
}

TEST_CASE("cli: a batch larger than the memory is refused with the largest that fits") {
    std::string run =
        "--data " + tiny().data + " --seq_len 16 --recompute 0 --max_steps 1 -o /nowhere/run --batch_size ";
    Result r = train(run + "16000000 --depth 1024");
    check_failure(r, "train_gpt2", 1, {"memory", "free", "would fit"});
    double fits = number_after(r.err, "--batch_size ");
    CHECK(fits >= 1);
    CHECK(fits < 16000000);
    // Twice as much does not fit, so that what was named is the largest, give or take what else runs here.
    Result twice = train(run + strf("%.0f --depth 1024", 2 * fits + 1));
    check_failure(twice, "train_gpt2", 1, {"memory", "would fit"});
    CHECK(number_after(twice.err, "--batch_size ") < 1.5 * fits + 1);
}

TEST_CASE("cli: GPT-2 124M takes the memory it announces, within 5%; 4 GB with --recompute 3") {
#ifdef __SANITIZE_ADDRESS__
    return skip("a sanitizer takes memory of its own");
#endif
    TempDir d;
    Strings tokens;  // bytes, then pairs of bytes: as many as GPT-2 has
    for (int t = 0; t < 50256; t++)
        tokens.push_back(t < 256 ? Strings::value_type(1, (char)t)
                                 : std::string{(char)((t - 256) >> 8), (char)t});
    tokens.push_back("<|endoftext|>");
    Tokenizer::byte_bpe(tokens, 50256, false, "test").save(d / "tokenizer.bin");
    std::vector<uint16_t> text(1025);
    for (size_t i = 0; i < text.size(); i++) text[i] = (uint16_t)(i * 7919 % 50257);
    write_tokens(d / "train.bin", text);
    for (int recompute : {0, 3}) {
        How how;  // killed after the second step, the first to touch all memory: the checkpoint of 2 GB need
                  // not be written
        how.until = "step 2/3 |", how.signal = SIGKILL, how.seconds = 600;
        Result r = train("--data " + d.path +
                             " --preset gpt2 --batch_size 1 --max_steps 3 --sample_every 0 --recompute " +
                             std::to_string(recompute) + " -o " + (d / "run") + " --overwrite",
                         how);
        if (r.code == 1 && contains(r.err, "are free")) return skip(r.err.substr(0, r.err.size() - 1));
        CAPTURE(r.err);
        REQUIRE(r.code == 128 + SIGKILL);
        CHECK(contains(r.out, "124,475,904"));
        double announced = number_after(r.out, "\nmemory") * (1 << 20),
               found = (double)r.max_rss_kib;  // printed in GiB
        CHECK(contains(r.out, strf("%.1f GiB: parameters", announced / (1 << 20))));
        printf("GPT-2 124M, 1 x 1024 tokens, --recompute %d: %.2f GiB announced, %.2f GiB taken\n", recompute,
               announced / (1 << 20), found / (1 << 20));
        CHECK(found == doctest::Approx(announced).epsilon(0.05));
        if (recompute) CHECK(found * 1024 < 4e9);
    }
}

// ---------------------------------------------------------------------------------------------
// Sampling

TEST_CASE("cli: the same seed writes the same poem, on any number of threads; another seed another") {
    std::string flags = "-e " + tiny().model + " --tokens 60 --ignore_end";
    Result a = sample(flags + " --seed 7"), b = sample(flags + " --seed 7"), c = sample(flags + " --seed 8");
    check_success(a);
    CHECK(a.out == b.out);
    CHECK(a.out != c.out);
    for (const char* threads : {" --threads 1", " --threads 2"})
        CHECK(sample(flags + " --seed 7" + threads).out == a.out);
}

TEST_CASE("cli: --num 3 writes three poems, the first as if alone") {
    std::string flags = "-e " + tiny().model + " --tokens 40 --seed 7";
    Result one = sample(flags, "قفا"), three = sample(flags + " --num 3", "قفا");
    check_success(one), check_success(three);
    std::string text = three.out;
    Strings poems;
    for (int i = 1; i <= 3; i++) {
        std::string title = strf("--- %d ---\n", i);
        size_t at = text.find(title);
        REQUIRE(at != std::string::npos);
        if (i > 1) poems.push_back(text.substr(0, at));
        text = text.substr(at + title.size());
    }
    poems.push_back(text);
    CHECK(!contains(text, "---"));
    CHECK(poems[0] == one.out + "\n");  // an empty line before the next title
    for (const std::string& p : poems) CHECK(p.compare(0, strlen("قفا"), "قفا") == 0);
    CHECK(poems[0] != poems[1]);
    CHECK(poems[1] != poems[2] + "\n");
}

TEST_CASE("cli: the poem begins with the prompt, is valid UTF-8, and as long as asked for") {
    std::string flags = "-e " + tiny().model + " --ignore_end --temperature 0.5 --tokens ",
                longest = sample(flags + "60", "قفا نبك").out;
    for (int tokens : {1, 2, 3, 20, 59}) {  // the context has 16
        Result r = sample(flags + std::to_string(tokens), "قفا نبك");
        check_success(r);
        CHECK(utf8::find_invalid(r.out) == std::string::npos);
        REQUIRE(r.out.compare(0, strlen("قفا نبك"), "قفا نبك") == 0);
        CHECK(r.out.back() == '\n');
        r.out.pop_back();
        CHECK(longest.compare(0, r.out.size(), r.out) == 0);
        if (!contains(r.out, "\n\n")) CHECK(utf8::count(r.out) == 7 + (size_t)tokens);
    }
}

TEST_CASE("cli: temperature 0 does not depend on the seed, and --top_k 1 is the same") {
    std::string flags = "-e " + tiny().model + " --tokens 30";
    Result a = sample(flags + " --temperature 0 --seed 1", "نبك");
    check_success(a);
    CHECK(sample(flags + " --temperature 0 --seed 2", "نبك").out == a.out);
    CHECK(sample(flags + " --top_k 1 --seed 3", "نبك").out == a.out);
    CHECK(sample(flags + " --top_k 1 --temperature 5 --seed 4", "نبك").out == a.out);
    CHECK(sample(flags + " --top_p 1e-6 --seed 5", "نبك").out == a.out);
}

TEST_CASE("cli: a prompt, model or tokenizer that sample_gpt2 cannot use is named") {
    const Fixture& f = tiny();
    TempDir d;
    write_file(d / "model.bin", read_file(f.model));
    std::string model = read_file(f.model);
    write_file(d / "cut.bin", model.substr(0, model.size() / 2));
    struct {
        std::string flags, prompt;
        Strings parts;
    } cases[] = {
        {"-e " + f.model, "قفاx", {"'x' U+0078", "byte 6"}},
        {"-e " + f.model, "\u0638", {"'\u0638' U+0638", "byte 0"}},
        {"-e " + f.model, "قف\xD9", {"invalid UTF-8 at byte 4"}},
        {"-e " + f.model, "قفا نبك من ذكرى حبيب ومنزل", {"prompt", "26", "15"}},
        {"-e " + (d / "model.bin"), "", {d / "tokenizer.bin", "not found", "--tokenizer"}},
        {"-e " + f.model + " --tokenizer " + (d / "none"), "", {d / "none", "not found"}},
        {"-e " + f.model + " --tokenizer " + f.csv, "", {f.csv, "not a tokenizer file"}},
        {"-e " + f.model + " --tokenizer " + f.other + "/tokenizer.bin",
         "",
         {f.other + "/tokenizer.bin", f.model, "vocabulary"}},
        {"-e " + (d / "none"), "", {d / "none", "No such file"}},
        {"-e " + (d / "cut.bin"), "", {d / "cut.bin", "truncated"}},
        {"-e " + f.csv, "", {f.csv, "not a model file"}},
    };
    for (auto& c : cases) {
        CAPTURE(std::string(c.flags));
        Result r = sample(c.flags, c.prompt);
        check_failure(r, "sample_gpt2", c.prompt.empty() ? 1 : 2, c.parts);
        CHECK(r.out == "");
    }
}

TEST_CASE("cli: a model learns tags, is asked for them, and never writes them; --resume goes on with them") {
    TempDir d;
    std::string csv = "poem_text,metre\n";
    for (int i = 0; i < 24; i++)
        csv += strf("\"%s %s\n%s %s\",%s\n", i % 2 ? "\u0628\u062A" : "\u062B\u062C",
                    i % 3 ? "\u062D" : "\u062E", i % 5 ? "\u062F" : "\u0630",
                    i % 7 ? "\u0631\u0632" : "\u0633", i % 2 ? "tawil" : "kamil");
    write_file(d / "poems.csv", csv);
    check_success(prepare((d / "poems.csv") + " --tags metre --tag_min 3 -o " + (d / "data")));
    const std::string flags =
        "--data " + (d / "data") +
        " --preset tiny --depth 1 --channels 16 --heads 2 --seq_len 16 -b 4 --val_every 5 "
        "--learning_rate 0.01 --prompt_tags metre=tawil -o ";
    Result r = train(flags + (d / "run") + " --max_steps 10 --sample_every 5");
    check_success(r);
    CHECK(!contains(r.out, "metre="));
    CHECK(read_file(d / "run/recipe.txt") == read_file(d / "data/recipe.txt"));

    // Half the steps, then --resume: the same bytes. The loss is a mean over the targets, without the tags.
    const std::string even = " --lr_schedule constant --warmup_steps 0 --sample_every 0 --max_steps ";
    check_success(train(flags + (d / "whole") + even + "10"));
    check_success(train(flags + (d / "cut") + even + "5"));
    check_success(train("-o " + (d / "cut") + " --resume --max_steps 10"));
    CHECK(read_file(d / "whole/model.bin") == read_file(d / "cut/model.bin"));

    // A window of 16 tokens has a tag before it, so an epoch takes 16/15 as many.
    const double size = (double)TokenFile(d / "data/train.bin").size();
    r = train(flags + (d / "epochs") + " --epochs 10 --sample_every 0");
    check_success(r);
    CHECK(contains(r.out, strf("%d steps in ", (int)std::ceil(10 * size * 16 / 15 / 64))));

    const std::string model =
        "-e " + (d / "run/model.bin") + " --tokens 40 --ignore_end --temperature 1.5 --num 4 ";
    Result tawil = sample(model + "--tags metre=tawil"), kamil = sample(model + "--tags metre=kamil"),
           none = sample(model);
    for (const Result* s : {&tawil, &kamil, &none}) {
        check_success(*s);
        CHECK(!contains(s->out, "<|"));
    }
    CHECK(tawil.out != kamil.out);
    CHECK(sample(model + "--tags metre=other").out == none.out);
    CHECK(run(words("./sample_gpt2 -e " + (d / "run/model.bin") + " --list_tags")).out ==
          "metre=kamil\nmetre=tawil\nmetre=other\n");
    check_failure(sample(model + "--tags metre=x"), "sample_gpt2", 2,
                  {"--tags", "metre", "'x'", "kamil, tawil, other"});
    check_failure(sample("-e " + tiny().model + " --tags metre=x"), "sample_gpt2", 2, {"--tags", "no tags"});
    check_failure(train("--data " + (d / "data") + " --prompt_tags poet=x -o " + (d / "none")), "train_gpt2",
                  2, {"--prompt_tags", "'poet=x'", "metre"});
    CHECK(!file_exists(d / "none"));
}

TEST_CASE("cli: a prompt with vowel signs, and in other forms of letters, is cleaned as the poems were") {
    const std::string flags = "-e " + tiny().model + " --tokens 20 --ignore_end";
    Result plain = sample(flags, "\u0642\u0641\u0627 \u0646\u0628\u0643");
    check_success(plain);
    for (const char* prompt :
         {"\u0642\u0650\u0641\u064E\u0627 \u0646\u064E\u0628\u0652\u0643\u0650",
          "\u0642\u0641\u0627 \u0646\u0628\u06A9", "\u060C\u0642\u0641\u0627! \u0646\u0628\u0643"})
        CHECK(sample(flags, prompt).out == plain.out);
}

TEST_CASE("cli: --repetition_penalty makes what the text has less likely, and 1 changes nothing") {
    const std::string flags =
        "-e " + tiny().model + " --tokens 30 --ignore_end --temperature 0 --repetition_penalty ";
    auto letters = [](const std::string& text) {
        std::set<uint32_t> found;
        utf8::for_each(text, [&](uint32_t c, size_t) { found.insert(c); });
        return found.size();
    };
    Result one = sample(flags + "1", ""), high = sample(flags + "20", "");
    check_success(one);
    CHECK(one.out == sample("-e " + tiny().model + " --tokens 30 --ignore_end --temperature 0", "").out);
    CHECK(letters(high.out) > letters(one.out));
    check_failure(sample(flags + "0", ""), "sample_gpt2", 2, {"--repetition_penalty", "0.01"});
}

TEST_CASE("cli: --rhyme and --verses shape the poems, and stderr tells how the rhyme was kept") {
    const std::string flags = "-e " + tiny().model + " --num 3 --verses 4 ";
    const std::string rhyme = "\u0631";
    Result free = sample(flags, ""), rhymed = sample(flags + "--rhyme " + rhyme, "");
    check_success(free);
    CHECK(rhymed.code == 0);
    CHECK(contains(rhymed.err, " of 12 verses keep the rhyme; "));
    CHECK(rhymed.out == sample(flags + "--rhyme " + rhyme, "").out);
    // Every verse ends in the letter, or in it and long vowels, unless stderr names the verse.
    size_t unrhymed = 0, told = 0;
    for (size_t at = 0; (at = rhymed.err.find("does not rhyme", at)) != std::string::npos; at++) told++;
    for (size_t at = 0, end; at < rhymed.out.size(); at = end + 1) {
        end = std::min(rhymed.out.find('\n', at), rhymed.out.size());
        std::string line = rhymed.out.substr(at, end - at);
        if (line.empty() || line[0] == '-') continue;
        while (!line.empty() && line.back() == ' ') line.pop_back();
        for (const char* ending : {"\u0627", "\u0648", "\u064A", "\u0647", "\u0629", "\u0649"})
            for (int i = 0; i < 2; i++)
                if (line.size() > 2 && !line.compare(line.size() - 2, 2, ending))
                    line.resize(line.size() - 2);
        unrhymed += line.size() < 2 || line.compare(line.size() - 2, 2, rhyme) != 0;
    }
    INFO(rhymed.out << rhymed.err);
    CHECK(unrhymed <= told);
    check_failure(sample(flags + "--rhyme z", ""), "sample_gpt2", 2,
                  {"--rhyme", "'z'", "auto or 1 to 8 Arabic"});
    check_failure(sample(flags + "--ignore_end", ""), "sample_gpt2", 2, {"--verses and --ignore_end"});
}

// ---------------------------------------------------------------------------------------------
// The GPU trainer, which dev/emulator runs here in both precisions

// The programs built for the emulator stand beside this one, where the CUDA Toolkit's headers were to be had.
std::string beside(const std::string& name) {
    char path[4096];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path);
    return dirname_of(std::string(path, n > 0 ? (size_t)n : 0)) + "/" + name;
}
const char* const GPU_TRAINERS[] = {"train_gpt2cu_emu", "train_gpt2cu_emu_fp32"};
bool missing(const char* const (&programs)[2]) {
    for (const char* name : programs)
        if (!file_exists(beside(name))) return skip(beside(name) + ": not built"), true;
    return false;
}
bool gpu_trainers_missing() { return missing(GPU_TRAINERS); }
Result train_gpu(const std::string& trainer, const std::string& flags) {
    return run(words(beside(trainer) + " " + flags));
}
constexpr const char* GPU_MODEL =
    " --depth 1 --heads 2 --channels 64 --seq_len 16 --batch_size 4 --total_batch_size 128 --sample_every 0 ";

TEST_CASE("cli gpu: a run that one trainer began goes on on the other, and comes to the same losses") {
    if (gpu_trainers_missing()) return;
    TempDir d;
    std::string flags =
        "--data " + tiny().data + GPU_MODEL +
        "--lr_schedule constant --learning_rate 0.01 --warmup_steps 0 --dropout 0.1 --val_every 4 -o ";
    check_success(train(flags + (d / "cpu") + " --max_steps 8"));
    check_success(train(flags + (d / "cpu4") + " --max_steps 4"));
    for (std::string trainer : GPU_TRAINERS) {
        double allowed = contains(trainer, "fp32") ? 1e-5 : 2e-3, worst = 0;
        std::string gpu = d / trainer, mixed = d / ("mixed_" + trainer), back = d / ("back_" + trainer);
        CAPTURE(trainer);
        check_success(train_gpu(trainer, flags + gpu + " --max_steps 8"));
        check_success(train_gpu(trainer, flags + mixed + " --max_steps 4"));
        std::filesystem::copy(mixed, d / "again");
        std::filesystem::copy(d / "cpu4", back);
        check_success(train("--resume --max_steps 8 -o " + mixed));
        check_success(train_gpu(trainer, "--resume --max_steps 8 -o " + back));
        check_success(train_gpu(trainer, "--resume --max_steps 8 -o " + (d / "again")));
        check_same_run(gpu, d / "again", 8);  // bit for bit
        std::filesystem::remove_all(d / "again");
        for (const std::string& run : {gpu, mixed, back})
            for (const char* column : {"train_loss", "val_loss"}) {
                Strings got = Log(run).column(column), want = Log(d / "cpu").column(column);
                REQUIRE(got.size() == want.size());
                for (size_t i = 0; i < got.size(); i++) {
                    CHECK((got[i] == "") == (want[i] == ""));
                    if (got[i] != "")
                        worst = std::max(worst, std::fabs(std::stod(got[i]) / std::stod(want[i]) - 1));
                }
            }
        note("cli gpu: losses, " + trainer, worst, allowed);
        CHECK(worst <= allowed);
    }
    // The best model that the GPU kept is one that everything else reads.
    check_success(sample("-e " + (d / "train_gpt2cu_emu/model.bin") + " --tokens 20"));
    check_success(train("--max_steps 0 -e " + (d / "train_gpt2cu_emu/model.bin") + " --data " + tiny().data));
}

TEST_CASE("cli gpu: shows its machine, memory and poems") {
    if (gpu_trainers_missing()) return;
    TempDir d;
    Result r =
        train_gpu("train_gpt2cu_emu",
                  "--data " + tiny().data + GPU_MODEL +
                      "--max_steps 2 --sample_every 2 --sample_tokens 20 --temperature 0 --threads 3 -o " +
                      (d / "run"));
    check_success(r);
    for (const char* part : {"machine ", "bf16", "GFLOP/s", "memory ", "gradients", "step 2/2",
                             "a poem after step 2", "validation after step 2"})
        CHECK(contains(r.out, part));
    r = train_gpu("train_gpt2cu_emu", "--help");
    check_success(r);
    CHECK(contains(r.out, "./train_gpt2cu -o out/poems --resume"));
}

TEST_CASE("cli gpu: sample_gpt2cu writes sample_gpt2's text, and names what it cannot use") {
    if (missing({"sample_gpt2cu_emu", "sample_gpt2cu_emu_fp32"})) return;
    TempDir d;
    const std::string model = d / "run/model.bin", flags = "-e " + model + " --tokens 40 --ignore_end ";
    check_success(train("--data " + tiny().data + GPU_MODEL +
                        "--max_steps 40 --learning_rate 0.01 --warmup_steps 0 -o " + (d / "run")));
    const std::string other = d / "other/model.bin";  // of head size 8
    check_success(train("--data " + tiny().data + GPU_MODEL + "--heads 8 --max_steps 1 -o " + (d / "other")));
    auto sample_gpu = [&](const std::string& program, const std::string& more, const std::string& prompt) {
        Strings w = words(beside(program) + " " + more);
        w.push_back("--prompt"), w.push_back(prompt);
        return run(w);
    };
    // In fp32 the logits differ by rounding only. The context is full after 16 tokens.
    for (const char* more : {"--temperature 0", "--temperature 0 --num 3", "--seed 5 --top_k 8 --num 3"}) {
        CAPTURE(more);
        Result gpu = sample_gpu("sample_gpt2cu_emu_fp32", flags + more, "قفا نبك"),
               cpu = sample(flags + more, "قفا نبك");
        check_success(gpu);
        CHECK(gpu.out == cpu.out);
        CHECK(std::set<char>(cpu.out.begin(), cpu.out.end()).size() > 8);  // not one letter again and again
    }
    Result bf16 = sample_gpu("sample_gpt2cu_emu", flags + "--temperature 0", "قفا نبك");
    check_success(bf16);
    CHECK(bf16.out.compare(0, strlen("قفا نبك"), "قفا نبك") == 0);
    CHECK(utf8::count(bf16.out) > 30);

    struct {
        std::string flags, prompt, variable, value;
        int code;
        Strings parts;
    } cases[] = {
        {"-e " + (d / "none"), "", "", "", 1, {d / "none", "No such file"}},
        {"-e " + model, "قفا نبك من ذكرى حبيب ومنزل", "", "", 2, {"--prompt", "26", "15"}},
        {"-e " + model + " --dtype fp32", "", "", "", 2, {"--dtype", "bf16", "make sample_gpt2cu PREC"}},
        {"-e " + model + " --threads 2", "", "", "", 2, {"--threads"}},
        {"-e " + model + " --device 1", "", "", "", 1, {"--device 1", "numbered from 0"}},
        {"-e " + model, "", "EMU_DEVICES", "0", 1, {"no NVIDIA GPU", "./sample_gpt2 writes"}},
        {"-e " + other, "", "", "", 1, {"is 8,", "sample_gpt2cu supports 32,", "./sample_gpt2 supports any"}},
        {"-e " + model, "", "EMU_MEMORY_MB", "1", 1, {"the model needs", "iB", "./sample_gpt2 "}},
        {"-e " + model + " --num 4000", "", "EMU_MEMORY_MB", "8", 1, {"4000 texts", "iB", "fewer at once"}},
    };
    for (auto& c : cases) {
        CAPTURE(c.flags);
        if (c.variable != "") setenv(c.variable.c_str(), c.value.c_str(), 1);
        Result r = sample_gpu("sample_gpt2cu_emu", c.flags, c.prompt);
        if (c.variable != "") unsetenv(c.variable.c_str());
        check_failure(r, "sample_gpt2cu", c.code, c.parts);
        CHECK(r.out == "");
    }
    Result help = run({beside("sample_gpt2cu_emu"), "--help"});
    check_success(help);
    CHECK(contains(help.out, "--device"));
    CHECK(!contains(help.out, "--threads"));
}

TEST_CASE("cli gpu: bad input and a missing, full or unfit GPU are one line that says what to do") {
    if (gpu_trainers_missing()) return;
    TempDir d;
    std::string flags = "--data " + tiny().data + GPU_MODEL + "--max_steps 2 -o " + (d / "run") + " ";
    struct {
        std::string flags, variable, value;
        int code;
        Strings parts;
    } cases[] = {
        {"", "EMU_DEVICES", "0", 1, {"no NVIDIA GPU", "./train_gpt2 "}},
        {"--resume -o " + (d / "none"), "EMU_DEVICES", "0", 1, {"no NVIDIA GPU", "./train_gpt2 "}},
        {flags + "--dtype fp32", "", "", 2, {"--dtype", "bf16", "make train_gpt2cu PRECISION=FP32"}},
        {flags + "--dtype fp16", "", "", 2, {"--dtype", "fp16", "bf16"}},
        {flags + "--heads 8", "", "", 1, {"head size", "is 8,", "32, 48, 64, 80, 96, 128", "./train_gpt2 "}},
        {flags + "--batch_size 64 --total_batch_size 0 --recompute 0",
         "EMU_MEMORY_MB",
         "5",
         1,
         {"memory", "iB", "--batch_size ", " would fit"}},
        {flags + "--batch_size 8 --channels 1024 --heads 8",
         "EMU_MEMORY_MB",
         "12",
         1,
         {"memory", "iB", "smaller model"}},
    };
    for (auto& c : cases) {
        CAPTURE(c.flags);
        if (c.variable != "") setenv(c.variable.c_str(), c.value.c_str(), 1);
        Result r = train_gpu("train_gpt2cu_emu", c.flags), help = train_gpu("train_gpt2cu_emu", "--help");
        if (c.variable != "") unsetenv(c.variable.c_str());
        check_failure(r, "train_gpt2cu", c.code, c.parts);
        CHECK(r.out == "");
        check_success(help);
        CHECK(!file_exists(d / "run"));
    }
    // The program for real GPUs, where it was built and there is none.
    if (!file_exists("train_gpt2cu") || file_exists("/dev/nvidiactl")) return;
    Result r = run({"./train_gpt2cu"});
    check_failure(r, "train_gpt2cu", 1, {"no ", "NVIDIA", "./train_gpt2 "});
    CHECK(r.out == "");
    check_success(run({"./train_gpt2cu", "--help"}));
}

}  // namespace
