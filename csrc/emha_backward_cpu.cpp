// Attention backward. With p = softmax of the scores and delta = grad_out . out of a query:
//   d score = p (grad_out . v - delta), grad_q = sum d score k, grad_k = sum d score q,
//   grad_v = sum p grad_out.
#include "emha_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

constexpr int kTile = 30;  // rows whose p and d score are kept, in L1

// Queries: a = q scaled to scores in units of log2, b = grad_out. Keys: a = k, b = v.
struct Tokens {
  const float *a, *b;          // [tokens, dim]
  const float *lse2, *delta;   // [tokens], of queries
};

template <int kQ>
struct Lanes {
  const float *a, *b;         // [dim, kQ * kLanes]
  V lse2[kQ], delta[kQ];      // of queries
  float *p, *d_score;         // [kTile, kQ * kLanes]
  float *grad_a, *grad_b;     // [dim, kQ * kLanes]; grad_b of keys only
};

// p and d score of kCount rows from row `at` on, into row t of the tile.
template <bool kQueries, int kCount, int kQ, class H>
EFRDN_FAST_INLINE void weigh(const H& h, const Lanes<kQ>& l, const Tokens& rows, int64_t at,
                             int t) {
  V acc[kCount][kQ];
  products(h, l.a, rows.a + at * h.dim(), acc);
  each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
      const V shift = kQueries ? l.lse2[j] : set1(rows.lse2[at + i]);
      store(l.p + ((t + i) * kQ + j) * kLanes, exp2(sub(acc[i][j], shift)));
    });
  });
  products(h, l.b, rows.b + at * h.dim(), acc);
  each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
      const V delta = kQueries ? l.delta[j] : set1(rows.delta[at + i]);
      const V p = load(l.p + ((t + i) * kQ + j) * kLanes);
      store(l.d_score + ((t + i) * kQ + j) * kLanes, mul(p, sub(acc[i][j], delta)));
    });
  });
}

template <bool kQueries, int kQ, class H>
void attend(const H& h, const Lanes<kQ>& l, const Tokens& rows, int64_t tokens) {
  const int dim = h.dim();
  const size_t size = static_cast<size_t>(dim * kQ * kLanes) * sizeof(float);
  memset(l.grad_a, 0, size);
  if (!kQueries) memset(l.grad_b, 0, size);
  for (int64_t first = 0; first < tokens; first += kTile) {
    const int count = tokens - first < kTile ? static_cast<int>(tokens - first) : kTile;
    int t = 0;
    for (; t + kKeys <= count; t += kKeys) weigh<kQueries, kKeys>(h, l, rows, first + t, t);
    for (; t < count; ++t) weigh<kQueries, 1>(h, l, rows, first + t, t);
    gather_all<kQ>(h, l.d_score, rows.a + first * dim, count, l.grad_a);
    if (!kQueries) gather_all<kQ>(h, l.p, rows.b + first * dim, count, l.grad_b);
  }
}

// Tokens [i, i + count) of `own` in the lanes, and what they get from all of `rows`; rows of
// grad_a and grad_b are `stride` apart.
template <bool kQueries, int kQ, class T, class H>
void block(const H& h, const Tokens& own, const Tokens& rows, int64_t tokens, int64_t i, int count,
           float factor, T* grad_a, T* grad_b, int64_t stride, float* scratch) {
  constexpr int kWidth = kQ * kLanes;
  const int dim = h.dim();
  const int64_t size = dim * kWidth;
  float *a = scratch, *b = a + size, *out_a = b + size, *out_b = out_a + size;
  float* p = out_b + size;
  memset(a, 0, static_cast<size_t>(2 * size) * sizeof(float));
  for (int t = 0; t < count; ++t)
    for (int d = 0; d < dim; ++d) {
      a[d * kWidth + t] = own.a[(i + t) * dim + d];
      b[d * kWidth + t] = own.b[(i + t) * dim + d];
    }
  Lanes<kQ> l;
  l.a = a, l.b = b, l.p = p, l.d_score = p + kTile * kWidth, l.grad_a = out_a, l.grad_b = out_b;
  if (kQueries) {
    float lse2[kWidth] = {}, delta[kWidth] = {};
    memcpy(lse2, own.lse2 + i, static_cast<size_t>(count) * sizeof(float));
    memcpy(delta, own.delta + i, static_cast<size_t>(count) * sizeof(float));
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
      l.lse2[j] = load(lse2 + j * kLanes);
      l.delta[j] = load(delta + j * kLanes);
    });
  }
  attend<kQueries>(h, l, rows, tokens);
  float row[64];
  for (int t = 0; t < count; ++t) {
    for (int d = 0; d < dim; ++d) row[d] = out_a[d * kWidth + t] * factor;
    write_row(row, grad_a + t * stride, dim);
    if (kQueries) continue;
    for (int d = 0; d < dim; ++d) row[d] = out_b[d * kWidth + t];
    write_row(row, grad_b + t * stride, dim);
  }
}

template <class T, class H>
void backward(const H& h, const EmhaBackwardArgs& args, int64_t begin, int64_t end,
              float* scratch) {
  const EmhaArgs& a = args.forward;
  const int dim = h.dim();
  const int64_t inner = a.heads * dim, length = segment_length(a), size = aligned(length * dim);
  float *q = scratch, *k = q + size, *v = k + size, *grad = v + size;
  float *lse2 = grad + size, *delta = lse2 + aligned(length), *rest = delta + aligned(length);
  const Tokens queries{q, grad, lse2, delta}, keys{k, v, nullptr, nullptr};
  const float scale = 1.0f / sqrtf(static_cast<float>(dim));
  int64_t packed = -1;
  for (int64_t at = begin; at < end; ++at) {
    const Place p = place(a, at);
    if (p.start >= p.tokens) continue;
    const int64_t token = p.n * a.tokens + p.first;
    if (p.unit != packed) {
      packed = p.unit;
      const T* from = static_cast<const T*>(a.qkv) + p.n * a.stride_n + p.first * a.stride_t;
      const T* out = static_cast<const T*>(a.out) + token * inner + p.head * dim;
      const T* grad_out = static_cast<const T*>(args.grad_out) + token * inner + p.head * dim;
      const float* lse = a.lse + (p.n * a.heads + p.head) * a.tokens + p.first;
      from += p.head * dim;
      for (int64_t t = 0; t < p.tokens; ++t) {
        float row[64], sum = 0.0f;
        read_row(from + t * a.stride_t, q + t * dim, dim);
        read_row(from + t * a.stride_t + inner, k + t * dim, dim);
        read_row(from + t * a.stride_t + 2 * inner, v + t * dim, dim);
        read_row(grad_out + t * inner, grad + t * dim, dim);
        read_row(out + t * inner, row, dim);
        for (int d = 0; d < dim; ++d) {
          q[t * dim + d] *= scale * kLog2E;
          sum += row[d] * grad[t * dim + d];
        }
        lse2[t] = lse[t] * kLog2E;
        delta[t] = sum;
      }
    }
    T* grad_q = static_cast<T*>(args.grad_qkv) + token * 3 * inner + p.head * dim;
    by_vectors(p.start, p.stop, [&](auto vectors, int64_t i, int count) {
      T* to = grad_q + i * 3 * inner;
      block<true, vectors.value, T>(h, queries, keys, p.tokens, i, count, scale, to, nullptr,
                                    3 * inner, rest);
      block<false, vectors.value, T>(h, keys, queries, p.tokens, i, count, kLn2, to + inner,
                                     to + 2 * inner, 3 * inner, rest);
    });
  }
}

}  // namespace

void emha_backward(const EmhaBackwardArgs& args, int64_t begin, int64_t end, float* scratch) {
  by_head(args.forward, [&](auto h) {
    EFRDN_FAST_BY_DTYPE(args.forward.dtype, backward<T>(h, args, begin, end, scratch))
  });
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
