// test_checkpoint.cpp - the state file: written, read back, damaged, written by an earlier version.
#include <doctest/doctest.h>
#include <sys/wait.h>

#include "dev/test_model.h"
#include "lib/checkpoint.h"

using namespace test;

namespace {

// A model with random parameters and moments.
PlainModel random_model(const Config& c, uint64_t seed) {
    PlainModel m(c);
    randomise(m, seed);
    for (State s : {ADAM_M, ADAM_V}) set_piece(m, s, Random(seed + (uint64_t)s).floats(num_params(c)));
    return m;
}
trainer::Progress some_progress() {
    trainer::Progress p;
    p.step = 1234, p.position = ((uint64_t)1 << 40) + 17, p.best_val = 2.25, p.best_step = 1200;
    p.smoothed = 0.1, p.smoothed_weight = 0.7, p.seconds = 99.5, p.pending = true;
    p.last.loss = 1.5, p.last.smoothed = 1.25, p.last.norm = 0.5, p.last.lr = 3e-4, p.last.seconds = 0.125;
    return p;
}
void check_same(trainer::Progress got, trainer::Progress want) {
    trainer::FieldWriter a, b;
    got.each_field(a), want.each_field(b);
    CHECK(a.text == b.text);
    CHECK(got.step == want.step);
    CHECK(got.position == want.position);
    CHECK(got.best_val == want.best_val);
    CHECK(got.best_step == want.best_step);
    CHECK(got.smoothed == want.smoothed);
    CHECK(got.smoothed_weight == want.smoothed_weight);
    CHECK(got.seconds == want.seconds);
    CHECK(got.pending == want.pending);
    CHECK(!memcmp(&got.last, &want.last, sizeof want.last));
}
// Does what the model holds of a state equal that part of `want`?
template <class Model>
bool holds(Model& m, State s, const Floats& want) {
    bool same = true;
    m.each_range(s, [&](const float* x, size_t n, size_t first) {
        same = same && first + n <= want.size() && !memcmp(x, &want[first], n * sizeof(float));
    });
    return same;
}
// What reading a whole state file says; "" where all is well.
std::string reading_error(const std::string& path, PlainModel& m) {
    return error_of([&] {
        trainer::StateReader reader(path);
        reader.load_moments(m);
    });
}

}  // namespace

TEST_CASE("a full disk leaves the old model and state whole, and no temporary file") {
    TempDir dir;
    const Config c = config(2, 2, 16, 11, 5);
    PlainModel m = random_model(c, 84), next = random_model(c, 85);
    std::string path = dir / "model.bin", state = dir / "state.bin";
    trainer::save_model(m, path), trainer::save_state(m, {}, "a=1\n", state);
    const std::string old = read_file(path), old_state = read_file(state);
    for (rlim_t room : {(rlim_t)0, (rlim_t)100, (rlim_t)1024, (rlim_t)5000, (rlim_t)(old.size() - 1)}) {
        std::string e, e_state;
        {
            FullDisk disk(room);
            e = error_of([&] { trainer::save_model(next, path); });
            e_state = error_of([&] { trainer::save_state(next, {}, "a=1\n", state); });
        }
        CHECK((contains(e, path + ": cannot write") && contains(e, "unchanged")));
        CHECK((contains(e_state, state + ": cannot write") && contains(e_state, "unchanged")));
        CHECK((read_file(path) == old));
        CHECK((read_file(state) == old_state));
        CHECK(count_files(dir.path) == 2);
    }
    CHECK(contains(error_of([&] { trainer::save_model(m, dir / "no/such/folder.bin"); }),
                   "no/such/folder.bin: cannot write"));
}

TEST_CASE("writing a file removes what a killed program left of it, and no other file") {
    TempDir dir;
    const std::string path = dir / "model.bin";
    pid_t pid = fork();
    if (pid == 0) {
        AtomicFile file(path);
        kill(getpid(), SIGKILL);
    }
    int status;
    waitpid(pid, &status, 0);
    const std::string left = path + strf(".tmp%d", (int)pid);
    REQUIRE(file_exists(left));
    const std::vector<std::string> others = {dir / strf("state.bin.tmp%d", (int)pid), path + ".tmp1",
                                             path + ".tmp", left + ".docx"};  // process 1 is alive
    for (const std::string& other : others) write_file(other, "");
    AtomicFile file(path);
    file.write("new"), file.commit();
    CHECK(read_file(path) == "new");
    CHECK(!file_exists(left));
    for (const std::string& other : others) CHECK(file_exists(other));
    // A name that is a folder's removes nothing in it.
    for (const std::string& folder : {dir.path + "/", std::string("")})
        CHECK(contains(error_of([&] { AtomicFile wrong(folder); }), "'" + folder + "': names no file"));
    CHECK(file_exists(path));
    for (const std::string& other : others) CHECK(file_exists(other));
}

TEST_CASE("a training state comes back as it was: progress, settings, program, moments") {
    TempDir dir;
    PlainModel m = random_model(small_config(), 86), back(m.cfg);
    set_piece(back, PARAMS, parameters(m));
    const std::string settings = "batch_size=4\nprompt=قفا نبك\n";
    for (trainer::Progress p : {some_progress(), trainer::Progress()}) {
        trainer::save_state(m, p, settings, dir / "state.bin", "train_gpt2 7", {1, ~(uint64_t)0, 3});
        trainer::StateReader reader(dir / "state.bin");
        CHECK(reader.settings == settings);
        CHECK(reader.program == "train_gpt2 7");
        CHECK((reader.fingerprints.train == 1 && reader.fingerprints.val == ~(uint64_t)0 &&
               reader.fingerprints.tokenizer == 3));
        check_same(reader.progress, p);
        reader.load_moments(back);
        CHECK(same_bits(piece(m, ADAM_M), piece(back, ADAM_M)));
        CHECK(same_bits(piece(m, ADAM_V), piece(back, ADAM_V)));
    }
}

TEST_CASE("a state file is a header, a table of sections, and the sections, each on a multiple of 64") {
    TempDir dir;
    PlainModel m = random_model(config(3, 1, 3, 3, 1), 89);
    const std::string settings = "a=1\nb=2\nc";
    trainer::save_state(m, some_progress(), settings, dir / "state.bin", "me");
    const std::string file = read_file(dir / "state.bin");
    int32_t header[256];
    memcpy(header, file.data(), 1024);
    CHECK((header[0] == 20261123 && header[1] == 2 && header[2] == 7));
    std::map<std::string, std::string> sections;
    for (int i = 0; i < header[2]; i++) {
        const char* row = file.data() + 1024 + 64 * i;
        uint64_t number[4];  // count, bytes of an element, offset, checksum
        memcpy(number, row + 32, sizeof number);
        CHECK(number[2] % 64 == 0);
        sections[row] = file.substr(number[2], number[0] * number[1]);
        CHECK(checksum_of(sections[row].data(), sections[row].size()) == number[3]);
    }
    CHECK(sections["program"] == "me");
    CHECK(sections["settings"] == settings);
    CHECK(contains(sections["progress"], "step=1234\nposition=1099511627793\n"));
    auto bytes = [](const Floats& x) { return std::string((const char*)x.data(), x.size() * 4); };
    CHECK((sections["adam_m"] == bytes(piece(m, ADAM_M))));
    CHECK((sections["adam_v"] == bytes(piece(m, ADAM_V))));
    std::string params = bytes(parameters(m));
    uint64_t check = checksum_of(params.data(), params.size());
    CHECK((sections["model_checksum"] == std::string((const char*)&check, 8)));
}

TEST_CASE("the checksum is the same however its data is cut into pieces, and differs for other data") {
    // By its definition: word by word, the last one filled up with zeros.
    auto definition = [](const std::string& data) {
        uint64_t h = 0x243F6A8885A308D3u;
        for (size_t i = 0; i < data.size(); i += 8) {
            uint64_t word = 0;
            memcpy(&word, &data[i], std::min<size_t>(8, data.size() - i));
            h = (h ^ word) * 0x9E3779B97F4A7C15u, h ^= h >> 29;
        }
        return h;
    };
    Random r(92);
    for (int trial = 0; trial < 200; trial++) {
        Checksum sum;
        std::string data;
        for (size_t n = r.below(70); n; n--) data += (char)r.below(256);
        for (size_t i = 0, n; i < data.size(); i += n) {
            n = std::min(data.size() - i, r.below(4) ? r.below(20) : 0);
            sum.add(data.data() + i, n);
        }
        sum.end_section();
        CHECK(sum.value() == definition(data));
        if (data.empty()) continue;
        std::string other = data;
        other[r.below(data.size())] ^= (char)(1 << r.below(8));
        CHECK(checksum_of(other.data(), other.size()) != sum.value());
    }
}

TEST_CASE("a state with any byte changed, cut, prolonged, or of another model is refused by name") {
    TempDir dir;
    Config c = config(1, 1, 2, 3, 2);
    c.Vp = 3;
    for (Optimizer optimizer : {ADAMW, MUON}) {
        PlainModel m(c, optimizer);
        randomise(m, 87);
        trainer::save_state(m, some_progress(), "a=1\n", dir / "state.bin", "me");
        const std::string good = read_file(dir / "state.bin"), path = dir / "bad.bin";
        CHECK(reading_error(dir / "state.bin", m).empty());
        size_t accepted = 0, unnamed = 0;
        for (size_t i = 0; i < good.size(); i++) {
            std::string damaged = good;
            damaged[i] = (char)(damaged[i] ^ (1 << i * 5 % 8));
            write_file(path, damaged);
            std::string e = reading_error(path, m);
            accepted += e.empty(), unnamed += !contains(e, path);
        }
        CHECK(accepted == 0);
        CHECK(unnamed == 0);
        for (size_t n : {(size_t)0, (size_t)1023, (size_t)1024, (size_t)1028, (size_t)1500, good.size() - 64,
                         good.size() - 1}) {
            write_file(path, good.substr(0, n));
            CHECK((contains(reading_error(path, m), path)));
        }
        write_file(path, good + "x");
        CHECK(contains(reading_error(path, m), "trailing data"));
        for (size_t at : {(size_t)0, num_params(c) - 1}) {
            Floats before = parameters(m), changed = before;
            changed[at] = std::nextafter(before[at], 10.0f);
            set_piece(m, PARAMS, changed);
            CHECK(contains(reading_error(dir / "state.bin", m), "checksum does not match"));
            set_piece(m, PARAMS, before);
        }
        PlainModel other(config(1, 1, 4, 3, 2), optimizer);
        const OptimizerArray first = optimizer_arrays(optimizer)[0];
        CHECK(
            contains(reading_error(dir / "state.bin", other),
                     strf("section '%s' holds %zu parameters", first.section, piece(m, first.state).size())));
    }
}

TEST_CASE("a state by Muon whose arrays are not as long as the model's is refused, whatever their sum") {
    TempDir dir;
    PlainModel m(small_config(), MUON);
    const size_t momentum = piece(m, MUON_M).size(), others = piece(m, ADAM_M).size();
    auto error = [&](size_t of_muon, size_t of_adam) {
        const std::vector<trainer::Section> arrays = {{"muon_m", trainer::FLOAT32, of_muon},
                                                      {"adam_m", trainer::FLOAT32, of_adam},
                                                      {"adam_v", trainer::FLOAT32, of_adam}};
        const Floats zeros(of_muon + of_adam);
        trainer::write_sections(
            dir / "state.bin",
            trainer::record_sections({some_progress(), "", "", {}}, trainer::model_checksum(m)), arrays,
            [&](trainer::StateWriter& out) {
                for (size_t n : {of_muon, of_adam, of_adam}) out.add(zeros.data(), n * 4);
            });
        return reading_error(dir / "state.bin", m);
    };
    CHECK(error(momentum, others) == "");
    CHECK(contains(error(momentum - 3, others + 3),
                   strf("section 'muon_m' holds %zu parameters, the model has %zu", momentum - 3, momentum)));
    CHECK(contains(error(momentum, others - 1), "section 'adam_m' holds "));
}

namespace {

// A state file of these sections, each with its bytes; those that save_state writes unless `without` them.
void write_sections(const std::string& path, PlainModel& m, const std::string& without,
                    std::vector<std::pair<trainer::Section, std::string>> more) {
    trainer::FieldWriter progress;
    some_progress().each_field(progress);
    uint64_t check = trainer::model_checksum(m), n = num_params(m.cfg);
    auto bytes = [](const Floats& x) { return std::string((const char*)x.data(), x.size() * 4); };
    std::vector<std::pair<trainer::Section, std::string>> all = {
        {{"settings", trainer::TEXT, 4}, "a=1\n"},
        {{"progress", trainer::TEXT, progress.text.size()}, progress.text},
        {{"model_checksum", trainer::UINT64, 1}, std::string((const char*)&check, 8)},
        {{"adam_m", trainer::FLOAT32, n}, bytes(piece(m, ADAM_M))},
        {{"adam_v", trainer::FLOAT32, n}, bytes(piece(m, ADAM_V))}};
    all.insert(all.begin() + 2, more.begin(), more.end());
    std::vector<trainer::Section> table;
    for (auto& [section, content] : all)
        if (!section.is(without.c_str())) table.push_back(section);
    trainer::StateWriter w(path, table);
    for (auto& [section, content] : all)
        if (!section.is(without.c_str())) w.add(content.data(), content.size());
    w.commit();
}

}  // namespace

TEST_CASE("an unknown section is skipped, or refused by name where it is required") {
    TempDir dir;
    PlainModel m = random_model(small_config(), 94), back(m.cfg);
    const std::string path = dir / "state.bin";
    set_piece(back, PARAMS, parameters(m));
    trainer::Section unknown("curriculum", trainer::TEXT, 5, false);
    unknown.type = 99, unknown.element = 3;  // a type of its own
    write_sections(path, m, "", {{unknown, std::string(15, 'f')}});
    CHECK(reading_error(path, back) == "");
    CHECK(same_bits(piece(m, ADAM_M), piece(back, ADAM_M)));
    CHECK(trainer::StateReader(path).program == "");  // not recorded
    trainer::Section momentum("muon_momentum", trainer::FLOAT32, 2);
    write_sections(path, m, "", {{momentum, std::string(8, 'm')}});
    CHECK(reading_error(path, m) ==
          path + ": needs section 'muon_momentum', which this program does not know; a newer one wrote it");
    for (const char* name : {"settings", "progress", "model_checksum", "adam_m", "adam_v"}) {
        write_sections(path, m, name, {});
        CHECK(reading_error(path, m) == path + ": lacks section '" + name + "'");
    }
    trainer::Section odd("program", trainer::FLOAT32, 2, false);
    write_sections(path, m, "", {{odd, std::string(8, 'p')}});
    CHECK(contains(reading_error(path, m), "section 'program' is of type 2 (4 bytes), wanted 1"));
}

namespace {

// A state file as version 1 wrote it, of L=1 NH=1 C=2 V=Vp=3 maxT=2; offsets and bytes in hexadecimal, lines
// of zeros left out, the length at the end.
const char* const VERSION_1[] = {"0000 0329350101000000d204000038000000b0040000010000000000000000000000",
                                 "0020 5800000000000000110000000001000000000000000002409a9999999999b93f",
                                 "0040 666666666666e63f0000000000e05840000000000000f83f000000000000f43f",
                                 "0060 000000000000e03f613255302aa9333f000000000000c03f0000000000000000",
                                 "0400 646174613d6f75742f646174610a62617463685f73697a653d340a70726f6d70",
                                 "0420 743dd982d981d8a720d986d8a8d9830a726573756d653d0ad0cc4cbed0ccccbd",
                                 "0440 00000000d0cccc3dd0cc4c3ed0cc4cbed0ccccbd00000000d0cccc3dd0cc4c3e",
                                 "0460 d0cc4cbed0ccccbd00000000d0cccc3dd0cc4c3ed0cc4cbed0ccccbd00000000",
                                 "0480 d0cccc3dd0cc4c3ed0cc4cbed0ccccbd00000000d0cccc3dd0cc4c3ed0cc4cbe",
                                 "04a0 d0ccccbd00000000d0cccc3dd0cc4c3ed0cc4cbed0ccccbd00000000d0cccc3d",
                                 "04c0 d0cc4c3ed0cc4cbed0ccccbd00000000d0cccc3dd0cc4c3ed0cc4cbed0ccccbd",
                                 "04e0 00000000d0cccc3dd0cc4c3ed0cc4cbed0ccccbd00000000d0cccc3dd0cc4c3e",
                                 "0500 d0cc4cbed0ccccbd00000000d0cccc3dd0cc4c3ed0cc4cbed0ccccbd00000000",
                                 "0520 d0cccc3dd0cc4c3ed0cc4cbed0ccccbd00000000d0cccc3dd0cc4c3ed0cc4cbe",
                                 "0540 d0ccccbd00000000d0cccc3dd0cc4c3ed0cc4cbed0ccccbd00000000d0cccc3d",
                                 "0560 d0cc4c3ed0cc4cbed0ccccbd00000000d0cccc3dd0cc4c3ed0cc4cbed0ccccbd",
                                 "0580 00000000d0cccc3dd0cc4c3ed0cc4cbed0ccccbd00000000d0cc4c3ed0cc4c3d",
                                 "05a0 00000000d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d00000000d0cc4c3dd0cc4c3e",
                                 "05c0 d0cc4c3ed0cc4c3d00000000d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d00000000",
                                 "05e0 d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d00000000d0cc4c3dd0cc4c3ed0cc4c3e",
                                 "0600 d0cc4c3d00000000d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d00000000d0cc4c3d",
                                 "0620 d0cc4c3ed0cc4c3ed0cc4c3d00000000d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d",
                                 "0640 00000000d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d00000000d0cc4c3dd0cc4c3e",
                                 "0660 d0cc4c3ed0cc4c3d00000000d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d00000000",
                                 "0680 d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d00000000d0cc4c3dd0cc4c3ed0cc4c3e",
                                 "06a0 d0cc4c3d00000000d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d00000000d0cc4c3d",
                                 "06c0 d0cc4c3ed0cc4c3ed0cc4c3d00000000d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d",
                                 "06e0 00000000d0cc4c3dd0cc4c3ed0cc4c3ed0cc4c3d0000000034562af85d2adef9",
                                 "0700"};

std::string version_1() {
    std::string file;
    for (const char* line : VERSION_1) {
        file.resize(strtoul(line, nullptr, 16));
        for (const char* hex = strchr(line, ' '); hex && hex[1]; hex += 2)
            file += (char)strtoul(std::string(hex + 1, 2).c_str(), nullptr, 16);
    }
    return file;
}

}  // namespace

TEST_CASE("a state that version 1 wrote is read: settings, progress, moments, bound to its model") {
    TempDir dir;
    const std::string path = dir / "state.bin";
    write_file(path, version_1());
    Config c = config(1, 1, 2, 3, 2);
    c.Vp = 3;
    PlainModel m(c);
    Floats params(num_params(c)), m1(params.size()), m2(params.size());
    for (size_t i = 0; i < params.size(); i++) {
        params[i] = (float)(i % 7) * 0.25f - 0.5f;
        const float g = (float)(i % 5) - 2;  // one step of AdamW: (1 - beta) times g, and times its square
        m1[i] = (1 - 0.9f) * g, m2[i] = (1 - 0.95f) * g * g;
    }
    set_piece(m, PARAMS, params);
    {
        trainer::StateReader reader(path);
        CHECK(reader.settings == "data=out/data\nbatch_size=4\nprompt=قفا نبك\nresume=\n");
        CHECK(reader.program == "");
        check_same(reader.progress, some_progress());
        reader.load_moments(m);
    }
    CHECK(same_bits(piece(m, ADAM_M), m1));
    CHECK(same_bits(piece(m, ADAM_V), m2));
    for (int r : {0, 1})
        for (bool masters : {false, true}) {
            ShardedModel rank(c, 2, r, masters);
            set_piece(rank, PARAMS, params);
            const std::string e = error_of([&] { trainer::StateReader(path).load_moments(rank, 0, r); });
            if (masters) CHECK(contains(e, path + ": is of version 1, whose checksum"));
            else CHECK((e == "" && holds(rank, ADAM_M, m1) && holds(rank, ADAM_V, m2)));
        }

    const std::string good = version_1(), bad = dir / "bad.bin";
    size_t accepted = 0;
    for (size_t i = 0; i < good.size(); i++) {
        std::string damaged = good;
        damaged[i] = (char)(damaged[i] ^ (1 << i * 5 % 8));
        write_file(bad, damaged);
        accepted += reading_error(bad, m).empty();
    }
    CHECK(accepted == 0);
    write_file(bad, good.substr(0, good.size() - 1));
    CHECK(contains(reading_error(bad, m), "truncated"));
    params[0] += 1, set_piece(m, PARAMS, params);
    CHECK(contains(reading_error(path, m), "checksum does not match"));
}

// ---------------------------------------------------------------------------------------------
// Shards

namespace {

// What a state holds, by State, in the file's order; [PARAMS] are the most exact weights that there are.
using Arrays = std::array<Floats, NUM_STATES>;

Arrays random_arrays(const Config& c, uint64_t seed) {
    PlainModel m = random_model(c, seed);
    return {piece(m, PARAMS), {}, piece(m, ADAM_M),
            piece(m, ADAM_V), {}, Random(seed + 9).floats(num_params(c))};
}
// Sets what the model holds of the optimizer's arrays.
template <class Model>
void set_arrays(Model& m, const Arrays& arrays) {
    for (State s : {ADAM_M, ADAM_V, MUON_M})
        if (m.has(s))
            m.each_range(s, [&](float* x, size_t n, size_t first) {
                std::copy(&arrays[s][first], &arrays[s][first] + n, x);
            });
}
trainer::RunRecord some_record(int step) {
    trainer::RunRecord run = {some_progress(), "a=1\n", "me", {1, 2, 3}};
    run.progress.step = step;
    return run;
}
// A rank's share of the arrays.
ShardedModel rank_of(const Config& c, int world, int rank, bool masters, const Arrays& arrays,
                     Optimizer optimizer = ADAMW) {
    ShardedModel m(c, world, rank, masters, optimizer);
    set_piece(m, PARAMS, arrays[PARAMS]);
    set_arrays(m, arrays);
    return m;
}
// What the trainer does when the ranks save after a step, until `writes` files are written.
void save_ranks(const std::string& dir, int step, const Config& c, int world, bool masters,
                const Arrays& arrays, int writes = 99, Optimizer optimizer = ADAMW) {
    std::vector<uint64_t> shards;
    for (int r = 0; r < world && writes-- > 0; r++) {
        ShardedModel m = rank_of(c, world, r, masters, arrays, optimizer);
        shards.push_back(trainer::save_shard(m, {step, r, world}, dir));
    }
    ShardedModel first = rank_of(c, world, 0, masters, arrays, optimizer);
    if (writes-- > 0) trainer::save_model(first, trainer::numbered(dir, "model", step));
    if (writes > 0)
        trainer::save_sharded_state(some_record(step), trainer::model_checksum(first), shards,
                                    trainer::numbered(dir, "state", step));
}
// Loads a checkpoint as the trainer does. Returns the error; "" where all is well.
template <class Model>
std::string load(Model& m, const std::string& dir, int step, int rank = 0) {
    return error_of([&] {
        ModelReader model(trainer::numbered(dir, "model", step));
        const uint64_t params = trainer::load_model(m, model);
        trainer::StateReader(trainer::numbered(dir, "state", step)).load_moments(m, params, rank);
    });
}
// Loads on as many ranks, and compares. `exact`: the weights of the checkpoint.
void check_loads(const std::string& dir, const Config& c, int world, bool masters, const Arrays& arrays,
                 const Floats& exact, Optimizer optimizer = ADAMW) {
    CAPTURE(world);
    CAPTURE(masters);
    for (int r = 0; r < world; r++) {
        ShardedModel m(c, world, r, masters, optimizer);
        REQUIRE(load(m, dir, 7, r) == "");
        CHECK(same_bits(piece(m, PARAMS), masters ? rounded(exact) : exact));
        CHECK((!masters || holds(m, MASTER, exact)));
        for (auto& a : optimizer_arrays(optimizer)) CHECK(holds(m, a.state, arrays[a.state]));
    }
}
// With sizes that no number of ranks divides; and so small that most ranks hold nothing.
std::vector<Config> odd_configs() {
    std::vector<Config> configs = {small_config(), config(3, 1, 3, 3, 1), config(1, 1, 1, 1, 1)};
    configs[1].Vp = 3, configs[2].Vp = 1;
    return configs;
}

}  // namespace

TEST_CASE(
    "shards: the state of W ranks comes back bit for bit on any number of ranks, and in a whole model") {
    for (const Config& c : odd_configs())
        for (int world = 1; world <= 4; world++)
            for (bool masters : {false, true}) {
                CAPTURE(c.text());
                CAPTURE(world);
                CAPTURE(masters);
                TempDir dir;
                const Arrays arrays = random_arrays(c, 95);
                save_ranks(dir.path, 7, c, world, masters, arrays);
                CHECK(count_files(dir.path) == (size_t)world + 2);
                for (int others = 1; others <= 4; others++)
                    for (bool with : {false, true})
                        check_loads(dir.path, c, others, with, arrays, arrays[PARAMS]);
                PlainModel whole(c);
                REQUIRE(load(whole, dir.path, 7) == "");
                for (State s : {PARAMS, ADAM_M, ADAM_V}) CHECK(same_bits(piece(whole, s), arrays[s]));
                trainer::StateReader reader(trainer::numbered(dir.path, "state", 7));
                CHECK(reader.shards() == (size_t)world);
                check_same(reader.progress, some_record(7).progress);
                CHECK((reader.settings == "a=1\n" && reader.program == "me" && reader.fingerprints.val == 2));
            }
}

TEST_CASE("shards: a state that is not sharded is read by any number of ranks, with masters or without") {
    for (const Config& c : odd_configs()) {
        TempDir dir;
        PlainModel m = random_model(c, 96);
        const Arrays arrays = {piece(m, PARAMS), {}, piece(m, ADAM_M), piece(m, ADAM_V)};
        trainer::save_model(m, trainer::numbered(dir.path, "model", 7));
        trainer::save_state(m, some_record(7).progress, "a=1\n", trainer::numbered(dir.path, "state", 7));
        for (int world = 1; world <= 4; world++)
            for (bool masters : {false, true})
                check_loads(dir.path, c, world, masters, arrays, arrays[PARAMS]);
    }
}

TEST_CASE("Muon's momentum and AdamW's moments come back, whole or in shards, on any number of ranks") {
    for (const Config& c : odd_configs()) {
        CAPTURE(c.text());
        const Arrays arrays = random_arrays(c, 104);
        PlainModel whole(c, MUON), back(c, MUON), adam(c);
        set_piece(whole, PARAMS, arrays[PARAMS]), set_arrays(whole, arrays);
        TempDir one;
        const std::string state = trainer::numbered(one.path, "state", 7);
        trainer::save_model(whole, trainer::numbered(one.path, "model", 7));
        trainer::save_state(whole, some_record(7).progress, "a=1\n", state);
        CHECK(piece(whole, MUON_M).size() + piece(whole, ADAM_M).size() == num_params(c));
        CHECK(piece(whole, ADAM_M).size() == piece(whole, ADAM_V).size());
        trainer::StateReader(state).rewrite(some_record(7), trainer::model_checksum(whole));
        REQUIRE(load(back, one.path, 7) == "");
        for (auto& a : optimizer_arrays(MUON)) CHECK(same_bits(piece(back, a.state), piece(whole, a.state)));
        const std::string refused = ": was saved with --optimizer ";
        CHECK(load(adam, one.path, 7) == state + refused + "muon, this run has adamw");
        for (int world = 1; world <= 4; world++)
            for (bool masters : {false, true}) {
                check_loads(one.path, c, world, masters, arrays, arrays[PARAMS], MUON);
                TempDir dir;
                save_ranks(dir.path, 7, c, world, masters, arrays, 99, MUON);
                for (int others = 1; others <= 4; others++)
                    check_loads(dir.path, c, others, masters, arrays, arrays[PARAMS], MUON);
                PlainModel again(c, MUON);
                REQUIRE(load(again, dir.path, 7) == "");
                for (State s : {PARAMS, MUON_M, ADAM_M, ADAM_V}) CHECK(holds(again, s, arrays[s]));
                CHECK(contains(load(adam, dir.path, 7), refused + "muon, this run has adamw"));
                save_ranks(dir.path, 8, c, world, masters, arrays);
                CHECK(contains(load(again, dir.path, 8), refused + "adamw, this run has muon"));
            }
    }
}

TEST_CASE("shards: a rank reads no shard that it does not need") {
    TempDir dir;
    const Config c = small_config();
    const Arrays arrays = random_arrays(c, 97);
    for (int r = 0; r < 3; r++) {
        save_ranks(dir.path, 7, c, 3, true, arrays);
        for (int other = 0; other < 3; other++)
            if (other != r) unlink((dir / trainer::shard_file(7, other, 3)).c_str());
        ShardedModel same(c, 3, r, true);
        CHECK(load(same, dir.path, 7, r) == "");
        CHECK(holds(same, ADAM_V, arrays[ADAM_V]));
        PlainModel whole(c);
        CHECK(contains(load(whole, dir.path, 7), ": not found; the state is in 3 such files"));
    }
}

TEST_CASE("shards: a file holds its step, rank, ranks and parameters, its ranges, and their elements") {
    TempDir dir;
    const Config c = small_config();
    const Arrays arrays = random_arrays(c, 98);
    save_ranks(dir.path, 7, c, 2, true, arrays);
    auto sections_of = [&](const std::string& name) {
        const std::string file = read_file(dir / name);
        int32_t header[256];
        memcpy(header, file.data(), 1024);
        CHECK((header[0] == 20261123 && header[1] == 2));
        std::map<std::string, std::string> sections;
        for (int i = 0; i < header[2]; i++) {
            const char* row = file.data() + 1024 + 64 * i;
            uint64_t number[4];  // count, bytes of an element, offset, checksum
            memcpy(number, row + 32, sizeof number);
            sections[row] = file.substr(number[2], number[0] * number[1]);
        }
        sections["checksum"] = file.substr(16, 8);
        return sections;
    };
    auto numbers = [](const std::string& bytes) {
        std::vector<uint64_t> x(bytes.size() / 8);
        memcpy(x.data(), bytes.data(), bytes.size());
        return x;
    };
    std::string checksums, elements;
    std::vector<int> seen(num_params(c));
    for (uint64_t r : {0, 1}) {
        auto s = sections_of(strf("state_00000007_rank%dof2.bin", (int)r));
        CHECK(s.size() == 6);
        CHECK((numbers(s["shard"]) == std::vector<uint64_t>{7, r, 2, num_params(c)}));
        const std::vector<uint64_t> ranges = numbers(s["ranges"]);
        for (auto [name, want] :
             {std::pair<const char*, State>{"adam_m", ADAM_M}, {"adam_v", ADAM_V}, {"master", PARAMS}}) {
            std::string bytes;
            for (size_t i = 0; i < ranges.size(); i += 2)
                bytes += std::string((const char*)&arrays[want][ranges[i]], ranges[i + 1] * 4);
            CHECK((s[name] == bytes));
        }
        for (size_t i = 0; i < ranges.size(); i += 2)
            for (size_t k = 0; k < ranges[i + 1]; k++) seen[ranges[i] + k]++;
        checksums += s["checksum"];
    }
    CHECK(seen == std::vector<int>(num_params(c), 1));
    auto state = sections_of("state_00000007.bin");
    CHECK((state["shards"] == checksums));
    CHECK(state.count("adam_m") == 0);
    CHECK(state["settings"] == "a=1\n");
}

TEST_CASE("shards: one that is missing, damaged, of another rank, step or model, or not a shard is named") {
    TempDir dir;
    const Config c = small_config();
    const Arrays arrays = random_arrays(c, 99);
    save_ranks(dir.path, 7, c, 2, true, arrays), save_ranks(dir.path, 8, c, 2, true, random_arrays(c, 100));
    const std::string path = dir / trainer::shard_file(7, 1, 2), good = read_file(path);
    auto error = [&](const std::string& content) {
        write_file(path, content);
        PlainModel m(c);
        return load(m, dir.path, 7);
    };
    CHECK(error(good) == "");
    CHECK(error(read_file(dir / trainer::shard_file(8, 1, 2))) ==
          path + ": holds the share of rank 1 of 2 after step 8, wanted rank 1 of 2 after step 7");
    CHECK(error(read_file(dir / trainer::shard_file(7, 0, 2))) ==
          path + ": holds the share of rank 0 of 2 after step 7, wanted rank 1 of 2 after step 7");
    CHECK(contains(error(good.substr(0, good.size() - 64)), path + ": has "));
    CHECK(contains(error(good.substr(0, good.size() - 64)), "(truncated)"));
    CHECK(contains(error(good.substr(0, 500)), path + ": is not a training state file: 500 bytes"));
    CHECK(error(read_file(dir / "state_00000007.bin")) ==
          path + ": needs section 'settings', which this " + "program does not know; a newer one wrote it");
    const std::string state = dir / "state_00000007.bin", of_state = read_file(state);
    write_file(state, good), write_file(path, good);
    PlainModel m(c);
    CHECK(load(m, dir.path, 7) == state + ": is one rank's share of a state, wanted the state file");
    write_file(state, of_state);
    // Of the same step, but saved by another run.
    TempDir other;
    save_ranks(other.path, 7, c, 2, true, random_arrays(c, 101));
    const std::string e = error(read_file(other / trainer::shard_file(7, 1, 2)));
    CHECK(contains(e, path + ": is not the file that was saved with state_00000007.bin: its checksum is "));
    size_t accepted = 0, unnamed = 0;
    for (size_t i = 0; i < good.size(); i += i < 1500 ? 1 : 7) {
        std::string damaged = good;
        damaged[i] = (char)(damaged[i] ^ (1 << i * 5 % 8));
        const std::string what = error(damaged);
        accepted += what.empty(), unnamed += what.find(path) != 0;
    }
    CHECK(accepted == 0);
    CHECK(unnamed == 0);
    unlink(path.c_str());
    CHECK(load(m, dir.path, 7) ==
          path + ": not found; the state is in 2 such files, one for each rank that saved it");
    write_file(path, good);
    ShardedModel larger(config(2, 2, 8, 12, 5), 2, 1, true);
    save_ranks(other.path, 9, larger.cfg, 2, true, random_arrays(larger.cfg, 102));
    CHECK(contains(load(larger, dir.path, 7, 1), trainer::numbered(dir.path, "model", 7)));
}

namespace {

// A shard with these numbers, and as many elements as the last arguments say.
uint64_t write_shard(const std::string& dir, int rank, const std::vector<uint64_t>& shard,
                     const std::vector<uint64_t>& ranges, size_t m, size_t v) {
    const std::vector<trainer::Section> arrays = {{"adam_m", trainer::FLOAT32, m},
                                                  {"adam_v", trainer::FLOAT32, v}};
    const Floats zeros(m + v);
    return trainer::write_sections(
        dir + "/" + trainer::shard_file(7, rank, 2),
        {trainer::number_section("shard", shard), trainer::number_section("ranges", ranges)}, arrays,
        [&](trainer::StateWriter& out) { out.add(zeros.data(), m * 4), out.add(zeros.data(), v * 4); });
}

}  // namespace

TEST_CASE("shards: ranges that overlap, leave a gap, or do not fit their elements are refused by name") {
    TempDir dir;
    const Config c = small_config();
    PlainModel m = random_model(c, 103);
    const uint64_t n = num_params(c);
    const std::string state = trainer::numbered(dir.path, "state", 7),
                      first = dir / trainer::shard_file(7, 0, 2), second = dir / trainer::shard_file(7, 1, 2);
    trainer::save_model(m, trainer::numbered(dir.path, "model", 7));
    auto error = [&](std::vector<uint64_t> a, size_t elements_a, std::vector<uint64_t> b, size_t elements_b,
                     size_t numbers = 4) {
        std::vector<uint64_t> of = {7, 1, 2, n, 0};
        of.resize(numbers);
        const std::vector<uint64_t> shards = {
            write_shard(dir.path, 0, {7, 0, 2, n}, a, elements_a, elements_a),
            write_shard(dir.path, 1, of, b, elements_b, elements_b)};
        trainer::save_sharded_state(some_record(7), trainer::model_checksum(m), shards, state);
        return load(m, dir.path, 7);
    };
    CHECK(error({0, 10}, 10, {10, n - 10}, n - 10) == "");
    CHECK(error({5, 1, 7, n - 7}, n - 6, {0, 5, 6, 1}, 6) == "");
    CHECK(error({0, 10}, 10, {9, n - 9}, n - 9) == second + ": holds element 9, and so does " + first);
    CHECK(error({0, 10}, 10, {11, n - 11}, n - 11) ==
          strf("%s: its 2 shards hold %d of the %d elements that are needed", state.c_str(), (int)n - 1,
               (int)n));
    CHECK(error({0, 10}, 10, {}, 0) ==
          strf("%s: its 2 shards hold 10 of the %d elements that are needed", state.c_str(), (int)n));
    const std::string bad = ", wanted at least one, after the range before, among " + std::to_string(n);
    CHECK(error({0, 10}, 10, {10, n - 9}, n - 9) ==
          second + strf(": section 'ranges': range 0 is %d elements from 10 on", (int)n - 9) + bad);
    CHECK(error({0, 10}, 10, {12, 1, 11, 1}, 2) ==
          second + ": section 'ranges': range 1 is 1 elements from 11 on" + bad);
    CHECK(error({0, 10}, 10, {10, 0}, 0) ==
          second + ": section 'ranges': range 0 is 0 elements from 10 on" + bad);
    CHECK(contains(error({0, 10}, 10, {~(uint64_t)0, 2}, 2),
                   second + ": section 'ranges': range 0 is 2 elements from "));
    CHECK(contains(error({0, 10}, 10, {10, ~(uint64_t)0}, 2), second + ": section 'ranges': range 0 is "));
    CHECK(error({0, 10}, 10, {10, 5, 20}, 5) == second + ": section 'ranges' has 3 numbers, wanted pairs");
    CHECK(error({0, 10}, 10, {10, n - 10}, n - 11) ==
          second + strf(": section 'adam_m' has %d elements, its ranges have %d", (int)n - 11, (int)n - 10));
    CHECK(error({0, 10}, 10, {10, n - 10}, n - 10, 5) ==
          second + ": section 'shard' has 5 numbers, wanted 4");
    CHECK(error({0, 10}, 10, {10, n - 10}, n - 10, 3) ==
          second + ": section 'shard' has 3 numbers, wanted 4");
    const std::vector<uint64_t> other_model = {write_shard(dir.path, 0, {7, 0, 2, n + 1}, {0, n}, n, n),
                                               write_shard(dir.path, 1, {7, 1, 2, n + 1}, {n, 1}, 1, 1)};
    trainer::save_sharded_state(some_record(7), trainer::model_checksum(m), other_model, state);
    CHECK(load(m, dir.path, 7) ==
          first + strf(": is of a model of %d parameters, this one has %d", (int)n + 1, (int)n));
    trainer::save_sharded_state(some_record(7), trainer::model_checksum(m), {}, state);
    CHECK(load(m, dir.path, 7) == state + ": has 0 shards, wanted at least 1");
}

TEST_CASE("shards: a program that does not know them refuses the state by the section's name") {
    TempDir dir;
    const Config c = small_config();
    save_ranks(dir.path, 7, c, 2, false, random_arrays(c, 104));
    const std::string state = read_file(trainer::numbered(dir.path, "state", 7));
    trainer::Section last;
    memcpy(&last, state.data() + 1024 + 64 * 5, sizeof last);
    CHECK(last.is("shards"));
    CHECK(last.required == 1);
}

TEST_CASE("shards: a crash between any two writes leaves the checkpoint before, and no half one") {
    const Config c = small_config();
    const Arrays old = random_arrays(c, 105), arrays = random_arrays(c, 106);
    for (int writes = 0; writes <= 5; writes++) {  // three shards, the model, the state
        CAPTURE(writes);
        TempDir dir;
        save_ranks(dir.path, 7, c, 3, true, old), save_ranks(dir.path, 9, c, 3, true, arrays, writes);
        CHECK(trainer::checkpoints_in(dir.path) ==
              (writes < 5 ? std::vector<int>{7} : std::vector<int>{7, 9}));
        check_loads(dir.path, c, 2, true, old, old[PARAMS]);
        // The next checkpoint removes what the crash has left, and nothing of a whole checkpoint.
        save_ranks(dir.path, 11, c, 2, true, arrays);
        trainer::remove_stray_shards(dir.path);
        for (int r = 0; r < 3; r++) {
            CHECK(file_exists(dir / trainer::shard_file(7, r, 3)));
            CHECK(file_exists(dir / trainer::shard_file(9, r, 3)) == (writes == 5));
        }
        check_loads(dir.path, c, 2, true, old, old[PARAMS]);
        // A checkpoint is removed state first.
        unlink(trainer::numbered(dir.path, "state", 7).c_str());
        CHECK(trainer::checkpoints_in(dir.path).front() > 7);
        trainer::remove_checkpoint(dir.path, 7), trainer::remove_stray_shards(dir.path);
        CHECK(!file_exists(trainer::numbered(dir.path, "model", 7)));
        for (int r = 0; r < 3; r++) CHECK(!file_exists(dir / trainer::shard_file(7, r, 3)));
        CHECK((file_exists(dir / trainer::shard_file(11, 0, 2)) &&
               file_exists(dir / trainer::shard_file(11, 1, 2))));
    }
}

TEST_CASE("shards: a full disk leaves no shard; an earlier one of the name stays") {
    TempDir dir;
    const Config c = small_config();
    ShardedModel m = rank_of(c, 2, 1, true, random_arrays(c, 107));
    auto save = [&] { trainer::save_shard(m, {7, 1, 2}, dir.path); };
    const std::string path = dir / trainer::shard_file(7, 1, 2);
    auto save_on_full_disk = [&] {
        FullDisk disk(2000);
        return error_of(save);
    };
    CHECK(contains(save_on_full_disk(), path + ": cannot write"));
    CHECK(count_files(dir.path) == 0);
    save();
    const std::string before = read_file(path);
    CHECK(contains(save_on_full_disk(), path + ": cannot write"));
    CHECK((read_file(path) == before));
    CHECK(count_files(dir.path) == 1);
}

TEST_CASE("a state is rewritten with other progress, and keeps its moments or shards, of version 1, too") {
    const Config c = small_config();
    TempDir dir;
    const std::string state = trainer::numbered(dir.path, "state", 7);
    trainer::RunRecord run = some_record(7);
    run.progress.best_val = 1.125, run.settings = "b=2\n";
    auto rewrite = [&](uint64_t params) { trainer::StateReader(state).rewrite(run, params); };
    const Arrays arrays = random_arrays(c, 108);
    save_ranks(dir.path, 7, c, 3, true, arrays);
    PlainModel bf16(c), whole(c);
    set_piece(bf16, PARAMS, rounded(arrays[PARAMS]));
    rewrite(trainer::model_checksum(bf16));
    check_same(trainer::StateReader(state).progress, run.progress);
    check_loads(dir.path, c, 2, true, arrays, arrays[PARAMS]);

    PlainModel m = random_model(c, 109);
    trainer::save_model(m, trainer::numbered(dir.path, "model", 7));
    trainer::save_state(m, some_progress(), "a=1\n", state, "me", {1, 2, 3});
    rewrite(trainer::model_checksum(m));
    const std::string rewritten = read_file(state);
    trainer::save_state(m, run.progress, "b=2\n", state, "me", {1, 2, 3});
    CHECK((rewritten == read_file(state)));
    // Damage is not copied.
    std::string damaged = rewritten;
    damaged[damaged.size() - 100] ^= 1;
    write_file(state, damaged);
    CHECK(contains(error_of([&] { rewrite(1); }), "checksum of section 'adam_v' does not match"));
    CHECK((read_file(state) == damaged));

    write_file(state, version_1());
    trainer::StateReader old(state);
    rewrite(12345);
    trainer::StateReader now(state);
    CHECK((now.settings == "b=2\n" && old.settings != now.settings));
    for (const char* name : {"adam_m", "adam_v"}) {
        Floats a, b;
        for (auto [from, to] : {std::pair{&old, &a}, {&now, &b}})
            from->stream(name, [to = to](const float* x, size_t n) { to->insert(to->end(), x, x + n); });
        CHECK((same_bits(a, b) && a.size() > 10));
    }
}
