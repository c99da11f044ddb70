// reduce.h - cooperative_groups::reduce stands in the main header.
#pragma once
#include <cooperative_groups.h>
