// Streams, events, and what the host waits for.
#include "core.h"

#include <unistd.h>

namespace fake {

static std::set<Stream*> created;
static int next_stream_id = 1;

static Stream* make_stream(int id, bool blocking) {
    Stream* stream = new Stream;
    stream->id = id;
    stream->device = current_device();
    stream->blocking = blocking;
    created.insert(stream);
    return stream;
}

// Rule: 0 and cudaStreamLegacy name the device's default stream.
Stream& stream_of(cudaStream_t handle) {
    Lock lock(mutex);
    if (handle && handle != cudaStreamLegacy && handle != cudaStreamPerThread) return *(Stream*)handle;
    static std::map<int, Stream*> defaults;
    Stream*& stream = defaults[current_device()];
    if (!stream) stream = make_stream(0, false);
    return *stream;
}

std::vector<Stream*> all_streams() {
    return {created.begin(), created.end()};
}

// --- a peer that never answers: a stream, and the events recorded on it, are stuck until the next abort of NCCL

static long aborts = 1;     // number of aborts, from 1
static long hang_after = -1;  // collectives until the one that never ends; -1: none

bool is_stuck(long stuck) {
    Lock lock(mutex);
    return stuck == aborts;
}

void stick(Stream& stream) {
    Lock lock(mutex);
    stream.stuck = aborts;
    note("a collective on stream " + std::to_string(stream.id) + " waits for a peer that never answers");
}

void release_stuck() {
    Lock lock(mutex);
    aborts++;
    hang_after = -1;
}

bool hang_now() {
    Lock lock(mutex);
    if (hang_after < 0) return false;
    return hang_after-- == 0;
}

bool wait_while_stuck(const std::function<bool()>& stuck) {
    bool waited = false;
    while (stuck()) {
        waited = true;
        usleep(1000);
    }
    return waited;
}

// --- host syncs

static cudaError_t sync_stream(Stream& stream) {
    {
        Lock lock(mutex);
        if (stream.capture) return refuse(*stream.capture, "a sync of it", cudaErrorStreamCaptureUnsupported);
        if (unsafe_call("cudaStreamSynchronize")) return fail(cudaErrorStreamCaptureUnsupported);
        count("sync stream");
    }
    wait_while_stuck([&] { return is_stuck(stream.stuck); });
    return cudaSuccess;
}

// Rule: a device cannot be synchronized while a stream of it is captured, in whatever mode and thread.
static cudaError_t sync_device() {
    int device = current_device();
    {
        Lock lock(mutex);
        for (Stream* stream : all_streams())
            if (stream->capture && stream->device == device)
                return refuse(*stream->capture, "cudaDeviceSynchronize", cudaErrorStreamCaptureUnsupported);
        count("sync device");
    }
    wait_while_stuck([&] {
        Lock lock(mutex);
        for (Stream* stream : all_streams())
            if (stream->device == device && is_stuck(stream->stuck)) return true;
        return false;
    });
    return cudaSuccess;
}

// Rule: an event of a capture can be neither queried nor waited for by the host; an attempt invalidates the capture.
static cudaError_t check_event(Event& event, const std::string& name) {
    Lock lock(mutex);
    if (event.capture) {
        Capture* capture = find_capture(event.capture);
        if (capture) invalidate(*capture, name + " of an event in it");
        return fail(cudaErrorCapturedEvent);
    }
    if (unsafe_call(name)) return fail(cudaErrorStreamCaptureUnsupported);
    count(name == "cudaEventSynchronize" ? "sync event" : name);
    return cudaSuccess;
}

// Rule: a wait makes a stream part of the capture of the event; a capture cannot depend on work outside it.
static cudaError_t wait_for_event(Stream& stream, Event& event) {
    Lock lock(mutex);
    if (!event.recorded) return cudaSuccess;
    count("wait event");
    if (!event.capture) {
        if (stream.capture)
            return refuse(*stream.capture, "a wait for work outside of it", cudaErrorStreamCaptureIsolation);
        if (is_stuck(event.stuck)) stream.stuck = event.stuck;
        return cudaSuccess;
    }
    Capture* capture = find_capture(event.capture);
    if (!capture) return fail(cudaErrorCapturedEvent);
    if (!capture->invalid.empty()) return fail(cudaErrorStreamCaptureInvalidated);
    if (stream.id == 0) return refuse(*capture, "the default stream waits for it", cudaErrorStreamCaptureImplicit);
    if (stream.capture && stream.capture != capture) return fail(cudaErrorStreamCaptureMerge);
    if (!stream.capture) {
        stream.capture = capture;
        stream.seen.clear();
        capture->members.insert(&stream);
    }
    for (const auto& [id, nodes] : event.seen) stream.seen[id] = std::max(stream.seen[id], nodes);
    return cudaSuccess;
}

static cudaError_t record_event(Event& event, Stream& stream) {
    Lock lock(mutex);
    if (stream.capture && !stream.capture->invalid.empty()) return fail(cudaErrorStreamCaptureInvalidated);
    count("record event");
    event.recorded = true;
    event.capture = stream.capture ? stream.capture->id : 0;
    event.seen = stream.seen;
    event.stuck = stream.stuck;
    event.time_us = now_us();
    return cudaSuccess;
}

}  // namespace fake

using namespace fake;

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int) {
    Lock lock(mutex);
    *handle = (cudaStream_t)make_stream(next_stream_id++, !(flags & cudaStreamNonBlocking));
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t* handle) {
    return cudaStreamCreateWithPriority(handle, cudaStreamDefault, 0);
}

EXPORT cudaError_t cudaStreamDestroy(cudaStream_t handle) {
    Lock lock(mutex);
    created.erase((Stream*)handle);
    delete (Stream*)handle;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
    *priority = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
    Lock lock(mutex);
    Stream& stream = stream_of(handle);
    if (stream.capture) return refuse(*stream.capture, "a query of it", cudaErrorStreamCaptureUnsupported);
    if (unsafe_call("cudaStreamQuery")) return fail(cudaErrorStreamCaptureUnsupported);
    return is_stuck(stream.stuck) ? fail(cudaErrorNotReady) : cudaSuccess;
}

EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    return sync_stream(stream_of(handle));
}

EXPORT cudaError_t cudaDeviceSynchronize() {
    return sync_device();
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    return wait_for_event(stream_of(stream), *(Event*)event);
}

EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t function, void* data, unsigned) {
    Stream& stream = stream_of(handle);
    {
        Lock lock(mutex);
        if (stream.capture) return refuse(*stream.capture, "a callback", cudaErrorStreamCaptureUnsupported);
    }
    return submit(stream, "callback", [=] { return function(handle, cudaSuccess, data), true; });
}

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
    return submit(stream_of(stream), "host function", [=] { return function(data), true; });
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    *event = (cudaEvent_t) new Event;
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) {
    return cudaEventCreateWithFlags(event, 0);
}

EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
    Lock lock(mutex);
    delete (Event*)event;
    return cudaSuccess;
}

// Rule: an external event becomes a node of a captured graph, and has the time of the last launch.
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned flags) {
    Event& event = *(Event*)handle;
    Stream& stream = stream_of(stream_handle);
    if (!(flags & cudaEventRecordExternal) || !stream.capture) return record_event(event, stream);
    return submit(stream, "event record", [&event] {
        event.recorded = true;
        event.time_us = now_us();
        return true;
    });
}

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return record_event(*(Event*)event, stream_of(stream));
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
    if (cudaError_t error = check_event(*(Event*)event, "cudaEventQuery")) return error;
    return is_stuck(((Event*)event)->stuck) ? fail(cudaErrorNotReady) : cudaSuccess;
}

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    if (cudaError_t error = check_event(*(Event*)event, "cudaEventSynchronize")) return error;
    wait_while_stuck([=] { return is_stuck(((Event*)event)->stuck); });
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    Event &from = *(Event*)begin, &to = *(Event*)end;
    if (from.capture || to.capture) return fail(cudaErrorCapturedEvent);
    *milliseconds = (float)((to.time_us - from.time_us) * 1e-3);
    return cudaSuccess;
}

// --- for tests

// The collective after `others` further ones, or the launch of a graph that contains one, never ends.
EXPORT void fake_hang(long others) {
    Lock lock(mutex);
    hang_after = others;
}
