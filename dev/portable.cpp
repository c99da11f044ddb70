// portable.cpp - main() of a program that make PORTABLE=1 builds: it holds the program once for each
// instruction set and starts the best that the processor has, or the one that ARAPOET_ISA names.
//
// Compiled with -DPROGRAM="name" and -DVARIANTS=V(generic)...; a variant is the whole program with its main
// renamed. Its functions are invisible to the others, so that no template compiled for AVX-512 serves a
// processor without.
#include "lib/io.h"

#define V(isa) int run_##isa(int, char**);
VARIANTS
#undef V

namespace {

struct Variant {
    const char* isa;
    int (*run)(int, char**);
    bool supported;
};

bool has_generic() { return true; }
#if defined(__x86_64__)
#if defined(__clang__)  // which does not know the levels before clang 18; what else they ask for comes with
                        // these
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#else
bool has_avx2() { return __builtin_cpu_supports("x86-64-v3"); }
bool has_avx512() { return __builtin_cpu_supports("x86-64-v4"); }
#endif
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

int start(int argc, char** argv) {
#define V(isa) {#isa, run_##isa, has_##isa()},
    const Variant variants[] = {VARIANTS};  // the plainest first
#undef V
    const char* wanted = getenv("ARAPOET_ISA");
    const Variant* chosen = nullptr;
    std::string known, here;
    for (const Variant& v : variants) {
        if (wanted ? !strcmp(wanted, v.isa) : v.supported) chosen = &v;
        known += (known.empty() ? "" : ", ") + std::string(v.isa);
        if (v.supported) here += (here.empty() ? "" : ", ") + std::string(v.isa);
    }
    if (!chosen) throw UsageError(strf("ARAPOET_ISA is '%s', known are %s", wanted, known.c_str()));
    if (!chosen->supported) fail("ARAPOET_ISA is '%s', but this processor has only %s", wanted, here.c_str());
    return chosen->run(argc, argv);
}

}  // namespace

int main(int argc, char** argv) {
    return run_main(PROGRAM, [&] { return start(argc, argv); });
}
