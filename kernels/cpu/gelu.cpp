#include "kernels/cpu/gelu.h"

#include <algorithm>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/row_passes.h"

namespace tforge::kernels::cpu {
namespace {

constexpr std::int64_t kPiece = 8192;  // elements a thread takes at once

/// Calls body(row, first column, count) over pieces of a [rows, columns] range; a contiguous one is one long row.
template <class Body>
void for_each_piece(std::int64_t rows, std::int64_t columns, bool contiguous, const Body& body) {
  if (contiguous) {
    columns *= rows;
    rows = 1;
  }
  const std::int64_t pieces = blocks_of(columns, kPiece);
  parallel_blocks(rows * pieces, [&](std::int64_t block) {
    const std::int64_t first = block % pieces * kPiece;
    body(block / pieces, first, std::min(kPiece, columns - first));
  });
}

}  // namespace

template <class T>
void gelu_forward(ConstTensorView x, TensorView y) {
  const RowPasses<T>& passes = row_passes<T>();
  const T* in = x.as<T>();
  T* out = y.as<T>();
  for_each_piece(x.rows(), x.columns(), x.contiguous() && y.contiguous(),
                 [&](std::int64_t row, std::int64_t first, std::int64_t count) {
                   passes.gelu(in + row * x.row_stride + first, count, out + row * y.row_stride + first);
                 });
}

template <class T>
void gelu_backward(ConstTensorView x, ConstTensorView dy, GradMode mode, TensorView dx) {
  const RowPasses<T>& passes = row_passes<T>();
  const T* in = x.as<T>();
  const T* gradient = dy.as<T>();
  T* out = dx.as<T>();
  for_each_piece(x.rows(), x.columns(), x.contiguous() && dy.contiguous() && dx.contiguous(),
                 [&](std::int64_t row, std::int64_t first, std::int64_t count) {
                   passes.gelu_backward(in + row * x.row_stride + first, gradient + row * dy.row_stride + first, count,
                                        mode, out + row * dx.row_stride + first);
                 });
}

#define TFORGE_INSTANTIATE(T)                                 \
  template void gelu_forward<T>(ConstTensorView, TensorView); \
  template void gelu_backward<T>(ConstTensorView, ConstTensorView, GradMode, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
