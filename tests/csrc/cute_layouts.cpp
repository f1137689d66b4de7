// csrc/device/layout.h beside the layouts of CuTe (CUTLASS's headers): each function fills two tables, which test_layout.py
// compares. Compiled by g++, run on the CPU.
#include "device/device.h"
#include "device/layout.h"

// Addresses in shared memory: here the pointers' own values, which are made from small numbers and never followed.
inline size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }
#define CUTE_CVTA_GENERIC_TO_SHARED_ACTIVATED 1
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

using cute::_1;
using cute::_2;
using cute::Int;
using device::Swizzle;
namespace gmma = cute::SM90::GMMA;
using Element = cute::bfloat16_t;

constexpr int kMn = 128, kK = 128;
constexpr size_t kBase = 16384;  // where the tile begins

template <gmma::Major MAJOR, class Atom>
auto tile() {
  using Order = cute::conditional_t<MAJOR == gmma::Major::K, cute::Step<_1, _2>, cute::Step<_2, _1>>;
  const auto layout = cute::tile_to_shape(Atom{}, cute::Shape<Int<kMn>, Int<kK>>{}, Order{});
  return cute::make_tensor(cute::make_smem_ptr(reinterpret_cast<Element*>(kBase)), layout);
}

// A tile [kMn, kK] in memory (or [kK, kMn], seen as [kMn, kK], if MN-major): tables [kMn, kK] of where each element is; then for
// each 16 columns their descriptor, as two halves, and where it says that each element is: tables [kK / 16, 2 + kMn * 16].
template <gmma::Major MAJOR, class Atom>
void operands(int* ours, int* theirs, Swizzle swizzle) {
  constexpr bool K_MAJOR = MAJOR == gmma::Major::K;
  const device::Major major = K_MAJOR ? device::Major::k : device::Major::mn;
  const uint32_t rows = K_MAJOR ? kMn : kK;
  const auto tensor = tile<MAJOR, Atom>();
  const auto address = [&](int mn, int k) { return static_cast<int>(reinterpret_cast<size_t>(&tensor(mn, k))); };
  for (int mn = 0; mn < kMn; ++mn) {
    for (int k = 0; k < kK; ++k) {
      const uint32_t byte = K_MAJOR ? device::tile_byte(mn, k, rows, swizzle) : device::tile_byte(k, mn, rows, swizzle);
      *ours++ = kBase + byte;
      *theirs++ = address(mn, k);
    }
  }
  const auto blocks = cute::flat_divide(tensor, cute::Shape<Int<kMn>, Int<16>>{});
  for (int block = 0; block < kK / 16; ++block) {
    const int k = 16 * block;
    const uint32_t start = K_MAJOR ? device::tile_start(0, k, rows, swizzle) : device::tile_start(k, 0, rows, swizzle);
    const uint64_t our = device::tile_descriptor(kBase + start, rows, major, swizzle);
    const uint64_t their = gmma::make_gmma_desc<MAJOR>(blocks(cute::_, cute::_, 0, block));
    for (int half = 0; half < 2; ++half) {
      *ours++ = static_cast<int>(our >> 32 * half);
      *theirs++ = static_cast<int>(their >> 32 * half);
    }
    for (int mn = 0; mn < kMn; ++mn) {
      for (int i = 0; i < 16; ++i) {
        *ours++ = device::matrix_byte(device::matrix_layout(their), major, mn, i);
        *theirs++ = address(mn, k + i);
      }
    }
  }
}

// Which element of the 64 x N accumulator, or 64 x 16 operand, as row + 64 * column: tables [128, elements of a thread].
template <class Layout>
void fragment(int* ours, int* theirs) {
  const Layout layout;
  for (int t = 0; t < 128; ++t) {
    for (int i = 0; i < cute::size<1>(layout); ++i) {
      const device::Place place = device::fragment_place(t, i);
      *ours++ = place.row + 64 * place.column;
      *theirs++ = layout(t, i);
    }
  }
}

// MN-major 0 or 1; swizzle as in a descriptor.
extern "C" int cute_operands(int* ours, int* theirs, int64_t mn_major, int64_t swizzle, void*) {
  using gmma::Major;
  switch (4 * mn_major + swizzle) {
    case 0: return operands<Major::K, gmma::Layout_K_INTER_Atom<Element>>(ours, theirs, Swizzle::none), 0;
    case 1: return operands<Major::K, gmma::Layout_K_SW128_Atom<Element>>(ours, theirs, Swizzle::b128), 0;
    case 2: return operands<Major::K, gmma::Layout_K_SW64_Atom<Element>>(ours, theirs, Swizzle::b64), 0;
    case 3: return operands<Major::K, gmma::Layout_K_SW32_Atom<Element>>(ours, theirs, Swizzle::b32), 0;
    case 4: return operands<Major::MN, gmma::Layout_MN_INTER_Atom<Element>>(ours, theirs, Swizzle::none), 0;
    case 5: return operands<Major::MN, gmma::Layout_MN_SW128_Atom<Element>>(ours, theirs, Swizzle::b128), 0;
    case 6: return operands<Major::MN, gmma::Layout_MN_SW64_Atom<Element>>(ours, theirs, Swizzle::b64), 0;
    case 7: return operands<Major::MN, gmma::Layout_MN_SW32_Atom<Element>>(ours, theirs, Swizzle::b32), 0;
    default: return 1;
  }
}

// The accumulator of width n; 0: the fragment of A.
extern "C" int cute_fragment(int* ours, int* theirs, int64_t n, void*) {
  using namespace cute;
  using cute::SM90::GMMA::Major;
  switch (n) {
    case 0: return fragment<MMA_Traits<SM90_64x8x16_F32BF16BF16_RS<Major::K, Major::K>>::ALayout>(ours, theirs), 0;
    case 8: return fragment<MMA_Traits<SM90_64x8x16_F32BF16BF16_SS<Major::K, Major::K>>::CLayout>(ours, theirs), 0;
    case 128: return fragment<MMA_Traits<SM90_64x128x16_F32BF16BF16_SS<Major::K, Major::K>>::CLayout>(ours, theirs), 0;
    case 256: return fragment<MMA_Traits<SM90_64x256x16_F32F16F16_RS<Major::K, Major::MN>>::CLayout>(ours, theirs), 0;
    default: return 1;
  }
}
