// Attention inside segments, backward, in three kernels: delta = sum of grad_out * out over the
// values of a head; gradients of q, a block holding queries and streaming over keys; gradients of k
// and v, a block holding keys and streaming over queries. The weights are computed again from the
// saved log-sum-exp. Every value is summed in one place, in a fixed order.
//
// With weights P = exp(q k^T / sqrt(d) - lse): dV = P^T dO, dS = P * (dO V^T - delta),
// dQ = dS K / sqrt(d), dK = dS^T Q / sqrt(d).
#include "emha.cuh"

namespace efrdn_fast {
namespace {

constexpr int kRows = kEmhaWarps * 16;

template <typename T>
__global__ void __launch_bounds__(kEmhaThreads) emha_delta_kernel(const EmhaBackwardParams p) {
  const EmhaParams& f = p.forward;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kEmhaThreads + threadIdx.x;
  if (index >= f.n * f.tokens * f.heads) return;
  const int64_t head = index % f.heads, token = index / f.heads % f.tokens;
  const int64_t n = index / f.heads / f.tokens;
  const T* const out = static_cast<const T*>(f.out) + index * f.d;
  const T* const grad = static_cast<const T*>(p.grad_out) + n * p.grad_stride_n +
                        token * p.grad_stride_t + head * f.d;
  float sum = 0.f;
  for (int i = 0; i < f.d; i++) sum = fmaf(to_float(grad[i]), to_float(out[i]), sum);
  p.delta[(n * f.heads + head) * f.tokens + token] = sum;
}

// kOfKeys: rows are keys and columns queries, for the gradients of k and v; else the other way.
template <class L, bool kOfKeys>
__global__ void __launch_bounds__(kEmhaThreads, 2)
    emha_bwd_kernel(const EmhaBackwardParams p, bool aligned, bool grad_aligned, bool out_aligned) {
  using T = typename L::T;
  constexpr int kColumnTiles = L::kColumns / 8, kGroups = L::kColumns / L::kGroup;
  // q or k, grad_out or v of the rows; k or q, v or grad_out of the columns
  __shared__ __align__(16) typename L::Row rows0[kRows], rows1[kRows];
  __shared__ __align__(16) typename L::Row columns0[L::kColumns], columns1[L::kColumns];
  __shared__ float column_shift[L::kColumns], column_delta[L::kColumns];
  const EmhaParams& f = p.forward;
  const EmhaBlock block(f, kRows);
  const int64_t columns = block.end - block.begin, rows = block.end - block.first;
  if (rows <= 0) return;
  const int t = threadIdx.x % 4, row = threadIdx.x / kWarp * 16;
  const int64_t statistics = (block.n * f.heads + block.head) * f.tokens;

  const T* const grad_out = static_cast<const T*>(p.grad_out) + block.n * p.grad_stride_n +
                            static_cast<int64_t>(block.head) * f.d;
  const T* const matrix[3] = {block.in_qkv<T>(f, 0), block.in_qkv<T>(f, 1), block.in_qkv<T>(f, 2)};
  stage_rows<L>(rows0, kRows, matrix[kOfKeys] + block.first * f.stride_t, f.stride_t, rows, f.d,
                aligned);
  const T* const of_rows1 = kOfKeys ? matrix[2] : grad_out;
  const int64_t rows1_stride = kOfKeys ? f.stride_t : p.grad_stride_t;
  stage_rows<L>(rows1, kRows, of_rows1 + block.first * rows1_stride, rows1_stride, rows, f.d,
                kOfKeys ? aligned : grad_aligned);
  const T* const of_columns0 = matrix[!kOfKeys] + block.begin * f.stride_t;
  const int64_t columns1_stride = kOfKeys ? p.grad_stride_t : f.stride_t;
  const T* const of_columns1 =
      (kOfKeys ? grad_out : matrix[2]) + block.begin * columns1_stride;

  const float scale = kLog2E / sqrtf(static_cast<float>(f.d));
  float row_shift[2] = {}, row_delta[2] = {};
  if constexpr (!kOfKeys) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int64_t token = block.first + row + r * 8 + threadIdx.x % kWarp / 4;
      if (token >= block.end) continue;
      row_shift[r] = f.lse[statistics + token] * kLog2E;
      row_delta[r] = p.delta[statistics + token];
    }
  }

  float grad0[L::kTiles][4] = {}, grad1[kOfKeys ? L::kTiles : 1][4] = {};
  for (int64_t first = 0; first < columns; first += L::kColumns) {
    __syncthreads();
    stage_rows<L>(columns0, L::kColumns, of_columns0 + first * f.stride_t, f.stride_t,
                  columns - first, f.d, aligned);
    stage_rows<L>(columns1, L::kColumns, of_columns1 + first * columns1_stride, columns1_stride,
                  columns - first, f.d, kOfKeys ? grad_aligned : aligned);
    if constexpr (kOfKeys)
      if (threadIdx.x < L::kColumns) {
        const int64_t token = block.begin + first + threadIdx.x;
        const bool inside = token < block.end;
        column_shift[threadIdx.x] = inside ? f.lse[statistics + token] * kLog2E : INFINITY;
        column_delta[threadIdx.x] = inside ? p.delta[statistics + token] : 0.f;
      }
    __syncthreads();

    float weight[kColumnTiles][4] = {}, grad[kColumnTiles][4] = {};
    add_scores<L>(weight, rows0 + row, columns0);
    add_scores<L>(grad, rows1 + row, columns1);
#pragma unroll
    for (int j = 0; j < kColumnTiles; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = j * 8 + t * 2 + i % 2;
        const float shift = kOfKeys ? column_shift[column] : row_shift[i / 2];
        const float delta = kOfKeys ? column_delta[column] : row_delta[i / 2];
        const bool inside = kOfKeys || first + column < columns;
        weight[j][i] = inside ? exp2_fast(fmaf(weight[j][i], scale, -shift)) : 0.f;
        grad[j][i] = weight[j][i] * (grad[j][i] - delta);
      }
    Operand<4, L::kPasses> left[kGroups];
    if constexpr (kOfKeys) {
      as_left<L>(left, weight);
      add_product<L>(grad1, left, columns1);
    }
    as_left<L>(left, grad);
    add_product<L>(grad0, left, columns0);
  }

  T* const to = block.in_tokens<T>(p.grad_qkv, f, 3 * f.heads);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int64_t token = block.first + row + r * 8 + threadIdx.x % kWarp / 4;
    if (token >= block.end) continue;
    const int64_t third = static_cast<int64_t>(f.heads) * f.d;
    T* const of_token = to + token * 3 * third;
#pragma unroll
    for (int tile = 0; tile < L::kTiles; tile++) {
      const float factor = scale / kLog2E;
      store_pair(of_token + kOfKeys * third, tile, f.d, grad0[tile][2 * r] * factor,
                 grad0[tile][2 * r + 1] * factor, out_aligned);
      if constexpr (kOfKeys)
        store_pair(of_token + 2 * third, tile, f.d, grad1[tile][2 * r], grad1[tile][2 * r + 1],
                   out_aligned);
    }
  }
}

template <class L>
cudaError_t run(const EmhaBackwardParams& p, cudaStream_t stream) {
  using T = typename L::T;
  const EmhaParams& f = p.forward;
  const int64_t heads = f.n * f.tokens * f.heads;
  const cudaError_t error =
      launch(emha_delta_kernel<T>, ceil_div(heads, kEmhaThreads), kEmhaThreads, stream, p);
  if (error != cudaSuccess) return error;
  const auto run = [&](auto kernel) {
    const auto words = [&](const void* data, int64_t stride_n, int64_t stride_t) {
      return L::kFloat || emha_pairs(data, stride_n, stride_t, f.d, sizeof(T));
    };
    return launch(kernel, emha_blocks(f, kRows), kEmhaThreads, stream, p,
                  words(f.qkv, f.stride_n, f.stride_t),
                  words(p.grad_out, p.grad_stride_n, p.grad_stride_t),
                  emha_pairs(p.grad_qkv, 0, 0, f.d, sizeof(T)));
  };
  const cudaError_t of_queries = run(emha_bwd_kernel<L, false>);
  return of_queries != cudaSuccess ? of_queries : run(emha_bwd_kernel<L, true>);
}

template <typename T, int Passes>
cudaError_t run(const EmhaBackwardParams& p, cudaStream_t stream) {
  return p.forward.d <= kEmhaNarrowD ? run<EmhaLayout<T, Passes, false>>(p, stream)
                                     : run<EmhaLayout<T, Passes, true>>(p, stream);
}

}  // namespace

cudaError_t launch_emha_bwd(const EmhaBackwardParams& params, cudaStream_t stream) {
  EmhaBackwardParams p = params;
  if (p.forward.length > p.forward.tokens) p.forward.length = p.forward.tokens;
  if (p.forward.dtype == Dtype::kFloat && !p.forward.tf32) return run<float, 3>(p, stream);
  EFRDN_FAST_DTYPE_SWITCH(p.forward.dtype, return run<T, 1>(p, stream))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
