#pragma once
// Tensor: shared storage plus a row-major view of it. TensorView / ConstTensorView: what kernels take.
#include <cstdint>
#include <span>

#include "core/allocator.h"
#include "core/device.h"
#include "core/dtype.h"
#include "core/errors.h"
#include "core/shape.h"

namespace tforge {

/// A non-owning matrix-like view: `shape.rows()` rows of `shape.columns()` contiguous elements, rows `row_stride`
/// elements apart. A tensor of rank > 2 is seen as its rows.
template <bool kConst>
struct BasicView {
  using Pointer = std::conditional_t<kConst, const void*, void*>;
  Pointer data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  Shape shape;
  std::int64_t row_stride = 0;

  std::int64_t rows() const { return shape.rows(); }
  std::int64_t columns() const { return shape.columns(); }
  std::int64_t elements() const { return shape.elements(); }
  bool contiguous() const { return row_stride == columns() || rows() <= 1; }
  explicit operator bool() const { return data != nullptr; }

  /// First element as T. Throws DTypeError when T is not the view's dtype.
  template <class T>
  auto as() const {
    if (dtype != dtype_of<T>::value) {
      throw DTypeError("a tensor of {} was read as {}", name_of(dtype), name_of(dtype_of<T>::value));
    }
    if constexpr (kConst) return static_cast<const T*>(data);
    else return static_cast<T*>(data);
  }

  /// Columns [first, first + count) of every row, as a matrix. Throws ShapeError when out of range.
  BasicView column_range(std::int64_t first, std::int64_t count) const {
    if (first < 0 || count < 0 || first + count > columns()) {
      throw ShapeError("columns {}..{} of a view of shape {}", first, first + count, shape.text());
    }
    BasicView v = *this;
    v.data = offset(first);
    v.shape = Shape{rows(), count};
    return v;
  }
  /// Rows [first, first + count), as a matrix. Throws ShapeError when out of range.
  BasicView row_range(std::int64_t first, std::int64_t count) const {
    if (first < 0 || count < 0 || first + count > rows()) {
      throw ShapeError("rows {}..{} of a view of shape {}", first, first + count, shape.text());
    }
    BasicView v = *this;
    v.data = offset(first * row_stride);
    v.shape = Shape{count, columns()};
    return v;
  }

  // NOLINTNEXTLINE(google-explicit-constructor): what may be written may be read
  operator BasicView<true>() const requires(!kConst) { return {data, dtype, device, shape, row_stride}; }

 private:
  Pointer offset(std::int64_t elements_) const {
    using Byte = std::conditional_t<kConst, const std::byte, std::byte>;
    return static_cast<Byte*>(data) + elements_ * static_cast<std::int64_t>(size_of(dtype));
  }
};
using TensorView = BasicView<false>;
using ConstTensorView = BasicView<true>;

/// A contiguous tensor that shares its storage with its copies and with the views taken of it.
class Tensor {
 public:
  Tensor() = default;
  Tensor(const Tensor& other);
  Tensor(Tensor&& other) noexcept;
  Tensor& operator=(Tensor other) noexcept;
  ~Tensor();

  /// Uninitialised. Throws ResourceError when memory runs out.
  static Tensor empty(Allocator& allocator, const Shape& shape, DType dtype, Purpose purpose);
  static Tensor zeros(Allocator& allocator, const Shape& shape, DType dtype, Purpose purpose);
  /// Copy of `values` as T's dtype. Throws ShapeError when the number of values is not that of the shape.
  template <class T>
  static Tensor of(Allocator& allocator, const Shape& shape, std::span<const T> values, Purpose purpose) {
    Tensor t = empty(allocator, shape, dtype_of<T>::value, purpose);
    t.copy_from(values.data(), values.size(), sizeof(T));
    return t;
  }

  explicit operator bool() const { return storage_ != nullptr; }
  Device device() const { return storage_ == nullptr ? Device::cpu : storage_->owner_->device(); }
  const Shape& shape() const { return shape_; }
  DType dtype() const { return dtype_; }
  std::int64_t elements() const { return shape_.elements(); }
  std::size_t bytes() const { return static_cast<std::size_t>(elements()) * size_of(dtype_); }
  Purpose purpose() const { return storage_->purpose(); }
  /// True when no other tensor shares the storage: only then may it be changed in place behind an op's back.
  bool unique() const { return storage_ != nullptr && storage_->references_ == 1; }

  TensorView view();
  ConstTensorView view() const;
  /// All elements as T, of a tensor in host memory. Throws DTypeError when T is not the dtype, InternalError for
  /// another device.
  template <class T>
  std::span<T> span() {
    check_host();
    return {view().template as<T>(), static_cast<std::size_t>(elements())};
  }
  template <class T>
  std::span<const T> span() const {
    check_host();
    return {view().template as<T>(), static_cast<std::size_t>(elements())};
  }

  /// Rows [first, first + count) along the leading axis; shares storage. Throws ShapeError when out of range.
  Tensor rows(std::int64_t first, std::int64_t count) const;
  /// The same elements under another shape; shares storage. Throws ShapeError when the number differs.
  Tensor reshaped(const Shape& shape) const;
  /// Queued on the allocator's stream.
  void fill_zero();
  /// Takes over the elements of a tensor of the same shape and dtype, wherever that lives; see core/copy.h.
  void assign(const Tensor& from);
  /// A copy with storage of its own, in the memory of `allocator`; see core/copy.h. The way to a device and back.
  Tensor clone(Allocator& allocator) const;

 private:
  void check_host() const;
  void copy_from(const void* values, std::size_t count, std::size_t size);
  std::byte* address() const;

  Storage* storage_ = nullptr;
  std::int64_t offset_ = 0;  // in elements
  Shape shape_;
  DType dtype_ = DType::f32;
};

}  // namespace tforge
