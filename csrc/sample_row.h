// How sample.cu reads a row of logits, by one block or shared out among a cluster.
#pragma once

#include "device/cluster.h"
#include "device/device.h"

namespace {

using namespace device;

constexpr int kAhead = 4;  // vectors that a thread has in flight

// A row, or the part of it that a block of a cluster reads.
template <class T>
struct Row {
  Global<const T> x;
  int columns;
  int shift;        // elements from a multiple of 16 bytes to the first one
  int first, step;  // where this thread begins, and how far it is to its next vector

  DEVICE float operator[](int i) const { return to_float(load_vector<1>(x + i)[0]); }
};

// A vector of kVector<T> elements as words, in and out of which they are shifted: as elements the compiler moves those of 16 bits
// one by one, and waits for one vector before it asks for the next.
using Words = Vector<uint32_t, 4>;

template <class T>
DEVICE void put(Words& words, int i, T x) {
  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t> bits;
  memcpy(&bits, &x, sizeof(T));
  words[i * sizeof(T) / 4] |= static_cast<uint32_t>(bits) << i * sizeof(T) % 4 * 8;
}

template <class T>
DEVICE float value_at(const Words& words, int i) {
  const auto bits = static_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>(words[i * sizeof(T) / 4] >>
                                                                                       i * sizeof(T) % 4 * 8);
  T x;
  memcpy(&x, &bits, sizeof(T));
  return to_float(x);
}

// Elements shift to shift + kVector<T> of two vectors.
template <class T>
DEVICE Words realigned(const Words& low, const Words& high, int shift) {
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = low[i], w[i + 4] = high[i];
  const int word = 4 / sizeof(T);  // elements of one
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 2 * word ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & word ? w[i + 1] : w[i];
  Words v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = sizeof(T) == 4 ? w[i] : static_cast<uint32_t>((uint64_t{w[i + 1]} << 32 | w[i]) >> (16 * (shift & 1)));
  }
  return v;
}

// f(first, values) for each of this thread's groups of kVector<T> neighbours; past the end they are -inf. Rows that do not begin
// at 16 bytes (those of an odd vocabulary) are read in vectors too, two for each. What would reach beyond the row is read element
// by element; that is in a loop, as it is seldom and would else be most of the kernel.
template <class T, class F>
DEVICE void over_row(const Row<T>& row, F f, Where at = Where::current()) {
  constexpr int VEC = kVector<T>;
  const int reach = row.shift == 0 ? VEC : 2 * VEC - row.shift;
  const auto inside = [&](int begin) { return begin >= row.shift && begin + reach <= row.columns; };
  for (int first = row.first; first < row.columns; first += kAhead * row.step) {
    Words read[kAhead] = {}, next[kAhead] = {};
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int begin = first + k * row.step;
      if (inside(begin)) {
        const Global<const uint32_t> from = pointer_cast<const uint32_t>(row.x + begin - row.shift);
        read[k] = load_vector<4>(from, at);
        if (row.shift != 0) next[k] = load_vector<4>(from + 4, at);
      }
    }
    if (row.shift != 0) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) read[k] = realigned<T>(read[k], next[k], row.shift);
    }
    if (!inside(first) || !inside(first + (kAhead - 1) * row.step)) {
#pragma unroll 1
      for (int k = 0; k < kAhead; ++k) {
        const int begin = first + k * row.step;
        if (inside(begin) || begin >= row.columns) continue;
        Words edge = {};
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          T element = from_float<T>(-INFINITY);
          if (begin + i < row.columns) element = load_vector<1>(row.x + begin + i, at)[0];
          put(edge, i, element);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (j == k) read[j] = edge;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      float values[VEC];
#pragma unroll
      for (int i = 0; i < VEC; ++i) values[i] = value_at<T>(read[k], i);
      if (first + k * row.step < row.columns) f(first + k * row.step, values);
    }
  }
}

// f over the blocks of a row, in every thread of them. A cluster's barrier waits for memory, a block's does not.
template <class T, class F>
DEVICE T row_reduce(T v, F f, T identity, Where at = Where::current()) {
  if (cluster_blocks() == 1) return block_reduce(v, f, identity, at);
  return cluster_reduce(v, f, identity, false, at);
}

}  // namespace
