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

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def(
      "gcrb_cpu(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor w3, Tensor b3, "
      "int groups) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CPU, m) {
  m.impl("gcrb_cpu", TORCH_BOX(&efrdn_fast::gcrb));
}
