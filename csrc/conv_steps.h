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

// acc[o, v] += three taps of one row of one input channel: at(i) are the kLanes columns from i - 1 on.
// `cout` between the taps of weight.
template <int kOut, int kVectors, class At>
EFRDN_FAST_INLINE void add_taps(V (&acc)[kOut * kVectors], const float* weight, int cout,
                                const At& at) {
  each<0, 3>([&](auto kx) EFRDN_FAST_LAMBDA {
    V x[kVectors];
    each<0, kVectors>([&](auto v) EFRDN_FAST_LAMBDA { x[v] = at(kx + v * kLanes); });
    each<0, kOut>([&](auto o) EFRDN_FAST_LAMBDA {
      const V w = set1(weight[kx * cout + o]);
      each<0, kVectors>([&](auto v) EFRDN_FAST_LAMBDA {
        acc[o * kVectors + v] = fma(w, x[v], acc[o * kVectors + v]);
      });
    });
  });
}

// f(i, o, v): accumulator i, of output channel o and vector v.
template <int kOut, int kVectors, class F>
EFRDN_FAST_INLINE void each_sum(const F& f) {
  each<0, kOut>([&](auto o) EFRDN_FAST_LAMBDA {
    each<0, kVectors>([&](auto v) EFRDN_FAST_LAMBDA { f(Int<o * kVectors + v>{}, o, v); });
  });
}

// kOut output channels at kVectors * kLanes columns from j: bias plus the convolution over cin
// channels. `weight` is [cin, 3, 3, ...] with `cout` between taps; output channel o goes to
// out + o * out_stride.
template <int kOut, int kVectors>
EFRDN_FAST_INLINE void conv_block(const Rows& rows, int64_t j, int cin, int cout,
                                  const float* weight, const float* bias, float* out,
                                  int64_t out_stride) {
  V acc[kOut * kVectors];
  each_sum<kOut, kVectors>([&](auto i, auto o, auto) EFRDN_FAST_LAMBDA {
    acc[i] = bias ? set1(bias[o]) : zero();
  });
  for (int c = 0; c < cin; ++c)
    for (int ky = 0; ky < 3; ++ky, weight += 3 * cout) {
      const float* from = rows.row[ky] + c * rows.stride + j - 1;
      add_taps<kOut, kVectors>(acc, weight, cout,
                               [&](int i) EFRDN_FAST_LAMBDA { return load(from + i); });
    }
  each_sum<kOut, kVectors>([&](auto i, auto o, auto v) EFRDN_FAST_LAMBDA {
    store(out + o * out_stride + v * kLanes, acc[i]);
  });
}

// Two rows at a time by Winograd's F(2, 3) down the columns: with d the four rows around and g the
// rows of a tap,
//   y0 = m0 + m1 + m2    m0 = (d0 - d2) g0    m1 = (d1 + d2) (g0 + g1 + g2) / 2
//   y1 = m1 - m2 + m3    m3 = (d3 - d1) g2    m2 = (d2 - d1) (g0 - g1 + g2) / 2
// Four products instead of six, and the sums of rows run beside the multiply-adds.

// From [cin, 3, 3, cout] to the factors [4, cin, 3, cout] above; whether all are finite.
inline bool pair_weights(const float* weight, int cin, int cout, float* out) {
  const int64_t plane = static_cast<int64_t>(cin) * 3 * cout;
  float zeros = 0.0f;
  for (int c = 0; c < cin; ++c)
    for (int i = 0; i < 3 * cout; ++i, ++out) {
      const float* g = weight + c * 9 * cout + i;
      const float outer = g[0] + g[6 * cout], inner = g[3 * cout];
      out[0] = g[0], out[plane] = 0.5f * (outer + inner);
      out[2 * plane] = 0.5f * (outer - inner), out[3 * plane] = g[6 * cout];
      zeros += 0.0f * out[plane] + 0.0f * out[2 * plane];  // each has all three weights in it
    }
  return zeros == 0.0f;
}

struct PairRows {
  const float* row[4];
  int64_t stride;
};

// As conv_block for the rows at out[0] and out[1]; `plane` floats between the factors.
template <int kOut, int kVectors>
EFRDN_FAST_INLINE void conv_pair_block(const PairRows& rows, int64_t j, int cin, int cout,
                                       const float* weight, int64_t plane, const float* bias,
                                       float* const (&out)[2], int64_t out_stride) {
  constexpr int kSums = kOut * kVectors;
  const auto product = [&](auto m, V(&acc)[kSums]) EFRDN_FAST_LAMBDA {
    constexpr int kFirst[] = {0, 1, 2, 3}, kSecond[] = {2, 2, 1, 1};
    const float *a = rows.row[kFirst[m]] + j - 1, *b = rows.row[kSecond[m]] + j - 1;
    const float* w = weight + m * plane;
    for (int c = 0; c < cin; ++c, a += rows.stride, b += rows.stride, w += 3 * cout)
      add_taps<kOut, kVectors>(acc, w, cout, [&](int i) EFRDN_FAST_LAMBDA {
        return m == 1 ? add(load(a + i), load(b + i)) : sub(load(a + i), load(b + i));
      });
  };
  const auto place = [&](int row, int o, int v) EFRDN_FAST_LAMBDA {
    return out[row] + o * out_stride + v * kLanes;
  };
  V acc[kSums];
  each_sum<kOut, kVectors>([&](auto i, auto o, auto) EFRDN_FAST_LAMBDA { acc[i] = set1(bias[o]); });
  product(Int<1>{}, acc);
  each_sum<kOut, kVectors>([&](auto i, auto o, auto v) EFRDN_FAST_LAMBDA {
    store(place(0, o, v), acc[i]);
    acc[i] = zero();
  });
  product(Int<2>{}, acc);
  each_sum<kOut, kVectors>([&](auto i, auto o, auto v) EFRDN_FAST_LAMBDA {
    const V same = load(place(0, o, v));
    store(place(1, o, v), sub(same, acc[i]));
    acc[i] = add(same, acc[i]);
  });
  product(Int<0>{}, acc);
  each_sum<kOut, kVectors>([&](auto i, auto o, auto v) EFRDN_FAST_LAMBDA {
    store(place(0, o, v), acc[i]);
    acc[i] = load(place(1, o, v));
  });
  product(Int<3>{}, acc);
  each_sum<kOut, kVectors>([&](auto i, auto o, auto v) EFRDN_FAST_LAMBDA {
    store(place(1, o, v), acc[i]);
  });
}

// f(Int<size>, first) over blocks of output channels: 9 when there are 9, else 8, 4, 2, 1.
template <int kSize, class F>
EFRDN_FAST_INLINE void each_block(int first, int channels, const F& f) {
  for (; first + kSize <= channels; first += kSize) f(Int<kSize>{}, first);
  if constexpr (kSize > 1) each_block<kSize / 2>(first, channels, f);
}

// block(Int<output channels>, first, Int<vectors>, column) over a row.
template <int kD, class F>
EFRDN_FAST_INLINE void each_conv_block(int64_t w, int cout, const F& block) {
  const auto at = [&](auto vectors, int64_t j) EFRDN_FAST_LAMBDA {
    if constexpr (kD == 9)
      block(Int<9>{}, 0, vectors, j);
    else
      each_block<8>(0, cout, [&](auto size, int first) EFRDN_FAST_LAMBDA {
        block(size, first, vectors, j);
      });
  };
  int64_t j = 0;
  for (; j + (kConvVectors - 1) * kLanes < w; j += kConvVectors * kLanes) at(Int<kConvVectors>{}, j);
  if (kConvVectors > 2 && j + kLanes < w) {
    at(Int<2>{}, j);
    j += 2 * kLanes;
  }
  for (; j < w; j += kLanes) at(Int<1>{}, j);
}

// All `cout` output channels of one row into planar `out` (columns up to the next multiple of
// kLanes are written, those from w on with values that mean nothing).
template <int kD>
EFRDN_FAST_INLINE void conv_row(const Rows& rows, int64_t w, int cin, int cout, const float* weight,
                                const float* bias, float* out, int64_t out_stride) {
  each_conv_block<kD>(w, cout, [&](auto size, int o, auto vectors, int64_t j) EFRDN_FAST_LAMBDA {
    conv_block<decltype(size)::value, decltype(vectors)::value>(
        rows, j, cin, cout, weight + o, bias ? bias + o : nullptr, out + o * out_stride + j,
        out_stride);
  });
}

// The same for two rows, with weights from pair_weights.
template <int kD>
EFRDN_FAST_INLINE void conv_pair(const PairRows& rows, int64_t w, int cin, int cout,
                                 const float* weight, const float* bias, float* const (&out)[2],
                                 int64_t out_stride) {
  const int64_t plane = static_cast<int64_t>(cin) * 3 * cout;
  each_conv_block<kD>(w, cout, [&](auto size, int o, auto vectors, int64_t j) EFRDN_FAST_LAMBDA {
    float* const to[2] = {out[0] + o * out_stride + j, out[1] + o * out_stride + j};
    conv_pair_block<decltype(size)::value, decltype(vectors)::value>(
        rows, j, cin, cout, weight + o, plane, bias + o, to, out_stride);
  });
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
