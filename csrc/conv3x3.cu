// 3x3 convolution as nine shifted matrix products on tensor cores, without a concatenation, an
// interleave or an im2col in memory.
//
// A block computes 16 x 16 pixels for 32 output channels; each of its 8 warps two rows, that is two
// products of 16 pixels by 8 channels times four. The channels come in chunks of 16 words (32 half,
// 16 float) through shared memory. Pairs of 8 output channels and 8 words that no group connects
// are left out.
#include "conv3x3.h"
#include "mma.cuh"

namespace efrdn_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 16, kHaloW = kTile + 2, kPositions = kHaloW * kHaloW;
constexpr int kOut = 32, kOutTiles = kOut / 8, kRows = 2;  // kRows: of a warp
constexpr int kWords = 16, kSteps = kWords / 8;            // of a chunk
// 4 words of padding let the 32 lanes of an operand load hit 32 banks.
constexpr int kStride = kWords + 4, kTapStride = kOut * kStride + 4;
constexpr int kResultStride = kOut + 4;

struct Staged {
  unsigned x[kPositions][kStride];
  unsigned weights[9 * kTapStride];  // [tap][output channel][word]
};

union Shared {
  Staged staged;
  float result[kTile * kTile][kResultStride];
};
static_assert(sizeof(Shared) <= 48 << 10);

// The source of channel c: its first element, or null beyond the last channel.
template <typename T>
struct Channel {
  const T* data = nullptr;
  int64_t stride_h = 0, stride_w = 0;

  __device__ Channel(const Conv3x3Params& p, int64_t n, int64_t c) {
    if (c >= p.cin) return;
    int source = 0;
    int64_t local = c / 2;
    if (p.interleaved) {
      source = static_cast<int>(c % 2);
    } else {
      while (c >= p.end[source]) source++;
      local = source ? c - p.end[source - 1] : c;
    }
    const Map& map = p.x[source];
    data = static_cast<const T*>(map.data) + n * map.stride_n + local;
    stride_h = map.stride_h;
    stride_w = map.stride_w;
  }
};

// Channels [first, first + kChannels) of the tile and one pixel around it; 0 outside the image.
template <typename T>
__device__ void load_tile(const Conv3x3Params& p, const Tile& tile, int64_t first, bool aligned,
                          unsigned (&shared)[kPositions][kStride]) {
  constexpr int kChannels = kWords * 4 / sizeof(T), kVec = 16 / sizeof(T);
  const Channel<T> start(p, tile.n, first);
  const bool vectors =
      aligned && !p.interleaved && first % kVec == 0 && first + kChannels <= p.end[0];
  if (vectors) {
    constexpr int kLanes = kChannels / kVec;
    const int lane = threadIdx.x % kLanes;
    for (int position = threadIdx.x / kLanes; position < kPositions;
         position += kThreads / kLanes) {
      const int64_t h = tile.h0 + position / kHaloW - 1, w = tile.w0 + position % kHaloW - 1;
      const bool inside = h >= 0 && h < p.h && w >= 0 && w < p.w;
      const T* at = start.data + h * start.stride_h + w * start.stride_w + lane * kVec;
      const auto pack = inside ? Pack<T, kVec>::load(at, true) : Pack<T, kVec>::zero();
      pack.store(reinterpret_cast<T*>(&shared[position][lane * 4]));
    }
    return;
  }
  const int c = threadIdx.x % kChannels;
  const Channel<T> channel(p, tile.n, first + c);
  for (int position = threadIdx.x / kChannels; position < kPositions;
       position += kThreads / kChannels) {
    const int64_t h = tile.h0 + position / kHaloW - 1, w = tile.w0 + position % kHaloW - 1;
    const bool inside = channel.data && h >= 0 && h < p.h && w >= 0 && w < p.w;
    reinterpret_cast<T*>(shared[position])[c] =
        inside ? __ldg(channel.data + h * channel.stride_h + w * channel.stride_w)
               : from_float<T>(0.f);
  }
}

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

// Bit 8 * step + tile: some of the 8 output channels of the tile meet some of the step's words.
template <typename T>
__device__ unsigned connections(const Conv3x3Params& p, int64_t first_out, int64_t first) {
  constexpr int kStepChannels = 8 * 4 / sizeof(T);
  const int64_t group_in = p.cin / p.groups, group_out = p.cout / p.groups;
  unsigned bits = 0;
  for (int step = 0; step < kSteps; step++)
    for (int tile = 0; tile < kOutTiles; tile++) {
      const int64_t out = first_out + tile * 8, in = first + step * kStepChannels;
      if (out >= p.cout || in >= p.cin) continue;
      const int64_t last_out = (out + 7 < p.cout ? out + 7 : p.cout - 1) / group_out;
      const bool meet =
          in < (last_out + 1) * group_in && in + kStepChannels > out / group_out * group_in;
      bits |= static_cast<unsigned>(meet) << (8 * step + tile);
    }
  return bits;
}

// One product, or for Passes = 3 a float product: a b = hi hi + hi lo + lo hi, with values split
// into a TF32 part and the rest.
template <typename T, int Passes>
__device__ void product(float (&sum)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (Passes == 1) {
    mma<T>(sum, a, b);
  } else {
    unsigned a_high[4], a_low[4], b_high[2], b_low[2];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      a_high[i] = to_tf32(bits_to_float(a[i]));
      a_low[i] = to_tf32(bits_to_float(a[i]) - bits_to_float(a_high[i]));
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
      b_high[i] = to_tf32(bits_to_float(b[i]));
      b_low[i] = to_tf32(bits_to_float(b[i]) - bits_to_float(b_high[i]));
    }
    mma<T>(sum, a_low, b_high);
    mma<T>(sum, a_high, b_low);
    mma<T>(sum, a_high, b_high);
  }
}

template <typename T, int Passes>
__global__ void __launch_bounds__(kThreads, 1)
    conv3x3_fwd_kernel(const Conv3x3Params p, bool x_aligned, bool y_aligned) {
  constexpr int kChannels = kWords * 4 / sizeof(T);
  __shared__ __align__(16) Shared shared;
  const unsigned chunks = static_cast<unsigned>(ceil_div(p.cout, kOut));
  const int64_t first_out = static_cast<int64_t>(blockIdx.x % chunks) * kOut;
  const Tile tile(blockIdx.x / chunks, p.h, p.w, kTile, kTile);
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int row = threadIdx.x / kWarp * kRows;

  float sum[kRows][kOutTiles][4] = {};
  for (int64_t first = 0; first < p.cin; first += kChannels) {
    const unsigned connected = connections<T>(p, first_out, first);
    if (!connected) continue;
    __syncthreads();
    load_tile<T>(p, tile, first, x_aligned, shared.staged.x);
    load_weights<T>(p, first_out, first, shared.staged.weights);
    __syncthreads();
#pragma unroll 1
    for (int tap = 0; tap < 9; tap++) {
      unsigned a[kSteps][kRows][4];
#pragma unroll
      for (int step = 0; step < kSteps; step++)
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          const int position = (row + r + tap / 3) * kHaloW + tap % 3 + g;
          const unsigned* const low = shared.staged.x[position] + step * 8 + t;
          const unsigned* const high = low + 8 * kStride;
          a[step][r][0] = low[0];
          a[step][r][1] = high[0];
          a[step][r][2] = low[4];
          a[step][r][3] = high[4];
        }
#pragma unroll
      for (int j = 0; j < kOutTiles; j++) {
        float part[kRows][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          if (!(connected >> (8 * step + j) & 1)) continue;  // the same in all threads
          const unsigned* const words =
              shared.staged.weights + tap * kTapStride + (j * 8 + g) * kStride + step * 8 + t;
          const unsigned b[2] = {words[0], words[4]};
#pragma unroll
          for (int r = 0; r < kRows; r++)
            product<T, Passes>(Passes == 1 ? sum[r][j] : part[r], a[step][r], b);
        }
        if constexpr (Passes > 1) {
          // Tensor cores truncate: a tap's sum, still small, loses less than the total would.
#pragma unroll
          for (int r = 0; r < kRows; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[r][j][i] += part[r][i];
        }
      }
    }
  }

  // Through shared memory, so that neighbouring threads write neighbouring channels.
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; r++)
#pragma unroll
    for (int j = 0; j < kOutTiles; j++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        shared.result[(row + r) * kTile + g + i / 2 * 8][j * 8 + t * 2 + i % 2] = sum[r][j][i];
  __syncthreads();
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
  const bool x = is_aligned(p.x[0], sizeof(T), 16);
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
