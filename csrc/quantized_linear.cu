// x W^T + bias for up to eight rows of x and a weight of int8 or int4 codes (fastlm/ops/quantized_linear.py has the contract; the
// kernels: few_rows.h).

#include "few_rows.h"
#include "quantized_linear.h"

namespace {

using namespace few_rows;

template <class X, int BITS>
int start_for(const fastlm_linear& a, void* stream) {
  if (!by_tensor_cores(a)) return start_plain<X, BITS, false>(a, stream);
  if (a.group_size && a.group_size * BITS < 8 * kStepBytes) return start_tiles<X, BITS, Groups::small>(a, stream);
  if (a.group_size) return start_tiles<X, BITS, Groups::wide>(a, stream);
  if constexpr (BITS == 8) return start_tiles<X, BITS, Groups::none>(a, stream);
  return kInvalidValue;
}

template <int BITS>
int start_wide(const fastlm_linear& a, void* stream) {
  return whole_vectors(a) ? start_plain<float, BITS, true>(a, stream) : start_plain<float, BITS, false>(a, stream);
}

}  // namespace

extern "C" int fastlm_quantized_linear_fwd(const fastlm_linear* args, void* stream) {
  const fastlm_linear& a = *args;
  const bool grouped = a.group_size == 32 || a.group_size == 64 || a.group_size == 128, four = a.bits == 4;
  if (!in_range(a) || !a.scale || (!four && a.bits != 8) || !(grouped || (a.group_size == 0 && !four))) return kInvalidValue;
  switch (a.x_dtype) {
    case FASTLM_FLOAT32: return four ? start_wide<4>(a, stream) : start_wide<8>(a, stream);
    case FASTLM_BFLOAT16: return four ? start_for<bf16, 4>(a, stream) : start_for<bf16, 8>(a, stream);
    case FASTLM_FLOAT16: return four ? start_for<fp16, 4>(a, stream) : start_for<fp16, 8>(a, stream);
    default: return kInvalidValue;
  }
}
