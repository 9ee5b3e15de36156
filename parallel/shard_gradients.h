#pragma once
// The gradients of virtual sample shards, kept apart until they are added in the order of the shards.
#include <cstdint>
#include <vector>

#include "core/allocator.h"
#include "core/tensor.h"
#include "parallel/ordered_sum.h"

namespace tforge {

/// Sums one flat gradient a shard of the batch over the shards of all ranks of dp. A rank computes the gradients of its
/// shards one after the other in the same flat tensor, and hands all but the last to keep().
class ShardGradients {
 public:
  /// `sum` outlives it. `flat`: where the gradients are computed, and where their sum goes; contiguous, f32 or f64.
  /// Holds a copy for each shard held here but one; `piece` elements are summed at a time.
  ShardGradients(Allocator& allocator, OrderedSum& sum, Tensor flat, std::int64_t piece);

  /// Keeps the gradient of shard `shard` of those held here, not the last of them.
  void keep(Stream& stream, std::int64_t shard);
  /// After the last shard: the sum over all shards, the same bits on every rank. Collective over dp.
  void finish(Stream& stream);

 private:
  OrderedSum& sum_;
  Tensor flat_;
  std::int64_t piece_;
  std::vector<Tensor> kept_;
};

}  // namespace tforge
