#pragma once
// CPU kernels behind kernels/linear_attention.h; operands are already checked.
#include "core/tensor.h"
#include "kernels/linear_attention.h"

namespace tforge::kernels::cpu {

template <class T>
void orthogonal_features(std::uint64_t seed, std::string_view name, std::int64_t count, TensorView table);
template <class T>
void cosine_features(TensorView table);
template <class T>
void linear_attention_forward(const LinearShape& shape, const FeatureMap& features, ConstTensorView q,
                              ConstTensorView k, ConstTensorView v, TensorView out, TensorView den, TensorView state,
                              TensorView workspace);
template <class T>
void linear_attention_backward(const LinearShape& shape, const FeatureMap& features, ConstTensorView q,
                               ConstTensorView k, ConstTensorView v, ConstTensorView out, ConstTensorView den,
                               ConstTensorView dout, TensorView dq, TensorView dk, TensorView dv, TensorView workspace);
std::int64_t linear_attention_state(std::int64_t head_dim, std::int64_t features);
/// Elements that one thread needs.
std::int64_t linear_attention_workspace_per_thread(const LinearShape& shape, std::int64_t head_dim,
                                                   std::int64_t features, LinearPass pass);

}  // namespace tforge::kernels::cpu
