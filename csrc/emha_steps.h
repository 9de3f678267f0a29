// What forward and backward of attention share: exp2 on vectors, and heads as packed floats.
#pragma once

#include <float.h>
#include <math.h>

#include "emha_cpu.h"
#include "tiles.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {

// 2^f on [-1/2, 1/2] to 1.6e-7, relative; exact at 0.
EFRDN_FAST_INLINE V exp2_fraction(V f) {
  V p = fma(set1(0.00132746331f), f, set1(0.00967196189f));
  p = fma(p, f, set1(0.0555067845f));
  p = fma(p, f, set1(0.24022235f));
  p = fma(p, f, set1(0.693147063f));
  return fma(p, f, set1(1.0f));
}

// 2^x for x <= 127; 0 or the smallest normal number below -126; NaN for NaN.
#if defined(EFRDN_FAST_AVX512)
EFRDN_FAST_INLINE V exp2(V x) {
  const V n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_fraction(sub(x, n)), n);
}
// The second operand where one is NaN.
EFRDN_FAST_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }
#elif defined(EFRDN_FAST_AVX2)
EFRDN_FAST_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }
EFRDN_FAST_INLINE V exp2(V x) {
  x = max(set1(-126.0f), x);
  const V n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);  // NaN: 0
  const __m256i fraction = _mm256_castps_si256(exp2_fraction(sub(x, n)));
  return _mm256_castsi256_ps(_mm256_add_epi32(fraction, exponent));
}
#else
EFRDN_FAST_INLINE V max(V a, V b) { return a > b ? a : b; }
EFRDN_FAST_INLINE V exp2(V x) {
  using Integers = int32_t __attribute__((vector_size(16)));
  x = max(set1(-126.0f), x);
  const V magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V n = (x + magic) - magic;
  const Integers exponent = __builtin_convertvector(n, Integers) << 23;
  V fraction = exp2_fraction(x - n);
  Integers bits;
  memcpy(&bits, &fraction, sizeof(bits));
  bits += x == x ? exponent : exponent - exponent;
  memcpy(&fraction, &bits, sizeof(bits));
  return fraction;
}
#endif

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Width of a head, known to the compiler or not.
template <int kDim>
struct Head {
  EFRDN_FAST_INLINE constexpr int dim() const { return kDim; }
};
template <>
struct Head<0> {
  int value;
  EFRDN_FAST_INLINE int dim() const { return value; }
};

// One row of a head as floats.
template <class T>
EFRDN_FAST_INLINE void read_row(const T* from, float* to, int dim) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
  if (d < dim) {
    alignas(64) float rest[kLanes];
    store(rest, load_some(from + d, dim - d));
    for (int i = 0; d + i < dim; ++i) to[d + i] = rest[i];
  }
}

template <class T>
EFRDN_FAST_INLINE void write_row(const float* from, T* to, int dim) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d));
  if (d < dim) {
    alignas(64) float rest[kLanes] = {};
    for (int i = 0; d + i < dim; ++i) rest[i] = from[d + i];
    store_some(to + d, load(rest), dim - d);
  }
}

// A block holds kQ vectors: of queries, or of keys in the backward pass; what meets them is
// broadcast. kKeys of those, or kDims of a head, fill the registers with accumulators, less the
// ones of the sums beside the keys.
#if defined(EFRDN_FAST_AVX512)
constexpr int kMaxVectors = 4;
#else
constexpr int kMaxVectors = 2;
#endif
constexpr int kKeys = 5, kDims = 6;

// Numbers are multiplied one by one as floats or, as bfloat16, in pairs of neighbours: kPair<E> of
// them in each lane, or the same ones in every lane.
template <class E>
constexpr int kPair = 1;
EFRDN_FAST_INLINE V lanes_at(const float* p) { return load(p); }
EFRDN_FAST_INLINE V same_at(const float* p) { return set1(*p); }
EFRDN_FAST_INLINE V multiply(V a, V b, V acc) { return fma(a, b, acc); }
#if defined(__AVX512BF16__)
template <>
constexpr int kPair<Bf16> = 2;
EFRDN_FAST_INLINE __m512i lanes_at(const Bf16* p) { return _mm512_loadu_si512(p); }
EFRDN_FAST_INLINE __m512i same_at(const Bf16* p) {
  int bits;
  memcpy(&bits, p, sizeof(bits));
  return _mm512_set1_epi32(bits);
}
EFRDN_FAST_INLINE V multiply(__m512i a, __m512i b, V acc) {
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
#endif

// acc[i][j] = row_i . lanes_j; lanes [dim, kQ * kLanes], rows [kCount, dim], dim in whole pairs.
template <int kCount, int kQ, class H, class E>
EFRDN_FAST_INLINE void products(const H& h, const E* lanes, const E* rows, V (&acc)[kCount][kQ]) {
  each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA { acc[i][j] = zero(); });
  });
  constexpr int kWidth = kLanes * kPair<E>;
  const int steps = (h.dim() + kPair<E> - 1) / kPair<E>;
  for (int d = 0; d < steps; ++d) {
    decltype(lanes_at(lanes)) value[kQ];
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
      value[j] = lanes_at(lanes + (d * kQ + j) * kWidth);
    });
    each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
      const auto row = same_at(rows + (i * steps + d) * kPair<E>);
      each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
        acc[i][j] = multiply(row, value[j], acc[i][j]);
      });
    });
  }
}

// Dims d, ..., d + kCount - 1 of out[dim, lanes] += sum over rows of rows[row, dim] p[row, lanes];
// `count` pairs of rows.
template <int kCount, int kQ, class H, class E>
EFRDN_FAST_INLINE void gather(const H& h, const E* p, const E* rows, int count, int d,
                              float* out) {
  V acc[kCount][kQ];
  each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA { acc[i][j] = zero(); });
  });
  constexpr int kWidth = kLanes * kPair<E>;
  for (int t = 0; t < count; ++t) {
    decltype(lanes_at(p)) weight[kQ];
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
      weight[j] = lanes_at(p + (t * kQ + j) * kWidth);
    });
    each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
      const auto value = same_at(rows + (t * h.dim() + d + i) * kPair<E>);
      each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
        acc[i][j] = multiply(value, weight[j], acc[i][j]);
      });
    });
  }
  each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
      float* to = out + ((d + i) * kQ + j) * kLanes;
      store(to, add(load(to), acc[i][j]));
    });
  });
}

template <int kQ, class H, class E>
EFRDN_FAST_INLINE void gather_all(const H& h, const E* p, const E* rows, int count, float* out) {
  const int grouped = h.dim() - h.dim() % kDims;
  for (int d = 0; d < grouped; d += kDims) gather<kDims, kQ>(h, p, rows, count, d, out);
  for (int d = grouped; d < h.dim(); ++d) gather<1, kQ>(h, p, rows, count, d, out);
}

// f(Head) for the width of a head: the network's is known to the compiler.
template <class F>
void by_head(const EmhaArgs& a, const F& f) {
  if (a.dim == 18)
    f(Head<18>{});
  else
    f(Head<0>{static_cast<int>(a.dim)});
}

// Where block `at` lies.
struct Place {
  int64_t unit, n, head;  // unit: head of a segment
  int64_t first, tokens;  // of the segment
  int64_t start, stop;    // of the block, in the segment; none where start >= tokens
};
inline Place place(const EmhaArgs& a, int64_t at) {
  const int64_t unit = at / segment_blocks(a), segment = unit / a.heads;
  const int64_t first = segment % segments(a) * a.length, start = at % segment_blocks(a) * kBlock;
  const int64_t tokens = a.tokens - first < a.length ? a.tokens - first : a.length;
  const int64_t stop = tokens - start < kBlock ? tokens : start + kBlock;
  return {unit, segment / segments(a), unit % a.heads, first, tokens, start, stop};
}

// step(Int<kQ>, first, count) for the blocks of vectors that tokens [start, stop) fill.
template <class F>
EFRDN_FAST_INLINE void by_vectors(int64_t start, int64_t stop, const F& step) {
  for (int64_t i = start; i < stop;) {
    const int64_t left = stop - i;
    const int count = static_cast<int>(left < kMaxVectors * kLanes ? left : kMaxVectors * kLanes);
    if (kMaxVectors > 2 && count > 2 * kLanes)
      step(Int<kMaxVectors>{}, i, count);
    else if (count > kLanes)
      step(Int<2>{}, i, count);
    else
      step(Int<1>{}, i, count);
    i += count;
  }
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
