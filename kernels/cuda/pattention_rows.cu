#include "kernels/cuda/pattention_rows.h"

#include <limits>
#include <type_traits>

#include "kernels/cuda/gelu.cuh"
#include "kernels/cuda/launch.cuh"

namespace tforge::kernels::cuda {

namespace {

constexpr int kThreads = 256;  // of a block, which has one row, at most

/// scale / r of an l2_norm_gelu row; 0 when r is below the floor, NaN when it is not finite.
template <class T>
__device__ T row_factor(double scale, T stat) {
  const double r = sqrt(static_cast<double>(stat));
  if (r < kNormFloor) return T(0);
  return isfinite(r) ? static_cast<T>(scale / r) : std::numeric_limits<T>::quiet_NaN();
}

/// What the activation of a row takes from its statistic: the factor of the scores (l2_norm_gelu), the largest score
/// (softmax), nothing (gelu_l2_norm).
template <PattentionNorm kNorm, class T>
__device__ T row_parameter(double scale, T stat) {
  if constexpr (kNorm == PattentionNorm::l2_norm_gelu) return row_factor(scale, stat);
  else return stat;
}
template <PattentionNorm kNorm, class T>
__device__ T row_parameter(double scale, const Rows<const T>& stat, std::int64_t row) {
  return row_parameter<kNorm>(scale, kNorm == PattentionNorm::gelu_l2_norm ? T(0) : *stat.row(row));
}

/// P of one score. A floored row has P = 0 whatever its scores.
template <PattentionNorm kNorm, class T>
__device__ T activation(T parameter, T score) {
  if constexpr (kNorm == PattentionNorm::l2_norm_gelu) return parameter == T(0) ? T(0) : gelu(parameter * score);
  else if constexpr (kNorm == PattentionNorm::softmax) return exp(score - parameter);
  else return gelu(score);
}

/// The statistic of row r, for every thread of its block; written as well.
template <int kCount, PattentionNorm kNorm, class T>
__device__ Compute<T> take_statistic(const Rows<const T>& scores, const Rows<Compute<T>>& stat, std::int64_t r) {
  constexpr bool kLargest = kNorm == PattentionNorm::softmax;
  Compute<T> value = kLargest ? -std::numeric_limits<Compute<T>>::infinity() : Compute<T>(0);
  over_row<T, kCount, kThreads>(scores.columns, [&](std::int64_t c) {
    const auto a = load<kCount>(scores.row(r) + c);
    for (int k = 0; k < kCount; ++k) {
      if constexpr (kLargest) value = Largest()(value, a.element[k]);
      else value += a.element[k] * a.element[k];
    }
  });
  if constexpr (kLargest) value = over_block<Largest, kThreads>(value);
  else value = over_block<Sum, kThreads>(value);
  if (threadIdx.x == 0) *stat.row(r) = value;
  return value;
}

template <int kCount, PattentionNorm kNorm, class T>
__global__ void __launch_bounds__(kThreads) statistic(Rows<const T> scores, Rows<Compute<T>> stat) {
  take_statistic<kCount, kNorm>(scores, stat, blockIdx.x);
}

/// The statistic of rows: written where all tokens are here, else read.
template <bool kAll, class T>
using Statistic = std::conditional_t<kAll, Compute<T>, const Compute<T>>;

/// kAll: the row has all tokens, so that its statistic is taken on the way, and the row is in cache when P is.
template <int kCount, PattentionNorm kNorm, bool kAll, class T>
__global__ void __launch_bounds__(kThreads) activate(double scale, Rows<const T> scores, Rows<Statistic<kAll, T>> stat,
                                                     Rows<T> p, Rows<Compute<T>> weight, double* floored) {
  const std::int64_t r = blockIdx.x;
  Compute<T> parameter;
  if constexpr (kAll) parameter = row_parameter<kNorm>(scale, take_statistic<kCount, kNorm>(scores, stat, r));
  else parameter = row_parameter<kNorm>(scale, stat, r);
  Compute<T> sum = 0;
  over_row<T, kCount, kThreads>(scores.columns, [&](std::int64_t c) {
    auto a = load<kCount>(scores.row(r) + c);
    for (int k = 0; k < kCount; ++k) {
      const Compute<T> value = activation<kNorm>(parameter, a.element[k]);
      if constexpr (kNorm == PattentionNorm::gelu_l2_norm) sum += value * value;
      if constexpr (kNorm == PattentionNorm::softmax) sum += value;
      a.element[k] = value;
    }
    store<kCount>(p.row(r) + c, a);
  });
  if constexpr (kNorm == PattentionNorm::l2_norm_gelu) {
    // Whole numbers below 2^53: the order does not show.
    if (threadIdx.x == 0 && floored != nullptr && parameter == Compute<T>(0)) atomicAdd(floored, 1.0);
  } else {
    sum = over_block<Sum, kThreads>(sum);
    if (threadIdx.x == 0) *weight.row(r) = sum;
  }
}

/// d = (scale / r) (d - B dot / scale^2) for row r, `factor` being scale / r.
template <int kCount, class T>
__device__ void row_through_norm(double scale, Compute<T> factor, Compute<T> dot, const Rows<const T>& scores,
                                 const Rows<T>& d, std::int64_t r) {
  const Compute<T> along =
      factor == Compute<T>(0)
          ? Compute<T>(0)
          : static_cast<Compute<T>>(-static_cast<double>(factor) * static_cast<double>(dot) / (scale * scale));
  over_row<T, kCount, kThreads>(scores.columns, [&](std::int64_t c) {
    const auto a = load<kCount>(scores.row(r) + c);
    auto g = load<kCount>(d.row(r) + c);
    for (int k = 0; k < kCount; ++k) {
      g.element[k] = factor == Compute<T>(0) ? Compute<T>(0) : factor * (g.element[k] + along * a.element[k]);
    }
    store<kCount>(d.row(r) + c, g);
  });
}

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    through_norm(double scale, Rows<const T> scores, Rows<const Compute<T>> stat, Rows<const Compute<T>> dot,
                 Rows<T> d) {
  const std::int64_t r = blockIdx.x;
  row_through_norm<kCount>(scale, row_factor(scale, *stat.row(r)), *dot.row(r), scores, d, r);
}

/// kAll: the row has all tokens, so that d goes through the norm at once, and dot is not asked for.
template <int kCount, PattentionNorm kNorm, bool kAll, class T>
__global__ void __launch_bounds__(kThreads)
    activate_backward(double scale, Rows<const T> scores, Rows<const Compute<T>> stat, Rows<const Compute<T>> dweight,
                      Rows<T> d, Rows<T> p, Rows<Compute<T>> dot) {
  const std::int64_t r = blockIdx.x;
  const Compute<T> parameter = row_parameter<kNorm>(scale, stat, r);
  const Compute<T> dw = kNorm == PattentionNorm::l2_norm_gelu ? Compute<T>(0) : *dweight.row(r);
  Compute<T> sum = 0;
  over_row<T, kCount, kThreads>(scores.columns, [&](std::int64_t c) {
    const auto a = load<kCount>(scores.row(r) + c);
    auto dp = load<kCount>(d.row(r) + c);
    Pack<Compute<T>, kCount> values;
    for (int k = 0; k < kCount; ++k) {
      const Compute<T> value = activation<kNorm>(parameter, a.element[k]);
      Compute<T>& g = dp.element[k];
      if constexpr (kNorm == PattentionNorm::l2_norm_gelu) {
        const Compute<T> b = parameter * a.element[k];
        g = parameter == Compute<T>(0) ? Compute<T>(0) : g * gelu_slope(b);
        sum += g * b;
      } else if constexpr (kNorm == PattentionNorm::softmax) {
        g = (g + dw) * value;
      } else {
        g = (g + 2 * dw * value) * gelu_slope(a.element[k]);
      }
      values.element[k] = value;
    }
    store<kCount>(d.row(r) + c, dp);
    store<kCount>(p.row(r) + c, values);
  });
  if constexpr (kNorm == PattentionNorm::l2_norm_gelu) {
    sum = over_block<Sum, kThreads>(sum);
    if constexpr (kAll) row_through_norm<kCount>(scale, parameter, sum, scores, d, r);
    else if (threadIdx.x == 0) *dot.row(r) = sum;
  }
}

/// The factor of a row of U; 0 for a floored one.
template <class T>
__device__ T normalizer(PattentionNorm norm, double scale, T weight) {
  if (norm == PattentionNorm::softmax) return static_cast<T>(scale / static_cast<double>(weight));
  return row_factor(scale, weight);
}

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads) normalize(PattentionNorm norm, double scale, Rows<const Compute<T>> u,
                                                      Rows<const Compute<T>> weight, Rows<T> y, double* floored) {
  const std::int64_t r = blockIdx.x;
  const Compute<T> factor = normalizer(norm, scale, *weight.row(r));
  over_row<T, kCount, kThreads>(u.columns, [&](std::int64_t c) {
    auto pack = load<kCount>(u.row(r) + c);
    for (Compute<T>& value : pack.element) value = factor == Compute<T>(0) ? Compute<T>(0) : factor * value;
    store<kCount>(y.row(r) + c, pack);
  });
  if (threadIdx.x == 0 && floored != nullptr && factor == Compute<T>(0)) atomicAdd(floored, 1.0);
}

template <int kCount, class T>
__global__ void __launch_bounds__(kThreads)
    normalize_backward(PattentionNorm norm, double scale, Rows<const Compute<T>> u, Rows<const Compute<T>> weight,
                       Rows<const T> dy, Rows<Compute<T>> du, Rows<Compute<T>> dweight) {
  const std::int64_t r = blockIdx.x;
  const Compute<T> factor = normalizer(norm, scale, *weight.row(r));
  Compute<T> sum = 0;
  over_row<T, kCount, kThreads>(u.columns, [&](std::int64_t c) {
    const auto a = load<kCount>(u.row(r) + c);
    auto g = load<kCount>(dy.row(r) + c);
    for (int k = 0; k < kCount; ++k) {
      sum += g.element[k] * a.element[k];
      g.element[k] = factor == Compute<T>(0) ? Compute<T>(0) : factor * g.element[k];
    }
    store<kCount>(du.row(r) + c, g);
  });
  sum = over_block<Sum, kThreads>(sum);
  if (threadIdx.x != 0) return;
  const double power = norm == PattentionNorm::softmax ? -1. : -0.5;  // the factor goes as weight^power
  *dweight.row(r) = factor == Compute<T>(0)
                        ? Compute<T>(0)
                        : static_cast<Compute<T>>(power * static_cast<double>(factor) * static_cast<double>(sum) /
                                                  static_cast<double>(*weight.row(r)));
}

/// Calls f(constant<norm>).
template <PattentionNorm kNorm>
using Constant = std::integral_constant<PattentionNorm, kNorm>;
template <class F>
void with_norm(PattentionNorm norm, const F& f) {
  switch (norm) {
    case PattentionNorm::l2_norm_gelu: return f(Constant<PattentionNorm::l2_norm_gelu>());
    case PattentionNorm::gelu_l2_norm: return f(Constant<PattentionNorm::gelu_l2_norm>());
    case PattentionNorm::softmax: return f(Constant<PattentionNorm::softmax>());
  }
}

unsigned grid_of(std::int64_t rows) { return static_cast<unsigned>(rows); }

}  // namespace

template <class T>
void pattention_statistic(const Stream& stream, PattentionNorm norm, Rows<const T> scores, Rows<Compute<T>> stat) {
  constexpr int kCount = kWhole<T>;
  if (scores.rows == 0) return;
  with_norm(norm, [&](auto constant) {
    constexpr PattentionNorm kNorm = decltype(constant)::value;
    launch(stream, grid_of(scores.rows), row_threads<T>(scores.columns, kThreads), 0,
           packs<kCount>(scores) ? statistic<kCount, kNorm, T> : statistic<1, kNorm, T>, scores, stat);
  });
}

namespace {

template <bool kAll, class T>
void start_activate(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                    Rows<Statistic<kAll, T>> stat, Rows<T> p, Rows<Compute<T>> weight, double* floored) {
  constexpr int kCount = kWhole<T>;
  if (scores.rows == 0) return;
  const bool whole = packs<kCount>(scores) && packs<kCount>(p);
  with_norm(norm, [&](auto constant) {
    constexpr PattentionNorm kNorm = decltype(constant)::value;
    constexpr bool kTaken = kAll && kNorm != PattentionNorm::gelu_l2_norm;  // which has none
    const Rows<Statistic<kTaken, T>> of_rows(stat.data, stat.stride, stat.rows, stat.columns);
    launch(stream, grid_of(scores.rows), row_threads<T>(scores.columns, kThreads), 0,
           whole ? activate<kCount, kNorm, kTaken, T> : activate<1, kNorm, kTaken, T>, scale, scores, of_rows, p,
           weight, floored);
  });
}

template <bool kAll, class T>
void start_activate_backward(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                             Rows<const Compute<T>> stat, Rows<const Compute<T>> dweight, Rows<T> d, Rows<T> p,
                             Rows<Compute<T>> dot) {
  constexpr int kCount = kWhole<T>;
  if (scores.rows == 0) return;
  const bool whole = packs<kCount>(scores) && packs<kCount>(d) && packs<kCount>(p);
  with_norm(norm, [&](auto constant) {
    constexpr PattentionNorm kNorm = decltype(constant)::value;
    constexpr bool kThrough = kAll && kNorm == PattentionNorm::l2_norm_gelu;
    launch(stream, grid_of(scores.rows), row_threads<T>(scores.columns, kThreads), 0,
           whole ? activate_backward<kCount, kNorm, kThrough, T> : activate_backward<1, kNorm, kThrough, T>, scale,
           scores, stat, dweight, d, p, dot);
  });
}

}  // namespace

template <class T>
void pattention_activate(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                         Rows<const Compute<T>> stat, Rows<T> p, Rows<Compute<T>> weight, double* floored) {
  start_activate<false>(stream, norm, scale, scores, stat, p, weight, floored);
}

template <class T>
void pattention_activate_all(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                             Rows<Compute<T>> stat, Rows<T> p, Rows<Compute<T>> weight, double* floored) {
  start_activate<true>(stream, norm, scale, scores, stat, p, weight, floored);
}

template <class T>
void pattention_activate_backward(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                                  Rows<const Compute<T>> stat, Rows<const Compute<T>> dweight, Rows<T> d, Rows<T> p,
                                  Rows<Compute<T>> dot) {
  start_activate_backward<false>(stream, norm, scale, scores, stat, dweight, d, p, dot);
}

template <class T>
void pattention_activate_backward_all(const Stream& stream, PattentionNorm norm, double scale, Rows<const T> scores,
                                      Rows<const Compute<T>> stat, Rows<const Compute<T>> dweight, Rows<T> d,
                                      Rows<T> p) {
  start_activate_backward<true>(stream, norm, scale, scores, stat, dweight, d, p, {});
}

template <class T>
void pattention_through_norm(const Stream& stream, double scale, Rows<const T> scores, Rows<const Compute<T>> stat,
                             Rows<const Compute<T>> dot, Rows<T> d) {
  constexpr int kCount = kWhole<T>;
  if (scores.rows == 0) return;
  const bool whole = packs<kCount>(scores) && packs<kCount>(d);
  launch(stream, grid_of(scores.rows), row_threads<T>(scores.columns, kThreads), 0,
         whole ? through_norm<kCount, T> : through_norm<1, T>, scale, scores, stat, dot, d);
}

template <class T>
void row_normalize_forward(const Stream& stream, PattentionNorm norm, double scale, Rows<const Compute<T>> u,
                           Rows<const Compute<T>> weight, Rows<T> y, double* floored) {
  constexpr int kCount = kWhole<Compute<T>>;
  if (u.rows == 0) return;
  const bool whole = packs<kCount>(u) && packs<kCount>(y);
  launch(stream, grid_of(u.rows), row_threads<T>(u.columns, kThreads), 0,
         whole ? normalize<kCount, T> : normalize<1, T>, norm, scale, u, weight, y, floored);
}

template <class T>
void row_normalize_backward(const Stream& stream, PattentionNorm norm, double scale, Rows<const Compute<T>> u,
                            Rows<const Compute<T>> weight, Rows<const T> dy, Rows<Compute<T>> du,
                            Rows<Compute<T>> dweight) {
  constexpr int kCount = kWhole<Compute<T>>;
  if (u.rows == 0) return;
  const bool whole = packs<kCount>(u) && packs<kCount>(dy) && packs<kCount>(du);
  launch(stream, grid_of(u.rows), row_threads<T>(u.columns, kThreads), 0,
         whole ? normalize_backward<kCount, T> : normalize_backward<1, T>, norm, scale, u, weight, dy, du, dweight);
}

#define TFORGE_INSTANTIATE(T)                                                                                          \
  template void pattention_statistic<T>(const Stream&, PattentionNorm, Rows<const T>, Rows<Compute<T>>);               \
  template void pattention_activate<T>(const Stream&, PattentionNorm, double, Rows<const T>, Rows<const Compute<T>>,   \
                                       Rows<T>, Rows<Compute<T>>, double*);                                            \
  template void pattention_activate_all<T>(const Stream&, PattentionNorm, double, Rows<const T>, Rows<Compute<T>>,     \
                                           Rows<T>, Rows<Compute<T>>, double*);                                        \
  template void pattention_activate_backward_all<T>(const Stream&, PattentionNorm, double, Rows<const T>,              \
                                                    Rows<const Compute<T>>, Rows<const Compute<T>>, Rows<T>, Rows<T>); \
  template void pattention_activate_backward<T>(const Stream&, PattentionNorm, double, Rows<const T>,                  \
                                                Rows<const Compute<T>>, Rows<const Compute<T>>, Rows<T>, Rows<T>,      \
                                                Rows<Compute<T>>);                                                     \
  template void pattention_through_norm<T>(const Stream&, double, Rows<const T>, Rows<const Compute<T>>,               \
                                           Rows<const Compute<T>>, Rows<T>);                                           \
  template void row_normalize_forward<T>(const Stream&, PattentionNorm, double, Rows<const Compute<T>>,                \
                                         Rows<const Compute<T>>, Rows<T>, double*);                                    \
  template void row_normalize_backward<T>(const Stream&, PattentionNorm, double, Rows<const Compute<T>>,               \
                                          Rows<const Compute<T>>, Rows<const T>, Rows<Compute<T>>, Rows<Compute<T>>)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
TFORGE_INSTANTIATE(bf16);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cuda
