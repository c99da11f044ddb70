// test_nccl.cu - tests of the emulated NCCL: right results, and a report for each kind of wrong call. Each
// rank is a child process; what it returns is "" or what went wrong, and the parent checks it.
#include <doctest/doctest.h>
#include <nccl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <atomic>
#include <functional>
#include <thread>

#include "dev/test_util.h"

__global__ void copy_kernel(float* out, const float* in, int n) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = in[i];
}
__global__ void fill_kernel(float* out, float value, int n) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < n) out[i] = value;
}

namespace {

using bf16 = __nv_bfloat16;
using Texts = std::vector<std::string>;

// What the processes of a test share
struct Board {
    ncclUniqueId id;
    std::atomic<int> ready, stage[4];
    char text[4][2048];
};

// Runs f in n processes, at most 4, and returns what each returned.
Texts in_processes(int n, const std::function<std::string(int, Board&)>& f, Board* seen = nullptr) {
    void* m = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(m != MAP_FAILED);
    Board& board = *new (m) Board{};
    std::vector<pid_t> pids;
    fflush(nullptr);  // or each child prints what is buffered
    for (int r = 0; r < n; r++) {
        const pid_t pid = fork();
        REQUIRE(pid >= 0);
        if (pid == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            alarm(60);
            emu::options().quiet = true, emu::options().devices = n, emu::options().workers = 2;
            std::string text = "an exception";
            try {
                text = f(r, board);
            } catch (const std::exception& e) {
                text = e.what();
            }
            snprintf(board.text[r], sizeof board.text[r], "%s", text.c_str());
            _exit(0);
        }
        pids.push_back(pid);
    }
    Texts texts;
    for (int r = 0; r < n; r++) {
        int status = 0;
        waitpid(pids[(size_t)r], &status, 0);
        texts.push_back(WIFSIGNALED(status) ? strf("signal %d", WTERMSIG(status)) : board.text[r]);
    }
    if (seen) memcpy((void*)seen, &board, sizeof board);
    munmap(m, sizeof(Board));
    return texts;
}

// In a rank: returns the failed condition to the parent.
#define WANT(condition) \
    if (!(condition)) return strf("line %d: %s; %s", __LINE__, #condition, emu::last_report().c_str())
#define CHECK_ALL_WELL(texts) \
    for (const std::string& t : texts) CHECK_MESSAGE(t == "", t)
#define CHECK_CONTAINS(text, part) \
    CHECK_MESSAGE(contains(text, part), "looked for: ", std::string(part), "; got: ", text)

// The first rank makes the unique id, all connect with it.
ncclResult_t connect(int rank, int ranks, Board& board, ncclComm_t& comm) {
    cudaSetDevice(rank);
    if (rank == 0) ncclGetUniqueId(&board.id), board.ready = 1;
    while (!board.ready) usleep(100);
    return ncclCommInitRank(&comm, ranks, board.id, rank);
}

struct Rank {
    int rank, ranks;
    Board& board;
    ncclComm_t comm = nullptr;
    cudaStream_t main = nullptr, side = nullptr;
    cudaEvent_t event = nullptr;
    void record_and_wait(cudaStream_t from, cudaStream_t to) {
        cudaEventRecord(event, from), cudaStreamWaitEvent(to, event, 0);
    }
};
std::string connected(int r, int n, Board& board, const std::function<std::string(Rank&)>& f) {
    Rank rank{r, n, board};
    WANT(connect(r, n, board, rank.comm) == ncclSuccess);
    WANT(cudaStreamCreateWithFlags(&rank.main, cudaStreamNonBlocking) == cudaSuccess);
    WANT(cudaStreamCreateWithPriority(&rank.side, cudaStreamNonBlocking, -2) == cudaSuccess);
    WANT(cudaEventCreateWithFlags(&rank.event, cudaEventDisableTiming) == cudaSuccess);
    return f(rank);
}
Texts in_ranks(int n, const std::function<std::string(Rank&)>& f, Board* seen = nullptr) {
    return in_processes(
        n, [&](int r, Board& board) { return connected(r, n, board, f); }, seen);
}

template <class T>
T* device(const std::vector<T>& x) {
    T* p = nullptr;
    cudaMalloc(&p, x.size() * sizeof(T));
    cudaMemcpy(p, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice);
    return p;
}
template <class T>
std::vector<T> host(const T* p, size_t n) {
    std::vector<T> x(n);
    if (cudaMemcpy(x.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost) != cudaSuccess) x.clear();
    return x;
}
template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && !memcmp(a.data(), b.data(), a.size() * sizeof(T));
}
void launch(void (*kernel)(float*, const float*, int), float* out, const float* in, int n, cudaStream_t s) {
    cudaLaunchConfig_t c = {};
    c.gridDim = (unsigned)(n + 63) / 64, c.blockDim = 64, c.stream = s;
    cudaLaunchKernelEx(&c, kernel, out, in, n);
}
void fill(float* out, float value, int n, cudaStream_t s) {
    cudaLaunchConfig_t c = {};
    c.gridDim = (unsigned)(n + 63) / 64, c.blockDim = 64, c.stream = s;
    cudaLaunchKernelEx(&c, fill_kernel, out, value, n);
}

template <class T>
struct Of;
template <>
struct Of<float> {
    static constexpr ncclDataType_t type = ncclFloat32;
    using Sum = float;
};
template <>
struct Of<double> {
    static constexpr ncclDataType_t type = ncclFloat64;
    using Sum = double;
};
template <>
struct Of<bf16> {
    static constexpr ncclDataType_t type = ncclBfloat16;
    using Sum = float;
};

// Rank r's input. Sums of such numbers depend on the order.
template <class T>
std::vector<T> input(int r, size_t n) {
    std::vector<T> x(n);
    test::Random random((uint64_t)r + 1);
    for (T& v : x) v = (T)(typename Of<T>::Sum)random.normal();
    return x;
}
// The sum over the ranks in their order, rounded to T once
template <class T>
std::vector<T> summed(int ranks, size_t n) {
    using Sum = typename Of<T>::Sum;
    std::vector<Sum> sum(n);
    for (int r = 0; r < ranks; r++) {
        const std::vector<T> x = input<T>(r, n);
        for (size_t i = 0; i < n; i++) sum[i] = r ? sum[i] + (Sum)x[i] : (Sum)x[i];
    }
    std::vector<T> y(n);
    for (size_t i = 0; i < n; i++) y[i] = (T)sum[i];
    return y;
}
template <class T>
std::vector<T> gathered(int ranks, size_t n) {
    std::vector<T> y;
    for (int r = 0; r < ranks; r++) {
        const std::vector<T> x = input<T>(r, n);
        y.insert(y.end(), x.begin(), x.end());
    }
    return y;
}
template <class T>
std::vector<T> part(const std::vector<T>& x, int r, size_t n) {
    return {x.begin() + (long)((size_t)r * n), x.begin() + (long)((size_t)(r + 1) * n)};
}

// All four collectives of n values, from one buffer to another
template <class T>
std::string all_collectives(Rank& k, size_t n) {
    const size_t N = (size_t)k.ranks;
    const ncclDataType_t type = Of<T>::type;
    T *in = device(input<T>(k.rank, n * N)), *out = device(std::vector<T>(n * N));
    WANT(ncclAllReduce(in, out, n * N, type, ncclSum, k.comm, k.main) == ncclSuccess);
    WANT(cudaStreamSynchronize(k.main) == cudaSuccess);
    const std::vector<T> sum = summed<T>(k.ranks, n * N);
    WANT(same(host(out, n * N), sum));
    WANT(ncclReduceScatter(in, out, n, type, ncclSum, k.comm, k.main) == ncclSuccess);
    WANT(cudaStreamSynchronize(k.main) == cudaSuccess);
    WANT(same(host(out, n), part(sum, k.rank, n)));
    const int last = k.ranks - 1;  // the rest of the buffer is as before
    WANT(same(part(host(out, n * N), last, n), part(sum, last, n)));
    WANT(ncclAllGather(in, out, n, type, k.comm, k.main) == ncclSuccess);
    WANT(cudaStreamSynchronize(k.main) == cudaSuccess);
    std::vector<T> want;
    for (int r = 0; r < k.ranks; r++) {
        const std::vector<T> x = part(input<T>(r, n * N), 0, n);
        want.insert(want.end(), x.begin(), x.end());
    }
    WANT(same(host(out, n * N), want));
    WANT(ncclBroadcast(k.rank == last ? in : nullptr, out, n, type, last, k.comm, k.main) == ncclSuccess);
    WANT(cudaStreamSynchronize(k.main) == cudaSuccess);
    WANT(same(host(out, n), part(input<T>(last, n * N), 0, n)));
    WANT(same(host(in, n * N), input<T>(k.rank, n * N)));  // the input is unchanged
    return "";
}

TEST_CASE("nccl: sums are those in the order of ranks, and bfloat16 is rounded once; no bit differs") {
    for (int n : {1, 2, 3, 4}) {
        CAPTURE(n);
        CHECK_ALL_WELL(in_ranks(n, [](Rank& k) {
            for (const bool lazy : {false, true}) {
                emu::options().lazy_streams = lazy;
                for (const std::string& wrong :
                     {all_collectives<float>(k, 101), all_collectives<double>(k, 33),
                      all_collectives<bf16>(k, 1001)})
                    if (wrong != "") return wrong;
            }
            return std::string();
        }));
    }
}

TEST_CASE("nccl: buffers larger than the shared memory pass through it in pieces") {
    CHECK_ALL_WELL(in_ranks(3, [](Rank& k) { return all_collectives<float>(k, 700001); }));
}

TEST_CASE("nccl: bytes are summed as numbers") {
    CHECK_ALL_WELL(in_ranks(2, [](Rank& k) {
        uint8_t* x = device(std::vector<uint8_t>{200, 3, (uint8_t)k.rank});
        WANT(ncclAllReduce(x, x, 3, ncclUint8, ncclSum, k.comm, k.main) == ncclSuccess);
        WANT(same(host(x, 3), {144, 6, 1}));
        WANT(ncclAllReduce(nullptr, nullptr, 0, ncclChar, ncclSum, k.comm, k.main) == ncclSuccess);
        return std::string();
    }));
}

TEST_CASE("nccl: in place; after a reduce-scatter, the other ranks' parts are NaN") {
    CHECK_ALL_WELL(in_ranks(3, [](Rank& k) {
        const size_t n = 50, N = 3, at = (size_t)k.rank * n;
        const test::Floats sum = summed<float>(3, n * N);
        float* x = device(input<float>(k.rank, n * N));
        WANT(ncclAllReduce(x, x, n * N, ncclFloat, ncclSum, k.comm, k.main) == ncclSuccess);
        WANT(same(host(x, n * N), sum));
        x = device(input<float>(k.rank, n * N));
        WANT(ncclReduceScatter(x, x + at, n, ncclFloat, ncclSum, k.comm, k.main) == ncclSuccess);
        const test::Floats scattered = host(x, n * N);
        for (size_t i = 0; i < n * N; i++)
            WANT(i / n == (size_t)k.rank ? scattered[i] == sum[i] : std::isnan(scattered[i]));
        WANT(ncclAllGather(x + at, x, n, ncclFloat, k.comm, k.main) == ncclSuccess);
        WANT(same(host(x, n * N), sum));
        x = device(input<float>(k.rank, n));
        WANT(ncclBroadcast(x, x, n, ncclFloat, 1, k.comm, k.main) == ncclSuccess);
        WANT(same(host(x, n), input<float>(1, n)));
        return std::string();
    }));
}

TEST_CASE("nccl: other overlaps of input and output, host memory, short or misaligned buffers are refused") {
    CHECK_ALL_WELL(in_ranks(2, [](Rank& k) {
        float* x = device(test::Floats(100));
        void* pinned;
        WANT(cudaMallocHost(&pinned, 400) == cudaSuccess);
        std::vector<float> plain(100);
        auto refused = [&](ncclResult_t r, const char* text) {
            const bool yes = r == ncclInvalidArgument && contains(emu::last_report(), text);
            emu::clear_error();
            return yes;
        };
        const ncclDataType_t f = ncclFloat;
        const int other = 1 - k.rank;
        WANT(refused(ncclAllReduce(x, x + 1, 50, f, ncclSum, k.comm, k.main), "the buffers overlap"));
        WANT(refused(ncclAllReduce(x + 1, x, 50, f, ncclSum, k.comm, k.main), "the buffers overlap"));
        WANT(refused(ncclReduceScatter(x, x + 50 * other, 50, f, ncclSum, k.comm, k.main),
                     "recvbuff is sendbuff + rank * recvcount"));
        WANT(refused(ncclAllGather(x + 50 * other, x, 50, f, k.comm, k.main),
                     "sendbuff is recvbuff + rank * sendcount"));
        WANT(refused(ncclBroadcast(x, x + 1, 50, f, k.rank, k.comm, k.main), "the buffers overlap"));
        WANT(refused(ncclAllReduce(plain.data(), x, 50, f, ncclSum, k.comm, k.main),
                     "ncclAllReduce's sendbuff"));
        WANT(refused(ncclAllReduce(x, plain.data(), 50, f, ncclSum, k.comm, k.main), "is not device memory"));
        WANT(refused(ncclAllReduce(x, pinned, 50, f, ncclSum, k.comm, k.main), "is not device memory"));
        WANT(refused(ncclAllGather(x, x, 51, f, k.comm, k.main), "past the end"));
        WANT(
            refused(ncclBroadcast((char*)x + 2, (char*)x + 2, 50, f, k.rank, k.comm, k.main), "not aligned"));
        WANT(refused(ncclBroadcast(x, x, 50, f, 2, k.comm, k.main), "root is 2"));
        WANT(refused(ncclAllReduce(x, x, 50, f, (ncclRedOp_t)1, k.comm, k.main), "only ncclSum"));
        WANT(refused(ncclAllReduce(x, x, 50, (ncclDataType_t)6, ncclSum, k.comm, k.main), "data type 6"));
        WANT(refused(ncclAllReduce(x, x, 50, f, ncclSum, nullptr, k.main), "not a communicator"));
        WANT(ncclAllReduce(x, x + 50, 50, f, ncclSum, k.comm, k.main) == ncclSuccess);  // adjacent
        return std::string();
    }));
}

// ---------------------------------------------------------------------------------------------
// Missing waits

enum Mode { EAGER, LAZY, GRAPH };

// A step as in training: the main stream makes values, the side stream sums them over the ranks while the
// main stream does other work, then the main stream uses the sums.
struct Step {
    float *x, *sum, *used;
    static constexpr int n = 64;
    bool wait_before = true, wait_after = true, overwrite_output = false, overwrite_input = false;
    void submit(Rank& k) const {
        if (wait_before) fill(x, (float)k.rank + 1, n, k.main);
        k.record_and_wait(k.main, k.side);
        if (!wait_before) fill(x, (float)k.rank + 1, n, k.main);
        ncclAllReduce(x, sum, n, ncclFloat, ncclSum, k.comm, k.side);
        if (overwrite_output) fill(sum, 0, n, k.main);
        if (overwrite_input) fill(x, 0, n, k.main);
        if (wait_after) k.record_and_wait(k.side, k.main);
        launch(copy_kernel, used, sum, n, k.main);
        if (!wait_after) k.record_and_wait(k.side, k.main);
    }
};
// Runs the step and returns the error, or success.
cudaError_t run_step(Rank& k, const Step& s, Mode mode, emu::Schedule schedule) {
    emu::options().schedule = schedule, emu::options().lazy_streams = mode == LAZY;
    if (mode != GRAPH) {
        s.submit(k);
        const cudaError_t e = cudaStreamSynchronize(k.main);
        return e ? e : cudaStreamSynchronize(k.side);
    }
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    cudaStreamBeginCapture(k.main, cudaStreamCaptureModeThreadLocal);
    s.submit(k);
    if (cudaError_t e = cudaStreamEndCapture(k.main, &graph)) return e;
    cudaGraphInstantiate(&executable, graph, 0);
    for (int i = 0; i < 2; i++) cudaGraphLaunch(executable, k.main);
    cudaGraphExecDestroy(executable), cudaGraphDestroy(graph);
    return cudaStreamSynchronize(k.main);
}
Step new_step() {
    const test::Floats x(Step::n, 100.0f);
    return {device(x), device(x), device(x)};
}
constexpr emu::Schedule SCHEDULES[] = {emu::ASCENDING, emu::DESCENDING, emu::RANDOM};

TEST_CASE("nccl: with all waits, the results are right in eager and lazy streams and in graphs") {
    CHECK_ALL_WELL(in_ranks(2, [](Rank& k) {
        for (Mode mode : {EAGER, LAZY, GRAPH})
            for (emu::Schedule schedule : SCHEDULES)
                for (unsigned seed = 1; seed <= 5; seed++) {
                    emu::options().seed = seed;
                    const Step s = new_step();
                    WANT(run_step(k, s, mode, schedule) == cudaSuccess);
                    WANT(same(host(s.used, s.n), test::Floats(s.n, 3.0f)));
                }
        return std::string();
    }));
}

TEST_CASE("nccl: a kernel that does not wait for a collective reads NaN") {
    // A graph's random schedule shows it in some of its orders, the descending one reads the buffer's old
    // content; a lazy stream begins the collective at the call.
    CHECK_ALL_WELL(in_ranks(2, [](Rank& k) {
        int nan = 0;
        for (unsigned seed = 1; seed <= 20; seed++) {
            emu::options().seed = seed;
            Step s = new_step();
            s.wait_after = false;
            WANT(run_step(k, s, GRAPH, emu::RANDOM) == cudaSuccess);
            nan += std::isnan(host(s.used, s.n)[0]);
        }
        WANT(nan >= 3);
        for (emu::Schedule schedule : {emu::DESCENDING, emu::RANDOM}) {
            Step s = new_step();
            s.wait_after = false;
            WANT(run_step(k, s, LAZY, schedule) == cudaSuccess);
            WANT(std::isnan(host(s.used, s.n)[s.n - 1]));
        }
        Step s = new_step();
        s.wait_after = false;
        WANT(run_step(k, s, LAZY, emu::ASCENDING) == cudaSuccess);
        WANT(host(s.used, s.n)[0] == 100);  // nothing of the collective has run
        return std::string();
    }));
}

TEST_CASE("nccl: a kernel that writes to the output or the input of a running collective is reported") {
    for (const bool output : {false, true})
        for (const Mode mode : {LAZY, GRAPH}) {
            const Texts texts = in_ranks(2, [&](Rank& k) {
                ncclResult_t async = ncclSuccess;
                for (unsigned seed = 1; seed <= 20; seed++) {
                    emu::options().seed = seed;
                    Step s = new_step();
                    (output ? s.overwrite_output : s.overwrite_input) = k.rank == 1;
                    if (run_step(k, s, mode, emu::RANDOM) == cudaSuccess) continue;
                    ncclCommGetAsyncError(k.comm, &async);
                    return emu::last_report() + strf(", error %d", async);
                }
                return std::string();
            });
            CHECK_CONTAINS(texts[1],
                           output ? "rank 1: value 0 of the output" : "rank 1: value 0 of the input");
            CHECK_CONTAINS(texts[1], "ncclAllReduce of 64 float32, was written while the collective ran");
            CHECK_CONTAINS(texts[1], strf("error %d", ncclInvalidUsage));
            CHECK_CONTAINS(texts[0], "rank 1 has failed: rank 1: value 0 of the");
            CHECK_CONTAINS(texts[0], strf("error %d", ncclRemoteError));
        }
}

TEST_CASE("nccl: a collective that does not wait for its input is reported") {
    for (Mode mode : {LAZY, GRAPH})
        for (const std::string& t : in_ranks(2, [&](Rank& k) {
                 Step s = new_step();
                 s.wait_before = false;
                 WANT(run_step(k, s, mode, emu::DESCENDING) != cudaSuccess);
                 return emu::last_report();
             }))
            CHECK_CONTAINS(t, "value 0 of the input of collective number 1");
}

TEST_CASE("nccl: each wait that is dropped is found, in lazy streams and in a graph") {
    for (const Mode mode : {LAZY, GRAPH})
        for (const int drop : {0, 1, 2}) {
            CAPTURE(mode);
            CAPTURE(drop);
            const Texts texts = in_ranks(2, [&](Rank& k) {
                for (emu::Schedule schedule : SCHEDULES) {
                    const Step s = new_step();
                    cudaMemset(s.x, 0, s.n * sizeof(float));
                    emu::options().waits_made = 0, emu::options().drop_wait = drop;
                    if (run_step(k, s, mode, schedule) != cudaSuccess) return std::string("found");
                    WANT(emu::options().waits_made == 2);
                    if (!same(host(s.used, s.n), test::Floats(s.n, 3.0f))) return std::string("found");
                }
                return std::string("not found");
            });
            for (const std::string& t : texts) CHECK(t == (drop ? "found" : "not found"));
        }
}

TEST_CASE("nccl: collectives of a communicator run in the order of the calls, also in two streams") {
    CHECK_ALL_WELL(in_ranks(2, [](Rank& k) {
        // What waits first, and the schedule, differ between the ranks.
        emu::options().lazy_streams = true;
        float* x = device(test::Floats(4, 1.0f));
        float* y = device(test::Floats(8, 10.0f));
        WANT(ncclAllReduce(x, x, 4, ncclFloat, ncclSum, k.comm, k.main) == ncclSuccess);
        WANT(ncclAllReduce(y, y, 8, ncclFloat, ncclSum, k.comm, k.side) == ncclSuccess);
        for (cudaStream_t s : {k.rank ? k.main : k.side, k.rank ? k.side : k.main})
            WANT(cudaStreamSynchronize(s) == cudaSuccess);
        WANT(host(x, 1)[0] == 2 && host(y, 1)[0] == 20);
        emu::options().schedule = k.rank ? emu::DESCENDING : emu::ASCENDING;
        cudaGraph_t graph;
        cudaGraphExec_t executable;
        cudaStreamBeginCapture(k.main, cudaStreamCaptureModeThreadLocal);
        k.record_and_wait(k.main, k.side);
        WANT(ncclAllReduce(x, x, 4, ncclFloat, ncclSum, k.comm, k.main) == ncclSuccess);
        WANT(ncclAllReduce(y, y, 8, ncclFloat, ncclSum, k.comm, k.side) == ncclSuccess);
        k.record_and_wait(k.side, k.main);
        WANT(cudaStreamEndCapture(k.main, &graph) == cudaSuccess);
        WANT(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
        WANT(cudaGraphLaunch(executable, k.main) == cudaSuccess);
        WANT(cudaStreamSynchronize(k.main) == cudaSuccess);
        WANT(host(x, 1)[0] == 4 && host(y, 1)[0] == 40);
        return std::string();
    }));
}

// ---------------------------------------------------------------------------------------------
// Ranks that do not fit together

std::string error_and_report(Rank& k, ncclResult_t r, cudaError_t e) {
    ncclResult_t async = ncclSuccess;
    ncclCommGetAsyncError(k.comm, &async);
    return strf("result %d, async %d, next call %d: ", r, async, e != cudaSuccess) + emu::last_report();
}

TEST_CASE("nccl: calls that differ between ranks are reported on all ranks, with both calls") {
    const Texts texts = in_ranks(3, [](Rank& k) {
        float* x = device(test::Floats(300));
        for (int i = 0; i < 6; i++) ncclAllReduce(x, x, 8, ncclFloat, ncclSum, k.comm, k.main);
        const ncclResult_t r = k.rank == 2 ? ncclAllGather(x, x + 100, 50, ncclBfloat16, k.comm, k.main)
                                           : ncclAllReduce(x, x, 100, ncclFloat, ncclSum, k.comm, k.main);
        return error_and_report(k, r, cudaDeviceSynchronize());
    });
    for (const std::string& t : texts)
        CHECK(
            t ==
            "result 5, async 5, next call 1: rank 0 calls ncclAllReduce of 100 float32, rank 2 ncclAllGather"
            " of 50 bfloat16, as collective number 7");
    for (const int differs : {0, 1}) {
        const Texts roots = in_ranks(2, [&](Rank& k) {
            float* x = device(test::Floats(300));
            const int root = differs ? k.rank : 0;
            ncclBroadcast(x, x, differs ? 5 : 5 + (size_t)k.rank, ncclFloat, root, k.comm, k.main);
            return emu::last_report();
        });
        for (const std::string& t : roots)
            CHECK_CONTAINS(t, differs ? "rank 0 calls ncclBroadcast of 5 float32 from rank 0, rank 1 "
                                        "ncclBroadcast of 5 float32 from rank 1, as"
                                      : "rank 0 calls ncclBroadcast of 5 float32 from rank 0, rank 1 "
                                        "ncclBroadcast of 6 float32 from rank 0, as");
    }
}

TEST_CASE("nccl: a deadlock is reported after the timeout, with what each rank has called last") {
    const auto start = std::chrono::steady_clock::now();
    const Texts texts = in_ranks(3, [](Rank& k) {
        emu::options().nccl_timeout_s = 1;
        float* x = device(test::Floats(100));
        ncclAllReduce(x, x, 10, ncclFloat, ncclSum, k.comm, k.main);
        cudaError_t e = cudaSuccess;
        if (k.rank != 1) {
            e = (cudaError_t)ncclAllReduce(x, x, 20, ncclFloat, ncclSum, k.comm, k.main);
            k.board.stage[k.rank] = 1;
        } else {
            while (!k.board.stage[0] || !k.board.stage[2]) usleep(1000);
        }
        return error_and_report(k, (ncclResult_t)e, cudaDeviceSynchronize());
    });
    const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    CHECK(s >= 1);
    CHECK(s < 10);
    CHECK_CONTAINS(texts[0],
                   "result 3, async 3, next call 1: deadlock: rank 0 waits for more than 1 s in collective "
                   "number 2, ncclAllReduce of 20 float32; rank 1 has begun 1 collectives, the last "
                   "ncclAllReduce of 10 float32; rank 2 has begun 2 collectives, the last "
                   "ncclAllReduce of 20 float32");
    CHECK_CONTAINS(texts[2], "deadlock: rank 2 waits");
    CHECK_CONTAINS(texts[1], "next call 0");
}

TEST_CASE("nccl: a killed rank, and one that has left, are reported by those that wait for it") {
    const auto start = std::chrono::steady_clock::now();
    const Texts killed = in_ranks(3, [](Rank& k) {
        float* x = device(test::Floats(100));
        ncclAllReduce(x, x, 10, ncclFloat, ncclSum, k.comm, k.main);
        if (k.rank == 1) raise(SIGKILL);
        const ncclResult_t r = ncclAllReduce(x, x, 10, ncclFloat, ncclSum, k.comm, k.main);
        return error_and_report(k, r, cudaDeviceSynchronize());
    });
    CHECK(killed[1] == "signal 9");
    for (int r : {0, 2}) {
        CHECK_CONTAINS(killed[(size_t)r], "result 6, async 6, next call 1: ");
        CHECK_CONTAINS(killed[(size_t)r],
                       strf("rank %d waits in collective number 2, ncclAllReduce of 10", r));
    }
    // The second rank to see it may be told by the first instead.
    CHECK_CONTAINS(killed[0] + killed[2], "is gone after 1 collectives");
    for (const bool abort : {false, true}) {
        const Texts texts = in_ranks(2, [&](Rank& k) {
            float* x = device(test::Floats(100));
            if (k.rank == 1) {
                WANT((abort ? ncclCommAbort(k.comm) : ncclCommDestroy(k.comm)) == ncclSuccess);
                while (!k.board.stage[0]) usleep(1000);
                return std::string();
            }
            const ncclResult_t r = ncclAllReduce(x, x, 10, ncclFloat, ncclSum, k.comm, k.main);
            k.board.stage[0] = 1;
            return error_and_report(k, r, cudaDeviceSynchronize());
        });
        CHECK_CONTAINS(texts[0], abort ? "rank 1 has aborted the communicator after 0 collectives"
                                       : "rank 1 has destroyed the communicator after 0 collectives");
        CHECK(texts[1] == "");
    }
    CHECK(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < 5);
}

TEST_CASE("nccl: ncclCommAbort in another thread ends a collective that waits") {
    const Texts texts = in_ranks(2, [](Rank& k) {
        float* x = device(test::Floats(100));
        if (k.rank == 1) {
            while (!k.board.stage[0]) usleep(1000);
            return std::string();
        }
        std::string seen;
        std::atomic<bool> begins{false};
        std::thread other([&] {
            while (!begins) usleep(1000);
            usleep(200000);
            ncclResult_t async = ncclInternalError;
            if (ncclCommGetAsyncError(k.comm, &async) != ncclSuccess || async != ncclSuccess) seen = "async";
            if (ncclCommAbort(k.comm) != ncclSuccess) seen = "abort";
        });
        begins = true;
        const ncclResult_t r = ncclAllReduce(x, x, 10, ncclFloat, ncclSum, k.comm, k.main);
        other.join();
        k.board.stage[0] = 1;
        return seen + error_and_report(k, r, cudaDeviceSynchronize());
    });
    CHECK_CONTAINS(texts[0],
                   "next call 1: ncclCommAbort was called while rank 0 waited for rank 1 in collective "
                   "number 1, ncclAllReduce of 10 float32");
    CHECK(texts[0].substr(0, 7) == "result ");
    CHECK(texts[0].substr(0, 8) != "result 0");
}

TEST_CASE("nccl: ncclCommDestroy completes collectives that were submitted") {
    CHECK_ALL_WELL(in_ranks(2, [](Rank& k) {
        emu::options().lazy_streams = true;
        float* x = device(test::Floats(4, 1.0f));
        WANT(ncclAllReduce(x, x, 4, ncclFloat, ncclSum, k.comm, k.side) == ncclSuccess);
        WANT(ncclCommDestroy(k.comm) == ncclSuccess);
        WANT(same(host(x, 4), test::Floats(4, 2.0f)));
        return std::string();
    }));
}

TEST_CASE("nccl: a communicator outlives the graphs that have captured its collectives") {
    const Texts texts = in_ranks(1, [](Rank& k) {
        float* x = device(test::Floats(100));
        cudaGraph_t graph;
        cudaGraphExec_t executable;
        cudaStreamBeginCapture(k.main, cudaStreamCaptureModeThreadLocal);
        WANT(ncclAllReduce(x, x, 10, ncclFloat, ncclSum, k.comm, k.main) == ncclSuccess);
        WANT(cudaStreamEndCapture(k.main, &graph) == cudaSuccess);
        WANT(cudaGraphInstantiate(&executable, graph, 0) == cudaSuccess);
        WANT(cudaGraphLaunch(executable, k.main) == cudaSuccess);
        WANT(cudaGraphDestroy(graph) == cudaSuccess);
        WANT(ncclCommDestroy(k.comm) == ncclInvalidUsage);
        const std::string report = emu::last_report();
        std::atomic<bool> aborted{false};
        std::thread abort([&] {
            ncclCommAbort(k.comm);
            aborted = true;
        });
        usleep(200000);
        const bool waited = !aborted;
        WANT(cudaGraphExecDestroy(executable) == cudaSuccess);
        abort.join();
        WANT(waited);
        WANT(ncclCommDestroy(k.comm) == ncclInvalidArgument);
        return report;
    });
    CHECK_CONTAINS(texts[0], "ncclCommDestroy: graphs have captured collectives of the communicator");
}

// ---------------------------------------------------------------------------------------------
// How ranks meet

bool left_in_shm(const Board& board) {
    const void* name = memchr(board.id.internal, '/', sizeof board.id.internal);
    REQUIRE(name);
    return file_exists("/dev/shm" + std::string((const char*)name));
}

TEST_CASE("nccl: ranks that do not come are named after the timeout, and nothing is left in /dev/shm") {
    Board seen{};
    const Texts texts = in_processes(
        2,
        [](int r, Board& board) {
            emu::options().nccl_timeout_s = 1, emu::options().devices = 4;
            ncclComm_t comm;
            const ncclResult_t result = connect(r, 4, board, comm);
            board.stage[r] = 1;  // ranks that have gone would be reported instead
            while (!board.stage[1 - r]) usleep(1000);
            return strf("%d %d ", result, comm == nullptr) + emu::last_report();
        },
        &seen);
    CHECK(texts[0] == "2 1 ncclCommInitRank: rank 0 of 4 has waited for 1 s, but ranks 2 and 3 did not come");
    CHECK_CONTAINS(texts[1], "2 1 ncclCommInitRank: rank 1 of 4");
    CHECK(!left_in_shm(seen));
}

TEST_CASE("nccl: nothing is in /dev/shm while the ranks work, so also not after kill -9") {
    Board seen{};
    const Texts texts = in_ranks(
        2,
        [](Rank& k) {
            float* x = device(test::Floats(100));
            ncclAllReduce(x, x, 10, ncclFloat, ncclSum, k.comm, k.main);
            raise(SIGKILL);
            return std::string();
        },
        &seen);
    CHECK(texts == Texts{"signal 9", "signal 9"});
    CHECK(!left_in_shm(seen));
}

TEST_CASE(
    "nccl: two ranks on one device, one rank in two processes, different numbers of ranks are refused") {
    for (const std::string& t : in_processes(2, [](int r, Board&board) {
             ncclComm_t comm;
             if (r == 0) ncclGetUniqueId(&board.id), board.ready = 1;
             while (!board.ready) usleep(100);
             const ncclResult_t result = ncclCommInitRank(&comm, 2, board.id, r);
             return strf("%d ", result) + emu::last_report();
         }))
        CHECK(t == "5 ncclCommInitRank: duplicate GPU: ranks 0 and 1 both use device 0");
    for (const bool twice : {false, true}) {
        const Texts texts = in_processes(2, [&](int r, Board& board) {
            emu::options().nccl_timeout_s = 1;
            ncclComm_t comm;
            if (r == 0) ncclGetUniqueId(&board.id), board.ready = 1;
            while (!board.ready) usleep(100);
            const ncclResult_t result = ncclCommInitRank(&comm, twice ? 2 : 2 + r, board.id, twice ? 0 : r);
            return strf("%d ", result) + emu::last_report();
        });
        CHECK_CONTAINS(texts[0] + texts[1], twice ? "rank 0 is two processes" : "ranks, another rank ");
        for (const std::string& t : texts) CHECK(t.substr(0, 2) != "0 ");
    }
}

TEST_CASE("nccl: a rank that dies before the others have come is reported") {
    const Texts texts = in_processes(2, [](int r, Board& board) {
        ncclComm_t comm;
        emu::options().devices = 3;
        if (r == 1) emu::options().nccl_timeout_s = 0.2;
        connect(r, 3, board, comm);
        if (r == 1) raise(SIGKILL);
        return emu::last_report();
    });
    CHECK(texts[1] == "signal 9");
    CHECK_CONTAINS(texts[0], "ncclCommInitRank: rank 1 (process ");
    CHECK_CONTAINS(texts[0], ") is gone, and rank 2 has not come");
}

TEST_CASE("nccl: wrong ranks and ids, versions, texts, groups, devices") {
    CHECK_ALL_WELL(in_processes(1, [](int, Board&) {
        ncclComm_t comm;
        ncclUniqueId id = {}, other;
        WANT(ncclCommInitRank(&comm, 1, id, 0) == ncclInvalidArgument);
        WANT(contains(ncclGetLastError(nullptr), "the unique id is not from ncclGetUniqueId"));
        WANT(ncclGetUniqueId(&id) == ncclSuccess && ncclGetUniqueId(&other) == ncclSuccess);
        WANT(memcmp(&id, &other, sizeof id) != 0);
        for (const auto& [n, rank] : {std::pair{0, 0}, {2, 2}, {2, -1}, {65, 0}})
            WANT(ncclCommInitRank(&comm, n, id, rank) == ncclInvalidArgument);
        int version = 0;
        WANT(ncclGetVersion(&version) == ncclSuccess && version >= 22000);
        WANT(ncclGroupStart() == ncclSuccess && ncclGroupEnd() == ncclSuccess);
        WANT(ncclGroupEnd() == ncclInvalidUsage);
        for (int r = 0; r <= ncclInProgress; r++)
            WANT(!contains(ncclGetErrorString((ncclResult_t)r), "unrecognized"));
        emu::options().devices = 2;
        char a[16], b[16];
        WANT(cudaDeviceGetPCIBusId(a, 16, 0) == cudaSuccess &&
             cudaDeviceGetPCIBusId(b, 16, 1) == cudaSuccess);
        WANT(std::string(a) != b);
        WANT(cudaDeviceGetPCIBusId(a, 16, 2) == cudaErrorInvalidDevice);
        WANT(cudaDeviceGetPCIBusId(a, 12, 0) == cudaErrorInvalidValue);
        return std::string();
    }));
}

TEST_CASE("nccl: the log has a line for each collective that has run") {
    TempDir dir;
    CHECK_ALL_WELL(in_ranks(2, [&](Rank& k) {
        emu::options().nccl_log = dir / "log";
        const Step s = new_step();
        WANT(run_step(k, s, GRAPH, emu::ASCENDING) == cudaSuccess);  // launches it twice
        WANT(ncclReduceScatter(s.x, s.sum, 32, ncclFloat, ncclSum, k.comm, k.main) == ncclSuccess);
        WANT(ncclAllGather(s.x, s.sum, 64, ncclBfloat16, k.comm, k.main) == ncclSuccess);
        WANT(ncclBroadcast(s.x, s.sum, 8, ncclFloat, 0, k.comm, k.main) == ncclSuccess);
        return std::string();
    }));
    const std::string log = read_file(dir / "log");
    CHECK(std::count(log.begin(), log.end(), '\n') == 10);
    for (
        const char* line :
        {"rank 0 collective 2 ncclAllReduce float32 count 64 bytes_in 256 bytes_out 256 stream_priority -2\n",
         "rank 1 collective 3 ncclReduceScatter float32 count 32 bytes_in 256 bytes_out 128 stream_priority "
         "0\n",
         "rank 1 collective 4 ncclAllGather bfloat16 count 64 bytes_in 128 bytes_out 256 stream_priority 0\n",
         "rank 0 collective 5 ncclBroadcast float32 count 8 bytes_in 32 bytes_out 32 stream_priority 0\n",
         "rank 1 collective 5 ncclBroadcast float32 count 8 bytes_in 0 bytes_out 32 stream_priority 0\n"})
        CHECK_CONTAINS(log, line);
}

}  // namespace
