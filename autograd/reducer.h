#pragma once
// How an op hears from the ranks that hold the other parameter tokens or vocabulary rows, without knowing of ranks.
#include "core/device.h"
#include "core/tensor.h"

namespace tforge {

/// Reduces small per-row numbers over the ranks of a tensor-parallel group, in place; every rank gets the same bits.
/// Implemented over a communicator in parallel/; `identity_reducer()` is the single rank.
class Reducer {
 public:
  virtual ~Reducer() = default;
  /// True when there is one rank: ops may then take a fused path.
  virtual bool is_identity() const = 0;
  /// x = sum over ranks of x. x contiguous, f32 or f64.
  virtual void sum(Stream& stream, TensorView x) = 0;
  /// x = max over ranks of x.
  virtual void max(Stream& stream, TensorView x) = 0;
};

Reducer& identity_reducer();

}  // namespace tforge
