// What asynchronous work is made of (engine.h), and what threads wait for.
#pragma once

#include <deque>
#include <functional>

#include "launch.h"

namespace device::host {

enum class Unit { copy, product };

// What threads wait for. text: what a report says about it.
struct Awaited {
  virtual ~Awaited() = default;
  virtual std::string text() const { return ""; }
  void wake() {
    for (Thread* thread : waiting) host::wake(*thread);
    waiting.clear();
  }
  std::vector<Thread*> waiting;
};

// Waits until condition() holds, which is asked again whenever awaited.wake() was called.
template <class F>
inline void wait_until(Awaited& awaited, F condition, const char* what, const Where& at) {
  Thread& me = *machine.thread;
  while (!condition()) {
    awaited.waiting.push_back(&me);
    me.object = &awaited;
    wait(State::waiting, what, at);
    me.object = nullptr;
  }
}

// Work that keeps its order.
struct Chain : Awaited {
  uint64_t issued = 0, done = 0;
  bool busy = false;                       // for the choice of what runs next
  virtual void end(const Block&) const {}  // the block has ended: tells a mistake if somebody should have waited
};

struct Work {
  Unit unit;
  Chain* chain;  // or none
  Block* block;
  int thread;
  Where at;
  std::function<void()> run;
};

// A part of memory that a commit group reads or writes.
struct Mark {
  Region* region;
  int64_t offset;
  size_t bytes;
  uint64_t key;
};

struct Group {
  int left = 0;  // operations that have not run yet
  bool read = false;
  Where at;
  std::vector<Mark> sources, targets;
};

// The commit groups of one thread and one kind.
struct Groups : Awaited {
  uint32_t number = 1;
  std::shared_ptr<Group> open = std::make_shared<Group>();
  std::deque<std::shared_ptr<Group>> committed;
};

// A barrier in shared memory (mbarrier.h).
struct MbarrierState : Awaited {
  Block* block = nullptr;
  Region* region = nullptr;
  int64_t offset = 0;
  Access initialised, fenced;
  int count = 0, pending = 0, slot = 0, in_flight = 0;
  int64_t missing = 0;              // bytes announced that have not come
  uint32_t phase = 0, base = 0;     // phases completed, and how many of the agent's clock had passed before
  uint32_t copied = 0, waited = 0;  // the last of the agent's clock that a copy counts for, and that a thread has waited for
  Where copy;                       // the last one, and whose
  int copier = 0;
  uint32_t *open = nullptr, *open_proxied[2] = {};                // what those who have arrived knew
  const uint32_t *released = nullptr, *released_proxied[2] = {};  // and up to the last complete phase

  std::string name() const {
    return format("the mbarrier at byte %lld of '%s'", static_cast<long long>(offset), region->name.c_str());
  }
  std::string text() const override {
    std::string all = format(" (%s: phase %u, %d of %d arrivals have come", name().c_str(), phase, count - pending, count);
    if (missing > 0) all += format(", %lld bytes have not", static_cast<long long>(missing));
    if (missing < 0) all += format(", and %lld bytes more than announced", static_cast<long long>(-missing));
    return all + ")";
  }
};

// The registers that setmaxnreg moves between warps.
struct Registers : Awaited {
  int free = 0;
  std::vector<int> of_warp, changes;  // of each warp, and how often
  Where last;
  std::string text() const override { return format(" (%d registers of the block are free)", free); }
};

// What a live block has of all this.
struct Asynchronous {
  struct Merged {
    const uint32_t *from, *with;
    int slot;
    uint32_t clock;
    const uint32_t* result;
  };
  std::vector<Merged> merged;  // threads that knew the same know the same again
  size_t next_merged = 0;
  std::map<int, Groups> groups[2];  // by thread: bulk copies, cp.async
  std::vector<std::unique_ptr<Chain>> chains;
  std::unordered_map<const void*, uint32_t> clocks;  // where mbarriers were invalidated: their agents' clocks
  std::unordered_map<const void*, int> slots;
  Registers registers;
};

}  // namespace device::host
