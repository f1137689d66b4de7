// AdamW over whole lists of tensors in one launch (fastlm/ops/adamw.py has the contract).
//
// A thread block updates half a block of one parameter, each of its warps 256 elements that follow each other: a lane has twice
// four of them, 128 apart. So every access of a warp covers one piece of memory: 16 bytes to a lane of fp32, 8 of 16-bit
// numbers, 4 of 8-bit codes; all are under way before the first is used. 256 elements are also what shares a scale of 8-bit
// codes, whose largest value one warp finds by itself.
//
// What the lists hold (fp32, 16 bits, codes; master, remainder or neither) is decided at run time, alike for the whole launch:
// four kernels serve all combinations. Every mode computes the same fp32 weight to the last bit. Formats:
// fastlm/ops/master_weights.py and block_quantize.py.

#include "adamw.h"
#include "adamw_lists.h"

namespace {

constexpr int kThreads = 128;
constexpr uint32_t kQuietNan = 0x7fc00000;     // the quiet NaN whose lower 16 bits are 0
constexpr uint32_t kCodes = 0x80000000;        // what tells a parameter's random numbers for codes from those for its weights
constexpr int kInvalidValue = 1;               // cudaErrorInvalidValue
constexpr int kShare = kThreads / 32 * kWarp;  // elements of a thread block
constexpr int kShares = FASTLM_TABLE_BLOCK / kShare;
static_assert(kShares * kShare == FASTLM_TABLE_BLOCK, "thread blocks share out a block of the table");

// 1 - beta^step. The series where the difference would cancel: at step 1 fp32 keeps 4 digits of 1 - 0.999.
DEVICE float one_minus_power(float log_beta, float step) {
  const float x = log_beta * step;
  float series = 1.0f + x / 9;
#pragma unroll
  for (int n = 8; n >= 2; --n) series = fmaf(x * (1.0f / n), series, 1.0f);
  return x > -0.5f ? -x * series : 1.0f - exp2f(x * 1.4426950408889634f);
}

// A number that is given by value, or on the device.
DEVICE float number(const float* at, float value) {
  if (at) value = Global<const float>(at)[0];
  return value;
}

// beta old + rest new, of beta in two parts. Explicit fused operations: what a compiler contracts may differ from one instance of
// the kernel to the next.
DEVICE float mean(float old, float high, float low, float rest, float next) {
  return fmaf(high, old, fmaf(rest, next, low * old));
}

// From x to w by `rest` in [0, 1], from the nearer end: an x that is given up leaves no rounding of its own.
DEVICE float between(float x, float w, float rest) {
  return rest < 0.5f ? fmaf(rest, w - x, x) : fmaf(rest - 1.0f, w - x, w);
}

// What a step does to every element.
struct Step {
  float decay, rate, root, scale;  // lr * weight_decay, lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step), of gradients

  DEVICE Step(const fastlm_adamw& a, float step) {
    const float lr = number(a.lr_at, a.lr);
    decay = lr * a.weight_decay;
    rate = lr / one_minus_power(a.log_beta1, step);
    root = 1.0f / sqrtf(one_minus_power(a.log_beta2, step));
    scale = number(a.grad_scale_at, a.grad_scale);
  }

  DEVICE void operator()(const fastlm_adamw& a, bool codes, float g, float& w, float& m, float& v) const {
    const float scaled = g * scale;
    if (codes) {  // they are rounded one by one: where v came out too small for its m, the step would be many times lr
      const float bound = m * a.least;
      if (bound * bound > v) v = bound * bound;  // NaN in v stays
    }
    m = mean(m, a.high1, a.low1, a.rest1, scaled);
    v = mean(v, a.high2, a.low2, a.rest2 * scaled, scaled);
    w = fmaf(-decay, w, w);
    w -= rate * m / fmaf(sqrtf(v), root, a.eps);
  }
};

// One warp's elements of a parameter: those from `first` on.
struct Row {
  const fastlm_adamw& a;
  int32_t owner;
  int64_t first, size;

  DEVICE int left(int group) const {
    const int64_t rest = size - first - group * kGroupStride - lane_id() * kLane;
    return rest < 0 ? 0 : rest < kLane ? static_cast<int>(rest) : kLane;
  }

  DEVICE uint64_t address(int column) const {
    const int64_t found = Global<const int64_t>(a.table.addresses)[static_cast<int64_t>(owner) * FASTLM_ADAMW_LISTS + column];
    return static_cast<uint64_t>(found);
  }

  DEVICE bool has(int column) const { return a.formats[column] != FASTLM_ABSENT; }

  DEVICE List list(int column) const {  // one that it has
    const int32_t format = a.formats[column];
    const int bytes = format == FASTLM_FLOAT32 ? 4 : format <= FASTLM_INT16 ? 2 : 1;
    const uint64_t base = address(column);
    return {pointer_at<uint8_t>(base) + (first + lane_id() * kLane) * bytes, format, base % (kLane * bytes) == 0};
  }

  // The scale of the warp's elements.
  DEVICE Global<float> scale(int column) const { return pointer_at<float>(address(column)) + first / kWarp; }

  DEVICE RandomWords random_words(int64_t counter, uint32_t other, float step) const {
    const Global<const int64_t> seed(a.seed);
    const int64_t key = seed[0], offset = seed[1];
    const int32_t stream = Global<const int32_t>(a.streams)[owner];
    return philox(key, static_cast<uint32_t>(counter), static_cast<uint32_t>(stream) ^ other,
                  static_cast<uint32_t>(static_cast<int32_t>(step)), static_cast<uint32_t>(offset));
  }
};

// A random half word for each of a lane's elements. The words of one call of philox are for eight elements: the groups of two
// lanes that are neighbours. Each of the two makes the call for one group, and they exchange halves.
struct WeightWords {
  uint32_t word[kGroups][2];

  DEVICE void draw(const Row& row, float step) {
    const bool odd = lane_id() % 2;
    const int64_t i = row.first + (odd ? kGroupStride : 0) + lane_id() / 2 * (2 * kLane);
    const RandomWords mine = row.random_words(i / (2 * kLane), 0, step);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t other = shuffle_xor(odd ? mine.word[k] : mine.word[2 + k], 1);
      word[0][k] = odd ? other : mine.word[k];
      word[1][k] = odd ? mine.word[2 + k] : other;
    }
  }

  DEVICE uint32_t half(int group, int i) const { return i % 2 ? word[group][i / 2] >> 16 : word[group][i / 2] & 0xffff; }
};

// A state of one warp's elements: exp_avg (signed) or exp_avg_sq. CODES: whether it may be 8-bit codes.
template <bool CODES, bool SIGNED>
struct State {
  static constexpr int kScales = SIGNED ? FASTLM_ADAMW_EXP_AVG_SCALE : FASTLM_ADAMW_EXP_AVG_SQ_SCALE;
  const Row& row;
  List values;
  Four raw[kGroups];
  float scale = 0;

  DEVICE State(const Row& row) : row(row), values(row.list(SIGNED ? FASTLM_ADAMW_EXP_AVG : FASTLM_ADAMW_EXP_AVG_SQ)) {}

  DEVICE void get() {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) values.get<CODES>(j, row.left(j), raw[j]);
    if (coded() && row.first < row.size) scale = row.scale(kScales)[0];
  }

  DEVICE bool coded() const { return CODES && row.has(kScales); }

  DEVICE void floats(int group, float (&x)[kLane]) const {
    if (coded()) {
      from_codes(raw[group], SIGNED, scale, x);
    } else {
      to_floats(raw[group], values.format, x);
    }
  }

  // The new scale of codes: the largest magnitude; infinite if one is not finite. What lies beyond the tensor's end is 0.
  DEVICE void rescale(const float (&x)[kGroups][kLane]) {
    if (!coded()) return;
    scale = 0;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
#pragma unroll
      for (int i = 0; i < kLane; ++i) scale = maximum(scale, fabsf(x[j][i]) < INFINITY ? fabsf(x[j][i]) : INFINITY);
    }
    scale = warp_max(scale);
    warp_barrier();  // every lane has read the old one
    if (lane_id() == 0 && row.first < row.size) row.scale(kScales)[0] = scale;
  }

  // words: a random one for each element, of which either state has a half.
  DEVICE void put(int group, const float (&x)[kLane], bool random, const RandomWords& words) const {
    Four out;
    if (coded()) {
      out.word[0] = 0;
#pragma unroll
      for (int i = 0; i < kLane; ++i) {
        const uint32_t half = SIGNED ? words.word[i] & 0xffff : words.word[i] >> 16;
        out.word[0] |= code_of(x[i], scale, SIGNED, random, half) << 8 * i;
      }
    } else {
      from_floats(x, values.format, out);
    }
    values.put<CODES>(group, row.left(group), out);
  }
};

// The new weights into the parameter and what belongs to it.
template <bool AVERAGE>
DEVICE void put_weights(const Row& row, const float (&w)[kGroups][kLane], const Four (&averages)[kGroups], float step_number) {
  const fastlm_adamw& a = row.a;
  const bool has_remainder = row.has(FASTLM_ADAMW_REMAINDER), has_master = row.has(FASTLM_ADAMW_MASTER);
  const List param = row.list(FASTLM_ADAMW_PARAM);
  WeightWords words = {};
  if (a.random_weights) words.draw(row, step_number);
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int left = row.left(j);
    Four out;
    if constexpr (AVERAGE) {
      const List average = row.list(FASTLM_ADAMW_AVERAGE);
      float x[kLane];
      to_floats(averages[j], average.format, x);
#pragma unroll
      for (int i = 0; i < kLane; ++i) x[i] = between(x[i], w[j][i], a.average_rest);
      from_floats(x, average.format, out);
      average.put(j, left, out);
    }
    if (has_remainder || a.random_weights) {
      Four low;
#pragma unroll
      for (int i = 0; i < kLane; i += 2) {
        uint32_t bits[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) bits[k] = w[j][i + k] == w[j][i + k] ? float_bits(w[j][i + k]) : kQuietNan;
        low.word[i / 2] = (bits[0] & 0xffff) | bits[1] << 16;  // the remainder, as a signed number
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          uint32_t raised = bits[k] + (has_remainder ? 0x8000 : words.half(j, i + k));  // to nearest, ties away from zero
          if (!has_remainder && (raised >> 16 & 0x7fff) == 0x7f80) raised = bits[k];    // never inf of what is finite
          bits[k] = raised >> 16;
        }
        out.word[i / 2] = bits[0] | bits[1] << 16;
      }
      if (has_remainder) row.list(FASTLM_ADAMW_REMAINDER).put(j, left, low);
    } else {
      if (has_master) {
        from_floats(w[j], FASTLM_FLOAT32, out);
        row.list(FASTLM_ADAMW_MASTER).put(j, left, out);
      }
      from_floats(w[j], param.format, out);
    }
    param.put(j, left, out);
  }
}

// CODES: whether a state may be 8-bit codes; AVERAGE: whether there are averages.
template <bool CODES, bool AVERAGE>
DEVICE void update(const Row& row) {
  const fastlm_adamw& a = row.a;
  const bool has_remainder = row.has(FASTLM_ADAMW_REMAINDER);
  Four weights[kGroups], remainders[kGroups], grads[kGroups], averages[kGroups];
  const List source = row.list(row.has(FASTLM_ADAMW_MASTER) ? FASTLM_ADAMW_MASTER : FASTLM_ADAMW_PARAM);
  const List grad = row.list(FASTLM_ADAMW_GRAD);
  State<CODES, true> first(row);
  State<CODES, false> second(row);
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    const int left = row.left(j);
    source.get(j, left, weights[j]);
    if (has_remainder) row.list(FASTLM_ADAMW_REMAINDER).get(j, left, remainders[j]);
    grad.get(j, left, grads[j]);
    if constexpr (AVERAGE) row.list(FASTLM_ADAMW_AVERAGE).get(j, left, averages[j]);
  }
  first.get();
  second.get();

  const float step_number = number(a.step_at, a.step);
  const Step step(a, step_number);
  float w[kGroups][kLane], m[kGroups][kLane], v[kGroups][kLane];
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    float g[kLane];
    to_floats(grads[j], grad.format, g);
    to_floats(weights[j], source.format, w[j]);
    first.floats(j, m[j]);
    second.floats(j, v[j]);
#pragma unroll
    for (int i = 0; i < kLane; ++i) {
      if (has_remainder) {
        const int32_t rest = static_cast<int16_t>(half_of(remainders[j], i));
        w[j][i] = bits_float(float_bits(w[j][i]) + static_cast<uint32_t>(rest));
      }
      step(a, first.coded() || second.coded(), g[i], w[j][i], m[j][i], v[j][i]);
    }
  }

  first.rescale(m);
  second.rescale(v);
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    RandomWords pairs = {};
    if (CODES && a.random_codes) {
      pairs = row.random_words((row.first + j * kGroupStride) / kLane + lane_id(), kCodes, step_number);
    }
    first.put(j, m[j], a.random_codes, pairs);
    second.put(j, v[j], a.random_codes, pairs);
  }
  put_weights<AVERAGE>(row, w, averages, step_number);
}

template <bool CODES, bool AVERAGE>
KERNEL(kThreads, CODES || AVERAGE ? 5 : 6)
adamw_kernel(const fastlm_adamw a) {
  const int32_t owner = Global<const int32_t>(a.table.owners)[block_x() / kShares];
  const int32_t block = Global<const int32_t>(a.table.blocks)[block_x() / kShares];
  if (a.found_inf) {
    const float found = Global<const float>(a.found_inf)[0];
    if (found != 0) return;
  }
  const int64_t size = Global<const int64_t>(a.table.sizes)[owner];
  // Warps beyond a tensor's end go along with nothing to do: no access waits for a decision on its size.
  const int64_t first = static_cast<int64_t>(block) * FASTLM_TABLE_BLOCK + block_x() % kShares * kShare + warp_id() * kWarp;
  update<CODES, AVERAGE>({a, owner, first, size});
}

}  // namespace

extern "C" int fastlm_adamw_step(const fastlm_adamw* args, void* stream) {
  const fastlm_adamw& a = *args;
  if (a.table.count <= 0 || a.table.count > 0x7fffffff / kShares) return kInvalidValue;
  const auto has = [&](int column) { return a.formats[column] != FASTLM_ABSENT; };
  const bool codes = has(FASTLM_ADAMW_EXP_AVG_SCALE) || has(FASTLM_ADAMW_EXP_AVG_SQ_SCALE), average = has(FASTLM_ADAMW_AVERAGE);
  const auto kernel = codes ? (average ? adamw_kernel<true, true> : adamw_kernel<true, false>)
                            : (average ? adamw_kernel<false, true> : adamw_kernel<false, false>);
  return launch(kernel, Dim{static_cast<int>(a.table.count) * kShares}, kThreads, 0, stream, a);
}
