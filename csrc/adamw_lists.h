// How a lane's elements lie in AdamW's lists (fp32, 16 bits, 8-bit codes), and what they become in registers.
#pragma once

#include "adamw.h"
#include "device/device.h"

namespace {

using namespace device;

constexpr int kLane = 4;                       // elements of a lane that follow each other,
constexpr int kGroups = 2;                     // and how often
constexpr int kGroupStride = 32 * kLane;       // elements from one of a lane's groups to the next
constexpr int kWarp = kGroups * kGroupStride;  // elements of a warp; those that share a scale

// Four elements as they lie in memory, in as many words as they fill.
struct Four {
  uint32_t word[4];
};

// Of the lane's four elements the first `left`: in one access where it is aligned, as all are but a tensor's last and those of
// tensors that begin anywhere.
template <class T>
DEVICE void read(Global<const T> p, bool whole, int left, Four& to, Where at) {
  Vector<T, kLane> v;
  if (whole) {
    v = load_vector<kLane, Cache::streaming>(p, at);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) v[i] = i < left ? load_vector<1>(p + i, at)[0] : T(0);
  }
  memcpy(to.word, &v, sizeof(v));
}

template <class T>
DEVICE void write(Global<T> p, bool whole, int left, const Four& from, Where at) {
  Vector<T, kLane> v;
  memcpy(&v, from.word, sizeof(v));
  if (whole) {
    store_vector<Cache::streaming>(p, v, at);
  } else {
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      if (i < left) store_vector(p + i, Vector<T, 1>{{v[i]}}, at);
    }
  }
}

// A lane's elements of a parameter's tensor in one list.
struct List {
  Global<uint8_t> place;  // of the first
  int32_t format;
  bool aligned;

  // Group `group`, of which `left` elements are there. CODES: whether the format may be one of 8 bits.
  template <bool CODES = false>
  DEVICE void get(int group, int left, Four& to, Where at = Where::current()) const {
    const bool whole = aligned && left == kLane;
    if (format == FASTLM_FLOAT32) {
      read(pointer_cast<const uint32_t>(place) + group * kGroupStride, whole, left, to, at);
    } else if (!CODES || format <= FASTLM_INT16) {
      read(pointer_cast<const uint16_t>(place) + group * kGroupStride, whole, left, to, at);
    } else {
      read(pointer_cast<const uint8_t>(place) + group * kGroupStride, whole, left, to, at);
    }
  }

  template <bool CODES = false>
  DEVICE void put(int group, int left, const Four& from, Where at = Where::current()) const {
    const bool whole = aligned && left == kLane;
    if (format == FASTLM_FLOAT32) {
      write(pointer_cast<uint32_t>(place) + group * kGroupStride, whole, left, from, at);
    } else if (!CODES || format <= FASTLM_INT16) {
      write(pointer_cast<uint16_t>(place) + group * kGroupStride, whole, left, from, at);
    } else {
      write(pointer_cast<uint8_t>(place) + group * kGroupStride, whole, left, from, at);
    }
  }
};

template <class T>
DEVICE float sixteen_to_float(uint32_t bits) {
  const uint16_t low = static_cast<uint16_t>(bits);
  T x;
  memcpy(&x, &low, 2);
  return to_float(x);
}

template <class T>
DEVICE uint32_t sixteen_from_float(float x) {
  const T v = from_float<T>(x);
  uint16_t bits;
  memcpy(&bits, &v, 2);
  return bits;
}

DEVICE uint32_t half_of(const Four& four, int i) { return i % 2 ? four.word[i / 2] >> 16 : four.word[i / 2] & 0xffff; }

DEVICE void to_floats(const Four& from, int32_t format, float (&x)[kLane]) {
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    if (format == FASTLM_FLOAT32) {
      x[i] = bits_float(from.word[i]);
    } else if (format == FASTLM_BFLOAT16) {
      x[i] = bits_float(half_of(from, i) << 16);
    } else {
      x[i] = sixteen_to_float<fp16>(half_of(from, i));
    }
  }
}

DEVICE void from_floats(const float (&x)[kLane], int32_t format, Four& to) {
  if (format == FASTLM_FLOAT32) {
#pragma unroll
    for (int i = 0; i < kLane; ++i) to.word[i] = float_bits(x[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kLane; i += 2) {
    if (format == FASTLM_BFLOAT16) {
      to.word[i / 2] = sixteen_from_float<bf16>(x[i]) | sixteen_from_float<bf16>(x[i + 1]) << 16;
    } else {
      to.word[i / 2] = sixteen_from_float<fp16>(x[i]) | sixteen_from_float<fp16>(x[i + 1]) << 16;
    }
  }
}

DEVICE float power(float t, bool is_signed) {
  const float fourth = (t * t) * (t * t);
  return is_signed ? fourth : fourth * fourth;
}

// int8 for first moments, uint8 for second ones.
DEVICE void from_codes(const Four& from, bool is_signed, float scale, float (&x)[kLane]) {
#pragma unroll
  for (int i = 0; i < kLane; ++i) {
    const uint32_t byte = from.word[0] >> 8 * i & 0xff;
    // These two constants give exactly 1 for the largest code.
    const float part = is_signed ? static_cast<float>(static_cast<int8_t>(byte)) * 0.007874015748031496f
                                 : static_cast<float>(byte) * 0.00392156862745098f;
    const float value = power(part, is_signed) * scale;
    x[i] = part < 0 ? -value : value;
  }
}

// The code of a state x whose block has this scale. half: a random number in [0, 65536).
DEVICE uint32_t code_of(float x, float scale, bool is_signed, bool random, uint32_t half) {
  const float top = is_signed ? 127.0f : 255.0f;
  const bool usable = scale > 0 && scale < INFINITY;
  const float part = usable ? fabsf(x) / scale : 0.0f;
  float root = sqrtf(sqrtf(part));
  if (!is_signed) root = sqrtf(root);
  root *= top;
  float code;
  if (random) {
    code = floorf(root);
    const float exact = power(root, is_signed), low = power(code, is_signed), high = power(code + 1.0f, is_signed);
    const float uniform = (static_cast<float>(half) + 0.5f) * 0x1p-16f;
    if (uniform * (high - low) < exact - low) code += 1.0f;
  } else {
    code = floorf(root + 0.5f);
  }
  code = code < top ? code : top;
  if (!is_signed && part > 0 && code < 1.0f) code = 1.0f;  // what is not zero stays so: it divides
  const int value = static_cast<int>(is_signed && x < 0 ? -code : code);
  return static_cast<uint32_t>(value) & 0xff;
}

}  // namespace
