// launch.h - how this process was started as one of several ranks: by a launcher (torchrun, mpirun, srun),
// which says so in the environment, or by fork_ranks(), which starts copies of this process on this machine.
#pragma once

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#include <algorithm>
#include <string>
#include <vector>

#include "lib/io.h"

struct Launch {
    int rank = 0, world = 1;
    int local_rank = -1, on_host = 1;  // among the ranks of this machine; -1: the launcher does not tell
    std::string leader;                // rank 0's host name or address
    int port = 0;                      // where rank 0 waits for the others
    std::string by;                    // the launcher, for messages
    std::vector<std::string> hosts;    // each rank's machine, where the launcher tells it; else empty
    int listener = -1;                 // rank 0: a socket that waits on `port` already, or -1
};

namespace launch {

constexpr int MOST_RANKS = 4096, USUAL_PORT = 29500, FIRST_PORT = 20000, PORTS = 10000;

// An environment variable; null where it is not set or empty.
inline const char* variable(const char* name) {
    const char* value = name ? getenv(name) : nullptr;
    return value && *value ? value : nullptr;
}
// A variable that must be a whole number; `why` says what else was read, and so why it must be there.
inline int number(const char* name, int lo, int hi, const std::string& why) {
    const char* value = variable(name);
    if (!value) fail("%s is not set (%s); set both or neither", name, why.c_str());
    char* end;
    errno = 0;
    const long n = strtol(value, &end, 10);
    if (*end || errno || n < lo || n > hi)
        fail("%s is '%s', wanted a whole number from %d to %d (%s)", name, value, lo, hi, why.c_str());
    return (int)n;
}

[[noreturn]] inline void cannot_read(const char* name, const std::string& list, const char* like) {
    fail("%s is '%s', wanted a list such as %s", name, list.c_str(), like);
}

// Splits a list at the commas outside of brackets.
inline std::vector<std::string> split_list(const std::string& list) {
    std::vector<std::string> parts(1);
    int depth = 0;
    for (char c : list) {
        depth += (c == '[') - (c == ']');
        if (c == ',' && !depth) parts.emplace_back();
        else parts.back() += c;
    }
    return parts;
}
// Slurm's "4(x2),3" -> 4, 4, 3: the tasks of each node.
inline std::vector<int> expand_counts(const char* name, const std::string& list) {
    std::vector<int> counts;
    for (const std::string& part : split_list(list)) {
        int tasks = 0, nodes = 1, end = 0;
        const char* text = part.c_str();
        if (sscanf(text, "%d%n(x%d)%n", &tasks, &end, &nodes, &end) < 1 || text[end] || tasks < 1 ||
            tasks > MOST_RANKS || nodes < 1 || nodes > MOST_RANKS)
            cannot_read(name, list, "4(x2),3");
        counts.insert(counts.end(), (size_t)nodes, tasks);
    }
    return counts;
}
// The numbers of "01-04,07" with their leading zeros; none where it cannot be read.
inline std::vector<std::string> expand_ranges(const std::string& ranges) {
    std::vector<std::string> numbers;
    for (const std::string& part : split_list(ranges)) {
        int first = 0, last = 0, digits = 0, end = 0;
        const int got = sscanf(part.c_str(), "%d%n-%d%n", &first, &digits, &last, &end);
        if (got == 1) last = first, end = digits;
        if (got < 1 || (size_t)end != part.size() || first < 0 || last < first || last - first > MOST_RANKS ||
            digits > 9)
            return {};
        for (int i = first; i <= last; i++) numbers.push_back(strf("%0*d", digits, i));
    }
    return numbers;
}
// Slurm's "gpu[01-02,07],login" -> gpu01, gpu02, gpu07, login.
inline std::vector<std::string> expand_hosts(const char* name, const std::string& list) {
    std::vector<std::string> hosts;
    for (const std::string& part : split_list(list)) {
        const size_t open = part.find('['), close = part.find(']', open);
        if (open == std::string::npos) {
            hosts.push_back(part);
            continue;
        }
        std::vector<std::string> numbers;
        if (close != std::string::npos) numbers = expand_ranges(part.substr(open + 1, close - open - 1));
        if (numbers.empty()) cannot_read(name, list, "gpu[01-04,07],login");
        for (const std::string& n : numbers)  // what follows may have brackets, too
            for (const std::string& rest : expand_hosts(name, part.substr(close + 1))) {
                if (hosts.size() > MOST_RANKS) return hosts;
                hosts.push_back(part.substr(0, open) + n + rest);
            }
    }
    return hosts;
}

// What a launcher calls its variables. The number of ranks on this machine need not be known.
struct Names {
    const char *by, *rank, *world, *local_rank, *on_host, *how_to_set;
};
// The order matters: mpirun may start its processes through srun, whose variables then tell of mpirun's
// helpers, not of the ranks.
// clang-format off
constexpr Names TORCHRUN = {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
                            "MASTER_ADDR=HOST MASTER_PORT=29500 for all ranks"};
constexpr Names OPEN_MPI = {"mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                            "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
                            "mpirun -x MASTER_ADDR=HOST -x MASTER_PORT=29500"};
constexpr Names HYDRA = {"mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS",
                         "mpiexec -genv MASTER_ADDR HOST -genv MASTER_PORT 29500"};
constexpr Names OTHER_PMI = {"the PMI launcher", "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE",
                             "MASTER_ADDR=HOST MASTER_PORT=29500 for all ranks"};
// clang-format on

// Reads a launcher's variables; world is 1 where it did not start this process as one of several.
inline Launch read(const Names& names) {
    Launch l;
    if (!variable(names.world)) {
        if (&names == &TORCHRUN && variable(names.rank))
            fail("%s is set, but %s is not; wanted both or neither", names.rank, names.world);
        return l;
    }
    l.by = names.by;
    l.world = number(names.world, 1, MOST_RANKS, names.by);
    const std::string why = strf("%s is %d", names.world, l.world);
    l.rank = number(names.rank, 0, l.world - 1, why);
    if (l.world == 1) return {};
    if (variable(names.local_rank)) l.local_rank = number(names.local_rank, 0, l.world - 1, why);
    if (variable(names.on_host))
        l.on_host = number(names.on_host, std::max(l.local_rank, 0) + 1, l.world, why);
    return l;
}

// A port for a job: the same for all ranks, and most likely another one than that of other jobs.
inline int port_of_job(uint64_t job) { return FIRST_PORT + (int)(job % PORTS); }

// The batch script of a job is not a step, and has only the variables of the job, whatever its size. Slurm
// numbers batch scripts and interactive shells from 2^32 - 16 on.
inline bool in_srun_step() {
    const char* step = variable("SLURM_STEP_ID");
    char* end = nullptr;
    const unsigned long long id = step ? strtoull(step, &end, 10) : 0;
    return step && *step != '-' && !*end && id < (1ull << 32) - 16;
}
inline Launch read_srun() {
    if (!in_srun_step()) return {};
    const char* size = variable("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS";
    Launch l = read({"srun", "SLURM_PROCID", size, "SLURM_LOCALID", nullptr, nullptr});
    if (l.world == 1) return {};
    const char* list = variable("SLURM_STEP_NODELIST");
    if (!list)
        fail("SLURM_STEP_NODELIST is not set, but %s is %d; start the program with srun", size, l.world);
    const std::vector<std::string> nodes = expand_hosts("SLURM_STEP_NODELIST", list);
    l.leader = nodes[0];
    const uint64_t job = strtoull(variable("SLURM_JOB_ID") ? variable("SLURM_JOB_ID") : "0", nullptr, 10);
    l.port = port_of_job(job * 101 + strtoull(variable("SLURM_STEP_ID"), nullptr, 10));
    const char* tasks = variable("SLURM_STEP_TASKS_PER_NODE");
    if (!tasks) return l;
    const std::vector<int> counts = expand_counts("SLURM_STEP_TASKS_PER_NODE", tasks);
    const char* order = variable("SLURM_DISTRIBUTION");
    if (order && strncmp(order, "block", 5)) return l;  // which rank runs where is then not known here
    for (size_t i = 0; i < counts.size() && i < nodes.size(); i++)
        l.hosts.insert(l.hosts.end(), (size_t)counts[i], nodes[i]);
    if (l.hosts.size() != (size_t)l.world) l.hosts.clear();
    else l.on_host = (int)std::count(l.hosts.begin(), l.hosts.end(), l.hosts[(size_t)l.rank]);
    return l;
}

// Where rank 0 waits, if the launcher has not told: on one machine at its own address, at a port that is
// derived from the job's name.
inline void find_leader(Launch& l, const Names& names) {
    if (l.on_host == l.world) l.leader = "127.0.0.1";
    else if (!variable("MASTER_ADDR"))
        fail("%s started ranks on several machines and does not tell where rank 0 is; set: %s", names.by,
             names.how_to_set);
    l.port = USUAL_PORT;
    for (const char* name : {"PMIX_NAMESPACE", "OMPI_MCA_orte_jobid", "OMPI_MCA_ess_base_jobid", "PMI_JOBID"})
        if (const char* job = variable(name)) {
            l.port = port_of_job(checksum_of(job, strlen(job)));
            break;
        }
}

}  // namespace launch

// How this process was started, from the environment; world is 1 where it is alone. MASTER_ADDR and
// MASTER_PORT say where rank 0 waits, whatever the launcher says. Throws Error that names the variable where
// variables are missing or make no sense.
inline Launch find_launch() {
    using namespace launch;
    Launch l;
    const Names* names = nullptr;  // null: srun, which also tells where rank 0 is
    auto look_for = [&](const Names& n) {
        if (l.world == 1) l = read(n), names = &n;
    };
    look_for(TORCHRUN), look_for(OPEN_MPI);
    if (variable(HYDRA.local_rank)) look_for(HYDRA);
    if (l.world == 1) l = read_srun(), names = nullptr;
    if (!in_srun_step()) look_for(OTHER_PMI);
    if (l.world == 1) return l;
    if (names) find_leader(l, *names);
    if (const char* address = variable("MASTER_ADDR")) l.leader = address;
    if (variable("MASTER_PORT")) {
        l.port = number("MASTER_PORT", 1, 65535, strf("started by %s", l.by.c_str()));
        // torchrun waits on this port itself, for programs that use PyTorch
        const char* taken = variable("TORCHELASTIC_USE_AGENT_STORE");
        if (l.by == TORCHRUN.by && taken && !strcmp(taken, "True")) l.port += l.port > 11024 ? -10000 : 10000;
    }
    return l;
}

// A socket that waits for connections to `address`, whose port 0 stands for any free one; -1: see errno.
inline int listen_at(const sockaddr* address, socklen_t bytes) {
    const int fd = socket(address->sa_family, SOCK_STREAM, 0), on = 1, off = 0;
    if (fd < 0) return -1;
    fcntl(fd, F_SETFD, FD_CLOEXEC), fcntl(fd, F_SETFL, O_NONBLOCK);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    // one socket for IPv4, too
    if (address->sa_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (!bind(fd, address, bytes) && !listen(fd, SOMAXCONN)) return fd;
    const int error = errno;
    close(fd);
    errno = error;
    return -1;
}

namespace launch {

inline std::vector<pid_t> children;  // of fork_ranks(): those of ranks 1, 2, ...

// Waits up to `seconds` for the child; returns its exit code, 128 + the signal that ended it, or -1.
inline int wait_for(pid_t pid, double seconds) {
    for (;; seconds -= 0.01) {
        int status;
        const pid_t got = waitpid(pid, &status, WNOHANG);
        if (got == pid) return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (got < 0 && errno != EINTR) return 0;  // somebody else has waited for it
        if (seconds <= 0) return -1;
        usleep(10000);
    }
}

}  // namespace launch

// Rank 0 of fork_ranks() calls this last, with its own exit code: waits until the other ranks have ended, and
// returns the exit code of all: its own, or the first other one that is not 0 (128 + the signal that ended a
// rank). A rank that does not end in time, which is short where this one has failed, is killed.
inline int end_children(int code) {
    const bool failed = code;
    double patience = failed ? 2 : 60;
    for (size_t i = 0; i < launch::children.size(); i++) {
        int other = launch::wait_for(launch::children[i], patience);
        if (other < 0) {
            if (!failed)
                fprintf(stderr, "rank %zu (process %d) did not end within %g s; it was killed\n", i + 1,
                        (int)launch::children[i], patience);
            kill(launch::children[i], SIGKILL);
            other = launch::wait_for(launch::children[i], 60);
            patience = 0.1;  // the others had as much time
        }
        if (!code) code = other;
    }
    launch::children.clear();
    return code;
}

// Makes n ranks of this process: itself, rank 0, and n - 1 children, which end with it, however it ends. Each
// returns from here with its own rank. To be called by the main thread before other threads and before CUDA
// is used. Rank 0 ends with: return end_children(code);
inline Launch fork_ranks(int n) {
    if (n < 1 || n > launch::MOST_RANKS) fail("%d ranks, wanted 1 to %d", n, launch::MOST_RANKS);
    Launch l;
    if (n == 1) return l;
    sockaddr_in at = {};
    at.sin_family = AF_INET, at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t bytes = sizeof at;
    l.listener = listen_at((sockaddr*)&at, bytes);
    if (l.listener < 0 || getsockname(l.listener, (sockaddr*)&at, &bytes))
        fail("127.0.0.1: cannot wait on a port for the other ranks: %s", strerror(errno));
    l.local_rank = 0, l.world = l.on_host = n, l.leader = "127.0.0.1", l.port = ntohs(at.sin_port),
    l.by = "fork";
    fflush(nullptr);  // else each child would print again what is not yet printed
    const pid_t parent = getpid();
    for (int r = 1; r < n; r++) {
        const pid_t pid = fork();
        if (pid < 0) {
            const int error = errno;
            for (pid_t child : launch::children) kill(child, SIGKILL);
            close(l.listener), end_children(1);
            fail("cannot start rank %d of %d: %s", r, n, strerror(error));
        }
        if (pid) {
            launch::children.push_back(pid);
            continue;
        }
#ifdef __linux__
        prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
        if (getppid() != parent) _exit(1);  // it has ended already
        close(l.listener), launch::children.clear();
        l.listener = -1, l.rank = l.local_rank = r;
        return l;
    }
    return l;
}
