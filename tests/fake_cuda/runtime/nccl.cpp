// NCCL: collectives that move real numbers, within the process or, with several ranks, through shared memory.
//
// Rules: all ranks call the same collectives in the same order; a collective is captured by all ranks or by none; a
// communicator is not destroyed while a graph contains its collectives; destroy waits for the work, abort does not.
#include <unistd.h>

#include <cstring>
#include <random>

#include "core.h"
#include "shared_ranks.h"

namespace fake {

enum Result { SUCCESS = 0, UNHANDLED_CUDA_ERROR = 1, INVALID_ARGUMENT = 4, INVALID_USAGE = 5 };
enum Type { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16, TYPES };
enum Operation { SUM, PRODUCT, MAX, MIN, AVERAGE };
static const size_t SIZES[TYPES] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
static const char* const TYPE_NAMES[TYPES] = {
    "int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "bfloat16"};

struct Id {
    char bytes[128];
};

struct Comm {
    std::string name;
    int rank, size, device, splits = 0;
    std::atomic<bool> aborted{false}, failed{false};
    std::unique_ptr<SharedRanks> ranks = nullptr;  // none if there is one rank
};

// --- reduction, in the order of the ranks

struct BFloat16 {
    uint16_t bits;

    operator float() const {
        uint32_t wide = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &wide, 4);
        return value;
    }

    // Round to nearest, ties to even.
    BFloat16& operator=(float value) {
        uint32_t wide;
        memcpy(&wide, &value, 4);
        bits = value != value ? 0x7fc0 : (uint16_t)((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
        return *this;
    }
};

template <class Wide>
static Wide combine(Wide a, Wide b, int operation) {
    switch (operation) {
        case PRODUCT: return a * b;
        case MAX: return std::max(a, b);
        case MIN: return std::min(a, b);
        default: return a + b;
    }
}

// Low precision is accumulated in Wide and rounded once.
template <class T, class Wide = T>
static void reduce_as(const SharedRanks& ranks, size_t offset, void* out, size_t n, int operation) {
    for (size_t i = 0; i < n; i++) {
        Wide sum = ((const T*)(ranks.posted_by(0) + offset))[i];
        for (int r = 1; r < ranks.size; r++)
            sum = combine<Wide>(sum, ((const T*)(ranks.posted_by(r) + offset))[i], operation);
        ((T*)out)[i] = operation == AVERAGE ? sum / (Wide)ranks.size : sum;
    }
}

static void reduce_posts(const SharedRanks& ranks, void* out, size_t n, int type, int operation) {
    switch (type) {
        case INT8: return reduce_as<int8_t>(ranks, 0, out, n, operation);
        case UINT8: return reduce_as<uint8_t>(ranks, 0, out, n, operation);
        case INT32: return reduce_as<int32_t>(ranks, 0, out, n, operation);
        case UINT32: return reduce_as<uint32_t>(ranks, 0, out, n, operation);
        case INT64: return reduce_as<int64_t>(ranks, 0, out, n, operation);
        case UINT64: return reduce_as<uint64_t>(ranks, 0, out, n, operation);
        case FLOAT16: return reduce_as<_Float16, float>(ranks, 0, out, n, operation);
        case FLOAT32: return reduce_as<float>(ranks, 0, out, n, operation);
        case FLOAT64: return reduce_as<double>(ranks, 0, out, n, operation);
        case BFLOAT16: return reduce_as<BFloat16, float>(ranks, 0, out, n, operation);
    }
}

// --- collectives

// What a rank's call is compared by, and the data that it moves.
struct Call {
    std::string name;
    const void* from;
    void* to;
    size_t n;
    int type, operation, root;
    Comm* comm;
};

static std::string describe(const Call& call, bool captured) {
    return call.name + " of " + std::to_string(call.n) + " " + TYPE_NAMES[call.type] + ", operation " +
           std::to_string(call.operation) + ", root " + std::to_string(call.root) + (captured ? ", in a graph" : "");
}

using Collective = bool (*)(const Call& call, const std::string& text);

// Call `part` for the parts of n elements that fit a chunk.
static bool in_chunks(const Call& call, const std::function<bool(size_t begin, size_t n)>& part) {
    size_t most = CHUNK / SIZES[call.type];
    for (size_t begin = 0; begin < call.n; begin += most)
        if (!part(begin, std::min(most, call.n - begin))) return false;
    return true;
}

static bool all_reduce(const Call& call, const std::string& text) {
    size_t size = SIZES[call.type];
    SharedRanks& ranks = *call.comm->ranks;
    return in_chunks(call, [&](size_t begin, size_t n) {
        bool wanted = call.root < 0 || call.root == ranks.rank;
        return ranks.exchange(text, (const char*)call.from + begin * size, n * size, [&] {
            if (wanted) reduce_posts(ranks, (char*)call.to + begin * size, n, call.type, call.operation);
        });
    });
}

static bool broadcast(const Call& call, const std::string& text) {
    size_t size = SIZES[call.type];
    SharedRanks& ranks = *call.comm->ranks;
    return in_chunks(call, [&](size_t begin, size_t n) {
        return ranks.exchange(text, (const char*)call.from + begin * size, ranks.rank == call.root ? n * size : 0, [&] {
            memcpy((char*)call.to + begin * size, ranks.posted_by(call.root), n * size);
        });
    });
}

static bool all_gather(const Call& call, const std::string& text) {
    size_t size = SIZES[call.type];
    SharedRanks& ranks = *call.comm->ranks;
    return in_chunks(call, [&](size_t begin, size_t n) {
        return ranks.exchange(text, (const char*)call.from + begin * size, n * size, [&] {
            for (int r = 0; r < ranks.size; r++)
                memcpy((char*)call.to + (r * call.n + begin) * size, ranks.posted_by(r), n * size);
        });
    });
}

static bool reduce_scatter(const Call& call, const std::string& text) {
    size_t size = SIZES[call.type];
    SharedRanks& ranks = *call.comm->ranks;
    for (int target = 0; target < ranks.size; target++) {
        bool good = in_chunks(call, [&](size_t begin, size_t n) {
            const char* from = (const char*)call.from + (target * call.n + begin) * size;
            return ranks.exchange(text, from, n * size, [&] {
                if (target == ranks.rank)
                    reduce_posts(ranks, (char*)call.to + begin * size, n, call.type, call.operation);
            });
        });
        if (!good) return false;
    }
    return true;
}

static bool run_collective(const Call& call, Collective collective, const std::string& text) {
    if (!call.comm->ranks) {
        if (call.to && call.from != call.to) memmove(call.to, call.from, call.n * SIZES[call.type]);
        return true;
    }
    if (collective(call, text) || call.comm->aborted) return true;
    call.comm->failed = true;
    return false;
}

static int submit_collective(const Call& call, cudaStream_t handle, Collective collective) {
    bool reduces = collective == all_reduce || collective == reduce_scatter;
    if (call.type >= TYPES || (reduces && call.operation > AVERAGE)) return INVALID_ARGUMENT;
    Stream& stream = stream_of(handle);
    bool captured;
    {
        Lock lock(mutex);
        captured = stream.capture;
        if (captured) stream.capture->recording->comms.insert(call.comm);
        if (!captured && hang_now()) stick(stream);
    }
    std::string text = describe(call, captured);
    auto work = [=] { return run_collective(call, collective, text); };
    return submit(stream, call.name, work) ? UNHANDLED_CUDA_ERROR : SUCCESS;
}

// --- communicators

static Comm* make_comm(const std::string& name, int rank, int size) {
    Comm* comm = new Comm{name, rank, size, current_device()};
    if (size > 1) comm->ranks = std::make_unique<SharedRanks>(name, rank, size, comm->aborted);
    note("communicator of " + std::to_string(size));
    return comm;
}

static std::string name_of(const Id& id) {
    return "fake-nccl-" + std::string(id.bytes);
}

// Rule: destroy waits until the work of the communicator is done.
static int finish(Comm& comm) {
    if (live_recording_with(&comm)) violation("ncclCommDestroy while a graph contains collectives of the communicator");
    wait_while_stuck([] {
        Lock lock(mutex);
        for (Stream* stream : all_streams())
            if (is_stuck(stream->stuck)) return true;
        return false;
    });
    return SUCCESS;
}

// The members of a new communicator: those with this rank's color, ordered by key.
static int split(Comm& parent, int color, int key, Comm** child) {
    int own[2] = {color, key}, rank = 0, size = 0;
    std::string name = parent.name + "-" + std::to_string(parent.splits++) + "-" + std::to_string(color);
    auto use = [&] {
        for (int r = 0; r < parent.size; r++) {
            const int* other = (const int*)parent.ranks->posted_by(r);
            if (other[0] != color) continue;
            size++;
            rank += other[1] < key || (other[1] == key && r < parent.rank);
        }
    };
    if (!parent.ranks) size = 1;
    else if (!parent.ranks->exchange("ncclCommSplit", own, sizeof own, use)) return INVALID_USAGE;
    *child = color < 0 ? nullptr : make_comm(name, rank, size);
    return SUCCESS;
}

}  // namespace fake

using namespace fake;

EXPORT int ncclGetVersion(int* version) {
    *version = 22800;
    return SUCCESS;
}

EXPORT int ncclGetUniqueId(Id* id) {
    std::random_device random;
    snprintf(id->bytes, sizeof id->bytes, "%d-%08x%08x", getpid(), random(), random());
    return SUCCESS;
}

EXPORT int ncclCommInitRank(Comm** comm, int size, Id id, int rank) {
    if (size > MOST_RANKS) return INVALID_ARGUMENT;
    *comm = make_comm(name_of(id), rank, size);
    return SUCCESS;
}

EXPORT int ncclCommInitRankConfig(Comm** comm, int size, Id id, int rank, void*) {
    return ncclCommInitRank(comm, size, id, rank);
}

EXPORT int ncclCommInitRankScalable(Comm** comm, int size, int rank, int, Id* ids, void*) {
    return ncclCommInitRank(comm, size, ids[0], rank);
}

EXPORT int ncclCommSplit(Comm* parent, int color, int key, Comm** child, void*) {
    return split(*parent, color, key, child);
}

EXPORT int ncclCommFinalize(Comm*) {
    return SUCCESS;
}

EXPORT int ncclCommDestroy(Comm* comm) {
    note("ncclCommDestroy");
    finish(*comm);
    delete comm;
    return SUCCESS;
}

// Rule: an abort ends the kernels that wait for a peer. The communicator stays: graphs may still name it.
EXPORT int ncclCommAbort(Comm* comm) {
    note("ncclCommAbort");
    comm->aborted = true;
    release_stuck();
    return SUCCESS;
}

EXPORT int ncclCommRevoke(Comm* comm, int) {
    return ncclCommAbort(comm);
}

EXPORT int ncclCommGetAsyncError(Comm* comm, int* error) {
    *error = comm->failed ? INVALID_USAGE : SUCCESS;
    return SUCCESS;
}

EXPORT int ncclCommCount(const Comm* comm, int* size) {
    *size = comm->size;
    return SUCCESS;
}

EXPORT int ncclCommUserRank(const Comm* comm, int* rank) {
    *rank = comm->rank;
    return SUCCESS;
}

EXPORT int ncclCommCuDevice(const Comm* comm, int* device) {
    *device = comm->device;
    return SUCCESS;
}

EXPORT int ncclCommRegister(Comm*, void*, size_t, void** handle) {
    *handle = nullptr;
    return SUCCESS;
}

EXPORT int ncclCommDeregister(Comm*, void*) {
    return SUCCESS;
}

EXPORT int ncclGroupStart() {
    return SUCCESS;
}

EXPORT int ncclGroupEnd() {
    return SUCCESS;
}

EXPORT const char* ncclGetErrorString(int result) {
    return result == SUCCESS ? "no error" : "an error of the fake NCCL; see its line on standard error";
}

EXPORT const char* ncclGetLastError(const Comm*) {
    return "";
}

// --- collectives; root -1: the result is for all ranks

EXPORT int ncclAllReduce(
    const void* from, void* to, size_t n, int type, int operation, Comm* comm, cudaStream_t stream) {
    return submit_collective({"ncclAllReduce", from, to, n, type, operation, -1, comm}, stream, all_reduce);
}

EXPORT int ncclReduce(
    const void* from, void* to, size_t n, int type, int operation, int root, Comm* comm, cudaStream_t stream) {
    return submit_collective({"ncclReduce", from, to, n, type, operation, root, comm}, stream, all_reduce);
}

EXPORT int ncclBroadcast(
    const void* from, void* to, size_t n, int type, int root, Comm* comm, cudaStream_t stream) {
    return submit_collective({"ncclBroadcast", from, to, n, type, 0, root, comm}, stream, broadcast);
}

EXPORT int ncclBcast(void* data, size_t n, int type, int root, Comm* comm, cudaStream_t stream) {
    return ncclBroadcast(data, data, n, type, root, comm, stream);
}

EXPORT int ncclAllGather(const void* from, void* to, size_t n, int type, Comm* comm, cudaStream_t stream) {
    return submit_collective({"ncclAllGather", from, to, n, type, 0, -1, comm}, stream, all_gather);
}

EXPORT int ncclReduceScatter(
    const void* from, void* to, size_t n, int type, int operation, Comm* comm, cudaStream_t stream) {
    return submit_collective({"ncclReduceScatter", from, to, n, type, operation, -1, comm}, stream, reduce_scatter);
}

// What the fake does not have yet: better a message than a call of the real library.
#define MISSING(name)                            \
    EXPORT int name() {                          \
        violation(#name " is not in the fake NCCL"); \
        return INVALID_USAGE;                    \
    }
MISSING(ncclSend)
MISSING(ncclRecv)
MISSING(ncclAlltoAll)
MISSING(ncclGather)
MISSING(ncclScatter)
MISSING(ncclRedOpCreatePreMulSum)
MISSING(ncclRedOpDestroy)
MISSING(ncclCommShrink)
MISSING(ncclCommGrow)
MISSING(ncclCommWindowRegister)
MISSING(ncclCommWindowDeregister)
MISSING(ncclMemAlloc)
MISSING(ncclMemFree)
MISSING(ncclCommInitAll)
