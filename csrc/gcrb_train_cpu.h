// GCRB with batch statistics on the CPU: the passes between which whole-batch sums are needed. Maps
// of M channels between the passes are planar float rows (see row_stride), in scratch of the call.
//   a1 = W1 x        m1 = relu(scale1 a1 + shift1)
//   a2 = W2 * m1     m2 = relu(scale2 a2 + shift2)
//   a3 = W3 m2       y = x + relu(scale3 a3 + shift3)
#pragma once

#include "gcrb_cpu.h"

namespace efrdn_fast {

// Backward of a BatchNorm: d a = alpha g + beta + gamma (a - mean); hat a = (a - mean) rstd.
struct NormGradient {
  const float *alpha, *beta, *gamma, *mean, *rstd;  // [M] each
};

struct GcrbTrainArgs {
  GcrbArgs base;  // sizes, x, w1, w2; w3 and b3 with BatchNorm 3 folded in; y, b1, b2 not used
  const float *scale1, *shift1, *scale2, *shift2;  // [M]
  float *a1, *a2;  // [N * H, M, row_stride], zero beyond the columns
  float* moments;  // [N * H, ...], see the passes
  // Backward only.
  Map grad_y, grad_x;
  float *g2, *g1;            // like a1
  const float *mix, *offset;  // d m2 = W3^T g3 + offset - mix m2: [M, M / groups], [M]
  NormGradient norm1, norm2;
  int64_t strip_rows;
  float* partial;  // [strips, ...], see the passes
};

inline size_t gcrb_train_scratch(const GcrbArgs& a) {
  const int64_t spread = (a.c + 16) * a.m, sums = 2 * (spread + a.c + 16) + 11 * 16 * a.m;
  return static_cast<size_t>(6 * a.m * row_stride(a.w) + sums + 2 * spread + a.c + 16 +
                             a.m * (a.c / a.groups) + 9 * a.m + 16 * a.m + 512);
}

#define EFRDN_FAST_PASS(name) \
  EFRDN_FAST_KERNEL(void name(const GcrbTrainArgs& args, int64_t begin, int64_t end, float* scratch))

// Over rows [begin, end). a1 from x, and a2 from a1; moments of a row: mean [M], sum of squared
// deviations [M].
EFRDN_FAST_PASS(train_squeeze)
EFRDN_FAST_PASS(train_depthwise)
// m2 from a2; moments of a row: mean [M], sums of products of deviations [M, M / groups].
EFRDN_FAST_PASS(train_mid_moments)

// Over strips [begin, end). W3^T g3 into g2; partial: g3 m2 [C, M / groups], g3 [C].
EFRDN_FAST_PASS(train_expand_backward)
// g2 completed; partial: g2 [M], g2 hat a2 [M].
EFRDN_FAST_PASS(train_mid_backward)
// g1 from g2; partial: W2 [M, 9], g1 [M], g1 hat a1 [M].
EFRDN_FAST_PASS(train_depthwise_backward)
// grad_x from g1; partial: W1 [M, C / groups].
EFRDN_FAST_PASS(train_squeeze_backward)

}  // namespace efrdn_fast
