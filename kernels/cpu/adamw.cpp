#include "kernels/cpu/adamw.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/cpu/row_passes.h"

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kChunk = 16384;       // elements a thread takes at once
constexpr std::int64_t kPartialSums = 1024;  // most partial sums of sum_of_squares; they live on the stack

}  // namespace

template <class T>
void adamw_update(const AdamWStep& step, TensorView parameter, ConstTensorView gradient, TensorView m, TensorView v) {
  const std::int64_t count = parameter.elements();
  T* const p = parameter.as<T>();
  const T* const g = gradient.as<T>();
  T* const first = m.as<T>();
  T* const second = v.as<T>();
  // Everything that is one number a step is folded in f64 before it is rounded to T.
  const auto beta1 = static_cast<T>(step.beta1), one_minus_beta1 = static_cast<T>(1 - step.beta1);
  const auto beta2 = static_cast<T>(step.beta2), one_minus_beta2 = static_cast<T>(1 - step.beta2);
  const auto rate = static_cast<T>(step.lr / step.bias1);
  const auto inverse_root_bias2 = static_cast<T>(1 / std::sqrt(step.bias2));
  const auto decay = static_cast<T>(step.lr * step.weight_decay);
  const auto eps = static_cast<T>(step.eps);
  const auto grad_scale = static_cast<T>(step.grad_scale);
  const auto update = [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) {
      const T gi = grad_scale * g[i];
      const T mi = beta1 * first[i] + one_minus_beta1 * gi;
      const T vi = beta2 * second[i] + one_minus_beta2 * (gi * gi);
      first[i] = mi;
      second[i] = vi;
      p[i] -= decay * p[i] + rate * mi / (std::sqrt(vi) * inverse_root_bias2 + eps);
    }
  };
  if (step.idle_rows == IdleRows::skip) {
    const std::int64_t rows = parameter.rows(), columns = parameter.columns();
    const std::int64_t at_once = std::max<std::int64_t>(1, kChunk / std::max<std::int64_t>(1, columns));
#pragma omp parallel for schedule(static) firstprivate(update) if (rows > at_once)
    for (std::int64_t r0 = 0; r0 < rows; r0 += at_once) {
      for (std::int64_t r = r0; r < std::min(rows, r0 + at_once); ++r) {
        const T* const row = g + r * columns;
        // A row that was hit ends the search at its first element, as a rule.
        if (std::any_of(row, row + columns, [](T x) { return x != T(0); })) update(r * columns, (r + 1) * columns);
      }
    }
    return;
  }
// A copy of `update` for each thread: its numbers stay in registers.
#pragma omp parallel for schedule(static) firstprivate(update) if (count > kChunk)
  for (std::int64_t begin = 0; begin < count; begin += kChunk) update(begin, std::min(count, begin + kChunk));
}

template <class T>
double sum_of_squares(ConstTensorView x) {
  std::int64_t rows = x.rows();
  std::int64_t columns = x.columns();
  if (x.contiguous()) {
    columns *= rows;
    rows = 1;
  }
  if (rows == 0 || columns == 0) return 0;
  // Pieces fixed by shape: runs of one long row, or groups of rows.
  const std::int64_t length = rows == 1 ? columns : rows;
  const std::int64_t grain = rows == 1 ? kChunk : std::max<std::int64_t>(1, kChunk / columns);
  const std::int64_t piece = std::max(grain, (length + kPartialSums - 1) / kPartialSums);
  const std::int64_t pieces = (length + piece - 1) / piece;
  std::array<double, kPartialSums> partial;
  const T* const data = x.as<T>();
  const RowPasses<T>& passes = row_passes<T>();
#pragma omp parallel for schedule(static) if (pieces > 1)
  for (std::int64_t k = 0; k < pieces; ++k) {
    const std::int64_t begin = k * piece;
    const std::int64_t end = std::min(length, begin + piece);
    double sum = 0;
    if (rows == 1) {
      for (std::int64_t i = begin; i < end; i += kChunk) {
        sum += passes.sum_of_squares_in_f64(data + i, std::min(kChunk, end - i));
      }
    } else {
      for (std::int64_t r = begin; r < end; ++r) sum += passes.sum_of_squares_in_f64(data + r * x.row_stride, columns);
    }
    partial[static_cast<std::size_t>(k)] = sum;
  }
  double total = 0;
  for (std::int64_t k = 0; k < pieces; ++k) total += partial[static_cast<std::size_t>(k)];
  return total;
}

#define TFORGE_INSTANTIATE(T)                                                                           \
  template void adamw_update<T>(const AdamWStep&, TensorView, ConstTensorView, TensorView, TensorView); \
  template double sum_of_squares<T>(ConstTensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
