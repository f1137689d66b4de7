// How the parts of a row of decode_attention come together: of the warps of a block in shared memory, then of its shares in fp32.
#pragma once

#include "decode_attention_share.h"

namespace {

// The running maximum and sum of a row.
struct Running {
  float top = -INFINITY, total = 0;
};
DEVICE float base_of(float top) { return top == -INFINITY ? 0.0f : top; }  // of a row that has seen nothing: no inf - inf

// What to multiply the output with, and the log-sum-exp. 0 and -inf if the row saw nothing.
struct Finished {
  float factor, lse;

  DEVICE Finished(const Args& a, const Running& sum, int head, Where at = Where::current()) {
    float shrink = 1, total = sum.total, top = sum.top;
    if (a.sinks) {  // one more logit in the sum, with no value
      const float sink = number(a.sinks, a.sinks_dtype, head, at) * kLog2e, higher = base_of(maximum(top, sink));
      shrink = fast_exp2(top - higher);
      total = total * shrink + fast_exp2(sink - higher);
      top = higher;
    }
    const bool dead = sum.total == 0;
    factor = dead ? 0 : shrink / total;
    lse = dead ? -INFINITY : (top + fast_log2(total)) * kLn2;
  }
};

// What the warps of a block have found, in shared memory: output [kWarps][tile rows][pitch], maxima and sums [kWarps][tile rows].
struct Found {
  Shared<float> o, tops, totals;
  int tile_rows, pitch;

  DEVICE Found(const Args& a, int tile_rows_)
      : o(dynamic_shared<float>()), tops(o), totals(o), tile_rows(tile_rows_), pitch(ceil_div(a.value_width, 4) * 4) {
    tops = o + kWarps * tile_rows * pitch;
    totals = tops + kWarps * tile_rows;
  }
  EVERYWHERE static int bytes(const Args& a, int tile_rows) {
    return kWarps * tile_rows * (ceil_div(a.value_width, 4) * 4 + 2) * static_cast<int>(sizeof(float));
  }

  DEVICE Running stats(int warp, int r) const {
    Running sum;
    sum.top = tops[warp * tile_rows + r];
    sum.total = totals[warp * tile_rows + r];
    return sum;
  }
  DEVICE void put(int r, const Running& sum) const {
    tops[warp_id() * tile_rows + r] = sum.top;
    totals[warp_id() * tile_rows + r] = sum.total;
  }
};

template <int VEC>
using Floats = Vector<float, VEC>;

template <class T, int VEC>
DEVICE void put_as(void* p, int64_t i, const Vector<float, VEC>& values, Where at) {
  Vector<T, VEC> out;
#pragma unroll
  for (int j = 0; j < VEC; ++j) out[j] = from_float<T>(values[j]);
  store_vector(Global<T>(static_cast<T*>(p)) + i, out, at);
}
template <int VEC>
DEVICE void put(void* p, int32_t dtype, int64_t i, const Vector<float, VEC>& values, Where at = Where::current()) {
  if (dtype == FASTLM_BFLOAT16) return put_as<bf16, VEC>(p, i, values, at);
  return dtype == FASTLM_FLOAT16 ? put_as<fp16, VEC>(p, i, values, at) : put_as<float, VEC>(p, i, values, at);
}

// Writes a row's output; its first thread also the log-sum-exp.
template <int VEC>
DEVICE void finish(const Args& a, const Share& share, int r, int column, const Running& sum, const Floats<VEC>& o,
                   Where at = Where::current()) {
  const Finished f(a, sum, share.head(r), at);
  Floats<VEC> out;
#pragma unroll
  for (int i = 0; i < VEC; ++i) out[i] = o[i] * f.factor;
  put<VEC>(a.o, a.dtype, share.output(a, r) * a.value_width + column, out, at);
  if (column > 0) return;
  const Global<float> lse(a.lse);
  lse[(static_cast<int64_t>(share.b) * a.H + share.head(r)) * a.S + share.query(r)] = f.lse;
}

// Brings the warps of the block together, then, in the last of them, its shares. VEC columns to a thread.
template <int VEC>
DEVICE void combine(const Args& a, const Share& share, const Found& found) {
  const int chunks = a.value_width / VEC, items = share.rows * chunks;
  const int64_t outputs = static_cast<int64_t>(a.B) * a.S * a.H;
  const Global<float> partial(a.partial), stats(a.stats);
  block_barrier();
  for (int item = thread_id(); item < items; item += kThreads) {
    const int r = item / chunks, column = item % chunks * VEC;
    Running sum;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum.top = maximum(sum.top, found.stats(w, r).top);
    Floats<VEC> o{};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const Running one = found.stats(w, r);
      const float weight = fast_exp2(one.top - base_of(sum.top));
      const Floats<VEC> part = load_vector<VEC>(found.o + (w * found.tile_rows + r) * found.pitch + column);
      sum.total += one.total * weight;
#pragma unroll
      for (int i = 0; i < VEC; ++i) o[i] += part[i] * weight;
    }
    if (share.live == 1) {
      finish<VEC>(a, share, r, column, sum, o);
      continue;
    }
    const int64_t to = block_y() * outputs + share.output(a, r);
    store_vector(partial + to * a.value_width + column, o);
    if (column == 0) store_vector(stats + 2 * to, Floats<2>{{sum.top, sum.total}});
  }
  if (share.live == 1 || !is_last_block(Global<unsigned>(a.counters) + block_x(), share.live)) return;
  for (int item = thread_id(); item < items; item += kThreads) {
    const int r = item / chunks, column = item % chunks * VEC;
    const int64_t at = share.output(a, r);
    Running sum;
    for (int i = 0; i < share.live; ++i) sum.top = maximum(sum.top, load_vector<2>(stats + 2 * (i * outputs + at))[0]);
    Floats<VEC> o{};
#pragma unroll 16  // nothing else is going on any more: many reads on their way at once
    for (int i = 0; i < share.live; ++i) {
      const int64_t from = i * outputs + at;
      const Floats<2> one = load_vector<2>(stats + 2 * from);
      const float weight = fast_exp2(one[0] - base_of(sum.top));
      const Floats<VEC> part = load_vector<VEC>(partial + from * a.value_width + column);
      sum.total += one[1] * weight;
#pragma unroll
      for (int j = 0; j < VEC; ++j) o[j] += part[j] * weight;
    }
    finish<VEC>(a, share, r, column, sum, o);
  }
}

}  // namespace
