#pragma once

#include "fastlm.h"

// o = softmax(scale * q k^T + mask) v per head and the log-sum-exp of the scores; see fastlm/ops/attention.py. Hopper only.
typedef struct {
  const void *q, *k, *v;   // [batch, queries | keys, heads | kv_heads, width], at 16 bytes and at the strides below
  void* o;                 // [batch, queries, heads, width], contiguous, at 16 bytes
  float* lse;              // [batch, heads, queries]: natural logarithm, -inf where no key is seen (o is 0 there)
  int64_t batch, queries, keys, heads, kv_heads;  // none is 0, the lengths are < 2^29; heads is a multiple of kv_heads
  int64_t q_strides[3], k_strides[3], v_strides[3];  // of batch, position and head: multiples of 8 elements
  int64_t diagonal;        // query i sees keys up to i + diagonal; >= keys for all
  int32_t width, dtype;    // 64, 128 or 256; FASTLM_BFLOAT16 or FASTLM_FLOAT16
  int32_t programs;        // thread blocks, at most: one for each multiprocessor
  float scale;             // from 2^-126 to 2^127: it and scale * log2(e) are normal numbers
} fastlm_attention;

FASTLM_LAUNCHER fastlm_attention_fwd(const fastlm_attention* args, void* stream);
