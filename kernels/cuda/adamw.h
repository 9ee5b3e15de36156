#pragma once
// CUDA kernels behind kernels/adamw.h; operands are already checked.
#include <cstdint>

#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

/// What is one number a step, folded in f64 before it is rounded.
template <class T>
struct AdamWNumbers {
  T beta1, one_minus_beta1, beta2, one_minus_beta2;
  T rate, inverse_root_bias2, decay, eps, grad_scale;
};

template <class T>
void adamw_update(const Stream& stream, const AdamWNumbers<T>& numbers, T* parameter, const T* gradient, T* m, T* v,
                  std::int64_t rows, std::int64_t columns, bool skips_idle_rows);

/// Partial sums of sum_of_squares.
inline constexpr std::int64_t kMostPartialSums = 1024;
template <class T>
void sum_of_squares(const Stream& stream, Rows<const T> x, double* sum, double* partial_sums);

}  // namespace tforge::kernels::cuda
