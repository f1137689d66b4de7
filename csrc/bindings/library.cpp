// What fastlm/ops/_cuda.py asks before it calls anything: the library's version, that of the CUDA runtime within it and that of the
// driver it finds, 0 without one (both as 1000 * major + 10 * minor). A runtime needs a driver of its own major version or a newer.
#include "fastlm.h"

#define FASTLM_ANSWER extern "C" __attribute__((visibility("default"))) int

FASTLM_ANSWER fastlm_library_version() { return FASTLM_LIBRARY_VERSION; }

#ifndef FASTLM_HOST
#include <cuda_runtime_api.h>

FASTLM_ANSWER fastlm_runtime_version() { return CUDART_VERSION; }

FASTLM_ANSWER fastlm_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
#endif
