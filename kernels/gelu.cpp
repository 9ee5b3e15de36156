#include "kernels/gelu.h"

#include "kernels/check.h"
#include "kernels/cpu/gelu.h"
#include "kernels/cuda/gelu.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {

void gelu_forward(Stream& stream, ConstTensorView x, TensorView y) {
  const char* op = "gelu_forward";
  check_device(op, stream, x, y);
  check_matrix(op, "x", x, x.dtype, x.rows(), x.columns());
  check_matrix(op, "y", y, x.dtype, x.rows(), x.columns());
  const ProfileScope scope(stream, op, {25.0 * static_cast<double>(x.elements()), bytes_of(x, y)});
  with_stored_type(op, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::gelu_forward<T>(x, y); }, [&](auto) { cuda::gelu_forward<T>(stream, x, y); });
  });
}

void gelu_backward(Stream& stream, ConstTensorView x, ConstTensorView dy, GradMode mode, TensorView dx) {
  const char* op = "gelu_backward";
  check_device(op, stream, x, dy, dx);
  check_matrix(op, "x", x, x.dtype, x.rows(), x.columns());
  check_matrix(op, "dy", dy, x.dtype, x.rows(), x.columns());
  check_matrix(op, "dx", dx, x.dtype, x.rows(), x.columns());
  const ProfileScope scope(stream, op,
                           {30.0 * static_cast<double>(x.elements()), bytes_of(x, dy) + bytes_written(mode, dx)});
  with_stored_type(op, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::gelu_backward<T>(x, dy, mode, dx); },
        [&](auto) { cuda::gelu_backward<T>(stream, x, dy, mode, dx); });
  });
}

}  // namespace tforge::kernels
