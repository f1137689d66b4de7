// RMSNorm forward, with an optional dropout and residual add before it (fastlm/ops/rms_norm.py has the contract).
//
// A warp owns a row of up to 64 vectors of 16 bytes of x, four such rows to a block; a block owns a wider row. Up to 2048 vectors
// a row is read once and stays in registers between its sum and its result; a wider one is read again, from the cache. Rows
// that are not all aligned to 16 bytes are read element by element.

#include "device/device.h"
#include "rms_norm.h"

namespace {

using namespace device;

constexpr int kMostThreads = 1024;
constexpr int kHeld = 2;           // vectors of a row in the registers of a thread
constexpr int kRowsPerBlock = 4;   // where a warp owns a row
constexpr int kInvalidValue = 1;   // cudaErrorInvalidValue

template <int N, class T>
DEVICE void read(Global<const T> p, float (&out)[N], Where at = Where::current()) {
  constexpr int W = minimum(N, kVector<T>);
#pragma unroll
  for (int i = 0; i < N; i += W) {
    const Vector<T, W> v = load_vector<W>(p + i, at);
#pragma unroll
    for (int j = 0; j < W; ++j) out[i + j] = to_float(v[j]);
  }
}

// Writes s as T, and leaves in s what was written.
template <int N, class T>
DEVICE void write(Global<T> p, float (&s)[N], Where at = Where::current()) {
  constexpr int W = minimum(N, kVector<T>);
#pragma unroll
  for (int i = 0; i < N; i += W) {
    Vector<T, W> v;
#pragma unroll
    for (int j = 0; j < W; ++j) {
      v[j] = from_float<T>(s[i + j]);
      s[i + j] = to_float(v[j]);
    }
    store_vector(p + i, v, at);
  }
}

DEVICE int64_t row_start(const fastlm_rows& at, int64_t row) {
  return at.inner == 1 ? row * at.outer_stride : row / at.inner * at.outer_stride + row % at.inner * at.inner_stride;
}

// Drops elements of s, which begin at a column, a multiple of N: word column % 4 of counter (column / 4, row, 0, offset).
template <int N>
DEVICE void drop(float (&s)[N], const fastlm_rms_norm& a, int64_t row, int64_t column) {
  const Global<const int64_t> seed(a.seed);
  const int64_t key = seed[0], offset = seed[1];
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const RandomWords random =
        philox(key, static_cast<uint32_t>((column + i) / 4), static_cast<uint32_t>(row), 0, static_cast<uint32_t>(offset));
#pragma unroll
    for (int j = 0; j < minimum(N, 4); ++j) {
      uint32_t word = random.word[j];
      if constexpr (N == 1) {  // no index known only at run time into registers
        const int which = static_cast<int>(column % 4);
        word = which == 0 ? random.word[0] : which == 1 ? random.word[1] : which == 2 ? random.word[2] : random.word[3];
      }
      s[i + j] = word >= a.threshold ? s[i + j] * a.grown : 0.0f;
    }
  }
}

// X: dtype of x and y, P: of weight and bias, R: of the residual. VEC elements of a row at a time; HELD times VEC of them in
// registers, or 0.
template <class X, class P, class R, int VEC, int HELD>
struct RmsNormRow {
  const fastlm_rms_norm& a;
  int64_t row;
  Global<const X> x;
  Global<const R> residual;
  Global<R> residual_out;
  Global<X> y;
  Global<const P> weight, bias;

  DEVICE RmsNormRow(const fastlm_rms_norm& args, int64_t index)
      : a(args),
        row(index),
        x(static_cast<const X*>(a.x) + row_start(a.x_rows, row)),
        residual(static_cast<const R*>(a.residual) + (a.residual ? row_start(a.residual_rows, row) : 0)),
        residual_out(static_cast<R*>(a.residual_out) + (a.residual ? row * a.columns : 0)),
        y(static_cast<X*>(a.y) + row * a.columns),
        weight(static_cast<const P*>(a.weight)),
        bias(static_cast<const P*>(a.bias)) {}

  // What is normalised, from column on; written to residual_out.
  DEVICE void sum_at(int64_t column, float (&s)[VEC]) const {
    read<VEC, X>(x + column, s);
    if (a.seed) drop(s, a, row, column);
    if (!a.residual) return;
    float r[VEC];
    read<VEC, R>(residual + column, r);
#pragma unroll
    for (int i = 0; i < VEC; ++i) s[i] += r[i];
    write<VEC, R>(residual_out + column, s);
  }

  DEVICE void result_at(int64_t column, float (&s)[VEC], float rstd) const {
    float w[VEC], b[VEC];
    if (a.weight) read<VEC, P>(weight + column, w);
    if (a.bias) read<VEC, P>(bias + column, b);
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      s[i] *= rstd;
      if (a.round_first) s[i] = to_float(from_float<X>(s[i]));
      if (a.weight) s[i] *= a.weight_offset + w[i];
      if (a.bias) s[i] += b[i];
    }
    write<VEC, X>(y + column, s);
  }
};

template <int VEC>
DEVICE float squares_of(const float (&s)[VEC]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum += s[i] * s[i];
  return sum;
}

template <class X, class P, class R, int VEC, int HELD>
KERNEL(kMostThreads)
rms_norm_fwd_kernel(const fastlm_rms_norm a, int rows_per_block) {
  const bool owned_by_block = rows_per_block == 1;
  const int width = owned_by_block ? block_threads() : 32;
  const int position = owned_by_block ? thread_id() : lane_id();
  const int64_t row = owned_by_block ? block_x() : static_cast<int64_t>(block_x()) * rows_per_block + warp_id();
  if (row >= a.rows) return;  // a whole warp, and only where no block barrier follows
  const RmsNormRow<X, P, R, VEC, HELD> r(a, row);
  const auto rstd_of = [&](float squares) {
    const float sum = owned_by_block ? block_sum(squares) : warp_sum(squares);
    const float rstd = 1.0f / sqrtf(sum / static_cast<float>(a.columns) + a.eps);
    const Global<float> out(a.rstd);
    if (position == 0) out[row] = rstd;
    return rstd;
  };
  const int64_t first = static_cast<int64_t>(position) * VEC, step = static_cast<int64_t>(width) * VEC;
  float squares = 0;
  if constexpr (HELD > 0) {
    float s[HELD][VEC];
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (first + k * step < a.columns) {
        r.sum_at(first + k * step, s[k]);
        squares += squares_of(s[k]);
      }
    }
    const float rstd = rstd_of(squares);
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (first + k * step < a.columns) r.result_at(first + k * step, s[k], rstd);
    }
  } else {
    float s[VEC];
    for (int64_t column = first; column < a.columns; column += step) {
      r.sum_at(column, s);
      squares += squares_of(s);
    }
    const float rstd = rstd_of(squares);
    for (int64_t column = first; column < a.columns; column += step) {
      if (a.residual) {
        read<VEC, R>(Global<const R>(r.residual_out) + column, s);  // as this thread wrote it
      } else {
        r.sum_at(column, s);
      }
      r.result_at(column, s, rstd);
    }
  }
}

// Whether rows that begin at p can be read in 16-byte accesses.
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
bool aligned(const fastlm_rows& rows, int64_t by) { return rows.outer_stride % by == 0 && rows.inner_stride % by == 0; }

template <class X, class P, class R>
int start(const fastlm_rms_norm& a, void* stream) {
  constexpr int VEC = 16 / sizeof(X);
  const bool vectors = a.columns % VEC == 0 && aligned(a.x) && aligned(a.y) && aligned(a.weight) && aligned(a.bias) &&
                       aligned(a.residual) && aligned(a.residual_out) && aligned(a.x_rows, VEC) &&
                       (!a.residual || aligned(a.residual_rows, VEC));
  const int64_t held = static_cast<int64_t>(kHeld) * (vectors ? VEC : 1);
  int width = 32;
  while (width < kMostThreads && width * held < a.columns) width *= 2;
  const int per_block = width == 32 ? kRowsPerBlock : 1;
  const auto kernel = !vectors                     ? rms_norm_fwd_kernel<X, P, R, 1, 0>
                      : width * held < a.columns   ? rms_norm_fwd_kernel<X, P, R, VEC, 0>
                                                   : rms_norm_fwd_kernel<X, P, R, VEC, kHeld>;
  const Dim grid{static_cast<int>((a.rows + per_block - 1) / per_block)};
  return launch(kernel, grid, width * per_block, 0, stream, a, per_block);
}

template <class X>
int start_for(const fastlm_rms_norm& a, void* stream) {
  const bool wide_parameters = a.parameter_dtype == FASTLM_FLOAT32, wide_residual = a.residual_dtype == FASTLM_FLOAT32;
  if (wide_parameters) return wide_residual ? start<X, float, float>(a, stream) : start<X, float, X>(a, stream);
  return wide_residual ? start<X, X, float>(a, stream) : start<X, X, X>(a, stream);
}

}  // namespace

extern "C" int fastlm_rms_norm_fwd(const fastlm_rms_norm* args, void* stream) {
  const fastlm_rms_norm& a = *args;
  for (const int32_t dtype : {a.parameter_dtype, a.residual_dtype}) {
    if (dtype != a.x_dtype && dtype != FASTLM_FLOAT32) return kInvalidValue;
  }
  if (a.rows <= 0 || a.rows > 0x7fffffff || a.columns <= 0) return kInvalidValue;
  switch (a.x_dtype) {
    case FASTLM_FLOAT32: return start<float, float, float>(a, stream);
    case FASTLM_BFLOAT16: return start_for<bf16>(a, stream);
    case FASTLM_FLOAT16: return start_for<fp16>(a, stream);
    default: return kInvalidValue;
  }
}
