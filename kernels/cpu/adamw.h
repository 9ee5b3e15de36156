#pragma once
// CPU kernels behind kernels/adamw.h; operands are already checked.
#include "core/tensor.h"
#include "kernels/adamw.h"

namespace tforge::kernels::cpu {

template <class T>
void adamw_update(const AdamWStep& step, TensorView parameter, ConstTensorView gradient, TensorView m, TensorView v);
template <class T>
double sum_of_squares(ConstTensorView x);

}  // namespace tforge::kernels::cpu
