// The gradient check finds what it is there to find.
#include "autograd/grad_check.h"

#include <string>

#include "core/errors.h"
#include "values.h"

namespace tforge {
namespace {

enum class Fault { none, zero, too_large, one_element, not_written, overwrites };

struct SquareNode final : Node {
  SquareNode(const Var& input, Fault fault_) : fault(fault_), x(input.value()), dx(use(input)) {}
  void backward(Tape& tape) override {
    if (!dx || fault == Fault::not_written) return;
    const GradTarget to = dx.target(tape);
    const auto* in = x.span<double>().data();
    const auto* from = dy().read().as<double>();
    auto* out = to.view.as<double>();
    for (std::int64_t i = 0; i < to.view.elements(); ++i) {
      double gradient = 2 * in[i] * from[i];
      if (fault == Fault::zero) gradient = 0;
      if (fault == Fault::too_large) gradient *= 1.05;
      if (fault == Fault::one_element && i == 5) gradient += 1e-6;
      const bool add = to.mode == GradMode::accumulate && fault != Fault::overwrites;
      out[i] = gradient + (add ? out[i] : 0);
    }
  }
  Fault fault;
  const Tensor x;
  Grad dx;
};

Var square(Tape& tape, const Var& x, Fault fault) {
  Tensor y = x.value().clone(tape.allocator());
  for (double& v : y.span<double>()) v *= v;
  return tape.output(std::move(y), tape.record<SquareNode>(x, fault));
}

std::string check(Fault fault) {
  Allocator allocator;
  Stream stream;
  return grad_check(allocator, stream, [&](Tape& tape, std::span<const Var> in) { return square(tape, in[0], fault); },
                    {test::random(allocator, Shape{3, 4}, "x")});
}

TEST(GradCheck, PassesARightGradient) { EXPECT_EQ(check(Fault::none), ""); }

TEST(GradCheck, FailsAGradientOfZero) {
  EXPECT_EQ(check(Fault::zero), "input 0: the largest gradient is 0, too near zero to be checked");
}

TEST(GradCheck, FailsAGradientFivePercentTooLarge) {
  EXPECT_NE(check(Fault::too_large).find("input 0, element 0: backward gives"), std::string::npos);
}

TEST(GradCheck, FailsAGradientWrongInOneElementByAMillionth) {
  EXPECT_NE(check(Fault::one_element).find("input 0, element 5: backward gives"), std::string::npos);
}

TEST(GradCheck, FailsAGradientThatIsNotWritten) { EXPECT_EQ(check(Fault::not_written), "input 0 got no gradient"); }

TEST(GradCheck, FailsAGradientThatForgetsWhatWasThere) {
  EXPECT_NE(check(Fault::overwrites).find("after one pass and"), std::string::npos);
}

TEST(GradCheck, FailsAFunctionThatIsFlat) {
  // Right, but it proves nothing: the gradient of x^2 at 0 is 0.
  Allocator allocator;
  Stream stream;
  const std::string fault = grad_check(
      allocator, stream, [](Tape& tape, std::span<const Var> in) { return square(tape, in[0], Fault::none); },
      {test::vector(allocator, {0, 0, 0})});
  EXPECT_EQ(fault, "input 0: the largest gradient is 0, too near zero to be checked");
}

TEST(GradCheck, NamesTheInputAndLeavesItAsItWas) {
  Allocator allocator;
  Stream stream;
  const Tensor a = test::vector(allocator, {1, 2}), b = test::vector(allocator, {3, 4});
  const auto function = [](Fault fault) {
    return [fault](Tape& tape, std::span<const Var> in) {
      // One number, hence the loss itself.
      return test::weighted_sum(tape, square(tape, in[in.size() - 1], fault), {3, 4});
    };
  };
  EXPECT_EQ(grad_check(allocator, stream, function(Fault::none), {b}), "");
  EXPECT_EQ(grad_check(allocator, stream, function(Fault::none), {a, b}), "input 0 got no gradient");
  EXPECT_NE(grad_check(allocator, stream, function(Fault::too_large), {b}).find("central differences 1"),
            std::string::npos);
  EXPECT_EQ(test::values_of(a), (test::Values{1, 2}));
  EXPECT_EQ(test::values_of(b), (test::Values{3, 4}));
}

TEST(GradCheck, WantsF64) {
  Allocator allocator;
  Stream stream;
  const std::vector<float> one{1};
  EXPECT_THROW(grad_check(allocator, stream, [](Tape&, std::span<const Var> in) { return in[0]; },
                          {Tensor::of<float>(allocator, Shape{1}, one, Purpose::activations)}),
               DTypeError);
}

}  // namespace
}  // namespace tforge
