// dynamic_smem.cpp - the array that kernels declare as
//     extern __shared__ __align__(128) unsigned char dynamic_smem[];
//
// It is linked into each emulated program, not into libemu.so, because shared memory is the program's
// thread-local storage. A declaration inside a kernel of namespace N refers to N::dynamic_smem, so each such
// namespace needs an alias below.
#include <cstddef>

constexpr size_t MOST = 227 * 1024;  // what one block may have on sm_90

extern "C" {
alignas(1024) thread_local unsigned char dynamic_smem[MOST] = {};
unsigned char* emu_dynamic_smem(size_t* bytes) {
    *bytes = MOST;
    return dynamic_smem;
}
}

// An abandoned kernel does not unwind its stacks, so LeakSanitizer would report the memory that it owned.
extern "C" const char* __asan_default_options() { return "detect_leaks=0"; }

#define ALIAS(name) __asm__(".globl " name "\n.type " name ",@tls_object\n.set " name ", dynamic_smem\n");
ALIAS("_ZN3gpu12dynamic_smemE")  // gpu::dynamic_smem
