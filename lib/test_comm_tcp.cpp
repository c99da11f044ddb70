// test_comm_tcp.cpp - ranks that are processes of this machine meet, exchange data, and notice deaths.
#include <doctest/doctest.h>

#include <arpa/inet.h>

#include "dev/test_util.h"
#include "lib/comm_tcp.h"

namespace {

using tcp::seconds;

// --- launchers' environments

// The environment's variables that find_launch() reads are those of the list, until the end of the scope.
class Environment {
  public:
    using Variables = std::vector<std::pair<const char*, const char*>>;
    explicit Environment(const Variables& set) {
        for (const char* name : {"RANK",
                                 "WORLD_SIZE",
                                 "LOCAL_RANK",
                                 "LOCAL_WORLD_SIZE",
                                 "MASTER_ADDR",
                                 "MASTER_PORT",
                                 "TORCHELASTIC_USE_AGENT_STORE",
                                 "SLURM_PROCID",
                                 "SLURM_STEP_NUM_TASKS",
                                 "SLURM_NTASKS",
                                 "SLURM_LOCALID",
                                 "SLURM_STEP_TASKS_PER_NODE",
                                 "SLURM_STEP_NODELIST",
                                 "SLURM_JOB_ID",
                                 "SLURM_STEP_ID",
                                 "SLURM_DISTRIBUTION",
                                 "OMPI_COMM_WORLD_RANK",
                                 "OMPI_COMM_WORLD_SIZE",
                                 "OMPI_COMM_WORLD_LOCAL_RANK",
                                 "OMPI_COMM_WORLD_LOCAL_SIZE",
                                 "OMPI_MCA_orte_jobid",
                                 "OMPI_MCA_ess_base_jobid",
                                 "PMIX_NAMESPACE",
                                 "PMI_RANK",
                                 "PMI_SIZE",
                                 "PMI_JOBID",
                                 "MPI_LOCALRANKID",
                                 "MPI_LOCALNRANKS",
                                 "PMI_LOCAL_RANK",
                                 "PMI_LOCAL_SIZE"}) {
            if (const char* value = getenv(name)) before_.push_back({name, value});
            unsetenv(name);
        }
        for (auto& [name, value] : set) setenv(name, value, 1), names_.push_back(name);
    }
    ~Environment() {
        for (const char* name : names_) unsetenv(name);
        for (auto& [name, value] : before_) setenv(name, value.c_str(), 1);
    }

  private:
    std::vector<std::pair<const char*, std::string>> before_;
    std::vector<const char*> names_;
};

// "torchrun 1/4 local 1/2 gpu1:29500", or the error
std::string launch_of(Environment::Variables set, const Environment::Variables& more = {}) {
    set.insert(set.end(), more.begin(), more.end());
    Environment e(set);
    try {
        Launch l = find_launch();
        if (l.world == 1) return "alone";
        return strf("%s %d/%d local %d/%d %s:%d", l.by.c_str(), l.rank, l.world, l.local_rank, l.on_host,
                    l.leader.c_str(), l.port);
    } catch (const Error& error) {
        return error.what();
    }
}

const Environment::Variables TORCH = {{"RANK", "3"},           {"WORLD_SIZE", "4"},
                                      {"LOCAL_RANK", "1"},     {"LOCAL_WORLD_SIZE", "2"},
                                      {"MASTER_ADDR", "gpu1"}, {"MASTER_PORT", "12345"}};
const Environment::Variables SLURM = {{"SLURM_PROCID", "9"},
                                      {"SLURM_STEP_NUM_TASKS", "11"},
                                      {"SLURM_NTASKS", "16"},
                                      {"SLURM_LOCALID", "1"},
                                      {"SLURM_STEP_TASKS_PER_NODE", "4(x2),3"},
                                      {"SLURM_STEP_NODELIST", "gpu[02-03],login2"},
                                      {"SLURM_JOB_ID", "123456"},
                                      {"SLURM_STEP_ID", "0"}};
const Environment::Variables OPEN_MPI = {{"OMPI_COMM_WORLD_RANK", "2"},
                                         {"OMPI_COMM_WORLD_SIZE", "4"},
                                         {"OMPI_COMM_WORLD_LOCAL_RANK", "2"},
                                         {"OMPI_COMM_WORLD_LOCAL_SIZE", "4"}};
const Environment::Variables HYDRA = {
    {"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"MPI_LOCALRANKID", "1"}, {"MPI_LOCALNRANKS", "2"}};

TEST_CASE("launch: each launcher's variables give rank, world, place on the machine, and rank 0's address") {
    CHECK(launch_of({}) == "alone");
    CHECK(launch_of(TORCH) == "torchrun 3/4 local 1/2 gpu1:12345");
    CHECK(launch_of({{"RANK", "1"}, {"WORLD_SIZE", "2"}, {"LOCAL_RANK", "0"}, {"MASTER_ADDR", "::1"}}) ==
          "torchrun 1/2 local 0/1 ::1:29500");
    CHECK(launch_of(OPEN_MPI) == "mpirun 2/4 local 2/4 127.0.0.1:29500");
    CHECK(launch_of(OPEN_MPI, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "3"}, {"MASTER_ADDR", "gpu7"}}) ==
          "mpirun 2/4 local 2/3 gpu7:29500");
    CHECK(launch_of(HYDRA) == "mpiexec 1/2 local 1/2 127.0.0.1:29500");
    CHECK(launch_of({{"PMI_RANK", "1"}, {"PMI_SIZE", "2"}, {"PMI_LOCAL_RANK", "0"}, {"MASTER_ADDR", "a"}}) ==
          "the PMI launcher 1/2 local 0/1 a:29500");
    // 20000 + (123456 * 101 + 0) % 10000
    CHECK(launch_of(SLURM) == "srun 9/11 local 1/3 gpu02:29056");
    CHECK(launch_of(SLURM, {{"SLURM_PROCID", "4"}, {"SLURM_LOCALID", "0"}, {"SLURM_STEP_ID", "2"}}) ==
          "srun 4/11 local 0/4 gpu02:29058");
}

TEST_CASE("launch: MASTER_ADDR and MASTER_PORT say where rank 0 waits, whatever the launcher") {
    const Environment::Variables there = {{"MASTER_ADDR", "10.0.0.1"}, {"MASTER_PORT", "777"}};
    CHECK(launch_of(SLURM, there) == "srun 9/11 local 1/3 10.0.0.1:777");
    CHECK(launch_of(OPEN_MPI, there) == "mpirun 2/4 local 2/4 10.0.0.1:777");
    CHECK(launch_of(HYDRA, there) == "mpiexec 1/2 local 1/2 10.0.0.1:777");
    // torchrun itself waits on its port
    CHECK(launch_of(TORCH, {{"TORCHELASTIC_USE_AGENT_STORE", "True"}}) == "torchrun 3/4 local 1/2 gpu1:2345");
    CHECK(launch_of(TORCH, {{"TORCHELASTIC_USE_AGENT_STORE", "True"}, {"MASTER_PORT", "1234"}}) ==
          "torchrun 3/4 local 1/2 gpu1:11234");
    CHECK(launch_of(TORCH, {{"TORCHELASTIC_USE_AGENT_STORE", "False"}}) == launch_of(TORCH));
}

TEST_CASE("launch: the launcher that started the process counts, not one around it") {
    CHECK(launch_of(SLURM, TORCH) == launch_of(TORCH));
    // mpirun starts helpers through srun, which pass srun's variables on
    CHECK(launch_of(SLURM, OPEN_MPI) == launch_of(OPEN_MPI));
    CHECK(launch_of(SLURM, HYDRA) == launch_of(HYDRA));
    CHECK(launch_of(SLURM, {{"PMI_RANK", "9"}, {"PMI_SIZE", "11"}}) == launch_of(SLURM));  // srun --mpi=pmi2
    CHECK(launch_of({{"RANK", "0"}, {"WORLD_SIZE", "1"}, {"LOCAL_RANK", "0"}}) == "alone");
    CHECK(launch_of({{"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_SIZE", "1"}}) == "alone");
}

TEST_CASE("launch: the batch script of a Slurm job of many tasks is alone; so is a shell in a job") {
    const Environment::Variables batch = {{"SLURM_NTASKS", "16"},
                                          {"SLURM_PROCID", "0"},
                                          {"SLURM_LOCALID", "0"},
                                          {"SLURM_JOB_ID", "5"}};
    CHECK(launch_of(batch) == "alone");
    for (const char* step : {"batch", "4294967291", "4294967290", "", "-5"})
        CHECK(launch_of(batch, {{"SLURM_STEP_ID", step}, {"SLURM_STEP_NODELIST", "a"}}) == "alone");
    CHECK(launch_of(batch, {{"SLURM_STEP_ID", "0"}, {"SLURM_STEP_NODELIST", "a"}}) ==
          "srun 0/16 local 0/1 a:20505");
}

TEST_CASE("launch: ports of jobs: the same for all ranks, other ones for other jobs") {
    auto port = [](const char* name, const char* job) {
        Environment::Variables set = OPEN_MPI;
        set.push_back({name, job});
        Environment e(set);
        return find_launch().port;
    };
    for (const char* name : {"PMIX_NAMESPACE", "OMPI_MCA_orte_jobid", "OMPI_MCA_ess_base_jobid"}) {
        const int a = port(name, "3432185857"), b = port(name, "3432251393");
        CHECK(a != b);
        CHECK(a == port(name, "3432185857"));
        CHECK((a >= 20000 && a < 30000));
        CHECK((b >= 20000 && b < 30000));
    }
    std::vector<int> seen;
    for (int job = 1000; job < 1090; job++)
        for (int step = 0; step < 10; step++) {
            const std::string j = std::to_string(job), s = std::to_string(step);
            Environment::Variables set = SLURM;
            set.insert(set.end(), {{"SLURM_JOB_ID", j.c_str()}, {"SLURM_STEP_ID", s.c_str()}});
            Environment e(set);
            seen.push_back(find_launch().port);
            CHECK((seen.back() >= 20000 && seen.back() < 30000));
        }
    std::sort(seen.begin(), seen.end());
    CHECK(std::unique(seen.begin(), seen.end()) == seen.end());
}

TEST_CASE("launch: what is missing or makes no sense is an error that names the variable") {
    auto check = [](const std::string& error, const std::string& want) {
        INFO(error);
        CHECK(contains(error, want));
        CHECK(!contains(error, "\n"));
    };
    check(launch_of(TORCH, {{"RANK", "4"}}),
          "RANK is '4', wanted a whole number from 0 to 3 (WORLD_SIZE is 4)");
    for (const char* bad : {"x", "-1", "1x", "1.5", "99999999999999999999"})
        check(launch_of(TORCH, {{"RANK", bad}}), strf("RANK is '%s', wanted a whole number", bad));
    check(launch_of(TORCH, {{"RANK", ""}}), "RANK is not set (WORLD_SIZE is 4); set both");
    check(launch_of({{"RANK", "1"}}), "RANK is set, but WORLD_SIZE is not");
    check(launch_of(TORCH, {{"WORLD_SIZE", "4097"}}),
          "WORLD_SIZE is '4097', wanted a whole number from 1 to");
    check(launch_of(TORCH, {{"WORLD_SIZE", "0"}}), "WORLD_SIZE is '0', wanted");
    check(launch_of(TORCH, {{"LOCAL_RANK", "4"}}), "LOCAL_RANK is '4', wanted");
    check(launch_of(TORCH, {{"LOCAL_RANK", ""}}), "torchrun 3/4 local -1/2 ");  // not needed
    check(launch_of(TORCH, {{"LOCAL_WORLD_SIZE", "1"}}), "LOCAL_WORLD_SIZE is '1', wanted");
    check(launch_of(TORCH, {{"MASTER_ADDR", ""}}), "MASTER_ADDR=HOST");
    for (const char* bad : {"0", "65536", "http"})
        check(launch_of(TORCH, {{"MASTER_PORT", bad}}), strf("MASTER_PORT is '%s', wanted", bad));
    check(launch_of(OPEN_MPI, {{"OMPI_COMM_WORLD_LOCAL_SIZE", "3"}}),
          "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500");
    check(launch_of(OPEN_MPI, {{"OMPI_COMM_WORLD_RANK", ""}}), "OMPI_COMM_WORLD_RANK is not set");
    check(launch_of(HYDRA, {{"PMI_RANK", "2"}}), "PMI_RANK is '2', wanted");
    check(launch_of({{"PMI_RANK", "0"}, {"PMI_SIZE", "2"}}), "set: MASTER_ADDR=HOST MASTER_PORT=29500");
    check(launch_of(SLURM, {{"SLURM_PROCID", "11"}}), "SLURM_PROCID is '11', wanted");
    check(launch_of(SLURM, {{"SLURM_STEP_NODELIST", ""}}), "SLURM_STEP_NODELIST is not set");
    for (const char* bad : {"gpu[1-", "gpu[2-1]", "gpu[a-b]", "gpu[]", "gpu[1-9999999]", "gpu[1-2x]"})
        check(launch_of(SLURM, {{"SLURM_STEP_NODELIST", bad}}), strf("SLURM_STEP_NODELIST is '%s'", bad));
    for (const char* bad : {"4(x2", "x", "4(x0)", "0", "4,,3", "4(x2)3", "5000"})
        check(launch_of(SLURM, {{"SLURM_STEP_TASKS_PER_NODE", bad}}),
              strf("SLURM_STEP_TASKS_PER_NODE is '%s'", bad));
}

TEST_CASE("launch: Slurm's lists of machines and of tasks") {
    using Hosts = std::vector<std::string>;
    auto hosts = [](const char* list) { return launch::expand_hosts("LIST", list); };
    CHECK(hosts("a") == Hosts{"a"});
    CHECK(hosts("gpu[01-03,07],login2") == Hosts{"gpu01", "gpu02", "gpu03", "gpu07", "login2"});
    CHECK(hosts("n[9-11]-ib") == Hosts{"n9-ib", "n10-ib", "n11-ib"});
    CHECK(hosts("a[0-3000][0-3000]").size() <= 4097);
    CHECK(hosts("r[1-2]n[098-099],b") == Hosts{"r1n098", "r1n099", "r2n098", "r2n099", "b"});
    CHECK(launch::expand_counts("LIST", "4(x2),3") == std::vector<int>{4, 4, 3});
    CHECK(launch::expand_counts("LIST", "1") == std::vector<int>{1});
    // Each rank's machine, where it is certain
    Environment::Variables set = SLURM;
    const Hosts want = {"gpu02", "gpu02", "gpu02",  "gpu02",  "gpu03", "gpu03",
                        "gpu03", "gpu03", "login2", "login2", "login2"};
    CHECK((Environment(set), find_launch().hosts) == want);
    set.push_back({"SLURM_DISTRIBUTION", "cyclic"});
    CHECK((Environment(set), find_launch().hosts).empty());
}

// --- ranks that are processes

std::string this_host() { return tcp::hello_of(0, 1).host; }

// A port of 127.0.0.1, bound and, if asked to, free again.
struct Port {
    int fd, number;
    explicit Port(bool keep = false) {
        sockaddr_in at = {};
        at.sin_family = AF_INET, at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t bytes = sizeof at;
        fd = listen_at((sockaddr*)&at, bytes);
        REQUIRE(fd >= 0);
        getsockname(fd, (sockaddr*)&at, &bytes);
        number = ntohs(at.sin_port);
        if (!keep) free();
    }
    ~Port() { free(); }
    void free() {
        if (fd >= 0) close(fd);
        fd = -1;
    }
};
Launch rank_of(int rank, int world, int port) {
    Launch l;
    l.rank = l.local_rank = rank, l.world = l.on_host = world, l.leader = "127.0.0.1", l.port = port;
    return l;
}
tcp::Fd connect_to(int port) {
    tcp::Fd fd;
    std::string why;
    for (double end = seconds() + 5; !fd && seconds() < end; usleep(1000))
        fd = tcp::try_connect("127.0.0.1", port, end, why);
    REQUIRE(fd);
    return fd;
}

// Processes that run the functions given to add(), each with an exit code of its own. They write to the same
// files.
class Processes {
  public:
    Processes() { REQUIRE(pipe(ready_) == 0); }
    ~Processes() {
        for (pid_t pid : pids)
            if (pid) kill(pid, SIGKILL), kill(pid, SIGCONT), waitpid(pid, nullptr, 0);
        for (int fd : ready_) close(fd);
    }
    template <class F>
    void add(F body) {
        fflush(stdout), fflush(stderr);
        const pid_t pid = fork();
        if (pid) return pids.push_back(pid);
        alarm(30);  // ranks that wait for each other for ever
        for (int s : {SIGINT, SIGTERM, SIGSEGV, SIGFPE, SIGABRT, SIGILL, SIGPIPE})
            signal(s, SIG_DFL);  // not doctest's
        for (auto [name, fd] : {std::pair<const char*, int>{"out", 1}, {"err", 2}})
            dup2(open((dir_ / name).c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600), fd);
        int code = run_main("test", body);
        fflush(stdout), fflush(stderr);
        _exit(code);
    }
    // Called by a process: it is where the test wants it.
    void ready() {
        if (write(ready_[1], "", 1) != 1) _exit(9);
    }
    void wait_ready(int n) {
        for (char byte; n; n--) REQUIRE(read(ready_[0], &byte, 1) == 1);
    }
    // Waits for process i's end; returns its exit code, or 128 + the signal that ended it.
    int code(int i) {
        int status = -1;
        waitpid(pids[(size_t)i], &status, 0);
        pids[(size_t)i] = 0;
        return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    std::string said(const char* name = "err") {
        return file_exists(dir_ / name) ? read_file(dir_ / name) : "";
    }
    std::vector<pid_t> pids;

  private:
    TempDir dir_;
    int ready_[2];
};
size_t lines(const std::string& s) { return (size_t)std::count(s.begin(), s.end(), '\n'); }

// n ranks that have met run body(comm), whose result is the exit code.
struct Group : Processes {
    template <class F>
    Group(int n, int timeout_s, F body) {
        for (int r = 0; r < n; r++)
            add([=] {
                TcpComm comm(rank_of(r, n, port.number), timeout_s, "test");
                return body(*this, comm);
            });
    }
    Port port;
};
// As in a call to the GPU that never returns
int hang(Processes& p, TcpComm& comm) {
    comm.set_hint("go on with --resume");
    p.ready();
    for (;;) pause();
}

TEST_CASE("tcp: 1 to 4 ranks meet; sums, gathers and broadcasts are right on all of them") {
    auto body = [](Processes&, TcpComm& c) {
        if (c.on_host != c.world || c.local_rank != c.rank) return 3;
        for (int i = 0; i < 20; i++) {
            c.barrier();
            const std::vector<int> all = c.gather(100 * i + c.rank);
            for (int r = 0; r < c.world; r++)
                if (all[(size_t)r] != 100 * i + r) return 4;
            char text[1000] = "";
            if (c.leads()) memset(text, 'a' + i, sizeof text);
            c.broadcast(text, (size_t)i);
            for (int k = 0; k < 1000; k++)
                if (text[k] != (k < i || c.leads() ? 'a' + i : 0)) return 5;
            // Sums in the order of ranks, so that 1e16 takes and loses the same small numbers everywhere.
            const double part[] = {1e16, 1, -1e16, 1};
            std::vector<double> x = {part[c.rank], 0.1 * c.rank};
            double want = 0, tenths = 0;
            for (int r = 0; r < c.world; r++) want += part[r], tenths += 0.1 * r;
            c.all_reduce(x.data(), x.size());
            if (x[0] != want || x[1] != tenths) return 6;
        }
        c.all_gather(nullptr, nullptr, 0), c.all_reduce(nullptr, 0);
        return 0;
    };
    for (int n : {1, 2, 3, 4}) {
        Group g(n, 10, body);
        for (int r = 0; r < n; r++) CHECK(g.code(r) == 0);
        CHECK(g.said() == "");
    }
}

TEST_CASE("tcp: large data arrives whole; more than 1 GiB is an error") {
    Group g(2, 10, [](Processes&, TcpComm& c) {
        std::vector<uint32_t> x(16 << 20);  // 64 MiB
        auto fill = [&](uint32_t seed) {
            for (size_t i = 0; i < x.size(); i++) x[i] = seed + (uint32_t)i * 2654435761u;
        };
        fill(c.leads() ? 7 : 8);
        c.broadcast(x.data(), x.size() * 4);
        std::vector<uint32_t> got = x;
        fill(7);
        if (got != x) return 3;
        const size_t n = x.size() / 2;
        for (size_t i = 0; i < n; i++) x[i] = (uint32_t)(i * 2 + (size_t)c.rank);
        c.all_gather(got.data(), x.data(), n * 4);
        for (size_t i = 0; i < 2 * n; i++)
            if (got[i] != i % n * 2 + i / n) return 4;
        char byte;
        if (!contains(error_of([&] { c.broadcast(&byte, (1ull << 30) + 1); }),
                      "broadcast of 1073741825 bytes"))
            return 5;
        return contains(error_of([&] { c.all_gather(&byte, &byte, (1ull << 29) + 1); }), "at most") ? 0 : 6;
    });
    CHECK(g.code(0) == 0);
    CHECK(g.code(1) == 0);
    CHECK(g.said() == "");
}

TEST_CASE("tcp: a rank that is killed ends all others at once, with one line that names it") {
    for (int victim : {1, 3}) {
        Group g(4, 30, hang);
        g.wait_ready(4);
        const pid_t pid = g.pids[(size_t)victim];
        const double start = seconds();
        kill(pid, SIGKILL);
        for (int r = 0; r < 4; r++) CHECK(g.code(r) == (r == victim ? 128 + SIGKILL : 1));
        CHECK(seconds() - start < 2);
        CHECK(g.said() ==
              strf("test: rank 0: rank %d on %s (process %d) has died: its connection was closed; "
                   "go on with --resume\n",
                   victim, this_host().c_str(), (int)pid));
    }
}

TEST_CASE("tcp: where rank 0 is killed, each other rank says so and ends") {
    Group g(3, 30, hang);
    g.wait_ready(3);
    const double start = seconds();
    kill(g.pids[0], SIGKILL);
    for (int r : {0, 1, 2}) CHECK(g.code(r) == (r ? 1 : 128 + SIGKILL));
    CHECK(seconds() - start < 2);
    CHECK(lines(g.said()) == 2);
    for (int r : {1, 2}) CHECK(contains(g.said(), strf("test: rank %d: rank 0 on ", r)));
}

TEST_CASE("tcp: a rank that waits for a dead one ends, too, and says nothing itself") {
    Group g(3, 30, [](Processes& p, TcpComm& c) {
        p.ready();
        if (c.rank == 1) pause();
        fprintf(stderr, "%s\n", error_of([&] { c.barrier(); }).c_str());
        return 0;
    });
    g.wait_ready(3);
    usleep(50000);
    kill(g.pids[1], SIGKILL);
    CHECK(g.code(0) == 1);
    CHECK(g.code(2) == 1);
    CHECK(lines(g.said()) == 1);
}

TEST_CASE("tcp: a frozen rank ends all others after the timeout; a rank that only computes does not") {
    Group frozen(3, 2, hang), frozen_0(3, 2, hang);
    // Nothing to say for longer than the timeout, first all of them stopped as by Ctrl-Z
    Group idle(3, 1, [](Processes& p, TcpComm& c) {
        p.ready();
        const double end = seconds() + 3.2;
        while (seconds() < end) usleep(10000);
        c.barrier();
        return 0;
    });
    // The main thread never returns from writing to the standard output.
    Group stuck(2, 1, [](Processes& p, TcpComm&) {
        flockfile(stdout);
        p.ready();
        for (;;) pause();
        return 0;
    });
    // One that is stopped for a while, so that it leaves data unread, and is then killed
    Group unread(2, 3, hang);
    for (Group* g : {&frozen, &frozen_0, &idle}) g->wait_ready(3);
    for (Group* g : {&stuck, &unread}) g->wait_ready(2);
    const double start = seconds();
    kill(unread.pids[1], SIGSTOP);
    kill(frozen.pids[2], SIGSTOP), kill(frozen_0.pids[0], SIGSTOP), kill(stuck.pids[1], SIGKILL);
    for (pid_t pid : idle.pids) kill(pid, SIGSTOP);
    usleep(1500000);
    for (pid_t pid : idle.pids) kill(pid, SIGCONT);
    kill(unread.pids[1], SIGKILL);
    CHECK(unread.code(0) == 1);
    CHECK(lines(unread.said()) == 1);
    CHECK(contains(unread.said(), "its connection was closed"));
    for (int r : {0, 1}) CHECK(frozen.code(r) == 1);
    for (int r : {1, 2}) CHECK(frozen_0.code(r) == 1);
    CHECK(stuck.code(0) == 1);
    CHECK(seconds() - start < 4);
    CHECK(seconds() - start > 1.5);
    CHECK(lines(frozen.said()) == 1);
    CHECK(contains(frozen.said(), "rank 0: rank 2 on "));
    CHECK(contains(frozen.said(), "nothing was heard of it for 2 s: it is frozen, or"));
    CHECK(lines(frozen_0.said()) == 2);
    for (int r : {0, 1, 2}) CHECK(idle.code(r) == 0);
    CHECK(idle.said() == "");
    // The frozen rank goes on, and finds that all is over.
    kill(frozen.pids[2], SIGCONT);
    CHECK(frozen.code(2) == 1);
    CHECK(lines(frozen.said()) == 1);
}

TEST_CASE("tcp: a rank that cannot go on ends all others, silently, with its exit code") {
    for (int r : {0, 2}) {
        Group g(4, 30, [=](Processes& p, TcpComm& c) {
            if (c.rank != r) hang(p, c);
            p.wait_ready(3);
            fprintf(stderr, "cannot go on\n");
            c.abort(7, "");
            return 7;
        });
        const double start = seconds();
        for (int i = 0; i < 4; i++) CHECK(g.code(i) == 7);
        CHECK(seconds() - start < 2);
        CHECK(g.said() == "cannot go on\n");
    }
}

TEST_CASE("tcp: a rank that ends in order is not taken for dead") {
    for (int first : {0, 1}) {
        Group g(3, 10, [=](Processes& p, TcpComm& c) {
            if (c.rank != first) p.wait_ready(1);
            return 0;
        });
        CHECK(g.code(first) == 0);
        usleep(100000);  // the others have noticed
        g.ready(), g.ready();
        for (int r : {0, 1, 2})
            if (r != first) CHECK(g.code(r) == 0);
        CHECK(g.said() == "");
    }
    // Data that was sent before the end arrives.
    Group last(2, 10, [](Processes&, TcpComm& c) {
        std::vector<double> x(4 << 20, 1.0);
        c.all_reduce(x.data(), x.size());
        return std::count(x.begin(), x.end(), 2.0) == 4 << 20 ? 0 : 3;
    });
    for (int r : {0, 1}) CHECK(last.code(r) == 0);
    CHECK(last.said() == "");
}

TEST_CASE("tcp: waiting for a rank that has ended is an error") {
    Group g(2, 10, [](Processes&, TcpComm& c) {
        if (c.leads()) c.barrier();
        return 0;
    });
    CHECK(g.code(0) == 1);
    CHECK(g.code(1) == 0);
    CHECK(g.said() == strf("test: rank 1 on %s has ended, but rank 0 calls barrier; the ranks do not do the "
                           "same\n",
                           this_host().c_str()));
}

TEST_CASE("tcp: ranks that call different functions, or with different sizes, get an error each") {
    struct Case {
        std::function<void(TcpComm&)> leader, other;
        const char *others, *leaders;
    };
    static char bytes[64];
    const Case cases[] = {
        {[](TcpComm& c) { c.broadcast(bytes, 8); }, [](TcpComm& c) { c.barrier(); }, "barrier",
         "broadcast of 8 bytes"},
        {[](TcpComm& c) { c.barrier(); }, [](TcpComm& c) { c.broadcast(bytes, 8); }, "broadcast of 8 bytes",
         "barrier"},
        {[](TcpComm& c) { c.broadcast(bytes, 8); }, [](TcpComm& c) { c.broadcast(bytes, 4); },
         "broadcast of 4 bytes", "broadcast of 8 bytes"},
        {[](TcpComm& c) { c.all_gather(bytes, bytes, 8); },
         [](TcpComm& c) { c.all_reduce((double*)bytes, 1); }, "all_reduce of 8 bytes",
         "all_gather of 8 bytes"},
    };
    for (const Case& k : cases) {
        Group g(3, 10, [&](Processes& p, TcpComm& c) {
            const std::string e = error_of([&] { c.rank == 2 ? k.other(c) : k.leader(c); });
            printf("%s\n", e.c_str()), fflush(stdout);
            if (c.rank == 1) return 3;  // it is ended by rank 0
            if (c.rank == 2) p.ready(), pause();
            p.wait_ready(1);
            c.abort(1, "");
            return 1;
        });
        for (int r : {0, 1, 2}) CHECK(g.code(r) == 1);
        const std::string want =
            strf("rank 2 on %s calls %s, rank 0 %s (call 1); the ranks do not do the same\n",
                 this_host().c_str(), k.others, k.leaders);
        CHECK(g.said("out") == want + want);
    }
}

TEST_CASE("tcp: ranks that do not come are named by rank 0; those that came end silently") {
    Port port;
    Processes p;
    auto join = [&](int r, int world) {
        p.add([=, &port] {
            Launch l = rank_of(r, world, port.number);
            if (world == 5) l.hosts = {"gpu1", "gpu1", "gpu2", "gpu2", "gpu3"};
            TcpComm comm(l, 1, "test");
            return 0;
        });
    };
    const std::string host = this_host();
    const double start = seconds();
    join(0, 4), join(1, 4);
    CHECK(p.code(0) == 1);
    CHECK(p.code(1) == 1);
    CHECK(seconds() - start < 4);
    CHECK(p.said() ==
          strf("test: ranks 2 and 3 of 4 did not come within 1 s; rank 0 waits on %s port %d; came: "
               "rank 1 from %s\n",
               host.c_str(), port.number, host.c_str()));
    join(0, 5), join(3, 5), join(1, 5);
    for (int i : {2, 3, 4}) CHECK(p.code(i) == 1);
    CHECK(contains(p.said(),
                   strf("test: ranks 2 (gpu2) and 4 (gpu3) of 5 did not come within 1 s; rank 0 waits on "
                        "%s port %d; came: ranks 1 from %s and 3 from %s\n",
                        host.c_str(), port.number, host.c_str(), host.c_str())));
    CHECK(lines(p.said()) == 2);
}

TEST_CASE("tcp: a rank that finds no rank 0 says where it looked and why it failed") {
    const Port port;
    const std::string e = error_of([&] { TcpComm comm(rank_of(1, 2, port.number), 1, "test"); });
    CHECK(e ==
          strf("rank 1 on %s: rank 0 at 127.0.0.1 port %d does not answer within 1 s: Connection refused",
               this_host().c_str(), port.number));
    Launch l = rank_of(1, 2, port.number);
    l.leader = "no.such.host.invalid";
    CHECK(contains(error_of([&] { TcpComm comm(l, 1, "test"); }), "no.such.host.invalid: "));
}

TEST_CASE("tcp: rank 0 is found by name, by IPv6 address, and at any address of its machine") {
    std::string why;
    // Linux connects 0.0.0.0 to this machine; rank 0 does not take it for an address of this machine only.
    for (const char* leader : {"localhost", "::1", "0.0.0.0"}) {
        Port port;
        const auto list = tcp::resolve(leader, port.number, why);
        if (!strcmp(leader, "::1")) {  // not every machine has IPv6
            tcp::Fd fd(list ? listen_at(list->ai_addr, list->ai_addrlen) : -1);
            if (!fd) continue;
        }
        Processes p;
        for (int r : {0, 1})
            p.add([&] {
                Launch l = rank_of(r, 2, port.number);
                l.leader = leader;
                TcpComm comm(l, 5, "test");
                comm.barrier();
                return 0;
            });
        for (int i : {0, 1}) CHECK(p.code(i) == 0);
        CHECK(p.said() == "");
    }
}

TEST_CASE("tcp: a connection of a port with itself is not rank 0's") {
    Port port;
    sockaddr_in at = {};
    at.sin_family = AF_INET, at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    at.sin_port = htons((uint16_t)port.number);
    tcp::Fd fd(socket(AF_INET, SOCK_STREAM, 0));
    REQUIRE(bind(fd.get(), (sockaddr*)&at, sizeof at) == 0);
    REQUIRE(connect(fd.get(), (sockaddr*)&at, sizeof at) == 0);
    CHECK(tcp::talks_to_itself(fd.get()));
    Port other(true);
    CHECK(!tcp::talks_to_itself(connect_to(other.number).get()));
}

TEST_CASE("tcp: rank 0's port in use is an error that names it and MASTER_PORT") {
    Port taken(true);
    const std::string e = error_of([&] { TcpComm comm(rank_of(0, 2, taken.number), 1, "test"); });
    CHECK(contains(e, strf("port %d on %s is in use", taken.number, this_host().c_str())));
    CHECK(contains(e, "set MASTER_PORT"));
}

TEST_CASE("tcp: where another program waits at rank 0's port, ranks say so") {
    Port port(true);
    Processes p;
    p.add([&] {
        TcpComm comm(rank_of(1, 2, port.number), 10, "test");
        return 0;
    });
    REQUIRE(tcp::wait_for(port.fd, POLLIN, seconds() + 5));
    tcp::Fd fd(accept(port.fd, nullptr, nullptr));
    REQUIRE(write(fd.get(), "SSH-2.0-OpenSSH_9.2\r\n", 21) == 21);
    CHECK(p.code(0) == 1);
    CHECK(contains(p.said(), "what answers there is another program"));
}

TEST_CASE("tcp: strangers that connect are dropped, and the ranks still meet") {
    Port port;
    Processes p;
    auto join = [&](int r) {
        p.add([=, &port] {
            TcpComm comm(rank_of(r, 3, port.number), 10, "test");
            comm.barrier();
            return 0;
        });
    };
    join(0);
    tcp::Fd silent = connect_to(port.number), browser = connect_to(port.number),
            gone = connect_to(port.number);
    gone.reset();
    const std::string request = "GET / HTTP/1.1\r\n\r\n";
    REQUIRE(tcp::write_all(browser.get(), request.data(), request.size(), seconds() + 1));
    char byte;
    CHECK(!tcp::read_all(browser.get(), &byte, 1, seconds() + 5));
    CHECK(errno != ETIMEDOUT);
    join(1);
    // Half of what a rank says, and a rank of another version
    const tcp::Hello hello = tcp::hello_of(2, 3);
    REQUIRE(tcp::write_all(silent.get(), &hello, sizeof hello / 2, seconds() + 1));
    tcp::Hello other = hello;
    other.version++;
    tcp::Fd newer = connect_to(port.number);
    REQUIRE(tcp::write_all(newer.get(), &other, sizeof other, seconds() + 1));
    tcp::Header answer;
    REQUIRE(tcp::read_all(newer.get(), &answer, sizeof answer, seconds() + 5));
    CHECK(answer.type == tcp::REFUSED);
    join(2);
    for (int i : {0, 1, 2}) CHECK(p.code(i) == 0);
    CHECK(p.said() == "");
}

TEST_CASE("tcp: rank 0 refuses ranks of another world, and a rank that has come already") {
    Port port;
    Processes p;
    auto join = [&](int r, int world) {
        p.add([=, &port] {
            TcpComm comm(rank_of(r, world, port.number), 10, "test");
            comm.barrier();
            return 0;
        });
    };
    const std::string host = this_host();
    auto refuses_rank_1_of = [&](int world, const std::string& why) {
        const size_t before = p.said().size();  // before the rank starts: it may be refused at once
        join(1, world);
        const pid_t pid = p.pids.back();
        CHECK(p.code((int)p.pids.size() - 1) == 1);
        CHECK(p.said().substr(before) == strf("test: rank 0 on %s refuses rank 1 on %s (process %d): %s\n",
                                              host.c_str(), host.c_str(), (int)pid, why.c_str()));
    };
    join(0, 3);
    refuses_rank_1_of(4, "it is one of 4 ranks, rank 0 is one of 3");
    // A rank 1 that has come, and waits
    tcp::Fd first = connect_to(port.number);
    const tcp::Hello hello = tcp::hello_of(1, 3);
    REQUIRE(tcp::write_all(first.get(), &hello, sizeof hello, seconds() + 1));
    refuses_rank_1_of(3, strf("rank 1 on %s (process %d) has come before it", host.c_str(), (int)getpid()));
    // It ends before rank 2 has come: rank 0 does not wait any longer.
    first.reset();
    CHECK(p.code(0) == 1);
    CHECK(contains(p.said(), strf("test: rank 1 on %s (process %d) has ended before all ranks had come\n",
                                  host.c_str(), (int)getpid())));
}

// --- fork_ranks()

TEST_CASE("launch: fork_ranks() makes ranks that meet; rank 0's exit code tells of all") {
    auto run = [](int n, auto body) {
        Processes p;
        p.add([&] {
            printf("printed before, ");
            const Launch l = fork_ranks(n);
            int code;
            {
                TcpComm comm(l, 10, "test");
                if (comm.gather(l.rank).back() != n - 1 || comm.on_host != n) return 9;
                code = body(l.rank);
            }
            return end_children(code);
        });
        const int code = p.code(0);
        CHECK(p.said() == "");
        CHECK(p.said("out") == "printed before, ");
        return code;
    };
    CHECK(run(1, [](int) { return 0; }) == 0);
    CHECK(run(3, [](int) { return 0; }) == 0);
    CHECK(run(3, [](int r) { return r == 2 ? 5 : 0; }) == 5);
    CHECK(run(3, [](int r) { return r ? 0 : 6; }) == 6);
}

TEST_CASE("launch: a rank of fork_ranks() that dies before it comes is not waited for") {
    Processes p;
    p.add([] {
        const Launch l = fork_ranks(3);
        if (l.rank == 2) raise(SIGKILL);
        int code = run_main("test", [&] {
            TcpComm comm(l, 30, "test");
            return 0;
        });
        return l.rank ? code : end_children(code);
    });
    const double start = seconds();
    CHECK(p.code(0) == 1);
    CHECK(seconds() - start < 4);
    CHECK(lines(p.said()) == 1);
    CHECK(contains(p.said(), "test: rank 2 (process "));
    CHECK(contains(p.said(), " has ended before all ranks had come\n"));
}

TEST_CASE("launch: ranks of fork_ranks() end with rank 0, however it ends") {
    for (int how : {SIGKILL, SIGTERM, 0}) {
        int alive[2];  // closed on the writing side when all have ended
        REQUIRE(pipe(alive) == 0);
        Processes p;
        p.add([&] {
            close(alive[0]);
            const Launch l = fork_ranks(3);
            if (l.rank) signal(SIGTERM, SIG_IGN);
            alarm(30);
            p.ready();
            while (how || l.rank) pause();
            return end_children(6);  // a rank that has failed does not wait long
        });
        close(alive[1]);
        p.wait_ready(3);
        const double start = seconds();
        if (how) kill(p.pids[0], how);
        CHECK(p.code(0) == (how ? 128 + how : 6));
        char byte;
        CHECK(tcp::wait_for(alive[0], POLLIN, seconds() + 2));
        CHECK(read(alive[0], &byte, 1) == 0);
        CHECK(seconds() - start < 4);
        CHECK(p.said() == "");
        close(alive[0]);
    }
}

}  // namespace
