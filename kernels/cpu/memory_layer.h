#pragma once
// CPU kernels behind kernels/memory_layer.h; operands are already checked.
#include <span>

#include "core/tensor.h"
#include "kernels/memory_layer.h"

namespace tforge::kernels::cpu {

template <class T>
void memory_hash_forward(const MemoryHash& hash, ConstTensorView x, TensorView codes, TensorView weights);
template <class T>
void memory_lookup_forward(std::int64_t bits, ConstTensorView codes, ConstTensorView weights,
                           std::span<const MemoryForward> layers);
template <class T>
void memory_lookup_backward(std::int64_t bits, ConstTensorView codes, ConstTensorView weights,
                            std::span<const MemoryBackward> layers, TensorView dweights, TensorView order);
std::int64_t memory_lookup_workspace(std::int64_t rows, std::int64_t bits);
template <class T>
void memory_hash_backward(const MemoryHash& hash, ConstTensorView x, ConstTensorView dweights, GradMode mode,
                          TensorView dx);

}  // namespace tforge::kernels::cpu
