// The CPU ops of GCRB with batch statistics: between the passes over the map, the statistics and
// what follows from them are worked out here in double precision.
#include <cmath>

#include "gcrb_train_cpu.h"
#include "ops_cpu.h"

namespace efrdn_fast {
namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;
using Pass = void (*)(const GcrbTrainArgs&, int64_t, int64_t, float*);

Floats narrow(const Doubles& x) { return Floats(x.begin(), x.end()); }

// BatchNorm as scale a + shift.
struct Norm {
  Doubles mean, rstd, scale;
  Floats scale_f, shift_f, mean_f, rstd_f;

  Norm(Doubles mean_of, const Doubles& var, const Tensor& gamma, const Tensor& beta, double eps)
      : mean(std::move(mean_of)) {
    Doubles shift;
    for (size_t i = 0; i < mean.size(); ++i) {
      rstd.push_back(1.0 / std::sqrt(var[i] + eps));
      scale.push_back(floats(gamma)[i] * rstd[i]);
      shift.push_back(floats(beta)[i] - mean[i] * scale[i]);
    }
    scale_f = narrow(scale), shift_f = narrow(shift), mean_f = narrow(mean), rstd_f = narrow(rstd);
  }
};

// d a = scale (g - s1 / n - hat a s2 / n), s1 and s2 the sums of g and g hat a.
struct NormBackward {
  Floats alpha, beta, gamma;

  NormBackward(const Norm& norm, const double* s1, const double* s2, double count) {
    for (size_t i = 0; i < norm.mean.size(); ++i) {
      alpha.push_back(norm.scale_f[i]);
      beta.push_back(static_cast<float>(-norm.scale[i] * s1[i] / count));
      gamma.push_back(static_cast<float>(-norm.scale[i] * norm.rstd[i] * s2[i] / count));
    }
  }
  NormGradient view(const Norm& norm) const {
    return {alpha.data(), beta.data(), gamma.data(), norm.mean_f.data(), norm.rstd_f.data()};
  }
};

// One call: inputs in the form the kernels take, maps and moments between the passes.
struct Call {
  Tensor x, w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3;
  GcrbTrainArgs t{};
  int64_t m, c, mg, rows;
  double count;
  std::vector<Tensor> maps;
  Floats moments;

  Call(const char* op, const Tensor& x_, const Tensor& w1_, const Tensor& gamma1_,
       const Tensor& beta1_, const Tensor& w2_, const Tensor& gamma2_, const Tensor& beta2_,
       const Tensor& w3_, const Tensor& gamma3_, const Tensor& beta3_, int64_t groups)
      : x(nhwc(x_)), w1(to_float(w1_)), gamma1(to_float(gamma1_)), beta1(to_float(beta1_)),
        w2(to_float(w2_)), gamma2(to_float(gamma2_)), beta2(to_float(beta2_)), w3(to_float(w3_)),
        gamma3(to_float(gamma3_)), beta3(to_float(beta3_)) {
    GcrbArgs& a = t.base;
    STD_TORCH_CHECK(x.dim() == 4 && w1.dim() == 4, op, ": x and w1 must have 4 dimensions");
    a.dtype = dtype_of(op, x);
    a.n = x.size(0), a.c = c = x.size(1), a.h = x.size(2), a.w = x.size(3);
    a.m = m = w1.size(0), a.groups = groups;
    STD_TORCH_CHECK(groups > 0 && c % groups == 0 && m % groups == 0, op, ": groups=", groups,
                    " must divide C=", c, " and M=", m);
    mg = m / groups, rows = a.n * a.h, count = static_cast<double>(rows * a.w);
    const int64_t expected[] = {m * (c / groups), m, m, 9 * m, m, m, c * mg, c, c};
    const Tensor* given[] = {&w1, &gamma1, &beta1, &w2, &gamma2, &beta2, &w3, &gamma3, &beta3};
    for (int i = 0; i < 9; ++i)
      STD_TORCH_CHECK(given[i]->numel() == expected[i], op, ": weight ", i, " must have ",
                      expected[i], " values, got ", given[i]->numel());
    a.x = map_of(x);
    a.w1 = floats(w1), a.w2 = floats(w2);
    t.a1 = map(), t.a2 = map();
    moments.resize(static_cast<size_t>(rows * m * (1 + (mg > 1 ? mg : 1))));
    t.moments = moments.data();
    t.strip_rows = efrdn_fast::strip_rows(rows);
  }

  int64_t strips() const { return (rows + t.strip_rows - 1) / t.strip_rows; }

  // A planar map [N * H, M, row_stride] that lives as long as the call.
  float* map() {
    maps.push_back(torch::stable::empty({rows * m * row_stride(t.base.w)}, ScalarType::Float));
    return static_cast<float*>(maps.back().data_ptr());
  }

  void over_rows(Pass pass) {
    const size_t scratch = gcrb_train_scratch(t.base);
    parallel_rows(rows, t.base.w, [&](int64_t begin, int64_t end) {
      pass(t, begin, end, workspace(scratch));
    });
  }

  // Totals of the `size` sums that a pass over the strips makes.
  Doubles over_strips(Pass pass, int64_t size) {
    Floats partial(static_cast<size_t>(strips() * size));
    t.partial = partial.data();
    const size_t scratch = gcrb_train_scratch(t.base);
    torch::stable::parallel_for(0, strips(), 1, [&](int64_t begin, int64_t end) {
      pass(t, begin, end, workspace(scratch));
    });
    return strip_totals(partial.data(), strips(), size);
  }

  // Mean [M], then biased covariances [M, with] from the moments of the rows: those inside the rows
  // and that of the rows' means. `other(m, k)` is the channel that the k-th covariance goes with.
  template <class Other>
  Doubles merge_rows(int64_t with, const Other& other) const {
    const int64_t size = m * (1 + with);
    Doubles out = strip_totals(moments.data(), rows, size);
    for (int64_t i = 0; i < m; ++i) out[i] /= static_cast<double>(rows);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t k = 0; k < with; ++k) {
        double between = 0.0;
        for (int64_t row = 0; row < rows; ++row) {
          const float* mean = moments.data() + row * size;
          between += (mean[i] - out[i]) * (mean[other(i, k)] - out[other(i, k)]);
        }
        double& value = out[m + i * with + k];
        value = (value + static_cast<double>(t.base.w) * between) / count;
      }
    return out;
  }
  Doubles variances() const {
    return merge_rows(1, [](int64_t i, int64_t) { return i; });
  }
  Doubles covariances() const {
    return merge_rows(mg, [this](int64_t i, int64_t k) { return i / mg * mg + k; });
  }

  Norm norm(const Doubles& stats, const Tensor& gamma, const Tensor& beta, double eps) const {
    const auto middle = stats.begin() + static_cast<int64_t>(stats.size() / 2);
    return Norm(Doubles(stats.begin(), middle), Doubles(middle, stats.end()), gamma, beta, eps);
  }
  void set(const Norm& norm1, const Norm& norm2) {
    t.scale1 = norm1.scale_f.data(), t.shift1 = norm1.shift_f.data();
    t.scale2 = norm2.scale_f.data(), t.shift2 = norm2.shift_f.data();
  }

  // First mid channel of the group of output channel o.
  int64_t first_mid(int64_t o) const { return o / (c / t.base.groups) * mg; }

  // Statistics of a3 = W3 m2, mean and variance [C] each, from those of m2.
  Doubles expanded(const Doubles& mid) const {
    Doubles out(static_cast<size_t>(2 * c));
    for (int64_t o = 0; o < c; ++o)
      for (int64_t k = 0; k < mg; ++k) {
        const int64_t channel = first_mid(o) + k;
        const double weight = floats(w3)[o * mg + k];
        out[o] += weight * mid[channel];
        for (int64_t j = 0; j < mg; ++j)
          out[c + o] += weight * floats(w3)[o * mg + j] * mid[m + channel * mg + j];
      }
    for (int64_t o = 0; o < c; ++o) out[c + o] = out[c + o] < 0.0 ? 0.0 : out[c + o];
    return out;
  }
};

Floats scaled(const Tensor& weight, const Doubles& scale) {
  Floats out(static_cast<size_t>(weight.numel()));
  const size_t each = out.size() / scale.size();
  for (size_t i = 0; i < out.size(); ++i)
    out[i] = static_cast<float>(floats(weight)[i] * scale[i / each]);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> gcrb_train(Tensor x, Tensor w1, Tensor gamma1, Tensor beta1,
                                              Tensor w2, Tensor gamma2, Tensor beta2, Tensor w3,
                                              Tensor gamma3, Tensor beta3, int64_t groups,
                                              double eps) {
  Call call("gcrb_train_cpu", x, w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3, groups);
  call.over_rows(EFRDN_FAST_DISPATCH(train_squeeze));
  const Doubles stats1 = call.variances();
  const Norm norm1 = call.norm(stats1, call.gamma1, call.beta1, eps);
  call.t.scale1 = norm1.scale_f.data(), call.t.shift1 = norm1.shift_f.data();
  call.over_rows(EFRDN_FAST_DISPATCH(train_depthwise));
  const Doubles stats2 = call.variances();
  const Norm norm2 = call.norm(stats2, call.gamma2, call.beta2, eps);
  call.set(norm1, norm2);
  call.over_rows(EFRDN_FAST_DISPATCH(train_mid_moments));
  const Doubles stats3 = call.expanded(call.covariances());
  const Norm norm3 = call.norm(stats3, call.gamma3, call.beta3, eps);

  // With the statistics known it is the folded block.
  const Floats v1 = scaled(call.w1, norm1.scale), v2 = scaled(call.w2, norm2.scale);
  const Floats v3 = scaled(call.w3, norm3.scale);
  GcrbArgs a = call.t.base;
  Tensor y = empty_nhwc(a.n, a.c, a.h, a.w, x.scalar_type());
  a.y = map_of(y);
  a.w1 = v1.data(), a.b1 = norm1.shift_f.data(), a.w2 = v2.data(), a.b2 = norm2.shift_f.data();
  a.w3 = v3.data(), a.b3 = norm3.shift_f.data();
  const auto kernel = EFRDN_FAST_DISPATCH(gcrb_forward);
  const size_t scratch = gcrb_forward_scratch(a);
  parallel_rows(a.n * a.h, a.w, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, workspace(scratch));
  });

  const int64_t size = 2 * call.m + call.c;
  Tensor mean = torch::stable::empty({size}, ScalarType::Float);
  Tensor var = torch::stable::empty({size}, ScalarType::Float);
  float *mean_to = static_cast<float*>(mean.data_ptr()), *var_to = static_cast<float*>(var.data_ptr());
  for (const Doubles* stats : {&stats1, &stats2, &stats3}) {
    const size_t half = stats->size() / 2;
    for (size_t i = 0; i < half; ++i) {
      *mean_to++ = static_cast<float>((*stats)[i]);
      *var_to++ = static_cast<float>((*stats)[half + i]);
    }
  }
  return {y, mean, var};
}

using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients gcrb_train_backward(Tensor grad_y, Tensor x, Tensor w1, Tensor gamma1, Tensor beta1,
                              Tensor w2, Tensor gamma2, Tensor beta2, Tensor w3, Tensor gamma3,
                              Tensor beta3, Tensor mean, Tensor var, int64_t groups, double eps) {
  const char* op = "gcrb_train_backward_cpu";
  Call call(op, x, w1, gamma1, beta1, w2, gamma2, beta2, w3, gamma3, beta3, groups);
  const int64_t m = call.m, c = call.c, mg = call.mg;
  check_gradient(op, grad_y, x);
  grad_y = nhwc(grad_y), mean = to_float(mean), var = to_float(var);
  STD_TORCH_CHECK(mean.numel() == 2 * m + c && var.numel() == 2 * m + c, op,
                  ": mean and var must have ", 2 * m + c, " values, got ", mean.numel(), " and ",
                  var.numel());
  const auto saved = [&](int64_t from, int64_t size, const Tensor& gamma, const Tensor& beta) {
    const float *a = floats(mean) + from, *b = floats(var) + from;
    return Norm(Doubles(a, a + size), Doubles(b, b + size), gamma, beta, eps);
  };
  const Norm norm1 = saved(0, m, call.gamma1, call.beta1), norm2 = saved(m, m, call.gamma2, call.beta2);
  const Norm norm3 = saved(2 * m, c, call.gamma3, call.beta3);
  const Floats v3 = scaled(call.w3, norm3.scale);
  GcrbTrainArgs& t = call.t;
  t.base.w3 = v3.data(), t.base.b3 = norm3.shift_f.data();
  call.set(norm1, norm2);
  call.over_rows(EFRDN_FAST_DISPATCH(train_squeeze));
  call.over_rows(EFRDN_FAST_DISPATCH(train_depthwise));
  call.over_rows(EFRDN_FAST_DISPATCH(train_mid_moments));
  const Doubles mid = call.covariances();

  // Part 3: g3 = grad_y behind the last ReLU; the gradient at m2 is affine in u = W3^T g3 and m2.
  Tensor grad_x = empty_nhwc(t.base.n, c, t.base.h, t.base.w, x.scalar_type());
  t.grad_y = map_of(grad_y), t.grad_x = map_of(grad_x);
  t.g2 = call.map(), t.g1 = call.map();
  const Doubles open = call.over_strips(EFRDN_FAST_DISPATCH(train_expand_backward), c * mg + c);
  Doubles grad_w3(static_cast<size_t>(c * mg)), grad_gamma3(static_cast<size_t>(c));
  Doubles mix(static_cast<size_t>(m * mg)), offset(static_cast<size_t>(m));
  for (int64_t o = 0; o < c; ++o) {
    const double s1 = open[c * mg + o];
    const float* weight = floats(call.w3) + o * mg;
    const int64_t first = call.first_mid(o);
    for (int64_t k = 0; k < mg; ++k)
      grad_gamma3[o] += norm3.rstd[o] * weight[k] * (open[o * mg + k] - mid[first + k] * s1);
    for (int64_t k = 0; k < mg; ++k) {
      double with_a3 = 0.0;  // mean over pixels of (a3 - mean) m2[k]
      for (int64_t j = 0; j < mg; ++j) with_a3 += weight[j] * mid[m + (first + j) * mg + k];
      grad_w3[o * mg + k] = norm3.scale[o] * (open[o * mg + k] - s1 * mid[first + k] -
                                              grad_gamma3[o] * norm3.rstd[o] * with_a3);
      // v3 as the kernel rounds it: u and the offset cancel, so they must agree on it.
      const double folded = v3[static_cast<size_t>(o * mg + k)];
      offset[first + k] -= folded * s1 / call.count;
      for (int64_t j = 0; j < mg; ++j) {
        const double each =
            folded * norm3.rstd[o] * grad_gamma3[o] * weight[j] / call.count;
        mix[(first + k) * mg + j] += each;
        offset[first + k] += each * mid[first + j];
      }
    }
  }
  const Floats mix_f = narrow(mix), offset_f = narrow(offset);
  t.mix = mix_f.data(), t.offset = offset_f.data();

  // Part 2.
  t.norm2 = {nullptr, nullptr, nullptr, norm2.mean_f.data(), norm2.rstd_f.data()};
  const Doubles sums2 = call.over_strips(EFRDN_FAST_DISPATCH(train_mid_backward), 2 * m);
  const NormBackward back2(norm2, sums2.data(), sums2.data() + m, call.count);
  t.norm2 = back2.view(norm2);
  t.norm1 = {nullptr, nullptr, nullptr, norm1.mean_f.data(), norm1.rstd_f.data()};
  const Doubles sums1 = call.over_strips(EFRDN_FAST_DISPATCH(train_depthwise_backward), 11 * m);

  // Part 1.
  const NormBackward back1(norm1, sums1.data() + 9 * m, sums1.data() + 10 * m, call.count);
  t.norm1 = back1.view(norm1);
  const Doubles part1 =
      call.over_strips(EFRDN_FAST_DISPATCH(train_squeeze_backward), m * (c / groups));

  const auto like = [](const Tensor& tensor, const double* from) { return tensor_like(tensor, from); };
  return {grad_x,
          like(w1, part1.data()), like(gamma1, sums1.data() + 10 * m), like(beta1, sums1.data() + 9 * m),
          like(w2, sums1.data()), like(gamma2, sums2.data() + m), like(beta2, sums2.data()),
          like(w3, grad_w3.data()), like(gamma3, grad_gamma3.data()), like(beta3, open.data() + c * mg)};
}

}  // namespace
}  // namespace efrdn_fast

#define EFRDN_FAST_PARAMETERS                                                       \
  "Tensor w1, Tensor gamma1, Tensor beta1, Tensor w2, Tensor gamma2, Tensor beta2, " \
  "Tensor w3, Tensor gamma3, Tensor beta3, "

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def("gcrb_train_cpu(Tensor x, " EFRDN_FAST_PARAMETERS
        "int groups, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("gcrb_train_backward_cpu(Tensor grad_y, Tensor x, " EFRDN_FAST_PARAMETERS
        "Tensor mean, Tensor var, int groups, float eps) -> (Tensor, Tensor, Tensor, Tensor, "
        "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CPU, m) {
  m.impl("gcrb_train_cpu", TORCH_BOX(&efrdn_fast::gcrb_train));
  m.impl("gcrb_train_backward_cpu", TORCH_BOX(&efrdn_fast::gcrb_train_backward));
}
