// The backward of rms_norm and layer_norm (CENTRED).
//
// A few blocks per multiprocessor walk over the rows. Each thread keeps its columns of dweight and dbias in fp32 registers as it
// goes; a block leaves one partial row of each, and a second kernel adds these up, in order: no atomics, the same bits every time.
// While 16-bit rows are worked on the next ones are on their way.
//
// A block has rows of up to 8192 columns, a cluster up to 65536. Wider ones, and those whose vectors do not begin at 16 bytes, take two
// kernels instead of the first: one finds the two sums over each row, the other owns columns, walks over rows, and reads them again.
#pragma once

#include "norm_rows.h"

namespace {

constexpr int kRowThreads = 512;     // of a row, at most
constexpr int kBlockThreads = 256;   // of a block, but for rows that have more
constexpr int kColumnThreads = 256;  // of a block that owns columns

// Writes s, what a thread has of a row of dweight (which = 0) or dbias (1), into the block's partial row.
template <int VEC, int HELD>
DEVICE void leave_partial(const fastlm_norm_bwd& a, int which, float (&s)[HELD][VEC], const Place<VEC>& at) {
  const int columns = static_cast<int>(a.columns), first = static_cast<int>(at.first), step = static_cast<int>(at.step);
  const Global<float> out = Global<float>(a.partial) + (static_cast<int64_t>(which) * at.parts() + at.part()) * a.columns;
  if (at.rows == 1) {
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (first + k * step < columns) write(out + (first + k * step), s[k]);
    }
    return;
  }
  SHARED_ARRAY(float, all, kBlockThreads * VEC * HELD);  // a row of sums for each row that the block has at a time
  block_barrier();  // a call before this one may still be read from
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    if (first + k * step < columns) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) all[at.slot * columns + first + k * step + i] = s[k][i];
    }
  }
  block_barrier();
  for (int column = thread_id(); column < columns; column += block_threads()) {
    float sum = 0;
    for (int i = 0; i < at.rows; ++i) {
      const float v = all[i * columns + column];
      sum += v;
    }
    out[column] = sum;
  }
}

// X: dtype of dy and dx, R: of x, dsum and dresidual.
template <class X, class R, bool CENTRED>
KERNEL(kRowThreads)
norm_bwd_kernel(const fastlm_norm_bwd a, int threads_per_row) {
  constexpr int VEC = kWidth<X>, HELD = kHeldElements / VEC;
  constexpr bool AHEAD = sizeof(X) + sizeof(R) == 4;  // wider rows leave no registers for it
  using SavedRow = Held<R, VEC, HELD>;
  const Place<VEC> at(threads_per_row);
  meet_blocks(at.blocks);
  const int first = static_cast<int>(at.first), step = static_cast<int>(at.step);
  const auto column = [&](int k) { return first + k * step; };
  const auto columns_of = [&](int64_t row) { return row < a.rows ? static_cast<int>(a.columns) : 0; };
  const Global<const float> means(a.mean), rstds(a.rstd);

  float scale[HELD][VEC], dweight[HELD][VEC], dbias[HELD][VEC];
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) scale[k][i] = 1, dweight[k][i] = dbias[k][i] = 0;
  }
  if (a.weight) {
    with_type<X>(a.parameter_dtype, [&](auto type) {
      using P = typename decltype(type)::type;
      Held<P, VEC, HELD> weight;
      weight.load(row_of<P>(a.weight, 0), first, step, static_cast<int>(a.columns));
#pragma unroll
      for (int k = 0; k < HELD; ++k) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) scale[k][i] = a.weight_offset + weight.at(k, i);
      }
    });
  }

  struct Loaded {
    Held<X, VEC, HELD> dy;
    SavedRow x;
    float rstd, mean;
  };
  const auto load = [&](int64_t row) {
    Loaded to;
    to.dy.load(row_of<X>(a.dy, row_start(a.dy_rows, row)), first, step, columns_of(row));
    to.x.load(row_of<R>(a.x, row_start(a.x_rows, row)), first, step, columns_of(row));
    to.rstd = to.mean = 0;
    if (row < a.rows) {
      to.rstd = rstds[row];
      if constexpr (CENTRED) to.mean = means[row];
    }
    return to;
  };
  const int64_t begin = static_cast<int64_t>(at.part()) * at.rows, stride = static_cast<int64_t>(at.parts()) * at.rows;
  int turn = 0;
  Loaded next;
  if constexpr (AHEAD) next = load(begin + at.slot);
  // All threads of a block go round as often, those of rows beyond the last too.
  for (int64_t base = begin; base < a.rows; base += stride) {
    const int64_t row = base + at.slot;
    const int columns = columns_of(row);
    Loaded now;
    if constexpr (AHEAD) {
      now = next;
      next = load(row + stride);
    } else {
      now = load(row);
    }
    SavedRow dsum;
    if (a.dsum) dsum.load(row_of<R>(a.dsum, row_start(a.dsum_rows, row)), first, step, columns);
    const uint32_t bits = a.seed ? kept<VEC>(a, row, first, step, HELD) : 0;
    const bool drops_x = a.seed && !a.has_residual;
    const auto xhat_at = [&](int k, int i) {
      float v = now.x.at(k, i);
      if (drops_x) v = (bits >> (k * VEC + i) & 1) ? v * a.grown : 0.0f;
      return (v - now.mean) * now.rstd;
    };

    float sums[CENTRED ? 2 : 1] = {};  // of g * xhat, of g
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (column(k) < columns) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          const float d = now.dy.at(k, i), xhat = xhat_at(k, i), g = d * scale[k][i];
          sums[0] += g * xhat;
          if constexpr (CENTRED) sums[1] += g;
          dweight[k][i] += d * xhat;
          dbias[k][i] += d;
        }
      }
    }
    row_sum<true>(sums, at.threads, turn, base == begin);
    turn = 1 - turn;
    const float along = sums[0] / static_cast<float>(a.columns);
    const float centre = CENTRED ? sums[CENTRED] / static_cast<float>(a.columns) : 0.0f;
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (column(k) < columns) {
        const int64_t out = row * a.columns + column(k);
        float ds[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          ds[i] = now.rstd * (now.dy.at(k, i) * scale[k][i] - centre - xhat_at(k, i) * along);
          if (a.dsum) ds[i] += dsum.at(k, i);
        }
        if (a.dresidual) {
          float kept_ds[VEC];
#pragma unroll
          for (int i = 0; i < VEC; ++i) kept_ds[i] = ds[i];
          write(row_of<R>(a.dresidual, out), kept_ds);
        }
        if (a.seed) drop(ds, bits >> k * VEC, a.grown);
        write(row_of<X>(a.dx, out), ds);
      }
    }
  }
  if (a.dweight) leave_partial(a, 0, dweight, at);
  if (a.dbias) leave_partial(a, 1, dbias, at);
}

// What both of the kernels for wide rows read, from `column` on: dy and g = dy * (weight_offset + weight), and xhat. Returns what
// dropout keeps.
template <class X, int VEC>
DEVICE uint32_t gradients_at(const fastlm_norm_bwd& a, int64_t row, int64_t column, float mean, float rstd, float (&dy)[VEC],
                             float (&g)[VEC], float (&xhat)[VEC]) {
  with_own_type<X>(a.dtype, [&](auto type) {
    read(row_of<typename decltype(type)::type>(a.dy, row_start(a.dy_rows, row) + column), dy);
  });
  with_type<X>(a.x_dtype, [&](auto type) {
    read(row_of<typename decltype(type)::type>(a.x, row_start(a.x_rows, row) + column), xhat);
  });
  uint32_t bits = 0;
  if (a.seed) {
    bits = kept<VEC>(a, row, column);
    if (!a.has_residual) drop(xhat, bits, a.grown);
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) g[i] = 1;
  if (a.weight) {
    with_type<X>(a.parameter_dtype, [&](auto type) { read(row_of<typename decltype(type)::type>(a.weight, column), g); });
#pragma unroll
    for (int i = 0; i < VEC; ++i) g[i] += a.weight_offset;
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    g[i] *= dy[i];
    xhat[i] = (xhat[i] - mean) * rstd;
  }
  return bits;
}

// The means over a row of g * xhat and, `rows` further on, of g.
template <class X, bool CENTRED>
KERNEL(kLoopThreads, 2)
norm_bwd_sums_kernel(const fastlm_norm_bwd a, int threads_per_row) {
  constexpr int VEC = kWidth<X>;
  const Place<VEC> at(threads_per_row);
  const int64_t row = at.row(), columns = row < a.rows ? a.columns : 0;
  const Global<const float> means(a.mean), rstds(a.rstd);
  float rstd = 0, mean = 0;
  if (columns) {
    rstd = rstds[row];
    if constexpr (CENTRED) mean = means[row];
  }
  float sums[CENTRED ? 2 : 1] = {};
  for (int64_t column = at.first; column < columns; column += at.step) {
    float dy[VEC], g[VEC], xhat[VEC];
    gradients_at<X>(a, row, column, mean, rstd, dy, g, xhat);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      sums[0] += g[i] * xhat[i];
      if constexpr (CENTRED) sums[1] += g[i];
    }
  }
  row_sum<false>(sums, at.threads, 0, true);
  if (at.first == 0 && columns) {
    const Global<float> out(a.row_sums);
    out[row] = sums[0] / static_cast<float>(a.columns);
    if constexpr (CENTRED) out[a.rows + row] = sums[1] / static_cast<float>(a.columns);
  }
}

// A block owns columns and takes rows block_y(), block_y() + grid_y() and so on.
template <class X, bool CENTRED>
KERNEL(kColumnThreads)
norm_bwd_columns_kernel(const fastlm_norm_bwd a) {
  constexpr int VEC = kWidth<X>;
  const int64_t column = (static_cast<int64_t>(block_x()) * kColumnThreads + thread_id()) * VEC;
  if (column >= a.columns) return;
  const Global<const float> means(a.mean), rstds(a.rstd), row_sums(a.row_sums);
  float dweight[VEC] = {}, dbias[VEC] = {};
  for (int64_t row = block_y(); row < a.rows; row += grid_y()) {
    float dy[VEC], g[VEC], xhat[VEC], mean = 0, centre = 0;
    const float rstd = rstds[row], along = row_sums[row];
    if constexpr (CENTRED) {
      mean = means[row];
      centre = row_sums[a.rows + row];
    }
    const uint32_t bits = gradients_at<X>(a, row, column, mean, rstd, dy, g, xhat);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      dweight[i] += dy[i] * xhat[i];
      dbias[i] += dy[i];
      g[i] = rstd * (g[i] - centre - xhat[i] * along);
    }
    const int64_t out = row * a.columns + column;
    if (a.dsum || a.dresidual) {
      with_type<X>(a.x_dtype, [&](auto type) {
        using R = typename decltype(type)::type;
        float ds[VEC];
        if (a.dsum) {
          read(row_of<R>(a.dsum, row_start(a.dsum_rows, row) + column), ds);
#pragma unroll
          for (int i = 0; i < VEC; ++i) g[i] += ds[i];
        }
#pragma unroll
        for (int i = 0; i < VEC; ++i) ds[i] = g[i];
        if (a.dresidual) write(row_of<R>(a.dresidual, out), ds);
      });
    }
    if (a.seed) drop(g, bits, a.grown);
    with_own_type<X>(a.dtype, [&](auto type) { write(row_of<typename decltype(type)::type>(a.dx, out), g); });
  }
  const Global<float> partial = Global<float>(a.partial) + (block_y() * a.columns + column);
  if (a.dweight) write(partial, dweight);
  if (a.dbias) write(partial + grid_y() * a.columns, dbias);
}

// dweight (block_y() == 0) and dbias (1) from `parts` partial rows: a warp to 32 columns and every 16th row, then the warps' sums.
KERNEL(kRowThreads)
norm_bwd_total_kernel(const fastlm_norm_bwd a, int parts) {
  constexpr int kWarps = kRowThreads / 32;
  const bool of_bias = block_y() == 1;
  if (!(of_bias ? a.dbias : a.dweight)) return;
  const int64_t column = static_cast<int64_t>(block_x()) * 32 + lane_id();
  const Global<const float> partial = Global<const float>(a.partial) + (block_y() * static_cast<int64_t>(parts) * a.columns + column);
  SHARED_ARRAY(float, sums, kRowThreads);
  float sum = 0;
  if (column < a.columns) {
#pragma unroll 4
    for (int part = warp_id(); part < parts; part += kWarps) {
      const float v = partial[part * a.columns];
      sum += v;
    }
  }
  sums[thread_id()] = sum;
  block_barrier();
  if (warp_id() > 0 || column >= a.columns) return;
  for (int i = 1; i < kWarps; ++i) {
    const float v = sums[i * 32 + lane_id()];
    sum += v;
  }
  with_type<Any>(a.parameter_dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    row_of<P>(of_bias ? a.dbias : a.dweight, 0)[column] = from_float<P>(sum);
  });
}

int start_total(const fastlm_norm_bwd& a, int parts, void* stream) {
  if (!a.dweight && !a.dbias) return 0;
  const Dim grid{static_cast<int>(ceil_div<int64_t>(a.columns, 32)), 2};
  return launch(norm_bwd_total_kernel, grid, kRowThreads, 0, stream, a, parts);
}

template <class X, class R, bool CENTRED>
int start_rows(const fastlm_norm_bwd& a, void* stream) {
  const int threads = threads_for(a.columns, kHeldElements, kRowThreads * kMostBlocks);
  const int block = minimum(maximum(threads, kBlockThreads), kRowThreads), cluster = maximum(1, threads / block);
  const int64_t shares = ceil_div<int64_t>(a.rows, maximum(1, block / threads));
  // A multiprocessor has room for two blocks of kBlockThreads, or one of twice as many.
  const int64_t most = maximum<int64_t>(1, static_cast<int64_t>(a.parts) * kBlockThreads / (block * cluster));
  const int parts = static_cast<int>(minimum(shares, most));
  const int error = launch_cluster(norm_bwd_kernel<X, R, CENTRED>, Dim{parts * cluster}, cluster, block, 0, stream, a, threads);
  return error ? error : start_total(a, parts, stream);
}

template <class X, bool CENTRED>
int start_columns(const fastlm_norm_bwd& a, void* stream) {
  const int threads = threads_for(a.columns, kHeldElements, kLoopThreads), block = maximum(threads, kBlockThreads);
  const Dim rows{static_cast<int>(ceil_div<int64_t>(a.rows, block / threads))};
  const int error = launch(norm_bwd_sums_kernel<X, CENTRED>, rows, block, 0, stream, a, threads);
  if (error) return error;
  const int64_t blocks = ceil_div<int64_t>(a.columns, kColumnThreads * kWidth<X>);
  const int64_t most = minimum<int64_t>(a.parts, ceil_div<int64_t>(4 * static_cast<int64_t>(a.parts), blocks));
  const int parts = static_cast<int>(minimum(minimum<int64_t>(most, a.rows), int64_t{65535}));
  const int failed = launch(norm_bwd_columns_kernel<X, CENTRED>, Dim{static_cast<int>(blocks), parts}, kColumnThreads, 0, stream, a);
  return failed ? failed : start_total(a, parts, stream);
}

template <class X, bool CENTRED>
int start_backward(const fastlm_norm_bwd& a, bool held, void* stream) {
  if (!held) return start_columns<X, CENTRED>(a, stream);
  return a.x_dtype == FASTLM_FLOAT32 ? start_rows<X, float, CENTRED>(a, stream) : start_rows<X, X, CENTRED>(a, stream);
}

template <bool CENTRED>
int norm_backward(const fastlm_norm_bwd& a, void* stream) {
  if (!is_one_of(a.x_dtype, a.dtype) || !is_one_of(a.parameter_dtype, a.dtype)) return kInvalidValue;
  if (a.rows <= 0 || a.rows > 0x7fffffff || a.columns <= 0 || a.parts <= 0) return kInvalidValue;
  const int64_t width = a.dtype == FASTLM_FLOAT32 ? kWidth<float> : kWidth<bf16>;
  const bool vectors = a.columns % width == 0 && aligned(a.dy, a.dy_rows, width) && aligned(a.dsum, a.dsum_rows, width) &&
                       aligned(a.x, a.x_rows, width) && aligned(a.weight) && aligned(a.dx) && aligned(a.dresidual) &&
                       aligned(a.partial);
  const bool held = vectors && a.columns <= most_blocks() * kRowThreads * kHeldElements;
  if (!vectors) return start_columns<Any, CENTRED>(a, stream);
  switch (a.dtype) {
    case FASTLM_FLOAT32: return start_backward<float, CENTRED>(a, held, stream);
    case FASTLM_BFLOAT16: return start_backward<bf16, CENTRED>(a, held, stream);
    case FASTLM_FLOAT16: return start_backward<fp16, CENTRED>(a, held, stream);
    default: return kInvalidValue;
  }
}

}  // namespace
