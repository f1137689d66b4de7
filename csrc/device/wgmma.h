// Hopper's matrix product by warpgroups, wgmma m64nNk16 (sm_90a alone): bf16 or fp16 operands, fp32 sums. A kernel that needs it
// includes this file. layout.h says where operands lie and which element a register holds; csrc/README.md what the host checks.
//
//   Matrix<T, MAJOR, ROWS>(tile)    an operand: a tile of 16-bit elements in shared memory, ROWS high, in panels of 64 columns
//                                   with the 128-byte swizzle (others: the fourth argument). Major::k: rows are M or N, columns
//                                   K. Major::mn: rows are K, columns M or N. at(row, column) is the part that begins there: row
//                                   a multiple of 8, column of 16 (K-major) or of a panel's width (MN-major)
//   wgmma(d, a, b, accumulate)      d += a b, or = where accumulate is false, for 64 rows: d is float[N / 2] of each thread, N a
//                                   multiple of 8 up to 256; a is a Matrix, or a thread's four registers of a 64 x 16 fragment
//                                   (uint32_t[4]); b is a Matrix. All 128 threads of a warpgroup call it
//   wgmma_fence(d, ...)             before the first product, and again after registers were touched: names all arrays (up to
//                                   three; accumulators and fragments) that the next products use and no product in flight does
//   wgmma_commit()                  closes the group of products since the last one
//   wgmma_wait<N>(d, ...)           until all but the last N groups are done. Names the accumulators (up to two) that may be
//                                   touched from now on, or the compiler would move their use up. Until then neither they nor
//                                   fragments may be read or written. It speaks for its own warp: operands in shared memory may be
//                                   written when all four have waited, and who writes knows it by a barrier
//   has_wgmma()                     whether the current GPU has it: for launchers, on the CPU. kWgmma says it of the
//                                   architecture compiled for: if constexpr (kWgmma) around the body of a kernel template
//   pack_rounded<T>(low, high)      two floats rounded to T in one register, as fragments hold them
#pragma once

#include "async.h"

#ifdef FASTLM_HOST
#include "host/wgmma.h"
#else
#include "cuda_wgmma.h"
#endif

namespace device {

template <class T, Major MAJOR, int ROWS, Swizzle SWIZZLE = Swizzle::b128>
class Matrix {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>, "wgmma takes bf16 and fp16 here");

 public:
  DEVICE explicit Matrix(Shared<T> tile)
      : tile_(tile), descriptor_(tile_descriptor(shared_address(tile), ROWS, MAJOR, SWIZZLE)) {}
  DEVICE Matrix at(int row, int column) const { return {tile_, descriptor_ + (tile_start(row, column, ROWS, SWIZZLE) >> 4)}; }
  DEVICE uint64_t descriptor() const { return descriptor_; }
  DEVICE Shared<T> tile() const { return tile_; }

 private:
  DEVICE Matrix(Shared<T> tile, uint64_t descriptor) : tile_(tile), descriptor_(descriptor) {}
  Shared<T> tile_;
  uint64_t descriptor_;
};

template <class T, int M>
DEVICE void wgmma_fence(T (&d)[M], Where at = Where::current()) {
  wgmma_fence_registers(d, at);
  wgmma_fence_all();
}
template <class T, int M, class U, int L>
DEVICE void wgmma_fence(T (&d)[M], U (&e)[L], Where at = Where::current()) {
  wgmma_fence_registers(d, at);
  wgmma_fence(e, at);
}
template <class T, int M, class U, int L, class V, int K>
DEVICE void wgmma_fence(T (&d)[M], U (&e)[L], V (&f)[K], Where at = Where::current()) {
  wgmma_fence_registers(d, at);
  wgmma_fence(e, f, at);
}

template <int N>
DEVICE void wgmma_wait(Where at = Where::current()) {
  wgmma_wait_all<N>(at);
}
template <int N, int M>
DEVICE void wgmma_wait(float (&d)[M], Where at = Where::current()) {
  wgmma_wait_all<N>(at);
  wgmma_give_registers<N>(d, at);
}
template <int N, int M, int L>
DEVICE void wgmma_wait(float (&d)[M], float (&e)[L], Where at = Where::current()) {
  wgmma_wait<N>(d, at);
  wgmma_give_registers<N>(e, at);
}

template <int M, class T, Major A_MAJOR, int A_ROWS, Swizzle A_SWIZZLE, Major B_MAJOR, int B_ROWS, Swizzle B_SWIZZLE>
DEVICE void wgmma(float (&d)[M], const Matrix<T, A_MAJOR, A_ROWS, A_SWIZZLE>& a, const Matrix<T, B_MAJOR, B_ROWS, B_SWIZZLE>& b,
                  bool accumulate = true, Where at = Where::current()) {
  wgmma_shared<T, A_MAJOR, B_MAJOR>(d, a, b, accumulate, at);
}

template <int M, class T, Major B_MAJOR, int B_ROWS, Swizzle B_SWIZZLE>
DEVICE void wgmma(float (&d)[M], const uint32_t* a, const Matrix<T, B_MAJOR, B_ROWS, B_SWIZZLE>& b, bool accumulate = true,
                  Where at = Where::current()) {
  wgmma_registers<T, B_MAJOR>(d, a, b, accumulate, at);
}

}  // namespace device
