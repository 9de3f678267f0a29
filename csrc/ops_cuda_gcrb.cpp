// The CUDA ops of GCRB. As in ops_cuda.cpp, arguments are validated in Python.
#include "ops_cuda.h"

#include <tuple>
#include <vector>

#include "gcrb.h"
#include "gcrb_train.h"

namespace efrdn_fast {
namespace {

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

// params: w1, b1, w2, b2, w3, b3 of each.
std::tuple<Tensor, Tensor, Tensor> gcrb_chain(Tensor x, std::vector<Tensor> params,
                                              int64_t groups) {
  const char* op = "gcrb_chain_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  STD_TORCH_CHECK(params.size() == 18, op, ": params must be 18 tensors, got ", params.size());
  x = nhwc(x);
  GcrbTensors t[3];
  GcrbChainParams p{};
  Tensor y[3] = {empty_nhwc(x, x.size(1)), empty_nhwc(x, x.size(1)), empty_nhwc(x, x.size(1))};
  for (int i = 0; i < 3; i++) {
    const Tensor* w = &params[6 * i];
    t[i] = {w[0], w[1], w[2], w[3], w[4], w[5]};
    const GcrbParams one = gcrb_params(op, x, t[i], groups);
    STD_TORCH_CHECK(i == 0 || one.m == p.m, op, ": params[", 6 * i, "] must have M=", p.m,
                    ", got ", one.m);
    p.dtype = one.dtype;
    p.n = one.n;
    p.c = one.c;
    p.h = one.h;
    p.w = one.w;
    p.m = one.m;
    p.groups = one.groups;
    p.x = one.x;
    p.weights[i] = one.weights;
    p.y[i] = map_of(y[i]);
  }
  check_launch(op, launch_gcrb_chain_fwd(p, current_stream(x)));
  return {y[0], y[1], y[2]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gcrb_backward(
    Tensor grad_y, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3,
    int64_t groups) {
  const char* op = "gcrb_backward_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_beside(op, "grad_y", grad_y, x);
  check_slice(op, "grad_y", grad_y, 0, x.size(1));
  x = nhwc(x);
  grad_y = nhwc(grad_y);
  GcrbTensors t{w1, b1, w2, b2, w3, b3};
  GcrbBackwardParams p{};
  p.forward = gcrb_params(op, x, t, groups);
  Tensor grad_x = empty_nhwc(x, x.size(1)),
         partial = empty_floats(x, gcrb_partial_floats(p.forward));
  GcrbTensors grad{empty_beside(t.w1), empty_beside(t.b1), empty_beside(t.w2),
                   empty_beside(t.b2), empty_beside(t.w3), empty_beside(t.b3)};
  p.grad_y = map_of(grad_y);
  p.grad_x = map_of(grad_x);
  p.grad_w1 = grad.w1.mutable_data_ptr();
  p.grad_b1 = grad.b1.mutable_data_ptr();
  p.grad_w2 = grad.w2.mutable_data_ptr();
  p.grad_b2 = grad.b2.mutable_data_ptr();
  p.grad_w3 = grad.w3.mutable_data_ptr();
  p.grad_b3 = grad.b3.mutable_data_ptr();
  p.partial = floats(partial);
  check_launch(op, launch_gcrb_bwd(p, current_stream(x)));
  return {grad_x,
          as_dtype(grad.w1, w1.scalar_type()),
          as_dtype(grad.b1, b1.scalar_type()),
          as_dtype(grad.w2, w2.scalar_type()),
          as_dtype(grad.b2, b2.scalar_type()),
          as_dtype(grad.w3, w3.scalar_type()),
          as_dtype(grad.b3, b3.scalar_type())};
}

// The betas stand in the place of the biases.
GcrbTrainParams gcrb_train_params(const char* op, const Tensor& x, GcrbTensors& t,
                                  Tensor (&gamma)[3], int64_t groups, double eps) {
  // Before gcrb_params, which makes all weights one dtype: the gammas join them.
  const Dtype united =
      unite(op, x, {&t.w1, &gamma[0], &t.b1, &t.w2, &gamma[1], &t.b2, &t.w3, &gamma[2], &t.b3});
  const GcrbParams f = gcrb_params(op, x, t, groups);
  STD_TORCH_CHECK(f.weights.dtype == united && gamma[0].numel() == f.m && gamma[1].numel() == f.m &&
                      gamma[2].numel() == f.c,
                  op, ": gamma1, gamma2 and gamma3 must have M, M and C values");
  GcrbTrainParams p{};
  p.dtype = f.dtype;
  p.n = f.n;
  p.c = f.c;
  p.h = f.h;
  p.w = f.w;
  p.m = f.m;
  p.groups = f.groups;
  p.eps = static_cast<float>(eps);
  p.x = f.x;
  p.weights = f.weights;
  for (int i = 0; i < 3; i++) p.gamma[i] = gamma[i].const_data_ptr();
  return p;
}

std::tuple<Tensor, Tensor, Tensor> gcrb_train(Tensor x, Tensor w1, Tensor gamma1, Tensor beta1,
                                              Tensor w2, Tensor gamma2, Tensor beta2, Tensor w3,
                                              Tensor gamma3, Tensor beta3, int64_t groups,
                                              double eps) {
  const char* op = "gcrb_train_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_map(op, "x", x);
  x = nhwc(x);
  GcrbTensors t{w1, beta1, w2, beta2, w3, beta3};
  Tensor gamma[3] = {gamma1, gamma2, gamma3};
  GcrbTrainParams p = gcrb_train_params(op, x, t, gamma, groups, eps);
  Tensor y = empty_nhwc(x, p.c), mean = empty_floats(x, 2 * p.m + p.c),
         var = empty_floats(x, 2 * p.m + p.c), depthwise = empty_floats(x, p.n * p.h * p.w * p.m),
         partial = empty_floats(x, gcrb_train_partial_floats(p));
  p.y = map_of(y);
  p.mean = floats(mean);
  p.var = floats(var);
  p.depthwise = floats(depthwise);
  p.partial = floats(partial);
  check_launch(op, launch_gcrb_train(p, current_stream(x)));
  return {y, mean, var};
}

using TenTensors =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

TenTensors gcrb_train_backward(Tensor grad_y, Tensor x, Tensor w1, Tensor gamma1, Tensor beta1,
                               Tensor w2, Tensor gamma2, Tensor beta2, Tensor w3, Tensor gamma3,
                               Tensor beta3, Tensor mean, Tensor var, int64_t groups, double eps) {
  const char* op = "gcrb_train_backward_cuda";
  const DeviceGuard guard(x.get_device_index());
  check_beside(op, "grad_y", grad_y, x);
  check_slice(op, "grad_y", grad_y, 0, x.size(1));
  x = nhwc(x);
  grad_y = nhwc(grad_y);
  GcrbTensors t{w1, beta1, w2, beta2, w3, beta3};
  Tensor gamma[3] = {gamma1, gamma2, gamma3};
  GcrbTrainBackwardParams p{};
  p.forward = gcrb_train_params(op, x, t, gamma, groups, eps);
  const int64_t stats = 2 * p.forward.m + p.forward.c;
  for (Tensor* s : {&mean, &var}) {
    STD_TORCH_CHECK(
        s->numel() == stats && s->is_cuda() && s->get_device_index() == x.get_device_index(), op,
        ": mean and var must have ", stats, " values on the device of x");
    *s = torch::stable::contiguous(as_dtype(*s, ScalarType::Float));
  }
  p.forward.mean = floats(mean);
  p.forward.var = floats(var);
  const int64_t pixels = p.forward.n * p.forward.h * p.forward.w * p.forward.m;
  Tensor grad_x = empty_nhwc(x, p.forward.c), depthwise = empty_floats(x, pixels),
         grad1 = empty_floats(x, pixels), grad2 = empty_floats(x, pixels),
         partial = empty_floats(x, gcrb_train_bwd_partial_floats(p.forward));
  p.forward.depthwise = floats(depthwise);
  p.grad1 = floats(grad1);
  p.grad2 = floats(grad2);
  p.partial = floats(partial);
  p.grad_y = map_of(grad_y);
  p.grad_x = map_of(grad_x);
  GcrbTensors grad{empty_beside(t.w1), empty_beside(t.b1), empty_beside(t.w2),
                   empty_beside(t.b2), empty_beside(t.w3), empty_beside(t.b3)};
  Tensor grad_gamma[3] = {empty_beside(gamma[0]), empty_beside(gamma[1]), empty_beside(gamma[2])};
  p.grad_w1 = grad.w1.mutable_data_ptr();
  p.grad_w2 = grad.w2.mutable_data_ptr();
  p.grad_w3 = grad.w3.mutable_data_ptr();
  p.grad_beta[0] = grad.b1.mutable_data_ptr();
  p.grad_beta[1] = grad.b2.mutable_data_ptr();
  p.grad_beta[2] = grad.b3.mutable_data_ptr();
  for (int i = 0; i < 3; i++) p.grad_gamma[i] = grad_gamma[i].mutable_data_ptr();
  check_launch(op, launch_gcrb_train_bwd(p, current_stream(x)));
  return {grad_x,
          as_dtype(grad.w1, w1.scalar_type()),
          as_dtype(grad_gamma[0], gamma1.scalar_type()),
          as_dtype(grad.b1, beta1.scalar_type()),
          as_dtype(grad.w2, w2.scalar_type()),
          as_dtype(grad_gamma[1], gamma2.scalar_type()),
          as_dtype(grad.b2, beta2.scalar_type()),
          as_dtype(grad.w3, w3.scalar_type()),
          as_dtype(grad_gamma[2], gamma3.scalar_type()),
          as_dtype(grad.b3, beta3.scalar_type())};
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def(
      "gcrb_cuda(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, "
      "int groups) -> Tensor");
  m.def(
      "gcrb_chain_cuda(Tensor x, Tensor[] params, int groups) -> (Tensor, Tensor, Tensor)");
  m.def(
      "gcrb_backward_cuda(Tensor grad_y, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, "
      "Tensor w3, Tensor b3, int groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "gcrb_train_cuda(Tensor x, Tensor w1, Tensor gamma1, Tensor beta1, Tensor w2, Tensor gamma2, "
      "Tensor beta2, Tensor w3, Tensor gamma3, Tensor beta3, int groups, float eps) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "gcrb_train_backward_cuda(Tensor grad_y, Tensor x, Tensor w1, Tensor gamma1, Tensor beta1, "
      "Tensor w2, Tensor gamma2, Tensor beta2, Tensor w3, Tensor gamma3, Tensor beta3, "
      "Tensor mean, Tensor var, int groups, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CUDA, m) {
  m.impl("gcrb_cuda", TORCH_BOX(&efrdn_fast::gcrb));
  m.impl("gcrb_chain_cuda", TORCH_BOX(&efrdn_fast::gcrb_chain));
  m.impl("gcrb_backward_cuda", TORCH_BOX(&efrdn_fast::gcrb_backward));
  m.impl("gcrb_train_cuda", TORCH_BOX(&efrdn_fast::gcrb_train));
  m.impl("gcrb_train_backward_cuda", TORCH_BOX(&efrdn_fast::gcrb_train_backward));
}
