#pragma once

#include "fastlm.h"

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

FASTLM_LAUNCHER fastlm_global_norm_fwd(const fastlm_global_norm* args, void* stream);
