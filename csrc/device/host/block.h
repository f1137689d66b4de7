// A live block: its threads, its shared memory, its barriers, and the clocks that say what happened before what.
//
// Each thread counts its own steps from one synchronisation to the next (`clock`) and knows up to which step of every other
// thread all has happened before (`known`): vector clocks, as in FastTrack (Flanagan and Freund, PLDI 2009). A barrier gives all
// who meet the union of what they know. Two accesses race if neither thread knows of the other's.
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

// The same of proxy fences.
inline void join_proxied(Block& block, const std::vector<Arrival>& arrivals) {
  for (int space = 0; space < 2; ++space) {
    const uint32_t* last = nullptr;
    uint32_t* all = nullptr;
    for (const Arrival& a : arrivals) {
      const Proxied& mine = a.thread->proxied[space];
      if (!mine.known && !mine.clock) continue;
      if (!all) all = block.snapshot();
      all[a.thread->id] = std::max(all[a.thread->id], mine.clock);
      if (!mine.known || mine.known == last) continue;
      last = mine.known;
      for (int i = 0; i < block.slots; ++i) all[i] = std::max(all[i], last[i]);
    }
    if (!all) continue;
    for (const Arrival& a : arrivals) {
      if (a.waits) a.thread->proxied[space] = {all, 0};
    }
  }
}

// What the threads know together, as one snapshot; those who wait know it from now on.
inline void join(Block& block, const std::vector<Arrival>& arrivals) {
  uint32_t* all = block.snapshot();
  const uint32_t* last = nullptr;
  for (const Arrival& a : arrivals) {
    if (a.thread->known != last) {
      last = a.thread->known;
      for (int i = 0; i < block.slots; ++i) all[i] = std::max(all[i], last[i]);
    }
  }
  size_t phase = 0;
  for (const Arrival& a : arrivals) {
    all[a.thread->id] = std::max(all[a.thread->id], a.thread->clock);
    phase = std::max(phase, a.thread->phase);
  }
  if (machine.engine) join_proxied(block, arrivals);
  for (const Arrival& a : arrivals) {
    if (a.waits) a.thread->known = all, a.thread->phase = phase;
    ++a.thread->clock;
  }
}

// "0-31, 40"
inline std::string ranges(const std::vector<int>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t j = i;
    while (j + 1 < numbers.size() && numbers[j + 1] == numbers[j] + 1) ++j;
    text += (text.empty() ? "" : ", ") + std::to_string(numbers[i]);
    if (j > i) text += "-" + std::to_string(numbers[j]);
    i = j + 1;
  }
  return text;
}

inline std::string lanes(uint32_t mask) {
  std::vector<int> numbers;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) numbers.push_back(i);
  }
  return ranges(numbers);
}

// Whole warps, all lanes from one line.
inline void check_warps(const Barrier& barrier, const char* what, const Where& at) {
  std::map<int, std::vector<const Arrival*>> warps;
  for (const Arrival& a : barrier.arrivals) warps[a.thread->id / 32].push_back(&a);
  for (auto& [warp, members] : warps) {
    if (members.size() != 32) {
      fail_with(at, format("%s: only %zu lanes of warp %d are among the threads that met", what, members.size(), warp));
    }
    for (const Arrival* a : members) {
      if (!same_place(a->at, members[0]->at)) {
        fail_with(at, format("%s in divergent code: the lanes of warp %d came from %s and %s", what, warp,
                             place(members[0]->at).c_str(), place(a->at).c_str()));
      }
    }
  }
}

inline void arrive(int id, int count, bool waits, const char* what, const Where& at) {
  Block& block = *machine.block;
  if (id < 0 || id > 15) fail_with(at, format("%s: there are barriers 0 to 15, not %d", what, id));
  if (count <= 0 || count % 32 || count > static_cast<int>(block.threads.size())) {
    fail_with(at, format("%s(%d, %d): the count must be a multiple of 32 and at most the block's %zu threads", what, id, count,
                         block.threads.size()));
  }
  Barrier& barrier = block.barriers[id];
  if (!barrier.arrivals.empty() && barrier.count != count) {
    fail_with(at, format("%s(%d): expects %d threads, but thread %d, waiting at %s, expects %d", what, id, count,
                         barrier.arrivals[0].thread->id, place(barrier.arrivals[0].at).c_str(), barrier.count));
  }
  barrier.count = count;
  barrier.arrivals.push_back({machine.thread, at, waits});
  if (static_cast<int>(barrier.arrivals.size()) < count) {
    machine.thread->barrier = id;
    if (waits) wait(State::waiting, what, at);
    machine.thread->barrier = -1;
    return;
  }
  check_warps(barrier, what, at);
  if (id == 0) {
    for (const Arrival& a : barrier.arrivals) {
      if (!same_place(a.at, at)) {
        fail_with(at, format("block_barrier in divergent code: thread %d waits in the one at %s", a.thread->id,
                             place(a.at).c_str()));
      }
    }
  }
  join(block, barrier.arrivals);
  for (const Arrival& a : barrier.arrivals) {
    if (a.waits && a.thread != machine.thread) wake(*a.thread);
  }
  barrier.arrivals.clear();
}

// Ends a meeting at which all lanes have come: gives out the values.
inline void finish(Block& block, int warp, const Meeting& meeting) {
  uint64_t votes = 0;
  std::vector<Arrival> arrivals;
  for (int lane = 0; lane < 32; ++lane) {
    if (meeting.mask >> lane & 1) {
      votes |= (meeting.value[lane] & 1) << lane;
      arrivals.push_back({block.threads[32 * warp + lane].get(), meeting.at, true});
    }
  }
  if (meeting.kind == Kind::barrier) join(block, arrivals);
  for (const Arrival& a : arrivals) {
    a.thread->result = meeting.kind == Kind::vote ? votes : meeting.value[meeting.source[a.thread->id % 32]];
    if (a.thread != machine.thread) wake(*a.thread);
  }
}

// Waits until all lanes of the mask are here. source: whose value this lane wants.
inline uint64_t meet(Kind kind, const char* what, uint32_t mask, uint64_t value, int source, const Where& at) {
  Block& block = *machine.block;
  Thread& me = *machine.thread;
  const int warp = me.id / 32, lane = me.id % 32;
  if (!(mask >> lane & 1)) fail_with(at, format("%s: lane %d is not in its own mask 0x%08x", what, lane, mask));
  if (!(mask >> source & 1)) {
    fail_with(at, format("%s: lane %d reads lane %d, which is not in the mask 0x%08x", what, lane, source, mask));
  }
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && block.threads[32 * warp + i]->state == State::done) {
      fail_with(at, format("%s: the mask 0x%08x names lane %d, which has returned", what, mask, i));
    }
  }
  std::vector<Meeting>& open = block.meetings[warp];
  Meeting* meeting = nullptr;
  for (Meeting& m : open) {
    if (m.mask != mask) continue;  // lanes of both may go on to the other one later; if they do not, nobody can go on
    if (m.kind != kind || std::strcmp(m.what, what) || !same_place(m.at, at)) {
      fail_with(at, format("%s for lanes %s, while lanes %s are in %s at %s for the same", what, lanes(mask).c_str(),
                           lanes(m.arrived).c_str(), m.what, place(m.at).c_str()));
    }
    meeting = &m;
  }
  if (!meeting) {
    open.push_back({kind, what, at, mask, 0, {}, {}});
    meeting = &open.back();
  }
  meeting->arrived |= 1u << lane;
  meeting->value[lane] = value;
  meeting->source[lane] = source;
  if (meeting->arrived == mask) {
    finish(block, warp, *meeting);
    open.erase(open.begin() + (meeting - open.data()));
  } else {
    me.mask = mask;
    wait(State::waiting, what, at);
    me.mask = 0;
  }
  return me.result;
}

// Fences and atomics between blocks.
inline void publish() {
  Block& block = *machine.block;
  Thread& me = *machine.thread;
  auto& fences = machine.ledgers[block.index].fences;
  fences.push_back(fences.empty() ? std::vector<uint32_t>(block.slots, 0) : fences.back());
  for (int i = 0; i < block.slots; ++i) fences.back()[i] = std::max(fences.back()[i], me.known[i]);
  fences.back()[me.id] = me.clock++;
  for (size_t rank = 0; me.phase && rank < block.cluster->blocks.size(); ++rank) {  // and what a cluster barrier told of others
    const int64_t other = block.cluster->blocks[rank]->index;
    if (other == block.index) continue;
    auto& theirs = machine.ledgers[other].fences;
    const uint32_t* known = block.cluster->phases[me.phase - 1][rank];
    theirs.push_back(theirs.empty() ? std::vector<uint32_t>(block.slots, 0) : theirs.back());
    for (int i = 0; i < block.slots; ++i) theirs.back()[i] = std::max(theirs.back()[i], known[i]);
    auto& by_proxy = machine.ledgers[other].proxied;  // as many as there are fences
    if (machine.engine) by_proxy.push_back(by_proxy.empty() ? std::vector<uint32_t>(block.slots, 0) : by_proxy.back());
    machine.ledgers[block.index].seen[other] = theirs.size();
  }
  if (!machine.engine) return;
  auto& proxied = machine.ledgers[block.index].proxied;
  proxied.push_back(proxied.empty() ? std::vector<uint32_t>(block.slots, 0) : proxied.back());
  for (int i = 0; i < block.slots; ++i) proxied.back()[i] = std::max(proxied.back()[i], me.proxied[1].of(i, me.id));
}

inline void acquire(const void* address) {
  auto found = machine.releases.find(reinterpret_cast<uint64_t>(address));
  if (found == machine.releases.end()) return;
  auto& seen = machine.ledgers[machine.block->index].seen;
  for (auto [block, fences] : found->second) seen[block] = std::max(seen[block], fences);
}

// Passes on this block's fences so far, and those it has seen.
inline void release(const void* address) {
  const Ledger& mine = machine.ledgers[machine.block->index];
  auto& at = machine.releases[reinterpret_cast<uint64_t>(address)];
  at[machine.block->index] = mine.fences.size();
  for (auto [block, fences] : mine.seen) at[block] = std::max(at[block], fences);
}

// Whether an access is over by these clocks.
inline bool covers(const uint32_t* clocks, const Access& access) {
  const int slot = access.thread();
  if (slot < kOfFour) return clocks[slot] >= access.clock();
  const auto behind = [&](uint32_t clock) { return clock < access.clock(); };
  return std::none_of(clocks + (slot - kOfFour), clocks + (slot - kOfFour) + 4, behind);
}

// Whether the running thread knows by a cluster barrier that an access of another block of its cluster is over.
inline bool ordered_in_cluster(const Block& other, const Access& access) {
  const size_t phase = machine.thread->phase;
  return phase > 0 && covers(machine.block->cluster->phases[phase - 1][other.rank], access);
}

// The block of the running one's cluster with this index, or null.
inline Block* in_cluster(int64_t index) {
  const Block& mine = *machine.block;
  const int64_t rank = index - (mine.index - mine.rank);
  return rank >= 0 && rank < machine.cluster_blocks ? mine.cluster->blocks[rank].get() : nullptr;
}

// Whether an earlier access, to shared memory or not, is known to have happened before what this thread does now.
inline bool ordered(const Access& before, bool shared) {
  if (before.thread() >= kInFlight) return false;
  if (before.block() == machine.block->index) {
    return before.thread() == machine.thread->id || covers(machine.thread->known, before);
  }
  const Block* const other = in_cluster(before.block());
  if (other && ordered_in_cluster(*other, before)) return true;
  if (shared) return false;
  const auto& seen = machine.ledgers[machine.block->index].seen;
  const auto found = seen.find(before.block());
  if (found == seen.end() || found->second == 0) return false;
  return covers(machine.ledgers[before.block()].fences[found->second - 1].data(), before);
}

}  // namespace device::host
