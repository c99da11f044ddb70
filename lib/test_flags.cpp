// test_flags.cpp - command lines: what is taken, what is refused and how, what a resumed run keeps.
#include <doctest/doctest.h>

#include "dev/test_util.h"
#include "lib/flags.h"

namespace {

struct Options {
    std::string schedule, title, dir = "out";
    int steps = -1, layers = 0;
    uint64_t seed = 1337;
    float rate = 0.8f;
    bool fast = false;
};

// The flags of a program that does not exist, in `o`.
struct Program {
    Options o;
    Flags f{"program", "shows how flags behave"};
    Program() {
        f.section("Section");
        f.add("steps", "x", &o.steps, "N", "how many; -1: as many as it takes").range(0, 100).unset(-1);
        f.add("learning_rate", "", &o.rate, "X", "how fast").range(0.1, 0.9);
        f.add("schedule", "k", &o.schedule, "NAME", "how it falls").choices({"constant", "cosine"});
        f.add("layers", "", &o.layers, "L", "how deep").range(1, 8).unset(0).on_resume(Flags::FIXED);
        f.add("seed", "", &o.seed, "N", "what follows from it").range(5, INFINITY);
        f.add("out", "o", &o.dir, "DIR", "where to").on_resume(Flags::NOT_KEPT);
        f.add("title", "", &o.title, "TEXT", "what it is called");
        f.add("fast", "", &o.fast, "hurry");
    }
    void parse(std::vector<std::string> words) {
        words.insert(words.begin(), "program");
        std::vector<char*> argv;
        for (std::string& w : words) argv.push_back(&w[0]);
        f.parse((int)argv.size(), argv.data());
    }
};

std::string refusal(const std::vector<std::string>& words) {
    Program p;
    return error_of([&] { p.parse(words); });
}

// The help, with runs of spaces made one.
std::string help_of(const Flags& f) {
    char* text = nullptr;
    size_t n = 0;
    FILE* to = open_memstream(&text, &n);
    f.help(to);
    fclose(to);
    std::string s;
    for (size_t i = 0; i < n; i++)
        if (text[i] != ' ' || s.empty() || s.back() != ' ') s += text[i];
    free(text);
    return s;
}

}  // namespace

TEST_CASE("flags: long names with dashes or underscores, aliases, = and bools set their variables") {
    Program p;
    p.parse({"--steps=7", "--learning-rate", "0.25", "-k", "cosine", "--fast", "--seed", "9", "-o", "there"});
    CHECK(p.o.steps == 7);
    CHECK(p.o.rate == 0.25f);
    CHECK(p.o.schedule == "cosine");
    CHECK(p.o.fast);
    CHECK(p.o.seed == 9);
    CHECK(p.o.dir == "there");
    CHECK(p.f.given("steps"));
    CHECK(!p.f.given("layers"));
    Program q;
    q.parse({"--steps", "-1", "--fast", "0"});  // a value that means "not given" is taken
    CHECK(q.o.steps == -1);
    CHECK(!q.o.fast);
}

TEST_CASE("flags: a value outside the limits is refused by flag, value and limits") {
    CHECK(refusal({"--steps", "101"}) == "--steps is 101, wanted 0 to 100");
    CHECK(refusal({"-x", "-2"}) == "-x is -2, wanted 0 to 100");
    CHECK(refusal({"--learning_rate", "1.6"}) == "--learning_rate is 1.6, wanted 0.1 to 0.9");
    CHECK(refusal({"--layers", "9"}) == "--layers is 9, wanted 1 to 8");
    CHECK(refusal({"--layers", "0"}).empty());
    CHECK(refusal({"--learning_rate", "0.1"}).empty());  // 0.1f is not 0.1
    CHECK(refusal({"--seed", "4"}) == "--seed is 4, wanted at least 5");
    CHECK(refusal({"--steps", "100", "--learning_rate", "0.9", "--layers", "8"}).empty());
}

TEST_CASE("flags: a choice that does not exist is answered with those that do") {
    CHECK(refusal({"--schedule", "cosin"}) == "--schedule: 'cosin' is unknown; known are constant, cosine");
    CHECK(refusal({"--schedule", ""}).empty());  // the default, "as the program decides"
}

TEST_CASE("flags: an unknown flag gets the nearest known one, a missing value its form") {
    CHECK(refusal({"--step", "1"}) ==
          "--step is not a flag of this program (did you mean --steps?); --help lists them");
    CHECK(refusal({"--nothing", "1"}) == "--nothing is not a flag of this program; --help lists them");
    CHECK(refusal({"--steps"}) == "--steps needs a value: --steps N");
    CHECK(refusal({"-o", "--fast"}) ==
          "-o needs a value, and --fast is a flag; if it is meant: --out=--fast");
    CHECK(refusal({"--title", "--steps=2"}) ==
          "--title needs a value, and --steps=2 is a flag; if it is meant: --title=--steps=2");
    CHECK(refusal({"-o", "--help"}) ==
          "-o needs a value, and --help is a flag; if it is meant: --out=--help");
    for (const char* title : {"--none", "-o=2", "-1", "-"})
        CHECK(refusal({"--title", title}) == "");  // no flags
    CHECK(refusal({"--title=--fast", "--steps", "-1"}) == "");
    CHECK(refusal({"poems.csv"}) == "'poems.csv' is not a flag; --help lists them");
}

TEST_CASE("flags: --help prints defaults, limits and choices where each flag says them") {
    std::string help = help_of(Program().f);
    CHECK(contains(help, "--steps N, -x how many; -1: as many as it takes [-1; 0 to 100]\n"));
    CHECK(contains(help, "--learning_rate X how fast [0.8; 0.1 to 0.9]\n"));
    CHECK(contains(help, "--schedule NAME, -k how it falls [constant, cosine]\n"));
    CHECK(contains(help, "--seed N what follows from it [1337; at least 5]\n"));
    CHECK(contains(help, "--fast hurry\n"));
}

TEST_CASE("flags: a resumed run keeps its settings, takes new ones, and refuses fixed ones") {
    Program before;
    before.parse({"--steps", "7", "--schedule", "cosine", "--layers", "3", "-o", "first", "--fast"});
    std::string settings = before.f.values();
    Program after;
    after.parse({"--steps", "9", "-o", "second", "--layers", "3"});
    CHECK(after.f.restore(settings) == std::vector<std::string>{"--steps 9 (the run had 7)"});
    CHECK((after.f.on_command_line("steps") && !after.f.on_command_line("schedule")));
    CHECK(after.o.steps == 9);            // given anew
    CHECK(after.o.schedule == "cosine");  // the run's
    CHECK(after.o.fast);
    CHECK(after.o.dir == "second");  // of the command, not of the run
    CHECK(after.f.given("schedule"));
    Program other;
    other.parse({"--layers", "4"});
    CHECK(error_of([&] { other.f.restore(settings); }) ==
          "--layers is 4, the run has 3; it cannot change when a run is resumed");
    Program unset;
    unset.parse({"--layers", "4"});
    unset.f.restore("layers=0\n");  // the run left it open; what it became then, the program checks
    CHECK(unset.o.layers == 4);
    unset.f.forget("layers");
    CHECK(!unset.f.given("layers"));
    Program damaged;
    CHECK(error_of([&] { damaged.f.restore("steps=1000\n"); }) ==
          "settings: --steps is 1000, wanted 0 to 100");
    Program poem, same;
    poem.parse({"--title", "two\nlines=2"});
    same.f.restore(poem.f.values());
    CHECK(same.o.title == "two\nlines=2");
    same.parse({"--fast"});
    same.f.restore("fast=\n");  // as earlier versions wrote a bool that is 0; the command line outranks it
    CHECK(same.o.fast);
    CHECK(contains(poem.f.values(), "fast=0\n"));
    damaged.f.restore("unknown=1\nseed=5\n");  // a flag of another version is passed over
    CHECK(damaged.o.seed == 5);
}
