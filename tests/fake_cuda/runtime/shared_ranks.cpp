#include "shared_ranks.h"

#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "core.h"

namespace fake {

static double limit_us() {
    const char* seconds = getenv("FAKE_CUDA_TIMEOUT_S");
    return (seconds ? atof(seconds) : 60) * 1e6;
}

SharedRanks::SharedRanks(const std::string& name, int rank, int size, std::atomic<bool>& aborted)
    : rank(rank), size(size), name("/" + name), aborted(aborted) {
    int file = shm_open(this->name.c_str(), O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, sizeof(Segment))) {
        violation("no shared memory " + this->name + ": " + strerror(errno));
        abort();
    }
    segment = (Segment*)mmap(nullptr, sizeof(Segment), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    segment->attached++;
    wait([this] { return (int)segment->attached >= this->size; }, "the start of a communicator");
    if (rank == 0) shm_unlink(this->name.c_str());
}

SharedRanks::~SharedRanks() {
    munmap(segment, sizeof(Segment));
}

std::string SharedRanks::absent(uint64_t step) const {
    std::string ranks;
    for (int r = 0; r < size; r++)
        if (segment->posts[r].posted < step) ranks += " " + std::to_string(r);
    return ranks;
}

bool SharedRanks::wait(const std::function<bool()>& ready, const std::string& call) {
    double end = now_us() + limit_us();
    for (int spins = 0; !ready(); spins++) {
        if (aborted || segment->failed) return false;
        if (now_us() > end) {
            segment->failed = 1;
            violation("rank " + std::to_string(rank) + " waits in " + call + " for rank" + absent(step));
            return false;
        }
        spins < 100 ? (void)sched_yield() : (void)usleep(50);
    }
    return true;
}

bool SharedRanks::same_call(const std::string& call) {
    for (int r = 0; r < size; r++) {
        if (call == segment->posts[r].call) continue;
        segment->failed = 1;
        violation("collective " + std::to_string(step) + ": rank " + std::to_string(rank) + " is in " + call + ", rank " +
                  std::to_string(r) + " in " + segment->posts[r].call);
        return false;
    }
    return true;
}

bool SharedRanks::exchange(
    const std::string& call, const void* data, size_t bytes, const std::function<void()>& use) {
    Post& own = segment->posts[rank];
    step++;
    snprintf(own.call, sizeof own.call, "%s", call.c_str());
    memcpy(segment->data[rank], data, bytes);
    own.posted = step;
    auto all = [this](auto counter) {
        for (int r = 0; r < size; r++)
            if ((segment->posts[r].*counter) < step) return false;
        return true;
    };
    if (!wait([&] { return all(&Post::posted); }, call) || !same_call(call)) return false;
    use();
    own.finished = step;
    return wait([&] { return all(&Post::finished); }, call);  // then a rank may post again
}

}  // namespace fake
