#pragma once
// CUDA kernels behind kernels/layer_norm.h; operands are already checked.
#include "core/bf16.h"
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

template <class T>
void layer_norm_forward(const Stream& stream, Rows<const T> x, const Compute<T>* weight, const Compute<T>* bias,
                        double eps, Rows<T> y, Rows<Compute<T>> mean, Rows<Compute<T>> rstd);
template <class T>
void layer_norm_parameter_gradients(const Stream& stream, Rows<const T> x, Rows<const Compute<T>> mean,
                                    Rows<const Compute<T>> rstd, Rows<const T> dy, GradMode mode, Compute<T>* dweight,
                                    Compute<T>* dbias);
template <class T>
void layer_norm_input_gradient(const Stream& stream, Rows<const T> x, const Compute<T>* weight,
                               Rows<const Compute<T>> mean, Rows<const Compute<T>> rstd, Rows<const T> dy,
                               GradMode mode, Rows<T> dx);

}  // namespace tforge::kernels::cuda
