#pragma once
// Element-wise helpers. f32 or f64, row strides allowed, operands of one shape and (but for convert) dtype; nothing is
// allocated. On a CUDA device add, add_to, add_row, scale and column_sums take bf16 too; the row and the sums are then
// f32. Throws ShapeError, DTypeError.
#include <span>

#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// y = value
void fill(Stream& stream, TensorView y, double value);
/// y {=, +=} x
void add_to(Stream& stream, ConstTensorView x, GradMode mode, TensorView y);
/// y = a + b; y may be a or b
void add(Stream& stream, ConstTensorView a, ConstTensorView b, TensorView y);
/// y = ((x_0 + x_1) + x_2) + ..., element by element, of one or more parts; all contiguous, y may be one of them.
void add_in_order(Stream& stream, std::span<const ConstTensorView> parts, TensorView y);
/// y = max over the parts, likewise; a NaN among them gives NaN.
void max_in_order(Stream& stream, std::span<const ConstTensorView> parts, TensorView y);
/// y[t, :] += row, a vector of y.columns() elements
void add_row(Stream& stream, ConstTensorView row, TensorView y);
/// y {=, +=} the sum of the rows of x, in blocks of rows fixed by shape, in order; y has x.columns() elements.
void column_sums(Stream& stream, ConstTensorView x, GradMode mode, TensorView y);
/// y = alpha * x; y may be x
void scale(Stream& stream, double alpha, ConstTensorView x, TensorView y);
/// sum {=, +=} x_0 + x_1 + ...: one number, of contiguous x. In order on the CPU, in a fixed order on a device.
void sum_to(Stream& stream, ConstTensorView x, GradMode mode, TensorView sum);
/// y = x in the dtype of y; one of them is f32, the other bf16. To bf16 it rounds to nearest, ties to even: what is too
/// large becomes infinite, NaN stays NaN. To f32 it is exact.
void convert(Stream& stream, ConstTensorView x, TensorView y);

}  // namespace tforge::kernels
