// dataloader.h - token files, and the batches that training and evaluation read from them.
//
// The file format is llm.c's: a header of 256 int32 ([0] the magic number 20240520, [1] the version 1,
// [2] the number of tokens), then the tokens as uint16.
//
//     TokenFile train("poems/train.bin");
//     train.check_vocab(V);
//     TrainLoader loader(train, T, seed, true);
//     loader.next(B, inputs, targets);      // int[B * T] each; a target is the token after its input
#pragma once

#include <glob.h>
#include <sys/mman.h>

#include <algorithm>
#include <climits>
#include <filesystem>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "lib/io.h"
#include "lib/rng.h"
#include "lib/run_folder.h"

constexpr int32_t TOKEN_FILE_MAGIC = 20240520, TOKEN_FILE_VERSION = 1;

// Writes a token file in pieces. It takes its name with commit(); without that nothing remains.
class TokenFileWriter {
  public:
    explicit TokenFileWriter(const std::string& path) : path_(path), out_(path) {
        out_.write(header(0).data(), HEADER);
    }
    void add(const std::vector<uint16_t>& tokens) {
        out_.write(tokens.data(), tokens.size() * sizeof(uint16_t)), size_ += tokens.size();
    }
    size_t size() const { return size_; }
    void commit() {
        if (size_ < 1 || size_ > INT32_MAX)
            fail("%s: a token file holds 1 to %d tokens, not %zu", path_.c_str(), INT32_MAX, size_);
        out_.overwrite(0, header((int32_t)size_).data(), HEADER);
        out_.commit();
    }

  private:
    static constexpr size_t HEADER = 256 * sizeof(int32_t);
    static std::vector<int32_t> header(int32_t tokens) {
        std::vector<int32_t> h(256);
        h[0] = TOKEN_FILE_MAGIC, h[1] = TOKEN_FILE_VERSION, h[2] = tokens;
        return h;
    }
    const std::string path_;
    AtomicFile out_;
    size_t size_ = 0;
};
inline void write_tokens(const std::string& path, const std::vector<uint16_t>& tokens) {
    TokenFileWriter out(path);
    out.add(tokens);
    out.commit();
}

// The files of a data folder, DATA_FILES, belong together; val.bin may be missing. A new set of them is
// written to DIR/.writing, which is then renamed to DIR/.arriving; from there the files move to DIR. So a
// crash at any moment leaves the whole old set, or a move that finish_data_set() completes.

// Completes the move, if one was stopped. Programs that read a data folder call it first.
inline void finish_data_set(const std::string& dir) {
    const std::string from = dir + "/.arriving";
    if (!file_exists(from)) return;
    for (const char* name : trainer::DATA_FILES)  // another program may move them at the same time
        if (rename((from + "/" + name).c_str(), (dir + "/" + name).c_str()) && errno != ENOENT)
            fail("%s/%s: cannot move it to %s: %s", from.c_str(), name, dir.c_str(), strerror(errno));
    if (file_exists(from + "/no_val.bin")) {
        if (unlink((dir + "/val.bin").c_str()) && errno != ENOENT)  // of the old set, in another vocabulary
            fail("%s/val.bin: cannot remove it: %s", dir.c_str(), strerror(errno));
        unlink((from + "/no_val.bin").c_str());
    }
    sync_folder(dir);
    std::error_code ignored;
    std::filesystem::remove_all(from, ignored);
}

class DataSetWriter {
  public:
    // Locks the folder: two programs that write to it at once would mix their sets.
    explicit DataSetWriter(const std::string& dir) : dir_(dir), is_new_(!file_exists(dir)) {
        make_dirs(dir);
        lock_.take(dir);
        finish_data_set(dir);
        clear();  // what a program that was killed has left
        make_dirs(writing());
    }
    ~DataSetWriter() {
        clear();
        lock_.release();
        if (is_new_) rmdir(dir_.c_str());  // if nothing was committed
    }
    DataSetWriter(const DataSetWriter&) = delete;
    DataSetWriter& operator=(const DataSetWriter&) = delete;

    // Where to write a file of the set.
    std::string path(const char* name) const { return writing() + "/" + name; }
    void commit() {
        if (!file_exists(path("val.bin"))) AtomicFile(path("no_val.bin")).commit();
        sync_folder(writing());
        rename_file(writing(), dir_ + "/.arriving");
        sync_folder(dir_);
        finish_data_set(dir_);
    }

  private:
    std::string writing() const { return dir_ + "/.writing"; }
    void clear() {
        std::error_code ignored;
        std::filesystem::remove_all(writing(), ignored);
    }
    const std::string dir_;
    const bool is_new_;
    trainer::FolderLock lock_;
};

// A token file, or several as one stream: "data/train_*.bin" is the files that match, in name order (llm.c's
// shards). One file is read into memory; several are mapped, so that only what is read takes room. The
// constructor throws an Error if a header is wrong or a file's size is not what its header says.
class TokenFile {
  public:
    const std::string path;

    explicit TokenFile(const std::string& p) : path(p) {
        if (p.find('*') == std::string::npos) {
            add(p, false);
            return;
        }
        glob_t found;
        std::vector<std::string> names;
        if (!glob(p.c_str(), 0, nullptr, &found))
            names.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
        globfree(&found);
        for (const std::string& name : names) add(name, true);
        if (shards_.empty()) fail("%s: no file matches", p.c_str());
    }
    TokenFile(const TokenFile&) = delete;
    TokenFile& operator=(const TokenFile&) = delete;

    size_t size() const { return size_; }
    uint16_t operator[](size_t i) const {
        const Shard* s = &shards_[0];
        if (shards_.size() > 1)
            s = &*std::prev(std::upper_bound(shards_.begin(), shards_.end(), i,
                                             [](size_t at, const Shard& shard) { return at < shard.first; }));
        return s->tokens[i - s->first];
    }
    uint64_t checksum() const {
        Checksum sum;
        for (const Shard& s : shards_) sum.add(s.tokens, s.count * sizeof(uint16_t));
        sum.end_section();
        return sum.value();
    }

    // Throws an Error that names the first token outside a vocabulary of V tokens.
    void check_vocab(int V) const {
        for (const Shard& s : shards_)
            for (size_t i = 0; i < s.count; i++)
                if (s.tokens[i] >= V)
                    fail("%s: token %d at position %zu, wanted tokens below the vocabulary size %d",
                         s.path.c_str(), s.tokens[i], i, V);
    }

  private:
    struct Shard {
        std::string path;
        size_t first, count;     // the number of its first token in the stream, and how many it has
        const uint16_t* tokens;  // in `mapped` or in `memory`
        std::shared_ptr<void> mapped;
        std::vector<uint16_t> memory;
    };
    void add(const std::string& file, bool map) {
        Reader in(file);
        std::vector<int32_t> h = in.header(TOKEN_FILE_MAGIC, "token");
        if (h[1] != TOKEN_FILE_VERSION)
            fail("%s: version is %d, wanted %d", file.c_str(), h[1], TOKEN_FILE_VERSION);
        if (h[2] < 1) fail("%s: token count is %d, wanted at least 1", file.c_str(), h[2]);
        in.expect_size(1024 + sizeof(uint16_t) * (uint64_t)h[2]);
        Shard s = {file, size_, (size_t)h[2], nullptr, nullptr, {}};
        if (map) {
            const size_t bytes = in.size;
            s.mapped = {in.map(), [bytes](void* p) { munmap(p, bytes); }};
            s.tokens = (const uint16_t*)((const char*)s.mapped.get() + 1024);
        } else {
            s.memory.resize(s.count);
            in.read(s.memory.data(), s.count * sizeof(uint16_t), "tokens");
            s.tokens = s.memory.data();
        }
        size_ += s.count;
        shards_.push_back(std::move(s));
    }

    std::vector<Shard> shards_;
    size_t size_ = 0;
};

// Fails because the data folder lacks one of its files. The hint never replaces files that are there.
[[noreturn]] inline void fail_without_data(const std::string& dir, const std::string& name,
                                           const char* program) {
    const std::string path = dir + "/" + name;
    for (const char* other : trainer::DATA_FILES)
        if (file_exists(dir + "/" + other))
            fail("%s: not found; prepare the poems into another folder and name that one: %s --data OTHER%s",
                 path.c_str(), beside_program(program).c_str(),
                 name == "val.bin" ? " (few poems make no validation part: see --val_fraction)" : "");
    fail("%s: not found; make it with: %s %s -o %s", path.c_str(), beside_program("prepare_data").c_str(),
         beside_program("data/sample_poems.csv").c_str(), shell_quoted(dir).c_str());
}

// The tags of a token file: `count` of them follow each end-of-text token, and are the tokens from `first`
// on.
struct TagTokens {
    int first = INT_MAX, eot = -1;
    size_t count = 0;
};

// Cuts windows of T inputs and their targets out of a token file, which is treated as a ring: the first token
// follows the last. A target is the token after its input; -1 means "ignore".
//
// Where poems have tags, a window that begins within a poem has the poem's tags before it, so that the model
// always sees them (as the control codes of Keskar et al. 2019). The tags take the first `count` places, and
// the window has that many fewer tokens of the text. Tags are inputs only, never targets.
class Windows {
  public:
    Windows(const TokenFile& file, size_t T, TagTokens tags) : file_(file), T_(T), tags_(tags) {
        if (!tags.count) return;
        if (T < tags.count + 1)
            fail("--seq_len: %zu is too small: %zu tags are before each window, and one more token is wanted",
                 T, tags.count);
        size_t i = 0;
        while (i < file.size() && file[i] != tags.eot) i++;
        if (i == file.size())
            fail("%s: has no end-of-text token, wanted one before each poem and its tags", file.path.c_str());
    }
    // How many of its inputs have a target: the distance from one window to the next
    size_t stride() const { return T_ - tags_.count; }
    bool has_tags() const { return tags_.count > 0; }
    // Writes the window whose first input is token i, or has the tags before it.
    void cut(size_t i, int* inputs, int* targets) const {
        size_t t = 0;
        if (tag_count_before(i)) {
            size_t start = i;  // of the poem
            while (file_[start] != tags_.eot) start = start ? start - 1 : file_.size() - 1;
            for (; t < tags_.count; t++) inputs[t] = file_[(start + 1 + t) % file_.size()], targets[t] = -1;
        }
        for (size_t k = 0; t < T_; t++, k++) {
            inputs[t] = file_[i];
            if (++i == file_.size()) i = 0;
            // A window without tags before it is as long as the others.
            targets[t] = k < stride() ? target(i) : -1;
        }
    }
    // How many tags are put before the window that begins at token i
    size_t tag_count_before(size_t i) const { return tags_.count && file_[i] != tags_.eot ? tags_.count : 0; }
    // How many targets it has, among its first `most` places that can have one.
    size_t targets(size_t i, size_t most = SIZE_MAX) const {
        most = std::min(most, stride());
        if (!tags_.count) return most;
        size_t n = 0;
        for (size_t k = 0; k < most; k++) {
            if (++i == file_.size()) i = 0;
            n += target(i) >= 0;
        }
        return n;
    }

  private:
    int target(size_t i) const { return file_[i] < tags_.first ? file_[i] : -1; }
    const TokenFile& file_;
    const size_t T_;
    const TagTokens tags_;
};

// Training batches. Each epoch cuts the file, a ring of n tokens, at a fresh random offset into windows one
// stride apart (T without tags), so that windows do not always break at the same places, and visits them in
// shuffled order. Without shuffle the offset is 0 and the windows come in file order. The sequence of windows
// depends only on the file, T, tags, shuffle and the seed, not on B, and seek() continues it from any
// position.
class TrainLoader {
  public:
    // This process is number `rank` of the `world` processes that train together; of each batch of B * world
    // windows it gets those from rank * B on. The file must outlive the loader.
    TrainLoader(const TokenFile& file, int T, uint64_t seed, bool shuffle, int rank = 0, int world = 1,
                TagTokens tags = {})
        : file_(file),
          T_((size_t)T),
          windows_(file, (size_t)std::max(T, 0), tags),
          seed_(seed),
          shuffle_(shuffle),
          rank_((uint64_t)rank),
          world_((uint64_t)world) {
        if (T < 1 || rank < 0 || rank >= world) fail("no loader for T = %d, rank %d of %d", T, rank, world);
        if (file.size() < T_ + 1)
            fail("%s: corpus shorter than one window: %zu tokens, wanted at least T + 1 = %zu",
                 file.path.c_str(), file.size(), T_ + 1);
        order_.resize(file.size() / windows_.stride());
        start_epoch(0);
    }

    // Writes the next B windows of this process to inputs[B * T] and targets[B * T].
    void next(int B, int* inputs, int* targets) {
        for (uint64_t b = 0; b < (uint64_t)B; b++)
            windows_.cut(start_of(position_ + rank_ * (uint64_t)B + b), inputs + b * T_, targets + b * T_);
        position_ += (uint64_t)B * world_;
    }
    // How many targets the next n windows have, of all processes together.
    uint64_t targets(uint64_t n) {
        if (!windows_.has_tags()) return n * T_;
        uint64_t count = 0;
        for (uint64_t w = position_; w < position_ + n; w++) count += windows_.targets(start_of(w));
        return count;
    }

    // Windows drawn since the start by all processes together. A resumed run needs nothing else.
    uint64_t position() const { return position_; }
    void seek(uint64_t windows) {
        if (windows / order_.size() > UINT32_MAX)
            fail("%s: data position %llu is beyond the last epoch", file_.path.c_str(),
                 (unsigned long long)windows);
        position_ = windows;
    }
    uint64_t windows_per_epoch() const { return order_.size(); }

  private:
    // Where the window w begins in the file
    size_t start_of(uint64_t w) {
        if (w / order_.size() != epoch_) start_epoch(w / order_.size());
        return (offset_ + order_[w % order_.size()] * windows_.stride()) % file_.size();
    }
    void start_epoch(uint64_t e) {
        epoch_ = e;
        for (size_t i = 0; i < order_.size(); i++) order_[i] = (uint32_t)i;
        if (!shuffle_) return;
        rng::Key key(seed_, (uint32_t)e, rng::SHUFFLE);
        offset_ = (size_t)(key.uniform(0) * (double)file_.size());
        rng::shuffle(order_.data(), order_.size(), key);  // uses the key's numbers 2 and up
    }

    const TokenFile& file_;
    const size_t T_;
    const Windows windows_;
    const uint64_t seed_;
    const bool shuffle_;
    const uint64_t rank_, world_;
    uint64_t position_ = 0, epoch_ = 0;
    size_t offset_ = 0;
    std::vector<uint32_t> order_;
};

// Evaluation batches: windows in file order, in which every token but the first, and but for tags, is a
// target exactly once. The unused rest of the last batch has input 0 and target -1, which means "ignore".
class EvalLoader {
  public:
    // The file must outlive the loader.
    EvalLoader(const TokenFile& file, int B, int T, TagTokens tags = {})
        : file_(file), windows_(file, (size_t)std::max(T, 0), tags), B_((size_t)B), T_((size_t)T) {
        if (B < 1 || T < 1) fail("no loader for B = %d, T = %d", B, T);
        if (file.size() < 2) fail("%s: has 1 token, evaluation needs at least 2", file.path.c_str());
    }
    size_t batches() const { return ceil_div(ceil_div(file_.size() - 1, windows_.stride()), B_); }
    // How many targets batch i has, and all batches.
    size_t targets(size_t i) const {
        size_t n = 0;
        for (size_t b = 0; b < B_; b++) n += windows_.targets(begin_of(i, b), inside(begin_of(i, b)));
        return n;
    }
    size_t all_targets() const {
        if (!windows_.has_tags()) return file_.size() - 1;
        size_t n = 0;
        for (size_t i = 0; i < batches(); i++) n += targets(i);
        return n;
    }
    // Writes batch i < batches() to inputs[B * T] and targets[B * T].
    void get(size_t i, int* inputs, int* targets) const {
        for (size_t b = 0; b < B_; b++) {
            int *x = inputs + b * T_, *y = targets + b * T_;
            const size_t begin = begin_of(i, b), left = inside(begin);
            if (left) windows_.cut(begin, x, y);
            const size_t before = left ? windows_.tag_count_before(begin) : 0;
            for (size_t t = left + before; t < T_; t++) x[t] = 0, y[t] = -1;
        }
    }

  private:
    size_t begin_of(size_t i, size_t b) const { return (i * B_ + b) * windows_.stride(); }
    // How many tokens follow token `begin`; nothing goes on from the last to the first.
    size_t inside(size_t begin) const { return begin + 1 < file_.size() ? file_.size() - 1 - begin : 0; }
    const TokenFile& file_;
    const Windows windows_;
    const size_t B_, T_;
};
