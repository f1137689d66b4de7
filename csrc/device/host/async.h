// The asynchronous part of the device layer on the host body: mbarriers, tensor and bulk copies, cp.async, fences, registers.
// device/async.h says what each name means, engine.h how asynchronous work is modelled.
#pragma once

#include <initializer_list>

#include "engine.h"

#define GRID_CONSTANT(...) const __VA_ARGS__

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

inline void check_alignment(const void* p, Region* region, int64_t alignment, const char* what, const Where& at) {
  if (region && region->shared && region != &machine.block->dynamic && alignment > 16) {
    fail_with(
        at, format("%s: '%s' must be aligned to %lld bytes, and static shared memory is to 16 only: take it from dynamic_shared",
                   what, region->name.c_str(), static_cast<long long>(alignment)));
  }
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uint64_t>(p) % alignment);
  if (past) {
    fail_with(
        at, format("%s: misaligned: %s is %lld bytes past a multiple of %lld", what, region ? region->name.c_str() : "an address",
                   static_cast<long long>(past), static_cast<long long>(alignment)));
  }
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

// Fences.
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
inline void fence_mbarrier_init(Where = Where::current()) {
  host::Thread& me = *host::machine.thread;
  for (auto& [address, state] : host::engine.barriers) {
    if (state.block == host::machine.block && state.initialised.thread() == me.id && !state.fenced.key) {
      state.fenced = host::make_access(state.block->index, me.id, me.clock, false, state.initialised.at);
    }
  }
  ++me.clock;
}

// Tensor maps.
namespace host {

enum class ElementType { none, f32, bf16, fp16, i32, u32, i64, u64, i8, u8 };

template <class T>
constexpr ElementType element_of() {
  using V = std::remove_const_t<T>;
  if constexpr (std::is_same_v<V, float>) return ElementType::f32;
  if constexpr (std::is_same_v<V, bf16>) return ElementType::bf16;
  if constexpr (std::is_same_v<V, fp16>) return ElementType::fp16;
  if constexpr (std::is_same_v<V, int32_t>) return ElementType::i32;
  if constexpr (std::is_same_v<V, uint32_t>) return ElementType::u32;
  if constexpr (std::is_integral_v<V> && sizeof(V) == 8) return std::is_signed_v<V> ? ElementType::i64 : ElementType::u64;
  if constexpr (std::is_same_v<V, int8_t>) return ElementType::i8;
  if constexpr (std::is_same_v<V, uint8_t>) return ElementType::u8;
  return ElementType::none;
}

// to += from, as the memory does it: one rounding to the nearest even.
template <class T>
inline void add_one(uint8_t* to, const uint8_t* from) {
  T a, b;
  std::memcpy(&a, to, sizeof(T));
  std::memcpy(&b, from, sizeof(T));
  if constexpr (std::is_integral_v<T>) {
    a = static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) + static_cast<std::make_unsigned_t<T>>(b));
  } else {
    a = from_float<T>(to_float(a) + to_float(b));
  }
  std::memcpy(to, &a, sizeof(T));
}

inline void add_elements(ElementType element, uint8_t* to, const uint8_t* from, int64_t bytes) {
  const auto each = [&](auto zero) {
    using T = decltype(zero);
    for (int64_t i = 0; i < bytes; i += sizeof(T)) add_one<T>(to + i, from + i);
  };
  if (element == ElementType::f32) each(float());
  if (element == ElementType::bf16) each(bf16());
  if (element == ElementType::fp16) each(fp16());
  if (element == ElementType::i32 || element == ElementType::u32) each(uint32_t());
  if (element == ElementType::i64 || element == ElementType::u64) each(uint64_t());
}

inline bool can_add(ElementType element) { return element >= ElementType::f32 && element <= ElementType::u64; }

}  // namespace host

struct TensorMap {
  uint8_t* base = nullptr;
  int rank = 0, bytes = 0;  // of an element
  host::ElementType element = host::ElementType::none;
  Swizzle swizzle = Swizzle::none;
  int64_t size[5] = {}, stride[5] = {};  // strides in bytes
  int box[5] = {};
  int64_t box_bytes() const {
    int64_t all = bytes;
    for (int i = 0; i < rank; ++i) all *= box[i];
    return all;
  }
};

template <class T>
int make_tensor_map(TensorMap& map, const T* base, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                    std::initializer_list<int> box, Swizzle swizzle = Swizzle::none, Where at = Where::current()) {
  static_assert(host::element_of<T>() != host::ElementType::none, "no tensor map has elements of this type");
  std::string wrong;
  const auto want = [&](bool right, const std::string& text) {
    if (!right && wrong.empty()) wrong = text;
  };
  const int rank = static_cast<int>(sizes.size());
  want(rank >= 1 && rank <= 5, host::format("a tensor map has 1 to 5 dimensions, not %d", rank));
  want(static_cast<int>(strides.size()) == rank - 1 && static_cast<int>(box.size()) == rank,
       host::format("%d sizes go with %d strides (the innermost is 1) and %d box sizes, not %zu and %zu", rank, rank - 1, rank,
                    strides.size(), box.size()));
  map = TensorMap();
  if (wrong.empty()) {
    map.base = reinterpret_cast<uint8_t*>(const_cast<std::remove_const_t<T>*>(base));
    map.rank = rank, map.bytes = sizeof(T), map.element = host::element_of<T>(), map.swizzle = swizzle;
    std::copy(sizes.begin(), sizes.end(), map.size);
    std::copy(box.begin(), box.end(), map.box);
    map.stride[0] = sizeof(T);
    int next = 1;
    for (int64_t stride : strides) map.stride[next++] = stride * static_cast<int64_t>(sizeof(T));
    want(reinterpret_cast<uint64_t>(base) % 16 == 0, "the tensor's address must be a multiple of 16 bytes");
    for (int i = 0; i < rank; ++i) {
      want(map.size[i] >= 1 && map.size[i] <= int64_t{1} << 32,
           host::format("size %d must be 1 to 2^32, not %lld", i, static_cast<long long>(map.size[i])));
      want(map.box[i] >= 1 && map.box[i] <= 256, host::format("box size %d must be 1 to 256, not %d", i, map.box[i]));
      if (i > 0) {
        want(map.stride[i] > 0 && map.stride[i] % 16 == 0 && map.stride[i] < int64_t{1} << 40,
             host::format("stride %d must be a multiple of 16 bytes below 2^40, not %lld bytes", i,
                          static_cast<long long>(map.stride[i])));
      }
    }
    const int row = map.box[0] * map.bytes, span = swizzle_bytes(swizzle);
    want(row % 16 == 0, host::format("a row of the box must be a multiple of 16 bytes, not %d", row));
    want(span == 0 || row == span, host::format("a row of the box must have the %d bytes of the swizzle, not %d", span, row));
  }
  if (wrong.empty()) return 0;
  host::machine.report = host::place(at) + ": make_tensor_map: " + wrong;
  host::machine.failed = true;
  return host::kFailed;
}

namespace host {

// The rows of a box: f(place in shared memory, address in global memory or none, bytes to skip before what lies within the
// tensor, bytes within it). Of a row outside there are 0.
template <class F>
inline void each_row(const TensorMap& map, const int (&first)[5], F f) {
  const int row = map.box[0] * map.bytes;
  const int64_t before = std::clamp<int64_t>(-static_cast<int64_t>(first[0]), 0, map.box[0]);
  const int64_t within = std::clamp<int64_t>(map.size[0] - std::max(first[0], 0), 0, map.box[0] - before);
  int at[5] = {};
  for (int64_t place = 0; place < map.box_bytes(); place += row) {
    bool inside = within > 0;
    int64_t offset = (first[0] + before) * map.bytes;
    for (int i = 1; i < map.rank; ++i) {
      const int64_t index = static_cast<int64_t>(first[i]) + at[i];
      inside = inside && index >= 0 && index < map.size[i];
      offset += index * map.stride[i];
    }
    f(place, inside ? map.base + offset : nullptr, before * map.bytes, inside ? within * map.bytes : 0);
    for (int i = 1; i < map.rank && ++at[i] == map.box[i]; ++i) at[i] = 0;
  }
}

// What all tensor copies check; the coordinates, filled up.
template <class T, int N>
inline void check_box(const TensorMap& map, const int (&c)[N], int (&first)[5], const void* shared, Region* region,
                      const char* what, const Where& at) {
  if (map.rank != N) fail_with(at, format("%s: %d coordinates for a tensor map of %d dimensions", what, N, map.rank));
  if (map.element != element_of<T>()) fail_with(at, format("%s: the shared memory has other elements than the tensor map", what));
  std::copy(c, c + N, first);
  check_alignment(shared, region, map.swizzle == Swizzle::none ? 128 : 8 * swizzle_bytes(map.swizzle), what, at);
}

// A tile's bytes between a row in order and shared memory, piece by piece as the swizzle lays them.
inline uint8_t* piece(uint8_t* tile, Swizzle swizzle, int64_t byte) { return tile + swizzled(swizzle, byte); }

template <class T, int N>
inline void store_box(const TensorMap& map, const int (&c)[N], Shared<T> from, bool add, const char* what, const Where& at) {
  int first[5] = {};
  check_box<T>(map, c, first, from.address(), from.region(), what, at);
  if (add && !can_add(map.element)) fail_with(at, format("%s: 8-bit elements cannot be added", what));
  Groups& groups = groups_of(kBulk);
  const int slot = slot_in_flight(kBulk);
  const Mark source = mark(from.address(), from.region(), map.box_bytes(), 16, Use::read, slot, groups.number, at);
  add_to_group(groups, source, {}, at);
  each_row(map, first, [&](int64_t, uint8_t* p, int64_t, int64_t bytes) {
    if (!p) return;
    add_to_group(groups, {}, mark(p, buffer_at(map.base), bytes, 1, add ? Use::atomic : Use::write, slot, groups.number, at), at);
  });
  uint8_t* tile = reinterpret_cast<uint8_t*>(const_cast<std::remove_const_t<T>*>(from.address()));
  run_in_group(groups, at, [map, first, tile, add] {
    uint8_t row[256 * 8];
    each_row(map, first, [&](int64_t place, uint8_t* p, int64_t skip, int64_t bytes) {
      if (!p) return;
      for (int i = 0; i < map.box[0] * map.bytes; i += 16) std::memcpy(row + i, piece(tile, map.swizzle, place + i), 16);
      if (add) {
        add_elements(map.element, p, row + skip, bytes);
      } else {
        std::memcpy(p, row + skip, bytes);
      }
    });
  });
}

template <class T>
inline void store_bulk(Global<T> to, Shared<const T> from, int bytes, bool add, const char* what, const Where& at) {
  if (bytes < 16 || bytes % 16) fail_with(at, format("%s: the bytes must be a multiple of 16, not %d", what, bytes));
  if (add && !can_add(element_of<T>())) fail_with(at, format("%s: these elements cannot be added", what));
  Groups& groups = groups_of(kBulk);
  const int slot = slot_in_flight(kBulk);
  const Mark source = mark(from.address(), from.region(), bytes, 16, Use::read, slot, groups.number, at);
  add_to_group(groups, source,
               mark(to.address(), to.region(), bytes, 16, add ? Use::atomic : Use::write, slot, groups.number, at), at);
  run_in_group(groups, at,
               [p = reinterpret_cast<uint8_t*>(to.address()), q = reinterpret_cast<const uint8_t*>(from.address()), bytes, add] {
                 if (add) {
                   add_elements(element_of<T>(), p, q, bytes);
                 } else {
                   std::memcpy(p, q, bytes);
                 }
               });
}

}  // namespace host

template <L2 CACHE = L2::normal, class T, int N>
inline void tensor_load(Shared<T> to, const TensorMap& map, Shared<Mbarrier> b, const int (&c)[N], Where at = Where::current()) {
  int first[5] = {};
  host::check_box<T>(map, c, first, to.address(), to.region(), "tensor_load", at);
  host::MbarrierState& state = host::barrier_of_copy(b, "tensor_load", at);
  const uint32_t clock = state.base + state.phase + 1;
  host::mark(to.address(), to.region(), map.box_bytes(), 16, host::Use::write, state.slot, clock, at);
  host::each_row(map, first, [&](int64_t, uint8_t* p, int64_t, int64_t bytes) {
    if (p) host::mark(p, host::buffer_at(map.base), bytes, 1, host::Use::read, state.slot, clock, at);
  });
  uint8_t* tile = reinterpret_cast<uint8_t*>(to.address());
  host::copy_to_barrier(state, map.box_bytes(), at, [map, first, tile] {
    uint8_t row[256 * 8];
    host::each_row(map, first, [&](int64_t place, uint8_t* p, int64_t skip, int64_t bytes) {
      std::memset(row, 0, sizeof(row));
      if (p) std::memcpy(row + skip, p, bytes);
      for (int i = 0; i < map.box[0] * map.bytes; i += 16) std::memcpy(host::piece(tile, map.swizzle, place + i), row + i, 16);
    });
  });
}

template <class T, int N>
inline void tensor_store(const TensorMap& map, const int (&c)[N], Shared<T> from, Where at = Where::current()) {
  host::store_box(map, c, from, false, "tensor_store", at);
}
template <class T, int N>
inline void tensor_reduce_add(const TensorMap& map, const int (&c)[N], Shared<T> from, Where at = Where::current()) {
  host::store_box(map, c, from, true, "tensor_reduce_add", at);
}

template <L2 CACHE = L2::normal, class T>
inline void bulk_load(Shared<T> to, std::type_identity_t<Global<const T>> from, int bytes, Shared<Mbarrier> b,
                      Where at = Where::current()) {
  if (bytes < 16 || bytes % 16) host::fail_with(at, host::format("bulk_load: the bytes must be a multiple of 16, not %d", bytes));
  host::MbarrierState& state = host::barrier_of_copy(b, "bulk_load", at);
  const uint32_t clock = state.base + state.phase + 1;
  host::mark(to.address(), to.region(), bytes, 16, host::Use::write, state.slot, clock, at);
  host::mark(from.address(), from.region(), bytes, 16, host::Use::read, state.slot, clock, at);
  host::copy_to_barrier(state, bytes, at, [p = to.address(), q = from.address(), bytes] {
    std::memcpy(static_cast<void*>(p), static_cast<const void*>(q), bytes);
  });
}
template <class T>
inline void bulk_store(Global<T> to, std::type_identity_t<Shared<const T>> from, int bytes, Where at = Where::current()) {
  host::store_bulk(to, from, bytes, false, "bulk_store", at);
}
template <class T>
inline void bulk_reduce_add(Global<T> to, std::type_identity_t<Shared<const T>> from, int bytes, Where at = Where::current()) {
  host::store_bulk(to, from, bytes, true, "bulk_reduce_add", at);
}

inline void bulk_commit(Where = Where::current()) { host::commit_group(host::groups_of(host::kBulk)); }
template <int N>
inline void bulk_wait_read(Where at = Where::current()) {
  host::wait_for_groups(host::groups_of(host::kBulk), N, true, "bulk_wait_read", at);
}
template <int N>
inline void bulk_wait(Where at = Where::current()) {
  host::wait_for_groups(host::groups_of(host::kBulk), N, false, "bulk_wait", at);
}

inline void prefetch_tensor_map(const TensorMap& map, Where at = Where::current()) {
  if (map.rank == 0) host::fail_with(at, "prefetch_tensor_map: no tensor map was made there");
}

// cp.async.
template <int N, class T>
inline void copy_async(Shared<T> to, std::type_identity_t<Global<const T>> from, int valid = N, Where at = Where::current()) {
  constexpr int bytes = N * sizeof(T);
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if (valid < 0 || valid > N) host::fail_with(at, host::format("copy_async: 0 to %d elements can be valid, not %d", N, valid));
  host::Groups& groups = host::groups_of(host::kCopyAsync);
  const int slot = host::slot_in_flight(host::kCopyAsync), read = valid * static_cast<int>(sizeof(T));
  host::Mark source = {};
  if (read) {
    host::check_alignment(from.address(), nullptr, bytes, "copy_async", at);
    source = host::mark(from.address(), from.region(), read, 1, host::Use::read, slot, groups.number, at, true);
  }
  const host::Mark target = host::mark(to.address(), to.region(), bytes, bytes, host::Use::write, slot, groups.number, at, true);
  host::add_to_group(groups, source, target, at);
  host::run_in_group(groups, at, [p = reinterpret_cast<uint8_t*>(to.address()), q = from.address(), read] {
    std::memset(p, 0, bytes);
    if (read) std::memcpy(p, static_cast<const void*>(q), read);
  });
}
inline void copy_async_commit(Where = Where::current()) { host::commit_group(host::groups_of(host::kCopyAsync)); }
template <int N>
inline void copy_async_wait(Where at = Where::current()) {
  host::wait_for_groups(host::groups_of(host::kCopyAsync), N, false, "copy_async_wait", at);
}

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
