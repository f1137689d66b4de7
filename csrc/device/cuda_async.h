// The CUDA body of the asynchronous part: one name, one instruction. async.h says what each name means. A file of kernels is
// compiled for every architecture of the library: where an instruction is unknown, its function stops the kernel.
#pragma once

#include <cuda.h>
#include <initializer_list>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTLM_SM90(...) __trap()
#else
#define FASTLM_SM90(...) __VA_ARGS__
#endif
#define GRID_CONSTANT(...) const __grid_constant__ __VA_ARGS__

namespace device {

struct Mbarrier {
  uint64_t state;
};
using TensorMap = CUtensorMap;

// The 32-bit address that instructions on shared memory take.
template <class T>
DEVICE uint32_t shared_address(const T* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Barriers in shared memory.
DEVICE void mbarrier_init(Mbarrier* b, int arrivals, Where = {}) {
  FASTLM_SM90(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory"));
}
DEVICE void mbarrier_invalidate(Mbarrier* b, Where = {}) {
  FASTLM_SM90(asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(b)) : "memory"));
}
DEVICE void mbarrier_arrive(Mbarrier* b, Where = {}) {
  FASTLM_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory"));
}
DEVICE void mbarrier_arrive_expect(Mbarrier* b, int bytes, Where = {}) {
  FASTLM_SM90(
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory"));
}
DEVICE void mbarrier_expect(Mbarrier* b, int bytes, Where = {}) {
  FASTLM_SM90(
      asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory"));
}
DEVICE bool mbarrier_try_wait(Mbarrier* b, int parity, Where = {}) {
  uint32_t complete = 0;
  FASTLM_SM90(
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                   : "=r"(complete)
                   : "r"(shared_address(b)), "r"(parity)
                   : "memory"));
  return complete != 0;
}
DEVICE void mbarrier_wait(Mbarrier* b, int parity, Where = {}) {
  FASTLM_SM90(asm volatile(
      "{\n.reg .pred p;\nwaiting:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra complete;\nbra waiting;\n"
      "complete:\n}" ::"r"(shared_address(b)),
      "r"(parity) : "memory"));
}

// Fences.
DEVICE void fence_async_shared(Where = {}) { FASTLM_SM90(asm volatile("fence.proxy.async.shared::cta;" ::: "memory")); }
DEVICE void fence_async_global(Where = {}) { FASTLM_SM90(asm volatile("fence.proxy.async.global;" ::: "memory")); }
DEVICE void fence_mbarrier_init(Where = {}) { FASTLM_SM90(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory")); }

// Tensor maps. The driver encodes them; it is looked up at run time, since a library linked to it would not load without a GPU.
template <class T>
constexpr CUtensorMapDataType kTensorMapType = [] {
  using V = std::remove_const_t<T>;
  static_assert(std::is_same_v<V, float> || std::is_same_v<V, bf16> || std::is_same_v<V, fp16> ||
                    (std::is_integral_v<V> && (sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 1)),
                "no tensor map has elements of this type");
  if (std::is_same_v<V, float>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  if (std::is_same_v<V, bf16>) return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (std::is_same_v<V, fp16>) return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (sizeof(V) == 1) return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  if (sizeof(V) == 4) return std::is_signed_v<V> ? CU_TENSOR_MAP_DATA_TYPE_INT32 : CU_TENSOR_MAP_DATA_TYPE_UINT32;
  return std::is_signed_v<V> ? CU_TENSOR_MAP_DATA_TYPE_INT64 : CU_TENSOR_MAP_DATA_TYPE_UINT64;
}();

template <class T>
int make_tensor_map(TensorMap& map, const T* base, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides,
                    std::initializer_list<int> box, Swizzle swizzle = Swizzle::none, Where = {}) {
  const size_t rank = sizes.size();
  if (rank < 1 || rank > 5 || strides.size() != rank - 1 || box.size() != rank) return static_cast<int>(cudaErrorInvalidValue);
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)
               : nullptr;
  }();
  if (encode == nullptr) return static_cast<int>(cudaErrorNotSupported);
  cuuint64_t size[5], stride[5];
  cuuint32_t boxes[5], ones[5] = {1, 1, 1, 1, 1};
  for (size_t i = 0; i < rank; ++i) {
    size[i] = static_cast<cuuint64_t>(sizes.begin()[i]);
    boxes[i] = static_cast<cuuint32_t>(box.begin()[i]);
    if (i > 0) stride[i - 1] = static_cast<cuuint64_t>(strides.begin()[i - 1]) * sizeof(T);
  }
  const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B, CU_TENSOR_MAP_SWIZZLE_64B,
                                         CU_TENSOR_MAP_SWIZZLE_128B};
  const auto make = [&] {
    return encode(&map, kTensorMapType<T>, static_cast<cuuint32_t>(rank), const_cast<std::remove_const_t<T>*>(base), size, stride,
                  boxes, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(swizzle)],
                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult made = make();
  if (made == CUDA_ERROR_INVALID_CONTEXT) {  // a thread that has called nothing of the runtime yet, such as one of autograd's
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaSetDevice(device);  // binds the device's context, also while a graph is captured
    if (error != cudaSuccess) return static_cast<int>(error);
    made = make();
  }
  return static_cast<int>(made);
}

DEVICE void prefetch_tensor_map(const TensorMap& map, Where = {}) {
  FASTLM_SM90(asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"));
}

// Policies as createpolicy.fractional gives them for all of the data; the constants that CUTLASS uses.
DEVICE constexpr uint64_t cache_policy(L2 l2) {
  return l2 == L2::evict_first ? 0x12f0000000000000ull : l2 == L2::evict_last ? 0x14f0000000000000ull : 0x1000000000000000ull;
}

// Copies.
template <L2 CACHE = L2::normal, class T, int N>
DEVICE void tensor_load(T* to, const TensorMap& map, Mbarrier* b, const int (&c)[N], Where = {}) {
  static_assert(N >= 1 && N <= 5, "a tensor map has 1 to 5 dimensions");
  const uint32_t tile = shared_address(to), barrier = shared_address(b);
  const uint64_t policy = cache_policy(CACHE);
#define FASTLM_LOAD(DIMENSIONS, COORDINATES, ...)                                                                         \
  if constexpr (N == DIMENSIONS) {                                                                                        \
    FASTLM_SM90(                                                                                                          \
        asm volatile("cp.async.bulk.tensor." #DIMENSIONS                                                                  \
                     "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {" COORDINATES \
                     "}], [%2], %3;" ::"r"(tile),                                                                         \
                     "l"(&map), "r"(barrier), "l"(policy), __VA_ARGS__ : "memory"));                                      \
  }
  FASTLM_LOAD(1, "%4", "r"(c[0]))
  FASTLM_LOAD(2, "%4, %5", "r"(c[0]), "r"(c[1]))
  FASTLM_LOAD(3, "%4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]))
  FASTLM_LOAD(4, "%4, %5, %6, %7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]))
  FASTLM_LOAD(5, "%4, %5, %6, %7, %8", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]))
#undef FASTLM_LOAD
}

#define FASTLM_STORE(DIMENSIONS, INSTRUCTION, COORDINATES, ...)                                                    \
  if constexpr (N == DIMENSIONS) {                                                                                 \
    FASTLM_SM90(asm volatile(INSTRUCTION ".tile.bulk_group [%0, {" COORDINATES "}], [%1];" ::"l"(&map), "r"(tile), \
                             __VA_ARGS__ : "memory"));                                                             \
  }
#define FASTLM_STORES(BEGIN, END)                                                               \
  FASTLM_STORE(1, BEGIN "1d" END, "%2", "r"(c[0]))                                              \
  FASTLM_STORE(2, BEGIN "2d" END, "%2, %3", "r"(c[0]), "r"(c[1]))                               \
  FASTLM_STORE(3, BEGIN "3d" END, "%2, %3, %4", "r"(c[0]), "r"(c[1]), "r"(c[2]))                \
  FASTLM_STORE(4, BEGIN "4d" END, "%2, %3, %4, %5", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])) \
  FASTLM_STORE(5, BEGIN "5d" END, "%2, %3, %4, %5, %6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]))

template <class T, int N>
DEVICE void tensor_store(const TensorMap& map, const int (&c)[N], T* from, Where = {}) {
  static_assert(N >= 1 && N <= 5, "a tensor map has 1 to 5 dimensions");
  const uint32_t tile = shared_address(from);
  FASTLM_STORES("cp.async.bulk.tensor.", ".global.shared::cta")
}
template <class T, int N>
DEVICE void tensor_reduce_add(const TensorMap& map, const int (&c)[N], T* from, Where = {}) {
  static_assert(N >= 1 && N <= 5, "a tensor map has 1 to 5 dimensions");
  const uint32_t tile = shared_address(from);
  FASTLM_STORES("cp.reduce.async.bulk.tensor.", ".global.shared::cta.add")
}
#undef FASTLM_STORES
#undef FASTLM_STORE

template <L2 CACHE = L2::normal, class T>
DEVICE void bulk_load(T* to, const T* from, int bytes, Mbarrier* b, Where = {}) {
  FASTLM_SM90(asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(b)), "l"(cache_policy(CACHE)) : "memory"));
}
template <class T>
DEVICE void bulk_store(T* to, const T* from, int bytes, Where = {}) {
  FASTLM_SM90(asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
                           "r"(bytes) : "memory"));
}
template <class T>
DEVICE void bulk_reduce_add(T* to, const T* from, int bytes, Where = {}) {
  const uint32_t source = shared_address(from);
#define FASTLM_REDUCE(TYPE)                                                                                             \
  FASTLM_SM90(asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add." TYPE " [%0], [%1], %2;" ::"l"(to), \
                           "r"(source), "r"(bytes) : "memory"))
  if constexpr (std::is_same_v<T, float>) {
    FASTLM_REDUCE("f32");
  } else if constexpr (std::is_same_v<T, bf16>) {
    FASTLM_REDUCE("noftz.bf16");
  } else if constexpr (std::is_same_v<T, fp16>) {
    FASTLM_REDUCE("noftz.f16");
  } else if constexpr (sizeof(T) == 8) {
    FASTLM_REDUCE("u64");
  } else {
    static_assert(std::is_integral_v<T> && sizeof(T) == 4, "these elements cannot be added");
    FASTLM_REDUCE("u32");
  }
#undef FASTLM_REDUCE
}

DEVICE void bulk_commit(Where = {}) { FASTLM_SM90(asm volatile("cp.async.bulk.commit_group;" ::: "memory")); }
template <int N>
DEVICE void bulk_wait_read(Where = {}) {
  FASTLM_SM90(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"));
}
template <int N>
DEVICE void bulk_wait(Where = {}) {
  FASTLM_SM90(asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory"));
}

template <int N, class T>
DEVICE void copy_async(T* to, const T* from, int valid = N, Where = {}) {
  constexpr int bytes = N * sizeof(T);
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const int read = valid * static_cast<int>(sizeof(T));
  if constexpr (bytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(bytes), "r"(read)
                 : "memory");
  }
}
DEVICE void copy_async_commit(Where = {}) { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void copy_async_wait(Where = {}) {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Warps and registers.
DEVICE bool elect_one(Where = {}) {
  uint32_t elected = 0;
  FASTLM_SM90(asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected)::"memory"));
  return elected != 0;
}
DEVICE int warpgroup_id(Where = {}) { return __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0); }
DEVICE int warpgroup_thread() { return threadIdx.x & 127; }

// Only the architectures with an "a" have it. Without it a kernel keeps the registers it was launched with.
template <int N>
DEVICE void setmaxnreg_inc(Where = {}) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
DEVICE void setmaxnreg_dec(Where = {}) {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg takes a multiple of 8 from 24 to 256");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(__CUDA_ARCH_FEAT_SM100_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

}  // namespace device
