#pragma once
// Which rows of a model's parameters each tensor-parallel rank owns.
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "autograd/row_shards.h"
#include "model/config.h"
#include "parallel/shard.h"

namespace tforge {

/// An extent that the ranks of tp share and that growth adds to: the parameter tokens of a layer group, for example.
/// It is the same in every block. A kind of model lists its own (ModelKind::axes).
struct ShardAxis {
  std::string key;  // of the configuration, "model.tokens.ffn"
  std::int64_t extent = 0;
  std::string parameter;  // one in block 0 whose rows these are,
  std::int64_t rows = 1;  // so many a unit of the extent
};

/// What the ranks of tp hold when nothing may depend on how many they are: whole virtual shards, cut by the shapes
/// alone.
struct VirtualShards {
  ShardBorders deal;                // of the shards, by rank
  std::vector<ShardBorders> units;  // by axis, of the rows by shard
  ShardBorders vocab;
  std::optional<ShardBorders> heads;  // where weights belong to heads (ModelKind::weights_by_heads, linformer)
};

/// The rows that `rank` holds of what `shards` cut; of the memory of `shards`.
RowShards row_shards(const ShardBorders& shards, const ShardBorders& deal, int rank);

struct ShardPlan {
  std::vector<ShardBorders> units;  // by axis of the model's kind
  ShardBorders vocab;
  ShardBorders heads;
  std::optional<VirtualShards> shards;  // if they decide about units and vocab

  /// Even splits. Throws ConfigError naming the key when tp is larger than an axis, the heads or the vocabulary.
  static ShardPlan even(const ModelConfig& config, int tp);
  /// Axes: old ranks keep their rows, added ranks own the added ones (ShardBorders::append); heads and vocabulary are
  /// split evenly. Throws ConfigError.
  static ShardPlan append(const ModelConfig& config, int tp, const std::vector<ShardBorders>& old_units);
  /// `shards` virtual shards, evenly cut and evenly dealt. Heads are cut so as well where weights belong to them, and
  /// otherwise split evenly over the ranks, as each is computed apart from the others. Throws ConfigError when there
  /// are fewer shards than ranks, or more than rows of an axis, words or such heads.
  static ShardPlan dealt(const ModelConfig& config, int shards, int tp);

  /// The shards of the rows that a rank owns of an axis, or of the vocabulary: of this plan's memory.
  RowShards unit_shards(std::size_t axis, int rank) const;
  RowShards vocab_shards(int rank) const;
};

}  // namespace tforge
