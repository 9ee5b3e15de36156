#pragma once
// Row-wise cross entropy over logits whose columns may be a shard of the vocabulary.
//
//   nll[t] = log(sum_v exp(z[t, v])) - z[t, target[t]]
//
// What a row needs of the other shards are columns [R, 1] that the caller reduces: `row_max` (max), then `row_sum`,
// rescaled to the largest of all shards, and `target_logit` (sum). Targets < 0 are ignored: nll 0, gradient 0.
// Logits and columns are f32 or f64 alike, with any row strides; sums of more than 1024 terms are in f64. A NaN or an
// infinite logit makes its row's nll and gradient non-finite. Throws ShapeError, DTypeError.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// row_max[r] = max_v z[r, v] (-inf without columns);  row_sum[r] = sum_v exp(z[r, v] - row_max[r]) (0 without);
/// target_logit[r] = z[r, target] if the target's column (target - first_column) is held here, else 0. The logits are
/// read once. logits [R, V here], targets [R] i32.
void cross_entropy_row_statistics(Stream& stream, ConstTensorView logits, ConstTensorView targets,
                                  std::int64_t first_column, TensorView row_max, TensorView row_sum,
                                  TensorView target_logit);

/// row_sum[r] *= exp(own_max[r] - row_max[r]): a shard's sum, taken with its own maximum, relative to that of all.
void cross_entropy_rescale(Stream& stream, ConstTensorView own_max, ConstTensorView row_max, TensorView row_sum);

/// nll[r] = log(row_sum) + row_max - target_logit in f64 (0 for an ignored row). nll [R] f64.
void cross_entropy_nll(Stream& stream, ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView target_logit,
                       ConstTensorView targets, TensorView nll);

/// dlogits[r, v] = weight * (exp(z[r, v] - row_max) / row_sum - [v == target]), 0 for an ignored row. dlogits may be
/// `logits`, and on a CUDA device bf16 beside f32.
void cross_entropy_backward(Stream& stream, ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView targets,
                            std::int64_t first_column, double weight, ConstTensorView logits, TensorView dlogits);

}  // namespace tforge::kernels
