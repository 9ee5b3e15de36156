#pragma once
// Causal attention by features in place of a softmax, on the joint tensor [q | k | v] of this rank's heads.
#include "autograd/tape.h"
#include "autograd/var.h"
#include "kernels/linear_attention.h"

namespace tforge {

/// A feature map with its table (kernels::FeatureMap).
struct AttentionFeatures {
  kernels::Features kind = kernels::Features::relu_cosine;
  std::int64_t count = 0;
  Tensor table;

  kernels::FeatureMap map() const { return {kind, count, table.view()}; }
};

/// Causal attention of qkv [batch * seq, 3 c] -> [batch * seq, c]; see kernels/linear_attention.h. No gradient goes
/// to the table. Saves qkv, the output and the sum of weights of each row; features are computed again.
/// Throws ShapeError, DTypeError.
Var linear_attention(Tape& tape, const Var& qkv, std::int64_t batch, std::int64_t heads,
                     const AttentionFeatures& features);

}  // namespace tforge
