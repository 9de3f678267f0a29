// GCRB on CUDA: arguments and launchers.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace efrdn_fast {

// Contiguous weights, all of one element type: float or the map's.
struct GcrbWeights {
  const void *w1, *b1;  // [M, C / groups], [M]
  const void *w2, *b2;  // [M, 3, 3], [M]
  const void *w3, *b3;  // [C, M / groups], [C]
  Dtype dtype;
};

// y = x + relu(W3 relu(W2 * relu(W1 x + b1) + b2) + b3), W1 and W3 in groups, W2 depthwise 3x3.
struct GcrbParams {
  Dtype dtype;
  int64_t n, c, h, w, m, groups;
  Map x, y;  // y: contiguous, channels last
  GcrbWeights weights;
};

// Three of them one after the other: y[0] is the second's input, y[1] the third's.
struct GcrbChainParams {
  Dtype dtype;
  int64_t n, c, h, w, m, groups;
  Map x, y[3];  // y: contiguous, channels last
  GcrbWeights weights[3];
};

// Gradients of one of them, all recomputed from x.
struct GcrbBackwardParams {
  GcrbParams forward;  // y is not read
  Map grad_y, grad_x;  // grad_x: contiguous, channels last
  void *grad_w1, *grad_b1, *grad_w2, *grad_b2, *grad_w3, *grad_b3;  // of weights.dtype
  float* partial;                                                   // gcrb_partial_floats()
};

// Largest sizes that the kernels take; 32 channels with 8 in the middle have kernels of their own.
constexpr int64_t kGcrbMaxC = 64, kGcrbMaxM = 16;

// cudaErrorInvalidValue for larger sizes.
cudaError_t launch_gcrb_fwd(const GcrbParams& params, cudaStream_t stream);
cudaError_t launch_gcrb_chain_fwd(const GcrbChainParams& params, cudaStream_t stream);
cudaError_t launch_gcrb_bwd(const GcrbBackwardParams& params, cudaStream_t stream);

int64_t gcrb_partial_floats(const GcrbParams& params);

}  // namespace efrdn_fast
