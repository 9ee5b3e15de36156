#pragma once
// CUDA kernels behind kernels/rms_norm.h; operands are already checked.
#include "core/bf16.h"
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

template <class T>
void rms_norm_forward(const Stream& stream, Rows<const T> x, const Compute<T>* weight, double eps, Rows<T> y,
                      Rows<Compute<T>> rrms);
template <class T>
void rms_norm_input_gradient(const Stream& stream, Rows<const T> x, const Compute<T>* weight,
                             Rows<const Compute<T>> rrms, Rows<const T> dy, GradMode mode, Rows<T> dx);
template <class T>
void rms_norm_weight_gradient(const Stream& stream, Rows<const T> x, Rows<const Compute<T>> rrms, Rows<const T> dy,
                              GradMode mode, Compute<T>* dweight);

}  // namespace tforge::kernels::cuda
