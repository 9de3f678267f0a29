// ACRB backward: rolling buffers of three planar rows of the slice, of its gradient behind the ReLU,
// and of grad_y.
#include "acrb_cpu.h"
#include "conv_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

#if defined(EFRDN_FAST_AVX512)
constexpr int kSumOut = 9;  // 9 x 3 accumulators of 32 registers
#else
constexpr int kSumOut = 3;
#endif

// sum[tap, o] += g[o] * x[tap of row ky] over one row, for kOut output channels and one input
// channel; `sum` is [3, d, kLanes].
template <int kOut>
EFRDN_FAST_INLINE void weight_sums(const float* x, const float* g, int64_t stride, int64_t w, int d,
                                   float* sum) {
  V acc[3 * kOut];
  each<0, 3>([&](auto kx) EFRDN_FAST_LAMBDA {
    each<0, kOut>([&](auto o) EFRDN_FAST_LAMBDA {
      acc[kx * kOut + o] = load(sum + (kx * d + o) * kLanes);
    });
  });
  for (int64_t j = 0; j < w; j += kLanes) {
    const V left = load(x + j - 1), middle = load(x + j), right = load(x + j + 1);
    each<0, kOut>([&](auto o) EFRDN_FAST_LAMBDA {
      const V v = load(g + o * stride + j);
      acc[o] = fma(v, left, acc[o]);
      acc[kOut + o] = fma(v, middle, acc[kOut + o]);
      acc[2 * kOut + o] = fma(v, right, acc[2 * kOut + o]);
    });
  }
  each<0, 3>([&](auto kx) EFRDN_FAST_LAMBDA {
    each<0, kOut>([&](auto o) EFRDN_FAST_LAMBDA {
      store(sum + (kx * d + o) * kLanes, acc[kx * kOut + o]);
    });
  });
}

// Gradients of weight and bias from one row; sums are [d, 3, 3, d, kLanes] and [d, kLanes].
template <int kD>
EFRDN_FAST_INLINE void row_sums(const Rows& xs, const float* g, int64_t w, int d, float* sum_w,
                                float* sum_b) {
  for (int c = 0; c < d; ++c)
    for (int ky = 0; ky < 3; ++ky) {
      const float* x = xs.row[ky] + c * xs.stride;
      const auto block = [&](auto size, int first) EFRDN_FAST_LAMBDA {
        weight_sums<decltype(size)::value>(x, g + first * xs.stride, xs.stride, w, d,
                                           sum_w + ((c * 9 + ky * 3) * d + first) * kLanes);
      };
      if constexpr (kD == 9) {
        for (int o = 0; o < 9; o += kSumOut) block(Int<kSumOut>{}, o);
      } else {
        each_block<2>(0, d, block);
      }
    }
  for (int o = 0; o < d; ++o) {
    V acc = load(sum_b + o * kLanes);
    for (int64_t j = 0; j < w; j += kLanes) acc = add(acc, load(g + o * xs.stride + j));
    store(sum_b + o * kLanes, acc);
  }
}

template <int kD, class T>
void backward(const AcrbBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const AcrbArgs& f = a.forward;
  const int d = kD ? kD : static_cast<int>(f.d);
  const int64_t stride = row_stride(f.w), ring_row = stride * d;
  const size_t row_bytes = static_cast<size_t>(ring_row) * sizeof(float);
  float* const conv = scratch + 9 * ring_row;
  float* const sum_w = conv + ring_row;
  float* const sum_b = sum_w + 9 * d * d * kLanes;
  memset(scratch, 0, 10 * row_bytes);

  // kind 0: xs, 1: gradient behind the ReLU, 2: grad_y
  const auto ring = [&](int kind, int64_t row) {
    return scratch + (3 * kind + (row + 3) % 3) * ring_row;
  };
  const auto around = [&](int kind, int64_t row) {
    return Rows{{ring(kind, row - 1) + kPad, ring(kind, row) + kPad, ring(kind, row + 1) + kPad},
                stride};
  };
  const auto rows = [&](int64_t n, int64_t first, int64_t last) {
    const T* x = static_cast<const T*>(f.x.data) + n * f.x.stride_n;
    const T* grad_y = static_cast<const T*>(a.grad_y.data) + n * a.grad_y.stride_n;
    T* grad_x = static_cast<T*>(a.grad_x.data) + n * a.grad_x.stride_n;
    const auto fill = [&](int64_t row) {
      if (row >= 0 && row < f.h)
        planar_row(x + row * f.x.stride_h, f.x.stride_w, f.w, d, ring(0, row));
      else
        memset(ring(0, row), 0, row_bytes);
    };
    for (int64_t row = first - 2; row < first; ++row) fill(row);
    for (int64_t row = first - 1; row <= last; ++row) {
      fill(row + 1);
      float* g = ring(1, row);
      if (row >= 0 && row < f.h) {
        float* y = ring(2, row);
        planar_row(grad_y + row * a.grad_y.stride_h, a.grad_y.stride_w, f.w, d, y);
        conv_row<kD>(around(0, row), f.w, d, d, f.weight, f.bias, conv + kPad, stride);
        for (int c = 0; c < d; ++c)
          for (int64_t at = c * stride + kPad; at < c * stride + kPad + f.w; at += kLanes)
            store(g + at, relu_backward(load(conv + at), load(y + at)));
      } else {
        memset(g, 0, row_bytes);
      }
      if (row >= first && row < last) row_sums<kD>(around(0, row), g + kPad, f.w, d, sum_w, sum_b);
      if (row > first) {
        T* to = grad_x + (row - 1) * a.grad_x.stride_h;
        memset(to, 0, static_cast<size_t>(f.w * a.c) * sizeof(T));
        conv_row<kD>(around(1, row - 1), f.w, d, d, a.turned, nullptr, conv + kPad, stride);
        add_row<false>(conv, ring(2, row - 1), f.w, d, to + a.start, a.grad_x.stride_w);
      }
    }
  };

  const int64_t size = 9 * d * d + d;
  for (int64_t strip = begin; strip < end; ++strip) {
    memset(sum_w, 0, static_cast<size_t>(size * kLanes) * sizeof(float));
    int64_t row = strip * a.strip_rows;
    const int64_t stop = row + a.strip_rows < f.n * f.h ? row + a.strip_rows : f.n * f.h;
    while (row < stop) {
      const int64_t first = row % f.h;
      const int64_t last = first + stop - row < f.h ? first + stop - row : f.h;
      rows(row / f.h, first, last);
      row += last - first;
    }
    for (int64_t i = 0; i < size; ++i) a.partial[strip * size + i] = lane_sum(sum_w + i * kLanes);
  }
}

template <class T>
void by_channels(const AcrbBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  if (a.forward.d == 9)
    backward<9, T>(a, begin, end, scratch);
  else
    backward<0, T>(a, begin, end, scratch);
}

}  // namespace

void acrb_backward(const AcrbBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  EFRDN_FAST_BY_DTYPE(a.forward.dtype, by_channels<T>(a, begin, end, scratch))
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
