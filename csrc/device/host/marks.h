// Marks of asynchronous accesses, who knows of them, and the groups in which a thread waits for its own (engine.h).
#pragma once

#include "engine.h"

namespace device::host {

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
