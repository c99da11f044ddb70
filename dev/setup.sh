#!/bin/sh
# Installs what a target needs beyond g++ and make, or says how: dev/setup.sh tests|convert|plot|fuzz
set -e

# header-or-command, Debian package
need() {
    case "$1" in
        *.h|*.hpp) printf '#include <%s>\n' "$1" | ${CXX:-g++} -std=c++17 -E -x c++ - >/dev/null 2>&1 && return ;;
        *) command -v "$1" >/dev/null 2>&1 && return ;;
    esac
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        echo "installing $2"
        { apt-get install -y -qq "$2" || { apt-get update -qq && apt-get install -y -qq "$2"; }; } >/dev/null 2>&1 && return
    fi
    echo "dev/setup.sh: $1 is missing; install it with: sudo apt-get install $2" >&2
    exit 1
}

# libFuzzer comes in a package of its own, named after clang's version.
need_fuzzer() {
    v=$(clang++ -dumpversion | cut -d. -f1)
    ls "$(clang++ -print-resource-dir)"/lib/linux/libclang_rt.fuzzer-* >/dev/null 2>&1 || need libclang_rt.fuzzer "libclang-rt-$v-dev"
}

case "$1" in
    tests) need doctest/doctest.h doctest-dev; need nlohmann/json.hpp nlohmann-json3-dev ;;
    convert) need nlohmann/json.hpp nlohmann-json3-dev ;;
    fuzz) need nlohmann/json.hpp nlohmann-json3-dev; need clang++ clang; need_fuzzer ;;
    plot) need gnuplot gnuplot-nox ;;
    *) echo "usage: dev/setup.sh tests|convert|plot|fuzz" >&2; exit 2 ;;
esac
