// The CPU ops of GCRB. Arguments are validated in Python; what would read or write out of bounds is
// checked again here.
#include "gcrb_cpu.h"
#include "ops_cpu.h"

namespace efrdn_fast {
namespace {

// Float32 weights that live as long as the call.
struct Weights {
  Tensor w1, b1, w2, b2, w3, b3;
};

GcrbArgs arguments(const char* op, const Tensor& x, const Weights& w, int64_t groups) {
  GcrbArgs a{};
  STD_TORCH_CHECK(x.dim() == 4 && w.w1.dim() == 4, op, ": x and w1 must have 4 dimensions, got ",
                  x.dim(), " and ", w.w1.dim());
  a.dtype = dtype_of(op, x);
  a.n = x.size(0), a.c = x.size(1), a.h = x.size(2), a.w = x.size(3);
  a.m = w.w1.size(0), a.groups = groups;
  STD_TORCH_CHECK(groups > 0 && a.c % groups == 0 && a.m % groups == 0, op, ": groups=", groups,
                  " must divide C=", a.c, " and M=", a.m);
  const int64_t expected[] = {a.m * (a.c / groups), a.m, 9 * a.m, a.m, a.c * (a.m / groups), a.c};
  const Tensor* given[] = {&w.w1, &w.b1, &w.w2, &w.b2, &w.w3, &w.b3};
  const char* names[] = {"w1", "b1", "w2", "b2", "w3", "b3"};
  for (int i = 0; i < 6; ++i)
    STD_TORCH_CHECK(given[i]->numel() == expected[i], op, ": ", names[i], " must have ",
                    expected[i], " values, got ", given[i]->numel());
  a.x = map_of(x);
  a.w1 = floats(w.w1), a.b1 = floats(w.b1), a.w2 = floats(w.w2), a.b2 = floats(w.b2);
  a.w3 = floats(w.w3), a.b3 = floats(w.b3);
  return a;
}

Tensor gcrb(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3,
            int64_t groups) {
  x = nhwc(x);
  const Weights weights{to_float(w1), to_float(b1), to_float(w2),
                        to_float(b2), to_float(w3), to_float(b3)};
  GcrbArgs a = arguments("gcrb_cpu", x, weights, groups);
  Tensor y = empty_nhwc(a.n, a.c, a.h, a.w, x.scalar_type());
  a.y = map_of(y);
  const auto kernel = EFRDN_FAST_DISPATCH(gcrb_forward);
  const size_t scratch = gcrb_forward_scratch(a);
  parallel_rows(a.n * a.h, a.w, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, workspace(scratch));
  });
  return y;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients gcrb_backward(Tensor grad_y, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2,
                        Tensor w3, Tensor b3, int64_t groups) {
  x = nhwc(x);
  check_gradient("gcrb_backward_cpu", grad_y, x);
  grad_y = nhwc(grad_y);
  const Weights weights{to_float(w1), to_float(b1), to_float(w2),
                        to_float(b2), to_float(w3), to_float(b3)};
  const GcrbArgs f = arguments("gcrb_backward_cpu", x, weights, groups);
  Tensor grad_x = empty_nhwc(f.n, f.c, f.h, f.w, x.scalar_type());
  const int64_t rows = strip_rows(f.n * f.h), strips = (f.n * f.h + rows - 1) / rows;
  const int64_t size = gcrb_weights(f);
  std::vector<float> partial(static_cast<size_t>(strips * size));
  const GcrbBackwardArgs a{f, map_of(grad_y), map_of(grad_x), rows, partial.data()};
  const auto kernel = EFRDN_FAST_DISPATCH(gcrb_backward);
  const size_t scratch = gcrb_backward_scratch(f);
  torch::stable::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, workspace(scratch));
  });
  const std::vector<double> totals = strip_totals(partial.data(), strips, size);
  const double* from = totals.data();
  Tensor g1 = tensor_like(w1, from), h1 = tensor_like(b1, from), g2 = tensor_like(w2, from);
  Tensor h2 = tensor_like(b2, from), g3 = tensor_like(w3, from), h3 = tensor_like(b3, from);
  return {grad_x, g1, h1, g2, h2, g3, h3};
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def(
      "gcrb_cpu(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, "
      "int groups) -> Tensor");
  m.def(
      "gcrb_backward_cpu(Tensor grad_y, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, "
      "Tensor w3, Tensor b3, int groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CPU, m) {
  m.impl("gcrb_cpu", TORCH_BOX(&efrdn_fast::gcrb));
  m.impl("gcrb_backward_cpu", TORCH_BOX(&efrdn_fast::gcrb_backward));
}
