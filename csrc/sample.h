#pragma once

#include "fastlm.h"

// One token a row, drawn from softmax(logits / temperature) after top-k, top-p and min-p. See fastlm/ops/sample.py.
typedef struct {
  const void* logits;             // [rows, columns], rows at row_stride
  int64_t rows, columns;          // rows < 2^28, columns in 1 to 2^24 - 1
  int64_t row_stride;
  const float* temperatures;      // of each row [rows]; null: `temperature` for all. Likewise the next three
  const int64_t* top_ks;
  const float* top_ps;
  const float* min_ps;
  int64_t top_k;                  // below 1: all
  float temperature;              // 0 and below: the largest logit
  float top_p, min_p;             // 1 and 0: all
  const int64_t* seed;            // seed, offset
  int64_t* tokens;                // [rows]; -1 where a row holds NaN or nothing above -inf
  float* logprobs;                // [rows], log softmax(logits) of the tokens; or null
  int32_t dtype;                  // fastlm_dtype of the logits
} fastlm_sample;

FASTLM_LAUNCHER fastlm_sample_draw(const fastlm_sample* args, void* stream);
