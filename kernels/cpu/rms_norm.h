#pragma once
// CPU kernels behind kernels/rms_norm.h; operands are already checked.
#include "core/tensor.h"

namespace tforge::kernels::cpu {

template <class T>
void rms_norm_forward(ConstTensorView x, ConstTensorView weight, double eps, TensorView y, TensorView rrms);
template <class T>
void rms_norm_input_gradient(ConstTensorView x, ConstTensorView weight, ConstTensorView rrms, ConstTensorView dy,
                             GradMode mode, TensorView dx);
template <class T>
void rms_norm_weight_gradient(ConstTensorView x, ConstTensorView rrms, ConstTensorView dy, GradMode mode,
                              TensorView dweight);

}  // namespace tforge::kernels::cpu
