#pragma once
// The Reducer that ops use inside a tensor-parallel group.
#include "autograd/reducer.h"
#include "parallel/communicator.h"

namespace tforge {

/// Reduces over `tp`, which outlives it. Every sum and max is one all-reduce; nothing is sent when `tp` has one rank.
class TpReducer final : public Reducer {
 public:
  explicit TpReducer(Communicator& tp) : tp_(tp) {}
  bool is_identity() const override { return tp_.size() == 1; }
  void sum(Stream& stream, TensorView x) override;
  void max(Stream& stream, TensorView x) override;

 private:
  Communicator& tp_;
};

}  // namespace tforge
