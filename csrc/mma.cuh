// One tensor core product of a warp: d [16, 8] += a [16, K] b [K, 8], float accumulators. K = 16
// for half and bfloat16, 8 for float, whose lower 13 bits the hardware ignores (TF32).
//
// Operands are 32-bit words along K: of two half or bfloat16 values or one float. With g = lane / 4
// and t = lane % 4 a lane holds
//   a: words (row g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//   b: words (t, column g), (t + 4, column g)
//   d: (row g, columns 2t and 2t + 1), (row g + 8, columns 2t and 2t + 1)
#pragma once

#include "common.cuh"
#ifdef EFRDN_FAST_SIMT
#include "simt_mma.h"
#endif

namespace efrdn_fast {

template <typename T>
__device__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);

#ifdef EFRDN_FAST_SIMT
template <typename T>
__device__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  simt::mma<T>(d, a, b);
}
#else
#define EFRDN_FAST_MMA(shape)                                                                      \
  asm("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <>
__device__ inline void mma<__half>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  EFRDN_FAST_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}
template <>
__device__ inline void mma<__nv_bfloat16>(float (&d)[4], const unsigned (&a)[4],
                                          const unsigned (&b)[2]) {
  EFRDN_FAST_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}
template <>
__device__ inline void mma<float>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  EFRDN_FAST_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}
#undef EFRDN_FAST_MMA
#endif

// Nearest TF32 value, ties away from zero.
__device__ inline unsigned to_tf32(float x) {
#ifdef EFRDN_FAST_SIMT
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return (bits + 0x1000u) & ~0x1fffu;
#else
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

__device__ inline float bits_to_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace efrdn_fast
