#include "autograd/ops/memory_layer.h"

#include <cmath>
#include <string>
#include <vector>

#include "autograd/grad_check.h"
#include "autograd/ops/residual.h"
#include "core/errors.h"
#include "kernels/gemm.h"
#include "values.h"

namespace tforge {
namespace {

class MemoryLayerOp : public testing::TestWithParam<HashWeight> {
 protected:
  static constexpr std::int64_t kBits = 3, kTables = 4, kWidth = 12;

  static void SetUpTestSuite() { kernels::start_cpu_runtime(1); }

  MemoryHashing hash() {
    std::vector<std::int32_t> chunks;
    for (std::int32_t i = 0; i < kBits; ++i) {
      for (std::int32_t k = 0; k < kTables; ++k) chunks.push_back(static_cast<std::int32_t>(kBits) * k + i);
    }
    return {GetParam(), 1.0, kBits - 1, test::integers(allocator_, chunks).reshaped(Shape{kBits, kTables})};
  }
  /// Normal numbers, none of them where a sign could flip.
  Tensor input() {
    Tensor x = test::random(allocator_, Shape{5, kWidth}, "x");
    for (double& v : x.span<double>()) v += v < 0 ? -0.01 : 0.01;
    return x;
  }
  Tensor tables(const char* name, std::int64_t columns) {
    return test::random(allocator_, Shape{kTables << kBits, columns}, name);
  }
  Allocator allocator_;
  Stream stream_;
};

TEST_P(MemoryLayerOp, GradientOfAGroup) {
  const auto group = [&](Tape& tape, std::span<const Var> in) {
    const std::vector<MemoryTables> layers{{in[1]}, {in[2]}, {in[3]}};
    return memory_layer(tape, in[0], hash(), layers, identity_reducer());
  };
  EXPECT_EQ(grad_check(allocator_, stream_, group, {input(), tables("q", 5), tables("k", 5), tables("v", 5)}), "");
}

TEST_P(MemoryLayerOp, GradientOfTwoLayersThatReadOneInput) {
  const auto two = [&](Tape& tape, std::span<const Var> in) {
    const std::vector<MemoryTables> first{{in[1]}}, second{{in[2]}};
    const Var y = memory_layer(tape, in[0], hash(), first, identity_reducer());
    return residual(tape, y, memory_layer(tape, in[0], hash(), second, identity_reducer()));
  };
  EXPECT_EQ(grad_check(allocator_, stream_, two, {input(), tables("a", 6), tables("b", 6)}), "");
}

TEST_P(MemoryLayerOp, GivesTheWeightedRows) {
  const Tensor x = input(), q = tables("q", 5), k = tables("k", 2);
  Tape tape(allocator_, stream_, TapeMode::inference);
  const Var y = memory_layer(tape, Var(x), hash(), std::vector<MemoryTables>{{Var(q)}, {Var(k)}}, identity_reducer());
  ASSERT_EQ(y.shape(), Shape({5, 7}));
  const test::Values xs = test::values_of(x), qs = test::values_of(q), ks = test::values_of(k),
                     ys = test::values_of(y.value());
  for (std::size_t t = 0; t < 5; ++t) {
    for (std::size_t c = 0; c < 7; ++c) {
      double want = 0;
      for (std::size_t table = 0; table < kTables; ++table) {
        const double* z = &xs[t * kWidth + table * kBits];
        const std::size_t row = table * 8 + (z[0] >= 0 ? 4U : 0U) + (z[1] >= 0 ? 2U : 0U) + (z[2] >= 0 ? 1U : 0U);
        const double p = 1 / ((1 + std::exp(-2 * std::abs(z[0]))) * (1 + std::exp(-2 * std::abs(z[1]))));
        const double weight = GetParam() == HashWeight::p ? p : p * (std::abs(z[0]) + std::abs(z[1]));
        want += weight * (c < 5 ? qs[row * 5 + c] : ks[row * 2 + c - 5]);
      }
      EXPECT_NEAR(ys[t * 7 + c], want, 1e-13);
    }
  }
}

TEST_P(MemoryLayerOp, RefusesTablesOfAnotherSize) {
  Tape tape(allocator_, stream_, TapeMode::inference);
  const Var few(test::random(allocator_, Shape{kTables << (kBits - 1), 5}, "few"));
  EXPECT_THROW(memory_layer(tape, Var(input()), hash(), std::vector<MemoryTables>{{few}}, identity_reducer()),
               ShapeError);
  EXPECT_THROW(memory_layer(tape, Var(input()), hash(), std::vector<MemoryTables>{}, identity_reducer()), ShapeError);
}

INSTANTIATE_TEST_SUITE_P(Weights, MemoryLayerOp, testing::Values(HashWeight::p, HashWeight::l1_times_p),
                         [](const auto& test) { return std::string(name_of(test.param)); });

}  // namespace
}  // namespace tforge
