#pragma once

#include "fastlm.h"

// The arguments of rms_norm's and layer_norm's launchers; fastlm/ops/rms_norm.py and layer_norm.py have the contracts.

// y = (s - mean) * rstd * (weight_offset + weight) + bias with s = dropout(x) + residual, rstd = 1 / sqrt(mean((s - mean)^2) +
// eps). For rms_norm `mean` is 0. Sums are fp32.
typedef struct {
  const void* x;            // [rows, columns] at x_rows
  const void* weight;       // [columns], or null
  const void* bias;         // [columns], or null
  const void* residual;     // [rows, columns] at residual_rows, or null
  const int64_t* seed;      // (seed, offset) of dropout, or null for none
  void* y;                  // [rows, columns], contiguous, of x_dtype
  void* residual_out;       // [rows, columns], contiguous, of residual_dtype: s; null without a residual
  float* mean;              // [rows]; null for rms_norm
  float* rstd;              // [rows]
  int64_t rows, columns;    // rows < 2^31
  fastlm_rows x_rows, residual_rows;
  int32_t x_dtype, parameter_dtype, residual_dtype;  // fastlm_dtype; the last two are x_dtype or FASTLM_FLOAT32
  int32_t round_first;      // whether (s - mean) * rstd is rounded to x_dtype before it is scaled
  float eps, weight_offset;
  uint32_t threshold;       // of dropout: an element whose random word is below it is dropped
  float grown;              // what the kept ones are multiplied by
} fastlm_norm;

// With g = dy * (weight_offset + weight) and xhat = (s - mean) * rstd:
// ds = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dsum, dx = dropout(ds), dweight = sum of dy * xhat over rows, dbias of dy.
// For rms_norm mean(g) is 0.
typedef struct {
  const void* dy;           // [rows, columns] at dy_rows
  const void* dsum;         // [rows, columns] at dsum_rows, of x_dtype: the gradient of residual_out, or null
  const void* x;            // [rows, columns] at x_rows: s, or x where dropout and no residual came before
  const void* weight;       // [columns], or null
  const float* mean;        // [rows]; null for rms_norm
  const float* rstd;        // [rows]
  const int64_t* seed;      // (seed, offset) of dropout, or null for none
  void* dx;                 // [rows, columns], contiguous, of dtype
  void* dresidual;          // [rows, columns], contiguous, of x_dtype: ds; null where dx is the same
  void* dweight;            // [columns], or null where it is not needed
  void* dbias;              // [columns], or null where it is not needed
  float* partial;           // [2, parts, columns], workspace
  float* row_sums;          // [2, rows], workspace
  int64_t rows, columns;    // rows < 2^31
  fastlm_rows dy_rows, dsum_rows, x_rows;
  int32_t dtype, x_dtype, parameter_dtype;  // fastlm_dtype; the last two are dtype or FASTLM_FLOAT32
  int32_t has_residual;     // whether x is s, so that dropout comes in at the end alone
  int32_t parts;            // the most sums over rows that are taken side by side, at least 1: a few per multiprocessor
  float weight_offset;
  uint32_t threshold;
  float grown;
} fastlm_norm_bwd;
