// Attention in bf16 on a CUDA device beside the formula in f64, with a bound for each number.
//
// 2^-8 is what rounding to bf16 changes a number by, at most, of its size. It happens to P and dS as operands and
// to out, dq, dk and dv as results; the rest is f32, where a sum of n terms is off by n 2^-23 of the sum of their sizes
// at most (tensor cores need not round to nearest), and a power of two by 2^-22 of its size: the eight that are counted
// as more terms have room for it, in P and in its sum. Of products of these errors a twentieth is allowed for.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "device_matrix.h"
#include "kernels/attention.h"

namespace tforge {
namespace {

using kernels::AttentionShape;
using test::Matrix;

constexpr double kRounding = 1.0 / 256;

Matrix<bf16> random_bf16(std::int64_t rows, std::int64_t columns, std::uint64_t seed, double size,
                         std::int64_t padding) {
  const auto numbers = Matrix<float>::random(rows, columns, seed, size);
  Matrix<bf16> m(rows, columns, padding);
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t c = 0; c < columns; ++c) m(r, c) = bf16(numbers(r, c));
  }
  return m;
}
double number(bf16 x) { return static_cast<double>(static_cast<float>(x)); }

/// How rows lie: `lead` columns before them, `padding` behind them.
struct Lay {
  std::int64_t lead, padding;
};

AttentionShape full(std::int64_t batch, std::int64_t heads, std::int64_t seq) { return {batch, heads, seq, seq, seq}; }

/// q, k and v as columns of one tensor, and the results over NaN. Where there are fewer queries than keys they are
/// those of its last rows (of one sequence).
struct Case {
  AttentionShape shape;
  std::int64_t head_dim, columns;
  Lay lay;
  Matrix<bf16> qkv, out, dout, dqkv;
  Matrix<float> lse, workspace;

  Case(const AttentionShape& shape_, std::int64_t head_dim_, Lay lay_, std::uint64_t seed)
      : shape(shape_),
        head_dim(head_dim_),
        columns(shape.heads * head_dim_),
        lay(lay_),
        qkv(random_bf16(shape.batch * shape.kv_seq, lay.lead + 3 * columns, seed, 1.5, lay.padding)),
        out(shape.batch * shape.q_seq, columns, lay.padding),
        dout(random_bf16(shape.batch * shape.q_seq, columns, seed + 1, 1, lay.padding)),
        dqkv(shape.batch * shape.kv_seq, lay.lead + 3 * columns, lay.padding),
        lse(shape.batch * shape.q_seq, shape.heads),
        workspace(1,
                  kernels::attention_workspace(full(shape.batch, shape.heads, shape.kv_seq), head_dim, Device::cuda)) {}
  std::int64_t earlier() const { return shape.kv_seq - shape.q_seq; }

  void run(test::CudaDevice& device) {
    test::with_copies(
        device,
        [&](auto qkv_, auto out_, auto lse_, auto dout_, auto dqkv_, auto w) {
          const auto part = [&](TensorView v, int i) {
            const TensorView x = v.column_range(lay.lead + i * columns, columns);
            return i == 0 ? x.row_range(earlier(), shape.batch * shape.q_seq) : x;
          };
          kernels::causal_attention_forward(device.stream, shape, part(qkv_, 0), part(qkv_, 1), part(qkv_, 2), out_,
                                            lse_, test::vector_of(w));
          kernels::causal_attention_backward(device.stream, shape, part(qkv_, 0), part(qkv_, 1), part(qkv_, 2), out_,
                                             lse_, dout_, part(dqkv_, 0), part(dqkv_, 1), part(dqkv_, 2),
                                             test::vector_of(w));
        },
        qkv, out, lse, dout, dqkv, workspace);
  }
};

/// A number and how far from it the kernel's may be.
struct Bound {
  double value = 0, off = 0;
  void add(double term, double term_off) {
    value += term;
    off += term_off;
  }
};

void expect_within(double got, const Bound& want, double last_rounding, const char* what, std::int64_t r,
                   std::int64_t c) {
  const double off = 1.05 * (want.off + last_rounding * std::abs(want.value)) + 1e-30;
  ASSERT_LE(std::abs(got - want.value), off) << what << ", row " << r << ", column " << c;
}

/// One head of one sequence, whose rows begin at `base` and whose columns at h * head_dim. Position i is row i -
/// earlier of what queries have.
void check_head(const Case& a, std::int64_t base, std::int64_t h) {
  const std::int64_t seq = a.shape.kv_seq, d = a.head_dim, first = h * d, query = base - a.earlier();
  const auto n = [](std::int64_t i) { return static_cast<std::size_t>(i); };
  const auto at = [&](int part, std::int64_t t, std::int64_t c) {
    return number(a.qkv(base + t, a.lay.lead + part * a.columns + first + c));
  };
  const double scale = 1 / std::sqrt(static_cast<double>(d)), sums = static_cast<double>(seq + d + 8) * 0x1p-23;
  std::vector<Bound> dq(n(seq * d)), dk(n(seq * d)), dv(n(seq * d));
  for (std::int64_t i = a.earlier(); i < seq; ++i) {
    std::vector<double> p(n(i + 1)), dp(n(i + 1)), dp_size(n(i + 1));
    double most = -1e300, most_size = 0, sum = 0;
    for (std::int64_t j = 0; j <= i; ++j) {
      double s = 0, size = 0;
      for (std::int64_t c = 0; c < d; ++c) {
        s += at(0, i, c) * at(1, j, c);
        size += std::abs(at(0, i, c) * at(1, j, c));
        const double term = number(a.dout(query + i, first + c)) * at(2, j, c);
        dp[n(j)] += term;
        dp_size[n(j)] += std::abs(term);
      }
      p[n(j)] = s * scale;
      most = std::max(most, s * scale);
      most_size = std::max(most_size, size * scale);
    }
    for (double& x : p) sum += x = std::exp(x - most);
    for (double& x : p) x /= sum;
    const double p_off = 2 * sums * (1 + most_size);  // of the size of P, before it is rounded: the score's and lse's
    expect_within(static_cast<double>(a.lse(query + i, h)), {most + std::log(sum), p_off}, 0, "lse", i, h);
    Bound dot;
    for (std::int64_t c = 0; c < d; ++c) {
      Bound out;
      for (std::int64_t j = 0; j <= i; ++j) {
        const double term = p[n(j)] * at(2, j, c);
        out.add(term, std::abs(term) * (kRounding + p_off + sums));
      }
      expect_within(number(a.out(query + i, first + c)), out, kRounding, "out", i, c);
      const double g = number(a.dout(query + i, first + c));
      dot.add(g * out.value, std::abs(g) * (out.off + (kRounding + sums) * std::abs(out.value)));
    }
    for (std::int64_t j = 0; j <= i; ++j) {
      const double ds = p[n(j)] * (dp[n(j)] - dot.value);
      const double ds_off = std::abs(ds) * (kRounding + p_off + sums) + p[n(j)] * (sums * dp_size[n(j)] + dot.off);
      for (std::int64_t c = 0; c < d; ++c) {
        dq[n(i * d + c)].add(scale * ds * at(1, j, c), scale * ds_off * std::abs(at(1, j, c)));
        dk[n(j * d + c)].add(scale * ds * at(0, i, c), scale * ds_off * std::abs(at(0, i, c)));
        const double term = p[n(j)] * number(a.dout(query + i, first + c));
        dv[n(j * d + c)].add(term, std::abs(term) * (kRounding + p_off + sums));
      }
    }
  }
  for (std::int64_t i = 0; i < seq; ++i) {
    for (std::int64_t c = 0; c < d; ++c) {
      const auto got = [&](int part) { return number(a.dqkv(base + i, a.lay.lead + part * a.columns + first + c)); };
      if (i >= a.earlier()) expect_within(got(0), dq[n(i * d + c)], kRounding, "dq", i, c);
      expect_within(got(1), dk[n(i * d + c)], kRounding, "dk", i, c);
      expect_within(got(2), dv[n(i * d + c)], kRounding, "dv", i, c);
    }
  }
}

void follows_the_formula(test::CudaDevice& device, const AttentionShape& shape, std::int64_t head_dim, Lay lay) {
  SCOPED_TRACE(std::to_string(shape.q_seq) + " of " + std::to_string(shape.kv_seq) + " positions, heads of " +
               std::to_string(head_dim) + ", columns before: " + std::to_string(lay.lead) +
               ", behind: " + std::to_string(lay.padding));
  Case a(shape, head_dim, lay, 5);
  a.run(device);
  for (std::int64_t b = 0; b < shape.batch; ++b) {
    for (std::int64_t h = 0; h < shape.heads; ++h) {
      check_head(a, b * shape.kv_seq, h);
      if (testing::Test::HasFatalFailure()) return;
    }
  }
  EXPECT_TRUE(a.out.padding_untouched() && a.dqkv.padding_untouched());
}

constexpr Lay kPacked{0, 0}, kPackedApart{8, 16}, kOdd{0, 3}, kMisaligned{1, 7};

TEST(AttentionBf16, CudaFollowsTheFormula) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const std::int64_t seq : {1, 31, 33, 65}) {
      for (const std::int64_t head_dim : {8, 32, 40})
        follows_the_formula(device, full(2, 2, seq), head_dim, kPackedApart);
    }
    for (const std::int64_t head_dim : {16, 64, 80, 96, 128}) {
      follows_the_formula(device, full(1, 2, 65), head_dim, kPacked);
    }
    follows_the_formula(device, full(1, 1, 257), 64, kPacked);
    follows_the_formula(device, full(1, 1, 257), 128, kPackedApart);
  });
}

TEST(AttentionBf16, CudaTakesKeysBeforeTheQueries) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const auto& [q_seq, kv_seq] : {std::pair{1, 40}, {33, 70}, {64, 65}, {65, 130}, {10, 128}}) {
      for (const std::int64_t head_dim : {32, 128}) {
        follows_the_formula(device, {1, 2, q_seq, kv_seq, kv_seq}, head_dim, kPacked);
      }
    }
  });
}

TEST(AttentionBf16, CudaTakesRowsThatAreNotPacks) {
  test::on_cuda([](test::CudaDevice& device) {
    for (const std::int64_t head_dim : {1, 20, 31, 64}) follows_the_formula(device, full(2, 2, 65), head_dim, kOdd);
    for (const std::int64_t head_dim : {32, 128}) follows_the_formula(device, full(1, 1, 33), head_dim, kMisaligned);
  });
}

TEST(AttentionBf16, CudaGivesARowTheSameBitsFromACache) {
  test::on_cuda([](test::CudaDevice& device) {
    constexpr std::int64_t kSeq = 135, kCapacity = 140, kHeads = 2;
    for (const std::int64_t head_dim : {20, 64, 128}) {
      const std::int64_t columns = kHeads * head_dim;
      const auto q = random_bf16(2 * kSeq, columns, 1, 1, 0), k = random_bf16(2 * kCapacity, columns, 2, 1, 0),
                 v = random_bf16(2 * kCapacity, columns, 3, 1, 0);
      Matrix<bf16> all(2 * kSeq, columns);
      Matrix<float> workspace(1,
                              kernels::attention_workspace({2, kHeads, kSeq, kSeq, kCapacity}, head_dim, Device::cuda));
      const auto run = [&](const AttentionShape& s, std::int64_t sequence, std::int64_t first, Matrix<bf16>& out) {
        // Of the keys behind the last query there are NaN.
        auto some_k = k, some_v = v;
        for (std::int64_t b = 0; b < 2; ++b) {
          for (std::int64_t r = s.kv_seq; r < kCapacity; ++r) {
            for (std::int64_t c = 0; c < columns; ++c) {
              some_k(b * kCapacity + r, c) = some_v(b * kCapacity + r, c) = bf16(std::nanf(""));
            }
          }
        }
        test::with_copies(
            device,
            [&](auto q_, auto k_, auto v_, auto out_, auto w) {
              const std::int64_t key = sequence * kCapacity;
              kernels::causal_attention_forward(device.stream, s,
                                                q_.row_range(sequence * kSeq + first, s.batch * s.q_seq),
                                                k_.row_range(key, 2 * kCapacity - key),
                                                v_.row_range(key, 2 * kCapacity - key), out_, {}, test::vector_of(w));
            },
            q, some_k, some_v, out, workspace);
      };
      run({2, kHeads, kSeq, kSeq, kCapacity}, 0, 0, all);
      // Positions of the second sequence alone, in pieces that end before and behind tiles do.
      for (const auto& [first, count] : {std::pair{132, 3}, {63, 2}, {70, 1}, {0, 64}, {100, 33}}) {
        Matrix<bf16> some(count, columns);
        run({1, kHeads, count, first + count, kCapacity}, 1, first, some);
        for (std::int64_t i = 0; i < count; ++i) {
          for (std::int64_t c = 0; c < columns; ++c) {
            ASSERT_EQ(some(i, c).bits, all(kSeq + first + i, c).bits) << "position " << first + i << ", column " << c;
          }
        }
      }
    }
  });
}

TEST(AttentionBf16, CudaGradientsDoNotDependOnTheBatch) {
  test::on_cuda([](test::CudaDevice& device) {
    Case two(full(2, 1, 70), 32, kPacked, 1), one(full(1, 1, 70), 32, kOdd, 9);
    for (std::int64_t r = 0; r < 70; ++r) {
      for (std::int64_t c = 0; c < 96; ++c) one.qkv(r, c) = two.qkv(70 + r, c);
      for (std::int64_t c = 0; c < 32; ++c) one.dout(r, c) = two.dout(70 + r, c);
    }
    two.run(device);
    one.run(device);
    for (std::int64_t r = 0; r < 70; ++r) {
      ASSERT_EQ(std::memcmp(&one.out(r, 0), &two.out(70 + r, 0), 32 * sizeof(bf16)), 0) << "row " << r;
      ASSERT_EQ(std::memcmp(&one.dqkv(r, 0), &two.dqkv(70 + r, 0), 96 * sizeof(bf16)), 0) << "row " << r;
    }
  });
}

TEST(AttentionBf16, CudaShowsWhatIsNotANumber) {
  test::on_cuda([](test::CudaDevice& device) {
    constexpr std::int64_t kSeq = 135, kAt = 70, kColumns = 64;  // kAt is in the second of three tiles
    for (int part = 0; part < 3; ++part) {
      SCOPED_TRACE(part);
      Case a(full(1, 1, kSeq), kColumns, kPacked, 3);
      a.qkv(kAt, part * kColumns + 5) = bf16(std::nanf(""));
      a.run(device);
      // In its own row, and a key or value in all rows that see it; not in rows of tiles before.
      for (const std::int64_t r : {kAt, kAt + 1, std::int64_t{128}, kSeq - 1}) {
        if (part == 0 && r != kAt) continue;
        EXPECT_TRUE(std::isnan(number(a.out(r, 5)))) << "row " << r;
        EXPECT_EQ(std::isnan(a.lse(r, 0)), part < 2) << "row " << r;
        EXPECT_TRUE(std::isnan(number(a.dqkv(r, 5)))) << "row " << r;
      }
      for (std::int64_t r = 0; r < 64; ++r) {
        for (std::int64_t c = 0; c < kColumns; ++c) ASSERT_TRUE(std::isfinite(number(a.out(r, c)))) << "row " << r;
      }
    }
  });
}

TEST(AttentionBf16, CudaTakesLargeScores) {
  test::on_cuda([](test::CudaDevice& device) {
    Case a(full(1, 1, 70), 16, kPacked, 1);
    for (std::int64_t r = 0; r < 70; ++r) {
      for (std::int64_t c = 0; c < 32; ++c) a.qkv(r, c) = bf16(100 * static_cast<float>(a.qkv(r, c)));
    }
    a.run(device);
    EXPECT_GT(a.lse.largest(), 1000);
    for (std::int64_t r = 0; r < 70; ++r) {
      for (std::int64_t c = 0; c < 48; ++c) ASSERT_TRUE(std::isfinite(number(a.dqkv(r, c)))) << r << ", " << c;
      for (std::int64_t c = 0; c < 16; ++c) ASSERT_LE(std::abs(number(a.out(r, c))), 1.5 * 8);
    }
  });
}

}  // namespace
}  // namespace tforge
