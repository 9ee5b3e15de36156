// The tape: where gradients are gathered, shared and handed on, when hooks fire, and what memory it takes.
#include "autograd/tape.h"

#include <array>
#include <cmath>
#include <limits>

#include "autograd/ops/attention.h"
#include "autograd/ops/gelu.h"
#include "autograd/ops/head_cross_entropy.h"
#include "autograd/ops/pattention.h"
#include "autograd/ops/residual.h"
#include "core/copy.h"
#include "core/errors.h"
#include "support/scratch.h"
#include "values.h"

namespace tforge {
namespace {

using test::error_of;
using test::negate;
using test::Parameter;
using test::times;
using test::Values;
using test::values_of;
using test::weighted_sum;

class TapeTest : public testing::Test {
 protected:
  Allocator allocator;
  Stream stream;
  Tape tape{allocator, stream, TapeMode::training};
};

TEST_F(TapeTest, ChainRule) {
  const Parameter p(allocator, {1, 2, 3});
  const Var loss = weighted_sum(tape, times(tape, times(tape, p.var, 2), 5), {1, 0, -1});
  EXPECT_EQ(values_of(loss.value()), Values{-20});
  tape.backward(loss);
  EXPECT_EQ(p.grad(), (Values{10, 0, -10}));
}

TEST_F(TapeTest, AValueWithoutGradientGetsNone) {
  const Var constant(test::vector(allocator, {1, 2}));
  const Var y = times(tape, constant, 3);
  EXPECT_FALSE(y.requires_grad());
  EXPECT_FALSE(y.grad().written());
  tape.backward(weighted_sum(tape, y, {1, 1}));  // nothing to do is no error
}

TEST_F(TapeTest, OneValueReadByTwoOps) {
  const Parameter p(allocator, {1, 2});
  const Var h = times(tape, p.var, 1);
  tape.backward(weighted_sum(tape, residual(tape, times(tape, h, 5), times(tape, h, 7)), {1, 10}));
  EXPECT_EQ(p.grad(), (Values{12, 120}));
}

// residual hands one gradient tensor to both of its inputs. Whoever writes to it next must not change it for the other,
// in whatever order the writers come.
TEST_F(TapeTest, SharedGradientThenAWriter) {
  const Parameter p(allocator, {1, 2}), q(allocator, {3, 4});
  const Var h = times(tape, p.var, 1);
  const Var b = times(tape, h, 5);  // writes to h after residual has shared its gradient with h and b
  const Var s = residual(tape, h, b);
  tape.backward(weighted_sum(tape, s, {1, 10}));
  EXPECT_EQ(p.grad(), (Values{6, 60}));

  const Var g = times(tape, q.var, 1), other = times(tape, q.var, 100);
  const Var doubled = times(tape, g, 2);  // runs between the sharing and the other's reading
  tape.backward(weighted_sum(tape, residual(tape, residual(tape, g, other), doubled), {1, 10}));
  EXPECT_EQ(q.grad(), (Values{103, 1030}));
}

TEST_F(TapeTest, AWriterThenASharedGradient) {
  const Parameter p(allocator, {1, 2}), q(allocator, {3, 4});
  const Var h = times(tape, p.var, 1), k = times(tape, q.var, 1);
  const Var c = residual(tape, h, k);
  const Var t = times(tape, h, 5);  // backward writes to h before residual hands over its gradient
  tape.backward(weighted_sum(tape, residual(tape, c, t), {1, 10}));
  EXPECT_EQ(p.grad(), (Values{6, 60}));
  EXPECT_EQ(q.grad(), (Values{1, 10}));
}

TEST_F(TapeTest, BothSidesOfASumAreOneValue) {
  const Parameter p(allocator, {1, 2});
  const Var h = times(tape, p.var, 3);
  tape.backward(weighted_sum(tape, residual(tape, h, h), {1, 10}));
  EXPECT_EQ(p.grad(), (Values{6, 60}));
}

TEST_F(TapeTest, AGradientChangedInPlaceIsNotAnothers) {
  for (const bool negated_first : {true, false}) {
    const Parameter p(allocator, {1, 2}), q(allocator, {3, 4});
    const Var a = negated_first ? negate(tape, p.var) : times(tape, q.var, 1);
    const Var b = negated_first ? times(tape, q.var, 1) : negate(tape, p.var);
    tape.backward(weighted_sum(tape, residual(tape, a, b), {1, 10}));
    EXPECT_EQ(p.grad(), (Values{-1, -10}));
    EXPECT_EQ(q.grad(), (Values{1, 10}));
  }
}

TEST_F(TapeTest, AParameterKeepsItsOwnGradientTensor) {
  const Parameter p(allocator, {1, 2}), q(allocator, {3, 4});
  const void* place = p.gradient.view().data;
  tape.backward(weighted_sum(tape, residual(tape, p.var, q.var), {1, 10}));  // adopted straight from residual
  EXPECT_EQ(p.grad(), (Values{1, 10}));
  EXPECT_EQ(q.grad(), (Values{1, 10}));
  EXPECT_EQ(p.var.grad().read().data, place);
}

TEST_F(TapeTest, MicroBatchesAddUpUntilCleared) {
  Parameter p(allocator, {1, 2});
  tape.backward(weighted_sum(tape, times(tape, p.var, 2), {1, 10}));
  tape.backward(weighted_sum(tape, times(tape, p.var, 3), {1, 1}));
  EXPECT_EQ(p.grad(), (Values{5, 23}));
  p.var.clear_grad();
  EXPECT_FALSE(p.var.grad().written());
  EXPECT_THROW(p.var.grad().read(), InternalError);
  tape.backward(weighted_sum(tape, times(tape, p.var, 4), {1, 1}));
  EXPECT_EQ(p.grad(), (Values{4, 4}));
}

/// Notes each call and what the gradient was at that moment.
struct Recorder final : GradHook {
  void gradient_ready(int parameter_id) override {
    ids.push_back(parameter_id);
    if (watched != nullptr) seen.push_back(watched->grad());
  }
  const Parameter* watched = nullptr;
  std::vector<int> ids;
  std::vector<Values> seen;
};

TEST_F(TapeTest, HookFiresOnceAfterTheLastWriterOfATiedParameter) {
  Recorder hook;
  const Parameter tied(allocator, {1, 2}, &hook, 4), other(allocator, {3, 4}, &hook, 9);
  hook.watched = &tied;
  const Var first = times(tape, tied.var, 2);  // as an embedding would
  const Var middle = residual(tape, first, times(tape, other.var, 1));
  const Var last = residual(tape, middle, times(tape, tied.var, 5));  // as a tied head would
  tape.backward(weighted_sum(tape, last, {1, 10}));
  EXPECT_EQ(hook.ids, (std::vector{9, 4}));
  EXPECT_EQ(hook.seen.back(), (Values{7, 70}));
  EXPECT_EQ(tied.grad(), (Values{7, 70}));

  tape.backward(weighted_sum(tape, times(tape, tied.var, 1), {1, 1}));  // and again in the next micro-batch
  EXPECT_EQ(hook.ids, (std::vector{9, 4, 4}));
  EXPECT_EQ(hook.seen.back(), (Values{8, 71}));
}

TEST_F(TapeTest, HookWaitsForUsesThatDoNotReachTheLoss) {
  Recorder hook;
  const Parameter p(allocator, {1, 2}, &hook, 1);
  const Var unused = times(tape, p.var, 100);
  tape.backward(weighted_sum(tape, times(tape, p.var, 3), {1, 1}));
  EXPECT_EQ(hook.ids, std::vector{1});
  EXPECT_EQ(p.grad(), (Values{3, 3}));
  EXPECT_FALSE(unused.grad().written());
}

TEST_F(TapeTest, ClearForgetsAPassWithoutFiringHooks) {
  Recorder hook;
  const Parameter p(allocator, {1, 2}, &hook, 1);
  { const Var unused = times(tape, p.var, 100); }
  tape.clear();
  EXPECT_TRUE(hook.ids.empty());
  tape.backward(weighted_sum(tape, times(tape, p.var, 3), {1, 1}));
  EXPECT_EQ(hook.ids, std::vector{1});
  EXPECT_EQ(p.grad(), (Values{3, 3}));
}

TEST_F(TapeTest, InferenceRecordsNothing) {
  Tape inference(allocator, stream, TapeMode::inference);
  Recorder hook;
  const Parameter p(allocator, {1, 2}, &hook, 1);
  EXPECT_EQ(inference.record<test::TimesNode>(p.var, 2.0), nullptr);
  const std::size_t before = allocator.report().in_use[static_cast<std::size_t>(Purpose::activations)];
  {
    Var y = times(inference, p.var, 2);
    for (int i = 0; i < 10; ++i) y = times(inference, y, 1);
    EXPECT_FALSE(y.requires_grad());
    EXPECT_EQ(values_of(y.value()), (Values{2, 4}));
    // One value is alive, not eleven.
    EXPECT_EQ(allocator.report().in_use[static_cast<std::size_t>(Purpose::activations)], before + 2 * sizeof(double));
  }
  const Var loss = weighted_sum(inference, p.var, {1, 1});
  EXPECT_EQ(error_of<InternalError>([&] { inference.backward(loss); }), "backward on a tape that does not record");
  EXPECT_TRUE(hook.ids.empty());
}

TEST_F(TapeTest, SavedTensorsAreFreedWhileBackwardRuns) {
  constexpr std::int64_t kSize = 4096;
  const Parameter p(allocator, Values(kSize, 0.5));
  const auto in_use = [&] { return allocator.report().in_use[static_cast<std::size_t>(Purpose::activations)]; };
  const std::size_t before = in_use();
  constexpr int kDepth = 20;
  Var y = gelu(tape, p.var);
  for (int i = 1; i < kDepth; ++i) y = gelu(tape, y);
  const Var loss = weighted_sum(tape, y, Values(kSize, 1));
  y = Var();
  const std::size_t forward = in_use();
  EXPECT_GE(forward, before + (kDepth - 1) * kSize * sizeof(double));
  allocator.reset_peak();
  tape.backward(loss);
  // Two gradients at a time on top of what forward saved; 20 if nothing were given back on the way.
  EXPECT_LE(allocator.report().peak[static_cast<std::size_t>(Purpose::activations)],
            forward + 3 * kSize * sizeof(double));
  EXPECT_LE(in_use(), before + kSize * sizeof(double));
}

TEST_F(TapeTest, TheThirdPassAsksForNoMemory) {
  Parameter p(allocator, Values(5000, 0.5));
  std::vector<std::uint64_t> requests;
  std::vector<const void*> nodes;
  for (int pass = 0; pass < 4; ++pass) {
    p.var.clear_grad();
    Var y = p.var;
    for (int i = 0; i < 30; ++i) y = residual(tape, y, gelu(tape, times(tape, y, 0.1)));
    auto* node = tape.record<test::TimesNode>(y, 1.0);
    nodes.push_back(node);
    y = tape.output(y.value(), node);
    tape.backward(weighted_sum(tape, y, Values(5000, 1)));
    requests.push_back(allocator.report().system_requests);
  }
  EXPECT_GT(requests[0], 10U);
  EXPECT_EQ(requests[2], requests[1]);
  EXPECT_EQ(requests[3], requests[1]);
  EXPECT_EQ(nodes[3], nodes[0]);  // and the nodes lie where they lay
}

TEST_F(TapeTest, ThousandsOfNodes) {
  const Parameter p(allocator, {1});
  for (int pass = 0; pass < 2; ++pass) {
    Var y = p.var;
    for (int i = 0; i < 5000; ++i) y = times(tape, y, i % 2 == 0 ? 2 : 0.5);
    tape.backward(weighted_sum(tape, y, {3}));
  }
  EXPECT_EQ(p.grad(), Values{6});
}

TEST_F(TapeTest, LossMustBeOneNumber) {
  const Parameter p(allocator, {1, 2});
  EXPECT_EQ(error_of<InternalError>([&] { tape.backward(times(tape, p.var, 2)); }),
            "backward starts from one number, not from shape [2]");
}

TEST_F(TapeTest, GradientsOfAnotherShapeAreRefused) {
  const Tensor two = test::vector(allocator, {1, 2}), three = test::vector(allocator, {1, 2, 3});
  EXPECT_EQ(error_of<ShapeError>([&] { Var::parameter(two, three, nullptr, 0); }),
            "a parameter of shape [2] and f64 with a gradient of shape [3] and f64");
  const Parameter p(allocator, {1, 2});
  const Var y = times(tape, p.var, 1);
  Grad grad = y.grad();
  EXPECT_EQ(error_of<ShapeError>([&] { grad.adopt(tape, three); }),
            "a gradient of shape [3] was handed to a value of shape [2]");
  EXPECT_THROW(grad.take(tape), InternalError);
  EXPECT_THROW(grad.share(), InternalError);
}

TEST_F(TapeTest, AnOpHasAtMostTwelveInputs) {
  struct Greedy final : Node {
    explicit Greedy(const Var& x) {
      for (int i = 0; i < 13; ++i) use(x);
    }
    void backward(Tape&) override {}
  };
  const Parameter p(allocator, {1});
  EXPECT_EQ(error_of<InternalError>([&] { tape.record<Greedy>(p.var); }), "an op declares more than 12 inputs");
}

TEST_F(TapeTest, ResidualReusesAValueThatNobodyElseHolds) {
  const Var h(test::vector(allocator, {1, 2}));
  Var y(test::vector(allocator, {10, 20}));
  const void* place = y.view().data;
  const Var kept = y;  // NOLINT(performance-unnecessary-copy-initialization): a second holder is the point
  const Var fresh = residual(tape, h, y);
  EXPECT_NE(fresh.view().data, place);
  EXPECT_EQ(values_of(kept.value()), (Values{10, 20}));
  EXPECT_EQ(values_of(fresh.value()), (Values{11, 22}));

  Var alone(test::vector(allocator, {10, 20}));
  place = alone.view().data;
  const Var sum = residual(tape, h, std::move(alone));
  EXPECT_EQ(sum.view().data, place);
  EXPECT_EQ(values_of(sum.value()), (Values{11, 22}));
}

TEST_F(TapeTest, RotaryRefusesAValueThatIsHeldElsewhere) {
  const Tensor table = test::tensor(allocator, Shape{1, 1}, {1});
  const Tensor qkv = test::tensor(allocator, Shape{1, 6}, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(error_of<InternalError>([&] { rotary(tape, Var(qkv), table, table, 1, 1); }),
            "rotary: somebody else holds the value it changes");
}

TEST_F(TapeTest, RotaryOverNoDimensionsChangesNothing) {
  const Tensor none = Tensor::empty(allocator, Shape{1, 0}, DType::f64, Purpose::weights);
  const Tensor qkv = test::tensor(allocator, Shape{1, 6}, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(rotary(tape, Var(qkv), none, none, 1, 1).view().data, std::as_const(qkv).view().data);
}

TEST_F(TapeTest, AttentionChecksItsShape) {
  const Var qkv(test::random(allocator, Shape{4, 6}, "qkv"));
  EXPECT_EQ(error_of<ShapeError>([&] { causal_attention(tape, qkv, 3, 1); }),
            "causal_attention: qkv of shape [4, 6] for 3 sequences and 1 heads");
  EXPECT_THROW(causal_attention(tape, qkv, 2, 4), ShapeError);
}

TEST_F(TapeTest, FlooredRowsAreCountedAndPassNoGradient) {
  const Tensor x = test::tensor(allocator, Shape{3, 2}, {1, 2, 0, 0, 3, 4});  // the scores of the second row are 0
  const Tensor dx = test::tensor(allocator, Shape{3, 2}, Values(6, std::nan("")));
  const Var input = Var::parameter(x, dx, nullptr, 0);
  const PattentionTokens layer{Var(test::random(allocator, Shape{4, 2}, "k")),
                               Var(test::random(allocator, Shape{4, 2}, "v")), 2.0};
  const Var y = pattention(tape, input, std::span(&layer, 1), PattentionNorm::l2_norm_gelu, identity_reducer());
  EXPECT_EQ(tape.take_floored_rows(), 1);
  EXPECT_EQ(values_of(y.value().rows(1, 1)), (Values{0, 0}));
  tape.backward(weighted_sum(tape, y, Values(6, 1)));
  EXPECT_EQ(values_of(dx.rows(1, 1)), (Values{0, 0}));
  EXPECT_NE(values_of(dx.rows(0, 1)), (Values{0, 0}));
}

TEST_F(TapeTest, HeadLossIsARootAndTheSameWithoutGradients) {
  const Tensor h = test::random(allocator, Shape{5, 3}, "h"), table = test::random(allocator, Shape{4, 3}, "table");
  const Tensor targets = test::integers(allocator, {0, 3, -1, 2, 2});
  const Tensor dh = Tensor::zeros(allocator, Shape{5, 3}, DType::f64, Purpose::gradients);
  const Var h_var = Var::parameter(h, dh, nullptr, 0);
  const HeadLoss loss = head_cross_entropy(tape, h_var, Var(table), targets, 0, 0.5, identity_reducer());
  EXPECT_EQ(error_of<InternalError>([&] { tape.backward(times(tape, loss.loss, 2)); }),
            "head_cross_entropy: the loss is not the root of the backward pass");

  // By hand: nll = log sum_v exp(h . table_v) - h . table_target.
  double sum = 0;
  for (std::int64_t t = 0; t < 5; ++t) {
    const std::int32_t target = std::as_const(targets).span<std::int32_t>()[static_cast<std::size_t>(t)];
    if (target < 0) continue;
    std::array<double, 4> logits{};
    for (std::size_t v = 0; v < 4; ++v) {
      for (std::size_t i = 0; i < 3; ++i) {
        logits[v] += h.span<double>()[static_cast<std::size_t>(t) * 3 + i] * table.span<double>()[v * 3 + i];
      }
    }
    double total = 0;
    for (const double l : logits) total += std::exp(l);
    sum += std::log(total) - logits[static_cast<std::size_t>(target)];
  }
  const double nll_sum = number_of(stream, loss.nll_sum);
  EXPECT_NEAR(nll_sum, sum, 1e-13);
  EXPECT_NEAR(values_of(loss.loss.value())[0], 0.5 * sum, 1e-13);

  Tape inference(allocator, stream, TapeMode::inference);
  const HeadLoss same = head_cross_entropy(inference, Var(h), Var(table), targets, 0, 0.5, identity_reducer());
  EXPECT_EQ(number_of(stream, same.nll_sum), nll_sum);
  const Values rows = values_of(head_nll(inference, Var(h), Var(table), targets, 0, identity_reducer()));
  EXPECT_EQ(rows[2], 0);
  EXPECT_EQ(rows[0] + rows[1] + rows[2] + rows[3] + rows[4], nll_sum);
  EXPECT_EQ(
      error_of<ShapeError>([&] { head_nll(inference, Var(h), Var(table), targets.rows(0, 4), 0, identity_reducer()); }),
      "head_cross_entropy: 4 targets for 5 rows");
}

}  // namespace
}  // namespace tforge
