// The passes of GCRB with batch statistics; gcrb_train_cpu.h says what each does.
#include "gcrb_train_cpu.h"

#include "gcrb_gradients.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

// f(dims) with the sizes of the arguments.
template <class F>
EFRDN_FAST_INLINE void with_dims(const GcrbArgs& a, const F& f) {
  if (a.c == 32 && a.m == 8 && a.groups == 2)
    f(Fixed<32, 8, 2>{});
  else
    f(Dynamic{a.c, a.m, a.groups});
}

int columns(const GcrbArgs& a, int64_t j) {
  return a.w - j < kLanes ? static_cast<int>(a.w - j) : kLanes;
}

int64_t map_row(const GcrbArgs& a) { return a.m * row_stride(a.w); }

// relu(scale a + shift) of one channel, zero beyond column w.
EFRDN_FAST_INLINE V activate(const GcrbArgs& a, const float* row, int64_t j, float scale,
                             float shift) {
  return keep(relu(fma(set1(scale), load(row + j), set1(shift))), columns(a, j));
}

// Mean over a row of w columns.
float row_mean(const float* row, int64_t w) {
  V sum = zero();
  for (int64_t j = 0; j < w; j += kLanes) sum = add(sum, load(row + j));
  float lanes[kLanes];
  store(lanes, sum);
  return lane_sum(lanes) / static_cast<float>(w);
}

// Sum over a row of (p - mean_p) (q - mean_q).
float row_product(const float* p, float mean_p, const float* q, float mean_q, int64_t w) {
  V sum = zero();
  for (int64_t j = 0; j < w; j += kLanes) {
    const int count = w - j < kLanes ? static_cast<int>(w - j) : kLanes;
    const V d = keep(sub(load(p + j), set1(mean_p)), count);
    sum = fma(d, sub(load(q + j), set1(mean_q)), sum);
  }
  float lanes[kLanes];
  store(lanes, sum);
  return lane_sum(lanes);
}

// Mean and sum of squared deviations of the M channels of a row: two passes over cached memory.
void row_moments(const GcrbArgs& a, const float* row, float* out) {
  for (int64_t m = 0; m < a.m; ++m) {
    const float* p = row + m * row_stride(a.w) + kPad;
    out[m] = row_mean(p, a.w);
    out[a.m + m] = row_product(p, out[m], p, out[m], a.w);
  }
}

// A ring of three planar rows, filled by make(row, out) inside the image and zero outside.
struct Ring {
  float* data;
  int64_t size, height;
  float* at(int64_t row) const { return data + (row + 3) % 3 * size; }
  template <class F>
  void fill(int64_t row, const F& make) const {
    if (row >= 0 && row < height)
      make(row, at(row));
    else
      memset(at(row), 0, static_cast<size_t>(size) * sizeof(float));
  }
};

// f(image, first, last) over the pieces of rows [begin, end) that lie in one image.
template <class F>
void each_image(const GcrbArgs& a, int64_t begin, int64_t end, const F& f) {
  while (begin < end) {
    const int64_t first = begin % a.h;
    const int64_t last = first + end - begin < a.h ? first + end - begin : a.h;
    f(begin / a.h, first, last);
    begin += last - first;
  }
}

template <class F>
void each_strip(const GcrbTrainArgs& a, int64_t begin, int64_t end, const F& f) {
  const int64_t rows = a.base.n * a.base.h;
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t from = strip * a.strip_rows;
    f(strip, from, from + a.strip_rows < rows ? from + a.strip_rows : rows);
  }
}

// m1 of a row of the image whose rows of a1 start at a1.
void make_m1(const GcrbTrainArgs& t, const float* a1, int64_t row, float* out) {
  const GcrbArgs& a = t.base;
  for (int64_t m = 0; m < a.m; ++m) {
    const int64_t at = m * row_stride(a.w) + kPad;
    const float* from = a1 + row * map_row(a) + at;
    for (int64_t j = 0; j < a.w; j += kLanes)
      store(out + at + j, activate(a, from, j, t.scale1[m], t.shift1[m]));
  }
}

// m2 of kLanes pixels into block [M, kLanes].
EFRDN_FAST_INLINE void make_m2(const GcrbTrainArgs& t, const float* a2, int64_t j, float* block) {
  const GcrbArgs& a = t.base;
  for (int64_t m = 0; m < a.m; ++m)
    store(block + m * kLanes,
          activate(a, a2 + m * row_stride(a.w) + kPad, j, t.scale2[m], t.shift2[m]));
}

// Gradient in front of a BatchNorm, channel m, zero beyond column w.
EFRDN_FAST_INLINE V norm_gradient(const GcrbArgs& a, const NormGradient& n, int64_t m,
                                  const float* g, const float* value, int64_t j) {
  const V deviation = sub(load(value + j), set1(n.mean[m]));
  const V out = fma(set1(n.alpha[m]), load(g + j),
                    fma(set1(n.gamma[m]), deviation, set1(n.beta[m])));
  return keep(out, columns(a, j));
}

// sum += g, sum_hat += g (value - mean) rstd over one row of one channel.
void norm_sums(const float* g, const float* value, float mean, float rstd, int64_t w, float* sum,
               float* sum_hat) {
  add_lanes(g, w, sum);
  V acc = load(sum_hat);
  for (int64_t j = 0; j < w; j += kLanes)
    acc = fma(load(g + j), mul(sub(load(value + j), set1(mean)), set1(rstd)), acc);
  store(sum_hat, acc);
}

}  // namespace

void train_squeeze(const GcrbTrainArgs& t, int64_t begin, int64_t end, float*) {
  const GcrbArgs& a = t.base;
  const int64_t stride = row_stride(a.w), step = a.x.stride_w;
  with_dims(a, [&](const auto& d) {
    EFRDN_FAST_BY_DTYPE(a.dtype, {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = static_cast<const T*>(a.x.data) + row / a.h * a.x.stride_n +
                     row % a.h * a.x.stride_h;
        float* out = t.a1 + row * map_row(a);
        memset(out, 0, static_cast<size_t>(map_row(a)) * sizeof(float));
        for (int64_t j = 0; j < a.w; j += kLanes) {
          prefetch_pixels<false>(x + (j + 4 * kLanes) * step, step, d.c());
          contract(d, a.w1, nullptr, out + kPad + j, stride,
                   [&](auto chunk, V(&r)[kLanes]) EFRDN_FAST_LAMBDA {
                     load_transposed(r, x + j * step + chunk * kLanes, step, columns(a, j),
                                     d.c() - chunk * kLanes);
                   });
        }
        row_moments(a, out, t.moments + row * 2 * a.m);
      }
    })
  });
}

void train_depthwise(const GcrbTrainArgs& t, int64_t begin, int64_t end, float* scratch) {
  const GcrbArgs& a = t.base;
  const int64_t stride = row_stride(a.w);
  const Ring m1{scratch, map_row(a), a.h};
  memset(scratch, 0, static_cast<size_t>(3 * map_row(a)) * sizeof(float));
  each_image(a, begin, end, [&](int64_t n, int64_t first, int64_t last) {
    const float* a1 = t.a1 + n * a.h * map_row(a);
    const auto make = [&](int64_t row, float* out) { make_m1(t, a1, row, out); };
    m1.fill(first - 1, make);
    m1.fill(first, make);
    for (int64_t row = first; row < last; ++row) {
      m1.fill(row + 1, make);
      float* out = t.a2 + (n * a.h + row) * map_row(a);
      memset(out, 0, static_cast<size_t>(map_row(a)) * sizeof(float));
      for (int64_t m = 0; m < a.m; ++m) {
        const int64_t at = m * stride + kPad;
        const float* rows[3] = {m1.at(row - 1) + at, m1.at(row) + at, m1.at(row + 1) + at};
        for (int64_t j = 0; j < a.w; j += kLanes)
          store(out + at + j, keep(depthwise(rows, j, a.w2 + 9 * m, zero()), columns(a, j)));
      }
      row_moments(a, out, t.moments + (n * a.h + row) * 2 * a.m);
    }
  });
}

void train_mid_moments(const GcrbTrainArgs& t, int64_t begin, int64_t end, float* scratch) {
  const GcrbArgs& a = t.base;
  const int64_t stride = row_stride(a.w), mg = a.m / a.groups;
  for (int64_t row = begin; row < end; ++row) {
    const float* a2 = t.a2 + row * map_row(a);
    float* out = t.moments + row * a.m * (1 + mg);
    for (int64_t m = 0; m < a.m; ++m) {
      const int64_t at = m * stride + kPad;
      for (int64_t j = 0; j < a.w; j += kLanes)
        store(scratch + at + j, activate(a, a2 + at, j, t.scale2[m], t.shift2[m]));
      out[m] = row_mean(scratch + at, a.w);
    }
    for (int64_t m = 0; m < a.m; ++m)
      for (int64_t k = 0; k < mg; ++k) {
        const int64_t other = m / mg * mg + k;
        out[a.m + m * mg + k] = row_product(scratch + m * stride + kPad, out[m],
                                            scratch + other * stride + kPad, out[other], a.w);
      }
  }
}

void train_expand_backward(const GcrbTrainArgs& t, int64_t begin, int64_t end, float* scratch) {
  const GcrbArgs& a = t.base;
  const int64_t stride = row_stride(a.w), step = t.grad_y.stride_w;
  with_dims(a, [&](const auto& d) {
    const int cg = d.group_channels(), mg = d.group_mids();
    const int64_t spread_size = static_cast<int64_t>(chunks(d)) * d.m() * kLanes;
    float* const sum_w = scratch;
    float* const sum_b = sum_w + spread_size;
    float* const w3 = sum_b + chunks(d) * kLanes;
    float* const b3 = w3 + spread_size;
    float* const turned = b3 + chunks(d) * kLanes;
    float* const block = turned + d.m() * cg;
    float* const tile = block + d.m() * kLanes;
    spread(d, w3, [&](int c, int m) { return a.w3[c * mg + m % mg]; });
    pad_bias(d, a.b3, b3);
    for (int m = 0; m < d.m(); ++m)
      for (int i = 0; i < cg; ++i) turned[m * cg + i] = a.w3[(m / mg * cg + i) * mg + m % mg];
    EFRDN_FAST_BY_DTYPE(a.dtype, {
      each_strip(t, begin, end, [&](int64_t strip, int64_t from, int64_t to) {
        memset(scratch, 0, static_cast<size_t>(w3 - scratch) * sizeof(float));
        for (int64_t row = from; row < to; ++row) {
          const T* grad_y = static_cast<const T*>(t.grad_y.data) + row / a.h * t.grad_y.stride_n +
                            row % a.h * t.grad_y.stride_h;
          for (int64_t j = 0; j < a.w; j += kLanes) {
            const int count = columns(a, j);
            make_m2(t, t.a2 + row * map_row(a), j, block);
            contract(d, turned, nullptr, t.g2 + row * map_row(a) + kPad + j, stride,
                     [&](auto chunk, V(&r)[kLanes]) EFRDN_FAST_LAMBDA {
                       open_gradient(d, chunk, block, w3, b3, grad_y + j * step, step, count, tile,
                                     sum_w, sum_b);
                       load_transposed(r, tile, kLanes, count, kLanes);
                     });
          }
        }
        float* out = t.partial + strip * (a.c * mg + a.c);
        gather_channel_major(d, sum_w, out);
        memcpy(out + a.c * mg, sum_b, static_cast<size_t>(a.c) * sizeof(float));
      });
    })
  });
}

void train_mid_backward(const GcrbTrainArgs& t, int64_t begin, int64_t end, float* scratch) {
  const GcrbArgs& a = t.base;
  const int64_t stride = row_stride(a.w), mg = a.m / a.groups;
  float* const sums = scratch;  // [2 M, kLanes]
  float* const block = sums + 2 * a.m * kLanes;
  each_strip(t, begin, end, [&](int64_t strip, int64_t from, int64_t to) {
    memset(sums, 0, static_cast<size_t>(2 * a.m * kLanes) * sizeof(float));
    for (int64_t row = from; row < to; ++row) {
      const float* a2 = t.a2 + row * map_row(a);
      float* g2 = t.g2 + row * map_row(a);
      for (int64_t j = 0; j < a.w; j += kLanes) {
        make_m2(t, a2, j, block);
        for (int64_t m = 0; m < a.m; ++m) {
          float* at = g2 + m * stride + kPad + j;
          V g = add(load(at), set1(t.offset[m]));
          for (int64_t k = 0; k < mg; ++k)
            g = fma(set1(-t.mix[m * mg + k]), load(block + (m / mg * mg + k) * kLanes), g);
          store(at, relu_backward(load(block + m * kLanes), g));  // m2 is zero beyond column w
        }
      }
      for (int64_t m = 0; m < a.m; ++m) {
        const int64_t at = m * stride + kPad;
        norm_sums(g2 + at, a2 + at, t.norm2.mean[m], t.norm2.rstd[m], a.w, sums + m * kLanes,
                  sums + (a.m + m) * kLanes);
      }
    }
    for (int64_t i = 0; i < 2 * a.m; ++i)
      t.partial[strip * 2 * a.m + i] = lane_sum(sums + i * kLanes);
  });
}

void train_depthwise_backward(const GcrbTrainArgs& t, int64_t begin, int64_t end, float* scratch) {
  const GcrbArgs& a = t.base;
  const int64_t stride = row_stride(a.w);
  const Ring m1{scratch, map_row(a), a.h}, d2{scratch + 3 * map_row(a), map_row(a), a.h};
  float* const sums = scratch + 6 * map_row(a);  // [11 M, kLanes]
  float* const turned = sums + 11 * a.m * kLanes;
  memset(scratch, 0, static_cast<size_t>(6 * map_row(a)) * sizeof(float));
  for (int64_t i = 0; i < 9 * a.m; ++i) turned[i] = a.w2[i / 9 * 9 + 8 - i % 9];
  const auto rows = [&](int64_t n, int64_t first, int64_t last) {
    const int64_t image = n * a.h * map_row(a);
    const auto fill = [&](int64_t row) {
      m1.fill(row, [&](int64_t r, float* out) { make_m1(t, t.a1 + image, r, out); });
      d2.fill(row, [&](int64_t r, float* out) {
        const float* g2 = t.g2 + image + r * map_row(a);
        const float* a2 = t.a2 + image + r * map_row(a);
        for (int64_t m = 0; m < a.m; ++m) {
          const int64_t at = m * stride + kPad;
          for (int64_t j = 0; j < a.w; j += kLanes)
            store(out + at + j, norm_gradient(a, t.norm2, m, g2 + at, a2 + at, j));
        }
      });
    };
    fill(first - 1);
    fill(first);
    for (int64_t row = first; row < last; ++row) {
      fill(row + 1);
      for (int64_t m = 0; m < a.m; ++m) {
        const int64_t at = m * stride + kPad;
        const float* mid[3] = {m1.at(row - 1) + at, m1.at(row) + at, m1.at(row + 1) + at};
        const float* grad[3] = {d2.at(row - 1) + at, d2.at(row) + at, d2.at(row + 1) + at};
        float* g1 = t.g1 + image + row * map_row(a) + at;
        for (int64_t j = 0; j < a.w; j += kLanes)
          store(g1 + j, relu_backward(load(mid[1] + j), depthwise(grad, j, turned + 9 * m, zero())));
        depthwise_sums(mid, grad[1], a.w, sums + 9 * m * kLanes);
        norm_sums(g1, t.a1 + image + row * map_row(a) + at, t.norm1.mean[m], t.norm1.rstd[m], a.w,
                  sums + (9 * a.m + m) * kLanes, sums + (10 * a.m + m) * kLanes);
      }
    }
  };
  each_strip(t, begin, end, [&](int64_t strip, int64_t from, int64_t to) {
    memset(sums, 0, static_cast<size_t>(11 * a.m * kLanes) * sizeof(float));
    each_image(a, from, to, rows);
    for (int64_t i = 0; i < 11 * a.m; ++i)
      t.partial[strip * 11 * a.m + i] = lane_sum(sums + i * kLanes);
  });
}

void train_squeeze_backward(const GcrbTrainArgs& t, int64_t begin, int64_t end, float* scratch) {
  const GcrbArgs& a = t.base;
  const int64_t step_x = a.x.stride_w, step_y = t.grad_y.stride_w, step = t.grad_x.stride_w;
  with_dims(a, [&](const auto& d) {
    const int cg = d.group_channels();
    const int64_t spread_size = static_cast<int64_t>(chunks(d)) * d.m() * kLanes;
    float* const sums = scratch;
    float* const w1 = sums + spread_size;
    float* const block = w1 + spread_size;
    spread(d, w1, [&](int c, int m) { return a.w1[m * cg + c % cg]; });
    EFRDN_FAST_BY_DTYPE(a.dtype, {
      each_strip(t, begin, end, [&](int64_t strip, int64_t from, int64_t to) {
        memset(sums, 0, static_cast<size_t>(spread_size) * sizeof(float));
        for (int64_t row = from; row < to; ++row) {
          const int64_t n = row / a.h, h = row % a.h;
          const auto line = [&](const Map& map) {
            return static_cast<T*>(map.data) + n * map.stride_n + h * map.stride_h;
          };
          const T *x = line(a.x), *grad_y = line(t.grad_y);
          T* grad_x = line(t.grad_x);
          for (int64_t j = 0; j < a.w; j += kLanes) {
            for (int64_t m = 0; m < a.m; ++m) {
              const int64_t at = row * map_row(a) + m * row_stride(a.w) + kPad;
              store(block + m * kLanes, norm_gradient(a, t.norm1, m, t.g1 + at, t.a1 + at, j));
            }
            spread_gradient(d, block, w1, x + j * step_x, step_x, grad_y + j * step_y, step_y,
                            grad_x + j * step, step, columns(a, j), sums);
          }
        }
        gather_mid_major(d, sums, t.partial + strip * a.m * cg);
      });
    })
  });
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
