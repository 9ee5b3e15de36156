#pragma once
// Operands of kernel tests: matrices with NaN between their rows, a finite-difference check, thread counts.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/device.h"
#include "core/rng.h"
#include "core/tensor.h"
#include "kernels/gemm.h"

namespace tforge::test {

/// A [rows, columns] matrix whose rows lie `padding` NaN elements apart; born NaN throughout.
template <class T>
class Matrix {
 public:
  Matrix(std::int64_t rows, std::int64_t columns, std::int64_t padding = 0)
      : rows_(rows),
        columns_(columns),
        stride_(columns + padding),
        data_(static_cast<std::size_t>(rows * stride_) + 1, not_a_number()) {}
  static Matrix random(std::int64_t rows, std::int64_t columns, std::uint64_t seed, double size = 1,
                       std::int64_t padding = 0) {
    Matrix m(rows, columns, padding);
    const Rng rng(seed, "matrix");
    for (std::int64_t i = 0; i < rows * columns; ++i) {
      m(i / columns, i % columns) = static_cast<T>(size * rng.normal(static_cast<std::uint64_t>(i)));
    }
    return m;
  }
  static Matrix of(std::int64_t rows, std::int64_t columns, const std::vector<T>& values) {
    Matrix m(rows, columns);
    std::copy(values.begin(), values.end(), m.data_.begin());
    return m;
  }

  T& operator()(std::int64_t r, std::int64_t c) { return data_[static_cast<std::size_t>(r * stride_ + c)]; }
  const T& operator()(std::int64_t r, std::int64_t c) const { return data_[static_cast<std::size_t>(r * stride_ + c)]; }
  std::int64_t rows() const { return rows_; }
  std::int64_t columns() const { return columns_; }
  TensorView view() { return {data_.data(), dtype_of<T>::value, Device::cpu, Shape{rows_, columns_}, stride_}; }
  ConstTensorView view() const {
    return {data_.data(), dtype_of<T>::value, Device::cpu, Shape{rows_, columns_}, stride_};
  }
  /// The one row of the matrix as a vector of rank 1.
  TensorView vector() { return {data_.data(), dtype_of<T>::value, Device::cpu, Shape{columns_}, columns_}; }
  ConstTensorView vector() const { return {data_.data(), dtype_of<T>::value, Device::cpu, Shape{columns_}, columns_}; }

  /// Sum of the products of the elements: a random linear loss when `other` is random.
  double dot(const Matrix& other) const {
    double sum = 0;
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = 0; c < columns_; ++c)
        sum += static_cast<double>((*this)(r, c)) * static_cast<double>(other(r, c));
    }
    return sum;
  }
  double largest() const {
    double most = 0;
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = 0; c < columns_; ++c) most = std::max(most, std::abs(static_cast<double>((*this)(r, c))));
    }
    return most;
  }
  /// The same bits, padding aside.
  bool same_bits(const Matrix& other) const {
    if (rows_ != other.rows_ || columns_ != other.columns_) return false;
    for (std::int64_t r = 0; r < rows_; ++r) {
      const auto bytes = static_cast<std::size_t>(columns_) * sizeof(T);
      if (bytes != 0 && std::memcmp(&(*this)(r, 0), &other(r, 0), bytes) != 0) return false;
    }
    return true;
  }
  /// Nothing was written between the rows.
  bool padding_untouched() const {
    for (std::int64_t r = 0; r < rows_; ++r) {
      for (std::int64_t c = columns_; c < stride_; ++c) {
        if (!std::isnan(static_cast<float>((*this)(r, c)))) return false;
      }
    }
    return true;
  }

 private:
  static T not_a_number() {
    if constexpr (std::is_same_v<T, bf16>) return bf16(std::numeric_limits<float>::quiet_NaN());
    else return std::numeric_limits<T>::quiet_NaN();
  }
  std::int64_t rows_, columns_, stride_;
  std::vector<T> data_;
};

/// Every element of `got` within `tolerance` of `want`; NaN is never near.
template <class T, class U>
void expect_near(const Matrix<T>& got, const Matrix<U>& want, double tolerance) {
  ASSERT_EQ(got.rows(), want.rows());
  ASSERT_EQ(got.columns(), want.columns());
  for (std::int64_t r = 0; r < got.rows(); ++r) {
    for (std::int64_t c = 0; c < got.columns(); ++c) {
      ASSERT_NEAR(static_cast<double>(got(r, c)), static_cast<double>(want(r, c)), tolerance) << r << ", " << c;
    }
  }
}

/// Compares `gradient` with central differences of `loss`, which reads `x`. The step balances truncation against
/// rounding (cube root of epsilon), hence an error near epsilon^(2/3). Fails when the gradient is too small to tell.
template <class Loss>
void expect_gradient(Matrix<double>& x, const Matrix<double>& gradient, const Loss& loss) {
  constexpr double kStep = 6e-6;
  kernels::start_cpu_runtime(1);  // thousands of small calls: threads would only wait for each other
  const double size = gradient.largest();
  ASSERT_GT(size, 1e-2) << "the gradient is too near zero to be checked";
  for (std::int64_t r = 0; r < x.rows(); ++r) {
    for (std::int64_t c = 0; c < x.columns(); ++c) {
      const double before = x(r, c);
      x(r, c) = before + kStep;
      const double up = loss();
      x(r, c) = before - kStep;
      const double down = loss();
      x(r, c) = before;
      ASSERT_NEAR(gradient(r, c), (up - down) / (2 * kStep), 2e-8 * std::max(1.0, size)) << r << ", " << c;
    }
  }
}

/// Runs `f` with one and with two threads, then leaves one.
template <class F>
void at_one_and_two_threads(const F& f) {
  kernels::start_cpu_runtime(2);
  f(2);
  kernels::start_cpu_runtime(1);
  f(1);
}

inline constexpr std::int64_t kAwkwardSizes[] = {1, 31, 33, 257};

}  // namespace tforge::test
