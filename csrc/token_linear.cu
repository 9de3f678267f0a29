// Rows of tokens times matrices: how a gradient goes back through a Linear.
#include "token.cuh"
#include "token_bwd.h"

namespace efrdn_fast {
namespace {

using namespace token;

template <class L>
__global__ void __launch_bounds__(kThreads, 3) token_linear_kernel(const TokenLinearParams p) {
  using T = typename L::T;
  __shared__ Piece piece;
  const Block<L> block(p.map, blockIdx.x);
  const Rows<T> rows{dynamic_shared(), row_words(p.values, L::kPerWord)};
  if (p.of)
    load_rows<L>(static_cast<const T*>(p.of) + block.row * p.values, p.values, p.values,
                 block.count, rows);
  else
    build<L>(p.map, block, rows);

  float sum[L::kTiles][4];
  for (int i = 0; i < p.count; i++) {
    const bool is_float = p.map.weight_dtype == Dtype::kFloat;
    const Matrix matrix{p.matrix[i], p.width[i], p.values, is_float, true};
    for (int first = 0; first < matrix.rows; first += kOut) {
      multiply<L>(sum, rows, matrix, first, piece);
      each_pair<L>(sum, first, [&](int token, int column, float a, float b) {
        store(block, p.out[i], matrix.rows, token, column, a, b);
      });
    }
  }
}

}  // namespace

cudaError_t launch_token_linear(const TokenLinearParams& p, cudaStream_t stream) {
  EFRDN_FAST_TOKEN_SWITCH(
      p.map, return launch_shared(block_count(p.map), rows_bytes(p.map.dtype, p.values), stream,
                                  token_linear_kernel<L>, p))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
