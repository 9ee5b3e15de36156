#pragma once
// CPU kernels behind kernels/elementwise.h; operands are already checked.
#include <span>

#include "core/tensor.h"

namespace tforge::kernels::cpu {

template <class T>
void fill(TensorView y, T value);
template <class T>
void add_to(ConstTensorView x, GradMode mode, TensorView y);
template <class T>
void add(ConstTensorView a, ConstTensorView b, TensorView y);
template <class T>
void add_in_order(std::span<const ConstTensorView> parts, TensorView y);
template <class T>
void max_in_order(std::span<const ConstTensorView> parts, TensorView y);
template <class T>
void add_row(ConstTensorView row, TensorView y);
template <class T>
void column_sums(ConstTensorView x, GradMode mode, TensorView y);
template <class T>
void scale(T alpha, ConstTensorView x, TensorView y);
template <class T>
void sum_to(ConstTensorView x, GradMode mode, TensorView sum);
void to_bf16(ConstTensorView x, TensorView y);
void from_bf16(ConstTensorView x, TensorView y);

}  // namespace tforge::kernels::cpu
