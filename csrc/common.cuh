// Shared by all CUDA kernels: element types, vector access, tiles, launching.
// The sources also compile as plain C++ with EFRDN_FAST_SIMT, which runs them on the CPU in tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifdef EFRDN_FAST_SIMT
#include "simt.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstring>

#include "types.h"

namespace efrdn_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, cudaStream_t stream,
                   Params... params) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto grid = static_cast<unsigned>(blocks);
#ifdef EFRDN_FAST_SIMT
  (void)stream;
  simt::launch(dim3(grid), dim3(threads), 0, [=] { kernel(params...); });
  return cudaSuccess;
#else
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, params...);
  return cudaGetLastError();
#endif
}

// Calls a template of the element type: EFRDN_FAST_DTYPE_SWITCH(dtype, return run<T>(args)).
#define EFRDN_FAST_DTYPE_SWITCH(dtype, ...) \
  switch (dtype) {                          \
    case Dtype::kFloat: {                   \
      using T = float;                      \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
    case Dtype::kBf16: {                    \
      using T = __nv_bfloat16;              \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
    case Dtype::kHalf: {                    \
      using T = __half;                     \
      __VA_ARGS__;                          \
      break;                                \
    }                                       \
  }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Element i of weights that are float or T.
template <typename T>
__device__ float weight_at(const void* data, int64_t i, bool is_float) {
  return is_float ? __ldg(static_cast<const float*>(data) + i)
                  : to_float(__ldg(static_cast<const T*>(data) + i));
}

// max(x, 0) that keeps NaN, as torch.relu does.
__device__ inline float relu(float x) {
#ifdef EFRDN_FAST_SIMT
  return x < 0.f ? 0.f : x;
#else
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The gradient behind a ReLU in front of it: 0 where gate <= 0, so a NaN passes it as in PyTorch.
__device__ inline float relu_backward(float gate, float grad) { return gate <= 0.f ? 0.f : grad; }

template <int Bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned;
};

// N neighbouring elements in registers; one memory instruction where the address allows it.
template <typename T, int N>
struct Pack {
  T value[N];

  static __device__ Pack zero() {
    Pack pack;
#pragma unroll
    for (int i = 0; i < N; i++) pack.value[i] = from_float<T>(0.f);
    return pack;
  }
  // `aligned`: the address is a multiple of the pack's size. The memory is read only.
  static __device__ Pack load(const T* address, bool aligned) {
    using W = typename Word<N * sizeof(T)>::type;
    Pack pack;
    if (aligned) {
      const W word = __ldg(reinterpret_cast<const W*>(address));
      memcpy(&pack, &word, sizeof word);
    } else {
#pragma unroll
      for (int i = 0; i < N; i++) pack.value[i] = __ldg(address + i);
    }
    return pack;
  }
  // The first `count` elements; 0 for the rest.
  static __device__ Pack load_some(const T* address, int count) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < N; i++) pack.value[i] = i < count ? __ldg(address + i) : from_float<T>(0.f);
    return pack;
  }
  __device__ void store_some(T* address, int count) const {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < count) address[i] = value[i];
  }
  __device__ void store(T* address) const {  // aligned
    using W = typename Word<N * sizeof(T)>::type;
    W word;
    memcpy(&word, this, sizeof word);
    *reinterpret_cast<W*>(address) = word;
  }
  __device__ void to_floats(float (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = to_float(value[i]);
  }
  static __device__ Pack from_floats(const float (&in)[N]) {
    Pack pack;
#pragma unroll
    for (int i = 0; i < N; i++) pack.value[i] = from_float<T>(in[i]);
    return pack;
  }
};

// True when packs of `bytes` bytes can be read at every pixel of `map`.
inline bool is_aligned(const Map& map, int64_t element_bytes, int64_t bytes) {
  const auto multiple = [&](int64_t stride) { return stride * element_bytes % bytes == 0; };
  return reinterpret_cast<uintptr_t>(map.data) % bytes == 0 && multiple(map.stride_n) &&
         multiple(map.stride_h) && multiple(map.stride_w);
}

// The pixels [h0, h0 + TileH) x [w0, w0 + TileW) of image n that block `index` computes.
struct Tile {
  int64_t n, h0, w0;

  __device__ Tile(unsigned index, int64_t height, int64_t width, int tile_h, int tile_w) {
    const auto columns = static_cast<unsigned>(ceil_div(width, tile_w));
    const auto rows = static_cast<unsigned>(ceil_div(height, tile_h));
    w0 = static_cast<int64_t>(index % columns) * tile_w;
    h0 = static_cast<int64_t>(index / columns % rows) * tile_h;
    n = index / columns / rows;
  }
};

inline int64_t tile_count(int64_t n, int64_t height, int64_t width, int tile_h, int tile_w) {
  return n * ceil_div(height, tile_h) * ceil_div(width, tile_w);
}

// First element of pixel (n, h, w).
template <typename T>
__device__ T* pixel(const Map& map, int64_t n, int64_t h, int64_t w) {
  return static_cast<T*>(map.data) + n * map.stride_n + h * map.stride_h + w * map.stride_w;
}

}  // namespace efrdn_fast
