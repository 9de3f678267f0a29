// Attention forward: queries in the lanes, keys and values broadcast, a tile of scores in L1.
#include "emha_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

constexpr int kTile = 60;  // keys whose scores are kept, in L1

// Scores in units of log2 below which exp2 needs no shift by the maximum: sums stay far from the
// ends of the range of floats as long as values are between these bounds.
constexpr float kMaxBound = 50.0f, kMinValue = 1e-9f, kMaxValue = 1e12f;

struct Segment {
  const float *k, *v;  // [tokens, dim]
  int64_t tokens;
  float k_norm;  // largest norm of a key
  bool tame;     // all keys finite, values within the bounds above
};

template <int kQ>
struct Rows {
  const float* q;  // [dim, kQ * kLanes], scaled to scores in units of log2
  float *p, *o;    // [kTile, kQ * kLanes], [dim, kQ * kLanes]
  V m[kQ], l[kQ];  // shift and sum
};

// kCount keys: without a shift p = exp2(score) at once, else the scores and their maximum.
template <bool kShift, int kCount, int kQ, class H>
EFRDN_FAST_INLINE void weigh(const H& h, const Rows<kQ>& r, const float* k, int t, V (&sum)[kQ]) {
  V acc[kCount][kQ];
  products(h, r.q, k + t * h.dim(), acc);
  each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
      const V value = kShift ? acc[i][j] : exp2(acc[i][j]);
      sum[j] = kShift ? max(value, sum[j]) : add(sum[j], value);
      store(r.p + ((t + i) * kQ + j) * kLanes, value);
    });
  });
}

// The rows of one block over all keys of the segment. kShift: by the maximum so far.
template <bool kShift, int kQ, class H>
void attend(const H& h, const Segment& s, Rows<kQ>& r) {
  const int dim = h.dim();
  memset(r.o, 0, static_cast<size_t>(dim * kQ * kLanes) * sizeof(float));
  each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
    r.m[j] = kShift ? set1(-FLT_MAX) : zero();
    r.l[j] = zero();
  });
  for (int64_t first = 0; first < s.tokens; first += kTile) {
    const int keys = s.tokens - first < kTile ? static_cast<int>(s.tokens - first) : kTile;
    const float* k = s.k + first * dim;
    V sum[kQ];
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA { sum[j] = kShift ? r.m[j] : zero(); });
    int t = 0;
    for (; t + kKeys <= keys; t += kKeys) weigh<kShift, kKeys>(h, r, k, t, sum);
    for (; t < keys; ++t) weigh<kShift, 1>(h, r, k, t, sum);
    if constexpr (kShift) {
      each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
        const V factor = exp2(sub(r.m[j], sum[j]));
        r.m[j] = sum[j];
        sum[j] = zero();
        r.l[j] = mul(r.l[j], factor);
        for (int d = 0; d < dim; ++d) {
          float* to = r.o + (d * kQ + j) * kLanes;
          store(to, mul(load(to), factor));
        }
      });
      for (t = 0; t < keys; ++t)
        each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
          float* at = r.p + (t * kQ + j) * kLanes;
          const V value = exp2(sub(load(at), r.m[j]));
          sum[j] = add(sum[j], value);
          store(at, value);
        });
    }
    each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA { r.l[j] = add(r.l[j], sum[j]); });
    gather_all<kQ>(h, r.p, s.v + first * dim, keys, r.o);
  }
}

// Queries `first` to `first + count - 1` of a head; rows of qkv and out from there on.
template <int kQ, class T, class H>
void block(const H& h, const EmhaArgs& a, const Segment& s, const T* q, T* out, float* lse,
           int count, float* scratch) {
  constexpr int kWidth = kQ * kLanes;
  const int dim = h.dim();
  float* packed = scratch;
  Rows<kQ> r;
  r.q = packed, r.o = packed + dim * kWidth, r.p = r.o + dim * kWidth;
  memset(packed, 0, static_cast<size_t>(dim * kWidth) * sizeof(float));
  const float scale = kLog2E / sqrtf(static_cast<float>(a.dim));
  float row[64], largest = 0.0f;
  bool tame = s.tame;
  for (int i = 0; i < count; ++i) {
    read_row(q + i * a.stride_t, row, dim);
    float norm = 0.0f;
    for (int d = 0; d < dim; ++d) {
      const float value = row[d] * scale;
      packed[d * kWidth + i] = value;
      norm += value * value;
    }
    tame = tame && norm < FLT_MAX;
    largest = norm > largest ? norm : largest;
  }
  if (tame && sqrtf(largest) * s.k_norm <= kMaxBound)
    attend<false>(h, s, r);
  else
    attend<true>(h, s, r);
  float shift[kWidth], total[kWidth];
  each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
    store(shift + j * kLanes, r.m[j]);
    store(total + j * kLanes, r.l[j]);
  });
  for (int i = 0; i < count; ++i) {
    for (int d = 0; d < dim; ++d) row[d] = r.o[d * kWidth + i] / total[i];
    write_row(row, out + i * a.heads * dim, dim);
    lse[i] = shift[i] * kLn2 + logf(total[i]);
  }
}

// Keys and values of a head of a segment as packed floats.
template <class T, class H>
Segment pack(const H& h, const EmhaArgs& a, const T* k, const T* v, int64_t tokens, float* to_k,
             float* to_v) {
  const int dim = h.dim();
  float norm = 0.0f, value = 0.0f;
  bool tame = true;
  for (int64_t t = 0; t < tokens; ++t) {
    float *row_k = to_k + t * dim, *row_v = to_v + t * dim;
    read_row(k + t * a.stride_t, row_k, dim);
    read_row(v + t * a.stride_t, row_v, dim);
    float squares = 0.0f, sum = 0.0f;
    for (int d = 0; d < dim; ++d) {
      squares += row_k[d] * row_k[d];
      sum += fabsf(row_v[d]);
    }
    tame = tame && squares < FLT_MAX && sum < kMaxValue;
    norm = squares > norm ? squares : norm;
    value = sum > value ? sum : value;
  }
  return {to_k, to_v, tokens, sqrtf(norm), tame && value > kMinValue};
}

template <class T, class H>
void forward(const H& h, const EmhaArgs& a, int64_t begin, int64_t end, float* scratch) {
  const int dim = h.dim();
  const int64_t inner = a.heads * dim, length = segment_length(a);
  float *k = scratch, *v = k + aligned(length * dim), *rest = v + aligned(length * dim);
  Segment segment{};
  int64_t packed = -1;
  for (int64_t at = begin; at < end; ++at) {
    const Place p = place(a, at);
    const T* q = static_cast<const T*>(a.qkv) + p.n * a.stride_n + p.first * a.stride_t;
    q += p.head * dim;
    if (p.unit != packed && p.start < p.tokens) {
      segment = pack(h, a, q + inner, q + 2 * inner, p.tokens, k, v);
      packed = p.unit;
    }
    by_vectors(p.start, p.stop, [&](auto vectors, int64_t i, int count) {
      T* out = static_cast<T*>(a.out) + (p.n * a.tokens + p.first + i) * inner + p.head * dim;
      float* lse = a.lse + (p.n * a.heads + p.head) * a.tokens + p.first + i;
      block<vectors.value>(h, a, segment, q + i * a.stride_t, out, lse, count, rest);
    });
  }
}

}  // namespace

void emha_forward(const EmhaArgs& a, int64_t begin, int64_t end, float* scratch) {
  by_head(a, [&](auto h) {
    EFRDN_FAST_BY_DTYPE(a.dtype, forward<T>(h, a, begin, end, scratch))
  });
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
