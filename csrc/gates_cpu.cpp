// Passes of the gates and of the tokens; gates_cpu.h says what each does.
#include "gates_cpu.h"

#include "sigmoid.h"

namespace efrdn_fast {
namespace EFRDN_FAST_ISA {
namespace {

template <class T>
const T* row_of(const Map& map, int64_t h, int64_t row) {
  return static_cast<const T*>(map.data) + row / h * map.stride_n + row % h * map.stride_h;
}
template <class T>
T* row_to(const Map& map, int64_t h, int64_t row) {
  return static_cast<T*>(map.data) + row / h * map.stride_n + row % h * map.stride_h;
}

// sums[c] = total over the pixels of a row of value(j, c), all channels of a block in registers.
template <class F>
EFRDN_FAST_INLINE void row_sums(int64_t w, int64_t channels, float* sums, const F& value) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    V even = zero(), odd = zero();
    int64_t j = 0;
    for (; j + 1 < w; j += 2) {
      even = add(even, value(j, c));
      odd = add(odd, value(j + 1, c));
    }
    if (j < w) even = add(even, value(j, c));
    store(sums + c, add(even, odd));
  }
}

template <class T>
void moments(const GateArgs& a, int64_t begin, int64_t end) {
  const V inverse = set1(1.0f / static_cast<float>(a.w));
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(a.x, a.h, row);
    float* mean = a.rows + row * 2 * a.c;
    row_sums(a.w, a.c, mean, [&](int64_t j, int64_t c) EFRDN_FAST_LAMBDA {
      return load(x + j * a.x.stride_w + c);
    });
    for (int64_t c = 0; c < a.c; c += kLanes) store(mean + c, mul(load(mean + c), inverse));
    row_sums(a.w, a.c, mean + a.c, [&](int64_t j, int64_t c) EFRDN_FAST_LAMBDA {
      const V d = sub(load(x + j * a.x.stride_w + c), load(mean + c));
      return mul(d, d);
    });
  }
}

template <class T>
void products(const GateArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(a.x, a.h, row);
    const T* grad = row_of<T>(a.grad, a.h, row);
    row_sums(a.w, a.c, a.rows + row * a.c, [&](int64_t j, int64_t c) EFRDN_FAST_LAMBDA {
      return mul(load(grad + j * a.grad.stride_w + c), load(x + j * a.x.stride_w + c));
    });
  }
}

// y = value(j, c) over rows.
template <class T, class Make>
EFRDN_FAST_INLINE void each_pixel(const GateArgs& a, int64_t begin, int64_t end, const Make& make) {
  for (int64_t row = begin; row < end; ++row) {
    const auto value = make(row);
    T* y = row_to<T>(a.y, a.h, row);
    for (int64_t j = 0; j < a.w; ++j)
      for (int64_t c = 0; c < a.c; c += kLanes) store(y + j * a.y.stride_w + c, value(j, c));
  }
}

template <class T>
void apply(const GateArgs& a, int64_t begin, int64_t end) {
  each_pixel<T>(a, begin, end, [&](int64_t row) {
    const T *x = row_of<T>(a.x, a.h, row), *base = row_of<T>(a.base, a.h, row);
    const float* scale = a.scale + row / a.h * a.c;
    return [=](int64_t j, int64_t c) EFRDN_FAST_LAMBDA {
      return fma(load(scale + c), load(x + j * a.x.stride_w + c),
                 load(base + j * a.base.stride_w + c));
    };
  });
}

template <class T>
void apply_backward(const GateArgs& a, int64_t begin, int64_t end) {
  each_pixel<T>(a, begin, end, [&](int64_t row) {
    const T *x = row_of<T>(a.x, a.h, row), *grad = row_of<T>(a.grad, a.h, row);
    const int64_t image = row / a.h * a.c;
    const float *scale = a.scale + image, *slope = a.slope + image;
    const float *center = a.center + image, *offset = a.offset + image;
    return [=](int64_t j, int64_t c) EFRDN_FAST_LAMBDA {
      const V away = sub(load(x + j * a.x.stride_w + c), load(center + c));
      const V rest = fma(load(slope + c), away, load(offset + c));
      return fma(load(scale + c), load(grad + j * a.grad.stride_w + c), rest);
    };
  });
}

template <class T>
void sigmoid_rows(const GateArgs& a, int64_t begin, int64_t end) {
  each_pixel<T>(a, begin, end, [&](int64_t row) {
    const T *x = row_of<T>(a.x, a.h, row), *z = row_of<T>(a.z, a.h, row);
    return [=](int64_t j, int64_t c) EFRDN_FAST_LAMBDA {
      return mul(load(x + j * a.x.stride_w + c), sigmoid(load(z + j * a.z.stride_w + c)));
    };
  });
}

template <class T>
void sigmoid_rows_backward(const GateArgs& a, int64_t begin, int64_t end) {
  each_pixel<T>(a, begin, end, [&](int64_t row) {
    const T *x = row_of<T>(a.x, a.h, row), *z = row_of<T>(a.z, a.h, row);
    const T* grad = row_of<T>(a.grad, a.h, row);
    T* grad_z = row_to<T>(a.grad_z, a.h, row);
    return [=](int64_t j, int64_t c) EFRDN_FAST_LAMBDA {
      const V s = sigmoid(load(z + j * a.z.stride_w + c));
      const V g = mul(load(grad + j * a.grad.stride_w + c), s);
      const V slope = mul(load(x + j * a.x.stride_w + c), sub(set1(1.0f), s));
      store(grad_z + j * a.grad_z.stride_w + c, mul(g, slope));
      return g;
    };
  });
}

template <class T>
void unfold(const TokenArgs& a, int64_t begin, int64_t end) {
  const size_t bytes = static_cast<size_t>(a.c) * sizeof(T);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / a.h, y = row % a.h;
    T* to = static_cast<T*>(a.tokens) + row * a.w * 9 * a.c;
    for (int64_t ky = 0; ky < 3; ++ky) {
      const bool inside = y + ky - 1 >= 0 && y + ky - 1 < a.h;
      const T* x = static_cast<const T*>(a.x.data) + n * a.x.stride_n + (y + ky - 1) * a.x.stride_h;
      for (int64_t j = 0; j < a.w; ++j)
        for (int64_t kx = 0; kx < 3; ++kx) {
          T* token = to + (j * 9 + ky * 3 + kx) * a.c;
          const int64_t from = j + kx - 1;
          if (inside && from >= 0 && from < a.w)
            for (int64_t c = 0; c < a.c; c += kLanes)
              store(token + c, load(x + from * a.x.stride_w + c));
          else
            memset(static_cast<void*>(token), 0, bytes);
        }
    }
  }
}

template <class T>
void fold(const TokenArgs& a, int64_t begin, int64_t end) {
  const int64_t token = 9 * a.c;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / a.h, y = row % a.h;
    T* x = row_to<T>(a.x, a.h, row);
    for (int64_t j = 0; j < a.w; ++j) {
      // Patch (y + 1 - ky, j + 1 - kx) holds this pixel as its tap (ky, kx).
      const int64_t first_y = y + 1 < a.h ? 0 : 1, last_y = y > 0 ? 2 : 1;
      const int64_t first_x = j + 1 < a.w ? 0 : 1, last_x = j > 0 ? 2 : 1;
      for (int64_t c = 0; c < a.c; c += kLanes) {
        V sum = zero();
        for (int64_t ky = first_y; ky <= last_y; ++ky)
          for (int64_t kx = first_x; kx <= last_x; ++kx) {
            const int64_t patch = (n * a.h + y + 1 - ky) * a.w + j + 1 - kx;
            const T* from = static_cast<const T*>(a.tokens) + patch * token;
            sum = add(sum, load(from + (ky * 3 + kx) * a.c + c));
          }
        store(x + j * a.x.stride_w + c, sum);
      }
    }
  }
}

}  // namespace

#define EFRDN_FAST_DEFINE(Args, name, function)                     \
  void name(const Args& a, int64_t begin, int64_t end) {            \
    EFRDN_FAST_BY_DTYPE(a.dtype, function<T>(a, begin, end))        \
  }

EFRDN_FAST_DEFINE(GateArgs, gate_moments, moments)
EFRDN_FAST_DEFINE(GateArgs, gate_products, products)
EFRDN_FAST_DEFINE(GateArgs, gate_apply, apply)
EFRDN_FAST_DEFINE(GateArgs, gate_apply_backward, apply_backward)
EFRDN_FAST_DEFINE(GateArgs, gate_sigmoid, sigmoid_rows)
EFRDN_FAST_DEFINE(GateArgs, gate_sigmoid_backward, sigmoid_rows_backward)
EFRDN_FAST_DEFINE(TokenArgs, tokens_unfold, unfold)
EFRDN_FAST_DEFINE(TokenArgs, tokens_fold, fold)

}  // namespace EFRDN_FAST_ISA
}  // namespace efrdn_fast
