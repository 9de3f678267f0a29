// GCRB in training (BatchNorm over the statistics of the batch) on CUDA: arguments and launchers.
#pragma once

#include <cuda_runtime_api.h>

#include "gcrb.h"
#include "types.h"

namespace efrdn_fast {

// y = x + relu(BN3(W3 relu(BN2(W2 * relu(BN1(W1 x)))))); sizes as in GcrbParams.
struct GcrbTrainParams {
  Dtype dtype;
  int64_t n, c, h, w, m, groups;
  float eps;
  Map x, y;              // y: contiguous, channels last
  GcrbWeights weights;   // b1, b2, b3: the betas
  const void* gamma[3];  // [M], [M], [C], of weights.dtype
  float *mean, *var;     // [2M + C]: biased statistics of the three BatchNorms
  float* depthwise;      // [N, H, W, M]: output of W2
  float* partial;        // gcrb_train_partial_floats()
};

struct GcrbTrainBackwardParams {
  GcrbTrainParams forward;  // mean and var are read; y is not
  Map grad_y, grad_x;       // grad_x: contiguous, channels last
  void *grad_w1, *grad_w2, *grad_w3, *grad_gamma[3], *grad_beta[3];  // of weights.dtype
  float *grad1, *grad2;  // [N, H, W, M]: behind BN1 and BN2
  float* partial;        // gcrb_train_bwd_partial_floats()
};

int64_t gcrb_train_partial_floats(const GcrbTrainParams& params);
int64_t gcrb_train_bwd_partial_floats(const GcrbTrainParams& params);

// Four kernels: three statistics, each over the whole batch, stand between them.
cudaError_t launch_gcrb_train(const GcrbTrainParams& params, cudaStream_t stream);
// Four kernels and the sum of the weight gradients.
cudaError_t launch_gcrb_train_bwd(const GcrbTrainBackwardParams& params, cudaStream_t stream);

}  // namespace efrdn_fast
