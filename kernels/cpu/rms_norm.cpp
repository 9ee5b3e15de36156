#include "kernels/cpu/rms_norm.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kSmall = 16384;     // elements below which a parallel region costs more than it saves
constexpr std::int64_t kColumnBlock = 64;  // columns of the weight's gradient that one thread owns
constexpr std::int64_t kRowBlock = 128;    // rows summed before they join the total: keeps f32 sums short

}  // namespace

template <class T>
void rms_norm_forward(ConstTensorView x, ConstTensorView weight, double eps, TensorView y, TensorView rrms) {
  const std::int64_t rows = x.rows(), d = x.columns();
  const T* const w = weight.as<T>();
#pragma omp parallel for schedule(static) if (rows * d > kSmall)
  for (std::int64_t t = 0; t < rows; ++t) {
    const T* in = x.as<T>() + t * x.row_stride;
    T* out = y.as<T>() + t * y.row_stride;
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < d; ++i) squares += in[i] * in[i];
    const auto r = static_cast<T>(1 / (std::sqrt(static_cast<double>(squares) / static_cast<double>(d)) + eps));
    for (std::int64_t i = 0; i < d; ++i) out[i] = in[i] * r * w[i];
    if (rrms) rrms.as<T>()[t * rrms.row_stride] = r;
  }
}

template <class T>
void rms_norm_input_gradient(ConstTensorView x, ConstTensorView weight, ConstTensorView rrms, ConstTensorView dy,
                             GradMode mode, TensorView dx) {
  const std::int64_t rows = x.rows(), d = x.columns();
  const T* const w = weight.as<T>();
#pragma omp parallel for schedule(static) if (rows * d > kSmall)
  for (std::int64_t t = 0; t < rows; ++t) {
    const T* in = x.as<T>() + t * x.row_stride;
    const T* g = dy.as<T>() + t * dy.row_stride;
    T* out = dx.as<T>() + t * dx.row_stride;
    const T r = rrms.as<T>()[t * rrms.row_stride];
    T squares = 0, dot = 0;
#pragma omp simd reduction(+ : squares, dot)
    for (std::int64_t i = 0; i < d; ++i) {
      squares += in[i] * in[i];
      dot += g[i] * w[i] * in[i];
    }
    const double rms = std::sqrt(static_cast<double>(squares) / static_cast<double>(d));
    const T along = rms == 0 ? T(0) : static_cast<T>(static_cast<double>(dot) / (static_cast<double>(d) * rms)) * r;
    if (mode == GradMode::accumulate) {
#pragma omp simd
      for (std::int64_t i = 0; i < d; ++i) out[i] += r * (g[i] * w[i] - in[i] * along);
    } else {
#pragma omp simd
      for (std::int64_t i = 0; i < d; ++i) out[i] = r * (g[i] * w[i] - in[i] * along);
    }
  }
}

template <class T>
void rms_norm_weight_gradient(ConstTensorView x, ConstTensorView rrms, ConstTensorView dy, GradMode mode,
                              TensorView dweight) {
  const std::int64_t rows = x.rows(), d = x.columns();
  T* const out = dweight.as<T>();
  // A thread owns columns and walks all rows: no partial sums per thread, hence no workspace and fixed bits.
#pragma omp parallel for schedule(static) if (rows * d > kSmall)
  for (std::int64_t first = 0; first < d; first += kColumnBlock) {
    const std::int64_t count = std::min(kColumnBlock, d - first);
    std::array<T, kColumnBlock> total{};
    for (std::int64_t t0 = 0; t0 < rows; t0 += kRowBlock) {
      std::array<T, kColumnBlock> block{};
      for (std::int64_t t = t0; t < std::min(rows, t0 + kRowBlock); ++t) {
        const T r = rrms.as<T>()[t * rrms.row_stride];
        const T* in = x.as<T>() + t * x.row_stride + first;
        const T* g = dy.as<T>() + t * dy.row_stride + first;
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) block[static_cast<std::size_t>(i)] += g[i] * (in[i] * r);
      }
      for (std::size_t i = 0; i < total.size(); ++i) total[i] += block[i];
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const T sum = total[static_cast<std::size_t>(i)];
      out[first + i] = mode == GradMode::accumulate ? out[first + i] + sum : sum;
    }
  }
}

#define TFORGE_INSTANTIATE(T)                                                                                  \
  template void rms_norm_forward<T>(ConstTensorView, ConstTensorView, double, TensorView, TensorView);         \
  template void rms_norm_input_gradient<T>(ConstTensorView, ConstTensorView, ConstTensorView, ConstTensorView, \
                                           GradMode, TensorView);                                              \
  template void rms_norm_weight_gradient<T>(ConstTensorView, ConstTensorView, ConstTensorView, GradMode, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
