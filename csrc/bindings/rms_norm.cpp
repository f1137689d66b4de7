#include "rms_norm.h"

#include "bindings/norm.h"

namespace {

constexpr auto kForward = &bindings::norm_fwd<fastlm_rms_norm_fwd, false>;
constexpr auto kBackward = &bindings::norm_bwd<fastlm_rms_norm_bwd, false>;

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def("rms_norm_fwd" FASTLM_NORM_FORWARD);
  m.def("rms_norm_bwd" FASTLM_NORM_BACKWARD);
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(kForward));
  m.impl("rms_norm_bwd", TORCH_BOX(kBackward));
}
