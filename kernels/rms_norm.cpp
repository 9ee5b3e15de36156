#include "kernels/rms_norm.h"

#include "kernels/check.h"
#include "kernels/cpu/rms_norm.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {

void rms_norm_forward(Stream& stream, ConstTensorView x, ConstTensorView weight, double eps, TensorView y,
                      TensorView rrms) {
  constexpr const char* kOp = "rms_norm_forward";
  check_device(kOp, stream, x, weight, y, rrms);
  check_matrix(kOp, "x", x, x.dtype, x.rows(), x.columns());
  check_matrix(kOp, "y", y, x.dtype, x.rows(), x.columns());
  check_vector(kOp, "weight", weight, compute_dtype(x.dtype), x.columns());
  if (rrms) check_matrix(kOp, "rrms", rrms, compute_dtype(x.dtype), x.rows(), 1);
  const ProfileScope scope(stream, kOp, {4.0 * static_cast<double>(x.elements()), bytes_of(x, y)});
  with_stored_type(kOp, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::rms_norm_forward<T>(x, weight, eps, y, rrms); },
        [&](auto) { cuda::rms_norm_forward<T>(stream, x, weight.as<Compute<T>>(), eps, y, rrms); });
  });
}

void rms_norm_backward(Stream& stream, ConstTensorView x, ConstTensorView weight, ConstTensorView rrms,
                       ConstTensorView dy, GradMode dx_mode, TensorView dx, GradMode dweight_mode, TensorView dweight) {
  constexpr const char* kOp = "rms_norm_backward";
  check_device(kOp, stream, x, weight, rrms, dy, dx, dweight);
  check_matrix(kOp, "x", x, x.dtype, x.rows(), x.columns());
  check_matrix(kOp, "dy", dy, x.dtype, x.rows(), x.columns());
  check_matrix(kOp, "rrms", rrms, compute_dtype(x.dtype), x.rows(), 1);
  check_vector(kOp, "weight", weight, compute_dtype(x.dtype), x.columns());
  if (dx) check_matrix(kOp, "dx", dx, x.dtype, x.rows(), x.columns());
  if (dweight) check_vector(kOp, "dweight", dweight, compute_dtype(x.dtype), x.columns());
  const ProfileScope scope(
      stream, kOp, {12.0 * static_cast<double>(x.elements()), 2 * bytes_of(x, dy) + bytes_written(dx_mode, dx)});
  with_stored_type(kOp, stream, x.dtype, [&](auto t) {
    using T = decltype(t);
    // The weight's gradient first: dx may be dy.
    on_device<T>(
        stream,
        [&](auto) {
          if (dweight) cpu::rms_norm_weight_gradient<T>(x, rrms, dy, dweight_mode, dweight);
          if (dx) cpu::rms_norm_input_gradient<T>(x, weight, rrms, dy, dx_mode, dx);
        },
        [&](auto) {
          if (dweight) cuda::rms_norm_weight_gradient<T>(stream, x, rrms, dy, dweight_mode, dweight.as<Compute<T>>());
          if (dx) cuda::rms_norm_input_gradient<T>(stream, x, weight.as<Compute<T>>(), rrms, dy, dx_mode, dx);
        });
  });
}

}  // namespace tforge::kernels
