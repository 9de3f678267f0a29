// ACRB forward: the slice is read in place, four planar rows of it are kept, and the result goes
// straight to its place.
#include "acrb_cpu.h"
#include "conv_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

// Whether `size` floats, a multiple of 16, are finite.
bool finite(const float* p, int64_t size) {
  V acc[2] = {zero(), zero()};
  for (int64_t i = 0; i < size; i += 2 * kLanes) {
    acc[0] = fma(load(p + i), zero(), acc[0]);
    if (i + kLanes < size) acc[1] = fma(load(p + i + kLanes), zero(), acc[1]);
  }
  float sums[kLanes];
  store(sums, add(acc[0], acc[1]));
  return lane_sum(sums) == 0.0f;
}

template <int kD, class T>
void forward(const AcrbArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int d = kD ? kD : static_cast<int>(a.d);
  const int64_t stride = row_stride(a.w), ring_row = stride * d;
  float *conv = scratch + 4 * ring_row, *weight = conv + 2 * ring_row;
  memset(scratch, 0, static_cast<size_t>(4 * ring_row) * sizeof(float));
  const bool paired = pair_weights(a.weight, d, d, weight);

  bool is_finite[4];
  const auto ring = [&](int64_t row) { return scratch + (row + 4) % 4 * ring_row; };
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
      is_finite[(row + 4) % 4] = finite(ring(row), ring_row);
    };
    // Pairs begin at even rows, so that a row does not depend on where a thread begins.
    const int64_t even = first - first % 2;
    fill(even - 1);
    fill(even);
    for (int64_t row = even; row < last; row += 2) {
      fill(row + 1);
      fill(row + 2);
      PairRows rows{{}, stride};
      for (int i = 0; i < 4; ++i) rows.row[i] = ring(row - 1 + i) + kPad;
      float* const out[2] = {conv + kPad, conv + ring_row + kPad};
      if (paired && is_finite[0] && is_finite[1] && is_finite[2] && is_finite[3])
        conv_pair<kD>(rows, a.w, d, d, weight, a.bias, out, stride);
      else  // differences of rows or of weights would make NaN of infinity
        for (int i = 0; i < 2; ++i)
          conv_row<kD>({{rows.row[i], rows.row[i + 1], rows.row[i + 2]}, stride}, a.w, d, d, a.weight,
                       a.bias, out[i], stride);
      for (int64_t i = row < first; i < 2 && row + i < last; ++i)
        add_row<true>(conv + i * ring_row, ring(row + i), a.w, d, y + (row + i) * a.y.stride_h,
                      a.y.stride_w);
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
