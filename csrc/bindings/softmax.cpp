#include "softmax.h"

#include "bindings/common.h"

namespace {

using namespace bindings;

int32_t mask_kind(const Tensor& mask) {
  switch (mask.scalar_type()) {
    case ScalarType::Bool: return FASTLM_MASK_BOOL;
    case ScalarType::Float: return FASTLM_MASK_FLOAT32;
    case ScalarType::BFloat16: return FASTLM_MASK_BFLOAT16;
    case ScalarType::Half: return FASTLM_MASK_FLOAT16;
    default: STD_TORCH_CHECK(false, "softmax: mask must be bool, float32, bfloat16 or float16");
  }
  return FASTLM_MASK_NONE;
}

// Where the mask's rows lie among x's; false if they take more than three strides.
bool find_mask(const Tensor& mask, const Tensor& x, fastlm_softmax& args) {
  const int64_t missing = x.dim() - mask.dim();
  const auto stride = [&](int64_t d) { return d < missing || mask.size(d - missing) == 1 ? 0 : mask.stride(d - missing); };
  std::array<int64_t, 3> counts{1, 1, 1}, steps{0, 0, 0};
  size_t groups = 0;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    if (x.size(d) == 1) continue;
    if (groups > 0 && steps[groups - 1] == x.size(d) * stride(d)) {
      counts[groups - 1] *= x.size(d);
      steps[groups - 1] = stride(d);
    } else if (groups < 3) {
      counts[groups] = x.size(d);
      steps[groups++] = stride(d);
    } else {
      return false;
    }
  }
  const size_t empty = 3 - groups;  // groups that come before the first
  const auto at = [&](size_t group) { return group < empty ? 0 : steps[group - empty]; };
  args.mask_middle = empty > 1 ? 1 : counts[1 - empty];
  args.mask_inner = empty > 2 ? 1 : counts[2 - empty];
  for (size_t group = 0; group < 3; ++group) args.mask_strides[group] = at(group);
  args.mask_strides[3] = stride(x.dim() - 1);
  return true;
}

// The tensor that is read: the mask, or a copy of x's size where it broadcasts by turns.
Tensor place_mask(const Tensor& mask, const Tensor& x, fastlm_softmax& args) {
  check_device("softmax", "mask", mask, x);
  bool fits = mask.dim() <= x.dim();
  for (int64_t d = 1; fits && d <= mask.dim(); ++d) fits = mask.size(-d) == 1 || mask.size(-d) == x.size(-d);
  STD_TORCH_CHECK(fits, "softmax: mask must broadcast to x");
  args.mask_kind = mask_kind(mask);
  Tensor read = mask;
  if (!find_mask(mask, x, args)) {
    read = stable::new_empty(mask, x.sizes());
    stable::copy_(read, mask);
    find_mask(read, x, args);
  }
  args.mask = read.const_data_ptr();
  return read;
}

// Both directions: `saved` is y in the backward of dy = x.
Tensor softmax_of(const Tensor& x, const Tensor* saved, const std::optional<Tensor>& mask, double scale) {
  const char* op = "softmax";
  check_device(op, "x", x, x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  const DeviceGuard guard(x.get_device_index());
  if (saved) {
    check_device(op, "y", *saved, x);
    STD_TORCH_CHECK(saved->sizes().equals(x.sizes()) && saved->scalar_type() == x.scalar_type(), op,
                    ": dy and y must have one shape and dtype");
  }
  fastlm_softmax args{};
  args.dtype = dtype_of(op, "x", x);
  Tensor y = stable::new_empty(x, x.sizes());
  if (x.numel() == 0) return y;
  const Rows x_rows(x);
  const std::optional<Rows> saved_rows = saved ? std::optional<Rows>(*saved) : std::nullopt;
  std::optional<Tensor> read;
  if (mask) read = place_mask(*mask, x, args);
  args.x = x_rows.data();
  args.x_rows = x_rows.at;
  args.saved = saved ? saved_rows->data() : nullptr;
  args.saved_rows = saved ? saved_rows->at : x_rows.at;
  args.y = y.mutable_data_ptr();
  args.columns = x.size(-1);
  args.rows = x.numel() / args.columns;
  args.y_rows = {1, args.columns, 0};
  args.scale = static_cast<float>(scale);
  void* stream = current_stream(x);
  check_launch(op, saved ? fastlm_softmax_bwd(&args, stream) : fastlm_softmax_fwd(&args, stream));
  return y;
}

Tensor softmax_fwd(const Tensor& x, const std::optional<Tensor>& mask, double scale) {
  return softmax_of(x, nullptr, mask, scale);
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& y, double scale) {
  return softmax_of(dy, &y, std::nullopt, scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def("softmax_fwd(Tensor x, Tensor? mask, float scale) -> Tensor");
  m.def("softmax_bwd(Tensor dy, Tensor y, float scale) -> Tensor");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
}
