#pragma once
#include "parallel/ops/column_plan.h"

namespace tforge {

/// Completes a partial [T, plan.columns()] and keeps this rank's columns: -> [T, plan.columns_of(rank)].
///   x             PARTIAL                               result   sharded by columns, common columns replicated:
///                                                                one reduce-scatter
///   d(result)     sharded by columns;                   dx       replicated, complete: one all-gather
///                 common columns PARTIAL
/// The gradient of common columns is partial because each rank's consumer uses them for its own columns alone.
/// Plan and `tp` outlive the backward pass. With one rank it returns x. Saves nothing. Throws ShapeError.
Var reduce_scatter_columns(Tape& tape, const Var& x, const ColumnPlan& plan, Communicator& tp);

}  // namespace tforge
