#pragma once
// CUDA kernels behind kernels/elementwise.h; operands are already checked.
#include <cstdint>

#include "core/bf16.h"
#include "core/device.h"
#include "kernels/cuda/rows.h"

namespace tforge::kernels::cuda {

/// Operands of add_in_order and max_in_order, by value in the kernel's parameters.
inline constexpr int kMostParts = 64;
template <class T>
struct Parts {
  const T* data[kMostParts];
  int count;
};

template <class T>
void fill(const Stream& stream, Rows<T> y, T value);
template <class T>
void add_to(const Stream& stream, Rows<const T> x, GradMode mode, Rows<T> y);
template <class T>
void add(const Stream& stream, Rows<const T> a, Rows<const T> b, Rows<T> y);
template <class T>
void add_in_order(const Stream& stream, const Parts<T>& parts, T* y, std::int64_t count);
template <class T>
void max_in_order(const Stream& stream, const Parts<T>& parts, T* y, std::int64_t count);
template <class T>
void scale(const Stream& stream, Compute<T> alpha, Rows<const T> x, Rows<T> y);
/// row: y.columns numbers
template <class T>
void add_row(const Stream& stream, const Compute<T>* row, Rows<T> y);
template <class T>
void column_sums(const Stream& stream, Rows<const T> x, GradMode mode, Compute<T>* y);
template <class T>
void sum_to(const Stream& stream, const T* x, std::int64_t count, GradMode mode, T* sum);
void to_bf16(const Stream& stream, Rows<const float> x, Rows<bf16> y);
void from_bf16(const Stream& stream, Rows<const bf16> x, Rows<float> y);

}  // namespace tforge::kernels::cuda
