// The asynchronous part of the device layer (Hopper, sm_90 and later; cp.async from sm_80): barriers in shared memory, tensor and
// bulk copies, their fences, and how warpgroups share registers. device.h holds the rest; a kernel that needs this includes it,
// others do not pay for it. csrc/README.md says what the host body checks. The matrix product: wgmma.h.
//
// Two kinds of access. A thread's own loads and stores go through the generic proxy; bulk and tensor copies and wgmma's operands
// in shared memory through the asynchronous one, which sees what threads wrote only after a proxy fence.
//
//   Mbarrier                            a barrier in shared memory: SHARED_ARRAY(Mbarrier, full, kStages), or dynamic_shared.
//                                       It counts arrivals and bytes. When both have come its phase is complete, the next begins.
//   mbarrier_init(b, arrivals)          one thread, once; then fence_mbarrier_init() by that thread and block_barrier()
//   mbarrier_arrive(b)                  this thread's accesses before it happen before what follows a wait for the phase
//   mbarrier_arrive_expect(b, bytes)    the same, and the phase also waits for so many bytes of copies
//   mbarrier_expect(b, bytes)           only the bytes; the phase still waits for an arrival
//   mbarrier_wait(b, parity)            until the phase with this parity (0 first, then 1, 0, ...) is complete. On a new barrier
//                                       parity 1 does not wait: so a producer begins with all slots free
//   mbarrier_try_wait(b, parity)        whether it is, after a short while: true is as good as a wait
//   mbarrier_invalidate(b)              before its memory is used for something else
//
//   TensorMap                           describes a tensor of global memory: a kernel takes GRID_CONSTANT(TensorMap) map
//   make_tensor_map<T>(map, base, {sizes}, {strides}, {box}, Swizzle) -> int       on the CPU; 0 or an error code. All innermost
//                                       first, in elements; there is no innermost stride, it is 1
//   tensor_load(to, map, b, {c0, c1, ...})        one thread: the box that begins at these coordinates, innermost first, into
//                                       shared memory, its rows one after the other, swizzled; zeros outside of the tensor. The
//                                       bytes of the whole box count at barrier b. tensor_load<L2::evict_first>(...): see L2
//   tensor_store(map, {c0, c1, ...}, from)        shared memory -> tensor; what lies outside of it is left out
//   tensor_reduce_add(map, {c0, c1, ...}, from)   the same, added by the memory itself (fp32, bf16, fp16, integers). In which
//                                       order several are added is open: with floating point a result depends on it
//   bulk_load(to, from, bytes, b)       a contiguous piece; addresses and bytes multiples of 16
//   bulk_store(to, from, bytes)         bulk_reduce_add(to, from, bytes)
//   bulk_commit()                       closes the group of this thread's stores and reduce-adds since the last one
//   bulk_wait_read<N>()                 until all but the last N groups of this thread have read shared memory: it may be reused,
//                                       and must be waited for before the block ends
//   bulk_wait<N>()                      until they have also written global memory
//   prefetch_tensor_map(map)            one thread, early
//   L2                                  how long what is copied stays in the L2 cache
//
//   copy_async(to, from, valid = N)     cp.async: copy_async<N>, a thread's 4, 8 or 16 bytes; zeros from the element `valid` on.
//                                       It belongs to the generic proxy: no fence before the threads' own reads
//   copy_async_commit()  copy_async_wait<N>()     groups, as above; then a barrier, for what other threads copied
//
//   fence_async_shared()                what this thread wrote to shared memory, or saw written through barriers, may from now on
//                                       be read by copies and wgmma: its own, and those of threads that meet it later.
//                                       Needed between threads' stores and asynchronous accesses; not after copies
//   fence_async_global()                the same for global memory
//   fence_mbarrier_init()
//
//   elect_one()                         true in one lane of a warp, the same one every time; all lanes call it
//   warpgroup_id() warpgroup_thread()   128 threads each; the first one uniform over the warp, as the compiler can see
//   setmaxnreg_inc<N>() setmaxnreg_dec<N>()       registers a thread, by all warps of a warpgroup; a multiple of 8, 24 to 256
//   swizzled<S>(byte)                   where a tile's byte lies within the tile under a swizzle; layout.h
#pragma once

#include "device.h"
#include "layout.h"

namespace device {

enum class L2 { normal, evict_first, evict_last };

}  // namespace device

#ifdef FASTLM_HOST
#include "host/async.h"
#else
#include "cuda_async.h"
#endif
