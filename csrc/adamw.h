#pragma once

#include "multi_tensor.h"

// The columns of the table, in the order of the op's schema.
enum {
  FASTLM_ADAMW_PARAM,
  FASTLM_ADAMW_GRAD,
  FASTLM_ADAMW_EXP_AVG,
  FASTLM_ADAMW_EXP_AVG_SQ,
  FASTLM_ADAMW_MASTER,
  FASTLM_ADAMW_REMAINDER,
  FASTLM_ADAMW_AVERAGE,
  FASTLM_ADAMW_EXP_AVG_SCALE,
  FASTLM_ADAMW_EXP_AVG_SQ_SCALE,
  FASTLM_ADAMW_LISTS
};

// One AdamW step in place (fastlm/ops/adamw.py). Where a number has a pointer it is read there, and the float means nothing.
typedef struct {
  fastlm_tensor_table table;
  int32_t formats[FASTLM_ADAMW_LISTS];
  int32_t random_weights, random_codes;  // whether bf16 weights, and the codes of states, are rounded by random numbers
  const int32_t* streams;                // [tensors]: number of each parameter's random numbers; null where none are drawn
  const int64_t* seed;                   // (seed, offset), likewise
  const float* found_inf;                // nonzero or NaN: nothing is written; or null
  const float *lr_at, *step_at, *grad_scale_at;
  float lr, step, grad_scale;
  float average_rest;             // 1 - decay of the averages
  float log_beta1, log_beta2;     // natural; -1e6 for beta = 0
  float high1, low1, high2, low2;  // of beta, their sum (kernels/moment_bound.py: in_two)
  float rest1, rest2;             // 1 - beta
  float least;                    // r for which sqrt(v) >= r |m| holds for any gradients (kernels/moment_bound.py)
  float eps, weight_decay;
} fastlm_adamw;

FASTLM_LAUNCHER fastlm_adamw_step(const fastlm_adamw* args, void* stream);
