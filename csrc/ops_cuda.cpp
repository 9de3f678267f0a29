// The CUDA ops of the convolutions. Arguments are validated in Python; what would read or write out
// of bounds is checked again here.
#include "ops_cuda.h"

#include <optional>
#include <tuple>
#include <vector>

#include "acrb.h"
#include "conv3x3.h"

namespace efrdn_fast {
namespace {

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
  p.masked = floats(masked);
  p.partial = floats(partial);
  check_launch(op, launch_acrb_bwd(p, current_stream(x)));
  return {grad_x, as_dtype(grad_weight, weight_dtype), as_dtype(grad_bias, bias_dtype)};
}

// One map in the place of more sources than the kernel takes.
Tensor concatenate(const std::vector<Tensor>& xs, int64_t channels) {
  Tensor joined = empty_nhwc(xs[0], channels);
  int64_t start = 0;
  for (const Tensor& x : xs) {
    Tensor place = torch::stable::narrow(joined, 1, start, x.size(1));
    torch::stable::copy_(place, x);
    start += x.size(1);
  }
  return joined;
}

Tensor conv3x3(std::vector<Tensor> xs, Tensor weight, std::optional<Tensor> bias,
               std::optional<Tensor> residual, int64_t groups, bool relu, bool interleaved,
               bool tf32) {
  const char* op = "conv3x3_cuda";
  STD_TORCH_CHECK(!xs.empty(), op, ": xs must hold at least one map");
  const DeviceGuard guard(xs[0].get_device_index());
  Conv3x3Params p{};
  for (const Tensor& x : xs) {
    check_beside(op, "every map of xs", x, xs[0]);
    p.cin += x.size(1);
  }
  STD_TORCH_CHECK(!interleaved || (xs.size() == 2 && xs[0].size(1) == xs[1].size(1)), op,
                  ": interleaved takes two maps of as many channels, got ", xs.size(), " maps");
  p.dtype = dtype_of(op, xs[0]);
  p.tf32 = tf32;
  p.n = xs[0].size(0);
  p.h = xs[0].size(2);
  p.w = xs[0].size(3);
  p.cout = weight.size(0);
  p.groups = groups;
  STD_TORCH_CHECK(groups > 0 && p.cin % groups == 0 && p.cout % groups == 0, op,
                  ": groups=", groups, " must divide Cin=", p.cin, " and Cout=", p.cout);
  STD_TORCH_CHECK(
      weight.numel() == p.cout * (p.cin / groups) * 9 && (!bias || bias->numel() == p.cout), op,
      ": weight must be [", p.cout, ", ", p.cin / groups, ", 3, 3] and bias [", p.cout, "]");
  if (xs.size() > Conv3x3Params::kMaxSources) xs = {concatenate(xs, p.cin)};
  int64_t end = 0;
  for (Tensor& x : xs) {
    x = nhwc(x);
    p.x[p.sources] = map_of(x);
    p.end[p.sources++] = end += x.size(1);
  }
  p.interleaved = interleaved;
  p.weight_dtype = bias ? unite(op, xs[0], {&weight, &*bias}) : unite(op, xs[0], {&weight});
  p.weight = weight.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.relu = relu;
  if (residual) {
    check_beside(op, "residual", *residual, xs[0]);
    check_slice(op, "residual", *residual, 0, p.cout);
    *residual = nhwc(*residual);
    p.residual = map_of(*residual);
  }
  Tensor y = empty_nhwc(xs[0], p.cout);
  p.y = map_of(y);
  check_launch(op, launch_conv3x3_fwd(p, current_stream(xs[0])));
  return y;
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def("acrb_cuda(Tensor x, Tensor weight, Tensor bias, int start) -> Tensor");
  m.def(
      "acrb_out_cuda(Tensor x, Tensor weight, Tensor bias, int start, Tensor(a!) out, "
      "int out_start) -> ()");
  m.def(
      "acrb_backward_cuda(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, int start) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "conv3x3_cuda(Tensor[] xs, Tensor weight, Tensor? bias, Tensor? residual, int groups, "
      "bool relu, bool interleaved, bool tf32) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CUDA, m) {
  m.impl("acrb_cuda", TORCH_BOX(&efrdn_fast::acrb));
  m.impl("acrb_out_cuda", TORCH_BOX(&efrdn_fast::acrb_out));
  m.impl("acrb_backward_cuda", TORCH_BOX(&efrdn_fast::acrb_backward));
  m.impl("conv3x3_cuda", TORCH_BOX(&efrdn_fast::conv3x3));
}
