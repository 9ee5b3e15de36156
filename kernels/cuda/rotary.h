#pragma once
// CUDA kernels behind kernels/rotary.h; operands are already checked.
#include <cstdint>

#include "core/bf16.h"
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

template <class T>
void rotary_tables(const Stream& stream, double base, Rows<T> cosine, Rows<T> sine);
/// sign: 1 forward, -1 backward.
template <class T>
void rotary_apply(const Stream& stream, Compute<T> sign, Rows<const Compute<T>> cosine, Rows<const Compute<T>> sine,
                  std::int64_t heads, std::int64_t seq, std::int64_t first_position, Rows<T> x);

}  // namespace tforge::kernels::cuda
