// The CUDA ops, on libtorch's stable ABI; the only CUDA source that sees torch. Arguments are
// validated in Python; what would read or write out of bounds is checked again here.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <tuple>

#include "acrb.h"
#include "gcrb.h"

namespace efrdn_fast {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": the launch failed: ", cudaGetErrorString(error));
}

void check_map(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cuda(), op, ": ", name,
                  " must be a CUDA tensor of 4 dimensions, got ", x.dim(), " dimensions");
}

// `map` goes with `x`: dtype, device, N, H and W; its channels are free.
void check_beside(const char* op, const char* name, const Tensor& map, const Tensor& x) {
  check_map(op, name, map);
  STD_TORCH_CHECK(map.scalar_type() == x.scalar_type() &&
                      map.get_device_index() == x.get_device_index() && map.size(0) == x.size(0) &&
                      map.size(2) == x.size(2) && map.size(3) == x.size(3),
                  op, ": ", name, " must have the dtype, device, N, H and W of x");
}

void check_slice(const char* op, const char* name, const Tensor& x, int64_t start, int64_t d) {
  STD_TORCH_CHECK(start >= 0 && start <= x.size(1) - d, op, ": ", name, "=", start, " and ", d,
                  " channels do not fit into a map of ", x.size(1), " channels");
}

Dtype dtype_of(const char* op, const Tensor& x) {
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

bool has_nhwc_channels(const Tensor& x) { return x.size(1) == 1 || x.stride(1) == 1; }

// The map with its channels next to each other: x itself where they are, else a copy.
Tensor nhwc(const Tensor& x) {
  return has_nhwc_channels(x) ? x : torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

// The map's first element, moved to channel `start`. An axis of size 1 is never stepped over.
Map map_of(const Tensor& x, int64_t start = 0) {
  const auto stride = [&](int64_t axis) { return x.size(axis) == 1 ? 0 : x.stride(axis); };
  char* data = static_cast<char*>(const_cast<void*>(x.const_data_ptr()));
  return {data + start * static_cast<int64_t>(x.element_size()), stride(0), stride(2), stride(3)};
}

Tensor empty_nhwc(const Tensor& like, int64_t channels) {
  return torch::stable::empty({like.size(0), channels, like.size(2), like.size(3)},
                              like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

Tensor empty_floats(const Tensor& like, int64_t count) {
  return torch::stable::empty({count}, ScalarType::Float, std::nullopt, like.device());
}

Tensor empty_beside(const Tensor& like) {
  return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, like.device());
}

// Makes the weights contiguous and of one dtype: the one they share if a kernel can read it, else
// float32.
Dtype unite(const char* op, const Tensor& x, std::initializer_list<Tensor*> weights) {
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

Tensor as_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

// Six weights that live as long as the call.
struct GcrbTensors {
  Tensor w1, b1, w2, b2, w3, b3;
};

GcrbParams gcrb_params(const char* op, const Tensor& x, GcrbTensors& t, int64_t groups) {
  check_map(op, "x", x);
  GcrbParams p{};
  p.dtype = dtype_of(op, x);
  p.n = x.size(0);
  p.c = x.size(1);
  p.h = x.size(2);
  p.w = x.size(3);
  p.m = t.w1.size(0);
  p.groups = groups;
  STD_TORCH_CHECK(groups > 0 && p.c % groups == 0 && p.m % groups == 0, op, ": groups=", groups,
                  " must divide C=", p.c, " and M=", p.m);
  STD_TORCH_CHECK(p.c <= kGcrbMaxC && p.m <= kGcrbMaxM, op, ": at most C=", kGcrbMaxC,
                  " and M=", kGcrbMaxM, ", got C=", p.c, " and M=", p.m,
                  "; use backend 'triton' or 'reference'");
  const int64_t expected[] = {p.m * (p.c / groups), p.m, 9 * p.m, p.m, p.c * (p.m / groups), p.c};
  const Tensor* given[] = {&t.w1, &t.b1, &t.w2, &t.b2, &t.w3, &t.b3};
  const char* names[] = {"w1", "b1", "w2", "b2", "w3", "b3"};
  for (int i = 0; i < 6; i++)
    STD_TORCH_CHECK(given[i]->numel() == expected[i], op, ": ", names[i], " must have ",
                    expected[i], " values, got ", given[i]->numel());
  p.weights.dtype = unite(op, x, {&t.w1, &t.b1, &t.w2, &t.b2, &t.w3, &t.b3});
  p.weights.w1 = t.w1.const_data_ptr();
  p.weights.b1 = t.b1.const_data_ptr();
  p.weights.w2 = t.w2.const_data_ptr();
  p.weights.b2 = t.b2.const_data_ptr();
  p.weights.w3 = t.w3.const_data_ptr();
  p.weights.b3 = t.b3.const_data_ptr();
  p.x = map_of(x);
  return p;
}

Tensor gcrb(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3,
            int64_t groups) {
  const DeviceGuard guard(x.get_device_index());
  check_map("gcrb_cuda", "x", x);
  x = nhwc(x);
  GcrbTensors weights{w1, b1, w2, b2, w3, b3};
  GcrbParams p = gcrb_params("gcrb_cuda", x, weights, groups);
  Tensor y = empty_nhwc(x, p.c);
  p.y = map_of(y);
  check_launch("gcrb_cuda", launch_gcrb_fwd(p, current_stream(x)));
  return y;
}

AcrbParams acrb_params(const char* op, const Tensor& x, Tensor& weight, Tensor& bias,
                       int64_t start) {
  check_map(op, "x", x);
  AcrbParams p{};
  p.dtype = dtype_of(op, x);
  p.n = x.size(0);
  p.h = x.size(2);
  p.w = x.size(3);
  p.d = weight.size(0);
  STD_TORCH_CHECK(weight.numel() == 9 * p.d * p.d && bias.numel() == p.d, op, ": weight must be [",
                  p.d, ", ", p.d, ", 3, 3] and bias [", p.d, "], got ", weight.numel(), " and ",
                  bias.numel(), " values");
  check_slice(op, "start", x, start, p.d);
  p.weight_dtype = unite(op, x, {&weight, &bias});
  p.weight = weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.x = map_of(x, start);
  return p;
}

Tensor acrb(Tensor x, Tensor weight, Tensor bias, int64_t start) {
  const DeviceGuard guard(x.get_device_index());
  check_map("acrb_cuda", "x", x);
  x = nhwc(x);
  AcrbParams p = acrb_params("acrb_cuda", x, weight, bias, start);
  Tensor y = empty_nhwc(x, p.d);
  p.y = map_of(y);
  check_launch("acrb_cuda", launch_acrb_fwd(p, current_stream(x)));
  return y;
}

void acrb_out(Tensor x, Tensor weight, Tensor bias, int64_t start, Tensor out, int64_t out_start) {
  const DeviceGuard guard(x.get_device_index());
  check_beside("acrb_out_cuda", "out", out, x);
  check_slice("acrb_out_cuda", "out_start", out, out_start, weight.size(0));
  if (!has_nhwc_channels(out)) {
    Tensor place = torch::stable::narrow(out, 1, out_start, weight.size(0));
    torch::stable::copy_(place, acrb(x, weight, bias, start));
    return;
  }
  x = nhwc(x);
  AcrbParams p = acrb_params("acrb_out_cuda", x, weight, bias, start);
  p.y = map_of(out, out_start);
  check_launch("acrb_out_cuda", launch_acrb_fwd(p, current_stream(x)));
}

std::tuple<Tensor, Tensor, Tensor> acrb_backward(Tensor grad_y, Tensor x, Tensor weight,
                                                 Tensor bias, int64_t start) {
  const char* op = "acrb_backward_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_beside(op, "grad_y", grad_y, x);
  const ScalarType weight_dtype = weight.scalar_type(), bias_dtype = bias.scalar_type();
  x = nhwc(x);
  grad_y = nhwc(grad_y);
  AcrbBackwardParams p{};
  p.forward = acrb_params(op, x, weight, bias, start);
  check_slice(op, "grad_y", grad_y, 0, p.forward.d);
  Tensor grad_x = empty_nhwc(x, x.size(1));
  Tensor grad_weight = empty_beside(weight), grad_bias = empty_beside(bias);
  Tensor masked = empty_floats(x, p.forward.n * p.forward.h * p.forward.w * p.forward.d);
  Tensor partial = empty_floats(x, acrb_partial_floats(p.forward));
  p.grad_y = map_of(grad_y);
  p.grad_x = map_of(grad_x, start);
  p.before = start;
  p.after = x.size(1) - start - p.forward.d;
  p.grad_weight = grad_weight.mutable_data_ptr();
  p.grad_bias = grad_bias.mutable_data_ptr();
  p.masked = static_cast<float*>(masked.mutable_data_ptr());
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  check_launch(op, launch_acrb_bwd(p, current_stream(x)));
  return {grad_x, as_dtype(grad_weight, weight_dtype), as_dtype(grad_bias, bias_dtype)};
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def(
      "gcrb_cuda(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, "
      "int groups) -> Tensor");
  m.def("acrb_cuda(Tensor x, Tensor weight, Tensor bias, int start) -> Tensor");
  m.def(
      "acrb_out_cuda(Tensor x, Tensor weight, Tensor bias, int start, Tensor(a!) out, "
      "int out_start) -> ()");
  m.def(
      "acrb_backward_cuda(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, int start) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CUDA, m) {
  m.impl("gcrb_cuda", TORCH_BOX(&efrdn_fast::gcrb));
  m.impl("acrb_cuda", TORCH_BOX(&efrdn_fast::acrb));
  m.impl("acrb_out_cuda", TORCH_BOX(&efrdn_fast::acrb_out));
  m.impl("acrb_backward_cuda", TORCH_BOX(&efrdn_fast::acrb_backward));
}
