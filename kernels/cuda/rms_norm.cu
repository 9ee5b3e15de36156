#include "kernels/cuda/rms_norm.h"

#include "kernels/cuda/columns.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kThreads = 128;  // of a block, which has one row, at most

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    forward(Rows<const T> x, const Compute<T>* weight, double eps, Rows<T> y, Rows<Compute<T>> rrms) {
  const std::int64_t t = blockIdx.x;
  Compute<T> squares = 0;
  over_row<T, kCount, kThreads>(x.columns, [&](std::int64_t c) {
    const auto in = load<kCount>(x.row(t) + c);
    for (int k = 0; k < kCount; ++k) squares += in.element[k] * in.element[k];
  });
  squares = over_block<Sum, kThreads>(squares);
  const Compute<T> r =
      static_cast<Compute<T>>(1 / (sqrt(static_cast<double>(squares) / static_cast<double>(x.columns)) + eps));
  over_row<T, kCount, kThreads>(x.columns, [&](std::int64_t c) {
    auto in = load<kCount>(x.row(t) + c);
    for (int k = 0; k < kCount; ++k) in.element[k] = in.element[k] * r * weight[c + k];
    store<kCount>(y.row(t) + c, in);
  });
  if (rrms && threadIdx.x == 0) *rrms.row(t) = r;
}

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    input_gradient(Rows<const T> x, const Compute<T>* weight, Rows<const Compute<T>> rrms, Rows<const T> dy,
                   GradMode mode, Rows<T> dx) {
  const std::int64_t t = blockIdx.x;
  const Compute<T> r = *rrms.row(t);
  Compute<T> squares = 0, dot = 0;
  over_row<T, kCount, kThreads>(x.columns, [&](std::int64_t c) {
    const auto in = load<kCount>(x.row(t) + c);
    const auto g = load<kCount>(dy.row(t) + c);
    for (int k = 0; k < kCount; ++k) {
      squares += in.element[k] * in.element[k];
      dot += g.element[k] * weight[c + k] * in.element[k];
    }
  });
  squares = over_block<Sum, kThreads>(squares);
  dot = over_block<Sum, kThreads>(dot);
  const auto d = static_cast<double>(x.columns);
  const double rms = sqrt(static_cast<double>(squares) / d);
  const Compute<T> along = rms == 0 ? Compute<T>(0) : static_cast<Compute<T>>(static_cast<double>(dot) / (d * rms)) * r;
  over_row<T, kCount, kThreads>(x.columns, [&](std::int64_t c) {
    const auto in = load<kCount>(x.row(t) + c);
    const auto g = load<kCount>(dy.row(t) + c);
    Pack<Compute<T>, kCount> out{};
    if (mode == GradMode::accumulate) out = load<kCount>(dx.row(t) + c);
    for (int k = 0; k < kCount; ++k) {
      out.element[k] += r * (g.element[k] * weight[c + k] - in.element[k] * along);
    }
    store<kCount>(dx.row(t) + c, out);
  });
}

template <int kCount, class T>
__global__ void __launch_bounds__(kStripThreads) weight_gradient(Rows<const T> x, Rows<const Compute<T>> rrms,
                                                                 Rows<const T> dy, GradMode mode, Compute<T>* dweight) {
  down_columns<1, kCount, T>(
      x.rows, x.columns,
      [&](std::int64_t t, std::int64_t c, Compute<T>(&sums)[1][kCount]) {
        const Compute<T> r = *rrms.row(t);
        const auto in = load<kCount>(x.row(t) + c);
        const auto g = load<kCount>(dy.row(t) + c);
        for (int k = 0; k < kCount; ++k) sums[0][k] += g.element[k] * (in.element[k] * r);
      },
      [&](int, std::int64_t c, Compute<T> sum) { write(mode, sum, dweight + c); });
}

}  // namespace

template <class T>
void rms_norm_forward(const Stream& stream, Rows<const T> x, const Compute<T>* weight, double eps, Rows<T> y,
                      Rows<Compute<T>> rrms) {
  constexpr int kCount = kWhole<T>;
  if (x.elements() == 0) return;
  launch(stream, static_cast<unsigned>(x.rows), row_threads<T>(x.columns, kThreads), 0,
         packs<kCount>(x) && packs<kCount>(y) ? forward<kCount, T> : forward<1, T>, x, weight, eps, y, rrms);
}

template <class T>
void rms_norm_input_gradient(const Stream& stream, Rows<const T> x, const Compute<T>* weight,
                             Rows<const Compute<T>> rrms, Rows<const T> dy, GradMode mode, Rows<T> dx) {
  constexpr int kCount = kWhole<T>;
  if (x.elements() == 0) return;
  const bool whole = packs<kCount>(x) && packs<kCount>(dy) && packs<kCount>(dx);
  launch(stream, static_cast<unsigned>(x.rows), row_threads<T>(x.columns, kThreads), 0,
         whole ? input_gradient<kCount, T> : input_gradient<1, T>, x, weight, rrms, dy, mode, dx);
}

template <class T>
void rms_norm_weight_gradient(const Stream& stream, Rows<const T> x, Rows<const Compute<T>> rrms, Rows<const T> dy,
                              GradMode mode, Compute<T>* dweight) {
  constexpr int kCount = kWhole<T>;
  if (x.columns == 0) return;
  const bool whole = packs<kCount>(x) && packs<kCount>(dy);
  launch(stream, strips_of<T>(x.columns), kStripThreads, 0, whole ? weight_gradient<kCount, T> : weight_gradient<1, T>,
         x, rrms, dy, mode, dweight);
}

#define TFORGE_INSTANTIATE(T)                                                                                       \
  template void rms_norm_forward<T>(const Stream&, Rows<const T>, const Compute<T>*, double, Rows<T>,               \
                                    Rows<Compute<T>>);                                                              \
  template void rms_norm_input_gradient<T>(const Stream&, Rows<const T>, const Compute<T>*, Rows<const Compute<T>>, \
                                           Rows<const T>, GradMode, Rows<T>);                                       \
  template void rms_norm_weight_gradient<T>(const Stream&, Rows<const T>, Rows<const Compute<T>>, Rows<const T>,    \
                                            GradMode, Compute<T>*)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
