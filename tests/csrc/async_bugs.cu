// Mistakes in asynchronous work. Each is a number, by its place in test_async_bugs.py's list; a line that ends in BUG and its
// name (or names) is one that a report may show. Most would give right results on most days on a GPU.

#include "device/async.h"
#include "device/cluster.h"

using namespace device;

enum Bug {
  kNone,
  kMissingWait,
  kFreedEarly,
  kTooFewBytes,
  kTooManyBytes,
  kConsumerParity,
  kProducerParity,
  kMissingExpect,
  kExpectTwice,
  kArriveTwice,
  kUninitialised,
  kInitialisedTwice,
  kNoBarrierAfterInit,
  kNoInitFence,
  kOutOfSharedMemory,
  kMisaligned,
  kOneLaneWaits,
  kNoProxyFence,
  kFenceAfterBarrier,
  kNoWaitBeforeReuse,
  kWrongThreadWaits,
  kNoWaitAtTheEnd,
  kNoCommit,
  kOneTileTooMany,
  kReadBeforeWritten,
  kBarrierOverwritten,
  kStoreRace,
  kWrittenBeforeLoad,
};

// A ring of two tiles of 16 x 64: warp 0 loads, warps 1 and 2 compute and store.
constexpr int kTile = 16 * 64;

KERNEL(96) ring_kernel(GRID_CONSTANT(TensorMap) from, GRID_CONSTANT(TensorMap) to, Global<bf16> y, int tiles, int bug) {
  SHARED_ARRAY(Mbarrier, full, 2);
  SHARED_ARRAY(Mbarrier, empty, 2);
  const Shared<bf16> ring = dynamic_shared<bf16>(), out = ring + 2 * kTile;
  if (thread_id() == 0) {
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(full + s, 1);
      if (bug != kUninitialised) mbarrier_init(empty + s, 2);
      if (bug == kInitialisedTwice) mbarrier_init(full + s, 1);  // BUG InitialisedTwice
    }
    if (bug != kNoInitFence) fence_mbarrier_init();
  }
  if (bug != kNoBarrierAfterInit) block_barrier();
  if (warp_id() == 0) {
    if (lane_id() > 0) return;
    for (int t = 0; t < tiles + (bug == kOneTileTooMany); ++t) {
      const int s = t % 2;
      mbarrier_wait(empty + s, t / 2 % 2 ^ (bug != kProducerParity));  // BUG Uninitialised ProducerParity NoBarrierAfterInit
      const int bytes = bug == kTooFewBytes ? kTile : bug == kTooManyBytes ? 4 * kTile : 2 * kTile;
      if (bug == kMissingExpect) {
        mbarrier_arrive(full + s);
      } else {
        mbarrier_arrive_expect(full + s, bytes);
      }
      if (bug == kExpectTwice) mbarrier_arrive_expect(full + s, 0);  // BUG ExpectTwice
      const Shared<bf16> slot = ring + s * kTile + (bug == kMisaligned ? 64 : bug == kOutOfSharedMemory ? 3 * kTile : 0);
      tensor_load(slot, from, full + s, {0, 16 * t});  // BUG FreedEarly TooFewBytes MissingExpect NoInitFence Misaligned OutOfSharedMemory MissingWait OneLaneWaits OneTileTooMany ArriveTwice ConsumerParity WrittenBeforeLoad
    }
    return;
  }
  const int worker = thread_id() - 32;
  for (int t = 0; t < tiles; ++t) {
    const int s = t % 2, writer = bug == kStoreRace ? 64 * (t % 2) / 2 : 0;
    const Shared<bf16> place = ring + s * kTile + worker * 16;
    if (bug == kOneLaneWaits ? lane_id() == 0 : bug != kMissingWait) {
      mbarrier_wait(full + s, t / 2 % 2 ^ (bug == kConsumerParity));  // BUG NoBarrierAfterInit TooManyBytes ConsumerParity ArriveTwice
    }
    if (bug == kFreedEarly && lane_id() == 0) mbarrier_arrive(empty + s);
    const bf16 first = place[0];  // BUG MissingWait FreedEarly ConsumerParity MissingExpect OneLaneWaits ArriveTwice
    if (bug == kWrittenBeforeLoad) place[1] = first;
    warp_barrier();
    if (bug != kFreedEarly && lane_id() == 0) mbarrier_arrive(empty + s);
    if (bug == kArriveTwice && lane_id() == 0) mbarrier_arrive(empty + s);
    if (bug == kBarrierOverwritten && worker == 0) pointer_cast<int>(full)[0] = 0;  // BUG BarrierOverwritten
    if (bug != kNoWaitBeforeReuse && worker == (bug == kWrongThreadWaits ? 1 : writer)) bulk_wait_read<0>();
    named_barrier(1, 64);
    for (int i = 0; i < 16; ++i) out[worker * 16 + i] = first;  // BUG NoWaitBeforeReuse WrongThreadWaits NoCommit StoreRace
    if (bug != kNoProxyFence && bug != kFenceAfterBarrier) fence_async_shared();
    named_barrier(1, 64);
    if (worker == writer) {
      if (bug == kFenceAfterBarrier && t == 1) fence_async_shared();
      tensor_store(to, {0, 16 * (bug == kStoreRace ? 0 : t)}, out);  // BUG NoProxyFence FenceAfterBarrier NoWaitAtTheEnd NoCommit StoreRace NoWaitBeforeReuse WrongThreadWaits
      if (bug != kNoCommit) bulk_commit();
    }
  }
  if (worker == 0) {
    if (bug != kNoWaitAtTheEnd) bulk_wait_read<0>();
    if (bug == kReadBeforeWritten) y[0] = static_cast<bf16>(y[64]);  // BUG ReadBeforeWritten
  }
}

// What needs a kernel of its own.
KERNEL(32) static_tile_kernel(GRID_CONSTANT(TensorMap) map, Global<bf16>) {
  SHARED_ARRAY(Mbarrier, full, 1);
  SHARED_ARRAY(bf16, tile, 16 * 64);
  if (thread_id() > 0) return;
  mbarrier_init(full, 1);
  fence_mbarrier_init();
  tensor_load(tile, map, full, {0, 0});  // BUG static_tile
}

KERNEL(32) coordinates_kernel(GRID_CONSTANT(TensorMap) map, Global<bf16>) {
  SHARED_ARRAY(Mbarrier, full, 1);
  if (thread_id() > 0) return;
  mbarrier_init(full, 1);
  fence_mbarrier_init();
  tensor_load(dynamic_shared<bf16>(), map, full, {0, 0, 0});  // BUG coordinates
}

KERNEL(32) not_a_multiple_kernel(GRID_CONSTANT(TensorMap), Global<bf16> y) {
  SHARED_ARRAY(bf16, tile, 64);
  tile[lane_id()] = from_float<bf16>(0);
  fence_async_shared();
  warp_barrier();
  if (lane_id() == 0) bulk_store(y, tile, 24);  // BUG not_a_multiple
}

KERNEL(32) global_fence_kernel(GRID_CONSTANT(TensorMap), Global<bf16> y) {
  SHARED_ARRAY(Mbarrier, full, 1);
  SHARED_ARRAY(bf16, tile, 32);
  y[lane_id()] = from_float<bf16>(0);
  warp_barrier();
  if (lane_id() > 0) return;
  mbarrier_init(full, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect(full, 64);
  bulk_load(tile, y, 64, full);  // BUG global_fence
  mbarrier_wait(full, 0);
}

KERNEL(32) other_block_kernel(Global<bf16>) {
  SHARED_ARRAY(Mbarrier, full, 1);
  if (thread_id() == 0) mbarrier_init(full, 1);
  cluster_barrier();
  if (thread_id() == 0) mbarrier_arrive(cluster_pointer(full, 1 - cluster_rank()));  // BUG other_block
  cluster_barrier();
}

// What other blocks wrote, without a proxy fence on either side.
KERNEL(32) relay_kernel(Global<float> y, Global<unsigned> counter) {
  SHARED_ARRAY(Mbarrier, full, 1);
  SHARED_ARRAY(float, tile, 128);
  y[32 * block_x() + lane_id()] = 0;
  if (!is_last_block(counter, grid_x())) return;
  if (thread_id() > 0) return;
  mbarrier_init(full, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect(full, 512);
  bulk_load(tile, y, 512, full);  // BUG relay
  mbarrier_wait(full, 0);
}

KERNEL(32) invalidated_kernel(GRID_CONSTANT(TensorMap), Global<bf16>) {
  SHARED_ARRAY(Mbarrier, full, 1);
  if (thread_id() > 0) return;
  mbarrier_init(full, 1);
  mbarrier_invalidate(full);
  mbarrier_arrive(full);  // BUG invalidated
}

KERNEL(32) barrier_address_kernel(GRID_CONSTANT(TensorMap), Global<bf16>) {
  SHARED_ARRAY(int, words, 4);
  if (thread_id() == 0) mbarrier_init(pointer_cast<Mbarrier>(words + 1), 1);  // BUG barrier_address
}

KERNEL(32) no_arrivals_kernel(GRID_CONSTANT(TensorMap), Global<bf16>) {
  SHARED_ARRAY(Mbarrier, full, 1);
  if (thread_id() == 0) mbarrier_init(full, 0);  // BUG no_arrivals
}

KERNEL(32) phase_as_parity_kernel(GRID_CONSTANT(TensorMap), Global<bf16>) {
  SHARED_ARRAY(Mbarrier, full, 1);
  if (thread_id() > 0) return;
  mbarrier_init(full, 1);
  for (int i = 0; i < 3; ++i) {
    mbarrier_arrive(full);
    mbarrier_wait(full, i);  // BUG phase_as_parity
  }
}

KERNEL(32) divergent_elect_kernel(GRID_CONSTANT(TensorMap), Global<bf16> y) {
  if (lane_id() < 4 && elect_one()) y[0] = from_float<bf16>(0);  // BUG divergent_elect
}

KERNEL(32) elected_waits_kernel(GRID_CONSTANT(TensorMap), Global<bf16> y) {
  SHARED_ARRAY(bf16, tile, 64);
  tile[lane_id()] = from_float<bf16>(0);
  fence_async_shared();
  warp_barrier();
  if (elect_one()) bulk_store(y, tile, 64);
  bulk_commit();
  if (lane_id() == 16) bulk_wait_read<0>();  // not the one who stores
  warp_barrier();
  tile[lane_id()] = from_float<bf16>(1);  // BUG elected_waits
}

KERNEL(64) copy_async_wait_kernel(GRID_CONSTANT(TensorMap), Global<bf16> y) {
  SHARED_ARRAY(bf16, tile, 512);
  copy_async<8>(tile + 8 * thread_id(), y + 8 * thread_id());
  copy_async_commit();
  copy_async_wait<1>();
  const bf16 v = tile[8 * thread_id()];  // BUG copy_async_wait
  y[thread_id()] = v;
}

KERNEL(64) copy_async_barrier_kernel(GRID_CONSTANT(TensorMap), Global<bf16> y) {
  SHARED_ARRAY(bf16, tile, 512);
  copy_async<8>(tile + 8 * thread_id(), y + 8 * thread_id());
  copy_async_commit();
  copy_async_wait<0>();
  const bf16 v = tile[8 * (63 - thread_id())];  // BUG copy_async_barrier
  y[512 + thread_id()] = v;
}

KERNEL(256, 1) registers_kernel(GRID_CONSTANT(TensorMap), Global<bf16>) {
  if (thread_id() < 128) setmaxnreg_dec<200>();
  if (thread_id() >= 128) setmaxnreg_inc<256>();  // BUG registers
  if (thread_id() < 128) setmaxnreg_dec<232>();  // BUG registers
}

KERNEL(384, 1) registers_for_ever_kernel(GRID_CONSTANT(TensorMap), Global<bf16>) {
  if (thread_id() < 128) {
    setmaxnreg_dec<40>();
  } else {
    setmaxnreg_inc<240>();  // BUG registers_for_ever
  }
}

KERNEL(128, 1) one_warp_kernel(GRID_CONSTANT(TensorMap), Global<bf16>) {
  if (warp_id() == 1) setmaxnreg_dec<40>();  // BUG one_warp
}

extern "C" {
int ring(const bf16* x, bf16* y, int64_t tiles, int64_t bug, void* stream) {
  TensorMap from, to;
  const int64_t rows = 16 * tiles;
  if (int error = make_tensor_map(from, x, {64, rows}, {64}, {64, 16}, Swizzle::b128)) return error;
  if (int error = make_tensor_map(to, y, {64, rows}, {64}, {64, 16}, Swizzle::b128)) return error;
  return launch(ring_kernel, Dim{}, 96, 3 * kTile * 2, stream, from, to, y, static_cast<int>(tiles), static_cast<int>(bug));
}
#define SMALL(name, threads)                                                                          \
  int name(bf16* y, void* stream) {                                                                   \
    TensorMap map;                                                                                    \
    if (int error = make_tensor_map(map, y, {64, 16}, {64}, {64, 16}, Swizzle::b128)) return error;    \
    return launch(name##_kernel, Dim{}, threads, kTile * 2, stream, map, y);                          \
  }
SMALL(static_tile, 32)
SMALL(coordinates, 32)
SMALL(not_a_multiple, 32)
SMALL(global_fence, 32)
SMALL(invalidated, 32)
SMALL(barrier_address, 32)
SMALL(no_arrivals, 32)
SMALL(phase_as_parity, 32)
SMALL(divergent_elect, 32)
SMALL(elected_waits, 32)
SMALL(copy_async_wait, 64)
SMALL(copy_async_barrier, 64)
SMALL(registers, 256)
SMALL(registers_for_ever, 384)
SMALL(one_warp, 128)
int relay(float* y, unsigned* counter, void* stream) { return launch(relay_kernel, Dim{4}, 32, 0, stream, y, counter); }
int other_block(bf16* y, void* stream) { return launch_cluster(other_block_kernel, Dim{2}, 2, 32, 0, stream, y); }
int map_of(bf16* y, int64_t offset, int64_t columns, int64_t stride, int64_t box_columns, int64_t box_rows, int64_t swizzle, void*) {
  TensorMap map;
  return make_tensor_map(map, y + offset, {columns, 16}, {stride}, {static_cast<int>(box_columns), static_cast<int>(box_rows)},
                         static_cast<Swizzle>(swizzle));
}
}
