// The CUDA ops of the transformer block around attention. As in ops_cuda.cpp, arguments are
// validated in Python.
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

void check_room(const char* op, const TokenMap& map, int64_t width) {
  STD_TORCH_CHECK(token_shared_bytes(map.dtype, map.c, width) <= kTokenMaxSharedBytes, op,
                  ": tokens of C=", map.c, " channels beside ", width,
                  " values do not fit into shared memory; use backend 'triton' or 'reference'");
}

Tensor empty_tokens(const Tensor& x, int64_t width) {
  return torch::stable::empty({x.size(0), x.size(2) * x.size(3), width}, x.scalar_type(),
                              std::nullopt, x.device());
}

// [N, H W, width] as a map.
Map as_map(const Tensor& tokens, int64_t w) {
  return {const_cast<void*>(tokens.const_data_ptr()), tokens.stride(0), tokens.stride(1) * w,
          tokens.stride(1)};
}

Tensor token_qkv(Tensor x, Tensor gamma, Tensor beta, Tensor reduce, Tensor qkv, double eps,
                 bool tf32) {
  const char* op = "token_qkv_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  x = nhwc(x);
  const int64_t values = 9 * x.size(1), inner = reduce.size(0), outer = qkv.size(0);
  check_values(op, "gamma", gamma, values);
  check_values(op, "beta", beta, values);
  check_values(op, "reduce", reduce, inner * values);
  check_values(op, "qkv", qkv, outer * inner);
  TokenQkvParams p{};
  p.map = token_map(op, x, tf32, unite(op, x, {&gamma, &beta, &reduce, &qkv}));
  check_room(op, p.map, inner);
  p.eps = static_cast<float>(eps);
  p.inner = static_cast<int>(inner);
  p.outer = static_cast<int>(outer);
  p.gamma = gamma.const_data_ptr();
  p.beta = beta.const_data_ptr();
  p.reduce = reduce.const_data_ptr();
  p.qkv = qkv.const_data_ptr();
  Tensor out = empty_tokens(x, outer);
  p.out = out.mutable_data_ptr();
  check_launch(op, launch_token_qkv_fwd(p, current_stream(x)));
  return out;
}

Tensor token_hidden(Tensor x, Tensor a, Tensor proj_weight, Tensor proj_bias, Tensor gamma,
                    Tensor beta, Tensor fc1_weight, Tensor fc1_bias, double eps, bool tf32) {
  const char* op = "token_hidden_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  x = nhwc(x);
  a = beside_map(op, "a", a, x);
  const int64_t values = 9 * x.size(1), width = a.size(2), hidden = fc1_weight.size(0);
  check_values(op, "proj_weight", proj_weight, values * width);
  check_values(op, "proj_bias", proj_bias, values);
  check_values(op, "gamma", gamma, values);
  check_values(op, "beta", beta, values);
  check_values(op, "fc1_weight", fc1_weight, hidden * values);
  check_values(op, "fc1_bias", fc1_bias, hidden);
  TokenHiddenParams p{};
  p.map = token_map(
      op, x, tf32,
      unite(op, x, {&proj_weight, &proj_bias, &gamma, &beta, &fc1_weight, &fc1_bias}));
  check_room(op, p.map, width);
  p.eps = static_cast<float>(eps);
  p.width = static_cast<int>(width);
  p.hidden = static_cast<int>(hidden);
  p.a = a.const_data_ptr();
  p.a_stride_n = a.stride(0);
  p.a_stride_t = a.stride(1);
  p.proj_weight = proj_weight.const_data_ptr();
  p.proj_bias = proj_bias.const_data_ptr();
  p.gamma = gamma.const_data_ptr();
  p.beta = beta.const_data_ptr();
  p.fc1_weight = fc1_weight.const_data_ptr();
  p.fc1_bias = fc1_bias.const_data_ptr();
  Tensor h = empty_tokens(x, hidden);
  p.h = h.mutable_data_ptr();
  check_launch(op, launch_token_hidden_fwd(p, current_stream(x)));
  return h;
}

Tensor token_fold(Tensor x, Tensor a, Tensor h, Tensor proj_weight, Tensor proj_bias,
                  Tensor fc2_weight, Tensor fc2_bias, bool mean, bool tf32) {
  const char* op = "token_fold_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  x = nhwc(x);
  a = beside_map(op, "a", a, x);
  h = beside_map(op, "h", h, x);
  const int64_t values = 9 * x.size(1), width = a.size(2), hidden = h.size(2);
  check_values(op, "proj_weight", proj_weight, values * width);
  check_values(op, "proj_bias", proj_bias, values);
  check_values(op, "fc2_weight", fc2_weight, values * hidden);
  check_values(op, "fc2_bias", fc2_bias, values);
  TokenFoldParams p{};
  p.map = token_map(op, x, tf32,
                    unite(op, x, {&proj_weight, &proj_bias, &fc2_weight, &fc2_bias}));
  p.mean = mean;
  p.width = static_cast<int>(width);
  p.hidden = static_cast<int>(hidden);
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
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CUDA, m) {
  m.impl("token_qkv_cuda", TORCH_BOX(&efrdn_fast::token_qkv));
  m.impl("token_hidden_cuda", TORCH_BOX(&efrdn_fast::token_hidden));
  m.impl("token_fold_cuda", TORCH_BOX(&efrdn_fast::token_fold));
}
