#include "kernels/cross_entropy.h"

#include "device_matrix.h"
#include "matrix.h"

namespace tforge {
namespace {

using test::Matrix;
Stream cpu;

/// What a row passes between the steps, and its loss.
template <class T>
struct Rows {
  Matrix<T> max, sum, target;
  Matrix<double> nll;
  explicit Rows(std::int64_t rows) : max(rows, 1, 2), sum(rows, 1, 1), target(rows, 1, 3), nll(1, rows) {}
};

template <class T>
Rows<T> forward(const Matrix<T>& logits, const Matrix<std::int32_t>& targets) {
  Rows<T> r(logits.rows());
  kernels::cross_entropy_row_max(cpu, logits.view(), r.max.view());
  kernels::cross_entropy_row_sum(cpu, logits.view(), r.max.view(), targets.vector(), 0, r.sum.view(), r.target.view());
  kernels::cross_entropy_nll(cpu, r.sum.view(), r.target.view(), targets.vector(), r.nll.vector());
  return r;
}

template <class T>
Matrix<T> backward(const Matrix<T>& logits, const Rows<T>& r, const Matrix<std::int32_t>& targets, double weight) {
  auto gradient = logits;
  kernels::cross_entropy_backward(cpu, r.max.view(), r.sum.view(), targets.vector(), 0, weight, gradient.view());
  return gradient;
}

Matrix<std::int32_t> random_targets(std::int64_t rows, std::int64_t vocab) {
  Matrix<std::int32_t> targets(1, rows);
  const Rng rng(5, "targets");
  for (std::int64_t r = 0; r < rows; ++r) {
    targets(0, r) =
        static_cast<std::int32_t>(rng.below(static_cast<std::uint64_t>(r), static_cast<std::uint64_t>(vocab)));
  }
  return targets;
}

TEST(CrossEntropy, ByHand) {
  // exp: 1, 2, 5 of 8. The second row is ignored.
  const auto logits = Matrix<double>::of(2, 3, {0, std::log(2), std::log(5), 1, 2, 3});
  const auto targets = Matrix<std::int32_t>::of(1, 2, {1, -1});
  const auto r = forward(logits, targets);
  EXPECT_DOUBLE_EQ(r.nll(0, 0), std::log(4.0));
  EXPECT_EQ(r.nll(0, 1), 0);
  const auto gradient = backward(logits, r, targets, 0.5);
  test::expect_near(gradient, Matrix<double>::of(2, 3, {0.5 / 8, 0.5 * (0.25 - 1), 2.5 / 8, 0, 0, 0}), 1e-15);
}

TEST(CrossEntropy, GradientMatchesFiniteDifferences) {
  auto logits = Matrix<double>::random(4, 33, 1, 2, 3);
  auto targets = random_targets(4, 33);
  targets(0, 2) = -7;
  const auto r = forward(logits, targets);
  const auto gradient = backward(logits, r, targets, 0.3);
  EXPECT_TRUE(gradient.padding_untouched());
  test::expect_gradient(logits, gradient, [&] {
    const auto p = forward(logits, targets);
    double loss = 0;
    for (std::int64_t t = 0; t < 4; ++t) loss += 0.3 * p.nll(0, t);
    return loss;
  });
}

TEST(CrossEntropy, LargeLogitsDoNotOverflow) {
  const auto logits = Matrix<float>::of(1, 4, {1000, 999, -1000, 88});
  const auto targets = Matrix<std::int32_t>::of(1, 1, {1});
  const auto r = forward(logits, targets);
  EXPECT_NEAR(r.nll(0, 0), 1 + std::log1p(std::exp(-1.0)), 1e-6);
  EXPECT_NEAR(backward(logits, r, targets, 1)(0, 0), 1 / (1 + std::exp(-1.0)), 1e-6);
}

TEST(CrossEntropy, NonFiniteLogitsReachTheLoss) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const std::int64_t at : {0, 8, 36}) {
      auto logits = Matrix<float>::random(1, 37, 1);
      logits(0, at) = bad;
      const auto targets = Matrix<std::int32_t>::of(1, 1, {20});
      EXPECT_FALSE(std::isfinite(forward(logits, targets).nll(0, 0))) << bad << " at " << at;
    }
  }
}

TEST(CrossEntropy, FloatFollowsTheFormulaAtAwkwardSizesAndAnyThreads) {
  for (const std::int64_t vocab : {1, 31, 33, 257, 5003}) {
    constexpr std::int64_t kRows = 33;
    constexpr double kWeight = 0.1;
    const auto logits = Matrix<float>::random(kRows, vocab, 1, 3, 5);
    const auto targets = random_targets(kRows, vocab);
    Matrix<double> want_nll(1, kRows), want_gradient(kRows, vocab);
    for (std::int64_t r = 0; r < kRows; ++r) {
      double sum = 0;
      for (std::int64_t c = 0; c < vocab; ++c) sum += std::exp(static_cast<double>(logits(r, c)));
      want_nll(0, r) = std::log(sum) - logits(r, targets(0, r));
      for (std::int64_t c = 0; c < vocab; ++c) {
        want_gradient(r, c) =
            kWeight * (std::exp(static_cast<double>(logits(r, c))) / sum - (c == targets(0, r) ? 1 : 0));
      }
    }
    std::vector<Matrix<float>> first;
    test::at_one_and_two_threads([&](int) {
      const auto got = forward(logits, targets);
      const auto gradient = backward(logits, got, targets, kWeight);
      test::expect_near(got.nll, want_nll, 2e-6);
      test::expect_near(gradient, want_gradient, 5e-8);
      if (first.empty()) first = {got.sum, gradient};
      else EXPECT_TRUE(got.sum.same_bits(first[0]) && gradient.same_bits(first[1]));
    });
  }
}

TEST(CrossEntropy, ThreeShardsReducedByHandEqualTheWhole) {
  constexpr std::int64_t kRows = 19, kVocab = 101;
  const std::int64_t borders[] = {0, 40, 41, kVocab};
  const auto logits = Matrix<double>::random(kRows, kVocab, 1, 3);
  auto targets = random_targets(kRows, kVocab);
  targets(0, 0) = 40;  // the shard of one column
  targets(0, 1) = -1;
  const auto whole = forward(logits, targets);
  const auto whole_gradient = backward(logits, whole, targets, 0.7);

  Rows<double> reduced(kRows), part(kRows);
  for (std::int64_t r = 0; r < kRows; ++r) {
    reduced.max(r, 0) = -std::numeric_limits<double>::infinity();
    reduced.sum(r, 0) = reduced.target(r, 0) = 0;
  }
  const auto shard = [&](int k) { return logits.view().column_range(borders[k], borders[k + 1] - borders[k]); };
  for (int k = 0; k < 3; ++k) {
    kernels::cross_entropy_row_max(cpu, shard(k), part.max.view());
    for (std::int64_t r = 0; r < kRows; ++r) reduced.max(r, 0) = std::max(reduced.max(r, 0), part.max(r, 0));
  }
  for (int k = 0; k < 3; ++k) {
    kernels::cross_entropy_row_sum(cpu, shard(k), reduced.max.view(), targets.vector(), borders[k], part.sum.view(),
                                   part.target.view());
    for (std::int64_t r = 0; r < kRows; ++r) {
      reduced.sum(r, 0) += part.sum(r, 0);
      reduced.target(r, 0) += part.target(r, 0);
    }
  }
  kernels::cross_entropy_nll(cpu, reduced.sum.view(), reduced.target.view(), targets.vector(), reduced.nll.vector());
  test::expect_near(reduced.nll, whole.nll, 1e-14);
  auto gradient = logits;
  for (int k = 0; k < 3; ++k) {
    kernels::cross_entropy_backward(cpu, reduced.max.view(), reduced.sum.view(), targets.vector(), borders[k], 0.7,
                                    gradient.view().column_range(borders[k], borders[k + 1] - borders[k]));
  }
  test::expect_near(gradient, whole_gradient, 1e-15);
}

TEST(CrossEntropy, ARankWithoutColumns) {
  const Matrix<float> none(2, 0);
  const auto targets = Matrix<std::int32_t>::of(1, 2, {0, 1});
  const auto r = forward(none, targets);
  EXPECT_EQ(r.max(1, 0), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(r.sum(1, 0), 0);
  EXPECT_EQ(r.target(1, 0), 0);
}

TEST(CrossEntropy, RefusesWhatDoesNotFit) {
  Matrix<float> logits(4, 5), max(4, 1), other(3, 1);
  Matrix<std::int32_t> targets(1, 4);
  EXPECT_THROW(kernels::cross_entropy_row_max(cpu, logits.view(), other.view()), ShapeError);
  EXPECT_THROW(kernels::cross_entropy_row_sum(cpu, logits.view(), max.view(), logits.view(), 0, max.view(), max.view()),
               DTypeError);
  EXPECT_THROW(kernels::cross_entropy_nll(cpu, max.view(), max.view(), targets.vector(), max.view()), DTypeError);
  EXPECT_THROW(kernels::cross_entropy_backward(cpu, max.view(), other.view(), targets.vector(), 0, 1, logits.view()),
               ShapeError);
}

template <class T>
void compare_on_cuda(test::CudaDevice& device, double tolerance) {
  Stream& stream = device.stream;
  test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
    const auto logits = Matrix<T>::random(rows, columns, 1, 4, padding);
    auto targets = random_targets(rows, columns + 3);  // some are columns of another shard
    targets(0, rows - 1) = rows > 1 ? -1 : 0;
    Rows<T> got(rows), want(rows);
    auto gradient = logits, want_gradient = logits;
    const auto run = [](Stream& s, auto targets_, auto max, auto sum, auto target, auto nll, auto z) {
      kernels::cross_entropy_row_max(s, z, max);
      kernels::cross_entropy_row_sum(s, z, max, targets_, 1, sum, target);
      kernels::cross_entropy_nll(s, sum, target, targets_, nll);
      kernels::cross_entropy_backward(s, max, sum, targets_, 1, 0.25, z);
    };
    test::with_copies(
        device,
        [&](auto targets_, auto max, auto sum, auto target, auto nll, auto z) {
          run(stream, test::vector_of(targets_), max, sum, target, test::vector_of(nll), z);
        },
        targets, got.max, got.sum, got.target, got.nll, gradient);
    run(cpu, targets.vector(), want.max.view(), want.sum.view(), want.target.view(), want.nll.vector(),
        want_gradient.view());
    EXPECT_TRUE(got.max.same_bits(want.max));
    test::expect_near(got.sum, want.sum, tolerance * want.sum.largest());
    test::expect_near(got.target, want.target, tolerance);
    test::expect_near(got.nll, want.nll, 4 * tolerance);
    test::expect_near(gradient, want_gradient, tolerance);
    EXPECT_TRUE(gradient.padding_untouched() && got.sum.padding_untouched());
  });
}
TEST(CrossEntropy, CudaFollowsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    compare_on_cuda<float>(device, 1e-6);
    compare_on_cuda<double>(device, 1e-14);
  });
}

TEST(CrossEntropy, CudaShowsNaN) {
  test::on_cuda([](test::CudaDevice& device) {
    auto logits = Matrix<float>::random(1, 257, 1);
    logits(0, 200) = std::numeric_limits<float>::quiet_NaN();
    const auto targets = Matrix<std::int32_t>::of(1, 1, {3});
    Rows<float> got(1);
    test::with_copies(
        device,
        [&](auto z, auto t, auto max, auto sum, auto target, auto nll) {
          kernels::cross_entropy_row_max(device.stream, z, max);
          kernels::cross_entropy_row_sum(device.stream, z, max, test::vector_of(t), 0, sum, target);
          kernels::cross_entropy_nll(device.stream, sum, target, test::vector_of(t), test::vector_of(nll));
        },
        logits, targets, got.max, got.sum, got.target, got.nll);
    EXPECT_TRUE(std::isnan(got.nll(0, 0)));
  });
}

}  // namespace
}  // namespace tforge
