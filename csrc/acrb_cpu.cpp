// ACRB forward: the slice is read in place, three planar rows of it are kept, and the result goes
// straight to its place.
#include "acrb_cpu.h"
#include "conv_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

template <int kD, class T>
void forward(const AcrbArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int d = kD ? kD : static_cast<int>(a.d);
  const int64_t stride = row_stride(a.w), ring_row = stride * d;
  float* conv = scratch + 3 * ring_row;
  memset(scratch, 0, static_cast<size_t>(3 * ring_row) * sizeof(float));

  const auto ring = [&](int64_t row) { return scratch + (row + 3) % 3 * ring_row; };
  while (begin < end) {
    const int64_t n = begin / a.h, first = begin % a.h;
    const int64_t last = first + end - begin < a.h ? first + end - begin : a.h;
    const T* x = static_cast<const T*>(a.x.data) + n * a.x.stride_n;
    T* y = static_cast<T*>(a.y.data) + n * a.y.stride_n;
    const auto fill = [&](int64_t row) {
      if (row >= 0 && row < a.h)
        planar_row(x + row * a.x.stride_h, a.x.stride_w, a.w, d, ring(row));
      else
        memset(ring(row), 0, static_cast<size_t>(ring_row) * sizeof(float));
    };
    fill(first - 1);
    fill(first);
    for (int64_t row = first; row < last; ++row) {
      fill(row + 1);
      const Rows rows = {{ring(row - 1) + kPad, ring(row) + kPad, ring(row + 1) + kPad}, stride};
      conv_row<kD>(rows, a.w, d, d, a.weight, a.bias, conv + kPad, stride);
      add_row<true>(conv, ring(row), a.w, d, y + row * a.y.stride_h, a.y.stride_w);
    }
    begin += last - first;
  }
}

template <class T>
void by_channels(const AcrbArgs& a, int64_t begin, int64_t end, float* scratch) {
  if (a.d == 9)
    forward<9, T>(a, begin, end, scratch);
  else
    forward<0, T>(a, begin, end, scratch);
}

}  // namespace

void acrb_forward(const AcrbArgs& a, int64_t begin, int64_t end, float* scratch) {
  EFRDN_FAST_BY_DTYPE(a.dtype, by_channels<T>(a, begin, end, scratch))
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
