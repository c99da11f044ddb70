// checkpoint.h - the files of a run's folder from which training resumes: models and training states.
//
//     model_00000500.bin     the model after 500 steps (lib/gpt2.h), and
//     state_00000500.bin     what is needed beyond it: settings, progress, AdamW's moments
//
// The state file is a header, a table of named sections, and the sections. Its layout is fixed; what a
// version of the program adds is a new section. A program that does not know a section skips it, unless the
// section is marked as required: then the file is refused, and the error names the section. dev/FORMATS.md
// has the bytes.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>

#include "lib/gpt2.h"
#include "lib/run_folder.h"

namespace trainer {

inline std::string numbered(const std::string& dir, const char* kind, int step) {
    return dir + "/" + numbered(kind, step);
}

// The steps for which dir has both a model and a state, ascending.
inline std::vector<int> checkpoints_in(const std::string& dir) {
    std::vector<int> steps;
    for (const std::string& name : names_in(dir)) {
        int step = number_of(name, "state");
        if (step >= 0 && file_exists(numbered(dir, "model", step))) steps.push_back(step);
    }
    std::sort(steps.begin(), steps.end());
    return steps;
}

template <class Model>
void save_model(Model& model, const std::string& path) {
    ModelWriter w(path, model.cfg);
    model.each_piece(PARAMS, [&](const float* p, size_t n) { w.add(p, n); });
    w.finish();
}

template <class Model>
void load_model(Model& model, ModelReader& r) {
    model.each_piece(PARAMS, [&](float* p, size_t n) { r.read(p, n); });
}

// ---------------------------------------------------------------------------------------------
// What a state file holds

// Where a run is, beyond the model and AdamW's moments.
struct Progress {
    int step = 0;                // updates done
    uint64_t position = 0;       // of the training data, in windows
    double best_val = INFINITY;  // lowest validation loss so far
    int best_step = -1;
    double smoothed = 0, smoothed_weight = 0;  // exponential mean of the training loss, its bias correction
    double seconds = 0;                        // of training so far
    bool pending = false;                      // a stop came before this step was validated and logged
    std::string losses, norms;                 // of the last steps, "2.5 2.25 ...": see Outliers in trainer.h
    struct {
        double loss = 0, smoothed = 0, norm = 0, lr = 0, seconds = 0;
    } last;  // the last step, for its row in the log

    // Calls f(name, variable) for each, in the order of the file's lines.
    template <class F>
    void each_field(F&& f) {
        f("step", step), f("position", position), f("best_val", best_val), f("best_step", best_step);
        f("smoothed", smoothed), f("smoothed_weight", smoothed_weight), f("seconds", seconds);
        f("pending", pending), f("last_loss", last.loss), f("last_smoothed", last.smoothed);
        f("last_norm", last.norm), f("last_lr", last.lr), f("last_seconds", last.seconds);
        f("losses", losses), f("norms", norms);
    }
};

// Checksums of what a run was trained on; 0: not recorded, or none.
struct Fingerprints {
    uint64_t train = 0, val = 0, tokenizer = 0;
    template <class F>
    void each_field(F&& f) {
        f("train", train), f("val", val), f("tokenizer", tokenizer);
    }
};

// Fields as lines name=value, with doubles to their last bit.
struct FieldWriter {
    std::string text;
    void operator()(const char* name, int v) { text += strf("%s=%d\n", name, v); }
    void operator()(const char* name, uint64_t v) { text += strf("%s=%" PRIu64 "\n", name, v); }
    void operator()(const char* name, double v) { text += strf("%s=%.17g\n", name, v); }
    void operator()(const char* name, const std::string& v) { text += strf("%s=%s\n", name, v.c_str()); }
};
// Reads such lines. A name that the text lacks was not recorded: its variable stays as it is.
struct FieldReader {
    const std::string text;
    // The value after "name=" at the start of a line, or null.
    const char* value(const char* name) const {
        size_t at = ("\n" + text).find(strf("\n%s=", name));
        return at == std::string::npos ? nullptr : text.c_str() + at + strlen(name) + 1;
    }
    void operator()(const char* name, int& v) const {
        if (const char* s = value(name)) v = atoi(s);
    }
    void operator()(const char* name, bool& v) const {
        if (const char* s = value(name)) v = atoi(s) != 0;
    }
    void operator()(const char* name, uint64_t& v) const {
        if (const char* s = value(name)) v = strtoull(s, nullptr, 10);
    }
    void operator()(const char* name, double& v) const {
        if (const char* s = value(name)) v = strtod(s, nullptr);
    }
    void operator()(const char* name, std::string& v) const {
        if (const char* s = value(name)) v.assign(s, strcspn(s, "\n"));
    }
};

// The checksum of a model's parameters, in the model file's order.
template <class Model>
uint64_t model_checksum(Model& model) {
    Checksum sum;
    model.each_piece(PARAMS, [&](const float* x, size_t n) { sum.add(x, n * sizeof(float)); });
    sum.end_section();
    return sum.value();
}

// ---------------------------------------------------------------------------------------------
// The state file

constexpr int32_t STATE_MAGIC = 20261123, STATE_VERSION = 2;
enum SectionType { TEXT = 1, FLOAT32 = 2, UINT64 = 3 };

// A row of the table, as it is in the file.
struct Section {
    char name[24] = {};  // filled up with zeros
    int32_t type = 0, required = 0;
    uint64_t count = 0;     // elements
    uint64_t element = 0;   // bytes of one, so that a type that a program does not know can be skipped
    uint64_t offset = 0;    // of the first one, bytes from the start of the file; a multiple of 64
    uint64_t checksum = 0;  // of the section's bytes

    Section() = default;
    Section(const char* name_, SectionType type_, uint64_t count_, bool required_ = true)
        : type(type_), required(required_), count(count_), element(size_of(type_)) {
        snprintf(name, sizeof name, "%s", name_);
    }
    static uint64_t size_of(SectionType t) { return t == FLOAT32 ? 4 : t == UINT64 ? 8 : 1; }
    uint64_t bytes() const { return count * element; }
    bool is(const char* other) const { return !strncmp(name, other, sizeof name); }
};
static_assert(sizeof(Section) == 64, "a row of the table has 64 bytes");
constexpr uint64_t SECTION_ALIGNMENT = 64;
constexpr int MAX_SECTIONS = 4096;

// Writes a state file whose sections are known beforehand. For each, in the table's order: add() all its
// bytes, or write() them in pieces and then end(). Last, commit().
class StateWriter {
  public:
    StateWriter(const std::string& path, std::vector<Section> table) : file_(path), table_(std::move(table)) {
        uint64_t at = 1024 + table_.size() * sizeof(Section);
        for (Section& s : table_) s.offset = at, at = round_up(at + s.bytes(), SECTION_ALIGNMENT);
        file_.write(std::string(1024 + table_.size() * sizeof(Section), '\0'));  // commit() fills it in
    }
    // The next section, all of it.
    void add(const void* data, uint64_t bytes) {
        write(data, bytes);
        end();
    }
    // A piece of the next section; end() after its last one.
    void write(const void* data, uint64_t bytes) {
        file_.write(data, bytes), sum_.add(data, bytes), written_ += bytes;
    }
    void end() {
        Section& s = table_.at(done_++);
        if (written_ != s.bytes())
            throw std::logic_error(strf("state file: section %s is not as long as said", s.name));
        sum_.end_section(), s.checksum = sum_.value(), sum_ = Checksum(), written_ = 0;
        file_.write(std::string(round_up(s.bytes(), SECTION_ALIGNMENT) - s.bytes(), '\0'));
    }
    void commit() {
        if (done_ != table_.size()) throw std::logic_error("state file: sections are missing");
        std::vector<int32_t> header(256);
        header[0] = STATE_MAGIC, header[1] = STATE_VERSION, header[2] = (int32_t)table_.size();
        uint64_t check = checksum_of(table_.data(), table_.size() * sizeof(Section));
        memcpy(&header[4], &check, 8);
        file_.overwrite(0, header.data(), 1024);
        file_.overwrite(1024, table_.data(), table_.size() * sizeof(Section));
        file_.commit();
    }

  private:
    AtomicFile file_;
    std::vector<Section> table_;
    size_t done_ = 0;
    Checksum sum_;
    uint64_t written_ = 0;
};

// Saves settings (lines name=value), progress, fingerprints and moments; `program` is what wrote it, for
// people.
template <class Model>
void save_state(Model& model, Progress progress, const std::string& settings, const std::string& path,
                const std::string& program = "", Fingerprints fingerprints = {}) {
    FieldWriter lines, prints;
    progress.each_field(lines), fingerprints.each_field(prints);
    const uint64_t n = num_params(model.cfg), check = model_checksum(model);
    StateWriter out(path, {{"program", TEXT, program.size(), false},
                           {"settings", TEXT, settings.size()},
                           {"progress", TEXT, lines.text.size()},
                           {"fingerprints", TEXT, prints.text.size(), false},
                           {"model_checksum", UINT64, 1},
                           {"adam_m", FLOAT32, n},
                           {"adam_v", FLOAT32, n}});
    out.add(program.data(), program.size());
    out.add(settings.data(), settings.size());
    out.add(lines.text.data(), lines.text.size());
    out.add(prints.text.data(), prints.text.size());
    out.add(&check, 8);
    for (State s : {ADAM_M, ADAM_V}) {
        model.each_piece(s, [&](const float* x, size_t count) { out.write(x, count * sizeof(float)); });
        out.end();
    }
    out.commit();
}

// Reads a state file. The constructor reads what is needed to build the model, load_moments() the rest.
class StateReader {
  public:
    Progress progress;
    Fingerprints fingerprints;
    std::string settings, program;  // "": not recorded

    explicit StateReader(const std::string& path) : file_(path) {
        header_ = file_.header(STATE_MAGIC, "training state");
        if (header_[1] == 1) {
            read_version_1();
            return;
        }
        if (header_[1] != STATE_VERSION)
            fail("%s: version is %d, wanted 1 or %d", path.c_str(), header_[1], STATE_VERSION);
        read_table();
        for (const Section& s : table_)
            if (s.required && !known(s))
                fail("%s: needs section '%s', which this program does not know; a newer one wrote it",
                     path.c_str(), s.name);
        settings = text("settings", true), program = text("program", false);
        progress.each_field(FieldReader{text("progress", true)});
        fingerprints.each_field(FieldReader{text("fingerprints", false)});
        if (progress.step < 0) fail("%s: step is %d, wanted at least 0", path.c_str(), progress.step);
        count_ = find("adam_m", FLOAT32, true)->count;
        if (find("adam_v", FLOAT32, true)->count != count_)
            fail("%s: adam_m and adam_v differ in length", path.c_str());
        if (find("model_checksum", UINT64, true)->count != 1)
            fail("%s: model_checksum has %" PRIu64 " numbers, wanted 1", path.c_str(),
                 find("model_checksum", UINT64, true)->count);
    }

    // Fills AdamW's moments. The model's parameters must be loaded: it is checked that they are those that
    // were saved together with this state.
    template <class Model>
    void load_moments(Model& model) {
        const char* path = file_.path.c_str();
        if (count_ != num_params(model.cfg))
            fail("%s: holds %" PRIu64 " parameters, the model has %zu", path, count_, num_params(model.cfg));
        if (header_[1] == 1) return load_moments_1(model);
        uint64_t check;
        read(*find("model_checksum", UINT64, true), &check);
        if (check != model_checksum(model))
            fail("%s: checksum does not match: this file or its model file is damaged", path);
        read_moments(model, ADAM_M, "adam_m"), read_moments(model, ADAM_V, "adam_v");
    }

  private:
    static bool known(const Section& s) {
        for (const char* name :
             {"program", "settings", "progress", "fingerprints", "model_checksum", "adam_m", "adam_v"})
            if (s.is(name)) return true;
        return false;
    }
    void read_table() {
        const char* path = file_.path.c_str();
        const int32_t n = header_[2];
        if (n < 1 || n > MAX_SECTIONS) fail("%s: has %d sections, wanted 1 to %d", path, n, MAX_SECTIONS);
        for (size_t i = 3; i < 256; i++)
            if (i != 4 && i != 5 && header_[i])
                fail("%s: header word %zu is %d, wanted 0", path, i, header_[i]);
        table_.resize((size_t)n);
        file_.read(table_.data(), table_.size() * sizeof(Section), "table of sections");
        uint64_t check;
        memcpy(&check, &header_[4], 8);
        if (check != checksum_of(table_.data(), table_.size() * sizeof(Section)))
            fail("%s: the checksum of its table of sections does not match: the file is damaged", path);
        uint64_t at = file_.pos;
        for (const Section& s : table_) {
            if (!s.name[0] || s.name[sizeof s.name - 1] || s.offset != at || s.element < 1 ||
                s.element > 64 || s.count > file_.size)
                fail("%s: its table of sections is damaged", path);
            at = round_up(at + s.bytes(), SECTION_ALIGNMENT);
        }
        file_.expect_size(at);
    }
    // A section by name, of this type; null where it is not required and missing.
    const Section* find(const char* name, SectionType type, bool required) const {
        for (const Section& s : table_)
            if (s.is(name)) {
                if (s.type != type || s.element != Section::size_of(type))
                    fail("%s: section '%s' is of type %d (%" PRIu64 " bytes), wanted %d", file_.path.c_str(),
                         name, s.type, s.element, type);
                return &s;
            }
        if (required) fail("%s: lacks section '%s'", file_.path.c_str(), name);
        return nullptr;
    }
    void read(const Section& s, void* to) {
        file_.seek(s.offset);
        file_.read(to, s.bytes(), s.name);
        finish(s, checksum_of(to, s.bytes()));
    }
    // After a section's bytes: checks them, and the zeros up to the next one.
    void finish(const Section& s, uint64_t checksum) {
        char padding[SECTION_ALIGNMENT] = {}, zeros[SECTION_ALIGNMENT] = {};
        uint64_t n = round_up(s.bytes(), SECTION_ALIGNMENT) - s.bytes();
        file_.read(padding, n, "padding");
        if (checksum != s.checksum || memcmp(padding, zeros, n))
            fail("%s: the checksum of section '%s' does not match: the file is damaged", file_.path.c_str(),
                 s.name);
    }
    template <class Model>
    void read_moments(Model& model, State state, const char* name) {
        const Section& s = *find(name, FLOAT32, true);
        Checksum sum;
        file_.seek(s.offset);
        model.each_piece(state, [&](float* x, size_t n) {
            file_.read(x, n * sizeof(float), name), sum.add(x, n * sizeof(float));
        });
        sum.end_section(), finish(s, sum.value());
    }
    std::string text(const char* name, bool required) {
        const Section* s = find(name, TEXT, required);
        if (!s) return "";
        if (s->count > 1 << 20)
            fail("%s: section '%s' has %" PRIu64 " bytes, wanted at most %d", file_.path.c_str(), name,
                 s->count, 1 << 20);
        std::string value(s->count, '\0');
        read(*s, &value[0]);
        return value;
    }

    // Version 1, so that runs of earlier programs go on: fixed fields in the header, the settings, the
    // moments, and one checksum of all that and of the model's parameters.
    void read_version_1() {
        const std::vector<int32_t>& h = header_;
        const char* path = file_.path.c_str();
        double d[9];
        memcpy(&count_, &h[8], 8), memcpy(&progress.position, &h[10], 8), memcpy(d, &h[12], sizeof d);
        progress.step = h[2], progress.best_step = h[4], progress.pending = h[5];
        progress.best_val = d[0], progress.smoothed = d[1], progress.smoothed_weight = d[2];
        progress.seconds = d[3], progress.last = {d[4], d[5], d[6], d[7], d[8]};
        if (h[2] < 0) fail("%s: step is %d, wanted at least 0", path, h[2]);
        if (h[3] < 0 || h[3] > 1 << 20)
            fail("%s: settings have %d bytes, wanted 0 to %d", path, h[3], 1 << 20);
        if (count_ > file_.size / 8)
            fail("%s: parameter count is %" PRIu64 ", too many for its %" PRIu64 " bytes", path, count_,
                 file_.size);
        file_.expect_size(1024 + (uint64_t)h[3] + 8 * count_ + 8);
        sum_1_.add(h.data(), 1024);
        settings.resize((size_t)h[3]);
        file_.read(&settings[0], settings.size(), "settings");
        sum_1_.add(settings.data(), settings.size()), sum_1_.end_section();
    }
    template <class Model>
    void load_moments_1(Model& model) {
        for (State s : {ADAM_M, ADAM_V}) {
            model.each_piece(s, [&](float* x, size_t n) {
                file_.read(x, n * sizeof(float), "optimizer state"), sum_1_.add(x, n * sizeof(float));
            });
            sum_1_.end_section();
        }
        model.each_piece(PARAMS, [&](const float* x, size_t n) { sum_1_.add(x, n * sizeof(float)); });
        sum_1_.end_section();
        uint64_t check;
        file_.read(&check, 8, "checksum");
        if (check != sum_1_.value())
            fail("%s: checksum does not match: this file or its model file is damaged", file_.path.c_str());
    }

    Reader file_;
    std::vector<int32_t> header_;
    std::vector<Section> table_;
    uint64_t count_ = 0;
    Checksum sum_1_;
};

}  // namespace trainer
