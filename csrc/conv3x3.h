// 3x3 convolution on tensor cores: arguments and launcher.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace efrdn_fast {

// y = relu?(conv3x3(x, weight) + bias) + residual. x is the concatenation of the sources' channels
// or, interleaved, a0, b0, a1, b1, ... of two sources.
struct Conv3x3Params {
  static constexpr int kMaxSources = 4;
  Dtype dtype;
  bool tf32;  // float maps: one TF32 product instead of three that keep float accuracy
  int64_t n, h, w, cin, cout, groups;
  int sources;
  Map x[kMaxSources];
  int64_t end[kMaxSources];  // channels up to and with source i
  bool interleaved;
  const void *weight, *bias;  // contiguous [Cout, Cin / groups, 3, 3], [Cout] or null
  Dtype weight_dtype;         // float or the maps'
  bool relu;
  Map residual;  // data null: none
  Map y;
};

cudaError_t launch_conv3x3_fwd(const Conv3x3Params& params, cudaStream_t stream);

}  // namespace efrdn_fast
