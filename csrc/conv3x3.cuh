// The 3x3 convolution of a tile on tensor cores: nine shifted matrix products, without a
// concatenation, an interleave or an im2col in memory.
//
// A block computes 16 x 16 pixels for 32 output channels; each of its 8 warps two rows, that is two
// products of 16 pixels by 8 channels times four. The channels come in chunks of 16 words (32 half,
// 16 float) through shared memory. Pairs of 8 output channels and 8 words that no group connects
// are left out.
#pragma once

#include "conv3x3.h"
#include "mma.cuh"

namespace efrdn_fast {
namespace conv3x3 {

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
__device__ void load_tile(const Conv3x3Params& p, const Tile& tile, int64_t first, unsigned aligned,
                          unsigned (&shared)[kPositions][kStride]) {
  constexpr int kChannels = kWords * 4 / sizeof(T), kVec = 16 / sizeof(T);
  int source = 0;
  while (first >= p.end[source]) source++;
  const int64_t local = source ? first - p.end[source - 1] : first;
  const bool vectors = !p.interleaved && aligned >> source & 1 && local % kVec == 0 &&
                       first + kChannels <= p.end[source];
  if (vectors) {
    constexpr int kLanes = kChannels / kVec;
    const Channel<T> start(p, tile.n, first);
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

// The sources' bits: whether 16 bytes can be read at every pixel.
template <typename T>
unsigned aligned_sources(const Conv3x3Params& p) {
  unsigned bits = 0;
  for (int i = 0; i < p.sources; i++)
    bits |= static_cast<unsigned>(is_aligned(p.x[i], sizeof(T), 16)) << i;
  return bits;
}

// Leaves the sums of the tile's pixels for output channels [first_out, first_out + 32) in
// shared.result. load_weights(first, shared.staged.weights) brings those of the chunk from channel
// `first` on.
template <typename T, int Passes, class LoadWeights>
__device__ void convolve(const Conv3x3Params& p, const Tile& tile, int64_t first_out,
                         unsigned aligned, Shared& shared, const LoadWeights& load_weights) {
  constexpr int kChannels = kWords * 4 / sizeof(T);
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int row = threadIdx.x / kWarp * kRows;
  float sum[kRows][kOutTiles][4] = {};
  for (int64_t first = 0; first < p.cin; first += kChannels) {
    const unsigned connected = connections<T>(p, first_out, first);
    if (!connected) continue;
    __syncthreads();
    load_tile<T>(p, tile, first, aligned, shared.staged.x);
    load_weights(first, shared.staged.weights);
    __syncthreads();
#pragma unroll 1
    for (int tap = 0; tap < 9; tap++) {
      Operand<4, Passes> a[kSteps][kRows];
#pragma unroll
      for (int step = 0; step < kSteps; step++)
#pragma unroll
        for (int r = 0; r < kRows; r++) {
          const int position = (row + r + tap / 3) * kHaloW + tap % 3 + g;
          const unsigned* const low = shared.staged.x[position] + step * 8 + t;
          const unsigned* const high = low + 8 * kStride;
          a[step][r] = split<Passes>({low[0], high[0], low[4], high[4]});
        }
#pragma unroll
      for (int j = 0; j < kOutTiles; j++) {
        float part[kRows][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          if (!(connected >> (8 * step + j) & 1)) continue;  // the same in all threads
          const unsigned* const words =
              shared.staged.weights + tap * kTapStride + (j * 8 + g) * kStride + step * 8 + t;
          const auto b = split<Passes>({words[0], words[4]});
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
}

}  // namespace conv3x3
}  // namespace efrdn_fast
