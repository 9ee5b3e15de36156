#pragma once
// What every kernel asks of its operands before it touches memory. `op` and `name` go into the error's text.
#include <cstdint>

#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// Throws DeviceError when this build has no kernels for the stream's device; a rehearsal needs none.
void check_built(const char* op, const Stream& stream);

/// For ops without kernels for other devices: throws DeviceError unless the stream is the CPU's.
inline void check_cpu(const char* op, const Stream& stream) {
  if (stream.device() != Device::cpu) throw DeviceError("{}: has kernels for the CPU only", op);
}

/// Throws DeviceError when this build has no kernels for the stream's device, InternalError when an operand is not in
/// its memory. Operands that are left out may be empty.
template <class... Views>
void check_device(const char* op, const Stream& stream, const Views&... operands) {
  static_assert(sizeof...(operands) > 0, "an op without kernels for devices calls check_cpu");
  check_built(op, stream);
  const auto check = [&](const auto& v) {
    if (v && v.device != stream.device()) {
      throw InternalError("{}: an operand of shape {} is in {} memory, the stream is {}", op, v.shape.text(),
                          name_of(v.device), name_of(stream.device()));
    }
  };
  (check(operands), ...);
}

/// `v` is a matrix [rows, columns] of `dtype`, its rows in order and apart. A view without elements may be null.
/// Throws ShapeError, DTypeError.
inline void check_matrix(const char* op, const char* name, const ConstTensorView& v, DType dtype, std::int64_t rows,
                         std::int64_t columns) {
  if (v.dtype != dtype) {
    throw DTypeError("{}: {} is {}, want {} like the other operands", op, name, name_of(v.dtype), name_of(dtype));
  }
  if (v.rows() != rows || v.columns() != columns) {
    throw ShapeError("{}: {} has shape {}, want [{}, {}]", op, name, v.shape.text(), rows, columns);
  }
  if (v.elements() == 0) return;
  if (v.data == nullptr) throw ShapeError("{}: {} has shape {} but no data", op, name, v.shape.text());
  if (rows > 1 && v.row_stride < columns) {
    throw ShapeError("{}: {} has row stride {}, want at least its {} columns", op, name, v.row_stride, columns);
  }
}

/// `v` is `count` contiguous elements of `dtype`, of whatever rank. Throws ShapeError, DTypeError.
inline void check_vector(const char* op, const char* name, const ConstTensorView& v, DType dtype, std::int64_t count) {
  if (v.dtype != dtype) throw DTypeError("{}: {} is {}, want {}", op, name, name_of(v.dtype), name_of(dtype));
  if (v.elements() != count) {
    throw ShapeError("{}: {} has shape {}, want {} elements", op, name, v.shape.text(), count);
  }
  if (count == 0) return;
  if (v.data == nullptr) throw ShapeError("{}: {} has shape {} but no data", op, name, v.shape.text());
  const bool column = v.columns() == 1 && v.row_stride == 1;
  if (!v.contiguous() && !column) throw ShapeError("{}: {} must be contiguous", op, name);
}

/// `v` is a contiguous scratch tensor of at least `count` elements of `dtype`. Throws ShapeError, DTypeError.
inline void check_workspace(const char* op, const ConstTensorView& v, DType dtype, std::int64_t count) {
  if (count == 0) return;
  if (v.dtype != dtype) throw DTypeError("{}: workspace is {}, want {}", op, name_of(v.dtype), name_of(dtype));
  if (v.data == nullptr || v.elements() < count || !v.contiguous()) {
    throw ShapeError("{}: workspace has shape {}, want {} contiguous elements", op, v.shape.text(), count);
  }
}

}  // namespace tforge::kernels
