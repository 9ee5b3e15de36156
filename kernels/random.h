#pragma once
// Random initial values, keyed by parameter name and element: the same on every mesh and number of threads.
#include <cstdint>
#include <string_view>

#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// y[r, c] {=, +=} deviation * normal number of (seed, name, (first_row + r) * columns + c), a standard normal in f64
/// (core/rng.h) rounded to the dtype. f32 or f64. Throws DTypeError.
void fill_normal(Stream& stream, std::uint64_t seed, std::string_view name, std::int64_t first_row, double deviation,
                 GradMode mode, TensorView y);

}  // namespace tforge::kernels
