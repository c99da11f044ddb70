// accesses.h - counts the bytes of device memory that emulated code reads and writes; see accesses.cpp.
#pragma once

#include "emu.h"

namespace emu {

struct Accesses {
    size_t read = 0, written = 0;  // different bytes; one that is read and written is in both
};
// Between the two calls, accesses by code that was compiled with -fsanitize=thread are counted.
void start_counting();
Accesses stop_counting();

}  // namespace emu
