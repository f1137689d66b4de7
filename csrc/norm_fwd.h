// The forward of rms_norm and layer_norm (CENTRED): a row is read once and stays in registers between its sums and its result: of a
// block up to 16384 columns, of a cluster of them up to 131072. Of a wider row each thread reads its part again, from the cache; so
// it is where vectors do not begin at 16 bytes.
#pragma once

#include "norm_rows.h"

namespace {

constexpr int kForwardThreads = 128;  // of a block, at least

// 1 / sqrt(mean of squares + eps); the row's first thread writes it, and the mean.
template <bool CENTRED, bool CLUSTERS, int VEC>
DEVICE float rstd_of(const fastlm_norm& a, const Place<VEC>& at, int64_t row, float squares, float mean) {
  float sum[1] = {squares};
  row_sum<CLUSTERS>(sum, at.threads, 1, !CENTRED);
  const float rstd = 1.0f / sqrtf(sum[0] / static_cast<float>(a.columns) + a.eps);
  if (at.first == 0 && row < a.rows) {
    const Global<float> rstds(a.rstd), means(a.mean);
    rstds[row] = rstd;
    if constexpr (CENTRED) means[row] = mean;
  }
  return rstd;
}

template <class X, bool CENTRED>
KERNEL(kMostThreads)
norm_fwd_kernel(const fastlm_norm a, int threads_per_row) {
  constexpr int VEC = kWidth<X>, HELD = kHeldElements / VEC;
  const Place<VEC> at(threads_per_row);
  meet_blocks(at.blocks);
  const int64_t row = at.row(), out = row * a.columns;
  // A row beyond the last has no columns: its threads go along to the barriers.
  const int first = static_cast<int>(at.first), step = static_cast<int>(at.step);
  const int columns = row < a.rows ? static_cast<int>(a.columns) : 0;
  const auto column = [&](int k) { return first + k * step; };

  Held<X, VEC, HELD> x;
  x.load(row_of<X>(a.x, row_start(a.x_rows, row)), first, step, columns);
  const uint32_t bits = a.seed ? kept<VEC>(a, row, first, step, HELD) : 0;
  float s[HELD][VEC];
  const auto take = [&] {  // what was read of x
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) s[k][i] = column(k) < columns ? x.at(k, i) : 0.0f;
      if (a.seed) drop(s[k], bits >> k * VEC, a.grown);
    }
  };
  if (a.residual) {
    with_type<X>(a.residual_dtype, [&](auto type) {
      using R = typename decltype(type)::type;
      Held<R, VEC, HELD> residual;
      residual.load(row_of<R>(a.residual, row_start(a.residual_rows, row)), first, step, columns);
      take();
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
        if (column(k) < columns) {
#pragma unroll
          for (int i = 0; i < VEC; ++i) s[k][i] += residual.at(k, i);
          write(row_of<R>(a.residual_out, out + column(k)), s[k]);  // rounded: what the backward will read
        }
      }
    });
  } else {
    take();
  }

  float mean = 0;
  if constexpr (CENTRED) {
    float sum[1] = {0};
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[0] += s[k][i];
    }
    row_sum<true>(sum, at.threads, 0, true);
    mean = sum[0] / static_cast<float>(a.columns);
  }
  float squares = 0;
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    if (column(k) < columns) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        s[k][i] -= mean;
        squares += s[k][i] * s[k][i];
      }
    }
  }
  const float rstd = rstd_of<CENTRED, true>(a, at, row, squares, mean);

#pragma unroll
  for (int k = 0; k < HELD; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      s[k][i] *= rstd;
      if (a.round_first) s[k][i] = to_float(from_float<X>(s[k][i]));
    }
  }
  if (a.weight) {
    with_type<X>(a.parameter_dtype, [&](auto type) {
      using P = typename decltype(type)::type;
      Held<P, VEC, HELD> weight;
      weight.load(row_of<P>(a.weight, 0), first, step, columns);
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) s[k][i] *= a.weight_offset + weight.at(k, i);
      }
    });
  }
  if (a.bias) {
    with_type<X>(a.parameter_dtype, [&](auto type) {
      using P = typename decltype(type)::type;
      Held<P, VEC, HELD> bias;
      bias.load(row_of<P>(a.bias, 0), first, step, columns);
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) s[k][i] += bias.at(k, i);
      }
    });
  }
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    if (column(k) < columns) write(row_of<X>(a.y, out + column(k)), s[k]);
  }
}

// What is normalised, from `column` on; written to residual_out.
template <class X, int VEC>
DEVICE void sum_at(const fastlm_norm& a, int64_t row, int64_t column, float (&s)[VEC]) {
  with_own_type<X>(a.x_dtype, [&](auto type) {
    read(row_of<typename decltype(type)::type>(a.x, row_start(a.x_rows, row) + column), s);
  });
  if (a.seed) drop(s, kept<VEC>(a, row, column), a.grown);
  if (!a.residual) return;
  with_type<X>(a.residual_dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    float r[VEC];
    read(row_of<R>(a.residual, row_start(a.residual_rows, row) + column), r);
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[i] += r[i];
    write(row_of<R>(a.residual_out, row * a.columns + column), s);
  });
}

// As sum_at, of a row that this thread has read before.
template <class X, int VEC>
DEVICE void sum_again(const fastlm_norm& a, int64_t row, int64_t column, float (&s)[VEC]) {
  if (!a.residual) return sum_at<X>(a, row, column, s);
  with_type<X>(a.residual_dtype, [&](auto type) {
    using R = typename decltype(type)::type;
    read(Global<const R>(row_of<R>(a.residual_out, row * a.columns + column)), s);  // as this thread wrote it
  });
}

// Each thread merges the mean of what it reads and the squares about it, vector by vector (Chan, Golub and LeVeque 1983); the row's
// mean then tells how far each thread's is from it.
template <class X, bool CENTRED>
KERNEL(kLoopThreads, 2)
norm_fwd_wide_kernel(const fastlm_norm a, int threads_per_row) {
  constexpr int VEC = kWidth<X>;
  const Place<VEC> at(threads_per_row);
  const int64_t row = at.row(), columns = row < a.rows ? a.columns : 0;
  float s[VEC], count = 0, own = 0, squares = 0, mean = 0;
  for (int64_t column = at.first; column < columns; column += at.step) {
    sum_at<X>(a, row, column, s);
    if constexpr (CENTRED) {
      float here = 0;
#pragma unroll
      for (int i = 0; i < VEC; ++i) here += s[i] * (1.0f / VEC);
#pragma unroll
      for (int i = 0; i < VEC; ++i) squares += (s[i] - here) * (s[i] - here);
      const float part = VEC / (count + VEC);  // of all that was read
      squares += (here - own) * (here - own) * (count * part);
      own += (here - own) * part;
      count += VEC;
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) squares += s[i] * s[i];
    }
  }
  if constexpr (CENTRED) {
    float sum[1] = {own * count};
    row_sum<false>(sum, at.threads, 0, true);
    mean = sum[0] / static_cast<float>(a.columns);
    squares += (own - mean) * (own - mean) * count;
  }
  const float rstd = rstd_of<CENTRED, false>(a, at, row, squares, mean);
  for (int64_t column = at.first; column < columns; column += at.step) {
    sum_again<X>(a, row, column, s);
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[i] = (s[i] - mean) * rstd;
    if (a.round_first) {
      with_own_type<X>(a.x_dtype, [&](auto type) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) s[i] = to_float(from_float<typename decltype(type)::type>(s[i]));
      });
    }
    float p[VEC];
    if (a.weight) {
      with_type<X>(a.parameter_dtype, [&](auto type) { read(row_of<typename decltype(type)::type>(a.weight, column), p); });
#pragma unroll
      for (int i = 0; i < VEC; ++i) s[i] *= a.weight_offset + p[i];
    }
    if (a.bias) {
      with_type<X>(a.parameter_dtype, [&](auto type) { read(row_of<typename decltype(type)::type>(a.bias, column), p); });
#pragma unroll
      for (int i = 0; i < VEC; ++i) s[i] += p[i];
    }
    with_own_type<X>(a.x_dtype, [&](auto type) {
      write(row_of<typename decltype(type)::type>(a.y, row * a.columns + column), s);
    });
  }
}

template <class X, bool CENTRED>
int start_forward(const fastlm_norm& a, bool held, void* stream) {
  const int threads = threads_for(a.columns, kHeldElements, held ? kMostThreads * kMostBlocks : kLoopThreads);
  const int block = minimum(maximum(threads, kForwardThreads), kMostThreads), cluster = maximum(1, threads / block);
  const int64_t blocks = ceil_div<int64_t>(a.rows, maximum(1, block / threads)) * cluster;
  if (blocks > 0x7fffffff) return kInvalidValue;
  const Dim grid{static_cast<int>(blocks)};
  if constexpr (!std::is_same_v<X, Any>) {
    if (held) return launch_cluster(norm_fwd_kernel<X, CENTRED>, grid, cluster, block, 0, stream, a, threads);
  }
  return launch(norm_fwd_wide_kernel<X, CENTRED>, grid, block, 0, stream, a, threads);
}

template <bool CENTRED>
int norm_forward(const fastlm_norm& a, void* stream) {
  if (!is_one_of(a.parameter_dtype, a.x_dtype) || !is_one_of(a.residual_dtype, a.x_dtype)) return kInvalidValue;
  if (a.rows <= 0 || a.rows > 0x7fffffff || a.columns <= 0) return kInvalidValue;
  const int64_t width = a.x_dtype == FASTLM_FLOAT32 ? kWidth<float> : kWidth<bf16>;
  const bool vectors = a.columns % width == 0 && aligned(a.x, a.x_rows, width) && aligned(a.residual, a.residual_rows, width) &&
                       aligned(a.y) && aligned(a.residual_out) && aligned(a.weight) && aligned(a.bias);
  const bool held = vectors && a.columns <= most_blocks() * kMostThreads * kHeldElements;
  if (!vectors) return start_forward<Any, CENTRED>(a, false, stream);
  switch (a.x_dtype) {
    case FASTLM_FLOAT32: return start_forward<float, CENTRED>(a, held, stream);
    case FASTLM_BFLOAT16: return start_forward<bf16, CENTRED>(a, held, stream);
    case FASTLM_FLOAT16: return start_forward<fp16, CENTRED>(a, held, stream);
    default: return kInvalidValue;
  }
}

}  // namespace
