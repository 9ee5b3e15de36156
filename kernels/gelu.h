#pragma once
// GELU, exact erf form: y = x Phi(x), Phi the standard normal distribution function.
// f32 is a vectorised polynomial (|error of Phi| < 2e-7); f64 uses the C library's erf.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// Shapes alike, f32 or f64, on a CUDA device also bf16; y may be x. Throws ShapeError, DTypeError.
void gelu_forward(Stream& stream, ConstTensorView x, TensorView y);
/// dx {=, +=} dy (Phi(x) + x phi(x)). Needs x. dx may be dy when mode is overwrite.
void gelu_backward(Stream& stream, ConstTensorView x, ConstTensorView dy, GradMode mode, TensorView dx);

}  // namespace tforge::kernels
