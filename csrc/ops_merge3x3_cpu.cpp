// The CPU ops of the fusing 3x3 convolution.
#include "merge3x3_cpu.h"
#include "ops_cpu.h"

namespace efrdn_fast {
namespace {

using Floats = std::vector<float>;

// Place of the weight of output channel `co`, of input `in` of its group in a source, in [C, K, 9].
int64_t weight_at(const MergeArgs& a, int64_t co, int64_t source, int64_t in) {
  return 9 * (a.join == Join::kTwo ? co * 8 + 2 * in + source : co * 4 + in);
}

// f(place in [source, 9, 4 in, C out], place in the weight)
template <class F>
void each_weight(const MergeArgs& a, const F& f) {
  int64_t to = 0;
  for (int64_t source = 0; source < merge_sources(a); ++source)
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t in = 0; in < 4; ++in)
        for (int64_t co = 0; co < a.c; ++co) f(to++, weight_at(a, co, source, in) + tap);
}

// For the gradient: [source, 9, 4 out, C in], rotated by half a turn.
Floats turned(const MergeArgs& a, const float* weight) {
  Floats out;
  for (int64_t source = 0; source < merge_sources(a); ++source)
    for (int64_t tap = 0; tap < 9; ++tap)
      for (int64_t o = 0; o < 4; ++o)
        for (int64_t ci = 0; ci < a.c; ++ci)
          out.push_back(weight[weight_at(a, ci / 4 * 4 + o, source, ci % 4) + 8 - tap]);
  return out;
}

// What lives as long as the call.
struct Call {
  const char* op;
  Tensor a, b, gate, weight;
  Floats packed;
  MergeArgs args{};

  Call(const char* name, const Tensor& first, const std::optional<Tensor>& second,
       const std::optional<Tensor>& logits, bool relu, const Tensor& weights)
      : op(name), a(nhwc(first)), weight(to_float(weights)) {
    STD_TORCH_CHECK(a.dim() == 4 && weight.dim() == 4, op, ": a and weight must have 4 dimensions");
    args.dtype = dtype_of(op, a);
    args.n = a.size(0), args.h = a.size(2), args.w = a.size(3), args.c = weight.size(0);
    args.relu = relu;
    const int64_t ca = a.size(1), inputs = weight.size(1);
    if (second) {
      b = nhwc(*second);
      check_gradient(op, b, a);
      args.b = map_of(b);
    }
    args.join = !second ? Join::kOne : 2 * ca == args.c ? Join::kPairs : Join::kTwo;
    STD_TORCH_CHECK(args.c % 32 == 0 && ca == merge_channels_a(args) &&
                        inputs == 4 * merge_sources(args) &&
                        weight.numel() == args.c * inputs * 9,
                    op, ": no kernel for maps of ", ca, " channels and a weight [", args.c, ", ",
                    inputs, ", 3, 3]");
    if (logits) {
      gate = to_float(*logits);
      args.gate = gate.size(1) == 1 ? Gate::kPixel : Gate::kChannel;
      const int64_t expected = args.gate == Gate::kPixel ? args.n * args.h * args.w : args.n * ca;
      STD_TORCH_CHECK(gate.numel() == expected, op, ": gate must have ", expected,
                      " values, got ", gate.numel());
      args.logits = floats(gate);
    }
    args.a = map_of(a);
    packed.resize(static_cast<size_t>(weight.numel()));
    each_weight(args, [&](int64_t to, int64_t from) { packed[to] = floats(weight)[from]; });
    args.weight = packed.data();
  }
};

Tensor merge3x3(Tensor a, std::optional<Tensor> b, std::optional<Tensor> gate, bool relu,
                Tensor weight, std::optional<Tensor> residual) {
  Call call("merge3x3_cpu", a, b, gate, relu, weight);
  MergeArgs& args = call.args;
  Tensor y = empty_nhwc(args.n, args.c, args.h, args.w, a.scalar_type());
  args.y = map_of(y);
  Tensor added;
  if (residual) {
    added = nhwc(*residual);
    check_gradient(call.op, added, y);
    args.residual = map_of(added);
  }
  const auto kernel = EFRDN_FAST_DISPATCH(merge_forward);
  const size_t scratch = merge_forward_scratch(args);
  parallel_rows(args.n * args.h, args.w, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, workspace(scratch));
  });
  return y;
}

// Gradients of a, b, gate and weight; of those that are not there, an empty tensor.
std::tuple<Tensor, Tensor, Tensor, Tensor> merge3x3_backward(Tensor grad_y, Tensor a,
                                                             std::optional<Tensor> b,
                                                             std::optional<Tensor> gate, bool relu,
                                                             Tensor weight) {
  Call call("merge3x3_backward_cpu", a, b, gate, relu, weight);
  const MergeArgs& f = call.args;
  check_gradient(call.op, grad_y, a, f.c);
  grad_y = nhwc(grad_y);
  const ScalarType dtype = a.scalar_type();
  const int64_t ca = merge_channels_a(f);
  const auto none = [] { return torch::stable::empty({0}, ScalarType::Float); };
  Tensor grad_a = empty_nhwc(f.n, ca, f.h, f.w, dtype);
  Tensor grad_b = b ? empty_nhwc(f.n, ca, f.h, f.w, dtype) : none();
  Tensor grad_gate = gate ? empty_float(call.gate) : none();
  const Floats weights = turned(f, floats(call.weight));
  const int64_t rows = strip_rows(f.n * f.h), strips = (f.h + rows - 1) / rows;
  const int64_t size = merge_sums(f), sums = merge_sources(f) * 36 * f.c;
  Floats partial(static_cast<size_t>(f.n * strips * size));
  MergeBackwardArgs args{f, weights.data(), map_of(grad_y), map_of(grad_a), {}, nullptr,
                         rows, strips, partial.data()};
  if (b) args.grad_b = map_of(grad_b);
  if (f.gate == Gate::kPixel) args.grad_pixel = static_cast<float*>(grad_gate.data_ptr());
  const auto kernel = EFRDN_FAST_DISPATCH(merge_backward);
  const size_t scratch = merge_backward_scratch(f);
  torch::stable::parallel_for(0, f.n * strips, 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, workspace(scratch));
  });
  const std::vector<double> totals = strip_totals(partial.data(), f.n * strips, size);
  if (f.gate == Gate::kChannel) {
    float* to = static_cast<float*>(grad_gate.data_ptr());
    for (int64_t n = 0; n < f.n; ++n) {
      const std::vector<double> image =
          strip_totals(partial.data() + n * strips * size, strips, size);
      for (int64_t c = 0; c < ca; ++c) *to++ = static_cast<float>(image[sums + c]);
    }
  }
  std::vector<double> ordered(static_cast<size_t>(sums));
  each_weight(f, [&](int64_t from, int64_t to) { ordered[to] = totals[from]; });
  const double* from = ordered.data();
  if (gate && gate->scalar_type() != ScalarType::Float)
    grad_gate = torch::stable::to(grad_gate, gate->scalar_type());
  return {grad_a, grad_b, grad_gate, tensor_like(weight, from)};
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def(
      "merge3x3_cpu(Tensor a, Tensor? b, Tensor? gate, bool relu, Tensor weight, "
      "Tensor? residual) -> Tensor");
  m.def(
      "merge3x3_backward_cpu(Tensor grad_y, Tensor a, Tensor? b, Tensor? gate, bool relu, "
      "Tensor weight) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CPU, m) {
  m.impl("merge3x3_cpu", TORCH_BOX(&efrdn_fast::merge3x3));
  m.impl("merge3x3_backward_cpu", TORCH_BOX(&efrdn_fast::merge3x3_backward));
}
