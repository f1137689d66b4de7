// wgmma as inline PTX. wgmma.h says what each name means.
#pragma once

namespace device {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWgmma = true;
#define FASTLM_WGMMA_ASM(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kWgmma = false;
#define FASTLM_WGMMA_ASM(...) __trap()  // no such instruction: launchers refuse these devices
#endif

inline bool has_wgmma() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
}

template <class T>
DEVICE uint32_t pack_rounded(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, fp16>, "pack_rounded gives bf16 or fp16");
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// No instruction, but the compiler moves no use of the registers across it.
template <class T, int M>
DEVICE void wgmma_fence_registers(T (&d)[M], Where) {
#pragma unroll
  for (int i = 0; i < M; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(d[i])::"memory");
    } else {
      asm volatile("" : "+r"(d[i])::"memory");
    }
  }
}
DEVICE void wgmma_fence_all() { FASTLM_WGMMA_ASM("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit(Where = {}) { FASTLM_WGMMA_ASM("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
DEVICE void wgmma_wait_all(Where) {
  FASTLM_WGMMA_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
template <int N, int M>
DEVICE void wgmma_give_registers(float (&d)[M], Where at) {
  wgmma_fence_registers(d, at);
}

// d is the first of the operands, so its text and registers for one width begin those of the next.
#define FASTLM_TEXT_4 "%0, %1, %2, %3"
#define FASTLM_TEXT_8 FASTLM_TEXT_4 ", %4, %5, %6, %7"
#define FASTLM_TEXT_12 FASTLM_TEXT_8 ", %8, %9, %10, %11"
#define FASTLM_TEXT_16 FASTLM_TEXT_12 ", %12, %13, %14, %15"
#define FASTLM_TEXT_20 FASTLM_TEXT_16 ", %16, %17, %18, %19"
#define FASTLM_TEXT_24 FASTLM_TEXT_20 ", %20, %21, %22, %23"
#define FASTLM_TEXT_28 FASTLM_TEXT_24 ", %24, %25, %26, %27"
#define FASTLM_TEXT_32 FASTLM_TEXT_28 ", %28, %29, %30, %31"
#define FASTLM_TEXT_36 FASTLM_TEXT_32 ", %32, %33, %34, %35"
#define FASTLM_TEXT_40 FASTLM_TEXT_36 ", %36, %37, %38, %39"
#define FASTLM_TEXT_44 FASTLM_TEXT_40 ", %40, %41, %42, %43"
#define FASTLM_TEXT_48 FASTLM_TEXT_44 ", %44, %45, %46, %47"
#define FASTLM_TEXT_52 FASTLM_TEXT_48 ", %48, %49, %50, %51"
#define FASTLM_TEXT_56 FASTLM_TEXT_52 ", %52, %53, %54, %55"
#define FASTLM_TEXT_60 FASTLM_TEXT_56 ", %56, %57, %58, %59"
#define FASTLM_TEXT_64 FASTLM_TEXT_60 ", %60, %61, %62, %63"
#define FASTLM_TEXT_68 FASTLM_TEXT_64 ", %64, %65, %66, %67"
#define FASTLM_TEXT_72 FASTLM_TEXT_68 ", %68, %69, %70, %71"
#define FASTLM_TEXT_76 FASTLM_TEXT_72 ", %72, %73, %74, %75"
#define FASTLM_TEXT_80 FASTLM_TEXT_76 ", %76, %77, %78, %79"
#define FASTLM_TEXT_84 FASTLM_TEXT_80 ", %80, %81, %82, %83"
#define FASTLM_TEXT_88 FASTLM_TEXT_84 ", %84, %85, %86, %87"
#define FASTLM_TEXT_92 FASTLM_TEXT_88 ", %88, %89, %90, %91"
#define FASTLM_TEXT_96 FASTLM_TEXT_92 ", %92, %93, %94, %95"
#define FASTLM_TEXT_100 FASTLM_TEXT_96 ", %96, %97, %98, %99"
#define FASTLM_TEXT_104 FASTLM_TEXT_100 ", %100, %101, %102, %103"
#define FASTLM_TEXT_108 FASTLM_TEXT_104 ", %104, %105, %106, %107"
#define FASTLM_TEXT_112 FASTLM_TEXT_108 ", %108, %109, %110, %111"
#define FASTLM_TEXT_116 FASTLM_TEXT_112 ", %112, %113, %114, %115"
#define FASTLM_TEXT_120 FASTLM_TEXT_116 ", %116, %117, %118, %119"
#define FASTLM_TEXT_124 FASTLM_TEXT_120 ", %120, %121, %122, %123"
#define FASTLM_TEXT_128 FASTLM_TEXT_124 ", %124, %125, %126, %127"
#define FASTLM_REGISTERS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define FASTLM_REGISTERS_8 FASTLM_REGISTERS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define FASTLM_REGISTERS_12 FASTLM_REGISTERS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define FASTLM_REGISTERS_16 FASTLM_REGISTERS_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define FASTLM_REGISTERS_20 FASTLM_REGISTERS_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define FASTLM_REGISTERS_24 FASTLM_REGISTERS_20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define FASTLM_REGISTERS_28 FASTLM_REGISTERS_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define FASTLM_REGISTERS_32 FASTLM_REGISTERS_28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define FASTLM_REGISTERS_36 FASTLM_REGISTERS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define FASTLM_REGISTERS_40 FASTLM_REGISTERS_36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define FASTLM_REGISTERS_44 FASTLM_REGISTERS_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define FASTLM_REGISTERS_48 FASTLM_REGISTERS_44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define FASTLM_REGISTERS_52 FASTLM_REGISTERS_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define FASTLM_REGISTERS_56 FASTLM_REGISTERS_52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define FASTLM_REGISTERS_60 FASTLM_REGISTERS_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define FASTLM_REGISTERS_64 FASTLM_REGISTERS_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define FASTLM_REGISTERS_68 FASTLM_REGISTERS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define FASTLM_REGISTERS_72 FASTLM_REGISTERS_68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define FASTLM_REGISTERS_76 FASTLM_REGISTERS_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define FASTLM_REGISTERS_80 FASTLM_REGISTERS_76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define FASTLM_REGISTERS_84 FASTLM_REGISTERS_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define FASTLM_REGISTERS_88 FASTLM_REGISTERS_84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define FASTLM_REGISTERS_92 FASTLM_REGISTERS_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define FASTLM_REGISTERS_96 FASTLM_REGISTERS_92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define FASTLM_REGISTERS_100 FASTLM_REGISTERS_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define FASTLM_REGISTERS_104 FASTLM_REGISTERS_100, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define FASTLM_REGISTERS_108 FASTLM_REGISTERS_104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define FASTLM_REGISTERS_112 FASTLM_REGISTERS_108, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define FASTLM_REGISTERS_116 FASTLM_REGISTERS_112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define FASTLM_REGISTERS_120 FASTLM_REGISTERS_116, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define FASTLM_REGISTERS_124 FASTLM_REGISTERS_120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define FASTLM_REGISTERS_128 FASTLM_REGISTERS_124, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// One width: N, the registers of d, and the numbers of the operands after them.
template <int M>
struct Wgmma;
#define FASTLM_WGMMA_BEGIN(TYPE, N, M, P) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\n"     \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FASTLM_TEXT_##M "}, "
#define FASTLM_WGMMA_SHARED(TYPE, N, M, A, B, P, TA, TB)                                                      \
  FASTLM_WGMMA_ASM(FASTLM_WGMMA_BEGIN(TYPE, N, M, P) "%" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}"      \
                   : FASTLM_REGISTERS_##M                                                                     \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(TRANS_A), "n"(TRANS_B))
#define FASTLM_WGMMA_REGISTERS(TYPE, N, M, A0, A1, A2, A3, B, P, TB)                                          \
  FASTLM_WGMMA_ASM(FASTLM_WGMMA_BEGIN(TYPE, N, M, P) "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B         \
                                                     ", p, 1, 1, %" #TB ";\n}"                                \
                   : FASTLM_REGISTERS_##M                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TRANS_B))
#define FASTLM_WGMMA_WIDTH(N, M, I0, I1, I2, I3, I4, I5, I6)                                            \
  template <>                                                                                     \
  struct Wgmma<M> {                                                                               \
    template <bool BF16, int TRANS_A, int TRANS_B>                                                \
    DEVICE static void shared(float (&d)[M], uint64_t a, uint64_t b, int accumulate) {            \
      if constexpr (BF16) {                                                                       \
        FASTLM_WGMMA_SHARED("bf16", N, M, I0, I1, I2, I3, I4);                                    \
      } else {                                                                                    \
        FASTLM_WGMMA_SHARED("f16", N, M, I0, I1, I2, I3, I4);                                     \
      }                                                                                           \
    }                                                                                             \
    template <bool BF16, int TRANS_B>                                                             \
    DEVICE static void registers(float (&d)[M], const uint32_t* a, uint64_t b, int accumulate) {  \
      if constexpr (BF16) {                                                                       \
        FASTLM_WGMMA_REGISTERS("bf16", N, M, I0, I1, I2, I3, I4, I5, I6);                         \
      } else {                                                                                    \
        FASTLM_WGMMA_REGISTERS("f16", N, M, I0, I1, I2, I3, I4, I5, I6);                          \
      }                                                                                           \
    }                                                                                             \
  };
FASTLM_WGMMA_WIDTH(8, 4, 4, 5, 6, 7, 8, 9, 10)
FASTLM_WGMMA_WIDTH(16, 8, 8, 9, 10, 11, 12, 13, 14)
FASTLM_WGMMA_WIDTH(24, 12, 12, 13, 14, 15, 16, 17, 18)
FASTLM_WGMMA_WIDTH(32, 16, 16, 17, 18, 19, 20, 21, 22)
FASTLM_WGMMA_WIDTH(40, 20, 20, 21, 22, 23, 24, 25, 26)
FASTLM_WGMMA_WIDTH(48, 24, 24, 25, 26, 27, 28, 29, 30)
FASTLM_WGMMA_WIDTH(56, 28, 28, 29, 30, 31, 32, 33, 34)
FASTLM_WGMMA_WIDTH(64, 32, 32, 33, 34, 35, 36, 37, 38)
FASTLM_WGMMA_WIDTH(72, 36, 36, 37, 38, 39, 40, 41, 42)
FASTLM_WGMMA_WIDTH(80, 40, 40, 41, 42, 43, 44, 45, 46)
FASTLM_WGMMA_WIDTH(88, 44, 44, 45, 46, 47, 48, 49, 50)
FASTLM_WGMMA_WIDTH(96, 48, 48, 49, 50, 51, 52, 53, 54)
FASTLM_WGMMA_WIDTH(104, 52, 52, 53, 54, 55, 56, 57, 58)
FASTLM_WGMMA_WIDTH(112, 56, 56, 57, 58, 59, 60, 61, 62)
FASTLM_WGMMA_WIDTH(120, 60, 60, 61, 62, 63, 64, 65, 66)
FASTLM_WGMMA_WIDTH(128, 64, 64, 65, 66, 67, 68, 69, 70)
FASTLM_WGMMA_WIDTH(136, 68, 68, 69, 70, 71, 72, 73, 74)
FASTLM_WGMMA_WIDTH(144, 72, 72, 73, 74, 75, 76, 77, 78)
FASTLM_WGMMA_WIDTH(152, 76, 76, 77, 78, 79, 80, 81, 82)
FASTLM_WGMMA_WIDTH(160, 80, 80, 81, 82, 83, 84, 85, 86)
FASTLM_WGMMA_WIDTH(168, 84, 84, 85, 86, 87, 88, 89, 90)
FASTLM_WGMMA_WIDTH(176, 88, 88, 89, 90, 91, 92, 93, 94)
FASTLM_WGMMA_WIDTH(184, 92, 92, 93, 94, 95, 96, 97, 98)
FASTLM_WGMMA_WIDTH(192, 96, 96, 97, 98, 99, 100, 101, 102)
FASTLM_WGMMA_WIDTH(200, 100, 100, 101, 102, 103, 104, 105, 106)
FASTLM_WGMMA_WIDTH(208, 104, 104, 105, 106, 107, 108, 109, 110)
FASTLM_WGMMA_WIDTH(216, 108, 108, 109, 110, 111, 112, 113, 114)
FASTLM_WGMMA_WIDTH(224, 112, 112, 113, 114, 115, 116, 117, 118)
FASTLM_WGMMA_WIDTH(232, 116, 116, 117, 118, 119, 120, 121, 122)
FASTLM_WGMMA_WIDTH(240, 120, 120, 121, 122, 123, 124, 125, 126)
FASTLM_WGMMA_WIDTH(248, 124, 124, 125, 126, 127, 128, 129, 130)
FASTLM_WGMMA_WIDTH(256, 128, 128, 129, 130, 131, 132, 133, 134)

template <class T, Major A_MAJOR, Major B_MAJOR, int M, class A, class B>
DEVICE void wgmma_shared(float (&d)[M], const A& a, const B& b, bool accumulate, Where) {
  constexpr int TRANS_A = static_cast<int>(A_MAJOR), TRANS_B = static_cast<int>(B_MAJOR);
  Wgmma<M>::template shared<std::is_same_v<T, bf16>, TRANS_A, TRANS_B>(d, a.descriptor(), b.descriptor(), accumulate);
}
template <class T, Major B_MAJOR, int M, class B>
DEVICE void wgmma_registers(float (&d)[M], const uint32_t* a, const B& b, bool accumulate, Where) {
  Wgmma<M>::template registers<std::is_same_v<T, bf16>, static_cast<int>(B_MAJOR)>(d, a, b.descriptor(), accumulate);
}

}  // namespace device
