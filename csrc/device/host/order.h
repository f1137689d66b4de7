// What happened before what.
//
// Each thread counts its own steps from one synchronisation to the next (`clock`) and knows up to which step of every other
// thread all has happened before (`known`): vector clocks, as in FastTrack (Flanagan and Freund, PLDI 2009). A barrier gives all
// who meet the union of what they know. Two accesses race if neither thread knows of the other's.
//
// Here: what fences and atomics hand on between blocks, and whether an access is ordered with what a thread does now.
#pragma once

#include "block.h"

namespace device::host {

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
