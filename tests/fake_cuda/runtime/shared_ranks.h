// Ranks that meet in shared memory: the part of NCCL that moves bytes between processes.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace fake {

constexpr int MOST_RANKS = 16;
constexpr size_t CHUNK = 1 << 20;  // bytes that a rank posts at once

// What a rank posts: the call that it is in, and a chunk of its data.
struct Post {
    std::atomic<uint64_t> posted, finished;
    char call[160];
};

struct Segment {
    std::atomic<uint32_t> attached, failed;
    Post posts[MOST_RANKS];
    char data[MOST_RANKS][CHUNK];  // pages that nobody touches take no memory
};

class SharedRanks {
  public:
    // Attach to the segment `name` and wait until all ranks did.
    SharedRanks(const std::string& name, int rank, int size, std::atomic<bool>& aborted);
    ~SharedRanks();

    // Post up to CHUNK bytes as part of `call`, wait for the other ranks' posts and let `use` read them. Return false,
    // after a message, if another rank is in another call or does not come, and silently after an abort.
    bool exchange(const std::string& call, const void* data, size_t bytes, const std::function<void()>& use);

    const char* posted_by(int rank) const { return segment->data[rank]; }

    const int rank, size;

  private:
    bool wait(const std::function<bool()>& ready, const std::string& call);
    bool same_call(const std::string& call);
    std::string absent(uint64_t step) const;

    const std::string name;
    std::atomic<bool>& aborted;
    uint64_t step = 0;
    Segment* segment = nullptr;
};

}  // namespace fake
