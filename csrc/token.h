// The parts of the transformer block around attention: arguments and launchers.
//
// A map x [N, C, H, W] has N H W tokens t of 9 C values: the channels of the 3 x 3 pixels around,
// channel-major, 0 outside the image.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace efrdn_fast {

struct TokenMap {
  Dtype dtype;
  bool tf32;  // float: one TF32 product instead of three that keep float accuracy
  int64_t n, h, w;
  int c;
  Map x;
  Dtype weight_dtype;  // of all weights: float or that of the map
};

// out = qkv reduce LN(t)
struct TokenQkvParams {
  TokenMap map;
  float eps;
  int inner, outer;  // rows of the matrices
  const void *gamma, *beta, *reduce, *qkv;
  void* out;  // contiguous [N, H W, outer]
};

// h = relu(fc1 LN(t + proj a + proj_bias) + fc1_bias)
struct TokenHiddenParams {
  TokenMap map;
  float eps;
  int width, hidden;  // values of a and h for a token
  const void* a;
  int64_t a_stride_n, a_stride_t;  // of a, in elements
  const void *proj_weight, *proj_bias, *gamma, *beta, *fc1_weight, *fc1_bias;
  void* h;  // contiguous [N, H W, hidden]
};

// y = fold(t + proj a + proj_bias + fc2 h + fc2_bias); mean: divided by the number of tokens that
// cover a pixel.
struct TokenFoldParams {
  TokenMap map;
  bool mean;
  int width, hidden;
  Map a, h;  // the tokens as pixels
  const void *proj_weight, *proj_bias, *fc2_weight, *fc2_bias;
  Map y;
};

// Bytes of shared memory for tokens of 9 c values and a second matrix of `width` values a token.
int64_t token_shared_bytes(Dtype dtype, int64_t c, int64_t width);
constexpr int64_t kTokenMaxSharedBytes = 90 << 10;

cudaError_t launch_token_qkv_fwd(const TokenQkvParams& params, cudaStream_t stream);
cudaError_t launch_token_hidden_fwd(const TokenHiddenParams& params, cudaStream_t stream);
cudaError_t launch_token_fold_fwd(const TokenFoldParams& params, cudaStream_t stream);

}  // namespace efrdn_fast
