// Counters and notes, and the functions with which a test reads them.
#include "core.h"

#include <cxxabi.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>

namespace fake {

std::recursive_mutex mutex;

static std::map<std::string, long> counts;
static std::vector<std::string> notes;
static thread_local cudaError_t last_error = cudaSuccess;
constexpr size_t MOST_NOTES = 500;

void count(const std::string& what, long n) {
    Lock lock(mutex);
    counts[what] += n;
}

void note(const std::string& text) {
    Lock lock(mutex);
    if (notes.size() < MOST_NOTES) notes.push_back(text);
    if (getenv("FAKE_CUDA_TRACE")) fprintf(stderr, "fake CUDA [%ld]: %s\n", thread_id(), text.c_str());
}

void violation(const std::string& text) {
    note(text);
    fprintf(stderr, "fake CUDA: %s\n", text.c_str());
}

cudaError_t fail(cudaError_t error) {
    last_error = error;
    if (error != cudaErrorNotReady) note("error " + std::to_string(error) + ": " + cudaGetErrorString(error));
    return error;
}

double now_us() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec * 1e-3;
}

long thread_id() {
    return syscall(SYS_gettid);
}

// Return the name of a thing that was counted; of a kernel, as in its source.
static std::string readable(const std::string& what) {
    if (what.rfind("kernel ", 0) != 0) return what;
    int status = 0;
    char* text = abi::__cxa_demangle(what.c_str() + 7, nullptr, nullptr, &status);
    std::string result = status == 0 ? std::string("kernel ") + text : what;
    free(text);
    return result;
}

// Return the lines in memory that lasts until the thread's next call.
static const char* joined(const std::vector<std::string>& lines) {
    static thread_local std::string text;
    text.clear();
    for (const std::string& line : lines) text += line + "\n";
    return text.c_str();
}

}  // namespace fake

using namespace fake;

EXPORT cudaError_t cudaGetLastError() {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

EXPORT cudaError_t cudaPeekAtLastError() {
    return last_error;
}

EXPORT const char* cudaGetErrorString(cudaError_t error) {
    switch (error) {
        case cudaSuccess: return "no error";
        case cudaErrorInvalidValue: return "invalid argument";
        case cudaErrorMemoryAllocation: return "out of memory";
        case cudaErrorInvalidConfiguration: return "invalid configuration argument";
        case cudaErrorInvalidDevice: return "invalid device ordinal";
        case cudaErrorNoDevice: return "no CUDA-capable device is detected";
        case cudaErrorNotReady: return "device not ready";
        case cudaErrorIllegalState: return "the operation cannot be performed in the present state";
        case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
        case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
        case cudaErrorStreamCaptureMerge: return "operation would result in a merge of separate capture sequences";
        case cudaErrorStreamCaptureUnmatched: return "capture was not ended in the same stream as it began";
        case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
        case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
        case cudaErrorStreamCaptureImplicit: return "operation would make the legacy stream depend on a capturing one";
        case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
        case cudaErrorStreamCaptureWrongThread: return "attempt to terminate a thread-local capture in another thread";
        default: return "an error of the fake CUDA runtime";
    }
}

EXPORT const char* cudaGetErrorName(cudaError_t error) {
    static thread_local std::string name;
    name = "cudaError " + std::to_string(error);
    return name.c_str();
}

// --- for tests

EXPORT void fake_reset() {
    Lock lock(mutex);
    counts.clear();
    notes.clear();
}

EXPORT const char* fake_counts() {
    Lock lock(mutex);
    std::vector<std::string> lines;
    for (const auto& [what, n] : counts) lines.push_back(readable(what) + "\t" + std::to_string(n));
    return joined(lines);
}

EXPORT const char* fake_notes() {
    Lock lock(mutex);
    return joined(notes);
}

EXPORT const char* fake_nodes() {
    Lock lock(mutex);
    std::vector<std::string> lines;
    for (const std::string& node : last_nodes()) lines.push_back(readable(node));
    return joined(lines);
}
