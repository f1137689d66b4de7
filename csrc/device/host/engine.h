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

#include "awaited.h"

namespace device::host {

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

}  // namespace device::host
