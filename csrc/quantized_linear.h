#pragma once

#include "linear.h"

FASTLM_LAUNCHER fastlm_quantized_linear_fwd(const fastlm_linear* args, void* stream);  // bits 8 and 4
