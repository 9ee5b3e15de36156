#include "kernels/cross_entropy.h"

#include "kernels/check.h"
#include "kernels/cpu/cross_entropy.h"
#include "kernels/cuda/cross_entropy.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {

void cross_entropy_row_max(Stream& stream, ConstTensorView logits, TensorView row_max) {
  constexpr const char* kOp = "cross_entropy_row_max";
  check_device(kOp, stream, logits, row_max);
  check_matrix(kOp, "logits", logits, logits.dtype, logits.rows(), logits.columns());
  check_matrix(kOp, "row_max", row_max, logits.dtype, logits.rows(), 1);
  const ProfileScope scope(stream, kOp, {static_cast<double>(logits.elements()), bytes_of(logits)});
  with_compute_type(kOp, logits.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::cross_entropy_row_max<T>(logits, row_max); },
        [&](auto) { cuda::cross_entropy_row_max<T>(stream, logits, row_max); });
  });
}

void cross_entropy_row_sum(Stream& stream, ConstTensorView logits, ConstTensorView row_max, ConstTensorView targets,
                           std::int64_t first_column, TensorView row_sum, TensorView target_logit) {
  constexpr const char* kOp = "cross_entropy_row_sum";
  const std::int64_t rows = logits.rows();
  check_device(kOp, stream, logits, row_max, targets, row_sum, target_logit);
  check_matrix(kOp, "logits", logits, logits.dtype, rows, logits.columns());
  check_matrix(kOp, "row_max", row_max, logits.dtype, rows, 1);
  check_vector(kOp, "targets", targets, DType::i32, rows);
  check_matrix(kOp, "row_sum", row_sum, logits.dtype, rows, 1);
  check_matrix(kOp, "target_logit", target_logit, logits.dtype, rows, 1);
  const ProfileScope scope(stream, kOp, {20.0 * static_cast<double>(logits.elements()), bytes_of(logits)});
  with_compute_type(kOp, logits.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::cross_entropy_row_sum<T>(logits, row_max, targets, first_column, row_sum, target_logit); },
        [&](auto) {
          cuda::cross_entropy_row_sum<T>(stream, logits, row_max, targets.as<std::int32_t>(), first_column, row_sum,
                                         target_logit);
        });
  });
}

void cross_entropy_nll(Stream& stream, ConstTensorView row_sum, ConstTensorView target_logit, ConstTensorView targets,
                       TensorView nll) {
  constexpr const char* kOp = "cross_entropy_nll";
  const std::int64_t rows = targets.elements();
  check_device(kOp, stream, row_sum, target_logit, targets, nll);
  check_vector(kOp, "targets", targets, DType::i32, rows);
  check_matrix(kOp, "row_sum", row_sum, row_sum.dtype, rows, 1);
  check_matrix(kOp, "target_logit", target_logit, row_sum.dtype, rows, 1);
  check_vector(kOp, "nll", nll, DType::f64, rows);
  with_compute_type(kOp, row_sum.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::cross_entropy_nll<T>(row_sum, target_logit, targets, nll); },
        [&](auto) {
          cuda::cross_entropy_nll<T>(stream, row_sum, target_logit, targets.as<std::int32_t>(), rows, nll.as<double>());
        });
  });
}

void cross_entropy_backward(Stream& stream, ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView targets,
                            std::int64_t first_column, double weight, TensorView logits) {
  constexpr const char* kOp = "cross_entropy_backward";
  const std::int64_t rows = logits.rows();
  check_device(kOp, stream, row_max, row_sum, targets, logits);
  check_matrix(kOp, "logits", logits, logits.dtype, rows, logits.columns());
  check_matrix(kOp, "row_max", row_max, logits.dtype, rows, 1);
  check_matrix(kOp, "row_sum", row_sum, logits.dtype, rows, 1);
  check_vector(kOp, "targets", targets, DType::i32, rows);
  const ProfileScope scope(stream, kOp, {20.0 * static_cast<double>(logits.elements()), 2 * bytes_of(logits)});
  with_compute_type(kOp, logits.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::cross_entropy_backward<T>(row_max, row_sum, targets, first_column, weight, logits); },
        [&](auto) {
          cuda::cross_entropy_backward<T>(stream, row_max, row_sum, targets.as<std::int32_t>(), first_column, weight,
                                          logits);
        });
  });
}

}  // namespace tforge::kernels
