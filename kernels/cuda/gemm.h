#pragma once
// Matrix products of a CUDA device, over cuBLASLt; operands are already checked.
#include <cstddef>
#include <memory>

#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

/// Transposition of an operand: as in kernels/gemm.h.
enum class Op : bool { as_it_is, transposed };

class MatrixProducts {
 public:
  virtual ~MatrixProducts() = default;
  /// C {=, +=} alpha op(A) op(B), row-major.
  virtual void run(const Stream& stream, Op a_op, Op b_op, double alpha, Rows<const float> a, Rows<const float> b,
                   GradMode mode, Rows<float> c) = 0;
  virtual void run(const Stream& stream, Op a_op, Op b_op, double alpha, Rows<const double> a, Rows<const double> b,
                   GradMode mode, Rows<double> c) = 0;
};

/// `workspace` outlives it. Throws DeviceError.
std::unique_ptr<MatrixProducts> make_products(void* workspace, std::size_t workspace_bytes);

/// With the products of the stream's libraries. Throws InternalError when it has none.
template <class T>
void gemm(const Stream& stream, Op a_op, Op b_op, double alpha, Rows<const T> a, Rows<const T> b, GradMode mode,
          Rows<T> c);

}  // namespace tforge::kernels::cuda
