// 16-bit floats and the approximate functions. Conversions give the bits of cvt.rn, NaN (0x7fff) included.
#pragma once

namespace device {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(fp16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = (x.bits >> 10) & 31, fraction = x.bits & 0x3ff;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  return bits_float(sign | (exponent + 112) << 23 | fraction << 13);
}

template <class T>
inline T from_float(float x) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, bf16> || std::is_same_v<T, fp16>,
                "from_float gives float, bf16 or fp16");
  const uint32_t u = float_bits(x), magnitude = u & 0x7fffffffu, sign = u >> 16 & 0x8000u;
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if (magnitude > 0x7f800000u) {
    return T{0x7fff};
  } else if constexpr (std::is_same_v<T, bf16>) {
    return T{static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    return T{static_cast<uint16_t>(sign | 0x7c00u)};
  } else if (magnitude < 0x38800000u) {  // a denormal fp16: a multiple of 2^-24, rounded by the addition
    const uint32_t fraction = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
    return T{static_cast<uint16_t>(sign | fraction)};
  } else {
    const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
    return T{static_cast<uint16_t>(sign | (rounded - 0x38000000u) >> 13)};
  }
}

namespace host {
// What .ftz does to denormals.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
}  // namespace host

// The exact function, rounded once. The hardware's errors: cuda.h.
inline float fast_exp2(float x) { return host::flushed(static_cast<float>(std::exp2(static_cast<double>(x)))); }
inline float fast_log2(float x) { return static_cast<float>(std::log2(static_cast<double>(host::flushed(x)))); }
inline float fast_rsqrt(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(host::flushed(x)))); }
inline float fast_reciprocal(float x) { return host::flushed(static_cast<float>(1.0 / static_cast<double>(host::flushed(x)))); }
inline float fast_tanh(float x) { return static_cast<float>(std::tanh(static_cast<double>(x))); }

}  // namespace device
