// Reductions over a warp and a block, the same for both bodies. Every thread gets the same bits (of a maximum that is zero, its
// sign may differ).
#pragma once

namespace device {

// f over groups of W neighbouring lanes. Lane pairs compute f(a, b) and f(b, a): f must commute, bit for bit.
template <int W = 32, class T, class F>
DEVICE T warp_reduce(T v, F f, Where at = Where::current()) {
  static_assert(W >= 1 && W <= 32 && (W & (W - 1)) == 0, "a group has 1, 2, 4, 8, 16 or 32 lanes");
#pragma unroll
  for (int bits = W / 2; bits > 0; bits /= 2) v = f(v, shuffle_xor(v, bits, kAllLanes, 32, at));
  return v;
}

struct Add {
  template <class T>
  DEVICE T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <class T>
  DEVICE T operator()(T a, T b) const {
    return maximum(a, b);
  }
};

template <int W = 32, class T>
DEVICE T warp_sum(T v, Where at = Where::current()) {
  return warp_reduce<W>(v, Add(), at);
}

template <int W = 32, class T>
DEVICE T warp_max(T v, Where at = Where::current()) {
  return warp_reduce<W>(v, Max(), at);
}

// f over the threads of the block, in the order of the lanes, then of the warps. Two barriers.
template <class T, class F>
DEVICE T block_reduce(T v, F f, T identity, Where at = Where::current()) {
  SHARED_ARRAY(T, partial, 32);
  v = warp_reduce(v, f, at);
  block_barrier(at);  // a call before this one may still be read from
  if (lane_id() == 0) partial[warp_id()] = v;
  block_barrier(at);
  v = identity;
  if (lane_id() < block_warps()) v = partial[lane_id()];
  return warp_reduce(v, f, at);
}

template <class T>
DEVICE T block_sum(T v, Where at = Where::current()) {
  return block_reduce(v, Add(), T(0), at);
}

DEVICE float block_max(float v, Where at = Where::current()) { return block_reduce(v, Max(), -INFINITY, at); }

}  // namespace device
