#pragma once
// CUDA kernels behind kernels/slots.h; operands are already checked.
#include <cstdint>

#include "core/bf16.h"
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

/// SlotShape, with the width of a head.
struct SlotHeads {
  std::int64_t batch, heads, block, slots, x_stride, y_stride, head_dim;
};

template <class T>
void slots_forward(const Stream& stream, const SlotHeads& shape, Rows<const T> projection, Rows<const T> x, Rows<T> y);
/// dprojection may be null.
template <class T>
void slots_backward(const Stream& stream, const SlotHeads& shape, Rows<const T> projection, Rows<const T> x,
                    Rows<const T> dy, Rows<T> dx, GradMode mode, Rows<Compute<T>> dprojection);

}  // namespace tforge::kernels::cuda
