#pragma once
// CPU kernels behind kernels/gemm.h; operands are already checked.
#include "core/tensor.h"
#include "kernels/gemm.h"

namespace tforge::kernels::cpu {

template <class T>
void gemm(Transpose a_op, Transpose b_op, double alpha, ConstTensorView a, ConstTensorView b, GradMode mode,
          TensorView c);

void start_runtime(int threads);
const char* blas_description();

}  // namespace tforge::kernels::cpu
