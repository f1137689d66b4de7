// decode_attention with plain products, a key to a lane: fp32, and what 16-byte reads do not fit.
#pragma once

#include "decode_attention_merge.h"

namespace {

constexpr int kPlainRows = 8, kPlainTile = 32;

// Elements i to i + VEC - 1 of a cache: 4 are of fp32.
template <int VEC>
DEVICE Floats<VEC> read_floats(const Args& a, const void* p, int64_t i, Where at = Where::current()) {
  if constexpr (VEC == 1) {
    return {{number(p, a.dtype, i, at)}};
  } else {
    return load_vector<VEC, Cache::read_only>(Global<const float>(static_cast<const float*>(p)) + i, at);
  }
}

// VEC: elements to a read; 1 where the dtype is not fp32, or strides, addresses or widths do not allow more.
template <int VEC>
KERNEL(kThreads)
decode_attention_plain_kernel(const Args a) {
  constexpr int CHUNKS = kMostWidth / (32 * VEC);
  const Share share(a, kPlainRows, kPlainTile);
  if (!share.is_live()) return;
  const Pages pages(a, kPlainTile);
  const Found found(a, kPlainRows);
  const Shared<float> q = dynamic_shared<float>(Found::bytes(a, kPlainRows));  // [kPlainRows][key_width]
  for (int i = thread_id(); i < kPlainRows * a.key_width; i += kThreads) {
    const int r = minimum(i / a.key_width, share.rows - 1);
    const int64_t row = share.b * a.q_strides[0] + share.query(r) * a.q_strides[1] + share.head(r) * a.q_strides[2];
    q[i] = number(a.q, a.dtype, row + i % a.key_width);
  }
  block_barrier();

  float o[kPlainRows][CHUNKS][VEC] = {};
  Running sums[kPlainRows];
  for (int tile = share.begin + warp_id() * kPlainTile; tile < share.end; tile += kWarps * kPlainTile) {
    const Pages::Place place = pages.look_up(a, share, tile, kPlainTile);
    const int key = tile + lane_id();
    const int64_t from = share.h_kv * a.k_strides[2] + pages.offset(place, lane_id(), a.k_strides);
    float p[kPlainRows] = {};
    if (key >= share.lo && key < share.end) {
#pragma unroll 4
      for (int d = 0; d < a.key_width; d += VEC) {
        const Floats<VEC> x = read_floats<VEC>(a, a.k, from + d * a.k_strides[3]);
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) {
          const Floats<VEC> y = load_vector<VEC>(q + (r * a.key_width + d));
#pragma unroll
          for (int i = 0; i < VEC; ++i) p[r] += x[i] * y[i];
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      p[r] = logit<true>(a, share, row_of(a, share, r), r, key, p[r]);
      const float top = warp_max(maximum(sums[r].top, p[r])), base = base_of(top), shrink = fast_exp2(sums[r].top - base);
      p[r] = fast_exp2(p[r] - base);
      sums[r].total = sums[r].total * shrink + p[r];
      sums[r].top = top;
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) o[r][c][i] *= shrink;
      }
    }
    const int first = maximum(0, share.lo - tile), last = minimum(kPlainTile, share.end - tile);
#pragma unroll 2
    for (int j = first; j < last; ++j) {
      const int64_t row = share.h_kv * a.v_strides[2] + pages.offset(place, j, a.v_strides);
      float weights[kPlainRows];
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) weights[r] = shuffle(p[r], j);
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = (32 * c + lane_id()) * VEC;
        if (column >= a.value_width) continue;
        const Floats<VEC> x = read_floats<VEC>(a, a.v, row + column * a.v_strides[3]);
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r) {
#pragma unroll
          for (int i = 0; i < VEC; ++i) o[r][c][i] += weights[r] * x[i];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) {
    sums[r].total = warp_sum(sums[r].total);
    if (lane_id() == 0) found.put(r, sums[r]);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = (32 * c + lane_id()) * VEC;
      if (column >= a.value_width) continue;
      Floats<VEC> part;
#pragma unroll
      for (int i = 0; i < VEC; ++i) part[i] = o[r][c][i];
      store_vector(found.o + (warp_id() * kPlainRows + r) * found.pitch + column, part);
    }
  }
  combine<VEC>(a, share, found);
}

}  // namespace
