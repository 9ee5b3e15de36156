#pragma once
// CUDA kernels behind kernels/gelu.h; operands are already checked.
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

template <class T>
void gelu_forward(const Stream& stream, Rows<const T> x, Rows<T> y);
template <class T>
void gelu_backward(const Stream& stream, Rows<const T> x, Rows<const T> dy, GradMode mode, Rows<T> dx);

}  // namespace tforge::kernels::cuda
