#include "kernels/gelu.h"

#include <cmath>

#include "device_matrix.h"
#include "matrix.h"

namespace tforge {
namespace {

using test::Matrix;
Stream cpu;

double cdf(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double slope(double x) { return cdf(x) + x * std::exp(-0.5 * x * x) / std::sqrt(2 * M_PI); }

TEST(Gelu, ByHand) {
  const auto x = Matrix<double>::of(1, 3, {0, 1, -1});
  Matrix<double> y(1, 3);
  kernels::gelu_forward(cpu, x.view(), y.view());
  EXPECT_EQ(y(0, 0), 0);
  EXPECT_NEAR(y(0, 1), 0.8413447460685429, 1e-15);
  EXPECT_NEAR(y(0, 2), -0.15865525393145707, 1e-15);
}

TEST(Gelu, F32StaysNearTheExactFunction) {
  constexpr std::int64_t kCount = 200001;  // [-10, 10]
  Matrix<float> x(1, kCount), y(1, kCount), dx(1, kCount), one(1, kCount);
  for (std::int64_t i = 0; i < kCount; ++i) {
    x(0, i) = static_cast<float>(static_cast<double>(i - kCount / 2) * 1e-4);
    one(0, i) = 1;
  }
  kernels::gelu_forward(cpu, x.view(), y.view());
  kernels::gelu_backward(cpu, x.view(), one.view(), GradMode::overwrite, dx.view());
  double value_error = 0, relative_error = 0, slope_error = 0;
  for (std::int64_t i = 0; i < kCount; ++i) {
    const double exact = x(0, i) * cdf(x(0, i));
    value_error = std::max(value_error, std::abs(y(0, i) - exact) / std::max(1.0, std::abs(exact)));
    if (x(0, i) != 0 && x(0, i) > -6) relative_error = std::max(relative_error, std::abs(y(0, i) / exact - 1));
    slope_error = std::max(slope_error, std::abs(dx(0, i) - slope(x(0, i))));
  }
  EXPECT_LT(value_error, 2e-7);
  EXPECT_LT(relative_error, 2e-5);  // the lower tail keeps its digits
  EXPECT_LT(slope_error, 2e-7);
}

TEST(Gelu, LargeInputsAndNaN) {
  const auto x = Matrix<float>::of(1, 4, {1e30F, -100, std::nanf(""), 0});
  Matrix<float> y(1, 4);
  kernels::gelu_forward(cpu, x.view(), y.view());
  EXPECT_EQ(y(0, 0), 1e30F);
  EXPECT_NEAR(y(0, 1), 0, 1e-30);
  EXPECT_TRUE(std::isnan(y(0, 2)));
  EXPECT_EQ(y(0, 3), 0);
}

TEST(Gelu, GradientModesAndAliases) {
  auto x = Matrix<double>::random(5, 37, 1, 2, 3);
  const auto dy = Matrix<double>::random(5, 37, 2);
  Matrix<double> y(5, 37, 1), dx(5, 37, 2);
  const auto loss = [&] {
    kernels::gelu_forward(cpu, x.view(), y.view());
    return y.dot(dy);
  };
  kernels::gelu_backward(cpu, x.view(), dy.view(), GradMode::overwrite, dx.view());
  EXPECT_TRUE(dx.padding_untouched());
  test::expect_gradient(x, dx, loss);
  EXPECT_TRUE(y.padding_untouched());

  auto twice = dx;
  kernels::gelu_backward(cpu, x.view(), dy.view(), GradMode::accumulate, twice.view());
  for (std::int64_t i = 0; i < 5; ++i) {
    for (std::int64_t j = 0; j < 37; ++j) EXPECT_DOUBLE_EQ(twice(i, j), 2 * dx(i, j));
  }
  auto in_place = dy;
  kernels::gelu_backward(cpu, x.view(), in_place.view(), GradMode::overwrite, in_place.view());
  EXPECT_TRUE(in_place.same_bits(dx));
  auto over = x;
  kernels::gelu_forward(cpu, over.view(), over.view());
  kernels::gelu_forward(cpu, x.view(), y.view());
  EXPECT_TRUE(over.same_bits(y));
}

TEST(Gelu, ThreadsAndStridesDoNotShow) {
  const auto x = Matrix<float>::random(70, 333, 1);
  const auto strided = Matrix<float>::random(70, 333, 1, 1, 5);
  Matrix<float> first(70, 333), second(70, 333), rows(70, 333, 3);
  test::at_one_and_two_threads(
      [&](int threads) { kernels::gelu_forward(cpu, x.view(), threads == 2 ? second.view() : first.view()); });
  EXPECT_TRUE(first.same_bits(second));
  kernels::gelu_forward(cpu, strided.view(), rows.view());
  EXPECT_TRUE(rows.same_bits(first));
}

TEST(Gelu, RefusesOperandsThatDoNotFit) {
  Matrix<float> a(2, 3), b(3, 2);
  Matrix<double> d(2, 3);
  EXPECT_THROW(kernels::gelu_forward(cpu, a.view(), b.view()), ShapeError);
  EXPECT_THROW(kernels::gelu_forward(cpu, a.view(), d.view()), DTypeError);
  EXPECT_THROW(kernels::gelu_backward(cpu, a.view(), b.view(), GradMode::overwrite, a.view()), ShapeError);
  TensorView whole_numbers = a.view();
  whole_numbers.dtype = DType::i32;
  EXPECT_THROW(kernels::gelu_forward(cpu, whole_numbers, whole_numbers), DTypeError);
}

template <class T>
void compare_on_cuda(test::CudaDevice& device, double tolerance) {
  test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
    const auto x = Matrix<T>::random(rows, columns, 1, 2, padding), dy = Matrix<T>::random(rows, columns, 2);
    Matrix<T> y(rows, columns, padding), want_y(rows, columns), dx(rows, columns, padding), want_dx(rows, columns);
    test::with_copies(
        device,
        [&](auto x_, auto dy_, auto y_, auto dx_) {
          kernels::gelu_forward(device.stream, x_, y_);
          kernels::gelu_backward(device.stream, x_, dy_, GradMode::overwrite, dx_);
          kernels::gelu_backward(device.stream, x_, dy_, GradMode::accumulate, dx_);
        },
        x, dy, y, dx);
    kernels::gelu_forward(cpu, x.view(), want_y.view());
    kernels::gelu_backward(cpu, x.view(), dy.view(), GradMode::overwrite, want_dx.view());
    kernels::gelu_backward(cpu, x.view(), dy.view(), GradMode::accumulate, want_dx.view());
    test::expect_near(y, want_y, tolerance);
    test::expect_near(dx, want_dx, 4 * tolerance);
    EXPECT_TRUE(y.padding_untouched() && dx.padding_untouched());
  });
}
TEST(Gelu, CudaFollowsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    compare_on_cuda<float>(device, 2e-6);
    compare_on_cuda<double>(device, 1e-14);
  });
}

TEST(Gelu, CudaRefusesHostMemory) {
  test::on_cuda([](test::CudaDevice& device) {
    Matrix<float> x(2, 3);
    EXPECT_THROW(kernels::gelu_forward(device.stream, x.view(), x.view()), InternalError);
  });
}

}  // namespace
}  // namespace tforge
