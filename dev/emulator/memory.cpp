// memory.cpp - device memory: filled with NaN, between guard pages, closed to host code, with poisoned gaps.
//
// Each allocation has pages of its own between two that are never accessible, and begins at a multiple of 256 bytes as
// late as that allows. What is left of its pages before and behind it holds a pattern that is checked after each kernel
// and copy. Freed memory keeps its addresses, inaccessible, so that a stale pointer is found.
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <map>

#include "fiber.h"
#include "runtime.h"

namespace emu {

static void install_handler();

constexpr size_t ALIGNMENT = 256;
constexpr unsigned char PATTERN = 0xff;  // NaN as fp32 and bf16, -1 as an integer

// Under api_lock, like all of this file but the fault handler and is_device(): they run while the host waits.
static std::map<char*, Allocation>& allocations = *new std::map<char*, Allocation>;
static std::map<char*, Allocation>& freed = *new std::map<char*, Allocation>;
static size_t used = 0, peak = 0;
static int open_count = 0, allocation_count = 0;

static size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
static char* page_at_or_after(char* p) { return (char*)round_up((size_t)p, PAGE); }
static char* page_at_or_before(char* p) { return (char*)((size_t)p / PAGE * PAGE); }

// Sets the protection of an allocation's pages; whole pages inside gaps stay inaccessible.
static void set_access(const Allocation& a, bool accessible) {
    char *p = a.map, *end = a.map + a.map_bytes;
    auto set = [&](char* from, char* to) {
        if (to > from) mprotect(from, (size_t)(to - from), accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
    };
    for (auto& [gap, bytes] : a.gaps) {
        char *first = page_at_or_after(gap), *last = page_at_or_before(gap + bytes);
        if (last <= first) continue;
        set(p, first);
        p = last;
    }
    set(p, end);
}

static bool guard_in_force = false;  // were the pages closed when the last access ended?
DeviceAccess::DeviceAccess() {
    install_handler();
    if (open_count++ || !guard_in_force) return;
    for (auto& [begin, a] : allocations)
        if (!a.pinned) set_access(a, true);
}
DeviceAccess::~DeviceAccess() {
    if (--open_count) return;
    if (!options().host_guard && !guard_in_force) return;
    guard_in_force = options().host_guard;
    for (auto& [begin, a] : allocations)
        if (!a.pinned) set_access(a, !guard_in_force);
}

cudaError_t allocate(void** p, size_t bytes, bool pinned) {
    *p = nullptr;
    if (bytes == 0) return cudaSuccess;
    if (!pinned && (bytes > options().memory_limit || used + bytes > options().memory_limit)) return cudaErrorMemoryAllocation;
    DeviceAccess open;
    Allocation a;
    a.bytes = bytes, a.pinned = pinned, a.number = ++allocation_count;
    a.map_bytes = round_up(round_up(bytes, ALIGNMENT), PAGE);
    void* m = mmap(nullptr, a.map_bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) return cudaErrorMemoryAllocation;
    a.map = (char*)m + PAGE;
    a.begin = a.map + a.map_bytes - round_up(bytes, ALIGNMENT);
    set_access(a, true);
    memset(a.map, PATTERN, a.map_bytes);
    asan_poison(a.map, (size_t)(a.begin - a.map));
    asan_poison(a.begin + bytes, (size_t)(a.map + a.map_bytes - a.begin) - bytes);
    if (!pinned) peak = std::max(peak, used += bytes);
    allocations[a.begin] = a;
    *p = a.begin;
    return cudaSuccess;
}

cudaError_t release_memory(void* p, bool pinned) {
    auto it = allocations.find((char*)p);
    if (it == allocations.end() || it->second.pinned != pinned) return cudaErrorInvalidValue;
    Allocation a = it->second;
    asan_unpoison(a.map, a.map_bytes);
    mprotect(a.map, a.map_bytes, PROT_NONE);
    madvise(a.map, a.map_bytes, MADV_DONTNEED);
    if (!pinned) used -= a.bytes;
    allocations.erase(it);
    freed[a.begin] = a;
    return cudaSuccess;
}

void memory_usage(size_t& now, size_t& most) { now = used, most = peak; }

// The allocation of the list on whose pages, or on the guard pages beside them, p lies.
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
    std::string what = format("%zu-byte %s allocation (number %d)", a.bytes, a.pinned ? "pinned host" : "device", a.number);
    for (auto& [gap, bytes] : a.gaps)
        if (p >= gap && p < gap + bytes) return format("%td bytes into the gap behind a tensor, in a ", p - gap) + what;
    if (p < a.begin) return format("%td bytes before a ", a.begin - p) + what;
    if (p >= a.begin + a.bytes) return format("%td bytes past the end of a ", p - a.begin - (ptrdiff_t)a.bytes) + what;
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
        if (gap < end && gap + gap_bytes > begin) return format("%s: %zu bytes, which touch the gap behind a tensor, ", what, bytes) + describe(*a, std::max(gap, (char*)p));
    return "";
}

cudaError_t poison(void* p, size_t bytes) {
    std::lock_guard<std::recursive_mutex> lock(api_lock);
    auto it = allocations.upper_bound((char*)p);
    if (it == allocations.begin()) return cudaErrorInvalidValue;
    Allocation& a = (--it)->second;
    if ((char*)p + bytes > a.begin + a.bytes) return cudaErrorInvalidValue;
    if (!bytes) return cudaSuccess;
    DeviceAccess open;
    memset(p, PATTERN, bytes);
    asan_poison(p, bytes);
    a.gaps.emplace_back((char*)p, bytes);
    std::sort(a.gaps.begin(), a.gaps.end());
    char *first = page_at_or_after((char*)p), *last = page_at_or_before((char*)p + bytes);
    if (last > first) mprotect(first, (size_t)(last - first), PROT_NONE);
    return cudaSuccess;
}

// --- patterns

// The first changed byte of [p, end), or null; the pattern is written again.
static char* find_damage(char* p, char* end) {
    char* damage = nullptr;
    while (p < end && (uintptr_t)p % 8) {
        if ((unsigned char)*p != PATTERN && !damage) damage = p;
        p++;
    }
    for (; !damage && p + 8 <= end; p += 8)
        if (*(uint64_t*)p != ~0ull) break;
    for (; !damage && p < end; p++)
        if ((unsigned char)*p != PATTERN) damage = p;
    if (damage)
        for (p = damage; p < end; p++) *p = (char)PATTERN;
    return damage;
}

// After `who` (a kernel's address may go along) has run: has anything been written where nothing belongs?
cudaError_t check_patterns(const char* who, const void* kernel) {
    DeviceAccess open;
    cudaError_t status = cudaSuccess;
    auto check = [&](const Allocation& a, char* from, char* to) {
        char* damage = find_damage(from, to);
        if (!damage) return;
        std::string name = kernel ? std::string(who) + " " + symbol(kernel) : who;
        status = report(cudaErrorIllegalAddress, name + " has written " + describe(a, damage));
    };
    for (auto& [begin, a] : allocations) {
        check(a, a.map, a.begin);
        check(a, a.begin + a.bytes, a.map + a.map_bytes);
        for (auto& [gap, bytes] : a.gaps) {
            char *first = page_at_or_after(gap), *last = page_at_or_before(gap + bytes);
            if (last > first) {
                check(a, gap, first);
                check(a, last, gap + bytes);
            } else {
                check(a, gap, gap + bytes);
            }
        }
    }
    return status;
}

// --- faults

static struct sigaction previous_action;

// What the handler saw. In a kernel it only notes this; the words are found outside of it, where memory may be allocated.
struct Fault {
    char* address;
    bool known;  // the processor gives no address for a misaligned vector access
    void* instruction;
};
static thread_local Fault last_fault;

static std::string describe_fault(const Fault& f) {
    if (on_fiber_guard(f.address)) return "stack overflow of a CUDA thread";
    if (!f.known) return "misaligned vector access, or a wild pointer";
    if (const Allocation* a = near_allocation(allocations, f.address)) return "access out of bounds: " + describe(*a, f.address);
    if (const Allocation* a = near_allocation(freed, f.address)) return "access to freed memory: " + describe(*a, f.address);
    if ((uintptr_t)f.address < PAGE) return format("access through a null pointer (address %p)", (void*)f.address);
    return format("access to %p, which is not device memory", (void*)f.address);
}
static void land() { fault_at_address(describe_fault(last_fault), last_fault.instruction); }

static void on_fault(int signal, siginfo_t* info, void* context) {
    char* p = (char*)info->si_addr;
    if (in_kernel()) {
        last_fault = {p, info->si_code != SI_KERNEL, nullptr};
#if defined(__x86_64__)
        // Go on in land(), on a stack that is whole; it gives up the block.
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
    sigaction(signal, &previous_action, nullptr);  // and on return it faults again, as without us
}

// Before each use of device memory, since others (test frameworks) put their own handler in place; theirs is next in line.
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
    sigaltstack(&stack, nullptr);  // a fiber that overflows has no room for the handler
}

}  // namespace emu
