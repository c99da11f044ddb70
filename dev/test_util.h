// test_util.h - what several tests need: a folder that goes away, an error's text, whole files, tensors
// compared; and, in namespace test, random numbers, threads and a model's state.
#pragma once

#include <doctest/doctest.h>
#include <omp.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <string>

#include "lib/gpt2.h"
#include "lib/io.h"

// A fresh folder under /tmp, removed with all its content at the end.
struct TempDir {
    std::string path;
    TempDir() {
        char name[] = "/tmp/arapoet_test_XXXXXX";
        if (!mkdtemp(name)) fail("%s: cannot make the folder: %s", name, strerror(errno));
        path = name;
    }
    ~TempDir() {
        std::error_code ignored;
        std::filesystem::remove_all(path, ignored);
    }
    TempDir(const TempDir&) = delete;
    TempDir& operator=(const TempDir&) = delete;
    std::string operator/(const std::string& name) const { return path + "/" + name; }
};

inline size_t count_files(const std::string& dir) {
    return (size_t)std::distance(std::filesystem::directory_iterator(dir),
                                 std::filesystem::directory_iterator());
}

// No file may grow beyond so many bytes, as on a full disk.
struct FullDisk {
    rlimit before;
    void (*handler)(int);
    explicit FullDisk(rlim_t bytes) {
        handler = signal(SIGXFSZ, SIG_IGN);
        getrlimit(RLIMIT_FSIZE, &before);
        rlimit now = {bytes, before.rlim_max};
        setrlimit(RLIMIT_FSIZE, &now);
    }
    ~FullDisk() { setrlimit(RLIMIT_FSIZE, &before), signal(SIGXFSZ, handler); }
};

// Says that the running test cannot run here, and why; it counts as skipped instead of passed:
//     if (!file_exists(corpus)) return skip(corpus + ": not found");
inline std::string skip_reason;
inline void skip(const std::string& reason) { skip_reason = reason; }

// The one line that f's Error says; "" where f throws none.
template <class F>
std::string error_of(F f) {
    try {
        f();
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}

inline bool contains(const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
}

inline void write_file(const std::string& path, const std::string& content) {
    std::ofstream out(path, std::ios::binary);
    out.write(content.data(), (std::streamsize)content.size());
    out.flush();
    if (!out) fail("%s: cannot write", path.c_str());
}
inline std::string read_file(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) fail("%s: cannot open", path.c_str());
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

// A binary file's content with one int32 of its header changed.
inline std::string with_header(std::string content, size_t index, int32_t value) {
    memcpy(&content.at(index * 4), &value, 4);
    return content;
}

template <class A, class B>
inline double relative_l2(const A* got, const B* want, size_t n) {
    double diff = 0, norm = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)got[i] - (double)want[i];
        diff += d * d, norm += (double)want[i] * (double)want[i];
    }
    return std::sqrt(diff) / std::max(std::sqrt(norm), 1e-30);  // where all of `want` is 0, only 0 will do
}

// The largest error of each kind, for the table at the end.
struct Worst {
    double error = 0, tolerance = 0;
};
inline std::map<std::string, Worst> worst_errors;

inline void note(const std::string& kind, double error, double tolerance) {
    Worst& w = worst_errors[kind];
    if (error >= w.error || error != error) w = {error, tolerance};
}

// Fails unless the relative L2 error is within the tolerance. `what` is "kind: tensor".
template <class A, class B>
inline void check_close(const std::string& what, const A* got, const B* want, size_t n, double tolerance) {
    double error = relative_l2(got, want, n);
    note(what.substr(0, what.find(':')), error, tolerance);
    CHECK_MESSAGE(error <= tolerance, what, ": relative L2 error ", error, ", wanted at most ", tolerance);
}
inline void check_close(const std::string& what, const std::vector<float>& got,
                        const std::vector<double>& want, double tolerance) {
    REQUIRE(got.size() == want.size());
    check_close(what, got.data(), want.data(), got.size(), tolerance);
}
inline void check_close(const std::string& what, double got, double want, double tolerance) {
    check_close(what, &got, &want, 1, tolerance);
}

namespace test {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Tokens = std::vector<int>;

struct Random {
    std::mt19937_64 engine;
    explicit Random(uint64_t seed) : engine(seed) {}
    double uniform() { return (double)(engine() >> 11) * 0x1p-53; }
    double normal() { return std::normal_distribution<double>()(engine); }
    size_t below(size_t n) { return engine() % n; }
    size_t among(std::initializer_list<size_t> list) { return list.begin()[below(list.size())]; }
    Floats floats(size_t n, double scale = 1, double mean = 0) {
        Floats x(n);
        for (float& f : x) f = (float)(mean + scale * normal());
        return x;
    }
    Tokens tokens(size_t n, int V) {
        Tokens x(n);
        for (int& t : x) t = (int)below((size_t)V);
        return x;
    }
    // As tokens(), but about one in seven is -1, which means "ignore".
    Tokens targets(size_t n, int V) {
        Tokens x = tokens(n, V);
        for (int& t : x)
            if (below(7) == 0) t = -1;
        x[0] = (int)below((size_t)V);
        return x;
    }
};

inline bool same_bits(const Floats& a, const Floats& b) {
    return a.size() == b.size() && (a.empty() || !memcmp(a.data(), b.data(), a.size() * sizeof(float)));
}

// The nearest bf16 number, as a float.
inline float rounded(double x) { return bf16_to_float(float_to_bf16((float)x)); }
inline Floats rounded(Floats values) {
    for (float& f : values) f = rounded(f);
    return values;
}

// Sets the number of threads and restores it at the end.
struct Threads {
    int before = omp_get_max_threads();
    explicit Threads(int n) { omp_set_num_threads(n); }
    ~Threads() { omp_set_num_threads(before); }
};

// A model's parameters, gradients or moments as one array in the file's order, out and in.
template <class Model>
Floats piece(Model& m, State s) {
    Floats out;
    m.each_piece(s, [&](const float* x, size_t n) { out.insert(out.end(), x, x + n); });
    return out;
}
template <class Model>
void set_piece(Model& m, State s, const Floats& from) {
    size_t at = 0;
    REQUIRE(from.size() == num_params(m.cfg));
    m.each_piece(s, [&](float* x, size_t n) { std::copy(&from[at], &from[at] + n, x), at += n; });
    REQUIRE(at == from.size());
}

}  // namespace test
