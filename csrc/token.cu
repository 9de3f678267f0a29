// Tokens to q k v and to the hidden layer of the MLP.
#include "token.cuh"

namespace efrdn_fast {
namespace {

using namespace token;

// LayerNorm of the warp's own tokens, in place.
template <class L, class Params>
__device__ void normalise(const Params& p, const Rows<typename L::T>& rows) {
  const int own = threadIdx.x / kWarp * L::kOwn, values = 9 * p.map.c;
  for (int i = own; i < own + L::kOwn; i++)
    normalise_row(rows[i], values, moments(rows[i], values, p.eps), p.gamma, p.beta,
                  p.map.weight_dtype == Dtype::kFloat);
}

template <class L>
__global__ void __launch_bounds__(kThreads, 3) token_qkv_fwd_kernel(const TokenQkvParams p) {
  using T = typename L::T;
  __shared__ Piece piece;
  const Block<L> block(p.map, blockIdx.x);
  const bool is_float = p.map.weight_dtype == Dtype::kFloat;
  const Rows<T> tokens{dynamic_shared(), row_words(9 * p.map.c, L::kPerWord)};
  const Rows<T> reduced{tokens.words + L::kTokens * tokens.stride, row_words(p.inner, L::kPerWord)};
  build<L>(p.map, block, tokens);
  __syncwarp();
  normalise<L>(p, tokens);

  float sum[L::kTiles][4];
  const int end = product_words(p.inner, L::kPerWord) * L::kPerWord;
  for (int first = 0; first < p.inner; first += kOut) {
    multiply<L>(sum, tokens, {p.reduce, p.inner, 9 * p.map.c, is_float}, first, piece);
    each_pair<L>(sum, first, [&](int token, int column, float a, float b) {
      if (column < end) Pack<T, 2>::from_floats({a, b}).store(reduced[token] + column);
    });
  }
  for (int first = 0; first < p.outer; first += kOut) {
    multiply<L>(sum, reduced, {p.qkv, p.outer, p.inner, is_float}, first, piece);
    each_pair<L>(sum, first, [&](int token, int column, float a, float b) {
      store(block, p.out, p.outer, token, column, a, b);
    });
  }
}

template <class L>
__global__ void __launch_bounds__(kThreads, 3) token_hidden_fwd_kernel(const TokenHiddenParams p) {
  using T = typename L::T;
  __shared__ Piece piece;
  const Block<L> block(p.map, blockIdx.x);
  const bool is_float = p.map.weight_dtype == Dtype::kFloat;
  const int values = 9 * p.map.c;
  const Rows<T> tokens{dynamic_shared(), row_words(values, L::kPerWord)};
  const Rows<T> attended{tokens.words + L::kTokens * tokens.stride,
                         row_words(p.width, L::kPerWord)};
  build<L>(p.map, block, tokens);
  load_rows<L>(static_cast<const T*>(p.a) + block.n * p.a_stride_n + block.first * p.a_stride_t,
               p.a_stride_t, p.width, block.count, attended);
  add_projection<L>(tokens, attended, {p.proj_weight, values, p.width, is_float}, p.proj_bias,
                    piece);
  __syncthreads();
  normalise<L>(p, tokens);

  float sum[L::kTiles][4];
  const auto weight = [&](const void* data, int i) { return weight_at<T>(data, i, is_float); };
  for (int first = 0; first < p.hidden; first += kOut) {
    multiply<L>(sum, tokens, {p.fc1_weight, p.hidden, values, is_float}, first, piece);
    each_pair<L>(sum, first, [&](int token, int column, float a, float b) {
      const float offset0 = column < p.hidden ? weight(p.fc1_bias, column) : 0.f;
      const float offset1 = column + 1 < p.hidden ? weight(p.fc1_bias, column + 1) : 0.f;
      store(block, p.h, p.hidden, token, column, relu(a + offset0), relu(b + offset1));
    });
  }
}

}  // namespace

int64_t token_shared_bytes(Dtype dtype, int64_t c, int64_t width) {
  return rows_bytes(dtype, 9 * c) + rows_bytes(dtype, width);
}

cudaError_t launch_token_qkv_fwd(const TokenQkvParams& p, cudaStream_t stream) {
  const int64_t bytes = token_shared_bytes(p.map.dtype, p.map.c, p.inner);
  EFRDN_FAST_TOKEN_SWITCH(
      p.map, return launch_shared(block_count(p.map), bytes, stream, token_qkv_fwd_kernel<L>, p))
  return cudaErrorInvalidValue;
}

cudaError_t launch_token_hidden_fwd(const TokenHiddenParams& p, cudaStream_t stream) {
  const int64_t bytes = token_shared_bytes(p.map.dtype, p.map.c, p.width);
  EFRDN_FAST_TOKEN_SWITCH(
      p.map, return launch_shared(block_count(p.map), bytes, stream, token_hidden_fwd_kernel<L>, p))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
