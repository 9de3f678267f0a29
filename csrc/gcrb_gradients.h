// The two ends of GCRB backward on a block of pixels: behind part 3, and in front of part 1.
#pragma once

#include "gcrb_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {

// total [M of a chunk, kLanes] += sum, registers of a block of pixels.
template <class D, class Chunk>
EFRDN_FAST_INLINE void add_sums(const D& d, Chunk chunk, const V* sum, float* total) {
  each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
    store(total + m * kLanes, add(load(total + m * kLanes), sum[m]));
  });
}

// g3 = grad_y where part 3 is open, for one chunk of `count` pixels, into the tile
// [kLanes, kLanes]. sum_w and sum_b, laid out like w3 and b3, gain its products with the mid
// channels [M, kLanes] at `block`, and itself. The pixels are added up by themselves first: one
// running sum of a strip's thousand would lose a digit.
template <class D, class T, class Chunk>
EFRDN_FAST_INLINE void open_gradient(const D& d, Chunk chunk, const float* block, const float* w3,
                                     const float* b3, const T* grad_y, int64_t step, int count,
                                     float* tile, float* sum_w, float* sum_b) {
  const int rest = d.c() - chunk * kLanes;
  const float* w = w3 + chunk * d.m() * kLanes;
  sum_w += chunk * d.m() * kLanes;
  sum_b += chunk * kLanes;
  const V bias = load(b3 + chunk * kLanes);
  V total = zero(), weight[D::kMids], sum[D::kMids];
  if constexpr (D::kFixed)
    each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
      weight[m] = load(w + m * kLanes);
      sum[m] = zero();
    });
  for (int p = 0; p < count; ++p) {
    V acc = bias;
    each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
      const V value = set1(block[m * kLanes + p]);
      if constexpr (D::kFixed)
        acc = fma(value, weight[m], acc);
      else
        acc = fma(value, load(w + m * kLanes), acc);
    });
    const V g3 = relu_backward(acc, load_some(grad_y + p * step + chunk * kLanes, rest));
    store(tile + p * kLanes, g3);
    total = add(total, g3);
    each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
      const V value = set1(block[m * kLanes + p]);
      if constexpr (D::kFixed)
        sum[m] = fma(value, g3, sum[m]);
      else
        store(sum_w + m * kLanes, fma(value, g3, load(sum_w + m * kLanes)));
    });
  }
  store(sum_b, add(load(sum_b), total));
  if constexpr (D::kFixed) add_sums(d, chunk, sum, sum_w);
}

// grad_x = grad_y + W1^T g1 for `count` pixels, g1 [M, kLanes] at `block`; sum_w, laid out like w1,
// gains the products of g1 and x.
template <class D, class T>
EFRDN_FAST_INLINE void spread_gradient(const D& d, const float* block, const float* w1, const T* x,
                                       int64_t step_x, const T* grad_y, int64_t step_y, T* grad_x,
                                       int64_t step, int count, float* sum_w1) {
  each_chunk(d, [&](auto chunk) EFRDN_FAST_LAMBDA {
    const int rest = d.c() - chunk * kLanes;
    const float* w = w1 + chunk * d.m() * kLanes;
    float* sum_w = sum_w1 + chunk * d.m() * kLanes;
    V weight[D::kMids], sum[D::kMids];
    if constexpr (D::kFixed)
      each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
        weight[m] = load(w + m * kLanes);
        sum[m] = zero();
      });
    for (int p = 0; p < count; ++p) {
      const V value = load_some(x + p * step_x + chunk * kLanes, rest);
      V acc = load_some(grad_y + p * step_y + chunk * kLanes, rest);
      each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
        const V g1 = set1(block[m * kLanes + p]);
        if constexpr (D::kFixed) {
          acc = fma(g1, weight[m], acc);
          sum[m] = fma(g1, value, sum[m]);
        } else {
          acc = fma(g1, load(w + m * kLanes), acc);
          store(sum_w + m * kLanes, fma(g1, value, load(sum_w + m * kLanes)));
        }
      });
      store_some(grad_x + p * step + chunk * kLanes, acc, rest);
    }
    if constexpr (D::kFixed) add_sums(d, chunk, sum, sum_w);
  });
}

// Sums laid out by chunks (`spread`) into [M, C / groups].
template <class D>
void gather_mid_major(const D& d, const float* sums, float* out) {
  const int cg = d.group_channels(), mg = d.group_mids();
  for (int m = 0; m < d.m(); ++m)
    for (int i = 0; i < cg; ++i) {
      const int c = m / mg * cg + i;
      *out++ = sums[(c / kLanes * d.m() + m) * kLanes + c % kLanes];
    }
}

// Sums laid out by chunks into [C, M / groups].
template <class D>
void gather_channel_major(const D& d, const float* sums, float* out) {
  const int cg = d.group_channels(), mg = d.group_mids();
  for (int c = 0; c < d.c(); ++c)
    for (int i = 0; i < mg; ++i)
      *out++ = sums[(c / kLanes * d.m() + c / cg * mg + i) * kLanes + c % kLanes];
}

// sum[tap] += g * row at the tap, over one row of one channel; `sum` is [9, kLanes].
EFRDN_FAST_INLINE void depthwise_sums(const float* const (&rows)[3], const float* g, int64_t w,
                                      float* sum) {
  V acc[9];
  each<0, 9>([&](auto t) EFRDN_FAST_LAMBDA { acc[t] = load(sum + t * kLanes); });
  for (int64_t j = 0; j < w; j += kLanes) {
    const V v = load(g + j);
    each<0, 9>([&](auto t) EFRDN_FAST_LAMBDA {
      acc[t] = fma(v, load(rows[t / 3] + j + t % 3 - 1), acc[t]);
    });
  }
  each<0, 9>([&](auto t) EFRDN_FAST_LAMBDA { store(sum + t * kLanes, acc[t]); });
}

// sum += row over w columns, zero beyond; `sum` is [kLanes].
EFRDN_FAST_INLINE void add_lanes(const float* row, int64_t w, float* sum) {
  V acc = load(sum);
  for (int64_t j = 0; j < w; j += kLanes) acc = add(acc, load(row + j));
  store(sum, acc);
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
