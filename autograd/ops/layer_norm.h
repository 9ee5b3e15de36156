#pragma once
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

/// LayerNorm over the last axis; see kernels/layer_norm.h. weight and bias [d] are both given or both empty.
/// Saves 1/std and, with parameters, x and mean, without them the result. Throws ShapeError, DTypeError.
Var layer_norm(Tape& tape, const Var& x, const Var& weight, const Var& bias, double eps);

}  // namespace tforge
