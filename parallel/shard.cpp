#include "parallel/shard.h"

#include <algorithm>

#include "core/errors.h"

namespace tforge {
namespace {

/// Appends to `borders` those of `rows` rows split evenly over `ranks` ranks.
void append_even(std::vector<std::int64_t>& borders, std::int64_t rows, int ranks) {
  for (int r = 0; r < ranks; ++r) borders.push_back(borders.back() + rows / ranks + (r < rows % ranks ? 1 : 0));
}

}  // namespace

ShardBorders ShardBorders::even(std::int64_t rows, int ranks, const std::string& what) {
  if (ranks < 1) throw ConfigError("{}: split over {} ranks", what, ranks);
  if (ranks > rows) {
    throw ConfigError("{}: {} rows cannot be split over {} ranks; use at most {} tensor-parallel ranks", what, rows,
                      ranks, rows);
  }
  ShardBorders result;
  result.borders.reserve(static_cast<std::size_t>(ranks) + 1);
  result.borders.push_back(0);
  append_even(result.borders, rows, ranks);
  return result;
}

ShardBorders ShardBorders::append(const ShardBorders& old, std::int64_t rows, int ranks, const std::string& what) {
  const int added_ranks = ranks - old.ranks();
  const std::int64_t added_rows = rows - old.total();
  if (added_ranks < 0) {
    throw ConfigError("{}: appending keeps the {} ranks that own rows, {} are given; use even shards", what,
                      old.ranks(), ranks);
  }
  if (added_rows < 0) throw ConfigError("{}: appending cannot shrink {} rows to {}", what, old.total(), rows);
  if (added_ranks > added_rows) {
    throw ConfigError("{}: {} added rows cannot be split over {} added ranks; add fewer ranks or use even shards", what,
                      added_rows, added_ranks);
  }
  ShardBorders result = old;
  if (added_ranks == 0) {
    result.borders.back() = rows;
  } else {
    append_even(result.borders, added_rows, added_ranks);
  }
  return result;
}

ShardBorders ShardBorders::of_ranks(const ShardBorders& shards, const ShardBorders& deal) {
  ShardBorders result;
  result.borders.reserve(deal.borders.size());
  for (const std::int64_t shard : deal.borders) {
    result.borders.push_back(shards.borders.at(static_cast<std::size_t>(shard)));
  }
  return result;
}

std::int64_t ShardBorders::moved_rows(const ShardBorders& from, const ShardBorders& to) {
  std::int64_t moved = 0;
  for (int r = 0; r < to.ranks(); ++r) {
    const std::int64_t first = to.begin(r);
    const std::int64_t last = std::min(to.end(r), from.total());
    if (first >= last) continue;
    moved += last - first;
    if (r < from.ranks()) {
      moved -= std::max<std::int64_t>(0, std::min(last, from.end(r)) - std::max(first, from.begin(r)));
    }
  }
  return moved;
}

}  // namespace tforge
