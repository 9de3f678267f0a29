// Steps that the backward passes of the token ops share. All rows of tokens are contiguous.
#pragma once

#include "token.h"

namespace efrdn_fast {

// rows M, of the tokens of the map or of `of`, for up to two matrices [values, width].
struct TokenLinearParams {
  static constexpr int kMax = 2;
  TokenMap map;
  const void* of;  // [N, H W, values]; null: the map's tokens, values = 9 C
  int values, count;
  const void* matrix[kMax];
  int width[kMax];
  void* out[kMax];  // [N, H W, width]
};

cudaError_t launch_token_linear(const TokenLinearParams& params, cudaStream_t stream);

// A Linear behind the LayerNorm of the tokens t: of the map or, with `a`, of the map + proj(a).
struct TokenNorm {
  TokenMap map;
  float eps;
  int width, inner;
  const void *a, *proj_weight, *proj_bias;  // null: none; [N, H W, width], [9 C, width], [9 C]
  const void *gamma, *beta, *weight;        // [9 C], [9 C], [inner, 9 C]
};

// Numbers of a token, kStats floats: z = (t - mean) istd, and with g the gradient behind the Linear
// dt = istd gamma weight^T g + slope (t - mean) + offset.
enum TokenStat { kIstd, kSlope, kOffset, kMean, kStats };

// sum over the tokens of left^T rows, [columns, count], by chunks of them: a row of `partial` each,
// then the sums of left or of `rows` over the tokens.
struct TokenOuterParams {
  enum Left {
    kRows,      // `of`
    kTokens,    // the map's tokens
    kNormed,    // z of `norm`
    kGradient,  // dt of `norm`, `rows` being its a and `of` the gradient behind its Linear
  };
  enum Sums { kNone, kOfLeft, kOfRows };
  TokenNorm norm;  // kRows, kTokens: the map only
  Left left;
  Sums sums;
  bool rows_first;     // [count, columns] in memory, else [columns, count]
  int columns, count;  // columns: 9 C but of kRows
  const void *of, *rows;
  const float* stats;
  float* partial;
};

int64_t token_outer_floats(const TokenMap& map, int64_t columns, int64_t count, int64_t sums);
// beside: values of a row of `a` or `of`, where a kernel needs them beside `rows`.
int64_t token_outer_shared_bytes(Dtype dtype, int64_t count, int64_t beside);
// Adds the chunks' rows: the matrix to `out`, the sums, unless there are none, to `sums`.
cudaError_t launch_token_outer(const TokenOuterParams& params, void* out, void* sums, Dtype dtype,
                               cudaStream_t stream);

struct TokenNormBackwardParams {
  TokenNorm norm;
  const void *grad, *h;  // [N, H W, inner]; h: grad counts where h > 0; null: everywhere
  Map grad_x;
  void* out;     // [N, H W, width] gradient of a; without a [N, H W, inner] of the Linear
  void* masked;  // grad where it counts; without h not used
  void *scaled_grad, *scaled_a;  // istd grad, slope a
  void *grad_proj_weight, *grad_proj_bias, *grad_gamma, *grad_beta, *grad_weight;
  void* grad_bias;  // of the Linear, or null
  float *stats, *partial, *sums;
};

// grad_x from stats and the scaled rows.
cudaError_t launch_token_norm_map(const TokenNormBackwardParams& params, cudaStream_t stream);

}  // namespace efrdn_fast
