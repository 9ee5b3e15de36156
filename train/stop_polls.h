#pragma once
// Where the ranks agree, in the middle of a step or an evaluation, to give up what is under way.
#include "parallel/communicator.h"
#include "train/stop_request.h"

namespace tforge {

/// A poll is one all-reduce of a number over all ranks, so every rank polls equally often. What a poll point does in
/// GradientPass::run and in EvalOptions.
class StopPolls {
 public:
  /// Both outlive it.
  StopPolls(Communicator& world, const TimeLimit& limit) : world_(world), limit_(limit) {}

  /// For what comes next. Without it a step is of unknown length.
  void expect(const StopCosts& costs) { costs_ = costs; }
  const StopCosts& costs() const { return costs_; }

  /// With `left` (0 to 1) of the step still to do. Throws GivenUp on every rank when one votes for it. Collective.
  void in_step(double left) { vote(gives_up_step(limit_.state(), costs_, left)); }
  void in_evaluation() { vote(gives_up_evaluation(limit_.state(), costs_)); }

 private:
  void vote(bool gives_up);

  Communicator& world_;
  const TimeLimit& limit_;
  StopCosts costs_;
  Stream stream_;
};

}  // namespace tforge
