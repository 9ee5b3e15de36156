#include "kernels/cross_entropy.h"

#include "kernels/check.h"
#include "kernels/cpu/cross_entropy.h"
#include "kernels/cuda/cross_entropy.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {

void cross_entropy_row_statistics(Stream& stream, ConstTensorView logits, ConstTensorView targets,
                                  std::int64_t first_column, TensorView row_max, TensorView row_sum,
                                  TensorView target_logit) {
  constexpr const char* kOp = "cross_entropy_row_statistics";
  const std::int64_t rows = logits.rows();
  check_device(kOp, stream, logits, targets, row_max, row_sum, target_logit);
  check_matrix(kOp, "logits", logits, logits.dtype, rows, logits.columns());
  check_vector(kOp, "targets", targets, DType::i32, rows);
  check_matrix(kOp, "row_max", row_max, logits.dtype, rows, 1);
  check_matrix(kOp, "row_sum", row_sum, logits.dtype, rows, 1);
  check_matrix(kOp, "target_logit", target_logit, logits.dtype, rows, 1);
  const ProfileScope scope(stream, kOp, {21.0 * static_cast<double>(logits.elements()), bytes_of(logits)});
  with_compute_type(kOp, logits.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream,
        [&] { cpu::cross_entropy_row_statistics<T>(logits, targets, first_column, row_max, row_sum, target_logit); },
        [&](auto) {
          cuda::cross_entropy_row_statistics<T>(stream, logits, targets.as<std::int32_t>(), first_column, row_max,
                                                row_sum, target_logit);
        });
  });
}

void cross_entropy_rescale(Stream& stream, ConstTensorView own_max, ConstTensorView row_max, TensorView row_sum) {
  constexpr const char* kOp = "cross_entropy_rescale";
  const std::int64_t rows = row_sum.rows();
  check_device(kOp, stream, own_max, row_max, row_sum);
  check_matrix(kOp, "own_max", own_max, row_sum.dtype, rows, 1);
  check_matrix(kOp, "row_max", row_max, row_sum.dtype, rows, 1);
  check_matrix(kOp, "row_sum", row_sum, row_sum.dtype, rows, 1);
  with_compute_type(kOp, row_sum.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::cross_entropy_rescale<T>(own_max, row_max, row_sum); },
        [&](auto) { cuda::cross_entropy_rescale<T>(stream, own_max, row_max, row_sum); });
  });
}

void cross_entropy_nll(Stream& stream, ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView target_logit,
                       ConstTensorView targets, TensorView nll) {
  constexpr const char* kOp = "cross_entropy_nll";
  const std::int64_t rows = targets.elements();
  check_device(kOp, stream, row_max, row_sum, target_logit, targets, nll);
  check_matrix(kOp, "row_max", row_max, row_sum.dtype, rows, 1);
  check_vector(kOp, "targets", targets, DType::i32, rows);
  check_matrix(kOp, "row_sum", row_sum, row_sum.dtype, rows, 1);
  check_matrix(kOp, "target_logit", target_logit, row_sum.dtype, rows, 1);
  check_vector(kOp, "nll", nll, DType::f64, rows);
  with_compute_type(kOp, row_sum.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream, [&] { cpu::cross_entropy_nll<T>(row_max, row_sum, target_logit, targets, nll); },
        [&](auto) {
          cuda::cross_entropy_nll<T>(stream, row_max, row_sum, target_logit, targets.as<std::int32_t>(), rows,
                                     nll.as<double>());
        });
  });
}

void cross_entropy_backward(Stream& stream, ConstTensorView row_max, ConstTensorView row_sum, ConstTensorView targets,
                            std::int64_t first_column, double weight, ConstTensorView logits, TensorView dlogits) {
  constexpr const char* kOp = "cross_entropy_backward";
  const std::int64_t rows = logits.rows();
  check_device(kOp, stream, row_max, row_sum, targets, logits, dlogits);
  check_matrix(kOp, "logits", logits, logits.dtype, rows, logits.columns());
  check_matrix(kOp, "row_max", row_max, logits.dtype, rows, 1);
  check_matrix(kOp, "row_sum", row_sum, logits.dtype, rows, 1);
  check_vector(kOp, "targets", targets, DType::i32, rows);
  const bool narrow = dlogits.dtype == DType::bf16 && logits.dtype == DType::f32 && stream.device() == Device::cuda;
  check_matrix(kOp, "dlogits", dlogits, narrow ? DType::bf16 : logits.dtype, rows, logits.columns());
  const ProfileScope scope(stream, kOp,
                           {20.0 * static_cast<double>(logits.elements()), bytes_of(logits) + bytes_of(dlogits)});
  with_compute_type(kOp, logits.dtype, [&](auto t) {
    using T = decltype(t);
    on_device(
        stream,
        [&] { cpu::cross_entropy_backward<T>(row_max, row_sum, targets, first_column, weight, logits, dlogits); },
        [&](auto) {
          const auto start = [&](auto narrowed) {
            cuda::cross_entropy_backward<T, decltype(narrowed)>(stream, row_max, row_sum, targets.as<std::int32_t>(),
                                                                first_column, weight, logits, dlogits);
          };
          if constexpr (std::is_same_v<T, float>) {
            if (narrow) return start(bf16{});
          }
          start(T{});
        });
  });
}

}  // namespace tforge::kernels
