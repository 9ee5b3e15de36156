#include "kernels/cuda/layer_norm.h"

#include "kernels/cuda/columns.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kThreads = 128;  // of a block, which has one row, at most

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    forward(Rows<const T> x, const Compute<T>* weight, const Compute<T>* bias, double eps, Rows<T> y,
            Rows<Compute<T>> mean, Rows<Compute<T>> rstd) {
  const std::int64_t t = blockIdx.x;
  const T* const in = x.row(t);
  Compute<T> sum = 0;
  over_row<T, kCount, kThreads>(x.columns, [&](std::int64_t c) {
    const auto pack = load<kCount>(in + c);
    for (int k = 0; k < kCount; ++k) sum += pack.element[k];
  });
  const Compute<T> mu = over_block<Sum, kThreads>(sum) / static_cast<Compute<T>>(x.columns);
  Compute<T> squares = 0;
  over_row<T, kCount, kThreads>(x.columns, [&](std::int64_t c) {
    const auto pack = load<kCount>(in + c);
    for (int k = 0; k < kCount; ++k) squares += (pack.element[k] - mu) * (pack.element[k] - mu);
  });
  const double variance = static_cast<double>(over_block<Sum, kThreads>(squares)) / static_cast<double>(x.columns);
  const Compute<T> r = static_cast<Compute<T>>(1 / sqrt(variance + eps));
  over_row<T, kCount, kThreads>(x.columns, [&](std::int64_t c) {
    auto pack = load<kCount>(in + c);
    for (int k = 0; k < kCount; ++k) {
      pack.element[k] = (pack.element[k] - mu) * r;
      if (weight != nullptr) pack.element[k] = pack.element[k] * weight[c + k] + bias[c + k];
    }
    store<kCount>(y.row(t) + c, pack);
  });
  if (threadIdx.x == 0) {
    if (mean) *mean.row(t) = mu;
    if (rstd) *rstd.row(t) = r;
  }
}

template <int kCount, class T>
__global__ void __launch_bounds__(kStripThreads)
    parameter_gradients(Rows<const T> x, Rows<const Compute<T>> mean, Rows<const Compute<T>> rstd, Rows<const T> dy,
                        GradMode mode, Compute<T>* dweight, Compute<T>* dbias) {
  down_columns<2, kCount, T>(
      x.rows, x.columns,
      [&](std::int64_t t, std::int64_t c, Compute<T>(&sums)[2][kCount]) {
        const Compute<T> mu = mean ? *mean.row(t) : Compute<T>(0), r = mean ? *rstd.row(t) : Compute<T>(1);
        const auto in = load<kCount>(x.row(t) + c);
        const auto g = load<kCount>(dy.row(t) + c);
        for (int k = 0; k < kCount; ++k) {
          sums[0][k] += g.element[k] * ((in.element[k] - mu) * r);
          sums[1][k] += g.element[k];
        }
      },
      [&](int s, std::int64_t c, Compute<T> sum) { write(mode, sum, (s == 0 ? dweight : dbias) + c); });
}

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    input_gradient(Rows<const T> x, const Compute<T>* weight, Rows<const Compute<T>> mean, Rows<const Compute<T>> rstd,
                   Rows<const T> dy, GradMode mode, Rows<T> dx) {
  const std::int64_t t = blockIdx.x;
  const Compute<T> r = *rstd.row(t);
  const Compute<T> mu = mean ? *mean.row(t) : Compute<T>(0), to_xhat = mean ? r : Compute<T>(1);
  const auto gradient = [&](const Pack<Compute<T>, kCount>& g, std::int64_t c, int k) {
    return weight == nullptr ? g.element[k] : g.element[k] * weight[c + k];
  };
  Compute<T> sum = 0, dot = 0;
  over_row<T, kCount, kThreads>(x.columns, [&](std::int64_t c) {
    const auto in = load<kCount>(x.row(t) + c);
    const auto g = load<kCount>(dy.row(t) + c);
    for (int k = 0; k < kCount; ++k) {
      const Compute<T> v = gradient(g, c, k);
      sum += v;
      dot += v * ((in.element[k] - mu) * to_xhat);
    }
  });
  const Compute<T> mean_g = over_block<Sum, kThreads>(sum) / static_cast<Compute<T>>(x.columns);
  const Compute<T> mean_gx = over_block<Sum, kThreads>(dot) / static_cast<Compute<T>>(x.columns);
  over_row<T, kCount, kThreads>(x.columns, [&](std::int64_t c) {
    const auto in = load<kCount>(x.row(t) + c);
    const auto g = load<kCount>(dy.row(t) + c);
    Pack<Compute<T>, kCount> out{};
    if (mode == GradMode::accumulate) out = load<kCount>(dx.row(t) + c);
    for (int k = 0; k < kCount; ++k) {
      out.element[k] += r * (gradient(g, c, k) - mean_g - (in.element[k] - mu) * to_xhat * mean_gx);
    }
    store<kCount>(dx.row(t) + c, out);
  });
}

}  // namespace

template <class T>
void layer_norm_forward(const Stream& stream, Rows<const T> x, const Compute<T>* weight, const Compute<T>* bias,
                        double eps, Rows<T> y, Rows<Compute<T>> mean, Rows<Compute<T>> rstd) {
  constexpr int kCount = kWhole<T>;
  if (x.elements() == 0) return;
  launch(stream, static_cast<unsigned>(x.rows), row_threads<T>(x.columns, kThreads), 0,
         packs<kCount>(x) && packs<kCount>(y) ? forward<kCount, T> : forward<1, T>, x, weight, bias, eps, y, mean,
         rstd);
}

template <class T>
void layer_norm_parameter_gradients(const Stream& stream, Rows<const T> x, Rows<const Compute<T>> mean,
                                    Rows<const Compute<T>> rstd, Rows<const T> dy, GradMode mode, Compute<T>* dweight,
                                    Compute<T>* dbias) {
  constexpr int kCount = kWhole<T>;
  if (x.columns == 0) return;
  const bool whole = packs<kCount>(x) && packs<kCount>(dy);
  launch(stream, strips_of<T>(x.columns), kStripThreads, 0,
         whole ? parameter_gradients<kCount, T> : parameter_gradients<1, T>, x, mean, rstd, dy, mode, dweight, dbias);
}

template <class T>
void layer_norm_input_gradient(const Stream& stream, Rows<const T> x, const Compute<T>* weight,
                               Rows<const Compute<T>> mean, Rows<const Compute<T>> rstd, Rows<const T> dy,
                               GradMode mode, Rows<T> dx) {
  constexpr int kCount = kWhole<T>;
  if (x.elements() == 0) return;
  const bool whole = packs<kCount>(x) && packs<kCount>(dy) && packs<kCount>(dx);
  launch(stream, static_cast<unsigned>(x.rows), row_threads<T>(x.columns, kThreads), 0,
         whole ? input_gradient<kCount, T> : input_gradient<1, T>, x, weight, mean, rstd, dy, mode, dx);
}

#define TFORGE_INSTANTIATE(T)                                                                                         \
  template void layer_norm_forward<T>(const Stream&, Rows<const T>, const Compute<T>*, const Compute<T>*, double,     \
                                      Rows<T>, Rows<Compute<T>>, Rows<Compute<T>>);                                   \
  template void layer_norm_parameter_gradients<T>(const Stream&, Rows<const T>, Rows<const Compute<T>>,               \
                                                  Rows<const Compute<T>>, Rows<const T>, GradMode, Compute<T>*,       \
                                                  Compute<T>*);                                                       \
  template void layer_norm_input_gradient<T>(const Stream&, Rows<const T>, const Compute<T>*, Rows<const Compute<T>>, \
                                             Rows<const Compute<T>>, Rows<const T>, GradMode, Rows<T>)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
