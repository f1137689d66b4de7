// Where elements lie: in swizzled tiles of shared memory, in the operands that matrix descriptors describe, and in the registers
// of wgmma's fragments. Integers only, the same for both bodies; tests/csrc/test_layout.py compares them with CuTe's layouts.
//
// A tile of 16-bit elements is kept as panels: a panel is as wide as the swizzle (128 bytes: 64 elements) and as high as the
// tile; row r of it begins at r * 128 bytes, and its 16-byte pieces are permuted among each other by r % 8. So a column of
// pieces, as well as a row, is spread over all banks. This is what a tensor copy with a box of one panel's width writes. wgmma
// reads it as a K-major operand (rows are M or N, a panel's width runs along K) or, the same bytes seen the other way, as an
// MN-major one (rows are K, the width runs along M or N).
#pragma once

#include "common.h"

namespace device {

// How a tensor copy lays out a box in shared memory: pieces of 16 bytes change places within each row of 32, 64 or 128 bytes, so
// that neither rows nor columns of pieces meet in one bank. The box's rows must have exactly that many bytes.
enum class Swizzle { none, b32, b64, b128 };

// Bytes of a row under a swizzle.
EVERYWHERE constexpr int swizzle_bytes(Swizzle s) { return s == Swizzle::none ? 0 : 16 << static_cast<int>(s); }

// What a tile in shared memory must be aligned to, in bytes: the swizzle is a function of address bits.
template <Swizzle S>
constexpr int kTileAlign = S == Swizzle::none ? 128 : 8 * swizzle_bytes(S);

// Bits 4 to 6 of an address are xored with bits 7 to 9 (128 bytes; fewer of them for the narrower ones).
EVERYWHERE constexpr int64_t swizzled(Swizzle s, int64_t byte) {
  return s == Swizzle::none ? byte : byte ^ (byte >> 3 & (swizzle_bytes(s) - 16));
}
template <Swizzle S>
EVERYWHERE constexpr int swizzled(int byte) {
  return static_cast<int>(swizzled(S, byte));
}

// Bytes of a panel's row; without a swizzle a panel is one piece wide.
EVERYWHERE constexpr uint32_t panel_bytes(Swizzle s) { return s == Swizzle::none ? 16 : swizzle_bytes(s); }

// The byte of a tile, `rows` high, at which the element (row, column) of `bytes` bytes would be without the permutation: where an
// operand begins that is a part of the tile. And at which it is.
EVERYWHERE constexpr uint32_t tile_start(uint32_t row, uint32_t column, uint32_t rows, Swizzle s = Swizzle::b128,
                                         uint32_t bytes = 2) {
  const uint32_t width = panel_bytes(s), byte = column * bytes;
  return byte / width * rows * width + row * width + byte % width;
}
EVERYWHERE constexpr uint32_t tile_byte(uint32_t row, uint32_t column, uint32_t rows, Swizzle s = Swizzle::b128,
                                        uint32_t bytes = 2) {
  return static_cast<uint32_t>(swizzled(s, tile_start(row, column, rows, s, bytes)));
}

// Along which dimension the elements of a wgmma operand follow each other.
enum class Major : uint32_t { k = 0, mn = 1 };

// A wgmma operand in shared memory: bits 0-13 address, 16-29 leading, 32-45 stride (all / 16), 49-51 base offset (0), 62-63
// swizzle (1 for 128 bytes, 2 for 64, 3 for 32).
//
//                      stride                                    leading
//   K-major            from 8 rows of M or N to the next 8       from 16 bytes of K to the next; without a swizzle only
//   MN-major           from 8 rows of K to the next 8            from a panel's width of M or N to the next
//   MN-major, none     from 16 bytes of M or N to the next       from 8 rows of K to the next 8
EVERYWHERE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle s) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | static_cast<uint64_t>(4 - static_cast<int>(s)) << 62;
}

// The descriptor of a tile, `rows` high, that begins at `address`, or of the part that begins at tile_start of it.
EVERYWHERE constexpr uint64_t tile_descriptor(uint32_t address, uint32_t rows, Major major, Swizzle s = Swizzle::b128) {
  const uint32_t panel = rows * panel_bytes(s), period = 8 * panel_bytes(s);
  if (major == Major::k) return matrix_descriptor(address, s == Swizzle::none ? panel : 16, period, s);
  return s == Swizzle::none ? matrix_descriptor(address, period, panel, s) : matrix_descriptor(address, panel, period, s);
}

// What a descriptor says, in bytes.
struct MatrixLayout {
  uint32_t address, leading, stride, base_offset;
  Swizzle swizzle;
};
EVERYWHERE constexpr MatrixLayout matrix_layout(uint64_t descriptor) {
  const auto field = [descriptor](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; };
  const auto swizzle = static_cast<Swizzle>((4 - (descriptor >> 62)) & 3);
  return {field(0), field(16), field(32), static_cast<uint32_t>(descriptor >> 49 & 7), swizzle};
}

// The address in shared memory of a 16-bit element of a described operand: element `mn` of M or N, `k` of K (0 to 15).
EVERYWHERE constexpr uint32_t matrix_byte(const MatrixLayout& at, Major major, uint32_t mn, uint32_t k) {
  const uint32_t width = panel_bytes(at.swizzle);
  uint32_t byte = at.address;
  if (major == Major::k) {
    byte += mn / 8 * at.stride + mn % 8 * width + (at.swizzle == Swizzle::none ? k / 8 * at.leading + k % 8 * 2 : k * 2);
  } else {
    const uint32_t wide = width / 2, across = mn / wide, down = k / 8;
    byte += k % 8 * width + mn % wide * 2;
    byte += at.swizzle == Swizzle::none ? across * at.stride + down * at.leading : across * at.leading + down * at.stride;
  }
  return static_cast<uint32_t>(swizzled(at.swizzle, byte));
}

// wgmma m64nNk16: which element of the 64 x N accumulator is d[i] of thread `t` of the warpgroup (i up to N / 2). A fragment of A
// (64 x 16, 8 elements of 16 bits, two to a register) is an accumulator's first 16 columns: rounded and packed in pairs,
// d[8 * k] to d[8 * k + 7] are A's fragment for columns 16 * k to 16 * k + 15 of a next product.
struct Place {
  int row, column;
};
EVERYWHERE constexpr Place fragment_place(int t, int i) {
  return {16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * (t % 4) + i % 2};
}

}  // namespace device
