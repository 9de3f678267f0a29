// GCRB backward: two rolling buffers of three planar rows each, the mid map of part 1 and the
// gradient g2 at part 2, so that every map is recomputed once per pixel and read twice from cache.
#include "gcrb_gradients.h"

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

// g2 of one row from the mid rows around it.
template <class D, class T>
EFRDN_FAST_INLINE void part2_gradient(const Work<D, T>& k, int64_t row, const Sums& sums) {
  const GcrbArgs& f = k.f();
  const int64_t stride = k.stride(), step = k.a.grad_y.stride_w;
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
               open_gradient(k.d, chunk, k.block, k.w3, k.b3, grad_y + j * step, step, count, k.tile,
                             sums.w3, sums.b3);
               load_transposed(r, k.tile, kLanes, count, kLanes);
             });
    for (int m = 0; m < k.d.m(); ++m) {
      // Zero beyond column w, also where a weight is not finite.
      const V g2 = relu_backward(load(k.block + m * kLanes), load(out + m * stride));
      store(out + m * stride, count == kLanes ? g2 : keep(g2, count));
    }
  }
}

// Gradients of w2 and b2 from one row.
template <class D, class T>
EFRDN_FAST_INLINE void part2_sums(const Work<D, T>& k, int64_t row) {
  for (int m = 0; m < k.d.m(); ++m) {
    const int64_t at = m * k.stride() + kPad;
    const float* rows[3] = {k.mid_row(row - 1) + at, k.mid_row(row) + at, k.mid_row(row + 1) + at};
    const float* g2 = k.g2_row(row) + at;
    depthwise_sums(rows, g2, k.f().w, k.sums.w2 + m * 9 * kLanes);
    add_lanes(g2, k.f().w, k.sums.b2 + m * kLanes);
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
      const V g1 = relu_backward(load(k.mid_row(row) + at + j), g);
      store(k.block + m * kLanes, g1);
      store(k.sums.b1 + m * kLanes, add(load(k.sums.b1 + m * kLanes), g1));
    }
    spread_gradient(d, k.block, k.w1, x + j * step_x, step_x, grad_y + j * step_y, step_y,
                    grad_x + j * step, step, count, k.sums.w1);
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
    if (counts) part2_sums(k, row);
    if (row > first) part1_gradient(k, row - 1);
  }
}

// The sums of a strip without their lanes, in the order of GcrbBackwardArgs::partial.
template <class D, class T>
void write_sums(const Work<D, T>& k, float* out) {
  const D& d = k.d;
  const Sums& s = k.sums;
  gather_mid_major(d, s.w1, out);
  out += d.m() * d.group_channels();
  for (int m = 0; m < d.m(); ++m) *out++ = lane_sum(s.b1 + m * kLanes);
  for (int i = 0; i < 9 * d.m(); ++i) *out++ = lane_sum(s.w2 + i * kLanes);
  for (int m = 0; m < d.m(); ++m) *out++ = lane_sum(s.b2 + m * kLanes);
  gather_channel_major(d, s.w3, out);
  out += d.c() * d.group_mids();
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
