#include "kernels/adamw.h"

#include <cmath>

#include "kernels/check.h"
#include "kernels/cpu/adamw.h"
#include "kernels/cuda/adamw.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {
namespace {

template <class T>
cuda::AdamWNumbers<T> numbers_of(const AdamWStep& step) {
  return {static_cast<T>(step.beta1),
          static_cast<T>(1 - step.beta1),
          static_cast<T>(step.beta2),
          static_cast<T>(1 - step.beta2),
          static_cast<T>(step.lr / step.bias1),
          static_cast<T>(1 / std::sqrt(step.bias2)),
          static_cast<T>(step.lr * step.weight_decay),
          static_cast<T>(step.eps),
          static_cast<T>(step.grad_scale)};
}

}  // namespace

void adamw_update(Stream& stream, const AdamWStep& step, TensorView parameter, ConstTensorView gradient, TensorView m,
                  TensorView v) {
  constexpr const char* kOp = "adamw_update";
  check_device(kOp, stream, parameter, gradient, m, v);
  const auto check = [&](const char* name, const ConstTensorView& x) {
    check_matrix(kOp, name, x, parameter.dtype, parameter.rows(), parameter.columns());
    check_vector(kOp, name, x, parameter.dtype, parameter.elements());
  };
  check("parameter", parameter);
  check("gradient", gradient);
  check("m", m);
  check("v", v);
  const ProfileScope scope(
      stream, kOp,
      {15.0 * static_cast<double>(parameter.elements()), 2 * bytes_of(parameter, m, v) + bytes_of(gradient)});
  with_compute_type(kOp, parameter.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::adamw_update<T>(step, parameter, gradient, m, v); },
        [&](auto) {
          cuda::adamw_update<T>(stream, numbers_of<T>(step), parameter.as<T>(), gradient.as<T>(), m.as<T>(), v.as<T>(),
                                parameter.rows(), parameter.columns(), step.idle_rows == IdleRows::skip);
        });
  });
}

void sum_of_squares(Stream& stream, ConstTensorView x, TensorView sum, TensorView workspace) {
  constexpr const char* kOp = "sum_of_squares";
  check_device(kOp, stream, x, sum, workspace);
  check_matrix(kOp, "x", x, x.dtype, x.rows(), x.columns());
  check_vector(kOp, "sum", sum, DType::f64, 1);
  check_workspace(kOp, workspace, DType::f64, sum_of_squares_workspace(stream.device()));
  const ProfileScope scope(stream, kOp, {2.0 * static_cast<double>(x.elements()), bytes_of(x)});
  with_compute_type(kOp, x.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { *sum.as<double>() = cpu::sum_of_squares<T>(x); },
        [&](auto) { cuda::sum_of_squares<T>(stream, x, sum.as<double>(), workspace.as<double>()); });
  });
}

std::int64_t sum_of_squares_workspace(Device device) { return device == Device::cuda ? cuda::kMostPartialSums : 0; }

}  // namespace tforge::kernels
