#pragma once
// RMSNorm (Zhang and Sennrich, arXiv 1910.07467) over the last axis, with a weight and no mean, as GPT-NeoX computes
// it: epsilon is added to the root.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// y = x * rrms * weight,  rrms = 1 / (sqrt(mean_d(x^2)) + eps).
/// x, y [T, d]; weight [d]; rrms [T, 1] is saved for backward (may be an empty view in inference), and x. Row strides
/// are allowed; y may be x. f32 or f64, sums in the same; on a CUDA device x, y and their gradients may be bf16, with
/// all else in f32. Throws ShapeError, DTypeError.
void rms_norm_forward(Stream& stream, ConstTensorView x, ConstTensorView weight, double eps, TensorView y,
                      TensorView rrms);

/// dx {=, +=} rrms (g - x rrms mean_d(g x) / rms), g = dy * weight (the second term is 0 for a row of zeros);
/// dweight {=, +=} sum_T dy x rrms, in blocks of rows fixed by shape, in order. An empty dx or dweight skips it; dx may
/// be dy. Throws ShapeError, DTypeError.
void rms_norm_backward(Stream& stream, ConstTensorView x, ConstTensorView weight, ConstTensorView rrms,
                       ConstTensorView dy, GradMode dx_mode, TensorView dx, GradMode dweight_mode, TensorView dweight);

}  // namespace tforge::kernels
