// The search for a threshold among ordered keys, which count (top-k) or weigh (top-p) what lies above.
#pragma once

#include "device/device.h"

namespace {

using namespace device;

constexpr int kMostThreads = 512, kMostWarps = kMostThreads / 32;
constexpr uint32_t kNan = 0xffffffffu, kMinusInfinity = 0x007fffffu;  // keys

// Ordered as the numbers are, NaN above all, one key for both zeros.
DEVICE uint32_t key_of(float x) {
  if (x != x) return kNan;
  const uint32_t bits = float_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float value_of(uint32_t key) { return bits_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

template <class T>
constexpr int kLowestBit = sizeof(T) == 4 ? 0 : std::is_same_v<T, bf16> ? 16 : 12;  // of a key that says something; even

// Three sums over the block, in every thread.
DEVICE void block_sums(uint64_t (&sums)[3], Where at = Where::current()) {
  SHARED_ARRAY(uint64_t, partial, 3 * kMostWarps);
  block_barrier(at);  // a call before this one may still be read from
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    sums[c] = warp_sum(sums[c], at);
    if (lane_id() == 0) partial[c * kMostWarps + warp_id()] = sums[c];
  }
  block_barrier(at);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    sums[c] = 0;
    if (lane_id() % kMostWarps < block_warps()) sums[c] = partial[c * kMostWarps + lane_id() % kMostWarps];
    sums[c] = warp_sum<kMostWarps>(sums[c], at);
  }
}

// The largest key at and above which `target` lies, as far as bits from `lowest` on tell: it is in [low, high], or all together
// do not reach the target; then one not above `low`. each(f) calls f(key, amount) for every key of this thread.
template <class Each>
DEVICE uint32_t search(uint32_t low, uint32_t high, int lowest, uint64_t target, Each each, Where at = Where::current()) {
  int bit = 32;
  while (bit > lowest && (low ^ high) >> (bit - 2) == 0) bit -= 2;
  uint32_t found = bit == 32 ? 0 : high >> bit << bit;
#pragma unroll 1
  while (bit > lowest) {
    bit -= 2;
    uint64_t above[3] = {0, 0, 0};
    each([&](uint32_t key, uint64_t amount) {
      const uint32_t digit = key < found ? 0 : (key - found) >> bit;
#pragma unroll
      for (uint32_t c = 0; c < 3; ++c) above[c] += digit > c ? amount : 0;
    });
    block_sums(above, at);
    found += static_cast<uint32_t>((above[0] >= target) + (above[1] >= target) + (above[2] >= target)) << bit;
  }
  return found;
}

}  // namespace
