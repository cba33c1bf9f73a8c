// What the parts of the fake CUDA runtime share: streams, events, captures, recordings, counters.
//
// Work is done when it is submitted, in the order in which the host submits it. So a stream is always ready, unless a
// collective on it waits for a peer that never answers ("stuck").
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

using Lock = std::lock_guard<std::recursive_mutex>;
extern std::recursive_mutex mutex;  // never held while work runs: work may call Python, or wait for another process

// What a node of a graph does at a launch of the graph; false if it failed.
using Work = std::function<bool()>;

// By stream, how many captured nodes happened before.
using Clock = std::map<int, long>;

// What a capture recorded. Graph and executable graph share it.
struct Recording {
    uint64_t id = 0;
    std::vector<std::string> nodes;
    std::vector<Work> work;       // of those nodes that do something
    std::set<void*> comms;        // NCCL communicators whose collectives it contains

    Recording();
    ~Recording();
};

struct Stream;

struct Capture {
    uint64_t id = 0;
    Stream* origin = nullptr;
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    long thread = 0;
    std::string invalid;  // why it was invalidated; empty while it is valid
    Clock issued;
    std::set<Stream*> members;
    std::shared_ptr<Recording> recording = std::make_shared<Recording>();
};

struct Stream {
    int id = 0;
    int device = 0;
    bool blocking = false;  // synchronizes with the legacy stream
    Capture* capture = nullptr;
    Clock seen;
    long stuck = 0;  // see is_stuck
};

struct Event {
    bool recorded = false;
    uint64_t capture = 0;  // id of the capture in which it was last recorded
    Clock seen;
    long stuck = 0;
    double time_us = 0;
};

// --- counters (counters.cpp)
void count(const std::string& what, long n = 1);
void note(const std::string& text);       // a fact for a test to read
void violation(const std::string& text);  // a rule that the program broke: also on standard error
cudaError_t fail(cudaError_t error);      // what cudaGetLastError returns next
double now_us();
long thread_id();

// --- devices (devices.cpp)
int current_device();

// --- streams and captures (streams.cpp, capture.cpp)
Stream& stream_of(cudaStream_t handle);
std::vector<Stream*> all_streams();
Capture* find_capture(uint64_t id);
bool any_capture();
void invalidate(Capture& capture, const std::string& why);
cudaError_t refuse(Capture& capture, const std::string& why, cudaError_t error);
bool unsafe_call(const std::string& name);
cudaError_t submit(Stream& stream, const std::string& name, Work work = {});
std::vector<std::string> last_nodes();

// --- a peer that never answers (streams.cpp)
bool is_stuck(long stuck);
void stick(Stream& stream);
void release_stuck();       // NCCL's abort ends the kernels that wait
bool wait_while_stuck(const std::function<bool()>& stuck);
bool hang_now();            // whether this collective is the one that never ends

// --- memory (memory.cpp)
enum class Kind { pageable, pinned, device };
Kind kind_of(const void* address);
bool quiet();  // the Python mode computes: the copies within an operator move nothing

// --- graphs (capture.cpp)
bool live_recording_with(void* comm);

}  // namespace fake
