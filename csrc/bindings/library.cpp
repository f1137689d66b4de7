// The library's version, which fastlm/ops/_cuda.py asks for.
#include "fastlm.h"

extern "C" __attribute__((visibility("default"))) int fastlm_library_version() { return FASTLM_LIBRARY_VERSION; }
