#include "parallel/ordered_sum.h"

#include <array>
#include <utility>

#include "core/errors.h"
#include "kernels/elementwise.h"

namespace tforge {

namespace {

using Views = std::array<ConstTensorView, kMaxShards>;

}  // namespace

OrderedSum::OrderedSum(Allocator& allocator, Communicator& ranks, ShardBorders deal)
    : allocator_(allocator), ranks_(ranks), deal_(std::move(deal)) {
  if (deal_.ranks() != ranks_.size() || deal_.total() < 1 || deal_.total() > kMaxShards) {
    throw InternalError("a sum over {} shards of {} ranks, the group has {}", deal_.total(), deal_.ranks(),
                        ranks_.size());
  }
}

void OrderedSum::require_all(std::size_t parts) const {
  if (static_cast<std::int64_t>(parts) != shards_here()) {
    throw InternalError("{} parts of a sum over {} shards held here", parts, shards_here());
  }
}

template <class Fold>
void OrderedSum::reduce(Stream& stream, std::span<const ConstTensorView> mine, TensorView total, Fold fold) {
  require_all(mine.size());
  if (ranks_.size() == 1) {
    fold(stream, mine, total);
    return;
  }
  const std::int64_t elements = total.elements();
  std::array<std::int64_t, kMaxShards> counts;
  for (int r = 0; r < ranks_.size(); ++r) counts[static_cast<std::size_t>(r)] = deal_.count(r) * elements;
  Tensor all = Tensor::empty(allocator_, Shape{shards(), elements}, total.dtype, Purpose::communication);
  Tensor own = all.rows(deal_.begin(ranks_.rank()), shards_here());
  for (std::size_t i = 0; i < mine.size(); ++i) {
    const TensorView to = own.view().row_range(static_cast<std::int64_t>(i), 1);
    fold(stream, mine.subspan(i, 1), to);
  }
  ranks_.all_gather(stream, std::as_const(own).view(), all.view(),
                    std::span(counts).first(static_cast<std::size_t>(ranks_.size())));
  Views parts;
  for (std::int64_t s = 0; s < shards(); ++s) parts[static_cast<std::size_t>(s)] = all.view().row_range(s, 1);
  fold(stream, std::span<const ConstTensorView>(parts).first(static_cast<std::size_t>(shards())), total);
}

void OrderedSum::sum(Stream& stream, std::span<const ConstTensorView> mine, TensorView total) {
  reduce(stream, mine, total, kernels::add_in_order);
}

void OrderedSum::max(Stream& stream, std::span<const ConstTensorView> mine, TensorView total) {
  reduce(stream, mine, total, kernels::max_in_order);
}

double OrderedSum::sum(Stream& stream, std::span<const double> mine) {
  require_all(mine.size());
  Views parts;
  for (std::size_t i = 0; i < mine.size(); ++i) {
    parts[i] = ConstTensorView{&mine[i], DType::f64, Device::cpu, Shape{1}, 1};
  }
  double total = 0;
  sum(stream, std::span<const ConstTensorView>(parts).first(mine.size()),
      TensorView{&total, DType::f64, Device::cpu, Shape{1}, 1});
  return total;
}

}  // namespace tforge
