// The Euclidean norm of a list of tensors in one launch (fastlm/ops/global_norm.py has the contract).
//
// The tensors are cut into blocks of kBlock elements, found through a table (kernels/multi_tensor.py builds the same). Every
// thread block adds the squares of its share of them, in an order that the sizes alone decide; the last one to finish adds up
// what the others left, in order: bitwise repeatable whichever it is.
//
// Squares of fp32 and bf16 numbers overflow from 1.8e19 on: a share whose sum is not finite is read again, scaled by 2^-96.

#include "device/device.h"
#include "global_norm.h"

namespace {

using namespace device;

constexpr int kThreads = 256;
constexpr int kBlock = 2048;  // elements of a block of a tensor
constexpr float kTiny = 0x1p-96f, kLarge = 0x1p96f;
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

// This thread's part of the sum of (scale * x)^2 over `count` elements from p on, at most kBlock.
template <class T>
DEVICE float squares(Global<const T> p, int64_t count, bool aligned, float scale) {
  constexpr int VEC = kVector<T>;
  float sum = 0;
  if (aligned && count >= kBlock) {
#pragma unroll
    for (int i = 0; i < kBlock; i += kThreads * VEC) {
      const Vector<T, VEC> v = load_vector<VEC, Cache::streaming>(p + (i + thread_id() * VEC));
#pragma unroll
      for (int j = 0; j < VEC; ++j) {
        const float x = to_float(v[j]) * scale;
        sum += x * x;
      }
    }
    return sum;
  }
  for (int i = thread_id(); i < kBlock; i += kThreads) {
    if (i < count) {
      const float x = to_float(load_vector<1>(p + i)[0]) * scale;
      sum += x * x;
    }
  }
  return sum;
}

// The sum over blocks block_x(), block_x() + grid_x(), ... of all tensors, in every thread.
DEVICE float share(const fastlm_global_norm& a, float scale) {
  const Global<const int64_t> addresses(a.addresses), sizes(a.sizes);
  const Global<const int32_t> dtypes(a.dtypes), owners(a.owners), blocks(a.blocks);
  float sum = 0;
  for (int64_t i = block_x(); i < a.count; i += grid_x()) {
    const int32_t owner = owners[i];
    const int64_t first = static_cast<int64_t>(blocks[i]) * kBlock;
    const int64_t size = sizes[owner], count = size - first;
    const uint64_t address = static_cast<uint64_t>(addresses[owner]);
    const int32_t dtype = dtypes[owner];
    const bool aligned = address % 16 == 0;
    if (dtype == FASTLM_FLOAT32) {
      sum += squares<float>(pointer_at<const float>(address) + first, count, aligned, scale);
    } else if (dtype == FASTLM_BFLOAT16) {
      sum += squares<bf16>(pointer_at<const bf16>(address) + first, count, aligned, scale);
    } else {
      sum += squares<fp16>(pointer_at<const fp16>(address) + first, count, aligned, scale);
    }
  }
  return block_sum(sum);
}

KERNEL(kThreads)
global_norm_kernel(const fastlm_global_norm a) {
  const Global<float> plain(a.partial), scaled = plain + grid_x();
  float sum = share(a, 1.0f), rest = sum * 0.0f;  // NaN if the sum is not finite
  if (!(sum < INFINITY)) {
    rest = share(a, kTiny);
    sum = 0;
  }
  if (thread_id() == 0) {
    plain[block_x()] = sum;
    scaled[block_x()] = rest;
  }
  if (!is_last_block(Global<unsigned>(a.counter), grid_x())) return;
  float total = 0, total_scaled = 0, large = 0;
  for (int i = thread_id(); i < grid_x(); i += kThreads) {
    const float p = plain[i], s = scaled[i];
    total += p;
    total_scaled += s + p * kTiny * kTiny;
    large += s;
  }
  total = block_sum(total);
  total_scaled = block_sum(total_scaled);
  large = block_sum(large);
  if (thread_id() == 0) {  // plain sums may overflow together; `large` is NaN or infinite if a number is
    const bool fits = total < INFINITY && large == 0;
    const Global<float> norm(a.norm);
    norm[0] = fits ? sqrtf(total) : sqrtf(total_scaled) * kLarge;
  }
}

}  // namespace

extern "C" int fastlm_global_norm_fwd(const fastlm_global_norm* args, void* stream) {
  const fastlm_global_norm& a = *args;
  if (a.count <= 0 || a.programs <= 0 || a.programs > a.count) return kInvalidValue;
  const int error = fill_zero(a.counter, sizeof(*a.counter), stream);
  return error ? error : launch(global_norm_kernel, Dim{a.programs}, kThreads, 0, stream, a);
}
