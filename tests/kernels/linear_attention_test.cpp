#include "kernels/linear_attention.h"

#include <numbers>

#include "device_matrix.h"
#include "kernels/attention.h"

namespace tforge {
namespace {

using kernels::FeatureMap;
using kernels::Features;
using kernels::LinearPass;
using kernels::LinearShape;
using test::Matrix;
Stream cpu;
constexpr TensorView kNone;
constexpr std::int64_t kPositions = 300;
constexpr std::array kKinds = {Features::random_exponential, Features::relu_cosine};

/// A feature map with its table; 21 random features.
template <class T>
struct TestMap {
  TestMap(Features kind_, std::int64_t head_dim, std::int64_t random = 21)
      : kind(kind_),
        count(kind == Features::relu_cosine ? 2 * head_dim : random),
        table(kind == Features::relu_cosine ? kPositions : head_dim,
              kind == Features::relu_cosine ? 2 : kernels::feature_columns(random)) {
    if (kind == Features::relu_cosine) kernels::cosine_features(cpu, table.view());
    else kernels::orthogonal_features(cpu, 3, "test", count, table.view());
  }
  FeatureMap map() const { return {kind, count, table.view()}; }
  Features kind;
  std::int64_t count;
  Matrix<T> table;
};

/// q, k and v as columns of one tensor, and the results over NaN.
template <class T>
struct Linear {
  LinearShape shape;
  std::int64_t head_dim;
  TestMap<T> map;
  Matrix<T> qkv, out, den, dout, dqkv;

  Linear(Features kind, const LinearShape& s, std::int64_t head_dim_, std::uint64_t seed, double size = 1.5)
      : shape(s),
        head_dim(head_dim_),
        map(kind, head_dim),
        qkv(Matrix<T>::random(s.batch * s.seq, 3 * columns(), seed, size, 2)),
        out(s.batch * s.seq, columns(), 1),
        den(s.batch * s.seq, s.heads),
        dout(Matrix<T>::random(s.batch * s.seq, columns(), seed + 1, 1, 3)),
        dqkv(s.batch * s.seq, 3 * columns(), 5) {}
  std::int64_t columns() const { return shape.heads * head_dim; }
  ConstTensorView part(int i) const { return qkv.view().column_range(i * columns(), columns()); }
  TensorView gradient(int i) { return dqkv.view().column_range(i * columns(), columns()); }
  /// Of exactly the size asked for, full of NaN.
  Matrix<T> workspace(LinearPass pass) const {
    return Matrix<T>(1, kernels::linear_attention_workspace(shape, head_dim, map.count, pass));
  }
  void forward() {
    auto scratch = workspace(LinearPass::forward);
    kernels::linear_attention_forward(cpu, shape, map.map(), part(0), part(1), part(2), out.view(), den.view(), kNone,
                                      scratch.vector());
  }
  void backward() {
    auto scratch = workspace(LinearPass::backward);
    kernels::linear_attention_backward(cpu, shape, map.map(), part(0), part(1), part(2), out.view(), den.view(),
                                       dout.view(), gradient(0), gradient(1), gradient(2), scratch.vector());
  }
};

enum class Role { query, key };

/// phi of row r, in f64, as the header has it.
template <class T>
std::vector<double> phi(const Linear<T>& a, Role role, std::int64_t row, std::int64_t h) {
  const std::int64_t d = a.head_dim, m = a.map.count;
  std::vector<double> x, f(static_cast<std::size_t>(m));
  double square = 0, largest = -std::numeric_limits<double>::infinity();
  for (std::int64_t c = 0; c < d; ++c) {
    x.push_back(static_cast<double>(a.qkv(row, (role == Role::query ? 0 : a.columns()) + h * d + c)));
    square += x.back() * x.back();
  }
  if (a.map.kind == Features::relu_cosine) {
    const double angle = std::numbers::pi / 2 * static_cast<double>(row % a.shape.seq) / kPositions;
    for (std::size_t c = 0; c < x.size(); ++c) {
      f[c] = std::max(x[c], 0.0) * std::cos(angle);
      f[x.size() + c] = std::max(x[c], 0.0) * std::sin(angle);
    }
    return f;
  }
  for (std::int64_t r = 0; r < m; ++r) {
    double& to = f[static_cast<std::size_t>(r)];
    for (std::int64_t c = 0; c < d; ++c) to += x[static_cast<std::size_t>(c)] * static_cast<double>(a.map.table(c, r));
    largest = std::max(largest, to);
  }
  const double shift = role == Role::query ? largest : square / (2 * std::sqrt(static_cast<double>(d)));
  for (double& value : f) value = std::exp(value - shift) + 1e-6;
  return f;
}

/// The formula in f64, pair by pair.
template <class T>
void reference(const Linear<T>& a, Matrix<double>& out, Matrix<double>& den) {
  const std::int64_t seq = a.shape.seq, d = a.head_dim;
  for (std::int64_t row = 0; row < a.shape.batch * seq; ++row) {
    for (std::int64_t h = 0; h < a.shape.heads; ++h) {
      const std::vector<double> query = phi(a, Role::query, row, h);
      std::vector<double> sum(static_cast<std::size_t>(d), 0.0);
      double weight = 0;
      for (std::int64_t j = row - row % seq; j <= row; ++j) {
        const std::vector<double> key = phi(a, Role::key, j, h);
        double w = 0;
        for (std::size_t r = 0; r < key.size(); ++r) w += query[r] * key[r];
        weight += w;
        for (std::int64_t c = 0; c < d; ++c) {
          sum[static_cast<std::size_t>(c)] += w * static_cast<double>(a.qkv(j, 2 * a.columns() + h * d + c));
        }
      }
      den(row, h) = weight;
      const double floored = a.map.kind == Features::relu_cosine ? std::max(weight, 1e-6) : weight;
      for (std::int64_t c = 0; c < d; ++c) out(row, h * d + c) = sum[static_cast<std::size_t>(c)] / floored;
    }
  }
}

TEST(LinearAttention, CosFormerByHand) {
  // One head of one dimension over 2 positions, pi/4 apart. A negative key has weight 0, and a row that sees no weight
  // gives 0.
  const auto q = Matrix<double>::of(2, 1, {2, 3});
  const auto k = Matrix<double>::of(2, 1, {5, 1});
  const auto v = Matrix<double>::of(2, 1, {10, 20});
  Matrix<double> table(2, 2), out(2, 1), den(2, 1);
  kernels::cosine_features(cpu, table.view());
  const FeatureMap map{Features::relu_cosine, 2, std::as_const(table).view()};
  Matrix<double> workspace(1, kernels::linear_attention_workspace({1, 1, 2}, 1, 2, LinearPass::forward));
  const auto run = [&](const Matrix<double>& keys) {
    kernels::linear_attention_forward(cpu, {1, 1, 2}, map, q.view(), keys.view(), v.view(), out.view(), den.view(),
                                      kNone, workspace.vector());
  };
  run(k);
  const double near = 3 * 1, far = 3 * 5 * std::sqrt(0.5);
  EXPECT_NEAR(out(0, 0), 10, 1e-14);
  EXPECT_NEAR(out(1, 0), (far * 10 + near * 20) / (far + near), 1e-14);
  EXPECT_NEAR(den(1, 0), far + near, 1e-14);
  run(Matrix<double>::of(2, 1, {-5, 1}));
  EXPECT_EQ(out(0, 0), 0);
  EXPECT_NEAR(out(1, 0), 20, 1e-14);
}

template <class T>
void follows_the_formula(double tolerance) {
  for (const Features kind : kKinds) {
    for (const std::int64_t seq : {1, 2, 13, 63, 64, 65, 200}) {
      for (const std::int64_t head_dim : {1, 7, 32, 33}) {
        if (seq == 200 && head_dim != 7 && head_dim != 32) continue;
        Linear<T> a(kind, {2, 3, seq}, head_dim, 1);
        a.forward();
        Matrix<double> out(2 * seq, a.columns()), den(2 * seq, 3);
        reference(a, out, den);
        // Where little more than the floor is left of the weights, rounding is all there is.
        test::expect_near(a.out, out, tolerance * out.largest() * (head_dim == 1 ? 20 : 1));
        test::expect_near(a.den, den, tolerance * std::max(1.0, den.largest()));
        EXPECT_TRUE(a.out.padding_untouched());
        if (testing::Test::HasFatalFailure()) {
          FAIL() << static_cast<int>(kind) << ": sequence of " << seq << ", head of " << head_dim;
        }
      }
    }
  }
}
TEST(LinearAttention, FloatFollowsTheFormula) { follows_the_formula<float>(5e-6); }
TEST(LinearAttention, DoubleFollowsTheFormula) { follows_the_formula<double>(1e-13); }

TEST(LinearAttention, GradientMatchesFiniteDifferences) {
  for (const Features kind : kKinds) {
    for (const std::int64_t seq : {5, 131}) {  // three chunks
      Linear<double> a(kind, {seq == 5 ? 2 : 1, seq == 5 ? 2 : 1, seq}, 3, 1, 1.0);
      a.forward();
      a.backward();
      EXPECT_TRUE(a.dqkv.padding_untouched());
      test::expect_gradient(a.qkv, a.dqkv, [&] {
        a.forward();
        return a.out.dot(a.dout);
      });
      if (testing::Test::HasFatalFailure()) FAIL() << static_cast<int>(kind) << ": sequence of " << seq;
    }
  }
}

TEST(LinearAttention, FloatGradientIsThatOfDouble) {
  for (const Features kind : kKinds) {
    for (const std::int64_t head_dim : {7, 32, 64}) {
      Linear<float> a(kind, {2, 2, 150}, head_dim, 1, 1.0);
      Linear<double> b(kind, {2, 2, 150}, head_dim, 1, 1.0);
      for (std::int64_t r = 0; r < 300; ++r) {
        for (std::int64_t c = 0; c < a.qkv.columns(); ++c) b.qkv(r, c) = static_cast<double>(a.qkv(r, c));
        for (std::int64_t c = 0; c < a.columns(); ++c) b.dout(r, c) = static_cast<double>(a.dout(r, c));
      }
      a.forward();
      a.backward();
      b.forward();
      b.backward();
      test::expect_near(a.dqkv, b.dqkv, 2e-5 * b.dqkv.largest());
    }
  }
}

/// Many features estimate the softmax: w_ij is proportional to exp(q . k / sqrt(head_dim)).
TEST(LinearAttention, RandomFeaturesEstimateTheSoftmax) {
  constexpr std::int64_t kSeq = 80, kHeadDim = 8;
  Matrix<double> exact(kSeq, kHeadDim), lse(kSeq, 1);
  std::vector<double> errors;
  for (const std::int64_t m : {64, 4096}) {
    Linear<double> a(Features::random_exponential, {1, 1, kSeq}, kHeadDim, 1, 0.5);
    a.map = TestMap<double>(Features::random_exponential, kHeadDim, m);
    a.forward();
    const kernels::AttentionShape shape{1, 1, kSeq, kSeq, kSeq};
    Matrix<double> workspace(1, kernels::attention_workspace(shape, kHeadDim));
    kernels::causal_attention_forward(cpu, shape, a.part(0), a.part(1), a.part(2), exact.view(), lse.view(),
                                      workspace.vector());
    double square = 0, size = 0;
    for (std::int64_t r = 0; r < kSeq; ++r) {
      for (std::int64_t c = 0; c < kHeadDim; ++c) {
        square += std::pow(a.out(r, c) - exact(r, c), 2);
        size += std::pow(exact(r, c), 2);
      }
    }
    errors.push_back(std::sqrt(square / size));
  }
  EXPECT_LT(errors[1], 0.04);
  EXPECT_LT(errors[1], errors[0] / 3);  // as 1 / sqrt(m), an eighth
}

TEST(LinearAttention, DirectionsAreOrthogonalInGroups) {
  constexpr std::int64_t kDim = 12, kCount = 30;
  Matrix<double> table(kDim, kernels::feature_columns(kCount)), again(kDim, kernels::feature_columns(kCount)),
      other(kDim, kernels::feature_columns(kCount));
  kernels::orthogonal_features(cpu, 5, "a", kCount, table.view());
  kernels::orthogonal_features(cpu, 5, "a", kCount, again.view());
  kernels::orthogonal_features(cpu, 5, "b", kCount, other.view());
  EXPECT_TRUE(table.same_bits(again));
  EXPECT_FALSE(table.same_bits(other));
  const auto dot = [&](std::int64_t r, std::int64_t s) {
    double sum = 0;
    for (std::int64_t c = 0; c < kDim; ++c) sum += table(c, r) * table(c, s) * std::sqrt(static_cast<double>(kDim));
    return sum;
  };
  double squares = 0;
  for (std::int64_t r = 0; r < kCount; ++r) {
    squares += dot(r, r);
    for (std::int64_t s = 0; s < r; ++s) {
      if (s / kDim == r / kDim) {
        EXPECT_NEAR(dot(r, s), 0, 1e-12) << r << " " << s;
      }
    }
  }
  EXPECT_NE(dot(0, kDim), 0);
  EXPECT_NEAR(squares / kCount, kDim, 0.25 * kDim);  // the mean square of a normal vector's length
  for (std::int64_t c = kCount; c < table.columns(); ++c) EXPECT_EQ(table(3, c), 0);
}

TEST(LinearAttention, LargeInputsStayFinite) {
  for (const Features kind : kKinds) {
    Linear<float> a(kind, {1, 1, 100}, 64, 1, 40);  // keys of length 320: their features are all floor
    a.forward();
    a.backward();
    EXPECT_TRUE(std::isfinite(a.out.dot(a.dout)));
    EXPECT_TRUE(std::isfinite(a.dqkv.dot(a.qkv)));
  }
}

TEST(LinearAttention, NonFiniteInputsShow) {
  for (const Features kind : kKinds) {
    for (const int part : {0, 1, 2}) {
      Linear<float> a(kind, {1, 1, 80}, 16, 1);
      a.qkv(20, part * 16 + 3) = std::numeric_limits<float>::quiet_NaN();
      a.forward();
      EXPECT_TRUE(std::isnan(a.out(20, 3)));
    }
  }
}

TEST(LinearAttention, TheFutureDoesNotTouchThePast) {
  for (const Features kind : kKinds) {
    for (const std::int64_t cut : {1, 5, 11, 12, 63, 64, 65, 140}) {
      Linear<float> a(kind, {1, 2, 150}, 16, 1);
      a.forward();
      const auto before = a;
      for (std::int64_t r = cut; r < 150; ++r) {
        for (std::int64_t c = 0; c < a.qkv.columns(); ++c) a.qkv(r, c) = 3 - 2 * a.qkv(r, c);
      }
      a.forward();
      for (std::int64_t r = 0; r < 150; ++r) {
        const bool same = std::memcmp(&a.out(r, 0), &before.out(r, 0), 32 * sizeof(float)) == 0;
        ASSERT_EQ(same, r < cut) << static_cast<int>(kind) << ": row " << r << " after a change from " << cut;
      }
    }
  }
}

/// A sequence in pieces, by way of a state that begins as NaN: the bits of the whole.
template <class T>
void pieces_equal_the_whole(Features kind, std::int64_t head_dim, std::int64_t piece) {
  constexpr std::int64_t kBatch = 2, kHeads = 3, kSeq = 150;
  Linear<T> a(kind, {kBatch, kHeads, kSeq}, head_dim, 1);
  a.forward();
  const std::int64_t columns = a.columns();
  Matrix<T> state(kBatch * kHeads, kernels::linear_attention_state(head_dim, a.map.count));
  for (std::int64_t first = 0; first < kSeq; first += piece) {
    const std::int64_t count = std::min(piece, kSeq - first);
    Matrix<T> qkv(kBatch * count, 3 * columns), out(kBatch * count, columns);
    for (std::int64_t r = 0; r < kBatch * count; ++r) {
      for (std::int64_t c = 0; c < 3 * columns; ++c) qkv(r, c) = a.qkv(r / count * kSeq + first + r % count, c);
    }
    const LinearShape shape{kBatch, kHeads, count, first};
    Matrix<T> workspace(1, kernels::linear_attention_workspace(shape, head_dim, a.map.count, LinearPass::forward));
    const auto part = [&](int i) { return std::as_const(qkv).view().column_range(i * columns, columns); };
    kernels::linear_attention_forward(cpu, shape, a.map.map(), part(0), part(1), part(2), out.view(), kNone,
                                      state.view(), workspace.vector());
    for (std::int64_t r = 0; r < kBatch * count; ++r) {
      ASSERT_EQ(std::memcmp(&out(r, 0), &a.out(r / count * kSeq + first + r % count, 0),
                            static_cast<std::size_t>(columns) * sizeof(T)),
                0)
          << "position " << first + r % count << " in pieces of " << piece << ", head of " << head_dim;
    }
  }
}
TEST(LinearAttention, PiecesEqualTheWhole) {
  for (const Features kind : kKinds) {
    for (const std::int64_t piece : {1, 7, 64, 100, 150}) {
      pieces_equal_the_whole<float>(kind, 16, piece);
      pieces_equal_the_whole<double>(kind, 7, piece);
    }
  }
}

TEST(LinearAttention, BitsDependNeitherOnTheBatchNorOnThreads) {
  for (const Features kind : kKinds) {
    Linear<float> a(kind, {5, 3, 70}, 33, 1);
    std::vector<Matrix<float>> first;
    test::at_one_and_two_threads([&](int) {
      a.forward();
      a.backward();
      if (first.empty()) first = {a.out, a.den, a.dqkv};
      else EXPECT_TRUE(a.out.same_bits(first[0]) && a.den.same_bits(first[1]) && a.dqkv.same_bits(first[2]));
    });
    Linear<float> alone(kind, {1, 3, 70}, 33, 9);
    for (std::int64_t r = 0; r < 70; ++r) {
      for (std::int64_t c = 0; c < a.qkv.columns(); ++c) alone.qkv(r, c) = a.qkv(3 * 70 + r, c);
      for (std::int64_t c = 0; c < a.columns(); ++c) alone.dout(r, c) = a.dout(3 * 70 + r, c);
    }
    alone.forward();
    alone.backward();
    for (std::int64_t r = 0; r < 70; ++r) {
      for (std::int64_t c = 0; c < a.columns(); ++c) ASSERT_EQ(alone.out(r, c), a.out(3 * 70 + r, c));
      for (std::int64_t c = 0; c < a.qkv.columns(); ++c) ASSERT_EQ(alone.dqkv(r, c), a.dqkv(3 * 70 + r, c));
    }
  }
}

TEST(LinearAttention, RefusesWhatDoesNotFit) {
  Linear<float> a(Features::relu_cosine, {2, 2, 3}, 4, 1);
  Matrix<float> state(4, 7), short_workspace(1, 5), wide(6, 9);
  auto workspace = a.workspace(LinearPass::backward);
  const auto text_of = [](const auto& run) -> std::string {
    try {
      run();
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  const auto forward = [&](const LinearShape& shape, const FeatureMap& map, TensorView out, TensorView kept,
                           TensorView scratch) {
    return text_of([&] {
      kernels::linear_attention_forward(cpu, shape, map, a.part(0), a.part(1), a.part(2), out, a.den.view(), kept,
                                        scratch);
    });
  };
  const FeatureMap map = a.map.map();
  EXPECT_EQ(forward({2, 3, 3}, map, a.out.view(), kNone, workspace.vector()),
            "linear_attention_forward: 8 columns do not make 3 heads");
  EXPECT_EQ(forward({2, 2, 0}, map, a.out.view(), kNone, workspace.vector()),
            "linear_attention_forward: batch 2, heads 2, seq 0, first 0; want heads and seq of at least 1");
  EXPECT_EQ(forward({2, 2, 3}, {Features::relu_cosine, 7, map.table}, a.out.view(), kNone, workspace.vector()),
            "linear_attention_forward: 7 features of a head of 4, want 8");
  EXPECT_EQ(forward({2, 2, 3, 298}, map, a.out.view(), state.view(), workspace.vector()),
            "linear_attention_forward: positions 298..300, the table holds 0..299");
  EXPECT_EQ(forward({2, 2, 3, 3}, map, a.out.view(), kNone, workspace.vector()),
            "linear_attention_forward: positions from 3 on without the state of those before");
  EXPECT_NE(forward({2, 2, 3}, map, a.out.view(), state.view(), workspace.vector()).find("state has shape [4, 7]"),
            std::string::npos);
  EXPECT_NE(forward({2, 2, 3}, map, wide.view(), kNone, workspace.vector()).find("out has shape [6, 9], want [6, 8]"),
            std::string::npos);
  EXPECT_NE(forward({2, 2, 3}, map, a.out.view(), kNone, short_workspace.vector()).find("workspace has shape [5]"),
            std::string::npos);
  const TestMap<double> other(Features::relu_cosine, 4);
  EXPECT_NE(forward({2, 2, 3}, other.map(), a.out.view(), kNone, workspace.vector()).find("table is f64, want f32"),
            std::string::npos);
}

/// `numbers` as T.
template <class T>
Matrix<T> converted(const Matrix<float>& numbers, std::int64_t padding) {
  Matrix<T> to(numbers.rows(), numbers.columns(), padding);
  for (std::int64_t r = 0; r < to.rows(); ++r) {
    for (std::int64_t c = 0; c < to.columns(); ++c) to(r, c) = T(numbers(r, c));
  }
  return to;
}
template <class T, class From>
Matrix<T> widened(const Matrix<From>& from) {
  Matrix<T> to(from.rows(), from.columns());
  for (std::int64_t r = 0; r < to.rows(); ++r) {
    for (std::int64_t c = 0; c < to.columns(); ++c) to(r, c) = static_cast<T>(static_cast<Compute<From>>(from(r, c)));
  }
  return to;
}

/// Forward and backward on a device of operands stored as T, beside the CPU with the same numbers.
template <class T>
void compare_on_cuda(test::CudaDevice& device, Features kind, const LinearShape& shape, std::int64_t head_dim,
                     double tolerance, std::int64_t padding = 2) {
  using C = Compute<T>;
  SCOPED_TRACE(std::to_string(static_cast<int>(kind)) + ": " + std::to_string(shape.seq) + " positions, heads of " +
               std::to_string(head_dim));
  Linear<C> want(kind, shape, head_dim, 1, 1.0);
  const auto qkv = converted<T>(widened<float>(want.qkv), padding);
  const auto dout = converted<T>(widened<float>(want.dout), padding + 1);
  want.qkv = widened<C>(qkv);
  want.dout = widened<C>(dout);
  want.forward();
  want.backward();
  const std::int64_t n = want.columns(), rows = shape.batch * shape.seq;
  Matrix<T> out(rows, n, padding), dqkv(rows, 3 * n, padding + 3);
  Matrix<C> den(rows, shape.heads);
  const auto workspace = [&](LinearPass pass) {
    return Matrix<C>(1, kernels::linear_attention_workspace(shape, head_dim, want.map.count, pass, Device::cuda));
  };
  test::with_copies(
      device,
      [&](auto qkv_, auto table, auto out_, auto den_, auto dout_, auto dqkv_, auto forward, auto backward) {
        const FeatureMap map{kind, want.map.count, table};
        const auto part = [n](TensorView v, int i) { return v.column_range(i * n, n); };
        kernels::linear_attention_forward(device.stream, shape, map, part(qkv_, 0), part(qkv_, 1), part(qkv_, 2), out_,
                                          den_, kNone, test::vector_of(forward));
        kernels::linear_attention_backward(device.stream, shape, map, part(qkv_, 0), part(qkv_, 1), part(qkv_, 2), out_,
                                           den_, dout_, part(dqkv_, 0), part(dqkv_, 1), part(dqkv_, 2),
                                           test::vector_of(backward));
      },
      qkv, want.map.table, out, den, dout, dqkv, workspace(LinearPass::forward), workspace(LinearPass::backward));
  test::expect_near(widened<C>(out), want.out, tolerance * want.out.largest());
  test::expect_near(den, want.den, tolerance * std::max(1.0, want.den.largest()));
  test::expect_near(widened<C>(dqkv), want.dqkv, 10 * tolerance * want.dqkv.largest());
  EXPECT_TRUE(out.padding_untouched() && dqkv.padding_untouched());
}
TEST(LinearAttention, CudaIsTheCpu) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const Features kind : kKinds) {
      for (const std::int64_t seq : {1, 31, 33, 64, 65, 150}) {
        compare_on_cuda<float>(device, kind, {2, 3, seq}, 7, 1e-5);
        compare_on_cuda<double>(device, kind, {1, 2, seq}, 33, 1e-12);
      }
      compare_on_cuda<float>(device, kind, {1, 1, 70}, 64, 1e-5);
      compare_on_cuda<float>(device, kind, {1, 1, 257}, 16, 1e-5);
      compare_on_cuda<float>(device, kind, {1, 1, 70}, 1, 1e-4);
    }
  });
}
TEST(LinearAttention, CudaTakesBf16) {
  test::on_cuda([](test::CudaDevice& device) {
    // Operands are the same numbers; results are rounded once, and `out` is read again for the gradient of den.
    for (const Features kind : kKinds) {
      compare_on_cuda<bf16>(device, kind, {2, 2, 70}, 16, 1.0 / 256);
      compare_on_cuda<bf16>(device, kind, {1, 3, 33}, 31, 1.0 / 256);
    }
  });
}

TEST(LinearAttention, CudaPiecesEqualTheWhole) {
  test::on_cuda([](test::CudaDevice& device) {
    constexpr std::int64_t kBatch = 2, kHeads = 2, kSeq = 140, kHeadDim = 7;
    for (const Features kind : kKinds) {
      Linear<float> a(kind, {kBatch, kHeads, kSeq}, kHeadDim, 1);
      const std::int64_t n = a.columns(), m = a.map.count;
      const auto run = [&](const LinearShape& shape, const Matrix<float>& qkv, Matrix<float>& out,
                           Matrix<float>& state) {
        const Matrix<float> workspace(
            1, kernels::linear_attention_workspace(shape, kHeadDim, m, LinearPass::forward, Device::cuda));
        test::with_copies(
            device,
            [&](auto qkv_, auto table, auto out_, auto state_, auto scratch) {
              const auto part = [n](TensorView v, int i) { return v.column_range(i * n, n); };
              kernels::linear_attention_forward(device.stream, shape, {kind, m, table}, part(qkv_, 0), part(qkv_, 1),
                                                part(qkv_, 2), out_, kNone, state_, test::vector_of(scratch));
            },
            qkv, a.map.table, out, state, workspace);
      };
      const auto new_state = [&] {
        return Matrix<float>(kBatch * kHeads, kernels::linear_attention_state(kHeadDim, m));
      };
      Matrix<float> whole(kBatch * kSeq, n), of_whole = new_state();
      run(a.shape, a.qkv, whole, of_whole);
      for (const std::int64_t piece : {1, 7, 64, 100}) {
        if (piece == 1 && kind == Features::relu_cosine) continue;  // an emulated device is slow
        Matrix<float> state = new_state();
        for (std::int64_t first = 0; first < kSeq; first += piece) {
          const std::int64_t count = std::min(piece, kSeq - first);
          Matrix<float> qkv(kBatch * count, 3 * n), out(kBatch * count, n);
          for (std::int64_t r = 0; r < kBatch * count; ++r) {
            for (std::int64_t c = 0; c < 3 * n; ++c) qkv(r, c) = a.qkv(r / count * kSeq + first + r % count, c);
          }
          run({kBatch, kHeads, count, first}, qkv, out, state);
          for (std::int64_t r = 0; r < kBatch * count; ++r) {
            for (std::int64_t c = 0; c < n; ++c) {
              ASSERT_EQ(out(r, c), whole(r / count * kSeq + first + r % count, c))
                  << "position " << first + r % count << " in pieces of " << piece;
            }
          }
        }
      }
    }
  });
}

}  // namespace
}  // namespace tforge
