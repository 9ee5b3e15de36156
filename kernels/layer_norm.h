#pragma once
// LayerNorm (Ba et al., arXiv 1607.06450) with or without parameters, over the last axis.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// y = (x - mean) * rstd [* weight + bias],  rstd = 1 / sqrt(var + eps), var biased.
/// x, y [T, d]; weight, bias [d] or empty (both or none); mean, rstd [T, 1] are saved for backward (may be empty views
/// in inference), and x. Any of them may have row strides; y may be x. f32 or f64, sums in the same; on a CUDA device
/// x, y and their gradients may be bf16, with all else in f32. Throws ShapeError, DTypeError.
void layer_norm_forward(Stream& stream, ConstTensorView x, ConstTensorView weight, ConstTensorView bias, double eps,
                        TensorView y, TensorView mean, TensorView rstd);

/// dx {=, +=} rstd (g - mean_d(g) - xhat mean_d(g xhat)), g = dy [* weight], xhat = (x - mean) rstd.
/// dweight {=, +=} sum_T dy xhat,  dbias {=, +=} sum_T dy  (views empty without parameters), summed in blocks of rows
/// fixed by shape, in order. An empty dx skips it; dx may be dy. An empty mean says that x holds xhat itself, which is
/// y where there are no parameters: the same bits, and x need not be kept. Throws ShapeError, DTypeError.
void layer_norm_backward(Stream& stream, ConstTensorView x, ConstTensorView weight, ConstTensorView mean,
                         ConstTensorView rstd, ConstTensorView dy, GradMode dx_mode, TensorView dx,
                         GradMode parameter_mode, TensorView dweight, TensorView dbias);

}  // namespace tforge::kernels
