// Tokens folded back to the map: the convolution of [a; h].
#include "token_fold.cuh"

namespace efrdn_fast {
namespace {

using namespace conv3x3;

template <typename T, int Passes>
__global__ void __launch_bounds__(kThreads, 1)
    token_fold_fwd_kernel(const TokenFoldParams p, const Conv3x3Params conv, unsigned aligned,
                          bool map_aligned) {
  __shared__ __align__(16) Shared shared;
  const TokenMap& map = p.map;
  const bool is_float = map.weight_dtype == Dtype::kFloat;
  const unsigned chunks = static_cast<unsigned>(ceil_div(map.c, kOut));
  const int64_t first_out = static_cast<int64_t>(blockIdx.x % chunks) * kOut;
  const Tile tile(blockIdx.x / chunks, map.h, map.w, kTile, kTile);
  convolve<T, Passes>(
      conv, tile, first_out, aligned, shared,
      [&](int64_t first, unsigned (&weights)[9 * kTapStride]) {
        token_fold::load_weights<T>(
            map.c, p.width + p.hidden, first_out, first, weights, [&](int64_t column, int64_t k) {
              return k < p.width
                         ? weight_at<T>(p.proj_weight, column * p.width + k, is_float)
                         : weight_at<T>(p.fc2_weight, column * p.hidden + k - p.width, is_float);
            });
      });

  float bias[9][4];
  token_fold::load_biases(bias, map.c, first_out, [&](int64_t column) {
    return weight_at<T>(p.proj_bias, column, is_float) + weight_at<T>(p.fc2_bias, column, is_float);
  });
  const auto finish = [&](int64_t h, int64_t w, const float (&x)[4], float (&value)[4]) {
    float covers = 0.f;
    token_fold::each_cover(map, h, w, [&](int tap, int64_t, int64_t) {
      covers += 1.f;
#pragma unroll
      for (int v = 0; v < 4; v++) value[v] += bias[tap][v];
    });
#pragma unroll
    for (int v = 0; v < 4; v++)
      value[v] = p.mean ? x[v] + value[v] / covers : fmaf(covers, x[v], value[v]);
  };
  token_fold::write_pixels<T>(map, p.y, tile, first_out, map_aligned, shared, finish);
}

template <typename T, int Passes>
cudaError_t run(const TokenFoldParams& p, cudaStream_t stream) {
  const Conv3x3Params conv = token_fold::convolution(p.map, {{p.a, p.h}, {p.width, p.hidden}});
  return launch(token_fold_fwd_kernel<T, Passes>, token_fold::block_count(p.map), kThreads, stream,
                p, conv, aligned_sources<T>(conv), token_fold::aligned<T>(p.map, p.y));
}

}  // namespace

cudaError_t launch_token_fold_fwd(const TokenFoldParams& p, cudaStream_t stream) {
  if (p.map.dtype == Dtype::kFloat && !p.map.tf32) return run<float, 3>(p, stream);
  EFRDN_FAST_DTYPE_SWITCH(p.map.dtype, return run<T, 1>(p, stream))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
