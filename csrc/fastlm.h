// What the launchers of libfastlm_cuda.so share: raw pointers, sizes and strides in elements, a stream. No torch header.
//
// Each op has csrc/<op>.h with the struct of its arguments and its launchers, which are defined at the end of csrc/<op>.cu. A
// launcher starts its kernels on the stream and returns at once: 0, or the cudaError_t that kept them from starting. Compiled
// for the host (FASTLM_HOST, tests only) the same launcher runs every block on the CPU before it returns and ignores the stream.
#pragma once

#include <stdint.h>

// What the library takes and returns. fastlm/ops/_cuda.py holds the same number and refuses a library with another one: count
// both up when a function of bindings/ is added, or changes its schema or meaning.
#define FASTLM_LIBRARY_VERSION 3

#define FASTLM_LAUNCHER extern "C" int

typedef enum { FASTLM_FLOAT32 = 0, FASTLM_BFLOAT16 = 1, FASTLM_FLOAT16 = 2 } fastlm_dtype;

// Where the rows of a tensor [..., N] lie: row r, counted through, begins at (r / inner) * outer_stride + (r % inner) *
// inner_stride, and its elements follow each other. Heads of one fused product are so read where they lie.
typedef struct {
  int64_t inner, outer_stride, inner_stride;
} fastlm_rows;
