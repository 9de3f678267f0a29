// Attention forward of bfloat16 in dot products of pairs (AVX512_BF16), accumulated in floats. q, k
// and v are multiplied as they are given, the weights of the softmax rounded to bfloat16.
#include <immintrin.h>

#include "emha_forward.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

// 2^(x log2) for x log2 <= 127 to 1.1e-4, relative, below half a unit of bfloat16; exact at 0; about
// 2^-126 below. kAbove: x log2 is known to be above -126. NaN for the NaN that bfloat16 has.
template <bool kAbove>
EFRDN_FAST_INLINE V exp2_pairs(V x, V log2) {
  x = mul(x, log2);
  if (!kAbove) x = max(set1(-126.0f), x);
  const V magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = add(x, magic);
  const V f = sub(x, sub(shifted, magic));
  V p = fma(set1(0.05500892f), f, set1(0.24221096f));
  p = fma(p, f, set1(0.69328293f));
  p = fma(p, f, set1(1.0f));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

// (low, high) rounded to bfloat16, one pair to a lane; ties away from zero.
EFRDN_FAST_INLINE __m512i pair(V low, V high) {
  const __m512i half = _mm512_set1_epi32(0x8000);
  const __m512i a = _mm512_add_epi32(_mm512_castps_si512(low), half);
  const __m512i b = _mm512_add_epi32(_mm512_castps_si512(high), half);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(a, 16), b);
}

EFRDN_FAST_INLINE Bf16 exact(float value) {  // of a value that bfloat16 has
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return {static_cast<uint16_t>(bits >> 16)};
}

// Pairs along the width of a head for q [dim / 2, lanes, 2] and k [tokens, dim / 2, 2], along the
// keys for v [tokens / 2, dim, 2] and the weights [keys / 2, lanes, 2], zero beyond an odd end. The
// tile: with a shift [kTile, lanes] scores, then the weights.
struct Pairs {
  using Element = Bf16;
  template <bool kShift>
  static constexpr int kTile = kShift ? 40 : 80;
  static constexpr int kKeys = 4;

  static int width(int dim) { return (dim + 1) / 2 * 2; }
  static float to_log2(int dim) { return kLog2E / sqrtf(static_cast<float>(dim)); }
  static V exp2(V x, float log2) { return exp2_pairs<false>(x, set1(log2)); }

  EFRDN_FAST_INLINE static void put_q(Bf16* q, int lanes, int i, const float* row, int dim) {
    for (int d = 0; d < dim; ++d) q[(d / 2 * lanes + i) * 2 + d % 2] = exact(row[d]);
  }
  EFRDN_FAST_INLINE static void put_k(Bf16* to, int64_t t, const float* row, int dim) {
    to += t * width(dim);
    for (int d = 0; d < dim; ++d) to[d] = exact(row[d]);
    if (dim % 2) to[dim] = {0};
  }
  EFRDN_FAST_INLINE static void put_v(Bf16* to, int64_t t, const float* row, int dim) {
    to += t / 2 * 2 * dim + t % 2;
    for (int d = 0; d < dim; ++d) to[2 * d] = exact(row[d]);
  }
  static void put_end(Bf16* values, int64_t tokens, int dim) {
    const float none[64] = {};
    if (tokens % 2) put_v(values, tokens, none, dim);
  }

  template <bool kShift, int kQ>
  EFRDN_FAST_INLINE static Bf16* weights(const Rows<Bf16, kQ>& r) {
    return reinterpret_cast<Bf16*>(r.p + (kShift ? kTile<true> * kQ * kLanes : 0));
  }

  // kCount keys; of an odd last one the other half of the pair is zero.
  template <bool kShift, int kCount, int kQ, class H>
  EFRDN_FAST_INLINE static void some(const H& h, const Rows<Bf16, kQ>& r, const Bf16* k, int t,
                                     V (&sum)[kQ]) {
    V acc[kCount][kQ];
    products(h, r.q, k + t * width(h.dim()), acc);
    if constexpr (kShift) {
      each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
        each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
          sum[j] = max(acc[i][j], sum[j]);
          store(r.p + ((t + i) * kQ + j) * kLanes, acc[i][j]);
        });
      });
    } else {
      const V log2 = set1(r.log2);
      each<0, (kCount + 1) / 2>([&](auto i) EFRDN_FAST_LAMBDA {
        each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
          const V low = exp2_pairs<true>(acc[2 * i][j], log2);
          sum[j] = add(sum[j], low);
          V high = zero();
          if constexpr (2 * i + 1 < kCount) {
            high = exp2_pairs<true>(acc[2 * i + 1][j], log2);
            sum[j] = add(sum[j], high);
          }
          _mm512_storeu_si512(weights<kShift>(r) + ((t / 2 + i) * kQ + j) * 2 * kLanes,
                              pair(low, high));
        });
      });
    }
  }
  template <bool kShift, int kQ, class H>
  EFRDN_FAST_INLINE static void weigh(const H& h, const Rows<Bf16, kQ>& r, const Bf16* k, int keys,
                                      V (&sum)[kQ]) {
    int t = 0;
    for (; t + kKeys <= keys; t += kKeys) some<kShift, kKeys>(h, r, k, t, sum);
    for (; t + 2 <= keys; t += 2) some<kShift, 2>(h, r, k, t, sum);
    if (t < keys) some<kShift, 1>(h, r, k, t, sum);
  }

  template <int kQ, class H>
  EFRDN_FAST_INLINE static void shift(const H&, const Rows<Bf16, kQ>& r, int keys, V (&sum)[kQ]) {
    const V log2 = set1(r.log2);
    for (int t = 0; t < keys; t += 2)
      each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
        const float* at = r.p + (t * kQ + j) * kLanes;
        const V low = exp2_pairs<false>(sub(load(at), r.m[j]), log2);
        V high = zero();
        if (t + 1 < keys) high = exp2_pairs<false>(sub(load(at + kQ * kLanes), r.m[j]), log2);
        sum[j] = add(sum[j], add(low, high));
        _mm512_storeu_si512(weights<true>(r) + (t / 2 * kQ + j) * 2 * kLanes, pair(low, high));
      });
  }
};

}  // namespace

void emha_forward_bf16(const EmhaArgs& a, int64_t begin, int64_t end, float* scratch) {
  by_head(a, [&](auto h) { forward<Pairs, Bf16>(h, a, begin, end, scratch); });
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
