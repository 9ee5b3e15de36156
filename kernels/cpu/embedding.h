#pragma once
// CPU kernels behind kernels/embedding.h; operands are already checked.
#include "core/tensor.h"

namespace tforge::kernels::cpu {

template <class T>
void embedding_forward(ConstTensorView tokens, ConstTensorView table, std::int64_t first_row, TensorView y);
template <class T>
void embedding_backward(ConstTensorView tokens, ConstTensorView dy, std::int64_t first_row, GradMode mode,
                        TensorView dtable, TensorView workspace);

}  // namespace tforge::kernels::cpu
