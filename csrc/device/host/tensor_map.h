// Tensor maps on the host body: what one describes, what the driver refuses, where the rows of a box lie.
#pragma once

#include <initializer_list>

#include "launch.h"

#define GRID_CONSTANT(...) const __VA_ARGS__

namespace device {
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

}  // namespace host

}  // namespace device
