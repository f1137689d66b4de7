// The Euclidean norm of a list of tensors of any dtypes in one launch (fastlm/ops/global_norm.py has the contract).
//
// Every thread block adds the squares of a run of blocks of the table (multi_tensor.h), of which those of one tensor are one
// piece of memory: it looks into the table once for each tensor, and has four 16-byte accesses per thread under way. The last
// one to finish adds up what the others left, in order. Who adds what depends on the sizes and on where in 16 bytes a tensor
// begins alone: bitwise repeatable.
//
// Squares of fp32 and bf16 numbers overflow from 1.8e19 on: a share whose sum is not finite is read again, scaled by 2^-96.

#include "device/device.h"
#include "global_norm.h"

namespace {

using namespace device;

constexpr int kThreads = 256;
constexpr int kResident = 4;  // thread blocks that a multiprocessor has at once; _PROGRAMS_PER_SM in fastlm/ops/global_norm.py
constexpr int kInFlight = 4;  // vectors of a thread on their way
constexpr float kTiny = 0x1p-96f, kLarge = 0x1p96f;
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

template <class T, int N>
DEVICE float squares_of(const Vector<T, N>& v, float scale) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float x = to_float(v[j]) * scale;
    sum += x * x;
  }
  return sum;
}

// This thread's part of the sum of (scale * x)^2 over the `count` elements from p on, which begin at `address`.
template <class T>
DEVICE float squares(Global<const T> p, uint64_t address, int64_t count, float scale) {
  constexpr int VEC = kVector<T>;
  constexpr int64_t kStep = kThreads * VEC;
  float sum = 0;
  // Elements before the first 16 bytes, and behind the last.
  const int64_t head = minimum<int64_t>(count, (16 - address % 16) % 16 / sizeof(T));
  const int64_t vectors = (count - head) / VEC, tail = head + vectors * VEC;
  if (thread_id() < head) sum += squares_of(load_vector<1, Cache::streaming>(p + thread_id()), scale);
  if (thread_id() < count - tail) sum += squares_of(load_vector<1, Cache::streaming>(p + tail + thread_id()), scale);
  int64_t i = head + thread_id() * VEC;
  for (; i + (kInFlight - 1) * kStep < tail; i += kInFlight * kStep) {
    Vector<T, VEC> v[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) v[k] = load_vector<VEC, Cache::streaming>(p + i + k * kStep);
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) sum += squares_of(v[k], scale);
  }
  for (; i < tail; i += kStep) sum += squares_of(load_vector<VEC, Cache::streaming>(p + i), scale);
  return sum;
}

// The sum over this thread block's share of the blocks of the table, in every thread.
DEVICE float share(const fastlm_global_norm& a, float scale) {
  const Global<const int64_t> addresses(a.table.addresses), sizes(a.table.sizes);
  const Global<const int32_t> dtypes(a.dtypes), owners(a.table.owners), blocks(a.table.blocks);
  const int64_t whole = a.table.count / grid_x(), rest = a.table.count % grid_x();
  int64_t i = block_x() * whole + minimum<int64_t>(block_x(), rest);
  const int64_t end = i + whole + (block_x() < rest);
  float sum = 0;
  while (i < end) {
    const int32_t owner = owners[i];
    const int64_t first = static_cast<int64_t>(blocks[i]) * FASTLM_TABLE_BLOCK;
    const int64_t size = sizes[owner], base = addresses[owner];
    const int32_t dtype = dtypes[owner];
    const int64_t run = minimum(end - i, ceil_div<int64_t>(size - first, FASTLM_TABLE_BLOCK));
    const int64_t count = minimum(size - first, run * FASTLM_TABLE_BLOCK);
    const uint64_t address = static_cast<uint64_t>(base);  // of the tensor: its blocks begin alike
    if (dtype == FASTLM_FLOAT32) {
      sum += squares<float>(pointer_at<const float>(address) + first, address, count, scale);
    } else if (dtype == FASTLM_BFLOAT16) {
      sum += squares<bf16>(pointer_at<const bf16>(address) + first, address, count, scale);
    } else {
      sum += squares<fp16>(pointer_at<const fp16>(address) + first, address, count, scale);
    }
    i += run;
  }
  return block_sum(sum);
}

KERNEL(kThreads, kResident)
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
  if (a.table.count <= 0 || a.programs <= 0 || a.programs > a.table.count) return kInvalidValue;
  const int error = fill_zero(a.counter, sizeof(*a.counter), stream);
  return error ? error : launch(global_norm_kernel, Dim{a.programs}, kThreads, 0, stream, a);
}
