// Attention inside segments on the CPU: arguments and entry points.
#pragma once

#include "cpu.h"

namespace efrdn_fast {

// out = softmax(q k^T / sqrt(dim)) v within segments of `length` tokens, the last one shorter.
// Rows of qkv are (q, k, v) x heads x dim, `stride_t` elements apart.
struct EmhaArgs {
  Dtype dtype;
  int64_t n, tokens, heads, dim, length;
  const void* qkv;
  int64_t stride_n, stride_t;
  void* out;   // [n, tokens, heads, dim]
  float* lse;  // [n, heads, tokens], natural log of the sum of exp of the scaled scores
};

// Tokens of a block: as many as the widest vectors take at a time.
constexpr int64_t kBlock = 64;

inline int64_t segment_length(const EmhaArgs& a) {
  return a.length < a.tokens ? a.length : a.tokens;
}
inline int64_t segments(const EmhaArgs& a) { return (a.tokens + a.length - 1) / a.length; }
// Blocks of one head of one segment, also of the shorter last one, and of all.
inline int64_t segment_blocks(const EmhaArgs& a) {
  return (segment_length(a) + kBlock - 1) / kBlock;
}
inline int64_t emha_blocks(const EmhaArgs& a) {
  return a.n * segments(a) * a.heads * segment_blocks(a);
}

// Up to whole cache lines.
inline int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// Floats of working memory per thread: keys and values of a head of a segment, and a block.
inline size_t emha_forward_scratch(const EmhaArgs& a) {
  return static_cast<size_t>(2 * aligned(segment_length(a) * a.dim) + (2 * a.dim + 64) * kBlock);
}

// Blocks [begin, end).
EFRDN_FAST_KERNEL(void emha_forward(const EmhaArgs& args, int64_t begin, int64_t end,
                                    float* scratch))

// The same for bfloat16, by dot products of its pairs.
#if defined(EFRDN_FAST_X86)
namespace avx512bf16 {
void emha_forward_bf16(const EmhaArgs& args, int64_t begin, int64_t end, float* scratch);
}
#endif

// Gradient of the above, from the log-sum-exp: the weights of the softmax are computed again, once
// with queries in the lanes and once with keys, so that every gradient is summed by one thread.
struct EmhaBackwardArgs {
  EmhaArgs forward;      // out and lse are read
  const void* grad_out;  // like out
  void* grad_qkv;        // [n, tokens, 3, heads, dim]
};

// Floats of working memory per thread: q, k, v and grad_out of a head of a segment with two numbers
// per query, and a block.
inline size_t emha_backward_scratch(const EmhaArgs& a) {
  const int64_t length = segment_length(a);
  return static_cast<size_t>(4 * aligned(length * a.dim) + 2 * aligned(length) +
                             (4 * a.dim + 64) * kBlock);
}

// Blocks [begin, end).
EFRDN_FAST_KERNEL(void emha_backward(const EmhaBackwardArgs& args, int64_t begin, int64_t end,
                                     float* scratch))

}  // namespace efrdn_fast
