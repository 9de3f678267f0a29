// Steps of the fusing 3x3 convolution on rows of NHWC floats.
#pragma once

#include "merge3x3_cpu.h"
#include "sigmoid.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {

#if defined(EFRDN_FAST_AVX512)
constexpr int kMergePixels = 8;  // accumulators beside 12 weights and 4 inputs of 32 registers
#else
constexpr int kMergePixels = 4;
#endif

// Lane 4 i + kLane of `a` in the lanes 4 i to 4 i + 3.
template <int kLane>
EFRDN_FAST_INLINE V spread_in_four(V a) {
#if defined(EFRDN_FAST_AVX512)
  return _mm512_permute_ps(a, 0x55 * kLane);
#elif defined(EFRDN_FAST_AVX2)
  return _mm256_permute_ps(a, 0x55 * kLane);
#else
  return set1(a[kLane]);
#endif
}

// a0, b0, a1, b1, ... in two vectors, and back.
EFRDN_FAST_INLINE void join_lanes(V a, V b, V& low, V& high) {
#if defined(EFRDN_FAST_AVX512)
  const __m512i index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = _mm512_permutex2var_ps(a, index, b);
  high = _mm512_permutex2var_ps(a, _mm512_add_epi32(index, _mm512_set1_epi32(8)), b);
#elif defined(EFRDN_FAST_AVX2)
  const V even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  low = _mm256_permute2f128_ps(even, odd, 0x20);
  high = _mm256_permute2f128_ps(even, odd, 0x31);
#else
  low = V{a[0], b[0], a[1], b[1]};
  high = V{a[2], b[2], a[3], b[3]};
#endif
}
EFRDN_FAST_INLINE void part_lanes(V low, V high, V& a, V& b) {
#if defined(EFRDN_FAST_AVX512)
  const __m512i index =
      _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  a = _mm512_permutex2var_ps(low, index, high);
  b = _mm512_permutex2var_ps(low, _mm512_add_epi32(index, _mm512_set1_epi32(1)), high);
#elif defined(EFRDN_FAST_AVX2)
  const V first = _mm256_permute2f128_ps(low, high, 0x20);
  const V second = _mm256_permute2f128_ps(low, high, 0x31);
  a = _mm256_shuffle_ps(first, second, 0x88);
  b = _mm256_shuffle_ps(first, second, 0xdd);
#else
  a = V{low[0], low[2], high[0], high[2]};
  b = V{low[1], low[3], high[1], high[3]};
#endif
}

// The gate of one row: sigmoid of its logits at `gate`, which has room for a full vector.
EFRDN_FAST_INLINE void gate_row(const float* logits, int64_t size, float* gate) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int count = size - i < kLanes ? static_cast<int>(size - i) : kLanes;
    store(gate + i, sigmoid(load_some(logits + i, count)));
  }
}

// One row of the joined map at `to`, `source_size` floats from one source to the next. `gate` is
// that of the row or of the image.
template <class T>
EFRDN_FAST_INLINE void join_row(const MergeArgs& f, const T* a, const T* b, const float* gate,
                                float* to, int64_t source_size) {
  const int64_t ca = merge_channels_a(f), step_a = f.a.stride_w, step_b = f.b.stride_w;
  const auto gated = [&](int64_t j, int64_t c) EFRDN_FAST_LAMBDA {
    const V v = load(a + j * step_a + c);
    if (f.gate == Gate::kNone) return v;
    return mul(v, f.gate == Gate::kPixel ? set1(gate[j]) : load(gate + c));
  };
  const auto other = [&](int64_t j, int64_t c) EFRDN_FAST_LAMBDA {
    const V v = load(b + j * step_b + c);
    return f.relu ? relu(v) : v;
  };
  to += f.c;
  for (int64_t j = 0; j < f.w; ++j)
    for (int64_t c = 0; c < ca; c += kLanes) {
      if (f.join == Join::kPairs) {
        V low, high;
        join_lanes(gated(j, c), other(j, c), low, high);
        store(to + j * f.c + 2 * c, low);
        store(to + j * f.c + 2 * c + kLanes, high);
        continue;
      }
      store(to + j * f.c + c, gated(j, c));
      if (f.join == Join::kTwo) store(to + source_size + j * f.c + c, other(j, c));
    }
}

// Three rows above each other, beginning at the zero pixel.
struct Around {
  const float* row[3];
};

// acc[p] += the convolution of kMergePixels pixels from column j, kLanes channels from c.
EFRDN_FAST_INLINE void merge_block(const Around& rows, int64_t j, int64_t c,
                                   int64_t channels, const float* weight, V (&acc)[kMergePixels]) {
  for (int ky = 0; ky < 3; ++ky) {
    const float* from = rows.row[ky] + j * channels + c;
    const float* w = weight + ky * 12 * channels + c;
    each<0, kMergePixels + 2>([&](auto i) EFRDN_FAST_LAMBDA {
      const V v = load(from + i * channels);
      each<0, 4>([&](auto in) EFRDN_FAST_LAMBDA {
        const V x = spread_in_four<in>(v);
        each<0, 3>([&](auto kx) EFRDN_FAST_LAMBDA {
          if constexpr (i - kx >= 0 && i - kx < kMergePixels)
            acc[i - kx] = fma(load(w + (kx * 4 + in) * channels), x, acc[i - kx]);
        });
      });
    });
  }
}

// finish(p, c, value) for `count` pixels from column j: the convolution of all sources.
template <class F>
EFRDN_FAST_INLINE void merge_pixels(const Around* rows, int64_t sources, int64_t j,
                                    int64_t channels, const float* weight, const F& finish) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    V acc[kMergePixels];
    each<0, kMergePixels>([&](auto p) EFRDN_FAST_LAMBDA { acc[p] = zero(); });
    for (int64_t s = 0; s < sources; ++s)
      merge_block(rows[s], j, c, channels, weight + s * 36 * channels, acc);
    each<0, kMergePixels>([&](auto p) EFRDN_FAST_LAMBDA { finish(p, c, acc[p]); });
  }
}

// Gradient of the weight from one row: sums [3, 3, 4 in, C out] gain the rows around it times g,
// which begins at its zero pixel.
EFRDN_FAST_INLINE void merge_weight_sums(const Around& rows, const float* g, int64_t w,
                                         int64_t channels, float* sums) {
  for (int64_t c = 0; c < channels; c += kLanes)
    for (int ky = 0; ky < 3; ++ky) {
      float* to = sums + ky * 12 * channels + c;
      V acc[12];
      each<0, 12>([&](auto i) EFRDN_FAST_LAMBDA { acc[i] = load(to + i * channels); });
      for (int64_t j = 0; j < w; ++j) {
        const V value = load(g + (j + 1) * channels + c);
        each<0, 3>([&](auto kx) EFRDN_FAST_LAMBDA {
          const V v = load(rows.row[ky] + (j + kx) * channels + c);
          each<0, 4>([&](auto in) EFRDN_FAST_LAMBDA {
            acc[kx * 4 + in] = fma(spread_in_four<in>(v), value, acc[kx * 4 + in]);
          });
        });
      }
      each<0, 12>([&](auto i) EFRDN_FAST_LAMBDA { store(to + i * channels, acc[i]); });
    }
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
