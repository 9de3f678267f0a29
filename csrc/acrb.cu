// ACRB: direct 3x3 convolution of few channels, read from and written to slices in place.
//
// A thread computes two pixels of a column for `kOut` output channels; the input tile lies in
// shared memory as float, `kIn` channels at a time. The network's 9 channels are one such step;
// other widths take steps of 8.
#include "acrb.h"
#include "common.cuh"
#include "reduce.h"

namespace efrdn_fast {
namespace {

constexpr int kThreads = 128;
constexpr int kTileH = 8, kTileW = 32, kPixels = kTileH * kTileW;
constexpr int kHaloW = kTileW + 2, kPositions = (kTileH + 2) * kHaloW;
constexpr int kRows = kPixels / kThreads;  // of a thread
static_assert(kTileW == kWarp);

enum class Mode {
  kForward,  // out = side + relu(conv + bias); side: x
  kMask,     // out = relu_backward(conv + bias, side); side: the gradient of y
  kInput,    // out = side + transposed conv; side: the gradient of y
};

struct ConvParams {
  int64_t n, h, w, d;
  Map in, side, out;
  const void *weight, *bias;
  bool float_weights;
  int64_t before, after;  // kInput: channels around the slice to set to 0
};

template <int Channels>
struct Step {
  static constexpr int kIn = Channels, kOut = Channels, kPad = (Channels + 3) / 4 * 4;
};

// The tile with its halo, 0 outside the image and beyond channel d.
template <class S, typename T>
__device__ void load_tile(float (&tile)[kPositions][S::kIn], const Map& map, const Tile& at,
                          int64_t first, int64_t d, int64_t height, int64_t width) {
  for (int i = threadIdx.x; i < kPositions * S::kIn; i += blockDim.x) {
    const int position = i / S::kIn, c = i % S::kIn;
    const int64_t h = at.h0 + position / kHaloW - 1, w = at.w0 + position % kHaloW - 1;
    const bool inside = h >= 0 && h < height && w >= 0 && w < width && first + c < d;
    tile[position][c] = inside ? to_float(__ldg(pixel<const T>(map, at.n, h, w) + first + c)) : 0.f;
  }
}

// In: of the convolved map, Side and Out: of those maps, Weight: of weights that are not float.
template <class S, Mode mode, typename In, typename Side, typename Out, typename Weight>
__global__ void __launch_bounds__(kThreads) acrb_conv_kernel(const ConvParams p) {
  __shared__ union {
    float tile[kPositions][S::kIn];
    float result[kPixels][S::kOut];
  } shared;
  __shared__ __align__(16) float weights[9][S::kIn][S::kPad];

  const unsigned chunks = static_cast<unsigned>(ceil_div(p.d, S::kOut));
  const int64_t out_first = static_cast<int64_t>(blockIdx.x % chunks) * S::kOut;
  const Tile tile(blockIdx.x / chunks, p.h, p.w, kTileH, kTileW);
  const int column = threadIdx.x % kTileW, row = threadIdx.x / kTileW * kRows;

  float sum[kRows][S::kOut] = {};
  for (int64_t in_first = 0; in_first < p.d; in_first += S::kIn) {
    if (in_first > 0) __syncthreads();
    load_tile<S, In>(shared.tile, p.in, tile, in_first, p.d, p.h, p.w);
    for (int j = threadIdx.x; j < 9 * S::kIn * S::kOut; j += blockDim.x) {
      const int k = j % 9, i = j / 9 % S::kIn, o = j / 9 / S::kIn;
      const int64_t in = in_first + i, out = out_first + o;
      float value = 0.f;
      if (in < p.d && out < p.d) {
        const int64_t index =
            mode == Mode::kInput ? (in * p.d + out) * 9 + 8 - k : (out * p.d + in) * 9 + k;
        value = weight_at<Weight>(p.weight, index, p.float_weights);
      }
      weights[k][i][o] = value;
    }
    __syncthreads();
#pragma unroll 1
    for (int i = 0; i < S::kIn; i++)
#pragma unroll
      for (int dw = 0; dw < 3; dw++) {
        float x[kRows + 2];
#pragma unroll
        for (int r = 0; r < kRows + 2; r++) x[r] = shared.tile[(row + r) * kHaloW + column + dw][i];
#pragma unroll
        for (int dh = 0; dh < 3; dh++) {
          float w[S::kPad];
#pragma unroll
          for (int o = 0; o < S::kPad; o += 4) {
            const float4 four = *reinterpret_cast<const float4*>(&weights[dh * 3 + dw][i][o]);
            w[o] = four.x;
            w[o + 1] = four.y;
            w[o + 2] = four.z;
            w[o + 3] = four.w;
          }
#pragma unroll
          for (int r = 0; r < kRows; r++)
#pragma unroll
            for (int o = 0; o < S::kOut; o++) sum[r][o] = fmaf(w[o], x[r + dh], sum[r][o]);
        }
      }
  }

  // Through shared memory, so that neighbouring threads write neighbouring channels.
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; r++)
#pragma unroll
    for (int o = 0; o < S::kOut; o++) shared.result[(row + r) * kTileW + column][o] = sum[r][o];
  __syncthreads();
  const int64_t last = out_first + S::kOut;
  int first = 0, count = S::kOut;  // channels that this block writes, from out_first on
  if (mode == Mode::kInput) {
    if (out_first == 0) first = static_cast<int>(-p.before);
    if (last >= p.d) count = static_cast<int>(p.d + p.after - out_first);
    count -= first;
  }
  for (int i = threadIdx.x; i < kPixels * count; i += blockDim.x) {
    const int position = i / count, o = first + i % count;
    const int64_t h = tile.h0 + position / kTileW, w = tile.w0 + position % kTileW;
    const int64_t channel = out_first + o;
    if (h >= p.h || w >= p.w) continue;
    Out* out = pixel<Out>(p.out, tile.n, h, w) + channel;
    if (mode == Mode::kInput && (channel < 0 || channel >= p.d)) {
      *out = from_float<Out>(0.f);
      continue;
    }
    if (channel >= p.d) continue;
    const float side = to_float(__ldg(pixel<const Side>(p.side, tile.n, h, w) + channel));
    float value = shared.result[position][o];
    if (mode != Mode::kInput) value += weight_at<Weight>(p.bias, channel, p.float_weights);
    if (mode == Mode::kForward) value = side + relu(value);
    if (mode == Mode::kMask) value = relu_backward(value, side);
    if (mode == Mode::kInput) value += side;
    *out = from_float<Out>(value);
  }
}

// Gradient of the weights of kOut x kIn channels and of the bias, over one tile. A thread sums one
// pair (input channel, tap), or the bias, over a third of the tile's rows.
constexpr int kGradThreads = 256, kSplits = 3;

template <class S, typename T>
__global__ void __launch_bounds__(kGradThreads)
    acrb_weight_grad_kernel(const Map x, const Map masked, int64_t h, int64_t w, int64_t d,
                            float* partial) {
  constexpr int kPairs = S::kIn * 9 + 1;  // the last one is the bias
  static_assert(kPairs * kSplits <= kGradThreads);
  __shared__ float tile[kPositions][S::kIn];
  __shared__ __align__(16) float grad[kPixels][S::kPad];
  __shared__ float sums[kSplits][kPairs][S::kOut];

  const auto chunks = static_cast<unsigned>(ceil_div(d, S::kOut));
  const int64_t in_first = static_cast<int64_t>(blockIdx.x % chunks) * S::kIn;
  const int64_t out_first = static_cast<int64_t>(blockIdx.x / chunks % chunks) * S::kOut;
  const unsigned index = blockIdx.x / chunks / chunks;
  const Tile at(index, h, w, kTileH, kTileW);

  load_tile<S, T>(tile, x, at, in_first, d, h, w);
  for (int i = threadIdx.x; i < kPixels * S::kPad; i += blockDim.x) {
    const int position = i / S::kPad, o = i % S::kPad;
    const int64_t row = at.h0 + position / kTileW, column = at.w0 + position % kTileW;
    const bool inside = row < h && column < w && o < S::kOut && out_first + o < d;
    grad[position][o] =
        inside ? __ldg(pixel<const float>(masked, at.n, row, column) + out_first + o) : 0.f;
  }
  __syncthreads();

  const int pair = threadIdx.x % kPairs, split = threadIdx.x / kPairs;
  if (split < kSplits) {
    const bool is_bias = pair == kPairs - 1;
    const int c = is_bias ? 0 : pair % S::kIn, k = is_bias ? 0 : pair / S::kIn;
    float sum[S::kOut] = {};
    for (int row = split; row < kTileH; row += kSplits)
#pragma unroll 4
      for (int column = 0; column < kTileW; column++) {
        const float value = is_bias ? 1.f : tile[(row + k / 3) * kHaloW + column + k % 3][c];
#pragma unroll
        for (int o = 0; o < S::kPad; o += 4) {
          const float4 four = *reinterpret_cast<const float4*>(&grad[row * kTileW + column][o]);
          const float g[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (o + j < S::kOut) sum[o + j] = fmaf(value, g[j], sum[o + j]);
        }
      }
#pragma unroll
    for (int o = 0; o < S::kOut; o++) sums[split][pair][o] = sum[o];
  }
  __syncthreads();

  float* row = partial + index * (d * d * 9 + d);
  for (int i = threadIdx.x; i < kPairs * S::kOut; i += blockDim.x) {
    const int o = i % S::kOut, of = i / S::kOut;
    const float sum = sums[0][of][o] + sums[1][of][o] + sums[2][of][o];
    const int64_t out = out_first + o, in = in_first + of % S::kIn;
    if (out >= d) continue;
    if (of == kPairs - 1) {
      if (in_first == 0) row[d * d * 9 + out] = sum;
    } else if (in < d) {
      row[(out * d + in) * 9 + of / S::kIn] = sum;
    }
  }
}

template <class S, Mode mode, typename In, typename Side, typename Out, typename Weight>
cudaError_t run_conv(const ConvParams& p, cudaStream_t stream) {
  return launch(acrb_conv_kernel<S, mode, In, Side, Out, Weight>,
                tile_count(p.n, p.h, p.w, kTileH, kTileW) * ceil_div(p.d, S::kOut), kThreads,
                stream, p);
}

ConvParams conv_params(const AcrbParams& p) {
  return {p.n, p.h, p.w, p.d, p.x, p.x, p.y, p.weight, p.bias, p.weight_dtype == Dtype::kFloat,
          0,   0};
}

template <class S, typename T>
cudaError_t run_bwd(const AcrbBackwardParams& p, cudaStream_t stream) {
  const AcrbParams& f = p.forward;
  const Map masked{p.masked, f.h * f.w * f.d, f.w * f.d, f.d};
  ConvParams conv = conv_params(f);
  conv.side = p.grad_y;
  conv.out = masked;
  cudaError_t error = run_conv<S, Mode::kMask, T, T, float, T>(conv, stream);
  if (error != cudaSuccess) return error;
  conv.in = masked;
  conv.out = p.grad_x;
  conv.before = p.before;
  conv.after = p.after;
  error = run_conv<S, Mode::kInput, float, T, T, T>(conv, stream);
  if (error != cudaSuccess) return error;
  const int64_t tiles = tile_count(f.n, f.h, f.w, kTileH, kTileW), chunks = ceil_div(f.d, S::kOut);
  error = launch(acrb_weight_grad_kernel<S, T>, tiles * chunks * chunks, kGradThreads, stream, f.x,
                 masked, f.h, f.w, f.d, p.partial);
  if (error != cudaSuccess) return error;
  ReduceTargets targets;
  targets.dtype = f.weight_dtype;
  targets.add(p.grad_weight, f.d * f.d * 9);
  targets.add(p.grad_bias, f.d);
  return launch_reduce_rows(p.partial, tiles, f.d * f.d * 9 + f.d, targets, stream);
}

}  // namespace

int64_t acrb_partial_floats(const AcrbParams& p) {
  return reduce_rows_room(tile_count(p.n, p.h, p.w, kTileH, kTileW)) * (p.d * p.d * 9 + p.d);
}

cudaError_t launch_acrb_fwd(const AcrbParams& p, cudaStream_t stream) {
  const ConvParams conv = conv_params(p);
  EFRDN_FAST_DTYPE_SWITCH(
      p.dtype, if (p.d == 9) return run_conv<Step<9>, Mode::kForward, T, T, T, T>(conv, stream);
      return run_conv<Step<8>, Mode::kForward, T, T, T, T>(conv, stream))
  return cudaErrorInvalidValue;
}

cudaError_t launch_acrb_bwd(const AcrbBackwardParams& p, cudaStream_t stream) {
  EFRDN_FAST_DTYPE_SWITCH(p.forward.dtype,
                          if (p.forward.d == 9) return run_bwd<Step<9>, T>(p, stream);
                          return run_bwd<Step<8>, T>(p, stream))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
