// The CPU ops of the gates and of the tokens.
#include <cmath>

#include "gates_cpu.h"
#include "ops_cpu.h"

namespace efrdn_fast {
namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

GateArgs gate_args(const char* op, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) % 16 == 0, op,
                  ": x must have 4 dimensions and a multiple of 16 channels");
  GateArgs a{};
  a.dtype = dtype_of(op, x);
  a.n = x.size(0), a.c = x.size(1), a.h = x.size(2), a.w = x.size(3);
  a.x = map_of(x);
  return a;
}

Tensor like(const GateArgs& a, const Tensor& x) {
  return empty_nhwc(a.n, a.c, a.h, a.w, x.scalar_type());
}

template <class Args, class Kernel>
void over_rows(const Args& a, Kernel kernel) {
  parallel_rows(a.n * a.h, a.w, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// The bottleneck of a CC: gate = mean over both statistics of sigmoid(W2 relu(W1 s + b1) + b2).
struct Bottleneck {
  Tensor w1, b1, w2, b2;
  int64_t c, m;

  Bottleneck(const char* op, const Tensor& v1, const Tensor& c1, const Tensor& v2, const Tensor& c2,
             int64_t channels)
      : w1(to_float(v1)), b1(to_float(c1)), w2(to_float(v2)), b2(to_float(c2)), c(channels),
        m(v1.size(0)) {
    STD_TORCH_CHECK(w1.numel() == m * c && b1.numel() == m && w2.numel() == m * c &&
                        b2.numel() == c,
                    op, ": weights must be [m, ", c, "], [m], [", c, ", m], [", c, "]");
  }

  // hidden [m] behind the ReLU, which keeps NaN, and gate [c] of one statistic
  void forward(const float* statistic, double* hidden, double* gate) const {
    for (int64_t k = 0; k < m; ++k) {
      hidden[k] = floats(b1)[k];
      for (int64_t i = 0; i < c; ++i) hidden[k] += double{floats(w1)[k * c + i]} * statistic[i];
      if (hidden[k] <= 0.0) hidden[k] = 0.0;
    }
    for (int64_t i = 0; i < c; ++i) {
      double z = floats(b2)[i];
      for (int64_t k = 0; k < m; ++k)
        z += floats(w2)[i * m + k] * hidden[k];
      gate[i] = 1.0 / (1.0 + std::exp(-z));
    }
  }
};

// y = base + x CC(x), and the mean and deviation of x, [N, 2, C].
std::tuple<Tensor, Tensor> calibrate(Tensor base, Tensor x, Tensor w1, Tensor b1, Tensor w2,
                                     Tensor b2) {
  const char* op = "calibrate_cpu";
  x = nhwc(x), base = nhwc(base);
  check_gradient(op, base, x);
  GateArgs a = gate_args(op, x);
  const Bottleneck net(op, w1, b1, w2, b2, a.c);
  Floats rows(static_cast<size_t>(a.n * a.h * 2 * a.c));
  a.rows = rows.data();
  over_rows(a, EFRDN_FAST_DISPATCH(gate_moments));
  Tensor stats = torch::stable::empty({a.n, 2, a.c}, ScalarType::Float);
  float* stat = static_cast<float*>(stats.data_ptr());
  Floats scale(static_cast<size_t>(a.n * a.c));
  Doubles hidden(static_cast<size_t>(net.m)), gate(static_cast<size_t>(a.c));
  for (int64_t n = 0; n < a.n; ++n, stat += 2 * a.c) {
    const Doubles sums = strip_totals(a.rows + n * a.h * 2 * a.c, a.h, 2 * a.c);
    for (int64_t i = 0; i < a.c; ++i) {
      const double mean = sums[i] / static_cast<double>(a.h);
      double between = 0.0;
      for (int64_t row = n * a.h; row < (n + 1) * a.h; ++row) {
        const double d = a.rows[row * 2 * a.c + i] - mean;
        between += d * d;
      }
      const double variance = (sums[a.c + i] / static_cast<double>(a.w) + between) / a.h;
      stat[i] = static_cast<float>(mean);
      stat[a.c + i] = static_cast<float>(std::sqrt(variance + 1e-6));
    }
    for (int64_t s = 0; s < 2; ++s) {
      net.forward(stat + s * a.c, hidden.data(), gate.data());
      for (int64_t i = 0; i < a.c; ++i) scale[n * a.c + i] += static_cast<float>(gate[i] / 2.0);
    }
  }
  Tensor y = like(a, x);
  a.y = map_of(y), a.base = map_of(base), a.scale = scale.data();
  over_rows(a, EFRDN_FAST_DISPATCH(gate_apply));
  return {y, stats};
}

// Gradients of x and of the four weights; that of base is grad_y.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> calibrate_backward(Tensor grad_y, Tensor x,
                                                                      Tensor w1, Tensor b1,
                                                                      Tensor w2, Tensor b2,
                                                                      Tensor stats) {
  const char* op = "calibrate_backward_cpu";
  x = nhwc(x), grad_y = nhwc(grad_y), stats = to_float(stats);
  check_gradient(op, grad_y, x);
  GateArgs a = gate_args(op, x);
  const Bottleneck net(op, w1, b1, w2, b2, a.c);
  STD_TORCH_CHECK(stats.numel() == a.n * 2 * a.c, op, ": stats must have ", a.n * 2 * a.c,
                  " values, got ", stats.numel());
  Floats rows(static_cast<size_t>(a.n * a.h * a.c));
  a.rows = rows.data(), a.grad = map_of(grad_y);
  over_rows(a, EFRDN_FAST_DISPATCH(gate_products));
  const int64_t m = net.m, size = a.n * a.c;
  Floats scale(static_cast<size_t>(size)), slope(scale), center(scale), offset(scale);
  Doubles hidden(static_cast<size_t>(m)), gate(static_cast<size_t>(a.c)), inner(hidden);
  Doubles grad_w1(static_cast<size_t>(m * a.c)), grad_b1(hidden), grad_w2(grad_w1), grad_b2(gate);
  const double pixels = static_cast<double>(a.h * a.w);
  for (int64_t n = 0; n < a.n; ++n) {
    const Doubles sums = strip_totals(a.rows + n * a.h * a.c, a.h, a.c);
    const float* stat = floats(stats) + n * 2 * a.c;
    for (int64_t s = 0; s < 2; ++s) {
      const float* statistic = stat + s * a.c;
      net.forward(statistic, hidden.data(), gate.data());
      inner.assign(static_cast<size_t>(m), 0.0);
      for (int64_t i = 0; i < a.c; ++i) {
        scale[n * a.c + i] += static_cast<float>(gate[i] / 2.0);
        const double z = sums[i] / 2.0 * gate[i] * (1.0 - gate[i]);
        grad_b2[i] += z;
        for (int64_t k = 0; k < m; ++k) {
          grad_w2[i * m + k] += z * hidden[k];
          if (hidden[k] != 0.0) inner[k] += z * floats(net.w2)[i * m + k];
        }
      }
      for (int64_t k = 0; k < m; ++k) {
        grad_b1[k] += inner[k];
        for (int64_t i = 0; i < a.c; ++i) grad_w1[k * a.c + i] += inner[k] * statistic[i];
      }
      for (int64_t i = 0; i < a.c; ++i) {
        double g = 0.0;  // gradient of the statistic
        for (int64_t k = 0; k < m; ++k) g += inner[k] * floats(net.w1)[k * a.c + i];
        const int64_t at = n * a.c + i;
        if (s == 0) {
          center[at] = statistic[i];
          offset[at] = static_cast<float>(g / pixels);
        } else {
          slope[at] = static_cast<float>(g / (pixels * statistic[i]));
        }
      }
    }
  }
  Tensor grad_x = like(a, x);
  a.y = map_of(grad_x);
  a.scale = scale.data(), a.slope = slope.data();
  a.center = center.data(), a.offset = offset.data();
  over_rows(a, EFRDN_FAST_DISPATCH(gate_apply_backward));
  const auto of = [](const Tensor& tensor, const Doubles& values) {
    const double* from = values.data();
    return tensor_like(tensor, from);
  };
  return {grad_x, of(w1, grad_w1), of(b1, grad_b1), of(w2, grad_w2), of(b2, grad_b2)};
}

Tensor sigmoid_gate(Tensor x, Tensor z) {
  x = nhwc(x), z = nhwc(z);
  check_gradient("sigmoid_gate_cpu", z, x);
  GateArgs a = gate_args("sigmoid_gate_cpu", x);
  Tensor y = like(a, x);
  a.z = map_of(z), a.y = map_of(y);
  over_rows(a, EFRDN_FAST_DISPATCH(gate_sigmoid));
  return y;
}

std::tuple<Tensor, Tensor> sigmoid_gate_backward(Tensor grad_y, Tensor x, Tensor z) {
  const char* op = "sigmoid_gate_backward_cpu";
  x = nhwc(x), z = nhwc(z), grad_y = nhwc(grad_y);
  check_gradient(op, z, x);
  check_gradient(op, grad_y, x);
  GateArgs a = gate_args(op, x);
  Tensor grad_x = like(a, x), grad_z = like(a, x);
  a.z = map_of(z), a.grad = map_of(grad_y), a.y = map_of(grad_x), a.grad_z = map_of(grad_z);
  over_rows(a, EFRDN_FAST_DISPATCH(gate_sigmoid_backward));
  return {grad_x, grad_z};
}

TokenArgs token_args(const char* op, const Tensor& x, const Tensor& tokens) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) % 16 == 0, op,
                  ": a map must have 4 dimensions and a multiple of 16 channels");
  return {dtype_of(op, x), x.size(0), x.size(1), x.size(2), x.size(3),
          map_of(x),       tokens.data_ptr()};
}

Tensor unfold(Tensor x) {
  x = nhwc(x);
  Tensor tokens = torch::stable::empty({x.size(0), x.size(2) * x.size(3), 9 * x.size(1)},
                                       x.scalar_type());
  over_rows(token_args("unfold_cpu", x, tokens), EFRDN_FAST_DISPATCH(tokens_unfold));
  return tokens;
}

Tensor fold(Tensor tokens, int64_t height, int64_t width) {
  STD_TORCH_CHECK(tokens.dim() == 3 && tokens.size(1) == height * width && tokens.size(2) % 9 == 0,
                  "fold_cpu: tokens must be [N, ", height * width, ", 9 C]");
  if (!tokens.is_contiguous()) tokens = torch::stable::contiguous(tokens);
  Tensor x = empty_nhwc(tokens.size(0), tokens.size(2) / 9, height, width, tokens.scalar_type());
  over_rows(token_args("fold_cpu", x, tokens), EFRDN_FAST_DISPATCH(tokens_fold));
  return x;
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def(
      "calibrate_cpu(Tensor base, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2) -> "
      "(Tensor, Tensor)");
  m.def(
      "calibrate_backward_cpu(Tensor grad_y, Tensor x, Tensor w1, Tensor b1, Tensor w2, "
      "Tensor b2, Tensor stats) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sigmoid_gate_cpu(Tensor x, Tensor z) -> Tensor");
  m.def("sigmoid_gate_backward_cpu(Tensor grad_y, Tensor x, Tensor z) -> (Tensor, Tensor)");
  m.def("unfold_cpu(Tensor x) -> Tensor");
  m.def("fold_cpu(Tensor tokens, int height, int width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CPU, m) {
  m.impl("calibrate_cpu", TORCH_BOX(&efrdn_fast::calibrate));
  m.impl("calibrate_backward_cpu", TORCH_BOX(&efrdn_fast::calibrate_backward));
  m.impl("sigmoid_gate_cpu", TORCH_BOX(&efrdn_fast::sigmoid_gate));
  m.impl("sigmoid_gate_backward_cpu", TORCH_BOX(&efrdn_fast::sigmoid_gate_backward));
  m.impl("unfold_cpu", TORCH_BOX(&efrdn_fast::unfold));
  m.impl("fold_cpu", TORCH_BOX(&efrdn_fast::fold));
}
