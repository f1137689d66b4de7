#include "layer_norm.h"

#include "bindings/norm.h"

namespace {

constexpr auto kForward = &bindings::norm_fwd<fastlm_layer_norm_fwd, true>;
constexpr auto kBackward = &bindings::norm_bwd<fastlm_layer_norm_bwd, true>;

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def("layer_norm_fwd" FASTLM_NORM_FORWARD);
  m.def("layer_norm_bwd" FASTLM_NORM_BACKWARD);
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(kForward));
  m.impl("layer_norm_bwd", TORCH_BOX(kBackward));
}
