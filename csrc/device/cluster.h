// Clusters: up to 16 blocks that are live together, wait for each other and use each other's shared memory (Hopper and later).
// For kernels that include this beside device.h:
//
//   launch_cluster(kernel, grid, cluster, threads, shared_bytes, stream, args...) -> int
//                                   as launch; each `cluster` blocks that follow each other along x, which they must divide, are
//                                   a cluster. 16 is the most, and more than 8 a GPU may refuse. 1 is launch.
//   most_cluster_blocks()           on the CPU: 8 where the current GPU has clusters, 1 where it has not
//
//   cluster_rank() cluster_blocks() this block among those of its cluster. Compiled for sm_80, or launched without clusters, a
//                                   block is a cluster of one, and all below works
//   cluster_barrier()               all threads of all blocks of the cluster; orders their accesses to shared and global memory
//   cluster_arrive() cluster_wait() its two halves: what was done before the one is seen by whoever comes out of the other. In
//                                   turns, by every thread, whole warps at a time. An arrival waits for the thread's stores;
//                                   cluster_arrive_relaxed() does not and tells nothing but that this block has begun
//   cluster_pointer(p, rank)        a Shared<T> to the same place in another block's shared memory, to be read, written, or for
//                                   atomics. Not before a first cluster barrier: that block may not have begun. And it must not
//                                   return before a cluster barrier that comes after the last such access
//   cluster_sum(v) cluster_max(v)   over the cluster, the same bits in every thread of it
#pragma once

#include "device.h"
#ifndef FASTLM_HOST
#include <atomic>
#endif

namespace device {

#ifdef FASTLM_HOST

inline int most_cluster_blocks() { return host::machine.most_cluster_blocks; }

template <class... Parameters, class... Arguments>
int launch_cluster(void (*kernel)(Parameters...), Dim grid, int cluster, int threads, int shared_bytes, void*,
                   Arguments... arguments) {
  return host::run(grid, cluster, threads, shared_bytes, false, [=] { kernel(static_cast<Parameters>(arguments)...); });
}

inline int cluster_rank() { return host::machine.block->rank; }
inline int cluster_blocks() { return host::machine.cluster_blocks; }

inline void cluster_arrive(Where at = Where::current()) { host::cluster_arrive("cluster_arrive", true, at); }
inline void cluster_arrive_relaxed(Where at = Where::current()) { host::cluster_arrive("cluster_arrive_relaxed", false, at); }
inline void cluster_wait(Where at = Where::current()) { host::cluster_wait("cluster_wait", at); }
inline void cluster_barrier(Where at = Where::current()) {
  host::cluster_arrive("cluster_barrier", true, at);
  host::cluster_wait("cluster_barrier", at);
}

template <class T>
inline Shared<T> cluster_pointer(Shared<T> p, int rank, Where at = Where::current()) {
  host::Region& other = host::same_region(p.region(), rank, at);
  return {reinterpret_cast<T*>(other.begin + (reinterpret_cast<const uint8_t*>(p.address()) - p.region()->begin)), &other};
}

#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define FASTLM_NO_CLUSTERS
#endif

inline int most_cluster_blocks() {
  static std::atomic<int> known[64];  // of each GPU, 0 not yet
  int device = 0, has = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  std::atomic<int>* const at = device < 64 ? &known[device] : nullptr;
  int most = at ? at->load(std::memory_order_relaxed) : 0;
  if (most == 0) {
    if (cudaDeviceGetAttribute(&has, cudaDevAttrClusterLaunch, device) != cudaSuccess) return 1;
    most = has ? 8 : 1;
    if (at) at->store(most, std::memory_order_relaxed);
  }
  return most;
}

template <class... Parameters, class... Arguments>
int launch_cluster(void (*kernel)(Parameters...), Dim grid, int cluster, int threads, int shared_bytes, void* stream,
                   Arguments... arguments) {
  if (cluster == 1) return launch(kernel, grid, threads, shared_bytes, stream, arguments...);
  if (cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return launch_with(&attribute, 1, kernel, grid, threads, shared_bytes, stream, arguments...);
}

#ifdef FASTLM_NO_CLUSTERS

DEVICE int cluster_rank() { return 0; }
DEVICE int cluster_blocks() { return 1; }
DEVICE void cluster_arrive(Where = {}) {}
DEVICE void cluster_arrive_relaxed(Where = {}) {}
DEVICE void cluster_wait(Where = {}) { __syncthreads(); }
DEVICE void cluster_barrier(Where = {}) { __syncthreads(); }
template <class T>
DEVICE Shared<T> cluster_pointer(Shared<T> p, int, Where = {}) {
  return p;
}

#else

DEVICE int cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
DEVICE int cluster_blocks() {
  unsigned count;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
  return static_cast<int>(count);
}
DEVICE void cluster_arrive(Where = {}) { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_arrive_relaxed(Where = {}) { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
DEVICE void cluster_wait(Where = {}) { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void cluster_barrier(Where = {}) {
  cluster_arrive();
  cluster_wait();
}
template <class T>
DEVICE Shared<T> cluster_pointer(Shared<T> p, int rank, Where = {}) {
  T* there;  // of generic addresses: loads, stores and atomics through it are the ordinary ones
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
}

#endif
#endif

// f over the threads of the cluster, the same bits in every thread. Each warp writes its part into every block's table, in which
// each block then finds all of them: one barrier between, and none is needed before the block returns. `arrived`: every thread
// has arrived and not waited, which hides the other barrier: with cluster_arrive_relaxed before the first reduction, with
// cluster_arrive after another.
template <class T, class F>
DEVICE T cluster_reduce(T v, F f, T identity, bool arrived = false, Where at = Where::current()) {
  SHARED_ARRAY(T, partial, 16 * 32);
  if (arrived) {
    cluster_wait(at);
  } else {
    cluster_barrier(at);  // all blocks have begun, and read what a call before this one left
  }
  v = warp_reduce(v, f, at);
  const int blocks = cluster_blocks(), warps = block_warps();
  if (lane_id() < blocks) {
    store_vector(cluster_pointer(partial, lane_id(), at) + (cluster_rank() * warps + warp_id()), Vector<T, 1>{{v}}, at);
  }
  cluster_barrier(at);
  v = identity;
  for (int i = lane_id(); i < blocks * warps; i += 32) v = f(v, load_vector<1>(partial + i, at)[0]);
  return warp_reduce(v, f, at);
}

template <class T>
DEVICE T cluster_sum(T v, bool arrived = false, Where at = Where::current()) {
  return cluster_reduce(v, Add(), T(0), arrived, at);
}

DEVICE float cluster_max(float v, bool arrived = false, Where at = Where::current()) {
  return cluster_reduce(v, Max(), -INFINITY, arrived, at);
}

}  // namespace device
