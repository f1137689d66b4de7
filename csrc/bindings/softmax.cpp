#include "softmax.h"

#include "bindings/common.h"

namespace {

using namespace bindings;

// Both directions: `saved` is y in the backward of dy = x.
Tensor softmax_of(const Tensor& x, const Tensor* saved, double scale) {
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
  const Rows x_rows(x), saved_rows(saved ? *saved : x);
  args.x = x_rows.data();
  args.x_rows = x_rows.at;
  args.saved = saved ? saved_rows.data() : nullptr;
  args.saved_rows = saved_rows.at;
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
  STD_TORCH_CHECK(!mask, "softmax: its CUDA kernel takes no mask");
  return softmax_of(x, nullptr, scale);
}

Tensor softmax_bwd(const Tensor& dy, const Tensor& y, double scale) { return softmax_of(dy, &y, scale); }

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
