// Attention inside segments, forward: a block holds the queries of one head, streams over the keys
// of their segment and keeps a running maximum and sum (online softmax): no score leaves the chip.
//
// The scale is folded into exp2. Behind the values stands a column of ones, which the padding to
// whole products makes free: the product with it is the sum of the exponentials, rounded as the
// numerator is.
#include "emha.cuh"

namespace efrdn_fast {
namespace {

template <class L, int kM>  // kM: products of 16 queries of a warp
__global__ void __launch_bounds__(kEmhaThreads, 2)
    emha_fwd_kernel(const EmhaParams p, bool aligned, bool out_aligned) {
  using T = typename L::T;
  constexpr int kQueries = kEmhaWarps * 16 * kM, kTiles = L::kTiles + L::kWide;
  constexpr int kKeyTiles = L::kColumns / 8, kGroups = L::kColumns / L::kGroup;
  __shared__ __align__(16) typename L::Row q[kQueries], k[L::kColumns], v[L::kColumns];
  const EmhaBlock block(p, kQueries);
  const int64_t keys = block.end - block.begin, queries = block.end - block.first;
  if (queries <= 0) return;
  const int t = threadIdx.x % 4;
  const int row = threadIdx.x / kWarp * 16 * kM;

  stage_rows<L>(q, kQueries, block.in_qkv<T>(p, 0) + block.first * p.stride_t, p.stride_t, queries,
                p.d, aligned);
  for (int i = threadIdx.x; i < L::kColumns * (L::kStride - L::kLanes); i += kEmhaThreads)
    v[i % L::kColumns][L::kLanes + i / L::kColumns] =
        one_in<L>(p.d, L::kLanes + i / L::kColumns);
  const unsigned one = one_in<L>(p.d, threadIdx.x % L::kLanes);
  const T* const k_rows = block.in_qkv<T>(p, 1) + block.begin * p.stride_t;
  const T* const v_rows = block.in_qkv<T>(p, 2) + block.begin * p.stride_t;
  EmhaRows<L> next_k, next_v;
  next_k.load(k_rows, p.stride_t, keys, p.d, aligned);
  next_v.load(v_rows, p.stride_t, keys, p.d, aligned);
  __syncthreads();
  // the operands of the queries stay in registers where these suffice
  constexpr bool kResident = !L::kWide && L::kPasses == 1;
  Operand<4, L::kPasses> left[kM][L::kSteps];
  if constexpr (kResident)
#pragma unroll
    for (int m = 0; m < kM; m++) load_left<L>(left[m], q + row + m * 16);

  const float scale = kLog2E / sqrtf(static_cast<float>(p.d));
  float out[kM][kTiles][4] = {}, shift[kM][2];  // shift: maximum of the scaled scores, log2
#pragma unroll
  for (int m = 0; m < kM; m++) shift[m][0] = shift[m][1] = -INFINITY;
  for (int64_t first = 0; first < keys; first += L::kColumns) {
    __syncthreads();
    next_k.store(k);
    next_v.store(v, one);
    __syncthreads();
    const int64_t ahead = first + L::kColumns;
    if (ahead < keys) {
      next_k.load(k_rows + ahead * p.stride_t, p.stride_t, keys - ahead, p.d, aligned);
      next_v.load(v_rows + ahead * p.stride_t, p.stride_t, keys - ahead, p.d, aligned);
    }
    if constexpr (!kResident)
#pragma unroll
      for (int m = 0; m < kM; m++) load_left<L>(left[m], q + row + m * 16);

    float s[kM][kKeyTiles][4] = {};
#pragma unroll
    for (int j = 0; j < kKeyTiles; j++) {
      Operand<2, L::kPasses> right[L::kSteps];
      load_right<L>(right, k + j * 8);
#pragma unroll
      for (int step = 0; step < L::kSteps; step++)
#pragma unroll
        for (int m = 0; m < kM; m++) product<T, L::kPasses>(s[m][j], left[m][step], right[step]);
    }
    if (ahead > keys) {
#pragma unroll
      for (int j = 0; j < kKeyTiles; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (first + j * 8 + t * 2 + i % 2 >= keys)
#pragma unroll
            for (int m = 0; m < kM; m++) s[m][j][i] = -INFINITY;
    }

    float factor[kM][2];
    bool grown = false;
#pragma unroll
    for (int m = 0; m < kM; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float top = s[m][0][2 * r];
#pragma unroll
        for (int j = 0; j < kKeyTiles; j++)
          top = fmaxf(top, fmaxf(s[m][j][2 * r], s[m][j][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2)) * scale;
        const float old = shift[m][r];
        shift[m][r] = fmaxf(old, top);
        grown |= shift[m][r] != old;
        // while every score is -inf, 0 in its place keeps exp2 from NaN
        const float safe = shift[m][r] == -INFINITY ? 0.f : shift[m][r];
        factor[m][r] = exp2_fast(old - safe);
#pragma unroll
        for (int j = 0; j < kKeyTiles; j++)
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; i++)
            s[m][j][i] = exp2_fast(fmaf(s[m][j][i], scale, -safe));
      }
    if (__any_sync(kAllLanes, grown)) {
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
          for (int i = 0; i < 4; i++) out[m][tile][i] *= factor[m][i / 2];
    }
#pragma unroll
    for (int m = 0; m < kM; m++) {
      Operand<4, L::kPasses> weights[kGroups];
      as_left<L>(weights, s[m]);
      add_product<L>(out[m], weights, v);
    }
  }

#pragma unroll
  for (int m = 0; m < kM; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float sum = 0.f;
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (tile * 8 + t * 2 + i == p.d) sum = out[m][tile][2 * r + i];
      sum = __shfl_sync(kAllLanes, sum, p.d % 8 / 2, 4);
      const int64_t token = block.first + row + m * 16 + r * 8 + threadIdx.x % kWarp / 4;
      if (token >= block.end) continue;
      const float inverse = 1.f / sum;
      T* const to = block.in_tokens<T>(p.out, p, p.heads) + token * p.heads * p.d;
#pragma unroll
      for (int tile = 0; tile < L::kTiles; tile++)
        store_pair(to, tile, p.d, out[m][tile][2 * r] * inverse, out[m][tile][2 * r + 1] * inverse,
                   out_aligned);
      if (t == 0)
        p.lse[(block.n * p.heads + block.head) * p.tokens + token] =
            (shift[m][r] + log2f(sum)) / kLog2E;
    }
}

template <typename T, int Passes, bool Wide>
cudaError_t run(const EmhaParams& p, cudaStream_t stream) {
  using L = EmhaLayout<T, Passes, Wide>;
  constexpr int kM = Wide ? 1 : 2;
  const bool aligned = emha_pairs(p.qkv, p.stride_n, p.stride_t, p.d, sizeof(T));
  return launch(emha_fwd_kernel<L, kM>, emha_blocks(p, kEmhaWarps * 16 * kM), kEmhaThreads, stream,
                p, L::kFloat || aligned, emha_pairs(p.out, 0, 0, p.d, sizeof(T)));
}

template <typename T, int Passes>
cudaError_t run(const EmhaParams& p, cudaStream_t stream) {
  return p.d <= kEmhaNarrowD ? run<T, Passes, false>(p, stream) : run<T, Passes, true>(p, stream);
}

}  // namespace

cudaError_t launch_emha_fwd(const EmhaParams& params, cudaStream_t stream) {
  EmhaParams p = params;
  if (p.length > p.tokens) p.length = p.tokens;
  if (p.dtype == Dtype::kFloat && !p.tf32) return run<float, 3>(p, stream);
  EFRDN_FAST_DTYPE_SWITCH(p.dtype, return run<T, 1>(p, stream))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
