#pragma once
// CPU kernels behind kernels/gelu.h; operands are already checked.
#include "core/tensor.h"

namespace tforge::kernels::cpu {

template <class T>
void gelu_forward(ConstTensorView x, TensorView y);
template <class T>
void gelu_backward(ConstTensorView x, ConstTensorView dy, GradMode mode, TensorView dx);

}  // namespace tforge::kernels::cpu
