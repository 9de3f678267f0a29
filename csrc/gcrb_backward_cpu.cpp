// GCRB backward: two rolling buffers of three planar rows each, the mid map of part 1 and the
// gradient g2 at part 2, so that every map is recomputed once per pixel and read twice from cache.
#include "gcrb_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

// Sums of one strip, one value per lane.
struct Sums {
  float *w1, *w3;       // [chunks, M, kLanes], channels in the lanes
  float* b3;            // [chunks, kLanes]
  float *w2, *b2, *b1;  // [M, 9, kLanes], [M, kLanes] twice, pixels in the lanes
};

// Everything a strip works with.
template <class D, class T>
struct Work {
  D d;
  const GcrbBackwardArgs& a;
  float *mid, *g2;      // [3 rows, M, row_stride]
  float *block, *tile;  // [M, kLanes], [kLanes, kLanes]
  float *w1, *w3, *b3;  // spread over the lanes
  float *w3_turned;     // [M, C / groups]
  float *w2_turned;     // [M, 9]
  Sums sums, rest;      // rest: of the rows around the strip, dropped
  const T *x, *grad_y;  // of the image at hand
  T* grad_x;

  const GcrbArgs& f() const { return a.forward; }
  int64_t stride() const { return row_stride(f().w); }
  int64_t ring_row() const { return stride() * d.m(); }
  float* mid_row(int64_t row) const { return mid + (row + 3) % 3 * ring_row(); }
  float* g2_row(int64_t row) const { return g2 + (row + 3) % 3 * ring_row(); }
  int count(int64_t j) const { return f().w - j < kLanes ? static_cast<int>(f().w - j) : kLanes; }
};

// g3 = grad_y where part 3 is open, for one chunk of `count` pixels, into the tile; its products
// with the mid channels are added to the sums.
template <class D, class T, class Chunk>
EFRDN_FAST_INLINE void open_gradient(const Work<D, T>& k, Chunk chunk, const Sums& sums,
                                     const T* grad_y, int count) {
  const D& d = k.d;
  const int64_t step = k.a.grad_y.stride_w;
  const int rest = d.c() - chunk * kLanes;
  const float* w = k.w3 + chunk * d.m() * kLanes;
  float* sum_w = sums.w3 + chunk * d.m() * kLanes;
  const V bias = load(k.b3 + chunk * kLanes);
  V sum_b = load(sums.b3 + chunk * kLanes), weight[D::kMids], sum[D::kMids];
  if constexpr (D::kFixed)
    each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
      weight[m] = load(w + m * kLanes);
      sum[m] = load(sum_w + m * kLanes);
    });
  for (int p = 0; p < count; ++p) {
    V acc = bias;
    each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
      const V value = set1(k.block[m * kLanes + p]);
      if constexpr (D::kFixed)
        acc = fma(value, weight[m], acc);
      else
        acc = fma(value, load(w + m * kLanes), acc);
    });
    const V g3 = where_positive(acc, load_some(grad_y + p * step + chunk * kLanes, rest));
    store(k.tile + p * kLanes, g3);
    sum_b = add(sum_b, g3);
    each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
      const V value = set1(k.block[m * kLanes + p]);
      if constexpr (D::kFixed)
        sum[m] = fma(value, g3, sum[m]);
      else
        store(sum_w + m * kLanes, fma(value, g3, load(sum_w + m * kLanes)));
    });
  }
  store(sums.b3 + chunk * kLanes, sum_b);
  if constexpr (D::kFixed)
    each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA { store(sum_w + m * kLanes, sum[m]); });
}

// g2 of one row from the mid rows around it.
template <class D, class T>
EFRDN_FAST_INLINE void part2_gradient(const Work<D, T>& k, int64_t row, const Sums& sums) {
  const GcrbArgs& f = k.f();
  const int64_t stride = k.stride();
  const T* grad_y = k.grad_y + row * k.a.grad_y.stride_h;
  for (int64_t j = 0; j < f.w; j += kLanes) {
    const int count = k.count(j);
    for (int m = 0; m < k.d.m(); ++m) {
      const int64_t at = m * stride + kPad;
      const float* rows[3] = {k.mid_row(row - 1) + at, k.mid_row(row) + at, k.mid_row(row + 1) + at};
      store(k.block + m * kLanes, relu(depthwise(rows, j, f.w2 + 9 * m, set1(f.b2[m]))));
    }
    float* out = k.g2_row(row) + kPad + j;
    contract(k.d, k.w3_turned, nullptr, out, stride,
             [&](auto chunk, V(&r)[kLanes]) EFRDN_FAST_LAMBDA {
               open_gradient(k, chunk, sums, grad_y + j * k.a.grad_y.stride_w, count);
               each<0, kLanes>([&](auto i) EFRDN_FAST_LAMBDA {
                 r[i] = i < count ? load(k.tile + i * kLanes) : zero();
               });
               transpose(r);
             });
    for (int m = 0; m < k.d.m(); ++m)
      store(out + m * stride, where_positive(load(k.block + m * kLanes), load(out + m * stride)));
  }
}

// Gradients of w2 and b2 from one row.
template <class D, class T>
EFRDN_FAST_INLINE void depthwise_sums(const Work<D, T>& k, int64_t row) {
  for (int m = 0; m < k.d.m(); ++m) {
    const int64_t at = m * k.stride() + kPad;
    const float* rows[3] = {k.mid_row(row - 1) + at, k.mid_row(row) + at, k.mid_row(row + 1) + at};
    const float* g2 = k.g2_row(row) + at;
    float* sum_w = k.sums.w2 + m * 9 * kLanes;
    V bias = load(k.sums.b2 + m * kLanes), sum[9];
    each<0, 9>([&](auto t) EFRDN_FAST_LAMBDA { sum[t] = load(sum_w + t * kLanes); });
    for (int64_t j = 0; j < k.f().w; j += kLanes) {
      const V g = load(g2 + j);
      bias = add(bias, g);
      each<0, 9>([&](auto t) EFRDN_FAST_LAMBDA {
        sum[t] = fma(g, load(rows[t / 3] + j + t % 3 - 1), sum[t]);
      });
    }
    each<0, 9>([&](auto t) EFRDN_FAST_LAMBDA { store(sum_w + t * kLanes, sum[t]); });
    store(k.sums.b2 + m * kLanes, bias);
  }
}

// grad_x of one row, and the gradients of w1 and b1 from it.
template <class D, class T>
EFRDN_FAST_INLINE void part1_gradient(const Work<D, T>& k, int64_t row) {
  const GcrbArgs& f = k.f();
  const D& d = k.d;
  const T* x = k.x + row * f.x.stride_h;
  const T* grad_y = k.grad_y + row * k.a.grad_y.stride_h;
  T* grad_x = k.grad_x + row * k.a.grad_x.stride_h;
  const int64_t step_x = f.x.stride_w, step_y = k.a.grad_y.stride_w, step = k.a.grad_x.stride_w;
  for (int64_t j = 0; j < f.w; j += kLanes) {
    const int count = k.count(j);
    prefetch_pixels<true>(grad_x + (j + 2 * kLanes) * step, step, d.c());
    for (int m = 0; m < d.m(); ++m) {
      const int64_t at = m * k.stride() + kPad;
      const float* rows[3] = {k.g2_row(row - 1) + at, k.g2_row(row) + at, k.g2_row(row + 1) + at};
      const V g = depthwise(rows, j, k.w2_turned + 9 * m, zero());
      const V g1 = where_positive(load(k.mid_row(row) + at + j), g);
      store(k.block + m * kLanes, g1);
      store(k.sums.b1 + m * kLanes, add(load(k.sums.b1 + m * kLanes), g1));
    }
    each_chunk(d, [&](auto chunk) EFRDN_FAST_LAMBDA {
      const int rest = d.c() - chunk * kLanes;
      const float* w = k.w1 + chunk * d.m() * kLanes;
      float* sum_w = k.sums.w1 + chunk * d.m() * kLanes;
      V weight[D::kMids], sum[D::kMids];
      if constexpr (D::kFixed)
        each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
          weight[m] = load(w + m * kLanes);
          sum[m] = load(sum_w + m * kLanes);
        });
      for (int p = 0; p < count; ++p) {
        const V value = load_some(x + (j + p) * step_x + chunk * kLanes, rest);
        V acc = load_some(grad_y + (j + p) * step_y + chunk * kLanes, rest);
        each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
          const V g1 = set1(k.block[m * kLanes + p]);
          if constexpr (D::kFixed) {
            acc = fma(g1, weight[m], acc);
            sum[m] = fma(g1, value, sum[m]);
          } else {
            acc = fma(g1, load(w + m * kLanes), acc);
            store(sum_w + m * kLanes, fma(g1, value, load(sum_w + m * kLanes)));
          }
        });
        T* to = grad_x + (j + p) * step + chunk * kLanes;
        store_some(to, acc, rest);
      }
      if constexpr (D::kFixed)
        each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA { store(sum_w + m * kLanes, sum[m]); });
    });
  }
}

// Rows [first, last) of the image at hand.
template <class D, class T>
EFRDN_FAST_INLINE void rows(const Work<D, T>& k, int64_t first, int64_t last) {
  const GcrbArgs& f = k.f();
  const size_t bytes = static_cast<size_t>(k.ring_row()) * sizeof(float);
  const auto squeeze = [&](int64_t row) {
    if (row >= 0 && row < f.h)
      squeeze_row(k.d, f, k.x + row * f.x.stride_h, k.mid_row(row));
    else
      memset(k.mid_row(row), 0, bytes);
  };
  for (int64_t row = first - 2; row < first; ++row) squeeze(row);
  for (int64_t row = first - 1; row <= last; ++row) {
    squeeze(row + 1);
    const bool counts = row >= first && row < last;
    if (row >= 0 && row < f.h)
      part2_gradient(k, row, counts ? k.sums : k.rest);
    else
      memset(k.g2_row(row), 0, bytes);
    if (counts) depthwise_sums(k, row);
    if (row > first) part1_gradient(k, row - 1);
  }
}

// The sums of a strip without their lanes, in the order of GcrbBackwardArgs::partial.
template <class D, class T>
void write_sums(const Work<D, T>& k, float* out) {
  const D& d = k.d;
  const Sums& s = k.sums;
  const int cg = d.group_channels(), mg = d.group_mids();
  const auto at = [&](int c, int m) { return (c / kLanes * d.m() + m) * kLanes + c % kLanes; };
  for (int m = 0; m < d.m(); ++m)
    for (int i = 0; i < cg; ++i) *out++ = s.w1[at(m / mg * cg + i, m)];
  for (int m = 0; m < d.m(); ++m) *out++ = lane_sum(s.b1 + m * kLanes);
  for (int i = 0; i < 9 * d.m(); ++i) *out++ = lane_sum(s.w2 + i * kLanes);
  for (int m = 0; m < d.m(); ++m) *out++ = lane_sum(s.b2 + m * kLanes);
  for (int c = 0; c < d.c(); ++c)
    for (int i = 0; i < mg; ++i) *out++ = s.w3[at(c, c / cg * mg + i)];
  for (int c = 0; c < d.c(); ++c) *out++ = s.b3[c];
}

template <class D, class T>
void backward(const D& d, const GcrbBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const GcrbArgs& f = a.forward;
  const int cg = d.group_channels(), mg = d.group_mids();
  const int64_t spread_size = static_cast<int64_t>(chunks(d)) * d.m() * kLanes;
  const int64_t bias_size = chunks(d) * kLanes;
  const auto take = [&](int64_t floats) {
    float* p = scratch;
    scratch += floats;
    return p;
  };
  Work<D, T> k{d, a, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
  k.mid = take(3 * k.ring_row());
  k.g2 = take(3 * k.ring_row());
  memset(k.mid, 0, static_cast<size_t>(6 * k.ring_row()) * sizeof(float));
  float* const sums = scratch;
  k.sums = {take(spread_size), take(spread_size), take(bias_size),
            take(9 * kLanes * d.m()), take(kLanes * d.m()), take(kLanes * d.m())};
  k.rest.w3 = take(spread_size);
  k.rest.b3 = take(bias_size);
  const size_t sums_bytes = static_cast<size_t>(scratch - sums) * sizeof(float);
  k.block = take(kLanes * d.m());
  k.tile = take(kLanes * kLanes);
  k.w1 = take(spread_size);
  k.w3 = take(spread_size);
  k.b3 = take(bias_size);
  k.w3_turned = take(d.m() * cg);
  k.w2_turned = take(9 * d.m());
  spread(d, k.w1, [&](int c, int m) { return f.w1[m * cg + c % cg]; });
  spread(d, k.w3, [&](int c, int m) { return f.w3[c * mg + m % mg]; });
  pad_bias(d, f.b3, k.b3);
  for (int m = 0; m < d.m(); ++m)
    for (int i = 0; i < cg; ++i) k.w3_turned[m * cg + i] = f.w3[(m / mg * cg + i) * mg + m % mg];
  for (int i = 0; i < 9 * d.m(); ++i) k.w2_turned[i] = f.w2[i / 9 * 9 + 8 - i % 9];

  for (int64_t strip = begin; strip < end; ++strip) {
    memset(sums, 0, sums_bytes);
    int64_t row = strip * a.strip_rows;
    const int64_t stop = row + a.strip_rows < f.n * f.h ? row + a.strip_rows : f.n * f.h;
    while (row < stop) {
      const int64_t n = row / f.h, first = row % f.h;
      const int64_t last = first + stop - row < f.h ? first + stop - row : f.h;
      k.x = static_cast<const T*>(f.x.data) + n * f.x.stride_n;
      k.grad_y = static_cast<const T*>(a.grad_y.data) + n * a.grad_y.stride_n;
      k.grad_x = static_cast<T*>(a.grad_x.data) + n * a.grad_x.stride_n;
      rows(k, first, last);
      row += last - first;
    }
    write_sums(k, a.partial + strip * gcrb_weights(f));
  }
}

template <class T>
void by_dims(const GcrbBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const GcrbArgs& f = a.forward;
  if (f.c == 32 && f.m == 8 && f.groups == 2)
    backward<Fixed<32, 8, 2>, T>({}, a, begin, end, scratch);
  else
    backward<Dynamic, T>({f.c, f.m, f.groups}, a, begin, end, scratch);
}

}  // namespace

void gcrb_backward(const GcrbBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  EFRDN_FAST_BY_DTYPE(a.forward.dtype, by_dims<T>(a, begin, end, scratch))
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
