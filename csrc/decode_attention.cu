// Attention of a few new tokens over a cache (fastlm/ops/decode_attention.py has the contract), split over the keys
// (flash-decoding: Dao et al. 2023). Reading keys and values is all that takes time: each is read once, straight into registers.
//
// A block owns one key head of one sequence, one share of its keys and a tile of rows: the query heads that read that key head,
// times the new tokens. Its warps take tiles of keys by turns and meet at the end. The shares of one tile of rows leave output,
// maximum and sum in fp32; the last of them to finish brings all together, in order: the same bits whichever it is.
//
// Here: which kernel a call takes, and how many shares. The kernels: decode_attention_mma.h and decode_attention_plain.h.

#include "decode_attention.h"

#include "decode_attention_mma.h"
#include "decode_attention_plain.h"

namespace {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

// Whether keys and values can be read `elements` at a time, 16 bytes, everywhere.
bool in_vectors(const Args& a, int elements) {
  const auto fits = [&](const void* p, const int64_t* strides, int width) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && strides[0] % elements == 0 && strides[1] % elements == 0 &&
           strides[2] % elements == 0 && strides[3] == 1 && width % elements == 0;
  };
  return fits(a.k, a.k_strides, a.key_width) && fits(a.v, a.v_strides, a.value_width);
}

struct Plan {
  bool on_mma;
  int width, groups;  // on mma

  explicit Plan(const Args& a) {
    const int most = maximum(a.key_width, a.value_width);
    on_mma = a.dtype != FASTLM_FLOAT32 && in_vectors(a, 8);
    groups = a.S * (a.H / a.H_kv) > 8 && most <= 128 ? 2 : 1;
    width = most <= 64 && groups == 1 ? 64 : most <= 128 ? 128 : 256;
  }
  int rows() const { return on_mma ? 8 * groups : kPlainRows; }
  int64_t blocks(const Args& a) const {
    return static_cast<int64_t>(a.B) * a.H_kv * ceil_div(a.S * (a.H / a.H_kv), rows());
  }
};

template <class T, int WIDTH, int GROUPS>
int start_kernel(const Args& a, Dim grid, void* stream) {
  const int bytes = Found::bytes(a, 8 * GROUPS) + 8 * GROUPS * WIDTH * static_cast<int>(sizeof(T));
  return launch(decode_attention_kernel<T, WIDTH, GROUPS>, grid, kThreads, bytes, stream, a);
}

template <class T>
int start_on_mma(const Args& a, const Plan& plan, Dim grid, void* stream) {
  if (plan.groups == 2) return start_kernel<T, 128, 2>(a, grid, stream);
  switch (plan.width) {
    case 64: return start_kernel<T, 64, 1>(a, grid, stream);
    case 128: return start_kernel<T, 128, 1>(a, grid, stream);
    case 256: return start_kernel<T, 256, 1>(a, grid, stream);
    default: return kInvalidValue;
  }
}

int start_plain(const Args& a, Dim grid, void* stream) {
  const int bytes = Found::bytes(a, kPlainRows) + kPlainRows * a.key_width * static_cast<int>(sizeof(float));
  const bool vectors = a.dtype == FASTLM_FLOAT32 && in_vectors(a, 4);
  return launch(vectors ? decode_attention_plain_kernel<4> : decode_attention_plain_kernel<1>, grid, kThreads, bytes, stream, a);
}

bool is_valid(const Args& a) {
  return a.B > 0 && a.S > 0 && a.H_kv > 0 && a.H > 0 && a.H % a.H_kv == 0 && a.key_width > 0 && a.key_width <= kMostWidth &&
         a.value_width > 0 && a.value_width <= kMostWidth && a.page_size > 0 && a.max_pages > 0 && a.pages > 0 &&
         static_cast<int64_t>(a.page_size) * a.max_pages <= FASTLM_DECODE_ATTENTION_PLACES && a.splits > 0 &&
         a.splits <= 65535 && a.least > 0 && a.dtype >= FASTLM_FLOAT32 && a.dtype <= FASTLM_FLOAT16 &&
         Plan(a).blocks(a) <= 0x7fffffff;
}

}  // namespace

extern "C" int fastlm_decode_attention_fwd(const fastlm_decode_attention* args, void* stream) {
  const Args& a = *args;
  if (!is_valid(a)) return kInvalidValue;
  const Plan plan(a);
  const Dim grid{static_cast<int>(plan.blocks(a)), a.splits};
  if (a.splits > 1) {
    const int error = fill_zero(a.counters, sizeof(*a.counters) * grid.x, stream);
    if (error) return error;
  }
  if (!plan.on_mma) return start_plain(a, grid, stream);
  switch (a.dtype) {
    case FASTLM_BFLOAT16: return start_on_mma<bf16>(a, plan, grid, stream);
    case FASTLM_FLOAT16: return start_on_mma<fp16>(a, plan, grid, stream);
    default: return kInvalidValue;
  }
}

extern "C" int fastlm_decode_attention_blocks(const fastlm_decode_attention* args, int32_t* per_sm) {
  const Plan plan(*args);
  if (per_sm) *per_sm = plan.on_mma ? blocks_per_sm(plan.width, plan.groups) : 3;
  return static_cast<int>(plan.blocks(*args));
}

extern "C" int fastlm_decode_attention_splits(int64_t blocks, int64_t most, int64_t slots) {
  struct Asked {
    int64_t blocks, most, slots;
    bool operator==(const Asked&) const = default;
  };
  static thread_local Asked last{};  // every layer asks the same: the search takes microseconds
  static thread_local int answer = 1;
  const Asked asked{blocks, most, slots};
  if (asked == last) return answer;
  const auto filled = [&](int64_t n) {
    return static_cast<double>(blocks * n) / static_cast<double>(ceil_div(blocks * n, slots) * slots);
  };
  double best = 0;
  for (int64_t n = 1; n <= most; ++n) best = maximum(best, filled(n));
  answer = 1;
  while (answer < most && filled(answer) < 0.9 * best) ++answer;
  last = asked;
  return answer;
}
