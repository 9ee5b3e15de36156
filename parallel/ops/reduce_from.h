#pragma once
#include "autograd/tape.h"
#include "parallel/communicator.h"

namespace tforge {

/// Completes the result of an op whose parameters are sharded over `tp`: result = sum over ranks of x.
///   x             PARTIAL           result   replicated, same bits on every rank: one all-reduce
///   d(result)     replicated        dx       d(result) itself: shares its memory
/// The sum is written over x when nobody else holds x's value (move x in), else to a copy. `tp` is used in forward
/// only. With one rank it returns x. Saves nothing.
Var reduce_from(Tape& tape, Var x, Communicator& tp);

}  // namespace tforge
