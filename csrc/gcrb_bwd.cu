// GCRB backward, BatchNorm folded: recomputes the block from x, reads each map once, and leaves the
// weight gradients of every tile for a deterministic sum.
#include "gcrb_common.cuh"
#include "reduce.h"

namespace efrdn_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kTileW = 16;
template <class L>
constexpr int kTileH = L::kExact ? 12 : 4;  // what 48 KB of shared memory hold

// Where the gradients stand in a row of partial sums.
template <class L>
struct Columns {
  int b1, w2, b2, w3, b3, count;

  __host__ __device__ Columns(int c, int m, int groups) {
    b1 = m * (c / groups);
    w2 = b1 + m;
    b2 = w2 + 9 * m;
    w3 = b2 + m;
    b3 = w3 + c * (m / groups);
    count = b3 + c;
  }
};

template <typename T, class L>
__global__ void __launch_bounds__(kThreads)
    gcrb_bwd_kernel(const GcrbBackwardParams p, bool x_aligned, bool grad_aligned) {
  using Vector = Pack<T, L::kVec>;
  constexpr int kH = kTileH<L>, kStep = kThreads / L::kLanes;  // pixels at a time
  constexpr int kMidW = kTileW + 4, kMid = (kH + 4) * kMidW;   // two pixels of halo
  constexpr int kGradW = kTileW + 2, kGrad = (kH + 2) * kGradW;
  constexpr int kMidTurns = (kMid + kStep - 1) / kStep;
  static_assert(L::kOwn == 1, "lane m keeps mid channel m");

  __shared__ GcrbSharedWeights<L> weights;
  __shared__ float mid[kMid][L::kM];    // behind the first ReLU
  __shared__ float grad[kGrad][L::kM];  // of the depthwise convolution's output
  __shared__ GcrbBlockSum<L, kThreads> block_sum;

  const GcrbParams& f = p.forward;
  const GcrbSizes<L> sizes(f.c, f.m, f.groups);
  const Columns<L> columns(sizes.c, sizes.m, sizes.c / sizes.group_c);
  float* row = p.partial + static_cast<int64_t>(blockIdx.x) * columns.count;
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  const Tile tile(blockIdx.x, f.h, f.w, kH, kTileW);
  const auto inside = [&](int64_t h, int64_t w) { return h >= 0 && h < f.h && w >= 0 && w < f.w; };

  {
    Vector raw[kMidTurns];
#pragma unroll
    for (int i = 0; i < kMidTurns; i++) {
      const int position = slot + i * kStep;
      const int64_t h = tile.h0 + position / kMidW - 2, w = tile.w0 + position % kMidW - 2;
      raw[i] = position < kMid && inside(h, w)
                   ? load_channels<L>(pixel<const T>(f.x, tile.n, h, w), lane, sizes, x_aligned)
                   : Vector::zero();
    }
    weights.template load<T>(f.weights, sizes);
    __syncthreads();
    float w1[L::kReach][L::kVec];
    load_lane_weights<L>(weights.w1, lane, w1);
#pragma unroll
    for (int i = 0; i < kMidTurns; i++) {
      const int position = slot + i * kStep;
      const int64_t h = tile.h0 + position / kMidW - 2, w = tile.w0 + position % kMidW - 2;
      float x[L::kVec], z[1];
      raw[i].to_floats(x);
      squeeze<L>(x, w1, z);
      if (position < kMid) mid[position][lane] = inside(h, w) ? relu(z[0] + weights.b1[lane]) : 0.f;
    }
  }
  __syncthreads();

  float w2[9];
#pragma unroll
  for (int k = 0; k < 9; k++) w2[k] = weights.w2[k][lane];

  {
    constexpr int kB3 = L::kReach * L::kVec, kW2 = kB3 + L::kVec, kB2 = kW2 + 9;
    float sums[kB2 + 1] = {};  // w3, b3, w2, b2
    float w3[L::kReach][L::kVec], b3[L::kVec];
    const float b2 = weights.b2[lane];
    load_lane_weights<L>(weights.w3, lane, w3);
#pragma unroll
    for (int v = 0; v < L::kVec; v++) b3[v] = weights.b3[lane * L::kVec + v];
#pragma unroll 1
    for (int first = 0; first < kGrad; first += kStep) {
      const int position = first + slot;
      const bool valid = position < kGrad;
      const int r = valid ? position / kGradW : 0, c = valid ? position % kGradW : 0;
      const int64_t h = tile.h0 + r - 1, w = tile.w0 + c - 1;
      const Vector raw =
          valid && inside(h, w)
              ? load_channels<L>(pixel<const T>(p.grad_y, tile.n, h, w), lane, sizes, grad_aligned)
              : Vector::zero();
      float window[9], q[1] = {b2};
#pragma unroll
      for (int k = 0; k < 9; k++) {
        window[k] = mid[(r + k / 3) * kMidW + c + k % 3][lane];
        q[0] = fmaf(w2[k], window[k], q[0]);
      }
      q[0] = relu(q[0]);
      float reached[L::kReach], z[L::kVec], g3[L::kVec], g2[1];
      gather<L>(q, reached);
      expand<L>(reached, w3, b3, z);
      raw.to_floats(g3);
#pragma unroll
      for (int v = 0; v < L::kVec; v++) g3[v] = relu_backward(z[v], g3[v]);
      squeeze<L>(g3, w3, g2);
      g2[0] = relu_backward(q[0], g2[0]);
      if (valid) grad[position][lane] = g2[0];
      if (valid && r >= 1 && r <= kH && c >= 1 && c <= kTileW) {
#pragma unroll
        for (int v = 0; v < L::kVec; v++) {
          sums[kB3 + v] += g3[v];
#pragma unroll
          for (int i = 0; i < L::kReach; i++)
            sums[i * L::kVec + v] = fmaf(g3[v], reached[i], sums[i * L::kVec + v]);
        }
#pragma unroll
        for (int k = 0; k < 9; k++) sums[kW2 + k] = fmaf(g2[0], window[k], sums[kW2 + k]);
        sums[kB2] += g2[0];
      }
    }
    block_sum(sums, [&](int i, int lane, float sum) {
      const int c = lane * L::kVec + i % L::kVec;  // of w3 and b3
      if (i < kB3) {
        const int m = L::mid(lane, i / L::kVec);
        if (sizes.connected(c, m)) row[columns.w3 + sizes.w3_index(c, m)] = sum;
      } else if (i < kW2) {
        if (c < sizes.c) row[columns.b3 + c] = sum;
      } else if (lane < sizes.m) {
        row[i < kB2 ? columns.w2 + lane * 9 + i - kW2 : columns.b2 + lane] = sum;
      }
    });
  }

  constexpr int kB1 = L::kReach * L::kVec;
  float sums[kB1 + 1] = {};  // w1, b1
  float w1[L::kReach][L::kVec];
  load_lane_weights<L>(weights.w1, lane, w1);
#pragma unroll 1
  for (int position = slot; position < kH * kTileW; position += kStep) {
    const int r = position / kTileW, c = position % kTileW;
    const int64_t h = tile.h0 + r, w = tile.w0 + c;
    float g1[1] = {};
#pragma unroll
    for (int k = 0; k < 9; k++)
      g1[0] = fmaf(w2[k], grad[(r + 2 - k / 3) * kGradW + c + 2 - k % 3][lane], g1[0]);
    g1[0] = relu_backward(mid[(r + 2) * kMidW + c + 2][lane], g1[0]);
    float reached[L::kReach], x[L::kVec], gx[L::kVec];
    gather<L>(g1, reached);
    sums[kB1] += g1[0];
    if (!inside(h, w)) continue;
    load_channels<L>(pixel<const T>(f.x, tile.n, h, w), lane, sizes, x_aligned).to_floats(x);
    load_channels<L>(pixel<const T>(p.grad_y, tile.n, h, w), lane, sizes, grad_aligned)
        .to_floats(gx);
#pragma unroll
    for (int i = 0; i < L::kReach; i++)
#pragma unroll
      for (int v = 0; v < L::kVec; v++) {
        gx[v] = fmaf(w1[i][v], reached[i], gx[v]);
        sums[i * L::kVec + v] = fmaf(reached[i], x[v], sums[i * L::kVec + v]);
      }
    store_channels<L>(Vector::from_floats(gx), pixel<T>(p.grad_x, tile.n, h, w), lane, sizes);
  }
  block_sum(sums, [&](int i, int lane, float sum) {
    if (i == kB1) {
      if (lane < sizes.m) row[columns.b1 + lane] = sum;
      return;
    }
    const int c = lane * L::kVec + i % L::kVec, m = L::mid(lane, i / L::kVec);
    if (sizes.connected(c, m)) row[sizes.w1_index(c, m)] = sum;
  });
}

template <typename T, class L>
cudaError_t run(const GcrbBackwardParams& p, cudaStream_t stream) {
  const GcrbParams& f = p.forward;
  const int64_t tiles = tile_count(f.n, f.h, f.w, kTileH<L>, kTileW);
  const int64_t bytes = L::kVec * sizeof(T);
  const cudaError_t error =
      launch(gcrb_bwd_kernel<T, L>, tiles, kThreads, stream, p, is_aligned(f.x, sizeof(T), bytes),
             is_aligned(p.grad_y, sizeof(T), bytes));
  if (error != cudaSuccess) return error;
  const int c = static_cast<int>(f.c), m = static_cast<int>(f.m), g = static_cast<int>(f.groups);
  ReduceTargets targets;
  targets.dtype = f.weights.dtype;
  targets.add(p.grad_w1, m * (c / g));
  targets.add(p.grad_b1, m);
  targets.add(p.grad_w2, 9 * m);
  targets.add(p.grad_b2, m);
  targets.add(p.grad_w3, c * (m / g));
  targets.add(p.grad_b3, c);
  return launch_reduce_rows(p.partial, tiles, Columns<L>(c, m, g).count, targets, stream);
}

template <class L>
int64_t partial_floats(const GcrbParams& p) {
  const Columns<L> columns(static_cast<int>(p.c), static_cast<int>(p.m),
                           static_cast<int>(p.groups));
  return reduce_rows_room(tile_count(p.n, p.h, p.w, kTileH<L>, kTileW)) * columns.count;
}

}  // namespace

int64_t gcrb_partial_floats(const GcrbParams& p) {
  EFRDN_FAST_GCRB_SWITCH(p, 4, return partial_floats<L>(p))
  return 0;
}

cudaError_t launch_gcrb_bwd(const GcrbBackwardParams& p, cudaStream_t stream) {
  EFRDN_FAST_DTYPE_SWITCH(p.forward.dtype,
                          EFRDN_FAST_GCRB_SWITCH(p.forward, 4, return run<T, L>(p, stream)))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
