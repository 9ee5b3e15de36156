#pragma once
// Dense layers. Weights lie so that the rows of a shard are those of one rank, whichever side of the product they are.
// `reducer` covers the ranks that hold the other rows. With one by_shard() what is said to be PARTIAL below is
// complete.
#include <span>

#include "autograd/reducer.h"
#include "autograd/row_shards.h"
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

struct LinearWeights {
  Var weight;  // [n, d_in]
  Var bias;    // [n, 1], or empty
  RowShards shards = {};
};
inline constexpr std::size_t kMaxLinearGroup = 3;

/// [x W_0^T + b_0 | x W_1^T + b_1 | ...]: x [T, d_in] -> [T, n_0 + n_1 + ...], of 1 to 3 layers.
///   x          replicated                   result   sharded by columns, as the layers are by rows
///   d(result)  sharded by columns           dx       PARTIAL
/// The layers have the same number of shards. Saves x. Throws ShapeError, DTypeError.
Var linear(Tape& tape, const Var& x, std::span<const LinearWeights> layers, Reducer& reducer);

/// x W: x [T, n], weight [n, d_out] -> [T, d_out].
///   x          sharded by columns, as the weight is by rows        result   PARTIAL
///   d(result)  replicated                                          dx       sharded by columns
/// Saves x.
Var linear_of_shard(Tape& tape, const Var& x, const Var& weight, Reducer& reducer, RowShards shards = {});

/// gelu(x W^T + b) V: x [T, d_in], in [n, d_in], out [n, d_out] -> [T, d_out].
///   x          replicated        result   PARTIAL
///   d(result)  replicated        dx       PARTIAL
/// `out` has the shards of `in`. Saves x and x W^T + b [T, n] (not with Recompute::scores).
Var gelu_mlp(Tape& tape, const Var& x, const LinearWeights& in, const Var& out, Reducer& reducer);

/// y + bias, row by row: y [T, d], bias [d], both replicated. Over y when nobody else holds it (move it in). Saves
/// nothing.
Var add_bias(Tape& tape, Var y, const Var& bias);

}  // namespace tforge
