#pragma once
// CPU kernels behind kernels/slots.h; operands are already checked.
#include "core/tensor.h"
#include "kernels/slots.h"

namespace tforge::kernels::cpu {

template <class T>
void slots_forward(const SlotShape& shape, ConstTensorView projection, ConstTensorView x, TensorView y);
template <class T>
void slots_backward(const SlotShape& shape, ConstTensorView projection, ConstTensorView x, ConstTensorView dy,
                    TensorView dx, GradMode mode, TensorView dprojection);

}  // namespace tforge::kernels::cpu
