// What both kernels of few_rows.h read: numbers of any dtype, zero points, where a row of x begins.
#pragma once

#include "device/device.h"
#include "linear.h"

namespace few_rows {

using namespace device;

constexpr int kRows = FASTLM_LINEAR_ROWS;  // of x at most: the columns of a product

// A number of any dtype as it lies in memory, and its value: so that a load can be long on its way before it is waited for.
DEVICE uint32_t load_raw(const void* p, int32_t dtype, int64_t index, Where at = Where::current()) {
  if (dtype == FASTLM_FLOAT32) return load_vector<1>(Global<const uint32_t>(static_cast<const uint32_t*>(p)) + index, at)[0];
  return load_vector<1>(Global<const uint16_t>(static_cast<const uint16_t*>(p)) + index, at)[0];
}
DEVICE float value_of(uint32_t raw, int32_t dtype) {
  if (dtype == FASTLM_FLOAT32) return bits_float(raw);
  if (dtype == FASTLM_BFLOAT16) return bits_float(raw << 16);
  fp16 half;
  const uint16_t bits = static_cast<uint16_t>(raw);
  memcpy(&half, &bits, 2);
  return to_float(half);
}

// The zero point of a row's group; what stands for 0 where there are none.
template <int BITS>
DEVICE int load_zero(const fastlm_linear& a, int64_t index, Where at = Where::current()) {
  if (a.zero == nullptr) return BITS == 4 ? 8 : 0;
  using T = std::conditional_t<BITS == 4, uint8_t, int8_t>;
  return load_vector<1>(Global<const T>(static_cast<const T*>(a.zero)) + index, at)[0];
}

// Where a row of x, one of a few, begins.
DEVICE int64_t row_start(const fastlm_rows& at, int row) {
  if (at.inner == 1) return row * at.outer_stride;
  const int inner = static_cast<int>(minimum<int64_t>(at.inner, kRows));
  return row / inner * at.outer_stride + row % inner * at.inner_stride;
}

}  // namespace few_rows
