// Runs one launcher of csrc/ on the CPU. Usage: runner <op> <case file> <result file>
#include <cstring>

#include "acrb.h"
#include "case.h"
#include "conv3x3.h"
#include "emha.h"
#include "gcrb.h"
#include "gcrb_train.h"
#include "reduce.h"
#include "token.h"

namespace {

using efrdn_fast::Dtype;
using simt::Case;

// `suffix`: of the arrays' names.
efrdn_fast::GcrbWeights gcrb_weights(const Case& c, const std::string& suffix = "") {
  const auto data = [&](const char* name) { return c.data(name + suffix); };
  return {data("w1"), data("b1"), data("w2"),           data("b2"),
          data("w3"), data("b3"), c.dtype("w1" + suffix)};
}

efrdn_fast::GcrbParams gcrb_params(const Case& c) {
  return {c.dtype("x"),  c.number("N"),      c.number("C"), c.number("H"), c.number("W"),
          c.number("M"), c.number("groups"), c.map("x"),    c.map("y"),    gcrb_weights(c)};
}

cudaError_t gcrb_fwd(const Case& c) { return efrdn_fast::launch_gcrb_fwd(gcrb_params(c), nullptr); }

cudaError_t gcrb_chain_fwd(const Case& c) {
  efrdn_fast::GcrbChainParams p{
      c.dtype("x"),  c.number("N"),      c.number("C"), c.number("H"), c.number("W"),
      c.number("M"), c.number("groups"), c.map("x"),    {},            {}};
  for (int i = 0; i < 3; i++) {
    p.y[i] = c.map("y" + std::to_string(i));
    p.weights[i] = gcrb_weights(c, "_" + std::to_string(i));
  }
  return efrdn_fast::launch_gcrb_chain_fwd(p, nullptr);
}

float* floats(const simt::Buffer& buffer) { return reinterpret_cast<float*>(buffer.data()); }

cudaError_t gcrb_bwd(const Case& c) {
  efrdn_fast::GcrbBackwardParams p{};
  p.forward = gcrb_params(c);
  p.grad_y = c.map("grad_y");
  p.grad_x = c.map("grad_x");
  p.grad_w1 = c.data("grad_w1");
  p.grad_b1 = c.data("grad_b1");
  p.grad_w2 = c.data("grad_w2");
  p.grad_b2 = c.data("grad_b2");
  p.grad_w3 = c.data("grad_w3");
  p.grad_b3 = c.data("grad_b3");
  const simt::Buffer partial(efrdn_fast::gcrb_partial_floats(p.forward) * sizeof(float));
  p.partial = floats(partial);
  return efrdn_fast::launch_gcrb_bwd(p, nullptr);
}

efrdn_fast::GcrbTrainParams gcrb_train_params(const Case& c, const simt::Buffer& depthwise) {
  const efrdn_fast::GcrbParams p = gcrb_params(c);
  return {p.dtype,
          p.n,
          p.c,
          p.h,
          p.w,
          p.m,
          p.groups,
          1e-5f,
          p.x,
          p.y,
          p.weights,
          {c.data("gamma1"), c.data("gamma2"), c.data("gamma3")},
          c.data<float>("mean"),
          c.data<float>("var"),
          floats(depthwise),
          nullptr};
}

cudaError_t gcrb_train(const Case& c) {
  const simt::Buffer depthwise(c.number("N") * c.number("H") * c.number("W") * c.number("M") *
                               sizeof(float));
  efrdn_fast::GcrbTrainParams p = gcrb_train_params(c, depthwise);
  const simt::Buffer partial(efrdn_fast::gcrb_train_partial_floats(p) * sizeof(float));
  p.partial = floats(partial);
  return efrdn_fast::launch_gcrb_train(p, nullptr);
}

cudaError_t gcrb_train_bwd(const Case& c) {
  const size_t map_bytes =
      c.number("N") * c.number("H") * c.number("W") * c.number("M") * sizeof(float);
  const simt::Buffer depthwise(map_bytes), grad1(map_bytes), grad2(map_bytes);
  efrdn_fast::GcrbTrainBackwardParams p{};
  p.forward = gcrb_train_params(c, depthwise);
  p.grad_y = c.map("grad_y");
  p.grad_x = c.map("grad_x");
  p.grad_w1 = c.data("grad_w1");
  p.grad_w2 = c.data("grad_w2");
  p.grad_w3 = c.data("grad_w3");
  for (int i = 0; i < 3; i++) {
    p.grad_gamma[i] = c.data("grad_gamma" + std::to_string(i + 1));
    p.grad_beta[i] = c.data("grad_b" + std::to_string(i + 1));
  }
  p.grad1 = floats(grad1);
  p.grad2 = floats(grad2);
  const simt::Buffer partial(efrdn_fast::gcrb_train_bwd_partial_floats(p.forward) * sizeof(float));
  p.partial = floats(partial);
  return efrdn_fast::launch_gcrb_train_bwd(p, nullptr);
}

efrdn_fast::AcrbParams acrb_params(const Case& c) {
  return {c.dtype("x"), c.number("N"), c.number("H"),    c.number("W"),  c.number("d"),
          c.map("x"),   c.map("y"),    c.data("weight"), c.data("bias"), c.dtype("weight")};
}

cudaError_t acrb_fwd(const Case& c) { return efrdn_fast::launch_acrb_fwd(acrb_params(c), nullptr); }

cudaError_t acrb_bwd(const Case& c) {
  efrdn_fast::AcrbBackwardParams p{};
  p.forward = acrb_params(c);
  p.grad_y = c.map("grad_y");
  p.grad_x = c.map("grad_x");
  p.before = c.number("before");
  p.after = c.number("after");
  p.grad_weight = c.data("grad_weight");
  p.grad_bias = c.data("grad_bias");
  const efrdn_fast::AcrbParams& f = p.forward;
  const simt::Buffer masked(f.n * f.h * f.w * f.d * sizeof(float));
  const simt::Buffer partial(efrdn_fast::acrb_partial_floats(f) * sizeof(float));
  p.masked = floats(masked);
  p.partial = floats(partial);
  return efrdn_fast::launch_acrb_bwd(p, nullptr);
}

cudaError_t conv3x3_fwd(const Case& c) {
  efrdn_fast::Conv3x3Params p{};
  p.dtype = c.dtype("y");
  p.tf32 = c.number("tf32");
  p.n = c.number("N");
  p.h = c.number("H");
  p.w = c.number("W");
  p.cout = c.number("Cout");
  p.groups = c.number("groups");
  for (std::string name = "x0"; c.has(name); name = "x" + std::to_string(p.sources)) {
    p.x[p.sources] = c.map(name);
    p.cin += c.number(name + ".C");
    p.end[p.sources++] = p.cin;
  }
  p.interleaved = c.number("interleaved");
  p.weight = c.data("weight");
  p.weight_dtype = c.dtype("weight");
  p.bias = c.data("bias");
  p.relu = c.number("relu");
  p.residual = c.map("residual");
  p.y = c.map("y");
  return efrdn_fast::launch_conv3x3_fwd(p, nullptr);
}

efrdn_fast::EmhaParams emha_params(const Case& c) {
  return {c.dtype("qkv"),
          c.number("tf32") != 0,
          c.number("N"),
          c.number("T"),
          c.number("length"),
          static_cast<int>(c.number("heads")),
          static_cast<int>(c.number("d")),
          c.data("qkv"),
          c.number("stride_n"),
          c.number("stride_t"),
          c.data("out"),
          c.data<float>("lse")};
}

cudaError_t emha_fwd(const Case& c) { return efrdn_fast::launch_emha_fwd(emha_params(c), nullptr); }

cudaError_t emha_bwd(const Case& c) {
  efrdn_fast::EmhaBackwardParams p{};
  p.forward = emha_params(c);
  p.grad_out = c.data("grad_out");
  p.grad_stride_n = c.number("grad_stride_n");
  p.grad_stride_t = c.number("grad_stride_t");
  p.grad_qkv = c.data("grad_qkv");
  const simt::Buffer delta(c.number("N") * c.number("heads") * c.number("T") * sizeof(float));
  p.delta = floats(delta);
  return efrdn_fast::launch_emha_bwd(p, nullptr);
}

efrdn_fast::TokenMap token_map(const Case& c) {
  return {c.dtype("x"), c.number("tf32") != 0,           c.number("N"), c.number("H"),
          c.number("W"), static_cast<int>(c.number("C")), c.map("x"),    c.dtype("proj_weight")};
}

efrdn_fast::TokenQkvParams token_qkv_params(const Case& c) {
  efrdn_fast::TokenQkvParams p{};
  p.map = token_map(c);
  p.eps = 1e-5f;
  p.inner = static_cast<int>(c.number("inner"));
  p.outer = static_cast<int>(c.number("outer"));
  p.gamma = c.data("gamma");
  p.beta = c.data("beta");
  p.reduce = c.data("proj_weight");
  p.qkv = c.data("qkv");
  p.out = c.data("out");
  return p;
}

cudaError_t token_qkv(const Case& c) {
  return efrdn_fast::launch_token_qkv_fwd(token_qkv_params(c), nullptr);
}

simt::Buffer token_rows(const Case& c, const char* width) {
  const int64_t size = c.dtype("x") == Dtype::kFloat ? 4 : 2;
  return simt::Buffer(c.number("N") * c.number("H") * c.number("W") * c.number(width) * size);
}

cudaError_t token_qkv_bwd(const Case& c) {
  efrdn_fast::TokenQkvBackwardParams p{};
  p.forward = token_qkv_params(c);
  p.grad = c.data("grad");
  p.grad_x = c.map("grad_x");
  p.grad_gamma = c.data("grad_gamma");
  p.grad_beta = c.data("grad_beta");
  p.grad_reduce = c.data("grad_reduce");
  p.grad_qkv = c.data("grad_qkv");
  const simt::Buffer inner = token_rows(c, "inner"), reduced = token_rows(c, "inner");
  const simt::Buffer scaled = token_rows(c, "inner");
  p.inner_grad = inner.data();
  p.reduced = reduced.data();
  p.scaled_grad = scaled.data();
  const efrdn_fast::TokenMap& map = p.forward.map;
  const simt::Buffer stats(efrdn_fast::token_stats_floats(map) * sizeof(float));
  const simt::Buffer sums(efrdn_fast::token_sums_floats(map, p.forward.inner) * sizeof(float));
  const simt::Buffer partial(efrdn_fast::token_qkv_partial_floats(p.forward) * sizeof(float));
  p.stats = floats(stats);
  p.sums = floats(sums);
  p.partial = floats(partial);
  return efrdn_fast::launch_token_qkv_bwd(p, nullptr);
}

efrdn_fast::TokenHiddenParams token_hidden_params(const Case& c) {
  efrdn_fast::TokenHiddenParams p{};
  p.map = token_map(c);
  p.eps = 1e-5f;
  p.width = static_cast<int>(c.number("width"));
  p.hidden = static_cast<int>(c.number("hidden"));
  p.a = c.data("a");
  p.a_stride_n = c.number("a_stride_n");
  p.a_stride_t = c.number("a_stride_t");
  p.proj_weight = c.data("proj_weight");
  p.proj_bias = c.data("proj_bias");
  p.gamma = c.data("gamma");
  p.beta = c.data("beta");
  p.fc1_weight = c.data("fc1_weight");
  p.fc1_bias = c.data("fc1_bias");
  p.h = c.data("out");
  return p;
}

cudaError_t token_hidden(const Case& c) {
  return efrdn_fast::launch_token_hidden_fwd(token_hidden_params(c), nullptr);
}

cudaError_t token_hidden_bwd(const Case& c) {
  efrdn_fast::TokenHiddenBackwardParams p{};
  p.forward = token_hidden_params(c);
  p.grad = c.data("grad");
  p.grad_x = c.map("grad_x");
  p.grad_a = c.data("grad_a");
  p.grad_proj_weight = c.data("grad_proj_weight");
  p.grad_proj_bias = c.data("grad_proj_bias");
  p.grad_gamma = c.data("grad_gamma");
  p.grad_beta = c.data("grad_beta");
  p.grad_fc1_weight = c.data("grad_fc1_weight");
  p.grad_fc1_bias = c.data("grad_fc1_bias");
  const simt::Buffer masked = token_rows(c, "hidden"), scaled = token_rows(c, "hidden");
  const simt::Buffer scaled_a = token_rows(c, "width");
  p.masked_grad = masked.data();
  p.scaled_grad = scaled.data();
  p.scaled_a = scaled_a.data();
  const efrdn_fast::TokenMap& map = p.forward.map;
  const simt::Buffer stats(efrdn_fast::token_stats_floats(map) * sizeof(float));
  const simt::Buffer sums(efrdn_fast::token_sums_floats(map, p.forward.hidden) * sizeof(float));
  const simt::Buffer partial(efrdn_fast::token_hidden_partial_floats(p.forward) * sizeof(float));
  p.stats = floats(stats);
  p.sums = floats(sums);
  p.partial = floats(partial);
  return efrdn_fast::launch_token_hidden_bwd(p, nullptr);
}

cudaError_t token_fold(const Case& c) {
  efrdn_fast::TokenFoldParams p{};
  p.map = token_map(c);
  p.mean = c.number("mean") != 0;
  p.width = static_cast<int>(c.number("width"));
  p.hidden = static_cast<int>(c.number("hidden"));
  p.a = c.map("a");
  p.h = c.map("h");
  p.proj_weight = c.data("proj_weight");
  p.proj_bias = c.data("proj_bias");
  p.fc2_weight = c.data("fc2_weight");
  p.fc2_bias = c.data("fc2_bias");
  p.y = c.map("out");
  return efrdn_fast::launch_token_fold_fwd(p, nullptr);
}

cudaError_t token_fold_bwd(const Case& c) {
  efrdn_fast::TokenFoldBackwardParams p{};
  p.map = token_map(c);
  p.mean = c.number("mean") != 0;
  p.width = static_cast<int>(c.number("width"));
  p.hidden = static_cast<int>(c.number("hidden"));
  p.a = c.data("a");
  p.h = c.data("h");
  p.proj_weight = c.data("proj_weight");
  p.fc2_weight = c.data("fc2_weight");
  p.grad_x = c.map("grad_x");
  p.grad_a = c.data("grad_a");
  p.grad_h = c.data("grad_h");
  p.grad_proj_weight = c.data("grad_proj_weight");
  p.grad_proj_bias = c.data("grad_proj_bias");
  p.grad_fc2_weight = c.data("grad_fc2_weight");
  p.grad_fc2_bias = c.data("grad_fc2_bias");
  const simt::Buffer shared = token_rows(c, "C");
  const int64_t c_count = p.map.c;
  p.shared = {shared.data(), p.map.h * p.map.w * c_count, p.map.w * c_count, c_count};
  const simt::Buffer partial(efrdn_fast::token_fold_partial_floats(p) * sizeof(float));
  p.partial = floats(partial);
  return efrdn_fast::launch_token_fold_bwd(p, nullptr);
}

cudaError_t reduce_rows(const Case& c) {
  efrdn_fast::ReduceTargets targets;
  targets.dtype = c.dtype("first");
  targets.add(c.data("first"), c.number("columns") - 5);
  targets.add(c.data("second"), 5);
  const simt::Buffer partial(efrdn_fast::reduce_rows_room(c.number("rows")) * c.number("columns") *
                             sizeof(float));
  std::memcpy(partial.data(), c.data("rows"),
              c.number("rows") * c.number("columns") * sizeof(float));
  return efrdn_fast::launch_reduce_rows(floats(partial), c.number("rows"), c.number("columns"),
                                        targets, nullptr);
}

const struct {
  const char* name;
  cudaError_t (*run)(const Case&);
} kOps[] = {{"gcrb_fwd", gcrb_fwd},       {"gcrb_bwd", gcrb_bwd},
            {"gcrb_chain_fwd", gcrb_chain_fwd},
            {"gcrb_train", gcrb_train},   {"gcrb_train_bwd", gcrb_train_bwd},
            {"acrb_fwd", acrb_fwd},       {"acrb_bwd", acrb_bwd},
            {"conv3x3_fwd", conv3x3_fwd}, {"emha_fwd", emha_fwd},
            {"emha_bwd", emha_bwd},       {"token_qkv", token_qkv},
            {"token_hidden", token_hidden}, {"token_fold", token_fold},
            {"token_qkv_bwd", token_qkv_bwd}, {"token_hidden_bwd", token_hidden_bwd},
            {"token_fold_bwd", token_fold_bwd}, {"reduce_rows", reduce_rows}};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: runner <op> <case file> <result file>\n");
    return 2;
  }
  for (const auto& op : kOps) {
    if (std::strcmp(op.name, argv[1])) continue;
    const Case arguments(argv[2]);
    const cudaError_t error = op.run(arguments);
    if (error != cudaSuccess) {
      std::fprintf(stderr, "%s: CUDA error %d\n", op.name, error);
      return 4;
    }
    arguments.write(argv[3]);
    return 0;
  }
  std::fprintf(stderr, "no op %s\n", argv[1]);
  return 2;
}
