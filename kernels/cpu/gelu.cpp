#include "kernels/cpu/gelu.h"

#include <algorithm>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/simd.h"

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

/// dx {=, +=} dy * slope of gelu at x, `count` <= kLanes elements.
template <class V, class T, class... Count>
void gelu_backward_step(const T* x, const T* dy, GradMode mode, T* dx, Count... count) {
  const V slope = gelu_and_slope(V::load(x, count...)).slope;
  const V base = mode == GradMode::accumulate ? V::load(dx, count...) : V::all(0);
  fma(V::load(dy, count...), slope, base).store(dx, count...);
}

}  // namespace

template <class T>
void gelu_forward(ConstTensorView x, TensorView y) {
  using V = Vec<T>;
  const T* in = x.as<T>();
  T* out = y.as<T>();
  for_each_piece(x.rows(), x.columns(), x.contiguous() && y.contiguous(),
                 [&](std::int64_t row, std::int64_t first, std::int64_t count) {
                   const T* s = in + row * x.row_stride + first;
                   T* d = out + row * y.row_stride + first;
                   std::int64_t i = 0;
                   for (; i + V::kLanes <= count; i += V::kLanes) gelu(V::load(s + i)).store(d + i);
                   if (i < count) gelu(V::load(s + i, count - i)).store(d + i, count - i);
                 });
}

template <class T>
void gelu_backward(ConstTensorView x, ConstTensorView dy, GradMode mode, TensorView dx) {
  using V = Vec<T>;
  const T* in = x.as<T>();
  const T* gradient = dy.as<T>();
  T* out = dx.as<T>();
  for_each_piece(x.rows(), x.columns(), x.contiguous() && dy.contiguous() && dx.contiguous(),
                 [&](std::int64_t row, std::int64_t first, std::int64_t count) {
                   const T* s = in + row * x.row_stride + first;
                   const T* g = gradient + row * dy.row_stride + first;
                   T* d = out + row * dx.row_stride + first;
                   std::int64_t i = 0;
                   for (; i + V::kLanes <= count; i += V::kLanes) {
                     gelu_backward_step<V>(s + i, g + i, mode, d + i);
                   }
                   if (i < count) gelu_backward_step<V>(s + i, g + i, mode, d + i, count - i);
                 });
}

#define TFORGE_INSTANTIATE(T)                                 \
  template void gelu_forward<T>(ConstTensorView, TensorView); \
  template void gelu_backward<T>(ConstTensorView, ConstTensorView, GradMode, TensorView)
TFORGE_INSTANTIATE(float);
TFORGE_INSTANTIATE(double);
#undef TFORGE_INSTANTIATE

}  // namespace tforge::kernels::cpu
