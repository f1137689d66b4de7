// The device layer: what a kernel of fastlm is written with. One source, two bodies:
//
//   CUDA   device/cuda.h: thin names for intrinsics; chosen unless FASTLM_HOST is defined.
//   host   device/host.h: the threads of a block are fibers of one CPU thread; for tests. Compile with
//          g++ -x c++ -std=c++20 -DFASTLM_HOST. It checks every access and reports mistakes that hardware does not.
//
// A kernel uses only the names below (namespace device) and plain C++; csrc/README.md shows one and says what is modelled.
//
//   KERNEL(threads) name(...)       a kernel, returns nothing; `threads` is the most a block has (__launch_bounds__)
//   DEVICE                          before a function that kernels call; EVERYWHERE if launchers call it too
//   launch(kernel, Dim{x, y, z}, threads, shared_bytes, stream, args...) -> int      0 or an error code
//   fill_zero(p, bytes, stream)     before a launch, from the CPU
//   launch_cooperative(the same)    all blocks live at once: they may wait for each other
//
//   thread_id() block_threads() lane_id() warp_id() block_warps()      blocks are one-dimensional, threads a multiple of 32
//   block_x() block_y() block_z()   grid_x() grid_y() grid_z()
//
//   Global<T>, Shared<T>            pointers: p[i] reads and writes an element, p + i moves on. Give the value a type
//                                   (float x = p[i], not auto). Global<const T> only reads. Global<T> comes from a T*.
//   SHARED_ARRAY(T, name, count);   static shared memory, a Shared<T>. One array for each place in the source (and each
//                                   instantiation of a template): a function called twice gets the same one.
//   dynamic_shared<T>(byte_offset)  a Shared<T> into the launch's shared_bytes
//   pointer_cast<U>(p)              the same place as another type;  pointer_at<T>(address)    a Global<T> from a pointer table
//   Vector<T, N>                    N elements, v[i]; load_vector<N>(p), store_vector(p, v) move 2 to 16 bytes in one access, which
//                                   must be aligned to its size. load_vector<N, Cache::streaming>: see Cache
//
//   block_barrier()                 all threads of the block; orders their shared and global accesses
//   named_barrier(id, threads)      `threads` threads, whole warps; id 1 to 15. named_barrier_arrive does not wait
//   warp_barrier(mask)              the lanes in mask (default: all 32); orders their accesses. Shuffles order nothing
//   shuffle(v, lane) shuffle_up(v, n) shuffle_down(v, n) shuffle_xor(v, bits)       of 4- and 8-byte values;
//                                   then (mask = kAllLanes, width = 32), as __shfl_sync
//   warp_ballot(predicate, mask) warp_any(predicate, mask) warp_all(predicate, mask)
//   warp_sum<W>(v) warp_max<W>(v)   over groups of W lanes (32), the result in all of them;  warp_reduce<W>(v, f)
//   block_sum(v) block_max(v)       over the block, the result in every thread; contains barriers
//
//   atomic_add(p, v) atomic_max(p, v) atomic_exchange(p, v) atomic_cas(p, expected, v)      int, unsigned, unsigned long long;
//   atomic_wrap(p, last)            p = p >= last ? 0 : p + 1.  All return the old value.
//   device_fence()                  what this thread wrote (or saw written, through barriers) before is visible to other blocks
//                                   before what it writes after
//   load_acquire(p) store_release(p, v) spin_pause()    unsigned flags between blocks; a waiting loop must call spin_pause()
//   is_last_block(counter, blocks)  true in every thread of the block that comes last; see ticket.h
//
//   bf16, fp16                      16-bit floats; to_float(x), from_float<T>(x) (to nearest even), also for T = float
//   fast_exp2 fast_log2 fast_rsqrt fast_reciprocal fast_tanh     one approximate instruction each; their errors: cuda.h
//   minimum(a, b) maximum(a, b) ceil_div(a, b)      float_bits(x) bits_float(u)
//   philox(seed, c0, c1, c2, c3)    four random words, philox.h
//   mma.h has the warp's matrix product and what prepares its operands; a kernel that needs them includes it
//
// Where is the caller's source line on the host and nothing on CUDA: helpers that take `Where at = Where::current()` and hand it
// on show the kernel's line in a report instead of their own.
#pragma once

#include "common.h"
#ifdef FASTLM_HOST
#include "host.h"
#else
#include "cuda.h"
#endif
#include "philox.h"
#include "reduce.h"
#include "ticket.h"
