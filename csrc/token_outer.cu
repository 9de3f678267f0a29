// Gradients of the matrices around tokens: sums over all tokens of products of two rows. A block
// takes 48 columns of the left rows and up to 160 of the right ones over a chunk of the tokens, and
// leaves its sums to reduce.cu, so that they are the same in every run.
#include "reduce.h"
#include "token.cuh"
#include "token_bwd.h"

namespace efrdn_fast {
namespace {

using namespace token;

constexpr int kChunks = 64;                              // at most
constexpr int kLeftTiles = kOut / 16, kRightTiles = 5;   // of 16 and of 8 values, of a warp
constexpr int kRightColumns = kRightTiles * kWarps * 8;  // of a block
constexpr int kOwnSums = (kRightColumns + kThreads - 1) / kThreads;

struct Chunks {
  int64_t blocks, each, count;

  explicit Chunks(const TokenMap& map) : blocks(block_count(map)) {
    each = ceil_div(blocks, kChunks);
    count = blocks ? ceil_div(blocks, each) : 1;  // one of nothing writes zeros
  }
};

int64_t sum_count(const TokenOuterParams& p) {
  switch (p.sums) {
    case TokenOuterParams::kOfLeft:
      return p.columns;
    case TokenOuterParams::kOfRows:
      return p.count;
    default:
      return 0;
  }
}

// 8 values, from `value` on, of 4 words of tokens from `token` on, words along the tokens: the lane
// g, t gets value g of the words t and t + 4.
template <class L>
__device__ void along_tokens(unsigned (&words)[2], const Rows<typename L::T>& rows, int token,
                             int value) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (L::kPerWord == 2) {
    load_turned(words, reinterpret_cast<const unsigned*>(rows[token + lane % 16] + value));
  } else {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float x = rows[token + lane % 4 + 4 * i][value + lane / 4];
      words[i] = L::kPasses == 1 ? to_tf32(x) : float_to_bits(x);
    }
  }
}

template <typename T>
__device__ Rows<T> pick(bool first, const Rows<T>& a, const Rows<T>& b) {
  return {first ? a.words : b.words, first ? a.stride : b.stride};  // by value: in registers
}

// left = columns [first, first + kOut) of the left rows, 0 behind the last column and token.
template <class L>
__device__ void load_left(const TokenOuterParams& p, const Block<L>& block, int first,
                          const Rows<typename L::T>& a, const Rows<typename L::T>& g,
                          const Rows<typename L::T>& left, Piece& piece) {
  using T = typename L::T;
  const TokenMap& map = p.norm.map;
  const bool is_float = map.weight_dtype == Dtype::kFloat;
  const auto stat = [&](int token, int i) {
    return __ldg(p.stats + (block.row + token) * kStats + i);
  };
  const bool normed = p.left == TokenOuterParams::kNormed && !p.norm.a;
  each_token(map, block, [&](int i, int64_t h, int64_t w) {
    for (int c = threadIdx.x % kWarp; c < kOut; c += kWarp) {
      const int k = first + c;
      T value = from_float<T>(0.f);
      if (i < block.count && k < p.columns) {
        value = p.left == TokenOuterParams::kRows
                    ? __ldg(static_cast<const T*>(p.of) + (block.row + i) * p.columns + k)
                    : token_value<T>(map, block.n, h, w, k / 9, k % 9);
        if (normed) value = from_float<T>((to_float(value) - stat(i, kMean)) * stat(i, kIstd));
      }
      left[i][c] = value;
    }
  });
  if (!p.norm.a) return;

  float t[L::kTiles][4], back[L::kTiles][4];
  const bool is_gradient = p.left == TokenOuterParams::kGradient;
  multiply<L>(t, a, {p.norm.proj_weight, p.columns, p.norm.width, is_float}, first, piece);
  if (is_gradient)
    multiply<L>(back, g, {p.norm.weight, p.columns, p.norm.inner, is_float, true}, first, piece);
  each_result<L>(0, [&](int j, int i, int token, int c) {
    const int k = first + c;
    if (token >= block.count || k >= p.columns) return;
    T& at = left[token][c];
    const float centred =
        to_float(at) + t[j][i] + weight_at<T>(p.norm.proj_bias, k, is_float) - stat(token, kMean);
    float value = centred * stat(token, kIstd);
    if (is_gradient) {
      const float scaled = back[j][i] * weight_at<T>(p.norm.gamma, k, is_float);
      value = fmaf(scaled, stat(token, kIstd),
                   fmaf(centred, stat(token, kSlope), stat(token, kOffset)));
    }
    at = from_float<T>(value);
  });
}

template <class L>
__global__ void __launch_bounds__(kThreads, 2)
    token_outer_kernel(const TokenOuterParams p, int64_t blocks, int64_t each, int64_t row_floats) {
  using T = typename L::T;
  __shared__ Piece piece;
  const auto slices = static_cast<unsigned>(ceil_div(p.columns, kOut));
  const auto parts = static_cast<unsigned>(ceil_div(p.count, kRightColumns));
  const int first = static_cast<int>(blockIdx.x % slices) * kOut;
  const int first_right = static_cast<int>(blockIdx.x / slices % parts) * kRightColumns;
  const int64_t chunk = blockIdx.x / slices / parts;

  const bool is_gradient = p.left == TokenOuterParams::kGradient;
  const int beside_values = is_gradient ? p.norm.inner : p.norm.a ? p.norm.width : 0;
  const Rows<T> left{dynamic_shared(), row_words(kOut, L::kPerWord)};
  const Rows<T> right{left.words + L::kTokens * left.stride, row_words(p.count, L::kPerWord)};
  const Rows<T> beside{right.words + L::kTokens * right.stride,
                       row_words(beside_values, L::kPerWord)};
  const int end = product_words(p.count, L::kPerWord) * L::kPerWord;

  float sum[kLeftTiles][kRightTiles][4] = {}, own_sum[kOwnSums] = {};
  const int64_t last = (chunk + 1) * each < blocks ? (chunk + 1) * each : blocks;
  for (int64_t index = chunk * each; index < last; index++) {
    const Block<L> block(p.norm.map, static_cast<unsigned>(index));
    __syncthreads();
    load_rows<L>(static_cast<const T*>(p.rows) + block.row * p.count, p.count, p.count, block.count,
                 right);
    if (beside_values)
      load_rows<L>(static_cast<const T*>(is_gradient ? p.of : p.norm.a) + block.row * beside_values,
                   beside_values, beside_values, block.count, beside);
    load_left<L>(p, block, first, pick(is_gradient, right, beside), beside, left, piece);
    __syncthreads();

#pragma unroll 1
    for (int token = 0; token < L::kTokens; token += 8 * L::kPerWord) {
      Operand<4, L::kPasses> a[kLeftTiles];
#pragma unroll
      for (int i = 0; i < kLeftTiles; i++) {
        unsigned low[2], high[2];
        along_tokens<L>(low, left, token, i * 16);
        along_tokens<L>(high, left, token, i * 16 + 8);
        a[i] = split<L::kPasses>({low[0], high[0], low[1], high[1]});
      }
#pragma unroll
      for (int j = 0; j < kRightTiles; j++) {
        const int value = first_right + (j * kWarps + static_cast<int>(threadIdx.x) / kWarp) * 8;
        if (value >= end) break;
        unsigned words[2];
        along_tokens<L>(words, right, token, value);
        const auto b = split<L::kPasses>(words);
#pragma unroll
        for (int i = 0; i < kLeftTiles; i++) {
          float part[4] = {};
          product<T, L::kPasses>(L::kPasses == 1 ? sum[i][j] : part, a[i], b);
          // Tensor cores truncate: a step's sum, still small, loses less than the total would.
          if constexpr (L::kPasses > 1)
#pragma unroll
            for (int k = 0; k < 4; k++) sum[i][j][k] += part[k];
        }
      }
    }
    const bool of_left = p.sums == TokenOuterParams::kOfLeft;
    if (p.sums == TokenOuterParams::kNone || (of_left ? first_right : first)) continue;
    const Rows<T> summed = pick(of_left, left, right);
#pragma unroll
    for (int i = 0; i < kOwnSums; i++) {
      const int k = static_cast<int>(threadIdx.x) + i * kThreads;
      if (of_left ? k >= kOut : k >= kRightColumns || first_right + k >= p.count) continue;
      for (int token = 0; token < L::kTokens; token++)
        own_sum[i] += to_float(summed[token][of_left ? k : first_right + k]);
    }
  }

  float* const row = p.partial + chunk * row_floats;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kLeftTiles; i++)
#pragma unroll
    for (int j = 0; j < kRightTiles; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int column = first + i * 16 + lane / 4 + k / 2 * 8;
        const int value = first_right + (j * kWarps + static_cast<int>(threadIdx.x) / kWarp) * 8 +
                          lane % 4 * 2 + k % 2;
        if (column < p.columns && value < p.count)
          row[p.rows_first ? static_cast<int64_t>(value) * p.columns + column
                           : static_cast<int64_t>(column) * p.count + value] = sum[i][j][k];
      }
  const bool of_left = p.sums == TokenOuterParams::kOfLeft;
  if (p.sums == TokenOuterParams::kNone || (of_left ? first_right : first)) return;
  float* const sums = row + static_cast<int64_t>(p.columns) * p.count;
#pragma unroll
  for (int i = 0; i < kOwnSums; i++) {
    const int k = static_cast<int>(threadIdx.x) + i * kThreads;
    if (of_left ? k < kOut && first + k < p.columns
                : k < kRightColumns && first_right + k < p.count)
      sums[of_left ? first + k : first_right + k] = own_sum[i];
  }
}

}  // namespace

int64_t token_outer_floats(const TokenMap& map, int64_t columns, int64_t count, int64_t sums) {
  return reduce_rows_room(Chunks(map).count) * (columns * count + sums);
}

int64_t token_outer_shared_bytes(Dtype dtype, int64_t count, int64_t beside) {
  return rows_bytes(dtype, kOut) + rows_bytes(dtype, count) +
         (beside ? rows_bytes(dtype, beside) : 0);
}

cudaError_t launch_token_outer(const TokenOuterParams& p, void* out, void* sums, Dtype dtype,
                               cudaStream_t stream) {
  const Chunks chunks(p.norm.map);
  const int64_t products = static_cast<int64_t>(p.columns) * p.count;
  const int64_t row_floats = products + sum_count(p);
  const int beside = p.left == TokenOuterParams::kGradient ? p.norm.inner : p.norm.width;
  const int64_t bytes = token_outer_shared_bytes(p.norm.map.dtype, p.count, p.norm.a ? beside : 0);
  const int64_t blocks =
      chunks.count * ceil_div(p.columns, kOut) * ceil_div(p.count, kRightColumns);
  cudaError_t error = cudaErrorInvalidValue;
  EFRDN_FAST_TOKEN_SWITCH(p.norm.map,
                          error = launch_shared(blocks, bytes, stream, token_outer_kernel<L>, p,
                                                chunks.blocks, chunks.each, row_floats))
  if (error != cudaSuccess) return error;
  ReduceTargets targets;
  targets.dtype = dtype;
  targets.add(out, products);
  if (sum_count(p)) targets.add(sums, sum_count(p));
  return launch_reduce_rows(p.partial, chunks.count, row_floats, targets, stream);
}

}  // namespace efrdn_fast
