// y = x W^T + bias for one to eight rows of x, W of 32, 16, 8 or 4 bits: what linear.cu and quantized_linear.cu share.
//
// Such a product is as fast as W can be read. With 16-bit x it goes to tensor cores even for one row, because below 16 bits the
// plain way (one conversion and one multiply-add per weight and row) takes longer than the reading: mma m16n8k16 with 16 rows
// of W as A and x, up to 8 rows, as B.
//
//   A warp owns 16 rows of W. Lane 4 * g + t reads 16 bytes of row g and of row g + 8 at once: four lanes, 64 bytes of a row, a
//   step. kDepth steps, 2 * 16 * kDepth bytes a lane, are on their way before the first is used, and before x is there.
//   What a lane has read is what it must hold as A, once k is renumbered: the sum over k has no order of its own. x is put into
//   shared memory by that numbering, so that B, too, is read in 16 bytes.
//   Codes become 16-bit numbers less their zero point, exactly (integers up to 256); the scale of a group goes onto its fp32
//   sums, so W itself is never rounded. From 4 bits: `(~w & 0x000f000f) | magic` is two numbers 2^7 + 15 - code (2^10 in fp16),
//   of which one subtraction makes code - zero (after Kim et al. 2022, arXiv:2211.10017, and Marlin, Frantar et al. 2024,
//   arXiv:2408.11743; counting down from 15 keeps zero points up to 255 exact in bf16).
//   Where a group is shorter than 64 bytes, the four lanes first exchange words, so that each product is of one group.
//
// The eight warps of a block own 1, 2, 4 or 8 such tiles of W, and share their columns; their sums are added in order. Where that
// makes too few blocks, blocks share columns too (`splits`) and a second kernel adds, in order.
//
// fp32 x, and weights whose rows do not all begin and end at multiples of 16 bytes, go by plain fp32 multiply-adds: a warp to two
// rows.
//
// Here: which kernel a call takes, and on how many blocks. The kernels: few_rows_mma.h and few_rows_plain.h.
#pragma once

#include "few_rows_mma.h"
#include "few_rows_plain.h"

namespace few_rows {

constexpr int kMostShared = 96 << 10;
constexpr int64_t kMostColumns = 1 << 28;  // eight rows of x of so many are divided among fewer than kMostSplits blocks
constexpr int kInvalidValue = 1;           // cudaErrorInvalidValue
constexpr int kMostSplits = 65535;         // the height of a grid

// Bytes of a row of W.
inline int64_t row_bytes(const fastlm_linear& a) {
  if (a.bits == 4) return (a.columns + a.group_size - 1) / a.group_size * a.group_size / 2;
  return a.columns * a.bits / 8;
}

// Whether every row of W is whole vectors of 16 bytes.
inline bool whole_vectors(const fastlm_linear& a) {
  return row_bytes(a) % 16 == 0 && a.weight_stride % 16 == 0 && reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
}

inline bool by_tensor_cores(const fastlm_linear& a) { return a.x_dtype != FASTLM_FLOAT32 && whole_vectors(a); }

// Tiles of W of a block: so many that reading x, once per block, costs at most a fourth of reading them; not more than there are.
inline int tiles_of(const fastlm_linear& a) {
  int tiles = 1;
  while (tiles < kWarps && tiles * a.bits < 4 * a.rows && tiles * kTile < a.outputs) tiles *= 2;
  return tiles;
}

inline int64_t steps_of(const fastlm_linear& a) { return ceil_div<int64_t>(row_bytes(a), kStepBytes); }

// Two blocks to a multiprocessor, as long as every warp has kDepth steps; and x in shared memory.
inline int splits_for(const fastlm_linear& a, int multiprocessors) {
  if (!by_tensor_cores(a) || a.rows <= 0 || a.outputs <= 0 || a.columns <= 0) return 1;
  const int64_t tiles = tiles_of(a), steps = steps_of(a), blocks = ceil_div<int64_t>(a.outputs, tiles * kTile);
  const int64_t useful = minimum<int64_t>(2 * multiprocessors / blocks, steps / (kDepth * kWarps / tiles));
  const int64_t x_bytes = steps * (kStepBytes * 8 / a.bits) * 2 * a.rows, room = kMostShared - kWarps * kSums * 4 - (4 << 10);
  const int64_t splits = maximum<int64_t>(maximum<int64_t>(useful, 1), ceil_div(x_bytes, room));
  return static_cast<int>(ceil_div(steps, ceil_div(steps, splits)));  // no block without columns
}

template <class X, int BITS, Groups GROUPS>
int start_tiles(const fastlm_linear& a, void* stream) {
  const int tiles = tiles_of(a), share = static_cast<int>(ceil_div<int64_t>(steps_of(a), a.splits));
  const int shared = kWarps * kSums * static_cast<int>(sizeof(float)) +
                     static_cast<int>(a.rows) * pitch_of(share, kStepColumns<BITS>) * 2;
  if (share > kMostShared / 64 || shared > kMostShared) return kInvalidValue;
  if (a.splits > 1 && !a.partial) return kInvalidValue;
  const bool vectors =
      reinterpret_cast<uintptr_t>(a.x) % 8 == 0 && a.x_rows.outer_stride % 4 == 0 && a.x_rows.inner_stride % 4 == 0;
  const Dim grid{static_cast<int>(ceil_div<int64_t>(a.outputs, tiles * kTile)), a.splits};
  const int error = launch(few_rows_kernel<X, BITS, GROUPS>, grid, 32 * kWarps, shared, stream, a, tiles,
                           static_cast<int>(row_bytes(a) / 16), share, vectors);
  if (error || a.splits == 1) return error;
  const Dim all{static_cast<int>(ceil_div<int64_t>(a.outputs, kCombineThreads)), static_cast<int>(a.rows)};
  return launch(combine_kernel<X>, all, kCombineThreads, 0, stream, a);
}

template <class X, int BITS, bool VECTORS>
int start_plain(const fastlm_linear& a, void* stream) {
  if (a.splits != 1) return kInvalidValue;
  const Dim grid{static_cast<int>(ceil_div<int64_t>(a.outputs, kPlainWarps * kPlainRows))};
  return launch(plain_kernel<X, BITS, VECTORS>, grid, 32 * kPlainWarps, 0, stream, a,
                static_cast<int>(row_bytes(a) / kPlainUnit<BITS, VECTORS>));
}

inline bool in_range(const fastlm_linear& a) {
  return a.rows >= 1 && a.rows <= kRows && a.columns >= 1 && a.columns <= kMostColumns && a.outputs >= 1 &&
         a.outputs <= 0x7fffffff && a.splits >= 1 && a.splits <= kMostSplits;
}

}  // namespace few_rows
