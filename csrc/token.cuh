// What the kernels of tokens share. A block builds its tokens from the map in shared memory, in the
// dtype of the map as PyTorch would hold them, and multiplies them by matrices that come in pieces
// of 48 rows by 24 words.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "token.h"

namespace efrdn_fast {
namespace token {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kOut = 48, kChunk = 24, kChunkStride = kChunk + 4;
using Piece = unsigned[kOut][kChunkStride];

template <typename T_, int kPasses_>
struct Layout {
  using T = T_;
  static constexpr int kPasses = kPasses_, kPerWord = 4 / sizeof(T);
  static constexpr int kTokens = 32 * kPerWord;
  static constexpr int kOwn = kTokens / kWarps;          // tokens that a warp builds
  static constexpr int kGroups = kWarps * 16 / kTokens;  // warps that share 16 tokens
  static constexpr int kTiles = kOut / 8 / kGroups;      // of 8 columns, of a warp
};

// Words of the whole products over `values` values, and of a row in shared memory.
__host__ __device__ constexpr int product_words(int values, int per_word) {
  return (values + 8 * per_word - 1) / (8 * per_word) * 8;
}
__host__ __device__ constexpr int row_words(int values, int per_word) {
  return product_words(values, per_word) + 4;  // every operand load hits each bank once
}

__device__ inline unsigned* dynamic_shared() {
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

// Tokens [first, first + kTokens) of image n, of which `count` or more are there; `row` is the
// first of them in a matrix of all tokens.
template <class L>
struct Block {
  int64_t n, first, count, row;

  __device__ Block(const TokenMap& map, unsigned index) {
    const int64_t tokens = map.h * map.w;
    const auto blocks = static_cast<unsigned>(ceil_div(tokens, L::kTokens));
    n = index / blocks;
    first = static_cast<int64_t>(index % blocks) * L::kTokens;
    count = tokens - first;
    row = n * tokens + first;
  }
};

// f(token, row, column of the map) for the warp's own tokens.
template <class L, class F>
__device__ void each_token(const TokenMap& map, const Block<L>& block, const F& f) {
  const int own = threadIdx.x / kWarp * L::kOwn;
  int64_t h = (block.first + own) / map.w, w = (block.first + own) % map.w;
  for (int i = own; i < own + L::kOwn; i++) {
    f(i, h, w);
    if (++w == map.w) {
      w = 0;
      h++;
    }
  }
}

// Channel c of a tap of the token at (h, w).
template <typename T>
__device__ T token_value(const TokenMap& map, int64_t n, int64_t h, int64_t w, int c, int tap) {
  h += tap / 3 - 1;
  w += tap % 3 - 1;
  const bool inside = h >= 0 && h < map.h && w >= 0 && w < map.w;
  return inside ? __ldg(pixel<const T>(map.x, n, h, w) + c) : from_float<T>(0.f);
}

// The warp's own tokens, 0 behind their values and behind the last token.
template <class L>
__device__ void build(const TokenMap& map, const Block<L>& block, const Rows<typename L::T>& rows) {
  using T = typename L::T;
  const int lane = threadIdx.x % kWarp;
  const int end = product_words(9 * map.c, L::kPerWord) * L::kPerWord;
  each_token(map, block, [&](int i, int64_t h, int64_t w) {
    T* const row = rows[i];
    for (int c = lane; c < map.c; c += kWarp)
#pragma unroll
      for (int tap = 0; tap < 9; tap++)
        row[c * 9 + tap] =
            i < block.count ? token_value<T>(map, block.n, h, w, c, tap) : from_float<T>(0.f);
    for (int k = 9 * map.c + lane; k < end; k += kWarp) row[k] = from_float<T>(0.f);
  });
}

// f(the warp's own token, value) for `values` values each.
template <class L, class F>
__device__ void each_own(int values, const F& f) {
  const int own = threadIdx.x / kWarp * L::kOwn;
  for (int i = own; i < own + L::kOwn; i++)
    for (int k = threadIdx.x % kWarp; k < values; k += kWarp) f(i, k);
}

// The warp's own rows of a matrix whose rows lie `stride` apart; 0 behind their `width` values and
// behind the last token.
template <class L>
__device__ void load_rows(const typename L::T* data, int64_t stride, int width, int64_t count,
                          const Rows<typename L::T>& rows) {
  using T = typename L::T;
  each_own<L>(product_words(width, L::kPerWord) * L::kPerWord, [&](int i, int k) {
    rows[i][k] = i < count && k < width ? __ldg(data + i * stride + k) : from_float<T>(0.f);
  });
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

struct Moments {
  float mean, istd;
};

// Of a row, by a warp.
template <typename T>
__device__ Moments moments(const T* row, int values, float eps) {
  const int lane = threadIdx.x % kWarp;
  float sum = 0.f;
  for (int k = lane; k < values; k += kWarp) sum += to_float(row[k]);
  const float mean = warp_sum(sum) / values;
  sum = 0.f;
  for (int k = lane; k < values; k += kWarp) {
    const float difference = to_float(row[k]) - mean;
    sum = fmaf(difference, difference, sum);
  }
  return {mean, 1.f / sqrtf(warp_sum(sum) / values + eps)};
}

// LayerNorm of a row by a warp, in place.
template <typename T>
__device__ void normalise_row(T* row, int values, const Moments& of, const void* gamma,
                              const void* beta, bool is_float) {
  for (int k = threadIdx.x % kWarp; k < values; k += kWarp) {
    const float scale = weight_at<T>(gamma, k, is_float);
    const float offset = weight_at<T>(beta, k, is_float);
    row[k] = from_float<T>(fmaf((to_float(row[k]) - of.mean) * of.istd, scale, offset));
  }
}

// A matrix [rows, values] of weights, or `turned`, in memory, [values, rows].
struct Matrix {
  const void* data;
  int rows, values;
  bool is_float, turned = false;

  __device__ int64_t index(int row, int value) const {
    return turned ? static_cast<int64_t>(value) * rows + row
                  : static_cast<int64_t>(row) * values + value;
  }
};

// The words [begin, begin + kChunk) of rows [first, first + kOut), 0 outside the matrix.
template <class L>
__device__ void load_piece(const Matrix& matrix, int first, int begin, Piece& piece) {
  using T = typename L::T;
  // neighbouring threads read neighbouring weights
  for (int i = threadIdx.x; i < kOut * kChunk; i += kThreads) {
    const int o = matrix.turned ? i % kOut : i / kChunk;
    const int word_index = matrix.turned ? i / kOut : i % kChunk;
    T values[L::kPerWord];
#pragma unroll
    for (int v = 0; v < L::kPerWord; v++) {
      const int k = (begin + word_index) * L::kPerWord + v;
      const bool inside = first + o < matrix.rows && k < matrix.values;
      values[v] = from_float<T>(
          inside ? weight_at<T>(matrix.data, matrix.index(first + o, k), matrix.is_float) : 0.f);
    }
    unsigned word;
    memcpy(&word, values, sizeof word);
    if constexpr (sizeof(T) == 4 && L::kPasses == 1) word = to_tf32(bits_to_float(word));
    piece[o][word_index] = word;
  }
}

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
    load_piece<L>(matrix, first, begin, piece);
    __syncthreads();
    float part[L::kTiles][4] = {};
    float (*const target)[4] = L::kPasses == 1 ? sum : part;
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

// f(j, i, token, column) for the lane's results sum[j][i] of `multiply`.
template <class L, class F>
__device__ void each_result(int first, const F& f) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row = warp / L::kGroups * 16 + lane / 4;
  const int column = first + warp % L::kGroups * L::kTiles * 8 + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < L::kTiles; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) f(j, i, row + i / 2 * 8, column + j * 8 + i % 2);
}

// tokens += proj rows + bias
template <class L>
__device__ void add_projection(const Rows<typename L::T>& tokens, const Rows<typename L::T>& rows,
                               const Matrix& proj, const void* bias, Piece& piece) {
  using T = typename L::T;
  float sum[L::kTiles][4];
  for (int first = 0; first < proj.rows; first += kOut) {
    multiply<L>(sum, rows, proj, first, piece);
    each_result<L>(first, [&](int j, int i, int token, int column) {
      if (column >= proj.rows) return;
      T& at = tokens[token][column];
      at = from_float<T>(to_float(at) + sum[j][i] + weight_at<T>(bias, column, proj.is_float));
    });
  }
}

// Values (token, column) and (token, column + 1) of contiguous [N, H W, width].
template <class L>
__device__ void store(const Block<L>& block, void* data, int width, int token, int column,
                      float first, float second) {
  using T = typename L::T;
  if (token >= block.count || column >= width) return;
  T* const at = static_cast<T*>(data) + (block.row + token) * width + column;
  const auto pack = Pack<T, 2>::from_floats({first, second});
  if (width % 2 == 0)
    pack.store(at);
  else
    pack.store_some(at, width - column);
}

inline int per_word(Dtype dtype) { return dtype == Dtype::kFloat ? 1 : 2; }
inline int64_t block_tokens(Dtype dtype) {
  return static_cast<int64_t>(Layout<float, 1>::kTokens) * per_word(dtype);
}
// Blocks of tokens of all images.
inline int64_t block_count(const TokenMap& map) {
  return map.n * ceil_div(map.h * map.w, block_tokens(map.dtype));
}
// Bytes of shared memory for a block's rows of `values` values.
inline int64_t rows_bytes(Dtype dtype, int64_t values) {
  return block_tokens(dtype) * row_words(static_cast<int>(values), per_word(dtype)) * 4;
}

template <typename... Params>
cudaError_t launch_shared(int64_t blocks, int64_t bytes, cudaStream_t stream,
                          void (*kernel)(Params...), std::common_type_t<Params>... params) {
  if (bytes > kTokenMaxSharedBytes || blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (blocks == 0) return cudaSuccess;
#ifdef EFRDN_FAST_SIMT
  (void)stream;
  simt::launch(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), bytes,
               [=] { kernel(params...); });
  return cudaSuccess;
#else
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, params...);
  return cudaGetLastError();
#endif
}

// Calls a template of the layout: EFRDN_FAST_TOKEN_SWITCH(map, return run<L>(args)).
#define EFRDN_FAST_TOKEN_SWITCH(map, ...)            \
  if ((map).dtype == Dtype::kFloat && !(map).tf32) { \
    using L = token::Layout<float, 3>;               \
    __VA_ARGS__;                                     \
  } else {                                           \
    EFRDN_FAST_DTYPE_SWITCH((map).dtype, {           \
      using L = token::Layout<T, 1>;                 \
      __VA_ARGS__;                                   \
    })                                               \
  }

}  // namespace token
}  // namespace efrdn_fast
