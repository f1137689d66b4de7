// few_rows.h on tensor cores: 16 rows of W to a warp, and the sums of blocks that share columns.
#pragma once

#include "few_rows_operands.h"

namespace few_rows {

constexpr int kTile = 16;  // rows of W of a warp
constexpr int kWarps = 8;
constexpr int kDepth = 4;  // steps on their way

// What a lane reads of a step, for its two rows of W.
struct Fetched {
  Vector<uint32_t, 4> words[2];
  uint32_t scale[2];
  int zero[2];
};

template <class X, int BITS, Groups GROUPS>
struct Tile {
  using Format = Codes<X, BITS>;
  const fastlm_linear& a;
  int g, t, units, group_shift;
  int64_t row[2];
  Global<const uint8_t> weight[2];
  uint32_t centre[2];  // where there are no groups
  float sum[4];

  DEVICE Tile(const fastlm_linear& args, int64_t first_row, int units_of_row)
      : a(args), g(lane_id() / 4), t(lane_id() % 4), units(units_of_row), group_shift(0), sum{0, 0, 0, 0} {
    if constexpr (GROUPS != Groups::none) {
      while (16 << group_shift < a.group_size * BITS / 8) ++group_shift;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = minimum(first_row + g + 8 * r, a.outputs - 1);  // rows past the end are computed from the last one, and not stored
      weight[r] = Global<const uint8_t>(static_cast<const uint8_t*>(a.weight)) + row[r] * a.weight_stride;
      if constexpr (BITS == 8 && GROUPS == Groups::none) centre[r] = Format::centre(load_zero<BITS>(a, row[r]));
    }
  }

  DEVICE int64_t groups() const { return (units + (1 << group_shift) - 1) >> group_shift; }

  // Past `end`, and past the end of the row, words of zeros.
  DEVICE void fetch(int step, int end, Fetched& to) const {
    const int unit = 4 * step + t;
    const bool live = step < end && unit < units;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      to.words[r] = {};
      if (live) to.words[r] = load_vector<4, Cache::streaming>(pointer_cast<const uint32_t>(weight[r] + int64_t{16} * unit));
      if constexpr (GROUPS != Groups::none) {
        to.scale[r] = 0, to.zero[r] = 0;
        if (step < end) {  // past the end of the row, too: the sums that this lane scales are of all four
          const int64_t index = row[r] * groups() + (minimum(unit, units - 1) >> group_shift);
          to.scale[r] = load_raw(a.scale, a.scale_dtype, index);
          to.zero[r] = load_zero<BITS>(a, index);
        }
      }
    }
  }

  // Adds the products of a step with x (this lane's row of it, from the step on; null past the last row of x).
  DEVICE void multiply(Fetched& step, Shared<const X> x) {
    constexpr int PIECES = kStepColumns<BITS> / 32;
    float part[4] = {0, 0, 0, 0}, scale[2];
    uint32_t zero[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (GROUPS == Groups::small) exchange(step.words[r]);
      if constexpr (GROUPS != Groups::none) {
        scale[r] = value_of(step.scale[r], a.scale_dtype);
        zero[r] = Format::centre(step.zero[r]);
      } else {
        zero[r] = centre[r];
      }
    }
#pragma unroll
    for (int q = 0; q < PIECES; ++q) {
      Vector<X, 8> v;
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = from_float<X>(0.0f);
      if (g < a.rows) v = load_vector<8>(x + (32 * q + 8 * t));
      uint32_t b[2][2];
      memcpy(b, &v, 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t left[4];
        if constexpr (BITS == 16) {
#pragma unroll
          for (int i = 0; i < 4; ++i) left[i] = step.words[i % 2][2 * half + i / 2];
        } else {
          const int word = BITS == 8 ? 2 * q + half : q;
          uint32_t from[2] = {zero[0], zero[1]};
          if constexpr (GROUPS == Groups::small) {
            if (a.zero) from[0] = shuffle(zero[0], word, kAllLanes, 4), from[1] = shuffle(zero[1], word, kAllLanes, 4);
          }
          Format::unpack(step.words[0][word], half, from[0], left[0], left[2]);
          Format::unpack(step.words[1][word], half, from[1], left[1], left[3]);
        }
        if constexpr (GROUPS == Groups::none) {
          mma<X>(sum, left, b[half]);
        } else {
          mma<X>(part, left, b[half]);
        }
        if constexpr (GROUPS == Groups::small) {
          if (BITS == 8 || half == 1) {
            const int word = BITS == 8 ? 2 * q + half : q;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sum[i] += part[i] * shuffle(scale[i / 2], word, kAllLanes, 4);
              part[i] = 0;
            }
          }
        }
      }
    }
    if constexpr (GROUPS == Groups::wide) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part[i] * scale[i / 2];
    }
  }
};

constexpr int kSums = kTile * kRows;  // of a warp

template <class X, int BITS, Groups GROUPS>
KERNEL(32 * kWarps)
few_rows_kernel(const fastlm_linear a, int tiles, int units, int share, bool x_vectors) {
  const Shared<float> sums = dynamic_shared<float>();  // [warps][rows of x][rows of W]
  const Shared<X> x = dynamic_shared<X>(kWarps * kSums * sizeof(float));
  const int steps = ceil_div(units, 4), first = minimum(block_y() * share, steps), last = minimum(first + share, steps);
  const int pitch = pitch_of(share, kStepColumns<BITS>);
  // The block's rows are counted through its tiles, its columns through its parts.
  const int parts = kWarps / tiles, tile = warp_id() % tiles, part = warp_id() / tiles;
  const int own = ceil_div(last - first, parts), begin = first + part * own, end = minimum(begin + own, last);
  const int64_t first_row = static_cast<int64_t>(block_x()) * tiles * kTile;

  Tile<X, BITS, GROUPS> w(a, first_row + tile * kTile, units);
  Fetched ahead[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) w.fetch(begin + d, end, ahead[d]);
  const int inside = x_vectors ? minimum(static_cast<int>(a.columns) / kStepColumns<BITS>, last) : 0;  // of the row
  const int middle = maximum(inside, first);
  XStore<X, BITS, GROUPS>(a, x, pitch, first, middle - first).template run<true, 4>();
  XStore<X, BITS, GROUPS>(a, x + (middle - first) * kStepColumns<BITS>, pitch, middle, last - middle).template run<false, 1>();
  block_barrier();
  const Shared<const X> mine = x + w.g * pitch;
  for (int step = begin; step < end; step += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (step + d >= end) break;  // the whole warp
      w.multiply(ahead[d], mine + (step + d - first) * kStepColumns<BITS>);
      w.fetch(step + d + kDepth, end, ahead[d]);
    }
  }

  const Shared<float> to = sums + warp_id() * kSums;
#pragma unroll
  for (int i = 0; i < 4; ++i) to[(2 * w.t + i % 2) * kTile + w.g + i / 2 * 8] = w.sum[i];
  block_barrier();
  const int width = tiles * kTile;
  for (int i = thread_id(); i < width * static_cast<int>(a.rows); i += block_threads()) {
    const int m = i / width, local = i - m * width;
    const int64_t n = first_row + local;
    if (n >= a.outputs) continue;
    float sum = 0;
    for (int p = 0; p < parts; ++p) {
      const float of_part = sums[(p * tiles + local / kTile) * kSums + m * kTile + local % kTile];
      sum += of_part;
    }
    if (BITS == 8 && GROUPS == Groups::none) sum *= value_of(load_raw(a.scale, a.scale_dtype, n), a.scale_dtype);
    const int64_t at = m * a.outputs + n;
    if (a.splits > 1) {
      const Global<float> partial(a.partial);
      partial[block_y() * a.rows * a.outputs + at] = sum;
    } else {
      if (a.bias) sum += value_of(load_raw(a.bias, a.bias_dtype, n), a.bias_dtype);
      const Global<X> y(static_cast<X*>(a.y));
      y[at] = from_float<X>(sum);
    }
  }
}

constexpr int kCombineThreads = 128;

// y from the sums of all splits, in order.
template <class X>
KERNEL(kCombineThreads)
combine_kernel(const fastlm_linear a) {
  const int64_t n = static_cast<int64_t>(block_x()) * kCombineThreads + thread_id(), i = block_y() * a.outputs + n;
  if (n >= a.outputs) return;
  const Global<const float> partial(a.partial);
  float sum = 0;
  for (int s = 0; s < a.splits; ++s) {
    const float of_split = partial[s * a.rows * a.outputs + i];
    sum += of_split;
  }
  if (a.bias) sum += value_of(load_raw(a.bias, a.bias_dtype, n), a.bias_dtype);
  const Global<X> y(static_cast<X*>(a.y));
  y[i] = from_float<X>(sum);
}

}  // namespace few_rows
