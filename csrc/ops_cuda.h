// What the bindings of the CUDA kernels share. Only this header and ops_cuda*.cpp see torch (its
// stable ABI).
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

#include "types.h"

namespace efrdn_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
}

inline void check_map(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cuda(), op, ": ", name,
                  " must be a CUDA tensor of 4 dimensions, got ", x.dim(), " dimensions");
}

// `map` goes with `x`: dtype, device, N, H and W; its channels are free.
inline void check_beside(const char* op, const char* name, const Tensor& map, const Tensor& x) {
  check_map(op, name, map);
  STD_TORCH_CHECK(map.scalar_type() == x.scalar_type() &&
                      map.get_device_index() == x.get_device_index() && map.size(0) == x.size(0) &&
                      map.size(2) == x.size(2) && map.size(3) == x.size(3),
                  op, ": ", name, " must have the dtype, device, N, H and W of x");
}

inline void check_slice(const char* op, const char* name, const Tensor& x, int64_t start,
                        int64_t d) {
  STD_TORCH_CHECK(start >= 0 && start <= x.size(1) - d, op, ": ", name, "=", start, " and ", d,
                  " channels do not fit into a map of ", x.size(1), " channels");
}

inline Dtype dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBf16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, bfloat16 or float16, got another dtype");
  }
}

inline bool has_nhwc_channels(const Tensor& x) { return x.size(1) == 1 || x.stride(1) == 1; }

// The map with its channels next to each other: x itself where they are, else a copy.
inline Tensor nhwc(const Tensor& x) {
  return has_nhwc_channels(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

// The map's first element, moved to channel `start`. An axis of size 1 is never stepped over.
inline Map map_of(const Tensor& x, int64_t start = 0) {
  const auto stride = [&](int64_t axis) { return x.size(axis) == 1 ? 0 : x.stride(axis); };
  char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  return {data + start * static_cast<int64_t>(x.element_size()), stride(0), stride(2), stride(3)};
}

inline Tensor empty_nhwc(const Tensor& like, int64_t channels) {
  return torch::stable::empty({like.size(0), channels, like.size(2), like.size(3)},
                              like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

inline Tensor empty_floats(const Tensor& like, int64_t count) {
  return torch::stable::empty({count}, ScalarType::Float, std::nullopt, like.device());
}

inline float* floats(const Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); }

inline Tensor empty_beside(const Tensor& like) {
  return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, like.device());
}

// Makes the weights contiguous and of one dtype: the one they share if a kernel can read it, else
// float32.
inline Dtype unite(const char* op, const Tensor& x, std::initializer_list<Tensor*> weights) {
  ScalarType dtype = (*weights.begin())->scalar_type();
  for (const Tensor* w : weights) {
    STD_TORCH_CHECK(w->is_cuda() && w->get_device_index() == x.get_device_index(), op,
                    ": weights must be on the device of x");
    if (w->scalar_type() != dtype) dtype = ScalarType::Float;
  }
  if (dtype != x.scalar_type()) dtype = ScalarType::Float;
  for (Tensor* w : weights) {
    if (w->scalar_type() != dtype) *w = torch::stable::to(*w, dtype);
    if (!w->is_contiguous()) *w = torch::stable::contiguous(*w);
  }
  return dtype_of(op, **weights.begin());
}

inline Tensor as_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

}  // namespace efrdn_fast
