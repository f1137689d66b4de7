// The launchers of libfastlm_cuda.so: raw pointers, sizes and strides in elements, a stream. No torch header.
//
// Each is defined at the end of csrc/<op>.cu. It starts its kernels on the stream and returns at once: 0, or the cudaError_t
// that kept them from starting. Compiled for the host (FASTLM_HOST, tests only) the same launcher runs every block on the CPU
// before it returns and ignores the stream.
#pragma once

#include <stdint.h>

// What the library takes and returns. fastlm/ops/_cuda.py holds the same number and refuses a library with another one: count
// both up when a schema in bindings.cpp changes, or the meaning of one.
#define FASTLM_LIBRARY_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif
#ifdef FASTLM_HOST  // where tests call the launchers themselves
#pragma GCC visibility push(default)
#endif

typedef enum { FASTLM_FLOAT32 = 0, FASTLM_BFLOAT16 = 1, FASTLM_FLOAT16 = 2 } fastlm_dtype;

// Where the rows of a tensor [..., N] lie: row r, counted through, begins at (r / inner) * outer_stride + (r % inner) *
// inner_stride, and its elements follow each other. Heads of one fused product are so read where they lie.
typedef struct {
  int64_t inner, outer_stride, inner_stride;
} fastlm_rows;

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

int fastlm_rms_norm_fwd(const fastlm_rms_norm* args, void* stream);

#ifdef FASTLM_HOST
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
