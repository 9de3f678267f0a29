// The CUDA ops of attention. As in ops_cuda.cpp, arguments are validated in Python.
#include <tuple>

#include "emha.h"
#include "ops_cuda.h"

namespace efrdn_fast {
namespace {

bool has_whole_tokens(const Tensor& x) { return x.size(2) == 1 || x.stride(2) == 1; }

Tensor whole_tokens(const Tensor& x) {
  return has_whole_tokens(x) ? x : torch::stable::contiguous(x);
}

Tensor empty_like_tokens(const Tensor& x, int64_t width) {
  return torch::stable::empty({x.size(0), x.size(1), width}, x.scalar_type(), std::nullopt,
                              x.device());
}

Tensor empty_statistics(const Tensor& qkv, int64_t heads) {
  return torch::stable::empty({qkv.size(0), heads, qkv.size(1)}, ScalarType::Float, std::nullopt,
                              qkv.device());
}

// `x` goes with `qkv`: device, N and T; `width` values of `dtype` a token.
void check_tokens(const char* op, const char* name, const Tensor& x, const Tensor& qkv,
                  int64_t width, ScalarType dtype) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == qkv.get_device_index() &&
                      x.scalar_type() == dtype && x.dim() == 3 && x.size(0) == qkv.size(0) &&
                      x.size(1) == qkv.size(1) && x.size(2) == width,
                  op, ": ", name, " must have the dtype, device, N and T of qkv and width ", width);
}

EmhaParams emha_params(const char* op, const Tensor& qkv, int64_t heads, int64_t length,
                       bool tf32) {
  STD_TORCH_CHECK(qkv.dim() == 3 && qkv.is_cuda(), op,
                  ": qkv must be a CUDA tensor of 3 dimensions, got ", qkv.dim(), " dimensions");
  const int64_t width = qkv.size(2);
  STD_TORCH_CHECK(heads > 0 && width > 0 && width % (3 * heads) == 0, op, ": width ", width,
                  " of qkv must be 3 * heads * D, heads=", heads);
  const int64_t d = width / (3 * heads);
  STD_TORCH_CHECK(d <= kEmhaMaxD, op, ": at most ", kEmhaMaxD, " values a head, got ", d,
                  "; use backend 'reference'");
  STD_TORCH_CHECK(length > 0 && qkv.size(1) > 0, op, ": length=", length, " and the ", qkv.size(1),
                  " tokens of qkv must be at least 1");
  EmhaParams p{};
  p.dtype = dtype_of(op, qkv);
  p.tf32 = tf32;
  p.n = qkv.size(0);
  p.tokens = qkv.size(1);
  p.length = length;
  p.heads = static_cast<int>(heads);
  p.d = static_cast<int>(d);
  p.qkv = qkv.const_data_ptr();
  p.stride_n = qkv.stride(0);
  p.stride_t = qkv.stride(1);
  return p;
}

std::tuple<Tensor, Tensor> emha(Tensor qkv, int64_t heads, int64_t length, bool tf32) {
  const char* op = "emha_cuda";
  const DeviceGuard guard(qkv.get_device_index());
  qkv = whole_tokens(qkv);
  EmhaParams p = emha_params(op, qkv, heads, length, tf32);
  Tensor out = empty_like_tokens(qkv, heads * p.d), lse = empty_statistics(qkv, heads);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  check_launch(op, launch_emha_fwd(p, current_stream(qkv)));
  return {out, lse};
}

Tensor emha_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int64_t heads,
                     int64_t length, bool tf32) {
  const char* op = "emha_backward_cuda";
  const DeviceGuard guard(qkv.get_device_index());
  qkv = whole_tokens(qkv);
  EmhaBackwardParams p{};
  p.forward = emha_params(op, qkv, heads, length, tf32);
  const int64_t width = heads * p.forward.d;
  check_tokens(op, "grad_out", grad_out, qkv, width, qkv.scalar_type());
  check_tokens(op, "out", out, qkv, width, qkv.scalar_type());
  STD_TORCH_CHECK(lse.is_cuda() && lse.get_device_index() == qkv.get_device_index() &&
                      lse.scalar_type() == ScalarType::Float &&
                      lse.numel() == p.forward.n * heads * p.forward.tokens,
                  op, ": lse must be float32 [N, heads, T] on the device of qkv");
  grad_out = whole_tokens(grad_out);
  out = torch::stable::contiguous(out);
  lse = torch::stable::contiguous(lse);
  Tensor grad_qkv = empty_like_tokens(qkv, 3 * width), delta = empty_statistics(qkv, heads);
  p.forward.out = const_cast<void*>(out.const_data_ptr());
  p.forward.lse = const_cast<float*>(static_cast<const float*>(lse.const_data_ptr()));
  p.grad_out = grad_out.const_data_ptr();
  p.grad_stride_n = grad_out.stride(0);
  p.grad_stride_t = grad_out.stride(1);
  p.grad_qkv = grad_qkv.mutable_data_ptr();
  p.delta = static_cast<float*>(delta.mutable_data_ptr());
  check_launch(op, launch_emha_bwd(p, current_stream(qkv)));
  return grad_qkv;
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def("emha_cuda(Tensor qkv, int heads, int length, bool tf32) -> (Tensor, Tensor)");
  m.def(
      "emha_backward_cuda(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int heads, "
      "int length, bool tf32) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CUDA, m) {
  m.impl("emha_cuda", TORCH_BOX(&efrdn_fast::emha));
  m.impl("emha_backward_cuda", TORCH_BOX(&efrdn_fast::emha_backward));
}
