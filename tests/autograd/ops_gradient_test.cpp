// Every differentiable op against central differences in f64.
#include <array>
#include <cmath>
#include <string>
#include <tuple>

#include "autograd/grad_check.h"
#include "autograd/ops/attention.h"
#include "autograd/ops/embedding.h"
#include "autograd/ops/gelu.h"
#include "autograd/ops/head_cross_entropy.h"
#include "autograd/ops/layer_norm.h"
#include "autograd/ops/linear.h"
#include "autograd/ops/pattention.h"
#include "autograd/ops/residual.h"
#include "kernels/gemm.h"
#include "kernels/rotary.h"
#include "values.h"

namespace tforge {
namespace {

class OpGradient : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    kernels::start_cpu_runtime(1);  // thousands of small calls: threads would only wait for each other
  }
  Tensor random(const Shape& shape, const char* name, double size = 1) {
    return test::random(allocator_, shape, name, size);
  }
  std::string check(const DifferentiableFunction& function, std::vector<Tensor> inputs) {
    return grad_check(allocator_, stream_, function, std::move(inputs));
  }
  Allocator allocator_;
  Stream stream_;
};

TEST_F(OpGradient, Gelu) {
  EXPECT_EQ(check([](Tape& tape, std::span<const Var> in) { return gelu(tape, in[0]); }, {random(Shape{5, 7}, "x", 2)}),
            "");
}

TEST_F(OpGradient, Residual) {
  EXPECT_EQ(check([](Tape& tape, std::span<const Var> in) { return residual(tape, in[0], gelu(tape, in[1])); },
                  {random(Shape{4, 3}, "h"), random(Shape{4, 3}, "y")}),
            "");
}

TEST_F(OpGradient, ResidualOfOneValueTwice) {
  EXPECT_EQ(check(
                [](Tape& tape, std::span<const Var> in) {
                  const Var h = gelu(tape, in[0]);
                  return residual(tape, residual(tape, h, gelu(tape, h)), h);
                },
                {random(Shape{4, 3}, "x")}),
            "");
}

TEST_F(OpGradient, LayerNorm) {
  EXPECT_EQ(check([](Tape& tape, std::span<const Var> in) { return layer_norm(tape, in[0], {}, {}, 1e-5); },
                  {random(Shape{5, 9}, "x")}),
            "");
}

TEST_F(OpGradient, LayerNormWithParameters) {
  EXPECT_EQ(check([](Tape& tape, std::span<const Var> in) { return layer_norm(tape, in[0], in[1], in[2], 1e-5); },
                  {random(Shape{5, 9}, "x"), random(Shape{9}, "weight"), random(Shape{9}, "bias")}),
            "");
}

TEST_F(OpGradient, Linear) {
  EXPECT_EQ(check(
                [](Tape& tape, std::span<const Var> in) {
                  return linear(tape, in[0], std::array{LinearWeights{in[1], {}}}, identity_reducer());
                },
                {random(Shape{5, 4}, "x"), random(Shape{3, 4}, "weight")}),
            "");
}

TEST_F(OpGradient, LinearOfThreeLayers) {
  EXPECT_EQ(check(
                [](Tape& tape, std::span<const Var> in) {
                  return linear(
                      tape, in[0],
                      std::array{LinearWeights{in[1], in[2]}, LinearWeights{in[3], {}}, LinearWeights{in[4], in[5]}},
                      identity_reducer());
                },
                {random(Shape{5, 4}, "x"), random(Shape{3, 4}, "q"), random(Shape{3, 1}, "q bias"),
                 random(Shape{2, 4}, "k"), random(Shape{6, 4}, "v"), random(Shape{6, 1}, "v bias")}),
            "");
}

TEST_F(OpGradient, LinearOfShard) {
  EXPECT_EQ(
      check([](Tape& tape, std::span<const Var> in) { return linear_of_shard(tape, in[0], in[1], identity_reducer()); },
            {random(Shape{5, 3}, "x"), random(Shape{3, 4}, "weight")}),
      "");
}

TEST_F(OpGradient, GeluMlp) {
  const std::vector<Tensor> inputs = {random(Shape{5, 4}, "x"), random(Shape{7, 4}, "in"), random(Shape{7, 1}, "bias"),
                                      random(Shape{7, 3}, "out")};
  EXPECT_EQ(check(
                [](Tape& tape, std::span<const Var> in) {
                  return gelu_mlp(tape, in[0], {in[1], in[2]}, in[3], identity_reducer());
                },
                inputs),
            "");
  EXPECT_EQ(check(
                [](Tape& tape, std::span<const Var> in) {
                  return gelu_mlp(tape, in[0], {in[1], {}}, in[2], identity_reducer());
                },
                {inputs[0], inputs[1], inputs[3]}),
            "");
}

TEST_F(OpGradient, AddBias) {
  EXPECT_EQ(check([](Tape& tape, std::span<const Var> in) { return add_bias(tape, gelu(tape, in[0]), in[1]); },
                  {random(Shape{5, 4}, "y"), random(Shape{4}, "bias")}),
            "");
}

TEST_F(OpGradient, Embedding) {
  // One word twice, one never, and one that another shard holds.
  const Tensor tokens = test::integers(allocator_, {12, 10, 12, 14, 3});
  EXPECT_EQ(check([&](Tape& tape, std::span<const Var> in) { return embedding(tape, tokens, in[0], 10); },
                  {random(Shape{5, 3}, "table")}),
            "");
}

TEST_F(OpGradient, Rotary) {
  constexpr std::int64_t kHeads = 2, kHeadDim = 6, kSeq = 3;
  Tensor cosine = Tensor::empty(allocator_, Shape{kSeq, 2}, DType::f64, Purpose::weights);
  Tensor sine = Tensor::empty(allocator_, Shape{kSeq, 2}, DType::f64, Purpose::weights);
  kernels::rotary_tables(stream_, 10.0, cosine.view(), sine.view());
  EXPECT_EQ(check([&](Tape& tape,
                      std::span<const Var> in) { return rotary(tape, gelu(tape, in[0]), cosine, sine, kHeads, kSeq); },
                  {random(Shape{2 * kSeq, 3 * kHeads * kHeadDim}, "qkv")}),
            "");
}

TEST_F(OpGradient, RotaryWhoseOutputIsUsedTwice) {
  // Backward rotates its gradient in place, which another slot may share.
  Tensor cosine = Tensor::empty(allocator_, Shape{3, 1}, DType::f64, Purpose::weights);
  Tensor sine = Tensor::empty(allocator_, Shape{3, 1}, DType::f64, Purpose::weights);
  kernels::rotary_tables(stream_, 10.0, cosine.view(), sine.view());
  EXPECT_EQ(check(
                [&](Tape& tape, std::span<const Var> in) {
                  const Var other = gelu(tape, in[1]);
                  const Var turned = rotary(tape, gelu(tape, in[0]), cosine, sine, 1, 3);
                  return residual(tape, turned, residual(tape, other, turned));
                },
                {random(Shape{3, 6}, "qkv"), random(Shape{3, 6}, "other")}),
            "");
}

TEST_F(OpGradient, CausalAttention) {
  constexpr std::int64_t kBatch = 2, kSeq = 5, kHeads = 2, kHeadDim = 3;
  EXPECT_EQ(check([](Tape& tape, std::span<const Var> in) { return causal_attention(tape, in[0], kBatch, kHeads); },
                  {random(Shape{kBatch * kSeq, 3 * kHeads * kHeadDim}, "qkv")}),
            "");
}

TEST_F(OpGradient, CausalAttentionOverManyKeys) {
  // More keys than any block of the kernel holds.
  EXPECT_EQ(check([](Tape& tape, std::span<const Var> in) { return causal_attention(tape, in[0], 1, 1); },
                  {random(Shape{150, 3}, "qkv")}),
            "");
}

TEST_F(OpGradient, HeadCrossEntropy) {
  const Tensor targets = test::integers(allocator_, {0, 4, -1, 2, 4});
  EXPECT_EQ(check(
                [&](Tape& tape, std::span<const Var> in) {
                  return head_cross_entropy(tape, in[0], in[1], targets, 0, 0.7, identity_reducer()).loss;
                },
                {random(Shape{5, 3}, "h"), random(Shape{5, 3}, "table")}),
            "");
}

TEST_F(OpGradient, HeadCrossEntropyInSeveralChunks) {
  constexpr std::int64_t kRows = 2100;  // chunks are of at most 1024 rows
  std::vector<std::int32_t> target(kRows);
  const Rng rng(3, "targets");
  for (std::size_t t = 0; t < target.size(); ++t) target[t] = static_cast<std::int32_t>(rng.below(t, 4)) - 1;
  const Tensor targets = test::integers(allocator_, target);
  // h has a row of its own for each token and one shared by all rows with the same target, which lie in all chunks:
  // few enough inputs for a check by differences.
  const Tensor own = random(Shape{kRows, 2}, "own");
  EXPECT_EQ(check(
                [&](Tape& tape, std::span<const Var> in) {
                  const Var h = residual(tape, Var(own), embedding(tape, targets, in[0], -1));
                  return head_cross_entropy(tape, h, in[1], targets, 0, 0.01, identity_reducer()).loss;
                },
                {random(Shape{4, 2}, "base"), random(Shape{3, 2}, "table")}),
            "");
}

TEST_F(OpGradient, HeadCrossEntropyWithATiedTable) {
  const Tensor tokens = test::integers(allocator_, {1, 3, 0, 3}), targets = test::integers(allocator_, {3, 0, 3, 2});
  EXPECT_EQ(check(
                [&](Tape& tape, std::span<const Var> in) {
                  const Var h = gelu(tape, embedding(tape, tokens, in[0], 0));
                  return head_cross_entropy(tape, h, in[0], targets, 0, 0.25, identity_reducer()).loss;
                },
                {random(Shape{4, 3}, "table")}),
            "");
}

/// Says that there are other ranks, so that an op takes its steps one by one; there are none, so nothing is added.
class LonelyReducer final : public Reducer {
 public:
  bool is_identity() const override { return false; }
  void sum(Stream&, ConstTensorView, TensorView) override {}
  void max(Stream&, ConstTensorView, TensorView) override {}
};

enum class Path { fused, exchanged };
enum class Result { raw, normalized };

class PattentionGradient : public OpGradient,
                           public testing::WithParamInterface<std::tuple<PattentionNorm, int, Path, Result>> {
 protected:
  static void SetUpTestSuite() { OpGradient::SetUpTestSuite(); }
};

TEST_P(PattentionGradient, OfInputKeysAndValues) {
  const auto [norm, layers, path, result] = GetParam();
  constexpr std::int64_t kRows = 4, kIn = 3, kOut = 2;
  constexpr std::int64_t kTokens[] = {5, 7, 4};  // layers of a group have their own counts
  const char* names[] = {"k0", "v0", "k1", "v1", "k2", "v2"};
  std::vector<Tensor> inputs = {random(Shape{kRows, kIn}, "x")};
  std::vector<double> scales;
  for (int g = 0; g < layers; ++g) {
    const std::int64_t n = kTokens[g];
    inputs.push_back(random(Shape{n, kIn}, names[2 * g]));
    inputs.push_back(random(Shape{n, kOut}, names[2 * g + 1]));
    scales.push_back(initial_scale(norm, n) * 0.9);  // a stored number, not a function of n
  }
  LonelyReducer lonely;
  Reducer& reducer = path == Path::fused ? identity_reducer() : lonely;
  EXPECT_EQ(check(
                [&, norm = norm, result = result](Tape& tape, std::span<const Var> in) {
                  std::vector<PattentionTokens> tokens;
                  for (std::size_t g = 0; g < scales.size(); ++g) {
                    tokens.push_back({in[1 + 2 * g], in[2 + 2 * g], scales[g]});
                  }
                  const Var u = pattention(tape, in[0], tokens, norm, reducer);
                  return result == Result::raw ? u : row_normalize(tape, u, scales, norm);
                },
                std::move(inputs)),
            "");
}

std::string name(const testing::TestParamInfo<PattentionGradient::ParamType>& p) {
  return std::string(name_of(std::get<0>(p.param))) + "_" + std::to_string(std::get<1>(p.param)) +
         (std::get<2>(p.param) == Path::fused ? "_fused" : "_exchanged") +
         (std::get<3>(p.param) == Result::raw ? "_raw" : "_normalized");
}

INSTANTIATE_TEST_SUITE_P(Norms, PattentionGradient,
                         testing::Combine(testing::Values(PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm),
                                          testing::Values(1, 3), testing::Values(Path::fused, Path::exchanged),
                                          testing::Values(Result::raw, Result::normalized)),
                         name);
// The raw result is relative to the largest score, which backward takes for a constant: only what row_normalize makes
// of it has a gradient to check.
INSTANTIATE_TEST_SUITE_P(Softmax, PattentionGradient,
                         testing::Combine(testing::Values(PattentionNorm::softmax), testing::Values(1, 3),
                                          testing::Values(Path::fused, Path::exchanged),
                                          testing::Values(Result::normalized)),
                         name);

}  // namespace
}  // namespace tforge
