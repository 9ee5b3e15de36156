#include "kernels/cpu/embedding.h"

#include <algorithm>

namespace tforge::kernels::cpu {

template <class T>
void embedding_forward(ConstTensorView tokens, ConstTensorView table, std::int64_t first_row, TensorView y) {
  const std::int64_t rows = y.rows();
  const std::int64_t d = y.columns();
  const auto* const token = tokens.as<std::int32_t>();
  const T* const source = table.as<T>();
  T* const out = y.as<T>();
#pragma omp parallel for schedule(static) if (rows * d > 16384)
  for (std::int64_t t = 0; t < rows; ++t) {
    const std::int64_t row = token[t] - first_row;
    T* to = out + t * y.row_stride;
    if (row >= 0 && row < table.rows()) std::copy_n(source + row * table.row_stride, d, to);
    else std::fill_n(to, d, T(0));
  }
}

template <class T>
void embedding_backward(ConstTensorView tokens, ConstTensorView dy, std::int64_t first_row, GradMode mode,
                        TensorView dtable, TensorView workspace) {
  const std::int64_t count = dy.rows();
  const std::int64_t d = dy.columns();
  const std::int64_t rows = dtable.rows();
  const auto* const token = tokens.as<std::int32_t>();
  // Counting sort: `order` lists the positions of each table row's token, row by row and in order of t.
  // While it is filled, end[row] runs from the first to one past the last entry of the row.
  auto* const end = workspace.as<std::int32_t>();
  std::int32_t* const order = end + rows;
  std::fill_n(end, rows, 0);
  for (std::int64_t t = 0; t < count; ++t) {
    const std::int64_t row = token[t] - first_row;
    if (row >= 0 && row < rows) ++end[row];
  }
  std::int32_t total = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t here = end[row];
    end[row] = total;
    total += here;
  }
  for (std::int64_t t = 0; t < count; ++t) {
    const std::int64_t row = token[t] - first_row;
    if (row >= 0 && row < rows) order[end[row]++] = static_cast<std::int32_t>(t);
  }

  const T* const gradients = dy.as<T>();
  T* const out = dtable.as<T>();
  // Words are far from equally frequent, hence the dynamic schedule; a row belongs to one thread whoever takes it.
#pragma omp parallel for schedule(dynamic, 16) if (total * d > 16384 || rows * d > 65536)
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int32_t* first = order + (row == 0 ? 0 : end[row - 1]);
    const std::int32_t* const last = order + end[row];
    T* to = out + row * dtable.row_stride;
    if (mode == GradMode::overwrite) {
      if (first == last) std::fill_n(to, d, T(0));
      else std::copy_n(gradients + *first++ * dy.row_stride, d, to);
    }
    for (; first != last; ++first) {
      const T* from = gradients + *first * dy.row_stride;
#pragma omp simd
      for (std::int64_t i = 0; i < d; ++i) to[i] += from[i];
    }
  }
}

#define TFORGE_INSTANTIATE(T)                                                                     \
  template void embedding_forward<T>(ConstTensorView, ConstTensorView, std::int64_t, TensorView); \
  template void embedding_backward<T>(ConstTensorView, ConstTensorView, std::int64_t, GradMode, TensorView, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
