#pragma once
// Sums that do not depend on which rank holds what: every part is added in the order of the parts.
#include <cstdint>
#include <span>

#include "core/allocator.h"
#include "core/tensor.h"
#include "parallel/communicator.h"
#include "parallel/shard.h"

namespace tforge {

/// Most parts of a sum: its bookkeeping lives on the stack.
inline constexpr int kMaxShards = 64;

/// Adds one part a shard over the shards of all ranks, ((p_0 + p_1) + p_2) + ..., which takes one all-gather: an
/// all-reduce adds what a rank holds first, and the rest in an order of its own.
class OrderedSum {
 public:
  /// Rank r holds the shards deal.begin(r) .. deal.end(r). Allocator and ranks outlive it.
  /// Throws InternalError when `deal` is not one of these ranks, or of more than kMaxShards shards.
  OrderedSum(Allocator& allocator, Communicator& ranks, ShardBorders deal);

  std::int64_t shards() const { return deal_.total(); }
  std::int64_t shards_here() const { return deal_.count(ranks_.rank()); }

  /// total = sum over all shards, the same bits on every rank. `mine`: one part for each shard held here, in order;
  /// contiguous, all of the elements and dtype (f32 or f64) of `total`, which may be one of them. Collective.
  void sum(Stream& stream, std::span<const ConstTensorView> mine, TensorView total);
  void max(Stream& stream, std::span<const ConstTensorView> mine, TensorView total);
  /// Of one number a shard.
  double sum(Stream& stream, std::span<const double> mine);

 private:
  void require_all(std::size_t parts) const;
  template <class Fold>
  void reduce(Stream& stream, std::span<const ConstTensorView> mine, TensorView total, Fold fold);

  Allocator& allocator_;
  Communicator& ranks_;
  ShardBorders deal_;
};

}  // namespace tforge
