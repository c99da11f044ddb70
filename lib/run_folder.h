// run_folder.h - the folder of a run, --out: who works in it, and how a new run takes the place of an earlier
// one.
//
// Nothing of an earlier run that has a model is lost. A new run (--overwrite) is written to OUT/.new. As soon
// as it has a model, it replaces the earlier run: that run's files move to OUT/previous/N, and those of
// OUT/.new to OUT. If the new run stops before that, the earlier one is unchanged.
//
// The move can be stopped at any moment, and goes on when a program next opens the folder. Before it begins,
// OUT/.new/leaving is written: N, and the names of the files that leave OUT. When they have left, it is
// renamed to OUT/.new/arriving, and what else is in OUT/.new moves to OUT. Each file is moved by one rename.
#pragma once

#include <sys/file.h>

#include <algorithm>
#include <filesystem>

#include "lib/io.h"

namespace trainer {

// All bytes in a file or folder.
inline uint64_t bytes_in(const std::string& path) {
    struct stat st;
    if (lstat(path.c_str(), &st)) return 0;
    if (!S_ISDIR(st.st_mode)) return (uint64_t)st.st_size;
    uint64_t sum = 0;
    for (const std::string& name : names_in(path)) sum += bytes_in(path + "/" + name);
    return sum;
}

// Only one program at a time writes a run's files in a folder. The lock ends with its process, however that
// ends.
class FolderLock {
  public:
    FolderLock() = default;
    ~FolderLock() { release(); }
    FolderLock(const FolderLock&) = delete;
    FolderLock& operator=(const FolderLock&) = delete;

    // Locks dir, or fails with the process that has the lock. A file system without locks is taken as
    // unlocked.
    void take(const std::string& dir) {
        follow(dir);
        for (;;) {
            fd_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
            if (fd_ < 0) fail("%s: cannot write: %s", path_.c_str(), strerror(errno));
            if (flock(fd_, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
                char who[256] = "";
                ssize_t n = pread(fd_, who, sizeof who - 1, 0);
                close(fd_), fd_ = -1;
                who[n > 0 ? n : 0] = 0;
                fail("%s: %s is at work in it; wait for it, or take another folder with -o", dir.c_str(),
                     *who ? who : "another process");
            }
            // Another process may have removed the file between open and flock: then the lock is on nothing.
            if (is_ours(path_)) break;
            close(fd_), fd_ = -1;
        }
        char host[256] = "an unknown host";
        gethostname(host, sizeof host - 1);
        std::string who = strf("process %d on %s", (int)getpid(), host);
        if (ftruncate(fd_, 0) || pwrite(fd_, who.data(), who.size(), 0) < 0) {}  // only for the message above
    }
    void release() {
        if (fd_ < 0) return;
        if (is_ours(path_)) unlink(path_.c_str());  // not another run's, if this one's folder was moved
        close(fd_), fd_ = -1;
    }
    bool held() const { return fd_ >= 0; }
    // Where the locked folder is, if it was moved since; else "".
    std::string moved_to() const {
        if (fd_ < 0 || is_ours(path_)) return "";
        std::error_code none;  // without /proc, which has a link to each open file, nothing is known
        const std::string now = std::filesystem::read_symlink(strf("/proc/self/fd/%d", fd_), none);
        return !none && is_ours(now) ? dirname_of(now) : "";
    }
    void follow(const std::string& dir) { path_ = dir + "/" + NAME; }

  private:
    bool is_ours(const std::string& path) const {
        struct stat ours, there;
        return !fstat(fd_, &ours) && !stat(path.c_str(), &there) && there.st_ino == ours.st_ino &&
               there.st_dev == ours.st_dev;
    }
    static constexpr const char* NAME = ".arapoet.lock";
    std::string path_;
    int fd_ = -1;
};

// The file of a run's step, "model_00000500.bin" or "state_00000500.bin", and the step of such a name; -1
// where the name is another one.
inline std::string numbered(const char* kind, int step) { return strf("%s_%08d.bin", kind, step); }
inline int number_of(const std::string& name, const char* kind) {
    const size_t at = strlen(kind) + 1;
    const int step = name.size() > at ? atoi(name.c_str() + at) : -1;
    return step >= 0 && name == numbered(kind, step) ? step : -1;
}
// The file of a rank's share of a state, "state_00000500_rank0of8.bin", and the step of such a name; -1 where
// the name is another one.
inline std::string shard_file(int step, int rank, int world) {
    return strf("state_%08d_rank%dof%d.bin", step, rank, world);
}
inline int shard_step(const std::string& name) {
    int step = -1, rank = 0, world = 0;
    if (sscanf(name.c_str(), "state_%d_rank%dof%d.bin", &step, &rank, &world) != 3) return -1;
    const bool valid = step >= 0 && rank >= 0 && rank < world;
    return valid && name == shard_file(step, rank, world) ? step : -1;
}
inline bool is_model_file(const std::string& name) {
    return name == "model.bin" || number_of(name, "model") >= 0;
}
// The files of a run, loss.png of `make plot` included. Other files in its folder are the user's, and stay.
inline bool is_run_file(const std::string& name) {
    for (const char* n : {"tokenizer.bin", "recipe.txt", "log.csv", "main.log", "loss.png", "finetune.md"})
        if (name == n) return true;
    return is_model_file(name) || number_of(name, "state") >= 0 || shard_step(name) >= 0;
}
inline bool holds_run_files(const std::string& dir) {
    std::vector<std::string> names = names_in(dir);
    return std::any_of(names.begin(), names.end(), is_run_file);
}
inline bool holds_run(const std::string& dir) {
    std::vector<std::string> names = names_in(dir);
    return std::any_of(names.begin(), names.end(), is_model_file);
}

// Removes the temporary files of trainers that were killed while they wrote.
inline void remove_leftovers(const std::string& dir) {
    for (const std::string& name : names_in(dir)) {
        const std::string file = abandoned(name);
        if (is_run_file(file) || file == "leaving") unlink((dir + "/" + name).c_str());
    }
}
// The files that ./prepare_data writes to a folder
constexpr const char* DATA_FILES[] = {"train.bin", "val.bin", "tokenizer.bin", "recipe.txt"};
// Is this what a run may move: a folder of token files, or what `make finetune` converted?
inline bool is_run_data(const std::string& path) {
    const std::string name = path.substr(path.rfind('/') + 1);
    if (name == "pretrained.bin" || name == "pretrained_tokenizer.bin") return true;
    struct stat st;
    if (lstat(path.c_str(), &st) || !S_ISDIR(st.st_mode)) return false;
    for (const std::string& file : names_in(path))
        if (std::find(std::begin(DATA_FILES), std::end(DATA_FILES), file) == std::end(DATA_FILES) &&
            file[0] != '.')
            return false;
    return true;
}

// Where the Nth of the earlier runs in dir is, and the first number that is free.
inline std::string previous_folder(const std::string& dir, int n) {
    return dir + "/previous/" + std::to_string(n);
}
inline int next_previous(const std::string& dir) {
    int n = 1;
    while (file_exists(previous_folder(dir, n))) n++;
    return n;
}
// What to tell the user about a run that is now number n.
inline std::string say_previous(const std::string& dir, int n) {
    const std::string now = previous_folder(dir, n);
    return strf("the earlier run is now in %s/ (%s)", now.c_str(),
                human_bytes((double)bytes_in(now)).c_str());
}
// Moves a file of dir to dir/previous/N. Returns where it is.
inline std::string set_aside(const std::string& dir, const std::string& name) {
    const std::string to = previous_folder(dir, next_previous(dir));
    make_dirs(to), rename_file(dir + "/" + name, to + "/" + name);
    return to + "/" + name;
}
// Moves those of the named files that are in dir to dir/previous/N. Returns what to tell the user, or "".
inline std::string set_aside(const std::string& dir, const std::vector<std::string>& names) {
    const int n = next_previous(dir);
    bool any = false;
    for (const std::string& name : names)
        if (file_exists(dir + "/" + name)) {
            make_dirs(previous_folder(dir, n)), any = true;
            rename_file(dir + "/" + name, previous_folder(dir, n) + "/" + name);
        }
    return any ? say_previous(dir, n) : "";
}

class RunFolder {
  public:
    // For a process that does not write to the folder: only names it.
    void name(const std::string& out) { out_ = dir_ = out; }
    // Locks the folder, which exists, and completes a move that was interrupted. Returns what to tell the
    // user, or "".
    std::string open(const std::string& out) {
        out_ = dir_ = out;
        lock_.take(out);
        for (const std::string& dir : {out, out + "/.new"}) remove_leftovers(dir);
        const std::string done = recover();
        rmdir((out + "/.new").c_str());  // empty where a crash came just before arrive() removed it
        return done;
    }
    // A new run begins: in OUT/.new where there is an earlier run, or where its data have been put there
    // (data_there). Data that an aborted run has left in OUT/.new move to OUT/previous. Fails where the move
    // that comes later cannot succeed.
    void begin(bool data_there) {
        const std::string aside = out_ + "/.new";
        std::vector<std::string> left = names_in(aside);
        if (!data_there && !std::all_of(left.begin(), left.end(), is_run_file)) {
            make_dirs(out_ + "/previous");
            rename_file(aside, previous(next_number()));
        }
        if (!holds_run_files(out_) && !file_exists(aside)) return;
        for (const std::string& name : names_in(aside))
            if (!is_run_file(name) && file_exists(out_ + "/" + name) && !is_run_data(out_ + "/" + name))
                fail(
                    "%s/%s: is in the way of the new run's %s, and does not look like a run's; take another "
                    "folder with -o",
                    out_.c_str(), name.c_str(), name.c_str());
        if (holds_run_files(out_)) {
            make_dirs(out_ + "/previous");
            struct stat here, there;
            if (!stat(out_.c_str(), &here) && !stat((out_ + "/previous").c_str(), &there) &&
                here.st_dev != there.st_dev)
                fail(
                    "%s/previous: is on another disk, an earlier run cannot move there; take another folder "
                    "with -o",
                    out_.c_str());
        }
        dir_ = aside;
        make_dirs(dir_);
    }
    bool is_open() const { return lock_.held(); }
    // Where the run's files are now.
    const std::string& dir() const { return dir_; }
    bool aside() const { return dir_ != out_; }
    // Where a file that is now in OUT/.new will be when the run has taken its place.
    std::string final_place(const std::string& path) const {
        auto normal = [](const std::string& p) {
            return std::filesystem::path(p).lexically_normal().string();
        };
        std::string from = normal(out_ + "/.new/"), p = normal(path);
        return p.compare(0, from.size(), from) ? path : out_ + "/" + p.substr(from.size());
    }
    // Takes the earlier run's place, if that has not happened yet. Returns what to tell the user, or "".
    std::string take_place() {
        if (!aside()) return "";
        dir_ = out_;
        return move();
    }
    void close() { lock_.release(); }
    // Returns where the folder is, if it was moved since it was opened, and goes on there; else "".
    std::string follow() {
        const std::string now = lock_.moved_to();
        if (now.empty()) return "";
        dir_ = now + dir_.substr(out_.size()), out_ = now;
        lock_.follow(now);
        return now;
    }

  private:
    std::string leaving() const { return out_ + "/.new/leaving"; }
    std::string arriving() const { return out_ + "/.new/arriving"; }

    std::string recover() {
        if (file_exists(leaving())) leave();
        if (file_exists(arriving())) {
            const int n = atoi(Reader(arriving()).rest().c_str());
            arrive();
            return file_exists(previous(n)) ? say_previous(out_, n) : "";
        }
        return holds_run(out_ + "/.new") ? move() : "";
    }
    std::string move() {
        const int n = next_number();
        std::vector<std::string> coming = names_in(out_ + "/.new");
        std::string list = std::to_string(n) + "\n";
        bool any = false;
        for (const std::string& name : names_in(out_)) {
            bool replaced = std::binary_search(coming.begin(), coming.end(), name);
            if (!is_run_file(name) && !(replaced && is_run_data(out_ + "/" + name))) continue;
            list += name + "\n", any = true;
        }
        AtomicFile file(leaving());
        file.write(list), file.commit();
        leave();
        arrive();
        return any ? say_previous(out_, n) : "";
    }
    void leave() {
        Reader in(leaving());
        std::string list = in.rest();
        size_t at = list.find('\n');
        std::string to = previous(atoi(list.c_str()));
        for (size_t end; (end = list.find('\n', at + 1)) != std::string::npos; at = end) {
            std::string name = list.substr(at + 1, end - at - 1);
            if (!file_exists(out_ + "/" + name)) continue;  // has left before a crash
            make_dirs(to);
            rename_file(out_ + "/" + name, to + "/" + name);
        }
        sync_folder(to), sync_folder(out_);
        rename_file(leaving(), arriving());
        sync_folder(out_ + "/.new");
    }
    void arrive() {
        for (const std::string& name : names_in(out_ + "/.new")) {
            if (name == "arriving") continue;
            const std::string to = out_ + "/" + name;
            if (file_exists(to)) {  // came there after the earlier run had left
                const std::string aside = previous(next_number());
                make_dirs(aside), rename_file(to, aside + "/" + name);
            }
            rename_file(out_ + "/.new/" + name, to);
        }
        sync_folder(out_);
        unlink(arriving().c_str());
        rmdir((out_ + "/.new").c_str());
    }
    int next_number() const { return next_previous(out_); }
    std::string previous(int n) const { return previous_folder(out_, n); }

    std::string out_, dir_;
    FolderLock lock_;
};

// For a program that writes to OUT/.new before the trainer does: prepare_data, convert_gpt2 and
// export_tokenizer, as `make train` and `make finetune` call them. Given the path that it will write, locks
// OUT while this object lives, fails where a trainer works there, and ends a move that was stopped, so that
// what is written is not taken for the files of that run.
class BeforeTraining {
  public:
    explicit BeforeTraining(const std::string& path) {
        size_t at = path.rfind("/.new/");
        if (at == std::string::npos || !file_exists(path.substr(0, at))) return;
        const std::string what = folder_.open(path.substr(0, at));
        if (!what.empty()) printf("%s\n", what.c_str());
        make_dirs(path.substr(0, at) + "/.new");
    }

  private:
    RunFolder folder_;
};

}  // namespace trainer
