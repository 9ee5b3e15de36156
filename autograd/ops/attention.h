#pragma once
// Rotary embedding and causal attention on the joint tensor [q | k | v] of this rank's heads.
#include "autograd/tape.h"
#include "autograd/var.h"

namespace tforge {

/// Rotates q and k of qkv [T, 3 c] (c = heads * head_dim) in place; see kernels/rotary.h. cosine, sine are the tables.
/// Takes qkv over: its value must not be held elsewhere (InternalError). Backward rotates the gradient back in place.
Var rotary(Tape& tape, Var qkv, const Tensor& cosine, const Tensor& sine, std::int64_t heads, std::int64_t seq);

/// Causal attention of qkv [batch * seq, 3 c] -> [batch * seq, c]; see kernels/attention.h.
/// Saves qkv, the output and the log-sum-exp of each row. Throws ShapeError, DTypeError.
Var causal_attention(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t heads);

}  // namespace tforge
