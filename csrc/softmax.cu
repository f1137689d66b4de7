// softmax(scale * x + mask) over rows and its backward from y (fastlm/ops/softmax.py has the contract).
//
// A warp owns a row of up to 32 * kHeld columns, a block a wider one. Rows of up to 512 * kHeld columns are read once and stay in
// registers; of wider ones each thread keeps a running maximum and sum (Milakov and Gimelshein 2018, arXiv:1805.02867) and reads
// its part again, from the cache, to write. Rows that all begin at 16 bytes are read in 16-byte accesses but for their tail;
// others element by element, and twice. A mask is read where it lies, at the strides that broadcasting gives it; a row that it
// hides entirely gives 0.

#include "device/device.h"
#include "softmax.h"

namespace {

using namespace device;

constexpr int kMostThreads = 512;
constexpr int kHeld = 32;         // elements of a row in the registers of a thread
constexpr int kRowsPerBlock = 4;  // where a warp owns a row
constexpr float kLog2e = 1.4426950408889634f;
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

DEVICE float exp_of(float difference) { return fast_exp2(difference * kLog2e); }

// VEC elements from `column` on, as floats; `beyond` where the row has ended.
template <int VEC, class T>
DEVICE void read(Global<const T> row, int64_t column, int64_t columns, float beyond, float (&out)[VEC],
                 Where at = Where::current()) {
  if (column + VEC <= columns) {
    const Vector<T, VEC> v = load_vector<VEC>(row + column, at);
#pragma unroll
    for (int i = 0; i < VEC; ++i) out[i] = to_float(v[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    out[i] = beyond;
    if (column + i < columns) out[i] = to_float(load_vector<1>(row + column + i, at)[0]);
  }
}

template <int VEC, class T>
DEVICE void write(Global<T> row, int64_t column, int64_t columns, const float (&values)[VEC], Where at = Where::current()) {
  if (column + VEC <= columns) {
    Vector<T, VEC> v;
#pragma unroll
    for (int i = 0; i < VEC; ++i) v[i] = from_float<T>(values[i]);
    store_vector(row + column, v, at);
    return;
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    if (column + i < columns) store_vector(row + column + i, Vector<T, 1>{{from_float<T>(values[i])}}, at);
  }
}

DEVICE int64_t row_start(const fastlm_rows& at, int64_t row) {
  return at.inner == 1 ? row * at.outer_stride : row / at.inner * at.outer_stride + row % at.inner * at.inner_stride;
}

// Where the mask's row begins.
DEVICE int64_t mask_start(const fastlm_softmax& a, int64_t row) {
  const unsigned number = static_cast<unsigned>(row), inner = static_cast<unsigned>(a.mask_inner);
  const unsigned rest = number / inner, middle = static_cast<unsigned>(a.mask_middle);
  return rest / middle * a.mask_strides[0] + rest % middle * a.mask_strides[1] + number % inner * a.mask_strides[2];
}

// Whether the mask's rows are read as x's are.
template <int VEC>
DEVICE bool mask_in_vectors(const fastlm_softmax& a) {
  const int bytes = a.mask_kind == FASTLM_MASK_BOOL ? 1 : a.mask_kind == FASTLM_MASK_FLOAT32 ? 4 : 2;
  const uint64_t lies = reinterpret_cast<uint64_t>(a.mask) / bytes | a.mask_strides[0] | a.mask_strides[1] | a.mask_strides[2];
  return VEC > 1 && a.mask_strides[3] == 1 && lies % VEC == 0;
}

DEVICE float mask_value(uint16_t bits, int kind) {
  if (kind == FASTLM_MASK_BFLOAT16) return bits_float(static_cast<uint32_t>(bits) << 16);
  fp16 x;
  memcpy(&x, &bits, 2);
  return to_float(x);
}

// s[i] = f(s[i], m[i]) for the mask's elements m from `start` on, of type M, VEC at a time or one by one.
template <class M, int VEC, class F>
DEVICE void fold_in(const fastlm_softmax& a, int64_t start, int64_t column, bool vectors, float (&s)[VEC], F f, Where at) {
  constexpr int MOST = minimum(VEC, kVector<M>);
  const Global<const M> mask = Global<const M>(static_cast<const M*>(a.mask)) + start + column * a.mask_strides[3];
  if (vectors && column + VEC <= a.columns) {
#pragma unroll
    for (int i = 0; i < VEC; i += MOST) {
      const Vector<M, MOST> m = load_vector<MOST>(mask + i, at);
#pragma unroll
      for (int j = 0; j < MOST; ++j) s[i + j] = f(s[i + j], m[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) {
    if (column + i < a.columns) s[i] = f(s[i], load_vector<1>(mask + i * a.mask_strides[3], at)[0]);
  }
}

// The mask on VEC scores from `column` on, in place.
template <int VEC>
DEVICE void apply_mask(const fastlm_softmax& a, int64_t start, int64_t column, bool vectors, float (&s)[VEC],
                       Where at = Where::current()) {
  if (a.mask_kind == FASTLM_MASK_BOOL) {
    fold_in<uint8_t>(a, start, column, vectors, s, [](float x, uint8_t kept) { return kept ? x : -INFINITY; }, at);
  } else if (a.mask_kind == FASTLM_MASK_FLOAT32) {
    fold_in<float>(a, start, column, vectors, s, [](float x, float added) { return x + added; }, at);
  } else {
    const int kind = a.mask_kind;
    fold_in<uint16_t>(a, start, column, vectors, s, [=](float x, uint16_t bits) { return x + mask_value(bits, kind); }, at);
  }
}

// The row of this thread, the first column of its part and how far it is to the next, for a warp's row and a block's.
template <int VEC>
struct Part {
  bool of_warp;
  int64_t row, first, step;

  DEVICE explicit Part(int rows_per_block)
      : of_warp(rows_per_block > 1),
        row(of_warp ? static_cast<int64_t>(block_x()) * rows_per_block + warp_id() : block_x()),
        first(static_cast<int64_t>(of_warp ? lane_id() : thread_id()) * VEC),
        step(static_cast<int64_t>(of_warp ? 32 : block_threads()) * VEC) {}

  DEVICE float sum(float v, Where at = Where::current()) const { return of_warp ? warp_sum(v, at) : block_sum(v, at); }
  DEVICE float max(float v, Where at = Where::current()) const { return of_warp ? warp_max(v, at) : block_max(v, at); }
};

// What is subtracted before exp: the maximum, but 0 for a row that its mask hides entirely; and 1 / sum, of such a row 1.
template <bool MASKED>
DEVICE float shift_of(float top) {
  return MASKED && top == -INFINITY ? 0.0f : top;
}
template <bool MASKED>
DEVICE float share_of(float total) {
  return 1.0f / (MASKED && total == 0 ? 1.0f : total);
}

template <class T, int VEC, bool MASKED>
KERNEL(kMostThreads)
softmax_fwd_kernel(const fastlm_softmax a, int rows_per_block) {
  constexpr int COUNT = kHeld / VEC;
  const Part<VEC> part(rows_per_block);
  if (part.row >= a.rows) return;  // a whole warp, and no block barrier follows
  const Global<const T> x = Global<const T>(static_cast<const T*>(a.x)) + row_start(a.x_rows, part.row);
  const Global<T> y = Global<T>(static_cast<T*>(a.y)) + row_start(a.y_rows, part.row);
  float s[COUNT][VEC], top = -INFINITY;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const int64_t column = part.first + k * part.step;
    read<VEC, T>(x, column, a.columns, 0.0f, s[k]);
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[k][i] = column + i < a.columns ? s[k][i] * a.scale : -INFINITY;
  }
  if constexpr (MASKED) {
    const int64_t start = mask_start(a, part.row);
    const bool vectors = mask_in_vectors<VEC>(a);
#pragma unroll
    for (int k = 0; k < COUNT; ++k) apply_mask<VEC>(a, start, part.first + k * part.step, vectors, s[k]);
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) top = maximum(top, s[k][i]);
  }
  top = shift_of<MASKED>(part.max(top));
  float total = 0;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      s[k][i] = exp_of(s[k][i] - top);
      total += s[k][i];
    }
  }
  const float share = share_of<MASKED>(part.sum(total));
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[k][i] *= share;
    write<VEC, T>(y, part.first + k * part.step, a.columns, s[k]);
  }
}

template <class T, int VEC, bool MASKED>
KERNEL(kMostThreads)
softmax_fwd_wide_kernel(const fastlm_softmax a) {
  const Part<VEC> part(1);
  const Global<const T> x = Global<const T>(static_cast<const T*>(a.x)) + row_start(a.x_rows, part.row);
  const Global<T> y = Global<T>(static_cast<T*>(a.y)) + row_start(a.y_rows, part.row);
  const int64_t start = MASKED ? mask_start(a, part.row) : 0;
  const bool vectors = MASKED && mask_in_vectors<VEC>(a);
  float top = -INFINITY, total = 0, s[VEC];
  const auto read_scores = [&](int64_t column) {
    read<VEC, T>(x, column, a.columns, 0.0f, s);
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[i] = column + i < a.columns ? s[i] * a.scale : -INFINITY;
    if constexpr (MASKED) apply_mask<VEC>(a, start, column, vectors, s);
  };
  for (int64_t column = part.first; column < a.columns; column += part.step) {
    read_scores(column);
    float higher = top;
#pragma unroll
    for (int i = 0; i < VEC; ++i) higher = maximum(higher, s[i]);
    if (higher == -INFINITY) continue;  // -inf - -inf would be NaN
    total *= exp_of(top - higher);
#pragma unroll
    for (int i = 0; i < VEC; ++i) total += exp_of(s[i] - higher);
    top = higher;
  }
  const float highest = shift_of<MASKED>(part.max(top));
  total = part.sum(total * exp_of(top - highest));
  const float share = share_of<MASKED>(total);
  for (int64_t column = part.first; column < a.columns; column += part.step) {
    read_scores(column);
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[i] = exp_of(s[i] - highest) * share;
    write<VEC, T>(y, column, a.columns, s);
  }
}

// dx = scale * y * (dy - sum(dy * y))
template <class T, int VEC>
KERNEL(kMostThreads)
softmax_bwd_kernel(const fastlm_softmax a, int rows_per_block) {
  constexpr int COUNT = kHeld / VEC;
  const Part<VEC> part(rows_per_block);
  if (part.row >= a.rows) return;  // a whole warp, and no block barrier follows
  const Global<const T> dy = Global<const T>(static_cast<const T*>(a.x)) + row_start(a.x_rows, part.row);
  const Global<const T> y = Global<const T>(static_cast<const T*>(a.saved)) + row_start(a.saved_rows, part.row);
  const Global<T> dx = Global<T>(static_cast<T*>(a.y)) + row_start(a.y_rows, part.row);
  float d[COUNT][VEC], p[COUNT][VEC], product = 0;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    const int64_t column = part.first + k * part.step;
    read<VEC, T>(dy, column, a.columns, 0.0f, d[k]);
    read<VEC, T>(y, column, a.columns, 0.0f, p[k]);
#pragma unroll
    for (int i = 0; i < VEC; ++i) product += d[k][i] * p[k][i];
  }
  product = part.sum(product);
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) d[k][i] = p[k][i] * (d[k][i] - product) * a.scale;
    write<VEC, T>(dx, part.first + k * part.step, a.columns, d[k]);
  }
}

template <class T, int VEC>
KERNEL(kMostThreads)
softmax_bwd_wide_kernel(const fastlm_softmax a) {
  const Part<VEC> part(1);
  const Global<const T> dy = Global<const T>(static_cast<const T*>(a.x)) + row_start(a.x_rows, part.row);
  const Global<const T> y = Global<const T>(static_cast<const T*>(a.saved)) + row_start(a.saved_rows, part.row);
  const Global<T> dx = Global<T>(static_cast<T*>(a.y)) + row_start(a.y_rows, part.row);
  float d[VEC], p[VEC], product = 0;
  for (int64_t column = part.first; column < a.columns; column += part.step) {
    read<VEC, T>(dy, column, a.columns, 0.0f, d);
    read<VEC, T>(y, column, a.columns, 0.0f, p);
#pragma unroll
    for (int i = 0; i < VEC; ++i) product += d[i] * p[i];
  }
  product = part.sum(product);
  for (int64_t column = part.first; column < a.columns; column += part.step) {
    read<VEC, T>(dy, column, a.columns, 0.0f, d);
    read<VEC, T>(y, column, a.columns, 0.0f, p);
#pragma unroll
    for (int i = 0; i < VEC; ++i) d[i] = p[i] * (d[i] - product) * a.scale;
    write<VEC, T>(dx, column, a.columns, d);
  }
}

bool aligned(const void* p, const fastlm_rows& rows, int elements) {
  return p == nullptr || (reinterpret_cast<uintptr_t>(p) % 16 == 0 && rows.outer_stride % elements == 0 &&
                          (rows.inner == 1 || rows.inner_stride % elements == 0));
}

template <class T, int VEC>
int start(const fastlm_softmax& a, void* stream) {
  constexpr bool HOLDS = VEC > 1;  // elements read one by one are read again: such rows are rare, and half the code to compile
  int threads = 32;
  while (threads < kMostThreads && static_cast<int64_t>(threads) * kHeld < a.columns) threads *= 2;
  if constexpr (HOLDS) {
    if (static_cast<int64_t>(threads) * kHeld >= a.columns) {
      const int per_block = threads == 32 ? kRowsPerBlock : 1;
      const Dim grid{static_cast<int>(ceil_div<int64_t>(a.rows, per_block))};
      const auto forward = a.mask ? softmax_fwd_kernel<T, VEC, true> : softmax_fwd_kernel<T, VEC, false>;
      return launch(a.saved ? softmax_bwd_kernel<T, VEC> : forward, grid, threads * per_block, 0, stream, a, per_block);
    }
  }
  const Dim grid{static_cast<int>(a.rows)};
  const auto forward = a.mask ? softmax_fwd_wide_kernel<T, VEC, true> : softmax_fwd_wide_kernel<T, VEC, false>;
  return launch(a.saved ? softmax_bwd_wide_kernel<T, VEC> : forward, grid, threads, 0, stream, a);
}

template <class T>
int start_for(const fastlm_softmax& a, void* stream) {
  constexpr int VEC = kVector<T>;
  const bool vectors = aligned(a.x, a.x_rows, VEC) && aligned(a.y, a.y_rows, VEC) && aligned(a.saved, a.saved_rows, VEC);
  return vectors ? start<T, VEC>(a, stream) : start<T, 1>(a, stream);
}

int start_checked(const fastlm_softmax& a, void* stream) {
  if (a.rows <= 0 || a.rows > 0x7fffffff || a.columns <= 0) return kInvalidValue;
  if ((a.mask != nullptr) != (a.mask_kind != FASTLM_MASK_NONE) || a.mask_kind < 0 || a.mask_kind > FASTLM_MASK_FLOAT16 ||
      (a.mask && (a.mask_middle <= 0 || a.mask_inner <= 0 || a.mask_middle > a.rows || a.mask_inner > a.rows))) {
    return kInvalidValue;
  }
  switch (a.dtype) {
    case FASTLM_FLOAT32: return start_for<float>(a, stream);
    case FASTLM_BFLOAT16: return start_for<bf16>(a, stream);
    case FASTLM_FLOAT16: return start_for<fp16>(a, stream);
    default: return kInvalidValue;
  }
}

}  // namespace

extern "C" int fastlm_softmax_fwd(const fastlm_softmax* args, void* stream) {
  return args->saved ? kInvalidValue : start_checked(*args, stream);
}

extern "C" int fastlm_softmax_bwd(const fastlm_softmax* args, void* stream) {
  return args->saved && !args->mask ? start_checked(*args, stream) : kInvalidValue;
}
