// The 3x3 convolution of planar rows, for ACRB forward and backward.
#pragma once

#include "tiles.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {

#if defined(EFRDN_FAST_AVX512)
constexpr int kConvVectors = 3;  // 9 x 3 accumulators of 32 registers
#else
constexpr int kConvVectors = 1;
#endif

// Three planar rows above each other, the first channel and column 0 at each pointer.
struct Rows {
  const float* row[3];
  int64_t stride;  // between channels
};

// kOut output channels at kVectors * kLanes columns from j: bias plus the convolution over cin
// channels. `weight` is [cin, 3, 3, ...] with `cout` between taps; output channel o goes to
// out + o * out_stride.
template <int kOut, int kVectors>
EFRDN_FAST_INLINE void conv_block(const Rows& rows, int64_t j, int cin, int cout,
                                  const float* weight, const float* bias, float* out,
                                  int64_t out_stride) {
  V acc[kOut * kVectors];
  each<0, kOut>([&](auto o) EFRDN_FAST_LAMBDA {
    const V start = bias ? set1(bias[o]) : zero();
    each<0, kVectors>([&](auto v) EFRDN_FAST_LAMBDA { acc[o * kVectors + v] = start; });
  });
  for (int c = 0; c < cin; ++c)
    for (int ky = 0; ky < 3; ++ky) {
      const float* from = rows.row[ky] + c * rows.stride + j - 1;
      each<0, 3>([&](auto kx) EFRDN_FAST_LAMBDA {
        V x[kVectors];
        each<0, kVectors>([&](auto v) EFRDN_FAST_LAMBDA { x[v] = load(from + kx + v * kLanes); });
        each<0, kOut>([&](auto o) EFRDN_FAST_LAMBDA {
          const V w = set1(weight[kx * cout + o]);
          each<0, kVectors>([&](auto v) EFRDN_FAST_LAMBDA {
            acc[o * kVectors + v] = fma(w, x[v], acc[o * kVectors + v]);
          });
        });
      });
      weight += 3 * cout;
    }
  each<0, kOut>([&](auto o) EFRDN_FAST_LAMBDA {
    each<0, kVectors>([&](auto v) EFRDN_FAST_LAMBDA {
      store(out + o * out_stride + v * kLanes, acc[o * kVectors + v]);
    });
  });
}

// f(Int<size>, first) over blocks of output channels: 9 when there are 9, else 8, 4, 2, 1.
template <int kSize, class F>
EFRDN_FAST_INLINE void each_block(int first, int channels, const F& f) {
  for (; first + kSize <= channels; first += kSize) f(Int<kSize>{}, first);
  if constexpr (kSize > 1) each_block<kSize / 2>(first, channels, f);
}

// All `cout` output channels of one row into planar `out` (columns up to the next multiple of
// kLanes are written, those from w on with values that mean nothing).
template <int kD>
EFRDN_FAST_INLINE void conv_row(const Rows& rows, int64_t w, int cin, int cout, const float* weight,
                                const float* bias, float* out, int64_t out_stride) {
  const auto at = [&](auto vectors, int64_t j) EFRDN_FAST_LAMBDA {
    const auto block = [&](auto size, int first) EFRDN_FAST_LAMBDA {
      conv_block<decltype(size)::value, decltype(vectors)::value>(
          rows, j, cin, cout, weight + first, bias ? bias + first : nullptr,
          out + first * out_stride + j, out_stride);
    };
    if constexpr (kD == 9)
      block(Int<9>{}, 0);
    else
      each_block<8>(0, cout, block);
  };
  int64_t j = 0;
  for (; j + (kConvVectors - 1) * kLanes < w; j += kConvVectors * kLanes) at(Int<kConvVectors>{}, j);
  for (; j < w; j += kLanes) at(Int<1>{}, j);
}

// base + conv, or base + relu(conv), from planar rows to the channels-last row y.
template <bool kRelu, class T>
EFRDN_FAST_INLINE void add_row(const float* conv, const float* base, int64_t w, int d, T* y,
                               int64_t step) {
  const int64_t stride = row_stride(w);
  for (int64_t j = 0; j < w; j += kLanes) {
    const int count = w - j < kLanes ? static_cast<int>(w - j) : kLanes;
    for (int c = 0; c < d; c += kLanes) {
      const int from = c + kLanes <= d || d < kLanes ? c : d - kLanes;
      V r[kLanes];
      each<0, kLanes>([&](auto i) EFRDN_FAST_LAMBDA {
        const int64_t at = (from + i) * stride + kPad + j;
        if (i < d - from) {
          const V v = load(conv + at);
          r[i] = add(load(base + at), kRelu ? relu(v) : v);
        } else {
          r[i] = zero();
        }
      });
      store_transposed(r, y + j * step + from, step, count, d - from);
    }
  }
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
