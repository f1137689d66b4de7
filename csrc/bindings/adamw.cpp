#include "adamw.h"

#include <vector>

#include "bindings/tables.h"

namespace {

using namespace bindings;

// What it writes lies behind the addresses of the table: the op that calls it (fastlm::adamw_) declares those lists.
void adamw_step(const Tensor& address, const Tensor& size, const std::optional<Tensor>& stream, const Tensor& owner,
                const Tensor& block, std::vector<int64_t> formats, bool random_weights, bool random_codes,
                const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& step_tensor,
                const std::optional<Tensor>& grad_scale_tensor, const std::optional<Tensor>& found_inf,
                const std::optional<Tensor>& seed, double lr, double step, double grad_scale, double average_rest,
                double log_beta1, double log_beta2, double high1, double low1, double high2, double low2, double rest1,
                double rest2, double least, double eps, double weight_decay) {
  const char* op = "adamw_";
  fastlm_adamw args{};
  args.table = table(op, address, size, owner, block, FASTLM_ADAMW_LISTS);
  const DeviceGuard guard(address.get_device_index());
  STD_TORCH_CHECK(formats.size() == FASTLM_ADAMW_LISTS, op, ": formats must have ", +FASTLM_ADAMW_LISTS, " entries");
  for (size_t i = 0; i < formats.size(); ++i) args.formats[i] = static_cast<int32_t>(formats[i]);
  const bool random = random_weights || random_codes;
  STD_TORCH_CHECK(!random || (seed && stream), op, ": random numbers need seed and stream");
  args.random_weights = random_weights;
  args.random_codes = random_codes;
  if (random) {
    args.streams = data_of<int32_t>(op, "stream", *stream, address, ScalarType::Int, size.numel());
    args.seed = data_of<int64_t>(op, "seed", *seed, address, ScalarType::Long, 2);
  }
  const auto number = [&](const char* name, const std::optional<Tensor>& t) -> const float* {
    return t ? data_of<float>(op, name, *t, address, ScalarType::Float, 1) : nullptr;
  };
  args.lr_at = number("lr", lr_tensor);
  args.step_at = number("step", step_tensor);
  args.grad_scale_at = number("grad_scale", grad_scale_tensor);
  args.found_inf = number("found_inf", found_inf);
  args.lr = static_cast<float>(lr);
  args.step = static_cast<float>(step);
  args.grad_scale = static_cast<float>(grad_scale);
  args.average_rest = static_cast<float>(average_rest);
  args.log_beta1 = static_cast<float>(log_beta1);
  args.log_beta2 = static_cast<float>(log_beta2);
  args.high1 = static_cast<float>(high1);
  args.low1 = static_cast<float>(low1);
  args.high2 = static_cast<float>(high2);
  args.low2 = static_cast<float>(low2);
  args.rest1 = static_cast<float>(rest1);
  args.rest2 = static_cast<float>(rest2);
  args.least = static_cast<float>(least);
  args.eps = static_cast<float>(eps);
  args.weight_decay = static_cast<float>(weight_decay);
  if (args.table.count > 0) check_launch(op, fastlm_adamw_step(&args, current_stream(address)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def(
      "adamw_step(Tensor address, Tensor size, Tensor? stream, Tensor owner, Tensor block, int[] formats, bool random_weights,"
      " bool random_codes, Tensor? lr_tensor, Tensor? step_tensor, Tensor? grad_scale_tensor, Tensor? found_inf, Tensor? seed,"
      " float lr, float step, float grad_scale, float average_rest, float log_beta1, float log_beta2, float high1, float low1,"
      " float high2, float low2, float rest1, float rest2, float least, float eps, float weight_decay) -> ()");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("adamw_step", TORCH_BOX(&adamw_step)); }
