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
  kernels::cross_entropy_row_statistics(cpu, logits.view(), targets.vector(), 0, r.max.view(), r.sum.view(),
                                        r.target.view());
  kernels::cross_entropy_nll(cpu, r.max.view(), r.sum.view(), r.target.view(), targets.vector(), r.nll.vector());
  return r;
}

template <class T>
Matrix<T> backward(const Matrix<T>& logits, const Rows<T>& r, const Matrix<std::int32_t>& targets, double weight) {
  Matrix<T> gradient(logits.rows(), logits.columns(), 2);
  kernels::cross_entropy_backward(cpu, r.max.view(), r.sum.view(), targets.vector(), 0, weight, logits.view(),
                                  gradient.view());
  auto in_place = logits;
  kernels::cross_entropy_backward(cpu, r.max.view(), r.sum.view(), targets.vector(), 0, weight, in_place.view(),
                                  in_place.view());
  EXPECT_TRUE(gradient.same_bits(in_place));
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

  Rows<double> reduced(kRows);
  std::vector<Rows<double>> parts(3, Rows<double>(kRows));
  for (std::int64_t r = 0; r < kRows; ++r) {
    reduced.max(r, 0) = -std::numeric_limits<double>::infinity();
    reduced.sum(r, 0) = reduced.target(r, 0) = 0;
  }
  const auto shard = [&](int k) { return logits.view().column_range(borders[k], borders[k + 1] - borders[k]); };
  for (int k = 0; k < 3; ++k) {
    Rows<double>& part = parts[static_cast<std::size_t>(k)];
    kernels::cross_entropy_row_statistics(cpu, shard(k), targets.vector(), borders[k], part.max.view(), part.sum.view(),
                                          part.target.view());
    for (std::int64_t r = 0; r < kRows; ++r) reduced.max(r, 0) = std::max(reduced.max(r, 0), part.max(r, 0));
  }
  for (Rows<double>& part : parts) {
    kernels::cross_entropy_rescale(cpu, part.max.view(), reduced.max.view(), part.sum.view());
    for (std::int64_t r = 0; r < kRows; ++r) {
      reduced.sum(r, 0) += part.sum(r, 0);
      reduced.target(r, 0) += part.target(r, 0);
    }
  }
  kernels::cross_entropy_nll(cpu, reduced.max.view(), reduced.sum.view(), reduced.target.view(), targets.vector(),
                             reduced.nll.vector());
  test::expect_near(reduced.nll, whole.nll, 1e-14);
  auto gradient = logits;
  for (int k = 0; k < 3; ++k) {
    kernels::cross_entropy_backward(cpu, reduced.max.view(), reduced.sum.view(), targets.vector(), borders[k], 0.7,
                                    shard(k), gradient.view().column_range(borders[k], borders[k + 1] - borders[k]));
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
  const auto statistics = [&](ConstTensorView targets_, TensorView row_max) {
    kernels::cross_entropy_row_statistics(cpu, logits.view(), targets_, 0, row_max, max.view(), max.view());
  };
  EXPECT_THROW(statistics(targets.vector(), other.view()), ShapeError);
  EXPECT_THROW(statistics(logits.view(), max.view()), DTypeError);
  EXPECT_THROW(kernels::cross_entropy_rescale(cpu, other.view(), max.view(), max.view()), ShapeError);
  EXPECT_THROW(kernels::cross_entropy_nll(cpu, max.view(), max.view(), max.view(), targets.vector(), max.view()),
               DTypeError);
  const auto back = [&](ConstTensorView row_sum, TensorView dlogits) {
    kernels::cross_entropy_backward(cpu, max.view(), row_sum, targets.vector(), 0, 1, logits.view(), dlogits);
  };
  EXPECT_THROW(back(other.view(), logits.view()), ShapeError);
  EXPECT_THROW(back(max.view(), other.view()), ShapeError);
  Matrix<bf16> narrow(4, 5);
  EXPECT_THROW(back(max.view(), narrow.view()), DTypeError) << "on devices alone";
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
    // As if another shard had the largest logits of all.
    auto larger = Matrix<T>::random(rows, 1, 2, 4, padding);
    for (std::int64_t r = 0; r < rows; ++r) larger(r, 0) += 5;
    const auto run = [](Stream& s, auto targets_, auto all_max, auto max, auto sum, auto target, auto nll, auto z) {
      kernels::cross_entropy_row_statistics(s, z, targets_, 1, max, sum, target);
      kernels::cross_entropy_rescale(s, max, all_max, sum);
      kernels::cross_entropy_nll(s, all_max, sum, target, targets_, nll);
      kernels::cross_entropy_backward(s, all_max, sum, targets_, 1, 0.25, z, z);
    };
    test::with_copies(
        device,
        [&](auto targets_, auto all_max, auto max, auto sum, auto target, auto nll, auto z) {
          run(stream, test::vector_of(targets_), all_max, max, sum, target, test::vector_of(nll), z);
        },
        targets, larger, got.max, got.sum, got.target, got.nll, gradient);
    run(cpu, targets.vector(), larger.view(), want.max.view(), want.sum.view(), want.target.view(), want.nll.vector(),
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

/// 5 rows of logits that rise by far more than exp can bear, and fall; among them some of probability 0.
Matrix<float> steep_logits(std::int64_t padding) {
  constexpr std::int64_t kVocab = 70004;  // some hundred logits a thread, which join their sum in f64 on the way
  Matrix<float> logits(5, kVocab, padding);
  const Rng rng(7, "noise");
  for (std::int64_t i = 0; i < 5 * kVocab; ++i) {
    const std::int64_t r = i / kVocab, c = i % kVocab;
    const double slope = r == 0 ? 0.25 : r == 1 ? -0.25 : r == 2 ? 0.005 : 0;
    logits(r, c) = static_cast<float>(slope * static_cast<double>(c) + rng.normal(static_cast<std::uint64_t>(i)));
    if (r == 3 && c % 3 == 0) logits(r, c) = -std::numeric_limits<float>::infinity();
    if (r == 4) logits(r, c) -= c == 50000 ? 0 : 2e4F;
  }
  return logits;
}

struct OnDevice {
  Rows<float> rows{5};
  Matrix<float> gradient;
  Matrix<bf16> narrow;
  OnDevice(test::CudaDevice& device, const Matrix<float>& logits, const Matrix<std::int32_t>& targets,
           std::int64_t padding)
      : gradient(5, logits.columns(), padding), narrow(5, logits.columns(), padding) {
    test::with_copies(
        device,
        [&](auto z, auto t, auto max, auto sum, auto target, auto dz, auto narrow_dz) {
          const ConstTensorView ids = test::vector_of(t);
          kernels::cross_entropy_row_statistics(device.stream, z, ids, 0, max, sum, target);
          kernels::cross_entropy_backward(device.stream, max, sum, ids, 0, 0.5, z, dz);
          kernels::cross_entropy_backward(device.stream, max, sum, ids, 0, 0.5, z, narrow_dz);
        },
        logits, targets, rows.max, rows.sum, rows.target, gradient, narrow);
  }
};

TEST(CrossEntropy, CudaFollowsSteepLogits) {
  test::on_cuda([](test::CudaDevice& device) {
    const auto logits = steep_logits(0);
    const auto targets = random_targets(5, logits.columns());
    const auto want = forward(logits, targets);
    const OnDevice got(device, logits, targets, 0);
    EXPECT_TRUE(got.rows.max.same_bits(want.max));
    EXPECT_TRUE(got.rows.target.same_bits(want.target));
    for (std::int64_t r = 0; r < 5; ++r) EXPECT_NEAR(got.rows.sum(r, 0) / want.sum(r, 0), 1, 2e-6) << r;
    test::expect_near(got.gradient, backward(logits, want, targets, 0.5), 1e-6);
  });
}

TEST(CrossEntropy, CudaHasTheSameBitsWhereverRowsBegin) {
  test::on_cuda([](test::CudaDevice& device) {
    const auto targets = random_targets(5, steep_logits(0).columns());
    const OnDevice packs(device, steep_logits(0), targets, 0), apart(device, steep_logits(1), targets, 3);
    EXPECT_TRUE(packs.rows.max.same_bits(apart.rows.max));
    EXPECT_TRUE(packs.rows.sum.same_bits(apart.rows.sum));
    EXPECT_TRUE(packs.gradient.same_bits(apart.gradient));
    EXPECT_TRUE(packs.narrow.same_bits(apart.narrow) && apart.narrow.padding_untouched());
  });
}

TEST(CrossEntropy, CudaRoundsTheGradientOnce) {
  test::on_cuda([](test::CudaDevice& device) {
    const auto logits = steep_logits(0);
    const OnDevice got(device, logits, random_targets(5, logits.columns()), 0);
    for (std::int64_t r = 0; r < 5; ++r) {
      for (std::int64_t c = 0; c < logits.columns(); ++c) {
        ASSERT_EQ(got.narrow(r, c).bits, bf16(got.gradient(r, c)).bits) << r << ", " << c;
      }
    }
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
          kernels::cross_entropy_row_statistics(device.stream, z, test::vector_of(t), 0, max, sum, target);
          kernels::cross_entropy_nll(device.stream, max, sum, target, test::vector_of(t), test::vector_of(nll));
        },
        logits, targets, got.max, got.sum, got.target, got.nll);
    EXPECT_TRUE(std::isnan(got.nll(0, 0)));
  });
}

}  // namespace
}  // namespace tforge
