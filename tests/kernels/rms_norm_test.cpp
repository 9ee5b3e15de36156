#include "kernels/rms_norm.h"

#include "device_matrix.h"
#include "matrix.h"

namespace tforge {
namespace {

using test::Matrix;
Stream cpu;

TEST(RmsNorm, ByHand) {
  // Row (3, 4): rms sqrt(12.5); a row of zeros stays one, and its gradient is that of x / eps.
  const auto x = Matrix<double>::of(2, 2, {3, 4, 0, 0});
  const auto weight = Matrix<double>::of(1, 2, {2, 5});
  Matrix<double> y(2, 2, 1), rrms(2, 1), dx(2, 2), dweight(1, 2);
  kernels::rms_norm_forward(cpu, x.view(), weight.vector(), 0.5, y.view(), rrms.view());
  const double r = 1 / (std::sqrt(12.5) + 0.5);
  test::expect_near(y, Matrix<double>::of(2, 2, {6 * r, 20 * r, 0, 0}), 1e-15);
  test::expect_near(rrms, Matrix<double>::of(2, 1, {r, 2}), 1e-15);
  const auto dy = Matrix<double>::of(2, 2, {0, 0, 1, 1});
  kernels::rms_norm_backward(cpu, x.view(), weight.vector(), rrms.view(), dy.view(), GradMode::overwrite, dx.view(),
                             GradMode::overwrite, dweight.vector());
  test::expect_near(dx, Matrix<double>::of(2, 2, {0, 0, 4, 10}), 1e-15);
}

TEST(RmsNorm, GradientMatchesFiniteDifferences) {
  constexpr std::int64_t kRows = 5, kColumns = 33;
  auto x = Matrix<double>::random(kRows, kColumns, 1, 2, 3);
  auto weight = Matrix<double>::random(1, kColumns, 2);
  const auto dy = Matrix<double>::random(kRows, kColumns, 4, 1, 1);
  Matrix<double> y(kRows, kColumns), rrms(kRows, 1, 2), dx(kRows, kColumns, 7), dweight(1, kColumns);
  const auto loss = [&] {
    kernels::rms_norm_forward(cpu, x.view(), weight.vector(), 0.1, y.view(), {});
    return y.dot(dy);
  };
  kernels::rms_norm_forward(cpu, x.view(), weight.vector(), 0.1, y.view(), rrms.view());
  const auto backward = [&](GradMode mode) {
    kernels::rms_norm_backward(cpu, x.view(), weight.vector(), rrms.view(), dy.view(), mode, dx.view(), mode,
                               dweight.vector());
  };
  backward(GradMode::overwrite);  // over NaN
  EXPECT_TRUE(dx.padding_untouched());
  test::expect_gradient(x, dx, loss);
  test::expect_gradient(weight, dweight, loss);
  const auto dx_once = dx, dweight_once = dweight;
  backward(GradMode::accumulate);
  for (std::int64_t c = 0; c < kColumns; ++c) {
    EXPECT_DOUBLE_EQ(dx(3, c), 2 * dx_once(3, c));
    EXPECT_DOUBLE_EQ(dweight(0, c), 2 * dweight_once(0, c));
  }
  auto in_place = dy;
  kernels::rms_norm_backward(cpu, x.view(), weight.vector(), rrms.view(), in_place.view(), GradMode::overwrite,
                             in_place.view(), GradMode::overwrite, dweight.vector());
  EXPECT_TRUE(in_place.same_bits(dx_once));
  EXPECT_TRUE(dweight.same_bits(dweight_once));
}

TEST(RmsNorm, BitsDoNotDependOnThreads) {
  const auto x = Matrix<float>::random(700, 65, 1), dy = Matrix<float>::random(700, 65, 2);
  const auto weight = Matrix<float>::random(1, 65, 3);
  Matrix<float> want_y(700, 65), want_dx(700, 65), want_dweight(1, 65);
  test::at_one_and_two_threads([&](int threads) {
    Matrix<float> y(700, 65), rrms(700, 1), dx(700, 65), dweight(1, 65);
    kernels::rms_norm_forward(cpu, x.view(), weight.vector(), 1e-8, y.view(), rrms.view());
    kernels::rms_norm_backward(cpu, x.view(), weight.vector(), rrms.view(), dy.view(), GradMode::overwrite, dx.view(),
                               GradMode::overwrite, dweight.vector());
    if (threads == 2) {
      want_y = y, want_dx = dx, want_dweight = dweight;
      return;
    }
    EXPECT_TRUE(y.same_bits(want_y) && dx.same_bits(want_dx) && dweight.same_bits(want_dweight));
  });
}

TEST(RmsNorm, RefusesWhatDoesNotFit) {
  Matrix<float> x(2, 3), y(2, 4), weight(1, 3);
  EXPECT_THROW(kernels::rms_norm_forward(cpu, x.view(), weight.vector(), 1e-8, y.view(), {}), ShapeError);
  EXPECT_THROW(kernels::rms_norm_forward(cpu, x.view(), Matrix<float>(1, 2).vector(), 1e-8, x.view(), {}), ShapeError);
}

template <class T>
void compare_on_cuda(test::CudaDevice& device, double tolerance) {
  test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
    const auto x = Matrix<T>::random(rows, columns, 1, 2, padding), dy = Matrix<T>::random(rows, columns, 2);
    const auto weight = Matrix<T>::random(1, columns, 3);
    Matrix<T> y(rows, columns, padding), rrms(rows, 1, 2), dx(rows, columns, padding), dweight(1, columns);
    auto want_y = y, want_rrms = rrms, want_dx = dx, want_dweight = dweight;
    const auto run = [](Stream& s, auto x_, auto dy_, auto w, auto y_, auto rrms_, auto dx_, auto dw) {
      kernels::rms_norm_forward(s, x_, w, 1e-5, y_, rrms_);
      for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
        kernels::rms_norm_backward(s, x_, w, rrms_, dy_, mode, dx_, mode, dw);
      }
    };
    test::with_copies(
        device,
        [&](auto x_, auto dy_, auto w, auto y_, auto rrms_, auto dx_, auto dw) {
          run(device.stream, x_, dy_, test::vector_of(w), y_, rrms_, dx_, test::vector_of(dw));
        },
        x, dy, weight, y, rrms, dx, dweight);
    run(cpu, x.view(), dy.view(), weight.vector(), want_y.view(), want_rrms.view(), want_dx.view(),
        want_dweight.vector());
    test::expect_near(y, want_y, tolerance);
    test::expect_near(rrms, want_rrms, tolerance * want_rrms.largest());
    test::expect_near(dx, want_dx, 4 * tolerance * std::max(1.0, want_dx.largest()));
    test::expect_near(dweight, want_dweight, tolerance * std::max(10.0, want_dweight.largest()));
    EXPECT_TRUE(y.padding_untouched() && dx.padding_untouched());
  });
}
TEST(RmsNorm, CudaFollowsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    compare_on_cuda<float>(device, 4e-6);
    compare_on_cuda<double>(device, 1e-14);
  });
}

}  // namespace
}  // namespace tforge
