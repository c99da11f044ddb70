// fuzz.h - what the fuzzers of files share: a folder in memory, files, and inputs that begin with a byte for
// the mode.
#pragma once

#include <algorithm>
#include <filesystem>
#include <string>

#include "lib/io.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace fuzz {

inline void require(bool holds) {
    if (!holds) abort();
}
inline void write(const std::string& path, const std::string& content) {
    int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0666);
    require(fd >= 0 && ::write(fd, content.data(), content.size()) == (ssize_t)content.size());
    close(fd);
}
inline std::string read(const std::string& path) { return Reader(path).rest(); }

// A folder in memory that goes with the program.
struct Folder {
    std::string dir;
    Folder() {
        char name[] = "/dev/shm/arapoet_fuzz_XXXXXX";
        require(mkdtemp(name));
        dir = name;
    }
    ~Folder() {
        std::error_code ignored;
        std::filesystem::remove_all(dir, ignored);
    }
};

// libFuzzer's mutation of what follows the first byte, the mode. Now and then it starts from the valid
// content of a mode, so that mutations reach past the first check.
template <class ContentOf>
size_t mutate(uint8_t* data, size_t size, size_t max_size, unsigned seed, int modes, ContentOf valid) {
    if (size < 2 || seed % 64 == 0) {
        int mode = (int)(seed / 64 % (unsigned)modes);
        std::string s = std::string(1, (char)mode) + valid(mode);
        size = std::min(s.size(), max_size);
        memcpy(data, s.data(), size);
    }
    return 1 + LLVMFuzzerMutate(data + 1, size - 1, max_size - 1);
}

}  // namespace fuzz
