// ACRB (merged, BatchNorm folded) on CUDA: arguments and launchers.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace efrdn_fast {

// y = x + relu(conv3x3(x, weight) + bias) on d channels; x and y may be slices of wider maps.
struct AcrbParams {
  Dtype dtype;
  int64_t n, h, w, d;
  Map x, y;                   // at the first channel of the slice
  const void *weight, *bias;  // contiguous [d, d, 3, 3], [d]
  Dtype weight_dtype;         // float or the map's
};

// Gradients of the same op. The full map's gradient has `before` + d + `after` channels.
struct AcrbBackwardParams {
  AcrbParams forward;  // y is not read
  Map grad_y;
  Map grad_x;  // at the first channel of the slice; the channels around it become 0
  int64_t before, after;
  void *grad_weight, *grad_bias;  // of weight_dtype
  float* masked;                  // [N, H, W, d], the gradient behind the ReLU
  float* partial;                 // acrb_partial_floats()
};

int64_t acrb_partial_floats(const AcrbParams& params);

cudaError_t launch_acrb_fwd(const AcrbParams& params, cudaStream_t stream);
cudaError_t launch_acrb_bwd(const AcrbBackwardParams& params, cudaStream_t stream);

}  // namespace efrdn_fast
