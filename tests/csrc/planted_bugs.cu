// Kernels with one mistake each; the line that ends in BUG and a name is the one a report must show. test_planted_bugs.py says
// how each is reported. Most would give right results on most days on a GPU.

#include "device/device.h"

using namespace device;

KERNEL(64) missing_barrier_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  tile[thread_id()] = x[thread_id()];
  y[thread_id()] = tile[63 - thread_id()];  // BUG missing_barrier
}

KERNEL(64) missing_second_barrier_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  for (int i = 0; i < 2; ++i) {
    tile[thread_id()] = x[thread_id()] + i;
    block_barrier();
    y[thread_id()] = tile[63 - thread_id()];  // BUG missing_second_barrier
  }
}

KERNEL(64) shuffle_is_no_barrier_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  tile[thread_id()] = x[thread_id()];
  shuffle(0, 0);
  y[thread_id()] = tile[thread_id() ^ 1];  // BUG shuffle_is_no_barrier
}

KERNEL(32) wrong_mask_kernel(Global<const float> x, Global<float> y) {
  y[lane_id()] = shuffle_xor(x[lane_id()] + 0.0f, 1, 0xffffu);  // BUG wrong_mask
}

KERNEL(32) lane_outside_mask_kernel(Global<const float> x, Global<float> y) {
  const float v = x[lane_id()];
  if (lane_id() < 16) y[lane_id()] = shuffle_down(v, 8, 0xffffu);  // BUG lane_outside_mask
  if (lane_id() >= 16) y[lane_id()] = v;
}

KERNEL(32) divergent_shuffle_kernel(Global<const float> x, Global<float> y) {
  float v = x[lane_id()];
  if (lane_id() < 20) v = warp_sum(v);  // BUG divergent_shuffle
  block_barrier();
  y[lane_id()] = v;
}

KERNEL(32) two_shuffles_kernel(Global<const float> x, Global<float> y) {
  float v = x[lane_id()];
  if (lane_id() < 16) {
    v = shuffle_xor(v, 1);  // BUG two_shuffles
  } else {
    v = shuffle_xor(v, 2);
  }
  y[lane_id()] = v;
}

KERNEL(64) barrier_not_by_all_kernel(Global<const float> x, Global<float> y, int n) {
  if (thread_id() >= n) return;
  y[thread_id()] = block_sum(x[thread_id()] + 0.0f);  // BUG barrier_not_by_all
}

KERNEL(64) barrier_skipped_kernel(Global<const float> x, Global<float> y) {
  if (thread_id() < 32) block_barrier();  // BUG barrier_skipped
  y[thread_id()] = x[thread_id()];
}

KERNEL(64) barrier_in_branches_kernel(Global<const float> x, Global<float> y) {
  if (thread_id() < 48) {
    block_barrier();  // BUG barrier_in_branches
  } else {
    block_barrier();
  }
  y[thread_id()] = x[thread_id()];
}

KERNEL(128) half_a_warp_kernel(Global<const float> x, Global<float> y) {
  if (thread_id() % 32 < 16) named_barrier(1, 64);  // BUG half_a_warp
  y[thread_id()] = x[thread_id()];
}

KERNEL(64) barrier_count_kernel(Global<const float> x, Global<float> y) {
  named_barrier(1, warp_id() == 0 ? 64 : 32);  // BUG barrier_count
  y[thread_id()] = x[thread_id()];
}

KERNEL(64) unwritten_shared_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  if (thread_id() < 63) tile[thread_id()] = x[thread_id()];
  block_barrier();
  y[thread_id()] = tile[63 - thread_id()];  // BUG unwritten_shared
}

KERNEL(64) read_past_the_end_kernel(Global<const float> x, Global<float> y) {
  y[thread_id()] = x[thread_id() + 1];  // BUG read_past_the_end
}

KERNEL(64) write_past_the_end_kernel(Global<const float> x, Global<float> y) {
  y[thread_id() + 1] = x[thread_id()];  // BUG write_past_the_end
}

KERNEL(64) before_the_start_kernel(Global<const float> x, Global<float> y) {
  y[thread_id()] = x[thread_id() - 1];  // BUG before_the_start
}

KERNEL(64) shared_past_the_end_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 63);
  tile[thread_id()] = x[thread_id()];  // BUG shared_past_the_end
  y[thread_id()] = tile[thread_id()];
}

KERNEL(64) misaligned_kernel(Global<const float> x, Global<float> y) {
  if (thread_id() < 4) store_vector(y + thread_id() * 4, load_vector<4>(x + 1 + thread_id() * 4));  // BUG misaligned
}

KERNEL(64) dynamic_size_kernel(Global<const float> x, Global<float> y) {
  const Shared<float> tile = dynamic_shared<float>();
  tile[thread_id()] = x[thread_id()];  // BUG dynamic_size
  y[thread_id()] = tile[thread_id()];
}

KERNEL(64) static_size_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 12 * 1024 + 1);  // BUG static_size
  tile[thread_id()] = x[thread_id()];
  y[thread_id()] = tile[thread_id()];
}

// 1024 bytes and 4 more, which CUDA rounds up, since dynamic shared memory begins at a multiple of 1024.
KERNEL(64) both_sizes_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 257);  // BUG both_sizes
  tile[thread_id()] = x[thread_id()];
  y[thread_id()] = tile[thread_id()];
}

KERNEL(64) one_address_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, top, 1);
  if (x[thread_id()] > 0) top[0] = x[thread_id()];  // BUG one_address
  block_barrier();
  y[thread_id()] = top[0];
}

KERNEL(64) one_place_of_two_blocks_kernel(Global<const float> x, Global<float> y) {
  y[thread_id()] = x[thread_id()] + block_x();  // BUG one_place_of_two_blocks
}

KERNEL(64) input_written_kernel(Global<float> x, Global<float> y) {
  y[thread_id()] = x[thread_id()];
  x[thread_id()] = 0;  // BUG input_written
}

KERNEL(64) null_pointer_kernel(Global<const float> x, Global<float> y) {
  const Global<const float> weight = nullptr;
  y[thread_id()] = x[thread_id()] * weight[thread_id()];  // BUG null_pointer
}

// The sum over blocks, by hand. y: a partial sum for each block, then the sum.
template <bool FENCE>
DEVICE void ticket_sum(Global<const float> x, Global<float> y, Global<unsigned> counter, unsigned count) {
  SHARED_ARRAY(int, last, 1);
  if (thread_id() == 0) {
    y[block_x()] = x[block_x()];
    if constexpr (FENCE) device_fence();
    last[0] = atomic_add(counter, 1) == count - 1;
  }
  block_barrier();
  if (last[0] == 0) return;
  float total = 0;
  for (int i = 0; i < grid_x(); ++i) total += y[i];  // BUG ticket
  if (thread_id() == 0) y[grid_x()] = total;
}

KERNEL(64) ticket_without_fence_kernel(Global<const float> x, Global<float> y, Global<unsigned> counter) {
  ticket_sum<false>(x, y, counter, grid_x());
}

KERNEL(64) ticket_count_kernel(Global<const float> x, Global<float> y, Global<unsigned> counter, int off) {
  ticket_sum<true>(x, y, counter, grid_x() + off);
}

// Right in every order one by one, but the place of a number depends on the order.
KERNEL(64) order_kernel(Global<const float> x, Global<float> y, Global<unsigned> counter) {
  const unsigned place = atomic_add(counter, 1u);
  y[place] = x[block_x() * 64 + thread_id()];
}

extern "C" {
#define BUG(name, threads, shared)                                                                \
  int name(const float* x, float* y, void* s) {                                                   \
    return launch(name##_kernel, Dim{}, threads, shared, s, const_cast<float*>(x), y);            \
  }
BUG(missing_barrier, 64, 0)
BUG(missing_second_barrier, 64, 0)
BUG(shuffle_is_no_barrier, 64, 0)
BUG(wrong_mask, 32, 0)
BUG(lane_outside_mask, 32, 0)
BUG(divergent_shuffle, 32, 0)
BUG(two_shuffles, 32, 0)
BUG(barrier_skipped, 64, 0)
BUG(barrier_in_branches, 64, 0)
BUG(half_a_warp, 128, 0)
BUG(barrier_count, 64, 0)
BUG(unwritten_shared, 64, 0)
BUG(read_past_the_end, 64, 0)
BUG(write_past_the_end, 64, 0)
BUG(before_the_start, 64, 0)
BUG(shared_past_the_end, 64, 0)
BUG(misaligned, 64, 0)
BUG(dynamic_size, 64, 63 * 4)
BUG(static_size, 64, 0)
BUG(both_sizes, 64, 226 * 1024)
BUG(one_address, 64, 0)
BUG(input_written, 64, 0)
BUG(null_pointer, 64, 0)
int launch_sizes(const float* x, float* y, int64_t threads, int64_t shared, void* s) {
  return launch(misaligned_kernel, Dim{}, static_cast<int>(threads), static_cast<int>(shared), s, x, y);
}
int barrier_not_by_all(const float* x, float* y, void* s) { return launch(barrier_not_by_all_kernel, Dim{}, 64, 0, s, x, y, 40); }
int one_place_of_two_blocks(const float* x, float* y, void* s) {
  return launch(one_place_of_two_blocks_kernel, Dim{2}, 64, 0, s, x, y);
}
int ticket_without_fence(const float* x, float* y, unsigned* counter, void* s) {
  return launch(ticket_without_fence_kernel, Dim{4}, 64, 0, s, x, y, counter);
}
int ticket_count(const float* x, float* y, unsigned* counter, int64_t off, void* s) {
  return launch(ticket_count_kernel, Dim{4}, 64, 0, s, x, y, counter, static_cast<int>(off));
}
int order_dependent(const float* x, float* y, unsigned* counter, void* s) {
  return launch(order_kernel, Dim{2}, 64, 0, s, x, y, counter);
}
}
