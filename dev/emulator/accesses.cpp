// accesses.cpp - counts the bytes of device memory that emulated code reads and writes.
//
// Code that is compiled with -fsanitize=thread calls a function before each access to memory. A program links
// this file instead of ThreadSanitizer, and so is told of the accesses. A byte counts once however often it
// is accessed: repeated accesses are what a GPU's caches serve. Memory that is shared by a block's threads,
// or local to one, does not count. With one worker (options().workers = 1) no two accesses happen at once.
#include "accesses.h"

#include <algorithm>
#include <unordered_map>

namespace emu {
namespace {

constexpr uint8_t READ = 1, WRITTEN = 2;
struct Page {
    bool is_device = false, touched = false;
    std::vector<uint8_t> marks;  // READ and WRITTEN of each byte
};
bool counting = false;
Accesses counted;
std::unordered_map<uintptr_t, Page>& pages = *new std::unordered_map<uintptr_t, Page>;
std::vector<Page*>& touched = *new std::vector<Page*>;

Page& page_of(uintptr_t p) {
    constexpr size_t RECENT = 64;  // pages that are found without the map
    static std::pair<uintptr_t, Page*> recent[RECENT];
    auto& [number, page] = recent[p / PAGE % RECENT];
    if (page && number == p / PAGE) return *page;
    auto [at, is_new] = pages.try_emplace(number = p / PAGE);
    page = &at->second;
    // Decided once for each page. That is right in count_step.cu, the only user: a model's constructor
    // allocates all device memory before anything is counted, and the emulator never uses an address again
    // after cudaFree. is_device() is also true of pinned host memory, which no kernel accesses.
    if (is_new && (page->is_device = is_device((const void*)p, 1))) page->marks.resize(PAGE);
    return *page;
}
void mark(const void* address, size_t bytes, uint8_t kind) {
    for (uintptr_t p = (uintptr_t)address, end = p + bytes; p < end;) {
        Page& page = page_of(p);
        const uintptr_t stop = std::min(end, (p / PAGE + 1) * PAGE);
        if (!page.is_device) {
            p = stop;
            continue;
        }
        if (!page.touched) page.touched = true, touched.push_back(&page);
        for (; p < stop; p++) {
            uint8_t& m = page.marks[p % PAGE];
            if (m & kind) continue;
            m |= kind, (kind == READ ? counted.read : counted.written)++;
        }
    }
}
void access(const void* p, size_t bytes, uint8_t kind) {
    if (counting) mark(p, bytes, kind);
}

}  // namespace

void start_counting() { counted = {}, counting = true; }
Accesses stop_counting() {
    counting = false;
    for (Page* page : touched) {
        page->touched = false;
        std::fill(page->marks.begin(), page->marks.end(), (uint8_t)0);
    }
    touched.clear();
    return counted;
}

}  // namespace emu

// ---------------------------------------------------------------------------------------------
// What compilers call, as described in LLVM's tsan_interface.h and tsan_interface_atomic.h

using emu::access;
using emu::READ;
using emu::WRITTEN;

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, READ); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, WRITTEN); }
#define EMU_ACCESS(size)                                                 \
    void __tsan_read##size(void* p) { access(p, size, READ); }           \
    void __tsan_write##size(void* p) { access(p, size, WRITTEN); }       \
    void __tsan_unaligned_read##size(void* p) { access(p, size, READ); } \
    void __tsan_unaligned_write##size(void* p) { access(p, size, WRITTEN); }
EMU_ACCESS(1)
EMU_ACCESS(2)
EMU_ACCESS(4)
EMU_ACCESS(8)
EMU_ACCESS(16)
#undef EMU_ACCESS

// Atomics, which are called instead of the instructions. Only host code has some, so they do not count. They
// use the strictest order, whatever the caller asks for.
constexpr int ORDER = __ATOMIC_SEQ_CST;
#define EMU_ATOMICS(bits, T)                                                                               \
    T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, ORDER); }           \
    void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, ORDER); }           \
    T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, ORDER); } \
    T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, ORDER); } \
    T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, ORDER); } \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) {         \
        return __atomic_compare_exchange_n(p, expected, v, false, ORDER, ORDER);                           \
    }                                                                                                      \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {           \
        return __atomic_compare_exchange_n(p, expected, v, true, ORDER, ORDER);                            \
    }
EMU_ATOMICS(8, uint8_t)
EMU_ATOMICS(32, uint32_t)
EMU_ATOMICS(64, uint64_t)
#undef EMU_ATOMICS
}
