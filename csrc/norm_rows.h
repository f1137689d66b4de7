// What the kernels of rms_norm and layer_norm share, forward and backward: where rows lie, how threads share them, dropout.
//
// A power of two of threads owns a row: part of a warp, a warp, several warps, a block, on Hopper and later a cluster of blocks.
// Of a row that they can hold, each of them reads its vectors of 16 bytes at once and keeps them.
#pragma once

#include "device/cluster.h"
#include "norm.h"

namespace {

using namespace device;

constexpr int kMostThreads = 1024;  // of a block
constexpr int kMostBlocks = 8;  // of a cluster
// Of a row that is read in a loop, at most; their kernels say that two such blocks fit, or ptxas would spill to fit a third.
constexpr int kLoopThreads = 512;
constexpr int kHeldElements = 16;  // of a row, in the registers of a thread
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

// The dtypes of parameters and of the residual stream are known at run time: theirs or fp32. A branch on them is the same for all
// threads, and few kernels are compiled. In rows that are read element by element (Any) all dtypes are.
struct Any {};

template <class T>
struct Type {
  using type = T;
};

template <class X>
constexpr int kWidth = 16 / sizeof(X);  // elements read at a time
template <>
constexpr int kWidth<Any> = 1;

// f(Type<T>()) for the T that `dtype` is: X or float; if X is Any, any.
template <class X, class F>
DEVICE void with_type(int32_t dtype, F f) {
  if constexpr (std::is_same_v<X, float>) {
    f(Type<float>());
  } else if (dtype == FASTLM_FLOAT32) {
    f(Type<float>());
  } else if constexpr (!std::is_same_v<X, Any>) {
    f(Type<X>());
  } else if (dtype == FASTLM_BFLOAT16) {
    f(Type<bf16>());
  } else {
    f(Type<fp16>());
  }
}

// The same where the dtype is X, unless X is Any.
template <class X, class F>
DEVICE void with_own_type(int32_t dtype, F f) {
  if constexpr (std::is_same_v<X, Any>) {
    with_type<Any>(dtype, f);
  } else {
    f(Type<X>());
  }
}

DEVICE int64_t row_start(const fastlm_rows& at, int64_t row) {
  if (at.inner == 1) return row * at.outer_stride;
  const uint32_t r = static_cast<uint32_t>(row), inner = static_cast<uint32_t>(at.inner);
  return r / inner * at.outer_stride + r % inner * at.inner_stride;
}

template <class T>
DEVICE Global<const T> row_of(const void* base, int64_t offset) {
  return Global<const T>(static_cast<const T*>(base)) + offset;
}
template <class T>
DEVICE Global<T> row_of(void* base, int64_t offset) {
  return Global<T>(static_cast<T*>(base)) + offset;
}

// N elements from p on.
template <int N, class T>
DEVICE void read(Global<const T> p, float (&out)[N], Where at = Where::current()) {
  constexpr int W = minimum(N, kVector<T>);
#pragma unroll
  for (int i = 0; i < N; i += W) {
    const Vector<T, W> v = load_vector<W>(p + i, at);
#pragma unroll
    for (int j = 0; j < W; ++j) out[i + j] = to_float(v[j]);
  }
}

// Writes s as T, and leaves in s what was written.
template <int N, class T>
DEVICE void write(Global<T> p, float (&s)[N], Where at = Where::current()) {
  constexpr int W = minimum(N, kVector<T>);
#pragma unroll
  for (int i = 0; i < N; i += W) {
    Vector<T, W> v;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      v[j] = from_float<T>(s[i + j]);
      s[i + j] = to_float(v[j]);
    }
    store_vector(p + i, v, at);
  }
}

// Which rows this block takes, which of them is this thread's, and which of its columns: vectors of VEC from `first` on, `step`
// columns apart.
template <int VEC>
struct Place {
  int threads, blocks;  // of a row
  int rows;             // of a block, side by side
  int slot;             // the thread's among them
  int64_t first, step;

  DEVICE explicit Place(int threads_per_row)
      : threads(threads_per_row),
        blocks(maximum(1, threads / block_threads())),
        rows(maximum(1, block_threads() / threads)),
        slot(thread_id() / threads),
        first(static_cast<int64_t>(blocks > 1 ? cluster_rank() * block_threads() + thread_id() : thread_id() & (threads - 1)) * VEC),
        step(static_cast<int64_t>(threads) * VEC) {}

  DEVICE int part() const { return block_x() / blocks; }  // this block's, or cluster's, share of the rows
  DEVICE int parts() const { return grid_x() / blocks; }
  DEVICE int64_t row() const { return static_cast<int64_t>(part()) * rows + slot; }  // where each takes rows but once
};

// What a thread keeps of a row, as it lies in memory: HELD vectors. All are on their way before the first is waited for. In words:
// 16-bit numbers of their own would take a register each.
template <class T, int VEC, int HELD>
struct Held {
  static constexpr int WORDS = VEC * sizeof(T) / 4, PER_WORD = 4 / sizeof(T);
  uint32_t words[HELD][WORDS];

  // Vectors from `columns` on are left as they are.
  DEVICE void load(Global<const T> row, int first, int step, int columns, Where at = Where::current()) {
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      const int column = first + k * step;
      if (column < columns) {
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
          const Vector<uint32_t, 4> v = load_vector<4>(pointer_cast<const uint32_t>(row + (column + i * PER_WORD)), at);
#pragma unroll
          for (int j = 0; j < 4; ++j) words[k][i + j] = v[j];
        }
      }
    }
  }

  DEVICE float at(int k, int i) const {
    const uint32_t word = words[k][i / PER_WORD];
    if constexpr (sizeof(T) == 4) {
      return bits_float(word);
    } else {
      const uint16_t half = static_cast<uint16_t>(i % 2 ? word >> 16 : word);
      T v;
      memcpy(&v, &half, 2);
      return to_float(v);
    }
  }
};

// Early in a kernel whose rows may have clusters: tells the other blocks that this one has begun.
DEVICE void meet_blocks(int blocks, Where at = Where::current()) {
  if (blocks > 1) cluster_arrive_relaxed(at);
}

// v summed over the threads of each row, in all of them, the same bits. All threads of the block call it. Where a row has more
// than a warp it takes one barrier, and `turn` must be 0 and 1 in turns. CLUSTERS: whether a row may have several blocks; `first`
// says that this is the first sum after meet_blocks.
template <bool CLUSTERS, int N>
DEVICE void row_sum(float (&v)[N], int threads, int turn, bool first, Where at = Where::current()) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) {
    if (bits < threads) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += shuffle_xor(v[i], bits, kAllLanes, 32, at);
    }
  }
  if (threads <= 32) return;
  constexpr int kWarps = kMostThreads / 32, kTable = CLUSTERS ? kMostBlocks * kWarps : kWarps;
  SHARED_ARRAY(float, partial, 2 * N * kTable);
  const Shared<float> here = partial + turn * N * kTable;
  if (CLUSTERS && threads > block_threads()) {  // each warp tells every block
    if (first) cluster_wait(at);
    if (lane_id() < threads / block_threads()) {
      const Shared<float> there = cluster_pointer(here, lane_id(), at) + (cluster_rank() * block_warps() + warp_id());
#pragma unroll
      for (int i = 0; i < N; ++i) there[i * kTable] = v[i];
    }
    cluster_barrier(at);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      v[i] = 0;
      for (int from = lane_id(); from < threads / 32; from += 32) {
        const float of_warp = here[i * kTable + from];
        v[i] += of_warp;
      }
      v[i] = warp_sum(v[i], at);
    }
    return;
  }
  if (lane_id() == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) here[i * kTable + warp_id()] = v[i];
  }
  block_barrier(at);
  const int warps = threads / 32, from = (warp_id() & ~(warps - 1)) + (lane_id() & (warps - 1));
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = here[i * kTable + from];
#pragma unroll
  for (int bits = kWarps / 2; bits > 0; bits /= 2) {
    if (bits < warps) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += shuffle_xor(v[i], bits, kAllLanes, 32, at);
    }
  }
}

// Which elements dropout keeps of `held` vectors of VEC, `step` columns apart from `first` on: bit k * VEC + i. Word column % 4 of
// Philox's counter (column / 4, row, 0, offset); rows are below 2^31.
template <int VEC, class A>
DEVICE uint32_t kept(const A& a, int64_t row, int64_t first, int64_t step = 0, int held = 1) {
  const Global<const int64_t> seed(a.seed);
  const int64_t key = seed[0], offset = seed[1];
  const auto words_at = [&](int64_t column) {
    return philox(key, static_cast<uint32_t>(column / 4), static_cast<uint32_t>(row), 0, static_cast<uint32_t>(offset));
  };
  if constexpr (VEC == 1) {
    const RandomWords random = words_at(first);
    const int which = static_cast<int>(first % 4);  // no index known only at run time into registers
    const uint32_t word = which == 0 ? random.word[0] : which == 1 ? random.word[1] : which == 2 ? random.word[2] : random.word[3];
    return word >= a.threshold;
  } else {
    uint32_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < held * VEC; i += 4) {
      const RandomWords random = words_at(first + i / VEC * step + i % VEC);
#pragma unroll
      for (int j = 0; j < 4; ++j) bits |= static_cast<uint32_t>(random.word[j] >= a.threshold) << (i + j);
    }
    return bits;
  }
}

// s after dropout; `bits` is kept()'s.
template <int N>
DEVICE void drop(float (&s)[N], uint32_t bits, float grown) {
#pragma unroll
  for (int i = 0; i < N; ++i) s[i] = (bits >> i & 1) ? s[i] * grown : 0.0f;
}

// --- on the CPU ---------------------------------------------------------------------------------------------------------------

// The least power of two of threads, up to `most`, that have at most `each` of so many columns.
int threads_for(int64_t columns, int64_t each, int most) {
  int threads = 1;
  while (threads < most && threads * each < columns) threads *= 2;
  return threads;
}

int most_blocks() { return minimum(kMostBlocks, most_cluster_blocks()); }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether rows can be read in 16-byte accesses, by vectors of so many elements; also where there are none.
bool aligned(const void* p, const fastlm_rows& rows, int64_t elements) {
  return p == nullptr || (aligned(p) && rows.outer_stride % elements == 0 && rows.inner_stride % elements == 0);
}

bool is_one_of(int32_t dtype, int32_t own) { return dtype == own || dtype == FASTLM_FLOAT32; }

}  // namespace
