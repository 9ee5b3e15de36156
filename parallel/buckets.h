#pragma once
// Buckets: the flat gradient tensor cut at parameter borders into pieces that are reduced one by one while backward
// still runs, and within each bucket the part that every data-parallel rank owns. A pure function of the shapes, so
// all ranks of a data-parallel group cut alike.
#include <cstdint>
#include <span>
#include <vector>

namespace tforge {

/// shared: lies in a bucket with its neighbours where they fit. alone: has a bucket to itself, like a parameter that is
/// ready at another time than its neighbours (a tied embedding).
enum class Bucketing : std::uint8_t { shared, alone };

/// Where one parameter lies in the flat tensor. What follows it up to the next parameter is padding.
struct FlatBlock {
  std::int64_t offset = 0;
  std::int64_t elements = 0;
  std::int64_t row_elements = 1;  // of one row; a vector is one row
  Bucketing bucketing = Bucketing::shared;
};

/// Parameters [first_parameter, first_parameter + parameters) and their padding: the flat elements
/// [borders.front(), borders.back()).
struct Bucket {
  int first_parameter = 0;
  int parameters = 0;
  /// Rank r of dp owns the flat elements [borders[r], borders[r + 1]); each border is the start of a row of a parameter
  /// or the end of the bucket. A rank may own nothing of a bucket.
  std::vector<std::int64_t> borders;

  std::int64_t begin() const { return borders.front(); }
  std::int64_t end() const { return borders.back(); }
  std::int64_t elements() const { return end() - begin(); }
  std::int64_t begin(int rank) const { return borders[static_cast<std::size_t>(rank)]; }
  std::int64_t end(int rank) const { return borders[static_cast<std::size_t>(rank) + 1]; }
  std::int64_t elements(int rank) const { return end(rank) - begin(rank); }
};

/// Cuts a flat tensor of `total` elements that holds `blocks` (in flat order, the first at 0, none overlapping) into
/// buckets that cover it all. Order: from the last parameter to the first, as backward finishes them. A bucket takes
/// parameters until it has `bucket_elements` or more. `ranks` is the size of dp; the border before rank r is the row
/// start nearest to the r-th of `ranks` even parts.
/// Throws InternalError for blocks that overlap, or sizes below 1.
std::vector<Bucket> make_buckets(std::span<const FlatBlock> blocks, std::int64_t total, std::int64_t bucket_elements,
                                 int ranks);

}  // namespace tforge
