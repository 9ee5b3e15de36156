#pragma once
// CUDA kernels behind kernels/cross_entropy.h; operands are already checked.
#include <cstdint>

#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

template <class T>
void cross_entropy_row_max(const Stream& stream, Rows<const T> logits, Rows<T> row_max);
template <class T>
void cross_entropy_row_sum(const Stream& stream, Rows<const T> logits, Rows<const T> row_max,
                           const std::int32_t* targets, std::int64_t first_column, Rows<T> row_sum,
                           Rows<T> target_logit);
template <class T>
void cross_entropy_nll(const Stream& stream, Rows<const T> row_sum, Rows<const T> target_logit,
                       const std::int32_t* targets, std::int64_t count, double* nll);
template <class T>
void cross_entropy_backward(const Stream& stream, Rows<const T> row_max, Rows<const T> row_sum,
                            const std::int32_t* targets, std::int64_t first_column, double weight, Rows<T> logits);

}  // namespace tforge::kernels::cuda
