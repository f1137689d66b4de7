#include "layer_norm.h"

#include "bindings/norm.h"

namespace {

using namespace bindings;

constexpr const char* kOp = "layer_norm";

Four layer_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& seed, double eps, double weight_offset,
                  bool llama, double dropout_p) {
  return norm_fwd<fastlm_layer_norm_fwd, true>(kOp, x, weight, bias, residual, seed, eps, weight_offset, llama, dropout_p);
}

Four layer_norm_bwd(const Tensor& dy, const std::optional<Tensor>& dresidual_out, const Tensor& x, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, const std::optional<Tensor>& mean, const Tensor& rstd,
                  const std::optional<Tensor>& seed, bool has_residual, bool need_dweight, bool need_dbias, double,
                  double weight_offset, double dropout_p) {
  return norm_bwd<fastlm_layer_norm_bwd, true>(kOp, dy, dresidual_out, x, weight, bias, mean, rstd, seed, has_residual, need_dweight,
                                              need_dbias, weight_offset, dropout_p);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def("layer_norm_fwd" FASTLM_NORM_FORWARD);
  m.def("layer_norm_bwd" FASTLM_NORM_BACKWARD);
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}
