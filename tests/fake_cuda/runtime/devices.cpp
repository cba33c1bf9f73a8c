// Devices: FAKE_CUDA_DEVICES of them (1 unless set), of which CUDA_VISIBLE_DEVICES shows some.
#include "core.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>

namespace fake {

constexpr size_t TOTAL_MEMORY = 80ull << 30;
static thread_local int device = 0;

int current_device() {
    return device;
}

// The UUID of a physical device: the same in every process, another one for every device.
static std::string uuid_bytes(int physical) {
    std::string bytes = "fake-cuda-gpu-";
    bytes += char('0' + physical / 10);
    bytes += char('0' + physical % 10);
    return bytes;
}

static std::string uuid_text(int physical) {
    std::string text = "GPU-";
    for (int i = 0; i < 16; i++) {
        char digits[3];
        snprintf(digits, sizeof digits, "%02x", (unsigned char)uuid_bytes(physical)[i]);
        text += digits;
        if (i == 3 || i == 5 || i == 7 || i == 9) text += "-";
    }
    return text;
}

// Return the device that an entry of CUDA_VISIBLE_DEVICES names, by its number or the begin of its UUID, or -1.
static int named_device(const std::string& entry, int devices) {
    if (entry.rfind("GPU-", 0) == 0) {
        for (int i = 0; i < devices; i++)
            if (uuid_text(i).rfind(entry, 0) == 0) return i;
        return -1;
    }
    char* end = nullptr;
    long number = strtol(entry.c_str(), &end, 10);
    return end == entry.c_str() || *end || number < 0 || number >= devices ? -1 : (int)number;
}

// Rule: the list ends at its first invalid entry; an empty list shows no device; the process reads it once.
static std::vector<int> read_visible() {
    const char* wanted = getenv("FAKE_CUDA_DEVICES");
    int devices = wanted ? atoi(wanted) : 1;
    std::vector<int> visible;
    const char* list = getenv("CUDA_VISIBLE_DEVICES");
    if (!list) {
        for (int i = 0; i < devices; i++) visible.push_back(i);
        return visible;
    }
    std::istringstream entries(list);
    for (std::string entry; std::getline(entries, entry, ',');) {
        int found = named_device(entry, devices);
        if (found < 0) break;
        visible.push_back(found);
    }
    return visible;
}

static const std::vector<int>& visible_devices() {
    static const std::vector<int> visible = read_visible();
    return visible;
}

static bool exists(int number) {
    return number >= 0 && number < (int)visible_devices().size();
}

}  // namespace fake

using namespace fake;

EXPORT cudaError_t cudaGetDeviceCount(int* n) {
    *n = (int)visible_devices().size();
    return *n ? cudaSuccess : fail(cudaErrorNoDevice);
}

EXPORT cudaError_t cudaGetDevice(int* number) {
    *number = device;
    return cudaSuccess;
}

EXPORT cudaError_t cudaSetDevice(int number) {
    if (!exists(number)) return fail(cudaErrorInvalidDevice);
    device = number;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDriverGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int number) {
    if (!exists(number)) return fail(cudaErrorInvalidDevice);
    cudaDeviceProp p = {};
    int physical = visible_devices()[number];
    snprintf(p.name, sizeof p.name, "Fake GPU");
    memcpy(p.uuid.bytes, uuid_bytes(physical).data(), 16);
    p.pciBusID = physical + 1;
    p.major = 9;  // as an H100
    p.totalGlobalMem = TOTAL_MEMORY;
    p.multiProcessorCount = 132;
    p.warpSize = 32;
    p.maxThreadsPerBlock = p.maxThreadsDim[0] = p.maxThreadsDim[1] = 1024;
    p.maxThreadsDim[2] = 64;
    p.maxGridSize[0] = 2147483647;
    p.maxGridSize[1] = p.maxGridSize[2] = 65535;
    p.maxThreadsPerMultiProcessor = 2048;
    p.maxBlocksPerMultiProcessor = 32;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.sharedMemPerBlock = 48 << 10;
    p.sharedMemPerBlockOptin = 227 << 10;
    p.sharedMemPerMultiprocessor = 228 << 10;
    p.totalConstMem = 64 << 10;
    p.l2CacheSize = 50 << 20;
    p.textureAlignment = 512;
    p.concurrentKernels = p.unifiedAddressing = p.cooperativeLaunch = 1;
    p.asyncEngineCount = 3;
    *properties = p;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
    cudaDeviceProp p;
    if (cudaError_t error = cudaGetDeviceProperties(&p, number)) return error;
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
        case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
        case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
        case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
        case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
        case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
        case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
        case cudaDevAttrWarpSize: *value = p.warpSize; break;
        case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
        default: *value = 0;
    }
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int number) {
    if (!exists(number)) return fail(cudaErrorInvalidDevice);
    snprintf(text, length, "0000:%02x:00.0", visible_devices()[number] + 1);
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
    *can = 0;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

EXPORT cudaError_t cudaProfilerStart() {
    return cudaSuccess;
}

EXPORT cudaError_t cudaProfilerStop() {
    return cudaSuccess;
}

// No function of the driver: PyTorch then does without virtual memory and multicast.
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(
    const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
    *function = nullptr;
    if (result) *result = cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

// --- the driver (libcuda.so.1 is this library, by its soname): what PyTorch calls to see whether a context exists

EXPORT int cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
    *flags = 0;
    *active = 1;
    return 0;
}

EXPORT int cuCtxGetCurrent(void** context) {
    *context = (void*)1;
    return 0;
}

EXPORT int cuDevicePrimaryCtxRetain(void** context, int) {
    *context = (void*)1;
    return 0;
}

EXPORT int cuCtxSetCurrent(void*) {
    return 0;
}
