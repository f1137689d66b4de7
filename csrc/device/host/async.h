// The asynchronous part of the device layer on the host body; here its fences, and how warps share registers.
// device/async.h says what each name means, engine.h how asynchronous work is modelled.
#pragma once

#include "copies.h"

namespace device {

namespace host {

inline void proxy_fence(int space) {
  Thread& me = *machine.thread;
  me.proxied[space] = {me.known, me.clock};
  Ledger& ledger = machine.ledgers[machine.block->index];
  ledger.phase_proxied = std::max(ledger.phase_proxied, me.phase);
  if (space == 1) ledger.seen_proxied = ledger.seen;
  for (auto& [address, state] : engine.barriers) {  // an initialisation is a write, too
    if (space == 0 && state.initialised.thread() == me.id && state.block == machine.block && !state.fenced.key) {
      state.fenced = make_access(machine.block->index, me.id, me.clock, false, state.initialised.at);
    }
  }
  ++me.clock;
}

}  // namespace host

inline void fence_async_shared(Where = Where::current()) { host::proxy_fence(0); }
inline void fence_async_global(Where = Where::current()) { host::proxy_fence(1); }

// Warps and registers. Which lane is elected is the hardware's choice: here the last one when threads run backward.
inline bool elect_one(Where at = Where::current()) {
  host::meet(host::Kind::vote, "elect_one", kAllLanes, 0, lane_id(), at);
  return lane_id() == (host::machine.order == 1 ? 31 : 0);
}
inline int warpgroup_id(Where at = Where::current()) { return shuffle(thread_id() / 128, 0, kAllLanes, 32, at); }
inline int warpgroup_thread() { return thread_id() % 128; }

namespace host {

// A block begins with as many registers as its threads can have of the 64K, and its warps pass them on.
inline void set_registers(int count, bool more, const char* what, const Where& at) {
  meet(Kind::vote, what, kAllLanes, 0, lane_id(), at);
  if (machine.block_threads % 128) fail_with(at, format("%s: the block must be whole warpgroups of 128 threads", what));
  if (lane_id() != 0) return;
  Registers& all = engine.mine().registers;
  const int warp = warp_id(), launched = std::min(255, 65536 / machine.block_threads) / 8 * 8;
  if (all.of_warp.empty()) {
    all.of_warp.assign(machine.block_threads / 32, launched);
    all.changes.assign(all.of_warp.size(), 0);
  }
  const int before = all.of_warp[warp];
  if (more ? count < before : count > before) {
    fail_with(at, format("%s<%d>: the warp has %d registers a thread (at most %d at the launch of %d threads)", what, count,
                         before, launched, machine.block_threads));
  }
  wait_until(all, [&] { return all.free >= 32 * (count - before); }, what, at);
  all.free -= 32 * (count - before);
  all.of_warp[warp] = count;
  ++all.changes[warp];
  all.last = at;
  if (!more) all.wake();
}

}  // namespace host

template <int N>
inline void setmaxnreg_inc(Where at = Where::current()) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  host::set_registers(N, true, "setmaxnreg_inc", at);
}
template <int N>
inline void setmaxnreg_dec(Where at = Where::current()) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
  host::set_registers(N, false, "setmaxnreg_dec", at);
}

}  // namespace device
