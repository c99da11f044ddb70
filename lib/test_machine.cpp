// test_machine.cpp - how much memory a container has left.
#include <doctest/doctest.h>

#include "dev/test_util.h"
#include "lib/machine.h"

TEST_CASE("machine: a container's cache that can be dropped counts as free memory, version 2 and 1") {
    TempDir dir;
    using machine::control_group_available;
    CHECK(control_group_available(dir.path) == SIZE_MAX);  // no control group
    make_dirs(dir / "memory");
    write_file(dir / "memory/memory.limit_in_bytes", "5000\n");
    write_file(dir / "memory/memory.usage_in_bytes", "4000\n");
    CHECK(control_group_available(dir.path) == 1000);
    write_file(dir / "memory/memory.stat", "inactive_file 7\ntotal_inactive_file 2500\n");
    CHECK(control_group_available(dir.path) == 3500);
    write_file(dir / "memory.max", "max\n");  // version 2 without a limit: version 1 decides
    write_file(dir / "memory.current", "9000\n");
    CHECK(control_group_available(dir.path) == 3500);
    write_file(dir / "memory.max", "10000\n");
    CHECK(control_group_available(dir.path) == 1000);
    write_file(dir / "memory.stat", "anon 4000\nfile 6000\ninactive_file 3000\n");
    CHECK(control_group_available(dir.path) == 4000);
    write_file(dir / "memory.current", "20000\n");
    CHECK(control_group_available(dir.path) == 0);
}

TEST_CASE("machine: subnormal numbers count as 0 in every thread, so that they do not slow a step") {
    const std::vector<float> tiny(4, 1e-40f), small(4, 2e-38f);
    int wrong = 0;
#pragma omp parallel num_threads(4) reduction(+ : wrong)
    {
        const size_t thread = (size_t)omp_get_thread_num();
        wrong += tiny[thread] * 1e20f != 0 || small[thread] * 0.25f != 0;
    }
    CHECK(wrong == 0);
}
