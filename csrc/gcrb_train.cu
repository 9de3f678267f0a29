// GCRB forward in training: four kernels, the statistics of a BatchNorm between one and the next.
//   1  moments of W1 x
//   2  W2 relu(BN1(..)) into memory, and its moments
//   3  moments of q = relu(BN2(..)) with their products inside a group: W3 q is linear in q, so its
//      mean and variance follow from them
//   4  y
#include "gcrb_train.cuh"

namespace efrdn_fast {
namespace {

constexpr int kThreads = kTrainThreads;

template <typename T, class L>
__global__ void __launch_bounds__(kThreads)
    gcrb_train_moments1_kernel(const GcrbTrainParams p, int64_t tiles, float* partial,
                               bool aligned) {
  constexpr int kStep = kThreads / L::kLanes;
  __shared__ GcrbSharedWeights<L> weights;
  __shared__ BlockMoments<L, 1> block;
  const GcrbSizes<L> sizes(p.c, p.m, p.groups);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  weights.template load<T>(p.weights, sizes);
  __syncthreads();
  float w1[L::kReach][L::kVec];
  load_lane_weights<L>(weights.w1, lane, w1);

  Moments<L, 1> moments;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(static_cast<unsigned>(index), p.h, p.w, kTrainH, kTrainW);
#pragma unroll 2
    for (int position = slot; position < kTrainPixels; position += kStep) {
      const Pixel at(p, tile, position / kTrainW, position % kTrainW);
      float x[L::kVec], z[1];
      (at.inside ? load_channels<L>(pixel<const T>(p.x, tile.n, at.h, at.w), lane, sizes, aligned)
                 : Pack<T, L::kVec>::zero())
          .to_floats(x);
      squeeze<L>(x, w1, z);
      moments.add(z[0], at.inside);
    }
  }
  const Moments<L, 1> all = block(moments, lane);
  if (slot == 0) all.store(partial + blockIdx.x * Moments<L, 1>::kFloats, lane);
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads)
    gcrb_train_moments2_kernel(const GcrbTrainParams p, int64_t tiles, const float* before,
                               float* partial, bool aligned) {
  constexpr int kStep = kThreads / L::kLanes;
  __shared__ GcrbSharedWeights<L> weights;
  __shared__ BlockMoments<L, 1> block;
  __shared__ float mid[kTrainPositions][L::kM];
  const GcrbSizes<L> sizes(p.c, p.m, p.groups);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  weights.template load<T>(p.weights, sizes);
  const Moments<L, 1> stat = block.rows(before, gridDim.x, lane, slot);  // and a barrier
  const float var = stat.co[0] / stat.count;
  if (blockIdx.x == 0 && slot == 0 && lane < sizes.m) {
    p.mean[lane] = stat.mean;
    p.var[lane] = var;
  }
  const Norm norm = make_norm<T>(p, sizes, 0, lane, stat.mean, var);
  float w1[L::kReach][L::kVec], w2[9];
  load_lane_weights<L>(weights.w1, lane, w1);
#pragma unroll
  for (int k = 0; k < 9; k++) w2[k] = weights.w2[k][lane];

  Moments<L, 1> moments;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(static_cast<unsigned>(index), p.h, p.w, kTrainH, kTrainW);
    squeeze_tile<T>(p, sizes, tile, norm, w1, lane, slot, aligned, mid);
#pragma unroll 2
    for (int position = slot; position < kTrainPixels; position += kStep) {
      const int row = position / kTrainW, column = position % kTrainW;
      const Pixel at(p, tile, row, column);
      const float z = depthwise<L>(mid, w2, row, column, lane);
      moments.add(z, at.inside);
      if (at.inside && lane < sizes.m) p.depthwise[at.index * sizes.m + lane] = z;
    }
  }
  const Moments<L, 1> all = block(moments, lane);
  if (slot == 0) all.store(partial + blockIdx.x * Moments<L, 1>::kFloats, lane);
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads)
    gcrb_train_moments3_kernel(const GcrbTrainParams p, int64_t tiles, const float* before,
                               float* partial) {
  constexpr int kStep = kThreads / L::kLanes;
  using M = Moments<L, L::kSpan>;
  __shared__ union {
    BlockMoments<L, 1> before;
    BlockMoments<L, L::kSpan> after;
  } block;
  const GcrbSizes<L> sizes(p.c, p.m, p.groups);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  const Moments<L, 1> stat = block.before.rows(before, gridDim.x, lane, slot);
  const float var = stat.co[0] / stat.count;
  if (blockIdx.x == 0 && slot == 0 && lane < sizes.m) {
    p.mean[sizes.m + lane] = stat.mean;
    p.var[sizes.m + lane] = var;
  }
  const Norm norm = make_norm<T>(p, sizes, 1, lane, stat.mean, var);
  M moments;
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(static_cast<unsigned>(index), p.h, p.w, kTrainH, kTrainW);
#pragma unroll 2
    for (int position = slot; position < kTrainPixels; position += kStep) {
      const Pixel at(p, tile, position / kTrainW, position % kTrainW);
      const bool exists = at.inside && lane < sizes.m;
      const float z = exists ? __ldg(p.depthwise + at.index * sizes.m + lane) : 0.f;
      moments.add(relu(norm.apply(z)), at.inside);
    }
  }
  const M all = block.after(moments, lane);
  if (slot == 0) all.store(partial + blockIdx.x * M::kFloats, lane);
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads)
    gcrb_train_output_kernel(const GcrbTrainParams p, int64_t tiles, const float* before,
                             bool aligned) {
  constexpr int kStep = kThreads / L::kLanes, kSpan = L::kSpan;
  __shared__ GcrbSharedWeights<L> weights;
  __shared__ BlockMoments<L, kSpan> block;
  const GcrbSizes<L> sizes(p.c, p.m, p.groups);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  weights.template load<T>(p.weights, sizes);
  const Moments<L, kSpan> stat = block.rows(before, gridDim.x, lane, slot);  // and a barrier

  // mean and variance of sum_t w[t] q[t]: w . mean(q) and w^T cov(q) w
  float mean[L::kVec] = {}, var[L::kVec] = {};
#pragma unroll 1
  for (int t = 0; t < kSpan; t++) {
    const float mean_t = __shfl_xor_sync(kAllLanes, stat.mean, t);
    const float* const w_t = &weights.w3[t][lane * L::kVec];
#pragma unroll
    for (int v = 0; v < L::kVec; v++) mean[v] = fmaf(w_t[v], mean_t, mean[v]);
#pragma unroll
    for (int s = 0; s < kSpan; s++) {
      const float co = __shfl_xor_sync(kAllLanes, stat.co[s], t);
      const float* const w_s = &weights.w3[t ^ s][lane * L::kVec];
#pragma unroll
      for (int v = 0; v < L::kVec; v++) var[v] = fmaf(w_t[v] * w_s[v], co, var[v]);
    }
  }
  Norm norm3[L::kVec];
#pragma unroll
  for (int v = 0; v < L::kVec; v++) {
    const int channel = lane * L::kVec + v;
    var[v] = relu(var[v] / stat.count);  // keeps NaN
    if (blockIdx.x == 0 && slot == 0 && channel < sizes.c) {
      p.mean[2 * sizes.m + channel] = mean[v];
      p.var[2 * sizes.m + channel] = var[v];
    }
    norm3[v] = make_norm<T>(p, sizes, 2, channel, mean[v], var[v]);
  }
  const Norm norm2 = stored_norm<T>(p, sizes, 1, lane);
  float w3[L::kReach][L::kVec];
  load_lane_weights<L>(weights.w3, lane, w3);

  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(static_cast<unsigned>(index), p.h, p.w, kTrainH, kTrainW);
#pragma unroll 2
    for (int position = slot; position < kTrainPixels; position += kStep) {
      const Pixel at(p, tile, position / kTrainW, position % kTrainW);
      const bool exists = at.inside && lane < sizes.m;
      const float z2 = exists ? __ldg(p.depthwise + at.index * sizes.m + lane) : 0.f;
      const float q[1] = {relu(norm2.apply(z2))};
      const float zero[L::kVec] = {};
      float reached[L::kReach], z[L::kVec], x[L::kVec];
      gather<L>(q, reached);
      expand<L>(reached, w3, zero, z);
      if (!at.inside) continue;
      load_channels<L>(pixel<const T>(p.x, tile.n, at.h, at.w), lane, sizes, aligned).to_floats(x);
#pragma unroll
      for (int v = 0; v < L::kVec; v++) x[v] += relu(norm3[v].apply(z[v]));
      store_channels<L>(Pack<T, L::kVec>::from_floats(x), pixel<T>(p.y, tile.n, at.h, at.w), lane,
                        sizes);
    }
  }
}

template <class L>
int64_t partial_floats(const GcrbTrainParams& p) {
  return train_blocks(p) * (2 * Moments<L, 1>::kFloats + Moments<L, L::kSpan>::kFloats);
}

template <typename T, class L>
cudaError_t run(const GcrbTrainParams& p, cudaStream_t stream) {
  const bool aligned = is_aligned(p.x, sizeof(T), L::kVec * sizeof(T));
  const int64_t blocks = train_blocks(p), tiles = train_tiles(p);
  float* rows1 = p.partial;
  float* rows2 = rows1 + blocks * Moments<L, 1>::kFloats;
  float* rows3 = rows2 + blocks * Moments<L, 1>::kFloats;
  const auto read = [](const float* rows) { return rows; };
  cudaError_t error =
      launch(gcrb_train_moments1_kernel<T, L>, blocks, kThreads, stream, p, tiles, rows1, aligned);
  if (error != cudaSuccess) return error;
  error = launch(gcrb_train_moments2_kernel<T, L>, blocks, kThreads, stream, p, tiles, read(rows1),
                 rows2, aligned);
  if (error != cudaSuccess) return error;
  error = launch(gcrb_train_moments3_kernel<T, L>, blocks, kThreads, stream, p, tiles, read(rows2),
                 rows3);
  if (error != cudaSuccess) return error;
  return launch(gcrb_train_output_kernel<T, L>, blocks, kThreads, stream, p, tiles, read(rows3),
                aligned);
}

}  // namespace

int64_t gcrb_train_partial_floats(const GcrbTrainParams& p) {
  EFRDN_FAST_GCRB_SWITCH(p, 4, return partial_floats<L>(p))
  return 0;
}

cudaError_t launch_gcrb_train(const GcrbTrainParams& p, cudaStream_t stream) {
  EFRDN_FAST_DTYPE_SWITCH(p.dtype, EFRDN_FAST_GCRB_SWITCH(p, 4, return run<T, L>(p, stream)))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
