// The CUDA ops of the transformer block around attention. As in ops_cuda.cpp, arguments are
// validated in Python.
#include <tuple>

#include "ops_cuda.h"
#include "token.h"

namespace efrdn_fast {
namespace {

void check_values(const char* op, const char* name, const Tensor& x, int64_t expected) {
  STD_TORCH_CHECK(x.numel() == expected, op, ": ", name, " must have ", expected, " values, got ",
                  x.numel());
}

// `tokens` [N, H W, width] beside the map x, its values next to each other.
Tensor beside_map(const char* op, const char* name, const Tensor& tokens, const Tensor& x) {
  STD_TORCH_CHECK(tokens.is_cuda() && tokens.get_device_index() == x.get_device_index() &&
                      tokens.scalar_type() == x.scalar_type() && tokens.dim() == 3 &&
                      tokens.size(0) == x.size(0) && tokens.size(1) == x.size(2) * x.size(3),
                  op, ": ", name, " must be [N, H W, width] with the dtype and device of x");
  return tokens.size(2) == 1 || tokens.stride(2) == 1 ? tokens : torch::stable::contiguous(tokens);
}

TokenMap token_map(const char* op, const Tensor& x, bool tf32, Dtype weight_dtype) {
  TokenMap map{};
  map.dtype = dtype_of(op, x);
  map.tf32 = tf32;
  map.n = x.size(0);
  map.h = x.size(2);
  map.w = x.size(3);
  map.c = static_cast<int>(x.size(1));
  map.x = map_of(x);
  map.weight_dtype = weight_dtype;
  return map;
}

void check_room(const char* op, const TokenMap& map, int64_t width, int64_t bytes) {
  STD_TORCH_CHECK(bytes <= kTokenMaxSharedBytes, op, ": tokens of C=", map.c, " channels beside ",
                  width,
                  " values do not fit into shared memory; use backend 'triton' or 'reference'");
}

Tensor empty_tokens(const Tensor& x, int64_t width) {
  return torch::stable::empty({x.size(0), x.size(2) * x.size(3), width}, x.scalar_type(),
                              std::nullopt, x.device());
}

// As the kernels of the backward passes read them.
Tensor contiguous_beside_map(const char* op, const char* name, const Tensor& tokens,
                             const Tensor& x) {
  const Tensor rows = beside_map(op, name, tokens, x);
  return rows.is_contiguous() ? rows : torch::stable::contiguous(rows);
}

void check_width(const char* op, const char* name, const Tensor& tokens, int64_t width) {
  STD_TORCH_CHECK(tokens.size(2) == width, op, ": ", name, " must have ", width,
                  " values a token, got ", tokens.size(2));
}

// [N, H W, width] as a map.
Map as_map(const Tensor& tokens, int64_t w) {
  return {const_cast<void*>(tokens.const_data_ptr()), tokens.stride(0), tokens.stride(1) * w,
          tokens.stride(1)};
}

TokenQkvParams qkv_params(const char* op, const Tensor& x, Tensor& gamma, Tensor& beta,
                          Tensor& reduce, Tensor& qkv, double eps, bool tf32) {
  const int64_t values = 9 * x.size(1), inner = reduce.size(0), outer = qkv.size(0);
  check_values(op, "gamma", gamma, values);
  check_values(op, "beta", beta, values);
  check_values(op, "reduce", reduce, inner * values);
  check_values(op, "qkv", qkv, outer * inner);
  TokenQkvParams p{};
  p.map = token_map(op, x, tf32, unite(op, x, {&gamma, &beta, &reduce, &qkv}));
  p.eps = static_cast<float>(eps);
  p.inner = static_cast<int>(inner);
  p.outer = static_cast<int>(outer);
  p.gamma = gamma.const_data_ptr();
  p.beta = beta.const_data_ptr();
  p.reduce = reduce.const_data_ptr();
  p.qkv = qkv.const_data_ptr();
  return p;
}

Tensor token_qkv(Tensor x, Tensor gamma, Tensor beta, Tensor reduce, Tensor qkv, double eps,
                 bool tf32) {
  const char* op = "token_qkv_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  x = nhwc(x);
  TokenQkvParams p = qkv_params(op, x, gamma, beta, reduce, qkv, eps, tf32);
  check_room(op, p.map, p.inner, token_shared_bytes(p.map.dtype, p.map.c, p.inner));
  Tensor out = empty_tokens(x, p.outer);
  p.out = out.mutable_data_ptr();
  check_launch(op, launch_token_qkv_fwd(p, current_stream(x)));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> token_qkv_backward(Tensor grad, Tensor x,
                                                                      Tensor gamma, Tensor beta,
                                                                      Tensor reduce, Tensor qkv,
                                                                      double eps, bool tf32) {
  const char* op = "token_qkv_backward_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  x = nhwc(x);
  const ScalarType dtypes[] = {gamma.scalar_type(), beta.scalar_type(), reduce.scalar_type(),
                               qkv.scalar_type()};
  TokenQkvBackwardParams p{};
  p.forward = qkv_params(op, x, gamma, beta, reduce, qkv, eps, tf32);
  grad = contiguous_beside_map(op, "grad", as_dtype(grad, x.scalar_type()), x);
  check_width(op, "grad", grad, p.forward.outer);
  const int inner = p.forward.inner;
  check_room(op, p.forward.map, inner, token_qkv_bwd_shared_bytes(p.forward));
  Tensor grad_x = empty_nhwc(x, x.size(1)), grad_gamma = empty_beside(gamma),
         grad_beta = empty_beside(beta), grad_reduce = empty_beside(reduce),
         grad_qkv = empty_beside(qkv);
  Tensor inner_grad = empty_tokens(x, inner), reduced = empty_tokens(x, inner),
         scaled_grad = empty_tokens(x, inner);
  Tensor stats = empty_floats(x, token_stats_floats(p.forward.map)),
         partial = empty_floats(x, token_qkv_partial_floats(p.forward)),
         sums = empty_floats(x, token_sums_floats(p.forward.map, inner));
  p.grad = grad.const_data_ptr();
  p.grad_x = map_of(grad_x);
  p.grad_gamma = grad_gamma.mutable_data_ptr();
  p.grad_beta = grad_beta.mutable_data_ptr();
  p.grad_reduce = grad_reduce.mutable_data_ptr();
  p.grad_qkv = grad_qkv.mutable_data_ptr();
  p.inner_grad = inner_grad.mutable_data_ptr();
  p.reduced = reduced.mutable_data_ptr();
  p.scaled_grad = scaled_grad.mutable_data_ptr();
  p.stats = floats(stats);
  p.partial = floats(partial);
  p.sums = floats(sums);
  check_launch(op, launch_token_qkv_bwd(p, current_stream(x)));
  return {grad_x, as_dtype(grad_gamma, dtypes[0]), as_dtype(grad_beta, dtypes[1]),
          as_dtype(grad_reduce, dtypes[2]), as_dtype(grad_qkv, dtypes[3])};
}

struct HiddenTensors {
  Tensor proj_weight, proj_bias, gamma, beta, fc1_weight, fc1_bias;
};

TokenHiddenParams hidden_params(const char* op, const Tensor& x, const Tensor& a, HiddenTensors& t,
                                double eps, bool tf32) {
  const int64_t values = 9 * x.size(1), width = a.size(2), hidden = t.fc1_weight.size(0);
  check_values(op, "proj_weight", t.proj_weight, values * width);
  check_values(op, "proj_bias", t.proj_bias, values);
  check_values(op, "gamma", t.gamma, values);
  check_values(op, "beta", t.beta, values);
  check_values(op, "fc1_weight", t.fc1_weight, hidden * values);
  check_values(op, "fc1_bias", t.fc1_bias, hidden);
  TokenHiddenParams p{};
  p.map = token_map(
      op, x, tf32,
      unite(op, x, {&t.proj_weight, &t.proj_bias, &t.gamma, &t.beta, &t.fc1_weight, &t.fc1_bias}));
  p.eps = static_cast<float>(eps);
  p.width = static_cast<int>(width);
  p.hidden = static_cast<int>(hidden);
  p.a = a.const_data_ptr();
  p.a_stride_n = a.stride(0);
  p.a_stride_t = a.stride(1);
  p.proj_weight = t.proj_weight.const_data_ptr();
  p.proj_bias = t.proj_bias.const_data_ptr();
  p.gamma = t.gamma.const_data_ptr();
  p.beta = t.beta.const_data_ptr();
  p.fc1_weight = t.fc1_weight.const_data_ptr();
  p.fc1_bias = t.fc1_bias.const_data_ptr();
  return p;
}

Tensor token_hidden(Tensor x, Tensor a, Tensor proj_weight, Tensor proj_bias, Tensor gamma,
                    Tensor beta, Tensor fc1_weight, Tensor fc1_bias, double eps, bool tf32) {
  const char* op = "token_hidden_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  x = nhwc(x);
  a = beside_map(op, "a", a, x);
  HiddenTensors t{proj_weight, proj_bias, gamma, beta, fc1_weight, fc1_bias};
  TokenHiddenParams p = hidden_params(op, x, a, t, eps, tf32);
  check_room(op, p.map, p.width, token_shared_bytes(p.map.dtype, p.map.c, p.width));
  Tensor h = empty_tokens(x, p.hidden);
  p.h = h.mutable_data_ptr();
  check_launch(op, launch_token_hidden_fwd(p, current_stream(x)));
  return h;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_hidden_backward(
    Tensor grad, Tensor x, Tensor a, Tensor h, Tensor proj_weight, Tensor proj_bias, Tensor gamma,
    Tensor beta, Tensor fc1_weight, Tensor fc1_bias, double eps, bool tf32) {
  const char* op = "token_hidden_backward_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  x = nhwc(x);
  a = contiguous_beside_map(op, "a", a, x);
  h = contiguous_beside_map(op, "h", h, x);
  HiddenTensors t{proj_weight, proj_bias, gamma, beta, fc1_weight, fc1_bias};
  TokenHiddenBackwardParams p{};
  p.forward = hidden_params(op, x, a, t, eps, tf32);
  const int hidden = p.forward.hidden, width = p.forward.width;
  grad = contiguous_beside_map(op, "grad", as_dtype(grad, x.scalar_type()), x);
  check_width(op, "grad", grad, hidden);
  check_width(op, "h", h, hidden);
  check_room(op, p.forward.map, width, token_hidden_bwd_shared_bytes(p.forward));
  p.forward.h = const_cast<void*>(h.const_data_ptr());
  Tensor grad_x = empty_nhwc(x, x.size(1)), grad_a = empty_tokens(x, width);
  HiddenTensors back{empty_beside(t.proj_weight), empty_beside(t.proj_bias),
                     empty_beside(t.gamma),       empty_beside(t.beta),
                     empty_beside(t.fc1_weight),  empty_beside(t.fc1_bias)};
  Tensor masked_grad = empty_tokens(x, hidden), scaled_grad = empty_tokens(x, hidden),
         scaled_a = empty_tokens(x, width);
  Tensor stats = empty_floats(x, token_stats_floats(p.forward.map)),
         partial = empty_floats(x, token_hidden_partial_floats(p.forward)),
         sums = empty_floats(x, token_sums_floats(p.forward.map, hidden));
  p.grad = grad.const_data_ptr();
  p.grad_x = map_of(grad_x);
  p.grad_a = grad_a.mutable_data_ptr();
  p.grad_proj_weight = back.proj_weight.mutable_data_ptr();
  p.grad_proj_bias = back.proj_bias.mutable_data_ptr();
  p.grad_gamma = back.gamma.mutable_data_ptr();
  p.grad_beta = back.beta.mutable_data_ptr();
  p.grad_fc1_weight = back.fc1_weight.mutable_data_ptr();
  p.grad_fc1_bias = back.fc1_bias.mutable_data_ptr();
  p.masked_grad = masked_grad.mutable_data_ptr();
  p.scaled_grad = scaled_grad.mutable_data_ptr();
  p.scaled_a = scaled_a.mutable_data_ptr();
  p.stats = floats(stats);
  p.partial = floats(partial);
  p.sums = floats(sums);
  check_launch(op, launch_token_hidden_bwd(p, current_stream(x)));
  return {grad_x,
          grad_a,
          as_dtype(back.proj_weight, proj_weight.scalar_type()),
          as_dtype(back.proj_bias, proj_bias.scalar_type()),
          as_dtype(back.gamma, gamma.scalar_type()),
          as_dtype(back.beta, beta.scalar_type()),
          as_dtype(back.fc1_weight, fc1_weight.scalar_type()),
          as_dtype(back.fc1_bias, fc1_bias.scalar_type())};
}

void check_fold(const char* op, const Tensor& x, const Tensor& a, const Tensor& h,
                const Tensor& proj_weight, const Tensor& proj_bias, const Tensor& fc2_weight,
                const Tensor& fc2_bias) {
  const int64_t values = 9 * x.size(1);
  check_values(op, "proj_weight", proj_weight, values * a.size(2));
  check_values(op, "proj_bias", proj_bias, values);
  check_values(op, "fc2_weight", fc2_weight, values * h.size(2));
  check_values(op, "fc2_bias", fc2_bias, values);
}

Tensor token_fold(Tensor x, Tensor a, Tensor h, Tensor proj_weight, Tensor proj_bias,
                  Tensor fc2_weight, Tensor fc2_bias, bool mean, bool tf32) {
  const char* op = "token_fold_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  x = nhwc(x);
  a = beside_map(op, "a", a, x);
  h = beside_map(op, "h", h, x);
  check_fold(op, x, a, h, proj_weight, proj_bias, fc2_weight, fc2_bias);
  TokenFoldParams p{};
  p.map = token_map(op, x, tf32, unite(op, x, {&proj_weight, &proj_bias, &fc2_weight, &fc2_bias}));
  p.mean = mean;
  p.width = static_cast<int>(a.size(2));
  p.hidden = static_cast<int>(h.size(2));
  p.a = as_map(a, x.size(3));
  p.h = as_map(h, x.size(3));
  p.proj_weight = proj_weight.const_data_ptr();
  p.proj_bias = proj_bias.const_data_ptr();
  p.fc2_weight = fc2_weight.const_data_ptr();
  p.fc2_bias = fc2_bias.const_data_ptr();
  Tensor y = empty_nhwc(x, x.size(1));
  p.y = map_of(y);
  check_launch(op, launch_token_fold_fwd(p, current_stream(x)));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_fold_backward(
    Tensor grad, Tensor a, Tensor h, Tensor proj_weight, Tensor proj_bias, Tensor fc2_weight,
    Tensor fc2_bias, bool mean, bool tf32) {
  const char* op = "token_fold_backward_cuda";
  const DeviceGuard guard(grad.get_device_index());
  check_map(op, "grad", grad);
  grad = nhwc(grad);
  a = contiguous_beside_map(op, "a", a, grad);
  h = contiguous_beside_map(op, "h", h, grad);
  check_fold(op, grad, a, h, proj_weight, proj_bias, fc2_weight, fc2_bias);
  const ScalarType dtypes[] = {proj_weight.scalar_type(), proj_bias.scalar_type(),
                               fc2_weight.scalar_type(), fc2_bias.scalar_type()};
  TokenFoldBackwardParams p{};
  p.map = token_map(op, grad, tf32,
                    unite(op, grad, {&proj_weight, &proj_bias, &fc2_weight, &fc2_bias}));
  p.mean = mean;
  p.width = static_cast<int>(a.size(2));
  p.hidden = static_cast<int>(h.size(2));
  check_room(op, p.map, p.width > p.hidden ? p.width : p.hidden, token_fold_bwd_shared_bytes(p));
  Tensor grad_x = empty_nhwc(grad, grad.size(1)), grad_a = empty_tokens(grad, p.width),
         grad_h = empty_tokens(grad, p.hidden), grad_proj_weight = empty_beside(proj_weight),
         grad_proj_bias = empty_beside(proj_bias), grad_fc2_weight = empty_beside(fc2_weight),
         grad_fc2_bias = empty_beside(fc2_bias);
  Tensor shared = mean ? empty_nhwc(grad, grad.size(1)) : grad,
         partial = empty_floats(grad, token_fold_partial_floats(p));
  p.a = a.const_data_ptr();
  p.h = h.const_data_ptr();
  p.proj_weight = proj_weight.const_data_ptr();
  p.fc2_weight = fc2_weight.const_data_ptr();
  p.grad_x = map_of(grad_x);
  p.grad_a = grad_a.mutable_data_ptr();
  p.grad_h = grad_h.mutable_data_ptr();
  p.grad_proj_weight = grad_proj_weight.mutable_data_ptr();
  p.grad_proj_bias = grad_proj_bias.mutable_data_ptr();
  p.grad_fc2_weight = grad_fc2_weight.mutable_data_ptr();
  p.grad_fc2_bias = grad_fc2_bias.mutable_data_ptr();
  p.shared = map_of(shared);
  p.partial = floats(partial);
  check_launch(op, launch_token_fold_bwd(p, current_stream(grad)));
  return {grad_x,
          grad_a,
          grad_h,
          as_dtype(grad_proj_weight, dtypes[0]),
          as_dtype(grad_proj_bias, dtypes[1]),
          as_dtype(grad_fc2_weight, dtypes[2]),
          as_dtype(grad_fc2_bias, dtypes[3])};
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def(
      "token_qkv_cuda(Tensor x, Tensor gamma, Tensor beta, Tensor reduce, Tensor qkv, float eps, "
      "bool tf32) -> Tensor");
  m.def(
      "token_hidden_cuda(Tensor x, Tensor a, Tensor proj_weight, Tensor proj_bias, Tensor gamma, "
      "Tensor beta, Tensor fc1_weight, Tensor fc1_bias, float eps, bool tf32) -> Tensor");
  m.def(
      "token_fold_cuda(Tensor x, Tensor a, Tensor h, Tensor proj_weight, Tensor proj_bias, "
      "Tensor fc2_weight, Tensor fc2_bias, bool mean, bool tf32) -> Tensor");
  m.def(
      "token_qkv_backward_cuda(Tensor grad, Tensor x, Tensor gamma, Tensor beta, Tensor reduce, "
      "Tensor qkv, float eps, bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "token_hidden_backward_cuda(Tensor grad, Tensor x, Tensor a, Tensor h, Tensor proj_weight, "
      "Tensor proj_bias, Tensor gamma, Tensor beta, Tensor fc1_weight, Tensor fc1_bias, float eps, "
      "bool tf32) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "token_fold_backward_cuda(Tensor grad, Tensor a, Tensor h, Tensor proj_weight, "
      "Tensor proj_bias, Tensor fc2_weight, Tensor fc2_bias, bool mean, bool tf32) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CUDA, m) {
  m.impl("token_qkv_cuda", TORCH_BOX(&efrdn_fast::token_qkv));
  m.impl("token_hidden_cuda", TORCH_BOX(&efrdn_fast::token_hidden));
  m.impl("token_fold_cuda", TORCH_BOX(&efrdn_fast::token_fold));
  m.impl("token_qkv_backward_cuda", TORCH_BOX(&efrdn_fast::token_qkv_backward));
  m.impl("token_hidden_backward_cuda", TORCH_BOX(&efrdn_fast::token_hidden_backward));
  m.impl("token_fold_backward_cuda", TORCH_BOX(&efrdn_fast::token_fold_backward));
}
