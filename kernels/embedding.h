#pragma once
// Embedding lookup in a (shard of a) table.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// y[t, :] = table[tokens[t] - first_row, :], or 0 when the token's row is not held here.
/// tokens [T] i32, table [rows held, d], y [T, d]; f32 or f64, on a CUDA device also
/// bf16. Throws ShapeError, DTypeError.
void embedding_forward(Stream& stream, ConstTensorView tokens, ConstTensorView table, std::int64_t first_row,
                       TensorView y);

/// dtable[row, :] {=, +=} sum over t with that token of dy[t, :], in order of t: deterministic and independent of
/// threads (each table row is summed by one thread). Tokens not held here are skipped.
/// dtable is f32 where dy is bf16. workspace: i32 tensor of at least embedding_workspace(T, rows) elements.
void embedding_backward(Stream& stream, ConstTensorView tokens, ConstTensorView dy, std::int64_t first_row,
                        GradMode mode, TensorView dtable, TensorView workspace);
std::int64_t embedding_workspace(std::int64_t tokens, std::int64_t rows);

}  // namespace tforge::kernels
