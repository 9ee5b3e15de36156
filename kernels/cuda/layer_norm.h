#pragma once
// CUDA kernels behind kernels/layer_norm.h; operands are already checked.
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

template <class T>
void layer_norm_forward(const Stream& stream, Rows<const T> x, const T* weight, const T* bias, double eps, Rows<T> y,
                        Rows<T> mean, Rows<T> rstd);
template <class T>
void layer_norm_parameter_gradients(const Stream& stream, Rows<const T> x, Rows<const T> mean, Rows<const T> rstd,
                                    Rows<const T> dy, GradMode mode, T* dweight, T* dbias);
template <class T>
void layer_norm_input_gradient(const Stream& stream, Rows<const T> x, const T* weight, Rows<const T> mean,
                               Rows<const T> rstd, Rows<const T> dy, GradMode mode, Rows<T> dx);

}  // namespace tforge::kernels::cuda
