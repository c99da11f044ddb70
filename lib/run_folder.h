// run_folder.h - the folder of a run, --out: who works in it, and how a new run takes the place of an earlier
// one.
//
// Nothing of an earlier run is lost. A new run (--overwrite) is written to OUT/.new. When it has its first
// model it takes its place: the earlier run's files move to OUT/previous/N, and those of OUT/.new to OUT. A
// run that stops before that leaves the earlier one as it was.
//
// The move can be stopped at any moment, and goes on when a program next opens the folder. Before it begins,
// OUT/.new/leaving is written: N, and the names of the files that leave OUT. When they have left, it is
// renamed to OUT/.new/arriving, and what else is in OUT/.new moves to OUT. Each file is moved by one rename.
#pragma once

#include <dirent.h>
#include <sys/file.h>

#include <algorithm>
#include <csignal>
#include <filesystem>

#include "lib/io.h"

namespace trainer {

// The names in a folder but for "." and "..", sorted; none where there is no folder.
inline std::vector<std::string> names_in(const std::string& dir) {
    std::vector<std::string> names;
    if (DIR* d = opendir(dir.c_str())) {
        while (dirent* e = readdir(d))
            if (strcmp(e->d_name, ".") && strcmp(e->d_name, "..")) names.push_back(e->d_name);
        closedir(d);
    }
    std::sort(names.begin(), names.end());
    return names;
}
// All bytes in a file or folder.
inline uint64_t bytes_in(const std::string& path) {
    struct stat st;
    if (lstat(path.c_str(), &st)) return 0;
    if (!S_ISDIR(st.st_mode)) return (uint64_t)st.st_size;
    uint64_t sum = 0;
    for (const std::string& name : names_in(path)) sum += bytes_in(path + "/" + name);
    return sum;
}

// Only one trainer works in a folder. The lock ends with its process, however that ends.
class FolderLock {
  public:
    FolderLock() = default;
    ~FolderLock() { release(); }
    FolderLock(const FolderLock&) = delete;
    FolderLock& operator=(const FolderLock&) = delete;

    // Locks dir, or fails with the process that has the lock. A file system without locks is taken as
    // unlocked.
    void take(const std::string& dir) {
        path_ = dir + "/.arapoet.lock";
        for (;;) {
            fd_ = open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
            if (fd_ < 0) fail("%s: cannot write: %s", path_.c_str(), strerror(errno));
            if (flock(fd_, LOCK_EX | LOCK_NB) && errno == EWOULDBLOCK) {
                char who[256] = "";
                ssize_t n = pread(fd_, who, sizeof who - 1, 0);
                close(fd_), fd_ = -1;
                who[n > 0 ? n : 0] = 0;
                fail("%s: %s is training in it; wait for it, or take another folder with -o", dir.c_str(),
                     *who ? who : "another process");
            }
            // Another process may have removed the file between open and flock: then the lock is on nothing.
            struct stat ours, there;
            if (!fstat(fd_, &ours) && !stat(path_.c_str(), &there) && ours.st_ino == there.st_ino) break;
            close(fd_), fd_ = -1;
        }
        char host[256] = "an unknown host";
        gethostname(host, sizeof host - 1);
        std::string who = strf("process %d on %s", (int)getpid(), host);
        if (ftruncate(fd_, 0) || pwrite(fd_, who.data(), who.size(), 0) < 0) {}  // only for the message above
    }
    void release() {
        if (fd_ < 0) return;
        unlink(path_.c_str());
        close(fd_), fd_ = -1;
    }
    bool held() const { return fd_ >= 0; }

  private:
    std::string path_;
    int fd_ = -1;
};

// The number of a file NAME_NUMBER.bin, eight digits; -1 where the name is another one.
inline int number_of(const std::string& name, const char* kind) {
    int step, used = 0;
    std::string format = std::string(kind) + "_%8d.bin%n";
    return sscanf(name.c_str(), format.c_str(), &step, &used) == 1 && used == (int)name.size() ? step : -1;
}
inline bool is_model_file(const std::string& name) {
    return name == "model.bin" || number_of(name, "model") >= 0;
}
// What a trainer writes to its folder. Other files there are the user's, and stay.
inline bool is_run_file(const std::string& name) {
    for (const char* n : {"tokenizer.bin", "log.csv", "main.log", "loss.png"})
        if (name == n) return true;
    return is_model_file(name) || number_of(name, "state") >= 0;
}
inline bool holds_run_files(const std::string& dir) {
    std::vector<std::string> names = names_in(dir);
    return std::any_of(names.begin(), names.end(), is_run_file);
}
inline bool holds_run(const std::string& dir) {
    std::vector<std::string> names = names_in(dir);
    return std::any_of(names.begin(), names.end(), is_model_file);
}

// Removes the temporary files of trainers that were killed while they wrote: NAME.tmpPID, where no such
// process lives.
inline void remove_leftovers(const std::string& dir) {
    for (const std::string& name : names_in(dir)) {
        size_t at = name.rfind(".tmp");
        if (at == std::string::npos || name.find_first_not_of("0123456789", at + 4) != std::string::npos)
            continue;
        const std::string stem = name.substr(0, at);
        int pid = atoi(name.c_str() + at + 4);
        if (!is_run_file(stem) && stem != "leaving") continue;
        if (pid > 0 && kill(pid, 0) && errno == ESRCH) unlink((dir + "/" + name).c_str());
    }
}
// Is this what a run may move: a folder of token files, or what `make finetune` converted?
inline bool is_run_data(const std::string& path) {
    const std::string name = path.substr(path.rfind('/') + 1);
    if (name == "pretrained.bin" || name == "pretrained_tokenizer.bin") return true;
    struct stat st;
    if (lstat(path.c_str(), &st) || !S_ISDIR(st.st_mode)) return false;
    for (const std::string& file : names_in(path))
        if (file != "train.bin" && file != "val.bin" && file != "tokenizer.bin" && file[0] != '.')
            return false;
    return true;
}

class RunFolder {
  public:
    // Locks the folder, which exists, and ends a move that was stopped.
    void open(const std::string& out) {
        out_ = dir_ = out;
        lock_.take(out);
        for (const std::string& dir : {out, out + "/.new"}) remove_leftovers(dir);
        recover();
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

  private:
    std::string leaving() const { return out_ + "/.new/leaving"; }
    std::string arriving() const { return out_ + "/.new/arriving"; }

    void recover() {
        if (file_exists(leaving())) leave(), arrive();
        else if (file_exists(arriving())) arrive();
        else if (holds_run(out_ + "/.new")) move();
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
        return any ? strf("the earlier run is now in %s/ (%s)", previous(n).c_str(),
                          human_bytes((double)bytes_in(previous(n))).c_str())
                   : "";
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
    int next_number() const {
        int n = 1;
        while (file_exists(previous(n))) n++;
        return n;
    }
    std::string previous(int n) const { return out_ + "/previous/" + std::to_string(n); }

    std::string out_, dir_;
    FolderLock lock_;
};

// For a program that writes to OUT/.new before the trainer does (prepare_data, by `make train`): locks OUT
// while it exists, fails where a trainer works there, and ends a move that was stopped, so that what is
// written is not taken for the files of that run.
class BeforeTraining {
  public:
    explicit BeforeTraining(const std::string& dir) {
        size_t at = dir.rfind("/.new/");
        if (at != std::string::npos && file_exists(dir.substr(0, at))) folder_.open(dir.substr(0, at));
    }

  private:
    RunFolder folder_;
};

}  // namespace trainer
