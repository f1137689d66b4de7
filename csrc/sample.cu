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

#include "sample.h"
#include "sample_row.h"
#include "sample_search.h"

namespace {

constexpr int kHeld = 2048;  // candidates that shared memory holds
constexpr int kBlocksOfGpu = 132;
constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue
constexpr int kMostColumns = (1 << 24) - 1;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLargest = 3.4028235e38f;
constexpr float kMostNoise = 23.0f;  // the smallest exponential variate is 2^-33
constexpr float kSmallest = 1.4012985e-45f;
constexpr uint64_t kNothing = 0;  // less than every packed key
constexpr uint32_t kStream = 0x73616d70u;  // third word of the counter: other numbers than dropout's

// A key and an index in one number: of equal keys the first index is the largest.
DEVICE uint64_t pack(uint32_t key, int index) { return static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(index); }
DEVICE int index_of(uint64_t packed) { return static_cast<int>(~static_cast<uint32_t>(packed)); }

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

// The best of this thread's tokens that the rule keeps, packed: its logit and noise, and the token. Of the candidates held:
DEVICE void draw_held(const Rule& rule, Shared<uint32_t> keys, Shared<int> tokens, int held, uint64_t& best) {
  for (int i = thread_id(); i < held; i += block_threads()) {
    const uint32_t at = keys[i];
    const int id = tokens[i];
    const float s = tempered(value_of(at), rule.top, rule.inverse);
    if (!rule.keeps(at, s)) continue;
    best = maximum(best, pack(key_of(s + gumbel(uniform(word_of(rule.words(id / 4), id)))), id));
  }
}

// And of this thread's part of a row:
template <class T>
DEVICE void draw_row(const Rule& rule, const Row<T>& row, int first_of_thread, int step, uint64_t& best) {
  constexpr int VEC = kVector<T>;
  float leads = -kLargest;  // the best of this thread so far
  const Row<T> part{row.x, row.columns, row.shift, first_of_thread, step};
  over_row(part, [&](int first, const float(&v)[VEC]) {
#pragma unroll
    for (int g = 0; g < VEC; g += 4) {
      float s[4];
      bool any = false;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[i] = tempered(v[g + i], rule.top, rule.inverse);
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
        const float score = tempered(row[first + g + i], rule.top, rule.inverse) + gumbel(uniform(word_of(words, i)));
        leads = maximum(leads, score);
        best = maximum(best, pack(key_of(score), first + g + i));
      }
    }
  });
}

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
      draw_held(rule, keys, tokens, held, best);
    } else if (!searches || rank == 0) {
      draw_row(rule, row, searches ? whole.first : row.first, searches ? whole.step : row.step, best);
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
