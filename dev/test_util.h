// test_util.h - what several tests need: a folder that goes away, an error's text, whole files, tensors compared.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "io.h"

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

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

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
inline void check_close(const std::string& what, const std::vector<float>& got, const std::vector<double>& want,
                        double tolerance) {
    REQUIRE(got.size() == want.size());
    check_close(what, got.data(), want.data(), got.size(), tolerance);
}
inline void check_close(const std::string& what, double got, double want, double tolerance) {
    check_close(what, &got, &want, 1, tolerance);
}
