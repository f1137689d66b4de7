// A live block: its threads, its shared memory, and the state of the launch that it belongs to.
#pragma once

#include <algorithm>
#include <deque>
#include <functional>

#include "fiber.h"
#include "memory.h"

namespace device::host {

enum class State { ready, waiting, spinning, done };

// What was known at a thread's last proxy fence, or at those of threads it has met since: the asynchronous proxy sees it.
struct Proxied {
  const uint32_t* known = nullptr;
  uint32_t clock = 0;  // the thread's own

  uint32_t of(int slot, int thread) const {
    const uint32_t up_to = known ? known[slot] : 0;
    return slot == thread ? std::max(up_to, clock) : up_to;
  }
};

struct Thread {
  Fiber fiber;
  int id = 0;
  State state = State::done;
  const char* what = "";  // what it waits in, and where
  Where at;
  int barrier = -1;        // and for which barrier
  uint32_t mask = 0;       // or for which lanes
  uint64_t result = 0;     // what a shuffle or vote brought
  const void* object = nullptr;  // or for which mbarrier
  uint32_t clock = 1;
  const uint32_t* known = nullptr;
  Proxied proxied[2];  // shared and global memory
  size_t phase = 0;    // how many of its cluster's barriers it knows to be over
  bool arrived = false;  // at the barrier `arrived_at`, without having come out of it yet
  size_t arrived_at = 0;
  bool waits_for_cluster = false;
};

struct Arrival {
  Thread* thread;
  Where at;
  bool waits;
};

struct Barrier {
  int count = 0;
  std::vector<Arrival> arrivals;
};

enum class Kind { shuffle, vote, barrier };

// The lanes of `mask` on their way to one shuffle, vote or warp barrier.
struct Meeting {
  Kind kind;
  const char* what;
  Where at;
  uint32_t mask = 0, arrived = 0;
  uint64_t value[32];
  int source[32];
};

struct Cluster;

struct Block {
  int64_t index = 0;
  int x = 0, y = 0, z = 0;
  Cluster* cluster = nullptr;
  int rank = 0;  // in it
  int live = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::map<const void*, std::unique_ptr<Region>> arrays;  // static shared memory, by its place in the source
  Region dynamic;
  size_t shared_bytes = 0;
  Barrier barriers[16];
  std::vector<std::vector<Meeting>> meetings;  // of each warp
  std::deque<std::vector<uint32_t>> snapshots;

  int slots = 0;  // of its clocks

  uint32_t* snapshot() {
    snapshots.emplace_back(slots, 0);
    return snapshots.back().data();
  }
};

// Blocks that are live together, one after the other along x (cluster.h).
struct Cluster {
  struct Arrived {
    const uint32_t* known;
    int thread;
    uint32_t clock;
  };
  struct Remote {  // a thread's last access to the shared memory of another block
    uint32_t clock = 0;
    Where at;
    const Region* region = nullptr;
    int64_t offset = 0;
    size_t bytes = 0;
    const char* verb = "";
  };
  std::vector<std::unique_ptr<Block>> blocks;
  size_t live = 0;
  std::vector<std::vector<Arrived>> arrived;         // of each block, at the next barrier
  std::vector<Barrier> places;                       // and where
  std::vector<std::vector<const uint32_t*>> phases;  // of each barrier that is over and each block: the clocks of its slots
  std::vector<std::vector<Remote>> remote;           // to each block's memory, of every thread; empty if there is none
};

// Asynchronous work (engine.h); only files that include async.h have it.
struct Engine {
  virtual ~Engine() = default;
  virtual void begin() = 0;                        // a launch
  virtual void end(Block&) = 0;                    // all of a block's threads have returned
  virtual bool advance() = 0;                      // nobody can go on: one piece of work that is due; false if there is none
  virtual std::string waits_for(const Thread&) = 0;
  virtual std::string name(int64_t block, int slot) = 0;  // of whoever is not a thread
};

// The state of the host body: one launch at a time, on one CPU thread.
struct Machine {
  // set by the tests
  int order = 0;  // of threads and blocks: 0 forward, 1 backward, 2 random
  uint64_t seed = 1;
  int resident = 2;  // blocks (or clusters) live at once in an ordinary launch
  int most_cluster_blocks = 8;
  bool late_copies = false, late_products = false;
  Engine* engine = nullptr;
  std::vector<std::unique_ptr<Region>> buffers;
  // of the launch
  Dim grid;
  int block_threads = 0, shared_bytes = 0, cluster_blocks = 1;
  std::function<void()> body;
  std::vector<Ledger> ledgers;
  std::unordered_map<uint64_t, std::unordered_map<int64_t, size_t>> releases;  // address of an atomic -> block -> its fences
  Block* block = nullptr;
  Thread* thread = nullptr;
  uint64_t steps = 0;  // counts what a waiting thread may be waiting for
  bool failed = false;
  std::string report;
  std::vector<std::unique_ptr<Thread>> idle;
};

inline Machine machine;

inline std::string who(const Block& block) { return format("block (%d, %d, %d)", block.x, block.y, block.z); }

// Records the mistake and leaves this thread for good.
[[noreturn]] inline void fail_with(const Where& at, std::string text) {
  machine.report = place(at) + ": " + who(*machine.block) + ", thread " + std::to_string(machine.thread->id) + ": " + text;
  machine.failed = true;
  text = std::string();  // nothing is left on this stack that owns memory
  leave(machine.thread->fiber);
  std::abort();
}

// Waits until another thread has set `state` back to ready.
inline void wait(State state, const char* what, const Where& at) {
  Thread& me = *machine.thread;
  me.state = state, me.what = what, me.at = at;
  leave(me.fiber);
}

inline void wake(Thread& thread) {
  thread.state = State::ready;
  ++machine.steps;
}

}  // namespace device::host
