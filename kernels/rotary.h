#pragma once
// Rotary position embedding (Su et al., arXiv 2104.09864) in the NeoX half-split form.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge::kernels {

/// cosine, sine [max_positions, rotary_dim / 2]: of position * base^(-2 i / rotary_dim), computed in f64 and rounded
/// to the dtype of the views. rotary_dim even. Throws ShapeError.
void rotary_tables(Stream& stream, double base, TensorView cosine, TensorView sine);

enum class RotaryDirection : std::uint8_t { forward, backward };

/// In place. x [T, heads * head_dim], T a multiple of seq, f32 or f64 like the tables, or bf16 with tables of f32
/// (CUDA); row t sits at position first_position + t % seq. Of each head the first r = 2 * cosine.columns() dimensions
/// rotate in pairs (i, i + r/2):
///   x1' = x1 cos - x2 sin,   x2' = x2 cos + x1 sin        (backward: sin negated, which is the transpose)
/// Throws ShapeError when a position is past the tables or r > head_dim, DTypeError.
void rotary_apply(Stream& stream, RotaryDirection direction, ConstTensorView cosine, ConstTensorView sine,
                  std::int64_t heads, std::int64_t seq, std::int64_t first_position, TensorView x);

}  // namespace tforge::kernels
