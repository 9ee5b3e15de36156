#pragma once
// CUDA kernels behind kernels/cross_entropy.h; operands are already checked.
#include <cstdint>

#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

template <class T>
void cross_entropy_row_statistics(const Stream& stream, Rows<const T> logits, const std::int32_t* targets,
                                  std::int64_t first_column, Rows<T> row_max, Rows<T> row_sum, Rows<T> target_logit);
template <class T>
void cross_entropy_rescale(const Stream& stream, Rows<const T> own_max, Rows<const T> row_max, Rows<T> row_sum);
template <class T>
void cross_entropy_nll(const Stream& stream, Rows<const T> row_max, Rows<const T> row_sum, Rows<const T> target_logit,
                       const std::int32_t* targets, std::int64_t count, double* nll);
/// Out: T, or bf16 beside f32.
template <class T, class Out>
void cross_entropy_backward(const Stream& stream, Rows<const T> row_max, Rows<const T> row_sum,
                            const std::int32_t* targets, std::int64_t first_column, double weight, Rows<const T> logits,
                            Rows<Out> dlogits);

}  // namespace tforge::kernels::cuda
