// GCRB on the CPU: arguments and entry points.
#pragma once

#include "cpu.h"

namespace efrdn_fast {

// y = x + relu(W3 relu(W2 * relu(W1 x + b1) + b2) + b3), W1 and W3 in groups, W2 depthwise 3x3.
struct GcrbArgs {
  Dtype dtype;
  int64_t n, c, h, w, m, groups;
  Map x, y;
  const float *w1, *b1;  // [M, C / groups], [M]
  const float *w2, *b2;  // [M, 3, 3], [M]
  const float *w3, *b3;  // [C, M / groups], [C]
};

// Floats of working memory per thread.
inline size_t gcrb_forward_scratch(const GcrbArgs& a) {
  const int64_t ring = 3 * a.m * row_stride(a.w);
  const int64_t weights = (a.c + 16) * (a.m + 1);  // 16: the widest vector
  return static_cast<size_t>(ring + 16 * a.m + weights);
}

// Rows [begin, end) of the N * H output rows.
EFRDN_FAST_KERNEL(void gcrb_forward(const GcrbArgs& args, int64_t begin, int64_t end,
                                    float* scratch))

// Gradients of the above, recomputed from x. The N * H rows are cut into strips of `strip_rows`;
// each strip writes its own sums of the weights' gradients, so that the result does not depend on
// the number of threads.
struct GcrbBackwardArgs {
  GcrbArgs forward;  // y is not used
  Map grad_y, grad_x;
  int64_t strip_rows;
  float* partial;  // [strips, gcrb_weights]: w1, b1, w2, b2, w3, b3 one after the other
};

inline int64_t gcrb_weights(const GcrbArgs& a) {
  return a.m * (a.c / a.groups) + a.c * (a.m / a.groups) + 11 * a.m + a.c;
}

inline size_t gcrb_backward_scratch(const GcrbArgs& a) {
  const int64_t rings = 6 * a.m * row_stride(a.w), spread = (a.c + 16) * a.m;
  const int64_t sums = 2 * (spread + a.c + 16) + spread + 11 * 16 * a.m;
  const int64_t weights = 2 * spread + a.c + 16 + a.m * (a.c / a.groups) + 9 * a.m;
  return static_cast<size_t>(rings + sums + weights + 16 * a.m + 256);
}

// Strips [begin, end).
EFRDN_FAST_KERNEL(void gcrb_backward(const GcrbBackwardArgs& args, int64_t begin, int64_t end,
                                     float* scratch))

}  // namespace efrdn_fast
