#pragma once

#include "norm.h"

// norm.h with a mean.
FASTLM_LAUNCHER fastlm_layer_norm_fwd(const fastlm_norm* args, void* stream);
FASTLM_LAUNCHER fastlm_layer_norm_bwd(const fastlm_norm_bwd* args, void* stream);
