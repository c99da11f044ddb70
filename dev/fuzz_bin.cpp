// Feeds mutated .bin files to their readers under libFuzzer, AddressSanitizer and UBSan (make fuzz): model
// files, token files, training states and their shards. tokenizer/fuzz_tokenizer.cpp does the same with
// tokenizer files.
//
// The first byte of an input chooses the kind of file; the rest is the file. Each file must be read, or
// refused with an Error of one line. A model or state that was read, written and read again must be the same.
// Anything else is a finding.
#include "dev/fuzz.h"
#include "lib/trainer.h"

namespace {

using fuzz::read, fuzz::require, fuzz::write;

// SHARD: the first shard of a state of two ranks. The last two are of a run by Muon.
enum Mode { MODEL, TOKENS, STATE, SHARDED_STATE, SHARD, MUON_STATE, MUON_SHARD, NUM_MODES };
Optimizer optimizer_of(int mode) { return mode == MUON_STATE || mode == MUON_SHARD ? MUON : ADAMW; }

// A model's parameters, gradients and the optimizer's arrays without a model, which is all that the files
// need.
struct Numbers {
    Config cfg;
    Optimizer optimizer;
    std::vector<float> x[NUM_STATES];  // indexed by State
    explicit Numbers(const Config& c, Optimizer o) : cfg(c), optimizer(o) {
        for (auto& v : x)
            for (size_t i = 0; i < num_params(c); i++) v.push_back((float)i);
    }
    bool has(State s) const { return s != MASTER; }
    bool sharded() const { return false; }
    template <class F>
    void each_range(State s, F f) {
        for (const ParamPiece& p : param_pieces(cfg))
            if (state_has(s, optimizer, p.block_matrix)) f(&x[s][p.file], p.size, p.file);
    }
    template <class F>
    void each_piece(State s, F f) {
        each_range(s, [&](float* p, size_t n, size_t) { f(p, n); });
    }
};

// What one of two ranks holds of it, master weights among it.
struct Half : Numbers {
    const size_t rank;
    Half(const Config& c, Optimizer o, size_t rank_) : Numbers(c, o), rank(rank_) {}
    bool has(State) const { return true; }
    template <class F>
    void each_range(State s, F f) {
        const size_t half = num_params(cfg) / 2, begin = rank * half, end = rank ? num_params(cfg) : half;
        Numbers::each_range(s, [&](float* p, size_t n, size_t first) {
            const size_t from = std::max(first, begin), to = std::min(first + n, end);
            if (from < to) f(p + (from - first), to - from, from);
        });
    }
};

Config tiny() {
    Config c;
    c.maxT = 3, c.V = 5, c.Vp = 7, c.L = 2, c.NH = 2, c.C = 4, c.eps = 1e-6f;
    return c;
}

std::string settings() {
    trainer::Options o;
    Flags f("fuzz", "");
    trainer::add_flags(f, o, "train_gpt2");
    return f.values();
}

// Saves the state of two ranks whose shards have these checksums.
void save_sharded(const std::string& path, const std::vector<uint64_t>& shards) {
    Numbers model(tiny(), ADAMW);
    trainer::save_sharded_state({{}, settings(), "", {}}, trainer::model_checksum(model), shards, path);
}

// A temporary folder with the shards of a state in it, by AdamW and, in its folder muon, by Muon; and the
// contents of valid files.
struct Valid : fuzz::Folder {
    std::string content[NUM_MODES];
    std::vector<uint64_t> shards[2];  // by the optimizer: their checksums
    std::string folder(Optimizer o) const { return o == MUON ? dir + "/muon" : dir; }
    Valid() {
        make_dirs(folder(MUON));
        write_tokens(dir + "/tokens", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}),
            content[TOKENS] = read(dir + "/tokens");
        for (Optimizer o : {ADAMW, MUON}) {
            Numbers model(tiny(), o);
            trainer::save_model(model, dir + "/model"), content[MODEL] = read(dir + "/model");
            trainer::save_state(model, {}, settings(), dir + "/state");
            content[o == MUON ? MUON_STATE : STATE] = read(dir + "/state");
            for (int r : {0, 1}) {
                Half half(tiny(), o, (size_t)r);
                shards[o].push_back(trainer::save_shard(half, {0, r, 2}, folder(o)));
            }
            content[o == MUON ? MUON_SHARD : SHARD] = read(trainer::ShardOf{0, 0, 2}.path(folder(o)));
        }
        save_sharded(dir + "/state", shards[ADAMW]), content[SHARDED_STATE] = read(dir + "/state");
    }
};
const Valid& valid() {
    static const Valid v;
    return v;
}

// Reads a model in two pieces, writes it, and reads it again.
void read_model(const std::string& path) {
    ModelReader r(path);
    size_t n = num_params(r.cfg), half = n / 2;
    std::vector<float> x(n), again(n);
    r.read(x.data(), half), r.read(x.data() + half, n - half);
    std::string copy = path + ".copy";
    ModelWriter w(copy, r.cfg, r.version);
    w.add(x.data(), n), w.finish();
    ModelReader back(copy);
    back.read(again.data(), n);
    require(back.cfg.same_shape(r.cfg) && back.version == r.version &&
            !memcmp(x.data(), again.data(), n * 4));
}

// Reads all evaluation batches, and training batches from any position.
void read_tokens(const std::string& path) {
    TokenFile file(path);
    uint64_t seed = file[0],
             position = file.size() > 4 ? (uint64_t)file[1] << 32 | (uint64_t)file[2] << 16 | file[3] : 0;
    int T = 1 + file[file.size() - 1] % 9, B = 1 + file[file.size() / 2] % 5;
    std::vector<int> x((size_t)(B * T)), y(x);
    EvalLoader eval(file, B, T);
    size_t targets = 0;
    for (size_t i = 0; i < eval.batches(); i++) {
        eval.get(i, x.data(), y.data());
        for (int t : y) targets += t >= 0;
    }
    require(targets == file.size() - 1);
    TrainLoader train(file, T, seed, seed % 2, 0, 1);
    train.seek(position);
    for (int i = 0; i < 3; i++) train.next(B, x.data(), y.data());
    require(train.position() == position + 3 * (uint64_t)B);
    file.check_vocab(50257);
}

// Restores the flags and the optimizer's arrays as --resume does, writes the state, and reads it again.
void read_state(const std::string& path, Optimizer optimizer) {
    trainer::StateReader r(path);
    trainer::Options o;
    Flags f("fuzz", "");
    trainer::add_flags(f, o, "train_gpt2");
    Numbers model(tiny(), optimizer);
    try {
        f.restore(r.settings);
    } catch (const UsageError&) {}
    r.load_moments(model);
    std::string copy = path + ".copy";
    trainer::save_state(model, r.progress, r.settings, copy);
    trainer::StateReader back(copy);
    back.load_moments(model);
    require(back.settings == r.settings && back.progress.step == r.progress.step &&
            back.progress.position == r.progress.position);
}

// The same with a file as the first shard of a state, which knows its checksum.
void read_shard(const std::string& content, Optimizer optimizer) {
    const std::string dir = valid().folder(optimizer), first = trainer::ShardOf{0, 0, 2}.path(dir),
                      &good = valid().content[optimizer == MUON ? MUON_SHARD : SHARD];
    uint64_t checksum = 0;
    if (content.size() >= 24) memcpy(&checksum, content.data() + 16, 8);
    write(first, content), save_sharded(dir + "/in", {checksum, valid().shards[optimizer][1]});
    try {
        read_state(dir + "/in", optimizer);
    } catch (...) {
        write(first, good);
        throw;
    }
    write(first, good);
}

// Makes a state's checksums right, so that mutations reach past them.
void sign_state(uint8_t* data, size_t size) {
    int32_t n;
    if (size < 1024) return;
    memcpy(&n, data + 8, 4);
    if (n < 1 || (size_t)n > (size - 1024) / sizeof(trainer::Section)) return;
    std::vector<trainer::Section> table((size_t)n);
    const size_t bytes = table.size() * sizeof(trainer::Section);
    memcpy(table.data(), data + 1024, bytes);
    Numbers model(tiny(), ADAMW);  // whose checksum is that of its parameters alone
    for (trainer::Section& s : table) {
        if (s.element > 64 || s.count > size || s.offset > size || s.bytes() > size - s.offset) continue;
        const uint64_t check = trainer::model_checksum(model);
        if (s.is("model_checksum") && s.bytes() == 8) memcpy(data + s.offset, &check, 8);
        s.checksum = checksum_of(data + s.offset, s.bytes());
    }
    const uint64_t check = checksum_of(table.data(), bytes);
    memcpy(data + 1024, table.data(), bytes), memcpy(data + 16, &check, 8);
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    size =
        fuzz::mutate(data, size, max_size, seed, NUM_MODES, [](int mode) { return valid().content[mode]; });
    if (data[0] % NUM_MODES >= STATE && seed % 2) sign_state(data + 1, size - 1);
    return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 1) return 0;
    const std::string path = valid().dir + "/in";
    const int mode = data[0] % NUM_MODES;
    write(path, std::string((const char*)data + 1, size - 1));
    try {
        if (mode == MODEL) read_model(path);
        else if (mode == TOKENS) read_tokens(path);
        else if (mode == SHARD || mode == MUON_SHARD)
            read_shard(std::string((const char*)data + 1, size - 1), optimizer_of(mode));
        else read_state(path, optimizer_of(mode));
    } catch (const Error& e) {
        require(!strchr(e.what(), '\n'));
    }
    return 0;
}
