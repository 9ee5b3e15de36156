#pragma once
// What the ranks of a job do with gradients after a backward pass.
#include "core/tensor.h"
#include "parallel/communicator.h"

namespace tforge {

/// Sums the gradients of this rank's parameters, one flat tensor, over the ranks that hold the same shard.
/// The gradients are then those of the global batch, since each rank's loss is divided by all target tokens.
class GradSync {
 public:
  /// `dp` outlives this object. `flat` is shared with the parameters' gradients; f32 or f64, contiguous.
  GradSync(Communicator& dp, Tensor flat);
  /// When this returns, the sums are complete on every rank, with the same bits. Collective over dp.
  void finish(Stream& stream);

 private:
  Communicator& dp_;
  Tensor flat_;
};

/// The norm of all gradients of the model, each logical element counted once, the same number on every rank of `tp`:
///   sqrt(sum over tp of sharded_squares + replicated_squares)
/// sharded_squares: sum of squares of the rows that this rank alone owns (differs between the ranks of tp);
/// replicated_squares: of the parameters that every rank of tp holds in full (the same on all of them).
/// Both in f64, after GradSync::finish. A non-finite element anywhere gives a non-finite norm everywhere. Collective.
double global_norm(Stream& stream, Communicator& tp, double sharded_squares, double replicated_squares);

}  // namespace tforge
