// What the CUDA launchers and their binding share: element types and maps in memory.
#pragma once

#include <stdint.h>

namespace efrdn_fast {

enum class Dtype { kFloat, kBf16, kHalf };

// A map [N, C, H, W] whose channels lie next to each other; strides in elements.
struct Map {
  void* data;
  int64_t stride_n, stride_h, stride_w;
};

}  // namespace efrdn_fast
