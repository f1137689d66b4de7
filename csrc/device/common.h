// What both bodies of the device layer share before either begins.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef FASTLM_HOST
#define KERNEL(...) void
#define DEVICE inline
#define EVERYWHERE inline
#else
#define KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define DEVICE __device__ __forceinline__
#define EVERYWHERE __host__ __device__ __forceinline__
#endif

namespace device {

// The size of a grid.
struct Dim {
  int x = 1, y = 1, z = 1;
};

constexpr uint32_t kAllLanes = 0xffffffffu;

// How a vector access uses the caches. The host body ignores it.
enum class Cache {
  normal,
  streaming,  // read or written once: evicted first
  read_only,  // never written during the kernel: may go through the texture path
};

// N elements in registers. As wide as one memory access allows, and aligned so.
template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0, "a vector access has 1, 2, 4, 8 or 16 bytes");
  T values[N];
  DEVICE T& operator[](int i) { return values[i]; }
  DEVICE const T& operator[](int i) const { return values[i]; }
};

// Elements of T in a 16-byte access.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <class T>
EVERYWHERE constexpr T minimum(T a, T b) {
  return b < a ? b : a;
}

// NaN if either is, unlike fmaxf: no comparison with NaN is true. Which zero is the larger is left open.
template <class T>
EVERYWHERE constexpr T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}

template <class T>
EVERYWHERE constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

DEVICE uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

DEVICE float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

}  // namespace device
