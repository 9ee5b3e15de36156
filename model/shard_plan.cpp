#include "model/shard_plan.h"

#include <span>

#include "core/errors.h"
#include "model/attention.h"
#include "model/models.h"

namespace tforge {

namespace {

void split_heads_and_vocab(ShardPlan& plan, const ModelConfig& config, int tp) {
  plan.heads = ShardBorders::even(config.heads, tp, "model.heads");
  plan.vocab = ShardBorders::even(config.vocab, tp, "model.vocab");
}

}  // namespace

RowShards row_shards(const ShardBorders& shards, const ShardBorders& deal, int rank) {
  return RowShards(
      std::span(shards.borders)
          .subspan(static_cast<std::size_t>(deal.begin(rank)), static_cast<std::size_t>(deal.count(rank)) + 1));
}

ShardPlan ShardPlan::even(const ModelConfig& config, int tp) {
  ShardPlan plan;
  for (const ShardAxis& axis : kind_of(config).axes(config)) {
    plan.units.push_back(ShardBorders::even(axis.extent, tp, axis.key));
  }
  split_heads_and_vocab(plan, config, tp);
  return plan;
}

ShardPlan ShardPlan::append(const ModelConfig& config, int tp, const std::vector<ShardBorders>& old_units) {
  ShardPlan plan;
  const std::vector<ShardAxis> axes = kind_of(config).axes(config);
  for (std::size_t a = 0; a < axes.size(); ++a) {
    plan.units.push_back(ShardBorders::append(old_units.at(a), axes[a].extent, tp, axes[a].key));
  }
  split_heads_and_vocab(plan, config, tp);
  return plan;
}

ShardPlan ShardPlan::dealt(const ModelConfig& config, int shards, int tp) {
  if (tp > shards) {
    throw ConfigError("parallel.virtual_tp = {} shards cannot be dealt to {} tensor-parallel ranks; use at most {}",
                      shards, tp, shards);
  }
  const auto cut = [shards](std::int64_t rows, const std::string& what) {
    if (rows < shards) {
      throw ConfigError("{} = {} cannot be cut into parallel.virtual_tp = {} shards; use fewer shards", what, rows,
                        shards);
    }
    return ShardBorders::even(rows, shards, what);
  };
  ShardPlan plan;
  split_heads_and_vocab(plan, config, tp);
  VirtualShards& cuts = plan.shards.emplace();
  cuts.deal = ShardBorders::even(shards, tp, "parallel.virtual_tp");
  for (const ShardAxis& axis : kind_of(config).axes(config)) {
    cuts.units.push_back(cut(axis.extent, axis.key));
    plan.units.push_back(ShardBorders::of_ranks(cuts.units.back(), cuts.deal));
  }
  cuts.vocab = cut(config.vocab, "model.vocab");
  plan.vocab = ShardBorders::of_ranks(cuts.vocab, cuts.deal);
  if (kind_of(config).weights_by_heads() || attention_parameters(config) > 0) {
    cuts.heads = cut(config.heads, "model.heads");
    plan.heads = ShardBorders::of_ranks(*cuts.heads, cuts.deal);
  }
  return plan;
}

RowShards ShardPlan::unit_shards(std::size_t axis, int rank) const {
  return shards ? row_shards(shards->units[axis], shards->deal, rank) : RowShards();
}

RowShards ShardPlan::vocab_shards(int rank) const {
  return shards ? row_shards(shards->vocab, shards->deal, rank) : RowShards();
}

}  // namespace tforge
