#pragma once
// Which columns of a [T, C] matrix belong to which rank of a tensor-parallel group.
#include <cstdint>
#include <vector>

#include "autograd/tape.h"
#include "core/tensor.h"
#include "parallel/communicator.h"

namespace tforge {

/// C columns from left to right: the groups one after another, each cut into one run of columns a rank in rank order;
/// then `common` columns that concern every rank. A rank's own columns, in the same order, are its run of each group,
/// then the common columns.
///   q, k and v of 4 heads of 8 columns on 3 ranks:  groups = 3 x {16, 8, 8}, common = 0 (l2_norm_gelu) or 3 (others)
///   the heads before proj:                          groups = {16, 8, 8}
struct ColumnPlan {
  std::vector<std::vector<std::int64_t>> groups;  // columns of each rank
  std::int64_t common = 0;

  /// C
  std::int64_t columns() const;
  /// Columns of rank `rank`, the common ones included.
  std::int64_t columns_of(int rank) const;
};

/// y = this rank's columns of (sum over ranks of x): x [T, C] PARTIAL -> y [T, columns_of(rank)].
/// One reduce-scatter. Throws ShapeError when the plan does not fit x or the ranks.
Tensor columns_to_owners(Tape& tape, const ConstTensorView& x, const ColumnPlan& plan, Communicator& tp);

/// The transpose: y [T, columns_of(rank)] -> x [T, C] replicated; each group column comes from its owner, each common
/// column is the sum over ranks, added in rank order. One all-gather. Throws ShapeError as above.
Tensor columns_from_owners(Tape& tape, const ConstTensorView& y, const ColumnPlan& plan, Communicator& tp);

/// This rank's columns of a complete x [T, C] -> [T, columns_of(rank)]: sends nothing. Throws ShapeError as above.
Tensor own_columns(Tape& tape, const ConstTensorView& x, const ColumnPlan& plan, Communicator& tp);

}  // namespace tforge
