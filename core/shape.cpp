#include "core/shape.h"

#include "core/errors.h"

namespace tforge {

Shape::Shape(std::initializer_list<std::int64_t> extents) {
  if (extents.size() > kMaxRank) throw ShapeError("a shape has at most {} axes, not {}", kMaxRank, extents.size());
  for (const std::int64_t extent : extents) {
    if (extent < 0) throw ShapeError("extent {} of a shape is negative", extent);
    extents_[static_cast<std::size_t>(rank_++)] = extent;
  }
}

std::int64_t Shape::elements() const {
  std::int64_t n = 1;
  for (int i = 0; i < rank_; ++i) n *= (*this)[i];
  return n;
}

std::int64_t Shape::rows() const {
  std::int64_t n = 1;
  for (int i = 0; i + 1 < rank_; ++i) n *= (*this)[i];
  return n;
}

std::int64_t Shape::columns() const { return rank_ == 0 ? 1 : (*this)[rank_ - 1]; }

std::string Shape::text() const {
  std::string s = "[";
  for (int i = 0; i < rank_; ++i) s += (i > 0 ? ", " : "") + std::to_string((*this)[i]);
  return s + "]";
}

}  // namespace tforge
