#include "kernels/cpu/rotary.h"

#include <cmath>

namespace tforge::kernels::cpu {
namespace {

/// Rotates the pairs (lower[i], upper[i]) by angles of cosine c and sine sign * s.
template <class T>
void rotate(T* lower, T* upper, const T* c, const T* s, T sign, std::int64_t half) {
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const T x1 = lower[i], x2 = upper[i], si = sign * s[i];
    lower[i] = x1 * c[i] - x2 * si;
    upper[i] = x2 * c[i] + x1 * si;
  }
}

/// The same with a length known to the compiler: the usual heads rotate 8, 16 or 32 dimensions, too few for a loop
/// that finds out about its length.
template <class T>
void rotate_some(T* lower, T* upper, const T* c, const T* s, T sign, std::int64_t half) {
  switch (half) {
    case 4: return rotate(lower, upper, c, s, sign, 4);
    case 8: return rotate(lower, upper, c, s, sign, 8);
    case 16: return rotate(lower, upper, c, s, sign, 16);
    default: return rotate(lower, upper, c, s, sign, half);
  }
}

}  // namespace

template <class T>
void rotary_tables(double base, TensorView cosine, TensorView sine) {
  const std::int64_t half = cosine.columns();
  T* const cs = cosine.as<T>();
  T* const sn = sine.as<T>();
#pragma omp parallel for schedule(static)
  for (std::int64_t p = 0; p < cosine.rows(); ++p) {
    for (std::int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(p) * std::pow(base, -static_cast<double>(i) / static_cast<double>(half));
      cs[p * cosine.row_stride + i] = static_cast<T>(std::cos(angle));
      sn[p * sine.row_stride + i] = static_cast<T>(std::sin(angle));
    }
  }
}

template <class T>
void rotary_apply(RotaryDirection direction, ConstTensorView cosine, ConstTensorView sine, std::int64_t heads,
                  std::int64_t seq, std::int64_t first_position, TensorView x) {
  const std::int64_t rows = x.rows();
  const std::int64_t head_dim = x.columns() / heads;
  const std::int64_t half = cosine.columns();
  const T sign = direction == RotaryDirection::forward ? T(1) : T(-1);
  const T* const cosines = cosine.as<T>();
  const T* const sines = sine.as<T>();
  T* const data = x.as<T>();
#pragma omp parallel for schedule(static) if (rows * x.columns() > 16384)
  for (std::int64_t t = 0; t < rows; ++t) {
    const std::int64_t position = first_position + t % seq;
    const T* c = cosines + position * cosine.row_stride;
    const T* s = sines + position * sine.row_stride;
    for (std::int64_t h = 0; h < heads; ++h) {
      T* lower = data + t * x.row_stride + h * head_dim;
      rotate_some(lower, lower + half, c, s, sign, half);
    }
  }
}

#define TFORGE_INSTANTIATE(T)                                                                                  \
  template void rotary_tables<T>(double, TensorView, TensorView);                                              \
  template void rotary_apply<T>(RotaryDirection, ConstTensorView, ConstTensorView, std::int64_t, std::int64_t, \
                                std::int64_t, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
