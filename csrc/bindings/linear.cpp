#include "linear.h"

#include "bindings/few_rows.h"

namespace {

using namespace bindings;

Tensor linear_fwd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "linear";
  check_device(op, "x", x, x);
  check_device(op, "weight", weight, x);
  STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 2 && weight.size(1) == x.size(-1), op,
                  ": x must be [..., K] and weight [N, K]");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type(), op, ": weight must have x's dtype");
  const DeviceGuard guard(x.get_device_index());
  fastlm_linear args{};
  args.bits = static_cast<int32_t>(8 * x.element_size());
  return few_rows_product(op, args, x, unit_rows(weight), bias, fastlm_linear_fwd);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) { m.def("linear_fwd(Tensor x, Tensor weight, Tensor? bias) -> Tensor"); }

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("linear_fwd", TORCH_BOX(&linear_fwd)); }
