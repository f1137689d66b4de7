#pragma once

#include "fastlm.h"

// What a mask is made of: bytes that are 0 where an element is hidden, or floats that are added.
typedef enum {
  FASTLM_MASK_NONE = 0,
  FASTLM_MASK_BOOL = 1,
  FASTLM_MASK_FLOAT32 = 2,
  FASTLM_MASK_BFLOAT16 = 3,
  FASTLM_MASK_FLOAT16 = 4
} fastlm_mask_kind;

// y = softmax(scale * x + mask) over rows; backward dx = scale * y * (dy - sum(dy * y)). See fastlm/ops/softmax.py.
typedef struct {
  const void* x;         // [rows, columns] at x_rows; backward: dy
  const void* saved;     // forward: null; backward: y, at saved_rows
  void* y;               // [rows, columns] at y_rows; backward: dx
  int64_t rows, columns; // rows < 2^31
  fastlm_rows x_rows, saved_rows, y_rows;
  int32_t dtype;         // fastlm_dtype of all
  float scale;
  const void* mask;      // broadcast to [rows, columns]; forward only. Row r = (i * mask_middle + j) * mask_inner + k begins at
                         // mask_strides . (i, j, k), its elements lie mask_strides[3] apart
  int64_t mask_middle, mask_inner, mask_strides[4];
  int32_t mask_kind;     // fastlm_mask_kind
} fastlm_softmax;

FASTLM_LAUNCHER fastlm_softmax_fwd(const fastlm_softmax* args, void* stream);
FASTLM_LAUNCHER fastlm_softmax_bwd(const fastlm_softmax* args, void* stream);
