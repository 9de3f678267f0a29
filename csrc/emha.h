// Attention inside segments of tokens: arguments and launchers.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace efrdn_fast {

constexpr int kEmhaMaxD = 64;

// out = softmax(q k^T / sqrt(d)) v for every head of every segment of `length` tokens, of which the
// last may be shorter. A token of qkv holds q, k and v of all heads: [3][heads][d].
struct EmhaParams {
  Dtype dtype;
  bool tf32;  // float: one TF32 product instead of three that keep float accuracy
  int64_t n, tokens, length;
  int heads, d;
  const void* qkv;
  int64_t stride_n, stride_t;  // of qkv, in elements
  void* out;                   // contiguous [N, tokens, heads, d]
  float* lse;  // contiguous [N, heads, tokens]: log of the sum of exp of the scaled scores
};

struct EmhaBackwardParams {
  EmhaParams forward;
  const void* grad_out;
  int64_t grad_stride_n, grad_stride_t;  // of grad_out, whose tokens are contiguous
  void* grad_qkv;                        // contiguous [N, tokens, 3, heads, d]
  float* delta;                          // scratch, of the size of lse
};

cudaError_t launch_emha_fwd(const EmhaParams& params, cudaStream_t stream);
cudaError_t launch_emha_bwd(const EmhaBackwardParams& params, cudaStream_t stream);

}  // namespace efrdn_fast
