#pragma once
// CPU kernels behind kernels/attention.h; operands are already checked.
#include "core/tensor.h"
#include "kernels/attention.h"

namespace tforge::kernels::cpu {

template <class T>
void causal_attention_forward(const AttentionShape& shape, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                              TensorView out, TensorView lse, TensorView workspace);
template <class T>
void causal_attention_backward(const AttentionShape& shape, ConstTensorView q, ConstTensorView k, ConstTensorView v,
                               ConstTensorView out, ConstTensorView lse, ConstTensorView dout, TensorView dq,
                               TensorView dk, TensorView dv, TensorView workspace);
/// Elements that one thread needs, for either direction.
std::int64_t attention_workspace_per_thread(const AttentionShape& shape, std::int64_t head_dim);

}  // namespace tforge::kernels::cpu
