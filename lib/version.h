// version.h - what --version prints: version, commit, compiler, and what the program was built for.
#pragma once

#if defined(__CUDACC__) || defined(EMULATOR)
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#endif

#include "lib/io.h"

constexpr const char* VERSION = "0.9";

// The commit that the program was built from. lib/version.cpp, which the Makefile links into every program,
// replaces this; only that small file is compiled again after a commit.
__attribute__((weak)) const char* built_from_commit() { return "unknown"; }

// The instructions that the compiler was allowed to use.
inline const char* instruction_set() {
#if defined(__AVX512BF16__)
    return "AVX-512 with bf16 dot products";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__x86_64__)
    return "x86-64";
#elif defined(__aarch64__)
    return "64-bit ARM";
#else
    return "this kind of processor";
#endif
}

// The GPU's side, "" in a program without one: architectures and libraries.
inline std::string gpu_build() {
#if defined(EMULATOR)
    return "; CUDA emulated on the CPU";
#elif defined(__CUDA_ARCH_LIST__)
    const int archs[] = {__CUDA_ARCH_LIST__};
    std::string s = "; GPU architectures";
    for (int a : archs) s += strf(" %d.%d", a / 100, a / 10 % 10);
    return s + strf("; CUDA %d.%d; cuBLASLt %d.%d", CUDART_VERSION / 1000, CUDART_VERSION / 10 % 100,
                    CUBLAS_VER_MAJOR, CUBLAS_VER_MINOR);
#else
    return "";
#endif
}

// One line, without commas since it goes into log.csv:
// "train_gpt2 0.9 (commit 0efe7d2); g++ 12.2.0; AVX2; OpenMP 201511; computes in fp32 and bf16".
// numbers: what a trainer computes in, or "".
inline std::string version_text(const char* program, const std::string& numbers = "") {
    std::string s = strf("%s %s (commit %s); ", program, VERSION, built_from_commit());
#if defined(__clang__)
    s += strf("clang++ %d.%d.%d", __clang_major__, __clang_minor__, __clang_patchlevel__);
#else
    s += strf("g++ %d.%d.%d", __GNUC__, __GNUC_MINOR__, __GNUC_PATCHLEVEL__);
#endif
    s += strf("; %s", instruction_set());
#ifdef _OPENMP
    s += strf("; OpenMP %d", _OPENMP);
#endif
    s += gpu_build();
    return numbers.empty() ? s : s + "; computes in " + numbers;
}
