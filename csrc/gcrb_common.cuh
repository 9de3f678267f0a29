// What the GCRB kernels share: how lanes share a pixel, weights in shared memory, the 1x1 products.
#pragma once

#include "common.cuh"
#include "gcrb.h"

namespace efrdn_fast {

// `kLanes` neighbouring lanes share a pixel. Each holds `Vec` of the channels and keeps `kOwn` of
// the mid channels. The `kSpan` lanes of a group exchange partial sums by __shfl_xor_sync. A layout
// that is not exact takes any sizes up to its own: what is missing counts as 0.
template <int Channels, int Mid, int Groups, int Vec, bool Exact>
struct GcrbLayout {
  static constexpr int kC = Channels, kM = Mid, kVec = Vec;
  static constexpr bool kExact = Exact;
  static constexpr int kGroupC = Channels / Groups, kGroupM = Mid / Groups;
  static constexpr int kLanes = Channels / Vec;
  static constexpr int kOwn = Mid / kLanes;
  static constexpr int kSpan = kGroupC > Vec ? kGroupC / Vec : 1;
  static constexpr int kReach = kOwn * kSpan;  // mid channels that a lane's channels meet
  static constexpr int kPixelsPerWarp = kWarp / kLanes;

  static_assert(Channels % Vec == 0 && kWarp % kLanes == 0 && Mid % kLanes == 0);
  static_assert(kGroupC % Vec == 0 || Vec % kGroupC == 0);
  static_assert(Exact || Groups == 1);

  // The r-th mid channel that the channels of `lane` meet: its own, then those of lane ^ 1, ...
  static __device__ constexpr int mid(int lane, int r) {
    return (lane ^ (r / kOwn)) * kOwn + r % kOwn;
  }
};

// Sizes of an op: constants where the layout is exact.
template <class L>
struct GcrbSizes {
  int c, m, group_c, group_m;

  __device__ explicit GcrbSizes(int64_t channels, int64_t mid, int64_t groups) {
    c = L::kExact ? L::kC : static_cast<int>(channels);
    m = L::kExact ? L::kM : static_cast<int>(mid);
    group_c = L::kExact ? L::kGroupC : c / static_cast<int>(groups);
    group_m = L::kExact ? L::kGroupM : m / static_cast<int>(groups);
  }
  __device__ bool connected(int channel, int mid) const {
    return channel < c && mid < m && channel / group_c == mid / group_m;
  }
  __device__ int w1_index(int channel, int mid) const { return mid * group_c + channel % group_c; }
  __device__ int w3_index(int channel, int mid) const { return channel * group_m + mid % group_m; }
};

// The lane's channels of a pixel of which `address` is the first channel.
template <class L, typename T>
__device__ Pack<T, L::kVec> load_channels(const T* address, int lane, const GcrbSizes<L>& sizes,
                                          bool aligned) {
  address += lane * L::kVec;
  if constexpr (L::kExact) return Pack<T, L::kVec>::load(address, aligned);
  return Pack<T, L::kVec>::load_some(address, sizes.c - lane * L::kVec);
}

template <class L, typename T>
__device__ void store_channels(const Pack<T, L::kVec>& pack, T* address, int lane,
                               const GcrbSizes<L>& sizes) {
  address += lane * L::kVec;
  if constexpr (L::kExact)
    pack.store(address);
  else
    pack.store_some(address, sizes.c - lane * L::kVec);
}

template <class L>
struct GcrbSharedWeights {
  alignas(16) float w1[L::kReach][L::kC];  // between channel c and mid(lane of c, r), 0 if none
  alignas(16) float w3[L::kReach][L::kC];
  float w2[9][L::kM];
  float b1[L::kM], b2[L::kM], b3[L::kC];

  // All threads of the block take part; a barrier must follow.
  template <typename T>
  __device__ void load(const GcrbWeights& weights, const GcrbSizes<L>& sizes) {
    const bool is_float = weights.dtype == Dtype::kFloat;
    const auto at = [is_float](const void* data, int i) { return weight_at<T>(data, i, is_float); };
    for (int i = threadIdx.x; i < L::kReach * L::kC; i += blockDim.x) {
      const int c = i % L::kC, r = i / L::kC, m = L::mid(c / L::kVec, r);
      const bool connected = sizes.connected(c, m);
      w1[r][c] = connected ? at(weights.w1, sizes.w1_index(c, m)) : 0.f;
      w3[r][c] = connected ? at(weights.w3, sizes.w3_index(c, m)) : 0.f;
    }
    for (int i = threadIdx.x; i < 9 * L::kM; i += blockDim.x)
      w2[i % 9][i / 9] = i / 9 < sizes.m ? at(weights.w2, i) : 0.f;
    for (int i = threadIdx.x; i < L::kM; i += blockDim.x) {
      b1[i] = i < sizes.m ? at(weights.b1, i) : 0.f;
      b2[i] = i < sizes.m ? at(weights.b2, i) : 0.f;
    }
    for (int i = threadIdx.x; i < L::kC; i += blockDim.x)
      b3[i] = i < sizes.c ? at(weights.b3, i) : 0.f;
  }
};

// The lane's part of a 1x1 weight in registers.
template <class L>
__device__ void load_lane_weights(const float (&shared)[L::kReach][L::kC], int lane,
                                  float (&weight)[L::kReach][L::kVec]) {
#pragma unroll
  for (int r = 0; r < L::kReach; r++)
#pragma unroll
    for (int v = 0; v < L::kVec; v += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&shared[r][lane * L::kVec + v]);
      weight[r][v] = four.x;
      weight[r][v + 1] = four.y;
      weight[r][v + 2] = four.z;
      weight[r][v + 3] = four.w;
    }
}

// z = sum over the group's channels of weight * x, for the mid channels that the lane keeps.
template <class L>
__device__ void squeeze(const float (&x)[L::kVec], const float (&weight)[L::kReach][L::kVec],
                        float (&z)[L::kOwn]) {
#pragma unroll
  for (int r = 0; r < L::kReach; r++) {
    float sum = 0.f;
#pragma unroll
    for (int v = 0; v < L::kVec; v++) sum = fmaf(weight[r][v], x[v], sum);
    if (r < L::kOwn)
      z[r] = sum;
    else
      z[r % L::kOwn] += __shfl_xor_sync(kAllLanes, sum, r / L::kOwn);
  }
}

// The mid channels that the lane's channels meet, from the lanes that keep them.
template <class L>
__device__ void gather(const float (&own)[L::kOwn], float (&all)[L::kReach]) {
#pragma unroll
  for (int r = 0; r < L::kReach; r++)
    all[r] = r < L::kOwn ? own[r] : __shfl_xor_sync(kAllLanes, own[r % L::kOwn], r / L::kOwn);
}

// z = bias + sum over the group's mid channels of weight * mid, for the lane's channels.
template <class L>
__device__ void expand(const float (&mid)[L::kReach], const float (&weight)[L::kReach][L::kVec],
                       const float (&bias)[L::kVec], float (&z)[L::kVec]) {
#pragma unroll
  for (int v = 0; v < L::kVec; v++) {
    z[v] = bias[v];
#pragma unroll
    for (int r = 0; r < L::kReach; r++) z[v] = fmaf(weight[r][v], mid[r], z[v]);
  }
}

// What follows the squeeze, of the lane's channels: depthwise 3x3, ReLU, 1x1, ReLU.
template <class L>
struct GcrbTail {
  float w2[9][L::kOwn], b2[L::kOwn], w3[L::kReach][L::kVec], b3[L::kVec];

  __device__ GcrbTail(const GcrbSharedWeights<L>& weights, int lane) {
    load_lane_weights<L>(weights.w3, lane, w3);
#pragma unroll
    for (int v = 0; v < L::kVec; v++) b3[v] = weights.b3[lane * L::kVec + v];
#pragma unroll
    for (int o = 0; o < L::kOwn; o++) {
      b2[o] = weights.b2[lane * L::kOwn + o];
#pragma unroll
      for (int k = 0; k < 9; k++) w2[k][o] = weights.w2[k][lane * L::kOwn + o];
    }
  }

  // `window`: mid channels around the pixel, its rows modulo 3, the upper one `top`. Whole warps
  // take part.
  __device__ void operator()(const float (&window)[3][3][L::kOwn], int top,
                             float (&y)[L::kVec]) const {
    float q[L::kOwn], reached[L::kReach];
#pragma unroll
    for (int o = 0; o < L::kOwn; o++) {
      q[o] = b2[o];
#pragma unroll
      for (int k = 0; k < 9; k++)
        q[o] = fmaf(w2[k][o], window[(top + k / 3) % 3][k % 3][o], q[o]);
      q[o] = relu(q[o]);
    }
    gather<L>(q, reached);
    expand<L>(reached, w3, b3, y);
#pragma unroll
    for (int v = 0; v < L::kVec; v++) y[v] = relu(y[v]);
  }
};

// Sums `values` over all pixels of the block, that is over the threads of the same lane, in a fixed
// order, and gives sink(i, lane, sum) each result once. All threads of the block take part;
// `shared` is free again afterwards.
template <class L, int Threads>
struct GcrbBlockSum {
  static constexpr int kWarps = Threads / kWarp, kBatch = 384 / L::kLanes;
  float shared[kWarps][kBatch][L::kLanes];

  template <int Count, class Sink>
  __device__ void operator()(const float (&values)[Count], const Sink& sink) {
    const int warp = threadIdx.x / kWarp;
#pragma unroll
    for (int first = 0; first < Count; first += kBatch) {
      const int count = Count - first < kBatch ? Count - first : kBatch;
#pragma unroll
      for (int i = 0; i < kBatch; i++) {
        if (first + i >= Count) break;
        float value = values[first + i];
#pragma unroll
        for (int lanes = L::kLanes; lanes < kWarp; lanes *= 2)
          value += __shfl_xor_sync(kAllLanes, value, lanes);
        if (threadIdx.x % kWarp < L::kLanes) shared[warp][i][threadIdx.x % kWarp] = value;
      }
      __syncthreads();
      for (int i = threadIdx.x; i < count * L::kLanes; i += Threads) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; w++) sum += shared[w][i / L::kLanes][i % L::kLanes];
        sink(first + i / L::kLanes, i % L::kLanes, sum);
      }
      __syncthreads();
    }
  }
};

// Calls a template of (C, M, groups, vector, exact): the network's width, else the padded layout.
// EFRDN_FAST_GCRB_SWITCH(params, vector, return run<T, L>(args)) defines the layout L.
#define EFRDN_FAST_GCRB_SWITCH(p, vector, ...)                         \
  {                                                                    \
    const int64_t groups = (p).c == 32 && (p).m == 8 ? (p).groups : 0; \
    if (groups == 1) {                                                 \
      using L = GcrbLayout<32, 8, 1, vector, true>;                    \
      __VA_ARGS__;                                                     \
    } else if (groups == 2) {                                          \
      using L = GcrbLayout<32, 8, 2, vector, true>;                    \
      __VA_ARGS__;                                                     \
    } else if (groups == 4) {                                          \
      using L = GcrbLayout<32, 8, 4, vector, true>;                    \
      __VA_ARGS__;                                                     \
    } else if (groups == 8) {                                          \
      using L = GcrbLayout<32, 8, 8, vector, true>;                    \
      __VA_ARGS__;                                                     \
    } else if ((p).c <= kGcrbMaxC && (p).m <= kGcrbMaxM) {             \
      using L = GcrbLayout<kGcrbMaxC, kGcrbMaxM, 1, 4, false>;         \
      __VA_ARGS__;                                                     \
    }                                                                  \
  }

}  // namespace efrdn_fast
