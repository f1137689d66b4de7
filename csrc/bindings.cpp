// The torch side of libfastlm_cuda.so: checks tensors, allocates results, calls the launchers of fastlm.h.
//
// Only torch's stable ABI is used (torch/csrc/stable, at the level of 2.11), and no Python: one file serves every torch from 2.11
// on and every Python. It is built beside a CPU build of torch too. fastlm/ops/_cuda.py loads it. Mistakes of users are reported
// in Python, before a call comes here; what is checked here keeps a wrong call from touching memory, and raises RuntimeError.
//
// Compiled for the host (FASTLM_HOST, tests only) it is fastlm_host instead of fastlm_cuda: the same functions on CPU tensors.

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

#define FASTLM_EXPORT extern "C" __attribute__((visibility("default")))

FASTLM_EXPORT int fastlm_library_version() { return FASTLM_LIBRARY_VERSION; }

namespace {

namespace stable = torch::stable;
using stable::Tensor;
using torch::headeronly::ScalarType;

#ifdef FASTLM_HOST
#define FASTLM_NAMESPACE fastlm_host
constexpr const char* kWants = "a CPU tensor: this library is the host body of the kernels";
bool is_ours(const Tensor& t) { return t.is_cpu(); }
void* current_stream(const Tensor&) { return nullptr; }
const char* error_text(int) { return "see fastlm_host_report"; }
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#else
#define FASTLM_NAMESPACE fastlm_cuda
constexpr const char* kWants = "a CUDA tensor: libfastlm_cuda.so has kernels for GPUs only";
using stable::accelerator::DeviceGuard;

bool is_ours(const Tensor& t) { return t.is_cuda(); }

// The stream torch works on. libtorch_cuda is looked up at run time: a CPU build of torch has none, and the library loads there.
void* current_stream(const Tensor& t) {
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

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#endif

int32_t dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return FASTLM_FLOAT32;
    case ScalarType::BFloat16: return FASTLM_BFLOAT16;
    case ScalarType::Half: return FASTLM_FLOAT16;
    default: STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
  }
  return -1;
}

void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(is_ours(t), op, ": ", name, " must be ", kWants);
  STD_TORCH_CHECK(t.get_device_index() == like.get_device_index(), op, ": ", name, " must be on device cuda:",
                  like.get_device_index(), ", got cuda:", t.get_device_index());
}

void check_launch(const char* op, int error) {
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
std::optional<Tensor> parameter(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& x,
                                int32_t& dtype) {
  if (!t) return std::nullopt;
  check_device(op, name, *t, x);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(-1), op, ": ", name, " must be [", x.size(-1), "]");
  const int32_t own = dtype_of(op, name, *t);
  STD_TORCH_CHECK(dtype < 0 || dtype == own, op, ": weight and bias must have one dtype");
  dtype = own;
  return stable::contiguous(*t);
}

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four rms_norm_fwd(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& residual, const std::optional<Tensor>& seed, double eps, double weight_offset,
                  bool llama, double dropout_p) {
  const char* op = "rms_norm";
  check_device(op, "x", x, x);
  STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension");
  const DeviceGuard guard(x.get_device_index());
  fastlm_rms_norm args{};
  args.x_dtype = dtype_of(op, "x", x);
  args.parameter_dtype = -1;
  const auto w = parameter(op, "weight", weight, x, args.parameter_dtype);
  const auto b = parameter(op, "bias", bias, x, args.parameter_dtype);
  if (args.parameter_dtype < 0) args.parameter_dtype = args.x_dtype;
  if (residual) {
    check_device(op, "residual", *residual, x);
    STD_TORCH_CHECK(residual->sizes().equals(x.sizes()), op, ": residual must have x's shape");
  }
  if (seed) {
    check_device(op, "seed", *seed, x);
    STD_TORCH_CHECK(seed->scalar_type() == ScalarType::Long && seed->numel() == 2 && seed->is_contiguous(), op,
                    ": seed must be a contiguous int64 tensor [2]");
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p < 1, op, ": dropout_p must lie in [0, 1), got ", dropout_p);
  }
  args.residual_dtype = residual ? dtype_of(op, "residual", *residual) : args.x_dtype;

  const std::array<int64_t, 1> none{0};
  const auto kind = residual ? residual->scalar_type() : x.scalar_type();
  Tensor y = stable::new_empty(x, x.sizes());
  Tensor sum = residual ? stable::new_empty(x, x.sizes(), kind) : stable::new_empty(x, none, kind);
  Tensor mean = stable::new_empty(x, none, ScalarType::Float);
  Tensor rstd = stable::new_empty(x, x.sizes().slice(0, x.dim() - 1), ScalarType::Float);
  if (x.numel() == 0) return {y, sum, mean, rstd};

  const Rows x_rows(x), residual_rows(residual ? *residual : x);
  args.x = x_rows.data();
  args.x_rows = x_rows.at;
  args.weight = w ? w->const_data_ptr() : nullptr;
  args.bias = b ? b->const_data_ptr() : nullptr;
  args.residual = residual ? residual_rows.data() : nullptr;
  args.residual_rows = residual_rows.at;
  args.seed = seed ? static_cast<const int64_t*>(seed->const_data_ptr()) : nullptr;
  args.y = y.mutable_data_ptr();
  args.residual_out = residual ? sum.mutable_data_ptr() : nullptr;
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  args.columns = x.size(-1);
  args.rows = x.numel() / args.columns;
  args.round_first = llama;
  args.eps = static_cast<float>(eps);
  args.weight_offset = static_cast<float>(weight_offset);
  args.threshold = static_cast<uint32_t>(dropout_p * 4294967296.0);
  args.grown = static_cast<float>(1 / (1 - dropout_p));
  check_launch(op, fastlm_rms_norm_fwd(&args, current_stream(x)));
  return {y, sum, mean, rstd};
}

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

STABLE_TORCH_LIBRARY(FASTLM_NAMESPACE, m) {
  m.def(
      "rms_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, float eps, float weight_offset,"
      " bool llama, float dropout_p) -> (Tensor y, Tensor residual_out, Tensor mean, Tensor rstd)");
  m.def("softmax_fwd(Tensor x, Tensor? mask, float scale) -> Tensor");
  m.def("softmax_bwd(Tensor dy, Tensor y, float scale) -> Tensor");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd));
}
