#include "kernels/gemm.h"

#include <limits>

#include "kernels/check.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cuda/gemm.h"
#include "kernels/dispatch.h"
#include "kernels/work.h"

namespace tforge::kernels {

void gemm(Stream& stream, Transpose a_op, Transpose b_op, double alpha, ConstTensorView a, ConstTensorView b,
          GradMode mode, TensorView c) {
  const char* op = "gemm";
  check_device(op, stream, a, b, c);
  const std::int64_t m = c.rows();
  const std::int64_t n = c.columns();
  const std::int64_t k = a_op == Transpose::yes ? a.rows() : a.columns();
  const DType wide = compute_dtype(a.dtype);
  check_matrix(op, "C", c, c.dtype == wide ? wide : a.dtype, m, n);
  check_matrix(op, "A", a, a.dtype, a_op == Transpose::yes ? k : m, a_op == Transpose::yes ? m : k);
  check_matrix(op, "B", b, a.dtype, b_op == Transpose::yes ? n : k, b_op == Transpose::yes ? k : n);
  for (const std::int64_t size : {m, n, k, a.row_stride, b.row_stride, c.row_stride}) {
    if (size > std::numeric_limits<int>::max()) {
      throw ShapeError("gemm: a size or row stride of {} is more than a 32-bit BLAS can take", size);
    }
  }
  const ProfileScope scope(stream, op, {product_flops(m, n, k), bytes_of(a, b) + bytes_written(mode, c)});
  with_stored_type(op, stream, a.dtype, [&](auto t) {
    using T = decltype(t);
    on_device<T>(
        stream, [&](auto) { cpu::gemm<T>(a_op, b_op, alpha, a, b, mode, c); },
        [&](auto) {
          const auto op_of = [](Transpose t_) {
            return t_ == Transpose::yes ? cuda::Op::transposed : cuda::Op::as_it_is;
          };
          cuda::gemm<T>(stream, op_of(a_op), op_of(b_op), alpha, a, b, mode, c);
        });
  });
}

void start_cpu_runtime(int threads) { cpu::start_runtime(threads); }

const char* blas_description() { return cpu::blas_description(); }

}  // namespace tforge::kernels
