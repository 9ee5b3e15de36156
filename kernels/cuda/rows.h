#pragma once
// A matrix as the device's kernels see it. Knows views by their members alone, so that .cu files need no header of
// theirs.
#include <cstdint>
#include <type_traits>

namespace tforge::kernels::cuda {

/// `rows` rows of `columns` elements, `stride` elements apart; null when it was left out.
template <class T>
struct Rows {
  T* data = nullptr;
  std::int64_t stride = 0;
  std::int64_t rows = 0;
  std::int64_t columns = 0;

  Rows() = default;
  template <class View>
  Rows(const View& v)  // NOLINT(google-explicit-constructor): the same matrix with its type known
      : data(v ? v.template as<std::remove_const_t<T>>() : nullptr),
        stride(v.row_stride),
        rows(v.rows()),
        columns(v.columns()) {}

  Rows(T* data_, std::int64_t stride_, std::int64_t rows_, std::int64_t columns_)
      : data(data_), stride(stride_), rows(rows_), columns(columns_) {}

  constexpr explicit operator bool() const { return data != nullptr; }
  constexpr T* row(std::int64_t i) const { return data + i * stride; }
  constexpr std::int64_t elements() const { return rows * columns; }
  /// All elements lie in one run.
  constexpr bool contiguous() const { return stride == columns || rows <= 1; }
};

/// To be read only.
template <class T>
Rows<const T> as_const(const Rows<T>& m) {
  return {m.data, m.stride, m.rows, m.columns};
}

}  // namespace tforge::kernels::cuda
