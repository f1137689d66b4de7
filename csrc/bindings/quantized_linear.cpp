#include "quantized_linear.h"

#include "bindings/few_rows.h"

namespace {

using namespace bindings;

Tensor quantized_linear_fwd(const Tensor& x, const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero,
                            const std::optional<Tensor>& bias, int64_t bits, int64_t group_size) {
  const char* op = "quantized_linear";
  check_device(op, "x", x, x);
  check_device(op, "codes", codes, x);
  check_device(op, "scale", scale, x);
  STD_TORCH_CHECK(x.dim() >= 1 && codes.dim() == 2, op, ": x must be [..., K] and codes [N, .]");
  STD_TORCH_CHECK(bits == 8 ? group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128
                            : bits == 4 && (group_size == 32 || group_size == 64 || group_size == 128),
                  op, ": bits must be 8 or 4 and group_size 32, 64 or 128 (or 0 with 8 bits)");
  const ScalarType kind = bits == 8 ? ScalarType::Char : ScalarType::Byte;
  STD_TORCH_CHECK(codes.scalar_type() == kind, op, ": codes must be int8 for 8 bits, uint8 for 4");
  const int64_t groups = group_size ? (x.size(-1) + group_size - 1) / group_size : 1;
  STD_TORCH_CHECK(codes.size(1) == (bits == 8 ? x.size(-1) : groups * group_size / 2), op,
                  ": codes do not fit x's last dimension");
  STD_TORCH_CHECK(scale.numel() == codes.size(0) * groups, op, ": scale must have one number for each row and group of codes");
  const DeviceGuard guard(x.get_device_index());
  fastlm_linear args{};
  args.bits = static_cast<int32_t>(bits);
  args.group_size = static_cast<int32_t>(group_size);
  args.scale_dtype = dtype_of(op, "scale", scale);
  const Tensor scales = stable::contiguous(scale);
  args.scale = scales.const_data_ptr();
  std::optional<Tensor> zeros;
  if (zero) {
    check_device(op, "zero", *zero, x);
    STD_TORCH_CHECK(zero->scalar_type() == kind && zero->numel() == scale.numel(), op,
                    ": zero must be like scale, of codes' dtype");
    zeros = stable::contiguous(*zero);
    args.zero = zeros->const_data_ptr();
  }
  return few_rows_product(op, args, x, unit_rows(codes), bias, fastlm_quantized_linear_fwd);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def(
      "quantized_linear_fwd(Tensor x, Tensor codes, Tensor scale, Tensor? zero, Tensor? bias, int bits, int group_size)"
      " -> Tensor");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("quantized_linear_fwd", TORCH_BOX(&quantized_linear_fwd));
}
