#pragma once
// How an op hears from the ranks that hold the other parameter tokens or vocabulary rows, without knowing of ranks.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge {

/// Reduces over the shards of a tensor-parallel group; every rank gets the same bits.
/// Implemented over a communicator in parallel/; `identity_reducer()` is the single rank.
class Reducer {
 public:
  virtual ~Reducer() = default;
  /// True when there is one shard: ops may then take a fused path.
  virtual bool is_identity() const = 0;
  /// False: what a rank holds is one shard, and an op's results and gradients are PARTIAL where it says so; who calls
  /// the op completes them. True: an op computes each of the shards that it holds as if it were alone and completes its
  /// results and gradients itself, by sum(), so that they do not depend on which rank holds which shards.
  virtual bool by_shard() const { return false; }
  /// total = sum over the shards of all ranks. `parts` holds those of this rank one below the other, each of the shape
  /// of `total`; where there is one, `total` may be `parts`. Contiguous, f32 or f64.
  virtual void sum(Stream& stream, ConstTensorView parts, TensorView total) = 0;
  /// total = max over the shards, likewise.
  virtual void max(Stream& stream, ConstTensorView parts, TensorView total) = 0;
};

Reducer& identity_reducer();

}  // namespace tforge
