// RMSNorm, forward and backward, with an optional dropout and residual add before it (fastlm/ops/rms_norm.py has the contract).

#include "rms_norm.h"
#include "norm_fwd.h"
#include "norm_bwd.h"

extern "C" int fastlm_rms_norm_fwd(const fastlm_norm* args, void* stream) { return norm_forward<false>(*args, stream); }

extern "C" int fastlm_rms_norm_bwd(const fastlm_norm_bwd* args, void* stream) { return norm_backward<false>(*args, stream); }
