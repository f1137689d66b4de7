// Barriers in shared memory on the host body: arrivals, bytes, phases, and what waiting for one tells a thread.
#pragma once

#include "marks.h"

namespace device {

struct Mbarrier {
  uint64_t state;
};

namespace host {

// The barrier at b, which must have been initialised before, as far as the running thread knows.
inline MbarrierState& barrier_at(Shared<Mbarrier> b, const char* what, const Where& at) {
  check_place(b.address(), b.region(), 8, 8, Use::read, at);
  const auto found = engine.barriers.find(b.address());
  if (found == engine.barriers.end()) {
    fail_with(at, format("%s: nobody has initialised an mbarrier at %s", what,
                         bytes_of(*b.region(), reinterpret_cast<uint8_t*>(b.address()) - b.region()->begin, 8).c_str()));
  }
  MbarrierState& state = found->second;
  if (state.block != machine.block) {
    fail_with(at, format("%s: %s belongs to another block: arrivals and copies there are not modelled", what, state.name().c_str()));
  }
  if (!ordered(state.initialised, true)) {
    fail_with(at, format("race: %s of %s, which thread %d initialised at %s; no barrier lies between", what, state.name().c_str(),
                         state.initialised.thread(), place(state.initialised.at).c_str()));
  }
  return state;
}

// Completes the phase if all has come. From a thread, or from work.
inline void complete(MbarrierState& state, int thread, const Where& at) {
  if (state.pending > 0 || state.missing > 0) return;
  if (state.missing < 0) {
    return mistake(*state.block, thread, at,
                   format("%lld bytes more have come than phase %u of %s announces (mbarrier_arrive_expect)",
                          static_cast<long long>(-state.missing), state.phase, state.name().c_str()));
  }
  if (state.in_flight > 0) {
    return mistake(
        *state.block, thread, at,
        format("phase %u of %s is complete while a copy that counts for it, issued at %s, is in flight: fewer bytes were "
               "announced (mbarrier_arrive_expect) than are copied",
               state.phase, state.name().c_str(), place(state.copy).c_str()));
  }
  ++state.phase;
  state.pending = state.count;
  if (state.open) {
    state.open[state.slot] = state.base + state.phase;
    state.released = state.open;
    for (int i = 0; i < 2; ++i) {
      if (state.open_proxied[i]) state.released_proxied[i] = state.open_proxied[i];
      state.open_proxied[i] = nullptr;
    }
    state.open = nullptr;
  }
  ++machine.steps;
  state.wake();
}

// What the running thread knows is part of what the phase releases.
inline void release_to(MbarrierState& state) {
  Block& block = *state.block;
  Thread& me = *machine.thread;
  const auto add = [&](uint32_t*& open, const uint32_t* before, const uint32_t* known, uint32_t clock) {
    if (!open) {
      open = block.snapshot();
      if (before) std::copy(before, before + block.slots, open);
    }
    for (int i = 0; i < block.slots && known; ++i) open[i] = std::max(open[i], known[i]);
    open[me.id] = std::max(open[me.id], clock);
  };
  add(state.open, state.released, me.known, me.clock);
  for (int i = 0; i < 2; ++i) {
    const Proxied& mine = me.proxied[i];
    if (mine.known || mine.clock) add(state.open_proxied[i], state.released_proxied[i], mine.known, mine.clock);
  }
  ++me.clock;
}

inline void announce(MbarrierState& state, int64_t bytes, const char* what, const Where& at) {
  constexpr int64_t most = (1 << 20) - 1;
  if (bytes < 0 || state.missing + bytes > most) {
    fail_with(at, format("%s: a phase counts 0 to %lld bytes; %s would have %lld", what, static_cast<long long>(most),
                         state.name().c_str(), static_cast<long long>(state.missing + bytes)));
  }
  state.missing += bytes;
}

inline void arrive_at(Shared<Mbarrier> b, int64_t bytes, const char* what, const Where& at) {
  MbarrierState& state = barrier_at(b, what, at);
  if (state.pending == 0) {
    fail_with(at, format("%s: one arrival too many at %s: all %d of phase %u have come, and %lld bytes have not", what,
                         state.name().c_str(), state.count, state.phase, static_cast<long long>(state.missing)));
  }
  announce(state, bytes, what, at);
  release_to(state);
  --state.pending;
  complete(state, machine.thread->id, at);
  stop_if_failed();
}

// The running thread has seen that a phase is complete.
inline void acquire_from(MbarrierState& state) {
  Thread& me = *machine.thread;
  state.waited = std::max(state.waited, state.base + state.phase);
  if (!state.released) return;
  me.known = merge(me.known, state.released, 0, 0);
  for (int i = 0; i < 2; ++i) {
    if (!state.released_proxied[i]) continue;
    const uint32_t own = me.proxied[i].clock;
    me.proxied[i].known = merge(me.proxied[i].known, state.released_proxied[i], 0, 0);
    me.proxied[i].clock = own;
  }
}

inline void check_parity(int parity, const char* what, const Where& at) {
  if (parity != 0 && parity != 1) fail_with(at, format("%s: the parity is 0 or 1, not %d", what, parity));
}

// Where a copy puts its bytes; the barrier counts it for the phase that is open now.
inline MbarrierState& barrier_of_copy(Shared<Mbarrier> b, const char* what, const Where& at) {
  MbarrierState& state = barrier_at(b, what, at);
  if (!state.fenced.key || !ordered(state.fenced, true)) {
    fail_with(at, format("%s: fence_mbarrier_init is missing between mbarrier_init of %s, at %s, and this copy", what,
                         state.name().c_str(), place(state.initialised.at).c_str()));
  }
  return state;
}

inline void copy_to_barrier(MbarrierState& state, int64_t bytes, const Where& at, std::function<void()> run) {
  ++state.in_flight;
  state.copied = state.base + state.phase + 1;
  state.copy = at, state.copier = machine.thread->id;
  later(Unit::copy, nullptr, at, [&state, bytes, at, run = std::move(run), thread = machine.thread->id] {
    run();
    --state.in_flight;
    state.missing -= bytes;
    complete(state, thread, at);
  });
}

}  // namespace host

inline void mbarrier_init(Shared<Mbarrier> b, int arrivals, Where at = Where::current()) {
  if (arrivals < 1 || arrivals >= 1 << 20)
    host::fail_with(at, host::format("mbarrier_init: arrivals are 1 to 2^20 - 1, not %d", arrivals));
  const auto found = host::engine.barriers.find(b.address());
  if (found != host::engine.barriers.end()) {
    host::fail_with(at, host::format("mbarrier_init: %s is one already, initialised at %s", found->second.name().c_str(),
                                     host::place(found->second.initialised.at).c_str()));
  }
  host::check(b.address(), b.region(), 8, 8, host::Use::write, at);
  host::MbarrierState& state = host::engine.barriers[b.address()];
  host::Asynchronous& mine = host::engine.mine();
  state.block = host::machine.block, state.region = b.region();
  state.offset = reinterpret_cast<uint8_t*>(b.address()) - b.region()->begin;
  state.initialised = host::make_access(state.block->index, host::machine.thread->id, host::machine.thread->clock, false, at);
  state.count = state.pending = arrivals;
  if (!mine.slots.contains(b.address())) mine.slots[b.address()] = host::make_agent("a copy on " + state.name(), at);
  state.slot = mine.slots[b.address()], state.base = state.copied = state.waited = mine.clocks[b.address()];
  const host::Access holder = host::make_access(state.block->index, host::kMbarrierMemory, 1, false, at);
  for (int i = 0; i < 8; ++i) b.region()->cells[state.offset + i].writer = holder;
}

inline void mbarrier_invalidate(Shared<Mbarrier> b, Where at = Where::current()) {
  host::MbarrierState& state = host::barrier_at(b, "mbarrier_invalidate", at);
  if (!state.waiting.empty() || state.in_flight) {
    host::fail_with(at, host::format("mbarrier_invalidate: %zu threads wait for %s, and %d copies on it are in flight",
                                     state.waiting.size(), state.name().c_str(), state.in_flight));
  }
  for (int i = 0; i < 8; ++i) b.region()->cells[state.offset + i] = host::Cell();
  host::engine.mine().clocks[b.address()] = state.base + state.phase + 1;
  host::engine.barriers.erase(b.address());
  host::check(b.address(), b.region(), 8, 8, host::Use::write, at);
}

inline void mbarrier_arrive(Shared<Mbarrier> b, Where at = Where::current()) { host::arrive_at(b, 0, "mbarrier_arrive", at); }
inline void mbarrier_arrive_expect(Shared<Mbarrier> b, int bytes, Where at = Where::current()) {
  host::arrive_at(b, bytes, "mbarrier_arrive_expect", at);
}
inline void mbarrier_expect(Shared<Mbarrier> b, int bytes, Where at = Where::current()) {
  host::MbarrierState& state = host::barrier_at(b, "mbarrier_expect", at);
  host::announce(state, bytes, "mbarrier_expect", at);
  host::complete(state, host::machine.thread->id, at);
  host::stop_if_failed();
}

inline void mbarrier_wait(Shared<Mbarrier> b, int parity, Where at = Where::current()) {
  host::check_parity(parity, "mbarrier_wait", at);
  host::MbarrierState& state = host::barrier_at(b, "mbarrier_wait", at);
  host::wait_until(
      state, [&] { return static_cast<int>(state.phase & 1) != parity; },
      parity ? "mbarrier_wait for parity 1" : "mbarrier_wait for parity 0", at);
  host::acquire_from(state);
}

inline bool mbarrier_try_wait(Shared<Mbarrier> b, int parity, Where at = Where::current()) {
  host::check_parity(parity, "mbarrier_try_wait", at);
  host::MbarrierState& state = host::barrier_at(b, "mbarrier_try_wait", at);
  const auto complete = [&] { return static_cast<int>(state.phase & 1) != parity; };
  if (!complete()) {
    host::machine.thread->object = &state;
    host::wait(host::State::spinning, parity ? "mbarrier_try_wait for parity 1" : "mbarrier_try_wait for parity 0", at);
    host::machine.thread->object = nullptr;
    if (!complete()) return false;
  }
  ++host::machine.steps;
  host::acquire_from(state);
  return true;
}

inline void fence_mbarrier_init(Where = Where::current()) {
  host::Thread& me = *host::machine.thread;
  for (auto& [address, state] : host::engine.barriers) {
    if (state.block == host::machine.block && state.initialised.thread() == me.id && !state.fenced.key) {
      state.fenced = host::make_access(state.block->index, me.id, me.clock, false, state.initialised.at);
    }
  }
  ++me.clock;
}

}  // namespace device
