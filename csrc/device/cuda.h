// The CUDA body of the device layer: one name, one instruction. device.h says what each name means.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

namespace device {

using bf16 = __nv_bfloat16;
using fp16 = __half;
template <class T>
using Global = T*;
template <class T>
using Shared = T*;

struct Where {
  DEVICE static constexpr Where current() { return {}; }
};

DEVICE int thread_id() { return threadIdx.x; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE int lane_id() { return threadIdx.x & 31; }
DEVICE int warp_id() { return threadIdx.x >> 5; }
DEVICE int block_warps() { return blockDim.x >> 5; }
DEVICE int block_x() { return blockIdx.x; }
DEVICE int block_y() { return blockIdx.y; }
DEVICE int block_z() { return blockIdx.z; }
DEVICE int grid_x() { return gridDim.x; }
DEVICE int grid_y() { return gridDim.y; }
DEVICE int grid_z() { return gridDim.z; }

// Shared memory. 1024 bytes: what a tensor copy with the 128-byte swizzle needs.
#define SHARED_ARRAY(T, name, count) __shared__ __align__(16) T name[count]

template <class T>
DEVICE Shared<T> dynamic_shared(int byte_offset = 0) {
  extern __shared__ __align__(1024) unsigned char fastlm_dynamic_shared[];
  return reinterpret_cast<T*>(fastlm_dynamic_shared + byte_offset);
}

template <class U, class T>
DEVICE U* pointer_cast(T* p) {
  return reinterpret_cast<U*>(p);
}
template <class T>
DEVICE Global<T> pointer_at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// Vector accesses.
template <int BYTES>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<1> {
  using type = unsigned char;
};

template <int N, Cache CACHE = Cache::normal, class T>
DEVICE Vector<std::remove_const_t<T>, N> load_vector(T* p, Where = {}) {
  using W = typename Word<sizeof(T) * N>::type;
  const W* from = reinterpret_cast<const W*>(p);
  W word;
  if constexpr (CACHE == Cache::streaming) {
    word = __ldcs(from);
  } else if constexpr (CACHE == Cache::read_only) {
    word = __ldg(from);
  } else {
    word = *from;
  }
  Vector<std::remove_const_t<T>, N> v;
  memcpy(&v, &word, sizeof(word));
  return v;
}

template <Cache CACHE = Cache::normal, class T, int N>
DEVICE void store_vector(T* p, const Vector<T, N>& v, Where = {}) {
  using W = typename Word<sizeof(T) * N>::type;
  W word;
  memcpy(&word, &v, sizeof(word));
  if constexpr (CACHE == Cache::streaming) {
    __stcs(reinterpret_cast<W*>(p), word);
  } else if constexpr (sizeof(W) == 16) {
    // One number, as the compiler takes 16-bit floats, and at times words, apart again and stores 4 bytes at a time; through
    // assembly, as it builds such a number in memory otherwise. The store itself is not assembly: the compiler knows whether it
    // goes to global or to shared memory.
    asm("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
    const uint64_t low = uint64_t{word.y} << 32 | word.x, high = uint64_t{word.w} << 32 | word.z;
    *reinterpret_cast<unsigned __int128*>(p) = static_cast<unsigned __int128>(high) << 64 | low;
  } else {
    *reinterpret_cast<W*>(p) = word;
  }
}

// Barriers.
DEVICE void block_barrier(Where = {}) { __syncthreads(); }
DEVICE void named_barrier(int id, int threads, Where = {}) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_barrier_arrive(int id, int threads, Where = {}) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void warp_barrier(uint32_t mask = kAllLanes, Where = {}) { __syncwarp(mask); }

// Shuffles and votes.
template <class T>
DEVICE T shuffle(T v, int lane, uint32_t mask = kAllLanes, int width = 32, Where = {}) {
  return __shfl_sync(mask, v, lane, width);
}
template <class T>
DEVICE T shuffle_up(T v, int n, uint32_t mask = kAllLanes, int width = 32, Where = {}) {
  return __shfl_up_sync(mask, v, n, width);
}
template <class T>
DEVICE T shuffle_down(T v, int n, uint32_t mask = kAllLanes, int width = 32, Where = {}) {
  return __shfl_down_sync(mask, v, n, width);
}
template <class T>
DEVICE T shuffle_xor(T v, int bits, uint32_t mask = kAllLanes, int width = 32, Where = {}) {
  return __shfl_xor_sync(mask, v, bits, width);
}
DEVICE uint32_t warp_ballot(bool predicate, uint32_t mask = kAllLanes, Where = {}) { return __ballot_sync(mask, predicate); }
DEVICE bool warp_any(bool predicate, uint32_t mask = kAllLanes, Where = {}) { return __any_sync(mask, predicate); }
DEVICE bool warp_all(bool predicate, uint32_t mask = kAllLanes, Where = {}) { return __all_sync(mask, predicate); }

// Atomics: relaxed, device scope.
template <class T>
DEVICE T atomic_add(T* p, std::type_identity_t<T> v, Where = {}) {
  static_assert(std::is_integral_v<T>, "floating-point atomics make results depend on the order of threads");
  return atomicAdd(p, v);
}
template <class T>
DEVICE T atomic_max(T* p, std::type_identity_t<T> v, Where = {}) {
  return atomicMax(p, v);
}
template <class T>
DEVICE T atomic_exchange(T* p, std::type_identity_t<T> v, Where = {}) {
  return atomicExch(p, v);
}
template <class T>
DEVICE T atomic_cas(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v, Where = {}) {
  return atomicCAS(p, expected, v);
}
DEVICE unsigned atomic_wrap(unsigned* p, unsigned last, Where = {}) { return atomicInc(p, last); }

DEVICE void device_fence(Where = {}) { __threadfence(); }
DEVICE unsigned load_acquire(const unsigned* p, Where = {}) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE void store_release(unsigned* p, unsigned v, Where = {}) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
DEVICE void spin_pause(Where = {}) { __nanosleep(32); }

// Conversions.
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
DEVICE float to_float(fp16 x) { return __half2float(x); }

template <class T>
DEVICE T from_float(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, fp16>) {
    return __float2half_rn(x);
  } else {
    static_assert(std::is_same_v<T, float>, "from_float gives float, bf16 or fp16");
    return x;
  }
}

// Approximations, denormals to zero. Largest errors as the PTX ISA states them: ex2, lg2 (relative, absolute in [0.5, 2]) 2^-22;
// rsqrt 2^-22.9; rcp 2^-23; tanh 2^-11. The host body computes the exact function, rounded.
DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fast_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fast_tanh(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Zeros into global memory, in the order of the stream. 0 or an error code.
inline int fill_zero(void* p, size_t bytes, void* stream) {
  return static_cast<int>(cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream)));
}

// Shared memory, static and dynamic, of more than 48 KB must be asked for. What was asked for is one number of a kernel and a
// device, so every launch asks for the same, the most that there is: if each asked for its own size, one of little shared memory
// would, on another thread, take it away from one of much before that has started. 0 or an error code.
inline int allow_shared_memory(const void* kernel) {
  static std::atomic<uint64_t> asked[256];  // kernel and device, each at its place; one that lost its place is asked for again
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return static_cast<int>(error);
  const uint64_t key = device < 255 ? static_cast<uint64_t>(reinterpret_cast<uintptr_t>(kernel)) << 8 | (device + 1) : 0;
  std::atomic<uint64_t>& place = asked[key * 0x9e3779b97f4a7c15u >> 56];
  if (key != 0 && place.load(std::memory_order_acquire) == key) return 0;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - static_cast<int>(attributes.sharedSizeBytes));
  }
  if (error == cudaSuccess && key != 0) place.store(key, std::memory_order_release);
  return static_cast<int>(error);
}

// Launches.
template <class... Parameters, class... Arguments>
int launch_with(cudaLaunchAttribute* attributes, int count, void (*kernel)(Parameters...), Dim grid, int threads,
                int shared_bytes, void* stream, Arguments... arguments) {
  if (shared_bytes > 0) {
    const int error = allow_shared_memory(reinterpret_cast<const void*>(kernel));
    if (error) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid.x, grid.y, grid.z);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return static_cast<int>(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), Dim grid, int threads, int shared_bytes, void* stream, Arguments... arguments) {
  return launch_with(nullptr, 0, kernel, grid, threads, shared_bytes, stream, arguments...);
}

template <class... Parameters, class... Arguments>
int launch_cooperative(void (*kernel)(Parameters...), Dim grid, int threads, int shared_bytes, void* stream,
                       Arguments... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  return launch_with(&attribute, 1, kernel, grid, threads, shared_bytes, stream, arguments...);
}

}  // namespace device
