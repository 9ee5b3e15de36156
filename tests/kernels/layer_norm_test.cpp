#include "kernels/layer_norm.h"

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

TEST(LayerNorm, FloatAgreesWithDoubleAtAwkwardSizesAndAnyThreads) {
  for (const std::int64_t d : test::kAwkwardSizes) {
    for (const std::int64_t rows : {std::int64_t{1}, std::int64_t{33}, std::int64_t{300}}) {
      const auto x = Matrix<float>::random(rows, d, 1, 3, 1);
      const auto dy = Matrix<float>::random(rows, d, 2);
      const auto weight = Matrix<float>::random(1, d, 3);
      const auto bias = Matrix<float>::random(1, d, 4);
      Matrix<double> x64(rows, d), dy64(rows, d), weight64(1, d), bias64(1, d);
      for (std::int64_t r = 0; r < rows; ++r) {
        for (std::int64_t c = 0; c < d; ++c) x64(r, c) = x(r, c), dy64(r, c) = dy(r, c);
      }
      for (std::int64_t c = 0; c < d; ++c) weight64(0, c) = weight(0, c), bias64(0, c) = bias(0, c);
      const auto run = [&](const auto& x_, const auto& w_, const auto& b_, const auto& dy_, auto& y, auto& dx, auto& dw,
                           auto& db) {
        auto mean = y, rstd = y;
        const TensorView m = mean.view().column_range(0, 1), s = rstd.view().column_range(0, 1);
        kernels::layer_norm_forward(cpu, x_.view(), w_.vector(), b_.vector(), kEps, y.view(), m, s);
        kernels::layer_norm_backward(cpu, x_.view(), w_.vector(), m, s, dy_.view(), GradMode::overwrite, dx.view(),
                                     GradMode::overwrite, dw.vector(), db.vector());
      };
      Matrix<double> y64(rows, d), dx64(rows, d), dw64(1, d), db64(1, d);
      run(x64, weight64, bias64, dy64, y64, dx64, dw64, db64);
      std::vector<Matrix<float>> first;
      test::at_one_and_two_threads([&](int) {
        Matrix<float> y(rows, d), dx(rows, d), dw(1, d), db(1, d);
        run(x, weight, bias, dy, y, dx, dw, db);
        test::expect_near(y, y64, 4e-6 * std::max(1.0, y64.largest()));
        // One column: x - mean is 0 and rstd is huge; the gradient is rounding times rstd.
        if (d > 1) test::expect_near(dx, dx64, 1e-5 * std::max(1.0, dx64.largest()));
        test::expect_near(dw, dw64, 1e-5 * std::max(1.0, dw64.largest()));
        test::expect_near(db, db64, 1e-5 * std::max(1.0, db64.largest()));
        if (first.empty()) {
          first = {y, dx, dw, db};
        } else {
          EXPECT_TRUE(y.same_bits(first[0]) && dx.same_bits(first[1]) && dw.same_bits(first[2]) &&
                      db.same_bits(first[3]));
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

}  // namespace
}  // namespace tforge
