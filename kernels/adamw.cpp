#include "kernels/adamw.h"

#include "kernels/check.h"
#include "kernels/cpu/adamw.h"
#include "kernels/work.h"

namespace tforge::kernels {

void adamw_update(Stream& stream, const AdamWStep& step, TensorView parameter, ConstTensorView gradient, TensorView m,
                  TensorView v) {
  constexpr const char* kOp = "adamw_update";
  check_device(kOp, stream);
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
  with_compute_type(kOp, parameter.dtype,
                    [&](auto t) { cpu::adamw_update<decltype(t)>(step, parameter, gradient, m, v); });
}

double sum_of_squares(Stream& stream, ConstTensorView x) {
  constexpr const char* kOp = "sum_of_squares";
  check_device(kOp, stream);
  check_matrix(kOp, "x", x, x.dtype, x.rows(), x.columns());
  const ProfileScope scope(stream, kOp, {2.0 * static_cast<double>(x.elements()), bytes_of(x)});
  return with_compute_type(kOp, x.dtype, [&](auto t) { return cpu::sum_of_squares<decltype(t)>(x); });
}

}  // namespace tforge::kernels
