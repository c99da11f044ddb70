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
    PlainModel m = random_model(c, 87);
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
    PlainModel other(config(1, 1, 4, 3, 2));
    CHECK(contains(reading_error(dir / "state.bin", other), strf("holds %zu parameters", num_params(c))));
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
