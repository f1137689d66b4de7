#pragma once

#include "fastlm.h"

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

FASTLM_LAUNCHER fastlm_softmax_fwd(const fastlm_softmax* args, void* stream);
FASTLM_LAUNCHER fastlm_softmax_bwd(const fastlm_softmax* args, void* stream);
