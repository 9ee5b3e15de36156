#include "core/copy.h"

#include <cstring>

#include "core/cuda/runtime.h"
#include "core/cuda_built.h"

namespace tforge {

void copy(const Stream& stream, ConstTensorView from, TensorView to) {
  if (from.dtype != to.dtype) throw DTypeError("copy: from {} to {}", name_of(from.dtype), name_of(to.dtype));
  if (from.rows() != to.rows() || from.columns() != to.columns()) {
    throw ShapeError("copy: from shape {} to {}", from.shape.text(), to.shape.text());
  }
  if (from.elements() == 0) return;
  for (const Device device : {from.device, to.device}) {
    if (device != Device::cpu && device != stream.device()) {
      throw InternalError("copy: from {} to {} on a stream of {}", name_of(from.device), name_of(to.device),
                          name_of(stream.device()));
    }
  }
  if (stream.rehearses()) return;
  const std::size_t size = size_of(from.dtype);
  const auto bytes = [size](std::int64_t elements) { return static_cast<std::size_t>(elements) * size; };
  const std::size_t row_bytes = bytes(from.columns());
  const auto rows = static_cast<std::size_t>(from.rows());
  if constexpr (kCudaBuilt) {
    if (from.device == Device::cuda || to.device == Device::cuda) {
      cuda::copy(stream, from.data, bytes(from.row_stride), to.data, bytes(to.row_stride), row_bytes, rows);
      // Whether ordinary host memory has been read by now, CUDA leaves open.
      const bool may_be_unread = from.device == Device::cpu && !cuda::is_pinned(from.data);
      if (to.device == Device::cpu || may_be_unread) cuda::wait(stream);
      return;
    }
  }
  if (from.contiguous() && to.contiguous()) {
    std::memmove(to.data, from.data, row_bytes * rows);
    return;
  }
  for (std::int64_t r = 0; r < from.rows(); ++r) {
    std::memmove(to.row_range(r, 1).data, from.row_range(r, 1).data, row_bytes);
  }
}

double number_of(const Stream& stream, const Tensor& number) {
  double value = 0;
  copy(stream, number.view(), {&value, DType::f64, Device::cpu, number.shape(), number.shape().columns()});
  return value;
}

}  // namespace tforge
