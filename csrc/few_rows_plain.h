// few_rows.h by plain fp32 multiply-adds: two rows of W to a warp.
#pragma once

#include "few_rows_numbers.h"

namespace few_rows {

constexpr int kPlainWarps = 4;
constexpr int kPlainRows = 2;  // of W of a warp

// Bytes of W that a lane reads at a time: VECTORS, 16 of fp32 or eight codes (more are unrolled into code that spills); else one
// weight, two of 4 bits.
template <int BITS, bool VECTORS>
constexpr int kPlainUnit = VECTORS ? minimum(BITS, 16) : maximum(BITS / 8, 1);

// A warp to kPlainRows rows of W, of so many units.
template <class X, int BITS, bool VECTORS>
KERNEL(32 * kPlainWarps)
plain_kernel(const fastlm_linear a, int units) {
  constexpr int UNIT = kPlainUnit<BITS, VECTORS>;
  constexpr int RUN = VECTORS ? 4 : 1;  // columns that follow each other
  constexpr int RUNS = UNIT * 8 / (BITS * RUN);
  const int64_t first_row = (static_cast<int64_t>(block_x()) * kPlainWarps + warp_id()) * kPlainRows;
  SHARED_ARRAY(int64_t, starts, kRows);  // of the rows of x: too many for registers
  if (thread_id() < a.rows) starts[thread_id()] = row_start(a.x_rows, thread_id());
  block_barrier();
  if (first_row >= a.outputs) return;  // a whole warp
  int group_shift = 31;                // of a unit's number
  if (a.group_size) {
    for (group_shift = 0; UNIT << group_shift < a.group_size * BITS / 8;) ++group_shift;
  }
  const int columns = static_cast<int>(a.columns), groups = ((units - 1) >> group_shift) + 1;
  float sum[kPlainRows][kRows] = {};
  for (int unit = lane_id(); unit < units; unit += 32) {
    const int group = unit >> group_shift;
    Vector<uint8_t, UNIT> w[kPlainRows];
    float scale[kPlainRows];
    int zero[kPlainRows];
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      const int64_t row = minimum(first_row + r, a.outputs - 1);
      w[r] = load_vector<UNIT, Cache::streaming>(Global<const uint8_t>(static_cast<const uint8_t*>(a.weight)) +
                                                 (row * a.weight_stride + int64_t{UNIT} * unit));
      scale[r] = 1, zero[r] = 0;
      if constexpr (BITS < 16) {
        scale[r] = value_of(load_raw(a.scale, a.scale_dtype, row * groups + group), a.scale_dtype);
        zero[r] = load_zero<BITS>(a, row * groups + group);
      }
    }
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
      int at = i * RUN * BITS / 8;  // byte of the unit
      int column = (unit * RUNS + i) * RUN;
      if constexpr (BITS == 4) {  // the low halves of the unit's bytes, then the high ones
        at = i % (RUNS / 2) * RUN;
        column = group * a.group_size + (unit - (group << group_shift)) * UNIT + at + (i >= RUNS / 2 ? a.group_size / 2 : 0);
      }
      float weights[kPlainRows][RUN];
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) {
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
          if constexpr (BITS >= 16) {
            X v;
            memcpy(&v, w[r].values + at + j * sizeof(X), sizeof(X));
            weights[r][j] = to_float(v);
          } else {
            const int code = BITS == 8 ? static_cast<int8_t>(w[r][at + j]) : w[r][at + j] >> (i >= RUNS / 2 ? 4 : 0) & 15;
            weights[r][j] = static_cast<float>(code - zero[r]) * scale[r];
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (m >= a.rows) break;
        const int64_t start = starts[m];
        const Global<const X> x = Global<const X>(static_cast<const X*>(a.x)) + (start + column);
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
          if (column + j >= columns) break;
          const float v = to_float(load_vector<1>(x + j)[0]);
#pragma unroll
          for (int r = 0; r < kPlainRows; ++r) sum[r][m] += v * weights[r][j];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) {
    const int64_t n = first_row + r;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m >= a.rows) break;
      float v = warp_sum(sum[r][m]);
      if (lane_id() != 0 || n >= a.outputs) continue;
      if (a.bias) v += value_of(load_raw(a.bias, a.bias_dtype, n), a.bias_dtype);
      const Global<X> y(static_cast<X*>(a.y));
      y[m * a.outputs + n] = from_float<X>(v);
    }
  }
}

}  // namespace few_rows
