// Checks of the tables of csrc/multi_tensor.h, which kernels/tensor_table.py makes.
#pragma once

#include "multi_tensor.h"

#include "bindings/common.h"

namespace bindings __attribute__((visibility("hidden"))) {

// The data of a contiguous tensor of `count` elements of one type, on the device of `like`.
template <class T>
const T* data_of(const char* op, const char* name, const Tensor& t, const Tensor& like, ScalarType type, int64_t count) {
  check_device(op, name, t, like);
  STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == count && t.is_contiguous(), op, ": ", name,
                  " must be a contiguous tensor of ", count, " elements of the type that kernels/tensor_table.py gives it");
  return static_cast<const T*>(t.const_data_ptr());
}

inline fastlm_tensor_table table(const char* op, const Tensor& address, const Tensor& size, const Tensor& owner,
                                 const Tensor& block, int64_t lists) {
  fastlm_tensor_table found{};
  const int64_t rows = size.numel();
  found.count = owner.numel();
  found.addresses = data_of<int64_t>(op, "address", address, address, ScalarType::Long, rows * lists);
  found.sizes = data_of<int64_t>(op, "size", size, address, ScalarType::Long, rows);
  found.owners = data_of<int32_t>(op, "owner", owner, address, ScalarType::Int, found.count);
  found.blocks = data_of<int32_t>(op, "block", block, address, ScalarType::Int, found.count);
  return found;
}

}  // namespace bindings
