#include "kernels/layer_norm.h"

#include "kernels/check.h"
#include "kernels/cpu/layer_norm.h"
#include "kernels/cuda/layer_norm.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {

void layer_norm_forward(Stream& stream, ConstTensorView x, ConstTensorView weight, ConstTensorView bias, double eps,
                        TensorView y, TensorView mean, TensorView rstd) {
  constexpr const char* kOp = "layer_norm_forward";
  const DType dtype = x.dtype;
  check_device(kOp, stream, x, weight, bias, y, mean, rstd);
  check_matrix(kOp, "x", x, dtype, x.rows(), x.columns());
  check_matrix(kOp, "y", y, dtype, x.rows(), x.columns());
  if (static_cast<bool>(weight) != static_cast<bool>(bias)) {
    throw ShapeError("{}: weight and bias go together, one of them is empty", kOp);
  }
  if (weight) {
    check_vector(kOp, "weight", weight, compute_dtype(dtype), x.columns());
    check_vector(kOp, "bias", bias, compute_dtype(dtype), x.columns());
  }
  if (mean) check_matrix(kOp, "mean", mean, compute_dtype(dtype), x.rows(), 1);
  if (rstd) check_matrix(kOp, "rstd", rstd, compute_dtype(dtype), x.rows(), 1);
  const ProfileScope scope(stream, kOp, {8.0 * static_cast<double>(x.elements()), bytes_of(x, y)});
  with_stored_type(kOp, stream, dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::layer_norm_forward<T>(x, weight, bias, eps, y, mean, rstd); },
        [&](auto) {
          cuda::layer_norm_forward<T>(stream, x, weight ? weight.as<Compute<T>>() : nullptr,
                                      bias ? bias.as<Compute<T>>() : nullptr, eps, y, mean, rstd);
        });
  });
}

void layer_norm_backward(Stream& stream, ConstTensorView x, ConstTensorView weight, ConstTensorView mean,
                         ConstTensorView rstd, ConstTensorView dy, GradMode dx_mode, TensorView dx,
                         GradMode parameter_mode, TensorView dweight, TensorView dbias) {
  constexpr const char* kOp = "layer_norm_backward";
  const DType dtype = x.dtype;
  check_device(kOp, stream, x, weight, mean, rstd, dy, dx, dweight, dbias);
  check_matrix(kOp, "x", x, dtype, x.rows(), x.columns());
  if (mean) check_matrix(kOp, "mean", mean, compute_dtype(dtype), x.rows(), 1);
  check_matrix(kOp, "rstd", rstd, compute_dtype(dtype), x.rows(), 1);
  check_matrix(kOp, "dy", dy, dtype, x.rows(), x.columns());
  if (weight) check_vector(kOp, "weight", weight, compute_dtype(dtype), x.columns());
  if (dx) check_matrix(kOp, "dx", dx, dtype, x.rows(), x.columns());
  if (static_cast<bool>(dweight) != static_cast<bool>(dbias)) {
    throw ShapeError("{}: dweight and dbias go together, one of them is empty", kOp);
  }
  if (dweight) {
    check_vector(kOp, "dweight", dweight, compute_dtype(dtype), x.columns());
    check_vector(kOp, "dbias", dbias, compute_dtype(dtype), x.columns());
  }
  const ProfileScope scope(stream, kOp,
                           {12.0 * static_cast<double>(x.elements()), bytes_of(x, dy) + bytes_written(dx_mode, dx)});
  with_stored_type(kOp, stream, dtype, [&](auto t) {
    using T = decltype(t);
    // First the parameters: dx may lie over dy.
    on_device<T>(
        stream,
        [&](auto) {
          if (dweight) cpu::layer_norm_parameter_gradients<T>(x, mean, rstd, dy, parameter_mode, dweight, dbias);
          if (dx) cpu::layer_norm_input_gradient<T>(x, weight, mean, rstd, dy, dx_mode, dx);
        },
        [&](auto) {
          if (dweight) {
            cuda::layer_norm_parameter_gradients<T>(stream, x, mean, rstd, dy, parameter_mode, dweight.as<Compute<T>>(),
                                                    dbias.as<Compute<T>>());
          }
          if (dx) {
            const Compute<T>* const w = weight ? weight.as<Compute<T>>() : nullptr;
            cuda::layer_norm_input_gradient<T>(stream, x, w, mean, rstd, dy, dx_mode, dx);
          }
        });
  });
}

}  // namespace tforge::kernels
