#include "kernels/slots.h"

#include "device_matrix.h"

namespace tforge {
namespace {

using kernels::SlotShape;
using test::Matrix;
Stream cpu;

/// x at every 9th row, y at every 4th, both with columns of another head and padding between.
template <class T>
struct Slots {
  SlotShape shape{3, 2, 7, 3, 9, 4};
  std::int64_t d = 5;
  Matrix<T> projection = Matrix<T>::random(6, 7, 1, 1, 2), x = Matrix<T>::random(27, 10, 2, 1, 3), y{12, 10, 1},
            dy = Matrix<T>::random(12, 10, 3, 1, 1), dx = Matrix<T>::random(27, 10, 4, 1, 2), dprojection{6, 7, 3};
  void forward() { kernels::slots_forward(cpu, shape, projection.view(), x.view(), y.view()); }
  void backward(GradMode mode) {
    kernels::slots_backward(cpu, shape, projection.view(), x.view(), dy.view(), dx.view(), mode, dprojection.view());
  }
};

template <class T>
void follows_the_formula(double tolerance) {
  Slots<T> a;
  a.forward();
  const Matrix<T> before = a.dx;
  a.backward(GradMode::overwrite);
  const Matrix<T> once = a.dprojection;
  for (std::int64_t h = 0; h < 2; ++h) {
    for (std::int64_t s = 0; s < 3; ++s) {
      for (std::int64_t j = 0; j < 7; ++j) {
        double slope = 0;
        for (std::int64_t b = 0; b < 3; ++b) {
          for (std::int64_t c = h * a.d; c < (h + 1) * a.d; ++c) {
            slope += static_cast<double>(a.dy(b * 4 + s, c)) * static_cast<double>(a.x(b * 9 + j, c));
          }
        }
        EXPECT_NEAR(static_cast<double>(a.dprojection(h * 3 + s, j)), slope, tolerance);
      }
      for (std::int64_t b = 0; b < 3; ++b) {
        for (std::int64_t c = h * a.d; c < (h + 1) * a.d; ++c) {
          double sum = 0;
          for (std::int64_t j = 0; j < 7; ++j) {
            sum += static_cast<double>(a.projection(h * 3 + s, j)) * static_cast<double>(a.x(b * 9 + j, c));
          }
          EXPECT_NEAR(static_cast<double>(a.y(b * 4 + s, c)), sum, tolerance);
        }
      }
    }
    for (std::int64_t r = 0; r < 27; ++r) {
      for (std::int64_t c = h * a.d; c < (h + 1) * a.d; ++c) {
        double sum = static_cast<double>(before(r, c));
        for (std::int64_t s = 0; s < 3 && r % 9 < 7; ++s) {
          sum += static_cast<double>(a.projection(h * 3 + s, r % 9)) * static_cast<double>(a.dy(r / 9 * 4 + s, c));
        }
        EXPECT_NEAR(static_cast<double>(a.dx(r, c)), sum, tolerance) << r;
      }
    }
  }
  EXPECT_TRUE(std::isnan(static_cast<double>(a.y(3, 0))));  // the row after the slots of a sequence is left
  EXPECT_TRUE(a.y.padding_untouched() && a.dx.padding_untouched() == before.padding_untouched());
  a.backward(GradMode::accumulate);
  for (std::int64_t r = 0; r < 6; ++r) {
    for (std::int64_t j = 0; j < 7; ++j) {
      EXPECT_NEAR(static_cast<double>(a.dprojection(r, j)), 2 * static_cast<double>(once(r, j)), 3 * tolerance);
    }
  }
}
TEST(Slots, FloatFollowsTheFormula) { follows_the_formula<float>(1e-5); }
TEST(Slots, DoubleFollowsTheFormula) { follows_the_formula<double>(1e-13); }

TEST(Slots, BitsDoNotDependOnThreads) {
  Slots<float> first;
  kernels::start_cpu_runtime(1);
  first.forward();
  first.backward(GradMode::overwrite);
  test::at_one_and_two_threads([&](int) {
    Slots<float> again;
    again.forward();
    again.backward(GradMode::overwrite);
    EXPECT_TRUE(again.dprojection.same_bits(first.dprojection) && again.dx.same_bits(first.dx));
    EXPECT_TRUE(again.y.same_bits(first.y));
  });
}

TEST(Slots, WithoutTheGradientOfTheProjection) {
  Slots<double> a, b;
  a.backward(GradMode::overwrite);
  kernels::slots_backward(cpu, b.shape, b.projection.view(), b.x.view(), b.dy.view(), b.dx.view(), GradMode::overwrite,
                          {});
  EXPECT_TRUE(a.dx.same_bits(b.dx));
}

/// Operands stored as T on a device beside the CPU with the same numbers, `epsilon` that of T.
template <class T>
void compare_on_cuda(test::CudaDevice& device, GradMode mode, double epsilon) {
  using C = Compute<T>;
  Slots<C> want;
  const auto narrow = [](Matrix<C>& numbers, std::int64_t padding) {
    Matrix<T> to(numbers.rows(), numbers.columns(), padding);
    for (std::int64_t r = 0; r < to.rows(); ++r) {
      for (std::int64_t c = 0; c < to.columns(); ++c) {
        to(r, c) = T(numbers(r, c));
        numbers(r, c) = static_cast<C>(to(r, c));
      }
    }
    return to;
  };
  const Matrix<T> projection = narrow(want.projection, 2), x = narrow(want.x, 3), dy = narrow(want.dy, 1);
  Matrix<T> dx = narrow(want.dx, 2), y(12, 10, 1);
  want.dprojection = Matrix<C>::random(6, 7, 5, 1, 3);
  Matrix<C> dprojection = want.dprojection;
  want.forward();
  want.backward(mode);
  test::with_copies(
      device,
      [&](auto projection_, auto x_, auto y_, auto dy_, auto dx_, auto dprojection_) {
        kernels::slots_forward(device.stream, want.shape, projection_, x_, y_);
        kernels::slots_backward(device.stream, want.shape, projection_, x_, dy_, dx_, mode, dprojection_);
      },
      projection, x, y, dy, dx, dprojection);
  for (std::int64_t r = 0; r < 12; ++r) {
    for (std::int64_t c = 0; c < 10; ++c) {
      if (r % 4 == 3) EXPECT_TRUE(std::isnan(static_cast<double>(static_cast<C>(y(r, c)))));  // between sequences
      else EXPECT_NEAR(static_cast<double>(static_cast<C>(y(r, c))), static_cast<double>(want.y(r, c)), 10 * epsilon);
    }
  }
  for (std::int64_t r = 0; r < 27; ++r) {
    for (std::int64_t c = 0; c < 10; ++c) {
      EXPECT_NEAR(static_cast<double>(static_cast<C>(dx(r, c))), static_cast<double>(want.dx(r, c)), 10 * epsilon);
    }
  }
  test::expect_near(dprojection, want.dprojection, std::min(1e-5, 20 * epsilon));
  EXPECT_TRUE(y.padding_untouched() && dprojection.padding_untouched());
}
TEST(Slots, CudaIsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
      compare_on_cuda<float>(device, mode, 1.2e-7);
      compare_on_cuda<double>(device, mode, 2.3e-16);
      compare_on_cuda<bf16>(device, mode, 1.0 / 256);
    }
  });
}

TEST(Slots, RefusesWhatDoesNotFit) {
  Slots<float> a;
  const auto forward = [&](const SlotShape& shape, const Matrix<float>& projection, Matrix<float>& y) {
    kernels::slots_forward(cpu, shape, projection.view(), a.x.view(), y.view());
  };
  Matrix<float> short_y(10, 10), other(6, 8);
  EXPECT_THROW(forward({3, 3, 7, 3, 9, 4}, a.projection, a.y), ShapeError);  // 10 columns, 3 heads
  EXPECT_THROW(forward({3, 2, 7, 3, 6, 4}, a.projection, a.y), ShapeError);  // blocks that overlap
  EXPECT_THROW(forward({3, 2, 7, 3, 9, 2}, a.projection, a.y), ShapeError);  // slots that overlap
  EXPECT_THROW(forward({4, 2, 7, 3, 9, 4}, a.projection, a.y), ShapeError);  // fewer rows than 4 sequences
  EXPECT_THROW(forward(a.shape, other, a.y), ShapeError);
  EXPECT_THROW(forward(a.shape, a.projection, short_y), ShapeError);
  Matrix<double> d(6, 7);
  EXPECT_THROW(kernels::slots_forward(cpu, a.shape, d.view(), a.x.view(), a.y.view()), DTypeError);
}

}  // namespace
}  // namespace tforge
