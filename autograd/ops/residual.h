#pragma once
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

/// h + y. The sum is written over y when nobody else holds y's value. Saves nothing.
/// Backward hands the gradient to both sides without copying it. Throws ShapeError, DTypeError.
Var residual(Tape& tape, const Var& h, Var y);

}  // namespace tforge
