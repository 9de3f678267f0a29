// The CPU ops of ACRB.
#include "acrb_cpu.h"
#include "ops_cpu.h"

namespace efrdn_fast {
namespace {

void check_slice(const char* op, const char* name, const Tensor& x, int64_t start, int64_t d) {
  STD_TORCH_CHECK(x.dim() == 4 && start >= 0 && start + d <= x.size(1), op, ": ", name, "=", start,
                  " and ", d, " channels do not fit into a map of ", x.size(1), " channels");
}

// [co, ci, 3, 3] -> [ci, 3, 3, co]; turned: [ci, co, 3, 3] rotated by half a turn, for the gradient.
std::vector<float> pack(const float* weight, int64_t d, bool turned = false) {
  std::vector<float> out(static_cast<size_t>(9 * d * d));
  for (int64_t co = 0; co < d; ++co)
    for (int64_t ci = 0; ci < d; ++ci)
      for (int64_t tap = 0; tap < 9; ++tap) {
        const float value = weight[(co * d + ci) * 9 + tap];
        if (turned)
          out[(co * 9 + 8 - tap) * d + ci] = value;
        else
          out[(ci * 9 + tap) * d + co] = value;
      }
  return out;
}

void check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
           int64_t start) {
  const int64_t d = weight.size(0);
  STD_TORCH_CHECK(weight.numel() == 9 * d * d && bias.numel() == d, op, ": weight must be [", d,
                  ", ", d, ", 3, 3] and bias [", d, "], got ", weight.numel(), " and ",
                  bias.numel(), " values");
  check_slice(op, "start", x, start, d);
}

// Runs the forward kernel into the map at `y`, whose N, H and W are those of x.
void forward(const char* op, Tensor x, const Tensor& weight, const Tensor& bias, int64_t start,
             const Map& y) {
  check(op, x, weight, bias, start);
  x = nhwc(x);
  const int64_t d = weight.size(0);
  const Tensor w = to_float(weight), b = to_float(bias);
  const std::vector<float> packed = pack(floats(w), d);
  const AcrbArgs a{dtype_of(op, x), x.size(0), d, x.size(2),     x.size(3),
                   map_of(x, start), y,        packed.data(), floats(b)};
  const auto kernel = EFRDN_FAST_DISPATCH(acrb_forward);
  const size_t scratch = acrb_forward_scratch(a);
  parallel_rows(a.n * a.h, a.w, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, workspace(scratch));
  });
}

Tensor acrb(Tensor x, Tensor weight, Tensor bias, int64_t start) {
  Tensor y = empty_nhwc(x.size(0), weight.size(0), x.size(2), x.size(3), x.scalar_type());
  forward("acrb_cpu", x, weight, bias, start, map_of(y));
  return y;
}

void acrb_out(Tensor x, Tensor weight, Tensor bias, int64_t start, Tensor out, int64_t out_start) {
  check_slice("acrb_out_cpu", "out_start", out, out_start, weight.size(0));
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type() && out.size(0) == x.size(0) &&
                      out.size(2) == x.size(2) && out.size(3) == x.size(3),
                  "acrb_out_cpu: out must have the dtype, N, H and W of x");
  if (out.size(1) == 1 || out.stride(1) == 1) {
    forward("acrb_out_cpu", x, weight, bias, start, map_of(out, out_start));
    return;
  }
  Tensor place = torch::stable::narrow(out, 1, out_start, weight.size(0));
  torch::stable::copy_(place, acrb(x, weight, bias, start));
}

std::tuple<Tensor, Tensor, Tensor> acrb_backward(Tensor grad_y, Tensor x, Tensor weight,
                                                 Tensor bias, int64_t start) {
  const char* op = "acrb_backward_cpu";
  check(op, x, weight, bias, start);
  const int64_t d = weight.size(0);
  check_gradient(op, grad_y, x, d);
  x = nhwc(x);
  grad_y = nhwc(grad_y);
  const Tensor w = to_float(weight), b = to_float(bias);
  const std::vector<float> packed = pack(floats(w), d), turned = pack(floats(w), d, true);
  const AcrbArgs f{dtype_of(op, x), x.size(0), d, x.size(2),     x.size(3),
                   map_of(x, start), {},       packed.data(), floats(b)};
  Tensor grad_x = empty_nhwc(f.n, x.size(1), f.h, f.w, x.scalar_type());
  const int64_t rows = strip_rows(f.n * f.h), strips = (f.n * f.h + rows - 1) / rows;
  const int64_t taps = 9 * d * d, size = taps + d;
  std::vector<float> partial(static_cast<size_t>(strips * size));
  const AcrbBackwardArgs a{f,     turned.data(), map_of(grad_y), map_of(grad_x), x.size(1),
                           start, rows,          partial.data()};
  const auto kernel = EFRDN_FAST_DISPATCH(acrb_backward);
  const size_t scratch = acrb_backward_scratch(f);
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, workspace(scratch));
  });
  const std::vector<double> totals = strip_totals(partial.data(), strips, size);
  std::vector<double> ordered(static_cast<size_t>(taps));  // [ci, 3, 3, co] -> [co, ci, 3, 3]
  for (int64_t ci = 0; ci < d; ++ci)
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t co = 0; co < d; ++co)
        ordered[(co * d + ci) * 9 + tap] = totals[(ci * 9 + tap) * d + co];
  const double *from = ordered.data(), *biases = totals.data() + taps;
  Tensor grad_weight = tensor_like(weight, from), grad_bias = tensor_like(bias, biases);
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def("acrb_cpu(Tensor x, Tensor weight, Tensor bias, int start) -> Tensor");
  m.def(
      "acrb_out_cpu(Tensor x, Tensor weight, Tensor bias, int start, Tensor(a!) out, "
      "int out_start) -> ()");
  m.def(
      "acrb_backward_cpu(Tensor grad_y, Tensor x, Tensor weight, Tensor bias, int start) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CPU, m) {
  m.impl("acrb_cpu", TORCH_BOX(&efrdn_fast::acrb));
  m.impl("acrb_out_cpu", TORCH_BOX(&efrdn_fast::acrb_out));
  m.impl("acrb_backward_cpu", TORCH_BOX(&efrdn_fast::acrb_backward));
}
