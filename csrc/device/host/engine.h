// The engine of asynchronous work: copies and matrix products that go on while threads do other things.
//
// What an asynchronous operation is made of, here:
//
//   agent       who makes its accesses: a bit like a thread, with a slot and a clock of its own among the block's. An mbarrier
//               has one for the copies that complete on it (its clock: the phase), each warp of a warpgroup one for its products
//               (its clock: the commit group). make_agent(name) gives the slot.
//   mark        at issue, by the issuing thread: checks bounds, that the bytes were written, that no access is unordered with
//               this one, that a proxy fence lies behind every thread's write; and leaves the agent's slot and clock there.
//               Until a thread knows that the agent's clock has passed, its own accesses to these bytes are races: reads of what
//               is written, writes of what is read.
//   learn       learn(slot, clock): the running thread has waited, and knows. Barriers hand the knowledge on.
//   groups      what only the issuing thread can wait for (cp.async, bulk stores) is marked kInFlight + thread, which nobody ever
//               knows; when it has waited, the marks become its own accesses (settle).
//   work        what is done to the bytes, now or later: later(unit, chain, at, work). "Early" runs it at issue, so that what was
//               given free too early is overwritten; "late" keeps it until no thread of any block can go on, so that who did not
//               wait reads the old bytes. Work of one chain keeps its order; else it is taken in the order of the threads: oldest
//               first, newest first, any. Work runs outside of threads: what is wrong with it is told by mistake, not fail_with.
//   waiting     wait_until(awaited, condition, what, at), woken by awaited.wake(); a chain's done() and wait_for_work use it.
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

// A barrier in shared memory (async.h).
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

// Records a mistake that no thread stands in.
inline void mistake(const Block& block, int thread, const Where& at, const std::string& text) {
  if (machine.failed) return;
  machine.report = place(at) + ": " + who(block) + ", thread " + std::to_string(thread) + ": " + text;
  machine.failed = true;
}

// After something that may have called mistake: a thread goes no further.
inline void stop_if_failed() {
  if (machine.failed) leave(machine.thread->fiber);
}

constexpr int kBulk = 0, kCopyAsync = 1;
constexpr int kMbarrierMemory = 8191;  // who holds the bytes of an mbarrier

class AsyncEngine final : public Engine {
 public:
  AsyncEngine() { machine.engine = this; }

  std::unordered_map<const void*, MbarrierState> barriers;
  std::unordered_map<int64_t, Asynchronous> blocks;
  std::unordered_map<int64_t, std::vector<std::string>> names;  // of each block's agents; kept to the end of the launch
  std::vector<Work> pending;

  Asynchronous& mine() { return blocks[machine.block->index]; }

  void begin() override {
    barriers.clear(), blocks.clear(), names.clear(), pending.clear();
    random_ = machine.seed;
  }

  // What a block leaves unfinished.
  void end(Block& block) override {
    const auto found = blocks.find(block.index);
    if (found == blocks.end()) return;
    for (const Work& work : pending) {
      if (work.block == &block && work.unit == Unit::product) {
        mistake(block, work.thread, work.at, "the block has ended and nobody has waited for this product");
      }
    }
    for (auto it = barriers.begin(); it != barriers.end();) {
      if (it->second.block == &block) {
        if (it->second.copied > it->second.waited) {
          mistake(block, it->second.copier, it->second.copy,
                  "the block has ended and nobody has waited for this copy on " + it->second.name());
        }
        it = barriers.erase(it);
      } else {
        ++it;
      }
    }
    for (auto& [thread, groups] : found->second.groups[kBulk]) {
      groups.committed.push_back(groups.open);
      for (auto& group : groups.committed) {
        if (!group->read && !group->sources.empty()) {
          mistake(block, thread, group->at,
                  format("the block has ended and this thread has not waited until the copy has read shared "
                         "memory (bulk_wait_read<0>)%s",
                         group == groups.open ? "; no bulk_commit follows it" : ""));
        }
      }
    }
    for (const auto& chain : found->second.chains) chain->end(block);
    const Registers& registers = found->second.registers;
    for (size_t warp = 0; warp < registers.changes.size(); ++warp) {
      if (registers.changes[warp] != registers.changes[warp / 4 * 4]) {
        mistake(block, static_cast<int>(32 * warp), registers.last,
                "setmaxnreg must be executed by all four warps of a warpgroup, and was not by all of warps " +
                    std::to_string(warp / 4 * 4) + " to " + std::to_string(warp / 4 * 4 + 3));
      }
    }
    if (machine.failed) return;
    for (size_t i = 0; i < pending.size();) {  // cp.async that nobody waits for
      if (pending[i].block == &block) {
        pending[i].run();
        pending.erase(pending.begin() + i);
      } else {
        ++i;
      }
    }
    blocks.erase(found);
  }

  bool advance() override {
    if (pending.empty()) return false;
    std::vector<size_t> due;
    for (size_t i = 0; i < pending.size(); ++i) {
      Chain* chain = pending[i].chain;
      if (chain && chain->busy) continue;
      if (chain) chain->busy = true;
      due.push_back(i);
    }
    for (const Work& work : pending) {
      if (work.chain) work.chain->busy = false;
    }
    if (machine.order == 2) mix(due, random_);
    const size_t at = machine.order == 1 ? due.back() : due.front();
    const Work work = std::move(pending[at]);
    pending.erase(pending.begin() + at);
    machine.thread = nullptr, machine.block = work.block;
    finish(work);
    return true;
  }

  void add(Work work) {
    if (work.chain) ++work.chain->issued;
    if (work.unit == Unit::copy ? machine.late_copies : machine.late_products) {
      pending.push_back(std::move(work));
    } else {
      finish(work);
    }
  }

  std::string waits_for(const Thread& thread) override { return static_cast<const Awaited*>(thread.object)->text(); }

  std::string name(int64_t block, int slot) override {
    if (slot == kMbarrierMemory) return "an mbarrier that lies there";
    if (slot >= kInFlight) return format("a copy of thread %d", (slot - kInFlight) % 1024);
    if (slot >= kOfFour) slot -= kOfFour;
    return names[block][slot - machine.block_threads];
  }

 private:
  void finish(const Work& work) {
    work.run();
    ++machine.steps;
    if (work.chain) {
      ++work.chain->done;
      work.chain->wake();
    }
  }

  uint64_t random_ = 1;
};

inline AsyncEngine engine;

inline void later(Unit unit, Chain* chain, const Where& at, std::function<void()> run) {
  engine.add({unit, chain, machine.block, machine.thread->id, at, std::move(run)});
  stop_if_failed();
}

// A chain that lives as long as its block.
inline Chain* make_chain() {
  auto& chains = engine.mine().chains;
  chains.push_back(std::make_unique<Chain>());
  return chains.back().get();
}

// Waits until `count` pieces of the chain's work have run.
inline void wait_for_work(Chain& chain, uint64_t count, const char* what, const Where& at) {
  wait_until(chain, [&chain, count] { return chain.done >= count; }, what, at);
}

// The slot of a new agent. Its name fits into "bytes ..., which NAME wrote at x.cu:7".
inline int make_agent(const std::string& name, const Where& at) {
  auto& names = engine.names[machine.block->index];
  if (names.size() == kAgents) {
    fail_with(at,
              format("more than %d mbarriers and warpgroups with products in a block: the host body follows no more", kAgents));
  }
  names.push_back(name);
  return machine.block_threads + static_cast<int>(names.size()) - 1;
}

// `from` with all of `with`, or, if there is none, with the clock of one slot.
inline const uint32_t* merge(const uint32_t* from, const uint32_t* with, int slot, uint32_t clock) {
  Block& block = *machine.block;
  const uint32_t* single = with ? nullptr : &clock;
  const int first = single ? slot : 0, last = single ? slot + 1 : block.slots;
  bool news = from == nullptr;
  for (int i = first; i < last && !news; ++i) news = (single ? clock : with[i]) > from[i];
  if (!news) return from;
  Asynchronous& all = engine.mine();
  for (const auto& m : all.merged) {
    if (m.from == from && m.with == with && m.slot == slot && m.clock == clock) return m.result;
  }
  uint32_t* result = block.snapshot();
  for (int i = 0; i < block.slots && from; ++i) result[i] = from[i];
  for (int i = first; i < last; ++i) result[i] = std::max(result[i], single ? clock : with[i]);
  if (all.merged.size() < 16) all.merged.push_back({});
  all.merged[all.next_merged++ % all.merged.size()] = {from, with, slot, clock, result};
  return result;
}

// The running thread knows from now on that the agent's work up to `clock` is done.
inline void learn(int slot, uint32_t clock) { machine.thread->known = merge(machine.thread->known, nullptr, slot, clock); }

// Whether a proxy fence lies between a thread's write and the running thread.
inline bool proxied(const Access& before, bool shared) {
  const Thread& me = *machine.thread;
  if (before.block() == machine.block->index) return me.proxied[!shared].of(before.thread(), me.id) >= before.clock();
  if (const Block* other = in_cluster(before.block())) {  // a fence of this block after the cluster barrier
    const size_t phase = machine.ledgers[machine.block->index].phase_proxied;
    if (phase && machine.block->cluster->phases[phase - 1][other->rank][before.thread()] >= before.clock()) return true;
  }
  const Ledger &mine = machine.ledgers[machine.block->index], &other = machine.ledgers[before.block()];
  const auto passed = [&](const std::unordered_map<int64_t, size_t>& seen, const std::vector<std::vector<uint32_t>>& clocks) {
    const auto found = seen.find(before.block());
    return found != seen.end() && found->second > 0 && clocks[found->second - 1][before.thread()] >= before.clock();
  };
  return passed(mine.seen, other.proxied) || passed(mine.seen_proxied, other.fences);
}

// An asynchronous access that the running thread issues, by whoever has the slot. `generic`: not through the asynchronous proxy.
// What it returns says which marks it left.
inline Mark mark(const void* p, Region* region, size_t bytes, size_t alignment, Use use, int slot, uint32_t clock,
                 const Where& at, bool generic = false) {
  const int64_t offset = check_place(p, region, bytes, alignment, use, at);
  if (region == nullptr || region->mode == Mode::input || bytes == 0) return {nullptr, 0, 0, 0};
  uint64_t last = 0;
  for (int64_t i = offset; i < offset + static_cast<int64_t>(bytes) && !generic; ++i) {
    const Access& writer = region->cells[i].writer;
    if (writer.key == last) continue;
    last = writer.key;
    if (last && writer.thread() < machine.block_threads && ordered(writer, region->shared) && !proxied(writer, region->shared)) {
      const bool same = writer.block() == machine.block->index;
      fail_with(at, format("asynchronous %s of %s, which %sthread %d wrote at %s; no %s lies between", verb(use),
                           bytes_of(*region, offset, bytes).c_str(),
                           same ? "" : format("block %lld, ", static_cast<long long>(writer.block())).c_str(), writer.thread(),
                           place(writer.at).c_str(), region->shared ? "fence_async_shared" : "fence_async_global"));
    }
  }
  const Access now = make_access(machine.block->index, slot, clock, use == Use::atomic, at);
  track(*region, offset, bytes, use, now, at);
  return {region, offset, bytes, now.key};
}

// The running thread has waited for what made these marks: they are accesses of its own from now on.
inline void settle(std::vector<Mark>& marks) {
  for (const Mark& m : marks) {
    for (int64_t i = m.offset; i < m.offset + static_cast<int64_t>(m.bytes); ++i) {
      Cell& cell = m.region->cells[i];
      for (Access* access : {&cell.writer, &cell.readers[0], &cell.readers[1]}) {
        if (access->key == m.key) {
          *access = make_access(machine.block->index, machine.thread->id, machine.thread->clock, access->atomic(), access->at);
        }
      }
    }
  }
  marks.clear();
}

// The running thread's groups of a kind, what its operations are marked with, and the end of a group.
inline Groups& groups_of(int kind) { return engine.mine().groups[kind][machine.thread->id]; }
inline int slot_in_flight(int kind) { return kInFlight + 1024 * kind + machine.thread->id; }

inline void add_to_group(Groups& groups, const Mark& source, const Mark& target, const Where& at) {
  groups.open->at = at;
  if (source.region) groups.open->sources.push_back(source);
  if (target.region) groups.open->targets.push_back(target);
}

inline void run_in_group(Groups& groups, const Where& at, std::function<void()> run) {
  ++groups.open->left;
  later(Unit::copy, nullptr, at, [&groups, group = groups.open, run = std::move(run)] {
    run();
    --group->left;
    groups.wake();
  });
}

inline void commit_group(Groups& groups) {
  groups.committed.push_back(std::move(groups.open));
  groups.open = std::make_shared<Group>();
  ++groups.number;
}

// Until all but the last `but` groups have read their sources, or (not `read`) also written.
inline void wait_for_groups(Groups& groups, size_t but, bool read, const char* what, const Where& at) {
  if (groups.committed.size() <= but) return;
  const size_t count = groups.committed.size() - but;
  wait_until(
      groups,
      [&] {
        return std::all_of(groups.committed.begin(), groups.committed.begin() + count,
                           [](auto& group) { return group->left == 0; });
      },
      what, at);
  for (size_t i = 0; i < count; ++i) {
    Group& group = *groups.committed[i];
    settle(group.sources);
    group.read = true;
    if (!read) settle(group.targets);
  }
  if (!read) groups.committed.erase(groups.committed.begin(), groups.committed.begin() + count);
}

}  // namespace device::host
