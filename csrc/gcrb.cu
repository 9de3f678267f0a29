// GCRB forward, BatchNorm folded: one read and one write of the map.
//
// A block computes a tile. It squeezes the tile and its halo to the M mid channels in shared memory
// (0 outside the image: the depthwise convolution pads the ReLU's output), then each thread walks
// down a column of the tile with the 3x3 window of its mid channels in registers.
#include "gcrb_common.cuh"

namespace efrdn_fast {
namespace {

constexpr int kThreads = 256;
// 14 x 18 positions with halo fill 252 of 256 turns, 12 rows divide 180, 540, 720 and 1080.
constexpr int kTileH = 12, kTileW = 16;
constexpr int kHaloW = kTileW + 2, kPositions = (kTileH + 2) * kHaloW;

template <typename T, class L>
__global__ void __launch_bounds__(kThreads) gcrb_fwd_kernel(const GcrbParams p, bool aligned) {
  using Vector = Pack<T, L::kVec>;
  constexpr int kStep = kThreads / L::kLanes;  // pixels at a time
  constexpr int kTurns = (kPositions + kStep - 1) / kStep;
  constexpr int kRows = kTileH / (kStep / kTileW);  // of a thread's column
  static_assert(kStep % kTileW == 0 && kTileH % (kStep / kTileW) == 0);
  static_assert(kTileW % L::kPixelsPerWarp == 0, "a warp must stay in one row");

  __shared__ GcrbSharedWeights<L> weights;
  __shared__ __align__(16) float mid[kPositions][L::kM];

  const GcrbSizes<L> sizes(p.c, p.m, p.groups);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  const Tile tile(blockIdx.x, p.h, p.w, kTileH, kTileW);

  Vector raw[kTurns];
  bool inside[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; i++) {
    const int position = slot + i * kStep;
    const int64_t h = tile.h0 + position / kHaloW - 1, w = tile.w0 + position % kHaloW - 1;
    inside[i] = position < kPositions && h >= 0 && h < p.h && w >= 0 && w < p.w;
    raw[i] = inside[i] ? load_channels<L>(pixel<const T>(p.x, tile.n, h, w), lane, sizes, aligned)
                       : Vector::zero();
  }
  weights.template load<T>(p.weights, sizes);
  __syncthreads();

  {
    float w1[L::kReach][L::kVec];
    load_lane_weights<L>(weights.w1, lane, w1);
#pragma unroll
    for (int i = 0; i < kTurns; i++) {
      const int position = slot + i * kStep;
      float x[L::kVec], z[L::kOwn];
      raw[i].to_floats(x);
      squeeze<L>(x, w1, z);
      if (position < kPositions) {
#pragma unroll
        for (int o = 0; o < L::kOwn; o++) {
          const int m = lane * L::kOwn + o;
          mid[position][m] = inside[i] ? relu(z[o] + weights.b1[m]) : 0.f;
        }
      }
    }
  }
  __syncthreads();

  const GcrbTail<L> tail(weights, lane);
  const int column = slot % kTileW, first_row = slot / kTileW * kRows;
  const int64_t w = tile.w0 + column;
  float window[3][3][L::kOwn];  // rows of the tile modulo 3
  const auto load_row = [&](int row) {
#pragma unroll
    for (int dw = 0; dw < 3; dw++)
#pragma unroll
      for (int o = 0; o < L::kOwn; o++)
        window[(row - first_row) % 3][dw][o] = mid[row * kHaloW + column + dw][lane * L::kOwn + o];
  };
  load_row(first_row);
  load_row(first_row + 1);
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    const int64_t h = tile.h0 + first_row + i;
    if (h >= p.h) break;  // whole warps leave
    load_row(first_row + i + 2);
    float z[L::kVec], x[L::kVec];
    tail(window, i, z);
    if (w >= p.w) continue;
    load_channels<L>(pixel<const T>(p.x, tile.n, h, w), lane, sizes, aligned).to_floats(x);
#pragma unroll
    for (int v = 0; v < L::kVec; v++) x[v] += z[v];
    store_channels<L>(Vector::from_floats(x), pixel<T>(p.y, tile.n, h, w), lane, sizes);
  }
}

template <typename T, class L>
cudaError_t run(const GcrbParams& p, cudaStream_t stream) {
  return launch(gcrb_fwd_kernel<T, L>, tile_count(p.n, p.h, p.w, kTileH, kTileW), kThreads, stream,
                p, is_aligned(p.x, sizeof(T), 16));
}

}  // namespace

cudaError_t launch_gcrb_fwd(const GcrbParams& p, cudaStream_t stream) {
  EFRDN_FAST_DTYPE_SWITCH(p.dtype,
                          EFRDN_FAST_GCRB_SWITCH(p, 16 / sizeof(T), return run<T, L>(p, stream)))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
