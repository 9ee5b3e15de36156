#pragma once
#include <cstdint>
#include <string_view>

#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels::cpu {

template <class T>
void fill_normal(std::uint64_t seed, std::string_view name, std::int64_t first_row, double deviation, GradMode mode,
                 TensorView y);

}  // namespace tforge::kernels::cpu
