#include "kernels/cpu/layer_norm.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kSmall = 16384;     // elements below which a parallel region costs more than it saves
constexpr std::int64_t kColumnBlock = 64;  // columns of a parameter gradient that one thread owns
constexpr std::int64_t kRowBlock = 128;    // rows summed before they join the total: keeps f32 sums short

}  // namespace

template <class T>
void layer_norm_forward(ConstTensorView x, ConstTensorView weight, ConstTensorView bias, double eps, TensorView y,
                        TensorView mean, TensorView rstd) {
  const std::int64_t rows = x.rows();
  const std::int64_t d = x.columns();
  const T* w = weight ? weight.as<T>() : nullptr;
  const T* b = bias ? bias.as<T>() : nullptr;
  T* const means = mean ? mean.as<T>() : nullptr;
  T* const rstds = rstd ? rstd.as<T>() : nullptr;
  const T* const xs = x.as<T>();
  T* const ys = y.as<T>();
#pragma omp parallel for schedule(static) if (rows * d > kSmall)
  for (std::int64_t t = 0; t < rows; ++t) {
    const T* in = xs + t * x.row_stride;
    T* out = ys + t * y.row_stride;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < d; ++i) sum += in[i];
    const T mu = sum / static_cast<T>(d);
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < d; ++i) squares += (in[i] - mu) * (in[i] - mu);
    const T r = static_cast<T>(1 / std::sqrt(static_cast<double>(squares) / static_cast<double>(d) + eps));
    if (w != nullptr) {
      for (std::int64_t i = 0; i < d; ++i) out[i] = (in[i] - mu) * r * w[i] + b[i];
    } else {
      for (std::int64_t i = 0; i < d; ++i) out[i] = (in[i] - mu) * r;
    }
    if (means != nullptr) means[t * mean.row_stride] = mu;
    if (rstds != nullptr) rstds[t * rstd.row_stride] = r;
  }
}

template <class T>
void layer_norm_parameter_gradients(ConstTensorView x, ConstTensorView mean, ConstTensorView rstd, ConstTensorView dy,
                                    GradMode mode, TensorView dweight, TensorView dbias) {
  const std::int64_t rows = x.rows();
  const std::int64_t d = x.columns();
  const T* const xs = x.as<T>();
  const T* const dys = dy.as<T>();
  const T* const means = mean ? mean.as<T>() : nullptr;  // null: x is normalised already
  const T* const rstds = rstd.as<T>();
  T* const dw = dweight.as<T>();
  T* const db = dbias.as<T>();
  // A thread owns columns and walks all rows: no partial sums per thread, hence no workspace and fixed bits.
#pragma omp parallel for schedule(static) if (rows * d > kSmall)
  for (std::int64_t first = 0; first < d; first += kColumnBlock) {
    const std::int64_t count = std::min(kColumnBlock, d - first);
    std::array<T, kColumnBlock> w_total{}, b_total{};
    for (std::int64_t t0 = 0; t0 < rows; t0 += kRowBlock) {
      std::array<T, kColumnBlock> w_block{}, b_block{};
      const std::int64_t t1 = std::min(rows, t0 + kRowBlock);
      for (std::int64_t t = t0; t < t1; ++t) {
        const T mu = means == nullptr ? T(0) : means[t * mean.row_stride];
        const T r = means == nullptr ? T(1) : rstds[t * rstd.row_stride];
        const T* in = xs + t * x.row_stride + first;
        const T* g = dys + t * dy.row_stride + first;
#pragma omp simd
        for (std::int64_t i = 0; i < count; ++i) {
          w_block[static_cast<std::size_t>(i)] += g[i] * ((in[i] - mu) * r);
          b_block[static_cast<std::size_t>(i)] += g[i];
        }
      }
      for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
        w_total[i] += w_block[i];
        b_total[i] += b_block[i];
      }
    }
    for (std::int64_t i = 0; i < count; ++i) {
      const auto k = static_cast<std::size_t>(i);
      dw[first + i] = mode == GradMode::accumulate ? dw[first + i] + w_total[k] : w_total[k];
      db[first + i] = mode == GradMode::accumulate ? db[first + i] + b_total[k] : b_total[k];
    }
  }
}

template <class T>
void layer_norm_input_gradient(ConstTensorView x, ConstTensorView weight, ConstTensorView mean, ConstTensorView rstd,
                               ConstTensorView dy, GradMode mode, TensorView dx) {
  const std::int64_t rows = x.rows();
  const std::int64_t d = x.columns();
  const T* const xs = x.as<T>();
  const T* const dys = dy.as<T>();
  const T* const means = mean ? mean.as<T>() : nullptr;  // null: x is normalised already
  const T* const rstds = rstd.as<T>();
  const T* const w = weight ? weight.as<T>() : nullptr;
  T* const dxs = dx.as<T>();
#pragma omp parallel for schedule(static) if (rows * d > kSmall)
  for (std::int64_t t = 0; t < rows; ++t) {
    const T r = rstds[t * rstd.row_stride];
    const T mu = means == nullptr ? T(0) : means[t * mean.row_stride];
    const T to_xhat = means == nullptr ? T(1) : r;
    const T* in = xs + t * x.row_stride;
    const T* g = dys + t * dy.row_stride;
    T* out = dxs + t * dx.row_stride;
    // `gradient(i)` is inlined: one loop body for the layers with and without a weight.
    const auto apply = [&](auto gradient) {
      T sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
      for (std::int64_t i = 0; i < d; ++i) {
        const T v = gradient(i);
        sum += v;
        dot += v * ((in[i] - mu) * to_xhat);
      }
      const T mean_g = sum / static_cast<T>(d);
      const T mean_gx = dot / static_cast<T>(d);
      if (mode == GradMode::accumulate) {
#pragma omp simd
        for (std::int64_t i = 0; i < d; ++i) out[i] += r * (gradient(i) - mean_g - (in[i] - mu) * to_xhat * mean_gx);
      } else {
#pragma omp simd
        for (std::int64_t i = 0; i < d; ++i) out[i] = r * (gradient(i) - mean_g - (in[i] - mu) * to_xhat * mean_gx);
      }
    };
    if (w != nullptr) apply([=](std::int64_t i) { return g[i] * w[i]; });
    else apply([=](std::int64_t i) { return g[i]; });
  }
}

#define TFORGE_INSTANTIATE(T)                                                                                         \
  template void layer_norm_forward<T>(ConstTensorView, ConstTensorView, ConstTensorView, double, TensorView,          \
                                      TensorView, TensorView);                                                        \
  template void layer_norm_parameter_gradients<T>(ConstTensorView, ConstTensorView, ConstTensorView, ConstTensorView, \
                                                  GradMode, TensorView, TensorView);                                  \
  template void layer_norm_input_gradient<T>(ConstTensorView, ConstTensorView, ConstTensorView, ConstTensorView,      \
                                             ConstTensorView, GradMode, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
