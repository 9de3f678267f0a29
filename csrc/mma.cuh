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

// Rows of 8 words in shared memory as operands. Lane i gives the address of 4 words on a 16-byte
// boundary: the first half of row i for i < 8, its second half for i < 16, the rows' next 8 words
// in the same way for the lanes behind. Lane g, t gets words (row g, t), (row g, t + 4), and of the
// next 8 words the same.
__device__ inline void load_words(unsigned (&low)[2], unsigned (&high)[2], const unsigned* row) {
#ifdef EFRDN_FAST_SIMT
  unsigned words[4];
  simt::ldmatrix(words, row, false);
  low[0] = words[0], low[1] = words[1], high[0] = words[2], high[1] = words[3];
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(low[0]), "=r"(low[1]), "=r"(high[0]), "=r"(high[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
#endif
}

// 16 rows of 8 half or bfloat16 values in shared memory, turned: lane i < 16 gives the address of
// row i. Lane g, t gets value g of rows 2t and 2t + 1 as one word, and of rows 2t + 8 and 2t + 9.
__device__ inline void load_turned(unsigned (&words)[2], const unsigned* row) {
#ifdef EFRDN_FAST_SIMT
  simt::ldmatrix(words, row, true);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
#endif
}

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

__device__ inline unsigned float_to_bits(float x) {
  unsigned bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Two values as one word, rounded to the nearest.
template <typename T>
__device__ unsigned pack_word(float low, float high);
template <>
__device__ inline unsigned pack_word<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <>
__device__ inline unsigned pack_word<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  unsigned word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// The words of an operand; for Passes = 3 floats in two parts, a TF32 value and the rest.
template <int Count, int Passes>
struct Operand {
  unsigned word[Passes == 1 ? 1 : 2][Count];
};

template <int Passes, int Count>
__device__ Operand<Count, Passes> split(const unsigned (&words)[Count]) {
  Operand<Count, Passes> operand;
#pragma unroll
  for (int i = 0; i < Count; i++) {
    operand.word[0][i] = words[i];
    if constexpr (Passes > 1) {
      const float value = bits_to_float(words[i]);
      operand.word[0][i] = to_tf32(value);
      operand.word[1][i] = to_tf32(value - bits_to_float(operand.word[0][i]));
    }
  }
  return operand;
}

// One product, or for Passes = 3 a float product: a b = hi hi + hi lo + lo hi. Of infinite values
// the latter makes NaN.
template <typename T, int Passes>
__device__ void product(float (&sum)[4], const Operand<4, Passes>& a, const Operand<2, Passes>& b) {
  if constexpr (Passes > 1) {
    mma<T>(sum, a.word[1], b.word[0]);
    mma<T>(sum, a.word[0], b.word[1]);
  }
  mma<T>(sum, a.word[0], b.word[0]);
}

}  // namespace efrdn_fast
