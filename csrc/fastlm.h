// The launchers of libfastlm_cuda.so: raw pointers, sizes and strides in elements, a stream. No torch header.
//
// Each is defined at the end of csrc/<op>.cu. It starts its kernels on the stream and returns at once: 0, or the cudaError_t
// that kept them from starting. Compiled for the host (FASTLM_HOST, tests only) the same launcher runs every block on the CPU
// before it returns and ignores the stream.
#pragma once

#include <stdint.h>

// What the library takes and returns. fastlm/ops/_cuda.py holds the same number and refuses a library with another one: count
// both up when a function of bindings.cpp is added, or changes its schema or meaning.
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

// y = softmax(scale * x) over rows; backward dx = scale * y * (dy - sum(dy * y)). See fastlm/ops/softmax.py; there is no mask yet.
typedef struct {
  const void* x;         // [rows, columns] at x_rows; backward: dy
  const void* saved;     // forward: null; backward: y, at saved_rows
  void* y;               // [rows, columns] at y_rows; backward: dx
  int64_t rows, columns; // rows < 2^31
  fastlm_rows x_rows, saved_rows, y_rows;
  int32_t dtype;         // fastlm_dtype of all
  float scale;
} fastlm_softmax;

int fastlm_softmax_fwd(const fastlm_softmax* args, void* stream);
int fastlm_softmax_bwd(const fastlm_softmax* args, void* stream);

// The norm of all tensors of a table; see fastlm/ops/global_norm.py. A tensor is cut into blocks of 2048 elements.
typedef struct {
  const int64_t* addresses;  // [tensors]
  const int64_t* sizes;      // [tensors], elements
  const int32_t* dtypes;     // [tensors], fastlm_dtype
  const int32_t* owners;     // [count]: which tensor a block is of
  const int32_t* blocks;     // [count]: which of its blocks it is
  float* partial;            // [2 * programs], workspace
  unsigned* counter;         // [1], workspace
  float* norm;               // [1]
  int64_t count;
  int32_t programs;          // thread blocks, at most count: a few per multiprocessor
} fastlm_global_norm;

int fastlm_global_norm_fwd(const fastlm_global_norm* args, void* stream);

#ifdef FASTLM_HOST
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif
