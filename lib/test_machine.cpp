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
