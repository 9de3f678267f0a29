// Gradient of the map behind a LayerNorm of its tokens: the fold of the tokens' gradients. That of
// a token is affine in the gradient behind the Linear and in `a`, so it is a convolution of both,
// scaled token by token, and a few numbers of the tokens around.
#include "token_bwd.h"
#include "token_fold.cuh"

namespace efrdn_fast {
namespace {

using namespace conv3x3;

template <typename T, int Passes>
__global__ void __launch_bounds__(kThreads, 1)
    token_map_bwd_kernel(const TokenNormBackwardParams p, const Conv3x3Params conv,
                         unsigned aligned, bool map_aligned) {
  __shared__ __align__(16) Shared shared;
  const TokenNorm& norm = p.norm;
  const TokenMap& map = norm.map;
  const bool is_float = map.weight_dtype == Dtype::kFloat;
  const unsigned chunks = static_cast<unsigned>(ceil_div(map.c, kOut));
  const int64_t first_out = static_cast<int64_t>(blockIdx.x % chunks) * kOut;
  const Tile tile(blockIdx.x / chunks, map.h, map.w, kTile, kTile);
  convolve<T, Passes>(conv, tile, first_out, aligned, shared,
                      [&](int64_t first, unsigned (&weights)[9 * kTapStride]) {
                        token_fold::load_weights<T>(
                            map.c, static_cast<int>(conv.cin), first_out, first, weights,
                            [&](int64_t column, int64_t k) {
                              if (k >= norm.inner)
                                return weight_at<T>(norm.proj_weight,
                                                    column * norm.width + k - norm.inner, is_float);
                              return weight_at<T>(norm.weight, k * 9 * map.c + column, is_float) *
                                     weight_at<T>(norm.gamma, column, is_float);
                            });
                      });

  float bias[9][4];
  token_fold::load_biases(bias, map.c, first_out, [&](int64_t column) {
    return norm.a ? weight_at<T>(norm.proj_bias, column, is_float) : 0.f;
  });
  const auto finish = [&](int64_t h, int64_t w, const float (&x)[4], float (&value)[4]) {
    token_fold::each_cover(map, h, w, [&](int tap, int64_t token_h, int64_t token_w) {
      const float* const of = p.stats + ((tile.n * map.h + token_h) * map.w + token_w) * kStats;
      const float slope = __ldg(of + kSlope), offset = __ldg(of + kOffset);
      const float mean = __ldg(of + kMean);
#pragma unroll
      for (int v = 0; v < 4; v++) value[v] += fmaf(x[v] + bias[tap][v] - mean, slope, offset);
    });
  };
  token_fold::write_pixels<T>(map, p.grad_x, tile, first_out, map_aligned, shared, finish);
}

template <typename T, int Passes>
cudaError_t run(const TokenNormBackwardParams& p, cudaStream_t stream) {
  const TokenMap& map = p.norm.map;
  const auto as_map = [&](void* rows, int64_t width) {
    return Map{rows, map.h * map.w * width, map.w * width, width};
  };
  const int width = p.norm.a ? p.norm.width : 0;
  const Conv3x3Params conv = token_fold::convolution(
      map,
      {{as_map(p.scaled_grad, p.norm.inner), as_map(p.scaled_a, width)}, {p.norm.inner, width}});
  return launch(token_map_bwd_kernel<T, Passes>, token_fold::block_count(map), kThreads, stream, p,
                conv, aligned_sources<T>(conv), token_fold::aligned<T>(map, p.grad_x));
}

}  // namespace

cudaError_t launch_token_norm_map(const TokenNormBackwardParams& p, cudaStream_t stream) {
  const TokenMap& map = p.norm.map;
  if (map.dtype == Dtype::kFloat && !map.tf32) return run<float, 3>(p, stream);
  EFRDN_FAST_DTYPE_SWITCH(map.dtype, return run<T, 1>(p, stream))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
