// What the bindings of the CPU kernels share. Only ops_*_cpu.cpp see torch (its stable ABI).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace efrdn_fast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Isa { kGeneric, kAvx2, kAvx512, kAvx512Bf16 };

// Instruction set in use: the best of this CPU unless use_cpu_isa set another.
Isa current_isa();

#if defined(EFRDN_FAST_X86)
#define EFRDN_FAST_DISPATCH(kernel)                            \
  (current_isa() >= Isa::kAvx512 ? avx512::kernel              \
   : current_isa() == Isa::kAvx2 ? avx2::kernel : generic::kernel)
#else
#define EFRDN_FAST_DISPATCH(kernel) generic::kernel
#endif

// Working memory of the calling thread, 64-byte aligned, kept between calls.
float* workspace(size_t floats);

// The map with its channels next to each other: x itself where they are, else a copy.
Tensor nhwc(const Tensor& x);

// x as contiguous float32: itself where it is.
Tensor to_float(const Tensor& x);

// Uninitialised [n, c, h, w] in NHWC memory, or contiguous float32 of the size of `like`.
Tensor empty_nhwc(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype);
Tensor empty_float(const Tensor& like);

// The map's first element and strides, moved to channel `start`.
Map map_of(const Tensor& x, int64_t start = 0);

// Raises for a dtype without a kernel; `op` heads the message.
Dtype dtype_of(const char* op, const Tensor& x);

// Raises unless grad_y has the size and dtype of y, [N, channels, H, W] for x.
void check_gradient(const char* op, const Tensor& grad_y, const Tensor& x, int64_t channels = -1);

// f(begin, end) over [0, rows) in threads; at least about 8,192 pixels to a thread.
template <class F>
void parallel_rows(int64_t rows, int64_t w, const F& f) {
  torch::stable::parallel_for(0, rows, 1 + 8192 / w, f);
}

// Rows of a strip: at least 16, so that the rows computed around each cost little, and at most 64
// strips, all a function of the size alone.
inline int64_t strip_rows(int64_t rows) { return rows / 64 < 16 ? 16 : (rows + 63) / 64; }

// Sums over the strips of [strips, size] values, in order and in double precision.
std::vector<double> strip_totals(const float* partial, int64_t strips, int64_t size);

// The values from `from` on as a tensor of the shape and dtype of `like`; `from` moves past them.
Tensor tensor_like(const Tensor& like, const double*& from);

inline const float* floats(const Tensor& x) { return static_cast<const float*>(x.data_ptr()); }

}  // namespace efrdn_fast
