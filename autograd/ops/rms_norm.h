#pragma once
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

/// RMSNorm over the last axis; see kernels/rms_norm.h. weight [d]. Saves x and 1/rms. Throws ShapeError, DTypeError.
Var rms_norm(Tape& tape, const Var& x, const Var& weight, double eps);

}  // namespace tforge
