// GCRB backward in training: four kernels, the two sums of a BatchNorm's backward between one and
// the next, then the sum of the weight gradients.
//   1  W2 relu(BN1(W1 x)) again into memory; sums for BN3
//   2  gradient behind BN2; sums for BN2, gradient of W3
//   3  gradient behind BN1; sums for BN1, gradient of W2
//   4  gradient of x, gradient of W1
// With n pixels, the gradient g behind a BatchNorm becomes gamma istd (g - sum g / n - zhat sum(g
// zhat) / n) before it; the two sums are the gradients of beta and gamma.
#include "gcrb_train.cuh"
#include "reduce.h"

namespace efrdn_fast {
namespace {

constexpr int kThreads = kTrainThreads;

// Rows of partial results: a matrix of sums for each BatchNorm, and one of weight gradients.
template <class L>
struct Partial {
  static constexpr int kSums1 = 2 * L::kC, kSums2 = 2 * L::kM, kSums3 = 2 * L::kM;
  int w1, w2, w3, weights;  // columns of the gradients of W2 and W3, number of columns
  float *sums1, *sums2, *sums3, *weight_rows;

  __host__ __device__ Partial(int c, int m, int groups, float* data, int64_t rows) {
    w1 = 0;
    w2 = m * (c / groups);
    w3 = w2 + 9 * m;
    weights = w3 + c * (m / groups);
    sums1 = data;
    sums2 = sums1 + rows * kSums1;
    sums3 = sums2 + rows * kSums2;
    weight_rows = sums3 + rows * kSums3;
  }
};

// Sums of one BatchNorm's backward for the lane's channels, divided by the number of pixels.
template <int Count>
struct Means {
  float grad[Count], grad_hat[Count];
};

// Sums the rows that the blocks of the kernel before left: [rows][2][L::kLanes * Count]. The first
// block writes the gradients of beta and gamma.
template <typename T, class L, int Count>
__device__ Means<Count> mean_of_rows(const GcrbTrainBackwardParams& p, const float* rows,
                                     int channels, void* grad_beta, void* grad_gamma,
                                     GcrbBlockSum<L, kThreads>& block_sum) {
  __shared__ float totals[2 * Count][L::kLanes];
  constexpr int kSlots = kThreads / L::kLanes, kColumns = L::kLanes * Count;
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  float sums[2 * Count] = {};
  for (unsigned row = slot; row < gridDim.x; row += kSlots)
#pragma unroll
    for (int i = 0; i < 2 * Count; i++)
      sums[i] += rows[row * 2 * kColumns + i / Count * kColumns + lane * Count + i % Count];
  block_sum(sums, [&](int i, int lane, float sum) {
    totals[i][lane] = sum;
    const int channel = lane * Count + i % Count;
    if (blockIdx.x > 0 || channel >= channels) return;
    void* target = i < Count ? grad_beta : grad_gamma;
    if (p.forward.weights.dtype == Dtype::kFloat)
      static_cast<float*>(target)[channel] = sum;
    else
      static_cast<T*>(target)[channel] = from_float<T>(sum);
  });
  const float pixels = static_cast<float>(p.forward.n * p.forward.h * p.forward.w);
  Means<Count> means;
#pragma unroll
  for (int i = 0; i < Count; i++) {
    means.grad[i] = totals[i][lane] / pixels;
    means.grad_hat[i] = totals[Count + i][lane] / pixels;
  }
  return means;
}

// Gradient before a BatchNorm of the gradient `grad` behind it.
__device__ float norm_backward(const Norm& norm, float grad, float hat, float mean_grad,
                               float mean_grad_hat) {
  return norm.gamma * norm.istd * (grad - mean_grad - hat * mean_grad_hat);
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads)
    gcrb_train_bwd1_kernel(const GcrbTrainBackwardParams p, int64_t tiles, bool x_aligned,
                           bool grad_aligned) {
  constexpr int kStep = kThreads / L::kLanes;
  __shared__ GcrbSharedWeights<L> weights;
  __shared__ GcrbBlockSum<L, kThreads> block_sum;
  __shared__ float mid[kTrainPositions][L::kM];
  const GcrbTrainParams& f = p.forward;
  const GcrbSizes<L> sizes(f.c, f.m, f.groups);
  const Partial<L> out(sizes.c, sizes.m, sizes.c / sizes.group_c, p.partial, gridDim.x);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  weights.template load<T>(f.weights, sizes);
  __syncthreads();
  float w2[9];
#pragma unroll
  for (int k = 0; k < 9; k++) w2[k] = weights.w2[k][lane];
  const Norm norm1 = stored_norm<T>(f, sizes, 0, lane), norm2 = stored_norm<T>(f, sizes, 1, lane);
  Norm norm3[L::kVec];
#pragma unroll
  for (int v = 0; v < L::kVec; v++) norm3[v] = stored_norm<T>(f, sizes, 2, lane * L::kVec + v);

  float sums[2 * L::kVec] = {};
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(static_cast<unsigned>(index), f.h, f.w, kTrainH, kTrainW);
    {
      float w1[L::kReach][L::kVec];
      load_lane_weights<L>(weights.w1, lane, w1);
      squeeze_tile<T>(f, sizes, tile, norm1, w1, lane, slot, x_aligned, mid);
    }
    float w3[L::kReach][L::kVec];
    load_lane_weights<L>(weights.w3, lane, w3);
#pragma unroll 1
    for (int position = slot; position < kTrainPixels; position += kStep) {
      const int row = position / kTrainW, column = position % kTrainW;
      const Pixel at(f, tile, row, column);
      const float z2 = depthwise<L>(mid, w2, row, column, lane);
      if (at.inside && lane < sizes.m) f.depthwise[at.index * sizes.m + lane] = z2;
      const float q[1] = {relu(norm2.apply(z2))}, zero[L::kVec] = {};
      float reached[L::kReach], z[L::kVec], grad[L::kVec];
      gather<L>(q, reached);
      expand<L>(reached, w3, zero, z);
      if (!at.inside) continue;
      load_channels<L>(pixel<const T>(p.grad_y, tile.n, at.h, at.w), lane, sizes, grad_aligned)
          .to_floats(grad);
#pragma unroll
      for (int v = 0; v < L::kVec; v++) {
        if (norm3[v].apply(z[v]) <= 0.f) continue;
        sums[v] += grad[v];
        sums[L::kVec + v] = fmaf(grad[v], norm3[v].hat(z[v]), sums[L::kVec + v]);
      }
    }
  }
  float* row = out.sums1 + blockIdx.x * Partial<L>::kSums1;
  block_sum(sums, [&](int i, int lane, float sum) {
    row[i / L::kVec * L::kC + lane * L::kVec + i % L::kVec] = sum;
  });
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads)
    gcrb_train_bwd2_kernel(const GcrbTrainBackwardParams p, int64_t tiles, bool grad_aligned) {
  constexpr int kStep = kThreads / L::kLanes;
  constexpr int kW3 = 2, kSums = kW3 + L::kReach * L::kVec;
  __shared__ GcrbSharedWeights<L> weights;
  __shared__ GcrbBlockSum<L, kThreads> block_sum;
  const GcrbTrainParams& f = p.forward;
  const GcrbSizes<L> sizes(f.c, f.m, f.groups);
  const Partial<L> out(sizes.c, sizes.m, sizes.c / sizes.group_c, p.partial, gridDim.x);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  weights.template load<T>(f.weights, sizes);
  const Means<L::kVec> means = mean_of_rows<T, L, L::kVec>(
      p, out.sums1, sizes.c, p.grad_beta[2], p.grad_gamma[2], block_sum);  // and a barrier
  const Norm norm2 = stored_norm<T>(f, sizes, 1, lane);
  Norm norm3[L::kVec];
#pragma unroll
  for (int v = 0; v < L::kVec; v++) norm3[v] = stored_norm<T>(f, sizes, 2, lane * L::kVec + v);
  float w3[L::kReach][L::kVec];
  load_lane_weights<L>(weights.w3, lane, w3);

  float sums[kSums] = {};
  // 32-bit, as the tile is: the 64-bit counter cost fp32 a stack slot on sm_80.
  for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(index, f.h, f.w, kTrainH, kTrainW);
#pragma unroll 1
    for (int position = slot; position < kTrainPixels; position += kStep) {
      const Pixel at(f, tile, position / kTrainW, position % kTrainW);
      const bool exists = at.inside && lane < sizes.m;
      const float z2 = exists ? __ldg(f.depthwise + at.index * sizes.m + lane) : 0.f;
      const float q[1] = {relu(norm2.apply(z2))}, zero[L::kVec] = {};
      float reached[L::kReach], z[L::kVec], grad[L::kVec], grad2[1];
      gather<L>(q, reached);
      expand<L>(reached, w3, zero, z);
      (at.inside ? load_channels<L>(pixel<const T>(p.grad_y, tile.n, at.h, at.w), lane, sizes,
                                    grad_aligned)
                 : Pack<T, L::kVec>::zero())
          .to_floats(grad);
#pragma unroll
      for (int v = 0; v < L::kVec; v++) {
        const float masked = relu_backward(norm3[v].apply(z[v]), grad[v]);
        grad[v] = at.inside ? norm_backward(norm3[v], masked, norm3[v].hat(z[v]), means.grad[v],
                                            means.grad_hat[v])
                            : 0.f;
#pragma unroll
        for (int r = 0; r < L::kReach; r++)
          sums[kW3 + r * L::kVec + v] = fmaf(grad[v], reached[r], sums[kW3 + r * L::kVec + v]);
      }
      squeeze<L>(grad, w3, grad2);
      grad2[0] = relu_backward(q[0], grad2[0]);
      sums[0] += grad2[0];
      sums[1] = fmaf(grad2[0], norm2.hat(z2), sums[1]);
      if (exists) p.grad2[at.index * sizes.m + lane] = grad2[0];
    }
  }
  float* row = out.sums2 + blockIdx.x * Partial<L>::kSums2;
  float* weight_row = out.weight_rows + static_cast<int64_t>(blockIdx.x) * out.weights;
  block_sum(sums, [&](int i, int lane, float sum) {
    if (i < kW3) {
      row[i * L::kM + lane] = sum;
      return;
    }
    const int c = lane * L::kVec + (i - kW3) % L::kVec, m = L::mid(lane, (i - kW3) / L::kVec);
    if (sizes.connected(c, m)) weight_row[out.w3 + sizes.w3_index(c, m)] = sum;
  });
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads)
    gcrb_train_bwd3_kernel(const GcrbTrainBackwardParams p, int64_t tiles, bool x_aligned) {
  constexpr int kStep = kThreads / L::kLanes;
  constexpr int kW2 = 2, kSums = kW2 + 9;
  __shared__ GcrbSharedWeights<L> weights;
  __shared__ GcrbBlockSum<L, kThreads> block_sum;
  __shared__ float grad[kTrainPositions][L::kM];  // before BN2
  const GcrbTrainParams& f = p.forward;
  const GcrbSizes<L> sizes(f.c, f.m, f.groups);
  const Partial<L> out(sizes.c, sizes.m, sizes.c / sizes.group_c, p.partial, gridDim.x);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  weights.template load<T>(f.weights, sizes);
  const Means<1> means = mean_of_rows<T, L, 1>(p, out.sums2, sizes.m, p.grad_beta[1],
                                               p.grad_gamma[1], block_sum);  // and a barrier
  const Norm norm1 = stored_norm<T>(f, sizes, 0, lane), norm2 = stored_norm<T>(f, sizes, 1, lane);
  float w1[L::kReach][L::kVec], w2[9];
  load_lane_weights<L>(weights.w1, lane, w1);
#pragma unroll
  for (int k = 0; k < 9; k++) w2[k] = weights.w2[k][lane];

  float sums[kSums] = {};
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(static_cast<unsigned>(index), f.h, f.w, kTrainH, kTrainW);
    __syncthreads();
    for (int position = slot; position < kTrainPositions; position += kStep) {
      const Pixel at(f, tile, position / kTrainHaloW - 1, position % kTrainHaloW - 1);
      float value = 0.f;
      if (at.inside && lane < sizes.m) {
        const int64_t i = at.index * sizes.m + lane;
        value = norm_backward(norm2, __ldg(p.grad2 + i), norm2.hat(__ldg(f.depthwise + i)),
                              means.grad[0], means.grad_hat[0]);
      }
      grad[position][lane] = value;
    }
    __syncthreads();
#pragma unroll 1
    for (int position = slot; position < kTrainPixels; position += kStep) {
      const int row = position / kTrainW, column = position % kTrainW;
      const Pixel at(f, tile, row, column);
      float x[L::kVec], z1[1];
      (at.inside ? load_channels<L>(pixel<const T>(f.x, tile.n, at.h, at.w), lane, sizes, x_aligned)
                 : Pack<T, L::kVec>::zero())
          .to_floats(x);
      squeeze<L>(x, w1, z1);
      if (!at.inside) continue;
      const float mid = relu(norm1.apply(z1[0]));
      float grad1 = 0.f;
#pragma unroll
      for (int k = 0; k < 9; k++) {
        const float g = grad[(row + 2 - k / 3) * kTrainHaloW + column + 2 - k % 3][lane];
        grad1 = fmaf(w2[k], g, grad1);
        sums[kW2 + k] = fmaf(mid, g, sums[kW2 + k]);
      }
      grad1 = relu_backward(mid, grad1);
      sums[0] += grad1;
      sums[1] = fmaf(grad1, norm1.hat(z1[0]), sums[1]);
      if (lane < sizes.m) p.grad1[at.index * sizes.m + lane] = grad1;
    }
  }
  float* row = out.sums3 + blockIdx.x * Partial<L>::kSums3;
  float* weight_row = out.weight_rows + static_cast<int64_t>(blockIdx.x) * out.weights;
  block_sum(sums, [&](int i, int lane, float sum) {
    if (i < kW2)
      row[i * L::kM + lane] = sum;
    else if (lane < sizes.m)
      weight_row[out.w2 + lane * 9 + i - kW2] = sum;
  });
}

template <typename T, class L>
__global__ void __launch_bounds__(kThreads)
    gcrb_train_bwd4_kernel(const GcrbTrainBackwardParams p, int64_t tiles, bool x_aligned,
                           bool grad_aligned) {
  constexpr int kStep = kThreads / L::kLanes;
  __shared__ GcrbSharedWeights<L> weights;
  __shared__ GcrbBlockSum<L, kThreads> block_sum;
  const GcrbTrainParams& f = p.forward;
  const GcrbSizes<L> sizes(f.c, f.m, f.groups);
  const Partial<L> out(sizes.c, sizes.m, sizes.c / sizes.group_c, p.partial, gridDim.x);
  const int lane = threadIdx.x % L::kLanes, slot = threadIdx.x / L::kLanes;
  weights.template load<T>(f.weights, sizes);
  const Means<1> means = mean_of_rows<T, L, 1>(p, out.sums3, sizes.m, p.grad_beta[0],
                                               p.grad_gamma[0], block_sum);  // and a barrier
  const Norm norm1 = stored_norm<T>(f, sizes, 0, lane);
  float w1[L::kReach][L::kVec];
  load_lane_weights<L>(weights.w1, lane, w1);

  float sums[L::kReach * L::kVec] = {};
  for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const Tile tile(static_cast<unsigned>(index), f.h, f.w, kTrainH, kTrainW);
#pragma unroll 1
    for (int position = slot; position < kTrainPixels; position += kStep) {
      const Pixel at(f, tile, position / kTrainW, position % kTrainW);
      float x[L::kVec], z1[1], grad1[1] = {0.f}, reached[L::kReach], grad[L::kVec];
      (at.inside ? load_channels<L>(pixel<const T>(f.x, tile.n, at.h, at.w), lane, sizes, x_aligned)
                 : Pack<T, L::kVec>::zero())
          .to_floats(x);
      squeeze<L>(x, w1, z1);
      if (at.inside && lane < sizes.m)
        grad1[0] = norm_backward(norm1, __ldg(p.grad1 + at.index * sizes.m + lane),
                                 norm1.hat(z1[0]), means.grad[0], means.grad_hat[0]);
      gather<L>(grad1, reached);
      if (!at.inside) continue;
      load_channels<L>(pixel<const T>(p.grad_y, tile.n, at.h, at.w), lane, sizes, grad_aligned)
          .to_floats(grad);
#pragma unroll
      for (int r = 0; r < L::kReach; r++)
#pragma unroll
        for (int v = 0; v < L::kVec; v++) {
          grad[v] = fmaf(w1[r][v], reached[r], grad[v]);
          sums[r * L::kVec + v] = fmaf(reached[r], x[v], sums[r * L::kVec + v]);
        }
      store_channels<L>(Pack<T, L::kVec>::from_floats(grad), pixel<T>(p.grad_x, tile.n, at.h, at.w),
                        lane, sizes);
    }
  }
  float* weight_row = out.weight_rows + static_cast<int64_t>(blockIdx.x) * out.weights;
  block_sum(sums, [&](int i, int lane, float sum) {
    const int c = lane * L::kVec + i % L::kVec, m = L::mid(lane, i / L::kVec);
    if (sizes.connected(c, m)) weight_row[out.w1 + sizes.w1_index(c, m)] = sum;
  });
}

template <class L>
Partial<L> partial_of(const GcrbTrainParams& p, float* data) {
  return {static_cast<int>(p.c), static_cast<int>(p.m), static_cast<int>(p.groups), data,
          train_blocks(p)};
}

template <class L>
int64_t partial_floats(const GcrbTrainParams& p) {
  const Partial<L> out = partial_of<L>(p, nullptr);
  return out.weight_rows - out.sums1 + reduce_rows_room(train_blocks(p)) * out.weights;
}

template <typename T, class L>
cudaError_t run(const GcrbTrainBackwardParams& p, cudaStream_t stream) {
  const GcrbTrainParams& f = p.forward;
  const int64_t bytes = L::kVec * sizeof(T), blocks = train_blocks(f), tiles = train_tiles(f);
  const bool x = is_aligned(f.x, sizeof(T), bytes), grad = is_aligned(p.grad_y, sizeof(T), bytes);
  cudaError_t error =
      launch(gcrb_train_bwd1_kernel<T, L>, blocks, kThreads, stream, p, tiles, x, grad);
  if (error != cudaSuccess) return error;
  error = launch(gcrb_train_bwd2_kernel<T, L>, blocks, kThreads, stream, p, tiles, grad);
  if (error != cudaSuccess) return error;
  error = launch(gcrb_train_bwd3_kernel<T, L>, blocks, kThreads, stream, p, tiles, x);
  if (error != cudaSuccess) return error;
  error = launch(gcrb_train_bwd4_kernel<T, L>, blocks, kThreads, stream, p, tiles, x, grad);
  if (error != cudaSuccess) return error;
  const Partial<L> out = partial_of<L>(f, p.partial);
  ReduceTargets targets;
  targets.dtype = f.weights.dtype;
  targets.add(p.grad_w1, out.w2);
  targets.add(p.grad_w2, out.w3 - out.w2);
  targets.add(p.grad_w3, out.weights - out.w3);
  return launch_reduce_rows(out.weight_rows, blocks, out.weights, targets, stream);
}

}  // namespace

int64_t gcrb_train_bwd_partial_floats(const GcrbTrainParams& p) {
  EFRDN_FAST_GCRB_SWITCH(p, 4, return partial_floats<L>(p))
  return 0;
}

cudaError_t launch_gcrb_train_bwd(const GcrbTrainBackwardParams& p, cudaStream_t stream) {
  EFRDN_FAST_DTYPE_SWITCH(p.forward.dtype,
                          EFRDN_FAST_GCRB_SWITCH(p.forward, 4, return run<T, L>(p, stream)))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
