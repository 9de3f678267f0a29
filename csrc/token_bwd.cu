// Backward through a Linear and a LayerNorm of tokens that are built from the map again: numbers of
// every token, its gradient on chip only, and the gradients of the Linear and the LayerNorm. With z
// the normalised tokens and S = sum over the tokens of z g^T, grad_weight = gamma S + beta sum g,
// grad_gamma = sum over the outputs of weight S, grad_beta = weight^T sum g.
#include "reduce.h"
#include "token.cuh"
#include "token_bwd.h"

namespace efrdn_fast {
namespace {

using namespace token;

// The gradient, 0 where h <= 0, so a NaN passes; also to p.masked, as rows in shared memory.
template <class L>
__device__ void load_masked(const TokenNormBackwardParams& p, const Block<L>& block,
                            const Rows<typename L::T>& rows) {
  using T = typename L::T;
  const int width = p.norm.inner, end = product_words(width, L::kPerWord) * L::kPerWord;
  const int64_t first = block.row * width;
  const T* const grad = static_cast<const T*>(p.grad) + first;
  const T* const h = static_cast<const T*>(p.h) + first;
  T* const masked = static_cast<T*>(p.masked) + first;
  each_own<L>(end, [&](int i, int k) {
    const int64_t at = static_cast<int64_t>(i) * width + k;
    T value = from_float<T>(0.f);
    if (i < block.count && k < width) {
      value = from_float<T>(relu_backward(to_float(__ldg(h + at)), to_float(__ldg(grad + at))));
      masked[at] = value;
    }
    rows[i][k] = value;
  });
}

// The numbers of every token; with `a` its gradient, else what the Linear gives; the rows that
// launch_token_norm_map needs.
template <class L>
__global__ void __launch_bounds__(kThreads, 2)
    token_bwd_rows_kernel(const TokenNormBackwardParams p) {
  using T = typename L::T;
  __shared__ Piece piece;
  __shared__ float part[L::kGroups][L::kTokens][2], stats[L::kTokens][kStats];
  const TokenNorm& norm = p.norm;
  const TokenMap& map = norm.map;
  const Block<L> block(map, blockIdx.x);
  const bool is_float = map.weight_dtype == Dtype::kFloat;
  const int values = 9 * map.c, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Rows<T> tokens{dynamic_shared(), row_words(values, L::kPerWord)};
  unsigned* const behind = tokens.words + L::kTokens * tokens.stride;
  const Rows<T> attended{behind, row_words(norm.width, L::kPerWord)};
  const Rows<T> grads{behind, row_words(norm.inner, L::kPerWord)};  // in the place of attended
  const T* const a = static_cast<const T*>(norm.a) + block.row * norm.width;

  build<L>(map, block, tokens);
  if (norm.a) {
    load_rows<L>(a, norm.width, norm.width, block.count, attended);
    add_projection<L>(tokens, attended, {norm.proj_weight, values, norm.width, is_float},
                      norm.proj_bias, piece);
    __syncthreads();
  } else {
    __syncwarp();
  }
  for (int i = warp * L::kOwn; i < (warp + 1) * L::kOwn; i++) {
    const Moments of = moments(tokens[i], values, norm.eps);
    if (lane == 0) {
      stats[i][kMean] = of.mean;
      stats[i][kIstd] = of.istd;
    }
  }
  if (p.h)
    load_masked<L>(p, block, grads);
  else
    load_rows<L>(static_cast<const T*>(p.grad) + block.row * norm.inner, norm.inner, norm.inner,
                 block.count, grads);

  const Matrix back{norm.weight, values, norm.inner, is_float, true};
  float sum[L::kTiles][4], along[2] = {}, across[2] = {};
  for (int first = 0; first < values; first += kOut) {
    multiply<L>(sum, grads, back, first, piece);
    each_result<L>(first, [&](int j, int i, int token, int column) {
      if (column >= values) return;
      const float grad = sum[j][i] * weight_at<T>(norm.gamma, column, is_float);
      const float centred = to_float(tokens[token][column]) - stats[token][kMean];
      along[i / 2] += grad;
      across[i / 2] = fmaf(grad, centred * stats[token][kIstd], across[i / 2]);
    });
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      along[r] += __shfl_xor_sync(kAllLanes, along[r], lanes);
      across[r] += __shfl_xor_sync(kAllLanes, across[r], lanes);
    }
    if (lane % 4 == 0) {
      float* const to = part[warp % L::kGroups][warp / L::kGroups * 16 + lane / 4 + r * 8];
      to[0] = along[r];
      to[1] = across[r];
    }
  }
  __syncthreads();
  if (threadIdx.x < L::kTokens) {
    float* const of = stats[threadIdx.x];
    float sums[2] = {};
#pragma unroll
    for (int group = 0; group < L::kGroups; group++)
#pragma unroll
      for (int i = 0; i < 2; i++) sums[i] += part[group][threadIdx.x][i];
    of[kOffset] = -of[kIstd] * sums[0] / values;
    of[kSlope] = -of[kIstd] * of[kIstd] * sums[1] / values;
    if (threadIdx.x < block.count)
#pragma unroll
      for (int i = 0; i < kStats; i++) p.stats[(block.row + threadIdx.x) * kStats + i] = of[i];
  }
  __syncthreads();

  const auto scaled = [&](void* to, int width, TokenStat factor, const auto& value) {
    each_own<L>(width, [&](int i, int k) {
      if (i < block.count)
        static_cast<T*>(to)[(block.row + i) * width + k] =
            from_float<T>(stats[i][factor] * to_float(value(i, k)));
    });
  };
  scaled(p.scaled_grad, norm.inner, kIstd, [&](int i, int k) { return grads[i][k]; });
  if (norm.a) {
    scaled(p.scaled_a, norm.width, kSlope,
           [&](int i, int k) { return __ldg(a + static_cast<int64_t>(i) * norm.width + k); });
    for (int first = 0; first < values; first += kOut) {
      multiply<L>(sum, grads, back, first, piece);
      each_result<L>(first, [&](int j, int i, int token, int column) {
        if (column >= values) return;
        const float* const of = stats[token];
        const float grad = sum[j][i] * weight_at<T>(norm.gamma, column, is_float);
        T& at = tokens[token][column];
        at = from_float<T>(
            fmaf(grad, of[kIstd], fmaf(to_float(at) - of[kMean], of[kSlope], of[kOffset])));
      });
    }
  } else {
    for (int i = warp * L::kOwn; i < (warp + 1) * L::kOwn; i++)
      normalise_row(tokens[i], values, {stats[i][kMean], stats[i][kIstd]}, norm.gamma, norm.beta,
                    is_float);
  }
  const Matrix last = norm.a ? Matrix{norm.proj_weight, norm.width, values, is_float, true}
                             : Matrix{norm.weight, norm.inner, values, is_float};
  for (int first = 0; first < last.rows; first += kOut) {
    multiply<L>(sum, tokens, last, first, piece);
    each_pair<L>(sum, first, [&](int token, int column, float x, float y) {
      store(block, p.out, last.rows, token, column, x, y);
    });
  }
}

constexpr int kColumns = 32, kSlots = 8;  // of a block of the kernel below

// From S^T [inner, 9 C] and, behind it, sum g [inner].
template <typename T>
__global__ void __launch_bounds__(kColumns* kSlots)
    token_bwd_norm_kernel(const TokenNormBackwardParams p) {
  __shared__ float parts[kSlots][kColumns][2];
  const TokenNorm& norm = p.norm;
  const int values = 9 * norm.map.c, slot = threadIdx.x / kColumns;
  const int lane = threadIdx.x % kColumns, k = blockIdx.x * kColumns + lane;
  const float* const total = p.sums + static_cast<int64_t>(norm.inner) * values;
  const auto weight = [](const void* data, int64_t i) {
    return to_float(__ldg(static_cast<const T*>(data) + i));
  };
  float gamma_sum = 0.f, beta_sum = 0.f;
  if (k < values) {
    const float gamma = weight(norm.gamma, k), beta = weight(norm.beta, k);
    for (int l = slot; l < norm.inner; l += kSlots) {
      const int64_t at = static_cast<int64_t>(l) * values + k;
      const float w = weight(norm.weight, at), product = __ldg(p.sums + at);
      gamma_sum = fmaf(w, product, gamma_sum);
      beta_sum = fmaf(w, __ldg(total + l), beta_sum);
      static_cast<T*>(p.grad_weight)[at] =
          from_float<T>(fmaf(product, gamma, __ldg(total + l) * beta));
    }
  }
  parts[slot][lane][0] = gamma_sum;
  parts[slot][lane][1] = beta_sum;
  __syncthreads();
  if (p.grad_bias && blockIdx.x == 0)
    for (int l = threadIdx.x; l < norm.inner; l += kColumns * kSlots)
      static_cast<T*>(p.grad_bias)[l] = from_float<T>(__ldg(total + l));
  if (slot > 0 || k >= values) return;
  gamma_sum = beta_sum = 0.f;
#pragma unroll
  for (int i = 0; i < kSlots; i++) {
    gamma_sum += parts[i][lane][0];
    beta_sum += parts[i][lane][1];
  }
  static_cast<T*>(p.grad_gamma)[k] = from_float<T>(gamma_sum);
  static_cast<T*>(p.grad_beta)[k] = from_float<T>(beta_sum);
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t rows_shared_bytes(const TokenNorm& norm) {
  return token_shared_bytes(norm.map.dtype, norm.map.c, larger(norm.inner, norm.width));
}

int64_t partial_floats(const TokenNorm& norm) {
  const int64_t values = 9 * norm.map.c;
  return larger(token_outer_floats(norm.map, values, norm.inner, norm.inner),
                norm.a ? token_outer_floats(norm.map, values, norm.width, values) : 0);
}

// From the gradient behind the Linear to those of the map, of `a` and of all weights.
cudaError_t through_norm(const TokenNormBackwardParams& p, cudaStream_t stream) {
  const TokenMap& map = p.norm.map;
  const int64_t bytes = rows_shared_bytes(p.norm);
  cudaError_t error = cudaErrorInvalidValue;
  EFRDN_FAST_TOKEN_SWITCH(
      map, error = launch_shared(block_count(map), bytes, stream, token_bwd_rows_kernel<L>, p))
  if (error == cudaSuccess) error = launch_token_norm_map(p, stream);
  if (error != cudaSuccess) return error;

  TokenOuterParams outer{};
  outer.norm = p.norm;
  outer.columns = 9 * map.c;
  outer.stats = p.stats;
  outer.partial = p.partial;
  const void* const grad = p.h ? p.masked : p.grad;
  outer.left = TokenOuterParams::kNormed;
  outer.rows = grad;
  outer.count = p.norm.inner;
  outer.rows_first = true;
  outer.sums = TokenOuterParams::kOfRows;
  const int64_t products = static_cast<int64_t>(outer.columns) * outer.count;
  error = launch_token_outer(outer, p.sums, p.sums + products, Dtype::kFloat, stream);
  if (error != cudaSuccess) return error;
  EFRDN_FAST_DTYPE_SWITCH(
      map.weight_dtype, error = launch(token_bwd_norm_kernel<T>, ceil_div(outer.columns, kColumns),
                                       kColumns * kSlots, stream, p))
  if (error != cudaSuccess || !p.norm.a) return error;

  outer.left = TokenOuterParams::kGradient;
  outer.of = grad;
  outer.rows = p.norm.a;
  outer.count = p.norm.width;
  outer.rows_first = false;
  outer.sums = TokenOuterParams::kOfLeft;
  return launch_token_outer(outer, p.grad_proj_weight, p.grad_proj_bias, map.weight_dtype, stream);
}

TokenNorm norm_of(const TokenQkvParams& f) {
  TokenNorm norm{};
  norm.map = f.map;
  norm.eps = f.eps;
  norm.inner = f.inner;
  norm.gamma = f.gamma;
  norm.beta = f.beta;
  norm.weight = f.reduce;
  return norm;
}

TokenNorm norm_of(const TokenHiddenParams& f) {
  return {f.map,         f.eps,       f.width, f.hidden, f.a,
          f.proj_weight, f.proj_bias, f.gamma, f.beta,   f.fc1_weight};
}

}  // namespace

int64_t token_stats_floats(const TokenMap& map) { return map.n * map.h * map.w * kStats; }

int64_t token_sums_floats(const TokenMap& map, int64_t width) { return (9 * map.c + 1) * width; }

int64_t token_qkv_partial_floats(const TokenQkvParams& f) {
  return larger(partial_floats(norm_of(f)), token_outer_floats(f.map, f.outer, f.inner, 0));
}

int64_t token_hidden_partial_floats(const TokenHiddenParams& f) {
  return partial_floats(norm_of(f));
}

int64_t token_qkv_bwd_shared_bytes(const TokenQkvParams& f) {
  return larger(larger(rows_bytes(f.map.dtype, f.outer), rows_shared_bytes(norm_of(f))),
                token_outer_shared_bytes(f.map.dtype, f.inner, 0));
}

int64_t token_hidden_bwd_shared_bytes(const TokenHiddenParams& f) {
  return larger(rows_shared_bytes(norm_of(f)),
                token_outer_shared_bytes(f.map.dtype, f.width, f.hidden));
}

cudaError_t launch_token_qkv_bwd(const TokenQkvBackwardParams& p, cudaStream_t stream) {
  const TokenQkvParams& f = p.forward;
  TokenLinearParams linear{};
  linear.map = f.map;
  linear.of = p.grad;
  linear.values = f.outer;
  linear.count = 1;
  linear.matrix[0] = f.qkv;
  linear.width[0] = f.inner;
  linear.out[0] = p.inner_grad;
  cudaError_t error = launch_token_linear(linear, stream);
  if (error != cudaSuccess) return error;

  TokenNormBackwardParams back{};
  back.norm = norm_of(f);
  back.grad = p.inner_grad;
  back.grad_x = p.grad_x;
  back.out = p.reduced;
  back.scaled_grad = p.scaled_grad;
  back.grad_gamma = p.grad_gamma;
  back.grad_beta = p.grad_beta;
  back.grad_weight = p.grad_reduce;
  back.stats = p.stats;
  back.partial = p.partial;
  back.sums = p.sums;
  error = through_norm(back, stream);
  if (error != cudaSuccess) return error;

  TokenOuterParams outer{};
  outer.norm.map = f.map;
  outer.left = TokenOuterParams::kRows;
  outer.of = p.grad;
  outer.columns = f.outer;
  outer.rows = p.reduced;
  outer.count = f.inner;
  outer.partial = p.partial;
  return launch_token_outer(outer, p.grad_qkv, nullptr, f.map.weight_dtype, stream);
}

cudaError_t launch_token_hidden_bwd(const TokenHiddenBackwardParams& p, cudaStream_t stream) {
  const TokenHiddenParams& f = p.forward;
  TokenNormBackwardParams back{};
  back.norm = norm_of(f);
  back.grad = p.grad;
  back.h = f.h;
  back.grad_x = p.grad_x;
  back.out = p.grad_a;
  back.masked = p.masked_grad;
  back.scaled_grad = p.scaled_grad;
  back.scaled_a = p.scaled_a;
  back.grad_proj_weight = p.grad_proj_weight;
  back.grad_proj_bias = p.grad_proj_bias;
  back.grad_gamma = p.grad_gamma;
  back.grad_beta = p.grad_beta;
  back.grad_weight = p.grad_fc1_weight;
  back.grad_bias = p.grad_fc1_bias;
  back.stats = p.stats;
  back.partial = p.partial;
  back.sums = p.sums;
  return through_norm(back, stream);
}

}  // namespace efrdn_fast
