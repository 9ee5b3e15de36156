#include "kernels/layer_norm.h"

#include "device_matrix.h"
#include "matrix.h"

namespace tforge {
namespace {

using test::Matrix;
Stream cpu;
constexpr TensorView kNone;
constexpr double kEps = 1e-5;

TEST(LayerNorm, ByHand) {
  // Row (1, 3): mean 2, variance 1. Row (5, 5): variance 0, so the output is the bias.
  const auto x = Matrix<double>::of(2, 2, {1, 3, 5, 5});
  const auto weight = Matrix<double>::of(1, 2, {2, 4});
  const auto bias = Matrix<double>::of(1, 2, {10, 20});
  Matrix<double> y(2, 2), mean(2, 1), rstd(2, 1);
  kernels::layer_norm_forward(cpu, x.view(), weight.vector(), bias.vector(), 3.0, y.view(), mean.view(), rstd.view());
  EXPECT_DOUBLE_EQ(y(0, 0), 10 - 2 * 0.5);  // rstd = 1 / sqrt(1 + 3)
  EXPECT_DOUBLE_EQ(y(0, 1), 20 + 4 * 0.5);
  EXPECT_DOUBLE_EQ(y(1, 0), 10);
  EXPECT_DOUBLE_EQ(y(1, 1), 20);
  EXPECT_DOUBLE_EQ(mean(0, 0), 2);
  EXPECT_DOUBLE_EQ(mean(1, 0), 5);
  EXPECT_DOUBLE_EQ(rstd(0, 0), 0.5);
}

class LayerNormGradient : public testing::TestWithParam<bool> {};

TEST_P(LayerNormGradient, MatchesFiniteDifferences) {
  const bool parameters = GetParam();
  constexpr std::int64_t kRows = 5, kColumns = 33;
  auto x = Matrix<double>::random(kRows, kColumns, 1, 2, 3);
  auto weight = Matrix<double>::random(1, kColumns, 2);
  auto bias = Matrix<double>::random(1, kColumns, 3);
  const auto dy = Matrix<double>::random(kRows, kColumns, 4, 1, 1);
  const TensorView w = parameters ? weight.vector() : kNone;
  const TensorView b = parameters ? bias.vector() : kNone;
  Matrix<double> y(kRows, kColumns), mean(kRows, 1, 2), rstd(kRows, 1, 2);
  const auto loss = [&] {
    kernels::layer_norm_forward(cpu, x.view(), w, b, kEps, y.view(), kNone, kNone);
    return y.dot(dy);
  };
  kernels::layer_norm_forward(cpu, x.view(), w, b, kEps, y.view(), mean.view(), rstd.view());
  Matrix<double> dx(kRows, kColumns, 7), dweight(1, kColumns), dbias(1, kColumns);
  const TensorView dw = parameters ? dweight.vector() : kNone;
  const TensorView db = parameters ? dbias.vector() : kNone;
  const auto backward = [&](GradMode mode) {
    kernels::layer_norm_backward(cpu, x.view(), w, mean.view(), rstd.view(), dy.view(), mode, dx.view(), mode, dw, db);
  };
  backward(GradMode::overwrite);  // over NaN
  EXPECT_TRUE(dx.padding_untouched());
  test::expect_gradient(x, dx, loss);
  if (parameters) {
    test::expect_gradient(weight, dweight, loss);
    test::expect_gradient(bias, dbias, loss);
  }
  // Twice the gradient after accumulating; dx over dy gives the same bits.
  auto once = dx;
  const auto dweight_once = dweight;
  backward(GradMode::accumulate);
  for (std::int64_t c = 0; c < kColumns; ++c) {
    EXPECT_DOUBLE_EQ(dx(3, c), 2 * once(3, c));
    if (parameters) {
      EXPECT_DOUBLE_EQ(dweight(0, c), 2 * dweight_once(0, c));
    }
  }
  if (!parameters) {  // from the result alone
    Matrix<double> from_y(x.rows(), kColumns);
    loss();  // y of x as it is now
    kernels::layer_norm_backward(cpu, y.view(), w, {}, rstd.view(), dy.view(), GradMode::overwrite, from_y.view(),
                                 GradMode::overwrite, dw, db);
    EXPECT_TRUE(from_y.same_bits(once));
  }
  auto in_place = dy;
  kernels::layer_norm_backward(cpu, x.view(), w, mean.view(), rstd.view(), in_place.view(), GradMode::overwrite,
                               in_place.view(), GradMode::overwrite, dw, db);
  EXPECT_TRUE(in_place.same_bits(once));
  if (parameters) {
    EXPECT_TRUE(dweight.same_bits(dweight_once));
    // An empty dx: parameters only.
    kernels::layer_norm_backward(cpu, x.view(), w, mean.view(), rstd.view(), dy.view(), GradMode::overwrite, kNone,
                                 GradMode::accumulate, dw, db);
    EXPECT_DOUBLE_EQ(dweight(0, 1), 2 * dweight_once(0, 1));
  }
}
INSTANTIATE_TEST_SUITE_P(WithAndWithoutParameters, LayerNormGradient, testing::Bool());

/// The formulas of the contract in f64, row by row.
void reference(const Matrix<float>& x, const Matrix<float>& weight, const Matrix<float>& bias, const Matrix<float>& dy,
               Matrix<double>& y, Matrix<double>& dx, Matrix<double>& dweight, Matrix<double>& dbias) {
  const std::int64_t d = x.columns();
  const auto n = static_cast<double>(d);
  for (std::int64_t c = 0; c < d; ++c) dweight(0, c) = dbias(0, c) = 0;
  for (std::int64_t r = 0; r < x.rows(); ++r) {
    double mean = 0, variance = 0, mean_g = 0, mean_gx = 0;
    for (std::int64_t c = 0; c < d; ++c) mean += x(r, c) / n;
    for (std::int64_t c = 0; c < d; ++c) variance += (x(r, c) - mean) * (x(r, c) - mean) / n;
    const double rstd = 1 / std::sqrt(variance + kEps);
    const auto hat = [&](std::int64_t c) { return (x(r, c) - mean) * rstd; };
    const auto g = [&](std::int64_t c) { return static_cast<double>(dy(r, c)) * weight(0, c); };
    for (std::int64_t c = 0; c < d; ++c) {
      y(r, c) = hat(c) * weight(0, c) + bias(0, c);
      dweight(0, c) += dy(r, c) * hat(c);
      dbias(0, c) += dy(r, c);
      mean_g += g(c) / n;
      mean_gx += g(c) * hat(c) / n;
    }
    for (std::int64_t c = 0; c < d; ++c) dx(r, c) = rstd * (g(c) - mean_g - hat(c) * mean_gx);
  }
}

TEST(LayerNorm, FloatFollowsTheFormulasAtAwkwardSizesAndAnyThreads) {
  for (const std::int64_t d : test::kAwkwardSizes) {
    for (const std::int64_t rows : {1, 33, 300}) {
      const auto x = Matrix<float>::random(rows, d, 1, 3, 1);
      const auto dy = Matrix<float>::random(rows, d, 2);
      const auto weight = Matrix<float>::random(1, d, 3);
      const auto bias = Matrix<float>::random(1, d, 4);
      Matrix<double> want_y(rows, d), want_dx(rows, d), want_dweight(1, d), want_dbias(1, d);
      reference(x, weight, bias, dy, want_y, want_dx, want_dweight, want_dbias);
      std::vector<Matrix<float>> first;
      test::at_one_and_two_threads([&](int) {
        Matrix<float> y(rows, d), dx(rows, d), dweight(1, d), dbias(1, d), mean(rows, 1), rstd(rows, 1);
        kernels::layer_norm_forward(cpu, x.view(), weight.vector(), bias.vector(), kEps, y.view(), mean.view(),
                                    rstd.view());
        kernels::layer_norm_backward(cpu, x.view(), weight.vector(), mean.view(), rstd.view(), dy.view(),
                                     GradMode::overwrite, dx.view(), GradMode::overwrite, dweight.vector(),
                                     dbias.vector());
        test::expect_near(y, want_y, 4e-6 * std::max(1.0, want_y.largest()));
        // With one column rstd is 1 / sqrt(eps) and the gradient 0: its rounding is magnified.
        test::expect_near(dx, want_dx, 1e-5 * std::max(1.0, want_dx.largest()));
        test::expect_near(dweight, want_dweight, 1e-5 * std::max(1.0, want_dweight.largest()));
        test::expect_near(dbias, want_dbias, 1e-5 * std::max(1.0, want_dbias.largest()));
        if (first.empty()) {
          first = {y, dx, dweight, dbias};
        } else {
          EXPECT_TRUE(y.same_bits(first[0]) && dx.same_bits(first[1]) && dweight.same_bits(first[2]) &&
                      dbias.same_bits(first[3]));
        }
      });
    }
  }
}

TEST(LayerNorm, RefusesWhatDoesNotFit) {
  Matrix<float> x(4, 3), y(4, 3), w(1, 3), wide(1, 4), mean(4, 1);
  Matrix<double> y64(4, 3);
  EXPECT_THROW(kernels::layer_norm_forward(cpu, x.view(), w.vector(), kNone, kEps, y.view(), kNone, kNone), ShapeError);
  EXPECT_THROW(kernels::layer_norm_forward(cpu, x.view(), wide.vector(), w.vector(), kEps, y.view(), kNone, kNone),
               ShapeError);
  EXPECT_THROW(kernels::layer_norm_forward(cpu, x.view(), kNone, kNone, kEps, y64.view(), kNone, kNone), DTypeError);
  EXPECT_THROW(kernels::layer_norm_forward(cpu, x.view(), kNone, kNone, kEps, y.view(), x.view(), kNone), ShapeError);
  EXPECT_THROW(kernels::layer_norm_backward(cpu, x.view(), kNone, mean.view(), kNone, y.view(), GradMode::overwrite,
                                            x.view(), GradMode::overwrite, kNone, kNone),
               Error);
}

template <class T>
void compare_on_cuda(test::CudaDevice& device, double tolerance) {
  Stream& stream = device.stream;
  test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
    const auto x = Matrix<T>::random(rows, columns, 1, 2, padding), dy = Matrix<T>::random(rows, columns, 2);
    const auto weight = Matrix<T>::random(1, columns, 3), bias = Matrix<T>::random(1, columns, 4);
    struct Results {
      Matrix<T> y, plain, mean, rstd, dx, dplain, dweight, dbias;
    };
    const auto nan = [&] {
      return Results{{rows, columns, padding}, {rows, columns}, {rows, 1, 2}, {rows, 1},
                     {rows, columns, padding}, {rows, columns}, {1, columns}, {1, columns}};
    };
    const auto run = [](Stream& s, auto x_, auto dy_, auto w, auto b, auto y, auto plain, auto mean, auto rstd, auto dx,
                        auto dplain, auto dw, auto db) {
      // Without parameters first, whose backward reads the result; then with them.
      kernels::layer_norm_forward(s, x_, kNone, kNone, kEps, plain, mean, rstd);
      kernels::layer_norm_backward(s, plain, kNone, kNone, rstd, dy_, GradMode::overwrite, dplain, GradMode::overwrite,
                                   kNone, kNone);
      kernels::layer_norm_forward(s, x_, w, b, kEps, y, mean, rstd);
      for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
        kernels::layer_norm_backward(s, x_, w, mean, rstd, dy_, mode, dx, mode, dw, db);
      }
    };
    Results got = nan(), want = nan();
    test::with_copies(
        device,
        [&](auto x_, auto dy_, auto w, auto b, auto y, auto plain, auto mean, auto rstd, auto dx, auto dplain, auto dw,
            auto db) {
          run(stream, x_, dy_, test::vector_of(w), test::vector_of(b), y, plain, mean, rstd, dx, dplain,
              test::vector_of(dw), test::vector_of(db));
        },
        x, dy, weight, bias, got.y, got.plain, got.mean, got.rstd, got.dx, got.dplain, got.dweight, got.dbias);
    run(cpu, x.view(), dy.view(), weight.vector(), bias.vector(), want.y.view(), want.plain.view(), want.mean.view(),
        want.rstd.view(), want.dx.view(), want.dplain.view(), want.dweight.vector(), want.dbias.vector());
    // One column has no spread: 1/std is 1/sqrt(eps), and what it multiplies is rounding.
    const double t = columns == 1 ? 1e3 * tolerance : tolerance;
    test::expect_near(got.y, want.y, t);
    test::expect_near(got.plain, want.plain, t);
    test::expect_near(got.mean, want.mean, t);
    test::expect_near(got.rstd, want.rstd, t * want.rstd.largest());
    test::expect_near(got.dx, want.dx, 4 * t);
    test::expect_near(got.dplain, want.dplain, 4 * t);
    test::expect_near(got.dweight, want.dweight, t * std::max(10.0, want.dweight.largest()));
    test::expect_near(got.dbias, want.dbias, t * std::max(10.0, want.dbias.largest()));
    EXPECT_TRUE(got.y.padding_untouched() && got.mean.padding_untouched() && got.dx.padding_untouched());
  });
}
TEST(LayerNorm, CudaFollowsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    compare_on_cuda<float>(device, 4e-6);
    compare_on_cuda<double>(device, 1e-14);
  });
}

}  // namespace
}  // namespace tforge
