#pragma once
// Row-wise cross entropy over logits whose columns may be a shard of the vocabulary.
//
//   nll[t] = log(sum_v exp(z[t, v])) - z[t, target[t]]
//
// The numbers a row needs of the other shards are columns [R, 1] that the caller reduces: `row_max` (max), then
// `row_sum` and `target_logit` (sum). Targets < 0 are ignored: nll 0, gradient 0.
// Logits and columns are f32 or f64 alike, with any row strides; sums of more than 1024 terms are in f64. A NaN or an
// infinite logit makes its row's nll and gradient non-finite. Throws ShapeError, DTypeError.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// row_max[r] = max_v z[r, v] (-inf without columns). logits [R, V here], f32 or f64.
void cross_entropy_row_max(Stream& stream, ConstTensorView logits, TensorView row_max);

/// row_sum[r] = sum_v exp(z[r, v] - row_max[r]);  target_logit[r] = z[r, target] - row_max[r] if the target's column
/// (target - first_column) is held here, else 0. targets [R] i32.
void cross_entropy_row_sum(Stream& stream, ConstTensorView logits, ConstTensorView row_max, ConstTensorView targets,
                           std::int64_t first_column, TensorView row_sum, TensorView target_logit);

/// nll[r] = log(row_sum) - target_logit in f64 (0 for an ignored row). nll [R] f64.
void cross_entropy_nll(Stream& stream, ConstTensorView row_sum, ConstTensorView target_logit, ConstTensorView targets,
                       TensorView nll);

/// In place: z[r, v] becomes weight * (exp(z - row_max) / row_sum - [v == target]), 0 for an ignored row.
void cross_entropy_backward(Stream& stream, ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView targets,
                            std::int64_t first_column, double weight, TensorView logits);

}  // namespace tforge::kernels
