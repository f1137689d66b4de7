// Matrix products by warpgroups, one kind of operands each; for test_wgmma.py and conformance.py.
#include "wgmma_tile.h"

using namespace device;

enum Source { kShared = 0, kSharedMn = 1, kRegisters = 2 };
constexpr int kK = 128;

// d = a b^T (+ d): a [64, kK], b [N, kK], d [64, N] of fp32.
template <class T, int N, int SOURCE, Major B_MAJOR, Swizzle SWIZZLE>
KERNEL(128)
product_kernel(const T* a, const T* b, float* out, int accumulate) {
  const Shared<T> a_tile = dynamic_shared<T>(), b_tile = dynamic_shared<T>(64 * kK * 2);
  constexpr Major A_MAJOR = SOURCE == kSharedMn ? Major::mn : Major::k;
  constexpr bool A_K = A_MAJOR == Major::k, B_K = B_MAJOR == Major::k;
  fill(a_tile, Global<const T>(a), A_K ? 64 : kK, A_K ? kK : 64, A_K ? kK : 1, A_K ? 1 : kK, SWIZZLE);
  fill(b_tile, Global<const T>(b), B_K ? N : kK, B_K ? kK : N, B_K ? kK : 1, B_K ? 1 : kK, SWIZZLE);
  fence_async_shared();
  block_barrier();
  const Matrix<T, A_MAJOR, A_K ? 64 : kK, SWIZZLE> a_matrix(a_tile);
  const Matrix<T, B_MAJOR, B_K ? N : kK, SWIZZLE> b_matrix(b_tile);
  const int t = thread_id();
  float d[N / 2];
  const Global<float> result = out;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const Place place = fragment_place(t, i);
    d[i] = result[place.row * N + place.column];
  }
  uint32_t fragments[kK / 4];
#pragma unroll
  for (int i = 0; i < kK / 4; ++i) {
    const Place place = fragment_place(t, 2 * i);
    const Global<const T> pair = Global<const T>(a) + (place.row * kK + place.column);
    const T low = pair[0], high = pair[1];
    fragments[i] = pack_rounded<T>(to_float(low), to_float(high));
  }
  wgmma_fence(d, fragments);
#pragma unroll
  for (int k = 0; k < kK; k += 16) {
    const auto b_part = B_K ? b_matrix.at(0, k) : b_matrix.at(k, 0);
    if constexpr (SOURCE == kRegisters) {
      wgmma(d, fragments + k / 4, b_part, k > 0 || accumulate);
    } else {
      wgmma(d, A_K ? a_matrix.at(0, k) : a_matrix.at(k, 0), b_part, k > 0 || accumulate);
    }
  }
  wgmma_commit();
  wgmma_wait<0>(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const Place place = fragment_place(t, i);
    result[place.row * N + place.column] = d[i];
  }
}

template <class T, int N, int SOURCE, Major B_MAJOR, Swizzle SWIZZLE = Swizzle::b128>
int product(const void* a, const void* b, float* d, int accumulate, void* stream) {
  return launch(product_kernel<T, N, SOURCE, B_MAJOR, SWIZZLE>, Dim{1}, 128, (64 + (N < 64 ? 64 : N)) * kK * 2, stream,
                static_cast<const T*>(a), static_cast<const T*>(b), d, accumulate);
}

#define CASE(NAME, ...)                                                                                      \
  extern "C" int NAME(const void* a, const void* b, float* d, int64_t accumulate, void* stream) {            \
    return product<__VA_ARGS__>(a, b, d, static_cast<int>(accumulate), stream);                              \
  }
CASE(bf16_64_k_k, bf16, 64, kShared, Major::k)
CASE(bf16_64_k_mn, bf16, 64, kShared, Major::mn)
CASE(bf16_64_mn_k, bf16, 64, kSharedMn, Major::k)
CASE(bf16_64_mn_mn, bf16, 64, kSharedMn, Major::mn)
CASE(bf16_64_r_k, bf16, 64, kRegisters, Major::k)
CASE(fp16_64_r_mn, fp16, 64, kRegisters, Major::mn)
CASE(bf16_8_k_k, bf16, 8, kShared, Major::k)
CASE(fp16_24_mn_mn, fp16, 24, kSharedMn, Major::mn)
CASE(fp16_128_k_mn, fp16, 128, kShared, Major::mn)
CASE(bf16_192_r_mn, bf16, 192, kRegisters, Major::mn)
CASE(fp16_256_k_k, fp16, 256, kShared, Major::k)
CASE(bf16_32_k_k_64_bytes, bf16, 32, kShared, Major::k, Swizzle::b64)
CASE(bf16_96_mn_mn_64_bytes, bf16, 96, kSharedMn, Major::mn, Swizzle::b64)
CASE(fp16_16_k_mn_32_bytes, fp16, 16, kShared, Major::mn, Swizzle::b32)
CASE(bf16_48_mn_k_32_bytes, bf16, 48, kSharedMn, Major::k, Swizzle::b32)
CASE(bf16_40_k_mn_none, bf16, 40, kShared, Major::mn, Swizzle::none)
CASE(bf16_24_mn_k_none, bf16, 24, kSharedMn, Major::k, Swizzle::none)
