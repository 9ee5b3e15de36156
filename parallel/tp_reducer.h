#pragma once
// The Reducers that ops use inside a tensor-parallel group.
#include "autograd/reducer.h"
#include "parallel/communicator.h"
#include "parallel/ordered_sum.h"

namespace tforge {

/// What a rank of `tp` holds is one shard. `tp` outlives it. Every sum and max is one all-reduce; nothing is sent when
/// `tp` has one rank.
class TpReducer final : public Reducer {
 public:
  explicit TpReducer(Communicator& tp) : tp_(tp) {}
  bool is_identity() const override { return tp_.size() == 1; }
  void sum(Stream& stream, ConstTensorView parts, TensorView total) override;
  void max(Stream& stream, ConstTensorView parts, TensorView total) override;

 private:
  void reduce(Stream& stream, const ConstTensorView& part, const TensorView& total, ReduceOp op);
  Communicator& tp_;
};

/// A rank holds some of the shards, and no result tells which (run.deterministic = "layout_independent"). Every sum and
/// max is one all-gather of the shards' parts, which are added in the order of the shards.
class ShardReducer final : public Reducer {
 public:
  /// See OrderedSum.
  ShardReducer(Allocator& allocator, Communicator& tp, const ShardBorders& deal) : sum_(allocator, tp, deal) {}
  bool is_identity() const override { return sum_.shards() == 1; }
  bool by_shard() const override { return true; }
  void sum(Stream& stream, ConstTensorView parts, TensorView total) override;
  void max(Stream& stream, ConstTensorView parts, TensorView total) override;

 private:
  OrderedSum sum_;
};

}  // namespace tforge
