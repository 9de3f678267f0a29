// Tokens to q k v and to the hidden layer of the MLP. A block builds its tokens from the map in
// shared memory, in the dtype of the map as PyTorch would hold them, normalises them there and
// multiplies them by matrices that come in pieces of 48 rows by 24 words.
#include "mma.cuh"
#include "token.h"

namespace efrdn_fast {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kOut = 48, kChunk = 24, kChunkStride = kChunk + 4;
using Piece = unsigned[kOut][kChunkStride];

template <typename T_, int kPasses_>
struct Layout {
  using T = T_;
  static constexpr int kPasses = kPasses_, kPerWord = 4 / sizeof(T);
  static constexpr int kTokens = 32 * kPerWord;
  static constexpr int kOwn = kTokens / kWarps;               // tokens that a warp builds
  static constexpr int kGroups = kWarps * 16 / kTokens;       // warps that share 16 tokens
  static constexpr int kTiles = kOut / 8 / kGroups;           // of 8 columns, of a warp
};

// Words of the whole products over `values` values, and of a row in shared memory.
__host__ __device__ constexpr int product_words(int values, int per_word) {
  return (values + 8 * per_word - 1) / (8 * per_word) * 8;
}
__host__ __device__ constexpr int row_words(int values, int per_word) {
  return product_words(values, per_word) + 4;  // every operand load hits each bank once
}

__device__ unsigned* dynamic_shared() {
#ifdef EFRDN_FAST_SIMT
  return reinterpret_cast<unsigned*>(simt::dynamic_bytes.get());
#else
  extern __shared__ __align__(16) unsigned words[];
  return words;
#endif
}

// Rows of values in shared memory.
template <typename T>
struct Rows {
  unsigned* words;
  int stride;  // words

  __device__ T* operator[](int row) const { return reinterpret_cast<T*>(words + row * stride); }
};

// A block's tokens: [first, first + kTokens) of image n.
template <class L>
struct Block {
  int64_t n, first, count;

  __device__ explicit Block(const TokenMap& map) {
    const int64_t tokens = map.h * map.w;
    const auto blocks = static_cast<unsigned>(ceil_div(tokens, L::kTokens));
    n = blockIdx.x / blocks;
    first = static_cast<int64_t>(blockIdx.x % blocks) * L::kTokens;
    count = tokens - first;
  }
};

// The warp's own tokens, 0 behind their values.
template <class L>
__device__ void build(const TokenMap& map, const Block<L>& block, const Rows<typename L::T>& rows) {
  using T = typename L::T;
  const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp * L::kOwn;
  const int end = product_words(9 * map.c, L::kPerWord) * L::kPerWord;
  int64_t h = (block.first + own) / map.w, w = (block.first + own) % map.w;
  for (int i = own; i < own + L::kOwn; i++) {
    T* const row = rows[i];
    for (int c = lane; c < map.c; c += kWarp)
#pragma unroll
      for (int tap = 0; tap < 9; tap++) {
        const int64_t y = h + tap / 3 - 1, x = w + tap % 3 - 1;
        const bool inside = i < block.count && y >= 0 && y < map.h && x >= 0 && x < map.w;
        row[c * 9 + tap] =
            inside ? __ldg(pixel<const T>(map.x, block.n, y, x) + c) : from_float<T>(0.f);
      }
    for (int k = 9 * map.c + lane; k < end; k += kWarp) row[k] = from_float<T>(0.f);
    if (++w == map.w) {
      w = 0;
      h++;
    }
  }
}

__device__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

// LayerNorm of the warp's own tokens, in place.
template <class L>
__device__ void normalise(const TokenMap& map, float eps, const void* gamma, const void* beta,
                          const Rows<typename L::T>& rows) {
  using T = typename L::T;
  const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp * L::kOwn, values = 9 * map.c;
  const bool is_float = map.weight_dtype == Dtype::kFloat;
  for (int i = own; i < own + L::kOwn; i++) {
    T* const row = rows[i];
    float sum = 0.f;
    for (int k = lane; k < values; k += kWarp) sum += to_float(row[k]);
    const float mean = warp_sum(sum) / values;
    sum = 0.f;
    for (int k = lane; k < values; k += kWarp) {
      const float difference = to_float(row[k]) - mean;
      sum = fmaf(difference, difference, sum);
    }
    const float istd = 1.f / sqrtf(warp_sum(sum) / values + eps);
    for (int k = lane; k < values; k += kWarp) {
      const float scale = weight_at<T>(gamma, k, is_float);
      const float offset = weight_at<T>(beta, k, is_float);
      row[k] = from_float<T>(fmaf((to_float(row[k]) - mean) * istd, scale, offset));
    }
  }
}

// A matrix [rows, values] of weights.
struct Matrix {
  const void* data;
  int rows, values;
  bool is_float;
};

// sum = the warp's 16 tokens times rows [first, first + kOut) of the matrix, which are 0 from its
// end on.
template <class L>
__device__ void multiply(float (&sum)[L::kTiles][4], const Rows<typename L::T>& tokens,
                         const Matrix& matrix, int first, Piece& piece) {
  using T = typename L::T;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int row = warp / L::kGroups * 16 + g, column = warp % L::kGroups * L::kTiles * 8 + g;
  const int words = product_words(matrix.values, L::kPerWord);
  for (auto& tile : sum)
    for (float& value : tile) value = 0.f;
  for (int begin = 0; begin < words; begin += kChunk) {
    __syncthreads();
    if (lane < kChunk)
      for (int o = warp; o < kOut; o += kWarps) {
        T values[L::kPerWord];
#pragma unroll
        for (int i = 0; i < L::kPerWord; i++) {
          const int k = (begin + lane) * L::kPerWord + i;
          const bool inside = first + o < matrix.rows && k < matrix.values;
          const int64_t index = static_cast<int64_t>(first + o) * matrix.values + k;
          values[i] = from_float<T>(
              inside ? weight_at<T>(matrix.data, index, matrix.is_float) : 0.f);
        }
        unsigned word;
        memcpy(&word, values, sizeof word);
        if constexpr (sizeof(T) == 4 && L::kPasses == 1) word = to_tf32(bits_to_float(word));
        piece[o][lane] = word;
      }
    __syncthreads();
    float part[L::kTiles][4] = {};
    float(*const target)[4] = L::kPasses == 1 ? sum : part;
#pragma unroll
    for (int step = 0; step < kChunk / 8; step++) {
      if (begin + step * 8 >= words) break;
      const unsigned* const low = tokens.words + row * tokens.stride + begin + step * 8 + t;
      const unsigned* const high = low + 8 * tokens.stride;
      unsigned left[4] = {low[0], high[0], low[4], high[4]};
      if constexpr (sizeof(T) == 4 && L::kPasses == 1)
#pragma unroll
        for (unsigned& word : left) word = to_tf32(bits_to_float(word));
      const auto a = split<L::kPasses>(left);
#pragma unroll
      for (int j = 0; j < L::kTiles; j++) {
        const unsigned* const right = piece[column + j * 8] + step * 8 + t;
        product<T, L::kPasses>(target[j], a, split<L::kPasses>({right[0], right[4]}));
      }
    }
    // Tensor cores truncate: a piece's sum, still small, loses less than the total would.
    if constexpr (L::kPasses > 1) {
#pragma unroll
      for (int j = 0; j < L::kTiles; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[j][i] += part[j][i];
    }
  }
}

// f(token, column, sum of the column and of the next) for all the lane's results of `multiply`.
template <class L, class F>
__device__ void each_pair(const float (&sum)[L::kTiles][4], int first, const F& f) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column = first + warp % L::kGroups * L::kTiles * 8 + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < L::kTiles; j++)
#pragma unroll
    for (int r = 0; r < 2; r++)
      f(warp / L::kGroups * 16 + lane / 4 + r * 8, column + j * 8, sum[j][2 * r],
        sum[j][2 * r + 1]);
}

// Values (token, column) and (token, column + 1) of contiguous [N, H W, width].
template <class L>
__device__ void store(const TokenMap& map, const Block<L>& block, void* data, int width, int token,
                      int column, float first, float second) {
  using T = typename L::T;
  if (token >= block.count || column >= width) return;
  T* const at = static_cast<T*>(data) +
                (block.n * map.h * map.w + block.first + token) * width + column;
  const auto pack = Pack<T, 2>::from_floats({first, second});
  if (width % 2 == 0)
    pack.store(at);
  else
    pack.store_some(at, width - column);
}

template <class L>
__global__ void __launch_bounds__(kThreads, 3) token_qkv_fwd_kernel(const TokenQkvParams p) {
  using T = typename L::T;
  __shared__ Piece piece;
  const Block<L> block(p.map);
  const bool is_float = p.map.weight_dtype == Dtype::kFloat;
  const Rows<T> tokens{dynamic_shared(), row_words(9 * p.map.c, L::kPerWord)};
  const Rows<T> reduced{tokens.words + L::kTokens * tokens.stride, row_words(p.inner, L::kPerWord)};
  build<L>(p.map, block, tokens);
  __syncwarp();
  normalise<L>(p.map, p.eps, p.gamma, p.beta, tokens);

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
      store(p.map, block, p.out, p.outer, token, column, a, b);
    });
  }
}

template <class L>
__global__ void __launch_bounds__(kThreads, 3) token_hidden_fwd_kernel(const TokenHiddenParams p) {
  using T = typename L::T;
  __shared__ Piece piece;
  const Block<L> block(p.map);
  const bool is_float = p.map.weight_dtype == Dtype::kFloat;
  const int lane = threadIdx.x % kWarp, own = threadIdx.x / kWarp * L::kOwn, values = 9 * p.map.c;
  const Rows<T> tokens{dynamic_shared(), row_words(values, L::kPerWord)};
  const Rows<T> attended{tokens.words + L::kTokens * tokens.stride,
                         row_words(p.width, L::kPerWord)};
  build<L>(p.map, block, tokens);
  const T* const a = static_cast<const T*>(p.a) + block.n * p.a_stride_n;
  const int end = product_words(p.width, L::kPerWord) * L::kPerWord;
  for (int i = own; i < own + L::kOwn; i++)
    for (int k = lane; k < end; k += kWarp)
      attended[i][k] = i < block.count && k < p.width
                           ? __ldg(a + (block.first + i) * p.a_stride_t + k)
                           : from_float<T>(0.f);

  float sum[L::kTiles][4];
  const auto weight = [&](const void* data, int i) { return weight_at<T>(data, i, is_float); };
  for (int first = 0; first < values; first += kOut) {
    multiply<L>(sum, attended, {p.proj_weight, values, p.width, is_float}, first, piece);
    each_pair<L>(sum, first, [&](int token, int column, float a, float b) {
      T* const at = tokens[token] + column;
      if (column < values) at[0] = from_float<T>(to_float(at[0]) + a + weight(p.proj_bias, column));
      if (column + 1 < values)
        at[1] = from_float<T>(to_float(at[1]) + b + weight(p.proj_bias, column + 1));
    });
  }
  __syncthreads();
  normalise<L>(p.map, p.eps, p.gamma, p.beta, tokens);
  for (int first = 0; first < p.hidden; first += kOut) {
    multiply<L>(sum, tokens, {p.fc1_weight, p.hidden, values, is_float}, first, piece);
    each_pair<L>(sum, first, [&](int token, int column, float a, float b) {
      const float offset0 = column < p.hidden ? weight(p.fc1_bias, column) : 0.f;
      const float offset1 = column + 1 < p.hidden ? weight(p.fc1_bias, column + 1) : 0.f;
      store(p.map, block, p.h, p.hidden, token, column, relu(a + offset0), relu(b + offset1));
    });
  }
}

template <class L, class Params>
cudaError_t run(void (*kernel)(Params), const Params& p, int width, cudaStream_t stream) {
  const TokenMap& map = p.map;
  const int64_t blocks = map.n * ceil_div(map.h * map.w, L::kTokens);
  const int64_t bytes = token_shared_bytes(map.dtype, map.c, width);
  if (bytes > kTokenMaxSharedBytes || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (blocks == 0) return cudaSuccess;
#ifdef EFRDN_FAST_SIMT
  (void)stream;
  simt::launch(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), bytes, [=] { kernel(p); });
  return cudaSuccess;
#else
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(p);
  return cudaGetLastError();
#endif
}

}  // namespace

int64_t token_shared_bytes(Dtype dtype, int64_t c, int64_t width) {
  const int per_word = dtype == Dtype::kFloat ? 1 : 2;
  const int words = row_words(static_cast<int>(9 * c), per_word) +
                    row_words(static_cast<int>(width), per_word);
  return static_cast<int64_t>(Layout<float, 1>::kTokens) * per_word * words * 4;
}

cudaError_t launch_token_qkv_fwd(const TokenQkvParams& p, cudaStream_t stream) {
  if (p.map.dtype == Dtype::kFloat && !p.map.tf32)
    return run<Layout<float, 3>>(token_qkv_fwd_kernel<Layout<float, 3>>, p, p.inner, stream);
  EFRDN_FAST_DTYPE_SWITCH(p.map.dtype, return run<Layout<T, 1>>(
                                           token_qkv_fwd_kernel<Layout<T, 1>>, p, p.inner, stream))
  return cudaErrorInvalidValue;
}

cudaError_t launch_token_hidden_fwd(const TokenHiddenParams& p, cudaStream_t stream) {
  if (p.map.dtype == Dtype::kFloat && !p.map.tf32)
    return run<Layout<float, 3>>(token_hidden_fwd_kernel<Layout<float, 3>>, p, p.width, stream);
  EFRDN_FAST_DTYPE_SWITCH(
      p.map.dtype,
      return run<Layout<T, 1>>(token_hidden_fwd_kernel<Layout<T, 1>>, p, p.width, stream))
  return cudaErrorInvalidValue;
}

}  // namespace efrdn_fast
