// cuBLAS and cuBLASLt: handles, and one launch for each product. Status 0 is success, 14 an internal error.
#include "core.h"

namespace fake {

struct Handle {
    cudaStream_t stream = nullptr;
};

static int product(Handle* handle, const char* name) {
    return submit(stream_of(handle->stream), std::string("kernel ") + name) ? 14 : 0;
}

// The descriptions of matrices and products: 64 bytes that nobody reads.
static int make_description(void** description) {
    *description = new char[64]();
    return 0;
}

static int destroy_description(void* description) {
    delete[] (char*)description;
    return 0;
}

}  // namespace fake

using namespace fake;

EXPORT int cublasCreate_v2(Handle** handle) {
    *handle = new Handle;
    return 0;
}

EXPORT int cublasDestroy_v2(Handle* handle) {
    delete handle;
    return 0;
}

EXPORT int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
    handle->stream = stream;
    return 0;
}

EXPORT int cublasSetWorkspace_v2(Handle*, void*, size_t) {
    return 0;
}

#define SETTING(name)                                     \
    EXPORT int cublasSet##name(Handle*, int) { return 0; } \
    EXPORT int cublasGet##name(Handle*, int* value) {     \
        *value = 0;                                       \
        return 0;                                         \
    }
SETTING(MathMode)
SETTING(PointerMode_v2)
SETTING(SmCountTarget)

#define PRODUCT(name) \
    EXPORT int name(Handle* handle, ...) { return product(handle, #name); }
#define PRODUCTS(type)                    \
    PRODUCT(cublas##type##gemm_v2)        \
    PRODUCT(cublas##type##gemmBatched)    \
    PRODUCT(cublas##type##gemmStridedBatched) \
    PRODUCT(cublas##type##gemv_v2)        \
    PRODUCT(cublas##type##trsm_v2)        \
    PRODUCT(cublas##type##trsmBatched)    \
    PRODUCT(cublas##type##scal_v2)        \
    PRODUCT(cublas##type##axpy_v2)
PRODUCTS(S)
PRODUCTS(D)
PRODUCTS(C)
PRODUCTS(Z)
PRODUCT(cublasSdot_v2)
PRODUCT(cublasDdot_v2)
PRODUCT(cublasDotEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmStridedBatchedEx)

EXPORT int cublasLtMatmulDescCreate(void** description, int, int) {
    return make_description(description);
}

EXPORT int cublasLtMatrixLayoutCreate(void** description, int, uint64_t, uint64_t, int64_t) {
    return make_description(description);
}

EXPORT int cublasLtMatmulPreferenceCreate(void** description) {
    return make_description(description);
}

#define DESCRIPTION(name)                                                                          \
    EXPORT int cublasLt##name##Destroy(void* description) { return destroy_description(description); } \
    EXPORT int cublasLt##name##SetAttribute(void*, int, const void*, size_t) { return 0; }
DESCRIPTION(MatmulDesc)
DESCRIPTION(MatrixLayout)
DESCRIPTION(MatmulPreference)

// One algorithm that needs no workspace: its description is 64 bytes of cublasLtMatmulAlgo_t, then size, status, waves.
EXPORT int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, void* result, int* found) {
    std::fill_n((char*)result, 64 + 8 + 4 + 4 + 16, 0);
    *found = 1;
    return 0;
}

EXPORT int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
    const void*, void*, size_t, cudaStream_t stream) {
    return submit(stream_of(stream), "kernel cublasLtMatmul") ? 14 : 0;
}
