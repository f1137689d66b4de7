#include "decode_attention.h"

#include <algorithm>
#include <cmath>

#include "bindings/common.h"

namespace {

using namespace bindings;

constexpr const char* kOp = "decode_attention";

// Integers of shape `sizes`, whose last dimension is then contiguous; `wide` says whether they have 64 bits.
Tensor integers(const char* name, const Tensor& t, const Tensor& q, std::initializer_list<int64_t> sizes, int32_t& wide) {
  check_device(kOp, name, t, q);
  wide = t.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || t.scalar_type() == ScalarType::Int, kOp, ": ", name, " must be int32 or int64");
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), t.sizes().begin()), kOp,
                  ": ", name, " has the wrong shape");
  return t.size(-1) <= 1 || t.stride(-1) == 1 ? t : stable::contiguous(t);
}

// [H, ...] in any of the kernels' dtypes, or nothing.
std::optional<Tensor> per_head(const char* name, const std::optional<Tensor>& t, const Tensor& q, int64_t dim, int32_t& dtype) {
  if (!t) return std::nullopt;
  check_device(kOp, name, *t, q);
  STD_TORCH_CHECK(t->dim() == dim && t->size(0) == q.size(2), kOp, ": ", name, " must have one row for each query head");
  dtype = dtype_of(kOp, name, *t);
  return stable::contiguous(*t);
}

const void* data(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Shares for a call that leaves the choice: as many as keep the GPU busy, of so many keys that what a share has found, which is
// written and read, weighs little.
void choose_splits(fastlm_decode_attention& args, int64_t blocks, int64_t slots) {
  constexpr int64_t kLeast = 256, kMost = 256;
  int64_t keys = static_cast<int64_t>(args.page_size) * args.max_pages;
  if (args.left >= 0) keys = std::min<int64_t>(keys, static_cast<int64_t>(args.left) + args.S);
  args.least = kLeast;
  args.splits = fastlm_decode_attention_splits(blocks, std::clamp<int64_t>(keys / kLeast, 1, kMost), slots);
}

using Two = std::tuple<Tensor, Tensor>;

Two decode_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths,
                         const std::optional<Tensor>& page_table, const std::optional<Tensor>& key_starts,
                         const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& distances,
                         const std::optional<Tensor>& sinks, int64_t left, double scale, double softcap, int64_t splits) {
  check_device(kOp, "q", q, q);
  check_device(kOp, "k_cache", k, q);
  check_device(kOp, "v_cache", v, q);
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, kOp, ": q and the caches must have four dimensions");
  const int64_t B = q.size(0), S = q.size(1), H = q.size(2), D = q.size(3), DV = v.size(3), H_kv = k.size(2);
  STD_TORCH_CHECK(k.size(3) == D && k.sizes().slice(0, 3).equals(v.sizes().slice(0, 3)) && H_kv > 0 && H % H_kv == 0, kOp,
                  ": q and the caches do not fit together");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && k.scalar_type() == v.scalar_type(), kOp,
                  ": q and the caches must have one dtype");
  STD_TORCH_CHECK(page_table || k.size(0) == B, kOp, ": k_cache must have q's rows where there is no page_table");
  const DeviceGuard guard(q.get_device_index());

  fastlm_decode_attention args{};
  args.dtype = dtype_of(kOp, "q", q);
  const Tensor n = integers("lengths", lengths, q, {B}, args.wide_lengths);
  std::optional<Tensor> table, starts;
  if (page_table) table = integers("page_table", *page_table, q, {B, page_table->size(-1)}, args.wide_table);
  if (key_starts) starts = integers("key_starts", *key_starts, q, {B}, args.wide_starts);
  int32_t slopes_dtype = FASTLM_FLOAT32;
  const auto slopes = per_head("alibi_slopes", alibi_slopes, q, 1, slopes_dtype);
  STD_TORCH_CHECK(slopes_dtype == FASTLM_FLOAT32, kOp, ": alibi_slopes must be float32");
  const auto by_distance = per_head("distances", distances, q, 2, args.distances_dtype);
  const auto logits = per_head("sinks", sinks, q, 1, args.sinks_dtype);

  Tensor o = stable::new_empty(q, {B, S, H, DV});
  Tensor lse = stable::new_empty(q, {B, H, S}, ScalarType::Float);
  const int64_t max_pages = page_table ? page_table->size(1) : 1, places = k.size(1) * max_pages;
  if (lse.numel() == 0) return {o, lse};
  if (places == 0 || k.size(0) == 0) {  // nothing to see
    stable::zero_(o);
    stable::fill_(lse, -INFINITY);
    return {o, lse};
  }
  STD_TORCH_CHECK(places <= FASTLM_DECODE_ATTENTION_PLACES && D <= 256 && DV <= 256, kOp, ": too wide or long for its kernels");

  const Tensor queries = q.stride(3) == 1 || D == 1 ? q : stable::contiguous(q);
  args.q = queries.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.lengths = n.const_data_ptr();
  args.page_table = data(table);
  args.key_starts = data(starts);
  args.alibi_slopes = static_cast<const float*>(data(slopes));
  args.distances = data(by_distance);
  args.sinks = data(logits);
  args.o = o.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  for (int i = 0; i < 3; ++i) args.q_strides[i] = queries.stride(i);
  for (int i = 0; i < 4; ++i) {  // those of dimensions of one element may be anything
    args.k_strides[i] = k.size(i) > 1 ? k.stride(i) : i == 3;
    args.v_strides[i] = v.size(i) > 1 ? v.stride(i) : i == 3;
  }
  args.table_stride = table ? table->stride(0) : 0;
  args.pages = k.size(0);
  args.B = static_cast<int32_t>(B);
  args.S = static_cast<int32_t>(S);
  args.H = static_cast<int32_t>(H);
  args.H_kv = static_cast<int32_t>(H_kv);
  args.key_width = static_cast<int32_t>(D);
  args.value_width = static_cast<int32_t>(DV);
  args.page_size = static_cast<int32_t>(k.size(1));
  args.max_pages = static_cast<int32_t>(max_pages);
  args.reach = by_distance ? static_cast<int32_t>(by_distance->size(1) / 2) : 0;
  args.left = static_cast<int32_t>(std::clamp<int64_t>(left, -1, places));
  args.scale = static_cast<float>(scale);
  args.softcap = static_cast<float>(softcap);
  args.splits = static_cast<int32_t>(std::max<int64_t>(splits, 1));
  args.least = 1;
  int32_t per_sm = 1;
  const int64_t blocks = fastlm_decode_attention_blocks(&args, &per_sm);
  if (splits == 0) choose_splits(args, blocks, static_cast<int64_t>(per_sm) * multiprocessors(q));

  std::optional<Tensor> partial, stats, counters;
  if (args.splits > 1) {
    partial = stable::new_empty(q, {args.splits, B * S * H, DV}, ScalarType::Float);
    stats = stable::new_empty(q, {args.splits, B * S * H, 2}, ScalarType::Float);
    counters = stable::new_empty(q, {blocks}, ScalarType::Int);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
    args.stats = static_cast<float*>(stats->mutable_data_ptr());
    args.counters = static_cast<unsigned*>(counters->mutable_data_ptr());
  }
  check_launch(kOp, fastlm_decode_attention_fwd(&args, current_stream(q)));
  return {o, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def(
      "decode_attention_fwd(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? page_table, Tensor? key_starts,"
      " Tensor? alibi_slopes, Tensor? distances, Tensor? sinks, int left, float scale, float softcap, int splits)"
      " -> (Tensor o, Tensor lse)");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("decode_attention_fwd", TORCH_BOX(&decode_attention_fwd));
}
