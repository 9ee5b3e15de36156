#include "parallel/buckets.h"

#include <algorithm>
#include <cstddef>

#include "core/errors.h"

namespace tforge {
namespace {

void check(std::span<const FlatBlock> blocks, std::int64_t total, std::int64_t bucket_elements, int ranks) {
  if (bucket_elements < 1 || ranks < 1) {
    throw InternalError("buckets of {} elements for {} ranks", bucket_elements, ranks);
  }
  if (blocks.empty() || blocks.front().offset != 0) throw InternalError("buckets: no parameter lies at element 0");
  for (std::size_t i = 0; i < blocks.size(); ++i) {
    const FlatBlock& b = blocks[i];
    const std::int64_t next = i + 1 < blocks.size() ? blocks[i + 1].offset : total;
    if (b.elements < 1 || b.row_elements < 1 || b.elements % b.row_elements != 0 || b.offset + b.elements > next) {
      throw InternalError("buckets: parameter {} has {} elements in rows of {} at {}, the next begins at {}", i,
                          b.elements, b.row_elements, b.offset, next);
    }
  }
}

/// The row start nearest to `target` among those of `blocks`, or `end`; the earlier one of two equally near.
std::int64_t nearest_row_start(std::span<const FlatBlock> blocks, std::int64_t end, std::int64_t target) {
  // The block that holds the target, perhaps in its padding.
  const auto after = std::ranges::upper_bound(blocks, target, {}, &FlatBlock::offset);
  const FlatBlock& b = *(after - 1);
  const std::int64_t next = after == blocks.end() ? end : after->offset;
  const std::int64_t rows = b.elements / b.row_elements;
  const std::int64_t row = std::min((target - b.offset) / b.row_elements, rows - 1);
  const std::int64_t below = b.offset + row * b.row_elements;
  const std::int64_t above = row + 1 < rows ? below + b.row_elements : next;
  return target - below <= above - target ? below : above;
}

}  // namespace

std::vector<Bucket> make_buckets(std::span<const FlatBlock> blocks, std::int64_t total, std::int64_t bucket_elements,
                                 int ranks) {
  check(blocks, total, bucket_elements, ranks);
  std::vector<Bucket> buckets;
  std::size_t last = blocks.size();  // one past the parameters that have no bucket yet
  std::int64_t end = total;
  while (last > 0) {
    std::size_t first = last - 1;
    while (first > 0 && blocks[first].bucketing == Bucketing::shared &&
           blocks[first - 1].bucketing == Bucketing::shared && end - blocks[first].offset < bucket_elements) {
      --first;
    }
    const std::span<const FlatBlock> mine = blocks.subspan(first, last - first);
    const std::int64_t begin = mine.front().offset;
    Bucket bucket{static_cast<int>(first), static_cast<int>(last - first), {begin}};
    for (int r = 1; r < ranks; ++r) {
      bucket.borders.push_back(nearest_row_start(mine, end, begin + (end - begin) * r / ranks));
    }
    bucket.borders.push_back(end);
    buckets.push_back(std::move(bucket));
    end = begin;
    last = first;
  }
  return buckets;
}

}  // namespace tforge
