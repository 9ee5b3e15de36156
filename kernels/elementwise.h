#pragma once
// Element-wise helpers. f32 or f64, row strides allowed, operands of one shape and (but for convert) dtype; nothing is
// allocated. Throws ShapeError, DTypeError.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// y = value
void fill(Stream& stream, TensorView y, double value);
/// y {=, +=} x
void add_to(Stream& stream, ConstTensorView x, GradMode mode, TensorView y);
/// y = a + b; y may be a or b
void add(Stream& stream, ConstTensorView a, ConstTensorView b, TensorView y);
/// y = alpha * x; y may be x
void scale(Stream& stream, double alpha, ConstTensorView x, TensorView y);
/// y = x in the dtype of y; one of them is f32, the other bf16. To bf16 it rounds to nearest, ties to even: what is too
/// large becomes infinite, NaN stays NaN. To f32 it is exact.
void convert(Stream& stream, ConstTensorView x, TensorView y);

}  // namespace tforge::kernels
