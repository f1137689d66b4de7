// Where threads of a block meet: barriers, shuffles, votes. A barrier gives all who meet the union of what they know (order.h).
#pragma once

#include "block.h"

namespace device::host {

// What threads who meet know of proxy fences, for `join`.
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

}  // namespace device::host
