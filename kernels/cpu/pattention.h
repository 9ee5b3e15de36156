#pragma once
// CPU kernels behind kernels/pattention.h; operands are already checked.
#include <span>

#include "core/pattention_norm.h"
#include "core/tensor.h"
#include "kernels/pattention.h"

namespace tforge::kernels::cpu {

template <class T>
void pattention_scores_forward(PattentionNorm norm, ConstTensorView x, ConstTensorView keys, TensorView scores,
                               TensorView stat, TensorView workspace);
template <class T>
std::int64_t pattention_mix_forward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat,
                                    ConstTensorView values, TensorView u, TensorView weight, TensorView workspace);
template <class T>
std::int64_t pattention_forward(PattentionNorm norm, ConstTensorView x, std::span<const PattentionForward> layers,
                                TensorView workspace);
std::int64_t pattention_forward_workspace(std::int64_t rows, std::int64_t num_tokens, std::int64_t d_in,
                                          std::int64_t d_out);

template <class T>
void pattention_mix_backward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat,
                             ConstTensorView values, ConstTensorView du, ConstTensorView dweight, GradMode dvalues_mode,
                             TensorView dvalues, TensorView dscores, TensorView dot, TensorView workspace);
template <class T>
void pattention_scores_backward(PattentionNorm norm, double scale, ConstTensorView scores, ConstTensorView stat,
                                ConstTensorView dot, ConstTensorView x, ConstTensorView keys, TensorView dscores,
                                GradMode dx_mode, TensorView dx, GradMode dkeys_mode, TensorView dkeys,
                                TensorView workspace);
template <class T>
void pattention_backward(PattentionNorm norm, ConstTensorView x, std::span<const PattentionBackward> layers,
                         GradMode dx_mode, TensorView dx, TensorView workspace);
std::int64_t pattention_backward_workspace(std::int64_t rows, std::int64_t num_tokens, std::int64_t d_in,
                                           std::int64_t d_out);

template <class T>
std::int64_t row_normalize_forward(PattentionNorm norm, double scale, ConstTensorView u, ConstTensorView weight,
                                   TensorView y);
template <class T>
void row_normalize_backward(PattentionNorm norm, double scale, ConstTensorView u, ConstTensorView weight,
                            ConstTensorView dy, TensorView du, TensorView dweight);

}  // namespace tforge::kernels::cpu
