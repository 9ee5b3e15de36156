#pragma once
// Shard borders as data: which rows of a parameter each tensor-parallel rank owns.
#include <cstdint>
#include <string>
#include <vector>

namespace tforge {

/// borders[r] .. borders[r + 1] are the rows of rank r; borders.front() == 0, borders.back() == rows of the whole.
/// Ranks may own different numbers of rows.
struct ShardBorders {
  std::vector<std::int64_t> borders;

  int ranks() const { return static_cast<int>(borders.size()) - 1; }
  std::int64_t total() const { return borders.back(); }
  std::int64_t begin(int rank) const { return borders[static_cast<std::size_t>(rank)]; }
  std::int64_t end(int rank) const { return borders[static_cast<std::size_t>(rank) + 1]; }
  std::int64_t count(int rank) const { return end(rank) - begin(rank); }
  bool operator==(const ShardBorders&) const = default;

  /// Rows split as evenly as possible, the first rows % ranks ranks own one more (5 on 3: 2, 2, 1).
  /// Throws ConfigError naming `what` when there are more ranks than rows.
  static ShardBorders even(std::int64_t rows, int ranks, const std::string& what);

  /// After growth from old.total() to `rows` on old.ranks() + added ranks: every old rank keeps its rows, the added
  /// ranks own the added rows, evenly. With no added rank the last rank takes the added rows.
  /// Throws ConfigError naming `what` when ranks < old.ranks() or when an added rank would own nothing.
  static ShardBorders append(const ShardBorders& old, std::int64_t rows, int ranks, const std::string& what);

  /// The rows of ranks that hold whole shards: rank r those of the shards deal.begin(r) .. deal.end(r).
  static ShardBorders of_ranks(const ShardBorders& shards, const ShardBorders& deal);

  /// Rows that rank r of the new borders owns and did not own under the old ones although they existed: the old rows
  /// that move.
  static std::int64_t moved_rows(const ShardBorders& from, const ShardBorders& to);
};

}  // namespace tforge
