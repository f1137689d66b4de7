#include "global_norm.h"

#include "bindings/tables.h"

namespace {

using namespace bindings;

// workspace: fp32, two sums for each thread block of which there are to be, and a counter.
void global_norm(const Tensor& address, const Tensor& size, const Tensor& owner, const Tensor& block, const Tensor& dtype,
                 const Tensor& workspace, const Tensor& norm) {
  const char* op = "global_norm";
  fastlm_global_norm args{};
  args.table = table(op, address, size, owner, block, 1);
  const DeviceGuard guard(address.get_device_index());
  args.dtypes = data_of<int32_t>(op, "dtype", dtype, address, ScalarType::Int, size.numel());
  const int64_t programs = (workspace.numel() - 1) / 2;
  STD_TORCH_CHECK(programs > 0 && programs <= args.table.count, op, ": workspace must have 2 n + 1 elements, n from 1 to ",
                  args.table.count);
  data_of<float>(op, "workspace", workspace, address, ScalarType::Float, 2 * programs + 1);
  data_of<float>(op, "norm", norm, address, ScalarType::Float, 1);
  args.programs = static_cast<int32_t>(programs);
  args.partial = static_cast<float*>(workspace.mutable_data_ptr());
  args.counter = reinterpret_cast<unsigned*>(args.partial + 2 * programs);
  args.norm = static_cast<float*>(norm.mutable_data_ptr());
  check_launch(op, fastlm_global_norm_fwd(&args, current_stream(address)));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(FASTLM_NAMESPACE, m) {
  m.def(
      "global_norm(Tensor address, Tensor size, Tensor owner, Tensor block, Tensor dtype, Tensor(a!) workspace, Tensor(b!) norm)"
      " -> ()");
}

// Not under CUDA alone: what is checked above then says what is wrong with other tensors.
STABLE_TORCH_LIBRARY_IMPL(FASTLM_NAMESPACE, CompositeExplicitAutograd, m) { m.impl("global_norm", TORCH_BOX(&global_norm)); }
