#pragma once
// Shape of a tensor: up to four extents, row-major.
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

namespace tforge {

class Shape {
 public:
  static constexpr int kMaxRank = 4;
  Shape() = default;
  /// Throws ShapeError for more than kMaxRank extents or a negative one.
  Shape(std::initializer_list<std::int64_t> extents);

  int rank() const { return rank_; }
  std::int64_t operator[](int axis) const { return extents_[static_cast<std::size_t>(axis)]; }
  /// Product of all extents; 1 for a scalar (rank 0).
  std::int64_t elements() const;
  /// Product of all extents but the last: the rows of the tensor seen as a matrix. 1 for rank 0 and 1.
  std::int64_t rows() const;
  /// Last extent; 1 for rank 0.
  std::int64_t columns() const;
  bool operator==(const Shape& other) const = default;
  /// "[3, 19, 32]"
  std::string text() const;

 private:
  std::array<std::int64_t, kMaxRank> extents_{};
  int rank_ = 0;
};

}  // namespace tforge
