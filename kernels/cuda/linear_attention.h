#pragma once
// CUDA kernels behind kernels/linear_attention.h; operands are already checked.
#include <cstdint>

#include "core/bf16.h"
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

enum class FeatureKind : std::uint8_t { random_exponential, relu_cosine };

/// LinearShape and FeatureMap, of numbers C. `chunk` is kLinearChunk.
template <class C>
struct LinearHeads {
  std::int64_t batch, heads, seq, first;
  int head_dim, features, chunk;
  FeatureKind kind;
  Rows<const C> table;
};

/// den and state may be null; `state_size` elements of state are those of one head of one sequence.
template <class T>
void linear_attention_forward(const Stream& stream, const LinearHeads<Compute<T>>& shape, Rows<const T> q,
                              Rows<const T> k, Rows<const T> v, Rows<T> out, Compute<T>* den, Compute<T>* state,
                              std::int64_t state_size, Compute<T>* workspace);
template <class T>
void linear_attention_backward(const Stream& stream, const LinearHeads<Compute<T>>& shape, Rows<const T> q,
                               Rows<const T> k, Rows<const T> v, Rows<const T> out, const Compute<T>* den,
                               Rows<const T> dout, Rows<T> dq, Rows<T> dk, Rows<T> dv, Compute<T>* workspace);

/// Elements for one head of one sequence.
constexpr std::int64_t linear_forward_workspace(std::int64_t head_dim, std::int64_t features, std::int64_t chunk) {
  return features * head_dim + features + chunk * (2 * features + head_dim);
}
constexpr std::int64_t linear_backward_workspace(std::int64_t head_dim, std::int64_t features, std::int64_t chunk) {
  return 2 * (features * head_dim + features + chunk * (3 * features + head_dim));
}

}  // namespace tforge::kernels::cuda
