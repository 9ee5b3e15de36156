#include "kernels/cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "kernels/cpu/row_passes.h"

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kSmall = 8192;  // logits below which a parallel region costs more than it saves

}  // namespace

template <class T>
void cross_entropy_row_statistics(ConstTensorView logits, ConstTensorView targets, std::int64_t first_column,
                                  TensorView row_max, TensorView row_sum, TensorView target_logit) {
  const std::int64_t rows = logits.rows();
  const T* const z = logits.as<T>();
  const auto* const target = targets.as<std::int32_t>();
  T* const most = row_max.as<T>();
  T* const sum = row_sum.as<T>();
  T* const logit = target_logit.as<T>();
  const RowPasses<T>& passes = row_passes<T>();
#pragma omp parallel for schedule(static) if (logits.elements() > kSmall)
  for (std::int64_t r = 0; r < rows; ++r) {
    const T* row = z + r * logits.row_stride;
    const T m = passes.largest(row, logits.columns());
    most[r * row_max.row_stride] = m;
    sum[r * row_sum.row_stride] = passes.sum_of_exponentials(row, logits.columns(), m);
    const std::int64_t column = target[r] - first_column;
    const bool held = target[r] >= 0 && column >= 0 && column < logits.columns();
    logit[r * target_logit.row_stride] = held ? row[column] : T(0);
  }
}

template <class T>
void cross_entropy_rescale(ConstTensorView own_max, ConstTensorView row_max, TensorView row_sum) {
  const T* const own = own_max.as<T>();
  const T* const most = row_max.as<T>();
  T* const sum = row_sum.as<T>();
  for (std::int64_t r = 0; r < row_sum.rows(); ++r) {
    sum[r * row_sum.row_stride] *= std::exp(own[r * own_max.row_stride] - most[r * row_max.row_stride]);
  }
}

template <class T>
void cross_entropy_nll(ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView target_logit,
                       ConstTensorView targets, TensorView nll) {
  const std::int64_t rows = targets.elements();
  const T* const most = row_max.as<T>();
  const T* const sum = row_sum.as<T>();
  const T* const logit = target_logit.as<T>();
  const auto* const target = targets.as<std::int32_t>();
  auto* const out = nll.as<double>();
  for (std::int64_t r = 0; r < rows; ++r) {
    const auto shifted =
        static_cast<double>(most[r * row_max.row_stride]) - static_cast<double>(logit[r * target_logit.row_stride]);
    out[r] = target[r] < 0 ? 0.0 : std::log(static_cast<double>(sum[r * row_sum.row_stride])) + shifted;
  }
}

template <class T>
void cross_entropy_backward(ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView targets,
                            std::int64_t first_column, double weight, ConstTensorView logits, TensorView dlogits) {
  const RowPasses<T>& passes = row_passes<T>();
  const std::int64_t rows = logits.rows();
  const std::int64_t columns = logits.columns();
  const T* const shift = row_max.as<T>();
  const T* const sum = row_sum.as<T>();
  const auto* const target = targets.as<std::int32_t>();
  const T* const z = logits.as<T>();
  T* const dz = dlogits.as<T>();
#pragma omp parallel for schedule(static) if (logits.elements() > kSmall)
  for (std::int64_t r = 0; r < rows; ++r) {
    T* row = dz + r * dlogits.row_stride;
    if (target[r] < 0) {
      std::fill_n(row, columns, T(0));
      continue;
    }
    if (dz != z) std::copy_n(z + r * logits.row_stride, columns, row);
    const T factor = static_cast<T>(weight / static_cast<double>(sum[r * row_sum.row_stride]));
    passes.scaled_exponentials(row, columns, shift[r * row_max.row_stride], factor);
    const std::int64_t column = target[r] - first_column;
    if (column >= 0 && column < columns) row[column] -= static_cast<T>(weight);
  }
}

#define TFORGE_INSTANTIATE(T)                                                                                         \
  template void cross_entropy_row_statistics<T>(ConstTensorView, ConstTensorView, std::int64_t, TensorView,           \
                                                TensorView, TensorView);                                              \
  template void cross_entropy_rescale<T>(ConstTensorView, ConstTensorView, TensorView);                               \
  template void cross_entropy_nll<T>(ConstTensorView, ConstTensorView, ConstTensorView, ConstTensorView, TensorView); \
  template void cross_entropy_backward<T>(ConstTensorView, ConstTensorView, ConstTensorView, std::int64_t, double,    \
                                          ConstTensorView, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
