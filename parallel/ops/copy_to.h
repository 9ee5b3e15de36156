#pragma once
#include "autograd/tape.h"
#include "parallel/communicator.h"

namespace tforge {

/// Hands a replicated x to an op whose parameters are sharded over `tp`.
///   x             replicated        result   x itself: shares its memory
///   d(result)     PARTIAL           dx       replicated: one all-reduce (sum), in place
/// `tp` outlives the backward pass. With one rank it returns x. Saves nothing.
Var copy_to(Tape& tape, const Var& x, Communicator& tp);

}  // namespace tforge
