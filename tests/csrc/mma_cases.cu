// The warp's matrix product and what works on two 16-bit numbers in a register, for conformance.py.

#include "device/device.h"
#include "device/mma.h"

using namespace device;

// d [warps, 32, 4] += a [warps, 32, 4] b [warps, 32, 2], registers of a lane in a row; twice, with the same operands.
template <class T>
KERNEL(64)
mma_kernel(Global<const uint32_t> a, Global<const uint32_t> b, Global<float> d) {
  const int at = block_x() * block_threads() + thread_id();
  uint32_t left[4], right[2];
  float sums[4];
  for (int i = 0; i < 4; ++i) left[i] = a[at * 4 + i], sums[i] = d[at * 4 + i];
  for (int i = 0; i < 2; ++i) right[i] = b[at * 2 + i];
  mma<T>(sums, left, right);
  mma<T>(sums, left, right);
  for (int i = 0; i < 4; ++i) d[at * 4 + i] = sums[i];
}

// out [3, n]: differences, halves packed anew, bytes chosen.
template <class T>
KERNEL(64)
pairs_kernel(Global<const uint32_t> a, Global<const uint32_t> b, Global<const uint32_t> c, Global<uint32_t> out) {
  const int at = block_x() * block_threads() + thread_id(), n = grid_x() * block_threads();
  const uint32_t x = a[at], y = b[at], z = c[at];
  out[at] = packed_subtract<T>(x, y);
  T halves[2];
  memcpy(halves, &x, 4);
  out[n + at] = pack(halves[1], halves[0]);
  out[2 * n + at] = byte_permute(x, y, z & 0x7777);
}

// out [4, n]: majority, choice by the first, two of three and parity, by lop3's tables.
KERNEL(64) bitwise_kernel(Global<const uint32_t> a, Global<const uint32_t> b, Global<const uint32_t> c, Global<uint32_t> out) {
  const int at = block_x() * block_threads() + thread_id(), n = grid_x() * block_threads();
  const uint32_t x = a[at], y = b[at], z = c[at];
  out[at] = bitwise<0xe8>(x, y, z);
  out[n + at] = bitwise<0xca>(x, y, z);
  out[2 * n + at] = bitwise<0x68>(x, y, z);
  out[3 * n + at] = bitwise<0x96>(x, y, z);
}

extern "C" {
int mma_bf16(const uint32_t* a, const uint32_t* b, float* d, int64_t blocks, void* s) {
  return launch(mma_kernel<bf16>, Dim{static_cast<int>(blocks)}, 64, 0, s, a, b, d);
}
int mma_fp16(const uint32_t* a, const uint32_t* b, float* d, int64_t blocks, void* s) {
  return launch(mma_kernel<fp16>, Dim{static_cast<int>(blocks)}, 64, 0, s, a, b, d);
}
int pairs_bf16(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int64_t blocks, void* s) {
  return launch(pairs_kernel<bf16>, Dim{static_cast<int>(blocks)}, 64, 0, s, a, b, c, out);
}
int pairs_fp16(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int64_t blocks, void* s) {
  return launch(pairs_kernel<fp16>, Dim{static_cast<int>(blocks)}, 64, 0, s, a, b, c, out);
}
int bitwise_of(const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* out, int64_t blocks, void* s) {
  return launch(bitwise_kernel, Dim{static_cast<int>(blocks)}, 64, 0, s, a, b, c, out);
}
}
