// One token a row from filtered logits, in one launch (fastlm/ops/sample.py has the contract).
//
// A block owns a row, or, where rows are few and wide, a cluster of up to 8: these share the passes over the row, and their first
// block searches and draws. Every filter keeps what is at or above a threshold, so nothing is sorted: a threshold is searched for
// two bits at a time on the ordered bits of floats, by counting (top-k) or weighing (top-p) what lies above. That sorting is not
// needed is FlashInfer's observation (Ye et al. 2025, arXiv:2501.01005), whose kernels search among probabilities. Here the
// search runs on a thousand or two candidates in shared memory: those at least as large as the k-th largest of the threads' own
// maxima, of which there are k for certain and seldom many more. Where they are too many, or hold too little of the mass, it runs
// on the row itself.
//
// Masses are integers, exp(s) * 2^40 rounded down: their sum is the same in every order, so that candidates may be collected in
// any. The draw is the largest of s + Gumbel noise (Gumbel-max): no running sum, and rounding moves it only between near ties.

#include "device/cluster.h"
#include "device/device.h"
#include "sample.h"

namespace {

using namespace device;

constexpr int kMostThreads = 512, kMostWarps = kMostThreads / 32;
constexpr int kHeld = 2048;       // candidates that shared memory holds
constexpr int kAhead = 4;         // vectors that a thread has in flight
constexpr int kBlocksOfGpu = 132;
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
constexpr int kMostColumns = (1 << 24) - 1;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLargest = 3.4028235e38f;
constexpr float kMostNoise = 23.0f;  // the smallest exponential variate is 2^-33
constexpr float kSmallest = 1.4012985e-45f;
constexpr uint64_t kNothing = 0;  // less than every packed key
constexpr uint32_t kNan = 0xffffffffu, kMinusInfinity = 0x007fffffu;  // keys
constexpr uint32_t kStream = 0x73616d70u;  // third word of the counter: other numbers than dropout's

// Ordered as the numbers are, NaN above all, one key for both zeros.
DEVICE uint32_t key_of(float x) {
  if (x != x) return kNan;
  const uint32_t bits = float_bits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float value_of(uint32_t key) { return bits_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// A key and an index in one number: of equal keys the first index is the largest.
DEVICE uint64_t pack(uint32_t key, int index) { return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(index); }
DEVICE int index_of(uint64_t packed) { return static_cast<int>(~static_cast<uint32_t>(packed)); }

// A row, or the part of it that a block of a cluster reads.
template <class T>
struct Row {
  Global<const T> x;
  int columns;
  int shift;        // elements from a multiple of 16 bytes to the first one
  int first, step;  // where this thread begins, and how far it is to its next vector

  DEVICE float operator[](int i) const { return to_float(load_vector<1>(x + i)[0]); }
};

template <class T>
constexpr int kLowestBit = sizeof(T) == 4 ? 0 : std::is_same_v<T, bf16> ? 16 : 12;  // of a key that says something; even

// A vector of kVector<T> elements as words, in and out of which they are shifted: as elements the compiler moves those of 16 bits
// one by one, and waits for one vector before it asks for the next.
using Words = Vector<uint32_t, 4>;

template <class T>
DEVICE void put(Words& words, int i, T x) {
  std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t> bits;
  memcpy(&bits, &x, sizeof(T));
  words[i * sizeof(T) / 4] |= static_cast<uint32_t>(bits) << i * sizeof(T) % 4 * 8;
}

template <class T>
DEVICE float value_at(const Words& words, int i) {
  const auto bits = static_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>(words[i * sizeof(T) / 4] >>
                                                                                       i * sizeof(T) % 4 * 8);
  T x;
  memcpy(&x, &bits, sizeof(T));
  return to_float(x);
}

// Elements shift to shift + kVector<T> of two vectors.
template <class T>
DEVICE Words realigned(const Words& low, const Words& high, int shift) {
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = low[i], w[i + 4] = high[i];
  const int word = 4 / sizeof(T);  // elements of one
#pragma unroll
  for (int i = 0; i < 6; ++i) w[i] = shift & 2 * word ? w[i + 2] : w[i];
#pragma unroll
  for (int i = 0; i < 5; ++i) w[i] = shift & word ? w[i + 1] : w[i];
  Words v;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[i] = sizeof(T) == 4 ? w[i] : static_cast<uint32_t>((uint64_t{w[i + 1]} << 32 | w[i]) >> (16 * (shift & 1)));
  }
  return v;
}

// f(first, values) for each of this thread's groups of kVector<T> neighbours; past the end they are -inf. Rows that do not begin
// at 16 bytes (those of an odd vocabulary) are read in vectors too, two for each. What would reach beyond the row is read element
// by element; that is in a loop, as it is seldom and would else be most of the kernel.
template <class T, class F>
DEVICE void over_row(const Row<T>& row, F f, Where at = Where::current()) {
  constexpr int VEC = kVector<T>;
  const int reach = row.shift == 0 ? VEC : 2 * VEC - row.shift;
  const auto inside = [&](int begin) { return begin >= row.shift && begin + reach <= row.columns; };
  for (int first = row.first; first < row.columns; first += kAhead * row.step) {
    Words read[kAhead] = {}, next[kAhead] = {};
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int begin = first + k * row.step;
      if (inside(begin)) {
        const Global<const uint32_t> from = pointer_cast<const uint32_t>(row.x + begin - row.shift);
        read[k] = load_vector<4>(from, at);
        if (row.shift != 0) next[k] = load_vector<4>(from + 4, at);
      }
    }
    if (row.shift != 0) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) read[k] = realigned<T>(read[k], next[k], row.shift);
    }
    if (!inside(first) || !inside(first + (kAhead - 1) * row.step)) {
#pragma unroll 1
      for (int k = 0; k < kAhead; ++k) {
        const int begin = first + k * row.step;
        if (inside(begin) || begin >= row.columns) continue;
        Words edge = {};
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          T element = from_float<T>(-INFINITY);
          if (begin + i < row.columns) element = load_vector<1>(row.x + begin + i, at)[0];
          put(edge, i, element);
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (j == k) read[j] = edge;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      float values[VEC];
#pragma unroll
      for (int i = 0; i < VEC; ++i) values[i] = value_at<T>(read[k], i);
      if (first + k * row.step < row.columns) f(first + k * row.step, values);
    }
  }
}

// f over the blocks of a row, in every thread of them. A cluster's barrier waits for memory, a block's does not.
template <class T, class F>
DEVICE T row_reduce(T v, F f, T identity, Where at = Where::current()) {
  if (cluster_blocks() == 1) return block_reduce(v, f, identity, at);
  return cluster_reduce(v, f, identity, false, at);
}

// Three sums over the block, in every thread.
DEVICE void block_sums(uint64_t (&sums)[3], Where at = Where::current()) {
  SHARED_ARRAY(uint64_t, partial, 3 * kMostWarps);
  block_barrier(at);  // a call before this one may still be read from
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    sums[c] = warp_sum(sums[c], at);
    if (lane_id() == 0) partial[c * kMostWarps + warp_id()] = sums[c];
  }
  block_barrier(at);
#pragma unroll
  for (int c = 0; c < 3; ++c) {
    sums[c] = 0;
    if (lane_id() % kMostWarps < block_warps()) sums[c] = partial[c * kMostWarps + lane_id() % kMostWarps];
    sums[c] = warp_sum<kMostWarps>(sums[c], at);
  }
}

// The largest key at and above which `target` lies, as far as bits from `lowest` on tell: it is in [low, high], or all together
// do not reach the target; then one not above `low`. each(f) calls f(key, amount) for every key of this thread.
template <class Each>
DEVICE uint32_t search(uint32_t low, uint32_t high, int lowest, uint64_t target, Each each, Where at = Where::current()) {
  int bit = 32;
  while (bit > lowest && (low ^ high) >> (bit - 2) == 0) bit -= 2;
  uint32_t found = bit == 32 ? 0 : high >> bit << bit;
#pragma unroll 1
  while (bit > lowest) {
    bit -= 2;
    uint64_t above[3] = {0, 0, 0};
    each([&](uint32_t key, uint64_t amount) {
      const uint32_t digit = key < found ? 0 : (key - found) >> bit;
#pragma unroll
      for (uint32_t c = 0; c < 3; ++c) above[c] += digit > c ? amount : 0;
    });
    block_sums(above, at);
    found += static_cast<uint32_t>((above[0] >= target) + (above[1] >= target) + (above[2] >= target)) << bit;
  }
  return found;
}

template <class V>
DEVICE V setting(const V* each, V all, int row, Where at = Where::current()) {
  if (each == nullptr) return all;
  return load_vector<1>(Global<const V>(each) + row, at)[0];
}

// (x - top) / temperature; 0 at the top, be it infinite.
DEVICE float tempered(float x, float top, float inverse) { return x == top ? 0.0f : (x - top) * inverse; }

// Of softmax(s): kTopMass at the top, so that a row's sum is below 2^64.
constexpr uint64_t kTopMass = uint64_t{1} << 40;
static_assert(kTopMass <= UINT64_MAX / kMostColumns);
DEVICE uint64_t mass_of(float s) { return static_cast<uint64_t>(fast_exp2(s * kLog2e) * static_cast<float>(kTopMass)); }

// u in (0, 1) of a random word. Its -log(1 - u) is an exponential variate; the small ones, which win, are those told apart best.
DEVICE float uniform(uint32_t word) { return minimum((static_cast<float>(word) + 0.5f) * 0x1p-32f, 1.0f - 0x1p-24f); }
DEVICE float gumbel(float u) { return -logf(-log1pf(-u)); }

// Of four words that of a token.
DEVICE uint32_t word_of(const RandomWords& words, int token) {
  const uint32_t half = token & 1 ? words.word[1] : words.word[0], other = token & 1 ? words.word[3] : words.word[2];
  return token & 2 ? other : half;
}

// What a row's draw needs to know.
struct Rule {
  float top, inverse, floor;  // tempered logits below `floor` are out
  uint32_t threshold;         // keys below it are out
  uint64_t seed;
  uint32_t row, offset;

  DEVICE RandomWords words(int group) const {
    return philox(seed, static_cast<uint32_t>(group), row, kStream, offset);
  }
  DEVICE bool keeps(uint32_t key, float s) const { return key >= threshold && s >= floor; }
};

template <class T>
KERNEL(kMostThreads, 1)
sample_kernel(const fastlm_sample a) {
  SHARED_ARRAY(uint32_t, keys, kHeld);
  SHARED_ARRAY(int, tokens, kHeld);
  SHARED_ARRAY(int, counter, 1);
  constexpr int VEC = kVector<T>;
  const int blocks = cluster_blocks(), rank = cluster_rank(), r = block_x() / blocks;
  const Global<const T> x = Global<const T>(static_cast<const T*>(a.logits)) + r * a.row_stride;
  const int shift = static_cast<int>((reinterpret_cast<uint64_t>(a.logits) / sizeof(T) + r * a.row_stride) % VEC);
  const int columns = static_cast<int>(a.columns), threads = block_threads();
  const Row<T> row{x, columns, shift, (rank * threads + thread_id()) * VEC, blocks * threads * VEC};
  const Row<T> whole{x, columns, shift, thread_id() * VEC, threads * VEC};
  const float temperature = setting(a.temperatures, a.temperature, r), top_p = setting(a.top_ps, a.top_p, r);
  const float min_p = setting(a.min_ps, a.min_p, r);
  const int64_t top_k = setting(a.top_ks, a.top_k, r);
  if (thread_id() == 0) counter[0] = 0;

  uint64_t best = 0;
  over_row(row, [&](int first, const float(&v)[VEC]) {
#pragma unroll
    for (int i = 0; i < VEC; ++i) best = maximum(best, pack(key_of(v[i]), first + i));
  });
  const uint32_t own_top = static_cast<uint32_t>(best >> 32);
  best = row_reduce(best, Max(), kNothing);
  const uint32_t top_key = static_cast<uint32_t>(best >> 32);
  int token = index_of(best);
  if (top_key == kNan || top_key <= kMinusInfinity) {
    if (rank == 0 && thread_id() == 0) {
      Global<int64_t>(a.tokens)[r] = -1;
      if (a.logprobs != nullptr) Global<float>(a.logprobs)[r] = NAN;
    }
    return;
  }

  const float top = value_of(top_key);
  if (temperature > 0) {
    const bool by_count = top_k >= 1 && top_k < columns, by_mass = top_p < 1;
    // Not 0, times which -inf would be NaN, where the temperature is infinite.
    const float inverse = maximum(minimum(1.0f / temperature, kLargest), kSmallest);
    Rule rule{top, inverse, min_p > 0 ? minimum(logf(min_p), 0.0f) : -kLargest,
              kMinusInfinity + 1, 0, static_cast<uint32_t>(r), 0};
    int held = 0;  // candidates in the first block: all that can stay, if there are any
    uint64_t total = 0;
    const bool searches = by_count || by_mass;
    uint32_t cut = rule.threshold;
    if (searches) {
      bool few = columns <= kHeld;
      const int most = threads * 15 / 16;
      const int64_t wanted = by_count ? top_k : most / blocks;
      if (!few && wanted <= most) {
        few = true;
        const uint32_t reached = search(0, top_key, kLowestBit<T>, wanted, [&](auto f) { f(own_top, 1); });
        cut = maximum(cut, static_cast<uint32_t>(row_reduce(static_cast<uint64_t>(reached), Max(), kNothing)));
      }
      const bool alone = blocks == 1;
      const Shared<int> there = cluster_pointer(counter, 0), their_tokens = cluster_pointer(tokens, 0);
      const Shared<uint32_t> their_keys = cluster_pointer(keys, 0);
      over_row(row, [&](int first, const float(&v)[VEC]) {
        int many = 0;  // candidates
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
          if (by_mass && !by_count) total += mass_of(tempered(v[i], top, rule.inverse));
          many += few && key_of(v[i]) >= cut;
        }
        if (many == 0) return;
        int slot = alone ? atomic_add(counter, many) : atomic_add(there, many);
#pragma unroll 1
        for (int i = first; i < first + VEC && i < columns; ++i) {  // seldom: read again, not kept by number in registers
          const uint32_t key = key_of(row[i]);
          if (key < cut) continue;
          if (slot < kHeld) their_keys[slot] = key, their_tokens[slot] = i;
          ++slot;
        }
      });
      total = row_reduce(total, Add(), kNothing);  // and all candidates have come
      if (rank == 0) {
        const int collected = counter[0];
        if (few && collected <= kHeld) held = collected;
      }
    }
    if (searches && rank == 0) {
      bool weigh = false;
      const auto each = [&](auto f) {
        if (held > 0) {
          for (int i = thread_id(); i < held; i += threads) {
            const uint32_t key = keys[i];
            f(key, weigh ? mass_of(tempered(value_of(key), top, rule.inverse)) : 1);
          }
        } else {
          over_row(whole, [&](int, const float(&v)[VEC]) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
              f(key_of(v[i]), weigh ? mass_of(tempered(v[i], top, rule.inverse)) : 1);
            }
          });
        }
      };
#pragma unroll 1
      for (int stage = by_count ? 0 : 1; stage < (by_mass ? 2 : 1); ++stage) {
        weigh = stage == 1;
        uint64_t target = static_cast<uint64_t>(top_k);
        if (weigh) {
          uint64_t left = 0;  // in the row or among the candidates
          each([&](uint32_t key, uint64_t amount) { left += key >= rule.threshold ? amount : 0; });
          left = block_sum(left);
          const double share = maximum(top_p, 0.0f) * static_cast<double>(by_count ? left : total);
          target = maximum(static_cast<uint64_t>(ceil(share)), static_cast<uint64_t>(1));
          if (left < target) held = 0;  // the candidates are too few after all
        }
        rule.threshold = maximum(rule.threshold, search(held > 0 ? maximum(cut, rule.threshold) : rule.threshold, top_key,
                                                        kLowestBit<T>, target, each));
      }
    }

    const Global<const int64_t> seed(a.seed);
    const int64_t key = seed[0], offset = seed[1];
    rule.seed = static_cast<uint64_t>(key), rule.offset = static_cast<uint32_t>(offset);
    best = 0;
    if (held > 0) {
      for (int i = thread_id(); i < held; i += threads) {
        const uint32_t at = keys[i];
        const int id = tokens[i];
        const float s = tempered(value_of(at), top, rule.inverse);
        if (!rule.keeps(at, s)) continue;
        best = maximum(best, pack(key_of(s + gumbel(uniform(word_of(rule.words(id / 4), id)))), id));
      }
    } else if (!searches || rank == 0) {
      float leads = -kLargest;  // the best of this thread so far
      const Row<T> part{x, columns, shift, searches ? whole.first : row.first, searches ? whole.step : row.step};
      over_row(part, [&](int first, const float(&v)[VEC]) {
#pragma unroll
        for (int g = 0; g < VEC; g += 4) {
          float s[4];
          bool any = false;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[i] = tempered(v[g + i], top, rule.inverse);
            if (!rule.keeps(key_of(v[g + i]), s[i])) s[i] = -INFINITY;
            any |= s[i] + kMostNoise > leads;
          }
          if (!any) continue;
          const RandomWords words = rule.words((first + g) / 4);
          uint32_t lead = 0;  // those that may
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // s + gumbel > leads asks that -log(1 - u), which is above u, be below exp(s - leads): two logarithms are seldom
            // needed.
            const float u = uniform(words.word[i]);
            if (s[i] > -INFINITY && u <= fast_exp2((s[i] - leads) * kLog2e) * 1.001f) lead |= 1u << i;
          }
#pragma unroll 1
          for (int i = 0; lead >> i != 0; ++i) {
            if (!(lead >> i & 1)) continue;
            const float score = tempered(row[first + g + i], top, rule.inverse) + gumbel(uniform(word_of(words, i)));
            leads = maximum(leads, score);
            best = maximum(best, pack(key_of(score), first + g + i));
          }
        }
      });
    }
    token = index_of(searches ? block_reduce(best, Max(), kNothing) : row_reduce(best, Max(), kNothing));
  }

  float logprob = 0;
  if (a.logprobs != nullptr) {
    float total = 0;
    over_row(row, [&](int, const float(&v)[VEC]) {
#pragma unroll
      for (int i = 0; i < VEC; ++i) total += fast_exp2(tempered(v[i], top, 1.0f) * kLog2e);
    });
    logprob = -logf(row_reduce(total, Add(), 0.0f));
  }
  if (rank == 0 && thread_id() == 0) {
    Global<int64_t>(a.tokens)[r] = token;
    if (a.logprobs != nullptr) Global<float>(a.logprobs)[r] = logprob + tempered(row[token], top, 1.0f);
  }
}

template <class T>
int start(const fastlm_sample& a, void* stream) {
  int threads = 128;
  while (threads < kMostThreads && static_cast<int64_t>(threads) * kVector<T> < a.columns) threads *= 2;
  const int most = most_cluster_blocks();
  int cluster = 1;
  while (2 * cluster <= most && cluster * a.rows < kBlocksOfGpu &&
         2 * cluster * threads * 2 * kVector<T> <= a.columns) {  // two vectors or more for each thread
    cluster *= 2;
  }
  return launch_cluster(sample_kernel<T>, Dim{static_cast<int>(a.rows * cluster)}, cluster, threads, 0, stream, a);
}

}  // namespace

extern "C" int fastlm_sample_draw(const fastlm_sample* args, void* stream) {
  const fastlm_sample& a = *args;
  if (a.rows <= 0 || a.rows > 0x7fffffff / 8 || a.columns <= 0 || a.columns > kMostColumns) return kInvalidValue;
  switch (a.dtype) {
    case FASTLM_FLOAT32: return start<float>(a, stream);
    case FASTLM_BFLOAT16: return start<bf16>(a, stream);
    case FASTLM_FLOAT16: return start<fp16>(a, stream);
    default: return kInvalidValue;
  }
}
