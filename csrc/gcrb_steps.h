// The steps of GCRB on a block of kLanes pixels. Pixels lie in the lanes where channels are summed,
// channels in the lanes where the map is read or written.
#pragma once

#include "gcrb_cpu.h"
#include "tiles.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {

// Sizes known at compile time.
template <int kC, int kM, int kG>
struct Fixed {
  static constexpr bool kFixed = true;
  static constexpr int kChunks = (kC + kLanes - 1) / kLanes, kMids = kM;
  static constexpr int c() { return kC; }
  static constexpr int m() { return kM; }
  static constexpr int group_channels() { return kC / kG; }
  static constexpr int group_mids() { return kM / kG; }
};

// Sizes known at run time.
struct Dynamic {
  static constexpr bool kFixed = false;
  static constexpr int kMids = 1;
  int64_t c_, m_, groups_;
  int c() const { return static_cast<int>(c_); }
  int m() const { return static_cast<int>(m_); }
  int group_channels() const { return static_cast<int>(c_ / groups_); }
  int group_mids() const { return static_cast<int>(m_ / groups_); }
};

template <class D>
constexpr int chunks(const D& d) {
  return (d.c() + kLanes - 1) / kLanes;
}

// Mid channels connected with the channels of a chunk: [mid_begin, mid_end).
template <class D>
constexpr int mid_begin(const D& d, int chunk) {
  return chunk * kLanes / d.group_channels() * d.group_mids();
}
template <class D>
constexpr int mid_end(const D& d, int chunk) {
  const int last = (chunk + 1) * kLanes < d.c() ? (chunk + 1) * kLanes - 1 : d.c() - 1;
  return (last / d.group_channels() + 1) * d.group_mids();
}

// f(chunk) for all chunks, unrolled where their number is fixed.
template <class D, class F>
EFRDN_FAST_INLINE void each_chunk(const D& d, const F& f) {
  if constexpr (D::kFixed) {
    each<0, D::kChunks>(f);
  } else {
    for (int chunk = 0; chunk < chunks(d); ++chunk) f(chunk);
  }
}

// f(m) for the mid channels connected with a chunk.
template <class D, class Chunk, class F>
EFRDN_FAST_INLINE void each_mid(const D& d, Chunk chunk, const F& f) {
  if constexpr (D::kFixed) {
    each<mid_begin(D{}, Chunk{}), mid_end(D{}, Chunk{})>(f);
  } else {
    const int end = mid_end(d, chunk);
    for (int m = mid_begin(d, chunk); m < end; ++m) f(m);
  }
}

// Weights between a mid channel and a chunk of channels, the channels in the lanes:
// out[(chunk * M + m) * kLanes + lane] = value(c, m), zero where the groups differ.
template <class D, class F>
void spread(const D& d, float* out, const F& value) {
  const int cg = d.group_channels(), mg = d.group_mids();
  for (int chunk = 0; chunk < chunks(d); ++chunk)
    for (int m = 0; m < d.m(); ++m)
      for (int i = 0; i < kLanes; ++i) {
        const int c = chunk * kLanes + i;
        out[(chunk * d.m() + m) * kLanes + i] =
            c < d.c() && c / cg == m / mg ? value(c, m) : 0.0f;
      }
}

// Bias of the output channels, zero up to a full chunk.
template <class D>
void pad_bias(const D& d, const float* bias, float* out) {
  for (int c = 0; c < chunks(d) * kLanes; ++c) out[c] = c < d.c() ? bias[c] : 0.0f;
}

// out[m] = bias[m] + sum over the channels i of m's group of weight[m, i] * input[i], pixels in
// the lanes. `fetch(chunk, r)` gives the transposed channels of a chunk; `weight` is
// [M, C / groups], `bias` may be null.
template <class D, class Fetch>
EFRDN_FAST_INLINE void contract(const D& d, const float* weight, const float* bias, float* out,
                                int64_t out_stride, const Fetch& fetch) {
  const int cg = d.group_channels(), mg = d.group_mids();
  if constexpr (D::kFixed) {
    V acc[D::kMids];
    each<0, D::kMids>([&](auto m) EFRDN_FAST_LAMBDA { acc[m] = bias ? set1(bias[m]) : zero(); });
    each<0, D::kChunks>([&](auto chunk) EFRDN_FAST_LAMBDA {
      V r[kLanes];
      fetch(chunk, r);
      each<0, kLanes>([&](auto i) EFRDN_FAST_LAMBDA {
        constexpr int c = chunk * kLanes + i;
        if constexpr (c < D::c()) {
          constexpr int group = c / D::group_channels();
          each<group * D::group_mids(), (group + 1) * D::group_mids()>(
              [&](auto m) EFRDN_FAST_LAMBDA {
                acc[m] = fma(set1(weight[m * cg + c % cg]), r[i], acc[m]);
              });
        }
      });
    });
    each<0, D::kMids>([&](auto m) EFRDN_FAST_LAMBDA { store(out + m * out_stride, acc[m]); });
  } else {
    for (int m = 0; m < d.m(); ++m) store(out + m * out_stride, bias ? set1(bias[m]) : zero());
    for (int chunk = 0; chunk < chunks(d); ++chunk) {
      V r[kLanes];
      fetch(chunk, r);
      const int begin = chunk * kLanes;
      const int end = begin + kLanes < d.c() ? begin + kLanes : d.c();
      each_mid(d, chunk, [&](int m) EFRDN_FAST_LAMBDA {
        const int first_c = m / mg * cg;
        const int from = begin > first_c ? begin : first_c;
        const int to = end < first_c + cg ? end : first_c + cg;
        V acc = load(out + m * out_stride);
        for (int c = from; c < to; ++c)
          acc = fma(set1(weight[m * cg + c - first_c]), r[c - begin], acc);
        store(out + m * out_stride, acc);
      });
    }
  }
}

// Part 1 of one row: mid = relu(W1 x + b1), zero beyond column w.
template <class D, class T>
EFRDN_FAST_INLINE void squeeze_row(const D& d, const GcrbArgs& a, const T* x, float* mid) {
  const int64_t stride = row_stride(a.w), step = a.x.stride_w;
  for (int64_t j = 0; j < a.w; j += kLanes) {
    const int count = a.w - j < kLanes ? static_cast<int>(a.w - j) : kLanes;
    float* out = mid + kPad + j;
    prefetch_pixels<false>(x + (j + 4 * kLanes) * step, step, d.c());
    contract(d, a.w1, a.b1, out, stride, [&](auto chunk, V(&r)[kLanes]) EFRDN_FAST_LAMBDA {
      load_transposed(r, x + j * step + chunk * kLanes, step, count, d.c() - chunk * kLanes);
    });
    for (int m = 0; m < d.m(); ++m) {
      const V v = relu(load(out + m * stride));
      store(out + m * stride, count == kLanes ? v : keep(v, count));
    }
  }
}

// Depthwise outputs of kLanes pixels: acc + sum of w[3, 3] * rows, column j in the middle.
EFRDN_FAST_INLINE V depthwise(const float* const (&rows)[3], int64_t j, const float* w, V acc) {
  each<0, 9>([&](auto tap) EFRDN_FAST_LAMBDA {
    acc = fma(set1(w[tap]), load(rows[tap / 3] + j + tap % 3 - 1), acc);
  });
  return acc;
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
