// checkpoint.h - the files of a run's folder from which training resumes: models and training states.
//
//     model_00000500.bin     the model after 500 steps (lib/gpt2.h), and
//     state_00000500.bin     what is needed beyond it: settings, progress, the optimizer's arrays
//
// Where each rank holds only a share of the optimizer's arrays (a sharded model, see lib/model.h), each
// writes its share to a file of its own, a shard:
//
//     state_00000500_rank0of8.bin
//
// The state file then holds the shards' checksums instead of these arrays. It is written last, when all
// shards and the model are there: a checkpoint is whole exactly if its model and its state file exist. All
// ranks write to one folder, on a file system that they share. A resuming run may have another number of
// ranks, or not be sharded at all: each reader takes from each file the elements that it needs.
//
// The state file is a header, a table of named sections, and the sections. Its layout is fixed; what a
// version of the program adds is a new section. A program that does not know a section skips it, unless the
// section is marked as required: then the file is refused, and the error names the section. dev/FORMATS.md
// has the bytes.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <map>
#include <memory>

#include "lib/gpt2.h"
#include "lib/optimizer.h"
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

// Removes a checkpoint but for its shards: first the state, because a model without its state is none.
inline void remove_checkpoint(const std::string& dir, int step) {
    for (const char* kind : {"state", "model"}) unlink(numbered(dir, kind, step).c_str());
}
// Removes the shards of steps for which there is no state file: their checkpoint has been removed, or was not
// finished. No rank may be about to write a shard.
inline void remove_stray_shards(const std::string& dir) {
    for (const std::string& name : names_in(dir))
        if (const int step = shard_step(name); step >= 0 && !file_exists(numbered(dir, "state", step)))
            unlink((dir + "/" + name).c_str());
}

// Whether dir has shards of this step.
inline bool has_shards(const std::string& dir, int step) {
    const std::vector<std::string> names = names_in(dir);
    return std::any_of(names.begin(), names.end(),
                       [&](const std::string& name) { return shard_step(name) == step; });
}

template <class Model>
void save_model(Model& model, const std::string& path) {
    ModelWriter w(path, model.cfg);
    model.each_piece(PARAMS, [&](const float* p, size_t n) { w.add(p, n); });
    w.finish();
}

// Returns the checksum of the parameters as they are in the file: a model with fewer bits rounds them.
template <class Model>
uint64_t load_model(Model& model, ModelReader& r) {
    Checksum sum;
    model.each_piece(PARAMS, [&](float* p, size_t n) { r.read(p, n), sum.add(p, n * sizeof(float)); });
    sum.end_section();
    return sum.value();
}

// ---------------------------------------------------------------------------------------------
// What a state file holds

// Where a run is, beyond the model and the optimizer's arrays.
struct Progress {
    int step = 0;                // updates done
    uint64_t position = 0;       // of the training data, in windows
    double best_val = INFINITY;  // lowest validation loss so far
    int best_step = -1;          // its step; -1: none
    // What best_val was measured on: the checksum of the validation data, --val_tokens. Not recorded: 0, -1
    uint64_t best_data = 0;
    int best_tokens = -1;
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
        f("best_data", best_data), f("best_tokens", best_tokens);
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

// What a state file says about its run, beside the arrays. settings: lines name=value; program: what wrote
// the file, for people.
struct RunRecord {
    Progress progress;
    std::string settings, program;  // "": not recorded
    Fingerprints fingerprints;
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
    // Returns the checksum of the table, and so of everything: the table holds the sections' checksums.
    uint64_t commit() {
        if (done_ != table_.size()) throw std::logic_error("state file: sections are missing");
        std::vector<int32_t> header(256);
        header[0] = STATE_MAGIC, header[1] = STATE_VERSION, header[2] = (int32_t)table_.size();
        uint64_t check = checksum_of(table_.data(), table_.size() * sizeof(Section));
        memcpy(&header[4], &check, 8);
        file_.overwrite(0, header.data(), 1024);
        file_.overwrite(1024, table_.data(), table_.size() * sizeof(Section));
        file_.commit();
        return check;
    }

  private:
    AtomicFile file_;
    std::vector<Section> table_;
    size_t done_ = 0;
    Checksum sum_;
    uint64_t written_ = 0;
};

// Sections with their bytes, for those that are short.
using ShortSections = std::vector<std::pair<Section, std::string>>;

inline std::pair<Section, std::string> text_section(const char* name, const std::string& text,
                                                    bool required = true) {
    return {Section(name, TEXT, text.size(), required), text};
}
inline std::pair<Section, std::string> number_section(const char* name, const std::vector<uint64_t>& x) {
    return {Section(name, UINT64, x.size()), std::string((const char*)x.data(), x.size() * 8)};
}
// Those that every state file begins with.
inline ShortSections record_sections(RunRecord run, uint64_t model_checksum) {
    FieldWriter lines, prints;
    run.progress.each_field(lines), run.fingerprints.each_field(prints);
    return {text_section("program", run.program, false), text_section("settings", run.settings),
            text_section("progress", lines.text), text_section("fingerprints", prints.text, false),
            number_section("model_checksum", {model_checksum})};
}
// Writes a file of short sections and arrays; write_arrays(writer) adds the arrays. Returns its checksum.
template <class F>
uint64_t write_sections(const std::string& path, const ShortSections& first,
                        const std::vector<Section>& arrays, F write_arrays) {
    std::vector<Section> table;
    for (auto& [section, bytes] : first) table.push_back(section);
    table.insert(table.end(), arrays.begin(), arrays.end());
    StateWriter out(path, table);
    for (auto& [section, bytes] : first) out.add(bytes.data(), bytes.size());
    write_arrays(out);
    return out.commit();
}

// ---------------------------------------------------------------------------------------------
// Which elements of an array a rank or a file holds

// Elements [first, first + count) of a model's arrays, in the model file's order.
struct Range {
    uint64_t first, count;
    uint64_t end() const { return first + count; }
};
inline uint64_t elements_of(const std::vector<Range>& ranges) {
    uint64_t n = 0;
    for (const Range& r : ranges) n += r.count;
    return n;
}
// The number of elements that are in both; each ascending.
inline uint64_t common_elements(const std::vector<Range>& a, const std::vector<Range>& b) {
    uint64_t n = 0;
    for (size_t i = 0, j = 0; i < a.size() && j < b.size(); a[i].end() < b[j].end() ? i++ : j++) {
        const uint64_t from = std::max(a[i].first, b[j].first), to = std::min(a[i].end(), b[j].end());
        n += to > from ? to - from : 0;
    }
    return n;
}

// f(pointer, number of floats, number of the first one) for what a model holds of a state. PARAMS: for all.
template <class Model, class F>
void each_held(Model& model, State s, F f) {
    if (s != PARAMS) return model.each_range(s, f);
    size_t first = 0;
    model.each_piece(s, [&](float* x, size_t n) { f(x, n, first), first += n; });
}
// Adds elements that come after all that are there.
inline void append(std::vector<Range>& ranges, uint64_t first, uint64_t count) {
    if (ranges.empty() || ranges.back().end() != first) ranges.push_back({first, 0});
    ranges.back().count += count;
}
// The elements that a model holds of a state.
template <class Model>
std::vector<Range> ranges_of(Model& model, State s) {
    if (s == PARAMS) return {{0, num_params(model.cfg)}};
    std::vector<Range> ranges;
    model.each_range(s, [&](const float*, size_t n, size_t first) { append(ranges, first, n); });
    return ranges;
}
// The elements that there are of a state, on all ranks together.
inline std::vector<Range> all_ranges(const Config& c, State s, Optimizer optimizer) {
    std::vector<Range> ranges;
    for (const ParamPiece& p : param_pieces(c))
        if (state_has(s, optimizer, p.block_matrix)) append(ranges, p.file, p.size);
    return ranges;
}
// Saves the state of a model that is not sharded.
template <class Model>
void save_state(Model& model, Progress progress, const std::string& settings, const std::string& path,
                const std::string& program = "", Fingerprints fingerprints = {}) {
    std::vector<Section> sections;
    const std::vector<OptimizerArray> arrays = optimizer_arrays(model.optimizer);
    for (auto& a : arrays) sections.emplace_back(a.section, FLOAT32, elements_of(ranges_of(model, a.state)));
    const RunRecord run = {progress, settings, program, fingerprints};
    write_sections(path, record_sections(run, model_checksum(model)), sections, [&](StateWriter& out) {
        for (auto& a : arrays) {
            model.each_piece(a.state, [&](const float* x, size_t n) { out.write(x, n * sizeof(float)); });
            out.end();
        }
    });
}
// Saves the state file of a sharded model, whose shards have these checksums, rank after rank.
inline void save_sharded_state(const RunRecord& run, uint64_t model_checksum,
                               const std::vector<uint64_t>& shards, const std::string& path) {
    ShortSections sections = record_sections(run, model_checksum);
    sections.push_back(number_section("shards", shards));
    write_sections(path, sections, {}, [](StateWriter&) {});
}

// ---------------------------------------------------------------------------------------------
// Shards

// Which share of which state a shard holds.
struct ShardOf {
    int step, rank, world;
    std::string path(const std::string& dir) const { return dir + "/" + shard_file(step, rank, world); }
};

// Saves what this rank holds of the optimizer's arrays. Returns the file's checksum.
template <class Model>
uint64_t save_shard(Model& model, const ShardOf& shard, const std::string& dir) {
    std::vector<OptimizerArray> arrays = optimizer_arrays(model.optimizer);
    if (model.has(MASTER)) arrays.push_back(MASTER_ARRAY);
    ShortSections first = {number_section(
        "shard", {(uint64_t)shard.step, (uint64_t)shard.rank, (uint64_t)shard.world, num_params(model.cfg)})};
    std::vector<Section> table;
    for (auto& a : arrays) {
        const std::vector<Range> ranges = ranges_of(model, a.state);
        table.emplace_back(a.section, FLOAT32, elements_of(ranges));
        if (std::any_of(first.begin(), first.end(), [&](auto& s) { return s.first.is(a.ranges); })) continue;
        std::vector<uint64_t> numbers;
        for (const Range& r : ranges) numbers.insert(numbers.end(), {r.first, r.count});
        first.push_back(number_section(a.ranges, numbers));
    }
    return write_sections(shard.path(dir), first, table, [&](StateWriter& out) {
        for (auto& a : arrays) {
            model.each_range(a.state,
                             [&](const float* x, size_t n, size_t) { out.write(x, n * sizeof(float)); });
            out.end();
        }
    });
}

// ---------------------------------------------------------------------------------------------
// Reading

// The table and the sections of a state file or a shard.
class SectionReader {
  public:
    const std::string& path() const { return file_.path; }
    bool has(const char* name) const {
        return std::any_of(table_.begin(), table_.end(), [&](const Section& s) { return s.is(name); });
    }
    // The optimizer whose arrays it has.
    Optimizer optimizer() const { return has("muon_m") ? MUON : ADAMW; }
    // Reads a section of floats from front to back, f(pointer, number of floats) piece by piece, and checks
    // it.
    template <class F>
    void stream(const char* name, F f) {
        const Section& s = *find(name, FLOAT32, true);
        std::vector<float> buf(std::min<uint64_t>(s.count, 1 << 18));
        Checksum sum;
        file_.seek(s.offset);
        for (uint64_t left = s.count, n; left; left -= n) {
            n = std::min<uint64_t>(left, buf.size());
            file_.read(buf.data(), n * sizeof(float), name), sum.add(buf.data(), n * sizeof(float));
            f((const float*)buf.data(), (size_t)n);
        }
        sum.end_section();
        if (header_[1] != 1) finish(s, sum.value());
    }
    // Elements [from, from + n) of a section of floats, unchecked.
    void read_floats(const char* name, uint64_t from, float* to, uint64_t n) {
        file_.seek(find(name, FLOAT32, true)->offset + from * sizeof(float));
        file_.read(to, n * sizeof(float), name);
    }

  protected:
    explicit SectionReader(const std::string& path) : file_(path) {
        header_ = file_.header(STATE_MAGIC, "training state");
        if (header_[1] != 1 && header_[1] != STATE_VERSION)
            fail("%s: version is %d, wanted 1 or %d", path.c_str(), header_[1], STATE_VERSION);
    }
    // Returns the table's checksum.
    uint64_t read_table() {
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
        return check;
    }
    // `known`: besides the optimizer's arrays, of whichever optimizer.
    void refuse_unknown(std::vector<const char*> known) const {
        for (const OptimizerArray& a : optimizer_arrays(MUON)) known.push_back(a.section);
        for (const Section& s : table_)
            if (s.required &&
                std::none_of(known.begin(), known.end(), [&](const char* name) { return s.is(name); }))
                fail("%s: needs section '%s', which this program does not know; a newer one wrote it",
                     file_.path.c_str(), s.name);
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
    std::vector<uint64_t> numbers(const char* name) {
        const Section& s = *find(name, UINT64, true);
        std::vector<uint64_t> value(s.count);
        read(s, value.data());
        return value;
    }

    Reader file_;
    std::vector<int32_t> header_;
    std::vector<Section> table_;

  private:
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
};

// Opens a shard, and checks that it is the one of this step and rank, and that it has this checksum.
class ShardReader : public SectionReader {
  public:
    ShardReader(const std::string& dir, const ShardOf& want, uint64_t checksum)
        : SectionReader(existing(want.path(dir), want.world)) {
        const char* file = file_.path.c_str();
        if (header_[1] == 1) fail("%s: is a whole state of version 1, wanted a rank's share", file);
        const uint64_t check = read_table();
        refuse_unknown({"shard", "ranges", "muon_ranges", "adam_ranges", MASTER_ARRAY.section});
        const std::vector<uint64_t> is = numbers("shard");
        if (is.size() != 4) fail("%s: section 'shard' has %zu numbers, wanted 4", file, is.size());
        if (is[0] != (uint64_t)want.step || is[1] != (uint64_t)want.rank || is[2] != (uint64_t)want.world)
            fail("%s: holds the share of rank %" PRIu64 " of %" PRIu64 " after step %" PRIu64
                 ", wanted rank %d of %d after step %d",
                 file, is[1], is[2], is[0], want.rank, want.world, want.step);
        if (check != checksum)
            fail("%s: is not the file that was saved with %s: its checksum is %016" PRIx64
                 ", wanted %016" PRIx64,
                 file, numbered("state", want.step).c_str(), check, checksum);
        parameters_ = is[3];
        for (auto& a : optimizer_arrays(optimizer())) read_ranges(a, *find(a.section, FLOAT32, true));
        if (const Section* s = find(MASTER_ARRAY.section, FLOAT32, false)) read_ranges(MASTER_ARRAY, *s);
    }
    // The elements that it holds of an array.
    const std::vector<Range>& ranges_of(const OptimizerArray& array) const {
        const auto found = ranges_.find(array.ranges);
        if (found == ranges_.end()) fail("%s: lacks section '%s'", file_.path.c_str(), array.ranges);
        return found->second;
    }
    void expect_parameters(size_t n) const {
        if (parameters_ != n)
            fail("%s: is of a model of %" PRIu64 " parameters, this one has %zu", file_.path.c_str(),
                 parameters_, n);
    }

  private:
    static std::string existing(const std::string& path, int world) {
        if (!file_exists(path))
            fail("%s: not found; the state is in %d such files, one for each rank that saved it",
                 path.c_str(), world);
        return path;
    }
    void read_ranges(const OptimizerArray& array, const Section& section) {
        const char* file = file_.path.c_str();
        std::vector<Range>& ranges = ranges_[array.ranges];
        if (ranges.empty()) {
            const std::vector<uint64_t> x = numbers(array.ranges);
            uint64_t end = 0;
            for (size_t i = 0; i + 1 < x.size(); i += 2) {
                if (!x[i + 1] || x[i] < end || x[i] > parameters_ || x[i + 1] > parameters_ - x[i])
                    fail("%s: section '%s': range %zu is %" PRIu64 " elements from %" PRIu64
                         " on, wanted at least one, after the range before, among %" PRIu64,
                         file, array.ranges, i / 2, x[i + 1], x[i], parameters_);
                ranges.push_back({x[i], x[i + 1]}), end = x[i] + x[i + 1];
            }
            if (x.size() % 2)
                fail("%s: section '%s' has %zu numbers, wanted pairs", file, array.ranges, x.size());
        }
        if (section.count != elements_of(ranges))
            fail("%s: section '%s' has %" PRIu64 " elements, its ranges have %" PRIu64, file, section.name,
                 section.count, elements_of(ranges));
    }

    std::map<std::string, std::vector<Range>> ranges_;  // by the name of their section
    uint64_t parameters_ = 0;
};

// Reads a state file. The constructor reads what is needed to build the model, load_moments() the rest.
class StateReader : public SectionReader, public RunRecord {
  public:
    explicit StateReader(const std::string& path) : SectionReader(path) {
        if (header_[1] == 1) {
            read_version_1();
            return;
        }
        read_table();
        if (has("shard")) fail("%s: is one rank's share of a state, wanted the state file", path.c_str());
        refuse_unknown({"program", "settings", "progress", "fingerprints", "model_checksum", "muon_m",
                        "adam_m", "adam_v", "shards"});
        settings = text("settings", true), program = text("program", false);
        progress.each_field(FieldReader{text("progress", true)});
        fingerprints.each_field(FieldReader{text("fingerprints", false)});
        if (progress.step < 0) fail("%s: step is %d, wanted at least 0", path.c_str(), progress.step);
        if (has("shards")) {
            shards_ = numbers("shards");
            if (shards_.empty() || shards_.size() > INT32_MAX)
                fail("%s: has %zu shards, wanted at least 1", path.c_str(), shards_.size());
            open_.resize(shards_.size());
        } else {
            if (elements("adam_m") != elements("adam_v"))
                fail("%s: adam_m and adam_v differ in length", path.c_str());
        }
        if (find("model_checksum", UINT64, true)->count != 1)
            fail("%s: model_checksum has %" PRIu64 " numbers, wanted 1", path.c_str(),
                 find("model_checksum", UINT64, true)->count);
    }
    // The number of shards; 0: the moments are in the state file.
    size_t shards() const { return shards_.size(); }

    // Fills what this rank holds of the optimizer's arrays and of the master weights. The model's parameters
    // must be loaded: `params_checksum`, the checksum that load_model() returned, must be that of the model
    // that was saved together with this state. Of several shards, only those are read that hold what this
    // rank needs, first the one of the same number.
    template <class Model>
    void load_moments(Model& model, uint64_t params_checksum, int rank = 0) {
        const char* path = file_.path.c_str();
        const Optimizer saved = shards() ? shard((size_t)rank % shards()).optimizer() : optimizer(),
                        wanted = model.optimizer;
        if (saved != wanted)
            fail("%s: was saved with --optimizer %s, this run has %s", path, name_of(saved), name_of(wanted));
        if (!shards()) check_lengths(model.cfg);
        if (header_[1] == 1) check_version_1(model);
        else if (params_checksum != numbers("model_checksum")[0])
            fail("%s: checksum does not match: this file or its model file is damaged", path);
        for (auto& a : optimizer_arrays(saved)) load_array(model, a, a.state, rank);
        if (shards() && shard((size_t)rank % shards()).has(MASTER_ARRAY.section))
            load_array(model, MASTER_ARRAY, model.has(MASTER) ? MASTER : PARAMS, rank);
    }
    // For a model that keeps its parameters as they are in the model file.
    template <class Model>
    void load_moments(Model& model) {
        load_moments(model, model_checksum(model));
    }

    // Replaces the file by one with another record of its run, and the same moments, or shards.
    // `params_checksum`: see load_moments().
    void rewrite(const RunRecord& run, uint64_t params_checksum) {
        if (shards()) return save_sharded_state(run, params_checksum, shards_, path());
        std::vector<Section> sections;
        const std::vector<OptimizerArray> arrays = optimizer_arrays(optimizer());
        for (auto& a : arrays) sections.emplace_back(a.section, FLOAT32, elements(a.section));
        write_sections(path(), record_sections(run, params_checksum), sections, [&](StateWriter& out) {
            for (auto& a : arrays) {
                stream(a.section, [&](const float* x, size_t n) { out.write(x, n * sizeof(float)); });
                out.end();
            }
        });
    }

  private:
    // Elements of the arrays, and where a file has them: from element `at` of its sections on.
    struct Extent {
        Range range;
        uint64_t at;
        SectionReader* file;
    };

    // Whether a whole state is of a model of these sizes.
    void check_lengths(const Config& c) const {
        for (auto& a : optimizer_arrays(optimizer()))
            if (const uint64_t want = elements_of(all_ranges(c, a.state, optimizer()));
                elements(a.section) != want)
                fail("%s: section '%s' holds %" PRIu64 " parameters, the model has %" PRIu64 " for it",
                     path().c_str(), a.section, elements(a.section), want);
    }
    uint64_t elements(const char* section) const { return find(section, FLOAT32, true)->count; }
    // Reads what the model holds of a state from the sections of an array. Each file that has some of it is
    // first checked as a whole.
    template <class Model>
    void load_array(Model& model, const OptimizerArray& array, State state, int rank) {
        const std::vector<Range> need = ranges_of(model, state);
        if (shards()) shard((size_t)rank % shards()).expect_parameters(num_params(model.cfg));
        const std::vector<Extent> extents =
            shards() ? find_elements(array, need, rank)
                     : extents_of(all_ranges(model.cfg, array.state, optimizer()), this);
        std::vector<SectionReader*> files;
        for (const Extent& e : extents) files.push_back(e.file);
        std::sort(files.begin(), files.end());
        files.erase(std::unique(files.begin(), files.end()), files.end());
        for (SectionReader* file : files) file->stream(array.section, [](const float*, size_t) {});
        each_held(model, state, [&](float* x, size_t n, size_t first) {
            auto after = [](uint64_t element, const Extent& e) { return element < e.range.first; };
            auto e = std::upper_bound(extents.begin(), extents.end(), (uint64_t)first, after) - 1;
            for (uint64_t k; n; x += k, n -= k, first += k, ++e) {
                const uint64_t from = first - e->range.first;
                k = std::min<uint64_t>(n, e->range.count - from);
                e->file->read_floats(array.section, e->at + from, x, k);
            }
        });
    }
    // A file's, whose sections hold these ranges.
    static std::vector<Extent> extents_of(const std::vector<Range>& ranges, SectionReader* file) {
        std::vector<Extent> extents;
        uint64_t at = 0;
        for (const Range& r : ranges) extents.push_back({r, at, file}), at += r.count;
        return extents;
    }
    // Those of the shards that hold these elements of an array, in the elements' order.
    std::vector<Extent> find_elements(const OptimizerArray& array, const std::vector<Range>& need, int rank) {
        std::vector<Extent> extents;
        const uint64_t wanted = elements_of(need);
        uint64_t found = 0;
        for (size_t i = 0; i < shards() && found < wanted; i++) {
            ShardReader& s = shard(((size_t)rank + i) % shards());
            const uint64_t common = common_elements(s.ranges_of(array), need);
            if (!common) continue;
            found += common;
            const std::vector<Extent> all = extents_of(s.ranges_of(array), &s);
            extents.insert(extents.end(), all.begin(), all.end());
        }
        std::sort(extents.begin(), extents.end(),
                  [](const Extent& a, const Extent& b) { return a.range.first < b.range.first; });
        for (size_t i = 1; i < extents.size(); i++)
            if (extents[i].range.first < extents[i - 1].range.end())
                fail("%s: holds element %" PRIu64 ", and so does %s", extents[i].file->path().c_str(),
                     extents[i].range.first, extents[i - 1].file->path().c_str());
        if (found != wanted)
            fail("%s: its %zu shards hold %" PRIu64 " of the %" PRIu64 " elements that are needed",
                 file_.path.c_str(), shards(), found, wanted);
        return extents;
    }
    ShardReader& shard(size_t rank) {
        const ShardOf of = {progress.step, (int)rank, (int)shards()};
        if (!open_[rank])
            open_[rank] = std::make_unique<ShardReader>(dirname_of(file_.path), of, shards_[rank]);
        return *open_[rank];
    }

    // Version 1, so that runs of earlier programs go on: fixed fields in the header, the settings, the
    // moments, and one checksum of all that and of the model's parameters.
    void read_version_1() {
        const std::vector<int32_t>& h = header_;
        const char* path = file_.path.c_str();
        double d[9];
        uint64_t count;  // elements of a moment
        memcpy(&count, &h[8], 8), memcpy(&progress.position, &h[10], 8), memcpy(d, &h[12], sizeof d);
        progress.step = h[2], progress.best_step = h[4], progress.pending = h[5];
        progress.best_val = d[0], progress.smoothed = d[1], progress.smoothed_weight = d[2];
        progress.seconds = d[3], progress.last = {d[4], d[5], d[6], d[7], d[8]};
        if (h[2] < 0) fail("%s: step is %d, wanted at least 0", path, h[2]);
        if (h[3] < 0 || h[3] > 1 << 20)
            fail("%s: settings have %d bytes, wanted 0 to %d", path, h[3], 1 << 20);
        if (count > file_.size / 8)
            fail("%s: parameter count is %" PRIu64 ", too many for its %" PRIu64 " bytes", path, count,
                 file_.size);
        file_.expect_size(1024 + (uint64_t)h[3] + 8 * count + 8);
        sum_1_.add(h.data(), 1024);
        settings.resize((size_t)h[3]);
        file_.read(&settings[0], settings.size(), "settings");
        sum_1_.add(settings.data(), settings.size()), sum_1_.end_section();
        uint64_t at = file_.pos;
        for (auto& a : optimizer_arrays(ADAMW)) {
            table_.emplace_back(a.section, FLOAT32, count);
            table_.back().offset = at, at += table_.back().bytes();
        }
    }
    template <class Model>
    void check_version_1(Model& model) {
        if (model.has(MASTER))
            fail(
                "%s: is of version 1, whose checksum no rank can compute that keeps bf16 weights; go on "
                "for a step with --zero_stage 0, which saves a new one",
                file_.path.c_str());
        for (auto& a : optimizer_arrays(ADAMW)) {
            stream(a.section, [&](const float* x, size_t n) { sum_1_.add(x, n * sizeof(float)); });
            sum_1_.end_section();
        }
        model.each_piece(PARAMS, [&](const float* x, size_t n) { sum_1_.add(x, n * sizeof(float)); });
        sum_1_.end_section();
        uint64_t check;
        file_.read(&check, 8, "checksum");
        if (check != sum_1_.value())
            fail("%s: checksum does not match: this file or its model file is damaged", file_.path.c_str());
    }

    std::vector<uint64_t> shards_;  // their checksums
    std::vector<std::unique_ptr<ShardReader>> open_;
    Checksum sum_1_;
};

}  // namespace trainer
