// comm_tcp.h - the control connection between the ranks of the GPU trainer: small data (the id with which
// NCCL connects them, flags to compare, signals to stop), and the notice that a rank has died. The model's
// numbers do not go this way.
//
// Every rank r > 0 has one TCP connection, to rank 0. A thread of each process, the watcher, alone reads and
// writes these connections, so a death is noticed while the main thread computes, or waits for the GPU:
// - A rank that is killed closes its connection, which is noticed at once.
// - Of a rank that is frozen, or whose network is cut, nothing is heard for timeout_s seconds; each rank that
//   lives says so every second (or timeout_s / 6).
// Then rank 0 prints one line that names the dead rank, tells the others, and all processes end with code 1.
// Only where rank 0 itself has died does each other rank print a line.
// Nothing is encrypted, and whoever can connect to rank 0's port can pass for a rank: for trusted networks.
#pragma once

#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sys/uio.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

#include "lib/comm.h"
#include "lib/launch.h"
#include "lib/machine.h"

#ifndef MSG_NOSIGNAL  // macOS; the trainer ignores SIGPIPE
#define MSG_NOSIGNAL 0
#endif

namespace tcp {

using Bytes = std::vector<char>;
constexpr size_t MOST_BYTES = 1 << 30;  // of one collective function

inline double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// An owned file descriptor.
class Fd {
  public:
    Fd() = default;
    explicit Fd(int fd) : fd_(fd) {}
    Fd(Fd&& other) noexcept { std::swap(fd_, other.fd_); }
    Fd& operator=(Fd&& other) noexcept { return std::swap(fd_, other.fd_), *this; }
    ~Fd() { reset(); }
    explicit operator bool() const { return fd_ >= 0; }
    operator int() const = delete;
    int get() const { return fd_; }
    void reset() {
        if (fd_ >= 0) close(fd_);
        fd_ = -1;
    }

  private:
    int fd_ = -1;
};

inline void make_ready(int fd) {
    const int on = 1;
    fcntl(fd, F_SETFD, FD_CLOEXEC), fcntl(fd, F_SETFL, O_NONBLOCK);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

// What a rank says first.
constexpr uint64_t MAGIC = 0x7465'6f70'6172'61ff;  // no text begins like this
constexpr uint32_t VERSION = 1;
struct Hello {
    uint64_t magic = MAGIC;
    uint32_t version = VERSION;
    int32_t world = 0, rank = 0, pid = 0;
    char host[72] = "";
};
inline Hello hello_of(int rank, int world) {
    Hello h;
    h.world = world, h.rank = rank, h.pid = (int32_t)getpid();
    gethostname(h.host, sizeof h.host - 1);
    return h;
}

// All that is said later: a header, then `bytes` bytes.
enum Type : uint16_t {
    WELCOME,  // rank 0: all ranks have come; the Hello of each
    REFUSED,  // rank 0: this one is not wanted; the reason
    DATA,     // one side of a collective function
    MISUSED,  // rank 0: the ranks call different functions; the message
    BEAT,     // nothing new
    GOODBYE,  // this rank ends, having done its work
    END,      // all ranks are to end, silently, with exit code `size`
};
enum Kind : uint16_t { BARRIER, BROADCAST, ALL_GATHER, ALL_REDUCE };
struct Header {
    uint64_t magic = MAGIC;
    uint16_t type = BEAT, kind = BARRIER;
    uint32_t call = 0;  // the how-many-th collective function
    uint64_t size = 0;  // the argument of the collective function, in bytes
    uint64_t bytes = 0;
};
struct Frame {
    Header header;
    Bytes data;
};
// A frame to be sent, of which `sent` bytes are gone already. Several ranks may be sent the same data.
struct Outgoing {
    Header header;
    std::shared_ptr<const Bytes> data;
    size_t sent = 0;
};

inline std::string describe(uint16_t kind, uint64_t size) {
    const char* names[] = {"barrier", "broadcast", "all_gather", "all_reduce"};
    if (kind > ALL_REDUCE) return "an unknown function";
    return kind == BARRIER ? names[kind] : strf("%s of %llu bytes", names[kind], (unsigned long long)size);
}

// Waits until `events` may happen at fd; false at the deadline.
inline bool wait_for(int fd, short events, double deadline) {
    for (;;) {
        const double left = deadline - seconds();
        if (left <= 0) return false;
        pollfd p = {fd, events, 0};
        const int n = poll(&p, 1, (int)(left * 1000) + 1);
        if (n > 0) return true;
        if (n < 0 && errno != EINTR) return false;
    }
}
// Reads exactly n bytes until the deadline; false, with errno (0: the connection was closed), if it cannot.
inline bool read_all(int fd, void* to, size_t n, double deadline) {
    for (char* at = (char*)to; n;) {
        const ssize_t got = recv(fd, at, n, 0);
        if (got == 0) return errno = 0, false;
        if (got > 0) at += got, n -= (size_t)got;
        else if (errno != EAGAIN && errno != EINTR) return false;
        else if (!wait_for(fd, POLLIN, deadline)) return errno = ETIMEDOUT, false;
    }
    return true;
}
inline bool write_all(int fd, const void* from, size_t n, double deadline) {
    for (const char* at = (const char*)from; n;) {
        const ssize_t put = send(fd, at, n, MSG_NOSIGNAL);
        if (put >= 0) at += put, n -= (size_t)put;
        else if (errno != EAGAIN && errno != EINTR) return false;
        else if (!wait_for(fd, POLLOUT, deadline)) return errno = ETIMEDOUT, false;
    }
    return true;
}
inline bool write_frame(int fd, Type type, uint64_t size, const void* data, size_t bytes, double deadline) {
    Header h;
    h.type = type, h.size = size, h.bytes = bytes;
    return write_all(fd, &h, sizeof h, deadline) && write_all(fd, data, bytes, deadline);
}

// The addresses of a host; `host` null: to wait at any address of this one. `why` is set where there are
// none.
inline std::shared_ptr<addrinfo> resolve(const char* host, int port, std::string& why) {
    addrinfo want = {}, *list = nullptr;
    want.ai_socktype = SOCK_STREAM, want.ai_flags = host ? 0 : AI_PASSIVE;
    const int error = getaddrinfo(host, std::to_string(port).c_str(), &want, &list);
    if (error) why = host ? strf("%s: %s", host, gai_strerror(error)) : gai_strerror(error);
    return {list, [](addrinfo* a) {
                if (a) freeaddrinfo(a);
            }};
}
// A client that connects to a free port of its own machine may be given this same port, and so be connected
// with itself.
inline bool talks_to_itself(int fd) {
    sockaddr_storage a = {}, b = {};
    socklen_t na = sizeof a, nb = sizeof b;
    return !getsockname(fd, (sockaddr*)&a, &na) && !getpeername(fd, (sockaddr*)&b, &nb) && na == nb &&
           !memcmp(&a, &b, na);
}
// One try to connect; where it fails, `why` says the reason.
inline Fd try_connect(const std::string& host, int port, double deadline, std::string& why) {
    const auto list = resolve(host.c_str(), port, why);
    for (addrinfo* a = list.get(); a; a = a->ai_next) {
        Fd fd(socket(a->ai_family, a->ai_socktype, a->ai_protocol));
        if (!fd) {
            why = strerror(errno);
            continue;
        }
        make_ready(fd.get());
        int error = connect(fd.get(), a->ai_addr, a->ai_addrlen) ? errno : 0;
        if (error == EINPROGRESS) {
            socklen_t n = sizeof error;
            if (!wait_for(fd.get(), POLLOUT, seconds() + std::min(std::max(1.0, deadline - seconds()), 10.0)))
                error = ETIMEDOUT;
            else getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &n);
        }
        if (!error && talks_to_itself(fd.get())) error = ECONNREFUSED;
        if (!error) return fd;
        why = strerror(error);
    }
    return {};
}

// The connection to another rank.
struct Peer {
    Fd fd;  // none: the rank has ended
    int rank = 0, pid = 0;
    std::string host;
    double heard = 0;  // when bytes came last
    // What comes: the frame that is being read, and those that the main thread is to take
    Frame frame;
    size_t got = 0;
    std::deque<Frame> in;
    // What is to be sent
    std::deque<Outgoing> out;
    bool deaf = false;  // nothing can be sent to it
    std::string name() const { return strf("rank %d on %s", rank, host.c_str()); }
};

// How rank 0 waits for the others.
class Meeting {
  public:
    Meeting(const Launch& l, int timeout_s) : launch_(l), timeout_s_(timeout_s), listener_(open_port(l)) {
        hello_ = hello_of(0, l.world);
        machine::allow_open_files((size_t)l.world + 256);
        peers_.resize((size_t)l.world - 1);
    }
    // The connections to ranks 1, 2, ...; and each rank's Hello. Throws Error where not all come, having
    // ended those that came.
    std::vector<Peer> wait(std::vector<Hello>& hellos) {
        const double deadline = seconds() + timeout_s_;
        while (missing()) {
            std::string ended = look(deadline);
            if (ended.empty() && seconds() > deadline) ended = say_missing();
            if (ended.empty()) continue;
            accept_guests();
            for (const Peer& p : peers_) say_end(p.fd);
            for (const Guest& g : guests_) say_end(g.fd);
            throw Error(ended);
        }
        hellos = {hello_};
        for (const Peer& p : peers_) {
            hellos.push_back(hello_of(p.rank, launch_.world));
            hellos.back().pid = p.pid;
            snprintf(hellos.back().host, sizeof hello_.host, "%s", p.host.c_str());
        }
        return std::move(peers_);
    }

  private:
    // One that has connected and not yet said who it is.
    struct Guest {
        Fd fd;
        Hello hello;
        size_t got = 0;
    };

    static Fd open_port(const Launch& l) {
        if (l.listener >= 0) return Fd(l.listener);
        // Where all ranks are on this machine, no other one can connect.
        const bool alone =
            l.leader == "localhost" || l.leader == "::1" || l.leader.compare(0, 4, "127.") == 0;
        std::string why;
        const auto list = resolve(alone ? l.leader.c_str() : nullptr, l.port, why);
        for (int family : {AF_INET6, AF_INET})  // a socket of IPv6 serves IPv4, too
            for (addrinfo* a = list.get(); a; a = a->ai_next) {
                if (a->ai_family != family) continue;
                Fd fd(listen_at(a->ai_addr, a->ai_addrlen));
                if (fd) return fd;
                if (errno == EADDRINUSE)
                    fail(
                        "port %d on %s is in use: another program, or another run, waits there; set "
                        "MASTER_PORT to a free one",
                        l.port, hello_of(0, 1).host);
                why = strerror(errno);
            }
        fail("port %d on %s: rank 0 cannot wait there: %s; set MASTER_PORT to another one", l.port,
             hello_of(0, 1).host, why.c_str());
    }
    bool missing() const {
        for (const Peer& p : peers_)
            if (!p.fd) return true;
        return false;
    }

    // Waits a while for one to connect, to speak, or to end. Returns why rank 0 need not wait any more, or
    // "".
    std::string look(double deadline) {
        std::vector<pollfd> fds = {{listener_.get(), POLLIN, 0}};
        for (const Guest& g : guests_) fds.push_back({g.fd.get(), POLLIN, 0});
        for (const Peer& p : peers_) fds.push_back({p.fd ? p.fd.get() : -1, POLLIN, 0});
        const int ms = (int)(std::max(0.0, std::min(0.1, deadline - seconds())) * 1000) + 1;
        if (poll(fds.data(), fds.size(), ms) < 0) return "";
        size_t i = 1;
        for (Guest& g : guests_)
            if (fds[i++].revents) hear(g);
        for (const Peer& p : peers_)  // a rank says nothing after its hello
            if (fds[i++].revents && p.fd)
                return strf("%s (process %d) has ended before all ranks had come", p.name().c_str(), p.pid);
        guests_.erase(std::remove_if(guests_.begin(), guests_.end(), [](const Guest& g) { return !g.fd; }),
                      guests_.end());
        if (fds[0].revents) accept_guests();
        return ended_child();
    }
    void accept_guests() {
        for (int fd; (fd = accept(listener_.get(), nullptr, nullptr)) >= 0;) {
            make_ready(fd);
            guests_.emplace_back();
            guests_.back().fd = Fd(fd);
        }
        if (errno == EMFILE || errno == ENFILE)
            fail("rank 0 cannot take the connections of %d ranks: %s; a larger ulimit -n allows more",
                 launch_.world - 1, strerror(errno));
    }
    static void say_end(const Fd& fd) {
        if (fd) write_frame(fd.get(), END, 1, nullptr, 0, seconds() + 1);
    }
    // A rank of fork_ranks() that cannot come any more
    std::string ended_child() const {
        for (size_t i = 0; i < launch::children.size() && i < peers_.size(); i++) {
            siginfo_t info = {};
            const int look_only = WEXITED | WNOHANG | WNOWAIT;
            if (!waitid(P_PID, (id_t)launch::children[i], &info, look_only) && info.si_pid)
                return strf("rank %zu (process %d) has ended before all ranks had come", i + 1,
                            (int)info.si_pid);
        }
        return "";
    }
    void hear(Guest& g) {
        const ssize_t n = recv(g.fd.get(), (char*)&g.hello + g.got, sizeof g.hello - g.got, 0);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (n > 0) g.got += (size_t)n;
        const uint64_t magic = MAGIC;
        if (n <= 0 || memcmp(&g.hello, &magic, std::min(g.got, sizeof magic))) g.fd.reset();  // no rank
        else if (g.got == sizeof g.hello) take(g);
    }
    void take(Guest& g) {
        Hello& h = g.hello;
        h.host[sizeof h.host - 1] = 0;
        std::string why;
        if (h.version != VERSION) why = "it speaks another version of the protocol";
        else if (h.world != launch_.world)
            why = strf("it is one of %d ranks, rank 0 is one of %d", h.world, launch_.world);
        else if (h.rank < 1 || h.rank >= launch_.world)
            why = strf("wanted a rank from 1 to %d", launch_.world - 1);
        else if (const Peer& p = peers_[(size_t)h.rank - 1]; p.fd)
            why = strf("%s (process %d) has come before it", p.name().c_str(), p.pid);
        if (why.empty()) {
            Peer& p = peers_[(size_t)h.rank - 1];
            p.fd = std::move(g.fd), p.rank = h.rank, p.pid = h.pid, p.host = h.host;
            return;
        }
        why = strf("rank 0 on %s refuses rank %d on %s (process %d): %s", hello_.host, h.rank, h.host, h.pid,
                   why.c_str());
        write_frame(g.fd.get(), REFUSED, 0, why.data(), why.size(), seconds() + 1);
        g.fd.reset();
        refused_ = why;
    }
    // "ranks 2 (gpu1) and 3 (gpu2)", at most ten of them
    static std::string list(const std::vector<std::string>& items) {
        const size_t shown = std::min<size_t>(items.size(), 10);
        std::string s;
        for (size_t i = 0; i < shown; i++) s += (!i ? "" : i + 1 == items.size() ? " and " : ", ") + items[i];
        return s + (shown < items.size() ? strf(" and %zu more", items.size() - shown) : "");
    }
    std::string say_missing() const {
        std::vector<std::string> missing, came;
        for (size_t i = 0; i < peers_.size(); i++) {
            const std::string n = std::to_string(i + 1);
            if (peers_[i].fd) came.push_back(n + " from " + peers_[i].host);
            else missing.push_back(i + 1 < launch_.hosts.size() ? n + " (" + launch_.hosts[i + 1] + ")" : n);
        }
        std::string s =
            strf("rank%s %s of %d did not come within %d s; rank 0 waits on %s port %d; came: %s",
                 missing.size() > 1 ? "s" : "", list(missing).c_str(), launch_.world, timeout_s_, hello_.host,
                 launch_.port,
                 came.empty() ? "none" : ((came.size() > 1 ? "ranks " : "rank ") + list(came)).c_str());
        return refused_.empty() ? s : s + "; " + refused_;
    }

    const Launch& launch_;
    const int timeout_s_;
    Fd listener_;
    Hello hello_;
    std::vector<Guest> guests_;
    std::vector<Peer> peers_;
    std::string refused_;  // the last one
};

// How another rank comes to rank 0. Returns the connection, and each rank's Hello. Throws Error where rank 0
// does not answer, or refuses it.
inline Fd meet_rank_0(const Launch& l, int timeout_s, std::vector<Hello>& hellos) {
    const Hello mine = hello_of(l.rank, l.world);
    const std::string there =
        strf("rank %d on %s: rank 0 at %s port %d", l.rank, mine.host, l.leader.c_str(), l.port);
    const double deadline = seconds() + timeout_s;
    std::string why;
    Fd fd;
    while (!(fd = try_connect(l.leader, l.port, deadline, why))) {
        if (seconds() >= deadline)
            fail("%s does not answer within %d s: %s", there.c_str(), timeout_s, why.c_str());
        usleep(20000);
    }
    // Rank 0 may have started only now, and then waits as long for the others.
    const double answer = seconds() + timeout_s + 5;
    Header h;
    if (!write_all(fd.get(), &mine, sizeof mine, answer) ||
        !read_all(fd.get(), &h.magic, sizeof h.magic, answer) ||
        (h.magic == MAGIC &&
         !read_all(fd.get(), (char*)&h + sizeof h.magic, sizeof h - sizeof h.magic, answer))) {
        if (errno == ETIMEDOUT) fail("%s says nothing for %d s", there.c_str(), timeout_s + 5);
        fail("%s closed the connection before all ranks had come", there.c_str());
    }
    if (h.magic == MAGIC && h.type == END) fflush(stdout), _exit((int)h.size);  // rank 0 says why
    const bool all = h.type == WELCOME && h.bytes == (size_t)l.world * sizeof(Hello);
    if (h.magic != MAGIC || !(all || (h.type == REFUSED && h.bytes < 4096)))
        fail("%s: what answers there is another program; set MASTER_PORT to another port", there.c_str());
    Bytes data(h.bytes);
    if (!read_all(fd.get(), data.data(), data.size(), answer))
        fail("%s closed the connection: %s", there.c_str(), strerror(errno));
    if (!all) throw Error(std::string(data.begin(), data.end()));
    hellos.resize((size_t)l.world);
    memcpy((void*)hellos.data(), data.data(), data.size());
    for (Hello& hello : hellos) hello.host[sizeof hello.host - 1] = 0;
    return fd;
}

}  // namespace tcp

class TcpComm : public Comm {
  public:
    int local_rank = 0;  // of the on_host ranks of this machine

    // Waits until all ranks have come, at most timeout_s seconds; throws Error where not all do. Later, a
    // rank of which nothing is heard for timeout_s seconds counts as dead. `program` begins the lines of
    // print.
    TcpComm(const Launch& l, int timeout_s, const std::string& program)
        : timeout_s_(timeout_s), interval_(std::min(1.0, timeout_s / 6.0)), program_(program) {
        rank = l.rank, world = l.world, on_host = 1;
        if (world == 1) return;
        std::vector<tcp::Hello> all;
        if (leads()) {
            peers_ = tcp::Meeting(l, timeout_s).wait(all);
            welcome(all);
        } else {
            peers_.resize(1);
            peers_[0].fd = tcp::meet_rank_0(l, timeout_s, all);
            peers_[0].host = all[0].host, peers_[0].pid = all[0].pid;
        }
        on_host = 0;
        for (int r = 0; r < world; r++)
            if (!strcmp(all[(size_t)r].host, all[(size_t)rank].host)) on_host++, local_rank += r < rank;
        if (l.local_rank >= 0) local_rank = l.local_rank;
        start_watcher();
    }
    // Says goodbye: this rank's end is no death. Returns when that is sent.
    ~TcpComm() override {
        end_watcher(tcp::GOODBYE, 0);
        for (int fd : wake_) close(fd);
    }
    TcpComm(const TcpComm&) = delete;

    void set_hint(const std::string& hint) override {
        std::lock_guard<std::mutex> lock(mutex_);
        hint_ = hint;
    }
    // Called by the watcher at least every interval: what has gone wrong that the main thread may never
    // notice, because it waits for a GPU; "" if nothing. All ranks then end.
    void set_check(std::function<std::string()> f) {
        std::lock_guard<std::mutex> lock(mutex_);
        check_ = std::move(f);
    }

    void all_reduce(double* x, size_t n) override {
        const size_t size = checked_mul(n, sizeof(double), "all_reduce");
        if (!leads()) return take(ask(tcp::ALL_REDUCE, size, x, size, size), x);
        collect(tcp::ALL_REDUCE, size, size, [&](int, const tcp::Bytes& data) {
            const double* add = (const double*)data.data();
            for (size_t i = 0; i < n; i++) x[i] += add[i];
        });
        answer(tcp::ALL_REDUCE, size, tcp::Bytes((char*)x, (char*)x + size));
    }
    void all_gather(void* all, const void* mine, size_t bytes) override {
        const size_t total = checked_mul(bytes, (size_t)world, "all_gather");
        if (!leads()) return take(ask(tcp::ALL_GATHER, bytes, mine, bytes, total), all);
        check_size(tcp::ALL_GATHER, bytes, total);
        tcp::Bytes result(total);
        if (bytes) memcpy(result.data(), mine, bytes);
        collect(tcp::ALL_GATHER, bytes, bytes, [&](int r, const tcp::Bytes& data) {
            if (bytes) memcpy(result.data() + (size_t)r * bytes, data.data(), bytes);
        });
        take(result, all);
        answer(tcp::ALL_GATHER, bytes, std::move(result));
    }
    using Comm::broadcast;
    // Also waits until all ranks have called it.
    void broadcast(void* data, size_t bytes) override {
        if (!leads()) return take(ask(tcp::BROADCAST, bytes, nullptr, 0, bytes), data);
        collect(tcp::BROADCAST, bytes, 0, [](int, const tcp::Bytes&) {});
        answer(tcp::BROADCAST, bytes, tcp::Bytes((char*)data, (char*)data + bytes));
    }
    void barrier() override {
        if (!leads()) return (void)ask(tcp::BARRIER, 0, nullptr, 0, 0);
        collect(tcp::BARRIER, 0, 0, [](int, const tcp::Bytes&) {});
        answer(tcp::BARRIER, 0, {});
    }
    // Makes all other ranks end, silently, with this exit code. Returns when they have been told, at most a
    // second later; this rank is to end, too, and cannot call collective functions any more.
    void abort(int code, const std::string& line) override { end_watcher(tcp::END, code, line); }

  protected:
    // Ends this process after some seconds, whatever its threads wait for by then.
    void end_process_later(int code) const {
        const int patience = std::min(timeout_s_, 5);
        std::thread([=] {
            std::this_thread::sleep_for(std::chrono::seconds(patience));
            _exit(code);
        }).detach();
    }

  private:
    // --- collective functions. Ranks r > 0 send their part, and rank 0 its answer when all parts have come.
    static void take(const tcp::Bytes& data, void* to) {
        if (!data.empty()) memcpy(to, data.data(), data.size());
    }
    tcp::Header header(tcp::Kind kind, size_t size) const {
        tcp::Header h;
        h.type = tcp::DATA, h.kind = kind, h.call = calls_, h.size = size;
        return h;
    }
    static void check_size(tcp::Kind kind, size_t size, size_t bytes) {
        if (bytes > tcp::MOST_BYTES)
            fail("%s: %zu bytes at once, wanted at most %zu", tcp::describe(kind, size).c_str(), bytes,
                 tcp::MOST_BYTES);
    }
    // Sends this rank's part, returns rank 0's answer of `wanted` bytes.
    tcp::Bytes ask(tcp::Kind kind, size_t size, const void* part, size_t bytes, size_t wanted) {
        check_size(kind, size, std::max(bytes, wanted));
        calls_++;
        tcp::Peer& leader = peers_.at(0);
        queue(leader, header(kind, size),
              std::make_shared<tcp::Bytes>((const char*)part, (const char*)part + bytes));
        tcp::Frame f = receive(leader, kind, size);
        if (f.header.type == tcp::MISUSED) throw Error(std::string(f.data.begin(), f.data.end()));
        if (f.header.kind != kind || f.header.call != calls_ || f.data.size() != wanted)
            fail("rank 0 answers call %u, %s, with %zu bytes; rank %d waits for call %u, %s, with %zu",
                 f.header.call, tcp::describe(f.header.kind, f.header.size).c_str(), f.data.size(), rank,
                 calls_, tcp::describe(kind, size).c_str(), wanted);
        return std::move(f.data);
    }
    // Rank 0: gives use(r, part) the part of each other rank, in this order.
    template <class Use>
    void collect(tcp::Kind kind, size_t size, size_t bytes, Use use) {
        check_size(kind, size, std::max(bytes, kind == tcp::BROADCAST ? size : bytes * (size_t)world));
        calls_++;
        for (tcp::Peer& p : peers_) {
            const tcp::Frame f = receive(p, kind, size);
            const tcp::Header& h = f.header;
            if (h.kind != kind || h.size != size || h.call != calls_ || f.data.size() != bytes) {
                const std::string text =
                    strf("%s calls %s, rank 0 %s (call %u); the ranks do not do the same", p.name().c_str(),
                         tcp::describe(h.kind, h.size).c_str(), tcp::describe(kind, size).c_str(), calls_);
                tcp::Header misused;
                misused.type = tcp::MISUSED;
                queue(p, misused, std::make_shared<tcp::Bytes>(text.begin(), text.end()));
                throw Error(text);
            }
            use(p.rank, f.data);
        }
    }
    void answer(tcp::Kind kind, size_t size, tcp::Bytes data) {
        const auto shared = std::make_shared<const tcp::Bytes>(std::move(data));
        for (tcp::Peer& p : peers_) queue(p, header(kind, size), shared);
    }
    void queue(tcp::Peer& p, tcp::Header h, std::shared_ptr<const tcp::Bytes> data) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            push(p, h, std::move(data));
        }
        wake();
    }
    // The next frame for the main thread; waits for it, for ever where this process is about to end.
    tcp::Frame receive(tcp::Peer& p, tcp::Kind kind, size_t size) {
        std::unique_lock<std::mutex> lock(mutex_);
        arrived_.wait(lock, [&] { return exit_code_ < 0 && (!p.in.empty() || !p.fd); });
        if (p.in.empty())
            fail("%s has ended, but rank %d calls %s; the ranks do not do the same", p.name().c_str(), rank,
                 tcp::describe(kind, size).c_str());
        tcp::Frame f = std::move(p.in.front());
        p.in.pop_front();
        return f;
    }

    // --- start and end
    void welcome(const std::vector<tcp::Hello>& all) {
        const double deadline = tcp::seconds() + timeout_s_;
        for (tcp::Peer& p : peers_)  // the watcher will notice where one has died
            tcp::write_frame(p.fd.get(), tcp::WELCOME, 0, all.data(), all.size() * sizeof all[0], deadline);
    }
    void start_watcher() {
        if (pipe(wake_)) fail("cannot make a pipe: %s", strerror(errno));
        for (int fd : wake_) fcntl(fd, F_SETFD, FD_CLOEXEC), fcntl(fd, F_SETFL, O_NONBLOCK);
        last_look_ = tcp::seconds();
        for (tcp::Peer& p : peers_) p.heard = last_look_;
        sigset_t all, before;  // signals are the main thread's
        sigfillset(&all), pthread_sigmask(SIG_SETMASK, &all, &before);
        watcher_ = std::thread([this] { watch(); });
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
    void wake() {
        const char byte = 0;
        if (write(wake_[1], &byte, 1) < 0) {}  // a full pipe wakes, too
    }
    void end_watcher(tcp::Type type, int code, const std::string& line = "") {
        if (!watcher_.joinable()) return;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!ending_) {
                if (write(2, line.data(), line.size()) < 0) {}
                say_last(type, code);
            }
        }
        wake();
        watcher_.join();
    }

    // --- the watcher. mutex_ is locked in all functions below but in watch() and end_process().
    void watch() {
        try {
            while (look()) {}
        } catch (const std::exception& e) {
            print_line(e.what());
            std::lock_guard<std::mutex> lock(mutex_);
            exit_code_ = 1, end_process_later(1);
        }
        if (exit_code_ >= 0) end_process();  // only this thread writes it
    }
    // One look at the connections, after a wait for news. Returns whether to go on.
    bool look() {
        std::vector<pollfd> fds = {{wake_[0], POLLIN, 0}};
        {
            std::lock_guard<std::mutex> lock(mutex_);
            for (const tcp::Peer& p : peers_)
                fds.push_back({p.fd.get(), (short)(p.out.empty() ? POLLIN : POLLIN | POLLOUT), 0});
        }
        poll(fds.data(), fds.size(), (int)(interval_ * 1000) + 1);
        char bytes[64];
        while (read(wake_[0], bytes, sizeof bytes) > 0) {}
        std::lock_guard<std::mutex> lock(mutex_);
        for (size_t i = 0; i < peers_.size(); i++)
            if (peers_[i].fd && fds[i + 1].revents & ~POLLOUT) read_from(peers_[i]);
        const double now = tcp::seconds();
        if (now - last_beat_ >= interval_ && !ending_) {
            last_beat_ = now;
            for (tcp::Peer& p : peers_) push(p, {}, nullptr);
        }
        for (tcp::Peer& p : peers_)
            if (p.fd) write_to(p);
        find_silent(now);
        if (const std::string wrong = check_ && !ending_ ? check_() : ""; !wrong.empty()) {
            end_all(1);
            print_line(wrong);
        }
        return !is_over(now);
    }
    void read_from(tcp::Peer& p) {
        constexpr size_t HEAD = sizeof(tcp::Header);
        while (p.fd) {
            char* to = p.got < HEAD ? (char*)&p.frame.header + p.got : p.frame.data.data() + (p.got - HEAD);
            const size_t want = p.got < HEAD ? HEAD - p.got : p.frame.data.size() - (p.got - HEAD);
            const ssize_t n = recv(p.fd.get(), to, want, 0);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0 && errno == EAGAIN) return;
            if (n <= 0)
                return lost(p, n && errno != ECONNRESET ? strerror(errno) : "its connection was closed");
            p.heard = tcp::seconds(), p.got += (size_t)n;
            if (p.got == HEAD) {
                const tcp::Header& h = p.frame.header;
                if (h.magic != tcp::MAGIC || h.bytes > tcp::MOST_BYTES)
                    return lost(p, "what came from it is not what a rank sends");
                p.frame.data.resize(h.bytes);
            }
            if (p.got < HEAD || p.got < HEAD + p.frame.data.size()) continue;
            p.got = 0;
            handle(p, std::move(p.frame));
            p.frame = {};
        }
    }
    void handle(tcp::Peer& p, tcp::Frame f) {
        if (f.header.type == tcp::DATA || f.header.type == tcp::MISUSED) p.in.push_back(std::move(f));
        else if (f.header.type == tcp::GOODBYE) p.fd.reset();
        else if (f.header.type == tcp::END) p.fd.reset(), end_all((int)f.header.size);
        arrived_.notify_all();
    }
    // Adds a frame to those that are to be sent.
    void push(tcp::Peer& p, tcp::Header h, std::shared_ptr<const tcp::Bytes> data) {
        if (!p.fd || p.deaf) return;
        h.bytes = data ? data->size() : 0;
        p.out.push_back({h, std::move(data), 0});
    }
    void write_to(tcp::Peer& p) {
        constexpr size_t HEAD = sizeof(tcp::Header);
        while (!p.out.empty()) {
            tcp::Outgoing& o = p.out.front();
            const bool head = o.sent < HEAD;
            const char* from = head ? (const char*)&o.header + o.sent : o.data->data() + (o.sent - HEAD);
            const size_t left = head ? HEAD - o.sent : o.header.bytes - (o.sent - HEAD);
            const ssize_t n = send(p.fd.get(), from, left, MSG_NOSIGNAL);
            if (n < 0 && errno == EINTR) continue;
            if (n < 0 && errno == EAGAIN) return;
            if (n < 0) {  // it has ended; what it has said before is still to be read
                p.deaf = true, p.out.clear();
                return;
            }
            o.sent += (size_t)n;
            if (o.sent == HEAD + o.header.bytes) p.out.pop_front();
        }
    }
    void find_silent(double now) {
        // While this process did not run (Ctrl-Z), it could hear nothing.
        const double away = now - last_look_ > 2 * interval_ + 0.1 ? now - last_look_ : 0;
        last_look_ = now;
        for (tcp::Peer& p : peers_) {
            p.heard = std::min(now, p.heard + away);
            if (p.fd && now - p.heard > timeout_s_)
                lost(p, strf("nothing was heard of it for %d s: it is frozen, or the network between is cut",
                             timeout_s_));
        }
    }
    void lost(tcp::Peer& p, const std::string& why) {
        if (!ending_) {  // where it is only frozen, it will read that all is over
            tcp::Header h;
            h.type = tcp::END, h.size = 1;
            push(p, h, nullptr), write_to(p);
        }
        p.fd.reset();
        arrived_.notify_all();
        if (ending_) return;
        end_all(1);
        print_line(strf("%s (process %d) has died: %s%s%s", p.name().c_str(), p.pid, why.c_str(),
                        hint_.empty() ? "" : "; ", hint_.c_str()));
    }
    // Ends all ranks, this one included, with an exit code.
    void end_all(int code) {
        if (ending_) return;
        exit_code_ = code;
        say_last(tcp::END, code);
        end_process_later(code);  // even where end_process() waits for a lock on standard output
    }
    void say_last(tcp::Type type, int code) {
        tcp::Header h;
        h.type = type, h.size = (uint64_t)code;
        for (tcp::Peer& p : peers_) push(p, h, nullptr);
        ending_ = true, end_by_ = type == tcp::END ? tcp::seconds() + 1 : INFINITY;
    }
    // A connection is over when the other side has closed it: having read what was sent last.
    bool is_over(double now) {
        if (!ending_) return false;
        bool closed = true, sent = true;
        for (const tcp::Peer& p : peers_) closed = closed && !p.fd, sent = sent && (!p.fd || p.out.empty());
        if (sent) end_by_ = std::min(end_by_, now + 1);
        return closed || now > end_by_;
    }
    // A line is written at once, without stdio, whose lock the main thread may hold.
    void print_line(const std::string& text) const {
        const std::string line = strf("%s: rank %d: %s\n", program_.c_str(), rank, text.c_str());
        if (write(2, line.data(), line.size()) < 0) {}
    }
    [[noreturn]] void end_process() {
        fflush(stdout), fflush(stderr);
        _exit(exit_code_);
    }

    const int timeout_s_;
    const double interval_;
    const std::string program_;
    uint32_t calls_ = 0;  // collective functions so far
    int wake_[2] = {-1, -1};
    std::thread watcher_;
    // What both threads use, and the mutex that protects it
    std::mutex mutex_;
    std::condition_variable arrived_;
    std::vector<tcp::Peer> peers_;  // rank 0: the connections to ranks 1, 2, ...; others: to rank 0
    std::string hint_;
    std::function<std::string()> check_;
    bool ending_ = false;
    int exit_code_ = -1;  // of this process, which is about to end; -1: it is not
    double end_by_ = 0;
    // The watcher's own
    double last_look_ = 0, last_beat_ = 0;
};
