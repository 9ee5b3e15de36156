#pragma once
// How the rows of a parameter that are held here fall into shards.
#include <cstdint>
#include <span>

namespace tforge {

/// `borders` are those of the shards held here as rows of the whole parameter: the rows held here are
/// borders.front() .. borders.back(). Without borders all rows held here are one shard. The borders outlive it.
class RowShards {
 public:
  RowShards() = default;
  explicit RowShards(std::span<const std::int64_t> borders) : borders_(borders) {}

  std::int64_t count() const { return borders_.empty() ? 1 : static_cast<std::int64_t>(borders_.size()) - 1; }
  /// Among the rows held here.
  struct Range {
    std::int64_t first, rows;
  };
  /// Shard `s` of the `rows_here` rows.
  Range range(std::int64_t s, std::int64_t rows_here) const {
    if (borders_.empty()) return {0, rows_here};
    const auto i = static_cast<std::size_t>(s);
    return {borders_[i] - borders_.front(), borders_[i + 1] - borders_[i]};
  }

 private:
  std::span<const std::int64_t> borders_;
};

}  // namespace tforge
