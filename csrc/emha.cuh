// What the attention kernels share: rows of q, k, v or gradients in shared memory, and from there
// as operands of tensor core products.
//
// The scores come out of a product with keys as columns, and go as they are, in registers, into the
// next product with keys as depth. For half and bfloat16 the layouts agree; for float a lane holds
// keys 2t and 2t + 1 of 8 but multiplies t and t + 4, so the rows of the other operand are taken in
// that order.
#pragma once

#include "emha.h"
#include "mma.cuh"

namespace efrdn_fast {

constexpr int kEmhaThreads = 128, kEmhaWarps = kEmhaThreads / kWarp;
constexpr int kEmhaNarrowD = 23;
constexpr float kLog2E = 1.44269504088896341f;

// Layout for heads of at most kEmhaNarrowD values (18 become 32, or 24 for float) or kEmhaMaxD.
template <typename T_, int kPasses_, bool kWide_>
struct EmhaLayout {
  using T = T_;
  static constexpr int kPasses = kPasses_;
  static constexpr bool kWide = kWide_, kFloat = sizeof(T) == 4;
  static constexpr int kPerWord = 4 / sizeof(T);
  static constexpr int kGroup = 8 * kPerWord;  // depth of one product
  static constexpr int kSteps = (kWide ? 64 : kFloat ? 24 : 32) / kGroup;
  static constexpr int kTiles = kWide ? 8 : 3;  // of 8 columns that hold a head's values
  static constexpr int kLanes = (kWide ? 64 : 32) / kPerWord;  // that move one row
  static constexpr int kMoved = 8, kMovedRows = kEmhaThreads / kLanes;
  static constexpr int kColumns = kMoved * kMovedRows;  // tokens of a tile of columns
  // Words. Every way of loading operands hits each bank once.
  static constexpr int kStride = kFloat ? (kWide ? 76 : 28) : (kWide ? 36 : 20);

  using Row = unsigned[kStride];
};

// The tokens that a block computes: `rows` of a head of a segment.
struct EmhaBlock {
  int64_t n, begin, end;  // segment
  int64_t first;          // token
  int head;

  __device__ EmhaBlock(const EmhaParams& p, int rows) {
    const auto tiles = static_cast<unsigned>(ceil_div(p.length, rows));
    const auto segments = static_cast<unsigned>(ceil_div(p.tokens, p.length));
    const unsigned tile = blockIdx.x % tiles, rest = blockIdx.x / tiles / p.heads;
    head = static_cast<int>(blockIdx.x / tiles % p.heads);
    n = rest / segments;
    begin = rest % segments * p.length;
    end = begin + p.length < p.tokens ? begin + p.length : p.tokens;
    first = begin + static_cast<int64_t>(tile) * rows;
  }
  // q, k or v (0, 1, 2) of the head at token 0.
  template <typename T>
  __device__ const T* in_qkv(const EmhaParams& p, int which) const {
    return static_cast<const T*>(p.qkv) + n * p.stride_n +
           (static_cast<int64_t>(which) * p.heads + head) * p.d;
  }
  // The head at token 0 of a contiguous [N, tokens, width, d].
  template <typename T>
  __device__ T* in_tokens(void* data, const EmhaParams& p, int width) const {
    return static_cast<T*>(data) + (n * p.tokens * width + head) * p.d;
  }
};

inline int64_t emha_blocks(const EmhaParams& p, int rows) {
  return p.n * ceil_div(p.tokens, p.length) * p.heads * ceil_div(p.length, rows);
}

// The word of columns [kPerWord w, ..) of a row that is 1 in `column` and 0 elsewhere.
template <class L>
__device__ unsigned one_in(int column, int w) {
  typename L::T values[L::kPerWord];
#pragma unroll
  for (int i = 0; i < L::kPerWord; i++)
    values[i] = from_float<typename L::T>(w * L::kPerWord + i == column ? 1.f : 0.f);
  unsigned word;
  memcpy(&word, values, sizeof word);
  return word;
}

// kColumns rows of d values on their way through registers into shared memory.
template <class L>
struct EmhaRows {
  using T = typename L::T;
  unsigned word[L::kMoved];

  // `aligned`: words can be read. Rows from `count` on are 0.
  __device__ void load(const T* rows, int64_t stride, int64_t count, int d, bool aligned) {
    const int row = threadIdx.x / L::kLanes, column = threadIdx.x % L::kLanes * L::kPerWord;
#pragma unroll
    for (int i = 0; i < L::kMoved; i++) {
      word[i] = 0u;
      if (row + i * L::kMovedRows < count && column < d) {
        const T* const at = rows + (row + i * L::kMovedRows) * stride + column;
        const auto pack = aligned ? Pack<T, L::kPerWord>::load(at, true)
                                  : Pack<T, L::kPerWord>::load_some(at, d - column);
        memcpy(&word[i], &pack, sizeof word[i]);
      }
      if constexpr (L::kFloat && L::kPasses == 1) word[i] = to_tf32(bits_to_float(word[i]));
    }
  }
  // `pad`: what the lane adds to its word, which is 0 from column d on.
  __device__ void store(typename L::Row* shared, unsigned pad = 0u) const {
    const int row = threadIdx.x / L::kLanes, lane = threadIdx.x % L::kLanes;
    if (lane >= L::kStride) return;
#pragma unroll
    for (int i = 0; i < L::kMoved; i++) shared[row + i * L::kMovedRows][lane] = word[i] | pad;
  }
};

// `count` rows, of `total` that follow, straight into shared memory.
template <class L>
__device__ void stage_rows(typename L::Row* shared, int total, const typename L::T* rows,
                           int64_t stride, int64_t count, int d, bool aligned) {
  for (int i = 0; i < total; i += L::kColumns) {
    EmhaRows<L> moved;
    moved.load(rows + i * stride, stride, count - i, d, aligned);
    moved.store(shared + i);
  }
}

// 16 rows from `rows` on as the left operands of the steps from `first` on over their values.
template <class L, int kSteps>
__device__ void load_left(Operand<4, L::kPasses> (&a)[kSteps], const typename L::Row* rows,
                          int first = 0) {
  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < kSteps; step++) {
    const unsigned* const low = rows[g] + (first + step) * 8 + t;
    const unsigned* const high = rows[g + 8] + (first + step) * 8 + t;
    a[step] = split<L::kPasses>({low[0], high[0], low[4], high[4]});
  }
}

// 8 rows from `rows` on, a column each, as the right operands of the same steps.
template <class L, int kSteps>
__device__ void load_right(Operand<2, L::kPasses> (&b)[kSteps], const typename L::Row* rows,
                           int first = 0) {
  const int lane = threadIdx.x % kWarp;
  unsigned words[kSteps][2];
  if constexpr (L::kFloat) {
#pragma unroll
    for (int step = 0; step < kSteps; step++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        words[step][i] = rows[lane / 4][(first + step) * 8 + lane % 4 + i * 4];
  } else {
#pragma unroll
    for (int step = 0; step < kSteps; step += 2)
      load_words(words[step], words[step + 1], rows[lane % 8] + (first + step) * 8 + lane / 8 * 4);
  }
#pragma unroll
  for (int step = 0; step < kSteps; step++) b[step] = split<L::kPasses>(words[step]);
}

// sum += the scalar products of 16 rows from `rows` on and the kColumns rows `columns`.
template <class L>
__device__ void add_scores(float (&sum)[L::kColumns / 8][4], const typename L::Row* rows,
                           const typename L::Row* columns) {
  constexpr int kChunk = L::kWide && L::kFloat ? 2 : L::kSteps;  // what registers hold
#pragma unroll 1
  for (int first = 0; first < L::kSteps; first += kChunk) {
    Operand<4, L::kPasses> left[kChunk];
    load_left<L>(left, rows, first);
#pragma unroll
    for (int j = 0; j < L::kColumns / 8; j++) {
      Operand<2, L::kPasses> right[kChunk];
      load_right<L>(right, columns + j * 8, first);
#pragma unroll
      for (int step = 0; step < kChunk; step++)
        product<typename L::T, L::kPasses>(sum[j], left[step], right[step]);
    }
  }
}

// Columns [8 tile, 8 tile + 8) of kGroup rows as the right operand of a product over the rows.
template <class L>
__device__ Operand<2, L::kPasses> load_turned_right(const typename L::Row* rows, int tile) {
  const int lane = threadIdx.x % kWarp;
  unsigned words[2];
  if constexpr (L::kFloat) {
#pragma unroll
    for (int i = 0; i < 2; i++) words[i] = rows[lane % 4 * 2 + i][tile * 8 + lane / 4];
  } else {
    load_turned(words, rows[lane % 16] + tile * 4);
  }
  return split<L::kPasses>(words);
}

// Results of products as the left operands of products over their columns.
template <class L>
__device__ void as_left(Operand<4, L::kPasses> (&a)[L::kColumns / L::kGroup],
                        const float (&s)[L::kColumns / 8][4]) {
#pragma unroll
  for (int i = 0; i < L::kColumns / L::kGroup; i++) {
    if constexpr (L::kFloat) {
      const float(&c)[4] = s[i];
      const auto bits = [](float x) { return L::kPasses == 1 ? to_tf32(x) : float_to_bits(x); };
      a[i] = split<L::kPasses>({bits(c[0]), bits(c[2]), bits(c[1]), bits(c[3])});
    } else {
      const float(&c)[4] = s[2 * i], (&e)[4] = s[2 * i + 1];
      using T = typename L::T;
      a[i] = split<L::kPasses>({pack_word<T>(c[0], c[1]), pack_word<T>(c[2], c[3]),
                                pack_word<T>(e[0], e[1]), pack_word<T>(e[2], e[3])});
    }
  }
}

// sum = sum + a rows, for the columns of kTiles tiles.
template <class L, int kTiles>
__device__ void add_product(float (&sum)[kTiles][4],
                            const Operand<4, L::kPasses> (&a)[L::kColumns / L::kGroup],
                            const typename L::Row* rows) {
#pragma unroll
  for (int tile = 0; tile < kTiles; tile++) {
    float part[4] = {};
#pragma unroll
    for (int i = 0; i < L::kColumns / L::kGroup; i++)
      product<typename L::T, L::kPasses>(L::kPasses == 1 ? sum[tile] : part, a[i],
                                         load_turned_right<L>(rows + i * L::kGroup, tile));
    // Tensor cores truncate: a part, still small, loses less than the total would.
    if constexpr (L::kPasses > 1) {
#pragma unroll
      for (int i = 0; i < 4; i++) sum[tile][i] += part[i];
    }
  }
}

// Values (row, columns 2t and 2t + 1) of tile `tile`: the first d columns of a row.
template <typename T>
__device__ void store_pair(T* row, int tile, int d, float first, float second, bool aligned) {
  const int column = tile * 8 + threadIdx.x % 4 * 2;
  const auto pack = Pack<T, 2>::from_floats({first, second});
  if (column + 1 < d && aligned)
    pack.store(row + column);
  else
    pack.store_some(row + column, d - column);
}

// 2^x; 0 for -inf.
__device__ inline float exp2_fast(float x) {
#ifdef EFRDN_FAST_SIMT
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Whether every head of `data` can be read or written in packs of two values.
inline bool emha_pairs(const void* data, int64_t stride_n, int64_t stride_t, int d,
                       int64_t element_bytes) {
  return reinterpret_cast<uintptr_t>(data) % (2 * element_bytes) == 0 && stride_n % 2 == 0 &&
         stride_t % 2 == 0 && d % 2 == 0;
}

}  // namespace efrdn_fast
