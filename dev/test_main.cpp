// test_main.cpp - the main of every test program: runs the tests, counts them by case, and ends with one
// line, "N passed, N failed[, N skipped]".
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "dev/test_util.h"
#include "lib/machine.h"

namespace {

struct Counter : doctest::IReporter {
    static inline unsigned run = 0, failed = 0, skipped = 0;
    const doctest::TestCaseData* current = nullptr;

    explicit Counter(const doctest::ContextOptions&) {}
    void test_case_start(const doctest::TestCaseData& test) override { current = &test, skip_reason.clear(); }
    void test_case_end(const doctest::CurrentTestCaseStats& stats) override {
        if (skip_reason.empty() || stats.failure_flags) return;
        skipped++;
        printf("skipped: %s: %s\n", current->m_name, skip_reason.c_str());
        fflush(stdout);
    }
    void test_run_end(const doctest::TestRunStats& stats) override {
        run = stats.numTestCasesPassingFilters, failed = stats.numTestCasesFailed;
    }
    void report_query(const doctest::QueryData&) override {}
    void test_run_start() override {}
    void test_case_reenter(const doctest::TestCaseData&) override {}
    void test_case_exception(const doctest::TestCaseException&) override {}
    void subcase_start(const doctest::SubcaseSignature&) override {}
    void subcase_end() override {}
    void log_assert(const doctest::AssertData&) override {}
    void log_message(const doctest::MessageData&) override {}
    void test_case_skipped(const doctest::TestCaseData&) override {}
};
DOCTEST_REGISTER_LISTENER("counter", 1, Counter);

}  // namespace

int main(int argc, char** argv) {
    // The tests' parallel regions are short: on a busy machine, threads that spin while they wait take many
    // times as long. OpenMP reads this setting before main, hence the second start. Programs that tests start
    // inherit it.
    if (!getenv("OMP_WAIT_POLICY")) {
        setenv("OMP_WAIT_POLICY", "passive", 1);
        execv("/proc/self/exe", argv);  // returns only where it cannot
    }
    machine::flush_subnormals();  // as the programs do
    doctest::Context context(argc, argv);
    int rc = context.run();
    if (context.shouldExit()) return rc;  // --help, --list-test-cases
    if (!worst_errors.empty())
        printf("largest errors (relative L2 where nothing else is said), and what is allowed:\n");
    for (auto& [kind, w] : worst_errors) printf("  %-44s %.1e of %.0e\n", kind.c_str(), w.error, w.tolerance);
    printf("%u passed, %u failed", Counter::run - Counter::failed - Counter::skipped, Counter::failed);
    if (Counter::skipped) printf(", %u skipped", Counter::skipped);
    printf("\n");
    return rc;
}
