// Cross entropy of rows of logits, and its gradient into a new tensor (fastlm/ops/cross_entropy.py has the contract).
//
// The forward reads each logit once: a thread keeps the maximum and the sum of exp(x - maximum) of its part of a row, rescaled
// when the maximum grows (online softmax, Milakov and Gimelshein 2018, arXiv:1805.02867), and the parts are put together in a
// fixed order. A warp owns a narrow row, a block a wide one, and where there are too few wide rows to fill a GPU that has
// clusters, a cluster of up to 8 blocks owns one. The backward knows maximum and sum, so each element stands alone: it reads each
// logit once and writes its gradient, a row in as many blocks as it takes.
//
// Rows begin anywhere, as those of a vocabulary of 50,257 do: the few elements before the first multiple of 16 bytes and after
// the last are read one by one, the rest in 16-byte accesses.

#include "cross_entropy.h"
#include "device/cluster.h"
#include "device/device.h"

namespace {

using namespace device;

constexpr int kForwardThreads = 512, kBackwardThreads = 256;  // at most, and of a row that needs more than a warp
constexpr int kVectorsAtOnce = 4;  // 16-byte vectors that a thread reads at once
constexpr int kWidestOfWarp = 1024;
constexpr int kRowsPerBlock = 4;     // where a warp owns a row
constexpr int kBlocksOfGpu = 264;    // two of 512 threads on each SM of an H200
constexpr int kMostCluster = 8;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLargest = 3.402823466e38f;
constexpr float kLowest = -kLargest;  // a maximum before the first logit: finite, as -inf - -inf would be NaN
constexpr int kInvalidValue = 1;      // cudaErrorInvalidValue

DEVICE float exp_of(float difference) { return fast_exp2(difference * kLog2e); }

// tanh and its derivative, of e = exp(-2 |x|): (1 - e) / (1 + e) and 4 e / (1 + e)^2, as 1 - tanh^2 would have few digits left
// where tanh is near 1. Near 0, where 1 - e has few, the polynomial of the Cephes library.
struct Tanh {
  float value, slope;
};
DEVICE Tanh tanh_of(float x) {
  const float e = fast_exp2(-2 * kLog2e * fabsf(x)), inverse = fast_reciprocal(1.0f + e), s = x * x;
  float p = (-5.70498872745e-3f * s + 2.06390887954e-2f) * s - 5.37397155531e-2f;
  p = (p * s + 1.33314422036e-1f) * s - 3.33332819422e-1f;
  return {fabsf(x) < 0.625f ? p * s * x + x : copysignf((1.0f - e) * inverse, x), 4.0f * e * inverse * inverse};
}

DEVICE int64_t row_start(const fastlm_rows& at, int64_t row) {
  return at.inner == 1 ? row * at.outer_stride : row / at.inner * at.outer_stride + row % at.inner * at.inner_stride;
}

// Elements of a row before its first multiple of 16 bytes.
template <class T>
DEVICE int before_vectors(const T* row, int columns) {
  return minimum(columns, static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T)));
}

// A row of logits, and which part of it this thread has: vectors first, first + step, ..., and at most one element of its ends.
// PLAIN: neither softcap nor smoothing.
template <class T, bool PLAIN>
struct Row {
  static constexpr int VEC = kVector<T>;
  using Raw = Vector<uint32_t, 4>;  // VEC logits as they were read: half the registers of what they are taken apart into
  const fastlm_cross_entropy& a;
  int64_t row;
  int columns, head, vectors, first, step;
  Global<const T> z;
  float per_softcap;

  DEVICE Row(const fastlm_cross_entropy& args, int64_t index, int position, int width)
      : a(args),
        row(index),
        columns(static_cast<int>(a.columns)),
        head(before_vectors(static_cast<const T*>(a.logits) + row_start(a.logits_rows, row), columns)),
        vectors((columns - head) / VEC),
        first(position),
        step(width),
        z(Global<const T>(static_cast<const T*>(a.logits)) + row_start(a.logits_rows, row)),
        per_softcap(softcapped() ? 1.0f / a.softcap : 0.0f) {}

  DEVICE bool softcapped() const { return !PLAIN && a.softcap > 0; }
  DEVICE bool smoothed() const { return !PLAIN && a.smoothing != 0; }

  // The column of this thread's element of the ends, or -1.
  DEVICE int end_column() const {
    const int ends = columns - vectors * VEC;
    return first >= ends ? -1 : first < head ? first : columns - ends + first;
  }
  DEVICE int column_of(int vector) const { return head + vector * VEC; }

  // x of a logit as it was read, and what the softcap multiplies its gradient by.
  DEVICE float logit(float value, float& slope) const {
    const float x = value * a.scale;
    slope = 1.0f;
    if (!softcapped()) return x;
    const Tanh t = tanh_of(x * per_softcap);
    slope = t.slope;
    return a.softcap * t.value;
  }
  DEVICE float logit_at(int column, float& slope, Where at = Where::current()) const {
    return logit(to_float(load_vector<1>(z + column, at)[0]), slope);
  }
  DEVICE float logit_at(int column, Where at = Where::current()) const {
    float slope;
    return logit_at(column, slope, at);
  }
  // The vectors `v` and those after it, as far as there are any.
  template <Cache CACHE>
  DEVICE void read(int v, Raw (&raw)[kVectorsAtOnce], Where at = Where::current()) const {
#pragma unroll
    for (int k = 0; k < kVectorsAtOnce; ++k) {
      if (v + k * step < vectors) raw[k] = load_vector<4, CACHE>(pointer_cast<const uint32_t>(z + column_of(v + k * step)), at);
    }
  }
  DEVICE void logits_of(const Raw& raw, float (&x)[VEC], float (&slope)[VEC]) const {
    Vector<T, VEC> v;
    memcpy(&v, &raw, sizeof(v));
    if (softcapped()) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) x[i] = logit(to_float(v[i]), slope[i]);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) x[i] = to_float(v[i]) * a.scale, slope[i] = 1.0f;
    }
  }
  DEVICE float weight_at(int column, Where at = Where::current()) const {
    return a.weight ? load_vector<1>(Global<const float>(a.weight) + column, at)[0] : 1.0f;
  }

  struct Target {
    bool valid;
    int column;   // -1 if it is no class
    float share;  // the weight of its term
  };
  DEVICE Target target_of(int64_t target, Where at = Where::current()) const {
    const bool valid = target >= 0 && target < a.columns;
    const int index = valid ? static_cast<int>(target) : 0;
    return {valid, valid ? index : -1, (1.0f - a.smoothing) * weight_at(index, at)};
  }
  DEVICE float weight_sum(Where at = Where::current()) const {
    if (!smoothed()) return 0;
    return a.weight ? load_vector<1>(Global<const float>(a.weight_sum), at)[0] : static_cast<float>(columns);
  }
};

// Of the logits x seen so far: their maximum, the sum of exp(x - maximum), and that of weight * (x - pivot) where labels are
// smoothed. The pivot is the target's logit: were it 0, what all logits share would take the digits of the sum.
struct Seen {
  float peak = kLowest, sum = 0, total = 0;

  DEVICE void grow(float higher) {
    if (higher > peak) {
      sum *= exp_of(peak - higher);
      peak = higher;
    }
  }
};

DEVICE Seen of_warp(const Seen& mine) {
  Seen all;
  all.peak = warp_max(mine.peak);
  all.sum = warp_sum(mine.sum * exp_of(mine.peak - all.peak));
  all.total = warp_sum(mine.total);
  return all;
}

template <class T, bool PLAIN>
DEVICE Seen read_part(const Row<T, PLAIN>& r, float pivot) {
  constexpr int VEC = kVector<T>;
  Seen seen;
  const int end = r.end_column();
  if (end >= 0) {
    const float x = r.logit_at(end);
    seen.grow(x);
    seen.sum += exp_of(x - seen.peak);
    if (r.smoothed()) seen.total += r.weight_at(end) * (x - pivot);
  }
  for (int v = r.first; v < r.vectors; v += kVectorsAtOnce * r.step) {
    typename Row<T, PLAIN>::Raw raw[kVectorsAtOnce];
    r.template read<Cache::normal>(v, raw);
#pragma unroll
    for (int k = 0; k < kVectorsAtOnce; ++k) {
      if (v + k * r.step >= r.vectors) continue;
      float x[VEC], slope[VEC], higher = kLowest;
      r.logits_of(raw[k], x, slope);
#pragma unroll
      for (int i = 0; i < VEC; ++i) higher = fmaxf(higher, x[i]);  // skips NaN, which the sum gets
      seen.grow(higher);
#pragma unroll
      for (int i = 0; i < VEC; ++i) seen.sum += exp_of(x[i] - seen.peak);
      if (r.smoothed()) {
#pragma unroll
        for (int i = 0; i < VEC; ++i) seen.total += r.weight_at(r.column_of(v + k * r.step) + i) * (x[i] - pivot);
      }
    }
  }
  return seen;
}

template <class T, bool PLAIN>
KERNEL(kForwardThreads, 2)
cross_entropy_fwd_kernel(const fastlm_cross_entropy a, int rows_per_block) {
  SHARED_ARRAY(float, parts, 3 * kMostCluster * (kForwardThreads / 32));  // of each warp: peak, sum, total
  const bool warps_own = rows_per_block > 1;
  const int blocks = cluster_blocks(), rank = cluster_rank();
  const int64_t row = warps_own ? static_cast<int64_t>(block_x()) * rows_per_block + warp_id() : block_x() / blocks;
  if (row >= a.rows) return;  // a whole warp, and no barrier follows
  const int position = warps_own ? lane_id() : rank * block_threads() + thread_id();
  const bool ends = lane_id() == 0 && (warps_own || position == 0);  // the thread that writes the result
  const Global<float> loss(a.loss), statistics(a.statistics);
  const int64_t number = load_vector<1>(Global<const int64_t>(a.target) + row)[0];
  if (number == a.ignore_index) {
    if (ends) {
      loss[row] = 0.0f;
      statistics[row] = 0.0f;
      statistics[a.rows + row] = 0.0f;
    }
    return;  // all threads of the row
  }
  if (blocks > 1) cluster_arrive_relaxed();
  const Row<T, PLAIN> r(a, row, position, warps_own ? 32 : blocks * block_threads());
  float picked = 0;
  if (ends || r.smoothed()) picked = r.logit_at(number >= 0 && number < a.columns ? static_cast<int>(number) : 0);
  const float pivot = fabsf(picked) <= kLargest ? picked : 0.0f;

  Seen seen = of_warp(read_part(r, pivot));
  if (!warps_own) {
    if (blocks > 1) cluster_wait();  // the first block runs
    const int count = blocks * block_warps();
    if (lane_id() == 0) {
      const Shared<float> mine = cluster_pointer(parts, 0) + 3 * (rank * block_warps() + warp_id());
      mine[0] = seen.peak;
      mine[1] = seen.sum;
      mine[2] = seen.total;
    }
    if (blocks > 1) {
      cluster_barrier();
    } else {
      block_barrier();
    }
    if (rank > 0 || warp_id() > 0) return;
    seen = Seen();
    for (int i = lane_id(); i < count; i += 32) {
      const float peak = parts[3 * i], sum = parts[3 * i + 1], total = parts[3 * i + 2];
      seen.grow(peak);
      seen.sum += sum * exp_of(peak - seen.peak);
      seen.total += total;
    }
    seen = of_warp(seen);
  }
  if (!ends) return;
  const auto target = r.target_of(load_vector<1>(Global<const int64_t>(a.target) + row)[0]);  // again: it took registers above
  const float log_sum = logf(seen.sum), lse = seen.peak + log_sum;
  // peak - picked first: it is exact where the target is the maximum, and the loss small.
  float value = target.share * (log_sum + (seen.peak - picked)) + a.z_loss * lse * lse;
  if (r.smoothed()) {
    const float above = log_sum + (seen.peak - pivot);
    value += a.smoothing / static_cast<float>(r.columns) * (r.weight_sum() * above - seen.total);
  }
  loss[row] = target.valid ? value : NAN;
  statistics[row] = seen.peak;
  statistics[a.rows + row] = log_sum;
}

template <class T, bool PLAIN>
KERNEL(kBackwardThreads)
cross_entropy_bwd_kernel(const fastlm_cross_entropy a, int rows_per_block) {
  constexpr int VEC = kVector<T>;
  const bool warps_own = rows_per_block > 1;
  const int64_t row = warps_own ? static_cast<int64_t>(block_x()) * rows_per_block + warp_id() : block_x();
  if (row >= a.rows) return;
  const Row<T, PLAIN> r(a, row, warps_own ? lane_id() : block_y() * block_threads() + thread_id(),
                 warps_own ? 32 : grid_y() * block_threads());
  const Global<T> dz = Global<T>(static_cast<T*>(a.dlogits)) + row_start(a.dlogits_rows, row);
  // Vectors of the gradient lie as those of the logits do, or are written element by element.
  const bool beside = before_vectors(static_cast<T*>(a.dlogits) + row_start(a.dlogits_rows, row), r.columns) == r.head;
  const auto write = [&](int column, const Vector<T, VEC>& v, Where at = Where::current()) {
    if (beside) {
      store_vector(dz + column, v, at);
    } else {
#pragma unroll
      for (int i = 0; i < VEC; ++i) store_vector(dz + column + i, Vector<T, 1>{{v[i]}}, at);
    }
  };
  const int end = r.end_column();

  const int64_t number = load_vector<1>(Global<const int64_t>(a.target) + row)[0];
  if (number == a.ignore_index) {
    Vector<T, VEC> zeros;
#pragma unroll
    for (int i = 0; i < VEC; ++i) zeros[i] = from_float<T>(0);
    if (end >= 0) dz[end] = zeros[0];
    for (int v = r.first; v < r.vectors; v += r.step) write(r.column_of(v), zeros);
    return;
  }
  const Global<const float> statistics(a.statistics), dloss(a.dloss);
  const float peak = statistics[row], log_sum = statistics[a.rows + row], upstream = dloss[row];
  const auto target = r.target_of(number);
  const float spread = a.smoothing / static_cast<float>(r.columns), weight_sum = r.weight_sum();
  const float pull = 2.0f * a.z_loss * (peak + log_sum), factor = upstream * a.scale;
  const auto gradient = [&](float x, float slope, int column, Where at = Where::current()) {
    const float p = exp_of((x - peak) - log_sum);  // not x - lse: a large lse is rounded, x - peak is not
    float g = target.share * (p - (column == target.column ? 1.0f : 0.0f));
    if (r.smoothed()) g += spread * (weight_sum * p - r.weight_at(column, at));
    g += pull * p;  // last: it would round away what is left of p - 1
    if (r.softcapped()) g *= slope;
    return g * factor;
  };
  if (end >= 0) {
    float slope;
    const float x = r.logit_at(end, slope);
    dz[end] = from_float<T>(gradient(x, slope, end));
  }
  for (int v = r.first; v < r.vectors; v += kVectorsAtOnce * r.step) {
    typename Row<T, PLAIN>::Raw raw[kVectorsAtOnce];
    r.template read<Cache::streaming>(v, raw);
#pragma unroll
    for (int k = 0; k < kVectorsAtOnce; ++k) {
      if (v + k * r.step >= r.vectors) continue;
      const int column = r.column_of(v + k * r.step);
      float x[VEC], slope[VEC];
      Vector<T, VEC> result;
      r.logits_of(raw[k], x, slope);
#pragma unroll
      for (int i = 0; i < VEC; ++i) result[i] = from_float<T>(gradient(x[i], slope[i], column + i));
      write(column, result);
    }
  }
}

template <class T, bool PLAIN>
int start_fwd(const fastlm_cross_entropy& a, void* stream) {
  if (a.columns <= kWidestOfWarp) {
    const Dim grid{static_cast<int>(ceil_div<int64_t>(a.rows, kRowsPerBlock))};
    return launch(cross_entropy_fwd_kernel<T, PLAIN>, grid, 32 * kRowsPerBlock, 0, stream, a, kRowsPerBlock);
  }
  int threads = 64, cluster = 1;
  constexpr int64_t EACH = kVectorsAtOnce * kVector<T>;
  while (threads < kForwardThreads && threads * EACH < a.columns) threads *= 2;
  const int most = minimum(kMostCluster, most_cluster_blocks());
  while (2 * cluster <= most && cluster * a.rows < kBlocksOfGpu && 2 * cluster * threads * EACH <= a.columns) cluster *= 2;
  const Dim grid{static_cast<int>(a.rows * cluster)};
  return launch_cluster(cross_entropy_fwd_kernel<T, PLAIN>, grid, cluster, threads, 0, stream, a, 1);
}

template <class T, bool PLAIN>
int start_bwd(const fastlm_cross_entropy& a, void* stream) {
  if (a.columns <= kWidestOfWarp) {
    const Dim grid{static_cast<int>(ceil_div<int64_t>(a.rows, kRowsPerBlock))};
    return launch(cross_entropy_bwd_kernel<T, PLAIN>, grid, 32 * kRowsPerBlock, 0, stream, a, kRowsPerBlock);
  }
  // Four rounds of a block, where that leaves blocks enough: its few scalars are read once in them.
  const int64_t round = int64_t{kBackwardThreads} * kVectorsAtOnce * kVector<T>;
  int64_t parts = ceil_div(a.columns, 4 * round);
  if (a.rows * parts < 4 * kBlocksOfGpu) parts = ceil_div(a.columns, round);
  const Dim grid{static_cast<int>(a.rows), static_cast<int>(minimum<int64_t>(parts, 65535))};
  return launch(cross_entropy_bwd_kernel<T, PLAIN>, grid, kBackwardThreads, 0, stream, a, 1);
}

template <class T>
int start(const fastlm_cross_entropy& a, bool forward, void* stream) {
  const bool plain = a.softcap == 0 && a.smoothing == 0;
  if (forward) return plain ? start_fwd<T, true>(a, stream) : start_fwd<T, false>(a, stream);
  return plain ? start_bwd<T, true>(a, stream) : start_bwd<T, false>(a, stream);
}

int start_checked(const fastlm_cross_entropy& a, bool forward, void* stream) {
  if (a.rows <= 0 || a.rows > 0x7fffffff || a.columns <= 0 || a.columns > 0x7fffffff) return kInvalidValue;
  if (a.weight && a.smoothing != 0 && !a.weight_sum) return kInvalidValue;
  switch (a.dtype) {
    case FASTLM_FLOAT32: return start<float>(a, forward, stream);
    case FASTLM_BFLOAT16: return start<bf16>(a, forward, stream);
    case FASTLM_FLOAT16: return start<fp16>(a, forward, stream);
    default: return kInvalidValue;
  }
}

}  // namespace

extern "C" int fastlm_cross_entropy_fwd(const fastlm_cross_entropy* args, void* stream) {
  return start_checked(*args, true, stream);
}

extern "C" int fastlm_cross_entropy_bwd(const fastlm_cross_entropy* args, void* stream) {
  return start_checked(*args, false, stream);
}
