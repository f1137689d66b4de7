#include "attention.h"

#include <algorithm>
#include <cmath>

#include "bindings/common.h"

namespace {

using namespace bindings;

constexpr const char* kOp = "attention";

// A tensor [B, length, heads, width] as a tensor map can describe it: at 16 bytes, with strides that are multiples of 16 bytes;
// copied if it is not, or has strides of 0. Strides of dimensions of one element mean nothing and are replaced.
Tensor mappable(const Tensor& t, int64_t (&strides)[3]) {
  const auto find = [&](const Tensor& x) {
    bool right = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    for (int i = 0; i < 3; ++i) {
      strides[i] = x.size(i) == 1 ? x.size(3) : x.stride(i);
      right = right && strides[i] > 0 && strides[i] % 8 == 0 && strides[i] < int64_t{1} << 39;
    }
    return right;
  };
  if (find(t)) return t;
  Tensor copy = stable::contiguous(t);
  if (!find(copy)) {  // it was contiguous already, but begins elsewhere
    copy = stable::clone(t);
    find(copy);
  }
  return copy;
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, int64_t diagonal, double scale) {
  check_device(kOp, "q", q, q);
  check_device(kOp, "k", k, q);
  check_device(kOp, "v", v, q);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && k.sizes().equals(v.sizes()) && q.size(0) == k.size(0) && q.size(3) == k.size(3),
                  kOp, ": q must be [B, S, H, D], k and v [B, T, H_kv, D]");
  const int64_t B = q.size(0), S = q.size(1), H = q.size(2), D = q.size(3), T = k.size(1), H_kv = k.size(2);
  STD_TORCH_CHECK(H_kv > 0 && H % H_kv == 0, kOp, ": the heads of q must be a multiple of those of k");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && k.scalar_type() == v.scalar_type(), kOp,
                  ": q, k and v must have one dtype");
  STD_TORCH_CHECK(D == 64 || D == 128 || D == 256, kOp, ": its kernels have heads of 64, 128 and 256, got ", D);
  STD_TORCH_CHECK(scale >= 0x1p-126 && scale <= 0x1p127, kOp, ": scale must be from 2^-126 to 2^127, got ", scale);
  const DeviceGuard guard(q.get_device_index());

  Tensor o = stable::new_empty(q, {B, S, H, D});
  Tensor lse = stable::new_empty(q, {B, H, S}, ScalarType::Float);
  if (lse.numel() == 0) return {o, lse};
  if (T == 0) {
    stable::zero_(o);
    stable::fill_(lse, -INFINITY);
    return {o, lse};
  }
  fastlm_attention args{};
  args.dtype = dtype_of(kOp, "q", q);
  const Tensor queries = mappable(q, args.q_strides), keys = mappable(k, args.k_strides), values = mappable(v, args.v_strides);
  args.q = queries.const_data_ptr();
  args.k = keys.const_data_ptr();
  args.v = values.const_data_ptr();
  args.o = o.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.batch = B;
  args.queries = S;
  args.keys = T;
  args.heads = H;
  args.kv_heads = H_kv;
  args.diagonal = diagonal;
  args.width = static_cast<int32_t>(D);
  args.programs = multiprocessors(q);
  args.scale = static_cast<float>(scale);
  check_launch(kOp, fastlm_attention_fwd(&args, current_stream(q)));
  return {o, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, int diagonal, float scale) -> (Tensor o, Tensor lse)");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
}
