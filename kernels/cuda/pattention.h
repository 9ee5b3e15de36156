#pragma once
// CUDA side of kernels/pattention.h; operands are already checked. Products through cuBLASLt, passes over rows between
// them (pattention_rows.h). `floored` may be null.
#include <cstdint>
#include <span>

#include "core/pattention_norm.h"
#include "core/tensor.h"
#include "kernels/pattention.h"

namespace tforge::kernels::cuda {

template <class T>
void pattention_scores_forward(const Stream& stream, PattentionNorm norm, ConstTensorView x, ConstTensorView keys,
                               TensorView scores, TensorView stat);
template <class T>
void pattention_mix_forward(const Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                            ConstTensorView stat, ConstTensorView values, TensorView u, TensorView weight,
                            double* floored, TensorView workspace);
template <class T>
void pattention_forward(const Stream& stream, PattentionNorm norm, ConstTensorView x,
                        std::span<const PattentionForward> layers, double* floored, TensorView workspace);
/// P.
inline std::int64_t pattention_forward_workspace(std::int64_t rows, std::int64_t num_tokens) {
  return rows * num_tokens;
}

template <class T>
void pattention_mix_backward(const Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                             ConstTensorView stat, ConstTensorView values, ConstTensorView du, ConstTensorView dweight,
                             GradMode dvalues_mode, TensorView dvalues, TensorView dscores, TensorView dot,
                             TensorView workspace);
template <class T>
void pattention_scores_backward(const Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                                ConstTensorView stat, ConstTensorView dot, ConstTensorView x, ConstTensorView keys,
                                TensorView dscores, GradMode dx_mode, TensorView dx, GradMode dkeys_mode,
                                TensorView dkeys);
template <class T>
void pattention_backward(const Stream& stream, PattentionNorm norm, ConstTensorView x,
                         std::span<const PattentionBackward> layers, GradMode dx_mode, TensorView dx,
                         TensorView workspace);
/// P, dscores and dot, whose numbers may be twice as wide as an element.
inline std::int64_t pattention_backward_workspace(std::int64_t rows, std::int64_t num_tokens) {
  return rows * (2 * num_tokens + 2);
}

}  // namespace tforge::kernels::cuda
