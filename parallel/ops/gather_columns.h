#pragma once
#include "parallel/ops/column_plan.h"

namespace tforge {

/// Puts columns that are sharded over `tp` together: [T, plan.columns_of(rank)] -> [T, plan.columns()].
///   x             sharded by columns     result   replicated: one all-gather
///   d(result)     PARTIAL                dx       sharded by columns: one reduce-scatter
///                 or complete                     nothing is sent
/// The gradient is partial where what consumes the result holds parameters sharded over tp and adds no all-reduce.
/// The plan has no common columns; plan and `tp` outlive the backward pass. With one rank it returns x. Saves nothing.
/// Throws ShapeError.
enum class Incoming : std::uint8_t { partial, complete };
Var gather_columns(Tape& tape, const Var& x, const ColumnPlan& plan, Communicator& tp,
                   Incoming gradient = Incoming::partial);

}  // namespace tforge
