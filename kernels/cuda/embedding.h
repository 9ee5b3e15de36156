#pragma once
// CUDA kernels behind kernels/embedding.h; operands are already checked.
#include <cstdint>

#include "core/bf16.h"
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

template <class T>
void embedding_forward(const Stream& stream, const std::int32_t* tokens, Rows<const T> table, std::int64_t first_row,
                       Rows<T> y);
/// workspace: dy.rows + dtable.rows numbers.
template <class T>
void embedding_backward(const Stream& stream, const std::int32_t* tokens, Rows<const T> dy, std::int64_t first_row,
                        GradMode mode, Rows<Compute<T>> dtable, std::int32_t* workspace);

}  // namespace tforge::kernels::cuda
