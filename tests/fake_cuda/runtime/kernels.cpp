// Kernels: registered by name when a library is loaded; a launch is counted or captured, and computes nothing.
#include "core.h"

#include <cstdlib>

namespace fake {

static std::map<const void*, std::string> names;  // by the address of the host's stub

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
static thread_local std::vector<Configuration> pushed;

static std::string name_of(const void* function) {
    Lock lock(mutex);
    auto found = names.find(function);
    return "kernel " + (found == names.end() ? "of an unknown name" : found->second);
}

// Rule: no dimension is 0; a block has at most 1,024 threads; grids are limited in y and z.
static bool valid(const dim3& grid, const dim3& block) {
    bool empty = !grid.x || !grid.y || !grid.z || !block.x || !block.y || !block.z;
    return !empty && block.x * block.y * block.z <= 1024 && grid.y <= 65535 && grid.z <= 65535;
}

static cudaError_t launch(const void* function, const dim3& grid, const dim3& block, cudaStream_t stream) {
    if (!valid(grid, block)) return fail(cudaErrorInvalidConfiguration);
    return submit(stream_of(stream), name_of(function));
}

}  // namespace fake

using namespace fake;

// --- what nvcc's code calls

EXPORT void** __cudaRegisterFatBinary(void*) {
    return (void**)calloc(1, sizeof(void*));
}

EXPORT void __cudaRegisterFatBinaryEnd(void**) {}

EXPORT void __cudaUnregisterFatBinary(void** binary) {
    free(binary);
}

EXPORT char __cudaInitModule(void**) {
    return 1;
}

EXPORT void __cudaRegisterFunction(
    void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
    Lock lock(mutex);
    names[function] = name;
}

EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
    pushed.push_back({grid, block, shared, stream});
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    Configuration last = pushed.back();
    pushed.pop_back();
    *grid = last.grid;
    *block = last.block;
    *shared = last.shared;
    *(cudaStream_t*)stream = last.stream;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch(kernel, grid, block, stream);
}

// --- the API

EXPORT cudaError_t cudaLaunchKernel(
    const void* function, dim3 grid, dim3 block, void**, size_t, cudaStream_t stream) {
    return launch(function, grid, block, stream);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
    return launch(function, config->gridDim, config->blockDim, config->stream);
}

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    *attributes = {};
    attributes->maxThreadsPerBlock = 1024;
    attributes->numRegs = 32;
    attributes->ptxVersion = attributes->binaryVersion = 90;
    attributes->maxDynamicSharedSizeBytes = 227 << 10;
    return cudaSuccess;
}

EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) {
    return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int, size_t, unsigned) {
    *blocks = 2;
    return cudaSuccess;
}

// A device's variable: nobody reads it, since no kernel computes.
EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void*) {
    static char memory[1 << 16];
    *address = memory;
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
    return cudaSuccess;
}

// --- kernels that PyTorch compiles while it runs: the driver's functions for them; a function is its name

EXPORT int cuModuleLoadData(void** module, const void*) {
    *module = (void*)1;
    return 0;
}

EXPORT int cuModuleGetFunction(void** function, void*, const char* name) {
    *function = new std::string(name);
    return 0;
}

EXPORT int cuFuncGetAttribute(int* value, int, void*) {
    *value = 32;
    return 0;
}

EXPORT int cuFuncSetAttribute(void*, int, int) {
    return 0;
}

EXPORT int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) {
    *blocks = 2;
    return 0;
}

EXPORT int cuLaunchKernel(
    void* function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned,
    cudaStream_t stream, void**, void**) {
    if (!valid(dim3(x, y, z), dim3(block_x, block_y, block_z))) return fail(cudaErrorInvalidConfiguration);
    return submit(stream_of(stream), "kernel " + *(std::string*)function);
}
