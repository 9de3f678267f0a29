// Fusing 3x3 convolution on the CPU: four channels in, per source, and four out to a group.
#pragma once

#include "cpu.h"

namespace efrdn_fast {

// y = conv3x3(j) (+ residual), j the joined map of C channels, or two of them side by side:
//   kOne: a.  kPairs: a0, b0, a1, b1, ..., a and b of C / 2 channels.  kTwo: a and b of C channels.
// a is multiplied by sigmoid(gate), and b goes through ReLU where asked. C is a multiple of 32.
enum class Join { kOne, kPairs, kTwo };
enum class Gate { kNone, kPixel, kChannel };

struct MergeArgs {
  Dtype dtype;
  int64_t n, c, h, w;
  Join join;
  Gate gate;
  bool relu;
  Map a, b, y, residual;  // residual.data may be null
  const float* logits;    // of the gate: [N, H, W] or [N, channels of a]
  const float* weight;    // [sources, 3, 3, 4 in, C out]
};

inline int64_t merge_sources(const MergeArgs& a) { return a.join == Join::kTwo ? 2 : 1; }
inline int64_t merge_channels_a(const MergeArgs& a) { return a.join == Join::kPairs ? a.c / 2 : a.c; }

// Floats of a row of NHWC pixels, one zero pixel before it and at least one after it.
inline int64_t merge_row(const MergeArgs& a) { return ((a.w + 7) / 8 * 8 + 2) * a.c; }

inline size_t merge_forward_scratch(const MergeArgs& a) {
  return static_cast<size_t>(3 * merge_sources(a) * merge_row(a) + a.w + 16 + a.c);
}

// Rows [begin, end) of the N * H output rows.
EFRDN_FAST_KERNEL(void merge_forward(const MergeArgs& args, int64_t begin, int64_t end,
                                     float* scratch))

// Gradients of the above; that of the residual is grad_y. Every image is cut into strips of rows,
// and each strip writes its own sums, so that the result does not depend on the number of threads.
struct MergeBackwardArgs {
  MergeArgs forward;    // y and residual are not used
  const float* turned;  // [sources, 3, 3, 4 out, C in], rotated by half a turn
  Map grad_y, grad_a, grad_b;
  float* grad_pixel;  // gradient of the logits, kPixel only
  int64_t strip_rows, image_strips;
  float* partial;  // [N, image_strips, merge_sums]: weight as in the forward, then, kChannel only,
                   // the gradient of the image's logits
};

inline int64_t merge_sums(const MergeArgs& a) {
  return merge_sources(a) * 36 * a.c + (a.gate == Gate::kChannel ? a.c : 0);
}

inline size_t merge_backward_scratch(const MergeArgs& a) {
  return static_cast<size_t>((4 * merge_sources(a) + 3) * merge_row(a) + 2 * (a.w + 16) + a.c +
                             merge_sums(a));
}

// Strips [begin, end) of the N * image_strips.
EFRDN_FAST_KERNEL(void merge_backward(const MergeBackwardArgs& args, int64_t begin, int64_t end,
                                      float* scratch))

}  // namespace efrdn_fast
