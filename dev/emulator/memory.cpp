// memory.cpp - device memory, arranged so that wrong accesses are found.
//
// Each allocation has separate pages between two guard pages that are never accessible. It begins at a
// multiple of 256 bytes, as close to the end of its pages as that allows, so that most overruns hit the
// guard page. The unused bytes of its pages have a pattern that is checked after each kernel. New memory is
// filled with NaN. The addresses of freed memory stay inaccessible and are not reused, so that stale
// pointers are found. Device memory is inaccessible to host code after a call that waits
// (open_device_memory in runtime.h).
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>

#include "fiber.h"
#include "api.h"

namespace emu {

static void install_handler();

constexpr size_t ALIGNMENT = 256;
constexpr unsigned char PATTERN = 0xff;  // NaN as fp32 and bf16, -1 as an integer

// Protected by api_lock, which all of this file holds except the fault handler and is_device(). These two run
// inside kernels, while the host waits.
static std::map<char*, Allocation>& allocations = *new std::map<char*, Allocation>;
static std::map<char*, Allocation>& freed = *new std::map<char*, Allocation>;
static size_t used = 0, peak = 0;
static int allocation_count = 0;

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
// The begin and the end of the whole pages in [p, p + bytes); both are p + bytes if there is none.
static std::pair<char*, char*> whole_pages(char* p, size_t bytes) {
    char *first = (char*)round_up((size_t)p, PAGE), *last = (char*)((size_t)(p + bytes) / PAGE * PAGE);
    return first < last ? std::make_pair(first, last) : std::make_pair(p + bytes, p + bytes);
}

// Sets the protection of an allocation's pages; whole pages inside gaps are never accessible.
static void set_access(const Allocation& a, bool accessible) {
    mprotect(a.map, a.map_bytes, accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
    if (!accessible) return;
    for (auto& [gap, bytes] : a.gaps) {
        auto [first, last] = whole_pages(gap, bytes);
        if (first < last) mprotect(first, (size_t)(last - first), PROT_NONE);
    }
}

static bool is_open = true;
static void set_open(bool open) {
    for (auto& [begin, a] : allocations)
        if (!a.pinned) set_access(a, open);
    is_open = open;
}
void open_device_memory() {
    install_handler();
    if (!is_open) set_open(true);
}
void close_device_memory() {
    if (is_open && options().host_guard) set_open(false);
}

void* allocate(size_t bytes, bool pinned) {
    if (bytes == 0) return nullptr;
    want(pinned || (bytes <= options().memory_limit && used + bytes <= options().memory_limit),
         cudaErrorMemoryAllocation);
    open_device_memory();
    Allocation a;
    a.bytes = bytes, a.pinned = pinned, a.number = ++allocation_count;
    a.map_bytes = round_up(round_up(bytes, ALIGNMENT), PAGE);
    void* m =
        mmap(nullptr, a.map_bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    want(m != MAP_FAILED, cudaErrorMemoryAllocation);
    a.map = (char*)m + PAGE;
    a.begin = a.map + a.map_bytes - round_up(bytes, ALIGNMENT);
    set_access(a, true);
    memset(a.map, PATTERN, a.map_bytes);
    asan_poison(a.map, (size_t)(a.begin - a.map));
    asan_poison(a.begin + bytes, (size_t)(a.map + a.map_bytes - a.begin) - bytes);
    if (!pinned) peak = std::max(peak, used += bytes);
    allocations[a.begin] = a;
    close_device_memory();
    return a.begin;
}

bool release_memory(void* p, bool pinned) {
    auto it = allocations.find((char*)p);
    if (it == allocations.end() || it->second.pinned != pinned) return false;
    const Allocation a = it->second;
    asan_unpoison(a.map, a.map_bytes);
    mprotect(a.map, a.map_bytes, PROT_NONE);
    madvise(a.map, a.map_bytes, MADV_DONTNEED);
    if (!pinned) used -= a.bytes;
    allocations.erase(it);
    freed[a.begin] = a;
    return true;
}

void memory_usage(size_t& now, size_t& most) { now = used, most = peak; }

// The allocation in the list whose pages or guard pages contain p; null if there is none.
static const Allocation* near_allocation(std::map<char*, Allocation>& list, const void* p) {
    auto it = list.upper_bound((char*)p + 2 * PAGE);
    while (it != list.begin()) {
        const Allocation& a = (--it)->second;
        if ((char*)p >= a.map - PAGE && (char*)p < a.map + a.map_bytes + PAGE) return &a;
        if (a.map + a.map_bytes + PAGE <= (char*)p) break;
    }
    return nullptr;
}

const Allocation* find_allocation(const void* p) {
    auto it = allocations.upper_bound((char*)p);
    if (it == allocations.begin()) return nullptr;
    const Allocation& a = (--it)->second;
    return (char*)p < a.begin + a.bytes ? &a : nullptr;
}

bool is_device(const void* p, size_t bytes) {
    const Allocation* a = find_allocation(p);
    return a && (char*)p + bytes <= a->begin + a->bytes;
}

static std::string describe(const Allocation& a, const char* p) {
    std::string what =
        format("%zu-byte %s allocation (number %d)", a.bytes, a.pinned ? "pinned host" : "device", a.number);
    for (auto& [gap, bytes] : a.gaps)
        if (p >= gap && p < gap + bytes)
            return format("%td bytes into the gap behind a tensor, in a ", p - gap) + what;
    if (p < a.begin) return format("%td bytes before a ", a.begin - p) + what;
    if (p >= a.begin + a.bytes)
        return format("%td bytes past the end of a ", p - a.begin - (ptrdiff_t)a.bytes) + what;
    return format("%td bytes into a ", p - a.begin) + what;
}

std::string check_range(const void* p, size_t bytes, const char* what) {
    if (!bytes) return "";
    const Allocation* a = find_allocation(p);
    if (!a) return format("%s: %p is not device memory", what, p);
    const char *begin = (const char*)p, *end = begin + bytes;
    if ((size_t)(a->begin + a->bytes - begin) < bytes)
        return format("%s: %zu bytes, which end ", what, bytes) + describe(*a, end);
    for (auto& [gap, gap_bytes] : a->gaps)
        if (gap < end && gap + gap_bytes > begin)
            return format("%s: %zu bytes, which touch the gap behind a tensor, ", what, bytes) +
                   describe(*a, std::max(gap, (char*)p));
    return "";
}

cudaError_t poison(void* p, size_t bytes) {
    return api([&] {
        auto it = allocations.upper_bound((char*)p);
        want(it != allocations.begin(), cudaErrorInvalidValue);
        Allocation& a = (--it)->second;
        want((char*)p + bytes <= a.begin + a.bytes, cudaErrorInvalidValue);
        if (!bytes) return;
        open_device_memory();
        memset(p, PATTERN, bytes);
        asan_poison(p, bytes);
        a.gaps.emplace_back((char*)p, bytes);
        std::sort(a.gaps.begin(), a.gaps.end());
        set_access(a, true);
        close_device_memory();
    });
}

// --- patterns

// The first byte of [p, end) that differs from the pattern, or null; restores the pattern. memcmp cannot be
// used, because the sanitizers intercept it.
static char* find_damage(char* p, char* end) {
    for (; end - p >= 8; p += 8) {
        uint64_t word;
        __builtin_memcpy(&word, p, 8);
        if (~word) break;
    }
    p = std::find_if(p, end, [](char c) { return (unsigned char)c != PATTERN; });
    std::fill(p, end, (char)PATTERN);
    return p == end ? nullptr : p;
}

void check_patterns(const void* kernel) {
    auto check = [&](const Allocation& a, char* from, char* to) {
        if (char* damage = find_damage(from, to))
            report(cudaErrorIllegalAddress,
                   "kernel " + name_of(kernel) + " has written " + describe(a, damage));
    };
    for (auto& [begin, a] : allocations) {
        check(a, a.map, a.begin);
        check(a, a.begin + a.bytes, a.map + a.map_bytes);
        for (auto& [gap, bytes] : a.gaps) {
            auto [first, last] = whole_pages(gap, bytes);
            check(a, gap, first);
            check(a, last, gap + bytes);
        }
    }
}

// --- faults

static struct sigaction previous_action;

// What the signal handler has seen. In a kernel it only stores this, because a signal handler must not
// allocate memory; land() composes the report.
struct Fault {
    char* address;
    bool known;  // the processor gives no address for a misaligned vector access
    void* instruction;
};
static thread_local Fault last_fault;

static std::string describe_fault(const Fault& f) {
    if (on_fiber_guard(f.address)) return "stack overflow of a CUDA thread";
    if (!f.known) return "misaligned vector access, or a wild pointer";
    if (const Allocation* a = near_allocation(allocations, f.address))
        return "access out of bounds: " + describe(*a, f.address);
    if (const Allocation* a = near_allocation(freed, f.address))
        return "access to freed memory: " + describe(*a, f.address);
    if ((uintptr_t)f.address < PAGE)
        return format("access through a null pointer (address %p)", (void*)f.address);
    return format("access to %p, which is not device memory", (void*)f.address);
}
static void land() { fault_at_address(describe_fault(last_fault), last_fault.instruction); }

static void on_fault(int signal, siginfo_t* info, void* context) {
    char* p = (char*)info->si_addr;
    if (in_kernel()) {
        last_fault = {p, info->si_code != SI_KERNEL, nullptr};
#if defined(__x86_64__)
        // Continue in land() on the emergency stack; it abandons the block.
        greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
        last_fault.instruction = (void*)registers[REG_RIP];
        registers[REG_RSP] = (greg_t)(emergency_stack_top() - 8);
        registers[REG_RIP] = (greg_t)&land;
        return;
#else
        (void)context;
        fprintf(stderr, "emulator: %s\n", describe_fault(last_fault).c_str());
#endif
    } else if (const Allocation* a = near_allocation(allocations, p)) {
        fprintf(stderr, "emulator: host code touches device memory: %s\n", describe(*a, p).c_str());
    } else if (const Allocation* a = near_allocation(freed, p)) {
        fprintf(stderr, "emulator: host code touches freed memory: %s\n", describe(*a, p).c_str());
    }
    sigaction(signal, &previous_action, nullptr);  // on return the access faults again, for the old handler
}

// Called before each use of device memory, because test frameworks install their handlers in between. Such a
// handler then becomes the previous one, which handles other faults.
static void install_handler() {
    struct sigaction now, ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, nullptr, &now);
    if ((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_fault) return;
    previous_action = now;
    sigaction(SIGSEGV, &ours, nullptr);
}
void catch_faults() {
    constexpr size_t SIZE = 64 << 10;
    stack_t stack = {};
    stack.ss_sp = malloc(SIZE), stack.ss_size = SIZE;
    sigaltstack(&stack, nullptr);  // when a fiber's stack overflows, the handler needs another one
}

}  // namespace emu
