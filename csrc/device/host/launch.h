// Runs a kernel: starts blocks, switches between their threads, and sees when nothing moves any more.
#pragma once

#include "access.h"
#include "cluster.h"

namespace device {
namespace host {

inline void thread_main() {
  for (;;) {
    machine.body();
    machine.thread->state = State::done;
    ++machine.steps;
    leave(machine.thread->fiber);
  }
}

// Fisher and Yates's shuffle with SplitMix64's numbers: std::shuffle gives other orders in other libraries.
template <class T>
inline void mix(std::vector<T>& items, uint64_t& state) {
  for (size_t left = items.size(); left > 1; --left) {
    uint64_t z = state += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    std::swap(items[left - 1], items[(z ^ (z >> 31)) % left]);
  }
}

class Launch {
 public:
  explicit Launch(bool cooperative) : random_(machine.seed) {
    total_ = static_cast<int64_t>(machine.grid.x) * machine.grid.y * machine.grid.z;
    resident_ = cooperative ? total_ : machine.resident;
    machine.ledgers.assign(total_, Ledger());
    machine.releases.clear();
    for (auto& buffer : machine.buffers) buffer->track();
    if (machine.engine) machine.engine->begin();
    const int64_t clusters = total_ / machine.cluster_blocks;
    for (int64_t i = 0; i < clusters; ++i) order_.push_back(machine.order == 1 ? clusters - 1 - i : i);
    if (machine.order == 2) mix(order_, random_);
  }

  // A mistake that was found: machine.failed and machine.report.
  void run() {
    machine.failed = false;
    while (!machine.failed) {
      while (static_cast<int64_t>(live_.size()) < resident_ && next_ < order_.size()) start_cluster(order_[next_++]);
      if (live_.empty()) break;
      round();
    }
    machine.thread = nullptr, machine.block = nullptr;
    if (!machine.failed) return;
    for (Block* block : blocks()) {  // their threads stand in the middle of a kernel: their stacks begin anew
      for (auto& thread : block->threads) thread->fiber.entered = false;
    }
    while (!live_.empty()) retire(live_.size() - 1);
  }

 private:
  void start_cluster(int64_t index) {
    const int count = machine.cluster_blocks;
    live_.push_back(std::make_unique<Cluster>());
    Cluster& cluster = *live_.back();
    for (int rank = 0; rank < count; ++rank) {
      cluster.blocks.push_back(start(index * count + rank));
      cluster.blocks[rank]->cluster = &cluster, cluster.blocks[rank]->rank = rank;
    }
    cluster.live = count;
    cluster.arrived.resize(count), cluster.places.resize(count), cluster.remote.resize(count);
  }

  std::vector<Block*> blocks() const {
    std::vector<Block*> all;
    for (auto& cluster : live_) {
      for (auto& block : cluster->blocks) all.push_back(block.get());
    }
    return all;
  }

  std::unique_ptr<Block> start(int64_t index) {
    auto block = std::make_unique<Block>();
    block->index = index;
    block->x = static_cast<int>(index % machine.grid.x);
    block->y = static_cast<int>(index / machine.grid.x % machine.grid.y);
    block->z = static_cast<int>(index / machine.grid.x / machine.grid.y);
    block->live = machine.block_threads;
    for (int i = 0; i < machine.block_threads; ++i) {
      if (machine.idle.empty()) machine.idle.push_back(std::make_unique<Thread>());
      block->threads.push_back(std::move(machine.idle.back()));
      machine.idle.pop_back();
    }
    block->slots = machine.block_threads + (machine.engine ? kAgents : 0);
    const uint32_t* nothing = block->snapshot();
    for (int i = 0; i < machine.block_threads; ++i) {
      Thread& thread = *block->threads[i];
      thread.id = i, thread.state = State::ready, thread.clock = 1, thread.known = nothing;
      thread.barrier = -1, thread.mask = 0, thread.object = nullptr, thread.proxied[0] = thread.proxied[1] = Proxied();
      thread.phase = 0, thread.arrived = thread.waits_for_cluster = false;
    }
    block->meetings.resize(block->threads.size() / 32);
    make_shared(block->dynamic, "dynamic_shared", index, machine.shared_bytes);
    block->shared_bytes = machine.shared_bytes;
    return block;
  }

  void retire(size_t at) {
    for (auto& block : live_[at]->blocks) {
      for (auto& thread : block->threads) machine.idle.push_back(std::move(thread));
    }
    live_.erase(live_.begin() + at);
  }

  // Lets every thread that can go on go on once.
  void round() {
    const uint64_t before = machine.steps;
    bool ran = false;
    turns_.clear();
    for (Block* block : blocks()) {
      for (auto& thread : block->threads) {
        if (thread->state != State::done) turns_.push_back({block, thread.get()});
      }
    }
    if (machine.order == 1) std::reverse(turns_.begin(), turns_.end());
    if (machine.order == 2) mix(turns_, random_);
    for (auto [block, thread] : turns_) {
      if (thread->state == State::waiting) continue;
      ran |= thread->state == State::ready;
      machine.block = block, machine.thread = thread;
      enter(thread->fiber, thread_main);
      if (machine.failed) return;
      if (thread->state == State::done && --block->live == 0) {
        --block->cluster->live;
        check_returned(*block);
        if (machine.failed) return;
      }
    }
    for (size_t i = live_.size(); i-- > 0;) {
      if (live_[i]->live) continue;
      for (auto& block : live_[i]->blocks) {
        if (machine.engine) machine.engine->end(*block);
        if (machine.failed) return;
      }
      retire(i);
    }
    if (ran || turns_.empty() || machine.steps != before) return;
    if (!machine.engine || !machine.engine->advance()) stuck();
  }

  // Nobody can go on: says who waits where.
  void stuck() {
    std::string text;
    Where first;
    for (Block* block : blocks()) {
      std::map<std::string, std::vector<int>> groups;
      for (auto& thread : block->threads) {
        std::string group = "have returned";
        if (thread->state != State::done) {
          first = thread->at;
          group = format("wait in %s at %s", thread->what, place(thread->at).c_str());
          if (thread->barrier >= 0) {
            const Barrier& barrier = block->barriers[thread->barrier];
            group += format(" (barrier %d: %zu of %d have come)", thread->barrier, barrier.arrivals.size(), barrier.count);
          }
          if (thread->waits_for_cluster) group += arrivals_of(*block->cluster);
          if (thread->mask) group += " for lanes " + lanes(thread->mask);
          if (thread->object) group += machine.engine->waits_for(*thread);
        }
        groups[group].push_back(thread->id);
      }
      for (auto& [group, threads] : groups) text += "\n  " + who(*block) + ", threads " + ranges(threads) + " " + group;
    }
    const size_t left = (order_.size() - next_) * machine.cluster_blocks;
    if (left) text += format("\n  %zu blocks have not begun", left);
    machine.report = place(first) + ": every thread waits for ever:" + text;
    machine.failed = true;
  }

 public:
  static void make_shared(Region& region, const char* name, int64_t owner, size_t bytes) {
    region.name = name;
    region.shared = true;
    region.owner = owner;
    region.bytes = bytes;
    region.storage.reset(new uint8_t[bytes + 1024]);
    const uint64_t start = reinterpret_cast<uint64_t>(region.storage.get());
    region.begin = region.storage.get() + (1024 - start % 1024) % 1024;
    std::memset(region.begin, 0xff, bytes);
    region.track();
  }

 private:
  uint64_t random_;
  int64_t total_ = 0, resident_ = 1;
  size_t next_ = 0;
  std::vector<int64_t> order_;  // of the clusters; outside launch_cluster each block is one
  std::vector<std::unique_ptr<Cluster>> live_;
  std::vector<std::pair<Block*, Thread*>> turns_;
};

constexpr int kFailed = 1;
constexpr size_t kMostIdle = 4096;  // threads kept for the next launch
constexpr size_t kMostShared = 232448, kMostStatic = 48 << 10;

inline int run(Dim grid, int cluster, int threads, int shared_bytes, bool cooperative, std::function<void()> body) {
  if (machine.failed) return kFailed;  // the report is still to be read
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 || threads < 32 || threads > 1024 ||
      threads % 32 || shared_bytes < 0 || static_cast<size_t>(shared_bytes) > kMostShared) {
    machine.report = format("launch of a grid (%d, %d, %d) of %d threads with %d bytes of shared memory: sizes are 1 and more (y and "
                            "z to 65535), threads a multiple of 32 up to 1024, shared memory up to %zu bytes",
                            grid.x, grid.y, grid.z, threads, shared_bytes, kMostShared);
    machine.failed = true;
    return kFailed;
  }
  if (cluster < 1 || cluster > kMostClusterBlocks || grid.x % cluster ||
      (cluster > 1 && machine.most_cluster_blocks < 2)) {
    machine.report = format("launch of a grid (%d, %d, %d) in clusters of %d blocks: a cluster has 1 to %d, which divide the "
                            "grid's x, and the GPU must have clusters (most_cluster_blocks)",
                            grid.x, grid.y, grid.z, cluster, kMostClusterBlocks);
    machine.failed = true;
    return kFailed;
  }
  machine.grid = grid;
  machine.cluster_blocks = cluster;
  machine.block_threads = threads;
  machine.shared_bytes = shared_bytes;
  machine.body = std::move(body);
  try {
    Launch(cooperative).run();
  } catch (const std::runtime_error& error) {  // of a thread that could not be made
    machine.report = error.what();
    machine.failed = true;
  }
  if (machine.idle.size() > kMostIdle) machine.idle.resize(kMostIdle);
  return machine.failed ? kFailed : 0;
}

// The array of a block that belongs to a place in the source.
inline Region& array_of(Block& block, const std::string& name, size_t bytes, const void* key, const Where& at) {
  std::unique_ptr<Region>& array = block.arrays[key];
  if (!array) {
    const size_t fixed = block.shared_bytes - machine.shared_bytes + bytes;
    const size_t before = machine.shared_bytes ? (fixed + 1023) / 1024 * 1024 : fixed;  // dynamic_shared is aligned
    const size_t all = before + machine.shared_bytes;
    if (all > kMostShared || fixed > kMostStatic) {
      fail_with(at, format("'%s' takes static shared memory to %zu bytes and the block's to %zu; there are %zu and %zu",
                           name.c_str(), fixed, all, kMostStatic, kMostShared));
    }
    block.shared_bytes += bytes;
    array = std::make_unique<Region>();
    Launch::make_shared(*array, name.c_str(), block.index, bytes);
  }
  return *array;
}

// The same shared memory of another block of the cluster.
inline Region& same_region(const Region* region, int rank, const Where& at) {
  Block& mine = *machine.block;
  if (rank < 0 || rank >= machine.cluster_blocks) {
    fail_with(at, format("cluster_pointer: rank %d of a cluster of %d blocks", rank, machine.cluster_blocks));
  }
  Block& other = *mine.cluster->blocks[rank];
  if (region == &mine.dynamic) return other.dynamic;
  for (auto& [key, array] : mine.arrays) {
    if (array.get() == region) return array_of(other, region->name, region->bytes, key, at);
  }
  fail_with(at, "cluster_pointer: of a pointer that is not into this block's own shared memory");
}

template <class T>
inline Shared<T> static_array(const char* name, size_t count, const void* key, const Where& at) {
  Region& array = array_of(*machine.block, name, count * sizeof(T), key, at);
  return {reinterpret_cast<T*>(array.begin), &array};
}

}  // namespace host

// Zeros into global memory. A mistake is reported like one of a launch.
inline int fill_zero(void* p, size_t bytes, void*) {
  host::Region* region = host::buffer_at(p);
  const bool inside = region && static_cast<uint8_t*>(p) + bytes <= region->begin + region->bytes;
  if (!inside ? !host::machine.buffers.empty() : region->mode == host::Mode::input) {
    host::machine.report = host::format("fill_zero of %zu bytes: not within one registered buffer that may be written", bytes);
    host::machine.failed = true;
    return host::kFailed;
  }
  std::memset(p, 0, bytes);
  if (inside && !region->written.empty()) {
    const auto first = region->written.begin() + (static_cast<uint8_t*>(p) - region->begin);
    std::fill(first, first + bytes, true);
  }
  return 0;
}

// The host body takes no stream: it is done when it returns.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Dim grid, int threads, int shared_bytes, void*, Arguments... arguments) {
  return host::run(grid, 1, threads, shared_bytes, false, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

template <class... Parameters, class... Arguments>
int launch_cooperative(void (*kernel)(Parameters...), Dim grid, int threads, int shared_bytes, void*, Arguments... arguments) {
  return host::run(grid, 1, threads, shared_bytes, true, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace device

// What the tests call, by ctypes (tests/csrc/host_library.py).
#define FASTLM_HOST_API extern "C" __attribute__((visibility("default"), used)) inline

// Forgets all buffers and the last report, and sets how the next launches run. order: 0 to 2, + 4 if copies run late, + 8 if
// matrix products do.
FASTLM_HOST_API void fastlm_host_reset(int order, uint64_t seed, int resident) {
  device::host::Machine& machine = device::host::machine;
  machine.buffers.clear();
  machine.report.clear();
  machine.failed = false;
  machine.order = order & 3, machine.late_copies = order & 4, machine.late_products = order & 8;
  machine.seed = seed, machine.resident = resident;
}

// Gives back the stacks that are kept for the next launch.
FASTLM_HOST_API void fastlm_host_release() { device::host::machine.idle.clear(); }

// The GPU's most_cluster_blocks() from now on: 8, or 1 for one without clusters.
FASTLM_HOST_API void fastlm_host_clusters(int most) { device::host::machine.most_cluster_blocks = most; }

// mode: 0 input, 1 read and written, 2 output. From the first buffer on, accesses to any other memory are errors.
FASTLM_HOST_API void fastlm_host_buffer(void* begin, size_t bytes, const char* name, int mode) {
  auto region = std::make_unique<device::host::Region>();
  region->name = name;
  region->mode = static_cast<device::host::Mode>(mode);
  region->begin = static_cast<uint8_t*>(begin);
  region->bytes = bytes;
  region->track();
  device::host::machine.buffers.push_back(std::move(region));
}

// What went wrong in the last launch; empty if nothing did.
FASTLM_HOST_API const char* fastlm_host_report() { return device::host::machine.report.c_str(); }

// How many bytes of an output nobody has written yet.
FASTLM_HOST_API int64_t fastlm_host_unwritten(const void* begin) {
  for (auto& buffer : device::host::machine.buffers) {
    if (buffer->begin == begin) return std::count(buffer->written.begin(), buffer->written.end(), false);
  }
  return -1;
}
