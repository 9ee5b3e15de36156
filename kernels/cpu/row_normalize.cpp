#include "kernels/cpu/pattention.h"

#include <algorithm>
#include <atomic>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/pattention_blocks.h"
#include "kernels/cpu/row_passes.h"

namespace tforge::kernels::cpu {
namespace {

/// The factor of a row of U; 0 for a floored one.
template <class T>
T normalizer(PattentionNorm norm, double scale, T weight) {
  if (norm == PattentionNorm::softmax) return static_cast<T>(scale / static_cast<double>(weight));
  return row_factor(scale, weight);
}

constexpr std::int64_t kRowsAtOnce = 64;

}  // namespace

template <class T>
std::int64_t row_normalize_forward(PattentionNorm norm, double scale, ConstTensorView u_view,
                                   ConstTensorView weight_view, TensorView y_view) {
  const RowPasses<T>& passes = row_passes<T>();
  const Rows<const T> u(u_view);
  const Rows<const T> weight(weight_view);
  const Rows<T> y(y_view);
  std::atomic<std::int64_t> floored = 0;
  parallel_blocks(blocks_of(u.count, kRowsAtOnce), [&](std::int64_t block) {
    const std::int64_t last = std::min(u.count, (block + 1) * kRowsAtOnce);
    for (std::int64_t i = block * kRowsAtOnce; i < last; ++i) {
      const T factor = normalizer<T>(norm, scale, *weight.row(i));
      if (factor == T(0)) {
        std::fill_n(y.row(i), y.columns, T(0));
        ++floored;
        continue;
      }
      passes.scale(factor, u.row(i), u.columns, y.row(i));
    }
  });
  return floored;
}

template <class T>
void row_normalize_backward(PattentionNorm norm, double scale, ConstTensorView u_view, ConstTensorView weight_view,
                            ConstTensorView dy_view, TensorView du_view, TensorView dweight_view) {
  const RowPasses<T>& passes = row_passes<T>();
  const Rows<const T> u(u_view);
  const Rows<const T> weight(weight_view);
  const Rows<const T> dy(dy_view);
  const Rows<T> du(du_view);
  const Rows<T> dweight(dweight_view);
  const double power = norm == PattentionNorm::softmax ? -1. : -0.5;  // the factor goes as weight^power
  parallel_blocks(blocks_of(u.count, kRowsAtOnce), [&](std::int64_t block) {
    const std::int64_t last = std::min(u.count, (block + 1) * kRowsAtOnce);
    for (std::int64_t i = block * kRowsAtOnce; i < last; ++i) {
      const T factor = normalizer<T>(norm, scale, *weight.row(i));
      if (factor == T(0)) {
        std::fill_n(du.row(i), du.columns, T(0));
        *dweight.row(i) = T(0);
        continue;
      }
      const T sum = passes.dot(dy.row(i), u.row(i), u.columns);
      passes.scale(factor, dy.row(i), u.columns, du.row(i));
      *dweight.row(i) = static_cast<T>(power * static_cast<double>(factor) * static_cast<double>(sum) /
                                       static_cast<double>(*weight.row(i)));
    }
  });
}

#define TFORGE_INSTANTIATE(T)                                                                                        \
  template std::int64_t row_normalize_forward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView,           \
                                                 TensorView);                                                        \
  template void row_normalize_backward<T>(PattentionNorm, double, ConstTensorView, ConstTensorView, ConstTensorView, \
                                          TensorView, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
