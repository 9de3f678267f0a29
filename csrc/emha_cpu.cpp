// Attention forward in products of floats.
#include "emha_forward.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

// q scaled to scores in units of log2, k and v as they are; the tile: [kTile, kQ * kLanes].
struct Floats {
  using Element = float;
  template <bool kShift>
  static constexpr int kTile = 60;

  static int width(int dim) { return dim; }
  static float to_log2(int) { return 1.0f; }
  static V exp2(V x, float) { return EFRDN_FAST_ISA::exp2(x); }

  EFRDN_FAST_INLINE static void put_q(float* q, int lanes, int i, const float* row, int dim) {
    const float scale = kLog2E / sqrtf(static_cast<float>(dim));
    for (int d = 0; d < dim; ++d) q[d * lanes + i] = row[d] * scale;
  }
  EFRDN_FAST_INLINE static void put_k(float* to, int64_t t, const float* row, int dim) {
    memcpy(to + t * dim, row, static_cast<size_t>(dim) * sizeof(float));
  }
  EFRDN_FAST_INLINE static void put_v(float* to, int64_t t, const float* row, int dim) {
    put_k(to, t, row, dim);
  }
  static void put_end(float*, int64_t, int) {}

  template <bool kShift, int kQ>
  EFRDN_FAST_INLINE static const float* weights(const Rows<float, kQ>& r) {
    return r.p;
  }

  template <bool kShift, int kCount, int kQ, class H>
  EFRDN_FAST_INLINE static void some(const H& h, const Rows<float, kQ>& r, const float* k, int t,
                                     V (&sum)[kQ]) {
    V acc[kCount][kQ];
    products(h, r.q, k + t * h.dim(), acc);
    each<0, kCount>([&](auto i) EFRDN_FAST_LAMBDA {
      each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
        const V value = kShift ? acc[i][j] : EFRDN_FAST_ISA::exp2(acc[i][j]);
        sum[j] = kShift ? max(value, sum[j]) : add(sum[j], value);
        store(r.p + ((t + i) * kQ + j) * kLanes, value);
      });
    });
  }
  template <bool kShift, int kQ, class H>
  EFRDN_FAST_INLINE static void weigh(const H& h, const Rows<float, kQ>& r, const float* k,
                                      int keys, V (&sum)[kQ]) {
    int t = 0;
    for (; t + kKeys <= keys; t += kKeys) some<kShift, kKeys>(h, r, k, t, sum);
    for (; t < keys; ++t) some<kShift, 1>(h, r, k, t, sum);
  }

  template <int kQ, class H>
  EFRDN_FAST_INLINE static void shift(const H&, const Rows<float, kQ>& r, int keys,
                                      V (&sum)[kQ]) {
    for (int t = 0; t < keys; ++t)
      each<0, kQ>([&](auto j) EFRDN_FAST_LAMBDA {
        float* at = r.p + (t * kQ + j) * kLanes;
        const V value = EFRDN_FAST_ISA::exp2(sub(load(at), r.m[j]));
        sum[j] = add(sum[j], value);
        store(at, value);
      });
  }
};

}  // namespace

void emha_forward(const EmhaArgs& a, int64_t begin, int64_t end, float* scratch) {
  by_head(a, [&](auto h) {
    EFRDN_FAST_BY_DTYPE(a.dtype, (forward<Floats, T>(h, a, begin, end, scratch)))
  });
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
