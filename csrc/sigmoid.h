// Exponential and logistic function on vectors.
#pragma once

#include "tiles.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {

EFRDN_FAST_INLINE V divide(V a, V b) {
#if defined(EFRDN_FAST_AVX512)
  return _mm512_div_ps(a, b);
#elif defined(EFRDN_FAST_AVX2)
  return _mm256_div_ps(a, b);
#else
  return a / b;
#endif
}

// The second operand where one is NaN.
EFRDN_FAST_INLINE V at_least(V a, V b) {
#if defined(EFRDN_FAST_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(EFRDN_FAST_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// 2^n of whole numbers n from -126 to 127.
EFRDN_FAST_INLINE V power_of_two(V n) {
#if defined(EFRDN_FAST_AVX512)
  return _mm512_scalef_ps(set1(1.0f), n);
#elif defined(EFRDN_FAST_AVX2)
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
#else
  using Integers = int32_t __attribute__((vector_size(16)));
  const Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  V out;
  memcpy(&out, &bits, sizeof(out));
  return out;
#endif
}

// 1 / (1 + e^-x) to 4e-7, relative, for x from -87 on (below: as at -87); NaN for NaN.
EFRDN_FAST_INLINE V sigmoid(V x) {
  x = at_least(set1(-87.0f), sub(zero(), at_least(set1(-87.0f), sub(zero(), x))));  // within +-87
  const V y = mul(set1(-1.44269504f), x), magic = set1(12582912.0f);  // 1.5 * 2^23
  const V n = sub(add(y, magic), magic);  // rounded; NaN keeps NaN in the fraction below
  // e^-x = 2^n e^-r, r = x + n ln 2 in two steps
  const V r = fma(n, set1(-2.12194440e-4f), fma(n, set1(0.693359375f), x));
  V p = fma(set1(1.38888889e-3f), r, set1(-8.33333333e-3f));  // Taylor of e^-r, |r| < 0.347
  p = fma(p, r, set1(4.16666667e-2f));
  p = fma(p, r, set1(-1.66666667e-1f));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(-1.0f));
  p = fma(p, r, set1(1.0f));
  return divide(set1(1.0f), fma(p, power_of_two(n), set1(1.0f)));
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
