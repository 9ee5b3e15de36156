#include "kernels/rotary.h"

#include "device_matrix.h"
#include "matrix.h"

namespace tforge {
namespace {

using kernels::RotaryDirection;
using test::Matrix;
Stream cpu;

template <class T>
struct Tables {
  Matrix<T> cosine, sine;
  Tables(std::int64_t positions, std::int64_t half) : cosine(positions, half, 1), sine(positions, half, 2) {
    kernels::rotary_tables(cpu, 10000, cosine.view(), sine.view());
  }
  void apply(RotaryDirection direction, std::int64_t heads, std::int64_t seq, std::int64_t first, Matrix<T>& x) const {
    kernels::rotary_apply(cpu, direction, cosine.view(), sine.view(), heads, seq, first, x.view());
  }
};

TEST(Rotary, Tables) {
  const Tables<double> t(4, 2);
  EXPECT_DOUBLE_EQ(t.cosine(0, 1), 1);
  EXPECT_DOUBLE_EQ(t.sine(3, 0), std::sin(3.0));
  EXPECT_DOUBLE_EQ(t.sine(3, 1), std::sin(3.0 / 100));  // 10000^(-2 / 4)
}

TEST(Rotary, ByHand) {
  // One head of 3 dimensions, of which 2 rotate: (x, y) by the angle of the position; the third stays.
  const Tables<double> t(8, 1);
  auto x = Matrix<double>::of(2, 3, {1, 0, 5, 0, 1, 6});
  t.apply(RotaryDirection::forward, 1, 2, 3, x);
  EXPECT_DOUBLE_EQ(x(0, 0), std::cos(3.0));
  EXPECT_DOUBLE_EQ(x(0, 1), std::sin(3.0));
  EXPECT_EQ(x(0, 2), 5);
  EXPECT_DOUBLE_EQ(x(1, 0), -std::sin(4.0));
  EXPECT_DOUBLE_EQ(x(1, 1), std::cos(4.0));
  EXPECT_EQ(x(1, 2), 6);
}

TEST(Rotary, BackwardIsTheTransposeAndTheGradient) {
  const Tables<double> t(16, 3);
  auto x = Matrix<double>::random(10, 2 * 7, 1, 1, 3);  // 2 sequences of 5, 2 heads of 7 of which 6 rotate
  const auto dy = Matrix<double>::random(10, 2 * 7, 2, 1, 3);
  auto dx = dy;
  t.apply(RotaryDirection::backward, 2, 5, 4, dx);
  EXPECT_TRUE(dx.padding_untouched());
  test::expect_gradient(x, dx, [&] {
    auto y = x;
    t.apply(RotaryDirection::forward, 2, 5, 4, y);
    return y.dot(dy);
  });
  t.apply(RotaryDirection::forward, 2, 5, 4, dx);
  test::expect_near(dx, dy, 1e-14);
}

TEST(Rotary, ScoresDependOnTheDistanceAlone) {
  const Tables<double> t(64, 4);
  const auto q = Matrix<double>::random(1, 8, 1), k = Matrix<double>::random(1, 8, 2);
  const auto score = [&](std::int64_t i, std::int64_t j) {
    auto a = q, b = k;
    t.apply(RotaryDirection::forward, 1, 1, i, a);
    t.apply(RotaryDirection::forward, 1, 1, j, b);
    return a.dot(b);
  };
  EXPECT_NEAR(score(9, 2), score(60, 53), 1e-12);
  EXPECT_GT(std::abs(score(9, 2) - score(9, 3)), 1e-3);
}

TEST(Rotary, PositionsAndThreads) {
  const Tables<float> t(600, 16);
  const auto x = Matrix<float>::random(2 * 300, 3 * 32, 1);
  Matrix<float> first(0, 0);
  test::at_one_and_two_threads([&](int threads) {
    auto y = x;
    t.apply(RotaryDirection::forward, 3, 300, 7, y);
    if (threads == 2) first = y;
    else EXPECT_TRUE(y.same_bits(first));
    // A row alone at its position: the same bits.
    Matrix<float> row(1, 96);
    for (std::int64_t c = 0; c < 96; ++c) row(0, c) = x(300 + 123, c);
    t.apply(RotaryDirection::forward, 3, 1, 7 + 123, row);
    EXPECT_EQ(std::memcmp(&row(0, 0), &y(300 + 123, 0), 96 * sizeof(float)), 0);
  });
}

TEST(Rotary, RefusesPositionsPastTheTables) {
  const Tables<float> t(8, 2);
  Matrix<float> x(4, 8);
  EXPECT_NO_THROW(t.apply(RotaryDirection::forward, 2, 4, 4, x));
  EXPECT_THROW(t.apply(RotaryDirection::forward, 2, 4, 5, x), ShapeError);
  EXPECT_THROW(t.apply(RotaryDirection::forward, 2, 4, -1, x), ShapeError);
  EXPECT_THROW(t.apply(RotaryDirection::forward, 2, 3, 0, x), ShapeError);  // 4 rows, sequences of 3
  EXPECT_THROW(t.apply(RotaryDirection::forward, 3, 4, 0, x), ShapeError);  // 8 columns, 3 heads
  EXPECT_THROW(t.apply(RotaryDirection::forward, 4, 4, 0, x), ShapeError);  // heads of 2, 4 dimensions rotate
}

TEST(Rotary, CudaFollowsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    Stream& stream = device.stream;
    for (const std::int64_t half : {1, 4, 31}) {
      for (const std::int64_t heads : {1, 3, 33}) {
        constexpr std::int64_t kSeq = 33, kFirst = 2;
        const Tables<float> want(kSeq + kFirst, half);
        Matrix<float> cosine(kSeq + kFirst, half, 1), sine(kSeq + kFirst, half);
        auto x = Matrix<float>::random(2 * kSeq, heads * (2 * half + 1), 1, 1, 2), want_x = x, back = x;
        const auto apply = [&](RotaryDirection direction, auto c, auto s, auto x_) {
          kernels::rotary_apply(stream, direction, c, s, heads, kSeq, kFirst, x_);
        };
        test::with_copies(
            device,
            [&](auto c, auto s, auto x_, auto back_) {
              kernels::rotary_tables(stream, 10000, c, s);
              apply(RotaryDirection::forward, c, s, x_);
              apply(RotaryDirection::forward, c, s, back_);
              apply(RotaryDirection::backward, c, s, back_);
            },
            cosine, sine, x, back);
        test::expect_near(cosine, want.cosine, 1e-7);
        test::expect_near(sine, want.sine, 1e-7);
        test::expect_near(back, want_x, 2e-6);
        want.apply(RotaryDirection::forward, heads, kSeq, kFirst, want_x);
        test::expect_near(x, want_x, 2e-6);
        EXPECT_TRUE(x.padding_untouched() && cosine.padding_untouched());
      }
    }
  });
}

TEST(Rotary, CudaDoesNotShowPacks) {
  test::on_cuda([](test::CudaDevice& device) {
    constexpr std::int64_t kHeads = 3, kSeq = 5, kHalf = 12, kHeadDim = 28;
    const Tables<float> want(kSeq, kHalf);
    const auto rotated = [&](std::int64_t padding) {
      Matrix<float> cosine(kSeq, kHalf, padding), sine(kSeq, kHalf, padding);
      kernels::rotary_tables(cpu, 10000, cosine.view(), sine.view());
      auto x = Matrix<float>::random(2 * kSeq, kHeads * kHeadDim, 1, 1, padding);
      test::with_copies(
          device,
          [&](auto c, auto s, auto x_) {
            kernels::rotary_apply(device.stream, RotaryDirection::forward, c, s, kHeads, kSeq, 0, x_);
          },
          cosine, sine, x);
      EXPECT_TRUE(x.padding_untouched());
      return x;
    };
    auto want_x = Matrix<float>::random(2 * kSeq, kHeads * kHeadDim, 1);
    want.apply(RotaryDirection::forward, kHeads, kSeq, 0, want_x);
    test::expect_near(rotated(4), want_x, 2e-6);
    EXPECT_TRUE(rotated(4).same_bits(rotated(3)));
  });
}

}  // namespace
}  // namespace tforge
