#include "rms_norm.h"

#include "bindings/common.h"

namespace {

using namespace bindings;

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four rms_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& seed, double eps, double weight_offset,
                  bool llama, double dropout_p) {
  const char* op = "rms_norm";
  check_device(op, "x", x, x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  const DeviceGuard guard(x.get_device_index());
  fastlm_rms_norm args{};
  args.x_dtype = dtype_of(op, "x", x);
  args.parameter_dtype = -1;
  const auto w = parameter(op, "weight", weight, x, args.parameter_dtype);
  const auto b = parameter(op, "bias", bias, x, args.parameter_dtype);
  if (args.parameter_dtype < 0) args.parameter_dtype = args.x_dtype;
  if (residual) {
    check_device(op, "residual", *residual, x);
    STD_TORCH_CHECK(residual->sizes().equals(x.sizes()), op, ": residual must have x's shape");
  }
  if (seed) {
    check_device(op, "seed", *seed, x);
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 2 && seed->is_contiguous(), op,
                    ": seed must be a contiguous int64 tensor [2]");
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must lie in [0, 1), got ", dropout_p);
  }
  args.residual_dtype = residual ? dtype_of(op, "residual", *residual) : args.x_dtype;

  const std::array<int64_t, 1> none{0};
  const auto kind = residual ? residual->scalar_type() : x.scalar_type();
  Tensor y = stable::new_empty(x, x.sizes());
  Tensor sum = residual ? stable::new_empty(x, x.sizes(), kind) : stable::new_empty(x, none, kind);
  Tensor mean = stable::new_empty(x, none, ScalarType::Float);
  Tensor rstd = stable::new_empty(x, x.sizes().slice(0, x.dim() - 1), ScalarType::Float);
  if (x.numel() == 0) return {y, sum, mean, rstd};

  const Rows x_rows(x), residual_rows(residual ? *residual : x);
  args.x = x_rows.data();
  args.x_rows = x_rows.at;
  args.weight = w ? w->const_data_ptr() : nullptr;
  args.bias = b ? b->const_data_ptr() : nullptr;
  args.residual = residual ? residual_rows.data() : nullptr;
  args.residual_rows = residual_rows.at;
  args.seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
  args.y = y.mutable_data_ptr();
  args.residual_out = residual ? sum.mutable_data_ptr() : nullptr;
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  args.columns = x.size(-1);
  args.rows = x.numel() / args.columns;
  args.round_first = llama;
  args.eps = static_cast<float>(eps);
  args.weight_offset = static_cast<float>(weight_offset);
  args.threshold = static_cast<uint32_t>(dropout_p * 4294967296.0);
  args.grown = static_cast<float>(1 / (1 - dropout_p));
  check_launch(op, fastlm_rms_norm_fwd(&args, current_stream(x)));
  return {y, sum, mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def(
      "rms_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, float eps, float weight_offset,"
      " bool llama, float dropout_p) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
}
