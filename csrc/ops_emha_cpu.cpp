// The CPU ops of attention. Arguments are validated in Python; what would read or write out of
// bounds is checked again here.
#include "emha_cpu.h"
#include "ops_cpu.h"

namespace efrdn_fast {
namespace {

EmhaArgs arguments(const char* op, const Tensor& qkv, int64_t heads, int64_t length) {
  STD_TORCH_CHECK(qkv.dim() == 3 && heads > 0 && length > 0 && qkv.size(2) % (3 * heads) == 0 &&
                      qkv.size(2) <= 3 * heads * 64,
                  op, ": qkv must be [N, T, 3 * heads * D] with D up to 64, got ", qkv.dim(),
                  " dimensions, ", heads, " heads, segments of ", length);
  EmhaArgs a{};
  a.dtype = dtype_of(op, qkv);
  a.n = qkv.size(0), a.tokens = qkv.size(1), a.heads = heads;
  a.dim = qkv.size(2) / (3 * heads), a.length = length;
  a.qkv = qkv.data_ptr(), a.stride_n = qkv.stride(0), a.stride_t = qkv.stride(1);
  return a;
}

// Rows whose values lie next to each other: x itself where they do, else a copy.
Tensor rows(const Tensor& x) {
  return x.dim() != 3 || x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
}

// Bfloat16 has a kernel of its own where the CPU multiplies it.
auto forward_kernel(Dtype dtype) {
#if defined(EFRDN_FAST_X86)
  if (dtype == Dtype::kBf16 && current_isa() == Isa::kAvx512Bf16)
    return avx512bf16::emha_forward_bf16;
#endif
  return EFRDN_FAST_DISPATCH(emha_forward);
}

std::tuple<Tensor, Tensor> emha(Tensor qkv, int64_t heads, int64_t length, bool tf32) {
  qkv = rows(qkv);
  EmhaArgs a = arguments("emha_cpu", qkv, heads, length);
  Tensor out = torch::stable::empty({a.n, a.tokens, a.heads * a.dim}, qkv.scalar_type());
  Tensor lse = torch::stable::empty({a.n, a.heads, a.tokens}, ScalarType::Float);
  a.out = out.data_ptr(), a.lse = static_cast<float*>(lse.data_ptr());
  const auto kernel = forward_kernel(a.dtype);
  const size_t scratch = emha_forward_scratch(a);
  torch::stable::parallel_for(0, emha_blocks(a), 1, [&](int64_t begin, int64_t end) {
    kernel(a, begin, end, workspace(scratch));
  });
  return {out, lse};
}

Tensor emha_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int64_t heads,
                     int64_t length, bool tf32) {
  const char* op = "emha_backward_cpu";
  qkv = rows(qkv);
  EmhaArgs a = arguments(op, qkv, heads, length);
  const int64_t size = a.n * a.tokens * a.heads * a.dim;
  STD_TORCH_CHECK(grad_out.numel() == size && out.numel() == size &&
                      lse.numel() == a.n * a.heads * a.tokens &&
                      grad_out.scalar_type() == qkv.scalar_type() &&
                      out.scalar_type() == qkv.scalar_type(),
                  op, ": grad_out and out must have the dtype of qkv and a third of its size, lse "
                  "one value per query and head");
  grad_out = torch::stable::contiguous(grad_out), out = torch::stable::contiguous(out);
  lse = to_float(lse);
  a.out = out.data_ptr(), a.lse = static_cast<float*>(lse.data_ptr());
  Tensor grad_qkv = torch::stable::empty(qkv.sizes(), qkv.scalar_type());
  const EmhaBackwardArgs args{a, grad_out.data_ptr(), grad_qkv.data_ptr()};
  const auto kernel = EFRDN_FAST_DISPATCH(emha_backward);
  const size_t scratch = emha_backward_scratch(a);
  torch::stable::parallel_for(0, emha_blocks(a), 1, [&](int64_t begin, int64_t end) {
    kernel(args, begin, end, workspace(scratch));
  });
  return grad_qkv;
}

}  // namespace
}  // namespace efrdn_fast

STABLE_TORCH_LIBRARY_FRAGMENT(efrdn_fast_ext, m) {
  m.def("emha_cpu(Tensor qkv, int heads, int length, bool tf32) -> (Tensor, Tensor)");
  m.def(
      "emha_backward_cpu(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, int heads, "
      "int length, bool tf32) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(efrdn_fast_ext, CPU, m) {
  m.impl("emha_cpu", TORCH_BOX(&efrdn_fast::emha));
  m.impl("emha_backward_cpu", TORCH_BOX(&efrdn_fast::emha_backward));
}
