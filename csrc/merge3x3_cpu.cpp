// Fusing 3x3 convolution: rolling buffers of three joined rows per source.
#include "merge3x3_steps.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

// Three joined rows per source around the row at hand.
template <class T>
struct JoinedRows {
  const MergeArgs& f;
  float *data, *gate;  // [source, 3, merge_row]; [w] or [channels of a]
  int64_t size, sources, n = 0;

  JoinedRows(const MergeArgs& args, float* memory)
      : f(args), data(memory), size(merge_row(args)), sources(merge_sources(args)) {
    gate = data + 3 * sources * size;
    memset(data, 0, static_cast<size_t>(3 * sources * size) * sizeof(float));
  }
  float* end() const { return gate + f.w + 16 + f.c; }

  void start(int64_t image) {
    n = image;
    const int64_t ca = merge_channels_a(f);
    if (f.gate == Gate::kChannel) gate_row(f.logits + n * ca, ca, gate);
  }
  float* at(int64_t source, int64_t row) const {
    return data + (3 * source + (row + 3) % 3) * size;
  }
  void fill(int64_t row) const {
    if (row < 0 || row >= f.h) {
      for (int64_t s = 0; s < sources; ++s)
        memset(at(s, row), 0, static_cast<size_t>(size) * sizeof(float));
      return;
    }
    if (f.gate == Gate::kPixel) gate_row(f.logits + (n * f.h + row) * f.w, f.w, gate);
    const T* a = static_cast<const T*>(f.a.data) + n * f.a.stride_n + row * f.a.stride_h;
    const T* b = static_cast<const T*>(f.b.data) + n * f.b.stride_n + row * f.b.stride_h;
    join_row(f, a, b, gate, at(0, row), 3 * size);
  }
  Around around(int64_t source, int64_t row) const {
    return {{at(source, row - 1), at(source, row), at(source, row + 1)}};
  }
};

template <class T>
void forward(const MergeArgs& a, int64_t begin, int64_t end, float* scratch) {
  JoinedRows<T> joined(a, scratch);
  while (begin < end) {
    const int64_t n = begin / a.h, first = begin % a.h;
    const int64_t last = first + end - begin < a.h ? first + end - begin : a.h;
    joined.start(n);
    joined.fill(first - 1);
    joined.fill(first);
    for (int64_t row = first; row < last; ++row) {
      joined.fill(row + 1);
      const Around rows[2] = {joined.around(0, row), joined.around(joined.sources - 1, row)};
      T* y = static_cast<T*>(a.y.data) + n * a.y.stride_n + row * a.y.stride_h;
      const T* residual = static_cast<const T*>(a.residual.data);
      if (residual) residual += n * a.residual.stride_n + row * a.residual.stride_h;
      for (int64_t j = 0; j < a.w; j += kMergePixels)
        merge_pixels(rows, joined.sources, j, a.c, a.weight,
                     [&](int p, int64_t c, V value) EFRDN_FAST_LAMBDA {
                       if (j + p >= a.w) return;
                       if (residual)
                         value = add(value, load(residual + (j + p) * a.residual.stride_w + c));
                       store(y + (j + p) * a.y.stride_w + c, value);
                     });
    }
    begin += last - first;
  }
}

// Everything a strip works with, behind the joined rows.
template <class T>
struct Work {
  const MergeBackwardArgs& a;
  JoinedRows<T> joined;
  float *grad;    // [3, merge_row], rows of grad_y
  float *inner;   // [source, merge_row], gradient of a joined row
  float *gate;    // of the row that is split
  float *sums;

  Work(const MergeBackwardArgs& args, float* scratch) : a(args), joined(args.forward, scratch) {
    grad = joined.end();
    inner = grad + 3 * joined.size;
    gate = inner + joined.sources * joined.size;
    sums = gate + args.forward.w + 16;
    memset(grad, 0, static_cast<size_t>(3 * joined.size) * sizeof(float));
  }
  float* grad_row(int64_t row) const { return grad + (row + 3) % 3 * joined.size; }

  void fill_grad(int64_t row) const {
    const MergeArgs& f = a.forward;
    float* to = grad_row(row);
    if (row < 0 || row >= f.h) {
      memset(to, 0, static_cast<size_t>(joined.size) * sizeof(float));
      return;
    }
    const T* from = static_cast<const T*>(a.grad_y.data) + joined.n * a.grad_y.stride_n +
                    row * a.grad_y.stride_h;
    for (int64_t j = 0; j < f.w; ++j)
      for (int64_t c = 0; c < f.c; c += kLanes)
        store(to + (j + 1) * f.c + c, load(from + j * a.grad_y.stride_w + c));
  }

  // Gradients of the maps from that of a joined row.
  void split(int64_t row) const {
    const MergeArgs& f = a.forward;
    const int64_t n = joined.n, ca = merge_channels_a(f);
    const T* from_a = static_cast<const T*>(f.a.data) + n * f.a.stride_n + row * f.a.stride_h;
    const T* from_b = static_cast<const T*>(f.b.data) + n * f.b.stride_n + row * f.b.stride_h;
    T* to_a = static_cast<T*>(a.grad_a.data) + n * a.grad_a.stride_n + row * a.grad_a.stride_h;
    T* to_b = static_cast<T*>(a.grad_b.data) + n * a.grad_b.stride_n + row * a.grad_b.stride_h;
    if (f.gate == Gate::kPixel) gate_row(f.logits + (n * f.h + row) * f.w, f.w, gate);
    const float* gates = f.gate == Gate::kPixel ? gate : joined.gate;
    float* const channel_sums = sums + joined.sources * 36 * f.c;
    for (int64_t j = 0; j < f.w; ++j) {
      V pixel = zero();
      for (int64_t c = 0; c < ca; c += kLanes) {
        V da, db = zero();
        if (f.join == Join::kPairs) {
          part_lanes(load(inner + j * f.c + 2 * c), load(inner + j * f.c + 2 * c + kLanes), da, db);
        } else {
          da = load(inner + j * f.c + c);
          if (f.join == Join::kTwo) db = load(inner + joined.size + j * f.c + c);
        }
        if (f.gate != Gate::kNone) {
          const V product = mul(da, load(from_a + j * f.a.stride_w + c));
          if (f.gate == Gate::kPixel) {
            pixel = add(pixel, product);
            da = mul(da, set1(gates[j]));
          } else {
            const V s = load(gates + c);
            const V slope = mul(s, sub(set1(1.0f), s));
            store(channel_sums + c, fma(product, slope, load(channel_sums + c)));
            da = mul(da, s);
          }
        }
        store(to_a + j * a.grad_a.stride_w + c, da);
        if (f.join == Join::kOne) continue;
        if (f.relu) db = relu_backward(load(from_b + j * f.b.stride_w + c), db);
        store(to_b + j * a.grad_b.stride_w + c, db);
      }
      if (f.gate == Gate::kPixel) {
        float lanes[kLanes];
        store(lanes, pixel);
        a.grad_pixel[(n * f.h + row) * f.w + j] = lane_sum(lanes) * gate[j] * (1.0f - gate[j]);
      }
    }
  }
};

template <class T>
void backward(const MergeBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  const MergeArgs& f = a.forward;
  Work<T> work(a, scratch);
  const JoinedRows<T>& joined = work.joined;
  const int64_t size = merge_sums(f);
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t first = strip % a.image_strips * a.strip_rows;
    const int64_t last = first + a.strip_rows < f.h ? first + a.strip_rows : f.h;
    work.joined.start(strip / a.image_strips);
    memset(work.sums, 0, static_cast<size_t>(size) * sizeof(float));
    for (int64_t row = first - 1; row <= first; ++row) {
      joined.fill(row);
      work.fill_grad(row);
    }
    for (int64_t row = first; row < last; ++row) {
      joined.fill(row + 1);
      work.fill_grad(row + 1);
      for (int64_t s = 0; s < joined.sources; ++s)
        merge_weight_sums(joined.around(s, row), work.grad_row(row), f.w, f.c, work.sums + s * 36 * f.c);
      const Around grads = {{work.grad_row(row - 1), work.grad_row(row), work.grad_row(row + 1)}};
      for (int64_t s = 0; s < joined.sources; ++s)
        for (int64_t j = 0; j < f.w; j += kMergePixels)
          merge_pixels(&grads, 1, j, f.c, a.turned + s * 36 * f.c,
                       [&](int p, int64_t c, V value) EFRDN_FAST_LAMBDA {
                         store(work.inner + s * joined.size + (j + p) * f.c + c, value);
                       });
      work.split(row);
    }
    memcpy(a.partial + strip * size, work.sums, static_cast<size_t>(size) * sizeof(float));
  }
}

}  // namespace

void merge_forward(const MergeArgs& a, int64_t begin, int64_t end, float* scratch) {
  EFRDN_FAST_BY_DTYPE(a.dtype, forward<T>(a, begin, end, scratch))
}

void merge_backward(const MergeBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  EFRDN_FAST_BY_DTYPE(a.forward.dtype, backward<T>(a, begin, end, scratch))
}

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
