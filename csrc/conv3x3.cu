// 3x3 convolution of one or several maps; bias, ReLU and residual on the way out.
#include "conv3x3.cuh"

namespace efrdn_fast {
namespace {

using namespace conv3x3;

// Weights between the block's output channels and the chunk, 0 across groups.
template <typename T>
__device__ void load_weights(const Conv3x3Params& p, int64_t first_out, int64_t first,
                             unsigned (&shared)[9 * kTapStride]) {
  constexpr int kChannels = kWords * 4 / sizeof(T);
  const int64_t group_in = p.cin / p.groups, group_out = p.cout / p.groups;
  const bool is_float = p.weight_dtype == Dtype::kFloat;
  for (int o = threadIdx.x / kWarp; o < kOut; o += kThreads / kWarp) {
    const int64_t out = first_out + o, first_in = out / group_out * group_in;
    // neighbouring lanes read neighbouring weights: a channel's nine taps, then the next channel's
    for (int i = threadIdx.x % kWarp; i < 9 * kChannels; i += kWarp) {
      const int c = i / 9, tap = i % 9;
      const int64_t in = first + c - first_in;  // within the group
      const float value = out < p.cout && in >= 0 && in < group_in
                              ? weight_at<T>(p.weight, (out * group_in + in) * 9 + tap, is_float)
                              : 0.f;
      reinterpret_cast<T*>(&shared[tap * kTapStride + o * kStride])[c] = from_float<T>(value);
    }
  }
}

template <typename T, int Passes>
__global__ void __launch_bounds__(kThreads, 1)
    conv3x3_fwd_kernel(const Conv3x3Params p, unsigned x_aligned, bool y_aligned) {
  __shared__ __align__(16) Shared shared;
  const unsigned chunks = static_cast<unsigned>(ceil_div(p.cout, kOut));
  const int64_t first_out = static_cast<int64_t>(blockIdx.x % chunks) * kOut;
  const Tile tile(blockIdx.x / chunks, p.h, p.w, kTile, kTile);
  convolve<T, Passes>(p, tile, first_out, x_aligned, shared,
                      [&](int64_t first, unsigned (&weights)[9 * kTapStride]) {
                        load_weights<T>(p, first_out, first, weights);
                      });
  constexpr int kVec = 4, kLanes = kOut / kVec;
  const int lane = threadIdx.x % kLanes;
  const int64_t out = first_out + lane * kVec;
  const int count = out < p.cout ? static_cast<int>(p.cout - out < kVec ? p.cout - out : kVec) : 0;
  if (count == 0) return;
  float bias[kVec] = {};
#pragma unroll
  for (int v = 0; v < kVec; v++)
    if (p.bias && v < count)
      bias[v] = weight_at<T>(p.bias, out + v, p.weight_dtype == Dtype::kFloat);
#pragma unroll 2
  for (int position = threadIdx.x / kLanes; position < kTile * kTile;
       position += kThreads / kLanes) {
    const int64_t h = tile.h0 + position / kTile, w = tile.w0 + position % kTile;
    if (h >= p.h || w >= p.w) continue;
    float value[kVec], residual[kVec] = {};
    if (p.residual.data) {
      const T* const at = pixel<const T>(p.residual, tile.n, h, w) + out;
      (y_aligned ? Pack<T, kVec>::load(at, true) : Pack<T, kVec>::load_some(at, count))
          .to_floats(residual);
    }
#pragma unroll
    for (int v = 0; v < kVec; v++) {
      value[v] = shared.result[position][lane * kVec + v] + bias[v];
      if (p.relu) value[v] = relu(value[v]);
      value[v] += residual[v];
    }
    const auto pack = Pack<T, kVec>::from_floats(value);
    T* const to = pixel<T>(p.y, tile.n, h, w) + out;
    if (y_aligned)
      pack.store(to);
    else
      pack.store_some(to, count);
  }
}

template <typename T>
cudaError_t run(const Conv3x3Params& p, cudaStream_t stream) {
  const int64_t blocks = tile_count(p.n, p.h, p.w, kTile, kTile) * ceil_div(p.cout, kOut);
  const int64_t bytes = 4 * sizeof(T);
  const unsigned x = aligned_sources<T>(p);
  const bool y = p.cout % 4 == 0 && is_aligned(p.y, sizeof(T), bytes) &&
                 (!p.residual.data || is_aligned(p.residual, sizeof(T), bytes));
  if constexpr (sizeof(T) == 4)
    if (!p.tf32) return launch(conv3x3_fwd_kernel<T, 3>, blocks, kThreads, stream, p, x, y);
  return launch(conv3x3_fwd_kernel<T, 1>, blocks, kThreads, stream, p, x, y);
}

}  // namespace

cudaError_t launch_conv3x3_fwd(const Conv3x3Params& p, cudaStream_t stream) {
  EFRDN_FAST_DTYPE_SWITCH(p.dtype, return run<T>(p, stream))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
