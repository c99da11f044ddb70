// dynamic_smem.cpp - the one buffer behind every `extern __shared__ __align__(128) unsigned char
// dynamic_smem[];`.
//
// Linked into each emulated program (not into libemu.so: shared memory is the program's own thread-local
// storage). A declaration inside a kernel of namespace N names N::dynamic_smem, so each such namespace needs
// its alias below.
#include <cstddef>

constexpr size_t MOST = 227 * 1024;  // what one block may have on sm_90

extern "C" {
alignas(1024) thread_local unsigned char dynamic_smem[MOST] = {};
unsigned char* emu_dynamic_smem(size_t* bytes) {
    *bytes = MOST;
    return dynamic_smem;
}
}

// A kernel that is given up after a report unwinds nothing, so LeakSanitizer would report what it held.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

#define ALIAS(name) __asm__(".globl " name "\n.type " name ",@tls_object\n.set " name ", dynamic_smem\n");
ALIAS("_ZN3gpu12dynamic_smemE")  // gpu::dynamic_smem
