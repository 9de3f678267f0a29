// Gates of channels and pixels on the CPU, and 3x3 patches as tokens. C is a multiple of 16.
#pragma once

#include "cpu.h"

namespace efrdn_fast {

struct GateArgs {
  Dtype dtype;
  int64_t n, c, h, w;
  Map x, z, base, grad;  // maps that are read; each pass says which
  Map y, grad_z;         // maps that are written
  const float* scale;    // [N, C]
  const float* slope;    // [N, C]
  const float* center;   // [N, C]
  const float* offset;   // [N, C]
  float* rows;           // sums of each row, [N * H, ...]
};

// Passes over rows [begin, end) of the N * H rows.
#define EFRDN_FAST_PASS_OF(Args, name) \
  EFRDN_FAST_KERNEL(void name(const Args& args, int64_t begin, int64_t end))

// rows: mean of x [C], sum of squared deviations from it [C].
EFRDN_FAST_PASS_OF(GateArgs, gate_moments)
// rows: sum of grad x [C].
EFRDN_FAST_PASS_OF(GateArgs, gate_products)
// y = base + scale x.
EFRDN_FAST_PASS_OF(GateArgs, gate_apply)
// y = scale grad + slope (x - center) + offset: where all pixels agree, x - center is nothing.
EFRDN_FAST_PASS_OF(GateArgs, gate_apply_backward)
// y = x sigmoid(z); backward y = grad sigmoid(z), grad_z = grad x sigmoid'(z).
EFRDN_FAST_PASS_OF(GateArgs, gate_sigmoid)
EFRDN_FAST_PASS_OF(GateArgs, gate_sigmoid_backward)

// tokens [N, H, W, 3, 3, C], contiguous, of the dtype of the map.
struct TokenArgs {
  Dtype dtype;
  int64_t n, c, h, w;
  Map x;
  void* tokens;
};

// Rows [begin, end) of x into tokens, zero outside the image; and the sum of the patches that meet
// at a pixel, back into rows of x.
EFRDN_FAST_PASS_OF(TokenArgs, tokens_unfold)
EFRDN_FAST_PASS_OF(TokenArgs, tokens_fold)

}  // namespace efrdn_fast
