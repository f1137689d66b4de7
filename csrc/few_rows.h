// y = x W^T + bias for one to eight rows of x, W of 32, 16, 8 or 4 bits: what linear.cu and quantized_linear.cu share.
//
// Such a product is as fast as W can be read. With 16-bit x it goes to tensor cores even for one row, because below 16 bits the
// plain way (one conversion and one multiply-add per weight and row) takes longer than the reading: mma m16n8k16 with 16 rows
// of W as A and x, up to 8 rows, as B.
//
//   A warp owns 16 rows of W. Lane 4 * g + t reads 16 bytes of row g and of row g + 8 at once: four lanes, 64 bytes of a row, a
//   step. kDepth steps, 2 * 16 * kDepth bytes a lane, are on their way before the first is used, and before x is there.
//   What a lane has read is what it must hold as A, once k is renumbered: the sum over k has no order of its own. x is put into
//   shared memory by that numbering, so that B, too, is read in 16 bytes.
//   Codes become 16-bit numbers less their zero point, exactly (integers up to 256); the scale of a group goes onto its fp32
//   sums, so W itself is never rounded. From 4 bits: `(~w & 0x000f000f) | magic` is two numbers 2^7 + 15 - code (2^10 in fp16),
//   of which one subtraction makes code - zero (after Kim et al. 2022, arXiv:2211.10017, and Marlin, Frantar et al. 2024,
//   arXiv:2408.11743; counting down from 15 keeps zero points up to 255 exact in bf16).
//   Where a group is shorter than 64 bytes, the four lanes first exchange words, so that each product is of one group.
//
// The eight warps of a block own 1, 2, 4 or 8 such tiles of W, and share their columns; their sums are added in order. Where that
// makes too few blocks, blocks share columns too (`splits`) and a second kernel adds, in order.
//
// fp32 x, and weights whose rows do not all begin and end at multiples of 16 bytes, go by plain fp32 multiply-adds: a warp to two
// rows.
#pragma once

#include "device/device.h"
#include "device/mma.h"
#include "linear.h"

namespace few_rows {

using namespace device;

constexpr int kRows = FASTLM_LINEAR_ROWS;  // of x at most: the columns of a product
constexpr int kTile = 16;                  // rows of W of a warp
constexpr int kWarps = 8;
constexpr int kDepth = 4;       // steps on their way
constexpr int kStepBytes = 64;  // of a row of W
constexpr int kMostShared = 96 << 10;
constexpr int64_t kMostColumns = 1 << 28;  // eight rows of x of so many are divided among fewer than kMostSplits blocks
constexpr int kInvalidValue = 1;           // cudaErrorInvalidValue
constexpr int kMostSplits = 65535;         // the height of a grid

// How the columns of a row of codes are scaled.
enum class Groups {
  none,   // all alike, at the end
  wide,   // a step lies within one group
  small,  // 16 bytes do
};

// A number of any dtype as it lies in memory, and its value: so that a load can be long on its way before it is waited for.
DEVICE uint32_t load_raw(const void* p, int32_t dtype, int64_t index, Where at = Where::current()) {
  if (dtype == FASTLM_FLOAT32) return load_vector<1>(Global<const uint32_t>(static_cast<const uint32_t*>(p)) + index, at)[0];
  return load_vector<1>(Global<const uint16_t>(static_cast<const uint16_t*>(p)) + index, at)[0];
}
DEVICE float value_of(uint32_t raw, int32_t dtype) {
  if (dtype == FASTLM_FLOAT32) return bits_float(raw);
  if (dtype == FASTLM_BFLOAT16) return bits_float(raw << 16);
  fp16 half;
  const uint16_t bits = static_cast<uint16_t>(raw);
  memcpy(&half, &bits, 2);
  return to_float(half);
}

// The zero point of a row's group; what stands for 0 where there are none.
template <int BITS>
DEVICE int load_zero(const fastlm_linear& a, int64_t index, Where at = Where::current()) {
  if (a.zero == nullptr) return BITS == 4 ? 8 : 0;
  using T = std::conditional_t<BITS == 4, uint8_t, int8_t>;
  return load_vector<1>(Global<const T>(static_cast<const T*>(a.zero)) + index, at)[0];
}

// Where a row of x, one of a few, begins.
DEVICE int64_t row_start(const fastlm_rows& at, int row) {
  if (at.inner == 1) return row * at.outer_stride;
  const int inner = static_cast<int>(minimum<int64_t>(at.inner, kRows));
  return row / inner * at.outer_stride + row % inner * at.inner_stride;
}

// --- tensor cores ---------------------------------------------------------------------------------------------------

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

// What a lane reads of a step, for its two rows of W.
struct Fetched {
  Vector<uint32_t, 4> words[2];
  uint32_t scale[2];
  int zero[2];
};

template <class X, int BITS, Groups GROUPS>
struct Tile {
  using Format = Codes<X, BITS>;
  const fastlm_linear& a;
  int g, t, units, group_shift;
  int64_t row[2];
  Global<const uint8_t> weight[2];
  uint32_t centre[2];  // where there are no groups
  float sum[4];

  DEVICE Tile(const fastlm_linear& args, int64_t first_row, int units_of_row)
      : a(args), g(lane_id() / 4), t(lane_id() % 4), units(units_of_row), group_shift(0), sum{0, 0, 0, 0} {
    if constexpr (GROUPS != Groups::none) {
      while (16 << group_shift < a.group_size * BITS / 8) ++group_shift;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row[r] = minimum(first_row + g + 8 * r, a.outputs - 1);  // rows past the end are computed from the last one, and not stored
      weight[r] = Global<const uint8_t>(static_cast<const uint8_t*>(a.weight)) + row[r] * a.weight_stride;
      if constexpr (BITS == 8 && GROUPS == Groups::none) centre[r] = Format::centre(load_zero<BITS>(a, row[r]));
    }
  }

  DEVICE int64_t groups() const { return (units + (1 << group_shift) - 1) >> group_shift; }

  // Past `end`, and past the end of the row, words of zeros.
  DEVICE void fetch(int step, int end, Fetched& to) const {
    const int unit = 4 * step + t;
    const bool live = step < end && unit < units;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      to.words[r] = {};
      if (live) to.words[r] = load_vector<4, Cache::streaming>(pointer_cast<const uint32_t>(weight[r] + int64_t{16} * unit));
      if constexpr (GROUPS != Groups::none) {
        to.scale[r] = 0, to.zero[r] = 0;
        if (step < end) {  // past the end of the row, too: the sums that this lane scales are of all four
          const int64_t index = row[r] * groups() + (minimum(unit, units - 1) >> group_shift);
          to.scale[r] = load_raw(a.scale, a.scale_dtype, index);
          to.zero[r] = load_zero<BITS>(a, index);
        }
      }
    }
  }

  // Adds the products of a step with x (this lane's row of it, from the step on; null past the last row of x).
  DEVICE void multiply(Fetched& step, Shared<const X> x) {
    constexpr int PIECES = kStepColumns<BITS> / 32;
    float part[4] = {0, 0, 0, 0}, scale[2];
    uint32_t zero[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if constexpr (GROUPS == Groups::small) exchange(step.words[r]);
      if constexpr (GROUPS != Groups::none) {
        scale[r] = value_of(step.scale[r], a.scale_dtype);
        zero[r] = Format::centre(step.zero[r]);
      } else {
        zero[r] = centre[r];
      }
    }
#pragma unroll
    for (int q = 0; q < PIECES; ++q) {
      Vector<X, 8> v;
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = from_float<X>(0.0f);
      if (g < a.rows) v = load_vector<8>(x + (32 * q + 8 * t));
      uint32_t b[2][2];
      memcpy(b, &v, 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t left[4];
        if constexpr (BITS == 16) {
#pragma unroll
          for (int i = 0; i < 4; ++i) left[i] = step.words[i % 2][2 * half + i / 2];
        } else {
          const int word = BITS == 8 ? 2 * q + half : q;
          uint32_t from[2] = {zero[0], zero[1]};
          if constexpr (GROUPS == Groups::small) {
            if (a.zero) from[0] = shuffle(zero[0], word, kAllLanes, 4), from[1] = shuffle(zero[1], word, kAllLanes, 4);
          }
          Format::unpack(step.words[0][word], half, from[0], left[0], left[2]);
          Format::unpack(step.words[1][word], half, from[1], left[1], left[3]);
        }
        if constexpr (GROUPS == Groups::none) {
          mma<X>(sum, left, b[half]);
        } else {
          mma<X>(part, left, b[half]);
        }
        if constexpr (GROUPS == Groups::small) {
          if (BITS == 8 || half == 1) {
            const int word = BITS == 8 ? 2 * q + half : q;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sum[i] += part[i] * shuffle(scale[i / 2], word, kAllLanes, 4);
              part[i] = 0;
            }
          }
        }
      }
    }
    if constexpr (GROUPS == Groups::wide) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] += part[i] * scale[i / 2];
    }
  }
};

constexpr int kSums = kTile * kRows;  // of a warp

template <class X, int BITS, Groups GROUPS>
KERNEL(32 * kWarps)
few_rows_kernel(const fastlm_linear a, int tiles, int units, int share, bool x_vectors) {
  const Shared<float> sums = dynamic_shared<float>();  // [warps][rows of x][rows of W]
  const Shared<X> x = dynamic_shared<X>(kWarps * kSums * sizeof(float));
  const int steps = ceil_div(units, 4), first = minimum(block_y() * share, steps), last = minimum(first + share, steps);
  const int pitch = pitch_of(share, kStepColumns<BITS>);
  // The block's rows are counted through its tiles, its columns through its parts.
  const int parts = kWarps / tiles, tile = warp_id() % tiles, part = warp_id() / tiles;
  const int own = ceil_div(last - first, parts), begin = first + part * own, end = minimum(begin + own, last);
  const int64_t first_row = static_cast<int64_t>(block_x()) * tiles * kTile;

  Tile<X, BITS, GROUPS> w(a, first_row + tile * kTile, units);
  Fetched ahead[kDepth];
#pragma unroll
  for (int d = 0; d < kDepth; ++d) w.fetch(begin + d, end, ahead[d]);
  const int inside = x_vectors ? minimum(static_cast<int>(a.columns) / kStepColumns<BITS>, last) : 0;  // of the row
  const int middle = maximum(inside, first);
  XStore<X, BITS, GROUPS>(a, x, pitch, first, middle - first).template run<true, 4>();
  XStore<X, BITS, GROUPS>(a, x + (middle - first) * kStepColumns<BITS>, pitch, middle, last - middle).template run<false, 1>();
  block_barrier();
  const Shared<const X> mine = x + w.g * pitch;
  for (int step = begin; step < end; step += kDepth) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (step + d >= end) break;  // the whole warp
      w.multiply(ahead[d], mine + (step + d - first) * kStepColumns<BITS>);
      w.fetch(step + d + kDepth, end, ahead[d]);
    }
  }

  const Shared<float> to = sums + warp_id() * kSums;
#pragma unroll
  for (int i = 0; i < 4; ++i) to[(2 * w.t + i % 2) * kTile + w.g + i / 2 * 8] = w.sum[i];
  block_barrier();
  const int width = tiles * kTile;
  for (int i = thread_id(); i < width * static_cast<int>(a.rows); i += block_threads()) {
    const int m = i / width, local = i - m * width;
    const int64_t n = first_row + local;
    if (n >= a.outputs) continue;
    float sum = 0;
    for (int p = 0; p < parts; ++p) {
      const float of_part = sums[(p * tiles + local / kTile) * kSums + m * kTile + local % kTile];
      sum += of_part;
    }
    if (BITS == 8 && GROUPS == Groups::none) sum *= value_of(load_raw(a.scale, a.scale_dtype, n), a.scale_dtype);
    const int64_t at = m * a.outputs + n;
    if (a.splits > 1) {
      const Global<float> partial(a.partial);
      partial[block_y() * a.rows * a.outputs + at] = sum;
    } else {
      if (a.bias) sum += value_of(load_raw(a.bias, a.bias_dtype, n), a.bias_dtype);
      const Global<X> y(static_cast<X*>(a.y));
      y[at] = from_float<X>(sum);
    }
  }
}

constexpr int kCombineThreads = 128;

// y from the sums of all splits, in order.
template <class X>
KERNEL(kCombineThreads)
combine_kernel(const fastlm_linear a) {
  const int64_t n = static_cast<int64_t>(block_x()) * kCombineThreads + thread_id(), i = block_y() * a.outputs + n;
  if (n >= a.outputs) return;
  const Global<const float> partial(a.partial);
  float sum = 0;
  for (int s = 0; s < a.splits; ++s) {
    const float of_split = partial[s * a.rows * a.outputs + i];
    sum += of_split;
  }
  if (a.bias) sum += value_of(load_raw(a.bias, a.bias_dtype, n), a.bias_dtype);
  const Global<X> y(static_cast<X*>(a.y));
  y[i] = from_float<X>(sum);
}

// --- plain arithmetic -------------------------------------------------------------------------------------------------

constexpr int kPlainWarps = 4;
constexpr int kPlainRows = 2;  // of W of a warp

// Bytes of W that a lane reads at a time: VECTORS, 16 of fp32 or eight codes (more are unrolled into code that spills); else one
// weight, two of 4 bits.
template <int BITS, bool VECTORS>
constexpr int kPlainUnit = VECTORS ? minimum(BITS, 16) : maximum(BITS / 8, 1);

// A warp to kPlainRows rows of W, of so many units.
template <class X, int BITS, bool VECTORS>
KERNEL(32 * kPlainWarps)
plain_kernel(const fastlm_linear a, int units) {
  constexpr int UNIT = kPlainUnit<BITS, VECTORS>;
  constexpr int RUN = VECTORS ? 4 : 1;  // columns that follow each other
  constexpr int RUNS = UNIT * 8 / (BITS * RUN);
  const int64_t first_row = (static_cast<int64_t>(block_x()) * kPlainWarps + warp_id()) * kPlainRows;
  SHARED_ARRAY(int64_t, starts, kRows);  // of the rows of x: too many for registers
  if (thread_id() < a.rows) starts[thread_id()] = row_start(a.x_rows, thread_id());
  block_barrier();
  if (first_row >= a.outputs) return;  // a whole warp
  int group_shift = 31;                // of a unit's number
  if (a.group_size) {
    for (group_shift = 0; UNIT << group_shift < a.group_size * BITS / 8;) ++group_shift;
  }
  const int columns = static_cast<int>(a.columns), groups = ((units - 1) >> group_shift) + 1;
  float sum[kPlainRows][kRows] = {};
  for (int unit = lane_id(); unit < units; unit += 32) {
    const int group = unit >> group_shift;
    Vector<uint8_t, UNIT> w[kPlainRows];
    float scale[kPlainRows];
    int zero[kPlainRows];
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      const int64_t row = minimum(first_row + r, a.outputs - 1);
      w[r] = load_vector<UNIT, Cache::streaming>(Global<const uint8_t>(static_cast<const uint8_t*>(a.weight)) +
                                                 (row * a.weight_stride + int64_t{UNIT} * unit));
      scale[r] = 1, zero[r] = 0;
      if constexpr (BITS < 16) {
        scale[r] = value_of(load_raw(a.scale, a.scale_dtype, row * groups + group), a.scale_dtype);
        zero[r] = load_zero<BITS>(a, row * groups + group);
      }
    }
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
      int at = i * RUN * BITS / 8;  // byte of the unit
      int column = (unit * RUNS + i) * RUN;
      if constexpr (BITS == 4) {  // the low halves of the unit's bytes, then the high ones
        at = i % (RUNS / 2) * RUN;
        column = group * a.group_size + (unit - (group << group_shift)) * UNIT + at + (i >= RUNS / 2 ? a.group_size / 2 : 0);
      }
      float weights[kPlainRows][RUN];
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) {
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
          if constexpr (BITS >= 16) {
            X v;
            memcpy(&v, w[r].values + at + j * sizeof(X), sizeof(X));
            weights[r][j] = to_float(v);
          } else {
            const int code = BITS == 8 ? static_cast<int8_t>(w[r][at + j]) : w[r][at + j] >> (i >= RUNS / 2 ? 4 : 0) & 15;
            weights[r][j] = static_cast<float>(code - zero[r]) * scale[r];
          }
        }
      }
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        if (m >= a.rows) break;
        const int64_t start = starts[m];
        const Global<const X> x = Global<const X>(static_cast<const X*>(a.x)) + (start + column);
#pragma unroll
        for (int j = 0; j < RUN; ++j) {
          if (column + j >= columns) break;
          const float v = to_float(load_vector<1>(x + j)[0]);
#pragma unroll
          for (int r = 0; r < kPlainRows; ++r) sum[r][m] += v * weights[r][j];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) {
    const int64_t n = first_row + r;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      if (m >= a.rows) break;
      float v = warp_sum(sum[r][m]);
      if (lane_id() != 0 || n >= a.outputs) continue;
      if (a.bias) v += value_of(load_raw(a.bias, a.bias_dtype, n), a.bias_dtype);
      const Global<X> y(static_cast<X*>(a.y));
      y[m * a.outputs + n] = from_float<X>(v);
    }
  }
}

// --- launching --------------------------------------------------------------------------------------------------------

// Bytes of a row of W.
inline int64_t row_bytes(const fastlm_linear& a) {
  if (a.bits == 4) return (a.columns + a.group_size - 1) / a.group_size * a.group_size / 2;
  return a.columns * a.bits / 8;
}

// Whether every row of W is whole vectors of 16 bytes.
inline bool whole_vectors(const fastlm_linear& a) {
  return row_bytes(a) % 16 == 0 && a.weight_stride % 16 == 0 && reinterpret_cast<uintptr_t>(a.weight) % 16 == 0;
}

inline bool by_tensor_cores(const fastlm_linear& a) { return a.x_dtype != FASTLM_FLOAT32 && whole_vectors(a); }

// Tiles of W of a block: so many that reading x, once per block, costs at most a fourth of reading them; not more than there are.
inline int tiles_of(const fastlm_linear& a) {
  int tiles = 1;
  while (tiles < kWarps && tiles * a.bits < 4 * a.rows && tiles * kTile < a.outputs) tiles *= 2;
  return tiles;
}

inline int64_t steps_of(const fastlm_linear& a) { return ceil_div<int64_t>(row_bytes(a), kStepBytes); }

// Two blocks to a multiprocessor, as long as every warp has kDepth steps; and x in shared memory.
inline int splits_for(const fastlm_linear& a, int multiprocessors) {
  if (!by_tensor_cores(a) || a.rows <= 0 || a.outputs <= 0 || a.columns <= 0) return 1;
  const int64_t tiles = tiles_of(a), steps = steps_of(a), blocks = ceil_div<int64_t>(a.outputs, tiles * kTile);
  const int64_t useful = minimum<int64_t>(2 * multiprocessors / blocks, steps / (kDepth * kWarps / tiles));
  const int64_t x_bytes = steps * (kStepBytes * 8 / a.bits) * 2 * a.rows, room = kMostShared - kWarps * kSums * 4 - (4 << 10);
  const int64_t splits = maximum<int64_t>(maximum<int64_t>(useful, 1), ceil_div(x_bytes, room));
  return static_cast<int>(ceil_div(steps, ceil_div(steps, splits)));  // no block without columns
}

template <class X, int BITS, Groups GROUPS>
int start_tiles(const fastlm_linear& a, void* stream) {
  const int tiles = tiles_of(a), share = static_cast<int>(ceil_div<int64_t>(steps_of(a), a.splits));
  const int shared = kWarps * kSums * static_cast<int>(sizeof(float)) +
                     static_cast<int>(a.rows) * pitch_of(share, kStepColumns<BITS>) * 2;
  if (share > kMostShared / 64 || shared > kMostShared) return kInvalidValue;
  if (a.splits > 1 && !a.partial) return kInvalidValue;
  const bool vectors =
      reinterpret_cast<uintptr_t>(a.x) % 8 == 0 && a.x_rows.outer_stride % 4 == 0 && a.x_rows.inner_stride % 4 == 0;
  const Dim grid{static_cast<int>(ceil_div<int64_t>(a.outputs, tiles * kTile)), a.splits};
  const int error = launch(few_rows_kernel<X, BITS, GROUPS>, grid, 32 * kWarps, shared, stream, a, tiles,
                           static_cast<int>(row_bytes(a) / 16), share, vectors);
  if (error || a.splits == 1) return error;
  const Dim all{static_cast<int>(ceil_div<int64_t>(a.outputs, kCombineThreads)), static_cast<int>(a.rows)};
  return launch(combine_kernel<X>, all, kCombineThreads, 0, stream, a);
}

template <class X, int BITS, bool VECTORS>
int start_plain(const fastlm_linear& a, void* stream) {
  if (a.splits != 1) return kInvalidValue;
  const Dim grid{static_cast<int>(ceil_div<int64_t>(a.outputs, kPlainWarps * kPlainRows))};
  return launch(plain_kernel<X, BITS, VECTORS>, grid, 32 * kPlainWarps, 0, stream, a,
                static_cast<int>(row_bytes(a) / kPlainUnit<BITS, VECTORS>));
}

inline bool in_range(const fastlm_linear& a) {
  return a.rows >= 1 && a.rows <= kRows && a.columns >= 1 && a.columns <= kMostColumns && a.outputs >= 1 &&
         a.outputs <= 0x7fffffff && a.splits >= 1 && a.splits <= kMostSplits;
}

}  // namespace few_rows
