// What bindings/linear.cpp and quantized_linear.cpp share: the arguments of a product of few rows that both have, and its start.
#pragma once

#include <vector>

#include "bindings/common.h"
#include "linear.h"

namespace bindings __attribute__((visibility("hidden"))) {

// The weight with rows whose elements follow each other; a copy where they do not.
inline Tensor unit_rows(const Tensor& weight) {
  return weight.stride(1) == 1 || weight.size(1) == 1 ? weight : stable::contiguous(weight);
}

// y = x W^T + bias, of x's dtype: `args` holds what is known of W but for its stride. weight: of unit_rows.
inline Tensor few_rows_product(const char* op, fastlm_linear& args, const Tensor& x, const Tensor& weight,
                               const std::optional<Tensor>& bias, int (*launcher)(const fastlm_linear*, void*)) {
  args.x_dtype = dtype_of(op, "x", x);
  args.columns = x.size(-1);
  args.outputs = weight.size(0);
  args.rows = args.columns ? x.numel() / args.columns : 0;
  STD_TORCH_CHECK(args.columns > 0 && args.rows <= FASTLM_LINEAR_ROWS, op, ": its CUDA kernel takes at most ", FASTLM_LINEAR_ROWS,
                  " rows of x, of at least one column");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = args.outputs;
  Tensor y = stable::new_empty(x, shape);
  if (args.rows == 0 || args.outputs == 0) return y;
  std::optional<Tensor> b;
  if (bias) {
    check_device(op, "bias", *bias, x);
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == args.outputs, op, ": bias must be [", args.outputs, "]");
    args.bias_dtype = dtype_of(op, "bias", *bias);
    b = stable::contiguous(*bias);
  }
  const Rows rows(x);
  args.x = rows.data();
  args.x_rows = rows.at;
  args.weight = weight.const_data_ptr();
  args.weight_stride = args.outputs > 1 ? weight.stride(0) * static_cast<int64_t>(weight.element_size()) : 0;
  args.bias = b ? b->const_data_ptr() : nullptr;
  args.y = y.mutable_data_ptr();
  args.splits = fastlm_linear_splits(&args, multiprocessors(x));
  std::optional<Tensor> partial;
  if (args.splits > 1) {
    const std::array<int64_t, 1> sums{args.splits * args.rows * args.outputs};
    partial = stable::new_empty(x, sums, ScalarType::Float);
    args.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  check_launch(op, launcher(&args, current_stream(x)));
  return y;
}

}  // namespace bindings
