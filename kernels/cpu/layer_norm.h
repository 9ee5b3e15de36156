#pragma once
// CPU kernels behind kernels/layer_norm.h; operands are already checked.
#include "core/tensor.h"

namespace tforge::kernels::cpu {

template <class T>
void layer_norm_forward(ConstTensorView x, ConstTensorView weight, ConstTensorView bias, double eps, TensorView y,
                        TensorView mean, TensorView rstd);
template <class T>
void layer_norm_parameter_gradients(ConstTensorView x, ConstTensorView mean, ConstTensorView rstd, ConstTensorView dy,
                                    GradMode mode, TensorView dweight, TensorView dbias);
template <class T>
void layer_norm_input_gradient(ConstTensorView x, ConstTensorView weight, ConstTensorView mean, ConstTensorView rstd,
                               ConstTensorView dy, GradMode mode, TensorView dx);

}  // namespace tforge::kernels::cpu
