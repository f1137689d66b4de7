// One kernel for each feature of the asynchronous part of the device layer, for test_async.py.

#include "device/async.h"
#include "device/cluster.h"

using namespace device;

// y = 2 x through a ring of kStages tiles: warp 0 loads, 1 to 4 compute and store. Tiles of 16 rows of 64, 128-byte swizzle.
constexpr int kStages = 2, kRows = 16, kTile = kRows * 64, kWorkers = 128;

KERNEL(160) pipeline_kernel(GRID_CONSTANT(TensorMap) from, GRID_CONSTANT(TensorMap) to, int tile_rows, int tile_columns) {
  SHARED_ARRAY(Mbarrier, full, kStages);
  SHARED_ARRAY(Mbarrier, empty, kStages);
  const Shared<bf16> ring = dynamic_shared<bf16>(), out = ring + kStages * kTile;
  if (thread_id() == 0) {
    prefetch_tensor_map(from);
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full + s, 1);
      mbarrier_init(empty + s, kWorkers / 32);
    }
    fence_mbarrier_init();
  }
  block_barrier();
  const int tiles = tile_rows * tile_columns;
  if (warp_id() == 0) {
    if (!elect_one()) return;
    for (int i = 0, t = block_x(); t < tiles; ++i, t += grid_x()) {
      const int s = i % kStages;
      mbarrier_wait(empty + s, i / kStages % 2 ^ 1);
      mbarrier_arrive_expect(full + s, kTile * 2);
      tensor_load<L2::evict_first>(ring + s * kTile, from, full + s, {64 * (t % tile_columns), kRows * (t / tile_columns)});
    }
    return;
  }
  const int worker = thread_id() - 32;
  for (int i = 0, t = block_x(); t < tiles; ++i, t += grid_x()) {
    const int s = i % kStages;
    mbarrier_wait(full + s, i / kStages % 2);
    Vector<bf16, 8> v = load_vector<8>(ring + s * kTile + swizzled<Swizzle::b128>(worker * 16) / 2);
    warp_barrier();
    if (lane_id() == 0) mbarrier_arrive(empty + s);
    for (int j = 0; j < 8; ++j) v[j] = from_float<bf16>(2 * to_float(v[j]));
    if (worker == 0) bulk_wait_read<0>();
    named_barrier(1, kWorkers);
    store_vector(out + swizzled<Swizzle::b128>(worker * 16) / 2, v);
    fence_async_shared();
    named_barrier(1, kWorkers);
    if (worker == 0) {
      tensor_store(to, {64 * (t % tile_columns), kRows * (t / tile_columns)}, out);
      bulk_commit();
    }
  }
  if (worker == 0) bulk_wait_read<0>();
}

// The box at the given corner, as it lies in shared memory.
template <class T, int RANK>
DEVICE void load_at(Shared<T> tile, const TensorMap& map, Shared<Mbarrier> b, Global<const int> corner) {
  int c[RANK];
  for (int i = 0; i < RANK; ++i) c[i] = corner[i];
  tensor_load(tile, map, b, c);
}

template <class T, int RANK>
KERNEL(64)
box_kernel(GRID_CONSTANT(TensorMap) map, Global<const int> corner, Global<T> y, int elements) {
  SHARED_ARRAY(Mbarrier, full, 1);
  const Shared<T> tile = dynamic_shared<T>();
  if (thread_id() == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_expect(full, elements * static_cast<int>(sizeof(T)));
    mbarrier_arrive(full);
    load_at<T, RANK>(tile, map, full, corner);
  }
  block_barrier();
  while (!mbarrier_try_wait(full, 0)) {
  }
  for (int i = thread_id(); i < elements; i += block_threads()) {
    const T v = tile[i];
    y[i] = v;
  }
}

// y += the sum over row blocks of x, added by the memory: one block to a piece of 8 rows.
template <class T>
KERNEL(32)
add_kernel(GRID_CONSTANT(TensorMap) from, GRID_CONSTANT(TensorMap) to) {
  SHARED_ARRAY(Mbarrier, full, 1);
  const Shared<T> tile = dynamic_shared<T>();
  if (!elect_one()) return;
  mbarrier_init(full, 1);
  fence_mbarrier_init();
  mbarrier_arrive_expect(full, 8 * 64 * sizeof(T));
  tensor_load(tile, from, full, {64 * block_y(), 8 * block_x()});
  mbarrier_wait(full, 0);
  tensor_reduce_add(to, {64 * block_y(), 0}, tile);
  bulk_commit();
  bulk_wait<0>();
}

// y = x, 32 elements a block by bulk copies, and total += x.
template <class T>
KERNEL(32)
bulk_kernel(Global<const T> x, Global<T> y, Global<T> total) {
  SHARED_ARRAY(Mbarrier, full, 1);
  SHARED_ARRAY(T, piece, 32);
  const int64_t first = 32 * static_cast<int64_t>(block_x());
  if (thread_id() == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    bulk_load(piece, x + first, 32 * sizeof(T), full);  // before its bytes are announced: the phase waits for the arrival
    mbarrier_arrive_expect(full, 32 * sizeof(T));
    mbarrier_wait(full, 0);
    bulk_store(y + first, piece, 32 * sizeof(T));
    bulk_commit();
    bulk_reduce_add(total, piece, 32 * sizeof(T));
    bulk_commit();
    bulk_wait<1>();
    const T back = y[first];  // the first group has been written
    if (to_float(back) != to_float(piece[0])) y[first] = back;
    bulk_wait_read<0>();
  }
}

// y = x reversed within pieces of 256, read two pieces ahead by cp.async, N at a time; zeros from n on.
template <int N>
KERNEL(64) ahead_kernel(Global<const float> x, Global<float> y, int n) {
  SHARED_ARRAY(float, ring, 3 * 256);
  const int pieces = ceil_div(n, 256);
  const auto fetch = [&](int piece) {
    for (int i = N * thread_id(); i < 256 && piece < pieces; i += N * block_threads()) {
      const int at = 256 * piece + i;
      copy_async<N>(ring + piece % 3 * 256 + i, x + at, minimum(maximum(n - at, 0), N));
    }
    copy_async_commit();
  };
  fetch(0);
  fetch(1);
  for (int i = 0; i < pieces; ++i) {
    copy_async_wait<1>();
    block_barrier();
    fetch(i + 2);
    for (int j = thread_id(); j < 256; j += 64) {
      const float v = ring[i % 3 * 256 + 255 - j];
      y[256 * i + j] = v;
    }
  }
}

// Barriers in shared memory among threads: warp 1 hands numbers to warp 0 and gets them back doubled; in the end the barriers'
// memory is used for something else.
KERNEL(64) threads_kernel(Global<int> y, int rounds) {
  SHARED_ARRAY(Mbarrier, both, 2);
  SHARED_ARRAY(int, slot, 32);
  const Shared<Mbarrier> there = both, back = both + 1;
  if (thread_id() == 0) {
    mbarrier_init(there, 32);
    mbarrier_init(back, 32);
  }
  block_barrier();
  for (int i = 0; i < rounds; ++i) {
    if (warp_id() == 1) {
      slot[lane_id()] = 100 * i + lane_id();
      mbarrier_arrive(there);
      mbarrier_wait(back, i % 2);
      const int v = slot[lane_id()];
      y[32 * i + lane_id()] = v;
    } else {
      mbarrier_wait(there, i % 2);
      const int v = slot[31 - lane_id()];
      warp_barrier();
      slot[31 - lane_id()] = 2 * v;
      mbarrier_arrive(back);
    }
  }
  block_barrier();
  if (thread_id() == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_invalidate(both + i);
    const Shared<int> words = pointer_cast<int>(both);
    for (int i = 0; i < 4; ++i) words[i] = i;
  }
  block_barrier();
  if (thread_id() < 4) {
    const int v = pointer_cast<int>(both)[thread_id()];
    y[32 * rounds + thread_id()] = v;
  }
}

// Written by threads, handed through global memory to a tensor copy of the block that comes last.
KERNEL(32) relay_kernel(GRID_CONSTANT(TensorMap) map, Global<float> scratch, Global<float> y, Global<unsigned> counter) {
  SHARED_ARRAY(Mbarrier, full, 1);
  const Shared<float> tile = dynamic_shared<float>();
  scratch[32 * block_x() + lane_id()] = 32.0f * block_x() + lane_id();
  fence_async_global();
  if (!is_last_block(counter, grid_x())) return;
  if (thread_id() == 0) {
    mbarrier_init(full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect(full, 4 * 32 * 4);
    tensor_load(tile, map, full, {0, 0});
    mbarrier_wait(full, 0);
  }
  block_barrier();
  for (int i = 0; i < 4; ++i) {
    const float v = tile[32 * i + lane_id()];
    y[32 * i + lane_id()] = v;
  }
}

// Each block of a cluster writes into the next one's shared memory, which that one stores. fence: 1 by who writes (which
// covers its own block's shared memory alone), 2 by who stores.
KERNEL(32) pass_on_kernel(Global<float> y, int fence) {
  SHARED_ARRAY(float, tile, 32);
  const int next = (cluster_rank() + 1) % cluster_blocks();
  cluster_barrier();
  cluster_pointer(tile, next)[lane_id()] = 100.0f * block_x() + lane_id();
  if (fence == 1) fence_async_shared();
  cluster_barrier();
  if (thread_id() > 0) return;
  if (fence == 2) fence_async_shared();
  bulk_store(y + 32 * block_x(), tile, 128);
  bulk_commit();
  bulk_wait_read<0>();
}

// Warpgroups: ids, elected lanes, registers passed from one to the other two. Without "1 block" ptxas does not know how many a
// thread begins with, and ignores setmaxnreg.
KERNEL(384, 1) groups_kernel(Global<int> y) {
  const int group = warpgroup_id();
  if (group == 0) {
    setmaxnreg_dec<24>();
  } else {
    setmaxnreg_inc<240>();
  }
  const uint32_t elected = warp_ballot(elect_one()), again = warp_ballot(elect_one());
  y[thread_id()] = 1000 * group + warpgroup_thread() + (elected && !(elected & (elected - 1)) && elected == again ? 0 : 1 << 20);
}

template <class T>
int box(const T* x, const int* corner, T* y, int64_t rank, int64_t swizzle, const int64_t (&n)[5], const int64_t (&s)[4],
        const int64_t (&b)[5], void* stream) {
  TensorMap map;
  const auto swizzled_by = static_cast<Swizzle>(swizzle);
  int d[5], elements = 1, error = 1;
  for (int i = 0; i < 5; ++i) d[i] = static_cast<int>(b[i]);
  for (int i = 0; i < rank; ++i) elements *= d[i];
  const auto start = [&](void (*kernel)(TensorMap, Global<const int>, Global<T>, int)) {
    return error ? error : launch(kernel, Dim{}, 64, elements * static_cast<int>(sizeof(T)), stream, map, corner, y, elements);
  };
  if (rank == 1) {
    error = make_tensor_map(map, x, {n[0]}, {}, {d[0]}, swizzled_by);
    return start(box_kernel<T, 1>);
  }
  if (rank == 2) {
    error = make_tensor_map(map, x, {n[0], n[1]}, {s[0]}, {d[0], d[1]}, swizzled_by);
    return start(box_kernel<T, 2>);
  }
  if (rank == 3) {
    error = make_tensor_map(map, x, {n[0], n[1], n[2]}, {s[0], s[1]}, {d[0], d[1], d[2]}, swizzled_by);
    return start(box_kernel<T, 3>);
  }
  if (rank == 4) {
    error = make_tensor_map(map, x, {n[0], n[1], n[2], n[3]}, {s[0], s[1], s[2]}, {d[0], d[1], d[2], d[3]}, swizzled_by);
    return start(box_kernel<T, 4>);
  }
  error = make_tensor_map(map, x, {n[0], n[1], n[2], n[3], n[4]}, {s[0], s[1], s[2], s[3]}, {d[0], d[1], d[2], d[3], d[4]},
                          swizzled_by);
  return start(box_kernel<T, 5>);
}

template <class T>
int add(const T* x, T* y, int64_t rows, int64_t columns, int64_t stride, void* stream) {
  TensorMap from, to;
  if (int error = make_tensor_map(from, x, {columns, rows}, {stride}, {64, 8})) return error;
  if (int error = make_tensor_map(to, y, {columns, 8}, {stride}, {64, 8})) return error;
  const Dim grid{static_cast<int>(ceil_div<int64_t>(rows, 8)), static_cast<int>(ceil_div<int64_t>(columns, 64))};
  return launch(add_kernel<T>, grid, 32, 8 * 64 * sizeof(T), stream, from, to);
}

extern "C" {
int pipeline(const bf16* x, bf16* y, int64_t rows, int64_t columns, int64_t stride, int64_t blocks, void* stream) {
  TensorMap from, to;
  if (int error = make_tensor_map(from, x, {columns, rows}, {stride}, {64, kRows}, Swizzle::b128)) return error;
  if (int error = make_tensor_map(to, y, {columns, rows}, {stride}, {64, kRows}, Swizzle::b128)) return error;
  return launch(pipeline_kernel, Dim{static_cast<int>(blocks)}, 32 + kWorkers, (kStages + 1) * kTile * 2, stream, from, to,
                static_cast<int>(ceil_div<int64_t>(rows, kRows)), static_cast<int>(ceil_div<int64_t>(columns, 64)));
}
int box_bf16(const bf16* x, const int* corner, bf16* y, int64_t rank, int64_t swizzle, const int64_t (&n)[5],
             const int64_t (&s)[4], const int64_t (&b)[5], void* stream) {
  return box(x, corner, y, rank, swizzle, n, s, b, stream);
}
int box_float(const float* x, const int* corner, float* y, int64_t rank, int64_t swizzle, const int64_t (&n)[5],
              const int64_t (&s)[4], const int64_t (&b)[5], void* stream) {
  return box(x, corner, y, rank, swizzle, n, s, b, stream);
}
int add_float(const float* x, float* y, int64_t rows, int64_t columns, int64_t stride, void* stream) {
  return add(x, y, rows, columns, stride, stream);
}
int add_bf16(const bf16* x, bf16* y, int64_t rows, int64_t columns, int64_t stride, void* stream) {
  return add(x, y, rows, columns, stride, stream);
}
int add_int(const int* x, int* y, int64_t rows, int64_t columns, int64_t stride, void* stream) {
  return add(x, y, rows, columns, stride, stream);
}
int bulk_float(const float* x, float* y, float* total, int64_t pieces, void* stream) {
  return launch(bulk_kernel<float>, Dim{static_cast<int>(pieces)}, 32, 0, stream, x, y, total);
}
int bulk_fp16(const fp16* x, fp16* y, fp16* total, int64_t pieces, void* stream) {
  return launch(bulk_kernel<fp16>, Dim{static_cast<int>(pieces)}, 32, 0, stream, x, y, total);
}
int bulk_bf16(const bf16* x, bf16* y, bf16* total, int64_t pieces, void* stream) {
  return launch(bulk_kernel<bf16>, Dim{static_cast<int>(pieces)}, 32, 0, stream, x, y, total);
}
int ahead(const float* x, float* y, int64_t n, int64_t wide, void* stream) {
  const auto kernel = wide == 4 ? ahead_kernel<4> : wide == 2 ? ahead_kernel<2> : ahead_kernel<1>;
  return launch(kernel, Dim{}, 64, 0, stream, x, y, static_cast<int>(n));
}
int threads(int* y, int64_t rounds, void* stream) {
  return launch(threads_kernel, Dim{}, 64, 0, stream, y, static_cast<int>(rounds));
}
int relay(float* scratch, float* y, unsigned* counter, void* stream) {
  TensorMap map;
  if (int error = make_tensor_map(map, scratch, {32, 4}, {32}, {32, 4})) return error;
  return launch(relay_kernel, Dim{4}, 32, 4 * 32 * 4, stream, map, scratch, y, counter);
}
int pass_on(float* y, int64_t fence, void* stream) {
  return launch_cluster(pass_on_kernel, Dim{6}, 3, 32, 0, stream, y, static_cast<int>(fence));
}
int groups(int* y, void* stream) { return launch(groups_kernel, Dim{}, 384, 0, stream, y); }
}
