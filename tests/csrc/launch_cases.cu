// Launches of csrc/device/cuda.h and tensor maps of cuda_async.h, against functions of the CUDA runtime that keep its rules without a
// GPU: what was asked for of shared memory is one number of each kernel and device; a thread has no context until it has set its
// device. The program returns the number of the first check that fails, or 0.

#include <cstdio>
#include <functional>
#include <map>
#include <mutex>
#include <thread>
#include <utility>

#include "device/async.h"
#include "device/cluster.h"
#include "device/device.h"

using namespace device;

KERNEL(32) first(int* p) { *p = 1; }
KERNEL(32) second(int* p) { *p = 2; }

namespace {

constexpr int kStatic = 1000, kUnasked = 48 << 10;
constexpr int kOfDevice[] = {227 << 10, 99 << 10};
std::mutex guard;
std::map<std::pair<const void*, int>, int> allowed, times;
thread_local int current = 0;
std::function<void()> meanwhile;  // done once, between a launch's asking and its start
thread_local int bound = -1, encoded = 0;  // the device whose context this thread has, and how often it asked for a tensor map
cudaError_t when_set = cudaSuccess;

#ifndef __CUDA_ARCH__
CUresult encode(CUtensorMap*, CUtensorMapDataType type, cuuint32_t rank, void* base, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  ++encoded;
  if (bound < 0) return CUDA_ERROR_INVALID_CONTEXT;
  const bool right = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 3 && base != nullptr && sizes[0] == 128 && sizes[1] == 3 &&
                     sizes[2] == 50 && strides[0] == 256 && strides[1] == 768 && box[0] == 64 && box[1] == 1 && box[2] == 32 &&
                     steps[0] == 1 && steps[1] == 1 && steps[2] == 1 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                     swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  return right ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
#endif

}  // namespace

#ifndef __CUDA_ARCH__  // CUDA has some of these for its own kernels
extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (when_set == cudaSuccess) bound = current = device;
  return when_set;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *found = reinterpret_cast<void*>(&encode);
  *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = kOfDevice[device];
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->sharedSizeBytes = kStatic;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > kOfDevice[current] - kStatic) {
    return cudaErrorInvalidValue;
  }
  const std::lock_guard<std::mutex> lock(guard);
  allowed[{kernel, current}] = value;
  ++times[{kernel, current}];
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  if (meanwhile) std::exchange(meanwhile, nullptr)();
  const std::lock_guard<std::mutex> lock(guard);
  const auto at = allowed.find({kernel, current});
  const int most = at == allowed.end() ? kUnasked - kStatic : at->second;
  return static_cast<int>(config->dynamicSmemBytes) > most ? cudaErrorInvalidValue : cudaSuccess;
}

}  // extern "C"
#endif

namespace {

template <class Start>
int while_another_thread_starts_little(const Start& start) {
  const int device = current;
  meanwhile = [&] {
    std::thread([&] {
      current = device;
      if (launch(first, Dim{1}, 32, 5 << 10, nullptr, nullptr)) std::puts("little is refused");
    }).join();
  };
  return start();
}

int tensor_map(int rows = 50) {
  static bf16 memory[128];
  TensorMap map;
  return make_tensor_map<bf16>(map, memory, {128, 3, rows}, {128, 384}, {64, 1, 32}, Swizzle::b128);
}

int asked(void (*kernel)(int*), int device) { return times[{reinterpret_cast<const void*>(kernel), device}]; }

}  // namespace

#define CHECK(...)                                        \
  if (!(__VA_ARGS__)) {                                   \
    std::printf("%d: %s\n", __LINE__, #__VA_ARGS__);      \
    return 1;                                             \
  }

int main() {
  CHECK(launch(second, Dim{1}, 32, 0, nullptr, nullptr) == 0 && asked(second, 0) == 0);
  for (int i = 0; i < 3; ++i) {
    CHECK(while_another_thread_starts_little([] { return launch(first, Dim{1}, 32, 90 << 10, nullptr, nullptr); }) == 0);
    CHECK(while_another_thread_starts_little([] { return launch_cooperative(first, Dim{1}, 32, 90 << 10, nullptr, nullptr); }) == 0);
    CHECK(while_another_thread_starts_little([] { return launch_cluster(first, Dim{2}, 2, 32, 90 << 10, nullptr, nullptr); }) == 0);
  }
  CHECK(asked(first, 0) == 1 && asked(second, 0) == 0 && asked(first, 1) == 0);
  CHECK(launch(first, Dim{1}, 32, (227 << 10) - kStatic, nullptr, nullptr) == 0);
  CHECK(launch(first, Dim{1}, 32, (227 << 10) - kStatic + 1, nullptr, nullptr) == cudaErrorInvalidValue);
  // Another kernel; another device, on which there is less.
  CHECK(launch(second, Dim{1}, 32, kUnasked, nullptr, nullptr) == 0 && asked(second, 0) == 1);
  current = 1;
  for (int i = 0; i < 3; ++i) {
    CHECK(while_another_thread_starts_little([] { return launch(first, Dim{1}, 32, 90 << 10, nullptr, nullptr); }) == 0);
  }
  CHECK(asked(first, 1) == 1);
  CHECK(launch(first, Dim{1}, 32, 100 << 10, nullptr, nullptr) == cudaErrorInvalidValue);
  current = 0;
  CHECK(launch(first, Dim{1}, 32, 200 << 10, nullptr, nullptr) == 0 && asked(first, 0) == 1);

  // A thread without a context gets that of its device, once. Other errors are given back.
  current = 1;
  CHECK(tensor_map() == 0 && bound == 1 && encoded == 2);
  CHECK(tensor_map() == 0 && encoded == 3);
  CHECK(tensor_map(51) == CUDA_ERROR_INVALID_VALUE && encoded == 4);
  bound = -1, when_set = cudaErrorDevicesUnavailable;
  CHECK(tensor_map() == cudaErrorDevicesUnavailable && encoded == 5);
  return 0;
}
