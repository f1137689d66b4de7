#pragma once

#include "fastlm.h"

// y = x W^T + bias for up to FASTLM_LINEAR_ROWS rows of x; see fastlm/ops/linear.py and quantized_linear.py. Sums are fp32.
//
// W[n, k] is weight[n, k] (bits 16 or 32), or scale[n, k / group_size] * (code[n, k] - zero[n, k / group_size]) with codes int8
// (bits 8) or two to a byte (bits 4, in the order of pack_int4 in fastlm/ops/quantize.py).
#define FASTLM_LINEAR_ROWS 8

typedef struct {
  const void* x;       // [rows, columns] at x_rows, of x_dtype
  const void* weight;  // [outputs, columns] of x_dtype, int8 codes, or bytes [outputs, groups * group_size / 2]
  const void* scale;   // [outputs, groups] of scale_dtype, contiguous; null for bits 16 and 32
  const void* zero;    // like scale, int8 (bits 8) or uint8 (bits 4), or null for 0 or 8
  const void* bias;    // [outputs] of bias_dtype, contiguous, or null
  void* y;             // [rows, outputs] of x_dtype, contiguous
  float* partial;      // [splits, rows, outputs]; null where splits is 1
  int64_t rows, columns, outputs;
  int64_t weight_stride;  // bytes from a row of the weight to the next
  fastlm_rows x_rows;
  int32_t x_dtype, scale_dtype, bias_dtype;  // fastlm_dtype
  int32_t bits;           // 32, 16, 8 or 4
  int32_t group_size;     // columns that share a scale: 32, 64 or 128; 0 for all of a row
  int32_t splits;         // how many blocks share the columns of a row, from fastlm_linear_splits; their sums are added in order
} fastlm_linear;

FASTLM_LAUNCHER fastlm_linear_fwd(const fastlm_linear* args, void* stream);  // bits 16 and 32

// Among how many blocks the columns are divided on a GPU of so many multiprocessors (args->splits is not read), at least 1. Where
// it is more than 1 the launcher wants `partial`.
FASTLM_LAUNCHER fastlm_linear_splits(const fastlm_linear* args, int multiprocessors);
