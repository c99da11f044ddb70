// streams.cpp - streams, events and graphs.
//
// A stream is a queue of operations. An operation may depend on operations of other streams, which were
// always submitted earlier, so a recursion completes it. Eager streams run each operation when it is
// submitted. Lazy streams run it when something waits for it; then only what the dependencies require has
// run, which reveals missing ones.
#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <set>
#include <thread>

#include "api.h"

namespace emu {

struct Stream;
struct Dependency {
    Stream* stream;
    uint64_t index;  // how many of the stream's operations must be complete
};
struct Operation {
    std::function<void()> work;
    std::vector<Dependency> after;
};

// Nodes are stored in the order of their capture, in which each comes after those that it depends on.
struct Node {
    std::function<void()> work;
    std::set<size_t> after;
    bool late = false;  // the descending schedule runs it only if no other node can run
};
struct Graph {
    std::vector<Node> nodes;
};
struct Capture {
    cudaStreamCaptureMode mode;
    Stream* origin;
    std::thread::id thread;
    std::unique_ptr<Graph> graph;
    bool broken;
};
typedef std::shared_ptr<Capture> CapturePtr;

struct Stream {
    bool blocking = true;  // ordered against the legacy default stream
    int priority = 0;
    std::deque<Operation> queue;
    uint64_t submitted = 0, completed = 0;
    CapturePtr capture;
    std::set<size_t> tail;  // under capture: the nodes on which the next one depends
};
static double device_clock = 0;  // milliseconds
void pass_time(const std::function<std::string()>& work) {
    device_clock += options().milliseconds ? options().milliseconds(work()) : 1;
}

struct Event {
    bool timed, recorded = false;
    Dependency point = {nullptr, 0};
    std::shared_ptr<double> time;
    CapturePtr capture;      // set if it was recorded in a stream under capture,
    std::set<size_t> nodes;  // after these nodes
};

// These are never destroyed, because work may end after main.
static Stream& legacy = *new Stream;
static std::vector<Stream*>& streams = *new std::vector<Stream*>{&legacy};
static std::vector<Stream*>& dead_streams = *new std::vector<Stream*>;  // events may still name them
static std::set<Event*>& events = *new std::set<Event*>;
static std::set<Graph*>&graphs = *new std::set<Graph*>, &executables = *new std::set<Graph*>;
static std::set<CapturePtr>& captures = *new std::set<CapturePtr>;  // in progress

// The objects of handles; they throw if the handle is not valid.
static Stream& stream(cudaStream_t handle) {
    if (handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread) return legacy;
    want(std::count(streams.begin(), streams.end(), (Stream*)handle), cudaErrorInvalidResourceHandle);
    return *(Stream*)handle;
}
static Event& event(cudaEvent_t handle) {
    want(events.count((Event*)handle), cudaErrorInvalidResourceHandle);
    return *(Event*)handle;
}
static Graph& graph_in(const std::set<Graph*>& list, void* handle) {
    want(list.count((Graph*)handle), cudaErrorInvalidValue);
    return *(Graph*)handle;
}

[[noreturn]] static void break_capture(const CapturePtr& c, cudaError_t e) {
    c->broken = true;
    throw e;
}
void not_while_capturing() {
    bool forbidden = false;
    for (auto& c : captures)
        if (c->mode == cudaStreamCaptureModeGlobal ||
            (c->mode == cudaStreamCaptureModeThreadLocal && c->thread == std::this_thread::get_id()))
            c->broken = forbidden = true;
    want(!forbidden, cudaErrorStreamCaptureUnsupported);
}
void no_blocking_stream_under_capture() {
    for (Stream* s : streams)
        if (s->capture && s->blocking) break_capture(s->capture, cudaErrorStreamCaptureImplicit);
}
bool under_capture(cudaStream_t s) { return stream(s).capture != nullptr; }

// Runs operations of the stream until `index` of them are complete.
static void complete(Stream& s, uint64_t index) {
    if (s.completed < index) open_device_memory();
    while (s.completed < index) {
        Operation op = std::move(s.queue.front());
        s.queue.pop_front();
        for (const Dependency& d : op.after) complete(*d.stream, d.index);
        if (op.work && fault_code() == cudaSuccess) op.work();
        s.completed++;
    }
}
void wait_for_all() {
    for (size_t i = streams.size(); i-- > 0;) complete(*streams[i], streams[i]->submitted);
    close_device_memory();
}
void wait_for_stream(cudaStream_t handle) {
    Stream& s = stream(handle);
    if (s.capture) break_capture(s.capture, cudaErrorStreamCaptureUnsupported);
    if (&s == &legacy) no_blocking_stream_under_capture();
    for (size_t i = streams.size(); i-- > 0;)
        if (streams[i] == &s || (&s == &legacy && streams[i]->blocking))
            complete(*streams[i], streams[i]->submitted);
    close_device_memory();
}

// Appends an operation to a stream that is not under capture. The legacy stream and blocking streams wait
// for each other.
static void submit_after(Stream& s, std::function<void()> work, std::vector<Dependency> after) {
    if (&s == &legacy) {
        no_blocking_stream_under_capture();
        for (Stream* other : streams)
            if (other != &s && other->blocking) after.push_back({other, other->submitted});
    } else if (s.blocking) {
        after.push_back({&legacy, legacy.submitted});
    }
    s.queue.push_back({std::move(work), std::move(after)});
    s.submitted++;
    if (!options().lazy_streams) complete(s, s.submitted);
}
// Appends a node to the graph that the stream captures.
static void add_node(Stream& s, std::function<void()> work, bool late) {
    want(!s.capture->broken, cudaErrorStreamCaptureInvalidated);
    std::vector<Node>& nodes = s.capture->graph->nodes;
    nodes.push_back({std::move(work), s.tail, late});
    s.tail = {nodes.size() - 1};
}
void submit(cudaStream_t handle, std::function<void()> work) {
    Stream& s = stream(handle);
    if (!s.capture) return submit_after(s, std::move(work), {});
    add_node(s, std::move(work), false);
}

void submit_collective(cudaStream_t handle, std::shared_ptr<Event>& last, std::function<void()> start,
                       std::function<void()> end) {
    Stream& s = stream(handle);
    if (!last) last.reset(new Event{});
    if (s.capture) {
        if (last->capture == s.capture) s.tail.insert(last->nodes.begin(), last->nodes.end());
        add_node(s, std::move(start), false);
        add_node(s, std::move(end), true);
        last->capture = s.capture, last->nodes = s.tail;
    } else {
        std::vector<Dependency> after;
        if (last->recorded) after.push_back(last->point);
        submit_after(s, std::move(start), std::move(after));
        // Under the ascending schedule, a lazy stream delays the start as well.
        if (options().schedule != ASCENDING) complete(s, s.submitted);
        submit_after(s, std::move(end), {});
        last->recorded = true, last->point = {&s, s.submitted};
    }
}

// Throws cudaErrorNotReady if fewer than `index` operations are complete. With lazy streams each query also
// runs one operation, so that a loop of queries ends.
static void query(Stream& s, uint64_t index) {
    if (s.completed >= index) return close_device_memory();
    complete(s, s.completed + 1);
    throw fault_code() != cudaSuccess ? fault_code() : cudaErrorNotReady;
}

// Runs all nodes of a graph. The schedule chooses among those whose predecessors are done.
static void run_graph(const Graph& g) {
    std::vector<bool> done(g.nodes.size());
    std::mt19937 random(options().seed);
    for (size_t left = g.nodes.size(); left && fault_code() == cudaSuccess; left--) {
        std::vector<size_t> ready;
        for (size_t i = 0; i < g.nodes.size(); i++) {
            const std::set<size_t>& after = g.nodes[i].after;
            if (!done[i] && std::all_of(after.begin(), after.end(), [&](size_t p) { return done[p]; }))
                ready.push_back(i);
            if (options().schedule == ASCENDING && !ready.empty()) break;
        }
        size_t i = ready.back();
        if (options().schedule == RANDOM) i = ready[random() % ready.size()];
        if (options().schedule == DESCENDING)
            for (size_t other : ready)
                if (g.nodes[i].late || !g.nodes[other].late) i = other;
        g.nodes[i].work();
        done[i] = true;
    }
}

// Whether the origin stream has joined all branches: its last nodes depend, directly or not, on all others.
static bool all_joined(const Capture& c) {
    std::set<size_t> reached = c.origin->tail;
    for (size_t i = c.graph->nodes.size(); i-- > 0;)
        if (reached.count(i)) reached.insert(c.graph->nodes[i].after.begin(), c.graph->nodes[i].after.end());
    return reached.size() == c.graph->nodes.size();
}

// The event of a handle for calls of the host, which cannot wait for or query an event that was last recorded
// under capture: such an event is only a place in a graph.
static Event& uncaptured(cudaEvent_t handle) {
    Event& e = event(handle);
    if (e.capture) break_capture(e.capture, cudaErrorCapturedEvent);
    return e;
}

}  // namespace emu
using namespace emu;

extern "C" {

// ---------------------------------------------------------------------------------------------
// Streams

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
    return api([&] {
        Stream* s = new Stream;
        s->blocking = !(flags & cudaStreamNonBlocking), s->priority = priority;
        streams.push_back(s);
        *handle = (cudaStream_t)s;
    });
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* handle) {
    return cudaStreamCreateWithPriority(handle, cudaStreamDefault, 0);
}
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* priority) {
    return api([&] { *priority = stream(s).priority; });
}
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    return api([&] {
        Stream& s = stream(handle);
        want(&s != &legacy, cudaErrorInvalidResourceHandle);
        if (s.capture) s.capture->broken = true;
        complete(s, s.submitted);
        streams.erase(std::find(streams.begin(), streams.end(), &s));
        dead_streams.push_back(&s);
    });
}
cudaError_t cudaStreamSynchronize(cudaStream_t s) {
    return api([&] { wait_for_stream(s); });
}
cudaError_t cudaDeviceSynchronize() {
    return api([&] {
        for (auto& c : captures) c->broken = true;
        want(captures.empty(), cudaErrorStreamCaptureUnsupported);
        wait_for_all();
    });
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
    return api([&] {
        Stream& s = stream(handle);
        if (s.capture) break_capture(s.capture, cudaErrorStreamCaptureUnsupported);
        query(s, s.submitted);
    });
}
cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* data) {
    return api([&] { submit(s, [=] { f(data); }); });
}

// ---------------------------------------------------------------------------------------------
// Events

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
    return api([&] {
        Event* e = new Event;
        e->timed = !(flags & cudaEventDisableTiming);
        events.insert(e);
        *handle = (cudaEvent_t)e;
    });
}
cudaError_t cudaEventCreate(cudaEvent_t* handle) {
    return cudaEventCreateWithFlags(handle, cudaEventDefault);
}
cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    return api([&] {
        Event* e = &event(handle);
        events.erase(e);
        delete e;
    });
}
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
    return api([&] {
        Event& e = event(handle);
        Stream& s = stream(stream_handle);
        want(!s.capture || !s.capture->broken, cudaErrorStreamCaptureInvalidated);
        e.capture = s.capture, e.nodes = s.tail;
        if (s.capture) return;
        auto time = std::make_shared<double>();
        e.recorded = true, e.time = time, e.point = {&s, s.submitted + 1};
        submit_after(s, [time] { *time = device_clock; }, {});
    });
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) {
    return cudaEventRecord(e, s);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned) {
    return api([&] {
        Event& e = event(handle);
        Stream& s = stream(stream_handle);
        if (++options().waits_made == options().drop_wait) return;
        if (captures.count(e.capture)) {  // the stream joins the capture, or two branches of it join
            if (s.capture && s.capture != e.capture) break_capture(s.capture, cudaErrorStreamCaptureMerge);
            if (&s == &legacy) break_capture(e.capture, cudaErrorStreamCaptureImplicit);
            s.capture = e.capture;
            s.tail.insert(e.nodes.begin(), e.nodes.end());
        } else {
            if (s.capture) break_capture(s.capture, cudaErrorStreamCaptureIsolation);
            if (e.recorded) submit_after(s, nullptr, {e.point});
        }
    });
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    return api([&] {
        Event& e = uncaptured(handle);
        if (e.recorded) complete(*e.point.stream, e.point.index);
        close_device_memory();
    });
}
cudaError_t cudaEventQuery(cudaEvent_t handle) {
    return api([&] {
        Event& e = uncaptured(handle);
        if (e.recorded) query(*e.point.stream, e.point.index);
    });
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
    return api([&] {
        Event &a = uncaptured(start), &b = uncaptured(end);
        want(a.timed && b.timed && a.recorded && b.recorded, cudaErrorInvalidResourceHandle);
        for (Event* e : {&a, &b}) want(e->point.stream->completed >= e->point.index, cudaErrorNotReady);
        *ms = (float)(*b.time - *a.time);
    });
}

// ---------------------------------------------------------------------------------------------
// Graphs

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    return api([&] {
        Stream& s = stream(handle);
        want(&s != &legacy, cudaErrorStreamCaptureUnsupported);
        want(!s.capture, cudaErrorIllegalState);
        s.capture.reset(new Capture{mode, &s, std::this_thread::get_id(), std::make_unique<Graph>(), false});
        captures.insert(s.capture);
    });
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    return api([&] {
        *graph = nullptr;
        Stream& s = stream(handle);
        want(s.capture != nullptr, cudaErrorIllegalState);
        CapturePtr c = s.capture;
        if (c->origin != &s) break_capture(c, cudaErrorStreamCaptureUnmatched);
        if (c->mode != cudaStreamCaptureModeRelaxed && c->thread != std::this_thread::get_id())
            break_capture(c, cudaErrorStreamCaptureWrongThread);
        const bool joined = all_joined(*c);
        for (Stream* other : streams)
            if (other->capture == c) other->capture = nullptr, other->tail.clear();
        captures.erase(c);
        want(!c->broken, cudaErrorStreamCaptureInvalidated);
        want(joined, cudaErrorStreamCaptureUnjoined);
        *graph = (cudaGraph_t)*graphs.insert(c->graph.release()).first;
    });
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    return api([&] {
        const CapturePtr& c = stream(handle).capture;
        *status = !c          ? cudaStreamCaptureStatusNone
                  : c->broken ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
    });
}
// Gives only the number of nodes.
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* n) {
    return api([&] {
        want(!nodes, cudaErrorNotSupported);
        *n = graph_in(graphs, graph).nodes.size();
    });
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    return api([&] {
        *executable = (cudaGraphExec_t)*executables.insert(new Graph(graph_in(graphs, graph))).first;
    });
}
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t) {
    return api([&] { graph_in(executables, executable); });
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t s) {
    return api([&] {
        // A copy, because the executable may be destroyed before the work runs.
        auto g = std::make_shared<Graph>(graph_in(executables, executable));
        submit(s, [g] { run_graph(*g); });
    });
}
static void destroy_graph(std::set<Graph*>& list, void* handle) {
    Graph* g = &graph_in(list, handle);
    list.erase(g);
    delete g;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    return api([&] { destroy_graph(graphs, graph); });
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    return api([&] { destroy_graph(executables, executable); });
}

}  // extern "C"
