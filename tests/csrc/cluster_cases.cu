// One kernel for each feature of csrc/device/cluster.h, and below them kernels with one mistake each; test_cluster.py says what
// the former must give and how the latter are reported, at the line that ends in BUG and the name.

#include "device/cluster.h"

using namespace device;

// out [grid, threads, 3]
KERNEL(64) ranks_kernel(Global<int> out) {
  const Global<int> mine = out + ((block_y() * grid_x() + block_x()) * block_threads() + thread_id()) * 3;
  mine[0] = cluster_rank();
  mine[1] = cluster_blocks();
  mine[2] = block_x();
}

// Three times each block takes its right neighbour's numbers, of static and dynamic shared memory by turns.
KERNEL(64) ring_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  const Shared<float> other = dynamic_shared<float>(16);
  const int next = (cluster_rank() + 1) % cluster_blocks(), i = thread_id(), at = block_x() * 64 + i;
  float v = x[at];
  for (int round = 0; round < 3; ++round) {
    const Shared<float> mine = round % 2 ? other : tile;
    mine[i] = v;
    cluster_barrier();  // the array of the next round is another: one barrier does
    v = cluster_pointer(mine, next)[63 - i];
  }
  const Vector<float, 4> four = load_vector<4>(cluster_pointer(tile + 4, next));
  y[at] = v + (four[3] - four[3]);
  cluster_barrier();
}

// Its two halves: what lies between them is the block's own work.
KERNEL(64) halves_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  const int i = thread_id(), at = block_x() * 64 + i;
  tile[i] = x[at];
  cluster_arrive();
  const float own = block_sum(x[at] + 0.0f);
  cluster_wait();
  const float v = cluster_pointer(tile, cluster_blocks() - 1 - cluster_rank())[i];
  cluster_arrive();
  y[at] = own + v;
  cluster_wait();
}

// out [grid, 4, threads]
KERNEL(256) sums_kernel(Global<const float> x, Global<float> out) {
  cluster_arrive_relaxed();
  const int i = thread_id(), threads = block_threads();
  const float v = x[block_x() * threads + i];
  const float sum = cluster_sum(v, true);
  cluster_arrive();
  const float top = cluster_max(v, true);
  const float values[4] = {sum, top, cluster_sum(v * v), static_cast<float>(cluster_sum(i))};
  for (int k = 0; k < 4; ++k) out[(block_x() * 4 + k) * threads + i] = values[k];
}

// The cluster counts in its first block's shared memory, and hands the counts out.
KERNEL(64) counts_kernel(Global<const int> x, Global<int> out) {
  SHARED_ARRAY(unsigned, counts, 8);
  if (thread_id() < 8) counts[thread_id()] = 0;
  cluster_barrier();
  const Shared<unsigned> first = cluster_pointer(counts, 0);
  const int v = x[block_x() * 64 + thread_id()];
  atomic_add(first + v, 1u);
  cluster_barrier();
  if (thread_id() < 8) {
    const unsigned mine = first[thread_id()];
    out[block_x() * 8 + thread_id()] = static_cast<int>(mine);
  }
  cluster_barrier();
}

// Blocks write global memory, one of each cluster draws a ticket for all of them, the last cluster's adds up.
template <bool FENCE, bool BARRIER>
DEVICE void ticket_of_cluster(Global<const float> x, Global<float> partial, Global<unsigned> counter, Global<float> sum) {
  if (thread_id() == 3) partial[block_x()] = 2 * x[block_x()];
  if constexpr (BARRIER) cluster_barrier();
  if (cluster_rank() != cluster_blocks() - 1) return;
  SHARED_ARRAY(int, last, 1);
  if (thread_id() == 0) {
    if constexpr (FENCE) device_fence();
    last[0] = atomic_add(counter, 1) == static_cast<unsigned>(grid_x() / cluster_blocks() - 1);
  }
  block_barrier();
  if (last[0] == 0) return;
  float total = 0;
  for (int b = 0; b < grid_x(); ++b) total += partial[b];  // BUG ticket
  if (thread_id() == 0) sum[0] = total;
}
KERNEL(32) ticket_kernel(Global<const float> x, Global<float> partial, Global<unsigned> counter, Global<float> sum) {
  ticket_of_cluster<true, true>(x, partial, counter, sum);
}
KERNEL(32)
ticket_without_fence_kernel(Global<const float> x, Global<float> partial, Global<unsigned> counter, Global<float> sum) {
  ticket_of_cluster<false, true>(x, partial, counter, sum);
}
KERNEL(32)
ticket_without_barrier_kernel(Global<const float> x, Global<float> partial, Global<unsigned> counter, Global<float> sum) {
  ticket_of_cluster<true, false>(x, partial, counter, sum);
}

// --- mistakes: x and y [4, 64], clusters of 4 blocks of 64 threads ---

DEVICE int place() { return block_x() * 64 + thread_id(); }
DEVICE int next_rank() { return (cluster_rank() + 1) % cluster_blocks(); }

KERNEL(64) missing_barrier_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  cluster_barrier();
  tile[thread_id()] = x[place()];
  block_barrier();
  y[place()] = cluster_pointer(tile, next_rank())[thread_id()];  // BUG missing_barrier
  cluster_barrier();
}

KERNEL(64) missing_second_barrier_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  for (int round = 0; round < 2; ++round) {
    tile[thread_id()] = x[place()] + round;
    cluster_barrier();
    y[place()] = cluster_pointer(tile, next_rank())[thread_id()];  // BUG missing_second_barrier
  }
  cluster_barrier();
}

KERNEL(64) returns_too_early_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  tile[thread_id()] = x[place()];
  cluster_barrier();
  y[place()] = cluster_pointer(tile, next_rank())[thread_id()];  // BUG returns_too_early
}

KERNEL(64) wrong_rank_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  tile[thread_id()] = x[place()];
  cluster_barrier();
  y[place()] = cluster_pointer(tile, cluster_rank() + 1)[thread_id()];  // BUG wrong_rank
  cluster_barrier();
}

KERNEL(64) not_begun_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  cluster_pointer(tile, next_rank())[thread_id()] = x[place()];  // BUG not_begun
  cluster_barrier();
  y[place()] = tile[thread_id()];
}

KERNEL(64) missing_wait_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  cluster_barrier();
  tile[thread_id()] = x[place()];
  cluster_arrive();
  y[place()] = cluster_pointer(tile, next_rank())[thread_id()];  // BUG missing_wait
  cluster_wait();
}

KERNEL(64) after_the_arrival_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  cluster_arrive();
  tile[thread_id()] = x[place()];
  cluster_wait();
  y[place()] = cluster_pointer(tile, next_rank())[thread_id()];  // BUG after_the_arrival
  cluster_barrier();
}

KERNEL(64) relaxed_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  cluster_barrier();
  tile[thread_id()] = x[place()];
  cluster_arrive_relaxed();
  cluster_wait();
  y[place()] = cluster_pointer(tile, next_rank())[thread_id()];  // BUG relaxed
  cluster_barrier();
}

KERNEL(64) past_the_end_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  tile[thread_id()] = x[place()];
  cluster_barrier();
  y[place()] = cluster_pointer(tile, next_rank())[thread_id() + 1];  // BUG past_the_end
  cluster_barrier();
}

KERNEL(64) of_another_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, tile, 64);
  tile[thread_id()] = x[place()];
  cluster_barrier();
  y[place()] = cluster_pointer(cluster_pointer(tile, next_rank()), next_rank())[thread_id()];  // BUG of_another
  cluster_barrier();
}

KERNEL(64) one_place_kernel(Global<const float> x, Global<float> y) {
  SHARED_ARRAY(float, top, 1);
  cluster_barrier();
  if (thread_id() == 0) cluster_pointer(top, 0)[0] = x[place()];  // BUG one_place
  cluster_barrier();
  y[place()] = cluster_pointer(top, 0)[0];
  cluster_barrier();
}

KERNEL(64) one_block_skips_kernel(Global<const float> x, Global<float> y) {
  y[place()] = x[place()];
  if (cluster_rank() != 2) cluster_barrier();  // BUG one_block_skips
}

KERNEL(64) one_warp_skips_kernel(Global<const float> x, Global<float> y) {
  y[place()] = x[place()];
  if (warp_id() == 0) cluster_barrier();  // BUG one_warp_skips
}

KERNEL(64) branches_kernel(Global<const float> x, Global<float> y) {
  y[place()] = x[place()];
  if (lane_id() < 16) {
    cluster_barrier();
  } else {
    cluster_barrier();  // BUG branches
  }
}

KERNEL(64) arrives_twice_kernel(Global<const float> x, Global<float> y) {
  y[place()] = x[place()];
  cluster_arrive();
  cluster_barrier();  // BUG arrives_twice
}

KERNEL(64) never_arrived_kernel(Global<const float> x, Global<float> y) {
  y[place()] = x[place()];
  cluster_wait();  // BUG never_arrived
}

KERNEL(64) through_global_kernel(Global<const float> x, Global<float> y) {
  y[place()] = x[place()];
  block_barrier();
  if (thread_id() == 0) y[block_x() * 64] = y[(block_x() ^ 1) * 64 + 1] + 0.0f;  // BUG through_global
  cluster_barrier();
}

extern "C" {
int ranks(int* out, int64_t cluster, void* s) {
  return launch_cluster(ranks_kernel, Dim{8, 3}, static_cast<int>(cluster), 64, 0, s, out);
}
int ring(const float* x, float* y, int64_t blocks, int64_t cluster, void* s) {
  return launch_cluster(ring_kernel, Dim{static_cast<int>(blocks)}, static_cast<int>(cluster), 64, 16 + 64 * 4, s, x, y);
}
int halves(const float* x, float* y, int64_t blocks, int64_t cluster, void* s) {
  return launch_cluster(halves_kernel, Dim{static_cast<int>(blocks)}, static_cast<int>(cluster), 64, 0, s, x, y);
}
int sums(const float* x, float* out, int64_t blocks, int64_t cluster, int64_t threads, void* s) {
  return launch_cluster(sums_kernel, Dim{static_cast<int>(blocks)}, static_cast<int>(cluster), static_cast<int>(threads), 0, s, x,
                        out);
}
int counts(const int* x, int* out, int64_t blocks, int64_t cluster, void* s) {
  return launch_cluster(counts_kernel, Dim{static_cast<int>(blocks)}, static_cast<int>(cluster), 64, 0, s, x, out);
}
#define TICKET(name)                                                                              \
  int name(const float* x, float* partial, unsigned* counter, float* sum, void* s) {              \
    return launch_cluster(name##_kernel, Dim{6}, 2, 32, 0, s, x, partial, counter, sum);          \
  }
TICKET(ticket)
TICKET(ticket_without_fence)
TICKET(ticket_without_barrier)
#define BUG(name) \
  int name(const float* x, float* y, void* s) { return launch_cluster(name##_kernel, Dim{4}, 4, 64, 0, s, x, y); }
BUG(missing_barrier)
BUG(missing_second_barrier)
BUG(returns_too_early)
BUG(wrong_rank)
BUG(not_begun)
BUG(missing_wait)
BUG(after_the_arrival)
BUG(past_the_end)
BUG(relaxed)
BUG(of_another)
BUG(one_place)
BUG(one_block_skips)
BUG(one_warp_skips)
BUG(branches)
BUG(arrives_twice)
BUG(never_arrived)
BUG(through_global)
}
