// What the CPU kernels and their binding share. No torch here.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "types.h"

namespace efrdn_fast {

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Rows of a map as a kernel keeps them, planar: channel c of a row starts at c * row_stride(w), and
// kPad zeros stand before and after the w values, so that a 3x3 window needs no test.
constexpr int64_t kPad = 16;
inline int64_t row_stride(int64_t w) { return kPad + (w + 15) / 16 * 16 + kPad; }

// Calls a template of the element type: EFRDN_FAST_BY_DTYPE(dtype, run<T>(args)).
#define EFRDN_FAST_BY_DTYPE(dtype, ...) \
  switch (dtype) {                      \
    case Dtype::kFloat: {               \
      using T = float;                  \
      __VA_ARGS__;                      \
      break;                            \
    }                                   \
    case Dtype::kBf16: {                \
      using T = Bf16;                   \
      __VA_ARGS__;                      \
      break;                            \
    }                                   \
    case Dtype::kHalf: {                \
      using T = Half;                   \
      __VA_ARGS__;                      \
      break;                            \
    }                                   \
  }

// Declares a kernel in the namespace of every instruction set it is compiled for.
#if defined(__x86_64__) || defined(_M_X64)
#define EFRDN_FAST_X86 1
#define EFRDN_FAST_KERNEL(declaration)     \
  namespace avx512 { declaration; }        \
  namespace avx2 { declaration; }          \
  namespace generic { declaration; }
#else
#define EFRDN_FAST_KERNEL(declaration) \
  namespace generic { declaration; }
#endif

}  // namespace efrdn_fast
