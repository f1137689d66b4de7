// The torch side of rms_norm and layer_norm, which differ in their launchers and in whether there is a mean.
#pragma once

#include <algorithm>

#include "bindings/common.h"
#include "norm.h"

namespace bindings __attribute__((visibility("hidden"))) {

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

#define FASTLM_NORM_FORWARD                                                                                             \
  "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, float eps, float weight_offset, bool llama," \
  " float dropout_p) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)"
#define FASTLM_NORM_BACKWARD                                                                                              \
  "(Tensor dy, Tensor? dresidual_out, Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor rstd, Tensor? seed,"   \
  " bool has_residual, bool need_dweight, bool need_dbias, float eps, float weight_offset, float dropout_p)"              \
  " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)"

inline const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// Sets seed, threshold and grown of the arguments.
template <class Arguments>
void set_dropout(const char* op, Arguments& args, const std::optional<Tensor>& seed, double p, const Tensor& x) {
  if (!seed) return;
  check_device(op, "seed", *seed, x);
  STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 2 && seed->is_contiguous(), op,
                  ": seed must be a contiguous int64 tensor [2]");
  STD_TORCH_CHECK(p >= 0 && p < 1, op, ": dropout_p must lie in [0, 1), got ", p);
  args.seed = static_cast<const int64_t*>(seed->const_data_ptr());
  args.threshold = static_cast<uint32_t>(p * 4294967296.0);
  args.grown = static_cast<float>(1 / (1 - p));
}

// Weight and bias; both of one dtype, which becomes `dtype`.
struct Parameters {
  std::optional<Tensor> weight, bias;
  Parameters(const char* op, const std::optional<Tensor>& w, const std::optional<Tensor>& b, const Tensor& x, int32_t& dtype) {
    dtype = -1;
    weight = parameter(op, "weight", w, x, dtype);
    bias = parameter(op, "bias", b, x, dtype);
    if (dtype < 0) dtype = dtype_of(op, "x", x);
  }
};

inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_device(op, name, t, x);
  STD_TORCH_CHECK(t.sizes().equals(x.sizes()), op, ": ", name, " must have x's shape");
}

// `statistics`: mean or rstd.
inline Tensor per_row(const char* op, const char* name, const Tensor& statistics, const Tensor& x) {
  check_device(op, name, statistics, x);
  STD_TORCH_CHECK(statistics.scalar_type() == ScalarType::Float && statistics.sizes().equals(x.sizes().slice(0, x.dim() - 1)), op,
                  ": ", name, " must be float32, of x's shape without its last dimension");
  return stable::contiguous(statistics);
}

template <bool centred>
constexpr const char* kNormName = centred ? "layer_norm" : "rms_norm";

template <auto launcher, bool centred>
Four norm_fwd(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual, const std::optional<Tensor>& seed, double eps, double weight_offset, bool llama,
              double dropout_p) {
  constexpr const char* op = kNormName<centred>;
  check_device(op, "x", x, x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  const DeviceGuard guard(x.get_device_index());
  fastlm_norm args{};
  args.x_dtype = dtype_of(op, "x", x);
  const Parameters parameters(op, weight, bias, x, args.parameter_dtype);
  if (residual) check_like(op, "residual", *residual, x);
  args.residual_dtype = residual ? dtype_of(op, "residual", *residual) : args.x_dtype;
  set_dropout(op, args, seed, dropout_p, x);

  const std::array<int64_t, 1> none{0};
  const auto rows = x.sizes().slice(0, x.dim() - 1);
  const auto kind = residual ? residual->scalar_type() : x.scalar_type();
  Tensor y = stable::new_empty(x, x.sizes());
  Tensor sum = residual ? stable::new_empty(x, x.sizes(), kind) : stable::new_empty(x, none, kind);
  Tensor mean = centred ? stable::new_empty(x, rows, ScalarType::Float) : stable::new_empty(x, none, ScalarType::Float);
  Tensor rstd = stable::new_empty(x, rows, ScalarType::Float);
  if (x.numel() == 0) return {y, sum, mean, rstd};

  const Rows x_rows(x), residual_rows(residual ? *residual : x);
  args.x = x_rows.data();
  args.x_rows = x_rows.at;
  args.weight = data_of(parameters.weight);
  args.bias = data_of(parameters.bias);
  args.residual = residual ? residual_rows.data() : nullptr;
  args.residual_rows = residual_rows.at;
  args.y = y.mutable_data_ptr();
  args.residual_out = residual ? sum.mutable_data_ptr() : nullptr;
  args.mean = centred ? static_cast<float*>(mean.mutable_data_ptr()) : nullptr;
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  args.columns = x.size(-1);
  args.rows = x.numel() / args.columns;
  args.round_first = llama;
  args.eps = static_cast<float>(eps);
  args.weight_offset = static_cast<float>(weight_offset);
  check_launch(op, launcher(&args, current_stream(x)));
  return {y, sum, mean, rstd};
}

// x: what was normalised, or with dropout and without a residual what it was dropped from. eps is in rstd.
template <auto launcher, bool centred>
Four norm_bwd(const Tensor& dy, const std::optional<Tensor>& dresidual_out, const Tensor& x,
              const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& mean,
              const Tensor& rstd, const std::optional<Tensor>& seed, bool has_residual, bool need_dweight, bool need_dbias, double,
              double weight_offset, double dropout_p) {
  constexpr const char* op = kNormName<centred>;
  check_device(op, "x", x, x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  const DeviceGuard guard(x.get_device_index());
  check_like(op, "dy", dy, x);
  if (dresidual_out) check_like(op, "dresidual_out", *dresidual_out, x);
  fastlm_norm_bwd args{};
  args.dtype = dtype_of(op, "dy", dy);
  args.x_dtype = dtype_of(op, "x", x);
  STD_TORCH_CHECK(!dresidual_out || dresidual_out->scalar_type() == x.scalar_type(), op, ": dresidual_out must have x's dtype");
  STD_TORCH_CHECK((weight || !need_dweight) && (bias || !need_dbias), op, ": a gradient of no parameter is asked for");
  const Parameters parameters(op, weight, bias, dy, args.parameter_dtype);
  set_dropout(op, args, seed, dropout_p, x);
  STD_TORCH_CHECK(mean.has_value() == centred, op, centred ? ": mean is missing" : ": there is no mean");
  const std::optional<Tensor> means = centred ? std::optional<Tensor>(per_row(op, "mean", *mean, x)) : std::nullopt;
  const Tensor rstds = per_row(op, "rstd", rstd, x);

  const std::array<int64_t, 1> none{0}, row{x.size(-1)};
  const bool two = has_residual && (seed || args.x_dtype != args.dtype);
  const auto kind_of = [&](const std::optional<Tensor>& t) { return t ? t->scalar_type() : x.scalar_type(); };
  const auto gradient = [&](bool needed, const std::optional<Tensor>& t) {
    if (!needed) return stable::new_empty(x, none, kind_of(t));
    return x.numel() ? stable::new_empty(x, row, kind_of(t)) : stable::new_zeros(x, row, kind_of(t));
  };
  Tensor dx = stable::new_empty(dy, x.sizes());
  Tensor dresidual = two ? stable::new_empty(x, x.sizes()) : stable::new_empty(x, none);
  Tensor dweight = gradient(need_dweight, weight), dbias = gradient(need_dbias, bias);
  if (x.numel() == 0) return {dx, dresidual, dweight, dbias};

  args.columns = x.size(-1);
  args.rows = x.numel() / args.columns;
  args.parts = static_cast<int32_t>(std::min<int64_t>(2 * multiprocessors(x), args.rows));
  const std::array<int64_t, 1> partials{need_dweight || need_dbias ? 2 * args.parts * args.columns : 0}, per_rows{2 * args.rows};
  Tensor partial = stable::new_empty(x, partials, ScalarType::Float);
  Tensor row_sums = stable::new_empty(x, per_rows, ScalarType::Float);
  const Rows dy_rows(dy), dsum_rows(dresidual_out ? *dresidual_out : x), x_rows(x);
  args.dy = dy_rows.data();
  args.dy_rows = dy_rows.at;
  args.dsum = dresidual_out ? dsum_rows.data() : nullptr;
  args.dsum_rows = dsum_rows.at;
  args.x = x_rows.data();
  args.x_rows = x_rows.at;
  args.weight = data_of(parameters.weight);
  args.mean = static_cast<const float*>(data_of(means));
  args.rstd = static_cast<const float*>(rstds.const_data_ptr());
  args.dx = dx.mutable_data_ptr();
  args.dresidual = two ? dresidual.mutable_data_ptr() : nullptr;
  args.dweight = need_dweight ? dweight.mutable_data_ptr() : nullptr;
  args.dbias = need_dbias ? dbias.mutable_data_ptr() : nullptr;
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  args.row_sums = static_cast<float*>(row_sums.mutable_data_ptr());
  args.has_residual = has_residual;
  args.weight_offset = static_cast<float>(weight_offset);
  check_launch(op, launcher(&args, current_stream(x)));
  return {dx, dresidual, dweight, dbias};
}

}  // namespace bindings
