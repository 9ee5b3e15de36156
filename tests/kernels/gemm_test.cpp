#include "kernels/gemm.h"

#include <string>

#include "device_matrix.h"
#include "kernels/device_libraries.h"
#include "matrix.h"

namespace tforge {
namespace {

using kernels::Transpose;
using test::Matrix;
Stream cpu;

/// op(A) op(B) in f64, one element after the other.
template <class T>
Matrix<double> plain(Transpose a_op, Transpose b_op, const Matrix<T>& a, const Matrix<T>& b, std::int64_t m,
                     std::int64_t n, std::int64_t k) {
  Matrix<double> c(m, n);
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (std::int64_t l = 0; l < k; ++l) {
        sum += static_cast<double>(a_op == Transpose::yes ? a(l, i) : a(i, l)) *
               static_cast<double>(b_op == Transpose::yes ? b(j, l) : b(l, j));
      }
      c(i, j) = sum;
    }
  }
  return c;
}

struct Case {
  std::int64_t m, n, k;
};

template <class T>
void compare(const Case& s, Transpose a_op, Transpose b_op, double epsilon) {
  SCOPED_TRACE(std::to_string(s.m) + " x " + std::to_string(s.n) + " x " + std::to_string(s.k) + " ops " +
               std::to_string(static_cast<int>(a_op)) + std::to_string(static_cast<int>(b_op)));
  const auto a = a_op == Transpose::yes ? Matrix<T>::random(s.k, s.m, 1, 1, 3) : Matrix<T>::random(s.m, s.k, 1, 1, 3);
  const auto b = b_op == Transpose::yes ? Matrix<T>::random(s.n, s.k, 2, 1, 1) : Matrix<T>::random(s.k, s.n, 2, 1, 1);
  Matrix<double> want = plain(a_op, b_op, a, b, s.m, s.n, s.k);
  const double tolerance = epsilon * 8 * std::max(1.0, static_cast<double>(s.k));
  Matrix<T> c(s.m, s.n, 2);
  kernels::gemm(cpu, a_op, b_op, 1, a.view(), b.view(), GradMode::overwrite, c.view());  // over NaN
  test::expect_near(c, want, tolerance);
  kernels::gemm(cpu, a_op, b_op, -0.5, a.view(), b.view(), GradMode::accumulate, c.view());
  for (std::int64_t i = 0; i < s.m; ++i) {
    for (std::int64_t j = 0; j < s.n; ++j) want(i, j) *= 0.5;
  }
  test::expect_near(c, want, tolerance);
  EXPECT_TRUE(c.padding_untouched());
}

TEST(Gemm, ByHand) {
  const auto a = Matrix<float>::of(2, 2, {1, 2, 3, 4});
  const auto b = Matrix<float>::of(2, 2, {5, 6, 7, 8});
  Matrix<float> c(2, 2);
  kernels::gemm(cpu, Transpose::no, Transpose::yes, 2, a.view(), b.view(), GradMode::overwrite, c.view());
  EXPECT_TRUE(c.same_bits(Matrix<float>::of(2, 2, {34, 46, 78, 106})));
}

TEST(Gemm, AllOpsAtAwkwardSizes) {
  for (const Case& s :
       {Case{1, 1, 1}, Case{1, 33, 17}, Case{1, 700, 31}, Case{5, 257, 64}, Case{9, 7, 3}, Case{257, 33, 19},
        Case{33, 1100, 65}, Case{1030, 130, 70}, Case{4, 3, 0}, Case{20, 3, 0}, Case{0, 3, 5}, Case{3, 0, 5}}) {
    for (const Transpose a_op : {Transpose::no, Transpose::yes}) {
      for (const Transpose b_op : {Transpose::no, Transpose::yes}) {
        compare<float>(s, a_op, b_op, 6e-8);
        compare<double>(s, a_op, b_op, 1.2e-16);
      }
    }
  }
}

TEST(Gemm, ThreadsDoNotShow) {
  for (const Case& s : {Case{600, 200, 100}, Case{200, 2050, 40}, Case{1, 3000, 500}, Case{7, 900, 300}}) {
    const auto a = Matrix<float>::random(s.m, s.k, 1);
    const auto b = Matrix<float>::random(s.n, s.k, 2);
    Matrix<float> one(s.m, s.n), two(s.m, s.n);
    test::at_one_and_two_threads([&](int threads) {
      kernels::gemm(cpu, Transpose::no, Transpose::yes, 1, a.view(), b.view(), GradMode::overwrite,
                    threads == 1 ? one.view() : two.view());
    });
    EXPECT_TRUE(one.same_bits(two)) << s.m << " x " << s.n;
  }
}

TEST(Gemm, RefusesOperandsThatDoNotFit) {
  Matrix<float> a(2, 3), b(4, 3), c(2, 4);
  Matrix<double> d(2, 4);
  const auto multiply = [&](Transpose b_op, ConstTensorView right, TensorView out) {
    kernels::gemm(cpu, Transpose::no, b_op, 1, a.view(), right, GradMode::overwrite, out);
  };
  EXPECT_THROW(multiply(Transpose::no, b.view(), c.view()), ShapeError);
  EXPECT_THROW(multiply(Transpose::yes, b.view(), d.view()), DTypeError);
  EXPECT_THROW(multiply(Transpose::yes, {}, c.view()), ShapeError);
  TensorView overlapping = c.view();
  overlapping.row_stride = 3;
  EXPECT_THROW(multiply(Transpose::yes, b.view(), overlapping), ShapeError);
  Stream gpu(Device::cuda);  // no code for it in this build, or memory of the host
  EXPECT_THROW(kernels::gemm(gpu, Transpose::no, Transpose::yes, 1, a.view(), b.view(), GradMode::overwrite, c.view()),
               Error);
}

TEST(Gemm, RuntimeHasTheOpenMpFlavourAndKernelsForThisProcessor) {
  EXPECT_NO_THROW(kernels::start_cpu_runtime(1));
  const std::string description = kernels::blas_description();
  EXPECT_NE(description.find("OpenBLAS"), std::string::npos);
  EXPECT_EQ(description.find("Prescott"), std::string::npos) << description;
}

template <class T>
void compare_on_cuda(test::CudaDevice& device, const Case& s, Transpose a_op, Transpose b_op, double epsilon) {
  SCOPED_TRACE(std::to_string(s.m) + " x " + std::to_string(s.n) + " x " + std::to_string(s.k));
  const auto a = a_op == Transpose::yes ? Matrix<T>::random(s.k, s.m, 1, 1, 3) : Matrix<T>::random(s.m, s.k, 1, 1, 3);
  const auto b = b_op == Transpose::yes ? Matrix<T>::random(s.n, s.k, 2, 1, 1) : Matrix<T>::random(s.k, s.n, 2);
  Matrix<double> want = plain(a_op, b_op, a, b, s.m, s.n, s.k);
  for (std::int64_t i = 0; i < s.m; ++i) {
    for (std::int64_t j = 0; j < s.n; ++j) want(i, j) *= 0.5;
  }
  Matrix<T> c(s.m, s.n, 2), again = c;
  for (Matrix<T>* to : {&c, &again}) {
    test::with_copies(
        device,
        [&](auto a_, auto b_, auto c_) {
          kernels::gemm(device.stream, a_op, b_op, 1, a_, b_, GradMode::overwrite, c_);  // over NaN
          kernels::gemm(device.stream, a_op, b_op, -0.5, a_, b_, GradMode::accumulate, c_);
        },
        a, b, *to);
  }
  test::expect_near(c, want, epsilon * 8 * std::max(1.0, static_cast<double>(s.k)));
  EXPECT_TRUE(c.padding_untouched());
  EXPECT_TRUE(c.same_bits(again));
}
TEST(Gemm, CudaFollowsTheFormula) {
  test::on_cuda([](test::CudaDevice& device) {
    kernels::DeviceLibraries libraries(device.stream, device.memory);
    for (const Transpose a_op : {Transpose::no, Transpose::yes}) {
      for (const Transpose b_op : {Transpose::no, Transpose::yes}) {
        for (const Case& s :
             {Case{1, 1, 1}, {1, 33, 257}, {31, 33, 257}, {257, 31, 33}, {64, 128, 96}, {33, 1, 31}, {5, 7, 0}}) {
          compare_on_cuda<float>(device, s, a_op, b_op, 1.2e-7);
          compare_on_cuda<double>(device, s, a_op, b_op, 2.3e-16);
        }
      }
    }
  });
}

/// C = 1 + A B with an algorithm that `libraries` chooses.
Matrix<float> product_on(test::CudaDevice& device, const Matrix<float>& a, const Matrix<float>& b) {
  Matrix<float> c(a.rows(), b.columns());
  for (std::int64_t i = 0; i < c.rows(); ++i) {
    for (std::int64_t j = 0; j < c.columns(); ++j) c(i, j) = 1;
  }
  test::with_copies(
      device,
      [&](auto a_, auto b_, auto c_) {
        kernels::gemm(device.stream, Transpose::no, Transpose::no, 1, a_, b_, GradMode::accumulate, c_);
      },
      a, b, c);
  return c;
}

TEST(Gemm, CudaMeasuresAlgorithmsOnceAndKeepsThem) {
  test::on_cuda([](test::CudaDevice& device) {
    const auto a = Matrix<float>::random(33, 517, 1), b = Matrix<float>::random(517, 65, 2);
    Matrix<double> want = plain(Transpose::no, Transpose::no, a, b, 33, 65, 517);
    for (std::int64_t i = 0; i < 33; ++i) {
      for (std::int64_t j = 0; j < 65; ++j) want(i, j) += 1;
    }
    std::map<std::string, std::string> known;
    Matrix<float> measured(1, 1);
    {
      kernels::DeviceLibraries libraries(device.stream, device.memory, F32Products::exact, Choosing::measured);
      setenv("TFORGE_EMULATOR_FASTEST", "3", 1);
      measured = product_on(device, a, b);
      test::expect_near(measured, want, 1.2e-7 * 8 * 517);  // the measurement has added nothing
      known = libraries.choices().known();
      EXPECT_EQ(known.size(), 1U);
      setenv("TFORGE_EMULATOR_FASTEST", "2", 1);
      EXPECT_TRUE(product_on(device, a, b).same_bits(measured));
      EXPECT_EQ(libraries.choices().known(), known);
    }
    {
      kernels::DeviceLibraries libraries(device.stream, device.memory, F32Products::exact, Choosing::measured);
      libraries.settle(known, "there");
      EXPECT_TRUE(product_on(device, a, b).same_bits(measured));
      // What is not known is not measured any more.
      product_on(device, Matrix<float>::random(5, 517, 3), b);
      EXPECT_EQ(libraries.choices().known(), known);
    }
    {
      kernels::DeviceLibraries libraries(device.stream, device.memory);
      const Matrix<float> by_rule = product_on(device, a, b);
      EXPECT_TRUE(libraries.choices().known().empty());
      if (libraries.bits_depend_on().starts_with("an emulated device")) {
        EXPECT_FALSE(by_rule.same_bits(measured));  // else the test shows nothing
      }
    }
    {
      kernels::DeviceLibraries libraries(device.stream, device.memory, F32Products::exact, Choosing::measured);
      const std::string question = known.begin()->first;
      std::vector<std::string> all_damaged = {"1234"};
      // What cuBLASLt itself makes of bytes that it has not made, it does not say.
      if (libraries.bits_depend_on().starts_with("an emulated device")) {
        all_damaged.emplace_back(known.begin()->second.size(), 'f');
      }
      for (const std::string& damaged : all_damaged) {
        libraries.settle({{question, damaged}}, "the record");
        try {
          product_on(device, a, b);
          FAIL() << damaged;
        } catch (const DataError& error) {
          EXPECT_EQ(std::string(error.what()), "the record is damaged: \"" + damaged +
                                                   "\" is no algorithm of cuBLASLt for " + question +
                                                   "; remove it, and they are measured anew");
        }
      }
    }
    unsetenv("TFORGE_EMULATOR_FASTEST");
  });
}

TEST(Gemm, CudaNeedsItsLibraries) {
  test::on_cuda([](test::CudaDevice& device) {
    const auto a = Matrix<float>::random(3, 3, 1);
    Matrix<float> c(3, 3);
    test::with_copies(
        device,
        [&](auto a_, auto c_) {
          EXPECT_THROW(kernels::gemm(device.stream, Transpose::no, Transpose::no, 1, a_, a_, GradMode::overwrite, c_),
                       InternalError);
        },
        a, c);
  });
}

}  // namespace
}  // namespace tforge
