#pragma once
#include "autograd/reducer.h"
#include "autograd/row_shards.h"
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

/// Rows of `table` for `tokens` [T] i32; see kernels/embedding.h. The table may be a shard of the vocabulary that
/// starts at row `first_row`: then the result is PARTIAL over the shards (0 for tokens held elsewhere), and backward
/// needs the whole gradient on every rank. Saves the tokens. Throws ShapeError, DTypeError.
/// With a reducer by_shard(), which covers the other rows, the result is complete.
Var embedding(Tape& tape, const Tensor& tokens, const Var& table, std::int64_t first_row, const RowShards& shards = {},
              Reducer& reducer = identity_reducer());

}  // namespace tforge
