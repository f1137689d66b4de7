#pragma once

#include "multi_tensor.h"

// The norm of all tensors of a table of one list; see fastlm/ops/global_norm.py.
typedef struct {
  fastlm_tensor_table table;
  const int32_t* dtypes;  // [tensors], fastlm_dtype
  float* partial;         // [2 * programs], workspace
  unsigned* counter;      // [1], workspace
  float* norm;            // [1]
  int32_t programs;       // thread blocks, at most table.count: a few per multiprocessor
} fastlm_global_norm;

FASTLM_LAUNCHER fastlm_global_norm_fwd(const fastlm_global_norm* args, void* stream);
