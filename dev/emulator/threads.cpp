// threads.cpp - reports, workers, and the threads of a block: fibers that wait at barriers and warp collectives.
//
// A worker is an operating system thread that runs one block at a time. Each CUDA thread is a fiber; one that has to
// wait switches straight to the next that can run. A thread that ends hands its stack to the next new one, so kernels
// without barriers cost no switches. Kernels run on workers only: the worker's copy of the program's thread-local
// storage is its block's shared memory, filled with NaN before each block.
#include <cxxabi.h>
#include <link.h>

#include <atomic>
#include <condition_variable>
#include <map>
#include <random>
#include <thread>

#include "fiber.h"
#include "runtime.h"

#define LOCAL static thread_local __attribute__((tls_model("initial-exec")))

__thread uint3 threadIdx, blockIdx;
__thread dim3 blockDim, gridDim;

// The program's dynamic shared memory, where dynamic_smem.cpp is linked into it.
extern "C" __attribute__((weak)) unsigned char* emu_dynamic_smem(size_t* bytes);

namespace emu {

// ---------------------------------------------------------------------------------------------
// Options

static long env(const char* name, long otherwise) {
    const char* v = getenv(name);
    return v && *v ? atol(v) : otherwise;
}

Options& options() {
    static Options* o = [] {
        Options* p = new Options;
        std::string schedule = getenv("EMU_SCHEDULE") ? getenv("EMU_SCHEDULE") : "ascending";
        p->schedule = schedule == "descending" ? DESCENDING : schedule == "random" ? RANDOM : ASCENDING;
        if (schedule != "ascending" && p->schedule == ASCENDING) {
            fprintf(stderr, "emulator: EMU_SCHEDULE is %s, wanted ascending, descending or random\n", schedule.c_str());
            exit(2);
        }
        p->seed = (unsigned)env("EMU_SEED", p->seed);
        p->lazy_streams = env("EMU_LAZY", p->lazy_streams);
        p->host_guard = env("EMU_HOST_GUARD", p->host_guard);
        p->same_site = env("EMU_SAME_SITE", p->same_site);
        p->quiet = env("EMU_QUIET", p->quiet);
        p->workers = (int)env("EMU_WORKERS", 0);
        p->memory_limit = (size_t)env("EMU_MEMORY_MB", (long)(p->memory_limit >> 20)) << 20;
        p->refused_epilogues = (uint32_t)env("EMU_REFUSE_EPILOGUES", 0);
        p->devices = (int)env("EMU_DEVICES", p->devices);
        return p;
    }();
    return *o;
}

// ---------------------------------------------------------------------------------------------
// Reports

static std::mutex report_lock;
static std::string& report_text = *new std::string;  // never destroyed: workers outlive main
static std::atomic<cudaError_t> report_code{cudaSuccess};

std::string format(const char* fmt, ...) {
    char text[1024];
    va_list a;
    va_start(a, fmt);
    vsnprintf(text, sizeof text, fmt, a);
    va_end(a);
    return text;
}

cudaError_t report(cudaError_t code, const std::string& text) {
    std::lock_guard<std::mutex> lock(report_lock);
    if (report_code != cudaSuccess) return report_code;
    report_text = text;
    report_code = code;
    if (!options().quiet) fprintf(stderr, "emulator: %s\n", text.c_str());
    return code;
}
cudaError_t refuse(cudaError_t code, const std::string& text) {
    std::lock_guard<std::mutex> lock(report_lock);
    if (report_code == cudaSuccess) report_text = text;
    if (!options().quiet) fprintf(stderr, "emulator: %s\n", text.c_str());
    return code;
}
cudaError_t fault_code() { return report_code; }
std::string last_report() {
    std::lock_guard<std::mutex> lock(report_lock);
    return report_text;
}
void clear_error() {
    std::lock_guard<std::mutex> lock(report_lock);
    report_text.clear();
    report_code = cudaSuccess;
    set_last_error(cudaSuccess);
}

// What addr2line (binutils) says of an address in the program: "function at file:line", or as much as is known.
static std::string addr2line(const void* address) {
    struct Module {
        uintptr_t address, base;
        std::string path;
    } m = {(uintptr_t)address, 0, ""};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
            Module& m = *(Module*)out;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const auto& h = info->dlpi_phdr[i];
                uintptr_t low = info->dlpi_addr + h.p_vaddr;
                if (h.p_type != PT_LOAD || m.address < low || m.address >= low + h.p_memsz) continue;
                char self[4096] = {};
                m.base = info->dlpi_addr;
                m.path = *info->dlpi_name ? info->dlpi_name : readlink("/proc/self/exe", self, sizeof self - 1) > 0 ? self : "";
                return 1;
            }
            return 0;
        },
        &m);
    std::string line = format("%p", address);
    if (m.path.empty()) return line;
    std::string command = format("addr2line -Cfpe '%s' 0x%zx 2>/dev/null", m.path.c_str(), (size_t)(m.address - m.base));
    if (FILE* p = popen(command.c_str(), "r")) {
        char text[1024];
        if (fgets(text, sizeof text, p) && *text != '?') line = text;
        line = line.substr(0, std::min(line.find('\n'), line.find(" (discriminator")));
        pclose(p);
    }
    return line;
}
std::string symbol(const void* code) {
    std::string s = addr2line(code);
    s = s.substr(0, s.find(" at "));
    int depth = 0;
    for (size_t i = s.size(); i-- > 0 && s.back() == ')';) {  // without the parameters
        depth += s[i] == ')', depth -= s[i] == '(';
        if (depth == 0) return s.substr(0, i);
    }
    return s;
}

// ---------------------------------------------------------------------------------------------
// A block and its threads

enum State { READY, RUNNING, AT_WARP, AT_BLOCK, EXITED };

struct PendingCopy {
    AsyncCopy copy;
    int group;
    Site site;
};

struct Thread {
    Fiber* fiber = nullptr;
    uint3 index;
    State state;
    BarrierKind barrier;
    bool predicate;
    Site site;          // where it waits
    const char* waits;  // in what
    std::vector<PendingCopy> copies;
    int copy_groups;
};

struct Warp {
    uint32_t arrived, exited;
    int generation;  // of TSan's objects: two in turn, so that a late reader does not see the next collective's arrivals
    char order[2];
    void* data[32];
    WarpFunction function[32];
    uint32_t mask[32];
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    uint64_t ready[16];  // one bit for each thread that can run
    int count, exited, at_barrier, current, barrier_result;
    const std::function<void()>* body;
    const void* kernel;
    bool failed;
    std::mt19937 random;
    Fiber main;
    std::vector<Fiber*> fibers, idle;  // all; those that wait for a thread
    int generation;
    char started, ended, order[2];  // TSan's objects
    char *shared, *dynamic;  // the worker's copy of the program's thread-local storage, and the dynamic part
    size_t shared_bytes, dynamic_bytes, dynamic_used;
    uint64_t switches = 0;
    alignas(16) char emergency[64 << 10];
};
LOCAL Block* block = nullptr;  // this worker's

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
    for (Fiber* f : block->fibers)
        if ((char*)p < f->stack && (char*)p >= f->stack - Fiber::GUARD) return true;
    return false;
}

static std::string place(Site s) { return s.file ? format("%s:%d", s.file, s.line) : "?"; }
static std::string this_thread() {
    return format("kernel %s, block (%u,%u,%u), thread (%u,%u,%u)", symbol(block->kernel).c_str(), blockIdx.x, blockIdx.y,
                  blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
}

// Gives up the block: back to run_block, which never resumes these fibers.
[[noreturn]] static void abandon(cudaError_t code, const std::string& text) {
    report(code, text);
    Block& b = *block;
    b.failed = true;
    release(&b.ended);
    Fiber& from = *b.threads[(size_t)b.current].fiber;
    from.switch_to(b.main);
    abort();
}
[[noreturn]] static void fault_in_thread(const std::string& text, Site s, cudaError_t code = cudaErrorLaunchFailure) {
    if (!in_kernel()) {
        fprintf(stderr, "emulator: %s at %s: called outside of a kernel\n", text.c_str(), place(s).c_str());
        abort();
    }
    abandon(code, text + " at " + place(s) + " [" + this_thread() + "]");
}
void fault(const char* text, Site s) { fault_in_thread(text, s); }
void fault_misaligned(const void* p, size_t bytes, Site s) {
    fault_in_thread(format("misaligned access of %zu bytes to %p", bytes, p), s, cudaErrorMisalignedAddress);
}
void fault_at_address(const std::string& what, const void* instruction) {
    abandon(cudaErrorIllegalAddress, what + " in " + addr2line(instruction) + " [" + this_thread() + "]");
}

// --- who runs next

static void set_ready(Block& b, int thread) {
    b.threads[(size_t)thread].state = READY;
    b.ready[thread / 64] |= 1ull << thread % 64;
}

// The next thread by the schedule; -1 where none is ready.
static int take_ready(Block& b) {
    const int words = (b.count + 63) / 64;
    int w = -1, bit = 0;
    if (options().schedule == ASCENDING) {
        for (w = 0; w < words && !b.ready[w];) w++;
        if (w < words) bit = __builtin_ctzll(b.ready[w]);
    } else if (options().schedule == DESCENDING) {
        for (w = words - 1; w >= 0 && !b.ready[w];) w--;
        if (w >= 0) bit = 63 - __builtin_clzll(b.ready[w]);
    } else {  // a random one in the first word, from a random one on, that has any
        int start = (int)(b.random() % (unsigned)words), i = 0;
        while (i < words && !b.ready[(start + i) % words]) i++;
        w = i < words ? (start + i) % words : -1;
        if (w >= 0) {
            uint64_t set = b.ready[w];
            for (int skip = (int)(b.random() % (unsigned)__builtin_popcountll(set)); skip; skip--) set &= set - 1;
            bit = __builtin_ctzll(set);
        }
    }
    if (w < 0 || w >= words) return -1;
    b.ready[w] &= ~(1ull << bit);
    return w * 64 + bit;
}

[[noreturn]] static void deadlock(Block& b) {
    std::map<std::string, std::pair<int, int>> groups;  // where -> how many, the first
    for (int i = 0; i < b.count; i++) {
        const Thread& t = b.threads[(size_t)i];
        std::string where = t.state == EXITED ? "have exited" : format("wait in %s at %s", t.waits, place(t.site).c_str());
        auto& g = groups[where];
        if (!g.first++) g.second = i;
    }
    std::string text = "deadlock:";
    for (auto& [where, g] : groups) text += format(" %d threads (the first: %d) %s;", g.first, g.second, where.c_str());
    text.back() = ' ';
    abandon(cudaErrorLaunchFailure, text + "[" + this_thread() + "]");
}

static void begin_thread(Block& b, int thread) {
    b.current = thread;
    b.threads[(size_t)thread].state = RUNNING;
    threadIdx = b.threads[(size_t)thread].index;
}

// The running thread waits, or has only stepped back; returns when its turn comes.
static void let_others_run(Block& b) {
    int me = b.current, next = take_ready(b);
    if (next < 0) deadlock(b);
    Thread &from = b.threads[(size_t)me], &to = b.threads[(size_t)next];
    if (!to.fiber) to.fiber = b.idle.back(), b.idle.pop_back();
    begin_thread(b, next);
    if (next == me) return;
    b.switches++;
    from.fiber->switch_to(*to.fiber);
}

// --- warp collectives

// Runs the collective of thread `first`'s lane where all lanes of its mask are there.
static void try_warp(Block& b, int warp, int lane, int last) {
    Warp& w = b.warps[(size_t)warp];
    const uint32_t needed = w.mask[lane] & ~w.exited;
    if ((w.arrived & needed) != needed) return;
    const Thread& mine = b.threads[(size_t)warp * 32 + (size_t)lane];
    for (uint32_t left = needed; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        const Thread& t = b.threads[(size_t)warp * 32 + (size_t)i];
        bool same = w.mask[i] == w.mask[lane] && w.function[i] == w.function[lane];
        if (options().same_site) same &= t.site.line == mine.site.line && !strcmp(t.site.file, mine.site.file);
        if (!same)
            fault_in_thread(format("lanes of one warp meet in different collectives: lane %d in %s with mask %08x at %s, lane %d in "
                                   "%s with mask %08x", lane, mine.waits, w.mask[lane], place(mine.site).c_str(), i, t.waits, w.mask[i]),
                            t.site);
    }
    if (w.function[lane]) w.function[lane](w.data, needed, mine.site);
    w.arrived &= ~needed;
    w.generation++;
    for (uint32_t left = needed; left; left &= left - 1)
        if (__builtin_ctz(left) != last) set_ready(b, warp * 32 + __builtin_ctz(left));
}

void warp_collective(uint32_t mask, void* data, WarpFunction f, const char* name, Site s) {
    if (!in_kernel()) fault_in_thread(name, s);
    Block& b = *block;
    const int me = b.current, lane = me % 32;
    Thread& t = b.threads[(size_t)me];
    Warp& w = b.warps[(size_t)me / 32];
    if (!(mask >> lane & 1)) fault_in_thread(format("%s: the mask %08x lacks the calling lane %d", name, mask, lane), s);
    w.data[lane] = data, w.function[lane] = f, w.mask[lane] = mask;
    w.arrived |= 1u << lane;
    t.state = AT_WARP, t.site = s, t.waits = name;
    void* order = &w.order[w.generation & 1];
    release(order);
    try_warp(b, me / 32, lane, lane);
    if (w.arrived >> lane & 1) {
        let_others_run(b);
    } else if (options().schedule != ASCENDING) {  // who comes last must not always go on first
        set_ready(b, me);
        let_others_run(b);
    } else {
        t.state = RUNNING;
    }
    acquire(order);
}

// --- the block's barrier

static void try_barrier(Block& b, int last) {
    if (!b.at_barrier || b.at_barrier < b.count - b.exited) return;
    const Thread* first = nullptr;
    int sum = 0;
    for (const Thread& t : b.threads) {
        if (t.state != AT_BLOCK) continue;
        if (!first) first = &t;
        bool same = t.barrier == first->barrier;
        if (options().same_site) same &= t.site.line == first->site.line && !strcmp(t.site.file, first->site.file);
        if (!same)
            fault_in_thread(format("divergent barrier: thread %d waits in %s at %s, thread %d in %s", (int)(first - b.threads.data()),
                                   first->waits, place(first->site).c_str(), (int)(&t - b.threads.data()), t.waits), t.site);
        sum += t.predicate;
    }
    b.barrier_result = first->barrier == BARRIER_COUNT ? sum : first->barrier == BARRIER_AND ? sum == b.at_barrier : sum > 0;
    b.at_barrier = 0;
    b.generation++;
    for (int i = 0; i < b.count; i++)
        if (b.threads[(size_t)i].state == AT_BLOCK && i != last) set_ready(b, i);
}

int block_barrier(BarrierKind kind, bool predicate, Site s) {
    static const char* const names[] = {"__syncthreads", "__syncthreads_count", "__syncthreads_and", "__syncthreads_or"};
    if (!in_kernel()) fault_in_thread(names[kind], s);
    Block& b = *block;
    Thread& t = b.threads[(size_t)b.current];
    t.state = AT_BLOCK, t.site = s, t.waits = names[kind], t.barrier = kind, t.predicate = predicate;
    b.at_barrier++;
    void* order = &b.order[b.generation & 1];
    release(order);
    try_barrier(b, b.current);
    if (b.at_barrier) {
        let_others_run(b);
    } else if (options().schedule != ASCENDING) {
        set_ready(b, b.current);
        let_others_run(b);
    } else {
        t.state = RUNNING;
    }
    acquire(order);
    return b.barrier_result;
}

// --- a thread's life

static void end_thread(Block& b) {
    const int me = b.current;
    Thread& t = b.threads[(size_t)me];
    if (!t.copies.empty())
        fault_in_thread(format("the thread exits with %zu asynchronous copies it never waited for, the first", t.copies.size()),
                        t.copies[0].site);
    release(&b.ended);
    release(&b.order[b.generation & 1]);  // who exits counts as arrived
    t.state = EXITED;
    b.exited++;
    Warp& w = b.warps[(size_t)me / 32];
    w.exited |= 1u << me % 32;
    for (uint32_t left = w.arrived; left; left &= left - 1) {
        int lane = __builtin_ctz(left);
        if (w.arrived >> lane & 1) try_warp(b, me / 32, lane, -1);
    }
    try_barrier(b, -1);
}

// What every fiber does: runs threads of the block, one after the other, until another fiber has to continue.
static void fiber_main() {
    Fiber::entered();
    for (;;) {
        Block& b = *block;
        Fiber* self = b.threads[(size_t)b.current].fiber;
        acquire(&b.started);
        (*b.body)();
        end_thread(b);
        int next = take_ready(b);
        if (next < 0 && b.exited < b.count) deadlock(b);
        if (!tsan) b.idle.push_back(self);
        if (next < 0) {
            self->switch_to(b.main);
            continue;
        }
        Thread& to = b.threads[(size_t)next];
        if (!to.fiber) to.fiber = b.idle.back(), b.idle.pop_back();  // this very stack
        begin_thread(b, next);
        b.switches += to.fiber != self;
        if (to.fiber != self) self->switch_to(*to.fiber);
    }
}

static Fiber* new_fiber() {
    Fiber* f = new Fiber;
    f->prepare(fiber_main);
    return f;
}

// Bytes behind the dynamic shared memory that a launch asked for, watched for writes.
constexpr size_t BEHIND = 1024;

// Runs one block to its end; false when it failed.
static bool run_block(Block& b, uint3 index, dim3 size, const std::function<void()>& body) {
    b.count = (int)(size.x * size.y * size.z);
    b.exited = b.at_barrier = b.generation = 0;
    b.body = &body;
    b.failed = false;
    b.threads.resize((size_t)b.count);
    b.warps.resize((size_t)(b.count + 31) / 32);
    for (Warp& w : b.warps) w.arrived = w.exited = 0, w.generation = 0;
    if (b.count % 32) b.warps.back().exited = ~0u << b.count % 32;
    memset(b.ready, 0, sizeof b.ready);
    while (b.fibers.size() < (size_t)b.count) b.fibers.push_back(new_fiber()), b.idle.push_back(b.fibers.back());
    for (int i = 0; i < b.count; i++) {
        Thread& t = b.threads[(size_t)i];
        t.fiber = tsan ? b.fibers[(size_t)i] : nullptr;
        t.index = {(unsigned)i % size.x, (unsigned)i / size.x % size.y, (unsigned)i / size.x / size.y};
        t.site = {nullptr, 0}, t.copies.clear(), t.copy_groups = 0;
        set_ready(b, i);
    }
    memset(b.shared, 0xff, (size_t)(b.dynamic - b.shared));  // NaN; the dynamic part only as far as it was asked for
    const size_t behind = std::min(BEHIND, b.dynamic_bytes - b.dynamic_used);
    memset(b.dynamic, 0xff, b.dynamic_used + behind);
    memset(b.dynamic + b.dynamic_bytes, 0xff, (size_t)(b.shared + b.shared_bytes - b.dynamic - b.dynamic_bytes));
    asan_poison(b.dynamic + b.dynamic_used, b.dynamic_bytes - b.dynamic_used);
    release(&b.started);

    blockIdx = index;
    int first = take_ready(b);
    Thread& t = b.threads[(size_t)first];
    if (!t.fiber) t.fiber = b.idle.back(), b.idle.pop_back();
    begin_thread(b, first);
    b.main.switch_to(*t.fiber);

    b.current = -1;
    acquire(&b.ended);
    asan_unpoison(b.dynamic, b.dynamic_bytes);
    for (size_t i = 0; i < behind && !b.failed; i++) {
        if ((unsigned char)b.dynamic[b.dynamic_used + i] == 0xff) continue;
        b.failed = true;
        report(cudaErrorIllegalAddress, format("kernel %s, block (%u,%u,%u), has written %zu bytes past the end of its %zu bytes of dynamic "
                                               "shared memory", symbol(b.kernel).c_str(), index.x, index.y, index.z, i, b.dynamic_used));
    }
    if (b.failed) {  // what the waiting threads did came before what follows
        for (char& object : b.order) acquire(&object);
        for (Warp& w : b.warps)
            for (char& object : w.order) acquire(&object);
        b.idle = b.fibers;
        for (Fiber* f : b.fibers) f->prepare(fiber_main);
    }
    return !b.failed;
}

// ---------------------------------------------------------------------------------------------
// Workers

static Block* new_block() {
    struct Range {
        char* begin = nullptr;
        size_t bytes = 0;
    } tls;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {  // the first entry is the program itself
            for (int i = 0; i < info->dlpi_phnum; i++)
                if (info->dlpi_phdr[i].p_type == PT_TLS) *(Range*)out = {(char*)info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz};
            return 1;
        },
        &tls);
    Block* b = new Block;
    b->current = -1;
    b->shared = tls.begin, b->shared_bytes = tls.bytes;
    b->dynamic = tls.begin + tls.bytes, b->dynamic_bytes = 0;
    if (emu_dynamic_smem) b->dynamic = (char*)emu_dynamic_smem(&b->dynamic_bytes);
    b->main.adopt();
    return b;
}

// Never destroyed: its threads outlive main.
struct Workers {
    std::mutex lock;
    std::condition_variable wake, done;
    std::function<void()> job;
    int size, generation = 0, busy = 0;

    Workers() {
        size = options().workers > 0 ? options().workers : (int)std::thread::hardware_concurrency();
        if (size < 1) size = 1;
        for (int i = 0; i < size; i++) std::thread([this] { serve(); }).detach();
    }
    void serve() {
        block = new_block();
        catch_faults();
        std::unique_lock<std::mutex> hold(lock);
        for (int seen = 0;;) {
            wake.wait(hold, [&] { return generation != seen; });
            seen = generation;
            hold.unlock();
            job();
            hold.lock();
            if (--busy == 0) done.notify_one();
        }
    }
    // Every worker runs the job; returns when all are done. One caller at a time.
    void run(const std::function<void()>& j) {
        std::unique_lock<std::mutex> hold(lock);
        job = j, busy = size, generation++;
        wake.notify_all();
        done.wait(hold, [&] { return busy == 0; });
    }
};
static Workers& workers() {
    static Workers* w = new Workers;
    return *w;
}

void parallel(size_t n, const std::function<void(size_t)>& job) {
    std::atomic<size_t> next{0};
    workers().run([&] {
        for (size_t i; (i = next.fetch_add(1)) < n;) job(i);
    });
}

cudaError_t run_kernel(const cudaLaunchConfig_t& c, const void* kernel, const std::function<void()>& body) {
    const dim3 grid = c.gridDim, size = c.blockDim;
    const size_t n = (size_t)grid.x * grid.y * grid.z;
    std::atomic<size_t> next{0};
    std::atomic<bool> failed{false};
    launches++;
    cuda_threads += n * size.x * size.y * size.z;
    DeviceAccess open;
    workers().run([&] {
        Block& b = *block;
        b.kernel = kernel;
        b.dynamic_used = std::min(c.dynamicSmemBytes, b.dynamic_bytes);
        b.random.seed(options().seed);
        blockDim = size, gridDim = grid;
        b.switches = 0;
        for (size_t i; !failed && (i = next.fetch_add(1)) < n;) {
            if (options().schedule == DESCENDING) i = n - 1 - i;
            uint3 index = {(unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y)};
            if (!run_block(b, index, size, body)) failed = true;
        }
        fiber_switches += b.switches;
    });
    if (failed) return fault_code();
    return check_patterns("kernel", kernel);
}

Statistics statistics() {
    Statistics s = {launches, cuda_threads, fiber_switches, 0, 0};
    memory_usage(s.memory_now, s.memory_peak);
    return s;
}

// ---------------------------------------------------------------------------------------------
// Warp collectives of the device language

struct ShuffleLane {
    uint64_t bits;
    int argument, width;
    uint64_t received;
};

template <ShuffleKind kind>
static void shuffle_lanes(void* const* lanes, uint32_t mask, Site s) {
    for (uint32_t left = mask; left; left &= left - 1) {
        int i = __builtin_ctz(left);
        ShuffleLane& me = *(ShuffleLane*)lanes[i];
        int low = i & ~(me.width - 1), high = low + me.width;
        int from = kind == SHUFFLE_INDEX ? low + (me.argument & (me.width - 1))
                 : kind == SHUFFLE_XOR   ? i ^ me.argument
                 : kind == SHUFFLE_DOWN  ? i + me.argument
                                         : i - me.argument;
        if (kind == SHUFFLE_UP ? from < low : from >= high) from = i;  // outside of the segment: one's own value
        if (from < 0 || from > 31 || !(mask >> from & 1))
            fault_in_thread(format("shuffle: lane %d reads lane %d, which is not there (exited, or not in the mask)", i, from), s);
        me.received = ((ShuffleLane*)lanes[from])->bits;
    }
}
uint64_t shuffle(uint32_t mask, ShuffleKind kind, uint64_t bits, int argument, int width, Site s) {
    static const WarpFunction functions[] = {shuffle_lanes<SHUFFLE_INDEX>, shuffle_lanes<SHUFFLE_XOR>,
                                             shuffle_lanes<SHUFFLE_DOWN>, shuffle_lanes<SHUFFLE_UP>};
    static const char* const names[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync"};
    if (width < 1 || width > 32 || (width & (width - 1))) fault_in_thread(format("%s: width %d", names[kind], width), s);
    ShuffleLane l = {bits, argument, width, 0};
    warp_collective(mask, &l, functions[kind], names[kind], s);
    return l.received;
}

struct ReduceLane {
    Reduction op;
    long long value;
};
static void reduce_lanes(void* const* lanes, uint32_t mask, Site) {
    ReduceLane all = *(ReduceLane*)lanes[__builtin_ctz(mask)];
    for (uint32_t left = mask & (mask - 1); left; left &= left - 1) {
        long long v = ((ReduceLane*)lanes[__builtin_ctz(left)])->value, &r = all.value;
        switch (all.op) {
            case REDUCE_ADD: r += v; break;
            case REDUCE_MIN: r = v < r ? v : r; break;
            case REDUCE_MAX: r = v > r ? v : r; break;
            case REDUCE_AND: r &= v; break;
            case REDUCE_OR: r |= v; break;
            case REDUCE_XOR: r ^= v; break;
        }
    }
    for (uint32_t left = mask; left; left &= left - 1) ((ReduceLane*)lanes[__builtin_ctz(left)])->value = all.value;
}
long long reduce(uint32_t mask, Reduction op, long long value, const char* name, Site s) {
    ReduceLane l = {op, value};
    warp_collective(mask, &l, reduce_lanes, name, s);
    return l.value;
}

// ---------------------------------------------------------------------------------------------
// Tensor cores and asynchronous copies

struct MatrixLane {
    const uint32_t* row;
    uint32_t* r;
    int matrices;
    bool trans;
};
static void ldmatrix_lanes(void* const* lanes, uint32_t mask, Site s) {
    if (mask != 0xffffffffu) fault_in_thread("ldmatrix needs all 32 lanes", s);
    for (int l = 0; l < 32; l++) {
        MatrixLane& me = *(MatrixLane*)lanes[l];
        for (int m = 0; m < me.matrices; m++) {
            uint16_t pair[2];
            for (int e = 0; e < 2; e++) {
                int row = l / 4, column = l % 4 * 2 + e;
                if (me.trans) std::swap(row, column);
                pair[e] = (uint16_t)(((MatrixLane*)lanes[8 * m + row])->row[column / 2] >> column % 2 * 16);
            }
            memcpy(&me.r[m], pair, 4);
        }
    }
}
void check_ldmatrix_row(const void* p, Site s) {
    if (!is_shared(p, 16)) fault_in_thread(format("ldmatrix: %p is not shared memory", p), s);
    if ((uintptr_t)p % 16) fault_misaligned(p, 16, s);
}
void ldmatrix(uint32_t* r, const uint32_t* row, int matrices, bool trans, Site s) {
    MatrixLane l = {row, r, matrices, trans};
    warp_collective(0xffffffffu, &l, ldmatrix_lanes, "ldmatrix", s);
}

struct MmaLane {
    float* d;
    const uint32_t *a, *b;
    const float* c;
};
static float bf16_half(uint32_t pair, int high) { return bit_cast<float>(high ? pair & 0xffff0000u : pair << 16); }

// With g = lane/4 and t = lane%4, element i of a lane's fragment is
//     A (16x16): row g + 8*(i/2%2), column 2t + i%2 + 8*(i/4)       B (16x8): row 2t + i%2 + 8*(i/2), column g
//     C, D (16x8): row g + 8*(i/2), column 2t + i%2
static void mma_lanes(void* const* lanes, uint32_t mask, Site s) {
    if (mask != 0xffffffffu) fault_in_thread("mma needs all 32 lanes", s);
    typedef float Row __attribute__((vector_size(32)));
    float A[16][16], B[16][8], D[16][8];
    for (int l = 0; l < 32; l++) {
        const MmaLane& me = *(MmaLane*)lanes[l];
        const int g = l / 4, t = l % 4;
        for (int i = 0; i < 8; i++) A[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = bf16_half(me.a[i / 2], i % 2);
        for (int i = 0; i < 4; i++) B[2 * t + i % 2 + i / 2 * 8][g] = bf16_half(me.b[i / 2], i % 2);
        for (int i = 0; i < 4; i++) D[g + i / 2 * 8][2 * t + i % 2] = me.c[i];
    }
    for (int m = 0; m < 16; m++) {
        Row d, b;
        memcpy(&d, D[m], 32);
        for (int k = 0; k < 16; k++) memcpy(&b, B[k], 32), d += A[m][k] * b;  // the product of two bf16 is exact in fp32
        memcpy(D[m], &d, 32);
    }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++) ((MmaLane*)lanes[l])->d[i] = D[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}
void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4], const char* file, int line) {
    MmaLane l = {d, a, b, c};
    warp_collective(0xffffffffu, &l, mma_lanes, "mma.m16n8k16", {file, line});
}

void cp_async_issue(void* smem, const void* global, bool predicate, Site s) {
    if (!is_shared(smem, 16)) fault_in_thread(format("cp.async: the target %p is not shared memory", smem), s);
    if ((uintptr_t)smem % 16) fault_misaligned(smem, 16, s);
    if (predicate && (uintptr_t)global % 16) fault_misaligned(global, 16, s);
    if (predicate && !is_device(global, 16)) fault_in_thread(format("cp.async: the source %p is not device memory", global), s);
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

}  // namespace emu
