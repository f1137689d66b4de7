// Both operands of few_rows.h's products on tensor cores: codes become numbers as they were read, x is put into shared memory in
// the numbering of k that this gives.
#pragma once

#include "device/mma.h"
#include "few_rows_numbers.h"

namespace few_rows {

constexpr int kStepBytes = 64;  // of a row of W

// How the columns of a row of codes are scaled.
enum class Groups {
  none,   // all alike, at the end
  wide,   // a step lies within one group
  small,  // 16 bytes do
};

// Codes and their zero points as numbers of X, two to a register.
template <class X, int BITS>
struct Codes {
  static constexpr bool kBf16 = std::is_same_v<X, bf16>;
  static constexpr uint32_t kMagic = kBf16 ? 0x43004300 : 0x64006400;  // 2^7, 2^10: the last bit of the mantissa counts ones
  static constexpr float kBase = kBf16 ? 128 : 1024;
  static constexpr int kTake = 0xea, kInvert = 0xae;  // (a & b) | c, (~a & b) | c

  // What `unpack` wants of a zero point.
  DEVICE static uint32_t centre(int zero) {
    const float z = static_cast<float>(zero);
    const X c = from_float<X>(BITS == 4 ? kBase + 15 - z : kBf16 ? z : kBase + 128 + z);
    return pack(c, c);
  }

  // int8: bytes 0 and 1, bytes 2 and 3. int4: bytes 0 and 2, bytes 1 and 3, of the low halves if `half` is 0, else the high ones.
  DEVICE static void unpack(uint32_t word, int half, uint32_t centre, uint32_t& first, uint32_t& second) {
    if constexpr (BITS == 4) {
      first = packed_subtract<X>(centre, bitwise<kInvert>(word >> 4 * half, 0x000f000f, kMagic));
      second = packed_subtract<X>(centre, bitwise<kInvert>(word >> (4 * half + 8), 0x000f000f, kMagic));
    } else if constexpr (kBf16) {  // a mantissa holds seven bits; the eighth counts -128
      const uint32_t low = byte_permute(word, 0, 0x4140), high = byte_permute(word, 0, 0x4342);
      first = packed_subtract<X>(bitwise<kTake>(low, 0x007f007f, kMagic), bitwise<kTake>(low, 0x00800080, kMagic));
      second = packed_subtract<X>(bitwise<kTake>(high, 0x007f007f, kMagic), bitwise<kTake>(high, 0x00800080, kMagic));
      first = packed_subtract<X>(first, centre);
      second = packed_subtract<X>(second, centre);
    } else {
      const uint32_t shifted = word ^ 0x80808080;  // code + 128
      first = packed_subtract<X>(byte_permute(shifted, kMagic, 0x5150), centre);
      second = packed_subtract<X>(byte_permute(shifted, kMagic, 0x5352), centre);
    }
  }
};

// Word i of lane t becomes word t of lane i, within four neighbouring lanes.
DEVICE void exchange(Vector<uint32_t, 4>& w) {
  const bool odd = lane_id() & 1, upper = lane_id() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = shuffle_xor(odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = shuffle_xor(upper ? w[i] : w[i + 2], 2);
    (upper ? w[i] : w[i + 2]) = got;
  }
}

// x in shared memory: for every step and row of x, 64 / BITS pieces of 8 numbers; piece 4 * q + t is what lane t multiplies with
// its words 2 q and 2 q + 1 (int8), its word q (int4), or all four (16 bits).
template <int BITS>
constexpr int kStepColumns = kStepBytes * 8 / BITS;

EVERYWHERE int pitch_of(int steps, int step_columns) {  // of a row of x, elements: 64 bytes more than a multiple of 128
  return ceil_div(steps * step_columns, 64) * 64 + 32;
}

// The column of W, from the step's first on, of element 0 or 4 (half 0 or 1) of a piece; three more follow.
template <int BITS, Groups GROUPS>
DEVICE int piece_column(int piece, int half, int group_size) {
  const int q = piece / 4, t = piece % 4;
  const int word = BITS == 8 ? 2 * q + half : q;
  const int byte = GROUPS == Groups::small ? 16 * word + 4 * t : 16 * t + 4 * word;
  const int shift = GROUPS == Groups::wide ? 6 : group_size == 32 ? 4 : 5;  // of the bytes of a group of int4
  const int of_group = byte & ((1 << shift) - 1);
  return BITS == 16 ? 8 * t + 4 * half : BITS == 8 ? byte : (byte >> shift << (shift + 1)) + of_group + (half << shift);
}

template <class X, int BITS, Groups GROUPS>
struct XStore {
  static constexpr int PIECES = kStepColumns<BITS> / 8;  // of a step
  const fastlm_linear& a;
  Shared<X> to;
  int pitch, first_step, pieces;
  uint32_t inverse;  // of pieces, times 2^32, rounded up: exact where products stay below 2^32, as those of shared memory do

  DEVICE XStore(const fastlm_linear& args, Shared<X> place, int elements, int first, int steps)
      : a(args),
        to(place),
        pitch(elements),
        first_step(first),
        pieces(steps * PIECES),
        inverse(0xffffffffu / maximum(pieces, 2) + 1) {}

  // The row of piece i, all counted through.
  DEVICE int row_of(int i) const { return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(i)) * inverse >> 32); }

  // The four numbers of a half of a piece of a row, and zeros past the row's end. IN_VECTORS: it goes on, aligned to 8 bytes.
  template <bool IN_VECTORS>
  DEVICE Vector<X, 4> read(int row, int piece, int half) const {
    const int column =
        (first_step + piece / PIECES) * kStepColumns<BITS> + piece_column<BITS, GROUPS>(piece % PIECES, half, a.group_size);
    const Global<const X> x = Global<const X>(static_cast<const X*>(a.x)) + row_start(a.x_rows, row) + column;
    Vector<X, 4> v;
    if constexpr (IN_VECTORS) {
      v = load_vector<4>(x);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[j] = from_float<X>(0.0f);
        if (column + j < a.columns) v[j] = load_vector<1>(x + j)[0];
      }
    }
    return v;
  }

  DEVICE void write(int row, int piece, const Vector<X, 4> (&halves)[2]) const {
    Vector<X, 8> out;
#pragma unroll
    for (int j = 0; j < 8; ++j) {  // as `unpack` pairs them
      out[BITS == 4 ? j / 4 * 4 + j % 4 / 2 + j % 2 * 2 : j] = halves[j / 4][j % 4];
    }
    store_vector(to + (row * pitch + piece * 8), out);
  }

  // All of the block's steps, AT_ONCE pieces of each thread on their way together.
  template <bool IN_VECTORS, int AT_ONCE>
  DEVICE void run() const {
    const int all = static_cast<int>(a.rows) * pieces;
    for (int i = thread_id(); i < all; i += AT_ONCE * block_threads()) {
      Vector<X, 4> halves[AT_ONCE][2];
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) {
        const int at = i + u * block_threads(), row = row_of(at), piece = at - row * pieces;
        if (at < all) halves[u][0] = read<IN_VECTORS>(row, piece, 0), halves[u][1] = read<IN_VECTORS>(row, piece, 1);
      }
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) {
        const int at = i + u * block_threads(), row = row_of(at), piece = at - row * pieces;
        if (at < all) write(row, piece, halves[u]);
      }
    }
  }
};

}  // namespace few_rows
