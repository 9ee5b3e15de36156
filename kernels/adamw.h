#pragma once
// AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) and the reductions of a clipped update.
#include <cstdint>

#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// Rows whose gradient is 0 in every element: updated like the others, or left as they are, value and moments.
enum class IdleRows : std::uint8_t { update, skip };

struct AdamWStep {
  double lr = 0;  // already scheduled
  double beta1 = 0.9;
  double beta2 = 0.95;
  double eps = 1e-8;
  double weight_decay = 0;  // decoupled: p -= lr * weight_decay * p
  double bias1 = 1;         // 1 - beta1^age, age counting this update
  double bias2 = 1;         // 1 - beta2^age
  double grad_scale = 1;    // clip factor, applied to g
  IdleRows idle_rows = IdleRows::update;
  bool operator==(const AdamWStep&) const = default;
};

/// g' = grad_scale g;  m = beta1 m + (1 - beta1) g';  v = beta2 v + (1 - beta2) g'^2;
/// p = p - lr weight_decay p - lr (m / bias1) / (sqrt(v / bias2) + eps).      One pass. All [rows, cols] of one shape,
/// contiguous, f32 or f64. With IdleRows::skip an idle row neither decays nor moves, and its moments wait; bias1 and
/// bias2 count updates of the parameter all the same, so that the first update of a late row is (1 - beta1) /
/// sqrt(1 - beta2) of lr in size instead of 1. Throws ShapeError, DTypeError.
void adamw_update(Stream& stream, const AdamWStep& step, TensorView parameter, ConstTensorView gradient, TensorView m,
                  TensorView v);

/// sum = sum of the squares of x, [1] f64, added in f64 in blocks fixed by shape; independent of threads. A non-finite
/// element gives a non-finite sum. workspace: f64, of at least sum_of_squares_workspace(device of the stream) elements.
/// Throws ShapeError, DTypeError.
void sum_of_squares(Stream& stream, ConstTensorView x, TensorView sum, TensorView workspace);
std::int64_t sum_of_squares_workspace(Device device);

}  // namespace tforge::kernels
