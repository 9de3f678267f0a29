// What the training kernels of GCRB share. A block walks over tiles of the batch; its last act is
// to leave one row of partial results, and the first act of the next kernel is to merge all rows.
#pragma once

#include "gcrb_common.cuh"
#include "gcrb_train.h"

namespace efrdn_fast {

constexpr int kTrainThreads = 256;
constexpr int kTrainH = 12, kTrainW = 16, kTrainPixels = kTrainH * kTrainW;
constexpr int kTrainHaloW = kTrainW + 2, kTrainPositions = (kTrainH + 2) * kTrainHaloW;
// Rows of partial results: few enough that every block can merge them all.
constexpr int64_t kTrainMaxBlocks = 256;

inline int64_t train_tiles(const GcrbTrainParams& p) {
  return tile_count(p.n, p.h, p.w, kTrainH, kTrainW);
}
inline int64_t train_blocks(const GcrbTrainParams& p) {
  const int64_t tiles = train_tiles(p);
  return tiles < kTrainMaxBlocks ? tiles : kTrainMaxBlocks;
}

// One BatchNorm of one channel.
struct Norm {
  float mean, istd, gamma, beta;

  __device__ float hat(float z) const { return (z - mean) * istd; }
  __device__ float apply(float z) const { return fmaf(hat(z), gamma, beta); }
};

// Index of the first channel of the i-th BatchNorm in mean and var.
template <class L>
__device__ int stat_offset(const GcrbSizes<L>& sizes, int i) {
  return i * sizes.m;
}

// `part`: 0, 1, 2. A channel that does not exist (padded layouts) normalises to 0.
template <typename T, class L>
__device__ Norm make_norm(const GcrbTrainParams& p, const GcrbSizes<L>& sizes, int part,
                          int channel, float mean, float var) {
  const void* const betas[3] = {p.weights.b1, p.weights.b2, p.weights.b3};
  if (channel >= (part < 2 ? sizes.m : sizes.c)) return {0.f, 0.f, 0.f, 0.f};
  const bool is_float = p.weights.dtype == Dtype::kFloat;
  return {mean, 1.f / sqrtf(var + p.eps), weight_at<T>(p.gamma[part], channel, is_float),
          weight_at<T>(betas[part], channel, is_float)};
}

// The same with the statistics that the forward pass left.
template <typename T, class L>
__device__ Norm stored_norm(const GcrbTrainParams& p, const GcrbSizes<L>& sizes, int part,
                            int channel) {
  const bool exists = channel < (part < 2 ? sizes.m : sizes.c);
  const int index = stat_offset(sizes, part) + channel;
  return make_norm<T>(p, sizes, part, channel, exists ? p.mean[index] : 0.f,
                      exists ? p.var[index] : 1.f);
}

// Count, mean and co-moments sum (z - mean) (z' - mean') of one mid channel with itself and with
// those of the lanes ^ 1, ^ 2, ... (Welford's and Chan's updates: no cancellation).
template <class L, int Span>
struct Moments {
  static constexpr int kFloats = (2 + Span) * L::kM;  // in memory, of all lanes
  float count = 0.f, mean = 0.f, co[Span] = {};

  // All lanes call; those of a pixel agree on `valid`.
  __device__ void add(float z, bool valid) {
    const float d = z - mean;
    const float n = count + 1.f, share = valid ? __fdividef(1.f, n) : 0.f;
    add_products(d, count * share);
    mean = fmaf(d, share, mean);
    count = valid ? n : count;
  }
  __device__ void merge(const Moments& other) {
    const float n = count + other.count;
    const float share = n > 0.f ? __fdividef(other.count, n) : 0.f;
    const float d = other.mean - mean;
    add_products(d, count * share);
#pragma unroll
    for (int s = 0; s < Span; s++) co[s] += other.co[s];
    mean = fmaf(d, share, mean);
    count = n;
  }
  // Of the lane `lanes` away.
  __device__ Moments shuffled(int lanes) const {
    Moments m;
    m.count = __shfl_xor_sync(kAllLanes, count, lanes);
    m.mean = __shfl_xor_sync(kAllLanes, mean, lanes);
#pragma unroll
    for (int s = 0; s < Span; s++) m.co[s] = __shfl_xor_sync(kAllLanes, co[s], lanes);
    return m;
  }
  __device__ void store(float* row, int lane) const {
    row[lane] = count;
    row[L::kM + lane] = mean;
#pragma unroll
    for (int s = 0; s < Span; s++) row[(2 + s) * L::kM + lane] = co[s];
  }
  static __device__ Moments load(const float* row, int lane) {
    Moments m;
    m.count = row[lane];
    m.mean = row[L::kM + lane];
#pragma unroll
    for (int s = 0; s < Span; s++) m.co[s] = row[(2 + s) * L::kM + lane];
    return m;
  }

 private:
  __device__ void add_products(float d, float factor) {
#pragma unroll
    for (int s = 0; s < Span; s++) {
      const float other = s == 0 ? d : __shfl_xor_sync(kAllLanes, d, s);
      co[s] = fmaf(d * factor, other, co[s]);
    }
  }
};

// Merges the moments of all threads of a lane; every thread gets the result.
template <class L, int Span>
struct BlockMoments {
  using M = Moments<L, Span>;
  static constexpr int kWarps = kTrainThreads / kWarp;
  float shared[kWarps][M::kFloats];

  __device__ M operator()(M moments, int lane) {
#pragma unroll
    for (int lanes = L::kLanes; lanes < kWarp; lanes *= 2) moments.merge(moments.shuffled(lanes));
    __syncthreads();
    if (threadIdx.x % kWarp < L::kLanes) moments.store(shared[threadIdx.x / kWarp], lane);
    __syncthreads();
    M all;
    for (int warp = 0; warp < kWarps; warp++) all.merge(M::load(shared[warp], lane));
    return all;
  }

  // Merges the rows that the blocks of an earlier kernel left.
  __device__ M rows(const float* partial, int count, int lane, int slot) {
    constexpr int kSlots = kTrainThreads / L::kLanes;
    M moments;
    for (int first = 0; first < count; first += kSlots)
      moments.merge(first + slot < count
                        ? M::load(partial + static_cast<int64_t>(first + slot) * M::kFloats, lane)
                        : M());
    return (*this)(moments, lane);
  }
};

// Pixel `position` of a tile.
struct Pixel {
  int64_t h, w, index;  // index: among all pixels of the batch
  bool inside;

  __device__ Pixel(const GcrbTrainParams& p, const Tile& tile, int row, int column)
      : h(tile.h0 + row),
        w(tile.w0 + column),
        index((tile.n * p.h + h) * p.w + w),
        inside(h >= 0 && h < p.h && w >= 0 && w < p.w) {}
};

// Behind the first ReLU on the tile and one pixel around it, 0 outside the image. Barriers stand
// before and after the writing.
template <typename T, class L>
__device__ void squeeze_tile(const GcrbTrainParams& p, const GcrbSizes<L>& sizes, const Tile& tile,
                             const Norm& norm, const float (&w1)[L::kReach][L::kVec], int lane,
                             int slot, bool aligned, float (&mid)[kTrainPositions][L::kM]) {
  constexpr int kStep = kTrainThreads / L::kLanes;
  __syncthreads();
#pragma unroll 2
  for (int first = 0; first < kTrainPositions; first += kStep) {
    const int position = first + slot;
    const Pixel at(p, tile, position / kTrainHaloW - 1, position % kTrainHaloW - 1);
    const bool inside = position < kTrainPositions && at.inside;
    float x[L::kVec], z[1];
    (inside ? load_channels<L>(pixel<const T>(p.x, tile.n, at.h, at.w), lane, sizes, aligned)
            : Pack<T, L::kVec>::zero())
        .to_floats(x);
    squeeze<L>(x, w1, z);
    if (position < kTrainPositions) mid[position][lane] = inside ? relu(norm.apply(z[0])) : 0.f;
  }
  __syncthreads();
}

// Convolution of a tile with one pixel around it by the lane's depthwise weights.
template <class L>
__device__ float depthwise(const float (&mid)[kTrainPositions][L::kM], const float (&w2)[9],
                           int row, int column, int lane) {
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < 9; k++)
    sum = fmaf(w2[k], mid[(row + k / 3) * kTrainHaloW + column + k % 3][lane], sum);
  return sum;
}

}  // namespace efrdn_fast
