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

// Gradients of token_qkv. As everywhere below those of the weights have their dtype, rows of tokens
// are contiguous and those without `grad_` before their name are room for results in between.
struct TokenQkvBackwardParams {
  TokenQkvParams forward;  // out: not used
  const void* grad;        // [N, H W, outer]
  Map grad_x;
  void *grad_gamma, *grad_beta, *grad_reduce, *grad_qkv;
  void *inner_grad, *reduced, *scaled_grad;  // [N, H W, inner]
  float *stats, *partial, *sums;  // token_stats_floats, .._partial_floats, .._sums_floats
};

struct TokenHiddenBackwardParams {
  TokenHiddenParams forward;  // h: the forward's result
  const void* grad;           // [N, H W, hidden]
  Map grad_x;
  void* grad_a;  // [N, H W, width]
  void *grad_proj_weight, *grad_proj_bias, *grad_gamma, *grad_beta, *grad_fc1_weight;
  void* grad_fc1_bias;
  void *masked_grad, *scaled_grad, *scaled_a;  // [N, H W, hidden], the same, [N, H W, width]
  float *stats, *partial, *sums;
};

struct TokenFoldBackwardParams {
  TokenMap map;  // x: the gradient of y
  bool mean;
  int width, hidden;
  const void *a, *h, *proj_weight, *fc2_weight;
  Map grad_x;
  void *grad_a, *grad_h;  // [N, H W, width], [N, H W, hidden]
  void *grad_proj_weight, *grad_proj_bias, *grad_fc2_weight, *grad_fc2_bias;
  Map shared;  // with `mean` a map like grad_x
  float* partial;
};

int64_t token_stats_floats(const TokenMap& map);
// width: rows of the matrix behind the LayerNorm.
int64_t token_sums_floats(const TokenMap& map, int64_t width);
int64_t token_qkv_partial_floats(const TokenQkvParams& params);
int64_t token_hidden_partial_floats(const TokenHiddenParams& params);
int64_t token_fold_partial_floats(const TokenFoldBackwardParams& params);

// Bytes of shared memory for tokens of 9 c values and a second matrix of `width` values a token.
int64_t token_shared_bytes(Dtype dtype, int64_t c, int64_t width);
int64_t token_qkv_bwd_shared_bytes(const TokenQkvParams& params);
int64_t token_hidden_bwd_shared_bytes(const TokenHiddenParams& params);
int64_t token_fold_bwd_shared_bytes(const TokenFoldBackwardParams& params);
constexpr int64_t kTokenMaxSharedBytes = 90 << 10;

cudaError_t launch_token_qkv_fwd(const TokenQkvParams& params, cudaStream_t stream);
cudaError_t launch_token_hidden_fwd(const TokenHiddenParams& params, cudaStream_t stream);
cudaError_t launch_token_fold_fwd(const TokenFoldParams& params, cudaStream_t stream);
cudaError_t launch_token_qkv_bwd(const TokenQkvBackwardParams& params, cudaStream_t stream);
cudaError_t launch_token_hidden_bwd(const TokenHiddenBackwardParams& params, cudaStream_t stream);
cudaError_t launch_token_fold_bwd(const TokenFoldBackwardParams& params, cudaStream_t stream);

}  // namespace efrdn_fast
