#pragma once
// CPU kernels behind kernels/rotary.h; operands are already checked.
#include "core/tensor.h"
#include "kernels/rotary.h"

namespace tforge::kernels::cpu {

template <class T>
void rotary_tables(double base, TensorView cosine, TensorView sine);
template <class T>
void rotary_apply(RotaryDirection direction, ConstTensorView cosine, ConstTensorView sine, std::int64_t heads,
                  std::int64_t seq, std::int64_t first_position, TensorView x);

}  // namespace tforge::kernels::cpu
