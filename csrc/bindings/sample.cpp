#include "sample.h"

#include "bindings/common.h"

namespace {

using namespace bindings;

// A setting of each row: contiguous [rows].
template <class T>
const T* setting(const char* name, const std::optional<Tensor>& t, const Tensor& logits, ScalarType type) {
  if (!t) return nullptr;
  check_device("sample", name, *t, logits);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == logits.size(0) && t->is_contiguous() && t->scalar_type() == type, "sample: ",
                  name, " must be contiguous [", logits.size(0), "], ", type == ScalarType::Long ? "int64" : "float32");
  return static_cast<const T*>(t->const_data_ptr());
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits, const std::optional<Tensor>& temperatures,
                                  const std::optional<Tensor>& top_ks, const std::optional<Tensor>& top_ps,
                                  const std::optional<Tensor>& min_ps, const Tensor& seed, double temperature, int64_t top_k,
                                  double top_p, double min_p, bool with_logprobs) {
  const char* op = "sample";
  check_device(op, "logits", logits, logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, op, ": logits must be [B, V] with V of at least 1");
  check_device(op, "seed", seed, logits);
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 2, op, ": seed must be an int64 tensor [2]");
  const DeviceGuard guard(logits.get_device_index());
  fastlm_sample args{};
  args.dtype = dtype_of(op, "logits", logits);
  args.temperatures = setting<float>("temperatures", temperatures, logits, ScalarType::Float);
  args.top_ks = setting<int64_t>("top_ks", top_ks, logits, ScalarType::Long);
  args.top_ps = setting<float>("top_ps", top_ps, logits, ScalarType::Float);
  args.min_ps = setting<float>("min_ps", min_ps, logits, ScalarType::Float);
  args.temperature = static_cast<float>(temperature);
  args.top_k = top_k;
  args.top_p = static_cast<float>(top_p);
  args.min_p = static_cast<float>(min_p);

  const std::array<int64_t, 1> sizes{logits.size(0)}, none{0};
  Tensor tokens = stable::new_empty(logits, sizes, ScalarType::Long);
  Tensor logprobs = stable::new_empty(logits, with_logprobs ? sizes : none, ScalarType::Float);
  if (logits.size(0) == 0) return {tokens, logprobs};
  const Tensor rows = logits.stride(1) == 1 || logits.size(1) == 1 ? logits : stable::contiguous(logits);
  args.logits = rows.const_data_ptr();
  args.rows = rows.size(0);
  args.columns = rows.size(1);
  args.row_stride = rows.stride(0);
  const Tensor seeds = stable::contiguous(seed);
  args.seed = static_cast<const int64_t*>(seeds.const_data_ptr());
  args.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  args.logprobs = with_logprobs ? static_cast<float*>(logprobs.mutable_data_ptr()) : nullptr;
  check_launch(op, fastlm_sample_draw(&args, current_stream(logits)));
  return {tokens, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def(
      "sample(Tensor logits, Tensor? temperatures, Tensor? top_ks, Tensor? top_ps, Tensor? min_ps, Tensor seed,"
      " float temperature, int top_k, float top_p, float min_p, bool with_logprobs) -> (Tensor tokens, Tensor logprobs)");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("sample", TORCH_BOX(&sample)); }
