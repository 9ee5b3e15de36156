#pragma once
// CPU kernels behind kernels/cross_entropy.h; operands are already checked.
#include "core/tensor.h"

namespace tforge::kernels::cpu {

template <class T>
void cross_entropy_row_statistics(ConstTensorView logits, ConstTensorView targets, std::int64_t first_column,
                                  TensorView row_max, TensorView row_sum, TensorView target_logit);
template <class T>
void cross_entropy_rescale(ConstTensorView own_max, ConstTensorView row_max, TensorView row_sum);
template <class T>
void cross_entropy_nll(ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView target_logit,
                       ConstTensorView targets, TensorView nll);
template <class T>
void cross_entropy_backward(ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView targets,
                            std::int64_t first_column, double weight, ConstTensorView logits, TensorView dlogits);

}  // namespace tforge::kernels::cpu
