// Asynchronous copies on the host body: of tensors and of pieces that lie together, with stores and additions in groups; cp.async.
#pragma once

#include "mbarrier.h"
#include "tensor_map.h"

namespace device {

namespace host {

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

}  // namespace device
