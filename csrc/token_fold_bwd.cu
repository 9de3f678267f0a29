// Backward of token_fold. With g the gradient that every token gets from a pixel, that of y or, for
// the mean, its share, tokens of g times the matrices give the gradients of a and h, and those of
// the matrices are sums of such tokens times a and h.
#include "common.cuh"
#include "token_bwd.h"

namespace efrdn_fast {
namespace {

constexpr int kThreads = 256;

// grad_x and, for the mean, what a token gets. One thread a value.
template <typename T>
__global__ void __launch_bounds__(kThreads) token_share_kernel(const TokenFoldBackwardParams p) {
  const TokenMap& map = p.map;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t c = index % map.c, w = index / map.c % map.w, h = index / map.c / map.w % map.h;
  const int64_t n = index / map.c / map.w / map.h;
  if (n >= map.n) return;
  const float covers =
      static_cast<float>((1 + (h > 0) + (h < map.h - 1)) * (1 + (w > 0) + (w < map.w - 1)));
  const T grad = __ldg(pixel<const T>(map.x, n, h, w) + c);
  pixel<T>(p.grad_x, n, h, w)[c] = p.mean ? grad : from_float<T>(to_float(grad) * covers);
  if (p.mean) pixel<T>(p.shared, n, h, w)[c] = from_float<T>(to_float(grad) / covers);
}

}  // namespace

int64_t token_fold_partial_floats(const TokenFoldBackwardParams& p) {
  const int64_t columns = 9 * p.map.c;
  return token_outer_floats(p.map, columns, p.width > p.hidden ? p.width : p.hidden, columns);
}

int64_t token_fold_bwd_shared_bytes(const TokenFoldBackwardParams& p) {
  const int64_t linear = token_shared_bytes(p.map.dtype, p.map.c, 0);
  const int64_t outer =
      token_outer_shared_bytes(p.map.dtype, p.width > p.hidden ? p.width : p.hidden, 0);
  return linear > outer ? linear : outer;
}

cudaError_t launch_token_fold_bwd(const TokenFoldBackwardParams& p, cudaStream_t stream) {
  const int64_t values = p.map.n * p.map.h * p.map.w * p.map.c;
  cudaError_t error = cudaErrorInvalidValue;
  EFRDN_FAST_DTYPE_SWITCH(
      p.map.dtype,
      error = launch(token_share_kernel<T>, ceil_div(values, kThreads), kThreads, stream, p))
  if (error != cudaSuccess) return error;
  TokenLinearParams linear{};
  linear.map = p.map;
  if (p.mean) linear.map.x = p.shared;
  linear.values = 9 * p.map.c;
  linear.count = 2;
  linear.matrix[0] = p.proj_weight;
  linear.matrix[1] = p.fc2_weight;
  linear.width[0] = p.width;
  linear.width[1] = p.hidden;
  linear.out[0] = p.grad_a;
  linear.out[1] = p.grad_h;
  error = launch_token_linear(linear, stream);
  TokenOuterParams outer{};
  outer.norm.map = linear.map;
  outer.left = TokenOuterParams::kTokens;
  outer.sums = TokenOuterParams::kOfLeft;
  outer.columns = linear.values;
  outer.partial = p.partial;
  const void* const rows[] = {p.a, p.h};
  void* const grad_weight[] = {p.grad_proj_weight, p.grad_fc2_weight};
  void* const grad_bias[] = {p.grad_proj_bias, p.grad_fc2_bias};
  for (int i = 0; i < 2 && error == cudaSuccess; i++) {
    outer.rows = rows[i];
    outer.count = linear.width[i];
    error = launch_token_outer(outer, grad_weight[i], grad_bias[i], p.map.weight_dtype, stream);
  }
  return error;
}

}  // namespace efrdn_fast
