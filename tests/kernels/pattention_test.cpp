#include "kernels/pattention.h"

#include <array>
#include <cmath>
#include <string>

#include "device_matrix.h"
#include "kernels/device_libraries.h"
#include "matrix.h"

namespace tforge {
namespace {

using test::Matrix;
Stream cpu;
constexpr PattentionNorm kNorms[] = {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm,
                                     PattentionNorm::softmax};

/// One thread unless a test says otherwise: most of the calls are small.
class Pattention : public testing::Test {
 protected:
  void SetUp() override { kernels::start_cpu_runtime(1); }
};

bool has_stat(PattentionNorm norm) { return norm != PattentionNorm::gelu_l2_norm; }
bool has_weight(PattentionNorm norm) { return norm != PattentionNorm::l2_norm_gelu; }

/// One layer (or one rank's shard of it): its operands, what the calls write, and the calls.
template <class T>
struct Layer {
  PattentionNorm norm;
  double scale;
  Matrix<T> x, keys, values;
  Matrix<T> scores, stat, u, weight, y;
  Matrix<T> dy, du, dweight, dscores, dot, dx, dkeys, dvalues;
  double floored = 0;

  Layer(PattentionNorm norm_, double scale_, const Matrix<T>& x_, const Matrix<T>& keys_, const Matrix<T>& values_,
        std::int64_t padding = 0)
      : norm(norm_),
        scale(scale_),
        x(x_),
        keys(keys_),
        values(values_),
        scores(rows(), tokens(), padding),
        stat(rows(), 1, padding),
        u(rows(), d_out(), padding),
        weight(rows(), 1, padding),
        y(rows(), d_out(), padding),
        dy(Matrix<T>::random(rows(), d_out(), 9, 1, padding)),
        du(rows(), d_out(), padding),
        dweight(rows(), 1, padding),
        dscores(rows(), tokens(), padding),
        dot(rows(), 1, padding),
        dx(rows(), keys.columns(), padding),
        dkeys(tokens(), keys.columns(), padding),
        dvalues(tokens(), d_out(), padding) {}
  /// Random operands; scores of about unit size, so that no activation is in its tail.
  static Layer random(PattentionNorm norm, std::int64_t rows, std::int64_t d_in, std::int64_t n, std::int64_t d_out,
                      std::int64_t padding = 0) {
    const double size = 1 / std::sqrt(static_cast<double>(d_in));
    return Layer(norm, initial_scale(norm, std::max<std::int64_t>(n, 1)), Matrix<T>::random(rows, d_in, 1, 1, padding),
                 Matrix<T>::random(n, d_in, 2, size, padding), Matrix<T>::random(n, d_out, 3, size, padding), padding);
  }

  std::int64_t rows() const { return x.rows(); }
  std::int64_t tokens() const { return keys.rows(); }
  std::int64_t d_out() const { return values.columns(); }
  TensorView stat_view() { return has_stat(norm) ? stat.view() : TensorView{}; }
  TensorView weight_view() { return has_weight(norm) ? weight.view() : TensorView{}; }
  TensorView dweight_view() { return has_weight(norm) ? dweight.view() : TensorView{}; }
  TensorView dot_view() { return has_stat(norm) && !has_weight(norm) ? dot.view() : TensorView{}; }
  Matrix<T> workspace(std::int64_t elements) const { return Matrix<T>(1, elements); }
  Matrix<T> forward_workspace() const {
    return workspace(kernels::pattention_forward_workspace(rows(), tokens(), keys.columns(), d_out()));
  }
  Matrix<T> backward_workspace() const {
    return workspace(kernels::pattention_backward_workspace(rows(), tokens(), keys.columns(), d_out()));
  }

  /// Anew.
  TensorView counter() {
    floored = 0;
    return {&floored, DType::f64, Device::cpu, Shape{1}, 1};
  }

  void scores_forward() {
    auto w = forward_workspace();
    kernels::pattention_scores_forward(cpu, norm, x.view(), keys.view(), scores.view(), stat_view(), w.view());
  }
  void mix_forward() {
    auto w = forward_workspace();
    kernels::pattention_mix_forward(cpu, norm, scale, scores.view(), stat_view(), values.view(), u.view(),
                                    weight_view(), counter(), w.view());
  }
  void normalize() {
    if (has_weight(norm)) {
      kernels::row_normalize_forward(cpu, norm, scale, u.view(), weight.view(), y.view(), counter());
    } else {
      y = u;
    }
  }
  void normalize_backward() {
    if (has_weight(norm)) {
      kernels::row_normalize_backward(cpu, norm, scale, u.view(), weight.view(), dy.view(), du.view(), dweight.view());
    } else {
      du = dy;
    }
  }
  void mix_backward(GradMode mode = GradMode::overwrite) {
    auto w = backward_workspace();
    kernels::pattention_mix_backward(cpu, norm, scale, scores.view(), stat_view(), values.view(), du.view(),
                                     dweight_view(), mode, dvalues.view(), dscores.view(), dot_view(), w.view());
  }
  void scores_backward(GradMode mode = GradMode::overwrite) {
    auto w = backward_workspace();
    kernels::pattention_scores_backward(cpu, norm, scale, scores.view(), stat_view(), dot_view(), x.view(), keys.view(),
                                        dscores.view(), mode, dx.view(), mode, dkeys.view(), w.view());
  }

  kernels::PattentionForward as_forward() {
    return {scale, keys.view(), values.view(), scores.view(), stat_view(), u.view(), weight_view()};
  }
  kernels::PattentionBackward as_backward(GradMode mode) {
    return {scale,          scores.view(), stat_view(),  keys.view(), values.view(), du.view(),
            dweight_view(), mode,          dkeys.view(), mode,        dvalues.view()};
  }
  void fused_forward() {
    auto w = forward_workspace();
    const std::array group{as_forward()};
    kernels::pattention_forward(cpu, norm, x.view(), group, counter(), w.view());
    normalize();
  }
  void fused_backward(GradMode mode = GradMode::overwrite) {
    normalize_backward();
    auto w = backward_workspace();
    const std::array group{as_backward(mode)};
    kernels::pattention_backward(cpu, norm, x.view(), group, mode, dx.view(), w.view());
  }
  void two_phase() {
    scores_forward();
    mix_forward();
    normalize();
    normalize_backward();
    mix_backward();
    scores_backward();
  }
  void fused() {
    fused_forward();
    fused_backward();
  }
  bool same_results(const Layer& other) const {
    return scores.same_bits(other.scores) && y.same_bits(other.y) && dx.same_bits(other.dx) &&
           dkeys.same_bits(other.dkeys) && dvalues.same_bits(other.dvalues);
  }
};

std::string name(PattentionNorm norm) { return std::string(name_of(norm)); }

double exact_gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }

/// Y from its definition, in f64.
template <class T>
Matrix<double> by_definition(const Layer<T>& l) {
  Matrix<double> y(l.rows(), l.d_out());
  for (std::int64_t i = 0; i < l.rows(); ++i) {
    std::vector<double> a(static_cast<std::size_t>(l.tokens()));
    double squares = 0, gelu_squares = 0, most = -HUGE_VAL, exponentials = 0;
    for (std::int64_t j = 0; j < l.tokens(); ++j) {
      double sum = 0;
      for (std::int64_t k = 0; k < l.x.columns(); ++k) {
        sum += static_cast<double>(l.x(i, k)) * static_cast<double>(l.keys(j, k));
      }
      a[static_cast<std::size_t>(j)] = sum;
      squares += sum * sum;
      gelu_squares += exact_gelu(sum) * exact_gelu(sum);
      most = std::max(most, sum);
    }
    for (const double value : a) exponentials += std::exp(value - most);
    for (std::int64_t c = 0; c < l.d_out(); ++c) y(i, c) = 0;
    for (std::int64_t j = 0; j < l.tokens(); ++j) {
      const double value = a[static_cast<std::size_t>(j)];
      double p = 0;
      switch (l.norm) {
        case PattentionNorm::l2_norm_gelu: p = exact_gelu(l.scale * value / std::sqrt(squares)); break;
        case PattentionNorm::gelu_l2_norm: p = l.scale * exact_gelu(value) / std::sqrt(gelu_squares); break;
        case PattentionNorm::softmax: p = l.scale * std::exp(value - most) / exponentials; break;
      }
      for (std::int64_t c = 0; c < l.d_out(); ++c) y(i, c) += p * static_cast<double>(l.values(j, c));
    }
  }
  return y;
}

TEST_F(Pattention, ByHand) {
  // One row (3, 4) against the unit keys: A = (3, 4), r = 5; scale 5 gives B = A.
  const auto x = Matrix<double>::of(1, 2, {3, 4});
  const auto keys = Matrix<double>::of(2, 2, {1, 0, 0, 1});
  const auto values = Matrix<double>::of(2, 1, {1, 10});
  Layer<double> l2(PattentionNorm::l2_norm_gelu, 5, x, keys, values);
  l2.fused_forward();
  EXPECT_DOUBLE_EQ(l2.stat(0, 0), 25);
  EXPECT_NEAR(l2.y(0, 0), exact_gelu(3) + 10 * exact_gelu(4), 1e-14);
  Layer<double> gelu(PattentionNorm::gelu_l2_norm, 2, x, keys, values);
  gelu.fused_forward();
  const double g3 = exact_gelu(3), g4 = exact_gelu(4);
  EXPECT_NEAR(gelu.weight(0, 0), g3 * g3 + g4 * g4, 1e-13);
  EXPECT_NEAR(gelu.y(0, 0), 2 * (g3 + 10 * g4) / std::hypot(g3, g4), 1e-13);
  Layer<double> soft(PattentionNorm::softmax, 2, x, keys, values);
  soft.fused_forward();
  EXPECT_DOUBLE_EQ(soft.stat(0, 0), 4);
  EXPECT_NEAR(soft.y(0, 0), 2 * (std::exp(-1) + 10) / (std::exp(-1) + 1), 1e-14);
}

TEST_F(Pattention, MatchesTheDefinitionAtAwkwardSizes) {
  struct Sizes {
    std::int64_t rows, d_in, n, d_out;
  };
  for (const Sizes s :
       {Sizes{1, 1, 1, 1}, Sizes{1, 33, 300, 17}, Sizes{3, 7, 5, 65}, Sizes{16, 64, 257, 64}, Sizes{17, 64, 257, 64},
        Sizes{37, 31, 33, 29}, Sizes{100, 300, 31, 48}, Sizes{257, 16, 260, 33}, Sizes{800, 12, 40, 8}}) {
    for (const PattentionNorm norm : kNorms) {
      SCOPED_TRACE(name(norm) + " " + std::to_string(s.rows) + " " + std::to_string(s.d_in) + " " +
                   std::to_string(s.n) + " " + std::to_string(s.d_out));
      auto exact = Layer<double>::random(norm, s.rows, s.d_in, s.n, s.d_out, 3);
      exact.fused_forward();
      const auto want = by_definition(exact);
      test::expect_near(exact.y, want, 1e-13 * std::max(1.0, want.largest()));
      EXPECT_TRUE(exact.u.padding_untouched() && exact.scores.padding_untouched() && exact.stat.padding_untouched());
      auto single = Layer<float>::random(norm, s.rows, s.d_in, s.n, s.d_out);
      single.fused_forward();
      const auto single_want = by_definition(single);
      test::expect_near(single.y, single_want, 3e-6 * std::max(1.0, single_want.largest()));
    }
  }
}

TEST_F(Pattention, GradientsMatchFiniteDifferences) {
  for (const PattentionNorm norm : kNorms) {
    for (const std::int64_t rows : {std::int64_t{5}, std::int64_t{19}}) {  // the paths of few and of many rows
      SCOPED_TRACE(name(norm));
      auto l = Layer<double>::random(norm, rows, 7, 37, 9, 2);
      l.fused();
      const auto dx = l.dx, dkeys = l.dkeys, dvalues = l.dvalues;
      EXPECT_TRUE(dx.padding_untouched() && dkeys.padding_untouched() && dvalues.padding_untouched());
      const auto loss = [&] {
        l.fused_forward();
        return l.y.dot(l.dy);
      };
      test::expect_gradient(l.x, dx, loss);
      test::expect_gradient(l.keys, dkeys, loss);
      test::expect_gradient(l.values, dvalues, loss);
    }
  }
}

/// f32 gradients against f64 ones, over several superblocks of rows, blocks of tokens and threads.
TEST_F(Pattention, F32GradientsStayNearF64) {
  for (const PattentionNorm norm : kNorms) {
    SCOPED_TRACE(name(norm));
    auto single = Layer<float>::random(norm, 1700, 40, 300, 35);
    auto exact = Layer<double>::random(norm, 1700, 40, 300, 35);
    single.fused();
    exact.fused();
    test::expect_near(single.dx, exact.dx, 1e-5 * exact.dx.largest());
    test::expect_near(single.dkeys, exact.dkeys, 1e-5 * exact.dkeys.largest());
    test::expect_near(single.dvalues, exact.dvalues, 1e-5 * exact.dvalues.largest());
  }
}

TEST_F(Pattention, WeightGradientsAreSumsOverRows) {
  for (const PattentionNorm norm : kNorms) {
    SCOPED_TRACE(name(norm));
    constexpr std::int64_t kRows = 700, kPart = 100;
    auto whole = Layer<double>::random(norm, kRows, 20, 60, 15);
    whole.fused();
    Matrix<double> dkeys(60, 20), dvalues(60, 15);
    for (std::int64_t first = 0; first < kRows; first += kPart) {
      Matrix<double> x(kPart, 20);
      Layer<double> part(norm, whole.scale, x, whole.keys, whole.values);
      for (std::int64_t i = 0; i < kPart; ++i) {
        for (std::int64_t k = 0; k < 20; ++k) part.x(i, k) = whole.x(first + i, k);
        for (std::int64_t c = 0; c < 15; ++c) part.dy(i, c) = whole.dy(first + i, c);
      }
      part.dkeys = dkeys;
      part.dvalues = dvalues;
      part.fused_forward();
      part.normalize_backward();
      auto w = part.backward_workspace();
      const GradMode mode = first == 0 ? GradMode::overwrite : GradMode::accumulate;
      const std::array group{part.as_backward(mode)};
      kernels::pattention_backward(cpu, norm, part.x.view(), group, GradMode::overwrite, part.dx.view(), w.view());
      dkeys = part.dkeys;
      dvalues = part.dvalues;
      for (std::int64_t i = 0; i < kPart; ++i) {
        for (std::int64_t k = 0; k < 20; ++k) ASSERT_EQ(part.dx(i, k), whole.dx(first + i, k));
      }
    }
    test::expect_near(whole.dkeys, dkeys, 1e-12 * dkeys.largest());
    test::expect_near(whole.dvalues, dvalues, 1e-12 * dvalues.largest());
  }
}

TEST_F(Pattention, TwoPhasesAndThreadsGiveTheSameBits) {
  for (const PattentionNorm norm : kNorms) {
    for (const std::int64_t rows : {1, 8, 40, 900}) {
      SCOPED_TRACE(name(norm) + " rows " + std::to_string(rows));
      auto one = Layer<float>::random(norm, rows, 129, 530, 70);
      auto two = one, phases = one;
      test::at_one_and_two_threads([&](int threads) { (threads == 1 ? one : two).fused(); });
      kernels::start_cpu_runtime(2);
      phases.two_phase();
      EXPECT_TRUE(one.same_results(two));
      EXPECT_TRUE(one.same_results(phases));
    }
  }
}

template <class T>
void expect_growth_preserves(PattentionNorm norm, std::int64_t rows, std::int64_t before, std::int64_t added) {
  SCOPED_TRACE(name(norm) + " rows " + std::to_string(rows) + " tokens " + std::to_string(before) + " + " +
               std::to_string(added));
  auto old = Layer<T>::random(norm, rows, 45, before, 70);
  Matrix<T> keys(before + added, 45);
  auto values = Matrix<T>::random(before + added, 70, 77);
  for (std::int64_t j = 0; j < before + added; ++j) {
    for (std::int64_t k = 0; k < 45; ++k) keys(j, k) = j < before ? old.keys(j, k) : T(0);
    for (std::int64_t k = 0; k < 70 && j < before; ++k) values(j, k) = old.values(j, k);
  }
  Layer<T> grown(norm, old.scale, old.x, keys, values);
  old.fused_forward();
  grown.fused_forward();
  EXPECT_TRUE(grown.u.same_bits(old.u));
  EXPECT_TRUE(grown.y.same_bits(old.y));
}

TEST_F(Pattention, GrowingByZeroKeysKeepsEveryBit) {
  for (const PattentionNorm norm : {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm}) {
    for (const std::int64_t rows : {1, 7, 30, 130}) {
      for (const std::int64_t before : {1, 3, 31, 100, 255, 256, 300, 520}) {
        for (const std::int64_t added : {1, 5, 260}) {
          expect_growth_preserves<float>(norm, rows, before, added);
          expect_growth_preserves<double>(norm, rows, before, added);
        }
      }
    }
  }
}

TEST_F(Pattention, AccumulatesAndSkips) {
  for (const PattentionNorm norm : kNorms) {
    SCOPED_TRACE(name(norm));
    auto l = Layer<double>::random(norm, 50, 21, 70, 33);
    l.fused();
    auto again = l;
    again.fused_backward(GradMode::accumulate);
    auto phases = l;
    phases.mix_backward(GradMode::accumulate);
    phases.scores_backward(GradMode::accumulate);
    const auto expect_twice = [](const Matrix<double>& twice, const Matrix<double>& once) {
      for (std::int64_t i = 0; i < once.rows(); ++i) {
        for (std::int64_t j = 0; j < once.columns(); ++j) {
          ASSERT_NEAR(twice(i, j), 2 * once(i, j), 1e-13 * once.largest());
        }
      }
    };
    for (const auto* twice : {&again, &phases}) {
      expect_twice(twice->dx, l.dx);
      expect_twice(twice->dkeys, l.dkeys);
      expect_twice(twice->dvalues, l.dvalues);
    }
    // Any gradient may be left out; the others stay what they are.
    for (int left_out = 0; left_out < 3; ++left_out) {
      Layer<double> some(norm, l.scale, l.x, l.keys, l.values);
      some.fused_forward();
      some.normalize_backward();
      auto w = some.backward_workspace();
      std::array group{some.as_backward(GradMode::overwrite)};
      if (left_out == 1) group[0].dkeys = {};
      if (left_out == 2) group[0].dvalues = {};
      kernels::pattention_backward(cpu, norm, some.x.view(), group, GradMode::overwrite,
                                   left_out == 0 ? TensorView{} : some.dx.view(), w.view());
      EXPECT_TRUE(left_out == 0 || some.dx.same_bits(l.dx));
      EXPECT_TRUE(left_out == 1 || some.dkeys.same_bits(l.dkeys));
      EXPECT_TRUE(left_out == 2 || some.dvalues.same_bits(l.dvalues));
    }
  }
}

/// Five tokens on three ranks, simulated: what the ranks would reduce is added up by hand.
void expect_shards_equal_whole(PattentionNorm norm, bool zero_shard, std::int64_t rows) {
  SCOPED_TRACE(name(norm) + (zero_shard ? " zero shard" : "") + " rows " + std::to_string(rows));
  constexpr std::int64_t kIn = 6, kOut = 7, kTokens = 5;
  auto whole = Layer<double>::random(norm, rows, kIn, kTokens, kOut);
  if (zero_shard) {
    for (std::int64_t k = 0; k < kIn; ++k) whole.keys(4, k) = 0;
  }
  whole.fused();

  std::vector<Layer<double>> ranks;
  for (const auto& [first, count] : {std::pair<std::int64_t, std::int64_t>{0, 2}, {2, 2}, {4, 1}, {5, 0}}) {
    Matrix<double> keys(count, kIn), values(count, kOut);
    for (std::int64_t j = 0; j < count; ++j) {
      for (std::int64_t k = 0; k < kIn; ++k) keys(j, k) = whole.keys(first + j, k);
      for (std::int64_t k = 0; k < kOut; ++k) values(j, k) = whole.values(first + j, k);
    }
    ranks.emplace_back(norm, whole.scale, whole.x, keys, values);
  }
  const auto all_reduce = [&](Matrix<double> Layer<double>::*member, bool max) {
    Matrix<double> total = ranks[0].*member;
    for (std::size_t r = 1; r < ranks.size(); ++r) {
      for (std::int64_t i = 0; i < total.rows(); ++i) {
        for (std::int64_t j = 0; j < total.columns(); ++j) {
          const double here = (ranks[r].*member)(i, j);
          total(i, j) = max ? std::max(total(i, j), here) : total(i, j) + here;
        }
      }
    }
    for (auto& rank : ranks) rank.*member = total;
  };
  for (auto& rank : ranks) rank.scores_forward();
  if (has_stat(norm)) all_reduce(&Layer<double>::stat, norm == PattentionNorm::softmax);
  for (auto& rank : ranks) rank.mix_forward();
  all_reduce(&Layer<double>::u, false);
  if (has_weight(norm)) all_reduce(&Layer<double>::weight, false);
  for (auto& rank : ranks) {
    rank.normalize();
    rank.normalize_backward();
    rank.mix_backward();
  }
  if (!has_weight(norm)) all_reduce(&Layer<double>::dot, false);
  for (auto& rank : ranks) rank.scores_backward();
  all_reduce(&Layer<double>::dx, false);

  test::expect_near(ranks[0].y, whole.y, 1e-13 * std::max(1.0, whole.y.largest()));
  test::expect_near(ranks[1].dx, whole.dx, 1e-12 * std::max(1.0, whole.dx.largest()));
  std::int64_t token = 0;
  for (const auto& rank : ranks) {
    for (std::int64_t j = 0; j < rank.tokens(); ++j, ++token) {
      for (std::int64_t k = 0; k < kIn; ++k) ASSERT_NEAR(rank.dkeys(j, k), whole.dkeys(token, k), 1e-12);
      for (std::int64_t k = 0; k < kOut; ++k) ASSERT_NEAR(rank.dvalues(j, k), whole.dvalues(token, k), 1e-12);
    }
  }
}

TEST_F(Pattention, ShardsOfTokensEqualTheWhole) {
  for (const PattentionNorm norm : kNorms) {
    for (const std::int64_t rows : {4, 40}) {
      expect_shards_equal_whole(norm, false, rows);
      expect_shards_equal_whole(norm, true, rows);
    }
  }
}

TEST_F(Pattention, ShardWithoutTokens) {
  for (const PattentionNorm norm : kNorms) {
    for (const std::int64_t rows : {2, 40}) {
      SCOPED_TRACE(name(norm));
      auto l = Layer<float>::random(norm, rows, 6, 0, 5);
      l.scores_forward();
      if (has_stat(norm)) {
        EXPECT_EQ(l.stat(1, 0), norm == PattentionNorm::softmax ? -HUGE_VALF : 0.F);
      }
      l.mix_forward();
      EXPECT_EQ(l.u.largest(), 0);
      EXPECT_EQ(l.u(1, 4), 0);
      if (has_weight(norm)) {
        EXPECT_EQ(l.weight(1, 0), 0);
      }
      l.du = l.dy;
      l.mix_backward();
      l.scores_backward();
      EXPECT_EQ(l.dx.largest(), 0);
      EXPECT_EQ(l.dx(1, 5), 0);
      if (!has_weight(norm)) {
        EXPECT_EQ(l.dot(1, 0), 0);
      }
    }
  }
}

TEST_F(Pattention, NoRowsGiveZeroWeightGradients) {
  for (const PattentionNorm norm : kNorms) {
    auto l = Layer<float>::random(norm, 0, 6, 4, 5);
    l.fused();
    EXPECT_EQ(l.dkeys(3, 5), 0);
    EXPECT_EQ(l.dvalues(3, 4), 0);
    EXPECT_EQ(l.floored, 0);
  }
}

TEST_F(Pattention, FlooredRowsAreZeroAndCounted) {
  for (const PattentionNorm norm : {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm}) {
    for (const std::int64_t rows : {5, 60}) {
      SCOPED_TRACE(name(norm) + " rows " + std::to_string(rows));
      auto l = Layer<double>::random(norm, rows, 8, 20, 6);
      for (std::int64_t k = 0; k < 8; ++k) {
        l.x(1, k) = 0;
        l.x(3, k) *= 1e-15;
      }
      l.fused();
      EXPECT_EQ(l.floored, 2);
      for (const std::int64_t i : {1, 3}) {
        for (std::int64_t c = 0; c < 6; ++c) EXPECT_EQ(l.y(i, c), 0);
        for (std::int64_t k = 0; k < 8; ++k) EXPECT_EQ(l.dx(i, k), 0);
      }
      EXPECT_GT(std::abs(l.y(0, 0)), 0);
      // The other rows' gradients are those of a layer without the floored rows.
      auto phases = l;
      phases.two_phase();
      EXPECT_TRUE(phases.same_results(l));
    }
  }
}

TEST_F(Pattention, LargeScores) {
  for (const PattentionNorm norm : kNorms) {
    for (const std::int64_t rows : {3, 40}) {
      SCOPED_TRACE(name(norm));
      auto l = Layer<float>::random(norm, rows, 16, 50, 8);
      for (std::int64_t i = 0; i < rows; ++i) {
        for (std::int64_t k = 0; k < 16; ++k) l.x(i, k) *= 1000;
      }
      l.fused();
      const auto want = by_definition(l);
      test::expect_near(l.y, want, 1e-4 * want.largest());
      EXPECT_TRUE(std::isfinite(l.dx.largest()));
    }
  }
}

TEST_F(Pattention, NonFiniteInputShows) {
  for (const PattentionNorm norm : kNorms) {
    for (const float bad : {std::nanf(""), HUGE_VALF}) {
      for (const std::int64_t rows : {3, 40}) {
        SCOPED_TRACE(name(norm));
        auto l = Layer<float>::random(norm, rows, 16, 50, 8);
        l.x(2, 5) = bad;
        l.fused_forward();
        EXPECT_FALSE(std::isfinite(l.y(2, 3)));
        EXPECT_TRUE(std::isfinite(l.y(1, 3)));
      }
    }
  }
}

TEST_F(Pattention, AGroupGivesTheBitsOfItsLayers) {
  for (const PattentionNorm norm : kNorms) {
    for (const std::int64_t rows : {9, 40, 300}) {  // few, one block, two superblocks
      std::vector<Layer<float>> layers, alone;
      for (const std::int64_t n : {33, 5, 70}) {
        layers.push_back(Layer<float>::random(norm, rows, 21, n, 13));
        layers.back().x = layers.front().x;
        alone.push_back(layers.back());
      }
      std::int64_t forward = 0, backward = 0;
      std::vector<kernels::PattentionForward> forwards;
      std::vector<kernels::PattentionBackward> backwards;
      Matrix<float> dx(rows, 21);
      for (std::size_t g = 0; g < layers.size(); ++g) {
        alone[g].fused_forward();
        alone[g].normalize_backward();
        auto w = alone[g].backward_workspace();
        const std::array one{alone[g].as_backward(GradMode::overwrite)};
        kernels::pattention_backward(cpu, norm, alone[g].x.view(), one,
                                     g == 0 ? GradMode::overwrite : GradMode::accumulate, dx.view(), w.view());
        forward += kernels::pattention_forward_workspace(rows, layers[g].tokens(), 21, 13);
        backward += kernels::pattention_backward_workspace(rows, layers[g].tokens(), 21, 13);
        forwards.push_back(layers[g].as_forward());
      }
      Matrix<float> w(1, std::max(forward, backward));
      kernels::pattention_forward(cpu, norm, layers[0].x.view(), forwards, {}, w.view());
      for (Layer<float>& l : layers) {
        l.normalize();
        l.normalize_backward();
        backwards.push_back(l.as_backward(GradMode::overwrite));
      }
      kernels::pattention_backward(cpu, norm, layers[0].x.view(), backwards, GradMode::overwrite, layers[0].dx.view(),
                                   w.view());
      EXPECT_TRUE(layers[0].dx.same_bits(dx));
      for (std::size_t g = 0; g < layers.size(); ++g) {
        EXPECT_TRUE(layers[g].y.same_bits(alone[g].y));
        EXPECT_TRUE(layers[g].dkeys.same_bits(alone[g].dkeys));
        EXPECT_TRUE(layers[g].dvalues.same_bits(alone[g].dvalues));
      }
    }
  }
}

TEST_F(Pattention, RefusesOperandsThatDoNotFit) {
  auto l = Layer<float>::random(PattentionNorm::l2_norm_gelu, 20, 6, 5, 4);
  auto w = l.forward_workspace();
  const auto forward = [&](ConstTensorView keys, ConstTensorView values, TensorView stat, TensorView weight,
                           TensorView workspace) {
    const std::array group{
        kernels::PattentionForward{l.scale, keys, values, l.scores.view(), stat, l.u.view(), weight}};
    kernels::pattention_forward(cpu, l.norm, l.x.view(), group, {}, workspace);
  };
  EXPECT_NO_THROW(forward(l.keys.view(), l.values.view(), l.stat.view(), {}, w.view()));
  EXPECT_THROW(forward(l.values.view(), l.values.view(), l.stat.view(), {}, w.view()), ShapeError);
  EXPECT_THROW(forward(l.keys.view(), l.keys.view(), l.stat.view(), {}, w.view()), ShapeError);
  EXPECT_THROW(forward(l.keys.view(), l.values.view(), {}, {}, w.view()), Error);
  EXPECT_THROW(forward(l.keys.view(), l.values.view(), l.stat.view(), l.weight.view(), w.view()), ShapeError);
  EXPECT_THROW(forward(l.keys.view(), l.values.view(), l.stat.view(), {}, w.view().column_range(0, 10)), ShapeError);
  EXPECT_THROW(forward(l.keys.view(), l.values.view(), l.stat.view(), {}, {}), ShapeError);
  const Matrix<double> other(5, 6);
  EXPECT_THROW(forward(other.view(), l.values.view(), l.stat.view(), {}, w.view()), DTypeError);
  try {
    forward(other.view(), l.values.view(), l.stat.view(), {}, w.view());
  } catch (const DTypeError& e) {
    EXPECT_STREQ(e.what(), "pattention_forward: K is f64, want f32 like the other operands");
  }
}

/// Whether a group's call does both halves.
enum class Halves { fused, apart };

/// Forward, and backward twice (overwrite, accumulate), on a device, beside the same on the CPU.
template <class T>
Layer<T> compare_on_cuda(test::CudaDevice& device, Halves halves, Layer<T> want, double tolerance) {
  Stream& stream = device.stream;
  const PattentionNorm norm = want.norm;
  const double scale = want.scale;
  Layer<T> got = want;
  want.fused_forward();
  want.fused_backward(GradMode::overwrite);
  want.fused_backward(GradMode::accumulate);
  const auto workspace = [&](auto size) {
    return Matrix<T>(1, size(got.rows(), got.tokens(), got.keys.columns(), got.d_out(), Device::cuda));
  };
  Matrix<T> forward_workspace = workspace(kernels::pattention_forward_workspace);
  Matrix<T> backward_workspace = workspace(kernels::pattention_backward_workspace);
  auto floored = Matrix<double>::of(1, 1, {0});
  test::with_copies(
      device,
      [&](auto x, auto k, auto v, auto scores, auto stat, auto u, auto weight, auto y, auto dy, auto du, auto dweight,
          auto dscores, auto dot, auto dx, auto dk, auto dv, auto floored_, auto fw, auto bw) {
        if (!has_stat(norm)) stat = {};
        if (!has_weight(norm)) weight = dweight = {};
        if (norm != PattentionNorm::l2_norm_gelu) dot = {};
        if (halves == Halves::fused) {
          const std::array group{kernels::PattentionForward{scale, k, v, scores, stat, u, weight}};
          kernels::pattention_forward(stream, norm, x, group, floored_, fw);
        } else {
          kernels::pattention_scores_forward(stream, norm, x, k, scores, stat, fw);
          kernels::pattention_mix_forward(stream, norm, scale, scores, stat, v, u, weight, floored_, fw);
        }
        if (has_weight(norm)) {
          kernels::row_normalize_forward(stream, norm, scale, u, weight, y, floored_);
          kernels::row_normalize_backward(stream, norm, scale, u, weight, dy, du, dweight);
        } else {
          copy(stream, u, y);
          copy(stream, dy, du);
        }
        for (const GradMode mode : {GradMode::overwrite, GradMode::accumulate}) {
          if (halves == Halves::fused) {
            const std::array group{
                kernels::PattentionBackward{scale, scores, stat, k, v, du, dweight, mode, dk, mode, dv}};
            kernels::pattention_backward(stream, norm, x, group, mode, dx, bw);
          } else {
            kernels::pattention_mix_backward(stream, norm, scale, scores, stat, v, du, dweight, mode, dv, dscores, dot,
                                             bw);
            kernels::pattention_scores_backward(stream, norm, scale, scores, stat, dot, x, k, dscores, mode, dx, mode,
                                                dk, bw);
          }
        }
      },
      got.x, got.keys, got.values, got.scores, got.stat, got.u, got.weight, got.y, got.dy, got.du, got.dweight,
      got.dscores, got.dot, got.dx, got.dkeys, got.dvalues, floored, forward_workspace, backward_workspace);
  const auto near = [&](const Matrix<T>& a, const Matrix<T>& b) {
    test::expect_near(a, b, tolerance * std::max(1.0, b.largest()));
    EXPECT_TRUE(a.padding_untouched());
  };
  near(got.scores, want.scores);
  near(got.y, want.y);
  near(got.dx, want.dx);
  near(got.dkeys, want.dkeys);
  near(got.dvalues, want.dvalues);
  EXPECT_EQ(floored(0, 0), want.floored);
  return got;
}

/// Fused and apart, which have the same bits.
template <class T>
void compare_on_cuda(test::CudaDevice& device, const Layer<T>& layer, double tolerance) {
  const Layer<T> fused = compare_on_cuda(device, Halves::fused, layer, tolerance),
                 apart = compare_on_cuda(device, Halves::apart, layer, tolerance);
  for (const auto result :
       {&Layer<T>::scores, &Layer<T>::stat, &Layer<T>::y, &Layer<T>::dx, &Layer<T>::dkeys, &Layer<T>::dvalues}) {
    EXPECT_TRUE((fused.*result).same_bits(apart.*result));
  }
}

TEST_F(Pattention, CudaFollowsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    kernels::DeviceLibraries libraries(device.stream, device.memory);
    for (const PattentionNorm norm : kNorms) {
      SCOPED_TRACE(name(norm));
      for (const std::int64_t n : test::kAwkwardSizes) {
        // With one token the gradient of the scores is 0 but for rounding: terms of the order of 10 cancel.
        const double tolerance = n == 1 ? 5e-5 : 1e-5;
        compare_on_cuda(device, Layer<float>::random(norm, 33, 31, n, 33, 2), tolerance);
      }
      compare_on_cuda(device, Layer<float>::random(norm, 257, 32, 64, 16), 4e-6);
      compare_on_cuda(device, Layer<float>::random(norm, 33, 32, 64, 16, 1), 4e-6);
      compare_on_cuda(device, Layer<double>::random(norm, 7, 8, 20, 6, 1), 1e-14);
      compare_on_cuda(device, Layer<float>::random(norm, 0, 6, 4, 5), 0);
      auto floored = Layer<double>::random(norm, 5, 8, 20, 6);
      for (std::int64_t c = 0; c < 8; ++c) floored.x(1, c) = 0;
      compare_on_cuda(device, floored, 1e-14);
    }
  });
}

TEST_F(Pattention, CudaKeepsTheBitsOfARowWhenZeroTokensAreAppended) {
  test::on_cuda([](test::CudaDevice& device) {
    kernels::DeviceLibraries libraries(device.stream, device.memory);
    // Whole numbers: the scores are exact whatever the product does, their squares and sums are not.
    const auto whole_numbers = [](std::int64_t rows, std::int64_t of, std::uint64_t seed) {
      Matrix<float> m(rows, 16);
      const Rng rng(seed, "whole numbers");
      for (std::int64_t i = 0; i < rows * 16; ++i) {
        const auto number = static_cast<float>(rng.below(static_cast<std::uint64_t>(i), 127)) - 63;
        m(i / 16, i % 16) = i / 16 < of ? number : 0;
      }
      return m;
    };
    const auto x = whole_numbers(9, 9, 1);
    const auto statistic = [&](std::int64_t n, std::int64_t zeros) {
      const auto keys = whole_numbers(n + zeros, n, 2);
      Matrix<float> scores(9, n + zeros), stat(9, 1), workspace(9, n + zeros);
      test::with_copies(
          device,
          [&](auto x_, auto k, auto s, auto stat_, auto w) {
            kernels::pattention_scores_forward(device.stream, PattentionNorm::l2_norm_gelu, x_, k, s, stat_, w);
          },
          x, keys, scores, stat, workspace);
      return stat;
    };
    for (const std::int64_t n : {5, 31, 64}) {
      for (const std::int64_t zeros : {1, 3, 33, 1100}) {
        EXPECT_TRUE(statistic(n, zeros).same_bits(statistic(n, 0))) << n << " + " << zeros;
      }
    }
  });
}

}  // namespace
}  // namespace tforge
