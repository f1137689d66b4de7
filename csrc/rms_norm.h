#pragma once

#include "fastlm.h"

// y = s * rstd * (weight_offset + weight) + bias with rstd = 1 / sqrt(mean(s^2) + eps), s = dropout(x) + residual; see
// fastlm/ops/rms_norm.py. Sums are fp32.
typedef struct {
  const void* x;            // [rows, columns] at x_rows
  const void* weight;       // [columns], or null
  const void* bias;         // [columns], or null
  const void* residual;     // [rows, columns] at residual_rows, or null
  const int64_t* seed;      // (seed, offset) of dropout, or null for none
  void* y;                  // [rows, columns], contiguous, of x_dtype
  void* residual_out;       // [rows, columns], contiguous, of residual_dtype: s; null without a residual
  float* rstd;              // [rows]
  int64_t rows, columns;    // rows < 2^31
  fastlm_rows x_rows, residual_rows;
  int32_t x_dtype, parameter_dtype, residual_dtype;  // fastlm_dtype; the last two are x_dtype or FASTLM_FLOAT32
  int32_t round_first;      // whether s * rstd is rounded to x_dtype before it is scaled
  float eps, weight_offset;
  uint32_t threshold;       // of dropout: an element whose random word is below it is dropped
  float grown;              // what the kept ones are multiplied by
} fastlm_rms_norm;

FASTLM_LAUNCHER fastlm_rms_norm_fwd(const fastlm_rms_norm* args, void* stream);
