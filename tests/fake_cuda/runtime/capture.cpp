// Stream capture and graphs. Rules: "CUDA Graphs" in the CUDA C++ Programming Guide, and the descriptions of
// cudaStreamBeginCapture and cudaThreadExchangeStreamCaptureMode in the runtime's API.
#include "core.h"

namespace fake {

static std::map<uint64_t, Capture*> captures;  // under way
static std::set<Recording*> recordings;        // that a graph holds
static std::vector<uint64_t> forgotten;        // ids of recordings that ended, for Python
static std::vector<std::string> nodes_of_last;
static uint64_t next_id = 1;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static bool executes = true;  // whether the launch of a graph does its work
using Callback = int (*)(uint64_t capture, long index);
static Callback python_callback = nullptr;

struct Graph {
    std::shared_ptr<Recording> recording;
};

// What a graph keeps alive for its user, until the last reference is gone.
struct UserObject {
    std::shared_ptr<void> value;
};
static std::multimap<uint64_t, std::shared_ptr<void>> user_objects;  // by id of the recording

Recording::Recording() {
    Lock lock(mutex);
    id = next_id++;
    recordings.insert(this);
}

Recording::~Recording() {
    std::vector<std::shared_ptr<void>> released;  // their destructors run without the lock
    Lock lock(mutex);
    recordings.erase(this);
    forgotten.push_back(id);
    auto [begin, end] = user_objects.equal_range(id);
    for (auto object = begin; object != end; ++object) released.push_back(std::move(object->second));
    user_objects.erase(begin, end);
}

Capture* find_capture(uint64_t id) {
    auto found = captures.find(id);
    return found == captures.end() ? nullptr : found->second;
}

bool any_capture() {
    return !captures.empty();
}

bool live_recording_with(void* comm) {
    Lock lock(mutex);
    for (Recording* recording : recordings)
        if (recording->comms.count(comm)) return true;
    return false;
}

std::vector<std::string> last_nodes() {
    return nodes_of_last;
}

void invalidate(Capture& capture, const std::string& why) {
    if (!capture.invalid.empty()) return;
    capture.invalid = why;
    note("capture invalidated: " + why);
}

cudaError_t refuse(Capture& capture, const std::string& why, cudaError_t error) {
    invalidate(capture, why);
    return fail(error);
}

// Rule of the modes: an unsafe call is forbidden, and invalidates the capture, if this thread has a capture that is not
// relaxed, or another thread has a global one and this thread is global; a relaxed thread may call anything.
bool unsafe_call(const std::string& name) {
    if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
    bool forbidden = false;
    for (auto& [id, capture] : captures) {
        bool own = capture->thread == thread_id();
        bool forbids = own ? capture->mode != cudaStreamCaptureModeRelaxed
                           : capture->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
        if (!forbids) continue;
        invalidate(*capture, name + (own ? " in its thread" : " in another thread"));
        forbidden = true;
    }
    return forbidden;
}

static cudaError_t capture_node(Stream& stream, const std::string& name, Work work) {
    Capture& capture = *stream.capture;
    if (!capture.invalid.empty()) return fail(cudaErrorStreamCaptureInvalidated);
    capture.recording->nodes.push_back(name);
    if (work) capture.recording->work.push_back(std::move(work));
    stream.seen[stream.id] = ++capture.issued[stream.id];
    count("node");
    return cudaSuccess;
}

// Rule: the default stream waits for all blocking streams, so it cannot be used while one of them is captured.
static bool breaks_implicitly(Stream& stream) {
    if (stream.id != 0) return false;
    for (auto& [id, capture] : captures)
        for (Stream* member : capture->members)
            if (member->blocking) return invalidate(*capture, "work on the default stream"), true;
    return false;
}

cudaError_t submit(Stream& stream, const std::string& name, Work work) {
    {
        Lock lock(mutex);
        if (stream.capture) return capture_node(stream, name, std::move(work));
        if (breaks_implicitly(stream)) return fail(cudaErrorStreamCaptureImplicit);
        if (any_capture()) note("not captured, during a capture: " + name + " on stream " + std::to_string(stream.id));
        count("launch");
        count(name);
        if (is_stuck(stream.stuck)) return cudaSuccess;
    }
    if (work && !work()) return fail(cudaErrorUnknown);
    return cudaSuccess;
}

static cudaError_t begin_capture(Stream& stream, cudaStreamCaptureMode mode) {
    Lock lock(mutex);
    if (stream.id == 0 || stream.capture) return fail(cudaErrorStreamCaptureUnsupported);
    Capture* capture = new Capture;
    capture->id = capture->recording->id;
    capture->origin = &stream;
    capture->mode = mode;
    capture->thread = thread_id();
    capture->members.insert(&stream);
    captures[capture->id] = capture;
    stream.capture = capture;
    stream.seen.clear();
    note("capture begins");
    return cudaSuccess;
}

// Rule: all streams of a capture must have been joined to its first one when it ends.
static cudaError_t why_not_complete(Capture& capture) {
    if (capture.thread != thread_id() && capture.mode != cudaStreamCaptureModeRelaxed)
        return cudaErrorStreamCaptureWrongThread;
    if (!capture.invalid.empty()) return cudaErrorStreamCaptureInvalidated;
    for (const auto& [id, nodes] : capture.issued)
        if (capture.origin->seen[id] < nodes) return cudaErrorStreamCaptureUnjoined;
    return cudaSuccess;
}

static cudaError_t end_capture(Stream& stream, cudaGraph_t* graph) {
    std::unique_ptr<Capture> capture;  // released after the lock: a user's object may be in it
    Lock lock(mutex);
    *graph = nullptr;
    if (!stream.capture) return fail(cudaErrorIllegalState);
    if (stream.capture->origin != &stream) return fail(cudaErrorStreamCaptureUnmatched);
    capture.reset(stream.capture);
    cudaError_t error = why_not_complete(*capture);
    for (Stream* member : capture->members) {
        member->capture = nullptr;
        member->seen.clear();
    }
    captures.erase(capture->id);
    nodes_of_last = capture->recording->nodes;
    note("capture ends: " + std::to_string(nodes_of_last.size()) + " nodes");
    count("capture");
    if (error) return fail(error);
    *graph = (cudaGraph_t) new Graph{capture->recording};
    return cudaSuccess;
}

// Do the work of a graph's nodes in the order of their capture.
static cudaError_t launch_graph(Graph& graph, Stream& stream) {
    std::shared_ptr<Recording> recording = graph.recording;
    {
        Lock lock(mutex);
        if (stream.capture) return refuse(*stream.capture, "a launch of a graph", cudaErrorStreamCaptureUnsupported);
        count("graph launch");
        if (!recording->comms.empty() && hang_now()) stick(stream);
        if (is_stuck(stream.stuck)) return cudaSuccess;
    }
    if (!executes) return cudaSuccess;
    for (const Work& work : recording->work)
        if (!work()) return fail(cudaErrorUnknown);
    return cudaSuccess;
}

}  // namespace fake

using namespace fake;

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    return begin_capture(stream_of(stream), mode);
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
    return end_capture(stream_of(stream), graph);
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}

static cudaStreamCaptureStatus status_of(Stream& stream) {
    if (!stream.capture) return cudaStreamCaptureStatusNone;
    return stream.capture->invalid.empty() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusInvalidated;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
    Lock lock(mutex);
    *status = status_of(stream_of(stream));
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
    const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* number) {
    Lock lock(mutex);
    Stream& stream = stream_of(handle);
    *status = status_of(stream);
    if (!stream.capture) return cudaSuccess;
    if (id) *id = stream.capture->id;
    if (graph) *graph = nullptr;  // nodes cannot be added by hand
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (number) *number = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamUpdateCaptureDependencies(
    cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t, unsigned) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* number) {
    size_t all = ((Graph*)graph)->recording->nodes.size();
    for (size_t i = 0; nodes && i < std::min(*number, all); i++) nodes[i] = nullptr;
    *number = all;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = (cudaGraphExec_t) new Graph(*(Graph*)graph);
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    return launch_graph(*(Graph*)executable, stream_of(stream));
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete (Graph*)graph;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    count("graph destroyed");
    delete (Graph*)executable;
    return cudaSuccess;
}

EXPORT cudaError_t cudaUserObjectCreate(
    cudaUserObject_t* object, void* data, cudaHostFn_t destroy, unsigned, unsigned) {
    *object = (cudaUserObject_t) new UserObject{std::shared_ptr<void>(data, destroy)};
    return cudaSuccess;
}

EXPORT cudaError_t cudaUserObjectRelease(cudaUserObject_t object, unsigned) {
    delete (UserObject*)object;
    return cudaSuccess;
}

// Rule: with the flag Move, the caller's reference becomes the graph's.
EXPORT cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned, unsigned flags) {
    Lock lock(mutex);
    user_objects.emplace(((Graph*)graph)->recording->id, ((UserObject*)object)->value);
    if (flags & cudaGraphUserObjectMove) delete (UserObject*)object;
    return cudaSuccess;
}

// --- for the Python mode and tests

// Return 0 if work on the stream runs, 1 if it is captured, 2 if it never runs; from now on copies are quiet.
EXPORT int fake_enter(cudaStream_t handle);
EXPORT void fake_quiet(int on);

EXPORT int fake_enter(cudaStream_t handle) {
    Lock lock(mutex);
    fake_quiet(1);
    Stream& stream = stream_of(handle);
    return stream.capture ? 1 : is_stuck(stream.stuck) ? 2 : 0;
}

// Return the id of the capture of the stream, or 0.
EXPORT uint64_t fake_capture_id(cudaStream_t handle) {
    Lock lock(mutex);
    Stream& stream = stream_of(handle);
    return stream.capture ? stream.capture->id : 0;
}

// Let a launch of the graph call Python with the id of the capture and `index`, after the work recorded so far.
EXPORT void fake_record(cudaStream_t handle, long index) {
    Lock lock(mutex);
    Capture* capture = stream_of(handle).capture;
    if (!capture) return;
    uint64_t id = capture->id;
    capture->recording->work.push_back([=] { return python_callback(id, index) == 0; });
}

// A kernel of a library that does not work here (cuDNN).
EXPORT int fake_launch(const char* name, cudaStream_t handle) {
    return submit(stream_of(handle), std::string("kernel ") + name);
}

EXPORT void fake_set_callback(Callback callback) {
    python_callback = callback;
}

// Write up to `most` ids of recordings that no graph holds any more, and return how many.
EXPORT long fake_forgotten(uint64_t* ids, long most) {
    Lock lock(mutex);
    long n = std::min(most, (long)forgotten.size());
    for (long i = 0; i < n; i++) ids[i] = forgotten[i];
    forgotten.erase(forgotten.begin(), forgotten.begin() + n);
    return n;
}

// Whether launches of graphs do their work; off to measure the host's time.
EXPORT void fake_execute(int on) {
    executes = on;
}
