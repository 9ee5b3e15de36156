// What waits for backward: kept, rounded to bf16, or computed again.
#include "autograd/saved.h"

#include <cmath>
#include <cstring>

#include "autograd/grad_check.h"
#include "autograd/ops/attention.h"
#include "autograd/ops/block_attention.h"
#include "autograd/ops/gelu.h"
#include "autograd/ops/layer_norm.h"
#include "autograd/ops/linear_attention.h"
#include "autograd/ops/pattention.h"
#include "autograd/ops/recompute.h"
#include "autograd/ops/residual.h"
#include "core/errors.h"
#include "kernels/elementwise.h"
#include "kernels/random.h"
#include "support/scratch.h"
#include "values.h"

namespace tforge {
namespace {

using test::error_of;
using test::Values;
using test::values_of;
using test::weighted_sum;

constexpr SavePolicy kKept{};
constexpr SavePolicy kScores{Recompute::scores, SavedDType::same};
constexpr SavePolicy kRounded{Recompute::none, SavedDType::bf16};

class SavedTest : public testing::Test {
 protected:
  std::size_t activations() const { return allocator.report().in_use[static_cast<std::size_t>(Purpose::activations)]; }
  Tensor random(const Shape& shape, const char* name, double size = 1) {
    Tensor t = Tensor::empty(allocator, shape, DType::f32, Purpose::activations);
    kernels::fill_normal(stream, 3, name, 0, size, GradMode::overwrite, t.view());
    return t;
  }
  Allocator allocator;
  Stream stream;
};

TEST_F(SavedTest, IsTheTensorItself) {
  Tape tape(allocator, stream, TapeMode::training);
  const Tensor x = random(Shape{8, 32}, "x");
  const std::size_t before = activations();
  const Saved saved(tape, x);
  EXPECT_EQ(activations(), before);
  EXPECT_EQ(saved.load(tape).view().data, x.view().data);
}

TEST_F(SavedTest, IsARoundedCopyInHalfTheMemory) {
  Tape tape(allocator, stream, TapeMode::training, kRounded);
  Tensor x = random(Shape{8, 33}, "x");
  const std::vector<float> before(x.span<float>().begin(), x.span<float>().end());
  const std::size_t used = activations();
  const Saved saved(tape, x);
  EXPECT_EQ(activations(), used + x.bytes() / 2);
  x.fill_zero();
  const Tensor y = saved.load(tape);
  EXPECT_EQ(saved.shape(), x.shape());
  for (std::size_t i = 0; i < before.size(); ++i) EXPECT_EQ(y.span<float>()[i], static_cast<float>(bf16(before[i])));
  EXPECT_THROW(Saved(tape, test::random(allocator, Shape{2, 2}, "f64")), DTypeError);
}

// ---- recomputed ----

/// A block with a residual stream and a parameter, as the model's.
Var small_block(Tape& tape, Var h, const Var& k, const Var& v) {
  const PattentionTokens layer{k, v, 2.0};
  const Var u = layer_norm(tape, h, {}, {}, 1e-5);
  h = residual(tape, h, pattention(tape, u, std::span(&layer, 1), PattentionNorm::l2_norm_gelu, identity_reducer()));
  return residual(tape, h, gelu(tape, h));
}

TEST_F(SavedTest, GradientThroughRecomputedBlocks) {
  EXPECT_EQ(grad_check(allocator, stream,
                       [](Tape& tape, std::span<const Var> in) {
                         Var h = in[0];
                         for (int i = 0; i < 2; ++i) {
                           h = recomputed(
                               tape, h, [in](Tape& on, Var x) { return small_block(on, std::move(x), in[1], in[2]); });
                         }
                         return h;
                       },
                       {test::random(allocator, Shape{4, 3}, "h"), test::random(allocator, Shape{5, 3}, "k"),
                        test::random(allocator, Shape{5, 3}, "v")}),
            "");
}

/// Counts what became ready.
class Counter final : public GradHook {
 public:
  void gradient_ready(int) override { ++count; }
  int count = 0;
};

TEST_F(SavedTest, RecomputedKeepsTheInputAlone) {
  constexpr std::int64_t kRows = 64, kWidth = 32, kTokens = 96;
  constexpr int kBlocks = 6;
  Counter hook;
  std::vector<Tensor> grads;
  std::vector<Var> parameters;
  const auto parameter = [&](const Shape& shape, const std::string& name, GradHook* hears) {
    grads.push_back(Tensor::zeros(allocator, shape, DType::f64, Purpose::gradients));
    parameters.push_back(Var::parameter(test::random(allocator, shape, name.c_str()), grads.back(), hears, 0));
  };
  parameter(Shape{kRows, kWidth}, "h", nullptr);
  for (int i = 0; i < kBlocks; ++i) {
    parameter(Shape{kTokens, kWidth}, "k" + std::to_string(i), &hook);
    parameter(Shape{kTokens, kWidth}, "v" + std::to_string(i), &hook);
  }
  // A row that LayerNorm makes zero has no scores: it is floored in each block, in forward alone.
  Tensor first = parameters[0].value().rows(0, 1);
  first.fill_zero();

  struct Pass {
    std::vector<Values> gradients;
    std::size_t kept, peak;
    std::uint64_t requests;
    std::int64_t floored;
    int ready;
  };
  Tape tape(allocator, stream, TapeMode::training);
  const auto pass = [&](Recompute recompute) {
    for (Var& p : parameters) p.clear_grad();
    hook.count = 0;
    tape.take_floored_rows();
    const std::size_t before = activations();
    allocator.reset_peak();
    Var h = parameters[0];
    for (std::size_t i = 0; i < kBlocks; ++i) {
      const auto block = [&k = parameters[1 + 2 * i], &v = parameters[2 + 2 * i]](Tape& on, Var x) {
        return small_block(on, std::move(x), k, v);
      };
      h = recompute == Recompute::block ? recomputed(tape, std::move(h), block) : block(tape, std::move(h));
    }
    const Var loss = weighted_sum(tape, h, values_of(test::random(allocator, h.shape(), "r")));
    h = Var();
    const std::size_t kept = activations() - before;
    tape.backward(loss);
    Pass result{{},
                kept,
                allocator.report().peak[static_cast<std::size_t>(Purpose::activations)] - before,
                allocator.report().system_requests,
                tape.take_floored_rows(),
                hook.count};
    for (const Tensor& g : grads) result.gradients.push_back(values_of(g));
    return result;
  };
  const Pass plain = pass(Recompute::none);
  EXPECT_EQ(plain.floored, kBlocks);
  EXPECT_EQ(plain.ready, 2 * kBlocks);
  std::vector<std::uint64_t> requests;
  for (int i = 0; i < 4; ++i) {
    const Pass again = pass(Recompute::block);
    EXPECT_EQ(again.gradients, plain.gradients);
    EXPECT_EQ(again.floored, plain.floored);
    EXPECT_EQ(again.ready, plain.ready);
    // The inputs of the blocks but the first, which is the parameter's own, and the loss.
    EXPECT_EQ(again.kept, (kBlocks - 1) * parameters[0].value().bytes() + sizeof(double));
    EXPECT_LT(again.peak, plain.peak / 2);
    requests.push_back(again.requests);
  }
  EXPECT_EQ(requests[3], requests[1]);
}

TEST_F(SavedTest, RecomputedWantsAnInputWithAGradient) {
  Tape tape(allocator, stream, TapeMode::training);
  const Var x(test::random(allocator, Shape{2, 2}, "x"));
  const auto f = [](Tape& on, const Var& in) { return gelu(on, in); };
  EXPECT_EQ(error_of<InternalError>([&] { recomputed(tape, x, f); }), "recomputed: the input wants no gradient");
  Tape inference(allocator, stream, TapeMode::inference);
  EXPECT_EQ(values_of(recomputed(inference, x, f).value()), values_of(gelu(inference, x).value()));
}

// ---- ops under each policy ----

/// The gradients of an op's inputs under a random linear loss, f32.
struct Gradients {
  std::vector<Tensor> of;
  std::size_t kept;  // bytes of activations between forward and backward
};

/// Says that there are other ranks, so that an op takes its steps one by one; there are none, so nothing is added.
class LonelyReducer final : public Reducer {
 public:
  bool is_identity() const override { return false; }
  void sum(Stream&, ConstTensorView, TensorView) override {}
  void max(Stream&, ConstTensorView, TensorView) override {}
};

template <class Op>
Gradients gradients(Allocator& allocator, Stream& stream, SavePolicy saves, const std::vector<Tensor>& inputs,
                    const Op& op) {
  Gradients result;
  std::vector<Var> vars;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    result.of.push_back(Tensor::zeros(allocator, inputs[i].shape(), DType::f32, Purpose::gradients));
    vars.push_back(Var::parameter(inputs[i], result.of.back(), nullptr, static_cast<int>(i)));
  }
  const auto used = [&] { return allocator.report().in_use[static_cast<std::size_t>(Purpose::activations)]; };
  Tape tape(allocator, stream, TapeMode::training, saves);
  const std::size_t before = used();
  const Var y = op(tape, vars);
  result.kept = used() - before - y.value().bytes();
  Tensor dy = Tensor::empty(allocator, y.shape(), DType::f32, Purpose::activations);
  kernels::fill_normal(stream, 9, "dy", 0, 1, GradMode::overwrite, dy.view());
  tape.backward(y, std::move(dy));
  return result;
}

void expect_same_bits(const Gradients& a, const Gradients& b, std::string_view what) {
  for (std::size_t i = 0; i < a.of.size(); ++i) {
    EXPECT_EQ(std::memcmp(a.of[i].view().data, b.of[i].view().data, a.of[i].bytes()), 0) << what << " input " << i;
  }
}

/// ||a - b|| / ||b||, Frobenius
double distance(const Tensor& a, const Tensor& b) {
  double difference = 0, size = 0;
  const auto x = a.span<float>(), y = b.span<float>();
  for (std::size_t i = 0; i < x.size(); ++i) {
    difference += std::pow(static_cast<double>(x[i]) - static_cast<double>(y[i]), 2);
    size += std::pow(static_cast<double>(y[i]), 2);
  }
  return std::sqrt(difference / size);
}

class PattentionSaved : public SavedTest, public testing::WithParamInterface<PattentionNorm> {
 protected:
  static constexpr std::int64_t kRows = 96, kWidth = 64, kTokens = 256;
  Gradients run(SavePolicy saves, Reducer& reducer) {
    std::vector<Tensor> inputs = {random(Shape{kRows, kWidth}, "x")};
    for (const char* name : {"k0", "v0", "k1", "v1", "k2", "v2"}) {
      inputs.push_back(random(Shape{kTokens, kWidth}, name, 0.02));
    }
    return gradients(allocator, stream, saves, inputs, [&](Tape& tape, std::span<const Var> in) {
      const double scale = initial_scale(GetParam(), kTokens);
      const std::array<PattentionTokens, 3> layers = {
          {{in[1], in[2], scale}, {in[3], in[4], scale}, {in[5], in[6], scale}}};
      const std::array<double, 3> scales = {scale, scale, scale};
      return row_normalize(tape, pattention(tape, in[0], layers, GetParam(), reducer), scales, GetParam());
    });
  }
};

TEST_P(PattentionSaved, RecomputedScoresGiveTheSameBits) {
  LonelyReducer lonely;
  for (Reducer* reducer : {&identity_reducer(), static_cast<Reducer*>(&lonely)}) {
    const Gradients kept = run(kKept, *reducer), again = run(kScores, *reducer);
    expect_same_bits(again, kept, name_of(GetParam()));
    EXPECT_EQ(kept.kept - again.kept, 3U * kRows * kTokens * sizeof(float));
  }
}

TEST_P(PattentionSaved, Bf16IsCloseInHalfTheMemory) {
  LonelyReducer lonely;
  // Of the gradients of x and of the tokens. Rounding alone moves a tensor by 1.7e-3 of its norm: an element by at
  // most 2^-8 of it.
  constexpr double kBoundOfInput = 2e-3, kBoundOfTokens = 3e-3;
  for (Reducer* reducer : {&identity_reducer(), static_cast<Reducer*>(&lonely)}) {
    for (const Recompute recompute : {Recompute::none, Recompute::scores}) {
      const Gradients want = run({recompute, SavedDType::same}, *reducer);
      const Gradients got = run({recompute, SavedDType::bf16}, *reducer);
      for (std::size_t i = 0; i < want.of.size(); ++i) {
        const double error = distance(got.of[i], want.of[i]);
        EXPECT_LE(error, i == 0 ? kBoundOfInput : kBoundOfTokens) << "input " << i;
        EXPECT_GT(error, 1e-5) << "input " << i << " was not rounded";
      }
      // x was a parameter's own memory before; the row numbers stay as they are.
      EXPECT_LE(got.kept, want.kept / 2 + kRows * kWidth * sizeof(bf16) + 3 * kRows * sizeof(bf16));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Norms, PattentionSaved,
                         testing::Values(PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm,
                                         PattentionNorm::softmax),
                         [](const auto& p) { return std::string(name_of(p.param)); });

TEST_F(SavedTest, Bf16OfTheOtherOps) {
  constexpr std::int64_t kBatch = 2, kSeq = 48, kHeads = 2, kHeadDim = 16;
  const auto check = [&](const char* what, const std::vector<Tensor>& inputs, const auto& op, double bound) {
    const Gradients want = gradients(allocator, stream, kKept, inputs, op);
    const Gradients got = gradients(allocator, stream, kRounded, inputs, op);
    for (std::size_t i = 0; i < want.of.size(); ++i) {
      const double error = distance(got.of[i], want.of[i]);
      EXPECT_LE(error, bound) << what << " input " << i;
      EXPECT_GT(error, 1e-5) << what << " input " << i << " was not rounded";
    }
  };
  const Tensor x = random(Shape{kBatch * kSeq, 40}, "x");
  check(
      "gelu", {x}, [](Tape& tape, std::span<const Var> in) { return gelu(tape, in[0]); }, 2e-3);
  check(
      "layer_norm", {x}, [](Tape& tape, std::span<const Var> in) { return layer_norm(tape, in[0], {}, {}, 1e-5); },
      1e-3);
  check(
      "attention", {random(Shape{kBatch * kSeq, 3 * kHeads * kHeadDim}, "qkv")},
      [](Tape& tape, std::span<const Var> in) { return causal_attention(tape, in[0], kBatch, kHeads); }, 4e-3);
  Tensor angles = Tensor::empty(allocator, Shape{kSeq, 2}, DType::f32, Purpose::weights);
  kernels::cosine_features(stream, angles.view());
  check(
      "linear attention", {random(Shape{kBatch * kSeq, 3 * kHeads * kHeadDim}, "qkv")},
      [&](Tape& tape, std::span<const Var> in) {
        return linear_attention(tape, in[0], kBatch, kHeads, {kernels::Features::relu_cosine, 2 * kHeadDim, angles});
      },
      4e-3);
  check(
      "block attention",
      {random(Shape{kBatch * kSeq, 3 * kHeads * kHeadDim}, "qkv"), random(Shape{kHeads * 3, 20}, "keys", 0.2),
       random(Shape{kHeads * 3, 20}, "values", 0.2)},
      [](Tape& tape, std::span<const Var> in) {
        return block_attention(tape, in[0], kBatch, kHeads, {in[1], in[2]});
      },
      4e-3);
}

}  // namespace
}  // namespace tforge
