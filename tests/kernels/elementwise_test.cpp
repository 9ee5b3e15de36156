#include "kernels/elementwise.h"

#include <bit>
#include <cmath>
#include <limits>

#include "device_matrix.h"
#include "matrix.h"

namespace tforge {
namespace {

using test::Matrix;
Stream cpu;

template <class T>
class Elementwise : public testing::Test {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(Elementwise, Types);

TYPED_TEST(Elementwise, ByHandWithRowStrides) {
  using T = TypeParam;
  for (const std::int64_t rows : test::kAwkwardSizes) {
    for (const std::int64_t columns : test::kAwkwardSizes) {
      const auto a = Matrix<T>::random(rows, columns, 1, 1, 3);
      const auto b = Matrix<T>::random(rows, columns, 2, 1, 5);
      Matrix<T> sum(rows, columns, 1), copy(rows, columns, 2), twice(rows, columns), constant(rows, columns, 4);
      kernels::add(cpu, a.view(), b.view(), sum.view());
      kernels::add_to(cpu, a.view(), GradMode::overwrite, copy.view());
      kernels::add_to(cpu, b.view(), GradMode::accumulate, copy.view());
      kernels::scale(cpu, -2.5, a.view(), twice.view());
      kernels::fill(cpu, constant.view(), 7);
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < columns; ++c) {
          ASSERT_EQ(sum(r, c), a(r, c) + b(r, c));
          ASSERT_EQ(copy(r, c), a(r, c) + b(r, c));
          ASSERT_EQ(twice(r, c), T(-2.5) * a(r, c));
          ASSERT_EQ(constant(r, c), T(7));
        }
      }
      EXPECT_TRUE(sum.padding_untouched() && copy.padding_untouched() && constant.padding_untouched());
    }
  }
}

TYPED_TEST(Elementwise, RowsAndColumns) {
  using T = TypeParam;
  for (const std::int64_t rows : test::kAwkwardSizes) {
    for (const std::int64_t columns : test::kAwkwardSizes) {
      const auto x = Matrix<T>::random(rows, columns, 1, 1, 3);
      const auto row = Matrix<T>::random(1, columns, 2);
      Matrix<T> first(1, columns);  // with one thread
      test::at_one_and_two_threads([&](int threads) {
        auto y = x;
        kernels::add_row(cpu, row.vector(), y.view());
        Matrix<T> sums(1, columns), more = row;
        kernels::column_sums(cpu, x.view(), GradMode::overwrite, sums.vector());
        kernels::column_sums(cpu, x.view(), GradMode::accumulate, more.vector());
        for (std::int64_t c = 0; c < columns; ++c) {
          double want = 0, size = 0;
          for (std::int64_t r = 0; r < rows; ++r) {
            ASSERT_EQ(y(r, c), x(r, c) + row(0, c));
            want += static_cast<double>(x(r, c));
            size += std::abs(static_cast<double>(x(r, c)));
          }
          ASSERT_NEAR(static_cast<double>(sums(0, c)), want, (sizeof(T) == 4 ? 1e-6 : 1e-15) * (1 + size));
          ASSERT_EQ(more(0, c), row(0, c) + sums(0, c));
        }
        EXPECT_TRUE(y.padding_untouched());
        if (threads == 2) first = sums;
        else EXPECT_TRUE(first.same_bits(sums));
      });
    }
  }
  Matrix<T> y(3, 5);
  const Matrix<T> wrong(1, 4);
  EXPECT_THROW(kernels::add_row(cpu, wrong.vector(), y.view()), ShapeError);
  EXPECT_THROW(kernels::column_sums(cpu, y.view(), GradMode::overwrite, Matrix<T>(1, 4).vector()), ShapeError);
}

TYPED_TEST(Elementwise, InPlace) {
  using T = TypeParam;
  auto a = Matrix<T>::random(33, 31, 1);
  const auto before = a;
  kernels::scale(cpu, 2, a.view(), a.view());
  kernels::add(cpu, before.view(), a.view(), a.view());
  for (std::int64_t i = 0; i < 31; ++i) EXPECT_EQ(a(5, i), before(5, i) + 2 * before(5, i));
}

TYPED_TEST(Elementwise, PartsInOrder) {
  using T = TypeParam;
  // (large + 1) - large is 0 in both types, 1 in another order.
  const T large = sizeof(T) == 4 ? T(1e8) : T(1e17);
  for (const std::int64_t count : {1, 63, 64, 20011}) {
    std::vector<Matrix<T>> parts;
    for (const T value : {large, T(1), -large}) {
      parts.emplace_back(1, count);
      kernels::fill(cpu, parts.back().view(), static_cast<double>(value));
    }
    const std::vector<ConstTensorView> views{parts[0].view(), parts[1].view(), parts[2].view()};
    Matrix<T> y(1, count);
    test::at_one_and_two_threads([&](int) {
      kernels::add_in_order(cpu, views, y.view());
      for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(y(0, i), T(0));
      kernels::max_in_order(cpu, views, y.view());
      for (std::int64_t i = 0; i < count; ++i) ASSERT_EQ(y(0, i), large);
    });
    kernels::add_in_order(cpu, std::span(views).first(1), y.view());
    EXPECT_EQ(y(0, count - 1), large);
    kernels::add_in_order(cpu, views, parts[2].view());  // over one of them
    EXPECT_EQ(parts[2](0, count - 1), T(0));
  }
  Matrix<T> nan(1, 3), y(1, 3);
  kernels::fill(cpu, y.view(), 0);
  kernels::fill(cpu, nan.view(), std::numeric_limits<double>::quiet_NaN());
  for (const bool first : {true, false}) {
    const std::vector<ConstTensorView> views{first ? nan.view() : y.view(), first ? y.view() : nan.view()};
    Matrix<T> got(1, 3);
    kernels::max_in_order(cpu, views, got.view());
    EXPECT_TRUE(std::isnan(got(0, 2)));
  }
  EXPECT_THROW(kernels::add_in_order(cpu, {}, y.view()), ShapeError);
  const Matrix<T> longer(1, 4);
  const std::vector<ConstTensorView> unlike{longer.view()};
  EXPECT_THROW(kernels::add_in_order(cpu, unlike, y.view()), ShapeError);
}

TYPED_TEST(Elementwise, LongerThanOneChunk) {
  using T = TypeParam;
  const auto a = Matrix<T>::random(3, 20011, 1);
  Matrix<T> y(3, 20011), strided(3, 20011, 1);
  test::at_one_and_two_threads([&](int) {
    kernels::add(cpu, a.view(), a.view(), y.view());
    kernels::add(cpu, a.view(), a.view(), strided.view());
    EXPECT_TRUE(y.same_bits(strided));
    for (std::int64_t r = 0; r < 3; ++r) {
      for (std::int64_t c = 0; c < 20011; ++c) ASSERT_EQ(y(r, c), 2 * a(r, c));
    }
  });
}

/// Every class of float bits on either side of the rounding: the vector code against the scalar conversion.
TEST(Convert, RoundsLikeTheScalarAndComesBackExactly) {
  constexpr std::int64_t kColumns = 517;
  Matrix<float> x(64, kColumns, 3), back(64, kColumns, 1);
  Matrix<bf16> y(64, kColumns, 5);
  std::uint32_t bits = 0;
  for (std::int64_t r = 0; r < 64; ++r) {
    for (std::int64_t c = 0; c < kColumns; ++c) {
      // Upper halves over the whole range, infinities and NaN with them; lower halves around a tie.
      bits += 0x0001fffdU;
      const std::uint32_t low[] = {0x0000U, 0x7fffU, 0x8000U, 0x8001U, 0xffffU};
      x(r, c) = std::bit_cast<float>((bits & 0xffff0000U) | low[(r + c) % 5]);
    }
  }
  x(0, 0) = std::numeric_limits<float>::infinity();
  x(0, 1) = std::bit_cast<float>(0x7f800001U);  // a NaN whose upper half alone is an infinity
  x(0, 2) = std::numeric_limits<float>::max();
  x(0, 3) = -0.F;
  test::at_one_and_two_threads([&](int) {
    kernels::convert(cpu, x.view(), y.view());
    kernels::convert(cpu, y.view(), back.view());
    for (std::int64_t r = 0; r < 64; ++r) {
      for (std::int64_t c = 0; c < kColumns; ++c) {
        ASSERT_EQ(y(r, c).bits, bf16(x(r, c)).bits) << std::bit_cast<std::uint32_t>(x(r, c));
        ASSERT_EQ(std::bit_cast<std::uint32_t>(back(r, c)), std::uint32_t{y(r, c).bits} << 16);
      }
    }
  });
  EXPECT_TRUE(std::isnan(back(0, 1)));
  EXPECT_TRUE(std::isinf(back(0, 2)));
  EXPECT_TRUE(y.padding_untouched() && back.padding_untouched());
}

TEST(Convert, IsBetweenF32AndBf16) {
  Matrix<float> x(2, 3);
  Matrix<double> d(2, 3);
  Matrix<bf16> y(2, 3), other(3, 2);
  EXPECT_THROW(kernels::convert(cpu, d.view(), y.view()), DTypeError);
  EXPECT_THROW(kernels::convert(cpu, x.view(), x.view()), DTypeError);
  EXPECT_THROW(kernels::convert(cpu, x.view(), other.view()), ShapeError);
}

TEST(ElementwiseErrors, NameTheOperand) {
  Matrix<float> a(2, 3), b(3, 2);
  Matrix<double> d(2, 3);
  Matrix<std::int32_t> integers(2, 3);
  EXPECT_THROW(kernels::add(cpu, a.view(), b.view(), a.view()), ShapeError);
  EXPECT_THROW(kernels::add_to(cpu, d.view(), GradMode::accumulate, a.view()), DTypeError);
  EXPECT_THROW(kernels::fill(cpu, integers.view(), 1), DTypeError);
  Stream cuda(Device::cuda);
  EXPECT_THROW(kernels::fill(cuda, a.view(), 1), Error);  // no code for it in this build, or memory of the host
  kernels::fill(cpu, Matrix<float>(0, 3).view(), 1);      // nothing to do is not an error
}

template <class T>
void compare_on_cuda(test::CudaDevice& device) {
  Stream& stream = device.stream;
  test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
    const auto a = Matrix<T>::random(rows, columns, 1, 1, padding), b = Matrix<T>::random(rows, columns, 2);
    const auto nan = [&] { return Matrix<T>(rows, columns, padding); };
    // One operation each way: no rounding may differ.
    const auto compare = [&](const auto& f) {
      auto got = nan(), want = nan();
      test::with_copies(
          device, [&](auto a_, auto b_, auto y) { f(stream, a_, b_, y); }, a, b, got);
      f(cpu, a.view(), b.view(), want.view());
      EXPECT_TRUE(got.same_bits(want));
      EXPECT_TRUE(got.padding_untouched());
    };
    compare([](Stream& s, ConstTensorView, ConstTensorView, TensorView y) { kernels::fill(s, y, 0.5); });
    compare([](Stream& s, ConstTensorView x, ConstTensorView z, TensorView y) {
      kernels::add_to(s, x, GradMode::overwrite, y);
      kernels::add_to(s, z, GradMode::accumulate, y);
    });
    compare([](Stream& s, ConstTensorView x, ConstTensorView z, TensorView y) {
      kernels::add(s, x, z, y);
      kernels::add(s, y, z, y);
    });
    compare([](Stream& s, ConstTensorView x, ConstTensorView, TensorView y) { kernels::scale(s, 0.3, x, y); });
    if (padding == 0) {
      compare([](Stream& s, ConstTensorView x, ConstTensorView z, TensorView y) {
        const ConstTensorView parts[] = {x, z, x};
        kernels::add_in_order(s, parts, y);
        const ConstTensorView more[] = {z, y};
        kernels::max_in_order(s, more, y);
      });
    }
  });
}
TEST(Elementwise, CudaGivesTheCpusBits) {
  test::on_cuda([](test::CudaDevice& device) {
    compare_on_cuda<float>(device);
    compare_on_cuda<double>(device);
  });
}

TEST(Elementwise, CudaRoundsToBf16AsTheCpuDoes) {
  test::on_cuda([](test::CudaDevice& device) {
    test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
      auto x = Matrix<float>::random(rows, columns, 1, 1e3, padding);
      x(0, 0) = std::numeric_limits<float>::quiet_NaN();
      x(0, columns - 1) = std::numeric_limits<float>::max();
      x(rows - 1, columns / 2) = 1.00390625F;  // a tie
      Matrix<bf16> half(rows, columns, padding), want_half(rows, columns);
      Matrix<float> back(rows, columns), want_back(rows, columns);
      test::with_copies(
          device,
          [&](auto x_, auto half_, auto back_) {
            kernels::convert(device.stream, x_, half_);
            kernels::convert(device.stream, half_, back_);
          },
          x, half, back);
      kernels::convert(cpu, x.view(), want_half.view());
      kernels::convert(cpu, want_half.view(), want_back.view());
      if (std::isnan(want_back(0, 0))) {  // stays one, if of other bits
        EXPECT_TRUE(std::isnan(static_cast<float>(half(0, 0))) && std::isnan(back(0, 0)));
        half(0, 0) = want_half(0, 0);
        back(0, 0) = want_back(0, 0);
      }
      EXPECT_TRUE(half.same_bits(want_half));
      EXPECT_TRUE(back.same_bits(want_back));
    });
  });
}

TEST(Elementwise, SumsInOrder) {
  const auto x = Matrix<double>::of(1, 3, {1e16, 1, -1e16});
  auto sum = Matrix<double>::of(1, 1, {NAN});
  kernels::sum_to(cpu, x.vector(), GradMode::overwrite, sum.vector());
  EXPECT_EQ(sum(0, 0), 0);  // 1e16 + 1 rounds to 1e16
  kernels::sum_to(cpu, Matrix<double>::of(1, 2, {3, 4}).vector(), GradMode::accumulate, sum.vector());
  EXPECT_EQ(sum(0, 0), 7);
  kernels::sum_to(cpu, Matrix<double>(1, 0).vector(), GradMode::overwrite, sum.vector());
  EXPECT_EQ(sum(0, 0), 0);
}

template <class T>
void compare_rows_on_cuda(test::CudaDevice& device, double tolerance) {
  test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
    const auto x = Matrix<T>::random(rows, columns, 1, 1, padding), row = Matrix<T>::random(1, columns, 2);
    auto y = x;
    Matrix<T> sums(1, columns), want_sums(1, columns);
    auto want_y = y;
    const auto run = [](Stream& s, auto x_, auto row_, auto y_, auto sums_) {
      kernels::add_row(s, row_, y_);
      kernels::column_sums(s, x_, GradMode::overwrite, sums_);
      kernels::column_sums(s, x_, GradMode::accumulate, sums_);
    };
    test::with_copies(
        device,
        [&](auto x_, auto row_, auto y_, auto sums_) {
          run(device.stream, x_, test::vector_of(row_), y_, test::vector_of(sums_));
        },
        x, row, y, sums);
    run(cpu, x.view(), row.vector(), want_y.view(), want_sums.vector());
    EXPECT_TRUE(y.same_bits(want_y));
    EXPECT_TRUE(y.padding_untouched());
    // The device adds in pairs, the processor one after another.
    test::expect_near(sums, want_sums, tolerance * std::sqrt(static_cast<double>(rows)) * want_sums.largest());
  });
}
TEST(Elementwise, CudaAddsRows) {
  test::on_cuda([](test::CudaDevice& device) {
    compare_rows_on_cuda<float>(device, 0x1p-22);
    compare_rows_on_cuda<double>(device, 0x1p-51);
  });
}

TEST(Elementwise, CudaColumnSumsHaveTheSameBitsWhereverRowsBegin) {
  test::on_cuda([](test::CudaDevice& device) {
    const auto sums_of = [&](std::int64_t padding) {
      const auto x = Matrix<float>::random(1030, 44, 1, 1, padding);
      Matrix<float> sums(1, 44);
      test::with_copies(
          device,
          [&](auto x_, auto y) { kernels::column_sums(device.stream, x_, GradMode::overwrite, test::vector_of(y)); }, x,
          sums);
      return sums;
    };
    EXPECT_TRUE(sums_of(0).same_bits(sums_of(1)));
  });
}

TEST(Elementwise, CudaSums) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const std::int64_t count : {0, 1, 31, 33, 257, 1284}) {
      const auto x = Matrix<double>::random(1, count, 1);
      Matrix<double> sum(1, 1), want(1, 1);
      test::with_copies(
          device,
          [&](auto x_, auto sum_) {
            kernels::sum_to(device.stream, test::vector_of(x_), GradMode::overwrite, sum_);
            kernels::sum_to(device.stream, test::vector_of(x_), GradMode::accumulate, sum_);
          },
          x, sum);
      kernels::sum_to(cpu, x.vector(), GradMode::overwrite, want.vector());
      EXPECT_NEAR(sum(0, 0), 2 * want(0, 0), 1e-12);
    }
  });
}

}  // namespace
}  // namespace tforge
