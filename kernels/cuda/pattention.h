#pragma once
// CUDA side of kernels/pattention.h; operands are already checked. Products through cuBLASLt, passes over rows between
// them (pattention_rows.h). `floored` may be null. In bf16 the scores and their statistic may come from one kernel
// instead (pattention_scores.h), where the stream's choices say so: it is measured beside the two where they measure.
#include <algorithm>
#include <cstdint>
#include <span>

#include "core/pattention_norm.h"
#include "core/tensor.h"
#include "kernels/pattention.h"

namespace tforge::kernels::cuda {

template <class T>
void pattention_scores_forward(const Stream& stream, PattentionNorm norm, ConstTensorView x, ConstTensorView keys,
                               TensorView scores, TensorView stat, TensorView workspace);
template <class T>
void pattention_mix_forward(const Stream& stream, PattentionNorm norm, double scale, ConstTensorView scores,
                            ConstTensorView stat, ConstTensorView values, TensorView u, TensorView weight,
                            double* floored, TensorView workspace);
template <class T>
void pattention_forward(const Stream& stream, PattentionNorm norm, ConstTensorView x,
                        std::span<const PattentionForward> layers, double* floored, TensorView workspace);
/// P, and before it what pattention_scores_fused() leaves of each row, which is never longer.
inline std::int64_t pattention_forward_workspace(std::int64_t rows, std::int64_t num_tokens) {
  return rows * std::max<std::int64_t>(num_tokens, 2);
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
/// P and dscores.
inline std::int64_t pattention_backward_workspace(std::int64_t rows, std::int64_t num_tokens) {
  return 2 * rows * num_tokens;
}

}  // namespace tforge::kernels::cuda
