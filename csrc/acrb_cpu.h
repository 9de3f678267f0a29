// ACRB on the CPU: arguments and entry points.
#pragma once

#include "cpu.h"

namespace efrdn_fast {

// y = xs + relu(conv3x3(xs) + bias), xs the D channels at x.
struct AcrbArgs {
  Dtype dtype;
  int64_t n, d, h, w;
  Map x, y;             // x points at the first channel of the slice, y at its place
  const float* weight;  // [D in, 3, 3, D out]
  const float* bias;    // [D]
};

// Floats of working memory per thread.
inline size_t acrb_forward_scratch(const AcrbArgs& a) {
  return static_cast<size_t>(6 * a.d * row_stride(a.w) + 12 * a.d * a.d);
}

// Rows [begin, end) of the N * H output rows.
EFRDN_FAST_KERNEL(void acrb_forward(const AcrbArgs& args, int64_t begin, int64_t end,
                                    float* scratch))

// Gradients of the above in strips of rows, as GcrbBackwardArgs describes.
struct AcrbBackwardArgs {
  AcrbArgs forward;     // y is not used
  const float* turned;  // [D out, 3, 3, D in], rotated by half a turn
  Map grad_y, grad_x;   // grad_x: the whole map of c channels, written throughout
  int64_t c, start;
  int64_t strip_rows;
  float* partial;  // [strips, 9 D D + D]: weight [D in, 3, 3, D out], then bias
};

inline size_t acrb_backward_scratch(const AcrbArgs& a) {
  return static_cast<size_t>(10 * a.d * row_stride(a.w) + 16 * (9 * a.d * a.d + a.d));
}

// Strips [begin, end).
EFRDN_FAST_KERNEL(void acrb_backward(const AcrbBackwardArgs& args, int64_t begin, int64_t end,
                                     float* scratch))

}  // namespace efrdn_fast
