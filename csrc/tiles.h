// Blocks of kLanes pixels between channels-last maps and planar rows.
#pragma once

#include "simd.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {

// The first min(n, kLanes) values.
template <class T>
EFRDN_FAST_INLINE V load_some(const T* p, int n) {
  return n >= kLanes ? load(p) : load(p, n);
}
template <class T>
EFRDN_FAST_INLINE void store_some(T* p, V a, int n) {
  if (n >= kLanes)
    store(p, a);
  else
    store(p, a, n);
}

// Sum of kLanes values in memory.
EFRDN_FAST_INLINE float lane_sum(const float* p) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += p[i];
  return sum;
}

// `channels` channels of `count` pixels with the pixels in the lanes: r[i] is channel i.
template <class T>
EFRDN_FAST_INLINE void load_transposed(V (&r)[kLanes], const T* p, int64_t stride, int count,
                                       int channels) {
#if defined(EFRDN_FAST_AVX512)
  if constexpr (sizeof(T) == sizeof(float))
    if (count == kLanes && channels == 9) return load_nine(r, p, stride);
#endif
  if (count == kLanes && channels >= kLanes) {
    each<0, kLanes>([&](auto i) EFRDN_FAST_LAMBDA { r[i] = load(p + i * stride); });
  } else {
    const int n = channels < kLanes ? channels : kLanes;
    each<0, kLanes>([&](auto i) EFRDN_FAST_LAMBDA {
      r[i] = i < count ? load(p + i * stride, n) : zero();
    });
  }
  transpose(r);
}

// Asks for kLanes pixels that come soon: the hardware does not follow this pattern (measured: 2.1 to
// 0.9 ms for 320 x 180 x 32 floats on Zen 4). Addresses past the map are harmless.
template <bool kWrite, class T>
EFRDN_FAST_INLINE void prefetch_pixels(const T* p, int64_t stride, int channels) {
#if defined(__GNUC__)
  for (int i = 0; i < kLanes; ++i)
    for (int c = 0; c < channels; c += 64 / static_cast<int>(sizeof(T)))
      __builtin_prefetch(p + i * stride + c, kWrite);
#endif
}

// One row of `channels` channels into planar rows at out + c * row_stride(w) + kPad, zero from column
// w to the next multiple of kLanes. With at least kLanes channels the last chunk overlaps the one
// before it instead of being partial.
template <class T>
EFRDN_FAST_INLINE void planar_row(const T* x, int64_t step, int64_t w, int channels, float* out) {
  const int64_t stride = row_stride(w);
  for (int64_t j = 0; j < w; j += kLanes) {
    const int count = w - j < kLanes ? static_cast<int>(w - j) : kLanes;
    prefetch_pixels<false>(x + (j + 4 * kLanes) * step, step, channels);
    for (int c = 0; c < channels; c += kLanes) {
      const int from = c + kLanes <= channels || channels < kLanes ? c : channels - kLanes;
      V r[kLanes];
      load_transposed(r, x + j * step + from, step, count, channels - from);
      each<0, kLanes>([&](auto i) EFRDN_FAST_LAMBDA {
        if (i < channels - from) store(out + (from + i) * stride + kPad + j, r[i]);
      });
    }
  }
}

// r[i] = channel i of kLanes pixels, written to `channels` channels of `count` pixels.
template <class T>
EFRDN_FAST_INLINE void store_transposed(V (&r)[kLanes], T* p, int64_t stride, int count,
                                        int channels) {
  transpose(r);
  if (count == kLanes && channels >= kLanes) {
    each<0, kLanes>([&](auto i) EFRDN_FAST_LAMBDA { store(p + i * stride, r[i]); });
  } else {
    const int n = channels < kLanes ? channels : kLanes;
    each<0, kLanes>([&](auto i) EFRDN_FAST_LAMBDA {
      if (i < count) store(p + i * stride, r[i], n);
    });
  }
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
