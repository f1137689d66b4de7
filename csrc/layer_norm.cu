// LayerNorm, forward and backward, with an optional dropout and residual add before it (fastlm/ops/layer_norm.py has the contract).

#include "layer_norm.h"
#include "norm_fwd.h"
#include "norm_bwd.h"

extern "C" int fastlm_layer_norm_fwd(const fastlm_norm* args, void* stream) { return norm_forward<true>(*args, stream); }

extern "C" int fastlm_layer_norm_bwd(const fastlm_norm_bwd* args, void* stream) { return norm_backward<true>(*args, stream); }
