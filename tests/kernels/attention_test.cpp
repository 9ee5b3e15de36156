#include "kernels/attention.h"

#include "device_matrix.h"
#include "matrix.h"

namespace tforge {
namespace {

using kernels::AttentionShape;
using test::Matrix;
Stream cpu;
constexpr TensorView kNone;

AttentionShape full(std::int64_t batch, std::int64_t heads, std::int64_t seq) { return {batch, heads, seq, seq, seq}; }

/// A workspace of exactly the size asked for, full of NaN.
template <class T>
Matrix<T> workspace_for(const AttentionShape& s, std::int64_t head_dim) {
  return Matrix<T>(1, kernels::attention_workspace(s, head_dim));
}

/// q, k and v as columns of one tensor, and the results over NaN.
template <class T>
struct Attention {
  AttentionShape shape;
  std::int64_t head_dim;
  Matrix<T> qkv, out, lse, dout, dqkv;

  Attention(const AttentionShape& s, std::int64_t head_dim_, std::uint64_t seed)
      : shape(s),
        head_dim(head_dim_),
        qkv(Matrix<T>::random(s.batch * s.q_seq, 3 * columns(), seed, 1.5, 2)),
        out(s.batch * s.q_seq, columns(), 1),
        lse(s.batch * s.q_seq, s.heads),
        dout(Matrix<T>::random(s.batch * s.q_seq, columns(), seed + 1, 1, 3)),
        dqkv(s.batch * s.q_seq, 3 * columns(), 5) {}
  std::int64_t columns() const { return shape.heads * head_dim; }
  ConstTensorView part(int i) const { return qkv.view().column_range(i * columns(), columns()); }
  TensorView gradient(int i) { return dqkv.view().column_range(i * columns(), columns()); }

  void forward() {
    auto workspace = workspace_for<T>(shape, head_dim);
    kernels::causal_attention_forward(cpu, shape, part(0), part(1), part(2), out.view(), lse.view(),
                                      workspace.vector());
  }
  void backward() {
    auto workspace = workspace_for<T>(shape, head_dim);
    kernels::causal_attention_backward(cpu, shape, part(0), part(1), part(2), out.view(), lse.view(), dout.view(),
                                       gradient(0), gradient(1), gradient(2), workspace.vector());
  }
};

/// The formula in f64, with the whole matrix of probabilities.
template <class T>
void reference(const Attention<T>& a, Matrix<double>& out, Matrix<double>& lse, Matrix<double>& dqkv) {
  const std::int64_t seq = a.shape.q_seq, d = a.head_dim, columns = a.columns();
  const double scale = 1 / std::sqrt(static_cast<double>(d));
  for (std::int64_t r = 0; r < dqkv.rows(); ++r) {
    for (std::int64_t c = 0; c < dqkv.columns(); ++c) dqkv(r, c) = 0;
  }
  for (std::int64_t b = 0; b < a.shape.batch; ++b) {
    for (std::int64_t h = 0; h < a.shape.heads; ++h) {
      const auto at = [&](int part, std::int64_t t, std::int64_t c) {
        return static_cast<double>(a.qkv(b * seq + t, part * columns + h * d + c));
      };
      for (std::int64_t i = 0; i < seq; ++i) {
        std::vector<double> p, dp;
        double max = -std::numeric_limits<double>::infinity(), sum = 0, dot = 0;
        for (std::int64_t j = 0; j <= i; ++j) {
          double s = 0, g = 0;
          for (std::int64_t c = 0; c < d; ++c) {
            s += at(0, i, c) * at(1, j, c);
            g += static_cast<double>(a.dout(b * seq + i, h * d + c)) * at(2, j, c);
          }
          p.push_back(s * scale);
          dp.push_back(g);
          max = std::max(max, s * scale);
        }
        for (double& x : p) sum += x = std::exp(x - max);
        lse(b * seq + i, h) = max + std::log(sum);
        for (std::size_t j = 0; j < p.size(); ++j) dot += (p[j] /= sum) * dp[j];
        for (std::int64_t c = 0; c < d; ++c) {
          double y = 0;
          for (std::size_t j = 0; j < p.size(); ++j) {
            const auto row = static_cast<std::int64_t>(j);
            const double ds = scale * p[j] * (dp[j] - dot);
            y += p[j] * at(2, row, c);
            dqkv(b * seq + i, h * d + c) += ds * at(1, row, c);
            dqkv(b * seq + row, columns + h * d + c) += ds * at(0, i, c);
            dqkv(b * seq + row, 2 * columns + h * d + c) += p[j] * static_cast<double>(a.dout(b * seq + i, h * d + c));
          }
          out(b * seq + i, h * d + c) = y;
        }
      }
    }
  }
}

TEST(Attention, ByHand) {
  // One head of one dimension. The first row sees itself; the second has scores ln 3 and 0.
  const auto q = Matrix<double>::of(2, 1, {5, std::log(3)});
  const auto k = Matrix<double>::of(2, 1, {1, 0});
  const auto v = Matrix<double>::of(2, 1, {10, 20});
  Matrix<double> out(2, 1), lse(2, 1);
  auto workspace = workspace_for<double>(full(1, 1, 2), 1);
  kernels::causal_attention_forward(cpu, full(1, 1, 2), q.view(), k.view(), v.view(), out.view(), lse.view(),
                                    workspace.vector());
  EXPECT_DOUBLE_EQ(out(0, 0), 10);
  EXPECT_DOUBLE_EQ(out(1, 0), 0.75 * 10 + 0.25 * 20);
  EXPECT_DOUBLE_EQ(lse(0, 0), 5);
  EXPECT_DOUBLE_EQ(lse(1, 0), std::log(4));
}

template <class T>
void follows_the_formula(double tolerance) {
  for (const std::int64_t seq : {1, 2, 24, 25, 31, 33, 257}) {
    for (const std::int64_t head_dim : {1, 7, 16, 31, 33, 64}) {
      if (seq == 257 && head_dim != 31 && head_dim != 64) continue;
      Attention<T> a(full(2, 3, seq), head_dim, 1);
      a.forward();
      a.backward();
      const std::int64_t rows = 2 * seq;
      Matrix<double> out(rows, a.columns()), lse(rows, 3), dqkv(rows, 3 * a.columns());
      reference(a, out, lse, dqkv);
      test::expect_near(a.out, out, tolerance * out.largest());
      test::expect_near(a.lse, lse, tolerance * std::max(1.0, lse.largest()));
      test::expect_near(a.dqkv, dqkv, 4 * tolerance * dqkv.largest());
      EXPECT_TRUE(a.out.padding_untouched() && a.dqkv.padding_untouched());
      if (testing::Test::HasFatalFailure()) FAIL() << "sequence of " << seq << ", head of " << head_dim;
    }
  }
}
TEST(Attention, FloatFollowsTheFormula) { follows_the_formula<float>(1e-6); }
TEST(Attention, DoubleFollowsTheFormula) { follows_the_formula<double>(1e-14); }

TEST(Attention, GradientMatchesFiniteDifferences) {
  Attention<double> a(full(2, 2, 27), 5, 1);  // more than one block of queries
  a.forward();
  a.backward();
  test::expect_gradient(a.qkv, a.dqkv, [&] {
    a.forward();
    return a.out.dot(a.dout);
  });
}

TEST(Attention, LargeScoresDoNotOverflow) {
  Attention<float> a(full(1, 1, 40), 16, 1);
  for (std::int64_t r = 0; r < 40; ++r) {
    for (std::int64_t c = 0; c < 32; ++c) a.qkv(r, c) *= 100;
  }
  a.forward();
  a.backward();
  EXPECT_TRUE(std::isfinite(a.out.dot(a.dout)));
  EXPECT_TRUE(std::isfinite(a.dqkv.dot(a.qkv)));
  EXPECT_GT(a.lse.largest(), 1000);
}

TEST(Attention, NonFiniteInputsShow) {
  for (const int part : {0, 1, 2}) {
    Attention<float> a(full(1, 1, 40), 16, 1);
    a.qkv(20, part * 16 + 3) = std::numeric_limits<float>::quiet_NaN();
    a.forward();
    EXPECT_TRUE(std::isnan(a.out(20, 3)));
  }
}

TEST(Attention, TheFutureDoesNotTouchThePast) {
  for (const std::int64_t cut : {1, 5, 23, 24, 40, 63}) {
    Attention<float> a(full(1, 2, 64), 16, 1);
    a.forward();
    const auto before = a;
    for (std::int64_t r = cut; r < 64; ++r) {
      for (std::int64_t c = 0; c < a.qkv.columns(); ++c) a.qkv(r, c) = 3 - 2 * a.qkv(r, c);
    }
    a.forward();
    for (std::int64_t r = 0; r < 64; ++r) {
      const bool same = std::memcmp(&a.out(r, 0), &before.out(r, 0), 32 * sizeof(float)) == 0;
      ASSERT_EQ(same, r < cut) << "row " << r << " after a change from " << cut;
    }
  }
}

/// Queries in pieces against a cache whose unused rows are NaN: the bits of the full pass.
template <class T>
void cache_equals_full_pass(std::int64_t head_dim, std::int64_t piece) {
  constexpr std::int64_t kBatch = 2, kHeads = 3, kSeq = 75, kCapacity = 90;
  Attention<T> a({kBatch, kHeads, kSeq, kSeq, kSeq}, head_dim, 1);
  a.forward();
  const std::int64_t columns = a.columns();
  Matrix<T> k_cache(kBatch * kCapacity, columns, 1), v_cache(kBatch * kCapacity, columns, 2);
  for (std::int64_t first = 0; first < kSeq; first += piece) {
    const std::int64_t count = std::min(piece, kSeq - first);
    Matrix<T> q(kBatch * count, columns), out(kBatch * count, columns);
    for (std::int64_t b = 0; b < kBatch; ++b) {
      for (std::int64_t i = 0; i < count; ++i) {
        for (std::int64_t c = 0; c < columns; ++c) {
          q(b * count + i, c) = a.qkv(b * kSeq + first + i, c);
          k_cache(b * kCapacity + first + i, c) = a.qkv(b * kSeq + first + i, columns + c);
          v_cache(b * kCapacity + first + i, c) = a.qkv(b * kSeq + first + i, 2 * columns + c);
        }
      }
    }
    const AttentionShape shape{kBatch, kHeads, count, first + count, kCapacity};
    auto workspace = workspace_for<T>(shape, head_dim);
    kernels::causal_attention_forward(cpu, shape, q.view(), k_cache.view(), v_cache.view(), out.view(), kNone,
                                      workspace.vector());
    for (std::int64_t b = 0; b < kBatch; ++b) {
      for (std::int64_t i = 0; i < count; ++i) {
        ASSERT_EQ(std::memcmp(&out(b * count + i, 0), &a.out(b * kSeq + first + i, 0),
                              static_cast<std::size_t>(columns) * sizeof(T)),
                  0)
            << "position " << first + i << " in pieces of " << piece << ", head of " << head_dim;
      }
    }
  }
}
TEST(Attention, OneQueryAtATimeEqualsTheFullPass) {
  for (const std::int64_t head_dim : {1, 16, 20, 31, 64, 80}) cache_equals_full_pass<float>(head_dim, 1);
  for (const std::int64_t head_dim : {7, 8}) cache_equals_full_pass<double>(head_dim, 1);
}
TEST(Attention, QueriesInPiecesEqualTheFullPass) {
  for (const std::int64_t piece : {2, 7, 24, 26, 75}) {
    for (const std::int64_t head_dim : {16, 31}) cache_equals_full_pass<float>(head_dim, piece);
  }
}

TEST(Attention, BitsDependNeitherOnTheBatchNorOnThreads) {
  Attention<float> a(full(5, 3, 70), 33, 1);
  std::vector<Matrix<float>> first;
  test::at_one_and_two_threads([&](int) {
    a.forward();
    a.backward();
    if (first.empty()) first = {a.out, a.lse, a.dqkv};
    else EXPECT_TRUE(a.out.same_bits(first[0]) && a.lse.same_bits(first[1]) && a.dqkv.same_bits(first[2]));
  });
  Attention<float> alone(full(1, 3, 70), 33, 9);
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

TEST(Attention, RefusesWhatDoesNotFit) {
  Matrix<float> x(6, 8), short_k(5, 8), lse(6, 2), wide_lse(6, 3);
  auto workspace = workspace_for<float>(full(2, 2, 3), 4);
  const auto forward = [&](const AttentionShape& s, const Matrix<float>& k, TensorView lse_view, TensorView scratch) {
    kernels::causal_attention_forward(cpu, s, x.view(), k.view(), x.view(), x.view(), lse_view, scratch);
  };
  EXPECT_THROW(forward({2, 2, 3, 2, 3}, x, kNone, workspace.vector()), ShapeError);  // fewer keys than queries
  EXPECT_THROW(forward({2, 2, 3, 4, 3}, x, kNone, workspace.vector()), ShapeError);  // keys past their stride
  EXPECT_THROW(forward({2, 3, 3, 3, 3}, x, kNone, workspace.vector()), ShapeError);  // 8 columns, 3 heads
  EXPECT_THROW(forward(full(2, 2, 3), short_k, kNone, workspace.vector()), ShapeError);
  EXPECT_THROW(forward(full(2, 2, 3), x, wide_lse.view(), workspace.vector()), ShapeError);
  EXPECT_THROW(forward(full(2, 2, 3), x, lse.view(), lse.view()), ShapeError);  // too small a workspace
  EXPECT_THROW(
      kernels::causal_attention_backward(cpu, {2, 2, 3, 4, 5}, x.view(), x.view(), x.view(), x.view(), lse.view(),
                                         x.view(), x.view(), x.view(), x.view(), workspace.vector()),
      ShapeError);
  Matrix<double> d(6, 8);
  EXPECT_THROW(kernels::causal_attention_forward(cpu, full(2, 2, 3), x.view(), d.view(), x.view(), x.view(), kNone,
                                                 workspace.vector()),
               DTypeError);
}

template <class T>
void compare_on_cuda(test::CudaDevice& device, const AttentionShape& s, std::int64_t head_dim, double tolerance) {
  SCOPED_TRACE(std::to_string(s.q_seq) + " positions, heads of " + std::to_string(head_dim));
  Attention<T> got(s, head_dim, 7);
  const std::int64_t n = got.columns();
  Matrix<double> out(s.batch * s.q_seq, n), lse(s.batch * s.q_seq, s.heads), dqkv(s.batch * s.q_seq, 3 * n);
  reference(got, out, lse, dqkv);
  Matrix<T> workspace(1, kernels::attention_workspace(s, head_dim, Device::cuda));
  test::with_copies(
      device,
      [&](auto qkv, auto out_, auto lse_, auto dout, auto dqkv_, auto w) {
        const auto part = [n](TensorView v, int i) { return v.column_range(i * n, n); };
        kernels::causal_attention_forward(device.stream, s, part(qkv, 0), part(qkv, 1), part(qkv, 2), out_, lse_,
                                          test::vector_of(w));
        kernels::causal_attention_backward(device.stream, s, part(qkv, 0), part(qkv, 1), part(qkv, 2), out_, lse_, dout,
                                           part(dqkv_, 0), part(dqkv_, 1), part(dqkv_, 2), test::vector_of(w));
      },
      got.qkv, got.out, got.lse, got.dout, got.dqkv, workspace);
  test::expect_near(got.out, out, tolerance);
  test::expect_near(got.lse, lse, tolerance);
  test::expect_near(got.dqkv, dqkv, 10 * tolerance);
  EXPECT_TRUE(got.out.padding_untouched() && got.dqkv.padding_untouched());
}
TEST(Attention, CudaFollowsTheFormula) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const std::int64_t seq : {1, 31, 33, 70, 257}) {
      compare_on_cuda<float>(device, full(2, 3, seq), 20, 4e-6);
      compare_on_cuda<double>(device, full(1, 2, seq), 8, 1e-14);
    }
    compare_on_cuda<float>(device, full(1, 1, 45), 1, 4e-6);
    compare_on_cuda<float>(device, full(1, 1, 45), 64, 4e-6);
    compare_on_cuda<float>(device, full(1, 1, 45), 128, 8e-6);  // longer sums
  });
}

TEST(Attention, CudaGradientsOfKeysBeforeTheQueries) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const auto& sizes : {std::pair<std::int64_t, std::int64_t>{1, 40}, {33, 70}, {40, 41}, {64, 100}}) {
      const std::int64_t q_seq = sizes.first, kv_seq = sizes.second;  // clang 14 lets no lambda capture a binding
      const std::int64_t kHeads = 2, kHeadDim = 20, n = kHeads * kHeadDim, stride = kv_seq + 3;
      const AttentionShape s{2, kHeads, q_seq, kv_seq, stride};
      const auto q = Matrix<float>::random(2 * q_seq, n, 1), dout = Matrix<float>::random(2 * q_seq, n, 2);
      const auto k = Matrix<float>::random(2 * stride, n, 3), v = Matrix<float>::random(2 * stride, n, 4);
      struct Results {
        Matrix<float> out, lse, dq, dk, dv;
      };
      const auto results = [&] {
        return Results{{2 * q_seq, n}, {2 * q_seq, 2}, {2 * q_seq, n}, {2 * stride, n}, {2 * stride, n}};
      };
      Results got = results(), want = results();
      const auto run = [&](Stream& stream, auto q_, auto k_, auto v_, auto dout_, auto out, auto lse, auto dq, auto dk,
                           auto dv, TensorView w) {
        kernels::causal_attention_forward(stream, s, q_, k_, v_, out, lse, w);
        kernels::causal_attention_backward(stream, s, q_, k_, v_, out, lse, dout_, dq, dk, dv, w);
      };
      AttentionShape widest = s;
      widest.q_seq = kv_seq;
      Matrix<float> here(1, kernels::attention_workspace(widest, kHeadDim)),
          there(1, kernels::attention_workspace(widest, kHeadDim, Device::cuda));
      run(cpu, q.view(), k.view(), v.view(), dout.view(), want.out.view(), want.lse.view(), want.dq.view(),
          want.dk.view(), want.dv.view(), here.vector());
      test::with_copies(
          device,
          [&](auto q_, auto k_, auto v_, auto dout_, auto out, auto lse, auto dq, auto dk, auto dv, auto w) {
            run(device.stream, q_, k_, v_, dout_, out, lse, dq, dk, dv, test::vector_of(w));
          },
          q, k, v, dout, got.out, got.lse, got.dq, got.dk, got.dv, there);
      test::expect_near(got.out, want.out, 4e-6);
      test::expect_near(got.dq, want.dq, 4e-5);
      for (const auto& [a, b] : {std::pair{&got.dk, &want.dk}, {&got.dv, &want.dv}}) {
        for (std::int64_t r = 0; r < 2 * stride; ++r) {
          for (std::int64_t c = 0; c < n; ++c) {
            if (r % stride < kv_seq) ASSERT_NEAR((*a)(r, c), (*b)(r, c), 4e-5) << q_seq << ": row " << r;
            else ASSERT_TRUE(std::isnan((*a)(r, c)));  // not of this sequence
          }
        }
      }
    }
  });
}

TEST(Attention, CudaGivesARowTheSameBitsFromACache) {
  test::on_cuda([](test::CudaDevice& device) {
    constexpr std::int64_t kSeq = 70, kLast = 3, kHeadDim = 20, kHeads = 2, kCapacity = 75;
    const AttentionShape whole{1, kHeads, kSeq, kSeq, kCapacity}, last{1, kHeads, kLast, kSeq, kCapacity};
    const auto q = Matrix<float>::random(kSeq, kHeads * kHeadDim, 1);
    const auto k = Matrix<float>::random(kCapacity, kHeads * kHeadDim, 2);
    const auto v = Matrix<float>::random(kCapacity, kHeads * kHeadDim, 3);
    Matrix<float> out(kSeq, kHeads * kHeadDim), few(kLast, kHeads * kHeadDim);
    Matrix<float> workspace(1, kernels::attention_workspace(whole, kHeadDim, Device::cuda));
    test::with_copies(
        device,
        [&](auto q_, auto k_, auto v_, auto out_, auto few_, auto w) {
          kernels::causal_attention_forward(device.stream, whole, q_, k_, v_, out_, {}, test::vector_of(w));
          kernels::causal_attention_forward(device.stream, last, q_.row_range(kSeq - kLast, kLast), k_, v_, few_, {},
                                            test::vector_of(w));
        },
        q, k, v, out, few, workspace);
    for (std::int64_t i = 0; i < kLast; ++i) {
      for (std::int64_t c = 0; c < kHeads * kHeadDim; ++c) EXPECT_EQ(few(i, c), out(kSeq - kLast + i, c));
    }
  });
}

TEST(Attention, CudaRefusesHeadsThatAreTooWide) {
  test::on_cuda([](test::CudaDevice& device) {
    const AttentionShape s = full(1, 1, 2);
    const auto q = Matrix<float>::random(2, 129, 1);
    Matrix<float> out(2, 129), workspace(1, kernels::attention_workspace(s, 129, Device::cuda));
    test::with_copies(
        device,
        [&](auto q_, auto out_, auto w) {
          EXPECT_THROW(kernels::causal_attention_forward(device.stream, s, q_, q_, q_, out_, {}, test::vector_of(w)),
                       DeviceError);
        },
        q, out, workspace);
  });
}

}  // namespace
}  // namespace tforge
