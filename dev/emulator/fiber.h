// fiber.h - fibers: stacks on which the functions of CUDA threads run, and the switch from one to another.
//
// A fiber is a thread of execution that the program schedules itself: it runs until it switches to another
// fiber, and later continues where it left off. All it needs is a stack and, while it does not run, the saved
// registers. On x86-64 a switch saves the six registers that a called function must preserve, and the stack
// pointer (7 ns); elsewhere it uses ucontext (about 200 ns). ASan must be told which stack is in use. TSan
// gets a fiber object for each fiber, so that it treats CUDA threads as threads. The sanitizers' functions
// are weak symbols, so that the same library works in programs with and without sanitizers.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) && !defined(EMU_UCONTEXT)
#define EMU_UCONTEXT
#endif
#if defined(EMU_UCONTEXT)
#include <ucontext.h>
#endif

extern "C" {
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* object);
__attribute__((weak)) void __tsan_release(void* object);
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* p, size_t bytes);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* p, size_t bytes);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t bytes);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* save, const void** bottom_old,
                                                           size_t* bytes_old);
}

namespace emu {

// Tell TSan about synchronisation; without TSan they do nothing. What a thread does before release(object)
// happens before what another thread does after acquire(object), so TSan sees no race between them.
inline void acquire(void* object) {
    if (__tsan_acquire) __tsan_acquire(object);
}
inline void release(void* object) {
    if (__tsan_release) __tsan_release(object);
}
inline void asan_poison(const void* p, size_t bytes) {
    if (__asan_poison_memory_region) __asan_poison_memory_region(p, bytes);
}
inline void asan_unpoison(const void* p, size_t bytes) {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(p, bytes);
}

#if !defined(EMU_UCONTEXT)
extern "C" void emu_switch(void** save_stack_pointer, void* stack_pointer);
#endif

struct Fiber {
    static constexpr size_t STACK = 256 << 10, GUARD = 64 << 10;

    char* stack = nullptr;  // the lowest address; below are GUARD inaccessible bytes
    size_t bytes = 0;
    void *asan = nullptr, *tsan = nullptr;
#if defined(EMU_UCONTEXT)
    ucontext_t context;
#else
    void* stack_pointer = nullptr;
#endif

    // Makes this fiber represent the calling operating system thread, which switches to the other fibers.
    void adopt() {
        pthread_attr_t a;
        void* low;
        pthread_getattr_np(pthread_self(), &a);
        pthread_attr_getstack(&a, &low, &bytes);
        pthread_attr_destroy(&a);
        stack = (char*)low;
        if (__tsan_get_current_fiber) tsan = __tsan_get_current_fiber();
    }

    bool guards(const void* p) const { return (char*)p < stack && (char*)p >= stack - GUARD; }

    // Prepares the fiber to run entry() when it is first switched to. An abandoned fiber can be used again.
    void prepare(void (*entry)()) {
        if (!stack) {
            void* m = mmap(nullptr, STACK + GUARD, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (m == MAP_FAILED || mprotect(m, GUARD, PROT_NONE)) {
                fprintf(stderr, "emulator: no memory for the stack of a CUDA thread\n");
                abort();
            }
            stack = (char*)m + GUARD, bytes = STACK;
        }
        asan_unpoison(stack, bytes);
        asan = nullptr;
        if (__tsan_create_fiber) {
            if (tsan) __tsan_destroy_fiber(tsan);
            tsan = __tsan_create_fiber(0);
        }
#if defined(EMU_UCONTEXT)
        getcontext(&context);
        context.uc_stack.ss_sp = stack, context.uc_stack.ss_size = bytes, context.uc_link = nullptr;
        makecontext(&context, entry, 0);
#else
        void** top = (void**)(stack + bytes);
        *--top = nullptr;  // in place of entry's return address, which aligns the stack as after a call
        *--top = (void*)entry;
        for (int i = 0; i < 6; i++) *--top = nullptr;  // rbp rbx r12 r13 r14 r15
        stack_pointer = top;
#endif
    }

    // Must be the first call of entry().
    static void entered() {
        if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
    }

    // Continues fiber `to` where it left off. Returns when some fiber switches back to this one.
    void switch_to(Fiber& to) {
        if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&asan, to.stack, to.bytes);
        if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch is no synchronisation
#if defined(EMU_UCONTEXT)
        swapcontext(&context, &to.context);
#else
        emu_switch(&stack_pointer, to.stack_pointer);
#endif
        if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(asan, nullptr, nullptr);
    }
};

}  // namespace emu
