#pragma once
// Linear projections of a block of positions along time: the E and F of Linformer (Wang et al., arXiv 2006.04768,
// equation 7), for one block.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// Of each of `batch` sequences `block` rows of x, sequence b from row b * x_stride on, and `slots` rows of y from row
/// b * y_stride on.
struct SlotShape {
  std::int64_t batch = 1;
  std::int64_t heads = 1;
  std::int64_t block = 1;
  std::int64_t slots = 1;
  std::int64_t x_stride = 1;
  std::int64_t y_stride = 1;
};

/// y[b, s, head h] = sum_j E[h * slots + s, j] x[b, j, head h]. E [heads * slots, block]; x, y [rows, heads *
/// head_dim], row strides allowed; x and y apart. f32 or f64, on a CUDA device also bf16 with sums in f32; sums in
/// order of j. Parallel over (sequence, head); bits do not depend on threads. Throws ShapeError, DTypeError.
void slots_forward(Stream& stream, const SlotShape& shape, ConstTensorView projection, ConstTensorView x, TensorView y);

/// dx[b, j] += sum_s E[s, j] dy[b, s]; dE[s, j] {=, +=} sum_b dy[b, s] . x[b, j], in order of b (dprojection as E, f32
/// of bf16, or empty). Parallel over heads. Throws ShapeError, DTypeError.
void slots_backward(Stream& stream, const SlotShape& shape, ConstTensorView projection, ConstTensorView x,
                    ConstTensorView dy, TensorView dx, GradMode mode, TensorView dprojection);

}  // namespace tforge::kernels
