// One kernel for each feature of the device layer; test_device_layer.py says what each must give.

#include "device/device.h"

using namespace device;

// out [grid, threads, 9]
KERNEL(64) indices_kernel(Global<int> out) {
  const int block = (block_z() * grid_y() + block_y()) * grid_x() + block_x();
  const Global<int> mine = out + static_cast<int64_t>(block * block_threads() + thread_id()) * 9;
  const int values[9] = {block_x(), block_y(), block_z(), thread_id(), lane_id(), warp_id(), block_threads(), block_warps(), grid_z()};
  for (int i = 0; i < 9; ++i) mine[i] = values[i];
}

// Each block reverses its 128 numbers, first in static, then in dynamic shared memory, of which a part is counters.
KERNEL(128) reverse_kernel(Global<const float> x, Global<float> y, Global<int> positive) {
  SHARED_ARRAY(float, tile, 128);
  const Shared<int> counter = dynamic_shared<int>();
  const Shared<float> other = dynamic_shared<float>(16);
  const int64_t first = static_cast<int64_t>(block_x()) * 128;
  const int i = thread_id();
  tile[i] = x[first + i];
  if (i == 0) counter[0] = 0;
  block_barrier();
  const float v = tile[127 - i];
  if (v > 0) atomic_add(counter, 1);
  other[i] = v * 2;
  other[i] += 1;
  block_barrier();
  y[first + i] = other[127 - i] + tile[i];
  if (i == 0) positive[block_x()] = counter[0];
}

// Warp 0 fills a slot and says so; warps 1 and 2 double it, and only they wait.
KERNEL(96) named_kernel(Global<int> out) {
  SHARED_ARRAY(int, slot, 32);
  for (int round = 0; round < 3; ++round) {
    if (warp_id() == 0) {
      if (round > 0) named_barrier(2, 96);
      slot[lane_id()] = 100 * round + lane_id();
      named_barrier_arrive(1, 96);
    } else {
      named_barrier(1, 96);
      out[(round * 2 + warp_id() - 1) * 32 + lane_id()] = 2 * slot[lane_id()];
      if (round < 2) named_barrier_arrive(2, 96);
    }
  }
}

// out [14, 32]
KERNEL(32) shuffles_kernel(Global<const int> x, Global<int> out) {
  const int lane = lane_id(), v = x[lane];
  const bool odd = v % 2 != 0;
  const long long wide = shuffle_xor(static_cast<long long>(v) << 33, 3);
  int upper = -1;
  if (lane >= 16) upper = shuffle_down(v, 1, 0xffff0000u, 16);  // the others go on
  const int values[14] = {
      shuffle(v, 5),           shuffle(v, lane + 9, kAllLanes, 8),       shuffle_up(v, 3),
      shuffle_up(v, 3, kAllLanes, 16), shuffle_down(v, 20),              shuffle_down(v, 1, kAllLanes, 4),
      shuffle_xor(v, 17),      shuffle_xor(v, 16, kAllLanes, 16),        static_cast<int>(warp_ballot(odd)),
      warp_any(v == 7),        warp_all(v == 7),                         static_cast<int>(wide >> 33),
      upper,                   static_cast<int>(bits_float(float_bits(shuffle_xor(static_cast<float>(v), 1)))),
  };
  for (int i = 0; i < 14; ++i) out[i * 32 + lane] = values[i];
}

// out [6, threads]
KERNEL(256) reductions_kernel(Global<const float> x, Global<float> out) {
  const int i = thread_id();
  const float v = x[i];
  const float twice = block_sum(v) + block_sum(v * v);
  const float values[6] = {warp_sum(v), warp_sum<8>(v), warp_max<4>(v), block_max(v), twice, static_cast<float>(block_sum(i))};
  for (int k = 0; k < 6; ++k) out[k * block_threads() + i] = values[k];
}

// Lanes of a warp pass numbers on through shared memory.
KERNEL(64) warp_barrier_kernel(Global<int> out) {
  SHARED_ARRAY(int, ring, 64);
  int v = thread_id();
  for (int round = 0; round < 3; ++round) {
    ring[thread_id()] = v;
    warp_barrier();
    v = ring[warp_id() * 32 + (lane_id() + 1) % 32];
    warp_barrier();
  }
  out[thread_id()] = v;
}

template <int N, Cache CACHE>
DEVICE void copy(Global<const bf16> x, Global<bf16> y, int first) {
  const int i = first + thread_id() * N;
  store_vector<CACHE>(y + i, load_vector<N, CACHE>(x + i));
}

// 480 numbers in vectors of 1, 2, 4 and 8
KERNEL(32) vectors_kernel(Global<const bf16> x, Global<bf16> y) {
  copy<8, Cache::normal>(x, y, 0);
  copy<4, Cache::streaming>(x, y, 256);
  copy<2, Cache::read_only>(x, y, 384);
  copy<1, Cache::normal>(x, y, 448);
}

template <class T>
KERNEL(256) to_float_kernel(Global<const T> x, Global<float> y, int64_t n) {
  for (int64_t i = thread_id(); i < n; i += block_threads()) {
    const T v = x[i];
    y[i] = to_float(v);
  }
}

template <class T>
KERNEL(256) from_float_kernel(Global<const float> x, Global<T> y, int64_t n) {
  for (int64_t i = thread_id(); i < n; i += block_threads()) y[i] = from_float<T>(x[i]);
}

// out [5, n]
KERNEL(32) functions_kernel(Global<const float> x, Global<float> out, int64_t n) {
  for (int64_t i = thread_id(); i < n; i += block_threads()) {
    const float v = x[i];
    out[i] = fast_exp2(v);
    out[n + i] = fast_log2(v);
    out[2 * n + i] = fast_rsqrt(v);
    out[3 * n + i] = fast_reciprocal(v);
    out[4 * n + i] = fast_tanh(v);
  }
}

KERNEL(32) philox_kernel(Global<const int64_t> seed, Global<int64_t> out) {
  const RandomWords random = philox(static_cast<uint64_t>(static_cast<int64_t>(seed[0])), thread_id(), 7, 0xfffffff0u, block_x());
  for (int i = 0; i < 4; ++i) out[(block_x() * 32 + thread_id()) * 4 + i] = random.word[i];
}

// [0] sum, [1] maximum, [2] wrapped, [3] sum by compare and swap, [4] what was exchanged away last is in the set
KERNEL(64) atomics_kernel(Global<unsigned> p) {
  const unsigned me = block_x() * block_threads() + thread_id();
  atomic_add(p, me);
  atomic_max(p + 1, me * 3);
  atomic_wrap(p + 2, 9);
  unsigned old = load_acquire(p + 3);
  for (unsigned found; (found = atomic_cas(p + 3, old, old + me)) != old;) old = found;
  atomic_exchange(p + 4, me + 1);
}

// The sum of a matrix [blocks, 64] by columns, in the last block.
KERNEL(64) last_block_kernel(Global<const float> x, Global<float> partial, Global<unsigned> counter, Global<float> sum) {
  const int i = thread_id();
  partial[block_x() * 64 + i] = x[block_x() * 64 + i] * 2;
  if (!is_last_block(counter, grid_x())) return;
  float total = 0;
  for (int b = 0; b < grid_x(); ++b) total += partial[b * 64 + 63 - i];
  sum[63 - i] = total;
}

// A barrier of the whole grid: the last to come raises the flag the others wait for.
DEVICE void grid_barrier(Global<unsigned> counter, Global<unsigned> flag, unsigned round) {
  block_barrier();
  if (thread_id() == 0) {
    device_fence();
    if (atomic_wrap(counter, grid_x() - 1) == static_cast<unsigned>(grid_x()) - 1) {
      store_release(flag, round);
    } else {
      while (load_acquire(flag) < round) spin_pause();
    }
  }
  block_barrier();
}

// Three times each block's number becomes the sum of its neighbours'.
KERNEL(32) cooperative_kernel(Global<int> x, Global<int> y, Global<unsigned> state) {
  const int left = (block_x() + grid_x() - 1) % grid_x(), right = (block_x() + 1) % grid_x();
  Global<int> from = x, to = y;
  for (unsigned round = 1; round <= 3; ++round) {
    if (thread_id() == 0) to[block_x()] = from[left] + from[right];
    grid_barrier(state, state + 1, round);
    const Global<int> swap = from;
    from = to, to = swap;
  }
}

extern "C" {
int indices(int* out, void* s) { return launch(indices_kernel, Dim{2, 3, 2}, 64, 0, s, out); }
int reverse(const float* x, float* y, int* positive, int64_t blocks, void* s) {
  return launch(reverse_kernel, Dim{static_cast<int>(blocks)}, 128, 16 + 128 * 4, s, x, y, positive);
}
int named(int* out, void* s) { return launch(named_kernel, Dim{}, 96, 0, s, out); }
int shuffles(const int* x, int* out, void* s) { return launch(shuffles_kernel, Dim{}, 32, 0, s, x, out); }
int reductions(const float* x, float* out, int64_t threads, void* s) {
  return launch(reductions_kernel, Dim{}, static_cast<int>(threads), 0, s, x, out);
}
int warp_ring(int* out, void* s) { return launch(warp_barrier_kernel, Dim{}, 64, 0, s, out); }
int vectors(const bf16* x, bf16* y, void* s) { return launch(vectors_kernel, Dim{}, 32, 0, s, x, y); }
int to_float_bf16(const bf16* x, float* y, int64_t n, void* s) { return launch(to_float_kernel<bf16>, Dim{}, 256, 0, s, x, y, n); }
int to_float_fp16(const fp16* x, float* y, int64_t n, void* s) { return launch(to_float_kernel<fp16>, Dim{}, 256, 0, s, x, y, n); }
int from_float_bf16(const float* x, bf16* y, int64_t n, void* s) {
  return launch(from_float_kernel<bf16>, Dim{}, 256, 0, s, x, y, n);
}
int from_float_fp16(const float* x, fp16* y, int64_t n, void* s) {
  return launch(from_float_kernel<fp16>, Dim{}, 256, 0, s, x, y, n);
}
int functions(const float* x, float* out, int64_t n, void* s) { return launch(functions_kernel, Dim{}, 32, 0, s, x, out, n); }
int random_words(const int64_t* seed, int64_t* out, void* s) { return launch(philox_kernel, Dim{2}, 32, 0, s, seed, out); }
int atomics(unsigned* p, void* s) { return launch(atomics_kernel, Dim{3}, 64, 0, s, p); }
int last_block(const float* x, float* partial, unsigned* counter, float* sum, int64_t blocks, void* s) {
  return launch(last_block_kernel, Dim{static_cast<int>(blocks)}, 64, 0, s, x, partial, counter, sum);
}
int cooperative(int* x, int* y, unsigned* state, int64_t blocks, void* s) {
  return launch_cooperative(cooperative_kernel, Dim{static_cast<int>(blocks)}, 32, 0, s, x, y, state);
}
int not_cooperative(int* x, int* y, unsigned* state, int64_t blocks, void* s) {
  return launch(cooperative_kernel, Dim{static_cast<int>(blocks)}, 32, 0, s, x, y, state);
}
int zeroed(float* p, int64_t n, void* s) { return fill_zero(p, n * 4, s); }
}
