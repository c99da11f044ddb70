// threads.cpp - workers, and the threads of a block: fibers that wait at barriers and warp collectives.
//
// A worker is an operating system thread that runs one block at a time. Each CUDA thread runs on a fiber.
// When it must wait, it switches directly to another thread that can run; the schedule chooses which. A
// thread that ends leaves its fiber to the next thread that has not started, so kernels without barriers
// need no switches.
//
// Shared memory is the worker's copy of the program's thread-local storage, so kernels run on workers only.
// It is filled with NaN before each block, which makes a missing initialisation show in the results.
//
// Races: threads of a block never run at the same time, so a race shows in two ways. Different schedules give
// different results; and TSan, which sees each CUDA thread as a thread, reports it if no barrier, collective
// or atomic orders the two accesses. acquire() and release() tell TSan what each of these orders.
#include <link.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

#include "fiber.h"
#include "runtime.h"

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

// The program's dynamic shared memory, where dynamic_smem.cpp is linked into it.
extern "C" __attribute__((weak)) unsigned char* emu_dynamic_smem(size_t* bytes);

namespace emu {

struct PendingCopy {
    AsyncCopy copy;
    int group;
    Site site;
};

enum State { NOT_WAITING, AT_WARP, AT_BLOCK, EXITED };

struct Thread {
    Fiber* fiber = nullptr;
    uint3 index;
    State state;
    Site site;          // the place where it waits, or waited last
    const char* waits;  // the function in which it waits
    std::vector<PendingCopy> copies;
    int copy_groups;
};

struct Warp {
    uint32_t arrived, exited;  // bit masks of lanes
    // The number of collectives so far, and the objects that tell TSan their order. Two objects alternate, so
    // that a lane that continues late from one collective is not ordered after arrivals at the next.
    int generation;
    char order[2];
    void* data[32];
    WarpFunction function[32];
    uint32_t mask[32];
    Site site[32];
    const char* name[32];
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    uint64_t ready[16], at_barrier[16];   // a bit per thread: it can run; it waits at the block's barrier
    int count, exited, current, arrived;  // threads; exited; the running one; how many are at the barrier
    BarrierKind barrier;
    int first, sum, result;  // the barrier's first thread, its number of true predicates; the last result
    int generation;          // the number of barriers so far, as in Warp
    char order[2], started, ended;  // objects for TSan
    Schedule schedule;
    const std::function<void()>* body;
    const void* kernel;
    bool failed;
    std::mt19937 random;
    Fiber main;  // the worker's stack, which starts the block and continues at its end
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<Fiber*> idle;  // fibers that no thread uses
    char *shared, *dynamic;    // the worker's copy of the thread-local storage, and dynamic_smem in it
    size_t shared_bytes, dynamic_bytes, dynamic_used;
    uint64_t switches;
    alignas(16) char emergency[64 << 10];  // the stack on which a memory fault is reported
};
static thread_local Block* block = nullptr;  // this worker's block

static std::atomic<uint64_t> launches, cuda_threads, fiber_switches;
static const bool tsan = __tsan_create_fiber != nullptr;

bool in_kernel() { return block && block->current >= 0; }
int lane() { return block->current % 32; }
uint32_t active_mask() { return ~block->warps[(size_t)block->current / 32].exited; }
bool is_shared(const void* p, size_t bytes) {
    return block && (char*)p >= block->shared && (char*)p + bytes <= block->shared + block->shared_bytes;
}
char* emergency_stack_top() { return block->emergency + sizeof block->emergency; }
bool on_fiber_guard(const void* p) {
    return std::any_of(block->fibers.begin(), block->fibers.end(), [&](auto& f) { return f->guards(p); });
}

// --- faults

static std::string place(Site s) { return s.file ? format("%s:%d", s.file, s.line) : "?"; }

// Reports a fault of the running thread and abandons the block: switches back to run_block, which never
// continues these fibers.
[[noreturn]] static void abandon(cudaError_t code, const std::string& text) {
    Block& b = *block;
    report(code, text + format(" [kernel %s, block (%u,%u,%u), thread (%u,%u,%u)]", name_of(b.kernel).c_str(),
                               blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z));
    b.failed = true;
    release(&b.ended);
    b.threads[(size_t)b.current].fiber->switch_to(b.main);
    abort();
}
void fault(const std::string& text, Site s, cudaError_t code) {
    if (in_kernel()) abandon(code, text + " at " + place(s));
    fprintf(stderr, "emulator: %s at %s: called outside of a kernel\n", text.c_str(), place(s).c_str());
    abort();
}
void fault_misaligned(const void* p, size_t bytes, Site s) {
    fault(format("misaligned access of %zu bytes to %p", bytes, p), s, cudaErrorMisalignedAddress);
}
void fault_at_address(const std::string& what, const void* instruction) {
    abandon(cudaErrorIllegalAddress, what + " in " + source_of(instruction));
}
[[noreturn]] static void deadlock(Block& b) {
    std::map<std::string, std::pair<int, int>> groups;  // what they do -> how many threads, the first of them
    for (int i = 0; i < b.count; i++) {
        const Thread& t = b.threads[(size_t)i];
        auto& g = groups[t.state == EXITED ? "have exited"
                                           : format("wait in %s at %s", t.waits, place(t.site).c_str())];
        if (!g.first++) g.second = i;
    }
    std::string text;
    for (auto& [where, g] : groups)
        text += format("; %d threads (the first: %d) %s", g.first, g.second, where.c_str());
    abandon(cudaErrorLaunchFailure, "deadlock: " + text.substr(2));
}

// --- which thread runs next

static void set_ready(Block& b, int thread) { b.ready[thread / 64] |= 1ull << thread % 64; }

// Removes the next thread from the ready ones, as the schedule chooses, and returns it; -1 if there is none.
static int take_ready(Block& b) {
    const int words = (b.count + 63) / 64;
    int w = b.schedule == DESCENDING ? words - 1 : 0, bit = 0;
    if (b.schedule == ASCENDING) {
        while (w < words && !b.ready[w]) w++;
    } else if (b.schedule == DESCENDING) {
        while (w >= 0 && !b.ready[w]) w--;
    } else {  // the first word with a ready thread, searched from a random word on
        const int start = (int)(b.random() % (unsigned)words);
        while (w < words && !b.ready[(start + w) % words]) w++;
        if (w < words) w = (start + w) % words;
    }
    if (w < 0 || w >= words) return -1;
    uint64_t set = b.ready[w];
    if (b.schedule == RANDOM)
        for (int skip = (int)(b.random() % (unsigned)__builtin_popcountll(set)); skip; skip--) set &= set - 1;
    bit = b.schedule == DESCENDING ? 63 - __builtin_clzll(set) : __builtin_ctzll(set);
    b.ready[w] &= ~(1ull << bit);
    return w * 64 + bit;
}

// Makes `next` the running thread and returns its fiber, to which the caller must switch.
static Fiber& begin(Block& b, int next) {
    Thread& t = b.threads[(size_t)next];
    if (!t.fiber) t.fiber = b.idle.back(), b.idle.pop_back();
    t.state = NOT_WAITING;
    b.current = next;
    threadIdx = t.index;
    return *t.fiber;
}

// Called by the running thread when it must wait: runs other threads, and returns when it may continue.
static void let_others_run(Block& b) {
    Fiber& self = *b.threads[(size_t)b.current].fiber;
    const int next = take_ready(b);
    if (next < 0) deadlock(b);
    Fiber& other = begin(b, next);
    if (&other == &self) return;
    b.switches++;
    self.switch_to(other);
}

// Called by the running thread when it was the last to arrive, so no thread needs to wait. It continues at
// once under the ascending schedule; under the others it must not always be the first one after a barrier.
static void go_on(Block& b) {
    b.threads[(size_t)b.current].state = NOT_WAITING;
    if (b.schedule == ASCENDING) return;
    set_ready(b, b.current);
    let_others_run(b);
}

static bool same_place(Site a, Site b) {
    return !options().same_site || (a.line == b.line && (a.file == b.file || !strcmp(a.file, b.file)));
}

// --- warp collectives

// If all lanes of the mask of `lane` that have not exited have arrived at its collective, runs the
// collective. These lanes become ready, except `last`, which is running (-1: none is).
static void try_warp(Block& b, int warp, int lane, int last) {
    Warp& w = b.warps[(size_t)warp];
    const uint32_t needed = w.mask[lane] & ~w.exited;
    if ((w.arrived & needed) != needed) return;
    for (uint32_t left = needed; left; left &= left - 1) {
        const int i = __builtin_ctz(left);
        if (w.mask[i] == w.mask[lane] && !strcmp(w.name[i], w.name[lane]) &&
            same_place(w.site[i], w.site[lane]))
            continue;
        fault(format("lanes of one warp meet in different collectives: lane %d in %s with mask %08x at %s, "
                     "lane %d in %s with mask %08x",
                     lane, w.name[lane], w.mask[lane], place(w.site[lane]).c_str(), i, w.name[i], w.mask[i]),
              w.site[i]);
    }
    if (w.function[lane]) w.function[lane](w.data, needed, w.site[lane]);
    w.arrived &= ~needed;
    w.generation++;
    const uint32_t woken = last < 0 ? needed : needed & ~(1u << last);
    b.ready[warp / 2] |= (uint64_t)woken << warp % 2 * 32;
}

void warp_collective(uint32_t mask, void* data, WarpFunction f, const char* name, Site s) {
    if (!in_kernel()) fault(name, s);
    Block& b = *block;
    const int me = b.current, lane = me % 32;
    Thread& t = b.threads[(size_t)me];
    Warp& w = b.warps[(size_t)me / 32];
    if (!(mask >> lane & 1))
        fault(format("%s: the mask %08x lacks the calling lane %d", name, mask, lane), s);
    w.data[lane] = data, w.function[lane] = f, w.mask[lane] = mask, w.site[lane] = s, w.name[lane] = name;
    w.arrived |= 1u << lane;
    t.state = AT_WARP, t.site = s, t.waits = name;
    void* order = &w.order[w.generation & 1];
    release(order);
    try_warp(b, me / 32, lane, lane);
    if (w.arrived >> lane & 1) let_others_run(b);
    else go_on(b);
    acquire(order);
}

// --- the block's barrier

// Opens the barrier if all threads that have not exited have arrived. They become ready, except `last`, which
// is running (-1: none is).
static void try_barrier(Block& b, int last) {
    if (!b.arrived || b.arrived < b.count - b.exited) return;
    b.result = b.barrier == BARRIER_COUNT ? b.sum : b.barrier == BARRIER_AND ? b.sum == b.arrived : b.sum > 0;
    b.arrived = 0;
    b.generation++;
    for (int w = 0; w < 16; w++) b.ready[w] |= b.at_barrier[w], b.at_barrier[w] = 0;
    if (last >= 0) b.ready[last / 64] &= ~(1ull << last % 64);
}

int block_barrier(BarrierKind kind, bool predicate, Site s) {
    static const char* const names[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and",
                                        "__syncthreads_or"};
    if (!in_kernel()) fault(names[kind], s);
    Block& b = *block;
    const int me = b.current;
    Thread& t = b.threads[(size_t)me];
    t.state = AT_BLOCK, t.site = s, t.waits = names[kind];
    if (!b.arrived++) b.first = me, b.barrier = kind, b.sum = 0;
    const Thread& first = b.threads[(size_t)b.first];
    if (kind != b.barrier || !same_place(s, first.site))
        fault(format("divergent barrier: thread %d waits in %s at %s, thread %d in %s", b.first, first.waits,
                     place(first.site).c_str(), me, t.waits),
              s);
    b.sum += predicate;
    b.at_barrier[me / 64] |= 1ull << me % 64;
    void* order = &b.order[b.generation & 1];
    release(order);
    try_barrier(b, me);
    if (b.arrived) let_others_run(b);
    else go_on(b);
    acquire(order);
    return b.result;
}

// --- asynchronous copies

void cp_async_issue(void* smem, const void* global, bool predicate, Site s) {
    if (!is_shared(smem, 16)) fault(format("cp.async: the target %p is not shared memory", smem), s);
    if ((uintptr_t)smem % 16) fault_misaligned(smem, 16, s);
    if (predicate && (uintptr_t)global % 16) fault_misaligned(global, 16, s);
    if (predicate && !is_device(global, 16))
        fault(format("cp.async: the source %p is not device memory", global), s);
    Thread& t = block->threads[(size_t)block->current];
    t.copies.push_back({{smem, predicate ? global : nullptr}, t.copy_groups, s});
}
void cp_async_commit() { block->threads[(size_t)block->current].copy_groups++; }
bool cp_async_due(int at_most_pending, AsyncCopy& copy) {
    Thread& t = block->threads[(size_t)block->current];
    if (t.copies.empty() || t.copies[0].group >= t.copy_groups - at_most_pending) return false;
    copy = t.copies[0].copy;
    t.copies.erase(t.copies.begin());
    return true;
}

// --- a thread's life

static void end_thread(Block& b) {
    const int me = b.current, warp = me / 32;
    Thread& t = b.threads[(size_t)me];
    if (!t.copies.empty())
        fault(format("the thread exits with %zu asynchronous copies it never waited for, the first",
                     t.copies.size()),
              t.copies[0].site);
    release(&b.ended);
    release(&b.order[b.generation & 1]);  // a thread that has exited counts as arrived
    t.state = EXITED;
    b.exited++;
    Warp& w = b.warps[(size_t)warp];
    w.exited |= 1u << me % 32;
    for (int lane = 0; lane < 32 && w.arrived; lane++)
        if (w.arrived >> lane & 1) try_warp(b, warp, lane, -1);
    try_barrier(b, -1);
}

// The function of every fiber: runs threads of the block, one after the other. When the next thread to run
// has a fiber already, it switches to that one, and continues here when a new thread uses this fiber again.
static void fiber_main() {
    Fiber::entered();
    for (;;) {
        Block& b = *block;
        Fiber& self = *b.threads[(size_t)b.current].fiber;
        acquire(&b.started);
        (*b.body)();
        end_thread(b);
        const int next = take_ready(b);
        if (next < 0 && b.exited < b.count) deadlock(b);
        if (!tsan) b.idle.push_back(&self);  // so that a new thread takes this stack first
        Fiber& other = next < 0 ? b.main : begin(b, next);
        if (&other == &self) continue;
        b.switches++;
        self.switch_to(other);
    }
}

// How many bytes behind a launch's dynamic shared memory are watched for writes.
constexpr size_t BEHIND = 1024;

static void prepare_block(Block& b, dim3 size) {
    b.count = (int)(size.x * size.y * size.z);
    b.exited = b.arrived = b.generation = 0;
    b.failed = false;
    b.threads.resize((size_t)b.count);
    b.warps.resize((size_t)(b.count + 31) / 32);
    for (Warp& w : b.warps) w.arrived = w.exited = 0, w.generation = 0;
    if (b.count % 32) b.warps.back().exited = ~0u << b.count % 32;
    std::fill_n(b.ready, 16, 0), std::fill_n(b.at_barrier, 16, 0);
    for (int i = 0; i < b.count; i++) {
        if ((size_t)i == b.fibers.size()) {
            b.fibers.emplace_back(new Fiber), b.fibers.back()->prepare(fiber_main);
            b.idle.push_back(b.fibers.back().get());
        }
        Thread& t = b.threads[(size_t)i];
        t.fiber = tsan ? b.fibers[(size_t)i].get() : nullptr;  // TSan needs a separate fiber for each thread
        t.index = {(unsigned)i % size.x, (unsigned)i / size.x % size.y, (unsigned)i / size.x / size.y};
        t.site = {nullptr, 0}, t.copies.clear(), t.copy_groups = 0;
        set_ready(b, i);
    }
}

// Runs one block to its end; false if it failed.
static bool run_block(Block& b, uint3 index, dim3 size) {
    prepare_block(b, size);
    // All shared memory becomes NaN; of the dynamic part, only what the launch uses and the bytes behind it.
    const size_t behind = std::min(BEHIND, b.dynamic_bytes - b.dynamic_used);
    char *used_end = b.dynamic + b.dynamic_used, *dynamic_end = b.dynamic + b.dynamic_bytes;
    memset(b.shared, 0xff, (size_t)(b.dynamic - b.shared));
    memset(b.dynamic, 0xff, b.dynamic_used + behind);
    memset(dynamic_end, 0xff, (size_t)(b.shared + b.shared_bytes - dynamic_end));
    asan_poison(used_end, (size_t)(dynamic_end - used_end));
    release(&b.started);

    blockIdx = index;
    b.main.switch_to(begin(b, take_ready(b)));

    b.current = -1;
    acquire(&b.ended);
    asan_unpoison(b.dynamic, b.dynamic_bytes);
    for (size_t i = 0; i < behind && !b.failed; i++) {
        if ((unsigned char)used_end[i] == 0xff) continue;
        b.failed = true;
        report(cudaErrorIllegalAddress,
               format("kernel %s, block (%u,%u,%u), has written %zu bytes past the end of its %zu bytes of "
                      "dynamic shared memory",
                      name_of(b.kernel).c_str(), index.x, index.y, index.z, i, b.dynamic_used));
    }
    if (!b.failed) return true;
    for (char& object : b.order) acquire(&object);  // threads that still wait will not run again
    for (Warp& w : b.warps)
        for (char& object : w.order) acquire(&object);
    b.idle.clear();
    for (auto& f : b.fibers) f->prepare(fiber_main), b.idle.push_back(f.get());
    return false;
}

// ---------------------------------------------------------------------------------------------
// Workers

// The calling worker's block. It finds the worker's copy of the program's thread-local storage.
static Block* new_block() {
    dl_phdr_info program;  // the first in the list of loaded objects
    dl_iterate_phdr([](dl_phdr_info* info, size_t, void* out) { return *(dl_phdr_info*)out = *info, 1; },
                    &program);
    Block* b = new Block;
    b->current = -1;
    b->shared = (char*)program.dlpi_tls_data, b->shared_bytes = 0;  // of the calling thread
    for (int i = 0; i < program.dlpi_phnum; i++)
        if (program.dlpi_phdr[i].p_type == PT_TLS) b->shared_bytes = program.dlpi_phdr[i].p_memsz;
    b->dynamic = b->shared + b->shared_bytes, b->dynamic_bytes = 0;
    if (emu_dynamic_smem) b->dynamic = (char*)emu_dynamic_smem(&b->dynamic_bytes);
    b->main.adopt();
    return b;
}

// The pool of workers. It is never destroyed, because its threads outlive main.
struct Workers {
    std::mutex lock;
    std::vector<std::condition_variable> wake;
    std::condition_variable done;
    std::function<void()> job;
    int busy = 0;
    std::vector<bool> called;

    explicit Workers(size_t size) : wake(size), called(size) {
        for (size_t i = 0; i < size; i++) std::thread([this, i] { serve(i); }).detach();
    }
    void serve(size_t me) {
        block = new_block();
        catch_faults();
        std::unique_lock<std::mutex> hold(lock);
        for (;;) {
            wake[me].wait(hold, [&] { return called[me]; });
            called[me] = false;
            hold.unlock();
            job();
            hold.lock();
            if (--busy == 0) done.notify_one();
        }
    }
    // Runs the job on all workers, but on at most n, and returns when they are done. Must not be called by
    // two threads at the same time.
    void run(size_t n, const std::function<void()>& j) {
        std::unique_lock<std::mutex> hold(lock);
        job = j;
        for (size_t i = 0; i < std::min(n, wake.size()); i++) called[i] = true, busy++, wake[i].notify_one();
        done.wait(hold, [&] { return busy == 0; });
    }
};
static Workers& workers() {
    static Workers* w = new Workers((size_t)std::max(
        1, options().workers ? options().workers : (int)std::thread::hardware_concurrency()));
    return *w;
}

void parallel(size_t n, const std::function<void(size_t)>& job) {
    std::atomic<size_t> next{0};
    workers().run(n, [&] {
        for (size_t i; (i = next.fetch_add(1)) < n;) job(i);
    });
}

void run_kernel(const cudaLaunchConfig_t& c, const void* kernel, const std::function<void()>& body) {
    const dim3 grid = c.gridDim, size = c.blockDim;
    const size_t n = (size_t)grid.x * grid.y * grid.z;
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    launches++;
    cuda_threads += n * size.x * size.y * size.z;
    workers().run(n, [&] {
        Block& b = *block;
        b.kernel = kernel, b.body = &body, b.schedule = options().schedule, b.switches = 0;
        b.dynamic_used = std::min(c.dynamicSmemBytes, b.dynamic_bytes);
        b.random.seed(options().seed);
        blockDim = size, gridDim = grid;
        for (size_t i; !failed && (i = next.fetch_add(1)) < n;) {
            if (b.schedule == DESCENDING) i = n - 1 - i;
            uint3 index = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y),
                           (unsigned)(i / grid.x / grid.y)};
            if (!run_block(b, index, size)) failed = true;
        }
        fiber_switches += b.switches;
    });
    if (!failed) check_patterns(kernel);
    static std::map<const void*, std::string>& names = *new std::map<const void*, std::string>;
    pass_time([&] {  // finding a name is slow
        std::string& name = names[kernel];
        return name.empty() ? name = name_of(kernel) : name;
    });
}

Statistics statistics() {
    Statistics s = {launches, cuda_threads, fiber_switches, 0, 0};
    memory_usage(s.memory_now, s.memory_peak);
    return s;
}

}  // namespace emu
