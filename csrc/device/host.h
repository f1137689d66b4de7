// The host body of the device layer: the same names as cuda.h, on fibers, with every access checked. For tests.
#pragma once

#include "host/report.h"
#include "host/numbers.h"
#include "host/launch.h"

namespace device {

inline int thread_id() { return host::machine.thread->id; }
inline int block_threads() { return host::machine.block_threads; }
inline int lane_id() { return thread_id() % 32; }
inline int warp_id() { return thread_id() / 32; }
inline int block_warps() { return block_threads() / 32; }
inline int block_x() { return host::machine.block->x; }
inline int block_y() { return host::machine.block->y; }
inline int block_z() { return host::machine.block->z; }
inline int grid_x() { return host::machine.grid.x; }
inline int grid_y() { return host::machine.grid.y; }
inline int grid_z() { return host::machine.grid.z; }

// The lambda's variable stands for the place in the source: every instantiation of a template has its own.
#define SHARED_ARRAY(T, name, count)                                                     \
  const device::Shared<T> name = device::host::static_array<T>(                          \
      #name, count, [] { static char key; return static_cast<const void*>(&key); }(), device::Where::current())

template <class T>
inline Shared<T> dynamic_shared(int byte_offset = 0) {
  host::Region& region = host::machine.block->dynamic;
  return {reinterpret_cast<T*>(region.begin + byte_offset), &region};
}

template <class U, class T, host::Space SPACE>
inline host::Pointer<U, SPACE> pointer_cast(host::Pointer<T, SPACE> p) {
  return {reinterpret_cast<U*>(p.address()), p.region()};
}
template <class T>
inline Global<T> pointer_at(uint64_t address) {
  return Global<T>(reinterpret_cast<T*>(address));
}

template <int N, Cache CACHE = Cache::normal, class T, host::Space SPACE>
inline Vector<std::remove_const_t<T>, N> load_vector(host::Pointer<T, SPACE> p, Where at = Where::current()) {
  host::check(p.address(), p.region(), N * sizeof(T), N * sizeof(T), host::Use::read, at);
  Vector<std::remove_const_t<T>, N> v;
  std::memcpy(&v, p.address(), sizeof(v));
  return v;
}

template <Cache CACHE = Cache::normal, class T, int N, host::Space SPACE>
inline void store_vector(host::Pointer<T, SPACE> p, const Vector<T, N>& v, Where at = Where::current()) {
  host::check(p.address(), p.region(), N * sizeof(T), N * sizeof(T), host::Use::write, at);
  std::memcpy(p.address(), &v, sizeof(v));
}

inline void block_barrier(Where at = Where::current()) { host::arrive(0, block_threads(), true, "block_barrier", at); }
inline void named_barrier(int id, int threads, Where at = Where::current()) {
  if (id < 1) host::fail_with(at, "named_barrier: barrier 0 is block_barrier's; named ones are 1 to 15");
  host::arrive(id, threads, true, "named_barrier", at);
}
inline void named_barrier_arrive(int id, int threads, Where at = Where::current()) {
  if (id < 1) host::fail_with(at, "named_barrier_arrive: barrier 0 is block_barrier's; named ones are 1 to 15");
  host::arrive(id, threads, false, "named_barrier_arrive", at);
}
inline void warp_barrier(uint32_t mask = kAllLanes, Where at = Where::current()) {
  host::meet(host::Kind::barrier, "warp_barrier", mask, 0, lane_id(), at);
}

namespace host {

template <class T>
inline T exchange(const char* what, T v, int source, uint32_t mask, const Where& at) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  bits = meet(Kind::shuffle, what, mask, bits, source, at);
  std::memcpy(&v, &bits, sizeof(T));
  return v;
}

inline int segment(int width) { return lane_id() & ~(width - 1); }

}  // namespace host

template <class T>
inline T shuffle(T v, int lane, uint32_t mask = kAllLanes, int width = 32, Where at = Where::current()) {
  return host::exchange("shuffle", v, host::segment(width) + (lane & (width - 1)), mask, at);
}
template <class T>
inline T shuffle_up(T v, int n, uint32_t mask = kAllLanes, int width = 32, Where at = Where::current()) {
  const int from = lane_id() - n;
  return host::exchange("shuffle_up", v, from < host::segment(width) ? lane_id() : from, mask, at);
}
template <class T>
inline T shuffle_down(T v, int n, uint32_t mask = kAllLanes, int width = 32, Where at = Where::current()) {
  const int from = lane_id() + n;
  return host::exchange("shuffle_down", v, from >= host::segment(width) + width ? lane_id() : from, mask, at);
}
template <class T>
inline T shuffle_xor(T v, int bits, uint32_t mask = kAllLanes, int width = 32, Where at = Where::current()) {
  const int from = lane_id() ^ bits;  // lanes of groups before this one can be read, those of later ones not
  return host::exchange("shuffle_xor", v, from >= host::segment(width) + width ? lane_id() : from, mask, at);
}
inline uint32_t warp_ballot(bool predicate, uint32_t mask = kAllLanes, Where at = Where::current()) {
  return static_cast<uint32_t>(host::meet(host::Kind::vote, "warp_ballot", mask, predicate, lane_id(), at));
}
inline bool warp_any(bool predicate, uint32_t mask = kAllLanes, Where at = Where::current()) {
  return host::meet(host::Kind::vote, "warp_any", mask, predicate, lane_id(), at) != 0;
}
inline bool warp_all(bool predicate, uint32_t mask = kAllLanes, Where at = Where::current()) {
  return host::meet(host::Kind::vote, "warp_all", mask, predicate, lane_id(), at) == mask;
}

namespace host {

// p = f(p), and the old value. An atomic of one block is seen by the atomics of others at the same address that come later.
template <class T, Space SPACE, class F>
inline T update(Pointer<T, SPACE> p, F f, const Where& at) {
  static_assert(std::is_integral_v<T>, "floating-point atomics make results depend on the order of threads");
  if constexpr (SPACE == Space::global) acquire(p.address());
  check(p.address(), p.region(), sizeof(T), sizeof(T), Use::atomic, at);
  const T old = *p.address();
  *p.address() = f(old);
  if constexpr (SPACE == Space::global) release(p.address());
  return old;
}

}  // namespace host

template <class T, host::Space SPACE>
inline T atomic_add(host::Pointer<T, SPACE> p, std::type_identity_t<T> v, Where at = Where::current()) {
  return host::update(p, [=](T old) { return static_cast<T>(old + v); }, at);
}
template <class T, host::Space SPACE>
inline T atomic_max(host::Pointer<T, SPACE> p, std::type_identity_t<T> v, Where at = Where::current()) {
  return host::update(p, [=](T old) { return old > v ? old : v; }, at);
}
template <class T, host::Space SPACE>
inline T atomic_exchange(host::Pointer<T, SPACE> p, std::type_identity_t<T> v, Where at = Where::current()) {
  return host::update(p, [=](T) { return v; }, at);
}
template <class T, host::Space SPACE>
inline T atomic_cas(host::Pointer<T, SPACE> p, std::type_identity_t<T> expected, std::type_identity_t<T> v,
                    Where at = Where::current()) {
  return host::update(p, [=](T old) { return old == expected ? v : old; }, at);
}
template <host::Space SPACE>
inline unsigned atomic_wrap(host::Pointer<unsigned, SPACE> p, unsigned last, Where at = Where::current()) {
  return host::update(p, [=](unsigned old) { return old >= last ? 0 : old + 1; }, at);
}

inline void device_fence(Where = Where::current()) { host::publish(); }

inline unsigned load_acquire(Global<const unsigned> p, Where at = Where::current()) {
  host::check(p.address(), p.region(), 4, 4, host::Use::atomic_read, at);
  host::acquire(p.address());
  return *p.address();
}
inline void store_release(Global<unsigned> p, unsigned v, Where at = Where::current()) {
  host::publish();
  host::check(p.address(), p.region(), 4, 4, host::Use::atomic, at);
  *p.address() = v;
  host::release(p.address());
}
inline void spin_pause(Where at = Where::current()) { host::wait(host::State::spinning, "spin_pause", at); }

}  // namespace device
