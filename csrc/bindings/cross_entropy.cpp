#include "cross_entropy.h"

#include <vector>

#include "bindings/common.h"

namespace {

using namespace bindings;

constexpr const char* kOp = "cross_entropy";

// A tensor of x's shape and dtype whose rows begin as far behind multiples of 8 elements as x's do: as empty_beside of
// kernels/common.py lays it out.
Tensor empty_beside(const Tensor& x) {
  const auto sizes = x.sizes(), steps = x.strides();
  std::vector<int64_t> strides(sizes.size(), 1);
  int64_t width = sizes[sizes.size() - 1];
  for (size_t d = sizes.size() - 1; d-- > 0;) {
    if (sizes[d] != 1) width += ((steps[d] - width) % 8 + 8) % 8;
    strides[d] = width;
    width *= sizes[d];
  }
  const std::optional<ScalarType> dtype;
  const std::optional<torch::headeronly::Layout> layout;
  const std::optional<stable::Device> device;
  const std::optional<bool> pinned;
  std::array<StableIValue, 7> stack{
      stable::detail::from(x), stable::detail::from(sizes),
      stable::detail::from(torch::headeronly::IntHeaderOnlyArrayRef(strides.data(), strides.size())),
      stable::detail::from(dtype), stable::detail::from(layout), stable::detail::from(device), stable::detail::from(pinned)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return stable::detail::to<Tensor>(stack[0]);
}

// What both directions take, and the tensors that must outlive the launch.
struct Call {
  fastlm_cross_entropy args{};
  Rows logits;
  Tensor target;
  std::optional<Tensor> weight, weight_sum;

  Call(const Tensor& input, const Tensor& numbers, const std::optional<Tensor>& class_weight, int64_t ignore_index,
       double smoothing, double z_loss, double scale, std::optional<double> softcap)
      : logits(checked(input)), target(numbers) {
    check_device(kOp, "target", numbers, input);
    STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Long, kOp, ": target must be int64");
    STD_TORCH_CHECK(numbers.dim() + 1 == input.dim() && numbers.numel() * input.size(-1) == input.numel(), kOp,
                    ": input must be [..., V] and target [...] alike");
    target = stable::contiguous(numbers);
    if (class_weight) {
      check_device(kOp, "weight", *class_weight, input);
      STD_TORCH_CHECK(class_weight->dim() == 1 && class_weight->size(0) == input.size(-1), kOp, ": weight must be [",
                      input.size(-1), "]");
      weight = stable::contiguous(stable::to(*class_weight, ScalarType::Float));
      if (smoothing != 0) weight_sum = stable::sum(*weight);
    }
    args.dtype = dtype_of(kOp, "input", input);
    args.logits = logits.data();
    args.logits_rows = logits.at;
    args.target = static_cast<const int64_t*>(target.const_data_ptr());
    args.weight = weight ? static_cast<const float*>(weight->const_data_ptr()) : nullptr;
    args.weight_sum = weight_sum ? static_cast<const float*>(weight_sum->const_data_ptr()) : nullptr;
    args.rows = numbers.numel();
    args.columns = input.size(-1);
    args.ignore_index = ignore_index;
    args.smoothing = static_cast<float>(smoothing);
    args.z_loss = static_cast<float>(z_loss);
    args.scale = static_cast<float>(scale);
    args.softcap = static_cast<float>(softcap.value_or(0.0));
  }

 private:
  static const Tensor& checked(const Tensor& input) {
    check_device(kOp, "input", input, input);
    STD_TORCH_CHECK(input.dim() >= 1 && input.size(-1) > 0, kOp, ": input must be [..., V] with at least one class");
    return input;
  }
};

std::tuple<Tensor, Tensor> cross_entropy_fwd(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                                             int64_t ignore_index, double label_smoothing, double z_loss, double scale,
                                             std::optional<double> softcap) {
  Call call(input, target, weight, ignore_index, label_smoothing, z_loss, scale, softcap);
  const DeviceGuard guard(input.get_device_index());
  const std::array<int64_t, 2> two{2, target.numel()};
  Tensor loss = stable::new_empty(input, target.sizes(), ScalarType::Float);
  Tensor statistics = stable::new_empty(input, two, ScalarType::Float);
  if (target.numel() == 0) return {loss, statistics};
  call.args.loss = static_cast<float*>(loss.mutable_data_ptr());
  call.args.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  check_launch(kOp, fastlm_cross_entropy_fwd(&call.args, current_stream(input)));
  return {loss, statistics};
}

Tensor cross_entropy_bwd(const Tensor& dloss, const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
                         const Tensor& statistics, int64_t ignore_index, double label_smoothing, double z_loss, double scale,
                         std::optional<double> softcap) {
  Call call(input, target, weight, ignore_index, label_smoothing, z_loss, scale, softcap);
  check_device(kOp, "dloss", dloss, input);
  check_device(kOp, "statistics", statistics, input);
  STD_TORCH_CHECK(dloss.numel() == target.numel() && statistics.dim() == 2 && statistics.size(0) == 2 &&
                      statistics.size(1) == target.numel() && statistics.scalar_type() == ScalarType::Float,
                  kOp, ": dloss must be [...] like target and statistics float32 [2, N]");
  const DeviceGuard guard(input.get_device_index());
  const Tensor factors = stable::contiguous(stable::to(dloss, ScalarType::Float)), numbers = stable::contiguous(statistics);
  Tensor dlogits = empty_beside(call.logits.tensor);
  if (target.numel() == 0) return dlogits;
  const Rows rows(dlogits);
  call.args.dloss = static_cast<const float*>(factors.const_data_ptr());
  call.args.statistics = static_cast<float*>(const_cast<void*>(numbers.const_data_ptr()));  // the backward only reads it
  call.args.dlogits = dlogits.mutable_data_ptr();
  call.args.dlogits_rows = rows.at;
  check_launch(kOp, fastlm_cross_entropy_bwd(&call.args, current_stream(input)));
  return dlogits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def(
      "cross_entropy_fwd(Tensor input, Tensor target, Tensor? weight, int ignore_index, float label_smoothing, float z_loss,"
      " float scale, float? softcap) -> (Tensor loss, Tensor statistics)");
  m.def(
      "cross_entropy_bwd(Tensor dloss, Tensor input, Tensor target, Tensor? weight, Tensor statistics, int ignore_index,"
      " float label_smoothing, float z_loss, float scale, float? softcap) -> Tensor");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cross_entropy_fwd", TORCH_BOX(&cross_entropy_fwd));
  m.impl("cross_entropy_bwd", TORCH_BOX(&cross_entropy_bwd));
}
