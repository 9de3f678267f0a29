// Choice of the instruction set, memory, and the schemas of the CPU ops.
#include "ops_cpu.h"

#include <atomic>
#include <string>

namespace efrdn_fast {
namespace {

Isa best_isa() {
#if defined(EFRDN_FAST_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kGeneric;
}

std::atomic<Isa>& isa() {
  static std::atomic<Isa> value{best_isa()};
  return value;
}

const char* const kIsaNames[] = {"generic", "avx2", "avx512", "avx512bf16"};

std::string cpu_isa() { return kIsaNames[static_cast<int>(current_isa())]; }

// For tests: every instruction set that this CPU has can be made to serve.
void use_cpu_isa(std::string name) {
  for (int i = 0; i <= static_cast<int>(best_isa()); ++i)
    if (name == kIsaNames[i]) {
      isa() = static_cast<Isa>(i);
      return;
    }
  STD_TORCH_CHECK(false, "use_cpu_isa: this CPU runs up to ",
                  kIsaNames[static_cast<int>(best_isa())], ", got ", name);
}

}  // namespace

Isa current_isa() { return isa().load(std::memory_order_relaxed); }

float* workspace(size_t floats) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> memory;
  static thread_local size_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    memory.reset(std::malloc(floats * sizeof(float) + 64));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.get());
  return reinterpret_cast<float*>((address + 63) & ~static_cast<uintptr_t>(63));
}

Tensor nhwc(const Tensor& x) {
  // A dimension of size 1 is never stepped over: its stride does not matter.
  if (x.size(1) == 1 || x.stride(1) == 1) return x;
  return torch::stable::contiguous(x, MemoryFormat::ChannelsLast);
}

Tensor to_float(const Tensor& x) {
  Tensor out = x.scalar_type() == ScalarType::Float ? x : torch::stable::to(x, ScalarType::Float);
  return out.is_contiguous() ? out : torch::stable::contiguous(out);
}

Tensor empty_nhwc(int64_t n, int64_t c, int64_t h, int64_t w, ScalarType dtype) {
  return torch::stable::empty({n, c, h, w}, dtype, std::nullopt, std::nullopt, std::nullopt,
                              MemoryFormat::ChannelsLast);
}

Tensor empty_float(const Tensor& like) {
  return torch::stable::empty(like.sizes(), ScalarType::Float);
}

std::vector<double> strip_totals(const float* partial, int64_t strips, int64_t size) {
  std::vector<double> out(static_cast<size_t>(size));
  for (int64_t strip = 0; strip < strips; ++strip)
    for (int64_t i = 0; i < size; ++i) out[i] += partial[strip * size + i];
  return out;
}

Tensor tensor_like(const Tensor& like, const double*& from) {
  Tensor out = empty_float(like);
  float* to = static_cast<float*>(out.data_ptr());
  for (int64_t i = 0; i < like.numel(); ++i) to[i] = static_cast<float>(*from++);
  const ScalarType dtype = like.scalar_type();
  return dtype == ScalarType::Float ? out : torch::stable::to(out, dtype);
}

Map map_of(const Tensor& x, int64_t start) {
  char* data = static_cast<char*>(x.data_ptr()) + start * static_cast<int64_t>(x.element_size());
  return {data, x.stride(0), x.stride(2), x.stride(3)};
}

Dtype dtype_of(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat;
    case ScalarType::BFloat16: return Dtype::kBf16;
    case ScalarType::Half: return Dtype::kHalf;
    default:
      STD_TORCH_CHECK(false, op, ": x must be float32, bfloat16 or float16, got another dtype");
  }
}

void check_gradient(const char* op, const Tensor& grad_y, const Tensor& x, int64_t channels) {
  STD_TORCH_CHECK(x.dim() == 4 && grad_y.dim() == 4 && grad_y.scalar_type() == x.scalar_type() &&
                      grad_y.size(0) == x.size(0) && grad_y.size(2) == x.size(2) &&
                      grad_y.size(3) == x.size(3) &&
                      grad_y.size(1) == (channels < 0 ? x.size(1) : channels),
                  op, ": grad_y must have the dtype of x and the size of the output");
}

}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def("cpu_isa() -> str");
  m.def("use_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&efrdn_fast::cpu_isa));
  m.impl("use_cpu_isa", TORCH_BOX(&efrdn_fast::use_cpu_isa));
}
