// Runs the CPU kernels on buffers between two pages without access: a read or a write past an end
// ends the program. Argument "break": a kernel gets too little memory, to show that this is seen.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "acrb_cpu.h"
#include "emha_cpu.h"
#include "gcrb_cpu.h"
#include "gcrb_train_cpu.h"

using namespace efrdn_fast;
namespace isa = efrdn_fast::EFRDN_FAST_ISA;

namespace {

enum class Side { kEnd, kBegin };

// Memory whose last (first) byte lies before (behind) a page without access.
class Guarded {
 public:
  Guarded(size_t bytes, Side side, size_t align = 1) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inner_ = (bytes + align - 1) / align * align;
    total_ = (inner_ + page - 1) / page * page + 2 * page;
    base_ = static_cast<char*>(
        mmap(nullptr, total_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) abort();
    mprotect(base_ + page, total_ - 2 * page, PROT_READ | PROT_WRITE);
    data_ = side == Side::kBegin ? base_ + page : base_ + total_ - page - inner_;
    memset(data_, 0xff, inner_);  // NaN
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, total_); }
  template <class T>
  T* get() {
    return reinterpret_cast<T*>(data_);
  }
  float* fill(size_t floats) {
    for (size_t i = 0; i < floats; ++i) get<float>()[i] = static_cast<float>(rand() % 17 - 8) / 8;
    return get<float>();
  }

 private:
  char *base_, *data_;
  size_t total_, inner_;
};

size_t element(Dtype dtype) { return dtype == Dtype::kFloat ? 4 : 2; }

Map dense(void* p, int64_t c, int64_t h, int64_t w) { return {p, h * w * c, w * c, c}; }

void gcrb(Dtype dtype, int64_t n, int64_t c, int64_t h, int64_t w, int64_t m, int64_t g, Side side,
          size_t missing) {
  const size_t map = static_cast<size_t>(n * c * h * w) * element(dtype);
  Guarded x(map, side), y(map, side), grad_y(map, side), grad_x(map, side);
  memset(x.get<char>(), 0, map), memset(grad_y.get<char>(), 0, map);
  const size_t sizes[] = {size_t(m * (c / g)), size_t(m),           size_t(9 * m),
                          size_t(m),           size_t(c * (m / g)), size_t(c)};
  Guarded w1(4 * sizes[0], side), b1(4 * sizes[1], side), w2(4 * sizes[2], side),
      b2(4 * sizes[3], side), w3(4 * sizes[4], side), b3(4 * sizes[5], side);
  const GcrbArgs a{dtype, n, c, h, w, m, g, dense(x.get<void>(), c, h, w),
                   dense(y.get<void>(), c, h, w), w1.fill(sizes[0]), b1.fill(sizes[1]),
                   w2.fill(sizes[2]), b2.fill(sizes[3]), w3.fill(sizes[4]), b3.fill(sizes[5])};
  Guarded scratch((gcrb_forward_scratch(a) - missing) * 4, side, 64);
  isa::gcrb_forward(a, 0, n * h, scratch.get<float>());
  isa::gcrb_forward(a, n * h / 2, n * h, scratch.get<float>());
  const int64_t rows = 2, strips = (n * h + rows - 1) / rows;
  Guarded partial(static_cast<size_t>(strips * gcrb_weights(a)) * 4, side);
  Guarded more(gcrb_backward_scratch(a) * 4, side, 64);
  const GcrbBackwardArgs b{a, dense(grad_y.get<void>(), c, h, w),
                           dense(grad_x.get<void>(), c, h, w), rows, partial.get<float>()};
  isa::gcrb_backward(b, 0, strips, more.get<float>());
}

void acrb(Dtype dtype, int64_t n, int64_t c, int64_t h, int64_t w, int64_t d, int64_t start,
          Side side) {
  const size_t map = static_cast<size_t>(n * h * w) * element(dtype);
  Guarded x(map * c, side), y(map * d, side), grad_y(map * d, side), grad_x(map * c, side);
  memset(x.get<char>(), 0, map * c), memset(grad_y.get<char>(), 0, map * d);
  Guarded weight(4 * 9 * d * d, side), turned(4 * 9 * d * d, side), bias(4 * d, side);
  Map from = dense(x.get<void>(), c, h, w);
  from.data = x.get<char>() + start * static_cast<int64_t>(element(dtype));
  const AcrbArgs a{dtype, n, d, h, w, from, dense(y.get<void>(), d, h, w),
                   weight.fill(9 * d * d), bias.fill(d)};
  Guarded scratch(acrb_forward_scratch(a) * 4, side, 64);
  isa::acrb_forward(a, 0, n * h, scratch.get<float>());
  const int64_t rows = 2, strips = (n * h + rows - 1) / rows;
  Guarded partial(static_cast<size_t>(strips * (9 * d * d + d)) * 4, side);
  Guarded more(acrb_backward_scratch(a) * 4, side, 64);
  const AcrbBackwardArgs b{a, turned.fill(9 * d * d), dense(grad_y.get<void>(), d, h, w),
                           dense(grad_x.get<void>(), c, h, w), c, start, rows,
                           partial.get<float>()};
  isa::acrb_backward(b, 0, strips, more.get<float>());
}

void train(Dtype dtype, int64_t n, int64_t c, int64_t h, int64_t w, int64_t m, int64_t g,
           Side side) {
  const size_t bytes = static_cast<size_t>(n * c * h * w) * element(dtype);
  Guarded x(bytes, side), grad_y(bytes, side), grad_x(bytes, side);
  memset(x.get<char>(), 0, bytes), memset(grad_y.get<char>(), 0, bytes);
  const int64_t cg = c / g, mg = m / g, strips = (n * h + 1) / 2;
  const size_t planar = static_cast<size_t>(n * h * m * row_stride(w)) * 4;
  Guarded a1(planar, side), a2(planar, side), g2(planar, side), g1(planar, side);
  Guarded w1(4 * m * cg, side), w2(4 * 9 * m, side), w3(4 * c * mg, side), b3(4 * c, side);
  Guarded mids(4 * m, side), mix(4 * m * mg, side);
  const float* mid = mids.fill(m);
  GcrbTrainArgs t{};
  t.base = {dtype, n, c, h, w, m, g, dense(x.get<void>(), c, h, w), {}, w1.fill(m * cg), nullptr,
            w2.fill(9 * m), nullptr, w3.fill(c * mg), b3.fill(c)};
  t.scale1 = t.shift1 = t.scale2 = t.shift2 = t.offset = mid;
  t.norm1 = t.norm2 = {mid, mid, mid, mid, mid};
  t.mix = mix.fill(m * mg);
  t.a1 = a1.get<float>(), t.a2 = a2.get<float>(), t.g2 = g2.get<float>(), t.g1 = g1.get<float>();
  t.grad_y = dense(grad_y.get<void>(), c, h, w), t.grad_x = dense(grad_x.get<void>(), c, h, w);
  t.strip_rows = 2;
  Guarded scratch(gcrb_train_scratch(t.base) * 4, side, 64);
  const auto rows = [&](auto pass, int64_t each) {
    Guarded moments(static_cast<size_t>(n * h * each) * 4, side);
    t.moments = moments.get<float>();
    pass(t, 0, n * h, scratch.get<float>());
  };
  const auto sums = [&](auto pass, int64_t each) {
    Guarded partial(static_cast<size_t>(strips * each) * 4, side);
    t.partial = partial.get<float>();
    pass(t, 0, (n * h + 1) / 2, scratch.get<float>());
  };
  rows(isa::train_squeeze, 2 * m);
  rows(isa::train_depthwise, 2 * m);
  rows(isa::train_mid_moments, m * (1 + mg));
  sums(isa::train_expand_backward, c * mg + c);
  sums(isa::train_mid_backward, 2 * m);
  sums(isa::train_depthwise_backward, 11 * m);
  sums(isa::train_squeeze_backward, m * cg);
}

void emha(Dtype dtype, int64_t n, int64_t tokens, int64_t heads, int64_t dim, int64_t length,
          Side side) {
  const size_t rows = static_cast<size_t>(n * tokens), inner = static_cast<size_t>(heads * dim);
  const size_t size = rows * inner * element(dtype);
  Guarded qkv(3 * size, side), out(size, side), lse(4 * rows * heads, side), grad_out(size, side),
      grad_qkv(3 * size, side);
  memset(qkv.get<char>(), 0, 3 * size), memset(grad_out.get<char>(), 0, size);
  const int64_t step = 3 * heads * dim;
  EmhaArgs a{dtype, n, tokens, heads, dim, length, qkv.get<void>(), tokens * step, step,
             out.get<void>(), lse.get<float>()};
  for (char value : {0x3c, 0x43}) {  // small scores, and such as need a shift
    memset(qkv.get<char>(), value, 3 * size);
    Guarded scratch(emha_forward_scratch(a) * 4, side, 64);
    isa::emha_forward(a, 0, emha_blocks(a), scratch.get<float>());
#if defined(GUARD_BF16)
    if (dtype == Dtype::kBf16) {
      Guarded fresh(emha_forward_scratch(a) * 4, side, 64);
      avx512bf16::emha_forward_bf16(a, 0, emha_blocks(a), fresh.get<float>());
    }
#endif
  }
  const EmhaBackwardArgs b{a, grad_out.get<void>(), grad_qkv.get<void>()};
  Guarded scratch(emha_backward_scratch(a) * 4, side, 64);
  isa::emha_backward(b, 0, emha_blocks(a), scratch.get<float>());
}

}  // namespace

int main(int argc, char** argv) {
  const size_t missing = argc > 1 && !strcmp(argv[1], "break") ? 4096 : 0;
  const int64_t widths[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 50};
  int count = 0;
  for (Side side : {Side::kEnd, Side::kBegin})
    for (Dtype dtype : {Dtype::kFloat, Dtype::kBf16, Dtype::kHalf})
      for (int64_t w : widths)
        for (int64_t h : {1, 3}) {
          printf("width %d, height %d, dtype %d, side %d\n", int(w), int(h), int(dtype), int(side));
          fflush(stdout);
          gcrb(dtype, 2, 32, h, w, 8, 2, side, missing);
          gcrb(dtype, 1, 12, h, w, 3, 1, side, missing);
          gcrb(dtype, 1, 40, h, w, 8, 4, side, missing);
          train(dtype, 2, 32, h, w, 8, 2, side);
          train(dtype, 1, 40, h, w, 8, 4, side);
          acrb(dtype, 2, 32, h, w, 9, 23, side);
          acrb(dtype, 1, 9, h, w, 9, 0, side);
          acrb(dtype, 1, 23, h, w, 17, 6, side);
          acrb(dtype, 1, 5, h, w, 3, 1, side);
          count += 9;
        }
  for (Side side : {Side::kEnd, Side::kBegin})
    for (Dtype dtype : {Dtype::kFloat, Dtype::kBf16, Dtype::kHalf})
      for (int64_t tokens : {1, 2, 15, 39, 41, 79, 81, 131})
        for (int64_t dim : {1, 7, 18, 63, 64}) {
          printf("tokens %d, dim %d, dtype %d, side %d\n", int(tokens), int(dim), int(dtype),
                 int(side));
          fflush(stdout);
          emha(dtype, 2, tokens, 3, dim, 100, side);
          emha(dtype, 1, tokens, 2, dim, (tokens + 3) / 4, side);
          count += 2;
        }
  printf("%d cases inside their memory\n", count);
}
