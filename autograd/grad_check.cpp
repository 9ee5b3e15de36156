#include "autograd/grad_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "core/errors.h"
#include "core/rng.h"

namespace tforge {

namespace {

/// r of the linear loss; a result of one element is the loss itself.
Tensor loss_weights(Allocator& allocator, const Shape& shape, std::uint64_t seed) {
  Tensor weights = Tensor::empty(allocator, shape, DType::f64, Purpose::workspace);
  const Rng rng(seed, "grad_check");
  std::uint64_t index = 0;
  for (double& r : weights.span<double>()) r = shape.elements() == 1 ? 1.0 : rng.normal(index++);
  return weights;
}

struct LinearLossNode final : Node {
  LinearLossNode(const Var& y, Tensor weights_) : weights(std::move(weights_)), dy_input(use(y)) {}
  void backward(Tape& tape) override {
    if (dy_input) dy_input.adopt(tape, weights.clone(tape.allocator()));
  }
  Tensor weights;
  Grad dy_input;
};

struct Sum {
  double value = 0;     // sum of r_i y_i
  double absolute = 0;  // sum of |r_i y_i|: what rounding scales with
};

Sum weighted_sum(const Tensor& y, const Tensor& weights) {
  Sum sum;
  const auto values = y.span<double>();
  const auto r = weights.span<double>();
  for (std::size_t i = 0; i < values.size(); ++i) {
    sum.value += r[i] * values[i];
    sum.absolute += std::abs(r[i] * values[i]);
  }
  return sum;
}

Var linear_loss(Tape& tape, const Var& y, const Tensor& weights) {
  if (y.value().elements() == 1) return y;
  const double value = weighted_sum(y.value(), weights).value;
  Tensor loss = Tensor::of<double>(tape.allocator(), Shape{1}, std::span(&value, 1), Purpose::activations);
  return tape.output(std::move(loss), tape.record<LinearLossNode>(y, weights));
}

Sum evaluate(Allocator& allocator, Stream& stream, const DifferentiableFunction& function,
             std::span<const Tensor> inputs, std::uint64_t seed) {
  Tape tape(allocator, stream, TapeMode::inference);
  const std::vector<Var> vars(inputs.begin(), inputs.end());
  const Var y = function(tape, vars);
  return weighted_sum(y.value(), loss_weights(allocator, y.shape(), seed));
}

double largest(std::span<const double> values) {
  double most = 0;
  for (const double v : values) most = std::isnan(v) ? v : std::max(most, std::abs(v));
  return most;
}

}  // namespace

std::string grad_check(Allocator& allocator, Stream& stream, const DifferentiableFunction& function,
                       std::vector<Tensor> inputs, std::uint64_t seed) {
  const double eps = std::numeric_limits<double>::epsilon();
  const double step = std::cbrt(eps);
  const double relative_tolerance = 50 * std::pow(eps, 2.0 / 3);
  constexpr double kTellingFactor = 1000;

  std::vector<Var> parameters;
  std::vector<Tensor> gradients;
  for (Tensor& input : inputs) {
    if (input.dtype() != DType::f64) throw DTypeError("grad_check: an input is {}, want f64", name_of(input.dtype()));
    input = input.clone(allocator);
    gradients.push_back(Tensor::empty(allocator, input.shape(), DType::f64, Purpose::gradients));
    // What backward does not write stays NaN and fails every comparison.
    std::ranges::fill(gradients.back().span<double>(), std::numeric_limits<double>::quiet_NaN());
    parameters.push_back(Var::parameter(input, gradients.back(), nullptr, static_cast<int>(parameters.size())));
  }

  Tape tape(allocator, stream, TapeMode::training);
  const auto run = [&] {
    const Var y = function(tape, parameters);
    const Tensor weights = loss_weights(allocator, y.shape(), seed);
    tape.backward(linear_loss(tape, y, weights));
  };
  run();
  std::vector<Tensor> analytic;
  for (const Tensor& gradient : gradients) analytic.push_back(gradient.clone(allocator));
  run();  // on top of the first

  const double size = evaluate(allocator, stream, function, inputs, seed).absolute;
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    if (!parameters[i].grad().written()) return fmt::format("input {} got no gradient", i);
    const auto got = std::as_const(analytic[i]).span<double>();
    const auto doubled = std::as_const(gradients[i]).span<double>();
    const auto x = inputs[i].span<double>();
    const double most = largest(got);
    const double tolerance = relative_tolerance * (size + most);
    if (most <= kTellingFactor * tolerance) {
      return fmt::format("input {}: the largest gradient is {}, too near zero to be checked", i, most);
    }
    for (std::size_t j = 0; j < got.size(); ++j) {
      const double before = x[j];
      x[j] = before + step;
      const double up = evaluate(allocator, stream, function, inputs, seed).value;
      x[j] = before - step;
      const double down = evaluate(allocator, stream, function, inputs, seed).value;
      x[j] = before;
      const double want = (up - down) / (2 * step);
      // Written so that NaN fails.
      if (!(std::abs(got[j] - want) <= tolerance)) {
        return fmt::format("input {}, element {}: backward gives {}, central differences {} (tolerance {:.2g})", i, j,
                           got[j], want, tolerance);
      }
      if (!(std::abs(doubled[j] - 2 * got[j]) <= tolerance)) {
        return fmt::format("input {}, element {}: {} after one pass and {} after two", i, j, got[j], doubled[j]);
      }
    }
  }
  return "";
}

}  // namespace tforge
