// x W^T + bias for up to eight rows of x and a weight of x's dtype (fastlm/ops/linear.py has the contract; kernels: few_rows.h).

#include "few_rows.h"
#include "linear.h"

namespace {

using namespace few_rows;

template <class X>
int start_for(const fastlm_linear& a, void* stream) {
  if (by_tensor_cores(a)) return start_tiles<X, 16, Groups::none>(a, stream);
  return start_plain<X, 16, false>(a, stream);
}

}  // namespace

extern "C" int fastlm_linear_splits(const fastlm_linear* args, int multiprocessors) {
  return few_rows::splits_for(*args, multiprocessors);
}

extern "C" int fastlm_linear_fwd(const fastlm_linear* args, void* stream) {
  const fastlm_linear& a = *args;
  if (!in_range(a) || a.scale || a.zero || a.bits != (a.x_dtype == FASTLM_FLOAT32 ? 32 : 16)) return kInvalidValue;
  switch (a.x_dtype) {
    case FASTLM_FLOAT32:
      return whole_vectors(a) ? start_plain<float, 32, true>(a, stream) : start_plain<float, 32, false>(a, stream);
    case FASTLM_BFLOAT16: return start_for<bf16>(a, stream);
    case FASTLM_FLOAT16: return start_for<fp16>(a, stream);
    default: return kInvalidValue;
  }
}
