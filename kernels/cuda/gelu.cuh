#pragma once
// gelu and its slope, one number at a time.
#include <cuda_runtime.h>

namespace tforge::kernels::cuda {

/// Phi(x): distribution function of the standard normal. erfc keeps the digits of the lower tail.
__device__ inline float normal_distribution(float x) { return 0.5F * erfcf(-0.70710678118654752F * x); }
__device__ inline double normal_distribution(double x) { return 0.5 * erfc(-0.70710678118654752 * x); }

template <class T>
__device__ T gelu(T x) {
  return x * normal_distribution(x);
}

/// Phi(x) + x phi(x)
__device__ inline float gelu_slope(float x) {
  return normal_distribution(x) + x * (0.39894228040143268F * expf(-0.5F * x * x));
}
__device__ inline double gelu_slope(double x) {
  return normal_distribution(x) + x * (0.39894228040143268 * exp(-0.5 * x * x));
}

}  // namespace tforge::kernels::cuda
