#pragma once
// Matrix products of a CUDA device, over cuBLASLt; operands are already checked.
#include <cstddef>
#include <memory>
#include <string>

#include "core/bf16.h"
#include "core/device.h"
#include "core/tensor.h"
#include "kernels/choices.h"
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
  /// Of bf16 the sums are f32, rounded once at their end.
  virtual void run(const Stream& stream, Op a_op, Op b_op, double alpha, Rows<const bf16> a, Rows<const bf16> b,
                   GradMode mode, Rows<bf16> c) = 0;
  virtual void run(const Stream& stream, Op a_op, Op b_op, double alpha, Rows<const bf16> a, Rows<const bf16> b,
                   GradMode mode, Rows<float> c) = 0;

  /// Device and library: another one may sum in another order.
  virtual std::string bits_depend_on() const = 0;
  /// Asks anew for the algorithm of every product.
  virtual void forget() = 0;
};

/// The algorithm of a product is the one that `choices` knows; else, while it measures, the fastest of those that
/// cuBLASLt proposes; else its first. `workspace` and `choices` outlive it. Throws DeviceError; the products also
/// DataError for a choice that is no algorithm, ResourceError where a measurement has no memory for a result.
std::unique_ptr<MatrixProducts> make_products(void* workspace, std::size_t workspace_bytes, F32Products f32,
                                              Choices& choices);

/// The same of views, with the products of the stream's libraries. A and B are stored as T, C as T or Compute<T>.
/// Throws InternalError when the stream has no libraries.
template <class T>
void gemm(const Stream& stream, Op a_op, Op b_op, double alpha, ConstTensorView a, ConstTensorView b, GradMode mode,
          TensorView c);

}  // namespace tforge::kernels::cuda
