#pragma once
// What the kernels of attention share: the rows of one head, products of tiles, and pieces of a thread's workspace.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/device.h"
#include "kernels/cpu/tile.h"

namespace tforge::kernels::cpu {

inline constexpr std::int64_t kPad = 32;  // workspace extents are multiples of this; so is every panel width

constexpr std::int64_t padded(std::int64_t n) { return (n + kPad - 1) / kPad * kPad; }

/// A matrix whose element (i, k) is data[i * row + k * step].
template <class T>
struct Left {
  const T* data;
  std::int64_t row;
  std::int64_t step;
};
/// One panel: row k starts at data + k * row.
template <class T>
struct Panel {
  const T* data;
  std::int64_t row;
};
/// Panels, `panel` elements apart: kPanelColumns for rows that lie whole.
template <class T>
struct Right {
  const T* data;
  std::int64_t row;
  std::int64_t panel = kPanelColumns<T>;
};

/// c [rows, panel] {=, +=} a [rows, depth] b [depth, panel] for up to kTileRows rows.
template <class T>
void tile(std::int64_t rows, std::int64_t depth, Left<T> a, Panel<T> b, GradMode mode, T* c, std::int64_t c_row) {
  tile_product<T>()(rows, depth, a.data, a.row, a.step, b.data, b.row, c, c_row, mode);
}

/// c [rows, columns] {=, +=} a [rows, depth] b [depth, columns], whole panels of b and c.
template <class T>
void product(std::int64_t rows, std::int64_t depth, std::int64_t columns, Left<T> a, Right<T> b, GradMode mode, T* c,
             std::int64_t c_row) {
  for (std::int64_t j = 0; j < columns; j += kPanelColumns<T>) {
    const Panel<T> panel{b.data + j / kPanelColumns<T> * b.panel, b.row};
    for (std::int64_t i = 0; i < rows; i += kTileRows) {
      tile<T>(std::min(kTileRows, rows - i), depth, {a.data + i * a.row, a.row, a.step}, panel, mode, c + i * c_row + j,
              c_row);
    }
  }
}

/// Hands out pieces of a thread's workspace.
template <class T>
class Pieces {
 public:
  explicit Pieces(T* next) : next_(next) {}
  T* take(std::int64_t elements) {
    T* piece = next_;
    next_ += elements;
    return piece;
  }

 private:
  T* next_;
};

/// The rows of one head of one sequence.
template <class T>
struct Head {
  T* data;
  std::int64_t row;
  T* at(std::int64_t i) const { return data + i * row; }
  Head from(std::int64_t i) const { return {at(i), row}; }
};
template <class T, class View>
auto head_of(const View& view, std::int64_t first_row, std::int64_t column) {
  auto* data = view.template as<T>() + first_row * view.row_stride + column;
  return Head<std::remove_pointer_t<decltype(data)>>{data, view.row_stride};
}

}  // namespace tforge::kernels::cpu
