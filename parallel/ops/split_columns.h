#pragma once
#include "parallel/ops/column_plan.h"

namespace tforge {

/// Keeps this rank's columns of a complete [T, plan.columns()]: -> [T, plan.columns_of(rank)].
///   x             replicated             result   sharded by columns: nothing is sent
///   d(result)     sharded by columns     dx       replicated, complete: one all-gather
/// The plan has no common columns; plan and `tp` outlive the backward pass. With one rank it returns x. Saves nothing.
/// Throws ShapeError.
Var split_columns(Tape& tape, const Var& x, const ColumnPlan& plan, Communicator& tp);

}  // namespace tforge
