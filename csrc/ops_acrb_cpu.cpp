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

// Runs the forward kernel into the map at `y`, whose N, H and W are those of x.
void forward(const char* op, Tensor x, const Tensor& weight, const Tensor& bias, int64_t start,
             const Map& y) {
  const int64_t d = weight.size(0);
  STD_TORCH_CHECK(weight.numel() == 9 * d * d && bias.numel() == d, op, ": weight must be [", d,
                  ", ", d, ", 3, 3] and bias [", d, "], got ", weight.numel(), " and ",
                  bias.numel(), " values");
  check_slice(op, "start", x, start, d);
  x = nhwc(x);
  const Tensor w = to_float(weight), b = to_float(bias);
  const std::vector<float> packed = pack(floats(w), d);
  const AcrbArgs a{dtype_of(op, x),  x.size(0), d, x.size(2), x.size(3), map_of(x, start), y,
                   packed.data(), floats(b)};
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

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def("acrb_cpu(Tensor x, Tensor weight, Tensor bias, int start) -> Tensor");
  m.def(
      "acrb_out_cpu(Tensor x, Tensor weight, Tensor bias, int start, Tensor(a!) out, "
      "int out_start) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CPU, m) {
  m.impl("acrb_cpu", TORCH_BOX(&efrdn_fast::acrb));
  m.impl("acrb_out_cpu", TORCH_BOX(&efrdn_fast::acrb_out));
}
