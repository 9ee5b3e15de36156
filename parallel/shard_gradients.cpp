#include "parallel/shard_gradients.h"

#include <algorithm>
#include <array>
#include <utility>

#include "kernels/elementwise.h"

namespace tforge {

ShardGradients::ShardGradients(Allocator& allocator, OrderedSum& sum, Tensor flat, std::int64_t piece)
    : sum_(sum), flat_(std::move(flat)), piece_(std::max<std::int64_t>(piece, 1)) {
  for (std::int64_t s = 0; s + 1 < sum.shards_here(); ++s) {
    kept_.push_back(Tensor::empty(allocator, flat_.shape(), flat_.dtype(), Purpose::gradients));
  }
}

void ShardGradients::keep(Stream& stream, std::int64_t shard) {
  kernels::add_to(stream, std::as_const(flat_).view(), GradMode::overwrite,
                  kept_.at(static_cast<std::size_t>(shard)).view());
}

void ShardGradients::finish(Stream& stream) {
  std::array<ConstTensorView, kMaxShards> parts;
  for (std::int64_t first = 0; first < flat_.elements(); first += piece_) {
    const std::int64_t count = std::min(piece_, flat_.elements() - first);
    for (std::size_t s = 0; s < kept_.size(); ++s) parts[s] = std::as_const(kept_[s]).rows(first, count).view();
    Tensor piece = flat_.rows(first, count);
    parts[kept_.size()] = piece.view();
    sum_.sum(stream, std::span<const ConstTensorView>(parts).first(kept_.size() + 1), piece.view());
  }
}

}  // namespace tforge
