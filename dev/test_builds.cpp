// test_builds.cpp - how make compiles the GPU trainer on machines with other GPUs, toolkits and libraries:
// nvidia-smi and nvcc are scripts that answer like those of such machines. Nothing is compiled.
#include <sys/stat.h>

#include <cstdlib>
#include <regex>

#include "dev/test_util.h"

namespace {

using Strings = std::vector<std::string>;

struct Result {
    int code;
    std::string text;  // stdout and stderr
};

// A machine whose GPUs have these compute capabilities, and whose nvcc knows these architectures.
struct Machine {
    TempDir dir;
    std::string cuda = dir / "cuda", variables;  // more variables for make
    Machine(const Strings& capabilities, const std::string& known = "75 80 86 87 89 90 100 103 120") {
        for (const char* folder : {"bin", "cuda/include", "cuda/lib/stubs", "elsewhere"})
            std::filesystem::create_directories(dir / folder);
        std::string list = capabilities.empty() ? "echo NVIDIA-SMI has failed; exit 9\n" : "";
        for (const std::string& c : capabilities) list += "echo " + c + "\n";
        script("nvidia-smi", list);
        script("nvcc", "case $1 in\n--list-gpu-code) printf 'sm_%s\\n' " + known +
                           " compute_x ;;\n"
                           "--dryrun) echo '#$ INCLUDES=\"-I" +
                           cuda + "/include\" ' >&2; echo '#$ LIBRARIES= \"-L" + cuda + "/lib/stubs\" \"-L" +
                           cuda + "/lib\"' >&2 ;;\nesac\n");
    }
    void script(const std::string& name, const std::string& commands) {
        write_file(dir / ("bin/" + name), "#!/bin/sh\n" + commands);
        chmod((dir / ("bin/" + name)).c_str(), 0755);
    }
    Result make(const std::string& arguments) const {
        std::string command =
            "env -u MAKEFLAGS -u MFLAGS -u MAKELEVEL -u NVCC -u NVCC_CCBIN -u PRECISION PATH='" + dir.path +
            "/bin':\"$PATH\" " + variables + " make BUILD='" + dir.path + "/build' " + arguments + " 2>&1";
        FILE* p = popen(command.c_str(), "r");
        REQUIRE(p);
        Result r;
        char part[512];
        for (size_t n; (n = fread(part, 1, sizeof part, p)) > 0;) r.text.append(part, n);
        r.code = WEXITSTATUS(pclose(p));
        return r;
    }
    // The command that compiles train_gpt2cu.
    std::string command(const std::string& arguments = "") const {
        Result r = make("-n train_gpt2cu " + arguments);
        CAPTURE(r.text);
        REQUIRE(r.code == 0);
        size_t at = r.text.rfind(dir / "bin/nvcc -std");
        REQUIRE(at != std::string::npos);
        return r.text.substr(at);
    }
    // The architectures that it compiles for, each with machine code and PTX: "80 90".
    std::string architectures(const std::string& arguments = "") const {
        static const std::regex option(" -gencode arch=compute_([0-9]+),code=\\[sm_\\1,compute_\\1\\]");
        std::string c = command(arguments), list;
        for (std::sregex_iterator i(c.begin(), c.end(), option), end; i != end; ++i)
            list += (list.empty() ? "" : " ") + (*i)[1].str();
        return list;
    }
};

TEST_CASE("builds: without a GPU for Ampere, Hopper and Blackwell, as far as nvcc knows them") {
    CHECK(Machine({}).architectures() == "80 90 100");
    CHECK(Machine({}, "50 75 80 86 89 90").architectures() == "80 90");
}

TEST_CASE("builds: for this machine's GPUs, each kind once") {
    CHECK(Machine({"12.0"}).architectures() == "120");
    CHECK(Machine({"10.0", "8.9", "10.0"}).architectures() == "89 100");
    CHECK(Machine({"7.5", "8.6"}).architectures() == "86");
}

TEST_CASE("builds: a GPU that nvcc does not know gets the PTX of the newest architecture before it") {
    CHECK(Machine({"12.0"}, "75 80 86 89 90").architectures() == "90");
    CHECK(Machine({"10.3"}, "80 90 100 120").architectures() == "100");
    CHECK(Machine({"13.0", "8.0"}, "120 80 90 100").architectures() == "80 120");
}

TEST_CASE("builds: GPUs before Ampere, or an nvcc before it, are one sentence, and nvcc compiles nothing") {
    Machine turing({"7.5", "7.0"}), old_nvcc({"8.0"}, "60 75");
    for (Machine* m : {&turing, &old_nvcc}) {
        Result r = m->make("train_gpt2cu");
        CAPTURE(r.text);
        CHECK(r.code == 2);
        CHECK(!contains(r.text, "nvcc -std"));
        CHECK(contains(
            r.text, m == &turing ? "make train_gpt2cu: GPU 0 has compute capability 7.5, wanted 8.0 (Ampere) "
                                   "or later; make train_gpt2 builds the CPU trainer\n"
                                 : "bin/nvcc --list-gpu-code names no architecture from sm_80 (Ampere) on"));
    }
}

TEST_CASE("builds: ARCHS names architectures, whatever GPUs the machine has") {
    CHECK(Machine({"7.5"}).architectures("ARCHS='80 90'") == "80 90");
    Result r = Machine({"7.5"}).make("need-archs ARCHS=80");
    CAPTURE(r.text);
    CHECK(r.code == 0);
}

TEST_CASE("builds: the program finds cuBLASLt and NCCL in the folders that the linker took, not the stubs") {
    Machine m({"9.0"});
    const std::string rpath = " -Xlinker -rpath -Xlinker ", lib = std::filesystem::canonical(m.cuda) / "lib",
                      elsewhere = std::filesystem::canonical(m.dir / "elsewhere");
    for (const char* file : {"cuda/lib/libcublasLt.so", "cuda/lib/stubs/libcublasLt.so",
                             "elsewhere/libnccl.so", "cuda/include/nccl.h"})
        write_file(m.dir / file, "");
    m.variables = "LIBRARY_PATH=" + elsewhere;
    std::string with = m.command(), without = m.command("NCCL=");
    for (const char* part : {" -DUSE_NCCL ", " -lnccl ", " -lcublasLt "}) CHECK(contains(with, part));
    CHECK(contains(with, rpath + lib + rpath + elsewhere + "\n"));
    CHECK(contains(without, " -lcublasLt "));
    CHECK(contains(without, rpath + lib + "\n"));
    CHECK(!contains(without, "NCCL"));
    CHECK(!contains(without, "nccl"));
}

}  // namespace
