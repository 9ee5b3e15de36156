#include "kernels/adamw.h"

#include "device_matrix.h"
#include "matrix.h"

namespace tforge {
namespace {

using test::Matrix;
Stream cpu;

TEST(AdamW, FirstUpdateByHand) {
  // At age 1 the corrected moments are g and g^2, so a step is lr * g / (|g| + eps) beside the decay.
  auto p = Matrix<double>::of(1, 2, {1, -2});
  const auto g = Matrix<double>::of(1, 2, {0.5, -4});
  auto m = Matrix<double>::of(1, 2, {0, 0}), v = m;
  kernels::AdamWStep step;
  step.lr = 0.1;
  step.weight_decay = 0.5;
  step.bias1 = 1 - step.beta1;
  step.bias2 = 1 - step.beta2;
  step.eps = 0.5;
  kernels::adamw_update(cpu, step, p.view(), g.view(), m.view(), v.view());
  EXPECT_NEAR(p(0, 0), 1 - 0.05 - 0.1 * 0.5 / (0.5 + 0.5), 1e-15);
  EXPECT_NEAR(p(0, 1), -2 + 0.1 + 0.1 * 4 / (4 + 0.5), 1e-15);
  EXPECT_NEAR(m(0, 0), 0.05, 1e-15);
  EXPECT_NEAR(v(0, 1), 0.05 * 16, 1e-15);
}

/// Algorithm 2 of the paper, in f64, element by element.
template <class T>
void reference(const kernels::AdamWStep& s, Matrix<T>& p, const Matrix<T>& g, Matrix<T>& m, Matrix<T>& v) {
  for (std::int64_t r = 0; r < p.rows(); ++r) {
    for (std::int64_t c = 0; c < p.columns(); ++c) {
      const double gi = s.grad_scale * g(r, c);
      const double mi = s.beta1 * m(r, c) + (1 - s.beta1) * gi;
      const double vi = s.beta2 * v(r, c) + (1 - s.beta2) * gi * gi;
      m(r, c) = static_cast<T>(mi);
      v(r, c) = static_cast<T>(vi);
      p(r, c) = static_cast<T>(p(r, c) - s.lr * s.weight_decay * p(r, c) -
                               s.lr * (mi / s.bias1) / (std::sqrt(vi / s.bias2) + s.eps));
    }
  }
}

template <class T>
void compare(double tolerance) {
  for (const std::int64_t columns : {1, 31, 33, 257, 20011}) {
    const auto p0 = Matrix<T>::random(3, columns, 1);
    auto want_p = p0, want_m = p0, want_v = p0;
    for (std::int64_t r = 0; r < 3; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) want_m(r, c) = want_v(r, c) = 0;
    }
    const auto zero = want_m;
    std::vector<Matrix<T>> first;
    const auto run = [&](auto&& update, Matrix<T>& p, Matrix<T>& m, Matrix<T>& v) {
      for (int age = 1; age <= 5; ++age) {
        kernels::AdamWStep step{.lr = 0.01, .weight_decay = 0.1, .grad_scale = 0.3};
        step.bias1 = 1 - std::pow(step.beta1, age);
        step.bias2 = 1 - std::pow(step.beta2, age);
        update(step, p, Matrix<T>::random(3, columns, 10 + static_cast<std::uint64_t>(age)), m, v);
      }
    };
    run([](auto&&... a) { reference<T>(a...); }, want_p, want_m, want_v);
    test::at_one_and_two_threads([&](int) {
      auto p = p0, m = zero, v = zero;
      run([](auto& step, auto& p_, const auto& g, auto& m_,
             auto& v_) { kernels::adamw_update(cpu, step, p_.view(), g.view(), m_.view(), v_.view()); },
          p, m, v);
      test::expect_near(p, want_p, tolerance);
      test::expect_near(m, want_m, tolerance);
      test::expect_near(v, want_v, tolerance);
      if (first.empty()) first = {p, m, v};
      else EXPECT_TRUE(p.same_bits(first[0]) && m.same_bits(first[1]) && v.same_bits(first[2]));
    });
  }
}
TEST(AdamW, LeavesIdleRowsAsTheyAre) {
  constexpr std::int64_t kRows = 700, kColumns = 33;
  auto g = Matrix<float>::random(kRows, kColumns, 1);
  for (std::int64_t r = 0; r < kRows; ++r) {
    for (std::int64_t c = 0; c < kColumns; ++c) {
      if (r % 3 != 0)
        g(r, c) = r % 3 == 1 || c != 17 ? 0.0F : 2.0F;  // two of three rows; one of them but for one element
    }
  }
  const auto p0 = Matrix<float>::random(kRows, kColumns, 2), m0 = Matrix<float>::random(kRows, kColumns, 3);
  auto v0 = Matrix<float>::random(kRows, kColumns, 4);
  for (std::int64_t i = 0; i < kRows * kColumns; ++i) v0(i / kColumns, i % kColumns) *= v0(i / kColumns, i % kColumns);
  test::at_one_and_two_threads([&](int) {
    auto p = p0, m = m0, v = v0, all_p = p0, all_m = m0, all_v = v0;
    kernels::AdamWStep step{.lr = 0.01, .weight_decay = 0.1};
    kernels::adamw_update(cpu, step, all_p.view(), g.view(), all_m.view(), all_v.view());
    step.idle_rows = kernels::IdleRows::skip;
    kernels::adamw_update(cpu, step, p.view(), g.view(), m.view(), v.view());
    for (std::int64_t r = 0; r < kRows; ++r) {
      const bool idle = r % 3 == 1;
      for (std::int64_t c = 0; c < kColumns; ++c) {
        ASSERT_EQ(p(r, c), idle ? p0(r, c) : all_p(r, c)) << r << " " << c;
        ASSERT_EQ(m(r, c), idle ? m0(r, c) : all_m(r, c));
        ASSERT_EQ(v(r, c), idle ? v0(r, c) : all_v(r, c));
      }
      ASSERT_NE(all_p(r, 0), p0(r, 0));
    }
  });
}

TEST(AdamW, FloatFollowsTheReference) { compare<float>(1e-6); }
TEST(AdamW, DoubleFollowsTheReference) { compare<double>(1e-14); }

TEST(AdamW, ZeroGradientLeavesDecayAlone) {
  auto p = Matrix<float>::of(1, 2, {1, 0});
  const auto zero = Matrix<float>::of(1, 2, {0, 0});
  auto m = zero, v = zero;
  kernels::adamw_update(cpu, {.lr = 0.5, .weight_decay = 0.5}, p.view(), zero.view(), m.view(), v.view());
  EXPECT_EQ(p(0, 0), 0.75F);
  EXPECT_EQ(p(0, 1), 0);
}

TEST(AdamW, RefusesWhatDoesNotFit) {
  Matrix<float> p(4, 3), g(3, 4), strided(4, 3, 1);
  Matrix<double> d(4, 3);
  EXPECT_THROW(kernels::adamw_update(cpu, {}, p.view(), g.view(), p.view(), p.view()), ShapeError);
  EXPECT_THROW(kernels::adamw_update(cpu, {}, p.view(), p.view(), strided.view(), p.view()), ShapeError);
  EXPECT_THROW(kernels::adamw_update(cpu, {}, p.view(), p.view(), p.view(), d.view()), DTypeError);
}

double sum_of_squares(ConstTensorView x) {
  double sum = std::numeric_limits<double>::quiet_NaN();
  kernels::sum_of_squares(cpu, x, TensorView{&sum, DType::f64, Device::cpu, Shape{1}, 1}, {});
  return sum;
}

TEST(SumOfSquares, ByHand) {
  EXPECT_EQ(sum_of_squares(Matrix<float>::of(1, 3, {1, 2, 3}).view()), 14);
  EXPECT_EQ(sum_of_squares(Matrix<double>(0, 3).view()), 0);
  // f64 throughout: neither overflow nor a lost small term.
  EXPECT_EQ(sum_of_squares(Matrix<float>::of(1, 1, {1e30F}).view()),
            static_cast<double>(1e30F) * static_cast<double>(1e30F));
  EXPECT_EQ(sum_of_squares(Matrix<float>::of(1, 2, {4096, 0.5F}).view()), 16777216.25);
}

TEST(SumOfSquares, AnySizeStrideAndThreads) {
  for (const std::int64_t rows : {1, 31, 400}) {
    for (const std::int64_t columns : {1, 33, 257, 70001}) {
      if (rows * columns > 4000000) continue;
      for (const std::int64_t padding : {0, 3}) {
        const auto x = Matrix<float>::random(rows, columns, 1, 1, padding);
        const double want = x.dot(x);
        double first = 0;
        test::at_one_and_two_threads([&](int threads) {
          const double got = sum_of_squares(x.view());
          EXPECT_NEAR(got, want, 1e-12 * want);
          if (threads == 2) first = got;
          else EXPECT_EQ(got, first);
        });
      }
    }
  }
}

TEST(SumOfSquares, NonFiniteElementsShow) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    for (const std::int64_t at : {0, 128, 256}) {
      auto x = Matrix<float>::random(1, 257, 1);
      x(0, at) = bad;
      EXPECT_FALSE(std::isfinite(sum_of_squares(x.view())));
    }
  }
}

template <class T>
void compare_on_cuda(test::CudaDevice& device, double tolerance) {
  for (const std::int64_t columns : {1, 31, 33, 257, 1284}) {
    for (const kernels::IdleRows idle : {kernels::IdleRows::update, kernels::IdleRows::skip}) {
      auto g = Matrix<T>::random(3, columns, 2), p = Matrix<T>::random(3, columns, 1);
      auto m = Matrix<T>::random(3, columns, 3), v = g;
      for (std::int64_t r = 0; r < 3; ++r) {
        for (std::int64_t c = 0; c < columns; ++c) v(r, c) *= v(r, c);
      }
      for (std::int64_t c = 0; c < columns; ++c) g(1, c) = 0;
      auto want_p = p, want_m = m, want_v = v;
      kernels::AdamWStep step{.lr = 0.01, .weight_decay = 0.1, .bias1 = 0.1, .bias2 = 0.05, .grad_scale = 0.3};
      step.idle_rows = idle;
      test::with_copies(
          device,
          [&](auto p_, auto g_, auto m_, auto v_) { kernels::adamw_update(device.stream, step, p_, g_, m_, v_); }, p, g,
          m, v);
      kernels::adamw_update(cpu, step, want_p.view(), g.view(), want_m.view(), want_v.view());
      test::expect_near(p, want_p, tolerance);
      test::expect_near(m, want_m, tolerance);
      test::expect_near(v, want_v, 10 * tolerance);
    }
  }
}
TEST(AdamW, CudaFollowsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    compare_on_cuda<float>(device, 5e-7);
    compare_on_cuda<double>(device, 1e-15);
  });
}

TEST(SumOfSquares, CudaFollowsTheCpuAndShowsNaN) {
  test::on_cuda([](test::CudaDevice& device) {
    const auto sum_on_device = [&](const Matrix<float>& x) {
      Matrix<double> sum(1, 1), workspace(1, kernels::sum_of_squares_workspace(Device::cuda));
      test::with_copies(
          device, [&](auto x_, auto sum_, auto w) { kernels::sum_of_squares(device.stream, x_, sum_, w); }, x, sum,
          workspace);
      return sum(0, 0);
    };
    for (const std::int64_t columns : {0, 1, 31, 257, 40001}) {
      for (const std::int64_t padding : {0, 3}) {
        auto x = Matrix<float>::random(3, columns, 1, 1, padding);
        EXPECT_NEAR(sum_on_device(x), x.dot(x), 1e-12 * x.dot(x));
        EXPECT_EQ(sum_on_device(x), sum_on_device(x));
        if (columns == 0) continue;
        x(2, columns - 1) = std::numeric_limits<float>::quiet_NaN();
        EXPECT_TRUE(std::isnan(sum_on_device(x)));
      }
    }
    // Read in packs, as one run or row by row, or one by one: the same sum.
    const auto in_packs = [](std::int64_t padding) { return Matrix<float>::random(3, 40004, 1, 1, padding); };
    EXPECT_EQ(sum_on_device(in_packs(0)), sum_on_device(in_packs(3)));
    EXPECT_EQ(sum_on_device(in_packs(4)), sum_on_device(in_packs(3)));
  });
}

}  // namespace
}  // namespace tforge
