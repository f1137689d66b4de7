#pragma once

#include "fastlm.h"

// One launch over whole lists of tensors. Tensors are cut into blocks, and tables on the device say where each block lies.
// kernels/tensor_table.py builds them, and keeps them while the same tensors come back.
#define FASTLM_TABLE_BLOCK 2048  // elements of a block

typedef struct {
  const int64_t* addresses;  // [tensors, lists]; what is in the column of a list that is absent is not read
  const int64_t* sizes;      // [tensors], elements of each tensor of a row
  const int32_t* owners;     // [count]: the row that a block is of
  const int32_t* blocks;     // [count]: which of the row's blocks it is
  int64_t count;
} fastlm_tensor_table;

// Formats of a list's elements: fastlm_dtype, and these.
enum { FASTLM_ABSENT = -1, FASTLM_INT16 = 3, FASTLM_INT8 = 4, FASTLM_UINT8 = 5 };
