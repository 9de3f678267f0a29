// GCRB forward: one read and one write of the map. Three rows of the M-channel map between parts 1
// and 2 are kept, so part 1 runs once per pixel.
#include "gcrb_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

// Parts 2 and 3 of one row and the residual.
template <class D, class T>
EFRDN_FAST_INLINE void finish_row(const D& d, const GcrbArgs& a, const float* const (&mid)[3],
                                  const float* w3, const float* b3, float* block, const T* x,
                                  T* y) {
  const int64_t stride = row_stride(a.w), step_x = a.x.stride_w, step_y = a.y.stride_w;
  for (int64_t j = 0; j < a.w; j += kLanes) {
    const int count = a.w - j < kLanes ? static_cast<int>(a.w - j) : kLanes;
    prefetch_pixels<true>(y + (j + 2 * kLanes) * step_y, step_y, d.c());
    for (int m = 0; m < d.m(); ++m) {
      const float* rows[3] = {mid[0] + m * stride + kPad, mid[1] + m * stride + kPad,
                              mid[2] + m * stride + kPad};
      store(block + m * kLanes, relu(depthwise(rows, j, a.w2 + 9 * m, set1(a.b2[m]))));
    }
    each_chunk(d, [&](auto chunk) EFRDN_FAST_LAMBDA {
      const T* from = x + j * step_x + chunk * kLanes;
      T* to = y + j * step_y + chunk * kLanes;
      const float* w = w3 + chunk * d.m() * kLanes;
      const V bias = load(b3 + chunk * kLanes);
      const int rest = d.c() - chunk * kLanes;
      V weight[D::kMids];
      if constexpr (D::kFixed)
        each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA { weight[m] = load(w + m * kLanes); });
      for (int p = 0; p < count; ++p) {
        V acc = bias;
        each_mid(d, chunk, [&](auto m) EFRDN_FAST_LAMBDA {
          const V value = set1(block[m * kLanes + p]);
          if constexpr (D::kFixed)
            acc = fma(value, weight[m], acc);
          else
            acc = fma(value, load(w + m * kLanes), acc);
        });
        store_some(to + p * step_y, add(load_some(from + p * step_x, rest), relu(acc)), rest);
      }
    });
  }
}

template <class D, class T>
void forward(const D& d, const GcrbArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t ring_row = row_stride(a.w) * d.m();
  float* ring = scratch;
  float* block = ring + 3 * ring_row;
  float* b3 = block + d.m() * kLanes;
  float* w3 = b3 + chunks(d) * kLanes;
  memset(ring, 0, static_cast<size_t>(3 * ring_row) * sizeof(float));
  pad_bias(d, a.b3, b3);
  spread(d, w3, [&](int c, int m) { return a.w3[c * d.group_mids() + m % d.group_mids()]; });

  const auto mid_row = [&](int64_t row) { return ring + (row + 3) % 3 * ring_row; };
  while (begin < end) {
    const int64_t n = begin / a.h, first = begin % a.h;
    const int64_t last = first + end - begin < a.h ? first + end - begin : a.h;
    const T* x = static_cast<const T*>(a.x.data) + n * a.x.stride_n;
    T* y = static_cast<T*>(a.y.data) + n * a.y.stride_n;
    const auto squeeze = [&](int64_t row) {
      if (row >= 0 && row < a.h)
        squeeze_row(d, a, x + row * a.x.stride_h, mid_row(row));
      else
        memset(mid_row(row), 0, static_cast<size_t>(ring_row) * sizeof(float));
    };
    squeeze(first - 1);
    squeeze(first);
    for (int64_t row = first; row < last; ++row) {
      squeeze(row + 1);
      const float* mid[3] = {mid_row(row - 1), mid_row(row), mid_row(row + 1)};
      finish_row(d, a, mid, w3, b3, block, x + row * a.x.stride_h, y + row * a.y.stride_h);
    }
    begin += last - first;
  }
}

template <class T>
void by_dims(const GcrbArgs& a, int64_t begin, int64_t end, float* scratch) {
  if (a.c == 32 && a.m == 8 && a.groups == 2)
    forward<Fixed<32, 8, 2>, T>({}, a, begin, end, scratch);
  else
    forward<Dynamic, T>({a.c, a.m, a.groups}, a, begin, end, scratch);
}

}  // namespace

void gcrb_forward(const GcrbArgs& a, int64_t begin, int64_t end, float* scratch) {
  EFRDN_FAST_BY_DTYPE(a.dtype, by_dims<T>(a, begin, end, scratch))
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
