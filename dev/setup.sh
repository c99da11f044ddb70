#!/bin/sh
# Installs what a target needs in addition to g++ and make, or says how to install it:
#     dev/setup.sh tests|convert|plot|mpi|fuzz|clang|format|demo|browser
# Several may run at the same time. A lock on this file makes them install one after the other.

# Whether a header, command or library is installed
have() {
    case "$1" in
        *.h|*.hpp) printf '#include <%s>\n' "$1" | ${CXX:-g++} -std=c++17 -E -x c++ - >/dev/null 2>&1 ;;
        libFuzzer) ls "$(clang++ -print-resource-dir)"/lib/linux/libclang_rt.fuzzer-* >/dev/null 2>&1 ;;
        *) command -v "$1" >/dev/null 2>&1 ;;
    esac
}

# Another dev/setup.sh may have installed it while this one waited for the lock, so this checks again. apt-get
# also waits for dpkg's lock.
install() { # HEADER-OR-COMMAND DEBIAN-PACKAGE
    command -v flock >/dev/null 2>&1 && ! flock -w 600 9 && return 1
    have "$1" && return
    echo "installing $2"
    set -- -y -qq -o DPkg::Lock::Timeout=300 "$2"
    { apt-get install "$@" || { apt-get update -qq && apt-get install "$@"; }; } >/dev/null 2>&1 9>&-
}

need() { # HEADER-OR-COMMAND DEBIAN-PACKAGE HOMEBREW-PACKAGE
    have "$1" && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        (install "$1" "$2") 9<"$0" && have "$1" && return
    fi
    how="sudo apt-get install $2"
    [ "$(uname -s)" = Darwin ] && how="brew install $3"
    echo "dev/setup.sh: $1 is missing; install it with: $how" >&2
    exit 1
}

json() { need nlohmann/json.hpp nlohmann-json3-dev nlohmann-json; }

case "$1" in
    tests) need doctest/doctest.h doctest-dev doctest && json ;;
    convert) json ;;
    mpi) need mpic++ libopenmpi-dev open-mpi; need mpirun openmpi-bin open-mpi ;;
    plot) need gnuplot gnuplot-nox gnuplot ;;
    demo) json; need httplib.h libcpp-httplib-dev cpp-httplib; need pkg-config pkg-config pkg-config ;;
    browser) need chromium chromium chromium; need chromedriver chromium-driver chromedriver ;;
    format) need clang-format clang-format clang-format ;;
    # libFuzzer is in a separate package, which is named after clang's version.
    fuzz)
        json
        need clang++ clang llvm
        need libFuzzer "libclang-rt-$(clang++ -dumpversion | cut -d. -f1)-dev" llvm
        ;;
    # clang++-15 needs clang-15 and its OpenMP, libomp-15-dev.
    clang) need "${CXX%% *}" "clang${CXX##*clang++}" llvm; need omp.h "libomp${CXX##*clang++}-dev" libomp ;;
    *) echo "usage: dev/setup.sh tests|convert|plot|mpi|fuzz|clang|format|demo|browser" >&2; exit 2 ;;
esac
