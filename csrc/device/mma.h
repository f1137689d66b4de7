// 16-bit numbers two to a register, and the warp's matrix product on them, for both bodies.
//
//   pack(a, b)                      two bf16 or fp16 in a register, a in its low half
//   packed_subtract<T>(a, b)        a - b of both halves, each rounded to T
//   bitwise<TABLE>(a, b, c)         any function of three bits, of each bit: TABLE is its value at 0xf0, 0xcc, 0xaa (PTX lop3)
//   byte_permute(a, b, selector)    byte i of the result is byte (selector >> 4 * i & 7) of b:a (PTX prmt; a holds bytes 0 to 3)
//   mma<T>(d, a, b)                 d += A B for all 32 lanes at once: A 16 x 16, B 16 x 8, of T = bf16 or fp16, sums in fp32
//
// The places of mma.sync.aligned.m16n8k16 (PTX ISA), lane = 4 * g + t:
//   a[0] A(g, 2t) A(g, 2t + 1)    a[1] row g + 8    a[2] columns 2t + 8, 2t + 9    a[3] row g + 8 of those
//   b[0] B(2t, g) B(2t + 1, g)    b[1] rows 2t + 8, 2t + 9
//   d[0] D(g, 2t)   d[1] D(g, 2t + 1)   d[2], d[3] row g + 8
// A sum over k does not depend on how k is numbered: whoever gives A and B the same numbering may choose it.
#pragma once

#include "device.h"

#ifdef FASTLM_HOST
#include <unordered_map>
#endif

namespace device {

template <class T>
DEVICE uint32_t pack(T a, T b) {
  static_assert(sizeof(T) == 2, "two 16-bit numbers fill a register");
  uint16_t halves[2];
  memcpy(halves, &a, 2);
  memcpy(halves + 1, &b, 2);
  return halves[0] | static_cast<uint32_t>(halves[1]) << 16;
}

#ifndef FASTLM_HOST

template <class T>
DEVICE uint32_t packed_subtract(uint32_t a, uint32_t b) {
  using Two = std::conditional_t<std::is_same_v<T, bf16>, __nv_bfloat162, __half2>;
  Two x, y;
  memcpy(&x, &a, 4);
  memcpy(&y, &b, 4);
  x = __hsub2(x, y);
  memcpy(&a, &x, 4);
  return a;
}

// In assembly: with two constants the compiler makes two instructions of it.
template <int TABLE>
DEVICE uint32_t bitwise(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(TABLE));
  return d;
}

DEVICE uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

template <class T>
DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where = {}) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<T, fp16>, "mma takes bf16 or fp16");
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#else

template <class T>
inline T half_of(uint32_t pair, int which) {
  return T{static_cast<uint16_t>(pair >> 16 * which)};
}

template <class T>
inline uint32_t packed_subtract(uint32_t a, uint32_t b) {
  T out[2];
  for (int i = 0; i < 2; ++i) out[i] = from_float<T>(to_float(half_of<T>(a, i)) - to_float(half_of<T>(b, i)));
  return pack(out[0], out[1]);
}

template <int TABLE>
inline uint32_t bitwise(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) {
    if (TABLE >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return d;
}

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

namespace host {

// What the lanes bring to a product. Two of each: a lane may be at its next product while others still read for this one, but not
// further, because products are met at by all lanes.
struct Operands {
  uint32_t a[4], b[2];
};
struct Brought {
  Operands turns[2];
  int next = 0;
};
inline std::unordered_map<const Thread*, Brought> brought;

}  // namespace host

// The products of a k16 are added in fp64 and rounded once; the hardware's order and rounding of them are not documented.
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where at = Where::current()) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "mma takes bf16 or fp16");
  const auto warp = host::machine.block->threads.begin() + thread_id() / 32 * 32;
  host::Brought& mine = host::brought[host::machine.thread];
  const uint64_t turn = mine.next;
  std::memcpy(mine.turns[turn].a, a, sizeof(a));
  std::memcpy(mine.turns[turn].b, b, sizeof(b));
  mine.next ^= 1;
  const uint64_t turns = host::meet(host::Kind::vote, "mma", kAllLanes, turn, 0, at);  // of all lanes: once in other warps
  const auto of = [&](int lane) -> const host::Operands& { return host::brought[warp[lane].get()].turns[turns >> lane & 1]; };
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = 0;
    for (int k = 0; k < 16; ++k) {
      const int from = k % 8 / 2;
      const uint32_t left = of(4 * g + from).a[i / 2 + k / 8 * 2], right = of(4 * (2 * t + i % 2) + from).b[k / 8];
      sum += static_cast<double>(to_float(half_of<T>(left, k % 2))) * to_float(half_of<T>(right, k % 2));
    }
    d[i] = static_cast<float>(d[i] + sum);
  }
}

#endif

}  // namespace device
