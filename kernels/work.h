#pragma once
// What a kernel reports to the profile of its stream.
#include "core/profile.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// Bytes of the views together, each once; empty ones have none.
template <class... Views>
double bytes_of(const Views&... views) {
  return (0.0 + ... +
          (views ? static_cast<double>(views.elements()) * static_cast<double>(size_of(views.dtype)) : 0.0));
}

/// The same for an output: twice when it is added to.
inline double bytes_written(GradMode mode, const ConstTensorView& output) {
  return (mode == GradMode::accumulate ? 2 : 1) * bytes_of(output);
}

/// Operations of a product of an m x k with a k x n matrix.
inline double product_flops(std::int64_t m, std::int64_t n, std::int64_t k) {
  return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
}

}  // namespace tforge::kernels
