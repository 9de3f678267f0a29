// EFFB's three GCRBs in one kernel: one read of x, one write of each result.
//
// A block holds a tile with a halo of 3, of which every GCRB spoils one ring. A thread keeps its
// pixels' channels in registers from the first GCRB to the last, as the maps' type, so the results
// are those of three launches; only the mid channels pass between threads, through shared memory.
// Two buffers for them save a barrier: one is written while the other may still be read.
#include "gcrb_common.cuh"

namespace efrdn_fast {
namespace {

constexpr int kHalo = 3;
constexpr int kTileH = 16, kTileW = 32;  // with the halo
constexpr int kOwnH = kTileH - 2 * kHalo, kOwnW = kTileW - 2 * kHalo;
// Each thread keeps fewer pixels the more there are; with one group the weights take the registers.
template <class L>
constexpr int kThreads = L::kGroupC == L::kC ? 256 : 512;

__device__ int clamped(int i, int count) { return i < 0 ? 0 : i < count ? i : count - 1; }

template <typename T, class L>
__global__ void __launch_bounds__(kThreads<L>)
    gcrb_chain_fwd_kernel(const GcrbChainParams p, bool aligned) {
  using Vector = Pack<T, L::kVec>;
  constexpr int kSegments = kThreads<L> / L::kLanes / kTileW;  // of a column
  constexpr int kRows = kTileH / kSegments;                 // of a thread
  static_assert(kSegments * kTileW * L::kLanes == kThreads<L> && kRows * kSegments == kTileH);
  static_assert(kTileW % L::kPixelsPerWarp == 0, "a warp must stay in one row");

  __shared__ GcrbSharedWeights<L> weights[3];
  __shared__ __align__(16) float mids[2][kTileH][kTileW][L::kM];

  const GcrbSizes<L> sizes(p.c, p.m, p.groups);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  const int column = slot % kTileW, first_row = slot / kTileW * kRows;
  const Tile tile(blockIdx.x, p.h, p.w, kOwnH, kOwnW);
  const int64_t h0 = tile.h0 + first_row - kHalo, w = tile.w0 + column - kHalo;
  const auto inside = [&](int i) { return h0 + i >= 0 && h0 + i < p.h && w >= 0 && w < p.w; };

  Vector g[kRows];
#pragma unroll
  for (int i = 0; i < kRows; i++)
    g[i] = inside(i) ? load_channels<L>(pixel<const T>(p.x, tile.n, h0 + i, w), lane, sizes, aligned)
                     : Vector::zero();
#pragma unroll
  for (int stage = 0; stage < 3; stage++)
    weights[stage].template load<T>(p.weights[stage], sizes);
  __syncthreads();

#pragma unroll 1
  for (int stage = 0; stage < 3; stage++) {
    float(&mid)[kTileH][kTileW][L::kM] = mids[stage % 2];
    {
      float w1[L::kReach][L::kVec];
      load_lane_weights<L>(weights[stage].w1, lane, w1);
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        const int row = first_row + i;
        if (row < stage || row >= kTileH - stage) continue;  // spoiled; whole warps
        float x[L::kVec], z[L::kOwn];
        g[i].to_floats(x);
        squeeze<L>(x, w1, z);
#pragma unroll
        for (int o = 0; o < L::kOwn; o++) {
          const int m = lane * L::kOwn + o;
          mid[row][column][m] = inside(i) ? relu(z[o] + weights[stage].b1[m]) : 0.f;
        }
      }
    }
    __syncthreads();

    const GcrbTail<L> tail(weights[stage], lane);
    float window[3][3][L::kOwn];  // rows of the thread, from the one above, modulo 3
    const auto load_row = [&](int i) {  // beyond the tile any values: they spoil its rim
      const int row = clamped(first_row + i - 1, kTileH);
#pragma unroll
      for (int dw = 0; dw < 3; dw++)
#pragma unroll
        for (int o = 0; o < L::kOwn; o++)
          window[i % 3][dw][o] =
              mid[row][clamped(column + dw - 1, kTileW)][lane * L::kOwn + o];
    };
    load_row(0);
    load_row(1);
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      load_row(i + 2);
      const int row = first_row + i;
      if (row <= stage || row >= kTileH - 1 - stage) continue;  // spoiled; whole warps
      float z[L::kVec], x[L::kVec];
      tail(window, i, z);
      g[i].to_floats(x);
#pragma unroll
      for (int v = 0; v < L::kVec; v++) x[v] += z[v];
      g[i] = Vector::from_floats(x);
      if (row >= kHalo && row < kTileH - kHalo && column >= kHalo && column < kTileW - kHalo &&
          inside(i))
        store_channels<L>(g[i], pixel<T>(p.y[stage], tile.n, h0 + i, w), lane, sizes);
    }
  }
}

template <typename T, class L>
cudaError_t run(const GcrbChainParams& p, cudaStream_t stream) {
  if constexpr (L::kExact) {
    return launch(gcrb_chain_fwd_kernel<T, L>, tile_count(p.n, p.h, p.w, kOwnH, kOwnW), kThreads<L>,
                  stream, p, is_aligned(p.x, sizeof(T), 16));
  } else {  // the padded layout needs too many registers for this
    for (int stage = 0; stage < 3; stage++) {
      const Map& x = stage ? p.y[stage - 1] : p.x;
      const cudaError_t error = launch_gcrb_fwd(
          {p.dtype, p.n, p.c, p.h, p.w, p.m, p.groups, x, p.y[stage], p.weights[stage]}, stream);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
}

}  // namespace

cudaError_t launch_gcrb_chain_fwd(const GcrbChainParams& p, cudaStream_t stream) {
  EFRDN_FAST_DTYPE_SWITCH(
      p.dtype, EFRDN_FAST_GCRB_SWITCH(p, 16 / sizeof(T), return run<T, L>(p, stream)))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
