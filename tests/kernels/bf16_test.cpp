// Kernels on a CUDA device with operands in bf16 (and products in tf32), beside the CPU's in f32 with the same numbers.
// What a kernel rounds on its way (its result, P, the scores) is off by 2^-8 of its size at most; bounds are given in
// that unit, of the largest number of the result.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "device_matrix.h"
#include "kernels/device_libraries.h"
#include "kernels/elementwise.h"
#include "kernels/embedding.h"
#include "kernels/gelu.h"
#include "kernels/gemm.h"
#include "kernels/layer_norm.h"
#include "kernels/pattention.h"
#include "kernels/rms_norm.h"
#include "kernels/rotary.h"

namespace tforge {
namespace {

using kernels::Transpose;
using test::Matrix;

Stream cpu;  // NOLINT(cert-err58-cpp): does not throw
constexpr double kRounding = 1.0 / 256;

Matrix<float> widened(const Matrix<bf16>& m) {
  Matrix<float> wide(m.rows(), m.columns());
  for (std::int64_t r = 0; r < m.rows(); ++r) {
    for (std::int64_t c = 0; c < m.columns(); ++c) wide(r, c) = static_cast<float>(m(r, c));
  }
  return wide;
}

/// Random numbers that bf16 has, for the device and for the CPU.
struct Pair {
  Matrix<bf16> narrow;
  Matrix<float> wide;
  Pair(std::int64_t rows, std::int64_t columns, std::uint64_t seed, double size = 1, std::int64_t padding = 0)
      : narrow(rows, columns, padding), wide(rows, columns) {
    const auto numbers = Matrix<float>::random(rows, columns, seed, size);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < columns; ++c) narrow(r, c) = bf16(numbers(r, c));
    }
    wide = widened(narrow);
  }
};

void expect_rounded(const Matrix<bf16>& got, const Matrix<float>& want, double roundings) {
  test::expect_near(widened(got), want, roundings * kRounding * want.largest() + 1e-6);
  EXPECT_TRUE(got.padding_untouched());
}
void expect_rounded(const Matrix<float>& got, const Matrix<float>& want, double roundings) {
  test::expect_near(got, want, roundings * kRounding * want.largest() + 1e-6);
  EXPECT_TRUE(got.padding_untouched());
}

TEST(Bf16, CudaAddsAndScales) {
  test::on_cuda([](test::CudaDevice& device) {
    Stream& stream = device.stream;
    test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
      const Pair a(rows, columns, 1, 1, padding), b(rows, columns, 2);
      const auto row = Matrix<float>::random(1, columns, 3);
      Matrix<bf16> sum(rows, columns, padding), more(rows, columns), half(rows, columns, padding);
      Matrix<float> column_sums(1, columns), want(rows, columns), want_more(rows, columns), want_half(rows, columns),
          want_sums(1, columns);
      test::with_copies(
          device,
          [&](auto a_, auto b_, auto row_, auto sum_, auto more_, auto half_, auto sums_) {
            kernels::add(stream, a_, b_, sum_);
            kernels::add_to(stream, a_, GradMode::overwrite, more_);
            kernels::add_to(stream, b_, GradMode::accumulate, more_);
            kernels::add_row(stream, test::vector_of(row_), more_);
            kernels::scale(stream, 0.3, a_, half_);
            kernels::column_sums(stream, a_, GradMode::overwrite, test::vector_of(sums_));
          },
          a.narrow, b.narrow, row, sum, more, half, column_sums);
      kernels::add(cpu, a.wide.view(), b.wide.view(), want.view());
      want_more = want;
      kernels::add_row(cpu, row.vector(), want_more.view());
      kernels::scale(cpu, 0.3, a.wide.view(), want_half.view());
      kernels::column_sums(cpu, a.wide.view(), GradMode::overwrite, want_sums.vector());
      expect_rounded(sum, want, 1);
      expect_rounded(more, want_more, 2);
      expect_rounded(half, want_half, 1);
      test::expect_near(column_sums, want_sums, static_cast<double>(rows) * 4 * 0x1p-23);  // of numbers below 4 or so
    });
  });
}

TEST(Bf16, CudaGelu) {
  test::on_cuda([](test::CudaDevice& device) {
    test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
      const Pair x(rows, columns, 1, 2, padding), dy(rows, columns, 2);
      Matrix<bf16> y(rows, columns, padding), dx(rows, columns);
      Matrix<float> want_y(rows, columns), want_dx(rows, columns);
      test::with_copies(
          device,
          [&](auto x_, auto dy_, auto y_, auto dx_) {
            kernels::gelu_forward(device.stream, x_, y_);
            kernels::gelu_backward(device.stream, x_, dy_, GradMode::overwrite, dx_);
            kernels::gelu_backward(device.stream, x_, dy_, GradMode::accumulate, dx_);
          },
          x.narrow, dy.narrow, y, dx);
      kernels::gelu_forward(cpu, x.wide.view(), want_y.view());
      kernels::gelu_backward(cpu, x.wide.view(), dy.wide.view(), GradMode::overwrite, want_dx.view());
      kernels::gelu_backward(cpu, x.wide.view(), dy.wide.view(), GradMode::accumulate, want_dx.view());
      expect_rounded(y, want_y, 1);
      expect_rounded(dx, want_dx, 2);
    });
  });
}

TEST(Bf16, CudaProducts) {
  test::on_cuda([](test::CudaDevice& device) {
    const kernels::DeviceLibraries libraries(device.stream, device.memory);
    constexpr std::int64_t kSum = 31;
    const auto product = [&](Transpose a_op, Transpose b_op, std::int64_t n) {
      const Pair a = a_op == Transpose::no ? Pair(33, kSum, 1, 1, 2) : Pair(kSum, 33, 1, 1, 2),
                 b = b_op == Transpose::no ? Pair(kSum, n, 2) : Pair(n, kSum, 2);
      for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
        Matrix<bf16> narrow(33, n, 3);
        Matrix<float> wide(33, n), want(33, n);
        const Pair before(33, n, 3);
        if (mode == GradMode::accumulate) {
          narrow = Pair(33, n, 3, 1, 3).narrow;
          wide = want = before.wide;
        }
        test::with_copies(
            device,
            [&](auto a_, auto b_, auto narrow_, auto wide_) {
              kernels::gemm(device.stream, a_op, b_op, 0.5, a_, b_, mode, narrow_);
              kernels::gemm(device.stream, a_op, b_op, 0.5, a_, b_, mode, wide_);
            },
            a.narrow, b.narrow, narrow, wide);
        kernels::gemm(cpu, a_op, b_op, 0.5, a.wide.view(), b.wide.view(), mode, want.view());
        expect_rounded(narrow, want, 1);
        test::expect_near(wide, want, kSum * 0x1p-23 * want.largest());  // sums in f32
      }
    };
    for (const std::int64_t n : test::kAwkwardSizes) {
      product(Transpose::no, Transpose::yes, n);
      product(Transpose::no, Transpose::no, n);
      product(Transpose::yes, Transpose::no, n);
    }
    Matrix<bf16> none(3, 0), to(3, 2);
    test::with_copies(
        device,
        [&](auto none_, auto to_) {
          kernels::gemm(device.stream, Transpose::no, Transpose::yes, 1, none_, none_.row_range(0, 2),
                        GradMode::overwrite, to_);
        },
        none, to);
    EXPECT_EQ(widened(to).largest(), 0);
  });
}

TEST(Bf16, CudaNorms) {
  test::on_cuda([](test::CudaDevice& device) {
    Stream& stream = device.stream;
    test::at_awkward_sizes([&](std::int64_t rows, std::int64_t columns, std::int64_t padding) {
      if (columns == 1) return;  // a row of one number is 0 after its mean
      const Pair x(rows, columns, 1, 1, padding), dy(rows, columns, 2);
      const auto weight = Matrix<float>::random(1, columns, 3), bias = Matrix<float>::random(1, columns, 4);
      for (const bool layer : {true, false}) {
        Matrix<bf16> y(rows, columns, padding), dx(rows, columns, padding);
        Matrix<float> mean(rows, 1), factor(rows, 1), dweight(1, columns), dbias(1, columns);
        Matrix<float> want_y(rows, columns), want_dx(rows, columns), want_dweight(1, columns), want_dbias(1, columns);
        const auto run = [&](Stream& s, ConstTensorView x_, ConstTensorView w, ConstTensorView b, ConstTensorView dy_,
                             TensorView y_, TensorView mean_, TensorView factor_, TensorView dx_, TensorView dw,
                             TensorView db) {
          if (layer) {
            kernels::layer_norm_forward(s, x_, w, b, 1e-5, y_, mean_, factor_);
            kernels::layer_norm_backward(s, x_, w, mean_, factor_, dy_, GradMode::overwrite, dx_, GradMode::overwrite,
                                         dw, db);
          } else {
            kernels::rms_norm_forward(s, x_, w, 1e-5, y_, factor_);
            kernels::rms_norm_backward(s, x_, w, factor_, dy_, GradMode::overwrite, dx_, GradMode::overwrite, dw);
          }
        };
        test::with_copies(
            device,
            [&](auto x_, auto w, auto b, auto dy_, auto y_, auto mean_, auto factor_, auto dx_, auto dw, auto db) {
              run(stream, x_, test::vector_of(w), test::vector_of(b), dy_, y_, mean_, factor_, dx_, test::vector_of(dw),
                  test::vector_of(db));
            },
            x.narrow, weight, bias, dy.narrow, y, mean, factor, dx, dweight, dbias);
        run(cpu, x.wide.view(), weight.vector(), bias.vector(), dy.wide.view(), want_y.view(), mean.view(),
            factor.view(), want_dx.view(), want_dweight.vector(), want_dbias.vector());
        expect_rounded(y, want_y, 1);
        expect_rounded(dx, want_dx, 1);
        // Sums in f32 of products below 16 or so, by factors that are sums over the columns.
        const double bound = static_cast<double>(rows + columns) * 16 * 0x1p-23;
        test::expect_near(dweight, want_dweight, bound);
        if (layer) test::expect_near(dbias, want_dbias, bound);
      }
    });
  });
}

TEST(Bf16, CudaEmbedsAndRotates) {
  test::on_cuda([](test::CudaDevice& device) {
    Stream& stream = device.stream;
    constexpr std::int64_t kHeads = 2, kSeq = 7;
    for (const std::int64_t columns : {16, 18, 20}) {
      const Pair table(9, columns, 1), dy(14, columns, 2);
      const auto tokens = Matrix<std::int32_t>::of(1, 14, {3, 1, 4, 1, 5, 8, 2, 6, 5, 3, 5, 8, 0, 3});
      Matrix<std::int32_t> workspace(1, kernels::embedding_workspace(14, 9));
      Matrix<bf16> y(14, columns);
      Matrix<float> dtable(9, columns), want_y(14, columns), want_dtable(9, columns), cosine(kSeq, 4), sine(kSeq, 4);
      kernels::rotary_tables(cpu, 10000, cosine.view(), sine.view());
      test::with_copies(
          device,
          [&](auto t, auto table_, auto dy_, auto w, auto c, auto s, auto y_, auto dtable_) {
            kernels::embedding_forward(stream, test::vector_of(t), table_, 0, y_);
            kernels::rotary_apply(stream, kernels::RotaryDirection::forward, c, s, kHeads, kSeq, 0, y_);
            kernels::embedding_backward(stream, test::vector_of(t), dy_, 0, GradMode::overwrite, dtable_,
                                        test::vector_of(w));
            kernels::embedding_backward(stream, test::vector_of(t), dy_, 0, GradMode::accumulate, dtable_,
                                        test::vector_of(w));
          },
          tokens, table.narrow, dy.narrow, workspace, cosine, sine, y, dtable);
      kernels::embedding_forward(cpu, tokens.vector(), table.wide.view(), 0, want_y.view());
      kernels::rotary_apply(cpu, kernels::RotaryDirection::forward, cosine.view(), sine.view(), kHeads, kSeq, 0,
                            want_y.view());
      for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
        kernels::embedding_backward(cpu, tokens.vector(), dy.wide.view(), 0, mode, want_dtable.view(),
                                    workspace.vector());
      }
      expect_rounded(y, want_y, 1);
      test::expect_near(dtable, want_dtable, 8 * 4 * 0x1p-23);  // sums of up to 8 numbers below 4 or so
    }
  });
}

/// One layer, forward and backward, whole or in halves. U is as wide as the weight beside it.
template <class U>
auto compare_pattention(test::CudaDevice& device, PattentionNorm norm, bool halves, std::int64_t tokens) {
  Stream& stream = device.stream;
  constexpr std::int64_t kRows = 33, kIn = 32, kOut = 24;
  const double size = 1 / std::sqrt(static_cast<double>(kIn)), scale = initial_scale(norm, tokens);
  const Pair x(kRows, kIn, 1, 1, 3), keys(tokens, kIn, 2, size), values(tokens, kOut, 3), du(kRows, kOut, 4);
  const bool has_stat = norm != PattentionNorm::gelu_l2_norm, has_weight = norm != PattentionNorm::l2_norm_gelu;
  const auto dweight = Matrix<float>::random(kRows, 1, 5, 0.1);
  const auto run = [&](Stream& s, Device where, auto x_, auto k, auto v, auto du_, auto dw, auto scores, auto stat,
                       auto u, auto weight, auto dx, auto dk, auto dv, auto dscores, auto dot, auto workspace) {
    ASSERT_GE(workspace.elements(), kernels::pattention_backward_workspace(kRows, tokens, kIn, kOut, where));
    if (!has_stat) stat = {};
    if (!has_weight) weight = dw = {};
    if (norm != PattentionNorm::l2_norm_gelu) dot = {};
    const GradMode mode = GradMode::overwrite;
    if (halves) {
      kernels::pattention_scores_forward(s, norm, x_, k, scores, stat, workspace);
      kernels::pattention_mix_forward(s, norm, scale, scores, stat, v, u, weight, {}, workspace);
      kernels::pattention_mix_backward(s, norm, scale, scores, stat, v, du_, dw, mode, dv, dscores, dot, workspace);
      kernels::pattention_scores_backward(s, norm, scale, scores, stat, dot, x_, k, dscores, mode, dx, mode, dk,
                                          workspace);
    } else {
      const std::array forward{kernels::PattentionForward{scale, k, v, scores, stat, u, weight}};
      kernels::pattention_forward(s, norm, x_, forward, {}, workspace);
      const std::array backward{kernels::PattentionBackward{scale, scores, stat, k, v, du_, dw, mode, dk, mode, dv}};
      kernels::pattention_backward(s, norm, x_, backward, mode, dx, workspace);
    }
  };
  Matrix<U> u(kRows, kOut, 3);
  Matrix<bf16> scores(kRows, tokens), dx(kRows, kIn, 3), dscores(kRows, tokens),
      workspace(1, kernels::pattention_backward_workspace(kRows, tokens, kIn, kOut, Device::cuda));
  Matrix<float> stat(kRows, 1), weight(kRows, 1), dk(tokens, kIn), dv(tokens, kOut), dot(kRows, 1);
  Matrix<float> want_scores(kRows, tokens), want_u(kRows, kOut), want_dx(kRows, kIn), want_dscores(kRows, tokens),
      want_stat(kRows, 1), want_weight(kRows, 1), want_dk(tokens, kIn), want_dv(tokens, kOut), want_dot(kRows, 1),
      want_workspace(1, 1 << 20);
  Matrix<float> dw = dweight;
  test::with_copies(
      device, [&](auto... views) { run(stream, Device::cuda, views...); }, x.narrow, keys.narrow, values.narrow,
      du.narrow, dw, scores, stat, u, weight, dx, dk, dv, dscores, dot, workspace);
  run(cpu, Device::cpu, x.wide.view(), keys.wide.view(), values.wide.view(), du.wide.view(), dw.view(),
      want_scores.view(), want_stat.view(), want_u.view(), want_weight.view(), want_dx.view(), want_dk.view(),
      want_dv.view(), want_dscores.view(), want_dot.view(), want_workspace.view());
  expect_rounded(scores, want_scores, 1);
  expect_rounded(u, want_u, 3);
  expect_rounded(dx, want_dx, 4);
  expect_rounded(dk, want_dk, 4);
  expect_rounded(dv, want_dv, 4);
  if (has_weight) {
    expect_rounded(weight, want_weight, 4);
    // Beside that of the scores as they were rounded nothing more is lost.
    kernels::pattention_mix_forward(cpu, norm, scale, widened(scores).view(), has_stat ? stat.view() : TensorView{},
                                    values.wide.view(), want_u.view(), want_weight.view(), {}, want_workspace.view());
    test::expect_near(weight, want_weight, static_cast<double>(tokens) * 0x1p-22 * want_weight.largest());
  }
  return std::tuple(scores, u, dx, dk, dv);
}

/// Both ways, which have the same bits.
template <class U>
void compare_pattention(test::CudaDevice& device, PattentionNorm norm, std::int64_t tokens) {
  const auto whole = compare_pattention<U>(device, norm, false, tokens),
             halved = compare_pattention<U>(device, norm, true, tokens);
  EXPECT_TRUE(std::get<0>(whole).same_bits(std::get<0>(halved))) << "scores";
  EXPECT_TRUE(std::get<1>(whole).same_bits(std::get<1>(halved))) << "U";
  EXPECT_TRUE(std::get<2>(whole).same_bits(std::get<2>(halved))) << "dX";
  EXPECT_TRUE(std::get<3>(whole).same_bits(std::get<3>(halved))) << "dK";
  EXPECT_TRUE(std::get<4>(whole).same_bits(std::get<4>(halved))) << "dV";
}

TEST(Bf16, CudaPattention) {
  test::on_cuda([](test::CudaDevice& device) {
    const kernels::DeviceLibraries libraries(device.stream, device.memory);
    for (const PattentionNorm norm :
         {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
      SCOPED_TRACE(name_of(norm));
      for (const std::int64_t tokens : {31, 40, 257}) {
        if (norm == PattentionNorm::l2_norm_gelu) compare_pattention<bf16>(device, norm, tokens);
        else compare_pattention<float>(device, norm, tokens);
      }
    }
  });
}

/// Scores and statistic by products and a pass over rows, or by one kernel.
struct Scores {
  Matrix<bf16> scores;
  Matrix<float> stat;
};
Scores scores_by(test::CudaDevice& device, const char* way, PattentionNorm norm, const Pair& x, const Pair& keys) {
  const std::int64_t rows = x.wide.rows(), tokens = keys.wide.rows();
  kernels::DeviceLibraries libraries(device.stream, device.memory, F32Products::exact, Choosing::measured);
  const auto computed = [&] {
    Scores s{Matrix<bf16>(rows, tokens, tokens % 2 == 0 ? 0 : 3), Matrix<float>(rows, 1, 2)};
    Matrix<bf16> workspace(1, kernels::pattention_forward_workspace(rows, tokens, x.wide.columns(), 0, Device::cuda));
    test::with_copies(
        device,
        [&](auto x_, auto keys_, auto scores, auto stat, auto work) {
          kernels::pattention_scores_forward(device.stream, norm, x_, keys_, scores, stat, work);
        },
        x.narrow, keys.narrow, s.scores, s.stat, workspace);
    return s;
  };
  computed();  // to learn what there is to choose
  std::map<std::string, std::string> known = libraries.choices().known();
  int choices = 0;
  for (auto& [question, choice] : known) {
    if (!question.starts_with("pattention_scores ")) continue;
    EXPECT_TRUE(choice == "products" || choice == "fused") << choice;
    choice = way;
    ++choices;
  }
  EXPECT_EQ(choices, 1);
  libraries.settle(known, "the test");
  return computed();
}

TEST(Bf16, CudaScoresOfOneKernelAreThoseOfProducts) {
  test::on_cuda([](test::CudaDevice& device) {
    constexpr std::array<std::array<std::int64_t, 4>, 8> kSizes = {{// rows, tokens, columns, padding
                                                                    {1, 1, 1, 0},
                                                                    {33, 31, 33, 3},
                                                                    {31, 33, 32, 0},
                                                                    {257, 1, 31, 0},
                                                                    {33, 257, 40, 8},
                                                                    {130, 264, 96, 0},
                                                                    {1, 257, 257, 3},
                                                                    {257, 129, 16, 0}}};
    for (const PattentionNorm norm : {PattentionNorm::l2_norm_gelu, PattentionNorm::softmax}) {
      for (const auto& [rows, tokens, columns, padding] : kSizes) {
        SCOPED_TRACE(fmt::format("{} {} x {} x {}", name_of(norm), rows, tokens, columns));
        const Pair x(rows, columns, 1, 1, padding), keys(tokens, columns, 2, 1, padding);
        const Scores fused = scores_by(device, "fused", norm, x, keys),
                     products = scores_by(device, "products", norm, x, keys);
        Matrix<float> want(rows, tokens), want_stat(rows, 1);
        for (std::int64_t r = 0; r < rows; ++r) {
          double sum = 0, most = -std::numeric_limits<double>::infinity();
          for (std::int64_t t = 0; t < tokens; ++t) {
            double score = 0;
            for (std::int64_t c = 0; c < columns; ++c) score += double(x.wide(r, c)) * double(keys.wide(t, c));
            want(r, t) = static_cast<float>(score);
            const double rounded = static_cast<float>(fused.scores(r, t));
            sum += rounded * rounded;
            most = std::max(most, rounded);
          }
          want_stat(r, 0) = static_cast<float>(norm == PattentionNorm::softmax ? most : sum);
        }
        expect_rounded(fused.scores, want, 1 + static_cast<double>(columns) * 0x1p-14);
        expect_rounded(fused.scores, widened(products.scores), 2);
        test::expect_near(fused.stat, want_stat, static_cast<double>(tokens) * 0x1p-23 * want_stat.largest());
        EXPECT_TRUE(fused.stat.padding_untouched());
      }
    }
    Pair x(3, 8, 1), keys(5, 8, 2);
    EXPECT_THROW(scores_by(device, "guessed", PattentionNorm::softmax, x, keys), DataError);
  });
}

// As of the pass over rows: a row's statistic and its scores keep their bits when tokens with scores of 0 are appended.
TEST(Bf16, CudaScoresOfOneKernelKeepTheirBits) {
  test::on_cuda([](test::CudaDevice& device) {
    const Pair x(33, 40, 1), keys(150, 40, 2);
    const Scores before = scores_by(device, "fused", PattentionNorm::l2_norm_gelu, x, keys);
    for (const std::int64_t tokens : {151, 256, 257, 700}) {
      Pair more(tokens, 40, 2, 0);
      for (std::int64_t t = 0; t < keys.wide.rows(); ++t) {
        for (std::int64_t c = 0; c < 40; ++c) more.narrow(t, c) = keys.narrow(t, c);
      }
      const Scores after = scores_by(device, "fused", PattentionNorm::l2_norm_gelu, x, more);
      for (std::int64_t r = 0; r < 33; ++r) {
        ASSERT_EQ(after.stat(r, 0), before.stat(r, 0)) << tokens;
        for (std::int64_t t = 0; t < 150; ++t) ASSERT_EQ(after.scores(r, t).bits, before.scores(r, t).bits);
      }
    }
  });
}

// A layer in one call asks the same question as its first half, and what is measured counts no floored rows.
TEST(Bf16, CudaMeasuresWholeLayers) {
  test::on_cuda([](test::CudaDevice& device) {
    constexpr std::int64_t kRows = 33, kTokens = 40, kIn = 32, kOut = 24;
    constexpr PattentionNorm kNorm = PattentionNorm::l2_norm_gelu;
    const double scale = initial_scale(kNorm, kTokens);
    Pair x(kRows, kIn, 1), keys(kTokens, kIn, 2), values(kTokens, kOut, 3);
    for (std::int64_t c = 0; c < kIn; ++c) x.narrow(7, c) = bf16(0.0F);
    struct Result {
      Matrix<bf16> scores{kRows, kTokens}, u{kRows, kOut};
      Matrix<float> stat{kRows, 1};
      Matrix<double> floored = Matrix<double>::of(1, 1, {0});
    };
    const auto compute = [&](bool halves) {
      Result r;
      Matrix<bf16> workspace(1, kernels::pattention_forward_workspace(kRows, kTokens, kIn, kOut, Device::cuda));
      test::with_copies(
          device,
          [&](auto x_, auto k, auto v, auto scores, auto stat, auto u, auto floored, auto work) {
            Stream& stream = device.stream;
            if (halves) {
              kernels::pattention_scores_forward(stream, kNorm, x_, k, scores, stat, work);
              kernels::pattention_mix_forward(stream, kNorm, scale, scores, stat, v, u, {}, floored, work);
            } else {
              const std::array layer{kernels::PattentionForward{scale, k, v, scores, stat, u, {}}};
              kernels::pattention_forward(stream, kNorm, x_, layer, floored, work);
            }
          },
          x.narrow, keys.narrow, values.narrow, r.scores, r.stat, r.u, r.floored, workspace);
      EXPECT_EQ(r.floored(0, 0), 1);
      return r;
    };
    for (const char* way : {"products", "fused"}) {
      kernels::DeviceLibraries libraries(device.stream, device.memory, F32Products::exact, Choosing::measured);
      compute(false);
      std::map<std::string, std::string> known = libraries.choices().known();
      for (auto& [question, choice] : known) {
        if (question.starts_with("pattention_scores ")) choice = way;
      }
      libraries.settle(known, "the test");
      const Result whole = compute(false), halved = compute(true);
      EXPECT_EQ(libraries.choices().known(), known) << "the halves ask nothing else";
      EXPECT_TRUE(whole.scores.same_bits(halved.scores)) << way;
      EXPECT_TRUE(whole.stat.same_bits(halved.stat)) << way;
      EXPECT_TRUE(whole.u.same_bits(halved.u)) << way;
    }
  });
}

TEST(Bf16, CudaNormalizesRows) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const PattentionNorm norm : {PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
      for (const std::int64_t columns : {31, 44}) {  // the latter in packs
        SCOPED_TRACE(name_of(norm));
        constexpr std::int64_t kRows = 33;
        const std::int64_t padding = columns % 2 == 0 ? 4 : 3;
        const auto u = Matrix<float>::random(kRows, columns, 1);
        auto weight = Matrix<float>::random(kRows, 1, 2);
        for (std::int64_t r = 0; r < kRows; ++r) weight(r, 0) = r == 7 ? 0 : 1 + std::abs(weight(r, 0));
        if (norm == PattentionNorm::softmax) weight(7, 0) = 1;
        const Pair dy(kRows, columns, 3, 1, padding);
        Matrix<bf16> y(kRows, columns, padding);
        Matrix<float> du(kRows, columns, padding), dweight(kRows, 1), want_y(kRows, columns), want_du(kRows, columns),
            want_dweight(kRows, 1);
        const auto run = [&](Stream& stream, auto u_, auto w, auto dy_, auto y_, auto du_, auto dw) {
          kernels::row_normalize_forward(stream, norm, 3.0, u_, w, y_, {});
          kernels::row_normalize_backward(stream, norm, 3.0, u_, w, dy_, du_, dw);
        };
        test::with_copies(
            device, [&](auto... views) { run(device.stream, views...); }, u, weight, dy.narrow, y, du, dweight);
        run(cpu, u.view(), weight.view(), dy.wide.view(), want_y.view(), want_du.view(), want_dweight.view());
        expect_rounded(y, want_y, 1);
        // Nothing else is rounded to bf16: the sums are of `columns` numbers in f32.
        test::expect_near(du, want_du, 0x1p-21 * want_du.largest());
        test::expect_near(dweight, want_dweight, static_cast<double>(columns) * 0x1p-21 * want_dweight.largest());
      }
    }
  });
}

TEST(Tf32, CudaRoundsTheOperands) {
  test::on_cuda([](test::CudaDevice& device) {
    // Tensor cores are allowed by that, not demanded: a shape that suits them.
    constexpr std::int64_t kSide = 128;
    const auto a = Matrix<float>::random(kSide, kSide, 1), b = Matrix<float>::random(kSide, kSide, 2);
    Matrix<float> exact(kSide, kSide), rounded(kSide, kSide);
    const auto multiply = [&](F32Products f32, Matrix<float>& c) {
      const kernels::DeviceLibraries libraries(device.stream, device.memory, f32);
      test::with_copies(
          device,
          [&](auto a_, auto b_, auto c_) {
            kernels::gemm(device.stream, Transpose::no, Transpose::yes, 1, a_, b_, GradMode::overwrite, c_);
          },
          a, b, c);
    };
    multiply(F32Products::exact, exact);
    multiply(F32Products::tf32, rounded);
    EXPECT_FALSE(rounded.same_bits(exact));
    test::expect_near(rounded, exact, kSide * 2.0 / 2048);
  });
}

TEST(Bf16, TheProcessorRefusesByName) {
  Pair x(2, 3, 1);
  try {
    kernels::gelu_forward(cpu, x.narrow.view(), x.narrow.view());
    FAIL();
  } catch (const DTypeError& error) {
    EXPECT_STREQ(error.what(), "gelu_forward: computes in f32 or f64, not in bf16");
  }
}

}  // namespace
}  // namespace tforge
