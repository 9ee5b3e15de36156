#pragma once
// Copies between views wherever they live.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge {

/// to = from, of one number of rows and columns and one dtype; rows may have strides. Queued on `stream`, which belongs
/// to the device that either of them lives on. A copy into host memory is complete on return. One out of pinned host
/// memory is not: that memory must stay as it is until the queue has got there. In a rehearsal nothing is copied.
/// Throws ShapeError, DTypeError, InternalError for a view that the stream cannot reach.
void copy(const Stream& stream, ConstTensorView from, TensorView to);

/// The number of a tensor of one f64. Waits for the device.
double number_of(const Stream& stream, const Tensor& number);

}  // namespace tforge
