#pragma once
// CUDA kernels behind kernels/attention.h; operands are already checked.
#include <cstdint>

#include "core/bf16.h"
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

/// Widest head of the kernels.
inline constexpr std::int64_t kMostHeadDim = 128;

/// AttentionShape, with the width of a head.
struct Heads {
  std::int64_t batch, heads, q_seq, kv_seq, kv_stride, head_dim;
};

/// lse may be null.
template <class T>
void causal_attention_forward(const Stream& stream, const Heads& shape, Rows<const T> q, Rows<const T> k,
                              Rows<const T> v, Rows<T> out, Compute<T>* lse);
/// dots: [batch * q_seq, heads], scratch.
template <class T>
void causal_attention_backward(const Stream& stream, const Heads& shape, Rows<const T> q, Rows<const T> k,
                               Rows<const T> v, Rows<const T> out, const Compute<T>* lse, Rows<const T> dout,
                               Rows<T> dq, Rows<T> dk, Rows<T> dv, Compute<T>* dots);

/// Over tensor cores.
template <>
void causal_attention_forward<bf16>(const Stream& stream, const Heads& shape, Rows<const bf16> q, Rows<const bf16> k,
                                    Rows<const bf16> v, Rows<bf16> out, float* lse);
template <>
void causal_attention_backward<bf16>(const Stream& stream, const Heads& shape, Rows<const bf16> q, Rows<const bf16> k,
                                     Rows<const bf16> v, Rows<const bf16> out, const float* lse, Rows<const bf16> dout,
                                     Rows<bf16> dq, Rows<bf16> dk, Rows<bf16> dv, float* dots);

}  // namespace tforge::kernels::cuda
