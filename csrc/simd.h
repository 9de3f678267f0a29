// Vectors of floats for the CPU kernels: AVX-512, AVX2 + FMA, or the vectors of GCC and Clang.
//
// Every *_cpu.cpp except ops_*.cpp is compiled once per instruction set with EFRDN_FAST_ISA as the
// namespace, *_bf16_cpu.cpp for AVX-512 with dot products of bfloat16 alone. Only C headers are
// included here and there: an inline function of the C++ library compiled for AVX-512 could be the
// copy that the linker keeps for all.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define EFRDN_FAST_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define EFRDN_FAST_AVX2 1
#include <immintrin.h>
#endif

#ifndef EFRDN_FAST_ISA
#define EFRDN_FAST_ISA generic
#endif

#if defined(__GNUC__)
#define EFRDN_FAST_INLINE inline __attribute__((always_inline))
#define EFRDN_FAST_LAMBDA __attribute__((always_inline))
#else
#define EFRDN_FAST_INLINE inline
#define EFRDN_FAST_LAMBDA
#endif

#include "cpu.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {

template <int kValue>
struct Int {
  static constexpr int value = kValue;
  constexpr operator int() const { return kValue; }
};

// f(Int<kBegin>), ..., f(Int<kEnd - 1>): a loop unrolled by the front end, so that arrays of
// registers indexed by it are registers. The bodies are lambdas marked EFRDN_FAST_LAMBDA.
template <int kBegin, int kEnd, class F>
EFRDN_FAST_INLINE void each(const F& f) {
  if constexpr (kBegin < kEnd) {
    f(Int<kBegin>{});
    each<kBegin + 1, kEnd>(f);
  }
}

#if defined(EFRDN_FAST_AVX512)

using V = __m512;
constexpr int kLanes = 16;

EFRDN_FAST_INLINE V zero() { return _mm512_setzero_ps(); }
EFRDN_FAST_INLINE V set1(float a) { return _mm512_set1_ps(a); }
EFRDN_FAST_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
EFRDN_FAST_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
EFRDN_FAST_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
EFRDN_FAST_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
// max returns its second operand for NaN, so ReLU keeps NaN as PyTorch's does.
EFRDN_FAST_INLINE V relu(V a) { return _mm512_max_ps(zero(), a); }
// The gradient behind a ReLU in front of it: 0 where gate <= 0, so a NaN passes it as in PyTorch.
EFRDN_FAST_INLINE V relu_backward(V gate, V grad) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(gate, zero(), _CMP_NLE_UQ), grad);
}
EFRDN_FAST_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }
EFRDN_FAST_INLINE V keep(V a, int n) { return _mm512_maskz_mov_ps(first(n), a); }

EFRDN_FAST_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
EFRDN_FAST_INLINE V load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
EFRDN_FAST_INLINE void store(float* p, V a) { _mm512_storeu_ps(p, a); }
EFRDN_FAST_INLINE void store(float* p, V a, int n) { _mm512_mask_storeu_ps(p, first(n), a); }

EFRDN_FAST_INLINE V widen_bf16(__m256i a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
}
EFRDN_FAST_INLINE __m256i narrow_bf16(V a) {  // round to nearest even; NaN stays a NaN
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  const __m512i out = _mm512_mask_mov_epi32(up, nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(out, 16));
}
EFRDN_FAST_INLINE __m256i narrow_half(V a) {
  return _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
EFRDN_FAST_INLINE __m256i load16(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
EFRDN_FAST_INLINE __m256i load16(const void* p, int n) {
  return _mm256_maskz_loadu_epi16(first(n), p);
}
EFRDN_FAST_INLINE V load(const Bf16* p) { return widen_bf16(load16(p)); }
EFRDN_FAST_INLINE V load(const Bf16* p, int n) { return widen_bf16(load16(p, n)); }
EFRDN_FAST_INLINE V load(const Half* p) { return _mm512_cvtph_ps(load16(p)); }
EFRDN_FAST_INLINE V load(const Half* p, int n) { return _mm512_cvtph_ps(load16(p, n)); }
EFRDN_FAST_INLINE void store(Bf16* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a));
}
EFRDN_FAST_INLINE void store(Bf16* p, V a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a));
}
EFRDN_FAST_INLINE void store(Half* p, V a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_half(a));
}
EFRDN_FAST_INLINE void store(Half* p, V a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), narrow_half(a));
}

EFRDN_FAST_INLINE void transpose(V (&r)[kLanes]) {
  V t[kLanes];
  each<0, 4>([&](auto block) EFRDN_FAST_LAMBDA {  // 4 x 4 blocks inside the 128-bit lanes
    constexpr int i = 4 * block;
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[i + 2], r[i + 3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[i + 2], r[i + 3]));
    t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
    t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
    t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
    t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
  });
  each<0, 4>([&](auto k) EFRDN_FAST_LAMBDA {  // then the lanes
    const V a = _mm512_shuffle_f32x4(t[k], t[4 + k], 0x88);
    const V b = _mm512_shuffle_f32x4(t[k], t[4 + k], 0xdd);
    const V c = _mm512_shuffle_f32x4(t[8 + k], t[12 + k], 0x88);
    const V d = _mm512_shuffle_f32x4(t[8 + k], t[12 + k], 0xdd);
    r[k] = _mm512_shuffle_f32x4(a, c, 0x88);
    r[4 + k] = _mm512_shuffle_f32x4(b, d, 0x88);
    r[8 + k] = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[12 + k] = _mm512_shuffle_f32x4(b, d, 0xdd);
  });
}

// load and transpose of the nine values that ACRB reads of 16 rows: a half of a register holds eight
// of a row, which takes half of the shuffles; the ninth come one by one.
EFRDN_FAST_INLINE void load_nine(V (&r)[kLanes], const float* p, int64_t stride) {
  __m512d pairs[8];
  each<0, 2>([&](auto half) EFRDN_FAST_LAMBDA {  // rows i and i + 4 side by side
    V t[4];
    each<0, 4>([&](auto k) EFRDN_FAST_LAMBDA {
      const float* from = p + (8 * half + k) * stride;
      const V low = _mm512_castps256_ps512(_mm256_loadu_ps(from));
      t[k] = _mm512_insertf32x8(low, _mm256_loadu_ps(from + 4 * stride), 1);
    });
    each<0, 2>([&](auto k) EFRDN_FAST_LAMBDA {
      pairs[4 * half + k] = _mm512_castps_pd(_mm512_unpacklo_ps(t[2 * k], t[2 * k + 1]));
      pairs[4 * half + 2 + k] = _mm512_castps_pd(_mm512_unpackhi_ps(t[2 * k], t[2 * k + 1]));
    });
  });
  each<0, 2>([&](auto k) EFRDN_FAST_LAMBDA {
    const __m512d *a = pairs + 2 * k, *b = pairs + 4 + 2 * k;
    const V even_a = _mm512_castpd_ps(_mm512_unpacklo_pd(a[0], a[1]));
    const V even_b = _mm512_castpd_ps(_mm512_unpacklo_pd(b[0], b[1]));
    const V odd_a = _mm512_castpd_ps(_mm512_unpackhi_pd(a[0], a[1]));
    const V odd_b = _mm512_castpd_ps(_mm512_unpackhi_pd(b[0], b[1]));
    r[2 * k] = _mm512_shuffle_f32x4(even_a, even_b, 0x88);
    r[4 + 2 * k] = _mm512_shuffle_f32x4(even_a, even_b, 0xdd);
    r[2 * k + 1] = _mm512_shuffle_f32x4(odd_a, odd_b, 0x88);
    r[5 + 2 * k] = _mm512_shuffle_f32x4(odd_a, odd_b, 0xdd);
  });
  p += 8;
  const auto at = [&](int i) EFRDN_FAST_LAMBDA { return p[i * stride]; };
  r[8] = _mm512_setr_ps(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9),
                        at(10), at(11), at(12), at(13), at(14), at(15));
}

#elif defined(EFRDN_FAST_AVX2)

using V = __m256;
constexpr int kLanes = 8;

EFRDN_FAST_INLINE V zero() { return _mm256_setzero_ps(); }
EFRDN_FAST_INLINE V set1(float a) { return _mm256_set1_ps(a); }
EFRDN_FAST_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
EFRDN_FAST_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
EFRDN_FAST_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
EFRDN_FAST_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
EFRDN_FAST_INLINE V relu(V a) { return _mm256_max_ps(zero(), a); }
EFRDN_FAST_INLINE V relu_backward(V gate, V grad) {
  return _mm256_and_ps(_mm256_cmp_ps(gate, zero(), _CMP_NLE_UQ), grad);
}
EFRDN_FAST_INLINE __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
EFRDN_FAST_INLINE V keep(V a, int n) { return _mm256_and_ps(_mm256_castsi256_ps(first(n)), a); }

EFRDN_FAST_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
EFRDN_FAST_INLINE V load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
EFRDN_FAST_INLINE void store(float* p, V a) { _mm256_storeu_ps(p, a); }
EFRDN_FAST_INLINE V widen_bf16(__m128i a) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
}
EFRDN_FAST_INLINE __m128i narrow_bf16(V a) {  // round to nearest even; NaN stays a NaN
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  const __m256i out = _mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan);
  const __m256i wide = _mm256_srli_epi32(out, 16);
  const __m256i packed = _mm256_packus_epi32(wide, wide);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
EFRDN_FAST_INLINE __m128i narrow_half(V a) { return _mm256_cvtps_ph(a, 0); }
EFRDN_FAST_INLINE __m128i load16(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
EFRDN_FAST_INLINE V load(const Bf16* p) { return widen_bf16(load16(p)); }
EFRDN_FAST_INLINE V load(const Half* p) { return _mm256_cvtph_ps(load16(p)); }
EFRDN_FAST_INLINE void store(Bf16* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(a));
}
EFRDN_FAST_INLINE void store(Half* p, V a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_half(a));
}

EFRDN_FAST_INLINE void transpose(V (&r)[kLanes]) {
  V t[kLanes];
  each<0, 2>([&](auto block) EFRDN_FAST_LAMBDA {
    constexpr int i = 4 * block;
    const V a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    const V c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  });
  each<0, 4>([&](auto k) EFRDN_FAST_LAMBDA {
    r[k] = _mm256_permute2f128_ps(t[k], t[4 + k], 0x20);
    r[4 + k] = _mm256_permute2f128_ps(t[k], t[4 + k], 0x31);
  });
}

#else

// Vectors of 4 floats, which GCC and Clang map to SSE2, NEON or whatever the target has.
using V = float __attribute__((vector_size(16)));
constexpr int kLanes = 4;

inline float widen(Bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}
inline Bf16 narrow_bf16(float a) {  // round to nearest even; NaN stays a NaN
  uint32_t bits;
  memcpy(&bits, &a, 4);
  if (a != a) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float widen(Half a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000) << 16;
  const uint32_t exponent = (a.bits >> 10) & 31, fraction = a.bits & 0x3ff;
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  float out;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    out = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -out : out;
  }
  memcpy(&out, &bits, 4);
  return out;
}
inline Half narrow_half(float a) {  // round to nearest even, overflow to infinity
  uint32_t bits;
  memcpy(&bits, &a, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (bits < 0x38800000) {  // below 2^-14: adding 0.5 rounds to a multiple of 2^-24
    float value, shifted;
    memcpy(&value, &bits, 4);
    shifted = value + 0.5f;
    uint32_t out;
    memcpy(&out, &shifted, 4);
    return {static_cast<uint16_t>(sign | (out - 0x3f000000))};
  }
  const uint32_t rounded = bits + 0xfff + ((bits >> 13) & 1) - (112u << 23);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}

EFRDN_FAST_INLINE V set1(float a) { return V{a, a, a, a}; }
EFRDN_FAST_INLINE V zero() { return V{}; }
EFRDN_FAST_INLINE V add(V a, V b) { return a + b; }
EFRDN_FAST_INLINE V sub(V a, V b) { return a - b; }
EFRDN_FAST_INLINE V mul(V a, V b) { return a * b; }
EFRDN_FAST_INLINE V fma(V a, V b, V c) { return a * b + c; }
EFRDN_FAST_INLINE V relu(V a) { return a < zero() ? zero() : a; }
EFRDN_FAST_INLINE V relu_backward(V gate, V grad) { return gate <= zero() ? zero() : grad; }
EFRDN_FAST_INLINE V keep(V a, int n) {
  for (int i = 0; i < kLanes; ++i) a[i] = i < n ? a[i] : 0.0f;
  return a;
}

EFRDN_FAST_INLINE V load(const float* p) {
  V a;
  memcpy(&a, p, sizeof(a));
  return a;
}
EFRDN_FAST_INLINE void store(float* p, V a) { memcpy(p, &a, sizeof(a)); }
template <class T>
EFRDN_FAST_INLINE V load(const T* p) {
  return V{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}
EFRDN_FAST_INLINE void store(Bf16* p, V a) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow_bf16(a[i]);
}
EFRDN_FAST_INLINE void store(Half* p, V a) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow_half(a[i]);
}

EFRDN_FAST_INLINE void transpose(V (&r)[kLanes]) {
  const V a = r[0], b = r[1], c = r[2], d = r[3];
  r[0] = V{a[0], b[0], c[0], d[0]};
  r[1] = V{a[1], b[1], c[1], d[1]};
  r[2] = V{a[2], b[2], c[2], d[2]};
  r[3] = V{a[3], b[3], c[3], d[3]};
}

#endif

#if !defined(EFRDN_FAST_AVX512)
// Partial 16-bit loads and all partial stores go through a small buffer.
template <class T>
EFRDN_FAST_INLINE V load(const T* p, int n) {
  T buffer[kLanes] = {};
  memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
EFRDN_FAST_INLINE void store(T* p, V a, int n) {
  T buffer[kLanes];
  store(buffer, a);
  memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}
#endif

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
