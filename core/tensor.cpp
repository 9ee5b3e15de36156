#include "core/tensor.h"

#include <cstring>
#include <utility>

#include "core/copy.h"
#include "core/cuda/runtime.h"
#include "core/cuda_built.h"

namespace tforge {

Tensor::Tensor(const Tensor& other)
    : storage_(other.storage_), offset_(other.offset_), shape_(other.shape_), dtype_(other.dtype_) {
  if (storage_ != nullptr) ++storage_->references_;
}

Tensor::Tensor(Tensor&& other) noexcept
    : storage_(std::exchange(other.storage_, nullptr)),
      offset_(other.offset_),
      shape_(other.shape_),
      dtype_(other.dtype_) {}

Tensor& Tensor::operator=(Tensor other) noexcept {
  std::swap(storage_, other.storage_);
  offset_ = other.offset_;
  shape_ = other.shape_;
  dtype_ = other.dtype_;
  return *this;
}

Tensor::~Tensor() {
  if (storage_ != nullptr && --storage_->references_ == 0) storage_->owner_->release(storage_);
}

Tensor Tensor::empty(Allocator& allocator, const Shape& shape, DType dtype, Purpose purpose) {
  Tensor t;
  t.storage_ = allocator.acquire(static_cast<std::size_t>(shape.elements()) * size_of(dtype), purpose);
  t.shape_ = shape;
  t.dtype_ = dtype;
  return t;
}

Tensor Tensor::zeros(Allocator& allocator, const Shape& shape, DType dtype, Purpose purpose) {
  Tensor t = empty(allocator, shape, dtype, purpose);
  t.fill_zero();
  return t;
}

std::byte* Tensor::address() const {
  return storage_ == nullptr ? nullptr : storage_->data() + offset_ * static_cast<std::int64_t>(size_of(dtype_));
}

TensorView Tensor::view() { return {address(), dtype_, device(), shape_, shape_.columns()}; }
ConstTensorView Tensor::view() const { return {address(), dtype_, device(), shape_, shape_.columns()}; }

Tensor Tensor::rows(std::int64_t first, std::int64_t count) const {
  if (shape_.rank() < 1 || first < 0 || count < 0 || first + count > shape_[0]) {
    throw ShapeError("rows {}..{} of a tensor of shape {}", first, first + count, shape_.text());
  }
  Tensor t = *this;
  const std::int64_t row = shape_[0] == 0 ? 0 : elements() / shape_[0];
  t.offset_ += first * row;
  switch (shape_.rank()) {
    case 1: t.shape_ = Shape{count}; break;
    case 2: t.shape_ = Shape{count, shape_[1]}; break;
    case 3: t.shape_ = Shape{count, shape_[1], shape_[2]}; break;
    default: t.shape_ = Shape{count, shape_[1], shape_[2], shape_[3]}; break;
  }
  return t;
}

Tensor Tensor::reshaped(const Shape& shape) const {
  if (shape.elements() != elements()) {
    throw ShapeError("a tensor of shape {} cannot take shape {}", shape_.text(), shape.text());
  }
  Tensor t = *this;
  t.shape_ = shape;
  return t;
}

void Tensor::check_host() const {
  if (device() != Device::cpu) {
    throw InternalError("a tensor of shape {} in {} memory was asked for its elements", shape_.text(),
                        name_of(device()));
  }
}

void Tensor::fill_zero() {
  if (bytes() == 0 || storage_->owner_->stream().rehearses()) return;
  if constexpr (kCudaBuilt) {
    if (device() == Device::cuda) return cuda::zero(storage_->owner_->stream(), address(), bytes());
  }
  std::memset(address(), 0, bytes());
}

void Tensor::assign(const Tensor& from) {
  copy((device() == Device::cpu ? from : *this).storage_->owner_->stream(), from.view(), view());
}

Tensor Tensor::clone(Allocator& allocator) const {
  Tensor t = empty(allocator, shape_, dtype_, purpose());
  t.assign(*this);
  return t;
}

void Tensor::copy_from(const void* values, std::size_t count, std::size_t size) {
  if (count != static_cast<std::size_t>(elements())) {
    throw ShapeError("{} values for a tensor of shape {}", count, shape_.text());
  }
  if (count * size != bytes()) throw InternalError("values of {} bytes for a tensor of {}", size, name_of(dtype_));
  copy(storage_->owner_->stream(), {values, dtype_, Device::cpu, shape_, shape_.columns()}, view());
}

}  // namespace tforge
