// Tokens folded back to the map. What the overlapping tokens add to a pixel is a 3x3 convolution of
// [a; h] seen as maps: the token one pixel to the left holds for it what it says of its right
// neighbour, so the taps are turned round.
#include "conv3x3.cuh"
#include "token.h"

namespace efrdn_fast {
namespace {

using namespace conv3x3;

// Value k of the tokens in column `column`, in a row of proj_weight or, behind it, fc2_weight.
template <typename T>
__device__ float fold_weight(const TokenFoldParams& p, int64_t column, int64_t k) {
  const bool is_float = p.map.weight_dtype == Dtype::kFloat;
  return k < p.width ? weight_at<T>(p.proj_weight, column * p.width + k, is_float)
                     : weight_at<T>(p.fc2_weight, column * p.hidden + k - p.width, is_float);
}

template <typename T>
__device__ void load_fold_weights(const TokenFoldParams& p, int64_t first_out, int64_t first,
                                  unsigned (&shared)[9 * kTapStride]) {
  constexpr int kChannels = kWords * 4 / sizeof(T);
  for (int o = threadIdx.x / kWarp; o < kOut; o += kThreads / kWarp)
    for (int i = threadIdx.x % kWarp; i < 9 * kChannels; i += kWarp) {
      const int c = i % kChannels, tap = i / kChannels;
      const int64_t out = first_out + o, k = first + c;
      const float value = out < p.map.c && k < p.width + p.hidden
                              ? fold_weight<T>(p, out * 9 + 8 - tap, k)
                              : 0.f;
      reinterpret_cast<T*>(&shared[tap * kTapStride + o * kStride])[c] = from_float<T>(value);
    }
}

template <typename T, int Passes>
__global__ void __launch_bounds__(kThreads, 1)
    token_fold_fwd_kernel(const TokenFoldParams p, const Conv3x3Params conv, unsigned aligned,
                          bool map_aligned) {
  __shared__ __align__(16) Shared shared;
  const unsigned chunks = static_cast<unsigned>(ceil_div(p.map.c, kOut));
  const int64_t first_out = static_cast<int64_t>(blockIdx.x % chunks) * kOut;
  const Tile tile(blockIdx.x / chunks, p.map.h, p.map.w, kTile, kTile);
  convolve<T, Passes>(conv, tile, first_out, aligned, shared,
                      [&](int64_t first, unsigned (&weights)[9 * kTapStride]) {
                        load_fold_weights<T>(p, first_out, first, weights);
                      });

  constexpr int kVec = 4, kLanes = kOut / kVec;
  const int lane = threadIdx.x % kLanes;
  const int64_t out = first_out + lane * kVec;
  const int64_t left = p.map.c - out;
  if (left <= 0) return;
  const int count = static_cast<int>(left < kVec ? left : kVec);
  const bool is_float = p.map.weight_dtype == Dtype::kFloat;
  float bias[9][kVec] = {};  // of the channel in a token's tap
#pragma unroll
  for (int tap = 0; tap < 9; tap++)
#pragma unroll
    for (int v = 0; v < kVec; v++)
      if (v < count)
        bias[tap][v] = weight_at<T>(p.proj_bias, (out + v) * 9 + tap, is_float) +
                       weight_at<T>(p.fc2_bias, (out + v) * 9 + tap, is_float);
#pragma unroll 1
  for (int position = threadIdx.x / kLanes; position < kTile * kTile;
       position += kThreads / kLanes) {
    const int64_t h = tile.h0 + position / kTile, w = tile.w0 + position % kTile;
    if (h >= p.map.h || w >= p.map.w) continue;
    float value[kVec], x[kVec], covers = 0.f;
#pragma unroll
    for (int v = 0; v < kVec; v++) value[v] = shared.result[position][lane * kVec + v];
#pragma unroll
    for (int tap = 0; tap < 9; tap++) {
      const int64_t token_h = h + 1 - tap / 3, token_w = w + 1 - tap % 3;
      if (token_h < 0 || token_h >= p.map.h || token_w < 0 || token_w >= p.map.w) continue;
      covers += 1.f;
#pragma unroll
      for (int v = 0; v < kVec; v++) value[v] += bias[tap][v];
    }
    const T* const from = pixel<const T>(p.map.x, tile.n, h, w) + out;
    (map_aligned ? Pack<T, kVec>::load(from, true) : Pack<T, kVec>::load_some(from, count))
        .to_floats(x);
#pragma unroll
    for (int v = 0; v < kVec; v++)
      value[v] = p.mean ? x[v] + value[v] / covers : fmaf(covers, x[v], value[v]);
    const auto pack = Pack<T, kVec>::from_floats(value);
    T* const to = pixel<T>(p.y, tile.n, h, w) + out;
    if (map_aligned)
      pack.store(to);
    else
      pack.store_some(to, count);
  }
}

template <typename T, int Passes>
cudaError_t run(const TokenFoldParams& p, cudaStream_t stream) {
  const TokenMap& map = p.map;
  Conv3x3Params conv{};
  conv.n = map.n;
  conv.h = map.h;
  conv.w = map.w;
  conv.cin = p.width + p.hidden;
  conv.cout = map.c;
  conv.groups = 1;
  conv.sources = 2;
  conv.x[0] = p.a;
  conv.x[1] = p.h;
  conv.end[0] = p.width;
  conv.end[1] = conv.cin;
  const int64_t bytes = 4 * sizeof(T);
  const bool aligned =
      map.c % 4 == 0 && is_aligned(map.x, sizeof(T), bytes) && is_aligned(p.y, sizeof(T), bytes);
  const int64_t blocks = tile_count(map.n, map.h, map.w, kTile, kTile) * ceil_div(map.c, kOut);
  return launch(token_fold_fwd_kernel<T, Passes>, blocks, kThreads, stream, p, conv,
                aligned_sources<T>(conv), aligned);
}

}  // namespace

cudaError_t launch_token_fold_fwd(const TokenFoldParams& p, cudaStream_t stream) {
  if (p.map.dtype == Dtype::kFloat && !p.map.tf32) return run<float, 3>(p, stream);
  EFRDN_FAST_DTYPE_SWITCH(p.map.dtype, return run<T, 1>(p, stream))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
