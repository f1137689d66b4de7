// The barrier of a cluster, and what is wrong with a block that returns too early.
//
// Each thread's clock at its arrival, and what it knew of its own block, go into the barrier; a thread that comes out of it knows
// all of them, for every block of the cluster. Each barrier's clocks are kept: a thread's `phase` says up to which of them.
#pragma once

#include "access.h"

namespace device::host {

constexpr int kMostClusterBlocks = 16;

// What every block knew when the last thread arrived; wakes those who wait.
inline void end_phase(Cluster& cluster) {
  std::vector<const uint32_t*> clocks;
  for (size_t rank = 0; rank < cluster.blocks.size(); ++rank) {
    Block& block = *cluster.blocks[rank];
    uint32_t* all = block.snapshot();
    const uint32_t* last = nullptr;
    for (const Cluster::Arrived& a : cluster.arrived[rank]) {
      if (a.known && a.known != last) {
        last = a.known;
        for (int i = 0; i < block.slots; ++i) all[i] = std::max(all[i], last[i]);
      }
    }
    for (const Cluster::Arrived& a : cluster.arrived[rank]) all[a.thread] = std::max(all[a.thread], a.clock);
    clocks.push_back(all);
    cluster.arrived[rank].clear();
    cluster.places[rank].arrivals.clear();
  }
  cluster.phases.push_back(std::move(clocks));
  for (auto& block : cluster.blocks) {
    for (auto& thread : block->threads) {
      if (thread->waits_for_cluster) wake(*thread);
    }
  }
}

// `tells`: what the thread did before is seen by those who come out of the barrier.
inline void cluster_arrive(const char* what, bool tells, const Where& at) {
  Block& block = *machine.block;
  Cluster& cluster = *block.cluster;
  Thread& me = *machine.thread;
  if (me.arrived) fail_with(at, format("%s: this thread has arrived before and not waited since (cluster_wait)", what));
  me.arrived = true, me.arrived_at = cluster.phases.size();
  cluster.arrived[block.rank].push_back({tells ? me.known : nullptr, me.id, tells ? me.clock++ : 0});
  Barrier& places = cluster.places[block.rank];
  places.arrivals.push_back({&me, at, true});
  if (places.arrivals.size() < block.threads.size()) return;
  check_warps(places, what, at);
  for (const Barrier& of : cluster.places) {
    if (of.arrivals.size() < block.threads.size()) return;
  }
  ++machine.steps;
  end_phase(cluster);
}

inline void cluster_wait(const char* what, const Where& at) {
  Cluster& cluster = *machine.block->cluster;
  Thread& me = *machine.thread;
  if (!me.arrived) fail_with(at, format("%s: this thread has not arrived at the barrier (cluster_arrive)", what));
  const size_t phase = me.arrived_at;
  if (cluster.phases.size() == phase) {
    me.waits_for_cluster = true;
    wait(State::waiting, what, at);
    me.waits_for_cluster = false;
  }
  me.arrived = false;
  me.phase = std::max(me.phase, phase + 1);
  const uint32_t* told = cluster.phases[phase][machine.block->rank];
  bool more = false;
  for (int i = 0; i < machine.block->slots; ++i) more |= me.known[i] > told[i];
  if (!more) {
    me.known = told;
    return;
  }
  uint32_t* all = machine.block->snapshot();
  for (int i = 0; i < machine.block->slots; ++i) all[i] = std::max(me.known[i], told[i]);
  me.known = all;
}

inline std::string arrivals_of(const Cluster& cluster) {
  size_t come = 0, all = 0;
  for (size_t rank = 0; rank < cluster.blocks.size(); ++rank) {
    come += cluster.arrived[rank].size();
    all += cluster.blocks[rank]->threads.size();
  }
  return format(" (cluster barrier: %zu of %zu have come)", come, all);
}

// Called when the last thread of a block has returned, which ends its shared memory: an error if another block used that and no
// cluster barrier has told this one that it is done.
inline void check_returned(Block& block) {
  size_t phase = 0;
  for (auto& thread : block.threads) phase = std::max(phase, thread->phase);
  const std::vector<Cluster::Remote>& all = block.cluster->remote[block.rank];
  for (size_t i = 0; i < all.size(); ++i) {
    const Cluster::Remote& access = all[i];
    const int rank = static_cast<int>(i) / machine.block_threads, thread = static_cast<int>(i) % machine.block_threads;
    if (!access.region || (phase > 0 && block.cluster->phases[phase - 1][rank][thread] >= access.clock)) continue;
    machine.block = block.cluster->blocks[rank].get();  // whose report it is
    machine.report = place(access.at) + ": " + who(*machine.block) +
                     format(", thread %d: %s of %s, which has returned meanwhile: no cluster barrier lies between", thread,
                            access.verb, bytes_of(*access.region, access.offset, access.bytes).c_str());
    machine.failed = true;
    return;
  }
}

}  // namespace device::host
