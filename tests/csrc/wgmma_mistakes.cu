// Two groups of products, and mistakes in them; test_wgmma.py says what the host body makes of each.
#include "wgmma_tile.h"

using namespace device;

enum Mistake {
  kNone, kNoRegisterFence, kWrittenAfterFence, kNoWait, kWaitTooShort, kNoCommit, kNoProxyFence, kNoBarrier, kUnwritten,
  kWrongSwizzle, kWrongMajor, kOverwritten, kFragmentWritten, kReadEarly, kNotNamed, kThreeWarps, kOtherOperand, kInsidePattern,
  kOwnWaitAlone
};

// Two groups of products: d = a b^T of 64 x 16, then e = round(d) b.  out [2, 32, 128]: d and e as the threads hold them.
template <int MISTAKE>
KERNEL(128)
mistakes_kernel(const bf16* a, const bf16* b, float* out) {
  const Shared<bf16> a_tile = dynamic_shared<bf16>(), b_tile = dynamic_shared<bf16>(64 * 64 * 2);
  fill(a_tile, Global<const bf16>(a), 64, 64, 64, 1, Swizzle::b128);
  fill(b_tile, Global<const bf16>(b), MISTAKE == kUnwritten ? 63 : 64, 64, 64, 1, Swizzle::b128);
  if constexpr (MISTAKE != kNoProxyFence) fence_async_shared();
  if constexpr (MISTAKE != kNoBarrier) block_barrier();
  const Matrix<bf16, Major::k, 64> a_matrix(a_tile);
  const Matrix<bf16, MISTAKE == kWrongMajor ? Major::mn : Major::k, 64> b_matrix(b_tile);
  const Matrix<bf16, Major::mn, 64, MISTAKE == kWrongSwizzle ? Swizzle::b64 : Swizzle::b128> b_transposed(b_tile);
  const int t = thread_id();
  float d[32], e[32] = {};
  if constexpr (MISTAKE == kThreeWarps) {
    if (t >= 96) return;
  }
  if constexpr (MISTAKE != kNoRegisterFence) wgmma_fence(d);
  if constexpr (MISTAKE == kWrittenAfterFence) d[3] = 1.0f;
#pragma unroll
  for (int k = 0; k < 64; k += 16) {
    const int row = MISTAKE == kInsidePattern ? 4 : 0, column = MISTAKE == kOtherOperand && t >= 64 ? 0 : k;
    wgmma(d, a_matrix.at(row, column), b_matrix.at(0, k), k > 0);
  }
  if constexpr (MISTAKE != kNoCommit) wgmma_commit();
  float early = 0;
  if constexpr (MISTAKE == kReadEarly) early = d[0];
  if constexpr (MISTAKE == kNotNamed) {
    wgmma_wait<0>();
  } else if constexpr (MISTAKE != kNoWait) {
    wgmma_wait<MISTAKE == kWaitTooShort>(d);
  }
  uint32_t fragments[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) fragments[i] = pack_rounded<bf16>(d[2 * i], d[2 * i + 1]);
  wgmma_fence(e, fragments);
#pragma unroll
  for (int k = 0; k < 64; k += 16) wgmma(e, fragments + k / 4, b_transposed.at(k, 0));
  wgmma_commit();
  if constexpr (MISTAKE == kOverwritten) b_tile[64 * (t % 64)] = from_float<bf16>(0.0f);
  if constexpr (MISTAKE == kFragmentWritten) fragments[5] = 0;
  wgmma_wait<0>(e);
  if constexpr (MISTAKE == kNone) block_barrier();  // the waits of all four warps: by now it may be
  if constexpr (MISTAKE == kNone || MISTAKE == kOwnWaitAlone) b_tile[64 * (t % 64) + t / 64] = from_float<bf16>(0.0f);
  const Global<float> result = out;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    result[i * 128 + t] = d[i] + early;
    result[(32 + i) * 128 + t] = e[i];
  }
}

#define MISTAKE(NAME, CASE_OF)                                                                  \
  extern "C" int NAME(const bf16* a, const bf16* b, float* out, void* stream) {                 \
    return launch(mistakes_kernel<CASE_OF>, Dim{1}, 128, 2 * 64 * 64 * 2, stream, a, b, out);   \
  }
MISTAKE(none, kNone)
MISTAKE(no_register_fence, kNoRegisterFence)
MISTAKE(written_after_fence, kWrittenAfterFence)
MISTAKE(no_wait, kNoWait)
MISTAKE(wait_too_short, kWaitTooShort)
MISTAKE(no_commit, kNoCommit)
MISTAKE(no_proxy_fence, kNoProxyFence)
MISTAKE(no_barrier, kNoBarrier)
MISTAKE(unwritten, kUnwritten)
MISTAKE(wrong_swizzle, kWrongSwizzle)
MISTAKE(wrong_major, kWrongMajor)
MISTAKE(overwritten, kOverwritten)
MISTAKE(fragment_written, kFragmentWritten)
MISTAKE(read_early, kReadEarly)
MISTAKE(not_named, kNotNamed)
MISTAKE(three_warps, kThreeWarps)
MISTAKE(other_operand, kOtherOperand)
MISTAKE(inside_pattern, kInsidePattern)
MISTAKE(own_wait_alone, kOwnWaitAlone)
