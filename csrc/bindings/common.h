// What the torch side of libfastlm_cuda.so shares: checks of tensors, the stream, where rows lie.
//
// Only torch's stable ABI is used (torch/csrc/stable, at the level of 2.11), and no Python: one file serves every torch from 2.11
// on and every Python. It is built beside a CPU build of torch too. fastlm/ops/_cuda.py loads it. bindings/<op>.cpp checks an op's
// tensors, allocates its results and calls its launcher. Mistakes of users are reported in Python, before a call comes here;
// what is checked here keeps a wrong call from touching memory, and raises RuntimeError.
//
// Compiled for the host (FASTLM_HOST, tests only) it is fastlm_host instead of fastlm_cuda: the same functions on CPU tensors.
#pragma once

#ifndef FASTLM_HOST
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#endif
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

#include "fastlm.h"

namespace bindings __attribute__((visibility("hidden"))) {  // as torch's own types are

namespace stable = torch::stable;
using stable::Tensor;
using torch::headeronly::ScalarType;

#ifdef FASTLM_HOST
#define FASTLM_NAMESPACE fastlm_host
inline constexpr const char* kWants = "a CPU tensor: this library is the host body of the kernels";
inline bool is_ours(const Tensor& t) { return t.is_cpu(); }
inline void* current_stream(const Tensor&) { return nullptr; }
inline const char* error_text(int) { return "see fastlm_host_report"; }
inline int multiprocessors(const Tensor&) { return 2; }
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
#define FASTLM_NAMESPACE fastlm_cuda
inline constexpr const char* kWants = "a CUDA tensor: libfastlm_cuda.so has kernels for GPUs only";
using stable::accelerator::DeviceGuard;

inline bool is_ours(const Tensor& t) { return t.is_cuda(); }

// The stream torch works on. libtorch_cuda is looked up at run time: a CPU build of torch has none, and the library loads there.
inline void* current_stream(const Tensor& t) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return torch_cuda ? reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(getter != nullptr, "fastlm: this torch was built without CUDA");
  void* stream = nullptr;
  STD_TORCH_CHECK(getter(t.get_device_index(), &stream) == AOTI_TORCH_SUCCESS, "fastlm: torch gave no CUDA stream");
  return stream;
}

inline const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

// Of the tensor's GPU.
inline int multiprocessors(const Tensor& t) {
  int count = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index());
  STD_TORCH_CHECK(error == cudaSuccess, "fastlm: the GPU does not say how many multiprocessors it has: ", cudaGetErrorString(error));
  return count;
}
#endif

inline int32_t dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return FASTLM_FLOAT32;
    case ScalarType::BFloat16: return FASTLM_BFLOAT16;
    case ScalarType::Half: return FASTLM_FLOAT16;
    default: STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
  }
  return -1;
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(is_ours(t), op, ": ", name, " must be ", kWants);
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), op, ": ", name, " must be on device cuda:",
                  like.get_device_index(), ", got cuda:", t.get_device_index());
}

inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": the kernel was not started: ", error_text(error));
}

// A tensor [..., N] and where its rows lie; copied where they lie at more than two strides, or not along N.
struct Rows {
  Tensor tensor;
  fastlm_rows at;

  explicit Rows(const Tensor& t) : tensor(t) {
    if (!find()) {
      tensor = stable::contiguous(t);
      find();
    }
  }

  const void* data() const { return tensor.const_data_ptr(); }

 private:
  // Takes together the leading dimensions that lie in one run; whether at most two runs with unit stride along N are left.
  bool find() {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const size_t last = sizes.size() - 1;
    std::array<int64_t, 2> counts{1, 1}, steps{0, 0};
    size_t groups = 0;
    for (size_t d = 0; d < last; ++d) {
      if (sizes[d] == 1) continue;
      if (groups > 0 && steps[groups - 1] == sizes[d] * strides[d]) {
        counts[groups - 1] *= sizes[d];
        steps[groups - 1] = strides[d];
      } else if (groups < 2) {
        counts[groups] = sizes[d];
        steps[groups++] = strides[d];
      } else {
        return false;
      }
    }
    at = groups == 2 ? fastlm_rows{counts[1], steps[0], steps[1]} : fastlm_rows{1, steps[0], 0};
    return strides[last] == 1 || sizes[last] == 1;
  }
};

// Optional parameters [N] of one dtype: x's or fp32.
inline std::optional<Tensor> parameter(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x,
                                int32_t& dtype) {
  if (!t) return std::nullopt;
  check_device(op, name, *t, x);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(-1), op, ": ", name, " must be [", x.size(-1), "]");
  const int32_t own = dtype_of(op, name, *t);
  STD_TORCH_CHECK(dtype < 0 || dtype == own, op, ": weight and bias must have one dtype");
  dtype = own;
  return stable::contiguous(*t);
}

}  // namespace bindings
