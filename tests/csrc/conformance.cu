// Instructions of the device layer on data from outside, for conformance.py: a GPU and the host body run the same kernels. What
// they write depends on no order of threads, or is sorted before it is compared. The oracles: test_conformance.py.

#include "device/device.h"

using namespace device;

// One block a round: lanes in mask[round] shuffle among themselves and the others among themselves. argument: [rounds, 32], the
// lane, distance or bits. out [4, rounds, 32]: shuffle, shuffle_up, shuffle_down, shuffle_xor; those whose `kinds` bit is 0 give v.
template <class T>
DEVICE void shuffles(T v, int argument, int width, int kinds, uint32_t mask, T (&out)[4]) {
  for (int i = 0; i < 4; ++i) out[i] = v;
  if (kinds & 1) out[0] = shuffle(v, argument, mask, width);
  if (kinds & 2) out[1] = shuffle_up(v, argument, mask, width);
  if (kinds & 4) out[2] = shuffle_down(v, argument, mask, width);
  if (kinds & 8) out[3] = shuffle_xor(v, argument, mask, width);
}

template <class T>
KERNEL(32)
shuffles_kernel(Global<const T> x, Global<const int> argument, Global<const int> widths, Global<const int> kinds,
                Global<const int> masks, Global<T> out) {
  const int round = block_x(), lane = lane_id(), at = round * 32 + lane;
  const int amount = argument[at], width = widths[round], kind = kinds[round];
  const int word = masks[round];
  const uint32_t mask = static_cast<uint32_t>(word);
  const T v = x[at];
  T found[4];
  if (mask >> lane & 1) {
    shuffles(v, amount, width, kind, mask, found);
  } else {
    shuffles(v, amount, width, kind, ~mask, found);
  }
  for (int i = 0; i < 4; ++i) out[(static_cast<int64_t>(i) * grid_x() + round) * 32 + lane] = found[i];
}

// The lanes of the mask that this one is in: the given ones or the others.
DEVICE uint32_t own_mask(int word) {
  const uint32_t mask = static_cast<uint32_t>(word);
  return mask >> lane_id() & 1 ? mask : ~mask;
}

// out [rounds, 32, 3]: ballot, any, all, of the lanes in the mask and of the others.
KERNEL(32) votes_kernel(Global<const int> predicate, Global<const int> masks, Global<int> out) {
  const int at = block_x() * 32 + lane_id(), word = masks[block_x()], asked = predicate[at];
  const uint32_t mask = own_mask(word);
  out[at * 3] = static_cast<int>(warp_ballot(asked != 0, mask));
  out[at * 3 + 1] = warp_any(asked != 0, mask);
  out[at * 3 + 2] = warp_all(asked != 0, mask);
}

// Lanes of the mask, and the others, pass numbers on to the next lane of their set (next[lane]) through shared memory, three times.
KERNEL(32) warp_barrier_kernel(Global<const int> x, Global<const int> next, Global<const int> masks, Global<int> out) {
  SHARED_ARRAY(int, ring, 32);
  const int at = block_x() * 32 + lane_id(), to = next[at], word = masks[block_x()];
  const uint32_t mask = own_mask(word);
  int v = x[at];
  for (int round = 0; round < 3; ++round) {
    ring[to] = v;
    warp_barrier(mask);
    v = ring[lane_id()] * 3 + round;
    warp_barrier(mask);
  }
  out[at] = v;
}

// out [9, threads]
KERNEL(1024) reductions_kernel(Global<const float> x, Global<float> out) {
  const int i = thread_id();
  const float v = x[i];
  const float found[9] = {warp_sum<1>(v), warp_sum<2>(v), warp_sum<8>(v), warp_sum(v), warp_max<4>(v), warp_max<16>(v),
                          warp_max(v),    block_sum(v),   block_max(v)};
  for (int k = 0; k < 9; ++k) out[k * block_threads() + i] = found[k];
}

// Every way to move N elements of T: through registers with each hint, and through shared memory. One block; n = 4 * 64 * N.
template <class T, int N>
KERNEL(64)
vectors_kernel(Global<const T> x, Global<T> y) {
  const Shared<T> tile = dynamic_shared<T>(16);
  const int i = thread_id() * N, step = 64 * N;
  store_vector(y + i, load_vector<N>(x + i));
  store_vector<Cache::streaming>(y + step + i, load_vector<N, Cache::streaming>(x + step + i));
  store_vector(y + 2 * step + i, load_vector<N, Cache::read_only>(x + 2 * step + i));
  store_vector(tile + i, load_vector<N>(x + 3 * step + i));
  block_barrier();
  const int other = (63 - thread_id()) * N;
  store_vector(y + 3 * step + other, load_vector<N>(tile + other));
}

// A ring of two slots in shared memory: warp 0 fills, warps 1 and 2 read. x, y [rounds, 32] and [rounds, 2, 32]. Barriers 1 and 2 say
// that a slot is full, 3 and 4 that it is free.
KERNEL(96) named_barriers_kernel(Global<const int> x, Global<int> y, int rounds) {
  SHARED_ARRAY(int, slot, 64);
  for (int round = 0; round < rounds; ++round) {
    const int at = round % 2;
    if (warp_id() == 0) {
      if (round >= 2) named_barrier(3 + at, 96);
      slot[at * 32 + lane_id()] = x[round * 32 + lane_id()];
      named_barrier_arrive(1 + at, 96);
    } else {
      named_barrier(1 + at, 96);
      const int v = slot[at * 32 + (lane_id() + warp_id()) % 32];
      y[(round * 2 + warp_id() - 1) * 32 + lane_id()] = v;
      if (round + 2 < rounds) named_barrier_arrive(3 + at, 96);
    }
  }
}

// Bits of minimum, maximum [2, n]
KERNEL(256) extremes_kernel(Global<const float> a, Global<const float> b, Global<float> out, int64_t n) {
  for (int64_t i = static_cast<int64_t>(block_x()) * 256 + thread_id(); i < n; i += static_cast<int64_t>(grid_x()) * 256) {
    const float x = a[i], y = b[i];
    out[i] = minimum(x, y);
    out[n + i] = maximum(x, y);
  }
}

template <class T>
KERNEL(256)
to_float_kernel(Global<const T> x, Global<float> y, int64_t n) {
  for (int64_t i = static_cast<int64_t>(block_x()) * 256 + thread_id(); i < n; i += static_cast<int64_t>(grid_x()) * 256) {
    const T v = x[i];
    y[i] = to_float(v);
  }
}

template <class T>
KERNEL(256)
from_float_kernel(Global<const float> x, Global<T> y, int64_t n) {
  for (int64_t i = static_cast<int64_t>(block_x()) * 256 + thread_id(); i < n; i += static_cast<int64_t>(grid_x()) * 256) {
    y[i] = from_float<T>(x[i]);
  }
}

enum Function { kExp2, kLog2, kRsqrt, kReciprocal, kTanh };

template <Function F>
KERNEL(256)
function_kernel(Global<const float> x, Global<float> y, int64_t n) {
  for (int64_t i = static_cast<int64_t>(block_x()) * 256 + thread_id(); i < n; i += static_cast<int64_t>(grid_x()) * 256) {
    const float v = x[i];
    if constexpr (F == kExp2) y[i] = fast_exp2(v);
    if constexpr (F == kLog2) y[i] = fast_log2(v);
    if constexpr (F == kRsqrt) y[i] = fast_rsqrt(v);
    if constexpr (F == kReciprocal) y[i] = fast_reciprocal(v);
    if constexpr (F == kTanh) y[i] = fast_tanh(v);
  }
}

// counters [n, 4] and seeds [n]: words [n, 4], all as int64.
KERNEL(64) philox_kernel(Global<const int64_t> seed, Global<const int64_t> counter, Global<int64_t> out, int64_t n) {
  const int64_t i = static_cast<int64_t>(block_x()) * 64 + thread_id();
  if (i >= n) return;
  uint32_t c[4];
  for (int k = 0; k < 4; ++k) {
    const int64_t word = counter[i * 4 + k];
    c[k] = static_cast<uint32_t>(word);
  }
  const int64_t key = seed[i];
  const RandomWords random = philox(static_cast<uint64_t>(key), c[0], c[1], c[2], c[3]);
  for (int k = 0; k < 4; ++k) out[i * 4 + k] = random.word[k];
}

// Atomics on cells of global and of shared memory, all threads of all blocks on the same. p: 5 zeros. old [2, n]: what
// an exchange gave (one of its values is left in p[3]) and an addition of 3: sorted, the same in every order.
template <class T>
KERNEL(128)
atomics_kernel(Global<const T> x, Global<T> p, Global<T> old, Global<T> shared_sums) {
  const Shared<T> cell = dynamic_shared<T>();
  const int64_t n = static_cast<int64_t>(grid_x()) * block_threads();
  const int64_t me = static_cast<int64_t>(block_x()) * block_threads() + thread_id();
  if (thread_id() < 3) cell[thread_id()] = T(0);
  block_barrier();
  const T v = x[me];
  atomic_add(p, v);
  atomic_max(p + 1, v);
  for (T seen = T(0), found; (found = atomic_cas(p + 2, seen, static_cast<T>(seen + v))) != seen;) seen = found;
  old[me] = atomic_exchange(p + 3, v);
  old[n + me] = atomic_add(p + 4, T(3));
  atomic_add(cell, v);
  atomic_max(cell + 1, v);
  for (T seen = T(0), found; (found = atomic_cas(cell + 2, seen, static_cast<T>(seen + v))) != seen;) seen = found;
  block_barrier();
  if (thread_id() < 3) shared_sums[block_x() * 3 + thread_id()] = cell[thread_id()];
}

// Where unsigned cells wrap: old [n].
KERNEL(128) wrap_kernel(Global<unsigned> p, Global<unsigned> old, unsigned last) {
  old[block_x() * block_threads() + thread_id()] = atomic_wrap(p, last);
}

// The sum of x [blocks, 256] by columns, made by whichever block is last, of what all wrote. counter: zero, and zero again.
KERNEL(256) ticket_kernel(Global<const float> x, Global<float> partial, Global<unsigned> counter, Global<float> sum) {
  const int i = thread_id();
  partial[block_x() * 256 + i] = x[block_x() * 256 + i];
  if (!is_last_block(counter, grid_x())) return;
  float total = 0;
  for (int b = 0; b < grid_x(); ++b) total += partial[b * 256 + 255 - i];
  sum[255 - i] = total;
}

// Each block makes its row from those of its neighbours, `rounds` times, with a barrier of the grid between: a, b [blocks, 128] are
// read through the cache of a block that read the old values before. state: a counter and a flag, zeros.
KERNEL(128) grid_barrier_kernel(Global<int> a, Global<int> b, Global<unsigned> state, int rounds) {
  const int blocks = grid_x(), i = thread_id();
  const int left = (block_x() + blocks - 1) % blocks, right = (block_x() + 1) % blocks;
  Global<int> from = a, to = b;
  for (int round = 1; round <= rounds; ++round) {
    to[block_x() * 128 + i] = 3 * static_cast<int>(from[left * 128 + 127 - i]) - static_cast<int>(from[right * 128 + i]) + round;
    block_barrier();
    if (i == 0) {
      device_fence();
      if (atomic_wrap(state, blocks - 1) == static_cast<unsigned>(blocks) - 1) {
        store_release(state + 1, round);
      } else {
        while (load_acquire(state + 1) < static_cast<unsigned>(round)) spin_pause();
      }
      device_fence();
    }
    block_barrier();
    const Global<int> swap = from;
    from = to, to = swap;
  }
}

// Even blocks hand rows on to the odd ones behind them, by a flag each way; box [pairs, 64], flags [pairs, 2], zeros.
KERNEL(64) flags_kernel(Global<const int> x, Global<int> y, Global<int> box, Global<unsigned> flags, int rounds) {
  const int pair = block_x() / 2, i = thread_id();
  const bool sends = block_x() % 2 == 0;
  const Global<unsigned> full = flags + pair * 2, empty = full + 1;
  for (int round = 0; round < rounds; ++round) {
    const int64_t at = (static_cast<int64_t>(pair) * rounds + round) * 64 + i;
    if (i == 0) {
      const unsigned want = sends ? round : round + 1;
      while (load_acquire(sends ? empty : full) < want) spin_pause();
    }
    block_barrier();
    if (sends) {
      box[pair * 64 + i] = x[at];
    } else {
      y[at] = box[pair * 64 + 63 - i];
    }
    block_barrier();
    if (i == 0) store_release(sends ? full : empty, round + 1);
  }
}

// y = x where addresses come as numbers, as in a table of pointers, and types change on the way.
KERNEL(64) pointers_kernel(uint64_t x, Global<int> y) {
  const Global<const float> from = pointer_cast<const float>(pointer_at<const int>(x));
  const float v = from[thread_id()];
  y[thread_id()] = static_cast<int>(float_bits(bits_float(float_bits(v)))) + ceil_div(thread_id(), 5);
}

namespace {

template <class T>
int start_shuffles(const T* x, const int* argument, const int* widths, const int* kinds, const int* masks, T* out,
                   int64_t rounds, void* s) {
  return launch(shuffles_kernel<T>, Dim{static_cast<int>(rounds)}, 32, 0, s, x, argument, widths, kinds, masks, out);
}

template <class T, int N>
int start_vectors(const T* x, T* y, void* s) {
  return launch(vectors_kernel<T, N>, Dim{}, 64, 16 + 64 * N * static_cast<int>(sizeof(T)), s, x, y);
}

template <class T>
int start_atomics(const T* x, T* p, T* old, T* shared_sums, int64_t blocks, void* s) {
  return launch(atomics_kernel<T>, Dim{static_cast<int>(blocks)}, 128, 3 * static_cast<int>(sizeof(T)), s, x, p, old, shared_sums);
}

template <Function F>
int start_function(const float* x, float* y, int64_t n, void* s) {
  return launch(function_kernel<F>, Dim{4}, 256, 0, s, x, y, n);
}

}  // namespace

extern "C" {
int shuffles_i32(const int* x, const int* a, const int* w, const int* k, const int* m, int* out, int64_t rounds, void* s) {
  return start_shuffles(x, a, w, k, m, out, rounds, s);
}
int shuffles_f32(const float* x, const int* a, const int* w, const int* k, const int* m, float* out, int64_t rounds, void* s) {
  return start_shuffles(x, a, w, k, m, out, rounds, s);
}
int shuffles_i64(const long long* x, const int* a, const int* w, const int* k, const int* m, long long* out, int64_t rounds,
                 void* s) {
  return start_shuffles(x, a, w, k, m, out, rounds, s);
}
int votes(const int* predicate, const int* masks, int* out, int64_t rounds, void* s) {
  return launch(votes_kernel, Dim{static_cast<int>(rounds)}, 32, 0, s, predicate, masks, out);
}
int warp_barriers(const int* x, const int* next, const int* masks, int* out, int64_t rounds, void* s) {
  return launch(warp_barrier_kernel, Dim{static_cast<int>(rounds)}, 32, 0, s, x, next, masks, out);
}
int reductions(const float* x, float* out, int64_t threads, void* s) {
  return launch(reductions_kernel, Dim{}, static_cast<int>(threads), 0, s, x, out);
}
int vectors_u8x1(const uint8_t* x, uint8_t* y, void* s) { return start_vectors<uint8_t, 1>(x, y, s); }
int vectors_u8x16(const uint8_t* x, uint8_t* y, void* s) { return start_vectors<uint8_t, 16>(x, y, s); }
int vectors_bf16x2(const bf16* x, bf16* y, void* s) { return start_vectors<bf16, 2>(x, y, s); }
int vectors_fp16x8(const fp16* x, fp16* y, void* s) { return start_vectors<fp16, 8>(x, y, s); }
int vectors_bf16x1(const bf16* x, bf16* y, void* s) { return start_vectors<bf16, 1>(x, y, s); }
int vectors_f32x2(const float* x, float* y, void* s) { return start_vectors<float, 2>(x, y, s); }
int vectors_f32x4(const float* x, float* y, void* s) { return start_vectors<float, 4>(x, y, s); }
int named_barriers(const int* x, int* y, int64_t rounds, void* s) {
  return launch(named_barriers_kernel, Dim{}, 96, 0, s, x, y, static_cast<int>(rounds));
}
int extremes(const float* a, const float* b, float* out, int64_t n, void* s) {
  return launch(extremes_kernel, Dim{4}, 256, 0, s, a, b, out, n);
}
int to_float_bf16(const bf16* x, float* y, int64_t n, void* s) { return launch(to_float_kernel<bf16>, Dim{4}, 256, 0, s, x, y, n); }
int to_float_fp16(const fp16* x, float* y, int64_t n, void* s) { return launch(to_float_kernel<fp16>, Dim{4}, 256, 0, s, x, y, n); }
int from_float_bf16(const float* x, bf16* y, int64_t n, void* s) {
  return launch(from_float_kernel<bf16>, Dim{4}, 256, 0, s, x, y, n);
}
int from_float_fp16(const float* x, fp16* y, int64_t n, void* s) {
  return launch(from_float_kernel<fp16>, Dim{4}, 256, 0, s, x, y, n);
}
int exp2_of(const float* x, float* y, int64_t n, void* s) { return start_function<kExp2>(x, y, n, s); }
int log2_of(const float* x, float* y, int64_t n, void* s) { return start_function<kLog2>(x, y, n, s); }
int rsqrt_of(const float* x, float* y, int64_t n, void* s) { return start_function<kRsqrt>(x, y, n, s); }
int reciprocal_of(const float* x, float* y, int64_t n, void* s) { return start_function<kReciprocal>(x, y, n, s); }
int tanh_of(const float* x, float* y, int64_t n, void* s) { return start_function<kTanh>(x, y, n, s); }
int random_words(const int64_t* seed, const int64_t* counter, int64_t* out, int64_t n, void* s) {
  return launch(philox_kernel, Dim{static_cast<int>(ceil_div<int64_t>(n, 64))}, 64, 0, s, seed, counter, out, n);
}
int atomics_i32(const int* x, int* p, int* old, int* sums, int64_t blocks, void* s) {
  return start_atomics(x, p, old, sums, blocks, s);
}
int atomics_u32(const unsigned* x, unsigned* p, unsigned* old, unsigned* sums, int64_t blocks, void* s) {
  return start_atomics(x, p, old, sums, blocks, s);
}
int atomics_u64(const unsigned long long* x, unsigned long long* p, unsigned long long* old, unsigned long long* sums,
                int64_t blocks, void* s) {
  return start_atomics(x, p, old, sums, blocks, s);
}
int wraps(unsigned* p, unsigned* old, int64_t blocks, int64_t last, void* s) {
  return launch(wrap_kernel, Dim{static_cast<int>(blocks)}, 128, 0, s, p, old, static_cast<unsigned>(last));
}
int tickets(const float* x, float* partial, unsigned* counter, float* sum, int64_t blocks, void* s) {
  return launch(ticket_kernel, Dim{static_cast<int>(blocks)}, 256, 0, s, x, partial, counter, sum);
}
int grid_barriers(int* a, int* b, unsigned* state, int64_t blocks, int64_t rounds, void* s) {
  return launch_cooperative(grid_barrier_kernel, Dim{static_cast<int>(blocks)}, 128, 0, s, a, b, state, static_cast<int>(rounds));
}
int flags(const int* x, int* y, int* box, unsigned* flags, int64_t pairs, int64_t rounds, void* s) {
  return launch_cooperative(flags_kernel, Dim{2 * static_cast<int>(pairs)}, 64, 0, s, x, y, box, flags, static_cast<int>(rounds));
}
int pointers(const float* x, int* y, void* s) {
  return launch(pointers_kernel, Dim{}, 64, 0, s, reinterpret_cast<uint64_t>(x), y);
}
int cleared(float* p, int64_t n, void* s) { return fill_zero(p, n * 4, s); }
}
