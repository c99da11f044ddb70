// nccl.cpp - NCCL's communicators and collectives. Each rank is a process of this machine; ranks exchange
// data through POSIX shared memory.
//
// A collective is two operations on its stream. The first copies the input and fills the output with NaN, the
// second exchanges the data with the other ranks and writes the result. Between the two, other streams and
// branches of a graph may run, so that work that does not wait for the collective reads NaN, or is reported
// because it has written to the input or the output. The collectives of a communicator run in the order of
// the calls, also in different streams.
//
// The exchange: each rank has a slot in shared memory, and data that is larger passes through it in pieces.
// Ranks advance in phases, "my piece is in my slot" and "I have read the others' pieces"; each waits until
// all have reached its phase. While it waits, a rank looks whether the others are still there.
#if __has_include(<nccl.h>)
#include <nccl.h>
#else
#include "shadow/nccl.h"
#endif

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <random>
#include <thread>

#include "api.h"

namespace emu {

constexpr int MOST_RANKS = 64;
constexpr size_t SLOT = 2 << 20;
constexpr unsigned char PATTERN = 0xff;  // NaN in all types of floating point

// --- what a collective is

enum Kind { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST };
static const char* const names[] = {"ncclAllReduce", "ncclReduceScatter", "ncclAllGather", "ncclBroadcast"};

// All that must be the same on all ranks, in one word that ranks can read while it is written.
struct Call {
    uint64_t kind : 4, type : 4, root : 8, count : 48;
};
static uint64_t packed(Call c) { return c.kind | c.type << 4 | c.root << 8 | c.count << 16; }
static Call unpacked(uint64_t w) {
    Call c;
    c.kind = w & 15, c.type = w >> 4 & 15, c.root = w >> 8 & 255, c.count = w >> 16;
    return c;
}

struct Type {
    ncclDataType_t code;
    const char* name;
    size_t bytes;
    // out[i] = the sum of in[r][i] over all r, in their order
    void (*add)(char* out, const std::vector<const char*>& in, size_t n);
};
template <class T, class Sum>
static void add(char* out, const std::vector<const char*>& in, size_t n) {
    for (size_t i = 0; i < n; i++) {
        Sum sum = (Sum)((const T*)in[0])[i];
        for (size_t r = 1; r < in.size(); r++) sum += (Sum)((const T*)in[r])[i];
        ((T*)out)[i] = (T)sum;
    }
}
static const Type types[] = {{ncclInt8, "int8", 1, add<int8_t, int>},
                             {ncclUint8, "uint8", 1, add<uint8_t, int>},
                             {ncclFloat32, "float32", 4, add<float, float>},
                             {ncclFloat64, "float64", 8, add<double, double>},
                             {ncclBfloat16, "bfloat16", 2, add<__nv_bfloat16, float>}};
static const Type* find_type(int code) {
    for (const Type& t : types)
        if (t.code == code) return &t;
    return nullptr;
}
static std::string in_words(Call c) {
    const Type* t = find_type((int)c.type);
    const std::string what =
        format("%s of %zu %s", names[c.kind & 3], (size_t)c.count, t ? t->name : "values");
    return c.kind == BROADCAST ? what + format(" from rank %d", (int)c.root) : what;
}

// --- the shared memory

enum State { ABSENT, PRESENT, DESTROYED, ABORTED, FAILED };

// What the other ranks see of a rank. New shared memory is zero.
struct alignas(64) Member {
    std::atomic<int> pid, device, state;
    std::atomic<uint64_t> phase, begun, call;  // collectives begun; the last of them
    char failure[512];                         // the report, if the state is FAILED
};
struct Segment {
    std::atomic<int> ranks;
    Member members[MOST_RANKS];
    alignas(4096) char slots[MOST_RANKS][SLOT];  // takes up memory only where it is written
};
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<int>::is_always_lock_free,
              "atomics in shared memory must not have locks");

struct Communicator {
    int rank = 0, ranks = 0;
    Segment* segment = nullptr;
    std::shared_ptr<Event> last;  // the end of the last collective
    uint64_t begun = 0, phase = 0;
    std::atomic<bool> aborted{false};
    std::atomic<int> error{ncclSuccess};  // for ncclCommGetAsyncError
    // Counts, by its copies, the collectives that graphs have captured.
    const std::shared_ptr<int> graph_uses = std::make_shared<int>();
    bool in_graphs() const { return graph_uses.use_count() > 1; }
    Member& member(int r) const { return segment->members[r]; }
    Member& me() const { return member(rank); }
    ~Communicator() {
        if (segment) munmap(segment, sizeof *segment);
    }
};
typedef std::shared_ptr<Communicator> CommunicatorPtr;

// A collective on one rank
struct Collective {
    CommunicatorPtr comm;
    Call call;
    const Type* type;
    const char* send;
    char *recv, *filled;  // `filled` bytes are NaN while the collective runs: the output, or both buffers if
                          // the output is a part of the input
    size_t in_bytes, out_bytes, filled_bytes;
    int priority;                    // of the stream
    std::shared_ptr<int> graph_use;  // a copy of the communicator's graph_uses, if a graph has captured this
    uint64_t number = 0;
    std::vector<char> input;  // a copy
};

// Why a rank cannot go on
struct Failure {
    ncclResult_t result;
    std::string text;
};

static std::string list_of(const std::vector<int>& ranks) {
    std::string text = ranks.size() == 1 ? "rank" : "ranks";
    for (size_t i = 0; i < ranks.size(); i++)
        text += format("%s%d", i == 0 ? " " : i + 1 < ranks.size() ? ", " : " and ", ranks[i]);
    return text;
}
static std::string described(const Collective& c) {
    return format("collective number %zu, ", (size_t)c.number) + in_words(c.call);
}

// --- waiting for other ranks

// Whether the process has ended. One that its parent has not waited for still has a number, and the state Z.
static bool is_gone(int pid) {
    if (kill(pid, 0) && errno == ESRCH) return true;
    char state = 0;
    if (FILE* f = fopen(format("/proc/%d/stat", pid).c_str(), "r")) {
        if (fscanf(f, "%*d (%*[^)]) %c", &state) != 1) state = 0;
        fclose(f);
    }
    return state == 'Z' || state == 'X';
}

// Waits until done() is true. In between calls trouble(bool now), which throws a Failure if there is a reason
// not to wait any longer; it is true every few milliseconds, for checks that take long. Returns false when
// the time is over.
template <class Done, class Trouble>
static bool wait_until(Done done, Trouble trouble) {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    auto next = start;
    for (int turn = 0; !done(); turn++) {
        const auto now = Clock::now();
        if (std::chrono::duration<double>(now - start).count() > options().nccl_timeout_s) return done();
        if (turn < 200) sched_yield();
        else usleep(100);
        trouble(now >= next);
        if (now >= next) next = now + std::chrono::milliseconds(20);
    }
    return true;
}

// Throws if rank r will not reach the phase for which c waits.
static void check_rank(const Collective& c, int r, bool look_at_process) {
    const Communicator& k = *c.comm;
    Member& other = k.member(r);
    // A rank may do what is waited for, or say why not, and end just now, so this order is needed: the
    // process, the state, the phase.
    const bool ended = look_at_process && is_gone(other.pid);
    const int state = other.state;
    const bool gone = state == PRESENT && ended;
    if ((state == PRESENT && !gone) || other.phase >= k.phase) return;
    const std::string waits = format("rank %d waits in ", k.rank) + described(c) + format("; rank %d ", r);
    const std::string begun = format(" after %zu collectives", (size_t)other.begun);
    if (gone) throw Failure{ncclRemoteError, waits + format("(process %d) is gone", (int)other.pid) + begun};
    if (state == FAILED) throw Failure{ncclRemoteError, waits + "has failed: " + other.failure};
    throw Failure{ncclRemoteError, waits + "has " + (state == ABORTED ? "aborted" : "destroyed") +
                                       " the communicator" + begun};
}
static std::string deadlock_text(const Collective& c) {
    const Communicator& k = *c.comm;
    std::string text =
        format("deadlock: rank %d waits for more than %g s in ", k.rank, options().nccl_timeout_s) +
        described(c);
    for (int r = 0; r < k.ranks; r++) {
        const size_t begun = k.member(r).begun;
        if (r == k.rank) continue;
        text += format("; rank %d has begun %zu collectives", r, begun);
        if (begun) text += ", the last " + in_words(unpacked(k.member(r).call));
    }
    return text;
}

// Ends this rank's phase and waits until all ranks have ended it.
static void meet(const Collective& c) {
    Communicator& k = *c.comm;
    k.me().phase = ++k.phase;
    for (int r = 0; r < k.ranks; r++) {
        const bool met = wait_until(
            [&] { return k.member(r).phase >= k.phase; },
            [&](bool now) {
                if (k.aborted)
                    throw Failure{ncclInternalError, format("ncclCommAbort was called while rank %d waited "
                                                            "for rank %d in ",
                                                            k.rank, r) +
                                                         described(c)};
                check_rank(c, r, now);
            });
        if (!met) throw Failure{ncclInternalError, deadlock_text(c)};
    }
}

// --- running a collective

static void check_same_call(const Collective& c) {
    const Communicator& k = *c.comm;
    const uint64_t first = k.member(0).call;
    for (int r = 1; r < k.ranks; r++)
        if (const uint64_t call = k.member(r).call; call != first)
            throw Failure{ncclInvalidUsage, "rank 0 calls " + in_words(unpacked(first)) +
                                                format(", rank %d ", r) + in_words(unpacked(call)) +
                                                format(", as collective number %zu", (size_t)c.number)};
}

// Throws if anyone has written to the buffers since the start.
static void check_untouched(const Collective& c) {
    const std::string who = format("rank %d: ", c.comm->rank);
    const std::string why =
        " of " + described(c) + ", was written while the collective ran: a wait is missing";
    for (size_t i = 0; i < c.filled_bytes; i++)
        if ((unsigned char)c.filled[i] != PATTERN)
            throw Failure{ncclInvalidUsage, who + format("value %zu of the output", i / c.type->bytes) + why};
    if (c.send >= c.filled && c.send < c.filled + c.filled_bytes) return;  // the input was filled too
    for (size_t i = 0; i < c.in_bytes; i++)
        if (c.send[i] != c.input[i])
            throw Failure{ncclInvalidUsage, who + format("value %zu of the input", i / c.type->bytes) + why};
}

// Copies n values of the input, from value `at` on, to this rank's slot. A reduce-scatter has such a piece
// for each rank.
static void publish(const Collective& c, size_t at, size_t n) {
    const size_t size = c.type->bytes, pieces = c.in_bytes / std::max<size_t>(1, c.call.count * size);
    char* slot = c.comm->segment->slots[c.comm->rank];
    for (size_t i = 0; i < pieces; i++)
        memcpy(slot + i * n * size, &c.input[(i * c.call.count + at) * size], n * size);
}

// Writes n values of the result, from value `at` on; an all-gather writes so many for each rank.
static void combine(const Collective& c, size_t at, size_t n) {
    const Communicator& k = *c.comm;
    const size_t size = c.type->bytes;
    std::vector<const char*> slots;
    for (int r = 0; r < k.ranks; r++)
        slots.push_back(k.segment->slots[r] +
                        (c.call.kind == REDUCE_SCATTER ? (size_t)k.rank * n * size : 0));
    if (c.call.kind == BROADCAST) {
        memcpy(c.recv + at * size, slots[c.call.root], n * size);
    } else if (c.call.kind == ALL_GATHER) {
        for (size_t r = 0; r < slots.size(); r++)
            memcpy(c.recv + (r * c.call.count + at) * size, slots[r], n * size);
    } else {
        c.type->add(c.recv + at * size, slots, n);
    }
}

static void write_log(const Collective& c) {
    if (options().nccl_log.empty()) return;
    const std::string line =
        format("rank %d collective %zu %s %s count %zu bytes_in %zu bytes_out %zu stream_priority %d\n",
               c.comm->rank, (size_t)c.number, names[c.call.kind], c.type->name, (size_t)c.call.count,
               c.in_bytes, c.out_bytes, c.priority);
    const int fd = open(options().nccl_log.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, line.data(), line.size()) != (ssize_t)line.size())
        fprintf(stderr, "emulator: %s: cannot write: %s\n", options().nccl_log.c_str(), strerror(errno));
    if (fd >= 0) close(fd);
}

// Makes the failure known to this rank's next calls and to the other ranks.
static void fail_with(Communicator& k, const Failure& f) {
    k.error = f.result;
    Member& me = k.me();
    snprintf(me.failure, sizeof me.failure, "%s", f.text.c_str());
    int present = PRESENT;
    me.state.compare_exchange_strong(present, FAILED);
    report(cudaErrorLaunchFailure, f.text);
}

// The first operation of a collective
static void start(Collective& c) {
    Communicator& k = *c.comm;
    c.number = ++k.begun;
    k.me().call = packed(c.call);
    k.me().begun = c.number;
    if (k.aborted)
        return fail_with(k, {ncclInvalidUsage, format("rank %d runs ", k.rank) + described(c) +
                                                   ", of a communicator that it has aborted"});
    c.input.assign(c.send, c.send + c.in_bytes);
    memset(c.filled, PATTERN, c.filled_bytes);
}

// The second operation
static void finish(Collective& c) {
    Communicator& k = *c.comm;
    const size_t size = c.type->bytes, pieces = c.call.kind == REDUCE_SCATTER ? (size_t)k.ranks : 1;
    const size_t count = c.call.count, most = SLOT / size / pieces;
    try {
        check_untouched(c);
        size_t at = 0;
        do {
            const size_t n = std::min(most, count - at);
            publish(c, at, n);
            meet(c);
            if (at == 0) check_same_call(c);
            combine(c, at, n);
            meet(c);
            at += n;
        } while (at < count);
        write_log(c);
    } catch (const Failure& f) {
        fail_with(k, f);
    }
    std::vector<char>().swap(c.input);
}

// --- calls

// The communicators that are in use. ncclCommAbort and ncclCommGetAsyncError must not wait for api_lock,
// which a thread holds that waits for other ranks.
static std::mutex& list_lock = *new std::mutex;
static std::map<ncclComm_t, CommunicatorPtr>& communicators = *new std::map<ncclComm_t, CommunicatorPtr>;

static CommunicatorPtr find(ncclComm_t comm, bool remove = false) {
    std::lock_guard<std::mutex> lock(list_lock);
    auto it = communicators.find(comm);
    if (it == communicators.end()) return nullptr;
    CommunicatorPtr k = it->second;
    if (remove) communicators.erase(it);
    return k;
}

// Refuses a call: prints the text, and ends the call with the result.
[[noreturn]] static void reject(ncclResult_t result, const std::string& text) {
    refuse(cudaErrorInvalidValue, text);
    throw result;
}
// Runs the body of a call that holds api_lock, and returns its result.
template <class F>
static ncclResult_t nccl(ncclComm_t comm, F body) {
    try {
        const cudaError_t e = api([&] { body(); });
        if (e == cudaSuccess) return ncclSuccess;
        const CommunicatorPtr k = find(comm);
        return k && k->error ? (ncclResult_t)k->error.load() : ncclUnhandledCudaError;
    } catch (ncclResult_t r) {
        return r;
    }
}

// Checks one buffer, and throws if it is not device memory.
static void check_buffer(const Collective& c, const void* p, size_t bytes, const char* which) {
    const std::string what = std::string(names[c.call.kind]) + "'s " + which;
    const Allocation* a = find_allocation(p);
    std::string wrong = check_range(p, bytes, what.c_str());
    if (bytes && wrong.empty() && a && a->pinned) wrong = what + format(": %p is not device memory", p);
    if (bytes && wrong.empty() && (size_t)p % c.type->bytes)
        wrong = what + format(": %p is not aligned to %zu bytes", p, c.type->bytes);
    if (!wrong.empty()) reject(ncclInvalidArgument, wrong);
}
// Checks both buffers, and determines what is filled during the collective.
static void check_buffers(Collective& c) {
    check_buffer(c, c.send, c.in_bytes, "sendbuff");
    check_buffer(c, c.recv, c.out_bytes, "recvbuff");
    const size_t block = c.call.count * c.type->bytes, mine = (size_t)c.comm->rank * block;
    c.filled = c.recv, c.filled_bytes = c.out_bytes;
    if (c.send >= c.recv + c.out_bytes || c.recv >= c.send + c.in_bytes) return;
    const char* in_place = "sendbuff is recvbuff";
    bool right = c.send == c.recv;
    if (c.call.kind == ALL_GATHER) {
        in_place = "sendbuff is recvbuff + rank * sendcount";
        right = c.send == c.recv + mine;
    } else if (c.call.kind == REDUCE_SCATTER) {
        in_place = "recvbuff is sendbuff + rank * recvcount";
        right = c.recv == c.send + mine;
        c.filled = (char*)c.send, c.filled_bytes = c.in_bytes;
    }
    if (!right)
        reject(ncclInvalidArgument,
               std::string(names[c.call.kind]) + ": the buffers overlap; in place, " + in_place);
}

static ncclResult_t collective(Kind kind, const void* send, void* recv, size_t count, int type, int op,
                               int root, ncclComm_t comm, cudaStream_t stream) {
    return nccl(comm, [&] {
        auto c = std::make_shared<Collective>();
        const std::string name = names[kind];
        c->comm = find(comm);
        if (!c->comm) reject(ncclInvalidArgument, name + ": not a communicator in use");
        Communicator& k = *c->comm;
        c->type = find_type(type);
        if (!c->type) reject(ncclInvalidArgument, name + format(": the emulator has no data type %d", type));
        if (op != ncclSum)
            reject(ncclInvalidArgument, name + format(": the emulator has only ncclSum, not %d", op));
        if (root < 0 || root >= k.ranks)
            reject(ncclInvalidArgument, name + format(": root is %d, wanted 0 to %d", root, k.ranks - 1));
        c->call = {(uint64_t)kind, (uint64_t)type, (uint64_t)root, count};
        c->send = (const char*)send, c->recv = (char*)recv;
        const size_t block = count * c->type->bytes, all = block * (size_t)k.ranks;
        c->in_bytes = kind == REDUCE_SCATTER ? all : kind == BROADCAST && root != k.rank ? 0 : block;
        c->out_bytes = kind == ALL_GATHER ? all : block;
        check_buffers(*c);
        if (cudaError_t e = cudaStreamGetPriority(stream, &c->priority)) throw e;
        if (under_capture(stream)) c->graph_use = k.graph_uses;
        submit_collective(
            stream, k.last, [c] { start(*c); }, [c] { finish(*c); });
    });
}

// --- how ranks meet

static const char MAGIC[] = "emulated NCCL";  // begins a unique id; the shared memory's name follows

static Segment* map_segment(const char* name, int rank) {
    const int fd = shm_open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    Segment* s = nullptr;
    const size_t slot = offsetof(Segment, slots) + (size_t)rank * SLOT;
    // Reserves the memory, because a write where there is none left would kill the process.
    int error = fd < 0 || ftruncate(fd, sizeof(Segment)) ? errno : 0;
    if (!error) error = posix_fallocate(fd, 0, offsetof(Segment, slots));
    if (!error) error = posix_fallocate(fd, (off_t)slot, SLOT);
    if (!error) {
        void* m = mmap(nullptr, sizeof(Segment), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (m == MAP_FAILED) error = errno;
        else s = (Segment*)m;
    }
    if (fd >= 0) close(fd);
    if (error)
        reject(
            ncclSystemError,
            format("ncclCommInitRank: /dev/shm%s: cannot make %zu bytes of shared memory for each rank: %s",
                   name, SLOT, strerror(error)));
    return s;
}

static std::vector<int> absent_ranks(const Communicator& k) {
    std::vector<int> absent;
    for (int r = 0; r < k.ranks; r++)
        if (k.member(r).state == ABSENT) absent.push_back(r);
    return absent;
}
// Throws if a rank is gone before all have come.
static void check_joined_ranks(const Communicator& k) {
    for (int r = 0; r < k.ranks; r++) {
        const bool gone = k.member(r).state != ABSENT && is_gone(k.member(r).pid);
        const std::vector<int> absent = absent_ranks(k);
        if (gone && !absent.empty())
            throw Failure{ncclRemoteError,
                          format("rank %d (process %d) is gone, and ", r, (int)k.member(r).pid) +
                              list_of(absent) + (absent.size() == 1 ? " has" : " have") + " not come"};
    }
}
// Enters this rank into the shared memory and waits until all ranks have done so.
static void join(Communicator& k, int device) {
    int ranks = 0, pid = 0;
    if (!k.segment->ranks.compare_exchange_strong(ranks, k.ranks) && ranks != k.ranks)
        throw Failure{ncclInvalidArgument,
                      format("rank %d wants %d ranks, another rank %d", k.rank, k.ranks, ranks)};
    if (!k.me().pid.compare_exchange_strong(pid, getpid()))
        throw Failure{ncclInvalidUsage, format("rank %d is two processes, %d and %d", k.rank, pid, getpid())};
    k.me().device = device;
    k.me().state = PRESENT;
    const bool all = wait_until([&] { return absent_ranks(k).empty(); },
                                [&](bool now) {
                                    if (now) check_joined_ranks(k);
                                });
    if (!all)
        throw Failure{ncclSystemError, format("rank %d of %d has waited for %g s, but ", k.rank, k.ranks,
                                              options().nccl_timeout_s) +
                                           list_of(absent_ranks(k)) + " did not come"};
    for (int a = 0; a < k.ranks; a++)
        for (int b = a + 1; b < k.ranks; b++)
            if (k.member(a).device == k.member(b).device)
                throw Failure{ncclInvalidUsage, format("duplicate GPU: ranks %d and %d both use device %d", a,
                                                       b, (int)k.member(a).device)};
}

static CommunicatorPtr connect(int ranks, const ncclUniqueId& id, int rank) {
    const std::string what = "ncclCommInitRank: ";
    if (ranks < 1 || ranks > MOST_RANKS || rank < 0 || rank >= ranks)
        reject(ncclInvalidArgument,
               what + format("rank %d of %d; the emulator has 1 to %d ranks", rank, ranks, MOST_RANKS));
    if (memcmp(id.internal, MAGIC, sizeof MAGIC))
        reject(ncclInvalidArgument, what + "the unique id is not from ncclGetUniqueId");
    const char* name = id.internal + sizeof MAGIC;
    int device;
    if (cudaGetDevice(&device)) throw ncclUnhandledCudaError;
    auto k = std::make_shared<Communicator>();
    k->rank = rank, k->ranks = ranks;
    k->segment = map_segment(name, rank);
    try {
        join(*k, device);
    } catch (const Failure& f) {
        shm_unlink(name);
        reject(f.result, what + f.text);
    }
    shm_unlink(name);  // the first rank that comes here removes it; all have it mapped
    return k;
}

}  // namespace emu
using namespace emu;

extern "C" {

ncclResult_t ncclGetVersion(int* version) { return *version = NCCL_VERSION_CODE, ncclSuccess; }
ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
    std::random_device random;
    memset(id, 0, sizeof *id);
    memcpy(id->internal, MAGIC, sizeof MAGIC);
    snprintf(id->internal + sizeof MAGIC, sizeof id->internal - sizeof MAGIC, "/emu_nccl_%08x%08x%08x%08x",
             random(), random(), random(), random());
    return ncclSuccess;
}
// Does not hold api_lock, so that other threads can work while this one waits.
ncclResult_t ncclCommInitRank(ncclComm_t* comm, int ranks, ncclUniqueId id, int rank) {
    *comm = nullptr;
    try {
        CommunicatorPtr k = connect(ranks, id, rank);
        std::lock_guard<std::mutex> lock(list_lock);
        *comm = (ncclComm_t)k.get();
        communicators[*comm] = k;
        return ncclSuccess;
    } catch (ncclResult_t r) {
        return r;
    }
}
// Completes all work first.
ncclResult_t ncclCommDestroy(ncclComm_t comm) {
    return nccl(comm, [&] {
        const CommunicatorPtr k = find(comm);
        if (!k) reject(ncclInvalidArgument, "ncclCommDestroy: not a communicator in use");
        wait_for_all();
        if (k->in_graphs())
            reject(ncclInvalidUsage,
                   "ncclCommDestroy: graphs have captured collectives of the communicator; NCCL would wait "
                   "until they have been destroyed");
        int present = PRESENT;
        k->me().state.compare_exchange_strong(present, DESTROYED);
        find(comm, true);
    });
}
ncclResult_t ncclCommAbort(ncclComm_t comm) {
    const CommunicatorPtr k = find(comm, true);
    if (!k) return ncclInvalidArgument;
    int present = PRESENT;
    k->me().state.compare_exchange_strong(present, ABORTED);
    k->aborted = true;
    while (k->in_graphs()) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // as NCCL does
    return ncclSuccess;
}
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
    const CommunicatorPtr k = find(comm);
    if (!k) return ncclInvalidArgument;
    *error = (ncclResult_t)k->error.load();
    return ncclSuccess;
}
const char* ncclGetErrorString(ncclResult_t r) {
    switch ((int)r) {
        case ncclSuccess:
            return "no error";
        case ncclUnhandledCudaError:
            return "a CUDA call has failed";
        case ncclSystemError:
            return "a system call has failed";
        case ncclInternalError:
            return "internal error";
        case ncclInvalidArgument:
            return "invalid argument";
        case ncclInvalidUsage:
            return "invalid usage";
        case ncclRemoteError:
            return "another rank has failed or is gone";
        case ncclInProgress:
            return "operation in progress";
        default:
            return "unrecognized result code";
    }
}
const char* ncclGetLastError(ncclComm_t) {
    static thread_local std::string text;
    text = last_report();
    return text.c_str();
}

ncclResult_t ncclAllReduce(const void* send, void* recv, size_t count, ncclDataType_t type, ncclRedOp_t op,
                           ncclComm_t comm, cudaStream_t stream) {
    return collective(ALL_REDUCE, send, recv, count, type, op, 0, comm, stream);
}
ncclResult_t ncclReduceScatter(const void* send, void* recv, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
    return collective(REDUCE_SCATTER, send, recv, count, type, op, 0, comm, stream);
}
ncclResult_t ncclAllGather(const void* send, void* recv, size_t count, ncclDataType_t type, ncclComm_t comm,
                           cudaStream_t stream) {
    return collective(ALL_GATHER, send, recv, count, type, ncclSum, 0, comm, stream);
}
ncclResult_t ncclBroadcast(const void* send, void* recv, size_t count, ncclDataType_t type, int root,
                           ncclComm_t comm, cudaStream_t stream) {
    return collective(BROADCAST, send, recv, count, type, ncclSum, root, comm, stream);
}

// Calls in a group run at once, in their order.
static thread_local int groups = 0;
ncclResult_t ncclGroupStart() { return groups++, ncclSuccess; }
ncclResult_t ncclGroupEnd() {
    if (groups == 0) {
        refuse(cudaErrorInvalidValue, "ncclGroupEnd without ncclGroupStart");
        return ncclInvalidUsage;
    }
    return groups--, ncclSuccess;
}

}  // extern "C"
