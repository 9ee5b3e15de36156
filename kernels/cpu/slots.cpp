#include "kernels/cpu/slots.h"

#include "kernels/cpu/head_products.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_passes.h"

namespace tforge::kernels::cpu {

template <class T>
void slots_forward(const SlotShape& shape, ConstTensorView projection, ConstTensorView x, TensorView y) {
  const std::int64_t d = x.columns() / shape.heads;
  const RowPasses<T>& passes = row_passes<T>();
  parallel_blocks(shape.batch * shape.heads, [&](std::int64_t index) {
    const std::int64_t b = index / shape.heads, h = index % shape.heads;
    const auto e = head_of<T>(projection, h * shape.slots, 0);
    const auto from = head_of<T>(x, b * shape.x_stride, h * d);
    const auto to = head_of<T>(y, b * shape.y_stride, h * d);
    passes.weighted_rows(shape.slots, e.data, e.row, shape.block, from.data, from.row, d, to.data, to.row);
  });
}

template <class T>
void slots_backward(const SlotShape& shape, ConstTensorView projection, ConstTensorView x, ConstTensorView dy,
                    TensorView dx, GradMode mode, TensorView dprojection) {
  const std::int64_t d = x.columns() / shape.heads;
  const RowPasses<T>& passes = row_passes<T>();
  parallel_blocks(shape.heads, [&](std::int64_t h) {
    const auto e = head_of<T>(projection, h * shape.slots, 0);
    for (std::int64_t b = 0; b < shape.batch; ++b) {
      const auto rows = head_of<T>(x, b * shape.x_stride, h * d);
      const auto gradients = head_of<T>(dy, b * shape.y_stride, h * d);
      const auto to = head_of<T>(dx, b * shape.x_stride, h * d);
      for (std::int64_t j = 0; j < shape.block; ++j) {
        for (std::int64_t s = 0; s < shape.slots; ++s) {
          const T factor = e.at(s)[j];
          for (std::int64_t c = 0; c < d; ++c) to.at(j)[c] += factor * gradients.at(s)[c];
        }
      }
      if (!dprojection) continue;
      const auto de = head_of<T>(dprojection, h * shape.slots, 0);
      const bool first = b == 0 && mode == GradMode::overwrite;
      for (std::int64_t s = 0; s < shape.slots; ++s) {
        for (std::int64_t j = 0; j < shape.block; ++j) {
          const T sum = passes.dot(gradients.at(s), rows.at(j), d);
          de.at(s)[j] = first ? sum : de.at(s)[j] + sum;
        }
      }
    }
  });
}

#define TFORGE_INSTANTIATE(T)                                                                                      \
  template void slots_forward<T>(const SlotShape&, ConstTensorView, ConstTensorView, TensorView);                  \
  template void slots_backward<T>(const SlotShape&, ConstTensorView, ConstTensorView, ConstTensorView, TensorView, \
                                  GradMode, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
