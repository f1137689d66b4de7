#pragma once

#include "fastlm.h"

// Losses of rows of logits against class numbers, and the gradient of the logits. See fastlm/ops/cross_entropy.py.
typedef struct {
  const void* logits;           // [rows, columns] at logits_rows
  const int64_t* target;        // [rows]; a row whose target is ignore_index is not read
  const float* weight;          // [columns], class weights, or null for ones
  const float* weight_sum;      // their sum, one number; read if there are weights and smoothing is not 0
  const float* dloss;           // [rows]; backward
  float* loss;                  // [rows]; forward: written; NaN where the target is no class
  float* statistics;            // [2, rows]: maximum m of x, and log(sum exp(x - m)); forward: written, backward: read
  void* dlogits;                // [rows, columns] at dlogits_rows; backward: written
  int64_t rows, columns;        // below 2^31 both
  int64_t ignore_index;
  fastlm_rows logits_rows, dlogits_rows;
  float smoothing, z_loss;
  float scale, softcap;         // x = scale * logits, then softcap * tanh(x / softcap); softcap 0: none, else normal
  int32_t dtype;                // fastlm_dtype of logits and dlogits
} fastlm_cross_entropy;

FASTLM_LAUNCHER fastlm_cross_entropy_fwd(const fastlm_cross_entropy* args, void* stream);
FASTLM_LAUNCHER fastlm_cross_entropy_bwd(const fastlm_cross_entropy* args, void* stream);
