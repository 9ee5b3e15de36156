#include "kernels/elementwise.h"

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

TYPED_TEST(Elementwise, InPlace) {
  using T = TypeParam;
  auto a = Matrix<T>::random(33, 31, 1);
  const auto before = a;
  kernels::scale(cpu, 2, a.view(), a.view());
  kernels::add(cpu, before.view(), a.view(), a.view());
  for (std::int64_t i = 0; i < 31; ++i) EXPECT_EQ(a(5, i), before(5, i) + 2 * before(5, i));
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

TEST(ElementwiseErrors, NameTheOperand) {
  Matrix<float> a(2, 3), b(3, 2);
  Matrix<double> d(2, 3);
  Matrix<std::int32_t> integers(2, 3);
  EXPECT_THROW(kernels::add(cpu, a.view(), b.view(), a.view()), ShapeError);
  EXPECT_THROW(kernels::add_to(cpu, d.view(), GradMode::accumulate, a.view()), DTypeError);
  EXPECT_THROW(kernels::fill(cpu, integers.view(), 1), DTypeError);
  Stream cuda(Device::cuda);
  EXPECT_THROW(kernels::fill(cuda, a.view(), 1), DeviceError);
  kernels::fill(cpu, Matrix<float>(0, 3).view(), 1);  // nothing to do is not an error
}

}  // namespace
}  // namespace tforge
