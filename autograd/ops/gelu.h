#pragma once
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

/// Exact GELU; see kernels/gelu.h. Saves x. Throws DTypeError.
Var gelu(Tape& tape, const Var& x);

}  // namespace tforge
