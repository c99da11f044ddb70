// test_run_folder.cpp - who works in a run's folder, and how a new run takes an earlier one's place.
#include <doctest/doctest.h>
#include <sys/wait.h>

#include "dev/test_util.h"
#include "lib/run_folder.h"

namespace {

void write_all(const std::string& dir, const std::vector<std::string>& names, const std::string& content) {
    for (const std::string& name : names) {
        make_dirs(dirname_of(dir + "/" + name));
        write_file(dir + "/" + name, content + " " + name);
    }
}
std::string what_is(const std::string& path) { return file_exists(path) ? read_file(path) : "nothing"; }

}  // namespace

TEST_CASE("run folder: a second trainer is refused with the first one's process and host") {
    TempDir dir;
    trainer::RunFolder first;
    first.open(dir.path);
    std::string e = error_of([&] {
        trainer::RunFolder second;
        second.open(dir.path);
    });
    CHECK(contains(e, dir.path + ": process " + std::to_string(getpid()) + " on "));
    CHECK(contains(e, "is at work in it; wait for it, or take another folder with -o"));
    first.close();
    trainer::RunFolder third;
    third.open(dir.path);
    // A process that was killed holds no lock, though its file is there.
    third.close();
    pid_t pid = fork();
    if (pid == 0) {
        trainer::RunFolder killed;
        killed.open(dir.path);
        kill(getpid(), SIGKILL);
    }
    int status;
    waitpid(pid, &status, 0);
    CHECK(file_exists(dir / ".arapoet.lock"));
    CHECK(error_of([&] { third.open(dir.path); }) == "");
}

TEST_CASE("run folder: a run whose folder was moved leaves the lock of a new run in its old place alone") {
    TempDir dir;
    make_dirs(dir / "out");
    trainer::RunFolder moved, there;
    moved.open(dir / "out");
    std::filesystem::rename(dir / "out", dir / "elsewhere");
    make_dirs(dir / "out");
    there.open(dir / "out");
    moved.close();
    CHECK(file_exists(dir / "out/.arapoet.lock"));
}

TEST_CASE("run folder: an earlier run moves to previous/N with its data; the user's other files stay") {
    TempDir dir;
    const std::vector<std::string> run = {"model.bin",
                                          "model_00000010.bin",
                                          "state_00000010.bin",
                                          "state_00000010_rank0of2.bin",
                                          "state_00000010_rank1of2.bin",
                                          "log.csv",
                                          "main.log",
                                          "tokenizer.bin",
                                          "data/train.bin"};
    for (int n = 1; n <= 3; n++) {
        CAPTURE(n);
        if (n == 1)
            write_all(dir.path, run, "run 0"), write_all(dir.path, {"notes.txt", "mine/model.bin"}, "user's");
        write_all(dir / ".new", run, strf("run %d", n));
        unlink((dir / ".new/model_00000010.bin").c_str()), unlink((dir / ".new/model.bin").c_str());
        trainer::RunFolder folder;
        folder.open(dir.path);
        CHECK(what_is(dir / "model.bin") == strf("run %d model.bin", n - 1));  // nothing has moved yet
        folder.begin(true);
        CHECK(folder.dir() == dir / ".new");
        CHECK(folder.final_place(dir / ".new/data/train.bin") == dir / "data/train.bin");
        CHECK(folder.final_place(dir / "other/train.bin") == dir / "other/train.bin");
        write_all(folder.dir(), {"model.bin", "model_00000010.bin"}, strf("run %d", n));
        std::string said = folder.take_place();
        CHECK(contains(said, strf("the earlier run is now in %s/previous/%d/ (", dir.path.c_str(), n)));
        CHECK(folder.dir() == dir.path);
        for (const std::string& name : run) {
            CHECK(what_is(dir / name) == strf("run %d %s", n, name.c_str()));
            CHECK(what_is(dir / strf("previous/%d/%s", n, name.c_str())) ==
                  strf("run %d %s", n - 1, name.c_str()));
        }
        CHECK(!file_exists(dir / ".new"));
        CHECK(what_is(dir / "notes.txt") == "user's notes.txt");
        CHECK(what_is(dir / "mine/model.bin") == "user's mine/model.bin");
    }
}

TEST_CASE("run folder: without an earlier run the new one begins in its place") {
    TempDir dir;
    trainer::RunFolder folder;
    folder.open(dir.path), folder.begin(true);
    CHECK(folder.dir() == dir.path);
    CHECK(folder.take_place() == "");
    folder.close();
    write_all(dir / ".new", {"data/train.bin"}, "new");  // data that were prepared for it come along
    folder.open(dir.path), folder.begin(true);
    CHECK(folder.take_place() == "");
    CHECK(what_is(dir / "data/train.bin") == "new data/train.bin");
}

TEST_CASE("run folder: a killed new run that had a model takes its place at the next start") {
    TempDir dir;
    write_all(dir.path, {"model.bin"}, "old"),
        write_all(dir / ".new", {"model_00000005.bin", "log.csv"}, "new");
    { trainer::BeforeTraining lock(dir / ".new/data"); }  // as prepare_data does before it writes there
    CHECK(what_is(dir / "previous/1/model.bin") == "old model.bin");
    CHECK(what_is(dir / "model_00000005.bin") == "new model_00000005.bin");
    trainer::RunFolder folder;
    folder.open(dir.path);
    CHECK(contains(error_of([&] { trainer::BeforeTraining lock(dir / ".new/data"); }), "is at work in it"));
    trainer::BeforeTraining lock(dir / "data");  // any other folder is the user's
}

TEST_CASE("run folder: the empty folder of a move that was killed at its very end goes at the next start") {
    TempDir dir;
    write_all(dir.path, {"model.bin", "log.csv"}, "whole");
    make_dirs(dir / ".new");
    trainer::RunFolder folder;
    CHECK(folder.open(dir.path) == "");
    CHECK(!file_exists(dir / ".new"));
    folder.close();
    write_all(dir.path, {".new/data/train.bin"}, "waiting");  // data that were prepared stay
    CHECK(folder.open(dir.path) == "");
    CHECK(what_is(dir / ".new/data/train.bin") == "waiting .new/data/train.bin");
}

TEST_CASE("run folder: temporary files of killed programs are removed, the user's files are not") {
    TempDir dir;
    pid_t killed = fork();
    if (killed == 0) _exit(0);
    int status;
    waitpid(killed, &status, 0);
    const std::string tmp = strf(".tmp%d", (int)killed);
    const std::string shard = trainer::shard_file(8, 3, 12);
    write_all(dir.path, {"model.bin" + tmp, "log.csv" + tmp, ".new/leaving" + tmp, shard + tmp}, "half");
    // Process 1 is alive.
    write_all(dir.path, {"notes" + tmp, "model.bin.tmp1", ".new/data/train.bin"}, "whole");
    trainer::RunFolder folder;
    folder.open(dir.path);
    for (const std::string& name :
         {std::string("model.bin"), std::string("log.csv"), std::string(".new/leaving"), shard})
        CHECK(!file_exists(dir / (name + tmp)));
    for (const std::string& name : {"notes" + tmp, std::string("model.bin.tmp1"), std::string(".new/data")})
        CHECK(file_exists(dir / name));
}

TEST_CASE("run folder: a shard is known by its name, with step, rank and ranks") {
    CHECK(trainer::shard_file(500, 0, 8) == "state_00000500_rank0of8.bin");
    for (int step : {0, 500, 123456789})
        for (int rank : {0, 11}) {
            const std::string name = trainer::shard_file(step, rank, 12);
            CHECK(trainer::shard_step(name) == step);
            CHECK(trainer::is_run_file(name));
            CHECK(trainer::number_of(name, "state") == -1);
        }
    for (const char* name :
         {"state_00000500.bin", "state_500_rank0of8.bin", "state_00000500_rank8of8.bin",
          "state_00000500_rank", "state_00000500_rank-1of8.bin", "state_00000500_rank0of8.bin.tmp1",
          "state_00000500_rank00of8.bin", "my_state_00000500_rank0of8.bin", "state_-0000500_rank0of8.bin"})
        CHECK_MESSAGE(trainer::shard_step(name) == -1, name);
}

TEST_CASE("run folder: data of an aborted run move to previous when the new run has other data") {
    TempDir dir;
    write_all(dir / ".new", {"data/train.bin"}, "aborted");
    trainer::RunFolder folder;
    folder.open(dir.path), folder.begin(false);
    CHECK(folder.dir() == dir.path);
    CHECK(what_is(dir / "previous/1/data/train.bin") == "aborted data/train.bin");
    CHECK(!file_exists(dir / ".new"));
}

TEST_CASE("run folder: a new run whose data would replace the user's folder is refused by name") {
    TempDir dir;
    write_all(dir.path, {"data/train.bin", "data/thesis.txt"}, "user's");
    write_all(dir / ".new", {"data/train.bin"}, "new");
    trainer::RunFolder folder;
    folder.open(dir.path);
    CHECK(contains(error_of([&] { folder.begin(true); }),
                   dir.path + "/data: is in the way of the new run's data, and does not look like a run's"));
    unlink((dir / "data/thesis.txt").c_str());
    CHECK(error_of([&] { folder.begin(true); }) == "");
}

TEST_CASE("run folder: a file written while a move was interrupted moves to previous, too") {
    TempDir dir;
    write_all(dir.path, {"previous/1/model.bin"}, "old"), write_all(dir / ".new", {"model.bin"}, "new");
    write_file(dir / "model.bin", "later"), write_file(dir / ".new/arriving", "1\nmodel.bin\n");
    trainer::RunFolder folder;
    folder.open(dir.path);
    CHECK(what_is(dir / "model.bin") == "new model.bin");
    CHECK(what_is(dir / "previous/1/model.bin") == "old previous/1/model.bin");
    CHECK(what_is(dir / "previous/2/model.bin") == "later");
}

// dev/soak/soak.py stops the move at each of its system calls; here its two states as they are found on disk.
TEST_CASE("run folder: a move that was stopped goes on where it stopped") {
    for (int moved = 0; moved <= 4; moved++) {
        CAPTURE(moved);
        TempDir dir;
        write_all(dir.path, {"model.bin", "log.csv"}, "old"),
            write_all(dir / ".new", {"model.bin", "log.csv"}, "new");
        auto leave = [&](const char* name) {
            make_dirs(dir / "previous/1");
            rename_file(dir / name, dir / (std::string("previous/1/") + name));
        };
        write_file(dir / (moved < 3 ? ".new/leaving" : ".new/arriving"), "1\nlog.csv\nmodel.bin\n");
        if (moved >= 1) leave("log.csv");
        if (moved >= 2) leave("model.bin");
        if (moved >= 4) rename_file(dir / ".new/log.csv", dir / "log.csv");
        trainer::RunFolder folder;
        folder.open(dir.path);
        for (const char* name : {"model.bin", "log.csv"}) {
            CHECK(what_is(dir / name) == std::string("new ") + name);
            CHECK(what_is(dir / (std::string("previous/1/") + name)) == std::string("old ") + name);
        }
        CHECK(!file_exists(dir / ".new"));
    }
}
