// Pointers that check every access: Global<T> and Shared<T> of the host body.
#pragma once

#include <algorithm>
#include <concepts>

#include "meetings.h"
#include "order.h"

namespace device {
namespace host {

enum class Use { read, write, atomic, atomic_read };

inline const char* verb(Use use) { return use == Use::read ? "read" : use == Use::write ? "write" : "atomic access"; }

// "bytes 12 to 15 of shared memory 'partial' (128 bytes)"
inline std::string bytes_of(const Region& region, int64_t offset, size_t bytes) {
  const bool of_another = region.shared && machine.block && region.owner != machine.block->index;
  return format("bytes %lld to %lld of %s%s '%s' (%zu bytes)", static_cast<long long>(offset),
                static_cast<long long>(offset + static_cast<int64_t>(bytes) - 1),
                of_another ? format("block %lld's ", static_cast<long long>(region.owner)).c_str() : "",
                region.shared ? "shared memory" : "buffer", region.name.c_str(), region.bytes);
}

[[noreturn]] inline void fail_race(const Region& region, int64_t offset, size_t bytes, Use use, const Access& before,
                                   const char* did, const Where& at) {
  const bool same = before.block() == machine.block->index, agent = before.thread() >= machine.block_threads;
  const bool of_four = before.thread() >= kOfFour && before.thread() < kInFlight;
  const std::string by = agent ? machine.engine->name(before.block(), before.thread()) : format("thread %d", before.thread());
  fail_with(at, format("race: %s of %s, which %s%s %s at %s; %s", verb(use), bytes_of(region, offset, bytes).c_str(),
                       same ? "" : format("block %lld, ", static_cast<long long>(before.block())).c_str(), by.c_str(), did,
                       place(before.at).c_str(),
                       !same   ? region.shared ? "no cluster barrier lies between"
                                               : "no fence and atomic (device_fence, ticket) lie between"
                       : of_four ? "this thread does not know that all four warps have waited for it"
                       : agent ? "this thread has not waited for it"
                               : "no barrier lies between"));
}

// `now` is the access: the running thread's, or one of an agent that it begins.
inline void track(Region& region, int64_t offset, size_t bytes, Use use, const Access& now, const Where& at) {
  const bool atomic = use == Use::atomic || use == Use::atomic_read;
  for (int64_t i = offset; i < offset + static_cast<int64_t>(bytes); ++i) {
    Cell& cell = region.cells[i];
    if (use != Use::write && !region.written.empty() && !region.written[i]) {
      fail_with(at, format("%s of %s, which nobody wrote", verb(use), bytes_of(region, offset, bytes).c_str()));
    }
    if (cell.writer.key && !(cell.writer.atomic() && atomic) && !ordered(cell.writer, region.shared)) {
      fail_race(region, offset, bytes, use, cell.writer, "wrote", at);
    }
    if (use == Use::read || use == Use::atomic_read) {
      if (cell.readers[0].key && !cell.readers[0].by_same_thread(now)) cell.readers[1] = cell.readers[0];
      cell.readers[0] = now;
      continue;
    }
    for (const Access& reader : cell.readers) {
      if (reader.key && !(reader.atomic() && atomic) && !ordered(reader, region.shared)) {
        fail_race(region, offset, bytes, use, reader, "read", at);
      }
    }
    cell.readers[0] = cell.readers[1] = Access();
    cell.writer = now;
    if (!region.written.empty()) region.written[i] = true;
  }
}

inline Region* buffer_at(const void* p) {
  for (auto& buffer : machine.buffers) {
    if (p >= buffer->begin && p <= buffer->begin + buffer->bytes) {
      if (p < buffer->begin + buffer->bytes) return buffer.get();
    }
  }
  for (auto& buffer : machine.buffers) {  // one past the end: nothing to be read there, but not nobody's
    if (p == buffer->begin + buffer->bytes) return buffer.get();
  }
  return nullptr;
}

// An access to the shared memory of another block of the cluster, which must have begun and not have returned.
inline void check_remote(const Region& region, int64_t offset, size_t bytes, Use use, const Where& at) {
  const Block& mine = *machine.block;
  const Block* const owner = in_cluster(region.owner);
  const char* const wrong = owner == nullptr              ? ": a block that is not in this one's cluster"
                            : machine.thread->phase == 0 ? " before the first cluster barrier: that block may not have begun"
                            : owner->live == 0           ? ": that block has returned"
                                                         : nullptr;
  if (wrong) fail_with(at, format("%s of %s%s", verb(use), bytes_of(region, offset, bytes).c_str(), wrong));
  std::vector<Cluster::Remote>& all = mine.cluster->remote[owner->rank];
  all.resize(machine.cluster_blocks * machine.block_threads);
  all[mine.rank * machine.block_threads + machine.thread->id] = {machine.thread->clock, at, &region, offset, bytes, verb(use)};
}

// Stops at what is wrong with an access whoever makes it. The place in the region, which must be one.
inline int64_t check_place(const void* p, Region* region, size_t bytes, size_t alignment, Use use, const Where& at) {
  if (machine.thread == nullptr) {
    std::fprintf(stderr, "%s: device memory is accessed outside a kernel\n", place(at).c_str());
    std::abort();
  }
  const uint64_t address = reinterpret_cast<uint64_t>(p);
  if (region == nullptr && address + (1 << 20) < 2 << 20) fail_with(at, format("%s through a null pointer", verb(use)));
  if (address % alignment) {
    fail_with(at, format("misaligned %s: %zu bytes at an address that is not a multiple of %zu (%llu past one)", verb(use), bytes,
                         alignment, static_cast<unsigned long long>(address % alignment)));
  }
  if (use == Use::write || use == Use::atomic) ++machine.steps;
  if (region == nullptr) {
    if (machine.buffers.empty()) return 0;  // nothing is registered: nothing is known
    fail_with(at, format("out of bounds: %s of %zu bytes through a pointer into no registered buffer", verb(use), bytes));
  }
  const int64_t offset = static_cast<const uint8_t*>(p) - region->begin;
  if (offset < 0 || offset + bytes > region->bytes) {
    fail_with(at, format("out of bounds: %s of %s", verb(use), bytes_of(*region, offset, bytes).c_str()));
  }
  if (region->shared && region->owner != machine.block->index) check_remote(*region, offset, bytes, use, at);
  if (region->mode == Mode::input && (use == Use::write || use == Use::atomic)) {
    fail_with(at, format("%s of %s, which is an input", verb(use), bytes_of(*region, offset, bytes).c_str()));
  }
  return offset;
}

// Called before every access of `bytes` bytes at `p`, which was made from a pointer into `region`.
inline void check(const void* p, Region* region, size_t bytes, size_t alignment, Use use, const Where& at) {
  const int64_t offset = check_place(p, region, bytes, alignment, use, at);
  if (region == nullptr || region->mode == Mode::input) return;
  const bool atomic = use == Use::atomic || use == Use::atomic_read;
  track(*region, offset, bytes, use, make_access(machine.block->index, machine.thread->id, machine.thread->clock, atomic, at), at);
}

enum class Space { global, shared };

// What p[i] gives: read by conversion to exactly its type, written by assignment, at once. It converts to another type only
// by static_cast, or `c ? p[i] : 0` would be an int here and a float on CUDA.
template <class T>
class Element {
  using Value = std::remove_const_t<T>;

 public:
  Element(T* p, Region* region, const Where& at) : p_(p), region_(region), at_(at) {}
  Element(const Element&) = delete;
  template <class U>
    requires std::same_as<U, Value>
  operator U() && {
    return get();
  }
  template <class U>
    requires(std::is_arithmetic_v<U> && !std::same_as<U, Value>)
  explicit operator U() && {
    return static_cast<U>(get());
  }
  void operator=(Value v) && { set(v); }
  void operator=(Element&& other) && { set(other.get()); }
  void operator+=(Value v) && { set(get() + v); }
  void operator-=(Value v) && { set(get() - v); }
  void operator*=(Value v) && { set(get() * v); }
  Value get() const {
    check(p_, region_, sizeof(T), alignof(T), Use::read, at_);
    return *p_;
  }

 private:
  void set(Value v) const {
    static_assert(!std::is_const_v<T>, "this pointer only reads");
    check(p_, region_, sizeof(T), alignof(T), Use::write, at_);
    *p_ = v;
  }
  T* p_;
  Region* region_;
  Where at_;
};

#define FASTLM_ELEMENT_OPERATOR(OP)                          \
  template <class A, class T>                                \
    requires std::is_arithmetic_v<A>                         \
  auto operator OP(A a, Element<T>&& b) {                    \
    return a OP b.get();                                     \
  }                                                          \
  template <class T, class B>                                \
    requires std::is_arithmetic_v<B>                         \
  auto operator OP(Element<T>&& a, B b) {                    \
    return a.get() OP b;                                     \
  }                                                          \
  template <class T, class U>                                \
  auto operator OP(Element<T>&& a, Element<U>&& b) {         \
    return a.get() OP b.get();                               \
  }
FASTLM_ELEMENT_OPERATOR(+)
FASTLM_ELEMENT_OPERATOR(-)
FASTLM_ELEMENT_OPERATOR(*)
FASTLM_ELEMENT_OPERATOR(/)
FASTLM_ELEMENT_OPERATOR(==)
FASTLM_ELEMENT_OPERATOR(!=)
FASTLM_ELEMENT_OPERATOR(<)
FASTLM_ELEMENT_OPERATOR(>)
FASTLM_ELEMENT_OPERATOR(<=)
FASTLM_ELEMENT_OPERATOR(>=)
#undef FASTLM_ELEMENT_OPERATOR

template <class A, class T>
  requires std::is_arithmetic_v<A>
A& operator+=(A& a, Element<T>&& b) {
  return a += b.get();
}
template <class A, class T>
  requires std::is_arithmetic_v<A>
A& operator*=(A& a, Element<T>&& b) {
  return a *= b.get();
}

// An index, and the line it is used in.
struct Index {
  template <std::integral I>
  Index(I i, Where where = Where::current()) : value(static_cast<int64_t>(i)), at(where) {}
  int64_t value;
  Where at;
};

template <class T, Space SPACE>
class Pointer {
 public:
  Pointer() = default;
  Pointer(std::nullptr_t) {}
  Pointer(T* p)
    requires(SPACE == Space::global)
      : p_(p), region_(buffer_at(p)) {}
  Pointer(T* p, Region* region) : p_(p), region_(region) {}
  operator Pointer<const T, SPACE>() const
    requires(!std::is_const_v<T>)
  {
    return {p_, region_};
  }
  explicit operator bool() const { return p_ != nullptr; }
  bool operator==(std::nullptr_t) const { return p_ == nullptr; }

  Element<T> operator[](Index i) const { return {p_ + i.value, region_, i.at}; }
  Pointer operator+(int64_t n) const { return {p_ + n, region_}; }
  Pointer operator-(int64_t n) const { return {p_ - n, region_}; }
  Pointer& operator+=(int64_t n) { return *this = *this + n; }

  T* address() const { return p_; }
  Region* region() const { return region_; }

 private:
  T* p_ = nullptr;
  Region* region_ = nullptr;
};

}  // namespace host

template <class T>
using Global = host::Pointer<T, host::Space::global>;
template <class T>
using Shared = host::Pointer<T, host::Space::shared>;

}  // namespace device
