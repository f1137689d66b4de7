// How the kernels of wgmma_cases.cu and wgmma_mistakes.cu fill their operands.
#pragma once

#include "device/wgmma.h"

namespace device {

// Fills a tile of shared memory: its element (row, column) is that at row * row_stride + column * column_stride.
template <class T>
DEVICE void fill(Shared<T> tile, Global<const T> from, int rows, int columns, int row_stride, int column_stride,
                 Swizzle swizzle) {
  for (int i = thread_id(); i < rows * columns; i += block_threads()) {
    const int row = i / columns, column = i % columns;
    const T v = from[row * row_stride + column * column_stride];
    tile[tile_byte(row, column, rows, swizzle) / 2] = v;
  }
}

}  // namespace device
