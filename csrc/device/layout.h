// Where elements lie: in swizzled tiles of shared memory, in the operands that matrix descriptors describe, and in the registers of
// wgmma's fragments. Integers only, the same for both bodies; tests/csrc/test_layout.py compares them with CuTe's layouts.
//
// A tile of 16-bit elements is kept as panels: a panel is as wide as the swizzle (128 bytes: 64 elements) and as high as the
// tile; row r of it begins at r * 128 bytes, and its 16-byte pieces are permuted among each other by r % 8. So a column of 16-byte
// pieces, as well as a row, is spread over all banks. This is what a tensor copy with a box of one panel's width writes, and both
// what wgmma reads as a K-major operand (rows are M or N, the panel's width runs along K) and, the same bytes seen the other way,
// as an MN-major one (rows are K, the width runs along M or N).
#pragma once

#include "common.h"

namespace device {

// The width of a swizzle's pattern. The values are those of a matrix descriptor's bits 62 and 63.
enum class Swizzle : uint32_t { none = 0, bytes128 = 1, bytes64 = 2, bytes32 = 3 };

// Bytes of a row of the pattern (16 without one: a piece), and of the whole pattern: 8 rows, at a multiple of which a tile begins.
EVERYWHERE constexpr uint32_t swizzle_width(Swizzle s) { return s == Swizzle::none ? 16 : 256u >> static_cast<uint32_t>(s); }
EVERYWHERE constexpr uint32_t swizzle_period(Swizzle s) { return 8 * swizzle_width(s); }

// The place of the byte that would be at `address` in shared memory without a swizzle. Its own inverse. Addresses count from a
// multiple of swizzle_period.
EVERYWHERE constexpr uint32_t swizzled(uint32_t address, Swizzle s = Swizzle::bytes128) {
  return address ^ (address >> 3 & (swizzle_width(s) - 16));
}

// The byte of a tile, `rows` high, at which the element (row, column) of `bytes` bytes is.
EVERYWHERE constexpr uint32_t tile_byte(uint32_t row, uint32_t column, uint32_t rows, uint32_t bytes = 2,
                                        Swizzle s = Swizzle::bytes128) {
  const uint32_t width = swizzle_width(s), byte = column * bytes;
  return swizzled(byte / width * rows * width + row * width + byte % width, s);
}

// Along which dimension the elements of a wgmma operand follow each other.
enum class Major : uint32_t { k = 0, mn = 1 };

// A wgmma operand in shared memory: bits 0-13 address, 16-29 leading, 32-45 stride (all / 16), 49-51 base offset (0), 62-63 swizzle.
//
//                      stride                                    leading
//   K-major            from 8 rows of M or N to the next 8       from 16 bytes of K to the next; without a swizzle only
//   MN-major           from 8 rows of K to the next 8            from a pattern's width of M or N to the next
//   MN-major, none     from 16 bytes of M or N to the next       from 8 rows of K to the next 8
EVERYWHERE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride, Swizzle s) {
  return static_cast<uint64_t>(address >> 4 & 0x3fff) | static_cast<uint64_t>(leading >> 4 & 0x3fff) << 16 |
         static_cast<uint64_t>(stride >> 4 & 0x3fff) << 32 | static_cast<uint64_t>(s) << 62;
}

// What a descriptor says, in bytes.
struct MatrixLayout {
  uint32_t address, leading, stride, base_offset;
  Swizzle swizzle;
};
EVERYWHERE constexpr MatrixLayout matrix_layout(uint64_t descriptor) {
  return {static_cast<uint32_t>(descriptor & 0x3fff) << 4, static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4, static_cast<uint32_t>(descriptor >> 49 & 7),
          static_cast<Swizzle>(descriptor >> 62)};
}

// The address in shared memory of a 16-bit element of a described operand: element `mn` of M or N, `k` of K (0 to 15).
EVERYWHERE constexpr uint32_t matrix_byte(const MatrixLayout& at, Major major, uint32_t mn, uint32_t k) {
  const uint32_t width = swizzle_width(at.swizzle) / 2;  // elements
  uint32_t byte = at.address;
  if (major == Major::k) {
    byte += mn / 8 * at.stride + mn % 8 * 2 * width + (at.swizzle == Swizzle::none ? k / 8 * at.leading + k % 8 * 2 : k * 2);
  } else {
    const bool none = at.swizzle == Swizzle::none;
    byte += k / 8 * (none ? at.leading : at.stride) + k % 8 * 2 * width + mn / width * (none ? at.stride : at.leading) + mn % width * 2;
  }
  return swizzled(byte, at.swizzle);
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
