// Memory: of the host, marked as pinned or as a device's. Copies are made when they are submitted or replayed.
#include "core.h"

#include <cstdlib>
#include <cstring>

namespace fake {

constexpr size_t ALIGNMENT = 512, TOTAL_MEMORY = 80ull << 30;

struct Block {
    size_t size;
    Kind kind;
    int device;
};
static std::map<const char*, Block> blocks;
static size_t device_bytes = 0;
static thread_local bool is_quiet = false;

bool quiet() {
    return is_quiet;
}

static const Block* block_of(const void* address) {
    auto after = blocks.upper_bound((const char*)address);
    if (after == blocks.begin()) return nullptr;
    const auto& [begin, block] = *--after;
    return (const char*)address < begin + block.size ? &block : nullptr;
}

Kind kind_of(const void* address) {
    Lock lock(mutex);
    const Block* block = block_of(address);
    return block ? block->kind : Kind::pageable;
}

// Rule: an allocation is an unsafe call during a capture (PyTorch allows it by the relaxed mode of its thread).
static cudaError_t allocate(void** address, size_t size, Kind kind, const char* name) {
    Lock lock(mutex);
    if (unsafe_call(name)) return fail(cudaErrorStreamCaptureUnsupported);
    size = size ? size : 1;
    if (kind == Kind::device && device_bytes + size > TOTAL_MEMORY) return fail(cudaErrorMemoryAllocation);
    if (posix_memalign(address, ALIGNMENT, size)) return fail(cudaErrorMemoryAllocation);
    blocks[(const char*)*address] = {size, kind, current_device()};
    if (kind == Kind::device) device_bytes += size;
    count(name);
    count(std::string("bytes ") + name, (long)size);
    return cudaSuccess;
}

static cudaError_t release(void* address, const char* name) {
    Lock lock(mutex);
    if (!address) return cudaSuccess;
    if (unsafe_call(name)) return fail(cudaErrorStreamCaptureUnsupported);
    auto found = blocks.find((const char*)address);
    if (found == blocks.end()) return fail(cudaErrorInvalidValue);
    if (found->second.kind == Kind::device) device_bytes -= found->second.size;
    count(std::string("bytes ") + name, (long)found->second.size);
    blocks.erase(found);
    free(address);
    count(name);
    return cudaSuccess;
}

// Copy, or within an operator that Python computes do nothing. The host would then read what nothing has computed: 0.
static void copy(void* to, const void* from, size_t size) {
    if (!quiet())
        memmove(to, from, size);
    else if (kind_of(to) != Kind::device && kind_of(from) == Kind::device)
        memset(to, 0, size);
}

static std::string copy_name(const void* to, const void* from) {
    static const char* names[] = {"host", "host", "device"};
    Kind source = kind_of(from), target = kind_of(to);
    bool pageable = source == Kind::pageable || target == Kind::pageable;
    return std::string("copy ") + names[(int)source] + " to " + names[(int)target] + (pageable ? ", pageable" : "");
}

}  // namespace fake

using namespace fake;

EXPORT cudaError_t cudaMalloc(void** address, size_t size) {
    return allocate(address, size, Kind::device, "cudaMalloc");
}

EXPORT cudaError_t cudaFree(void* address) {
    return release(address, "cudaFree");
}

EXPORT cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
    return allocate(address, size, Kind::pinned, "cudaHostAlloc");
}

EXPORT cudaError_t cudaFreeHost(void* address) {
    return release(address, "cudaFreeHost");
}

EXPORT cudaError_t cudaHostRegister(void* address, size_t size, unsigned) {
    Lock lock(mutex);
    blocks[(const char*)address] = {size, Kind::pinned, current_device()};
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostUnregister(void* address) {
    Lock lock(mutex);
    blocks.erase((const char*)address);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
    Lock lock(mutex);
    *free = TOTAL_MEMORY - device_bytes;
    *total = TOTAL_MEMORY;
    return cudaSuccess;
}

EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
    Lock lock(mutex);
    const Block* block = block_of(address);
    *attributes = {};
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = block ? block->device : cudaInvalidDeviceId;
    if (!block) return cudaSuccess;
    attributes->devicePointer = const_cast<void*>(address);
    attributes->type = block->kind == Kind::device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
    if (block->kind == Kind::pinned) attributes->hostPointer = const_cast<void*>(address);
    return cudaSuccess;
}

// Rule: a copy from or to pageable memory cannot be captured.
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t handle) {
    std::string name = copy_name(to, from);
    Stream& stream = stream_of(handle);
    {
        Lock lock(mutex);
        bool pageable = name.find("pageable") != std::string::npos;
        if (stream.capture && pageable) return refuse(*stream.capture, name, cudaErrorStreamCaptureUnsupported);
    }
    if (stream.capture && quiet()) return submit(stream, name);  // Python records what it does
    return submit(stream, name, [=] { return copy(to, from, size), true; });
}

EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
    return cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice, stream);
}

// Rows of `width` bytes, `pitch` bytes apart.
EXPORT cudaError_t cudaMemcpy2DAsync(
    void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t rows, cudaMemcpyKind,
    cudaStream_t handle) {
    auto work = [=] {
        for (size_t row = 0; row < rows; row++)
            copy((char*)to + row * to_pitch, (const char*)from + row * from_pitch, width);
        return true;
    };
    Stream& stream = stream_of(handle);
    if (stream.capture && quiet()) return submit(stream, copy_name(to, from));
    return submit(stream, copy_name(to, from), work);
}

EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
    {
        Lock lock(mutex);
        if (unsafe_call("cudaMemcpy")) return fail(cudaErrorStreamCaptureUnsupported);
        count("sync cudaMemcpy");
    }
    copy(to, from, size);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t handle) {
    Stream& stream = stream_of(handle);
    if (quiet()) return submit(stream, "memset");
    return submit(stream, "memset", [=] { return memset(to, value, size), true; });
}

EXPORT cudaError_t cudaMemset(void* to, int value, size_t size) {
    return cudaMemsetAsync(to, value, size, nullptr);
}

// --- for tests

EXPORT void fake_quiet(int on) {
    is_quiet = on;
}

EXPORT long fake_device_bytes() {
    Lock lock(mutex);
    return (long)device_bytes;
}
