// Attention forward, shared by the kernels that differ in the numbers they multiply: queries in the
// lanes, keys and values broadcast, a tile of weights in L1.
//
// A struct of numbers N says how q, k, v are kept and multiplied:
//   Element                          of packed q, k and v
//   kTile<kShift>                    keys of a tile
//   width(dim)                       elements of a packed key
//   to_log2(dim)                     factor from its scores to units of log2
//   put_q(q, lanes, i, row, dim)     query i of a block
//   put_k, put_v(to, t, row, dim)    key and value t of a segment, put_end after the last
//   weigh<kShift>(h, r, k, keys, sum)  without a shift p = exp2(score) at once and its sum, else the
//                                    scores and their maximum
//   shift(h, r, keys, sum)           p = exp2(score - m) and its sum
//   exp2(x, log2)                    2^(x log2)
//   weights<kShift>(r)               where p is
#pragma once

#include "emha_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {

// Scores in units of log2 below which exp2 needs no shift by the maximum: sums stay far from the
// ends of the range of floats as long as values are between these bounds.
constexpr float kMaxBound = 50.0f, kMinValue = 1e-9f, kMaxValue = 1e12f;

template <class E>
struct Segment {
  const E *k, *v;  // [tokens, width], and of v what put_v makes
  int64_t tokens;
  float k_norm;  // largest norm of a key
  bool tame;     // all keys finite, values within the bounds above
};

template <class E, int kQ>
struct Rows {
  const E* q;      // [dim, kQ * kLanes]
  float *p, *o;    // the tile, [dim, kQ * kLanes]
  V m[kQ], l[kQ];  // shift and sum
  float log2;      // factor from scores to units of log2
};

// The rows of one block over all keys of the segment. kShift: by the maximum so far.
template <class N, bool kShift, int kQ, class H>
void attend(const H& h, const Segment<typename N::Element>& s, Rows<typename N::Element, kQ>& r) {
  using Element = typename N::Element;
  const int dim = h.dim();
  memset(r.o, 0, static_cast<size_t>(dim * kQ * kLanes) * sizeof(float));
  each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
    r.m[j] = kShift ? set1(-FLT_MAX) : zero();
    r.l[j] = zero();
  });
  constexpr int kTile = N::template kTile<kShift>;
  for (int64_t first = 0; first < s.tokens; first += kTile) {
    const int keys = s.tokens - first < kTile ? static_cast<int>(s.tokens - first) : kTile;
    V sum[kQ];
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA { sum[j] = kShift ? r.m[j] : zero(); });
    N::template weigh<kShift>(h, r, s.k + first * N::width(dim), keys, sum);
    if constexpr (kShift) {
      each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
        const V factor = N::exp2(sub(r.m[j], sum[j]), r.log2);
        r.m[j] = sum[j];
        sum[j] = zero();
        r.l[j] = mul(r.l[j], factor);
        for (int d = 0; d < dim; ++d) {
          float* to = r.o + (d * kQ + j) * kLanes;
          store(to, mul(load(to), factor));
        }
      });
      N::shift(h, r, keys, sum);
    }
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA { r.l[j] = add(r.l[j], sum[j]); });
    const int steps = (keys + kPair<Element> - 1) / kPair<Element>;
    gather_all<kQ>(h, N::template weights<kShift>(r), s.v + first * dim, steps, r.o);
  }
}

// Queries `first` to `first + count - 1` of a head; rows of qkv and out from there on.
template <class N, int kQ, class T, class H>
void block(const H& h, const EmhaArgs& a, const Segment<typename N::Element>& s, const T* q, T* out,
           float* lse, int count, float* scratch) {
  using Element = typename N::Element;
  constexpr int kWidth = kQ * kLanes;
  const int dim = h.dim();
  Rows<Element, kQ> r;
  r.o = scratch + dim * kWidth, r.p = r.o + dim * kWidth, r.log2 = N::to_log2(dim);
  memset(scratch, 0, static_cast<size_t>(dim * kWidth) * sizeof(float));
  Element* packed = reinterpret_cast<Element*>(scratch);
  r.q = packed;
  const float scale = kLog2E / sqrtf(static_cast<float>(dim));
  float row[64], largest = 0.0f;
  bool tame = s.tame;
  for (int i = 0; i < count; ++i) {
    read_row(q + i * a.stride_t, row, dim);
    float norm = 0.0f;
    for (int d = 0; d < dim; ++d) {
      const float value = row[d] * scale;
      norm += value * value;
    }
    N::put_q(packed, kWidth, i, row, dim);
    tame = tame && norm < FLT_MAX;
    largest = norm > largest ? norm : largest;
  }
  if (tame && sqrtf(largest) * s.k_norm <= kMaxBound)
    attend<N, false>(h, s, r);
  else
    attend<N, true>(h, s, r);
  float shift[kWidth], total[kWidth];
  each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
    store(shift + j * kLanes, r.m[j]);
    store(total + j * kLanes, r.l[j]);
  });
  for (int i = 0; i < count; ++i) {
    for (int d = 0; d < dim; ++d) row[d] = r.o[d * kWidth + i] / total[i];
    write_row(row, out + i * a.heads * dim, dim);
    lse[i] = shift[i] * (r.log2 * kLn2) + logf(total[i]);
  }
}

// Keys and values of a head of a segment.
template <class N, class T, class H>
Segment<typename N::Element> pack(const H& h, const EmhaArgs& a, const T* k, const T* v,
                                  int64_t tokens, float* to_k, float* to_v) {
  using Element = typename N::Element;
  const int dim = h.dim();
  Element *keys = reinterpret_cast<Element*>(to_k), *values = reinterpret_cast<Element*>(to_v);
  float norm = 0.0f, value = 0.0f;
  bool tame = true;
  for (int64_t t = 0; t < tokens; ++t) {
    float row_k[64], row_v[64];
    read_row(k + t * a.stride_t, row_k, dim);
    read_row(v + t * a.stride_t, row_v, dim);
    N::put_k(keys, t, row_k, dim);
    N::put_v(values, t, row_v, dim);
    float squares = 0.0f, sum = 0.0f;
    for (int d = 0; d < dim; ++d) {
      squares += row_k[d] * row_k[d];
      sum += fabsf(row_v[d]);
    }
    tame = tame && squares < FLT_MAX && sum < kMaxValue;
    norm = squares > norm ? squares : norm;
    value = sum > value ? sum : value;
  }
  N::put_end(values, tokens, dim);
  return {keys, values, tokens, sqrtf(norm), tame && value > kMinValue};
}

template <class N, class T, class H>
void forward(const H& h, const EmhaArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int dim = h.dim();
  const int64_t inner = a.heads * dim, length = segment_length(a);
  float *k = scratch, *v = k + aligned(length * dim), *rest = v + aligned(length * dim);
  Segment<typename N::Element> segment{};
  int64_t packed = -1;
  for (int64_t at = begin; at < end; ++at) {
    const Place p = place(a, at);
    const T* q = static_cast<const T*>(a.qkv) + p.n * a.stride_n + p.first * a.stride_t;
    q += p.head * dim;
    if (p.unit != packed && p.start < p.tokens) {
      segment = pack<N>(h, a, q + inner, q + 2 * inner, p.tokens, k, v);
      packed = p.unit;
    }
    by_vectors(p.start, p.stop, [&](auto vectors, int64_t i, int count) {
      T* out = static_cast<T*>(a.out) + (p.n * a.tokens + p.first + i) * inner + p.head * dim;
      float* lse = a.lse + (p.n * a.heads + p.head) * a.tokens + p.first + i;
      block<N, vectors.value>(h, a, segment, q + i * a.stride_t, out, lse, count, rest);
    });
  }
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
